"""Sections 3 and 4, Checkpoint and Model.

Names and files become a classifier that answers as the plain torchvision network does.
"""

import argparse
import copy
import faulthandler
import functools
import itertools
import math
import os
import pickle
import re
import shutil
import urllib.error
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import CKPT, DOG
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms import functional

from cnn_visualizations import (
    ARCHITECTURES,
    BatchSize,
    CallError,
    Explainer,
    find_class,
    find_device,
    load_classifier,
    read_photo,
)

HUGE = ("regnet_y_128gf", "vit_h_14")  # more than 600 million parameters: 8 GB for an explanation
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
NAMES = ["ant", "Bee", "cat", "dog", "Elk"]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
PHOTO = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)


class ParametersOnMeta(TorchFunctionMode):
    """Networks built in this mode have parameters on the meta device; their buffers are real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def random_weights(key, tensor, generator):
    """Return random weights that keep a deep network alive."""
    if not tensor.is_floating_point() or key.endswith("relative_coords_table"):
        return tensor
    if key.endswith("running_var"):
        return torch.rand(tensor.shape, generator=generator) + 0.5

    if tensor.ndim < 2 or key.endswith("layer_scale"):
        noise = 0.1 * torch.randn(tensor.shape, generator=generator)
        if key.endswith(("weight", "layer_scale")):
            return 1 + noise
        return noise

    # a prime number of values, repeated: quicker than as many random numbers
    values = torch.randn(9973, generator=generator) / math.sqrt(tensor[0].numel())
    repeats = -(-tensor.numel() // len(values))
    return values.repeat(repeats)[: tensor.numel()].view(tensor.shape)


def network(arch, classes=5, change=None, **options):
    """Return a plain torchvision network with random weights, after `change(network)` if given."""
    if arch in WITH_AUXILIARY_HEADS:
        plain = {"aux_logits": False, "init_weights": False, "transform_input": True}
        options = {**plain, **options}
    with ParametersOnMeta():
        model = get_model(arch, weights=None, num_classes=classes, **options)
        if change is not None:
            change(model)

    state = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in state.items():
        state[key] = random_weights(key, tensor, generator)
    model.load_state_dict(state, assign=True)
    return model.eval()


@functools.cache
def resnet18(classes=5):
    return network("resnet18", classes)


STATE = resnet18().state_dict()


def under(prefix, state):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def without(prefix, state):
    remaining = dict(state)
    for key in state:
        if key.startswith(prefix):
            del remaining[key]
    return remaining


@pytest.fixture
def saved(tmp_path):
    """Write a checkpoint and return its path."""

    def save(content, name="best.pth", **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save


@pytest.fixture
def no_hang():
    """End the tests with a traceback where one of them hangs."""
    faulthandler.dump_traceback_later(100, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def load(path, **kwargs):
    return load_classifier(ckpt=path, device="cpu", **kwargs)


def refusal(path=None, *, device="cpu", **kwargs):
    """Return the one line with which a call is refused."""
    with pytest.raises(CallError) as caught:
        load_classifier(ckpt=path, device=device, **kwargs)

    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def random_inputs(count, side=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator)


def logits_of(model, side=64):
    with torch.inference_mode():
        return model(random_inputs(2, side))


def assert_same_logits(classifier, model, side=64):
    expected = logits_of(model, side)
    assert expected.isfinite().all()
    assert expected.std() > 1e-4  # a dead network would agree with anything

    scale = expected.abs().max().item()
    logits = logits_of(classifier.model, side)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * scale)


def assert_same_inputs(inputs, expected, atol=1e-6):
    torch.testing.assert_close(inputs, expected, rtol=0, atol=atol)


def assert_is_resnet18(path):
    classifier = load(path)
    assert classifier.arch == "resnet18"
    assert_same_logits(classifier, resnet18())
    return classifier


def assert_imagenet_mean_and_std(classifier):
    mean, std = IMAGENET
    assert classifier.preset.mean == mean
    assert classifier.preset.std == std


def read_dog():
    return Image.open(DOG).convert("RGB")


# Where the weights are in the file


# fmt: off
ENTRIES = [
    "state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "ema",
    "module", "my_best",
]
PREFIXES = [
    "module.", "_orig_mod.", "model.", "backbone.", "net.", "base.", "encoder.", "features.",
    "my_resnet.cnn.", "0.", "module._orig_mod.", "_orig_mod.module.", "model.backbone.",
    "_orig_mod.module.model.", "model._orig_mod.",
]
# fmt: on


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_weights_are_found_in_each_entry(entry, saved):
    assert_is_resnet18(saved({"epoch": 3, entry: STATE, "acc": 0.9}))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_weights_are_found_under_each_prefix(prefix, saved):
    assert_is_resnet18(saved({"state_dict": under(prefix, STATE)}))


def other_network():
    """Return the state dict of another network of the same architecture."""
    return {key: tensor + 1 for key, tensor in STATE.items()}


def parameters():
    state = {}
    for key, tensor in STATE.items():
        state[key] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    return state


def before_batches_were_counted():
    state = dict(STATE)
    for key in STATE:
        if "num_batches" in key:
            del state[key]
    return state


def average_in_one_dict():
    return {"state_dict": under("model.", STATE) | under("ema.module.", OTHER)}


def moments():
    """Return the entries of an optimizer beside the weights."""
    moment = {"exp_avg": torch.zeros(9, 9), "step": torch.tensor(1.0)}
    return dict.fromkeys(range(200), moment)


def optimizers():
    return {"optimizer": {"state": moments()}, "optim_d": {"w": torch.ones(3, 3)}, "x": STATE}


def training_script():
    """Return what torchvision's training script saves."""
    optimizer = torch.optim.SGD(resnet18().parameters(), lr=0.1, momentum=0.9)
    options = {"model": "resnet18", "data_path": "/data", "lr": 0.1, "amp": False, "test": None}
    return {
        "model": STATE,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"step_size": 30, "_last_lr": [0.1], "last_epoch": 89},
        "epoch": 89,
        "args": argparse.Namespace(device="cuda", **options),
    }


