"""Section 1, Command line: the options, their errors, and what is told before torch is imported."""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import CKPT, DOG

import cnn_visualizations as program_file
from cnn_visualizations import METHODS, MORE_METHODS, find_photos, parse_args

posix = pytest.mark.skipif(os.name == "nt", reason="file descriptors as on POSIX")
OPTIONS = """--arch --ckpt --num-classes --class-names --multi-label --device --batch-size --input-size --resize --mean --std --method
    --target-layer --target-class --top-k --aug-smooth --eigen-smooth --metrics --output --outputs --output-size --sheet
    --save-arrays --colormap --alpha --fade --format --quality --skip-existing --only-wrong --no-gallery --list-layers"""
LISTS = [
    "cat\r\n\n 狗 \n",
    "\ufeffcat\n狗",
    '["cat", "狗"]',
    '{"1": "狗", "0": "cat"}',
    '{"狗": 1, "cat": 0}',
]
NOT_LISTS = [
    "[null]",
    "[]",
    "\n \n",
    '["a",',
    '{"a": 0, "b": 2}',
    '{"a": 0, "b": 0}',
    "[" * 200_000,
    b"\xff\xfe\x00",
]


@pytest.fixture
def without_libraries(program, tmp_path):
    """Return a function that runs the program where importing a library runs a line of Python, by default an error."""

    def run(*args, line="1 / 0", **kwargs):
        (tmp_path / "libraries").mkdir()
        for library in ("torch", "numpy", "cv2", "PIL"):
            (tmp_path / "libraries" / f"{library}.py").write_text(f"{line}\n", encoding="utf-8")
        return program(*args, env={"PYTHONPATH": str(tmp_path / "libraries")}, **kwargs)

    return run


def only_error(status, stdout, stderr, expected=2):
    """Return the only line on stderr, which is an error; nothing is on stdout."""
    assert (status, stdout) == (expected, ""), stderr
    assert re.fullmatch("error: [^\n]+\n", stderr)
    return stderr


def parsed(*args):
    return parse_args([str(DOG), *map(str, args)])


@pytest.fixture
def refused(capsys):
    """Return a function that returns the error line for these arguments, which end the program with status 2."""

    def refuse(*args):
        with pytest.raises(SystemExit) as stop:
            parsed(*args)
        return only_error(stop.value.code, *capsys.readouterr())

    return refuse


def test_help_names_every_option_and_imports_no_library(without_libraries, tmp_path, monkeypatch):
    process = without_libraries("--help")
    assert (process.returncode, process.stderr) == (0, "")
    text, _, examples = process.stdout.partition("positional arguments:")[2].partition("examples:")
    entries = dict(
        re.findall(
            r"^  (--[\w-]+)(?: [\w,|]+| \{.*?\})?\s{2,}(\S.*(?:\n {10,}\S.*)*)", text, re.MULTILINE
        )
    )
    assert sorted(entries) == sorted(OPTIONS.split())
    assert all(sentence.endswith(".") for sentence in entries.values())
    assert {*METHODS, *MORE_METHODS} <= set(re.findall(r"[\w+]+", entries["--method"]))
    monkeypatch.chdir(tmp_path)
    for name in ("33.jpg", "photos/1.jpg", "best.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    calls = re.findall(
        r"^ +python cnn_visualizations\.py (.*)$", examples.replace("\\\n", " "), re.MULTILINE
    )
    assert len(calls) >= 2
    assert all(len(find_photos(parse_args(call.split()).images)) == 1 for call in calls)


@pytest.mark.parametrize(
    ("args", "status", "expected"),
    [
        ([DOG, "--metod", "gradcam"], 2, "unknown option --metod; did you mean --method"),
        ([DOG, "--ckpt", "nowhere.pth"], 2, "nowhere.pth: no such file"),
        ([DOG, "--target-layer", ""], 2, "--target-layer: the value is empty"),
        ([DOG, "--output", DOG], 2, f"--output {DOG}: cannot write there"),
        (["--ckpt", CKPT], 2, "no photo given"),
        (["", "--ckpt", CKPT], 2, "empty name"),
        ([CKPT], 2, f"pass --ckpt {CKPT}"),
        (["https://example.org/a.jpg"], 1, "https://example.org/a.jpg: this is a URL; download"),
        (["*.jpg2"], 1, "*.jpg2: no file matches this pattern"),
        (["a.jpg\nb"], 1, r"a.jpg\nb: no such file"),
    ],
)
def test_a_wrong_call_is_one_line_and_imports_no_library(without_libraries, args, status, expected):
    process = without_libraries(*args)
    assert expected in only_error(process.returncode, process.stdout, process.stderr, status)


