"""Room 6, pictures: what is drawn, how large, under which names, and that no file is ever half written."""

import contextlib
import errno
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFont

import cnn_visualizations as program_file
from cnn_visualizations import (
    COLORMAPS,
    Look,
    Photo,
    Wanted,
    draw,
    draw_cam,
    draw_gradients,
    draw_sheet,
    file_labels,
    find_font,
    find_places,
    has_glyphs,
    is_ours,
    mark_of,
    may_write,
    seen_picture,
    write_arrays,
    write_picture,
)

ALL = ("cam", "gb", "cam_gb")
LOOK = Look()
PHOTO = "photos/dog.jpg"


def photo_of(height, width):
    """A photo whose red tells each pixel's row and whose green its column, modulo 256."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows % 256, columns % 256, np.zeros_like(rows)], 2).astype(np.uint8)
    return Photo(Path("photo.jpg"), pixels)


def grey(height, width, value=128):
    return np.full((height, width, 3), value, np.uint8)


def gradients(height=8, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((3, height, width)).astype(np.float32)


def one_cell(row, column, height=8, width=8):
    cam = np.zeros((height, width), np.float32)
    cam[row, column] = 1
    return cam


# The part that the network saw


def test_the_seen_part_is_cut_out_at_the_photos_own_resolution():
    photo = photo_of(100, 200)
    picture = seen_picture(photo, (50, 10, 140, 90))
    np.testing.assert_array_equal(picture, photo.pixels[10:90, 50:140])


@pytest.mark.parametrize(
    ("height", "width", "long_side", "expected"),
    [
        (2000, 3000, None, (683, 1024)),
        (3000, 2000, None, (1024, 683)),
        (1025, 1025, None, (1024, 1024)),
        (1024, 512, None, (1024, 512)),
        (30, 20, None, (30, 20)),
        (2000, 3000, 1500, (1000, 1500)),
        (30, 20, 300, (300, 200)),
        (3000, 2000, 16, (16, 11)),
        (8, 20_000, None, (1, 1024)),
    ],
)
def test_the_long_side_is_at_most_1024_unless_said_otherwise(height, width, long_side, expected):
    picture = seen_picture(photo_of(height, width), (0, 0, width, height), long_side)
    assert picture.shape == (*expected, 3)
    assert picture.dtype == np.uint8


def test_a_box_of_fractions_of_a_pixel_stays_within_the_photo():
    photo = photo_of(20, 30)
    box = (4.6, 0.3, 24.4, 20.0)
    picture = seen_picture(photo, box)
    assert picture.shape[0] in (19, 20, 21)
    assert picture.shape[1] in (19, 20, 21)
    assert abs(int(picture[0, 0, 1]) - box[0]) <= 1
    assert abs(int(picture[-1, -1, 1]) + 1 - box[2]) <= 1


@pytest.mark.parametrize("side", [101, 557, 1024])
def test_a_square_box_gives_a_square_picture(side):
    assert seen_picture(photo_of(1100, 1200), (0.4, 0.6, 0.4 + side, 0.6 + side)).shape == (side, side, 3)


# The heatmap


def test_heat_is_red_where_the_map_is_one_and_blue_where_it_is_zero():
    hot, cold = (draw_cam(grey(6, 9), np.full((4, 4), value, np.float32), LOOK) for value in (1, 0))
    assert (hot[:, :, 0].astype(int) > hot[:, :, 1:].max(2) + 40).all()
    assert (cold[:, :, 2].astype(int) > cold[:, :, :2].max(2) + 40).all()


def test_heat_and_photo_are_half_and_half():
    dark, bright = (
        draw_cam(grey(6, 9, value), np.full((4, 4), 0.5, np.float32), LOOK).astype(int) for value in (40, 200)
    )
    assert np.abs(bright - dark - 80).max() <= 1


def test_heat_rises_with_the_map():
    cam = np.linspace(0, 1, 60, dtype=np.float32)[None].repeat(60, 0)
    drawn = draw_cam(grey(60, 60), cam, LOOK).astype(int)
    warmth = drawn[30, :, 0] - drawn[30, :, 2]
    cold, middle, hot = (part.mean() for part in np.split(warmth, 3))
    assert cold < middle - 40
    assert middle + 40 < hot
    assert abs(middle) < 20


@pytest.mark.parametrize(("height", "width"), [(80, 160), (160, 80), (80, 80)])
@pytest.mark.parametrize(("row", "column"), [(1, 6), (6, 1), (0, 0), (7, 7)])
def test_heat_lies_where_the_map_says(height, width, row, column):
    drawn = draw_cam(grey(height, width), one_cell(row, column), LOOK).astype(int)
    y, x = np.unravel_index((drawn[:, :, 0] - drawn[:, :, 2]).argmax(), (height, width))
    assert row <= y / height * 8 <= row + 1
    assert column <= x / width * 8 <= column + 1


def test_drawing_changes_neither_picture_nor_map():
    picture, cam = grey(8, 8), one_cell(3, 3)
    before = picture.copy(), cam.copy()
    draw_cam(picture, cam, LOOK)
    np.testing.assert_array_equal(picture, before[0])
    np.testing.assert_array_equal(cam, before[1])


# The gradients


def test_zero_gradients_are_grey():
    drawn = draw_gradients(np.zeros((3, 8, 8), np.float32), 20, 10)
    assert drawn.shape == (10, 20, 3)
    assert set(np.unique(drawn)) <= {127, 128}


def test_a_positive_gradient_is_bright_and_a_negative_one_dark():
    values = np.zeros((3, 4, 4), np.float32)
    values[:, 0, 0], values[:, 3, 3] = 1, -1
    drawn = draw_gradients(values, 4, 4)
    assert drawn[0, 0].tolist() == [255] * 3
    assert drawn[3, 3].max() <= 1
    assert set(np.unique(drawn[1:3, 1:3])) <= {127, 128}


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_each_channel_of_the_gradients_has_its_own_colour(channel):
    values = np.zeros((3, 8, 8), np.float32)
    values[channel] = 2
    drawn = draw_gradients(values, 8, 8)
    assert (drawn[:, :, channel] == 255).all()
    assert np.isin(np.delete(drawn, channel, axis=2), (127, 128)).all()


def test_a_few_extreme_pixels_do_not_turn_all_others_grey():
    values = gradients(64, 64)
    values[0, 5, 5] = 1e6
    assert draw_gradients(values, 64, 64).astype(float).std() > 30


@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
def test_the_unit_of_the_gradients_does_not_matter(scale):
    np.testing.assert_allclose(
        draw_gradients(gradients() * np.float32(scale), 8, 8).astype(int), draw_gradients(gradients(), 8, 8), atol=1
    )


def test_gradients_keep_their_place_when_enlarged():
    values = np.zeros((3, 8, 8), np.float32)
    values[:, 2, 5] = 1
    y, x = np.unravel_index(draw_gradients(values, 160, 80)[:, :, 0].argmax(), (80, 160))
    assert (y * 8 // 80, x * 8 // 160) == (2, 5)


# All three


@pytest.mark.parametrize(("height", "width"), [(30, 30), (33, 57), (1, 40)])
@pytest.mark.parametrize("output", ALL)
def test_all_three_pictures_are_as_large_as_the_photos_part(height, width, output):
    drawn = draw(output, grey(height, width), np.random.rand(8, 8).astype(np.float32), gradients(), LOOK)
    assert (drawn.shape, drawn.dtype) == ((height, width, 3), np.uint8)


def test_the_heatmap_needs_no_gradients():
    np.testing.assert_array_equal(
        draw("cam", grey(9, 9), one_cell(1, 1), None, LOOK), draw_cam(grey(9, 9), one_cell(1, 1), LOOK)
    )


def test_the_product_is_grey_where_the_map_is_zero_and_not_where_it_is_one():
    cam = np.zeros((8, 8), np.float32)
    cam[:, :4] = 1
    drawn = draw("cam_gb", grey(8, 8), cam, gradients(), LOOK).astype(float)
    assert np.isin(drawn[:, 4:], (127, 128)).all()
    assert drawn[:, :4].std() > 30


def test_the_product_with_a_map_that_is_zero_everywhere_is_grey():
    drawn = draw("cam_gb", grey(8, 8), np.zeros((8, 8), np.float32), gradients(), LOOK)
    assert np.isin(drawn, (127, 128)).all()


# Looks


def test_the_colormaps_are_those_of_opencv():
    theirs = {name.removeprefix("COLORMAP_").lower(): getattr(cv2, name) for name in dir(cv2) if "COLORMAP_" in name}
    assert list(COLORMAPS) == sorted(theirs, key=theirs.get)


@pytest.mark.parametrize("colormap", ["jet", "viridis", "bone", "twilight_shifted"])
def test_a_colormap_gives_opencvs_colours(colormap):
    ramp = np.arange(256, dtype=np.uint8)[None]
    expected = cv2.applyColorMap(ramp, getattr(cv2, f"COLORMAP_{colormap.upper()}"))[:, :, ::-1]
    drawn = draw_cam(grey(1, 256), ramp.astype(np.float32) / 255, Look(colormap, alpha=1))
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_alpha_says_how_strong_the_heat_is():
    picture, cam = texture(8, 8), one_cell(3, 3)
    np.testing.assert_array_equal(draw_cam(picture, cam, Look(alpha=0)), picture)
    heat = draw_cam(picture, cam, Look(alpha=1)).astype(float)
    np.testing.assert_array_equal(heat, draw_cam(grey(8, 8), cam, Look(alpha=1)))
    quarter = draw_cam(picture, cam, Look(alpha=0.25))
    assert np.abs(quarter - (0.75 * picture + 0.25 * heat)).max() <= 1


# The sheet


def columns_of(sheet, count, top, bottom):
    """The parts of a sheet's row where its pictures stand: 320 pixels each with 8 between them."""
    return [sheet[top:bottom, 8 + 328 * column : 328 + 328 * column] for column in range(count)]


