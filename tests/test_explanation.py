"""Room 4, Explanation: maps and guided gradients against grad-cam's own classes and against first principles."""

import contextlib
import copy
import gc
import importlib
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CKPT, DOG
from pytorch_grad_cam import (
    FEM,
    KPCA_CAM,
    AblationCAM,
    EigenCAM,
    EigenGradCAM,
    FinerCAM,
    FullGrad,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    GuidedBackpropReLUModel,
    HiResCAM,
    LayerCAM,
    RefineCAM,
    ScoreCAM,
    SegEigenCAM,
    ShapleyCAM,
    XGradCAM,
)
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer, get_model, list_models
from torchvision.models.convnext import CNBlockConfig

from cnn_visualizations import (
    METHODS,
    MORE_METHODS,
    CallError,
    ExactArithmetic,
    Explainer,
    Packed,
    can_pack,
    load_classifier,
    note_once,
    principal_component,
    read_photo,
)

GRAD_CAM = {
    "gradcam": GradCAM,
    "scorecam": ScoreCAM,
    "gradcam++": GradCAMPlusPlus,
    "ablationcam": AblationCAM,
    "xgradcam": XGradCAM,
    "eigencam": EigenCAM,
    "eigengradcam": EigenGradCAM,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "gradcamelementwise": GradCAMElementWise,
    "fem": FEM,
    "kpcacam": KPCA_CAM,
    "segeigencam": SegEigenCAM,
    "fullgrad": FullGrad,
    "shapleycam": ShapleyCAM,
}
BY_PASSES = ("scorecam", "ablationcam")
AT_ONCE = tuple(method for method in METHODS if method not in BY_PASSES)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


# --- networks --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cheap_initialisation():
    """Random weights of a sane scale, made so fast that the largest networks take a second."""
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


# Narrow ones of the same make, for what needs a pass for each channel.
SMALL = {
    "small vit": partial(
        VisionTransformer, image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96
    ),
    "small swin": partial(SwinTransformer, [4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4]),
    "small convnext": partial(ConvNeXt, [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]),
}


@cache
def network(arch, size=64):
    """A network with random weights whose activations and score are like those of a trained one."""
    torch.manual_seed(0)
    options = {"image_size": size} if arch.startswith("vit_") else {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    with cheap_initialisation():
        build = SMALL.get(arch) or partial(get_model, arch, weights=None)
        return calibrated(build(num_classes=7, **options), size)


def calibrated(model, size):
    """Batch norms with statistics of their own, and no layer that is switched off by its initial zeros."""
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
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size))
    return model.eval()


