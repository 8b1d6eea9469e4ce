"""Measure the program side by side with grad-cam, torch-cam and captum, and print a Markdown table.

    python tests/benchmark.py                       every row (about eight minutes on two cores)
    python tests/benchmark.py startup gradcam       the rows whose names contain one of the words
    python tests/benchmark.py --memory              also the peak memory of 500 and of 10,000 photos
    python tests/benchmark.py --device cuda         on a GPU: also rows for batches of 1, 8, 32 and 128
    python tests/benchmark.py --metrics FOLDER      the mean metrics of each method over the photos of a folder

Both sides have the same weights, inputs and threads, and take turns. A time is a median. Rows that run in this process
are measured in three rounds; the round with the median ratio is printed, and behind it the ratios of all three, by the
clock and by CPU seconds. `pip install torchcam captum` for the rows against these two. Beside other work on the
machine set OMP_WAIT_POLICY=passive, or waiting threads take the cores from each other, and look at the CPU seconds.
"""

import argparse
import copy
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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

Arrays = dict[
    str, np.ndarray
]  # "cam" (N, H, W), "guided" (N, 3, H, W): what a side computes of the two
Side = Callable[[], Arrays]
CLOCKS = ("wall", "cpu")
BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        work: what was measured.
        other: what it was measured against.
        theirs, ours: with their units.
        ratio: the number that the goal is about.
        goal: of the issue; None where there is none.
        at_most: whether the ratio must not be above the goal, else not below it.
        details: ratios of all rounds, differences of the results, memory.
    """

    work: str
    other: str
    theirs: str
    ours: str
    ratio: float
    goal: float | None
    at_most: bool = False
    details: str = ""

    def line(self) -> str:
        goal = ""
        if self.goal is not None:
            reached = self.ratio <= self.goal if self.at_most else self.ratio >= self.goal
            goal = f"at {'most' if self.at_most else 'least'} {self.goal:g}: {'yes' if reached else 'NO'}"
        cells = (
            self.work,
            self.other,
            self.theirs,
            self.ours,
            f"{self.ratio:.3g}",
            goal,
            self.details,
        )
        return f"| {' | '.join(cells)} |"


def seconds(value: float) -> str:
    """Return a time with a unit that suits it."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


# ---------------------------------------------------------------------------------------------------------------------
# Networks and inputs
# ---------------------------------------------------------------------------------------------------------------------


@cache
def network(arch: str, device: str) -> nn.Module:
    """Return the demo's network, or one with random weights and batch norms that know the statistics of its layers."""
    if arch == "demo":
        return load_classifier(ckpt=CKPT, device=device).model
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(arch, weights=None)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean over all batches
    if norms:
        model.train()
        with torch.no_grad():
            for photo in torch.randn(4, 3, 224, 224).split(1):
                model(photo)
    return model.eval().to(device)


@cache
def photos(arch: str, device: str, count: int = 1) -> torch.Tensor:
    """Return inputs: the demo's photo, or noise with coarse structure."""
    if arch == "demo":
        return load_classifier(ckpt=CKPT, device="cpu").preprocess(read_photo(DOG))[None].to(device)
    torch.manual_seed(1)
    coarse = nn.functional.interpolate(torch.randn(count, 3, 14, 14), (224, 224), mode="bilinear")
    return (coarse + 0.1 * torch.randn(count, 3, 224, 224)).to(device)


@cache
def target_of(arch: str, device: str) -> int:
    """Return the predicted class: the map of another class may be zero everywhere."""
    with torch.no_grad():
        return int(network(arch, device)(photos(arch, device)).argmax())


# ---------------------------------------------------------------------------------------------------------------------
# The two sides of a row in this process
# ---------------------------------------------------------------------------------------------------------------------


def ours(
    arch: str, device: str, methods: str = "gradcam", guided: bool = True, count: int = 1
) -> Side:
    """Our explainer; of several methods, the first one's map is compared."""
    explainer = Explainer(network(arch, device), methods.split(","), LAYERS[arch], guided=guided)
    inputs, target = photos(arch, device, count), target_of(arch, device)

    def explain() -> Arrays:
        explanation = explainer(inputs, target)
        arrays = {"cam": explanation.cams[explainer.methods[0]]}
        return {**arrays, "guided": explanation.guided} if guided else arrays

    return explain


