"""Section 3, Model: names and files become a classifier that answers as the plain torchvision network does."""

import argparse
import copy
import faulthandler
import functools
import math
import os
import pickle
import re
import shutil
import urllib.error
import warnings
from collections import OrderedDict
from datetime import datetime, timezone
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
    Photo,
    PhotoError,
    find_class,
    find_device,
    load_classifier,
    read_photo,
)

HUGE = ("regnet_y_128gf", "vit_h_14")  # more than 600 million parameters: 8 GB for an explanation
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
NAMES = ["ant", "Bee", "cat", "dog", "Elk"]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class ParametersOnMeta(TorchFunctionMode):
    """Networks built in this mode have parameters on the meta device; their buffers are real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def random_weights(key, tensor, generator):
    """Random weights that keep a deep network alive; matrices overlap in memory, so that a file of them is small."""
    if not tensor.is_floating_point() or key.endswith("relative_coords_table"):
        return tensor
    if key.endswith("running_var"):
        return torch.rand(tensor.shape, generator=generator) + 0.5
    if tensor.ndim < 2 or key.endswith("layer_scale"):
        center = 1.0 if key.endswith(("weight", "layer_scale")) else 0.0
        return center + 0.1 * torch.randn(tensor.shape, generator=generator)
    strides = (5, 3, 2, 1)[-tensor.ndim :]
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return torch.randn(length, generator=generator).as_strided(tensor.shape, strides) / math.sqrt(tensor[0].numel())


def network(arch, classes=5, change=None, builder=get_model, **options):
    """A plain torchvision network with random weights, changed as people change it for fine-tuning."""
    if arch in WITH_AUXILIARY_HEADS:
        options = {"aux_logits": False, "init_weights": False, "transform_input": True, **options}
    with ParametersOnMeta():
        model = builder(arch, weights=None, num_classes=classes, **options)
        if change is not None:
            model = change(model) or model
    generator = torch.Generator().manual_seed(0)
    state = {key: random_weights(key, tensor, generator) for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


@functools.cache
def resnet18():
    return network("resnet18")


def state18():
    return resnet18().state_dict()


def under(prefix, state):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def zeros(state):
    """The same tensors, zero, in a file of a few kilobytes."""
    return {key: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape) for key, tensor in state.items()}


@pytest.fixture
def saved(tmp_path):
    """Write a checkpoint and return its path."""

    def save(content, name="best.pth", **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save


@pytest.fixture
def own_file(tmp_path):
    """Write a file with a network of one's own and return its --arch value."""

    def write(text, function="build"):
        text = "import torch\nfrom torch import nn\nfrom torchvision.models import resnet18\n" + text
        (tmp_path / "net.py").write_text(text)
        return f"{tmp_path / 'net.py'}:{function}"

    return write


def load(path, **kwargs):
    return load_classifier(ckpt=path, device="cpu", **kwargs)


def refusal(path=None, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(CallError) as caught:
        load_classifier(ckpt=path, **{"device": "cpu", **kwargs})
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 1000
    return message


def logits_of(model, side=64):
    inputs = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(inputs)


def assert_same_logits(classifier, model, side=64):
    expected = logits_of(model, side)
    assert expected.isfinite().all() and expected.std() > 1e-4  # a dead network would agree with anything
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits_of(classifier.model, side), expected, rtol=1e-4, atol=1e-4 * scale)


def assert_is_resnet18(path):
    classifier = load(path)
    assert classifier.arch == "resnet18"
    assert_same_logits(classifier, resnet18())
    return classifier