def test_a_sheet_has_a_row_for_each_caption_with_the_source_and_the_pictures_under_it():
    colours = [grey(100, 200, value) for value in (10, 60, 110, 160)]
    rows = [("gradcam   dog 0.9", colours[1:3]), ("scorecam   dog 0.9", colours[2:])]
    sheet = draw_sheet(colours[0], ["cam", "gb"], rows)
    assert sheet.shape == (40 + 2 * (40 + 160) + 8, 3 * 328 + 8, 3)
    for number, values in enumerate([(10, 60, 110), (10, 110, 160)]):
        top = 40 + number * 200
        for cell, value in zip(columns_of(sheet, 3, top + 40, top + 200), values, strict=True):
            assert (cell == value).all()
        assert (sheet[top : top + 40] == 0).all(2).sum() > 100  # black on white: the caption
    assert (sheet[:40] < 200).any(2).sum() > 100  # the headings


def test_captions_differ_where_their_words_do():
    first, second = (draw_sheet(grey(9, 9), [], [(name, [])])[40:80] for name in ("gradcam pug", "gradcam husky"))
    assert (first != second).any()


def test_a_caption_that_is_too_long_is_cut_off_within_the_sheet():
    sheet = draw_sheet(grey(9, 9), [], [("wire-haired fox terrier " * 20, [])])
    assert (sheet[40:80, -8:] == 255).all()
    assert (sheet[40:80, -60:-8] == 0).any()