def lightning():
    """Return what Lightning saves."""
    metrics = {"loss_fn.pos_weight": torch.ones(5), "acc.total": torch.ones(5)}
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("model.", STATE) | metrics,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"best_score": torch.tensor(0.2)}},
        "optimizer_states": [{"state": moments(), "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"num_classes": 5, "lr": 0.1},
    }


OTHER = other_network()
AVERAGED = torch.optim.swa_utils.AveragedModel(resnet18()).state_dict()
KINDS = {
    "bare": STATE,
    "two levels": {"checkpoint": {"model": STATE}, "epoch": 3},
    "parameters": parameters(),
    "bare, values beside": {**STATE, "epoch": 3, "lr": 0.1, "metric": torch.tensor(0.9)},
    "DataParallel": nn.DataParallel(resnet18()).state_dict(),
    "AveragedModel": {"model_ema": AVERAGED},
    "average beside": {"model_ema": OTHER, "model": STATE},
    "average of timm": {"arch": "resnet18", "state_dict_ema": OTHER, "state_dict": STATE},
    "average in one dict": average_in_one_dict(),
    "the same twice": {"best": STATE, "last": OrderedDict(STATE)},
    "optimizer": optimizers(),
    "before batches were counted": before_batches_were_counted(),
    "torchvision's training script": training_script(),
    "Lightning": lightning(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_found_in_each_kind_of_checkpoint(kind, saved):
    assert_is_resnet18(saved(KINDS[kind]))


@pytest.mark.parametrize("outer", ["", "model.", "module.model."])
@pytest.mark.parametrize("name", ["fc", "head", "linear", "head.1"])
def test_a_head_beside_the_backbone_is_found_at_every_depth(outer, name, saved):
    backbone = under("backbone.", without("fc.", STATE))
    head = {f"{name}.weight": resnet18().fc.weight, f"{name}.bias": resnet18().fc.bias}
    assert_is_resnet18(saved(under(outer, backbone | head)))


@pytest.mark.parametrize("outer", ["", "_orig_mod.module."])
@pytest.mark.parametrize("given", [None, "resnet18"])
def test_a_loss_beside_the_network_is_left_out(outer, given, saved):
    loss = {"criterion.weight": torch.ones(5), "criterion.mean": torch.zeros(512)}
    state = under(outer, under("model.", STATE) | loss)
    classifier = load(saved({"state_dict": state}), arch=given)

    assert_same_logits(classifier, resnet18())
    assert_imagenet_mean_and_std(classifier)


def test_a_layer_in_front_that_normalises_its_inputs_becomes_the_preprocessing(saved):
    layer = {"0.mean": torch.full((1, 3, 1, 1), 0.1), "0.std": torch.full((1, 3, 1, 1), 0.9)}
    preset = assert_is_resnet18(saved(layer | under("1.", STATE))).preset
    assert list(preset.mean) == pytest.approx([0.1] * 3)
    assert list(preset.std) == pytest.approx([0.9] * 3)


@pytest.mark.parametrize("name", ["classifier", "head", "linear"])
def test_a_head_behind_the_outputs_of_a_whole_network_is_not_dropped(name, saved):
    head = {f"{name}.weight": torch.ones(3, 5), f"{name}.bias": torch.ones(3)}
    message = refusal(saved(under("model.", STATE) | head))
    assert re.search(rf"\b{name} is .*5 outputs.*net\.py:build", message)


@pytest.mark.parametrize("teacher", ["resnet18", "resnet34", "shufflenet_v2_x0_5"])
def test_of_two_networks_in_one_dict_none_is_taken_by_chance(teacher, saved):
    state = OTHER
    if teacher != "resnet18":
        state = network(teacher).state_dict()
    message = refusal(saved(under("student.", STATE) | under("teacher.", state)))
    assert re.search(r"student\.|teacher\.", message)


def test_of_two_networks_in_two_entries_none_is_taken_by_chance(saved):
    message = refusal(saved({"student": STATE, "teacher": OTHER}))
    assert re.search("several networks.*student.*teacher", message)


# What the weights and the values beside them may be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_computed_in_float32(dtype, saved):
    model = copy.deepcopy(resnet18()).to(dtype)
    classifier = load(saved(model.state_dict()))
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.float32}
    assert_same_logits(classifier, model.float())


def test_objects_of_other_libraries_may_stand_in_the_file(saved):
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)
    values = [kind(1) for kind in kinds]
    values += [np.arange(3.0), Path("runs") / "best.pth", argparse.Namespace(out=Path("a"))]
    content = {"state_dict": STATE, "best": values, "history": {"accuracy": values}}
    before = set(torch.serialization.get_safe_globals())

    assert load(saved(content)).arch == "resnet18"
    assert set(torch.serialization.get_safe_globals()) == before


def test_old_densenet_names_are_understood(saved):
    model = network("densenet121")
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    state = {old.sub(r"\1.\2", key): tensor for key, tensor in model.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state

    classifier = load(saved(state))
    assert classifier.arch == "densenet121"
    assert_same_logits(classifier, model)


@pytest.mark.parametrize("arch", WITH_AUXILIARY_HEADS)
def test_auxiliary_heads_may_be_there(arch, saved):
    model = network(arch, aux_logits=True)
    assert "aux" in " ".join(model.state_dict()).lower()

    classifier = load(saved(model.state_dict()), num_classes=5)
    assert classifier.arch == arch
    assert_same_logits(classifier, model, side=96)


def test_a_googlenet_whose_batch_norms_were_never_trained_gets_no_input_transform(saved):
    model = network("googlenet", transform_input=False)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_mean"):
            tensor.zero_()
    assert_same_logits(load(saved(model.state_dict())), model)


def test_safetensors_are_read_and_a_broken_file_is_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "best.safetensors"
    safetensors.save_file({key: tensor.contiguous() for key, tensor in STATE.items()}, path)
    assert_is_resnet18(path)

    path.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    assert "best.safetensors" in refusal(path)


def test_the_demo_is_read_as_torchvision_reads_it():
    content = torch.load(CKPT, weights_only=True)
    model = get_model("mobilenet_v2", weights=None, num_classes=19).eval()
    model.load_state_dict(content["state_dict"])  # copies the file's float16 into float32
    classifier = load(CKPT)
    assert classifier.arch == "mobilenet_v2"
    assert list(classifier.class_names) == content["classes"]
    assert_same_logits(classifier, model)

    transforms = get_model_weights("mobilenet_v2").DEFAULT.transforms
    inputs = transforms(crop_size=225, resize_size=233)(read_dog())
    assert_same_inputs(classifier.preprocess(read_photo(DOG)), inputs)
    with torch.inference_mode():
        prediction = model(inputs[None]).argmax()
    assert classifier.class_names[prediction] == "Siberian husky"


# Heads, as people replace them when they fine-tune


def replaced(name, make):
    """Return a change of a network: `make(number of inputs)` takes the place of layer `name`."""

    def change(model):
        layers = model.get_submodule(name).modules()
        linear = next(layer for layer in layers if isinstance(layer, nn.Linear))
        model.set_submodule(name, make(linear.in_features))

    return change


def linear(inputs):
    return nn.Linear(inputs, 5)


def no_bias(inputs):
    return nn.Linear(inputs, 5, bias=False)


def sequence(inputs):
    return nn.Sequential(nn.Linear(inputs, 5))


def dropout(inputs):
    return nn.Sequential(nn.Dropout(), nn.Linear(inputs, 5))


def two_dropouts(inputs):
    return nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.1), nn.Linear(inputs, 5))