# Where the weights are in the file


ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "ema", "module", "my_best")
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "backbone.", "net.", "base.", "encoder.", "features.", "my_resnet.cnn.", "0."),
    *("module._orig_mod.", "_orig_mod.module.", "model.backbone.", "_orig_mod.module.model.", "model._orig_mod."),
)
OTHER = {key: tensor + 1 for key, tensor in state18().items()}  # another network of the same architecture
MOMENTS = {i: {"exp_avg": torch.zeros(9, 9), "step": torch.tensor(1.0)} for i in range(200)}
TRAINING_OPTIONS = argparse.Namespace(model="resnet18", data_path="/data", lr=0.1, device="cuda", amp=False, test=None)
KINDS = {
    "bare": lambda state: state,
    **{f"entry {entry}": lambda state, entry=entry: {"epoch": 3, entry: state, "acc": 0.9} for entry in ENTRIES},
    **{f"prefix {prefix}": lambda state, prefix=prefix: {"state_dict": under(prefix, state)} for prefix in PREFIXES},
    "two levels": lambda state: {"checkpoint": {"model": state}, "epoch": 3},
    "parameters": lambda state: {k: nn.Parameter(t, t.is_floating_point()) for k, t in state.items()},
    "bare, options beside": lambda state: {**state, "epoch": 3, "lr": 0.1, "metric": torch.tensor(0.9)},
    "average alone": lambda state: {"model_ema": {"n_averaged": torch.tensor(7), **under("module.", state)}},
    "average beside": lambda state: {"model_ema": OTHER, "model": state},
    "average of timm": lambda state: {"arch": "resnet18", "state_dict_ema": OTHER, "state_dict": state},
    "average in one dict": lambda state: {"state_dict": under("model.", state) | under("ema.module.", OTHER)},
    "the same twice": lambda state: {"best": state, "last": OrderedDict(state)},
    "optimizer": lambda state: {"optimizer": {"state": MOMENTS}, "optim_d": {"w": torch.ones(3, 3)}, "x": state},
    "before batches were counted": lambda state: {k: t for k, t in state.items() if "num_batches" not in k},
    "torchvision's training script": lambda state: {
        "model": state,
        "optimizer": torch.optim.SGD(resnet18().parameters(), lr=0.1, momentum=0.9).state_dict(),
        "lr_scheduler": {"step_size": 30, "_last_lr": [0.1], "last_epoch": 89},
        "epoch": 89,
        "args": TRAINING_OPTIONS,
    },
    "Lightning": lambda state: {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**under("model.", state), "loss_fn.pos_weight": torch.ones(5), "acc.total": torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"best_score": torch.tensor(0.2)}},
        "optimizer_states": [{"state": MOMENTS, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"num_classes": 5, "lr": 0.1},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_found_in_each_kind_of_checkpoint(kind, saved):
    assert_is_resnet18(saved(KINDS[kind](state18())))


def test_prefixes_that_torch_itself_writes_are_removed(saved):
    assert_is_resnet18(saved(nn.DataParallel(copy.deepcopy(resnet18())).state_dict()))
    assert_is_resnet18(saved({"model_ema": torch.optim.swa_utils.AveragedModel(resnet18()).state_dict()}))


@pytest.mark.parametrize("outer", ["", "model.", "module.model."])
@pytest.mark.parametrize("name", ["fc", "head", "linear", "head.1"])
def test_a_head_beside_the_backbone_is_found_at_every_depth(outer, name, saved):
    state = {key: tensor for key, tensor in state18().items() if not key.startswith("fc.")}
    head = {f"{name}.weight": resnet18().fc.weight, f"{name}.bias": resnet18().fc.bias}
    assert_is_resnet18(saved(under(outer, under("backbone.", state) | head)))


@pytest.mark.parametrize("outer", ["", "_orig_mod.module."])
@pytest.mark.parametrize("given", [None, "resnet18"])
def test_a_loss_beside_the_network_is_left_out_with_a_warning(outer, given, saved, capsys):
    loss = {"criterion.weight": torch.ones(5), "criterion.mean": torch.zeros(512)}
    classifier = load(saved({"state_dict": under(outer, under("model.", state18()) | loss)}), arch=given)
    assert_same_logits(classifier, resnet18())
    assert (classifier.preset.mean, classifier.preset.std) == IMAGENET
    assert re.fullmatch(r"warning: .*criterion\.weight.*\n", capsys.readouterr().err)


def test_a_layer_in_front_that_normalises_its_inputs_becomes_the_preprocessing(saved):
    layer = {"0.mean": torch.full((1, 3, 1, 1), 0.1), "0.std": torch.full((1, 3, 1, 1), 0.9)}
    preset = assert_is_resnet18(saved(layer | under("1.", state18()))).preset
    assert [*preset.mean, *preset.std] == pytest.approx([0.1] * 3 + [0.9] * 3)


@pytest.mark.parametrize("name", ["classifier", "head", "linear"])
def test_a_head_behind_the_outputs_of_a_whole_network_is_not_dropped(name, saved):
    state = under("model.", state18()) | {f"{name}.weight": torch.ones(3, 5), f"{name}.bias": torch.ones(3)}
    assert re.search(rf"{name}\.weight.*5 outputs.*net\.py:build", refusal(saved(state)))


@pytest.mark.parametrize("teacher", ["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("nest", [lambda state: state, lambda state: {"student": state["student"], "t": state["t"]}])
def test_of_two_networks_in_the_file_none_is_taken_by_chance(teacher, nest, saved):
    theirs = zeros(network(teacher).state_dict())
    message = refusal(saved(under("student.", state18()) | under("teacher.", theirs)))
    assert "student" in message or "teacher" in message or "fits no torchvision classifier" in message


def test_two_networks_in_two_dicts_are_refused_by_name(saved):
    message = refusal(saved({"student": state18(), "teacher": OTHER}))
    assert "several networks" in message and "student" in message and "teacher" in message


# What the weights and the values beside them may be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_computed_in_float32(dtype, saved):
    model = copy.deepcopy(resnet18()).to(dtype)
    classifier = load(saved(model.state_dict()))
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert_same_logits(classifier, model.float())


PLAIN_VALUES = (
    *(np.float64(0.9), np.float32(0.9), np.float16(0.9), np.int64(3), np.int32(3), np.uint8(3), np.bool_(True)),
    *(datetime(2026, 11, 23, 12, 30), datetime.now(timezone.utc) - datetime(2026, 1, 1, tzinfo=timezone.utc)),
    *(Path("runs") / "best.pth", argparse.Namespace(lr=0.1, out=Path("runs")), np.arange(3.0)),
)


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_plain_values_that_are_not_built_in_ones_may_stand_in_the_file(value, zipped, saved):
    content = {"state_dict": state18(), "best": value, "history": {"accuracy": [value, value]}}
    before = set(torch.serialization.get_safe_globals())
    assert load(saved(content, _use_new_zipfile_serialization=zipped)).arch == "resnet18"
    assert set(torch.serialization.get_safe_globals()) == before


def test_old_densenet_names_are_understood(saved):
    model = network("densenet121")
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    state = {old.sub(r"\1.\2", key): tensor for key, tensor in model.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    classifier = load(saved(state))
    assert classifier.arch == "densenet121"
    assert_same_logits(classifier, model)


@pytest.mark.parametrize("auxiliary", [True, False], ids=["with auxiliary heads", "without"])
@pytest.mark.parametrize("arch", WITH_AUXILIARY_HEADS)
def test_auxiliary_heads_may_be_there_or_not(arch, auxiliary, saved):
    model = network(arch, aux_logits=auxiliary)
    assert auxiliary == any("aux" in key.lower() for key in model.state_dict())
    path = saved(model.state_dict())
    for classifier in (load(path), load(path, arch=arch, num_classes=5)):
        assert classifier.arch == arch
        assert_same_logits(classifier, model, side=96)


def test_batch_norms_of_googlenet_that_were_never_trained_get_no_input_transform(saved):
    model = network("googlenet", transform_input=False)
    state = {k: t.zero_() if k.endswith("running_mean") else t for k, t in model.state_dict().items()}
    assert_same_logits(load(saved(state)), model)


def test_safetensors_are_read_and_a_broken_file_is_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "best.safetensors"
    safetensors.save_file({key: tensor.contiguous() for key, tensor in state18().items()}, path)
    assert_is_resnet18(path)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    assert "best.safetensors" in refusal(path)


def test_the_demo_is_read_as_torchvision_reads_it():
    content = torch.load(CKPT, weights_only=True)
    model = get_model("mobilenet_v2", weights=None, num_classes=19)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in content["state_dict"].items()})
    classifier = load(CKPT)
    assert (classifier.arch, list(classifier.class_names)) == ("mobilenet_v2", content["classes"])
    transforms = get_model_weights("mobilenet_v2").DEFAULT.transforms
    inputs = transforms(crop_size=225, resize_size=233)(Image.open(DOG).convert("RGB"))
    torch.testing.assert_close(classifier.preprocess(read_photo(DOG)), inputs, rtol=0, atol=1e-6)
    assert_same_logits(classifier, model)
    with torch.inference_mode():
        assert classifier.class_names[model.eval()(inputs[None]).argmax()] == "Siberian husky"


def test_loading_prints_nothing_and_gives_a_network_in_eval_mode(saved, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = load(saved(state18()))
    assert not any(module.training for module in classifier.model.modules())
    assert {p.device.type for p in classifier.model.parameters()} == {"cpu"}
    assert classifier.class_names == tuple(f"class {i}" for i in range(5))
    assert capfd.readouterr() == ("", "")


# Heads, as people replace them when they fine-tune


def replaced(name, make):
    """A change of a network: the layer of that name becomes what `make` gives for the number of its inputs."""

    def change(model):
        linear = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear))
        model.set_submodule(name, make(linear.in_features))

    return change


MAKERS = {
    "linear": lambda inputs: nn.Linear(inputs, 5),
    "no bias": lambda inputs: nn.Linear(inputs, 5, bias=False),
    "dropout, linear": lambda inputs: nn.Sequential(nn.Dropout(), nn.Linear(inputs, 5)),
    "sequence": lambda inputs: nn.Sequential(nn.Linear(inputs, 5)),
    "two dropouts": lambda inputs: nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.1), nn.Linear(inputs, 5)),
}
HEADS = {
    "resnet18": [("fc", [*MAKERS][1:])],
    "mobilenet_v2": [("classifier", ["linear", "dropout, linear"]), ("classifier.1", ["linear", "dropout, linear"])],
    "mobilenet_v3_small": [("classifier", ["linear"]), ("classifier.3", ["linear", "dropout, linear"])],
    "shufflenet_v2_x0_5": [("fc", ["dropout, linear"])],
    "alexnet": [("classifier", ["linear"]), ("classifier.6", ["linear"])],
    "convnext_tiny": [("classifier.2", ["linear", "dropout, linear"])],
    "vit_b_32": [("heads", ["linear", "dropout, linear"]), ("heads.head", ["dropout, linear"])],
}
MORE_HEADS = {
    "efficientnet_b0": [("classifier", ["linear"]), ("classifier.1", ["dropout, linear"])],
    "mnasnet0_5": [("classifier", ["linear"])],
    "vgg11": [(name, ["linear", "dropout, linear"]) for name in ("classifier", "classifier.6")],
    "densenet121": [("classifier", ["dropout, linear"])],
    **{arch: [("fc", ["dropout, linear"])] for arch in ("googlenet", "inception_v3", "regnet_y_400mf")},
    "swin_t": [("head", ["dropout, linear"])],
    "maxvit_t": [("classifier.5", ["linear", "dropout, linear"])],
}