def test_a_sheet_of_many_rows_is_no_taller_than_a_webp_can_be(capsys):
    sheet = draw_sheet(grey(90, 90), ["cam"], [("caption", [grey(90, 90)])] * 300)
    assert sheet.shape[0] <= 16_000
    assert "100 are left out" in capsys.readouterr().err


def test_pillows_own_font_has_latin_letters_and_no_chinese_ones():
    font = find_font("Gras")
    assert has_glyphs(font, "Siberian husky 0.487 (wire-haired)")
    assert not has_glyphs(ImageFont.load_default(24), "哈士奇")


def test_a_font_for_chinese_is_found_or_said_to_be_missing(capsys, monkeypatch):
    find_font.cache_clear()
    font, said = find_font("哈士奇"), capsys.readouterr().err
    assert has_glyphs(font, "哈士奇") != ("哈士奇" in said)
    find_font.cache_clear()
    monkeypatch.setattr(program_file, "installed_fonts", lambda: ())
    assert not has_glyphs(find_font("哈士奇"), "哈")
    assert "no installed font has 哈士奇" in capsys.readouterr().err
    missing, marks = (draw_sheet(grey(9, 9), [], [(caption, [])]) for caption in ("哈士奇 0.5", "??? 0.5"))
    np.testing.assert_array_equal(missing, marks)
    find_font.cache_clear()