def grad_cam(
    arch: str,
    device: str,
    kind: str = "GradCAM",
    guided: bool = True,
    count: int = 1,
    **options: Any,
) -> Side:
    """grad-cam's class as in its README, then its GuidedBackpropReLUModel, which takes one photo at a time."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    for name in ("ablation_cam", "score_cam"):  # their progress bars cost time
        importlib.import_module(f"pytorch_grad_cam.{name}").tqdm = argparse.Namespace(
            tqdm=lambda steps: steps
        )
    model = copy.deepcopy(network(arch, device))
    inputs, target = photos(arch, device, count), target_of(arch, device)

    def explain() -> Arrays:
        layers = [model.get_submodule(LAYERS[arch])]
        with getattr(pytorch_grad_cam, kind)(model=model, target_layers=layers, **options) as cam:
            arrays = {
                "cam": cam(
                    input_tensor=inputs.clone(), targets=[ClassifierOutputTarget(target)] * count
                )
            }
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

    model, inputs, target = (
        copy.deepcopy(network(arch, device)),
        photos(arch, device),
        target_of(arch, device),
    )
    extractor = GradCAM(model, target_layer=LAYERS[arch])

    def explain() -> Arrays:
        small = extractor(target, model(inputs))[0]
        maps = nn.functional.interpolate(small[None].float(), inputs.shape[2:], mode="bilinear")[0]
        return {"cam": stretch(maps)}

    return explain


def captum(arch: str, device: str) -> Side:
    """captum's LayerGradCam and GuidedBackprop."""
    from captum.attr import GuidedBackprop, LayerAttribution, LayerGradCam

    model, inputs, target = (
        copy.deepcopy(network(arch, device)),
        photos(arch, device),
        target_of(arch, device),
    )
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # captum's hooks need it
    heat, guided = LayerGradCam(model, model.get_submodule(LAYERS[arch])), GuidedBackprop(model)

    def explain() -> Arrays:
        small = heat.attribute(inputs, target=target, relu_attributions=True)
        maps = LayerAttribution.interpolate(small, inputs.shape[2:], "bilinear")[:, 0]
        gradients = guided.attribute(inputs.clone().requires_grad_(), target=target)
        return {"cam": stretch(maps), "guided": gradients.detach().cpu().numpy()}

    return explain


def stretch(maps: torch.Tensor) -> np.ndarray:
    """Return maps (N, H, W) stretched to [0, 1]."""
    found = maps.detach().cpu().numpy()
    found = found - found.min((1, 2), keepdims=True)
    return found / (1e-7 + found.max((1, 2), keepdims=True))


# ---------------------------------------------------------------------------------------------------------------------
# Rows in this process
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One run: seconds by the clock and of all cores together, the peak of memory in MB, and the results.

    The peak of a process is its resident memory; in this process, the GPU's memory beyond what was taken before.
    """

    wall: float
    cpu: float
    peak: float
    arrays: Arrays = field(default_factory=dict)


def median(runs: Sequence[Measured]) -> Measured:
    """Return the last run with the median seconds of all."""
    return replace(
        runs[-1], **{name: statistics.median(getattr(run, name) for run in runs) for name in CLOCKS}
    )


def measure(side: Side, device: str) -> Measured:
    """Run a side once."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    wall, cpu = time.perf_counter(), time.process_time()
    arrays = side()
    if on_gpu:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Measured(
        wall,
        cpu,
        (torch.cuda.max_memory_allocated(device) - before) / 1e6 if on_gpu else 0.0,
        arrays,
    )


def take_turns(sides: list[Side], device: str, runs: int) -> Iterator[list[Measured]]:
    """Yield three rounds: the median of the runs of each side."""
    for side in sides:
        side()  # warms up
    for _ in range(3):
        by_side = zip(
            *[[measure(side, device) for side in sides] for _ in range(runs)], strict=True
        )
        yield [*map(median, by_side)]


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
    rounds = [*take_turns([theirs(device), our(device)], device, runs)]
    yield judge(work, other, rounds, goal)


