"""Room 1, the command line: the options, their defaults, and every error that must not wait for torch."""

import os
import re
import sys
from pathlib import Path

import pytest
import torchvision
from conftest import CKPT, DOG
from torchvision.models import list_models

import cnn_visualizations as program_file

OPTIONS = {
    "--arch", "--ckpt", "--num-classes", "--class-names", "--device", "--input-size", "--resize", "--batch-size",
    "--method", "--target-layer", "--target-class", "--output", "--outputs", "--output-size", "--skip-existing",
    "--top-k", "--aug-smooth", "--eigen-smooth", "--metrics", "--sheet", "--save-arrays", "--colormap", "--alpha",
    "--format", "--quality",
}  # fmt: skip
METHODS = ["gradcam", "scorecam", "gradcam++", "ablationcam", "xgradcam", "eigencam", "eigengradcam"]
MORE_METHODS = [
    "hirescam", "layercam", "gradcamelementwise", "fullgrad", "fem", "kpcacam", "shapleycam", "finercam", "segeigencam",
    "randomcam", "refinecam",
]  # fmt: skip


@pytest.fixture
def without_libraries(program, tmp_path):
    """Runs the program where importing torch, numpy, OpenCV or Pillow ends in a traceback."""
    return trapped(program, tmp_path, ("torch", "numpy", "cv2", "PIL"))


@pytest.fixture
def without_torch(program, tmp_path):
    """Runs the program where importing torch or OpenCV ends in a traceback."""
    return trapped(program, tmp_path, ("torch", "cv2"))


def trapped(program, tmp_path, libraries):
    traps = tmp_path / "traps"
    traps.mkdir()
    for library in libraries:
        (traps / f"{library}.py").write_text("raise RuntimeError('a heavy import')\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(traps), "PYTHONUTF8": "1", "COLUMNS": "400"}

    def run(*args, **kwargs):
        return program(*args, env=environment, **kwargs)

    return run


@pytest.fixture
def parsed(tmp_path):
    """Parses these arguments behind the demo photo; the pictures go to a folder of the test."""

    def parse(*args):
        return program_file.parse_args(["--output", str(tmp_path / "out"), str(DOG), *map(str, args)])

    return parse


@pytest.fixture
def refused(parsed, capsys):
    """The error line for these arguments, which must end the program with status 2."""

    def refuse(*args):
        with pytest.raises(SystemExit) as stop:
            parsed(*args)
        return one_error(stop.value.code, *capsys.readouterr())

    return refuse


def photos(args):
    return [Path(path) for path, _ in args.photos]


def one_error(status, stdout, stderr, expected=2):
    """The only line on stderr, which must be an error."""
    assert status == expected, stderr
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    return stderr


def finished(process, expected=2):
    return one_error(process.returncode, process.stdout, process.stderr, expected)


def test_the_trap_catches_a_heavy_import(without_libraries, tmp_path):
    process = without_libraries(DOG, "--ckpt", CKPT, "--output", tmp_path / "out")
    assert "a heavy import" in process.stderr
    assert process.returncode == 1


def test_help_needs_no_torch_and_ends_with_three_examples(without_libraries):
    process = without_libraries("--help")
    assert (process.returncode, process.stderr) == (0, "")
    examples = process.stdout.partition("examples:")[2]
    assert len(re.findall(r"^ +python cnn_visualizations\.py .*(?:\\\n.*)*\.jpg$", examples, re.MULTILINE)) == 3
    assert process.stdout.rstrip().endswith(".jpg")


def test_the_examples_in_help_are_calls_that_the_program_accepts(without_libraries, tmp_path, monkeypatch):
    examples = without_libraries("--help").stdout.partition("examples:")[2].replace("\\\n", " ")
    calls = re.findall(r"^ +python cnn_visualizations\.py (.*)$", examples, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for call in calls:
        words = call.split()
        for word in words:
            if "." in word:
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).write_bytes(b"cat\ndog" if word.endswith(".txt") else DOG.read_bytes())
        assert program_file.parse_args(words).photos
    assert len(calls) == 3


def test_every_option_has_a_help_sentence(without_libraries):
    text = without_libraries("--help").stdout.partition("positional arguments:")[2].partition("examples:")[0]
    entries = re.findall(r"^  (IMAGE|--[\w-]+)(?: [A-Z]+| \{.*?\})?\s{2,}(\S.*(?:\n {10,}\S.*)*)", text, re.MULTILINE)
    sentences = dict(entries)
    assert set(sentences) == {"IMAGE", *OPTIONS}
    for option, sentence in sentences.items():
        assert sentence.endswith((".", ")")), f"{option}: {sentence}"
        assert len(sentence.split()) >= 5, f"{option}: {sentence}"
    assert all(method in sentences["--method"] for method in METHODS)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--metod", "gradcam"], "--method"),
        (["--method", "gradcm"], "gradcam"),
        (["--arch", "resnet5"], "resnet50"),
        (["--ckpt", "nowhere.pth"], "nowhere.pth"),
        (["--resize", "stretch"], "squash"),
        (["--num-classes", "many"], "many"),
        (["--output", str(DOG / "out")], "dog.jpg"),
    ],
)
def test_a_wrong_call_is_one_line_and_needs_no_torch(without_libraries, args, said):
    assert said in finished(without_libraries(DOG, *args))