def test_each_of_several_missing_photos_has_its_line(without_libraries, tmp_path):
    (tmp_path / "1.jpg").touch()
    process = without_libraries(
        "1.jpg", "2.jpg", "--alpha", "0.5", "3.jpg", "-", cwd=tmp_path, input="4.jpg\n\n"
    )
    faults = [line.removeprefix("error: ") for line in process.stderr.splitlines()]
    assert faults == [
        "1.jpg: the file is empty",
        *(f"{number}.jpg: no such file" for number in (2, 3, 4)),
    ]
    assert (process.returncode, process.stdout, (tmp_path / "out").exists()) == (1, "", False)


@posix
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_closed_stream_is_no_traceback(without_libraries, closed):
    process = without_libraries(
        "a.jpg", "-", preexec_fn=lambda: [os.close(stream) for stream in closed], input=""
    )
    expected = "" if 2 in closed else "error: a.jpg: no such file\n"
    assert (process.returncode, process.stdout, process.stderr) == (1, "", expected)


@posix
def test_a_photo_is_explained_while_all_streams_are_closed(program, tmp_path):
    words = ["--ckpt", CKPT, "--input-size", 64, "--outputs", "cam", "--output", tmp_path, DOG]
    process = program(*words, preexec_fn=lambda: [os.close(stream) for stream in (0, 1, 2)])
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert (tmp_path / "gradcam_cam_dog.jpg").stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit does not hold")
def test_an_address_space_that_is_too_small_is_one_line(program, tmp_path):
    from resource import RLIMIT_AS, setrlimit

    words, threads = (
        ["--ckpt", CKPT, "--output", tmp_path, DOG],
        {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    process = program(*words, env=threads, preexec_fn=lambda: setrlimit(RLIMIT_AS, (2**30, 2**30)))
    assert process.returncode in (1, 2)
    assert re.fullmatch("error: .*memory.*\n", process.stderr)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("raise MemoryError", "memory, threads"),
        ('raise RuntimeError("can\'t start new thread")', "threads"),
        ("raise ImportError('failed to map segment')", "failed to map segment"),
        ("import no_such_library", "no_such_library'; run: pip install -r requirements.txt"),
    ],
)
def test_libraries_that_cannot_be_imported_are_one_line(
    without_libraries, tmp_path, line, expected
):
    process = without_libraries(DOG, "--ckpt", CKPT, "--output", tmp_path / "out", line=line)
    assert expected in only_error(process.returncode, process.stdout, process.stderr, 1)


def test_only_photos_are_required():
    args = vars(parsed())
    assert args.pop("images") == [str(DOG)]
    assert (args.pop("methods"), args.pop("outputs")) == (["gradcam"], ["cam", "gb", "cam_gb"])
    assert args.pop("output") == Path("out")
    looks = {
        "resize": "crop",
        "colormap": "jet",
        "alpha": 0.5,
        "format": "jpg",
        "quality": 98,
        "gallery": True,
    }
    assert {
        name: value for name, value in args.items() if value is not None and value is not False
    } == looks
    assert len(args) == len(OPTIONS.split()) - 3


def test_the_first_programs_own_command_line_is_understood(tmp_path):
    words = [
        "--arch",
        "resnet50",
        "--num-classes",
        "2",
        "--target-layer",
        "layer4",
        "--method",
        "gradcam",
    ]
    args = parse_args([*words, "--ckpt", str(CKPT), "--output", str(tmp_path), str(DOG)])
    assert (args.arch, args.ckpt, args.num_classes, args.target_layers) == (
        "resnet50",
        CKPT,
        2,
        ["layer4"],
    )
    assert (args.methods, args.output, args.images) == (["gradcam"], tmp_path, [str(DOG)])


