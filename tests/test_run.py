"""Section 9, Run: the program on the demo and on folders, and what can go wrong on the way."""

import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from conftest import (
    CKPT,
    CLASSES,
    DOG,
    PROGRAM,
    ROOT,
    files_in,
    last_records,
    paint,
    paths_of,
    pixels,
    posix,
    records,
)
from PIL import Image
from torchvision.transforms._presets import ImageClassification

import cnn_visualizations as program_file
from cnn_visualizations import (
    LOG_NAME,
    METRICS,
    OUTPUTS,
    PREDICTED,
    TRUTH,
    CallError,
    Explainer,
    draw,
    faithfulness,
    find_class,
    find_difference,
    load_classifier,
    open_photo,
    read_photo,
)

pytestmark = pytest.mark.usefixtures("one_thread", "end_of_a_hang")
THREE = ["gradcam_cam_1.jpg", "gb_1.jpg", "gradcam_cam_gb_1.jpg"]
DEMO = ["gradcam_cam_dog.jpg", "gb_dog.jpg", "gradcam_cam_gb_dog.jpg"]


def tally(result):
    """Return how many photos were done, skipped and failed, as the last line on stderr says."""
    counts = re.match(r"(\d+) done, (\d+) skipped, (\d+) failed", result.stderr.splitlines()[-1])
    return tuple(map(int, counts.groups()))


def images_in(lines):
    """Return the photos of which lines of stdout tell."""
    return [line.partition(": ")[0] for line in lines.splitlines()]


def pictures_in(folder):
    """Return the files in a folder, without unfinished ones."""
    return [name for name in files_in(folder) if ".part-" not in name]


def break_off(path):
    """Make a photo one that looks whole from its first bytes but cannot be decoded."""
    path.write_bytes(path.read_bytes()[:300])


def assert_same_outcome(folder, expected):
    """The same files and last records; a last bit may be a step of the colormap."""
    assert pictures_in(folder) == files_in(expected)
    for name in files_in(expected):
        assert np.abs(pixels(folder / name) - pixels(expected / name)).max() <= 14, name

    ours = last_records(folder)
    theirs = last_records(expected)
    assert set(ours) == set(theirs)
    for key, record in theirs.items():
        assert ours[key].get("error") == record.get("error")
        if "error" not in record:
            assert ours[key]["prediction"] == pytest.approx(record["prediction"], abs=1e-3)
            assert ours[key]["classes"][0]["files"] == record["classes"][0]["files"]


@pytest.fixture
def album(tmp_path):
    """A folder of six photos in two folders of equal names."""
    names = ["a.jpg", "b.jpg", "x/1.jpg", "x/2.png", "y/x/1.jpg", "y/狗 3.jpg"]
    for seed, name in enumerate(names):
        paint(tmp_path / "album" / name, seed)
    return tmp_path / "album"


# The demo


def test_the_demo_prints_two_lines(program, tmp_path):
    ckpt = "tests/data/dogs_mobilenet_v2.pth"
    process = program("--ckpt", ckpt, "pics/dog.jpg", "--output", tmp_path)
    assert process.returncode == 0, process.stderr
    paths = ", ".join(str(tmp_path / name) for name in DEMO)
    assert process.stdout == f"{os.path.join('pics', 'dog.jpg')}: Siberian husky 0.487 -> {paths}\n"
    assert files_in(tmp_path) == sorted(DEMO)

    assert process.stderr.count("\n") == 1
    for words in ("mobilenet_v2", "19 classes", "features", "short side 233, centre 225 x 225"):
        assert words in process.stderr
    assert "ImageNet mean and std" in process.stderr
    assert "cpu (no CUDA" in process.stderr


def test_the_pictures_of_the_demo_show_the_dog(program, tmp_path):
    assert program("--ckpt", CKPT, DOG, "--output", tmp_path).returncode == 0
    cam, guided, product = (pixels(tmp_path / name) for name in DEMO)
    height, width, _ = cam.shape
    # The network sees the central 225/233 of the photo's short side, in pics/dog.jpg, 768 x 576.
    seen = 576 * 225 / 233
    left = (768 - seen) / 2
    top = (576 - seen) / 2
    assert abs(height - seen) <= 2
    assert guided.shape == cam.shape
    assert product.shape == cam.shape

    def mask(*box):
        x0, x1 = [max(0, round((x - left) * width / seen)) for x in box[::2]]
        y0, y1 = [max(0, round((y - top) * height / seen)) for y in box[1::2]]
        inside = np.zeros((height, width), bool)
        inside[y0:y1, x0:x1] = True
        return inside

    with Image.open(DOG) as image:
        part = image.resize((width, height), box=(left, top, left + seen, top + seen))
    heat = 2 * cam - np.asarray(part, int)
    warmth = heat[:, :, 0] - heat[:, :, 2]  # red is hot, blue is cold
    assert warmth[mask(210, 220, 305, 310)].mean() > 80  # the head
    assert warmth[mask(450, 0, 768, 576)].mean() < -80  # the street

    dog = mask(130, 220, 310, 540)  # 19 % of the picture
    for picture, share in ((guided, 0.6), (product, 0.8)):
        energy = ((picture - 127.5) ** 2).sum(2)
        assert energy.mean() > 20
        assert energy[dog].sum() / energy.sum() > share


@pytest.mark.slow
def test_all_methods_classes_and_files_at_once(program, tmp_path):
    options = ["--method", "all", "--top-k", "2", "--sheet", "--metrics", "--save-arrays"]
    process = program("--ckpt", CKPT, *options, "--output", tmp_path, DOG)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\n") == 1
    assert process.stderr.count("\n") == 1

    (record,) = records(tmp_path)
    assert len(files_in(tmp_path)) == 2 * (7 * 2 + 1) + 2
    assert len(paths_of(record, tmp_path)) == 2 * (7 * 2 + 1) + 2
    husky = [entry for entry in record["metrics"] if entry["class"] == "Siberian husky"]
    assert [entry["method"] for entry in husky] == list(program_file.METHODS)
    for entry in husky:
        assert entry["insertion"] > entry["deletion"] + 0.1
        assert entry["road"] > 0.05