def judge(
    work: str, other: str, rounds: list[list[Measured]], goal: float | None, details: str = ""
) -> Result:
    """Return the line for the rounds of two sides."""
    rounds = sorted(rounds, key=lambda sides: sides[0].wall / sides[1].wall)
    theirs, our = rounds[len(rounds) // 2]
    details = [details] if details else []
    for name in CLOCKS:
        ratios = [getattr(theirs, name) / getattr(our, name) for theirs, our in rounds]
        details.append(f"ratios by {name} " + ", ".join(f"{ratio:.3g}" for ratio in ratios))
    for what in sorted(theirs.arrays.keys() & our.arrays.keys()):
        scale = 1 if what == "cam" else np.abs(theirs.arrays[what]).max()
        details.append(
            f"{what} differs by {np.abs(our.arrays[what] - theirs.arrays[what]).max() / scale:.0e}"
        )
    if our.peak:
        details.append(f"peak memory beyond the weights {theirs.peak:.0f} and {our.peak:.0f} MB")
    times = seconds(theirs.wall), seconds(our.wall)
    return Result(work, other, *times, theirs.wall / our.wall, goal, details="; ".join(details))


def against_grad_cam(
    arch: str, method: str, kind: str, goal: float, guided: bool = True, **options: int
) -> Callable[[str], Iterator[Result]]:
    """Return a row: one method by our explainer and by grad-cam's class `kind`."""
    work = f"{method}{' + gb' if guided else ''}, {arch if arch != 'demo' else 'the demo'}"
    theirs, our = (
        partial(grad_cam, arch, kind=kind, guided=guided),
        partial(ours, arch, methods=method, guided=guided),
    )
    return partial(compare, work, "grad-cam", theirs, our, goal, **options)


def heatmap_alone(arch: str) -> Callable[[str], Iterator[Result]]:
    """Return a row: Grad-CAM without guided backpropagation, against torch-cam."""
    sides = partial(torch_cam, arch), partial(ours, arch, guided=False)
    return partial(compare, f"gradcam alone, {arch}", "torch-cam", *sides, 1, runs=15)


def ablation_cam(device: str) -> Iterator[Result]:
    """Extrapolate grad-cam's 2,048 channels from none and 32 of them."""
    sides = [part_of_ablation_cam("resnet50", device, channels) for channels in (0, 32)]
    sides.append(ours("resnet50", device, "ablationcam", guided=False))
    rounds = []
    for none, some, our in take_turns(sides, device, runs=3):
        whole = {name: getattr(none, name) * (1 - 64) + getattr(some, name) * 64 for name in CLOCKS}
        rounds.append([replace(none, arrays={}, **whole), our])
    yield judge(
        "ablationcam, resnet50 layer4",
        "grad-cam",
        rounds,
        100,
        "from 32 of grad-cam's 2,048 channels",
    )


def batches(device: str) -> Iterator[Result]:
    """Measure gradcam + gb on resnet50 by batch size. On a GPU grad-cam runs in TF32, as torch does; ours does not."""
    for count in BATCHES:
        work = f"gradcam + gb, resnet50, batch of {count}"
        sides = partial(grad_cam, "resnet50", count=count), partial(ours, "resnet50", count=count)
        yield from compare(work, "grad-cam", *sides, None, device, runs=3)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of whole processes
# ---------------------------------------------------------------------------------------------------------------------

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

# It starts the process that is measured, since on Linux a new process takes over the peak memory of a large parent.
LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
finished = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss * unit / 1e6]))
sys.exit(finished.returncode)
"""
WORKSHOP = tempfile.TemporaryDirectory()  # is deleted when this process ends
FOLDERS = itertools.count()


def run_process(*arguments: object) -> Measured:
    """Run Python with these arguments as a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    finished = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True
    )
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
def photo_folder(count: int, side: int | None = None) -> Path:
    """Return a folder with photos like the demo's, each shifted; with `side`, one small square one many times."""
    folder = Path(WORKSHOP.name) / f"{count} photos of {side}"
    folder.mkdir()
    pixels = read_photo(DOG)
    small = folder.parent / "small.jpg"
    Image.fromarray(pixels).resize((side or 8, side or 8)).save(small)
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        if side:
            path.write_bytes(small.read_bytes())
        else:
            Image.fromarray(np.roll(pixels, 7 * number, 1)).save(path, quality=90)
    return folder


