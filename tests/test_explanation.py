"""Section 5, Explanation: against grad-cam's classes, float64, and the plain definitions."""

import contextlib
import copy
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from conftest import CKPT, DOG, ROOT
from PIL import Image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer, get_model
from torchvision.models.convnext import CNBlockConfig

import cnn_visualizations
from cnn_visualizations import (
    ARCHITECTURES,
    CAM_METHODS,
    MANY_PASSES,
    METHODS,
    MORE_METHODS,
    BatchSize,
    CallError,
    CamMethod,
    Explainer,
    guided_gradients,
)

CLASSES = inspect.getmembers(pytorch_grad_cam, inspect.isclass)
GRAD_CAM = {name.casefold().replace("_", ""): kind for name, kind in CLASSES}
GRAD_CAM["gradcam++"] = GRAD_CAM["gradcamplusplus"]
ONE_PASS = tuple(method for method in METHODS if method not in MANY_PASSES)
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")


# --- networks -------------------------------------------------------------------------------------

SMALL = {  # narrow ones of the same make
    "small vit": partial(
        VisionTransformer,
        image_size=64,
        patch_size=16,
        num_layers=3,
        num_heads=4,
        hidden_dim=48,
        mlp_dim=96,
    ),
    "small swin": partial(
        SwinTransformer, [4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4]
    ),
    "small convnext": partial(ConvNeXt, [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]),
}
SIZES = {
    "alexnet": 96,
    "maxvit_t": 224,
    "inception_v3": 160,
    "vit_b_32": 96,
    "vit_l_32": 96,
    "vit_h_14": 28,
}


def build(arch):
    """A network with random weights whose activations and score are like those of a trained one."""
    torch.manual_seed(0)
    size = SIZES.get(arch, 64)
    options = {"image_size": size} if arch.startswith("vit_") else {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}

    return calibrated(
        (SMALL.get(arch) or partial(get_model, arch, weights=None))(num_classes=7, **options), size
    )


network = cache(build)


def calibrated(model, size):
    """The model with statistics in its batch norms, and no layer switched off by initial values."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)

    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.uniform_(parameter, 0.1, 1)
        elif parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, 0, 0.1)

    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))

    return model.eval()


def photos(count=1, size=64, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def inputs_of(arch, count=1):
    return photos(count, SIZES.get(arch, 64))


class Tiny(nn.Module):
    """A plain network; `activation` is a module or a function."""

    def __init__(self, activation=torch.relu, outputs=5):
        super().__init__()
        torch.manual_seed(3)
        self.activation = activation
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        x = self.activation(self.second(self.activation(self.first(x))))
        return self.head(x.mean((2, 3)))


# --- references -----------------------------------------------------------------------------------


def reshape_of(arch):
    """How the output of a transformer's layer becomes (N, C, h, w), or None."""
    if "swin" in arch:
        return lambda output: output.permute(0, 3, 1, 2)

    if arch.startswith(("vit", "small vit")):
        return lambda tokens: (
            tokens[:, 1:].transpose(1, 2).unflatten(2, (int((tokens.shape[1] - 1) ** 0.5), -1))
        )

    return None


def signed_projection(contributions, of_class):
    """grad-cam's projection on the principal component, (N, h, w), with the program's sign."""
    maps = get_2d_projection(contributions)
    for projection, each in zip(maps, contributions, strict=True):
        with np.errstate(invalid="ignore", divide="ignore"):
            signed = np.corrcoef(projection.flat, each.sum(0).flat)[0, 1]
            unsigned = np.corrcoef(projection.flat, np.abs(each).sum(0).flat)[0, 1]

        sign = signed if of_class and abs(signed) >= 0.3 else unsigned
        if sign < 0:
            projection *= -1

    return maps


PLUS_PLUS_WEIGHTS = GRAD_CAM["gradcam++"].get_cam_weights


def clamped_weights(self, inputs, layers, targets, activations, gradients):
    """grad-cam's weights for Grad-CAM++, with the sum of a channel's activations clamped at 0."""
    negative = activations.sum((2, 3), keepdims=True) < 0
    clamped = np.where(negative, 0, activations)  # they are read for their sum only
    return PLUS_PLUS_WEIGHTS(self, inputs, layers, targets, clamped, gradients)


def grad_cams(method, model, layers, inputs, targets, reshape=None, **options):
    """The maps of grad-cam's own class, one input at a time, with the program's departures.

    These are the sign of principal components and the clamped sum in Grad-CAM++.
    """
    # Shapley-CAM fails on a frozen network whose layer is followed by nothing but linear ones.
    model = copy.deepcopy(model).requires_grad_(method == "shapleycam")
    inputs = inputs.clone().requires_grad_(method not in MANY_PASSES)
    kind = GRAD_CAM[method]
    layers = [model.get_submodule(name) for name in layers]

    with pytest.MonkeyPatch.context() as patch:
        for parent in kind.__mro__[:-1] if method != "shapleycam" else ():
            project = partial(signed_projection, of_class=method != "eigencam")
            patch.setattr(f"{parent.__module__}.get_2d_projection", project, raising=False)

        patch.setattr(GRAD_CAM["gradcam++"], "get_cam_weights", clamped_weights)
        pairs = zip(inputs.split(1), targets, strict=True)
        cam = kind(model, layers, reshape)
        return np.concatenate(
            [cam(one, [ClassifierOutputTarget(int(target))], **options) for one, target in pairs]
        )


@pytest.fixture(autouse=True)
def quiet_grad_cam(monkeypatch):
    """No progress bars from grad-cam, and every warning of the program anew."""
    for name in ("ablation_cam", "score_cam"):
        module = importlib.import_module(f"pytorch_grad_cam.{name}")
        monkeypatch.setattr(module.tqdm, "tqdm", lambda steps, *_, **__: steps)

    getattr(cnn_visualizations.warn, "cache_clear", int)()


def lifted(model, inputs, target):
    """A copy with a positive score: a negative one inverts grad-cam's Ablation-CAM."""
    model = copy.deepcopy(model)
    lift = 10 - model(inputs)[0, target].detach()
    model.register_forward_hook(lambda module, args, logits: logits + lift)
    return model


def non_empty_target(model, layer, inputs, method="gradcam", **options):
    """A class for which grad-cam's map is not empty."""
    for target in range(7):
        if grad_cams(
            method, lifted(model, inputs, target), [layer], inputs, [target], **options
        ).any():
            return target

    raise AssertionError("every map is empty")


def map_of_weights(weights, activations, size):
    """The map (H, W) that channel weights (C,) give for activations (C, h, w)."""
    cam = torch.einsum("c,chw->hw", weights, activations).clamp(min=0)[None, None]
    cam = F.interpolate(
        (cam - cam.min()) / (1e-7 + cam.max() - cam.min()), (size, size), mode="bilinear"
    )[0, 0]
    return ((cam - cam.min()) / (1e-7 + cam.max() - cam.min())).numpy()


def output_and_gradient(model, layer, inputs, target):
    """A layer's last output, as it was returned, and the gradient of the class score there."""
    kept = []

    def keep(module, args, output):
        kept.append(output)
        return output.clone()

    with model.get_submodule(layer).register_forward_hook(keep):
        score = model(inputs)[0, target]

    return kept[-1].detach(), torch.autograd.grad(score, kept[-1])[0]


