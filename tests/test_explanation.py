"""Section 4, Explanation: maps and guided gradients against grad-cam's classes, float64, and the plain definitions."""

import contextlib
import copy
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

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
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer, get_model, get_model_weights
from torchvision.models.convnext import CNBlockConfig

import cnn_visualizations
from cnn_visualizations import (
    ARCHITECTURES,
    METHODS,
    MORE_METHODS,
    BatchSize,
    CallError,
    Explainer,
    load_classifier,
    read_photo,
)

GRAD_CAM = {
    "gradcam": "GradCAM",
    "scorecam": "ScoreCAM",
    "gradcam++": "GradCAMPlusPlus",
    "ablationcam": "AblationCAM",
    "xgradcam": "XGradCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "gradcamelementwise": "GradCAMElementWise",
    "fem": "FEM",
    "kpcacam": "KPCA_CAM",
    "segeigencam": "SegEigenCAM",
    "fullgrad": "FullGrad",
    "shapleycam": "ShapleyCAM",
    "refinecam": "RefineCAM",
}
MANY_PASSES = ("scorecam", "ablationcam")
ONE_PASS = tuple(method for method in METHODS if method not in MANY_PASSES)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
slow = pytest.mark.slow


# --- networks --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fast_initialisation():
    """Random weights of a sane scale, made so fast that the largest networks take seconds."""
    pool = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def fill(tensor, *args, **kwargs):
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
        with torch.no_grad():
            for part in tensor.view(-1).split(len(pool)):
                torch.mul(pool[: len(part)], scale, out=part)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"):
            patch.setattr(nn.init, name, fill)
        patch.setattr(nn.init, "zeros_", lambda tensor: fill(tensor) if tensor.ndim > 1 else tensor.data.zero_())
        yield


SMALL = {  # narrow ones of the same make
    "small vit": partial(
        VisionTransformer, image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96
    ),
    "small swin": partial(SwinTransformer, [4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4]),
    "small convnext": partial(ConvNeXt, [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]),
}
SIZES = {"maxvit_t": 224, "inception_v3": 160, "vit_b_16": 96, "vit_b_32": 96, "vit_l_32": 96, "vit_h_14": 28}


def build(arch):
    """A network with random weights whose activations and score are like those of a trained one."""
    torch.manual_seed(0)
    size = SIZES.get(arch, 64)
    options = {"image_size": size} if arch.startswith("vit_") else {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    with fast_initialisation():
        make = SMALL.get(arch) or partial(get_model, arch, weights=None)
        return calibrated(make(num_classes=7, **options), size)


network = cache(build)


def calibrated(model, size):
    """The model with batch norms that have statistics, and without layers that their initial zeros switch off."""
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
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
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
        x = self.activation(self.first(x))
        x = self.activation(self.second(x))
        return self.head(x.mean((2, 3)))


# --- references ------------------------------------------------------------------------------------------------------


def tokens_to_map(tokens):
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)


def channels_last_to_map(output):
    return output.permute(0, 3, 1, 2)


RESHAPE = {"vit": tokens_to_map, "swin": channels_last_to_map}


def reshape_of(arch):
    return next((function for name, function in RESHAPE.items() if name in arch and arch != "maxvit_t"), None)


@lru_cache(maxsize=2)
def frozen_copy(model):
    return copy.deepcopy(model).requires_grad_(False)


def signed_projection(contributions, of_class):
    """grad-cam's projection on the principal component, (N, h, w), with the sign of the design's sixth fact."""
    maps = get_2d_projection(contributions)
    for projection, each in zip(maps, contributions, strict=True):
        with np.errstate(invalid="ignore", divide="ignore"):
            signed, unsigned = (np.corrcoef(projection.flat, x.sum(0).flat)[0, 1] for x in (each, np.abs(each)))
        if (signed if of_class and abs(signed) >= 0.4 else unsigned) < 0:
            projection *= -1
    return maps


def grad_cams(method, model, layers, inputs, targets, **options):
    """The maps of grad-cam's own class, on a frozen copy; only the sign of principal components is ours."""
    # Shapley-CAM fails on a frozen network whose layer is followed by nothing but linear ones.
    model = copy.deepcopy(model) if method == "shapleycam" else frozen_copy(model)
    inputs = inputs.clone().requires_grad_(method not in MANY_PASSES)
    kind, layers = getattr(pytorch_grad_cam, GRAD_CAM[method]), [model.get_submodule(name) for name in layers]
    with pytest.MonkeyPatch.context() as patch:
        for parent in kind.__mro__[:-1] if method != "shapleycam" else ():
            project = partial(signed_projection, of_class=method != "eigencam")
            patch.setattr(f"{parent.__module__}.get_2d_projection", project, raising=False)
        cam = kind(model, layers, reshape_transform=options.pop("reshape", None))
        return cam(inputs, [ClassifierOutputTarget(int(target)) for target in targets], **options)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Inputs as small as these gain nothing from more threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quiet_grad_cam(monkeypatch):
    """No progress bars from grad-cam, and every warning of the program anew."""
    for name in ("ablation_cam", "score_cam"):
        module = importlib.import_module(f"pytorch_grad_cam.{name}")
        monkeypatch.setattr(module.tqdm, "tqdm", lambda steps, *_, **__: steps)
    getattr(cnn_visualizations.warn, "cache_clear", int)()


def lifted(model, inputs, target):
    """A copy whose score for the class is 1 where it is negative, which turns grad-cam's Ablation-CAM upside down."""
    model = copy.deepcopy(model)
    score = model(inputs)[0, target].detach()
    lift = 1 - score if score < 0 else 0
    model.register_forward_hook(lambda module, args, logits: logits + lift)
    return model


def non_empty_target(model, layer, inputs, method="gradcam", **options):
    """A class for which grad-cam's map is not empty."""
    for target in range(7):
        if grad_cams(method, lifted(model, inputs, target), [layer], inputs, [target], **options).any():
            return target
    raise AssertionError("every map is empty")


