#!/usr/bin/env python3
"""Shows why a convolutional network answered as it did: heatmap (CAM), guided backpropagation, and their product.

The file is read from top to bottom; a room uses only the rooms above it:

    1 Command line   what the person asked for
    2 Images         paths -> decoded photos
    3 Model          architecture + checkpoint -> a classifier with its own preprocessing
    4 Explanation    inputs -> class activation maps and guided gradients
    5 Pictures       arrays -> JPEG files
    6 Run            all of it joined

From Python:

    classifier = load_classifier(arch="resnet50", ckpt="best.pth", device="cuda")
    explainer = Explainer(classifier.model, methods=["gradcam"])
    explanation = explainer(inputs)  # inputs: float32 (N, 3, H, W), normalised
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# ---------------------------------------------------------------------------------------------------------------------
# 1  Command line. Only the standard library: --help and a mistyped option must not wait for torch.
# ---------------------------------------------------------------------------------------------------------------------

METHODS = ("gradcam", "scorecam", "gradcam++", "ablationcam", "xgradcam", "eigencam", "eigengradcam")
OUTPUTS = ("cam", "gb", "cam_gb")

EXAMPLES = """\
examples:
  your own fine-tuned network, one photo:
    python cnn_visualizations.py --arch resnet50 --ckpt best.pth --num-classes 2 --output out 33.jpg

  another method and layer, the classes by name, why it is *not* a cat:
    python cnn_visualizations.py --ckpt best.pth --class-names names.txt --target-class cat \\
        --method scorecam --target-layer layer3 33.jpg 34.jpg

  the demo that comes with the program (no download):
    python cnn_visualizations.py --ckpt tests/data/dogs_mobilenet_v2.pth pics/dog.jpg
"""


class CallError(ValueError):
    """The call cannot be carried out; the message is one line that says what to do about it. Exit status 2."""


class PhotoError(ValueError):
    """One photo cannot be explained; the others can. The message is one line. Exit status 1."""


def note(message: str) -> None:
    """Tells the person something on stderr that is not an error."""
    print(f"note: {message}", file=sys.stderr)


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
            raise argparse.ArgumentTypeError(
                f"unknown {kind} '{name}'{closest(name, known)} (known: {', '.join(known)})"
            )
    return names


def _method(text: str) -> str:
    names = _names_from(METHODS, "method", text)
    if len(names) > 1:
        raise argparse.ArgumentTypeError(f"one method at a time, not '{text}'")
    return names[0]


def _outputs(text: str) -> list[str]:
    return _names_from(OUTPUTS, "output", text)


def _device(text: str) -> str:
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"unknown device '{text}' (known: cpu, cuda, cuda:1, mps, xpu)")
    return text


def _architecture(text: str) -> str:
    known = architecture_names()
    if known and text not in known:
        raise argparse.ArgumentTypeError(
            f"unknown architecture '{text}'{closest(text, known)} (torchvision has {len(known)}: alexnet ... "
            "wide_resnet50_2; the README lists the families)"
        )
    return text


def _between(low: int, high: int) -> Any:
    """An argparse type: a whole number from low to high."""

    def number(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low} to {high}")
        return int(text)

    return number


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"'{text}' is {'a folder, not a file' if path.is_dir() else 'not there'}")
    if path.stat().st_size == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is empty")
    return path


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="cnn_visualizations.py",
        description="Shows what in a photo made a network answer as it did. For each photo it writes the heatmap (CAM) "
        "over the photo, guided backpropagation (gb), and the product of the two (cam_gb) as JPEG files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Photos: JPEG, PNG, WebP, BMP, TIFF or GIF files.")

    network = parser.add_argument_group("the network")
    network.add_argument(
        "--arch",
        type=_architecture,
        metavar="NAME",
        help="The torchvision architecture, such as "
        "resnet50. Left out, the checkpoint tells it; without a checkpoint either, it is resnet50.",
    )
    network.add_argument(
        "--ckpt",
        type=_file,
        metavar="FILE",
        help="Your checkpoint: .pth, .pt, .ckpt or "
        ".safetensors with the weights. Left out, torchvision's ImageNet weights are downloaded.",
    )
    network.add_argument(
        "--num-classes",
        type=_between(1, 1_000_000),
        metavar="N",
        help="How many classes the network tells apart. Left out, the checkpoint tells it.",
    )
    network.add_argument(
        "--class-names",
        type=_file,
        metavar="FILE",
        help="The names of the classes in the order of "
        "their indices, one a line, or as JSON. They win over names in the checkpoint.",
    )
    network.add_argument(
        "--device",
        type=_device,
        metavar="NAME",
        help="Where to compute: cuda, cuda:1, mps or cpu. Left out: the CUDA GPU if there is one, else the CPU.",
    )

    photo = parser.add_argument_group("what the network sees")
    photo.add_argument(
        "--input-size",
        type=_between(8, 4096),
        metavar="PX",
        help="Side of the square that the network "
        "sees. Left out: the checkpoint's, else that of torchvision's preset for the architecture.",
    )
    photo.add_argument(
        "--resize",
        choices=("crop", "squash"),
        default="crop",
        help="crop: shorten the photo to a "
        "square as torchvision's preset does (the default). squash: show the whole photo, aspect not kept.",
    )
    photo.add_argument(
        "--batch-size",
        type=_between(1, 4096),
        default=8,
        metavar="N",
        help="How many photos go through the network at once (default: 8). Less needs less memory.",
    )

    explanation = parser.add_argument_group("the explanation")
    explanation.add_argument(
        "--method",
        type=_method,
        default="gradcam",
        metavar="NAME",
        help=f"How the heatmap is made: {', '.join(METHODS)} (default: gradcam).",
    )
    explanation.add_argument(
        "--target-layer",
        metavar="NAME",
        help="The layer that is looked at, by its dotted name, "
        "such as layer4 or features.17. Left out: the last one that gives a spatial map.",
    )
    explanation.add_argument(
        "--target-class",
        metavar="CLASS",
        help="The class that is explained, by name or index. Left out: the likeliest one for each photo.",
    )

    pictures = parser.add_argument_group("the pictures")
    pictures.add_argument(
        "--output",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="Where the pictures go (default: out). It is made if need be.",
    )
    pictures.add_argument(
        "--outputs",
        type=_outputs,
        default=list(OUTPUTS),
        metavar="LIST",
        help="Which pictures, comma-separated: cam, gb, cam_gb (default: all three). cam alone is the fastest.",
    )
    pictures.add_argument(
        "--output-size",
        type=_between(16, 8192),
        metavar="PX",
        help="Long side of the pictures. Left out: that of the photo's part that the network saw, at most 1024.",
    )
    return parser


# The first bytes of the files that we read: enough to tell a text file named .jpg without decoding anything.
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"II+\x00",
    b"MM\x00+",
    b"GIF8",
)


def photo_fault(path: Path) -> str | None:
    """Why this cannot be a photo, from a glance at the file; None where nothing speaks against it."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except IsADirectoryError:
        return "is a folder; name the photos in it"
    except PermissionError:
        return "is a folder; name the photos in it" if path.is_dir() else "cannot be read: permission denied"
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return "cannot be read" if path.exists() else "is not there"
    if not start:
        return "is empty"
    return None if start.startswith(_SIGNATURES) else "is not a picture (JPEG, PNG, WebP, BMP, TIFF or GIF)"


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it, and removes the file again. Raises CallError where that fails."""
    probe = folder / f".{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CallError(f"--output {folder}: cannot write there: {error.strerror or error}") from error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; whatever can be found wrong without torch ends the program here.

    Raises:
        SystemExit: 0 after --help, 2 after a wrong call, 1 where none of the photos can be one.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    args.images += [name for name in rest if not name.startswith("-")]  # photos may stand on both sides of the options
    unknown = [name for name in rest if name.startswith("-")]
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown option {unknown[0]}{closest(unknown[0].split('=')[0], options)} (see --help)")
    args.images = list(dict.fromkeys(Path(image) for image in args.images))
    faults = []
    for path in args.images:
        faults.append(photo_fault(path))
        if faults[-1] is None:  # one photo is worth starting for; the others get their line when it is their turn
            break
    else:
        parser.exit(1, "".join(f"error: {path} {fault}\n" for path, fault in zip(args.images, faults, strict=True)))
    try:
        check_writable(args.output)
    except CallError as error:
        parser.error(str(error))
    return args


ARGS = parse_args() if __name__ == "__main__" else None

import copy
import importlib
import io
import itertools
import json
import math
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model_builder, get_model_weights, list_models

# ---------------------------------------------------------------------------------------------------------------------
# 2  Images. Paths become decoded photos; whatever is in the file, memory stays bounded and the answer is one line.
# ---------------------------------------------------------------------------------------------------------------------

MAX_PIXELS = 250_000_000  # above every camera's largest photo; a few kilobytes of hostile PNG can claim to be more
MIN_SIDE = 8  # pixels; below that there is nothing to point at
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


@dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
        path: where it came from.
        pixels: RGB, uint8, (H, W, 3), upright: an EXIF orientation is already applied.
    """

    path: Path
    pixels: NDArray[np.uint8]