def ablation_map(model, layer, inputs, target, axis=1, to_map=None):
    """Ablation-CAM as in its paper, by whole forward passes, but not divided by the score."""
    activations = output_and_gradient(model, layer, inputs, target)[0]
    channels = torch.arange(activations.shape[axis])

    def set_to_zero(module, args, output):
        changed = output.clone()
        changed.movedim(axis, 1)[channels, channels] = 0
        return changed

    with torch.no_grad():
        score = model(inputs)[0, target]
        with model.get_submodule(layer).register_forward_hook(set_to_zero):
            ablated = model(inputs.expand(len(channels), -1, -1, -1))[:, target]

    return map_of_weights(
        score - ablated, (to_map(activations) if to_map else activations)[0], inputs.shape[-1]
    )


class Rectified(torch.autograd.Function):
    """Identity; backward, only positive gradients pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


ACTIVATIONS = [(torch, "relu"), (torch.Tensor, "relu"), (torch.Tensor, "relu_")]
ACTIVATIONS += [
    (F, name) for name in ("relu", "relu6", "hardtanh", "leaky_relu", "elu", "elu_", "celu", "selu")
]
ACTIVATIONS += [
    (F, name) for name in ("gelu", "silu", "hardswish", "mish", "prelu", "softplus", "rrelu")
]


def guided_reference(model, inputs, target):
    """Guided backpropagation in float64: activation functions let only positive gradients in."""

    def rectified(function):
        return lambda *args, **kwargs: Rectified.apply(function(*args, **kwargs))

    inputs = inputs.double().requires_grad_()

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ACTIVATIONS:
            patch.setattr(place, name, rectified(getattr(place, name)))

        scores = model.double()(inputs)

    guided = torch.autograd.grad(scores[:, target].sum(), inputs)[0].numpy()
    model.float()  # the float32 values come back exactly
    return guided


def plain_gradient(model, inputs, target):
    inputs = inputs.clone().requires_grad_()
    return torch.autograd.grad(model(inputs)[:, target].sum(), inputs)[0].numpy()


def relative_error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same_maps(ours, theirs, tolerance=1e-4, name=""):
    assert theirs.max() > 0.2, f"the reference is degenerate: {name}"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def assert_same_explanation(ours, theirs, tolerance=1e-5):
    assert ours.targets.tolist() == theirs.targets.tolist()
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=tolerance, atol=tolerance)
    assert ours.cams.keys() == theirs.cams.keys()

    for method, maps in theirs.cams.items():
        np.testing.assert_allclose(ours.cams[method], maps, rtol=0, atol=tolerance, err_msg=method)

    assert (ours.guided is None) == (theirs.guided is None)
    if theirs.guided is not None:
        np.testing.assert_allclose(
            ours.guided, theirs.guided, rtol=0, atol=tolerance * np.abs(theirs.guided).max()
        )


# --- maps against grad-cam ------------------------------------------------------------------------

# For each architecture a late layer; one with few channels and a minimum of 0, where grad-cam's
# ablation sets to zero; another.
LAYERS = {
    "resnet18": ("layer4", "layer1", "layer1.0.conv2"),
    "mobilenet_v2": ("features", "features.1.conv.0", "features.2"),
    "small vit": (
        "encoder.layers.encoder_layer_2.ln_1",
        None,
        "encoder.layers.encoder_layer_2.ln_1",
    ),
    "small swin": ("features.3.1.norm1", None, "features.3.1.norm2"),
    "vgg11": ("features", "features.2", "features.0"),
    "densenet121": (
        "features.denseblock4",
        "features.relu0",
        "features.denseblock1.denselayer3.conv2",
    ),
    "googlenet": ("inception5b", "inception3a.branch3", "inception3a.branch4.0"),
    "mobilenet_v3_small": ("features", "features.2.block.0", "features.4"),
    "efficientnet_b0": ("features", None, "features.2"),
    "squeezenet1_1": ("features", "features.1", "features.3.squeeze"),
    "convnext_tiny": ("features", None, None),
    "small convnext": ("features", None, "features.1"),
    "vit_b_32": ("encoder.layers.encoder_layer_11.ln_1", None, None),
    "swin_t": ("features.7.1.norm1", None, None),
}


BY_DEFAULT = ("resnet18", "mobilenet_v2", "small vit", "small swin")


def tolerance_of(arch):
    """1e-4; for the slow ones, whose weights were not chosen for it, half a step of 8 bits."""
    return 1e-4 if arch in BY_DEFAULT else 2e-3


def with_layer(column, by_default=BY_DEFAULT):
    """The rows (architecture, layer) of LAYERS, of which all but a few are slow."""
    rows = []
    for arch, layers in LAYERS.items():
        marks = [] if arch in by_default else slow
        if layers[column]:
            rows.append(pytest.param(arch, layers[column], marks=marks))
    return rows


@pytest.mark.parametrize(("arch", "layer"), with_layer(0))
def test_methods_of_one_pass_equal_grad_cam(arch, layer):
    model = network(arch)
    reshape = reshape_of(arch)
    oblong = [photos(1, 64)[:, :, :48], photos(1, 96)[..., :64]] if arch == "resnet18" else []

    for inputs in (inputs_of(arch), *oblong):
        target = non_empty_target(model, layer, inputs, reshape=reshape)
        ours = Explainer(model, ONE_PASS, layer, guided=False)(inputs, target)
        for method in ONE_PASS:
            theirs = grad_cams(method, model, [layer], inputs, [target], reshape)
            assert theirs.any() or method == "xgradcam"
            np.testing.assert_allclose(
                ours.cams[method], theirs, rtol=0, atol=tolerance_of(arch), err_msg=method
            )


@pytest.mark.parametrize(
    "method", [*ONE_PASS, *(pytest.param(method, marks=slow) for method in MANY_PASSES)]
)
def test_the_demo_equals_grad_cam(method):
    classifier = cnn_visualizations.load_classifier(ckpt=CKPT, device="cpu", input_size=97)
    inputs = classifier.preprocess(cnn_visualizations.read_photo(DOG))[None]
    ours = Explainer(classifier.model, method, guided=False)(inputs)
    model = lifted(classifier.model, inputs, int(ours.targets[0]))

    assert_same_maps(
        ours.cams[method], grad_cams(method, model, ["features"], inputs, ours.targets)
    )


def test_gradcam_plus_plus_is_stable_where_activations_sum_to_less_than_zero():
    """Without the clamped sum, noise of 1e-6 on the input moves this map by 0.4."""
    classifier = cnn_visualizations.load_classifier(ckpt=CKPT, device="cpu")
    inputs = classifier.preprocess(cnn_visualizations.read_photo(DOG))[None]
    explainer = Explainer(classifier.model, "gradcam++", "features.5", guided=False)
    noise = 1e-6 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    ours = explainer(inputs)
    noisy = explainer(inputs + noise, ours.targets)

    # the same in float64
    model = copy.deepcopy(classifier.model).double()
    target = int(ours.targets[0])
    activations, gradients = output_and_gradient(model, "features.5", inputs.double(), target)
    total = activations.sum((2, 3), keepdim=True).clamp(min=0)
    alphas = gradients**2 / (2 * gradients**2 + total * gradients**3 + 1e-6)
    weights = (alphas * gradients.clamp(min=0)).sum((2, 3))
    right = map_of_weights(weights[0], activations[0], 225)

    assert total.min() == 0
    np.testing.assert_allclose(ours.cams["gradcam++"][0], right, rtol=0, atol=5e-3)
    np.testing.assert_allclose(noisy.cams["gradcam++"], ours.cams["gradcam++"], rtol=0, atol=5e-3)


def test_an_entry_of_the_table_is_all_that_a_method_of_one_pass_needs(monkeypatch):
    entry = CamMethod(lambda a, g: a, lambda contributions: -contributions.amax(-3), relu=False)
    monkeypatch.setitem(CAM_METHODS, "layercam", entry)
    model = network("resnet18")
    inputs = photos(1, 64)
    ours = Explainer(model, "layercam", "layer1", guided=False)(inputs).cams["layercam"][0]
    activations = output_and_gradient(model, "layer1", inputs, 0)[0]
    highest = activations[0].amax(0, keepdim=True)
    right = map_of_weights(torch.ones(1), highest.max() - highest, 64)

    assert_same_maps(ours, right)


@pytest.mark.parametrize("method", MANY_PASSES)
@pytest.mark.parametrize(("arch", "layer"), with_layer(1))
def test_methods_of_many_passes_equal_grad_cam(arch, layer, method):
    model = network(arch)
    inputs = inputs_of(arch)
    target = non_empty_target(model, layer, inputs, method)

    assert output_and_gradient(model, layer, inputs, target)[0].min() == 0
    ours = Explainer(model, method, layer, guided=False)(inputs, target)
    theirs = grad_cams(method, lifted(model, inputs, target), [layer], inputs, [target])

    assert_same_maps(ours.cams[method], theirs, tolerance_of(arch))


@pytest.mark.parametrize(
    ("arch", "layer"), [("densenet121", "features"), ("resnet18", "layer4.1.bn1")]
)
def test_activations_are_those_before_an_in_place_relu_where_grad_cam_reads_those_after(
    arch, layer
):
    model = network(arch)
    inputs = photos(1, 96)
    activations, gradients = output_and_gradient(model, layer, inputs, 3)
    right = map_of_weights(gradients.mean((2, 3))[0], activations[0], 96)

    assert_same_maps(
        Explainer(model, "gradcam", layer, guided=False)(inputs, 3).cams["gradcam"][0], right
    )
    assert np.abs(grad_cams("gradcam", model, [layer], inputs, [3])[0] - right).max() > 0.01


OTHERS = sorted({*MORE_METHODS} - {"randomcam", "finercam"})
OTHER_ROWS = []
for arch in LAYERS:
    for method in OTHERS:
        if reshape_of(arch) and method in ("shapleycam", "fullgrad"):
            continue  # they take no tokens
        marks = [] if arch in ("resnet18", "small vit") else slow
        OTHER_ROWS.append(pytest.param(arch, method, marks=marks))


@pytest.mark.parametrize(("arch", "method"), OTHER_ROWS)
def test_the_other_methods_equal_grad_cam(arch, method):
    model = network(arch)
    inputs = inputs_of(arch, 2)
    layer = LAYERS[arch][0]
    reshape = reshape_of(arch)
    if (
        method == "fem" and "vit" not in arch
    ):  # which needs more than four positions to find one that stands out
        inputs = photos(2, 160)

    targets = [non_empty_target(model, layer, inputs[:1], reshape=reshape), 2]
    ours = Explainer(model, method, layer, guided=False)(inputs, targets).cams[method]
    # FullGrad stretches every channel, also those of mere rounding errors; FEM has a threshold.
    theirs = grad_cams(method, model, [layer], inputs, targets, reshape)

    assert_same_maps(ours, theirs, 2e-2 if method in ("fullgrad", "fem") else tolerance_of(arch))


@pytest.mark.parametrize("target", [None, 2])
def test_finercam_explains_a_class_against_the_three_with_the_nearest_scores(target):
    # an in-place ReLU follows `features`
    model = network("densenet121")
    inputs = photos()
    ours = Explainer(model, "finercam", "features", guided=False)(inputs, target)
    target = int(ours.targets[0])
    leaf = output_and_gradient(model, "features", inputs, target)[0].requires_grad_()
    scores = model.classifier(F.relu(leaf).mean((2, 3)))[0]
    nearest = (scores - scores[target]).abs().argsort().tolist()
    nearest.remove(target)
    similar = nearest[:3]
    shares = scores.softmax(0)[similar]
    score = (shares * (scores[target] - scores[similar])).sum() / shares.sum()
    weights = torch.autograd.grad(score, leaf)[0][0].mean((1, 2))

    assert_same_maps(ours.cams["finercam"][0], map_of_weights(weights, leaf[0].detach(), 64))


def test_randomcam_depends_neither_on_the_class_nor_on_run_and_batch():
    explainers = [
        Explainer(network("resnet18"), "randomcam", "layer2", guided=False) for _ in range(2)
    ]
    first = explainers[0](photos(2), 0).cams["randomcam"]
    again = explainers[1](photos(2)[1:], 1).cams["randomcam"]

    np.testing.assert_allclose(first[1:], again, atol=1e-4)
    assert first.max() > 0.9


@pytest.mark.parametrize(
    "method", sorted({*METHODS, *OTHERS} - {"scorecam", "ablationcam", "fullgrad", "shapleycam"})
)
def test_several_layers_are_joined_as_in_grad_cam(method):
    model = network("resnet18")
    inputs = photos(2, 48)
    layers = ["layer2.0", "layer3"]
    ours = Explainer(model, method, layers, guided=False)(inputs, [1, 2]).cams[method]

    assert_same_maps(ours, grad_cams(method, model, layers, inputs, [1, 2]))


@pytest.mark.parametrize(
    "method",
    ["gradcam", "layercam", pytest.param("scorecam", marks=slow), "eigencam", "shapleycam"],
)
def test_eigen_smoothing_equals_grad_cam(method):
    model = network("resnet18")
    inputs = photos(1, 48)
    layer = "layer2"
    target = non_empty_target(model, layer, inputs)
    ours = Explainer(model, method, layer, eigen_smooth=True)(inputs, target).cams[method]
    plain = Explainer(model, method, layer)(inputs, target).cams[method]
    theirs = grad_cams(method, model, [layer], inputs, [target], eigen_smooth=True)
    difference = np.abs(ours - plain).max()

    assert_same_maps(ours, theirs)
    if method == "eigencam":  # which is smooth
        assert difference < 0.01
    else:
        assert difference > 0.01


@pytest.mark.parametrize("method", ["gradcam", "eigengradcam", "ablationcam", "shapleycam"])
def test_augmentation_smoothing_equals_grad_cam(method):
    arch, layer = (
        ("mobilenet_v2", "features.1.conv.0") if method == "ablationcam" else ("resnet18", "layer3")
    )
    model = network(arch)
    inputs = photos(1, 48)
    target = non_empty_target(model, layer, inputs)
    targets = [[target, (target + 1) % 7]]
    ours, plain = (
        Explainer(model, method, layer, aug_smooth=smooth)(inputs, targets)
        for smooth in (True, False)
    )
    theirs = grad_cams(
        method, lifted(model, inputs, target), [layer], inputs, [target], aug_smooth=True
    )

    assert_same_maps(ours.cams[method][:, 0], theirs)
    assert np.abs(ours.cams[method] - plain.cams[method]).max() > 0.01
    for name in ("guided", "logits", "targets"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name))


# --- Ablation-CAM ---------------------------------------------------------------------------------

ABLATED = with_layer(2)
ABLATED += [
    ("resnet18", "layer2.0.downsample.0"),
    ("resnet18", "layer2.1.conv1"),
]  # branches, beside which others run
ABLATED += [("resnet18", "layer1.1.relu")]  # called twice in a pass


@pytest.mark.parametrize(("arch", "layer"), ABLATED)
def test_scorecam_and_ablationcam_where_activations_may_be_negative(arch, layer):
    """There grad-cam's Score-CAM is right; its Ablation-CAM sets channels to -1e7, not to zero."""
    model = network(arch)
    inputs = inputs_of(arch)
    axis = {"small vit": 2, "small swin": 3}.get(arch, 1)
    whole = layer.removesuffix(".relu")  # the output of the last call is the block's
    for target in range(7):
        right = ablation_map(model, whole, inputs, target, axis, reshape_of(arch))
        if right.any():
            break
    methods = MANY_PASSES if layer == LAYERS[arch][2] else "ablationcam"
    ours = Explainer(model, methods, layer, guided=False)(inputs, target)

    assert_same_maps(ours.cams["ablationcam"][0], right, tolerance_of(arch))
    if "scorecam" in ours.cams:
        not_in_place = copy.deepcopy(model)  # or grad-cam reads the activations after the ReLU
        for module in not_in_place.modules():
            module.inplace = False
        theirs = grad_cams("scorecam", not_in_place, [layer], inputs, [target], reshape_of(arch))
        np.testing.assert_allclose(ours.cams["scorecam"], theirs, rtol=0, atol=tolerance_of(arch))

    if layer in ("layer1.0.conv2", "features.2"):
        theirs = grad_cams("ablationcam", model, [layer], inputs, [target])
        assert np.abs(np.nan_to_num(theirs[0]) - right).max() > 0.1


