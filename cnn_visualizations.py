#!/usr/bin/env python3
# For `uv run cnn_visualizations.py` (PEP 723); the same as requirements.txt.
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "torchvision>=0.21",
#     "grad-cam>=1.5.7",
#     "pillow>=10.1",
#     "ttach>=0.0.3",
#     "opencv-python-headless>=4.8",
#     "numpy>=1.26",
# ]
# ///
"""Show why a convolutional network answered as it did.

It draws a heatmap (CAM), guided backpropagation, and their product.

    python cnn_visualizations.py --ckpt best.pth 33.jpg
    python cnn_visualizations.py --arch resnet50 --ckpt best.pth --method gradcam photos/

From Python:

    classifier = load_classifier(arch="resnet50", ckpt="best.pth", device="cuda")
    explainer = Explainer(classifier.model, methods=["gradcam"])
    explanation = explainer(inputs)  # inputs: float32 (N, 3, H, W), normalised

Sections, each using only those above it: command line, images, checkpoint, model, explanation,
metrics, output, gallery, run.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import glob
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# --------------------------------------------------------------------------------------------------
# 1  Command line. Standard library only, so that --help and a wrong option do not wait for torch.
# --------------------------------------------------------------------------------------------------

METHODS = (
    "gradcam",
    "scorecam",
    "gradcam++",
    "ablationcam",
    "xgradcam",
    "eigencam",
    "eigengradcam",
)
MORE_METHODS = (
    "hirescam",
    "layercam",
    "gradcamelementwise",
    "fullgrad",
    "fem",
    "kpcacam",
    "shapleycam",
    "finercam",
    "segeigencam",
    "randomcam",
    "refinecam",
)
OUTPUTS = ("cam", "gb", "cam_gb")

# Options of other programs, and what to pass instead.
SYNONYMS = {
    "--model": "--arch",
    "--cuda": "--device cuda",
    "--weights": "--ckpt",
    "--checkpoint": "--ckpt",
    "--use-cuda": "--device cuda",
    "--image-path": "the photo without an option",
    "--output-dir": "--output",
}

DESCRIPTION = (
    "Show why a convolutional network answered as it did: "
    "heatmap (CAM), guided backpropagation, and their product."
)
EXAMPLES = """\
examples:
  python cnn_visualizations.py --ckpt best.pth --class-names cat,dog 33.jpg
  python cnn_visualizations.py --ckpt best.pth --target-class 0 --target-class 1 --sheet photos/
"""


class CallError(Exception):
    """The call cannot be carried out. The message is one line that says what to do. Status 2."""


class PhotoError(Exception):
    """One photo cannot be explained; the others can. The message is one line. Status 1."""


def escape(character: str) -> str:
    """Return a character as it is printed: a control character as its escape sequence."""
    if character.isprintable():
        return character
    return repr(character)[1:-1]


def print_line(text: str, stream: Any = None) -> None:
    """Print one line, on stdout by default. Control characters, as in a file name, are escaped."""
    print("".join(map(escape, text)), file=stream, flush=True)


@functools.cache
def warn(message: str) -> None:
    """Print a warning on stderr, each one once."""
    print_line(f"warning: {message}", sys.stderr)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type."""
    message = str(error).strip()
    if not message:
        return type(error).__name__
    return message.splitlines()[0]


def closest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with up to three known names that resemble `name`, or ""."""
    if not name:
        return ""

    known = list(known)
    similar = [word for word in known if name.casefold() in word.casefold()][:3]
    similar += difflib.get_close_matches(name, known)
    if not similar:
        return ""

    suggestions = list(dict.fromkeys(similar))[:3]
    return f"; did you mean {' or '.join(suggestions)}?"


# Option types: each turns the text of an option into its value. Raises CallError: it is wrong.


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return an option type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,12}", text):
            value = int(text)
            if low <= value <= high:
                return value
        raise CallError(f"'{text}' is not a whole number from {low} to {high}")

    return parse


def decimal_number(low: float, high: float) -> Callable[[str], float]:
    """Return an option type: a number from `low` to `high`, without an exponent."""

    def parse(text: str) -> float:
        if re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", text):
            value = float(text)
            if low <= value <= high:
                return value
        raise CallError(f"'{text}' is not a number from {low} to {high}")

    return parse


def three_numbers(low: float) -> Callable[[str], list[float]]:
    """Return an option type: three numbers from `low` to 255, "R,G,B", or one for all three."""
    parse_number = decimal_number(low, 255)

    def parse(text: str) -> list[float]:
        values = [parse_number(word.strip()) for word in text.split(",")]
        if len(values) == 1:
            return values * 3
        if len(values) != 3:
            raise CallError(f"'{text}' is neither one number nor three with commas between them")
        return values

    return parse


def input_size(text: str) -> tuple[int, int]:
    """Option type: height and width, "256x128", or one number for both."""
    sides = text.lower().split("x")
    if len(sides) > 2:
        raise CallError(f"'{text}' is neither one number nor HEIGHTxWIDTH")

    parse_side = whole_number(8, 4096)
    height = parse_side(sides[0])
    width = parse_side(sides[-1])
    return height, width


def resize_mode(text: str) -> str | int:
    """Option type: "crop", "squash" or the length of the short side before the crop."""
    mode = text.lower()
    if mode in ("crop", "squash"):
        return mode
    if not text.isdigit():
        raise CallError(f"'{text}' is neither crop nor squash nor a whole number from 8 to 8192")
    return whole_number(8, 8192)(text)


def names_from(known: Sequence[str], kind: str, every: Sequence[str]) -> Callable[[str], list[str]]:
    """Return an option type: known names with commas between them; "all" stands for `every`."""

    def parse(text: str) -> list[str]:
        if text.strip().lower() == "all":
            return list(every)

        words = [word.strip().lower() for word in text.split(",")]
        names = [word for word in words if word]
        for name in names or [""]:
            if name not in known:
                suggestion = closest(name, known)
                raise CallError(f"unknown {kind} '{name}'{suggestion} (known: {', '.join(known)})")
        return names

    return parse


def some_text(text: str) -> str:
    """Option type: text that is not empty."""
    if not text.strip():
        raise CallError("the value is empty; leave the option out or pass a value")
    return text


def existing_file(text: str) -> Path:
    """Option type: the path of a file that exists and is not empty."""
    path = Path(some_text(text))
    if path.is_dir():
        raise CallError(f"{text}: is a folder, not a file")
    if not path.is_file():
        raise CallError(f"{text}: no such file")
    if path.stat().st_size == 0:
        raise CallError(f"{text}: is empty")
    return path


def class_names(text: str) -> list[str]:
    """Option type: names with commas between them, or a file of names (see `names_in`)."""
    some_text(text)
    try:
        if looks_like_file(text):
            return names_in(existing_file(text).read_text(encoding="utf-8-sig"))
        return names_in(text.replace(",", "\n"))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = first_line(error)
        message = f"{text}: not class names in UTF-8, one a line or as JSON: {reason}"
        raise CallError(message) from error


def looks_like_file(text: str) -> bool:
    """Return whether a text is an existing path, or has a folder or a suffix as paths have."""
    if os.path.exists(text):
        return True
    return "," not in text and bool(re.search(r"[\\/]|\.\w{2,5}$", text))


def names_in(content: str) -> list[str]:
    """Return the class names in a text: one a line, or JSON. Raises ValueError or TypeError."""
    if content.lstrip().startswith(("[", "{")):
        return ordered_names(json.loads(content))

    lines = map(str.strip, content.splitlines())
    return ordered_names(list(filter(None, lines)))


def ordered_names(classes: Any) -> list[str]:
    """Return class names in the order of their indices.

    `classes` is ["cat", "dog"], {"0": "cat"}, {"cat": 0} or {"0": ["n02123045", "tabby"]}.
    Raises ValueError or TypeError: anything else.
    """
    if isinstance(classes, Mapping):
        classes = sorted_by_index(classes)
    if isinstance(classes, str):
        raise ValueError("a text, neither a list nor a dict of names")

    names = []
    for name in classes:
        if isinstance(name, (list, tuple)) and name:
            name = name[-1]
        if not isinstance(name, (str, int, float)):
            raise ValueError("neither a list nor a dict of names")
        names.append(str(name))

    if not names:
        raise ValueError("no names in it")
    return names


def sorted_by_index(classes: Mapping[Any, Any]) -> list[Any]:
    """Return the names of a dict {index: name} or {name: index}. Raises ValueError or TypeError."""
    by_index = {}
    for key, value in classes.items():
        if isinstance(value, int):
            by_index[value] = key
        else:
            by_index[int(key)] = value

    indices = sorted(by_index)
    if indices != list(range(len(classes))):
        raise ValueError("the indices are not 0, 1, 2 ...")
    return [by_index[index] for index in indices]


def device_name(text: str) -> str:
    """Option type: the name of a device; gpu stands for cuda."""
    if text.lower() == "gpu":
        return "cuda"
    return some_text(text)


METHOD_LIST = names_from((*METHODS, *MORE_METHODS), "method", METHODS)
OUTPUT_LIST = names_from(OUTPUTS, "output", OUTPUTS)

# Options whose value is a list with commas, and their types.
LIST_OPTIONS: dict[str, Callable[[str], Any]] = {
    "--method": METHOD_LIST,
    "--outputs": OUTPUT_LIST,
    "--class-names": class_names,
    "--mean": three_numbers(0),
    "--std": three_numbers(1e-6),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose option types raise CallError."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        line = " ".join(message.split())
        print_line(f"error: {line}", sys.stderr)
        self.exit(2)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except CallError as error:
            raise argparse.ArgumentError(action, str(error)) from error


def add_network_options(parser: Parser) -> None:
    """Add the options of the network."""
    add = parser.add_argument_group("the network").add_argument

    add(
        "--arch",
        type=some_text,
        metavar="NAME",
        help="A torchvision architecture, or net.py:build, your own function. "
        "Default: recognised from the checkpoint.",
    )

    add(
        "--ckpt",
        type=existing_file,
        metavar="FILE",
        help="Your checkpoint: .pth, .pt, .ckpt or .safetensors. "
        "Default: torchvision's ImageNet weights are downloaded.",
    )

    text = "How many classes. Default: the checkpoint's."
    add("--num-classes", type=whole_number(1, 10**6), metavar="N", help=text)

    add(
        "--class-names",
        type=class_names,
        metavar="NAMES",
        help="Class names in the order of training: cat,dog or a file, one a line or JSON. "
        "Default: the checkpoint's.",
    )

    text = "Each output is a sigmoid of its own: a photo may show several classes or none."
    add("--multi-label", action="store_true", help=text)

    add(
        "--device",
        type=device_name,
        metavar="NAME",
        help="cuda, cuda:1, mps (Apple), xpu (Intel) or cpu. "
        "Default: the CUDA GPU if there is one, else the CPU.",
    )

    text = "Photos at once. Default: GPU 32, CPU 2."
    add("--batch-size", type=whole_number(1, 4096), metavar="N", help=text)


def add_input_options(parser: Parser) -> None:
    """Add the options of what the network sees."""
    add = parser.add_argument_group("what the network sees").add_argument

    add(
        "--input-size",
        type=input_size,
        metavar="PX",
        help="Side of the network's square input, or HxW, its height and width. "
        "Default: the checkpoint's entry, else torchvision's preset.",
    )

    add(
        "--resize",
        type=resize_mode,
        default="crop",
        metavar="crop|squash|PX",
        help="crop: the centre of the photo (default). PX: likewise, with the photo's short side "
        "resized to that length before. squash: the whole photo, aspect ratio not kept.",
    )

    add(
        "--mean",
        type=three_numbers(0),
        metavar="R,G,B",
        help="Mean that is subtracted, R,G,B from 0 to 1 or to 255, or one number. "
        "ToTensor() alone: --mean 0 --std 1.",
    )

    text = "Standard deviation that is divided by, likewise."
    add("--std", type=three_numbers(1e-6), metavar="R,G,B", help=text)


def add_explanation_options(parser: Parser) -> None:
    """Add the options of the explanation."""
    add = parser.add_argument_group("the explanation").add_argument

    add(
        "--method",
        type=METHOD_LIST,
        action="extend",
        metavar="LIST",
        dest="methods",
        help=f"{', '.join(METHODS)} (default: gradcam); several with commas; all for these. "
        f"Or {', '.join(MORE_METHODS)}.",
    )

    add(
        "--target-layer",
        type=some_text,
        action="append",
        metavar="NAME",
        dest="target_layers",
        help="Layer to explain, such as layer4; repeat it to average several. "
        "Default: the last with a spatial map.",
    )

    add(
        "--target-class",
        type=some_text,
        action="append",
        metavar="CLASS",
        dest="target_classes",
        help="Class to explain: name, index, truth or predicted; repeat it for several. "
        "Default: each photo's prediction.",
    )

    text = "Explain the N classes of highest probability."
    add("--top-k", type=whole_number(1, 10**6), metavar="N", help=text)

    text = "Average over six variants of the photo: smoother, six times slower."
    add("--aug-smooth", action="store_true", help=text)

    text = "Take the first principal component over the channels: less noise."
    add("--eigen-smooth", action="store_true", help=text)

    text = "Measure each map: average drop, increase, deletion, insertion, ROAD."
    add("--metrics", action="store_true", help=text)


def add_picture_options(parser: Parser) -> None:
    """Add the options of the pictures."""
    add = parser.add_argument_group("the pictures").add_argument

    text = "Which pictures: cam, gb, cam_gb. Default: all three. cam alone is the fastest."
    add("--outputs", type=OUTPUT_LIST, action="extend", metavar="LIST", help=text)

    text = "Long side of the pictures. Default: the photo's own resolution, at most 1024."
    add("--output-size", type=whole_number(16, 8192), metavar="PX", help=text)

    text = "Also write one picture with all methods and classes of a photo."
    add("--sheet", action="store_true", help=text)

    text = "OpenCV's: jet (default), turbo, viridis ..."
    add("--colormap", type=some_text, default="jet", metavar="NAME", help=text)

    text = "Opacity of the heatmap. Default: 0.5."
    add("--alpha", type=decimal_number(0, 1), default=0.5, metavar="A", help=text)

    text = "The heat's opacity grows with the map: cold places show the photo as it is."
    add("--fade", action="store_true", help=text)

    formats = ("jpg", "png", "webp")
    add("--format", type=str.lower, choices=formats, default="jpg", help="Default: jpg.")

    text = "Of jpg and webp. Default: 98."
    add("--quality", type=whole_number(1, 100), default=98, metavar="Q", help=text)


def add_file_options(parser: Parser) -> None:
    """Add the options of the files, and of which photos get them."""
    add = parser.add_argument_group("the files").add_argument

    text = "Where the files go. Default: out."
    add("--output", type=some_text, default="out", metavar="FOLDER", help=text)

    text = "Also write maps, gradients and logits as NumPy's .npz."
    add("--save-arrays", action="store_true", help=text)

    text = "Skip what an earlier run with the same options has finished."
    add("--skip-existing", action="store_true", help=text)

    text = "Pictures only where the prediction is not the class of the folder."
    add("--only-wrong", action="store_true", help=text)

    text = "No index.html, the page of all results."
    add("--no-gallery", action="store_false", dest="gallery", help=text)

    text = "Print the layers with the size of their maps, and end."
    add("--list-layers", action="store_true", help=text)


def make_parser() -> Parser:
    """Return the parser of all options."""
    parser = Parser(
        "cnn_visualizations.py", description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="Photos (JPEG, PNG, WebP, BMP, TIFF, GIF), folders, patterns, "
        "or - to read paths from standard input.",
    )

    add_network_options(parser)
    add_input_options(parser)
    add_explanation_options(parser)
    add_picture_options(parser)
    add_file_options(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line as a namespace.

    Raises SystemExit: status 0 after --help, 2 where an option is wrong.
    """
    parser = make_parser()
    if argv is None:
        argv = sys.argv[1:]

    # Photos may stand on both sides of the options, and after "--".
    words = list(argv)
    names = []
    if "--" in words:
        end = words.index("--")
        names = words[end + 1 :]
        words = words[:end]
    args, rest = parser.parse_known_args(words)
    check_options(parser, rest)
    check_lists(parser, words)
    args.images += rest + names

    args.methods = list(dict.fromkeys(args.methods or ["gradcam"]))
    args.outputs = list(dict.fromkeys(args.outputs or OUTPUTS))
    args.output = Path(args.output)

    if args.top_k and args.target_classes:
        parser.error("--top-k and --target-class exclude each other: pass one of the two")
    check_images(parser, args)
    return args


def check_options(parser: Parser, words: Sequence[str]) -> None:
    """Report an unknown option among the words that the parser left over."""
    known = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        if word == "-" or not word.startswith("-"):
            continue

        option = word.split("=")[0]
        advice = closest(option, known)
        if option in SYNONYMS:
            advice = f"; pass {SYNONYMS[option]}"
        parser.error(f"unknown option {option}{advice} (see --help)")


def check_lists(parser: Parser, words: Sequence[str]) -> None:
    """Report a list with spaces between its items, which would be taken for photos."""
    for position, option in enumerate(words):
        if option not in LIST_OPTIONS:
            continue

        value = words[position + 1]
        if "," in value.rstrip(",") or os.path.exists(value):
            continue  # a whole list, or a file of class names

        items = list_items(LIST_OPTIONS[option], words[position + 2 :])
        if items:
            listed = ",".join([value, *items]).replace(",,", ",")
            parser.error(f"{option} takes a list without spaces; pass {option} '{listed}'")


def list_items(parse: Callable[[str], Any], words: Sequence[str]) -> list[str]:
    """Return the words at the beginning that are items of a list rather than photos or options."""
    items = []
    for word in words:
        if word.startswith("-") or os.path.exists(word):
            break
        try:
            parse(word)
        except CallError:
            break
        items.append(word)
    return items


def check_images(parser: Parser, args: argparse.Namespace) -> None:
    """Report missing photos, and checkpoints among them."""
    if not args.images and not args.list_layers:
        parser.error("no photo given; pass photos or folders (see --help)")

    for name in args.images:
        if not name.strip():
            parser.error("an empty name among the photos; pass photos or folders (see --help)")
        if name.lower().endswith((".pth", ".pt", ".ckpt", ".safetensors")):
            parser.error(f"{name}: this is a checkpoint, not a photo; pass --ckpt {name}")


# --------------------------------------------------------------------------------------------------
# 2  Images. Paths become decoded photos; memory stays bounded whatever a file contains.
# --------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NOT_READ = (".heic", ".heif", ".avif")  # Pillow needs further packages for these
MAX_PIXELS = 70_000_000  # decoded to RGB, copied and resized they take 0.9 GB
MAX_DEEP_PIXELS = 30_000_000  # of photos with 16 or 32 bits a value
MAX_WEBP_PIXELS = 51_000_000  # its decoder takes 16 bytes a pixel
MIN_SIDE = 8  # pixels
LONGEST_STRIP = 100  # long side : short side; resizing enlarges both to the network's input
STRIP_HEIGHT = 64  # rows that are converted at once
LARGE_PHOTO = 14_000_000  # pixels; photos above are decoded and resized one at a time
MAX_SCANS = 100  # of a JPEG; progressive ones of cameras and the web have about ten
LARGEST_JPEG = 2**27  # bytes
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # not what compressed data may contain
START_OF_IMAGE = b"\xff\xd8"
END_OF_IMAGE = b"\xff\xd9"
START_OF_SCAN = b"\xff\xda"
LOG_NAME = "results.jsonl"


@dataclass(frozen=True)
class Photo:
    """A photo that was found."""

    path: str
    folder: str = ""  # where its files go, relative to --output


@dataclass(frozen=True)
class Request:
    """What the command line and the environment ask for."""

    args: argparse.Namespace
    photos: list[Photo]
    log_size: int = 0  # bytes of results.jsonl when the program started
    rank: int = 0  # torchrun: the number of this process
    local_rank: int = 0  # torchrun: its number on this machine
    world_size: int = 1  # torchrun: how many processes share the photos


def photo_fault(path: str | Path) -> str:
    """Return why a path cannot be a photo, without opening the file, or ""."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path):
            return "" if os.path.getsize(path) else "the file is empty"

    if "://" in str(path):
        return "this is a URL; download the photo and pass the file"
    if glob.has_magic(str(path)):
        return "no file matches this pattern"
    if os.path.exists(path):
        return "not a file"
    return "no such file"


def find_photos(inputs: Sequence[str]) -> list[Photo]:
    """Return the photos that files, folders, patterns and `-` stand for, each one once.

    A folder is walked in sorted order and its tree mirrored; of several folders, the part of their
    paths in which they differ is kept. A path that does not exist stays in the list, for its error
    line. Raises CallError: no photos.
    """
    common = common_folder(inputs)
    photos: dict[str, Photo] = {}
    for name in inputs:
        for photo in photos_of(name, common):
            photos.setdefault(os.path.abspath(photo.path), photo)

    if not photos:
        raise CallError(f"no photos in {', '.join(inputs)}")
    return list(photos.values())


def common_folder(inputs: Sequence[str]) -> str:
    """Return the deepest folder above or equal to all folders among the inputs, or ""."""
    folders = filter(os.path.isdir, inputs)
    try:
        return os.path.commonpath(list(map(os.path.abspath, folders)))
    except ValueError:  # no folder, or two drives of Windows
        return ""


def photos_of(name: str, common: str) -> list[Photo]:
    """Return the photos that one word of the command line stands for."""
    if name == "-":
        lines = filter(str.strip, sys.stdin)
        return [photo_at(line.rstrip("\r\n")) for line in lines]

    if os.path.isdir(name):
        photos = list(walk(os.path.normpath(name), common))
        if not photos:
            warn(f"{name}: no photos in it (looked for {' '.join(SUFFIXES)})")
        return photos

    # The shell of Windows leaves patterns to the program.
    if glob.has_magic(name) and not os.path.lexists(name):
        paths = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if paths:
            return [photo_at(path) for path in paths if not is_own_picture(path)]

    return [photo_at(name)]


def photo_at(path: str, folder: str = "") -> Photo:
    """Return the photo at a path, which is written without "./" and double slashes."""
    if "://" in path:
        return Photo(path, folder)
    return Photo(str(Path(path)), folder)


def walk(top: str, common: str) -> Iterator[Photo]:
    """Yield the photos below a folder, each with its folder relative to `common`.

    Hidden files and the pictures that a log lists are left out. Links to folders are followed, as
    torchvision's ImageFolder does, but no folder is read twice.
    """
    visited: set[str] = set()
    own_pictures: dict[str, list[frozenset[str]]] = {}  # folder -> names in its log and those above
    unread = 0

    for folder, inner, files in os.walk(top, onerror=warn_unlisted, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            inner.clear()
            continue
        visited.add(real)
        inner[:] = sorted(filter(is_visible, inner))

        # A log covers the folders below it. Its set of names is shared, since it may be large.
        logs = own_pictures.get(os.path.dirname(folder), [])
        names = logged_names(folder)
        if names:
            logs = [*logs, names]
        own_pictures[folder] = logs

        mirrored = mirrored_folder(folder, common)
        for name in sorted(filter(is_visible, files)):
            if name.lower().endswith(NOT_READ):
                unread += 1
            if not name.lower().endswith(SUFFIXES):
                continue
            if not any(name in names for names in logs):
                yield photo_at(os.path.join(folder, name), mirrored)

    if unread:
        suffixes = " ".join(NOT_READ)
        warn(f"{top}: {unread} photos left out, {suffixes} cannot be read; convert them to JPEG")


def is_visible(name: str) -> bool:
    """Return whether a file or folder is not hidden."""
    return not name.startswith(".")


def warn_unlisted(error: OSError) -> None:
    """Warn of a folder that cannot be listed."""
    warn(f"{error.filename}: cannot be listed")


def mirrored_folder(folder: str, common: str) -> str:
    """Return a folder relative to `common`, or its path without the drive where there is none."""
    absolute = os.path.abspath(folder)
    if not common:
        return os.path.splitdrive(absolute)[1].lstrip("\\/")

    relative = os.path.relpath(absolute, common)
    return "" if relative == "." else relative


def is_own_picture(path: str) -> bool:
    """Return whether the log beside a file lists it: it is a picture of ours, not a photo."""
    folder, name = os.path.split(path)
    return name in logged_names(folder)


@functools.cache
def logged_names(folder: str) -> frozenset[str]:
    """Return the names of the files that the log in a folder lists."""
    path = os.path.join(folder, LOG_NAME)
    if not os.path.isfile(path):
        return frozenset()

    names: set[str] = set()
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                files = record_files(parse_record(line))
                names.update(map(os.path.basename, files))
    except OSError as error:
        warn(f"{path}: cannot be read: {error.strerror}")
    return frozenset(names)


def parse_record(line: str | bytes) -> dict[str, Any]:
    """Return a line of the log as a dict, or {} where it is no record in this program's layout."""
    try:
        record = json.loads(line)
        if is_record(record):
            return record
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    return {}