def stretched(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def map_of_weights(weights, activations, size):
    """The map (H, W) that channel weights (C,) give for activations (C, h, w)."""
    small = stretched(torch.einsum("c,chw->hw", weights, activations).clamp(min=0)[None])
    return stretched(F.interpolate(small[:, None], (size, size), mode="bilinear")[:, 0])[0].numpy()


def output_and_gradient(model, layer, inputs, target):
    """A layer's last output, as the layer returned it, and the gradient of the class score with respect to it."""
    kept = []

    def keep(module, args, output):
        kept.append(output)
        return output.clone()

    with model.get_submodule(layer).register_forward_hook(keep):
        score = model(inputs)[0, target]
    return kept[-1].detach(), torch.autograd.grad(score, kept[-1])[0]


def ablation_map(model, layer, inputs, target, axis=1, to_map=lambda output: output):
    """Ablation-CAM as its paper defines it, one whole forward pass a channel, without the division by the score."""
    ablated = []

    def set_to_zero(module, args, output):
        changed = output.clone()
        changed.movedim(axis, 0)[ablated] = 0
        return changed

    activations = output_and_gradient(model, layer, inputs, target)[0]
    with torch.no_grad(), model.get_submodule(layer).register_forward_hook(set_to_zero):
        scores = []
        for ablated in [[], *([channel] for channel in range(activations.shape[axis]))]:  # noqa: B007
            scores.append(model(inputs)[0, target])
    return map_of_weights(scores[0] - torch.stack(scores[1:]), to_map(activations)[0], inputs.shape[-1])


class Rectified(torch.autograd.Function):
    """Identity; backward, only positive gradients pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


ACTIVATIONS = (
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "hardswish", "mish"),
    *("prelu", "softplus", "rrelu"),
)


def guided_reference(model, inputs, target):
    """Guided backpropagation in float64: each activation of torch.nn.functional lets only positive gradients in."""

    def rectify(function, *args, **kwargs):
        return Rectified.apply(function(*args, **kwargs))

    inputs = inputs.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        for name in ACTIVATIONS:
            patch.setattr(F, name, partial(rectify, getattr(F, name)))
        scores = model.double()(inputs)
    guided = torch.autograd.grad(scores[:, target].sum(), inputs)[0].float().numpy()
    model.float()  # the float32 values come back exactly
    return guided


def plain_gradient(model, inputs, target):
    inputs = inputs.clone().requires_grad_()
    return torch.autograd.grad(model(inputs)[:, target].sum(), inputs)[0].numpy()


def relative_error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same_maps(ours, theirs, tolerance=1e-4, name=""):
    assert theirs.max() > 0.5, f"the reference is degenerate: {name}"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def assert_same_explanation(ours, theirs, tolerance=1e-5):
    assert ours.targets.tolist() == theirs.targets.tolist()
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=tolerance, atol=tolerance)
    assert ours.cams.keys() == theirs.cams.keys()
    for method, maps in theirs.cams.items():
        np.testing.assert_allclose(ours.cams[method], maps, rtol=0, atol=tolerance, err_msg=method)
    assert (ours.guided is None) == (theirs.guided is None)
    if theirs.guided is not None:
        np.testing.assert_allclose(ours.guided, theirs.guided, rtol=0, atol=tolerance * np.abs(theirs.guided).max())


# --- maps against grad-cam -------------------------------------------------------------------------------------------

FEW = ("resnet18", "mobilenet_v2", "small vit", "small swin")  # by default; the others behind -m slow


def few(rows, names=FEW):
    """The rows (arch, ...), of which all but those of a few architectures are slow."""
    return [pytest.param(*row, marks=[] if row[0] in names else slow, id=" ".join(map(str, row[:2]))) for row in rows]


LATE_LAYERS = [
    ("resnet18", "layer4"),
    ("vgg11", "features"),
    ("densenet121", "features.denseblock4"),
    ("googlenet", "inception5b"),
    ("mobilenet_v2", "features"),
    ("mobilenet_v3_small", "features"),
    ("efficientnet_b0", "features"),
    ("convnext_tiny", "features"),
    ("vit_b_32", "encoder.layers.encoder_layer_11.ln_1"),
    ("swin_t", "features.7.1.norm1"),
    ("squeezenet1_1", "features"),
    ("small vit", "encoder.layers.encoder_layer_2.ln_1"),
    ("small swin", "features.3.1.norm1"),
]


@pytest.mark.parametrize(("arch", "layer"), few(LATE_LAYERS))
def test_methods_of_one_pass_equal_grad_cam(arch, layer):
    assert_equal_to_grad_cam(network(arch), layer, inputs_of(arch), reshape=reshape_of(arch))


def assert_equal_to_grad_cam(model, layer, inputs, **options):
    target = non_empty_target(model, layer, inputs, **options)
    ours = Explainer(model, ONE_PASS, layer, guided=False)(inputs, target)
    for method in ONE_PASS:
        theirs = grad_cams(method, model, [layer], inputs, [target], **options)
        assert theirs.any() or method == "xgradcam"
        np.testing.assert_allclose(ours.cams[method], theirs, rtol=0, atol=1e-4, err_msg=method)


@pytest.mark.parametrize("height", [48, 96])
def test_inputs_need_not_be_square(height):
    inputs = torch.randn(1, 3, height, 64, generator=torch.Generator().manual_seed(2))
    assert_equal_to_grad_cam(network("resnet18"), "layer3", inputs)


@pytest.mark.parametrize("method", [*ONE_PASS, *(pytest.param(method, marks=slow) for method in MANY_PASSES)])
def test_the_demo_equals_grad_cam(method):
    classifier = load_classifier(ckpt=CKPT, device="cpu", input_size=97)
    inputs = classifier.preprocess(read_photo(DOG))[None]
    ours = Explainer(classifier.model, method, guided=False)(inputs)
    model = lifted(classifier.model, inputs, int(ours.targets[0]))
    assert_same_maps(ours.cams[method], grad_cams(method, model, ["features"], inputs, ours.targets))


RECTIFIED_LAYERS = [  # with few channels and a minimum of 0; else grad-cam's Ablation-CAM does not set channels to zero
    ("resnet18", "layer1"),
    ("mobilenet_v2", "features.1.conv.0"),
    ("vgg11", "features.2"),
    ("densenet121", "features.relu0"),
    ("googlenet", "inception3a.branch3"),
    ("mobilenet_v3_small", "features.2.block.0"),
    ("squeezenet1_1", "features.1"),
]


@pytest.mark.parametrize("method", MANY_PASSES)
@pytest.mark.parametrize(("arch", "layer"), few(RECTIFIED_LAYERS))
def test_methods_of_many_passes_equal_grad_cam(arch, layer, method):
    model, inputs = network(arch), inputs_of(arch)
    target = non_empty_target(model, layer, inputs, method)
    assert output_and_gradient(model, layer, inputs, target)[0].min() == 0
    ours = Explainer(model, method, layer, guided=False)(inputs, target)
    theirs = grad_cams(method, lifted(model, inputs, target), [layer], inputs, [target])
    assert_same_maps(ours.cams[method], theirs)


@pytest.mark.parametrize(
    ("arch", "layer"),
    few(
        [
            ("efficientnet_b0", "features.1"),
            ("small convnext", "features.3"),
            ("small vit", "encoder.layers.encoder_layer_2.ln_1"),
            ("small swin", "features.3.1.norm2"),
        ]
    ),
)
def test_scorecam_equals_grad_cam_where_activations_are_negative(arch, layer):
    model, inputs = network(arch), inputs_of(arch)
    ours = Explainer(model, "scorecam", layer, guided=False)(inputs, 3)
    theirs = grad_cams("scorecam", model, [layer], inputs, [3], reshape=reshape_of(arch))
    assert_same_maps(ours.cams["scorecam"], theirs)


@pytest.mark.parametrize(("arch", "layer"), [("densenet121", "features"), ("resnet18", "layer4.1.bn1")])
def test_activations_are_those_before_an_in_place_relu_where_grad_cam_reads_those_after(arch, layer):
    model, inputs = network(arch), photos(1, 96)
    activations, gradients = output_and_gradient(model, layer, inputs, 3)
    right = map_of_weights(gradients.mean((2, 3))[0], activations[0], 96)
    ours = Explainer(model, "gradcam", layer, guided=False)(inputs, 3).cams["gradcam"]
    assert_same_maps(ours[0], right)
    assert np.abs(grad_cams("gradcam", model, [layer], inputs, [3])[0] - right).max() > 0.01


class Bypass(nn.Module):
    """A network whose layer returns its input, so that a test chooses the activations."""

    def __init__(self, weights):
        super().__init__()
        self.layer, self.weights = nn.Identity(), weights

    def forward(self, x):
        evidence = torch.einsum("nchw,c->n", self.layer(x), self.weights)
        return torch.stack([evidence, -evidence], 1)


@pytest.mark.parametrize("method", ["eigencam", "eigengradcam"])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_a_principal_component_rises_at_the_active_place(method, sign):
    """One place is active, with positive or negative values; there the map of each class must be hottest.

    The evidence of the three channels is positive for the first class, so the map of that class rises there too.
    """
    rng, right = np.random.default_rng(0), {"ours": 0, "grad-cam": 0}
    model = Bypass(sign * torch.tensor([1.0, 1.5, 0.8])).eval()
    for _ in range(30):
        row, column = rng.integers(0, 7, 2)
        values = rng.uniform(0, 0.3, (1, 3, 7, 7))
        values[0, :, row, column] += rng.uniform(1, 2, 3)
        inputs = sign * torch.tensor(values, dtype=torch.float32)
        ours = Explainer(model, method, "layer", guided=False)(inputs, 0).cams[method][0]
        kind = getattr(pytorch_grad_cam, GRAD_CAM[method])
        theirs = kind(model, [model.layer])(inputs.clone().requires_grad_(), [ClassifierOutputTarget(0)])[0]
        right["ours"] += ours.argmax() == 7 * row + column
        right["grad-cam"] += theirs.argmax() == 7 * row + column
    assert right["ours"] == 30
    assert right["grad-cam"] < 30


@pytest.mark.parametrize("method", sorted({*MORE_METHODS} - {"randomcam", "finercam"}))
@pytest.mark.parametrize(
    ("arch", "layer"), few([row for row in LATE_LAYERS if row[0] in ("resnet18", "mobilenet_v2")], FEW[:1])
)
def test_the_other_methods_equal_grad_cam(method, arch, layer):
    model, inputs = network(arch), photos(2)
    if method == "fem":  # which needs more than four positions to find one that stands out
        layer = {"resnet18": "layer2", "mobilenet_v2": "features.5"}[arch]
    targets = [non_empty_target(model, layer, inputs[:1]), 2]
    ours = Explainer(model, method, layer, guided=False)(inputs, targets).cams[method]
    each = [grad_cams(method, model, [layer], inputs[i : i + 1], targets[i : i + 1]) for i in range(2)]
    # FullGrad stretches every channel by itself, also those that hold nothing but rounding errors.
    assert_same_maps(ours, np.concatenate(each), 2e-2 if method == "fullgrad" else 1e-4)


@pytest.mark.parametrize("method", ["hirescam", "layercam", "gradcamelementwise", "fem", "segeigencam", "refinecam"])
@pytest.mark.parametrize("arch", ["small vit", "small swin"])
def test_the_other_methods_on_the_tokens_of_transformers_equal_grad_cam(method, arch):
    model, inputs, layer = network(arch), photos(), dict(LATE_LAYERS)[arch]
    ours = Explainer(model, method, layer, guided=False)(inputs, 3).cams[method]
    assert_same_maps(ours, grad_cams(method, model, [layer], inputs, [3], reshape=reshape_of(arch)))


@pytest.mark.parametrize("arch", ["resnet18", "densenet121"])  # after densenet's `features` follows an in-place ReLU
@pytest.mark.parametrize("target", [None, 2])
def test_finercam_explains_a_class_against_the_three_with_the_nearest_scores(arch, target):
    model, inputs, layer = network(arch), photos(), {"resnet18": "layer4", "densenet121": "features"}[arch]
    ours = Explainer(model, "finercam", layer, guided=False)(inputs, target)
    target = int(ours.targets[0])
    leaf = output_and_gradient(model, layer, inputs, target)[0].requires_grad_()
    head = model.fc if arch == "resnet18" else model.classifier
    scores = head(F.relu(leaf).mean((2, 3)))[0]
    similar = [int(index) for index in (scores - scores[target]).abs().argsort() if index != target][:3]
    shares = scores.softmax(0)[similar]
    score = (shares * (scores[target] - scores[similar])).sum() / shares.sum()
    weights = torch.autograd.grad(score, leaf)[0][0].mean((1, 2))
    assert_same_maps(ours.cams["finercam"][0], map_of_weights(weights, leaf[0].detach(), 64))


def test_randomcam_does_not_depend_on_class_run_or_batch():
    model, inputs = network("resnet18"), photos(2)
    first, again, alone = (
        Explainer(model, "randomcam", "layer2", guided=False)(batch, target).cams["randomcam"]
        for batch, target in ((inputs, 0), (inputs, 1), (inputs[1:], 1))
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first[1:], alone, atol=1e-4)
    assert first.max() > 0.9


@pytest.mark.parametrize("method", sorted(GRAD_CAM.keys() - {"scorecam", "ablationcam", "fullgrad", "refinecam"}))
def test_several_layers_are_averaged_as_in_grad_cam(method):
    model, inputs, layers = network("resnet18"), photos(2), ["layer2.0", "layer3"]
    ours = Explainer(model, method, layers, guided=False)(inputs, [1, 2]).cams[method]
    each = [grad_cams(method, model, layers, inputs[i : i + 1], [i + 1]) for i in range(2)]
    assert_same_maps(ours, np.concatenate(each))


def test_refinecam_is_the_product_of_the_maps_of_several_layers():
    model, inputs, layers = network("resnet18"), photos(), ["layer3", "layer4"]
    ours = Explainer(model, "refinecam", layers, guided=False)(inputs, 1).cams["refinecam"]
    assert_same_maps(ours, grad_cams("refinecam", model, layers, inputs, [1]))


@pytest.mark.parametrize(
    "method", ["gradcam", "gradcam++", "hirescam", "layercam", "gradcamelementwise", "eigencam", "fem", "shapleycam"]
)
def test_eigen_smoothing_equals_grad_cam(method, capsys):
    model, inputs, layer = network("resnet18"), photos(), "layer2"
    target = non_empty_target(model, layer, inputs)
    ours = Explainer(model, method, layer, guided=False, eigen_smooth=True)(inputs, target).cams[method]
    assert capsys.readouterr().out == ""
    assert_same_maps(ours, grad_cams(method, model, [layer], inputs, [target], eigen_smooth=True))
    plain = Explainer(model, method, layer, guided=False)(inputs, target).cams[method]
    assert (np.abs(ours - plain).max() > 0.01) == (method not in ("eigencam", "fem"))  # as in grad-cam


@pytest.mark.parametrize("method", ["gradcam", "eigengradcam", "ablationcam", "shapleycam"])
def test_augmentation_smoothing_equals_grad_cam(method):
    model, inputs, layer = network("mobilenet_v2"), photos(2), "features.1.conv.0"
    target = non_empty_target(model, layer, inputs[:1], method, aug_smooth=True)
    each = [
        grad_cams(method, lifted(model, one, target), [layer], one, [target], aug_smooth=True)
        for one in inputs.split(1)
    ]
    ours, plain = (Explainer(model, method, layer, aug_smooth=smooth)(inputs, target) for smooth in (True, False))
    assert_same_maps(ours.cams[method], np.concatenate(each))
    assert np.abs(ours.cams[method] - plain.cams[method]).max() > 0.01
    np.testing.assert_array_equal(ours.guided, plain.guided)
    np.testing.assert_array_equal(ours.logits, plain.logits)


def test_augmentation_smoothing_keeps_the_classes_of_the_plain_photo():
    explanation = Explainer(network("resnet18"), "gradcam", "layer4", aug_smooth=True)(photos(2), top=2)
    assert explanation.cams["gradcam"].shape == (2, 2, 64, 64)
    np.testing.assert_array_equal(explanation.targets, np.argsort(-explanation.logits, 1)[:, :2])


# --- Ablation-CAM ----------------------------------------------------------------------------------------------------

ABLATED_LAYERS = [
    ("resnet18", "layer1.0.bn2"),
    ("mobilenet_v2", "features.2"),
    ("small vit", "encoder.layers.encoder_layer_2.ln_1"),
    ("small swin", "features.3.1.norm2"),
    ("small convnext", "features.1"),
    ("efficientnet_b0", "features.2"),
    ("mobilenet_v3_small", "features.4"),
    # of a branch, beside which others run
    ("resnet18", "layer2.0.downsample.0"),
    ("resnet18", "layer2.1.conv1"),
    ("googlenet", "inception3a.branch4.0"),
    ("densenet121", "features.denseblock1.denselayer3.norm1"),
    # called twice in a pass
    ("resnet18", "layer1.1.relu"),
]


@pytest.mark.parametrize(("arch", "layer"), few(ABLATED_LAYERS))
def test_ablation_sets_each_channel_to_zero_where_grad_cam_sets_it_to_minus_ten_million(arch, layer):
    model, inputs = network(arch), inputs_of(arch)
    axis = {"small vit": 2, "small swin": 3}.get(arch, 1)
    whole = layer.removesuffix(".relu")  # the last call's output is the block's
    references = (
        ablation_map(model, whole, inputs, target, axis, reshape_of(arch) or (lambda output: output))
        for target in range(7)
    )
    target, right = next((target, cam) for target, cam in enumerate(references) if cam.any())
    ours = Explainer(model, "ablationcam", layer, guided=False)(inputs, target).cams["ablationcam"]
    assert_same_maps(ours[0], right)
    if (arch, layer) in ABLATED_LAYERS[:2]:
        theirs = grad_cams("ablationcam", model, [layer], inputs, [target])
        assert np.abs(np.nan_to_num(theirs[0]) - right).max() > 0.1


def test_ablation_is_the_same_for_a_negative_score_where_grad_cams_is_upside_down():
    """A constant added to all scores does not change what the network predicts."""
    model, inputs, layer = network("mobilenet_v2"), photos(), "features.1.conv.0"
    positive = lifted(model, inputs, 3)
    negative = copy.deepcopy(positive)
    negative.register_forward_hook(lambda module, args, logits: logits - 2)
    ours, theirs = [], []
    for shifted in (positive, negative):
        ours += [Explainer(shifted, "ablationcam", layer, guided=False)(inputs, 3).cams["ablationcam"]]
        theirs += [grad_cams("ablationcam", shifted, [layer], inputs, [3])]
    assert_same_maps(ours[0], theirs[0])
    assert_same_maps(ours[1], ours[0])
    assert np.corrcoef(theirs[1].ravel(), theirs[0].ravel())[0, 1] < 0


class Counting(nn.Conv2d):
    """Counts the multiplications by inputs and positions: how much of the network was run."""

    work: ClassVar = {}

    def forward(self, x):
        self.work[self.in_channels] = self.work.get(self.in_channels, 0) + x.shape[0] * x.shape[2] * x.shape[3]
        return super().forward(x)


class Repeating(nn.Module):
    """One ReLU for two places, as in torchvision's Bottleneck; the second is the last layer but the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Counting(3, 16, 3, padding=1), Counting(16, 48, 3, stride=4)
        self.third = Counting(48, 8, 3)
        self.relu, self.head = nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.head(self.third(x).mean((2, 3)))


def test_ablation_of_a_layer_that_is_called_twice_runs_only_what_follows_its_last_call():
    model, inputs = Repeating().eval(), photos(1, 128)
    apart = nn.Sequential(model.first, nn.ReLU(), model.second, nn.ReLU(), model.third, nn.AdaptiveAvgPool2d(1))
    apart += nn.Sequential(nn.Flatten(), model.head)
    right = ablation_map(apart, "3", inputs, 2)
    explainer = Explainer(model, "ablationcam", "relu", guided=False)
    explainer(inputs, 2)
    Counting.work.clear()
    ours = explainer(inputs, 2).cams["ablationcam"]
    assert_same_maps(ours[0], right)
    assert Counting.work[48] > 40 * 29 * 29  # what follows runs for (nearly) each of the 48 channels
    assert Counting.work[3] < 6 * 128 * 128  # what comes before does not
    assert Counting.work[16] < 6 * 128 * 128


# --- guided backpropagation and the default layer --------------------------------------------------------------------

DEFAULT_LAYERS = {
    "alexnet|vgg|densenet|mobilenet|efficientnet|convnext|squeezenet": "features",
    "resnet|resnext|wide_resnet": "layer4",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "maxvit": "blocks.3.layers.1",
    "mnasnet": "layers",
    "regnet": "trunk_output",
    "shufflenet": "conv5",
    "swin": "permute",
    "vit_b": "encoder.layers.encoder_layer_11.ln_1",
    "vit_l": "encoder.layers.encoder_layer_23.ln_1",
    "vit_h": "encoder.layers.encoder_layer_31.ln_1",
    "small vit": "encoder.layers.encoder_layer_2.ln_1",
    "small swin": "permute",
    "small convnext": "features",
}
QUICK = ("resnet18", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5")
QUICK += ("densenet121", "googlenet", *SMALL)


def free_memory():
    """Bytes, or infinity where nothing tells."""
    table = Path("/proc/meminfo")
    if not table.is_file():
        return float("inf")
    return int(table.read_text().split("MemAvailable:")[1].split()[0]) * 1024


@pytest.mark.parametrize("arch", [a if a in QUICK else pytest.param(a, marks=slow) for a in (*ARCHITECTURES, *SMALL)])
def test_default_layer_and_guided_gradients_of_each_architecture(arch):
    """Guided gradients equal float64 to 0.005 where plain gradients are off by 0.1 and more.

    float32 alone makes up to 2e-3 of that in networks with random weights.
    """
    if arch not in SMALL and free_memory() < 16 * get_model_weights(arch).DEFAULT.meta["num_params"] + 1e9:
        pytest.skip("not enough memory")
    model, inputs = (network if arch in QUICK else build)(arch), inputs_of(arch)
    explainer = Explainer(model, "eigencam")
    ours = explainer(inputs, 3).guided
    assert explainer.target_layers == (next(v for k, v in DEFAULT_LAYERS.items() if re.match(f"({k})", arch)),)
    del explainer
    right = guided_reference(model, inputs, 3)
    assert relative_error(plain_gradient(model, inputs, 3), right) > 0.1
    assert relative_error(ours, right) < 5e-3


def test_guided_gradients_equal_grad_cam_where_every_activation_is_a_relu_module():
    model, inputs = network("resnet18"), photos()
    reference = pytorch_grad_cam.GuidedBackpropReLUModel(copy.deepcopy(model), device="cpu")
    assert relative_error(Explainer(model)(inputs, 3).guided[0], reference(inputs.clone(), 3).transpose(2, 0, 1)) < 1e-5


MODULES = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.1, 0.3), nn.LeakyReLU(0.1), nn.ELU(), nn.CELU()),
    *(nn.SELU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Hardswish(), nn.Mish(), nn.Softplus()),
    *(nn.PReLU(8), nn.RReLU()),
]


