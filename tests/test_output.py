"""Section 6, Output: what is drawn, the names and the content of files, and the log that says which are done."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import CLASSES, files_in, last_records, paint, pixels, posix, records
from matplotlib import colormaps, font_manager
from PIL import Image, ImageDraw

from cnn_visualizations import (
    LOG_NAME,
    Explainer,
    draw_cam,
    draw_gradients,
    load_classifier,
    read_photo,
)

THREE = ["gradcam_cam_1.jpg", "gb_1.jpg", "gradcam_cam_gb_1.jpg"]
CHEAP = ["gradcam", "gradcam++", "xgradcam", "eigencam", "eigengradcam"]
CHEAP += ["hirescam", "layercam", "gradcamelementwise", "fem", "randomcam"]
pytestmark = pytest.mark.usefixtures("one_thread", "end_of_a_hang")


# Drawing


def grey(height, width, value=128):
    return np.full((height, width, 3), value, np.uint8)


def jet(x):
    """Return the colours of "jet", (..., 3) from 0 to 255, by its definition: three trapezia."""
    return 255 * np.stack([np.clip(1.5 - np.abs(4 * x - peak), 0, 1) for peak in (3, 2, 1)], -1)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1])
def test_the_colours_of_the_map_are_mixed_with_the_photo(alpha):
    cam, picture = np.linspace(0, 1, 256, dtype=np.float32)[None], grey(1, 256, 40)
    expected = {"jet": jet(cam), "viridis": 255 * colormaps["viridis"](cam)[..., :3]}
    for name, colours in expected.items():
        drawn = draw_cam(picture, cam, name, alpha)
        assert np.abs(drawn - ((1 - alpha) * 40 + alpha * colours)).max() <= 6, name
    assert np.array_equal(draw_cam(picture, cam), draw_cam(picture, cam, "jet", 0.5))


def test_every_colormap_of_opencv_gives_its_colours():
    ramp = np.arange(256, dtype=np.uint8)[None]
    theirs = {
        name[9:].lower(): getattr(cv2, name) for name in dir(cv2) if name.startswith("COLORMAP_")
    }
    assert {"jet", "turbo", "viridis", "twilight_shifted"} <= set(theirs)
    for name, number in theirs.items():
        expected = cv2.applyColorMap(ramp, number)[:, :, ::-1]
        np.testing.assert_array_equal(
            draw_cam(grey(1, 256), np.float32(ramp / 255), name, 1), expected
        )


def test_the_map_is_enlarged_linearly():
    drawn = draw_cam(grey(1, 4), np.array([[0, 1]], np.float32), alpha=1)
    assert np.abs(drawn - jet(np.array([[0, 0.25, 0.75, 1]]))).max() <= 6


@pytest.mark.parametrize(("height", "width"), [(80, 160), (160, 80)])
@pytest.mark.parametrize("cell", [(1, 6), (6, 1), (0, 0)])
def test_the_hottest_place_is_where_the_map_has_it(height, width, cell):
    picture, cam = grey(height, width), np.zeros((8, 8), np.float32)
    cam[cell] = 1
    given = picture.copy(), cam.copy()
    warmth = np.subtract(
        *draw_cam(picture, cam).astype(int).transpose(2, 0, 1)[::2]
    )  # red less blue
    hottest = np.argwhere(warmth == warmth.max()).mean(0) / (height / 8, width / 8)
    assert np.abs(hottest - np.add(cell, 0.5)).max() <= 0.5
    assert (np.array_equal(picture, given[0]), np.array_equal(cam, given[1])) == (
        True,
        True,
    )  # not changed


@pytest.mark.parametrize("colormap", ["jet", "bone"])
def test_a_map_of_zeros_leaves_the_photo_as_it_is(colormap):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_array_equal(
        draw_cam(picture, np.zeros((8, 8), np.float32), colormap, 0.9), picture
    )


@pytest.mark.parametrize("unit", [1, 1e-20, 1e20])
def test_gradients_are_bright_where_positive_dark_where_negative_and_grey_at_zero(unit):
    values = np.zeros((3, 40, 40), np.float32)
    values[:, :4] = 2 * unit  # a tenth, so that this is the 99.5th percentile
    values[0, 10], values[1, 11], values[2, 12], values[:, 13, 5] = (
        unit,
        -unit,
        -2 * unit,
        1e6 * unit,
    )
    drawn = draw_gradients(values, 40, 40).astype(int)
    expected = {
        (0, 0): (255, 255, 255),
        (10, 0): (191, 128, 128),
        (11, 0): (128, 64, 128),
        (12, 0): (128, 128, 0),
    }
    for place, colour in {**expected, (13, 5): (255, 255, 255), (30, 30): (128, 128, 128)}.items():
        assert np.abs(drawn[place] - colour).max() <= 1, place


def test_gradients_that_are_nearly_all_zero_are_seen_where_they_are():
    values = np.zeros((3, 8, 8), np.float32)
    assert np.isin(draw_gradients(values, 20, 10), (127, 128)).all()
    values[:, 2, 5] = 1e-3
    drawn = draw_gradients(values, 160, 80)[:, :, 0]
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (drawn.shape, y * 8 // 80, x * 8 // 160, drawn.max() > 240) == ((80, 160), 2, 5, True)


# Pictures


def places(sheet, picture):
    """Return the corners (left, top) of all exact copies of a picture in a larger one."""
    sheet, picture = np.uint8(sheet), np.uint8(picture)
    height, width = picture.shape[:2]
    near = np.argwhere(cv2.matchTemplate(sheet, picture, cv2.TM_SQDIFF) < 1e5)
    return [
        (int(x), int(y))
        for y, x in near
        if np.array_equal(sheet[y : y + height, x : x + width], picture)
    ]


LONG = [((1500, 1000), "", (683, 1024)), ((500, 1025), "", (1024, 500)), ((30, 20), "", (20, 30))]
LONG += [
    ((30, 20), "--output-size 300", (200, 300)),
    ((1500, 1000), "--output-size 1200", (800, 1200)),
]


@pytest.mark.parametrize(("size", "options", "expected"), [*LONG, ((1500, 15), "", (10, 1024))])
def test_the_long_side_is_the_photos_or_1024_or_what_is_asked_for(
    explain, tmp_path, size, options, expected
):
    options = ["--resize", "squash", "--outputs", "cam", *options.split()]
    assert explain(*options, paint(tmp_path / "1.png", 1, size)).status == 0
    assert pixels(tmp_path / "out" / THREE[0]).shape == (*expected, 3)


def test_the_picture_shows_what_the_network_sees_pixel_by_pixel(explain, tmp_path):
    photo = paint(tmp_path / "1.png", 1, (200, 120))
    options = ["--alpha", "0", "--outputs", "cam", "--format", "png", photo]
    explain("--resize", "squash", *options)
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "gradcam_cam_1.png"), pixels(photo))
    explain(*options)
    seen = pixels(tmp_path / "out" / "gradcam_cam_1.png")
    ((left, top),) = places(pixels(photo), seen)
    height, width, _ = seen.shape
    assert abs(height - width) <= 1  # torchvision rounds the sides
    assert (abs(left - (200 - width) / 2) <= 1, abs(top - (120 - height) / 2) <= 1) == (True, True)


def test_the_pictures_are_drawn_from_the_arrays_that_are_saved(explain, tiny, tmp_path):
    photo, classes = (
        paint(tmp_path / "1.png", 1, (64, 64)),
        ["--target-class", "owl", "--target-class", "4"],
    )
    options = [
        "--resize",
        "squash",
        "--alpha",
        "1",
        "--format",
        "png",
        "--save-arrays",
        "--method",
        "gradcam,fem",
    ]
    assert explain(*options, *classes, photo).status == 0
    with np.load(tmp_path / "out" / "1.npz", allow_pickle=False) as saved:
        arrays = dict(saved)
    kinds = {
        "cams": "f4 (2, 2, 64, 64)",
        "guided": "f4 (2, 3, 64, 64)",
        "logits": "f4 (7,)",
        "classes": "i8 (2,)",
    }
    assert {name: f"{arrays[name].dtype.str[1:]} {arrays[name].shape}" for name in kinds} == kinds
    lists = {
        "methods": ["gradcam", "fem"],
        "classes": [3, 4],
        "class_names": CLASSES,
        "target_layers": ["features"],
    }
    assert {name: arrays[name].tolist() for name in lists} == lists
    classifier = load_classifier(ckpt=tiny[0], device="cpu", resize="squash")
    assert arrays["box"].tolist() == [0, 0, 64, 64]
    inputs = classifier.preprocess(read_photo(photo))[None]
    found = Explainer(tiny[1], ["gradcam", "fem"])(inputs, [[3, 4]])
    np.testing.assert_allclose(arrays["logits"], found.logits[0], atol=1e-4)
    for index, method in enumerate(found.cams):
        np.testing.assert_allclose(arrays["cams"][index], found.cams[method][0], atol=1e-3)
    for index, label in enumerate(("owl", "fox")):
        cam, guided = arrays["cams"][0, index], arrays["guided"][index]
        np.testing.assert_allclose(guided, found.guided[0, index], atol=1e-3 * np.abs(guided).max())
        assert (
            np.abs(pixels(tmp_path / "out" / f"gradcam_cam_1_{label}.png") - jet(cam)).max() <= 10
        )
        for name, values in {"gb": guided, "gradcam_cam_gb": guided * cam}.items():
            drawn = pixels(tmp_path / "out" / f"{name}_1_{label}.png")
            np.testing.assert_array_equal(drawn, draw_gradients(values, 64, 64))


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_each_format_is_what_its_name_says_and_has_the_colours(explain, tmp_path, ending, kind):
    photo = paint(tmp_path / "1 狗.v2.png", 1, (400, 300))
    options = ["--alpha", "0", "--resize", "squash", "--outputs", "cam", "--format", ending, photo]
    sizes = []
    for quality in ("30", "98"):
        assert explain("--quality", quality, *options).status == 0
        (name,) = files_in(tmp_path / "out")
        assert name == f"gradcam_cam_1 狗.v2.{ending}"
        sizes.append((tmp_path / "out" / name).stat().st_size)
    with Image.open(tmp_path / "out" / name) as picture:
        assert (picture.format, picture.mode) == (kind, "RGB")
    assert np.abs(pixels(tmp_path / "out" / name) - pixels(photo)).mean() < 3
    assert sizes[0] * 2 < sizes[1] or ending == "png"


def test_a_map_of_zeros_is_drawn_without_colour_and_told(explain, photo, tmp_path, texts):
    options = ["--resize", "squash", "--format", "png", "--method", "gradcamelementwise,eigencam"]
    result, out = explain("--sheet", "--target-class", "cat", *options, photo), tmp_path / "out"
    warning = f"warning: {photo}: the gradcamelementwise map is all zeros: no positive evidence at features\n"
    assert (result.status, result.stderr.count("warning: "), warning in result.stderr) == (
        0,
        1,
        True,
    )
    np.testing.assert_array_equal(pixels(out / "gradcamelementwise_cam_1_cat.png"), pixels(photo))
    assert np.isin(pixels(out / "gradcamelementwise_cam_gb_1_cat.png"), (127, 128)).all()
    assert (pixels(out / "eigencam_cam_1_cat.png") != pixels(photo)).any()
    assert "no positive evidence" in [text for text, _, _ in texts]


# Names of files


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("", THREE),
        ("--top-k 1 --outputs gb,cam", [THREE[1], THREE[0]]),
        (
            "--method eigencam --method gradcam++ --outputs cam,gb",
            ["eigencam_cam_1", "gradcam++_cam_1", "gb_1"],
        ),
        ("--target-class OWL", ["gradcam_cam_1_owl", "gb_1_owl", "gradcam_cam_gb_1_owl"]),
        (
            "--target-class 2 --target-class cat --outputs cam",
            ["gradcam_cam_1_狗", "gradcam_cam_1_cat"],
        ),
        (
            "--sheet --save-arrays --outputs cam --format png",
            ["gradcam_cam_1.png", "1_sheet.png", "1.npz"],
        ),
    ],
)
def test_files_are_named_after_method_photo_and_the_classes_asked_for(
    explain, photo, tmp_path, options, names
):
    names = [name if "." in name else f"{name}.jpg" for name in names]
    result = explain(*options.split(), photo)
    assert result.status == 0
    assert files_in(tmp_path / "out") == sorted(names)
    paths = [str(tmp_path / "out" / name) for name in names]
    assert result.stdout.partition(" -> ")[2] == ", ".join(paths) + "\n"
    assert records(tmp_path / "out")[0]["files"] == paths


def test_another_class_in_another_run_overwrites_nothing(explain, photo, tmp_path):
    explain("--target-class", "owl", photo)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    explain("--target-class", "fox", photo)
    explain(photo)
    assert len(files_in(tmp_path / "out")) == 9
    assert all(
        (tmp_path / "out" / name).read_bytes() == content for name, content in before.items()
    )


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ("a/b|c_d|e:f*|Siberian husky|哈士奇|x|v1.2", "a-b|c-d|e-f|Siberian-husky|哈士奇|x|v1.2"),
        ("a b|a_b|...|d|e|f|g", "0-a-b|1-a-b|2|3-d|4-e|5-f|6-g"),
        ("Cat|cat|c|d|e|f|g", "0-Cat|1-cat|2-c|3-d|4-e|5-f|6-g"),
        (f"../../etc|{'狗' * 300}|{'狗' * 301}|\n|\0|..|g", None),
    ],
)
def test_class_names_become_labels_that_differ_and_can_stand_in_file_names(
    explain, photo, tmp_path, names, labels
):
    (tmp_path / "names.json").write_text(json.dumps(names.split("|")), encoding="utf-8")
    options = ["--class-names", tmp_path / "names.json", "--top-k", "7", "--outputs", "gb", photo]
    assert explain(*options).status == 0
    found = [name.removeprefix("gb_1_").removesuffix(".jpg") for name in files_in(tmp_path / "out")]
    assert (len(found), any("/" in label or "_" in label for label in found)) == (7, False)
    assert labels is None or set(found) == set(labels.split("|"))


# The sheet


@pytest.fixture
def texts(monkeypatch):
    """What is written on sheets: text, top, font."""
    written, write = [], ImageDraw.ImageDraw.text

    def record(pen, place, text, *args, **kwargs):
        written.append(
            (text, place[1], next(a for a in (*args, *kwargs.values()) if hasattr(a, "getlength")))
        )
        return write(pen, place, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return written


def test_a_sheet_has_a_block_for_each_class_with_source_and_gb_once(
    explain, photo, tmp_path, texts
):
    options = ["--sheet", "--format", "png", "--output-size", "320", "--method", "gradcam,layercam"]
    result = explain(
        "--target-class", "fox", "--target-class", "owl", "--alpha", "0.7", *options, photo
    )
    assert result.status == 0
    out = tmp_path / "out"
    sheet = pixels(out / "1_sheet.png")
    explain("--alpha", "0", "--outputs", "cam", *options[1:], photo, output=tmp_path / "source")
    source = places(sheet, pixels(tmp_path / "source" / "gradcam_cam_1.png"))
    assert len(source) == 2
    for (left, top), label in zip(source, ("fox", "owl"), strict=True):
        ((gb_left, gb_top),) = places(sheet, pixels(out / f"gb_1_{label}.png"))
        assert (gb_left, gb_top > top) == (left, True)
        before = left
        for method in ("gradcam", "layercam"):
            ((cam_left, cam_top),) = places(sheet, pixels(out / f"{method}_cam_1_{label}.png"))
            ((product_left, product_top),) = places(
                sheet, pixels(out / f"{method}_cam_gb_1_{label}.png")
            )
            assert (cam_top, product_top) == (top, gb_top)
            assert cam_left == product_left >= before + 320
            before = cam_left
    words, first = [text for text, _, _ in texts], min(top for _, top, _ in texts)
    prediction = result.stdout.split(": ")[1].split()[0]
    title = next(text for text, top, _ in texts if top == first)
    assert re.fullmatch(rf"1.png +prediction: {prediction} [\d.]+ +layer: features", title)
    assert {"explained: fox", "explained: owl"} <= {word.rpartition(" ")[0] for word in words}
    captions = ["source", "gb", "gradcam cam", "gradcam cam_gb", "layercam cam", "layercam cam_gb"]
    assert sorted(text for text in words if text in captions) == sorted(captions * 2)


def test_the_colour_scale_stands_on_top(explain, photo, tmp_path):
    explain("--sheet", "--format", "png", "--colormap", "viridis", "--outputs", "cam", photo)
    row = pixels(tmp_path / "out" / "1_sheet.png")[20]
    colours = 255 * colormaps["viridis"](np.linspace(0, 1, 5))[:, :3]
    centres = [np.flatnonzero(np.abs(row - colour).max(1) <= 6).mean() for colour in colours]
    assert np.diff(centres).min() > 10
    assert np.ptp(np.diff(centres)) <= 4


def test_ten_methods_fit_on_a_slide(explain, photo, tmp_path, texts):
    assert explain("--sheet", "--method", ",".join(CHEAP), photo).status == 0
    height, width, _ = pixels(tmp_path / "out" / "1_sheet.jpg").shape
    assert 0.5 < width / height < 2
    assert {f"{method} cam" for method in CHEAP} <= {text for text, _, _ in texts}


@pytest.mark.parametrize(
    "methods",
    ["gradcam", pytest.param(",".join([*CHEAP, "kpcacam", "segeigencam"]), marks=pytest.mark.slow)],
)
def test_a_sheet_of_many_classes_is_no_taller_than_a_webp_can_be(explain, photo, tmp_path, methods):
    model = torchvision.models.squeezenet1_1(num_classes=30)
    torch.save(model.state_dict(), tmp_path / "30.pth")
    options = [
        "--input-size",
        "64",
        "--output-size",
        "64",
        "--top-k",
        "30",
        "--sheet",
        "--format",
        "webp",
    ]
    options += ["--outputs", "cam,cam_gb", "--method", methods]
    result = explain(*options, photo, ckpt=tmp_path / "30.pth")
    assert (result.status, "warning: a sheet has room for" in result.stderr) == (0, True)
    assert pixels(tmp_path / "out" / "1_sheet.webp").shape[0] <= 16_383
    assert len(files_in(tmp_path / "out")) == 1 + 60 * len(methods.split(","))


def test_a_sheet_of_a_narrow_picture_has_room_for_its_title(explain, tmp_path, texts):
    explain("--sheet", "--resize", "squash", paint(tmp_path / "1.png", 1, (80, 800)))
    assert any(text.startswith("1.png") and "layer: features" in text for text, _, _ in texts)


def has_glyphs(font, text):
    """Return whether a font has all characters, by its own table."""
    from fontTools.ttLib import TTFont

    return {ord(c) for c in text} <= TTFont(font.path, fontNumber=0, lazy=True).getBestCmap().keys()


@pytest.mark.parametrize("name", ["1.png", "照片.png"])
@pytest.mark.parametrize("classes", [",".join(CLASSES), "cat,dog,cow,owl,fox,eel,ant"])
def test_a_font_that_has_the_names_is_looked_for(explain, tmp_path, texts, name, classes):
    explain("--sheet", "--target-class", "2", "--class-names", classes, paint(tmp_path / name, 1))
    title = next(each for each in texts if "prediction" in each[0])
    shown = "".join(text for text, _, _ in texts)
    if not classes.isascii() and not any("CJK" in path for path in font_manager.findSystemFonts()):
        pytest.skip("no font with Chinese is installed")
    # the font is chosen for the names of classes; where they are ASCII, the rest of a photo's name shows as ?
    assert (name if not classes.isascii() else name.replace("照片", "??")) in title[0]
    assert f"explained: {classes.split(',')[2]} " in shown
    assert classes.isascii() or has_glyphs(title[2], shown)


def test_without_a_font_for_them_class_names_show_with_their_index(
    explain, tmp_path, texts, monkeypatch
):
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda *args, **kwargs: [str(tmp_path / "broken.ttf")]
    )
    result = explain("--sheet", "--target-class", "狗", paint(tmp_path / "照片.png", 1))
    assert (result.status, "狗" in result.stdout) == (0, True)
    shown = [text for text, _, _ in texts]
    assert all(text.replace("…", "").isascii() for text in shown)
    assert any(text.startswith("explained: 2 0.") for text in shown)


# The log


def test_a_later_run_that_fails_drops_nothing_from_the_log(explain, photo, tmp_path):
    explain(photo)
    before = (tmp_path / "out" / LOG_NAME).read_bytes()
    result = explain("--target-layer", "nope", photo)
    assert (result.status, result.stdout) == (2, "")
    assert (tmp_path / "out" / LOG_NAME).read_bytes() == before
    assert files_in(tmp_path / "out") == sorted(THREE)


def test_the_log_only_grows_and_the_last_line_counts(explain, photo, tmp_path):
    log, before = tmp_path / "out" / LOG_NAME, b""
    options = ["--outputs", "cam", photo, "--method"]
    for method, alpha in (
        ("gradcam", "0.5"),
        ("eigencam", "0.5"),
        ("gradcam", "0.5"),
        ("gradcam", "0.2"),
    ):
        explain(*options, method, "--alpha", alpha)
        content = log.read_bytes()
        assert content.startswith(before)
        assert content.count(b"\n") == before.count(b"\n") + 1
        before = content
    for method, alpha, done in (
        ("gradcam", "0.5", 1),
        ("gradcam", "0.2", 1),
        ("gradcam", "0.2", 0),
        ("eigencam", "0.5", 0),
    ):
        assert (
            len(explain("--skip-existing", "--alpha", alpha, *options, method).stdout.splitlines())
            == done
        ), (
            method,
            alpha,
        )


HOSTILE = [
    b'{"epoch": 1, "loss": 0.3}\nmy notes\n\n',
    b"[" * 200_000 + b"\n",
    b'{"image": "caf\xe9", "method": "gradcam"}\n\x00\x00\x00\n\xef\xbb\xbf{}\n',
    b'{"image": 7, "method": "gradcam"}\n{"image": "1.png", "method": ["gradcam"]}\n'
    + b"9" * 5000
    + b"\nnull\n",
    b'{"image": "1.png", "method": "gradcam", "files": null, "options": {}}\n',
    b'{"image": "1.png", "method": "", "source": 7}\n',
    b'{"image": "a\\u0000b", "method": "gradcam", "files": ["a\\u0000b", "\\ud800"], "output_stem": "../../\\u0000"}\n',
    b'{"image": "',
    b'{"image": "1.png", "method": "gradcam"}',
    '{"image": "狗'.encode()[:-1],
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_lines_that_are_not_ours_stay_and_do_no_harm(explain, tmp_path, content):
    """In the folder of the photos, where the log is also read to tell pictures from photos."""
    folder = tmp_path / "album"
    paint(folder / "1.png", 1)
    (folder / LOG_NAME).write_bytes(content)
    options = ["--outputs", "cam", "--skip-existing", folder]
    assert explain(*options, output=folder).status == 0
    assert (folder / LOG_NAME).read_bytes().startswith(content)
    assert json.loads((folder / LOG_NAME).read_bytes().splitlines()[-1])["image"] == str(
        folder / "1.png"
    )
    assert files_in(folder) == ["1.png", THREE[0]]
    assert "0 done, 1 skipped, 0 failed" in explain(*options, output=folder).stderr


def put(kind, place):
    """Put something of the user's where the program would write. Return a function that tells if it is still so."""
    place.parent.mkdir(exist_ok=True)
    victim = place.parent.parent / "victim"
    victim.write_bytes(b"the only copy")
    if kind == "file":
        place.write_bytes(b"somebody's")
    elif kind == "folder":
        place.mkdir()
    elif kind == "FIFO":
        os.mkfifo(place)
    else:
        place.symlink_to(victim if kind == "link" else victim.with_name("nowhere"))

    def state():
        contents = [
            victim.read_bytes(),
            place.read_bytes() if kind == "file" else victim.with_name("nowhere").exists(),
        ]
        return os.lstat(place).st_mode, os.lstat(place).st_ino, contents

    before = state()
    return lambda: state() == before


