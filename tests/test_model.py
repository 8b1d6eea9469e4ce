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
        return func(
            *args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})}
        )


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
    length = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)
    )
    values = torch.randn(length, generator=generator) / math.sqrt(tensor[0].numel())
    return values.as_strided(tensor.shape, strides)


def network(arch, classes=5, change=None, **options):
    """A plain torchvision network with random weights, changed as people change it for fine-tuning."""
    if arch in WITH_AUXILIARY_HEADS:
        options = {"aux_logits": False, "init_weights": False, "transform_input": True, **options}
    with ParametersOnMeta():
        model = get_model(arch, weights=None, num_classes=classes, **options)
        model = (change(model) or model) if change else model
    state, generator = model.state_dict(), torch.Generator().manual_seed(0)
    for key, tensor in state.items():
        state[key] = random_weights(key, tensor, generator)
    model.load_state_dict(state, assign=True)
    return model.eval()


@functools.cache
def resnet18(classes=5):
    return network("resnet18", classes)


def state18():
    return resnet18().state_dict()


def under(prefix, state):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def without(lost, state):
    return {key: tensor for key, tensor in state.items() if not key.startswith(lost)}


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
        return model(inputs)


def assert_same_logits(classifier, model, side=64):
    expected = logits_of(model, side)
    assert (
        expected.isfinite().all() and expected.std() > 1e-4
    )  # a dead network would agree with anything
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        logits_of(classifier.model, side), expected, rtol=1e-4, atol=1e-4 * scale
    )


def assert_is_resnet18(path):
    classifier = load(path)
    assert classifier.arch == "resnet18"
    assert_same_logits(classifier, resnet18())
    return classifier


