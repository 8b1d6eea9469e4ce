"""Section 7, Output: what is drawn, the names and the content of files, and the log."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from conftest import CLASSES, files_in, last_records, paint, paths_of, pixels, posix, records
from filelock import FileLock
from matplotlib import colormaps, font_manager
from PIL import Image, ImageDraw

import cnn_visualizations as program_file
from cnn_visualizations import (
    LOG_NAME,
    Explainer,
    Log,
    OutputFile,
    draw_cam,
    draw_gradients,
    load_classifier,
    read_photo,
)

THREE = ["gradcam_cam_1.jpg", "gb_1.jpg", "gradcam_cam_gb_1.jpg"]
CHEAP = ["gradcam", "gradcam++", "xgradcam", "eigencam", "eigengradcam"]
CHEAP += ["hirescam", "layercam", "gradcamelementwise", "fem", "randomcam"]
pytestmark = pytest.mark.usefixtures("one_thread", "end_of_a_hang")


def contents(folder):
    """Return the content of every file in a folder but the log's, by name."""
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


# Drawing


def grey(height, width, value=128):
    return np.full((height, width, 3), value, np.uint8)


def jet(x):
    """Return the colours of "jet", (..., 3) from 0 to 255, by its definition: three trapezia."""
    channels = [np.clip(1.5 - np.abs(4 * x - peak), 0, 1) for peak in (3, 2, 1)]
    return 255 * np.stack(channels, -1)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1])
def test_the_colours_of_the_map_are_mixed_with_the_photo(alpha):
    cam = np.linspace(0, 1, 256, dtype=np.float32)[None]
    picture = grey(1, 256, 40)
    viridis = 255 * colormaps["viridis"](cam)[..., :3]

    for name, colours in (("jet", jet(cam)), ("viridis", viridis)):
        drawn = draw_cam(picture, cam, name, alpha)
        assert np.abs(drawn - ((1 - alpha) * 40 + alpha * colours)).max() <= 6, name
    assert np.array_equal(draw_cam(picture, cam), draw_cam(picture, cam, "jet", 0.5))


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_with_fade_the_opacity_is_alpha_times_the_map(alpha):
    cam = np.linspace(0, 1, 256, dtype=np.float32)[None]
    drawn = draw_cam(grey(1, 256, 40), cam, alpha=alpha, fade=True)

    opacity = alpha * cam[..., None]
    assert np.abs(drawn - ((1 - opacity) * 40 + opacity * jet(cam))).max() <= 6
    assert (drawn[0, 0] == 40).all()


def test_every_colormap_of_opencv_gives_its_colours():
    ramp = np.arange(256, dtype=np.uint8)[None]
    names = [name for name in dir(cv2) if name.startswith("COLORMAP_")]
    assert {"COLORMAP_JET", "COLORMAP_TURBO", "COLORMAP_TWILIGHT_SHIFTED"} <= set(names)

    for name in names:
        expected = cv2.applyColorMap(ramp, getattr(cv2, name))[:, :, ::-1]
        colormap = name.removeprefix("COLORMAP_").lower()
        drawn = draw_cam(grey(1, 256), np.float32(ramp / 255), colormap, 1)
        np.testing.assert_array_equal(drawn, expected)


def test_the_map_is_enlarged_linearly():
    drawn = draw_cam(grey(1, 4), np.array([[0, 1]], np.float32), alpha=1)
    assert np.abs(drawn - jet(np.array([[0, 0.25, 0.75, 1]]))).max() <= 6


@pytest.mark.parametrize(("height", "width"), [(80, 160), (160, 80)])
@pytest.mark.parametrize("cell", [(1, 6), (6, 1), (0, 0)])
def test_the_hottest_place_is_where_the_map_has_it(height, width, cell):
    picture = grey(height, width)
    cam = np.zeros((8, 8), np.float32)
    cam[cell] = 1
    given = cam.copy()

    drawn = draw_cam(picture, cam).astype(int)
    warmth = drawn[:, :, 0] - drawn[:, :, 2]  # red less blue
    hottest = np.argwhere(warmth == warmth.max()).mean(0) / (height / 8, width / 8)
    assert np.abs(hottest - np.add(cell, 0.5)).max() <= 0.5

    assert (picture == 128).all()  # not changed
    assert np.array_equal(cam, given)


@pytest.mark.parametrize("colormap", ["jet", "bone"])
def test_a_map_of_zeros_leaves_the_photo_as_it_is(colormap):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    drawn = draw_cam(picture, np.zeros((8, 8), np.float32), colormap, 0.9)
    np.testing.assert_array_equal(drawn, picture)


@pytest.mark.parametrize("unit", [1, 1e-20, 1e20])
def test_gradients_are_bright_where_positive_dark_where_negative_and_grey_at_zero(unit):
    values = np.zeros((3, 40, 40), np.float32)
    values[:, :4] = 2 * unit  # a tenth, so that this is the 99.5th percentile
    values[0, 10] = unit
    values[1, 11] = -unit
    values[2, 12] = -2 * unit
    values[:, 13, 5] = 1e6 * unit

    drawn = draw_gradients(values, 40, 40).astype(int)
    expected = {
        (0, 0): (255, 255, 255),
        (10, 0): (191, 128, 128),
        (11, 0): (128, 64, 128),
        (12, 0): (128, 128, 0),
        (13, 5): (255, 255, 255),
        (30, 30): (128, 128, 128),
    }
    for place, colour in expected.items():
        assert np.abs(drawn[place] - colour).max() <= 1, place