@pytest.mark.parametrize("activation", MODULES, ids=str)
def test_guided_gradients_of_an_activation_module(activation):
    model, inputs = Tiny(activation).eval(), photos(2, 12)
    right = guided_reference(model, inputs, 1)
    assert relative_error(plain_gradient(model, inputs, 1), right) > 0.01
    assert relative_error(Explainer(model)(inputs, 1).guided, right) < 1e-5


FUNCTIONS = {
    "torch.relu": (torch.relu, F.relu),
    "Tensor.relu": (torch.Tensor.relu, F.relu),
    "Tensor.relu_": (torch.Tensor.relu_, F.relu),
    "F.relu": (F.relu, F.relu),
    "F.relu in place": (partial(F.relu, inplace=True), F.relu),
    "F.relu6": (F.relu6, F.relu6),
    "F.gelu": (F.gelu, F.gelu),
    "F.elu in place": (partial(F.elu, inplace=True), F.elu),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_guided_gradients_of_an_activation_function(name):
    function, plain = FUNCTIONS[name]
    right = guided_reference(Tiny(lambda x: Rectified.apply(plain(x))), photos(2, 12), 1)
    assert relative_error(Explainer(Tiny(function))(photos(2, 12), 1).guided, right) < 1e-5


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Identity()], ids=str)
def test_without_an_activation_the_guided_gradient_is_the_plain_one(gate):
    model, inputs = Tiny(gate), photos(2, 12)
    assert relative_error(Explainer(model)(inputs, 1).guided, plain_gradient(model, inputs, 1)) < 1e-5