def test_ablation_is_the_same_for_a_negative_score_where_grad_cams_is_upside_down():
    """A constant added to all scores does not change what the network predicts."""
    model = lifted(network("mobilenet_v2"), photos(), 3)
    inputs = photos()
    layer = "features.1.conv.0"
    negative = copy.deepcopy(model)
    twice = 2 * model(inputs)[0, 3].item()
    negative.register_forward_hook(lambda module, args, logits: logits - twice)
    right, theirs = (
        grad_cams("ablationcam", each, [layer], inputs, [3]) for each in (model, negative)
    )

    for each in (model, negative):
        assert_same_maps(
            Explainer(each, "ablationcam", layer, guided=False)(inputs, 3).cams["ablationcam"],
            right,
        )

    assert np.corrcoef(theirs.ravel(), right.ravel())[0, 1] < 0


def test_ablation_of_a_layer_that_is_called_twice_runs_only_what_follows_its_last_call():
    torch.manual_seed(0)
    relu = nn.ReLU()
    positions = {}
    inputs = photos(1, 128)
    convolutions = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 48, 3, stride=4),
        nn.Conv2d(48, 8, 3),
    )
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(convolutions[0], relu, convolutions[1], relu, convolutions[2], *head)
    with_two_relus = nn.Sequential(*model[:3], nn.ReLU(), *model[4:])
    right = ablation_map(with_two_relus, "3", inputs, 2)

    def count(module, args, output):
        kind = module.in_channels
        positions[kind] = (
            positions.get(kind, 0) + args[0].shape[0] * args[0].shape[2] * args[0].shape[3]
        )

    for convolution in convolutions:
        convolution.register_forward_hook(count)

    assert_same_maps(
        Explainer(model, "ablationcam", "1", guided=False)(inputs, 2).cams["ablationcam"][0], right
    )
    assert positions[48] > 40 * 32 * 32  # what follows runs for (nearly) each of the 48 channels
    assert positions[3] == positions[16] < 6 * 128 * 128  # what comes before does not


