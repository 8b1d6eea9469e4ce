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
from copy import deepcopy
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
# 5  Explanation. One forward pass gives logits and activations, two backward passes the rest.
# --------------------------------------------------------------------------------------------------

# The autograd nodes of activation functions, whose incoming gradients guided backpropagation
# clamps. Gates (Sigmoid, Hardsigmoid, Tanh) scale a signal rather than rectify it and are left
# alone.
ACTIVATION_NODES = re.compile(
    r"\w*(relu|elu|silu|swish|mish|hardtanh|threshold|softplus)\w*Backward\d*", re.IGNORECASE
)
NO_CLASS = -3  # in `minus`: no logit is subtracted from that of the target
Targets = Sequence[int] | Tensor | int | None


@dataclass(frozen=True)
class Explanation:
    """The explanation of N inputs of H x W.

    Where K classes were asked for each input, all but `logits` have K as their second axis: (N, K,
    ...).

    Attributes:
        cams: for each method the maps, float32 (N, H, W) in [0, 1]: highest where the evidence for
            the class is strongest in this photo. A map that is 0 everywhere means that the layer
            holds no positive evidence.
        guided: guided-backpropagation gradients, float32 (N, 3, H, W), in logit per normalised
            input value; None if they were not asked for. In a network without activations they are
            the plain gradients.
        logits: float32 (N, classes).
        targets: int64 (N,), the class that was explained.
        minus: int64 (N,), the class whose logit was subtracted, or NO_CLASS; None if no difference
            was asked for.
    """

    cams: dict[str, Floats]
    guided: Floats | None
    logits: Floats
    targets: NDArray[np.int64]
    minus: NDArray[np.int64] | None = None

    def __repr__(self) -> str:
        shapes = {method: maps.shape for method, maps in self.cams.items()}
        return f"Explanation(cams={shapes}, targets={self.targets.tolist()})"

    def only(self, index: int) -> Explanation:
        """Return the explanation of one input, as a batch of one.

        A class that was asked for twice is there once.
        """
        rows: Any = slice(index, index + 1)
        if self.targets.ndim == 2:
            asked = self.targets[index].tolist()
            if self.minus is not None:
                asked = list(zip(asked, self.minus[index].tolist(), strict=True))
            first_places = [asked.index(question) for question in dict.fromkeys(asked)]
            rows = np.ix_([index], first_places)

        def pick(values: Any) -> Any:
            return None if values is None else values[rows]

        cams = {method: maps[rows] for method, maps in self.cams.items()}
        logits = self.logits[index : index + 1]
        return Explanation(cams, pick(self.guided), logits, pick(self.targets), pick(self.minus))


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
    """Return the sum over the channels."""
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
    transposed = centred.transpose(-2, -1)
    if positions <= channels:
        variances, vectors = torch.linalg.eigh(centred @ transposed)
        maps = vectors[..., -1] * variances[..., -1:].clamp(min=0).sqrt()
    else:
        component = torch.linalg.eigh(transposed @ centred).eigenvectors[..., -1:]
        maps = (centred @ component)[..., 0]

    total = centred.sum(-1)
    direction = (columns.abs().sum(-1) * maps).sum(-1)
    if of_class:
        covariance = (total * maps).sum(-1)
        correlates = covariance.abs() > 0.3 * total.norm(dim=-1) * maps.norm(dim=-1)
        direction = torch.where(correlates, covariance, direction)
    maps = torch.where(direction[..., None] < 0, -maps, maps)
    return maps.to(contributions).unflatten(-1, contributions.shape[-2:])


@dataclass(frozen=True)
class CamMethod:
    """A method that needs one forward and at most one backward pass.

    `contributions` takes the activations of a layer and the gradients of the class score with
    respect to them, both (..., C, h, w), and returns what each channel adds to the map.
    """

    contributions: Callable[[Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor] = channel_sum  # contributions -> map (..., h, w)
    gradients: bool = True  # whether they are read; if not, all classes have the same map
    relu: bool = True  # whether negative values of the map become 0
    product: bool = False  # whether the maps of several layers are multiplied instead of averaged


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
}
# These methods find a weight for each channel, (..., C, 1, 1), which takes the gradients' place.
MANY_PASSES = ("scorecam", "ablationcam")
BY_CHANNEL_WEIGHTS = CamMethod(lambda a, weights: a * weights, gradients=False)
LAYER_BY_LAYER = ("shapleycam",)  # of grad-cam's: it frees the graph after its first layer