def photos(count=1, size=64, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


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


RESHAPE = {
    "vit_b_32": tokens_to_map,
    "small vit": tokens_to_map,
    "swin_t": channels_last_to_map,
    "small swin": channels_last_to_map,
}


@lru_cache(maxsize=2)  # the largest are half a gigabyte
def frozen_copy(model):
    return copy.deepcopy(model).requires_grad_(False)


def signed_projection(contributions):
    """grad-cam's projection of each (C, h, w) on its principal component, turned so that it goes with their sum."""
    maps = get_2d_projection(contributions)
    for of_photo, each in zip(maps, contributions, strict=True):
        if (of_photo * each.sum(0)).sum() < -1e-3 * (of_photo**2).sum():  # 0 behind a layer norm
            of_photo *= -1
    return maps


def grad_cams(method, model, layers, inputs, targets, reshape=None, **options):
    """The maps of grad-cam's own class, on a copy; frozen, since it would compute the gradients of all weights.

    Only the sign of principal components is ours.
    """
    # Shapley-CAM fails on a frozen network whose layer is followed by nothing but linear ones.
    model = copy.deepcopy(model) if method == "shapleycam" else frozen_copy(model)
    inputs = inputs.clone().requires_grad_(method not in BY_PASSES)
    with (
        GRAD_CAM[method](model, [model.get_submodule(name) for name in layers], reshape_transform=reshape) as cam,
        pytest.MonkeyPatch.context() as patch,
    ):
        for kind in GRAD_CAM[method].__mro__[:-1] if method != "shapleycam" else ():
            patch.setattr(f"{kind.__module__}.get_2d_projection", signed_projection, raising=False)
        return cam(inputs, [ClassifierOutputTarget(int(target)) for target in targets], **options)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Inputs as small as these gain nothing from more, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quiet_grad_cam(monkeypatch):
    for name in ("ablation_cam", "score_cam"):
        module = importlib.import_module(f"pytorch_grad_cam.{name}")
        monkeypatch.setattr(module.tqdm, "tqdm", lambda steps, *_, **__: steps)


def lifted(model, inputs, target):
    """A copy whose score for the class is 1 where it is negative, which turns grad-cam's Ablation-CAM upside down."""
    model = copy.deepcopy(model)
    score = model(inputs)[0, target].detach()
    lift = 1 - score if score < 0 else 0
    model.register_forward_hook(lambda module, args, logits: logits + lift)
    return model


def stretched(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def picture_of(weights, activations, size):
    """The map (H, W) that channel weights (C,) give for activations (C, h, w)."""
    small = stretched(torch.einsum("c,chw->hw", weights, activations).clamp(min=0)[None])
    return stretched(F.interpolate(small[:, None], (size, size), mode="bilinear")[:, 0])[0].numpy()


def output_and_gradient(model, layer, inputs, target):
    """A layer's output, as the layer gave it, and the gradient of the class score with respect to it."""
    kept = []

    def keep(module, args, output):
        kept.append(output)
        return output.clone()

    handle = model.get_submodule(layer).register_forward_hook(keep)
    score = model(inputs)[0, target]
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(score, kept[0])[0]


@torch.no_grad()
def ablated_scores(model, layer, inputs, target, axis=1):
    """The score with each channel of the layer set to zero in turn, one whole forward pass for each; and without."""
    chosen = []

    def zero(module, args, output):
        if not chosen:
            return output
        changed = output.clone()
        changed.movedim(axis, 0)[chosen[0]] = 0
        return changed

    width = output_and_gradient_free(model, layer, inputs).shape[axis]
    handle = model.get_submodule(layer).register_forward_hook(zero)
    whole = model(inputs)[0, target]
    scores = []
    for channel in range(width):
        chosen[:] = [channel]
        scores.append(model(inputs)[0, target])
    handle.remove()
    return whole, torch.stack(scores)


@torch.no_grad()
def output_and_gradient_free(model, layer, inputs):
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: kept.append(args[2].clone()))
    model(inputs)
    handle.remove()
    return kept[-1]


def ablation_picture(model, layer, inputs, target, axis=1, to_map=lambda output: output):
    """Ablation-CAM as its paper defines it, but for the sign of a negative score."""
    whole, scores = ablated_scores(model, layer, inputs, target, axis)
    activations = to_map(output_and_gradient_free(model, layer, inputs))[0]
    return picture_of((whole - scores) / whole.abs(), activations, inputs.shape[-1])


class Rectified(torch.autograd.Function):
    """Nothing forward; backward, only positive gradients pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


ACTIVATIONS = ("relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "hardswish", "mish")


@contextlib.contextmanager
def rectified_activations():
    """Every activation function of torch.nn.functional lets only positive gradients in."""

    def rectify(function, *args, **kwargs):
        return Rectified.apply(function(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        for name in (*ACTIVATIONS, "prelu", "softplus", "rrelu"):
            patch.setattr(F, name, partial(rectify, getattr(F, name)))
        yield


def guided_reference(model, inputs, target):
    inputs = inputs.clone().requires_grad_()
    with rectified_activations():
        scores = model(inputs)
    return torch.autograd.grad(scores[:, target].sum(), inputs)[0].numpy()


def assert_close(ours, theirs, relative=1e-4):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * max(np.abs(theirs).max(), 1e-30))


def assert_same_maps(ours, theirs, tolerance=1e-4):
    assert theirs.max() > 0.5, "the reference is degenerate"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


# --- the maps --------------------------------------------------------------------------------------------------------

# architecture, input size, the layer that is found on its own, a narrow layer with a minimum of 0
ARCHITECTURES = [
    ("resnet18", 64, "layer4", "layer1"),
    ("vgg11", 64, "features", "features.2"),
    ("densenet121", 64, "features", "features.relu0"),
    ("googlenet", 64, "inception5b", "inception3a.branch3"),
    ("mobilenet_v2", 64, "features", "features.1.conv.0"),
    ("mobilenet_v3_small", 64, "features", "features.2.block.0"),
    ("efficientnet_b0", 64, "features", "features.1.0.block.1.fc1"),
    ("convnext_tiny", 64, "features", None),
    ("vit_b_32", 96, "encoder.layers.encoder_layer_11.ln_1", None),
    ("swin_t", 64, "permute", None),
    ("squeezenet1_1", 64, "features", "features.1"),
]
ids = [row[0] for row in ARCHITECTURES]


@pytest.mark.parametrize(("arch", "size", "layer", "narrow"), ARCHITECTURES, ids=ids)
def test_the_last_layer_with_a_spatial_map_is_found(arch, size, layer, narrow):
    explainer = Explainer(network(arch, size), ["eigencam"], guided=False)
    explainer(photos(size=size))
    assert explainer.target_layers == (layer,)


@pytest.mark.parametrize(("arch", "size", "layer", "narrow"), ARCHITECTURES, ids=ids)
def test_gradient_and_eigen_methods_equal_grad_cam(arch, size, layer, narrow):
    layer = {"densenet121": "features.denseblock4", "swin_t": "features.7.1.norm1"}.get(arch, layer)
    assert_equals_grad_cam(network(arch, size), layer, photos(1, size), RESHAPE.get(arch))


def assert_equals_grad_cam(model, layer, inputs, reshape=None):
    target = lively_target(model, layer, inputs, reshape)
    ours = Explainer(model, AT_ONCE, [layer], guided=False)(inputs, target)
    for method in AT_ONCE:
        theirs = grad_cams(method, model, [layer], inputs, [target], reshape)
        assert theirs.any() or method == "xgradcam"
        np.testing.assert_allclose(ours.cams[method], theirs, rtol=0, atol=1e-4, err_msg=method)


def test_the_sign_of_a_principal_component_is_not_left_to_chance_as_in_grad_cam():
    """Every channel sees the same spot, more or less; so that is where the map must be hottest."""
    rng, right = np.random.default_rng(0), {"ours": 0, "grad-cam's": 0}
    for _ in range(50):
        spot = np.zeros((7, 7))
        place = tuple(rng.integers(0, 7, 2))
        spot[place] = 1
        channels = rng.uniform(0.5, 1.5, (1, 6, 1, 1)) * spot + rng.uniform(0, 0.3, (1, 6, 7, 7))
        for whose, project in (("ours", principal_component), ("grad-cam's", get_2d_projection)):
            of_photo = project(torch.from_numpy(channels) if whose == "ours" else channels.copy())[0]
            right[whose] += divmod(int(of_photo.argmax()), 7) == place
    assert right["ours"] == 50
    assert right["grad-cam's"] < 40


def lively_target(model, layer, inputs, reshape=None, method="gradcam"):
    """A class for which the map has something in it."""
    for target in range(7):
        if grad_cams(method, lifted(model, inputs, target), [layer], inputs, [target], reshape).any():
            return target
    raise AssertionError("every map is empty")


with_narrow = [(arch, size, narrow) for arch, size, _, narrow in ARCHITECTURES if narrow and "fc1" not in narrow]


@pytest.mark.parametrize(("arch", "size", "layer"), with_narrow, ids=[row[0] for row in with_narrow])
@pytest.mark.parametrize("method", BY_PASSES)
def test_methods_that_ask_again_equal_grad_cam(arch, size, layer, method):
    model, inputs = network(arch, size), photos(1, size)
    assert output_and_gradient_free(model, layer, inputs).min() == 0  # else grad-cam's ablation is not one
    target = lively_target(model, layer, inputs, method=method)
    ours = Explainer(model, [method], [layer], guided=False)(inputs, target)
    theirs = grad_cams(method, lifted(model, inputs, target), [layer], inputs, [target])
    assert_same_maps(ours.cams[method], theirs)


@pytest.mark.parametrize(
    ("arch", "size", "layer"),
    [
        ("efficientnet_b0", 64, "features.1"),
        ("small convnext", 32, "features.3"),
        ("small vit", 64, "encoder.layers.encoder_layer_2.ln_1"),
        ("small swin", 32, "features.3.1.norm2"),
    ],
)
def test_scorecam_equals_grad_cam_where_activations_are_negative(arch, size, layer):
    model, inputs = network(arch, size), photos(1, size)
    ours = Explainer(model, ["scorecam"], [layer], guided=False)(inputs, 3)
    assert_same_maps(ours.cams["scorecam"], grad_cams("scorecam", model, [layer], inputs, [3], RESHAPE.get(arch)))


@pytest.mark.parametrize(
    ("arch", "size", "layer", "axis", "to_map"),
    [
        ("efficientnet_b0", 64, "features.2", 1, lambda output: output),
        ("mobilenet_v3_small", 64, "features.4", 1, lambda output: output),
        ("resnet18", 64, "layer1.0.bn2", 1, lambda output: output),
        ("small convnext", 32, "features.1", 1, lambda output: output),
        ("small vit", 64, "encoder.layers.encoder_layer_2.ln_1", 2, tokens_to_map),
        ("small swin", 32, "features.3.1.norm2", 3, channels_last_to_map),
    ],
)
def test_ablation_sets_channels_to_zero_where_grad_cam_sets_them_to_minus_ten_million(arch, size, layer, axis, to_map):
    model, inputs = network(arch, size), photos(1, size)
    target = {"small swin": 0, "mobilenet_v3_small": 1}.get(arch, 3)  # for which there is something in the map
    right = ablation_picture(model, layer, inputs, target, axis, to_map)
    ours = Explainer(model, ["ablationcam"], [layer], guided=False)(inputs, target).cams["ablationcam"]
    assert_same_maps(ours[0], right)
    if axis == 1:  # grad-cam has another class for the others
        theirs = grad_cams("ablationcam", model, [layer], inputs, [target])
        assert np.abs(np.nan_to_num(theirs[0]) - right).max() > 0.1


def test_ablation_is_the_same_for_a_negative_score_where_grad_cams_is_upside_down():
    """A constant added to the scores says nothing of the photo."""
    model, inputs, layer = network("mobilenet_v2"), photos(), "features.1.conv.0"
    positive = lifted(model, inputs, 3)
    negative = copy.deepcopy(positive)
    negative.register_forward_hook(lambda module, args, logits: logits - 2)
    ours, theirs = [], []
    for shifted in (positive, negative):
        ours += [Explainer(shifted, ["ablationcam"], [layer], guided=False)(inputs, 3).cams["ablationcam"]]
        theirs += [grad_cams("ablationcam", shifted, [layer], inputs, [3])]
    assert_same_maps(ours[0], theirs[0])
    assert_same_maps(ours[1], ours[0])
    assert np.corrcoef(theirs[1].ravel(), theirs[0].ravel())[0, 1] < 0


@pytest.mark.parametrize(("arch", "layer"), [("densenet121", "features"), ("resnet18", "layer4.1.bn1")])
def test_activations_are_those_before_an_in_place_relu_where_grad_cam_reads_those_after(arch, layer):
    model, inputs = network(arch, 96), photos(1, 96)
    activations, gradients = output_and_gradient(model, layer, inputs, 3)
    right = picture_of(gradients.mean((2, 3))[0], activations[0], 96)
    ours = Explainer(model, ["gradcam"], [layer], guided=False)(inputs, 3).cams["gradcam"]
    assert_same_maps(ours[0], right)
    assert np.abs(grad_cams("gradcam", model, [layer], inputs, [3])[0] - right).max() > 0.01


@pytest.mark.parametrize(
    ("arch", "layer"),
    [
        ("densenet121", "features.denseblock4.denselayer16.conv2"),
        ("densenet121", "features.denseblock1.denselayer3.norm1"),
        ("googlenet", "inception4a.branch2"),
        ("googlenet", "inception3a.branch4.0"),
        ("resnet18", "layer2.0.downsample.0"),
        ("resnet18", "layer2.1.conv1"),
        ("mobilenet_v2", "features.4.conv.0.0"),
    ],
)
def test_ablation_beside_a_bypass_equals_one_whole_pass_for_each_channel(arch, layer):
    model, inputs = network(arch), photos(1)
    target = 3 if layer != "layer2.0.downsample.0" else 0  # of whose map nothing is left
    right = ablation_picture(model, layer, inputs, target)
    ours = Explainer(model, ["ablationcam"], [layer], guided=False)(inputs, target).cams["ablationcam"]
    assert_same_maps(ours[0], right)


class Repeating(nn.Module):
    """One relu for two places of different width, as in torchvision's Bottleneck."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 3)
        self.relu, self.head = nn.ReLU(), nn.Linear(9, 4)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))


