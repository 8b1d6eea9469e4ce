"""Measures the explainer side by side with grad-cam, torch-cam and captum, and prints a Markdown table.

    python tests/benchmark.py                       every row (several minutes; grad-cam's Ablation-CAM alone takes two)
    python tests/benchmark.py --quick               fewer repetitions, slow peers extrapolated from some of their work
    python tests/benchmark.py vgg16 floor           the rows whose names contain one of the words
    python tests/benchmark.py --device cuda --memory
    python tests/benchmark.py --metrics FOLDER      what each method's maps are worth, a mean over the folder's photos

Both sides have the same weights and inputs, run in one process, and take turns; a time is the median of its runs. With
--memory, each side runs once more in a process of its own, and the peak of that is given.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cnn_visualizations as program_file
from cnn_visualizations import (
    METHODS,
    METRICS,
    Explainer,
    Explanation,
    PhotoError,
    find_photos,
    load_classifier,
    measure_trust,
    read_photo,
)

CKPT = ROOT / "tests" / "data" / "dogs_mobilenet_v2.pth"
DOG = ROOT / "pics" / "dog.jpg"
GRAD_CAM_CLASSES = {
    "gradcam": "GradCAM",
    "scorecam": "ScoreCAM",
    "gradcam++": "GradCAMPlusPlus",
    "ablationcam": "AblationCAM",
    "xgradcam": "XGradCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
}

Answer = dict[str, np.ndarray]  # "cam" (N, H, W), "guided" (N, 3, H, W); what a side has of them
Work = Callable[[], Answer]


@dataclass(frozen=True)
class Setting:
    """What the command line says."""

    device: str
    quick: bool
    alone: bool = False  # whether this process does one side only, and so needs no copy of the network


# Networks and inputs


@cache
def network(arch: str, device: str) -> nn.Module:
    """The network with random weights from a fixed seed and batch norms that know their activations; or the demo's."""
    if arch == "demo":
        return load_classifier(ckpt=CKPT, device=device).model
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if arch == "googlenet" else {}
    model = get_model(arch, weights=None, **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain mean over what is seen
    if norms:
        model.train()
        with torch.no_grad():
            for photo in torch.randn(4, 3, 224, 224).split(1):  # one by one, or this would be the peak of memory
                model(photo)
    return model.eval().to(device)


def own_network(setting: Setting, arch: str) -> nn.Module:
    """The network for somebody who changes it."""
    shared = network(arch, setting.device)
    return shared if setting.alone else copy.deepcopy(shared)


def photos(arch: str, count: int, device: str) -> torch.Tensor:
    """The demo photo for the demo network, else noise with some structure."""
    if arch == "demo":
        return load_classifier(ckpt=CKPT, device="cpu").preprocess(read_photo(DOG))[None].to(device)
    torch.manual_seed(1)
    coarse = nn.functional.interpolate(torch.randn(count, 3, 14, 14), (224, 224), mode="bilinear")
    return (coarse + 0.1 * torch.randn(count, 3, 224, 224)).to(device)


@cache
def target_of(arch: str, device: str) -> int:
    """The likeliest class for the first photo: a map of another one may be zero everywhere."""
    with torch.no_grad():
        return int(network(arch, device)(photos(arch, 1, device)).argmax())


LAYERS = {"resnet50": "layer4", "vgg16": "features", "mobilenet_v2": "features", "demo": "features"}


# The sides


def ours(setting: Setting, arch: str, methods: str = "gradcam", guided: bool = True, count: int = 1) -> Work:
    """Our explainer on the target layer, or on the one that `arch@layer` names."""
    arch, layer = split(arch)
    explainer = Explainer(network(arch, setting.device), methods.split(","), [layer], guided=guided)
    inputs, target = photos(arch, count, setting.device), target_of(arch, setting.device)
    explainer(inputs[:1], target)  # finds what it folds; a person's second photo does not pay for this

    def work() -> Answer:
        found = explainer(inputs, target)
        answer = {"cam": found.cams[methods.split(",")[0]]}
        return answer if found.guided is None else {**answer, "guided": found.guided}

    return work


def split(arch: str) -> tuple[str, str]:
    name, _, layer = arch.partition("@")
    return name, layer or LAYERS[name]


def grad_cam(setting: Setting, arch: str, method: str = "gradcam", guided: bool = True, kind: Any = None) -> Work:
    """grad-cam's own class as in its README, then its GuidedBackpropReLUModel."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    silence_progress()
    arch, layer = split(arch)
    model = own_network(setting, arch)
    inputs, target = photos(arch, 1, setting.device), target_of(arch, setting.device)
    kind = kind or getattr(pytorch_grad_cam, GRAD_CAM_CLASSES[method])

    def work() -> Answer:
        with kind(model=model, target_layers=[model.get_submodule(layer)]) as cam:
            answer = {"cam": cam(input_tensor=inputs.clone(), targets=[ClassifierOutputTarget(target)])}
        if guided:
            guide = pytorch_grad_cam.GuidedBackpropReLUModel(model=model, device=setting.device)
            gradients = guide(inputs.clone(), target_category=target)
            answer["guided"] = gradients.transpose(2, 0, 1)[None]
        return answer

    return work


def silence_progress() -> None:
    """grad-cam's progress bars off; printing them costs time."""
    for name in ("ablation_cam", "score_cam"):
        module = importlib.import_module(f"pytorch_grad_cam.{name}")
        module.tqdm = argparse.Namespace(tqdm=lambda steps: steps)


def part_of_ablation(setting: Setting, arch: str, share: float) -> Work:
    """grad-cam's Ablation-CAM on the first channels only."""
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.ablation_layer import AblationLayer

    class FirstChannels(AblationLayer):
        def activations_to_be_ablated(self, activations, ratio_channels_to_ablate=1.0):
            self.indices = np.arange(int(len(activations) * share), dtype=np.int32)
            return self.indices

    return grad_cam(setting, arch, "ablationcam", False, partial(AblationCAM, ablation_layer=FirstChannels()))


def part_of_scores(setting: Setting, arch: str, share: float) -> Work:
    """grad-cam's Score-CAM with the first channels as masks only."""
    from pytorch_grad_cam import ScoreCAM

    class FirstChannels(ScoreCAM):
        def get_cam_weights(self, inputs, layer, targets, activations, gradients):
            count = activations.shape[1]
            weights = super().get_cam_weights(inputs, layer, targets, activations[:, : int(count * share)], gradients)
            return np.pad(weights, ((0, 0), (0, count - weights.shape[1])))

    return grad_cam(setting, arch, "scorecam", False, FirstChannels)


def torch_cam(setting: Setting, arch: str) -> Work:
    """torch-cam's GradCAM as in its README, its map enlarged to the input as its overlay does."""
    from torchcam.methods import GradCAM

    arch, layer = split(arch)
    model, inputs = own_network(setting, arch), photos(arch, 1, setting.device)
    extractor, target = GradCAM(model, target_layer=layer), target_of(arch, setting.device)

    def work() -> Answer:
        small = extractor(target, model(inputs))[0]
        maps = nn.functional.interpolate(small[None].float(), inputs.shape[2:], mode="bilinear")[0]
        return {"cam": stretch(maps.detach().cpu().numpy())}

    return work


def captum(setting: Setting, arch: str) -> Work:
    """captum's LayerGradCam and GuidedBackprop."""
    from captum.attr import GuidedBackprop, LayerAttribution, LayerGradCam

    arch, layer = split(arch)
    model, inputs = without_in_place(own_network(setting, arch)), photos(arch, 1, setting.device)
    heat, guided = LayerGradCam(model, model.get_submodule(layer)), GuidedBackprop(model)
    target = target_of(arch, setting.device)

    def work() -> Answer:
        small = heat.attribute(inputs, target=target, relu_attributions=True)
        maps = LayerAttribution.interpolate(small, inputs.shape[2:], "bilinear")[:, 0]
        gradients = guided.attribute(inputs.clone().requires_grad_(), target=target)
        return {"cam": stretch(maps.detach().cpu().numpy()), "guided": gradients.detach().cpu().numpy()}

    return work


def without_in_place(model: nn.Module) -> nn.Module:
    """No ReLU works in place, as captum's hooks need it."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def stretch(maps: np.ndarray) -> np.ndarray:
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (1e-7 + maps.max((1, 2), keepdims=True))


def floor(setting: Setting, arch: str) -> Work:
    """One forward pass and one backward pass to the input of the frozen, folded, channels-last network."""
    model = own_network(setting, arch).requires_grad_(False)
    fold(model)
    model = model.to(memory_format=torch.channels_last)
    inputs, target = photos(arch, 1, setting.device), target_of(arch, setting.device)

    def work() -> Answer:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            leaf = inputs.clone(memory_format=torch.channels_last).requires_grad_()
            torch.autograd.grad(model(leaf)[0, target], leaf)[0].cpu()
        return {}

    return work


def fold(module: nn.Module) -> None:
    """Folds each batch norm that stands right behind a convolution among a module's children, as in ResNet."""
    children = list(module.named_children())
    numbered = {name[-1]: name for name, child in children if isinstance(child, nn.Conv2d)}
    for (before, first), (name, child) in zip([("", None), *children], children, strict=False):
        if isinstance(child, nn.BatchNorm2d):
            source = numbered.get(name[-1], before) if name.startswith("bn") else before
            first = module.get_submodule(source)
            setattr(module, source, nn.utils.fusion.fuse_conv_bn_eval(first, child))
            setattr(module, name, nn.Identity())
        else:
            fold(child)


# Whole processes

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

checkpoint, photo, out = sys.argv[1:]
model = models.resnet50(num_classes=10)
model.load_state_dict(torch.load(checkpoint, map_location="cpu"))
model.eval()
resize = transforms.Compose([transforms.Resize(232), transforms.CenterCrop(224)])
normalise = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
)
picture = resize(Image.open(photo).convert("RGB"))
inputs = normalise(picture)[None]
target = int(model(inputs).argmax())
with GradCAM(model=model, target_layers=[model.layer4]) as cam:
    heat = cam(input_tensor=inputs, targets=[ClassifierOutputTarget(target)])[0]
