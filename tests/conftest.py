"""What all tests share: the demo's files, and the program run as a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "cnn_visualizations.py"
CKPT = ROOT / "tests" / "data" / "dogs_mobilenet_v2.pth"
DOG = ROOT / "pics" / "dog.jpg"

sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported; else its threads spin beside other work


@pytest.fixture
def program():
    """Return a function that runs the program with these arguments and returns the finished process.

    `env` is added to the environment; other keyword arguments go to `subprocess.run`. Output is text.
    """

    def run(*args, env=None, **kwargs):
        environment = {**os.environ, "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", **(env or {})}
        command = [sys.executable, str(PROGRAM), *map(str, args)]
        options = {"cwd": ROOT, "encoding": "utf-8", "timeout": 300, **kwargs}
        return subprocess.run(command, env=environment, capture_output=True, **options)

    return run