def test_ablation_of_a_layer_that_runs_twice_ablates_its_last_run():
    model, inputs = Repeating().eval(), photos(1, 12)
    as_two = nn.Sequential(model.first, nn.ReLU(), model.second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    as_two.append(model.head)
    right = ablation_picture(as_two, "3", inputs, 2)
    ours = Explainer(model, ["ablationcam"], ["relu"], guided=False)(inputs, 2).cams["ablationcam"]
    assert_same_maps(ours[0], right)


def test_several_layers_are_averaged_as_in_grad_cam():
    model, inputs, layers = network("resnet18"), photos(2), ["layer2", "layer3", "layer4"]
    ours = Explainer(model, AT_ONCE, layers, guided=False)(inputs, [1, 2])
    for method in AT_ONCE:
        assert_same_maps(ours.cams[method], grad_cams(method, model, layers, inputs, [1, 2]))


def test_all_methods_in_one_pass_equal_each_alone():
    model, inputs = network("resnet18"), photos(2)
    together = Explainer(model, METHODS, ["layer1"])(inputs, 4)
    assert list(together.cams) == list(METHODS)
    for method in METHODS:
        alone = Explainer(model, [method], ["layer1"])(inputs, 4)
        np.testing.assert_allclose(together.cams[method], alone.cams[method], rtol=0, atol=1e-6)
        np.testing.assert_allclose(together.guided, alone.guided, rtol=0, atol=1e-6 * np.abs(alone.guided).max())


@pytest.mark.parametrize("height", [48, 96])
def test_inputs_need_not_be_square(height):
    inputs = torch.randn(1, 3, height, 64, generator=torch.Generator().manual_seed(2))
    assert_equals_grad_cam(network("resnet18"), "layer3", inputs)


@pytest.fixture(scope="module")
def husky():
    classifier = load_classifier(ckpt=CKPT, device="cpu")
    return classifier.model, classifier.preprocess(read_photo(DOG))[None]


@pytest.mark.parametrize("method", METHODS)
def test_the_demo_equals_grad_cam(husky, method):
    model, inputs = husky
    if method in BY_PASSES:  # 1280 passes of grad-cam
        inputs = F.interpolate(inputs, (97, 97), mode="bilinear")
    ours = Explainer(model, [method], guided=False)(inputs)
    assert ours.targets.tolist() == [int(model(inputs).argmax())]
    model = lifted(model, inputs, int(ours.targets[0]))
    assert_same_maps(ours.cams[method], grad_cams(method, model, ["features"], inputs, ours.targets))


@pytest.mark.parametrize("method", METHODS)
def test_the_demo_equals_grad_cam_to_the_fifth_digit_on_the_same_activations(husky, method, monkeypatch):
    monkeypatch.setattr("cnn_visualizations.fold_batch_norms", lambda *args, **kwargs: None)
    monkeypatch.setattr("cnn_visualizations.memory_format", lambda device: torch.contiguous_format)
    monkeypatch.setattr("cnn_visualizations.can_pack", lambda: False)
    model, inputs = husky
    inputs = F.interpolate(inputs, (97, 97), mode="bilinear")
    ours = Explainer(model, [method], guided=False)(inputs)
    theirs = grad_cams(method, lifted(model, inputs, int(ours.targets[0])), ["features"], inputs, ours.targets)
    assert_same_maps(ours.cams[method], theirs, 1e-5)


# --- guided backpropagation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "vgg11"])
def test_guided_gradients_equal_grad_cam_where_every_activation_is_a_relu_module(arch):
    model, inputs = network(arch), photos(1)
    theirs = GuidedBackpropReLUModel(copy.deepcopy(model), device="cpu")(inputs.clone(), 3).transpose(2, 0, 1)
    assert_close(Explainer(model)(inputs, 3).guided[0], theirs, 1e-5)


@pytest.mark.parametrize("arch", [row[0] for row in ARCHITECTURES])
def test_guided_gradients_equal_an_independent_reference(arch):
    _, size, *_ = ARCHITECTURES[ids.index(arch)]
    model, inputs = network(arch, size), photos(2, size)
    right = guided_reference(model, inputs, 3)
    assert np.abs(right - plain_gradient(model, inputs, 3)).max() > 0.1 * np.abs(right).max()
    assert_close(Explainer(model)(inputs, 3).guided, right, 1e-4)


def plain_gradient(model, inputs, target):
    inputs = inputs.clone().requires_grad_()
    return torch.autograd.grad(model(inputs)[:, target].sum(), inputs)[0].numpy()


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


@pytest.mark.parametrize("activation", MODULES, ids=str)
def test_an_activation_module_is_clamped(activation):
    model, inputs = Tiny(activation).eval(), photos(2, 12)
    right = guided_reference(model, inputs, 1)
    assert np.abs(right - plain_gradient(model, inputs, 1)).max() > 0.01 * np.abs(right).max()
    assert_close(Explainer(model)(inputs, 1).guided, right, 1e-5)


FUNCTIONS = {
    "torch.relu": (torch.relu, F.relu),
    "Tensor.relu": (lambda x: x.relu(), F.relu),
    "Tensor.relu_": (lambda x: x.relu_(), F.relu),
    "F.relu": (F.relu, F.relu),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), F.relu),
    "F.relu6": (F.relu6, F.relu6),
    "F.silu": (F.silu, F.silu),
    "F.gelu": (F.gelu, F.gelu),
    "F.hardswish": (F.hardswish, F.hardswish),
    "F.leaky_relu": (F.leaky_relu, F.leaky_relu),
    "F.elu in place": (lambda x: F.elu(x, inplace=True), F.elu),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_function_is_clamped(name):
    function, plain = FUNCTIONS[name]
    inputs = photos(2, 12)
    reference = Tiny(lambda x: Rectified.apply(plain(x))).eval()
    leaf = inputs.clone().requires_grad_()
    right = torch.autograd.grad(reference(leaf)[:, 1].sum(), leaf)[0].numpy()
    assert_close(Explainer(Tiny(function).eval())(inputs, 1).guided, right, 1e-5)


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Identity()], ids=str)
def test_without_an_activation_the_guided_gradient_is_the_plain_one(gate):
    model, inputs = Tiny(gate).eval(), photos(2, 12)
    assert_close(Explainer(model)(inputs, 1).guided, plain_gradient(model, inputs, 1), 1e-5)


def test_guided_is_none_where_it_is_not_wanted():
    model, inputs = network("resnet18"), photos(1)
    without, with_it = Explainer(model, guided=False)(inputs), Explainer(model)(inputs)
    assert without.guided is None
    assert with_it.guided.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(without.cams["gradcam"], with_it.cams["gradcam"], rtol=0, atol=1e-6)


class Watched(TorchDispatchMode):
    """Counts the activations that run forward, and how many run backward with a gradient that is nowhere negative."""

    forward = ("relu", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "elu", "mish")
    backward = ("threshold_backward", *(f"{name}_backward" for name in forward))

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.removesuffix("_") in self.forward:
            self.seen["forward"] += 1
        elif name in self.backward:
            self.seen["clamped" if args[0].min() >= 0 else "free"] += 1
        return function(*args, **(kwargs or {}))


def cheap_network(arch):
    """The architecture with an input that is as small as it takes."""
    size = {"maxvit_t": 224, "inception_v3": 96, "vit_h_14": 28}.get(arch, 64)
    options = {"image_size": size} if arch.startswith("vit_") else {}
    if arch in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    with cheap_initialisation():
        model = get_model(arch, weights=None, num_classes=3, **options).eval()
    return model, photos(1, size)