gradients = GuidedBackpropReLUModel(model=model, device="cpu")(inputs, target_category=target)
shown = show_cam_on_image(np.float32(picture) / 255, heat, use_rgb=True)
cv2.imwrite(f"{out}/cam.jpg", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
cv2.imwrite(f"{out}/gb.jpg", deprocess_image(gradients))
cv2.imwrite(f"{out}/cam_gb.jpg", deprocess_image(gradients * heat[:, :, None]))
"""


FOLDER = tempfile.TemporaryDirectory()  # there as long as this process is


@cache
def workshop() -> Path:
    """A folder with a resnet50 checkpoint and the plain script."""
    path = Path(FOLDER.name)
    torch.manual_seed(0)
    model = get_model("resnet50", weights=None, num_classes=10)
    torch.save(model.state_dict(), path / "resnet50.pth")
    (path / "plain.py").write_text(PLAIN_SCRIPT, encoding="utf-8")
    return path


def process(*command: object) -> Work:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def work() -> Answer:
        subprocess.run(work.command, check=True, capture_output=True, env=environment)
        return {}

    work.command = [sys.executable, *map(str, command)]
    return work


def our_process(setting: Setting) -> Work:
    folder = workshop()
    options = ["--arch", "resnet50", "--device", setting.device, "--target-layer", "layer4", "--output", folder / "out"]
    return process(ROOT / "cnn_visualizations.py", "--ckpt", folder / "resnet50.pth", *options, DOG)


def plain_process(setting: Setting) -> Work:
    folder = workshop()
    return process(folder / "plain.py", folder / "resnet50.pth", DOG, folder)


CROWD = 100  # photos


@cache
def crowd() -> Path:
    """A folder of many photos, each a little different."""
    folder = workshop() / "photos"
    folder.mkdir()
    photo = read_photo(DOG).pixels
    for number in range(CROWD):
        Image.fromarray(np.roll(photo, 7 * number, 1)).save(folder / f"{number:03}.jpg", quality=90)
    return folder


def our_folder(setting: Setting, count: int = CROWD) -> Work:
    """The program over a folder of photos."""
    names = sorted(crowd().iterdir())[:count]
    options = ["--arch", "resnet50", "--device", setting.device, "--output", workshop() / "out of folder"]
    return process(ROOT / "cnn_visualizations.py", "--ckpt", workshop() / "resnet50.pth", *options, *names)


def busy_share(setting: Setting) -> float:
    """How busy the cores are while photos go through, without the start: from a short and a long run."""
    spent = []
    for count in (CROWD // 5, CROWD):
        before, began = os.times(), time.perf_counter()
        our_folder(setting, count)()
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        spent.append((used, time.perf_counter() - began))
    (used, wall), (used_more, wall_more) = spent
    return (used_more - used) / (wall_more - wall) / (os.cpu_count() or 1)


PACE = 0.03  # seconds a photo


class Watched:
    """Explains as told, and notes when it was asked and when it answered; for the program it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, explainer: Explainer, explain: Callable[[torch.Tensor], Explanation]) -> None:
        self.explain, self.target_layers = explain, explainer.target_layers
        self.times: list[float] = []

    def __call__(self, inputs: torch.Tensor, targets: object = None, *, top: object = None) -> Explanation:
        self.times.append(time.perf_counter())
        found = self.explain(inputs)
        self.times.append(time.perf_counter())
        return found