def test_gradients_of_one_channel_are_drawn_in_grey():
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    drawn = draw_gradients(values, 16, 8)
    expected = draw_gradients(values.repeat(3, axis=0), 16, 8)
    np.testing.assert_array_equal(drawn, expected)


def test_the_gradients_of_a_grey_network_are_drawn_in_grey(explain, photo, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=3)
    model.features[0] = torch.nn.Conv2d(1, 64, 3, 2)
    ckpt = tmp_path / "grey.pth"
    torch.save(model.state_dict(), ckpt)
    result = explain("--arch", "squeezenet1_1", "--format", "png", "--sheet", photo, ckpt=ckpt)
    assert result.status == 0, result.stderr
    for name in ("gb_1.png", "gradcam_cam_gb_1.png"):
        drawn = pixels(tmp_path / "out" / name)
        assert drawn.std() > 1
        assert (drawn == drawn[:, :, :1]).all()


def test_gradients_that_are_nearly_all_zero_are_seen_where_they_are():
    values = np.zeros((3, 8, 8), np.float32)
    assert np.isin(draw_gradients(values, 20, 10), (127, 128)).all()

    values[:, 2, 5] = 1e-3
    drawn = draw_gradients(values, 160, 80)[:, :, 0]
    assert drawn.shape == (80, 160)
    assert drawn.max() > 240
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert y * 8 // 80 == 2
    assert x * 8 // 160 == 5


# Pictures


def places(sheet, picture):
    """Return the corners (left, top) of all exact copies of a picture in a larger one."""
    sheet = np.uint8(sheet)
    picture = np.uint8(picture)
    height, width = picture.shape[:2]

    corners = []
    for y, x in np.argwhere(cv2.matchTemplate(sheet, picture, cv2.TM_SQDIFF) < 1e5):
        if np.array_equal(sheet[y : y + height, x : x + width], picture):
            corners.append((int(x), int(y)))
    return corners


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((1500, 1000), "", (683, 1024)),
        ((500, 1025), "", (1024, 500)),
        ((60, 40), "", (224, 336)),
        ((30, 20), "--output-size 300", (200, 300)),
        ((1500, 1000), "--output-size 1200", (800, 1200)),
        ((1500, 15), "", (10, 1024)),
    ],
)
def test_the_sides_are_the_photos_from_224_to_1024_or_what_is_asked_for(
    explain, tmp_path, size, options, expected
):
    photo = paint(tmp_path / "1.png", 1, size)
    result = explain("--resize", "squash", "--outputs", "cam", *options.split(), photo)
    assert result.status == 0
    assert pixels(tmp_path / "out" / THREE[0]).shape == (*expected, 3)


def test_the_picture_shows_what_the_network_sees_pixel_by_pixel(explain, tmp_path):
    photo = paint(tmp_path / "1.png", 1, (440, 260))
    picture = tmp_path / "out" / "gradcam_cam_1.png"
    options = ["--alpha", "0", "--outputs", "cam", "--format", "png", photo]
    explain("--resize", "squash", *options)
    np.testing.assert_array_equal(pixels(picture), pixels(photo))

    explain(*options)
    seen = pixels(picture)
    ((left, top),) = places(pixels(photo), seen)
    height, width, _ = seen.shape
    assert abs(height - width) <= 1  # torchvision rounds the sides
    assert abs(left - (440 - width) / 2) <= 2
    assert abs(top - (260 - height) / 2) <= 2


ARRAYS = ["--save-arrays", "--method", "gradcam,fem", "--format", "png", "--alpha", "1"]
ARRAYS += ["--resize", "squash", "--target-class", "owl", "--target-class", "4"]


def test_the_arrays_are_those_of_the_explainer(explain, tiny, tmp_path):
    photo = paint(tmp_path / "1.png", 1, (64, 64))
    assert explain(*ARRAYS, photo).status == 0
    with np.load(tmp_path / "out" / "1.npz", allow_pickle=False) as saved:
        arrays = dict(saved)

    kinds = {
        "cams": "f4 (2, 2, 64, 64)",
        "guided": "f4 (2, 3, 64, 64)",
        "logits": "f4 (7,)",
        "classes": "i8 (2,)",
    }
    for name, kind in kinds.items():
        assert f"{arrays[name].dtype.str[1:]} {arrays[name].shape}" == kind
    assert arrays["methods"].tolist() == ["gradcam", "fem"]
    assert arrays["classes"].tolist() == [3, 4]
    assert arrays["class_names"].tolist() == CLASSES
    assert arrays["target_layers"].tolist() == ["features"]
    assert arrays["box"].tolist() == [0, 0, 64, 64]

    classifier = load_classifier(ckpt=tiny[0], device="cpu", resize="squash")
    inputs = classifier.preprocess(read_photo(photo))[None]
    expected = Explainer(tiny[1], ["gradcam", "fem"])(inputs, [[3, 4]])
    np.testing.assert_allclose(arrays["logits"], expected.logits[0], atol=1e-4)
    for index, method in enumerate(["gradcam", "fem"]):
        np.testing.assert_allclose(arrays["cams"][index], expected.cams[method][0], atol=1e-3)
    largest = np.abs(arrays["guided"]).max()
    np.testing.assert_allclose(arrays["guided"], expected.guided[0], atol=1e-3 * largest)


