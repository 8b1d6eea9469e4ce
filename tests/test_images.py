"""Section 2, Images: which photos are found, how each is decoded, and what is refused."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import CKPT, DOG, PROGRAM, posix
from PIL import Image, ImageCms
from torchvision.datasets.folder import default_loader

import cnn_visualizations as program_file
from cnn_visualizations import (
    LOG_NAME,
    CallError,
    PhotoError,
    find_photos,
    logged_names,
    open_photo,
    parse_record,
    read_photo,
    record_files,
    warn,
)

NAMES = [  # in the order of a walk
    "a.jpg",
    "b.JPG",
    "c.jpeg",
    "d.jpe",
    "e.jfif",
    "f.bmp",
    "g.gif",
    "x/1.jpg",
    "x/2.png",
    "x/3.tiff",
    "y/照片 3.webp",
    "y/x/1.jpg",
    "y/x/4.TIF",
]
LOSSLESS = [("a.png", {}), ("a.webp", {"lossless": True, "exact": True}), ("a.tif", {})]
ROWS, COLUMNS = np.mgrid[0:12, 0:20]
# No two orientations of it are alike.
COLOURS = np.stack([ROWS * 20, COLUMNS * 12, ROWS * 7 + COLUMNS * 3], 2).astype(np.uint8)
GREYS = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
PALETTE = np.array([(10, 200, 30), (250, 0, 90), (0, 0, 255), (77, 77, 77)], np.uint8)


@pytest.fixture
def album(tmp_path, monkeypatch):
    """A folder `album` of NAMES in the current folder. Their content is not a photo's."""
    for name in NAMES:
        write(tmp_path / "album" / name)
    monkeypatch.chdir(tmp_path)
    logged_names.cache_clear()
    warn.cache_clear()
    return Path("album")


