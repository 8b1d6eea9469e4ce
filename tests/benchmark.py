"""Measure the program beside grad-cam, torch-cam and captum, and print a Markdown table.

    python tests/benchmark.py                    every row (about eight minutes on two cores)
    python tests/benchmark.py startup gradcam    the rows whose names contain one of the words
    python tests/benchmark.py --memory           also the peak memory of 500 and of 10,000 photos
    python tests/benchmark.py --device cuda      on a GPU: also batches of 1, 8, 32 and 128
    python tests/benchmark.py --metrics FOLDER   the mean metrics of each method over a folder

Both sides have the same weights, inputs and threads, and take turns. A time is a median. Rows that
run in this process are measured in three rounds. The round with the median ratio is printed, and
behind it the ratios of all three, by the clock and by CPU seconds. `pip install torchcam captum`
for the rows against these two. Beside other work on the machine set OMP_WAIT_POLICY=passive,
because waiting threads would take the cores from each other, and compare the CPU seconds.
"""

import argparse
import copy
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cnn_visualizations import (
    METHODS,
    Explainer,
    PhotoError,
    faithfulness,
    find_photos,
    load_classifier,
    read_photo,
)

PROGRAM = ROOT / "cnn_visualizations.py"
CKPT = ROOT / "tests" / "data" / "dogs_mobilenet_v2.pth"
DOG = ROOT / "pics" / "dog.jpg"
LAYERS = {"resnet50": "layer4", "vgg16": "features", "mobilenet_v2": "features", "demo": "features"}

# What a side computes of these two: "cam" (N, H, W), "guided" (N, 3, H, W).
Arrays = dict[str, np.ndarray]
Side = Callable[[], Arrays]
CLOCKS = ("wall", "cpu")
BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    work: str  # what was measured
    other: str  # what it was measured against
    theirs: str  # with its unit
    ours: str  # with its unit
    ratio: float  # the number that the goal is about
    goal: float | None  # of the issue; None: there is none
    at_most: bool = False  # whether the ratio must not be above the goal, else not below it
    details: str = ""  # ratios of all rounds, differences of the results, memory

    def line(self) -> str:
        cells = [self.work, self.other, self.theirs, self.ours, f"{self.ratio:.3g}"]
        return table_line([*cells, self.goal_cell(), self.details])

    def goal_cell(self) -> str:
        if self.goal is None:
            return ""
        if self.at_most:
            reached = self.ratio <= self.goal
            bound = "at most"
        else:
            reached = self.ratio >= self.goal
            bound = "at least"
        answer = "yes" if reached else "NO"
        return f"{bound} {self.goal:g}: {answer}"


Row = Callable[[str], Iterator[Result]]  # measures on a device


def table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def seconds(value: float) -> str:
    """Return a time with a unit that suits it."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{1000 * value:.3g} ms"


# --------------------------------------------------------------------------------------------------
# Networks and inputs
# --------------------------------------------------------------------------------------------------


@cache
def network(arch: str, device: str) -> nn.Module:
    """Return the demo's network, or one with random weights and trained batch norms."""
    if arch == "demo":
        return load_classifier(ckpt=CKPT, device=device).model
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(arch, weights=None)
    train_batch_norms(model)
    return model.eval().to(device)


def train_batch_norms(model: nn.Module) -> None:
    """Give each batch norm the statistics of its inputs, for inputs of noise."""
    has_norms = False
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all batches
            has_norms = True
    if not has_norms:
        return

    model.train()
    with torch.no_grad():
        for photo in torch.randn(4, 3, 224, 224).split(1):
            model(photo)


@cache
def photos(arch: str, device: str, count: int = 1) -> torch.Tensor:
    """Return inputs: the demo's photo, or noise with coarse structure."""
    if arch == "demo":
        classifier = load_classifier(ckpt=CKPT, device="cpu")
        return classifier.preprocess(read_photo(DOG))[None].to(device)
    torch.manual_seed(1)
    coarse = nn.functional.interpolate(torch.randn(count, 3, 14, 14), (224, 224), mode="bilinear")
    return (coarse + 0.1 * torch.randn(count, 3, 224, 224)).to(device)


