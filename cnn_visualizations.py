#!/usr/bin/env python3
# For `uv run cnn_visualizations.py` (PEP 723); the same as requirements.txt.
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.10",
#     "torchvision>=0.25",
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
import gc
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

DESCRIPTION = """\
Show why a convolutional network answered as it did:
a heatmap (CAM), guided backpropagation (gb), and their product (cam_gb).
"""
EXAMPLES = """\
examples:
  python cnn_visualizations.py --ckpt best.pth --class-names cat,dog 33.jpg
  python cnn_visualizations.py --ckpt best.pth --target-class 0 --target-class 1 --sheet photos/
"""


class CallError(argparse.ArgumentTypeError):
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
    message = str(error).strip() or type(error).__name__
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


def number_in(convert: type, low: float, high: float) -> Callable[[str], Any]:
    """Return an option type: an int or a float, as `convert` says, from `low` to `high`."""
    kind = "whole number" if convert is int else "number"

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if low <= value <= high:
                return value
        raise CallError(f"'{text}' is not a {kind} from {low} to {high}")

    return parse


def three_numbers(low: float) -> Callable[[str], list[float]]:
    """Return an option type: three numbers from `low` to 255, "R,G,B", or one for all three."""

    def parse(text: str) -> list[float]:
        values = list(map(number_in(float, low, 255), text.split(",")))
        if len(values) == 1:
            return values * 3
        if len(values) != 3:
            raise CallError(f"'{text}' is neither one number nor three with commas between them")
        return values

    return parse


def input_size(text: str) -> tuple[int, int]:
    """Option type: height and width, "256x128", or one number for both."""
    sides = list(map(number_in(int, 8, 4096), text.lower().split("x")))
    if len(sides) > 2:
        raise CallError(f"'{text}' is neither one number nor HEIGHTxWIDTH")
    return sides[0], sides[-1]


def resize_mode(text: str) -> str | int:
    """Option type: "crop", "squash" or the length of the short side before the crop."""
    mode = text.lower()
    if mode in ("crop", "squash"):
        return mode
    if not text.isdecimal():
        raise CallError(f"'{text}' is neither crop nor squash nor a whole number from 8 to 8192")
    return number_in(int, 8, 8192)(text)


def names_from(known: Sequence[str], kind: str, every: Sequence[str]) -> Callable[[str], list[str]]:
    """Return an option type: known names with commas between them; "all" stands for `every`."""

    def parse(text: str) -> list[str]:
        if text.strip().lower() == "all":
            return list(every)

        names = [word.strip().lower() for word in text.strip(", ").split(",")]
        for name in names:
            if name not in known:
                suggestion = closest(name, known)
                raise CallError(f"unknown {kind} '{name}'{suggestion} (known: {', '.join(known)})")
        return names

    return parse


METHOD_LIST = names_from(METHODS + MORE_METHODS, "method", METHODS)
OUTPUT_LIST = names_from(OUTPUTS, "output", OUTPUTS)


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
    """Option type: names with commas between them, or a file of names, one a line or JSON."""
    content = some_text(text).replace(",", "\n")
    is_path = "," not in text and re.search(r"[\\/*?]|\.\w{2,5}$", text)
    try:
        if is_path or os.path.exists(text):
            content = existing_file(text).read_text(encoding="utf-8-sig")
        if content.lstrip().startswith(("[", "{")):
            return ordered_names(json.loads(content))

        lines = map(str.strip, content.splitlines())
        return ordered_names(list(filter(None, lines)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        message = f"{text}: not class names in UTF-8, one a line or as JSON: {first_line(error)}"
        raise CallError(message) from error


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

    if sorted(by_index) != list(range(len(classes))):
        raise ValueError("the indices are not 0, 1, 2 ...")
    return [by_index[index] for index in sorted(by_index)]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        line = " ".join(message.split())
        print_line(f"error: {line}", sys.stderr)
        self.exit(2)


def add_network_options(parser: Parser) -> None:
    """Add the options of the network and of what it sees."""
    add = parser.add_argument_group("the network").add_argument

    text = "A torchvision architecture, or net.py:build, your function. Default: recognised."
    add("--arch", type=some_text, metavar="NAME", help=text)

    text = "Your .pth, .pt, .ckpt or .safetensors. Default: ImageNet weights, downloaded."
    add("--ckpt", type=existing_file, metavar="FILE", help=text)

    text = "Number of classes. Default: the checkpoint's."
    add("--num-classes", type=number_in(int, 1, 10**6), metavar="N", help=text)

    text = "In the order of training: cat,dog or a file of names. Default: the checkpoint's."
    add("--class-names", type=class_names, metavar="NAMES", help=text)

    add("--multi-label", action="store_true", help="Each output is a sigmoid of its own.")

    text = "cuda, cuda:1, mps (Apple), xpu (Intel) or cpu. Default: the CUDA GPU, else the CPU."
    add("--device", type=some_text, metavar="NAME", help=text)

    text = "Photos that go through the network at once. Default: 32 on a GPU, 2 on the CPU."
    add("--batch-size", type=number_in(int, 1, 4096), metavar="N", help=text)

    add = parser.add_argument_group("what the network sees").add_argument

    text = "Side of the network's square input, or HEIGHTxWIDTH. Default: the checkpoint's."
    add("--input-size", type=input_size, metavar="PX", help=text)

    text = "crop (default): the centre of the photo. squash: the whole photo, aspect ratio not "
    text += "kept. A number: the centre, after the short side was resized to that many pixels."
    add("--resize", type=resize_mode, default="crop", metavar="MODE", help=text)

    text = "Mean to subtract: R,G,B or one number. After ToTensor() alone: --mean 0 --std 1."
    add("--mean", type=three_numbers(0), metavar="R,G,B", help=text)

    text = "Standard deviation to divide by, written likewise."
    add("--std", type=three_numbers(1e-6), metavar="R,G,B", help=text)


def add_explanation_options(parser: Parser) -> None:
    """Add the options of the explanation."""
    add = parser.add_argument_group("the explanation").add_argument

    text = f"One or more of {', '.join(METHODS)}, with commas between them; all for these. "
    text += f"Further methods: {', '.join(MORE_METHODS)}. Default: gradcam."
    add("--method", type=METHOD_LIST, action="extend", metavar="LIST", dest="methods", help=text)

    repeated = {"type": some_text, "action": "append"}
    text = "Layer to explain; repeat to average several. Default: the last with a map."
    add("--target-layer", metavar="NAME", dest="target_layers", help=text, **repeated)

    text = "Name, index, truth or predicted; repeat for several. Default: the prediction."
    add("--target-class", metavar="CLASS", dest="target_classes", help=text, **repeated)

    text = "Explain the N classes of highest probability."
    add("--top-k", type=number_in(int, 1, 10**6), metavar="N", help=text)

    add("--aug-smooth", action="store_true", help="Average over six variants of the photo: slower.")

    text = "Take the first principal component over the channels: less noise."
    add("--eigen-smooth", action="store_true", help=text)

    text = "Measure each map: average drop, increase, deletion, insertion, ROAD."
    add("--metrics", action="store_true", help=text)


def add_picture_options(parser: Parser) -> None:
    """Add the options of the pictures."""
    add = parser.add_argument_group("the pictures").add_argument

    text = "Which of cam, gb and cam_gb to draw. Default: all three. cam alone is the fastest."
    add("--outputs", type=OUTPUT_LIST, action="extend", metavar="LIST", help=text)

    text = "Long side of the pictures. Default: the photo's own resolution, at most 1024."
    add("--output-size", type=number_in(int, 16, 8192), metavar="PX", help=text)

    add("--sheet", action="store_true", help="Also draw all methods and classes into one picture.")

    text = "One of OpenCV's: jet (default), turbo, viridis ..."
    add("--colormap", type=some_text, default="jet", metavar="NAME", help=text)

    text = "Opacity of the heatmap, from 0 to 1. Default: 0.5."
    add("--alpha", type=number_in(float, 0, 1), default=0.5, metavar="A", help=text)

    add("--fade", action="store_true", help="The colder a place, the more it shows the photo.")

    formats = ("jpg", "png", "webp")
    text = "jpg (default), png or webp."
    add("--format", type=str.lower, choices=formats, default="jpg", metavar="NAME", help=text)

    text = "Quality of jpg and webp, from 1 to 100. Default: 98."
    add("--quality", type=number_in(int, 1, 100), default=98, metavar="Q", help=text)


def add_file_options(parser: Parser) -> None:
    """Add the options of the files, and of which photos get them."""
    add = parser.add_argument_group("the files").add_argument

    text = "Where the files go. Default: out."
    add("--output", type=some_text, default="out", metavar="FOLDER", help=text)

    add("--save-arrays", action="store_true", help="Also write maps, gradients and logits as .npz.")

    text = "Skip the photos that an earlier run with the same options has finished."
    add("--skip-existing", action="store_true", help=text)

    text = "Write pictures only where the prediction is not the class of the photo's folder."
    add("--only-wrong", action="store_true", help=text)

    text = "Do not write index.html, the page of all results."
    add("--no-gallery", action="store_false", dest="gallery", help=text)

    add("--list-layers", action="store_true", help="Print the layers and their sizes, and exit.")


def make_parser() -> Parser:
    """Return the parser of all options."""
    usage = "cnn_visualizations.py [options] IMAGE ..."
    parser = Parser(usage=usage, description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    text = "Photos, folders, patterns, or - to read paths from standard input."
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=text)

    add_network_options(parser)
    add_explanation_options(parser)
    add_picture_options(parser)
    add_file_options(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line as a namespace.

    Raises SystemExit: status 0 after --help, 2 where an option is wrong.
    """
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)

    # Photos may stand on both sides of the options, and after "--".
    names = []
    if "--" in words:
        end = words.index("--")
        names = words[end + 1 :]
        words = words[:end]
    args, rest = parser.parse_known_args(words)
    check_options(parser, rest)
    check_lists(parser, words)
    args.images += rest + names
    check_images(parser, args)

    if args.top_k and args.target_classes:
        parser.error("--top-k and --target-class exclude each other: pass one of the two")

    args.methods = list(dict.fromkeys(args.methods or ["gradcam"]))
    args.outputs = list(dict.fromkeys(args.outputs or OUTPUTS))
    args.output = Path(args.output)
    if args.device == "gpu":
        args.device = "cuda"
    return args


def check_options(parser: Parser, words: Sequence[str]) -> None:
    """Report an unknown option among the words that the parser left over."""
    for word in words:
        if word == "-" or not word.startswith("-"):
            continue

        option = word.split("=")[0]
        advice = closest(option, parser._option_string_actions)
        if option in SYNONYMS:
            advice = f"; pass {SYNONYMS[option]}"
        parser.error(f"unknown option {option}{advice} (see --help)")


def check_lists(parser: Parser, words: Sequence[str]) -> None:
    """Report a list with spaces between its items, which would be taken for photos."""
    for position, option in enumerate(words):
        if option not in ("--method", "--outputs", "--class-names", "--mean", "--std"):
            continue

        parse = parser._option_string_actions[option].type
        items = list_items(parse, words[position + 1 :])
        if len(items) > 1:
            listed = ",".join(items).replace(",,", ",")
            parser.error(f"{option} takes a list without spaces; pass {option} '{listed}'")


def list_items(parse: Callable[[str], Any], words: Iterable[str]) -> list[str]:
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
STRIP_HEIGHT = 256  # rows that are converted at once
LARGE_PHOTO = 14_000_000  # pixels; photos above are decoded and resized one at a time
MAX_SCANS = 100  # of a progressive JPEG; usual ones have about ten
LARGEST_JPEG = 2**27  # bytes in which scans are counted
START_OF_SCAN = b"\xff\xda"
LOG_NAME = "results.jsonl"


@dataclass(frozen=True)
class Photo:
    """A photo that was found."""

    path: str
    folder: str = ""  # where its files go, relative to --output
    top: str = ""  # the folder on the command line that was walked; "": the photo itself was named


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
    """Return a line that says why a path cannot be a photo, without opening the file, or ""."""
    fault = "no such file"
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path):
            return "" if os.path.getsize(path) else f"{path}: the file is empty"

    if "://" in str(path):
        fault = "this is a URL; download the photo and pass the file"
    elif glob.has_magic(str(path)):
        fault = "no file matches this pattern"
    elif os.path.exists(path):
        fault = "not a file"
    return f"{path}: {fault}"


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


def photo_at(path: str, folder: str = "", top: str = "") -> Photo:
    """Return the photo at a path, which is written without "./" and double slashes."""
    if "://" not in path:
        path = str(Path(path))
    return Photo(path, folder, top)


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
        logs = [*own_pictures.get(os.path.dirname(folder), []), logged_names(folder)]
        own_pictures[folder] = list(filter(None, logs))

        mirrored = os.path.relpath(folder, common or top)
        if mirrored == ".":
            mirrored = ""
        for name in sorted(filter(is_visible, files)):
            if name.lower().endswith(NOT_READ):
                unread += 1
            is_own = any(name in names for names in own_pictures[folder])
            if name.lower().endswith(SUFFIXES) and not is_own:
                yield photo_at(os.path.join(folder, name), mirrored, top)

    if unread:
        suffixes = " ".join(NOT_READ)
        warn(f"{top}: {unread} photos left out, {suffixes} cannot be read; convert them to JPEG")


def is_visible(name: str) -> bool:
    """Return whether a file or folder is not hidden."""
    return not name.startswith(".")


def warn_unlisted(error: OSError) -> None:
    """Warn of a folder that cannot be listed."""
    warn(f"{error.filename}: cannot be listed")


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
        texts = [record["image"], record["method"], *record_files(record)]
        texts += [record.get(key, "") for key in ("source", "error", "options", "output_stem")]
        texts += [explained["name"] for explained in record.get("classes", [])]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}

    if all(isinstance(text, str) for text in texts):
        return record
    return {}


def record_files(record: Mapping[str, Any]) -> list[str]:
    """Return the paths of all files of a record, relative to the folder of the log."""
    files = list(record.get("files", {}).values())
    for explained in record.get("classes", []):
        files += explained["files"].values()
    return files


def report_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print one line for an uncaught error that the user can mend, else the traceback."""
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
        faults = [photo_fault(photo.path) for photo in photos]
        if all(faults):
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
        given = "RANK={rank} and WORLD_SIZE={world_size}".format(**ranks)
        raise CallError(f"{given} in the environment: RANK must be less; unset both")
    return ranks


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
    gc.disable()  # until all is imported: it would take a tenth of that time
    # Threads that spin while they wait slow the others down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.excepthook = report_crash

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
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import copy, deepcopy
from dataclasses import field, replace
from functools import partial
from urllib.parse import quote

import cv2
import numpy as np
import torch
from filelock import FileLock, Timeout
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
    `short_side` is the length to which the block resizes its short side, 0 if it does not.

    Raises PhotoError: as `read_photo`, or the resized photo would be too large.
    """
    fault = photo_fault(path)
    if fault:
        raise PhotoError(fault)

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

    pixels = short * long
    if image.format == "TIFF":  # its tiles may be larger than the image
        pixels = max(pixels, image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0))
    if pixels > limit:
        millions = limit // 10**6
        raise PhotoError(f"{path}: {pixels} pixels, at most {millions} million can be read")

    resized = short_side**2 * long // short
    if resized > MAX_PIXELS:
        raise PhotoError(f"{path}: {size}, too long for a short side of {short_side} pixels")

    # Decoding goes over all pixels in each scan.
    if image.info.get("progressive") and count_scans(path) > MAX_SCANS:
        raise PhotoError(f"{path}: more than {MAX_SCANS} scans; save the photo anew")
    return max(pixels, resized)


def is_deep(image: Image.Image) -> bool:
    """Return whether the image is grey with 16 or 32 bits a pixel: Pillow's modes I;16, I, F."""
    return image.mode.startswith(("I", "F"))


def count_scans(path: str | Path) -> int:
    """Return how often a JPEG file has the marker that starts a scan."""
    with open(path, "rb") as file:
        return file.read(LARGEST_JPEG).count(START_OF_SCAN)


def decode(path: str | Path, short_side: int, locks: contextlib.ExitStack) -> Picture:
    """Return the pixels of a photo, turned upright: uint8 RGB (H, W, 3).

    For a large photo, DECODING is entered into `locks`.
    """
    with Image.open(path, formats=FORMATS) as image:
        if count_pixels(image, path, short_side) > LARGE_PHOTO:
            locks.enter_context(DECODING)

        # Of a colour image with 16 bits, Pillow gives the upper eight.
        has_16_bits = ";16" in str(image.tile) and not is_deep(image)
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

    # Sixteen bits have their own white, unless only twelve are used. Of other values it is a guess,
    # unless they go from 0 to 1.
    white = 65535.0
    is_guess = high < 4096 or (image.mode == "I" and image.format == "TIFF")
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
MAX_PICKLE_STEPS = 1_000_000  # of the pickle machine; 2,000 tensors take 60,000
MAX_CLASSES = 1000  # that a pickle names; a whole network names some 60
MAX_TENSORS = 20_000
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
        *("classes", "class_names", "names", "CLASSES"),
        *("class_to_idx", "idx_to_class", "id2label"),
    ),
    "input_size": ("input_size", "image_size", "img_size", "val_crop_size"),
    "resize": ("val_resize_size",),
    "mean": ("mean",),
    "std": ("std",),
    "multi_label": ("multi_label",),
}

# Tensors that training leaves in a file and that no forward pass reads: optimizers, losses with
# their centres, the state of callbacks; and, if they are no matrices, metrics.
TRAINING_ONLY = re.compile(
    r"(^|[._])(optim\w*|\w*loss\w*|criterion\w*|callbacks|\w*scheduler|scaler|n_averaged)([._]|$)",
    re.IGNORECASE,
)
METRIC = re.compile(r"(^|[._])(metrics?|acc|accuracy|best\w*|epoch|lr)([._]|$)", re.IGNORECASE)
AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)", re.IGNORECASE)

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

    kind: str  # the name of its class, without the modules of Python that it is in
    is_usual: bool  # whether the class is torch's or torchvision's
    attributes: Mapping[str, Any]  # such as `stride` and `eps`


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    name: str  # for messages: the path of the file
    tensors: State = field(default_factory=dict)  # by full name, as "state_dict.module.fc.weight"
    entries: Mapping[str, Sequence[Entry]] = field(default_factory=dict)  # by a key of ENTRY_NAMES
    modules: Mapping[str, PickledModule] = field(default_factory=dict)  # of pickled networks
    in_order: bool = True  # whether the tensors stand in the order of the network's layers

    @property
    def file(self) -> str:
        """The name of the file without its folder."""
        return os.path.basename(self.name)

    def first_entry(self, kind: str) -> Entry | None:
        """Return the first entry of a kind, or None."""
        return next(iter(self.entries.get(kind, ())), None)


class StandIn:
    """Stands for a class or function that a checkpoint names. It keeps what it gets, no more."""

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
    """Return the tensors, the entries and the modules of a checkpoint.

    Raises CallError: the file is damaged, is a TorchScript archive, or would cost too much.
    """
    existing_file(str(path))
    try:
        if path.suffix == ".safetensors":
            return replace(read_content(load_safetensors(path), str(path)), in_order=False)
        return read_content(load_pickle(path), str(path))
    except CallError:
        raise
    except ImportError as error:
        message = f"{path}: needs the safetensors package; run: pip install safetensors"
        raise CallError(message) from error
    except Exception as error:  # a damaged file raises nearly anything
        raise CallError(f"{path}: {why_not_loaded(error)}") from error


def load_safetensors(path: Path) -> State:
    """Return the tensors of a .safetensors file. Raises CallError: its header is too large."""
    from safetensors.torch import load_file

    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if header_size > 200 * MAX_TENSORS:
        raise CallError(f"{path}: not a checkpoint: its header has {header_size} bytes")
    return load_file(path)


def load_pickle(path: Path) -> Any:
    """Return what a file of torch.save holds, with stand-ins for what would be code.

    Files of torch before 1.6 are no archives; of these only those without pickled objects are read.
    Raises CallError: reading the file would cost too much.
    """
    stand_ins = []
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        if is_archive:
            check_archive(path)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = [(make_stand_in(name), name) for name in names]
        else:
            file.seek(0)
            for _ in range(4):  # a mark, a version, the system, and the content
                check_pickle(path, file)

    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def check_archive(path: Path) -> None:
    """Raise CallError where an archive is damaged, or would cost more to read than its size."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        check_records(path, files)
        # torch can be told to write archives without checksums
        has_checksums = any(file.CRC for file in files)
        if has_checksums and archive.testzip():
            raise CallError(f"{path}: damaged; copy it again")

        for file in files:
            if file.filename.lower().endswith("data.pkl"):
                check_pickle(path, io.BytesIO(archive.read(file)))


def check_records(path: Path, files: Sequence[zipfile.ZipInfo]) -> None:
    """Raise CallError where the records of an archive are not those that torch.save writes."""
    names = {file.filename.lower() for file in files}
    if any("/code/" in name for name in names):
        raise CallError(
            f"{path}: a TorchScript archive, which is code; load it in Python and save its "
            "weights: torch.save(torch.jit.load(FILE).state_dict(), 'best.pth')"
        )
    if any(file.compress_type != zipfile.ZIP_STORED for file in files):
        raise CallError(f"{path}: a compressed archive; pass the file that torch.save wrote")

    # records that are stored as they are cannot be larger than the file
    total = sum(file.file_size for file in files)
    if len(names) < len(files) or total > path.stat().st_size:
        raise CallError(f"{path}: damaged: its records add up to more than the file")
    structure = sum(file.file_size for file in files if file.filename.lower().endswith("data.pkl"))
    if structure > MAX_PICKLE_BYTES:
        size = structure // 2**20
        raise CallError(f"{path}: {size} MB beside the tensors, at most 64 can be read")


def check_pickle(path: Path, file: Any) -> None:
    """Raise CallError where a pickle has more steps than that of any real checkpoint."""
    classes = 0
    for step, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name == "GLOBAL":
            classes += 1 if len(argument) < MAX_KEY_LENGTH else MAX_CLASSES
        if step == MAX_PICKLE_STEPS or classes >= MAX_CLASSES:
            raise CallError(f"{path}: too many values beside the tensors; save the weights alone")


def make_stand_in(name: str) -> type:
    """Return an inert class in the place of a class or function; a subclass of dict is a dict."""
    if re.search(r"dict$|CfgNode$", name, re.IGNORECASE):
        return type(name, (), {"__new__": lambda cls, *args: OrderedDict()})
    return type(name, (StandIn,), {})


def why_not_loaded(error: Exception) -> str:
    """Return why torch.load refused a file, and what to do."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return (
            f"refers to {named.group(1)}, and loading it would run code; if you trust the file, "
            "save its weights: "
            "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'best.pth')"
        )

    kind = type(error).__name__
    return f"not a whole checkpoint that torch can read ({kind}); copy it again"