def cases(heads):
    return [(arch, name, maker) for arch, places in heads.items() for name, makers in places for maker in makers]


@pytest.mark.parametrize(
    ("arch", "name", "maker"), [*cases(HEADS), *(pytest.param(*c, marks=pytest.mark.slow) for c in cases(MORE_HEADS))]
)
def test_a_replaced_head_with_one_linear_layer_is_used(arch, name, maker, saved):
    options = {"image_size": 64} if arch.startswith("vit") else {}
    model = network(arch, classes=1000, change=replaced(name, MAKERS[maker]), **options)
    path = saved(model.state_dict())
    classifier = load(path, arch=arch)
    assert len(classifier.class_names) == 5
    assert_same_logits(classifier, model, {"maxvit_t": 224, "inception_v3": 96}.get(arch, 64))
    if not options:  # with another position embedding a ViT has another number of parameters: seconds to find
        assert load(path).arch == arch


def test_a_replaced_convolution_of_squeezenet_is_used(saved):
    def change(model):
        model.classifier[1] = nn.Conv2d(512, 5, kernel_size=1)

    model = network("squeezenet1_0", classes=1000, change=change)
    classifier = load(saved(model.state_dict()))
    assert (classifier.arch, len(classifier.class_names)) == ("squeezenet1_0", 5)
    assert_same_logits(classifier, model)


def test_a_head_of_two_layers_is_refused_by_name(saved):
    change = replaced("fc", lambda inputs: nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 5)))
    for arch in ("resnet18", None):
        message = refusal(saved(network("resnet18", change=change).state_dict()), arch=arch)
        assert "fc.0.weight" in message and "net.py:build" in message


@pytest.mark.parametrize("given", [None, 1, 2])
def test_a_single_output_is_the_second_of_two_classes(given, saved):
    model = network("resnet18", change=replaced("fc", lambda inputs: nn.Linear(inputs, 1)))
    path = saved({"state_dict": model.state_dict(), "classes": ["cat", "dog"]})
    classifier = load(path, num_classes=given)
    assert classifier.class_names == ("cat", "dog")
    assert load(path, class_names=["no", "yes"]).class_names == ("no", "yes")
    inputs = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, sure = classifier.model(inputs), model(inputs).sigmoid()
    torch.testing.assert_close(logits.softmax(1), torch.cat([1 - sure, sure], 1))
    explanation, expected = Explainer(classifier.model)(inputs, [0, 1, 0]), Explainer(model)(inputs)
    np.testing.assert_allclose(explanation.cams["gradcam"][1], expected.cams["gradcam"][1], atol=1e-5)
    np.testing.assert_allclose(explanation.guided[1], expected.guided[1] / 2, atol=1e-6)
    assert np.abs(explanation.cams["gradcam"][0] - expected.cams["gradcam"][0]).max() > 0.1


# Entries beside the weights


CLASS_ENTRIES = {
    "classes": NAMES,
    "class_names": tuple(NAMES),
    "class_to_idx": dict(zip(reversed(NAMES), range(4, -1, -1), strict=True)),
    "idx_to_class": {str(i): name for i, name in enumerate(NAMES)},
}