def test_the_pictures_are_drawn_from_the_arrays_that_are_saved(explain, tmp_path):
    out = tmp_path / "out"
    photo = paint(tmp_path / "1.png", 1, (64, 64))
    assert explain(*ARRAYS, "--output-size", "64", photo).status == 0
    with np.load(out / "1.npz", allow_pickle=False) as saved:
        cams = saved["cams"][0]
        guided = saved["guided"]

    for index, label in enumerate(("owl", "fox")):
        heat = pixels(out / f"gradcam_cam_1_{label}.png")
        assert np.abs(heat - jet(cams[index])).max() <= 10

        product = draw_gradients(guided[index] * cams[index], 64, 64)
        np.testing.assert_array_equal(pixels(out / f"gradcam_cam_gb_1_{label}.png"), product)
        gradients = draw_gradients(guided[index], 64, 64)
        np.testing.assert_array_equal(pixels(out / f"gb_1_{label}.png"), gradients)


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_each_format_is_what_its_name_says_and_has_the_colours(explain, tmp_path, ending, kind):
    photo = paint(tmp_path / "1 狗.v2.png", 1, (400, 300))
    picture = tmp_path / "out" / f"gradcam_cam_1 狗.v2.{ending}"
    options = ["--alpha", "0", "--resize", "squash", "--outputs", "cam", "--format", ending, photo]

    sizes = []
    for quality in ("30", "98"):
        assert explain("--quality", quality, *options).status == 0
        assert files_in(tmp_path / "out") == [picture.name]
        sizes.append(picture.stat().st_size)
    assert sizes[0] * 2 < sizes[1] or ending == "png"

    with Image.open(picture) as image:
        assert image.format == kind
        assert image.mode == "RGB"
    assert np.abs(pixels(picture) - pixels(photo)).mean() < 3


def test_a_map_of_zeros_is_drawn_without_colour_and_told(explain, photo, tmp_path, texts):
    options = ["--resize", "squash", "--format", "png", "--output-size", "90"]
    options += ["--method", "gradcamelementwise,eigencam"]
    result = explain("--sheet", "--target-class", "cat", *options, photo)
    assert result.status == 0
    assert result.stderr.count("warning: ") == 1
    subject = f"{photo}: the gradcamelementwise map for cat"
    reason = "no positive evidence at features"
    assert f"warning: {subject} is all zeros: {reason}\n" in result.stderr

    out = tmp_path / "out"
    np.testing.assert_array_equal(pixels(out / "gradcamelementwise_cam_1_cat.png"), pixels(photo))
    assert np.isin(pixels(out / "gradcamelementwise_cam_gb_1_cat.png"), (127, 128)).all()
    assert (pixels(out / "eigencam_cam_1_cat.png") != pixels(photo)).any()
    assert "no positive evidence" in [text for text, _, _ in texts]


def test_fade_leaves_the_photo_as_it_is_where_the_map_is_cold(explain, tmp_path):
    photo = paint(tmp_path / "1.png", 1, (320, 320))
    options = ["--resize", "squash", "--format", "png", "--save-arrays", "--outputs", "cam"]
    assert explain(*options, "--sheet", "--fade", "--alpha", "1", photo).status == 0
    faded = pixels(tmp_path / "out" / "gradcam_cam_1.png")
    with np.load(tmp_path / "out" / "1.npz") as arrays:
        cam = cv2.resize(arrays["cams"][0, 0], (320, 320))

    difference = np.abs(faded - pixels(photo)).max(2)
    assert difference[cam < 0.01].max() <= 3
    assert difference[cam > 0.9].max() > 50
    assert len(places(pixels(tmp_path / "out" / "1_sheet.png"), faded)) == 1


