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


class CallError(
    ValueError, argparse.ArgumentTypeError
):  # argparse prints the message of an ArgumentTypeError
    """The call cannot be carried out. The message is one line that says what to do. Exit status 2."""


class PhotoError(ValueError):
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


def find_photos(inputs: Sequence[str]) -> list[tuple[str, str]]:
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
    return list(found.values())


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
            os.path.basename(file) for line in lines for file in parse_record(line).get("files", ())
        )


def parse_record(line: str | bytes) -> dict[str, Any]:
    """Return a line of the log as a dict; an empty one where it is no record of this program."""
    try:
        record = json.loads(line)
        files = record.setdefault("files", [])
        texts = (
            record["image"],
            record["method"],
            *(record.get(k, "") for k in ("options", "output_stem", "source")),
        )
        return record if all(isinstance(text, str) for text in (*texts, *files)) else {}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


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
    args.photos = []
    if args.list_layers:
        return args
    try:
        args.photos, status = find_photos(args.images), 1
        faults = [f"{path}: {fault}" for path, _ in args.photos if (fault := photo_fault(path))]
        if len(faults) < len(args.photos):
            args.output.mkdir(parents=True, exist_ok=True)
            log = args.output / LOG_NAME
            args.log_size = (
                log.stat().st_size if log.is_file() else 0
            )  # now, before torch's seconds
            return args
    except CallError as error:
        faults = [str(error)]
    except OSError as error:
        faults, status = (
            [f"--output {args.output}: cannot write there: {error.strerror or error}"],
            2,
        )
    for fault in faults:
        print_line(f"error: {fault}", sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    ARGS = start()
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # threads that spin while they wait slow the others down
    sys.excepthook = report_crash
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePath
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
# 8  Gallery. A page of all results, made from the log alone: one file, no server, no network.
# ---------------------------------------------------------------------------------------------------------------------

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

    entries.sort(key=lambda entry: natural_key(entry.item["path"]))
    data = {
        "folder": folder.resolve().name,
        "colours": heat_colours(colormap),
        "means": mean_heat(entries),
        "items": [entry.item for entry in entries],
    }
    content = fill_page(data)

    with tempfile.TemporaryDirectory(
        prefix=".part-", dir=folder, ignore_cleanup_errors=True
    ) as parts:
        part = Path(parts, page.name)
        part.write_bytes(content)
        os.replace(part, page)
    return page


def is_own_page(page: Path) -> bool:
    """Return whether a file is a page that this program has written."""
    if not page.is_file():
        return False
    with open(page, "rb") as file:
        return PAGE_MARK in file.read(300)


def natural_key(path: str) -> str:
    """Return a key that sorts 9.jpg before 10.jpg."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(12), path)


def heat_colours(colormap: str) -> list[str]:
    """Return the colours of the heat 0, 1 ... 100, as "#00007f"."""
    levels = np.linspace(0, 255, 101).astype(np.uint8)[:, None]
    number = COLORMAPS.get(colormap, cv2.COLORMAP_JET)
    colours = cv2.applyColorMap(levels, number)
    return [f"#{red:02x}{green:02x}{blue:02x}" for blue, green, red in colours[:, 0]]


def fill_page(data: Mapping[str, Any]) -> bytes:
    """Return the page with its data; no text in the data can end the script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")

    page = PAGE.replace("STYLE", PAGE_STYLE, 1)
    page = page.replace("SCRIPT", PAGE_SCRIPT, 1)
    page = page.replace("DATA", text, 1)
    return page.encode("utf-8", "backslashreplace")


@dataclass
class PageEntry:
    """What the page tells of one record."""

    key: str  # of the photo: the same for all its records
    item: dict[str, Any]  # for the script, see page_item
    heat: dict[str, bytes]  # method -> 64 numbers from 0 to 100: the map of the predicted class


def read_entries(log: Path) -> list[PageEntry]:
    """Return the last record of each photo and choice of methods; other lines are left out."""
    entries = {}
    left_out = 0

    with open(log, "rb") as lines:
        for line in lines:
            try:
                record = parse_record(line)
                key = record.get("source", record["image"])
                entry = PageEntry(key, page_item(record), predicted_heat(record))
                entries[key, record["method"]] = entry
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
                left_out += 1

    if left_out:
        warn(f"{log}: lines left out of the page, not records of this program: {left_out}")
    return list(entries.values())


def page_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as the page's script reads it. Raises what `read_entries` catches."""
    item = {
        "path": record["image"],
        "source": source_link(record),
        "methods": record["method"].split(","),
        "top": [],
        "classes": [],
    }
    if "error" in record:
        item["state"] = "failed"
        item["error"] = str(record["error"])
        return item

    prediction = record["prediction"]
    truth = record.get("truth")
    item["state"] = "unknown"
    item["prediction"] = str(prediction["name"])
    if truth:
        item["state"] = "wrong"
        item["truth"] = str(truth["name"])
        if truth["index"] == prediction["index"]:
            item["state"] = "right"

    item["top"] = [likely_class(entry) for entry in record["top5"]]
    item["classes"] = explained_classes(record)
    item["shown"] = predicted_place(record) or 0  # of the class whose map is on the card
    item["size"] = [finite(record["width"]), finite(record["height"])]
    item["box"] = [finite(side) for side in record["box"]]

    left, top, right, bottom = item["box"]
    shortest = min(right - left, bottom - top, *item["size"])
    if shortest <= 0:
        raise ValueError("the photo or the part that the network saw is empty")
    return item


def explained_classes(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the explained classes: name, probability, links to files, methods with an empty map."""
    classes = []
    for place, entry in enumerate(record["classes"]):
        explained = likely_class(entry)
        explained["files"] = {kind: as_link(path) for kind, path in entry["files"].items()}
        heat = class_heat(record, place)
        explained["empty"] = [method for method in heat if not any(heat[method])]
        classes.append(explained)
    return classes


def likely_class(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name and the probability of a class."""
    return {"name": str(entry["name"]), "probability": round(finite(entry["probability"]), 6)}


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


def predicted_place(record: Mapping[str, Any]) -> int | None:
    """Return which of the explained classes is the prediction; None where it was not explained."""
    for place, entry in enumerate(record["classes"]):
        if entry["index"] == record["prediction"]["index"]:
            return place
    return None


def predicted_heat(record: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the 64 numbers of each method for the predicted class; nothing if there are none."""
    if "error" in record:
        return {}

    place = predicted_place(record)
    if place is None:
        return {}
    return class_heat(record, place)


def mean_heat(entries: Iterable[PageEntry]) -> list[dict[str, Any]]:
    """Return the mean map of each method, predicted class and result (right, wrong, unknown)."""
    # a photo counts once, also where several records have a map by the same method
    last = {}
    for entry in entries:
        for method, grid in entry.heat.items():
            group = method, entry.item["prediction"], entry.item["state"]
            last[entry.key, method] = group, grid

    grids = {}
    for group, grid in last.values():
        grids.setdefault(group, []).append(grid)

    means = []
    for (method, name, result), members in grids.items():
        values = np.array([list(grid) for grid in members])
        mean = {
            "method": method,
            "prediction": name,
            "result": result,
            "photos": len(members),
            "grid": np.rint(values.mean(0)).astype(int).tolist(),
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
  <summary>Mean heat of each predicted class (30 at most, those with most mistakes first)</summary>
  <p>The mean of the maps of all photos with this prediction: a hot corner or edge that a whole
    class shares is a label or a border, not the object.</p>
  <div></div>
</details>
<details id="confusion">
  <summary>True and predicted classes (30 at most, those with most mistakes)</summary>
  <table></table>
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

* { box-sizing: border-box; margin: 0; font: inherit; color: inherit; }
html, dialog { background: var(--page); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
html { scroll-padding-top: 80px; }
html:has(dialog[open]) { overflow: hidden; }
body { max-width: 1640px; margin: auto; padding: 20px clamp(12px, 2.5vw, 32px); }
h1, h2, h3, summary { font-weight: 600; }
h1 { font-size: 24px; }
h3, summary { margin: 14px 0 6px; }
small, figcaption, th, label { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
button, select, input {
  min-height: 36px;
  padding: 5px 12px;
  border: 1px solid var(--line);
  border-radius: 7px;
  background: var(--card);
  color: var(--text);
}
button:hover, [aria-pressed="true"] { border-color: var(--mark); color: var(--mark); }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }

/* Names of files and classes, of any length and direction: one line. */
.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; unicode-bidi: isolate; }
.verdict { color: var(--state); overflow-wrap: anywhere; }
.chance { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 3px 8px; }
.bar {
  grid-column: 1 / 3;
  height: 5px;
  background: linear-gradient(var(--state) 0 0) no-repeat var(--line);
}

/* A picture in its own shape, at most --limit high, and what lies over it. */
.frame {
  position: relative;
  display: grid;
  place-items: center;
  overflow: hidden;
  aspect-ratio: var(--ratio);
  width: min(100%, var(--limit) * var(--ratio));
  margin: 0 auto;
  background: var(--line);
}
img { width: 100%; height: 100%; }
.plain, .seen, .note { position: absolute; }
.heat .plain { display: none; }
.seen { outline: 2px solid #fff; box-shadow: 0 0 0 9999px rgb(0 0 0 / 55%); }
.note {
  inset: auto 0 0;
  padding: 4px;
  background: rgb(0 0 0 / 70%);
  color: #fff;
  text-align: center;
}

#means > div { display: flex; flex-wrap: wrap; gap: 4px 20px; }
#means section { max-width: 226px; }
#means button { margin-right: 6px; padding: 5px; }
#means small { color: var(--state); }
canvas { display: block; width: 92px; height: 92px; }

table { display: block; max-height: 70vh; overflow: auto; }
th { max-width: 180px; text-align: right; }
tr:first-child th + th {
  max-height: 130px;
  writing-mode: vertical-rl;
  transform: rotate(180deg);
  text-align: left;
}
td button {
  width: 100%;
  min-width: 40px;
  padding: 0;
  background: color-mix(in srgb, var(--state) var(--share), var(--card));
}

form, nav {
  position: sticky;
  top: 0;
  z-index: 1;
  display: flex;
  flex-wrap: wrap;
  align-items: end;
  gap: 10px 16px;
  padding: 12px 0;
  background: var(--page);
}
label { display: grid; }
select { width: 180px; }

main {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(160px, 1fr));
  gap: 14px;
  padding-top: 12px;
}
.card {
  --limit: 260px;
  display: grid;
  gap: 3px;
  align-content: start;
  padding: 0 0 10px;
  overflow: hidden;
  text-align: left;
}
.card > * { min-width: 0; }
.card > :not(.frame) { padding: 0 11px; }

dialog {
  --limit: 70vh;
  width: 100%;
  height: 100%;
  max-width: none;
  max-height: none;
  padding: 0 2.5vw 24px;
  border: 0;
}
nav h2 { flex: 1 0 100%; overflow-x: auto; white-space: nowrap; unicode-bidi: isolate; }
.chances {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: 10px 20px;
}
.figures {
  display: grid;
  grid-template-columns: repeat(4, minmax(0, 1fr));
  gap: 14px;
  align-items: end;
}
figcaption { text-align: center; }

@media (max-width: 700px) {
  form { position: static; }
  label { flex: 1 1 40%; }
  select { width: 100%; }
  .figures { grid-template-columns: 1fr 1fr; }
}
"""

PAGE_SCRIPT = r"""
"use strict";

const find = (selector) => document.querySelector(selector);
const { folder, colours, means, items } = JSON.parse(find("#data").textContent);
const main = find("main");
const form = find("form");
const dialog = find("dialog");

const MOST_CLASSES = 30; // in the table and among the mean maps
const CARDS_AT_ONCE = 200;

let list = []; // the items that pass the filters, in order
let position = 0; // in the list: the item that the dialog shows

// ---- Elements

// Return a new element; `kind` is its tag with its classes, as "span.bar". Text stays text.
function make(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  Object.assign(element, { className: classes.join(" "), ...properties });
  element.append(...children);
  return element;
}

function nameLine(tag, text) {
  return make(`${tag}.name`, { title: text }, text);
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

// ---- What the items say

// Return the probability of the prediction; a photo that failed has none and is sorted last.
function certainty(item) {
  return item.state === "failed" ? 2 : item.top[0].probability;
}

function classesOf(item) {
  return [...new Set([item.truth, item.prediction])].filter((name) => name !== undefined);
}

function pairLabel(truth, prediction) {
  return `true ${truth}, predicted ${prediction}`;
}

function predictionLabels(item) {
  return [`predicted ${item.prediction}`, pairLabel(item.truth, item.prediction)];
}

// Return a map from each value to the number of times it occurs, the most frequent first.
function countValues(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return new Map([...counts].sort((one, other) => other[1] - one[1]));
}

// Return the names that `namesOf` gives for these items, those with most mistakes first.
function worstClasses(items, namesOf) {
  const mistakes = items.filter((item) => item.state === "wrong");
  const byMistakes = countValues(mistakes.flatMap(namesOf)).keys();
  const byNumber = countValues(items.flatMap(namesOf)).keys();
  return [...new Set([...byMistakes, ...byNumber])].slice(0, MOST_CLASSES);
}

// Each photo once, as its last record in the order of paths has it.
const photos = [...new Map(items.map((item) => [item.source, item])).values()];
const photosWithTruth = photos.filter((item) => item.truth !== undefined);

// ---- Pictures

function picture(source, description) {
  const replace = (event) => event.target.replaceWith("no picture");
  return make("img", { loading: "lazy", alt: description, src: source, onerror: replace });
}

// Return a frame in which one percent is one percent of an area of this size.
function pictureFrame(width, height, ...children) {
  return make("span.frame", { style: `--ratio: ${width / height}` }, ...children);
}

function placed(left, top, width, height) {
  const shares = Object.entries({ left, top, width, height });
  return shares.map(([name, share]) => `${name}: ${100 * share}%`).join("; ");
}

// Return the photo; a frame shows which part of it the network saw.
function sourcePicture(item) {
  const [width, height] = item.size ?? [1, 1];
  const frame = pictureFrame(width, height, picture(item.source, "source"));
  if (item.box) {
    const [left, top, right, bottom] = item.box;
    const seenWidth = (right - left) / width;
    const seenHeight = (bottom - top) / height;
    if (Math.min(seenWidth, seenHeight) < 0.99) {
      const style = placed(left / width, top / height, seenWidth, seenHeight);
      frame.append(make("span.seen", { style }));
    }
  }
  return frame;
}

// Return one of the pictures of an explained class, over a map the photo without heat (see toggleHeat).
function classPicture(item, explained, kind) {
  const [left, top, right, bottom] = item.box;
  const width = right - left;
  const height = bottom - top;
  const frame = pictureFrame(width, height, picture(explained.files[kind], kind));
  if (kind.endsWith("_cam")) {
    const plain = picture(item.source, "");
    plain.className = "plain";
    plain.style = placed(-left / width, -top / height, item.size[0] / width, item.size[1] / height);
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

function heatButton() {
  return make("button.toggle", { type: "button", ariaPressed: true, onclick: toggleHeat }, "Heat (H)");
}

// ---- Cards

function chanceBar({ name, probability }, state) {
  const bar = make("span.bar", { style: `background-size: ${percent(probability)}` });
  return make(`span.chance.${state}`, {}, nameLine("span", name), percent(probability), bar);
}

function verdict(item) {
  const texts = { right: "✓ right", wrong: `✕ true: ${item.truth}`, failed: `✕ ${item.error}` };
  return make(`span.verdict.${item.state}`, {}, texts[item.state] ?? "");
}

function card(item) {
  const element = make("button.card", { onclick: () => showItem(list.indexOf(item)) });
  const explained = item.classes[item.shown];
  const method = form.Method.value || item.methods[0];
  const kinds = [`${method}_cam`, `${method}_cam_gb`, "gb"];
  const kind = kinds.find((kind) => explained?.files[kind]);

  if (kind) element.append(classPicture(item, explained, kind));
  if (item.top.length) element.append(chanceBar(item.top[0], item.state));
  element.append(verdict(item));
  element.append(nameLine("small", item.path.split(/[\\/]/).at(-1)));
  if (kind) element.append(make("small", {}, `${kind} for ${explained.name}`));
  element.title = item.path;
  return element;
}

// Add cards until they reach somewhat below the window, and until there are more than `least`.
function addCards(least = 0) {
  while (main.childElementCount < list.length) {
    const isNear = main.getBoundingClientRect().bottom < innerHeight + 2000;
    if (!isNear && main.childElementCount > least) break;
    const next = main.childElementCount;
    main.append(...list.slice(next, next + CARDS_AT_ONCE).map(card));
  }
}

// ---- Filters

// For each field of the form, the values of an item of which one must be the field's.
const FILTERS = {
  Result: (item) => [item.state],
  Class: classesOf,
  Method: (item) => item.methods,
  Prediction: predictionLabels, // a hidden field, set by the table and the mean maps
};

// What is sorted by, the smallest first; items of equal value stay in the order of their paths.
const ORDERS = {
  "wrong, most sure first": (item) => certainty(item) * (item.state === "wrong" ? -1 : 1),
  "least sure first": certainty,
  "most sure first": (item) => (item.state === "failed" ? 2 : -certainty(item)),
  path: () => 0,
};

function passes(item, wanted) {
  for (const [name, valuesOf] of Object.entries(FILTERS)) {
    if (wanted[name] && !valuesOf(item).includes(wanted[name])) return false;
  }
  const text = [item.path, item.error, ...classesOf(item)].join("\n");
  return text.toLowerCase().includes(wanted.Text.toLowerCase());
}

// Show the cards that the form asks for.
function showCards() {
  const wanted = Object.fromEntries(new FormData(form));
  const value = ORDERS[wanted.Order];
  list = items.filter((item) => passes(item, wanted));
  list.sort((one, other) => value(one) - value(other));

  find("[role=status]").textContent = `${list.length} of ${items.length} ${wanted.Prediction}`;
  showMeans(wanted.Method || means[0]?.method);
  markPressed(wanted);
  if (main.getBoundingClientRect().top < 0) find("[role=status]").scrollIntoView();
  main.replaceChildren();
  addCards();
}

// Show the photos with this prediction, or all where these are shown already.
function choosePrediction(values) {
  const isChosen = Object.entries(values).every(([name, value]) => form[name].value === value);
  for (const [name, value] of Object.entries(values)) form[name].value = isChosen ? "" : value;
  showCards();
}

function markPressed(wanted) {
  for (const button of document.querySelectorAll("details button")) {
    const { label, result } = button.dataset;
    const hasResult = !result || wanted.Result === result;
    button.ariaPressed = wanted.Prediction === label && hasResult;
  }
}

function selectField(name, options) {
  return make("label", {}, name, make("select", { name }, ...options));
}

function filterField(name) {
  const counts = [...countValues(items.flatMap(FILTERS[name]))];
  const options = counts.map(([value, count]) => new Option(`${value} (${count})`, value));
  return selectField(name, [new Option("all", ""), ...options]);
}

function buildForm() {
  const orders = Object.keys(ORDERS).slice(photosWithTruth.length ? 0 : 1);
  form.append(filterField("Result"), filterField("Class"), filterField("Method"));
  form.append(selectField("Order", orders.map((order) => new Option(order))));
  form.append(make("label", {}, "Text", make("input", { name: "Text", type: "search" })));
  form.append(make("input", { name: "Prediction", hidden: true }));
  form.append(make("button", { type: "reset" }, "Show all"), heatButton());

  form.oninput = showCards;
  form.onsubmit = () => false;
  form.onreset = () => setTimeout(showCards); // when the fields are empty
}

// ---- Mean heat of the predicted classes

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
  const label = `predicted ${prediction}`;
  const values = { Prediction: label, Result: result, Method: method };
  const onclick = () => choosePrediction(values);
  const caption = result === "unknown" ? `${photos} photos` : `${photos} ${result}`;
  const button = make(`button.${result}`, { title: label, onclick });
  Object.assign(button.dataset, { label, result });
  button.append(drawGrid(grid), make("small", {}, caption));
  return button;
}

// Show the mean maps of a method, right and wrong beside each other.
function showMeans(method) {
  const area = find("#means > div");
  if (area.dataset.method === method) return;
  area.dataset.method = method;
  area.replaceChildren();
  const ofMethod = means.filter((mean) => mean.method === method);
  const explained = photos.filter((item) => item.state !== "failed");
  for (const name of worstClasses(explained, (item) => [item.prediction])) {
    const ofClass = ofMethod.filter((mean) => mean.prediction === name);
    ofClass.sort((one, other) => one.result.localeCompare(other.result));
    if (ofClass.length) {
      area.append(make("section", {}, nameLine("h3", name), ...ofClass.map(meanButton)));
    }
  }
}

// ---- True and predicted classes

function confusionCell(truth, prediction, pairs, truths) {
  const label = pairLabel(truth, prediction);
  const count = pairs.get(label);
  if (!count) return make("td");
  const state = truth === prediction ? "right" : "wrong";
  const style = `--share: ${10 + (50 * count) / truths.get(truth)}%`;
  const onclick = () => choosePrediction({ Prediction: label });
  const button = make(`button.${state}`, { title: label, style, onclick }, count);
  button.dataset.label = label;
  return make("td", {}, button);
}

function buildConfusion() {
  const names = worstClasses(photosWithTruth, classesOf).sort();
  const pairs = countValues(photosWithTruth.flatMap(predictionLabels));
  const truths = countValues(photosWithTruth.map((item) => item.truth));
  const table = find("table");
  const corner = nameLine("th", "true ↓ predicted →");
  table.append(make("tr", {}, corner, ...names.map((name) => nameLine("th", name))));
  for (const truth of names) {
    const cells = names.map((name) => confusionCell(truth, name, pairs, truths));
    table.append(make("tr", {}, nameLine("th", truth), ...cells));
  }
  find("#confusion").hidden = !photosWithTruth.length;
  find("#confusion").open = names.length < 9;
}

// ---- The dialog: all pictures of an item

function linkedFigure(link, caption, frame) {
  const figure = make("figure", {}, frame, make("figcaption", {}, caption));
  return make("a", { href: link, target: "_blank" }, figure);
}

// Return the pictures of a class in the order in which they stand side by side.
function kindsOf(methods) {
  const [first, ...others] = methods;
  const kinds = [`${first}_cam`, "gb", `${first}_cam_gb`];
  for (const method of others) kinds.push(`${method}_cam`, `${method}_cam_gb`);
  return kinds;
}

function figures(item, explained) {
  const row = make("div.figures", {}, linkedFigure(item.source, "source", sourcePicture(item)));
  for (const kind of kindsOf(item.methods)) {
    const link = explained?.files[kind];
    if (link) row.append(linkedFigure(link, kind, classPicture(item, explained, kind)));
  }
  return row;
}

function classSection(item, explained) {
  const heading = `${explained.name}, ${percent(explained.probability)}`;
  return make("section", {}, nameLine("h3", heading), figures(item, explained));
}

function stateOf(name, item) {
  if (name === item.truth) return "right";
  return name === item.prediction ? item.state : "other";
}

function showItem(index) {
  position = Math.max(0, Math.min(index, list.length - 1));
  const item = list[position];
  const bars = item.top.map((entry) => chanceBar(entry, stateOf(entry.name, item)));
  const sections = item.classes.map((explained) => classSection(item, explained));
  const content = sections.length ? sections : [figures(item)];

  find("#path").textContent = item.path;
  find("dialog > div").replaceChildren(verdict(item), make("div.chances", {}, ...bars), ...content);
  if (!dialog.open) dialog.showModal();
}

// ---- Keys

function buildDialog() {
  const previous = () => showItem(position - 1);
  const next = () => showItem(position + 1);
  const close = () => dialog.close();
  const keys = { ArrowLeft: previous, ArrowRight: next, Escape: close };

  const nav = find("nav");
  nav.append(heatButton());
  nav.append(make("button", { onclick: previous }, "Previous (←)"));
  nav.append(make("button", { onclick: next }, "Next (→)"));
  nav.append(make("button", { onclick: close }, "Close (Esc)"));

  dialog.onkeydown = (event) => {
    if (!event.altKey && !event.ctrlKey && !event.metaKey) keys[event.key]?.();
  };
  dialog.onclose = () => {
    addCards(position);
    main.children[position].focus();
  };
}

document.onkeydown = (event) => {
  const isTyping = event.target.matches("input, select");
  const hasModifier = event.altKey || event.ctrlKey || event.metaKey;
  if (event.key.toLowerCase() === "h" && !isTyping && !hasModifier) toggleHeat();
};

// ---- Start

function describeAll() {
  const count = (state) => photos.filter((item) => item.state === state).length;
  const known = photosWithTruth.length;
  let summary = `${photos.length} photos, ${count("failed")} failed`;
  if (known) summary += `, ${percent(count("right") / known)} of ${known} right`;
  find("#summary").textContent = summary;
  find("h1").textContent = `Heatmaps in ${folder}`;
  document.title = `Heatmaps in ${folder}`;
}

describeAll();
buildForm();
buildConfusion();
buildDialog();
find("#means").hidden = !means.length;
find("#means").open = true;
window.onscroll = () => addCards();
window.onresize = () => addCards();
showCards();
"""


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


def main(args: argparse.Namespace) -> int:
    """Run the program. Returns the exit status: 0 done, 1 a photo failed, 2 a wrong call, 130 stopped by Ctrl-C."""
    warnings.filterwarnings("ignore")  # the user cannot act on them
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    Image.MAX_IMAGE_PIXELS = None  # read_photo has a limit of its own
    try:
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(ARGS))
