"""Measures the explainer side by side with grad-cam, torch-cam and captum, and prints a Markdown table.

    python tests/benchmark.py                       every row (several minutes; grad-cam's Ablation-CAM alone takes two)
    python tests/benchmark.py --quick               fewer repetitions, slow peers extrapolated from some of their work
    python tests/benchmark.py vgg16 floor           the rows whose names contain one of the words
    python tests/benchmark.py --device cuda --memory

Both sides have the same weights and inputs, run in one process, and take turns; a time is the median of its runs. With
--memory, each side runs once more in a process of its own, and the peak of that is given.
"""

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models import get_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cnn_visualizations import Explainer, load_classifier, read_photo

CKPT = ROOT / "tests" / "data" / "dogs_mobilenet_v2.pth"
DOG = ROOT / "pics" / "dog.jpg"
TARGET = 3
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
            model(torch.randn(4, 3, 224, 224))
    return model.eval().to(device)


def photos(arch: str, count: int, device: str) -> torch.Tensor:
    """The demo photo for the demo network, else noise with some structure."""
    if arch == "demo":
        return load_classifier(ckpt=CKPT, device="cpu").preprocess(read_photo(DOG))[None].to(device)
    torch.manual_seed(1)
    coarse = nn.functional.interpolate(torch.randn(count, 3, 14, 14), (224, 224), mode="bilinear")
    return (coarse + 0.1 * torch.randn(count, 3, 224, 224)).to(device)


LAYERS = {"resnet50": "layer4", "vgg16": "features", "mobilenet_v2": "features", "demo": "features"}


# The sides


def ours(setting: Setting, arch: str, methods: str = "gradcam", guided: bool = True, count: int = 1) -> Work:
    """Our explainer on the target layer, or on the one that `arch@layer` names."""
    arch, layer = split(arch)
    explainer = Explainer(network(arch, setting.device), methods.split(","), [layer], guided=guided)
    inputs = photos(arch, count, setting.device)
    explainer(inputs[:1], TARGET)  # finds what it folds; a person's second photo does not pay for this

    def work() -> Answer:
        found = explainer(inputs, TARGET)
        answer = {"cam": found.cams[methods.split(",")[0]]}
        return answer if found.guided is None else {**answer, "guided": found.guided}

    return work


def split(arch: str) -> tuple[str, str]:
    name, _, layer = arch.partition("@")
    return name, layer or LAYERS[name]


def grad_cam(setting: Setting, arch: str, method: str = "gradcam", guided: bool = True, **options: object) -> Work:
    """grad-cam's own class as in its README, then its GuidedBackpropReLUModel."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    silence_progress()
    arch, layer = split(arch)
    model = copy.deepcopy(network(arch, setting.device))  # grad-cam replaces modules
    inputs = photos(arch, 1, setting.device)
    kind = getattr(pytorch_grad_cam, GRAD_CAM_CLASSES[method])

    def work() -> Answer:
        with kind(model=model, target_layers=[model.get_submodule(layer)], **options) as cam:
            answer = {"cam": cam(input_tensor=inputs.clone(), targets=[ClassifierOutputTarget(TARGET)])}
        if guided:
            gradients = pytorch_grad_cam.GuidedBackpropReLUModel(model=model)(inputs.clone(), target_category=TARGET)
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
    from pytorch_grad_cam.ablation_layer import AblationLayer

    class FirstChannels(AblationLayer):
        def activations_to_be_ablated(self, activations, ratio_channels_to_ablate=1.0):
            self.indices = np.arange(int(len(activations) * share), dtype=np.int32)
            return self.indices

    return grad_cam(setting, arch, "ablationcam", guided=False, ablation_layer=FirstChannels())


def torch_cam(setting: Setting, arch: str) -> Work:
    """torch-cam's GradCAM as in its README, its map enlarged to the input as its overlay does."""
    from torchcam.methods import GradCAM

    arch, layer = split(arch)
    model, inputs = copy.deepcopy(network(arch, setting.device)), photos(arch, 1, setting.device)
    extractor = GradCAM(model, target_layer=layer)

    def work() -> Answer:
        scores = model(inputs.clone().requires_grad_())
        small = extractor(TARGET, scores)[0]
        maps = nn.functional.interpolate(small[None].float(), inputs.shape[2:], mode="bilinear")[0]
        return {"cam": stretch(maps.detach().cpu().numpy())}

    return work


def captum(setting: Setting, arch: str) -> Work:
    """captum's LayerGradCam and GuidedBackprop."""
    from captum.attr import GuidedBackprop, LayerAttribution, LayerGradCam

    arch, layer = split(arch)
    model, inputs = without_sharing(network(arch, setting.device)), photos(arch, 1, setting.device)
    heat, guided = LayerGradCam(model, model.get_submodule(layer)), GuidedBackprop(model)

    def work() -> Answer:
        small = heat.attribute(inputs, target=TARGET, relu_attributions=True)
        maps = LayerAttribution.interpolate(small, inputs.shape[2:], "bilinear")[:, 0]
        gradients = guided.attribute(inputs.clone().requires_grad_(), target=TARGET)
        return {"cam": stretch(maps.detach().cpu().numpy()), "guided": gradients.detach().cpu().numpy()}

    return work