def flow(setting: Setting) -> tuple[float, float]:
    """Photos of one megapixel a second: through the program, and explained alone, the batch held in memory.

    Without a GPU, something that waits for PACE a photo stands in for the explainer: it leaves the CPU alone, too.
    """
    folder = workshop() / "megapixels"
    folder.mkdir(exist_ok=True)
    large = Image.fromarray(read_photo(DOG).pixels).resize((1155, 866))
    for number in range(CROWD):
        large.rotate(number).save(folder / f"{number:03}.jpg", quality=90)
    words = ["--ckpt", workshop() / "resnet50.pth", "--device", setting.device, "--output", workshop() / "flow", folder]
    args = program_file.parse_args([str(word) for word in words])
    job = program_file.load(args, program_file.Share())
    batch = torch.stack([program_file.prepare((path, ""), job).inputs for path, _ in args.photos[: args.batch_size]])
    answer = job.explainer(batch, top=1)

    def wait(inputs: torch.Tensor) -> Explanation:
        time.sleep(PACE * len(inputs))
        return answer

    explain = partial(job.explainer, top=1) if setting.device.startswith("cuda") else wait
    alone = statistics.median(timed(partial(explain, batch), setting.device)[0] for _ in range(10)) / 1000
    watched = Watched(job.explainer, explain)
    loaded = patch.object(program_file, "load", lambda *_: replace(job, explainer=watched))
    with loaded, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        program_file.run(args)
    return CROWD / (watched.times[-1] - watched.times[0]), len(batch) / alone