@pytest.mark.parametrize("entry", CLASS_ENTRIES)
def test_class_names_in_the_checkpoint_are_used_and_given_ones_win(entry, saved):
    path = saved({"state_dict": state18(), entry: CLASS_ENTRIES[entry]})
    assert list(load(path).class_names) == NAMES
    assert load(path, class_names=list("vwxyz")).class_names == tuple("vwxyz")
    assert re.search(r"\b2\b.*\b5 classes", refusal(path, class_names=["a", "b"]))


@pytest.mark.parametrize(
    "classes", [5, "abcde", ["a", "b"], {"a": 0, "b": 7}, {"a": None}, [], {}, {"x": [1]}, [None] * 5], ids=str
)
def test_class_names_that_cannot_be_right_are_left_out_with_a_warning(classes, saved, capsys):
    classifier = load(saved({"state_dict": state18(), "classes": classes}))
    assert classifier.class_names == tuple(f"class {i}" for i in range(5))
    assert re.fullmatch(r"warning: .*best\.pth.*classes.*\n", capsys.readouterr().err)
    assert "--class-names" in classifier.describe() and "alphabetical" in classifier.describe()


@pytest.mark.parametrize("size", [96, [96, 96], (3, 96, 96), [96], np.int64(96)], ids=repr)
def test_the_input_size_of_the_checkpoint_is_used_and_a_given_one_wins(size, saved):
    path = saved({"state_dict": state18(), "input_size": size})
    assert load(path).preprocess(noise()).shape == (3, 96, 96)
    assert load(path, input_size=64).preprocess(noise()).shape == (3, 64, 64)


VALUES = torch.tensor([0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    "values", [VALUES.tolist(), tuple(VALUES.tolist()), VALUES, VALUES.view(3, 1, 1), VALUES.numpy(), VALUES.bfloat16()]
)
def test_mean_and_std_of_the_checkpoint_are_used_and_given_ones_win(values, saved):
    path = saved({"state_dict": state18(), "mean": values, "std": values})
    for options, mean, std in (
        ({}, [0.4, 0.5, 0.6], [0.4, 0.5, 0.6]),
        ({"mean": [0.1, 0.2, 0.3]}, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, [0, 0, 0], [1, 1, 1]),
    ):
        expected = get_model_weights("resnet18").DEFAULT.transforms(mean=mean, std=std)(Image.fromarray(noise().pixels))
        inputs = load(path, **options).preprocess(noise())
        torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-2 if values is VALUES.bfloat16() else 5e-3)


@pytest.mark.parametrize(
    ("mean", "std"),
    [([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]), ([104, 117, 123], [1, 1, 1]), ([0, 0, 0], [255] * 3)],
)
def test_mean_and_std_of_colours_up_to_255_are_understood(mean, std, saved):
    colours = get_model_weights("resnet18").DEFAULT.transforms(mean=[0, 0, 0], std=[1, 1, 1])
    of_one, by = (torch.tensor(values)[:, None, None] for values in (mean, std))
    expected = (colours(Image.fromarray(noise().pixels)) * 255 - of_one) / by
    in_the_file = load(saved({"state_dict": state18(), "mean": mean, "std": std}))
    for classifier in (in_the_file, load(saved(state18()), mean=mean, std=std)):
        torch.testing.assert_close(classifier.preprocess(noise()), expected)


@pytest.mark.parametrize("arch", [5, None, "no_such_network", ["resnet18"], {"a": 1}], ids=str)
def test_an_architecture_entry_without_meaning_is_ignored(arch, saved):
    assert_is_resnet18(saved({"state_dict": state18(), "arch": arch, "args": 5, "model_name": []}))


@pytest.mark.parametrize("entry", ["arch", "model_name"])
def test_the_architecture_entry_of_the_checkpoint_is_used(entry, saved):
    classifier = load(saved({"state_dict": state18(), entry: "ResNet18"}))
    assert classifier.describe().startswith("resnet18 (from best.pth)")
    message = refusal(saved({"state_dict": state18(), entry: "resnet34"}))
    assert "does not fit resnet34" in message and "--arch resnet18" in message


# Hostile files: one line, within seconds


@pytest.fixture
def no_hang():
    """End the tests with a traceback where one of them hangs."""
    faulthandler.dump_traceback_later(100, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def nested(make, levels=5):
    """Containers of 60 items, each level the same object 60 times: 60 ** levels items in a file of 5 KB."""
    inside = make(["x"])
    for _ in range(levels):
        inside = make([inside] * 60)
    return inside


def as_dict(items):
    return {f"key{i}": item for i, item in enumerate(items)}


BAD_ENTRIES = {
    "input_size": ["x", 0, -224, 10**9, 10**400, (3, 224, 160), [], {"h": 1}, 1.5, True, torch.zeros(3, device="meta")],
    "mean": [
        *([1], "abc", ["a", "b", "c"], {"r": 1}, [math.nan] * 3, [10**400] * 3, 10**400, [None] * 3, [1, [2, 3]]),
        *([0.4, 0.5, 0.6, -1.0], torch.zeros(4), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64)),
    ],
    "std": [[0, 0, 0], [-1.0, 1.0, 1.0], [math.nan] * 3, 5, [1e-300] * 3, 1e-300, torch.ones(3).to_sparse()],
}


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry in BAD_ENTRIES for value in BAD_ENTRIES[entry]])
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_entries_without_meaning_are_refused_by_name(entry, value, saved):
    message = refusal(saved({"state_dict": state18(), entry: value}))
    assert entry in message and f"--{entry.replace('_', '-')}" in message


@pytest.mark.parametrize("make", [list, tuple, as_dict], ids=["lists", "tuples", "dicts"])
@pytest.mark.parametrize("entry", ["mean", "std", "input_size"])
def test_deeply_shared_containers_as_an_entry_are_refused(entry, make, saved, no_hang):
    assert entry in refusal(saved({"state_dict": state18(), entry: nested(make)}))
    assert entry in refusal(saved({"state_dict": state18(), entry: make([nested(make)] * 3)}))