# Where the weights are in the file


ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "ema",
    "module",
    "my_best",
)
PREFIXES = (
    *(
        "module.",
        "_orig_mod.",
        "model.",
        "backbone.",
        "net.",
        "base.",
        "encoder.",
        "features.",
        "my_resnet.cnn.",
        "0.",
    ),
    *(
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.backbone.",
        "_orig_mod.module.model.",
        "model._orig_mod.",
    ),
)
OTHER = {
    key: tensor + 1 for key, tensor in state18().items()
}  # another network of the same architecture
MOMENTS = {i: {"exp_avg": torch.zeros(9, 9), "step": torch.tensor(1.0)} for i in range(200)}
TRAINING_OPTIONS = argparse.Namespace(
    model="resnet18", data_path="/data", lr=0.1, device="cuda", amp=False, test=None
)
KINDS = {
    "bare": lambda state: state,
    **{
        f"entry {entry}": lambda state, entry=entry: {"epoch": 3, entry: state, "acc": 0.9}
        for entry in ENTRIES
    },
    **{
        f"prefix {prefix}": lambda state, prefix=prefix: {"state_dict": under(prefix, state)}
        for prefix in PREFIXES
    },
    "two levels": lambda state: {"checkpoint": {"model": state}, "epoch": 3},
    "parameters": lambda state: {
        k: nn.Parameter(t, t.is_floating_point()) for k, t in state.items()
    },
    "bare, values beside": lambda state: {
        **state,
        "epoch": 3,
        "lr": 0.1,
        "metric": torch.tensor(0.9),
    },
    "DataParallel": lambda state: nn.DataParallel(resnet18()).state_dict(),
    "AveragedModel": lambda state: {
        "model_ema": torch.optim.swa_utils.AveragedModel(resnet18()).state_dict()
    },
    "average beside": lambda state: {"model_ema": OTHER, "model": state},
    "average of timm": lambda state: {
        "arch": "resnet18",
        "state_dict_ema": OTHER,
        "state_dict": state,
    },
    "average in one dict": lambda state: {
        "state_dict": under("model.", state) | under("ema.module.", OTHER)
    },
    "the same twice": lambda state: {"best": state, "last": OrderedDict(state)},
    "optimizer": lambda state: {
        "optimizer": {"state": MOMENTS},
        "optim_d": {"w": torch.ones(3, 3)},
        "x": state,
    },
    "before batches were counted": lambda state: {
        k: t for k, t in state.items() if "num_batches" not in k
    },
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
        "state_dict": {
            **under("model.", state),
            "loss_fn.pos_weight": torch.ones(5),
            "acc.total": torch.ones(5),
        },
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"EarlyStopping{'monitor': 'val_loss'}": {"best_score": torch.tensor(0.2)}},
        "optimizer_states": [{"state": MOMENTS, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"num_classes": 5, "lr": 0.1},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_found_in_each_kind_of_checkpoint(kind, saved):
    assert_is_resnet18(saved(KINDS[kind](state18())))


@pytest.mark.parametrize("outer", ["", "model.", "module.model."])
@pytest.mark.parametrize("name", ["fc", "head", "linear", "head.1"])
def test_a_head_beside_the_backbone_is_found_at_every_depth(outer, name, saved):
    head = {f"{name}.weight": resnet18().fc.weight, f"{name}.bias": resnet18().fc.bias}
    assert_is_resnet18(saved(under(outer, under("backbone.", without("fc.", state18())) | head)))


@pytest.mark.parametrize("outer", ["", "_orig_mod.module."])
@pytest.mark.parametrize("given", [None, "resnet18"])
def test_a_loss_beside_the_network_is_left_out_with_a_warning(outer, given, saved, capsys):
    loss = {"criterion.weight": torch.ones(5), "criterion.mean": torch.zeros(512)}
    classifier = load(
        saved({"state_dict": under(outer, under("model.", state18()) | loss)}), arch=given
    )
    assert_same_logits(classifier, resnet18())
    assert (classifier.preset.mean, classifier.preset.std) == IMAGENET
    assert re.fullmatch(r"warning: .*criterion\.weight.*\n", capsys.readouterr().err)


def test_a_layer_in_front_that_normalises_its_inputs_becomes_the_preprocessing(saved):
    layer = {"0.mean": torch.full((1, 3, 1, 1), 0.1), "0.std": torch.full((1, 3, 1, 1), 0.9)}
    preset = assert_is_resnet18(saved(layer | under("1.", state18()))).preset
    assert [*preset.mean, *preset.std] == pytest.approx([0.1] * 3 + [0.9] * 3)


@pytest.mark.parametrize("name", ["classifier", "head", "linear"])
def test_a_head_behind_the_outputs_of_a_whole_network_is_not_dropped(name, saved):
    state = under("model.", state18()) | {
        f"{name}.weight": torch.ones(3, 5),
        f"{name}.bias": torch.ones(3),
    }
    assert re.search(rf"{name}\.weight.*5 outputs.*net\.py:build", refusal(saved(state)))


@pytest.mark.parametrize("teacher", ["resnet18", "resnet34", "shufflenet_v2_x0_5"])
def test_of_two_networks_in_a_file_none_is_taken_by_chance(teacher, saved):
    theirs = OTHER if teacher == "resnet18" else network(teacher).state_dict()
    message = refusal(saved(under("student.", state18()) | under("teacher.", theirs)))
    assert "student." in message or "teacher." in message
    if teacher == "resnet18":
        assert re.search(
            "several networks.*student.*teacher",
            refusal(saved({"student": state18(), "teacher": OTHER})),
        )


# What the weights and the values beside them may be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_computed_in_float32(dtype, saved):
    model = copy.deepcopy(resnet18()).to(dtype)
    classifier = load(saved(model.state_dict()))
    assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    assert_same_logits(classifier, model.float())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_plain_values_that_are_not_built_in_ones_may_stand_in_the_file(zipped, saved):
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)
    values = [
        *(kind(1) for kind in kinds),
        np.arange(3.0),
        Path("runs") / "best.pth",
        argparse.Namespace(out=Path("a")),
    ]
    content = {"state_dict": state18(), "best": values, "history": {"accuracy": values}}
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


@pytest.mark.parametrize("arch", WITH_AUXILIARY_HEADS)
def test_auxiliary_heads_may_be_there(arch, saved):
    model = network(arch, aux_logits=True)
    assert any("aux" in key.lower() for key in model.state_dict())
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
    safetensors.save_file({key: tensor.contiguous() for key, tensor in state18().items()}, path)
    assert_is_resnet18(path)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    assert "best.safetensors" in refusal(path)