@cache
def target_of(arch: str, device: str) -> int:
    """Return the predicted class: the map of another class may be zero everywhere."""
    with torch.no_grad():
        logits = network(arch, device)(photos(arch, device))
    return int(logits.argmax())


# --------------------------------------------------------------------------------------------------
# The two sides of a row in this process
# --------------------------------------------------------------------------------------------------


def ours(
    arch: str, device: str, methods: str = "gradcam", guided: bool = True, count: int = 1
) -> Side:
    """Our explainer; of several methods, the first one's map is compared."""
    explainer = Explainer(network(arch, device), methods.split(","), LAYERS[arch], guided=guided)
    inputs = photos(arch, device, count)
    target = target_of(arch, device)

    def explain() -> Arrays:
        explanation = explainer(inputs, target)
        arrays = {"cam": explanation.cams[explainer.methods[0]]}
        if guided:
            arrays["guided"] = explanation.guided
        return arrays

    return explain


def silence_progress_bars() -> None:
    """Replace the progress bars of grad-cam's slow methods, which cost time."""
    for name in ("ablation_cam", "score_cam"):
        module = importlib.import_module(f"pytorch_grad_cam.{name}")
        module.tqdm = argparse.Namespace(tqdm=iter)


def grad_cam(
    arch: str,
    device: str,
    kind: str = "GradCAM",
    guided: bool = True,
    count: int = 1,
    **options: Any,
) -> Side:
    """grad-cam's class as in its README, then its guided backpropagation, a photo at a time."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    silence_progress_bars()
    make_cam = getattr(pytorch_grad_cam, kind)
    model = copy.deepcopy(network(arch, device))
    layers = [model.get_submodule(LAYERS[arch])]
    inputs = photos(arch, device, count)
    target = target_of(arch, device)
    targets = [ClassifierOutputTarget(target)] * count

    def explain() -> Arrays:
        with make_cam(model=model, target_layers=layers, **options) as cam:
            arrays = {"cam": cam(input_tensor=inputs.clone(), targets=targets)}
        if guided:
            guide = pytorch_grad_cam.GuidedBackpropReLUModel(model=model, device=device)
            gradients = [guide(photo.clone(), target_category=target) for photo in inputs.split(1)]
            arrays["guided"] = np.stack(gradients).transpose(0, 3, 1, 2)
        return arrays

    return explain


def part_of_ablation_cam(arch: str, device: str, channels: int) -> Side:
    """grad-cam's Ablation-CAM that runs the first channels only."""
    from pytorch_grad_cam.ablation_layer import AblationLayer

    class FirstChannels(AblationLayer):
        def activations_to_be_ablated(self, activations, ratio_channels_to_ablate=1.0):
            self.indices = np.arange(channels, dtype=np.int32)
            return self.indices

    return grad_cam(arch, device, "AblationCAM", False, ablation_layer=FirstChannels())


def torch_cam(arch: str, device: str) -> Side:
    """torch-cam's GradCAM as in its README, its map enlarged to the input as its overlay does."""
    from torchcam.methods import GradCAM

    model = copy.deepcopy(network(arch, device))
    inputs = photos(arch, device)
    target = target_of(arch, device)
    extractor = GradCAM(model, target_layer=LAYERS[arch])

    def explain() -> Arrays:
        small = extractor(target, model(inputs))[0]
        maps = nn.functional.interpolate(small[None].float(), inputs.shape[2:], mode="bilinear")[0]
        return {"cam": stretch(maps)}

    return explain