@pytest.mark.parametrize("make", [list, tuple, as_dict], ids=["lists", "tuples", "dicts"])
def test_deeply_shared_containers_as_class_names_are_left_out(make, saved, no_hang, capsys):
    for classes in (nested(make), make([nested(make)] * 5), {str(i): nested(make) for i in range(5)}):
        path = saved({"state_dict": state18(), "classes": classes})
        assert load(path).class_names[0] == "class 0"
    assert capsys.readouterr().err.count("\n") >= 1


def test_dicts_that_are_nested_in_themselves_are_visited_once(saved, no_hang):
    loop = {}
    loop["again"] = loop
    for content in ({"config": nested(as_dict)}, {"config": loop}):
        assert_is_resnet18(saved({"state_dict": {**state18(), **content}, **content}))
        assert "no weights" in refusal(saved(content))


def test_a_file_of_many_tensors_is_refused(saved, no_hang):
    tensor = torch.zeros(64, 3, 7, 7)
    for content in ({f"n{i}.conv1.weight": tensor for i in range(3000)}, {"a." * 5000 + "weight": tensor}):
        assert "fits no torchvision classifier" in refusal(saved(content))


def spoiled(key, change):
    return lambda: {**state18(), key: change(state18()[key])}


def as_float4(tensor):
    return torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def as_nested_tensor(tensor):
    return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])


def as_quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