def test_the_demo_is_read_as_torchvision_reads_it():
    content = torch.load(CKPT, weights_only=True)
    model = get_model("mobilenet_v2", weights=None, num_classes=19).eval()
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in content["state_dict"].items()}
    )
    classifier = load(CKPT)
    assert (classifier.arch, list(classifier.class_names)) == ("mobilenet_v2", content["classes"])
    transforms = get_model_weights("mobilenet_v2").DEFAULT.transforms
    inputs = transforms(crop_size=225, resize_size=233)(Image.open(DOG).convert("RGB"))
    torch.testing.assert_close(classifier.preprocess(read_photo(DOG)), inputs, rtol=0, atol=1e-6)
    assert_same_logits(classifier, model)
    with torch.inference_mode():
        assert classifier.class_names[model(inputs[None]).argmax()] == "Siberian husky"


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
    "sequence": lambda inputs: nn.Sequential(nn.Linear(inputs, 5)),
    "dropout": lambda inputs: nn.Sequential(nn.Dropout(), nn.Linear(inputs, 5)),
    "two dropouts": lambda inputs: nn.Sequential(
        nn.Dropout(0.2), nn.Dropout(0.1), nn.Linear(inputs, 5)
    ),
}
HEADS = """
    resnet18 fc no bias; resnet18 fc sequence; resnet18 fc dropout; resnet18 fc two dropouts;
    mobilenet_v2 classifier linear; mobilenet_v2 classifier dropout; mobilenet_v2 classifier.1 dropout;
    mobilenet_v3_small classifier linear; mobilenet_v3_small classifier.3 linear;
    shufflenet_v2_x0_5 fc dropout; alexnet classifier linear; convnext_tiny classifier.2 dropout;
"""
MORE_HEADS = """
    mobilenet_v2 classifier.1 linear; efficientnet_b0 classifier linear; efficientnet_b0 classifier.1 dropout;
    mnasnet0_5 classifier linear; alexnet classifier.6 linear; convnext_tiny classifier.2 linear;
    vgg11 classifier linear; vgg11 classifier dropout; vgg11 classifier.6 linear; vgg11 classifier.6 dropout;
    densenet121 classifier dropout; googlenet fc dropout; inception_v3 fc dropout; regnet_y_400mf fc dropout;
    swin_t head dropout; maxvit_t classifier.5 linear; maxvit_t classifier.5 dropout;
    vit_b_32 heads linear; vit_b_32 heads dropout; vit_b_32 heads.head dropout;
"""
CASES = [case.split(maxsplit=2) for case in HEADS.split(";")[:-1]]
CASES += [
    pytest.param(*case.split(maxsplit=2), marks=pytest.mark.slow)
    for case in MORE_HEADS.split(";")[:-1]
]


@pytest.mark.parametrize(("arch", "name", "maker"), CASES)
def test_a_replaced_head_with_one_linear_layer_is_used(arch, name, maker, saved):
    model = network(arch, classes=1000, change=replaced(name, MAKERS[maker]))
    classifier = load(saved(model.state_dict()))
    assert (classifier.arch, len(classifier.class_names)) == (arch, 5)
    assert_same_logits(
        classifier, model, {"maxvit_t": 224, "vit_b_32": 224, "inception_v3": 96}.get(arch, 64)
    )


def test_a_replaced_convolution_of_squeezenet_is_used(saved):
    def change(model):
        model.classifier[1] = nn.Conv2d(512, 5, kernel_size=1)

    model = network("squeezenet1_0", classes=1000, change=change)
    classifier = load(saved(model.state_dict()))
    assert (classifier.arch, len(classifier.class_names)) == ("squeezenet1_0", 5)
    assert_same_logits(classifier, model)


def test_a_head_of_two_layers_is_refused_by_name(saved):
    head = {"fc.0.weight": torch.ones(64, 512), "fc.2.weight": torch.ones(5, 64)}
    message = refusal(saved(without("fc.", state18()) | head))
    assert "fc.0.weight" in message and "net.py:build" in message


def test_a_single_output_is_the_second_of_two_classes(saved):
    model = resnet18(1)
    path = saved({"state_dict": model.state_dict(), "classes": ["cat", "dog"]})
    for classifier in (load(path), load(path, num_classes=1), load(path, num_classes=2)):
        assert classifier.class_names == ("cat", "dog")
    assert load(path, class_names=["no", "yes"]).class_names == ("no", "yes")
    inputs = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, sure = classifier.model(inputs), model(inputs).sigmoid()
    torch.testing.assert_close(logits.softmax(1), torch.cat([1 - sure, sure], 1))
    explanation, expected = Explainer(classifier.model)(inputs, [0, 1, 0]), Explainer(model)(inputs)
    np.testing.assert_allclose(
        explanation.cams["gradcam"][1], expected.cams["gradcam"][1], atol=1e-5
    )
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
    "classes",
    [5, "abcde", ["a", "b"], {"a": 0, "b": 7}, {"a": None}, [], {}, {"x": [1]}, [None] * 5],
    ids=str,
)
def test_class_names_that_cannot_be_right_are_left_out_with_a_warning(classes, saved, capsys):
    classifier = load(saved({"state_dict": state18(), "classes": classes}))
    assert classifier.class_names == tuple(f"class {i}" for i in range(5))
    assert re.fullmatch(r"warning: .*best\.pth.*classes.*\n", capsys.readouterr().err)
    assert re.search("--class-names.*alphabetical", classifier.describe())


@pytest.mark.parametrize("size", [96, [96, 96], (3, 96, 96), [96], np.int64(96)], ids=repr)
def test_the_input_size_of_the_checkpoint_is_used_and_a_given_one_wins(size, saved):
    path = saved({"state_dict": state18(), "input_size": size})
    assert load(path).preprocess(PHOTO).shape == (3, 96, 96)
    assert load(path, input_size=64).preprocess(PHOTO).shape == (3, 64, 64)