def write(path, content=b"a photo"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def found(*inputs):
    """Return the paths of the photos in these inputs."""
    photos = find_photos([str(name) for name in inputs])
    return [photo.path.replace(os.sep, "/") for photo in photos]


# Which photos are found


def test_a_folder_is_walked_in_sorted_order_without_hidden_files(album, capsys):
    for name in (".a.jpg", "x/.c.jpg", ".cache/c.jpg", "notes.txt"):
        write(album / name)
    for name in ("._1.HEIC", "1.HEIC", "x/2.heic", "x/3.avif"):
        write(album / name)

    assert found("album") == [f"album/{name}" for name in NAMES]
    assert capsys.readouterr().err.startswith("warning: album: 3 photos left out, .heic ")
    assert found("album/.a.jpg") == ["album/.a.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_to_folders_are_followed_and_no_folder_is_read_twice(album, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "z.jpg")
    (album / "linked").symlink_to(elsewhere)
    (album / "x" / "again").symlink_to(elsewhere)
    (album / "x" / "up").symlink_to(tmp_path / "album")
    (elsewhere / "back").symlink_to(tmp_path / "album" / "x")

    paths = found("album")
    assert "album/linked/z.jpg" in paths
    assert len(paths) == len(NAMES) + 1
    assert len({os.path.realpath(path) for path in paths}) == len(paths)


def test_the_tree_below_the_folders_is_mirrored(album):
    def folders(*inputs):
        return [photo.folder.replace(os.sep, "/") for photo in find_photos(inputs)]

    assert folders("album") == [""] * 7 + ["x", "x", "x", "y", "y/x", "y/x"]
    assert folders("album/x", "album/y/x") == ["x", "x", "x", "y/x", "y/x"]
    assert folders("album/x/", "./album/x", "album/a.jpg") == [""] * 4


def test_a_photo_knows_the_folder_that_was_given(album, monkeypatch):
    def tops(*inputs):
        return [photo.top.replace(os.sep, "/") for photo in find_photos(inputs)]

    assert tops("album/y/", "album/x") == ["album/y"] * 3 + ["album/x"] * 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("album/a.jpg"))
    assert tops("album/b.JPG", "album/*.jpeg", "-") == ["", "", ""]


def test_a_pattern_that_the_shell_left_alone(album):
    write(album / "[ab].jpg")
    assert found("album/*.jpg") == ["album/[ab].jpg", "album/a.jpg"]
    assert found("album/x/?.*") == [f"album/{name}" for name in NAMES[7:10]]
    assert found("album/**/1.jpg") == ["album/x/1.jpg", "album/y/x/1.jpg"]
    assert found("album/[ab].jpg") == ["album/[ab].jpg"]  # a photo of this name exists
    assert found("album/*.svg") == ["album/*.svg"]  # it gets its error line


def test_a_photo_that_is_named_twice_is_found_once(album):
    names = ["album/a.jpg", "./album/a.jpg", "album/x/../a.jpg", album.resolve() / "a.jpg"]
    assert found(*names) == ["album/a.jpg"]
    assert len(found("album/y", "album", "album/*.jpg")) == len(NAMES)


def test_standard_input_has_one_path_a_line(album, monkeypatch):
    lines = "album/y/照片 3.webp\n\nalbum/a.jpg\r\nhttp://a.b/c.jpg\nno.jpg"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert found("1.jpg", "-") == [
        "1.jpg",
        "album/y/照片 3.webp",
        "album/a.jpg",
        "http://a.b/c.jpg",
        "no.jpg",
    ]


def record_of(class_files, **entries):
    """Return a line of the log: a photo with these files of its class, and other entries."""
    explained = {"index": 0, "name": "cat", "probability": 0.9, "files": class_files}
    record = {"image": "a.jpg", "method": "gradcam", "classes": [explained], "files": {}}
    return json.dumps({**record, **entries})


def test_pictures_that_a_log_lists_are_not_photos(album):
    sheet = {"sheet": "/moved/since/gb_1.jpg"}
    lines = [record_of({"gb": "gb_a.jpg"}, files=sheet), "[" * 200_000, "half a li", "7", "\ud800"]
    write(album / LOG_NAME, "\n".join(lines).encode("utf-8", "surrogatepass"))
    for name in ("gb_a.jpg", "x/gb_1.jpg", "gb_mine.jpg"):
        write(album / name)

    expected = [f"album/{name}" for name in [*NAMES, "gb_mine.jpg"]]
    assert sorted(found("album")) == sorted(expected)
    assert found("album/gb_*.jpg") == ["album/gb_mine.jpg"]
    assert found("album/gb_a.jpg") == ["album/gb_a.jpg"]


def test_the_logs_of_a_folder_and_of_those_above_it_count(album):
    write(album / LOG_NAME, record_of({"gb": "y/x/gb_1.jpg"}).encode())
    write(album / "y" / LOG_NAME, record_of({"gb": "x/gb_2.jpg"}).encode())
    write(album / "y" / "x" / "gb_1.jpg")
    write(album / "y" / "x" / "gb_2.jpg")
    assert found("album") == [f"album/{name}" for name in NAMES]


def test_the_names_in_a_log_are_held_once_for_all_folders_below(tmp_path):
    lines = [record_of({"gb": f"gb_{number}.jpg"}) for number in range(5000)]
    write(tmp_path / LOG_NAME, "\n".join(lines).encode())
    for number in range(200):
        write(tmp_path / f"{number}" / "a.jpg")

    tracemalloc.start()
    photos = find_photos([str(tmp_path)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(photos) == 200
    assert peak < 20e6  # a set for each folder takes 50 MB


def test_a_record_lists_its_files():
    line = record_of({"gb": "cats/gb_1.jpg"}, files={"sheet": "cats/sheet_1.jpg"})
    assert sorted(record_files(parse_record(line))) == ["cats/gb_1.jpg", "cats/sheet_1.jpg"]

    error = json.dumps(
        {"image": "a.jpg", "source": "a.jpg", "method": "gradcam", "error": "broken"}
    )
    assert parse_record(error)["error"] == "broken"
    assert record_files(parse_record(error)) == []


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"image": "a.jpg", "method": "gradcam", "files": ["gb_a.jpg"]}',
        '{"image": "a.jpg", "method": "gradcam", "files": {"sheet": 3}}',
        '{"image": 1, "method": "gradcam", "files": {}}',
        record_of(["gb_a.jpg"]),
        record_of({}, options=5),
        record_of({}, classes={"name": "cat"}),
        record_of({}, classes=[{"index": 0, "name": "cat"}]),
    ],
)
def test_a_line_of_another_layout_is_no_record(line):
    assert parse_record(line) == {}


def test_only_folders_without_photos_are_a_wrong_call(album, capsys):
    write(Path("empty/.hidden.jpg"))
    assert found("empty", "album/a.jpg") == ["album/a.jpg"]
    assert "empty: no photos in it" in capsys.readouterr().err
    with pytest.raises(CallError, match="no photos in empty"):
        find_photos(["empty"])


# Decoding