UNUSABLE = {
    "all on meta": lambda: {key: tensor.to("meta") for key, tensor in state18().items()},
    **{
        f"{name} {key}": spoiled(key, change)
        for key in ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")
        for name, change in {
            "meta": lambda tensor: tensor.to("meta"),
            "sparse": lambda tensor: tensor.to_sparse(),
            "nested": as_nested_tensor,
            "complex": lambda tensor: tensor.to(torch.complex64),
            "int8": lambda tensor: tensor.to(torch.int8),
            "quantised": as_quantised,
            "empty": lambda tensor: tensor[:0],
            "number": lambda tensor: torch.tensor(5.0),
            "vector": lambda tensor: torch.zeros(len(tensor)),
            **({"float4": as_float4} if hasattr(torch, "float4_e2m1fn_x2") else {}),
        }.items()
    },
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.filterwarnings("ignore")
def test_unusable_weights_are_refused_by_name(kind, saved):
    message = refusal(saved(UNUSABLE[kind]()), arch="resnet18")
    assert "best.pth" in message and (kind.split()[-1].removesuffix("weight") in message or kind == "all on meta")


# Files that are not checkpoints, or not of this network


class Bomb:
    """What a hostile file does when it is loaded without care: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_never_run(tmp_path, saved):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # pickle itself does run it
    hidden = {"state_dict": state18(), "extra": Bomb(tmp_path / "bang")}
    for zipped in (True, False):
        assert "state_dict()" in refusal(saved(hidden, _use_new_zipfile_serialization=zipped))
    for name in ("best.pth", "best.pkl", "best.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
        assert name in refusal(tmp_path / name)
    assert "would run code" in refusal(saved({"state_dict": state18(), "best": np.array(["x"])}))
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.filterwarnings("ignore")
def test_a_pickled_module_is_refused_with_how_to_save_its_weights(zipped, saved):
    message = refusal(saved(nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=zipped))
    assert re.search(r"best\.pth.*(Sequential|Linear).*torch\.save\(model\.state_dict\(\)", message)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused_with_how_to_save_the_weights(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "best.pt"))
    assert re.search(r"TorchScript.*torch\.save\(model\.state_dict\(\)", refusal(tmp_path / "best.pt"))


def test_a_file_that_is_not_a_whole_checkpoint_is_refused(saved, tmp_path):
    contents = [b"", b"hello, I am a text file\n", b"\x80", b"PK\x03\x04", bytes(1000), DOG.read_bytes()]
    for zipped in (True, False):
        whole = saved(state18(), _use_new_zipfile_serialization=zipped).read_bytes()
        contents += [whole[: int(len(whole) * share)] for share in (0.01, 0.5, 0.99)]
    for content in contents:
        (tmp_path / "best.pth").write_bytes(content)
        assert "best.pth" in refusal(tmp_path / "best.pth")
    assert re.search(r"missing\.pth.*no such file", refusal(tmp_path / "missing.pth"))
    assert "folder" in refusal(tmp_path)


def test_a_checkpoint_without_weights_is_refused_with_what_it_holds(saved):
    optimizer = torch.optim.Adam(resnet18().parameters())
    for content in ({}, [], None, 5, torch.zeros(3, 3), {"epoch": 3, "best": {}}, {"state_dict": [torch.ones(3, 3)]}):
        assert "no weights" in refusal(saved(content))
    message = refusal(saved({"optimizer": optimizer.state_dict(), "epoch": 3}))
    assert "no weights" in message and "optimizer, epoch" in message


def test_the_wrong_architecture_is_refused_with_what_differs_and_what_would_fit(saved):
    message = refusal(saved(state18()), arch="resnet50")
    ours, theirs = state18(), network("resnet50").state_dict()
    backbone = [key for key in theirs if not key.endswith("num_batches_tracked") and not key.startswith("fc.")]
    missing = [key for key in backbone if key not in ours]
    differ = [key for key in backbone if key in ours and theirs[key].shape != ours[key].shape]
    assert f"{len(missing)} missing ({missing[0]}" in message
    assert f"{len(differ)} of another shape ({differ[0]}: " in message
    assert "best.pth" in message and "--arch resnet18" in message


def test_tensors_that_are_missing_or_unexpected_are_counted_and_named(saved):
    more = {"layer5.weight": torch.ones(2, 2), "layer6.weight": torch.ones(2, 2)}
    assert "2 unexpected (layer5.weight; layer6.weight)" in refusal(saved(state18() | more), arch="resnet18")
    for lost in ("layer3.0.conv1.weight", "layer3.0.bn1.running_mean", "layer3.0.bn1.running_var"):
        state = {key: tensor for key, tensor in state18().items() if key != lost}
        assert f"1 missing ({lost})" in refusal(saved(state), arch="resnet18")
    assert re.search("fc.* is missing", refusal(saved({k: v for k, v in state18().items() if k[:3] != "fc."})))


@pytest.mark.parametrize("given", [2, 1000])
def test_a_wrong_number_of_classes_is_refused_with_both_numbers(given, saved):
    for arch in (None, "resnet18"):
        message = refusal(saved(state18()), arch=arch, num_classes=given)
        assert re.search(rf"--num-classes\D*{given}\b.*\b5 classes", message)


@pytest.mark.parametrize(
    ("arch", "meant"), [("resnet5", "resnet50"), ("mobilnet_v2", "mobilenet_v2"), ("vit_b", "vit_b_16")]
)
def test_an_unknown_architecture_is_refused_with_close_matches(arch, meant):
    message = refusal(arch=arch)
    assert f"'{arch}'" in message and "did you mean" in message and meant in message


def test_weights_of_another_network_are_refused_with_their_number_of_parameters(saved):
    other = nn.Sequential(nn.Conv2d(3, 1600, 5), nn.Flatten(), nn.Linear(16, 5))
    assert "(0.1 million parameters)" in refusal(saved(other.state_dict()))
    state = {key: tensor for key, tensor in state18().items() if not key.startswith("layer4.1.")}
    assert re.search(r"fits no torchvision classifier.*--arch resnet18\b", refusal(saved(state)))


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        *[(f"{name}_resnet50_fpn", "detector") for name in ("fasterrcnn", "maskrcnn", "retinanet")],
        *[("ssd300_vgg16", "detector"), ("fasterrcnn_mobilenet_v3_large_fpn", "detector")],
        *[(f"{name}_resnet50", "segmentation") for name in ("fcn", "deeplabv3")],
        *[(f"{name}_mobilenet_v3_large", "segmentation") for name in ("lraspp", "deeplabv3")],
    ],
)
def test_detectors_and_segmentation_networks_are_refused_as_such(arch, kind, saved):
    with ParametersOnMeta():
        state = get_model(arch, weights=None, weights_backbone=None, num_classes=3).state_dict()
    assert kind in refusal(saved(zeros(state)))


# All of torchvision's architectures


DEFAULT_ARCHITECTURES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5"),
    *("mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_v2_t", "vit_b_32"),
)


class CountRandomNumbers(TorchDispatchMode):
    """Count the random numbers that are really drawn."""

    drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(result, torch.Tensor) and not result.is_meta:
            self.drawn += result.numel()
        return result


@functools.cache
def noise():
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    return Photo(Path("noise.png"), pixels)


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[] if a in DEFAULT_ARCHITECTURES else pytest.mark.slow) for a in ARCHITECTURES]
)
def test_an_architecture_is_recognised_loaded_prepared_for_and_explained(arch, saved):
    transforms = get_model_weights(arch).DEFAULT.transforms()
    own_size = arch.startswith(("vit", "maxvit"))
    side = transforms.crop_size[0] if own_size else 96 if arch == "inception_v3" else 64
    model = network(arch, classes=7, **({"image_size": side} if arch.startswith("vit") else {}))
    state = model.state_dict()
    *_, last = [key for key, tensor in state.items() if key.endswith("weight") and tensor.shape[:1] == (7,)]
    state[last] = state[last].clone()
    state[last][1] = -state[last][0]  # so that of two classes one map is not empty
    model.load_state_dict(state, assign=True)
    with CountRandomNumbers() as numbers:
        classifier = load(saved({"state_dict": state}))
    assert classifier.arch == arch
    assert numbers.drawn < 5000  # of a plain torchvision network: one for each weight
    expected = transforms(Image.fromarray(noise().pixels))
    inputs = classifier.preprocess(noise())
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-6)
    if arch in HUGE:
        return
    assert_same_logits(classifier, model, side)
    inputs = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1, -1)
    explanation = Explainer(classifier.model)(inputs, targets=[0, 1])
    maps = explanation.cams["gradcam"]
    assert maps.shape == (2, side, side) and maps.min() >= 0 and 0.99 < maps.max() <= 1
    assert explanation.guided.shape == (2, 3, side, side) and np.isfinite(explanation.guided).all()
    assert explanation.guided.any()


def test_the_architectures_are_torchvisions():
    assert set(ARCHITECTURES) == set(list_models(module=torchvision.models)) and len(ARCHITECTURES) >= 80
    with CountRandomNumbers() as numbers:
        get_model("squeezenet1_1", weights=None)
    assert numbers.drawn > 1_000_000


@pytest.mark.parametrize(("arch", "side"), [("vit_b_16", 64), ("vit_b_32", 96), ("vit_b_16", 384)])
def test_a_vit_of_another_input_size_gets_inputs_of_that_size(arch, side, saved):
    model = network(arch, image_size=side)
    path = saved(model.state_dict())
    classifier = load(path)
    assert (classifier.arch, classifier.input_size) == (arch, side)
    assert classifier.preprocess(noise()).shape == (3, side, side)
    if side < 224:
        assert_same_logits(classifier, model, side)
    else:  # torchvision's own preset for 384 has no margin
        assert classifier.seen_box(100, 100) == (0, 0, 100, 100)
    assert re.search(rf"\b{side}\b.*--input-size 128", refusal(path, input_size=128))
    assert str(side) in refusal(saved({"state_dict": model.state_dict(), "input_size": 128}))
    assert load(path, input_size=side).input_size == side
    assert "does not fit vit_h_14" in refusal(path, arch="vit_h_14")


def test_sizes_that_maxvit_cannot_take_are_one_line(saved):
    path = saved(network("maxvit_t").state_dict())
    assert re.search(r"maxvit_t.*225", refusal(path, arch="maxvit_t", input_size=225))


# What the network is shown, and what is told of it


def test_at_another_size_the_margin_around_the_crop_is_in_proportion(saved):
    path = saved(network("densenet121").state_dict())  # torchvision's preset: short side to 256, crop of 224
    inputs = load(path, input_size=112).preprocess(read_photo(DOG))
    expected = get_model_weights("densenet121").DEFAULT.transforms(crop_size=112, resize_size=128)
    torch.testing.assert_close(inputs, expected(Image.open(DOG).convert("RGB")), rtol=0, atol=1e-6)


def test_squashing_shows_the_whole_photo(saved):
    classifier = load(saved(state18()), resize="squash")
    small = functional.pil_to_tensor(functional.resize(Image.fromarray(noise().pixels), [224, 224], antialias=True))
    expected = functional.normalize(small / 255, *IMAGENET)
    torch.testing.assert_close(classifier.preprocess(noise()), expected, rtol=0, atol=1e-6)
    assert classifier.seen_box(97, 131) == (0, 0, 131, 97)
    assert "unknown resize 'sqash'" in refusal(saved(state18()), resize="sqash")


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (300, 300), (97, 801)])
@pytest.mark.parametrize("side", [None, 96])
def test_the_seen_box_is_the_part_that_the_preset_crops(height, width, side, saved):
    # A ramp of the pixels' own coordinates: what the preset leaves of it tells where its corners are.
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)[None]
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    classifier = load(saved(state18()), mean=[0, 0, 0], std=[1, 1, 1], input_size=side)
    seen = classifier.preprocess(Photo(Path("ramp.png"), ramp))
    left, top, right, bottom = classifier.seen_box(height, width)
    middle = seen.shape[1] // 2
    shown = (seen[0, middle, [0, -1]] * width).tolist() + (seen[1, [0, -1], middle] * height).tolist()
    np.testing.assert_allclose(shown, [left, right, top, bottom], atol=1.5 * max(height, width) / (side or 224))


def test_a_strip_too_long_to_be_enlarged_is_refused(saved):
    strip = Photo(Path("strip.png"), np.zeros((8, 60_000, 3), np.uint8))
    with pytest.raises(PhotoError, match=r"strip\.png.*60000 x 8.*squash"):
        load(saved(state18())).preprocess(strip)
    assert load(saved(state18()), resize="squash").preprocess(strip).shape == (3, 224, 224)


def test_one_line_tells_all_that_is_assumed_and_where_it_comes_from(saved):
    bare, full = saved(state18(), "bare.pth"), saved({"state_dict": state18(), "input_size": 96, "classes": NAMES})
    line = load(bare).describe(["layer4"])
    assert re.match(r"resnet18 \(recognised\), 5 classes .*, layer4, input 224 x 224 crop \(", line)
    assert "not in bare.pth; pass --input-size" in line and "ImageNet mean and std" in line and "cpu" in line
    line = load(full, arch="resnet18", mean=[0, 0, 0], std=[1, 1, 1]).describe()
    assert line.startswith("resnet18, 5 classes, input 96 x 96 crop (from best.pth), ") and "ImageNet" not in line
    line = repr(load(full, input_size=112, resize="squash"))
    assert re.search(r"input 112 x 112 squash, ", line) and "\n" not in line and "pass --input-size" not in line


@pytest.mark.parametrize(
    ("wanted", "index"), [("cat", 2), ("CAT", 2), ("bee", 1), ("elk", 4), ("0", 0), ("4", 4), ("哈士奇", 5), ("7", 6)]
)
def test_a_class_is_found_by_name_in_any_case_or_by_index(wanted, index):
    assert find_class(wanted, [*NAMES, "哈士奇", "7"]) == index


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("husky", "did you mean.*Siberian husky"),
        ("Samoyde", "did you mean.*Samoyed"),
        ("german shepard", "did you mean.*German shepherd"),
        *((index, "0 to 18") for index in ("-1", "19", "1000", "99999999999999999999")),
        *((name, "0 to 18") for name in ("zebra", "1.5", "", "²", "٣x", "(")),
    ],
)
def test_an_unknown_class_is_refused_with_the_range_and_near_names(wanted, meant):
    with pytest.raises(CallError, match=f"'{re.escape(wanted)}'.*{meant}") as caught:
        find_class(wanted, load(CKPT).class_names)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in meant)


# Networks of one's own


TWO_HEADS = """
class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.cnn = resnet18(num_classes=8)
        self.head = nn.Linear(8, num_classes)
    def forward(self, x):
        embedding = self.cnn(x)
        return {}
"""
NORMALISING = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.{values}.view(1, -1, 1, 1))
        self.register_buffer("std", torch.ones({count}).view(1, -1, 1, 1))
        self.cnn = resnet18(num_classes=5)
    def forward(self, x):
        return self.cnn((x - self.mean[:, :3]) / self.std[:, :3])
"""


def own_state(classes=2):
    return under("cnn.", network("resnet18", classes=8).state_dict()) | {
        "head.weight": torch.randn(classes, 8),
        "head.bias": torch.zeros(classes),
    }


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_a_network_of_ones_own_gets_the_weights_and_the_number_of_classes(prefix, own_file, saved):
    state = own_state(classes=3)
    path = saved({"state_dict": under(prefix, state), "input_size": 64})
    classifier = load(path, arch=own_file(TWO_HEADS.format("self.head(embedding)"), "Net"))
    assert torch.equal(classifier.model.head.weight, state["head.weight"])
    assert (len(classifier.class_names), classifier.input_size) == (3, 64)
    embedding = logits_of(network("resnet18", classes=8))
    torch.testing.assert_close(logits_of(classifier.model), embedding @ state["head.weight"].T, rtol=1e-4, atol=1e-4)
    preset = get_model_weights("resnet50").DEFAULT.transforms()
    assert (classifier.preset.mean, classifier.preset.std) == (preset.mean, preset.std)


def test_an_embedding_beside_the_logits_is_not_explained(own_file, saved):
    path = saved(own_state())
    arch = own_file(TWO_HEADS.format("embedding, self.head(embedding)"), "Net")
    assert re.search(r"1 x 8 and 1 x 2.*--num-classes", refusal(path, arch=arch))
    assert len(load(path, arch=arch, num_classes=2).class_names) == 2
    tuple_net = torch.nn.Sequential(resnet18())
    tuple_net.register_forward_hook(lambda module, inputs, answer: (answer.repeat(1, 2), answer))
    with pytest.raises(CallError, match=r"x 10 and .*x 5"):
        Explainer(tuple_net)(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("None", "returns a NoneType"),
        ("self.cnn.layer1(x)", "RuntimeError"),
        ("self.head(embedding).softmax(1)", "softmax"),
        ("self.head(embedding).sigmoid()", "sigmoid"),
        ("x", "tensor of 1 x 3 x 64 x 64"),
        ("self.cnn(x.mean(1, keepdim=True))", "channels"),
    ],
)
def test_a_forward_that_fails_is_told_by_its_own_error(result, expected, own_file, saved):
    message = refusal(saved(own_state()), arch=own_file(TWO_HEADS.format(result), "Net"), input_size=64)
    assert expected in message
    assert ("--input-size" in message) == (expected == "RuntimeError")