VALUES = torch.tensor([0.25, 0.5, 0.625])


@pytest.mark.parametrize(
    "of", [list, torch.clone, lambda v: v.view(3, 1, 1), torch.Tensor.numpy, torch.Tensor.bfloat16]
)
def test_mean_and_std_of_the_checkpoint_are_used_and_given_ones_win(of, saved):
    values = of(VALUES.tolist() if of is list else VALUES)
    path = saved({"state_dict": state18(), "mean": values, "std": values})
    for options, mean, std in (
        ({}, VALUES, VALUES),
        ({"mean": [0.1, 0.2, 0.3]}, [0.1, 0.2, 0.3], VALUES),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, [0, 0, 0], [1, 1, 1]),
    ):
        transforms = get_model_weights("resnet18").DEFAULT.transforms(mean=mean, std=std)
        expected = transforms(Image.fromarray(PHOTO))
        torch.testing.assert_close(
            load(path, **options).preprocess(PHOTO), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ([104, 117, 123], [1, 1, 1]),
        ([0, 0, 0], [255] * 3),
    ],
)
def test_mean_and_std_of_colours_up_to_255_are_understood(mean, std, saved):
    colours = get_model_weights("resnet18").DEFAULT.transforms(mean=[0, 0, 0], std=[1, 1, 1])
    subtracted, divided = (torch.tensor(values)[:, None, None] for values in (mean, std))
    expected = (colours(Image.fromarray(PHOTO)) * 255 - subtracted) / divided
    in_the_file = load(saved({"state_dict": state18(), "mean": mean, "std": std}))
    for classifier in (in_the_file, load(saved(state18()), mean=mean, std=std)):
        torch.testing.assert_close(classifier.preprocess(PHOTO), expected)


def test_the_architecture_entry_of_the_checkpoint_is_used_if_it_has_a_meaning(saved):
    for arch in (5, None, "no_such_network", ["resnet18"], {"a": 1}):
        assert_is_resnet18(
            saved({"state_dict": state18(), "arch": arch, "args": 5, "model_name": []})
        )
    for entry in ("arch", "model_name"):
        classifier = load(saved({"state_dict": state18(), entry: "ResNet18"}))
        assert classifier.describe().startswith("resnet18 (from best.pth)")
    message = refusal(saved({"state_dict": state18(), "arch": "resnet34"}))
    assert "does not fit resnet34" in message and "--arch resnet18" in message


# Hostile files: one line, within seconds


META = torch.zeros(3, device="meta")
BAD_ENTRIES = {
    "input_size": ["x", 0, -224, 10**9, 10**400, (3, 224, 160), [], {"h": 1}, 1.5, True, META],
    "mean": [
        *(
            [1],
            "abc",
            ["a", "b", "c"],
            {"r": 1},
            [math.nan] * 3,
            [10**400] * 3,
            10**400,
            [None] * 3,
            [1, [2, 3]],
            META,
        ),
        *(
            [0.4, 0.5, 0.6, -1.0],
            torch.zeros(4),
            torch.zeros(1).expand(10**9),
            torch.zeros(3, dtype=torch.complex64),
        ),
    ],
    "std": [
        [0, 0, 0],
        [-1.0, 1.0, 1.0],
        [math.nan] * 3,
        5,
        [1e-300] * 3,
        1e-300,
        torch.ones(3).to_sparse(),
    ],
}


@pytest.mark.parametrize("entry", BAD_ENTRIES)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_entries_without_meaning_are_refused_by_name(entry, saved, no_hang):
    for value in BAD_ENTRIES[entry]:
        assert entry in refusal(saved({"state_dict": state18(), entry: value}))


def as_dict(items):
    return {f"key{i}": item for i, item in enumerate(items)}


def shared(make):
    """Containers of 60 items, each level the same object 60 times, five levels: 60 ** 5 items in a file of 5 KB."""
    inside = make(["x"])
    for _ in range(5):
        inside = make([inside] * 60)
    return inside


@pytest.mark.parametrize("make", [list, tuple, as_dict], ids=["lists", "tuples", "dicts"])
def test_deeply_shared_containers_are_one_line(make, saved, no_hang, capsys):
    for content in (shared(make), make([shared(make)] * 3)):
        for entry in ("mean", "std", "input_size"):
            assert entry in refusal(saved({"state_dict": state18(), entry: content}))
    for content in (
        shared(make),
        make([shared(make)] * 5),
        {str(i): shared(make) for i in range(5)},
    ):
        assert (
            load(saved({"state_dict": state18(), "classes": content})).class_names[0] == "class 0"
        )
    assert all(line.startswith("warning: ") for line in capsys.readouterr().err.splitlines())


