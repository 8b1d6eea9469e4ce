"""Section 1, Command line: the options, their errors, and what is told before torch is imported."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CKPT, DOG, PROGRAM, ROOT, posix

import cnn_visualizations as program_file
from cnn_visualizations import METHODS, MORE_METHODS, find_photos, parse_args

OPTIONS = """
    --arch --ckpt --num-classes --class-names --multi-label --device --batch-size
    --input-size --resize --mean --std
    --method --target-layer --target-class --top-k --aug-smooth --eigen-smooth --metrics
    --outputs --output-size --sheet --colormap --alpha --fade --format --quality
    --output --save-arrays --skip-existing --only-wrong --no-gallery --list-layers
"""
# An option in the output of --help: its name, its value, and its lines of description.
HELP_ENTRY = re.compile(
    r"^  (--[\w-]+)(?: [\w,|]+| \{.*?\})?\s{2,}(\S.*(?:\n {10,}\S.*)*)", re.MULTILINE
)
LISTS = [
    "cat\r\n\n 狗 \n",
    "\ufeffcat\n狗",
    '["cat", "狗"]',
    '{"1": "狗", "0": "cat"}',
    '{"狗": 1, "cat": 0}',
    '{"0": ["n02123045", "cat"], "1": ["n02084071", "狗"]}',
]
NOT_LISTS = [
    b"[null]",
    b"[]",
    b"\n \n",
    b'["a",',
    b'{"a": 0, "b": 2}',
    b'{"a": 0, "b": 0}',
    b"[" * 200_000,
    b"\xff\xfe\x00",
]


@pytest.fixture
def without_libraries(program, tmp_path):
    """Return a function that runs the program where importing a library runs a line of Python.

    By default that line is an error.
    """

    def run(*args, line="1 / 0", env=None, **kwargs):
        folder = tmp_path / "libraries"
        folder.mkdir()
        for library in ("torch", "numpy", "cv2", "PIL"):
            (folder / f"{library}.py").write_text(f"{line}\n", encoding="utf-8")

        environment = {"PYTHONPATH": str(folder), **(env or {})}
        return program(*args, env=environment, **kwargs)

    return run


def only_error(status, stdout, stderr, expected=2):
    """Return the only line on stderr, which is an error; nothing is on stdout."""
    assert status == expected, stderr
    assert stdout == ""
    assert re.fullmatch("error: [^\n]+\n", stderr)
    return stderr


def only_error_of(process, expected=2):
    """Return the only line that a process printed, which is an error."""
    return only_error(process.returncode, process.stdout, process.stderr, expected)


def parsed(*args):
    return parse_args([str(DOG), *map(str, args)])


@pytest.fixture
def refused(capsys):
    """Return a function that returns the error line for arguments that end with status 2."""

    def refuse(*args):
        with pytest.raises(SystemExit) as stop:
            parsed(*args)
        captured = capsys.readouterr()
        return only_error(stop.value.code, captured.out, captured.err)

    return refuse


def test_help_names_every_option_and_imports_no_library(without_libraries):
    process = without_libraries("--help")
    assert process.returncode == 0
    assert process.stderr == ""

    _, _, text = process.stdout.partition("positional arguments:")
    entries = dict(HELP_ENTRY.findall(text))
    assert sorted(entries) == sorted(OPTIONS.split())
    for description in entries.values():
        assert description.endswith(".")

    named = re.findall(r"[\w+]+", entries["--method"])
    assert set(METHODS) <= set(named)
    assert set(MORE_METHODS) <= set(named)


def test_each_example_of_the_help_is_a_right_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("33.jpg", "photos/1.jpg", "best.pth"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")

    calls = re.findall("python cnn_visualizations.py (.*)", program_file.EXAMPLES)
    assert len(calls) >= 2
    for call in calls:
        args = parse_args(call.split())
        assert len(find_photos(args.images)) == 1


def test_help_is_printed_where_python_has_removed_the_docstrings(program):
    process = program("--help", env={"PYTHONOPTIMIZE": "2"})
    assert process.returncode == 0
    assert "guided backpropagation" in process.stdout


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
    assert expected in only_error_of(process, status)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "x"}, "RANK='x' in the environment is not a number"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 and WORLD_SIZE=2"),
    ],
)
def test_a_wrong_variable_of_torchrun_is_one_line(without_libraries, environment, expected):
    process = without_libraries(DOG, env=environment)
    assert expected in only_error_of(process)


def test_the_variables_of_torchrun_are_in_the_request(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert program_file.torchrun_ranks() == {"rank": 5, "local_rank": 1, "world_size": 8}


def test_a_wrong_call_leaves_nothing_behind(without_libraries, tmp_path):
    process = without_libraries(DOG, "--output", tmp_path / "out" / "inner", "--top-k", "0")
    only_error_of(process)
    assert not (tmp_path / "out").exists()


@posix
def test_an_output_folder_that_cannot_be_created_is_one_line(without_libraries, tmp_path):
    (tmp_path / "file").touch()
    process = without_libraries(DOG, "--output", tmp_path / "file" / "out")
    assert "file is not a folder" in only_error_of(process)


@posix
@pytest.mark.parametrize(
    ("handler", "status", "expected"),
    [
        (signal.SIG_DFL, 130, "stopped\n"),
        (signal.SIG_IGN, 1, "error: a.jpg: no such file\n"),  # as after "&" in a script
    ],
)
def test_ctrl_c_while_standard_input_is_read(tmp_path, handler, status, expected):
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    # This is more than a pipe holds, so `write` returns only when the program is reading.
    process.stdin.write("a.jpg\n" * 200_000)
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert stderr == expected


def test_each_of_several_missing_photos_has_its_line(without_libraries, tmp_path):
    (tmp_path / "1.jpg").touch()
    words = ["1.jpg", "2.jpg", "--alpha", "0.5", "3.jpg", "-"]
    process = without_libraries(*words, cwd=tmp_path, input="4.jpg\n\n")

    assert process.stderr.splitlines() == [
        "error: 1.jpg: the file is empty",
        "error: 2.jpg: no such file",
        "error: 3.jpg: no such file",
        "error: 4.jpg: no such file",
    ]
    assert process.returncode == 1
    assert process.stdout == ""
    assert not (tmp_path / "out").exists()


def close_streams(*streams):
    """Return a function that closes these streams, for a process before it starts."""

    def close():
        for stream in streams:
            os.close(stream)

    return close


@posix
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_closed_stream_is_no_traceback(without_libraries, closed):
    process = without_libraries("a.jpg", "-", preexec_fn=close_streams(*closed), input="")
    expected = "error: a.jpg: no such file\n"
    if 2 in closed:
        expected = ""
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr == expected


@posix
def test_a_photo_is_explained_while_all_streams_are_closed(program, tmp_path):
    words = ["--ckpt", CKPT, "--input-size", 64, "--outputs", "cam", "--output", tmp_path, DOG]
    process = program(*words, preexec_fn=close_streams(0, 1, 2))
    assert process.returncode == 0
    assert process.stdout == ""
    assert process.stderr == ""
    assert (tmp_path / "gradcam_cam_dog.jpg").stat().st_size > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit does not hold")
def test_an_address_space_that_is_too_small_is_one_line(program, tmp_path):
    from resource import RLIMIT_AS, setrlimit

    def limit():
        setrlimit(RLIMIT_AS, (2**30, 2**30))

    words = ["--ckpt", CKPT, "--output", tmp_path, DOG]
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = program(*words, env=one_thread, preexec_fn=limit)
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
    assert expected in only_error_of(process, 1)


def test_the_inline_dependencies_equal_requirements_txt():
    block = re.search(r"# /// script\n(.*?)# ///", PROGRAM.read_text(encoding="utf-8"), re.DOTALL)
    inline = re.findall(r'"(\S+>=[\d.]+)"', block[1].partition("dependencies")[2])

    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert inline == re.findall(r"^[\w-]+>=[\d.]+", requirements, re.MULTILINE)


def test_only_photos_are_required():
    given = {
        "images": [str(DOG)],
        "methods": ["gradcam"],
        "outputs": ["cam", "gb", "cam_gb"],
        "output": Path("out"),
        "resize": "crop",
        "colormap": "jet",
        "alpha": 0.5,
        "format": "jpg",
        "quality": 98,
        "gallery": True,
    }
    args = vars(parsed())
    for name, value in args.items():
        if name in given:
            assert value == given[name]
        else:
            assert value in (None, False)
    assert len(args) == len(OPTIONS.split()) + 1


def test_the_first_programs_own_command_line_is_understood(tmp_path):
    words = ["--arch", "resnet50", "--num-classes", "2", "--target-layer", "layer4"]
    words += ["--method", "gradcam", "--ckpt", str(CKPT), "--output", str(tmp_path), str(DOG)]
    args = parse_args(words)
    assert args.arch == "resnet50"
    assert args.ckpt == CKPT
    assert args.num_classes == 2
    assert args.target_layers == ["layer4"]
    assert args.methods == ["gradcam"]
    assert args.output == tmp_path
    assert args.images == [str(DOG)]


def test_photos_may_stand_on_both_sides_of_options():
    before = ["a.jpg", "--sheet", "b.jpg", "--alpha", "0.5", "-"]
    args = parse_args([*before, "--metrics", "c.jpg", "--", "-1.jpg"])
    assert args.images == ["a.jpg", "b.jpg", "-", "c.jpg", "-1.jpg"]
    assert args.sheet is True
    assert args.metrics is True
    assert args.alpha == 0.5


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
        (["--class-names", "cat"], "class_names", ["cat"]),
        (["--device", "gpu"], "device", "cuda"),
        (["--resize", "Squash"], "resize", "squash"),
        (["--resize", "256"], "resize", 256),
        (["--input-size", "64"], "input_size", (64, 64)),
        (["--input-size", "256x128"], "input_size", (256, 128)),
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
        (["--use-cuda"], "unknown option --use-cuda; pass --device cuda"),
        (["--image-path", "a.jpg"], "--image-path; pass the photo without an option"),
        (["--resize", "crp"], "--resize: 'crp' is neither crop nor squash"),
        (["--resize", "7"], "--resize: '7' is not a whole number from 8 to 8192"),
        (["--input-size", "8x8x8"], "--input-size: '8x8x8' is neither one number nor HEIGHTxWIDTH"),
        (["--input-size", "256x"], "--input-size: '' is not a whole number"),
        (["--method", "gradcam", "scorecam"], "pass --method 'gradcam,scorecam'"),
        (["--class-names", "cat,", "tabby cat", DOG], "pass --class-names 'cat,tabby cat'"),
        (["--mean", "0.485", "0.456", "0.406"], "pass --mean '0.485,0.456,0.406'"),
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
    status = program_file.main(request)
    captured = capsys.readouterr()
    assert expected in only_error(status, captured.out, captured.err)


@pytest.mark.parametrize("content", LISTS)
def test_class_names_may_stand_in_a_file(tmp_path, content):
    path = tmp_path / "a, b.json"
    path.write_text(content, encoding="utf-8")
    assert parsed("--class-names", path).class_names == ["cat", "狗"]


@pytest.mark.parametrize("content", NOT_LISTS, ids=range(len(NOT_LISTS)))
def test_a_file_that_is_no_class_names_is_one_line(refused, tmp_path, content):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    assert "names.txt: not class names" in refused("--class-names", path)
