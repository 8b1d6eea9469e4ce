"""Section 7, Run: the whole program on the demo and on folders, and everything that can go wrong on the way."""

import contextlib
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
    pixels,
    posix,
    records,
)
from PIL import Image
from torchvision.transforms._presets import ImageClassification

import cnn_visualizations as program_file
from cnn_visualizations import (
    LOG_NAME,
    OUTPUTS,
    PREDICTED,
    TRUTH,
    CallError,
    Explainer,
    draw,
    faithfulness,
    find_class,
    load_classifier,
    read_photo,
)

pytestmark = pytest.mark.usefixtures("one_thread", "end_of_a_hang")
THREE = ["gradcam_cam_1.jpg", "gb_1.jpg", "gradcam_cam_gb_1.jpg"]
DEMO = ["gradcam_cam_dog.jpg", "gb_dog.jpg", "gradcam_cam_gb_dog.jpg"]


def tally(result):
    """Return how many photos were done, skipped and failed, as the last line on stderr says."""
    counts = re.match(r"(\d+) done, (\d+) skipped, (\d+) failed", result.stderr.splitlines()[-1])
    return tuple(map(int, counts.groups()))


def break_off(path):
    """Make a photo one that looks whole from its first bytes but cannot be decoded."""
    path.write_bytes(path.read_bytes()[:300])


def assert_same_outcome(folder, expected):
    """The same files and last records; a last bit may be a step of the colormap."""
    assert [name for name in files_in(folder) if ".part-" not in name] == files_in(expected)
    for name in files_in(expected):
        assert np.abs(pixels(folder / name) - pixels(expected / name)).max() <= 14, name
    found, wanted = last_records(folder), last_records(expected)
    assert set(found) == set(wanted)
    for key, record in wanted.items():
        assert found[key].get("error") == record.get("error")
        assert [file.replace(str(folder), str(expected)) for file in found[key]["files"]] == record[
            "files"
        ]
        for kind in ("prediction", "class") if "error" not in record else ():
            assert found[key][kind] == pytest.approx(record[kind], abs=1e-3)


@pytest.fixture
def album(tmp_path):
    """A folder of six photos in two folders of equal names."""
    for seed, name in enumerate(
        ["a.jpg", "b.jpg", "x/1.jpg", "x/2.png", "y/x/1.jpg", "y/狗 3.jpg"]
    ):
        paint(tmp_path / "album" / name, seed)
    return tmp_path / "album"


# The demo


def test_the_demo_prints_two_lines_and_its_pictures_show_the_dog(program, tmp_path):
    process = program(
        "--ckpt", "tests/data/dogs_mobilenet_v2.pth", "pics/dog.jpg", "--output", tmp_path
    )
    paths = ", ".join(str(tmp_path / name) for name in DEMO)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{os.path.join('pics', 'dog.jpg')}: Siberian husky 0.487 -> {paths}\n"
    words = [
        "mobilenet_v2",
        "19 classes",
        "features",
        "input 225 x 225 crop",
        "ImageNet mean and std",
        "cpu (no CUDA",
    ]
    assert (process.stderr.count("\n"), [word for word in words if word not in process.stderr]) == (
        1,
        [],
    )
    assert files_in(tmp_path) == sorted(DEMO)
    cam, guided, product = (pixels(tmp_path / name) for name in DEMO)
    height, width, _ = cam.shape
    # The network sees the central 225/233 of the photo's short side, in pics/dog.jpg, 768 x 576 pixels.
    seen = 576 * 225 / 233
    left, top = (768 - seen) / 2, (576 - seen) / 2
    assert (guided.shape, product.shape, abs(height - seen) <= 2) == (cam.shape, cam.shape, True)

    def mask(box):
        x, y = (
            (np.array(box[::2]) - left) * width / seen,
            (np.array(box[1::2]) - top) * height / seen,
        )
        inside = np.zeros((height, width), bool)
        inside[max(0, round(y[0])) : round(y[1]), max(0, round(x[0])) : round(x[1])] = True
        return inside

    dog, head, right = (
        mask((130, 220, 310, 540)),
        mask((210, 220, 305, 310)),
        mask((450, 0, 768, 576)),
    )
    with Image.open(DOG) as image:
        heat = 2 * cam - image.resize((width, height), box=(left, top, left + seen, top + seen))
    warmth = heat[:, :, 0] - heat[:, :, 2]  # red is hot, blue is cold
    assert (warmth[head].mean() > 80, warmth[right].mean() < -80) == (True, True)
    for picture, share in ((guided, 0.6), (product, 0.8)):  # the dog is 19 % of the picture
        energy = ((picture - 127.5) ** 2).sum(2)
        assert (energy.mean() > 20, energy[dog].sum() / energy.sum() > share) == (True, True)


