"""Room 3, Model: names and files become a classifier that answers as the plain torchvision network does."""

import argparse
import copy
import functools
import json
import math
import os
import pickle
import re
import shutil
import urllib.error
import warnings
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

import cnn_visualizations as program_file
from cnn_visualizations import (
    HEAD_ROOTS,
    CallError,
    Checkpoint,
    Classifier,
    Explainer,
    Photo,
    PhotoError,
    build_model,
    find_architecture,
    find_class,
    find_device,
    load_classifier,
    read_class_names,
    read_photo,
    unwrapped,
)

ARCHITECTURES = list_models(module=torchvision.models)
HUGE = ("regnet_y_128gf", "vit_h_14")  # more than 600 million parameters: 8 GB for an explanation
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
SIDES = {"maxvit_t": 224, "inception_v3": 96}
NAMES = ["ant", "Bee", "cat", "dog", "Elk"]


class WithoutMemory(TorchFunctionMode):
    """Networks built in this mode have parameters on the meta device; their buffers are real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def hollow(arch, classes=5, change=None, **options):
    """A plain torchvision network without memory for its parameters, changed as people change it for fine-tuning."""
    if arch in WITH_AUXILIARY_HEADS:
        options = {"aux_logits": False, "init_weights": False, "transform_input": True, **options}
    with WithoutMemory():
        model = get_model(arch, weights=None, num_classes=classes, **options)
        if change is not None:
            model = change(model) or model
    return model.eval()


def some_weights(key, tensor, generator):
    """Random weights that keep a deep network alive; matrices overlap in memory, so that a file of them is small."""
    if not tensor.is_floating_point() or key.endswith("relative_coords_table"):
        return tensor
    if key.endswith("running_var"):
        return torch.rand(tensor.shape, generator=generator) + 0.5
    if tensor.ndim < 2 or key.endswith("layer_scale"):
        around = 1.0 if key.endswith(("weight", "layer_scale")) else 0.0
        return around + 0.1 * torch.randn(tensor.shape, generator=generator)
    strides = (5, 3, 2, 1)[-tensor.ndim :]
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    spread = 1 / math.sqrt(tensor[0].numel())
    return spread * torch.randn(length, generator=generator).as_strided(tensor.shape, strides)


def network(arch, classes=5, change=None, **options):
    """The same with weights: what a person trained, and what the program's answer is held against."""
    model = hollow(arch, classes, change, **options)
    state, generator = model.state_dict(), torch.Generator().manual_seed(0)
    for key, tensor in state.items():
        state[key] = some_weights(key, tensor, generator)
    model.load_state_dict(state, assign=True)
    return model


@functools.cache
def resnet18():
    return network("resnet18")


@functools.cache
def hollow_state(arch):
    return hollow(arch, classes=7).state_dict()


@pytest.fixture
def saved(tmp_path):
    """Writes a checkpoint and gives its path."""

    def save(content, name="best.pth", **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save


def answers(model, side=64):
    inputs = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(inputs)


def assert_same_answer(classifier, model, side=64):
    expected = answers(model, side)
    assert expected.std() > 1e-3  # a dead network would agree with anything
    scale = expected.abs().max().item()
    torch.testing.assert_close(answers(classifier.model, side), expected, rtol=1e-4, atol=1e-4 * scale)


def load(path, **kwargs):
    return load_classifier(ckpt=path, device="cpu", **kwargs)


def refusal(path=None, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(CallError) as caught:
        load_classifier(ckpt=path, **{"device": "cpu", **kwargs})
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# What a checkpoint looks like: nesting, prefixes, precision, company


NESTINGS = {
    "bare": lambda state: state,
    **{
        entry: lambda state, entry=entry: {"epoch": 3, entry: state, "best_acc": 0.9}
        for entry in ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "ema", "module")
    },
    "model_ema": lambda state: {
        "model_ema": {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in state.items()}}
    },
    "an unusual name": lambda state: {"epoch": 3, "my_best_network": state},
    "two deep": lambda state: {"checkpoint": {"model": state}, "epoch": 3},
}


@pytest.mark.parametrize("nesting", NESTINGS.values(), ids=NESTINGS)
def test_weights_are_found_wherever_they_lie_in_the_file(nesting, saved):
    classifier = load(saved(nesting(resnet18().state_dict())))
    assert classifier.arch == "resnet18"
    assert_same_answer(classifier, resnet18())


def test_the_optimizers_tensors_are_not_taken_for_the_weights(saved):
    model = network("squeezenet1_1")
    moments = {i: {"exp_avg": torch.zeros(9, 9), "step": torch.tensor(1.0)} for i in range(200)}
    optimizer = {f"state{i}": tensors for i, tensors in moments.items()}
    path = saved(
        {"optimizer": {"state": moments, **optimizer}, "optim_d": {"w": torch.ones(3, 3)}, "x": model.state_dict()}
    )
    assert_same_answer(load(path), model)


PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "backbone.",
    "net.",
    "network.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.backbone.",
    "module.model.",
    "_orig_mod.module.model.",
    "base.",
    "encoder.",
    "features.",
    "my_resnet.cnn.",
    "0.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(prefix, saved):
    state = {f"{prefix}{key}": tensor for key, tensor in resnet18().state_dict().items()}
    classifier = load(saved({"state_dict": state}))
    assert classifier.arch == "resnet18"
    assert_same_answer(classifier, resnet18())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_most_of_torchvisions_own_keys_begin_with_is_not_taken_for_a_wrapper(arch):
    state = dict(hollow_state(arch))
    trunk = {key: tensor for key, tensor in state.items() if not key.startswith(HEAD_ROOTS)}
    for keys in (state, trunk):
        assert list(unwrapped(keys)) == [(keys, frozenset())]
        *_, (found, _) = unwrapped({f"encoder.{key}": tensor for key, tensor in keys.items()})
        assert found.keys() == keys.keys()


def test_a_prefix_stays_where_two_keys_would_be_the_same_without_it():
    state = {f"0.{key}": tensor for key, tensor in resnet18().state_dict().items()} | {"fc.bias": torch.zeros(5)}
    assert list(unwrapped(state)) == [(state, frozenset())]