# --- several classes, inputs, methods --------------------------------------------------------------------------------


def test_methods_inputs_and_classes_together_equal_each_alone():
    methods = (*METHODS, "layercam", "fem", "fullgrad", "finercam")
    model, inputs, targets = network("small convnext"), photos(2, 32), torch.tensor([[4, 0, 2], [1, 4, 6]])
    together = Explainer(model, methods)(inputs, targets)
    assert list(together.cams) == list(methods)
    assert together.targets.tolist() == targets.tolist()
    without = Explainer(model, methods, guided=False)(inputs, targets)
    assert without.guided is None
    for method in methods:
        assert together.cams[method].shape == (2, 3, 32, 32)
        np.testing.assert_allclose(without.cams[method], together.cams[method], atol=1e-6, err_msg=method)
        explainer = Explainer(model, method)
        for i, k in ((0, 0), (0, 2), (1, 1)):
            alone = explainer(inputs[i : i + 1], targets[i, k])
            np.testing.assert_allclose(together.cams[method][i, k], alone.cams[method][0], atol=2e-5, err_msg=method)
            assert relative_error(together.guided[i, k], alone.guided[0]) < 1e-4
            np.testing.assert_allclose(together.logits[i], alone.logits[0], atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "mobilenet_v2"])
def test_the_same_result_twice(arch):
    model, inputs = network(arch), photos(2)
    explainer = Explainer(model, ["gradcam", "xgradcam", "eigencam"])
    first, again, another = explainer(inputs), explainer(inputs), Explainer(model, explainer.methods)(inputs)
    for other in (again, another):
        assert_same_explanation(other, first, 1e-6)