def test_captions_that_differ_in_their_numbers_share_one_font_and_one_note(capsys, monkeypatch):
    find_font.cache_clear()
    monkeypatch.setattr(program_file, "installed_fonts", lambda: ())
    for number in range(5):
        draw_sheet(grey(9, 9), ["cam"], [(f"gradcam   哈士奇 0.{number}7{number}", [grey(9, 9)])])
    assert capsys.readouterr().err.count("note: ") == 1
    assert find_font.cache_info().currsize == 2  # for the caption, and for what is ASCII
    find_font.cache_clear()


def test_an_installed_font_is_taken_where_pillows_own_lacks_a_character(monkeypatch, tmp_path):
    find_font.cache_clear()
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    monkeypatch.setattr(program_file, "installed_fonts", lambda: (str(tmp_path / "broken.ttf"), "whole.ttf"))
    whole, load_font = ImageFont.load_default(30), program_file.load_font
    monkeypatch.setattr(program_file, "load_font", lambda path: whole if path == "whole.ttf" else load_font(path))
    monkeypatch.setattr(program_file, "has_glyphs", lambda font, characters: font is whole)
    assert find_font("哈") is whole
    find_font.cache_clear()


# Arrays


def test_arrays_are_read_back_as_they_were_and_without_pickles(tmp_path):
    arrays = {"cams": np.random.rand(2, 3).astype(np.float32), "class_names": np.array(["cat", "哈士奇"])}
    write_arrays(tmp_path / "a.npz", arrays, "dog.jpg")
    assert is_ours(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as read:
        assert set(read) == {"cams", "class_names", mark_of(tmp_path / "a.npz", "dog.jpg")}
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)


# Names


def test_pictures_are_named_after_method_and_photo():
    assert list(Wanted(["gradcam"], ALL).files("out/33").values()) == [
        Path("out/gradcam_cam_33.jpg"),
        Path("out/gb_33.jpg"),
        Path("out/gradcam_cam_gb_33.jpg"),
    ]


def test_several_methods_share_one_gb():
    names = [path.name for path in Wanted(["gradcam", "fem"], ["cam", "gb"]).files("33").values()]
    assert names == ["gradcam_cam_33.jpg", "fem_cam_33.jpg", "gb_33.jpg"]


def test_several_classes_stand_in_the_names():
    names = [path.name for path in Wanted(["gradcam"], ["cam", "gb"], "webp").files("33", ["cat", "dog"]).values()]
    assert names == ["gradcam_cam_33_cat.webp", "gb_33_cat.webp", "gradcam_cam_33_dog.webp", "gb_33_dog.webp"]


def test_sheet_and_arrays_have_names_of_their_own():
    files = Wanted(["gradcam"], ["cam"], "png", sheet=True, arrays=True).files("out/33", ["cat", "dog"])
    assert (files["sheet", "", ""], files["arrays", "", ""]) == (Path("out/33_sheet.png"), Path("out/33.npz"))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat", "Siberian husky", "哈士奇"], ["cat", "Siberian-husky", "哈士奇"]),
        (["a/b", "c_d", "e:f*"], ["a-b", "c-d", "e-f"]),
        (["a b", "a_b"], ["0-a-b", "1-a-b"]),
        (["Cat", "cat"], ["0-Cat", "1-cat"]),
        (["...", "cat"], ["0", "1-cat"]),
    ],
)
def test_class_labels_can_stand_in_file_names(names, labels):
    assert file_labels(names) == labels


def test_labels_have_no_underscore_and_are_all_different():
    labels = file_labels(["a_b", "a b", "a-b", "../../etc", "x" * 300, "x" * 301, "\n"])
    assert len(set(labels)) == 7
    assert all(re.fullmatch(r"[\w.+-]{1,70}", label) and "_" not in label for label in labels)


def planned(photos, folder, outputs=ALL):
    """The plan, after checking that no file is written twice and no photo is written over, whatever the case."""
    wanted = Wanted(["gradcam"], outputs)
    places = find_places([(str(photo), "") for photo in photos], Path(folder), wanted)
    plan = {Path(photo): wanted.files(place) for photo, place in places}
    assert list(plan) == [Path(photo) for photo in photos]
    files = [os.path.realpath(file).lower() for files in plan.values() for file in files.values()]
    assert len(files) == len(photos) * len(outputs) == len(set(files))
    assert set(files).isdisjoint(os.path.realpath(photo).lower() for photo in photos)
    return plan