def test_prefixes_that_torch_itself_writes_are_taken_off(saved):
    model = nn.DataParallel(copy.deepcopy(resnet18()))
    assert_same_answer(load(saved(model.state_dict())), resnet18())
    averaged = torch.optim.swa_utils.AveragedModel(resnet18())
    assert_same_answer(load(saved({"model_ema": averaged.state_dict()}), arch="resnet18"), resnet18())


@pytest.mark.parametrize("head", ["classifier", "head", "linear"])
def test_a_head_on_top_of_a_whole_network_is_not_thrown_away(head, saved):
    state = {f"model.{key}": tensor for key, tensor in resnet18().state_dict().items()}
    state |= {f"{head}.weight": torch.ones(3, 5), f"{head}.bias": torch.ones(3)}
    assert re.search(rf"{head}\.weight lies on top of resnet18's 5 outputs.*net\.py:build", refusal(saved(state)))


def test_such_a_network_can_be_given_as_ones_own(saved, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom torchvision.models import resnet18\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model, self.head = resnet18(num_classes=5), nn.Linear(5, 3)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.model(x))\n"
    )
    state = {f"model.{key}": tensor for key, tensor in resnet18().state_dict().items()}
    state |= {"head.weight": torch.ones(3, 5), "head.bias": torch.ones(3)}
    for prefix in ("", "module.", "_orig_mod.module."):
        wrapped = {f"{prefix}{key}": tensor for key, tensor in state.items()}
        classifier = load_classifier(f"{tmp_path / 'net.py'}:Net", saved(wrapped), device="cpu")
        assert torch.equal(classifier.model.head.weight, state["head.weight"])
        torch.testing.assert_close(classifier.model.model.conv1.weight, state["model.conv1.weight"])


def behind(prefix, state):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize("outer", ["", "module.", "_orig_mod.module."])
def test_a_loss_beside_the_network_is_left_out_with_a_note(outer, saved, capsys):
    state = behind("model.", resnet18().state_dict()) | {"criterion.weight": torch.ones(5)}
    classifier = load(saved({"state_dict": behind(outer, state)}))
    assert_same_answer(classifier, resnet18())
    assert "left out as no part of resnet18: criterion.weight\n" in capsys.readouterr().err


@pytest.mark.parametrize("outer", ["", "model.", "module.model."])
@pytest.mark.parametrize("name", ["fc", "head", "linear"])
def test_a_head_beside_the_trunk_is_found_at_every_depth(outer, name, saved):
    state = {key: tensor for key, tensor in resnet18().state_dict().items() if not key.startswith("fc.")}
    head = {f"{name}.weight": resnet18().fc.weight, f"{name}.bias": resnet18().fc.bias}
    assert_same_answer(load(saved(behind(outer, behind("backbone.", state) | head))), resnet18())


def test_a_second_network_in_the_file_is_not_passed_over(saved):
    teacher = behind("teacher.", network("resnet34").state_dict())
    message = refusal(saved(behind("student.", resnet18().state_dict()) | teacher))
    assert "student.conv1.weight" in message and "unexpected" in message


def test_a_layer_that_normalises_the_inputs_becomes_the_preprocessing(saved):
    layer = {"0.mean": torch.full((1, 3, 1, 1), 0.1), "0.std": torch.full((1, 3, 1, 1), 0.9)}
    classifier = load(saved(layer | behind("1.", resnet18().state_dict())))
    assert_same_answer(classifier, resnet18())
    assert classifier.preset.mean == pytest.approx([0.1] * 3)
    assert classifier.preset.std == pytest.approx([0.9] * 3)


def test_a_mean_that_a_loss_keeps_of_its_features_is_no_preprocessing(saved):
    state = behind("model.", resnet18().state_dict()) | {"criterion.mean": torch.zeros(512)}
    classifier = load(saved(state))
    assert_same_answer(classifier, resnet18())
    assert classifier.preset.mean == pytest.approx([0.485, 0.456, 0.406])


def test_a_key_of_very_many_dots_takes_no_more_memory_than_others(saved):
    state = {"a." * 5000 + "weight": torch.ones(3, 3)}
    assert len(list(unwrapped(state))) <= 8
    assert "fits no torchvision architecture" in refusal(saved(state))


def test_strings_of_numpy_are_refused_since_their_size_can_be_changed_by_the_file(saved):
    assert "would run code" in refusal(saved({"state_dict": resnet18().state_dict(), "best": np.array(["x"])}))


def test_quantised_weights_are_one_line(saved):
    state = {**resnet18().state_dict(), "conv1.weight": torch.ones(64, 3, 7, 7, dtype=torch.int8)}
    assert "conv1.weight is quantised" in refusal(saved(state), arch="resnet18")


@pytest.mark.parametrize("entry", ["mean", "std"])
def test_means_in_the_shape_of_a_photo_are_taken(entry, saved):
    values = torch.tensor([0.4, 0.5, 0.6])
    preset = load(saved({"state_dict": resnet18().state_dict(), entry: values.view(3, 1, 1)}), arch="resnet18").preset
    assert getattr(preset, entry) == pytest.approx(values.tolist())


def test_a_resize_that_is_none_is_refused(saved):
    assert "unknown resize 'sqash'" in refusal(saved(resnet18().state_dict()), resize="sqash")


@pytest.mark.parametrize("extra", ["criterion.weight", "loss_fn.pos_weight", "train_acc.total"])
def test_a_lightning_checkpoint_with_the_losss_weights_is_read(extra, saved):
    state = {f"model.{key}": tensor for key, tensor in resnet18().state_dict().items()}
    lightning = {
        "epoch": 3,
        "global_step": 900,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**state, extra: torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"best_score": torch.tensor(0.2)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(64, 3, 7, 7)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"num_classes": 5, "lr": 0.1},
    }
    arch = None if extra == "criterion.weight" else "resnet18"
    classifier = load(saved(lightning, "epoch=3.ckpt"), arch=arch)
    assert classifier.arch == "resnet18"
    assert_same_answer(classifier, resnet18())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_computed_in_float32(dtype, saved):
    model = copy.deepcopy(resnet18()).to(dtype)
    classifier = load(saved(model.state_dict()))
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert_same_answer(classifier, model.float())