def saved(folder, name, image, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(folder / name, **options)
    return folder / name


def assert_reads(path, expected, tolerance=0):
    """Check the photo's pixels; a grey picture stands for three equal channels."""
    photo = read_photo(path)
    if expected.ndim == 2:
        expected = np.repeat(expected[:, :, None], 3, 2)

    assert photo.dtype == np.uint8
    assert photo.shape == expected.shape
    assert np.abs(photo - expected.astype(float)).max() <= tolerance


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "LA", "PA", "RGBX", "RGBa"]
)
def test_each_mode_is_read_as_imagefolder_reads_it_in_training(tmp_path, mode):
    through = {"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")
    image = Image.open(DOG).resize((40, 30)).convert(through)
    if mode == "LAB":
        rgb = ImageCms.createProfile("sRGB")
        lab = ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, rgb, lab, outputMode="LAB")
    image = image.convert(mode)

    formats = 0
    for format_name in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"):
        try:
            path = saved(tmp_path, f"{format_name}.png", image, format=format_name)
        except (OSError, KeyError, ValueError):  # this format does not have the mode
            continue
        formats += 1
        assert_reads(str(path), np.asarray(default_loader(str(path))))
    assert formats > 0


@pytest.mark.parametrize(
    ("name", "options"), [*LOSSLESS, ("a.gif", {}), ("a.jpg", {"format": "MPO"})]
)
def test_the_first_frame_or_page_is_read(tmp_path, name, options):
    first = Image.new("RGB", (20, 12), "red")
    second = Image.new("RGB", (20, 12), "blue")
    path = saved(tmp_path, name, first, save_all=True, append_images=[second], **options)
    assert_reads(path, np.full((12, 20, 3), (255, 0, 0)), 3)


@pytest.mark.parametrize(
    "options", [{}, {"transparency": 2}, {"transparency": b"\x00\x80\xff\x10"}]
)
def test_transparency_is_dropped_and_leaves_the_colours(tmp_path, options):
    image = Image.frombytes("P", (20, 12), (GREYS % 4).tobytes())
    image.putpalette(PALETTE.tobytes())
    assert_reads(saved(tmp_path, "a.png", image, **options), PALETTE[GREYS % 4])
    assert_reads(saved(tmp_path, "b.png", np.dstack([COLOURS, GREYS])), COLOURS)


BIG_ENDIAN = Image.frombytes("I;16B", (20, 12), (GREYS.astype(">u2") * 257).tobytes())
WITH_NAN = np.where(GREYS > 9, GREYS / 255, np.nan).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "values", "by_hand"),
    [
        ("a.png", GREYS.astype(np.uint16) * 257, GREYS),
        ("a.tif", GREYS.astype(np.uint16) * 100, np.floor(GREYS * 100.0 / 257 + 0.5)),
        ("a.tif", BIG_ENDIAN, GREYS),
        ("a.tif", GREYS.astype(np.int32) * 257, GREYS),
        ("a.tif", GREYS.astype(np.float32) / 255, GREYS),
        ("a.tif", GREYS.astype(np.float32), GREYS),
        ("a.tif", WITH_NAN, np.where(GREYS > 9, GREYS, 0)),
    ],
)
def test_grey_values_of_more_than_eight_bits_are_scaled_and_not_clipped(
    tmp_path, name, values, by_hand
):
    assert_reads(saved(tmp_path, name, values), by_hand)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
@pytest.mark.parametrize(
    ("cmyk", "rgb"), [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_cmyk_is_not_read_as_its_negative(tmp_path, name, cmyk, rgb):
    path = saved(tmp_path, name, Image.new("CMYK", (20, 12), cmyk))
    assert_reads(path, np.full((12, 20, 3), rgb), 6)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("a.png", np.minimum(GREYS * 18.0, 4095).astype(np.uint16), "values from 0 to 4095; 65535"),
        ("a.tif", GREYS.astype(np.int32) * 5, "values from 0 to 1195; 65535 is shown as white"),
        ("a.tif", GREYS.astype(np.float32), "values from 0 to 239; 255 is shown as white"),
        ("a.tif", GREYS.astype(np.float32) - 239, "values from -239 to 0; 1 is shown as white"),
    ],
)
def test_a_deep_photo_whose_white_is_guessed_has_a_warning(
    tmp_path, capsys, name, values, expected
):
    path = saved(tmp_path, name, values)
    read_photo(path)
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {path}: ")
    assert expected in error


def test_a_colour_photo_that_uses_twelve_of_sixteen_bits_has_a_warning(tmp_path, capsys):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), COLOURS.astype(np.uint16) * 16)
    read_photo(path)
    assert f"{path}: 16 bits, but no value above 4095" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", GREYS),
        ("a.png", GREYS.astype(np.uint16) * 257),
        ("a.tif", GREYS.astype(np.uint16) * 18),
        ("a.tif", GREYS.astype(np.float32) / 255),
    ],
)
def test_other_photos_have_no_warning(tmp_path, capsys, name, values):
    read_photo(saved(tmp_path, name, values))
    assert capsys.readouterr().err == ""