@pytest.mark.parametrize(
    "text", ["def build(): return 5", "def build(): 1 / 0", "raise SystemExit(3)", "def other(): 0"]
)
def test_a_file_that_builds_no_network_is_one_line(text, own_file, saved):
    assert "net.py" in refusal(saved(own_state()), arch=own_file(text))


def test_buffers_called_mean_and_std_are_not_the_preprocessing(own_file, saved):
    mean, std = get_model_weights("resnet50").DEFAULT.transforms().mean, [0.229, 0.224, 0.225]
    for count, values in ((3, "tensor([.1, .2, .3])"), (8, "zeros(8)")):
        buffers = {"mean": torch.arange(count).view(1, -1, 1, 1) / 10, "std": torch.ones(1, count, 1, 1)}
        state = under("cnn.", state18()) | buffers
        arch = own_file(NORMALISING.format(values=values, count=count), "Net")
        for content in (state, under("module.", state), {"model": state, "epoch": 3}):
            classifier = load(saved(content), arch=arch)
            assert (classifier.preset.mean, classifier.preset.std) == (mean, std)
            assert torch.equal(classifier.model.mean, buffers["mean"])
    beside = {"model": state, "mean": [0.5, 0.5, 0.5]}
    assert load(saved(beside), arch=arch).preset.mean == [0.5, 0.5, 0.5]