def read_content(content: Any, name: str) -> Checkpoint:
    """Sort the content of a file into tensors, entries and modules. Raises CallError."""
    tensors: State = {}
    modules: dict[str, PickledModule] = {}
    for prefix, holder in holders_in(content):
        if is_pickled_module(holder):
            modules[prefix.removesuffix(".")] = read_module(holder)
        for key, value in children_of(holder).items():
            if isinstance(value, Tensor):
                full_name = prefix + modern_name(str(key))
                check_tensor(value, full_name, name)
                tensors[full_name] = value.detach()

    if len(tensors) > MAX_TENSORS:
        raise CallError(f"{name}: not a checkpoint of one network: {len(tensors)} tensors")
    if not any(tensor.ndim > 1 for tensor in tensors.values()):
        raise CallError(f"{name}: no weights in it (found: {outline(content)})")
    if isinstance(content, Mapping) and not is_state(content):
        # tensors beside the dict of the weights are values, such as the weights of the classes
        tensors = {key: tensor for key, tensor in tensors.items() if key not in content}

    return Checkpoint(name, tensors, find_entries(content, name), modules)


def holders_in(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield each dict and pickled module in a file once, with the prefix of its tensors' names.

    Those inside another follow it at once, as in a state dict.
    """
    waiting = [("", content)]
    visited = set()  # a file may nest dicts in themselves
    while waiting:
        prefix, holder = waiting.pop()
        if id(holder) in visited or len(prefix) > MAX_KEY_LENGTH:
            continue
        visited.add(id(holder))
        yield prefix, holder
        for key, value in reversed(children_of(holder).items()):
            if not isinstance(value, Tensor) and "optim" not in str(key):
                waiting.append((f"{prefix}{modern_name(str(key))}.", value))


def read_module(module: StandIn) -> PickledModule:
    """Return what a pickled network tells of one of its modules."""
    name = type(module).__name__
    is_usual = name.startswith(("torch.nn.", "torchvision."))
    return PickledModule(name.rpartition(".")[2], is_usual, module.state)


def is_state(content: Mapping[Any, Any]) -> bool:
    """Return whether a dict is itself a state dict, with or without values beside the tensors."""
    return any(isinstance(value, Tensor) and value.ndim > 1 for value in content.values())


def is_pickled_module(value: Any) -> bool:
    """Return whether a stand-in holds the state of a torch.nn.Module."""
    if not isinstance(value, StandIn) or not isinstance(value.state, Mapping):
        return False
    return isinstance(value.state.get("_modules"), Mapping)


def children_of(holder: Any) -> Mapping[Any, Any]:
    """Return what a dict or a pickled module holds, in order, by the names of its state dict."""
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
    """Return a key without torch.compile's prefix, and with the names that DenseNet has today.

    Before 2018, torchvision called its layers norm.1 and conv.2 instead of norm1 and conv2.
    """
    key = key.replace("_orig_mod.", "")
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)


def check_tensor(tensor: Tensor, key: str, name: str) -> None:
    """Raise CallError where a tensor has no values of its own, or no usable name."""
    if len(key) > MAX_KEY_LENGTH or not key.isprintable():
        raise CallError(f"{name}: not a checkpoint: it has a tensor of the name {key[:40]!a}")
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
        return ascii([str(key)[:40] for key in list(content)[:8]])[1:-1].replace("'", "")
    return type(content).__name__


def find_entries(content: Any, name: str) -> dict[str, list[Entry]]:
    """Return the entries of each kind of ENTRY_NAMES, those of the outermost dict first."""
    file = os.path.basename(name)
    places = [(f"from {file}", as_options(content))]
    for _ in range(2):  # `dataset_meta` stands in `meta`
        for _, options in list(places):
            places += inner_options(options, file)

    entries: dict[str, list[Entry]] = {}
    is_bare = isinstance(content, Mapping) and is_state(content)
    for kind, keys in ENTRY_NAMES.items():
        entries[kind] = []
        for origin, options in places:
            for key in keys:
                value = plain_value(options.get(key))
                is_weight = is_bare and isinstance(value, Tensor)
                if value is not None and not is_weight:
                    entries[kind].append(Entry(key, value, origin))

    return entries


def inner_options(options: Mapping[Any, Any], file: str) -> list[tuple[str, Mapping[Any, Any]]]:
    """Return the dicts of options inside a dict, each with where it is from."""
    found = []
    for key in OPTION_DICTS:
        inner = as_options(options.get(key))
        if inner:
            found.append((f"from {key} in {file}", inner))
    return found


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
    """Return a pickled NumPy number as a number, an array as a flat tensor; else None."""
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
    """Return the numbers in a pickled NumPy value. Raises ValueError or TypeError: no numbers."""
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
    r"(^|\.)(rpn\.|classification_head\.|(aux|low)_classifier\.|decode_head\.|backbone\.body\.|"
    r"classifier\.4\.weight 4d)": ("it looks like a detector or segmentation network"),
    r"(^|\.)_(conv_stem|blocks\.0)\.": "its keys are efficientnet_pytorch's",
    r"(^|\.)(conv_stem|patch_embed\.proj|(stages|layers)\.0\.blocks\.0|pre_logits)\.": (
        "its keys are timm's"
    ),
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
    crops_always: bool = False  # also a photo of the input's size, as the short side was given
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
        """Return how the outputs are read: "2 classes (0 cat, 1 dog; from best.pth), softmax"."""
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
        """Return a photo, uint8 RGB (H, W, 3), as the network's input, float32 (C, H, W)."""
        photo = np.asarray(photo)
        image = Image.fromarray(photo)
        if self.channels == 1:
            image = image.convert("L")
        preset = copy(self.preset)
        if self.sees_all(*photo.shape[:2]):
            preset.resize_size = preset.crop_size
        return preset(image)

    def sees_all(self, height: int, width: int) -> bool:
        """Return whether a photo of that size is used as a whole.

        So is a photo of exactly the input's size, unless the short side before the crop was given.
        """
        is_input = (height, width) == self.input_size
        return self.squash or (is_input and not self.crops_always)

    def seen(self, photo: Picture) -> Picture:
        """Return the part of a photo that the network sees, unscaled: uint8 RGB (h, w, 3)."""
        height, width = photo.shape[:2]
        left, top, right, bottom = self.seen_box(height, width)
        x = min(round(left), width - 1)
        y = min(round(top), height - 1)
        return photo[y : y + max(1, round(bottom - top)), x : x + max(1, round(right - left))]

    def seen_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom, in pixels, of what the network sees of a photo."""
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
    **options: Any,
) -> Classifier:
    """Build a classifier and load the weights of a checkpoint. Raises CallError: it does not fit.

    Args:
        arch: a name from `torchvision.models.list_models`, or "file.py:function" for a network of
            your own. None: the checkpoint's entry, else recognised from the weights; without a
            checkpoint, resnet50.
        ckpt: the weights; None: torchvision's ImageNet weights, from its cache or the network.
        num_classes: must agree with the checkpoint; a single output becomes two, of which the
            second has its sigmoid.
        device: None: the CUDA GPU if there is one, else the CPU.
        options: what the checkpoint does not say, or says otherwise: the fields of `Options`.
    """
    told = Options(**options)
    target, no_gpu = find_device(device)
    checkpoint = open_checkpoint(arch, ckpt)
    arch, arch_origin = find_architecture(arch, checkpoint)
    network = build_network(arch, checkpoint, num_classes)

    preset, origins = make_preset(arch, network, checkpoint, told)
    outputs = count_outputs(network, preset.crop_size, num_classes)
    check_num_classes(num_classes, outputs, checkpoint)
    names, names_origin = find_class_names(told, checkpoint, max(outputs, 2))

    network.model.register_forward_hook(partial(give_logits, outputs=outputs))
    return Classifier(
        model=network.model.to(target),
        arch=arch,
        class_names=names,
        preset=preset,
        device=target,
        squash=told.resize == "squash",
        crops_always=find_short_side(checkpoint, told) is not None,
        multi_label=outputs > 1 and reads_labels(told.multi_label, network, checkpoint),
        outputs=outputs,
        channels=network.channels,
        head=network.head,
        origins={**origins, "arch": arch_origin, "classes": names_origin, "device": no_gpu},
    )


@dataclass(frozen=True)
class Options:
    """What the caller of `load_classifier` says of the network's input and classes.

    Raises CallError: a value is not usable.
    """

    # one for each class, or a text with commas between them; None: those of the checkpoint, else
    # the names of `folders`, else ImageNet's where there are 1000 classes
    class_names: Sequence[str] | str | None = None
    # side of the square input in pixels, or (height, width); None: the checkpoint's, else the
    # preset's of torchvision
    input_size: int | Sequence[int] | None = None
    # "crop", "squash", or the short side in pixels to which a photo is scaled before the crop
    resize: str | int = "crop"
    # one number for each colour, or one for all, of colours from 0 to 1 or to 255; None: the
    # checkpoint's, else the preset's
    mean: Sequence[float] | float | None = None
    std: Sequence[float] | float | None = None
    # whether each output is a sigmoid of its own; None: the checkpoint's entry
    multi_label: bool | None = None
    # the folders of the photos, which name the classes in sorted order, as ImageFolder does, where
    # there are as many as classes and nothing else names them
    folders: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.resize in ("crop", "squash"):
            return
        is_number = isinstance(self.resize, int) and not isinstance(self.resize, bool)
        in_range = is_number and 8 <= self.resize <= 8192
        if not in_range:
            raise CallError(
                f"unknown resize '{self.resize}' (known: crop, squash, or the short side in pixels)"
            )


def build_network(arch: str, checkpoint: Checkpoint, num_classes: int | None) -> Network:
    """Return the network with the checkpoint's weights. Raises CallError."""
    if is_own(arch):
        return build_own(arch, checkpoint, num_classes)
    return build_torchvision(arch, checkpoint)


def check_num_classes(given: int | None, outputs: int, checkpoint: Checkpoint) -> None:
    """Raise CallError where another number of classes was given than the network has."""
    if given not in (None, outputs, max(outputs, 2)):
        raise CallError(
            f"--num-classes {given}, but {checkpoint.name}: {outputs} classes; leave the option out"
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
    """Return whether memory was missing, the GPU's or the CPU's."""
    words = (
        "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|OUT_OF_DEVICE_MEMORY|"
        "create a primitive"  # oneDNN's words
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
    own = arch is not None and is_own(arch)
    if arch is not None and not own and arch.lower() not in ARCHITECTURES:
        hint = closest(arch.lower(), ARCHITECTURES)
        raise CallError(f"unknown architecture '{arch}'{hint} (your own network: net.py:build)")
    if ckpt is not None:
        return load_checkpoint(Path(ckpt))
    if own:
        return Checkpoint("the network")
    return download_weights(arch.lower() if arch else "resnet50")


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
        if any(f".{name}".endswith(f".{key}") for name in checkpoint.tensors):
            possible += [arch for arch in ARCHITECTURES if arch.startswith(beginning)]
    return possible


def has_more_layers(place: Place, model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Return whether parts of the network have more layers in the file: a deeper variant."""
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
        for key, tensor in checkpoint.tensors.items():
            if re.search(pattern, f"{key} {tensor.ndim}d"):
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
    name, stem = convolutions_in(model)[0]
    for key, tensor in checkpoint.tensors.items():
        if not f".{key}".endswith(f".{name}.weight") or tensor.ndim != 4:
            continue
        if len(tensor) == stem.out_channels and tensor.shape[2:] == stem.kernel_size:
            size = (stem.out_channels, stem.kernel_size, stem.stride, stem.padding)
            has_bias = stem.bias is not None
            model.set_submodule(name, nn.Conv2d(tensor.shape[1], *size, bias=has_bias))
            return


def convolutions_in(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """Return the two-dimensional convolutions of a network, with their names."""
    return [(n, module) for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]


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
    """Return where the network is in the file, and all tensors that a network might need.

    Raises CallError: there are several networks.
    """
    tensors = checkpoint.tensors
    places = find_places(wanted, tensors) or [Place("", 0)]
    whole = [place for place in places if place.matches == len(wanted)]
    if not whole:
        whole = places[:1]  # check_shapes tells what is missing
    distinct = distinct_places(whole, next(iter(wanted)), tensors)
    if len(distinct) > 1:
        names = " and ".join(f"'{place.prefix}'" for place in distinct)
        raise CallError(
            f"{checkpoint.name}: holds several networks, under {names}; save the one to explain"
        )

    copies = [place.prefix for place in whole if place is not distinct[0]]
    return distinct[0], without_training(tensors, copies)


def without_training(tensors: State, copies: Sequence[str]) -> State:
    """Return the tensors that a forward pass may read, without copies under those prefixes."""
    prefixes = tuple(filter(None, copies))
    rest = {}
    for key, tensor in tensors.items():
        if is_of_network(key, tensor) and not key.startswith(prefixes):
            rest[key] = tensor
    return rest


def distinct_places(places: Sequence[Place], first_key: str, tensors: State) -> list[Place]:
    """Return each network once, which may stand under two names; averages only if alone."""
    networks = [place for place in places if not AVERAGE.search(place.prefix)]
    by_memory: dict[Any, Place] = {}
    for place in networks or places:
        tensor = tensors.get(place.prefix + first_key)
        memory = None if tensor is None else tensor.data_ptr()
        by_memory.setdefault(memory, place)

    return list(by_memory.values())


def is_of_network(key: str, tensor: Tensor) -> bool:
    """Return whether a forward pass may read a tensor, which is not for training only."""
    if TRAINING_ONLY.search(key) or AVERAGE.search(key) or not tensor.is_floating_point():
        return False
    return tensor.ndim > 1 or not METRIC.search(key)


# A torchvision network


def build_torchvision(arch: str, checkpoint: Checkpoint) -> Network:
    """Return a torchvision network with the checkpoint's weights and head.

    Raises CallError: a tensor is missing or does not fit, or a tensor of the file would be unused.
    """
    model = skeleton(arch, checkpoint)
    wanted, _ = backbone(model)
    place, others = choose_place(wanted, checkpoint)
    if arch in WITH_AUXILIARY:
        others = {key: tensor for key, tensor in others.items() if not AUXILIARY.search(key)}

    state, in_head, beside = sort_tensors(model, place.prefix, others, checkpoint)
    colours, beside = split_colours(beside)
    check_shapes(arch, wanted, state, checkpoint)
    head = fit_head(arch, model, place.prefix, in_head, beside, checkpoint)
    check_modules(model, place.prefix, head.name, checkpoint)
    check_wrapper(place.prefix, checkpoint)
    load_state(arch, model, state | head.state, checkpoint)

    channels = convolutions_in(model)[0][1].in_channels
    if channels not in (1, 3):
        raise CallError(
            f"{checkpoint.name}: the network takes {channels} input channels; "
            "only colour photos (3) and grey ones (1) can be explained"
        )

    return Network(
        model=model.eval(),
        channels=channels,
        outputs=find_head(model)[1].weight.shape[0],
        head=", ".join(filter(None, [head.text, describe_wrapper(place.prefix, checkpoint)])),
        ends_in_sigmoid=head.ends_in_sigmoid,
        head_inputs=head.inputs,
        colours=colours,
    )


def sort_tensors(
    model: nn.Module, prefix: str, others: State, checkpoint: Checkpoint
) -> tuple[State, State, State]:
    """Return the backbone's tensors, those under the head's name, and all others of the network.

    The backbone's have their names in the network, the others those in the file.
    """
    root = backbone(model)[1]
    known = set(model.state_dict())
    state: State = {}
    in_head: State = {}
    beside: State = {}
    for key, tensor in checkpoint.tensors.items():
        inner = key.removeprefix(prefix) if key.startswith(prefix) else ""
        if inner.startswith(root):
            in_head[key] = tensor
        elif inner in known:
            state[inner] = tensor
        elif key in others:
            beside[key] = tensor

    return state, in_head, without_copies(beside, state | in_head)


def describe_wrapper(prefix: str, checkpoint: Checkpoint) -> str:
    """Return, for the first line, that the forward pass of an own class is assumed, or ""."""
    outer = prefix.removesuffix(".").rpartition(".")[0]
    wrapper = checkpoint.modules.get(outer) if prefix else None
    if wrapper is None or wrapper.is_usual:
        return ""
    return f"the backbone, then the head (assumed: the forward pass of {wrapper.kind} is not read)"


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
    *("shift_size", "window_size", "num_heads", "_forward_hooks", "_forward_pre_hooks"),
)


def check_modules(model: nn.Module, prefix: str, head: str, checkpoint: Checkpoint) -> None:
    """Raise CallError where a pickled network has other modules than `model`, but for its head."""
    ours = dict(model.named_modules())
    if prefix.removesuffix(".") in checkpoint.modules:
        check_missing(ours, prefix, head, checkpoint)

    for path, pickled in checkpoint.modules.items():
        name = f"{path}.".removeprefix(prefix).removesuffix(".")
        is_outside = not f"{path}.".startswith(prefix) or AUXILIARY.search(f"{path}.")
        if is_outside or f"{name}.".startswith(f"{head}."):
            continue
        difference = difference_between(ours.get(name), pickled)
        if difference:
            path = path or "the network"
            raise CallError(f"{checkpoint.name}: {path} {difference}; {OWN_NETWORK}")


def check_missing(
    ours: Mapping[str, nn.Module], prefix: str, head: str, checkpoint: Checkpoint
) -> None:
    """Raise CallError where a pickled network lacks a layer that torchvision's has."""
    for name, module in ours.items():
        kind = type(module).__name__
        is_layer = not any(True for _ in module.children()) and kind not in NO_EFFECT
        is_there = prefix + name in checkpoint.modules or f"{name}.".startswith(f"{head}.")
        if is_layer and not is_there:
            raise CallError(
                f"{checkpoint.name}: {prefix}{name}, a {kind} in torchvision's network, is not in "
                f"the file; {OWN_NETWORK}"
            )


def check_wrapper(prefix: str, checkpoint: Checkpoint) -> None:
    """Raise CallError where a layer beside a pickled backbone would not be run."""
    parts = prefix.split(".")[:-1]
    above = [".".join(parts[:length]) for length in range(len(parts))]
    wrappers = [path for path in above if path in checkpoint.modules]
    if not wrappers:
        return

    # an own class may use an activation in its head; a Sequential runs it where it stands
    harmless = NO_EFFECT
    if checkpoint.modules[wrappers[-1]].kind != "Sequential":
        harmless = NO_EFFECT + ACTIVATIONS + READ_AS_SCORES
    for path, module in checkpoint.modules.items():
        is_backbone = path in wrappers or f"{path}.".startswith(prefix)
        is_beside = f"{path}.".startswith(f"{wrappers[0]}.".lstrip(".")) and not is_backbone
        is_read = has_content(module) or module.kind in harmless or TRAINING_ONLY.search(path)
        if is_beside and not is_read:
            raise CallError(
                f"{checkpoint.name}: {path} is a {module.kind} beside the backbone, which would "
                f"not be run; {OWN_NETWORK}"
            )


def has_content(module: PickledModule) -> bool:
    """Return whether a pickled module has tensors or modules of its own, which are looked at."""
    parts = ("_parameters", "_buffers", "_modules")
    return any(module.attributes.get(part) for part in parts)


def difference_between(module: nn.Module | None, pickled: PickledModule) -> str:
    """Return what differs between a torchvision network's module and a pickled one, or ""."""
    theirs = pickled.kind.replace("SyncBatchNorm", "BatchNorm2d")
    if module is None:
        return "" if theirs in NO_EFFECT else f"is a {theirs}, where torchvision's has nothing"
    kind = type(module).__name__
    is_layer = not any(True for _ in module.children())  # the names of blocks have changed
    both_without_effect = {kind, theirs} <= set(NO_EFFECT)
    if not pickled.is_usual or (is_layer and kind != theirs and not both_without_effect):
        return f"is a {theirs}, where torchvision's has a {kind}"

    for setting in SETTINGS:
        known = getattr(module, setting, None)
        found = pickled.attributes.get(setting, known)
        if as_pair(known) != as_pair(found):
            return f"has {setting} {found}, where torchvision's has {known}"

    return ""


def as_pair(value: Any) -> Any:
    """Return a whole number as (n, n), which means the same to a layer, and a list as a tuple."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return value


# The head


ACTIVATIONS = ("ReLU", "ReLU6", "LeakyReLU", "ELU", "GELU", "SiLU", "Mish", "Hardswish", "Tanh")
NO_EFFECT = (
    *("Dropout", "AlphaDropout", "StochasticDepth"),
    *("Identity", "Flatten", "Sequential", "ModuleList"),
)
READ_AS_SCORES = ("Softmax", "LogSoftmax", "Sigmoid")  # at the end of a head


@dataclass(frozen=True)
class Head:
    """A head that was built from the tensors of a file."""

    state: State  # its tensors, by their names in the network
    name: str = ""  # of the module that it replaces
    text: str = ""  # as "head 512 -> 64 -> 3 (ReLU assumed)"; "" for one Linear layer
    inputs: int | None = None  # of its first layer
    ends_in_sigmoid: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer of a head."""

    name: str  # in the file
    module: nn.Module  # with meta parameters
    tensors: State  # of the module, by their names in it
    sequence: str = ""  # the pickled Sequential that it is in

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
    layers = read_layers(beside, checkpoint, "")
    left_out = ""
    if in_head:
        # ImageNet's layer was left where it is, and the forward pass goes around it
        outputs = [len(tensor) for tensor in in_head.values() if tensor.ndim > 1][-1]
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
        layers = read_layers(in_head, checkpoint, prefix + root)
        return replace_head(arch, model, root, layers, first_inputs(model), checkpoint)

    # only the last layer was replaced, perhaps by several
    kept = {key: theirs[key] for key in ours}
    changed = {key: in_head[key] for key in in_head if key.removeprefix(prefix) not in ours}
    layers = read_layers(changed, checkpoint, prefix + name)
    head = replace_head(arch, model, name, layers, last.in_features, checkpoint)
    return replace(head, state=head.state | kept, inputs=first_inputs(model))


def fit_convolution(model: nn.Module, theirs: State) -> Head:
    """Give SqueezeNet the number of outputs that its last convolution has in the file."""
    name, last = find_head(model)
    keys = [key for key, tensor in theirs.items() if tensor.ndim == 4]
    if len(keys) != 1 or not keys[0].endswith("weight"):
        return Head(theirs)  # load_state tells what does not fit
    old = keys[0].removesuffix("weight")
    outputs = len(theirs[keys[0]])
    with MetaParameters():
        layer = nn.Conv2d(last.in_channels, outputs, 1, bias=f"{old}bias" in theirs)
    model.set_submodule(name, layer)
    state = {f"{name}.{key.removeprefix(old)}": tensor for key, tensor in theirs.items()}
    return Head(state, old.removesuffix("."))


def first_inputs(model: nn.Module) -> int:
    """Return how many values the backbone of a torchvision network gives its head."""
    root = find_head(model)[0].partition(".")[0]
    for module in model.get_submodule(root).modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels

    raise ValueError("a head without a layer")


def read_layers(tensors: State, checkpoint: Checkpoint, within: str) -> list[Layer]:
    """Return the layers of a head, in the order of the network.

    `within` is the name in the file of the module that they replace, or "" beside the backbone.
    Raises CallError: an unknown layer, or no known order.
    """
    by_layer: dict[str, State] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        by_layer.setdefault(name, {})[part] = tensor

    layers = []
    for name in in_order(by_layer, checkpoint, within):
        state = by_layer.get(name, {})
        with MetaParameters():
            module = read_layer(state, checkpoint.modules.get(name))
        if module is None:
            key = f"{name}.{next(iter(state), '')}".strip(".")
            raise CallError(
                f"{checkpoint.name}: {key} is no part of a torchvision network, and no Linear, "
                f"BatchNorm1d or LayerNorm of its head; {advice(checkpoint)}"
            )
        for part, tensor in state.items():
            check_numbers(f"{name}.{part}", tensor, checkpoint)
        layers.append(Layer(name, module, state, outermost_sequence(name, checkpoint, within)))

    return layers


def in_order(by_layer: Mapping[str, State], checkpoint: Checkpoint, within: str) -> list[str]:
    """Return the names of the layers of a head; of a pickled one, with those without tensors."""
    sequences = {outermost_sequence(name, checkpoint, within) for name in by_layer} - {""}
    if not sequences:
        return in_numbered_order(list(by_layer), checkpoint)

    names = []
    for name, module in checkpoint.modules.items():
        is_inside = any(name.startswith(f"{sequence}.") for sequence in sequences)
        if name in by_layer or (is_inside and module.kind not in NO_EFFECT):
            names.append(name)

    return names


def in_numbered_order(names: list[str], checkpoint: Checkpoint) -> list[str]:
    """Return the names of layers in their order: the file's, or that of their numbers.

    Raises CallError: the file is not in order, and they have no numbers.
    """
    if checkpoint.in_order or len(names) == 1:
        return names
    if not all(name.rpartition(".")[2].isdigit() for name in names):
        raise CallError(
            f"{checkpoint.name}: the order of the layers {' and '.join(names[:3])} is not in the "
            f"file; {OWN_NETWORK}"
        )

    return sorted(names, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])


def outermost_sequence(name: str, checkpoint: Checkpoint, within: str) -> str:
    """Return the outermost pickled Sequential around a layer, at or below `within`, or ""."""
    sequence = ""
    parent = name.rpartition(".")[0]
    while f"{parent}.".startswith(f"{within}." if within else ""):
        module = checkpoint.modules.get(parent)
        if module is None or module.kind != "Sequential":
            break
        sequence = parent
        parent = parent.rpartition(".")[0]

    return sequence


def read_layer(state: State, pickled: PickledModule | None) -> nn.Module | None:
    """Return the layer of these tensors, without weights; None where its kind is not known."""
    kind = pickled.kind if pickled else ""
    settings = pickled.attributes if pickled else {}
    if not state:
        return read_function(kind, settings)

    weight = state.get("weight")
    is_known = kind in ("", "Linear", "BatchNorm1d", "LayerNorm")
    if weight is None or weight.numel() == 0 or not is_known:
        return None
    parts = set(state)
    if weight.ndim == 2 and parts <= {"weight", "bias"}:
        return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in parts)
    if weight.ndim != 1:
        return None

    eps = settings.get("eps", 1e-5)
    if parts >= {"running_mean", "running_var"}:
        return nn.BatchNorm1d(len(weight), eps)
    return nn.LayerNorm(len(weight), eps) if parts == {"weight", "bias"} else None


def read_function(kind: str, settings: Mapping[str, Any]) -> nn.Module | None:
    """Return a pickled activation, or the function that ends a head; None where it is neither."""
    if kind in READ_AS_SCORES:
        return getattr(nn, kind)()
    if kind not in ACTIVATIONS:
        return None
    names = ("negative_slope", "alpha", "approximate")
    options = {name: settings[name] for name in names if name in settings}
    return getattr(nn, kind)(**options)


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
    for layer in layers[:-1]:
        if type(layer.module).__name__ in READ_AS_SCORES:
            raise CallError(f"{checkpoint.name}: {layer.name} is not at the end; {OWN_NETWORK}")

    ends_in_sigmoid = isinstance(layers[-1].module, nn.Sigmoid)
    layers = [layer for layer in layers if type(layer.module).__name__ not in READ_AS_SCORES]
    layers, assumed = with_activations(layers)

    sequence = nn.Sequential(nn.Flatten(1), *(layer.module for layer in layers))
    model.set_submodule(name, sequence)
    state = {}
    for index, layer in enumerate(layers, start=1):
        for part, tensor in layer.tensors.items():
            state[f"{name}.{index}.{part}"] = tensor

    text = ""
    if len(layers) > 1 or remark:
        text = describe_head(layers, assumed)
    return Head(state, name, text + remark, features, ends_in_sigmoid)


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


def with_activations(layers: Sequence[Layer]) -> tuple[list[Layer], bool]:
    """Return the layers with a ReLU between Linear layers, and whether one had to be added.

    Layers of one pickled Sequential are complete as they are.
    """
    complete: list[Layer] = []
    assumed = False
    is_linear = False  # whether nothing has bent the values since the last Linear layer
    for layer in layers:
        kind = type(layer.module).__name__
        if kind == "Linear" and is_linear and not layer.sequence:
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

    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    unexpected = [key for key in unexpected if not key.endswith(COMPUTED)]

    counts = [
        count_keys(missing, "missing"),
        count_keys(unexpected, "unexpected"),
        count_keys(differ, "of another shape"),
    ]
    if any(counts):
        faults = ", ".join(filter(None, counts))
        hint = other_architecture(arch, checkpoint)
        raise CallError(f"{checkpoint.name} does not fit {arch}: {faults}; {hint}")


def count_keys(keys: Sequence[str], kind: str) -> str:
    """Return the number of keys and the first three, for a message, or ""."""
    if not keys:
        return ""
    shown = "; ".join(keys[:3])
    if len(keys) > 3:
        shown += "; ..."
    return f"{len(keys)} {kind} ({shown})"


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
    convolutions = convolutions_in(model)
    channels = convolutions[0][1].in_channels if convolutions else 3
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
        # under a name of our own: a file that is called torch.py must not stand in for torch
        spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)

        build = getattr(module, function, None)
        if not callable(build):
            hint = closest(function, vars(module))
            raise AttributeError(f"{file} has no function '{function}'{hint}")
        takes_number = re.search(r"\bnum_classes\b|\*\*", str(inspect.signature(build)))
        if takes_number and classes:
            return unwrapped(build(num_classes=classes))
        return unwrapped(build())
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


def unwrapped(model: Any) -> nn.Module:
    """Return a network without DataParallel and torch.compile around it. Raises TypeError."""
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
    answers = answers_in(answer)
    rows = rows_in(answers, outputs)
    if len(rows) != 1:
        kinds = " and ".join(describe_answer(item) for item in answers[:4])
        hint = "alone, or pass --num-classes" if rows else "as (N, classes)"
        raise CallError(f"the network returns {kinds}; let it return the logits {hint}")

    logits = rows[0]
    if logits.ndim == 0 or count not in (None, len(logits)):
        inputs = "one input" if count in (None, 1) else f"{count} inputs"
        raise CallError(
            f"the network returns {describe_answer(logits)} for {inputs}, without the batch "
            "dimension; write x.flatten(1) instead of x.squeeze() in its forward"
        )

    return logits[:, None] if logits.ndim == 1 else logits.flatten(1)


def answers_in(answer: Any) -> Sequence[Any]:
    """Return what a network returned as a sequence; of transformers' answers, the logits."""
    if isinstance(answer, Mapping):
        answer = answer.get("logits", answer.get("out", answer))
    answer = getattr(answer, "logits", answer)
    return answer if isinstance(answer, (tuple, list)) else [answer]


def rows_in(answers: Sequence[Any], outputs: int | None) -> list[Tensor]:
    """Return the tensors that may be logits; of several those with `outputs` columns, if any."""
    rows = []
    fitting = []
    for item in answers:
        if isinstance(item, Tensor) and is_row(item):
            rows.append(item)
            if item.shape[-1:] == (outputs,):
                fitting.append(item)
    if len(rows) > 1 and fitting:
        return fitting
    return rows


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
    # no count of inputs: Ablation-CAM replaces a layer's output by a larger batch
    logits = as_logits(answer, outputs)
    if outputs == 1:
        return torch.cat([-logits, logits], 1) / 2
    return logits


def count_outputs(network: Network, size: Sequence[int], num_classes: int | None) -> int:
    """Return how many outputs a network has; one of the user's runs on two inputs and on one.

    Raises CallError: it fails, loses the batch dimension, or returns probabilities.
    """
    if network.outputs is not None:
        return network.outputs
    height, width = size
    logits = run_once(network, (2, network.channels, height, width), num_classes)
    end = final_function(logits)
    if end:
        raise CallError(f"the network ends in a {end}; let it return the logits, without that")
    alone = run_once(network, (1, network.channels, height, width), num_classes)
    if not torch.allclose(logits, alone.expand_as(logits), 1e-3, 1e-3, equal_nan=True):
        raise CallError(
            "the network gives different answers for the same input; does it use dropout, or batch "
            "statistics, in eval mode?"
        )

    return logits.shape[1]


def run_once(network: Network, shape: Sequence[int], num_classes: int | None) -> Tensor:
    """Return the logits for inputs of zeros. Raises CallError: the network fails."""
    try:
        with torch.enable_grad():
            answer = network.model(torch.zeros(*shape, requires_grad=True))
    except (Exception, SystemExit) as error:
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
    r"Transpose|T|Permute|Expand|Cat|Stack|Index|Unbind|Split\w*|Mean|Where)Backward\w*"
)