def memory_free():
    """Bytes, or infinity where nobody tells."""
    table = Path("/proc/meminfo")
    if not table.is_file():
        return float("inf")
    return int(table.read_text().split("MemAvailable:")[1].split()[0]) * 1024


HUGE = {"regnet_y_128gf": 8e9, "vit_h_14": 8e9, "vit_l_16": 4e9, "vit_l_32": 4e9}


@pytest.mark.parametrize("arch", list_models(module=sys.modules["torchvision.models"]))
def test_every_activation_of_every_architecture_is_clamped(arch):
    if memory_free() < HUGE.get(arch, 2e9):
        pytest.skip("not enough memory")
    model, inputs = cheap_network(arch)
    explainer = Explainer(model, ["eigencam"])  # no backward pass but the guided one
    target = int(explainer(inputs).targets[0])
    with Watched() as plain:
        plain_gradient(model, inputs, target)
    with Watched() as ours:
        guided = explainer(inputs, target).guided
    assert plain.seen["free"] > 0, "the network has nothing to clamp"
    on_the_way = plain.seen["clamped"] + plain.seen["free"]
    # half of the activations of a Swin v2 work on its position tables, not on what comes from the input
    assert plain.seen["forward"] == on_the_way * (2 if arch.startswith("swin_v2") else 1)
    assert (ours.seen["forward"], ours.seen["clamped"], ours.seen["free"]) == (plain.seen["forward"], on_the_way, 0)
    assert np.abs(guided).max() > 0


# --- packed convolutions ----------------------------------------------------------------------------------------------

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch has no packed convolutions on this machine")

CONVOLUTIONS = {
    "3 x 3": nn.Conv2d(8, 16, 3, padding=1),
    "1 x 1, without bias": nn.Conv2d(8, 16, 1, bias=False),
    "a stem": nn.Conv2d(3, 16, 7, stride=2, padding=3),
    "strides that leave rows over": nn.Conv2d(8, 16, (2, 3), stride=(3, 4), padding=(0, 1)),
    "dilated": nn.Conv2d(8, 16, 3, padding=2, dilation=(2, 1)),
}