# Names of files


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("", THREE),
        ("--top-k 1 --outputs gb,cam", ["gb_1.jpg", "gradcam_cam_1.jpg"]),
        (
            "--method eigencam --method gradcam++ --outputs cam,gb",
            ["eigencam_cam_1.jpg", "gradcam++_cam_1.jpg", "gb_1.jpg"],
        ),
        (
            "--target-class OWL",
            ["gradcam_cam_1_owl.jpg", "gb_1_owl.jpg", "gradcam_cam_gb_1_owl.jpg"],
        ),
        (
            "--target-class 2 --target-class cat --outputs cam",
            ["gradcam_cam_1_狗.jpg", "gradcam_cam_1_cat.jpg"],
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
    result = explain(*options.split(), photo)
    assert result.status == 0
    assert files_in(tmp_path / "out") == sorted(names)
    paths = [tmp_path / "out" / name for name in names]
    assert result.stdout.partition(" -> ")[2] == ", ".join(map(str, paths)) + "\n"

    (record,) = records(tmp_path / "out")
    assert sorted(paths_of(record, tmp_path / "out")) == sorted(paths)
    assert record["sizes"] == {path.name: path.stat().st_size for path in paths}


def test_the_record_says_which_file_is_what(explain, tmp_path):
    photo = paint(tmp_path / "album" / "x" / "1.png", 1)
    options = ["--target-class", "owl", "--target-class", "fox", "--sheet", "--save-arrays"]
    explain(*options, tmp_path / "album")

    (record,) = records(tmp_path / "out")
    assert record["image"] == str(photo)
    assert record["output_stem"] == "x/1"
    assert record["files"] == {"sheet": "x/1_sheet.jpg", "arrays": "x/1.npz"}
    assert [entry["name"] for entry in record["classes"]] == ["owl", "fox"]
    assert record["classes"][1]["files"] == {
        "gradcam_cam": "x/gradcam_cam_1_fox.jpg",
        "gb": "x/gb_1_fox.jpg",
        "gradcam_cam_gb": "x/gradcam_cam_gb_1_fox.jpg",
    }


def test_another_class_in_another_run_overwrites_nothing(explain, photo, tmp_path):
    explain("--target-class", "owl", photo)
    before = contents(tmp_path / "out")
    explain("--target-class", "fox", photo)
    explain(photo)

    after = contents(tmp_path / "out")
    assert len(after) == 9
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ("a/b|c_d|e:f*|Siberian husky|哈士奇|x|v1.2", "a-b|c-d|e-f|Siberian-husky|哈士奇|x|v1.2"),
        ("a b|a_b|...|d|e|f|g", "0-a-b|1-a-b|2|3-d|4-e|5-f|6-g"),
        ("Cat|cat|c|d|e|f|g", "0-Cat|1-cat|2-c|3-d|4-e|5-f|6-g"),
        (
            f"../../etc|{'狗' * 300}|{'狗' * 301}|\n|\0|..|g",
            f"0-etc|1-{'狗' * 40}|2-{'狗' * 40}|3|4|5|6-g",
        ),
    ],
)
def test_class_names_become_labels_that_differ_and_can_stand_in_file_names(
    explain, photo, tmp_path, names, labels
):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(names.split("|")), encoding="utf-8")
    result = explain("--class-names", path, "--top-k", "7", "--outputs", "gb", photo)
    assert result.status == 0
    expected = [f"gb_1_{label}.jpg" for label in labels.split("|")]
    assert files_in(tmp_path / "out") == sorted(expected)


# The sheet