def is_record(record: Any) -> bool:
    """Return whether the texts and the files of a record are where they belong.

    Raises TypeError, LookupError or AttributeError: a part of it is of another kind.
    """
    texts = [record["image"], record["method"], *record_files(record)]
    texts += [record.get(key, "") for key in ("source", "error", "options", "output_stem")]
    for explained in record.get("classes", []):
        texts.append(explained["name"])
    return all(isinstance(text, str) for text in texts)


def record_files(record: Mapping[str, Any]) -> list[str]:
    """Return the paths of all files of a record, relative to the folder of the log."""
    files = list(record.get("files", {}).values())
    for explained in record.get("classes", []):
        files += explained["files"].values()
    return files


def report_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print one line for an uncaught error that the user can mend, else the traceback.

    Stands in for sys.excepthook.
    """
    is_scarcity = isinstance(error, (MemoryError, OSError, ImportError))
    if isinstance(error, ModuleNotFoundError):
        message = f"{first_line(error)}; run: pip install -r requirements.txt"
    elif is_scarcity or re.search("thread|allocate", str(error)):
        reason = first_line(error)
        message = f"memory, threads or open files do not suffice ({reason}); see ulimit -a"
    else:
        return sys.__excepthook__(kind, error, trace)

    print_line(f"error: {message}", sys.stderr)


def start() -> Request:
    """Return what the command line asks for, checked as far as that goes without torch.

    Raises SystemExit: status 2 after a wrong call, 1 where none of the photos exists.
    """
    on_interrupt(stop_at_once)
    prepare_streams()
    args = parse_args()

    try:
        ranks = torchrun_ranks()
        if args.list_layers:
            return Request(args, [], 0, **ranks)
        photos = find_photos(args.images)
        faults = faults_of(photos)
        if len(faults) == len(photos):
            stop(1, faults)
        check_output(args.output)
        # Now, because loading torch takes seconds.
        return Request(args, photos, size_of_log(args.output), **ranks)
    except CallError as error:
        stop(2, [str(error)])
    except OSError as error:
        stop(2, [f"the photos cannot be listed: {error}"])


def on_interrupt(handler: Any) -> None:
    """Set what Ctrl-C does, unless it is ignored: a script has started the program with "&"."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def stop_at_once(*_: Any) -> NoReturn:
    """Handle Ctrl-C before the first photo: one line, exit status 130."""
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(130)


def stop(status: int, errors: Iterable[str]) -> NoReturn:
    """Print a line for each error, and exit with that status."""
    for error in errors:
        print_line(f"error: {error}", sys.stderr)
    sys.exit(status)


def prepare_streams() -> None:
    """Open the standard streams that the shell has closed, and let them take any file name."""
    for name in ("stdin", "stdout", "stderr"):
        mode = "r" if name == "stdin" else "w"
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115

    # A name that the terminal cannot show, or that is not UTF-8, does not end the run.
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")