@pytest.mark.slow
def test_all_methods_classes_and_files_at_once(program, tmp_path):
    words = [
        "--method",
        "all",
        "--top-k",
        "2",
        "--sheet",
        "--metrics",
        "--save-arrays",
        "--output",
        tmp_path,
    ]
    process = program("--ckpt", CKPT, *words, DOG)
    assert (process.returncode, process.stdout.count("\n"), process.stderr.count("\n")) == (
        0,
        1,
        1,
    ), process.stderr
    (record,) = records(tmp_path)
    assert len(files_in(tmp_path)) == len(record["files"]) == 2 * (7 * 2 + 1) + 2
    husky = [found for found in record["metrics"] if found["class"] == "Siberian husky"]
    assert [found["method"] for found in husky] == list(program_file.METHODS)
    assert all(
        found["insertion"] > found["deletion"] + 0.1 and found["road"] > 0.05 for found in husky
    )


# Lines and records


@pytest.mark.parametrize(("asked", "explained"), [("", None), ("owl", [3]), ("2,fox", [2, 4])])
def test_line_and_record_say_what_the_plain_network_says(explain, tiny, tmp_path, asked, explained):
    path = paint(tmp_path / "狗" / "é 2.png", 3, (300, 260))
    options = [word for name in asked.split(",") if name for word in ("--target-class", name)]
    options += ["--mean", "0.4,0.5,0.6", "--std", "0.3", "--input-size", "80", "--outputs", "cam"]
    result = explain(*options, path)
    assert result.status == 0
    (record,) = records(tmp_path / "out")
    sides = {
        "crop_size": 80,
        "resize_size": load_classifier(ckpt=tiny[0], input_size=80).preset.resize_size[0],
    }
    with torch.no_grad(), Image.open(path) as image:
        inputs = ImageClassification(**sides, mean=(0.4, 0.5, 0.6), std=(0.3,) * 3)(
            image.convert("RGB")
        )
        p = tiny[1](inputs[None]).softmax(1)[0]
    order = p.argsort(descending=True).tolist()
    classes = explained or order[:1]
    named = [record["prediction"], *record["top5"], record["class"], *record.get("classes", [])]
    indices = [order[0], *order[:5], classes[0], *(explained or [])]
    assert [(each["index"], each["name"]) for each in named] == [
        (index, CLASSES[index]) for index in indices
    ]
    assert [each["probability"] for each in named] == pytest.approx(
        [float(p[index]) for index in indices], abs=1e-4
    )
    expected = {
        "image": str(path),
        "width": 300,
        "height": 260,
        "method": "gradcam",
        "target_layer": "features",
    }
    expected |= {"input_size": 80, "mean": [0.4, 0.5, 0.6], "std": [0.3] * 3, "resize": "crop"}
    assert {key: record[key] for key in expected} == expected
    words = [f"{CLASSES[index]} {p[index]:.3g}" for index in (order[0], *classes)]
    assert (record["truth"], record["right"]) == (
        {"index": 2, "name": "狗"},
        False,
    )  # the name of its folder
    line = f"{path}: {words[0]} (truth: 狗)" + (
        f"; explained: {', '.join(words[1:])}" if explained else ""
    )
    assert result.stdout == f"{line} -> {', '.join(record['files'])}\n"
    assert "狗" in (tmp_path / "out" / LOG_NAME).read_text(encoding="utf-8")


# True classes, the gallery and the list of layers


@pytest.fixture
def sorted_photos(tiny, tmp_path):
    """Photos in folders with names of classes: one that is predicted right, one that is not, and a stranger."""
    (tmp_path / "unknown").mkdir()
    paths = [paint(tmp_path / "unknown" / f"{seed}.png", seed) for seed in range(3)]
    classifier = load_classifier(ckpt=tiny[0], device="cpu")
    inputs = torch.stack([classifier.preprocess(read_photo(path)) for path in paths])
    with torch.no_grad():
        predicted = classifier.model(inputs).argmax(1).tolist()
    for path, folder in (
        (paths[0], CLASSES[predicted[0]].upper()),
        (paths[1], "0"),
    ):  # 0 is never predicted
        (tmp_path / folder).mkdir()
        shutil.move(path, tmp_path / folder / path.name)
    return tmp_path / CLASSES[predicted[0]].upper() / "0.png", tmp_path / "0" / "1.png", paths[2]