@posix
@pytest.mark.parametrize("name", [LOG_NAME, ".results.lock"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "folder"])
def test_a_log_that_is_no_file_is_refused_and_not_followed(explain, photo, tmp_path, kind, name):
    place = tmp_path / "out" / name
    is_unchanged = put(kind, place)
    result = explain(photo)
    if name == LOG_NAME:
        assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"error: {place}: ")
        assert files_in(tmp_path / "out") == []
    assert ("Traceback" in result.stderr, is_unchanged()) == (False, True)


FOREIGN = [("file", "gb_1.jpg"), ("file", "1_sheet.jpg"), ("file", "1.npz")]
FOREIGN += [(kind, "gb_1.jpg") for kind in ("link", "dangling link", "FIFO", "folder")]


@posix
@pytest.mark.parametrize("earlier", [False, True], ids=["new photo", "known photo"])
@pytest.mark.parametrize(("kind", "name"), FOREIGN)
def test_what_is_not_ours_is_never_overwritten(explain, photo, tmp_path, kind, name, earlier):
    """Where one of a photo's files would be, and the photo is new, or has other files there already."""
    out, options = tmp_path / "out", ["--sheet", "--save-arrays", photo]
    if earlier:
        explain("--outputs", "cam_gb", photo)
    is_unchanged = put(kind, out / name)
    expected = {
        *files_in(out),
        *(other.replace("1", "1_2") for other in (*THREE, "1_sheet.jpg", "1.npz")),
    }
    for _ in range(2):
        assert explain(*options).status == 0
        assert (is_unchanged(), set(files_in(out))) == (True, expected)
    assert "1 skipped" in explain("--skip-existing", *options).stderr