# --- guided backpropagation and the default layer -------------------------------------------------

DEFAULT_LAYERS = [
    ("alexnet|vgg|densenet|mobilenet|efficientnet|squeezenet|convnext|small convnext", "features")
]
DEFAULT_LAYERS += [
    ("resnet|resnext|wide_resnet", "layer4"),
    ("googlenet", "inception5b"),
    ("inception", "Mixed_7c"),
]
DEFAULT_LAYERS += [("maxvit", "blocks.3"), ("mnasnet", "layers"), ("regnet", "trunk_output")]
DEFAULT_LAYERS += [("shufflenet", "conv5"), ("swin|small swin", "permute")]
DEPTHS = [("vit_b", 12), ("vit_l", 24), ("vit_h", 32), ("small vit", 3)]
DEFAULT_LAYERS += [
    (arch, f"encoder.layers.encoder_layer_{depth - 1}.ln_1") for arch, depth in DEPTHS
]
QUICK = (
    "resnet18",
    "squeezenet1_1",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
)
QUICK += ("densenet121", "googlenet", *SMALL)
# so deep that with random weights rounding to float32 alone changes more than 5 percent
CHAOTIC = ("efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_m")


@pytest.mark.parametrize(
    "arch", [a if a in QUICK else pytest.param(a, marks=slow) for a in (*ARCHITECTURES, *SMALL)]
)
def test_default_layer_and_guided_gradients_of_each_architecture(arch):
    """With random weights, float32 alone errs by up to 0.002, plain gradients by 0.03 and more."""
    model = (network if arch in QUICK else build)(arch)
    inputs = inputs_of(arch)
    explainer = Explainer(model, "eigencam")
    explanation = explainer(inputs)
    target = int(explanation.targets[0])
    ours = explanation.guided

    layer = next(layer for names, layer in DEFAULT_LAYERS if re.match(names, arch))

    assert explainer.target_layers == (layer,)
    del explainer  # of the largest networks there is not room for three
    right = guided_reference(model, inputs, target)

    assert relative_error(plain_gradient(model, inputs, target), right) > 0.03
    if arch in CHAOTIC:
        doubles = inputs.double().requires_grad_()
        ours = guided_gradients([model.double()(doubles)[0, target]], doubles)[:, 0].numpy()

    assert relative_error(ours, right) < 5e-3


MODULES = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(-0.1, 0.3),
    nn.LeakyReLU(0.1),
    nn.ELU(),
    nn.CELU(),
    nn.SELU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Hardswish(),
    nn.Mish(),
    nn.Softplus(),
    nn.PReLU(8),
    nn.RReLU(),
]
# They do not rectify: the gradient is the plain one.
GATES = [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Identity()]


@pytest.mark.parametrize("activation", [*MODULES, *GATES], ids=str)
def test_guided_gradients_of_an_activation_module(activation):
    assert_guided(Tiny(activation).eval(), activation in GATES)


@pytest.mark.parametrize(("place", "name"), ACTIVATIONS[:5] + ACTIVATIONS[7:9])
def test_guided_gradients_of_an_activation_function(place, name):
    assert_guided(Tiny(lambda x: getattr(place, name)(x)))


