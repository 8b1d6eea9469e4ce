#!/usr/bin/env python3
"""Shows why a convolutional network answered as it did: heatmap (CAM), guided backpropagation, and their product.

The file is read from top to bottom; a room uses only the rooms above it:

    1 Command line   what the person asked for
    2 Images         paths -> decoded photos
    3 Model          architecture + checkpoint -> a classifier with its own preprocessing
    4 Explanation    inputs -> class activation maps and guided gradients
    5 Trust          maps -> numbers that say how much they are worth
    6 Pictures       arrays -> picture files
    7 Run            all of it joined

From Python:

    classifier = load_classifier(arch="resnet50", ckpt="best.pth", device="cuda")
    explainer = Explainer(classifier.model, methods=["gradcam"])
    explanation = explainer(inputs)  # inputs: float32 (N, 3, H, W), normalised
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import functools
import glob
import hashlib
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from pathlib import Path, PurePath
from typing import Any, NoReturn, TextIO

# ---------------------------------------------------------------------------------------------------------------------
# 1  Command line. Only the standard library: --help and a mistyped option must not wait for torch.
# ---------------------------------------------------------------------------------------------------------------------

METHODS = ("gradcam", "scorecam", "gradcam++", "ablationcam", "xgradcam", "eigencam", "eigengradcam")
MORE_METHODS = (
    *("hirescam", "layercam", "gradcamelementwise", "fullgrad", "fem", "kpcacam"),
    *("shapleycam", "finercam", "segeigencam", "randomcam", "refinecam"),
)
OUTPUTS = ("cam", "gb", "cam_gb")
COLORMAPS = (  # OpenCV's, in its order
    *("autumn", "bone", "jet", "winter", "rainbow", "ocean", "summer", "spring", "cool", "hsv", "pink", "hot"),
    *("parula", "magma", "inferno", "plasma", "viridis", "cividis", "twilight", "twilight_shifted", "turbo"),
    "deepgreen",
)
FORMATS = ("jpg", "png", "webp")

EXAMPLES = """\
examples:
  your own fine-tuned network, one photo:
    python cnn_visualizations.py --arch resnet50 --ckpt best.pth --num-classes 2 --output out 33.jpg

  why it is a dog and *not* a cat, by two methods, on one sheet, and how far to trust that:
    python cnn_visualizations.py --ckpt best.pth --class-names names.txt --target-class dog --target-class cat \\
        --method gradcam,scorecam --sheet --metrics 33.jpg 34.jpg

  the demo that comes with the program (no download):
    python cnn_visualizations.py --ckpt tests/data/dogs_mobilenet_v2.pth pics/dog.jpg
"""


class CallError(ValueError, argparse.ArgumentTypeError):  # argparse passes the messages of the latter on
    """The call cannot be carried out; the message is one line that says what to do about it. Exit status 2."""


class PhotoError(ValueError):
    """One photo cannot be explained; the others can. The message is one line. Exit status 1."""


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints one line, on stdout unless told otherwise; a control character in a file name does not make it two."""
    print("".join(c if c.isprintable() or c == " " else repr(c)[1:-1] for c in line), file=stream, flush=True)


def note(message: str) -> None:
    """Tells the person something on stderr that is not an error."""
    say(f"note: {message}", sys.stderr)


@functools.cache
def note_once(message: str) -> None:
    """The same, but the first time only."""
    note(message)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: which of the known names was probably meant, or nothing if none comes near."""
    # People leave out prefixes ("layer4.2.conv" for "backbone.layer4.2.conv3"), so a containing name counts as near.
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [k for k in known if name and name.lower() in k.lower() and k not in near][: 3 - len(near)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def architecture_names() -> list[str]:
    """The classification architectures of the installed torchvision, sorted.

    They are read from the source of `torchvision.models`, where `@register_model()` marks each builder, because
    importing torchvision takes seconds and a mistyped name should be answered at once.

    Raises:
        CallError: torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise CallError("torchvision is not installed; run: pip install -r requirements.txt")
    sources = (Path(spec.origin).parent / "models").glob("*.py")
    builder = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    return sorted(name for source in sources for name in builder.findall(source.read_text(encoding="utf-8")))


def _names_from(known: Sequence[str], kind: str, text: str) -> list[str]:
    """A comma-separated option value as a list without doubles; each name must be known."""
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    for name in names or [""]:
        if name not in known:
            raise CallError(f"unknown {kind} '{name}'{closest(name, known)} (known: {', '.join(known)})")
    return names


def _methods(text: str) -> list[str]:
    if text.strip().lower() == "all":
        return list(METHODS)
    return _names_from((*METHODS, *MORE_METHODS), "method", text)


def _outputs(text: str) -> list[str]:
    return _names_from(OUTPUTS, "output", text)


def _device(text: str) -> str:
    text = text.lower()
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", text):
        raise CallError(f"unknown device '{text}' (known: cpu, cuda, cuda:1, mps, xpu)")
    if text.startswith("cuda") and not has_gpu_driver():
        raise CallError(f"device {text} is not there: no GPU driver is installed; leave --device out")
    if text.startswith("mps") and sys.platform != "darwin":
        raise CallError(f"device {text} is not there: it is the GPU of a Mac; leave --device out")
    return text