def captum(arch: str, device: str) -> Side:
    """captum's LayerGradCam and GuidedBackprop."""
    from captum.attr import GuidedBackprop, LayerAttribution, LayerGradCam

    model = copy.deepcopy(network(arch, device))
    inputs = photos(arch, device)
    target = target_of(arch, device)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum's hooks need it
    layer_grad_cam = LayerGradCam(model, model.get_submodule(LAYERS[arch]))
    guided = GuidedBackprop(model)

    def explain() -> Arrays:
        small = layer_grad_cam.attribute(inputs, target=target, relu_attributions=True)
        maps = LayerAttribution.interpolate(small, inputs.shape[2:], "bilinear")[:, 0]
        gradients = guided.attribute(inputs.clone().requires_grad_(), target=target)
        return {"cam": stretch(maps), "guided": gradients.detach().cpu().numpy()}

    return explain


def stretch(maps: torch.Tensor) -> np.ndarray:
    """Return maps (N, H, W) stretched to [0, 1]."""
    values = maps.detach().cpu().numpy()
    values = values - values.min((1, 2), keepdims=True)
    return values / (1e-7 + values.max((1, 2), keepdims=True))


# --------------------------------------------------------------------------------------------------
# Rows in this process
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One run of a side."""

    wall: float  # seconds by the clock
    cpu: float  # seconds of all cores together
    peak: float  # MB: resident memory of a process; in this one, what the GPU took for the run
    arrays: Arrays = field(default_factory=dict)  # the results


Round = list[Measured]  # one for each side


def median(runs: Sequence[Measured]) -> Measured:
    """Return the last run with the median seconds of all."""
    wall = statistics.median(run.wall for run in runs)
    cpu = statistics.median(run.cpu for run in runs)
    return replace(runs[-1], wall=wall, cpu=cpu)


def run_by_turns(sides: Sequence[Callable[[], Measured]], runs: int) -> Round:
    """Return the median of the runs of each side."""
    runs_by_side = [[] for _ in sides]
    for _ in range(runs):
        for side, runs_of_side in zip(sides, runs_by_side, strict=True):
            runs_of_side.append(side())
    return [median(runs_of_side) for runs_of_side in runs_by_side]


def measure(side: Side, device: str) -> Measured:
    """Run a side once."""
    on_gpu = device.startswith("cuda")
    memory_before = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        memory_before = torch.cuda.memory_allocated(device)

    wall_before = time.perf_counter()
    cpu_before = time.process_time()
    arrays = side()
    if on_gpu:
        torch.cuda.synchronize(device)
    wall = time.perf_counter() - wall_before
    cpu = time.process_time() - cpu_before

    peak = 0.0
    if on_gpu:
        peak = (torch.cuda.max_memory_allocated(device) - memory_before) / 1e6
    return Measured(wall, cpu, peak, arrays)


def three_rounds(sides: list[Side], device: str, runs: int) -> list[Round]:
    """Return three rounds in which the sides take turns."""
    for side in sides:
        side()  # warms up
    measured_sides = [partial(measure, side, device) for side in sides]
    return [run_by_turns(measured_sides, runs) for _ in range(3)]


def compare(
    work: str,
    other: str,
    theirs: Callable[[str], Side],
    our: Callable[[str], Side],
    goal: float | None,
    device: str,
    *,
    runs: int = 9,
) -> Iterator[Result]:
    """Measure two sides by turns. The ratio says how many times as fast ours is."""
    rounds = three_rounds([theirs(device), our(device)], device, runs)
    yield judge(work, other, rounds, goal)


def judge(
    work: str, other: str, rounds: list[Round], goal: float | None, details: Iterable[str] = ()
) -> Result:
    """Return the line for the rounds of two sides."""
    rounds = sorted(rounds, key=lambda sides: sides[0].wall / sides[1].wall)
    theirs, our = rounds[len(rounds) // 2]

    details = list(details)
    details += ratios_of(rounds)
    details += differences(theirs.arrays, our.arrays)
    if our.peak:
        details.append(f"peak memory beyond the weights {theirs.peak:.0f} and {our.peak:.0f} MB")
    times = [seconds(theirs.wall), seconds(our.wall)]
    return Result(work, other, *times, theirs.wall / our.wall, goal, details="; ".join(details))


def ratios_of(rounds: list[Round]) -> Iterator[str]:
    """Yield the ratios of all rounds, by each clock."""
    for clock in CLOCKS:
        ratios = [getattr(theirs, clock) / getattr(our, clock) for theirs, our in rounds]
        yield f"ratios by {clock} " + ", ".join(f"{ratio:.3g}" for ratio in ratios)


def differences(theirs: Arrays, our: Arrays) -> Iterator[str]:
    """Yield the largest difference of each array that both have.

    That of guided gradients is a share of the largest gradient.
    """
    for name in sorted(theirs.keys() & our.keys()):
        difference = np.abs(our[name] - theirs[name]).max()
        if name == "guided":
            difference /= np.abs(theirs[name]).max()
        yield f"{name} differs by {difference:.0e}"


def against_grad_cam(
    arch: str, method: str, kind: str, goal: float, guided: bool = True, **options: int
) -> Row:
    """Return a row: one method by our explainer and by grad-cam's class `kind`."""
    subject = "the demo" if arch == "demo" else arch
    work = f"{method} + gb, {subject}" if guided else f"{method}, {subject}"
    theirs = partial(grad_cam, arch, kind=kind, guided=guided)
    our = partial(ours, arch, methods=method, guided=guided)
    return partial(compare, work, "grad-cam", theirs, our, goal, **options)


