"""Room 2, images: every kind of photo, every kind of broken one, and what the network is shown of it."""

import os
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from conftest import CKPT, DOG
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.models import get_model, get_model_weights

import cnn_visualizations
from cnn_visualizations import Photo, PhotoError, Room, load_classifier, open_photo, read_photo

ARCHITECTURES = ["shufflenet_v2_x0_5", "efficientnet_b1", "regnet_y_400mf", "squeezenet1_1"]
SIZES = [(40, 60), (60, 40), (50, 50), (8, 8), (301, 97), (97, 301), (640, 480)]


def colours(height=12, width=20):
    """A smooth picture that looks different in each of the eight orientations, (height, width, 3)."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 20 % 256, columns * 12 % 256, (rows * 7 + columns * 3) % 256], 2).astype(np.uint8)


def greys(height=12, width=20):
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def saved(folder, name, image, **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(folder / name, **options)
    return folder / name


def three_times(grey):
    return np.repeat(grey[:, :, None], 3, 2)


def indexed():
    """A palette photo, and its colours by hand."""
    palette = [(10, 200, 30), (250, 0, 90), (0, 0, 255), (77, 77, 77)]
    image = Image.frombytes("P", (20, 12), (greys() % 4).tobytes())
    image.putpalette([channel for colour in palette for channel in colour])
    return image, np.array(palette, np.uint8)[greys() % 4]


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_claims(width, height, pixels=b"\0" * 100):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks)


def refused(path):
    """The one line that says why this is no photo; it names the file."""
    with pytest.raises(PhotoError) as caught:
        read_photo(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Decoding


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tif", {}),
        ("a.tiff", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True}),
        ("really-a-png.jpg", {"format": "PNG"}),
        ("UPPER.PNG", {}),
    ],
)
def test_a_lossless_photo_is_read_to_the_bit(tmp_path, name, options):
    photo = read_photo(saved(tmp_path, name, colours(), **options))
    assert photo.path == tmp_path / name
    assert (photo.pixels.dtype, photo.pixels.shape) == (np.uint8, (12, 20, 3))
    np.testing.assert_array_equal(photo.pixels, colours())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"quality": 98, "subsampling": 0}),
        ("a.jpeg", {"quality": 98, "subsampling": 0, "progressive": True}),
        ("a.webp", {"quality": 100}),
    ],
)
def test_a_lossy_photo_is_read_closely(tmp_path, name, options):
    rows, columns = np.mgrid[0:48, 0:64]
    smooth = np.stack([rows * 3, columns * 2, 200 - rows], 2).astype(np.uint8)
    read = read_photo(saved(tmp_path, name, smooth, **options)).pixels
    assert np.abs(read.astype(int) - smooth).mean() < 3


def test_a_photo_is_read_as_imagefolder_reads_it_in_training():
    np.testing.assert_array_equal(read_photo(DOG).pixels, np.asarray(default_loader(str(DOG))))


def test_of_a_gif_the_first_frame_is_read(tmp_path):
    first, second = (Image.new("RGB", (20, 12), colour) for colour in ("red", "blue"))
    photo = read_photo(saved(tmp_path, "a.gif", first, save_all=True, append_images=[second]))
    np.testing.assert_array_equal(photo.pixels, np.full((12, 20, 3), (255, 0, 0)))


def test_of_a_tiff_the_first_page_is_read(tmp_path):
    photo = read_photo(saved(tmp_path, "a.tif", colours(), save_all=True, append_images=[Image.new("RGB", (9, 9))]))
    np.testing.assert_array_equal(photo.pixels, colours())


def test_of_a_phones_jpeg_with_two_pictures_the_first_is_read(tmp_path):
    first, second = (Image.new("RGB", (32, 16), colour) for colour in ("red", "blue"))
    photo = read_photo(saved(tmp_path, "a.jpg", first, format="MPO", save_all=True, append_images=[second]))
    assert np.abs(photo.pixels.astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_a_grey_photo_becomes_rgb(tmp_path, name):
    np.testing.assert_array_equal(read_photo(saved(tmp_path, name, greys())).pixels, three_times(greys()))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_a_one_bit_photo_becomes_black_and_white(tmp_path, name):
    bits = greys() % 3 == 0
    photo = read_photo(saved(tmp_path, name, bits))
    np.testing.assert_array_equal(photo.pixels, three_times(np.where(bits, 255, 0)))


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.tif", "a.bmp"])
def test_a_palette_photo_gets_its_colours(tmp_path, name):
    image, expected = indexed()
    np.testing.assert_array_equal(read_photo(saved(tmp_path, name, image)).pixels, expected)


@pytest.mark.parametrize("transparent", [2, b"\x00\x80\xff\x10"])
def test_transparency_in_a_palette_is_dropped(tmp_path, transparent):
    image, expected = indexed()
    path = saved(tmp_path, "a.png", image, transparency=transparent)
    np.testing.assert_array_equal(read_photo(path).pixels, expected)


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True, "exact": True}), ("a.tif", {})]
)
def test_an_alpha_channel_is_dropped(tmp_path, name, options):
    path = saved(tmp_path, name, np.dstack([colours(), greys()]), **options)
    np.testing.assert_array_equal(read_photo(path).pixels, colours())


def test_grey_with_alpha_becomes_rgb(tmp_path):
    image = Image.merge("LA", [Image.fromarray(greys()), Image.fromarray(greys()[::-1].copy())])
    np.testing.assert_array_equal(read_photo(saved(tmp_path, "a.png", image)).pixels, three_times(greys()))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("steps", [257, 100])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, name, steps):
    path = saved(tmp_path, name, greys().astype(np.uint16) * steps)
    assert Image.open(path).mode.startswith("I")  # "I" for PNG until Pillow 10.2, "I;16" since then
    by_hand = np.floor(greys().astype(float) * steps * 255 / 65535 + 0.5)
    np.testing.assert_array_equal(read_photo(path).pixels, three_times(by_hand))


def test_sixteen_bit_grey_in_motorola_order(tmp_path):
    image = Image.frombytes("I;16B", (20, 12), (greys().astype(">u2") * 257).tobytes())
    np.testing.assert_array_equal(read_photo(saved(tmp_path, "a.tif", image)).pixels, three_times(greys()))


def test_a_floating_point_photo_from_zero_to_one_is_scaled(tmp_path):
    path = saved(tmp_path, "a.tif", greys().astype(np.float32) / 255)
    np.testing.assert_array_equal(read_photo(path).pixels, three_times(greys()))


@pytest.mark.parametrize(
    ("cmyk", "rgb"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ],
)
@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_has_its_colours_and_not_their_negative(tmp_path, name, cmyk, rgb):
    read = read_photo(saved(tmp_path, name, Image.new("CMYK", (20, 12), cmyk))).pixels
    assert read.shape == (12, 20, 3)
    assert np.abs(read.astype(int) - rgb).max() <= 6


# What a camera stores where an upright photo is seen, by the EXIF standard's definition of the tag.
AS_STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True}), ("a.tif", {})])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_a_photo_is_turned_upright(tmp_path, name, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(AS_STORED[orientation](colours()))
    photo = read_photo(saved(tmp_path, name, stored, exif=exif, **options))
    np.testing.assert_array_equal(photo.pixels, colours())


@pytest.mark.parametrize("orientation", AS_STORED)
def test_a_jpeg_is_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.kron(np.array([[0, 90, 180], [230, 130, 40]], np.uint8), np.ones((16, 16), np.uint8))
    stored = np.ascontiguousarray(AS_STORED[orientation](upright))
    read = read_photo(saved(tmp_path, "a.jpg", stored, exif=exif, quality=95)).pixels
    assert read.shape == (32, 48, 3)
    assert np.abs(read.astype(int) - upright[:, :, None]).max() < 12


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_photo(saved(tmp_path, "a.png", colours(), exif=exif)).pixels, colours())


@pytest.mark.parametrize(
    "name", ["照片 一.png", "with space.png", "v1.2.final.png", "Ünïcödé.png", "noending", "%d.png"]
)
def test_any_name_will_do(tmp_path, name):
    folder = tmp_path / "我的 photos.d"
    folder.mkdir()
    np.testing.assert_array_equal(read_photo(saved(folder, name, colours(), format="PNG")).pixels, colours())


# Broken photos


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"Dear diary\n" * 50, "not a picture"),
        (b"\xff\xd8\xff", "decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "decoded"),
        (b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 64, "decoded"),
        (b"BM" + b"\xff" * 200, "decoded"),
    ],
)
def test_a_file_that_is_no_photo_is_refused(tmp_path, content, said):
    (tmp_path / "a.jpg").write_bytes(content)
    assert said in refused(tmp_path / "a.jpg")


def test_a_missing_photo_and_a_folder_are_refused(tmp_path):
    assert "not there" in refused(tmp_path / "missing.jpg")
    assert "folder" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_jpeg_is_refused(tmp_path, share):
    whole = DOG.read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: int(len(whole) * share)])
    assert "decoded" in refused(tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tif", "a.gif"])
def test_a_truncated_photo_of_another_kind_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, name, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_a_photo_with_nothing_to_point_at_is_refused(tmp_path, size):
    assert f"{size[0]} x {size[1]}" in refused(saved(tmp_path, "a.png", Image.new("RGB", size)))


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (300_000_000, 8)])
def test_a_header_that_claims_enormous_size_is_refused_without_the_memory(tmp_path, size):
    (tmp_path / "a.png").write_bytes(png_that_claims(*size))
    before = peak_memory()
    refused(tmp_path / "a.png")
    assert peak_memory() - before < 50 * 2**20


def peak_memory():
    """The most memory that this process ever held, in bytes; 0 where the system does not say."""
    if os.name == "nt":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_a_compressed_text_that_unpacks_to_gigabytes_is_bounded(tmp_path):
    whole = saved(tmp_path, "a.png", colours()).read_bytes()
    bomb = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(b"\0" * 200_000_000, 9))
    (tmp_path / "a.png").write_bytes(whole[:33] + bomb + whole[33:])
    before = peak_memory()
    read_or_refused(tmp_path / "a.png")
    assert peak_memory() - before < 150 * 2**20


def test_of_all_threads_together_so_many_pixels_are_in_memory_at_once(tmp_path, monkeypatch):
    sizes = [(100, 80), (90, 90), (10, 20), (70, 60), (8, 8), (100, 100)] * 3
    paths = [saved(tmp_path, f"{number}.png", Image.new("RGB", size)) for number, size in enumerate(sizes)]
    monkeypatch.setattr(cnn_visualizations, "_room", Room(10_000))  # the largest takes all of it
    held, most = [], []

    def use(path):
        with open_photo(path) as photo:
            held.append(photo.pixels.size // 3)
            most.append((sum(held), len(held)))
            time.sleep(0.01)
            held.remove(photo.pixels.size // 3)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, paths))
    assert len(most) == len(paths)
    assert max(pixels for pixels, _ in most) <= 10_000
    assert max(photos for _, photos in most) > 1


def test_a_broken_photo_gives_its_room_back(tmp_path, monkeypatch):
    path = saved(tmp_path, "a.png", Image.effect_noise((100, 100), 50))
    monkeypatch.setattr(cnn_visualizations, "_room", Room(10_000))
    path.write_bytes(path.read_bytes()[:5000])
    refused(path)
    assert cnn_visualizations._room._free == 10_000


def read_or_refused(path):
    """Whether the photo was read; anything but a photo or a one-line PhotoError fails the test."""
    try:
        photo = read_photo(path)
    except PhotoError as error:
        assert "\n" not in str(error)
        return False
    assert photo.pixels.dtype == np.uint8
    assert photo.pixels.ndim == 3
    assert photo.pixels.shape[2] == 3
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "lzw.tif", "a.gif"])
def test_damaged_bytes_give_a_photo_or_a_photo_error_and_nothing_else(tmp_path, name):
    options = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
    whole = saved(tmp_path, name, colours(), **options).read_bytes()
    random = np.random.default_rng(len(whole))
    outcomes = set()
    for _ in range(120):
        damaged = np.frombuffer(whole, np.uint8).copy()
        # the first bytes say what it is, and headers hold what matters most
        places = random.integers(4, min(len(whole), random.choice([40, len(whole)])), random.integers(1, 8))
        damaged[places] = random.integers(0, 256, len(places))
        (tmp_path / name).write_bytes(damaged.tobytes())
        outcomes.add(read_or_refused(tmp_path / name))
    assert False in outcomes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "start", [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF89a"]
)
def test_random_bytes_are_a_photo_or_a_photo_error(tmp_path, start):
    random = np.random.default_rng(len(start))
    for length in range(0, 600, 20):
        (tmp_path / "a.jpg").write_bytes(start + random.bytes(length))
        read_or_refused(tmp_path / "a.jpg")


# What the network sees


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Classifiers by architecture and resize, with random weights of a saved state dict; loaded once."""
    folder, loaded = tmp_path_factory.mktemp("weights"), {}

    def load(arch, resize="crop"):
        if (arch, resize) not in loaded:
            path = folder / f"{arch}.pth"
            if not path.exists():
                torch.save(get_model(arch, weights=None, num_classes=3).state_dict(), path)
            loaded[arch, resize] = load_classifier(arch, path, device="cpu", resize=resize)
        return loaded[arch, resize]

    return load


