"""What all tests share: the demo's files, and the program run as a process."""

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

# Before torch is imported: otherwise its threads spin while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torchvision
from PIL import Image
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "cnn_visualizations.py"
CKPT = ROOT / "tests" / "data" / "dogs_mobilenet_v2.pth"
DOG = ROOT / "pics" / "dog.jpg"

sys.path.insert(0, str(ROOT))
import cnn_visualizations as program_file
from cnn_visualizations import LOG_NAME, CallError

posix = pytest.mark.skipif(os.name == "nt", reason="links, FIFOs and limits as on POSIX")
CLASSES = ["cat", "dog", "狗", "owl", "fox", "eel", "ant"]


class Result(NamedTuple):
    """What a run of the program left behind."""

    status: int  # exit status
    stdout: str
    stderr: str


def paint(path, seed=0, size=(90, 70)):
    """Write a photo of soft blobs that looks different for each seed. Return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def files_in(folder):
    """Return the relative paths of all files below a folder.

    The log, its lock and the page of results are left out.
    """
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.endswith((LOG_NAME, ".lock", "index.html")):
            continue
        names.append(name)
    return sorted(names)


def records(folder):
    """Return the lines of the log in a folder, each of which must be whole."""
    text = (folder / LOG_NAME).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def last_records(folder):
    """Return the last record of each photo and choice of methods."""
    return {(record["image"], record["method"]): record for record in records(folder)}


def paths_of(record, folder):
    """Return the paths of all files that a record in a folder lists."""
    return [folder / path for path in program_file.record_files(record)]


@pytest.fixture(autouse=True)
def all_warnings():
    """Print each warning again, as in a new process."""
    program_file.warn.cache_clear()


@pytest.fixture(scope="module")
def one_thread():
    """Compute on one thread: for small inputs several only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def end_of_a_hang():
    """A test that hangs ends the whole run with a traceback of all threads."""
    faulthandler.dump_traceback_later(900, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small random network that never answers with class 0: its checkpoint and itself."""
    torch.manual_seed(1)
    model = torchvision.models.squeezenet1_1(num_classes=len(CLASSES)).eval()

    # Its logits are ReLUs of the last convolution: that of the first class is always 0.
    convolution = model.classifier[1]
    with torch.no_grad():
        convolution.bias += 0.3
        convolution.weight[0] = 0
        convolution.bias[0] = -1

    path = tmp_path_factory.mktemp("tiny") / "tiny.pth"
    content = {"arch": "squeezenet1_1", "classes": CLASSES, "input_size": 64}
    torch.save({**content, "state_dict": model.state_dict()}, path)
    return path, model


@pytest.fixture
def explain(tiny, tmp_path, capfd):
    """Run the program in this process on the small network. Return its Result."""

    def run(*words, output=tmp_path / "out", ckpt=tiny[0]):
        for cached in vars(program_file).values():  # as in a new process
            getattr(cached, "cache_clear", int)()
        words = ["--ckpt", ckpt, "--device", "cpu", "--output", output, *words]
        try:
            args = program_file.parse_args([str(word) for word in words])
            photos = program_file.find_photos(args.images) if args.images else []
            log = args.output / LOG_NAME
            size = log.stat().st_size if log.is_file() else 0
            ranks = program_file.torchrun_ranks()
            status = program_file.main(program_file.Request(args, photos, size, **ranks))
        except (SystemExit, CallError) as stop:
            status = getattr(stop, "code", 2)
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture
def photo(tmp_path):
    return paint(tmp_path / "1.png", 1)


@pytest.fixture
def program():
    """Return a function that runs the program with these arguments and returns the process.

    `env` is added to the environment; other keyword arguments go to `subprocess.run`. Output is
    text.
    """

    def run(*args, env=None, **kwargs):
        environment = dict(os.environ)
        environment.update({"PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"})
        environment.update(env or {})
        command = [sys.executable, str(PROGRAM), *map(str, args)]
        options = {"cwd": ROOT, "encoding": "utf-8", "timeout": 300, **kwargs}
        return subprocess.run(command, env=environment, capture_output=True, **options)

    return run