def our_process(device: str, arch: str, *arguments: object) -> Measured:
    """Run the program, with an output folder of its own."""
    options = ["--ckpt", checkpoint(arch), "--arch", arch, "--device", device]
    return run_process(
        PROGRAM, *options, "--output", Path(WORKSHOP.name) / f"out{next(FOLDERS)}", *arguments
    )


def plain_process(device: str) -> Measured:
    """Run a plain grad-cam script, which writes the same three pictures of one photo on resnet50."""
    script = Path(WORKSHOP.name) / "plain.py"
    script.write_text(PLAIN_SCRIPT, encoding="utf-8")
    return run_process(script, checkpoint("resnet50"), device, DOG, WORKSHOP.name)


def startup(device: str) -> Iterator[Result]:
    """Measure one photo on resnet50 as a whole process, and --help, in four alternating runs."""
    sides = [
        lambda: run_process("-c", "import torch"),
        lambda: plain_process(device),
        lambda: our_process(device, "resnet50", DOG),
        lambda: run_process(PROGRAM, "--help"),
    ]
    for side in sides:
        side()  # fills the disk cache
    runs = zip(*[[side() for side in sides] for _ in range(4)], strict=True)
    bare, plain, program, asked_for_help = map(median, runs)
    work, peaks = (
        "one photo, resnet50, whole process",
        f"peak memory {plain.peak:.0f} and {program.peak:.0f} MB",
    )
    times = f"{bare.cpu:.2f} s CPU", f"{program.cpu:.2f} s CPU"
    yield Result(work, "import torch alone", *times, program.cpu / bare.cpu, 1.8, at_most=True)
    times = f"{plain.wall:.2f} s", f"{program.wall:.2f} s"
    yield Result(
        work,
        "a grad-cam script",
        *times,
        program.wall / plain.wall,
        0.6,
        at_most=True,
        details=peaks,
    )
    yield Result(
        "--help",
        "(seconds)",
        "",
        seconds(asked_for_help.wall),
        asked_for_help.wall,
        0.3,
        at_most=True,
    )