def final_function(logits: Tensor) -> str:
    """Return "sigmoid" or "softmax" where a network ends in one, or ""."""
    sums = logits.sum(1)
    if logits.shape[1] > 1 and (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums)):
        return "softmax"
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        last = re.match("(Softmax|Sigmoid|Hardsigmoid)Backward", node.name())
        if last:
            return last.group(1).lower()
        if ARRANGING.fullmatch(node.name()):
            waiting += [parent for parent, _ in node.next_functions]

    return ""


# The preprocessing


def as_numbers(values: Any) -> Any:
    """Return a single number as a list; anything else as it is."""
    if isinstance(values, (int, float)):
        return [values]
    return values


def make_preset(
    arch: str, network: Network, checkpoint: Checkpoint, options: Options
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

    settings, _ = own_settings(network.model)
    if settings.get("interpolation") == "bicubic":
        preset.interpolation = torchvision.transforms.InterpolationMode.BICUBIC
    if settings.get("crop_pct"):
        preset.resize_size = [math.floor(max(preset.crop_size) / settings["crop_pct"])]

    short_side = find_short_side(checkpoint, options)
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
    return preset, {"input": size_origin, "mean": colours_origin}


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
    value = entry.value if entry else None
    if isinstance(value, int) and value == network.head_inputs:
        remark = (
            f"the {entry.name} {value} {entry.origin} is the head's number of inputs, not "
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

    settings, origin = own_settings(network.model)
    size = as_size(settings.get("input_size"))
    if size is not None:
        return size, origin
    if fixed is not None:
        return (fixed, fixed), ""
    if is_downloaded(checkpoint):
        remark = ""
    return None, remark


def as_size(value: Any) -> tuple[int, int] | None:
    """Return (height, width) from 225, (225, 225), (3, 225, 225) or a tensor; None: not usable."""
    if isinstance(value, Tensor):
        if value.is_meta or value.numel() > 3:
            return None
        value = value.flatten().tolist()

    sides = list(value)[-2:] if isinstance(value, (list, tuple)) else [value]
    for side in sides:
        if not isinstance(side, int) or isinstance(side, bool) or not 8 <= side <= 4096:
            return None

    return (sides[0], sides[-1]) if sides else None


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
    """Return the preprocessing that a network of the user's has as attributes, and their origin."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        return config, "from the network's pretrained_cfg"
    names = ("input_size", "mean", "std")
    settings = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return settings, "from the network's attributes"


def find_short_side(checkpoint: Checkpoint, options: Options) -> int | None:
    """Return the short side before the crop where an option or an entry says it, or None."""
    if isinstance(options.resize, int):
        return options.resize
    entry = checkpoint.first_entry("resize")
    size = as_size(entry.value) if entry else None
    if size is None or options.resize == "squash" or options.input_size is not None:
        return None
    return size[0]


def find_colours(
    preset: Any, network: Network, checkpoint: Checkpoint, options: Options
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
        value, value_origin = find_colour(
            name, as_numbers(getattr(options, name)), network, checkpoint
        )
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
    """Return the mean or std that is given, or in the file, or the network's, and its origin."""
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
    options: Options, checkpoint: Checkpoint, count: int
) -> tuple[tuple[str, ...], str]:
    """Return a name for each class, at most 200 characters long, and where the names are from.

    Raises CallError: another number of names was given.
    """
    given = options.class_names
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
    if len(options.folders) == count:
        return shortened(sorted(options.folders)), "the photos' folders in ImageFolder's order"
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


def find_difference(wanted: str, class_names: Sequence[str]) -> tuple[int, int]:
    """Return the two classes of a difference, such as cat-dog, or a class as `find_class` twice.

    A class that is really called cat-dog wins. Raises CallError: there is no such class.
    """
    if class_index(wanted, class_names) is None:
        for hyphen in re.finditer("-", wanted):
            index = class_index(wanted[: hyphen.start()], class_names)
            minus = class_index(wanted[hyphen.end() :], class_names)
            if index is not None and minus not in (None, index):
                return index, minus

    index = find_class(wanted, class_names)
    return index, index


# --------------------------------------------------------------------------------------------------
# 5  Explanation. One forward pass gives logits and activations, two backward passes the rest.
# --------------------------------------------------------------------------------------------------

# The autograd nodes of activation functions, whose incoming gradients guided backpropagation
# clamps. Gates (Sigmoid, Hardsigmoid, Tanh) scale a signal rather than rectify it and are left
# alone.
ACTIVATION_NODES = re.compile(
    r"\w*(relu|elu|silu|swish|mish|hardtanh|threshold|softplus)\w*Backward\d*", re.IGNORECASE
)
Targets = Sequence[int] | Tensor | int | None
Layers = str | nn.Module | Sequence[str | nn.Module] | None


@dataclass(frozen=True)
class Explanation:
    """The explanation of N inputs of H x W.

    A map is highest where the evidence for the class is strongest in this photo, and 0 everywhere
    where the layer holds no positive evidence. Where K classes were asked for each input, all but
    `logits` have K as their second axis.
    """

    cams: dict[str, Floats]  # for each method the maps, float32 (N, H, W) in [0, 1]
    # guided backpropagation, float32 (N, 3, H, W), in logit per normalised input value; None if it
    # was not asked for
    guided: Floats | None
    logits: Floats  # float32 (N, classes)
    targets: NDArray[np.int64]  # the class that was explained, (N,)
    minus: NDArray[np.int64]  # that whose logit was subtracted; the target itself where none was

    def __repr__(self) -> str:
        shapes = {method: maps.shape for method, maps in self.cams.items()}
        return f"Explanation(cams={shapes}, targets={self.targets.tolist()})"

    def only(self, index: int) -> Explanation:
        """Return the explanation of one input, as a batch of one, with each question once."""
        rows: Any = slice(index, index + 1)
        if self.targets.ndim == 2:
            questions = np.stack([self.targets[index], self.minus[index]])
            first_places = np.unique(questions, axis=1, return_index=True)[1]
            rows = np.ix_([index], np.sort(first_places))

        cams = {method: maps[rows] for method, maps in self.cams.items()}
        guided = None if self.guided is None else self.guided[rows]
        logits = self.logits[index : index + 1]
        return Explanation(cams, guided, logits, self.targets[rows], self.minus[rows])


def gradcam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (Chattopadhyay et al., WACV 2018, arXiv:1710.11063, equation 19).

    As in the grad-cam package, whose 1e-6 in the denominator is as large as the squared gradients
    of real networks. Only the sum of a channel's activations is clamped at 0: with a negative sum
    the denominator has zeros, and the map is unstable.
    """
    total = activations.sum((-2, -1), keepdim=True).clamp(min=0)
    squared = gradients**2
    alphas = squared / (2 * squared + total * squared * gradients + 1e-6)
    alphas = torch.where(gradients != 0, alphas, 0)
    weights = (gradients.clamp(min=0) * alphas).sum((-2, -1), keepdim=True)
    return activations * weights


def xgradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM (Fu et al., BMVC 2020, arXiv:2008.02312): gradients weighted by the activations."""
    shares = activations / (activations.sum((-2, -1), keepdim=True) + 1e-7)
    return activations * (gradients * shares).sum((-2, -1), keepdim=True)


def randomcam(activations: Tensor, gradients: Tensor | None) -> Tensor:
    """Random weights, the same in each run, as a sanity check."""
    weights = np.random.RandomState(0).uniform(-1, 1, activations.shape[-3])
    return activations * torch.from_numpy(weights).to(activations)[:, None, None]


def channel_sum(contributions: Tensor) -> Tensor:
    return contributions.sum(-3)


def principal_component(contributions: Tensor, of_class: bool = True) -> Tensor:
    """Eigen-CAM (Muhammad and Yeasin, IJCNN 2020, arXiv:2008.00299): the first principal component.

    The channels are centred, as in the grad-cam package. The sign of a component is arbitrary, so
    it is chosen: the map rises with the sum of the contributions where the two correlate (0.3 or
    more). Otherwise, and where it does not depend on the class, it rises with the sum of their
    absolute values.
    """
    columns = contributions.detach().flatten(-2).transpose(-2, -1)  # (..., h * w, C)
    if columns.device.type == "mps":
        columns = columns.cpu()  # it has no float64
    columns = columns.double()
    centred = columns - columns.mean(-2, keepdim=True)

    # The eigenvectors of the smaller Gram matrix give the projection, (..., h * w).
    positions, channels = centred.shape[-2:]
    if positions <= channels:
        variances, vectors = torch.linalg.eigh(centred @ centred.mT)
        maps = vectors[..., -1] * variances[..., -1:].clamp(min=0).sqrt()
    else:
        vectors = torch.linalg.eigh(centred.mT @ centred).eigenvectors
        maps = (centred @ vectors[..., -1:])[..., 0]

    direction = (columns.abs().sum(-1) * maps).sum(-1)
    if of_class:
        total = centred.sum(-1)
        covariance = (total * maps).sum(-1)
        correlates = covariance.abs() > 0.3 * total.norm(dim=-1) * maps.norm(dim=-1)
        direction = torch.where(correlates, covariance, direction)
    maps = torch.where(direction[..., None] < 0, -maps, maps)
    return maps.to(contributions).unflatten(-1, contributions.shape[-2:])


@dataclass(frozen=True)
class CamMethod:
    """How a method makes its map from what the channels of a layer contribute to it.

    `contributions` takes the activations of the layer and the gradients of the class score with
    respect to them, both (..., C, h, w), and returns what each channel adds to the map.
    """

    contributions: Callable[[Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor] = channel_sum  # contributions -> map (..., h, w)
    gradients: bool = True  # whether they are read; if not, all classes have the same map
    relu: bool = True  # whether negative values of the map become 0
    product: bool = False  # whether the maps of several layers are multiplied instead of averaged


MANY_PASSES = ("scorecam", "ablationcam")
# They find a weight for each channel, (..., C, 1, 1), which takes the gradients' place.
BY_WEIGHTS = CamMethod(lambda a, weights: a * weights, gradients=False)
CAM_METHODS = {
    # Selvaraju et al., ICCV 2017, arXiv:1610.02391
    "gradcam": CamMethod(lambda a, g: a * g.mean((-2, -1), keepdim=True)),
    "gradcam++": CamMethod(gradcam_plus_plus),
    "xgradcam": CamMethod(xgradcam),
    "eigencam": CamMethod(lambda a, g: a, partial(principal_component, of_class=False), False),
    "eigengradcam": CamMethod(lambda a, g: a * g, principal_component),
    # Draelos and Carin, 2020, arXiv:2011.08891
    "hirescam": CamMethod(lambda a, g: a * g),
    # Jiang et al., IEEE TIP 2021, doi:10.1109/TIP.2021.3089943
    "layercam": CamMethod(lambda a, g: a * g.clamp(min=0)),
    # a variant of the grad-cam package
    "gradcamelementwise": CamMethod(lambda a, g: (a * g).clamp(min=0)),
    # arXiv:2605.14641
    "refinecam": CamMethod(gradcam_plus_plus, product=True),
    "randomcam": CamMethod(randomcam, gradients=False),
    "scorecam": BY_WEIGHTS,
    "ablationcam": BY_WEIGHTS,
}  # the other methods are classes of the grad-cam package


def normalise(maps: Tensor) -> Tensor:
    """Stretch each map of (..., h, w) to [0, 1], as grad-cam; a constant one becomes 0."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (1e-7 + maps.amax((-2, -1), keepdim=True))


def same_aspect(rows: int, columns: int, size: Sequence[int]) -> bool:
    """Return whether a map has the height to width of an input of `size` (H, W), up to rounding."""
    height, width = size
    if height == width:
        return rows == columns  # both sides were rounded alike
    return abs(rows * width - columns * height) <= max(size)


def as_map(output: Tensor, size: Sequence[int]) -> Tensor | None:
    """Return a layer's output for inputs of `size` (H, W) as (N, C, h, w); None: it is not spatial.

    Convolutional layers return it so, Swin's (N, h, w, C), and a ViT's (N, T, C): the first of its
    tokens is the class token; some networks have more of those, or none.
    """
    if output.ndim == 4:
        first, second, third = output.shape[1:]
        if same_aspect(first, second, size) and not same_aspect(second, third, size):
            output = output.movedim(3, 1)
        return output if output[0, 0].numel() > 1 else None
    if output.ndim != 3:
        return None

    height, width = size
    for special_tokens in (1, 0, 2, 3, 4, 5):
        positions = output.shape[1] - special_tokens
        if positions < 2:
            continue
        rows = math.isqrt(positions * height // width)
        if rows and rows * rows * width == positions * height:
            patches = output[:, special_tokens:].transpose(1, 2)
            return patches.unflatten(2, (rows, positions // rows))
    return None


def dotted_name(model: nn.Module, text: str) -> str:
    """Return "layer4.1" for "layer4[-1]" or, as in grad-cam's examples, "model.layer4[-1]"."""
    modules = dict(model.named_modules())
    first, _, rest = text.partition(".")
    if first in ("model", "module") and first not in modules:
        text = rest

    with contextlib.suppress(KeyError, IndexError):  # then the name is reported as unknown
        for index in re.findall(r"\[(-?\d+)\]", text):
            parent, _, rest = text.partition(f"[{index}]")
            children = list(modules[parent].named_children())
            child, _ = children[int(index)]
            text = f"{parent}.{child}{rest}"
    return text


def layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    """Return the dotted name of a layer, given by name or as the module. Raises CallError."""
    names = {module: name for name, module in model.named_modules()}
    if isinstance(layer, str):
        name = dotted_name(model, layer)
    else:
        name = names.get(layer, type(layer).__name__)
    if name and name in names.values():
        return name
    hint = "; repeat the option for each layer" if "," in name else closest(name, names.values())
    raise CallError(f"the network has no layer '{name}'{hint}; --list-layers shows them all")


def logits_for(network: nn.Module, inputs: Tensor) -> Tensor:
    """Return the network's logits (N, classes). Raises CallError: not one row for each input."""
    return as_logits(network(inputs), count=len(inputs))


@contextlib.contextmanager
def capture_outputs(
    network: nn.Module, layers: Sequence[str], size: Sequence[int], differentiable: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of layers by name while the network runs; of several calls, the last.

    Raises CallError: a layer returns no map for inputs of `size` (H, W), or is not called.
    """
    outputs: dict[str, Tensor] = {}

    def collect(name: str, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            returned = f"returns a {type(output).__name__}, not a tensor"
            raise CallError(f"layer '{name}' {returned}; choose a layer inside it")
        if as_map(output, size) is None:
            values = f"no spatial map but {shape_of(output)} values"
            raise CallError(f"layer '{name}' has {values}; choose another one")
        if differentiable and not output.requires_grad:
            output = output.detach().requires_grad_()  # nothing before this layer needs a gradient
        outputs[name] = output
        return output.clone()  # later layers may change it in place

    with contextlib.ExitStack() as hooks:
        for name in layers:
            module = network.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(collect, name)))
        yield outputs

    for name in layers:
        if name not in outputs:
            fault = "is not called when the network runs; choose another one"
            raise CallError(f"layer '{name}' {fault}")


def layer_gradients(
    scores: Sequence[Tensor], outputs: Mapping[str, Tensor], size: Sequence[int], keep_graph: bool
) -> dict[str, Tensor]:
    """Return the gradients of K scores with respect to layers, (N, K, C, h, w) each.

    Raises CallError: a score does not depend on a layer.
    """
    maps: dict[str, list[Tensor]] = {name: [] for name in outputs}
    for score in scores:
        keep = keep_graph or score is not scores[-1]
        of_layers = torch.autograd.grad(score, [*outputs.values()], None, keep, allow_unused=True)
        for name, gradient in zip(outputs, of_layers, strict=True):
            if gradient is None:
                fault = f"does not depend on layer '{name}'"
                raise CallError(f"the class score {fault}; choose another one")
            maps[name].append(as_map(gradient, size))
    return {name: torch.stack(of_scores, 1) for name, of_scores in maps.items()}


def graph_nodes(*roots: Any) -> set[Any]:
    """Return every node of the autograd graph that ends in `roots`."""
    nodes = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        stack += [parent for parent, _ in node.next_functions]
    return nodes


def is_activation(node: Any) -> bool:
    """Return whether an autograd node is an activation, or a ReLU written as clamp or maximum."""
    name = node.name()
    bounds = []
    if ACTIVATION_NODES.fullmatch(name):
        return True
    if name.startswith(("ClampBackward", "ClampMinBackward")):
        bounds = [node._saved_min]
    elif name.startswith("MaximumBackward"):
        bounds = [node._saved_self, node._saved_other]
    return any(bound is not None and not torch.as_tensor(bound).any() for bound in bounds)


def clamp_gradients(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Let only positive gradients pass, as a hook of an autograd node."""
    return tuple(None if gradient is None else gradient.clamp(min=0) for gradient in gradients)


def guided_gradients(scores: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg et al., ICLR 2015 workshop, arXiv:1412.6806).

    Returns the gradients of K scores, (N, K, 3, H, W). Each activation function, module or not,
    lets only positive gradients in. Uses up the graph.
    """
    for node in graph_nodes(*[score.grad_fn for score in scores]):
        if is_activation(node):
            node.register_prehook(clamp_gradients)

    maps = []
    for score in scores:
        maps += torch.autograd.grad(score, inputs, retain_graph=score is not scores[-1])
    return torch.stack(maps, 1)


def fit_classes(classes: Any, logits: Tensor) -> Tensor:
    """Return classes as indices, int64 (N,) or (N, K), PREDICTED replaced. Raises CallError."""
    count, outputs = logits.shape
    chosen = torch.as_tensor(classes)
    is_integer = not (chosen.is_floating_point() or chosen.dtype == torch.bool)
    rows_fit = chosen.ndim <= 2 and chosen.shape[:1] in ((), (1,), (count,))
    in_range = (chosen >= PREDICTED) & (chosen < outputs)
    if not (is_integer and rows_fit and in_range.all()):
        fault = f"do not fit {count} inputs and {outputs} classes; give one each"
        raise CallError(f"targets {chosen.tolist()} {fault}")

    chosen = chosen.long().expand(count, *chosen.shape[1:]).to(logits.device, non_blocking=True)
    predicted = logits.detach().argmax(1)
    if chosen.ndim == 2:
        predicted = predicted[:, None]
    return torch.where(chosen == PREDICTED, predicted, chosen)


def choose_classes(
    logits: Tensor, targets: Targets, top: int | None, minus: Targets
) -> tuple[Tensor, Tensor]:
    """Return the classes to explain and to subtract, (N,) or (N, K) both. Raises CallError."""
    if targets is not None:
        chosen = fit_classes(targets, logits)
    elif top is None:
        chosen = logits.detach().argmax(1)
    else:
        chosen = logits.detach().topk(min(top, logits.shape[1])).indices
    if minus is None:
        return chosen, chosen  # a class minus itself: nothing is subtracted

    subtracted = fit_classes(minus, logits)
    if subtracted.shape != chosen.shape:
        fault = f"{shape_of(subtracted)} classes from {shape_of(chosen)} targets"
        raise CallError(f"cannot subtract {fault}; give one for each target")
    return chosen, subtracted


def score_weights(targets: Tensor, minus: Tensor, outputs: int) -> Tensor:
    """Return the weights 1, -1 and 0 of the logits in each score, float32 (N, K, outputs)."""
    plus = nn.functional.one_hot(targets, outputs)
    others = nn.functional.one_hot(minus, outputs) * (minus != targets)[..., None]
    return (plus - others).float().view(len(targets), -1, outputs)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in a recorded forward pass."""

    name: str  # of the module; "" for the whole network
    module: nn.Module
    input: Tensor  # its first argument
    source: Any  # the autograd node that made the input
    output: Tensor
    node: Any  # the autograd node that made the output


def record_calls(network: nn.Module, inputs: Tensor) -> tuple[list[Call], Tensor]:
    """Run a network. Return the calls of its modules in the order of their ends, and the logits."""
    calls: list[Call] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        takes_tensor = bool(args) and isinstance(args[0], Tensor)
        if takes_tensor and isinstance(output, Tensor):
            calls.append(Call(name, module, args[0], args[0].grad_fn, output, output.grad_fn))

    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(record, name)))
        return calls, logits_for(network, inputs)


def spatial_calls(calls: Sequence[Call], size: Sequence[int]) -> list[tuple[Call, Tensor]]:
    """Return the calls whose output has a map, with the map (N, C, h, w).

    A ViT's attention has outputs of four dimensions that are no maps, (N, heads, tokens, width). So
    only maps with the height to width of the inputs, `size` (H, W), count, unless there are none.
    """
    spatial = []
    like_input = []
    for call in calls:
        spatial_map = as_map(call.output, size)
        if spatial_map is None or not call.name:
            continue
        spatial.append((call, spatial_map))
        if same_aspect(*spatial_map.shape[2:], size):
            like_input.append((call, spatial_map))
    return like_input or spatial


# Layers that are explained only where there is nothing else: pooling to a few values, dropout, and
# the projections of tokens inside a block of a transformer.
INNER_LAYERS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Linear)