def our_comparison(setting: Setting) -> Work:
    """Everything that is asked for when maps are compared, as a whole process."""
    options = "--method all --top-k 2 --sheet --metrics --save-arrays --device".split()  # noqa: SIM905
    output = workshop() / "comparison"
    return process(ROOT / "cnn_visualizations.py", "--ckpt", CKPT, *options, setting.device, "--output", output, DOG)


def grad_cam_seven(setting: Setting) -> Work:
    """grad-cam's seven maps of the two likeliest classes, and nothing else."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    silence_progress()
    model, inputs = own_network(setting, "demo"), photos("demo", 1, setting.device)
    with torch.no_grad():
        two = model(inputs)[0].topk(2).indices.tolist()

    def work() -> Answer:
        for name in GRAD_CAM_CLASSES.values():
            with getattr(pytorch_grad_cam, name)(model=model, target_layers=[model.features]) as cam:
                for target in two:
                    cam(input_tensor=inputs.clone(), targets=[ClassifierOutputTarget(target)])
        return {}

    return work


# Rows


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for the command line.
        work: what is measured.
        peer: who it is measured against; also the package that must be there.
        ours, theirs: make the two sides.
        asked: the least factor by which ours is to be faster.
        scale: the peer does this many times our work; the factor is for the same work.
        runs: how often each side runs.
        part: a peer that takes minutes: its work by share, for --quick.
    """

    name: str
    work: str
    peer: str
    ours: Callable[[Setting], Work]
    theirs: Callable[[Setting], Work]
    asked: float
    scale: float = 1
    runs: int = 15
    part: Callable[[Setting, float], Work] | None = None