def test_the_folder_tells_the_true_class_and_the_closing_line_the_accuracy(
    explain, sorted_photos, tmp_path
):
    right, wrong, stranger = map(str, sorted_photos)
    result = explain("--outputs", "cam", *sorted_photos)
    assert result.stderr.splitlines()[-1].endswith(
        f"; accuracy 50.0 % (1 of 2); the 1 wrong ones first in {tmp_path / 'out' / 'index.html'}"
    )
    assert [line.count("(truth: cat)") for line in result.stdout.splitlines()] == [0, 1, 0]
    by_image = {record["image"]: record for record in records(tmp_path / "out")}
    assert [by_image[image].get("right") for image in (right, wrong, stranger)] == [
        True,
        False,
        None,
    ]
    assert (
        by_image[wrong]["truth"] == {"index": 0, "name": "cat"}
        and "truth" not in by_image[stranger]
    )
    again = explain("--outputs", "cam", "--skip-existing", "--no-gallery", *sorted_photos)
    assert re.search(r"0 done, 3 skipped.*; accuracy 50.0 % \(1 of 2\)$", again.stderr)
    assert "accuracy" not in explain("--outputs", "cam", stranger, tmp_path / "unknown").stderr


def test_the_true_class_is_explained_and_where_it_is_predicted_only_once(
    explain, sorted_photos, tmp_path
):
    asked = (
        "--target-class",
        "truth",
        "--target-class",
        "predicted",
        "--outputs",
        "cam,gb",
        "--save-arrays",
    )
    result = explain(*asked, *sorted_photos)
    assert "warning: where the folder is not named after a class" in result.stderr
    for record, path in zip(records(tmp_path / "out"), sorted_photos, strict=True):
        indices = [found["index"] for found in record["classes"]]
        truth = [record["truth"]["index"]] if "truth" in record else []
        assert indices == list(dict.fromkeys([*truth, record["prediction"]["index"]]))
        by_index = explain(
            *[w for i in indices for w in ("--target-class", i)],
            "--save-arrays",
            path,
            output=tmp_path / "b",
        )
        assert by_index.status == 0
        ours, theirs = (
            np.load(folder / f"{path.stem}.npz") for folder in (tmp_path / "out", tmp_path / "b")
        )
        for name in ("classes", "cams", "guided"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_only_wrong_ones_get_pictures_and_all_a_record(explain, sorted_photos, tmp_path):
    result = explain("--only-wrong", "--target-class", "truth", "--outputs", "cam", *sorted_photos)
    assert files_in(tmp_path / "out") == ["gradcam_cam_1_cat.jpg"]
    assert [len(record["files"]) for record in records(tmp_path / "out")] == [0, 1, 0]
    assert result.stdout.count("-> no files") == 2 and "3 done" in result.stderr
    again = explain(
        "--only-wrong",
        "--target-class",
        "truth",
        "--outputs",
        "cam",
        "--skip-existing",
        *sorted_photos,
    )
    assert "0 done, 3 skipped" in again.stderr
    assert (
        "3 done"
        in explain(
            "--target-class", "truth", "--outputs", "cam", "--skip-existing", *sorted_photos
        ).stderr
    )


@pytest.mark.parametrize("option", [("--only-wrong",), ("--target-class", "truth")])
def test_without_any_true_class_what_needs_one_is_refused(explain, photo, option):
    result = explain(*option, photo)
    assert (result.status, result.stdout) == (2, "")
    assert re.fullmatch(
        r"error: no photo's folder is named after a class \(cat, dog, .*\n", result.stderr
    )


def test_a_class_that_is_really_called_truth_wins():
    assert find_class("Truth", ["predicted", "truth"]) == 1
    assert find_class("predicted", ["predicted", "truth"]) == 0
    assert (find_class("truth", ["cat"]), find_class("predicted", ["cat"])) == (TRUTH, PREDICTED)


def test_a_page_is_made_for_more_than_one_photo_and_never_over_anothers(
    explain, album, photo, tmp_path
):
    page = tmp_path / "out" / "index.html"
    explain("--outputs", "cam", photo)
    explain("--outputs", "cam", "--no-gallery", album)
    assert not page.exists()
    assert f"; see {page}" in explain("--outputs", "cam", "--skip-existing", album).stderr
    assert (
        page.read_text(encoding="utf-8").count('"state":"unknown"') == 7
    )  # the single photo of the first run as well
    page.write_text("my own page")
    result = explain("--outputs", "cam", album)
    assert (result.status, page.read_text()) == (0, "my own page")
    assert f"warning: no page of the results: {page} is in the way" in result.stderr


def test_layers_are_listed_with_the_size_of_their_maps(explain, tiny, tmp_path):
    result = explain("--list-layers")
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert (result.status, files_in(tmp_path / "out")) == (0, [])
    shapes = {}

    def record(name, module, args, output):
        if output.ndim == 4 and output[0, 0].numel() > 1 and name:
            shapes[name] = [name, type(module).__name__, " x ".join(map(str, output.shape[1:]))]

    model = copy.deepcopy(tiny[1])
    for name, module in model.named_modules():
        module.register_forward_hook(partial(record, name))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    default = next(line for line in lines if line[2].endswith("(default)"))
    assert default[0] == "features"
    default[2] = default[2].removesuffix("   (default)")
    assert lines == list(shapes.values())
    assert "--list-layers" in explain("--target-layer", "nope", DOG).stderr


def test_from_python_an_output_is_drawn_as_the_program_draws_it(explain, tiny, photo, tmp_path):
    explain("--format", "png", "--output-size", "70", photo)
    classifier = load_classifier(ckpt=tiny[0], device="cpu")
    seen = classifier.seen(read_photo(photo))
    explanation = Explainer(classifier.model)(classifier.preprocess(read_photo(photo))[None])
    for output, name in zip(OUTPUTS, THREE, strict=True):
        drawn = draw(output, explanation, seen)
        written = pixels(tmp_path / "out" / name.replace("jpg", "png"))
        assert drawn.shape == seen.shape
        enlarged = cv2.resize(drawn, written.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        assert np.abs(enlarged - written).mean() < 8


def test_metrics_are_those_of_each_map(explain, tiny, photo, tmp_path):
    options = [
        "--top-k",
        "2",
        "--metrics",
        "--save-arrays",
        "--outputs",
        "cam",
        "--method",
        "gradcam,layercam",
    ]
    result = explain("--input-size", "32", *options, photo)
    (record,) = records(tmp_path / "out")
    classifier = load_classifier(ckpt=tiny[0], device="cpu", input_size=32)
    explainer, inputs = Explainer(classifier.model), classifier.preprocess(read_photo(photo))[None]
    with np.load(tmp_path / "out" / "1.npz") as arrays:
        maps = [(k, m) for k in range(2) for m in range(2)]
        for (k, m), found in zip(maps, record["metrics"], strict=True):
            index, method = int(arrays["classes"][k]), str(arrays["methods"][m])
            values = faithfulness(explainer, inputs, arrays["cams"][m, k], index)
            assert found == pytest.approx(
                {"class": CLASSES[index], "method": method, **values}, abs=2e-3
            )
            assert (
                f"; {method} for {CLASSES[index]}: average_drop {found['average_drop']:.3g}, "
                in result.stdout
            )


@pytest.mark.parametrize("size", [1, 8])
def test_broken_photos_are_one_line_each_and_the_others_are_done(explain, tmp_path, size):
    """Also where a library prints complaints of its own, as of 86 samples a pixel in a TIFF."""
    folder = tmp_path / "相册 2.0"
    photos = [paint(folder / f"{n}.jpg", n, (400, 300)) for n in range(4)] + [
        paint(folder / "4.tif", 4)
    ]
    break_off(photos[1])
    photos[3].write_bytes(b"" if size == 1 else b"Dear diary\n")
    samples = b"\x15\x01\x03\0\x01\0\0\0"
    photos[4].write_bytes(photos[4].read_bytes().replace(samples + b"\x03", samples + b"\x56"))
    photos.append(folder / "5 missing.jpg")
    result = explain("--outputs", "cam", "--batch-size", size, *photos)
    assert (result.status, tally(result)) == (1, (2, 0, 4))
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [
        str(photos[0]),
        str(photos[2]),
    ]
    found = {
        record["image"]: record["error"]
        for record in records(tmp_path / "out")
        if "error" in record
    }
    assert result.stderr.splitlines()[1:-1] == [
        f"error: {found[str(photos[number])]}" for number in (1, 3, 4, 5)
    ]
    assert all(error.startswith(f"{path}: ") for path, error in found.items())
    assert files_in(tmp_path / "out") == ["gradcam_cam_0.jpg", "gradcam_cam_2.jpg"]


WRONG = {
    "--target-class wolf": "'wolf'",
    "--target-class 7": "classes 0 to 6",
    "--num-classes 5": "7 classes",
}
WRONG |= {
    "--target-layer classifier.9": "'classifier.9'",
    "--class-names a,b": "7 classes",
    "--colormap yet": "jet",
}


@pytest.mark.parametrize(
    ("options", "said"), {**WRONG, "--input-size 8": "8 x 8", "--device xpu:7": "xpu:7"}.items()
)
def test_a_wrong_call_is_one_line_before_any_photo_is_explained(
    explain, photo, tmp_path, options, said
):
    result = explain(*options.split(), photo)
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert (result.stderr.startswith("error: "), said in result.stderr) == (True, True)
    assert files_in(tmp_path / "out") == []


def test_a_photo_gets_alone_what_it_gets_in_a_batch(explain, album, tmp_path):
    explain("--batch-size", "4", album)
    explain("--batch-size", "1", album, output=tmp_path / "alone")
    assert_same_outcome(tmp_path / "out", tmp_path / "alone")


# --skip-existing


def test_a_second_run_does_nothing_and_does_not_even_load_the_network(
    explain, album, tmp_path, monkeypatch
):
    explain(album)
    before = {
        name: (tmp_path / "out" / name).stat().st_mtime_ns
        for name in (*files_in(tmp_path / "out"), LOG_NAME)
    }
    monkeypatch.setattr(program_file, "load_classifier", None)
    monkeypatch.chdir(tmp_path)
    for path in (album, "album"):
        result = explain("--skip-existing", "--batch-size", "3", path)
        assert (result.status, result.stdout, tally(result)) == (0, "", (0, 6, 0))
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


CHANGED = "|--target-class 4|--alpha 0.3|--method eigencam,gradcam|--outputs cam,gb|--sheet|--save-arrays|--mean 0"
CHANGED += "|--resize squash|--format png|--input-size 80|--eigen-smooth|--class-names a,b,c,d,e,f,g|--quality 50"


def test_what_was_done_with_other_options_is_not_taken_for_done(explain, album, tmp_path):
    for changed in CHANGED.split("|"):
        options = [
            *changed.split(),
            "--outputs",
            "cam",
            "--skip-existing",
            album / "a.jpg",
            album / "b.jpg",
        ]
        assert (tally(explain(*options)), tally(explain(*options))) == ((2, 0, 0), (0, 2, 0)), (
            changed
        )
    assert len(records(tmp_path / "out")) == 2 * len(CHANGED.split("|"))


def test_a_changed_checkpoint_or_photo_and_a_removed_file_are_done_again(
    explain, tiny, album, tmp_path
):
    ckpt = shutil.copy(tiny[0], tmp_path / "net.pth")
    options = ["--outputs", "cam,gb", "--skip-existing", album]
    assert tally(explain(*options, ckpt=ckpt)) == (6, 0, 0)
    paint(album / "b.jpg", 30)
    (tmp_path / "out" / "x" / "gb_2.jpg").unlink()
    result = explain(*options, ckpt=ckpt)
    printed = [line.partition(": ")[0] for line in result.stdout.splitlines()]
    assert (tally(result), printed) == (
        (2, 4, 0),
        [str(album / "b.jpg"), str(album / "x" / "2.png")],
    )
    os.utime(ckpt, (1, 1))
    assert tally(explain(*options, ckpt=ckpt)) == (6, 0, 0)
    assert tally(explain(*options, ckpt=ckpt)) == (0, 6, 0)


def test_pictures_that_a_run_with_other_options_has_written_over_are_done_again(
    explain, album, tmp_path
):
    gb, again = tmp_path / "out" / "gb_a.jpg", ["--skip-existing", album / "a.jpg"]
    explain(*again)
    first = gb.read_bytes()
    explain("--method", "eigencam", *again)
    assert tally(explain(*again)) == (
        0,
        1,
        0,
    )  # another method with the same options has drawn the same gb
    explain("--method", "eigencam", "--resize", "squash", *again)
    assert gb.read_bytes() != first
    assert explain(*again).stdout.count("\n") == 1
    assert (gb.read_bytes(), tally(explain(*again))) == (first, (0, 1, 0))


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
    assert (result.status, tally(result)) == (1, (2, 3, 1))
    errors = [
        image for (image, _), record in last_records(tmp_path / "out").items() if "error" in record
    ]
    assert errors == [str(album / "x" / "1.jpg")]


# Processes that end early


def start(tiny, *words, stdout=subprocess.PIPE, **environment):
    """Start the program as a process on the small network."""
    command = [
        sys.executable,
        PROGRAM,
        "--ckpt",
        tiny[0],
        "--device",
        "cpu",
        "--batch-size",
        "1",
        *words,
    ]
    options = {"stdout": stdout, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    options["env"] = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **environment}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([str(word) for word in command], **options)


def wait_for_lines(process, log, count):
    """Return as soon as the log has so many lines, or the process has ended."""
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= count):
        time.sleep(0.002)


def crowd(folder, count):
    """Paint photos in three folders; names are equal in all, and three photos are broken. Return the folder."""
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
    folder, output, hits = crowd(tmp_path / "album", count), tmp_path / "out", 0
    for number in range(kills):
        process = start(
            tiny, "--skip-existing", "--output", output, folder, stdout=subprocess.DEVNULL
        )
        wait_for_lines(
            process, output / LOG_NAME, count * (number + random.random()) / (kills + 1) + 1
        )
        process.kill()
        process.communicate()
        whole = [name for name in files_in(output) if ".part-" not in name]
        assert all(pixels(output / name).shape[2] == 3 for name in whole)  # each can be decoded
        hits += process.returncode == -signal.SIGKILL and 0 < len(whole) < (count - 3) * 3
    assert hits > 0
    done, skipped, failed = tally(explain("--skip-existing", "--batch-size", "1", folder))
    assert (done + skipped, skipped > 0, failed) == (count - 3, True, 3)
    explain("--batch-size", "1", folder, output=tmp_path / "undisturbed")
    assert_same_outcome(output, tmp_path / "undisturbed")
    assert tally(explain("--skip-existing", folder)) == (0, count - 3, 3)


@posix
def test_control_c_ends_with_130_and_what_was_printed_is_whole(explain, tiny, tmp_path):
    folder, output = crowd(tmp_path / "album", 60), tmp_path / "out"
    process = start(tiny, "--output", output, folder)
    wait_for_lines(process, output / LOG_NAME, 5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in stderr) == (130, False), stderr
    counts = re.match(
        r"(\d+) done, 0 skipped, \d failed in .*; stopped, .* --skip-existing",
        stderr.splitlines()[-1],
    )
    printed = [line.partition(": ")[0] for line in stdout.splitlines()]
    assert 0 < int(counts.group(1)) == len(printed) < 57
    logged = last_records(output)
    assert all(
        pixels(file).std() > 0 for image in printed for file in logged[image, "gradcam"]["files"]
    )
    assert not any(".part-" in name for name in files_in(output))
    assert (output / "index.html").read_text(encoding="utf-8").count('"state":"') >= len(printed)
    done, skipped, failed = tally(explain("--skip-existing", "--batch-size", "1", folder))
    assert (done + skipped, skipped >= len(printed), failed) == (57, True, 3)


def test_control_c_while_the_network_is_loaded_prints_the_counts_too(explain, album, monkeypatch):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(program_file, "load_classifier", pressed)
    result = explain(album)
    assert (result.status, result.stdout, tally(result)) == (130, "", (0, 0, 0))


@posix
def test_a_reader_that_has_read_enough_ends_the_run_without_a_traceback(tiny, tmp_path):
    """As `| head -1` does, on a terminal that does not know the characters of a name."""
    for seed in range(30):
        paint(tmp_path / "album" / f"狗 {seed:02}.jpg", seed)
    environment = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    process = start(tiny, "--output", tmp_path / "out", tmp_path / "album", **environment)
    assert process.stdout.readline().startswith(f"{tmp_path}/album/\\u72d7 00.jpg: ")
    process.stdout.close()
    stderr = process.stderr.read()
    assert (process.wait(), stderr.count("\n"), "error: stopped, " in stderr) == (1, 2, True), (
        stderr
    )
    assert all(
        os.path.isfile(file) for record in records(tmp_path / "out") for file in record["files"]
    )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a device that is always full"
)
def test_an_output_that_is_full_ends_the_run_without_a_traceback(explain, album, monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        result = explain("--outputs", "cam", album)
    assert (result.status, "Traceback" in result.stderr) == (1, False)
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
    def vanish():
        shutil.rmtree(tmp_path / "out")
        if by_a_file:
            (tmp_path / "out").write_text("mine", encoding="utf-8")

    monkeypatch.setattr(program_file, "read_photo", once(1, read_photo, vanish))
    result = explain("--batch-size", "1", "--outputs", "cam", album)
    done, _, failed = tally(result)
    assert (done + failed, failed > 0, result.status) == (6, by_a_file, int(by_a_file))
    assert result.stderr.count("error: ") == failed
    assert by_a_file or len(files_in(tmp_path / "out")) == len(records(tmp_path / "out")) >= 4


def test_a_photo_that_vanishes_on_the_way_is_one_line(explain, album, monkeypatch):
    monkeypatch.setattr(program_file, "read_photo", once(1, read_photo, (album / "b.jpg").unlink))
    result = explain(
        "--outputs", "cam", "--batch-size", "1", album / "a.jpg", album / "b.jpg", album / "x"
    )
    assert (result.status, result.stdout.count("\n"), tally(result)) == (1, 3, (3, 0, 1))
    assert result.stderr.splitlines()[1] == f"error: {album / 'b.jpg'}: no such file"


# Errors of the network


@pytest.fixture
def failing(monkeypatch):
    """Let explainers raise the error that a function of inputs and number returns. Returns the sizes of batches."""
    sizes, call = [], Explainer.__call__

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


def test_photos_are_explained_in_batches(explain, album, failing):
    sizes = failing(lambda inputs, number: None)
    break_off(album / "b.jpg")
    for options, expected in (([], [1, 2, 2]), (["--batch-size", "4"], [3, 2])):
        assert tally(explain("--outputs", "cam", *options, album)) == (5, 0, 1)
        assert sizes == expected
        sizes.clear()


MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), MemoryError()]
MEMORY += [
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
]
MEMORY += [
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
]


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_too_little_memory_halves_the_batch_and_says_so_once(explain, tmp_path, failing, error):
    for seed in range(11):
        paint(tmp_path / "album" / f"{seed:02}.jpg", seed)
    sizes = failing(lambda inputs, number: error if len(inputs) > 3 else None)
    result = explain("--outputs", "cam", "--batch-size", "8", tmp_path / "album")
    assert (result.status, tally(result), result.stderr.count("warning: memory")) == (
        0,
        (11, 0, 0),
        1,
    )
    assert sizes == [2] * 5 + [1]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("the logits are NaN")]
)
def test_a_photo_on_which_the_network_fails_takes_no_other_with_it(
    explain, album, tmp_path, failing, error
):
    white = album / "x" / "2.png"
    Image.new("RGB", (90, 70), "white").save(white)
    failing(lambda inputs, number: error if any(each.std() < 0.5 for each in inputs) else None)
    result = explain("--outputs", "cam", "--batch-size", "4", album)
    assert (result.status, tally(result)) == (1, (5, 0, 1))
    assert f"error: {white}: the network failed: {error}\n" in result.stderr
    assert "error" in last_records(tmp_path / "out")[str(white), "gradcam"]