def test_a_checkpoint_of_torchvisions_training_script_is_read(saved):
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    args = argparse.Namespace(
        model="resnet18", data_path="/data", lr=0.1, opt="sgd", device="cuda", amp=False, test=None
    )
    reference = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 89,
        "args": args,
    }
    classifier = load(saved(reference))
    assert classifier.arch == "resnet18"
    assert_same_answer(classifier, model)


PLAIN_VALUES = (
    np.float64(0.9),
    np.float32(0.9),
    np.float16(0.9),
    np.int64(3),
    np.int32(3),
    np.uint8(3),
    np.bool_(True),
    datetime.now(timezone.utc) - datetime(2026, 1, 1, tzinfo=timezone.utc),
    Path("runs") / "best.pth",
    datetime(2026, 11, 23, 12, 30),
)


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_plain_values_that_are_no_built_in_ones_may_stand_in_the_file(value, zipped, saved):
    content = {
        "state_dict": network("squeezenet1_1").state_dict(),
        "best": value,
        "history": {"accuracy": [value, value]},
    }
    assert load(saved(content, _use_new_zipfile_serialization=zipped)).arch == "squeezenet1_1"


def test_a_numpy_array_in_the_file_is_no_hindrance(saved):
    mean = np.array([0.5, 0.4, 0.3])
    classifier = load(saved({"state_dict": network("squeezenet1_1").state_dict(), "mean": mean}))
    assert list(classifier.preset.mean) == mean.tolist()


def test_loading_leaves_torchs_list_of_safe_types_alone(saved):
    before = set(torch.serialization.get_safe_globals())
    load(saved(network("squeezenet1_1").state_dict()))
    assert set(torch.serialization.get_safe_globals()) == before


def test_old_densenet_key_names_are_understood(saved):
    model = network("densenet121")
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    state = {old.sub(r"\1.\2", key): tensor for key, tensor in model.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    classifier = load(saved(state))
    assert classifier.arch == "densenet121"
    assert_same_answer(classifier, model)


@pytest.mark.parametrize("auxiliary", [True, False], ids=["with auxiliary heads", "without"])
@pytest.mark.parametrize("arch", WITH_AUXILIARY_HEADS)
def test_auxiliary_heads_may_be_there_or_not(arch, auxiliary, saved):
    model = network(arch, aux_logits=auxiliary)
    assert auxiliary == any("aux" in key.lower() for key in model.state_dict())
    path = saved(model.state_dict())
    assert load(path).arch == arch
    assert_same_answer(load(path), model, side=96)
    assert_same_answer(load(path, arch=arch, num_classes=5), model, side=96)


def test_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {key: tensor.contiguous() for key, tensor in resnet18().state_dict().items()}
    safetensors.save_file(state, tmp_path / "best.safetensors")
    classifier = load(tmp_path / "best.safetensors")
    assert classifier.arch == "resnet18"
    assert_same_answer(classifier, resnet18())


def test_a_broken_safetensors_file_is_refused(tmp_path):
    pytest.importorskip("safetensors.torch")
    (tmp_path / "best.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    assert "best.safetensors" in refusal(tmp_path / "best.safetensors")


def test_the_demo_is_read_as_torchvision_reads_it():
    content = torch.load(CKPT, weights_only=True)
    model = get_model("mobilenet_v2", weights=None, num_classes=19)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in content["state_dict"].items()})
    classifier = load(CKPT)
    assert (classifier.arch, list(classifier.class_names)) == ("mobilenet_v2", content["classes"])
    transforms = get_model_weights("mobilenet_v2").DEFAULT.transforms
    inputs = transforms(crop_size=225, resize_size=233)(Image.open(DOG).convert("RGB"))
    torch.testing.assert_close(classifier.preprocess(read_photo(DOG)), inputs, rtol=0, atol=1e-6)
    assert_same_answer(classifier, model)
    with torch.inference_mode():
        assert classifier.class_names[model.eval()(inputs[None]).argmax()] == "Siberian husky"


def test_loading_says_nothing_and_gives_a_network_ready_to_be_asked(saved, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = load(saved(resnet18().state_dict()))
    assert not any(module.training for module in classifier.model.modules())
    assert {p.device.type for p in classifier.model.parameters()} == {"cpu"}
    assert classifier.class_names == tuple(f"class {i}" for i in range(5))
    assert capfd.readouterr() == ("", "")


# Heads, as people replace them when they fine-tune


def replaced(name, make):
    """A change of a network: the layer of that name becomes what `make` gives for the number of its inputs."""

    def change(model):
        old = model.get_submodule(name)
        linear = old if isinstance(old, nn.Linear) else next(m for m in old.modules() if isinstance(m, nn.Linear))
        model.set_submodule(name, make(linear.in_features))

    return change


def linear(inputs):
    return nn.Linear(inputs, 5)


def linear_without_bias(inputs):
    return nn.Linear(inputs, 5, bias=False)


def dropout_linear(inputs):
    return nn.Sequential(nn.Dropout(), nn.Linear(inputs, 5))


def only_linear(inputs):
    return nn.Sequential(nn.Linear(inputs, 5))


def linear_softmax_free(inputs):
    return nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.1), nn.Linear(inputs, 5))


def squeezenet_convolution(model):
    model.classifier[1] = nn.Conv2d(512, 5, kernel_size=1)