def against_grad_cam(arch: str, method: str, asked: float, guided: bool = True, **options: object) -> Row:
    name, layer = split(arch)
    work = f"{method}{' + gb' if guided else ''}, {name}{'' if guided else ' ' + layer}"
    return Row(
        f"{method}-{name}",
        work,
        "grad-cam",
        lambda setting: ours(setting, arch, method, guided),
        lambda setting: grad_cam(setting, arch, method, guided),
        asked,
        **options,
    )


def heat_alone(arch: str) -> Row:
    return Row(
        f"heatmap-{arch}",
        f"gradcam alone, {arch}",
        "torchcam",
        lambda setting: ours(setting, arch, guided=False),
        lambda setting: torch_cam(setting, arch),
        1.2,
        runs=25,
    )


FIVE = "gradcam,gradcam++,xgradcam,eigencam,eigengradcam"

ROWS = [
    against_grad_cam("resnet50", "gradcam", 4.5),
    against_grad_cam("vgg16", "gradcam", 5.5, runs=9),
    against_grad_cam("resnet50", "xgradcam", 4.5),
    against_grad_cam("resnet50", "gradcam++", 4.5),
    against_grad_cam("resnet50", "eigencam", 2.5),
    against_grad_cam("resnet50", "eigengradcam", 2.5),
    heat_alone("resnet50"),
    heat_alone("mobilenet_v2"),
    Row(
        "captum-resnet50",
        "gradcam + gb, resnet50",
        "captum",
        lambda setting: ours(setting, "resnet50"),
        lambda setting: captum(setting, "resnet50"),
        2.8,
    ),
    Row(
        "floor-resnet50",
        "gradcam + gb, resnet50, over the floor: one forward and one backward pass",
        "floor",
        lambda setting: ours(setting, "resnet50"),
        lambda setting: floor(setting, "resnet50"),
        1 / 1.2,
        runs=25,
    ),
    against_grad_cam(
        "resnet50",
        "ablationcam",
        150,
        guided=False,
        runs=1,
        part=lambda setting, share: part_of_ablation(setting, "resnet50", share),
    ),
    against_grad_cam("googlenet@inception4a", "ablationcam", 1, guided=False, runs=3),
    against_grad_cam("demo", "scorecam", 3.5, guided=False, runs=3),
    against_grad_cam(
        "resnet50",
        "scorecam",
        2.3,
        guided=False,
        runs=1,
        part=lambda setting, share: part_of_scores(setting, "resnet50", share),
    ),
    Row(
        "five-at-once",
        "five gradient and eigen methods + gb at once, resnet50, over gradcam + gb alone",
        "ourselves",
        lambda setting: ours(setting, "resnet50", FIVE),
        lambda setting: ours(setting, "resnet50"),
        1 / 1.5,
    ),
    Row(
        "batch-of-8",
        "gradcam + gb, resnet50, a photo in a batch of 8 over a photo alone",
        "ourselves",
        lambda setting: ours(setting, "resnet50", count=8),
        lambda setting: ours(setting, "resnet50"),
        1.3,
        scale=8,
        runs=9,
    ),
    Row(
        "folder",
        f"a folder of {CROWD} photos, resnet50, a photo of it over a run of a plain script",
        "grad-cam",
        our_folder,
        plain_process,
        20,
        scale=CROWD,
        runs=2,
    ),
    Row(
        "comparison",
        "whole process: seven methods, two classes, sheet, metrics, arrays, over grad-cam's maps alone, the demo",
        "grad-cam",
        our_comparison,
        grad_cam_seven,
        1,
        runs=1,
    ),
    Row("process", "whole process, one photo, resnet50", "grad-cam", our_process, plain_process, 1 / 0.85, runs=5),
]


