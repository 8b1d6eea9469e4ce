"""The README: its Python blocks run as they stand, and the last one makes a picture."""

import ast
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run_block(text, monkeypatch):
    """Run a block in the folder of the README. Return its names and its last expression's value."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    *statements, last = ast.parse(text).body
    assert isinstance(last, ast.Expr)

    names = {"__name__": "readme"}
    exec(compile(ast.Module(statements, []), "README.md", "exec"), names)
    value = eval(compile(ast.Expression(last.value), "README.md", "eval"), names)
    return names, value


def test_there_is_an_example_in_python():
    assert BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_python_block_ends_with_a_picture(number, monkeypatch):
    _, picture = run_block(BLOCKS[number], monkeypatch)
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"
    assert np.asarray(picture).std() > 10  # not one colour


def test_the_arrays_are_as_the_first_block_says(monkeypatch):
    names, picture = run_block(BLOCKS[0], monkeypatch)
    photo = names["photo"]
    assert photo.dtype == np.uint8
    assert photo.shape[2] == 3

    count, _, height, width = names["inputs"].shape
    explanation = names["explanation"]
    assert explanation.cams["gradcam"].dtype == np.float32
    assert explanation.cams["gradcam"].shape == (count, height, width)
    assert explanation.guided.shape == (count, 3, height, width)
    assert explanation.logits.shape == (count, 19)
    assert explanation.targets.shape == (count,)
    assert picture.size == names["classifier"].seen(photo).shape[1::-1]