def find_target_layer(calls: Sequence[Call], logits: Tensor, size: Sequence[int]) -> str:
    """Return the last layer with a spatial map on which the logits depend.

    Of a ViT, whose class token alone reaches the head, that is the norm before the last attention,
    as in grad-cam's examples. Raises CallError: there is none.
    """
    spatial = [call for call, _ in reversed(spatial_calls(calls, size))]
    if not spatial:
        fault = f"no layer has a spatial map for inputs of {size[0]} x {size[1]}"
        raise CallError(f"{fault}; pass one as target layer")

    # Take the input of the head, not the score: the weights of a new head may all be zero.
    features = logits
    for call in calls:
        if isinstance(call.module, (nn.Linear, nn.Conv2d)):
            features = call.input
    factors = torch.linspace(1, 2, features[0].numel()).to(features).view_as(features[0])
    probe = (features[0] * factors).sum()

    for call in spatial:
        if isinstance(call.module, INNER_LAYERS) or not call.output.requires_grad:
            continue
        gradient = torch.autograd.grad(probe, call.output, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            continue
        depends = as_map(gradient, size)[0].any(0)  # on which positions of the map
        if depends.sum() > 1:
            return call.name
    return spatial[0].name


def count_readers(logits: Tensor) -> Counter[Any]:
    """Return how many nodes of the autograd graph read the output of each node."""
    readers: Counter[Any] = Counter()
    for node in graph_nodes(logits.grad_fn):
        readers.update(parent for parent, _ in node.next_functions)
    return readers


def fold_batch_norms(
    network: nn.Module, calls: Sequence[Call], logits: Tensor, keep: Sequence[str]
) -> None:
    """Fold each batch norm into the convolution before it, if nothing else reads the convolution.

    `keep` names the layers whose own output is wanted. The graph of the recorded pass tells which
    output goes where.
    """
    readers = count_readers(logits)
    kept = [call.node for call in calls if call.name in keep]
    convolutions: dict[Any, Call] = {}  # by the node of their output
    for call in calls:
        kind = type(call.module)
        if call.module._forward_hooks or call.module._forward_pre_hooks:
            continue  # what they do is not known
        if kind is nn.Conv2d and call.node not in kept:
            convolutions[call.node] = call
        if kind is not nn.BatchNorm2d or call.source not in convolutions:
            continue

        convolution = convolutions[call.source]
        if call.module.track_running_stats and readers[call.source] == 1:
            fused = nn.utils.fusion.fuse_conv_bn_eval(convolution.module, call.module)
            network.set_submodule(convolution.name, fused.requires_grad_(False))
            network.set_submodule(call.name, nn.Identity())


class BatchSize:
    """How many items are computed at once; halved where memory does not suffice."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        """Yield `function` of consecutive slices of `items`. Raises what it raises for one item."""
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
    """Compute in float32 without autocast; on CUDA without TF32 (ten bits), and repeatably."""
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    settings = [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, which refuses to mix the two ways
        settings += [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    else:
        settings += [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    if device.type != "cuda":
        settings = []

    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as stack:
        for place, name, value in settings:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


def copy_network(model: nn.Module, share: bool = False) -> nn.Module:
    """Return a copy of a network with weights of its own, or with the same ones."""
    replacements = {}
    if share:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            replacements[id(tensor)] = tensor
    for module in model.modules():
        for value in vars(module).values():
            # a part of a graph cannot be copied, such as the weight that weight_norm computes
            if isinstance(value, Tensor) and not value.is_leaf:
                replacements[id(value)] = value.detach()
    return deepcopy(model, replacements)


class PartialPass:
    """The network from the last call of a layer on, to run for other outputs of that layer."""

    def __init__(self, network: nn.Module, layer: str, inputs: Tensor) -> None:
        self.network = network
        self.module = network.get_submodule(layer)
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output.clone())

        with self.module.register_forward_hook(keep):
            self.logits = as_logits(network(inputs))  # (1, classes)
        self.calls = len(outputs)
        self.output = outputs[-1]  # (1, ...)

        # The layers before run on a small dummy input, since their output is replaced anyway.
        # Networks that refuse it get the real input, and those that compare the sizes of two
        # branches get one for each copy.
        small = torch.zeros_like(inputs[..., :64, :64])
        for self.stand_in, self.one_for_each in ((small, False), (inputs, False), (inputs, True)):
            with contextlib.suppress(RuntimeError, AssertionError, ValueError, CallError):
                twice = self.run(torch.cat([self.output, self.output]))
                if len(twice) == 2 and torch.allclose(twice, self.logits, 1e-3, 1e-3):
                    return

    def run(self, copies: Tensor) -> Tensor:
        """Return the logits (B, classes) for B outputs of the layer."""
        calls = itertools.count(1)

        def replace_last(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return copies if next(calls) == self.calls else None

        inputs = self.stand_in
        if self.one_for_each:
            inputs = inputs.expand(len(copies), -1, -1, -1)
        with self.module.register_forward_hook(replace_last):
            return as_logits(self.network(inputs))


@contextlib.contextmanager
def grad_cam_method(
    method: str, network: nn.Module, layers: Sequence[str], reshape: Callable[[Tensor], Tensor]
) -> Iterator[Any]:
    """Yield an object of the grad-cam package for a method; take its hooks off afterwards."""
    import pytorch_grad_cam

    # the class whose name is the method's, but for capitals and underscores
    classes = {name.lower().replace("_", ""): name for name in vars(pytorch_grad_cam)}
    make = getattr(pytorch_grad_cam, classes[method])
    with contextlib.redirect_stdout(io.StringIO()):  # FullGrad prints a warning
        cam = make(network, [network.get_submodule(layer) for layer in layers], reshape)

    network.requires_grad_(True)  # Shapley-CAM needs second derivatives, which frozen weights lack
    try:
        yield cam
    finally:
        network.requires_grad_(False)
        network.zero_grad(set_to_none=True)
        kept = getattr(cam, "base_cam", cam).activations_and_grads
        kept.activations = []  # release() fails to detach them where they are views
        kept.gradients = []
        kept.release()


def grad_cam_target(cam: Any, weights: Tensor) -> dict[str, Any]:
    """Return what tells a class of the grad-cam package the score to explain. Raises CallError."""
    if "target_idx" not in inspect.signature(cam.forward).parameters:
        return {"targets": [lambda logits: logits.flatten() @ weights]}
    if (weights < 0).any():
        raise CallError("it compares classes by itself, so it takes no difference of two")
    return {"targets": None, "target_idx": int(weights.argmax())}


@dataclass(frozen=True)
class Batch:
    """What the methods read for N inputs and K scores."""

    inputs: Tensor  # (N, 3, H, W)
    weights: Tensor  # of the logits in the scores, (N, K, classes)
    activations: dict[str, Tensor]  # by the layer, (N, C, h, w)
    gradients: dict[str, Tensor]  # by the layer, (N, K, C, h, w); empty if no method reads them


class Explainer:
    """Explains the predictions of any `nn.Module` classifier.

    Everything runs in float32 and eval mode on a frozen copy of the model, which itself is not
    changed. After training on, make a new explainer.

    Args:
        model: takes (N, 3, H, W), returns logits (N, classes); or (N, 1) or (N,) for a single
            sigmoid output, of which the positive side is explained.
        methods: names from METHODS and MORE_METHODS, or one of them.
        target_layers: names of layers, or the modules, whose maps are averaged, or one of them;
            None: the last layer with a spatial map on which the score depends. "layer4[-1]" is the
            last child of layer4.
        guided: whether guided backpropagation is wanted too.
        aug_smooth: average the maps over six variants of the input, as grad-cam.
        eigen_smooth: take the first principal component over the channels instead of their sum.
        batch_size: how many inputs Score-CAM and `logits` run at once, at most; None: 2 on the CPU,
            else 32.
        progress: wraps the passes of Score-CAM and Ablation-CAM, such as tqdm.
        copy: False: take over the model itself, which is then changed.
        fold: fold batch norms into convolutions: faster from a handful of inputs on.
        multi_label: whether each logit is a sigmoid of its own; `faithfulness` reads it.

    Raises:
        CallError: there is no such method or layer.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: str | Sequence[str] = ("gradcam",),
        target_layers: Layers = None,
        *,
        guided: bool = True,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
        batch_size: int | None = None,
        progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
        copy: bool = True,
        fold: bool = True,
        multi_label: bool = False,
    ) -> None:
        if not isinstance(methods, str):
            methods = ",".join(methods)
        self.methods = tuple(METHOD_LIST(methods))
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        if target_layers is None:
            target_layers = ()
        elif isinstance(target_layers, (str, nn.Module)):
            target_layers = [target_layers]
        self.target_layers = tuple(layer_name(model, layer) for layer in target_layers)
        # after `prepare` the layers with a map: by name, the type and the map's shape (C, h, w)
        self.layers: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.guided = guided
        self.aug_smooth = aug_smooth
        self.eigen_smooth = eigen_smooth
        self.progress = progress
        # grad-cam's FullGrad counts the biases of batch norms, and its FEM has a sharp threshold
        self.fold = fold and all(method in CAM_METHODS for method in self.methods)
        self.multi_label = multi_label
        self._set_network(model, copy)
        default = 2 if self.device.type == "cpu" else 32
        self.batch_size = BatchSize(batch_size or default)

    def _set_network(self, model: nn.Module, copy: bool) -> None:
        """Make the frozen network."""
        with torch.inference_mode(False):
            network = copy_network(model) if copy else model
            tensors = itertools.chain(network.parameters(), network.buffers())
            self.device = next(tensors, torch.empty(0)).device

            # channels-last where oneDNN computes; on a GPU it pays only in half precision
            if self.device.type == "cpu" and torch.backends.mkldnn.is_available():
                network.to(memory_format=torch.channels_last)
            self.network = network.eval().requires_grad_(False).float()

    def prepare(self, inputs: Tensor) -> None:
        """Run one input (1, 3, H, W): find the default target layer, and fold the batch norms."""
        size = inputs.shape[2:]
        with torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(self.device):
            calls, logits = record_calls(self.network, self._own(inputs).requires_grad_())
            if not self.target_layers:
                self.target_layers = (find_target_layer(calls, logits, size),)
            if self.fold:
                self._fold(calls, logits, inputs)
        for call, spatial_map in spatial_calls(calls, size):
            self.layers[call.name] = (type(call.module).__name__, tuple(spatial_map.shape[1:]))

    def _fold(self, calls: Sequence[Call], logits: Tensor, inputs: Tensor) -> None:
        """Fold the batch norms; undo it if the logits of `inputs` have changed."""
        fold_batch_norms(self.network, calls, logits, keep=self.target_layers)
        folded = logits_for(self.network, self._own(inputs))
        if not torch.allclose(folded, logits, 1e-3, 1e-3):  # a weight is read elsewhere as well
            for call in calls[:-1]:
                self.network.set_submodule(call.name, call.module)

    def __call__(
        self,
        inputs: Tensor,
        targets: Targets = None,
        *,
        top: int | None = None,
        minus: Targets = None,
    ) -> Explanation:
        """Explain inputs (N, 3, H, W), normalised as the model expects them.

        Args:
            targets: one class for all inputs, or (N,) for each; or K classes, (1, K) or (N, K). -1
                stands for the class with the highest logit, which is explained by default.
            top: without `targets`, explain that many classes with the highest logits.
            minus: the classes whose logits are subtracted from those of the targets, in the form of
                `targets`. The target itself stands for none.

        Raises:
            CallError: the inputs, the classes or the layers cannot be explained.
            ValueError: the logits are not finite.
        """
        if not isinstance(inputs, Tensor):
            hint = "use classifier.preprocess(photo)[None]"
            raise CallError(f"inputs are a tensor, not {type(inputs).__name__}; {hint}")
        if inputs.ndim != 4 or not len(inputs):
            shape = f"(N, 3, H, W), not {shape_of(inputs)}"
            raise CallError(f"inputs are a batch {shape}; of one photo: inputs[None]")
        if not self.layers:
            self.prepare(inputs[:1])

        choose = partial(choose_classes, targets=targets, top=top, minus=minus)
        # Whatever mode the caller is in, this needs a graph; the caller's settings stay.
        with torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(self.device):
            if not self.aug_smooth:
                return self._explain(inputs, choose, self.methods, self.guided)
            explanation = self._explain(inputs, choose, (), self.guided)
            return replace(explanation, cams=self._augmented_cams(inputs, explanation))

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the network's logits (N, classes) for inputs (N, 3, H, W), on its device."""

        def run(network: nn.Module, part: Tensor) -> Tensor:
            return logits_for(network, self._own(part))

        with exact_arithmetic(self.device):
            return self._in_batches(run, inputs)

    def _own(self, inputs: Tensor) -> Tensor:
        """Return a copy of the inputs as the network wants them."""
        return inputs.detach().to(self.device, torch.float32).clone()

    def _in_batches(
        self, function: Callable[..., Tensor], items: Tensor, progress: Any = iter
    ) -> Tensor:
        """Return `function` of the network and all items, a few at once; on a CPU by threads."""
        cores = torch.get_num_threads()
        workers = min(4, cores) if self.device.type == "cpu" else 1
        networks = [self.network]  # one for each thread
        networks += [copy_network(self.network, share=True) for _ in range(1, workers)]

        @torch.inference_mode()
        def run(network: nn.Module, part: Tensor) -> Tensor:
            return torch.cat(list(self.batch_size.run(partial(function, network), part)))

        results: list[Tensor] = []
        with ThreadPoolExecutor(workers, None, torch.set_num_threads, (cores // workers,)) as pool:
            for part in progress(items.split(64)):
                results += pool.map(run, networks, part.chunk(workers))
        torch.set_num_threads(cores)  # new threads inherit the last value
        return torch.cat(results)

    def _augmented_cams(self, inputs: Tensor, explanation: Explanation) -> dict[str, Floats]:
        """Return the means of the maps over six variants of the inputs, as in grad-cam."""
        import ttach

        asked = {"targets": explanation.targets, "top": None, "minus": explanation.minus}
        variants = ttach.Compose([ttach.HorizontalFlip(), ttach.Multiply([0.9, 1, 1.1])])
        cams: dict[str, list[Floats]] = {method: [] for method in self.methods}
        for variant in variants:
            varied = variant.augment_image(inputs.detach().float())
            explained = self._explain(varied, partial(choose_classes, **asked), self.methods, False)
            for method, maps in explained.cams.items():
                batch = torch.from_numpy(maps).view(-1, 1, *inputs.shape[2:])
                cams[method].append(variant.deaugment_mask(batch).view(maps.shape).numpy())
        return {method: np.mean(maps, axis=0) for method, maps in cams.items()}

    def _explain(
        self,
        inputs: Tensor,
        choose: Callable[[Tensor], tuple[Tensor, Tensor]],
        methods: Sequence[str],
        guided: bool,
    ) -> Explanation:
        """Explain inputs; `choose` returns targets and minus for the logits, see choose_classes."""
        inputs = self._own(inputs).requires_grad_(guided)
        size = inputs.shape[2:]
        kinds = [CAM_METHODS[method] for method in methods if method in CAM_METHODS]
        with_gradients = any(kind.gradients for kind in kinds)
        with capture_outputs(self.network, self.target_layers, size, with_gradients) as outputs:
            logits = logits_for(self.network, inputs)

        targets, minus = choose(logits)
        weights = score_weights(targets, minus, logits.shape[1])
        scores = (logits[:, None] * weights).sum((0, 2)).unbind()  # over all inputs, for K classes
        gradients = {}
        if with_gradients:
            gradients = layer_gradients(scores, outputs, size, keep_graph=guided)
        guided_maps = guided_gradients(scores, inputs) if guided else None

        # The first result that is waited for: a GPU has been given all of the work above by now.
        if not torch.isfinite(logits).all():
            raise ValueError("the logits are NaN or infinite; the weights are probably broken")

        def array(values: Tensor | None) -> Any:  # (N, K, ...) -> (N, ...) or (N, K, ...)
            if values is None:
                return None
            values = values.reshape(*targets.shape, *values.shape[2:])
            return values.cpu().contiguous().numpy()

        activations = {name: as_map(output.detach(), size) for name, output in outputs.items()}
        batch = Batch(inputs.detach(), weights, activations, gradients)
        cams = {method: array(self._cam(method, batch)) for method in methods}
        logits = logits.detach().cpu().numpy()
        return Explanation(cams, array(guided_maps), logits, array(targets), array(minus))

    def _cam(self, method: str, batch: Batch) -> Tensor:
        """Return the maps (N, K, H, W) of one method, in [0, 1], of all layers together."""
        if method not in CAM_METHODS:
            return self._by_grad_cam(method, batch)

        size = batch.inputs.shape[2:]
        maps = []
        for layer in batch.activations:
            small = normalise(self._layer_cam(method, layer, batch))
            maps.append(nn.functional.interpolate(small, size, mode="bilinear"))
        of_layers = torch.stack(maps)
        if CAM_METHODS[method].product:
            return normalise(normalise(of_layers).prod(0))
        return normalise(of_layers.mean(0))

    def _layer_cam(self, method: str, layer: str, batch: Batch) -> Tensor:
        """Return the maps (N, K, h, w) of one method at one layer."""
        kind = CAM_METHODS[method]
        activations = batch.activations[layer]
        gradients = batch.gradients.get(layer)
        if method in MANY_PASSES:
            weigh = self._score_weights if method == "scorecam" else self._ablation_weights
            photos = zip(activations, batch.inputs.split(1), batch.weights, strict=True)
            gradients = torch.stack(list(itertools.starmap(partial(weigh, layer), photos)))
            gradients = gradients[..., None, None]

        contributions = kind.contributions(activations[:, None], gradients)
        reduce = kind.reduce
        if self.eigen_smooth and reduce is channel_sum:
            reduce = principal_component
        small = reduce(contributions)
        if kind.relu:
            small = small.clamp(min=0)
        return small.expand(*batch.weights.shape[:2], -1, -1)

    @torch.inference_mode()
    def _ablation_weights(
        self, layer: str, activations: Tensor, inputs: Tensor, weights: Tensor
    ) -> Tensor:
        """Ablation-CAM (Desai and Ramaswamy, WACV 2020): the score that is lost without a channel.

        For one input (1, 3, H, W) and K scores; returns (K, C). The paper divides by the score,
        which may be negative. Only what follows the layer runs again, for many ablated copies of
        its output at once.
        """
        later = PartialPass(self.network, layer, inputs)
        output = later.output
        # the axis of the channels, see as_map
        axis = 1 if output.shape[1:] == activations.shape else output.ndim - 1
        score = weights @ later.logits[0]
        ablated = score.repeat(output.shape[axis], 1)

        # Channels that are zero everywhere change nothing.
        alive = output.movedim(axis, 1)[0].flatten(1).any(1).nonzero()[:, 0]
        at_once = max(1, min(256, 2**25 // (output.numel() * 4)))  # 32 MB together
        for channels in self.progress(alive.split(at_once)):
            copies = output.repeat_interleave(len(channels), 0)
            rows = torch.arange(len(channels), device=channels.device)
            copies.movedim(axis, 1)[rows, channels] = 0
            ablated[channels] = later.run(copies) @ weights.T
        return (score - ablated).T

    @torch.inference_mode()
    def _score_weights(
        self, layer: str, activations: Tensor, inputs: Tensor, weights: Tensor
    ) -> Tensor:
        """Score-CAM (Wang et al., CVPR workshops 2020, arXiv:1910.01279).

        The softmax of the scores of masked inputs, for one input (1, 3, H, W) and K scores; returns
        (K, C). A mask is a channel of activations (C, h, w), enlarged and stretched to [0, 1]; that
        of a constant channel is zero: those share one pass.
        """
        values = activations.flatten(1)
        varied = (values.amax(1) > values.amin(1)).nonzero()[:, 0]
        of_zeros = weights @ self.logits(torch.zeros_like(inputs))[0]
        scores = of_zeros.repeat(len(activations), 1)

        def masked_scores(network: nn.Module, channels: Tensor) -> Tensor:
            small = activations[channels][:, None]
            size = inputs.shape[2:]
            masks = nn.functional.interpolate(small, size, mode="bilinear", align_corners=True)
            return logits_for(network, inputs * normalise(masks)) @ weights.T

        if len(varied):
            scores[varied] = self._in_batches(masked_scores, varied, self.progress)
        return scores.softmax(0).T

    def _by_grad_cam(self, method: str, batch: Batch) -> Tensor:
        """Return the maps (N, K, H, W) of a method of the grad-cam package. Raises CallError."""
        groups = [list(batch.activations)]
        if method == "shapleycam":  # it frees the graph after its first layer
            groups = [[layer] for layer in batch.activations]

        maps = []
        for layers in groups:
            for image, rows in zip(batch.inputs.split(1), batch.weights, strict=True):
                maps += [self._grad_cam_map(method, layers, image, row) for row in rows]
        of_groups = torch.stack(maps).unflatten(0, (len(groups), *batch.weights.shape[:2]))
        return normalise(of_groups.mean(0))

    def _grad_cam_map(
        self, method: str, layers: Sequence[str], inputs: Tensor, weights: Tensor
    ) -> Tensor:
        """Return the map (H, W) of one input and one score. Raises CallError."""

        def reshape(output: Tensor) -> Tensor:
            spatial_map = as_map(output, inputs.shape[2:])
            return output if spatial_map is None else spatial_map

        try:
            with grad_cam_method(method, self.network, layers, reshape) as cam:
                target = grad_cam_target(cam, weights)
                # This hook comes after grad-cam's: later layers cannot change what grad-cam keeps.
                with capture_outputs(self.network, layers, inputs.shape[2:]):
                    image = inputs.clone().requires_grad_()
                    maps = cam(image, eigen_smooth=self.eigen_smooth, **target)
            return torch.from_numpy(np.float32(maps[0])).to(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # as Shapley-CAM with tokens, Finer-CAM with a single output
            fault = f"does not work on layer '{', '.join(layers)}': {first_line(error)}"
            raise CallError(f"{method} {fault}") from error


# --------------------------------------------------------------------------------------------------
# 6  Metrics. The network's predictions for changed inputs show how faithful a map is.
# --------------------------------------------------------------------------------------------------

METRICS = ("average_drop", "increase", "deletion", "insertion", "road")


def faithfulness(
    explainer: Explainer, inputs: Tensor, cam: Floats, target: int
) -> dict[str, float]:
    """Measure a map (H, W) in [0, 1] by how the probability p of a class changes with the input.

    The inputs are (1, 3, H, W). Returns five numbers:

    - average_drop, 0 to 1, lower is better: the share of p that is lost when the input is
      multiplied by the map.
    - increase, 0 or 1, higher is better: whether p grows by that (both Chattopadhyay et al., WACV
      2018, arXiv:1710.11063, as means over many photos).
    - deletion, 0 to 1, lower is better: the mean p while the hottest pixels are set to zero first.
    - insertion, 0 to 1, higher is better: the mean p while they come back first (both Petsiuk et
      al., RISE, BMVC 2018, arXiv:1806.07421; there the insertion starts from a blurred photo).
    - road, -0.5 to 0.5, higher is better: half of how much more p drops when the hottest 20, 40, 60
      and 80 percent are imputed from their neighbours than when the coldest are (Rong et al., ICML
      2022, arXiv:2202.00449, as grad-cam's ROADCombined).
    """
    photo = inputs[0].cpu().numpy()
    cam = np.reshape(cam, photo.shape[1:])  # (1, H, W) is taken too
    counts, hottest = hottest_first(cam)
    changed = [
        photo[None],
        photo[None] * cam,
        photo * ~hottest[:, None],
        photo * hottest[:, None],
        impute_shares(photo, cam),
        impute_shares(photo, 1 - cam),
    ]
    before, masked, deletion, insertion, without_hottest, without_coldest = class_probabilities(
        explainer, changed, target
    )

    values = {
        "average_drop": max(0.0, before[0] - masked[0]) / (before[0] + 1e-7),
        "increase": masked[0] > before[0],
        "deletion": area_under(deletion, counts),
        "insertion": area_under(insertion, counts),
        "road": (without_coldest - without_hottest).mean() / 2,
    }
    return {name: round(float(value), 6) for name, value in values.items()}


def hottest_first(cam: Floats) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return growing numbers of pixels, in 20 steps, and masks (S, H, W) of the hottest so many."""
    step = math.ceil(cam.size / 20)
    counts = np.append(np.arange(0, cam.size, step), cam.size)
    order = np.argsort(-cam.flatten(), kind="stable")
    ranks = np.argsort(order).reshape(cam.shape)
    return counts, ranks < counts[:, None, None]


def area_under(curve: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Return the mean of a curve over the share of the pixels, by the trapezoidal rule."""
    means = (curve[1:] + curve[:-1]) / 2
    return (means * np.diff(counts)).sum() / counts[-1]


def class_probabilities(
    explainer: Explainer, groups: Sequence[Floats], target: int
) -> list[NDArray[np.float64]]:
    """Return the probabilities (B,) of a class for each group of inputs (B, 3, H, W)."""
    inputs = torch.from_numpy(np.concatenate(groups).astype(np.float32))
    p = probabilities(explainer.logits(inputs), explainer.multi_label)[:, target]
    ends = np.cumsum([len(group) for group in groups])
    return np.split(p.double().cpu().numpy(), ends[:-1])


def probabilities(logits: Tensor, multi_label: bool = False) -> Tensor:
    """Return the probabilities (N, classes): a softmax, or sigmoids of labels or a single class."""
    if multi_label or logits.shape[1] == 1:
        return logits.sigmoid()
    return logits.softmax(1)


def impute_shares(photo: Floats, cam: Floats) -> Floats:
    """Return a photo (3, H, W) with its hottest 80, 60, 40 and 20 percent imputed, (4, 3, H, W)."""
    thresholds = np.quantile(cam, [0.2, 0.4, 0.6, 0.8])
    return np.stack([impute(photo, cam < threshold) for threshold in thresholds])


def impute(photo: Floats, kept: NDArray[np.bool_]) -> Floats:
    """Return a photo (3, H, W) with the pixels outside `kept` (H, W) filled from those around.

    ROAD's noisy linear imputation (arXiv:2202.00449, section 4): grad-cam's equations, and a faster
    solver.
    """
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer, neighbors_weights
    from scipy.sparse import csc_matrix
    from scipy.sparse.linalg import splu

    mask = kept.astype(np.float32)
    system, right = NoisyLinearImputer.setup_sparse_system(mask, photo, neighbors_weights)
    symmetric = {"SymmetricMode": True}
    solver = splu(csc_matrix(system), "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=symmetric)
    noise = np.random.default_rng(0).standard_normal(right.T.shape)
    filled = photo.copy()
    filled[:, ~kept] = solver.solve(right).T + 0.01 * noise
    return filled


# --------------------------------------------------------------------------------------------------
# 7  Output. Explanations become pictures and files; a log says which photos are done.
# --------------------------------------------------------------------------------------------------

COLORMAPS = {
    name[9:].lower(): number for name, number in vars(cv2).items() if name.startswith("COLORMAP_")
}
CELL = 320  # pixels: side of a picture on a sheet
TEXT = 22  # height of its text
LINE = TEXT + 12  # height of a line of text
GAP = 8  # between its pictures


def resized(picture: Picture, long_side: int) -> Picture:
    """Return the picture enlarged or shrunk to that long side."""
    height, width = picture.shape[:2]
    scale = long_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(picture, size, interpolation=interpolation)


def draw_cam(
    picture: Picture, cam: Floats, colormap: str = "jet", alpha: float = 0.5, fade: bool = False
) -> Picture:
    """Return the map (H, W) in [0, 1] as colours over the picture, uint8 RGB.

    `alpha` is the opacity of the colours; with `fade` it is multiplied by the map at each pixel. A
    map that is 0 everywhere leaves the picture as it is.
    """
    if not cam.any():
        return picture
    enlarged = cv2.resize(cam, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    levels = cv2.convertScaleAbs(enlarged, alpha=255)
    bgr = cv2.applyColorMap(levels, COLORMAPS[colormap])
    colours = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)

    if not fade:
        return cv2.addWeighted(picture, 1 - alpha, colours, alpha, 0)
    opacity = np.float32(alpha) * enlarged[:, :, None]
    mixed = picture * (1 - opacity) + colours * opacity
    return np.rint(mixed).astype(np.uint8)


def draw_gradients(gradients: Floats, width: int, height: int) -> Picture:
    """Return gradients (3 or 1, H, W) as a picture, uint8 RGB: grey is zero, brighter positive.

    The 99.5th percentile sets the scale, so that a few extreme pixels do not turn all others grey.
    """
    sizes = np.abs(gradients)
    strongest = float(np.percentile(sizes, 99.5))
    if strongest == 0:
        strongest = float(sizes.max()) or 1.0

    channels_last = gradients.transpose(1, 2, 0)
    enlarged = cv2.resize(channels_last, (width, height), interpolation=cv2.INTER_LINEAR)
    drawn = cv2.addWeighted(enlarged, 127.5 / strongest, enlarged, 0, 127.5, dtype=cv2.CV_8U)
    return drawn if drawn.ndim == 3 else cv2.cvtColor(drawn, cv2.COLOR_GRAY2RGB)


def draw(
    output: str,
    explanation: Explanation,
    seen: Picture | Image.Image,
    method: str = "",
    index: int = 0,
    **look: Any,
) -> Picture:
    """Return one of OUTPUTS as a picture, uint8 RGB, as large as `seen`.

    Args:
        output: "cam", "gb" or "cam_gb".
        explanation: what an Explainer returned.
        seen: what the network saw (Classifier.seen), as an array or as a PIL image.
        method: by default the first one of the explanation.
        index: counts the inputs, or where there are K classes for each, all N * K.
        look: colormap, alpha and fade, see `draw_cam`.
    """
    if isinstance(seen, Image.Image):
        seen = np.asarray(seen.convert("RGB"))
    height, width = seen.shape[:2]

    maps = explanation.cams[method or next(iter(explanation.cams))]
    cam = maps.reshape(-1, *maps.shape[-2:])[index]
    if output == "cam":
        return draw_cam(seen, cam, **look)

    gradients = explanation.guided.reshape(-1, *explanation.guided.shape[-3:])[index]
    if output == "cam_gb":
        gradients = gradients * cam
    return draw_gradients(gradients, width, height)


@dataclass(frozen=True)
class Cell:
    """A picture on a sheet."""

    caption: str  # above it
    picture: Picture
    note: str = ""  # across it, in red


Block = tuple[str, list[list[Cell]]]  # the part of a sheet about one class: heading and columns


def draw_sheet(title: str, blocks: Sequence[Block], font: Any, colormap: str) -> Picture:
    """Return a table of pictures with a block for each class, below a title and a colour scale.

    All pictures have the same size. More than six columns are wrapped.
    """
    _, columns = blocks[0]
    across = math.ceil(len(columns) / math.ceil(len(columns) / 6))
    depth = max(map(len, columns))  # pictures below each other
    rows = depth * math.ceil(len(columns) / across)
    cell_height = LINE + len(resized(columns[0][0].picture, CELL))
    block_height = LINE + rows * cell_height

    room = 40 // rows  # a taller sheet would not fit into a WebP file
    if len(blocks) > room:
        warn(f"a sheet has room for {room} classes; the others are left out")
        blocks = blocks[:room]
    width = max(984, GAP + across * (CELL + GAP))
    sheet = Image.new("RGB", (width, LINE + len(blocks) * block_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = font
    pen.text((GAP, 6), title, "black")
    draw_scale(sheet, pen, colormap)

    for number, (heading, columns) in enumerate(blocks):
        top = LINE + number * block_height
        pen.text((GAP, top + 4), heading, "black")
        for place, column in enumerate(columns):
            down, right = divmod(place, across)
            left = GAP + right * (CELL + GAP)
            upper = top + LINE + down * depth * cell_height
            for cell in column:
                draw_cell(sheet, pen, cell, left, upper)
                upper += cell_height
    return np.asarray(sheet)


def draw_scale(sheet: Image.Image, pen: Any, colormap: str) -> None:
    """Draw the colours from 0 to 1 into the upper right corner of a sheet, where a title ends."""
    right = sheet.width
    pen.rectangle((right - 290, 0, right, LINE), "white")
    pen.text((right - 280, 6), "evidence 0", "dimgray")
    pen.text((right - 22, 6), "1", "dimgray")

    ramp = np.linspace(0, 1, 128, dtype=np.float32)[None]
    black = np.zeros((TEXT, 128, 3), np.uint8)
    scale = draw_cam(black, ramp, colormap, alpha=1)
    sheet.paste(Image.fromarray(scale), (right - 156, 8))


def draw_cell(sheet: Image.Image, pen: Any, cell: Cell, left: int, top: int) -> None:
    """Draw a picture with its caption and note on a sheet."""
    picture = resized(cell.picture, CELL)
    sheet.paste(Image.fromarray(picture), (left, top + LINE))
    pen.text((left, top + 4), cell.caption, "dimgray")

    place = (left + GAP, top + LINE + len(picture) // 2)
    pen.text(place, cell.note, "red", stroke_width=3, stroke_fill="white")


def find_font(names: Sequence[str]) -> tuple[Any, set[str]]:
    """Return the font with the most characters of the names, and the set of its characters."""
    font = ImageFont.load_default(TEXT)
    characters = set(map(chr, range(32, 127)))  # ASCII
    wanted = characters.union(*names)
    if wanted <= characters:
        return font, characters

    from matplotlib import font_manager, ft2font

    paths = font_manager.findSystemFonts()
    for path in sorted(paths, key=lambda path: ("Sans" not in path, path)):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # not a usable font
            in_font = set(map(chr, ft2font.FT2Font(path).get_charmap()))
            if len(in_font & wanted) > len(characters & wanted):
                font = ImageFont.truetype(path, TEXT)
                characters = in_font
    return font, characters


def file_labels(class_names: Sequence[str]) -> list[str]:
    """Return what stands for each class in file names: its name, with its index if need be."""
    # without underscores, so that no two photos' names with labels behind them can be equal
    labels = [re.sub(r"[^\w.+]+|_", "-", name).strip("-.")[:40] for name in class_names]
    is_distinct = len(set(map(str.casefold, labels))) == len(labels)
    if all(labels) and is_distinct:
        return labels
    return [f"{index}-{label}".rstrip("-") for index, label in enumerate(labels)]


def file_size(path: str | Path) -> int:
    """Return the size of a file in bytes, or -1 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path):
            return os.path.getsize(path)
    return -1


def open_regular(path: Path, flags: int) -> io.FileIO:
    """Open a regular file; no link is followed, no FIFO waited for. Raises OSError."""
    for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    file = io.FileIO(os.open(path, flags, 0o666), "r+" if flags & os.O_RDWR else "r")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileExistsError(errno.EEXIST, "it is not a regular file; remove it")
    return file


@dataclass(frozen=True)
class OutputFile:
    """A file to write."""

    kind: str  # gb, gradcam_cam, gradcam_cam_gb, sheet, arrays ...
    index: int | None  # of its class in record["classes"]; None: it belongs to no class
    name: str  # with {} for the photo's name
    content: bytes


@dataclass(frozen=True, slots=True)
class LogEntry:
    """What is remembered of the last record of a photo and a choice of methods."""

    options: str = ""  # a hash, see `with_options`; "": there is no record, or it is of an error
    sizes: dict[str, Any] = field(default_factory=dict)  # path below the log's folder -> bytes
    place: int = -1  # of the record in the log, in bytes
    right: Any = None  # whether the prediction is right; None: the true class is not known
    metrics: Any = None  # as in the record


class Log:
    """`results.jsonl` in the output folder, and the files that it lists.

    A line is a JSON object for a photo and a choice of methods; the last one of these counts.
    Several processes append lines under a lock, and each reads what the others have appended before
    it writes, so that none writes over another's files.
    """

    def __init__(self, folder: Path, start_size: int) -> None:
        """Read the log, if there is one; nothing is created. Raises CallError: it cannot be read.

        Records beyond `start_size` were written by processes running at the same time.
        """
        self.folder = folder
        self.path = folder / LOG_NAME
        self._start_size = start_size
        self._real_folder = os.path.realpath(folder)
        self._lock = FileLock(folder / ".results.lock", poll_interval=0.01)
        self._position = 0  # up to which the log was read
        self._entries: dict[tuple[str, str], LogEntry] = {}  # by (image, methods)
        self._owners: dict[int, tuple[str, str]] = {}  # file -> (image, options) of its last record
        self._stems: dict[int, str] = {}  # beginning of files' names -> image
        self._last_stem: dict[str, str] = {}  # image -> beginning of its files' names
        self._next_number: dict[str, int] = {}  # name -> the number to try next behind it
        self._parts: Path | None = None  # folder of unfinished files
        self._parts_lock: FileLock | None = None

        try:
            with open_regular(self.path, os.O_RDONLY) as file:
                self._read(file)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CallError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[io.FileIO]:
        """Yield the open log, when all that other processes appended is read. Raises OSError."""
        with self._lock, open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
            self._read(file)
            yield file

    def _read(self, file: io.FileIO) -> None:
        """Read the records that were appended since the last time."""
        file.seek(self._position)
        for line in io.BufferedReader(io.FileIO(file.fileno(), closefd=False)):
            if not line.endswith(b"\n"):  # of a process that was killed
                return
            record = parse_record(line)
            if record:
                self._remember(record)
            self._position += len(line)

    def _remember(self, record: Mapping[str, Any]) -> None:
        """Take in a record that begins at the position up to which the log was read."""
        image = self._image_key(record)
        options = record.get("options", "")
        sizes = dict.fromkeys(record_files(record))
        known = record.get("sizes")
        if isinstance(known, dict):
            sizes = {path: known.get(path) for path in sizes}

        entry = LogEntry(options, sizes, self._position, record.get("right"), record.get("metrics"))
        self._entries[image, record["method"]] = entry
        for path in sizes:
            self._owners[self._file_key(path)] = (image, options)
        stem = record.get("output_stem")
        if stem:  # not of an error
            self._stems[self._file_key(stem)] = image
            self._last_stem[image] = stem

    def _file_key(self, path: str) -> int:
        """Return a hash of a path that ignores case and the form of accents, as file systems do."""
        path = os.path.abspath(os.path.join(self._real_folder, path))
        return hash(unicodedata.normalize("NFC", path).casefold())

    def _image_key(self, record: Mapping[str, Any]) -> str:
        """Return the path of a photo, with its folder's links resolved."""
        path = record["image"]
        if "source" in record:  # its path from the log's folder
            path = os.path.join(self._real_folder, record["source"])
        return os.path.normcase(real_path(path))

    def entry(self, image: str, method: str) -> LogEntry:
        """Return what is known of a photo and a choice of methods."""
        return self._entries.get((self._image_key({"image": image}), method), LogEntry())

    def is_done(self, image: str, method: str, options: str, only_wrong: bool = False) -> bool:
        """Return whether a photo's files are there as a run with the same options has written them.

        With `only_wrong`, a record without files is enough.
        """
        entry = self.entry(image, method)
        if entry.options != options:
            return False
        if not entry.sizes:
            return only_wrong

        owner = (self._image_key({"image": image}), options)
        for path, size in entry.sizes.items():
            if self._owners[self._file_key(path)] != owner or file_size(self.folder / path) != size:
                return False
        return True

    def prepare(self) -> None:
        """Create the log and a folder for unfinished files; remove killed processes' ones.

        Raises OSError: nothing can be written there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked():  # other processes create and lock theirs under this lock, too
            for folder in self.folder.glob(".part-*"):
                remove_parts(folder)
            self._parts = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
            self._parts_lock = FileLock(self._parts / "lock")
            self._parts_lock.acquire()

    def close(self) -> None:
        """Remove the folder for unfinished files, and the log where nothing was written."""
        if self._parts_lock:
            self._parts_lock.release()
            remove_parts(self._parts)
            if file_size(self.path) == 0:
                with contextlib.suppress(OSError):
                    self.path.unlink()
                    Path(self._lock.lock_file).unlink()
                    self.folder.rmdir()

    def write(self, record: dict[str, Any], base: str, outputs: Sequence[OutputFile]) -> bool:
        """Write the files of a photo, and append its record with their paths and sizes.

        Where `base`, such as cats/33, is another photo's, or a file is in the way, it becomes
        cats/33_2. Returns False where another process has written the same meanwhile. Raises
        OSError: the disk is full, a name is too long ...
        """
        image = self._image_key(record)
        folder = self.folder / os.path.dirname(base)
        folder.mkdir(parents=True, exist_ok=True)
        if self._parts is None or not self._parts.is_dir():
            self.prepare()

        parts = [self._parts / str(number) for number in range(len(outputs))]
        try:
            for part, output in zip(parts, outputs, strict=True):
                part.write_bytes(output.content)

            with self.locked() as file:
                entry = self.entry(record["image"], record["method"])
                is_same = entry.options == record["options"]
                if is_same and entry.place >= self._start_size:
                    return False
                if is_same and entry.sizes and not outputs:  # drawn before; this run draws none
                    return True

                stem = self._find_stem(base, image, outputs)
                paths = file_paths(stem, outputs)
                add_files(record, outputs, paths)
                record["output_stem"] = stem
                self._append(file, record)

                # of a run that is killed here, the sizes of files do not fit its record
                for part, path in zip(parts, paths, strict=True):
                    os.replace(part, self.folder / path)
        finally:
            for part in parts:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        return True

    def _find_stem(self, base: str, image: str, outputs: Sequence[OutputFile]) -> str:
        """Return the beginning of a photo's file names: `base`, or `base` and a number."""
        candidates = [base]
        known = self._last_stem.get(image, "")
        if re.fullmatch(re.escape(base) + r"_\d+", known):
            candidates.insert(0, known)
        for stem in candidates:
            if self._is_free(stem, image, outputs):
                return stem

        for number in itertools.count(self._next_number.get(base, 2)):
            stem = f"{base}_{number}"
            if self._is_free(stem, image, outputs):
                self._next_number[base] = number + 1
                return stem

    def _is_free(self, stem: str, image: str, outputs: Sequence[OutputFile]) -> bool:
        """Return whether a photo's files may have names that begin so. Raises OSError."""
        if self._stems.get(self._file_key(stem), image) != image:
            return False
        for path in file_paths(stem, outputs):
            owner, _ = self._owners.get(self._file_key(path), (None, ""))
            if owner not in (None, image):
                return False
            with contextlib.suppress(FileNotFoundError):
                mode = os.lstat(self.folder / path).st_mode
                if owner is None or not stat.S_ISREG(mode):
                    return False
        return True

    def _append(self, file: io.FileIO, record: dict[str, Any]) -> None:
        """Append a line, all of it or none. Raises OSError: there is no room."""
        with contextlib.suppress(ValueError):  # another drive of Windows
            record["source"] = os.path.relpath(real_path(record["image"]), self._real_folder)
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        end = file.seek(0, os.SEEK_END)
        if end > self._position:  # half a line, of a process that was killed
            line = b"\n" + line
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_error(self, image: str, method: str, error: str) -> None:
        """Append the record of a photo that failed; without room, the next run will do so."""
        with contextlib.suppress(OSError), self.locked() as file:
            self._append(file, {"image": image, "method": method, "error": error})


def file_paths(stem: str, outputs: Sequence[OutputFile]) -> list[str]:
    """Return the paths of files below the log's folder, such as cats/gb_33.jpg for cats/33."""
    folder, slash, name = stem.rpartition("/")
    return [folder + slash + output.name.format(name) for output in outputs]


def add_files(record: dict[str, Any], outputs: Sequence[OutputFile], paths: Sequence[str]) -> None:
    """Put the paths and the sizes of files into a record."""
    for output, path in zip(outputs, paths, strict=True):
        record["sizes"][path] = len(output.content)
        owner = record
        if output.index is not None:
            owner = record["classes"][output.index]
        owner["files"][output.kind] = path


real_folder = functools.cache(os.path.realpath)


def real_path(path: str) -> str:
    """Return the absolute path of a file with the links to its folder resolved."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(real_folder(folder), name)


def remove_parts(folder: Path) -> None:
    """Remove a folder of unfinished files, unless a running process holds its lock."""
    lock = folder / "lock"
    with contextlib.suppress(OSError, Timeout):
        if folder.is_symlink() or lock.is_symlink():
            return
        if lock.exists():
            guard = FileLock(lock, timeout=0)
            guard.acquire()
            guard.release()
        for path in folder.iterdir():
            if re.fullmatch(r"\d+|lock|index\.html", path.name):  # as this program names them
                path.unlink()
        folder.rmdir()


# --------------------------------------------------------------------------------------------------
# 8  Gallery. A page of all results, made from the log alone: one file, no server, no network.
# --------------------------------------------------------------------------------------------------

PAGE_NAME = "index.html"
PAGE_MARK = b"made by cnn_visualizations.py"  # by which a later run knows its own page
HEAT_SIDE = 8  # a record keeps each map as 8 x 8 whole numbers


def heat_grid(cam: Floats) -> list[int]:
    """Return a map (H, W) in [0, 1] as 64 whole numbers from 0 to 100, row by row, for the record.

    Wherever there is any evidence the number is at least 1, so only an empty map gives 64 zeros.
    """
    small = cv2.resize(cam, (HEAT_SIDE, HEAT_SIDE), interpolation=cv2.INTER_AREA)
    hundredths = np.rint(100 * small).astype(int)
    return np.maximum(hundredths, small > 0).ravel().tolist()


def write_gallery(folder: Path, colormap: str = "jet") -> Path | None:
    """Write index.html, a page of what the log in a folder says; the colormap is of the mean maps.

    Return its path; None where the log has no photos. Raises OSError: the page cannot be written,
    or a page that is not ours is in the way.
    """
    page = folder / PAGE_NAME
    entries = read_entries(folder / LOG_NAME)
    if not entries:
        return None
    if os.path.lexists(page) and not is_own_page(page):
        raise FileExistsError(f"{page} is in the way: it was not made by this program")

    data = {
        "folder": folder.resolve().name,
        "colours": heat_colours(colormap),
        "means": mean_heat(entries),
        "items": [entry.item for entry in entries],
    }
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as parts:
        part = Path(parts, PAGE_NAME)
        part.write_bytes(fill_page(data))
        os.replace(part, page)
    return page


def is_own_page(page: Path) -> bool:
    """Return whether a file is a page that this program has written."""
    if not page.is_file():
        return False
    with open(page, "rb") as file:
        return PAGE_MARK in file.read(300)


def heat_colours(colormap: str) -> list[str]:
    """Return the colours of the heat 0, 1 ... 100, as "#00007f"."""
    levels = np.linspace(0, 255, 101).astype(np.uint8)[:, None]
    colours = cv2.applyColorMap(levels, COLORMAPS[colormap])
    return [f"#{red:02x}{green:02x}{blue:02x}" for blue, green, red in colours[:, 0]]


def fill_page(data: Mapping[str, Any]) -> bytes:
    """Return the page with its data; no text in the data can end the script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    page = PAGE.replace("STYLE", PAGE_STYLE, 1).replace("SCRIPT", PAGE_SCRIPT, 1)
    page = page.replace("DATA", text.replace("<", "\\u003c"), 1)
    return page.encode("utf-8", "backslashreplace")


@dataclass
class PageEntry:
    """What the page tells of one record."""

    item: dict[str, Any]  # as the page's script reads it
    heat: dict[str, bytes]  # method -> 64 numbers: the map of the predicted class, if there is one


def read_entries(log: Path) -> list[PageEntry]:
    """Return the last record of each photo and choice of methods; other lines are left out."""
    entries = {}
    left_out = 0

    with open(log, "rb") as lines:
        for line in lines:
            try:
                record = parse_record(line)
                entry = page_entry(record)
                entries[entry.item["source"], record["method"]] = entry
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
                left_out += 1

    if left_out:
        warn(f"{log}: lines left out of the page, not records of this program: {left_out}")
    return list(entries.values())


def page_entry(record: Mapping[str, Any]) -> PageEntry:
    """Return what the page tells of a record. Raises what `read_entries` catches."""
    item = {
        "path": record["image"],
        "source": source_link(record),
        "methods": record["method"].split(","),
        "state": "failed",
        "classes": [],
        "shown": 0,  # of the classes: the one whose map is on the card
    }
    made = PageEntry(item, {})
    if "error" in record:
        item["error"] = record["error"]
        return made

    prediction = record["prediction"]
    item["prediction"] = str(prediction["name"])
    item["state"] = "unknown"
    if "truth" in record:
        item["truth"] = str(record["truth"]["name"])
        is_right = record["truth"]["index"] == prediction["index"]
        item["state"] = "right" if is_right else "wrong"

    item["top"] = [likely_class(entry) for entry in record["top5"]]
    for place, entry in enumerate(record["classes"]):
        heat = class_heat(record, place)
        explained = likely_class(entry)
        explained["files"] = {kind: as_link(path) for kind, path in entry["files"].items()}
        explained["empty"] = [method for method in heat if not any(heat[method])]
        item["classes"].append(explained)
        if entry["index"] == prediction["index"] and "minus" not in entry:
            item["shown"] = place
            made.heat = heat

    item["size"] = [finite(record["width"]), finite(record["height"])]
    item["box"] = [finite(edge) for edge in record["box"]]
    left, top, right, bottom = item["box"]
    if min(right - left, bottom - top, *item["size"]) <= 0:
        raise ValueError("the photo or the part that the network saw is empty")
    return made


def likely_class(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name and the probability of a class, or the names of a difference of two."""
    name = str(entry["name"])
    if "minus" in entry:
        name += f" minus {entry['minus']['name']}"
    return {"name": name, "probability": round(finite(entry["probability"]), 6)}


def finite(value: Any) -> float:
    """Return a number of a record. Raises TypeError, ValueError, OverflowError: it is none."""
    if not math.isfinite(value):
        raise ValueError("infinite, or no number")
    return float(value)


def class_heat(record: Mapping[str, Any], place: int) -> dict[str, bytes]:
    """Return the 64 numbers of each method for one of the explained classes."""
    heat = {}
    for method, grids in record.get("heat", {}).items():
        grid = bytes(grids[place])
        if len(grid) != HEAT_SIDE**2 or max(grid) > 100:
            raise ValueError("not 64 numbers from 0 to 100")
        heat[method] = grid
    return heat


def mean_heat(entries: Iterable[PageEntry]) -> list[dict[str, Any]]:
    """Return the mean map of each method, predicted class and result (right, wrong, unknown)."""
    last = {}  # a photo counts once, also where several records have a map by the same method
    for entry in entries:
        for method, grid in entry.heat.items():
            group = (method, entry.item["prediction"], entry.item["state"])
            last[entry.item["source"], method] = (group, list(grid))

    groups = {}
    for group, grid in last.values():
        groups.setdefault(group, []).append(grid)

    means = []
    for (method, prediction, result), grids in groups.items():
        mean = {
            "method": method,
            "prediction": prediction,
            "result": result,
            "photos": len(grids),
            "grid": np.rint(np.mean(grids, 0)).astype(int).tolist(),
        }
        means.append(mean)
    return means


def source_link(record: Mapping[str, Any]) -> str:
    """Return the link from the page to a photo."""
    if "source" in record:
        return as_link(record["source"])
    return Path(os.path.abspath(record["image"])).as_uri()  # on another drive of Windows


def as_link(path: str) -> str:
    """Return a path as a link from the page; a byte that is not UTF-8 remains that byte."""
    path = path.replace(os.sep, "/")
    encodable = re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", path)
    return "./" + quote(os.fsencode(encodable))


PAGE = """<!doctype html>
<html lang="en" class="heat">
<meta charset="utf-8">
<meta name="generator" content="made by cnn_visualizations.py">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'; base-uri 'none'">
<title>Heatmaps</title>
<style>
STYLE</style>
<h1></h1>
<p id="summary"></p>
<noscript>This page needs JavaScript.</noscript>
<details id="means">
  <summary>Mean heat of each predicted class</summary>
  <p>The mean of the maps of all photos with this prediction: a hot corner or edge that a whole
    class shares is a label or a border, not the object.</p>
  <div class="row"></div>
</details>
<details id="mistakes" open>
  <summary>Most frequent mistakes: true class → predicted class</summary>
  <div class="row"></div>
</details>
<form></form>
<p role="status"></p>
<main></main>
<dialog aria-labelledby="path">
  <nav><h2 id="path"></h2></nav>
  <div></div>
</dialog>
<script id="data" type="application/json">DATA</script>
<script>
SCRIPT</script>
</html>
"""

PAGE_STYLE = """\
:root {
  color-scheme: light dark;
  --page: light-dark(#f5f6f8, #14171b);
  --card: light-dark(#fff, #1e2227);
  --line: light-dark(#d8dce2, #383f48);
  --text: light-dark(#1b1f24, #e8eaed);
  --soft: light-dark(#59626e, #a3abb6);
  --mark: light-dark(#2459c4, #8ab0fb);
  --state: var(--mark);
}
.right { --state: light-dark(#187642, #68cb8c); }
.wrong, .failed { --state: light-dark(#be2e20, #ff8672); }

[hidden] { display: none; }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit; }
html, dialog { background: var(--page); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
html:has(dialog[open]) { overflow: hidden; }
body { max-width: 1640px; margin: auto; padding: 20px clamp(12px, 2.5vw, 32px); }
h1, h2, h3, summary { font-weight: 600; }
h1 { font-size: 24px; }
h3, summary { margin: 14px 0 6px; }
small, figcaption, label { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
button, select, input { min-height: 36px; padding: 5px 10px; border-radius: 7px; }
button, select, input { background: var(--card); border: 1px solid var(--line); }
button:hover, [aria-pressed="true"] { border-color: var(--mark); color: var(--mark); }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }

/* Names of files and classes, of any length and direction: one line. */
.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; unicode-bidi: isolate; }
.row { display: flex; flex-wrap: wrap; gap: 8px; }
.verdict, #means small { color: var(--state); overflow-wrap: anywhere; }
#means section { max-width: 200px; margin-right: 12px; }
#means button { margin-right: 6px; padding: 5px; }
canvas { display: block; width: 72px; height: 72px; margin: auto; }

form, nav { position: sticky; top: 0; z-index: 1; padding: 12px 0; background: var(--page); }
form, nav { display: flex; flex-wrap: wrap; align-items: end; gap: 10px 12px; }
nav h2 { flex: 1 0 100%; overflow-x: auto; white-space: nowrap; unicode-bidi: isolate; }
label { display: grid; }
select, input { width: 175px; }

main { display: grid; gap: 14px; padding-top: 12px; }
main { grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); }
.card { --limit: 260px; display: grid; gap: 3px; align-content: start; }
.card { padding: 0 0 10px; overflow: hidden; text-align: left; }
.card > * { min-width: 0; }
.card > :not(.frame) { padding: 0 11px; }
.chance { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 3px 8px; }
.bar { grid-column: 1 / 3; height: 5px; }
.bar { background: linear-gradient(var(--state) 0 0) no-repeat var(--line); }

dialog { width: 100%; height: 100%; max-width: none; max-height: none; border: 0; }
dialog { --limit: 70vh; padding: 0 2.5vw 24px; }
dialog p, dialog h3 { overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 14px; }
figcaption { text-align: center; }

/* A picture in its own shape, at most --limit high, and what lies over it. */
.frame { position: relative; display: grid; place-items: center; overflow: hidden; }
.frame { aspect-ratio: var(--ratio); width: min(100%, var(--limit) * var(--ratio)); }
.frame { margin: 0 auto; background: var(--line); }
img { width: 100%; height: 100%; }
.plain, .seen, .note { position: absolute; }
.heat .plain { display: none; }
.seen { outline: 2px solid #fff; box-shadow: 0 0 0 9999px rgb(0 0 0 / 55%); }
.note { inset: auto 0 0; padding: 4px; background: rgb(0 0 0 / 70%); color: #fff; }
.note { text-align: center; }

@media (max-width: 700px) {
  form { position: static; }
  label { flex: 1 1 40%; }
  select, input { width: 100%; }
  .figures { grid-template-columns: 1fr 1fr; }
}
"""

PAGE_SCRIPT = r"""
"use strict";

const find = (selector) => document.querySelector(selector);
const { folder, colours, means, items } = JSON.parse(find("#data").textContent);
const [main, form, dialog] = ["main", "form", "dialog"].map(find);

const AT_MOST = 30; // classes with mean maps, and frequent mistakes
const MOST_CARDS = 500;

let list = []; // the items that pass the filters, in order
let position = 0; // in the list: the item that the dialog shows

// Return a new element; `kind` is its tag with its classes, as "span.bar". Text stays text.
function make(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  Object.assign(element, { className: classes.join(" "), ...properties });
  element.append(...children);
  return element;
}

const nameLine = (tag, text) => make(`${tag}.name`, { title: text }, text);
const percent = (share) => `${(100 * share).toFixed(1)}%`;

// Return pairs of each value and the number of times it occurs, the most frequent first.
function countValues(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].sort((one, other) => other[1] - one[1]);
}

const byPath = new Intl.Collator("en", { numeric: true }).compare; // 9.jpg before 10.jpg
items.sort((one, other) => byPath(one.path, other.path));

// Each photo once, as its last record has it.
const photos = [...new Map(items.map((item) => [item.source, item])).values()];
const mistakes = photos.filter((item) => item.state === "wrong");
const withTruth = photos.filter((item) => item.truth !== undefined);

// ---- Pictures

function picture(source, description) {
  const replace = (event) => event.target.replaceWith("no picture");
  return make("img", { loading: "lazy", alt: description, src: source, onerror: replace });
}

function pictureFrame(width, height, image) {
  return make("span.frame", { style: `--ratio: ${width / height}` }, image);
}

// Return the style that puts an element at a place in its frame; all are shares of the frame.
function placed(left, top, width, height) {
  const shares = Object.entries({ left, top, width, height });
  return shares.map(([name, share]) => `${name}: ${100 * share}%`).join("; ");
}

// Return the photo; a frame shows which part of it the network saw.
function sourcePicture(item) {
  const [width, height] = item.size ?? [1, 1];
  const [left, top, right, bottom] = item.box ?? [0, 0, 1, 1];
  const frame = pictureFrame(width, height, picture(item.source, "source"));
  const seen = [(right - left) / width, (bottom - top) / height];
  if (Math.min(...seen) < 0.99) {
    frame.append(make("span.seen", { style: placed(left / width, top / height, ...seen) }));
  }
  return frame;
}

// Return a picture of an explained class; over a map lies the photo, see toggleHeat.
function classPicture(item, explained, kind) {
  const [left, top, right, bottom] = item.box;
  const [width, height] = [right - left, bottom - top];
  const frame = pictureFrame(width, height, picture(explained.files[kind], kind));
  if (kind.endsWith("_cam")) {
    const plain = picture(item.source, "");
    plain.className = "plain";
    const [across, down] = [item.size[0] / width, item.size[1] / height];
    plain.style = placed(-left / width, -top / height, across, down);
    frame.append(plain);
  }
  if (explained.empty.some((method) => kind.startsWith(`${method}_cam`))) {
    frame.append(make("span.note", {}, `no positive evidence for ${explained.name}`));
  }
  return frame;
}

function toggleHeat() {
  const isOn = document.documentElement.classList.toggle("heat");
  for (const button of document.querySelectorAll(".toggle")) button.ariaPressed = isOn;
}

const button = (text, onclick) => make("button", { type: "button", onclick }, text);

function heatButton() {
  const properties = { type: "button", ariaPressed: true, onclick: toggleHeat };
  return make("button.toggle", properties, "Heat (H)");
}

// ---- Cards

function chanceBar({ top: [{ name, probability }], state }) {
  const bar = make("span.bar", { style: `background-size: ${percent(probability)}` });
  return make(`span.chance.${state}`, {}, nameLine("span", name), percent(probability), bar);
}

function verdict(item) {
  const texts = { right: "✓ right", wrong: `✕ true: ${item.truth}`, failed: `✕ ${item.error}` };
  return make(`span.verdict.${item.state}`, {}, texts[item.state] ?? "");
}

function card(item) {
  const onclick = () => showItem(list.indexOf(item));
  const element = make("button.card", { title: item.path, onclick });
  const explained = item.classes[item.shown];
  const method = form.Method.value || item.methods[0];
  const kinds = [`${method}_cam`, `${method}_cam_gb`, "gb"];
  const kind = kinds.find((kind) => explained?.files[kind]);

  if (kind) element.append(classPicture(item, explained, kind));
  if (item.top) element.append(chanceBar(item));
  element.append(verdict(item), nameLine("small", item.path.split(/[\\/]/).at(-1)));
  if (kind) element.append(make("small", {}, `${kind} for ${explained.name}`));
  return element;
}

// ---- Filters

// The fields of the form; of an item's values there one must be the field's.
const FILTERS = {
  Result: (item) => [item.state],
  "True class": (item) => [item.truth],
  "Predicted class": (item) => [item.prediction],
  Method: (item) => item.methods,
};

// What is sorted by, the smallest first; items of equal value stay in the order of their paths.
const certainty = (item) => item.top?.[0].probability ?? 2; // 2: a photo that failed comes last
const ORDERS = {
  "surest mistakes first": (item) => certainty(item) * (item.state === "wrong" ? -1 : 1),
  "least sure first": certainty,
  path: () => 0,
};

function passes(item, wanted) {
  for (const [name, valuesOf] of Object.entries(FILTERS)) {
    if (wanted[name] && !valuesOf(item).includes(wanted[name])) return false;
  }
  const text = [item.path, item.error, item.truth, item.prediction].join("\n");
  return text.toLowerCase().includes(wanted.Text.toLowerCase());
}

// Show the cards that the form asks for.
function showCards() {
  const wanted = Object.fromEntries(new FormData(form));
  const value = ORDERS[wanted.Order];
  list = items.filter((item) => passes(item, wanted));
  list.sort((one, other) => value(one) - value(other));

  const limit = list.length > MOST_CARDS ? `, the first ${MOST_CARDS} are shown` : "";
  find("[role=status]").textContent = `${list.length} of ${items.length}${limit}`;
  showMeans(wanted.Method || means[0]?.method);
  if (main.getBoundingClientRect().top < 0) form.scrollIntoView();
  main.replaceChildren(...list.slice(0, MOST_CARDS).map(card));
}

// Show the cards with these values of the form's fields, whatever was chosen before.
function choose(values) {
  form.reset();
  for (const name in values) form[name].value = values[name];
  showCards();
}

function selectField(name, options) {
  return make("label", {}, name, make("select", { name }, ...options));
}

function filterField(name) {
  const values = items.flatMap(FILTERS[name]).filter((value) => value !== undefined);
  const counts = countValues(values);
  const options = counts.map(([value, count]) => new Option(`${value} (${count})`, value));
  const field = selectField(name, [new Option("all", ""), ...options]);
  field.hidden = options.length < 2;
  return field;
}

function buildForm() {
  const orders = Object.keys(ORDERS).slice(withTruth.length ? 0 : 1);
  form.append(...Object.keys(FILTERS).map(filterField));
  form.append(selectField("Order", orders.map((order) => new Option(order))));
  form.append(make("label", {}, "Text", make("input", { name: "Text", type: "search" })));
  form.append(button("Show all", () => choose({})), heatButton());
  form.oninput = showCards;
  form.onsubmit = () => false;
}

// ---- Mean heat of the predicted classes, and frequent mistakes

function drawGrid(grid) {
  const side = Math.sqrt(grid.length);
  const canvas = make("canvas", { width: side, height: side });
  const context = canvas.getContext("2d");
  grid.forEach((heat, place) => {
    context.fillStyle = colours[heat];
    context.fillRect(place % side, Math.floor(place / side), 1, 1);
  });
  return canvas;
}

function meanButton({ method, prediction, result, photos, grid }) {
  const values = { "Predicted class": prediction, Result: result, Method: method };
  const caption = `${photos} ${result === "unknown" ? "photos" : result}`;
  const onclick = () => choose(values);
  return make(`button.${result}`, { onclick }, drawGrid(grid), make("small", {}, caption));
}

// Show the mean maps of a method, of the classes with most mistakes first.
function showMeans(method) {
  const area = find("#means .row");
  if (area.dataset.method === method) return;
  area.dataset.method = method;
  area.replaceChildren();

  const ofMethod = means.filter((mean) => mean.method === method);
  const worst = countValues(mistakes.map((item) => item.prediction));
  const largest = countValues(photos.map((item) => item.prediction));
  const names = new Set([...worst, ...largest].map(([name]) => name));
  for (const name of [...names].slice(0, AT_MOST)) {
    const ofClass = ofMethod.filter((mean) => mean.prediction === name);
    ofClass.sort((one, other) => one.result.localeCompare(other.result));
    if (ofClass.length) {
      area.append(make("section", {}, nameLine("h3", name), ...ofClass.map(meanButton)));
    }
  }
}

function showMistakes() {
  const pairs = countValues(mistakes.map((item) => JSON.stringify([item.truth, item.prediction])));
  for (const [pair, count] of pairs.slice(0, AT_MOST)) {
    const [truth, prediction] = JSON.parse(pair);
    const values = { "True class": truth, "Predicted class": prediction };
    const label = `${truth} → ${prediction}: ${count}`;
    find("#mistakes .row").append(button(label, () => choose(values)));
  }
}

// ---- The dialog: all pictures of an item

function figure(link, caption, frame) {
  const content = make("figure", {}, frame, make("figcaption", {}, caption));
  return make("a", { href: link, target: "_blank" }, content);
}

// Return the pictures of a class side by side: source, cam, gb, cam_gb, then further methods.
function figures(item, explained) {
  const row = make("div.figures", {}, figure(item.source, "source", sourcePicture(item)));
  const kinds = item.methods.flatMap((method) => [`${method}_cam`, `${method}_cam_gb`]);
  kinds.splice(1, 0, "gb");
  for (const kind of kinds) {
    const link = explained?.files[kind];
    if (link) row.append(figure(link, kind, classPicture(item, explained, kind)));
  }
  return row;
}

function showItem(index) {
  position = Math.max(0, Math.min(index, list.length - 1));
  const item = list[position];
  const likely = (item.top ?? []).map(({ name, probability }) => `${name} ${percent(probability)}`);
  const content = item.classes.flatMap((explained) => [
    nameLine("h3", `${explained.name}, ${percent(explained.probability)}`),
    figures(item, explained),
  ]);
  if (!content.length) content.push(figures(item));

  find("#path").textContent = item.path;
  const top = make("p", {}, likely.join(", "));
  find("dialog > div").replaceChildren(verdict(item), top, ...content);
  if (!dialog.open) dialog.showModal();
}

function closeDialog() {
  dialog.close();
  main.children[position]?.focus();
}

const previous = () => showItem(position - 1);
const next = () => showItem(position + 1);
const KEYS = { ArrowLeft: previous, ArrowRight: next, Escape: closeDialog };

document.onkeydown = (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (dialog.open) KEYS[event.key]?.();
  if (event.key.toLowerCase() === "h" && !event.target.matches("input, select")) toggleHeat();
};

// ---- Start

const count = (state) => photos.filter((item) => item.state === state).length;
let summary = `${photos.length} photos, ${count("failed")} failed`;
if (withTruth.length) {
  summary += `, ${percent(count("right") / withTruth.length)} of ${withTruth.length} right`;
}
find("#summary").textContent = summary;
document.title = find("h1").textContent = `Heatmaps in ${folder}`;

buildForm();
showMistakes();
find("#means").hidden = !means.length;
find("#means").open = innerWidth > 700;
find("#mistakes").hidden = !mistakes.length;
find("nav").append(heatButton(), button("Previous (←)", previous), button("Next (→)", next));
find("nav").append(button("Close (Esc)", closeDialog));
showCards();
"""


# --------------------------------------------------------------------------------------------------
# 9  Run. Threads read, one explains, threads write; a photo that fails stops nothing.
# --------------------------------------------------------------------------------------------------

THREADS = min(4, os.cpu_count() or 1)  # that read, and as many that draw
FEW = 4  # photos for which folding the batch norms takes longer than it saves
EMPTY_MAPS = 10  # that have a warning of their own
NOT_IN_RESULTS = {  # options that change no picture and no record
    *("images", "ckpt", "device", "batch_size", "output"),
    *("skip_existing", "only_wrong", "gallery"),
}


@dataclass(frozen=True)
class Task:
    """A photo that is to be explained."""

    photo: Photo
    options: str  # a hash of the options and of all files that are read, see `with_options`


@dataclass
class Item:
    """A photo on its way through the program; each step fills in what it finds, or `error`."""

    task: Task
    path: str
    truth: int | None  # see true_class
    size: tuple[int, ...] = (0, 0)  # height and width of the photo
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # the seen part, in its pixels
    picture: Picture | None = None  # that part, to draw on
    inputs: Tensor | None = None  # that part as the network gets it, (3, H, W)
    explanation: Explanation | None = None  # (1, K, ...)
    record: dict[str, Any] = field(default_factory=dict)  # its line in the log
    outputs: list[OutputFile] = field(default_factory=list)
    error: str = ""  # one line


@dataclass(frozen=True)
class Job:
    """What is done with every photo: the command line, the network, and the classes to explain."""

    args: argparse.Namespace
    classifier: Classifier
    explainer: Explainer
    targets: list[int]  # indices, PREDICTED or TRUTH; empty: the `top` likeliest classes
    top: int | None  # None: all labels of probability 0.5 and more
    minus: list[int]  # what is subtracted from each target; the target itself where nothing is
    labels: Sequence[str] | None  # of all classes, for file names; None: no class stands in them
    font: Any  # for the sheet
    glyphs: set[str]  # characters that the font has
    shown: Sequence[str]  # class names, or their indices where the font lacks a character


@dataclass
class Tally:
    """What has become of the photos."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    empty_maps: int = 0
    classes: int = 0  # of the network; 0: it was not loaded, or its outputs are labels


def prefetch(
    function: Callable[[Any], Any], items: Iterable[Any], depth: int, threads: int
) -> Iterator[Any]:
    """Map `function` over `items` in threads, `depth` ahead, in order.

    What was begun before an error is yielded before it is raised.
    """
    pool = ThreadPoolExecutor(threads)
    pending = deque[Future[Any]]()
    error: BaseException | None = None
    items = iter(items)

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


# Before the first photo


def with_options(args: argparse.Namespace, photos: Iterable[Photo]) -> list[Task]:
    """Return the photos, each with a hash of the options and of the files that are read for it."""
    ignored = set(NOT_IN_RESULTS)
    if not (args.sheet or args.save_arrays):
        ignored.add("methods")  # which only these files share
    options = []
    for name, value in sorted(vars(args).items()):
        if name not in ignored:
            options.append((name, str(value)))

    ckpt = os.path.realpath(args.ckpt or "")
    own_network = (args.arch or "").rpartition(":")[0]
    shared = repr((options, ckpt, signature(ckpt), signature(own_network)))

    tasks = []
    for photo in photos:
        text = f"{shared} {signature(photo.path)}".encode("utf-8", "backslashreplace")
        tasks.append(Task(photo, hashlib.sha256(text).hexdigest()[:16]))
    return tasks


def signature(path: str) -> tuple[int, int]:
    """Return size and time of a file, which change with it, or zeros where there is none."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return 0, 0


def load_job(request: Request, count: int) -> Job:
    """Load the network for `count` photos; print what is assumed about it. Raises CallError."""
    args = request.args
    if args.colormap not in COLORMAPS:
        hint = closest(args.colormap, COLORMAPS) or f" (known: {', '.join(COLORMAPS)})"
        raise CallError(f"unknown colormap '{args.colormap}'{hint}")

    classifier = load_classifier(
        args.arch,
        args.ckpt,
        args.num_classes,
        choose_device(request),
        class_names=args.class_names,
        input_size=args.input_size,
        resize=args.resize,
        mean=args.mean,
        std=args.std,
        multi_label=args.multi_label or None,
        folders=class_folders(request.photos),
    )
    names = classifier.class_names
    targets, minus = find_targets(request, classifier)
    explainer = make_explainer(args, classifier, count)
    print_assumptions(request, classifier, explainer)

    top = args.top_k
    if top is None and not classifier.multi_label:
        top = 1
    labels = file_labels(names) if targets or top != 1 else None
    font, glyphs = find_font(names) if args.sheet else (None, set())
    shown = [name if glyphs.issuperset(name) else str(index) for index, name in enumerate(names)]
    return Job(args, classifier, explainer, targets, top, minus, labels, font, glyphs, shown)


def print_assumptions(request: Request, classifier: Classifier, explainer: Explainer) -> None:
    """Print the first line, once on each machine: what is assumed about the network."""
    told = classifier.describe(explainer.target_layers)
    if request.world_size > 1:
        told += f", process {request.rank} of {request.world_size}"
    if request.local_rank == 0:
        print_line(told, sys.stderr)


def class_folders(photos: Iterable[Photo]) -> list[str]:
    """Return the names of the folders with photos directly below the folders that were given."""
    names = set()
    for photo in photos:
        if photo.top:
            inner = Path(photo.path).relative_to(photo.top).parts[:-1]
            names.update(inner[:1])
    return sorted(names)


def choose_device(request: Request) -> str | None:
    """Return the device to compute on; torchrun starts a process for each GPU."""
    device = request.args.device
    if request.world_size > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{request.local_rank}"
    return device


def find_targets(request: Request, classifier: Classifier) -> tuple[list[int], list[int]]:
    """Return `Job.targets` and `Job.minus`.

    Raises CallError: there is no such class, or no photo's true class is known.
    """
    names = classifier.class_names
    targets = []
    minus = []
    for wanted in request.args.target_classes or ():
        target, subtracted = find_difference(wanted, names)
        targets.append(target)
        minus.append(subtracted)

    if request.args.only_wrong or TRUTH in targets:
        if classifier.multi_label:
            raise CallError("a photo with labels has no single true class, so none can be wrong")
        if all(truth_of(photo, classifier) is None for photo in request.photos):
            told = f"no photo's folder is named after a class ({', '.join(names[:8])})"
            raise CallError(f"{told}, so no truth is known")
    return targets, minus


def truth_of(photo: Photo, classifier: Classifier) -> int | None:
    """Return a photo's true class, or None where it is not known or its classes are labels."""
    if classifier.multi_label:
        return None
    return true_class(photo.path, classifier.class_names, photo.top)


def make_explainer(args: argparse.Namespace, classifier: Classifier, count: int) -> Explainer:
    """Return what explains the photos; it takes over the network. Raises CallError: it fails."""
    bar = partial(tqdm, desc=",".join(args.methods), unit="pass", leave=False, disable=None)
    explainer = Explainer(
        classifier.model,
        args.methods,
        args.target_layers,
        guided=args.outputs != ["cam"],
        aug_smooth=args.aug_smooth,
        eigen_smooth=args.eigen_smooth,
        progress=bar,
        copy=False,
        fold=count > FEW,
        multi_label=classifier.multi_label,
    )

    height, width = classifier.input_size
    shape = (1, classifier.channels, height, width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        explainer.prepare(noise)
    except Exception as error:
        if isinstance(error, CallError) or is_out_of_memory(error):
            raise
        fault = f"fails at inputs of {height} x {width}: {first_line(error)}"
        raise CallError(f"{classifier.arch} {fault}; pass another --input-size") from error
    return explainer


def list_layers(request: Request) -> int:
    """Print the layers with a spatial map. Returns the exit status; raises CallError."""
    explainer = load_job(request, 1).explainer
    for name, (kind, shape) in explainer.layers.items():
        size = " x ".join(map(str, shape))
        if name in explainer.target_layers:
            size += "   (default)"
        print_line(f"{name:40} {kind:24} {size}")
    return 0


# Each photo


def read_item(task: Task, job: Job) -> Item:
    """Read a photo, and keep only what is needed further on, so that large photos use no memory."""
    path = task.photo.path
    classifier = job.classifier
    item = Item(task, path, truth_of(task.photo, classifier))
    short_side = 0 if classifier.squash else classifier.preset.resize_size[0]
    try:
        with open_photo(path, short_side) as photo:
            item.size = photo.shape[:2]
            item.box = classifier.seen_box(*item.size)
            seen = classifier.seen(photo)
            item.picture = resized(seen, job.args.output_size or default_size(seen))
            item.inputs = classifier.preprocess(photo)
    except PhotoError as error:
        item.error = str(error)
    except (cv2.error, MemoryError) as error:
        item.error = f"{path}: cannot be prepared: {first_line(error)}"
    return item


def default_size(seen: Picture) -> int:
    """Return the long side of the pictures: up to 1024, with a short side of 224 and more."""
    short_side, long_side = sorted(seen.shape[:2])
    return min(1024, max(long_side, round(224 * long_side / short_side)))


def explain_items(items: Iterator[Item], job: Job, batch_size: BatchSize) -> Iterator[Item]:
    """Yield the items with their explanations or errors, in order. Raises CallError."""
    while batch := list(itertools.islice(items, batch_size.size)):
        readable = [item for item in batch if not item.error]
        for _ in batch_size.run(partial(try_to_explain, job=job), readable):
            pass
        yield from batch


def try_to_explain(items: Sequence[Item], job: Job) -> None:
    """Explain a batch; where the network fails, explain each photo alone, to find the one at fault.

    Raises CallError: the GPU has failed. Raises what a batch raises for too little memory.
    """
    try:
        explain(items, job)
    except CallError:
        raise
    except Exception as error:  # a network of the user's own may raise anything
        out_of_memory = is_out_of_memory(error)
        if out_of_memory and len(items) > 1:
            raise
        if re.search("(CUDA|HIP) error", str(error)) and not out_of_memory:
            fault = f"the GPU has failed: {first_line(error)}"
            raise CallError(f"{fault}; go on with --skip-existing") from error

        if len(items) == 1:
            items[0].error = f"{items[0].path}: the network failed: {first_line(error)}"
            return
        for item in items:
            try_to_explain([item], job)


def explain(items: Sequence[Item], job: Job) -> None:
    """Fill in explanations and records of photos; --only-wrong: records alone of right ones."""
    if job.args.only_wrong:
        items = predict(items, job)
        if not items:
            return

    inputs = torch.stack([item.inputs for item in items])
    targets = None
    minus = None
    if job.targets:
        targets = [targets_of(item, job.targets) for item in items]
        minus = [targets_of(item, job.minus) for item in items]
    elif job.top is None:
        targets = likely_labels(job.explainer.logits(inputs))
    explanation = job.explainer(inputs, targets, top=job.top, minus=minus)

    for index, item in enumerate(items):
        item.explanation = explanation.only(index)
        describe_item(item, job)


def predict(items: Sequence[Item], job: Job) -> list[Item]:
    """Fill in the records of photos from their predictions; return those predicted wrong."""
    inputs = torch.stack([item.inputs for item in items])
    logits = job.explainer.logits(inputs).cpu().numpy()
    if not np.isfinite(logits).all():
        raise ValueError("the logits are NaN or infinite")

    wrong = []
    for item, row in zip(items, logits[:, None], strict=True):
        best = row.argmax(1, keepdims=True)
        item.explanation = Explanation({}, None, row, best, best)
        describe_item(item, job)
        if item.record.get("right") is False:
            wrong.append(item)
    return wrong


def targets_of(item: Item, targets: Sequence[int]) -> list[int]:
    """Return the classes to explain for a photo, with its true class in the place of TRUTH."""
    truth = item.truth
    if truth is None:
        truth = PREDICTED
    if truth == PREDICTED and TRUTH in targets:
        text = "where the folder is not named after a class, the prediction is explained instead"
        warn(f"{text} of the truth")
    return [truth if target == TRUTH else target for target in targets]


def likely_labels(logits: Tensor) -> Tensor:
    """Return the labels of probability 0.5 and more, or the likeliest one: (N, K).

    Rows with fewer than K labels are filled up with their first one. The logits are (N, labels).
    """
    counts = (logits >= 0).sum(1, keepdim=True).clamp(min=1)
    order = logits.argsort(1, descending=True)[:, : int(counts.max())]
    places = torch.arange(order.shape[1], device=order.device)
    return torch.where(places < counts, order, order[:, :1])


def describe_item(item: Item, job: Job) -> None:
    """Make the record of a photo that was explained, with the metrics if they are asked for."""
    classifier = job.classifier
    explained, top5 = describe_classes(item.explanation, classifier)

    height, width = item.size
    record = {
        "image": item.path,
        "width": width,
        "height": height,
        "method": ",".join(job.args.methods),
        "prediction": top5[0],
        "classes": explained,
        "top5": top5,
        "multi_label": classifier.multi_label,
        "target_layer": ",".join(job.explainer.target_layers),
        "options": item.task.options,
        "input_size": list(classifier.input_size),
        "resize": job.args.resize,
        "box": [round(edge, 2) for edge in item.box],
        "mean": [round(value, 6) for value in classifier.preset.mean],
        "std": [round(value, 6) for value in classifier.preset.std],
        "heat": {},
        "files": {},
        "sizes": {},
    }
    if item.truth is not None:
        record["truth"] = {"index": item.truth, "name": classifier.class_names[item.truth]}
        record["right"] = item.truth == top5[0]["index"]
    for method, cams in item.explanation.cams.items():
        record["heat"][method] = [heat_grid(cam) for cam in cams[0]]

    item.record = record
    if job.args.metrics:
        record["metrics"] = measure_item(item, job)


def describe_classes(
    explanation: Explanation, classifier: Classifier
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the record's entries of the explained classes and of the five likeliest ones."""
    names = classifier.class_names
    logits = torch.from_numpy(explanation.logits)
    p = probabilities(logits, classifier.multi_label)[0].tolist()

    def describe(index: int) -> dict[str, Any]:
        return {"index": index, "name": names[index], "probability": round(p[index], 6)}

    explained = [describe(index) for index in explanation.targets[0].tolist()]
    for entry, minus in zip(explained, explanation.minus[0].tolist(), strict=True):
        entry["files"] = {}
        if minus != entry["index"]:
            entry["minus"] = {"index": minus, "name": names[minus]}

    order = logits[0].argsort(descending=True, stable=True)
    return explained, [describe(index) for index in order[:5].tolist()]


def measure_item(item: Item, job: Job) -> list[dict[str, Any]]:
    """Return the metrics of each map of a photo."""
    measured = []
    for index, entry in enumerate(item.record["classes"]):
        subject = subject_of(entry, job.classifier.class_names)
        for method, cams in item.explanation.cams.items():
            cam = cams[0, index]
            metrics = faithfulness(job.explainer, item.inputs[None], cam, entry["index"])
            measured.append({"class": subject, "method": method, **metrics})
    return measured


def subject_of(entry: Mapping[str, Any], names: Sequence[str], minus: str = " minus ") -> str:
    """Return what a map of a class in the record is of: its name, or "cat minus dog"."""
    subject = names[entry["index"]]
    if "minus" in entry:
        subject += minus + names[entry["minus"]["index"]]
    return subject


# Drawing


def draw_item(item: Item, job: Job) -> Item:
    """Fill in the contents of a photo's files."""
    if item.error or not item.explanation.cams:
        return item
    try:
        item.outputs = make_outputs(item, job)
    except (cv2.error, MemoryError) as error:
        item.error = f"{item.path}: cannot be drawn: {first_line(error)}"
    item.picture = None
    item.inputs = None
    return item


def make_outputs(item: Item, job: Job) -> list[OutputFile]:
    """Return the files of a photo that was explained."""
    args = job.args
    outputs = []
    blocks = []
    for index, entry in enumerate(item.record["classes"]):
        pictures, columns = draw_class(item, job, index)
        outputs += pictures
        blocks.append((f"explained: {with_probability(entry, job.shown)}", columns))

    if args.sheet:
        sheet = draw_sheet(sheet_title(item, job), blocks, job.font, args.colormap)
        content = encode(sheet, args.format, args.quality)
        outputs.append(OutputFile("sheet", None, f"{{}}_sheet.{args.format}", content))
    if args.save_arrays:
        outputs.append(OutputFile("arrays", None, "{}.npz", pack_arrays(item, job)))
    return outputs


def draw_class(item: Item, job: Job, index: int) -> tuple[list[OutputFile], list[list[Cell]]]:
    """Return the pictures of one explained class of a photo, as files and as columns of a sheet."""
    args = job.args
    look = {"colormap": args.colormap, "alpha": args.alpha, "fade": args.fade}
    ending = f".{args.format}"
    if job.labels:
        ending = f"_{subject_of(item.record['classes'][index], job.labels, '-minus-')}{ending}"

    files = []
    columns = {"": [Cell("source", item.picture)]}  # by method; gb stands below the source
    for output in args.outputs:
        for method in [""] if output == "gb" else args.methods:
            picture = draw(output, item.explanation, item.picture, method, index, **look)
            kind = f"{method}_{output}".lstrip("_")
            content = encode(picture, args.format, args.quality)
            files.append(OutputFile(kind, index, f"{kind}_{{}}{ending}", content))

            note = ""
            if method and not item.explanation.cams[method][0, index].any():
                note = "no positive evidence"
            cell = Cell(f"{method} {output}".lstrip(), picture, note)
            columns.setdefault(method, []).append(cell)
    return files, list(columns.values())


def sheet_title(item: Item, job: Job) -> str:
    """Return the line on top of a sheet; a character that the font lacks is shown as ?."""
    name = "".join(c if c in job.glyphs else "?" for c in os.path.basename(item.path))
    prediction = with_probability(item.record["prediction"], job.shown)
    if item.record.get("right") is False:
        prediction += f" (truth: {job.shown[item.truth]})"
    return f"{name}   prediction: {prediction}   layer: {item.record['target_layer']}"


def encode(picture: Picture, ending: str, quality: int) -> bytes:
    """Return a picture as a file of that format."""
    options = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "webp": cv2.IMWRITE_WEBP_QUALITY}
    flags = [options[ending], quality] if ending in options else []
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(f".{ending}", bgr, flags)
    return encoded.tobytes()


def pack_arrays(item: Item, job: Job) -> bytes:
    """Return an explanation as an .npz file; README.md has the shapes."""
    explanation = item.explanation
    arrays = {
        "methods": job.args.methods,
        "classes": explanation.targets[0],
        "minus": explanation.minus[0],
        "cams": [explanation.cams[method][0] for method in job.args.methods],
        "logits": explanation.logits[0],
        "class_names": job.classifier.class_names,
        "target_layers": job.explainer.target_layers,
        "box": item.box,
    }
    if explanation.guided is not None:
        arrays["guided"] = explanation.guided[0]

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# Saving and telling


def save_item(item: Item, job: Job, log: Log, tally: Tally) -> None:
    """Write the files and the record of a photo, print its line, and count it."""
    if not item.error:
        base = "/".join([*Path(item.task.photo.folder).parts, Path(item.path).stem])
        try:
            written = log.write(item.record, base, item.outputs)
        except OSError as error:
            item.error = f"{item.path}: its results cannot be written: {error.strerror or error}"

    if item.error:
        log.write_error(item.path, ",".join(job.args.methods), item.error)
        print_line(f"error: {item.error}", sys.stderr)
        tally.failed += 1
    elif not written:
        tally.skipped += 1
    else:
        tally.done += 1
        print_result(result_line(item, job))
        warn_of_empty_maps(item, job, tally)


def print_result(line: str) -> None:
    """Print a line on stdout; when its reader has gone, as in `| head`, the run goes on."""
    try:
        print_line(line)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
            raise
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def result_line(item: Item, job: Job) -> str:
    """Return what is printed of a photo: prediction, explained classes, metrics and files."""
    record = item.record
    names = job.classifier.class_names
    prediction = with_probability(record["prediction"], names)
    if record.get("right") is False:
        prediction += f" (truth: {record['truth']['name']})"
    told = [prediction]

    explained = [with_probability(entry, names) for entry in record["classes"]]
    if explained != [with_probability(record["prediction"], names)]:
        told.append(f"explained: {', '.join(explained)}")

    for measured in record.get("metrics", ()):
        subject = measured["method"]
        if len(explained) > 1:
            subject += f" for {measured['class']}"
        told.append(f"{subject}: {format_metrics(measured)}")

    files = [str(job.args.output / path) for path in record["sizes"]]
    return f"{item.path}: {'; '.join(told)} -> {', '.join(files) or 'no files'}"


def with_probability(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a class with its probability; a colon stands where the name ends in a number."""
    subject = subject_of(entry, names)
    if "minus" in entry:  # the probability of a difference does not exist
        return subject
    if subject[-1:].isdigit():
        subject += ":"
    return f"{subject} {entry['probability']:.3f}"


def format_metrics(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.3f}" for name in METRICS)


def warn_of_empty_maps(item: Item, job: Job, tally: Tally) -> None:
    """Print a warning for each map that is all zeros, up to EMPTY_MAPS; count all."""
    layer = item.record["target_layer"]
    for method, cams in item.explanation.cams.items():
        for entry, cam in zip(item.record["classes"], cams[0], strict=True):
            if cam.any():
                continue
            tally.empty_maps += 1
            if tally.empty_maps <= EMPTY_MAPS:
                class_name = subject_of(entry, job.classifier.class_names)
                subject = f"the {method} map for {class_name}"
                reason = f"no positive evidence at {layer}"
                print_line(f"warning: {item.path}: {subject} is all zeros: {reason}", sys.stderr)


def finish(request: Request, log: Log, photos: Sequence[Photo], tally: Tally) -> str:
    """Write the page of all results. Return what the closing line says of it and of the photos."""
    args = request.args
    if not log.path.exists():
        return ""

    page = None
    try:
        with log.locked():  # a process that has read less must not write later
            page = write_gallery(args.output, args.colormap) if args.gallery else None
    except OSError as error:
        warn(f"no page of the results: {error}")

    methods = ",".join(args.methods)
    entries = [log.entry(photo.path, methods) for photo in photos]
    told = accuracy(entries, photos, tally)
    if args.metrics:
        with contextlib.suppress(LookupError, TypeError, ValueError):  # another program's records
            told += mean_metrics(entries, args.methods)

    wrong = [entry.right for entry in entries].count(False)
    if page and wrong:
        told += f"; the {wrong} wrong ones first in {page}"
    elif page:
        told += f"; see {page}"
    return told


def accuracy(entries: Sequence[LogEntry], photos: Sequence[Photo], tally: Tally) -> str:
    """Return the accuracy for the closing line, or why there is none."""
    verdicts = [entry.right for entry in entries]
    right = verdicts.count(True)
    known = right + verdicts.count(False)
    folders = len(class_folders(photos))
    if not known and folders > 1 and tally.classes:
        advice = "pass --class-names cat,dog in training order"
        return f"; no accuracy: {folders} folders, {tally.classes} classes; {advice}"
    if not known:
        return ""

    strangers = 0
    for photo, entry in zip(photos, entries, strict=True):
        if photo.top and entry.options and entry.right is None:  # explained, in a folder
            strangers += 1
    remark = f"; {strangers} photos in folders that are no class" if strangers else ""
    return f"; accuracy {100 * right / known:.1f} % ({right} of {known}{remark})"


def mean_metrics(entries: Sequence[LogEntry], methods: Sequence[str]) -> str:
    """Return the mean metrics of each method, as the closing line tells them."""
    told = ""
    for method in methods:
        rows = []
        for entry in entries:
            for measured in entry.metrics or ():
                if measured["method"] == method:
                    rows.append([measured[name] for name in METRICS])
        if rows:
            means = dict(zip(METRICS, np.mean(rows, axis=0), strict=True))
            told += f"; mean of {method}: {format_metrics(means)}"
    return told


def explain_photos(todo: Sequence[Task], request: Request, log: Log, tally: Tally) -> None:
    """Explain photos, and write and count the results. Raises CallError."""
    args = request.args
    job = load_job(request, len(todo))
    if not job.classifier.multi_label:
        tally.classes = len(job.classifier.class_names)
    try:
        log.prepare()
    except OSError as error:
        raise CallError(f"{log.path}: cannot be written: {error.strerror or error}") from error

    on_cpu = job.explainer.device.type == "cpu"
    default = 2 if on_cpu else 32
    batch_size = BatchSize(args.batch_size or default)

    depth = 2 * batch_size.size + THREADS
    read = prefetch(partial(read_item, job=job), todo, depth, THREADS)
    explained = explain_items(read, job, batch_size)
    drawn = prefetch(partial(draw_item, job=job), explained, depth, THREADS)

    for item in tqdm(drawn, total=len(todo), unit="photo", disable=None):
        with tqdm.external_write_mode():
            save_item(item, job, log, tally)


def run(request: Request) -> int:
    """Explain the photos that the command line names. Returns the exit status; raises CallError."""
    args = request.args
    if args.list_layers:
        return list_layers(request)
    began = time.monotonic()
    log = Log(args.output, request.log_size)

    share = request.photos[request.rank :: request.world_size]
    tasks = with_options(args, share)
    todo = unfinished(tasks, log, args) if args.skip_existing else tasks
    tally = Tally(skipped=len(tasks) - len(todo))

    interrupted = False
    with contextlib.closing(log):
        try:
            if todo:
                explain_photos(todo, request, log, tally)
            elif log.path.exists():
                log.prepare()  # which removes what killed processes have left
        except KeyboardInterrupt:
            interrupted = True
        if interrupted or tally.skipped or len(request.photos) > 1:
            told = finish(request, log, share, tally)
            print_summary(request, tally, time.monotonic() - began, told, interrupted)

    if interrupted:
        return 130
    # torchrun stops all processes as soon as one does not return 0
    return int(tally.failed > 0 and request.world_size == 1)


def unfinished(tasks: Sequence[Task], log: Log, args: argparse.Namespace) -> list[Task]:
    """Return the photos that no earlier run with the same options has finished."""
    methods = ",".join(args.methods)
    todo = []
    for task in tasks:
        if not log.is_done(task.photo.path, methods, task.options, args.only_wrong):
            todo.append(task)
    return todo


def print_summary(
    request: Request, tally: Tally, seconds: float, told: str, interrupted: bool
) -> None:
    """Print the closing lines."""
    if tally.empty_maps > EMPTY_MAPS:
        print_line(f"warning: {tally.empty_maps} maps in all are all zeros", sys.stderr)

    line = f"{tally.done} done, {tally.skipped} skipped, {tally.failed} failed"
    if request.world_size > 1:
        line += f" by process {request.rank} of {request.world_size}"
    line += f" in {seconds:.1f} s{told}"
    if interrupted:
        line += "; stopped, the same command with --skip-existing goes on"
    print_line(line, sys.stderr)


def main(request: Request) -> int:
    """Run the program.

    Returns the exit status: 0 done, 1 a photo failed, 2 a wrong call, 130 stopped by Ctrl-C.
    """
    warnings.filterwarnings("ignore")  # the user cannot act on them
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    Image.MAX_IMAGE_PIXELS = None  # read_photo has a limit of its own

    try:
        return run(request)
    except CallError as error:
        print_line(f"error: {first_line(error)}", sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"the network needs more memory than there is: {first_line(error)}"
        print_line(f"error: {message}", sys.stderr)
        return 2
    except OSError as error:  # stdout goes to a disk that is full
        # its last flush would fail as well
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        message = f"stopped, nothing more can be written: {error.strerror or error}"
        print_line(f"error: {message}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        print_line("stopped", sys.stderr)
        return 130


def interrupt(*_: Any) -> NoReturn:
    """Handle Ctrl-C: stop in order, and ignore further ones meanwhile."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    on_interrupt(interrupt)
    gc.freeze()  # what is imported stays
    gc.enable()
    STATUS = main(REQUEST)
    on_interrupt(signal.SIG_IGN)  # all is done: no traceback while Python ends
    sys.exit(STATUS)