def normalise(maps: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Stretch each map of (..., h, w) to [0, 1], as grad-cam; a constant one becomes 0."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (epsilon + maps.amax((-2, -1), keepdim=True))


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
        channels_last = same_aspect(first, second, size) and not same_aspect(second, third, size)
        spatial = output.movedim(3, 1) if channels_last else output
        return spatial if spatial[0, 0].numel() > 1 else None
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
    if ACTIVATION_NODES.fullmatch(name):
        return True

    if name.startswith(("ClampBackward", "ClampMinBackward")):
        bounds = [node._saved_min]
    elif name.startswith("MaximumBackward"):
        bounds = [node._saved_self, node._saved_other]
    else:
        return False
    bounds = [torch.as_tensor(bound) for bound in bounds if bound is not None]
    return any(not bound.any() for bound in bounds)


def clamp_gradients(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Let only positive gradients pass, as a hook of an autograd node."""
    return tuple(None if gradient is None else gradient.clamp(min=0) for gradient in gradients)


def guided_gradients(scores: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg et al., ICLR 2015 workshop, arXiv:1412.6806).

    Returns the gradients of K scores, (N, K, 3, H, W). Each activation function, module or not,
    lets only positive gradients in. Uses up the graph.
    """
    roots = [score.grad_fn for score in scores]
    for node in graph_nodes(*roots):
        if is_activation(node):
            node.register_prehook(clamp_gradients)

    maps = []
    for score in scores:
        is_last = score is scores[-1]
        maps += torch.autograd.grad(score, inputs, retain_graph=not is_last)
    return torch.stack(maps, 1)


def dotted_name(model: nn.Module, text: str) -> str:
    """Return "layer4.1" for "layer4[-1]" or, as in grad-cam's examples, "model.layer4[-1]"."""
    names = dict(model.named_modules())
    prefix = text.partition(".")[0]
    if prefix in ("model", "module") and prefix not in names:
        text = text.partition(".")[2]

    name = ""
    for step in text.replace("[", ".[").split("."):
        index = re.fullmatch(r"\[(-?\d+)\]", step)
        if index and name in names:
            children = [child for child, _ in names[name].named_children()]
            with contextlib.suppress(IndexError):
                step = children[int(index[1])]
        name = f"{name}.{step}" if name else step
    return name


def layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    """Return the dotted name of a layer, given by name or as the module. Raises CallError."""
    names = {module: name for name, module in model.named_modules() if name}
    if isinstance(layer, nn.Module):
        name = names.get(layer, type(layer).__name__)
    else:
        name = dotted_name(model, layer)
    if name in names.values():
        return name

    hint = closest(name, names.values())
    if "," in name:
        hint = "; repeat the option for each layer"
    raise CallError(f"the network has no layer '{name}'{hint}; --list-layers shows them all")


def fit_classes(classes: Any, logits: Tensor, allowed: Sequence[int]) -> Tensor:
    """Return classes as indices, int64 (N,) or (N, K), PREDICTED replaced. Raises CallError.

    `allowed` are the negative numbers that may stand among them.
    """
    count, outputs = logits.shape
    chosen = torch.as_tensor(classes)
    is_integer = not (chosen.is_floating_point() or chosen.dtype == torch.bool)
    rows_fit = chosen.ndim <= 2 and chosen.shape[:1] in ((), (1,), (count,))
    in_range = (chosen >= 0) & (chosen < outputs)
    for special in allowed:
        in_range = in_range | (chosen == special)
    if not (is_integer and rows_fit and in_range.all()):
        fault = f"do not fit {count} inputs and {outputs} classes; give one each"
        raise CallError(f"targets {chosen.tolist()} {fault}")

    chosen = chosen.long().expand(count, *chosen.shape[1:]).to(logits.device, non_blocking=True)
    predicted = logits.detach().argmax(1)
    if chosen.ndim == 2:
        predicted = predicted[:, None]
    return torch.where(chosen == PREDICTED, predicted, chosen)


def choose_targets(logits: Tensor, targets: Targets, top: int | None = None) -> Tensor:
    """Return the class to explain for each input, int64 (N,), or K classes, (N, K).

    Raises CallError: the targets do not fit.
    """
    if targets is not None:
        return fit_classes(targets, logits, allowed=[PREDICTED])
    if top is None:
        return logits.detach().argmax(1)
    return logits.detach().topk(min(top, logits.shape[1])).indices


def score_weights(targets: Tensor, minus: Tensor | None, outputs: int) -> Tensor:
    """Return the weights of the logits in each explained score, float32 (N, K, outputs).

    1 for the target, -1 for the class that is subtracted from it, else 0. `targets` and `minus` are
    (N,) or (N, K).
    """
    columns = torch.arange(outputs, device=targets.device)
    weights = (targets.view(len(targets), -1, 1) == columns).float()
    if minus is None:
        return weights
    return weights - (minus.view(len(minus), -1, 1) == columns).float()


def logits_for(network: nn.Module, inputs: Tensor) -> Tensor:
    """Return the network's logits (N, classes). Raises CallError: not one row for each input."""
    logits = as_logits(network(inputs))
    if len(logits) != len(inputs):
        given = f"{len(logits)} answers for {len(inputs)} inputs"
        raise CallError(
            f"the network gives {given}; let it keep the batch dimension, as x.flatten(1) does"
        )
    return logits


@contextlib.contextmanager
def capture_outputs(
    network: nn.Module, layers: Sequence[str], differentiable: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of layers by name while the network runs; of several calls, the last.

    Raises CallError: a layer returns no tensor, or is not called.
    """
    outputs: dict[str, Tensor] = {}

    def collect(name: str, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            returned = f"returns a {type(output).__name__}, not a tensor"
            raise CallError(f"layer '{name}' {returned}; choose a layer inside it")
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
        rows, columns = spatial_map.shape[2:]
        if same_aspect(rows, columns, size):
            like_input.append((call, spatial_map))
    return like_input or spatial


def find_target_layer(calls: Sequence[Call], logits: Tensor, size: Sequence[int]) -> str:
    """Return the last layer with a spatial map on which the logits depend.

    Adaptive pooling and dropout count only where nothing else does. Of a ViT, whose class token
    alone reaches the head, that is the norm before the last attention, as in grad-cam's examples.
    Raises CallError: there is none.
    """
    spatial = [call for call, _ in reversed(spatial_calls(calls, size))]
    if not spatial:
        sides = f"{size[0]} x {size[1]}"
        raise CallError(
            f"no layer has a spatial map for inputs of {sides}; pass one as target layer"
        )

    # Take the input of the head, not the score: the weights of a new head may all be zero.
    features = logits
    for call in calls:
        if isinstance(call.module, (nn.Linear, nn.Conv2d)):
            features = call.input
    factors = torch.linspace(1, 2, features[0].numel()).to(features).view_as(features[0])
    probe = (features[0] * factors).sum()

    for call in spatial:
        passing = isinstance(call.module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout))
        if passing or not call.output.requires_grad:
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
    kept = {call.node for call in calls if call.name in keep}
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
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
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


def copy_network(model: nn.Module) -> nn.Module:
    """Return a copy of a network.

    Tensors that belong to a graph cannot be copied, such as what a module keeps of its last run
    (weight_norm's weight). They are detached.
    """
    replacements = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                replacements[id(value)] = value.detach()
    return deepcopy(model, replacements)


@dataclass(frozen=True)
class LayerValues:
    """What one pass over N inputs gives for a target layer."""

    activations: Tensor  # (N, C, h, w)
    gradients: Tensor | None  # of the K scores, (N, K, C, h, w); None if no method reads them


@dataclass(frozen=True)
class Batch:
    """What the methods read for N inputs and K scores."""

    inputs: Tensor  # (N, 3, H, W)
    weights: Tensor  # (N, K, classes), of the logits in the scores
    layers: dict[str, LayerValues]  # by the name of the target layer


def layer_values(
    outputs: Mapping[str, Tensor], scores: Sequence[Tensor], keep_graph: bool, size: Sequence[int]
) -> dict[str, LayerValues]:
    """Return the values of the layers with these outputs; without `scores`, without gradients.

    Raises CallError: a layer has no spatial map, or a score does not depend on it.
    """
    gradients = []
    for score in scores:
        keep = keep_graph or score is not scores[-1]
        of_score = torch.autograd.grad(score, [*outputs.values()], None, keep, allow_unused=True)
        gradients.append(dict(zip(outputs, of_score, strict=True)))

    layers = {}
    for layer, output in outputs.items():
        activations = as_map(output.detach(), size)
        if activations is None:
            values = f"no spatial map but {shape_of(output)} values"
            raise CallError(f"layer '{layer}' has {values}; choose another one")
        maps = []
        for of_score in gradients:
            if of_score[layer] is None:
                fault = f"does not depend on layer '{layer}'"
                raise CallError(f"the class score {fault}; choose another one")
            maps.append(as_map(of_score[layer], size))
        layers[layer] = LayerValues(activations, torch.stack(maps, 1) if maps else None)
    return layers


class PartialPass:
    """The network from the last call of a layer on, to run for other outputs of that layer.

    Args:
        inputs: (1, 3, H, W).

    Attributes:
        output: what the layer returns in its last call for `inputs`.
        logits: (1, classes), for `inputs`.
    """

    def __init__(self, network: nn.Module, layer: str, inputs: Tensor) -> None:
        self.network = network
        self.module = network.get_submodule(layer)
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output.clone())

        with self.module.register_forward_hook(keep):
            self.logits = as_logits(network(inputs))
        self.calls = len(outputs)
        self.output = outputs[-1]
        self.find_stand_in(inputs)

    def find_stand_in(self, inputs: Tensor) -> None:
        """Find what the layers before run on; their output is replaced anyway.

        A small dummy input is the fastest. Networks that refuse it get the real input, and those
        that compare the sizes of two branches get one for each copy.
        """
        small = torch.zeros_like(inputs[..., :64, :64])
        choices = ((small, False), (inputs, False), (inputs, True))
        for self.stand_in, self.one_for_each in choices:
            with contextlib.suppress(RuntimeError, AssertionError, ValueError, CallError):
                twice = self.run(torch.cat([self.output, self.output]))
                if len(twice) == 2 and torch.allclose(twice, self.logits, 1e-3, 1e-3):
                    return

    def run(self, copies: Tensor) -> Tensor:
        """Return the logits (B, classes) for B outputs of the layer."""
        calls = itertools.count(1)

        def replace_last(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if next(calls) == self.calls:
                return copies
            return None

        inputs = self.stand_in
        if self.one_for_each:
            inputs = inputs.expand(len(copies), -1, -1, -1)
        with self.module.register_forward_hook(replace_last):
            return as_logits(self.network(inputs))


@contextlib.contextmanager
def grad_cam_method(
    method: str, network: nn.Module, layers: Sequence[str], reshape: Callable[[Tensor], Tensor]
) -> Iterator[Any]:
    """Yield an object of the grad-cam package's class for a method; take its hooks off afterwards.

    The class is the one whose name is the method's, but for capitals and underscores.
    """
    import pytorch_grad_cam

    classes = {}
    for name, value in vars(pytorch_grad_cam).items():
        if isinstance(value, type):
            classes[name.lower().replace("_", "")] = value
    modules = [network.get_submodule(name) for name in layers]
    with contextlib.redirect_stdout(io.StringIO()):  # FullGrad prints a warning
        cam = classes[method](network, modules, reshape)

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
    """Return the arguments that tell a class of the grad-cam package what to explain.

    `weights`, (classes,), are those of the logits in the score. Raises CallError: the class cannot
    explain it.
    """
    if "target_idx" not in inspect.signature(cam.forward).parameters:
        return {"targets": [lambda logits: logits.flatten() @ weights]}
    if (weights < 0).any():
        raise CallError("it compares classes by itself, so it takes no difference of two")
    return {"targets": None, "target_idx": int(weights.argmax())}


class Explainer:
    """Explains the predictions of any `nn.Module` classifier.

    Everything runs in float32 and eval mode on a frozen copy of the model, which itself is not
    changed. After training on, make a new explainer.

    Args:
        model: takes (N, 3, H, W), returns logits (N, classes); or (N, 1) or (N,) for a single
            sigmoid output, of which the positive side is explained. `DataParallel` around it and
            half precision are fine.
        methods: names from METHODS and MORE_METHODS, or one of them.
        target_layers: names of layers, or the modules, whose maps are averaged, or one of them;
            None: the last layer with a spatial map on which the score depends. "layer4[-1]" is the
            last child of layer4.
        guided: whether guided backpropagation is wanted too.
        aug_smooth: average the maps over six variants of the input, mirrored and multiplied by 0.9
            to 1.1, as grad-cam.
        eigen_smooth: take the first principal component of the contributions of the channels
            instead of their sum.
        batch_size: how many inputs Score-CAM and `logits` run at once, at most; None: 2 on the CPU,
            else 32.
        progress: wraps the passes of Score-CAM and Ablation-CAM, such as tqdm.
        copy: False: take over the model itself, which is then changed (frozen, eval mode, batch
            norms folded).
        fold: whether batch norms are folded into the convolutions: faster from a handful of inputs
            on.
        multi_label: whether each logit is a sigmoid of its own; `faithfulness` reads it.

    Raises:
        CallError: there is no such method or layer.
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
        multi_label: bool = False,
    ) -> None:
        if not isinstance(methods, str):
            methods = ",".join(methods)
        self.methods = tuple(names_from((*METHODS, *MORE_METHODS), "method", METHODS)(methods))
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        if target_layers is None:
            target_layers = ()
        elif isinstance(target_layers, (str, nn.Module)):
            target_layers = [target_layers]
        self.target_layers = tuple(layer_name(model, layer) for layer in target_layers)
        self.guided = guided
        self.aug_smooth = aug_smooth
        self.eigen_smooth = eigen_smooth
        self.progress = progress
        self.multi_label = multi_label
        # The grad-cam package's FullGrad counts the biases of convolutions and of batch norms.
        ours = all(method in CAM_METHODS or method in MANY_PASSES for method in self.methods)
        self.fold = fold and ours
        self._set_network(model, copy)
        if batch_size is None:
            batch_size = 2 if self.device.type == "cpu" else 32
        self.batch_size = BatchSize(batch_size)
        self.layers: dict[str, tuple[str, tuple[int, ...]]] = {}

    def _set_network(self, model: nn.Module, copy: bool) -> None:
        """Make the frozen network."""
        with torch.inference_mode(False):
            network = copy_network(model) if copy else model
            tensors = itertools.chain(network.parameters(), network.buffers())
            self.device = next(tensors, torch.empty(0)).device

            # channels-last where oneDNN computes; on a GPU it pays only in half precision
            memory_format = torch.contiguous_format
            if self.device.type == "cpu" and torch.backends.mkldnn.is_available():
                memory_format = torch.channels_last
            network.to(memory_format=memory_format)
            self.network = network.eval().requires_grad_(False).float()

    def prepare(self, inputs: Tensor) -> None:
        """Run one input (1, 3, H, W): find the default target layer, and fold the batch norms.

        `layers` is then a dict of the layers with a map: their name, type, and its shape (C, h, w).
        """
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
        """Fold the batch norms, if the logits of `inputs` stay the same."""
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
            minus: explain the difference: the logits of these classes are subtracted from those of
                the targets. In the form of `targets`; NO_CLASS where nothing is subtracted.

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

        # Whatever mode the caller is in, this needs a graph; the caller's settings stay.
        with torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(self.device):
            if not self.aug_smooth:
                return self._explain(inputs, targets, top, minus, self.methods, self.guided)
            explanation = self._explain(inputs, targets, top, minus, (), self.guided)
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
        networks = self._networks_for_threads(min(4, cores))
        workers = len(networks)

        @torch.inference_mode()
        def run(network: nn.Module, part: Tensor) -> Tensor:
            return torch.cat(list(self.batch_size.run(partial(function, network), part)))

        results: list[Tensor] = []
        with ThreadPoolExecutor(workers, None, torch.set_num_threads, (cores // workers,)) as pool:
            for part in progress(items.split(64)):
                results += pool.map(run, networks, part.chunk(workers))
        torch.set_num_threads(cores)  # new threads inherit the last value
        return torch.cat(results)

    def _networks_for_threads(self, count: int) -> list[nn.Module]:
        """Return a network for each thread, with modules of its own and the same weights."""
        networks = [self.network]
        if self.device.type != "cpu":
            return networks

        with contextlib.suppress(RuntimeError):  # a module keeps tensors that cannot be copied
            while len(networks) < count:
                tensors = itertools.chain(self.network.parameters(), self.network.buffers())
                networks.append(deepcopy(self.network, {id(tensor): tensor for tensor in tensors}))
        return networks

    def _augmented_cams(self, inputs: Tensor, explanation: Explanation) -> dict[str, Floats]:
        """Return the means of the maps over six variants of the inputs, as in grad-cam."""
        import ttach

        variants = ttach.Compose([ttach.HorizontalFlip(), ttach.Multiply([0.9, 1, 1.1])])
        cams: dict[str, list[Floats]] = {method: [] for method in self.methods}
        for variant in variants:
            varied = variant.augment_image(inputs.detach().float())
            asked = explanation.targets, None, explanation.minus
            explained = self._explain(varied, *asked, self.methods, False)
            for method, maps in explained.cams.items():
                batch = torch.from_numpy(maps).view(-1, 1, *inputs.shape[2:])
                cams[method].append(variant.deaugment_mask(batch).view(maps.shape).numpy())
        return {method: np.mean(maps, axis=0) for method, maps in cams.items()}

    def _explain(
        self,
        inputs: Tensor,
        targets: Targets,
        top: int | None,
        minus: Targets,
        methods: Sequence[str],
        guided: bool,
    ) -> Explanation:
        """Explain inputs, in the mode and the arithmetic that `__call__` has set."""
        inputs = self._own(inputs).requires_grad_(guided)
        kinds = [CAM_METHODS.get(method, BY_CHANNEL_WEIGHTS) for method in methods]
        with_gradients = any(kind.gradients for kind in kinds)
        with capture_outputs(self.network, self.target_layers, with_gradients) as outputs:
            logits = logits_for(self.network, inputs)
        targets = choose_targets(logits, targets, top)
        if minus is not None:
            minus = fit_classes(minus, logits, allowed=[PREDICTED, NO_CLASS])
            if minus.shape != targets.shape:
                fault = f"{shape_of(minus)} classes from {shape_of(targets)} targets"
                raise CallError(f"cannot subtract {fault}; give one for each target")

        weights = score_weights(targets, minus, logits.shape[1])
        scores = (logits[:, None] * weights).sum((0, 2)).unbind()  # over all inputs, for K classes
        read = scores if with_gradients else ()
        layers = layer_values(outputs, read, guided, inputs.shape[2:])
        guided_maps = guided_gradients(scores, inputs) if guided else None

        # The first result that is waited for: a GPU has been given all of the work above by now.
        if not torch.isfinite(logits).all():
            raise ValueError("the logits are NaN or infinite; the weights are probably broken")

        def array(values: Tensor | None) -> Any:  # (N, K, ...) -> (N, ...) or (N, K, ...)
            if values is None:
                return None
            return values.reshape(*targets.shape, *values.shape[2:]).cpu().contiguous().numpy()

        batch = Batch(inputs.detach(), weights, layers)
        cams = {method: array(self._cam(method, batch)) for method in methods}
        logits = logits.detach().cpu().numpy()
        return Explanation(cams, array(guided_maps), logits, array(targets), array(minus))

    def _cam(self, method: str, batch: Batch) -> Tensor:
        """Return the maps (N, K, H, W) of one method, in [0, 1], of all layers together."""
        if method not in CAM_METHODS and method not in MANY_PASSES:
            return self._by_grad_cam(method, batch)

        size = batch.inputs.shape[2:]
        maps = []
        for name in batch.layers:
            small = normalise(self._small_maps(method, name, batch))
            maps.append(nn.functional.interpolate(small, size, mode="bilinear"))
        of_layers = torch.stack(maps)
        if method in CAM_METHODS and CAM_METHODS[method].product:
            return normalise(normalise(of_layers).prod(0))
        return normalise(of_layers.mean(0))

    def _small_maps(self, method: str, name: str, batch: Batch) -> Tensor:
        """Return the maps (N, K, h, w) of one method at one layer."""
        kind = CAM_METHODS.get(method, BY_CHANNEL_WEIGHTS)
        layer = batch.layers[name]
        gradients = layer.gradients
        if method in MANY_PASSES:
            weigh = self._score_weights if method == "scorecam" else self._ablation_weights
            photos = zip(layer.activations, batch.inputs.split(1), batch.weights, strict=True)
            of_channels = [weigh(name, *photo) for photo in photos]
            gradients = torch.stack(of_channels)[..., None, None]

        contributions = kind.contributions(layer.activations[:, None], gradients)
        reduce = kind.reduce
        if self.eigen_smooth and reduce is channel_sum:
            reduce = principal_component
        small = reduce(contributions)
        if kind.relu:
            small = small.clamp(min=0)
        inputs, scores = batch.weights.shape[:2]
        return small.expand(inputs, scores, -1, -1)

    @torch.inference_mode()
    def _ablation_weights(
        self, name: str, activations: Tensor, inputs: Tensor, weights: Tensor
    ) -> Tensor:
        """Ablation-CAM (Desai and Ramaswamy, WACV 2020): the score that is lost without a channel.

        For one input (1, 3, H, W) and K scores; returns (K, C). The paper divides by the score,
        which may be negative. Only what follows the layer runs again, for many ablated copies of
        its output at once.
        """
        later = PartialPass(self.network, name, inputs)
        output = later.output
        # the axis of the channels, see as_map
        axis = 1 if output.shape[1:] == activations.shape else output.ndim - 1
        score = weights @ later.logits[0]
        ablated = score.repeat(output.shape[axis], 1)

        # Channels that are zero everywhere change nothing.
        alive = output.movedim(axis, 1)[0].flatten(1).any(1).nonzero()[:, 0]
        at_once = max(1, min(256, 2**25 // (output.numel() * 4)))  # 32 MB together
        for channels in self.progress(alive.split(at_once)):
            copies = output.repeat(len(channels), *[1] * (output.ndim - 1))
            rows = torch.arange(len(channels), device=channels.device)
            copies.movedim(axis, 1)[rows, channels] = 0
            ablated[channels] = later.run(copies) @ weights.T
        return (score - ablated).T

    @torch.inference_mode()
    def _score_weights(
        self, name: str, activations: Tensor, inputs: Tensor, weights: Tensor
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
            return logits_for(network, inputs * normalise(masks, 1e-8)) @ weights.T

        if len(varied):
            scores[varied] = self._in_batches(masked_scores, varied, self.progress)
        return scores.softmax(0).T

    def _by_grad_cam(self, method: str, batch: Batch) -> Tensor:
        """Return the maps (N, K, H, W) of a method of the grad-cam package. Raises CallError."""
        groups = [list(batch.layers)]
        if method in LAYER_BY_LAYER:
            groups = [[name] for name in batch.layers]

        of_groups = []
        for names in groups:
            maps = []
            for image, rows in zip(batch.inputs.split(1), batch.weights, strict=True):
                of_scores = [self._grad_cam_map(method, names, image, row) for row in rows]
                maps.append(torch.stack(of_scores))
            of_groups.append(torch.stack(maps))
        return normalise(torch.stack(of_groups).mean(0))

    def _grad_cam_map(
        self, method: str, names: Sequence[str], inputs: Tensor, weights: Tensor
    ) -> Tensor:
        """Return the map (H, W) of one input (1, 3, H, W) and one score. Raises CallError."""

        def reshape(output: Tensor) -> Tensor:
            spatial_map = as_map(output, inputs.shape[2:])
            return output if spatial_map is None else spatial_map

        try:
            with grad_cam_method(method, self.network, names, reshape) as cam:
                target = grad_cam_target(cam, weights)
                # This hook comes after grad-cam's: later layers cannot change what grad-cam keeps.
                with capture_outputs(self.network, names):
                    image = inputs.clone().requires_grad_()
                    maps = cam(image, eigen_smooth=self.eigen_smooth, **target)
            return torch.from_numpy(np.float32(maps[0])).to(inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # as Shapley-CAM with tokens, Finer-CAM with a single output
            fault = f"does not work on layer '{', '.join(names)}': {first_line(error)}"
            raise CallError(f"{method} {fault}") from error


# --------------------------------------------------------------------------------------------------
# 6  Metrics. The network's predictions for changed inputs show how faithful a map is.
# --------------------------------------------------------------------------------------------------

METRICS = ("average_drop", "increase", "deletion", "insertion", "road")


def faithfulness(
    explainer: Explainer, inputs: Tensor, cam: Floats, target: int
) -> dict[str, float]:
    """Measure a map by how the probability p of a class changes with the input.

    The map is (H, W) in [0, 1], the inputs are (1, 3, H, W). Returns five numbers:

    - average_drop, in [0, 1], lower is better: the share of p that is lost when the input is
      multiplied by the map.
    - increase, 0 or 1, higher is better: whether p grows by that (both Chattopadhyay et al., WACV
      2018, arXiv:1710.11063, as means over many photos).
    - deletion, in [0, 1], lower is better: the mean p while the hottest pixels are set to zero (the
      mean colour) first.
    - insertion, in [0, 1], higher is better: the mean p while they come back first (both Petsiuk et
      al., RISE, BMVC 2018, arXiv:1806.07421, in 20 steps; there the insertion starts from a blurred
      photo).
    - road, in [-0.5, 0.5], higher is better: half of how much more p drops when the hottest 20, 40,
      60 and 80 percent are imputed from their neighbours than when the coldest are (Rong et al.,
      ICML 2022, arXiv:2202.00449, as grad-cam's ROADCombined).
    """
    photo = inputs[0].cpu().numpy()
    cam = np.reshape(cam, photo.shape[1:])  # (1, H, W) is taken too
    counts, hottest = hottest_first(cam)
    changed = {
        "photo": photo[None],
        "masked": photo[None] * cam,
        "deletion": photo * ~hottest[:, None],
        "insertion": photo * hottest[:, None],
        "hottest imputed": impute_shares(photo, cam),
        "coldest imputed": impute_shares(photo, 1 - cam),
    }
    p = class_probabilities(explainer, changed, target)

    before, after = p["photo"][0], p["masked"][0]
    road = (p["coldest imputed"] - p["hottest imputed"]).mean() / 2
    values = {
        "average_drop": max(0.0, before - after) / (before + 1e-7),
        "increase": after > before,
        "deletion": area_under(p["deletion"], counts),
        "insertion": area_under(p["insertion"], counts),
        "road": road,
    }
    return {name: round(float(values[name]), 6) for name in METRICS}


def hottest_first(cam: Floats) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return growing numbers of pixels, in 20 steps, and masks (S, H, W) of the hottest so many."""
    step = math.ceil(cam.size / 20)
    counts = np.array([*range(0, cam.size, step), cam.size])
    order = np.argsort(-cam.flatten(), kind="stable")
    ranks = np.argsort(order).reshape(cam.shape)
    return counts, ranks < counts[:, None, None]


def area_under(curve: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Return the mean of a curve over the share of the pixels, by the trapezoidal rule."""
    means = (curve[1:] + curve[:-1]) / 2
    return (means * np.diff(counts)).sum() / counts[-1]


def class_probabilities(
    explainer: Explainer, changed: Mapping[str, Floats], target: int
) -> dict[str, NDArray[np.float64]]:
    """Return the probabilities of a class for groups of inputs (B, 3, H, W) by the group's name."""
    inputs = torch.from_numpy(np.concatenate(list(changed.values())).astype(np.float32))
    p = probabilities(explainer.logits(inputs), explainer.multi_label)[:, target]
    ends = np.cumsum([len(group) for group in changed.values()])
    groups = np.split(p.double().cpu().numpy(), ends[:-1])
    return dict(zip(changed, groups, strict=True))


def probabilities(logits: Tensor, multi_label: bool = False) -> Tensor:
    """Return the probability of each class from logits (N, classes).

    Softmax, or the sigmoid of each where they are independent labels or there is a single one.
    """
    if multi_label or logits.shape[1] == 1:
        return logits.sigmoid()
    return logits.softmax(1)


def impute_shares(photo: Floats, cam: Floats) -> Floats:
    """Return a photo (3, H, W) with its hottest 80, 60, 40 and 20 percent imputed, (4, 3, H, W)."""
    images = []
    for share in (0.2, 0.4, 0.6, 0.8):
        kept = cam < np.quantile(cam, share)
        images.append(impute(photo, kept))
    return np.stack(images)


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