@pytest.fixture
def texts(monkeypatch):
    """What is written on sheets: text, top, font."""
    written = []
    write = ImageDraw.ImageDraw.text

    def record(pen, place, text, fill, **options):
        written.append((text, place[1], pen.font))
        return write(pen, place, text, fill, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return written


SHEET = ["--sheet", "--format", "png", "--output-size", "320", "--method", "gradcam,layercam"]
SHEET += ["--target-class", "fox", "--target-class", "owl"]


def test_a_sheet_has_a_block_for_each_class_with_source_and_gb_once(explain, photo, tmp_path):
    out = tmp_path / "out"
    assert explain(*SHEET, "--alpha", "0.7", photo).status == 0
    explain(*SHEET[1:5], "--alpha", "0", "--outputs", "cam", photo, output=tmp_path / "source")
    sheet = pixels(out / "1_sheet.png")
    sources = places(sheet, pixels(tmp_path / "source" / "gradcam_cam_1.png"))
    assert len(sources) == 2

    for (left, top), label in zip(sources, ("fox", "owl"), strict=True):
        ((gb_left, gb_top),) = places(sheet, pixels(out / f"gb_1_{label}.png"))
        assert gb_left == left
        assert gb_top > top

        for method in ("gradcam", "layercam"):
            ((cam_left, cam_top),) = places(sheet, pixels(out / f"{method}_cam_1_{label}.png"))
            assert cam_left >= left + 320
            assert cam_top == top
            product = pixels(out / f"{method}_cam_gb_1_{label}.png")
            assert places(sheet, product) == [(cam_left, gb_top)]
            left = cam_left


def test_the_texts_of_a_sheet_say_what_is_shown(explain, photo, texts):
    result = explain(*SHEET, photo)
    words = [text for text, _, _ in texts]
    prediction = result.stdout.split(": ")[1].split()[0]
    title = min(texts, key=lambda text: text[1])[0]
    assert re.fullmatch(rf"1.png +prediction: {prediction} [\d.]+ +layer: features", title)

    headings = [word.rpartition(" ")[0] for word in words if word.startswith("explained: ")]
    assert headings == ["explained: fox", "explained: owl"]
    for method in ("gradcam", "layercam"):
        assert words.count(f"{method} cam") == 2
        assert words.count(f"{method} cam_gb") == 2
    assert words.count("source") == 2
    assert words.count("gb") == 2


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
    words = [text for text, _, _ in texts]
    assert all(f"{method} cam" in words for method in CHEAP)


@pytest.mark.parametrize(
    "methods",
    ["gradcam", pytest.param(",".join([*CHEAP, "kpcacam", "segeigencam"]), marks=pytest.mark.slow)],
)
def test_a_sheet_of_many_classes_is_no_taller_than_a_webp_can_be(explain, photo, tmp_path, methods):
    ckpt = tmp_path / "30.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=30).state_dict(), ckpt)
    options = ["--input-size", "64", "--output-size", "64", "--top-k", "30", "--sheet"]
    options += ["--format", "webp", "--outputs", "cam,cam_gb", "--method", methods]
    result = explain(*options, photo, ckpt=ckpt)
    assert result.status == 0
    assert "warning: a sheet has room for" in result.stderr
    assert pixels(tmp_path / "out" / "1_sheet.webp").shape[0] <= 16_383
    assert len(files_in(tmp_path / "out")) == 1 + 60 * len(methods.split(","))


def test_a_sheet_of_a_narrow_picture_has_room_for_its_title(explain, tmp_path, texts):
    explain("--sheet", "--resize", "squash", paint(tmp_path / "1.png", 1, (80, 800)))
    (title,) = [text for text, _, _ in texts if text.startswith("1.png")]
    assert "layer: features" in title


def has_glyphs(font, text):
    """Return whether a font has all characters, by its own table."""
    from fontTools.ttLib import TTFont

    table = TTFont(font.path, fontNumber=0, lazy=True).getBestCmap()
    return {ord(c) for c in text} <= table.keys()


def title_on(texts):
    """Return the title of a sheet and its font."""
    ((title, _, font),) = [entry for entry in texts if "prediction" in entry[0]]
    return title, font


@pytest.mark.parametrize("name", ["1.png", "照片.png"])
def test_a_font_that_has_the_class_names_is_looked_for(explain, tmp_path, texts, name):
    if not any("CJK" in path for path in font_manager.findSystemFonts()):
        pytest.skip("no font with Chinese is installed")
    explain("--sheet", "--target-class", "2", paint(tmp_path / name, 1))
    title, font = title_on(texts)
    shown = "".join(text for text, _, _ in texts)
    assert name in title
    assert "explained: 狗 " in shown
    assert has_glyphs(font, shown)


@pytest.mark.parametrize(("name", "shown"), [("1.png", "1.png"), ("照片.png", "??.png")])
def test_for_class_names_in_ascii_no_font_is_looked_for(explain, tmp_path, texts, name, shown):
    names = "cat,dog,cow,owl,fox,eel,ant"
    photo = paint(tmp_path / name, 1)
    explain("--sheet", "--target-class", "2", "--class-names", names, photo)
    title, _ = title_on(texts)
    assert title.startswith(shown)
    assert any(text.startswith("explained: cow ") for text, _, _ in texts)


def test_without_a_font_for_them_class_names_show_with_their_index(
    explain, tmp_path, texts, monkeypatch
):
    font = tmp_path / "broken.ttf"
    font.write_bytes(b"not a font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: [str(font)])
    result = explain("--sheet", "--target-class", "狗", paint(tmp_path / "照片.png", 1))
    assert result.status == 0
    assert "狗" in result.stdout

    shown = [text for text, _, _ in texts]
    assert all(text.isascii() for text in shown)
    assert any(text.startswith("explained: 2: 0.") for text in shown)


# The log


def test_a_later_run_that_fails_drops_nothing_from_the_log(explain, photo, tmp_path):
    explain(photo)
    before = (tmp_path / "out" / LOG_NAME).read_bytes()
    result = explain("--target-layer", "nope", photo)
    assert result.status == 2
    assert result.stdout == ""
    assert (tmp_path / "out" / LOG_NAME).read_bytes() == before
    assert files_in(tmp_path / "out") == sorted(THREE)


def test_the_log_only_grows_and_the_last_line_counts(explain, photo, tmp_path):
    log = tmp_path / "out" / LOG_NAME
    before = b""
    runs = [("gradcam", "0.5"), ("eigencam", "0.5"), ("gradcam", "0.5"), ("gradcam", "0.2")]
    for method, alpha in runs:
        explain("--outputs", "cam", "--method", method, "--alpha", alpha, photo)
        content = log.read_bytes()
        assert content.startswith(before)
        assert content.count(b"\n") == before.count(b"\n") + 1
        before = content

    runs = [("gradcam", "0.5", 1), ("gradcam", "0.2", 1), ("gradcam", "0.2", 0)]
    for method, alpha, done in [*runs, ("eigencam", "0.5", 0)]:
        options = ["--skip-existing", "--outputs", "cam", "--method", method, "--alpha", alpha]
        assert explain(*options, photo).stdout.count("\n") == done, (method, alpha)


HOSTILE = [
    b'{"epoch": 1, "loss": 0.3}\nmy notes\n\n',
    b"[" * 200_000 + b"\n",
    b'{"image": "caf\xe9", "method": "gradcam"}\n\x00\x00\x00\n\xef\xbb\xbf{}\n',
    b'{"image": 7, "method": "gradcam"}\n{"image": "1.png", "method": ["gradcam"]}\n',
    b"9" * 5000 + b"\nnull\n",
    b'{"image": "1.png", "method": "gradcam", "files": null, "options": {}}\n',
    b'{"image": "1.png", "method": "gradcam", "files": ["gb_1.jpg"], "class": {}}\n',
    b'{"image": "1.png", "method": "gradcam", "files": {"a": "b"}, "sizes": [7], "metrics": 7}\n',
    b'{"image": "1.png", "method": "", "source": 7}\n',
    b'{"image": "a\\u0000b", "method": "gradcam", "files": {"a": "a\\u0000b", "b": "\\ud800"},'
    b' "output_stem": "../../\\u0000"}\n',
    b'{"image": "',
    b'{"image": "1.png", "method": "gradcam"}',
    '{"image": "狗'.encode()[:-1],
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_lines_that_are_not_ours_stay_and_do_no_harm(explain, tmp_path, content):
    """In the folder of the photos, where the log is also read to tell pictures from photos."""
    folder = tmp_path / "album"
    photo = paint(folder / "1.png", 1)
    log = folder / LOG_NAME
    log.write_bytes(content)
    options = ["--outputs", "cam", "--skip-existing", "--metrics", folder]
    assert explain(*options, output=folder).status == 0
    assert log.read_bytes().startswith(content)
    last = json.loads(log.read_bytes().splitlines()[-1])
    assert last["image"] == str(photo)
    assert files_in(folder) == ["1.png", "gradcam_cam_1.jpg"]
    assert "0 done, 1 skipped, 0 failed" in explain(*options, output=folder).stderr


def put(kind, place):
    """Put something of the user's at a place. Return a function that tells if it is still so."""
    place.parent.mkdir(exist_ok=True)
    victim = place.parent.parent / "victim"
    nowhere = place.parent.parent / "nowhere"
    victim.write_bytes(b"the only copy")
    if kind == "file":
        place.write_bytes(b"somebody's")
    elif kind == "folder":
        place.mkdir()
    elif kind == "FIFO":
        os.mkfifo(place)
    elif kind == "link":
        place.symlink_to(victim)
    else:
        place.symlink_to(nowhere)
    before = os.lstat(place)

    def is_unchanged():
        after = os.lstat(place)
        if kind == "file" and place.read_bytes() != b"somebody's":
            return False
        if nowhere.exists() or victim.read_bytes() != b"the only copy":
            return False
        return after.st_mode == before.st_mode and after.st_ino == before.st_ino

    return is_unchanged


@posix
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "folder"])
def test_a_log_that_is_no_file_is_refused_and_not_followed(explain, photo, tmp_path, kind):
    place = tmp_path / "out" / LOG_NAME
    is_unchanged = put(kind, place)
    result = explain(photo)
    assert result.status == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {place}: cannot be read: ")
    assert files_in(tmp_path / "out") == []
    assert is_unchanged()


@posix
@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "folder"])
def test_a_lock_that_is_no_file_is_not_followed(explain, photo, tmp_path, kind):
    is_unchanged = put(kind, tmp_path / "out" / ".results.lock")
    assert "Traceback" not in explain(photo).stderr
    assert is_unchanged()