# Lines and records


@pytest.mark.parametrize(("asked", "explained"), [("", []), ("owl", [3]), ("2,fox", [2, 4])])
def test_line_and_record_say_what_the_plain_network_says(explain, tiny, tmp_path, asked, explained):
    path = paint(tmp_path / "狗" / "é 2.png", 3, (300, 260))
    options = ["--mean", "0.4,0.5,0.6", "--std", "0.3", "--input-size", "80", "--outputs", "cam"]
    for name in filter(None, asked.split(",")):
        options += ["--target-class", name]
    result = explain(*options, path)
    assert result.status == 0
    (record,) = records(tmp_path / "out")

    resize_size = load_classifier(ckpt=tiny[0], input_size=80).preset.resize_size[0]
    preset = ImageClassification(
        crop_size=80, resize_size=resize_size, mean=(0.4, 0.5, 0.6), std=(0.3, 0.3, 0.3)
    )
    with torch.no_grad(), Image.open(path) as image:
        p = tiny[1](preset(image.convert("RGB"))[None]).softmax(1)[0]
    order = p.argsort(descending=True).tolist()
    classes = explained or order[:1]

    for entries, indices in (
        ([record["prediction"]], order[:1]),
        (record["top5"], order[:5]),
        (record["classes"], classes),
    ):
        assert [entry["index"] for entry in entries] == indices
        assert [entry["name"] for entry in entries] == [CLASSES[index] for index in indices]
        chances = [entry["probability"] for entry in entries]
        assert chances == pytest.approx(p[indices].tolist(), abs=1e-4)

    words = [f"{CLASSES[index]} {p[index]:.3f}" for index in (order[0], *classes)]
    told = f"{words[0]} (truth: 狗)"  # the name of its folder
    if explained:
        told += f"; explained: {', '.join(words[1:])}"
    paths = ", ".join(map(str, paths_of(record, tmp_path / "out")))
    assert result.stdout == f"{path}: {told} -> {paths}\n"


def test_the_record_says_how_the_photo_was_read(explain, tmp_path):
    path = paint(tmp_path / "狗" / "1.png", 3, (300, 260))
    options = ["--mean", "0.4,0.5,0.6", "--std", "0.3", "--input-size", "80", "--outputs", "cam"]
    explain(*options, path)
    (record,) = records(tmp_path / "out")
    expected = {
        "image": str(path),
        "width": 300,
        "height": 260,
        "method": "gradcam",
        "target_layer": "features",
        "input_size": [80, 80],
        "resize": "crop",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.3, 0.3, 0.3],
        "truth": {"index": 2, "name": "狗"},
        "right": False,
    }
    for key, value in expected.items():
        assert record[key] == value
    assert "狗" in (tmp_path / "out" / LOG_NAME).read_text(encoding="utf-8")


def test_the_record_has_the_heat_of_each_map(explain, photo, tmp_path):
    options = ["--method", "gradcam,gradcamelementwise", "--outputs", "cam", "--save-arrays"]
    explain(*options, "--target-class", "cat", "--target-class", "owl", photo)
    (record,) = records(tmp_path / "out")
    with np.load(tmp_path / "out" / "1.npz") as arrays:
        cams = arrays["cams"]
    for method, maps in zip(("gradcam", "gradcamelementwise"), cams, strict=True):
        means = maps.reshape(2, 8, 8, 8, 8).mean((2, 4)).reshape(2, 64)
        assert np.abs(100 * means - record["heat"][method]).max() <= 1


def test_the_name_of_a_class_that_ends_in_a_number_is_set_off_from_its_probability(
    explain, photo, tmp_path
):
    names = "class 0,class 1,class 2,class 3,class 4,class 5,v2.x"
    options = ["--class-names", names, "--outputs", "cam", "--top-k", "7"]
    result = explain(*options, photo)
    assert re.search(r": class \d: 0\.\d{3}; explained: class", result.stdout)
    assert re.search(r", v2\.x 0\.\d{3}( ->|,)", result.stdout)


def test_of_many_empty_maps_ten_are_named_and_the_number_of_all_is_told(explain, tmp_path):
    photos = [paint(tmp_path / f"{seed}.png", seed) for seed in range(12)]
    options = ["--target-class", "cat", "--method", "gradcamelementwise", "--outputs", "cam"]
    for count, last in ((10, False), (12, True)):
        result = explain(*options, *photos[:count])
        assert result.stderr.count("map for cat is all zeros") == 10
        assert ("warning: 12 maps in all are all zeros\n" in result.stderr) == last


# Labels and differences


def test_all_labels_of_half_and_more_are_explained(explain, tiny, tmp_path):
    photos = [paint(tmp_path / CLASSES[0] / f"{seed}.png", seed) for seed in range(3)]
    options = ["--multi-label", "--metrics", "--save-arrays", "--outputs", "cam,gb"]
    result = explain(*options, photos[0].parent)
    assert result.status == 0
    assert "7 labels (0 cat, " in result.stderr
    assert "accuracy" not in result.stderr

    classifier = load_classifier(ckpt=tiny[0], device="cpu")
    counts = set()
    for record, path in zip(records(tmp_path / "out"), photos, strict=True):
        inputs = classifier.preprocess(read_photo(path))[None]
        with torch.no_grad():
            p = classifier.model(inputs).sigmoid()[0]
        order = p.argsort(descending=True).tolist()
        expected = [index for index in order if p[index] >= 0.5]
        counts.add(len(expected))

        assert record["multi_label"] is True
        assert "truth" not in record
        assert "right" not in record
        assert [entry["index"] for entry in record["classes"]] == expected
        for entry in (record["prediction"], *record["classes"], *record["top5"]):
            assert entry["probability"] == pytest.approx(p[entry["index"]].item(), abs=1e-4)
        best = CLASSES[order[0]]
        assert f"{path}: {best} {p[order[0]]:.3f}; explained: {best} " in result.stdout
        assert record["classes"][0]["files"]["gb"] == f"gb_{path.stem}_{best}.jpg"

        explainer = Explainer(classifier.model, multi_label=True)
        with np.load(tmp_path / "out" / f"{path.stem}.npz") as arrays:
            measured = faithfulness(explainer, inputs, arrays["cams"][0, 0], order[0])
        row = record["metrics"][0]
        assert {name: row[name] for name in METRICS} == pytest.approx(measured, abs=2e-3)