HEADS = [
    ("resnet18", "fc", no_bias),
    ("resnet18", "fc", sequence),
    ("resnet18", "fc", dropout),
    ("resnet18", "fc", two_dropouts),
    ("mobilenet_v2", "classifier", linear),
    ("mobilenet_v2", "classifier", dropout),
    ("mobilenet_v2", "classifier.1", dropout),
    ("mobilenet_v3_small", "classifier", linear),
    ("mobilenet_v3_small", "classifier.3", linear),
    ("shufflenet_v2_x0_5", "fc", dropout),
    ("alexnet", "classifier", linear),
    ("convnext_tiny", "classifier.2", dropout),
]
MORE_HEADS = [
    ("mobilenet_v2", "classifier.1", linear),
    ("efficientnet_b0", "classifier", linear),
    ("efficientnet_b0", "classifier.1", dropout),
    ("mnasnet0_5", "classifier", linear),
    ("alexnet", "classifier.6", linear),
    ("convnext_tiny", "classifier.2", linear),
    ("vgg11", "classifier", linear),
    ("vgg11", "classifier", dropout),
    ("vgg11", "classifier.6", linear),
    ("vgg11", "classifier.6", dropout),
    ("densenet121", "classifier", dropout),
    ("googlenet", "fc", dropout),
    ("inception_v3", "fc", dropout),
    ("regnet_y_400mf", "fc", dropout),
    ("swin_t", "head", dropout),
    ("maxvit_t", "classifier.5", linear),
    ("maxvit_t", "classifier.5", dropout),
    ("vit_b_32", "heads", linear),
    ("vit_b_32", "heads", dropout),
    ("vit_b_32", "heads.head", dropout),
]
HEADS += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_HEADS]
SIDES = {"maxvit_t": 224, "vit_b_32": 224, "inception_v3": 96}  # where 64 pixels are too few


@pytest.mark.parametrize(("arch", "name", "make"), HEADS)
def test_a_replaced_head_with_one_linear_layer_is_used(arch, name, make, saved):
    model = network(arch, classes=1000, change=replaced(name, make))
    classifier = load(saved(model.state_dict()))
    assert classifier.arch == arch
    assert len(classifier.class_names) == 5
    assert_same_logits(classifier, model, SIDES.get(arch, 64))


def test_a_replaced_convolution_of_squeezenet_is_used(saved):
    def change(model):
        model.classifier[1] = nn.Conv2d(512, 5, kernel_size=1)

    model = network("squeezenet1_0", classes=1000, change=change)
    classifier = load(saved(model.state_dict()))
    assert classifier.arch == "squeezenet1_0"
    assert len(classifier.class_names) == 5
    assert_same_logits(classifier, model)


def test_a_single_output_is_the_second_of_two_classes(saved):
    path = saved({"state_dict": resnet18(1).state_dict(), "classes": ["cat", "dog"]})
    assert load(path).class_names == ("cat", "dog")
    assert load(path, num_classes=1).class_names == ("cat", "dog")
    assert load(path, num_classes=2).class_names == ("cat", "dog")
    assert load(path, class_names=["no", "yes"]).class_names == ("no", "yes")


def test_a_single_output_is_explained_as_two_classes(saved):
    model = resnet18(1)
    classifier = load(saved(model.state_dict()))
    inputs = random_inputs(3, seed=0)
    with torch.no_grad():
        probabilities = classifier.model(inputs).softmax(1)
        sure = model(inputs).sigmoid()
    torch.testing.assert_close(probabilities, torch.cat([1 - sure, sure], 1))

    explanation = Explainer(classifier.model)(inputs, [0, 1, 0])
    expected = Explainer(model)(inputs)
    cams = explanation.cams["gradcam"]
    np.testing.assert_allclose(cams[1], expected.cams["gradcam"][1], atol=1e-5)
    np.testing.assert_allclose(explanation.guided[1], expected.guided[1] / 2, atol=1e-6)
    assert np.abs(cams[0] - expected.cams["gradcam"][0]).max() > 0.1


# Entries beside the weights


CLASS_ENTRIES = {
    "classes": NAMES,
    "class_names": tuple(NAMES),
    "class_to_idx": {"Elk": 4, "dog": 3, "cat": 2, "Bee": 1, "ant": 0},
    "idx_to_class": {"0": "ant", "1": "Bee", "2": "cat", "3": "dog", "4": "Elk"},
}


@pytest.mark.parametrize("entry", CLASS_ENTRIES)
def test_class_names_in_the_checkpoint_are_used_and_given_ones_win(entry, saved):
    path = saved({"state_dict": STATE, entry: CLASS_ENTRIES[entry]})
    assert list(load(path).class_names) == NAMES
    assert load(path, class_names=list("vwxyz")).class_names == tuple("vwxyz")
    assert re.search(r"\b2\b.*\b5 classes", refusal(path, class_names=["a", "b"]))