@needs_packing
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_packed_convolution_is_the_convolution_for_inputs_of_any_shape(name):
    plain = CONVOLUTIONS[name].requires_grad_(False)
    packed = Packed(plain)
    for shape in [(1, 14, 14), (4, 14, 14), (1, 13, 17), (1, 14, 14)]:
        inputs = torch.randn(shape[0], plain.in_channels, *shape[1:]).requires_grad_()
        ours, theirs = packed(inputs), plain(inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(y.square().sum(), inputs)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        assert torch.equal(packed.weight, plain.weight)


class Borrowing(nn.Module):
    """A network with each kind of convolution that must not be packed, and one whose weights are read from outside."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.by_groups = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.hooked = nn.Conv2d(8, 8, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, args, output: 2 * output)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.conv2d(x, self.shared.weight, padding=1) + self.shared(x)
        for layer in (self.by_groups, self.reflecting, self.same, self.hooked):
            x = F.relu(layer(x))
        return self.head(x.mean((2, 3)))


@needs_packing
def test_what_must_not_be_packed_is_not(monkeypatch):
    torch.manual_seed(0)
    model, inputs = Borrowing().eval(), photos(2, 16)
    explainer = Explainer(model, ["gradcam", "scorecam"], ["same"])
    packed = explainer(inputs)
    monkeypatch.setattr("cnn_visualizations.can_pack", lambda: False)
    assert_same_explanation(packed, Explainer(model, ["gradcam", "scorecam"], ["same"])(inputs))
    kinds = {name: type(module) for name, module in explainer._network.named_children()}
    assert [name for name, kind in kinds.items() if kind is Packed] == ["shared"]


@needs_packing
def test_packing_keeps_no_more_than_two_copies_of_the_weights():
    convolution = nn.Conv2d(64, 64, 3).requires_grad_(False)
    packed = Packed(convolution)
    for size in (8, 9, 10):
        inputs = torch.randn(1, 64, size, size).requires_grad_()
        packed(inputs).sum().backward()
    assert packed._weights.keys() == {"forward", "backward", "lock"}
    assert all(packed._weights[direction][1].is_mkldnn for direction in ("forward", "backward"))
    assert not list(packed.buffers())


@pytest.mark.parametrize("fault", ["it is missing", "it fails", "it is wrong"])
def test_where_an_operator_is_not_what_it_was_nothing_is_packed(fault, monkeypatch):
    operator = SimpleNamespace()
    if fault == "it fails":
        operator._reorder_convolution_weight = Mock(side_effect=RuntimeError("not built with this"))
    elif fault == "it is wrong":
        operator._reorder_convolution_weight = lambda weight, *_: weight
        operator._reorder_convolution_transpose_weight = lambda weight, *_: weight
        operator._convolution_pointwise = lambda x, w, b, pad, stride, *_: 1.01 * F.conv2d(x, w, b, stride, pad)
        operator._convolution_transpose_pointwise = lambda y, w, b, pad, out, stride, *_: F.conv_transpose2d(
            y, w, b, stride, pad, out
        )
    inputs, packed = photos(1), Explainer(network("resnet18"))(photos(1))
    monkeypatch.setattr(torch.ops, "mkldnn", operator)
    can_pack.cache_clear()
    try:
        explainer = Explainer(network("resnet18"))
        assert_same_explanation(explainer(inputs), packed)
        assert not any(isinstance(module, Packed) for module in explainer._network.modules())
    finally:
        can_pack.cache_clear()


# --- batches, targets, repetition ------------------------------------------------------------------------------------


def assert_same_explanation(ours, theirs, tolerance=1e-5):
    assert ours.targets.tolist() == theirs.targets.tolist()
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=tolerance, atol=tolerance)
    for method, maps in theirs.cams.items():
        np.testing.assert_allclose(ours.cams[method], maps, rtol=0, atol=tolerance)
    if theirs.guided is not None:
        assert_close(ours.guided, theirs.guided, tolerance)


def test_a_batch_gives_each_photo_what_it_gets_alone():
    explainer, inputs = Explainer(network("resnet18"), METHODS, ["layer1"]), photos(4)
    batch = explainer(inputs, [0, 3, 3, 6])
    for index, target in enumerate([0, 3, 3, 6]):
        assert_same_explanation(batch.only(index), explainer(inputs[index : index + 1], target))


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "mobilenet_v2"])
def test_the_same_answer_twice(arch):
    model, inputs = network(arch), photos(2)
    explainer = Explainer(model, ["gradcam", "xgradcam", "eigencam"])
    first, again, another = explainer(inputs), explainer(inputs), Explainer(model, explainer.methods)(inputs)
    for other in (again, another):
        assert_same_explanation(other, first, 1e-6)


def test_threads_share_an_explainer_and_its_weights():
    explainer = Explainer(network("resnet18"), ["gradcam", "ablationcam", "scorecam"], ["layer1"])
    inputs = [photos(1 + seed % 3, seed=seed) for seed in range(12)]
    networks = set()

    def explain(batch):
        networks.add(explainer._network)
        return explainer(batch)

    explain(inputs[0])
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(explain, inputs))
    for batch, found in zip(inputs, together, strict=True):
        assert_same_explanation(found, explainer(batch))
    assert len(networks) > 1
    weights = {id(w) for each in networks for m in each.modules() for w in [getattr(m, "_weights", None)] if w}
    assert len(weights) <= 20  # the convolutions of a ResNet-18
    assert len({each.fc.weight.data_ptr() for each in networks}) == 1


def test_threads_share_the_methods_that_run_through_grad_cam():
    explainer = Explainer(network("resnet18"), ["shapleycam", "finercam"], guided=False)
    inputs = [photos(seed=seed) for seed in range(24)]
    alone = [explainer(batch) for batch in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(explainer, inputs))
    for found, right in zip(together, alone, strict=True):
        assert_same_explanation(found, right)


@pytest.fixture
def six_cores():
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(1)


def cores_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_many_passes_are_done_in_threads_that_share_the_cores(six_cores, monkeypatch):
    model, inputs, by_thread, run = network("resnet18"), photos(2), {}, Explainer._logits

    def watched(self, batch):
        by_thread.setdefault(threading.get_ident(), []).append((torch.get_num_threads(), len(batch)))
        return run(self, batch)

    monkeypatch.setattr(Explainer, "_logits", watched)
    found = Explainer(model, ["scorecam"], ["layer1"])(inputs)
    here = by_thread.pop(threading.get_ident())
    assert [cores for cores, _ in here] == [6, 2, 6, 2]  # the empty input, and the first part
    assert len(by_thread) > 1
    assert {cores for ran in by_thread.values() for cores, _ in ran} == {2}
    assert max(size for ran in by_thread.values() for _, size in ran) == 2
    assert torch.get_num_threads() == cores_of_a_new_thread() == 6
    torch.set_num_threads(1)
    assert_same_explanation(found, Explainer(model, ["scorecam"], ["layer1"])(inputs))


class Narrow(nn.Sequential):
    """A network for which the memory suffices for three inputs at once."""

    asked: ClassVar = []

    def forward(self, inputs):
        self.asked.append(len(inputs))
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return super().forward(inputs)


def test_too_little_memory_for_the_passes_halves_their_batches_and_says_so_once(capsys):
    inner, photo = network("resnet18"), photos(1)
    note_once.cache_clear()
    Narrow.asked.clear()
    explainer = Explainer(Narrow(inner), ["scorecam"], ["0.layer1"], batch_size=16)
    found = explainer(photo)
    assert_same_explanation(found, Explainer(inner, ["scorecam"], ["layer1"])(photo))
    np.testing.assert_allclose(explainer.answer(photo.repeat(7, 1, 1, 1))[0], found.logits[0], atol=1e-4)
    assert explainer.batch_size == 2
    stderr = capsys.readouterr().err
    assert re.fullmatch("note: the memory does not suffice .*smaller ones\n", stderr)
    Narrow.asked.clear()
    explainer(photo)
    assert max(Narrow.asked) == 2  # it is not tried again


def test_memory_that_does_not_suffice_for_one_is_an_error():
    class TooLarge(Narrow):
        def forward(self, inputs):
            if inputs.is_inference():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(inputs)

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        Explainer(TooLarge(network("resnet18")), ["scorecam"], ["0.layer1"])(photos(1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_threads_end_when_the_passes_are_broken_off(six_cores, error):
    passes = []

    def broken(steps):
        for step in steps:
            passes.append(step)
            if len(passes) == 7:
                raise error
            yield step

    explainer, before = (
        Explainer(network("resnet18"), ["scorecam"], ["layer1"], progress=broken),
        threading.active_count(),
    )
    with pytest.raises(error):
        explainer(photos())
    assert threading.active_count() == before
    assert torch.get_num_threads() == cores_of_a_new_thread() == 6


def test_an_explanation_has_the_promised_shapes_types_and_ranges():
    explanation = Explainer(network("resnet18"), METHODS, ["layer1"])(photos(3))
    for maps in explanation.cams.values():
        assert (maps.shape, maps.dtype) == ((3, 64, 64), np.float32)
        assert maps.min() >= 0
        assert maps.max() <= 1
    assert (explanation.guided.shape, explanation.guided.dtype) == ((3, 3, 64, 64), np.float32)
    assert (explanation.logits.shape, explanation.logits.dtype) == ((3, 7), np.float32)
    assert (explanation.targets.shape, explanation.targets.dtype) == ((3,), np.int64)


def test_logits_are_those_of_the_model():
    model, inputs = network("resnet18"), photos(3)
    with torch.no_grad():
        right = model(inputs).numpy()
    explanation = Explainer(model)(inputs)
    np.testing.assert_allclose(explanation.logits, right, rtol=1e-4, atol=1e-4 * np.abs(right).max())
    assert explanation.targets.tolist() == right.argmax(1).tolist()


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
    ],
)
def test_targets_in_any_form(targets, expected):
    assert Explainer(Tiny())(photos(2, 12), targets).targets.tolist() == expected


@pytest.mark.parametrize("targets", [5, -1, [0, 5], [0, -1], torch.tensor([7, 0])])
def test_a_target_out_of_range_is_a_call_error(targets):
    with pytest.raises(CallError, match="5 classes"):
        Explainer(Tiny())(photos(2, 12), targets)


@pytest.mark.parametrize("targets", [[0, 1, 2], [[0], [1], [2]], [[[0]]], []])
def test_targets_that_do_not_go_with_the_batch_are_a_call_error(targets):
    with pytest.raises(CallError):
        Explainer(Tiny())(photos(2, 12), targets)


# --- more methods, several classes and layers, smoothing --------------------------------------------------------------

WITH_CLASSES = sorted({*METHODS, *MORE_METHODS} - {"eigencam", "kpcacam", "fem", "randomcam"})


@pytest.mark.parametrize("method", sorted({*MORE_METHODS} - {"randomcam", "refinecam", "finercam"}))
@pytest.mark.parametrize(
    ("arch", "layer"), [("resnet18", "layer4"), ("mobilenet_v2", "features"), ("vgg11", "features")]
)
def test_the_other_methods_equal_grad_cam(method, arch, layer):
    model, inputs = network(arch), photos(2)
    if method == "fem":  # which needs more than four places to find one that stands out
        layer = {"resnet18": "layer2", "mobilenet_v2": "features.5", "vgg11": "features.9"}[arch]
    targets = [lively_target(model, layer, inputs[:1]), 2]
    ours = Explainer(model, [method], [layer], guided=False)(inputs, targets).cams[method]
    theirs = np.concatenate(
        [grad_cams(method, model, [layer], inputs[i : i + 1], targets[i : i + 1]) for i in range(2)]
    )
    # FullGrad stretches every channel by itself, also those that hold nothing but rounding.
    assert_same_maps(ours, theirs, 2e-2 if method == "fullgrad" else 1e-4)


@pytest.mark.parametrize("method", ["hirescam", "layercam", "gradcamelementwise", "fem", "segeigencam", "refinecam"])
@pytest.mark.parametrize(("arch", "size"), [("small vit", 64), ("small swin", 64)])
def test_the_other_methods_work_on_the_tokens_of_transformers(method, arch, size):
    layer = {"small vit": "encoder.layers.encoder_layer_2.ln_1", "small swin": "features.3.1.norm1"}[arch]
    model, inputs = network(arch, size), photos(1, size)
    ours = Explainer(model, [method], [layer], guided=False)(inputs, 3).cams[method]
    theirs = grad_cams("gradcam++" if method == "refinecam" else method, model, [layer], inputs, [3], RESHAPE[arch])
    assert_same_maps(ours, theirs)


def test_finercam_equals_grad_cam_for_the_likeliest_class():
    model, inputs = network("resnet18"), photos()
    explanation = Explainer(model, ["finercam"], ["layer4"], guided=False)(inputs)
    copied = frozen_copy(model)
    with FinerCAM(copied, [copied.layer4]) as cam:
        theirs = cam(inputs.clone().requires_grad_())
    assert_same_maps(explanation.cams["finercam"], theirs)


def test_finercam_explains_another_class_against_the_three_most_similar_ones():
    model, inputs = network("resnet18"), photos()
    ours = Explainer(model, ["finercam"], ["layer4"], guided=False)(inputs, 2)
    logits = torch.from_numpy(ours.logits[0])
    similar = [int(index) for index in (logits - logits[2]).abs().argsort() if index != 2][:3]
    activations, _ = output_and_gradient(model, "layer4", inputs, 2)
    leaf = activations.clone().requires_grad_()
    scores = model.fc(leaf.mean((2, 3)))[0]
    shares = scores.softmax(0)[similar]
    score = (shares * (scores[2] - scores[similar])).sum() / shares.sum()
    weights = torch.autograd.grad(score, leaf)[0][0].mean((1, 2))
    assert_same_maps(ours.cams["finercam"][0], picture_of(weights, activations[0], 64))


def test_refinecam_is_the_product_of_the_layers_maps():
    model, inputs, layers = network("resnet18"), photos(), ["layer3", "layer4"]
    ours = Explainer(model, ["refinecam"], layers, guided=False)(inputs, 1).cams["refinecam"]
    copied = frozen_copy(model)
    cam = RefineCAM(copied, [copied.get_submodule(layer) for layer in layers])
    assert_same_maps(ours, cam(inputs.clone().requires_grad_(), [ClassifierOutputTarget(1)]))


def test_randomcam_is_the_same_from_run_to_run_and_knows_no_class():
    model, inputs = network("resnet18"), photos(2)
    first, again = (
        Explainer(model, ["randomcam"], ["layer2"], guided=False)(inputs, target).cams["randomcam"] for target in (0, 1)
    )
    np.testing.assert_array_equal(first, again)
    alone = Explainer(model, ["randomcam"], ["layer2"], guided=False)(inputs[1:]).cams["randomcam"]
    np.testing.assert_allclose(first[1:], alone, atol=1e-4)
    assert first.max() > 0.9


def test_shapleycam_on_tokens_is_a_call_error():
    with pytest.raises(CallError, match="shapleycam does not work on layer 'encoder"):
        Explainer(network("small vit"), ["shapleycam"], ["encoder.layers.encoder_layer_1.ln_1"])(photos())


def test_kpcacam_on_a_map_of_too_many_places_is_a_call_error_and_not_a_full_memory():
    with pytest.raises(CallError, match="kpcacam compares all pairs of places, too many in a map of 80 x 80"):
        Explainer(Tiny(), ["kpcacam"], ["first"], guided=False)(photos(1, 80))


@pytest.mark.parametrize("method", ["finercam", "shapleycam", "fullgrad"])
def test_one_output_alone_is_explained_or_a_call_error(method):
    explainer = Explainer(Tiny(outputs=1), [method], ["first"], guided=False)
    with contextlib.suppress(CallError):
        assert np.isfinite(explainer(photos(1, 12)).cams[method]).all()


def test_what_grad_cam_keeps_is_not_changed_by_what_follows_the_layer():
    model, inputs = network("densenet121"), photos()  # a ReLU in place follows `features`
    ours = Explainer(model, ["finercam"], ["features"], guided=False)(inputs)
    activations, _ = output_and_gradient(model, "features", inputs, 0)
    assert (activations < 0).any()
    target = int(ours.targets[0])
    leaf = activations.clone().requires_grad_()
    scores = model.classifier(F.relu(leaf).mean((2, 3)))[0]
    others = [int(i) for i in (scores - scores[target]).abs().argsort() if i != target][:3]
    shares = scores.softmax(0)[others]
    score = (shares * (scores[target] - scores[others])).sum() / shares.sum()
    weights = torch.autograd.grad(score, leaf)[0][0].mean((1, 2))
    assert_same_maps(ours.cams["finercam"][0], picture_of(weights, activations[0], 64))


@pytest.mark.parametrize("guided", [True, False])
def test_several_classes_at_once_are_what_each_is_alone(guided):
    methods = (*METHODS, "layercam", "fem", "fullgrad", "finercam")
    explainer = Explainer(network("small convnext", 32), methods, guided=guided)
    inputs, targets = photos(2, 32), torch.tensor([[4, 0, 2], [1, 4, 6]])
    together = explainer(inputs, targets)
    assert together.targets.tolist() == targets.tolist()
    for column in range(3):
        alone = explainer(inputs, targets[:, column])
        for method in methods:
            assert together.cams[method].shape == (2, 3, 32, 32)
            np.testing.assert_allclose(together.cams[method][:, column], alone.cams[method], atol=2e-5, err_msg=method)
        if guided:
            assert_close(together.guided[:, column], alone.guided)
        np.testing.assert_allclose(together.logits, alone.logits, atol=1e-5)
    assert (together.guided is None) != guided


def test_one_row_of_classes_is_for_all_inputs():
    explanation = Explainer(Tiny())(photos(3, 12), [[4, 1]])
    assert explanation.targets.tolist() == [[4, 1]] * 3
    assert explanation.guided.shape == (3, 2, 3, 12, 12)
    assert explanation.only(1).cams["gradcam"].shape == (1, 2, 12, 12)


@pytest.mark.parametrize(("top", "count"), [(1, 1), (3, 3), (9, 5)])
def test_the_likeliest_classes_in_their_order(top, count):
    explanation = Explainer(Tiny())(photos(2, 12), top=top)
    assert explanation.targets.tolist() == [list(np.argsort(-logits)[:count]) for logits in explanation.logits]


@pytest.mark.parametrize("method", ["gradcam", "eigengradcam", "layercam", "ablationcam", "segeigencam"])
def test_several_layers_are_averaged_as_grad_cam_does(method):
    model, inputs, layers = network("resnet18"), photos(), ["layer2.0", "layer3", "layer4"]
    layers = layers[:1] if method == "ablationcam" else layers
    target = lively_target(model, "layer4", inputs)
    ours = Explainer(model, [method], layers, guided=False)(inputs, target).cams[method]
    assert_same_maps(ours, grad_cams(method, model, layers, inputs, [target]))


@pytest.mark.parametrize(
    "method", ["gradcam", "gradcam++", "hirescam", "layercam", "gradcamelementwise", "eigencam", "fem", "shapleycam"]
)
def test_eigen_smoothing_is_grad_cams(method, capsys):
    model, inputs, layers = network("resnet18"), photos(), ["layer2" if method == "fem" else "layer4"]
    target = lively_target(model, "layer4", inputs)
    ours = Explainer(model, [method], layers, guided=False, eigen_smooth=True)(inputs, target).cams[method]
    assert capsys.readouterr().out == ""
    assert_same_maps(ours, grad_cams(method, model, layers, inputs, [target], eigen_smooth=True))
    plain = Explainer(model, [method], layers, guided=False)(inputs, target).cams[method]
    assert (np.abs(ours - plain).max() > 0.01) == (method not in ("eigencam", "fem"))


@pytest.mark.parametrize("method", ["gradcam", "eigengradcam", "ablationcam", "shapleycam"])
def test_augmentation_smoothing_is_grad_cams(method):
    arch, layer = ("resnet18", "layer4") if method != "ablationcam" else ("mobilenet_v2", "features.1.conv.0")
    model, inputs = network(arch), photos(2)
    for target in range(7):  # until there is one for which the map has something in it
        one_by_one = [grad_cams(method, model, [layer], each, [target], aug_smooth=True) for each in inputs.split(1)]
        theirs = np.concatenate(one_by_one)
        if theirs.any():
            break
    ours = Explainer(model, [method], [layer], aug_smooth=True)(inputs, target)
    np.testing.assert_allclose(ours.cams[method], theirs, atol=1e-4)
    assert theirs.any()
    plain = Explainer(model, [method], [layer])(inputs, target)
    np.testing.assert_array_equal(ours.guided, plain.guided)
    np.testing.assert_array_equal(ours.logits, plain.logits)


def test_augmentation_smoothing_keeps_the_classes_of_the_plain_photo():
    explainer = Explainer(network("resnet18"), ["gradcam", "eigencam"], ["layer4"], aug_smooth=True)
    explanation = explainer(photos(2), top=2)
    assert explanation.cams["eigencam"].shape == (2, 2, 64, 64)
    np.testing.assert_array_equal(explanation.targets, np.argsort(-explanation.logits, 1)[:, :2])


def test_the_answer_of_the_explainers_network_is_that_of_the_model():
    model, inputs = network("mobilenet_v2"), photos(3)
    explainer = Explainer(model)
    explainer(inputs)
    with torch.no_grad():
        np.testing.assert_allclose(explainer.answer(inputs).numpy(), model(inputs).numpy(), atol=1e-4)


# --- the model stays as it was ---------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_comes_out_as_it_went_in(training, frozen):
    model = copy.deepcopy(network("resnet18")).train(training)
    model.layer1.eval()
    for parameter in model.layer2.parameters():
        parameter.requires_grad_(not frozen)
    model(photos(2)).sum().backward()
    before, state = condition(model), copy.deepcopy(model.state_dict())
    Explainer(model, METHODS, ["layer1"])(photos(2))
    assert condition(model) == before
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_a_model_in_training_mode_is_explained_in_eval_mode():
    model, inputs = network("resnet18"), photos(2)
    right = Explainer(model)(inputs)
    assert_same_explanation(Explainer(copy.deepcopy(model).train())(inputs), right)


def test_the_inputs_stay_as_they_were():
    inputs = photos(2)
    before = inputs.clone()
    Explainer(network("resnet18"), METHODS, ["layer1"])(inputs)
    assert torch.equal(inputs, before)
    assert not inputs.requires_grad
    assert inputs.grad is None


ALARM = {"after": float("inf")}


class Alarm(nn.Module):
    """Raises when it has run as often as ALARM says."""

    def forward(self, x):
        ALARM["after"] -= 1
        if ALARM["after"] < 0:
            raise ArithmeticError("alarm")
        return x.clone()


@pytest.fixture
def alarmed():
    model = Tiny(nn.ReLU()).eval()
    model.second = nn.Sequential(model.second, Alarm())
    yield model
    ALARM["after"] = float("inf")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_an_error_half_way_leaves_model_and_explainer_usable(alarmed, method, after, layer):
    inputs, before = photos(2, 12), condition(alarmed)
    explainer = Explainer(alarmed, [method], [layer])
    right = explainer(inputs, 1)
    for passes in range(after, after + 6, 2):
        ALARM["after"] = passes
        with contextlib.suppress(ArithmeticError):
            explainer(inputs, 1)
        ALARM["after"] = float("inf")
        assert_same_explanation(explainer(inputs, 1), right, 1e-6)
    assert condition(alarmed) == before


def test_an_error_in_the_first_pass_leaves_the_explainer_usable(alarmed):
    inputs = photos(2, 12)
    explainer = Explainer(alarmed, METHODS)
    ALARM["after"] = 0
    with pytest.raises(ArithmeticError):
        explainer(inputs)
    ALARM["after"] = float("inf")
    assert_same_explanation(explainer(inputs), Explainer(alarmed, METHODS)(inputs), 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_an_error_and_change_nothing(value):
    model = Tiny().eval()
    with torch.no_grad():
        model.second.weight[0] = value
    before = condition(model)
    with pytest.raises(ValueError, match="not a number"):
        Explainer(model, METHODS)(photos(1, 12))
    assert condition(model) == before


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, partial(torch.autocast, "cpu")]
)
def test_the_mode_of_the_caller_does_not_matter_and_stays(mode):
    model, inputs = network("resnet18"), photos(1)
    right = Explainer(model, METHODS, ["layer1"])(inputs, 2)
    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        explainer = Explainer(model, METHODS, ["layer1"])
        ours, logits = explainer(photos(1), 2), explainer.answer(photos(1))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == modes
    np.testing.assert_allclose(logits.numpy(), right.logits, rtol=1e-5, atol=1e-5)
    assert_same_explanation(ours, right, 1e-6)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, inputs = calibrated(get_model("resnet18", weights=None, num_classes=7), 64), photos(1)
    normal = get_model("resnet18", weights=None, num_classes=7).eval()
    normal.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()})
    assert_same_explanation(Explainer(model)(inputs), Explainer(normal)(inputs))


def test_backend_settings_stay():
    def settings():
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_num_threads()

    before = settings()
    Explainer(Tiny(), METHODS)(photos(1, 12))
    assert settings() == before


def tf32():
    """What the two libraries may use TF32 for, in the words of whichever of torch's settings answers."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        return cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:
        return cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"


OLD = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]
NEW = [
    (place, "fp32_precision")
    for place in (getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul)
    if hasattr(place, "fp32_precision")
]