# Without a checkpoint


@pytest.fixture
def fake_download(monkeypatch, tmp_path):
    """What torchvision downloads, into an empty cache, is the weights of this network; without one it is offline."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def download(url, dst, *args, **kwargs):
        if not (tmp_path / "download").exists():
            raise urllib.error.URLError("no\nroute to host")
        shutil.copy(tmp_path / "download", dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return lambda model: torch.save(model.state_dict(), tmp_path / "download")


def test_weights_that_cannot_be_downloaded_are_one_line(fake_download, capfd):
    message = refusal(arch="resnet18")
    assert "resnet18" in message and "--ckpt" in message and "download" in message
    out, err = capfd.readouterr()
    assert out == "" and all(line.startswith("warning: ") for line in err.splitlines())


@pytest.mark.parametrize("arch", [None, "resnet18", "squeezenet1_1", "mnasnet0_5", "googlenet", "inception_v3"])
def test_without_a_checkpoint_torchvisions_weights_and_names_are_used(arch, fake_download):
    options = {"aux_logits": True} if arch in WITH_AUXILIARY_HEADS else {}
    model = network(arch or "resnet50", classes=1000, **options)
    fake_download(model)
    classifier = load_classifier(arch, device="cpu")
    assert classifier.arch == (arch or "resnet50")
    assert list(classifier.class_names) == get_model_weights(classifier.arch).DEFAULT.meta["categories"]
    assert "pass --" not in classifier.describe()
    assert_same_logits(classifier, model, side=96)
    assert re.search(r"--num-classes\D*2\b.*\b1000 classes", refusal(arch=arch, num_classes=2))


def test_1000_classes_without_names_are_imagenets(saved):
    classifier = load(saved(network("squeezenet1_1", classes=1000).state_dict()))
    assert list(classifier.class_names) == get_model_weights("squeezenet1_1").DEFAULT.meta["categories"]


# The device, and memory


@pytest.mark.parametrize(
    ("built", "torch_says", "expected"),
    [
        (False, "", r"built without CUDA.*pytorch\.org"),
        (True, "Found no NVIDIA driver on your system. Please check\nmore", r"no CUDA GPU found"),
        (True, "The NVIDIA driver on your system is too old (found version 11040)\nmore", "too old"),
        (True, "No CUDA GPUs are available", "No CUDA GPUs are available"),
    ],
)
def test_it_is_told_why_a_gpu_is_not_used(monkeypatch, saved, built, torch_says, expected):
    def init():
        raise RuntimeError(torch_says)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    device, why = find_device(None)
    assert device.type == "cpu" and re.search(expected, why) and "\n" not in why
    assert f"cpu ({why})" in load_classifier(ckpt=saved(state18())).describe()
    with pytest.raises(CallError, match=f"cuda:1.*{expected}"):
        find_device("cuda:1")
    assert find_device("cpu") == (torch.device("cpu"), "")


@pytest.mark.parametrize("name", [None, "cuda", "cuda:0"])
@pytest.mark.parametrize("fault", ["CUDA error: out of memory", "CUDA error: no kernel image is available"])
def test_a_gpu_that_cannot_be_used_is_not_called_missing(monkeypatch, name, fault):
    def fails(*_, **__):
        raise RuntimeError(f"{fault}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(CallError, match=f"^device {name or 'cuda'} cannot be used: {fault}; .*--device cpu") as caught:
        find_device(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(CallError, match=r"cuda:1 does not exist.*: cpu, cuda:0"):
        find_device("cuda:1")


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", "toaster", "cuda:x"])
def test_a_device_that_does_not_exist_is_refused_first(device, tmp_path):
    message = refusal(tmp_path / "missing.pth", device=device)
    assert device in message and "cpu" in message


@pytest.mark.parametrize(
    ("message", "halved"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
        ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("GET was unable to find an engine to execute this computation", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_only_missing_memory_makes_batches_smaller(message, halved):
    def square(items):
        if len(items) > 2:
            raise RuntimeError(message)
        return [item**2 for item in items]

    batches = BatchSize(8)
    if halved:
        assert sum(batches.run(square, list(range(10))), []) == [i**2 for i in range(10)]
        assert batches.size == 2
    else:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            list(batches.run(square, list(range(10))))