# What a camera stores for an upright photo, by the EXIF standard; 9 is not in the standard.
AS_STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
    9: lambda a: a,
}


@pytest.mark.parametrize(
    ("name", "options"), [*LOSSLESS, ("a.jpg", {"quality": 100, "subsampling": 0})]
)
@pytest.mark.parametrize("orientation", AS_STORED)
def test_a_photo_is_turned_upright(tmp_path, name, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(AS_STORED[orientation](COLOURS))
    path = saved(tmp_path, name, stored, exif=exif, **options)
    tolerance = 6 if name == "a.jpg" else 0
    assert_reads(path, COLOURS, tolerance)


NO_EXIF = b"\xff" * 40


def exif_that_turns(*entry):
    """Return EXIF data of two entries: the orientation 6 and a damaged one."""
    return struct.pack("<4sIHHHIIHHIII", b"II*\0", 8, 2, 0x112, 3, 1, 6, *entry, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("exif", "shape"),
    [
        (NO_EXIF, (12, 20, 3)),
        (exif_that_turns(0x10E, 2, 5000, 99999), (20, 12, 3)),
        (exif_that_turns(0x100, 9, 1, 2**32 - 1), (20, 12, 3)),
    ],
)
def test_damaged_exif_entries_do_not_lose_the_photo(tmp_path, exif, shape):
    path = saved(tmp_path, "a.jpg", COLOURS)
    whole = path.read_bytes()
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    write(path, whole[:2] + block + whole[2:])
    assert read_photo(path).shape == shape


# What is refused


def refused(path):
    """Return the line that says why this is not a photo; it begins with the path."""
    with pytest.raises(PhotoError) as caught:
        read_photo(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


def bmp_that_claims(width, height):
    header = struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + header


def tiff(tags, data):
    """Return a TIFF with these tags, (number, kind, count, value), and data from byte 200 on."""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    for tag in tags:
        head += struct.pack("<HHII", *tag)
    return head.ljust(200, b"\0") + data


def tiff_of_zeros(width, height, bits, kind):
    """Return a grey TIFF of a few kilobytes: its hundred strips are the same compressed bytes."""
    rows = height // 100
    strip = zlib.compress(bytes(width * rows * bits // 8), 9)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 100, 200),
        (277, 3, 1, 1),
        (278, 4, 1, rows),
        (279, 4, 100, 600),
        (339, 3, 1, kind),
    ]
    places = struct.pack("<100I", *[1000] * 100)
    sizes = struct.pack("<100I", *[len(strip)] * 100)
    return tiff(tags, places + sizes + strip)


def tiff_with_a_tile(side):
    """Return a grey TIFF of 16 x 16 pixels with one tile of side x side."""
    tags = [
        (256, 4, 1, 16),
        (257, 4, 1, 16),
        (258, 3, 1, 8),
        (259, 3, 1, 8),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 4, 1, side),
        (323, 4, 1, side),
        (324, 4, 1, 200),
        (325, 4, 1, 100),
    ]
    return tiff(tags, bytes(100))


def jpeg_with_scans(count):
    """Return a progressive JPEG whose last scan stands in it so many times."""
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    start = content.rindex(b"\xff\xda")
    end = content.rindex(b"\xff\xd9")
    return content[:start] + content[start:end] * count + content[end:]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"Dear diary\n" * 50, "cannot be read: cannot identify"),
        (DOG.read_bytes()[:-2000], "cannot be read: "),
        (bmp_that_claims(2**31 - 1, 2**31 - 1), ""),
        (bmp_that_claims(7, 7), "7 x 7 pixels"),
        (bmp_that_claims(60_000, 9), "60000 x 9 pixels"),
        (tiff_with_a_tile(26_000), "676000000 pixels, at most 70 million"),
        (jpeg_with_scans(1000), "more than 100 scans"),
    ],
    ids=range(8),
)
def test_what_is_not_a_photo_is_refused(tmp_path, content, expected):
    write(tmp_path / "a.jpg", content)
    assert expected in refused(tmp_path / "a.jpg")


def test_fifty_scans_and_an_appended_video_are_read(tmp_path):
    write(tmp_path / "a.jpg", jpeg_with_scans(50))
    assert read_photo(tmp_path / "a.jpg").shape == COLOURS.shape

    # A phone may append a video, whose bytes may look like the start of a scan.
    path = saved(tmp_path, "b.jpg", COLOURS)
    write(path, path.read_bytes() + b"\xff\xda\0\x08" * 200)
    assert read_photo(path).shape == COLOURS.shape