FOREIGN = [("file", "gb_1.jpg"), ("file", "1_sheet.jpg"), ("file", "1.npz")]
FOREIGN += [(kind, "gb_1.jpg") for kind in ("link", "dangling link", "FIFO", "folder")]


@posix
@pytest.mark.parametrize("earlier", [False, True], ids=["new photo", "known photo"])
@pytest.mark.parametrize(("kind", "name"), FOREIGN)
def test_what_is_not_ours_is_never_overwritten(explain, photo, tmp_path, kind, name, earlier):
    """Where one of a photo's files would be, and the photo is new, or has other files there."""
    out = tmp_path / "out"
    options = ["--sheet", "--save-arrays", photo]
    if earlier:
        explain("--outputs", "cam_gb", photo)
    is_unchanged = put(kind, out / name)
    expected = files_in(out)
    for ours in (*THREE, "1_sheet.jpg", "1.npz"):
        expected.append(ours.replace("1", "1_2"))

    for _ in range(2):
        assert explain(*options).status == 0
        assert is_unchanged()
        assert files_in(out) == sorted(expected)
    assert "1 skipped" in explain("--skip-existing", *options).stderr


@posix
def test_no_temporary_name_can_be_foretold(explain, photo, tmp_path):
    names = []
    for name in (*THREE, LOG_NAME):
        names += [f"{name}.part", f"{name}.tmp", f".{name}.part", f".{name}.tmp"]
    unchanged = [put("link", tmp_path / "out" / name) for name in names]
    assert explain(photo).status == 0
    assert all(is_unchanged() for is_unchanged in unchanged)
    assert files_in(tmp_path / "out") == sorted(THREE + names)


def test_photos_called_dot_and_dot_dot_write_inside_of_the_output_folder(explain, tmp_path):
    photo = paint(tmp_path / "album" / "1.jpg", 1)
    photos = []
    for name in ("..jpg", "...jpg", "1.x.jpg"):
        photos.append(photo.with_name(name))
        photos[-1].write_bytes(photo.read_bytes())
    assert explain("--sheet", "--save-arrays", *photos).status == 0
    assert len(files_in(tmp_path / "out")) == 5 * 3
    assert len(files_in(tmp_path)) == 5 * 3 + 4


@pytest.mark.parametrize(
    ("length", "outputs", "written"),
    [(244, "gb", ["gb"]), (244, "gb,cam_gb", []), (253, "gb", [])],
)
def test_a_name_too_long_for_one_file_is_an_error_before_the_first(
    explain, tmp_path, length, outputs, written
):
    photo = paint(tmp_path / "1.png", 1).rename(tmp_path / ("x" * (length - 4) + ".png"))
    result = explain("--outputs", outputs, photo, paint(tmp_path / "2.png", 2))
    failed = not written
    assert result.status == int(failed)
    assert (f"error: {photo}: its results cannot be written: " in result.stderr) == failed
    assert ("error" in last_records(tmp_path / "out")[str(photo), "gradcam"]) == failed
    of_photo = [name for name in files_in(tmp_path / "out") if photo.stem in name]
    assert len(of_photo) == len(written)
    assert len(files_in(tmp_path / "out")) == len(written) + len(outputs.split(","))