@posix
def test_no_temporary_name_can_be_foretold(explain, photo, tmp_path):
    names = [
        f"{dot}{name}.{end}"
        for name in (*THREE, LOG_NAME)
        for end in ("part", "tmp")
        for dot in ("", ".")
    ]
    unchanged = [put("link", tmp_path / "out" / name) for name in names]
    assert explain(photo).status == 0
    assert all(is_unchanged() for is_unchanged in unchanged)
    assert set(files_in(tmp_path / "out")) == {*THREE, *names}


def test_photos_called_dot_and_dot_dot_write_inside_of_the_output_folder(explain, tmp_path):
    folder = tmp_path / "album"
    photos = [
        paint(folder / "1.jpg", 1).rename(folder / name) for name in ("..jpg", "...jpg", "1.x.jpg")
    ]
    assert explain("--sheet", "--save-arrays", *photos).status == 0
    assert len(files_in(tmp_path / "out")) == 5 * 3
    assert len(files_in(tmp_path)) == 6 * 3


@pytest.mark.parametrize(
    ("length", "outputs", "fits"), [(244, "gb", 1), (244, "gb,cam_gb", 0), (253, "gb", 0)]
)
def test_a_name_too_long_for_one_file_is_an_error_before_the_first(
    explain, tmp_path, length, outputs, fits
):
    photo = paint(tmp_path / "1.png", 1).rename(tmp_path / ("x" * (length - 4) + ".png"))
    result = explain("--outputs", outputs, photo, paint(tmp_path / "2.png", 2))
    assert (result.status, len(files_in(tmp_path / "out"))) == (
        1 - fits,
        len(outputs.split(",")) + fits,
    )
    assert result.stderr.count(f"error: {photo}: its results cannot be written: ") == 1 - fits
    assert ("error" in last_records(tmp_path / "out")[str(photo), "gradcam"]) == (not fits)