GPU = RuntimeError("CUDA error: an illegal memory access\nmore")
MIDDLE = {
    "wrong call": (CallError("no such thing"), "no such thing"),
    "bug": (TypeError("forward() ..."), None),
}
MIDDLE["failed GPU"] = (
    GPU,
    "the GPU has failed: CUDA error: an illegal memory access; go on with --skip-existing",
)


@pytest.mark.parametrize(("error", "line"), MIDDLE.values(), ids=MIDDLE)
def test_an_error_in_the_middle_of_a_folder_leaves_no_photo_without_its_line(
    explain, album, tmp_path, failing, error, line, capfd
):
    failing(lambda inputs, number: error if number == 4 else None)
    with contextlib.nullcontext() if line else pytest.raises(TypeError):
        result = explain("--outputs", "cam", "--batch-size", "1", album)
        assert (result.status, result.stderr.splitlines()[-1]) == (2, f"error: {line}")
    stdout = result.stdout if line else capfd.readouterr().out
    assert (
        stdout.count("\n"),
        len(records(tmp_path / "out")),
        len(files_in(tmp_path / "out")),
    ) == (4, 4, 4)
    failing(lambda inputs, number: None)
    assert tally(explain("--outputs", "cam", "--skip-existing", album)) == (2, 4, 0)