# Measuring


def timed(work: Work, device: str) -> tuple[float, Answer]:
    """Milliseconds and the answer."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    answer = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start), answer


def measure(row: Row, setting: Setting) -> dict[str, object]:
    """Both sides in turn, each warmed up by one run that does not count, unless it is one of many seconds."""
    share = 1 / 32 if setting.quick and row.part else 1
    sides = [row.part(setting, share) if share < 1 else row.theirs(setting), row.ours(setting)]
    runs = max(1, row.runs // 4) if setting.quick else row.runs
    times: list[list[float]] = [[], []]
    answers: list[Answer] = [{}, {}]
    for repetition in range(runs + (runs > 1)):
        for side, work in enumerate(sides):
            milliseconds, answers[side] = timed(work, setting.device)
            if repetition or runs == 1:
                times[side].append(milliseconds)
    if runs == 1 and times[1][0] < 5000:
        times[1] = [timed(sides[1], setting.device)[0] for _ in range(3)]
    comparable = share == 1 and row.peer not in ("floor", "ourselves")
    return {
        "theirs": statistics.median(times[0]) / share,
        "ours": statistics.median(times[1]),
        "extrapolated": share < 1,
        "difference": difference(answers[1], answers[0]) if comparable else None,
    }


def difference(found: Answer, expected: Answer) -> str | None:
    """The largest difference of the maps, which go to 1, and of the guided gradients as a share of the largest one."""
    parts = []
    for what, theirs in expected.items():
        scale = 1 if what == "cam" else np.abs(theirs).max()
        parts.append(f"{what} {np.abs(found[what] - theirs).max() / scale:.0e}")
    return ", ".join(parts) or None


# On Linux a new process begins with the peak of the one that started it, this large one. So a small one starts it.
LAUNCHER = """
import resource, subprocess, sys
print(subprocess.run(sys.argv[1:], check=True, capture_output=True, text=True).stdout.strip())
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)
"""


def peak_memory(row: Row, side: str, setting: Setting) -> float | None:
    """Megabytes at the peak of a process that does one side of the work once; None where that cannot be told."""
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    work = getattr(row, side)(setting) if row.name in ("process", "folder", "comparison") else None
    options = ["--device", setting.device, "--side", side, *["--quick"] * setting.quick, f"={row.name}"]
    command = work.command if hasattr(work, "command") else [sys.executable, "-W", "ignore", __file__, *options]
    finished = subprocess.run([sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True)
    if finished.returncode:
        return None
    said, peak = finished.stdout.splitlines()[-2:]
    return float(said) if setting.device.startswith("cuda") and not hasattr(work, "command") else float(peak)


def run_side(row: Row, side: str, setting: Setting) -> None:
    """One side once; on a GPU the peak of its memory goes to stdout."""
    if side == "theirs" and setting.quick and row.part:
        row.part(setting, 1 / 32)()
    else:
        getattr(row, side)(setting)()
    print(torch.cuda.max_memory_allocated() / 1e6 if setting.device.startswith("cuda") else "done")


# The table

HEADINGS = ["work", "peer", "peer ms", "ours ms", "times faster", "asked", "largest difference", "peak MB ours / peer"]


def line(row: Row, found: dict[str, object], memory: str) -> str:
    factor = found["theirs"] * row.scale / found["ours"]
    cells = [
        row.work,
        row.peer,
        f"{found['theirs']:.0f}{' (from a part)' if found['extrapolated'] else ''}",
        f"{found['ours']:.0f}" if found["ours"] >= 20 else f"{found['ours']:.1f}",
        f"{factor:.2f}" if factor < 10 else f"{factor:.0f}",
        f"{row.asked:.2g} {'yes' if factor >= row.asked else 'NO'}",
        found["difference"] or "",
        memory,
    ]
    return f"| {' | '.join(cells)} |"


def machine(device: str) -> str:
    """The machine and the versions."""
    names = ("torch", "torchvision", "grad-cam", "torchcam", "captum", "numpy")
    versions = ", ".join(f"{name} {version}" for name in names if (version := version_of(name)))
    chip = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{chip}, {torch.get_num_threads()} threads, {system}; {versions}"


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    named = [entry.partition(":")[2].strip() for entry in lines if entry.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def print_shares(setting: Setting) -> None:
    """How busy the cores are while photos go through, and how little the network waits for the rest."""
    busy, (rate, alone) = busy_share(setting), flow(setting)
    of = f"as explanations alone on {setting.device}" if setting.device != "cpu" else "as a stand-in for a GPU answers"
    lines = {
        "through that folder, the cores are busy | | | ": busy,
        f"photos a second of one megapixel, as many {of} | | {alone:.0f} | {rate:.0f} ": rate / alone,
    }
    for text, share in lines.items():
        print(f"| {text}| {share:.0%} | 90% {'yes' if share >= 0.9 else 'NO'} |", flush=True)


def chosen_rows(words: list[str]) -> list[Row]:
    """The rows whose names contain a word, or are the word behind a '='; those whose peer is not installed left out."""
    rows = [row for row in ROWS if not words or any(w == f"={row.name}" or w in row.name for w in words)]
    missing = {row.peer for row in rows if row.peer not in ("floor", "ourselves") and not version_of(row.peer)}
    for peer in sorted(missing):
        print(f"note: {peer} is not installed; its rows are left out", file=sys.stderr)
    return [row for row in rows if row.peer not in missing]


def print_metrics(folder: Path, ckpt: Path, device: str) -> None:
    """The table method by metric, means over the photos of a folder, each for its likeliest class."""
    classifier = load_classifier(ckpt=ckpt, device=device)
    explainer = Explainer(classifier.model, METHODS, guided=False)
    sums, count = np.zeros((len(METHODS), len(METRICS))), 0
    for path, _ in find_photos([str(folder)]):
        try:
            inputs = classifier.preprocess(read_photo(Path(path)))[None]
        except PhotoError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        found, count = explainer(inputs), count + 1
        of_methods = (measure_trust(explainer, inputs, found.cams[m][0], int(found.targets[0])) for m in METHODS)
        sums += [list(values.values()) for values in of_methods]
    print(
        f"{count} photos of {folder}, {ckpt.name}\n\n| method | {' | '.join(METRICS)} |\n|{'---|' * (len(METRICS) + 1)}"
    )
    for method, means in zip(METHODS, sums / max(count, 1), strict=True):
        print(f"| {method} | {' | '.join(f'{mean:.3f}' for mean in means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the explainer with its peers.")
    parser.add_argument("rows", nargs="*", help=f"parts of row names: {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--quick", action="store_true", help="fewer runs; slow peers do a part of their work")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="also the peak memory, each side in its own process")
    parser.add_argument("--metrics", type=Path, metavar="FOLDER", help="measure the methods on the photos of a folder")
    parser.add_argument("--ckpt", type=Path, default=CKPT, help="for --metrics, another network than the demo's")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.metrics:
        print_metrics(args.metrics, args.ckpt, args.device)
        return
    setting, rows = Setting(args.device, args.quick, alone=bool(args.side)), chosen_rows(args.rows)
    if args.side:
        run_side(rows[0], args.side, setting)
        return
    print(f"{machine(args.device)}\n\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for row in rows:
        found = measure(row, setting)
        peaks = [peak_memory(row, side, setting) for side in ("ours", "theirs")] if args.memory else []
        memory = " / ".join("?" if peak is None else f"{peak:.0f}" for peak in peaks)
        print(line(row, found, memory), flush=True)
        if row.name == "folder":
            print_shares(setting)


if __name__ == "__main__":
    main()