def test_class_names_that_cannot_be_read_are_told_at_once(without_libraries, tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    assert "names.txt is not a list of class names" in finished(
        without_libraries("--class-names", tmp_path / "names.txt", DOG)
    )


def test_class_names_and_their_number_must_agree(without_libraries, tmp_path):
    (tmp_path / "names.json").write_text('["cat", "dog"]')
    error = finished(without_libraries("--class-names", tmp_path / "names.json", "--num-classes", 3, DOG))
    assert "3" in error and "2 names" in error


def test_no_photo_is_a_wrong_call(without_libraries):
    assert "IMAGE" in finished(without_libraries("--ckpt", CKPT))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "not there"), (b"", "empty"), (b"Dear diary, today\n", "not a picture")]
)
def test_a_photo_that_cannot_be_one_is_one_line_and_needs_no_torch(without_libraries, tmp_path, content, said):
    photo = tmp_path / "holiday.jpg"
    if content is not None:
        photo.write_bytes(content)
    error = finished(without_libraries(photo, "--ckpt", CKPT, "--output", tmp_path / "out"), expected=1)
    assert said in error
    assert str(photo) in error


def test_a_folder_without_photos_is_a_wrong_call(without_libraries, tmp_path):
    (tmp_path / "notes.txt").write_text("no photo")
    assert f"no photos in {tmp_path}" in finished(without_libraries(tmp_path, "--output", tmp_path / "out"))


def test_each_of_several_hopeless_photos_gets_its_line(without_libraries, tmp_path):
    photos = [tmp_path / f"{number}.jpg" for number in range(3)]
    process = without_libraries(*photos, "--output", tmp_path / "out")
    assert process.returncode == 1
    assert [line.partition(" is ")[0] for line in process.stderr.splitlines()] == [f"error: {p}" for p in photos]


def test_one_good_photo_among_hopeless_ones_is_worth_starting_for(parsed, tmp_path):
    missing = tmp_path / "missing.jpg"
    assert photos(parsed(missing)) == [DOG, missing]


