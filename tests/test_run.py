"""Room 7, the run: the whole program on the demo, as a person runs it, and everything that can go wrong on the way."""

import contextlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CKPT, DOG, PROGRAM, ROOT
from PIL import Image

import cnn_visualizations as program_file

NAMES = ("gradcam_cam_dog.jpg", "gb_dog.jpg", "gradcam_cam_gb_dog.jpg")
METHODS = ["gradcam", "gradcam++", "ablationcam", "xgradcam", "eigencam", "eigengradcam"]  # and scorecam, alone
NOTE = "note: no CUDA GPU found, computing on the CPU\n"

# The network sees the central 225/233 of the photo's short side: where that is in pics/dog.jpg, 768 x 576 pixels.
SIDE = 576 * 225 / 233
LEFT, TOP = (768 - SIDE) / 2, (576 - SIDE) / 2
DOG_BOX, HEAD_BOX = (130, 220, 310, 540), (210, 220, 305, 310)  # left, top, right, bottom in pics/dog.jpg


def within(box, picture):
    """The part of a picture of what the network saw that shows a box of pics/dog.jpg, as slices."""
    height, width = picture.shape[:2]
    left, right = (round((x - LEFT) / SIDE * width) for x in (box[0], box[2]))
    top, bottom = (round((y - TOP) / SIDE * height) for y in (box[1], box[3]))
    return slice(max(0, top), bottom), slice(max(0, left), right)


def share(values, box):
    """How much of the sum of values (H, W) lies in the box."""
    return values[within(box, values)].sum() / values.sum()


def peak_is_within(values, box):
    row, column = np.unravel_index(values.argmax(), values.shape)
    rows, columns = within(box, values)
    return rows.start <= row < rows.stop and columns.start <= column < columns.stop


def opened(path):
    with Image.open(path) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(int)


def files_in(folder):
    """The names of the files in a folder, the record aside."""
    return sorted(path.name for path in folder.iterdir() if path.name != "results.jsonl")


@pytest.fixture
def main(tmp_path, capsys):
    """Runs the program in this process on the demo's checkpoint. Gives the exit status, stdout and stderr."""

    def run(*args, ckpt=CKPT, output=tmp_path / "out"):
        words = ["--ckpt", ckpt, "--device", "cpu", "--output", output, *args]
        try:
            status = program_file.main(program_file.parse_args([str(word) for word in words]))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def refused(result):
    """The error line of a wrong call, which wrote nothing else and exits with 2."""
    status, stdout, stderr = result
    assert (status, stdout) == (2, ""), stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    return stderr