HEADS = [
    ("resnet18", "fc", dropout_linear),
    ("resnet18", "fc", only_linear),
    ("resnet18", "fc", linear_softmax_free),
    ("resnet18", "fc", linear_without_bias),
    ("mobilenet_v2", "classifier", linear),
    ("mobilenet_v2", "classifier", dropout_linear),
    ("mobilenet_v2", "classifier.1", linear),
    ("mobilenet_v2", "classifier.1", dropout_linear),
    ("mobilenet_v3_small", "classifier", linear),
    ("mobilenet_v3_small", "classifier.3", linear),
    ("mobilenet_v3_small", "classifier.3", dropout_linear),
    ("efficientnet_b0", "classifier", linear),
    ("efficientnet_b0", "classifier.1", dropout_linear),
    ("mnasnet0_5", "classifier", linear),
    ("vgg11", "classifier", linear),
    ("vgg11", "classifier", dropout_linear),
    ("vgg11", "classifier.6", linear),
    ("vgg11", "classifier.6", dropout_linear),
    ("alexnet", "classifier", linear),
    ("alexnet", "classifier.6", linear),
    ("densenet121", "classifier", dropout_linear),
    ("googlenet", "fc", dropout_linear),
    ("inception_v3", "fc", dropout_linear),
    ("shufflenet_v2_x0_5", "fc", dropout_linear),
    ("regnet_y_400mf", "fc", dropout_linear),
    ("convnext_tiny", "classifier.2", linear),
    ("convnext_tiny", "classifier.2", dropout_linear),
    ("swin_t", "head", dropout_linear),
    ("vit_b_32", "heads", linear),
    ("vit_b_32", "heads", dropout_linear),
    ("vit_b_32", "heads.head", dropout_linear),
    ("maxvit_t", "classifier.5", linear),
    ("maxvit_t", "classifier.5", dropout_linear),
]