def test_one_photo_has_the_plain_names():
    assert list(planned(["pics/33.jpg"], "out")[Path("pics/33.jpg")].values()) == [
        Path("out/gradcam_cam_33.jpg"),
        Path("out/gb_33.jpg"),
        Path("out/gradcam_cam_gb_33.jpg"),
    ]


def test_a_sheet_or_arrays_that_somebody_else_made_are_not_written_over(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"somebody's arrays")
    wanted = Wanted(["gradcam"], ["cam"], arrays=True)
    ((_, place),) = find_places([("a.jpg", "")], tmp_path, wanted)
    assert Path(place) == tmp_path / "a_2"


@pytest.mark.parametrize(
    "photos",
    [
        ["x/a.jpg", "y/a.jpg", "z/a.jpg"],
        ["a.jpg", "a.png"],
        ["A.jpg", "a.png"],
        ["x/Straße.jpg", "y/STRASSE.jpg"],
        ["a_2.jpg", "x/a.jpg", "y/a.jpg", "z/a_2.jpg"],
        ["x/a.jpg", "y/a.jpg", "a_2.jpg"],
        ["gb_a.jpg", "a.jpg"],
        ["cam_gb_a.jpg", "x/gb_a.jpg", "a.jpg"],
        ["照片.jpg", "照片.png", "v1.2.jpg", "v1.3.jpg"],
    ],
)
@pytest.mark.parametrize("outputs", [ALL, ["cam"], ["gb", "cam_gb"]])
@pytest.mark.parametrize("folder", ["out", "."])
def test_no_two_photos_have_the_same_picture(photos, folder, outputs):
    planned(photos, folder, outputs)


@pytest.mark.parametrize(
    "photos",
    [
        ["a.jpg", "gb_a.jpg"],
        ["gb_a.jpg", "a.jpg"],
        ["a.png", "gradcam_cam_a.jpg", "GB_A.JPG"],
        ["a.jpg", "gb_a.jpg", "gb_a_2.jpg", "gradcam_cam_gb_a_3.jpg"],
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_no_photo_is_written_over_in_its_own_folder(tmp_path, monkeypatch, photos, relative):
    monkeypatch.chdir(tmp_path)
    for photo in photos:
        (tmp_path / photo).write_bytes(b"a photo")
    planned(photos if relative else [tmp_path / photo for photo in photos], ".")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_no_photo_is_written_over_through_a_link_to_its_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    photos = [tmp_path / "photos" / name for name in ("a.jpg", "gb_a.jpg")]
    for photo in photos:
        photo.write_bytes(b"a photo")
    planned(photos, tmp_path / "link")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_what_a_link_among_the_photos_points_to_is_not_written_over(tmp_path):
    (tmp_path / "gb_a.jpg").write_bytes(b"the only copy")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gb_a.jpg")
    (tmp_path / "a.jpg").write_bytes(b"a photo")
    planned([tmp_path / "a.jpg", tmp_path / "link.jpg"], tmp_path)


# Writing


def texture(height=40, width=60):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4, columns * 3, 255 - rows * 4], 2).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.jpg", "照片 一.jpg", "v1.2 (copy).jpg", "Ünïcödé.jpg"])
def test_a_written_picture_is_a_jpeg_with_the_right_colours(tmp_path, name):
    write_picture(tmp_path / name, texture(), LOOK, PHOTO)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as read:
        assert (read.format, read.mode, read.size) == ("JPEG", "RGB", (60, 40))
        assert np.abs(np.asarray(read).astype(int) - texture()).mean() < 3


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_every_format_bears_our_mark_and_shows_the_picture(tmp_path, ending, kind):
    path, picture = tmp_path / f"a.{ending}", cv2.resize(texture(), (600, 400))
    write_picture(path, picture, Look(format=ending), PHOTO)
    assert is_ours(path)
    with Image.open(path) as read:
        assert (read.format, read.size, read.getexif()[ExifTags.Base.Software]) == (
            kind,
            (600, 400),
            mark_of(path, PHOTO),
        )
        assert np.abs(np.asarray(read.convert("RGB")).astype(int) - picture).mean() < 3


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_less_quality_is_a_smaller_file(tmp_path, ending):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    for quality in (30, 98):
        write_picture(tmp_path / f"{quality}.{ending}", noise, Look(format=ending, quality=quality), PHOTO)
    assert (tmp_path / f"30.{ending}").stat().st_size * 2 < (tmp_path / f"98.{ending}").stat().st_size