def has_gpu_driver() -> bool:
    """Whether the driver is installed that torch asks for CUDA GPUs. How many GPUs it has, only torch can tell."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/kfd")  # AMD's; torch calls those GPUs cuda as well
    return True


def _architecture(text: str) -> str:
    file, _, function = text.rpartition(":")
    if file.endswith(".py"):
        _file(file)
        if not function.isidentifier():
            raise CallError(f"'{text}' names no function; pass --arch file.py:function")
        return text
    if text.endswith(".py"):
        raise CallError(f"'{text}' names no function; pass --arch {text}:function")
    text, known = text.lower(), architecture_names()
    if known and text not in known:
        raise CallError(
            f"unknown architecture '{text}'{closest(text, known)} (torchvision has {len(known)}: alexnet ... "
            "wide_resnet50_2; the README lists the families)"
        )
    return text


def _between(low: int, high: int) -> Any:
    """An argparse type: a whole number from low to high."""

    def number(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not low <= int(text) <= high:
            raise CallError(f"'{text}' is not a whole number from {low} to {high}")
        return int(text)

    return number


def _fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", text) or not 0 <= float(text) <= 1:
        raise CallError(f"'{text}' is not a number from 0 to 1")
    return float(text)


def _one_of(known: Iterable[str], kind: str) -> Any:
    """An argparse type: one of the known names."""

    def name(text: str) -> str:
        (found,) = _names_from(tuple(known), kind, text.replace(",", " "))
        return found

    return name


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise CallError(f"'{text}' is {'a folder, not a file' if path.is_dir() else 'not there'}")
    if path.stat().st_size == 0:
        raise CallError(f"'{text}' is empty")
    return path


def read_class_names(path: Path) -> list[str]:
    """Class names from a file: one a line, or JSON: a list, {"0": "cat"}, {"cat": 0} or {"0": ["n02123045", "tabby"]}.

    Raises:
        CallError: not readable as any of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            return _ordered_names(json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise CallError(
            f"{path} is not a list of class names in UTF-8, one a line or as JSON: {first_line(error)}"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _ordered_names(classes: Any) -> list[str]:
    """Class names in the order of their indices, from any of the forms that people save. Raises ValueError."""
    if isinstance(classes, Mapping):
        pairs = [(v, k) if isinstance(v, int) else (int(k), v) for k, v in classes.items()]
        if sorted(index for index, _ in pairs) != list(range(len(pairs))):
            raise ValueError("the indices are not 0, 1, 2 ...")
        classes = [name for _, name in sorted(pairs)]
    if not isinstance(classes, (list, tuple)):
        raise ValueError("neither a list nor a dict")
    return [str(name[-1] if isinstance(name, (list, tuple)) and name else name) for name in classes]


def _class_names(text: str) -> list[str]:
    return read_class_names(_file(text))


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        say(f"error: {' '.join(message.split())}", sys.stderr)
        self.exit(2)


HELP = {
    "images": "Photos (JPEG, PNG, WebP, BMP, TIFF, GIF), folders of photos, patterns such as '*.jpg', or - to read "
    "paths from standard input, one a line.",
    "arch": "The torchvision architecture, such as resnet50; or net.py:build, a function of your own that returns the "
    "network. Left out, the checkpoint tells it; without a checkpoint either, it is resnet50.",
    "ckpt": "Your checkpoint: .pth, .pt, .ckpt or .safetensors with the weights. Left out, torchvision's ImageNet "
    "weights are downloaded.",
    "num-classes": "How many classes the network tells apart. Left out, the checkpoint tells it.",
    "class-names": "The names of the classes in the order of their indices, one a line, or as JSON. They win over "
    "names in the checkpoint.",
    "device": "Where to compute: cuda, cuda:1, mps (Apple), xpu (Intel) or cpu. Left out: the CUDA GPU if there is "
    "one, else the CPU.",
    "input-size": "Side of the square that the network sees. Left out: the checkpoint's, else that of torchvision's "
    "preset for the architecture.",
    "resize": "crop: shorten the photo to a square as torchvision's preset does (the default). squash: show the whole "
    "photo, aspect not kept.",
    "batch-size": "How many photos go through the network at once (default: 8). Less needs less memory.",
    "method": f"How the heatmap is made: {', '.join(METHODS)} (default: gradcam). Several with commas between them, or "
    f"all for these seven. Also: {', '.join(MORE_METHODS)}.",
    "target-layer": "The layer that is looked at, by its dotted name, such as layer4 or features.17. May be given "
    "several times; their maps are averaged. Left out: the last one that gives a spatial map.",
    "target-class": "The class that is explained, by name or index. May be given several times. Left out: the "
    "likeliest one for each photo.",
    "top-k": "Explain the N likeliest classes of each photo.",
    "aug-smooth": "Average the maps over six variants of the photo, mirrored, with more and less contrast: slow.",
    "eigen-smooth": "Keep only the first principal component of what the channels contribute: less noise.",
    "metrics": "Measure how far each map can be trusted: average drop and increase in confidence, deletion, insertion, "
    "ROAD.",
    "output": "Where the pictures and results.jsonl go (default: out). It is made if need be.",
    "outputs": "Which pictures, comma-separated: cam, gb, cam_gb (default: all three). cam alone is the fastest.",
    "output-size": "Long side of the pictures. Left out: that of the photo's part that the network saw, at most 1024.",
    "sheet": "Write one picture more, with a row for each method and class.",
    "save-arrays": "Write the maps, gradients and logits as numbers, too (NumPy's .npz).",
    "colormap": "The heatmap's colours, by OpenCV's names: jet, turbo, viridis ... (default: jet).",
    "alpha": "How strong the heat lies over the photo, from 0 to 1 (default: 0.5).",
    "format": "jpg, png or webp (default: jpg).",
    "quality": "Of jpg and webp, from 1 to 100 (default: 98).",
    "skip-existing": "Go on where an earlier run stopped: leave out the photos that stand in results.jsonl with the "
    "same options and whose files are all there.",
}


def _parser() -> _Parser:
    parser = _Parser(
        prog="cnn_visualizations.py",
        description="Shows what in a photo made a network answer as it did. For each photo it writes the\n"
        "heatmap (CAM) over the photo, guided backpropagation (gb), and the product of the two\n"
        "(cam_gb) as pictures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=HELP["images"])

    def group(title: str) -> Any:
        arguments = parser.add_argument_group(title)
        return lambda name, **kwargs: arguments.add_argument(f"--{name}", help=HELP[name], **kwargs)

    add = group("the network")
    add("arch", type=_architecture, metavar="NAME")
    add("ckpt", type=_file, metavar="FILE")
    add("num-classes", type=_between(1, 1_000_000), metavar="N")
    add("class-names", type=_class_names, metavar="FILE")
    add("device", type=_device, metavar="NAME")

    add = group("what the network sees")
    add("input-size", type=_between(8, 4096), metavar="PX")
    add("resize", choices=("crop", "squash"), default="crop")
    add("batch-size", type=_between(1, 4096), default=8, metavar="N")

    add = group("the explanation")
    add("method", type=_methods, default=["gradcam"], metavar="LIST", dest="methods")
    add("target-layer", action="append", metavar="NAME", dest="target_layers")
    add("target-class", action="append", metavar="CLASS", dest="target_classes")
    add("top-k", type=_between(1, 1_000_000), metavar="N")
    add("aug-smooth", action="store_true")
    add("eigen-smooth", action="store_true")
    add("metrics", action="store_true")

    add = group("the pictures")
    add("output", type=Path, default=Path("out"), metavar="FOLDER")
    add("outputs", type=_outputs, default=list(OUTPUTS), metavar="LIST")
    add("output-size", type=_between(16, 8192), metavar="PX")
    add("sheet", action="store_true")
    add("save-arrays", action="store_true")
    add("colormap", type=_one_of(COLORMAPS, "colormap"), default="jet", metavar="NAME")
    add("alpha", type=_fraction, default=0.5, metavar="A")
    add("format", type=_one_of(FORMATS, "format"), default="jpg", metavar="NAME")
    add("quality", type=_between(1, 100), default=98, metavar="Q")
    add("skip-existing", action="store_true")
    return parser


# The first bytes of the files that we read: enough to tell a text file named .jpg without decoding anything.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF8")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NOT_READ = (".heic", ".heif", ".avif")  # photos, too, but Pillow needs further packages for them

# Stands near the beginning or the end of every picture and .npz that this program writes. So a folder can be given with
# earlier results in it, and no file that is not ours, or that was made from another photo, is ever overwritten.
MARK = "made by cnn_visualizations.py"
OUR_NAMES = re.compile(rf"(gb|({'|'.join(map(re.escape, METHODS + MORE_METHODS))})_cam(_gb)?)_|.*_sheet\.")


def mark_of(path: str | Path, photo: str | Path) -> str:
    """The mark of a file made from a photo: MARK, and a hash of the way from the file's folder to the photo."""
    try:
        way = os.path.relpath(photo, os.path.dirname(os.path.abspath(path)))
    except ValueError:  # another drive of Windows
        way = os.path.abspath(photo)
    return f"{MARK} from {hashlib.sha256(way.replace(os.sep, '/').encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def is_ours(path: str | Path, photo: str | Path | None = None) -> bool:
    """Whether a file was written by this program; if a photo is given, whether it was made from that."""
    mark = MARK if photo is None else mark_of(path, photo)
    try:
        with Path(path).open("rb") as file:
            start = file.read(300)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 300))
            return mark.encode() in start + file.read()
    except (OSError, ValueError):
        return False


def is_our_picture(path: str) -> bool:
    """`is_ours` for many files, of which few are: only those are opened that bear such a name as we give."""
    return bool(OUR_NAMES.match(os.path.basename(path))) and is_ours(path)


def may_write(path: str | Path, photo: str | Path) -> bool:
    """Whether there is no such file, or one that this program made from the same photo."""
    return not os.path.lexists(path) or is_ours(path, photo)


def photo_fault(path: Path) -> str | None:
    """Why this cannot be a photo, from a glance at the file; None where nothing speaks against it."""
    try:
        if path.exists() and not path.is_file():
            return "is a folder" if path.is_dir() else "is not a file"
        with path.open("rb") as file:
            start = file.read(16)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        return f"cannot be read: {error.strerror}" if isinstance(error, PermissionError) else "is not there"
    if not start:
        return "is empty"
    if start.startswith(SIGNATURES):
        return None
    return "is not a picture in a known format; convert it to JPEG, PNG, WebP, BMP, TIFF or GIF"


def find_photos(inputs: Sequence[str], stdin: Iterable[str] = ()) -> list[tuple[str, str]]:
    """The photos that files, folders, patterns and `-` stand for, each with the folder of its pictures under --output.

    A folder is walked in sorted order and its tree is mirrored; of several folders, the part of their paths in which
    they differ is kept. `-` stands for the paths on `stdin`, one a line. A path that is not there stays in the
    list, so that it gets its error line.
    """
    folders = [os.path.abspath(name) for name in inputs if os.path.isdir(name)]
    try:
        common = os.path.commonpath(folders) if folders else ""
    except ValueError:  # two drives of Windows
        common = ""
    found: dict[str, str] = {}
    for name in inputs:
        if name == "-":
            found.update((str(Path(line.rstrip("\r\n"))), "") for line in stdin if line.strip())
        elif os.path.isdir(name):
            found.update(_walk(os.path.normpath(name), common))
        elif glob.has_magic(name) and not os.path.lexists(name):  # a shell that leaves patterns to the program
            matches = sorted(m for m in glob.glob(name, recursive=True) if os.path.isfile(m) and not is_our_picture(m))
            found.update((match, "") for match in matches or [name])
        else:
            found.setdefault(str(Path(name)), "")
    return list(found.items())


def _walk(top: str, common: str) -> Iterator[tuple[str, str]]:
    """The photos below a folder, each with its folder relative to `common`; not hidden files nor our own pictures.

    Links to folders are followed, as torchvision's ImageFolder does, but not in circles.
    """
    unknown = 0

    def unlisted(error: OSError) -> None:
        note(f"{error.filename} cannot be listed")

    for folder, inner, files in os.walk(top, onerror=unlisted, followlinks=True):
        inner[:] = sorted(n for n in inner if not n.startswith(".") and not _leads_back(os.path.join(folder, n), top))
        unknown += sum(name.lower().endswith(NOT_READ) and not name.startswith(".") for name in files)
        absolute = os.path.abspath(folder)
        mirrored = os.path.relpath(absolute, common) if common else os.path.splitdrive(absolute)[1].lstrip("\\/")
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and not is_our_picture(path):
                yield path, mirrored
    if unknown:
        note(f"{unknown} photos in {top} are left out, since {' '.join(NOT_READ)} cannot be read; convert them to JPEG")


def _leads_back(path: str, top: str) -> bool:
    """Whether a folder below `top` is a link to one of those that it lies in, or to one above these."""
    if not os.path.islink(path):
        return False
    target, folder = os.path.join(os.path.realpath(path), ""), path
    while len(folder) > len(top):
        folder = os.path.dirname(folder)
        if os.path.join(os.path.realpath(folder), "").startswith(target):
            return True
    return False


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it, and removes the file again. Raises CallError where that fails."""
    if folder.exists() and not folder.is_dir():
        raise CallError(f"--output {folder} is a file; pass a folder")
    probe = folder / f".check{os.getpid()}.part"  # of several processes each has its own
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise CallError(f"--output {folder}: cannot write there: {error.strerror or error}") from error


def check_images(parser: _Parser, args: argparse.Namespace) -> None:
    """Ends the program where what stands among the photos was meant for an option."""
    for name in args.images:
        if os.path.isfile(name) and name.lower().endswith((".pth", ".pt", ".ckpt", ".safetensors")) and not args.ckpt:
            parser.error(f"{name} is a checkpoint, not a photo: pass --ckpt {name}")
        if os.path.lexists(name) or name == "-":
            continue
        for option, known, given in (
            ("method", METHODS + MORE_METHODS, args.methods),
            ("outputs", OUTPUTS, args.outputs),
        ):
            if name in known:
                several = ",".join(dict.fromkeys([*given, *(name for name in args.images if name in known)]))
                parser.error(f"{name} is no photo; pass --{option} {several}")
        for option, given in (("target-class", args.target_classes), ("target-layer", args.target_layers)):
            if given and "." not in name and not glob.has_magic(name):
                parser.error(f"{name} is not there; if it is a value, repeat the option: --{option} {name}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; whatever can be found wrong without torch ends the program here.

    Raises:
        SystemExit: 0 after --help, 2 after a wrong call, 1 where none of the photos can be one.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    end = rest.index("--") if "--" in rest else len(rest)
    unknown = [name for name in rest[:end] if name.startswith("-")]
    # photos may stand on both sides of the options, and after -- whatever they are called
    args.images += [name for name in rest[:end] if not name.startswith("-")] + rest[end + 1 :]
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown option {unknown[0]}{closest(unknown[0].split('=')[0], options)} (see --help)")
    count = len(args.class_names or ())
    if args.num_classes and count and args.num_classes != count and (args.num_classes, count) != (1, 2):
        parser.error(f"--num-classes {args.num_classes}, but --class-names has {count} names")
    if args.top_k and args.target_classes:
        parser.error("--top-k and --target-class exclude each other: pass one of the two")
    check_images(parser, args)
    args.photos = find_photos(args.images, sys.stdin if "-" in args.images else ())
    if not args.photos:
        parser.error(f"no photos in {', '.join(args.images)} (looked for {' '.join(SUFFIXES)})")
    # Of a folder every photo is to stand in results.jsonl; photos that were named one by one are answered at once.
    args.one_by_one = not any(name == "-" or os.path.isdir(name) or glob.has_magic(name) for name in args.images)
    if args.one_by_one and all(photo_fault(Path(path)) for path, _ in args.photos):
        for path, _ in args.photos:
            say(f"error: {path} {photo_fault(Path(path))}", sys.stderr)
        parser.exit(1)
    try:
        check_writable(args.output)
    except CallError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    ARGS = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import concurrent.futures
import copy
import errno
import faulthandler
import io
import itertools
import logging
import math
import operator
import platform
import threading
import time
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------------------------------------
# 2  Images. Paths become decoded photos; whatever is in the file, memory stays bounded and the answer is one line.
#    Still without torch: photos of which none can be decoded are answered at once, too.
# ---------------------------------------------------------------------------------------------------------------------

MAX_PIXELS = 250_000_000  # above every camera's largest photo; a few kilobytes of hostile PNG can claim to be more
MAX_RESIZED = 50_000_000  # pixels; a strip of 700 x 1 has them where the short side becomes 256
MIN_SIDE = 8  # pixels; below that there is nothing to point at
DECODERS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


@dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
        path: where it came from.
        pixels: RGB, uint8, (H, W, 3), upright: an EXIF orientation is already applied.
    """

    path: Path
    pixels: NDArray[np.uint8]


class Room:
    """So many pixels are in memory at once, of all threads together: each waits until there is room for its photo."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        """Not more pixels than the room has."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_room = Room(MAX_PIXELS)


def read_photo(path: Path) -> Photo:
    """Decodes a photo: the first frame or page, as 8-bit RGB, turned upright.

    Transparency is dropped, as it is by the loaders that networks are trained with (torchvision's ImageFolder, OpenCV).

    Raises:
        PhotoError: the file is missing, not a picture, broken, too large or too small.
    """
    with open_photo(path) as photo:
        return photo


@contextlib.contextmanager
def open_photo(path: Path) -> Iterator[Photo]:
    """`read_photo` for many threads: inside `with`, the photo takes its part of the memory that all of them share."""
    with contextlib.ExitStack() as room:
        photo = _decode(path, room)
        yield photo


def _decode(path: Path, room: contextlib.ExitStack) -> Photo:
    fault = photo_fault(path)
    if fault:
        raise PhotoError(f"{path} {fault}")
    try:
        with Image.open(path, formats=DECODERS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PhotoError(f"{path} has {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} megapixels")
            if min(width, height) < MIN_SIDE:
                raise PhotoError(f"{path} has {width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed")
            room.enter_context(_room.holding(width * height))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return Photo(path, np.asarray(_to_rgb(image)))
    except PhotoError:
        raise
    except Exception as error:  # decoders raise nearly anything on a hostile file, from struct.error to MemoryError
        raise PhotoError(f"{path} cannot be decoded: {first_line(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as 8-bit RGB. Sixteen bits are scaled down; Pillow's own convert would clip them to white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        white = 65535.0 if image.mode != "F" else 1.0 if values.max(initial=0) <= 1 else 255.0
        image = Image.fromarray(np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may hold transparency, which only this conversion reads
    return image if image.mode == "RGB" else image.convert("RGB")


def faults_of_all(paths: Iterable[str]) -> list[str]:
    """What is wrong with each photo if not one of them can be decoded; an empty list as soon as one can."""
    faults = []
    for path in paths:
        try:
            read_photo(Path(path))
            return []
        except PhotoError as error:
            faults.append(str(error))
    return faults


def quiet_libraries() -> None:
    """No warnings, which the person cannot act on, and no limit of Pillow's: read_photo has one, an error line."""
    warnings.filterwarnings("ignore")
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    Image.MAX_IMAGE_PIXELS = None


def own_stderr() -> None:
    """From here on stderr is ours alone: what C libraries print of a broken file goes nowhere (libtiff does)."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    faulthandler.enable(sys.stderr)  # so that a crash of theirs says something


if __name__ == "__main__":
    quiet_libraries()
    own_stderr()
    FAULTS = faults_of_all(path for path, _ in ARGS.photos) if ARGS.one_by_one else []
    for fault in FAULTS:
        say(f"error: {fault}", sys.stderr)
    if FAULTS:
        sys.exit(1)

import cv2
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model_builder, get_model_weights, list_models
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# 3  Model. Names and files become a classifier that knows its preprocessing and its classes.
# ---------------------------------------------------------------------------------------------------------------------

HEAD_ROOTS = ("fc", "classifier", "head", "heads")  # where torchvision's networks keep their last layer
STATE_ENTRIES = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema"),
)
TRUNKS = re.compile(  # torchvision's own names of what holds most of a network: not to be taken for a wrapper
    r"(layer|stage)\d\.\d|layers\.\d|blocks\.\d|features\.(\d|conv0|norm\d|denseblock|transition)|"
    r"encoder\.(layers\.encoder|pos_embedding|ln)|trunk_output\.block"
)
MAX_WRAPPERS = 8  # around one another
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # training-time heads of googlenet and inception_v3; never needed here
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index", "relative_coords_table")
DISPENSABLE = BUFFERS[2:]  # the network comes with these; without its running statistics it would answer wrongly

State = dict[str, Tensor]


@dataclass(frozen=True)
class Classifier:
    """A network that is ready to be asked.

    Attributes:
        model: on `device`, float32, in eval mode.
        arch: its torchvision name, or file.py:function.
        class_names: one for each output.
        preset: torchvision's preprocessing for the architecture (resnet50's for a network of your own); PIL image ->
            float32 (3, S, S), normalised.
        device: where the weights are.
        squash: whether the network is shown the whole photo (True) or the central square (False).
    """

    model: nn.Module
    arch: str
    class_names: tuple[str, ...]
    preset: Any
    device: torch.device
    squash: bool = False

    def preprocess(self, photo: Photo) -> Tensor:
        """The photo as the network sees it: float32 (3, S, S), normalised.

        Raises:
            PhotoError: a strip so long that the preset would blow it up beyond MAX_RESIZED.
        """
        height, width = photo.pixels.shape[:2]
        pixels = self.preset.resize_size[0] ** 2 * max(height, width) / min(height, width)
        if not self.squash and pixels > MAX_RESIZED:
            raise PhotoError(
                f"{photo.path} is {width} x {height} pixels, too long a strip for --resize crop; use squash"
            )
        return self.preset(Image.fromarray(photo.pixels))

    def seen_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of a photo that the network sees: left, top, right, bottom, in the photo's pixels."""
        if self.squash:
            return 0.0, 0.0, float(width), float(height)
        short, side = self.preset.resize_size[0], self.preset.crop_size[0]
        # torchvision rounds the long side down and the crop's corner to the nearest pixel; follow it exactly
        new_width, new_height = (
            (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        )
        left, top = round((new_width - side) / 2.0), round((new_height - side) / 2.0)
        x, y = width / new_width, height / new_height
        return max(0.0, left * x), max(0.0, top * y), min(width, (left + side) * x), min(height, (top + side) * y)


def load_classifier(
    arch: str | None = None,
    ckpt: str | Path | None = None,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    *,
    class_names: Sequence[str] | None = None,
    input_size: int | None = None,
    resize: str = "crop",
) -> Classifier:
    """Builds a classifier and fills it with the weights of a checkpoint.

    A network with a single output gets two: logits of which the softmax is what the sigmoid of the one was.

    Args:
        arch: a name from `torchvision.models.list_models`, or "file.py:function" for a network of your own; None: the
            checkpoint's own `arch` entry, else the one architecture that has the checkpoint's number of parameters;
            without a checkpoint, resnet50.
        ckpt: the weights; None: torchvision's ImageNet weights, from its cache or the network.
        num_classes: None: the checkpoint's. Given, it must agree with the checkpoint.
        device: None: the CUDA GPU if there is one, else the CPU.
        class_names: one for each class; None: those of the checkpoint, else ImageNet's where there are 1000 classes.
        input_size: side of the square input in pixels; None: the checkpoint's, else that of torchvision's preset.
        resize: "crop" or "squash".

    Raises:
        CallError: whatever does not fit, in one line.
    """
    target = find_device(device)
    if resize not in ("crop", "squash"):
        raise CallError(f"unknown resize '{resize}' (known: crop, squash)")
    own = arch is not None and ".py:" in arch
    known = list_models(module=torchvision.models)
    if arch is not None and not own and arch not in known:
        raise CallError(f"unknown architecture '{arch}'{closest(arch, known)}")
    if ckpt is None:
        arch = arch or "resnet50"
        checkpoint = Checkpoint("the network", {}) if own else download_weights(arch)
    else:
        checkpoint = read_checkpoint(Path(ckpt))
        arch = arch or find_architecture(checkpoint)
    build = build_own_model if own else build_model
    model, preset = build(arch, checkpoint, num_classes, input_size)
    if resize == "squash":
        preset.resize_size = [preset.crop_size[0]] * 2
    outputs = count_outputs(model, preset.crop_size[0]) if own else _head(model)[1].weight.shape[0]
    count = max(outputs, 2)
    if outputs == 1:
        model.register_forward_hook(two_sided)
    if num_classes not in (None, outputs, count):
        raise CallError(f"--num-classes {num_classes}, but {checkpoint.name}: {count} classes; leave the option out")
    names = name_classes(class_names, checkpoint, count)
    return Classifier(model.to(target), arch, names, preset, target, squash=resize == "squash")


def find_device(name: str | torch.device | None, local_rank: int | None = None) -> torch.device:
    """The device of that name; None stands for the CUDA GPU where there is one, else the CPU.

    Under torchrun each process of a machine takes the GPU with the number `local_rank`, unless one is named.

    Raises:
        CallError: it is not there or cannot be used.
    """
    if name is None and not torch.cuda.is_available():
        if not local_rank:
            note(f"{why_no_gpu()}, computing on the CPU")
        return torch.device("cpu")
    name = str(name or "cuda")
    if local_rank is not None and name == "cuda":
        name = f"cuda:{local_rank}"
    have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    have += ["mps"] * torch.backends.mps.is_available() + ["xpu"] * torch.xpu.is_available()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add_(1).item()  # whether this torch has code for this GPU shows only now
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if name in have or f"{name}:0" in have:
            why = first_line(error)
            raise CallError(f"device {name} cannot be used: {why}; make room on it, or pass --device cpu") from error
        why = f" ({why_no_gpu()})" if name.startswith("cuda") and not torch.cuda.is_available() else ""
        raise CallError(f"device {name} is not there; this machine has: {', '.join(have)}{why}") from error
    return device


def why_no_gpu() -> str:
    """Why torch finds no CUDA GPU."""
    if not has_gpu_driver():
        return "no CUDA GPU found"
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA (on Windows pip's is; pytorch.org/get-started has the other one)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # an old driver, an empty CUDA_VISIBLE_DEVICES
        return f"no CUDA GPU found: {first_line(error)}"
    return "no CUDA GPU found"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what was missing, the GPU's or the CPU's."""
    words = (
        *("out of memory", "can't allocate memory", "not enough memory"),  # torch of GPUs and CPUs
        *("ALLOC_FAILED", "NOT_INITIALIZED", "unable to find an engine"),  # CUDA's libraries
        *("OUT_OF_DEVICE_MEMORY", "OUT_OF_RESOURCES"),  # Intel's
    )
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


@dataclass(frozen=True)
class Checkpoint:
    """What was found in a checkpoint.

    Attributes:
        name: for messages.
        state: the weights, floating point ones in float32, their keys without the prefixes of wrappers.
        beside: keys of `state` that lie outside of the wrapper that held most: a loss's weights, or the head.
        entries: whatever else the file holds (`arch`, `classes`, `input_size` ...).
        levels: the weights as in the file, then with each wrapper's prefix taken off, each with the keys beside it.
    """

    name: str
    state: State
    beside: frozenset[str] = frozenset()
    entries: Mapping[str, Any] = field(default_factory=dict)
    levels: Sequence[tuple[State, frozenset[str]]] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the weights and the entries beside them without ever running code from the file.

    Raises:
        CallError: not a checkpoint, or one that can only be opened by running its code.
    """
    content = _load_safely(path)
    entries = content if isinstance(content, dict) else {}
    found = _find_state(content)
    if not found:
        held = ", ".join(map(str, list(entries)[:8])) or type(content).__name__
        raise CallError(f"{path} holds no weights (found: {held}); save them with torch.save(model.state_dict(), ...)")
    tensors = {str(k): v.detach() for k, v in found.items() if isinstance(v, Tensor)}
    if not all(v.layout is torch.strided and v.numel() for v in tensors.values()):
        raise CallError(f"{path} holds sparse or empty tensors; save the weights as ordinary ones")
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    levels = [*unwrapped(state)]
    state, beside = levels[-1]
    # Before 2018 torchvision's DenseNet called its layers norm.1 and conv.2 instead of norm1 and conv2.
    old_densenet = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    state = {old_densenet.sub(r"\1\2", key): tensor for key, tensor in state.items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(AUXILIARY)}
    return Checkpoint(str(path), state, beside, {str(k): v for k, v in entries.items()}, levels)


def _load_safely(path: Path) -> Any:
    how_to = "save the weights alone with torch.save(model.state_dict(), 'weights.pth')"
    if not path.is_file():
        raise CallError(f"{path} is {'a folder, not a checkpoint' if path.is_dir() else 'not there'}")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise CallError(f"{path} needs the safetensors package; run: pip install safetensors") from error
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CallError(f"{path} is not a whole safetensors file: {first_line(error)}") from error
    try:
        with torch.serialization.safe_globals(_plain_data()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        message = str(error)
        if "TorchScript" in message:
            raise CallError(f"{path} is a TorchScript archive, which is code; {how_to}") from error
        found = re.search(r"(?:GLOBAL |global |but got <class )[`']?([\w.]+)", message)
        if "Weights only" in message and found:
            raise CallError(
                f"{path} holds a pickled {found.group(1)} object, and loading it would run code; {how_to} "
                "(the README has a line that does so with a model of your own)"
            ) from error
        if isinstance(error, PermissionError):
            raise CallError(f"{path} cannot be read: permission denied") from error
        raise CallError(
            f"{path} is not a checkpoint that torch can read, or not a whole one; copy it again, or {how_to}"
        ) from error


def _plain_data() -> list[Any]:
    """What stands in many checkpoints beside the weights: options of training scripts, what NumPy computed."""
    # Pickles name NumPy's two builders after its module, which is called otherwise since NumPy 2.
    builders = [np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]]
    named = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in builders for core in ("core", "_core")]
    kinds = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    paths = [(PurePath, f"pathlib{where}.{kind}") for where in ("", "._local") for kind in kinds]
    times = [datetime, date, timedelta, timezone]
    # Not of strings: a pickle may change the size of their items while an array has memory for others.
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [argparse.Namespace, np.ndarray, np.dtype, *named, *paths, *times, *dtypes]


def _find_state(content: Any, depth: int = 0) -> Mapping[str, Any]:
    """The dict of tensors in what a checkpoint holds: under a usual name, or itself, or the largest one inside it."""
    if not isinstance(content, Mapping) or depth > 4:
        return {}
    for entry in STATE_ENTRIES:
        found = _find_state(content.get(entry), depth + 1)
        if found:
            return found
    if any(isinstance(value, Tensor) and value.ndim > 1 for value in content.values()):
        return content
    inner = [_find_state(value, depth + 1) for key, value in content.items() if "optim" not in str(key)]
    return max(inner, key=len, default={})


def unwrapped(state: State) -> Iterator[tuple[State, frozenset[str]]]:
    """The state, then again and again without what most of its keys begin with, until that is torchvision's own.

    So a wrapper's `module.`, `model.` or `backbone.` is taken off. Keys outside of it stay as they are: they belong to
    something beside the network, or are its head, and are given along.
    """
    beside: frozenset[str] = frozenset()
    for _ in range(MAX_WRAPPERS):
        yield state, beside
        ((root, count),) = Counter(key.partition(".")[0] + "." for key in state).most_common(1)
        inside = {key for key in state if key.startswith(root) and not TRUNKS.match(key)}
        stripped = {key.removeprefix(root) if key in inside else key: tensor for key, tensor in state.items()}
        is_wrapper, collide = len(inside) == count and count > len(state) / 2, len(stripped) < len(state)
        if collide or not is_wrapper:
            return
        state, beside = stripped, frozenset(state.keys() - inside)


def download_weights(arch: str) -> Checkpoint:
    """torchvision's ImageNet weights, from its cache or else from the network.

    Raises:
        CallError: they cannot be had.
    """
    weights = get_model_weights(arch).DEFAULT
    if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).is_file():
        note(f"downloading torchvision's weights for {arch} ({weights.meta['_file_size']:.0f} MB)")
    try:
        # torch announces the URL, on stdout or stderr depending on its version
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise CallError(
            f"torchvision's weights for {arch} cannot be downloaded ({first_line(error)}); "
            "pass your own with --ckpt FILE"
        ) from error
    state = {key: tensor for key, tensor in state.items() if not key.startswith(AUXILIARY)}
    return Checkpoint(f"torchvision's {arch} weights", state, entries={"classes": weights.meta["categories"]})


class _Unallocated(TorchFunctionMode):
    """Parameters made in this mode get no memory: random weights that are overwritten at once cost nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton(arch: str, num_classes: int, state: State, input_size: int | None = None) -> nn.Module:
    """The architecture in eval mode, its parameters without memory, with the options that the weights imply."""
    options: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):
        # torchvision's own weights for these two expect (p - 0.5) / 0.5, and its builders add that transform when they
        # load them. A trained checkpoint is nearly always fine-tuned from those; the weights themselves don't tell.
        statistics = next((v for k, v in state.items() if k.endswith("running_mean")), torch.zeros(1))
        options = {"aux_logits": False, "init_weights": False, "transform_input": bool(statistics.any())}
    position, patch = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
    if position is not None and patch is not None and position.ndim == 3:
        side = patch.shape[-1]
        if arch.startswith("vit_") and arch.endswith(f"_{side}"):  # the name ends in the side of the patches
            options["image_size"] = math.isqrt(max(position.shape[1] - 1, 1)) * side
    if arch == "maxvit_t" and input_size:
        options["input_size"] = (input_size, input_size)
    with _Unallocated():
        return get_model_builder(arch)(weights=None, num_classes=num_classes, **options).eval()


def _head(model: nn.Module) -> tuple[str, nn.Module]:
    """The layer that gives the logits, by name: the last one with weights (a convolution in SqueezeNet)."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _head_weight(state: State, beside: Iterable[str] = ()) -> str | None:
    """The key of the weight that gives the logits, without knowing the architecture."""
    weights = [k for k, v in state.items() if (k.split(".")[0] in HEAD_ROOTS or k in beside) and v.ndim in (2, 4)]
    return max(weights, key=lambda k: (k.split(".")[0] in HEAD_ROOTS, state[k].ndim == 2, _natural(k)), default=None)


def count_parameters(checkpoint: Checkpoint) -> int:
    """How many parameters the network would have with 1000 classes: the figure that torchvision publishes."""
    state, head = checkpoint.state, _head_weight(checkpoint.state, checkpoint.beside)
    total = sum(v.numel() for k, v in state.items() if not k.endswith(BUFFERS) and k not in checkpoint.beside)
    if head is None:
        return total
    classes, per_class = state[head].shape[0], state[head][0].numel()
    per_class += head.removesuffix("weight") + "bias" in state
    return total + (1000 - classes * (head not in checkpoint.beside)) * per_class


def find_architecture(checkpoint: Checkpoint) -> str:
    """The architecture that a checkpoint is of: by its own `arch` entry, else by its number of parameters.

    Raises:
        CallError: several fit, or none; the message lists what comes near.
    """
    known = list_models(module=torchvision.models)
    entries = checkpoint.entries
    for said in (entries.get("arch"), entries.get("model_name"), getattr(entries.get("args"), "model", None)):
        if isinstance(said, str) and said.lower() in known:
            return said.lower()
    fitting = architectures_that_fit(checkpoint)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CallError(f"{checkpoint.name} fits {' and '.join(fitting)}; choose with --arch")
    count, sizes = count_parameters(checkpoint), _published_sizes()
    near = sorted(sizes, key=lambda size: abs(size - count))[:3]
    raise CallError(
        f"{checkpoint.name} fits no torchvision architecture ({count:,} parameters with 1000 classes; nearest: "
        + ", ".join(f"{' or '.join(sizes[size])} with {size:,}" for size in near)
        + "); choose with --arch, or give your own network by --arch net.py:build"
    )


def _published_sizes() -> dict[int, list[str]]:
    sizes: dict[int, list[str]] = {}
    for arch in list_models(module=torchvision.models):
        for count in {weights.meta["num_params"] for weights in get_model_weights(arch)}:
            # inception_v3's figure is the one with its auxiliary head, 3,326,696 parameters, which we never load
            sizes.setdefault(count - 3_326_696 * (arch == "inception_v3"), []).append(arch)
    return sizes


def architectures_that_fit(checkpoint: Checkpoint) -> list[str]:
    """The architectures whose tensors the checkpoint has, the head aside.

    The published parameter counts leave one or none; where a changed head spoils the count, those are tried whose
    count leaves a possible size for a head: VGG's and AlexNet's are large, all others have at most ten million.
    """
    trunk = sum(v.numel() for v in _trunk(checkpoint.state, HEAD_ROOTS, checkpoint.beside).values())
    sizes = _published_sizes()
    counted = sizes.get(count_parameters(checkpoint), [])
    possible = [
        arch
        for size, archs in sizes.items()
        for arch in archs
        if arch.startswith(("vgg", "alexnet")) or -5_000_000 < size - trunk < 10_000_000
    ]
    fitting = [arch for arch in counted if _trunk_fits(arch, checkpoint)]
    return fitting or [arch for arch in dict.fromkeys(possible) if _trunk_fits(arch, checkpoint)]


def _trunk(state: Mapping[str, Tensor], roots: Sequence[str], beside: Iterable[str] = ()) -> dict[str, Tensor]:
    """The parameters of a network without its head."""
    inside = (k for k in state if k.split(".")[0] not in roots and k not in beside and not k.endswith(BUFFERS))
    return {key: state[key] for key in inside}


def _trunk_fits(arch: str, checkpoint: Checkpoint) -> bool:
    model = skeleton(arch, 2, checkpoint.state)
    root = _head(model)[0].split(".")[0]
    wanted = _trunk(model.state_dict(), [root])
    found = _trunk(checkpoint.state, [root], checkpoint.beside)
    return {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in found.items()}


def build_model(
    arch: str, checkpoint: Checkpoint, num_classes: int | None = None, input_size: int | None = None
) -> tuple[nn.Module, Any]:
    """The architecture filled with the checkpoint's weights, in eval mode on the CPU, and its preprocessing.

    Raises:
        CallError: the checkpoint does not fit the architecture, or the architecture the input size.
    """
    size = input_size or _side(checkpoint.entries.get("input_size"), checkpoint.name)
    state = dict(checkpoint.state)
    # A layer in front may have normalised the inputs; the preprocessing does so in its stead.
    named = [key for key in checkpoint.beside if key.rpartition(".")[2] in ("mean", "std")]
    normalising = [key for key in named if state[key].numel() == 3]  # those of a loss are of its features
    entries = {key.rpartition(".")[2]: state.pop(key) for key in normalising} | dict(checkpoint.entries)
    head = _head_weight(state, checkpoint.beside)
    classes = state[head].shape[0] if head else num_classes or 1000
    model = skeleton(arch, classes, state, size)
    _fit_head(model, state, checkpoint.beside)
    _load(model, arch, state, checkpoint)
    fixed = getattr(model, "image_size", None)  # the side that a ViT's position embedding was made for
    if fixed and size not in (None, fixed):
        raise CallError(f"this {arch} takes inputs of {fixed} x {fixed} pixels only; leave --input-size {size} out")
    return model.eval(), _preset(arch, fixed or size, entries)


def build_own_model(
    arch: str, checkpoint: Checkpoint, num_classes: int | None = None, input_size: int | None = None
) -> tuple[nn.Module, Any]:
    """The network that the function in `arch`, "file.py:function", returns, like `build_model`.

    The function is called with `num_classes` if it takes it and the number is known. The file is the person's own
    code and is run; the checkpoint is not. Inputs are prepared as for torchvision's resnet50 unless the checkpoint's
    entries say otherwise.

    Raises:
        CallError: there is no such function, it fails, or the checkpoint does not fit its network.
    """
    head = _head_weight(checkpoint.state, checkpoint.beside)
    model = run_own_file(arch, num_classes or (checkpoint.state[head].shape[0] if head else None))
    if checkpoint.state:
        # What looks like a wrapper's prefix may be a part of the network.
        named, wanted = [(checkpoint.state, checkpoint.beside), *checkpoint.levels], model.state_dict().keys()
        state, beside = max(named, key=lambda level: len(wanted & level[0].keys()))
        _load(model, arch, state, replace(checkpoint, beside=beside))
    size = input_size or _side(checkpoint.entries.get("input_size"), checkpoint.name)
    return model.eval(), _preset("resnet50", size, checkpoint.entries)


def run_own_file(arch: str, classes: int | None) -> nn.Module:
    """What the function in "file.py:function" returns for that number of classes. Raises CallError."""
    file, _, function = arch.rpartition(":")
    folder = os.path.dirname(os.path.abspath(file))
    sys.path.insert(0, folder)  # its neighbours can be imported
    arguments, sys.argv = sys.argv, [file]  # which are not for the file
    try:
        # under a name of our own: a file that is called torch.py must not stand in for torch
        spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        with contextlib.redirect_stderr(io.StringIO()):  # a parser of options would print how to call the file
            spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            functions = [name for name in vars(module) if callable(getattr(module, name))]
            raise CallError(f"{file} has no function '{function}'{closest(function, functions)}")
        build = getattr(module, function)
        parameters = inspect.signature(build).parameters.values()
        takes_number = any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in parameters)
        model = build(num_classes=classes) if takes_number and classes else build()
    except CallError:
        raise
    except (Exception, SystemExit) as error:
        hint = "; is it --num-classes that it needs?" if "num_classes" in str(error) and not classes else ""
        if isinstance(error, SystemExit):
            hint = "; put what is not to be run by an import behind if __name__ == '__main__':"
        raise CallError(f"--arch {arch}: {type(error).__name__}: {first_line(error)}{hint}") from error
    finally:
        sys.argv = arguments
        sys.path.remove(folder)
    if not isinstance(model, nn.Module):
        raise CallError(f"--arch {arch} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def as_logits(answer: Any) -> Tensor:
    """What a network returns, as logits (N, classes).

    Raises:
        CallError: something else, a map or a dict without logits.
    """
    if isinstance(answer, Mapping):  # as transformers' networks give it
        named = [key for key in ("logits", "out") if key in answer]
        if not named:
            raise CallError(f"the network returns a dict of {', '.join(map(str, answer))}; call its logits 'logits'")
        answer = answer[named[0]]
    elif hasattr(answer, "logits"):
        answer = answer.logits
    elif not isinstance(answer, Tensor):  # an auxiliary head comes second, a map of features is no answer
        answer = next((each for each in answer if _is_row(each)), answer[0])
    if not _is_row(answer):
        found = f"tensor of {_shape(answer)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise CallError(f"the network answers a batch with a {found}; let it return the logits, (N, classes)")
    return answer[:, None] if answer.ndim == 1 else answer.flatten(1)


def _is_row(answer: Any) -> bool:
    """Whether there is one number a class for each input: (N, C), (N, C, 1, 1) or (N,)."""
    if not isinstance(answer, Tensor) or not answer.ndim:
        return False
    return math.prod(answer.shape[1:]) == max(answer.shape[1:], default=1)


def count_outputs(model: nn.Module, side: int) -> int:
    """How many classes a network tells apart, found out by asking it.

    Raises:
        CallError: it does not answer, or with probabilities.
    """
    try:
        with torch.enable_grad():
            logits = as_logits(model(torch.zeros(1, 3, side, side, requires_grad=True)))
    except CallError:
        raise
    except Exception as error:
        grey = "channels" in first_line(error)
        hint = (
            "let it begin with x.mean(1, keepdim=True) if it is for grey ones" if grey else "pass another --input-size"
        )
        raise CallError(
            f"the network fails at an input of 3 x {side} x {side} ({first_line(error)}); {hint}"
        ) from error
    last = re.match("(Softmax|Sigmoid)Backward", logits.grad_fn.name() if logits.grad_fn else "")
    if last:
        raise CallError(f"the network ends in a {last[1].lower()}; let it return the logits, without that")
    return logits.shape[1]


def two_sided(model: nn.Module, inputs: Any, answer: Any) -> Tensor:
    """A hook that makes logits for two classes, (N, 2), of a single one, whose sigmoid says how sure the second is."""
    logit = as_logits(answer)
    return torch.cat([-logit, logit], 1) / 2


def _fit_head(model: nn.Module, state: State, beside: Iterable[str]) -> None:
    """Gives the network the head that the checkpoint has, where that is a single Linear layer in another place.

    People fine-tune with `model.fc = nn.Sequential(nn.Dropout(), nn.Linear(...))`, or replace a whole classifier by one
    Linear layer. `state` is changed so that the keys fit.
    """
    name, layer = _head(model)
    root = name.split(".")[0]
    within = [key for key in state if key.startswith(f"{name}.") and key.endswith("weight")]
    under = [key for key in state if key.split(".")[0] == root or key in beside]
    weights = [key for key in under if key.endswith("weight")]
    if len(within) == 1:  # fc.1.weight for fc.weight, classifier.2.1.weight for classifier.2.weight
        source = within[0]
    elif len(weights) == 1 and state[weights[0]].ndim == 2:  # classifier.weight for classifier.1.weight
        source = weights[0]
    else:
        return
    old = source.removesuffix(".weight")
    if isinstance(layer, nn.Conv2d) or state[source].ndim != 2:
        return
    head = nn.Linear(state[source].shape[1], state[source].shape[0], bias=f"{old}.bias" in state, device="meta")
    others = [key for key in model.state_dict() if key.split(".")[0] == root and not key.startswith(f"{name}.")]
    if old != name and set(under) <= {f"{old}.weight", f"{old}.bias"} and others:
        model.add_module(root, nn.Sequential(nn.Flatten(1), head))  # the whole classifier of a VGG was replaced
        new = f"{root}.1"
    else:
        if head.in_features != layer.in_features:
            return
        model.set_submodule(name, head)
        new = name
    for part in ("weight", "bias"):
        if f"{old}.{part}" in state:
            state[f"{new}.{part}"] = state.pop(f"{old}.{part}")


def _load(model: nn.Module, arch: str, state: State, checkpoint: Checkpoint) -> None:
    """Puts the weights into the network; what does not fit is told in one line."""
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith(DISPENSABLE)]
    unexpected = [k for k in state if k not in wanted]
    differ = [
        f"{k}: {_shape(state[k])} in the file, {_shape(wanted[k])} in {arch}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if not missing and not differ and set(unexpected) <= checkpoint.beside:
        unexpected = _second_network(arch, state, unexpected, checkpoint)
    if missing or unexpected or differ:
        found = [("missing", missing), ("unexpected", unexpected), ("of another shape", differ)]
        parts = [
            f"{len(keys)} {what} ({'; '.join(keys[:3])}{'; ...' * (len(keys) > 3)})" for what, keys in found if keys
        ]
        others = [a for a in architectures_that_fit(checkpoint) if a != arch]
        hint = "" if ".py:" in arch else "; give a changed network by --arch net.py:build"
        hint = f"; it would fit {' or '.join(others)}: pass --arch {others[0]}" if others and hint else hint
        raise CallError(f"{checkpoint.name} does not fit {arch}: {', '.join(parts)}{hint}")
    quantised = [k for k in wanted if k in state and wanted[k].is_floating_point() > state[k].is_floating_point()]
    if quantised:
        raise CallError(f"{checkpoint.name}: {quantised[0]} is quantised; save the weights from before that")
    for key in list(wanted):  # into its own dict, which has the version marks that MNASNet insists on
        if key in state:
            wanted[key] = state[key].contiguous()
        else:
            del wanted[key]
    model.load_state_dict(wanted, strict=False, assign=True)


def _second_network(arch: str, state: State, outside: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """Of the keys outside of a network that is whole, the convolutions: a second network's, which is not passed over.

    Where there are none, the keys are those of a loss or a metric that was saved along, and are told as left out.

    Raises:
        CallError: one is a head on top of the network, which would be missing.
    """
    head = _head_weight({key: tensor for key, tensor in state.items() if key not in checkpoint.beside})
    outputs = state[head].shape[0] if head else 0
    on_top = [key for key in outside if state[key].ndim == 2 and state[key].shape[1] == outputs]
    if on_top:
        raise CallError(
            f"{checkpoint.name}: {on_top[0]} lies on top of {arch}'s {outputs} outputs; give the whole network by "
            "--arch net.py:build"
        )
    convolutions = [key for key in outside if key.endswith("weight") and state[key].ndim == 4]
    if outside and not convolutions:
        note(f"{checkpoint.name}: left out as no part of {arch}: {'; '.join(outside[:3])}")
    return convolutions


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _side(entry: Any, name: str) -> int | None:
    """A checkpoint's input_size as the side of a square: 225, (225, 225) or (3, 225, 225)."""
    if entry is None:
        return None
    try:
        sides = [operator.index(side) for side in (entry if isinstance(entry, (list, tuple)) else [entry])][-2:]
        if len(set(sides)) == 1 and 8 <= sides[0] <= 4096:
            return sides[0]
    except TypeError:
        pass
    raise CallError(f"{name}: its input_size {str(entry)[:60]} is not a square that can be used; pass --input-size")


def _preset(arch: str, size: int | None, entries: Mapping[str, Any]) -> Any:
    """torchvision's preprocessing for the architecture; at another size the margin around the crop is in proportion."""
    transforms = get_model_weights(arch).DEFAULT.transforms
    preset = transforms()
    if size:
        # torchvision has presets for several sizes of some networks; else the margin grows with the size
        presets = [weights.transforms() for weights in get_model_weights(arch)]
        same = [p.resize_size[0] for p in presets if p.crop_size[0] == size]
        resize = preset.resize_size[0] if preset.crop_size[0] == size else None
        resize = resize or next(iter(same), None) or round(size * preset.resize_size[0] / preset.crop_size[0])
        preset.crop_size, preset.resize_size = [size], [resize]
    found = {}
    for entry in ("mean", "std"):
        if entries.get(entry) is None:
            continue
        try:
            values = torch.as_tensor(entries[entry], dtype=torch.float64).flatten()  # (3, 1, 1) is common, too
        except (TypeError, ValueError, RuntimeError):
            values = torch.empty(0)
        if len(values) != 3 or not values.isfinite().all() or (entry == "std" and values.min() <= 0):
            raise CallError(f"the checkpoint's entry {entry} is not three numbers, one for each colour")
        found[entry] = values
    white = 255 if any(values.max() > 1 for values in found.values()) else 1  # the largest value of a colour
    for entry, values in found.items():
        setattr(preset, entry, (values / white).tolist())
    return preset


def name_classes(given: Sequence[str] | None, checkpoint: Checkpoint, count: int) -> tuple[str, ...]:
    """A name for each of the network's outputs: those given, else the checkpoint's, else ImageNet's for 1000 classes.

    Raises:
        CallError: names were given, but not as many as there are classes.
    """
    if given is not None:
        if len(given) != count:
            raise CallError(f"{len(given)} class names were given, but the network has {count} classes")
        return tuple(given)
    for entry in ("classes", "class_names", "class_to_idx", "idx_to_class"):
        if checkpoint.entries.get(entry) is not None:
            try:
                names = _ordered_names(checkpoint.entries[entry])
            except (ValueError, TypeError) as error:
                note(f"the entry {entry} of {checkpoint.name} is not used: {first_line(error)}")
                continue
            if len(names) == count:
                return tuple(names)
            note(f"the entry {entry} of {checkpoint.name} is not used: {len(names)} names for {count} classes")
    if count == 1000:
        return tuple(get_model_weights("resnet50").DEFAULT.meta["categories"])
    return tuple(f"class {index}" for index in range(count))


def find_class(wanted: str, class_names: Sequence[str]) -> int:
    """The index of a class that is named by its name (upper or lower case) or its index; a name wins.

    Raises:
        CallError: there is no such class.
    """
    lowered = [name.casefold() for name in class_names]
    if wanted.casefold() in lowered:
        return lowered.index(wanted.casefold())
    if re.fullmatch(r"-?\d+", wanted):
        if 0 <= int(wanted) < len(class_names):
            return int(wanted)
        raise CallError(
            f"--target-class {wanted} is out of range: the network has {len(class_names)} classes, 0 to "
            f"{len(class_names) - 1}"
        )
    some = ", ".join(class_names[:20]) + ", ..." * (len(class_names) > 20)
    hint = "; repeat the option for each class" if "," in wanted else closest(wanted, class_names)
    raise CallError(f"--target-class: the network has no class '{wanted}'{hint} (it has: {some})")


# ---------------------------------------------------------------------------------------------------------------------
# 4  Explanation. One forward pass gives the logits, the activations, and by two backward walks everything else.
# ---------------------------------------------------------------------------------------------------------------------

Floats = NDArray[np.float32]
Progress = Callable[[Sequence[Tensor]], Iterable[Tensor]]

# The autograd nodes of activation functions: a gradient that comes to one of these is what guided backpropagation
# clamps. Gates (Sigmoid, Hardsigmoid, Tanh) scale a signal rather than rectify it and are left alone.
ACTIVATION_NODES = re.compile(
    r"(Relu|LeakyRelu|RreluWithNoise|Prelu|PreluKernel|Hardtanh|Threshold|Elu|Celu|Selu|Gelu|Silu|Swish|Hardswish|Mish"
    r"|Softplus)\w*Backward\d*"
)


@dataclass(frozen=True)
class Explanation:
    """What the explainer found for N inputs of H x W.

    Attributes:
        cams: for each method the maps, float32 (N, H, W) in [0, 1]: highest where the evidence for the class is
            strongest in this photo (1, if it is no average of several). A map that is 0 everywhere says that nothing
            in the layer speaks for the class, or every place equally.
        guided: guided-backpropagation gradients, float32 (N, 3, H, W), in units of logit per normalised input value;
            None if they were not asked for. In a network without activations they are the plain gradients.
        logits: float32 (N, classes).
        targets: int64 (N,), the class that was explained.

    Where K classes were asked for each input, `cams`, `guided` and `targets` have K as their second axis: (N, K, ...).
    """

    cams: dict[str, Floats]
    guided: Floats | None
    logits: Floats
    targets: NDArray[np.int64]

    def only(self, index: int) -> Explanation:
        """The explanation of one input, as a batch of one."""
        i = slice(index, index + 1)
        guided = None if self.guided is None else self.guided[i]
        cams = {method: maps[i] for method, maps in self.cams.items()}
        return Explanation(cams, guided, self.logits[i], self.targets[i])


# How each method weighs what the channels say. `activations` are (..., C, h, w), `gradients` those of the class score
# with respect to them; the answer is each channel's contribution to the map, of the shape of the two.


def gradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391): weighed by the mean gradient of the channel."""
    return activations * gradients.mean((-2, -1), keepdim=True)


def gradcam_plus_plus(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (Chattopadhyay et al., WACV 2018, arXiv:1710.11063, equation 19): positive gradients, weighted."""
    squared = gradients**2
    alphas = squared / (2 * squared + activations.sum((-2, -1), keepdim=True) * squared * gradients + 1e-6)
    weights = (gradients.clamp(min=0) * torch.where(gradients != 0, alphas, 0)).sum((-2, -1), keepdim=True)
    return activations * weights


def xgradcam(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM (Fu et al., BMVC 2020, arXiv:2008.02312): the mean gradient, weighted by the activations."""
    shares = activations / (activations.sum((-2, -1), keepdim=True) + 1e-7)
    return activations * (gradients * shares).sum((-2, -1), keepdim=True)


def hirescam(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM (Draelos and Carin, 2020, arXiv:2011.08891): each place by its own gradient."""
    return activations * gradients


def gradcam_elementwise(activations: Tensor, gradients: Tensor) -> Tensor:
    """The same without what speaks against the class, a variant that the grad-cam package has."""
    return (activations * gradients).clamp(min=0)


def layercam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM (Jiang et al., IEEE TIP 2021, doi:10.1109/TIP.2021.3089943): each place by its positive gradient."""
    return activations * gradients.clamp(min=0)


def absolute_gradients(activations: Tensor, gradients: Tensor) -> Tensor:
    """As Seg-Eigen-CAM weighs (Chung and Ying, Applied Sciences 2025, doi:10.3390/app15137562, equation 10)."""
    return activations * gradients.abs()


def unweighted(activations: Tensor, gradients: Tensor | None) -> Tensor:
    """The activations as they are: no class is asked for."""
    return activations


def fem(activations: Tensor, gradients: Tensor | None) -> Tensor:
    """FEM (Fuad et al., IPTA 2020): by the share of a channel's places that are two standard deviations up."""
    mean, deviation = activations.mean((-2, -1), keepdim=True), activations.std((-2, -1), correction=0, keepdim=True)
    return activations * (activations > mean + 2 * deviation).to(activations).mean((-2, -1), keepdim=True)


def random_weights(activations: Tensor, gradients: Tensor | None) -> Tensor:
    """Channels by chance, from -1 to 1, always the same: what a map is worth that knows nothing (as in grad-cam).

    All of them change sign where the map would be mostly negative, and so be cut off.
    """
    drawn = torch.rand(activations.shape[-3], generator=torch.Generator().manual_seed(0)) * 2 - 1
    contributions = activations * drawn.to(activations)[:, None, None]
    return contributions * torch.where(contributions.sum((-3, -2, -1), keepdim=True) < 0, -1.0, 1.0)


# How the contributions (..., C, h, w) become a map (..., h, w).


def total(contributions: Tensor) -> Tensor:
    """The sum over the channels."""
    return contributions.sum(-3)


def principal_component(contributions: Tensor) -> Tensor:
    """Eigen-CAM (Muhammad and Yeasin, IJCNN 2020, arXiv:2008.00299): the projection on the first principal component.

    A component has no sign of its own; grad-cam leaves it to chance, and with it where the heat is. Here the sum of its
    entries is not negative: then the map rises where the sum of the contributions does (where layer norm has made that
    sum 0 everywhere, chance remains). By NumPy, on the CPU, so that all but the sign is grad-cam's.
    """
    columns = contributions.detach().flatten(-2).transpose(-2, -1).cpu().numpy()  # (..., h * w, C)
    columns = columns - columns.mean(-2, keepdims=True)
    first = np.linalg.svd(columns, full_matrices=False)[2][..., :1, :]
    first = np.where(first.sum(-1, keepdims=True) < -1e-3, -first, first)
    projections = torch.from_numpy(columns @ first.swapaxes(-2, -1)).to(contributions)
    return projections.view(*contributions.shape[:-3], *contributions.shape[-2:])


def signed_component(contributions: Tensor) -> Tensor:
    """The same, its sign so that the strongest place is positive (Chung and Ying 2025, equation 13)."""
    maps = principal_component(contributions)
    flipped = maps.amin((-2, -1), keepdim=True).abs() > maps.amax((-2, -1), keepdim=True).abs()
    return torch.where(flipped, -maps, maps)


def kernel_component(contributions: Tensor) -> Tensor:
    """KPCA-CAM (Karmani et al., 2024, arXiv:2410.00267): the first component of a kernel PCA, by grad-cam."""
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_kernel

    shape = contributions.shape
    if shape[-2] * shape[-1] > 5000:
        raise CallError(f"kpcacam compares all pairs of places, too many in a map of {_shape(contributions[0, 0, 0])}")
    maps = get_2d_projection_kernel(contributions.detach().reshape(-1, *shape[-3:]).cpu().numpy())
    return torch.from_numpy(maps).to(contributions).view(*shape[:-3], *shape[-2:])


@dataclass(frozen=True)
class Recipe:
    """How a method makes its map of a layer.

    Attributes:
        weigh: activations and gradients -> contributions of the channels.
        join: contributions -> map.
        gradients: whether `weigh` looks at the gradients. If not, the map is the same for every class.
        product: whether the maps of several layers are multiplied; else they are averaged.
    """

    weigh: Callable[[Tensor, Any], Tensor]
    join: Callable[[Tensor], Tensor] = total
    gradients: bool = True
    product: bool = False


RECIPES = {
    "gradcam": Recipe(gradcam),
    "gradcam++": Recipe(gradcam_plus_plus),
    "xgradcam": Recipe(xgradcam),
    "eigencam": Recipe(unweighted, principal_component, gradients=False),
    "eigengradcam": Recipe(hirescam, principal_component),
    "hirescam": Recipe(hirescam),
    "layercam": Recipe(layercam),
    "gradcamelementwise": Recipe(gradcam_elementwise),
    "fem": Recipe(fem, gradients=False),
    "kpcacam": Recipe(unweighted, kernel_component, gradients=False),
    "segeigencam": Recipe(absolute_gradients, signed_component),
    "randomcam": Recipe(random_weights, gradients=False),
    "refinecam": Recipe(gradcam_plus_plus, product=True),  # arXiv:2605.14641
}
BY_PASSES = ("scorecam", "ablationcam")  # these ask the network again, channel by channel
BY_GRAD_CAM = {"fullgrad": "FullGrad", "shapleycam": "ShapleyCAM", "finercam": "FinerCAM"}  # of another score or layer

SMALLER_BATCHES = "the memory does not suffice for such large batches; going on with smaller ones"
ABLATION_COPIES = 256  # of the layer's output at once, at most
ABLATION_BYTES = 2**25  # that these copies may take together


def normalise(maps: Tensor) -> Tensor:
    """Each map of (..., h, w) stretched to [0, 1]; one that is the same everywhere becomes 0 (as in grad-cam)."""
    maps = maps - maps.amin((-2, -1), keepdim=True)
    return maps / (1e-7 + maps.amax((-2, -1), keepdim=True))


def channel_axis(output: Tensor, size: tuple[int, int]) -> int:
    """Which axis of a layer's output holds the channels, for inputs of `size` (H, W).

    Convolutional layers give (N, C, h, w); Swin's give (N, h, w, C), and a ViT's tokens (N, T, C).
    """

    def like_input(rows: int, columns: int) -> bool:
        return abs(rows * size[1] - columns * size[0]) <= max(size)

    if output.ndim == 4 and (like_input(*output.shape[2:]) or not like_input(*output.shape[1:3])):
        return 1
    return output.ndim - 1


def as_map(output: Tensor, size: tuple[int, int]) -> Tensor | None:
    """A layer's output for inputs of `size` (H, W) as (N, C, h, w); None if it has no spatial extent.

    Of a ViT's tokens, the first one stands for no place (the class token); some networks have more of those, or none.
    """
    if output.ndim == 4:
        spatial = output.movedim(channel_axis(output, size), 1)
        return spatial if spatial[0, 0].numel() > 1 else None
    if output.ndim == 3:
        height, width = size
        for special in (1, 0, 2, 3, 4, 5):
            places = max(output.shape[1] - special, 0)
            rows = math.isqrt(places * height // width)
            if places > 1 and rows and rows * rows * width == places * height:
                return output[:, special:].transpose(1, 2).unflatten(2, (rows, places // rows))
    return None


def graph_nodes(root: Any) -> Iterator[Any]:
    """Every node of the autograd graph that ends in `root`, once."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        yield node
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        stack.extend(new)


def _clamp_incoming(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else gradient.clamp(min=0) for gradient in gradients)


def guided_gradients(scores: Sequence[Tensor], inputs: Tensor) -> list[Tensor]:
    """Guided backpropagation (Springenberg et al., ICLR 2015 workshop, arXiv:1412.6806) of each score to the inputs.

    An ordinary backward pass in which every activation function lets only positive gradients in. The activations are
    found in the autograd graph, so modules and functions count alike; the graph is used up.
    """
    for node in {node for score in scores for node in graph_nodes(score.grad_fn)}:
        if ACTIVATION_NODES.fullmatch(node.name()):
            node.register_prehook(_clamp_incoming)
    last = scores[-1]
    return [torch.autograd.grad(score, inputs, retain_graph=score is not last)[0] for score in scores]


def layer_name(model: nn.Module, layer: str | nn.Module) -> str:
    """The dotted name of a layer that is given by its name or as the module itself. Raises CallError."""
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        name = next((name for name, module in modules.items() if module is layer), "")
    else:
        name = layer.removeprefix("module.")
    if not name or name not in modules:
        wanted = layer if isinstance(layer, str) else type(layer).__name__
        outermost = ", ".join(name for name, _ in model.named_children())
        hint = "; repeat the option for each layer" if "," in wanted else closest(wanted, modules)
        raise CallError(f"the network has no layer '{wanted}'{hint} (outermost: {outermost})")
    return name


def choose_targets(logits: Tensor, targets: Sequence[int] | Tensor | int | None, top: int | None = None) -> Tensor:
    """The class to explain for each input, int64 (N,), or the K classes, (N, K). Raises CallError for unknown ones."""
    classes = logits.shape[1]
    if targets is None:
        return logits.detach().argmax(1) if top is None else logits.detach().topk(min(top, classes)).indices
    chosen = torch.as_tensor(targets).clone()
    if chosen.numel() and (chosen.is_floating_point() or chosen.dtype == torch.bool):
        raise CallError(f"target classes are indices, not {chosen.dtype}")
    chosen = chosen.long()
    if chosen.ndim > 2 or (chosen.ndim and len(chosen) != len(logits) and not (chosen.ndim == 2 and len(chosen) == 1)):
        raise CallError(f"{_shape(chosen)} target classes do not go with {len(logits)} inputs: give one for each")
    chosen = chosen.expand(len(logits), *chosen.shape[1:])
    if not ((chosen >= 0) & (chosen < classes)).all():
        raise CallError(f"class {chosen.tolist()} is out of range: the network has {classes} classes, from 0")
    return moved(chosen, logits.device)


@contextlib.contextmanager
def tap(network: nn.Module, layers: Sequence[str], differentiable: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of layers while the network runs, by name; where a layer runs again, the last one counts.

    With `differentiable`, a gradient with respect to them can be taken even where nothing before them needs one.
    """
    outputs: dict[str, Tensor] = {}

    def collect(name: str, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise CallError(f"layer '{name}' gives a {type(output).__name__}, not one tensor; choose a layer inside it")
        if differentiable and not output.requires_grad:
            output = output.detach().requires_grad_()
        outputs[name] = output
        return output.clone()  # what follows may change it in place, and it is wanted as the layer gave it

    with contextlib.ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(network.get_submodule(name).register_forward_hook(partial(collect, name)))
        yield outputs


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass; `came_from` and `node` are the autograd nodes on its two sides."""

    name: str
    module: nn.Module
    input: Tensor
    came_from: Any
    output: Tensor
    node: Any


def watch(network: nn.Module, inputs: Tensor) -> tuple[list[Call], Tensor]:
    """Runs the network once. Returns the calls of its modules, in the order in which they finished, and the logits."""
    calls: list[Call] = []

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            calls.append(Call(name, module, args[0], args[0].grad_fn, output, output.grad_fn))

    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(record, name)))
        return calls, as_logits(network(inputs.detach().requires_grad_()))


def find_target_layer(network: nn.Module, calls: Sequence[Call], logits: Tensor, size: tuple[int, int]) -> str:
    """The last layer that gives a spatial map on which the answer depends, for inputs of `size` (H, W).

    Adaptive pooling, and layers inside the head (SqueezeNet's has one map for each class), count only where nothing
    else does. In a ViT the last tokens do not reach the head, only the class token does; the last layer whose tokens
    do is the norm before the last attention, which is where grad-cam's examples look too.

    Raises:
        CallError: there is none.
    """
    head = next((call for call in reversed(calls) if isinstance(call.module, (nn.Linear, nn.Conv2d))), None)
    # What the head reads, not the score: the weights of a head that was just initialised may all be zero.
    features = logits if head is None else head.input
    probe = (features[0] * torch.linspace(1, 2, features[0].numel()).to(features).view_as(features[0])).sum()
    parent = head.name.rpartition(".")[0] if head else ""
    in_head = f"{parent}." if parent and isinstance(network.get_submodule(parent), nn.Sequential) else None
    second_choice = ""
    for call in reversed(calls):
        if not call.name or as_map(call.output, size) is None:
            continue
        pooling = isinstance(call.module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))
        if not pooling and not (in_head and f"{call.name}.".startswith(in_head)) and call.output.requires_grad:
            gradient = torch.autograd.grad(probe, call.output, retain_graph=True, allow_unused=True)[0]
            if gradient is not None and as_map(gradient, size)[0].any(0).sum() > 1:
                return call.name
        second_choice = second_choice or call.name
    if not second_choice:
        raise CallError(f"no layer gives a spatial map for inputs of {size[0]} x {size[1]}; name one as target layer")
    return second_choice


def fold_batch_norms(network: nn.Module, calls: Sequence[Call], logits: Tensor, keep: Sequence[str]) -> None:
    """Folds each batch norm into the convolution before it, where nothing else reads that convolution's output.

    In eval mode the two are one affine map, and together they cost one pass over memory instead of two. `keep` names
    the layers whose own output is wanted. Which output goes where is read from the autograd graph of the watched pass.
    """
    times_called = Counter(call.name for call in calls)
    readers = Counter(parent for node in graph_nodes(logits.grad_fn) for parent, _ in node.next_functions)
    convolutions = {call.node: call for call in calls if type(call.module) is nn.Conv2d}
    for call in calls:
        source, norm = convolutions.get(call.came_from), call.module
        if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats or source is None or source.name in keep:
            continue
        if times_called[call.name] == times_called[source.name] == readers[source.node] == 1:
            fused = nn.utils.fusion.fuse_conv_bn_eval(source.module, norm).requires_grad_(False)
            network.set_submodule(source.name, fused)
            network.set_submodule(call.name, nn.Identity())


class _Shared(dict[str, Any]):
    """What stays one and the same when the module that has it is copied."""

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


class Packed(nn.Module):
    """A frozen convolution on the CPU that keeps its weights in the order in which oneDNN computes with them.

    torch brings them into that order anew at each call, forward and backward: a fifth of a ResNet-50's time for one
    photo. Which order is the best depends on the situation, so where that changes they are packed again. The operators
    are not public: they are those that torch's compiler uses on CPUs, see `can_pack`.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = convolution.kernel_size, convolution.stride, convolution.padding
        self.dilation, self.groups, self.bias = convolution.dilation, convolution.groups, convolution.bias
        # the weights for each direction with the situation that they are for
        packed = {"forward": (None, convolution.weight.detach()), "backward": (None, None)}
        self._weights = _Shared(packed, lock=threading.Lock())

    @property
    def weight(self) -> Tensor:
        """The weights in their usual order, (out, in, height, width)."""
        _, weight = self._weights["forward"]
        return (weight.to_dense() if weight.is_mkldnn else weight).contiguous(memory_format=torch.channels_last)

    def _packed(self, direction: str, inputs: Tensor, reorder: Any, *geometry: Any) -> Tensor:
        """The weights in the best order, which depends on the inputs' shape and on how many threads share the work.

        Of several threads one packs, and the others wait, or there would be as many copies.
        """
        situation = torch.get_num_threads(), inputs.shape
        with self._weights["lock"]:
            packed_for, weight = self._weights[direction]
            if packed_for != situation:
                weight = reorder(self.weight, *geometry, inputs.shape)
                self._weights[direction] = situation, weight
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, h, w), differentiable with respect to the inputs."""
        return _PackedConvolution.apply(inputs, self)

    def convolve(self, inputs: Tensor) -> Tensor:
        """The same, for autograd not to see."""
        mkldnn, geometry = torch.ops.mkldnn, (self.padding, self.stride, self.dilation, self.groups)
        weight = self._packed("forward", inputs, mkldnn._reorder_convolution_weight, *geometry)
        return mkldnn._convolution_pointwise(inputs, weight, self.bias, *geometry, "none", [], "")

    def transposed(self, gradients: Tensor, size: Sequence[int]) -> Tensor:
        """The gradients with respect to inputs of `size` (H, W), (N, out, h, w) -> (N, in, H, W)."""
        left_over = [
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) % self.stride[i]
            for i in (0, 1)
        ]
        mkldnn, geometry = torch.ops.mkldnn, (self.padding, left_over, self.stride, self.dilation, self.groups)
        weight = self._packed("backward", gradients, mkldnn._reorder_convolution_transpose_weight, *geometry)
        return mkldnn._convolution_transpose_pointwise(gradients, weight, None, *geometry, "none", [], "")


class _PackedConvolution(torch.autograd.Function):
    """What autograd needs to know of it: the gradient is the transposed convolution."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Packed) -> Tensor:
        ctx.layer, ctx.size = layer, inputs.shape[2:]
        return layer.convolve(inputs)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.transposed(gradients.contiguous(memory_format=torch.channels_last), ctx.size), None


@functools.cache
def can_pack() -> bool:
    """Whether this torch has the operators on this machine, and they give what its public convolution gives."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    plain = nn.utils.skip_init(nn.Conv2d, 16, 32, 3, 2, 1).requires_grad_(False)
    plain.load_state_dict({name: torch.linspace(-1, 1, v.numel()).view_as(v) for name, v in plain.state_dict().items()})
    inputs = torch.linspace(-1, 1, 16 * 12 * 12).view(1, 16, 12, 12).requires_grad_()
    try:
        outputs = [convolution(inputs) for convolution in (plain, Packed(plain))]
        gradients = [torch.autograd.grad(output.square().sum(), inputs)[0] for output in outputs]
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(*outputs, 1e-4, 1e-4) and torch.allclose(*gradients, 1e-4, 1e-4)


def pack_convolutions(network: nn.Module) -> None:
    """Packs the convolutions of a network on the CPU. Small ones by groups gain nothing, those with hooks stay."""
    for name, module in list(network.named_modules()):
        plain = type(module) is nn.Conv2d and not (module._forward_hooks or module._forward_pre_hooks)
        if plain and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            network.set_submodule(name, Packed(module))


class Suffix:
    """What follows a layer, run on changed copies of the layer's output without running what comes before it again.

    Inside `with`, the layer returns the copies, and the outermost modules that finished before it started return what
    they returned for this input. Where the copies meet something that bypasses the layer, a residual addition
    broadcasts; where it does not (a concatenation), everything is expanded to as many copies.

    Args:
        network: changed inside `with` only.
        layer: its dotted name.
        inputs: (1, 3, H, W).

    Attributes:
        output: of the layer, unchanged, batch size 1.
        logits: unchanged, (1, classes).
    """

    def __init__(self, network: nn.Module, layer: str, inputs: Tensor) -> None:
        self._network, self._inputs = network, inputs
        self._layer = network.get_submodule(layer)
        self._expand = False
        finished: dict[str, Tensor] = {}
        times_called: Counter[str] = Counter()

        def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
            times_called[name] += 1
            if not started and isinstance(output, Tensor):
                for inner in [key for key in finished if key.startswith(f"{name}.")]:
                    del finished[inner]  # its parent's output is enough
                finished[name] = output.clone()

        started: list[bool] = []
        with contextlib.ExitStack() as hooks:
            for name, module in [*network.named_modules()][1:]:
                hooks.enter_context(module.register_forward_hook(partial(keep, name)))
            hooks.enter_context(self._layer.register_forward_pre_hook(lambda *_: started.append(True)))
            outputs = hooks.enter_context(tap(network, [layer]))
            self.logits = as_logits(network(inputs))
        self.output = outputs[layer]
        # A module that is called again later (ResNet's relu) cannot stand for one result.
        self._before = {network.get_submodule(k): v for k, v in finished.items() if times_called[k] == 1}
        self._runs = times_called[layer]

    def __enter__(self) -> Suffix:
        for module, output in self._before.items():
            module.forward = partial(self._recall, output)
        self._layer.forward = partial(self._replace, self._layer.forward)
        try:
            self._expand = not self._repeats(self.output)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for module in [*self._before, self._layer]:
            del module.forward

    def _repeats(self, output: Tensor) -> bool:
        """Whether two copies of the unchanged output give the unchanged logits twice, with one copy of all the rest."""
        try:
            logits = self(output.repeat(2, *[1] * (output.ndim - 1)))
        except RuntimeError:  # two of one thing and one of another do not go together
            return False
        return len(logits) == 2 and torch.allclose(logits, self.logits, 1e-3, 1e-3)

    def _replace(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._runs_left -= 1  # of a layer that runs more than once, the last run counts
        return forward(*args, **kwargs) if self._runs_left else self._copies

    def _recall(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._as_many(output).clone()  # what follows may change it in place

    def _as_many(self, tensor: Tensor) -> Tensor:
        return tensor.expand(len(self._copies), *tensor.shape[1:]) if self._expand else tensor

    def __call__(self, copies: Tensor) -> Tensor:
        """The logits (B, classes) for B outputs of the layer, which may be overwritten."""
        self._copies, self._runs_left = copies, self._runs
        return as_logits(self._network(self._as_many(self._inputs)))


@torch.inference_mode()
def ablation_weights(
    network: nn.Module, layer: str, inputs: Tensor, targets: Tensor, progress: Progress = iter
) -> Tensor:
    """Ablation-CAM (Desai and Ramaswamy, WACV 2020): how much of the score is lost when a channel is set to zero.

    For one input (1, 3, H, W) and the classes (K,); returns (K, C). A channel that is zero anyway loses nothing and is
    not run. The paper divides by the score: that scales the map, and turns it upside down where the score is negative.
    """
    suffix = Suffix(network, layer, inputs)
    axis = channel_axis(suffix.output, inputs.shape[2:])
    channels_first = suffix.output.movedim(axis, 1)
    score = suffix.logits[0, targets]
    ablated = score.repeat(channels_first.shape[1], 1)
    alive = channels_first[0].flatten(1).any(1).nonzero()[:, 0]
    copies = max(1, min(ABLATION_COPIES, ABLATION_BYTES // (suffix.output.numel() * 4)))
    with suffix:
        for channels in progress(alive.split(copies)):
            changed = channels_first.repeat(len(channels), *[1] * (channels_first.ndim - 1))
            changed[torch.arange(len(channels), device=channels.device), channels] = 0
            ablated[channels] = suffix(changed.movedim(1, axis))[:, targets]
    return (score - ablated).T


@torch.inference_mode()
def score_weights(
    answer: Callable[[Tensor], Tensor], activations: Tensor, inputs: Tensor, targets: Tensor, map_parts: Any
) -> Tensor:
    """Score-CAM (Wang et al., CVPR workshops 2020, arXiv:1910.01279): the softmax of the scores of masked inputs.

    Each channel of activations (C, h, w), enlarged to the input (1, 3, H, W) and stretched to [0, 1], masks it once.
    Returns (K, C) for the classes (K,). The mask of a constant channel is zero everywhere, so all of those share one
    pass. `answer` gives the logits for inputs, `map_parts` what a function gives for each part of a tensor.
    """
    flat = activations.flatten(1)
    varied = (flat.amax(1) > flat.amin(1)).nonzero()[:, 0]
    scores = answer(torch.zeros_like(inputs))[0, targets].repeat(len(flat), 1)

    @torch.inference_mode()
    def scores_of(channels: Tensor) -> tuple[Tensor, Tensor]:
        small = activations[channels][:, None]
        masks = nn.functional.interpolate(small, inputs.shape[2:], mode="bilinear", align_corners=True)
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        return channels, answer(inputs * ((masks - low) / (high - low + 1e-8)))[:, targets]

    for channels, found in map_parts(scores_of, varied):
        scores[channels] = found
    return scores.softmax(0).T


def map_by_grad_cam(
    method: str, network: nn.Module, layer: str, inputs: Tensor, target: int, eigen_smooth: bool
) -> Tensor:
    """The map (H, W) of a method that needs a pass of its own, for one input (1, 3, H, W), through grad-cam's class.

    FullGrad (Srinivas and Fleuret, NeurIPS 2019, arXiv:1905.00780) looks at every bias instead of a layer, Shapley-CAM
    (arXiv:2501.06261) needs second derivatives, Finer-CAM (CVPR 2025, arXiv:2501.11309) explains the class against the
    three most similar ones.

    Raises:
        CallError: the method cannot cope with the network or the layer.
    """
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, FinerWeightedTarget

    wanted = ClassifierOutputTarget(target)
    if method == "finercam":
        with torch.no_grad():
            logits = as_logits(network(inputs))[0]
        similar = (logits - logits[target]).abs().argsort(stable=True).tolist()
        wanted = FinerWeightedTarget(target, [index for index in similar if index != target][:3], alpha=1)
    kind = getattr(pytorch_grad_cam, BY_GRAD_CAM[method])
    if method == "fullgrad":
        cam = kind(network, [], None)
    else:
        cam = kind(network, [network.get_submodule(layer)], partial(as_map, size=inputs.shape[2:]))
    kept = getattr(cam, "base_cam", cam).activations_and_grads
    network.requires_grad_(method == "shapleycam")  # where weights are frozen, it cannot cope with a constant gradient
    try:
        # Behind grad-cam's hooks stands tap's, so that what follows cannot change the activations that grad-cam keeps.
        with tap(network, [layer]):
            found = cam(inputs.detach().clone().requires_grad_(), [wanted], eigen_smooth=eigen_smooth)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Shapley-CAM takes no tokens, Finer-CAM no single output, FullGrad no layer that is called twice.
        raise CallError(f"{method} does not work on layer '{layer}': {first_line(error)}") from error
    finally:
        network.requires_grad_(False)
        kept.activations, kept.gradients = [], []  # which its own release() fails to detach where they are views
        kept.release()
    return torch.from_numpy(np.float32(found[0])).to(inputs)


THREADS = os.cpu_count() or 1


def ahead(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    under_way: int,
    threads: int = THREADS,
    start: Callable[[], Any] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Any]:
    """What the function gives for each item, in order, computed in threads up to `under_way` items ahead.

    Each thread begins with `start`; `stop` is set at the end, for functions that take long.
    """
    pool = ThreadPoolExecutor(threads, initializer=start)
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= under_way:
                yield result_of(pending.popleft())
        while pending:
            yield result_of(pending.popleft())
    finally:
        if stop:
            stop.set()
        pool.shutdown(cancel_futures=True)


def result_of(future: Future[Any]) -> Any:
    """The future's result; on Windows, Ctrl-C ends only such waits as have a limit."""
    while not future.done():
        concurrent.futures.wait([future], timeout=0.2)
    return future.result()


def even_threads(most: int) -> int:
    """How many threads, four or `most` at the most, can share this thread's cores with none left over.

    Were their shares not equal, each would want other packed weights.
    """
    return max(threads for threads in range(1, 5) if threads <= max(1, most) and torch.get_num_threads() % threads == 0)


class _MatrixProducts:
    """torch's setting of how exact they are, as an attribute."""

    precision = property(
        lambda self: torch.get_float32_matmul_precision(), lambda self, name: torch.set_float32_matmul_precision(name)
    )


class ExactArithmetic:
    """Inside `with`: on a GPU no TF32, whose ten bits show in the maps, and the same answer from run to run.

    The settings are the process's: of several threads the first one makes them, and the last one puts back what was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                wanted = self._settings()
                self._before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
                self._put(wanted)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put(self._before)

    @staticmethod
    def _settings() -> list[tuple[Any, str, Any]]:
        cudnn, matmul = torch.backends.cudnn, _MatrixProducts()
        settings = [(cudnn, "enabled", True), (cudnn, "benchmark", False), (cudnn, "deterministic", True)]
        try:
            _ = cudnn.allow_tf32, matmul.precision
            return [*settings, (cudnn, "allow_tf32", False), (matmul, "precision", "highest")]
        except RuntimeError:  # so it is where somebody has used what replaces them since torch 2.9
            places = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
            return settings + [(place, "fp32_precision", "ieee") for place in places]

    @staticmethod
    def _put(settings: Sequence[tuple[Any, str, Any]]) -> None:
        for place, name, value in settings:
            if getattr(place, name) != value:
                setattr(place, name, value)


_exact = ExactArithmetic()


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast, and on a GPU `ExactArithmetic`."""
    with torch.autocast(device.type, enabled=False), _exact if device.type == "cuda" else contextlib.nullcontext():
        yield


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last where oneDNN computes; without it depthwise convolutions would take twice as long so.

    On a GPU it is for half precision and TF32, which are not used here.
    """
    on_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return torch.channels_last if on_cpu else torch.contiguous_format


def copy_modules(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of the modules, and of their tensors but for the shared ones."""
    # Tensors that hang on a graph cannot be copied: what a module keeps of its last run, an old weight_norm's weight.
    kept = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    detached = {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf}
    return copy.deepcopy(model, detached | {id(tensor): tensor for tensor in shared})


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; what a GPU has still to do is not waited for."""
    return tensor.to(device, non_blocking=device.type == "cuda")  # a copy to the CPU must be waited for


def device_of(network: nn.Module) -> torch.device:
    """Where the network is; one without any weights is on the CPU."""
    return next(
        (tensor.device for tensor in itertools.chain(network.parameters(), network.buffers())), torch.device("cpu")
    )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that needs no gradients for its weights, in float32, in eval mode and in the memory format that pays."""
    network = copy_modules(model).eval().requires_grad_(False).float()
    return network.to(memory_format=memory_format(device_of(network)))


class Explainer:
    """Explains the answers of any `nn.Module` classifier.

    The model itself is never touched: everything runs on a frozen float32 copy, with its batch norms folded into the
    convolutions, on the CPU in channels-last memory. After training on, make a new explainer. Several threads may use
    it at once; the weights are in memory only once.

    Args:
        model: takes (N, 3, H, W), gives logits (N, classes); or (N, 1) or (N,) for a single sigmoid output, of which
            the positive side is explained. `DataParallel` around it and half precision are fine.
        methods: names from METHODS and MORE_METHODS; all but a few share one pass.
        target_layers: dotted names of layers (or the modules) whose maps are averaged; None: found on the first call,
            the last layer that gives a spatial map on which the score depends.
        guided: whether guided backpropagation is wanted too.
        aug_smooth: average the maps over six variants of the input, mirrored and multiplied by 0.9 to 1.1 (ttach, as in
            grad-cam).
        eigen_smooth: take the first principal component of the contributions of the channels in place of their sum.
        batch_size: how many inputs Score-CAM and `answer` run at once; None: 2 in each thread on the CPU, on CUDA what
            half of its free memory takes, else 32. It is halved where that turns out to be too many.
        progress: wraps the passes of Score-CAM and Ablation-CAM, such as tqdm.

    Raises:
        CallError: no such method or layer.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[str] = ("gradcam",),
        target_layers: Sequence[str | nn.Module] | None = None,
        *,
        guided: bool = True,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
        batch_size: int | None = None,
        progress: Progress = iter,
    ) -> None:
        known = (*METHODS, *MORE_METHODS)
        for method in methods:
            if method not in known:
                raise CallError(f"unknown method '{method}'{closest(method, known)} (known: {', '.join(known)})")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        self.methods = tuple(methods)
        self.guided = guided
        self.aug_smooth = aug_smooth
        self.eigen_smooth = eigen_smooth
        self.batch_size = batch_size
        self.progress = progress
        self.target_layers = tuple(layer_name(model, layer) for layer in target_layers or ())
        with torch.inference_mode(False):
            self._common = frozen_copy(model)
        self.device = device_of(self._common)
        self._tuned, self._tuning = False, threading.Lock()
        self._by_grad_cam = threading.Lock()  # its classes change settings of the weights, which all threads share
        self._of_thread = threading.local()

    @property
    def _network(self) -> nn.Module:
        """The calling thread's own network, for hooks to be put on its modules, with the weights common to all."""
        if not hasattr(self._of_thread, "network"):
            with torch.inference_mode(False):
                weights = itertools.chain(self._common.parameters(), self._common.buffers())
                self._of_thread.network = copy_modules(self._common, shared=weights)
        return self._of_thread.network

    def __call__(
        self, inputs: Tensor, targets: Sequence[int] | Tensor | int | None = None, *, top: int | None = None
    ) -> Explanation:
        """Explains a batch.

        Args:
            inputs: (N, 3, H, W), normalised as the model expects it; converted to float32 on the model's device.
            targets: the class to explain: one for all, or (N,) for each input; or K classes, (1, K) or (N, K). None:
                the one with the highest logit.
            top: without targets: the K classes with the highest logits, or all if there are fewer.

        Raises:
            CallError: a target layer gives no spatial map, or the score does not depend on it; no such class; no batch.
            ValueError: the network's answer is not finite.
        """
        # Whatever mode the caller is in, this needs a graph, and leaves the caller's settings alone.
        with torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(self.device):
            if inputs.ndim != 4:
                raise CallError(f"inputs are a batch (N, 3, H, W), not {_shape(inputs)}; of one photo: inputs[None]")
            inputs = self._own(inputs)
            with self._tuning:
                if not self._tuned:
                    self._tune(inputs[:1])
            explanation = self._explain(inputs, targets, top, () if self.aug_smooth else self.methods, self.guided)
            if self.aug_smooth:
                targets = torch.from_numpy(explanation.targets).to(inputs.device)
                explanation = replace(explanation, cams=self._smoothed(inputs, targets))
            return explanation

    def answer(self, inputs: Tensor) -> Tensor:
        """The network's logits (N, classes) for inputs (N, 3, H, W), on its device."""
        return torch.cat([*self._each(self._logits, inputs, inputs)])

    def _logits(self, inputs: Tensor) -> Tensor:
        if self.batch_size and len(inputs) > self.batch_size:  # which has shrunk meanwhile
            return torch.cat([self._logits(part) for part in inputs.split(self.batch_size)])
        try:
            with torch.inference_mode(), exact_arithmetic(self.device):
                return as_logits(self._network(self._own(inputs)))
        except (RuntimeError, MemoryError) as error:
            if len(inputs) == 1 or not is_out_of_memory(error):
                raise
        note_once(SMALLER_BATCHES)  # here, where the error does not hold on to memory any more
        self.batch_size = (len(inputs) + 1) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # cuDNN and cuBLAS take memory that torch does not keep for itself
        return self._logits(inputs)

    def _each(
        self, function: Callable[[Tensor], Any], items: Tensor, inputs: Tensor, progress: Progress = iter
    ) -> Iterator[Any]:
        """What a function that asks the network about inputs like these gives for each part of the items, in order.

        On the CPU by up to four threads that share its cores: none then waits for the others after each layer.
        """
        if self.batch_size is None:
            if self.device.type == "cuda":
                self.batch_size = affordable_batch(self._network, self._own(inputs[:1]))
            else:
                self.batch_size = 2 if self.device.type == "cpu" else 32
        parts, cores = items.split(self.batch_size), torch.get_num_threads()
        threads = even_threads(len(parts)) if self.device.type == "cpu" else 1
        if threads == 1:
            yield from map(function, progress(parts))
            return
        left, share_cores = iter(progress(parts)), partial(torch.set_num_threads, cores // threads)
        try:
            # The first one here: what it packs for the others then lies in this thread's memory, which is used again.
            share_cores()
            yield function(next(left))
            yield from ahead(function, left, threads + 1, threads, share_cores)
        finally:
            torch.set_num_threads(cores)  # the last thread to be told its number tells it to all that are new

    def _own(self, inputs: Tensor) -> Tensor:
        """A copy of the inputs as the network wants them."""
        return inputs.detach().to(self.device, torch.float32).clone(memory_format=memory_format(self.device))

    def _tune(self, inputs: Tensor) -> None:
        """Watches one input pass: finds the target layer where none was named, folds the batch norms, packs weights."""
        calls, logits = watch(self._common, inputs)
        if not self.target_layers:
            self.target_layers = (find_target_layer(self._common, calls, logits, inputs.shape[2:]),)
        if "fullgrad" not in self.methods:  # which counts the biases of both, convolution and batch norm
            fold_batch_norms(self._common, calls, logits, keep=self.target_layers)
        # grad-cam's classes look into the convolutions and need them as they are
        if inputs.device.type == "cpu" and not BY_GRAD_CAM.keys() & set(self.methods) and can_pack():
            pack_convolutions(self._common)
        self._tuned, self._of_thread = True, threading.local()

    def _smoothed(self, inputs: Tensor, targets: Tensor) -> dict[str, Floats]:
        """The maps averaged over the variants of the inputs that grad-cam takes."""
        import ttach

        variants = ttach.Compose([ttach.HorizontalFlip(), ttach.Multiply(factors=[0.9, 1, 1.1])])
        sums = dict.fromkeys(self.methods, 0.0)
        for variant in variants:
            varied = self._own(variant.augment_image(inputs))
            cams = self._explain(varied, targets, None, self.methods, guided=False).cams
            for method, maps in cams.items():
                maps = variant.deaugment_mask(torch.from_numpy(maps).view(-1, 1, *maps.shape[-2:])).view(maps.shape)
                sums[method] = sums[method] + maps.numpy()
        return {method: maps / np.float32(len(variants)) for method, maps in sums.items()}

    def _explain(
        self, inputs: Tensor, targets: Any, top: int | None, methods: Sequence[str], guided: bool
    ) -> Explanation:
        with_gradients = any(RECIPES[method].gradients for method in methods if method in RECIPES)
        inputs.requires_grad_(guided)
        with tap(self._network, self.target_layers, with_gradients) as outputs:
            logits = as_logits(self._network(inputs))
        for layer in self.target_layers:
            if layer not in outputs:
                raise CallError(f"layer '{layer}' takes no part in the network's answer; choose another one")
        targets = choose_targets(logits, targets, top)
        classes = targets.view(len(inputs), -1)  # (N, K); K is 1 where the caller thinks of one class
        scores = [logits.gather(1, column[:, None]).sum() for column in classes.T]
        gradients = self._gradients(scores, outputs, inputs, guided) if with_gradients else {}
        guided_maps = torch.stack(guided_gradients(scores, inputs), 1) if guided else None
        # The first question whose answer is waited for: a GPU has got all of the work above by now.
        if not torch.isfinite(logits).all():
            raise ValueError("the network's answer is not a number (NaN or infinite); its weights are probably broken")
        inputs = inputs.detach()
        layers = {layer: self._as_map(layer, outputs[layer].detach(), inputs) for layer in self.target_layers}
        cams = {method: self._cam(method, layers, gradients, inputs, classes) for method in methods}
        shape = targets.shape
        return Explanation(
            {method: as_array(maps.view(*shape, *maps.shape[2:])) for method, maps in cams.items()},
            None if guided_maps is None else as_array(guided_maps.view(*shape, *guided_maps.shape[2:])),
            as_array(logits),
            as_array(targets),
        )

    def _gradients(
        self, scores: Sequence[Tensor], outputs: Mapping[str, Tensor], inputs: Tensor, keep_graph: bool
    ) -> dict[str, Tensor]:
        """For each layer the gradients of the K scores with respect to its output, (N, K, C, h, w)."""
        wanted = [outputs[layer] for layer in self.target_layers]
        of_scores = []
        for score in scores:
            keep = keep_graph or score is not scores[-1]
            of_scores.append(torch.autograd.grad(score, wanted, retain_graph=keep, allow_unused=True))
        gradients = {}
        for layer, of_layer in zip(self.target_layers, zip(*of_scores, strict=True), strict=True):
            if any(gradient is None for gradient in of_layer):
                raise CallError(f"the class score does not depend on layer '{layer}'; choose another one")
            gradients[layer] = torch.stack([self._as_map(layer, gradient, inputs) for gradient in of_layer], 1)
        return gradients

    def _as_map(self, layer: str, output: Tensor, inputs: Tensor) -> Tensor:
        spatial = as_map(output, inputs.shape[2:])
        if spatial is None:
            raise CallError(f"layer '{layer}' gives no spatial map but {_shape(output)} numbers; choose another one")
        return spatial

    def _cam(
        self,
        method: str,
        layers: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        inputs: Tensor,
        classes: Tensor,
    ) -> Tensor:
        """The maps (N, K, H, W) of one method, in [0, 1], over all layers."""
        if method in BY_GRAD_CAM:
            names = self.target_layers[: 1 if method == "fullgrad" else None]
            with self._by_grad_cam:
                each = [
                    map_by_grad_cam(method, self._network, name, photo, int(target), self.eigen_smooth)
                    for name in names
                    for photo, row in zip(inputs.split(1), classes, strict=True)
                    for target in row
                ]
            return normalise(torch.stack(each).view(len(names), *classes.shape, *inputs.shape[2:]).mean(0))
        maps = []
        for layer, activations in layers.items():
            small = self._map(method, layer, activations, gradients.get(layer), inputs, classes)
            maps.append(nn.functional.interpolate(normalise(small.clamp(min=0)), inputs.shape[2:], mode="bilinear"))
        if method in RECIPES and RECIPES[method].product:
            return normalise(torch.stack([normalise(of_layer) for of_layer in maps]).prod(0))
        return normalise(torch.stack(maps).mean(0))

    def _map(
        self, method: str, layer: str, activations: Tensor, gradients: Tensor | None, inputs: Tensor, classes: Tensor
    ) -> Tensor:
        """One method's map of one layer, (N, K, h, w), before it is clipped and stretched.

        `activations` are (N, C, h, w), `gradients` (N, K, C, h, w).
        """
        if method in BY_PASSES:
            one_by_one = zip(activations, inputs.split(1), classes, strict=True)
            weights = torch.stack([self._weights_by_passes(method, layer, *photo) for photo in one_by_one])
            contributions, join = weights[..., None, None] * activations[:, None], total
        else:
            recipe = RECIPES[method]
            contributions, join = recipe.weigh(activations[:, None], gradients), recipe.join
        if self.eigen_smooth and join is total and method != "fem":  # which grad-cam does not smooth either
            join = principal_component
        return join(contributions).expand(*classes.shape, *activations.shape[2:])

    def _weights_by_passes(
        self, method: str, layer: str, activations: Tensor, inputs: Tensor, classes: Tensor
    ) -> Tensor:
        """The channel weights (K, C) of the methods that ask the network again, for one input."""
        if method == "ablationcam":
            return ablation_weights(self._network, layer, inputs, classes, self.progress)
        map_parts = partial(self._each, inputs=inputs, progress=self.progress)
        return score_weights(self._logits, activations, inputs, classes, map_parts)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor as a NumPy array of its own, in the usual memory order."""
    return tensor.detach().cpu().contiguous().numpy()


@torch.inference_mode()
def affordable_batch(network: nn.Module, inputs: Tensor) -> int:
    """How many inputs (1, 3, H, W) at once take half of the GPU's free memory in a forward pass; at most 256."""
    before = torch.cuda.memory_allocated(inputs.device)
    torch.cuda.reset_peak_memory_stats(inputs.device)
    network(inputs)
    each = torch.cuda.max_memory_allocated(inputs.device) - before
    free, _ = torch.cuda.mem_get_info(inputs.device)
    free += torch.cuda.memory_reserved(inputs.device) - before  # what torch keeps for itself
    return max(1, min(256, free // (2 * max(each, 1))))


# ---------------------------------------------------------------------------------------------------------------------
# 5  Trust. The network is asked about changed inputs; its answers say how much of the evidence a map has found.
# ---------------------------------------------------------------------------------------------------------------------

METRICS = ("average_drop", "increase", "deletion", "insertion", "road")
CURVE_STEPS = 20  # of the deletion and insertion curves
ROAD_SHARES = (0.2, 0.4, 0.6, 0.8)  # of the pixels that stay


def measure_trust(explainer: Explainer, inputs: Tensor, cam: Floats, target: int) -> dict[str, float]:
    """What a map is worth, by how the probability p of the class changes with the input.

    - average_drop, in [0, 1], lower is better: the share of p that is lost when the input is multiplied by the map.
    - increase, 0 or 1, higher is better: whether p has grown by that. Their means over many photos are the "average
      drop" and "increase in confidence" of Chattopadhyay et al., WACV 2018, arXiv:1710.11063.
    - deletion, in [0, 1], lower is better: the mean p while the hottest pixels are set to zero (the mean colour) first.
    - insertion, in [0, 1], higher is better: the mean p while they come back first. Both are areas under a curve of 20
      steps (Petsiuk et al., RISE, BMVC 2018, arXiv:1806.07421).
    - road, in [-0.5, 0.5], higher is better: half of how much more p suffers when the hottest pixels are replaced by
      what their neighbours suggest than when the coldest are (Rong et al., ROAD, ICML 2022, arXiv:2202.00449; as
      grad-cam's ROADCombined, with 20, 40, 60 and 80 percent).

    Args:
        explainer: whose network is asked.
        inputs: one, (1, 3, H, W).
        cam: its map, (H, W) in [0, 1].
        target: the class, an index.
    """
    kept = [turned < np.quantile(turned, ROAD_SHARES)[:, None, None] for turned in (cam, 1 - cam)]
    arrays = (torch.from_numpy(array) for array in (cam, *kept))
    inputs, heat, *kept = (moved(tensor, explainer.device) for tensor in (inputs, *arrays))
    counts, masks = curve_masks(heat)
    masks, imputed = masks[:, None], [impute(inputs, of_map) for of_map in kept]
    asked = [inputs, inputs * heat, inputs * ~masks, inputs * masks, *imputed]
    chances = probabilities(explainer.answer(torch.cat(asked)))[:, target].cpu().double()
    before, masked, deletion, insertion, *road = chances.split([len(part) for part in asked])
    values = {
        "average_drop": (before - masked).clamp(min=0) / (before + 1e-7),
        "increase": masked > before,
        "deletion": torch.trapezoid(deletion, counts),
        "insertion": torch.trapezoid(insertion, counts),
        "road": (road[1] - road[0]).mean() / 2,
    }
    return {name: round(float(value), 6) for name, value in values.items()}


def probabilities(logits: Tensor) -> Tensor:
    """The probability of each class from logits (N, classes): softmax, or sigmoid where there is one output only."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def curve_masks(heat: Tensor) -> tuple[Tensor, Tensor]:
    """The points of the deletion and insertion curves: shares of the pixels in [0, 1], and which pixels those are.

    For a map (H, W): float64 (S,) on the CPU, bool (S, H, W); the hottest pixels come first.
    """
    pixels = heat.numel()
    counts = [*range(0, pixels, -(-pixels // CURVE_STEPS)), pixels]
    ranks = heat.flatten().argsort(descending=True, stable=True).argsort().view(heat.shape)
    points = torch.tensor(counts)
    return points.double() / pixels, ranks < moved(points, heat.device)[:, None, None]


class _Neighbours:
    """The equations of ROAD's imputation on one grid, and a multigrid cycle that nearly solves them.

    Every missing pixel is the mean of its eight neighbours, those beside it counting double. `missing` is (B, 1, H, W),
    1 where a pixel is missing and 0 elsewhere. A coarser grid takes the finer one's kernel.
    """

    def __init__(self, missing: Tensor, kernel: Tensor | None = None) -> None:
        if kernel is None:
            taps = moved(torch.tensor([0.25, 0.75, 0.75, 0.25]), missing.device)
            kernel = torch.outer(taps, taps)[None, None]
        self.kernel = kernel
        self.missing = missing
        self.weights = self.sum(torch.ones_like(missing[:1]))
        self.step = 0.8 * missing / self.weights  # of a damped Jacobi iteration
        self.coarser = None
        if min(missing.shape[2:]) > 4:
            whole = nn.functional.avg_pool2d(missing, 2, ceil_mode=True) > 0.99
            self.coarser = _Neighbours(whole.to(missing), kernel)

    @staticmethod
    def sum(values: Tensor) -> Tensor:
        """The weighted sum of each pixel's neighbours, their weights 1/6 and 1/12."""
        rows = values * 2
        rows[..., 1:] += values[..., :-1]
        rows[..., :-1] += values[..., 1:]
        square = rows * 2
        square[..., 1:, :] += rows[..., :-1, :]
        square[..., :-1, :] += rows[..., 1:, :]
        return square.sub_(values, alpha=4).div_(12)

    def restrict(self, values: Tensor) -> Tensor:
        """To half the height and width, by the transpose of bilinear enlargement, so that the cycle is symmetric."""
        height, width = values.shape[2:]
        single = nn.functional.pad(values.flatten(0, 1)[:, None], (1, 1 + width % 2, 1, 1 + height % 2))
        smaller = nn.functional.conv2d(single, self.kernel, stride=2)
        return smaller.view(*values.shape[:2], *smaller.shape[2:])

    def apply(self, values: Tensor) -> Tensor:
        """How far the missing pixels are from the mean of their neighbours."""
        return (self.weights * values).sub_(self.sum(values)).mul_(self.missing)

    def cycle(self, right_side: Tensor) -> Tensor:
        """Values for which `apply` gives about `right_side`."""
        values = right_side * self.step
        if self.coarser is not None:
            residual = self.restrict(right_side - self.apply(values))
            coarse = self.coarser.cycle(residual * self.coarser.missing)
            finer = nn.functional.interpolate(coarse, scale_factor=2.0, mode="bilinear")
            values = torch.addcmul(values, finer[..., : right_side.shape[2], : right_side.shape[3]], self.missing)
        for _ in range(1 if self.coarser else 5):
            values = torch.addcmul(values, right_side - self.apply(values), self.step)
        return values


def impute(inputs: Tensor, kept: Tensor, steps: int = 6) -> Tensor:
    """One input (1, 3, H, W) with the pixels that are not in `kept` (B, H, W) filled from those around: (B, 3, H, W).

    ROAD's noisy linear imputation (arXiv:2202.00449, section 4), by conjugate gradients with multigrid: for half a
    photo missing, 6 steps leave a mean error below 0.001 where the method itself adds noise of 0.01.
    """
    missing = (~kept)[:, None].to(inputs)
    grid = _Neighbours(missing)
    known = (inputs * (1 - missing)).contiguous()

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    values = torch.zeros_like(known)
    residual = grid.sum(known) * missing
    preconditioned = direction = grid.cycle(residual)
    rho = dot(residual, preconditioned)
    for _ in range(steps):
        along = grid.apply(direction)
        step = rho / (dot(direction, along) + 1e-20)
        values, residual = torch.addcmul(values, step, direction), torch.addcmul(residual, step, along, value=-1)
        preconditioned = grid.cycle(residual)
        rho, before = dot(residual, preconditioned), rho
        direction = torch.addcmul(preconditioned, rho / (before + 1e-20), direction)
    return known + values + 0.01 * _noise(known.shape, known.device) * missing


@functools.lru_cache(maxsize=4)
def _noise(shape: torch.Size, device: torch.device) -> Tensor:
    """The same for every photo, on every device."""
    return moved(torch.randn(shape, generator=torch.Generator().manual_seed(0)), device)


# ---------------------------------------------------------------------------------------------------------------------
# 6  Pictures. What was found becomes files, each of them whole or not there.
# ---------------------------------------------------------------------------------------------------------------------

Picture = NDArray[np.uint8]  # RGB, (h, w, 3)
FileKey = tuple[str, str, str]  # one of OUTPUTS, method, label of the class; see Wanted.files

DEFAULT_LONG_SIDE = 1024  # pixels
CELL = 320  # pixels: long side of a picture on a sheet; less where the sheet would be taller than TALLEST
TALLEST = 16_000  # pixels, which is about as much as WebP takes
MOST_ROWS = 200  # of a sheet
TEXT = 24  # height of the writing on a sheet, in pixels


@dataclass(frozen=True)
class Look:
    """How pictures are drawn and written; see the options of these names."""

    colormap: str = "jet"
    alpha: float = 0.5
    format: str = "jpg"
    quality: int = 98  # a difference in the last bit of a float then shows as two levels at most


def resized(picture: Picture, long_side: int) -> Picture:
    """The picture enlarged or shrunk to that long side."""
    scale = long_side / max(picture.shape[:2])
    size = tuple(max(1, round(length * scale)) for length in picture.shape[1::-1])
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def seen_picture(photo: Photo, box: tuple[float, float, float, float], long_side: int | None = None) -> Picture:
    """The part of the photo that the network saw, at the photo's own resolution but at most 1024 pixels long.

    Args:
        photo: the whole of it.
        box: left, top, right, bottom in the photo's pixels.
        long_side: another length for the long side; a small photo is enlarged to it.
    """
    left, top = min(round(box[0]), photo.pixels.shape[1] - 1), min(round(box[1]), photo.pixels.shape[0] - 1)
    width, height = max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1]))
    part = photo.pixels[top : top + height, left : left + width]
    return resized(part, long_side or min(max(part.shape[:2]), DEFAULT_LONG_SIDE))


def draw_cam(picture: Picture, cam: Floats, look: Look) -> Picture:
    """The map (H, W) in [0, 1] as colours laid over the picture; with jet, blue is 0 and red is 1."""
    # Far more colours than 256, since between them nothing is interpolated: no steps are seen, nor does a last bit
    # become one.
    colours = _colours(look.colormap)
    places = cv2.resize(cam * np.float32(colours.shape[1] - 1), picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = cv2.remap(colours, places, np.zeros_like(places), cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    return cv2.addWeighted(picture, 1 - look.alpha, heat, look.alpha, 0, dtype=cv2.CV_8U)


@functools.cache
def _colours(colormap: str) -> Floats:
    """One of OpenCV's colormaps as RGB, float32 (1, 4081, 3): sixteen steps from each of its colours to the next."""
    number = getattr(cv2, f"COLORMAP_{colormap.upper()}")
    colours = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], number)
    rgb = cv2.cvtColor(colours, cv2.COLOR_BGR2RGB).astype(np.float32)
    steps = np.arange(255 * 16 + 1, dtype=np.float32)[None] / 16
    return cv2.remap(rgb, steps, np.zeros_like(steps), cv2.INTER_LINEAR)


def draw_gradients(gradients: Floats, width: int, height: int) -> Picture:
    """Gradients (3, H, W) as a picture: grey is zero; a brighter pixel would raise the score, a darker one lower it.

    The scale is set by the 99.5th percentile, so that a few extreme pixels do not turn all others grey.
    """
    strongest = float(np.percentile(np.abs(gradients), 99.5)) or float(np.abs(gradients).max()) or 1.0
    enlarged = cv2.resize(gradients.transpose(1, 2, 0), (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.addWeighted(enlarged, 127.5 / strongest, enlarged, 0, 127.5, dtype=cv2.CV_8U)


def draw(output: str, picture: Picture, cam: Floats, guided: Floats | None, look: Look) -> Picture:
    """One of OUTPUTS, as large as `picture`."""
    if output == "cam":
        return draw_cam(picture, cam, look)
    height, width = picture.shape[:2]
    return draw_gradients(guided if output == "gb" else guided * cam, width, height)


def draw_sheet(picture: Picture, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[Picture]]]) -> Picture:
    """A table as one picture: under each caption the source and the pictures of the row."""
    if len(rows) > MOST_ROWS:
        note_once(f"a sheet has room for {MOST_ROWS} rows; {len(rows) - MOST_ROWS} are left out")
        rows = rows[:MOST_ROWS]
    gap, line = 8, TEXT + 16
    side = min(CELL, (TALLEST - line - gap) // len(rows) - line)
    small = resized(picture, side)
    height, width = small.shape[:2]
    columns, across = len(headings) + 1, width + gap
    sheet = Image.new("RGB", (columns * across + gap, line + len(rows) * (line + height) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(["source", *headings]):
        write_text(pen, gap + column * across, 8, heading, width, "gray")
    for number, (caption, pictures) in enumerate(rows):
        top = line + number * (line + height)
        write_text(pen, gap, top + 8, caption, columns * across - gap, "black")
        for column, cell in enumerate([small, *(resized(each, side) for each in pictures)]):
            sheet.paste(Image.fromarray(cell), (gap + column * across, top + line))
    return np.asarray(sheet)


def write_text(pen: ImageDraw.ImageDraw, left: int, top: int, text: str, width: int, colour: str) -> None:
    """Writes one line, cut off where it is wider than `width`. Characters that no font has become question marks."""
    font = find_font("".join(sorted({c for c in text if not c.isascii()})))
    text = "".join(c if has_glyphs(font, c) else "?" for c in text)
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    pen.text((left, top), text, colour, font)


@functools.cache
def find_font(characters: str) -> Any:
    """Pillow's own font where that has all the characters, else an installed one; told if there is none."""
    own = load_font("")
    if has_glyphs(own, characters):
        return own
    for path in installed_fonts():
        with contextlib.suppress(OSError, ValueError):
            if has_glyphs(load_font(path), f"A0{characters}"):
                return load_font(path)
    missing = "".join(c for c in characters if not has_glyphs(own, c))
    note(f"no installed font has {missing}; they are question marks on the sheet (Noto Sans CJK has Chinese, for one)")
    return own


@functools.cache
def load_font(path: str) -> Any:
    """A font at the size of TEXT; Pillow's own one, which has the ASCII letters, if no path is given."""
    return ImageFont.truetype(path, TEXT) if path else ImageFont.load_default(TEXT)


@functools.cache
def installed_fonts() -> tuple[str, ...]:
    """The system's font files: first those made for many scripts, then sans serif ones, the plain before the bold."""
    home = os.path.expanduser("~")
    folders = [
        *("/usr/share/fonts", "/usr/local/share/fonts", f"{home}/.fonts", f"{home}/.local/share/fonts"),
        *("/System/Library/Fonts", "/Library/Fonts", f"{home}/Library/Fonts"),
        *(os.path.expandvars(r"%WINDIR%\Fonts"), os.path.expandvars(r"%LOCALAPPDATA%\Microsoft\Windows\Fonts")),
    ]
    files = [os.path.join(at, name) for folder in folders for at, _, names in os.walk(folder) for name in names]
    many = re.compile(r"cjk|unicode|wqy|msyh|yahei|pingfang|heiti|simhei|simsun|malgun|gothic|noto", re.IGNORECASE)
    fonts = [file for file in files if file.lower().endswith((".ttf", ".ttc", ".otf"))]
    name = os.path.basename
    return tuple(
        sorted(fonts, key=lambda file: (not many.search(name(file)), "Sans" not in name(file), len(file), file))
    )


def has_glyphs(font: Any, characters: str) -> bool:
    """Whether a font has all the characters: those that it lacks all look alike."""

    def glyph(character: str) -> tuple[Any, bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    missing = glyph("\U0010fffe")
    return all(character.isspace() or glyph(character) != missing for character in characters)


@dataclass(frozen=True)
class Wanted:
    """Which files are written for each photo.

    Attributes:
        methods, outputs: what is drawn.
        format: of the pictures: jpg, png or webp.
        sheet, arrays: whether these are written as well.
    """

    methods: Sequence[str]
    outputs: Sequence[str]
    format: str = "jpg"
    sheet: bool = False
    arrays: bool = False

    def files(self, place: str, labels: Sequence[str] = ("",)) -> dict[FileKey, Path]:
        """The file for each output, method ("" for gb, which has none) and class label.

        `place` is the photo's output folder and its stem, such as out/cats/33. The labels are "" where only one class
        is explained, else they stand in the names. The sheet is ("sheet", "", ""), the arrays ("arrays", "", "").
        """
        folder, stem = os.path.split(place)
        names = {}
        for label in labels:
            named = f"{stem}_{label}" if label else stem
            for output in self.outputs:
                for method in [""] if output == "gb" else self.methods:
                    names[output, method, label] = "_".join(filter(None, (method, output, named)))
        if self.sheet:
            names["sheet", "", ""] = f"{stem}_sheet"
        files = {key: Path(folder, f"{name}.{self.format}") for key, name in names.items()}
        return files | ({("arrays", "", ""): Path(folder, f"{stem}.npz")} if self.arrays else {})


def file_labels(class_names: Sequence[str]) -> list[str]:
    """What stands for each class in file names: its name, or where that is not enough its index and its name.

    There is no underscore in a label, so that no two photos' names with labels behind them can be equal.
    """
    labels = [re.sub(r"[^\w.+]+|_", "-", name).strip("-.")[:40] for name in class_names]
    if all(labels) and len({label.casefold() for label in labels}) == len(labels):
        return labels
    return [f"{index}-{label}".rstrip("-") for index, label in enumerate(labels)]


def find_places(photos: Sequence[tuple[str, str]], output: Path, wanted: Wanted) -> Iterator[tuple[str, str]]:
    """Each photo with the place of its pictures: its own stem, or stem_2, stem_3 ... where that is taken.

    No picture goes over one of the photos, over the picture of another photo, or over any file that this program did
    not write. `photos` are paths with their folders below `output`.
    """
    taken = {_file_key(path) for path, _ in photos}
    numbers: Counter[int] = Counter()  # how many were tried for a name, so that a thousand equal ones take no million
    for path, folder in photos:
        own = os.path.normpath(os.path.join(output, folder, Path(path).stem))
        for number in itertools.count(numbers[_file_key(own)] + 1):
            place = own if number == 1 else f"{own}_{number}"
            files = wanted.files(place).values()
            keys = {_file_key(file) for file in files}
            if taken.isdisjoint(keys) and all(may_write(file, path) for file in files):
                break
        numbers[_file_key(own)] = number
        taken |= keys
        yield path, place


def _file_key(path: str | Path) -> int:
    """Equal for names of one file, also where case or the writing of accents does not count (Windows, macOS).

    A hash, since there may be millions.
    """
    return hash(unicodedata.normalize("NFC", os.path.abspath(path)).casefold())


def write_file(path: Path, content: bytes) -> None:
    """Writes beside the file's place and moves it there, so that nobody ever finds half of it. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        for pause in (0.1, 0.5, 0):
            try:
                part.replace(path)
                break
            except PermissionError:  # on Windows, while a virus scanner or a viewer has the old one open
                if not pause:
                    raise
                time.sleep(pause)
    finally:
        part.unlink(missing_ok=True)


def write_result(path: Path, content: bytes, photo: str) -> None:
    """The same for a file that bears the photo's mark, unless another one is in its place. Raises OSError."""
    if not may_write(path, photo):
        raise FileExistsError(errno.EEXIST, f"{path} is in the way: it was not made from this photo")
    write_file(path, content)


def write_picture(path: Path, picture: Picture, look: Look, photo: str) -> None:
    """Writes a picture, marked as ours. Raises OSError: the folder is gone, the disk is full ..."""
    write_result(path, encode(picture, look, mark_of(path, photo)), photo)


def encode(picture: Picture, look: Look, mark: str) -> bytes:
    """The content of a picture file, with the mark as the program's name in its EXIF data."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = mark
    if look.format == "jpg":
        # By OpenCV, because the other threads, and so the network, have to wait while Pillow encodes a JPEG.
        bgr, quality = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, look.quality]
        jpeg, segment = cv2.imencode(".jpg", bgr, quality)[1].tobytes(), exif.tobytes()
        return b"".join((jpeg[:20], b"\xff\xe1", (len(segment) + 2).to_bytes(2, "big"), segment, jpeg[20:]))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, look.format, quality=look.quality, exif=exif)
    return buffer.getvalue()


def write_arrays(path: Path, arrays: Mapping[str, Any], photo: str) -> None:
    """Writes arrays as a compressed .npz, marked as ours by the name of the first one. Raises OSError."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{mark_of(path, photo): np.array("load with numpy.load"), **arrays})
    write_result(path, buffer.getvalue(), photo)


# ---------------------------------------------------------------------------------------------------------------------
# 7  Run. Threads read ahead, the network explains batches, threads draw and write; a photo that fails stops nothing.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is done with every photo.

    Attributes:
        classifier, explainer: the network.
        targets: (1, K), the classes to explain; None: the likeliest one, or the `top` likeliest.
        wanted, look: which files are written, and how they look.
        output_size: long side of the pictures, or None.
        metrics: whether each map is measured.
        labels: of the classes, for file names; where one class is explained, None.
        stop: set when nothing more is wanted: what takes long ends itself.
    """

    classifier: Classifier
    explainer: Explainer
    targets: Tensor | None
    top: int
    wanted: Wanted
    look: Look
    output_size: int | None
    metrics: bool
    labels: Sequence[str] | None
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Prepared:
    """A photo on its way through.

    Attributes:
        path, place: where it comes from, and the beginning of its files' names.
        stamp: of its file, before it was read.
        width, height, box: its size, and the part of it that the network sees, in its own pixels.
        picture, inputs: that part to draw on, and as the network gets it, (3, H, W).
    """

    path: str
    place: str
    stamp: tuple[int, int]
    width: int
    height: int
    box: tuple[float, float, float, float]
    picture: Picture
    inputs: Tensor


@dataclass(frozen=True)
class Explained:
    """A photo, its explanation (1, K, ...), and what its maps are worth: one dict for each class and method."""

    photo: Prepared
    explanation: Explanation
    trust: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Failed:
    """A photo that could not be explained, and why, in one line."""

    path: str
    error: str


@dataclass(frozen=True)
class Share:
    """Which part of the photos this process takes: every `world`-th from `rank` on. Alone it takes all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Share:
        """The share of a process that torchrun started."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))


def prepare(photo: tuple[str, str], job: Job) -> Prepared | Failed:
    """Reads a photo and keeps only what is needed further on, so that large photos do not pile up in memory."""
    path, place = photo
    try:
        stamp = stamp_of(path)
        with open_photo(Path(path)) as decoded:
            height, width = decoded.pixels.shape[:2]
            box = job.classifier.seen_box(height, width)
            picture = seen_picture(decoded, box, job.output_size)
            return Prepared(path, place, stamp, width, height, box, picture, job.classifier.preprocess(decoded))
    except PhotoError as error:
        return Failed(path, str(error))


@dataclass
class Capacity:
    """How many photos go through the network at once; it shrinks where the memory does not suffice."""

    photos: int


def explain_photos(
    photos: Iterable[Prepared | Failed], job: Job, batch_size: int, workers: int = 1
) -> Iterator[Explained | Failed]:
    """Each photo with its explanation, or what went wrong, in order.

    Several workers share the batch and the cores: each photo then takes longer, but no core waits for the others.
    """
    capacity = Capacity(max(1, batch_size // workers))
    batches, explain = fill_batches(photos, capacity), partial(explain_batch, job=job, capacity=capacity)
    share_cores = partial(torch.set_num_threads, max(1, torch.get_num_threads() // workers))
    for outcomes in ahead(explain, batches, workers + 1, workers, share_cores, job.stop):
        yield from outcomes


def fill_batches(photos: Iterable[Prepared | Failed], capacity: Capacity) -> Iterator[list[Prepared | Failed]]:
    """Batches of photos; broken ones go along and do not count, but 100 of them are not waited with."""
    batch: list[Prepared | Failed] = []
    for photo in photos:
        batch.append(photo)
        broken = sum(isinstance(each, Failed) for each in batch)
        if len(batch) - broken >= capacity.photos or broken >= 100:
            yield batch
            batch = []
    if batch:
        yield batch


def explain_batch(batch: Sequence[Prepared | Failed], job: Job, capacity: Capacity) -> list[Explained | Failed]:
    """Explains a batch, in smaller ones where the memory does not suffice."""
    if any(isinstance(photo, Failed) for photo in batch):
        explained = iter(explain_batch([photo for photo in batch if isinstance(photo, Prepared)], job, capacity))
        return [photo if isinstance(photo, Failed) else next(explained) for photo in batch]
    outcomes: list[Explained | Failed] = []
    while len(outcomes) < len(batch):
        now = batch[len(outcomes) :][: capacity.photos]
        try:
            explanation = job.explainer(torch.stack([photo.inputs for photo in now]), job.targets, top=job.top)
            singles = [explanation.only(index) for index in range(len(now))]
            outcomes += [Explained(*pair, trust_in(*pair, job)) for pair in zip(now, singles, strict=True)]
            continue
        except CallError:
            raise
        except (RuntimeError, ValueError, MemoryError) as error:  # too small an input for the network, full memory ...
            message, too_much = first_line(error), is_out_of_memory(error)
            if re.search("(CUDA|HIP) error", str(error)) and not too_much:  # the GPU answers this process no more
                raise CallError(f"the GPU has failed: {message}; go on with --skip-existing") from error
        # From here on the error does not hold on to the batch's memory any more.
        if len(now) > 1 and too_much:
            note_once(SMALLER_BATCHES)
            capacity.photos = min(capacity.photos, len(now) // 2)
        elif len(now) > 1:  # it may be one of them only
            outcomes += [outcome for photo in now for outcome in explain_batch([photo], job, capacity)]
        else:
            size = " x ".join(map(str, now[0].inputs.shape[1:]))
            outcomes.append(Failed(now[0].path, f"{now[0].path}: the network failed at {size}: {message}"))
    return outcomes


def trust_in(photo: Prepared, explanation: Explanation, job: Job) -> list[dict[str, Any]]:
    """What each map of a photo is worth, class by class and method by method, if that is asked for."""
    if not job.metrics:
        return []
    maps = [
        (index, int(target), method)
        for index, target in enumerate(explanation.targets[0])
        for method in job.wanted.methods
    ]
    return [
        {
            "class": job.classifier.class_names[target],
            "method": method,
            **measure_trust(job.explainer, photo.inputs[None], explanation.cams[method][0, index], target),
        }
        for index, target, method in until(job.stop, maps)
    ]


def until(stop: threading.Event, steps: Iterable[Any]) -> Iterator[Any]:
    """The steps, until the run is stopped; then KeyboardInterrupt."""
    for step in steps:
        if stop.is_set():
            raise KeyboardInterrupt
        yield step


def stamp_of(path: str | Path) -> tuple[int, int]:
    """Size and time of a file, by which a changed one is known; zeros where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


class Options:
    """The options that decide what is in the files, so that a resumed run knows which photos it need not do again.

    The methods are among them only where all share a file. Else they are in the files' names, and in the record's key.
    """

    ELSE = ("images", "photos", "one_by_one", "ckpt", "methods", "device", "batch_size", "output", "skip_existing")

    def __init__(self, args: argparse.Namespace) -> None:
        ignored = {*self.ELSE} - ({"methods"} if args.sheet or args.save_arrays else set())
        options = [(name, str(value)) for name, value in sorted(vars(args).items()) if name not in ignored]
        ckpt, own_network = os.path.realpath(args.ckpt or ""), (args.arch or "").rpartition(":")[0]
        self._text = repr((options, ckpt, stamp_of(ckpt), stamp_of(own_network)))  # trained on since then?

    def digest(self, place: str, stamp: tuple[int, int]) -> str:
        """A short name for the options, the place of a photo's files and the stamp of the photo."""
        return hashlib.sha256(f"{self._text} {place} {stamp}".encode("utf-8", "backslashreplace")).hexdigest()[:16]


Key = tuple[str, str]  # image, methods


class Results:
    """`results.jsonl` in the output folder: one JSON object a line for each photo and choice of methods.

    Under torchrun each process writes its own `results.RANK.jsonl`. A line that a kill cut off is dropped at the next
    start, and so are the lines of photos that are done again.
    """

    def __init__(self, folder: Path, share: Share) -> None:
        names = [f"results.{rank}.jsonl" for rank in range(share.world)] if share.world > 1 else ["results.jsonl"]
        self._of_rank = [folder / name for name in names]
        self._own = self._of_rank[share.rank]
        ours = (path for path in folder.glob("results*.jsonl") if re.fullmatch(r"results(\.\d+)?\.jsonl", path.name))
        self._all = sorted({*self._of_rank, *ours})
        # Files that an earlier run with other processes has left belong to the first process of this one.
        left = [path for path in self._all if path not in self._of_rank and share.rank == 0]
        self._writable = [self._own, *left]
        self._lock = threading.Lock()

    def finished(self) -> dict[Key, dict[Path, int]]:
        """The photos that an earlier run has finished: in which results files, and the hash of how it ran.

        All their files are there, and no run with other options has written over one of them (the picture of guided
        backpropagation has the same name for all methods).
        """
        last: dict[int, int] = {}  # how each file was written at last
        for path in self._all:
            of_path = {_file_key(file): options for record, options in finished_lines(path) for file in record["files"]}
            # Of two results files nobody knows which run was later.
            last |= {file: options if last.get(file, options) == options else 0 for file, options in of_path.items()}
        found: dict[Key, dict[Path, int]] = {}
        for path in self._all:
            for record, options in finished_lines(path):
                files = record["files"]  # of which another process may just have written one
                if all(last.get(_file_key(file)) == options and os.path.isfile(file) for file in files):
                    found.setdefault((record["image"], record["method"]), {})[path] = options
        return found

    def file_of(self, rank: int) -> Path:
        """The results file of a process."""
        return self._of_rank[rank]

    def forget(self, again: set[Key], elsewhere: Mapping[Key, Path]) -> None:
        """Drops the lines of photos that are done again, and those that stand in another file too. Raises OSError."""
        for path in filter(Path.exists, self._writable):
            keys = {line: (record["image"], record["method"]) for line, record in whole_lines(path)}
            dropped = {line for line, key in keys.items() if key in again or elsewhere.get(key, path) != path}
            with path.open("rb") as file:  # another program's lines stay, half a line of ours does not
                kept = [line for line in file if line not in dropped and (line in keys or not line.startswith(b'{"im'))]
            if kept and not kept[-1].endswith(b"\n"):
                kept.append(b"\n")
            write_file(path, b"".join(kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, all of it or none. Raises OSError."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self._lock, self._own.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a results file that are whole, raw and parsed."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                key = (record.get("image"), record.get("method")) if isinstance(record, dict) else (None, None)
                if line.endswith(b"\n") and all(isinstance(part, str) for part in key):
                    yield line, record


def finished_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of photos that were explained, each with the hash of the options."""
    for _, record in whole_lines(path):
        files, options = record.get("files"), record.get("options")
        if isinstance(options, str) and isinstance(files, list) and all(isinstance(file, str) for file in files):
            yield record, hash(options)


def describe(done: Explained, job: Job, files: Iterable[Path]) -> dict[str, Any]:
    """The record of a photo that was explained, as it stands in results.jsonl."""
    photo, explanation = done.photo, done.explanation
    chances = probabilities(torch.from_numpy(explanation.logits))[0].tolist()

    def named(index: int) -> dict[str, Any]:
        return {"index": index, "name": job.classifier.class_names[index], "probability": round(chances[index], 6)}

    classes = [named(index) for index in explanation.targets[0].tolist()]
    likeliest = sorted(range(len(chances)), key=lambda index: -chances[index])
    return {
        "image": photo.path,
        "width": photo.width,
        "height": photo.height,
        "class": classes[0],
        **({"classes": classes} if job.labels else {}),
        "top5": [named(index) for index in likeliest[:5]],
        "method": ",".join(job.wanted.methods),
        "target_layer": ",".join(job.explainer.target_layers),
        **({"metrics": done.trust} if done.trust else {}),
        "files": [str(file) for file in files],
    }


def as_line(record: Mapping[str, Any]) -> str:
    """What is printed for a photo: its classes, what the maps are worth, and the files."""
    classes = record.get("classes", [record["class"]])
    parts = [", ".join(f"{each['name']} {each['probability']:.3f}" for each in classes)]
    for found in record.get("metrics", ()):
        of = f" for {found['class']}" if len(classes) > 1 else ""
        parts.append(f"{found['method']}{of}: " + ", ".join(f"{name} {found[name]:.3g}" for name in METRICS))
    return f"{record['image']}: {'; '.join(parts)} -> {', '.join(record['files'])}"


def draw_all(done: Explained, job: Job, labels: Sequence[str]) -> Iterator[tuple[FileKey, Picture]]:
    """The pictures of a photo, one by one, with their keys in `Wanted.files`."""
    photo, explanation, drawn = done.photo, done.explanation, set()
    for index, label in enumerate(labels):
        guided = None if explanation.guided is None else explanation.guided[0, index]
        for method, cams in explanation.cams.items():
            for output in job.wanted.outputs:
                key = (output, "" if output == "gb" else method, label)
                if key not in drawn:
                    drawn.add(key)
                    yield key, draw(output, photo.picture, cams[0, index], guided, job.look)


def save_files(
    done: Explained, job: Job, record: Mapping[str, Any], labels: Sequence[str], files: Mapping[FileKey, Path]
) -> None:
    """Writes what is wanted of a photo. Raises OSError."""
    on_sheet = {}
    for key, picture in draw_all(done, job, labels):
        write_picture(files[key], picture, job.look, done.photo.path)
        if job.wanted.sheet:
            on_sheet[key] = resized(picture, CELL)
    if job.wanted.sheet:
        classes = record.get("classes", [record["class"]])
        rows = [
            (
                f"{method}   {each['name']} {each['probability']:.3f}",
                [on_sheet[output, "" if output == "gb" else method, label] for output in job.wanted.outputs],
            )
            for each, label in zip(classes, labels, strict=True)
            for method in job.wanted.methods
        ]
        sheet = draw_sheet(done.photo.picture, job.wanted.outputs, rows)
        write_picture(files["sheet", "", ""], sheet, job.look, done.photo.path)
    if job.wanted.arrays:
        write_arrays(files["arrays", "", ""], as_arrays(done, job), done.photo.path)


def as_arrays(done: Explained, job: Job) -> dict[str, Any]:
    """What --save-arrays writes: M methods, K classes that were explained, inputs of H x W.

    methods (M,); classes int64 (K,); cams float32 (M, K, H, W) in [0, 1]; guided float32 (K, 3, H, W), if asked for;
    logits float32 and class_names for all classes; target_layers; box float64 (4,): left, top, right and bottom of what
    the network saw, in the photo's pixels.
    """
    explanation = done.explanation
    arrays = {
        "methods": np.array(job.wanted.methods),
        "classes": explanation.targets[0],
        "cams": np.stack([explanation.cams[method][0] for method in job.wanted.methods]),
        "logits": explanation.logits[0],
        "class_names": np.array(job.classifier.class_names),
        "target_layers": np.array(job.explainer.target_layers),
        "box": np.array(done.photo.box),
    }
    return arrays if explanation.guided is None else {**arrays, "guided": explanation.guided[0]}


def free_files(photo: Prepared, wanted: Wanted, labels: Sequence[str]) -> dict[FileKey, Path]:
    """The photo's files; numbered where the classes, only known now, make names that another photo has taken."""
    for number in itertools.count(1):
        files = wanted.files(photo.place if number == 1 else f"{photo.place}_{number}", labels)
        if all(may_write(file, photo.path) for file in files.values()):
            return files


def save(outcome: Explained | Failed, job: Job, options: Options, results: Results) -> Failed | str:
    """Writes the files and the record of one photo. Returns the line to print for it, or what went wrong."""
    path = outcome.path if isinstance(outcome, Failed) else outcome.photo.path
    try:
        if isinstance(outcome, Failed):
            results.append({"image": path, "method": ",".join(job.wanted.methods), "error": outcome.error})
            return outcome
        targets = outcome.explanation.targets[0]
        labels = [job.labels[target] for target in targets] if job.labels else [""]
        files = free_files(outcome.photo, job.wanted, labels)
        record = describe(outcome, job, files.values())
        for method, cams in outcome.explanation.cams.items():
            for target in targets[~cams[0].any((1, 2))]:
                where, name = record["target_layer"], job.classifier.class_names[target]
                note(f"{path}: the {method} map is 0 everywhere: nothing in {where} speaks for {name}, or all alike")
        save_files(outcome, job, record, labels, files)
        results.append({**record, "options": options.digest(outcome.photo.place, outcome.photo.stamp)})
    except OSError as error:
        return Failed(path, f"{path}: its results cannot be written: {error.strerror or error}")
    return as_line(record)


def plan(args: argparse.Namespace, share: Share, results: Results) -> tuple[list[tuple[str, str]], int]:
    """What this process has to do, (photo, place of its pictures), and how many of its photos are done already."""
    finished = results.finished() if args.skip_existing else {}
    options = Options(args)
    todo, again, elsewhere, skipped = [], set(), {}, 0
    for index, (path, place) in enumerate(find_places(args.photos, args.output, as_wanted(args))):
        key, rank = (path, ",".join(args.methods)), index % share.world
        recorded = finished.get(key, {})
        done = bool(recorded) and hash(options.digest(place, stamp_of(path))) in recorded.values()
        if not done:
            again.add(key)
        elif results.file_of(rank) in recorded:
            elsewhere[key] = results.file_of(rank)
        if rank == share.rank:
            skipped += done
            todo += [] if done else [(path, place)]
    try:
        for folder in {os.path.dirname(place) or "." for _, place in todo}:
            os.makedirs(folder, exist_ok=True)
        results.forget(again, elsewhere)
    except OSError as error:
        raise CallError(f"--output {args.output}: cannot write there: {error.strerror or error}") from error
    return todo, skipped


def as_wanted(args: argparse.Namespace) -> Wanted:
    """The files that the command line asks for."""
    return Wanted(args.methods, args.outputs, args.format, args.sheet, args.save_arrays)


def load(args: argparse.Namespace, share: Share) -> Job:
    """The network and what is to be done with it, as the command line asks for it. Raises CallError."""
    device = find_device(args.device, share.local_rank if share.world > 1 else None)
    classifier = load_classifier(
        args.arch,
        args.ckpt,
        args.num_classes,
        device,
        class_names=args.class_names,
        input_size=args.input_size,
        resize=args.resize,
    )
    names = classifier.class_names
    targets = list(dict.fromkeys(find_class(wanted, names) for wanted in args.target_classes or ()))
    top = args.top_k or 1
    if top > len(names):
        note(f"--top-k {top}, but the network has {len(names)} classes; all of them are explained")
    stop = threading.Event()
    bar = partial(tqdm, desc=",".join(args.methods), unit="pass", leave=False, disable=None)
    explainer = Explainer(
        classifier.model,
        args.methods,
        args.target_layers,
        guided=args.outputs != ["cam"],
        aug_smooth=args.aug_smooth,
        eigen_smooth=args.eigen_smooth,
        progress=lambda passes: until(stop, bar(passes)),
    )
    return Job(
        classifier,
        explainer,
        torch.tensor([targets]) if targets else None,
        top,
        as_wanted(args),
        Look(args.colormap, args.alpha, args.format, args.quality),
        args.output_size,
        args.metrics,
        file_labels(names) if max(len(targets), top) > 1 else None,
        stop,
    )


def outcomes_of(todo: Sequence[tuple[str, str]], job: Job, args: argparse.Namespace) -> Iterator[Explained | Failed]:
    """Reads and explains the photos, by up to four workers at once on the CPU."""
    classes = len(args.target_classes or ()) or args.top_k or 1  # each needs as much memory as a photo
    batch_size, workers = max(1, args.batch_size // classes), 1
    # grad-cam's classes change settings of the weights, which the workers share
    if job.explainer.device.type == "cpu" and not BY_GRAD_CAM.keys() & set(args.methods):
        workers = even_threads(min(batch_size, len(todo)))
    return explain_photos(ahead(partial(prepare, job=job), todo, 2 * args.batch_size), job, batch_size, workers)


def run(args: argparse.Namespace) -> int:
    """Explains the photos that the command line names. Returns the exit status; raises CallError."""
    began, share, tally = time.monotonic(), Share.from_environment(), Counter[str]()
    results, options = Results(args.output, share), Options(args)
    todo, tally["skipped"] = plan(args, share, results)
    interrupted = False
    with tqdm(total=len(todo), unit="photo", disable=None) as bar, ThreadPoolExecutor(THREADS) as writers:
        writing: deque[Future[Failed | str]] = deque()
        try:
            job = load(args, share) if todo else None
            for outcome in outcomes_of(todo, job, args) if job else ():
                writing.append(writers.submit(save, outcome, job, options, results))
                while len(writing) > 2 * args.batch_size or (writing and writing[0].done()):
                    report(writing.popleft().result(), tally, bar)
        except KeyboardInterrupt:
            interrupted = True
        while writing:  # after Ctrl-C too: what is being written is finished
            report(writing.popleft().result(), tally, bar)
    if interrupted or tally["skipped"] or len(todo) > 1:
        of_processes = f" by process {share.rank} of {share.world}" if share.world > 1 else ""
        counts = f"{tally['done']} done, {tally['skipped']} skipped, {tally['failed']} failed"
        go_on = "; stopped, the same command with --skip-existing goes on" if interrupted else ""
        say(f"{counts}{of_processes} in {time.monotonic() - began:.1f} s{go_on}", sys.stderr)
    # torchrun stops all processes as soon as one does not return 0, so there a broken photo is told by its line only
    return 130 if interrupted else int(tally["failed"] > 0 and share.world == 1)


def report(outcome: Failed | str, tally: Counter[str], bar: Any) -> None:
    """Counts a photo and prints its line, above the progress bar where there is one."""
    failed = isinstance(outcome, Failed)
    tally["failed" if failed else "done"] += 1
    with bar.external_write_mode():
        if failed:
            say(f"error: {outcome.error}", sys.stderr)
        else:
            say(outcome)
    bar.update()


def main(args: argparse.Namespace) -> int:
    """Runs the program. Returns the exit status: 0 done, 1 a photo failed, 2 a wrong call, 130 stopped by Ctrl-C."""
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end the run
    try:
        return run(args)
    except CallError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        say(f"error: the network needs more memory than there is: {first_line(error)}", sys.stderr)
        return 2
    except OSError as error:  # stdout: `| head` has read enough, or the disk that it goes to is full
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (its last flush would fail as well)
        say(f"error: stopped, nothing more can be written: {error.strerror or error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(ARGS))