WRONG_NAMES = [
    5,
    "abcde",
    ["a", "b"],
    {"a": 0, "b": 7},
    {"a": None},
    [],
    {},
    {"x": [1]},
    [None] * 5,
]


@pytest.mark.parametrize("classes", WRONG_NAMES, ids=str)
def test_class_names_that_cannot_be_right_are_left_out_with_a_warning(classes, saved, capsys):
    classifier = load(saved({"state_dict": STATE, "classes": classes}))
    assert classifier.class_names == ("class 0", "class 1", "class 2", "class 3", "class 4")
    assert re.fullmatch(r"warning: .*best\.pth.*classes.*\n", capsys.readouterr().err)
    assert re.search("--class-names.*alphabetical", classifier.describe())


@pytest.mark.parametrize("size", [96, [96, 96], (3, 96, 96), [96], np.int64(96)], ids=repr)
def test_the_input_size_of_the_checkpoint_is_used_and_a_given_one_wins(size, saved):
    path = saved({"state_dict": STATE, "input_size": size})
    assert load(path).preprocess(PHOTO).shape == (3, 96, 96)
    assert load(path, input_size=64).preprocess(PHOTO).shape == (3, 64, 64)


VALUES = torch.tensor([0.25, 0.5, 0.625])
FORMS = {
    "list": VALUES.tolist(),
    "tensor": VALUES,
    "column": VALUES.view(3, 1, 1),
    "array": VALUES.numpy(),
    "bfloat16": VALUES.bfloat16(),
}
GIVEN = [
    ({}, VALUES, VALUES),
    ({"mean": [0.1, 0.2, 0.3]}, [0.1, 0.2, 0.3], VALUES),
    ({"mean": [0, 0, 0], "std": [1, 1, 1]}, [0, 0, 0], [1, 1, 1]),
]


@pytest.mark.parametrize("form", FORMS)
def test_mean_and_std_of_the_checkpoint_are_used_and_given_ones_win(form, saved):
    path = saved({"state_dict": STATE, "mean": FORMS[form], "std": FORMS[form]})
    for options, mean, std in GIVEN:
        transforms = get_model_weights("resnet18").DEFAULT.transforms(mean=mean, std=std)
        inputs = load(path, **options).preprocess(PHOTO)
        assert_same_inputs(inputs, transforms(Image.fromarray(PHOTO)), atol=1e-5)


COLOURS = [
    ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    ([104, 117, 123], [1, 1, 1]),
    ([0, 0, 0], [255, 255, 255]),
]


@pytest.mark.parametrize(("mean", "std"), COLOURS)
def test_mean_and_std_of_colours_up_to_255_are_understood(mean, std, saved):
    plain = get_model_weights("resnet18").DEFAULT.transforms(mean=[0, 0, 0], std=[1, 1, 1])
    colours = 255 * plain(Image.fromarray(PHOTO))
    expected = (colours - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    in_the_file = load(saved({"state_dict": STATE, "mean": mean, "std": std}))
    torch.testing.assert_close(in_the_file.preprocess(PHOTO), expected)
    passed = load(saved(STATE), mean=mean, std=std)
    torch.testing.assert_close(passed.preprocess(PHOTO), expected)


@pytest.mark.parametrize("entry", ["arch", "model_name"])
def test_the_architecture_entry_of_the_checkpoint_is_used(entry, saved):
    classifier = load(saved({"state_dict": STATE, entry: "ResNet18"}))
    assert classifier.describe().startswith("resnet18 (from best.pth)")


@pytest.mark.parametrize("arch", [5, None, "no_such_network", ["resnet18"], {"a": 1}], ids=str)
def test_an_architecture_entry_without_meaning_is_ignored(arch, saved):
    assert_is_resnet18(saved({"state_dict": STATE, "arch": arch, "args": 5, "model_name": []}))


def test_an_architecture_entry_that_does_not_fit_is_refused(saved):
    message = refusal(saved({"state_dict": STATE, "arch": "resnet34"}))
    assert "does not fit resnet34" in message
    assert "--arch resnet18" in message


# Hostile files: one line, within seconds


META = torch.zeros(3, device="meta")
NAN = math.nan
WIDE = torch.zeros(1).expand(10**9)
COMPLEX = torch.zeros(3, dtype=torch.complex64)
BAD_ENTRIES = {
    "input_size": ["x", 0, -224, 10**9, 10**400, (3, 224, 7), [], {"h": 1}, 1.5, True, META],
    "mean": [
        [1, 1],
        "abc",
        ["a", "b", "c"],
        {"r": 1},
        [NAN, NAN, NAN],
        [10**400, 10**400, 10**400],
        10**400,
        [None, None, None],
        [1, [2, 3]],
        META,
        [0.4, 0.5, 0.6, -1.0],
        torch.zeros(4),
        WIDE,
        COMPLEX,
    ],
    "std": [
        [0, 0, 0],
        [-1.0, 1.0, 1.0],
        [NAN, NAN, NAN],
        5,
        [1e-300, 1e-300, 1e-300],
        1e-300,
        torch.ones(3).to_sparse(),
    ],
}


@pytest.mark.parametrize("entry", BAD_ENTRIES)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_entries_without_meaning_are_refused_by_name(entry, saved, no_hang):
    for value in BAD_ENTRIES[entry]:
        assert entry in refusal(saved({"state_dict": STATE, entry: value}))


def as_dict(items):
    return {f"key{i}": item for i, item in enumerate(items)}


def shared(make):
    """Return a container of 60 ** 5 items that takes 5 KB in a file.

    On each of five levels the same object is contained 60 times.
    """
    inside = make(["x"])
    for _ in range(5):
        inside = make([inside] * 60)
    return inside


each_container = pytest.mark.parametrize(
    "make", [list, tuple, as_dict], ids=["lists", "tuples", "dicts"]
)


@each_container
def test_deeply_shared_containers_as_numbers_are_one_line(make, saved, no_hang):
    for content in (shared(make), make([shared(make)] * 3)):
        for entry in ("mean", "std", "input_size"):
            assert entry in refusal(saved({"state_dict": STATE, entry: content}))


@each_container
def test_deeply_shared_containers_as_class_names_are_one_warning_each(make, saved, no_hang, capsys):
    five = [shared(make) for _ in range(5)]
    for content in (shared(make), make([shared(make)] * 5), dict(zip("01234", five, strict=True))):
        classifier = load(saved({"state_dict": STATE, "classes": content}))
        assert classifier.class_names[0] == "class 0"

    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("warning: ")


def test_dicts_that_are_nested_in_themselves_are_visited_once(saved, no_hang):
    loop = {}
    loop["again"] = loop
    for config in (shared(as_dict), loop):
        assert_is_resnet18(saved({"state_dict": {**STATE, "config": config}, "config": config}))
        assert "no weights" in refusal(saved({"config": config}))


def test_a_file_of_many_tensors_is_refused(saved, no_hang):
    content = {f"n{i}.conv1.weight": torch.zeros(1) for i in range(3000)}
    content["a." * 5000 + "weight"] = torch.zeros(2, 2)
    message = refusal(saved(content))
    assert "it has a tensor of the name 'a.a." in message
    del content["a." * 5000 + "weight"]
    assert "no weights" in refusal(saved(content))


def to_nested(tensor):
    return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])