@pytest.fixture(scope="module")
def demo():
    return load_classifier(ckpt=CKPT, device="cpu")


def noise(height, width, path=DOG):
    random = np.random.default_rng(height * 1000 + width)
    small = random.integers(0, 256, (max(2, height // 5), max(2, width // 5), 3), dtype=np.uint8)
    return Photo(path, np.asarray(Image.fromarray(small).resize((width, height))))


def assert_same(inputs, expected):
    assert (inputs.dtype, inputs.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_network_sees_what_torchvisions_preset_makes_of_the_photo(classifiers, arch, size):
    photo = noise(*size)
    preset = get_model_weights(arch).DEFAULT.transforms()
    assert_same(classifiers(arch).preprocess(photo), preset(Image.fromarray(photo.pixels)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_squash_shows_the_whole_photo(classifiers, arch, size):
    photo = noise(*size)
    preset = get_model_weights(arch).DEFAULT.transforms()
    by_hand = transforms.Compose(
        [
            transforms.Resize([preset.crop_size[0]] * 2, interpolation=preset.interpolation, antialias=True),
            transforms.ToTensor(),
            transforms.Normalize(preset.mean, preset.std),
        ]
    )
    assert_same(classifiers(arch, "squash").preprocess(photo), by_hand(Image.fromarray(photo.pixels)))


@pytest.mark.parametrize("size", SIZES)
def test_the_demo_sees_its_own_input_size(demo, size):
    by_hand = transforms.Compose(  # 225 from the checkpoint; the short side in proportion to torchvision's 232 to 224
        [
            transforms.Resize(233, antialias=True),
            transforms.CenterCrop(225),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    photo = noise(*size)
    assert_same(demo.preprocess(photo), by_hand(Image.fromarray(photo.pixels)))


def test_a_strip_that_would_be_blown_up_beyond_memory_is_refused_unless_squashed(classifiers):
    strip = Photo(DOG, np.zeros((8, 60_000, 3), np.uint8))
    with pytest.raises(PhotoError, match="60000 x 8"):
        classifiers("shufflenet_v2_x0_5").preprocess(strip)
    assert classifiers("shufflenet_v2_x0_5", "squash").preprocess(strip).shape == (3, 224, 224)


def read_back_box(classifier, height, width):
    """The box that the network sees, from a photo whose red is each pixel's x and whose green its y."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    photo = Photo(DOG, np.stack([red, green, red], 2).round().astype(np.uint8))
    inputs = classifier.preprocess(photo)
    shown = inputs * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    shown = (shown + torch.tensor([0.485, 0.456, 0.406])[:, None, None]).numpy()
    sides = []
    for values, length in ((shown[0].mean(0), width), (shown[1].mean(1), height)):
        cells = np.arange(len(values))
        inner = slice(len(values) // 8, -len(values) // 8)  # resizing bends the ramp at the photo's edge
        slope, start = np.polyfit(cells[inner], values[inner] * (length - 1), 1)
        sides.append((start - slope / 2 + 0.5, start + slope * (len(values) - 0.5) + 0.5))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("arch", ["shufflenet_v2_x0_5", "efficientnet_b1", "regnet_y_400mf"])
@pytest.mark.parametrize("size", [(100, 150), (150, 100), (97, 201), (201, 97), (120, 120), (480, 640), (641, 479)])
def test_the_seen_box_is_where_the_networks_pixels_came_from(classifiers, arch, size, resize):
    classifier = classifiers(arch, resize)
    height, width = size
    box = classifier.seen_box(height, width)
    assert box == pytest.approx(read_back_box(classifier, height, width), abs=0.5 * max(size) / 255)
    assert box[0] >= 0 <= box[1]
    assert box[2] <= width
    assert box[3] <= height


def test_the_demos_seen_box(demo):
    assert demo.seen_box(576, 768) == pytest.approx(read_back_box(demo, 576, 768), abs=1)


def test_the_preset_of_each_loaded_network_is_its_own(classifiers):
    first, second = classifiers("shufflenet_v2_x0_5", "squash"), classifiers("shufflenet_v2_x0_5")
    assert first.seen_box(40, 60) == (0, 0, 60, 40)
    assert second.seen_box(40, 60) != (0, 0, 60, 40)
    assert torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.transforms().resize_size == [256]