# Photos of one name


def files_by_photo(photos, out):
    """Return the paths of each photo's files, as its last record has them."""
    found = last_records(out)
    return {photo: paths_of(found[str(photo), "gradcam"], out) for photo in photos}


def test_photos_of_one_name_keep_their_own_files_in_all_runs(explain, tmp_path):
    """Whatever is passed with them, in whatever order, and also when they are passed one by one."""
    out = tmp_path / "out"
    names = ["x/1.png", "y/1.png", "1.jpg", "y/1_2.png"]
    photos = [paint(tmp_path / name, seed) for seed, name in enumerate(names)]
    early = [photos[1], photos[0], photos[3]]
    options = ["--outputs", "gb", "--output-size", "90"]
    explain(*options, *early)
    files = files_by_photo(early, out)
    before = contents(out)

    for again in ([photos[0]], [photos[3], photos[1]], [photos[2], *early]):
        explain(*options, *again)
        assert files_by_photo(early, out) == files
        assert before.items() <= contents(out).items()
    assert len(files_in(out)) == 4
    result = explain("--skip-existing", *options, *photos)
    assert "0 done, 4 skipped" in result.stderr


def test_names_that_only_differ_in_case_are_two_photos(explain, tmp_path):
    album = tmp_path / "album"
    for seed, name in enumerate(("a.jpg", "A.jpg", "Stra\u00dfe.jpg", "STRASSE.jpg")):
        paint(album / name, seed)
    count = len(os.listdir(album))  # two or three, where the file system ignores case
    for skipped in (0, count, count):
        result = explain("--outputs", "cam", "--skip-existing", album)
        assert f"{count - skipped} done, {skipped} skipped" in result.stderr
        names = {name.casefold() for name in files_in(tmp_path / "out")}
        assert len(names) == count


def test_a_picture_of_one_photo_that_is_named_like_one_of_another_is_kept(explain, tmp_path):
    """The heatmap of gb_1.png is gradcam_cam_gb_1.jpg, as the product of 1.png is."""
    out = tmp_path / "out"
    photos = [paint(tmp_path / "1.png", 0), paint(tmp_path / "gb_1.png", 1)]
    for photo in photos:
        explain("--outputs", "cam", photo)
    before = (out / "gradcam_cam_gb_1.jpg").read_bytes()
    explain(photos[0])
    assert (out / "gradcam_cam_gb_1.jpg").read_bytes() == before

    explain(*photos)
    first, second = files_by_photo(photos, out).values()
    assert len({*first, *second}) == 6
    assert all(path.is_file() for path in first + second)


def test_the_next_free_number_of_many_photos_is_found_at_once(tmp_path, monkeypatch):
    tried = []
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path, **options: tried.append(path) or lstat(path))
    log = Log(tmp_path, 0)
    outputs = [OutputFile("gb", 0, "gb_{}.jpg", b"x")]

    for number in range(300):
        image = str(tmp_path / str(number) / "1.png")
        record = {"image": image, "method": "gradcam", "options": "0", "sizes": {}}
        record["classes"] = [{"files": {}}]
        assert log.write(record, "1", outputs)
        assert record["output_stem"] == (f"1_{number + 1}" if number else "1")
    log.close()
    assert sum("gb_1" in str(path) for path in tried) < 1000


def test_a_photo_is_known_from_whatever_folder_the_program_is_called(
    explain, tmp_path, monkeypatch
):
    cat = paint(tmp_path / "cats" / "1.png", 0)
    dog = paint(tmp_path / "dogs" / "1.png", 1)
    for photo in (cat, dog):
        monkeypatch.chdir(photo.parent)
        assert explain("--outputs", "cam", "1.png", output=Path("..") / "out").status == 0
    assert files_in(tmp_path / "out") == ["gradcam_cam_1.jpg", "gradcam_cam_1_2.jpg"]

    monkeypatch.chdir(tmp_path)
    again = explain("--outputs", "cam", "--skip-existing", "cats/1.png", dog, output="out")
    assert "0 done, 2 skipped" in again.stderr


@posix
def test_photos_and_results_are_known_through_a_link_to_their_folder(explain, tmp_path):
    photo = paint(tmp_path / "real" / "album" / "1.png", 1)
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "album").symlink_to(photo.parent)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    explain("--outputs", "cam", tmp_path / "album")

    for album, out in ((photo.parent, "out"), (tmp_path / "album", "disk/out")):
        options = ["--outputs", "cam", "--skip-existing", album]
        assert "0 done, 1 skipped" in explain(*options, output=tmp_path / out).stderr
    (record,) = records(tmp_path / "out")
    assert (tmp_path / "disk" / "out" / record["source"]).samefile(photo)


def test_folders_that_are_moved_together_are_gone_on_with(explain, tmp_path):
    paint(tmp_path / "here" / "album" / "1.png", 1)
    options = ["--outputs", "cam", "--skip-existing"]
    result = explain(*options, tmp_path / "here" / "album", output=tmp_path / "here" / "out")
    assert "1.png: " in result.stdout
    (tmp_path / "here").rename(tmp_path / "there")
    result = explain(*options, tmp_path / "there" / "album", output=tmp_path / "there" / "out")
    assert result.status == 0
    assert result.stdout == ""