def to_quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def to_float4(tensor):
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no float4")
    return torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


WEIGHTS = ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"]
CHANGES = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "nested": to_nested,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "int8": torch.Tensor.char,
    "quantised": to_quantised,
    "float4": to_float4,
}
SHAPES = {
    "number": torch.tensor(5.0),
    "vector": torch.zeros(5),
    "empty": torch.zeros(0, 512),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.filterwarnings("ignore")
def test_unusable_weights_are_refused_by_name(change, key, saved):
    state = {**STATE, key: CHANGES[change](STATE[key])}
    assert key in refusal(saved(state), arch="resnet18")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_head_of_an_impossible_shape_is_refused_by_name(shape, saved):
    state = {**STATE, "fc.weight": SHAPES[shape]}
    assert re.search(r"\bfc\b", refusal(saved(state), arch="resnet18"))


# Files that are not checkpoints, or not of this network


class Bomb:
    """What a hostile file does when it is loaded without care: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])


def test_pickle_itself_runs_the_code_that_is_tested_with(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "control")))
    assert (tmp_path / "control").exists()


@both_formats
def test_code_in_a_checkpoint_is_never_run(zipped, tmp_path, saved):
    content = {"state_dict": STATE, "extra": Bomb(tmp_path / "bang")}
    message = refusal(saved(content, _use_new_zipfile_serialization=zipped))
    assert "state_dict()" in message
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize("name", ["best.pth", "best.pkl", "best.safetensors"])
def test_code_in_a_plain_pickle_is_never_run(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
    assert name in refusal(tmp_path / name)
    assert not (tmp_path / "bang").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_pickled_network_in_the_old_format_is_refused(saved):
    path = saved(resnet18(), _use_new_zipfile_serialization=False)
    assert re.search(r"best\.pth: refers to .*ResNet.*state_dict\(\)", refusal(path))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_with_how_to_save_its_weights(tmp_path):
    path = tmp_path / "best.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    assert re.search(r"TorchScript.*torch\.jit\.load.*state_dict\(\)", refusal(path))


NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"hello, I am a text file\n",
    "pickle": b"\x80",
    "zip": b"PK\x03\x04",
    "zeros": bytes(1000),
    "photo": DOG.read_bytes(),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_refused(kind, tmp_path):
    path = tmp_path / "best.pth"
    path.write_bytes(NO_CHECKPOINTS[kind])
    assert "best.pth" in refusal(path)


@both_formats
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_part_of_a_checkpoint_is_refused(share, zipped, saved):
    path = saved(STATE, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "best.pth" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert re.search(r"missing\.pth.*no such file", refusal(tmp_path / "missing.pth"))
    assert "folder" in refusal(tmp_path)


NO_WEIGHTS = [
    {},
    [],
    None,
    5,
    torch.zeros(3, 3),
    {"epoch": 3, "best": {}},
    {"state_dict": [torch.ones(3, 3)]},
]


@pytest.mark.parametrize("content", NO_WEIGHTS, ids=repr)
def test_a_checkpoint_without_weights_is_refused(content, saved):
    assert "no weights" in refusal(saved(content))


def test_of_a_checkpoint_without_weights_it_is_told_what_it_holds(saved):
    optimizer = torch.optim.Adam(resnet18().parameters())
    message = refusal(saved({"optimizer": optimizer.state_dict(), "epoch": 3}))
    assert "no weights" in message
    assert "optimizer, epoch" in message


def test_the_wrong_architecture_is_refused_with_what_differs_and_what_would_fit(saved):
    missing = []
    differing = []
    for key, tensor in without("fc.", network("resnet50").state_dict()).items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in STATE:
            missing.append(key)
        elif tensor.shape != STATE[key].shape:
            differing.append(key)

    message = refusal(saved(STATE), arch="resnet50")
    assert f"{len(missing)} missing ({missing[0]}" in message
    assert f"{len(differing)} of another shape ({differing[0]}: " in message
    assert "best.pth" in message
    assert "--arch resnet18" in message


@pytest.mark.parametrize("given", [2, 1000])
def test_a_wrong_number_of_classes_is_refused_with_both_numbers(given, saved):
    message = refusal(saved(STATE), num_classes=given)
    assert re.search(rf"--num-classes\D*{given}\b.*\b5 classes", message)


MISSPELT = [("resnet5", "resnet50"), ("mobilnet_v2", "mobilenet_v2"), ("vit_b", "vit_b_16")]


@pytest.mark.parametrize(("arch", "meant"), MISSPELT)
def test_an_unknown_architecture_is_refused_with_close_matches(arch, meant):
    assert re.search(f"'{arch}'.*did you mean.*{meant}", refusal(arch=arch))


def test_weights_of_another_network_are_refused_with_their_number_of_parameters(saved):
    other = nn.Sequential(nn.Conv2d(3, 1600, 5), nn.Flatten(), nn.Linear(16, 5))
    assert "(0.1 million parameters)" in refusal(saved(other.state_dict()))


def test_weights_of_a_part_of_a_network_are_refused_with_the_nearest_architecture(saved):
    message = refusal(saved(without("layer4.1.", STATE)))
    assert re.search(r"fits no torchvision classifier.*--arch resnet18\b", message)


MORE_TASKS = [
    "retinanet_resnet50_fpn",
    "fcn_resnet50",
    "ssd300_vgg16",
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
]
TASKS = ["fasterrcnn_resnet50_fpn"]
TASKS += [pytest.param(arch, marks=pytest.mark.slow) for arch in MORE_TASKS]


def zeros_like_state_of(arch, **options):
    """Return a state dict of a network with zeros for its weights."""
    with torch.device("meta"):
        state = get_model(arch, weights=None, **options).state_dict()
    return {key: torch.zeros(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("arch", TASKS)
def test_a_network_for_another_task_is_named_as_such(arch, saved):
    message = refusal(saved(zeros_like_state_of(arch, weights_backbone=None)))
    assert "it looks like a detector or segmentation network" in message


def test_a_vit_takes_the_size_that_its_position_embedding_has_and_no_other(saved):
    state = zeros_like_state_of("vit_b_16", num_classes=3, image_size=48)
    assert load(saved(state)).input_size == (48, 48)

    expected = "takes inputs of 48 x 48 pixels only, not .*input.size 224"
    assert re.search(expected, refusal(saved(state), input_size=224))
    assert re.search(expected, refusal(saved({"state_dict": state, "input_size": 224})))


def test_a_size_that_maxvit_cannot_take_is_one_line(saved):
    path = saved(network("maxvit_t").state_dict())
    assert re.search(r"maxvit_t.*225", refusal(path, arch="maxvit_t", input_size=225))


# All of torchvision's architectures


# fmt: off
DEFAULT_ARCHITECTURES = [
    "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
    "swin_t",
]
# fmt: on
SLOW_ARCHITECTURES = sorted(set(ARCHITECTURES) - set(DEFAULT_ARCHITECTURES))
ALL_ARCHITECTURES = [*DEFAULT_ARCHITECTURES]
ALL_ARCHITECTURES += [pytest.param(arch, marks=pytest.mark.slow) for arch in SLOW_ARCHITECTURES]


class CountRandomNumbers(TorchDispatchMode):
    """Count the random numbers that are really drawn."""

    drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random and isinstance(result, torch.Tensor) and not result.is_meta:
            self.drawn += result.numel()
        return result


def smallest_side(arch):
    """Return the side of the smallest inputs that are tried with an architecture."""
    if arch.startswith(("vit", "maxvit")):
        return get_model_weights(arch).DEFAULT.transforms().crop_size[0]
    if arch == "inception_v3":
        return 96
    return 64


def network_of_seven_classes(arch, side):
    """Return a network of which class 0 or class 1 has a map that is not empty."""
    options = {}
    if arch.startswith("vit"):
        options["image_size"] = side
    model = network(arch, classes=7, **options)

    # The weights of class 1 are those of class 0 with the other sign.
    state = model.state_dict()
    key = [key for key in state if key.endswith("weight")][-1]
    head = state[key].clone()
    head[1] = -head[0]
    state[key] = head
    model.load_state_dict(state, assign=True)
    return model


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_an_architecture_is_recognised_loaded_prepared_for_and_explained(arch, saved, capfd):
    side = smallest_side(arch)
    model = network_of_seven_classes(arch, side)
    path = saved({"state_dict": model.state_dict()})
    with CountRandomNumbers() as numbers, warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = load(path)
    assert numbers.drawn < 5000  # of a plain torchvision network: one for each weight
    assert capfd.readouterr() == ("", "")

    assert classifier.arch == arch
    assert classifier.class_names == tuple(f"class {index}" for index in range(7))
    assert not any(module.training for module in classifier.model.modules())

    inputs = classifier.preprocess(PHOTO)
    transforms = get_model_weights(arch).DEFAULT.transforms()
    assert inputs.dtype == torch.float32
    assert_same_inputs(inputs, transforms(Image.fromarray(PHOTO)))
    if arch in HUGE:
        return

    assert_same_logits(classifier, model, side)
    inputs = random_inputs(1, side, seed=2).expand(2, -1, -1, -1)
    explanation = Explainer(classifier.model)(inputs, targets=[0, 1])
    cams = explanation.cams["gradcam"]
    assert cams.shape == (2, side, side)
    assert cams.min() >= 0
    assert cams.max() == pytest.approx(1, abs=0.01)
    assert cams.max() <= 1
    assert explanation.guided.shape == (2, 3, side, side)
    assert np.isfinite(explanation.guided).all()
    assert explanation.guided.any()


def test_the_architectures_are_torchvisions():
    assert set(ARCHITECTURES) == set(list_models(module=torchvision.models))
    assert len(ARCHITECTURES) >= 80


def test_a_plain_torchvision_network_draws_a_random_number_for_each_weight():
    with CountRandomNumbers() as numbers:
        get_model("squeezenet1_1", weights=None)
    assert numbers.drawn > 1_000_000  # so the counter above does count


# What the network is shown, and what is told of it


def test_at_another_size_the_margin_around_the_crop_is_in_proportion(saved):
    path = saved(STATE)  # torchvision's preset: short side to 256, crop of 224
    expected = get_model_weights("resnet18").DEFAULT.transforms(crop_size=112, resize_size=128)
    inputs = load(path, input_size=112).preprocess(read_photo(DOG))
    assert_same_inputs(inputs, expected(read_dog()))


def test_squashing_shows_the_whole_photo(saved):
    classifier = load(saved(STATE), resize="squash")
    small = functional.resize(Image.fromarray(PHOTO), [224, 224], antialias=True)
    expected = functional.normalize(functional.pil_to_tensor(small) / 255, *IMAGENET)
    assert_same_inputs(classifier.preprocess(PHOTO), expected)
    assert classifier.seen_box(97, 131) == (0, 0, 131, 97)


def test_an_unknown_resize_is_refused(saved):
    assert "unknown resize 'sqash'" in refusal(saved(STATE), resize="sqash")


def ramp(height, width):
    """Return a photo whose red and green are the pixels' own coordinates."""
    photo = np.zeros((height, width, 3), np.uint8)
    photo[..., 0] = np.linspace(0, 255, width)[None]
    photo[..., 1] = np.linspace(0, 255, height)[:, None]
    return photo


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (300, 300), (97, 801)])
@pytest.mark.parametrize("side", [224, 96])
def test_the_seen_box_is_the_part_that_the_preset_crops(height, width, side, saved):
    classifier = load(saved(STATE), mean=[0, 0, 0], std=[1, 1, 1], input_size=side)
    seen = classifier.preprocess(ramp(height, width))

    # What the preset leaves of the ramp tells where its corners are.
    middle = side // 2
    left, right = (seen[0, middle, [0, -1]] * width).tolist()
    top, bottom = (seen[1, [0, -1], middle] * height).tolist()
    pixel = max(height, width) / side
    box = classifier.seen_box(height, width)
    np.testing.assert_allclose(box, [left, top, right, bottom], atol=1.5 * pixel)