def test_a_network_that_does_not_fit_the_memory_is_one_line(explain, photo, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    result = explain(photo)
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "more memory than there is" in result.stderr


# Several processes


@posix
def test_two_processes_over_one_folder_at_once_give_one_line_for_each_photo(
    explain, tiny, tmp_path
):
    folder, output = crowd(tmp_path / "album", 40), tmp_path / "out"
    pair = [start(tiny, "--output", output, folder) for _ in range(2)]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in pair]
    assert [status for _, _, status in ends] == [1, 1], ends
    printed = [line.partition(": ")[0] for stdout, _, _ in ends for line in stdout.splitlines()]
    good = [record["image"] for record in records(output) if "error" not in record]
    assert (sorted(printed), len(good), len(set(good))) == (sorted(good), 37, 37)
    explain("--batch-size", "1", folder, output=tmp_path / "alone")
    assert_same_outcome(output, tmp_path / "alone")


@pytest.mark.parametrize(("first", "second"), [(3, 2), (1, 3)])
def test_the_processes_of_torchrun_share_a_folder_and_another_number_goes_on(
    explain, album, tmp_path, monkeypatch, first, second
):
    def share(world, *words):
        for rank in range(world):
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
                monkeypatch.setenv(name, str(value))
            yield explain("--outputs", "cam", *words)

    explain("--outputs", "cam", album, output=tmp_path / "alone")
    whole = (album / "b.jpg").read_bytes()
    break_off(album / "b.jpg")
    results = [*share(first, album)]
    assert [result.status for result in results] == [int(first == 1)] * first
    assert all(
        f" by process {n} of {first} in " in r.stderr or first == 1 for n, r in enumerate(results)
    )
    (album / "b.jpg").write_bytes(whole)
    (tmp_path / "out" / "y" / "gradcam_cam_狗 3.jpg").unlink()
    assert sum(tally(result)[0] for result in share(second, "--skip-existing", album)) == 2
    assert_same_outcome(tmp_path / "out", tmp_path / "alone")
    assert len(records(tmp_path / "out")) == 6 + 2