@pytest.mark.parametrize(("arch", "name", "make"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_a_replaced_head_with_one_linear_layer_is_used(arch, name, make, saved):
    model = network(arch, classes=1000, change=replaced(name, make))
    side = {"maxvit_t": 224, "vit_b_32": 224, "inception_v3": 96}.get(arch, 64)
    classifier = load(saved(model.state_dict()), arch=arch)
    assert len(classifier.class_names) == 5
    assert_same_answer(classifier, model, side)


@pytest.mark.parametrize(
    ("arch", "name", "make"),
    [
        ("resnet18", "fc", dropout_linear),
        ("mobilenet_v2", "classifier", linear),
        ("vgg11", "classifier", linear),
        ("maxvit_t", "classifier.5", linear),
        ("vit_b_32", "heads", dropout_linear),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_architecture_under_a_replaced_head_is_found(arch, name, make):
    state = hollow(arch, classes=1000, change=replaced(name, make)).state_dict()
    assert find_architecture(Checkpoint("best.pth", dict(state))) == arch


def test_a_replaced_convolution_in_squeezenet_is_used(saved):
    model = network("squeezenet1_0", classes=1000, change=squeezenet_convolution)
    classifier = load(saved(model.state_dict()))
    assert (classifier.arch, len(classifier.class_names)) == ("squeezenet1_0", 5)
    assert_same_answer(classifier, model)


class Wrapped(nn.Module):
    """A torchvision network without its head, and a head of its own beside it."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs):
        return self.head(self.backbone(inputs))


@pytest.mark.parametrize("head", [linear, dropout_linear], ids=["head", "head.1"])
@pytest.mark.parametrize("arch", ["resnet18", "regnet_y_400mf"])
def test_a_head_beside_the_backbone_is_used(arch, head, saved):
    def wrap(model):
        inputs, model.fc = model.fc.in_features, nn.Identity()
        return Wrapped(model, head(inputs))

    model = network(arch, change=wrap)
    path = saved({"state_dict": model.state_dict()})
    assert load(path).arch == arch
    assert_same_answer(load(path, arch=arch), model)


def test_a_head_of_two_layers_is_refused_with_what_does_not_fit(saved):
    change = replaced("fc", lambda inputs: nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 5)))
    message = refusal(saved(network("resnet18", change=change).state_dict()), arch="resnet18")
    assert "fc.0.weight" in message and "fc.2.weight" in message and "unexpected" in message


# What stands beside the weights


@pytest.mark.parametrize(
    "entries",
    [
        {"classes": NAMES},
        {"classes": tuple(NAMES)},
        {"class_names": NAMES},
        {"class_to_idx": dict(zip(reversed(NAMES), range(4, -1, -1), strict=True))},
        {"idx_to_class": dict(enumerate(NAMES))},
        {"idx_to_class": {str(i): name for i, name in enumerate(NAMES)}},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_class_names_in_the_checkpoint_are_used_and_given_ones_win(entries, saved):
    path = saved({"state_dict": resnet18().state_dict(), **entries})
    assert list(load(path).class_names) == NAMES
    assert load(path, class_names=list("vwxyz")).class_names == tuple("vwxyz")


@pytest.mark.parametrize(
    "classes", [5, "abcde", ["a", "b"], {"a": 0, "b": 7}, {"a": None}, [], {}, {"x": [1]}], ids=str
)
def test_class_names_that_cannot_be_right_are_left_out_with_a_note(classes, saved, capsys):
    classifier = load(saved({"state_dict": resnet18().state_dict(), "classes": classes}))
    assert classifier.class_names == tuple(f"class {i}" for i in range(5))
    assert re.fullmatch(r"note: .*classes.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("given", [None, 1, 2])
def test_a_single_output_speaks_for_the_second_of_two_classes(given, saved):
    model = network("resnet18", change=replaced("fc", lambda inputs: nn.Linear(inputs, 1)))
    path = saved({"state_dict": model.state_dict(), "classes": ["cat", "dog"]})
    classifier = load(path, num_classes=given)
    assert classifier.class_names == ("cat", "dog")
    assert load(path, class_names=["no", "yes"]).class_names == ("no", "yes")
    inputs = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        logits, sure = classifier.model(inputs), model(inputs).sigmoid()
    torch.testing.assert_close(logits.softmax(1), torch.cat([1 - sure, sure], 1))
    explanation = Explainer(classifier.model)(inputs, [0, 1, 0])
    right = Explainer(model)(inputs)
    np.testing.assert_allclose(explanation.cams["gradcam"][1], right.cams["gradcam"][1], atol=1e-5)
    np.testing.assert_allclose(explanation.guided[1], right.guided[1] / 2, atol=1e-6)
    assert np.abs(explanation.cams["gradcam"][0] - right.cams["gradcam"][0]).max() > 0.1


def test_too_few_given_class_names_are_an_error_with_both_numbers(saved):
    message = refusal(saved(resnet18().state_dict()), class_names=["a", "b"])
    assert "2" in message and "5" in message


@pytest.mark.parametrize("size", [96, [96, 96], (3, 96, 96), (96, 96), [96]], ids=str)
def test_the_checkpoints_input_size_is_used_and_a_given_one_wins(size, saved):
    path = saved({"state_dict": resnet18().state_dict(), "input_size": size})
    photo = read_photo(DOG)
    assert load(path).preprocess(photo).shape == (3, 96, 96)
    assert load(path, input_size=64).preprocess(photo).shape == (3, 64, 64)


def test_at_another_size_the_margin_around_the_crop_is_in_proportion(saved):
    path = saved(network("densenet121").state_dict())  # torchvision's preset: short side to 256, crop of 224
    inputs = load(path, input_size=112).preprocess(read_photo(DOG))
    expected = get_model_weights("densenet121").DEFAULT.transforms(crop_size=112, resize_size=128)
    torch.testing.assert_close(inputs, expected(Image.open(DOG).convert("RGB")), rtol=0, atol=1e-6)


def test_the_checkpoints_mean_and_std_are_used(saved):
    mean, std = [0.1, 0.2, 0.3], (0.5, 0.6, 0.7)
    path = saved({"state_dict": resnet18().state_dict(), "mean": mean, "std": std})
    expected = get_model_weights("resnet18").DEFAULT.transforms(crop_size=224, mean=mean, std=std)
    torch.testing.assert_close(
        load(path).preprocess(read_photo(DOG)), expected(Image.open(DOG).convert("RGB")), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("mean", "std"),
    [([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]), ([104, 117, 123], [1, 1, 1]), ([0, 0, 0], [255] * 3)],
)
def test_mean_and_std_of_colours_up_to_255_are_understood(saved, mean, std):
    path = saved({"state_dict": resnet18().state_dict(), "mean": mean, "std": std})
    photo = get_model_weights("resnet18").DEFAULT.transforms(mean=[0, 0, 0], std=[1, 1, 1])
    expected = (photo(Image.open(DOG).convert("RGB")) * 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    torch.testing.assert_close(load(path).preprocess(read_photo(DOG)), expected)


HOSTILE = [
    {"input_size": "x"},
    {"input_size": 0},
    {"input_size": -224},
    {"input_size": 10**9},
    {"input_size": (3, 224, 160)},
    {"input_size": []},
    {"input_size": {"h": 1}},
    {"input_size": 1.5},
    {"mean": [1]},
    {"mean": "abc"},
    {"mean": ["a", "b", "c"]},
    {"mean": {"r": 1}},
    {"mean": [float("nan")] * 3},
    {"mean": torch.zeros(4)},
    {"std": [0, 0, 0]},
    {"std": [-1.0, 1.0, 1.0]},
    {"std": [float("nan")] * 3},
    {"std": 5},
]


@pytest.mark.parametrize("entries", HOSTILE, ids=str)
def test_entries_that_make_no_sense_are_refused_by_name(entries, saved):
    assert next(iter(entries)) in refusal(saved({"state_dict": resnet18().state_dict(), **entries}))


@pytest.mark.parametrize("arch", [5, None, "no_such_network", ["resnet18"], {"a": 1}], ids=str)
def test_an_architecture_entry_that_means_nothing_is_no_hindrance(arch, saved):
    assert (
        load(saved({"state_dict": resnet18().state_dict(), "arch": arch, "args": 5, "model_name": []})).arch
        == "resnet18"
    )


@pytest.mark.parametrize("entry", ["arch", "model_name"])
def test_the_checkpoints_own_architecture_entry_is_believed(entry, saved):
    model = network("resnet18", change=replaced("fc", linear_without_bias))
    assert load(saved({"state_dict": model.state_dict(), entry: "ResNet18"})).arch == "resnet18"
    message = refusal(saved({"state_dict": model.state_dict(), entry: "resnet34"}))
    assert "does not fit resnet34" in message and "--arch resnet18" in message


# The files with class names


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "ant\nBee\ncat\ndog\nElk\n",
        "ant\r\nBee\r\ncat\r\ndog\r\nElk",
        "\ufeffant\n\n Bee \ncat\ndog\nElk\n\n",
        json.dumps(NAMES),
        "\n" + json.dumps(NAMES, indent=2),
        json.dumps({str(i): name for i, name in enumerate(NAMES)}),
        json.dumps({name: i for i, name in reversed(list(enumerate(NAMES)))}),
        json.dumps({str(i): [f"n{i:08}", name] for i, name in enumerate(NAMES)}),
    ],
    ids=["lines", "CRLF", "byte order mark", "list", "indented list", "index to name", "name to index", "ImageNet's"],
)
def test_class_names_are_read_from_lines_and_json(text, tmp_path):
    assert list(read_class_names(written(tmp_path, text))) == NAMES


def test_indices_above_nine_are_ordered_as_numbers(tmp_path):
    names = [f"class {chr(97 + i)}" for i in range(12)]
    text = json.dumps({str(i): name for i, name in sorted(enumerate(names), key=lambda pair: str(pair[0]))})
    assert list(read_class_names(written(tmp_path, text))) == names


def test_chinese_class_names_are_read(tmp_path):
    assert list(read_class_names(written(tmp_path, "哈士奇\n德国牧羊犬\n"))) == ["哈士奇", "德国牧羊犬"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("哈士奇\n狗\n", "gbk"),
        ("ant\nBee\n", "utf-16"),
        ('["ant", "Bee"', "utf-8"),
        ('{"0": "ant", "2": "Bee"}', "utf-8"),
        ('{"ant": "Bee"}', "utf-8"),
        ('{"0": 1, "x": "Bee"}', "utf-8"),
        ('{"ant": null}', "utf-8"),
    ],
)
def test_a_file_that_is_no_list_of_names_is_refused(text, encoding, tmp_path):
    with pytest.raises(CallError) as caught:
        read_class_names(written(tmp_path, text, encoding))
    assert "names.txt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "index"), [("cat", 2), ("CAT", 2), ("bee", 1), ("elk", 4), ("0", 0), ("4", 4), ("哈士奇", 5), ("7", 6)]
)
def test_a_class_is_found_by_name_in_any_case_or_by_index(wanted, index):
    assert find_class(wanted, [*NAMES, "哈士奇", "7"]) == index


@pytest.mark.parametrize("wanted", ["-1", "5", "1000", "99999999999999999999"])
def test_an_index_out_of_range_is_refused_with_the_range(wanted):
    with pytest.raises(CallError, match=f"{wanted}.*5 classes.*0 to 4"):
        find_class(wanted, NAMES)


@pytest.mark.parametrize(
    ("wanted", "meant"), [("husky", "Siberian husky"), ("Samoyde", "Samoyed"), ("german shepard", "German shepherd")]
)
def test_a_misspelt_class_is_refused_with_what_was_probably_meant(wanted, meant):
    with pytest.raises(CallError, match=f"{wanted}.*did you mean.*{meant}"):
        find_class(wanted, load(CKPT).class_names)


@pytest.mark.parametrize("wanted", ["zebra", "1.5", "", "²", "٣x", "("])
def test_a_class_like_no_other_is_refused_without_a_guess(wanted):
    with pytest.raises(CallError) as caught:
        find_class(wanted, NAMES)
    assert "did you mean" not in str(caught.value)


# All of torchvision's architectures


def test_there_are_the_architectures_that_the_program_was_written_for():
    assert len(ARCHITECTURES) >= 80


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_architecture_is_found_from_the_weights_alone(arch):
    assert find_architecture(Checkpoint("best.pth", dict(hollow_state(arch)))) == arch


@functools.cache
def noise():
    pixels = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    return Photo(Path("noise.png"), pixels)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_photo_is_prepared_as_by_torchvisions_default_preset(arch):
    default = get_model_weights(arch).DEFAULT
    side = default.transforms().crop_size[0]
    options = {"image_size": side} if arch.startswith("vit") else {}
    state = hollow(arch, classes=7, **options).state_dict()
    model, preset = build_model(arch, Checkpoint("best.pth", dict(state)))
    photo = noise()
    inputs = Classifier(model, arch, ("x",) * 7, preset, torch.device("cpu")).preprocess(photo)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs, default.transforms()(Image.fromarray(photo.pixels)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("arch", HUGE)
def test_the_largest_networks_are_built_with_the_checkpoints_classes(arch):
    model, _ = build_model(arch, Checkpoint("best.pth", dict(hollow_state(arch))))
    assert {key: t.shape for key, t in model.state_dict().items()} == {
        k: t.shape for k, t in hollow_state(arch).items()
    }


def opposite_classes(state):
    """Makes the last layer say of class 1 the opposite of what it says of class 0; so a map of one is not empty."""
    *_, last = [key for key, tensor in state.items() if key.endswith("weight") and tensor.shape[:1] == (7,)]
    state[last] = state[last].clone()
    state[last][1] = -state[last][0]


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in HUGE])
def test_every_architecture_is_loaded_and_explained(arch, saved):
    options = {"image_size": 64} if arch.startswith("vit") else {}
    model = network(arch, classes=7, **options)
    state = model.state_dict()
    opposite_classes(state)
    model.load_state_dict(state, assign=True)
    # Without its own position embedding a ViT has another number of parameters, which takes seconds to find.
    classifier = load(saved({"state_dict": state}), arch=arch if options else None)
    assert classifier.arch == arch
    side = SIDES.get(arch, 64)
    inputs = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1, -1)
    with torch.inference_mode():
        expected = model(inputs[:1]).expand(2, -1)
    explanation = Explainer(classifier.model)(inputs, targets=[0, 1])
    assert expected.isfinite().all() and expected.std() > 1e-4
    np.testing.assert_allclose(explanation.logits, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    maps = explanation.cams["gradcam"]
    assert maps.shape == (2, side, side)
    assert maps.min() >= 0 and 0.99 < maps.max() <= 1
    assert explanation.guided.shape == (2, 3, side, side) and np.isfinite(explanation.guided).all()
    assert explanation.guided.any()


@pytest.mark.parametrize(("arch", "side"), [("vit_b_16", 64), ("vit_b_32", 96), ("vit_b_16", 96), ("vit_b_16", 384)])
def test_a_vit_of_another_input_size_is_found_and_gets_inputs_of_its_size(arch, side, saved):
    model = network(arch, image_size=side)
    classifier = load(saved(model.state_dict()))
    assert classifier.arch == arch
    assert classifier.preprocess(noise()).shape == (3, side, side)
    if side < 224:
        assert_same_answer(classifier, model, side)


def test_a_vit_takes_no_other_input_size_than_its_own(saved):
    path = saved(network("vit_b_32").state_dict())
    message = refusal(path, input_size=128)
    assert "224" in message and "128" in message
    assert load(path, input_size=224).preprocess(noise()).shape == (3, 224, 224)
    with_entry = saved({"state_dict": network("vit_b_32").state_dict(), "input_size": 128})
    assert "224" in refusal(with_entry)


# What the network is shown


def test_squashing_shows_the_whole_photo(saved):
    photo = noise()
    classifier = load(saved(resnet18().state_dict()), resize="squash")
    preset = get_model_weights("resnet18").DEFAULT.transforms()
    small = functional.pil_to_tensor(functional.resize(Image.fromarray(photo.pixels), [224, 224], antialias=True))
    expected = functional.normalize(small / 255, preset.mean, preset.std)
    torch.testing.assert_close(classifier.preprocess(photo), expected, rtol=0, atol=1e-6)
    assert classifier.seen_box(97, 131) == (0, 0, 131, 97)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (300, 300), (97, 801)])
def test_the_seen_box_is_the_part_that_the_network_sees(height, width, saved):
    # A ramp of the pixels' own coordinates: what the preset leaves of it tells where its corners lie.
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)[None]
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    path = saved({"state_dict": resnet18().state_dict(), "mean": [0, 0, 0], "std": [1, 1, 1]})
    classifier = load(path)
    seen = classifier.preprocess(Photo(Path("ramp.png"), ramp))
    left, top, right, bottom = classifier.seen_box(height, width)
    shown = (seen[0, 112, [0, -1]] * width).tolist() + (seen[1, [0, -1], 112] * height).tolist()
    np.testing.assert_allclose(shown, [left, right, top, bottom], atol=1.5 * max(height, width) / 224)


def test_a_strip_too_long_to_be_enlarged_is_refused(saved):
    classifier = load(saved(resnet18().state_dict()))
    strip = Photo(Path("strip.png"), np.zeros((8, 60_000, 3), np.uint8))
    with pytest.raises(PhotoError, match=r"strip\.png.*60000 x 8.*squash"):
        classifier.preprocess(strip)
    assert load(saved(resnet18().state_dict()), resize="squash").preprocess(strip).shape == (3, 224, 224)


# Refusals


class Bomb:
    """What a hostile file does when it is loaded without care: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_bomb_of_the_next_test_goes_off_where_care_is_not_taken(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "bang")))
    assert (tmp_path / "bang").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_code_in_a_checkpoint_is_never_run(zipped, saved, tmp_path):
    hidden = {"state_dict": resnet18().state_dict(), "extra": Bomb(tmp_path / "bang")}
    message = refusal(saved(hidden, _use_new_zipfile_serialization=zipped))
    assert "state_dict()" in message and not (tmp_path / "bang").exists()


def test_code_in_a_plain_pickle_is_never_run(tmp_path):
    for name in ("best.pth", "best.pkl", "best.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bang")))
        refusal(tmp_path / name)
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Wrapped(nn.Flatten(), nn.Linear(3, 3))], ids=["torch's", "own"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_pickled_module_is_refused_with_how_to_save_its_weights(model, zipped, saved):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(model, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "best.pth" in message and "torch.save(model.state_dict()" in message
    assert type(model).__name__ in message or "Linear" in message


def test_a_torchscript_archive_is_refused_with_how_to_save_the_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "best.pt"))
    message = refusal(tmp_path / "best.pt")
    assert "TorchScript" in message and "torch.save(model.state_dict()" in message


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "best.pth"
    for content in (b"", b"hello, I am a text file\n", b"\x80", b"PK\x03\x04", bytes(1000), DOG.read_bytes()):
        path.write_bytes(content)
        assert "best.pth" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_half_a_checkpoint_is_refused(zipped, saved):
    path = saved(network("squeezenet1_1").state_dict(), _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for share in (0.01, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "best.pth" in refusal(path)


def test_a_path_without_a_file_is_refused_as_such(tmp_path):
    assert re.search(
        r"missing\.pth.*(is not there|no such file|not found|does not exist)", refusal(tmp_path / "missing.pth")
    )
    assert "folder" in refusal(tmp_path)


def test_a_checkpoint_without_weights_is_refused_with_what_it_holds(saved):
    optimizer = torch.optim.Adam(resnet18().parameters())
    for content in ({}, [], None, 5, torch.zeros(3, 3), {"epoch": 3, "best": {}}, {"state_dict": {}}):
        assert "holds no weights" in refusal(saved(content))
    message = refusal(saved({"optimizer": optimizer.state_dict(), "epoch": 3}))
    assert "holds no weights" in message and "optimizer, epoch" in message


def test_a_list_of_tensors_in_the_place_of_the_weights_is_refused(saved):
    refusal(saved([torch.zeros(3, 3)] * 5))
    refusal(saved({"state_dict": [torch.zeros(3, 3)] * 5}))


def test_the_wrong_architecture_is_refused_with_what_differs_and_what_would_fit(saved):
    message = refusal(saved(resnet18().state_dict()), arch="resnet50")
    ours, theirs = hollow("resnet18").state_dict(), hollow("resnet50").state_dict()
    counted = [key for key in theirs if not key.endswith("num_batches_tracked")]
    missing = [key for key in counted if key not in ours]
    differ = [key for key in theirs if key in ours and theirs[key].shape != ours[key].shape]
    assert f"{len(missing)} missing ({missing[0]}" in message
    assert f"{len(differ)} of another shape ({differ[0]}: " in message
    assert "best.pth" in message and "--arch resnet18" in message
    assert len(message) < 1000


def test_what_the_architecture_does_not_know_is_counted(saved):
    state = {**resnet18().state_dict(), "layer5.weight": torch.ones(2, 2), "layer6.weight": torch.ones(2, 2)}
    assert "2 unexpected (layer5.weight; layer6.weight)" in refusal(saved(state), arch="resnet18")


def test_a_lost_weight_is_named(saved):
    state = dict(resnet18().state_dict())
    del state["layer3.0.conv1.weight"]
    assert "1 missing (layer3.0.conv1.weight)" in refusal(saved(state), arch="resnet18")


@pytest.mark.parametrize("lost", ["running_mean", "running_var"])
def test_lost_statistics_of_a_batch_norm_are_an_error(lost, saved):
    state = dict(resnet18().state_dict())
    del state[f"layer3.0.bn1.{lost}"]
    assert f"layer3.0.bn1.{lost}" in refusal(saved(state), arch="resnet18")


def test_checkpoints_from_before_batches_were_counted_are_read(saved):
    state = {key: t for key, t in resnet18().state_dict().items() if not key.endswith("num_batches_tracked")}
    assert_same_answer(load(saved(state)), resnet18())


@pytest.mark.parametrize("given", [2, 1000])
def test_a_wrong_number_of_classes_is_refused_with_both_numbers(given, saved):
    for arch in (None, "resnet18"):
        message = refusal(saved(resnet18().state_dict()), arch=arch, num_classes=given)
        assert re.search(rf"--num-classes\D*{given}\b.*\b5 classes", message)


@pytest.mark.parametrize(
    ("arch", "meant"), [("resnet5", "resnet50"), ("mobilnet_v2", "mobilenet_v2"), ("vit_b", "vit_b_16")]
)
def test_an_unknown_architecture_is_refused_with_close_matches(arch, meant):
    message = refusal(arch=arch)
    assert f"'{arch}'" in message and "did you mean" in message and meant in message


def test_weights_of_something_else_are_refused_with_what_comes_near(saved):
    other = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 5))
    message = refusal(saved(other.state_dict()))
    assert "fits no torchvision architecture" in message and "squeezenet" in message and "--arch" in message