def heatmap_alone(arch: str, goal: float) -> Row:
    """Return a row: Grad-CAM without guided backpropagation, against torch-cam."""
    theirs = partial(torch_cam, arch)
    our = partial(ours, arch, guided=False)
    return partial(compare, f"gradcam alone, {arch}", "torch-cam", theirs, our, goal, runs=15)


def against_captum(arch: str, goal: float) -> Row:
    """Return a row: gradcam + gb, against captum."""
    theirs = partial(captum, arch)
    our = partial(ours, arch)
    return partial(compare, f"gradcam + gb, {arch}", "captum", theirs, our, goal)


def five_methods(arch: str) -> Row:
    """Return a row: five methods of one pass, against one of them."""
    one = partial(ours, arch)
    five = partial(ours, arch, methods="gradcam,gradcam++,xgradcam,eigencam,eigengradcam")
    work = f"five methods at once + gb, {arch}"
    return partial(compare, work, "gradcam + gb alone, ours", one, five, None)


def ablation_cam(device: str) -> Iterator[Result]:
    """Extrapolate grad-cam's 2,048 channels from none and 32 of them."""
    sides = [
        part_of_ablation_cam("resnet50", device, channels=0),
        part_of_ablation_cam("resnet50", device, channels=32),
        ours("resnet50", device, "ablationcam", guided=False),
    ]
    rounds = []
    for none, some, our in three_rounds(sides, device, runs=3):
        wall = none.wall + 2048 / 32 * (some.wall - none.wall)
        cpu = none.cpu + 2048 / 32 * (some.cpu - none.cpu)
        rounds.append([replace(none, wall=wall, cpu=cpu, arrays={}), our])
    details = ["from 32 of grad-cam's 2,048 channels"]
    yield judge("ablationcam, resnet50 layer4", "grad-cam", rounds, 100, details)


def batches(device: str) -> Iterator[Result]:
    """Measure gradcam + gb on resnet50 by batch size.

    On a GPU grad-cam runs in TF32, as torch does; ours does not.
    """
    for count in BATCHES:
        work = f"gradcam + gb, resnet50, batch of {count}"
        theirs = partial(grad_cam, "resnet50", count=count)
        our = partial(ours, "resnet50", count=count)
        yield from compare(work, "grad-cam", theirs, our, None, device, runs=3)


# --------------------------------------------------------------------------------------------------
# Rows of whole processes
# --------------------------------------------------------------------------------------------------