def folder(device: str, count: int = 100) -> Iterator[Result]:
    """Measure a folder of photos on resnet50, and how busy the cores are once the program has started."""
    few, many = photo_folder(count // 5), photo_folder(count)
    runs = [
        (
            plain_process(device),
            our_process(device, "resnet50", few),
            our_process(device, "resnet50", many),
        )
        for _ in range(3)
    ]
    plain, short, long = map(median, zip(*runs, strict=True))
    loop, rate = count * plain.wall, (count - count // 5) / (long.wall - short.wall)
    details = f"the loop's time from 3 of its {count} runs; {rate:.1f} photos a second once started"
    work, times = f"folder of {count} photos, resnet50", (seconds(loop), seconds(long.wall))
    yield Result(
        work, "a grad-cam script in a shell loop", *times, loop / long.wall, 20, details=details
    )
    busy, cores = (long.cpu - short.cpu) / (long.wall - short.wall), os.cpu_count() or 1
    work, times = "cores busy while the photos go through", (f"{cores} cores", f"{busy:.2f} busy")
    yield Result(work, "all of the cores", *times, busy / cores, 0.85)


def memory(device: str) -> Iterator[Result]:
    """Measure the peak memory of 500 and of 10,000 small photos through a SqueezeNet."""
    options = ["--input-size", 64, "--output-size", 64]
    few, many = (
        our_process(device, "squeezenet1_1", *options, photo_folder(n, 64)).peak
        for n in (500, 10_000)
    )
    times = f"{few:.0f} MB", f"{many:.0f} MB"
    yield Result(
        "peak memory of 10,000 photos", "of 500 photos", *times, many / few, 1.1, at_most=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

FIVE = "gradcam,gradcam++,xgradcam,eigencam,eigengradcam"
ROWS: dict[str, Callable[[str], Iterator[Result]]] = {
    "gradcam-resnet50": against_grad_cam("resnet50", "gradcam", "GradCAM", 3.6, runs=15),
    "gradcam-vgg16": against_grad_cam("vgg16", "gradcam", "GradCAM", 5, runs=3),
    "heatmap-resnet50": heatmap_alone("resnet50"),
    "heatmap-mobilenet_v2": heatmap_alone("mobilenet_v2"),
    "captum-resnet50": partial(
        compare,
        "gradcam + gb, resnet50",
        "captum",
        partial(captum, "resnet50"),
        partial(ours, "resnet50"),
        1.8,
    ),
    "five-resnet50": partial(
        compare,
        "five methods at once + gb, resnet50",
        "gradcam + gb alone, ours",
        partial(ours, "resnet50"),
        partial(ours, "resnet50", methods=FIVE),
        None,
    ),
    "ablationcam-resnet50": ablation_cam,
    "scorecam-demo": against_grad_cam("demo", "scorecam", "ScoreCAM", 3.5, guided=False, runs=1),
    "startup": startup,
    "folder": folder,
    "memory": memory,
    "batches": batches,
}
PACKAGES = {"heatmap": "torchcam", "captum": "captum"}  # that a row needs beside the program's own


def version_of(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine(device: str) -> str:
    """Return the machine and the versions, in one line."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    chip = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    versions = [
        f"{name} {version_of(name)}"
        for name in ("torch", "torchvision", "grad-cam", "torchcam", "captum")
    ]
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{chip}, {torch.get_num_threads()} threads, {system}; {', '.join(versions)}"


def chosen_rows(words: list[str], device: str, with_memory: bool) -> list[str]:
    """Return the names that contain one of the words; without words, all but those that take long or need a GPU."""
    names = [name for name in ROWS if any(word in name for word in words)]
    if not words:
        left_out = {"memory"} | (set() if device.startswith("cuda") else {"batches"})
        names = [name for name in ROWS if name not in left_out]
    names += ["memory"] if with_memory and "memory" not in names else []
    for name in list(names):
        package = PACKAGES.get(name.partition("-")[0])
        if package and not version_of(package):
            print(f"warning: {package} is not installed; {name} is left out", file=sys.stderr)
            names.remove(name)
    return names


def print_metrics(folder: Path, ckpt: Path, device: str) -> None:
    """Print each method's mean metrics over the photos of a folder, each explained for its prediction."""
    classifier = load_classifier(ckpt=ckpt, device=device)
    explainer = Explainer(classifier.model, METHODS, guided=False)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for photo in find_photos([str(folder)]):
        try:
            inputs = classifier.preprocess(read_photo(photo.path))[None]
        except PhotoError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        explanation = explainer(inputs)
        for method, cams in explanation.cams.items():
            found[method].append(
                faithfulness(explainer, inputs, cams[0], int(explanation.targets[0]))
            )
    photos_done = found[METHODS[0]]
    if not photos_done:
        sys.exit(f"error: no photo of {folder} can be read")
    print(
        f"{len(photos_done)} photos of {folder}, {ckpt.name}\n\n| method | {' | '.join(photos_done[0])} |"
    )
    print(f"|{'---|' * (1 + len(photos_done[0]))}")
    for method, of_photos in found.items():
        means = [
            statistics.mean(values) for values in zip(*map(dict.values, of_photos), strict=True)
        ]
        print(f"| {method} | {' | '.join(f'{mean:.3f}' for mean in means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"parts of the names of rows: {', '.join(ROWS)}"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--memory", action="store_true", help="also the row that runs 10,000 photos (minutes)"
    )
    parser.add_argument(
        "--metrics", type=Path, metavar="FOLDER", help="instead: what the maps are worth"
    )
    parser.add_argument(
        "--ckpt", type=Path, default=CKPT, help="for --metrics, instead of the demo"
    )
    args = parser.parse_args()
    if args.metrics:
        print_metrics(args.metrics, args.ckpt, args.device)
        return
    unknown = [word for word in args.rows if not any(word in name for name in ROWS)]
    if unknown:
        parser.error(f"no row has '{unknown[0]}' in its name; the rows: {', '.join(ROWS)}")
    names = chosen_rows(args.rows, args.device, args.memory)
    headings = ("work", "other", "other's time", "ours", "ratio", "goal", "details")
    print(f"{machine(args.device)}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for name in names:
        for result in ROWS[name](device=args.device):
            print(result.line(), flush=True)


if __name__ == "__main__":
    main()