def test_a_vit_of_unusual_size_under_the_wrong_name_is_refused(saved):
    state = saved(network("vit_b_16", image_size=384).state_dict())
    assert "does not fit vit_h_14" in refusal(state, arch="vit_h_14")


STRANGE_WEIGHTS = {
    "no classes": {"fc.weight": torch.zeros(0, 512), "fc.bias": torch.zeros(0)},
    "a number for a head": {"fc.weight": torch.tensor(5.0)},
    "a vector for a head": {"fc.weight": torch.zeros(5)},
    "a sparse head": {"fc.weight": torch.zeros(5, 512).to_sparse()},
    "an empty convolution": {"conv1.weight": torch.zeros(64, 3, 0, 0)},
}


@pytest.mark.parametrize("strange", STRANGE_WEIGHTS.values(), ids=STRANGE_WEIGHTS)
def test_strange_weights_are_refused(strange, saved):
    refusal(saved({**resnet18().state_dict(), **strange}), arch="resnet18")


# Without a checkpoint


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """torch's folder for downloads, empty, whatever the machine has."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch"


def test_weights_that_cannot_be_downloaded_are_an_error_that_says_how_to_pass_ones_own(empty_cache, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no\nroute to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = refusal(arch="resnet18")
    assert "resnet18" in message and "--ckpt" in message and "download" in message
    out, err = capfd.readouterr()
    assert out == "" and all(line.startswith("note: ") for line in err.splitlines())


@pytest.fixture
def fake_download(empty_cache, monkeypatch, tmp_path):
    """What would be downloaded is this network's weights."""

    def serve(model):
        torch.save(model.state_dict(), tmp_path / "download")

    def download(url, dst, *args, **kwargs):
        shutil.copy(tmp_path / "download", dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return serve


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {}),
        ("squeezenet1_1", {}),
        ("mnasnet0_5", {}),
        ("googlenet", {"aux_logits": True}),
        ("inception_v3", {"aux_logits": True}),
    ],
)
def test_without_a_checkpoint_torchvisions_weights_and_names_are_used(arch, options, fake_download):
    model = network(arch, classes=1000, **options)
    fake_download(model)
    classifier = load_classifier(arch, device="cpu")
    assert classifier.arch == arch
    assert list(classifier.class_names) == get_model_weights(arch).DEFAULT.meta["categories"]
    assert_same_answer(classifier, model, side=96)