@pytest.fixture
def tf32_settings():
    """Puts them back."""
    before = [(place, name, getattr(place, name)) for place, name in NEW + OLD]
    yield
    for place, name, value in before:
        setattr(place, name, value)


@pytest.mark.usefixtures("tf32_settings")
@pytest.mark.parametrize("places", [OLD, pytest.param(NEW, marks=pytest.mark.skipif(not NEW, reason="torch < 2.9"))])
@pytest.mark.parametrize("allowed", [(True, True), (True, False), (False, True)])
def test_on_a_gpu_there_is_no_tf32_whichever_way_it_was_allowed(places, allowed):
    for (place, name), yes in zip(places, allowed, strict=True):
        setattr(place, name, yes if places is OLD else "tf32" if yes else "ieee")
    assert tf32() == allowed
    with ExactArithmetic():
        assert tf32() == (False, False)
        assert torch.backends.cudnn.deterministic
    assert tf32() == allowed


def test_the_last_thread_puts_the_settings_back():
    exact, cudnn = ExactArithmetic(), torch.backends.cudnn
    before = cudnn.deterministic, tf32()
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(exact)
    second.enter_context(exact)
    first.close()  # which came first, goes first
    assert (cudnn.deterministic, tf32()) == (True, (False, False))
    second.close()
    assert (cudnn.deterministic, tf32()) == before


