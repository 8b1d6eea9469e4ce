"""What the tests share: the demo, and the program run as a person runs it."""

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


@pytest.fixture
def program():
    """Runs the program with these arguments; gives the finished process with its text output."""

    def run(*args, cwd=ROOT, **kwargs):
        environment = {**os.environ, "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(PROGRAM), *map(str, args)]
        kwargs = {"env": environment, "encoding": "utf-8", "timeout": 300, **kwargs}
        return subprocess.run(command, cwd=cwd, capture_output=True, **kwargs)

    return run