def test_a_file_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"somebody's photo")
    with pytest.raises(FileExistsError, match="in the way"):
        write_picture(tmp_path / "a.jpg", texture(), LOOK, PHOTO)
    assert (tmp_path / "a.jpg").read_bytes() == b"somebody's photo"


def test_a_picture_of_another_photo_is_never_replaced(tmp_path):
    write_picture(tmp_path / "a.jpg", texture(), LOOK, "cats/a.jpg")
    with pytest.raises(FileExistsError, match="not made from this photo"):
        write_picture(tmp_path / "a.jpg", texture(), LOOK, "dogs/a.jpg")
    assert may_write(tmp_path / "a.jpg", "cats/a.jpg")
    ((_, place),) = find_places([("dogs/a.jpg", "")], tmp_path, Wanted(["gradcam"], ["gb"]))
    write_picture(tmp_path / "gb_a.jpg", texture(), LOOK, "cats/a.jpg")
    ((_, other),) = find_places([("dogs/a.jpg", "")], tmp_path, Wanted(["gradcam"], ["gb"]))
    assert (Path(place).name, Path(other).name) == ("a", "a_2")


def test_pictures_that_move_along_with_their_photo_are_still_its_own(tmp_path):
    (tmp_path / "here").mkdir()
    write_picture(tmp_path / "here" / "gb_a.jpg", texture(), LOOK, tmp_path / "here" / "a.jpg")
    (tmp_path / "here").rename(tmp_path / "there")
    assert is_ours(tmp_path / "there" / "gb_a.jpg", tmp_path / "there" / "a.jpg")
    assert not is_ours(tmp_path / "there" / "gb_a.jpg", tmp_path / "here" / "a.jpg")


def test_a_picture_of_an_earlier_run_is_replaced(tmp_path):
    write_picture(tmp_path / "a.jpg", texture(), LOOK, PHOTO)
    write_picture(tmp_path / "a.jpg", grey(10, 10), LOOK, PHOTO)
    with Image.open(tmp_path / "a.jpg") as read:
        assert read.size == (10, 10)


def fail_half_way(monkeypatch):
    """From now on every file gets half of what is written to it, and then the disk is full."""

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, earlier):
    before = b"the picture of an earlier run, " + mark_of(tmp_path / "a.jpg", PHOTO).encode()
    if earlier:
        (tmp_path / "a.jpg").write_bytes(before)
    fail_half_way(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write_picture(tmp_path / "a.jpg", texture(), LOOK, PHOTO)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"a.jpg": before} if earlier else {})


def test_a_move_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(OSError):
        write_picture(tmp_path / "a.jpg", texture(), LOOK, PHOTO)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(("times", "written"), [(2, True), (3, False)])
def test_a_file_that_another_program_has_open_for_a_moment_is_waited_for(tmp_path, monkeypatch, times, written):
    """As it happens on Windows."""
    refusals, move = iter(range(times)), Path.replace

    def replace(self, target):
        if next(refusals, None) is not None:
            raise PermissionError(errno.EACCES, "in use")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with contextlib.nullcontext() if written else pytest.raises(PermissionError):
        write_picture(tmp_path / "a.jpg", texture(), LOOK, PHOTO)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jpg"] * written


def test_a_folder_that_is_gone_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        write_picture(tmp_path / "gone" / "a.jpg", texture(), LOOK, PHOTO)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced there")
def test_whoever_reads_the_old_picture_keeps_reading_the_old_picture(tmp_path):
    write_picture(tmp_path / "a.jpg", texture(), LOOK, PHOTO)
    old = (tmp_path / "a.jpg").read_bytes()
    with (tmp_path / "a.jpg").open("rb") as reader:
        start = reader.read(100)
        write_picture(tmp_path / "a.jpg", grey(300, 300), LOOK, PHOTO)
        assert start + reader.read() == old