PLAIN_SCRIPT = """
import sys

import cv2
import numpy as np
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM, GuidedBackpropReLUModel
from pytorch_grad_cam.utils.image import deprocess_image, show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision import models, transforms

checkpoint, device, photo, out = sys.argv[1:]
model = models.resnet50(num_classes=10)
model.load_state_dict(torch.load(checkpoint, map_location="cpu"))
model.eval().to(device)
resize = transforms.Compose([transforms.Resize(232), transforms.CenterCrop(224)])
normalise = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
picture = resize(Image.open(photo).convert("RGB"))
inputs = normalise(picture)[None].to(device)
target = int(model(inputs).argmax())
with GradCAM(model=model, target_layers=[model.layer4]) as cam:
    heat = cam(input_tensor=inputs, targets=[ClassifierOutputTarget(target)])[0]
gradients = GuidedBackpropReLUModel(model=model, device=device)(inputs, target_category=target)
shown = show_cam_on_image(np.float32(picture) / 255, heat, use_rgb=True)
cv2.imwrite(f"{out}/cam.jpg", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
cv2.imwrite(f"{out}/gb.jpg", deprocess_image(gradients))
cv2.imwrite(f"{out}/cam_gb.jpg", deprocess_image(gradients * heat[:, :, None]))
"""

# It starts the process that is measured: on Linux a new process takes over the peak memory of a
# large parent.
LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
finished = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
wall = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss * unit / 1e6]))
sys.exit(finished.returncode)
"""
WORKSHOP = tempfile.TemporaryDirectory()  # is deleted when this process ends
FOLDERS = itertools.count()


def run_process(*arguments: object) -> Measured:
    """Run Python with these arguments as a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    launcher = [sys.executable, "-c", LAUNCHER, *command]
    finished = subprocess.run(launcher, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)}\n{finished.stderr}")
    return Measured(*json.loads(finished.stdout))


@cache
def checkpoint(arch: str) -> Path:
    """Return a checkpoint of 10 classes with random weights."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    path = Path(WORKSHOP.name) / f"{arch}.pth"
    torch.save(get_model(arch, weights=None, num_classes=10).state_dict(), path)
    return path


@cache
def photo_folder(count: int) -> Path:
    """Return a folder with photos like the demo's, each shifted."""
    folder = Path(WORKSHOP.name) / f"{count} photos"
    folder.mkdir()
    pixels = read_photo(DOG)
    for number in range(count):
        shifted = np.roll(pixels, 7 * number, axis=1)
        Image.fromarray(shifted).save(folder / f"{number:05}.jpg", quality=90)
    return folder


@cache
def small_photo_folder(count: int, side: int) -> Path:
    """Return a folder with one small square photo many times."""
    folder = Path(WORKSHOP.name) / f"{count} small photos"
    folder.mkdir()
    first = folder / "00000.jpg"
    Image.fromarray(read_photo(DOG)).resize((side, side)).save(first)
    for number in range(1, count):
        shutil.copy(first, folder / f"{number:05}.jpg")
    return folder


def our_process(device: str, arch: str, *arguments: object) -> Measured:
    """Run the program, with an output folder of its own."""
    output = Path(WORKSHOP.name) / f"out{next(FOLDERS)}"
    options = ["--ckpt", checkpoint(arch), "--arch", arch, "--device", device, "--output", output]
    return run_process(PROGRAM, *options, *arguments)


def plain_process(device: str) -> Measured:
    """Run a plain grad-cam script: the same three pictures of one photo on resnet50."""
    script = Path(WORKSHOP.name) / "plain.py"
    script.write_text(PLAIN_SCRIPT, encoding="utf-8")
    return run_process(script, checkpoint("resnet50"), device, DOG, WORKSHOP.name)