RELUS = {
    "clamp": lambda x: x.clamp(min=0),
    "clamp in place": lambda x: x.clamp_(min=0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: x.clip(0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "maximum, the other way": lambda x: torch.maximum(torch.zeros(()), x),
}
BOUNDS = {
    "clamp from above": lambda x: x.clamp(max=0.2),
    "clamp at another value": lambda x: x.clamp(min=1e-6),
    "maximum of two maps": lambda x: torch.maximum(x, x.flip(1)),
}


@pytest.mark.parametrize("kind", RELUS)
def test_a_relu_that_is_written_as_a_bound_is_guided(kind):
    inputs = photos(2, 12)
    guided = Explainer(Tiny(RELUS[kind]))(inputs, 1).guided
    right = guided_reference(Tiny(lambda x: torch.relu(x)), inputs, 1)

    assert relative_error(guided, right) < 1e-5


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_bound_that_is_no_relu_is_not_guided(kind):
    inputs = photos(2, 12)
    model = Tiny(BOUNDS[kind])
    guided = Explainer(model)(inputs, 1).guided

    assert relative_error(guided, plain_gradient(model, inputs, 1)) < 1e-5


def assert_guided(model, plain=False):
    inputs = photos(2, 12)
    right = guided_reference(model, inputs, 1)
    is_plain = relative_error(plain_gradient(model, inputs, 1), right) < 1e-5

    assert is_plain == plain
    assert relative_error(Explainer(model)(inputs, 1).guided, right) < 1e-5


class Attention(nn.Module):
    """Attention over the 64 patches and one class token of inputs of 64 x 64, as timm has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.patches = nn.Conv2d(3, 96, 8, 8)
        self.norm = nn.LayerNorm(96)
        self.k_norm = nn.LayerNorm(32)
        self.head = nn.Linear(96, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        q = self.norm(tokens).unflatten(2, (3, 32)).transpose(1, 2)  # (N, heads, tokens, width)
        mixed = F.scaled_dot_product_attention(q, self.k_norm(q), q)
        return self.head(mixed.transpose(1, 2).flatten(2)[:, 0])


def test_the_keys_of_attention_are_no_map_although_they_have_four_dimensions():
    explainer = Explainer(Attention())
    explainer.prepare(photos())

    assert explainer.target_layers == ("norm",)
    assert "k_norm" not in explainer.layers


def test_maps_of_another_aspect_than_the_input_count_where_there_are_no_others():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, (4, 1)), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(photos(1, 32))
    explainer = Explainer(model)
    explainer.prepare(photos(1, 32))

    assert explainer.target_layers == ("1",)


# --- several classes, inputs, methods -------------------------------------------------------------


def test_methods_inputs_and_classes_together_equal_each_alone():
    methods = (*METHODS, "layercam", "fem", "fullgrad", "finercam")
    model = network("small convnext")
    inputs = photos(2, 32)
    targets = torch.tensor([[4, 0, 2], [1, 4, 6]])
    together = Explainer(model, methods)(inputs, targets)

    assert list(together.cams) == list(methods)
    assert together.targets.tolist() == targets.tolist()
    assert together.guided.dtype == together.logits.dtype == np.float32
    assert together.targets.dtype == np.int64
    assert together.guided.shape == (2, 3, 3, 32, 32)
    assert together.logits.shape == (2, 7)
    assert together.targets.shape == (2, 3)
    assert Explainer(model, "gradcam", guided=False)(inputs).guided is None

    for method in methods:
        assert together.cams[method].dtype == np.float32
        assert together.cams[method].shape == (2, 3, 32, 32)
        assert 0 <= together.cams[method].min() <= together.cams[method].max() <= 1
        explainer = Explainer(model, method)

        for i, k in ((0, 0), (0, 2), (1, 1)):
            alone = explainer(inputs[i : i + 1], targets[i, k])
            np.testing.assert_allclose(
                together.cams[method][i, k], alone.cams[method][0], atol=2e-5, err_msg=method
            )
            assert relative_error(together.guided[i, k], alone.guided[0]) < 1e-4
            np.testing.assert_allclose(together.logits[i], alone.logits[0], atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "mobilenet_v2"])
def test_logits_are_those_of_the_model_and_the_same_result_comes_twice(arch):
    model = network(arch)
    inputs = photos(2)
    right = model(inputs).detach().numpy()
    explainer = Explainer(model, ["gradcam", "xgradcam", "eigencam"])
    unfolded = explainer.logits(inputs).numpy()
    first = explainer(inputs)
    again = explainer(inputs)

    for logits in (unfolded, first.logits, explainer.logits(inputs).numpy()):
        np.testing.assert_allclose(logits, right, rtol=1e-4, atol=1e-4)

    assert first.targets.tolist() == right.argmax(1).tolist()
    for other in (again, Explainer(model, explainer.methods)(inputs)):
        assert_same_explanation(other, first, 1e-6)


TARGETS = [4, torch.tensor(4), np.int64(4), [4, 4], (4, 4), torch.tensor([4, 4]), np.array([4, 4])]


@pytest.mark.parametrize("targets", [*TARGETS, [4, 2], [[4, 1]], [[4, 1], [0, 2]]], ids=repr)
def test_targets_in_any_form(targets):
    explanation = Explainer(Tiny())(photos(2, 12), targets)
    right = torch.as_tensor(targets)
    right = right.expand(2, *right.shape[1:])

    assert explanation.targets.tolist() == right.tolist()
    assert explanation.guided.shape == (*right.shape, 3, 12, 12)
    assert explanation.only(1).cams["gradcam"].shape == (1, *right.shape[1:], 12, 12)


WRONG_TARGETS = [
    5,
    -2,
    [0, 5],
    [0, -2],
    torch.tensor([7, 0]),
    [0, 1, 2],
    [[0], [1], [2]],
    [[[0]]],
    [],
    [0.5, 1.0],
]


@pytest.mark.parametrize("targets", [*WRONG_TARGETS, [True, False]])
def test_targets_out_of_range_or_of_a_wrong_form_are_a_call_error(targets):
    with pytest.raises(CallError, match="5 classes"):
        Explainer(Tiny())(photos(2, 12), targets)


def test_minus_one_stands_for_the_prediction_and_a_class_asked_for_twice_is_kept_once():
    explainer = Explainer(Tiny())
    predicted = explainer(photos(2, 12)).targets
    explanation = explainer(photos(2, 12), [[-1, 3], [3, -1]])

    np.testing.assert_array_equal(explanation.targets, [[predicted[0], 3], [3, predicted[1]]])
    twice = explainer(photos(2, 12), [[-1, predicted[0]], [3, -1]])
    first = twice.only(0)
    second = twice.only(1)

    assert first.targets.tolist() == [[predicted[0]]]
    assert first.guided.shape == (1, 1, 3, 12, 12)
    np.testing.assert_array_equal(second.cams["gradcam"], explanation.cams["gradcam"][1:])


@pytest.mark.parametrize(("top", "count"), [(1, 1), (3, 3), (9, 5)])
def test_top_explains_the_classes_with_the_highest_logits_in_order(top, count):
    explanation = Explainer(Tiny())(photos(2, 12), top=top)
    assert explanation.targets.tolist() == [
        list(np.argsort(-logits)[:count]) for logits in explanation.logits
    ]


class Difference(nn.Module):
    """A network whose only logit is the difference of two logits of another."""

    def __init__(self, model, plus, minus):
        super().__init__()
        self.model = model
        self.plus = plus
        self.minus = minus

    def forward(self, x):
        logits = self.model(x)
        return logits[:, [self.plus]] - logits[:, [self.minus]]


DIFFERENCE_METHODS = (*METHODS, "hirescam", "segeigencam", "shapleycam", "fullgrad")


@pytest.mark.parametrize("method", DIFFERENCE_METHODS)
def test_a_difference_of_two_logits_is_explained_like_a_network_that_returns_it(method):
    model = network("resnet18")
    inputs = photos(2, 48)
    ours = Explainer(model, method, "layer3")(inputs, [[2, 4]], minus=[[4, 4]])
    right = Explainer(Difference(model, 2, 4), method, "model.layer3")(inputs)
    alone = Explainer(model, method, "layer3")(inputs, 4)

    assert ours.minus.tolist() == [[4, 4]] * 2
    np.testing.assert_allclose(ours.cams[method][:, 0], right.cams[method], atol=1e-4)
    np.testing.assert_allclose(ours.cams[method][:, 1], alone.cams[method], atol=1e-4)
    assert relative_error(ours.guided[:, 0], right.guided) < 1e-4
    assert relative_error(ours.guided[:, 1], alone.guided) < 1e-4


def test_a_class_and_its_difference_from_another_are_two_questions():
    explanation = Explainer(Tiny())(photos(2, 12), [[3, 3, 3]], minus=[[3, 1, 1]]).only(1)

    assert explanation.targets.tolist() == [[3, 3]]
    assert explanation.minus.tolist() == [[3, 1]]
    assert explanation.cams["gradcam"].shape == (1, 2, 12, 12)


def test_the_prediction_can_be_subtracted():
    explainer = Explainer(Tiny())
    predicted = explainer(photos(2, 12)).targets

    assert explainer(photos(2, 12), 1, minus=-1).minus.tolist() == predicted.tolist()


@pytest.mark.parametrize("minus", [5, -2, [1, 2, 3], [[1]]])
def test_a_class_to_subtract_that_does_not_fit_is_a_call_error(minus):
    with pytest.raises(CallError, match=r"5 classes|2 x 1 classes from 2 targets"):
        Explainer(Tiny())(photos(2, 12), [1, 2], minus=minus)


def test_finercam_refuses_a_difference():
    with pytest.raises(CallError, match=r"finercam does not work.*difference"):
        Explainer(Tiny(), "finercam")(photos(1, 12), 1, minus=2)


# --- the model, the caller's settings and memory stay as they were --------------------------------


def condition(model):
    """Everything about a model that an explainer could have left changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state = []
    for name, module in model.named_modules():
        state.append((name, id(module), module.training))
        state += [len(getattr(module, kind)) for kind in hooks]
    for parameter in model.parameters():
        state.append((id(parameter), parameter.requires_grad, parameter.dtype, parameter.grad))
        state += parameter.stride()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        state.append((tensor._version, tensor.data_ptr()))
    return state


@pytest.mark.parametrize("training", [True, False])
def test_model_and_inputs_come_out_as_they_went_in(training):
    model = copy.deepcopy(network("resnet18")).train(training)
    inputs = photos(2, 32)
    model.layer1.eval()
    model.layer2.requires_grad_(False)
    model(inputs).sum().backward()
    before = condition(model)
    values = inputs.clone()
    ours = Explainer(model, (*METHODS, "shapleycam", "fullgrad"), "layer1")(inputs)

    assert condition(model) == before
    assert torch.equal(inputs, values)
    assert not inputs.requires_grad
    np.testing.assert_allclose(
        ours.logits, model.eval()(inputs).detach(), atol=1e-4
    )  # as in eval mode


@pytest.mark.parametrize("method", [*METHODS, "shapleycam"])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_an_error_in_any_pass_leaves_model_and_explainer_usable(method, layer):
    calls_left = [np.inf]
    errors = 0

    def alarm(module, args, output):
        calls_left[0] -= 1
        if calls_left[0] < 0:
            raise ArithmeticError("alarm")

    model = Tiny(nn.ReLU()).eval()
    inputs = photos(2, 12)
    model.second.register_forward_hook(alarm)
    before = condition(model)
    explainer = Explainer(model, method, layer)
    right = Explainer(model, method, layer)(inputs, 1)

    for calls_left[0] in range(6):
        try:
            explainer(inputs, 1)
        except (ArithmeticError, CallError):
            errors += 1
        calls_left[0] = np.inf

        assert_same_explanation(explainer(inputs, 1), right, 1e-6)

    assert errors
    assert condition(model) == before


MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad, partial(torch.autocast, "cpu")]


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_and_the_settings_of_the_caller_do_not_matter_and_stay(mode):
    def settings():
        modes = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
        numbers = (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            np.geterr(),
        )
        return modes, numbers, torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    methods = (*METHODS, *MORE_METHODS)
    right = Explainer(Tiny(), methods)(photos(1, 12), 2)

    with mode():
        model = Tiny()
        inputs = photos(1, 12)
        before = settings()
        explainer = Explainer(model, methods)
        ours = explainer(inputs, 2)
        logits = explainer.logits(inputs)

        assert settings() == before

    np.testing.assert_allclose(logits.numpy(), right.logits, rtol=1e-5, atol=1e-5)
    assert_same_explanation(ours, right, 1e-5)


OLD = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]
NEW = [
    (getattr(torch.backends.cudnn, "conv", None), "fp32_precision"),
    (torch.backends.cuda.matmul, "fp32_precision"),
]
SETTINGS = (
    NEW if hasattr(torch.backends.cuda.matmul, "fp32_precision") else OLD
)  # the new ones since torch 2.9