def test_dicts_that_are_nested_in_themselves_are_visited_once(saved, no_hang):
    loop = {}
    loop["again"] = loop
    for content in ({"config": shared(as_dict)}, {"config": loop}):
        assert_is_resnet18(saved({"state_dict": {**state18(), **content}, **content}))
        assert "no weights" in refusal(saved(content))


def test_a_file_of_many_tensors_is_refused(saved, no_hang):
    content = {f"n{i}.conv1.weight": torch.zeros(1) for i in range(3000)} | {
        "a." * 5000 + "weight": torch.zeros(2, 2)
    }
    assert "fits no torchvision classifier" in refusal(saved(content))


CHANGES = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)]),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "int8": lambda tensor: tensor.to(torch.int8),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "float4": lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8).view(
        torch.float4_e2m1fn_x2
    ),
    "number": lambda tensor: torch.tensor(5.0),
    "vector": lambda tensor: torch.zeros(len(tensor)),
    "empty": lambda tensor: tensor[:0],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("key", ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"])
@pytest.mark.filterwarnings("ignore")
def test_unusable_weights_are_refused_by_name(change, key, saved):
    if change == "float4" and not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no float4")
    if change in ("number", "vector", "empty") and key != "fc.weight":
        pytest.skip("one key of another shape is enough")
    assert key in refusal(
        saved({**state18(), key: CHANGES[change](state18()[key])}), arch="resnet18"
    )


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
    assert not (tmp_path / "bang").exists()
    assert "would run code" in refusal(saved({"state_dict": state18(), "best": np.array(["x"])}))


@pytest.mark.filterwarnings("ignore")
def test_whole_networks_are_refused_with_how_to_save_their_weights(saved, tmp_path):
    for zipped in (True, False):
        message = refusal(
            saved(nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=zipped)
        )
        assert re.search(
            r"best\.pth.*(Sequential|Linear).*torch\.save\(model\.state_dict\(\)", message
        )
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "best.pt"))
    assert re.search(
        r"TorchScript.*torch\.save\(model\.state_dict\(\)", refusal(tmp_path / "best.pt")
    )


def test_a_file_that_is_not_a_whole_checkpoint_is_refused(saved, tmp_path):
    contents = [
        b"",
        b"hello, I am a text file\n",
        b"\x80",
        b"PK\x03\x04",
        bytes(1000),
        DOG.read_bytes(),
    ]
    for zipped in (True, False):
        whole = saved(state18(), _use_new_zipfile_serialization=zipped).read_bytes()
        contents += [whole[: int(len(whole) * share)] for share in (0.01, 0.5, 0.99)]
    for content in contents:
        (tmp_path / "best.pth").write_bytes(content)
        assert "best.pth" in refusal(tmp_path / "best.pth")
    assert re.search(r"missing\.pth.*no such file", refusal(tmp_path / "missing.pth"))
    assert "folder" in refusal(tmp_path)


def test_a_checkpoint_without_weights_is_refused_with_what_it_holds(saved):
    for content in (
        {},
        [],
        None,
        5,
        torch.zeros(3, 3),
        {"epoch": 3, "best": {}},
        {"state_dict": [torch.ones(3, 3)]},
    ):
        assert "no weights" in refusal(saved(content))
    message = refusal(
        saved({"optimizer": torch.optim.Adam(resnet18().parameters()).state_dict(), "epoch": 3})
    )
    assert "no weights" in message and "optimizer, epoch" in message


def test_the_wrong_architecture_is_refused_with_what_differs_and_what_would_fit(saved):
    message = refusal(saved(state18()), arch="resnet50")
    ours, theirs = state18(), network("resnet50").state_dict()
    backbone = [
        key
        for key in theirs
        if not key.endswith("num_batches_tracked") and not key.startswith("fc.")
    ]
    missing = [key for key in backbone if key not in ours]
    differ = [key for key in backbone if key in ours and theirs[key].shape != ours[key].shape]
    assert f"{len(missing)} missing ({missing[0]}" in message
    assert f"{len(differ)} of another shape ({differ[0]}: " in message
    assert "best.pth" in message and "--arch resnet18" in message


def test_a_wrong_number_of_classes_is_refused_with_both_numbers(saved):
    for given in (2, 1000):
        message = refusal(saved(state18()), num_classes=given)
        assert re.search(rf"--num-classes\D*{given}\b.*\b5 classes", message)


@pytest.mark.parametrize(
    ("arch", "meant"),
    [("resnet5", "resnet50"), ("mobilnet_v2", "mobilenet_v2"), ("vit_b", "vit_b_16")],
)
def test_an_unknown_architecture_is_refused_with_close_matches(arch, meant):
    assert re.search(f"'{arch}'.*did you mean.*{meant}", refusal(arch=arch))