def torchrun_ranks() -> dict[str, int]:
    """Return rank, local_rank and world_size from torchrun's variables. Raises CallError."""
    ranks = {"rank": 0, "local_rank": 0, "world_size": 1}
    for key, default in ranks.items():
        variable = key.upper()
        text = os.environ.get(variable, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise CallError(f"{variable}='{text}' in the environment is not a number; unset it")
        ranks[key] = int(text)

    if ranks["rank"] >= ranks["world_size"]:
        rank = ranks["rank"]
        world_size = ranks["world_size"]
        message = f"RANK={rank} and WORLD_SIZE={world_size} in the environment"
        raise CallError(f"{message}: RANK must be less than WORLD_SIZE; unset both")
    return ranks


def faults_of(photos: Iterable[Photo]) -> list[str]:
    """Return a line for each photo that does not exist or cannot be one."""
    lines = []
    for photo in photos:
        fault = photo_fault(photo.path)
        if fault:
            lines.append(f"{photo.path}: {fault}")
    return lines


def check_output(folder: Path) -> None:
    """Check that files can be written to a folder or it can be created. Raises CallError."""
    existing = Path(os.path.abspath(folder))
    while existing != existing.parent and not os.path.lexists(existing):
        existing = existing.parent

    if not existing.is_dir():
        raise CallError(f"--output {folder}: cannot write there: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CallError(f"--output {folder}: cannot write there: no permission for {existing}")


def size_of_log(folder: Path) -> int:
    """Return the size of the log in a folder in bytes, 0 where there is none."""
    try:
        return os.path.getsize(folder / LOG_NAME)
    except OSError:
        return 0


if __name__ == "__main__":
    REQUEST = start()
    # Threads that spin while they wait slow the others down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.excepthook = report_crash

import copy
import errno
import hashlib
import importlib.util
import inspect
import io
import itertools
import logging
import math
import pickletools
import stat
import tempfile
import threading
import time
import types
import unicodedata
import warnings
import zipfile
from collections import Counter, OrderedDict, deque, namedtuple
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import field, replace
from functools import partial
from urllib.parse import quote

import cv2
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

Picture = NDArray[np.uint8]  # RGB, (H, W, 3)
Floats = NDArray[np.float32]
DECODING = threading.RLock()  # held for a large photo


def read_photo(path: str | Path) -> Picture:
    """Return the first frame or page of a photo, turned upright as its EXIF orientation says.

    Transparency is dropped, as it is by the loaders that networks are trained with (torchvision's
    ImageFolder, OpenCV).

    Returns: uint8 RGB (H, W, 3).
    Raises PhotoError: the file is missing, not a picture, broken, too large or too small.
    """
    with open_photo(path) as photo:
        return photo


@contextlib.contextmanager
def open_photo(path: str | Path, short_side: int = 0) -> Iterator[Picture]:
    """Yield what `read_photo` returns. Large photos wait for each other until their block ends.

    Preprocess the photo inside the block, so that the memory of large photos does not add up.

    Args:
        path: the photo.
        short_side: the length to which the block resizes its short side, the aspect ratio kept.

    Raises PhotoError: likewise, or the resized photo would be too large.
    """
    fault = photo_fault(path)
    if fault:
        raise PhotoError(f"{path}: {fault}")

    with contextlib.ExitStack() as locks:
        try:
            photo = decode(path, short_side, locks)
        except PhotoError:
            raise
        except Exception as error:  # decoders raise nearly anything, struct.error to MemoryError
            reason = first_line(error)
            message = f"{path}: cannot be read: {reason}; convert it to JPEG or PNG"
            raise PhotoError(message) from error
        yield photo


def count_pixels(image: Image.Image, path: str | Path, short_side: int) -> int:
    """Return for how many pixels a photo needs memory while it is decoded and resized.

    Raises PhotoError: there are too many, or the photo is too thin or has too many scans.
    """
    short, long = sorted(image.size)
    size = "{} x {} pixels".format(*image.size)
    if short < MIN_SIDE or long > LONGEST_STRIP * short:
        limits = f"at least {MIN_SIDE}, up to {LONGEST_STRIP} : 1"
        raise PhotoError(f"{path}: {size}, too thin ({limits})")

    limit = MAX_PIXELS
    if is_deep(image):
        limit = MAX_DEEP_PIXELS
    if image.format == "WEBP":
        limit = MAX_WEBP_PIXELS
    millions = limit // 10**6
    if short * long > limit:
        raise PhotoError(f"{path}: {size}, at most {millions} million can be read")

    tile = tile_pixels(image)
    if tile > limit:
        raise PhotoError(f"{path}: a tile of {tile} pixels, at most {millions} million")

    resized = short_side**2 * long // short
    if resized > MAX_PIXELS:
        raise PhotoError(f"{path}: {size}, too long for a short side of {short_side} pixels")

    if image.format in ("JPEG", "MPO") and count_scans(path) > MAX_SCANS:
        raise PhotoError(f"{path}: more than {MAX_SCANS} scans; save the photo anew")

    return max(short * long, tile, resized)


def is_deep(image: Image.Image) -> bool:
    """Return whether the image is grey with 16 or 32 bits a pixel: Pillow's modes I;16, I, F."""
    return image.mode.startswith(("I", "F"))


def tile_pixels(image: Image.Image) -> int:
    """Return the size of a TIFF's tiles, which may be larger than the image; else 0."""
    if image.format != "TIFF":
        return 0
    return image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0)


def count_scans(path: str | Path) -> int:
    """Return how many scans a JPEG file has. Decoding goes over all pixels in each of them."""
    with open(path, "rb") as file:
        data = file.read(LARGEST_JPEG)

    scans = 0
    position = 0
    while scans <= MAX_SCANS:
        marker = JPEG_MARKER.search(data, position)
        if marker is None or marker[0] == END_OF_IMAGE:
            break
        if marker[0] == START_OF_SCAN:
            scans += 1

        # A marker is followed by the length of its segment.
        position = marker.end()
        if marker[0] != START_OF_IMAGE:
            position += int.from_bytes(data[position : position + 2], "big")
    return scans


def decode(path: str | Path, short_side: int, locks: contextlib.ExitStack) -> Picture:
    """Return the pixels of a photo, turned upright: uint8 RGB (H, W, 3).

    For a large photo, DECODING is entered into `locks`.
    """
    with Image.open(path, formats=FORMATS) as image:
        if count_pixels(image, path, short_side) > LARGE_PHOTO:
            locks.enter_context(DECODING)

        has_16_bits = ";16" in str(image.tile)  # of a colour image, Pillow gives the upper eight
        image.load()
        image.getexif()
        image.info.pop("exif", None)  # exif_transpose would write it anew, where odd entries fail
        ImageOps.exif_transpose(image, in_place=True)

        if is_deep(image):
            image = to_eight_bits(image, path)
        pixels = to_array(image)

    if has_16_bits and pixels.max() < 16:
        warn(f"{path}: 16 bits, but no value above 4095; 65535 is shown as white")
    return pixels


def to_array(image: Image.Image) -> Picture:
    """Return the pixels of an image, converted in strips, so that it is not copied as a whole."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, STRIP_HEIGHT):
        bottom = min(top + STRIP_HEIGHT, height)
        strip = image.crop((0, top, width, bottom))
        if strip.mode != "RGB":
            strip = strip.convert("RGB")
        pixels[top:bottom] = strip
    return pixels


def to_eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Return a grey image of 16 or 32 bits with 8 bits; Pillow's convert would clip it to white."""
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False)
    low = values.min()
    high = values.max()

    # Sixteen bits have their own white. Of other values it is a guess, unless they go from 0 to 1.
    white = 65535.0
    is_guess = image.mode == "I" and image.format == "TIFF"
    if image.mode == "F":
        white = 1.0 if high <= 1 else 255.0
        is_guess = low < 0 or high > 1
    if is_guess:
        warn(f"{path}: values from {low:g} to {high:g}; {white:g} is shown as white")

    values *= 255 / white
    values += 0.5  # rounds to the nearest
    np.clip(values, 0, 255, out=values)
    return Image.fromarray(values.astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# 3  Checkpoint. A file becomes tensors and entries; nothing that it contains is run.
# --------------------------------------------------------------------------------------------------

MAX_PICKLE_BYTES = 64 * 2**20  # of the structure of a checkpoint, without its tensors
MAX_PICKLE_STEPS = 3_000_000  # of the pickle machine; 2,000 tensors take 60,000
MAX_KEY_LENGTH = 300  # characters of a tensor's full name

# Where training scripts put their options, and under which names.
OPTION_DICTS = (
    "args",
    "config",
    "cfg",
    "opt",
    "hparams",
    "hyper_parameters",
    "meta",
    "dataset_meta",
)
ENTRY_NAMES = {
    "arch": ("arch", "model_name", "model", "architecture"),
    "classes": (
        "classes",
        "class_names",
        "names",
        "class_to_idx",
        "idx_to_class",
        "id2label",
        "CLASSES",
    ),
    "input_size": ("input_size", "image_size", "img_size", "val_crop_size"),
    "resize": ("val_resize_size",),
    "mean": ("mean",),
    "std": ("std",),
    "multi_label": ("multi_label",),
}

# Tensors that training leaves in a file and that no forward pass reads: optimizers, moving
# averages, losses with their centres, metrics.
TRAINING_ONLY = re.compile(
    r"(^|[._])(optim\w*|\w*loss\w*|criterion\w*|centers?|metrics?|acc\w*|n_averaged)([._]|$)",
    re.IGNORECASE,
)
AVERAGE = re.compile(r"(^|[._])(ema|swa|averag\w*)([._]|$)", re.IGNORECASE)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """A value beside the weights, such as the names of the classes."""

    name: str  # its key in the file
    value: Any
    origin: str  # as "from best.pth" or "from args in best.pth"


@dataclass(frozen=True)
class PickledModule:
    """What a pickled network tells of one of its modules."""

    kind: str  # the name of its class
    attributes: Mapping[str, Any]  # such as `stride` and `eps`


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    name: str  # for messages: the path of the file
    tensors: State = field(default_factory=dict)  # by full name, as "state_dict.module.fc.weight"
    entries: Mapping[str, Sequence[Entry]] = field(default_factory=dict)  # by a key of ENTRY_NAMES
    modules: Mapping[str, PickledModule] = field(default_factory=dict)  # of pickled networks

    @property
    def file(self) -> str:
        """The name of the file without its folder."""
        return os.path.basename(self.name)

    def first_entry(self, kind: str) -> Entry | None:
        """Return the first entry of a kind, or None."""
        return next(iter(self.entries.get(kind, ())), None)


class StandIn:
    """Stands for a class or function that a checkpoint names. It keeps what it gets and runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __new__(cls, *args: Any) -> StandIn:
        instance = super().__new__(cls)
        instance.__init__(*args)  # pickle creates objects by __new__ alone
        return instance

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the tensors, the entries and the modules of a checkpoint. Raises CallError."""
    existing_file(str(path))
    if path.suffix == ".safetensors":
        content = load_safetensors(path)
    else:
        content = load_pickle(path)
    return read_content(content, str(path))


def load_safetensors(path: Path) -> State:
    """Return the tensors of a .safetensors file. Raises CallError."""
    try:
        from safetensors.torch import load_file

        return load_file(path)
    except ImportError as error:
        message = f"{path}: needs the safetensors package; run: pip install safetensors"
        raise CallError(message) from error
    except Exception as error:
        raise CallError(f"{path}: not a whole .safetensors file; copy it again") from error


def load_pickle(path: Path) -> Any:
    """Return what a file of torch.save holds, with stand-ins for what would be code.

    Files of torch before 1.6 are no archives; of these only those without pickled objects are read.
    Raises CallError: the file is damaged, is a TorchScript archive, or would cost too much.
    """
    try:
        stand_ins = []
        if zipfile.is_zipfile(path):
            check_archive(path)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = [(make_stand_in(name), name) for name in names]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CallError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise CallError(f"{path}: {why_not_loaded(error)}") from error


def check_archive(path: Path) -> None:
    """Raise CallError where reading an archive of torch.save would cost more than its file shows."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        if any("/code/" in file.filename for file in files):
            raise CallError(
                f"{path}: a TorchScript archive, which is code; load it in Python and save its weights: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'best.pth')"
            )

        # torch.save stores its records uncompressed, so that none is larger than the file
        if any(file.compress_type != zipfile.ZIP_STORED for file in files):
            raise CallError(f"{path}: a compressed archive; pass the file that torch.save wrote")
        if sum(file.file_size for file in files) > path.stat().st_size:
            raise CallError(f"{path}: damaged: its records add up to more than the file")

        for file in files:
            if file.filename.endswith("data.pkl"):
                check_pickle(path, archive, file)


def check_pickle(path: Path, archive: zipfile.ZipFile, file: zipfile.ZipInfo) -> None:
    """Raise CallError where the structure of a checkpoint is larger than any real one."""
    if file.file_size > MAX_PICKLE_BYTES:
        size = file.file_size // 2**20
        raise CallError(f"{path}: {size} MB of values beside the tensors, at most 64 can be read")
    steps = pickletools.genops(archive.read(file))
    if sum(1 for _ in itertools.islice(steps, MAX_PICKLE_STEPS)) == MAX_PICKLE_STEPS:
        raise CallError(f"{path}: too many values beside the tensors; save the weights alone")


def make_stand_in(name: str) -> type:
    """Return an inert class for a class or function of that full name; subclasses of dict become dicts."""
    if re.search(r"dict$|CfgNode$", name, re.IGNORECASE):
        return type(name, (), {"__new__": lambda cls, *args: OrderedDict()})
    return type(name, (StandIn,), {})


def why_not_loaded(error: Exception) -> str:
    """Return, for the message, why torch.load refused a file, and what to do."""
    if "is blocked" in str(error) or "nsupported global" in str(error).replace("GLOBAL", "global"):
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = "an object" if named is None else named.group(1)
        return (
            f"refers to {what}, and loading it would run code; if you trust the file, save its weights: "
            "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'best.pth')"
        )
    kind = type(error).__name__
    return (
        f"not a whole checkpoint that torch can read ({kind}); copy it again, or pass another file"
    )


def read_content(content: Any, name: str) -> Checkpoint:
    """Sort the content of a file into tensors, entries and modules. Raises CallError."""
    tensors: State = {}
    modules: dict[str, PickledModule] = {}
    waiting = deque([("", content)])
    visited = set()

    # breadth first, each dict once: a file may nest them in themselves
    while waiting:
        prefix, holder = waiting.popleft()
        if id(holder) in visited:
            continue
        visited.add(id(holder))
        if is_pickled_module(holder):
            kind = type(holder).__name__.rpartition(".")[2]
            modules[prefix.removesuffix(".")] = PickledModule(kind, holder.state)

        for key, value in children_of(holder).items():
            full_name = prefix + modern_name(str(key))
            if isinstance(value, Tensor):
                check_tensor(value, full_name, name)
                tensors[full_name] = value.detach()
            elif "optim" not in str(key) and len(full_name) < MAX_KEY_LENGTH:
                waiting.append((f"{full_name}.", value))

    entries = find_entries(content, name)
    if not any(tensor.ndim > 1 for tensor in tensors.values()):
        raise CallError(f"{name}: no weights in it (found: {outline(content)})")
    if isinstance(content, Mapping) and not is_state(content):
        # tensors beside the dict of the weights are values, such as the weights of the classes
        tensors = {key: tensor for key, tensor in tensors.items() if key not in content}
    return Checkpoint(name, tensors, entries, modules)


def is_state(content: Mapping[Any, Any]) -> bool:
    """Return whether a dict is itself a state dict, with or without values beside the tensors."""
    return any(isinstance(value, Tensor) and value.ndim > 1 for value in content.values())


def is_pickled_module(value: Any) -> bool:
    """Return whether a stand-in holds the state of a torch.nn.Module."""
    if not isinstance(value, StandIn) or not isinstance(value.state, Mapping):
        return False
    return isinstance(value.state.get("_modules"), Mapping)


def children_of(holder: Any) -> Mapping[Any, Any]:
    """Return what a dict or a pickled module holds, in order; of a module, as its state dict names it."""
    if isinstance(holder, Mapping):
        return holder
    if isinstance(holder, StandIn) and not is_pickled_module(holder):
        # torch.compile pickles its wrapper as a call with the network in it
        return {str(index): arg for index, arg in enumerate(holder.args) if is_pickled_module(arg)}
    if not is_pickled_module(holder):
        return {}

    not_saved = holder.state.get("_non_persistent_buffers_set") or ()
    children: dict[Any, Any] = {}
    for part in ("_parameters", "_buffers", "_modules"):
        values = holder.state.get(part)
        if isinstance(values, Mapping):
            children.update(values)
    return {key: value for key, value in children.items() if key not in not_saved}


def modern_name(key: str) -> str:
    """Return the key of a tensor without torch.compile's prefix, and with the names that DenseNet has today.

    Before 2018, torchvision's DenseNet called its layers norm.1 and conv.2 instead of norm1 and conv2.
    """
    key = key.replace("_orig_mod.", "")
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)


def check_tensor(tensor: Tensor, key: str, name: str) -> None:
    """Raise CallError where a tensor cannot be a weight: no values of its own, or no usable name."""
    if len(key) > MAX_KEY_LENGTH:
        raise CallError(f"{name}: not a checkpoint: the name of a tensor has {len(key)} characters")
    is_plain = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested)
    if not is_plain:
        if key in ("mean", "std", "input_size"):
            return  # the entry is refused by name
        raise CallError(f"{name}: {key} has no values or is sparse; save ordinary tensors")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CallError(f"{name}: {key} is larger than its data in the file; save it with .clone()")


def outline(content: Any) -> str:
    """Return the first keys of a dict, or the type of anything else, for a message."""
    if isinstance(content, Mapping):
        return ", ".join(str(key)[:40] for key in list(content)[:8])
    return type(content).__name__


def find_entries(content: Any, name: str) -> dict[str, list[Entry]]:
    """Return the entries of each kind of ENTRY_NAMES, those of the outermost dict first."""
    file = os.path.basename(name)
    holders = [(f"from {file}", as_options(content))]
    for origin, holder in holders:  # grows: `dataset_meta` stands in `meta`
        if len(holders) > len(OPTION_DICTS) or len(origin) > len(file) + 40:
            break
        for key in OPTION_DICTS:
            inner = as_options(holder.get(key))
            if inner:
                holders.append((f"from {key} in {file}", inner))

    is_bare = isinstance(content, Mapping) and is_state(content)
    entries: dict[str, list[Entry]] = {kind: [] for kind in ENTRY_NAMES}
    for kind, keys in ENTRY_NAMES.items():
        for origin, holder in holders:
            for key in keys:
                value = plain_value(holder.get(key))
                is_weight = is_bare and isinstance(value, Tensor)
                if value is not None and not is_weight:
                    entries[kind].append(Entry(key, value, origin))
    return entries


def as_options(value: Any) -> Mapping[Any, Any]:
    """Return the values of a dict, or of a pickled object such as argparse.Namespace, by name."""
    if isinstance(value, StandIn):
        value = value.state
    if isinstance(value, Mapping):
        return value
    return {}


def plain_value(value: Any, depth: int = 2) -> Any:
    """Return a value of a file with NumPy's numbers and arrays as Python's and torch's."""
    if isinstance(value, StandIn):
        return numpy_value(value)
    if isinstance(value, (list, tuple)) and depth:
        return [plain_value(item, depth - 1) for item in value]
    return value


def numpy_value(value: StandIn) -> Any:
    """Return a pickled NumPy number as a number, an array as a flat tensor, and None for anything else."""
    kind = type(value).__name__.rpartition(".")[2]
    with contextlib.suppress(TypeError, ValueError, IndexError, AttributeError, KeyError):
        if kind == "scalar":  # numpy.core.multiarray.scalar(dtype, bytes)
            dtype, data = value.args
            return numbers_from(dtype, data)[0].item()
        if kind == "_reconstruct":  # an array: version, shape, dtype, order, bytes
            _, _, dtype, _, data = value.state
            return torch.from_numpy(numbers_from(dtype, data).copy())
    return None


def numbers_from(dtype: StandIn, data: Any) -> NDArray[Any]:
    """Return the numbers in the bytes of a pickled NumPy value. Raises ValueError, TypeError: no numbers."""
    code = np.dtype(str(dtype.args[0]))
    if code.char not in "?bhilqBHILQefd" or not isinstance(data, bytes):
        raise ValueError("not plain numbers")
    order = dtype.state[1] if dtype.state else "="
    return np.frombuffer(data, code.newbyteorder(order)).astype(code)


# --------------------------------------------------------------------------------------------------
# 4  Model. A checkpoint becomes a classifier that knows its preprocessing and its classes.
# --------------------------------------------------------------------------------------------------


def import_torchvision() -> types.ModuleType:
    """Import torchvision without torch's compiler, which takes 2 s.

    torchvision's roi_align asks the compiler one question while it is imported; a stand-in answers
    no. The compiler works afterwards.
    """

    def answer_no(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return lambda *args, **kwargs: False

    with contextlib.ExitStack() as stack:
        for name in {"torch._dynamo", "torch._dynamo.utils"} - set(sys.modules):
            stand_in = types.ModuleType(name)
            stand_in.__getattr__ = answer_no
            sys.modules[name] = stand_in
            stack.callback(sys.modules.pop, name)
        import torchvision.models
    return torchvision


torchvision = import_torchvision()
ARCHITECTURES = tuple(torchvision.models.list_models(module=torchvision.models))

# A tensor that every network of a family has, by the beginning of the architecture's name.
FAMILY_KEYS = {
    "alexnet": "features.0.weight",
    "convnext": "features.1.0.layer_scale",
    "densenet": "features.denseblock1.denselayer1.conv1.weight",
    "efficientnet": "features.1.0.block.0.0.weight",
    "googlenet": "inception3a.branch1.conv.weight",
    "inception": "Mixed_5b.branch1x1.conv.weight",
    "maxvit": "stem.0.0.weight",
    "mnasnet": "layers.8.0.layers.0.weight",
    "mobilenet_v2": "features.1.conv.0.0.weight",
    "mobilenet_v3": "features.1.block.0.0.weight",
    "regnet": "trunk_output.block1.block1-0.f.a.0.weight",
    "resne": "layer1.0.conv1.weight",  # resnet and resnext
    "shufflenet": "stage2.0.branch2.0.weight",
    "squeezenet": "features.3.squeeze.weight",
    "swin": "features.1.0.attn.qkv.weight",
    "vgg": "features.0.weight",
    "vit": "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
    "wide_resnet": "layer1.0.conv1.weight",
}

# Layouts that are no torchvision classifier's, by a key of their state dicts.
LAYOUTS = {
    r"(^|\.)(rpn|classification_head|(aux|low)_classifier|decode_head|backbone\.body)\.": (
        "it looks like a detector or segmentation network"
    ),
    r"(^|\.)_(conv_stem|blocks\.0)\.": "its keys are efficientnet_pytorch's",
    r"(^|\.)(conv_stem|patch_embed\.proj|(stages|layers)\.0\.blocks\.0|pre_logits)\.": "its keys are timm's",
    r"(^|\.)(embedder|embeddings|encoder\.stages\.0|encoder\.layer\.0)\.": (
        "its keys are Hugging Face's"
    ),
    r"(^|\.)model\.0\.conv\.": "its keys are ultralytics'",
    r"(^|\.)0\.4\.0\.(conv1|bn1)\.": "its keys are fastai's",
    r"(^|\.)4\.0\.(conv1|bn1)\.": "its keys are those of a Sequential of a network's children",
}
OWN_NETWORK = (
    'give a network of your own by --arch net.py:build, see "Another network" in the README'
)

COMPUTED = ("num_batches_tracked", "relative_position_index", "relative_coords_table")
AUXILIARY = re.compile(r"(^|\.)(aux1|aux2|AuxLogits)\.")  # heads for training only
WITH_AUXILIARY = ("googlenet", "inception_v3")

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
GREY_MEAN = [0.449]  # the averages of ImageNet's
GREY_STD = [0.226]

PREDICTED, TRUTH = -1, -2  # classes to explain that differ from photo to photo
LONGEST_NAME = 200  # characters of a class name


@dataclass(frozen=True)
class Classifier:
    """A network with its preprocessing and its classes."""

    model: nn.Module  # on `device`, float32, in eval mode; gives logits (N, classes)
    arch: str  # its torchvision name, or file.py:function
    class_names: tuple[str, ...]  # one for each class
    preset: Any  # torchvision's ImageClassification: PIL image -> float32 (C, H, W), normalised
    device: torch.device
    squash: bool = False  # whether the network sees the whole photo (True) or a part (False)
    multi_label: bool = False  # whether each class has a sigmoid of its own
    outputs: int = 0  # of the network; a single one is explained as two classes
    channels: int = 3  # 1: the network takes grey photos
    head: str = ""  # the layers of a head that is not torchvision's, as "head 512 -> 64 -> 3"
    origins: Mapping[str, str] = field(default_factory=dict)  # where the values come from

    def __repr__(self) -> str:
        return f"Classifier({self.describe()})"

    def describe(self, layers: Sequence[str] = ()) -> str:
        """Return, in one line, all that is assumed about the network, and where it comes from."""
        texts = {
            "arch": self.arch,
            "head": self.head,
            "classes": self.describe_classes(),
            "layers": " and ".join(layers),
            "input": self.describe_input(),
            "mean": self.describe_colours(),
            "device": str(self.device),
        }
        items = []
        for key, text in texts.items():
            origin = self.origins.get(key)
            if text and origin and key != "classes":
                text = f"{text} ({origin})"
            items.append(text)
        return ", ".join(item for item in items if item)

    def describe_classes(self) -> str:
        """Return how the outputs are read, as "2 classes (0 cat, 1 dog; from best.pth), softmax"."""
        details = []
        is_named = self.class_names != unnamed(len(self.class_names))
        if is_named and len(self.class_names) <= 10:
            names = [f"{index} {name}" for index, name in enumerate(self.class_names)]
            details.append(", ".join(names))
        if self.origins.get("classes"):
            details.append(self.origins["classes"])
        inside = f" ({'; '.join(details)})" if details else ""

        if self.outputs == 1:
            return f"1 output{inside}, sigmoid"
        if self.multi_label:
            return f"{self.outputs} labels{inside}, sigmoid"
        return f"{len(self.class_names)} classes{inside}, softmax"

    def describe_input(self) -> str:
        """Return how a photo becomes the input, as "short side 256, centre 224 x 224"."""
        height, width = self.input_size
        grey = "grey, " if self.channels == 1 else ""
        if self.squash:
            return f"{grey}whole photo squashed to {height} x {width}"
        return f"{grey}short side {self.preset.resize_size[0]}, centre {height} x {width}"

    def describe_colours(self) -> str:
        """Return the mean and std that are used."""
        mean = [round(value, 4) for value in self.preset.mean]
        std = [round(value, 4) for value in self.preset.std]
        if mean == IMAGENET_MEAN and std == IMAGENET_STD:
            return "ImageNet mean and std"
        return f"mean {mean} std {std}"

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels."""
        height, width = self.preset.crop_size
        return height, width

    def preprocess(self, photo: Picture) -> Tensor:
        """Return a photo, uint8 RGB (H, W, 3), as the network sees it: float32 (C, H, W), normalised."""
        photo = np.asarray(photo)
        image = Image.fromarray(photo)
        if self.channels == 1:
            image = image.convert("L")
        preset = copy.copy(self.preset)
        if self.sees_all(*photo.shape[:2]):
            preset.resize_size = preset.crop_size
        return preset(image)

    def sees_all(self, height: int, width: int) -> bool:
        """Return whether a photo of that size is used as a whole.

        So is a photo of exactly the input's size, unless the short side before the crop was given.
        """
        is_input = (height, width) == self.input_size and not self.origins.get("short side")
        return self.squash or is_input

    def seen(self, photo: Picture) -> Picture:
        """Return the part of a photo that the network sees, in the photo's pixels: uint8 RGB (h, w, 3)."""
        height, width = photo.shape[:2]
        left, top, right, bottom = self.seen_box(height, width)
        x = min(round(left), width - 1)
        y = min(round(top), height - 1)
        return photo[y : y + max(1, round(bottom - top)), x : x + max(1, round(right - left))]

    def seen_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the part of a photo that the network sees: left, top, right, bottom, in its pixels."""
        if self.sees_all(height, width):
            return 0.0, 0.0, float(width), float(height)

        # as torchvision resizes: the long side is rounded down
        short_side = self.preset.resize_size[0]
        long_side = int(short_side * max(height, width) / min(height, width))
        if width <= height:
            new_width, new_height = short_side, long_side
        else:
            new_width, new_height = long_side, short_side

        # as torchvision crops: the corner is rounded to the nearest pixel
        crop_height, crop_width = self.input_size
        left = round((new_width - crop_width) / 2.0)
        top = round((new_height - crop_height) / 2.0)

        x_scale, y_scale = width / new_width, height / new_height
        right = min(width, (left + crop_width) * x_scale)
        bottom = min(height, (top + crop_height) * y_scale)
        return max(0.0, left * x_scale), max(0.0, top * y_scale), right, bottom


@dataclass(frozen=True)
class Network:
    """A network with its weights, before its preprocessing and its classes are known."""

    model: nn.Module  # in eval mode
    channels: int = 3  # of its input
    outputs: int | None = None  # None: not known before it has run
    head: str = ""  # see Classifier
    ends_in_sigmoid: bool = False  # its pickled head had a sigmoid for each output
    head_inputs: int | None = None  # of its first layer
    colours: Mapping[str, Tensor] = field(default_factory=dict)  # mean and std in the file


def load_classifier(
    arch: str | None = None,
    ckpt: str | Path | None = None,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    *,
    class_names: Sequence[str] | str | None = None,
    input_size: int | Sequence[int] | None = None,
    resize: str | int = "crop",
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    multi_label: bool | None = None,
    folders: Sequence[str] = (),
) -> Classifier:
    """Build a classifier and load the weights of a checkpoint.

    Args:
        arch: a name from `torchvision.models.list_models`, or "file.py:function" for a network of
            your own. None: the checkpoint's entry, else recognised from the weights; without a
            checkpoint, resnet50.
        ckpt: the weights; None: torchvision's ImageNet weights, from its cache or the network.
        num_classes: must agree with the checkpoint; a single output becomes two, of which the
            second has its sigmoid.
        device: None: the CUDA GPU if there is one, else the CPU.
        class_names: one for each class, or a text with commas between them; None: those of the
            checkpoint, else the names of `folders`, else ImageNet's where there are 1000 classes.
        input_size: side of the square input in pixels, or (height, width); None: the checkpoint's,
            else that of torchvision's preset.
        resize: "crop", "squash", or the short side in pixels to which a photo is scaled before the
            central part is cropped.
        mean, std: one number for each colour or one for all, of colours from 0 to 1 or to 255;
            None: the checkpoint's, else the preset's.
        multi_label: whether each output is a sigmoid of its own; None: the checkpoint's entry.
        folders: the folders of the photos, which name the classes in sorted order, as ImageFolder
            does, where there are as many as classes and nothing else names them.

    Raises:
        CallError: something does not fit.
    """
    target, no_gpu = find_device(device)
    check_resize(resize)
    checkpoint = open_checkpoint(arch, ckpt)
    arch, arch_origin = find_architecture(arch, checkpoint)
    if is_own(arch):
        network = build_own(arch, checkpoint, num_classes)
    else:
        network = build_torchvision(arch, checkpoint)

    options = PresetOptions(input_size, resize, as_numbers(mean), as_numbers(std))
    preset, preset_origins = make_preset(arch, network, checkpoint, options)
    outputs = network.outputs
    if outputs is None:
        outputs = count_outputs(network, preset.crop_size, num_classes)
    if num_classes not in (None, outputs, max(outputs, 2)):
        raise CallError(
            f"--num-classes {num_classes}, but {checkpoint.name}: {outputs} classes; "
            "leave the option out"
        )
    network.model.register_forward_hook(partial(give_logits, outputs=outputs))

    names, names_origin = find_class_names(class_names, checkpoint, max(outputs, 2), folders)
    origins = {
        "arch": arch_origin,
        "classes": names_origin,
        "device": no_gpu,
        **preset_origins,
    }
    return Classifier(
        model=network.model.to(target),
        arch=arch,
        class_names=names,
        preset=preset,
        device=target,
        squash=resize == "squash",
        multi_label=outputs > 1 and reads_labels(multi_label, network, checkpoint),
        outputs=outputs,
        channels=network.channels,
        head=network.head,
        origins=origins,
    )


def find_device(name: str | torch.device | None) -> tuple[torch.device, str]:
    """Return a device, by default the CUDA GPU or else the CPU, and why there is no GPU, or "".

    Raises CallError: the device cannot be used.
    """
    wanted = str(name or "cuda")
    try:
        # whether this torch has code for this GPU shows only when it computes
        torch.zeros(1, device=wanted).add_(1).item()
        return torch.device(wanted), ""
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)  # an old driver, CUDA_VISIBLE_DEVICES, a torch without CUDA
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            has_driver = "no NVIDIA driver" not in reason
            reason = f"no CUDA GPU found: {reason}" if has_driver else "no CUDA GPU found"
            if name is None:
                return torch.device("cpu"), reason
        devices = ["cpu"]
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        message = f"device {wanted} cannot be used: {reason}; this machine has {', '.join(devices)}"
        raise CallError(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was missing, the GPU's or the CPU's; oneDNN's word for it is the last one."""
    words = (
        "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|OUT_OF_DEVICE_MEMORY|"
        "create a primitive"
    )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return re.search(words, str(error)) is not None


def reads_labels(given: bool | None, network: Network, checkpoint: Checkpoint) -> bool:
    """Return whether each output is a label of its own."""
    entry = checkpoint.first_entry("multi_label")
    if given is not None:
        return given
    if entry is not None:
        return entry.value is True
    return network.ends_in_sigmoid


# The architecture


def is_own(arch: str) -> bool:
    """Return whether an architecture is a function of the user's, as net.py:build."""
    return ".py:" in arch


def open_checkpoint(arch: str | None, ckpt: str | Path | None) -> Checkpoint:
    """Return the checkpoint, else torchvision's weights; of an own network without one, no weights.

    Raises CallError: it cannot be read, or there is no such architecture.
    """
    if arch is not None and not is_own(arch):
        check_architecture(arch)
    if ckpt is not None:
        return load_checkpoint(Path(ckpt))
    if arch is not None and is_own(arch):
        return Checkpoint("the network")
    return download_weights(arch.lower() if arch else "resnet50")


def check_architecture(arch: str) -> None:
    """Raise CallError where torchvision has no such classifier."""
    if arch.lower() not in ARCHITECTURES:
        hint = closest(arch.lower(), ARCHITECTURES)
        raise CallError(f"unknown architecture '{arch}'{hint} (your own network: net.py:build)")


def download_weights(arch: str) -> Checkpoint:
    """Return torchvision's ImageNet weights, from its cache or the network. Raises CallError."""
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    name = f"torchvision's {arch} weights"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            state = weights.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:
        reason = first_line(error)
        message = f"{name} cannot be downloaded ({reason}); pass your own with --ckpt FILE"
        raise CallError(message) from error
    return read_content(state, name)


def find_architecture(arch: str | None, checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the architecture and where it is from: the option, an entry, or the weights.

    Raises CallError: the weights fit no torchvision classifier.
    """
    if arch is not None:
        return (arch if is_own(arch) else arch.lower()), ""
    if is_downloaded(checkpoint):
        return "resnet50", "default"
    for entry in checkpoint.entries.get("arch", ()):
        if isinstance(entry.value, str) and entry.value.lower() in ARCHITECTURES:
            return entry.value.lower(), entry.origin
    return recognise(checkpoint), "recognised"


def is_downloaded(checkpoint: Checkpoint) -> bool:
    """Return whether the weights are torchvision's own."""
    return checkpoint.name.startswith("torchvision's ")


def recognise(checkpoint: Checkpoint) -> str:
    """Return the architecture whose tensors a checkpoint has. Raises CallError: there is none."""
    size = sum(
        tensor.numel() for key, tensor in checkpoint.tensors.items() if "running_" not in key
    )

    def distance(arch: str) -> int:
        weights = torchvision.models.get_model_weights(arch)
        return min(abs(each.meta["num_params"] - size) for each in weights)

    # the nearest number of parameters first
    best_share, best_arch = 0.5, ""
    for arch in sorted(possible_architectures(checkpoint), key=distance):
        model = skeleton(arch, checkpoint)
        wanted = backbone(model)[0]
        for place in find_places(wanted, checkpoint.tensors):
            if place.matches == len(wanted) and not has_more_layers(place, model, checkpoint):
                return arch
            if place.matches / len(wanted) > best_share:
                best_share, best_arch = place.matches / len(wanted), arch

    reason = f"fits no torchvision classifier ({size / 1e6:.1f} million parameters)"
    if best_arch:
        share = f"{best_share:.0%} of {best_arch}'s tensors are there"
        reason += f"; {share}: --arch {best_arch} tells which are not"
    raise CallError(f"{checkpoint.name} {reason}; {advice(checkpoint)}")


def possible_architectures(checkpoint: Checkpoint) -> list[str]:
    """Return the architectures of which the file has a tensor that all of their family have."""
    possible = []
    for beginning, key in FAMILY_KEYS.items():
        if any(name == key or name.endswith(f".{key}") for name in checkpoint.tensors):
            possible += [arch for arch in ARCHITECTURES if arch.startswith(beginning)]
    return possible


def has_more_layers(place: Place, model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Return whether a part of the network has further layers in the file, as of a deeper variant."""
    wanted, root = backbone(model)
    parts = {key.partition(".")[0] for key in wanted}
    known = set(model.state_dict())
    for key in checkpoint.tensors:
        inner = key.removeprefix(place.prefix)
        is_inside = key.startswith(place.prefix) and inner.partition(".")[0] in parts
        if is_inside and inner not in known and not inner.startswith(root):
            return True
    return False


def advice(checkpoint: Checkpoint) -> str:
    """Return what to do with a checkpoint that fits no torchvision classifier."""
    for pattern, finding in LAYOUTS.items():
        for key in checkpoint.tensors:
            if re.search(pattern, key):
                return f"{finding} ({key}); {OWN_NETWORK}"
    return OWN_NETWORK


# Where the network is in the file


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint a network's tensors stand."""

    prefix: str  # before the network's own names, as "state_dict.module."
    matches: int  # how many of its tensors are there in their shape


class MetaParameters(TorchFunctionMode):
    """Inside `with`, parameters are made on the meta device, without values: they cost nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # to initialise on the meta device would import torch's compiler
        is_initialiser = getattr(func, "__module__", "") == "torch.nn.init"
        if is_initialiser or getattr(func, "__name__", "") in RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


RANDOM_FILLS = ("normal_", "uniform_", "trunc_normal_")


def skeleton(arch: str, checkpoint: Checkpoint) -> nn.Module:
    """Return the architecture without weights, with the options that the file implies."""
    options: dict[str, Any] = {}
    if arch in WITH_AUXILIARY:
        options = {"aux_logits": False, "init_weights": False}
        options["transform_input"] = transforms_input(checkpoint)
    if arch.startswith("vit_"):
        options = vit_options(arch, checkpoint)
    with MetaParameters():
        model = torchvision.models.get_model(arch, weights=None, num_classes=2, **options)
        fit_stem(model, checkpoint)
    return model


def transforms_input(checkpoint: Checkpoint) -> bool:
    """Return whether googlenet or inception_v3 expects torchvision's own transform of its input.

    torchvision's weights for these two expect (p - 0.5) / 0.5, and its builders add that transform
    when they load them. A trained checkpoint is nearly always fine-tuned from those; a state dict
    does not tell. A pickled network does.
    """
    for module in checkpoint.modules.values():
        if "transform_input" in module.attributes:
            return bool(module.attributes["transform_input"])
    means = [tensor for key, tensor in checkpoint.tensors.items() if key.endswith("running_mean")]
    return not means or bool(means[0].any())


def vit_options(arch: str, checkpoint: Checkpoint) -> dict[str, int]:
    """Return the image size that the position embedding of a ViT implies."""
    patch = int(arch.rpartition("_")[2])
    for key, tensor in checkpoint.tensors.items():
        if key.endswith("encoder.pos_embedding") and tensor.ndim == 3:
            return {"image_size": math.isqrt(max(tensor.shape[1] - 1, 1)) * patch}
    return {}


def fit_stem(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the first convolution the number of input channels that it has in the file."""
    name, stem = next(
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )
    key = f"{name}.weight"
    for full_name, tensor in checkpoint.tensors.items():
        is_stem = full_name == key or full_name.endswith(f".{key}")
        if is_stem and tensor.ndim == 4:
            changed = (len(tensor), stem.in_channels, *tensor.shape[2:])
            if changed == stem.weight.shape and tensor.shape[1] != stem.in_channels:
                model.set_submodule(name, with_channels(stem, tensor.shape[1]))
                return


def with_channels(stem: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Return a convolution like `stem` with another number of input channels."""
    return nn.Conv2d(
        channels,
        stem.out_channels,
        stem.kernel_size,
        stem.stride,
        stem.padding,
        bias=stem.bias is not None,
    )


def find_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the layer that gives the logits, with its name (SqueezeNet's is a Conv2d)."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    return layers[-1]


def backbone(model: nn.Module) -> tuple[State, str]:
    """Return a torchvision network's tensors but for its head, with the head's prefix, as "fc."."""
    root = find_head(model)[0].partition(".")[0] + "."
    tensors = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not key.startswith(root) and not key.endswith(COMPUTED)
    }
    return tensors, root


def find_places(wanted: State, tensors: State) -> list[Place]:
    """Return where a file has tensors of a network, the place with the most of them first."""
    matches: Counter[str] = Counter()
    for key, tensor in tensors.items():
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
        for start in starts:
            if key[start:] in wanted:
                matches[key[:start]] += wanted[key[start:]].shape == tensor.shape
    return [Place(prefix, count) for prefix, count in matches.most_common()]


def choose_place(wanted: State, checkpoint: Checkpoint) -> tuple[Place, State]:
    """Return where the network is in the file, and the other tensors that a network might need.

    A moving average is taken only where there is no other network. Raises CallError: several.
    """
    tensors = checkpoint.tensors
    places = find_places(wanted, tensors) or [Place("", 0)]
    whole = [place for place in places if place.matches == len(wanted)] or places[:1]
    networks = [place for place in whole if not AVERAGE.search(place.prefix)] or whole

    # the same tensors may stand under two names
    first_key = next(iter(wanted))
    by_memory = {}
    for place in networks:
        tensor = tensors.get(place.prefix + first_key)
        memory = place.prefix if tensor is None else tensor.data_ptr()
        by_memory.setdefault(memory, place)
    distinct = list(by_memory.values())
    if len(distinct) > 1:
        names = " and ".join(f"'{place.prefix}'" for place in distinct)
        raise CallError(
            f"{checkpoint.name}: holds several networks, under {names}; save the one to explain"
        )

    chosen = distinct[0]
    copies = tuple(place.prefix for place in whole if place is not chosen and place.prefix)
    others = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(copies) and is_of_network(key, tensor)
    }
    return chosen, others


def is_of_network(key: str, tensor: Tensor) -> bool:
    """Return whether a forward pass may read a tensor: not what only training needs, and no count."""
    if TRAINING_ONLY.search(key) or AVERAGE.search(key) or key.endswith("num_batches_tracked"):
        return False
    return tensor.ndim > 0 and tensor.is_floating_point()


# A torchvision network


def build_torchvision(arch: str, checkpoint: Checkpoint) -> Network:
    """Return a torchvision network with the checkpoint's weights and head.

    Raises CallError: a tensor is missing or does not fit, or a tensor of the file would be unused.
    """
    model = skeleton(arch, checkpoint)
    wanted, root = backbone(model)
    place, others = choose_place(wanted, checkpoint)
    prefix = place.prefix
    if arch in WITH_AUXILIARY:
        others = {key: tensor for key, tensor in others.items() if not AUXILIARY.search(key)}
    check_modules(model, prefix, checkpoint)

    # the backbone's tensors, those under the head's name, and all others
    state: State = {}
    in_head: State = {}
    beside: State = {}
    known = set(model.state_dict())
    for key, tensor in checkpoint.tensors.items():
        inner = key.removeprefix(prefix) if key.startswith(prefix) else ""
        if inner.startswith(root):
            in_head[key] = tensor
        elif inner in known:
            state[inner] = tensor
        elif key in others:
            beside[key] = tensor
    colours, beside = split_colours(beside)
    beside = without_copies(beside, state | in_head)

    check_shapes(arch, wanted, state, checkpoint)
    head = fit_head(arch, model, prefix, in_head, beside, checkpoint)
    load_state(arch, model, state | head.state, checkpoint)

    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    if channels not in (1, 3):
        raise CallError(
            f"{checkpoint.name}: the network takes {channels} input channels; "
            "only colour photos (3) and grey ones (1) can be explained"
        )
    return Network(
        model=model.eval(),
        channels=channels,
        outputs=find_head(model)[1].weight.shape[0],
        head=head.text,
        ends_in_sigmoid=head.ends_in_sigmoid,
        head_inputs=head.inputs,
        colours=colours,
    )


def without_copies(beside: State, used: State) -> State:
    """Return the tensors that are not those of `used` under another name."""
    memory = {(tensor.data_ptr(), tensor.shape) for tensor in used.values()}
    return {
        key: tensor
        for key, tensor in beside.items()
        if (tensor.data_ptr(), tensor.shape) not in memory
    }


def split_colours(beside: State) -> tuple[State, State]:
    """Split off the mean and std of a layer in front of the network that normalises its inputs."""
    colours: State = {}
    rest: State = {}
    for key, tensor in beside.items():
        name = key.rpartition(".")[2]
        if name in ("mean", "std") and tensor.numel() in (1, 3):
            colours[name] = tensor
        else:
            rest[key] = tensor
    return colours, rest


# What decides how a layer computes, of those that torchvision's networks are made of.
SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "ceil_mode"),
    *("eps", "output_size", "negative_slope", "approximate", "normalized_shape", "transform_input"),
)


def check_modules(model: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Raise CallError where a pickled network has another layer in the place of one of `model`'s."""
    root = find_head(model)[0].partition(".")[0]
    for name, module in model.named_modules():
        pickled = checkpoint.modules.get(prefix + name)
        is_layer = not any(True for _ in module.children())
        if pickled is None or not is_layer or name.partition(".")[0] == root:
            continue
        kind = type(module).__name__
        if pickled.kind != kind:
            raise CallError(
                f"{checkpoint.name}: {prefix}{name} is a {pickled.kind}, where torchvision's has a "
                f"{kind}; {OWN_NETWORK}"
            )
        for setting in SETTINGS:
            ours = getattr(module, setting, None)
            theirs = pickled.attributes.get(setting, ours)
            if as_pair(ours) != as_pair(theirs):
                raise CallError(
                    f"{checkpoint.name}: {prefix}{name} has {setting} {theirs}, where "
                    f"torchvision's has {ours}; {OWN_NETWORK}"
                )


def as_pair(value: Any) -> Any:
    """Return a whole number as (n, n) and a sequence as a tuple, as PyTorch's layers understand both."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return value


# The head


ACTIVATIONS = ("ReLU", "ReLU6", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Hardswish", "Tanh")
NO_EFFECT = ("Dropout", "Identity", "Flatten", "AlphaDropout", "Sequential", "ModuleList")
READ_AS_SCORES = ("Softmax", "LogSoftmax", "Sigmoid")  # at the end of a head


@dataclass(frozen=True)
class Head:
    """A head that was built from the tensors of a file."""

    state: State  # its tensors, by their names in the network
    text: str = ""  # as "head 512 -> 64 -> 3 (ReLU assumed)"; "" for one Linear layer
    inputs: int | None = None  # of its first layer
    ends_in_sigmoid: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer of a head."""

    name: str  # in the file
    module: nn.Module  # with meta parameters
    tensors: State  # of the module, by their names in it

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of values that the layer takes and gives."""
        if isinstance(self.module, nn.Linear):
            return self.module.in_features, self.module.out_features
        length = len(self.tensors["weight"])
        return length, length


def fit_head(
    arch: str,
    model: nn.Module,
    prefix: str,
    in_head: State,
    beside: State,
    checkpoint: Checkpoint,
) -> Head:
    """Give the network the head that the file has: under the head's name, or beside the backbone.

    Raises CallError: the head has other layers than Linear, BatchNorm1d and LayerNorm, or they do
    not fit each other or the backbone.
    """
    if not beside:
        return fit_named_head(arch, model, prefix, in_head, checkpoint)

    root = find_head(model)[0].partition(".")[0]
    features = first_inputs(model)
    layers = read_layers(beside, checkpoint, features)
    left_out = ""
    if in_head:
        # ImageNet's layer was left where it is, and the forward pass goes around it
        outputs = last_outputs(in_head)
        first = layers[0]
        if outputs != 1000 or first.sizes[0] != features or features == outputs:
            raise CallError(
                f"{checkpoint.name}: {first.name} is a second head, or a layer behind {arch}'s "
                f"{outputs} outputs; {OWN_NETWORK}"
            )
        left_out = f" instead of {root} with its 1000 outputs"
    return replace_head(arch, model, root, layers, features, checkpoint, left_out)


def fit_named_head(
    arch: str, model: nn.Module, prefix: str, in_head: State, checkpoint: Checkpoint
) -> Head:
    """Give the network the head that the file has under the head's own name. Raises CallError."""
    name, last = find_head(model)
    root = name.partition(".")[0]
    ours = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if key.startswith(f"{root}.") and not key.startswith(f"{name}.")
    }
    theirs = {key.removeprefix(prefix): tensor for key, tensor in in_head.items()}
    keeps_others = all(
        key in theirs and theirs[key].shape == tensor.shape for key, tensor in ours.items()
    )

    if isinstance(last, nn.Conv2d):
        return fit_convolution(model, theirs)
    if not keeps_others:  # the whole head was replaced
        layers = read_layers(in_head, checkpoint, first_inputs(model))
        return replace_head(arch, model, root, layers, first_inputs(model), checkpoint)

    # only the last layer was replaced, perhaps by several
    kept = {key: theirs[key] for key in ours}
    changed = {key: in_head[prefix + key] for key in theirs if key not in ours}
    layers = read_layers(changed, checkpoint, last.in_features)
    head = replace_head(arch, model, name, layers, last.in_features, checkpoint)
    return replace(head, state=head.state | kept, inputs=first_inputs(model))


def fit_convolution(model: nn.Module, theirs: State) -> Head:
    """Give SqueezeNet the number of outputs that its last convolution has in the file."""
    name, last = find_head(model)
    keys = [key for key in theirs if key.endswith("weight") and theirs[key].ndim == 4]
    if len(keys) != 1:
        return Head(theirs)  # load_state tells what does not fit
    old = keys[0].removesuffix("weight")
    outputs = len(theirs[keys[0]])
    with MetaParameters():
        layer = nn.Conv2d(last.in_channels, outputs, 1, bias=f"{old}bias" in theirs)
    model.set_submodule(name, layer)
    return Head({f"{name}.{key.removeprefix(old)}": tensor for key, tensor in theirs.items()})


def first_inputs(model: nn.Module) -> int:
    """Return how many values the backbone of a torchvision network gives its head."""
    root = find_head(model)[0].partition(".")[0]
    for module in model.get_submodule(root).modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError("a head without a layer")


def last_outputs(in_head: State) -> int:
    """Return the number of outputs of the last layer."""
    weights = [tensor for tensor in in_head.values() if tensor.ndim > 1]
    return len(weights[-1]) if weights else 0


def read_layers(tensors: State, checkpoint: Checkpoint, features: int) -> list[Layer]:
    """Return the layers of a head, in the order of the file. Raises CallError: an unknown layer."""
    by_layer: dict[str, State] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        by_layer.setdefault(name, {})[part] = tensor

    layers = []
    for name in in_order(by_layer, checkpoint):
        pickled = checkpoint.modules.get(name)
        state = by_layer.get(name, {})
        with MetaParameters():
            module = read_layer(state, pickled)
        if module is None:
            key = f"{name}.{next(iter(state), '')}".strip(".")
            raise CallError(
                f"{checkpoint.name}: {key} is no part of a torchvision network, and no Linear, "
                f"BatchNorm1d or LayerNorm of its head; {advice(checkpoint)}"
            )
        for part, tensor in state.items():
            check_numbers(f"{name}.{part}", tensor, checkpoint)
        layers.append(Layer(name, module, state))
    return layers


def in_order(by_layer: Mapping[str, State], checkpoint: Checkpoint) -> list[str]:
    """Return the names of the layers of a head; of a pickled network, with those without tensors."""
    parents = {name.rpartition(".")[0] for name in by_layer}
    heads = {parent for parent in parents if is_sequential(parent, checkpoint)}
    names = []
    for name, module in checkpoint.modules.items():
        if name.rpartition(".")[0] in heads and module.kind not in NO_EFFECT:
            names.append(name)
    names += [name for name in by_layer if name not in names]
    if not heads:
        return names
    order = {name: index for index, name in enumerate(checkpoint.modules)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def is_sequential(name: str, checkpoint: Checkpoint) -> bool:
    """Return whether a pickled module is a Sequential, whose layers follow each other for certain."""
    return name in checkpoint.modules and checkpoint.modules[name].kind == "Sequential"


def read_layer(state: State, pickled: PickledModule | None) -> nn.Module | None:
    """Return the layer that has these tensors, without weights; None where it is of no known kind."""
    kind = pickled.kind if pickled else ""
    settings = pickled.attributes if pickled else {}
    if not state:
        if kind in READ_AS_SCORES:
            return getattr(nn, kind)()
        names = ("negative_slope", "alpha", "approximate")
        options = {name: settings[name] for name in names if name in settings}
        return getattr(nn, kind)(**options) if kind in ACTIVATIONS else None

    weight = state.get("weight")
    parts = set(state)
    if weight is None or weight.numel() == 0 or kind not in ("", *LAYER_KINDS):
        return None
    if weight.ndim == 2 and parts <= {"weight", "bias"}:
        return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in parts)
    if weight.ndim != 1:
        return None
    eps = settings.get("eps", 1e-5)
    if parts >= {"running_mean", "running_var"}:
        return nn.BatchNorm1d(len(weight), eps)
    if parts == {"weight", "bias"}:
        return nn.LayerNorm(len(weight), eps)
    return None


LAYER_KINDS = ("Linear", "BatchNorm1d", "LayerNorm")


def replace_head(
    arch: str,
    model: nn.Module,
    name: str,
    layers: Sequence[Layer],
    features: int,
    checkpoint: Checkpoint,
    remark: str = "",
) -> Head:
    """Put the layers in the place of the module `name`, which takes `features` values.

    Raises CallError: a layer takes another number of values than it gets.
    """
    if not layers:
        return Head({})  # load_state tells that it is missing
    check_sizes(arch, layers, features, checkpoint)
    ends_in_sigmoid = isinstance(layers[-1].module, nn.Sigmoid)
    layers = [layer for layer in layers if type(layer.module).__name__ not in READ_AS_SCORES]
    layers, assumed = with_activations(layers, checkpoint)

    sequence = nn.Sequential(nn.Flatten(1), *(layer.module for layer in layers))
    model.set_submodule(name, sequence)
    state = {}
    for index, layer in enumerate(layers, start=1):
        for part, tensor in layer.tensors.items():
            state[f"{name}.{index}.{part}"] = tensor

    text = describe_head(layers, assumed) if len(layers) > 1 or remark else ""
    return Head(state, text + remark, features, ends_in_sigmoid)


def check_sizes(arch: str, layers: Sequence[Layer], features: int, checkpoint: Checkpoint) -> None:
    """Raise CallError where a layer takes another number of values than it gets."""
    source, given = arch, features
    with_tensors = [layer for layer in layers if layer.tensors]
    for layer in with_tensors:
        takes, gives = layer.sizes
        if takes != given:
            hint = "; was its pooling changed?" if source == arch else ""
            raise CallError(
                f"{checkpoint.name}: {layer.name} takes {takes} values, but {source} gives "
                f"{given}{hint}; {OWN_NETWORK}"
            )
        source, given = layer.name, gives
    if not with_tensors or not isinstance(with_tensors[-1].module, nn.Linear):
        raise CallError(f"{checkpoint.name}: its head ends in no Linear layer; {OWN_NETWORK}")


def with_activations(layers: Sequence[Layer], checkpoint: Checkpoint) -> tuple[list[Layer], bool]:
    """Return the layers with a ReLU before each further Linear that has none, and whether one was added.

    Layers of one pickled Sequential are complete as they are.
    """
    complete: list[Layer] = []
    assumed = False
    is_linear = False  # whether nothing has bent the values since the last Linear layer
    for layer in layers:
        kind = type(layer.module).__name__
        is_known = is_sequential(layer.name.rpartition(".")[0], checkpoint)
        if kind == "Linear" and is_linear and not is_known:
            complete.append(Layer("", nn.ReLU(), {}))
            assumed = True
        if kind in ACTIVATIONS:
            is_linear = False
        elif kind == "Linear":
            is_linear = True
        complete.append(layer)
    return complete, assumed


def describe_head(layers: Sequence[Layer], assumed: bool) -> str:
    """Return the sizes of a head, as "head 512 -> 64 -> 3 (ReLU assumed)"."""
    sizes = [str(layers[0].sizes[0])] if layers[0].tensors else []
    for layer in layers:
        if isinstance(layer.module, nn.Linear):
            sizes.append(str(layer.module.out_features))
        elif not isinstance(layer.module, nn.ReLU):
            sizes.append(type(layer.module).__name__)
    text = f"head {' -> '.join(sizes)}"
    return f"{text} (ReLU assumed)" if assumed else text


def load_state(arch: str, model: nn.Module, state: State, checkpoint: Checkpoint) -> None:
    """Put the tensors into the network, the floating-point ones as float32.

    Raises CallError: tensors are missing, left over, of another shape, or no ordinary numbers.
    """
    wanted = model.state_dict()  # it has the version marks that MNASNet insists on
    for key, tensor in wanted.items():
        if key.endswith(COMPUTED):
            state.setdefault(key, tensor)
    check_shapes(arch, wanted, state, checkpoint)

    for key, value in wanted.items():
        tensor = state[key]
        if value.is_floating_point():
            check_numbers(key, tensor, checkpoint)
            tensor = tensor.float()
        wanted[key] = tensor.contiguous()
    model.load_state_dict(wanted, strict=False, assign=True)


def check_numbers(key: str, tensor: Tensor, checkpoint: Checkpoint) -> None:
    """Raise CallError where a tensor does not hold ordinary floating-point numbers."""
    is_usual = re.match(r"torch\.b?float(8|16|32|64)", str(tensor.dtype))
    if key.endswith("num_batches_tracked") or is_usual:
        return
    raise CallError(
        f"{checkpoint.name}: {key} is quantised or complex ({tensor.dtype}); "
        "save the weights from before that"
    )


def check_shapes(arch: str, wanted: State, state: State, checkpoint: Checkpoint) -> None:
    """Raise CallError where the tensors are not those that the network needs."""
    differ = []
    for key, tensor in wanted.items():
        if key in state and state[key].shape != tensor.shape:
            shapes = f"{shape_of(state[key])} in the file, {shape_of(tensor)} in {arch}"
            differ.append(f"{key}: {shapes}")
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted and not key.endswith(COMPUTED)],
        "of another shape": differ,
    }
    counts = []
    for kind, keys in faults.items():
        if keys:
            more = "; ..." if len(keys) > 3 else ""
            counts.append(f"{len(keys)} {kind} ({'; '.join(keys[:3])}{more})")
    if counts:
        hint = other_architecture(arch, checkpoint)
        raise CallError(f"{checkpoint.name} does not fit {arch}: {', '.join(counts)}; {hint}")


def other_architecture(arch: str, checkpoint: Checkpoint) -> str:
    """Return which architecture a checkpoint fits, or what else to do, for a message."""
    try:
        other = recognise(checkpoint)
    except CallError:
        return advice(checkpoint)
    if other == arch:
        return advice(checkpoint)
    return f"it fits {other}: pass --arch {other}"


def shape_of(tensor: Tensor) -> str:
    """Return the shape of a tensor, as "2 x 3"."""
    return " x ".join(map(str, tensor.shape)) or "one number"


# A network of one's own


def build_own(arch: str, checkpoint: Checkpoint, num_classes: int | None) -> Network:
    """Return the network that the user's function builds, with the checkpoint's weights.

    Raises CallError: the function fails, or the weights do not fit the network.
    """
    model = run_own_file(arch, num_classes or guess_classes(checkpoint))
    if checkpoint.tensors:
        load_own(arch, model, checkpoint)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    channels = convolutions[0].in_channels if convolutions else 3
    if channels not in (1, 3):
        channels = 3  # the first convolution is not the first layer
    return Network(model.eval(), channels=channels)


def guess_classes(checkpoint: Checkpoint) -> int | None:
    """Return the number of outputs of the last matrix that a head's name stands before, or None."""
    classes = None
    for key, tensor in checkpoint.tensors.items():
        if tensor.ndim == 2 and re.search(r"(^|\.)(fc|classifier|heads?)\.", key):
            classes = len(tensor)
    return classes


def load_own(arch: str, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the checkpoint into a network of the user's. Raises CallError: it does not fit."""
    wanted = {
        key: tensor for key, tensor in model.state_dict().items() if not key.endswith(COMPUTED)
    }
    place, others = choose_place(wanted, checkpoint)
    state = {}
    for key, tensor in checkpoint.tensors.items():
        inner = key.removeprefix(place.prefix)
        is_inside = key.startswith(place.prefix)
        if is_inside and (inner in wanted or inner.endswith(COMPUTED) or key in others):
            state[inner] = tensor
    load_state(arch, model, state, checkpoint)

    unused = [key for key in others if not key.startswith(place.prefix)]
    if unused:
        raise CallError(f"{checkpoint.name}: {unused[0]} is no part of the network of {arch}")


def run_own_file(arch: str, classes: int | None) -> nn.Module:
    """Run the user's "file.py:function", with `num_classes` if it is known and taken.

    Raises CallError: the function fails, or returns no network that can be explained.
    """
    file, _, function = arch.rpartition(":")
    arguments = sys.argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # its neighbours can be imported
    sys.argv = [file]  # the program's own arguments are not for the file
    try:
        build = getattr(import_file(file), function, None)
        if not callable(build):
            hint = closest(function, vars(sys.modules[own_module_name(file)]))
            raise AttributeError(f"{file} has no function '{function}'{hint}")
        takes_number = re.search(r"\bnum_classes\b|\*\*", str(inspect.signature(build)))
        model = build(num_classes=classes) if takes_number and classes else build()
        return unwrapped(model)
    except (Exception, SystemExit) as error:
        hint = ""
        if "num_classes" in str(error) and not classes:
            hint = "; does it need --num-classes?"
        if isinstance(error, SystemExit):
            hint = "; put what parses arguments under if __name__ == '__main__':"
        message = f"--arch {arch}: {type(error).__name__}: {first_line(error)}{hint}"
        raise CallError(message) from error
    finally:
        sys.argv = arguments
        del sys.path[0]


def own_module_name(file: str) -> str:
    """Return the name of the user's module: a file called torch.py must not stand in for torch."""
    return f"own_{Path(file).stem}"


def import_file(file: str) -> types.ModuleType:
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(own_module_name(file), file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def unwrapped(model: Any) -> nn.Module:
    """Return a network without DataParallel and torch.compile around it. Raises TypeError: it is none."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("it returned a ScriptModule, which cannot be explained; return the network")
    if not isinstance(model, nn.Module):
        raise TypeError(f"it returned a {type(model).__name__}, not a torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    if hasattr(model, "_orig_mod"):  # torch.compile's
        return unwrapped(model._orig_mod)
    return model


def as_logits(answer: Any, outputs: int | None = None, count: int | None = None) -> Tensor:
    """Return the logits (N, classes) in a network's answer.

    Of several tensors the one with `outputs` columns is taken. `count` is the number of inputs.

    Raises:
        CallError: there is no such tensor, or it has lost the batch dimension.
    """
    if isinstance(answer, Mapping):  # as transformers' networks give it
        answer = answer.get("logits", answer.get("out", answer))
    answer = getattr(answer, "logits", answer)
    answers = answer if isinstance(answer, (tuple, list)) else [answer]
    rows = [item for item in answers if isinstance(item, Tensor) and is_row(item)]
    fitting = [row for row in rows if row.ndim and row.shape[-1] == outputs]
    if len(rows) > 1 and fitting:
        rows = fitting
    if len(rows) != 1:
        kinds = " and ".join(describe_answer(item) for item in answers[:4])
        hint = "alone, or pass --num-classes" if rows else "as (N, classes)"
        raise CallError(f"the network returns {kinds}; let it return the logits {hint}")

    logits = rows[0]
    if logits.ndim == 0 or (count is not None and len(logits) != count):
        inputs = "two inputs" if count == 2 else "one input"
        raise CallError(
            f"the network returns {describe_answer(logits)} for {inputs}, without the batch "
            "dimension; write x.flatten(1) instead of x.squeeze() in its forward"
        )
    if logits.ndim == 1:
        return logits[:, None]
    return logits.flatten(1)


def is_row(tensor: Tensor) -> bool:
    """Return whether a tensor may be logits: (N, C), (N, C, 1, 1), (N,) or a single number."""
    sizes = tensor.shape[1:]
    return math.prod(sizes) == max(sizes, default=1)


def describe_answer(answer: Any) -> str:
    """Return what a network returned, for a message."""
    if isinstance(answer, Tensor):
        return f"a tensor of {shape_of(answer)}"
    return f"a {type(answer).__name__}"


def give_logits(model: nn.Module, inputs: Any, answer: Any, outputs: int) -> Tensor:
    """Return the logits (N, classes), as a forward hook; a single one becomes two.

    The softmax of the two is the sigmoid of the single one.
    """
    logits = as_logits(answer, outputs, len(inputs[0]))
    if outputs == 1:
        return torch.cat([-logits, logits], 1) / 2
    return logits


def count_outputs(network: Network, size: Sequence[int], num_classes: int | None) -> int:
    """Return how many outputs a network has, by running it on two inputs of that size and on one.

    Raises CallError: it fails, loses the batch dimension, or returns probabilities.
    """
    height, width = size
    logits = run_once(network, (2, network.channels, height, width), num_classes)
    end = final_function(logits)
    if end:
        raise CallError(f"the network ends in a {end}; let it return the logits, without that")
    alone = run_once(network, (1, network.channels, height, width), num_classes)
    if alone.shape[1] != logits.shape[1]:
        raise CallError(
            f"the network returns {shape_of(alone)} for one input and {shape_of(logits)} for two; "
            "write x.flatten(1) instead of x.squeeze() in its forward"
        )
    return logits.shape[1]


def run_once(network: Network, shape: Sequence[int], num_classes: int | None) -> Tensor:
    """Return the logits for inputs of zeros. Raises CallError: the network fails."""
    try:
        with torch.enable_grad():
            answer = network.model(torch.zeros(*shape, requires_grad=True))
    except Exception as error:
        size = " x ".join(map(str, shape[1:]))
        hint = ""
        if isinstance(error, RuntimeError):
            hint = "; pass another --input-size if it is the size"
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CallError(f"the network fails at an input of {size} ({reason}){hint}") from error
    return as_logits(answer, num_classes, shape[0])


# The autograd nodes of operations that only arrange, bound or convert values.
ARRANGING = re.compile(
    r"(Unsafe)?(View|Reshape\w*|Squeeze|Unsqueeze|Slice|Select|Clamp\w*|Alias|Clone|ToCopy|"
    r"Transpose|T|Permute|Expand|Cat|Stack|Index|Unbind|Split\w*)Backward\w*"
)


def final_function(logits: Tensor) -> str:
    """Return "sigmoid" or "softmax" where a network ends in one, or ""."""
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        last = re.match("(Softmax|Sigmoid)Backward", node.name())
        if last:
            return last.group(1).lower()
        if ARRANGING.fullmatch(node.name()):
            waiting += [parent for parent, _ in node.next_functions]
    return ""


# The preprocessing


@dataclass(frozen=True)
class PresetOptions:
    """What the caller says of the preprocessing; None: not said."""

    input_size: int | Sequence[int] | None
    resize: str | int
    mean: Sequence[float] | None
    std: Sequence[float] | None


def check_resize(resize: str | int) -> None:
    """Raise CallError where `resize` is none of crop, squash and a number of pixels."""
    if resize in ("crop", "squash"):
        return
    is_side = isinstance(resize, int) and not isinstance(resize, bool) and 8 <= resize <= 8192
    if not is_side:
        raise CallError(
            f"unknown resize '{resize}' (known: crop, squash, or the short side in pixels)"
        )


def as_numbers(values: Any) -> list[float] | None:
    """Return one number as a list; None stays None."""
    if isinstance(values, (int, float)):
        return [values]
    return values


def make_preset(
    arch: str, network: Network, checkpoint: Checkpoint, options: PresetOptions
) -> tuple[Any, dict[str, str]]:
    """Return torchvision's preprocessing for a network, and where its values are from.

    Raises CallError: a size, mean or std is not usable.
    """
    all_weights = torchvision.models.get_model_weights("resnet50" if is_own(arch) else arch)
    preset = all_weights.DEFAULT.transforms()

    size, size_origin = find_input_size(arch, network, checkpoint, options.input_size)
    if size is not None:
        preset.resize_size = [usual_short_side(all_weights, size)]
        preset.crop_size = list(size)
    else:
        preset.crop_size = preset.crop_size * 2

    short_side, short_origin = find_short_side(checkpoint, options)
    if options.resize == "squash":
        preset.resize_size = preset.crop_size
    elif short_side is not None:
        if short_side < max(preset.crop_size):
            raise CallError(
                f"the short side before the crop is {short_side}, less than the input's "
                f"{max(preset.crop_size)}; pass --resize {max(preset.crop_size)} or more"
            )
        preset.resize_size = [short_side]

    mean, std, colours_origin = find_colours(preset, network, checkpoint, options)
    preset.mean, preset.std = mean, std
    origins = {"input": size_origin, "short side": short_origin, "mean": colours_origin}
    return preset, origins


def usual_short_side(all_weights: Any, size: Sequence[int]) -> int:
    """Return to how many pixels torchvision scales the short side before a crop of that size.

    At another size than those of its presets, the margin around the crop is in proportion.
    """
    side = max(size)
    for weights in (all_weights.DEFAULT, *all_weights):
        preset = weights.transforms()
        if preset.crop_size[0] == side:
            return preset.resize_size[0]
    default = all_weights.DEFAULT.transforms()
    return round(side * default.resize_size[0] / default.crop_size[0])


def find_input_size(
    arch: str, network: Network, checkpoint: Checkpoint, given: int | Sequence[int] | None
) -> tuple[tuple[int, int] | None, str]:
    """Return height and width of the input and where they are from; None: the preset's.

    Raises CallError: the size is not usable, or the network takes another one only.
    """
    fixed = fixed_size(arch, network)
    if given is not None:
        size = as_size(given)
        if size is None:
            raise CallError(f"the input size {given!r} is not usable; pass --input-size 224")
        check_fixed_size(arch, checkpoint, size, fixed, "--input-size")
        return size, ""

    entry = checkpoint.first_entry("input_size")
    remark = f"not in {checkpoint.file}; pass --input-size if you trained at another"
    if entry is not None and is_head_size(entry.value, network):
        remark = (
            f"the {entry.name} {entry.value} {entry.origin} is the head's number of inputs, not "
            "the side of a picture; pass --input-size if you trained at another"
        )
        entry = None
    if entry is not None:
        size = as_size(entry.value)
        if size is None:
            raise CallError(
                f"{checkpoint.name}: its {entry.name} is not the size of a usable picture; "
                "pass --input-size"
            )
        check_fixed_size(arch, checkpoint, size, fixed, f"its {entry.name}")
        return size, entry.origin

    size, origin = size_of_own(network.model)
    if size is not None:
        return size, origin
    if fixed is not None:
        return (fixed, fixed), ""
    if is_downloaded(checkpoint):
        remark = ""
    return None, remark


def as_size(value: Any) -> tuple[int, int] | None:
    """Return (height, width) from 225, (225, 225), (3, 225, 225) or a tensor of these; None: none."""
    if isinstance(value, Tensor):
        if value.is_meta or value.numel() > 3:
            return None
        value = value.flatten().tolist()
    sides = list(value)[-2:] if isinstance(value, (list, tuple)) else [value]
    for side in sides:
        if not isinstance(side, int) or isinstance(side, bool) or not 8 <= side <= 4096:
            return None
    return (sides[0], sides[-1]) if sides else None


def is_head_size(value: Any, network: Network) -> bool:
    """Return whether an entry is the number of inputs of the head, which course projects save."""
    return isinstance(value, int) and value == network.head_inputs


def fixed_size(arch: str, network: Network) -> int | None:
    """Return the one side that a network's inputs may have, or None where it takes others."""
    if arch == "maxvit_t":
        return 224
    if arch.startswith("vit_"):
        return network.model.image_size
    return None


def check_fixed_size(
    arch: str, checkpoint: Checkpoint, size: Sequence[int], fixed: int | None, source: str
) -> None:
    """Raise CallError where a network does not take inputs of that size."""
    if fixed is not None and tuple(size) != (fixed, fixed):
        asked = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
        raise CallError(
            f"{checkpoint.name}: {arch} takes inputs of {fixed} x {fixed} pixels only, not "
            f"{source} {asked}; pass --input-size {fixed}"
        )


def own_settings(model: nn.Module) -> tuple[Mapping[str, Any], str]:
    """Return the preprocessing that a network of the user's tells of itself, and where that stands."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        return config, "from the network's pretrained_cfg"
    names = ("input_size", "mean", "std")
    settings = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return settings, "from the network's attributes"


def size_of_own(model: nn.Module) -> tuple[tuple[int, int] | None, str]:
    """Return the input size that a network tells of itself, and where that stands."""
    settings, origin = own_settings(model)
    return as_size(settings.get("input_size")), origin


def find_short_side(checkpoint: Checkpoint, options: PresetOptions) -> tuple[int | None, str]:
    """Return the short side before the crop where it was said, and by whom; None: the usual one."""
    if isinstance(options.resize, int):
        return options.resize, "given"
    entry = checkpoint.first_entry("resize")
    is_side = entry is not None and as_size(entry.value) is not None
    if options.resize == "crop" and options.input_size is None and is_side:
        return as_size(entry.value)[0], entry.origin
    return None, ""


def find_colours(
    preset: Any, network: Network, checkpoint: Checkpoint, options: PresetOptions
) -> tuple[list[float], list[float], str]:
    """Return mean and std, one number for each channel, from 0 to 1, and where they are from.

    Raises CallError: an entry is not usable, or has another number of values.
    """
    values = {"mean": list(preset.mean), "std": list(preset.std)}
    origin = ""
    if network.channels == 1:
        values = {"mean": GREY_MEAN, "std": GREY_STD}
        origin = f"not in {checkpoint.file}; pass --mean and --std"

    said = {}
    for name, low in (("mean", 0), ("std", 1e-6)):
        value, value_origin = find_colour(name, getattr(options, name), network, checkpoint)
        if value is not None:
            said[name] = as_colours(value, low, network.channels)
            if said[name] is None:
                count = "one usable number" if network.channels == 1 else "three usable numbers"
                raise CallError(
                    f"{checkpoint.name}: the {name} is not {count}; pass --{name} R,G,B"
                )
            origin = value_origin

    white = 255 if any(max(colours) > 1 for colours in said.values()) else 1
    for name, colours in said.items():
        values[name] = [colour / white for colour in colours]
    return values["mean"], values["std"], origin


def find_colour(name: str, given: Any, network: Network, checkpoint: Checkpoint) -> tuple[Any, str]:
    """Return the mean or std that was given, else that of the file or the network, and its origin."""
    if given is not None:
        return given, ""
    entry = checkpoint.first_entry(name)
    if entry is not None:
        return entry.value, entry.origin
    if name in network.colours:
        return network.colours[name], f"from {checkpoint.file}"
    settings, origin = own_settings(network.model)
    value = settings.get(name)
    is_buffer = isinstance(value, Tensor)  # the network normalises its inputs itself
    if value is None or is_buffer or callable(value):
        return None, ""
    return value, origin


def as_colours(value: Any, low: float, channels: int) -> list[float] | None:
    """Return one number for each channel, from `low` to 255; None where the value is none such."""
    if isinstance(value, Tensor):
        is_usable = not value.is_meta and value.layout is torch.strided
        if not is_usable or value.numel() > 3 or value.is_complex():
            return None
        value = value.flatten().tolist()
    is_list = isinstance(value, (list, tuple)) and len(value) in (1, channels)
    if not is_list:
        return None
    try:
        colours = [float(number) for number in value]
    except (TypeError, ValueError, OverflowError):
        return None
    if not all(low <= colour <= 255 for colour in colours):
        return None
    return colours * (channels // len(colours))


# The classes


def find_class_names(
    given: Sequence[str] | str | None,
    checkpoint: Checkpoint,
    count: int,
    folders: Sequence[str],
) -> tuple[tuple[str, ...], str]:
    """Return a name for each class, at most 200 characters long, and where the names are from.

    Raises CallError: another number of names was given.
    """
    if given is not None:
        names = given.split(",") if isinstance(given, str) else given
        if len(names) != count:
            raise CallError(
                f"{len(names)} class names were given, but the network has {count} classes"
            )
        return shortened(names), ""

    for entry in checkpoint.entries.get("classes", ()):
        names, fault = entry_names(entry, count)
        if names:
            return shortened(names), entry.origin
        warn(f"{checkpoint.name}: its entry {entry.name} is not used: {fault}")

    if count == 1000:
        categories = torchvision.models.get_model_weights("resnet50").DEFAULT.meta["categories"]
        return tuple(categories), "" if is_downloaded(checkpoint) else "ImageNet's assumed"
    if len(folders) == count:
        return shortened(sorted(folders)), "the photos' folders in ImageFolder's order"
    remark = (
        "without names; pass --class-names cat,dog in training order, ImageFolder's is alphabetical"
    )
    return unnamed(count), remark


def entry_names(entry: Entry, count: int) -> tuple[list[str], str]:
    """Return the class names in an entry, or [] and why it is not used."""
    try:
        names = ordered_names(entry.value)
    except (ValueError, TypeError, OverflowError) as error:
        return [], first_line(error)
    if len(names) != count:
        return [], f"{len(names)} names for {count} classes"
    return names, ""


def shortened(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, cut at 200 characters."""
    return tuple(name[:LONGEST_NAME] for name in names)


def unnamed(count: int) -> tuple[str, ...]:
    """Return what classes without names are called."""
    return tuple(f"class {index}" for index in range(count))


def class_index(wanted: str, class_names: Sequence[str]) -> int | None:
    """Return the index of a class from its name, case aside, or its index; a name wins.

    None: no class is called so.
    """
    index = named_index(wanted, class_names)
    is_number = re.fullmatch(r"\d{1,6}", wanted) and wanted.isascii()
    if index is None and is_number and int(wanted) < len(class_names):
        return int(wanted)
    return index


def named_index(name: str, class_names: Sequence[str]) -> int | None:
    """Return the index of the class of that name, case aside, or None."""
    lowered = [each.casefold() for each in class_names]
    if name.casefold() in lowered:
        return lowered.index(name.casefold())
    return None


def true_class(path: str | Path, class_names: Sequence[str], top: str = "") -> int | None:
    """Return the class that a folder of a photo is named after, or None.

    The nearest folder counts, up to the one that was given as `top`; an index does not count, since
    folders that are called 1, 2, 3 are rarely meant so.
    """
    folder = os.path.dirname(os.path.abspath(path))
    end = os.path.abspath(top) if top else folder
    while True:
        index = named_index(os.path.basename(folder), class_names)
        parent = os.path.dirname(folder)
        if index is not None or folder == end or parent == folder:
            return index
        folder = parent


def find_class(wanted: str, class_names: Sequence[str]) -> int:
    """Return the index of a class, or PREDICTED or TRUTH unless a class is really called so.

    Raises CallError: there is no such class.
    """
    index = class_index(wanted, class_names)
    if index is None:
        index = {"predicted": PREDICTED, "truth": TRUTH}.get(wanted.casefold())
    if index is not None:
        return index

    known = ", ".join(class_names[:20])
    if len(class_names) > 20:
        known += ", ..."
    hint = closest(wanted, class_names)
    if "," in wanted:
        hint = "; repeat the option for each class"
    last = len(class_names) - 1
    raise CallError(f"--target-class: no class '{wanted}'{hint} (classes 0 to {last}: {known})")


# ---------------------------------------------------------------------------------------------------------------------
# 5  Explanation. One forward pass gives the logits and the activations, two backward passes the rest.
# ---------------------------------------------------------------------------------------------------------------------

# The autograd nodes of activation functions, whose incoming gradients guided backpropagation clamps. Gates (Sigmoid,
# Hardsigmoid, Tanh) scale a signal rather than rectify it and are left alone.
ACTIVATION_NODES = re.compile(
    r"\w*(relu|elu|silu|swish|mish|hardtanh|threshold|softplus)\w*Backward\d*", re.IGNORECASE
)
Targets = Sequence[int] | Tensor | int | None


@dataclass(frozen=True)
class Explanation:
    """The explanation of N inputs of H x W.

    Attributes:
        cams: for each method the maps, float32 (N, H, W) in [0, 1]: highest where the evidence for the class is
            strongest in this photo. A map that is 0 everywhere means that the layer holds no positive evidence.
        guided: guided-backpropagation gradients, float32 (N, 3, H, W), in logit per normalised input value; None if
            they were not asked for. In a network without activations they are the plain gradients.
        logits: float32 (N, classes).
        targets: int64 (N,), the class that was explained.

    Where K classes were asked for each input, `cams`, `guided` and `targets` have K as their second axis: (N, K, ...).
    """

    cams: dict[str, Floats]
    guided: Floats | None
    logits: Floats
    targets: NDArray[np.int64]

    def __repr__(self) -> str:
        shapes = {method: maps.shape for method, maps in self.cams.items()}
        return f"Explanation(cams={shapes}, targets={self.targets.tolist()})"

    def only(self, index: int) -> Explanation:
        """Return the explanation of one input, as a batch of one; a class that was asked for twice is there once."""
        i, classes = slice(index, index + 1), np.atleast_1d(self.targets[index]).tolist()
        if self.targets.ndim == 2:
            i = np.ix_([index], [classes.index(target) for target in dict.fromkeys(classes)])
        cams = {method: maps[i] for method, maps in self.cams.items()}
        guided = None if self.guided is None else self.guided[i]
        return Explanation(cams, guided, self.logits[index : index + 1], self.targets[i])


def gradcam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (Chattopadhyay et al., WACV 2018, arXiv:1710.11063, equation 19), as the grad-cam package has it.

    The 1e-6 in its denominator is as large as the squared gradients of real networks; the paper has none.
    """
    squared = gradients**2
    alphas = squared / (
        2 * squared + activations.sum((-2, -1), keepdim=True) * squared * gradients + 1e-6
    )
    weights = (gradients.clamp(min=0) * torch.where(gradients != 0, alphas, 0)).sum(
        (-2, -1), keepdim=True
    )
    return activations * weights


def xgradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM (Fu et al., BMVC 2020, arXiv:2008.02312): the mean gradient, weighted by the activations."""
    shares = activations / (activations.sum((-2, -1), keepdim=True) + 1e-7)
    return activations * (gradients * shares).sum((-2, -1), keepdim=True)


def randomcam(activations: Tensor, gradients: Tensor | None) -> Tensor:
    """Random weights, the same in each run: what a map without knowledge of the network looks like."""
    weights = np.random.RandomState(0).uniform(-1, 1, activations.shape[-3])
    return activations * torch.from_numpy(weights).to(activations)[:, None, None]


def principal_component(contributions: Tensor, of_class: bool = True) -> Tensor:
    """Eigen-CAM (Muhammad and Yeasin, IJCNN 2020, arXiv:2008.00299): projection on the first principal component.

    The channels are centred, as in the grad-cam package. A component has no sign of its own, and grad-cam leaves it to
    chance. Here the map of a class rises with the sum of the contributions where the two correlate (0.4 or more); else,
    and where no class is asked for, with the sum of their absolute values.
    """
    columns = contributions.detach().flatten(-2).transpose(-2, -1).cpu().numpy()  # (..., h * w, C)
    centred = columns - columns.mean(-2, keepdims=True)
    first = np.linalg.svd(centred, full_matrices=False)[2][..., :1, :]
    maps = (centred @ first.swapaxes(-2, -1))[..., 0]  # (..., h * w), of mean 0
    total = centred.sum(-1)
    signed, unsigned = ((each * maps).sum(-1) for each in (total, np.abs(columns).sum(-1)))
    correlates = np.abs(signed) > 0.4 * np.linalg.norm(total, axis=-1) * np.linalg.norm(
        maps, axis=-1
    )
    maps = (
        maps
        * np.where(np.where(of_class & correlates, signed, unsigned) < 0, -1, 1).astype(maps.dtype)[
            ..., None
        ]
    )
    return torch.from_numpy(maps).to(contributions).unflatten(-1, contributions.shape[-2:])


CHANNEL_SUM = partial(torch.sum, dim=-3)
# weight_fn: activations and gradients of the class score, (..., C, h, w) -> each channel's contribution to the map,
# of the same shape; reduce_fn: contributions -> map (..., h, w); gradients: whether they are read, that is the class
CamMethod = namedtuple(
    "CamMethod", ("weight_fn", "reduce_fn", "gradients"), defaults=(CHANNEL_SUM, True)
)
CAM_METHODS = {
    "gradcam": CamMethod(
        lambda a, g: a * g.mean((-2, -1), keepdim=True)
    ),  # Selvaraju, ICCV 2017, arXiv:1610.02391
    "gradcam++": CamMethod(gradcam_plus_plus),
    "xgradcam": CamMethod(xgradcam),
    "eigencam": CamMethod(lambda a, g: a, partial(principal_component, of_class=False), False),
    "eigengradcam": CamMethod(lambda a, g: a * g, principal_component),
    "hirescam": CamMethod(lambda a, g: a * g),  # Draelos and Carin, 2020, arXiv:2011.08891
    "layercam": CamMethod(
        lambda a, g: a * g.clamp(min=0)
    ),  # Jiang, IEEE TIP 2021, doi:10.1109/TIP.2021.3089943
    "gradcamelementwise": CamMethod(
        lambda a, g: (a * g).clamp(min=0)
    ),  # a variant of the grad-cam package
    "refinecam": CamMethod(gradcam_plus_plus),  # arXiv:2605.14641: the product over several layers
    "randomcam": CamMethod(randomcam, gradients=False),
}
BY_GRAD_CAM = {  # through the classes of the grad-cam package
    "fem": "FEM",  # Fuad et al., IPTA 2020: channels weighted by the share of their values above two deviations
    "fullgrad": "FullGrad",  # Srinivas and Fleuret, NeurIPS 2019, arXiv:1905.00780: every bias instead of a layer
    "kpcacam": "KPCA_CAM",  # Karmani et al., 2024, arXiv:2410.00267: a kernel PCA of the activations
    "shapleycam": "ShapleyCAM",  # arXiv:2501.06261: needs second derivatives
    "finercam": "FinerCAM",  # CVPR 2025, arXiv:2501.11309: the class against the three most similar ones
    "segeigencam": "SegEigenCAM",  # Chung and Ying, Applied Sciences 2025, doi:10.3390/app15137562
}


def normalise(maps: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Stretch each map of (..., h, w) to [0, 1]; one that is the same everywhere becomes 0, as in grad-cam."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (epsilon + maps.amax((-2, -1), keepdim=True))


def as_map(output: Tensor, size: Sequence[int]) -> Tensor | None:
    """Return a layer's output for inputs of `size` (H, W) as (N, C, h, w), or None if it is not spatial.

    Convolutional layers return it so, Swin's (N, h, w, C), and a ViT's (N, T, C): the first of its tokens is the class
    token; some networks have more of those, or none.
    """
    if output.ndim == 4:
        sides = itertools.pairwise(output.shape[1:])
        like_input = [
            abs(rows * size[1] - columns * size[0]) <= max(size) for rows, columns in sides
        ]
        spatial = output.movedim(3, 1) if like_input == [True, False] else output
        return spatial if spatial[0, 0].numel() > 1 else None
    for special in (1, 0, 2, 3, 4, 5) if output.ndim == 3 else ():
        positions = max(output.shape[1] - special, 0)
        rows = math.isqrt(positions * size[0] // size[1])
        if positions > 1 and rows and rows * rows * size[1] == positions * size[0]:
            return output[:, special:].transpose(1, 2).unflatten(2, (rows, positions // rows))
    return None


def graph_nodes(*roots: Any) -> set[Any]:
    """Return every node of the autograd graph that ends in `roots`."""
    found, stack = set(), [*roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return found


def guided_gradients(scores: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg et al., ICLR 2015 workshop, arXiv:1412.6806) of K scores: (N, K, 3, H, W).

    A backward pass, which uses up the graph; each activation function, module or not, lets only positive gradients in.
    """
    for node in graph_nodes(*(score.grad_fn for score in scores)):
        if ACTIVATION_NODES.fullmatch(node.name()):
            node.register_prehook(
                lambda gradients: tuple(None if g is None else g.clamp(min=0) for g in gradients)
            )
    each = [
        torch.autograd.grad(score, inputs, retain_graph=score is not scores[-1])[0]
        for score in scores
    ]
    return torch.stack(each, 1)


def layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    """Return the dotted name of a layer that is given by its name or as the module itself. Raises CallError."""
    names = {module: name for name, module in model.named_modules() if name}
    name = (
        names.get(layer, type(layer).__name__)
        if isinstance(layer, nn.Module)
        else layer.removeprefix("module.")
    )
    if name in names.values():
        return name
    hint = "; repeat the option for each layer" if "," in name else closest(name, [*names.values()])
    raise CallError(f"the network has no layer '{name}'{hint}; --list-layers shows them all")


def choose_targets(logits: Tensor, targets: Targets, top: int | None = None) -> Tensor:
    """Return the class to explain for each input, int64 (N,), or the K classes, (N, K). Raises CallError."""
    count, classes = logits.shape
    if targets is None:
        return (
            logits.detach().argmax(1)
            if top is None
            else logits.detach().topk(min(top, classes)).indices
        )
    chosen = torch.as_tensor(targets)
    fits = (
        chosen.dtype != torch.bool
        and not chosen.is_floating_point()
        and chosen.shape[:1] in ((), (1,), (count,))
    )
    if not fits or chosen.ndim > 2 or ((chosen < PREDICTED) | (chosen >= classes)).any():
        raise CallError(
            f"targets {chosen.tolist()} do not fit {count} inputs and {classes} classes; give one each"
        )
    chosen = chosen.long().expand(count, *chosen.shape[1:]).to(logits.device, non_blocking=True)
    predicted = logits.detach().argmax(1).view(count, *[1] * (chosen.ndim - 1))
    return torch.where(chosen == PREDICTED, predicted, chosen)


@contextlib.contextmanager
def capture_outputs(
    network: nn.Module, layers: Sequence[str], differentiable: bool = False
) -> Iterator[Any]:
    """Collect the outputs of layers by name while the network runs; of a layer that is called again, the last one."""
    outputs: dict[str, Tensor] = {}

    def collect(name: str, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise CallError(
                f"layer '{name}' returns a {type(output).__name__}, not a tensor; choose a layer inside it"
            )
        if (
            differentiable and not output.requires_grad
        ):  # because nothing before this layer needs a gradient
            output = output.detach().requires_grad_()
        outputs[name] = output
        return (
            output.clone()
        )  # what follows may change it in place, and it is wanted as the layer returned it

    with contextlib.ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(
                network.get_submodule(name).register_forward_hook(partial(collect, name))
            )
        yield outputs
    for name in layers:
        if name not in outputs:
            raise CallError(
                f"layer '{name}' is not called when the network runs; choose another one"
            )


# one call of a module in a forward pass; `came_from` and `node` are the autograd nodes on its two sides
Call = namedtuple("Call", ("name", "module", "input", "came_from", "output", "node"))


def find_target_layer(calls: Sequence[Call], logits: Tensor, size: Sequence[int]) -> str:
    """Return the last layer with a spatial map on which the logits depend, for inputs of `size` (H, W).

    Adaptive pooling and dropout count only where nothing else does. Of a ViT, whose class token alone reaches the head,
    that is the norm before the last attention, which grad-cam's examples use too. Raises CallError: there is none.
    """
    heads = (
        call.input for call in reversed(calls) if isinstance(call.module, (nn.Linear, nn.Conv2d))
    )
    # the input of the head, not the score: the weights of a head that was just initialised may all be zero
    features = next(heads, logits)[0]
    probe = (features * torch.linspace(1, 2, features.numel()).to(features).view_as(features)).sum()
    spatial = [
        call for call in reversed(calls) if call.name and as_map(call.output, size) is not None
    ]
    for call in spatial:
        passing = isinstance(call.module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout))
        if call.output.requires_grad and not passing:
            gradient = torch.autograd.grad(
                probe, call.output, retain_graph=True, allow_unused=True
            )[0]
            if gradient is not None and as_map(gradient, size)[0].any(0).sum() > 1:
                return call.name
    if not spatial:
        raise CallError(
            f"no layer has a spatial map for inputs of {size[0]} x {size[1]}; pass one as target layer"
        )
    return spatial[0].name


def fold_batch_norms(
    network: nn.Module, calls: Sequence[Call], logits: Tensor, keep: Sequence[str]
) -> None:
    """Fold each batch norm into the convolution before it, where nothing else reads that convolution's output.

    `keep` names the layers whose own output is wanted. The graph of the recorded pass tells which output goes where.
    """
    readers = Counter(
        parent for node in graph_nodes(logits.grad_fn) for parent, _ in node.next_functions
    )
    kept = {call.node for call in calls if call.name in keep}
    plain = [
        call for call in calls if not (call.module._forward_hooks or call.module._forward_pre_hooks)
    ]
    convolutions = {
        call.node: call
        for call in plain
        if type(call.module) is nn.Conv2d and call.node not in kept
    }
    for call in plain:
        source, norm = convolutions.get(call.came_from), call.module
        if (
            source
            and type(norm) is nn.BatchNorm2d
            and norm.track_running_stats
            and readers[source.node] == 1
        ):
            fused = nn.utils.fusion.fuse_conv_bn_eval(source.module, norm).requires_grad_(False)
            network.set_submodule(source.name, fused)
            network.set_submodule(call.name, nn.Identity())


class BatchSize:
    """How many items are computed at once; halved where memory does not suffice."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        """Yield `function` of consecutive slices of `items`. Raises what `function` raises for one item."""
        while len(items):
            part = items[: self.size]
            try:
                yield function(part)
                items = items[len(part) :]
            except (RuntimeError, MemoryError) as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                warn("memory does not suffice for such large batches; going on with smaller ones")
                self.size = (len(part) + 1) // 2


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute in float32 without autocast; on CUDA without TF32, whose ten bits show in the maps, and repeatably."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    exact = [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, which refuses to mix the two settings
        exact = [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    exact += [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as stack:
        for place, name, value in exact if device.type == "cuda" else ():
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


class Explainer:
    """Explains the predictions of any `nn.Module` classifier.

    The model is not changed: everything runs on a frozen float32 copy, whose batch norms are folded into the
    convolutions. After training on, make a new explainer. Raises CallError: no such method or layer.

    Args:
        model: takes (N, 3, H, W), returns logits (N, classes); or (N, 1) or (N,) for a single sigmoid output, of which
            the positive side is explained. `DataParallel` around it and half precision are fine.
        methods: names from METHODS and MORE_METHODS, or one of them.
        target_layers: names of layers, or the modules, whose maps are averaged, or one of them; None: the last layer
            with a spatial map on which the score depends.
        guided: whether guided backpropagation is wanted too.
        aug_smooth: average the maps over six variants of the input, mirrored and multiplied by 0.9 to 1.1, as grad-cam.
        eigen_smooth: take the first principal component of the contributions of the channels instead of their sum.
        batch_size: how many inputs Score-CAM and `logits` run at once, at most; None: 2 on the CPU, else 32.
        progress: wraps the passes of Score-CAM and Ablation-CAM, such as tqdm.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: str | Sequence[str] = ("gradcam",),
        target_layers: str | nn.Module | Sequence[str | nn.Module] | None = None,
        *,
        guided: bool = True,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
        batch_size: int | None = None,
        progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
    ) -> None:
        methods = methods if isinstance(methods, str) else ",".join(methods)
        self.methods = tuple(names_from((*METHODS, *MORE_METHODS), "method", METHODS)(methods))
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        layers = (
            [target_layers] if isinstance(target_layers, (str, nn.Module)) else target_layers or ()
        )
        self.target_layers = tuple(layer_name(model, layer) for layer in layers)
        self.guided, self.aug_smooth, self.eigen_smooth, self.progress = (
            guided,
            aug_smooth,
            eigen_smooth,
            progress,
        )
        # Tensors that hang on a graph cannot be copied: what a module keeps of its last run, as weight_norm's weight.
        kept = (
            value
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, Tensor)
        )
        with torch.inference_mode(False):
            network = copy.deepcopy(
                model, {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}
            )
            self.device = next(
                itertools.chain(network.parameters(), network.buffers()), torch.empty(0)
            ).device
            # channels-last where oneDNN computes; on a GPU it pays only in half precision, which is not used
            fast = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
            network.to(memory_format=torch.channels_last if fast else torch.contiguous_format)
            self.network = network.eval().requires_grad_(False).float()
        self.batch_size = BatchSize(batch_size or (2 if self.device.type == "cpu" else 32))
        self.layers: dict[str, tuple[str, tuple[int, ...]]] = {}

    def prepare(self, inputs: Tensor) -> None:
        """Run one input (1, 3, H, W): find the target layer where none was named, and fold the batch norms.

        `layers` is then a dict of the layers with a spatial map: their name, type, and the shape of the map (C, h, w).
        """
        calls: list[Call] = []

        def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                calls.append(Call(name, module, args[0], args[0].grad_fn, output, output.grad_fn))

        with torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(self.device):
            with contextlib.ExitStack() as hooks:
                for name, module in self.network.named_modules():
                    hooks.enter_context(module.register_forward_hook(partial(record, name)))
                logits = as_logits(self.network(self._own(inputs).requires_grad_()))
            maps = ((call, as_map(call.output, inputs.shape[2:])) for call in calls if call.name)
            self.layers = {
                c.name: (type(c.module).__name__, (*m.shape[1:],)) for c, m in maps if m is not None
            }
            self.target_layers = self.target_layers or (
                find_target_layer(calls, logits, inputs.shape[2:]),
            )
            if (
                "fullgrad" not in self.methods
            ):  # which counts the biases of both, convolution and batch norm
                fold_batch_norms(self.network, calls, logits, keep=self.target_layers)
                folded = as_logits(self.network(self._own(inputs)))
                if not torch.allclose(
                    folded, logits, 1e-3, 1e-3
                ):  # a weight is read elsewhere as well
                    for call in calls[:-1]:
                        self.network.set_submodule(call.name, call.module)

    def __call__(
        self, inputs: Tensor, targets: Targets = None, *, top: int | None = None
    ) -> Explanation:
        """Explain inputs (N, 3, H, W), normalised as the model expects them; they are converted to float32.

        Without `targets`, the class with the highest logit is explained (-1 stands for it too), or the `top` classes
        with the highest. Targets are one class for all inputs, or (N,) for each; or K classes, (1, K) or (N, K). Raises
        CallError: they, the inputs or the layers cannot be explained. Raises ValueError: the logits are not finite.
        """
        if not isinstance(inputs, Tensor):
            raise CallError(
                f"inputs are a tensor, not {type(inputs).__name__}; use classifier.preprocess(photo)[None]"
            )
        if inputs.ndim != 4 or not len(inputs):
            raise CallError(
                f"inputs are a batch (N, 3, H, W), not {shape_of(inputs)}; of one photo: inputs[None]"
            )
        if not self.layers:
            self.prepare(inputs[:1])
        # Whatever mode the caller is in, this needs a graph, and leaves the caller's settings alone.
        with torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(self.device):
            if not self.aug_smooth:
                return self._explain(inputs, targets, top, self.methods, self.guided)
            explanation, variants = self._explain(inputs, targets, top, (), self.guided), []
            for step, factor in itertools.product((1, -1), (0.9, 1, 1.1)):  # mirrored where -1
                varied = (inputs.flip(3) if step < 0 else inputs).detach().float() * factor
                cams = self._explain(varied, explanation.targets, None, self.methods, False).cams
                variants.append({method: maps[..., ::step] for method, maps in cams.items()})
            cams = {
                method: np.mean([cams[method] for cams in variants], axis=0)
                for method in self.methods
            }
            return replace(explanation, cams=cams)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the network's logits (N, classes) for inputs (N, 3, H, W), on its device."""
        with exact_arithmetic(self.device):
            return self._in_batches(
                lambda network, part: as_logits(network(self._own(part))), inputs
            )

    def _in_batches(
        self, function: Callable[..., Tensor], items: Any, progress: Any = iter
    ) -> Tensor:
        """Return `function` of the network and all items, a few at once; on a CPU by threads that share the cores."""
        cores = torch.get_num_threads()
        networks = [self.network]
        with contextlib.suppress(
            RuntimeError
        ):  # a module has kept tensors of a pass, which cannot be copied
            while self.device.type == "cpu" and len(networks) < min(4, cores):
                # each thread has its own modules, which may keep something during a pass, but the same weights
                shared = {
                    id(each): each for each in (*self.network.parameters(), *self.network.buffers())
                }
                networks.append(copy.deepcopy(self.network, shared))

        @torch.inference_mode()
        def run(network: nn.Module, part: Any) -> Tensor:
            return torch.cat([*self.batch_size.run(partial(function, network), part)])

        workers = len(networks)
        with ThreadPoolExecutor(workers, None, torch.set_num_threads, (cores // workers,)) as pool:
            parts = progress(items.split(64))
            found = [
                each for part in parts for each in pool.map(run, networks, part.chunk(workers))
            ]
        torch.set_num_threads(cores)  # a thread that is started later follows the last call
        return torch.cat(found)

    def _own(self, inputs: Tensor) -> Tensor:
        """Return a copy of the inputs as the network wants them."""
        return inputs.detach().to(self.device, torch.float32).clone()

    def _explain(
        self, inputs: Tensor, targets: Targets, top: int | None, methods: Any, guided: bool
    ) -> Explanation:
        inputs, size = self._own(inputs).requires_grad_(guided), inputs.shape[2:]
        with_gradients = any(
            CAM_METHODS[method].gradients for method in methods if method in CAM_METHODS
        )
        with capture_outputs(self.network, self.target_layers, with_gradients) as outputs:
            logits = as_logits(self.network(inputs))
        targets = choose_targets(logits, targets, top)
        classes = targets.view(
            len(inputs), -1
        )  # (N, K); K is 1 where the caller thinks of one class
        scores = [logits.gather(1, column[:, None]).sum() for column in classes.T]
        of_scores = []
        for score in scores if with_gradients else ():
            keep = guided or score is not scores[-1]
            of_scores.append(
                torch.autograd.grad(score, [*outputs.values()], None, keep, allow_unused=True)
            )
        layers = {}  # for each layer its activations (N, C, h, w), and the gradients (N, K, C, h, w) of the scores
        for (layer, output), *gradients in zip(outputs.items(), *of_scores, strict=True):
            activations = as_map(output.detach(), size)
            if activations is None:
                raise CallError(
                    f"layer '{layer}' has no spatial map but {shape_of(output)} values; choose another one"
                )
            if any(gradient is None for gradient in gradients):
                raise CallError(
                    f"the class score does not depend on layer '{layer}'; choose another one"
                )
            maps = [as_map(gradient, size) for gradient in gradients]
            layers[layer] = activations, torch.stack(maps, 1) if maps else None
        guided_maps = guided_gradients(scores, inputs) if guided else None
        # The first result that is waited for: a GPU has been given all of the work above by now.
        if not torch.isfinite(logits).all():
            raise ValueError("the logits are NaN or infinite; the weights are probably broken")

        def array(found: Tensor) -> NDArray[Any]:  # (N, K, ...) -> (N, ...) or (N, K, ...)
            return found.view(*targets.shape, *found.shape[2:]).cpu().contiguous().numpy()

        cams = {
            method: array(self._cam(method, layers, inputs.detach(), classes)) for method in methods
        }
        return Explanation(
            cams,
            array(guided_maps) if guided else None,
            logits.detach().cpu().numpy(),
            array(classes),
        )

    def _cam(
        self, method: str, layers: Mapping[str, Any], inputs: Tensor, classes: Tensor
    ) -> Tensor:
        """Return the maps (N, K, H, W) of one method, in [0, 1], averaged over all layers."""
        if method in BY_GRAD_CAM:
            # its Shapley-CAM fails with several layers at once
            groups = [[layer] for layer in layers] if method == "shapleycam" else [[*layers]]
            photos = [
                (group, *photo)
                for group in groups
                for photo in zip(inputs.split(1), classes, strict=True)
            ]
            found = torch.stack([self._by_grad_cam(method, *photo) for photo in photos])
            return normalise(found.view(len(groups), *classes.shape, *inputs.shape[2:]).mean(0))
        weigh = (
            self._score_weights if method == "scorecam" else self._ablation_weights
        )  # one input, by many passes
        maps = []
        for layer, (activations, gradients) in layers.items():
            if method in CAM_METHODS:
                weight_fn, reduce_fn, _ = CAM_METHODS[method]
                contributions = weight_fn(activations[:, None], gradients)
            else:
                photos = zip(activations, inputs.split(1), classes, strict=True)
                weights = torch.stack([weigh(layer, *photo) for photo in photos])
                contributions, reduce_fn = (
                    weights[..., None, None] * activations[:, None],
                    CHANNEL_SUM,
                )
            if self.eigen_smooth and reduce_fn is CHANNEL_SUM:
                reduce_fn = principal_component
            small = reduce_fn(contributions).expand(*classes.shape, *activations.shape[2:])
            maps.append(
                nn.functional.interpolate(
                    normalise(small.clamp(min=0)), inputs.shape[2:], mode="bilinear"
                )
            )
        joined = torch.stack(maps)
        return normalise(normalise(joined).prod(0) if method == "refinecam" else joined.mean(0))

    @torch.inference_mode()
    def _ablation_weights(
        self, layer: str, activations: Tensor, inputs: Tensor, targets: Tensor
    ) -> Tensor:
        """Ablation-CAM (Desai and Ramaswamy, WACV 2020): how much of the score is lost without a channel.

        For one input (1, 3, H, W) and the classes (K,); returns (K, C). The paper divides by the score, which may be
        negative. Only what follows the layer runs again: its last call returns many ablated copies of its output. What
        precedes it gets a small stand-in for the input, or where that does not fit the input, once or for each copy.
        """
        module, outputs = self.network.get_submodule(layer), list[Tensor]()
        with module.register_forward_hook(
            lambda module, args, output: outputs.append(output.clone())
        ):
            logits = as_logits(self.network(inputs))

        def logits_for(copies: Tensor, stand_in: Tensor, count: int) -> Tensor:
            calls = itertools.count(1)
            with module.register_forward_hook(
                lambda *_: copies if next(calls) == len(outputs) else None
            ):
                return as_logits(self.network(stand_in.expand(count or len(copies), -1, -1, -1)))

        output = outputs[-1]
        for stand_in, count in (
            (torch.zeros_like(inputs[..., :64, :64]), 1),
            (inputs, 1),
            (inputs, 0),
        ):
            with contextlib.suppress(RuntimeError, AssertionError, ValueError):
                twice = logits_for(torch.cat([output, output]), stand_in, count)
                if len(twice) == 2 and torch.allclose(twice, logits, 1e-3, 1e-3):
                    break
        axis = (
            1 if output.shape[1:] == activations.shape else output.ndim - 1
        )  # of the channels, see as_map
        score = logits[0, targets]
        ablated = score.repeat(output.shape[axis], 1)
        alive = output.movedim(axis, 1)[0].flatten(1).any(1).nonzero()[:, 0]
        for channels in self.progress(
            alive.split(max(1, min(256, 2**25 // (output.numel() * 4))))
        ):  # 32 MB together
            copies = output.repeat(len(channels), *[1] * (output.ndim - 1))
            copies.movedim(axis, 1)[
                torch.arange(len(channels), device=channels.device), channels
            ] = 0
            ablated[channels] = logits_for(copies, stand_in, count)[:, targets]
        return (score - ablated).T

    @torch.inference_mode()
    def _score_weights(
        self, layer: str, activations: Tensor, inputs: Tensor, targets: Tensor
    ) -> Tensor:
        """Score-CAM (Wang et al., CVPR workshops 2020, arXiv:1910.01279): the softmax of the scores of masked inputs.

        For one input (1, 3, H, W) and the classes (K,); returns (K, C). The mask is a channel of activations (C, h, w),
        enlarged and stretched to [0, 1]; that of a constant channel is zero: those share one pass.
        """
        varied = (activations.flatten(1).amax(1) > activations.flatten(1).amin(1)).nonzero()[:, 0]
        scores = self.logits(torch.zeros_like(inputs))[0, targets].repeat(len(activations), 1)

        def masked_scores(network: nn.Module, channels: Tensor) -> Tensor:
            small = activations[channels][:, None]
            masks = nn.functional.interpolate(
                small, inputs.shape[2:], mode="bilinear", align_corners=True
            )
            return as_logits(network(inputs * normalise(masks, 1e-8)))[:, targets]

        if len(varied):
            scores[varied] = self._in_batches(masked_scores, varied, self.progress)
        return scores.softmax(0).T

    def _by_grad_cam(
        self, method: str, names: Sequence[str], inputs: Tensor, targets: Tensor
    ) -> Tensor:
        """Return the maps (K, H, W) of one input (1, 3, H, W) by grad-cam's class. Raises CallError."""
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        layers = (
            [] if method == "fullgrad" else [self.network.get_submodule(name) for name in names]
        )
        reshape = partial(as_map, size=inputs.shape[2:]) if layers else None
        cam = getattr(pytorch_grad_cam, BY_GRAD_CAM[method])(self.network, layers, reshape)
        kept = getattr(cam, "base_cam", cam).activations_and_grads
        # Shapley-CAM cannot cope with the constant gradients of frozen weights.
        self.network.requires_grad_(method == "shapleycam")
        maps = []
        try:
            for target in targets.tolist():
                asked = {
                    "targets": [ClassifierOutputTarget(target)],
                    "eigen_smooth": self.eigen_smooth,
                }
                if method == "finercam":
                    asked |= {"targets": None, "target_idx": target}
                # These hooks stand behind grad-cam's, so that what follows cannot change the activations that it keeps.
                with capture_outputs(self.network, names):
                    found = cam(inputs.clone().requires_grad_(), **asked)
                maps.append(torch.from_numpy(np.float32(found[0])).to(inputs))
            return torch.stack(maps)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Shapley-CAM takes no tokens, Finer-CAM no single output, FullGrad no layer that is called twice.
            raise CallError(
                f"{method} does not work on layer '{', '.join(names)}': {first_line(error)}"
            ) from error
        finally:
            self.network.requires_grad_(False)
            kept.activations, kept.gradients = (
                [],
                [],
            )  # which its own release() fails to detach where they are views
            kept.release()


# ---------------------------------------------------------------------------------------------------------------------
# 6  Metrics. The network's predictions for changed inputs show how faithful a map is.
# ---------------------------------------------------------------------------------------------------------------------

METRICS = ("average_drop", "increase", "deletion", "insertion", "road")


def faithfulness(
    explainer: Explainer, inputs: Tensor, cam: Floats, target: int
) -> dict[str, float]:
    """Measure a map (H, W) in [0, 1] of inputs (1, 3, H, W) by how the probability p of a class changes with the input.

    - average_drop, in [0, 1], lower is better: the share of p that is lost when the input is multiplied by the map.
    - increase, 0 or 1, higher is better: whether p grows by that (both Chattopadhyay et al., WACV 2018,
      arXiv:1710.11063, as means over many photos).
    - deletion, in [0, 1], lower is better: the mean p while the hottest pixels are set to zero (the mean colour) first.
    - insertion, in [0, 1], higher is better: the mean p while they come back first (both Petsiuk et al., RISE, BMVC
      2018, arXiv:1806.07421, in 20 steps; there the insertion starts from a blurred photo).
    - road, in [-0.5, 0.5], higher is better: half of how much more p drops when the hottest 20, 40, 60 and 80 percent
      are imputed from their neighbours than when the coldest are (Rong et al., ICML 2022, arXiv:2202.00449, as
      grad-cam's ROADCombined).
    """
    photo, pixels = inputs[0].cpu().numpy(), cam.size
    kept = [
        turned < np.quantile(turned, share)
        for turned in (cam, 1 - cam)
        for share in (0.2, 0.4, 0.6, 0.8)
    ]
    counts = np.array([*range(0, pixels, -(-pixels // 20)), pixels])
    ranks = np.argsort(np.argsort(-cam.flatten(), kind="stable"))
    hottest = (ranks.reshape(cam.shape) < counts[:, None, None])[:, None]
    changed = [
        photo[None],
        photo[None] * cam,
        photo * ~hottest,
        photo * hottest,
        [impute(photo, k) for k in kept],
    ]
    asked = torch.from_numpy(np.concatenate(changed).astype(np.float32))
    p = probabilities(explainer.logits(asked))[:, target].double().cpu().numpy()
    before, masked, *curves, road = np.split(p, np.cumsum([len(part) for part in changed[:-1]]))
    areas = (((curve[1:] + curve[:-1]) / 2 * np.diff(counts)).sum() / pixels for curve in curves)
    drop = max(0.0, before[0] - masked[0]) / (before[0] + 1e-7)
    values = (drop, masked[0] > before[0], *areas, (road[4:] - road[:4]).mean() / 2)
    return {name: round(float(value), 6) for name, value in zip(METRICS, values, strict=True)}


def probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each class from logits (N, classes): softmax, or sigmoid of a single output."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def impute(photo: Floats, kept: NDArray[np.bool_]) -> Floats:
    """Return a photo (3, H, W) with the pixels that are not in `kept` (H, W) filled from those around, plus noise.

    ROAD's noisy linear imputation (arXiv:2202.00449, section 4): grad-cam's equations, and a faster solver.
    """
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer, neighbors_weights
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    system, right = NoisyLinearImputer.setup_sparse_system(
        kept.astype(np.float32), photo, neighbors_weights
    )
    solver = splu(
        csc_matrix(system), "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    noise = np.random.default_rng(0).standard_normal(right.T.shape)
    filled = photo.copy()
    filled[:, ~kept] = solver.solve(right).T + 0.01 * noise
    return filled


# ---------------------------------------------------------------------------------------------------------------------
# 7  Output. Arrays become pictures and files, each of them whole or not there, and the log says which are done.
# ---------------------------------------------------------------------------------------------------------------------

COLORMAPS = {
    name[9:].lower(): number for name, number in vars(cv2).items() if name.startswith("COLORMAP_")
}
CELL = 320  # pixels: side of a picture on a sheet
TEXT = 22  # height of the text on a sheet, in pixels


def resized(picture: Picture, long_side: int) -> Picture:
    """Return the picture enlarged or shrunk to that long side."""
    scale = long_side / max(picture.shape[:2])
    size = tuple(max(1, round(length * scale)) for length in picture.shape[1::-1])
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def draw_cam(picture: Picture, cam: Floats, colormap: str = "jet", alpha: float = 0.5) -> Picture:
    """Return the map (H, W) in [0, 1] as colours over the picture; a map that is 0 everywhere leaves it as it is."""
    if not cam.any():
        return picture
    enlarged = cv2.resize(cam, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap(cv2.convertScaleAbs(enlarged, alpha=255), COLORMAPS[colormap])
    return cv2.addWeighted(picture, 1 - alpha, cv2.cvtColor(colours, cv2.COLOR_BGR2RGB), alpha, 0)


def draw_gradients(gradients: Floats, width: int, height: int) -> Picture:
    """Return gradients (3, H, W) as a picture: grey is zero; a brighter pixel would raise the score, a darker lower it.

    The scale is set by the 99.5th percentile, so that a few extreme pixels do not turn all others grey.
    """
    strongest = (
        float(np.percentile(np.abs(gradients), 99.5)) or float(np.abs(gradients).max()) or 1.0
    )
    enlarged = cv2.resize(
        gradients.transpose(1, 2, 0), (width, height), interpolation=cv2.INTER_LINEAR
    )
    return cv2.addWeighted(enlarged, 127.5 / strongest, enlarged, 0, 127.5, dtype=cv2.CV_8U)


def draw(
    output: str,
    explanation: Explanation,
    seen: Picture,
    method: str = "",
    index: int = 0,
    **look: Any,
) -> Picture:
    """Return one of OUTPUTS as a picture, uint8 RGB, as large as `seen`, what the network saw (Classifier.seen).

    `method` is by default the first one; `index` counts the inputs, or where there are K classes for each, all N * K;
    `look` is the colormap and alpha of `draw_cam`.
    """
    maps = explanation.cams[method or next(iter(explanation.cams))]
    cam = maps.reshape(-1, *maps.shape[-2:])[index]
    if output == "cam":
        return draw_cam(seen, cam, **look)
    guided = explanation.guided.reshape(-1, 3, *maps.shape[-2:])[index]
    return draw_gradients(guided * cam if output == "cam_gb" else guided, *seen.shape[1::-1])


def draw_sheet(
    title: str, blocks: Sequence[tuple[str, Sequence[Any]]], font: Any, colormap: str
) -> Picture:
    """Return a table with a colour scale: for each class a heading, and columns of (caption, picture, note over it)."""
    columns, gap, line = blocks[0][1], 8, TEXT + 12
    bands, deepest = math.ceil(len(columns) / 6), max(map(len, columns))  # columns are wrapped
    across = math.ceil(len(columns) / bands)
    room = 40 // (bands * deepest)  # more rows of pictures would be taller than WebP takes
    if len(blocks) > room:
        warn(f"a sheet has room for {room} classes; the others are left out")
    cell = line + len(resized(columns[0][0][1], CELL))  # a picture and the caption above it
    block = line + bands * deepest * cell
    right, bottom = max(984, across * (CELL + gap) + gap), line + len(blocks[:room]) * block + gap
    sheet = Image.new("RGB", (right, bottom), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 6), title, "black", font)
    pen.rectangle((right - 290, 0, right, line), "white")  # here a long title ends
    pen.text((right - 280, 6), "evidence 0", "dimgray", font)
    pen.text((right - 22, 6), "1", "dimgray", font)
    scale = draw_cam(
        np.zeros((TEXT, 128, 3), np.uint8),
        np.linspace(0, 1, 128, dtype=np.float32)[None],
        colormap,
        1,
    )
    sheet.paste(Image.fromarray(scale), (right - 156, 8))
    for top, (heading, columns) in zip(range(line, bottom, block), blocks, strict=False):
        pen.text((gap, top + 4), heading, "black", font)
        for number, column in enumerate(columns):
            left, upper = (
                gap + number % across * (CELL + gap),
                top + line + number // across * deepest * cell,
            )
            for caption, picture, note in column:
                pen.text((left, upper + 4), caption, "dimgray", font)
                sheet.paste(Image.fromarray(resized(picture, CELL)), (left, upper + line))
                middle = upper + (line + cell) // 2
                pen.text(
                    (left + gap, middle), note, "red", font, stroke_width=3, stroke_fill="white"
                )
                upper += cell
    return np.asarray(sheet)


def find_font(names: Sequence[str]) -> tuple[Any, set[str]]:
    """Return the font that has most of the characters of the names, and all that it has: Pillow's own has ASCII."""
    font, has = ImageFont.load_default(TEXT), set(map(chr, range(32, 127)))
    wanted = has.union(*names)
    if not wanted <= has:
        from matplotlib import font_manager, ft2font

        for path in sorted(
            font_manager.findSystemFonts(), key=lambda path: ("Sans" not in path, path)
        ):
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                found = set(map(chr, ft2font.FT2Font(path).get_charmap()))
                if len(found & wanted) > len(has & wanted):
                    font, has = ImageFont.truetype(path, TEXT), found
    return font, has


def file_labels(class_names: Sequence[str]) -> list[str]:
    """Return what stands for each class in file names: its name, or where that is not enough its index and its name."""
    # without underscores, so that no two photos' names with labels behind them can be equal
    labels = [re.sub(r"[^\w.+]+|_", "-", name).strip("-.")[:40] for name in class_names]
    if all(labels) and len({label.casefold() for label in labels}) == len(labels):
        return labels
    return [f"{index}-{label}".rstrip("-") for index, label in enumerate(labels)]


def file_key(path: str | Path) -> int:
    """Return a hash that is equal for names of one file, also where case or the writing of accents does not count."""
    return hash(unicodedata.normalize("NFC", os.path.abspath(path)).casefold())


class Log:
    """`results.jsonl` in the output folder, and the files that it lists. Raises CallError: it cannot be opened.

    A line is a JSON object for a photo and a choice of methods; the last one of the two counts. Nothing is ever
    rewritten. Several processes append under a lock, and each reads what the others have appended before it writes: so
    none writes over another's files.
    """

    def __init__(self, folder: Path, start_size: int | None = None) -> None:
        """Read the log. From `start_size` bytes on, by default from now on, it is of processes that run meanwhile."""
        self.folder, self.path = folder, folder / LOG_NAME
        self._lock = FileLock(folder / ".results.lock", poll_interval=0.01)
        self._position = 0  # up to which the log was read
        # (image, method) -> options, files, place in the log, whether the prediction is right
        self._last: dict[tuple[str, str], tuple[str, list[Path], int, bool | None]] = {}
        self._owners: dict[
            int, tuple[str, str]
        ] = {}  # file -> (image, options) of the last record that lists it
        self._stems: dict[
            int, str
        ] = {}  # the beginning of files' names -> the image that they are of
        try:
            with self.locked():
                self._start_size = self._position if start_size is None else start_size
        except OSError as error:
            raise CallError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[Any]:
        """Yield the open file, when all that other processes have appended has been read."""
        names = ("O_RDWR", "O_APPEND", "O_CREAT", "O_BINARY", "O_NOFOLLOW", "O_NONBLOCK")
        flags = sum(
            getattr(os, name, 0) for name in names
        )  # no link is followed, no FIFO waited for
        with self._lock, open(os.open(self.path, flags, 0o666), "r+b", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileExistsError(errno.EEXIST, "it is not a regular file; remove it")
            file.seek(self._position)
            for line in io.BufferedReader(io.FileIO(file.fileno(), closefd=False)):
                record = parse_record(line) if line.endswith(b"\n") else {}
                if record:
                    image, stem, options = (
                        self._image_key(record),
                        record.get("output_stem"),
                        record.get("options", ""),
                    )
                    below = self.folder / os.path.dirname(stem or "")
                    files = [below / os.path.basename(name) for name in record["files"]]
                    self._last[image, record["method"]] = (
                        options,
                        files,
                        self._position,
                        record.get("right"),
                    )
                    self._owners.update((file_key(file), (image, options)) for file in files)
                    if stem:  # not of an error
                        self._stems[file_key(self.folder / stem)] = image
                self._position += len(line) if line.endswith(b"\n") else 0
            yield file

    def _image_key(self, record: Mapping[str, Any]) -> str:
        """Return the absolute path of a photo; `source` leads there from the log's folder wherever that is."""
        path = (
            os.path.join(self.folder, record["source"]) if "source" in record else record["image"]
        )
        return os.path.normcase(os.path.abspath(path))

    def is_done(self, image: str, method: str, options: str) -> bool:
        """Return whether a photo's files are all there as a run with the same options has written them."""
        key = self._image_key({"image": image})
        done, files, *_ = self._last.get((key, method), (None, []))
        owned = (self._owners[file_key(file)] == (key, options) for file in files)
        return done == options and all(owned) and all(map(os.path.isfile, files))

    def verdicts(self, images: Iterable[str], method: str) -> list[bool]:
        """Return whether the prediction is right for each of the photos whose true class is known. Raises OSError."""
        with self.locked():
            found = (
                self._last.get((self._image_key({"image": image}), method)) for image in images
            )
            return [entry[3] for entry in found if entry and isinstance(entry[3], bool)]

    def write(self, record: dict[str, Any], base: str, contents: Mapping[str, bytes]) -> bool:
        """Write the files of a photo and append its record. Return False where another process has done so meanwhile.

        `contents` maps the names of the files to their contents; {} in a name stands for the last part of `base`, such
        as cats/33. Where that is another photo's, or a file is in the way, it becomes cats/33_2, in later runs as well.
        `record` gets `files`, `output_stem` and `source`. Raises OSError: the disk is full, a name is too long ...
        """
        folder, image = self.folder / os.path.dirname(base), self._image_key(record)
        folder.mkdir(parents=True, exist_ok=True)
        # a name that cannot be foretold, so that no link is followed
        with tempfile.TemporaryDirectory(
            prefix=".part-", dir=folder, ignore_cleanup_errors=True
        ) as parts:
            for number, content in enumerate(contents.values()):
                Path(parts, str(number)).write_bytes(content)
            with self.locked() as log:
                done, _, place, _ = self._last.get((image, record["method"]), (None, [], 0, None))
                if done == record["options"] and place >= self._start_size:
                    return False
                for stem in itertools.chain(
                    [base], (f"{base}_{number}" for number in itertools.count(2))
                ):
                    files = [folder / name.format(os.path.basename(stem)) for name in contents]
                    owner = self._stems.get(file_key(self.folder / stem), image)
                    if owner == image and all(self._is_free(file, image) for file in files):
                        break
                for (
                    file
                ) in files:  # a run that is killed from here on leaves no file of the run before it
                    file.unlink(missing_ok=True)
                record |= {"files": [str(file) for file in files], "output_stem": stem}
                self._append(log, record)
                for number, file in enumerate(files):
                    os.replace(Path(parts, str(number)), file)
        return True

    def _is_free(self, file: Path, image: str) -> bool:
        """Return whether a file does not exist, or is one of this image. Raises OSError: the name is too long."""
        owner = self._owners.get(file_key(file), (None,))[0]
        with contextlib.suppress(FileNotFoundError):
            return stat.S_ISREG(os.lstat(file).st_mode) and owner == image
        return owner in (None, image)

    def _append(self, log: Any, record: dict[str, Any]) -> None:
        """Append a line, all of it or none; it is read when the log is locked next. Raises OSError."""
        with contextlib.suppress(ValueError):  # another drive of Windows
            record["source"] = os.path.relpath(record["image"], self.folder)
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        end = log.seek(0, os.SEEK_END)
        if end > self._position:  # half a line, of a process that was killed
            line = b"\n" + line
        if log.write(line) < len(line):
            log.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_error(self, image: str, method: str, error: str) -> None:
        """Append the record of a photo without files; where there is no room, the next run will do so."""
        with contextlib.suppress(OSError), self.locked() as log:
            self._append(log, {"image": image, "method": method, "error": error, "files": []})


# ---------------------------------------------------------------------------------------------------------------------
# 8  Gallery. A page of all results, made from the log alone: one file without a server, a package or the network.
# ---------------------------------------------------------------------------------------------------------------------


def write_gallery(folder: Path) -> Path | None:
    """Write index.html, a page of what the log says. Return its path; None without photos. Raises OSError."""
    page, items = folder / "index.html", dict[tuple[str, str], dict[str, Any]]()
    with open(folder / LOG_NAME, "rb") as lines:
        for record in map(parse_record, lines):
            with contextlib.suppress(
                LookupError, TypeError, ValueError, AttributeError
            ):  # another program's
                items[record.get("source", record["image"]), record["method"]] = page_item(record)
    if not items:
        return None
    if os.path.lexists(page) and not (
        page.is_file() and b"made by cnn_visualizations.py" in page.read_bytes()[:300]
    ):
        raise FileExistsError(f"{page} is in the way: it was not made by this program")
    by_path = sorted(
        items.values(),
        key=lambda item: re.sub(r"\d+", lambda digits: digits[0].zfill(12), item["path"]),
    )
    text = json.dumps([folder.resolve().name, by_path], ensure_ascii=False, separators=(",", ":"))
    with tempfile.TemporaryDirectory(
        prefix=".part-", dir=folder, ignore_cleanup_errors=True
    ) as parts:
        part = Path(parts, page.name)
        part.write_bytes(
            PAGE.replace("DATA", text.replace("<", "\\u003c"), 1).encode(
                "utf-8", "backslashreplace"
            )
        )
        os.replace(part, page)
    return page


def page_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page tells of a record."""

    def likely(entry: Mapping[str, Any]) -> tuple[str, int]:
        return str(entry["name"]), round(1e6 * entry["probability"])

    image, top, truth, box = (
        record["image"],
        record.get("top5", []),
        record.get("truth"),
        record.get("box"),
    )
    source = (
        as_link(record["source"]) if "source" in record else Path(os.path.abspath(image)).as_uri()
    )
    item = {
        "path": image,
        "source": source,
        "methods": record["method"].split(","),
        "top": [],
        "rows": [],
    }
    if "error" in record:
        return {**item, "state": "failed", "error": str(record["error"])}
    if box:  # where the photo lies behind the heatmap
        x, y = 100 / (box[2] - box[0]), 100 / (box[3] - box[1])
        place = -box[0] * x, -box[1] * y, record["width"] * x, record["height"] * y
        item["place"] = "left:{:.2f}%;top:{:.2f}%;width:{:.2f}%;height:{:.2f}%".format(*place)
    guess = record.get("prediction") or top[0]
    state = "unknown" if not truth else "right" if truth["index"] == guess["index"] else "wrong"
    item |= {
        "state": state,
        "guess": str(guess["name"]),
        "truth": str(truth["name"]) if truth else "",
    }
    explained = zip(
        record.get("classes") or [record.get("class")], pictures_of(record).items(), strict=False
    )
    rows = [(*likely(entry), *pictures) for entry, pictures in explained]
    return {**item, "top": [likely(entry) for entry in (guess, *top[1:])], "rows": rows}


def pictures_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return for each class the link to its pictures, ./cat/%00_1_dog.jpg, and what may stand for %00: gb, fem_cam."""
    (folder, stem), found = os.path.split(record.get("output_stem", "")), dict[str, list[str]]()
    kinds = [
        "gb",
        *(
            f"{method}_{output}"
            for method in record["method"].split(",")
            for output in ("cam_gb", "cam")
        ),
    ]
    for name, kind in itertools.product(map(os.path.basename, record["files"]), kinds):
        if name.startswith(f"{kind}_{stem}"):
            found.setdefault(as_link(os.path.join(folder, f"\0{name[len(kind) :]}")), []).append(
                kind
            )
    return found


def as_link(path: str) -> str:
    """Return a path as a link from the page; a byte that is not UTF-8 remains that byte."""
    return "./" + quote(
        os.fsencode(re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", path).replace(os.sep, "/"))
    )


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="generator" content="made by cnn_visualizations.py">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"><style>
:root { color-scheme: light dark; --page: light-dark(#f5f6f8, #14171b); --card: light-dark(#fff, #1e2227);
  --line: light-dark(#d8dce2, #383f48); --text: light-dark(#1b1f24, #e8eaed); --soft: light-dark(#59626e, #a3abb6);
  --mark: light-dark(#2459c4, #8ab0fb); --good: light-dark(#187642, #68cb8c); --bad: light-dark(#be2e20, #ff8672); }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit; } html:has(dialog[open]) { overflow: hidden; }
html, dialog { background: var(--page); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
html { scroll-padding-top: 80px; } .right { --state: var(--good); } .wrong, .failed { --state: var(--bad); }
body { max-width: 1640px; margin: auto; padding: 20px clamp(12px, 2.5vw, 32px); --state: var(--mark); }
h1, h2, h3, summary { font-weight: 600; } h1 { font-size: 24px; } h3, summary { margin: 16px 0 8px; }
button, select, input { min-height: 36px; padding: 5px 12px; border: 1px solid var(--line); border-radius: 7px;
  background: var(--card); } :focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }
button:hover, a:hover *, [aria-pressed=true], .heat h2 + button { border-color: var(--mark); color: var(--mark); }
small, figcaption, th, label { color: var(--soft); font-size: 13px; } label > * { color: var(--text); }
table { display: block; max-height: 70vh; overflow: auto; } td button { width: 100%; min-width: 40px; padding: 0;
  background: color-mix(in srgb, var(--state) var(--share), var(--card)); }
th { max-width: 180px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: right; }
tr:first-child th + th { max-height: 130px; writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
form, nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: end; gap: 10px 16px;
  padding: 12px 0; background: var(--page); } select { width: 180px; } label { display: grid; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 14px; padding-top: 12px; }
.card { display: grid; gap: 4px; align-content: start; padding: 0 0 10px; text-align: left; overflow: hidden; }
.card > * { min-width: 0; padding: 0 11px; } .card > .frame { padding: 0; margin-bottom: 5px; aspect-ratio: 1; }
.path { flex: 1 1 260px; align-self: center; overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; }
.frame { position: relative; display: grid; place-items: center; overflow: hidden; background: var(--line); }
.chance { display: grid; grid-template-columns: 1fr auto; gap: 3px 8px; } .row > .chance { width: 200px; }
.bar { grid-column: 1 / 3; height: 5px; background: linear-gradient(var(--state) 0 0) no-repeat var(--line); }
dialog { width: 100%; height: 100%; max-width: none; max-height: none; padding: 0 2.5vw 24px; border: 0; }
img { width: 100%; height: 100%; object-fit: contain; } .row { display: flex; flex-wrap: wrap; gap: 14px; }
.row img { width: auto; height: min(56vh, (100vw - 130px) / 4.8); } .heat .plain { opacity: 0; }
.row .plain { position: absolute; width: 100%; height: 100%; object-fit: cover; } .verdict { color: var(--state); }
@media (max-width: 700px) { form { position: static; } label { flex: 1 1 40%; } select { width: 100%; }
  .row { display: grid; grid-template-columns: 1fr 1fr; } .row > .chance, .row img { width: 100%; height: auto; } }
</style><title>Heatmaps</title><h1></h1><p id="summary"></p><noscript>This page needs JavaScript.</noscript>
<details><summary>True and predicted classes (30 at most, by mistakes)</summary><table></table></details><form></form>
<p role="status"></p><main></main><dialog aria-labelledby="path" class="heat"><nav><h2 class="path" id="path"></h2>
</nav><div></div></dialog><script type="application/json">DATA</script><script>
"use strict";
const find = (selector) => document.querySelector(selector), [folder, items] = JSON.parse(find("script").textContent);
const [main, form, view] = ["main", "form", "dialog"].map(find);
const make = (kind, properties, ...children) => {
  const [tag, ...classes] = kind.split("."), made = document.createElement(tag);
  Object.assign(made, {className: classes.join(" "), ...properties}).append(...children);
  return made;
};
const percent = (millionths) => (millionths / 1e4).toFixed(1) + "%", sure = ({top}) => top[0]?.[1] ?? 9e6;
const tally = (values) => values.reduce((counts, value) => counts.set(value, (counts.get(value) ?? 0) + 1), new Map());
const ranked = (values) => [...tally(values)].sort((a, b) => b[1] - a[1]);
const VALUES = {Result: ({state}) => [state], Class: ({truth, guess}) => [...new Set([truth, guess])].filter(Boolean),
  Method: ({methods}) => methods, Pair: ({truth, guess}) => [`true ${truth}, predicted ${guess}`]};
const ORDERS = {"wrong, most sure first": (item) => (item.state === "wrong" ? -sure(item) : sure(item)),
  "least sure first": sure, "most sure first": (item) => (item.error ? 0 : -sure(item)), "path": () => 0};
let list = [], at = 0;
const chance = ([name, sure], state) => make("span.chance." + state, {}, make("span.path", {}, name), percent(sure),
  make("span.bar", {style: `background-size: ${percent(sure)}`}));
const verdict = ({state, truth, error}) => make("span.path.verdict." + state, {},
  {wrong: `✕ true: ${truth}`, right: "✓ right", failed: `✕ ${error}`}[state] ?? "");
const picture = (src, alt) => make("small.frame", {}, make("img", {loading: "lazy", alt, src,
  onerror: ({target}) => target.replaceWith("no picture")}));
const card = (item) => {
  const [name, , link = "", kinds = []] = item.rows[0] ?? [], onclick = () => turn(list.indexOf(item));
  const kind = [`${form.Method.value || item.methods[0]}_cam`, ...kinds].find((kind) => kinds.includes(kind)) ?? "";
  return make("button.card", {onclick}, picture(link.replace("%00", kind), kind), ...item.top.slice(0, 1).map((guess) =>
    chance(guess, item.state)), verdict(item), make("small.path", {}, item.path, kind && `\n${kind} for ${name}`));
};
const more = (least = 0) => {  // cards down to somewhat below the window
  while (main.childElementCount < list.length
    && (main.childElementCount <= least || main.getBoundingClientRect().bottom < innerHeight + 2000))
    main.append(...list.slice(main.childElementCount, main.childElementCount + 200).map(card));
};
const show = () => {
  const wanted = Object.fromEntries(new FormData(form)), text = wanted.Text.toLowerCase();
  list = items.filter((item) => [item.path, item.truth, item.guess, item.error].join("\n").toLowerCase().includes(text)
    && Object.keys(VALUES).every((name) => ["", ...VALUES[name](item)].includes(wanted[name])));
  list.sort((a, b) => ORDERS[wanted.Order](a) - ORDERS[wanted.Order](b));
  find("[role=status]").textContent = `${list.length} of ${items.length} ${wanted.Pair}`;
  for (const button of document.querySelectorAll("td button")) button.ariaPressed = button.title === wanted.Pair;
  if (main.getBoundingClientRect().top < 0) find("[role=status]").scrollIntoView();
  main.replaceChildren();
  more();
};
const figure = (item, kind, src) => {
  const frame = picture(src, kind), plain = make("img.plain", {alt: "", src: item.source, style: item.place ?? ""});
  if (kind.endsWith("_cam")) frame.append(plain);
  return make("a", {href: src, target: "_blank"}, make("figure", {}, frame, make("figcaption", {}, kind)));
};
const turn = (index) => {
  at = Math.max(0, Math.min(index, list.length - 1));
  const item = list[at], row = (heading, ...kinds) => make("section", {}, make("h3", {}, heading), make("div.row", {},
    ...[["source", item.source], ...kinds].map(([kind, src]) => figure(item, kind, src))));
  const rows = item.rows.flatMap(([name, sure, link, kinds]) => item.methods.map((method) => row(
    `${method} for ${name}, ${percent(sure)}`, ...[`${method}_cam`, "gb", `${method}_cam_gb`]
      .filter((kind) => kinds.includes(kind)).map((kind) => [kind, link.replace("%00", kind)]))));
  const chances = item.top.map((each) => chance(each, {[item.guess]: item.state, [item.truth]: "right"}[each[0]]));
  find("#path").textContent = item.path;
  find("dialog div").replaceChildren(verdict(item), make("div.row", {}, ...chances), ...(rows[0] ? rows : [row("")]));
  if (!view.open) view.showModal();
};
const act = {H: ["Heat (H)", () => (find("h2 + button").ariaPressed = view.classList.toggle("heat"))],
  ArrowLeft: ["Previous (←)", () => turn(at - 1)], ArrowRight: ["Next (→)", () => turn(at + 1)],
  Escape: ["Close (Esc)", () => view.close()]};
for (const [text, onclick] of Object.values(act)) find("nav").append(make("button", {onclick}, text));
view.onkeydown = ({key, altKey, ctrlKey, metaKey}) => altKey | ctrlKey | metaKey || act[key.replace(/^h$/, "H")]?.[1]();
view.onclose = () => { more(at); main.children[at].focus(); };
const photos = [...new Map(items.map((item) => [item.path, item])).values()], known = photos.filter(({truth}) => truth);
const pairs = tally(known.flatMap(VALUES.Pair)), truths = tally(known.map(({truth}) => truth));
const states = tally(photos.map(({state}) => state)), wrong = known.filter(({state}) => state === "wrong");
const names = [...new Set([...ranked(wrong.flatMap(VALUES.Class)), ...truths].map(([key]) => key))].slice(0, 30).sort();
const head = (name) => make("th", {title: name}, name), cell = (truth, guess) => {
  const [title] = VALUES.Pair({truth, guess}), count = pairs.get(title), share = 10 + 50 * count / truths.get(truth);
  const onclick = () => show(form.Pair.value = form.Pair.value === title ? "" : title);
  return make("td", {}, count ? make(truth === guess ? "button.right" : "button.wrong",
    {title, onclick, style: `--share: ${share}%`}, count) : "");
};
find("table").append(make("tr", {}, head("true ↓ predicted →"), ...names.map(head)), ...names.map((truth) =>
  make("tr", {}, head(truth), ...names.map((guess) => cell(truth, guess)))));
Object.assign(find("details"), {hidden: !known.length, open: names.length < 9});
const field = (name, options) => make("label", {}, name, make("select", {name}, ...options));
const choices = (name) => ranked(items.flatMap(VALUES[name])).map(([key, sum]) => new Option(`${key} (${sum})`, key));
form.append(...["Result", "Class", "Method"].map((name) => field(name, [new Option("all", ""), ...choices(name)])),
  field("Order", Object.keys(ORDERS).slice(known.length ? 0 : 1).map((order) => new Option(order))),
  make("label", {}, "Text", make("input", {name: "Text", type: "search"})), make("input", {name: "Pair", hidden: true}),
  make("button", {type: "reset"}, "Show all"));
Object.assign(form, {oninput: show, onsubmit: () => false, onreset: () => setTimeout(show)});
window.onscroll = window.onresize = () => more();
document.title = find("h1").textContent = `Heatmaps in ${folder}`;
find("#summary").textContent = `${photos.length} photos, ${states.get("failed") ?? 0} failed`
  + (known.length ? `, ${percent(1e6 * (states.get("right") ?? 0) / known.length)} of ${known.length} right` : "");
show();</script></html>"""


# ---------------------------------------------------------------------------------------------------------------------
# 9  Run. Threads read, one explains, threads write; a photo that fails stops nothing.
# ---------------------------------------------------------------------------------------------------------------------

THREADS = min(4, os.cpu_count() or 1)  # that read, and as many that draw


@dataclass
class Item:
    """A photo on its way through the program; each step fills in what it finds, or `error`."""

    path: str
    folder: str  # of its files, below the output folder
    options: str  # a hash of the options and of the file, by which a later run knows what was done
    truth: int | None = None  # see true_class
    box: tuple[float, float, float, float] = (
        0.0,
        0.0,
        0.0,
        0.0,
    )  # the part that the network sees, in its pixels
    picture: Picture | None = None  # that part, to draw on
    inputs: Tensor | None = None  # that part as the network gets it, (3, H, W)
    explanation: Explanation | None = None  # (1, K, ...)
    record: dict[str, Any] = field(default_factory=dict)  # its line in the log
    contents: dict[str, bytes] = field(default_factory=dict)  # of its files, see Log.write
    error: str = ""  # one line


@dataclass(frozen=True)
class Job:
    """What is done with every photo: the command line, the network, and the classes to explain."""

    args: argparse.Namespace
    classifier: Classifier
    explainer: Explainer
    targets: list[
        int
    ]  # indices, PREDICTED or TRUTH; none of them: the `top_k` classes of highest probability
    labels: Sequence[str] | None  # of all classes, for file names; None: no class stands in them
    font: Any  # for the sheet
    glyphs: set[str]  # characters that the font has
    shown: Sequence[str]  # class names, or their indices where the font lacks a character


def prefetch(
    function: Callable[[Any], Any], items: Iterable[Any], depth: int, threads: int
) -> Iterator[Any]:
    """Map `function` over `items` in threads, `depth` ahead, in order; what was begun before an error is yielded."""
    pool, pending, error, items = (
        ThreadPoolExecutor(threads),
        deque[Future[Any]](),
        None,
        iter(items),
    )
    try:
        while pending or not error:
            try:
                while not error and len(pending) < depth:
                    pending.append(pool.submit(function, next(items)))
            except (Exception, KeyboardInterrupt) as raised:
                error = raised
            # on Windows, Ctrl-C ends only such waits as have a limit
            if pending and wait([pending[0]], timeout=0.2).done:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if not isinstance(error, StopIteration):
        raise error


def with_options(
    args: argparse.Namespace, photos: Iterable[tuple[str, str]]
) -> list[tuple[str, str, str]]:
    """Return the photos, each with a hash of the options and of the size and time of all files that are read for it."""

    def signature(path: str) -> tuple[int, int]:
        with contextlib.suppress(OSError, ValueError):
            return os.stat(path).st_size, os.stat(path).st_mtime_ns
        return 0, 0

    ignored = {
        "images",
        "photos",
        "ckpt",
        "device",
        "batch_size",
        "output",
        "skip_existing",
        "log_size",
        "gallery",
    }
    ignored |= (
        set() if args.sheet or args.save_arrays else {"methods"}
    )  # which only these files share
    options = [
        (name, str(value)) for name, value in sorted(vars(args).items()) if name not in ignored
    ]
    ckpt, own_network = os.path.realpath(args.ckpt or ""), (args.arch or "").rpartition(":")[0]
    options = repr((options, ckpt, signature(ckpt), signature(own_network)))
    texts = [
        f"{options} {signature(path)}".encode("utf-8", "backslashreplace") for path, _ in photos
    ]
    return [
        (*photo, hashlib.sha256(text).hexdigest()[:16])
        for photo, text in zip(photos, texts, strict=True)
    ]


def load_job(args: argparse.Namespace, local_rank: int | None) -> Job:
    """Load the network that the command line asks for, and print what is assumed about it. Raises CallError."""
    if args.colormap not in COLORMAPS:
        hint = closest(args.colormap, COLORMAPS) or f" (known: {', '.join(COLORMAPS)})"
        raise CallError(f"unknown colormap '{args.colormap}'{hint}")
    own_gpu = local_rank is not None and args.device in (None, "cuda") and torch.cuda.is_available()
    device = (
        f"cuda:{local_rank}" if own_gpu else args.device
    )  # torchrun starts a process for each GPU
    given = {
        name: getattr(args, name) for name in ("class_names", "input_size", "resize", "mean", "std")
    }
    classifier = load_classifier(args.arch, args.ckpt, args.num_classes, device, **given)
    names, side = classifier.class_names, classifier.input_size
    targets = list(dict.fromkeys(find_class(wanted, names) for wanted in args.target_classes or ()))
    if (args.only_wrong or TRUTH in targets) and all(
        true_class(path, names) is None for path, _ in args.photos
    ):
        raise CallError(
            f"no photo's folder is named after a class ({', '.join(names[:8])}), so no truth is known"
        )
    given = {
        name: getattr(args, name)
        for name in ("methods", "target_layers", "aug_smooth", "eigen_smooth")
    }
    bar = partial(tqdm, desc=",".join(args.methods), unit="pass", leave=False, disable=None)
    explainer = Explainer(classifier.model, guided=args.outputs != ["cam"], progress=bar, **given)
    try:
        explainer.prepare(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, CallError) or is_out_of_memory(error):
            raise
        why = f"fails at inputs of {side} x {side}: {first_line(error)}; pass another --input-size"
        raise CallError(f"{classifier.arch} {why}") from error
    if not local_rank:
        print_line(classifier.describe(explainer.target_layers), sys.stderr)
    labels = file_labels(names) if targets or (args.top_k or 1) > 1 else None
    font, glyphs = find_font(names) if args.sheet else (None, set())
    shown = [name if glyphs.issuperset(name) else str(index) for index, name in enumerate(names)]
    return Job(args, classifier, explainer, targets, labels, font, glyphs, shown)


def read_item(entry: tuple[str, str, str], job: Job) -> Item:
    """Read a photo, and keep only what is needed further on, so that large photos do not pile up in memory."""
    item = Item(*entry, truth=true_class(entry[0], job.classifier.class_names))
    try:
        photo = read_photo(item.path)
        height, width = photo.shape[:2]
        item.box = job.classifier.seen_box(height, width)
        part = job.classifier.seen(photo)
        item.picture = resized(part, job.args.output_size or min(max(part.shape[:2]), 1024))
        item.inputs = job.classifier.preprocess(photo)
        item.record = {
            "image": item.path,
            "width": width,
            "height": height,
            "method": ",".join(job.args.methods),
        }
    except PhotoError as error:
        item.error = str(error)
    return item


def explain_items(items: Iterator[Item], job: Job, batch_size: BatchSize) -> Iterator[Item]:
    """Yield the items with their explanations, or what went wrong, in order."""

    def attempt(part: list[Item]) -> None:
        try:
            explain(part, job)
        except (RuntimeError, ValueError, MemoryError) as error:
            if isinstance(error, CallError) or (is_out_of_memory(error) and len(part) > 1):
                raise
            if re.search("(CUDA|HIP) error", str(error)) and not is_out_of_memory(
                error
            ):  # the GPU answers no more
                raise CallError(
                    f"the GPU has failed: {first_line(error)}; go on with --skip-existing"
                ) from error
            if len(part) == 1:
                part[0].error = f"{part[0].path}: the network failed: {first_line(error)}"
            for item in part if len(part) > 1 else ():  # it may be one of them only
                attempt([item])

    while batch := list(itertools.islice(items, batch_size.size)):
        deque(batch_size.run(attempt, [item for item in batch if not item.error]), maxlen=0)
        yield from batch


def explain(items: Sequence[Item], job: Job) -> None:
    """Fill in the explanations and the records of photos; with --only-wrong, of the others the records alone."""
    inputs = torch.stack([item.inputs for item in items])
    if job.args.only_wrong:
        logits = job.explainer.logits(inputs).cpu().numpy()
        if not np.isfinite(logits).all():
            raise ValueError("the logits are NaN or infinite")
        for item, row in zip(items, logits[:, None], strict=True):
            item.explanation = Explanation({}, None, row, row.argmax(1, keepdims=True))
            describe_item(item, job)
        wrong = [item.record.get("right") is False for item in items]
        items, inputs = list(itertools.compress(items, wrong)), inputs[wrong]
    truths = [PREDICTED if item.truth is None else item.truth for item in items]
    if TRUTH in job.targets and PREDICTED in truths:
        warn(
            "where the folder is not named after a class, the prediction is explained instead of the truth"
        )
    targets = [[truth if target == TRUTH else target for target in job.targets] for truth in truths]
    if items:
        explanation = job.explainer(
            inputs, targets if job.targets else None, top=job.args.top_k or 1
        )
    for index, item in enumerate(items):
        item.explanation = explanation.only(index)
        describe_item(item, job)


def describe_item(item: Item, job: Job) -> None:
    """Complete the record of a photo that was explained, with the metrics if they are asked for."""
    explanation, classifier = item.explanation, job.classifier
    p, names = (
        probabilities(torch.from_numpy(explanation.logits))[0].numpy(),
        classifier.class_names,
    )
    indices, count = (
        [*explanation.targets[0], *np.argsort(-p, kind="stable")[:5]],
        len(explanation.targets[0]),
    )
    found = [
        {"index": int(i), "name": names[i], "probability": round(float(p[i]), 6)} for i in indices
    ]
    classes, top5 = found[:count], found[count:]
    item.record |= {
        "prediction": top5[0],
        "class": classes[0],
        **({"classes": classes} if job.labels else {}),
    }
    if item.truth is not None:
        item.record["truth"] = {"index": item.truth, "name": names[item.truth]}
        item.record["right"] = item.truth == top5[0]["index"]
    item.record |= {
        "top5": top5,
        "target_layer": ",".join(job.explainer.target_layers),
        "options": item.options,
    }
    item.record |= {"input_size": classifier.input_size, "resize": job.args.resize}
    item.record["box"] = [round(x, 2) for x in item.box]
    item.record |= {
        key: [round(x, 6) for x in getattr(classifier.preset, key)] for key in ("mean", "std")
    }
    item.record |= {"metrics": []} if job.args.metrics else {}
    for index, each in enumerate(classes if job.args.metrics else ()):
        for method, cams in explanation.cams.items():
            metrics = faithfulness(job.explainer, item.inputs[None], cams[0, index], each["index"])
            item.record["metrics"].append({"class": each["name"], "method": method, **metrics})


def draw_item(item: Item, job: Job) -> Item:
    """Fill in the contents of a photo's files; README.md has the shapes of the arrays."""
    if item.error or not item.explanation.cams:
        return item
    pictures, blocks, args, explanation = {}, [], job.args, item.explanation
    for index, found in enumerate(item.record.get("classes", [item.record["class"]])):
        label = job.labels[found["index"]] if job.labels else ""
        columns = {
            "": [("source", item.picture, "")]
        }  # of the sheet: gb under the source, cam_gb under cam
        for output in args.outputs:
            for method in [""] if output == "gb" else args.methods:
                drawn = draw(
                    output,
                    explanation,
                    item.picture,
                    method,
                    index,
                    colormap=args.colormap,
                    alpha=args.alpha,
                )
                pictures["_".join(filter(None, (method, output, "{}", label)))] = drawn
                empty = method and not explanation.cams[method][0, index].any()
                entry = f"{method} {output}".strip(), drawn, "no positive evidence" if empty else ""
                columns.setdefault(method, []).append(entry)
        blocks.append(
            (
                f"explained: {job.shown[found['index']]} {found['probability']:.3f}",
                list(columns.values()),
            )
        )
    if args.sheet:
        photo = "".join(c if c in job.glyphs else "?" for c in os.path.basename(item.path))
        best, layer = item.record["prediction"], item.record["target_layer"]
        truth = "" if item.record.get("right", True) else f" (truth: {job.shown[item.truth]})"
        title = f"{photo}   prediction: {job.shown[best['index']]} {best['probability']:.3f}{truth}   layer: {layer}"
        pictures["{}_sheet"] = draw_sheet(title, blocks, job.font, args.colormap)
    quality = {
        "jpg": [cv2.IMWRITE_JPEG_QUALITY, args.quality],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, args.quality],
    }
    for name, picture in pictures.items():
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        encoded = cv2.imencode(f".{args.format}", bgr, quality.get(args.format, []))[1]
        item.contents[f"{name}.{args.format}"] = encoded.tobytes()
    if args.save_arrays:
        arrays, buffer = (
            {} if explanation.guided is None else {"guided": explanation.guided[0]},
            io.BytesIO(),
        )
        arrays |= {
            "methods": args.methods,
            "classes": explanation.targets[0],
            "logits": explanation.logits[0],
        }
        arrays |= {
            "cams": [explanation.cams[method][0] for method in args.methods],
            "box": item.box,
        }
        arrays |= {
            "class_names": job.classifier.class_names,
            "target_layers": job.explainer.target_layers,
        }
        np.savez_compressed(buffer, **arrays)
        item.contents["{}.npz"] = buffer.getvalue()
    item.picture = item.inputs = None
    return item


def save_item(item: Item, args: argparse.Namespace, log: Log) -> str:
    """Write the files and the record of a photo, and print its line. Return "done", "skipped" or "failed"."""
    try:
        base = "/".join([*Path(item.folder).parts, Path(item.path).stem])
        if not item.error and not log.write(item.record, base, item.contents):
            return "skipped"
    except OSError as error:
        item.error = f"{item.path}: its results cannot be written: {error.strerror or error}"
    if item.error:
        log.write_error(item.path, ",".join(args.methods), item.error)
        print_line(f"error: {item.error}", sys.stderr)
        return "failed"
    prediction, classes = (
        item.record["prediction"],
        item.record.get("classes", [item.record["class"]]),
    )
    truth = "" if item.record.get("right", True) else f" (truth: {item.record['truth']['name']})"
    parts = [f"{prediction['name']} {prediction['probability']:.3g}{truth}"]
    if classes != [prediction]:
        parts.append(
            "explained: "
            + ", ".join(f"{each['name']} {each['probability']:.3g}" for each in classes)
        )
    for found in item.record.get("metrics", ()):
        of = f" for {found['class']}" if len(classes) > 1 else ""
        parts.append(
            f"{found['method']}{of}: " + ", ".join(f"{name} {found[name]:.3g}" for name in METRICS)
        )
    print_line(
        f"{item.path}: {'; '.join(parts)} -> {', '.join(item.record['files']) or 'no files'}"
    )
    empty = f"map is all zeros: no positive evidence at {item.record['target_layer']}"
    for method in (
        method for method, cams in item.explanation.cams.items() if not cams[0].any((1, 2)).all()
    ):
        print_line(f"warning: {item.path}: the {method} {empty}", sys.stderr)
    return "done"


def finish(args: argparse.Namespace, log: Log, images: Sequence[str]) -> str:
    """Write the page of all results. Return what the closing line tells of it, and of the accuracy for these photos."""
    page, verdicts, parts = None, [], []
    try:
        verdicts = log.verdicts(images, ",".join(args.methods))
        with log.locked():  # a process that has read less must not write later
            page = write_gallery(args.output) if args.gallery else None
    except OSError as error:
        warn(f"no page of the results: {error}")
    right, known = verdicts.count(True), len(verdicts)
    parts += [f"accuracy {100 * right / known:.1f} % ({right} of {known})"] if known else []
    parts += (
        [f"the {known - right} wrong ones first in {page}" if right < known else f"see {page}"]
        if page
        else []
    )
    return "".join(f"; {part}" for part in parts)


def run(args: argparse.Namespace) -> int:
    """Explain the photos that the command line names. Returns the exit status; raises CallError."""
    if args.list_layers:
        explainer = load_job(args, None).explainer
        for name, (kind, shape) in explainer.layers.items():
            size = " x ".join(map(str, shape)) + "   (default)" * (name in explainer.target_layers)
            print_line(f"{name:40} {kind:24} {size}")
        return 0
    began, interrupted, log = (
        time.monotonic(),
        False,
        Log(args.output, getattr(args, "log_size", None)),
    )
    of_torchrun = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    rank, local_rank, world_size = (
        int(os.environ.get(name, value)) for name, value in of_torchrun.items()
    )
    mine, methods = with_options(args, args.photos[rank::world_size]), ",".join(args.methods)
    todo = [
        entry
        for entry in mine
        if not args.skip_existing or not log.is_done(entry[0], methods, entry[2])
    ]
    tally = Counter(skipped=len(mine) - len(todo))
    try:
        job = load_job(args, local_rank if world_size > 1 else None) if todo else None
        batch_size = BatchSize(
            args.batch_size or (2 if job is None or job.explainer.device.type == "cpu" else 32)
        )
        depth = 2 * batch_size.size + THREADS
        items = prefetch(partial(read_item, job=job), todo, depth, THREADS)
        items = prefetch(
            partial(draw_item, job=job), explain_items(items, job, batch_size), depth, THREADS
        )
        for item in tqdm(items, total=len(todo), unit="photo", disable=None):
            with tqdm.external_write_mode():
                tally[save_item(item, args, log)] += 1
    except KeyboardInterrupt:
        interrupted = True
    if interrupted or len(mine) > len(todo) or len(args.photos) > 1:
        of_processes = f" by process {rank} of {world_size}" if world_size > 1 else ""
        counts = f"{tally['done']} done, {tally['skipped']} skipped, {tally['failed']} failed"
        go_on = "; stopped, the same command with --skip-existing goes on" if interrupted else ""
        told = finish(args, log, [path for path, *_ in mine])
        print_line(
            f"{counts}{of_processes} in {time.monotonic() - began:.1f} s{told}{go_on}", sys.stderr
        )
    # torchrun stops all processes as soon as one does not return 0, so there a broken photo has only its line
    return 130 if interrupted else int(tally["failed"] > 0 and world_size == 1)


def main(request: Request) -> int:
    """Run the program. Returns the exit status: 0 done, 1 a photo failed, 2 a wrong call, 130 stopped by Ctrl-C."""
    warnings.filterwarnings("ignore")  # the user cannot act on them
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    Image.MAX_IMAGE_PIXELS = None  # read_photo has a limit of its own
    args = request.args
    args.photos = [(photo.path, photo.folder) for photo in request.photos]
    args.log_size = request.log_size
    if args.input_size:
        args.input_size = args.input_size[0]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        return run(args)
    except (CallError, RuntimeError, MemoryError) as error:
        if not isinstance(error, CallError) and not is_out_of_memory(error):
            raise
        why = (
            "" if isinstance(error, CallError) else "the network needs more memory than there is: "
        )
        print_line(f"error: {why}{first_line(error)}", sys.stderr)
        return 2
    except (
        OSError
    ) as error:  # stdout: `| head` has read enough, or the disk that it goes to is full
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (its last flush would fail as well)
        print_line(
            f"error: stopped, nothing more can be written: {error.strerror or error}", sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    on_interrupt(signal.default_int_handler)
    sys.exit(main(REQUEST))