# Photos of one name


def test_photos_of_one_name_keep_their_own_files_in_all_runs(explain, tmp_path):
    """Whatever is passed with them, in whatever order, and also when they are passed one by one."""
    photos = [
        paint(tmp_path / place, seed)
        for seed, place in enumerate(["x/1.png", "y/1.png", "1.jpg", "y/1_2.png"])
    ]
    out, options = tmp_path / "out", ["--outputs", "gb"]
    first = [photos[1], photos[0], photos[3]]
    explain(*options, *first)
    files = {photo: last_records(out)[str(photo), "gradcam"]["files"] for photo in first}
    pictures = {photo: pixels(path) for photo, (path,) in files.items()}
    for again in ([photos[0]], [photos[3], photos[1]], [photos[2], *first]):
        explain(*options, *again)
        for photo in first:
            assert last_records(out)[str(photo), "gradcam"]["files"] == files[photo]
            np.testing.assert_array_equal(pixels(files[photo][0]), pictures[photo])
    assert len(files_in(out)) == 4
    assert "0 done, 4 skipped" in explain("--skip-existing", *options, *photos).stderr


def test_names_that_only_differ_in_case_are_two_photos(explain, tmp_path):
    for seed, name in enumerate(("a.jpg", "A.jpg", "Stra\u00dfe.jpg", "STRASSE.jpg")):
        paint(tmp_path / "album" / name, seed)
    count = len(
        list((tmp_path / "album").iterdir())
    )  # two or three, where the file system ignores case
    for skipped in (0, count, count):
        result = explain("--outputs", "cam", "--skip-existing", tmp_path / "album")
        assert f"{count - skipped} done, {skipped} skipped" in result.stderr
        assert len({name.casefold() for name in files_in(tmp_path / "out")}) == count