def startup(device: str) -> Iterator[Result]:
    """Measure one photo on resnet50 as a whole process, and --help, in four alternating runs."""
    sides = [
        partial(run_process, "-c", "import torch"),
        partial(plain_process, device),
        partial(our_process, device, "resnet50", DOG),
        partial(run_process, PROGRAM, "--help"),
    ]
    for side in sides:
        side()  # fills the disk cache
    bare, plain, program, asked_for_help = run_by_turns(sides, runs=4)

    work = "one photo, resnet50, whole process"
    times = [f"{bare.cpu:.2f} s CPU", f"{program.cpu:.2f} s CPU"]
    yield Result(work, "import torch alone", *times, program.cpu / bare.cpu, 1.6, at_most=True)

    times = [f"{plain.wall:.2f} s", f"{program.wall:.2f} s"]
    peaks = f"peak memory {plain.peak:.0f} and {program.peak:.0f} MB"
    ratio = program.wall / plain.wall
    yield Result(work, "a grad-cam script", *times, ratio, 0.6, at_most=True, details=peaks)

    times = ["", seconds(asked_for_help.wall)]
    yield Result("--help", "(seconds)", *times, asked_for_help.wall, 0.3, at_most=True)


def folder(device: str, count: int = 100) -> Iterator[Result]:
    """Measure a folder of photos on resnet50, and how busy the cores are once it has started."""
    few = count // 5
    sides = [
        partial(plain_process, device),
        partial(our_process, device, "resnet50", photo_folder(few)),
        partial(our_process, device, "resnet50", photo_folder(count)),
    ]
    plain, short, long = run_by_turns(sides, runs=3)

    loop = count * plain.wall
    started = long.wall - short.wall  # seconds for count - few photos, without the start
    rate = (count - few) / started
    details = f"the loop's time from 3 of its {count} runs; {rate:.1f} photos a second once started"
    work = f"folder of {count} photos, resnet50"
    other = "a grad-cam script in a shell loop"
    times = [seconds(loop), seconds(long.wall)]
    yield Result(work, other, *times, loop / long.wall, 20, details=details)

    cores = os.cpu_count() or 1
    busy = (long.cpu - short.cpu) / started
    work = "cores busy while the photos go through"
    times = [f"{cores} cores", f"{busy:.2f} busy"]
    yield Result(work, "all of the cores", *times, busy / cores, 0.85)


def memory(device: str) -> Iterator[Result]:
    """Measure the peak memory of 500 and of 10,000 small photos through a SqueezeNet."""
    run = partial(our_process, device, "squeezenet1_1", "--input-size", 64, "--output-size", 64)
    few = run(small_photo_folder(500, 64)).peak
    many = run(small_photo_folder(10_000, 64)).peak
    work = "peak memory of 10,000 photos"
    times = [f"{few:.0f} MB", f"{many:.0f} MB"]
    yield Result(work, "of 500 photos", *times, many / few, 1.1, at_most=True)


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

ROWS: dict[str, Row] = {
    "gradcam-resnet50": against_grad_cam("resnet50", "gradcam", "GradCAM", 3.6, runs=15),
    "gradcam-vgg16": against_grad_cam("vgg16", "gradcam", "GradCAM", 4.2, runs=3),
    "heatmap-resnet50": heatmap_alone("resnet50", 1),
    "heatmap-mobilenet_v2": heatmap_alone("mobilenet_v2", 1.5),
    "captum-resnet50": against_captum("resnet50", 1.7),
    "five-resnet50": five_methods("resnet50"),
    "ablationcam-resnet50": ablation_cam,
    "scorecam-demo": against_grad_cam("demo", "scorecam", "ScoreCAM", 2.2, guided=False, runs=1),
    "startup": startup,
    "folder": folder,
    "memory": memory,
    "batches": batches,
}
HEADINGS = ["work", "other", "other's time", "ours", "ratio", "goal", "details"]
PACKAGES = {"heatmap": "torchcam", "captum": "captum"}  # that a row needs beside the program's own