def test_photos_may_stand_on_both_sides_of_options():
    args = parse_args(
        ["a.jpg", "--sheet", "b.jpg", "--alpha", "0.5", "-", "--metrics", "c.jpg", "--", "-1.jpg"]
    )
    assert args.images == ["a.jpg", "b.jpg", "-", "c.jpg", "-1.jpg"]
    assert (args.sheet, args.metrics, args.alpha) == (True, True, 0.5)


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--method", "all"], "methods", list(METHODS)),
        (["--method", "gradcam, LayerCAM,gradcam"], "methods", ["gradcam", "layercam"]),
        (["--method", "fem", "--method", "gradcam++,fem"], "methods", ["fem", "gradcam++"]),
        (["--method", ",".join(MORE_METHODS)], "methods", list(MORE_METHODS)),
        (["--outputs", "gb", "--outputs", "cam"], "outputs", ["gb", "cam"]),
        (
            ["--target-class", "tabby, tabby cat", "--target-class", "3"],
            "target_classes",
            ["tabby, tabby cat", "3"],
        ),
        (["--mean", ".485, 116.3,0"], "mean", [0.485, 116.3, 0]),
        (["--std", "1."], "std", [1, 1, 1]),
        (["--class-names", " cat , 狗,"], "class_names", ["cat", "狗"]),
    ],
)
def test_a_value_is_taken(words, name, expected):
    assert getattr(parsed(*words), name) == expected


@pytest.mark.parametrize(
    "option",
    ["--num-classes", "--batch-size", "--input-size", "--output-size", "--top-k", "--quality"],
)
@pytest.mark.parametrize("value", ["0", "-2", "2.5", "1e9", "99999999", "many", ""])
def test_a_wrong_whole_number_is_one_line(refused, option, value):
    assert f"{option}: '{value}' is not a whole number from" in refused(option, value)


@pytest.mark.parametrize(
    "option",
    [
        "--arch",
        "--ckpt",
        "--class-names",
        "--device",
        "--target-class",
        "--target-layer",
        "--output",
    ],
)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_value_is_one_line(refused, option, value):
    assert f"{option}: the value is empty" in refused(option, value)


@pytest.mark.parametrize("option", ["--ckpt", "--class-names"])
def test_a_file_that_cannot_be_read_is_one_line(refused, tmp_path, option):
    (tmp_path / "empty").touch()
    assert f"{option}: {tmp_path}: is a folder, not a file" in refused(option, tmp_path)
    assert "empty: is empty" in refused(option, tmp_path / "empty")
    assert "cat.txt: no such file" in refused(option, "cat.txt")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--alpha", "1.5"], "--alpha: '1.5' is not a number from 0 to 1"),
        (["--mean", "0.5,0.5"], "--mean: '0.5,0.5' is neither one number nor three"),
        (["--std", "1,1,0"], "--std: '0' is not a number"),
        (["--outputs", "cam,bg"], "--outputs: unknown output 'bg' (known: cam, gb, cam_gb)"),
        (
            ["--method", "gradcam,layrcam"],
            "--method: unknown method 'layrcam'; did you mean layercam",
        ),
        (["--method", ""], "--method: unknown method ''"),
        (["--class-names", ","], "--class-names: "),
        (["--model", "resnet18"], "unknown option --model; pass --arch"),
        (["--cuda=1"], "unknown option --cuda; pass --device"),
        (["--input-siz", "64"], "unknown option --input-siz; did you mean --input-size"),
        (
            ["--top-k", "2", "--target-class", "cat"],
            "--top-k and --target-class exclude each other",
        ),
    ],
)
def test_a_wrong_option_is_one_line(refused, words, expected):
    assert expected in refused(*words)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--device", "cuda:99", "device cuda:99"),
        ("--arch", "resnet5", "unknown architecture 'resnet5'; did you mean resnet50"),
        ("--arch", "nowhere.py:build", "nowhere.py"),
        ("--colormap", "jett", "unknown colormap 'jett'; did you mean jet"),
    ],
)
def test_a_value_that_a_library_must_judge_is_one_line(tmp_path, capsys, option, value, expected):
    args = parsed("--ckpt", CKPT, "--device", "cpu", "--output", tmp_path, option, value)
    request = program_file.Request(args, find_photos(args.images))
    assert expected in only_error(program_file.main(request), *capsys.readouterr())


@pytest.mark.parametrize(
    "content", [*LISTS, '{"0": ["n02123045", "cat"], "1": ["n02084071", "狗"]}']
)
def test_class_names_may_stand_in_a_file(tmp_path, content):
    (tmp_path / "a, b.json").write_text(content, encoding="utf-8")
    assert parsed("--class-names", tmp_path / "a, b.json").class_names == ["cat", "狗"]


@pytest.mark.parametrize("content", NOT_LISTS, ids=range(len(NOT_LISTS)))
def test_a_file_that_is_no_class_names_is_one_line(refused, tmp_path, content):
    (tmp_path / "names.txt").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    assert "names.txt: not class names" in refused("--class-names", tmp_path / "names.txt")