def test_a_picture_of_one_photo_that_is_named_like_one_of_another_is_kept(explain, tmp_path):
    """The heatmap of gb_1.png is gradcam_cam_gb_1.jpg, as the product of 1.png is."""
    photos = [paint(tmp_path / name, seed) for seed, name in enumerate(("1.png", "gb_1.png"))]
    out = tmp_path / "out"
    for photo in photos:
        explain("--outputs", "cam", photo)
    before = (out / "gradcam_cam_gb_1.jpg").read_bytes()
    explain(photos[0])
    assert (out / "gradcam_cam_gb_1.jpg").read_bytes() == before
    explain(*photos)
    files = [file for photo in photos for file in last_records(out)[str(photo), "gradcam"]["files"]]
    assert len(set(files)) == 6
    assert all(os.path.isfile(file) for file in files)


def test_a_photo_is_known_from_whatever_folder_the_program_is_called(
    explain, tmp_path, monkeypatch
):
    photos = [
        paint(tmp_path / folder / "1.png", seed) for seed, folder in enumerate(("cats", "dogs"))
    ]
    for photo in photos:
        monkeypatch.chdir(photo.parent)
        assert explain("--outputs", "cam", "1.png", output=Path("..") / "out").status == 0
    assert files_in(tmp_path / "out") == ["gradcam_cam_1.jpg", "gradcam_cam_1_2.jpg"]
    monkeypatch.chdir(tmp_path)
    again = explain("--outputs", "cam", "--skip-existing", "cats/1.png", photos[1], output="out")
    assert "0 done, 2 skipped" in again.stderr