def version_of(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def chip(device: str) -> str:
    """Return the name of the GPU or of the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def machine(device: str) -> str:
    """Return the machine and the versions, in one line."""
    packages = ("torch", "torchvision", "grad-cam", "torchcam", "captum")
    versions = ", ".join(f"{package} {version_of(package)}" for package in packages)
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{chip(device)}, {torch.get_num_threads()} threads, {system}; {versions}"


def rows_named(words: list[str]) -> list[str]:
    """Return the names of the rows that contain one of the words."""
    names = []
    for name in ROWS:
        if any(word in name for word in words):
            names.append(name)
    return names


def default_rows(device: str) -> list[str]:
    """Return the names of all rows but those that take long or need a GPU."""
    names = list(ROWS)
    names.remove("memory")
    if not device.startswith("cuda"):
        names.remove("batches")
    return names


def is_runnable(name: str) -> bool:
    """Return whether the package of a row is installed; warn if it is not."""
    package = PACKAGES.get(name.partition("-")[0])
    if package is None or version_of(package):
        return True
    print(f"warning: {package} is not installed; {name} is left out", file=sys.stderr)
    return False


def print_rows(names: Iterable[str], device: str) -> None:
    """Measure and print these rows, each as soon as it is measured."""
    print(machine(device))
    print()
    print(table_line(HEADINGS))
    print(table_line(["---"] * len(HEADINGS)))
    for name in names:
        for result in ROWS[name](device=device):
            print(result.line(), flush=True)


def mean_metrics(folder: Path, ckpt: Path, device: str) -> tuple[int, dict[str, dict[str, float]]]:
    """Return the number of readable photos of a folder, and each method's mean metrics over them.

    Each photo is explained for its prediction.
    """
    classifier = load_classifier(ckpt=ckpt, device=device)
    explainer = Explainer(classifier.model, METHODS, guided=False)
    count = 0
    sums = {method: Counter() for method in METHODS}
    for photo in find_photos([str(folder)]):
        try:
            inputs = classifier.preprocess(read_photo(photo.path))[None]
        except PhotoError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        count += 1
        explanation = explainer(inputs)
        target = int(explanation.targets[0])
        for method, cams in explanation.cams.items():
            sums[method].update(faithfulness(explainer, inputs, cams[0], target))

    if not count:
        sys.exit(f"error: no photo of {folder} can be read")
    means = {}
    for method, metrics in sums.items():
        means[method] = {metric: total / count for metric, total in metrics.items()}
    return count, means


def print_metrics(folder: Path, ckpt: Path, device: str) -> None:
    """Print each method's mean metrics over the photos of a folder."""
    count, means = mean_metrics(folder, ckpt, device)
    metrics = list(means[METHODS[0]])
    print(f"{count} photos of {folder}, {ckpt.name}")
    print()
    print(table_line(["method", *metrics]))
    print(table_line(["---"] * (1 + len(metrics))))
    for method, values in means.items():
        cells = [f"{values[metric]:.3f}" for metric in metrics]
        print(table_line([method, *cells]))


def make_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    names = f"parts of the names of rows: {', '.join(ROWS)}"
    parser.add_argument("rows", nargs="*", metavar="ROW", help=names)
    parser.add_argument("--device", default="cpu")

    text = "also the row that runs 10,000 photos (minutes)"
    parser.add_argument("--memory", action="store_true", help=text)

    text = "instead: what the maps are worth"
    parser.add_argument("--metrics", type=Path, metavar="FOLDER", help=text)

    text = "for --metrics, instead of the demo"
    parser.add_argument("--ckpt", type=Path, default=CKPT, help=text)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.metrics:
        print_metrics(args.metrics, args.ckpt, args.device)
        return

    for word in args.rows:
        if not rows_named([word]):
            parser.error(f"no row has '{word}' in its name; the rows: {', '.join(ROWS)}")
    names = rows_named(args.rows) if args.rows else default_rows(args.device)
    if args.memory and "memory" not in names:
        names.append("memory")
    print_rows(filter(is_runnable, names), args.device)


if __name__ == "__main__":
    main()