def test_without_anything_it_is_resnet50(fake_download, capsys):
    model = network("resnet50", classes=1000)
    fake_download(model)
    classifier = load_classifier(device="cpu")
    assert classifier.arch == "resnet50" and classifier.class_names[248] == "Eskimo dog"
    assert_same_answer(classifier, model)
    assert re.fullmatch(r"note: .*resnet50.* MB\)\n", capsys.readouterr().err)
    assert load_classifier(device="cpu").arch == "resnet50"
    assert capsys.readouterr().err == ""  # it is in the cache now


def test_the_wrong_number_of_classes_for_torchvisions_weights_is_refused(fake_download):
    fake_download(network("resnet18", classes=1000))
    message = refusal(arch="resnet18", num_classes=2)
    assert re.search(r"--num-classes\D*2\b.*\b1000 classes", message)


def test_a_thousand_classes_without_names_are_imagenets(saved):
    classifier = load(saved(network("squeezenet1_1", classes=1000).state_dict()))
    assert list(classifier.class_names) == get_model_weights("squeezenet1_1").DEFAULT.meta["categories"]


# No time for what is overwritten


class RandomNumbers(TorchDispatchMode):
    """Counts the random numbers that are really drawn in it."""

    drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(result, torch.Tensor) and not result.is_meta:
            self.drawn += result.numel()
        return result


