#!/usr/bin/env python3
"""Show why a convolutional network answered as it did: heatmap (CAM), guided backpropagation, and their product.

    python cnn_visualizations.py --ckpt best.pth 33.jpg
    python cnn_visualizations.py --arch resnet50 --ckpt best.pth --num-classes 2 --method gradcam --output out photos/

From Python:

    classifier = load_classifier(arch="resnet50", ckpt="best.pth", device="cuda")
    explainer = Explainer(classifier.model, methods=["gradcam"])
    explanation = explainer(inputs)  # inputs: float32 (N, 3, H, W), normalised

Sections, each using only those above it: command line, images, model, explanation, metrics, output, gallery, run.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

# ---------------------------------------------------------------------------------------------------------------------
# 1  Command line. Only the standard library, so that --help and a mistyped option do not wait for torch.
# ---------------------------------------------------------------------------------------------------------------------

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
    *("hirescam", "layercam", "gradcamelementwise", "fullgrad", "fem", "kpcacam"),
    *("shapleycam", "finercam", "segeigencam", "randomcam", "refinecam"),
)
OUTPUTS = ("cam", "gb", "cam_gb")
SYNONYMS = {
    "--model": "--arch",
    "--cuda": "--device cuda",
    "--weights": "--ckpt",
    "--checkpoint": "--ckpt",
}
EXAMPLES = """\
examples:
  python cnn_visualizations.py --ckpt best.pth --class-names cat,dog 33.jpg
  python cnn_visualizations.py --ckpt best.pth --target-class 0 --target-class 1 --method all --sheet photos/
"""


class CallError(argparse.ArgumentTypeError):
    """The call cannot be carried out. The message is one line that says what to do. Exit status 2."""


class PhotoError(Exception):
    """One photo cannot be explained; the others can. The message is one line. Exit status 1."""


def print_line(text: str, stream: Any = None) -> None:
    """Print one line, on stdout by default; control characters, as in a file name, are escaped."""
    print(
        "".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in text),
        file=stream,
        flush=True,
    )


@functools.cache
def warn(message: str) -> None:
    """Print a warning on stderr, each one once."""
    print_line(f"warning: {message}", sys.stderr)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def closest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with up to three known names that contain `name` or resemble it, or ""."""
    known = list(known)
    near = [each for each in known if name and name.casefold() in each.casefold()][:3]
    near += [each for each in difflib.get_close_matches(name, known) if each not in near]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