@pytest.mark.parametrize("way", ["old", "new"] if SETTINGS is NEW else ["old"])
@pytest.mark.parametrize("allowed", [(True, True), (True, False), (False, True)])
def test_on_a_gpu_there_is_no_tf32_whichever_way_it_was_allowed(way, allowed):
    """The settings tell what torch would do on a GPU, so that none is needed."""

    def values():
        return [getattr(place, name) for place, name in SETTINGS]

    with contextlib.ExitStack() as stack:
        for (place, name), value in zip(SETTINGS, values(), strict=True):
            stack.callback(setattr, place, name, value)

        for (place, name), yes in zip(OLD if way == "old" else NEW, allowed, strict=True):
            new = "tf32" if yes else "ieee"
            setattr(place, name, yes if way == "old" else new)

        before = values()
        with cnn_visualizations.exact_arithmetic(torch.device("cuda")):
            assert values() == ["ieee" if SETTINGS is NEW else False] * 2
            assert torch.backends.cudnn.deterministic

        assert values() == before


# --- any nn.Module classifier ---------------------------------------------------------------------


def test_one_method_and_one_layer_by_name_or_module_also_in_data_parallel():
    model = network("resnet18")
    inputs = photos()
    right = Explainer(model, ["gradcam"], ["layer3"])(inputs)

    for wrapped in (model, nn.DataParallel(model)):
        for layer in ("layer3", "module.layer3", model.layer3):
            assert_same_explanation(
                Explainer(wrapped, methods="gradcam", target_layers=layer)(inputs), right, 1e-6
            )


@pytest.mark.parametrize(
    "name", ["model.layer4[-1].conv2", "layer4[1].conv2", "module.layer4[1].conv2"]
)
def test_layers_by_the_notation_of_grad_cam(name):
    assert Explainer(network("resnet18"), target_layers=name).target_layers == ("layer4.1.conv2",)


def test_a_child_called_model_keeps_its_name():
    model = Difference(network("resnet18"), 0, 1)

    assert Explainer(model, target_layers="model.layer4[-1]").target_layers == ("model.layer4.1",)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("taken_over", [True, False])