def test_labels_below_half_leave_the_likeliest_one():
    logits = torch.tensor([[-2.0, -1, -3], [1, -1, 2], [0, -1, -2]])
    labels = program_file.likely_labels(logits)
    assert labels.tolist() == [[1, 1], [2, 0], [0, 0]]


@pytest.mark.parametrize("option", [("--only-wrong",), ("--target-class", "truth")])
def test_labels_have_no_true_class(explain, photo, option):
    result = explain("--multi-label", *option, photo)
    assert result.status == 2
    assert "a photo with labels has no single true class" in result.stderr


@pytest.mark.parametrize("multi_label", [(), ("--multi-label",)])
def test_the_difference_of_two_classes_is_explained(explain, tiny, photo, tmp_path, multi_label):
    methods = ["gradcam", "layercam", "scorecam", "ablationcam"]
    options = ["--method", ",".join(methods), "--save-arrays", "--sheet", *multi_label]
    asked = ["--target-class", "owl-fox", "--target-class", "owl"]
    result = explain(*options, *asked, photo)
    assert result.status == 0
    assert re.search(r"; explained: owl minus fox, owl \d\.\d{3} -> ", result.stdout)

    (record,) = records(tmp_path / "out")
    difference, owl = record["classes"]
    assert difference["name"] == "owl"
    assert difference["minus"] == {"index": 4, "name": "fox"}
    assert difference["files"]["gb"] == "gb_1_owl-minus-fox.jpg"
    assert owl["files"]["gb"] == "gb_1_owl.jpg"
    assert "minus" not in owl
    page = program_file.page_entry(record)
    assert [entry["name"] for entry in page.item["classes"]] == ["owl minus fox", "owl"]

    classifier = load_classifier(ckpt=tiny[0], device="cpu")
    inputs = classifier.preprocess(read_photo(photo))[None]
    expected = Explainer(classifier.model, methods)(inputs, [[3, 3]], minus=[[4, 3]])
    with np.load(tmp_path / "out" / "1.npz") as arrays:
        assert arrays["minus"].tolist() == [4, 3]
        np.testing.assert_allclose(arrays["guided"], expected.guided[0], rtol=0, atol=1e-5)
        for method, cams in zip(methods, arrays["cams"], strict=True):
            np.testing.assert_allclose(cams, expected.cams[method][0], rtol=0, atol=1e-4)


def test_an_empty_map_of_a_difference_is_told_with_both_names(explain, photo):
    options = ["--method", "gradcam", "--outputs", "cam", "--target-class", "dog-fox"]
    told = "the gradcam map for dog minus fox is all zeros"
    assert told in explain(*options, photo).stderr


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("cat-dog", (0, 1)),
        ("DOG-2", (1, 2)),
        ("cat-black-dog", (3, 3)),  # a class that is called so wins
        ("cat-black-dog-cat", (3, 0)),
        ("cat-cat-black-dog", (0, 3)),
        ("truth", (TRUTH, TRUTH)),
    ],
)
def test_a_hyphen_between_two_classes_asks_for_their_difference(wanted, expected):
    assert find_difference(wanted, ["cat", "dog", "owl", "cat-black-dog"]) == expected


@pytest.mark.parametrize("wanted", ["cat-wolf", "cat-cat", "-cat", "cat-", "1--2"])
def test_what_is_no_difference_is_no_class(wanted):
    with pytest.raises(CallError, match="no class"):
        find_difference(wanted, ["cat", "dog", "owl"])


# True classes, the gallery and the list of layers


@pytest.fixture
def sorted_photos(tiny, tmp_path):
    """Photos in folders with names of classes: one predicted right, one wrong, and a stranger."""
    paths = [paint(tmp_path / "unknown" / f"{seed}.png", seed) for seed in range(3)]
    classifier = load_classifier(ckpt=tiny[0], device="cpu")
    inputs = classifier.preprocess(read_photo(paths[0]))[None]
    with torch.no_grad():
        predicted = classifier.model(inputs).argmax(1).item()

    right = tmp_path / CLASSES[predicted].upper() / "0.png"
    wrong = tmp_path / CLASSES[0] / "1.png"  # this class is never predicted
    for path, place in ((paths[0], right), (paths[1], wrong)):
        place.parent.mkdir()
        path.rename(place)
    return right, wrong, paths[2]


def test_the_folder_tells_the_true_class_and_the_closing_line_the_accuracy(
    explain, sorted_photos, tmp_path
):
    right, wrong, stranger = sorted_photos
    result = explain("--outputs", "cam", *sorted_photos)
    page = tmp_path / "out" / "index.html"
    told = f"; accuracy 50.0 % (1 of 2); the 1 wrong ones first in {page}"
    assert result.stderr.splitlines()[-1].endswith(told)
    for line in result.stdout.splitlines():
        assert ("(truth: cat)" in line) == line.startswith(str(wrong))

    by_image = {record["image"]: record for record in records(tmp_path / "out")}
    assert by_image[str(right)]["right"] is True
    assert by_image[str(wrong)]["right"] is False
    assert by_image[str(wrong)]["truth"] == {"index": 0, "name": "cat"}
    assert "right" not in by_image[str(stranger)]
    assert "truth" not in by_image[str(stranger)]

    again = explain("--outputs", "cam", "--skip-existing", "--no-gallery", *sorted_photos)
    assert re.search(r"0 done, 3 skipped.*; accuracy 50.0 % \(1 of 2\)$", again.stderr)
    assert "accuracy" not in explain("--outputs", "cam", stranger, stranger.parent).stderr


def test_photos_in_folders_that_are_no_class_are_counted_in_the_closing_line(
    explain, sorted_photos, tmp_path
):
    folder = tmp_path / "photos"
    for path in sorted_photos:
        inner = folder / path.parent.name / "2024"  # the nearest folder that is a class counts
        inner.mkdir(parents=True)
        path.rename(inner / path.name)
    told = "; accuracy 50.0 % (1 of 2; 1 photos in folders that are no class); "
    assert told in explain("--outputs", "cam", folder).stderr
    assert told in explain("--outputs", "cam", "--skip-existing", folder).stderr