# Types of options: a text becomes a value, or CallError says what is wrong with it.


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Return an option type: a number of that kind from `low` to `high`."""

    def parse(text: str) -> Any:
        pattern, name = (r"\d+", "whole number") if kind is int else (r"\d*\.?\d+|\d+\.", "number")
        if not re.fullmatch(pattern, text) or not low <= kind(text) <= high:
            raise CallError(f"'{text}' is not a {name} from {low} to {high}")
        return kind(text)

    return parse


def three_numbers(low: float) -> Callable[[str], list[float]]:
    """Return an option type: three numbers from `low` to 255, "R,G,B", or one for all three."""

    def parse(text: str) -> list[float]:
        values = [number(float, low, 255)(each.strip()) for each in text.split(",")]
        if len(values) not in (1, 3):
            raise CallError(f"'{text}' is neither one number nor three with commas between them")
        return values * (3 // len(values))

    return parse


def names_from(
    known: Sequence[str], kind: str, everything: Sequence[str]
) -> Callable[[str], list[str]]:
    """Return an option type: known names with commas between them, or "all"."""

    def parse(text: str) -> list[str]:
        names = [name.strip().lower() for name in text.split(",") if name.strip()] or [""]
        for name in names if names != ["all"] else ():
            if name not in known:
                raise CallError(
                    f"unknown {kind} '{name}'{closest(name, known)} (known: {', '.join(known)})"
                )
        return names if names != ["all"] else list(everything)

    return parse


def some_text(text: str) -> str:
    """Text that is not empty."""
    if not text.strip():
        raise CallError("the value is empty; leave the option out or pass a value")
    return text


def existing_file(text: str) -> Path:
    """The path of a file that exists and is not empty."""
    path = Path(some_text(text))
    if not path.is_file() or path.stat().st_size == 0:
        fault = (
            "is a folder, not a file"
            if path.is_dir()
            else "is empty"
            if path.exists()
            else "no such file"
        )
        raise CallError(f"{text}: {fault}")
    return path


def class_names(text: str) -> list[str]:
    """Names with commas between them, or a file of them, one a line or JSON (see `ordered_names`)."""
    path = None if "," in text and not os.path.exists(text) else existing_file(text)
    try:
        content = path.read_text(encoding="utf-8-sig") if path else text.replace(",", "\n")
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        return ordered_names(json.loads(content) if content.lstrip()[:1] in ("[", "{") else lines)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CallError(
            f"{text}: not class names in UTF-8, one a line or as JSON: {first_line(error)}"
        ) from error


def ordered_names(classes: Any) -> list[str]:
    """Return class names in order, from ["cat", "dog"], {"0": "cat"}, {"cat": 0} or {"0": ["n02123045", "tabby"]}.

    Raises ValueError or TypeError: anything else.
    """
    if isinstance(classes, Mapping):
        by_index = {
            v if isinstance(v, int) else int(k): k if isinstance(v, int) else v
            for k, v in classes.items()
        }
        if len(by_index) < len(classes) or sorted(by_index) != list(range(len(by_index))):
            raise ValueError("the indices are not 0, 1, 2 ...")
        classes = [by_index[index] for index in range(len(by_index))]
    names = [name[-1] if isinstance(name, (list, tuple)) and name else name for name in classes]
    if (
        isinstance(classes, str)
        or not names
        or not all(isinstance(name, (str, int, float)) for name in names)
    ):
        raise ValueError("neither a list nor a dict of names")
    return [str(name) for name in names]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        print_line(f"error: {' '.join(message.split())}", sys.stderr)
        self.exit(2)


def add_network_options(parser: Parser) -> None:
    """Add the options of the network and of what it sees."""
    add = parser.add_argument_group("the network").add_argument
    text = "A torchvision architecture, or net.py:build, your own function. Default: recognised from the checkpoint."
    add("--arch", type=some_text, metavar="NAME", help=text)
    text = "Your checkpoint: .pth, .pt, .ckpt or .safetensors. Default: torchvision's ImageNet weights are downloaded."
    add("--ckpt", type=existing_file, metavar="FILE", help=text)
    add(
        "--num-classes",
        type=number(int, 1, 10**6),
        metavar="N",
        help="How many classes. Default: the checkpoint's.",
    )
    text = "Class names in the order of training: cat,dog or a file, one a line or JSON. Default: the checkpoint's."
    add("--class-names", type=class_names, metavar="NAMES", help=text)
    text = "cuda, cuda:1, mps (Apple), xpu (Intel) or cpu. Default: the CUDA GPU if there is one, else the CPU."
    add("--device", type=some_text, metavar="NAME", help=text)
    add(
        "--batch-size",
        type=number(int, 1, 4096),
        metavar="N",
        help="Photos at once. Default: GPU 32, CPU 2.",
    )
    add = parser.add_argument_group("what the network sees").add_argument
    text = "Side of the network's square input. Default: the checkpoint's entry, else torchvision's preset."
    add("--input-size", type=number(int, 8, 4096), metavar="PX", help=text)
    text = "crop: the central square (default). squash: the whole photo, aspect ratio not kept."
    add("--resize", type=str.lower, choices=("crop", "squash"), default="crop", help=text)
    text = "Mean that is subtracted, R,G,B from 0 to 1 or to 255, or one number. ToTensor() alone: --mean 0 --std 1."
    add("--mean", type=three_numbers(0), metavar="R,G,B", help=text)
    add(
        "--std",
        type=three_numbers(1e-6),
        metavar="R,G,B",
        help="Standard deviation that is divided by, likewise.",
    )


def add_other_options(parser: Parser) -> None:
    """Add the options of the explanation and of the files."""
    add = parser.add_argument_group("the explanation").add_argument
    text = f"{', '.join(METHODS)} (default: gradcam); several with commas; all for these. Or {', '.join(MORE_METHODS)}."
    parse = names_from((*METHODS, *MORE_METHODS), "method", METHODS)
    add("--method", type=parse, action="extend", metavar="LIST", dest="methods", help=text)
    text = "Layer to explain, such as layer4; repeat it to average several. Default: the last with a spatial map."
    add(
        "--target-layer",
        type=some_text,
        action="append",
        metavar="NAME",
        dest="target_layers",
        help=text,
    )
    text = "Class to explain: name, index, truth or predicted; repeat it for several. Default: each photo's prediction."
    add(
        "--target-class",
        type=some_text,
        action="append",
        metavar="CLASS",
        dest="target_classes",
        help=text,
    )
    add(
        "--top-k",
        type=number(int, 1, 10**6),
        metavar="N",
        help="Explain the N classes of highest probability.",
    )
    add(
        "--aug-smooth",
        action="store_true",
        help="Average over six variants of the photo: smoother, six times slower.",
    )
    add(
        "--eigen-smooth",
        action="store_true",
        help="Take the first principal component over the channels: less noise.",
    )
    add(
        "--metrics",
        action="store_true",
        help="Measure each map: average drop, increase, deletion, insertion, ROAD.",
    )
    add = parser.add_argument_group("the files").add_argument
    add(
        "--output",
        type=some_text,
        default="out",
        metavar="FOLDER",
        help="Where the files go. Default: out.",
    )
    text = "Which pictures: cam, gb, cam_gb. Default: all three. cam alone is the fastest."
    add(
        "--outputs",
        type=names_from(OUTPUTS, "output", OUTPUTS),
        action="extend",
        metavar="LIST",
        help=text,
    )
    text = "Long side of the pictures. Default: the photo's own resolution, at most 1024."
    add("--output-size", type=number(int, 16, 8192), metavar="PX", help=text)
    add(
        "--sheet",
        action="store_true",
        help="Also write one picture with all methods and classes of a photo.",
    )
    add(
        "--save-arrays",
        action="store_true",
        help="Also write maps, gradients and logits as NumPy's .npz.",
    )
    add(
        "--colormap",
        type=some_text,
        default="jet",
        metavar="NAME",
        help="OpenCV's: jet (default), turbo, viridis ...",
    )
    add(
        "--alpha",
        type=number(float, 0, 1),
        default=0.5,
        metavar="A",
        help="Opacity of the heatmap. Default: 0.5.",
    )
    add("--fade", action="store_true", help="The heat's opacity grows with the map.")
    add(
        "--format",
        type=str.lower,
        choices=("jpg", "png", "webp"),
        default="jpg",
        help="Default: jpg.",
    )
    add(
        "--quality",
        type=number(int, 1, 100),
        default=98,
        metavar="Q",
        help="Of jpg and webp. Default: 98.",
    )
    add(
        "--skip-existing",
        action="store_true",
        help="Skip what an earlier run with the same options has finished.",
    )
    add(
        "--only-wrong",
        action="store_true",
        help="Pictures only where the prediction is not the class of the folder.",
    )
    add(
        "--no-gallery",
        action="store_false",
        dest="gallery",
        help="No index.html, the page of all results.",
    )
    add(
        "--list-layers",
        action="store_true",
        help="Print the layers with the size of their maps, and end.",
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line as a namespace. Raises SystemExit: 0 after --help, 2 where an option is wrong."""
    parser = Parser(
        "cnn_visualizations.py",
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = "Photos (JPEG, PNG, WebP, BMP, TIFF, GIF), folders, patterns, or - to read paths from standard input."
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=text)
    add_network_options(parser)
    add_other_options(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_known_args(argv[:end])
    for option in (word.split("=")[0] for word in rest if word.startswith("-") and word != "-"):
        known = [each for action in parser._actions for each in action.option_strings]
        meant = f"; pass {SYNONYMS[option]}" if option in SYNONYMS else closest(option, known)
        parser.error(f"unknown option {option}{meant} (see --help)")
    args.images += rest + argv[end + 1 :]  # photos stand on both sides of the options
    args.methods = list(dict.fromkeys(args.methods or ["gradcam"]))
    args.outputs = list(dict.fromkeys(args.outputs or OUTPUTS))
    args.output = Path(args.output)
    if args.top_k and args.target_classes:
        parser.error("--top-k and --target-class exclude each other: pass one of the two")
    if not (args.images or args.list_layers) or not all(name.strip() for name in args.images):
        parser.error("no photo given, or an empty name; pass photos or folders (see --help)")
    for name in args.images:
        if name.lower().endswith((".pth", ".pt", ".ckpt", ".safetensors")):
            parser.error(f"{name}: this is a checkpoint, not a photo; pass --ckpt {name}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# 2  Images. Paths become decoded photos; memory stays bounded whatever a file contains.
# ---------------------------------------------------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NOT_READ = (".heic", ".heif", ".avif")  # Pillow needs further packages for these
MAX_PIXELS = 70_000_000  # decoded to RGB, copied and resized they take 0.9 GB
MAX_DEEP_PIXELS = 30_000_000  # of photos with 16 or 32 bits a value
MIN_SIDE = 8  # pixels
LONGEST_STRIP = 100  # times as long as wide; the short side is enlarged to the network's input, the long one with it
LOG_NAME = "results.jsonl"


def photo_fault(path: str | Path) -> str:
    """Return why a path cannot be a photo, without opening the file, or ""."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path):
            return "" if os.path.getsize(path) else "the file is empty"
    if "://" in str(path):
        return "this is a URL; download the photo and pass the file"
    if glob.has_magic(str(path)):
        return "no file matches this pattern"
    return "not a file" if os.path.exists(path) else "no such file"


@dataclass(frozen=True)
class Photo:
    """A photo to explain."""

    path: str
    folder: str  # below the output folder, where its files go


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    args: argparse.Namespace
    photos: list[Photo]
    log_size: int = 0  # bytes of results.jsonl when the program started
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def find_photos(inputs: Sequence[str]) -> list[Photo]:
    """Return the photos that files, folders, patterns and `-` stand for, each with its folder below --output.

    A folder is walked in sorted order and its tree mirrored; of several folders, the part of their paths in which they
    differ is kept. A path that does not exist stays in the list, for its error line. Raises CallError: no photos.
    """
    common = ""
    with contextlib.suppress(ValueError):  # no folder, or two drives of Windows
        common = os.path.commonpath(
            [os.path.abspath(name) for name in inputs if os.path.isdir(name)]
        )
    found: dict[str, tuple[str, str]] = {}
    for name in inputs:
        if name == "-":
            photos = [(line.rstrip("\r\n"), "") for line in sys.stdin if line.strip()]
        elif os.path.isdir(name):
            photos = list(walk(os.path.normpath(name), common))
            if not photos:
                warn(f"{name}: no photos in it (looked for {' '.join(SUFFIXES)})")
        elif glob.has_magic(name) and not os.path.lexists(
            name
        ):  # a shell that leaves patterns to the program
            files = sorted(filter(os.path.isfile, glob.glob(name, recursive=True))) or [name]
            photos = [
                (f, "")
                for f in files
                if os.path.basename(f) not in logged_names(os.path.dirname(f))
            ]
        else:
            photos = [(name, "")]
        for path, folder in photos:
            found.setdefault(
                os.path.abspath(path), (path if "://" in path else str(Path(path)), folder)
            )
    if not found:
        raise CallError(f"no photos in {', '.join(inputs)}")
    return [Photo(*entry) for entry in found.values()]


def walk(top: str, common: str) -> Iterator[tuple[str, str]]:
    """Yield the photos below a folder, each with its folder relative to `common`.

    Hidden files and the pictures that a log lists are left out. Links to folders are followed, as torchvision's
    ImageFolder does, but no folder is read twice.
    """
    visited, unread = set(), 0
    written: dict[
        str, frozenset[str]
    ] = {}  # folder -> names of our own pictures in it and below it
    for folder, inner, files in os.walk(
        top, True, lambda e: warn(f"{e.filename}: cannot be listed"), True
    ):
        absolute, real = os.path.abspath(folder), os.path.realpath(folder)
        inner[:] = sorted(
            name for name in inner if not name.startswith(".") and real not in visited
        )
        written[folder] = written.get(os.path.dirname(folder), frozenset()) | logged_names(folder)
        mirrored = (
            os.path.relpath(absolute, common)
            if common
            else os.path.splitdrive(absolute)[1].lstrip("\\/")
        )
        for name in sorted(
            name for name in files if not name.startswith(".") and real not in visited
        ):
            unread += name.lower().endswith(NOT_READ)
            if name.lower().endswith(SUFFIXES) and name not in written[folder]:
                yield os.path.join(folder, name), "" if mirrored == "." else mirrored
        visited.add(real)
    if unread:
        warn(
            f"{top}: {unread} photos left out, {' '.join(NOT_READ)} cannot be read; convert them to JPEG"
        )


@functools.cache
def logged_names(folder: str) -> frozenset[str]:
    """Return the names of the files that the log in a folder lists: our own pictures, which are not photos."""
    path = os.path.join(folder, LOG_NAME)
    with open(
        path if os.path.isfile(path) else os.devnull, encoding="utf-8", errors="backslashreplace"
    ) as lines:
        return frozenset(
            os.path.basename(file) for line in lines for file in record_files(parse_record(line))
        )


def parse_record(line: str | bytes) -> dict[str, Any]:
    """Return a line of the log as a dict; an empty one where it is no record of this program."""
    try:
        record = json.loads(line)
        texts = [record["image"], record["method"], *record_files(record)]
        texts += [record.get(key, "") for key in ("options", "output_stem", "source")]
        return record if all(isinstance(text, str) for text in texts) else {}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def record_files(record: Mapping[str, Any]) -> list[str]:
    """Return the paths of all files of a record, relative to the log's folder."""
    paths = []
    for entry in record.get("classes", ()):
        paths += entry["files"].values()
    return paths + list(record.get("files", {}).values())


def report_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print one line for an uncaught error that the user can mend, else the traceback, as sys.excepthook does."""
    message = f"memory, threads or open files do not suffice ({first_line(error)}); see ulimit -a"
    if issubclass(kind, ModuleNotFoundError):
        message = f"{first_line(error)}; run: pip install -r requirements.txt"
    elif not issubclass(kind, (MemoryError, OSError, ImportError)) and not re.search(
        "thread|allocate", str(error)
    ):
        return sys.__excepthook__(kind, error, trace)
    print_line(f"error: {message}", sys.stderr)


def on_interrupt(handler: Any) -> None:
    """Set what Ctrl-C does, unless it is ignored: a script has started the program with "&"."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def start() -> argparse.Namespace:
    """Return the command line with its photos; what can be found wrong without torch ends the program here.

    Raises SystemExit: 2 after a wrong call, 1 where none of the photos exists.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        # a name that the terminal cannot show, or that is not UTF-8, does not end the run
        getattr(sys, name).reconfigure(
            errors="surrogateescape" if mode == "r" else "backslashreplace"
        )
    args, status = parse_args(), 2
    ranks = [
        int(os.environ.get(n, v)) for n, v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    ]
    if args.list_layers:
        return Request(args, [], 0, *ranks)
    try:
        photos, status = find_photos(args.images), 1
        faults = [
            f"{photo.path}: {fault}" for photo in photos if (fault := photo_fault(photo.path))
        ]
        if len(faults) < len(photos):
            log = args.output / LOG_NAME
            return Request(args, photos, log.stat().st_size if log.is_file() else 0, *ranks)
    except CallError as error:
        faults = [str(error)]
    for fault in faults:
        print_line(f"error: {fault}", sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    REQUEST = start()
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # threads that spin while they wait slow the others down
    sys.excepthook = report_crash
    on_interrupt(signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback
import copy
import errno
import hashlib
import importlib.util
import inspect
import io
import itertools
import logging
import math
import stat
import tempfile
import threading
import time
import types
import unicodedata
import warnings
from collections import Counter, deque, namedtuple
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import PurePath
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
DECODING = threading.Lock()  # held for a large photo


def read_photo(path: str | Path) -> Picture:
    """Return the first frame or page of a photo, uint8 RGB (H, W, 3), turned upright as its EXIF orientation says.

    Transparency is dropped, as it is by the loaders that networks are trained with (torchvision's ImageFolder, OpenCV).
    Raises PhotoError: the file is missing, not a picture, broken, too large or too small.
    """
    if photo_fault(path):
        raise PhotoError(f"{path}: {photo_fault(path)}")
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")) as image:
            width, height = image.size
            limit = MAX_DEEP_PIXELS if image.mode[0] in "IF" else MAX_PIXELS  # I;16, I, F
            if width * height > limit:
                raise PhotoError(
                    f"{path}: {width} x {height} pixels, at most {limit // 10**6} million can be read"
                )
            if not MIN_SIDE <= min(width, height) >= max(width, height) / LONGEST_STRIP:
                raise PhotoError(
                    f"{path}: {width} x {height} pixels, too thin (at least {MIN_SIDE}, up to 100 : 1)"
                )
            with DECODING if width * height > limit / 5 else contextlib.nullcontext():
                image.load()
                image.getexif()
                image.info.pop(
                    "exif", None
                )  # or exif_transpose writes it anew, where odd entries fail
                ImageOps.exif_transpose(image, in_place=True)
                return np.asarray(to_rgb(image))
    except PhotoError:
        raise
    except Exception as error:  # decoders raise nearly anything on a hostile file, from struct.error to MemoryError
        raise PhotoError(
            f"{path}: cannot be read: {first_line(error)}; convert it to JPEG or PNG"
        ) from error


@contextlib.contextmanager
def open_photo(path: str | Path, short_side: int = 0) -> Iterator[Picture]:
    """Yield what `read_photo` returns."""
    yield read_photo(path)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB; 16 bits are scaled down, where Pillow's own convert clips them to white."""
    if image.mode[0] in "IF":
        values = np.array(image, dtype=np.float32)
        np.nan_to_num(values, copy=False)
        white = 65535.0 if image.mode != "F" else 1.0 if values.max() <= 1 else 255.0
        values *= 255 / white
        values += 0.5
        image = Image.fromarray(np.clip(values, 0, 255, out=values).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# 4  Model. Names and files become a classifier that knows its preprocessing and its classes.
# ---------------------------------------------------------------------------------------------------------------------


def import_torchvision() -> types.ModuleType:
    """Import torchvision. Its roi_align asks torch's compiler one question; a stand-in answers no, which saves 2 s."""

    def answer_no(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return lambda *args, **kwargs: False

    with contextlib.ExitStack() as stack:  # the compiler works afterwards
        for name in {"torch._dynamo", "torch._dynamo.utils"} - set(sys.modules):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__getattr__ = answer_no
            stack.callback(sys.modules.pop, name)
        import torchvision.models
    return torchvision


torchvision = import_torchvision()
ARCHITECTURES = tuple(torchvision.models.list_models(module=torchvision.models))
COMPUTED = (
    "num_batches_tracked",
    "relative_position_index",
    "relative_coords_table",
)  # the network comes with these
OWN_NETWORK = "give a network of your own by --arch net.py:build"
PREDICTED, TRUTH = -1, -2  # classes to explain that differ from photo to photo

State = dict[str, Tensor]


@dataclass(frozen=True)
class Classifier:
    """A network with its preprocessing and its classes."""

    model: nn.Module  # on `device`, float32, in eval mode
    arch: str  # its torchvision name, or file.py:function
    class_names: tuple[str, ...]  # one for each output
    preset: Any  # torchvision's preprocessing: PIL image -> float32 (3, S, S), normalised
    device: torch.device
    squash: bool = (
        False  # whether the network sees the whole photo (True) or the central square (False)
    )
    origins: Mapping[str, str] = field(
        default_factory=dict
    )  # where arch, classes, input ... come from

    def __repr__(self) -> str:
        return f"Classifier({self.describe()})"

    def describe(self, layers: Sequence[str] = ()) -> str:
        """Return, in one line, all that is assumed about the network, and where each item comes from."""
        mean, std = (
            [round(value, 4) for value in values] for values in (self.preset.mean, self.preset.std)
        )
        imagenet = (mean, std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        items = {
            "arch": self.arch,
            "classes": f"{len(self.class_names)} classes",
            "layers": " and ".join(layers),
        }
        items["input"] = (
            f"input {self.input_size} x {self.input_size} {'squash' if self.squash else 'crop'}"
        )
        items["mean"] = "ImageNet mean and std" if imagenet else f"mean {mean} std {std}"
        items["device"] = str(self.device)
        told = {key: f" ({origin})" for key, origin in self.origins.items() if origin}
        return ", ".join(text + told.get(key, "") for key, text in items.items() if text)

    @property
    def input_size(self) -> int:
        """Side of the network's square input in pixels."""
        return self.preset.crop_size[0]

    def preprocess(self, photo: Picture) -> Tensor:
        """Return a photo, uint8 RGB (H, W, 3), as the network sees it: float32 (3, S, S), normalised."""
        return self.preset(Image.fromarray(np.asarray(photo)))

    def seen(self, photo: Picture) -> Picture:
        """Return the part of a photo that the network sees, in the photo's own resolution: uint8 RGB (h, w, 3)."""
        height, width = photo.shape[:2]
        left, top, right, bottom = self.seen_box(height, width)
        x, y = min(round(left), width - 1), min(round(top), height - 1)
        return photo[y : y + max(1, round(bottom - top)), x : x + max(1, round(right - left))]

    def seen_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the part of a photo that the network sees: left, top, right, bottom, in the photo's pixels."""
        if self.squash:
            return 0.0, 0.0, float(width), float(height)
        # as torchvision does: the long side is rounded down, the corner of the crop to the nearest pixel
        short, side = self.preset.resize_size[0], self.input_size
        long = int(short * max(height, width) / min(height, width))
        new_width, new_height = (short, long) if width <= height else (long, short)
        left, top = round((new_width - side) / 2.0), round((new_height - side) / 2.0)
        x, y = width / new_width, height / new_height
        return (
            max(0.0, left * x),
            max(0.0, top * y),
            min(width, (left + side) * x),
            min(height, (top + side) * y),
        )


def load_classifier(
    arch: str | None = None,
    ckpt: str | Path | None = None,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    *,
    class_names: Sequence[str] | None = None,
    input_size: int | None = None,
    resize: str = "crop",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """Build a classifier and load the weights of a checkpoint. Raises CallError where something does not fit.

    Args:
        arch: a name from `torchvision.models.list_models`, or "file.py:function" for a network of your own. None: the
            checkpoint's entry, else recognised from the weights; without a checkpoint, resnet50.
        ckpt: the weights; None: torchvision's ImageNet weights, from its cache or the network.
        num_classes: must agree with the checkpoint; a single output becomes two, of which the second has its sigmoid.
        device: None: the CUDA GPU if there is one, else the CPU.
        class_names: one for each class; None: those of the checkpoint, else ImageNet's where there are 1000 classes.
        input_size: side of the square input in pixels; None: the checkpoint's, else that of torchvision's preset.
        resize: "crop" or "squash".
        mean, std: three numbers each, of colours from 0 to 1 or to 255; None: the checkpoint's, else the preset's.
    """
    target, why = find_device(device)
    if resize not in ("crop", "squash"):
        raise CallError(f"unknown resize '{resize}' (known: crop, squash)")
    own, origins = ".py:" in (arch or ""), {"device": why, "arch": "" if arch else "default"}
    arch = arch.lower() if arch and not own else arch
    if arch and not own and arch not in ARCHITECTURES:
        raise CallError(
            f"unknown architecture '{arch}'{closest(arch, ARCHITECTURES)} (your own network: net.py:build)"
        )
    arch = arch or (None if ckpt else "resnet50")
    if ckpt:
        checkpoint = read_checkpoint(load_safely(Path(ckpt)), str(ckpt))
    else:
        checkpoint = Checkpoint("the network", {}) if own else download_weights(arch)
    if arch is None:
        arch, origins["arch"] = recognise(checkpoint)
    model, beside = build_model(arch, checkpoint, num_classes)
    given = {"input_size": input_size, "mean": mean, "std": std}
    preset = make_preset(arch, model, checkpoint, beside, given, origins)
    if resize == "squash":
        preset.resize_size = preset.crop_size * 2
    outputs = (
        count_outputs(model, preset.crop_size[0], num_classes)
        if own
        else find_head(model)[1].weight.shape[0]
    )
    if num_classes not in (None, outputs, max(outputs, 2)):
        raise CallError(
            f"--num-classes {num_classes}, but {checkpoint.name}: {outputs} classes; leave the option out"
        )
    model.register_forward_hook(partial(give_logits, outputs=outputs))
    names = tuple(name_classes(class_names, checkpoint, max(outputs, 2), origins))
    return Classifier(model.to(target), arch, names, preset, target, resize == "squash", origins)


def find_device(name: str | torch.device | None) -> tuple[torch.device, str]:
    """Return a device, by default the CUDA GPU or else the CPU, and why there is no GPU, or "". Raises CallError."""
    wanted = str(name or "cuda")
    try:
        torch.zeros(1, device=wanted).add_(
            1
        ).item()  # whether this torch has code for this GPU shows only now
        return torch.device(wanted), ""
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = first_line(error)  # an old driver, CUDA_VISIBLE_DEVICES, a torch without CUDA
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            why = "no CUDA GPU found" + ("" if "no NVIDIA driver" in why else f": {why}")
            if name is None:
                return torch.device("cpu"), why
        have = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise CallError(
            f"device {wanted} cannot be used: {why}; this machine has {have}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was missing, the GPU's or the CPU's; oneDNN's word for it is the last one."""
    words = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|OUT_OF_DEVICE_MEMORY|create a primitive"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        re.search(words, str(error))
    )


# The content of a checkpoint: its name for messages; the name of each dict in it, as "" or "model.", with that dict's
# tensors; and the other entries of the outermost dict, as `arch` and `classes`.
Checkpoint = namedtuple("Checkpoint", ("name", "states", "entries"), defaults=({},))


def read_checkpoint(content: Any, file: str) -> Checkpoint:
    """Return the tensors in the content of a file, and the entries beside them. Raises CallError."""
    states: dict[str, State] = {}
    waiting, visited = deque([("", content)]), {id(content)}
    while waiting:  # breadth first, each dict once: a file may nest them in themselves
        prefix, inside = waiting.popleft()
        for key, value in inside.items() if isinstance(inside, Mapping) else ():
            # before 2018 torchvision's DenseNet called its layers norm.1 and conv.2 instead of norm1 and conv2
            name = re.sub(
                r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)",
                r"\1\2",
                str(key).replace("_orig_mod.", ""),
            )
            if isinstance(value, Tensor):
                usable = not (value.is_meta or value.is_nested) and value.layout is torch.strided
                if not usable and name not in ("mean", "std", "input_size"):
                    raise CallError(
                        f"{file}: {name} has no values or is sparse; save ordinary tensors"
                    )
                if not re.search(
                    r"(^|\.)(aux1|aux2|AuxLogits)\.", name
                ):  # heads for the training of two architectures
                    states.setdefault(prefix, {})[name] = value.detach()
            elif isinstance(value, Mapping) and id(value) not in visited and "optim" not in name:
                visited.add(id(value))
                waiting.append((f"{prefix}{name}.", value))
    if not any(tensor.ndim > 1 for state in states.values() for tensor in state.values()):
        held = (
            ", ".join(map(str, list(content)[:8]))
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise CallError(
            f"{file}: no weights in it (found: {held}); save them with torch.save(model.state_dict(), ...)"
        )
    bare = (
        max(states, key=lambda name: len(states[name])) == ""
    )  # then a tensor called mean is a buffer of the network
    entries = {
        str(key): value
        for key, value in content.items()
        if not (bare and isinstance(value, Tensor))
    }
    return Checkpoint(file, states, entries)


def load_safely(path: Path) -> Any:
    """Return what torch.load gives with `weights_only`; CallError says what to do about a file that it refuses."""
    advice = "save the weights alone with torch.save(model.state_dict(), 'weights.pth')"
    # Beside the weights many hold options of training scripts and NumPy's values, whose module has another name since
    # NumPy 2. No dtypes of strings: a pickle may change the size of their items while an array has memory for others.
    builders = [np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]]
    plain = [
        (f, f"numpy.{core}.multiarray.{f.__name__}") for f in builders for core in ("core", "_core")
    ]
    plain += [
        (PurePath, f"pathlib.{pure}{system}Path")
        for pure in ("", "Pure")
        for system in ("Posix", "Windows")
    ]
    plain += [
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
        argparse.Namespace,
    ]
    existing_file(str(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise CallError(
            f"{path}: needs the safetensors package; run: pip install safetensors"
        ) from error
    except Exception as error:
        found = re.search(r"(?:GLOBAL |global |but got <class )[`']?([\w.]+)", str(error))
        why = f"not a whole checkpoint that torch can read ({type(error).__name__}); copy it again, or {advice}"
        if "TorchScript" in str(error):
            why = f"a TorchScript archive, which is code; {advice}"
        elif "Weights only" in str(error) and found:
            why = f"holds a pickled {found.group(1)} object, and loading it would run code; {advice} (see the README)"
        raise CallError(f"{path}: {why}") from error


def download_weights(arch: str) -> Checkpoint:
    """Return torchvision's ImageNet weights, from its cache or the network. Raises CallError."""
    weights, name = (
        torchvision.models.get_model_weights(arch).DEFAULT,
        f"torchvision's {arch} weights",
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return read_checkpoint(weights.get_state_dict(check_hash=True, weights_only=True), name)
    except Exception as error:
        why = f"cannot be downloaded ({first_line(error)}); pass your own with --ckpt FILE"
        raise CallError(f"{name} {why}") from error


class MetaParameters(TorchFunctionMode):
    """Inside `with`, parameters are made on the meta device and not initialised: they cost nothing until loaded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if getattr(func, "__module__", "") == "torch.nn.init" or name in (
            "normal_",
            "uniform_",
            "trunc_normal_",
        ):
            return (
                args[0] if args else kwargs["tensor"]
            )  # initialising on the meta device imports torch's compiler
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(arch: str, checkpoint: Checkpoint) -> nn.Module:
    """Return the architecture with two classes and no weights, with the options that the file implies."""
    options: dict[str, Any] = {}
    ends = ("running_mean", "conv_proj.weight", "encoder.pos_embedding")
    tensors = [
        item for state in checkpoint.states.values() for item in state.items() if item[1].ndim
    ]
    mean, patches, position = (
        next((t for k, t in tensors if k.endswith(end)), torch.zeros(1)) for end in ends
    )
    if arch in ("googlenet", "inception_v3"):
        # torchvision's own weights for these two expect (p - 0.5) / 0.5, and its builders add that transform when they
        # load them. A trained checkpoint is nearly always fine-tuned from those; the weights themselves don't tell.
        options = {"aux_logits": False, "init_weights": False, "transform_input": bool(mean.any())}
    elif arch.startswith("vit_") and arch.endswith(f"_{patches.shape[-1]}") and position.ndim == 3:
        options["image_size"] = math.isqrt(max(position.shape[1] - 1, 1)) * patches.shape[-1]
    with MetaParameters():
        return torchvision.models.get_model(arch, weights=None, num_classes=2, **options)


def find_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the layer that gives the logits, with its name: the last one with weights (SqueezeNet's is a Conv2d)."""
    return [
        (name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    ][-1]


def backbone(model: nn.Module) -> tuple[State, str]:
    """Return a torchvision network's tensors but for its head, with the prefix of the head's, as "fc."."""
    root = find_head(model)[0].partition(".")[0] + "."
    state = model.state_dict().items()
    return {k: v for k, v in state if not k.startswith(root) and not k.endswith(COMPUTED)}, root


def find_network(wanted: State, checkpoint: Checkpoint) -> list[tuple[tuple[str, str], int]]:
    """Return where a checkpoint has tensors of `wanted`, the best first: ((dict, prefix), how many in their shape)."""
    found: Counter[tuple[str, str]] = Counter()
    for name, state in checkpoint.states.items():
        for key, tensor in state.items():
            for start in (
                0,
                *(dot.end() for dot in re.finditer(r"\.", key[:200])),
            ):  # no prefix is longer
                if key[start:] in wanted:
                    found[name, key[:start]] += wanted[key[start:]].shape == tensor.shape
    return found.most_common()


def recognise(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the architecture of a checkpoint, and whether an entry names it. Raises CallError."""
    entries, states = checkpoint.entries, checkpoint.states.values()
    for name in (
        entries.get("arch"),
        entries.get("model_name"),
        getattr(entries.get("args"), "model", None),
    ):
        if isinstance(name, str) and name.lower() in ARCHITECTURES:
            return name.lower(), f"from {os.path.basename(checkpoint.name)}"
    count = max(
        sum(t.numel() for key, t in state.items() if "running_" not in key) for state in states
    )
    sizes = {
        a: [w.meta["num_params"] for w in torchvision.models.get_model_weights(a)]
        for a in ARCHITECTURES
    }
    nearest = (0.5, "")
    # the nearest number of parameters first; right is where the backbone is all there, with nothing else beside it
    for arch in sorted(
        ARCHITECTURES, key=lambda arch: min(abs(size - count) for size in sizes[arch])
    ):
        wanted, root = backbone(skeleton(arch, checkpoint))
        for (name, prefix), found in find_network(wanted, checkpoint):
            nearest = max(nearest, (found / len(wanted), arch))
            items = (
                (k.removeprefix(prefix), t)
                for k, t in checkpoint.states[name].items()
                if k.startswith(prefix)
            )
            layers = (key for key, tensor in items if tensor.ndim and not key.endswith(COMPUTED))
            if found == len(wanted) and all(
                key in wanted or key.startswith(root) for key in layers
            ):
                return arch, "recognised"
    near = f"{nearest[0]:.0%} of {nearest[1]}'s tensors are there: --arch {nearest[1]} tells which are not; "
    why = f"fits no torchvision classifier ({count / 1e6:.1f} million parameters)"
    raise CallError(f"{checkpoint.name} {why}; {near if nearest[1] else ''}{advice(checkpoint)}")


def advice(checkpoint: Checkpoint) -> str:
    """Return what to do with a checkpoint that fits no torchvision classifier."""
    tensors = " ".join(
        f"{key} {tensor.ndim}d"
        for state in checkpoint.states.values()
        for key, tensor in state.items()
    )
    tasks = (
        r"rpn\.|classification_head\.|(aux|low)_classifier\.|classifier\.4\.weight 4d|decode_head\."
    )
    return (
        "it looks like a detector or segmentation network; " * bool(re.search(tasks, tensors))
        + OWN_NETWORK
    )


def build_model(
    arch: str, checkpoint: Checkpoint, num_classes: int | None
) -> tuple[nn.Module, State]:
    """Return the network with the checkpoint's weights, and the tensors beside it in the file. Raises CallError."""
    states, own = checkpoint.states, ".py:" in arch
    matrices = [(k, v) for state in states.values() for k, v in state.items() if v.ndim == 2]
    heads = [v.shape[0] for k, v in matrices if re.search(r"(^|\.)(fc|classifier|head|heads)\.", k)]
    model = (
        run_own_file(arch, num_classes or next(reversed(heads), None))
        if own
        else skeleton(arch, checkpoint)
    )
    wanted = (
        {k: v for k, v in model.state_dict().items() if not k.endswith(COMPUTED)}
        if own
        else backbone(model)[0]
    )
    if not states:
        return model.eval(), {}
    found = find_network(wanted, checkpoint)
    # Each network once, also where the file has it under two names. Its moving average (EMA) only if there is no other.
    whole = {
        states[d][p + next(iter(wanted))].data_ptr(): (d, p)
        for (d, p), count in found
        if count == len(wanted)
    }
    places = [
        place
        for place in whole.values()
        if not re.search("ema|averag", "".join(place), re.IGNORECASE)
    ]
    places = (
        places
        or [*whole.values()]
        or [place for place, _ in found[:1]]
        or [(next(iter(states)), "")]
    )
    if len(places) > 1:
        names = " and ".join(f"'{name}{prefix}'" for name, prefix in places)
        raise CallError(
            f"{checkpoint.name}: holds several networks, under {names}; save the one to explain"
        )
    name, prefix = places[0]
    state = {
        key.removeprefix(prefix): tensor
        for key, tensor in states[name].items()
        if key.startswith(prefix)
    }
    beside = {key: tensor for key, tensor in states[name].items() if not key.startswith(prefix)}
    if not own:
        fit_head(model, state, beside)
    load_state(arch, model, state, checkpoint)
    outputs = None if own else find_head(model)[1].weight.shape[0]
    unused = [key for key in beside if not key.endswith(("mean", "std"))]
    other = [key for key in unused if beside[key].ndim == 4 or beside[key].shape[1:] == (outputs,)]
    other = [key for key in other if not re.search("ema|averag", key, re.IGNORECASE)]
    if other and not own:
        why = f"{other[0]} is of a second network, or a layer behind {arch}'s {outputs} outputs"
        raise CallError(f"{checkpoint.name}: {why}; save one network only, or {OWN_NETWORK}")
    if unused:
        warn(f"{checkpoint.name}: not used, as no part of {arch}: {'; '.join(unused[:3])}")
    return model.eval(), beside


def fit_head(model: nn.Module, state: State, beside: State) -> None:
    """Give the network the checkpoint's head, if that is one layer, and rename its tensors in `state`."""
    name, layer = find_head(model)
    root = name.partition(".")[0]
    # as it was, as in `model.fc = nn.Sequential(nn.Dropout(), nn.Linear(...))`, or beside the backbone
    for source, place in ((state, f"{name}."), (state, f"{root}."), (beside, "")):
        keys = [key for key in source if key.startswith(place) and key.endswith("weight")]
        weights = [key for key in keys if source[key].ndim in (2, 4) and source[key].numel()]
        if weights:
            break
    if len(weights) != 1 or source[weights[0]].ndim != layer.weight.ndim:
        return  # load_state tells what does not fit
    old, weight = weights[0].removesuffix("weight"), source[weights[0]]
    sizes = (weight.shape[1], weight.shape[0], *([weight.shape[2:]] if weight.ndim == 4 else []))
    head = type(layer)(*sizes, bias=f"{old}bias" in source, device="meta")
    others = [
        key
        for key in model.state_dict()
        if key.startswith(f"{root}.") and not key.startswith(f"{name}.")
    ]
    if place != f"{name}." and others and not any(key in state for key in others):
        model.add_module(
            root, nn.Sequential(nn.Flatten(1), head)
        )  # instead of a whole classifier, as VGG's
        name = f"{root}.1"
    else:
        model.set_submodule(name, head)
    state |= {
        f"{name}.{part}": source.pop(f"{old}{part}")
        for part in ("weight", "bias")
        if f"{old}{part}" in source
    }


def load_state(arch: str, model: nn.Module, state: State, checkpoint: Checkpoint) -> None:
    """Put the tensors into the network, the floating-point ones as float32. Raises CallError where one does not fit."""
    wanted = model.state_dict()  # it has the version marks that MNASNet insists on
    state = {key: tensor for key, tensor in wanted.items() if key.endswith(COMPUTED)} | state
    differ = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted and state[key].ndim],
        "of another shape": [
            f"{k}: {shape_of(state[k])} in the file, {shape_of(wanted[k])} in {arch}"
            for k in differ
        ],
    }
    parts = [
        f"{len(ks)} {kind} ({'; '.join(ks[:3])}{'; ...' * (len(ks) > 3)})"
        for kind, ks in faults.items()
        if ks
    ]
    if parts:
        hint = advice(checkpoint)
        with contextlib.suppress(CallError):
            other = recognise(checkpoint._replace(entries={}))[0]
            hint = f"it fits {other}: pass --arch {other}" if other != arch else hint
        raise CallError(f"{checkpoint.name} does not fit {arch}: {', '.join(parts)}; {hint}")
    for key, value in wanted.items():
        if value.is_floating_point() and not re.match(
            r"torch\.b?float(8|16|32|64)", str(state[key].dtype)
        ):
            why = f"{key} is quantised or complex ({state[key].dtype}); save the weights from before that"
            raise CallError(f"{checkpoint.name}: {why}")
        wanted[key] = (state[key].float() if value.is_floating_point() else state[key]).contiguous()
    model.load_state_dict(wanted, strict=False, assign=True)


def run_own_file(arch: str, classes: int | None) -> nn.Module:
    """Run the user's "file.py:function", with `num_classes` if it is known and taken. Raises CallError."""
    file, _, function = arch.rpartition(":")
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # its neighbours can be imported
    arguments, sys.argv = sys.argv, [file]  # which are not for the file
    try:
        # under a name of our own: a file that is called torch.py must not stand in for torch
        spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            raise AttributeError(
                f"{file} has no function '{function}'{closest(function, vars(module))}"
            )
        takes_number = re.search(r"\bnum_classes\b|\*\*", str(inspect.signature(build)))
        model = build(num_classes=classes) if takes_number and classes else build()
        if not isinstance(model, nn.Module):
            raise TypeError(f"it returned a {type(model).__name__}, not a torch.nn.Module")
        return model
    except (Exception, SystemExit) as error:
        hint = (
            "; does it need --num-classes?" if "num_classes" in str(error) and not classes else ""
        )
        hint = (
            "; put what parses arguments under if __name__ == '__main__':"
            if isinstance(error, SystemExit)
            else hint
        )
        raise CallError(
            f"--arch {arch}: {type(error).__name__}: {first_line(error)}{hint}"
        ) from error
    finally:
        sys.argv = arguments
        del sys.path[0]


def as_logits(answer: Any, outputs: int | None = None) -> Tensor:
    """Return a network's answer, or the one of several with `outputs` columns, as (N, classes). Raises CallError."""
    if isinstance(answer, Mapping):  # as transformers' networks give it
        answer = answer.get("logits", answer.get("out", answer))
    answer = getattr(answer, "logits", answer)
    answers = answer if isinstance(answer, (tuple, list)) else [answer]
    tensors = [each for each in answers if isinstance(each, Tensor) and each.ndim]
    rows = [
        t for t in tensors if math.prod(t.shape[1:]) == max(t.shape[1:], default=1)
    ]  # (N, C), (N, C, 1, 1), (N,)
    rows = [row for row in rows if outputs == row.shape[-1]] or rows
    if len(rows) != 1:
        kinds = [
            f"a tensor of {shape_of(a)}" if isinstance(a, Tensor) else f"a {type(a).__name__}"
            for a in answers
        ]
        hint = " alone, or pass --num-classes" if rows else ", (N, classes)"
        raise CallError(
            f"the network returns {' and '.join(kinds[:4])}; let it return the logits{hint}"
        )
    return rows[0][:, None] if rows[0].ndim == 1 else rows[0].flatten(1)


def give_logits(model: nn.Module, inputs: Any, answer: Any, outputs: int) -> Tensor:
    """Return the logits (N, classes), as a forward hook; a single one becomes two, whose softmax is its sigmoid."""
    logits = as_logits(answer, outputs)
    return torch.cat([-logits, logits], 1) / 2 if outputs == 1 else logits


def count_outputs(model: nn.Module, side: int, num_classes: int | None) -> int:
    """Return how many outputs a network has, by running it once at that input size. Raises CallError."""
    try:
        with torch.enable_grad():
            answer = model(torch.zeros(1, 3, side, side, requires_grad=True))
    except Exception as error:
        grey = "let it begin with x.mean(1, keepdim=True) if it is for grey photos"
        hint = (
            grey
            if re.search(r"\b1 channels", str(error))
            else "pass another --input-size if it is the size"
        )
        why = f"({type(error).__name__}: {first_line(error)})" + f"; {hint}" * isinstance(
            error, RuntimeError
        )
        raise CallError(f"the network fails at an input of 3 x {side} x {side} {why}") from error
    logits = as_logits(answer, num_classes)
    last = re.match("(Softmax|Sigmoid)Backward", logits.grad_fn.name() if logits.grad_fn else "")
    if last:
        raise CallError(
            f"the network ends in a {last[1].lower()}; let it return the logits, without that"
        )
    return logits.shape[1]


def shape_of(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def make_preset(
    arch: str,
    model: nn.Module,
    checkpoint: Checkpoint,
    beside: State,
    given: dict[str, Any],
    origins: dict[str, str],
) -> Any:
    """Return torchvision's preprocessing with the known input size, mean and std; fill `origins`. Raises CallError."""
    name, own = os.path.basename(checkpoint.name), ".py:" in arch
    all_weights = torchvision.models.get_model_weights("resnet50" if own else arch)
    preset = all_weights.DEFAULT.transforms()
    entry = given["input_size"] or checkpoint.entries.get(
        "input_size"
    )  # 225, (225, 225) or (3, 225, 225)
    sides = [*entry][-2:] if isinstance(entry, (list, tuple)) else [entry]
    square = (
        all(isinstance(side, (int, np.integer)) and 8 <= side <= 4096 for side in sides)
        and len({*sides}) == 1
    )
    if entry is not None and not square:
        raise CallError(
            f"{checkpoint.name}: its input_size is not the side of a usable square; pass --input-size"
        )
    fixed = (
        224 if arch == "maxvit_t" else None if own else getattr(model, "image_size", None)
    )  # of a ViT
    size = int(sides[-1]) if entry is not None else fixed
    if fixed and size != fixed:
        asked = f"{'--input-size' if given['input_size'] else 'its input_size'} {size}; pass --input-size {fixed}"
        raise CallError(
            f"{checkpoint.name}: {arch} takes inputs of {fixed} x {fixed} pixels only, not {asked}"
        )
    if not given["input_size"] and not fixed and not name.startswith("torchvision's "):
        origins["input"] = (
            f"from {name}"
            if size
            else f"not in {name}; pass --input-size if you trained at another"
        )
    if size:  # at another than the preset's, the margin around the crop is in proportion
        presets = (
            *(weights.transforms() for weights in all_weights),
            preset,
        )  # some have several sizes
        sizes = {each.crop_size[0]: each.resize_size[0] for each in presets}
        margin = preset.resize_size[0] / preset.crop_size[0]
        preset.crop_size, preset.resize_size = [size], [sizes.get(size, round(size * margin))]
    # a layer in front of the network may have normalised its inputs
    known = {
        key.rpartition(".")[2]: tensor for key, tensor in beside.items() if tensor.numel() == 3
    }
    known |= checkpoint.entries | {key: value for key, value in given.items() if value is not None}
    colours: dict[str, list[float]] = {}
    for key, low in (("mean", 0), ("std", 1e-6)):
        entry = known.get(key)
        if entry is not None:
            with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
                is_array = isinstance(entry, (Tensor, np.ndarray)) and math.prod(entry.shape) == 3
                values = entry.flatten().tolist() if is_array else entry
                colours[key] = (
                    [float(v) for v in values if low <= v <= 255] if len(values) == 3 else []
                )
            if len(colours.get(key, ())) != 3:
                raise CallError(
                    f"{checkpoint.name}: its {key} is not three usable numbers; pass --{key} R,G,B"
                )
            origins["mean"] = "" if given[key] is not None else f"from {name}"
    white = 255 if any(max(values) > 1 for values in colours.values()) else 1
    for key, values in colours.items():
        setattr(preset, key, [value / white for value in values])
    return preset


def name_classes(
    given: Sequence[str] | None, checkpoint: Checkpoint, count: int, origins: dict[str, str]
) -> list[str]:
    """Return a name for each output: those given, else the checkpoint's, else ImageNet's. Raises CallError."""
    if given is not None:
        if len(given) != count:
            raise CallError(
                f"{len(given)} class names were given, but the network has {count} classes"
            )
        return list(given)
    for key in ("classes", "class_names", "class_to_idx", "idx_to_class"):
        if checkpoint.entries.get(key) is not None:
            try:
                names = ordered_names(checkpoint.entries[key])
                if len(names) == count:
                    return names
                why = f"{len(names)} names for {count} classes"
            except (ValueError, TypeError, OverflowError) as error:
                why = first_line(error)
            warn(f"{checkpoint.name}: its entry {key} is not used: {why}")
    if count == 1000:
        return torchvision.models.get_model_weights("resnet50").DEFAULT.meta["categories"]
    origins["classes"] = (
        "without names; pass --class-names cat,dog in training order, ImageFolder's is alphabetical"
    )
    return [f"class {index}" for index in range(count)]


def class_index(wanted: str, class_names: Sequence[str]) -> int | None:
    """Return the index of a class from its name, case aside, or its index; a name wins. None: no class is called so."""
    lowered = [name.casefold() for name in class_names]
    if wanted.casefold() in lowered:
        return lowered.index(wanted.casefold())
    return (
        int(wanted) if re.fullmatch(r"\d{1,6}", wanted) and int(wanted) < len(class_names) else None
    )


def true_class(path: str | Path, class_names: Sequence[str]) -> int | None:
    """Return the class whose name or index the folder of a photo has, as in torchvision's ImageFolder, or None."""
    return class_index(os.path.basename(os.path.dirname(os.path.abspath(path))), class_names)


def find_class(wanted: str, class_names: Sequence[str]) -> int:
    """Return the index of a class, or PREDICTED or TRUTH unless a class is really called so. Raises CallError."""
    index = class_index(wanted, class_names)
    if index is None:
        index = {"predicted": PREDICTED, "truth": TRUTH}.get(wanted.casefold())
    if index is not None:
        return index
    some = ", ".join(class_names[:20]) + ", ..." * (len(class_names) > 20)
    hint = "; repeat the option for each class" if "," in wanted else closest(wanted, class_names)
    raise CallError(
        f"--target-class: no class '{wanted}'{hint} (classes 0 to {len(class_names) - 1}: {some})"
    )


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
        copy: bool = True,
        fold: bool = True,
    ) -> None:
        self.fold = fold
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
            network = sys.modules["copy"].deepcopy(
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
                "fullgrad" not in self.methods and self.fold
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


# --------------------------------------------------------------------------------------------------
# 7  Output. Explanations become pictures and files; a log says which photos are done.
# --------------------------------------------------------------------------------------------------

COLORMAPS = {
    name[9:].lower(): number for name, number in vars(cv2).items() if name.startswith("COLORMAP_")
}
CELL = 320  # pixels: side of a picture on a sheet
TEXT = 22  # height of the text on a sheet, in pixels
LINE = TEXT + 12  # height of a line of text on a sheet
GAP = 8  # between the pictures of a sheet


def resized(picture: Picture, long_side: int) -> Picture:
    """Return the picture enlarged or shrunk to that long side."""
    height, width = picture.shape[:2]
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))

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


@dataclass(frozen=True)
class Block:
    """The part of a sheet that is about one class."""

    heading: str
    columns: list[list[Cell]]


class SheetLayout:
    """Where the parts of a sheet are, in pixels. All pictures of a sheet have the same size."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        columns = blocks[0].columns
        rows_of_columns = math.ceil(len(columns) / 6)  # columns are wrapped
        self.depth = max(len(column) for column in columns)  # pictures below each other
        self.across = math.ceil(len(columns) / rows_of_columns)

        # more rows of pictures would be taller than WebP takes
        rows = rows_of_columns * self.depth
        self.room = min(len(blocks), 40 // rows)

        self.cell_height = LINE + len(resized(columns[0][0].picture, CELL))
        self.block_height = LINE + rows * self.cell_height
        self.width = max(984, GAP + self.across * (CELL + GAP))
        self.height = LINE + self.room * self.block_height + GAP

    def corner(self, block: int, column: int) -> tuple[int, int]:
        """Return the left and upper edge of a column of a block."""
        down, right = divmod(column, self.across)
        left = GAP + right * (CELL + GAP)
        top = LINE + block * self.block_height
        return left, top + LINE + down * self.depth * self.cell_height


def draw_sheet(title: str, blocks: Sequence[Block], font: Any, colormap: str) -> Picture:
    """Return a table of pictures with a block for each class, below a title and a colour scale."""
    layout = SheetLayout(blocks)
    if len(blocks) > layout.room:
        warn(f"a sheet has room for {layout.room} classes; the others are left out")
    sheet = Image.new("RGB", (layout.width, layout.height), "white")
    pen = ImageDraw.Draw(sheet)

    pen.text((GAP, 6), title, "black", font)
    draw_scale(sheet, pen, font, colormap)

    for number, block in enumerate(blocks[: layout.room]):
        top = LINE + number * layout.block_height
        pen.text((GAP, top + 4), block.heading, "black", font)
        for place, column in enumerate(block.columns):
            left, upper = layout.corner(number, place)
            for cell in column:
                draw_cell(sheet, pen, font, cell, left, upper)
                upper += layout.cell_height
    return np.asarray(sheet)


def draw_scale(sheet: Image.Image, pen: Any, font: Any, colormap: str) -> None:
    """Draw the colours from 0 to 1 into the upper right corner of a sheet, where a title ends."""
    right = sheet.width
    pen.rectangle((right - 290, 0, right, LINE), "white")
    pen.text((right - 280, 6), "evidence 0", "dimgray", font)
    pen.text((right - 22, 6), "1", "dimgray", font)

    ramp = np.linspace(0, 1, 128, dtype=np.float32)[None]
    scale = draw_cam(np.zeros((TEXT, 128, 3), np.uint8), ramp, colormap, alpha=1)
    sheet.paste(Image.fromarray(scale), (right - 156, 8))


def draw_cell(sheet: Image.Image, pen: Any, font: Any, cell: Cell, left: int, top: int) -> None:
    """Draw a picture with its caption and note on a sheet."""
    pen.text((left, top + 4), cell.caption, "dimgray", font)
    picture = resized(cell.picture, CELL)
    sheet.paste(Image.fromarray(picture), (left, top + LINE))

    middle = top + LINE + len(picture) // 2
    place = (left + GAP, middle)
    pen.text(place, cell.note, "red", font, stroke_width=3, stroke_fill="white")


def find_font(names: Sequence[str]) -> tuple[Any, set[str]]:
    """Return the font with the most characters of the names, and the set of its characters.

    Pillow's own font has ASCII.
    """
    font = ImageFont.load_default(TEXT)
    characters = {chr(code) for code in range(32, 127)}
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
    """Return what stands for each class in file names: its name, or its index and its name.

    The index is added where two names would be equal, or where nothing of a name can stand there.
    """
    # without underscores, so that no two photos' names with labels behind them can be equal
    labels = [re.sub(r"[^\w.+]+|_", "-", name).strip("-.")[:40] for name in class_names]
    distinct = {label.casefold() for label in labels}
    if all(labels) and len(distinct) == len(labels):
        return labels
    return [f"{index}-{label}".rstrip("-") for index, label in enumerate(labels)]


def file_key(path: str | Path) -> int:
    """Return a hash of a path that ignores case and the form of accents, as file systems do."""
    return hash(unicodedata.normalize("NFC", os.path.abspath(path)).casefold())


def file_size(path: str | Path) -> int:
    """Return the size of a file in bytes, or -1 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.isfile(path):
            return os.path.getsize(path)
    return -1


def open_regular(path: Path, flags: int) -> io.FileIO:
    """Open a file without following a link or waiting for a FIFO.

    Raises OSError: it cannot be opened, or it is not a regular file.
    """
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

    options: str  # a hash, see `with_options`
    sizes: dict[str, Any]  # path relative to the log's folder -> bytes, as the record has them
    place: int  # of the record in the log, in bytes
    right: Any  # whether the prediction is right; None: the true class is not known
    metrics: Any  # as in the record


NO_ENTRY = LogEntry("", {}, -1, None, None)


class Log:
    """`results.jsonl` in the output folder, and the files that it lists.

    A line is a JSON object for a photo and a choice of methods; the last one of the two counts.
    Lines are only appended. Several processes append under a lock, and each reads what the others
    have appended before it writes, so that none writes over another's files.
    """

    def __init__(self, folder: Path, start_size: int) -> None:
        """Read the log, if there is one; nothing is created. Raises CallError: it cannot be read.

        From `start_size` bytes on it is of processes that run meanwhile.
        """
        self.folder = folder
        self.path = folder / LOG_NAME
        self._start_size = start_size
        self._real_folder = os.path.realpath(folder)
        self._lock = FileLock(folder / ".results.lock", poll_interval=0.01)
        self._position = 0  # up to which the log was read
        self._entries: dict[tuple[str, str], LogEntry] = {}  # by (image, methods)
        # file -> (image, options) of the last record that lists it
        self._owners: dict[int, tuple[str, str]] = {}
        self._stems: dict[int, str] = {}  # beginning of files' names -> image
        self._last_stem: dict[str, str] = {}  # image -> beginning of its files' names
        self._next_number: dict[
            str, int
        ] = {}  # name -> number behind it from which one may be free
        self._parts: Path | None = None  # folder of unfinished files
        self._parts_lock: FileLock | None = None

        try:
            with open_regular(self.path, os.O_RDONLY) as file:
                self._read(file)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CallError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    # Reading

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
        sizes = record.get("sizes")
        if not isinstance(sizes, dict):
            sizes = {}
        sizes = {path: sizes.get(path) for path in record_files(record)}

        entry = LogEntry(options, sizes, self._position, record.get("right"), record.get("metrics"))
        self._entries[image, record["method"]] = entry
        for path in sizes:
            self._owners[self._file_key(path)] = (image, options)
        stem = record.get("output_stem")
        if stem:  # not of an error
            self._stems[self._file_key(stem)] = image
            self._last_stem[image] = stem

    def _file_key(self, path: str) -> int:
        return file_key(os.path.join(self._real_folder, path))

    def _image_key(self, record: Mapping[str, Any]) -> str:
        """Return the path of a photo, with its folder's links resolved.

        `source` leads there from the log's folder.
        """
        if "source" in record:
            path = os.path.join(self._real_folder, record["source"])
        else:
            path = record["image"]
        return os.path.normcase(real_path(path))

    def entry(self, image: str, method: str) -> LogEntry:
        """Return what is known of a photo and a choice of methods."""
        return self._entries.get((self._image_key({"image": image}), method), NO_ENTRY)

    def is_done(self, image: str, method: str, options: str, only_wrong: bool = False) -> bool:
        """Return whether a photo's files are there as a run with the same options has written them.

        A record without files is enough for a run that draws the wrong photos only.
        """
        entry = self.entry(image, method)
        if entry is NO_ENTRY or entry.options != options:
            return False
        if not entry.sizes:
            return only_wrong

        owner = (self._image_key({"image": image}), options)
        for path, size in entry.sizes.items():
            if self._owners[self._file_key(path)] != owner or file_size(self.folder / path) != size:
                return False
        return True

    # Writing

    def prepare(self) -> None:
        """Create the log and a folder for unfinished files, and remove those of killed processes.

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
        """Remove the folder for unfinished files."""
        if self._parts_lock:
            self._parts_lock.release()
            remove_parts(self._parts)

    def write(self, record: dict[str, Any], base: str, outputs: Sequence[OutputFile]) -> bool:
        """Write the files of a photo and append its record.

        Where `base`, such as cats/33, is another photo's, or a file is in the way, it becomes
        cats/33_2, in later runs as well. `record` gets `files` (those of a class in its entry of
        `classes`), `sizes`, `output_stem` and `source`.

        Returns False where another process has done so meanwhile. Raises OSError: the disk is full,
        a name is too long ...
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
                entry = self._entries.get((image, record["method"]), NO_ENTRY)
                is_same = entry.options == record["options"]
                if is_same and entry.place >= self._start_size:
                    return False
                if is_same and entry.sizes and not outputs:  # drawn before; this run draws none
                    self._add_files(record, [], [])
                    return True

                stem = self._find_stem(base, image, outputs)
                paths = file_paths(stem, outputs)
                self._add_files(record, outputs, paths)
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
        known = self._last_stem.get(image, "")
        first = 2 if known else self._next_number.get(base, 2)
        candidates = [base]
        if re.fullmatch(re.escape(base) + r"_\d+", known):
            candidates.insert(0, known)

        for stem in candidates:
            if self._is_free(stem, image, outputs):
                return stem

        for number in itertools.count(first):
            stem = f"{base}_{number}"
            if self._is_free(stem, image, outputs):
                if not known:  # all numbers before it are of other photos
                    self._next_number[base] = number + 1
                return stem

    def _is_free(self, stem: str, image: str, outputs: Sequence[OutputFile]) -> bool:
        """Return whether a photo's files may have names that begin so.

        Raises OSError: a name is too long.
        """
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

    def _add_files(
        self, record: dict[str, Any], outputs: Sequence[OutputFile], paths: Sequence[str]
    ) -> None:
        """Put the paths and the sizes of files into a record."""
        record["files"] = {}
        record["sizes"] = {}
        for entry in record["classes"]:
            entry["files"] = {}

        for output, path in zip(outputs, paths, strict=True):
            record["sizes"][path] = len(output.content)
            if output.index is None:
                record["files"][output.kind] = path
            else:
                record["classes"][output.index]["files"][output.kind] = path

    def _append(self, file: io.FileIO, record: dict[str, Any]) -> None:
        """Append a line, all of it or none; it is read when the log is locked next.

        Raises OSError: there is no room.
        """
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


def real_path(path: str) -> str:
    """Return the absolute path of a file with the links to its folder resolved."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(real_folder(folder), name)


@functools.cache
def real_folder(folder: str) -> str:
    return os.path.realpath(folder)


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


# ---------------------------------------------------------------------------------------------------------------------
# 8  Gallery. A page of all results, made from the log alone: one file without a server, a package or the network.
# ---------------------------------------------------------------------------------------------------------------------


def write_gallery(folder: Path, colormap: str = "jet") -> Path | None:
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
    rows = []
    return {**item, "top": [likely(entry) for entry in (guess, *top[1:])], "rows": rows}


def heat_grid(cam: Floats) -> list[int]:
    """Return a map as 8 x 8 whole numbers from 0 to 100, row by row."""
    grid = cv2.resize(cam, (8, 8), interpolation=cv2.INTER_AREA)
    return np.rint(100 * grid).astype(int).flatten().tolist()


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


# --------------------------------------------------------------------------------------------------
# 9  Run. Threads read, one explains, threads write; a photo that fails stops nothing.
# --------------------------------------------------------------------------------------------------

THREADS = min(4, os.cpu_count() or 1)  # that read, and as many that draw
FEW = 4  # photos for which folding the batch norms takes longer than it saves
EMPTY_MAPS = 10  # that have a warning of their own
NOT_IN_RESULTS = (  # options that change no picture and no record
    *("images", "ckpt", "device", "batch_size", "output"),
    *("skip_existing", "only_wrong", "gallery"),
)


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
    targets: list[int]  # indices, PREDICTED or TRUTH; empty: the `top_k` likeliest classes
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
    """Return the photos, each with a hash of the options and of the files that are read for it.

    A file counts as changed where its size or its time has changed.
    """
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
    """Return size and time of a file, or zeros where there is none."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return 0, 0


def load_job(request: Request, count: int) -> Job:
    """Load the network that the command line asks for, and print what is assumed about it.

    `count` photos are to be explained. Raises CallError.
    """
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
    )
    names = classifier.class_names
    targets = find_targets(request, names)
    explainer = make_explainer(args, classifier, count)

    if request.local_rank == 0:
        told = classifier.describe(explainer.target_layers)
        if request.world_size > 1:
            told += f", process {request.rank} of {request.world_size}"
        print_line(told, sys.stderr)

    labels = file_labels(names) if targets or args.top_k not in (None, 1) else None
    font, glyphs = find_font(names) if args.sheet else (None, set())
    shown = [name if glyphs.issuperset(name) else str(index) for index, name in enumerate(names)]
    return Job(args, classifier, explainer, targets, labels, font, glyphs, shown)


def choose_device(request: Request) -> str | None:
    """Return the device to compute on; torchrun starts a process for each GPU."""
    device = request.args.device
    if request.world_size > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{request.local_rank}"
    return device


def find_targets(request: Request, names: Sequence[str]) -> list[int]:
    """Return the classes to explain, see `Job.targets`.

    Raises CallError: there is no such class, or no photo's true class is known.
    """
    targets = []
    for wanted in request.args.target_classes or ():
        index = find_class(wanted, names)
        if index not in targets:
            targets.append(index)

    needs_truth = request.args.only_wrong or TRUTH in targets
    if needs_truth and all(true_class(photo.path, names) is None for photo in request.photos):
        some = ", ".join(names[:8])
        raise CallError(f"no photo's folder is named after a class ({some}), so no truth is known")
    return targets


def make_explainer(args: argparse.Namespace, classifier: Classifier, count: int) -> Explainer:
    """Return what explains the photos. It takes over the classifier's network.

    Raises CallError: the network or the layer does not work at this input size.
    """
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
    )

    side = classifier.input_size
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        explainer.prepare(noise)
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise CallError(
            f"{classifier.arch} fails at inputs of {side} x {side}: {first_line(error)}; "
            "pass another --input-size"
        ) from error
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
    item = Item(task, path, true_class(path, classifier.class_names))
    try:
        short_side = 0 if classifier.squash else classifier.preset.resize_size[0]
        with open_photo(path, short_side) as photo:
            height, width = photo.shape[:2]
            item.box = classifier.seen_box(height, width)

            seen = classifier.seen(photo)
            item.picture = resized(seen, job.args.output_size or min(max(seen.shape[:2]), 1024))
            item.inputs = classifier.preprocess(photo)
    except PhotoError as error:
        item.error = str(error)
    except (cv2.error, MemoryError) as error:
        item.error = f"{path}: cannot be prepared: {first_line(error)}"
    else:
        item.record = {
            "image": path,
            "width": width,
            "height": height,
            "method": ",".join(job.args.methods),
        }
    return item


def explain_items(items: Iterator[Item], job: Job, batch_size: BatchSize) -> Iterator[Item]:
    """Yield the items with their explanations, or what went wrong, in order.

    Raises CallError: the GPU has failed.
    """
    while batch := list(itertools.islice(items, batch_size.size)):
        readable = [item for item in batch if not item.error]
        for _ in batch_size.run(partial(try_to_explain, job=job), readable):
            pass
        yield from batch


def try_to_explain(items: Sequence[Item], job: Job) -> None:
    """Explain a batch; where the network fails, explain each photo alone, to find the one at fault.

    Raises CallError: the GPU has failed. Raises the error of too little memory for a batch.
    """
    try:
        explain(items, job)
    except (RuntimeError, ValueError, MemoryError) as error:
        out_of_memory = is_out_of_memory(error)
        if out_of_memory and len(items) > 1:
            raise
        if re.search("(CUDA|HIP) error", str(error)) and not out_of_memory:
            raise CallError(
                f"the GPU has failed: {first_line(error)}; go on with --skip-existing"
            ) from error

        if len(items) == 1:
            items[0].error = f"{items[0].path}: the network failed: {first_line(error)}"
            return
        for item in items:
            try_to_explain([item], job)


def explain(items: Sequence[Item], job: Job) -> None:
    """Fill in the explanations and the records of photos.

    With --only-wrong, the photos that are predicted right get a record alone.
    """
    if job.args.only_wrong:
        items = predict(items, job)
        if not items:
            return

    targets = None
    if job.targets:
        targets = [targets_of(item, job.targets) for item in items]
    inputs = torch.stack([item.inputs for item in items])
    explanation = job.explainer(inputs, targets, top=job.args.top_k or 1)

    for index, item in enumerate(items):
        item.explanation = explanation.only(index)
        describe_item(item, job)


def predict(items: Sequence[Item], job: Job) -> list[Item]:
    """Fill in the records of photos from their predictions; return those that are predicted wrong.

    Raises ValueError: the logits are not finite.
    """
    inputs = torch.stack([item.inputs for item in items])
    logits = job.explainer.logits(inputs).cpu().numpy()
    if not np.isfinite(logits).all():
        raise ValueError("the logits are NaN or infinite")

    wrong = []
    for item, row in zip(items, logits[:, None], strict=True):
        item.explanation = Explanation({}, None, row, row.argmax(1, keepdims=True))
        describe_item(item, job)
        if item.record.get("right") is False:
            wrong.append(item)
    return wrong


def targets_of(item: Item, targets: Sequence[int]) -> list[int]:
    """Return the classes to explain for a photo, with its true class in the place of TRUTH."""
    truth = item.truth
    if truth is None:
        truth = PREDICTED
        if TRUTH in targets:
            warn(
                "where the folder is not named after a class, "
                "the prediction is explained instead of the truth"
            )
    return [truth if target == TRUTH else target for target in targets]


def describe_item(item: Item, job: Job) -> None:
    """Complete the record of a photo that was explained, with the metrics if they are asked for."""
    explanation = item.explanation
    classifier = job.classifier
    names = classifier.class_names
    p = probabilities(torch.from_numpy(explanation.logits))[0].numpy()
    order = np.argsort(-p, kind="stable")

    def describe(index: int) -> dict[str, Any]:
        probability = round(float(p[index]), 6)
        return {"index": int(index), "name": names[index], "probability": probability}

    record = item.record
    record["prediction"] = describe(order[0])
    record["classes"] = [describe(index) for index in explanation.targets[0]]
    if item.truth is not None:
        record["truth"] = {"index": item.truth, "name": names[item.truth]}
        record["right"] = item.truth == record["prediction"]["index"]

    record["top5"] = [describe(index) for index in order[:5]]

    record["target_layer"] = ",".join(job.explainer.target_layers)
    record["options"] = item.task.options
    record["input_size"] = classifier.input_size
    record["resize"] = job.args.resize
    record["box"] = [round(edge, 2) for edge in item.box]
    record["mean"] = [round(value, 6) for value in classifier.preset.mean]
    record["std"] = [round(value, 6) for value in classifier.preset.std]

    record["heat"] = {
        method: [heat_grid(cam) for cam in cams[0]] for method, cams in explanation.cams.items()
    }
    if job.args.metrics:
        record["metrics"] = measure_item(item, job)


def measure_item(item: Item, job: Job) -> list[dict[str, Any]]:
    """Return the metrics of each map of a photo."""
    inputs = item.inputs[None]
    measured = []
    for index, entry in enumerate(item.record["classes"]):
        for method, cams in item.explanation.cams.items():
            metrics = faithfulness(job.explainer, inputs, cams[0, index], entry["index"])
            measured.append({"class": entry["name"], "method": method, **metrics})
    return measured


# Drawing


@dataclass(frozen=True)
class Drawing:
    """A picture of an explanation."""

    output: str  # one of OUTPUTS
    method: str  # empty where the picture is of no method
    picture: Picture
    note: str  # across it on the sheet

    @property
    def kind(self) -> str:
        """Return what it is called in the record and in file names."""
        return f"{self.method}_{self.output}".lstrip("_")


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
        label = f"_{job.labels[entry['index']]}" if job.labels else ""
        drawings = draw_class(item, job, index)
        for drawing in drawings:
            name = f"{drawing.kind}_{{}}{label}.{args.format}"
            content = encode(drawing.picture, args.format, args.quality)
            outputs.append(OutputFile(drawing.kind, index, name, content))

        if args.sheet:
            heading = f"explained: {job.shown[entry['index']]} {entry['probability']:.3f}"
            blocks.append(Block(heading, sheet_columns(item.picture, drawings)))

    if args.sheet:
        sheet = draw_sheet(sheet_title(item, job), blocks, job.font, args.colormap)
        content = encode(sheet, args.format, args.quality)
        outputs.append(OutputFile("sheet", None, f"{{}}_sheet.{args.format}", content))
    if args.save_arrays:
        outputs.append(OutputFile("arrays", None, "{}.npz", pack_arrays(item, job)))
    return outputs


def draw_class(item: Item, job: Job, index: int) -> list[Drawing]:
    """Return the pictures of one explained class of a photo."""
    args = job.args
    drawings = []
    for output in args.outputs:
        for method in [""] if output == "gb" else args.methods:
            picture = draw(
                output,
                item.explanation,
                item.picture,
                method,
                index,
                colormap=args.colormap,
                alpha=args.alpha,
                fade=args.fade,
            )

            note = ""
            if method and not item.explanation.cams[method][0, index].any():
                note = "no positive evidence"
            drawings.append(Drawing(output, method, picture, note))
    return drawings


def sheet_columns(source: Picture, drawings: Sequence[Drawing]) -> list[list[Cell]]:
    """Return the columns of a sheet: gb is under the source, a method's cam_gb under its cam."""
    columns = {"": [Cell("source", source)]}
    for drawing in drawings:
        caption = f"{drawing.method} {drawing.output}".strip()
        cell = Cell(caption, drawing.picture, drawing.note)
        columns.setdefault(drawing.method, []).append(cell)
    return list(columns.values())


def sheet_title(item: Item, job: Job) -> str:
    """Return the line on top of a sheet; a character that the font lacks is shown as ?."""
    name = "".join(c if c in job.glyphs else "?" for c in os.path.basename(item.path))
    best = item.record["prediction"]
    prediction = f"{job.shown[best['index']]} {best['probability']:.3f}"
    if item.record.get("right") is False:
        prediction += f" (truth: {job.shown[item.truth]})"
    return f"{name}   prediction: {prediction}   layer: {item.record['target_layer']}"


def encode(picture: Picture, ending: str, quality: int) -> bytes:
    """Return a picture as a file of that format."""
    flags = []
    if ending == "jpg":
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality]
    elif ending == "webp":
        flags = [cv2.IMWRITE_WEBP_QUALITY, quality]

    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(f".{ending}", bgr, flags)
    return encoded.tobytes()


def pack_arrays(item: Item, job: Job) -> bytes:
    """Return an explanation as a file of NumPy's; README.md has the shapes."""
    explanation = item.explanation
    arrays = {
        "methods": job.args.methods,
        "classes": explanation.targets[0],
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


def save_item(item: Item, args: argparse.Namespace, log: Log, tally: Tally) -> None:
    """Write the files and the record of a photo, print its line, and count it."""
    if not item.error:
        base = "/".join([*Path(item.task.photo.folder).parts, Path(item.path).stem])
        try:
            written = log.write(item.record, base, item.outputs)
        except OSError as error:
            item.error = f"{item.path}: its results cannot be written: {error.strerror or error}"

    if item.error:
        log.write_error(item.path, ",".join(args.methods), item.error)
        print_line(f"error: {item.error}", sys.stderr)
        tally.failed += 1
    elif not written:
        tally.skipped += 1
    else:
        tally.done += 1
        print_result(result_line(item, args.output))
        warn_of_empty_maps(item, tally)


def print_result(line: str) -> None:
    """Print a line on stdout; when its reader has gone, as in `| head`, the run goes on."""
    try:
        print_line(line)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
            raise
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def result_line(item: Item, folder: Path) -> str:
    """Return what is printed of a photo: prediction, explained classes, metrics and files."""
    record = item.record
    prediction = with_probability(record["prediction"])
    if record.get("right") is False:
        prediction += f" (truth: {record['truth']['name']})"
    told = [prediction]

    indices = [entry["index"] for entry in record["classes"]]
    if indices != [record["prediction"]["index"]]:
        explained = [with_probability(entry) for entry in record["classes"]]
        told.append(f"explained: {', '.join(explained)}")

    for measured in record.get("metrics", ()):
        subject = measured["method"]
        if len(indices) > 1:
            subject += f" for {measured['class']}"
        told.append(f"{subject}: {format_metrics(measured)}")

    files = [str(folder / path) for path in record["sizes"]]
    return f"{item.path}: {'; '.join(told)} -> {', '.join(files) or 'no files'}"


def with_probability(entry: Mapping[str, Any]) -> str:
    """Return a class with its probability; a colon stands where the name ends in a number."""
    name = entry["name"]
    if name[-1:].isdigit():
        name += ":"
    return f"{name} {entry['probability']:.3f}"


def format_metrics(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.3f}" for name in METRICS)


def warn_of_empty_maps(item: Item, tally: Tally) -> None:
    """Print a warning for each map that is all zeros, up to a number of them; count them."""
    layer = item.record["target_layer"]
    for method, cams in item.explanation.cams.items():
        for entry, cam in zip(item.record["classes"], cams[0], strict=True):
            if cam.any():
                continue
            tally.empty_maps += 1
            if tally.empty_maps <= EMPTY_MAPS:
                subject = f"the {method} map for {entry['name']}"
                reason = f"no positive evidence at {layer}"
                print_line(f"warning: {item.path}: {subject} is all zeros: {reason}", sys.stderr)


def finish(args: argparse.Namespace, log: Log, photos: Sequence[Photo]) -> str:
    """Write the page of all results. Return what the closing line says of it and of the photos."""
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
    verdicts = [entry.right for entry in entries if isinstance(entry.right, bool)]
    wrong = verdicts.count(False)

    told = ""
    if verdicts:
        right = len(verdicts) - wrong
        told += f"; accuracy {100 * right / len(verdicts):.1f} % ({right} of {len(verdicts)})"
    if args.metrics:
        with contextlib.suppress(LookupError, TypeError, ValueError):  # another program's records
            told += mean_metrics(entries, args.methods)

    if page and wrong:
        told += f"; the {wrong} wrong ones first in {page}"
    elif page:
        told += f"; see {page}"
    return told


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
            save_item(item, args, log, tally)


def run(request: Request) -> int:
    """Explain the photos that the command line names. Returns the exit status; raises CallError."""
    args = request.args
    if args.list_layers:
        return list_layers(request)
    began = time.monotonic()
    log = Log(args.output, request.log_size)

    share = request.photos[request.rank :: request.world_size]
    tasks = with_options(args, share)
    todo = []
    for task in tasks:
        if not is_done(task, args, log):
            todo.append(task)

    tally = Tally(skipped=len(tasks) - len(todo))

    interrupted = False
    with contextlib.closing(log):
        try:
            if todo:
                explain_photos(todo, request, log, tally)
        except KeyboardInterrupt:
            interrupted = True
        if interrupted or tally.skipped or len(request.photos) > 1:
            told = finish(args, log, share)
            print_summary(request, tally, time.monotonic() - began, told, interrupted)

    if interrupted:
        return 130
    # torchrun stops all processes as soon as one does not return 0
    return int(tally.failed > 0 and request.world_size == 1)


def is_done(task: Task, args: argparse.Namespace, log: Log) -> bool:
    """Return whether a photo is to be skipped, since an earlier run has done the same."""
    if not args.skip_existing:
        return False
    return log.is_done(task.photo.path, ",".join(args.methods), task.options, args.only_wrong)


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
    sys.exit(main(REQUEST))
