"""Section 2, Images: which photos are found, how each is decoded, and what is refused."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import CKPT, DOG, PROGRAM
from PIL import Image, ImageCms
from torchvision.datasets.folder import default_loader

from cnn_visualizations import (
    LOG_NAME,
    CallError,
    PhotoError,
    find_photos,
    logged_names,
    read_photo,
    warn,
)

NAMES = [  # in the order of a walk
    *("a.jpg", "b.JPG", "c.jpeg", "d.jpe", "e.jfif", "f.bmp", "g.gif"),
    *("x/1.jpg", "x/2.png", "x/3.tiff", "y/照片 3.webp", "y/x/1.jpg", "y/x/4.TIF"),
]
LOSSLESS = [("a.png", {}), ("a.webp", {"lossless": True, "exact": True}), ("a.tif", {})]
ROWS, COLUMNS = np.mgrid[0:12, 0:20]
COLOURS = np.stack([ROWS * 20, COLUMNS * 12, ROWS * 7 + COLUMNS * 3], 2).astype(
    np.uint8
)  # no two orientations alike
GREYS = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
PALETTE = np.array([(10, 200, 30), (250, 0, 90), (0, 0, 255), (77, 77, 77)], np.uint8)


@pytest.fixture
def album(tmp_path, monkeypatch):
    """A folder `album` of NAMES in the current folder. The content of a photo does not matter before it is decoded."""
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
    for name in (
        ".a.jpg",
        "x/.c.jpg",
        ".cache/c.jpg",
        "notes.txt",
        "._1.HEIC",
        "1.HEIC",
        "x/2.heic",
        "x/3.avif",
    ):
        write(album / name)
    assert found("album") == [f"album/{name}" for name in NAMES]
    assert capsys.readouterr().err.startswith("warning: album: 3 photos left out, .heic ")
    assert found("album/.a.jpg") == ["album/.a.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_to_folders_are_followed_and_no_folder_is_read_twice(album, tmp_path):
    write(tmp_path / "elsewhere" / "z.jpg")
    for link, target in [("linked", "elsewhere"), ("x/again", "elsewhere"), ("x/up", "album")]:
        (album / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "album" / "x")
    paths = found("album")
    assert "album/linked/z.jpg" in paths
    assert len({os.path.realpath(path) for path in paths}) == len(paths) == len(NAMES) + 1


def test_the_tree_below_the_folders_is_mirrored(album):
    def folders(*inputs):
        return [photo.folder.replace(os.sep, "/") for photo in find_photos(inputs)]

    assert folders("album") == [*[""] * 7, "x", "x", "x", "y", "y/x", "y/x"]
    assert folders("album/x", "album/y/x") == ["x", "x", "x", "y/x", "y/x"]
    assert folders("album/x/", "./album/x", "album/a.jpg") == [""] * 4


def test_a_pattern_that_the_shell_left_alone(album):
    write(album / "[ab].jpg")
    assert found("album/*.jpg") == ["album/[ab].jpg", "album/a.jpg"]
    assert found("album/x/?.*") == [f"album/{name}" for name in NAMES[7:10]]
    assert found("album/**/1.jpg") == ["album/x/1.jpg", "album/y/x/1.jpg"]
    assert found("album/[ab].jpg") == ["album/[ab].jpg"]  # a photo of this name exists
    assert found("album/*.svg") == ["album/*.svg"]  # it gets its error line


def test_a_photo_that_is_named_twice_is_found_once(album):
    assert found("album/a.jpg", "./album/a.jpg", "album/x/../a.jpg", album.resolve() / "a.jpg") == [
        "album/a.jpg"
    ]
    assert len(found("album/y", "album", "album/*.jpg")) == len(NAMES)


def test_standard_input_has_one_path_a_line(album, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("album/y/照片 3.webp\n\nalbum/a.jpg\r\nhttp://a.b/c.jpg\nno.jpg")
    )
    assert found("1.jpg", "-") == [
        "1.jpg",
        "album/y/照片 3.webp",
        "album/a.jpg",
        "http://a.b/c.jpg",
        "no.jpg",
    ]


def test_pictures_that_a_log_lists_are_not_photos(album):
    record = {
        "image": "a.jpg",
        "method": "gradcam",
        "classes": [{"index": 0, "name": "cat", "files": {"gb": "gb_a.jpg"}}],
        "files": {"sheet": "/moved/since/gb_1.jpg"},
    }
    lines = [json.dumps(record), "[" * 200_000, "half a li", '{"files": 3}', "7", "\ud800"]
    write(album / LOG_NAME, "\n".join(lines).encode("utf-8", "surrogatepass"))
    for name in ("gb_a.jpg", "x/gb_1.jpg", "gb_mine.jpg"):
        write(album / name)
    assert sorted(found("album")) == sorted(f"album/{name}" for name in [*NAMES, "gb_mine.jpg"])
    assert found("album/gb_*.jpg") == ["album/gb_mine.jpg"]
    assert found("album/gb_a.jpg") == ["album/gb_a.jpg"]


def test_only_folders_without_photos_are_a_wrong_call(album, capsys):
    write(Path("empty/.hidden.jpg"))
    assert found("empty", "album/a.jpg") == ["album/a.jpg"]
    assert "empty: no photos in it" in capsys.readouterr().err
    with pytest.raises(CallError, match="no photos in empty"):
        find_photos(["empty"])


# Decoding


def saved(folder, name, image, **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(folder / name, **options)
    return folder / name


def assert_reads(path, expected, tolerance=0):
    """Check the photo's pixels; a grey picture stands for three equal channels."""
    photo = read_photo(path)
    expected = np.repeat(expected[:, :, None], 3, 2) if expected.ndim == 2 else expected
    assert (photo.dtype, photo.shape) == (np.uint8, expected.shape)
    assert np.abs(photo - expected.astype(float)).max() <= tolerance


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "LA", "PA", "RGBX", "RGBa"]
)
def test_each_mode_is_read_as_imagefolder_reads_it_in_training(tmp_path, mode):
    image = Image.open(DOG).resize((40, 30)).convert({"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB"))
    if mode == "LAB":
        image = ImageCms.profileToProfile(
            image, *map(ImageCms.createProfile, ("sRGB", "LAB")), outputMode="LAB"
        )
    image, formats = image.convert(mode), 0
    for suffix in ("jpg", "png", "tif", "webp", "bmp", "gif"):
        try:
            path = saved(
                tmp_path, f"{suffix}.png", image, format=Image.registered_extensions()[f".{suffix}"]
            )
        except (OSError, KeyError, ValueError):  # this format does not have the mode
            continue
        formats += 1
        assert_reads(str(path), np.asarray(default_loader(str(path))))
    assert formats