def test_weights_of_another_network_are_refused_with_their_number_of_parameters(saved):
    other = nn.Sequential(nn.Conv2d(3, 1600, 5), nn.Flatten(), nn.Linear(16, 5))
    assert "(0.1 million parameters)" in refusal(saved(other.state_dict()))
    message = refusal(saved(without("layer4.1.", state18())))
    assert re.search(r"fits no torchvision classifier.*--arch resnet18\b", message)


OTHER_TASKS = ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcn_resnet50", "ssd300_vgg16"]
OTHER_TASKS += ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]


@pytest.mark.parametrize(
    "arch", [OTHER_TASKS[0], *(pytest.param(a, marks=pytest.mark.slow) for a in OTHER_TASKS[1:])]
)
def test_a_network_for_another_task_is_named_as_such(arch, saved):
    with torch.device("meta"):
        state = get_model(arch, weights=None, weights_backbone=None).state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in state.items()}
    assert "it looks like a detector or segmentation network" in refusal(saved(state))


@pytest.mark.parametrize("size", [48])
def test_a_vit_takes_the_size_that_its_position_embedding_has_and_no_other(size, saved):
    with torch.device("meta"):
        model = get_model("vit_b_16", weights=None, num_classes=3, image_size=size)
    state = {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}
    assert load(saved(state)).input_size == size
    for fault in (
        refusal(saved(state), input_size=224),
        refusal(saved({"state_dict": state, "input_size": 224})),
    ):
        assert re.search(
            f"takes inputs of {size} x {size} pixels only, not .*input.size 224", fault
        )


# All of torchvision's architectures


DEFAULT_ARCHITECTURES = (
    *(
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "inception_v3",
        "mnasnet0_5",
        "swin_t",
    ),
    *("mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"),
)


class CountRandomNumbers(TorchDispatchMode):
    """Count the random numbers that are really drawn."""

    drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            torch.Tag.nondeterministic_seeded in func.tags
            and isinstance(result, torch.Tensor)
            and not result.is_meta
        ):
            self.drawn += result.numel()
        return result


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(a, marks=[] if a in DEFAULT_ARCHITECTURES else pytest.mark.slow)
        for a in ARCHITECTURES
    ],
)
def test_an_architecture_is_recognised_loaded_prepared_for_and_explained(arch, saved, capfd):
    transforms = get_model_weights(arch).DEFAULT.transforms()
    own_size = arch.startswith(("vit", "maxvit"))
    side = transforms.crop_size[0] if own_size else 96 if arch == "inception_v3" else 64
    model = network(arch, classes=7, **({"image_size": side} if arch.startswith("vit") else {}))
    state = model.state_dict()
    *_, last = [
        key for key, tensor in state.items() if key.endswith("weight") and tensor.shape[:1] == (7,)
    ]
    state[last] = state[last].clone()
    state[last][1] = -state[last][0]  # so that of two classes one map is not empty
    model.load_state_dict(state, assign=True)
    path = saved({"state_dict": state})
    with CountRandomNumbers() as numbers, warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier = load(path)
    assert numbers.drawn < 5000  # of a plain torchvision network: one for each weight
    assert classifier.arch == arch and classifier.class_names == tuple(
        f"class {i}" for i in range(7)
    )
    assert not any(module.training for module in classifier.model.modules())
    assert capfd.readouterr() == ("", "")
    inputs = classifier.preprocess(PHOTO)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs, transforms(Image.fromarray(PHOTO)), rtol=0, atol=1e-6)
    if arch in HUGE:
        return
    assert_same_logits(classifier, model, side)
    inputs = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2)).expand(
        2, -1, -1, -1
    )
    explanation = Explainer(classifier.model)(inputs, targets=[0, 1])
    maps = explanation.cams["gradcam"]
    assert maps.shape == (2, side, side) and maps.min() >= 0 and 0.99 < maps.max() <= 1
    assert explanation.guided.shape == (2, 3, side, side) and np.isfinite(explanation.guided).all()
    assert explanation.guided.any()


def test_the_architectures_are_torchvisions():
    assert (
        set(ARCHITECTURES) == set(list_models(module=torchvision.models))
        and len(ARCHITECTURES) >= 80
    )
    with CountRandomNumbers() as numbers:
        get_model("squeezenet1_1", weights=None)
    assert numbers.drawn > 1_000_000  # the counter of the test above does count


VIT_SIZES = [
    ("vit_b_32", 96),
    *(pytest.param("vit_b_16", side, marks=pytest.mark.slow) for side in (64, 96, 384)),
]