def test_folders_that_are_moved_together_are_gone_on_with(explain, tmp_path):
    paint(tmp_path / "here" / "album" / "1.png", 1)
    for place, said in (("here", "1.png: "), ("there", "")):
        options = ["--outputs", "cam", "--skip-existing", tmp_path / place / "album"]
        assert said in explain(*options, output=tmp_path / place / "out").stdout
        assert explain(*options, output=tmp_path / place / "out").stdout == ""
        (tmp_path / place).rename(tmp_path / "there")


@pytest.mark.parametrize("inner", [".", "results", "x"])
def test_in_the_photos_own_folder_no_photo_is_overwritten_and_no_picture_is_a_photo(
    explain, tmp_path, inner
):
    album = tmp_path / "album"
    photos = ["1.jpg", "gb_1.jpg", "gradcam_cam_2.jpg", "2.png", "x/3.jpg"]
    before = [paint(album / name, seed).read_bytes() for seed, name in enumerate(photos)]
    for form in ("jpg", "png", "jpg"):
        result = explain("--format", form, "--sheet", album, output=album / inner)
        assert (result.status, "5 done, 0 skipped, 0 failed" in result.stderr) == (0, True)
        assert [(album / name).read_bytes() for name in photos] == before
    assert len(files_in(album)) == 5 + 2 * 5 * 4
    names = [file for record in last_records(album / inner).values() for file in record["files"]]
    assert len(set(names)) == len(names) == 5 * 4