def test_shapes_types_and_ranges_of_an_explanation():
    explanation = Explainer(network("resnet18"), METHODS, "layer1")(photos(3))
    for maps in explanation.cams.values():
        assert (maps.shape, maps.dtype) == ((3, 64, 64), np.float32)
        assert 0 <= maps.min() < maps.max() <= 1
    assert (explanation.guided.shape, explanation.guided.dtype) == ((3, 3, 64, 64), np.float32)
    assert (explanation.logits.shape, explanation.logits.dtype) == ((3, 7), np.float32)
    assert (explanation.targets.shape, explanation.targets.dtype) == ((3,), np.int64)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_logits_are_those_of_the_model(arch):
    model, inputs = network(arch), photos(3)
    with torch.no_grad():
        right = model(inputs).numpy()
    explainer = Explainer(model)
    np.testing.assert_allclose(explainer.logits(inputs).numpy(), right, rtol=1e-4, atol=1e-4)  # before folding
    np.testing.assert_allclose(explainer(inputs).logits, right, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(explainer.logits(inputs).numpy(), right, rtol=1e-4, atol=1e-4)
    assert explainer(inputs).targets.tolist() == right.argmax(1).tolist()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (4, [4, 4]),
        ([4, 2], [4, 2]),
        ((4, 2), [4, 2]),
        (torch.tensor([4, 2]), [4, 2]),
        (torch.tensor(4), [4, 4]),
        (np.array([4, 2]), [4, 2]),
        (np.int64(4), [4, 4]),
        ([[4, 1]], [[4, 1], [4, 1]]),
        ([[4, 1], [0, 2]], [[4, 1], [0, 2]]),
    ],
)
def test_targets_in_any_form(targets, expected):
    explanation = Explainer(Tiny())(photos(2, 12), targets)
    assert explanation.targets.tolist() == expected
    assert explanation.guided.shape == (*explanation.targets.shape, 3, 12, 12)
    assert explanation.only(1).cams["gradcam"].shape == (1, *explanation.targets.shape[1:], 12, 12)


@pytest.mark.parametrize("targets", [5, -1, [0, 5], [0, -1], torch.tensor([7, 0])])
def test_a_target_out_of_range_is_a_call_error(targets):
    with pytest.raises(CallError, match="5 classes"):
        Explainer(Tiny())(photos(2, 12), targets)


@pytest.mark.parametrize("targets", [[0, 1, 2], [[0], [1], [2]], [[[0]]], [], [0.5, 1.0], [True, False]])
def test_targets_that_do_not_fit_the_batch_are_a_call_error(targets):
    with pytest.raises(CallError):
        Explainer(Tiny())(photos(2, 12), targets)


@pytest.mark.parametrize(("top", "count"), [(1, 1), (3, 3), (9, 5)])
def test_top_explains_the_classes_with_the_highest_logits_in_order(top, count):
    explanation = Explainer(Tiny())(photos(2, 12), top=top)
    assert explanation.targets.tolist() == [list(np.argsort(-logits)[:count]) for logits in explanation.logits]


# --- the model, the caller's settings and memory stay as they were ---------------------------------------------------