def test_the_first_line_tells_what_is_assumed(saved):
    line = load(saved(STATE, "bare.pth")).describe(["layer4"])
    assert re.match(r"resnet18 \(recognised\), 5 classes \(.*\), softmax, layer4, ", line)
    assert ", short side 256, centre 224 x 224 (" in line
    assert re.search("not in bare.pth; pass --input-size.*, ImageNet mean and std, cpu", line)


def test_the_first_line_tells_what_comes_from_the_checkpoint(saved):
    path = saved({"state_dict": STATE, "input_size": 96, "classes": NAMES})
    line = load(path, arch="resnet18", mean=[0, 0, 0], std=[1, 1, 1]).describe()
    names = "0 ant, 1 Bee, 2 cat, 3 dog, 4 Elk"
    assert line.startswith(
        f"resnet18, 5 classes ({names}; from best.pth), softmax, "
        "short side 110, centre 96 x 96 (from best.pth), mean [0.0, 0.0, 0.0] std [1.0, 1.0, 1.0], "
    )
    assert "ImageNet" not in line


def test_what_was_passed_is_told_in_one_line_without_advice(saved):
    path = saved({"state_dict": STATE, "input_size": 96, "classes": NAMES})
    line = repr(load(path, input_size=112, resize="squash"))
    assert "whole photo squashed to 112 x 112, " in line
    assert "\n" not in line
    assert "pass --" not in line