# The demo, exactly as the README says


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The README's command in a process of its own: the finished process and the folder of its pictures."""
    output = tmp_path_factory.mktemp("demo") / "out"
    words = ["--ckpt", "tests/data/dogs_mobilenet_v2.pth", "pics/dog.jpg", "--output", str(output)]
    process = subprocess.run(
        [sys.executable, str(PROGRAM), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return process, output


def test_the_demo_prints_one_line_with_class_probability_and_files(demo):
    process, output = demo
    assert process.returncode == 0, process.stderr
    files = ", ".join(str(output / name) for name in NAMES)
    assert process.stdout == f"{os.path.join('pics', 'dog.jpg')}: Siberian husky 0.487 -> {files}\n"


def test_the_demo_says_nothing_else_than_that_it_runs_on_the_cpu(demo):
    assert demo[0].stderr == NOTE


def test_the_demo_writes_three_pictures_of_one_size(demo):
    assert files_in(demo[1]) == sorted(NAMES)
    sizes = {opened(demo[1] / name).shape for name in NAMES}
    assert len(sizes) == 1
    height, width, _ = sizes.pop()
    assert abs(height - SIDE) <= 2  # the photo's own resolution
    assert abs(width - SIDE) <= 2


def test_the_demos_heat_lies_on_the_dog(demo):
    drawn = opened(demo[1] / NAMES[0])
    height, width = drawn.shape[:2]
    with Image.open(DOG) as photo:
        seen = photo.resize((width, height), box=(LEFT, TOP, LEFT + SIDE, TOP + SIDE))
    heat = 2 * drawn - np.asarray(seen).astype(int)
    warmth = heat[:, :, 0] - heat[:, :, 2]  # red is hot, blue is cold
    assert warmth[within(HEAD_BOX, warmth)].mean() > 80
    rest = np.ones_like(warmth, bool)
    rest[within(DOG_BOX, rest)] = False
    rest[:, : width * 3 // 5] = False  # the map is coarse: beside the dog it is still warm
    assert warmth[rest].mean() < -80
    share_of_hot = (warmth[within(DOG_BOX, warmth)] > 60).sum() / (warmth > 60).sum()
    assert share_of_hot > 0.55


def test_the_demos_guided_gradients_are_not_flat_and_lie_on_the_dog(demo):
    energy = (np.abs(opened(demo[1] / NAMES[1]) - 127.5) ** 2).sum(2)
    assert energy.mean() > 100
    assert share(energy, DOG_BOX) > 0.6  # 19 % of the picture
    assert share(energy, HEAD_BOX) > 0.2  # 3 % of it


def test_the_demos_product_is_grey_away_from_the_dog(demo):
    product = opened(demo[1] / NAMES[2])
    far = product[:, product.shape[1] * 2 // 3 :]
    assert np.abs(far - 127.5).mean() < 2
    assert np.abs(product[within(HEAD_BOX, product)] - 127.5).mean() > 20
    assert share((np.abs(product - 127.5) ** 2).sum(2), DOG_BOX) > 0.8


def test_of_the_three_pictures_no_two_are_alike(demo):
    cam, guided, product = (opened(demo[1] / name) for name in NAMES)
    for first, second in ((cam, guided), (guided, product), (cam, product)):
        assert np.abs(first - second).mean() > 1


# All methods and two classes at once, on a sheet, measured and as numbers: as the README says

SEVEN = [*METHODS[:1], "scorecam", *METHODS[1:]]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The README's command in a process of its own, its record, and the folder of its files."""
    output = tmp_path_factory.mktemp("compared") / "out"
    words = ["--method", "all", "--top-k", "2", "--sheet", "--metrics", "--save-arrays", "pics/dog.jpg", "--output"]
    process = subprocess.run(
        [sys.executable, str(PROGRAM), "--ckpt", "tests/data/dogs_mobilenet_v2.pth", *words, str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return process, json.loads((output / "results.jsonl").read_text(encoding="utf-8")), output


def test_comparing_writes_every_picture_of_every_class_a_sheet_and_the_arrays(compared):
    process, record, output = compared
    labels = [program_file.file_labels([each["name"]])[0] for each in record["classes"]]
    pictures = [f"gb_dog_{label}.jpg" for label in labels]
    pictures += [f"{m}_{o}_dog_{label}.jpg" for m in SEVEN for o in ("cam", "cam_gb") for label in labels]
    assert files_in(output) == sorted([*pictures, "dog_sheet.jpg", "dog.npz"])
    assert sorted(record["files"]) == sorted(str(output / name) for name in files_in(output))
    assert process.stderr == NOTE
    sizes = {opened(output / name).shape for name in pictures}
    assert len(sizes) == 1


def test_comparing_prints_one_line_with_both_classes_and_every_metric(compared):
    process, record, _ = compared
    assert process.stdout.count("\n") == 1
    first, second = record["classes"]
    beginning = f"pics{os.sep}dog.jpg: {first['name']} {first['probability']:.3f}, {second['name']}"
    assert process.stdout.startswith(beginning)
    for method in SEVEN:
        for each in record["classes"]:
            assert f"; {method} for {each['name']}: average_drop " in process.stdout


def test_the_record_of_a_comparison_has_the_metrics_of_each_map(compared):
    _, record, _ = compared
    assert record["class"] == record["classes"][0] == record["top5"][0]
    assert record["classes"][1] == record["top5"][1]
    assert record["method"] == ",".join(SEVEN)
    expected = [(each["name"], method) for each in record["classes"] for method in SEVEN]
    assert [(found["class"], found["method"]) for found in record["metrics"]] == expected
    for found in record["metrics"]:
        assert set(found) == {"class", "method", *program_file.METRICS}
        assert 0 <= found["average_drop"] <= 1
        assert found["increase"] in (0, 1)
    husky = {found["method"]: found for found in record["metrics"][:7]}
    assert all(found["insertion"] > found["deletion"] + 0.1 for found in husky.values())  # the heat finds the dog
    assert all(found["road"] > 0.05 for found in husky.values())


def test_the_sheet_shows_the_pictures_that_were_written(compared):
    _, record, output = compared
    sheet = opened(output / "dog_sheet.jpg")
    labels = [program_file.file_labels([each["name"]])[0] for each in record["classes"]]
    rows = [(method, label) for label in labels for method in SEVEN]
    height = (sheet.shape[0] - 40 - 8) // len(rows) - 40
    assert abs(height - 320) <= 1
    for number, (method, label) in enumerate(rows):
        top = 40 + number * (40 + height) + 40
        names = [f"{method}_cam_dog_{label}.jpg", f"gb_dog_{label}.jpg", f"{method}_cam_gb_dog_{label}.jpg"]
        for column, name in enumerate(names, 1):
            left = 8 + column * (sheet.shape[1] - 8) // 4
            with Image.open(output / name) as picture:
                expected = np.asarray(picture.resize((320, height), Image.Resampling.BOX)).astype(int)
            assert np.abs(sheet[top : top + height, left : left + 320] - expected).mean() < 6, (number, name)


def test_the_arrays_are_what_the_explainer_gives(compared):
    _, record, output = compared
    with np.load(output / "dog.npz", allow_pickle=False) as arrays:
        assert list(arrays["methods"]) == SEVEN
        assert list(arrays["classes"]) == [each["index"] for each in record["classes"]]
        assert [str(arrays["class_names"][i]) for i in arrays["classes"]] == [e["name"] for e in record["classes"]]
        assert list(arrays["target_layers"]) == ["features"]
        np.testing.assert_allclose(arrays["box"], (LEFT, TOP, LEFT + SIDE, TOP + SIDE), atol=2)
        classifier = program_file.load_classifier(ckpt=CKPT, device="cpu")
        inputs = classifier.preprocess(program_file.read_photo(DOG))[None]
        found = program_file.Explainer(classifier.model, ["gradcam", "eigencam"])(inputs, top=2)
        np.testing.assert_allclose(arrays["logits"], found.logits[0], atol=1e-4)
        np.testing.assert_allclose(arrays["cams"][0], found.cams["gradcam"][0], atol=1e-4)
        np.testing.assert_allclose(arrays["cams"][5], found.cams["eigencam"][0], atol=1e-4)
        np.testing.assert_allclose(arrays["guided"], found.guided[0], atol=1e-4 * np.abs(found.guided).max())


def test_named_classes_stand_in_the_names_and_each_has_its_own_heat(main, tmp_path):
    status, stdout, stderr = main(
        "--target-class", "pug", "--target-class", "13", "--target-class", "PUG", "--outputs", "cam", DOG
    )
    assert (status, stderr) == (0, "")
    assert stdout.startswith(f"{DOG}: pug 0.")
    names = ["gradcam_cam_dog_Siberian-husky.jpg", "gradcam_cam_dog_pug.jpg"]
    assert files_in(tmp_path / "out") == names
    first, second = (opened(tmp_path / "out" / name) for name in names)
    assert np.abs(first - second).mean() > 5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), MemoryError()], ids=repr)
def test_a_network_for_which_the_memory_does_not_suffice_is_one_line(main, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch.nn.Module, "to", full)
    assert "more memory than there is" in refused(main(DOG))


def test_more_of_the_likeliest_classes_than_there_are_is_all_of_them(main, tmp_path):
    status, _, stderr = main("--top-k", 99, "--outputs", "cam", "--method", "eigencam", DOG)
    assert status == 0
    assert stderr.startswith("note: --top-k 99, but the network has 19 classes")
    assert len(files_in(tmp_path / "out")) == 19


def test_several_methods_and_layers(main, tmp_path):
    layers = ["--target-layer", "features.13", "--target-layer", "features"]
    assert main("--method", "layercam,refinecam", *layers, "--outputs", "cam,gb", DOG)[0] == 0
    assert files_in(tmp_path / "out") == ["gb_dog.jpg", "layercam_cam_dog.jpg", "refinecam_cam_dog.jpg"]
    record = json.loads((tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8"))
    assert record["target_layer"] == "features.13,features"


@pytest.mark.parametrize("method", program_file.MORE_METHODS)
def test_the_heat_of_every_other_method_is_a_picture(main, tmp_path, method):
    status, _, stderr = main("--method", method, "--outputs", "cam", "--input-size", 96, DOG)
    assert (status, stderr) == (0, "")
    assert opened(tmp_path / "out" / f"{method}_cam_dog.jpg").std() > 20


def test_smoothing_gives_other_pictures(main, tmp_path):
    for name, options in {"plain": [], "aug": ["--aug-smooth"], "eigen": ["--eigen-smooth"]}.items():
        assert main(*options, "--outputs", "cam", DOG, output=tmp_path / name)[0] == 0
    plain, aug, eigen = (opened(tmp_path / name / NAMES[0]) for name in ("plain", "aug", "eigen"))
    assert np.abs(plain - aug).mean() > 1
    assert np.abs(plain - eigen).mean() > 1


@pytest.mark.parametrize(("ending", "kind"), [("png", "PNG"), ("webp", "WEBP")])
def test_another_format_and_other_colours(main, tmp_path, demo, ending, kind):
    assert main("--format", ending, "--alpha", 0, "--outputs", "cam", "--sheet", DOG)[0] == 0
    assert files_in(tmp_path / "out") == [f"dog_sheet.{ending}", f"gradcam_cam_dog.{ending}"]
    with Image.open(tmp_path / "out" / f"gradcam_cam_dog.{ending}") as picture, Image.open(DOG) as photo:
        assert picture.format == kind
        seen = photo.resize(picture.size, box=(LEFT, TOP, LEFT + SIDE, TOP + SIDE))
        assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - np.asarray(seen)).mean() < 12


def test_pictures_in_any_format_are_not_taken_for_photos(main, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(DOG, folder / "dog.jpg")
    for ending in ("png", "webp", "jpg"):
        main("--format", ending, "--outputs", "cam", "--sheet", folder, output=folder)
    status, stdout, _ = main("--outputs", "cam", folder)
    assert (status, stdout.count("\n")) == (0, 1)


def test_the_metrics_of_one_class_are_named_by_the_method_alone(main):
    status, stdout, _ = main("--metrics", "--outputs", "cam", "--input-size", 96, DOG)
    assert status == 0
    assert "; gradcam: average_drop " in stdout


NETWORK = r"""
import helper
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
        self.out = nn.Linear(16, classes)

    def forward(self, x):
        return self.out(self.features(x).mean((2, 3)))

def build(num_classes=4):
    return Net(num_classes)

def fixed():
    return Net(helper.CLASSES)

def wrong():
    return 7

def needy(num_classes):
    return Net(num_classes)

def anything(**options):
    return Net(options["num_classes"])

def broken():
    raise RuntimeError("no such file\nsecond line")

def softmax():
    return nn.Sequential(Net(3), nn.Softmax(1))

def sigmoid():
    return nn.Sequential(Net(1), nn.Sigmoid())

class Answering(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.net, self.how = Net(3), how
    def forward(self, x):
        return self.how(self.net.features(x), self.net(x))

def features_first():
    return Answering(lambda features, logits: (features, logits))

def features_only():
    return Answering(lambda features, logits: features)

def grey():
    net = Net(3)
    net.features[0] = nn.Conv2d(1, 8, 5, 4)
    return net

def named():
    return Answering(lambda features, logits: {"pred": logits})
"""


@pytest.fixture
def own(tmp_path):
    """A file with a network of one's own, in a folder with a module that it imports."""
    (tmp_path / "helper.py").write_text("CLASSES = 3\n", encoding="utf-8")
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    return tmp_path / "net.py"


def own_checkpoint(path, count, **entries):
    namespace = {}
    exec(NETWORK.replace("import helper", ""), namespace)
    torch.manual_seed(0)
    torch.save({"state_dict": namespace["Net"](count).state_dict(), **entries}, path)
    return path


def test_a_network_of_ones_own_is_explained(main, own, tmp_path):
    ckpt = own_checkpoint(tmp_path / "own.pth", 2, classes=["cat", "dog"], input_size=96)
    status, stdout, stderr = main("--arch", f"{own}:build", "--num-classes", 2, DOG, ckpt=ckpt)
    assert (status, stderr) == (0, "")
    assert re.match(rf"{re.escape(str(DOG))}: (cat|dog) 0\.\d+ -> ", stdout)
    record = json.loads((tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8"))
    assert record["target_layer"] == "features"
    assert files_in(tmp_path / "out") == sorted(NAMES)


def test_a_network_of_ones_own_may_have_a_fixed_number_of_classes_and_its_own_weights(own):
    classifier = program_file.load_classifier(f"{own}:fixed", device="cpu")
    assert classifier.class_names == ("class 0", "class 1", "class 2")
    assert (classifier.preset.crop_size, classifier.model.training) == ([224], False)


@pytest.mark.parametrize("function", ["build", "needy", "anything"])
def test_the_number_of_classes_goes_to_the_function_that_takes_it(own, function):
    classifier = program_file.load_classifier(f"{own}:{function}", num_classes=7, device="cpu")
    assert len(classifier.class_names) == 7


def test_a_function_that_needs_the_number_of_classes_says_so(own):
    with pytest.raises(program_file.CallError, match="is it --num-classes that it needs"):
        program_file.load_classifier(f"{own}:needy", device="cpu")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong", "returned a int, not a torch.nn.Module"),
        ("broken", "RuntimeError: no such file"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_function_that_gives_no_network_is_one_line(main, own, function, said):
    assert said in refused(main("--arch", f"{own}:{function}", DOG))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("softmax", "ends in a softmax"),
        ("sigmoid", "ends in a sigmoid"),
        ("features_only", "a tensor of 1 x 16 x 27 x 27; let it return the logits"),
        ("grey", "let it begin with x.mean(1, keepdim=True)"),
        ("named", "a dict of pred; call its logits 'logits'"),
        ("biuld", "has no function 'biuld'; did you mean build"),
    ],
)
def test_a_network_that_does_not_answer_with_logits_is_one_line(own, function, said):
    with pytest.raises(program_file.CallError, match=re.escape(said)):
        program_file.load_classifier(f"{own}:{function}", device="cpu")


def test_features_that_come_before_the_logits_are_no_answer(own):
    assert len(program_file.load_classifier(f"{own}:features_first", device="cpu").class_names) == 3


def test_a_training_script_does_not_get_the_programs_options(own, monkeypatch, capsys):
    text = NETWORK + "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr')\n"
    own.write_text(text + "parser.parse_args()\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["cnn_visualizations.py", "--arch", "net.py:fixed", "33.jpg"])
    assert len(program_file.load_classifier(f"{own}:fixed", device="cpu").class_names) == 3
    assert sys.argv[1:] == ["--arch", "net.py:fixed", "33.jpg"]
    for ending in ("raise SystemExit('trained')\n", "parser.add_argument('data')\nparser.parse_args()\n"):
        own.write_text(text + ending, encoding="utf-8")
        with pytest.raises(program_file.CallError, match=r"SystemExit: .*; put what .* if __name__ == '__main__':$"):
            program_file.load_classifier(f"{own}:fixed", device="cpu")
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_does_not_fit_ones_own_network_is_one_line(main, own, tmp_path):
    assert "of another shape (out.weight" in refused(
        main("--arch", f"{own}:fixed", DOG, ckpt=own_checkpoint(tmp_path / "own.pth", 5))
    )
    assert "missing (features.0.weight" in refused(main("--arch", f"{own}:build", DOG))


def test_a_network_of_ones_own_with_another_number_of_classes_is_one_line(main, own, tmp_path):
    error = refused(
        main("--arch", f"{own}:fixed", "--num-classes", 2, DOG, ckpt=own_checkpoint(tmp_path / "own.pth", 3))
    )
    assert "--num-classes 2" in error
    assert "3 classes" in error


# Every method


@pytest.fixture(scope="module")
def explained():
    """The demo photo explained by all methods but scorecam, from Python."""
    classifier = program_file.load_classifier(ckpt=CKPT, device="cpu")
    inputs = classifier.preprocess(program_file.read_photo(DOG))[None]
    return classifier, inputs, program_file.Explainer(classifier.model, methods=METHODS)(inputs)


def test_the_answer_is_that_of_the_plain_model(explained):
    classifier, inputs, explanation = explained
    with torch.no_grad():
        logits = classifier.model(inputs)
    np.testing.assert_allclose(explanation.logits, logits.numpy(), atol=1e-4)
    assert classifier.class_names[int(explanation.targets[0])] == "Siberian husky"
    assert float(logits.softmax(1).max()) == pytest.approx(0.487, abs=5e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_heat_of_each_method_lies_on_the_dog(explained, method):
    cam = explained[2].cams[method]
    assert (cam.shape, cam.dtype) == ((1, 225, 225), np.float32)
    assert cam.min() >= 0
    assert cam.max() == pytest.approx(1, abs=1e-3)
    if method.startswith("eigen"):  # of the strongest feature, not of the class; one cell of the map is 70 pixels
        assert peak_is_within(cam[0], (DOG_BOX[0] - 70, DOG_BOX[1] - 70, DOG_BOX[2] + 70, DOG_BOX[3]))
    else:
        assert peak_is_within(cam[0], HEAD_BOX)
    assert share(cam[0], DOG_BOX) > 0.35  # 19 % of the picture


def test_the_heat_of_scorecam_lies_on_the_dog(explained):
    classifier, inputs, _ = explained  # a layer of 160 channels: an eighth of the last one's passes
    cam = program_file.Explainer(classifier.model, ["scorecam"], ["features.16"])(inputs).cams["scorecam"][0]
    assert peak_is_within(cam, DOG_BOX)
    assert share(cam, DOG_BOX) > 0.4


def test_the_guided_gradients_lie_on_the_dog(explained):
    energy = (explained[2].guided[0] ** 2).sum(0)
    assert energy.max() > 0
    assert share(energy, DOG_BOX) > 0.75
    assert share(energy, HEAD_BOX) > 0.3


@pytest.mark.parametrize("method", ["gradcam++", "eigencam"])
def test_the_method_stands_in_the_names_of_the_files(main, tmp_path, method):
    status, stdout, _ = main("--method", method, DOG)
    assert status == 0
    assert files_in(tmp_path / "out") == sorted([f"{method}_cam_dog.jpg", "gb_dog.jpg", f"{method}_cam_gb_dog.jpg"])
    assert all(name in stdout for name in files_in(tmp_path / "out"))


def test_a_run_gives_the_same_files_again(main, tmp_path, demo):
    main(DOG)
    main(DOG, output=tmp_path / "again")
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert np.abs(opened(tmp_path / "out" / name) - opened(demo[1] / name)).max() <= 2


# Several photos, some of them broken


@pytest.fixture
def album(tmp_path):
    """Photos by name: good ones between broken ones."""
    folder = tmp_path / "相册 2.0"
    folder.mkdir()
    whole = DOG.read_bytes()
    contents = {
        "1 dog.jpg": whole,
        "2 text.jpg": b"Dear diary\n",
        "3 half.jpg": whole[: len(whole) // 2],
        "4 狗.jpg": whole,
        "5 empty.jpg": b"",
        "6 pixel.png": None,
        "7 odd.tif": odd_tiff(folder),
        "8 v1.2 dog.jpg": whole,
    }
    Image.new("RGB", (1, 1)).save(folder / "6 pixel.png")
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return [folder / name for name in contents] + [folder / "9 missing.jpg"]


def odd_tiff(folder):
    """A TIFF with 86 samples a pixel, of which Pillow logs a complaint of its own."""
    path = folder / "odd.tif"
    Image.new("RGB", (20, 12)).save(path)
    content = path.read_bytes()
    path.unlink()
    entry = struct.pack("<HHIHH", 277, 3, 1, 3, 0)
    assert content.count(entry) == 1
    return content.replace(entry, struct.pack("<HHIHH", 277, 3, 1, 86, 0))


def check_album(status, stdout, stderr, album, output):
    assert status == 1
    good = [photo for photo in album if photo.name[0] in "148"]
    bad = [photo for photo in album if photo not in good]
    assert [line.partition(": ")[0] for line in stdout.splitlines()] == [str(photo) for photo in good]
    assert all("Siberian husky 0.487" in line for line in stdout.splitlines())
    *errors, summary = [line for line in stderr.splitlines() if not line.startswith("note: ")]
    assert f"{len(album) - len(bad)} done, 0 skipped, {len(bad)} failed in " in summary
    assert len(errors) == len(bad), stderr
    for line, photo in zip(errors, bad, strict=True):
        assert line.startswith(f"error: {photo}"), line
    assert len(files_in(output)) == 9
    for photo in good:
        for name in (f"gradcam_cam_{photo.stem}.jpg", f"gb_{photo.stem}.jpg", f"gradcam_cam_gb_{photo.stem}.jpg"):
            assert opened(output / name).std() > 1


@pytest.mark.parametrize("size", [1, 8])
def test_broken_photos_are_one_line_each_and_the_others_are_done(main, album, tmp_path, size):
    check_album(*main("--batch-size", size, *album), album, tmp_path / "out")


def test_broken_photos_leave_no_word_of_the_libraries(program, album, tmp_path):
    process = program("--ckpt", CKPT, "--output", tmp_path / "out", *album)
    check_album(process.returncode, process.stdout, process.stderr, album, tmp_path / "out")
    assert process.stderr.startswith(NOTE)


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_run(main, album, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    status, _, stderr = main("--outputs", "cam", album[3])
    assert (status, stderr) == (0, "")
    assert b"Siberian husky 0.487" in terminal.buffer.getvalue()
    assert files_in(tmp_path / "out") == ["gradcam_cam_4 狗.jpg"]


def test_a_photo_gets_alone_what_it_gets_in_a_batch(main, tmp_path):
    bright = tmp_path / "bright.png"
    with Image.open(DOG) as photo:
        photo.point(lambda value: min(255, value * 3 // 2)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(bright)
    main(DOG, bright)
    main("--batch-size", 1, DOG, bright, output=tmp_path / "alone")
    assert len(files_in(tmp_path / "alone")) == 6
    for name in files_in(tmp_path / "alone"):
        assert np.abs(opened(tmp_path / "alone" / name) - opened(tmp_path / "out" / name)).max() <= 3


def test_two_photos_of_one_name_both_keep_their_pictures(main, tmp_path):
    (tmp_path / "x").mkdir()
    with Image.open(DOG) as photo:
        photo.resize((300, 300)).save(tmp_path / "x" / "dog.png")
    status, stdout, _ = main("--outputs", "cam", DOG, tmp_path / "x" / "dog.png")
    assert status == 0
    assert files_in(tmp_path / "out") == ["gradcam_cam_dog.jpg", "gradcam_cam_dog_2.jpg"]
    first, second = stdout.splitlines()
    assert first.endswith("gradcam_cam_dog.jpg")
    assert second.endswith("gradcam_cam_dog_2.jpg")
    assert opened(tmp_path / "out" / "gradcam_cam_dog_2.jpg").shape[0] < 300


@pytest.mark.parametrize("classes", [[], ["--top-k", "2"]])
def test_two_photos_of_one_name_both_keep_their_pictures_in_two_runs_too(main, tmp_path, classes):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(DOG, tmp_path / folder / "dog.jpg")
    for folder, count in (("a", 1), ("b", 2), ("a", 2), ("b", 2)):
        status, stdout, _ = main("--outputs", "gb", *classes, tmp_path / folder / "dog.jpg")
        assert status == 0
        assert ("dog_2" in stdout) == (folder == "b")
        assert len(files_in(tmp_path / "out")) == count * (2 if classes else 1)


def test_the_photos_own_folder_is_safe_for_the_pictures(main, tmp_path, monkeypatch):
    whole = DOG.read_bytes()
    for name in ("dog.jpg", "gb_dog.jpg"):
        (tmp_path / name).write_bytes(whole)
    monkeypatch.chdir(tmp_path)
    assert main("dog.jpg", "gb_dog.jpg", output=".")[0] == 0
    assert (tmp_path / "dog.jpg").read_bytes() == (tmp_path / "gb_dog.jpg").read_bytes() == whole
    assert len(files_in(tmp_path)) == 2 + 6


# The class


@pytest.mark.parametrize(("wanted", "name"), [("pug", "pug"), ("PUG", "pug"), ("German shepherd", "German shepherd")])
def test_the_target_class_by_name(main, explained, wanted, name):
    classifier, inputs, _ = explained
    with torch.no_grad():
        chance = float(classifier.model(inputs).softmax(1)[0, classifier.class_names.index(name)])
    status, stdout, _ = main("--target-class", wanted, "--outputs", "cam", DOG)
    assert status == 0
    assert f": {name} {chance:.3f} -> " in stdout


def test_the_target_class_by_index(main, explained):
    names = torch.load(CKPT, weights_only=True)["classes"]
    status, stdout, _ = main("--target-class", 3, "--outputs", "cam", DOG)
    assert status == 0
    assert f": {names[3]} 0." in stdout


def test_another_class_has_other_pictures(main, tmp_path):
    main(DOG)
    main("--target-class", "German shepherd", DOG, output=tmp_path / "shepherd")
    for name in NAMES[1:]:
        assert np.abs(opened(tmp_path / "out" / name) - opened(tmp_path / "shepherd" / name)).mean() > 0.5


@pytest.mark.parametrize("index", ["19", "-1", "99999999999999999999"])
def test_a_class_index_out_of_range_is_a_wrong_call(main, index):
    error = refused(main("--target-class", index, DOG))
    assert index in error
    assert "19 classes" in error


def test_a_class_that_the_network_does_not_know_is_a_wrong_call_with_the_closest_name(main):
    error = refused(main("--target-class", "Siberan husky", DOG))
    assert "'Siberan husky'" in error
    assert "Siberian husky" in error


def test_class_names_from_a_file_win(main, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"品种 {number}\n" for number in range(19)), encoding="utf-8")
    index = list(torch.load(CKPT, weights_only=True)["classes"]).index("Siberian husky")
    assert f": 品种 {index} 0.487 -> " in main("--class-names", names, "--outputs", "cam", DOG)[1]
    assert main("--class-names", names, "--target-class", "品种 4", "--outputs", "cam", DOG)[0] == 0


def test_too_few_class_names_are_a_wrong_call_with_both_numbers(main, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n", encoding="utf-8")
    error = refused(main("--class-names", names, DOG))
    assert "2 class names" in error
    assert "19 classes" in error


def test_a_wrong_number_of_classes_is_a_wrong_call_with_both_numbers(main):
    error = refused(main("--num-classes", 5, DOG))
    assert "5" in error
    assert "19" in error


def test_the_right_number_of_classes_changes_nothing(main):
    assert "Siberian husky 0.487" in main("--num-classes", 19, "--arch", "mobilenet_v2", "--outputs", "cam", DOG)[1]


# The layer


@pytest.mark.parametrize(("wrong", "near"), [("features.99", "features.9"), ("18.1", "features.18.1"), ("layer4", "")])
def test_a_layer_that_is_not_there_is_a_wrong_call_with_the_closest_names(main, wrong, near):
    error = refused(main("--target-layer", wrong, DOG))
    assert f"'{wrong}'" in error
    assert near in error
    assert "features" in error


@pytest.mark.parametrize("layer", ["classifier.1", "classifier"])
def test_a_layer_without_a_spatial_map_is_a_wrong_call(main, layer):
    assert f"'{layer}'" in refused(main("--target-layer", layer, DOG))


def test_an_earlier_layer_gives_another_map(main, tmp_path):
    for layer, output in (("features.18", "last"), ("features.10", "earlier")):
        assert main("--target-layer", layer, "--outputs", "cam", DOG, output=tmp_path / output)[0] == 0
    last, earlier = (opened(tmp_path / output / NAMES[0]) for output in ("last", "earlier"))
    assert np.abs(last - earlier).mean() > 3


# What is written, and how large


def test_only_the_heatmap_where_only_that_is_asked_for(main, tmp_path, demo):
    status, stdout, _ = main("--outputs", "cam", DOG)
    assert status == 0
    assert files_in(tmp_path / "out") == ["gradcam_cam_dog.jpg"]
    assert stdout.endswith("gradcam_cam_dog.jpg\n")
    assert "gb" not in stdout.partition("->")[2].rpartition(os.sep)[2]
    assert np.abs(opened(tmp_path / "out" / NAMES[0]) - opened(demo[1] / NAMES[0])).max() <= 2


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--output-size", 300], (300, 300)),
        (["--output-size", 1200], (1200, 1200)),
        (["--resize", "squash"], (576, 768)),
        (["--resize", "squash", "--output-size", 200], (150, 200)),
    ],
)
def test_the_pictures_are_as_large_as_asked_for(main, tmp_path, options, size):
    assert main(*options, DOG)[0] == 0
    for name in NAMES:
        height, width, _ = opened(tmp_path / "out" / name).shape
        assert abs(height - size[0]) <= 2
        assert abs(width - size[1]) <= 2
        assert max(height, width) == max(size)


def test_the_network_may_see_another_size(main, tmp_path):
    status, stdout, stderr = main("--input-size", 161, DOG)
    assert (status, stderr) == (0, "")
    assert "Siberian husky" in stdout
    assert "0.487" not in stdout


@pytest.mark.parametrize("side", [8, 16, 33])
def test_an_input_too_small_for_the_network_is_an_error_line_or_a_picture(main, tmp_path, side):
    status, stdout, stderr = main("--input-size", side, DOG)
    assert "Traceback" not in stderr
    if status == 0:
        assert len(files_in(tmp_path / "out")) == 3
    else:
        assert stdout == ""
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        assert f"{side} x {side}" in stderr


# What cannot be written, read or found


def test_an_output_folder_that_cannot_be_written_is_a_wrong_call(main, tmp_path):
    (tmp_path / "taken").write_bytes(b"mine")
    assert "taken" in refused(main(DOG, output=tmp_path / "taken" / "out"))


def test_an_output_folder_that_vanishes_is_one_line_for_each_photo(main, monkeypatch, tmp_path):
    open_photo = program_file.open_photo

    def vanishing(path):
        shutil.rmtree(tmp_path / "out")
        return open_photo(path)

    monkeypatch.setattr(program_file, "open_photo", vanishing)
    status, stdout, stderr = main("--outputs", "cam", DOG)
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"error: {DOG}")
    assert stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="no limit on the size of files there")
def test_a_full_disk_is_one_line_and_leaves_only_whole_pictures(program, tmp_path):
    import resource

    def limit():  # enough for guided backpropagation (118 KB), not for the heatmap (144 KB)
        resource.setrlimit(resource.RLIMIT_FSIZE, (130_000, 130_000))

    process = program("--ckpt", CKPT, "--outputs", "gb,cam", "--output", tmp_path / "out", DOG, preexec_fn=limit)
    assert process.returncode == 1, process.stderr
    assert process.stdout == ""
    errors = process.stderr.removeprefix(NOTE)
    assert errors.startswith("error: ")
    assert "dog.jpg" in errors
    assert errors.count("\n") == 1
    assert set(files_in(tmp_path / "out")) <= set(NAMES)
    for path in (tmp_path / "out").iterdir():
        assert opened(path).std() > 0


def full_disk():
    return open("/dev/full", "w", encoding="utf-8")


def closed_pipe():
    """What `| head` leaves behind."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a device that is always full")
@pytest.mark.parametrize("target", [full_disk, closed_pipe])
def test_a_standard_output_that_cannot_be_written_ends_without_a_traceback(main, monkeypatch, target):
    stream = target()
    monkeypatch.setattr(sys, "stdout", stream)
    try:
        status, _, stderr = main("--outputs", "cam", DOG)
    finally:
        with contextlib.suppress(OSError):
            stream.close()
    assert status != 0
    assert stderr.count("\n") <= 1


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="that many GPUs are rare")
@pytest.mark.parametrize("device", ["cuda:7", "xpu:7"])
def test_a_device_that_is_not_there_is_a_wrong_call(main, monkeypatch, device):
    monkeypatch.setattr(program_file, "has_gpu_driver", lambda: True)  # or the command line would answer
    error = refused(main("--device", device, DOG))
    assert device in error
    assert "cpu" in error


def test_a_checkpoint_that_is_none_is_a_wrong_call(main):
    assert "dog.jpg" in refused(main(DOG, ckpt=DOG))


def test_a_network_whose_answer_is_not_a_number_is_one_line_for_each_photo(main, tmp_path):
    content = torch.load(CKPT, weights_only=True)
    content["state_dict"]["classifier.1.weight"][:] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    status, stdout, stderr = main(DOG, ckpt=tmp_path / "nan.pth")
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"error: {DOG}")
    assert "NaN" in stderr
    assert stderr.count("\n") == 1


def test_control_c_ends_with_130_and_no_traceback(main, monkeypatch, tmp_path):
    def pressed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(program_file, "open_photo", pressed)
    status, stdout, stderr = main(DOG)
    assert (status, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert files_in(tmp_path / "out") == []