def condition(model):
    """Everything about a model that an explainer could have left changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "replaced": ["forward" in vars(module) for module in model.modules()],
        "parameters": [(id(p), p.requires_grad, p.dtype, p.stride(), p.grad) for p in model.parameters()],
        "versions": [(tensor._version, tensor.data_ptr()) for tensor in (*model.parameters(), *model.buffers())],
    }


@pytest.mark.parametrize("training", [True, False])
def test_model_and_inputs_come_out_as_they_went_in(training):
    model, inputs = copy.deepcopy(network("resnet18")).train(training), photos(2)
    model.layer1.eval()
    model.layer2.requires_grad_(False)
    model(inputs).sum().backward()
    before, state, values = condition(model), copy.deepcopy(model.state_dict()), inputs.clone()
    ours = Explainer(model, (*METHODS, "shapleycam", "fullgrad"), "layer1")(inputs)
    assert condition(model) == before
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(inputs, values)
    assert not inputs.requires_grad
    assert inputs.grad is None
    np.testing.assert_allclose(ours.logits, model.eval()(inputs).detach(), atol=1e-4)  # as in eval mode


class Alarm(nn.Module):
    """Raises when it has been called `after` times."""

    after = float("inf")

    def forward(self, x):
        Alarm.after -= 1
        if Alarm.after < 0:
            raise ArithmeticError("alarm")
        return x.clone()


@pytest.mark.parametrize("method", [*METHODS, "shapleycam"])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_an_error_in_any_pass_leaves_model_and_explainer_usable(method, layer, monkeypatch):
    model = Tiny(nn.ReLU()).eval()
    model.second = nn.Sequential(model.second, Alarm())
    inputs, before, errors = photos(2, 12), condition(model), 0
    right = Explainer(model, method, layer)(inputs, 1)
    explainer = Explainer(model, method, layer)
    for passes in range(6):
        monkeypatch.setattr(Alarm, "after", passes)
        try:
            explainer(inputs, 1)
        except (ArithmeticError, CallError):
            errors += 1
        monkeypatch.setattr(Alarm, "after", float("inf"))
        assert_same_explanation(explainer(inputs, 1), right, 1e-6)
    assert errors
    assert condition(model) == before


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, partial(torch.autocast, "cpu")]
)
def test_the_mode_of_the_caller_does_not_matter_and_stays(mode):
    model, methods = network("resnet18"), (*METHODS, "finercam")
    right = Explainer(model, methods, "layer1")(photos(), 2)
    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        explainer = Explainer(model, methods, "layer1")
        ours, logits = explainer(photos(), 2), explainer.logits(photos())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == modes
    np.testing.assert_allclose(logits.numpy(), right.logits, rtol=1e-5, atol=1e-5)
    assert_same_explanation(ours, right, 1e-6)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, inputs = calibrated(get_model("resnet18", weights=None, num_classes=7), 64), photos()
    normal = get_model("resnet18", weights=None, num_classes=7).eval()
    normal.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()})
    assert_same_explanation(Explainer(model)(inputs), Explainer(normal)(photos()))


def test_torch_settings_stay():
    def settings():
        cudnn = torch.backends.cudnn
        precisions = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision()
        return *precisions, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), np.geterr()

    before, random_state = settings(), torch.get_rng_state()
    Explainer(Tiny(), (*METHODS, *MORE_METHODS))(photos(1, 12))
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), random_state)


OLD = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]
NEW = [
    (place, "fp32_precision")
    for place in (getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul)
    if hasattr(place, "fp32_precision")
]


@pytest.mark.parametrize("places", [OLD, pytest.param(NEW, marks=pytest.mark.skipif(not NEW, reason="torch < 2.9"))])
@pytest.mark.parametrize("allowed", [(True, True), (True, False), (False, True)])
def test_on_a_gpu_there_is_no_tf32_whichever_way_it_was_allowed(places, allowed, monkeypatch):
    """What torch would do on a GPU is told by its settings, so that no GPU is needed."""

    def precisions():
        return [getattr(place, name) for place, name in NEW or OLD]

    for place, name in NEW + OLD:
        with contextlib.suppress(RuntimeError):  # the old settings cannot tell what the new ones have mixed
            monkeypatch.setattr(place, name, getattr(place, name))
    for (place, name), yes in zip(places, allowed, strict=True):
        monkeypatch.setattr(place, name, yes if places is OLD else "tf32" if yes else "ieee")
    before = precisions()
    with cnn_visualizations.exact_arithmetic(torch.device("cuda")):
        assert precisions() == (["ieee"] * 2 if NEW else [False] * 2)
        assert torch.backends.cudnn.deterministic
    assert precisions() == before


@pytest.mark.parametrize("methods", [METHODS, ("shapleycam", "finercam", "segeigencam", "fullgrad")])
def test_no_tensor_is_kept_after_a_call(methods):
    def tensors():
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    explainer, inputs = Explainer(Tiny().eval(), methods), photos(1, 12)
    for _ in range(2):
        explainer(inputs)
    gc.collect()
    gc.disable()  # nothing may wait for the collector either
    try:
        before = tensors()
        for _ in range(5):
            explainer(inputs)
        assert tensors() <= before + 2
    finally:
        gc.enable()


# --- any nn.Module classifier ----------------------------------------------------------------------------------------


def test_data_parallel_around_the_model():
    model, inputs = network("resnet18"), photos(2)
    wrapped = nn.DataParallel(model)
    right = Explainer(model, target_layers="layer3")(inputs)
    for layer in ("layer3", "module.layer3", wrapped.module.layer3):
        assert_same_explanation(Explainer(wrapped, target_layers=layer)(inputs), right, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype):
    model, inputs = copy.deepcopy(network("resnet18")).to(dtype), photos().to(dtype)
    right = Explainer(copy.deepcopy(model).float())(inputs.float())
    ours = Explainer(model)(inputs)
    assert_same_explanation(ours, right)
    assert ours.cams["gradcam"].dtype == ours.guided.dtype == np.float32
    assert model.fc.weight.dtype == dtype


class Returning(nn.Module):
    """A network that returns its logits, changed by `how`."""

    def __init__(self, how, outputs=5):
        super().__init__()
        self.backbone, self.how = Tiny(outputs=outputs), how

    def forward(self, x):
        return self.how(self.backbone(x))


@pytest.mark.parametrize("how", [lambda y: y, lambda y: y[:, 0], lambda y: y[:, :, None, None]], ids=["N,1", "N", "4d"])
def test_of_a_single_output_the_positive_side_is_explained(how):
    inputs, model = photos(2, 12), Returning(how, outputs=1).eval()
    ours = Explainer(model, METHODS)(inputs)
    assert ours.targets.tolist() == [0, 0]
    assert ours.logits.shape == (2, 1)
    activations, gradients = output_and_gradient(model.backbone, "second", inputs[:1], 0)
    right = map_of_weights(gradients.mean((2, 3))[0], activations[0], 12)
    np.testing.assert_allclose(ours.cams["gradcam"][0], right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        lambda y: (y, y[:, :, None, None].expand(-1, -1, 3, 3)),
        lambda y: [y, None],
        lambda y: SimpleNamespace(logits=y, loss=None),
        lambda y: {"logits": y, "features": y * 2},
        lambda y: {"out": y, "aux": y * 2},
    ],
    ids=["tuple", "list", "attribute", "dict with logits", "dict with out"],
)
def test_logits_inside_of_another_result(how):
    inputs, plain = photos(2, 12), Returning(lambda y: y).eval()
    assert_same_explanation(Explainer(Returning(how).eval(), METHODS)(inputs), Explainer(plain, METHODS)(inputs), 1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda y: y[:, :, None, None].expand(-1, -1, 2, 2), "returns a tensor of 1 x 5 x 2 x 2;"),
        (lambda y: y.sum(), "returns a tensor of one number;"),
        (lambda y: {"scores": y}, "returns a dict"),
        (lambda y: None, "returns a NoneType"),
        (lambda y: (y[:, :2], y), "returns 1 x 2 and 1 x 5;"),
    ],
    ids=["map", "number", "dict", "nothing", "embedding and logits"],
)
def test_a_result_without_clear_logits_is_a_call_error(how, message):
    with pytest.raises(CallError, match=message):
        Explainer(Returning(how).eval())(photos(2, 12))


def plain_network(*tail):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *tail).eval()


def test_a_sequential_network():
    model, inputs = plain_network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), photos(2, 16)
    explainer = Explainer(model)
    ours = explainer(inputs, 1)
    assert explainer.target_layers == ("3",)
    assert_same_maps(ours.cams["gradcam"], grad_cams("gradcam", model, ["3"], inputs, [1, 1]))
    assert relative_error(ours.guided, guided_reference(model, inputs, 1)) < 1e-5


def test_a_network_inside_of_another():
    model, inputs = Returning(lambda y: y).eval(), photos()
    model.backbone = network("resnet18")
    explainer, plain = Explainer(model), Explainer(network("resnet18"))
    assert_same_explanation(explainer(inputs), plain(inputs), 1e-6)
    assert explainer.target_layers == ("backbone.layer4",)


def test_a_network_that_keeps_its_activations():
    class Keeping(Tiny):
        def forward(self, x):
            self.features = self.first(x)
            return self.head(torch.relu(self.second(torch.relu(self.features))).mean((2, 3)))

    model, inputs = Keeping().eval(), photos(1, 12)
    model(inputs)  # what it keeps now belongs to a graph, and cannot be copied
    assert_same_explanation(Explainer(model)(inputs), Explainer(Tiny().eval())(inputs), 1e-6)


def hooked(convolution):
    convolution.register_forward_hook(lambda module, args, output: 2 * output)
    return convolution


CONVOLUTIONS = {
    "plain": lambda convolution: convolution,
    "with a hook": hooked,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


class Normed(nn.Module):
    """A batch norm after a convolution of any kind, whose own output or weight may be read beside it."""

    def __init__(self, kind="plain", beside=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = CONVOLUTIONS[kind](nn.Conv2d(3, 8, 3))
        self.norm, self.head, self.beside = nn.BatchNorm2d(8), nn.Linear(8, 4), beside

    def forward(self, x):
        y = self.conv(x)
        z = F.relu(self.norm(y))
        if self.beside:
            z = z + F.relu(y if self.beside == "output" else F.conv2d(x, self.conv.weight))
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "beside"), [*((kind, None) for kind in CONVOLUTIONS), ("plain", "output"), ("plain", "weight")]
)
@pytest.mark.parametrize("layer", ["conv", "norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_folding_of_batch_norms_changes_nothing(kind, beside, layer):
    model, inputs = calibrated(Normed(kind, beside), 12), photos(2, 12)
    ours = Explainer(model, "gradcam", layer)(inputs, 1)
    np.testing.assert_allclose(ours.logits, model(inputs).detach().numpy(), rtol=0, atol=1e-5)
    assert relative_error(ours.guided, guided_reference(model, inputs, 1)) < 1e-5
    activations, gradients = output_and_gradient(model, layer, inputs, 1)
    for index in range(2):
        right = map_of_weights(gradients.mean((2, 3))[0], activations[index], 12)
        np.testing.assert_allclose(ours.cams["gradcam"][index], right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", ["layer4.0.conv1", "layer4.0.bn1", "layer4.0.relu", "layer2.0.downsample.1", "conv1"])
def test_a_layer_that_folding_would_change(layer):
    model, inputs = network("resnet18"), photos()
    target = non_empty_target(model, layer.removesuffix(".relu"), inputs)
    activations, gradients = output_and_gradient(model, layer, inputs, target)
    ours = Explainer(model, "gradcam", layer)(inputs, target).cams["gradcam"][0]
    assert_same_maps(ours, map_of_weights(gradients.mean((2, 3))[0], activations[0], 64))


# --- wrong calls and empty maps --------------------------------------------------------------------------------------


def test_one_method_and_one_layer_as_strings_or_module():
    model, inputs = network("resnet18"), photos()
    right = Explainer(model, ["gradcam"], ["layer3"])(inputs)
    for layer in ("layer3", model.layer3):
        assert_same_explanation(Explainer(model, methods="gradcam", target_layers=layer)(inputs), right, 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [Image.new("RGB", (12, 12)), np.zeros((12, 12, 3), np.uint8), np.zeros((1, 3, 12, 12), np.float32), "a.jpg"],
)
def test_inputs_that_are_no_tensor_are_told_of_classifier_preprocess(wrong):
    with pytest.raises(CallError, match=r"^inputs are a tensor, not .*classifier\.preprocess\(.*\)") as error:
        Explainer(Tiny())(wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [(photos(1, 12)[0], r"not 3 x 12 x 12; of one photo: inputs\[None\]"), (photos(1, 12)[:0], "input")],
    ids=["one photo", "no photo"],
)
def test_inputs_that_are_no_batch_are_a_call_error(inputs, message):
    with pytest.raises(CallError, match=message):
        Explainer(Tiny())(inputs)


def test_the_reprs_are_one_line():
    classifier = load_classifier(ckpt=CKPT, device="cpu")
    assert re.fullmatch(r"Classifier\(mobilenet_v2.*19 classes.*225.*\)", repr(classifier))
    explanation = Explainer(Tiny(), ["gradcam", "eigencam"])(photos(2, 12), 3)
    assert re.fullmatch(r"Explanation\(.*gradcam.*eigencam.*\[3, 3\].*\)", repr(explanation))
    assert len(repr(explanation)) < 300


def test_an_unknown_method_suggests_a_near_one():
    with pytest.raises(CallError, match=r"'gradcamm'.*did you mean.*gradcam"):
        Explainer(Tiny(), "gradcamm")


@pytest.mark.parametrize(("wrong", "near"), [("layr4", "layer4"), ("layer4.1.conv9", r"layer4\.1\.conv"), ("", "")])
def test_an_unknown_layer_suggests_a_near_one(wrong, near):
    with pytest.raises(CallError, match=rf"no layer '{wrong}'.*{near}"):
        Explainer(network("resnet18"), target_layers=[wrong])


class Aside(Tiny):
    """`aside` runs but the score does not depend on it; `idle` never runs; `pair` returns two tensors."""

    def __init__(self):
        super().__init__()
        self.aside, self.idle, self.pair, self.pool = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(3, 4, 3),
            Pair(),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x):
        self.aside(x)
        return super().forward(self.pair(x)[0]) + self.pool(x).mean((1, 2, 3))[:, None]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("method", ["gradcam", "eigengradcam", "scorecam", "ablationcam", "shapleycam"])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("pool", "'pool' has no spatial map"),
        ("aside", "does not depend on layer 'aside'"),
        ("idle", "'idle' is not called"),
        ("pair", "'pair' returns a tuple"),
    ],
)
def test_a_layer_that_cannot_be_explained_is_a_call_error(method, layer, message):
    if layer == "aside" and method in MANY_PASSES:
        pytest.skip("these take no gradients: their map is empty or of other layers' making")
    with pytest.raises(CallError, match=message if method != "shapleycam" else layer):
        Explainer(Aside(), method, layer)(photos(1, 12))


def test_a_module_of_another_network_is_no_layer():
    with pytest.raises(CallError, match="no layer 'Conv2d'"):
        Explainer(Tiny(), target_layers=[Tiny().first])


def test_a_network_without_a_spatial_map_is_a_call_error():
    with pytest.raises(CallError, match="no layer has a spatial map"):
        Explainer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)))(photos(1, 8))


def test_shapleycam_on_tokens_is_a_call_error():
    with pytest.raises(CallError, match="shapleycam does not work on layer 'encoder"):
        Explainer(network("small vit"), "shapleycam", "encoder.layers.encoder_layer_1.ln_1")(photos())


@pytest.mark.parametrize("method", ["finercam", "shapleycam", "fullgrad"])
def test_a_single_output_is_explained_or_a_call_error(method):
    with contextlib.suppress(CallError):
        assert np.isfinite(Explainer(Tiny(outputs=1), method, "first", guided=False)(photos(1, 12)).cams[method]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "inputs"])
def test_nan_is_an_error_and_changes_nothing(value, where):
    model, inputs = Tiny().eval(), photos(1, 12)
    with torch.no_grad():
        (model.second.weight if where == "weights" else inputs)[0, 0, 0] = value
    before = condition(model)
    with pytest.raises(ValueError, match="NaN"):
        Explainer(model, METHODS)(inputs)
    assert condition(model) == before


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "xgradcam"])
def test_a_map_without_positive_evidence_is_zero(method):
    model = plain_network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model[-1].weight.data.fill_(-1)  # every activation lowers the score
    assert not Explainer(model, method, "3")(photos(2, 12)).cams[method].any()


@pytest.mark.parametrize("method", [*METHODS, *MORE_METHODS])
@pytest.mark.parametrize("zero", ["activations", "scores"])
def test_zero_activations_or_scores_give_a_finite_map(method, zero):
    model, inputs = Tiny(outputs=4).eval(), photos(1, 12) if zero == "scores" else torch.zeros(1, 3, 12, 12)
    with torch.no_grad():
        for parameter in (*model.head.parameters(),) if zero == "scores" else (model.second.weight,):
            parameter.zero_()
        model.second.bias.fill_(-1 if zero == "activations" else 0.1)
    explanation = Explainer(model, method, "second" if zero == "activations" else None)(inputs)
    assert np.isfinite(explanation.cams[method]).all()
    assert 0 <= explanation.cams[method].min() <= explanation.cams[method].max() <= 1
    assert not explanation.guided.any()


# --- memory ----------------------------------------------------------------------------------------------------------


def limited(most, error=torch.OutOfMemoryError, message="CUDA out of memory. Tried to allocate 2.00 MiB"):
    """A function for which memory suffices for `most` items, and how many it was given at each call."""
    asked = []

    def function(items):
        asked.append(len(items))
        if len(items) > most:
            raise error(message)
        return [2 * item for item in items]

    return function, asked


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (MemoryError, ""),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried"),
        (RuntimeError, "CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_batches_are_halved_where_memory_does_not_suffice(error, message, capsys):
    function, asked = limited(3, error, message)
    batch_size = BatchSize(8)
    assert [*batch_size.run(function, [*range(7)])] == [[0, 2], [4, 6], [8, 10], [12]]
    assert asked == [7, 4, 2, 2, 2, 1]
    asked.clear()
    assert sum(batch_size.run(function, [*range(4)]), []) == [0, 2, 4, 6]
    assert asked == [2, 2]  # the larger sizes are not tried again
    assert re.fullmatch("warning: .*memory.*smaller.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("most", "error", "message"), [(0, torch.OutOfMemoryError, "CUDA out of memory"), (3, RuntimeError, "bad shapes")]
)
def test_other_errors_and_too_little_memory_for_one_item_are_raised(most, error, message):
    function, asked = limited(most, error, message)
    with pytest.raises(error, match=message):
        [*BatchSize(8).run(function, [*range(8)])]
    assert asked[-1] == (1 if most == 0 else 8)


class Limited(nn.Sequential):
    """A network for which memory suffices for three inputs at once."""

    def forward(self, inputs):
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(inputs)


def test_scorecam_and_logits_go_on_with_smaller_batches():
    inner, inputs = network("resnet18"), photos()
    explainer = Explainer(Limited(inner), "scorecam", "0.layer1", batch_size=16)
    right = Explainer(inner, "scorecam", "layer1")(inputs)
    assert_same_explanation(explainer(inputs), right)
    np.testing.assert_allclose(explainer.logits(inputs.repeat(7, 1, 1, 1)), right.logits.repeat(7, 0), atol=1e-4)
    assert explainer.batch_size.size in (2, 3)


# --- start-up --------------------------------------------------------------------------------------------------------

START = """
import json, runpy, sys
sys.argv = ["cnn_visualizations.py", *sys.argv[1:]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
compiler = sorted(name for name in sys.modules if name.split(".")[0] == "sympy" or name.startswith("torch._dynamo"))
import torch
from torchvision.ops import roi_align
x = torch.arange(16.0).view(1, 1, 4, 4)
box = torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]])
compiled = torch.compile(lambda x: torch.relu(x - 3).sum() * 2, backend="eager")(x).item()
print(json.dumps([compiler, compiled, roi_align(x, box, 2, aligned=True).flatten().tolist()]))
"""


def test_the_compiler_is_not_imported_by_a_run_and_works_afterwards(tmp_path):
    """Neither torch._dynamo nor sympy is imported; torch.compile and roi_align work in the same process."""
    command = [sys.executable, "-c", START, "--ckpt", CKPT, "--output", tmp_path, "--device", "cpu", DOG]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, env={**os.environ}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    compiler, compiled, pooled = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / f"gradcam_cam_{DOG.stem}.jpg").is_file()
    assert compiler == []
    assert compiled == 2 * sum(range(13))
    assert pooled == [2.5, 4.5, 10.5, 12.5]


# --- on a GPU --------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize(("arch", "layer"), LATE_LAYERS)
def test_cuda_gives_what_the_cpu_gives(arch, layer):
    model, inputs = network(arch), inputs_of(arch, 2)
    on_cpu = Explainer(model, METHODS, layer)(inputs, [2, 5])
    on_gpu = Explainer(copy.deepcopy(model).cuda(), METHODS, layer)(inputs, [2, 5])
    assert_same_explanation(on_gpu, on_cpu, 1e-4)


@needs_cuda
def test_cuda_gives_the_same_twice():
    explainer, inputs = Explainer(copy.deepcopy(network("resnet18")).cuda(), METHODS), photos(2)
    assert_same_explanation(explainer(inputs), explainer(inputs), 0)