WANTED = [
    ("cat", 2),
    ("CAT", 2),
    ("bee", 1),
    ("elk", 4),
    ("0", 0),
    ("4", 4),
    ("哈士奇", 5),
    ("7", 6),
]


@pytest.mark.parametrize(("wanted", "index"), WANTED)
def test_a_class_is_found_by_name_in_any_case_or_by_index(wanted, index):
    assert find_class(wanted, [*NAMES, "哈士奇", "7"]) == index


NEAR = {"husky": "Siberian husky", "Samoyde": "Samoyed", "german shepard": "German shepherd"}
FAR = ("-1", "19", "1000", "99999999999999999999", "zebra", "1.5", "", "²", "٣x", "(")


def unknown_class(wanted):
    """Return the message for a class that the demo does not know."""
    with pytest.raises(CallError, match=f"'{re.escape(wanted)}'.*0 to 18") as caught:
        find_class(wanted, torch.load(CKPT, weights_only=True)["classes"])
    return str(caught.value)


@pytest.mark.parametrize("wanted", NEAR)
def test_an_unknown_class_is_refused_with_near_names(wanted):
    near_names = re.search(r"did you mean ([^?]*)\?", unknown_class(wanted))
    assert NEAR[wanted] in near_names[1]


@pytest.mark.parametrize("wanted", FAR)
def test_a_class_unlike_all_others_is_refused_with_the_range_alone(wanted):
    assert "did you mean" not in unknown_class(wanted)


# Networks of one's own


OWN = """
import torch
from torch import nn
from torchvision.models import resnet18

class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.cnn = resnet18(num_classes=8)
        self.head = nn.Linear(8, num_classes)
        if {buffers}:
            self.register_buffer("mean", torch.zeros({buffers}))
            self.register_buffer("std", torch.ones({buffers}))
    def forward(self, x):
        embedding = self.cnn(x)
        return {result}
"""


@pytest.fixture
def own(tmp_path):
    """Write a network whose `forward` returns an expression, and return its --arch value."""

    def write(result="self.head(embedding)", buffers=0):
        (tmp_path / "net.py").write_text(OWN.format(result=result, buffers=buffers))
        return f"{tmp_path / 'net.py'}:Net"

    return write


def own_state(classes=2):
    head = {"head.weight": torch.randn(classes, 8), "head.bias": torch.zeros(classes)}
    return under("cnn.", resnet18(8).state_dict()) | head


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_a_network_of_ones_own_gets_its_weights_and_the_number_of_classes(prefix, own, saved):
    state = own_state(classes=3)
    path = saved({"state_dict": under(prefix, state), "input_size": 64})
    classifier = load(path, arch=own())
    assert len(classifier.class_names) == 3
    assert classifier.input_size == (64, 64)
    assert_imagenet_mean_and_std(classifier)

    expected = logits_of(resnet18(8)) @ state["head.weight"].T
    torch.testing.assert_close(logits_of(classifier.model), expected, rtol=1e-4, atol=1e-4)


FAILING = {
    "undefined_name": "NameError: name 'undefined_name' is not defined",
    "None": "returns a NoneType",
    "self.cnn(x[:, :, :1, :1].flatten(1))": "RuntimeError",
    "self.head(embedding).softmax(1)": "softmax",
    "self.head(embedding).sigmoid()": "sigmoid",
    "x": "tensor of 2 x 3 x 64 x 64",
    "self.cnn(x.mean(1, keepdim=True))": "channels",
}


@pytest.mark.parametrize("result", FAILING)
def test_a_forward_that_fails_or_returns_no_logits_shows_the_error_itself(result, own, saved):
    fault = FAILING[result]
    message = refusal(saved({"state_dict": own_state(), "input_size": 64}), arch=own(result))
    assert fault in message
    assert ("pass another --input-size" in message) == (fault in ("RuntimeError", "channels"))