def test_only_photos_are_required(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = program_file.parse_args([str(DOG)])
    assert photos(args) == [DOG]
    assert (args.methods, args.outputs, str(args.output)) == (["gradcam"], ["cam", "gb", "cam_gb"], "out")
    assert (args.resize, args.batch_size) == ("crop", 8)
    left_open = (
        "arch",
        "ckpt",
        "num_classes",
        "class_names",
        "device",
        "input_size",
        "target_layers",
        "target_classes",
    )
    assert [getattr(args, name) for name in left_open] == [None] * len(left_open)
    assert args.output_size is None
    assert list((tmp_path / "out").iterdir()) == []


def test_the_call_of_the_note_that_the_program_comes_from(tmp_path):
    words = ["--arch", "resnet50", "--num-classes", "2", "--target-layer", "layer4", "--method", "gradcam"]
    args = program_file.parse_args([*words, "--ckpt", str(CKPT), "--output", str(tmp_path), str(DOG)])
    assert (args.arch, args.ckpt, args.num_classes, args.target_layers) == ("resnet50", CKPT, 2, ["layer4"])
    assert (args.methods, args.output, photos(args)) == (["gradcam"], tmp_path, [DOG])


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_known(parsed, method):
    assert parsed("--method", method).methods == [method]


@pytest.mark.parametrize("method", MORE_METHODS)
def test_every_cam_of_the_grad_cam_package_is_known(parsed, method):
    assert parsed("--method", method).methods == [method]


@pytest.mark.parametrize(
    ("text", "methods"),
    [("gradcam,layercam", ["gradcam", "layercam"]), ("all", METHODS), ("ALL", METHODS), ("fem, fem", ["fem"])],
)
def test_methods_are_a_comma_separated_list_or_all(parsed, text, methods):
    assert parsed("--method", text).methods == methods


def test_an_unknown_method_in_a_list_is_refused_with_the_closest_name(refused):
    assert "did you mean layercam" in refused("--method", "gradcam,layrcam")


def test_methods_that_are_given_like_photos_are_told_from_them(refused):
    wrong = refused("--method", "gradcam", "scorecam", "eigencam", "gradcam")
    assert "scorecam is no photo; pass --method gradcam,scorecam,eigencam\n" in wrong
    assert "gb is no photo; pass --outputs cam,gb\n" in refused("--outputs", "cam", "gb")
    assert "repeat the option: --target-class dog\n" in refused("--target-class", "cat", "dog", "33.jpg")
    assert "repeat the option: --target-layer layer4\n" in refused("--target-layer", "layer3", "layer4", "33.jpg")


def test_a_checkpoint_that_is_given_like_a_photo_is_told_from_it(refused, tmp_path):
    (tmp_path / "best.pth").write_bytes(b"weights")
    assert f"pass --ckpt {tmp_path / 'best.pth'}" in refused(tmp_path / "best.pth", "33.jpg")


def test_classes_and_layers_may_be_given_several_times(parsed):
    args = parsed(
        "--target-class", "tabby, tabby cat", "--target-class", 3, "--target-layer", "a", "--target-layer", "b"
    )
    assert (args.target_classes, args.target_layers) == (["tabby, tabby cat", "3"], ["a", "b"])


def test_the_likeliest_classes_and_named_ones_exclude_each_other(refused):
    error = refused("--top-k", 2, "--target-class", "cat")
    assert "--top-k" in error
    assert "--target-class" in error


def test_looks_are_taken(parsed):
    args = parsed("--colormap", "Turbo", "--alpha", ".25", "--format", "webp", "--quality", 40)
    assert (args.colormap, args.alpha, args.format, args.quality) == ("turbo", 0.25, "webp", 40)


def test_a_network_of_ones_own_is_a_file_and_a_function(parsed, tmp_path):
    (tmp_path / "net.py").write_text("def build(): ...", encoding="utf-8")
    assert parsed("--arch", f"{tmp_path / 'net.py'}:build").arch == f"{tmp_path / 'net.py'}:build"


@pytest.mark.parametrize("text", ["nowhere.py:build", "net.py", "net.py:", "net.py:a b"])
def test_a_network_of_ones_own_that_is_not_there_is_told(refused, tmp_path, monkeypatch, text):
    (tmp_path / "net.py").write_text("def build(): ...", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert text.partition(":")[0] in refused("--arch", text)


@pytest.mark.parametrize(
    ("text", "outputs"), [("cam", ["cam"]), ("gb,cam", ["gb", "cam"]), (" cam , cam_gb,cam", ["cam", "cam_gb"])]
)
def test_outputs_are_a_comma_separated_list(parsed, text, outputs):
    assert parsed("--outputs", text).outputs == outputs


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "mps"])
def test_devices_are_taken_by_name(parsed, monkeypatch, device):
    monkeypatch.setattr(program_file, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert parsed("--device", device).device == device


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num-classes", "0"),
        ("--num-classes", "-2"),
        ("--num-classes", "2.5"),
        ("--input-size", "0"),
        ("--input-size", "99999999"),
        ("--batch-size", "0"),
        ("--output-size", "0"),
        ("--output-size", "1e9"),
        ("--outputs", "cam,bg"),
        ("--outputs", ","),
        ("--method", ""),
        ("--device", "gpu"),
        ("--colormap", "jett"),
        ("--alpha", "1.5"),
        ("--alpha", "nan"),
        ("--format", "gif"),
        ("--quality", "0"),
        ("--top-k", "0"),
        ("--class-names", "nowhere.txt"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_that_names_it(refused, option, value):
    error = refused(option, value)
    assert option in error
    assert value.rpartition(",")[2] in error


def test_a_gpu_without_a_driver_is_told_at_once(refused, monkeypatch):
    monkeypatch.setattr(program_file, "has_gpu_driver", lambda: False)
    assert "cuda:1 is not there" in refused("--device", "cuda:1")


@pytest.mark.skipif(sys.platform == "darwin", reason="it may be there")
def test_a_macs_gpu_elsewhere_is_told_at_once(refused):
    assert "mps is not there" in refused("--device", "mps")


@pytest.mark.skipif(sys.platform == "win32" or Path("/dev/kfd").exists(), reason="needs a system without AMD's driver")
@pytest.mark.parametrize("there", [True, False])
def test_the_gpu_driver_is_looked_for_by_its_library(monkeypatch, there):
    def load(name):
        assert name == "libcuda.so.1"
        if not there:
            raise OSError("cannot open shared object file")

    monkeypatch.setattr(program_file.ctypes, "CDLL", load)
    assert program_file.has_gpu_driver() is there


def test_a_single_photo_that_cannot_be_decoded_is_told_before_torch_is_imported(without_torch, tmp_path):
    half = tmp_path / "half.jpg"
    half.write_bytes(DOG.read_bytes()[:20000])
    process = without_torch("--ckpt", CKPT, "--output", tmp_path / "out", half)
    assert "cannot be decoded" in one_error(process.returncode, process.stdout, process.stderr, expected=1)


def test_photos_of_which_none_can_be_decoded_are_told_before_torch_is_imported(without_torch, tmp_path):
    photos = [tmp_path / f"{number}.jpg" for number in range(3)]
    for photo in photos:
        photo.write_bytes(DOG.read_bytes()[:20000])
    process = without_torch("--ckpt", CKPT, "--output", tmp_path / "out", *photos)
    assert (process.returncode, process.stdout) == (1, "")
    said = [line.partition(" cannot be decoded")[0] for line in process.stderr.splitlines()]
    assert said == [f"error: {photo}" for photo in photos]


def test_an_abbreviated_option_is_refused_with_the_whole_one(refused):
    assert "--input-size" in refused("--input-siz", "64")


@pytest.mark.parametrize("option", ["--ckpt", "--class-names"])
def test_an_empty_file_or_a_folder_where_a_file_is_wanted_is_told(refused, tmp_path, option):
    empty = tmp_path / "empty"
    empty.touch()
    assert "empty" in refused(option, empty)
    assert "folder" in refused(option, tmp_path)


def test_the_output_folder_is_made_with_its_parents(parsed, tmp_path):
    parsed("--output", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    assert f"{tmp_path / 'taken'} is a file; pass a folder" in refused("--output", tmp_path / "taken")
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs file permissions")
def test_an_output_folder_without_permission_is_refused(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in refused("--output", tmp_path / "locked")


def test_photos_may_stand_before_and_after_an_option(parsed, tmp_path):
    other = tmp_path / "other.jpg"
    other.write_bytes(DOG.read_bytes())
    assert photos(parsed("--method", "eigencam", other)) == [DOG, other]


def test_a_photo_that_is_named_twice_is_explained_once(parsed):
    assert photos(parsed(DOG, DOG.parent / "." / DOG.name)) == [DOG]


def test_a_photo_whose_name_begins_with_a_dash_follows_two_dashes(tmp_path, monkeypatch):
    (tmp_path / "-1.jpg").write_bytes(DOG.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert photos(program_file.parse_args(["--", "-1.jpg"])) == [Path("-1.jpg")]


def test_architecture_names_are_those_of_the_installed_torchvision():
    assert program_file.architecture_names() == sorted(list_models(module=torchvision.models))


@pytest.mark.parametrize(
    ("wrong", "known", "said"),
    [
        ("layer4.2.conv", ["backbone.layer4.2.conv3", "fc"], "backbone.layer4.2.conv3"),
        ("zzz", ["layer4", "fc"], ""),
        ("fetures", ["features", "classifier"], "features"),
    ],
)
def test_closest_names_what_was_probably_meant(wrong, known, said):
    answer = program_file.closest(wrong, known)
    assert said in answer
    assert bool(answer) == bool(said)