# Writing that fails


@pytest.fixture
def file_size_limit():
    """Let no file grow beyond a number of bytes, as a full disk does; None: let it again."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


@posix
def test_a_full_disk_is_an_error_for_each_photo_and_leaves_only_whole_files(
    explain, photo, tmp_path, file_size_limit
):
    other = paint(tmp_path / "2.png", 2)
    explain("--output-size", "100", photo)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    file_size_limit(3000)  # enough for the records, not for the pictures
    result = explain("--output-size", "1000", "--no-gallery", photo, other)
    file_size_limit(None)
    full = [
        f"error: {path}: its results cannot be written: File too large" for path in (photo, other)
    ]
    assert (result.status, result.stdout, result.stderr.splitlines()[1:-1]) == (1, "", full)
    assert {
        name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")
    } == before
    assert [error["image"] for error in records(tmp_path / "out")[1:]] == [str(photo), str(other)]
    assert "2 done" in explain("--output-size", "1000", "--skip-existing", photo, other).stderr


@posix
def test_a_record_for_which_there_was_no_room_is_written_by_the_next_run(
    explain, tmp_path, file_size_limit
):
    photos = [str(paint(tmp_path / "album" / f"{n}.png", n)) for n in range(3)]
    (tmp_path / "out").mkdir()
    notes = b"my notes\n" * 20_000
    (tmp_path / "out" / LOG_NAME).write_bytes(notes)
    file_size_limit(len(notes) + 50)  # enough for the pictures and for the beginning of a record
    result = explain("--outputs", "cam", tmp_path / "album")
    file_size_limit(None)
    assert (result.status, result.stdout, result.stderr.count("error: ")) == (1, "", 3)
    assert (tmp_path / "out" / LOG_NAME).read_bytes() == notes
    assert files_in(tmp_path / "out") == []
    assert "3 done" in explain("--outputs", "cam", "--skip-existing", tmp_path / "album").stderr
    lines = (tmp_path / "out" / LOG_NAME).read_bytes().removeprefix(notes).splitlines()
    assert [json.loads(line)["image"] for line in lines] == photos


def test_files_that_cannot_be_moved_to_their_place_are_an_error_and_written_by_the_next_run(
    explain, photo, tmp_path, monkeypatch
):
    """As it happens on Windows while another program has one of them open."""

    def refusing(*paths):
        raise PermissionError(13, "The process cannot access the file")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing)
        result = explain("--outputs", "cam", photo)
    assert (result.status, files_in(tmp_path / "out")) == (1, [])
    assert "cannot be written: The process cannot access the file" in result.stderr
    assert explain("--outputs", "cam", "--skip-existing", photo).status == 0
    assert files_in(tmp_path / "out") == [THREE[0]]