@pytest.mark.parametrize(
    ("name", "options"), [*LOSSLESS, ("a.gif", {}), ("a.jpg", {"format": "MPO"})]
)
def test_the_first_frame_or_page_is_read(tmp_path, name, options):
    first, second = (Image.new("RGB", (20, 12), colour) for colour in ("red", "blue"))
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


@pytest.mark.parametrize(
    ("name", "values", "by_hand"),
    [
        ("a.png", GREYS.astype(np.uint16) * 257, GREYS),
        ("a.tif", GREYS.astype(np.uint16) * 100, np.floor(GREYS * 100.0 / 257 + 0.5)),
        ("a.tif", Image.frombytes("I;16B", (20, 12), (GREYS.astype(">u2") * 257).tobytes()), GREYS),
        ("a.tif", GREYS.astype(np.int32) * 257, GREYS),
        ("a.tif", GREYS.astype(np.float32) / 255, GREYS),
        ("a.tif", GREYS.astype(np.float32), GREYS),
        (
            "a.tif",
            np.where(GREYS > 9, GREYS / 255, np.nan).astype(np.float32),
            np.where(GREYS > 9, GREYS, 0),
        ),
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
    assert_reads(
        saved(tmp_path, name, Image.new("CMYK", (20, 12), cmyk)), np.full((12, 20, 3), rgb), 6
    )


# What a camera stores for an upright photo, by the EXIF standard's definition of the tag; 9 is not in the standard
AS_STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
}
AS_STORED |= {
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
    assert_reads(
        saved(tmp_path, name, stored, exif=exif, **options), COLOURS, 6 if name == "a.jpg" else 0
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", [None, (0x10E, 2, 5000, 99999), (0x100, 9, 1, 2**32 - 1)])
def test_damaged_exif_entries_do_not_lose_the_photo(tmp_path, entry):
    whole = saved(tmp_path, "a.jpg", COLOURS).read_bytes()
    turned = (
        struct.pack("<4sIHHHIIHHIII", b"II*\0", 8, 2, 0x112, 3, 1, 6, *entry, 0)
        if entry
        else b"\xff" * 40
    )
    block = b"\xff\xe1" + struct.pack(">H", len(turned) + 8) + b"Exif\0\0" + turned
    write(tmp_path / "a.jpg", whole[:2] + block + whole[2:])
    assert read_photo(tmp_path / "a.jpg").shape == ((20, 12, 3) if entry else (12, 20, 3))


# What is refused


def refused(path):
    """Return the line that says why this is not a photo; it begins with the path."""
    with pytest.raises(PhotoError) as caught:
        read_photo(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def bmp_that_claims(width, height):
    return b"BM" + struct.pack(
        "<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0
    )


def tiff_of_zeros(width, height, bits, kind):
    """Return a grey TIFF of a few kilobytes: its hundred strips are the same compressed bytes."""
    strip = zlib.compress(bytes(width * (height // 100) * bits // 8), 9)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, 8),
        (262, 3, 1, 1),
    ]
    entries += [
        (273, 4, 100, 200),
        (277, 3, 1, 1),
        (278, 4, 1, height // 100),
        (279, 4, 100, 600),
        (339, 3, 1, kind),
    ]
    head = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHII", *e) for e in entries)
    )
    return head.ljust(200, b"\0") + struct.pack("<200I", *[1000] * 100, *[len(strip)] * 100) + strip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"Dear diary\n" * 50, "cannot be read: cannot identify"),
        (DOG.read_bytes()[:-2000], "cannot be read: "),
        (bmp_that_claims(2**31 - 1, 2**31 - 1), ""),
        (bmp_that_claims(7, 7), "7 x 7 pixels"),
        (bmp_that_claims(60_000, 9), "60000 x 9 pixels"),
    ],
    ids=range(6),
)
def test_what_is_not_a_photo_is_refused(tmp_path, content, expected):
    write(tmp_path / "a.jpg", content)
    assert expected in refused(tmp_path / "a.jpg")


def test_what_is_not_a_file_is_refused_without_opening_it(tmp_path):
    assert "not a file" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "a.jpg")
    assert "no such file" in refused("a\0b.jpg")
    assert "this is a URL" in refused("https://example.org/a.jpg")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "a.jpg")
        assert "not a file" in refused(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "lzw.tif", "a.gif"])