def test_torchvision_itself_draws_random_numbers():
    with RandomNumbers() as numbers:
        get_model("squeezenet1_1", weights=None)
    assert numbers.drawn > 1_000_000


FAMILIES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
)


@pytest.mark.parametrize("arch", FAMILIES)
def test_no_random_numbers_are_drawn_for_weights_that_are_overwritten(arch):
    checkpoint = Checkpoint("best.pth", dict(hollow_state(arch)))
    with RandomNumbers() as numbers:
        build_model(find_architecture(checkpoint), checkpoint)
    assert numbers.drawn < 5000


# The device


def test_a_device_that_is_given_is_taken_without_a_word(capsys):
    assert find_device("cpu") == torch.device("cpu")
    assert capsys.readouterr() == ("", "")


def test_without_a_gpu_the_cpu_is_taken_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(None) == torch.device("cpu")
    assert re.fullmatch(r"note: .*CPU\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("driver", "built", "torch_says", "expected"),
    [
        (False, True, "", "no CUDA GPU found, computing"),
        (True, False, "", r"built without CUDA.*pytorch\.org"),
        (True, True, "The NVIDIA driver on your system is too old\nmore", "on your system is too old, computing"),
        (True, True, "No CUDA GPUs are available", "No CUDA GPUs are available, computing"),
    ],
)
def test_it_is_said_why_a_gpu_is_not_used(monkeypatch, capsys, driver, built, torch_says, expected):
    def init():
        raise RuntimeError(torch_says)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(program_file, "has_gpu_driver", lambda: driver)
    find_device(None)
    stderr = capsys.readouterr().err
    assert re.search(expected, stderr)
    assert stderr.count("\n") == 1
    with pytest.raises(CallError, match=expected.removesuffix(", computing")):
        find_device("cuda:1")


@pytest.mark.parametrize("name", [None, "cuda", "cuda:0"])
@pytest.mark.parametrize("fault", ["CUDA error: out of memory", "CUDA error: no kernel image is available"])
def test_a_gpu_that_is_there_but_cannot_be_used_is_not_called_missing(monkeypatch, name, fault):
    def fails(*_, **__):
        raise RuntimeError(f"{fault}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(CallError, match=f"^device {name or 'cuda'} cannot be used: {fault}; .*--device cpu") as caught:
        find_device(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(CallError, match="cuda:1 is not there; this machine has: cpu, cuda:0"):
        find_device("cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_where_there_is_a_gpu_it_is_taken(saved, capsys):
    classifier = load_classifier(ckpt=saved(resnet18().state_dict()))
    assert {p.device.type for p in classifier.model.parameters()} == {"cuda"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", "toaster", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused_before_any_work(device, tmp_path):
    message = refusal(tmp_path / "missing.pth", device=device)
    assert device in message and "cpu" in message


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has an Apple GPU")
def test_an_apple_gpu_that_is_not_there_is_refused():
    assert "mps" in refusal(device="mps")