# --- any nn.Module classifier ----------------------------------------------------------------------------------------


def test_frozen_parameters():
    model, inputs = network("resnet18"), photos(1)
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert_same_explanation(Explainer(frozen)(inputs), Explainer(model)(inputs), 1e-6)


def test_data_parallel_around_it():
    model, inputs = network("resnet18"), photos(2)
    wrapped = nn.DataParallel(model)
    right = Explainer(model, target_layers=["layer3"])(inputs)
    for layers in (["layer3"], ["module.layer3"], [wrapped.module.layer3]):
        assert_same_explanation(Explainer(wrapped, target_layers=layers)(inputs), right, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype):
    model, inputs = copy.deepcopy(network("resnet18")).to(dtype), photos(1).to(dtype)
    right = Explainer(copy.deepcopy(model).float())(inputs.float())
    ours = Explainer(model)(inputs)
    assert_same_explanation(ours, right)
    assert ours.cams["gradcam"].dtype == ours.guided.dtype == np.float32
    assert model.fc.weight.dtype == dtype


class Answering(nn.Module):
    """A network whose answer is changed by `how`."""

    def __init__(self, how, outputs=5):
        super().__init__()
        self.backbone = Tiny(outputs=outputs)
        self.how = how

    def forward(self, x):
        return self.how(self.backbone(x))


@pytest.mark.parametrize("how", [lambda y: y, lambda y: y[:, 0], lambda y: y[:, :, None, None]], ids=["N,1", "N", "4d"])
def test_a_single_output_explains_its_positive_side(how):
    inputs = photos(2, 12)
    model = Answering(how, outputs=1).eval()
    ours = Explainer(model, METHODS)(inputs)
    assert ours.targets.tolist() == [0, 0]
    assert ours.logits.shape == (2, 1)
    activations, gradients = output_and_gradient(model.backbone, "second", inputs[:1], 0)
    right = picture_of(gradients.mean((2, 3))[0], activations[0], 12)
    np.testing.assert_allclose(ours.cams["gradcam"][0], right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        lambda y: (y, y * 2),
        lambda y: [y, y * 2],
        lambda y: SimpleNamespace(logits=y, loss=None),
        lambda y: {"logits": y, "features": y * 2},
        lambda y: {"out": y, "aux": y * 2},
    ],
    ids=["tuple", "list", "attribute", "dict with logits", "dict with out"],
)
def test_an_answer_that_is_more_than_a_tensor(how):
    inputs, plain = photos(2, 12), Answering(lambda y: y).eval()
    assert_same_explanation(Explainer(Answering(how).eval(), METHODS)(inputs), Explainer(plain, METHODS)(inputs), 1e-6)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda y: y[:, :, None, None].expand(-1, -1, 2, 2), "a tensor of 1 x 5 x 2 x 2;"),
        (lambda y: y.sum(), "a tensor of one number;"),
        (lambda y: (None, 7), "a NoneType"),
        (lambda y: {"scores": y}, "a dict of scores; call its logits 'logits'"),
    ],
    ids=["map", "number", "no tensors", "dict"],
)
def test_an_answer_that_is_no_row_of_logits_is_a_call_error(how, said):
    with pytest.raises(CallError, match=said):
        Explainer(Answering(how).eval())(photos(2, 12))


def test_a_photo_that_is_no_batch_is_a_call_error():
    with pytest.raises(CallError, match=r"not 3 x 12 x 12; of one photo: inputs\[None\]"):
        Explainer(Tiny())(photos(1, 12)[0])


def stack(*tail):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *tail).eval()