def without_sharing(model: nn.Module) -> nn.Module:
    """A copy in which ReLUs are not in place, as captum's hooks need it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def stretch(maps: np.ndarray) -> np.ndarray:
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (1e-7 + maps.max((1, 2), keepdims=True))


def floor(setting: Setting, arch: str) -> Work:
    """One forward pass and one backward pass to the input of the frozen, folded, channels-last network."""
    model = copy.deepcopy(network(arch, setting.device)).requires_grad_(False)
    fold(model)
    model = model.to(memory_format=torch.channels_last)
    inputs = photos(arch, 1, setting.device).to(memory_format=torch.channels_last)

    def work() -> Answer:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            leaf = inputs.clone(memory_format=torch.channels_last).requires_grad_()
            torch.autograd.grad(model(leaf)[0, TARGET], leaf)[0].cpu()
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
gradients = GuidedBackpropReLUModel(model=model)(inputs, target_category=target)
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
        command_line = [sys.executable, *map(str, command)]
        subprocess.run(command_line, check=True, capture_output=True, env=environment)
        return {}

    return work


def our_process(setting: Setting) -> Work:
    folder = workshop()
    options = ["--arch", "resnet50", "--device", setting.device, "--target-layer", "layer4", "--output", folder / "out"]
    return process(ROOT / "cnn_visualizations.py", "--ckpt", folder / "resnet50.pth", *options, DOG)


def plain_process(setting: Setting) -> Work:
    folder = workshop()
    return process(folder / "plain.py", folder / "resnet50.pth", DOG, folder)


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
    against_grad_cam("resnet50", "scorecam", 2.3, guided=False, runs=1),
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
    """Both sides in turn. A side that runs once is warmed up by smaller work: the other rows, or nothing."""
    share = 1 / 32 if setting.quick and row.part else 1
    mine = row.ours(setting)
    theirs = row.part(setting, share) if share < 1 else row.theirs(setting)
    runs = max(1, row.runs // 4) if setting.quick else row.runs
    mine()
    if runs > 1:
        theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for work, taken in zip((theirs, mine), times, strict=True):
            milliseconds, answer = timed(work, setting.device)
            taken.append(milliseconds)
            if work is mine:
                found = answer
            else:
                expected = answer
    if runs == 1:  # the peer's time is long enough to be one run; ours is not
        times[1].extend(timed(mine, setting.device)[0] for _ in range(2))
    return {
        "theirs": statistics.median(times[0]) / share,
        "ours": statistics.median(times[1]),
        "extrapolated": share < 1,
        "difference": None if share < 1 or row.peer in ("floor", "ourselves") else difference(found, expected),
    }


def difference(found: Answer, expected: Answer) -> str | None:
    """The largest difference of the maps, which go to 1, and of the guided gradients as a share of the largest one."""
    parts = []
    for what, theirs in expected.items():
        scale = 1 if what == "cam" else np.abs(theirs).max()
        parts.append(f"{what} {np.abs(found[what] - theirs).max() / scale:.0e}")
    return ", ".join(parts) or None


def peak_memory(row: Row, side: str, setting: Setting) -> float | None:
    """Megabytes at the peak of a process that does one side of the work once."""
    options = ["--device", setting.device, "--side", side, *["--quick"] * setting.quick]
    command = [sys.executable, __file__, *options, f"={row.name}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        return None
    return json.loads(finished.stdout.splitlines()[-1])


def run_side(row: Row, side: str, setting: Setting) -> None:
    """One side once, and this process's peak memory on stdout. A whole process's is that of the child."""
    if side == "theirs" and setting.quick and row.part:
        row.part(setting, 1 / 32)()
    else:
        getattr(row, side)(setting)()
    print(json.dumps(peak_here(setting.device, children=row.name == "process")))


def peak_here(device: str, children: bool) -> float | None:
    if device.startswith("cuda") and not children:
        return torch.cuda.max_memory_allocated() / 1e6
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource

    whose = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(whose).ru_maxrss * unit / 1e6


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


def chosen_rows(words: list[str]) -> list[Row]:
    """The rows whose names contain a word, or are the word behind a '='; those whose peer is not installed left out."""
    rows = [row for row in ROWS if not words or any(w == f"={row.name}" or w in row.name for w in words)]
    missing = {row.peer for row in rows if row.peer not in ("floor", "ourselves") and not version_of(row.peer)}
    for peer in sorted(missing):
        print(f"note: {peer} is not installed; its rows are left out", file=sys.stderr)
    return [row for row in rows if row.peer not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the explainer with its peers.")
    parser.add_argument("rows", nargs="*", help=f"parts of row names: {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--quick", action="store_true", help="fewer runs; slow peers do a part of their work")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="also the peak memory, each side in its own process")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting, rows = Setting(args.device, args.quick), chosen_rows(args.rows)
    if args.side:
        run_side(rows[0], args.side, setting)
        return
    print(f"{machine(args.device)}\n\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for row in rows:
        found = measure(row, setting)
        peaks = [peak_memory(row, side, setting) for side in ("ours", "theirs")] if args.memory else []
        memory = " / ".join("?" if peak is None else f"{peak:.0f}" for peak in peaks)
        print(line(row, found, memory), flush=True)


if __name__ == "__main__":
    main()