def test_without_true_classes_the_closing_line_says_why(explain, album):
    told = "; no accuracy: 2 folders, 7 classes; pass --class-names cat,dog in training order; see"
    assert told in explain("--outputs", "cam", album).stderr
    assert "no accuracy" not in explain("--outputs", "cam", album / "y").stderr
    assert "no accuracy" not in explain("--outputs", "cam", album / "a.jpg", album / "b.jpg").stderr


def test_as_many_folders_as_classes_name_them_where_nothing_else_does(explain, tiny, tmp_path):
    ckpt = tmp_path / "unnamed.pth"
    checkpoint = torch.load(tiny[0])
    del checkpoint["classes"]
    torch.save(checkpoint, ckpt)
    for seed in range(7):
        paint(tmp_path / "photos" / "bcdefga"[seed] / f"{seed}.png", seed)
    result = explain("--outputs", "cam", tmp_path / "photos", ckpt=ckpt)
    assert "7 classes (0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g; the photos' folders" in result.stderr
    assert re.search(r"; accuracy \d+\.\d % \(\d of 7\);", result.stderr)


def test_the_true_class_is_explained_and_where_it_is_predicted_only_once(
    explain, sorted_photos, tmp_path
):
    options = ["--outputs", "cam,gb", "--save-arrays"]
    truth_and_prediction = ["--target-class", "truth", "--target-class", "predicted"]
    result = explain(*truth_and_prediction, *options, *sorted_photos)
    assert "warning: where the folder is not named after a class" in result.stderr

    for record, path in zip(records(tmp_path / "out"), sorted_photos, strict=True):
        expected = []
        if "truth" in record:
            expected.append(record["truth"]["index"])
        if record.get("right") is not True:
            expected.append(record["prediction"]["index"])
        assert [entry["index"] for entry in record["classes"]] == expected

        words = []
        for index in expected:
            words += ["--target-class", index]
        explain(*words, *options, path, output=tmp_path / "by index")
        ours = np.load(tmp_path / "out" / f"{path.stem}.npz")
        theirs = np.load(tmp_path / "by index" / f"{path.stem}.npz")
        for name in ("classes", "cams", "guided"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_only_wrong_ones_get_pictures_and_all_a_record(explain, sorted_photos, tmp_path):
    options = ["--target-class", "truth", "--outputs", "cam", *sorted_photos]
    result = explain("--only-wrong", *options)
    assert files_in(tmp_path / "out") == ["gradcam_cam_1_cat.jpg"]
    counts = [len(paths_of(record, tmp_path / "out")) for record in records(tmp_path / "out")]
    assert counts == [0, 1, 0]
    assert result.stdout.count("-> no files") == 2
    assert tally(result) == (3, 0, 0)

    assert tally(explain("--only-wrong", "--skip-existing", *options)) == (0, 3, 0)
    assert tally(explain("--skip-existing", *options)) == (2, 1, 0)


@pytest.mark.parametrize("skip", [[], ["--skip-existing"]])
def test_only_wrong_keeps_the_pictures_of_the_right_ones_that_are_there(
    explain, sorted_photos, tmp_path, skip
):
    options = ["--outputs", "cam", *sorted_photos]
    explain(*options)
    before = files_in(tmp_path / "out")
    explain("--only-wrong", *skip, *options)
    assert files_in(tmp_path / "out") == before
    for record in last_records(tmp_path / "out").values():
        assert len(paths_of(record, tmp_path / "out")) == 1
    assert tally(explain("--skip-existing", *options)) == (0, 3, 0)


@pytest.mark.parametrize("option", [("--only-wrong",), ("--target-class", "truth")])
def test_without_any_true_class_what_needs_one_is_refused(explain, photo, option):
    result = explain(*option, photo)
    assert result.status == 2
    assert result.stdout == ""
    expected = r"error: no photo's folder is named after a class \(cat, dog, .*\n"
    assert re.fullmatch(expected, result.stderr)


def test_a_class_that_is_really_called_truth_wins():
    assert find_class("Truth", ["predicted", "truth"]) == 1
    assert find_class("predicted", ["predicted", "truth"]) == 0
    assert find_class("truth", ["cat"]) == TRUTH
    assert find_class("predicted", ["cat"]) == PREDICTED


def test_a_page_is_made_for_more_than_one_photo_and_never_over_anothers(
    explain, album, photo, tmp_path
):
    page = tmp_path / "out" / "index.html"
    explain("--outputs", "cam", photo)
    explain("--outputs", "cam", "--no-gallery", album)
    assert not page.exists()
    assert f"; see {page}" in explain("--outputs", "cam", "--skip-existing", album).stderr
    # the single photo of the first run as well
    assert page.read_text(encoding="utf-8").count('"source":"') == 7

    page.write_text("my own page")
    result = explain("--outputs", "cam", album)
    assert result.status == 0
    assert page.read_text() == "my own page"
    assert f"warning: no page of the results: {page} is in the way" in result.stderr


def test_layers_are_listed_with_the_size_of_their_maps(explain, tiny, tmp_path):
    result = explain("--list-layers")
    assert result.status == 0
    assert not (tmp_path / "out").exists()

    expected = []

    def record(name, module, args, output):
        if output.ndim == 4 and output[0, 0].numel() > 1 and name:
            size = " x ".join(map(str, output.shape[1:]))
            default = "   (default)" if name == "features" else ""
            expected.append([name, type(module).__name__, size + default])

    model = copy.deepcopy(tiny[1])
    for name, module in model.named_modules():
        module.register_forward_hook(partial(record, name))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert [line.split(maxsplit=2) for line in result.stdout.splitlines()] == expected
    assert "--list-layers" in explain("--target-layer", "nope", DOG).stderr


def test_from_python_an_output_is_drawn_as_the_program_draws_it(explain, tiny, photo, tmp_path):
    explain("--format", "png", "--output-size", "70", photo)
    classifier = load_classifier(ckpt=tiny[0], device="cpu")
    seen = classifier.seen(read_photo(photo))
    explanation = Explainer(classifier.model)(classifier.preprocess(read_photo(photo))[None])

    for output, name in zip(OUTPUTS, THREE, strict=True):
        drawn = draw(output, explanation, seen)
        assert drawn.shape == seen.shape
        written = pixels(tmp_path / "out" / name.replace("jpg", "png"))
        enlarged = cv2.resize(drawn, written.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        assert np.abs(enlarged - written).mean() < 8
        from_pil = draw(output, explanation, Image.fromarray(seen))
        np.testing.assert_array_equal(from_pil, drawn)


METRIC_OPTIONS = ["--metrics", "--save-arrays", "--outputs", "cam", "--method", "gradcam,layercam"]


def test_metrics_are_those_of_each_map(explain, tiny, photo, tmp_path):
    result = explain("--input-size", "32", "--top-k", "2", *METRIC_OPTIONS, photo)
    (record,) = records(tmp_path / "out")
    classifier = load_classifier(ckpt=tiny[0], device="cpu", input_size=32)
    explainer = Explainer(classifier.model)
    inputs = classifier.preprocess(read_photo(photo))[None]
    with np.load(tmp_path / "out" / "1.npz") as arrays:
        classes = arrays["classes"].tolist()
        cams = arrays["cams"]

    rows = iter(record["metrics"])
    for place, index in enumerate(classes):
        for number, method in enumerate(("gradcam", "layercam")):
            row = next(rows)
            assert row["class"] == CLASSES[index]
            assert row["method"] == method
            expected = faithfulness(explainer, inputs, cams[number, place], index)
            assert {name: row[name] for name in METRICS} == pytest.approx(expected, abs=2e-3)
            told = f"; {method} for {CLASSES[index]}: average_drop {row['average_drop']:.3f}, "
            assert told in result.stdout


def test_the_closing_line_tells_the_mean_metrics_of_all_photos(explain, tmp_path):
    photos = [paint(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    explain("--input-size", "32", *METRIC_OPTIONS, photos[0])
    options = ["--input-size", "32", "--skip-existing", *METRIC_OPTIONS]
    result = explain(*options, *photos)
    assert tally(result) == (2, 1, 0)

    for method in ("gradcam", "layercam"):
        rows = []
        for record in records(tmp_path / "out"):
            rows += [row for row in record["metrics"] if row["method"] == method]
        drop = np.mean([row["average_drop"] for row in rows])
        road = np.mean([row["road"] for row in rows])
        told = rf"; mean of {method}: average_drop {drop:.3f}, .*, road {road:.3f};"
        assert re.search(told, result.stderr.splitlines()[-1])


@pytest.mark.parametrize("size", [1, 8])
def test_broken_photos_are_one_line_each_and_the_others_are_done(explain, tmp_path, size):
    """Also where a library prints complaints of its own, as of 86 samples a pixel in a TIFF."""
    folder = tmp_path / "相册 2.0"
    photos = [paint(folder / f"{n}.jpg", n, (400, 300)) for n in range(4)]
    photos.append(paint(folder / "4.tif", 4))
    photos.append(folder / "5 missing.jpg")
    break_off(photos[1])
    photos[3].write_bytes(b"" if size == 1 else b"Dear diary\n")
    samples = b"\x15\x01\x03\0\x01\0\0\0"
    photos[4].write_bytes(photos[4].read_bytes().replace(samples + b"\x03", samples + b"\x56"))

    result = explain("--outputs", "cam", "--batch-size", size, *photos)
    assert result.status == 1
    assert tally(result) == (2, 0, 4)
    assert images_in(result.stdout) == [str(photos[0]), str(photos[2])]
    assert files_in(tmp_path / "out") == ["gradcam_cam_0.jpg", "gradcam_cam_2.jpg"]

    errors = []
    for record in records(tmp_path / "out"):
        if "error" in record:
            assert record["error"].startswith(f"{record['image']}: ")
            errors.append(f"error: {record['error']}")
    assert result.stderr.splitlines()[1:-1] == errors
    broken = [photos[number] for number in (1, 3, 4, 5)]
    for line, path in zip(errors, broken, strict=True):
        assert line.startswith(f"error: {path}: ")


@pytest.mark.parametrize("name", ["resized", "draw_cam"])
@pytest.mark.parametrize("error", [cv2.error("Insufficient memory"), MemoryError()], ids=repr)
def test_a_photo_that_cannot_be_resized_or_drawn_is_one_line(
    explain, album, monkeypatch, name, error
):
    function = getattr(program_file, name)
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(program_file, name, failing)
    result = explain("--outputs", "cam", album)
    assert result.status == 1
    assert tally(result) == (5, 0, 1)
    assert result.stderr.count("\nerror: ") == 1


WRONG = [
    ("--target-class wolf", "'wolf'"),
    ("--target-class 7", "classes 0 to 6"),
    ("--num-classes 5", "7 classes"),
    ("--target-layer classifier.9", "'classifier.9'"),
    ("--class-names a,b", "7 classes"),
    ("--colormap yet", "jet"),
    ("--input-size 8", "8 x 8"),
    ("--device xpu:7", "xpu:7"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_a_wrong_call_is_one_line_and_leaves_nothing_behind(
    explain, photo, tmp_path, options, said
):
    result = explain(*options.split(), photo)
    assert result.status == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_fit_the_question_leaves_nothing_behind(explain, photo, tmp_path):
    result = explain("--method", "finercam", "--target-class", "cat-dog", photo)
    assert result.status == 2
    assert result.stdout == ""
    assert "error: finercam does not work on" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_photo_gets_alone_what_it_gets_in_a_batch(explain, album, tmp_path):
    explain("--batch-size", "4", album)
    explain("--batch-size", "1", album, output=tmp_path / "alone")
    assert_same_outcome(tmp_path / "out", tmp_path / "alone")


@pytest.mark.parametrize(("count", "folds"), [(1, False), (4, False), (6, True)])
def test_batch_norms_are_folded_where_more_than_a_few_photos_are_to_be_done(
    explain, album, monkeypatch, count, folds
):
    given = []
    make = Explainer.__init__

    def record(self, *args, **options):
        given.append(options)
        make(self, *args, **options)

    monkeypatch.setattr(Explainer, "__init__", record)
    photos = sorted(path for path in album.rglob("*.*") if path.is_file())
    explain("--outputs", "cam", *photos[:count])
    assert given[0]["fold"] is folds
    assert given[0]["copy"] is False


# --skip-existing


def times_in(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in (*files_in(folder), LOG_NAME)}


def test_a_second_run_does_nothing_and_does_not_even_load_the_network(
    explain, album, tmp_path, monkeypatch
):
    explain(album)
    before = times_in(tmp_path / "out")
    monkeypatch.setattr(program_file, "load_classifier", None)
    monkeypatch.chdir(tmp_path)
    for path in (album, "album"):
        result = explain("--skip-existing", "--batch-size", "3", path)
        assert result.status == 0
        assert result.stdout == ""
        assert tally(result) == (0, 6, 0)
    assert times_in(tmp_path / "out") == before


CHANGED = ["", "--target-class 4", "--alpha 0.3", "--fade", "--method eigencam,gradcam"]
CHANGED += ["--outputs cam,gb", "--sheet", "--save-arrays", "--mean 0", "--resize squash"]
CHANGED += ["--format png", "--input-size 80", "--eigen-smooth", "--quality 50"]
CHANGED += ["--class-names a,b,c,d,e,f,g"]


def test_what_was_done_with_other_options_is_not_taken_for_done(explain, album, tmp_path):
    photos = [album / "a.jpg", album / "b.jpg"]
    for changed in CHANGED:
        options = ["--outputs", "cam", "--skip-existing", *changed.split(), *photos]
        assert tally(explain(*options)) == (2, 0, 0), changed
        assert tally(explain(*options)) == (0, 2, 0), changed
    assert len(records(tmp_path / "out")) == 2 * len(CHANGED)


def test_a_changed_checkpoint_or_photo_and_a_removed_file_are_done_again(
    explain, tiny, album, tmp_path
):
    ckpt = shutil.copy(tiny[0], tmp_path / "net.pth")
    options = ["--outputs", "cam,gb", "--skip-existing", album]
    assert tally(explain(*options, ckpt=ckpt)) == (6, 0, 0)

    paint(album / "b.jpg", 30)
    (tmp_path / "out" / "x" / "gb_2.jpg").unlink()
    result = explain(*options, ckpt=ckpt)
    assert tally(result) == (2, 4, 0)
    assert images_in(result.stdout) == [str(album / "b.jpg"), str(album / "x" / "2.png")]

    os.utime(ckpt, (1, 1))
    assert tally(explain(*options, ckpt=ckpt)) == (6, 0, 0)
    assert tally(explain(*options, ckpt=ckpt)) == (0, 6, 0)


@pytest.mark.parametrize("size", [0, 500])
def test_an_empty_or_cut_picture_is_done_again(explain, album, tmp_path, size):
    options = ["--outputs", "cam,gb", "--skip-existing", album]
    explain(*options)
    picture = tmp_path / "out" / "x" / "gb_2.jpg"
    whole = picture.read_bytes()
    os.truncate(picture, size)
    assert tally(explain(*options)) == (1, 5, 0)
    assert picture.read_bytes() == whole


def test_pictures_that_a_run_with_other_options_has_written_over_are_done_again(
    explain, album, tmp_path
):
    gb = tmp_path / "out" / "gb_a.jpg"
    again = ["--skip-existing", album / "a.jpg"]
    explain(*again)
    first = gb.read_bytes()
    # another method with the same options draws the same gb
    explain("--method", "eigencam", *again)
    assert tally(explain(*again)) == (0, 1, 0)

    explain("--method", "eigencam", "--resize", "squash", *again)
    assert gb.read_bytes() != first
    assert explain(*again).stdout.count("\n") == 1
    assert gb.read_bytes() == first
    assert tally(explain(*again)) == (0, 1, 0)


def test_a_mended_photo_and_new_ones_are_done_and_a_broken_one_is_tried_again(
    explain, album, tmp_path
):
    whole = (album / "b.jpg").read_bytes()
    break_off(album / "b.jpg")
    break_off(album / "x" / "1.jpg")
    assert tally(explain("--outputs", "cam", album)) == (4, 0, 2)

    (album / "b.jpg").write_bytes(whole)
    (album / "a.jpg").unlink()
    paint(album / "0 first.jpg", 20)
    result = explain("--outputs", "cam", "--skip-existing", album)
    assert result.status == 1
    assert tally(result) == (2, 3, 1)
    for (image, _), record in last_records(tmp_path / "out").items():
        assert ("error" in record) == (image == str(album / "x" / "1.jpg"))


# Processes that end early


def start(tiny, *words, stdout=subprocess.PIPE, **environment):
    """Start the program as a process on the small network."""
    command = [sys.executable, PROGRAM, "--ckpt", tiny[0], "--device", "cpu", "--batch-size", "1"]
    command += words
    environment = {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        list(map(str, command)),
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_lines(process, log, count):
    """Return as soon as the log has so many lines, or the process has ended."""
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


def crowd(folder, count):
    """Paint photos of the same names in three folders, three of them broken. Return the folder."""
    for seed in range(count):
        paint(folder / "abc"[seed % 3] / f"{seed // 3:02}.jpg", seed, (200, 150))
    for name in ("a/03.jpg", "b/07.jpg", "c/12.jpg"):
        break_off(folder / name)
    return folder


@posix
@pytest.mark.parametrize(
    ("count", "kills"), [(40, 2), pytest.param(2000, 3, marks=pytest.mark.slow)]
)
def test_a_killed_run_is_gone_on_with_and_ends_like_one_that_was_not_killed(
    explain, tiny, tmp_path, count, kills
):
    folder = crowd(tmp_path / "album", count)
    out = tmp_path / "out"
    words = ["--skip-existing", "--output", out, folder]
    hits = 0
    for number in range(kills):
        process = start(tiny, *words, stdout=subprocess.DEVNULL)
        share = (number + random.random()) / (kills + 1)
        wait_for_lines(process, out / LOG_NAME, count * share + 1)
        process.kill()
        process.communicate()

        names = pictures_in(out)
        for name in names:  # each can be decoded
            assert pixels(out / name).shape[2] == 3
        if process.returncode == -signal.SIGKILL and 0 < len(names) < (count - 3) * 3:
            hits += 1
    assert hits > 0

    done, skipped, failed = tally(explain("--skip-existing", "--batch-size", "1", folder))
    assert done + skipped == count - 3
    assert skipped > 0
    assert failed == 3
    assert not list(out.glob(".part-*"))

    explain("--batch-size", "1", folder, output=tmp_path / "undisturbed")
    assert_same_outcome(out, tmp_path / "undisturbed")
    assert tally(explain("--skip-existing", folder)) == (0, count - 3, 3)


@posix
@pytest.mark.parametrize("presses", [1, 5])
def test_control_c_ends_with_130_and_what_was_printed_is_whole(explain, tiny, tmp_path, presses):
    folder = crowd(tmp_path / "album", 60)
    out = tmp_path / "out"
    process = start(tiny, "--output", out, folder)
    wait_for_lines(process, out / LOG_NAME, 5)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    told = r"(\d+) done, 0 skipped, \d failed in .*; stopped, .* --skip-existing goes on"
    done = int(re.fullmatch(told, last).group(1))

    printed = images_in(stdout)
    assert 0 < len(printed) < 57
    assert len(printed) == done
    logged = last_records(out)
    for image in printed:
        for path in paths_of(logged[image, "gradcam"], out):
            assert pixels(path).std() > 0
    assert pictures_in(out) == files_in(out)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count('"state":"') >= len(printed)

    done, skipped, failed = tally(explain("--skip-existing", "--batch-size", "1", folder))
    assert done + skipped == 57
    assert skipped >= len(printed)
    assert failed == 3


def test_control_c_while_the_network_is_loaded_prints_the_counts_too(
    explain, album, monkeypatch, tmp_path
):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(program_file, "load_classifier", pressed)
    result = explain(album)
    assert result.status == 130
    assert result.stdout == ""
    assert tally(result) == (0, 0, 0)
    assert not (tmp_path / "out").exists()


@posix
def test_a_reader_that_has_read_enough_does_not_end_the_run(tiny, tmp_path):
    """As `| head -1` does, on a terminal that does not know the characters of a name."""
    out = tmp_path / "out"
    for seed in range(30):
        paint(tmp_path / "album" / f"狗 {seed:02}.jpg", seed)
    environment = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    process = start(tiny, "--output", out, tmp_path / "album", **environment)
    assert process.stdout.readline().startswith(f"{tmp_path}/album/\\u72d7 00.jpg: ")
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait() == 0, stderr
    assert stderr.count("\n") == 2
    assert "30 done, 0 skipped, 0 failed" in stderr
    assert (out / "index.html").exists()


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a device that is always full"
)
def test_an_output_that_is_full_ends_the_run_without_a_traceback(explain, album, monkeypatch):
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115  (closing it fails)
    monkeypatch.setattr(sys, "stdout", full)
    result = explain("--outputs", "cam", album)
    with pytest.raises(OSError, match="No space left"):
        full.close()
    assert result.status == 1
    assert "Traceback" not in result.stderr
    assert "No space left on device" in result.stderr.splitlines()[-1]


def once(number, function, action):
    """Return the function; before its call of that number, the action is done."""
    calls = iter(range(10**6))

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            action()
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("by_a_file", [False, True])
def test_an_output_folder_that_vanishes_costs_no_photo_that_can_be_written(
    explain, album, tmp_path, monkeypatch, by_a_file
):
    out = tmp_path / "out"

    def vanish():
        shutil.rmtree(out)
        if by_a_file:
            out.write_text("mine", encoding="utf-8")

    monkeypatch.setattr(program_file, "open_photo", once(1, open_photo, vanish))
    result = explain("--batch-size", "1", "--outputs", "cam", album)
    done, _, failed = tally(result)
    assert done + failed == 6
    assert (failed > 0) == by_a_file
    assert result.status == int(by_a_file)
    assert result.stderr.count("error: ") == failed
    if not by_a_file:
        assert len(files_in(out)) >= 4
        assert len(records(out)) == len(files_in(out))


def test_a_photo_that_vanishes_on_the_way_is_one_line(explain, album, monkeypatch):
    photo = album / "b.jpg"
    monkeypatch.setattr(program_file, "open_photo", once(1, open_photo, photo.unlink))
    options = ["--outputs", "cam", "--batch-size", "1"]
    result = explain(*options, album / "a.jpg", photo, album / "x")
    assert result.status == 1
    assert result.stdout.count("\n") == 3
    assert tally(result) == (3, 0, 1)
    assert result.stderr.splitlines()[1] == f"error: {photo}: no such file"


# Errors of the network


@pytest.fixture
def failing(monkeypatch):
    """Let explainers raise the error that a function of inputs and number returns.

    Returns the sizes of batches.
    """
    sizes = []
    call = Explainer.__call__

    def install(function):
        def wrapped(self, inputs, *args, **kwargs):
            error = function(inputs, len(sizes))
            if error:
                raise error
            sizes.append(len(inputs))
            return call(self, inputs, *args, **kwargs)

        monkeypatch.setattr(Explainer, "__call__", wrapped)
        return sizes

    return install


@pytest.mark.parametrize(("options", "expected"), [([], [1, 2, 2]), (["--batch-size", 4], [3, 2])])
def test_photos_are_explained_in_batches(explain, album, failing, options, expected):
    sizes = failing(lambda inputs, number: None)
    break_off(album / "b.jpg")
    assert tally(explain("--outputs", "cam", *options, album)) == (5, 0, 1)
    assert sizes == expected


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_too_little_memory_halves_the_batch_and_says_so_once(explain, tmp_path, failing, error):
    def fails_above_three(inputs, number):
        if len(inputs) > 3:
            return error

    for seed in range(11):
        paint(tmp_path / "album" / f"{seed:02}.jpg", seed)
    sizes = failing(fails_above_three)
    result = explain("--outputs", "cam", "--batch-size", "8", tmp_path / "album")
    assert result.status == 0
    assert tally(result) == (11, 0, 0)
    assert result.stderr.count("warning: memory") == 1
    assert sizes == [2] * 5 + [1]


PHOTO_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    ValueError("the logits are NaN"),
    IndexError("list index out of range"),
    TypeError("forward() ..."),
    AssertionError("odd"),
]


@pytest.mark.parametrize("error", PHOTO_ERRORS, ids=repr)
def test_a_photo_on_which_the_network_fails_takes_no_other_with_it(
    explain, album, tmp_path, failing, error
):
    def fails_for_white(inputs, number):
        if inputs.flatten(1).std(1).min() < 0.5:
            return error

    white = album / "x" / "2.png"
    Image.new("RGB", (90, 70), "white").save(white)
    failing(fails_for_white)
    result = explain("--outputs", "cam", "--batch-size", "4", album)
    assert result.status == 1
    assert tally(result) == (5, 0, 1)
    assert f"error: {white}: the network failed: {error}\n" in result.stderr
    assert "error" in last_records(tmp_path / "out")[str(white), "gradcam"]


GPU = RuntimeError("CUDA error: an illegal memory access\nmore")
GPU_LINE = "the GPU has failed: CUDA error: an illegal memory access; go on with --skip-existing"


@pytest.mark.parametrize(
    ("error", "line"), [(CallError("no such thing"), "no such thing"), (GPU, GPU_LINE)]
)
def test_an_error_in_the_middle_of_a_folder_leaves_no_photo_without_its_line(
    explain, album, tmp_path, failing, error, line
):
    failing(lambda inputs, number: error if number == 4 else None)
    result = explain("--outputs", "cam", "--batch-size", "1", album)
    assert result.status == 2
    assert result.stderr.splitlines()[-1] == f"error: {line}"
    assert result.stdout.count("\n") == 4
    assert len(records(tmp_path / "out")) == 4
    assert len(files_in(tmp_path / "out")) == 4

    failing(lambda inputs, number: None)
    assert tally(explain("--outputs", "cam", "--skip-existing", album)) == (2, 4, 0)


def test_a_network_that_does_not_fit_the_memory_is_one_line(explain, photo, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    result = explain(photo)
    assert result.status == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "more memory than there is" in result.stderr


# Several processes


@posix
def test_two_processes_over_one_folder_at_once_give_one_line_for_each_photo(
    explain, tiny, tmp_path
):
    folder = crowd(tmp_path / "album", 40)
    out = tmp_path / "out"
    printed = []
    for process in [start(tiny, "--output", out, folder) for _ in range(2)]:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 1, stderr
        printed += images_in(stdout)

    good = [record["image"] for record in records(out) if "error" not in record]
    assert len(good) == 37
    assert len(set(good)) == 37
    assert sorted(printed) == sorted(good)
    explain("--batch-size", "1", folder, output=tmp_path / "alone")
    assert_same_outcome(out, tmp_path / "alone")


@pytest.mark.parametrize(("first", "second"), [(3, 2), (1, 3)])
def test_the_processes_of_torchrun_share_a_folder_and_another_number_goes_on(
    explain, album, tmp_path, monkeypatch, first, second
):
    def share(world, *words):
        results = []
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            results.append(explain("--outputs", "cam", *words))
        return results

    explain("--outputs", "cam", album, output=tmp_path / "alone")
    whole = (album / "b.jpg").read_bytes()
    break_off(album / "b.jpg")
    for rank, result in enumerate(share(first, album)):
        assert result.status == int(first == 1)
        shared = first > 1
        assert (f" by process {rank} of {first} in " in result.stderr) == shared
        told = f", process 0 of {first}" in result.stderr.splitlines()[0]
        assert told == (shared and rank == 0)

    (album / "b.jpg").write_bytes(whole)
    (tmp_path / "out" / "y" / "gradcam_cam_狗 3.jpg").unlink()
    done = [tally(result)[0] for result in share(second, "--skip-existing", album)]
    assert sum(done) == 2
    assert_same_outcome(tmp_path / "out", tmp_path / "alone")
    assert len(records(tmp_path / "out")) == 6 + 2


# Memory and order


@pytest.mark.slow
def test_ten_thousand_paths_are_each_one_line(explain, photo, tmp_path, monkeypatch):
    lines = [f"{tmp_path}/{number // 100}/{number}.jpg\n" for number in range(10_000)]
    monkeypatch.setattr(sys, "stdin", lines)
    result = explain("--outputs", "cam", photo, "-")
    assert result.status == 1
    assert tally(result) == (1, 0, 10_000)
    assert result.stdout.count("\n") == 1
    assert len(last_records(tmp_path / "out")) == 10_001


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in kilobytes there")
def test_three_hundred_photos_take_the_memory_of_sixty(tiny, tmp_path):
    content = paint(tmp_path / "0.jpg", 5, (640, 480)).read_bytes()  # 0.9 MB decoded
    peaks = []
    for count in (60, 360):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.jpg").write_bytes(content)
        process = start(tiny, "--outputs", "cam", "--output", tmp_path / f"out{count}", folder)
        assert process.stdout.read().count("\n") == count
        _, _, usage = os.wait4(process.pid, 0)
        peaks.append(usage.ru_maxrss)
    assert peaks[1] - peaks[0] < 60_000  # kilobytes; 300 decoded photos are 270,000


# The README


def test_the_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"^pip install -r (\S+).*$", readme, re.MULTILINE)
    assert files == ["requirements.txt", "tests/requirements.txt"]


def test_the_table_of_the_readme_has_every_option(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        program_file.parse_args(["--help"])
    text = capsys.readouterr().out
    options = set(re.findall(r"^ +(?:-h, )?(--[a-z-]+)", text, re.MULTILINE))
    options.remove("--help")
    assert len(options) > 20

    table = "\n".join(re.findall(r"^\|.*$", readme, re.MULTILINE))
    missing = [option for option in options if not re.search(rf"{option}\b(?!-)", table)]
    assert missing == []