def read_photo(path: Path) -> Photo:
    """Decodes a photo: the first frame or page, as 8-bit RGB, turned upright.

    Transparency is dropped, as it is by the loaders that networks are trained with (torchvision's ImageFolder, OpenCV).

    Raises:
        PhotoError: the file is missing, not a picture, broken, too large or too small.
    """
    fault = photo_fault(path)
    if fault:
        raise PhotoError(f"{path} {fault}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PhotoError(f"{path} has {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} megapixels")
            if min(width, height) < MIN_SIDE:
                raise PhotoError(f"{path} has {width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return Photo(path, np.asarray(_to_rgb(upright)))
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
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# 3  Model. Names and files become a classifier that knows its preprocessing and its classes.
# ---------------------------------------------------------------------------------------------------------------------

HEAD_ROOTS = ("fc", "classifier", "head", "heads")  # where torchvision's networks keep their last layer
STATE_ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "ema",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.")
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # training-time heads of googlenet and inception_v3; never needed here
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index", "relative_coords_table")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Classifier:
    """A network that is ready to be asked.

    Attributes:
        model: on `device`, float32, in eval mode.
        arch: its torchvision name.
        class_names: one for each output.
        preset: torchvision's preprocessing for the architecture; PIL image -> float32 (3, S, S), normalised.
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
            PhotoError: a strip so long that the preset would blow it up beyond MAX_PIXELS.
        """
        height, width = photo.pixels.shape[:2]
        if not self.squash and self.preset.resize_size[0] ** 2 * max(height, width) / min(height, width) > MAX_PIXELS:
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
    """Builds a torchvision classifier and fills it with the weights of a checkpoint.

    Args:
        arch: a name from `torchvision.models.list_models`; None: the checkpoint's own `arch` entry, else the one
            architecture that has the checkpoint's number of parameters; without a checkpoint, resnet50.
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
    if arch is not None and arch not in list_models(module=torchvision.models):
        raise CallError(f"unknown architecture '{arch}'{closest(arch, architecture_names())}")
    if ckpt is None:
        arch = arch or "resnet50"
        checkpoint = download_weights(arch)
    else:
        checkpoint = read_checkpoint(Path(ckpt))
        arch = arch or find_architecture(checkpoint)
    model, preset = build_model(arch, checkpoint, num_classes, input_size)
    if resize == "squash":
        preset.resize_size = [preset.crop_size[0]] * 2
    names = name_classes(class_names, checkpoint, _head(model)[1].weight.shape[0])
    return Classifier(model.to(target), arch, names, preset, target, squash=resize == "squash")


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; None stands for the CUDA GPU where there is one, else the CPU.

    Raises:
        CallError: it is not there.
    """
    if name is None:
        if not torch.cuda.is_available():
            note("no CUDA GPU found, computing on the CPU")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        have += ["mps"] if torch.backends.mps.is_available() else []
        raise CallError(f"device {name} is not there; this machine has: {', '.join(have)}") from error
    return device


@dataclass(frozen=True)
class Checkpoint:
    """What was found in a checkpoint.

    Attributes:
        name: for messages.
        state: the weights, floating point ones in float32, their keys without the prefixes of wrappers.
        beside: keys of `state` that lie outside of the wrapper that held most: a loss's weights, or the head.
        entries: whatever else the file holds (`arch`, `classes`, `input_size` ...).
    """

    name: str
    state: State
    beside: frozenset[str] = frozenset()
    entries: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the weights and the entries beside them without ever running code from the file.

    Raises:
        CallError: not a checkpoint, or one that can only be opened by running its code.
    """
    content = _load_safely(path)
    entries = content if isinstance(content, dict) else {}
    raw = _find_state(content)
    if not raw:
        held = ", ".join(map(str, list(entries)[:8])) or type(content).__name__
        raise CallError(f"{path} holds no weights (found: {held}); save them with torch.save(model.state_dict(), ...)")
    tensors = {str(k): v.detach() for k, v in raw.items() if isinstance(v, Tensor)}
    state, beside = _strip_prefixes({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    # Before 2018 torchvision's DenseNet called its layers norm.1 and conv.2 instead of norm1 and conv2.
    old_densenet = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    state = {old_densenet.sub(r"\1\2", key): tensor for key, tensor in state.items()}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(AUXILIARY)}
    return Checkpoint(str(path), state, frozenset(beside), {str(k): v for k, v in entries.items()})


def _load_safely(path: Path) -> Any:
    how_to = "save the weights alone with torch.save(model.state_dict(), 'weights.pth')"
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
        # Options of torchvision's training script and numbers that NumPy computed stand in many checkpoints;
        # both are plain data.
        numpy_core = importlib.import_module(
            "numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray"
        )
        plain = [argparse.Namespace, numpy_core.scalar, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        message = str(error)
        if "TorchScript" in message:
            raise CallError(f"{path} is a TorchScript archive, which is code; {how_to}") from error
        found = re.search(r"(?:GLOBAL |global )`?([\w.]+)", message)
        if "Weights only" in message and found:
            raise CallError(
                f"{path} holds a pickled {found.group(1)} object, and loading it would run code; {how_to}"
            ) from error
        if isinstance(error, PermissionError):
            raise CallError(f"{path} cannot be read: permission denied") from error
        raise CallError(f"{path} is not a checkpoint that torch can read, or not a whole one") from error


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


def _strip_prefixes(state: State) -> tuple[State, set[str]]:
    """Takes the prefixes of wrappers off the keys that have them, as long as most have one.

    Returns the state and the keys that had none; those belong to something beside the network, or are its head.
    """
    beside: set[str] = set()
    while True:
        for prefix in PREFIXES:
            inside = {key for key in state if key.startswith(prefix)}
            if len(inside) > len(state) / 2:
                beside |= {key for key in state if key not in inside}
                state = {key.removeprefix(prefix) if key in inside else key: tensor for key, tensor in state.items()}
                break
        else:
            return state, beside


def download_weights(arch: str) -> Checkpoint:
    """torchvision's ImageNet weights, from its cache or else from the network.

    Raises:
        CallError: they cannot be had.
    """
    weights = get_model_weights(arch).DEFAULT
    if not (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).is_file():
        note(f"downloading torchvision's weights for {arch} ({weights.meta['_file_size']:.0f} MB)")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch announces the URL there
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
    if arch.startswith("vit_"):
        position, patch = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
        if position is not None and patch is not None and position.ndim == 3 and patch.ndim == 4:
            options["image_size"] = math.isqrt(max(position.shape[1] - 1, 1)) * patch.shape[-1]
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
    return max(weights, key=_natural, default=None)


def count_parameters(state: State, beside: Iterable[str] = ()) -> int:
    """How many parameters the network would have with 1000 classes: the figure that torchvision publishes."""
    total = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(BUFFERS))
    head = _head_weight(state, beside)
    if head is None:
        return total
    classes, per_class = state[head].shape[0], state[head][0].numel()
    per_class += head.removesuffix("weight") + "bias" in state
    return total + (1000 - classes) * per_class


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
    count, sizes = count_parameters(checkpoint.state, checkpoint.beside), _published_sizes()
    near = sorted(sizes, key=lambda size: abs(size - count))[:3]
    raise CallError(
        f"{checkpoint.name} fits no torchvision architecture ({count:,} parameters with 1000 classes; nearest: "
        + ", ".join(f"{' or '.join(sizes[size])} with {size:,}" for size in near)
        + "); choose with --arch"
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

    The published parameter counts nearly always leave one; where a changed head spoils the count, all are tried.
    """
    counted = _published_sizes().get(count_parameters(checkpoint.state, checkpoint.beside), [])
    fitting = [arch for arch in counted if _trunk_fits(arch, checkpoint)]
    everything = list_models(module=torchvision.models)
    return fitting or [arch for arch in everything if arch not in counted and _trunk_fits(arch, checkpoint)]


def _trunk_fits(arch: str, checkpoint: Checkpoint) -> bool:
    model = skeleton(arch, 2, checkpoint.state)
    root = _head(model)[0].split(".")[0]

    def trunk(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        inside = (
            k for k in state if k.split(".")[0] != root and k not in checkpoint.beside and not k.endswith(BUFFERS)
        )
        return {key: state[key].shape for key in inside}

    return trunk(model.state_dict()) == trunk(checkpoint.state)


def build_model(
    arch: str, checkpoint: Checkpoint, num_classes: int | None = None, input_size: int | None = None
) -> tuple[nn.Module, Any]:
    """The architecture filled with the checkpoint's weights, in eval mode on the CPU, and its preprocessing.

    Raises:
        CallError: the checkpoint does not fit the architecture, the number of classes or the input size.
    """
    entry = checkpoint.entries.get("input_size")
    size = input_size or _side(entry, checkpoint.name)
    state = dict(checkpoint.state)
    head = _head_weight(state, checkpoint.beside)
    classes = state[head].shape[0] if head else num_classes or 1000
    model = skeleton(arch, classes, state, size)
    _fit_head(model, state, checkpoint.beside)
    _load(model, arch, state, checkpoint)
    if num_classes not in (None, classes):
        raise CallError(f"--num-classes {num_classes}, but {checkpoint.name}: {classes} classes; leave the option out")
    fixed = getattr(model, "image_size", None)  # the side that a ViT's position embedding was made for
    if fixed and size not in (None, fixed):
        raise CallError(f"this {arch} takes inputs of {fixed} x {fixed} pixels only; leave --input-size {size} out")
    return model, _preset(arch, fixed or size, checkpoint.entries)


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
    missing = [k for k in wanted if k not in state and not k.endswith(BUFFERS)]
    unexpected = [k for k in state if k not in wanted]
    differ = [
        f"{k}: {_shape(state[k])} in the file, {_shape(wanted[k])} in {arch}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if not missing and not differ and set(unexpected) <= checkpoint.beside:
        unexpected = []  # weights of a loss or a metric that was saved along
    if missing or unexpected or differ:
        found = [("missing", missing), ("unexpected", unexpected), ("of another shape", differ)]
        parts = [
            f"{len(keys)} {what} ({'; '.join(keys[:3])}{'; ...' * (len(keys) > 3)})" for what, keys in found if keys
        ]
        others = [a for a in architectures_that_fit(checkpoint) if a != arch]
        hint = f"; it would fit {' or '.join(others)}: pass --arch {others[0]}" if others else ""
        raise CallError(f"{checkpoint.name} does not fit {arch}: {', '.join(parts)}{hint}")
    for key in list(wanted):  # into its own dict, which has the version marks that MNASNet insists on
        if key in state:
            wanted[key] = state[key].contiguous()
        else:
            del wanted[key]
    model.load_state_dict(wanted, strict=False, assign=True)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _side(entry: Any, name: str) -> int | None:
    """A checkpoint's input_size as the side of a square: 225, (225, 225) or (3, 225, 225)."""
    sides = entry if isinstance(entry, (list, tuple)) else [entry]
    if entry is None:
        return None
    if not all(isinstance(side, int) and 0 < side <= 4096 for side in sides) or len(set(sides[-2:])) > 1:
        raise CallError(f"{name}: its input_size {str(entry)[:60]} is not a square that we can use; pass --input-size")
    return sides[-1]


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
    for entry in ("mean", "std"):
        values = entries.get(entry)
        if values is not None:
            try:
                values = torch.as_tensor(values, dtype=torch.float64).tolist()
            except (TypeError, ValueError, RuntimeError):
                values = []
            if not isinstance(values, list) or len(values) != 3 or (entry == "std" and not min(values) > 0):
                raise CallError(f"the checkpoint's entry {entry} is not three numbers, one for each colour")
            setattr(preset, entry, values)
    return preset


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
    raise CallError(f"--target-class: the network has no class '{wanted}'{closest(wanted, class_names)}")


# ---------------------------------------------------------------------------------------------------------------------
# 4  Explanation. One forward pass gives the logits, the activations, and by two backward walks everything else.
# ---------------------------------------------------------------------------------------------------------------------

Floats = NDArray[np.float32]

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
        cams: for each method the maps, float32 (N, H, W) in [0, 1]: 1 where the evidence for the class is strongest in
            this photo. A map that is 0 everywhere says that nothing in the layer speaks for the class.
        guided: guided-backpropagation gradients, float32 (N, 3, H, W), in units of logit per normalised input value;
            None if they were not asked for. In a network without activations they are the plain gradients.
        logits: float32 (N, classes).
        targets: int64 (N,), the class that was explained.
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


def gradcam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391): the mean gradient of each channel."""
    return gradients.mean((2, 3))


def gradcam_plus_plus_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (Chattopadhyay et al., WACV 2018, arXiv:1710.11063, equation 19): positive gradients, weighted."""
    squared = gradients**2
    alphas = squared / (2 * squared + activations.sum((2, 3), keepdim=True) * squared * gradients + 1e-6)
    return (gradients.clamp(min=0) * torch.where(gradients != 0, alphas, 0)).sum((2, 3))


def xgradcam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM (Fu et al., BMVC 2020, arXiv:2008.02312): the mean gradient, weighted by the activations."""
    return (gradients * activations / (activations.sum((2, 3), keepdim=True) + 1e-7)).sum((2, 3))


def principal_component(activations: Tensor) -> Tensor:
    """Eigen-CAM (Muhammad and Yeasin, IJCNN 2020, arXiv:2008.00299): the projection on the first principal component.

    (N, C, h, w) -> (N, h, w). The sign of a singular vector is arbitrary; it is NumPy's, as in the grad-cam package,
    which is also why this is computed on the CPU.
    """
    columns = activations.detach().flatten(2).transpose(1, 2).cpu().numpy()
    columns = columns - columns.mean(1, keepdims=True)
    projections = [column @ np.linalg.svd(column, full_matrices=False)[2][0] for column in columns]
    return torch.from_numpy(np.stack(projections)).to(activations).view(len(columns), *activations.shape[2:])


CHANNEL_WEIGHTS = {
    "gradcam": gradcam_weights,
    "gradcam++": gradcam_plus_plus_weights,
    "xgradcam": xgradcam_weights,
}
NEED_GRADIENTS = {*CHANNEL_WEIGHTS, "eigengradcam"}

ABLATION_COPIES = 256  # of the layer's output at once,
ABLATION_BYTES = 2**25  # but no more of them than fit in here


def normalise(maps: Tensor) -> Tensor:
    """Each map of (N, h, w) stretched to [0, 1]; a map that is the same everywhere becomes 0 (as in grad-cam)."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


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


def guided_gradients(score: Tensor, inputs: Tensor) -> Tensor:
    """Guided backpropagation (Springenberg et al., ICLR 2015 workshop, arXiv:1412.6806).

    An ordinary backward pass in which every activation function lets only positive gradients in. The activations are
    found in the autograd graph, so modules and functions count alike; the graph is used up.
    """
    for node in graph_nodes(score.grad_fn):
        if ACTIVATION_NODES.fullmatch(node.name()):
            node.register_prehook(_clamp_incoming)
    return torch.autograd.grad(score, inputs)[0]


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
        raise CallError(f"the network has no layer '{wanted}'{closest(wanted, modules)} (outermost: {outermost})")
    return name


def as_logits(answer: Any) -> Tensor:
    """What a network returns, as logits (N, classes). Raises ValueError where they are not finite."""
    if not isinstance(answer, Tensor):  # an auxiliary head comes second; transformers wrap the logits
        answer = answer.logits if hasattr(answer, "logits") else answer[0]
    logits = answer[:, None] if answer.ndim == 1 else answer.flatten(1)
    if not torch.isfinite(logits).all():
        raise ValueError("the network's answer is not a number (NaN or infinite); its weights are probably broken")
    return logits


def choose_targets(logits: Tensor, targets: Sequence[int] | Tensor | int | None) -> Tensor:
    """The class to explain for each input, int64 (N,). Raises CallError where there is no such class."""
    if targets is None:
        return logits.detach().argmax(1)
    chosen = torch.as_tensor(targets, dtype=torch.int64, device=logits.device).expand(len(logits))
    classes = logits.shape[1]
    if not ((chosen >= 0) & (chosen < classes)).all():
        raise CallError(f"class {chosen.tolist()} is out of range: the network has {classes} classes, from 0")
    return chosen


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

    handles = [network.get_submodule(name).register_forward_hook(partial(collect, name)) for name in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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

    handles = [module.register_forward_hook(partial(record, name)) for name, module in network.named_modules()]
    try:
        logits = as_logits(network(inputs.detach().requires_grad_()))
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


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
        handles = [m.register_forward_hook(partial(keep, name)) for name, m in network.named_modules() if name]
        handles.append(self._layer.register_forward_pre_hook(lambda *_: started.append(True)))
        try:
            with tap(network, [layer]) as outputs:
                self.logits = as_logits(network(inputs))
        finally:
            for handle in handles:
                handle.remove()
        self.output = outputs[layer]
        # A module that is called again later (ResNet's relu) cannot stand for one result.
        self._before = {network.get_submodule(k): v for k, v in finished.items() if times_called[k] == 1}

    def __enter__(self) -> Suffix:
        for module, output in self._before.items():
            module.forward = partial(self._recall, output)
        self._layer.forward = lambda *args, **kwargs: self._copies
        try:
            unchanged = self(self.output.repeat(2, *[1] * (self.output.ndim - 1)))
            self._expand = len(unchanged) != 2 or not torch.allclose(unchanged, self.logits, 1e-3, 1e-3)
        except RuntimeError:  # two copies and one of something else do not go together
            self._expand = True
        return self

    def __exit__(self, *_: object) -> None:
        for module in [*self._before, self._layer]:
            del module.forward

    def _recall(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._as_many(output).clone()  # what follows may change it in place

    def _as_many(self, tensor: Tensor) -> Tensor:
        return tensor.expand(len(self._copies), *tensor.shape[1:]) if self._expand else tensor

    def __call__(self, copies: Tensor) -> Tensor:
        """The logits (B, classes) for B outputs of the layer, which may be overwritten."""
        self._copies = copies
        return as_logits(self._network(self._as_many(self._inputs)))


@torch.inference_mode()
def ablation_weights(network: nn.Module, layer: str, inputs: Tensor, target: Tensor) -> Tensor:
    """Ablation-CAM (Desai and Ramaswamy, WACV 2020): the share of the score that is lost when a channel is set to zero.

    For one input (1, 3, H, W); returns (C,). A channel that is zero anyway loses nothing and is not run.
    """
    suffix = Suffix(network, layer, inputs)
    axis = channel_axis(suffix.output, inputs.shape[2:])
    channels_first = suffix.output.movedim(axis, 1)
    score = suffix.logits[0, target]
    ablated = score.repeat(channels_first.shape[1])
    alive = channels_first[0].flatten(1).any(1).nonzero()[:, 0]
    copies = max(1, min(ABLATION_COPIES, ABLATION_BYTES // (suffix.output.numel() * 4)))
    with suffix:
        for channels in alive.split(copies):
            changed = channels_first.repeat(len(channels), *[1] * (channels_first.ndim - 1))
            changed[torch.arange(len(channels)), channels] = 0
            ablated[channels] = suffix(changed.movedim(1, axis))[:, target]
    return (score - ablated) / score


@torch.inference_mode()
def score_weights(network: nn.Module, activations: Tensor, inputs: Tensor, target: Tensor, batch_size: int) -> Tensor:
    """Score-CAM (Wang et al., CVPR workshops 2020, arXiv:1910.01279): the softmax of the scores of masked inputs.

    Each channel of activations (C, h, w), enlarged to the input (1, 3, H, W) and stretched to [0, 1], masks it once.
    Returns (C,). The mask of a constant channel is zero everywhere, so all of those share one pass.
    """
    flat = activations.flatten(1)
    varied = (flat.amax(1) > flat.amin(1)).nonzero()[:, 0]
    scores = as_logits(network(torch.zeros_like(inputs)))[0, target].repeat(len(flat))
    for channels in varied.split(batch_size):
        small = activations[channels][:, None]
        masks = nn.functional.interpolate(small, inputs.shape[2:], mode="bilinear", align_corners=True)
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        masked = inputs * ((masks - low) / (high - low + 1e-8))
        scores[channels] = as_logits(network(masked.contiguous(memory_format=torch.channels_last)))[:, target]
    return scores.softmax(0)


def exact_convolutions() -> contextlib.AbstractContextManager[None]:
    """On a GPU: no TF32, whose ten bits show in the maps, and the same answer from run to run."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class Explainer:
    """Explains the answers of any `nn.Module` classifier.

    The model itself is never touched: everything runs on a frozen float32 copy, in channels-last memory and with its
    batch norms folded into the convolutions. After training on, make a new explainer.

    Args:
        model: takes (N, 3, H, W), gives logits (N, classes); or (N, 1) or (N,) for a single sigmoid output, of which
            the positive side is explained. `DataParallel` around it and half precision are fine.
        methods: names from METHODS; they share one pass.
        target_layers: dotted names of layers (or the modules) whose maps are averaged; None: found on the first call,
            the last layer that gives a spatial map on which the score depends.
        guided: whether guided backpropagation is wanted too.
        batch_size: how many inputs Score-CAM runs at once; None: 8 on the CPU, on a GPU what half of its
            free memory takes.

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
        batch_size: int | None = None,
    ) -> None:
        for method in methods:
            if method not in METHODS:
                raise CallError(f"unknown method '{method}'{closest(method, METHODS)} (known: {', '.join(METHODS)})")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        self.methods = tuple(methods)
        self.guided = guided
        self.batch_size = batch_size
        self.target_layers = tuple(layer_name(model, layer) for layer in target_layers or ())
        with torch.inference_mode(False):
            network = copy.deepcopy(model).eval().requires_grad_(False).float()
            self._network = network.to(memory_format=torch.channels_last)
        self._tuned = False

    def __call__(self, inputs: Tensor, targets: Sequence[int] | Tensor | int | None = None) -> Explanation:
        """Explains a batch.

        Args:
            inputs: (N, 3, H, W), normalised as the model expects it; converted to float32 on the model's device.
            targets: for each input, or one for all, the class to explain; None: the one with the highest logit.

        Raises:
            CallError: a target layer gives no spatial map, or the score does not depend on it; no such class.
            ValueError: the network's answer is not finite.
        """
        device = next((p.device for p in self._network.parameters()), inputs.device)
        # Whatever mode the caller is in, this needs a graph, and leaves the caller's settings alone.
        with torch.inference_mode(False), torch.enable_grad(), exact_convolutions():
            inputs = inputs.detach().to(device, torch.float32).clone(memory_format=torch.channels_last)
            if not self._tuned:
                self._tune(inputs[:1])
            return self._explain(inputs, targets)

    def _tune(self, inputs: Tensor) -> None:
        """Watches one input pass: finds the target layer where none was named, and folds the batch norms."""
        calls, logits = watch(self._network, inputs)
        if not self.target_layers:
            self.target_layers = (find_target_layer(self._network, calls, logits, inputs.shape[2:]),)
        fold_batch_norms(self._network, calls, logits, keep=self.target_layers)
        self._tuned = True

    def _explain(self, inputs: Tensor, targets: Sequence[int] | Tensor | int | None) -> Explanation:
        with_gradients = not NEED_GRADIENTS.isdisjoint(self.methods)
        inputs.requires_grad_(self.guided)
        with tap(self._network, self.target_layers, with_gradients) as outputs:
            logits = as_logits(self._network(inputs))
        targets = choose_targets(logits, targets)
        score = logits.gather(1, targets[:, None]).sum()
        gradients = self._gradients(score, outputs) if with_gradients else {}
        guided = guided_gradients(score, inputs) if self.guided else None
        inputs = inputs.detach()
        maps: dict[str, list[Tensor]] = {method: [] for method in self.methods}
        for layer in self.target_layers:
            activations, gradient = self._maps_of(layer, outputs[layer].detach(), gradients.get(layer), inputs)
            for method in self.methods:
                small = normalise(self._map(method, layer, activations, gradient, inputs, targets).clamp(min=0))
                maps[method].append(nn.functional.interpolate(small[:, None], inputs.shape[2:], mode="bilinear")[:, 0])
        return Explanation(
            {method: as_array(normalise(torch.stack(of_layers).mean(0))) for method, of_layers in maps.items()},
            None if guided is None else as_array(guided),
            as_array(logits),
            as_array(targets),
        )

    def _gradients(self, score: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradient of the score with respect to each layer's output; the graph stays if it is still needed."""
        wanted = [outputs[layer] for layer in self.target_layers]
        gradients = torch.autograd.grad(score, wanted, retain_graph=self.guided, allow_unused=True)
        for layer, gradient in zip(self.target_layers, gradients, strict=True):
            if gradient is None:
                raise CallError(f"the class score does not depend on layer '{layer}'; choose another one")
        return dict(zip(self.target_layers, gradients, strict=True))

    def _maps_of(
        self, layer: str, output: Tensor, gradient: Tensor | None, inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """A layer's output and gradient as (N, C, h, w)."""
        activations = as_map(output, inputs.shape[2:])
        if activations is None:
            raise CallError(f"layer '{layer}' gives no spatial map but {_shape(output)} numbers; choose another one")
        return activations, None if gradient is None else as_map(gradient, inputs.shape[2:])

    def _map(
        self,
        method: str,
        layer: str,
        activations: Tensor,
        gradients: Tensor | None,
        inputs: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """One method's map of one layer, (N, h, w), before it is clipped and stretched."""
        if method == "eigencam":
            return principal_component(activations)
        if method == "eigengradcam":
            return principal_component(activations * gradients)
        if method in CHANNEL_WEIGHTS:
            weights = CHANNEL_WEIGHTS[method](activations, gradients)
        else:
            one_by_one = zip(activations, inputs.split(1), targets, strict=True)
            weights = torch.stack([self._weights_by_passes(method, layer, *photo) for photo in one_by_one])
        return torch.einsum("nc,nchw->nhw", weights, activations)

    def _weights_by_passes(
        self, method: str, layer: str, activations: Tensor, inputs: Tensor, target: Tensor
    ) -> Tensor:
        """The channel weights (C,) of the methods that ask the network again, for one input."""
        if method == "ablationcam":
            return ablation_weights(self._network, layer, inputs, target)
        if self.batch_size is None:
            self.batch_size = 8 if inputs.device.type != "cuda" else affordable_batch(self._network, inputs)
        return score_weights(self._network, activations, inputs, target, self.batch_size)


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
    return max(1, min(256, free // (2 * max(each, 1))))


# ---------------------------------------------------------------------------------------------------------------------
# 5  Pictures. What was found becomes JPEG files, each of them whole or not there.
# ---------------------------------------------------------------------------------------------------------------------

Picture = NDArray[np.uint8]  # RGB, (h, w, 3)

DEFAULT_LONG_SIDE = 1024  # pixels
JPEG_QUALITY = 95


def seen_picture(photo: Photo, box: tuple[float, float, float, float], long_side: int | None = None) -> Picture:
    """The part of the photo that the network saw, at the photo's own resolution but at most 1024 pixels long.

    Args:
        photo: the whole of it.
        box: left, top, right, bottom in the photo's pixels.
        long_side: another length for the long side; a small photo is enlarged to it.
    """
    left, top = round(box[0]), round(box[1])
    width, height = max(1, round(box[2] - box[0])), max(1, round(box[3] - box[1]))
    part = photo.pixels[top : top + height, left : left + width]
    longest = max(part.shape[:2])
    scale = (long_side or min(longest, DEFAULT_LONG_SIDE)) / longest
    width, height = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def draw_cam(picture: Picture, cam: Floats) -> Picture:
    """The map (H, W) in [0, 1] as colours from blue (0) to red (1), laid half and half over the picture."""
    enlarged = cv2.resize(cam, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = cv2.applyColorMap(np.uint8(255 * enlarged.clip(0, 1) + 0.5), cv2.COLORMAP_JET)
    return cv2.addWeighted(picture, 0.5, cv2.cvtColor(heat, cv2.COLOR_BGR2RGB), 0.5, 0)


def draw_gradients(gradients: Floats, width: int, height: int) -> Picture:
    """Gradients (3, H, W) as a picture: grey is zero; a brighter pixel would raise the score, a darker one lower it.

    The scale is set by the 99.5th percentile, so that a few extreme pixels do not turn all others grey.
    """
    strongest = float(np.percentile(np.abs(gradients), 99.5)) or float(np.abs(gradients).max()) or 1.0
    enlarged = cv2.resize(gradients.transpose(1, 2, 0), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.uint8((127.5 + 127.5 * enlarged / strongest).clip(0, 255) + 0.5)


def draw(picture: Picture, cam: Floats, guided: Floats | None, outputs: Sequence[str]) -> dict[str, Picture]:
    """The pictures that were asked for by their names in OUTPUTS, all as large as `picture`."""
    height, width = picture.shape[:2]
    painters = {
        "cam": lambda: draw_cam(picture, cam),
        "gb": lambda: draw_gradients(guided, width, height),
        "cam_gb": lambda: draw_gradients(guided * cam, width, height),
    }
    return {output: painters[output]() for output in outputs}


def file_names(method: str, stem: str, outputs: Sequence[str]) -> dict[str, str]:
    """The file name of each picture of the photo `stem`."""
    names = {"cam": f"{method}_cam_{stem}.jpg", "gb": f"gb_{stem}.jpg", "cam_gb": f"{method}_cam_gb_{stem}.jpg"}
    return {output: names[output] for output in outputs}


def plan_files(
    photos: Sequence[Path], folder: Path, method: str, outputs: Sequence[str]
) -> dict[Path, dict[str, Path]]:
    """Where the pictures of each photo go, named after its stem, or stem_2, stem_3 ... where that is taken.

    No picture goes over one of the photos, nor over a picture of another photo of this run.
    """
    taken = {_file_key(photo) for photo in photos}
    plan = {}
    for photo in photos:
        stems = itertools.chain([photo.stem], (f"{photo.stem}_{number}" for number in itertools.count(2)))
        for stem in stems:
            files = {output: folder / name for output, name in file_names(method, stem, outputs).items()}
            keys = {_file_key(file) for file in files.values()}
            if taken.isdisjoint(keys):
                break
        taken |= keys
        plan[photo] = files
    return plan


def _file_key(path: Path) -> str:
    return os.path.realpath(path).casefold()  # names that differ in case only are one file on Windows and macOS


def write_jpeg(path: Path, picture: Picture) -> None:
    """Writes a picture beside its place and moves it there, so that nobody ever finds half of one.

    Raises:
        OSError: the folder is gone, the disk is full ...
    """
    _, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    part = path.with_name(f".{os.getpid()}.part")
    try:
        part.write_bytes(encoded.tobytes())  # not cv2.imwrite, which fails on Chinese names under Windows
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# 6  Run. The rooms joined, photo by photo; a photo that fails does not stop the others.
# ---------------------------------------------------------------------------------------------------------------------


def batches(
    paths: Sequence[Path], classifier: Classifier, size: int
) -> Iterator[list[tuple[Photo, Tensor]] | PhotoError]:
    """Photos with their inputs in groups of `size`, and in between the errors of photos that cannot be read."""
    batch: list[tuple[Photo, Tensor]] = []
    for path in paths:
        try:
            photo = read_photo(path)
            batch.append((photo, classifier.preprocess(photo)))
        except PhotoError as error:
            yield error
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def explain_photos(
    paths: Sequence[Path], classifier: Classifier, explainer: Explainer, target: int | None, batch_size: int
) -> Iterator[tuple[Photo, Explanation] | PhotoError]:
    """Each photo with its explanation (N = 1), or what went wrong with it."""
    for batch in batches(paths, classifier, batch_size):
        if isinstance(batch, PhotoError):
            yield batch
            continue
        try:
            explanation = explainer(torch.stack([inputs for _, inputs in batch]), target)
        except CallError:
            raise
        except (RuntimeError, ValueError) as error:  # the input is too small for the network, the memory is full ...
            side = batch[0][1].shape[-1]
            for photo, _ in batch:
                yield PhotoError(f"{photo.path}: the network failed at {side} x {side}: {first_line(error)}")
            continue
        for index, (photo, _) in enumerate(batch):
            yield photo, explanation.only(index)


def probability(logits: Floats, target: int) -> float:
    """The probability of a class among logits (classes,): softmax, or sigmoid where there is one output only."""
    scores = torch.from_numpy(logits)
    return float(scores.sigmoid()[0] if len(scores) == 1 else scores.softmax(0)[target])


def save(
    photo: Photo, explanation: Explanation, classifier: Classifier, files: Mapping[str, Path], args: argparse.Namespace
) -> str:
    """Draws and writes the pictures of one photo. Returns the line that is printed for it.

    Raises:
        PhotoError: a picture cannot be written.
    """
    target, cam = int(explanation.targets[0]), explanation.cams[args.method][0]
    guided = None if explanation.guided is None else explanation.guided[0]
    name, chance = classifier.class_names[target], probability(explanation.logits[0], target)
    if not cam.any():
        note(f"{photo.path}: the {args.method} map is zero everywhere: nothing in the layer speaks for {name}")
    picture = seen_picture(photo, classifier.seen_box(*photo.pixels.shape[:2]), args.output_size)
    try:
        for output, drawn in draw(picture, cam, guided, list(files)).items():
            write_jpeg(files[output], drawn)
    except OSError as error:
        raise PhotoError(f"{photo.path}: its pictures cannot be written: {error.strerror or error}") from error
    return f"{photo.path}: {name} {chance:.3f} -> {', '.join(map(str, files.values()))}"


def run(args: argparse.Namespace) -> int:
    """Explains the photos that the command line names. Returns the exit status; raises CallError."""
    device = find_device(args.device)
    names = None if args.class_names is None else read_class_names(args.class_names)
    classifier = load_classifier(
        args.arch,
        args.ckpt,
        args.num_classes,
        device,
        class_names=names,
        input_size=args.input_size,
        resize=args.resize,
    )
    target = None if args.target_class is None else find_class(args.target_class, classifier.class_names)
    layers = None if args.target_layer is None else [args.target_layer]
    explainer = Explainer(classifier.model, [args.method], layers, guided=args.outputs != ["cam"])
    plan = plan_files(args.images, args.output, args.method, args.outputs)
    failures = 0
    for result in explain_photos(args.images, classifier, explainer, target, args.batch_size):
        try:
            if isinstance(result, PhotoError):
                raise result
            photo, explanation = result
            print(save(photo, explanation, classifier, plan[photo.path], args), flush=True)
        except PhotoError as error:
            failures += 1
            print(f"error: {error}", file=sys.stderr)
    return int(failures > 0)


def main(args: argparse.Namespace) -> int:
    """Runs the program. Returns the exit status: 0 done, 1 a photo failed, 2 a wrong call, 130 stopped by Ctrl-C."""
    warnings.filterwarnings("ignore")  # the libraries' warnings are nothing that the person can act on
    Image.MAX_IMAGE_PIXELS = None  # read_photo has a limit of its own, which is an error line
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end the run
    try:
        return run(args)
    except CallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(ARGS))