def test_a_network_that_is_taken_over_or_not_folded_gives_the_same(taken_over, fold):
    model = copy.deepcopy(network("mobilenet_v2"))
    right = Explainer(model, METHODS)(photos())
    before = condition(model)
    explainer = Explainer(model, METHODS, copy=not taken_over, fold=fold)
    ours = explainer(photos())
    kinds = [type(module) for module in explainer.network.modules()]

    assert_same_explanation(ours, right, 1e-4)
    assert explainer.target_layers == ("features",)
    assert (nn.BatchNorm2d in kinds) != fold
    if taken_over:
        assert explainer.network is model
    else:
        assert condition(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype):
    model = copy.deepcopy(network("resnet18")).to(dtype)
    inputs = photos().to(dtype)
    ours = Explainer(model)(inputs)
    right = Explainer(copy.deepcopy(model).float())(inputs.float())

    assert_same_explanation(ours, right)
    assert ours.cams["gradcam"].dtype == ours.guided.dtype == np.float32
    assert model.fc.weight.dtype == dtype


def returning(how, outputs=5):
    """A network that returns its logits, changed by `how`; it keeps them, so deepcopy fails."""

    def keep(module, args, logits):
        module.kept = logits
        return how(logits)

    model = Tiny(outputs=outputs)
    model.register_forward_hook(keep)
    return model


@pytest.mark.parametrize(
    "how", [lambda y: y, lambda y: y[:, 0], lambda y: y[:, :, None, None]], ids=["N,1", "N", "4d"]
)
def test_of_a_single_output_the_positive_side_is_explained(how):
    inputs = photos(2, 12)
    model = returning(how, outputs=1)
    ours = Explainer(model, METHODS)(inputs)

    assert ours.targets.tolist() == [0, 0]
    assert ours.logits.shape == (2, 1)
    activations, gradients = output_and_gradient(Tiny(outputs=1), "second", inputs[:1], 0)
    right = map_of_weights(gradients.mean((2, 3))[0], activations[0], 12)

    np.testing.assert_allclose(ours.cams["gradcam"][0], right, rtol=0, atol=1e-5)
    for method in ("shapleycam", "fullgrad"):
        assert np.isfinite(Explainer(model, method, guided=False)(inputs).cams[method]).all()

    with pytest.raises(CallError, match="finercam does not work"):  # there is no other class
        Explainer(model, "finercam", guided=False)(inputs)


RESULTS = {
    "tuple with a map": lambda y: (y, y[:, :, None, None].expand(-1, -1, 3, 3)),
    "list with None": lambda y: [y, None],
    "attribute": lambda y: SimpleNamespace(logits=y, loss=None),
    "dict with logits": lambda y: {"logits": y, "features": y * 2},
    "dict with out": lambda y: {"out": y, "aux": y * 2},
}


@pytest.mark.parametrize("kind", RESULTS)
def test_logits_inside_of_another_result(kind):
    model = returning(RESULTS[kind])
    inputs = photos(2, 12)
    model(inputs)

    assert_same_explanation(
        Explainer(model, METHODS)(inputs), Explainer(Tiny(), METHODS)(inputs), 1e-6
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda y: y[:, :, None, None].expand(-1, -1, 2, 2), "returns a tensor of 1 x 5 x 2 x 2;"),
        (lambda y: y.sum(), "returns a tensor of one number "),
        (lambda y: {"scores": y}, "returns a dict"),
        (lambda y: (y[:, :2], y), "1 x 2 and .*1 x 5;"),  # an embedding and the logits, say
    ],
)
def test_a_result_without_clear_logits_is_a_call_error(how, message):
    with pytest.raises(CallError, match=message):
        Explainer(returning(how))(photos(2, 12))


@pytest.mark.parametrize("count", [1, 4])
def test_an_answer_without_the_batch_dimension_is_a_call_error(count):
    """`squeeze` drops it for one input; three classes are not three inputs then."""
    model = returning(torch.squeeze if count == 1 else lambda y: y.sum(0), outputs=3)

    with pytest.raises(CallError, match=r"3 for .* inputs?, without the batch dimension"):
        Explainer(model)(photos(count, 12))


def hooked(convolution):
    convolution.register_forward_hook(lambda module, args, output: 2 * output)
    return convolution


class Normed(nn.Module):
    """A batch norm after a convolution of some kind, whose output may be read beside it as well."""

    def __init__(self, kind, beside):
        super().__init__()
        torch.manual_seed(0)
        self.conv = kind(nn.Conv2d(3, 8, 3))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.beside = beside

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(self.norm(y)) + (F.relu(y) if self.beside else 0)
        return self.head(z.mean((2, 3)))


KINDS = [
    nn.Sequential,
    hooked,
    nn.utils.parametrizations.weight_norm,
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
]