def test_of_an_embedding_and_logits_those_with_the_number_of_classes_are_taken(own, saved):
    path = saved(own_state())
    arch = own("(embedding, self.head(embedding))")
    assert "or pass --num-classes" in refusal(path, arch=arch)
    assert len(load(path, arch=arch, num_classes=2).class_names) == 2


NO_NETWORKS = ["def Net(): return 5", "def Net(): 1 / 0", "raise SystemExit(3)", "def other(): 0"]


@pytest.mark.parametrize("text", NO_NETWORKS)
def test_a_file_that_builds_no_network_is_one_line(text, own, saved, tmp_path):
    arch = own()
    (tmp_path / "net.py").write_text(text)
    assert "net.py" in refusal(saved(own_state()), arch=arch)


@pytest.mark.parametrize("size", [3, 8])
def test_buffers_called_mean_and_std_are_not_the_preprocessing(size, own, saved):
    state = own_state() | {"mean": torch.arange(size) / 10, "std": torch.ones(size)}
    arch = own(buffers=size)
    for content in (state, under("module.", state), {"model": state, "epoch": 3}):
        classifier = load(saved(content), arch=arch)
        assert_imagenet_mean_and_std(classifier)
        assert torch.equal(classifier.model.mean, state["mean"])

    classifier = load(saved({"model": state, "mean": [0.5, 0.5, 0.5]}), arch=arch)
    assert classifier.preset.mean == [0.5, 0.5, 0.5]


# Without a checkpoint


@pytest.fixture
def fake_download(monkeypatch, tmp_path):
    """What torchvision downloads, into an empty cache, is the weights of this network.

    Without a network it is offline.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    weights = tmp_path / "download"

    def download(url, dst, *args, **kwargs):
        if not weights.exists():
            raise urllib.error.URLError("no\nroute to host")
        shutil.copy(weights, dst)

    def offer(model):
        torch.save(model.state_dict(), weights)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return offer


def imagenet_names(arch):
    return tuple(get_model_weights(arch).DEFAULT.meta["categories"])


def test_weights_that_cannot_be_downloaded_are_one_line(fake_download, capfd):
    assert re.search("resnet18.*download.*--ckpt", refusal(arch="resnet18"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("arch", ["squeezenet1_1", "mnasnet0_5", *WITH_AUXILIARY_HEADS])
def test_without_a_checkpoint_torchvisions_weights_and_names_are_used(arch, fake_download):
    options = {}
    if arch in WITH_AUXILIARY_HEADS:
        options["aux_logits"] = True
    model = network(arch, classes=1000, **options)
    fake_download(model)

    classifier = load_classifier(arch, device="cpu")
    assert classifier.arch == arch
    assert tuple(classifier.class_names) == imagenet_names(arch)
    assert "pass --" not in classifier.describe()
    assert_same_logits(classifier, model, side=96)
    assert re.search(r"--num-classes\D*2\b.*\b1000 classes", refusal(arch=arch, num_classes=2))


def test_without_an_architecture_and_a_checkpoint_resnet50_is_used(fake_download):
    model = network("resnet50", classes=1000)
    fake_download(model)

    classifier = load_classifier(device="cpu")
    assert classifier.arch == "resnet50"
    assert tuple(classifier.class_names) == imagenet_names("resnet50")
    assert "pass --" not in classifier.describe()
    assert_same_logits(classifier, model, side=96)
    assert re.search(r"--num-classes\D*2\b.*\b1000 classes", refusal(num_classes=2))


def test_1000_classes_without_names_are_imagenets(saved):
    classifier = load(saved(network("squeezenet1_1", classes=1000).state_dict()))
    assert tuple(classifier.class_names) == imagenet_names("squeezenet1_1")


# The device, and memory


NO_GPU = {
    "Torch not compiled with CUDA enabled": "not compiled with CUDA",
    "Found no NVIDIA driver on your system. Please check\nmore": "no CUDA GPU found",
    "The NVIDIA driver on your system is too old (found version 11040)\nmore": "too old",
    "No CUDA GPUs are available": "No CUDA GPUs are available",
}


@pytest.fixture
def no_cuda(monkeypatch):
    """Pretend that there is no CUDA GPU and that each use of one fails with this message."""
    zeros = torch.zeros

    def pretend(message):
        def fail(*args, device=None, **kwargs):
            if str(device).startswith("cuda"):
                raise RuntimeError(message)
            return zeros(*args, device=device, **kwargs)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch, "zeros", fail)

    return pretend


@pytest.mark.parametrize("message", NO_GPU)
def test_it_is_told_why_a_gpu_is_not_used(message, no_cuda, saved):
    no_cuda(message)
    device, reason = find_device(None)
    assert device.type == "cpu"
    assert NO_GPU[message] in reason
    assert "\n" not in reason
    assert load_classifier(ckpt=saved(STATE)).describe().endswith(f"cpu ({reason})")
    with pytest.raises(CallError, match=f"cuda:1.*{NO_GPU[message]}"):
        find_device("cuda:1")


def test_of_a_device_that_was_asked_for_no_reason_is_told():
    assert find_device("cpu") == (torch.device("cpu"), "")


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", "toaster", "cuda:x"])
def test_a_device_that_does_not_exist_is_refused_first(device, tmp_path):
    message = refusal(tmp_path / "missing.pth", device=device)
    assert device in message
    assert "cpu" in message


MISSING_MEMORY = [
    "CUDA out of memory. Tried to allocate 2 GiB",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
]
OTHER_FAULTS = [
    "GET was unable to find an engine to execute this computation",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
]


def squares_in_batches(batches, message):
    """Return the batches of the squares of 0 to 9, where more than two at once raise an error."""

    def square(items):
        if len(items) > 2:
            raise RuntimeError(message)
        return [item**2 for item in items]

    return list(batches.run(square, range(10)))


@pytest.mark.parametrize("message", MISSING_MEMORY)
def test_missing_memory_makes_batches_smaller(message):
    batches = BatchSize(8)
    squares = squares_in_batches(batches, message)
    assert list(itertools.chain(*squares)) == [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
    assert batches.size == 2


@pytest.mark.parametrize("message", OTHER_FAULTS)
def test_other_faults_do_not_make_batches_smaller(message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        squares_in_batches(BatchSize(8), message)