# Memory and order


@pytest.mark.slow
def test_ten_thousand_paths_are_each_one_line(explain, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", (f"{tmp_path}/{n // 100}/{n}.jpg\n" for n in range(10_000)))
    result = explain("--outputs", "cam", photo, "-")
    assert (result.status, tally(result), result.stdout.count("\n")) == (1, (1, 0, 10_000), 1)
    assert len(last_records(tmp_path / "out")) == 10_001


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in kilobytes there")
def test_three_hundred_photos_take_the_memory_of_sixty(tiny, tmp_path):
    content, peaks = paint(tmp_path / "0.jpg", 5, (640, 480)).read_bytes(), []  # 0.9 MB decoded
    for count in (60, 360):
        (tmp_path / str(count)).mkdir()
        for number in range(count):
            (tmp_path / str(count) / f"{number}.jpg").write_bytes(content)
        process = start(
            tiny, "--outputs", "cam", "--output", tmp_path / f"out{count}", tmp_path / str(count)
        )
        assert process.stdout.read().count("\n") == count
        peaks.append(os.wait4(process.pid, 0)[2].ru_maxrss)
    assert peaks[1] - peaks[0] < 60_000  # kilobytes; 300 decoded photos are 270,000


# The README


def test_the_readme_has_the_two_commands_and_every_option(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall("^pip install -r .*$", readme, re.MULTILINE)
    assert [command.split()[3] for command in commands] == [
        "requirements.txt",
        "tests/requirements.txt",
    ]
    with pytest.raises(SystemExit):
        program_file.parse_args(["--help"])
    options = set(re.findall(r"^ +(?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {
        "--help"
    }
    assert len(options) > 20
    table = "\n".join(line for line in readme.splitlines() if line.startswith("|"))
    assert [option for option in sorted(options) if not re.search(rf"{option}\b(?!-)", table)] == []