@pytest.mark.parametrize(
    ("kind", "beside"), [*((kind, False) for kind in KINDS), (nn.Sequential, True)]
)
@pytest.mark.parametrize("layer", ["conv", "norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_folding_of_batch_norms_changes_nothing(kind, beside, layer):
    model = calibrated(Normed(kind, beside), 12)
    inputs = photos(2, 12)
    ours = Explainer(model, "gradcam", layer)(inputs, 1)

    np.testing.assert_allclose(ours.logits, model(inputs).detach().numpy(), rtol=0, atol=1e-5)
    assert relative_error(ours.guided, guided_reference(model, inputs, 1)) < 1e-5
    activations, gradients = output_and_gradient(model, layer, inputs[:1], 1)
    right = map_of_weights(gradients.mean((2, 3))[0], activations[0], 12)

    np.testing.assert_allclose(ours.cams["gradcam"][0], right, rtol=0, atol=1e-4)


class ReadTwice(nn.Module):
    """Reads the weight of its convolution a second time: folding would change what it computes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        beside = F.relu(F.conv2d(x, self.conv.weight))
        return self.head((F.relu(self.norm(self.conv(x))) + beside).mean((2, 3)))


def test_batch_norms_stay_where_folding_would_change_the_logits():
    model = calibrated(ReadTwice(), 12)
    explainer = Explainer(model)
    ours = explainer(photos(2, 12), 1)

    np.testing.assert_allclose(ours.logits, model(photos(2, 12)).detach().numpy(), atol=1e-5)
    assert relative_error(ours.guided, guided_reference(model, photos(2, 12), 1)) < 1e-5
    assert isinstance(explainer.network.norm, nn.BatchNorm2d)


# --- wrong calls and empty maps -------------------------------------------------------------------

NO_TENSORS = (Image.new("RGB", (12, 12)), np.zeros((12, 12, 3), np.uint8), "a.jpg")
TOLD = r"^inputs are a tensor, not \w+; use classifier\.preprocess\(photo\)\[None\]$"
NO_BATCHES = [
    (torch.zeros(3, 12, 12), r"one photo: inputs\[None\]$"),
    (torch.zeros(0, 3, 12, 12), "input"),
]


@pytest.mark.parametrize(
    ("wrong", "message"), [*((wrong, TOLD) for wrong in NO_TENSORS), *NO_BATCHES]
)
def test_inputs_that_are_no_batch_are_a_call_error(wrong, message):
    with pytest.raises(CallError, match=message):
        Explainer(Tiny())(wrong)


def test_the_reprs_are_one_line():
    classifier = cnn_visualizations.load_classifier(ckpt=CKPT, device="cpu")
    assert re.fullmatch(r"Classifier\(mobilenet_v2.*19 classes.*225.*\)", repr(classifier))
    explanation = Explainer(Tiny(), ["gradcam", "eigencam"])(photos(2, 12), 3)

    assert re.fullmatch(r"Explanation\(.*gradcam.*eigencam.*\[3, 3\].*\)", repr(explanation))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "gradcamm"}, r"'gradcamm'.*did you mean.*gradcam"),
        ({"target_layers": "layr4"}, "no layer 'layr4'.*layer4"),
        ({"target_layers": ["layer4.1.conv9"]}, r"no layer 'layer4\.1\.conv9'.*layer4\.1\.conv"),
        ({"target_layers": [""]}, "no layer ''"),
        ({"target_layers": nn.Conv2d(3, 8, 3)}, "no layer 'Conv2d'"),
    ],
)
def test_an_unknown_method_or_layer_suggests_a_near_one(options, message):
    with pytest.raises(CallError, match=message):
        Explainer(network("resnet18"), **options)


class Aside(Tiny):
    """The score ignores `aside`, `idle` never runs, `pair` and `pool` return no map."""

    def __init__(self):
        super().__init__()
        self.aside = nn.Conv2d(3, 4, 3)
        self.idle = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.pair = nn.MaxPool2d(1, return_indices=True)

    def forward(self, x):
        self.aside(x)
        return super().forward(self.pair(x)[0]) + self.pool(x).mean((1, 2, 3))[:, None]


ASIDE = [("aside", "does not depend on layer 'aside'"), ("pool", "layer 'pool' has no spatial map")]
ASIDE += [("idle", "layer 'idle' is not called"), ("pair", "layer 'pair' returns a tuple")]


@pytest.mark.parametrize(("layer", "message"), ASIDE)
def test_a_layer_that_cannot_be_explained_is_a_call_error(layer, message):
    methods = ["gradcam", "eigengradcam"]
    if layer != "aside":
        methods += MANY_PASSES

    for method in methods:
        with pytest.raises(CallError, match=message):
            Explainer(Aside(), method, layer)(photos(1, 12))


def test_a_network_without_a_spatial_map_and_a_method_that_does_not_fit_are_call_errors():
    with pytest.raises(CallError, match="no layer has a spatial map"):
        Explainer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)))(photos(1, 8))

    with pytest.raises(CallError, match="shapleycam does not work on layer 'encoder"):
        Explainer(network("small vit"), "shapleycam", "encoder.layers.encoder_layer_1.ln_1")(
            photos()
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "inputs"])
def test_nan_is_an_error(value, where):
    model = Tiny().eval()
    inputs = photos(1, 12)
    with torch.no_grad():
        (model.second.weight if where == "weights" else inputs)[0, 0, 0] = value

    with pytest.raises(ValueError, match="NaN"):
        Explainer(model, METHODS)(inputs)


@pytest.mark.parametrize("method", [*METHODS, *MORE_METHODS])
@pytest.mark.parametrize("zero", ["activations", "scores", "positive evidence"])
def test_maps_are_finite_where_something_is_zero_and_zero_without_positive_evidence(method, zero):
    model = Tiny(nn.ReLU(), outputs=4).eval()
    inputs = photos(1, 12)
    model.second = nn.Sequential(model.second, nn.ReLU())

    with torch.no_grad():
        model.second[0].bias.fill_(-9 if zero == "activations" else 0.1)
        model.head.weight.mul_(0 if zero == "scores" else 1)
        if zero == "positive evidence":
            model.head.weight.fill_(-1)

    explanation = Explainer(model, method, "second")(inputs)
    cams = explanation.cams[method]

    assert 0 <= cams.min() <= cams.max() <= 1
    if zero != "positive evidence":
        assert not explanation.guided.any()
    if zero == "positive evidence" and method in ("gradcam", "gradcam++", "xgradcam"):
        assert not cams.any()


# --- memory and start-up --------------------------------------------------------------------------


def limited(most, error, message):
    """A function with memory for `most` items, and how many it was given at each call."""
    asked = []

    def function(items):
        asked.append(len(items))
        if len(items) > most:
            raise error(message)

        return [2 * item for item in items]

    return function, asked


ALLOCATION = (
    "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to"
)
SHORTAGES = [
    (torch.OutOfMemoryError, "CUDA out of memory"),
    (MemoryError, ""),
    (RuntimeError, ALLOCATION),
]


@pytest.mark.parametrize(
    ("error", "message"), [*SHORTAGES, (RuntimeError, "CUDNN_STATUS_ALLOC_FAILED")]
)
def test_batches_are_halved_where_memory_does_not_suffice(error, message, capsys):
    function, asked = limited(3, error, message)
    batch_size = BatchSize(8)

    first = list(batch_size.run(function, list(range(7))))
    second = list(batch_size.run(function, list(range(4))))

    assert first == [[0, 2], [4, 6], [8, 10], [12]]
    assert second == [[0, 2], [4, 6]]
    assert asked == [7, 4, 2, 2, 2, 1, 2, 2]  # the larger sizes are not tried again
    assert re.fullmatch("warning: .*memory.*smaller.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("most", "message"), [(0, "CUDA out of memory"), (3, "sizes do not match")]
)
def test_other_errors_and_too_little_memory_for_one_item_are_raised(most, message):
    function, asked = limited(most, RuntimeError, message)
    with pytest.raises(RuntimeError, match=message):
        list(BatchSize(8).run(function, list(range(8))))

    assert asked[-1] == (1 if most == 0 else 8)


def test_scorecam_and_logits_go_on_with_smaller_batches():
    def refuse(module, args):
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = Tiny()
    inputs = photos(1, 12)
    right = Explainer(model, "scorecam")(inputs)
    model.register_forward_pre_hook(refuse)
    explainer = Explainer(model, "scorecam", batch_size=16)

    assert_same_explanation(explainer(inputs), right)
    np.testing.assert_allclose(
        explainer.logits(inputs.repeat(7, 1, 1, 1)), right.logits.repeat(7, 0), atol=1e-4
    )


START = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
compiler = sorted(name for name in sys.modules if name.startswith(("sympy", "torch._dynamo")))
import torch
from torchvision.ops import roi_align
boxes = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]])
pooled = roi_align(torch.arange(16.0).view(1, 1, 4, 4), boxes, 2, aligned=True)
compiled = torch.compile(lambda x: torch.relu(x - 3).sum() * 2, backend="eager")
compiled = compiled(torch.arange(16.0)).item()
print(json.dumps([compiler, compiled, pooled.flatten().tolist()]))
"""


def test_the_compiler_is_not_imported_by_a_run_and_works_afterwards(tmp_path):
    """Neither torch._dynamo nor sympy is imported; torch.compile and roi_align work afterwards."""
    command = [
        sys.executable,
        "-c",
        START,
        "cnn_visualizations.py",
        "--ckpt",
        CKPT,
        "--device",
        "cpu",
        "--output",
        tmp_path,
        DOG,
    ]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"gradcam_cam_{DOG.stem}.jpg").is_file()
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [],
        2.0 * sum(range(13)),
        [2.5, 4.5, 10.5, 12.5],
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("arch", LAYERS)
def test_cuda_gives_what_the_cpu_gives_and_the_same_twice(arch):
    model = network(arch)
    inputs = inputs_of(arch, 2)
    on_cpu = Explainer(model, METHODS, LAYERS[arch][0])(inputs, [2, 5])
    on_gpu = Explainer(copy.deepcopy(model).cuda(), METHODS, LAYERS[arch][0])

    assert_same_explanation(on_gpu(inputs, [2, 5]), on_cpu, 1e-4)
    assert_same_explanation(on_gpu(inputs, [2, 5]), on_gpu(inputs, [2, 5]), 0)