@pytest.mark.parametrize("inner", [".", "results", "x"])
def test_in_the_photos_own_folder_no_photo_is_overwritten_and_no_picture_is_a_photo(
    explain, tmp_path, inner
):
    album = tmp_path / "album"
    for seed, name in enumerate(["1.jpg", "gb_1.jpg", "gradcam_cam_2.jpg", "2.png", "x/3.jpg"]):
        paint(album / name, seed)
    before = contents(album)
    for form in ("jpg", "png", "jpg"):
        result = explain("--format", form, "--sheet", album, output=album / inner)
        assert result.status == 0
        assert "5 done, 0 skipped, 0 failed" in result.stderr
        assert before.items() <= contents(album).items()

    assert len(files_in(album)) == 5 + 2 * 5 * 4
    paths = []
    for record in last_records(album / inner).values():
        paths += paths_of(record, album / inner)
    assert len(paths) == 5 * 4
    assert len(set(paths)) == 5 * 4


# Writing that fails


@pytest.fixture
def file_size_limit():
    """Let no file grow beyond a number of bytes, as a full disk does; None: let it again."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


@posix
def test_a_full_disk_is_an_error_for_each_photo_and_leaves_only_whole_files(
    explain, photo, tmp_path, file_size_limit
):
    out = tmp_path / "out"
    other = paint(tmp_path / "2.png", 2)
    explain("--output-size", "100", photo)
    before = contents(out)

    file_size_limit(3000)  # enough for the records, not for the pictures
    result = explain("--output-size", "1000", "--no-gallery", photo, other)
    file_size_limit(None)
    assert result.status == 1
    assert result.stdout == ""
    fault = "its results cannot be written: File too large"
    expected = [f"error: {path}: {fault}" for path in (photo, other)]
    assert result.stderr.splitlines()[1:-1] == expected

    assert contents(out) == before
    images = [record["image"] for record in records(out)[1:]]
    assert images == [str(photo), str(other)]
    again = explain("--output-size", "1000", "--skip-existing", photo, other)
    assert "2 done" in again.stderr


@posix
def test_a_record_for_which_there_was_no_room_is_written_by_the_next_run(
    explain, tmp_path, file_size_limit
):
    photos = [str(paint(tmp_path / "album" / f"{seed}.png", seed)) for seed in range(3)]
    out = tmp_path / "out"
    out.mkdir()
    notes = b"my notes\n" * 20_000
    (out / LOG_NAME).write_bytes(notes)

    file_size_limit(len(notes) + 50)  # enough for the pictures, and a part of a record
    result = explain("--outputs", "cam", tmp_path / "album")
    file_size_limit(None)
    assert result.status == 1
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 3
    assert (out / LOG_NAME).read_bytes() == notes
    assert files_in(out) == []

    again = explain("--outputs", "cam", "--skip-existing", tmp_path / "album")
    assert "3 done" in again.stderr
    lines = (out / LOG_NAME).read_bytes().removeprefix(notes).splitlines()
    assert [json.loads(line)["image"] for line in lines] == photos


@posix
def test_old_pictures_stay_where_there_is_no_room_for_the_new_record(
    explain, photo, tmp_path, file_size_limit
):
    out = tmp_path / "out"
    explain("--outputs", "cam", photo)
    with open(out / LOG_NAME, "ab") as log:
        log.write(b"my notes\n" * 20_000)
    before = contents(out)

    file_size_limit((out / LOG_NAME).stat().st_size + 50)
    assert explain("--outputs", "cam", "--alpha", "0.2", photo).status == 1
    file_size_limit(None)
    assert contents(out) == before


def test_files_that_cannot_be_moved_to_their_place_are_an_error_and_written_by_the_next_run(
    explain, photo, tmp_path, monkeypatch
):
    """As it happens on Windows while another program has one of them open."""

    def refusing(*paths):
        raise PermissionError(13, "The process cannot access the file")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing)
        result = explain("--outputs", "cam", photo)
    assert result.status == 1
    assert files_in(tmp_path / "out") == []
    assert "cannot be written: The process cannot access the file" in result.stderr
    assert explain("--outputs", "cam", "--skip-existing", photo).status == 0
    assert files_in(tmp_path / "out") == [THREE[0]]


def test_what_killed_processes_leave_is_removed_and_nothing_else(explain, photo, tmp_path):
    out = tmp_path / "out"
    for name in ("dead", "without_lock", "alive", "notes"):
        folder = out / f".part-{name}"
        folder.mkdir(parents=True)
        (folder / "0").write_bytes(b"half a picture")
    (out / ".part-dead" / "lock").touch()
    (out / ".part-notes" / "notes.txt").write_bytes(b"mine")

    with FileLock(out / ".part-alive" / "lock"):
        assert explain("--outputs", "cam", photo).status == 0
        left = {path.name for path in out.glob(".part-*")}
        assert left == {".part-alive", ".part-notes"}
        assert (out / ".part-alive" / "0").exists()
    assert (out / ".part-notes" / "notes.txt").read_bytes() == b"mine"


def test_an_output_folder_that_cannot_be_written_to_is_one_line(explain, photo, monkeypatch):
    def refusing(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(program_file.tempfile, "mkdtemp", refusing)
    result = explain(photo)
    assert result.status == 2
    assert result.stderr.splitlines()[-1].endswith("cannot be written: Permission denied")