def test_a_sequential_network():
    model, inputs = stack(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), photos(2, 16)
    explainer = Explainer(model)
    ours = explainer(inputs, 1)
    assert explainer.target_layers == ("3",)
    assert_same_maps(ours.cams["gradcam"], grad_cams("gradcam", model, ["3"], inputs, [1, 1]))
    assert_close(ours.guided, guided_reference(model, inputs, 1), 1e-5)


def test_a_wrapped_network_is_looked_into():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = network("resnet18")

        def forward(self, images):
            return self.backbone(images)

    inputs = photos(1)
    explainer, plain = Explainer(Wrapper()), Explainer(network("resnet18"))
    assert_same_explanation(explainer(inputs), plain(inputs), 1e-6)
    assert explainer.target_layers == ("backbone.layer4",)


def test_a_network_that_keeps_what_it_computed():
    class Keeping(Tiny):
        def forward(self, x):
            self.features = self.first(x)
            return self.head(torch.relu(self.second(torch.relu(self.features))).mean((2, 3)))

    model, inputs = Keeping().eval(), photos(1, 12)
    model(inputs)  # what it keeps now hangs on a graph
    assert_same_explanation(Explainer(model)(inputs), Explainer(Tiny().eval())(inputs), 1e-6)


def test_a_batch_norm_that_must_not_be_folded():
    class Branching(nn.Module):
        """The convolution's own output is wanted beside the batch norm's."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.head((F.relu(self.norm(x)) + F.relu(x)).mean((2, 3)))

    torch.manual_seed(0)
    model, inputs = calibrated(Branching(), 12), photos(2, 12)
    for layer in ("conv", "norm"):
        ours = Explainer(model, AT_ONCE, [layer])(inputs, 1)
        np.testing.assert_allclose(ours.logits, model(inputs).detach().numpy(), rtol=0, atol=1e-5)
        assert_close(ours.guided, guided_reference(model, inputs, 1))
        for method in AT_ONCE:
            assert_same_maps(ours.cams[method], grad_cams(method, model, [layer], inputs, [1, 1]))


@pytest.mark.parametrize("layer", ["layer4.0.conv1", "layer4.0.bn1", "layer4.0.relu", "layer2.0.downsample.1", "conv1"])
def test_a_layer_that_folding_would_change(layer):
    model, inputs = network("resnet18"), photos(1)
    whole = "layer4.0" if layer.endswith("relu") else layer  # it runs twice; ours is its last run, the block's output
    target = lively_target(model, whole, inputs)
    activations, gradients = output_and_gradient(model, whole, inputs, target)
    ours = Explainer(model, ["gradcam"], [layer])(inputs, target).cams["gradcam"][0]
    assert_same_maps(ours, picture_of(gradients.mean((2, 3))[0], activations[0], 64))


# --- wrong calls and empty maps --------------------------------------------------------------------------------------


def test_an_unknown_method_suggests_a_near_one():
    with pytest.raises(CallError, match=r"'gradcamm'.*did you mean.*gradcam"):
        Explainer(Tiny(), ["gradcamm"])


@pytest.mark.parametrize(("wrong", "near"), [("layr4", "layer4"), ("layer4.1.conv9", r"layer4\.1\.conv"), ("", "")])
def test_an_unknown_layer_suggests_a_near_one(wrong, near):
    with pytest.raises(CallError, match=rf"no layer '{wrong}'.*{near}"):
        Explainer(network("resnet18"), target_layers=[wrong])


def test_a_module_of_another_network_is_no_layer():
    with pytest.raises(CallError, match="no layer 'Conv2d'"):
        Explainer(Tiny(), target_layers=[Tiny().first])


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_a_spatial_map_is_a_call_error(method):
    with pytest.raises(CallError, match="'avgpool' gives no spatial map"):
        Explainer(network("resnet18"), [method], ["avgpool"])(photos(1))


class Bystander(Tiny):
    """`aside` runs but counts for nothing; `idle` never runs; `pair` gives two tensors."""

    def __init__(self):
        super().__init__()
        self.aside, self.idle, self.pair = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), Pair()

    def forward(self, x):
        self.aside(x)
        return super().forward(self.pair(x)[0])


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("method", [method for method in AT_ONCE if method != "eigencam"])
def test_a_layer_that_the_score_does_not_depend_on_is_a_call_error(method):
    with pytest.raises(CallError, match="does not depend on layer 'aside'"):
        Explainer(Bystander(), [method], ["aside"])(photos(1, 12))


@pytest.mark.parametrize("layer", ["idle", "pair"])
@pytest.mark.parametrize("method", ["gradcam", "eigencam", "ablationcam"])
def test_a_layer_that_gives_no_tensor_is_a_call_error(method, layer):
    with pytest.raises(CallError, match=layer):
        Explainer(Bystander(), [method], [layer])(photos(1, 12))


def test_a_network_without_a_spatial_map_is_a_call_error():
    with pytest.raises(CallError, match="no layer gives a spatial map"):
        Explainer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)))(photos(1, 8))


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "xgradcam"])
def test_a_map_with_nothing_in_it_is_zero(method):
    model = stack(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model[-1].weight.data.fill_(-1)  # activations only speak against a class
    assert not Explainer(model, [method], ["3"])(photos(2, 12)).cams[method].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_photo_of_a_network_that_gives_zero_has_a_zero_or_finite_map(method):
    model = Tiny(outputs=2).eval()
    with torch.no_grad():
        model.second.weight.zero_()
        model.second.bias.fill_(-1)  # nothing gets through the second activation
    explanation = Explainer(model, [method], ["second"])(torch.zeros(1, 3, 12, 12))
    assert np.isfinite(explanation.cams[method]).all()
    assert not explanation.guided.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_score_of_zero_gives_a_finite_map(method):
    model = Tiny(outputs=2).eval()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    maps = Explainer(model, [method])(photos(1, 12)).cams[method]
    assert np.isfinite(maps).all()
    assert maps.min() >= 0
    assert maps.max() <= 1


# --- memory and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_from_call_to_call(method):
    def held():
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        return len(gc.get_objects()), len(tensors), sum(t.numel() for t in tensors)

    explainer, inputs = Explainer(Tiny().eval(), [method]), photos(1, 12)
    for _ in range(10):
        explainer(inputs)
    before = held()
    for _ in range(40):
        explainer(inputs)
    after = held()
    assert after[0] < before[0] + 30  # fewer than one object a call
    assert after[1:] == before[1:]


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc")
def test_hundreds_of_calls_leave_memory_where_ten_left_it():
    explainer, inputs = Explainer(Tiny().eval(), ["gradcam", "ablationcam", "scorecam"]), photos(4, 96)
    for _ in range(10):
        explainer(inputs)
    before = resident()
    for _ in range(60):
        explainer(inputs)
    assert resident() - before < 12e6  # one leaked activation a call would be 70 MB


def test_no_garbage_waits_for_the_collector():
    explainer, inputs = Explainer(Tiny().eval(), METHODS), photos(1, 12)
    explainer(inputs)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        for _ in range(5):
            explainer(inputs)
        assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before + 2
    finally:
        gc.enable()


@needs_cuda
@pytest.mark.parametrize(("arch", "size", "layer", "narrow"), ARCHITECTURES, ids=ids)
def test_cuda_gives_what_the_cpu_gives(arch, size, layer, narrow):
    model, inputs = network(arch, size), photos(2, size)
    layer = {"densenet121": "features.denseblock4", "swin_t": "features.7.1.norm1"}.get(arch, layer)
    on_cpu = Explainer(model, METHODS, [layer])(inputs, [2, 5])
    on_gpu = Explainer(copy.deepcopy(model).cuda(), METHODS, [layer])(inputs, [2, 5])
    assert_same_explanation(on_gpu, on_cpu, 1e-4)


@needs_cuda
def test_cuda_gives_the_same_twice():
    explainer, inputs = Explainer(copy.deepcopy(network("resnet18")).cuda(), METHODS), photos(2)
    first, again = explainer(inputs), explainer(inputs)
    for method in METHODS:
        np.testing.assert_array_equal(first.cams[method], again.cams[method])
    np.testing.assert_array_equal(first.guided, again.guided)