def test_a_size_that_maxvit_cannot_take_is_one_line(saved):
    path = saved(network("maxvit_t").state_dict())
    assert re.search(r"maxvit_t.*225", refusal(path, arch="maxvit_t", input_size=225))


# What the network is shown, and what is told of it


def test_at_another_size_the_margin_around_the_crop_is_in_proportion(saved):
    path = saved(resnet18().state_dict())  # torchvision's preset: short side to 256, crop of 224
    inputs = load(path, input_size=112).preprocess(read_photo(DOG))
    expected = get_model_weights("resnet18").DEFAULT.transforms(crop_size=112, resize_size=128)
    torch.testing.assert_close(inputs, expected(Image.open(DOG).convert("RGB")), rtol=0, atol=1e-6)


def test_squashing_shows_the_whole_photo(saved):
    classifier = load(saved(state18()), resize="squash")
    small = functional.pil_to_tensor(
        functional.resize(Image.fromarray(PHOTO), [224, 224], antialias=True)
    )
    expected = functional.normalize(small / 255, *IMAGENET)
    torch.testing.assert_close(classifier.preprocess(PHOTO), expected, rtol=0, atol=1e-6)
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
    seen = classifier.preprocess(ramp)
    left, top, right, bottom = classifier.seen_box(height, width)
    middle = seen.shape[1] // 2
    shown = (seen[0, middle, [0, -1]] * width).tolist() + (
        seen[1, [0, -1], middle] * height
    ).tolist()
    np.testing.assert_allclose(
        shown, [left, right, top, bottom], atol=1.5 * max(height, width) / (side or 224)
    )


def test_one_line_tells_all_that_is_assumed_and_where_it_comes_from(saved):
    bare, full = (
        saved(state18(), "bare.pth"),
        saved({"state_dict": state18(), "input_size": 96, "classes": NAMES}),
    )
    line = load(bare).describe(["layer4"])
    assert re.match(r"resnet18 \(recognised\), 5 classes .*, layer4, input 224 x 224 crop \(", line)
    assert re.search("not in bare.pth; pass --input-size.*, ImageNet mean and std, cpu", line)
    line = load(full, arch="resnet18", mean=[0, 0, 0], std=[1, 1, 1]).describe()
    assert (
        line.startswith("resnet18, 5 classes, input 96 x 96 crop (from best.pth), ")
        and "ImageNet" not in line
    )
    line = repr(load(full, input_size=112, resize="squash"))
    assert "input 112 x 112 squash, " in line and "\n" not in line and "pass --" not in line


@pytest.mark.parametrize(
    ("wanted", "index"),
    [("cat", 2), ("CAT", 2), ("bee", 1), ("elk", 4), ("0", 0), ("4", 4), ("哈士奇", 5), ("7", 6)],
)
def test_a_class_is_found_by_name_in_any_case_or_by_index(wanted, index):
    assert find_class(wanted, [*NAMES, "哈士奇", "7"]) == index


NEAR = {"husky": "Siberian husky", "Samoyde": "Samoyed", "german shepard": "German shepherd"}
FAR = ("-1", "19", "1000", "99999999999999999999", "zebra", "1.5", "", "²", "٣x", "(")


@pytest.mark.parametrize("wanted", [*NEAR, *FAR])
def test_an_unknown_class_is_refused_with_the_range_and_near_names(wanted):
    with pytest.raises(CallError, match=f"'{re.escape(wanted)}'.*0 to 18") as caught:
        find_class(wanted, torch.load(CKPT, weights_only=True)["classes"])
    meant = re.search(r"did you mean ([^?]*)\?", str(caught.value))
    assert NEAR[wanted] in meant[1] if wanted in NEAR else meant is None


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
    """Write a network of one's own, whose `forward` returns that expression, and return its --arch value."""

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
    classifier = load(saved({"state_dict": under(prefix, state), "input_size": 64}), arch=own())
    assert (len(classifier.class_names), classifier.input_size) == (3, 64)
    expected = logits_of(resnet18(8)) @ state["head.weight"].T
    torch.testing.assert_close(logits_of(classifier.model), expected, rtol=1e-4, atol=1e-4)
    assert (classifier.preset.mean, classifier.preset.std) == IMAGENET


FAILING = {
    "undefined_name": "NameError: name 'undefined_name' is not defined",
    "None": "returns a NoneType",
    "self.cnn(x[:, :, :1, :1].flatten(1))": "RuntimeError",
    "self.head(embedding).softmax(1)": "softmax",
    "self.head(embedding).sigmoid()": "sigmoid",
    "x": "tensor of 1 x 3 x 64 x 64",
    "self.cnn(x.mean(1, keepdim=True))": "channels",
}