def test_a_webp_that_needs_too_much_memory_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, "a.webp", COLOURS)
    monkeypatch.setattr(program_file, "MAX_WEBP_PIXELS", 200)
    assert "240 pixels, at most" in refused(path)


def test_a_long_photo_is_refused_where_resizing_would_enlarge_it_too_far(tmp_path):
    path = saved(tmp_path, "a.png", np.zeros((800, 8, 3), np.uint8))
    with open_photo(path, short_side=256) as photo:
        assert photo.shape == (800, 8, 3)

    expected = "8 x 800 pixels, too long for a short side of 2048"
    with pytest.raises(PhotoError, match=expected), open_photo(path, short_side=2048):
        pass


def test_large_photos_wait_for_each_other_until_they_are_preprocessed(tmp_path, monkeypatch):
    monkeypatch.setattr(program_file, "LARGE_PHOTO", 100)
    path = saved(tmp_path, "a.png", COLOURS)
    second_is_read = threading.Event()

    def read_second():
        read_photo(path)
        second_is_read.set()

    with open_photo(path):
        thread = threading.Thread(target=read_second)
        thread.start()
        assert not second_is_read.wait(0.2)
    thread.join(10)
    assert second_is_read.is_set()


def test_what_is_not_a_file_is_refused_without_opening_it(tmp_path):
    assert "not a file" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "a.jpg")
    assert "no such file" in refused("a\0b.jpg")
    assert "this is a URL" in refused("https://example.org/a.jpg")


@posix
def test_a_fifo_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert "not a file" in refused(tmp_path / "a.jpg")


def damaged(whole, random):
    """Return a file with up to seven wrong bytes, half of the times near its beginning."""
    content = np.frombuffer(whole, np.uint8).copy()
    # The first four bytes tell the format, and what matters most is in the header.
    end = min(len(whole), random.choice([40, len(whole)]))
    places = random.integers(4, end, random.integers(1, 8))
    content[places] = random.integers(0, 256, len(places))
    return content.tobytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "lzw.tif", "a.gif"])
def test_damaged_bytes_are_a_photo_or_a_photo_error(tmp_path, name):
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    options = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
    path = saved(tmp_path, name, noise, **options)
    whole = path.read_bytes()
    write(path, whole[: len(whole) // 2])
    refused(path)

    contents = [damaged(whole, random) for _ in range(120)]
    contents += [whole[:4] + random.bytes(28 * number) for number in range(20)]
    for content in contents:
        write(path, content)
        try:
            assert read_photo(path).shape[2:] == (3,)
        except PhotoError as error:
            assert "\n" not in str(error)


LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_photos_of_any_name_and_size_have_a_picture_or_an_error_in_bounded_memory(tmp_path):
    write(tmp_path / "claims.bmp", bmp_that_claims(60_000, 60_000))
    write(tmp_path / "float.tif", tiff_of_zeros(15_800, 15_800, 32, 3))
    write(tmp_path / "sixteen.tif", tiff_of_zeros(15_800, 15_800, 16, 1))
    write(tmp_path / "largest.tif", tiff_of_zeros(5_400, 5_500, 32, 3))
    good = [b"caf\xe9.jpg", "照片 一.jpg".encode(), b"largest.tif"]
    bad = [b"float.tif", b"sixteen.tif", b"claims.bmp"]
    for name in good[:2]:
        shutil.copy(DOG, os.path.join(os.fsencode(tmp_path), name))
    write(tmp_path / "list", b"a\0b.jpg\n" + b"\n".join(good + bad))

    command = [sys.executable, str(PROGRAM), "--ckpt", str(CKPT), "--device", "cpu"]
    command += ["--outputs", "cam", "--output", ".", "-"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    # By a small process of its own: the peak memory of a child begins with that of its parent.
    launcher = [sys.executable, "-c", LAUNCHER, *command]
    with open(tmp_path / "list") as paths:
        options = {"stdin": paths, "capture_output": True, "text": True}
        result = subprocess.run(launcher, cwd=tmp_path, env=environment, **options)
    status, peak = result.stdout.split()

    assert int(status) == 1
    assert int(peak) * 1024 < 1.5e9
    log = (tmp_path / LOG_NAME).read_text(encoding="utf-8")
    assert log.count(" pixels, at most ") == 3
    assert log.count("no such file") == 1
    written = os.listdir(os.fsencode(tmp_path))
    for name in good:
        assert b"gradcam_cam_" + name.replace(b"tif", b"jpg") in written
    assert len(found(tmp_path)) == len(good + bad)