def test_damaged_bytes_are_a_photo_or_a_photo_error(tmp_path, name):
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(
        tmp_path, name, noise, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {})
    )
    whole = path.read_bytes()
    write(path, whole[: len(whole) // 2])
    refused(path)
    for round_ in range(140):
        damaged = np.frombuffer(whole, np.uint8).copy()
        # the first four bytes tell the format, and what matters most is in the header
        places = random.integers(
            4, min(len(whole), random.choice([40, len(whole)])), random.integers(1, 8)
        )
        damaged[places] = random.integers(0, 256, len(places))
        write(path, damaged.tobytes() if round_ % 7 else whole[:4] + random.bytes(round_ * 4))
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
    names = [
        b"caf\xe9.jpg",
        "照片 一.jpg".encode(),
        b"largest.tif",
        b"float.tif",
        b"sixteen.tif",
        b"claims.bmp",
    ]
    for name in names[:2]:
        shutil.copy(DOG, os.path.join(os.fsencode(tmp_path), name))
    write(tmp_path / "list", b"a\0b.jpg\n" + b"\n".join(names))
    command = [
        sys.executable,
        PROGRAM,
        "--ckpt",
        CKPT,
        "--device",
        "cpu",
        "--outputs",
        "cam",
        "--output",
        ".",
        "-",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    # by a small process of its own: the peak memory of a child begins with that of its parent
    launcher = [sys.executable, "-c", LAUNCHER, *map(str, command)]
    with open(tmp_path / "list") as paths:
        result = subprocess.run(
            launcher, cwd=tmp_path, env=environment, stdin=paths, capture_output=True, text=True
        )
    status, peak = map(int, result.stdout.split())
    log = (tmp_path / LOG_NAME).read_text(encoding="utf-8")
    assert (status, log.count(" pixels, at most "), log.count("no such file")) == (1, 3, 1)
    assert {b"gradcam_cam_" + name.replace(b"tif", b"jpg") for name in names[:3]} < {
        *os.listdir(os.fsencode(tmp_path))
    }
    assert len(found(tmp_path)) == len(names)
    assert peak * 1024 < 1.5e9