@pytest.mark.parametrize("result", FAILING)
def test_a_forward_that_fails_or_returns_no_logits_shows_the_error_itself(result, own, saved):
    fault = refusal(saved({"state_dict": own_state(), "input_size": 64}), arch=own(result))
    assert FAILING[result] in fault
    assert ("pass another --input-size" in fault) == ("RuntimeError" in FAILING[result])
    assert ("for grey photos" in fault) == (FAILING[result] == "channels")


def test_of_an_embedding_and_logits_those_with_the_number_of_classes_are_taken(own, saved):
    path, arch = saved(own_state()), own("(embedding, self.head(embedding))")
    assert "or pass --num-classes" in refusal(path, arch=arch)
    assert len(load(path, arch=arch, num_classes=2).class_names) == 2


@pytest.mark.parametrize(
    "text", ["def Net(): return 5", "def Net(): 1 / 0", "raise SystemExit(3)", "def other(): 0"]
)
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
        assert (classifier.preset.mean, classifier.preset.std) == IMAGENET
        assert torch.equal(classifier.model.mean, state["mean"])
    assert load(saved({"model": state, "mean": [0.5, 0.5, 0.5]}), arch=arch).preset.mean == [
        0.5,
        0.5,
        0.5,
    ]


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
    assert re.search("resnet18.*download.*--ckpt", refusal(arch="resnet18"))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("arch", [None, "squeezenet1_1", "mnasnet0_5", "googlenet", "inception_v3"])
def test_without_a_checkpoint_torchvisions_weights_and_names_are_used(arch, fake_download):
    options = {"aux_logits": True} if arch in WITH_AUXILIARY_HEADS else {}
    model = network(arch or "resnet50", classes=1000, **options)
    fake_download(model)
    classifier = load_classifier(arch, device="cpu")
    assert classifier.arch == (arch or "resnet50")
    assert (
        list(classifier.class_names)
        == get_model_weights(classifier.arch).DEFAULT.meta["categories"]
    )
    assert "pass --" not in classifier.describe()
    assert_same_logits(classifier, model, side=96)
    assert re.search(r"--num-classes\D*2\b.*\b1000 classes", refusal(arch=arch, num_classes=2))


def test_1000_classes_without_names_are_imagenets(saved):
    classifier = load(saved(network("squeezenet1_1", classes=1000).state_dict()))
    assert (
        list(classifier.class_names)
        == get_model_weights("squeezenet1_1").DEFAULT.meta["categories"]
    )


# The device, and memory


NO_GPU = {
    "Torch not compiled with CUDA enabled": "not compiled with CUDA",
    "Found no NVIDIA driver on your system. Please check\nmore": "no CUDA GPU found",
    "The NVIDIA driver on your system is too old (found version 11040)\nmore": "too old",
    "No CUDA GPUs are available": "No CUDA GPUs are available",
}


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that there are this many CUDA GPUs and that each use of one fails with this message."""

    def pretend(count, message):
        zeros = torch.zeros

        def fail(*args, device=None, **kwargs):
            if str(device).startswith("cuda"):
                raise RuntimeError(message)
            return zeros(*args, device=device, **kwargs)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch, "zeros", fail)

    return pretend


@pytest.mark.parametrize("message", NO_GPU)
def test_it_is_told_why_a_gpu_is_not_used(message, cuda, saved):
    cuda(0, message)
    device, why = find_device(None)
    assert device.type == "cpu" and NO_GPU[message] in why and "\n" not in why
    assert load_classifier(ckpt=saved(state18())).describe().endswith(f"cpu ({why})")
    with pytest.raises(CallError, match=f"cuda:1.*{NO_GPU[message]}"):
        find_device("cuda:1")
    assert find_device("cpu") == (torch.device("cpu"), "")


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", "toaster", "cuda:x"])
def test_a_device_that_does_not_exist_is_refused_first(device, tmp_path):
    message = refusal(tmp_path / "missing.pth", device=device)
    assert device in message and "cpu" in message


MISSING_MEMORY = {
    "CUDA out of memory. Tried to allocate 2 GiB": True,
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried": True,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": True,
    "GET was unable to find an engine to execute this computation": False,
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED": False,
}


@pytest.mark.parametrize("message", MISSING_MEMORY)
def test_only_missing_memory_makes_batches_smaller(message):
    def square(items):
        if len(items) > 2:
            raise RuntimeError(message)
        return [item**2 for item in items]

    batches = BatchSize(8)
    if MISSING_MEMORY[message]:
        assert [each for batch in batches.run(square, range(10)) for each in batch] == [
            i**2 for i in range(10)
        ]
        assert batches.size == 2
    else:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            list(batches.run(square, range(10)))
