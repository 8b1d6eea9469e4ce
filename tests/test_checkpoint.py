"""Sections 3 and 4: checkpoints as people save them, held against the network that was saved."""

import argparse
import functools
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import (
    IMAGENET,
    NAMES,
    PHOTO,
    STATE,
    assert_same_logits,
    load,
    logits_of,
    network,
    refusal,
    resnet18,
    under,
)
from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import InterpolationMode, functional

from cnn_visualizations import true_class

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def saved(tmp_path):
    """Return a function that writes a checkpoint and returns its path."""

    def save(content, name="best.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


# Pickled networks


class Own(nn.Module):
    """A network of somebody's own around a torchvision backbone."""

    def __init__(self, head, backbone=None):
        super().__init__()
        self.backbone = backbone or headless("resnet18")
        self.head = head

    def forward(self, x):
        return self.head(self.backbone(x))


def headless(arch, **options):
    model = network(arch, **options)
    model.fc = nn.Identity()
    return model


def randomised(module):
    """Return a head whose batch norms have statistics, in eval mode."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return module.eval()


def with_schedule(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "args": argparse.Namespace(lr=np.float64(0.1), classes=NAMES),
        "history": {"loss": np.arange(5.0), "best": np.float32(0.3)},
    }


WRAPPINGS = {
    "alone": lambda model: model,
    "DataParallel": nn.DataParallel,
    "in a dict": lambda model: {"epoch": 3, "net": model},
    "with the training beside": with_schedule,
    "compiled": torch.compile,
}


WHOLE = ["alexnet", "vgg11_bn", "convnext_tiny", "mobilenet_v3_small", "squeezenet1_1", "googlenet"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in a dict"])
@pytest.mark.parametrize("arch", WHOLE)
def test_a_pickled_network_of_another_kind_is_read(arch, wrapped, saved):
    model = network(arch)
    path = saved({"model": model} if wrapped else model)
    assert_same_logits(load(path), model)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.filterwarnings("ignore")
def test_a_pickled_network_is_read(wrapping, saved):
    classifier = load(saved(WRAPPINGS[wrapping](network("resnet18"))))
    assert classifier.arch == "resnet18"
    assert_same_logits(classifier, resnet18())


def test_the_options_of_a_pickled_namespace_are_entries(saved):
    classifier = load(saved(with_schedule(network("resnet18"))))
    assert list(classifier.class_names) == NAMES
    assert "from args in best.pth" in classifier.describe()


class AttributeDict(dict):
    """A dict of another library, as Lightning's."""


def test_subclasses_of_dict_are_read_as_dicts(saved):
    options = AttributeDict(input_size=96, mean=(0.1, 0.2, 0.3))
    classifier = load(saved({"state_dict": STATE, "hyper_parameters": options}))
    assert classifier.input_size == (96, 96)
    assert classifier.preset.mean == [0.1, 0.2, 0.3]


def test_numpy_values_are_read_as_numbers(saved):
    values = {"input_size": np.int64(96), "mean": np.array([0.1, 0.2, 0.3]), "std": [np.float32(1)]}
    classifier = load(saved({"state_dict": STATE, "meta": values}))
    assert classifier.input_size == (96, 96)
    assert classifier.preset.mean == [0.1, 0.2, 0.3]
    assert classifier.preset.std == [1, 1, 1]


class Ran:
    """What a hostile file does when it is loaded without care: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return compile_and_run, (f"import os; os.mkdir({str(self.path)!r})",)


def compile_and_run(text):
    exec(text)


def test_what_a_file_names_is_not_run(saved, tmp_path):
    content = {"state_dict": STATE, "extra": Ran(tmp_path / "ran")}
    pickle.loads(pickle.dumps(Ran(tmp_path / "control")))
    assert (tmp_path / "control").exists()

    assert_same_logits(load(saved(content)), resnet18())
    assert not (tmp_path / "ran").exists()


CHANGED = {
    "stride": lambda model: setattr(model.conv1, "stride", (1, 1)),
    "activation": lambda model: setattr(model, "relu", nn.LeakyReLU()),
    "pooling": lambda model: setattr(model, "maxpool", nn.Identity()),
    "eps": lambda model: setattr(model.layer1[0].bn1, "eps", 1e-3),
    "added": lambda model: model.layer1.add_module("up", nn.Upsample(scale_factor=2)),
}
NAMED = {
    "stride": "conv1",
    "activation": "relu",
    "pooling": "maxpool",
    "eps": "layer1.0.bn1",
    "added": "layer1.up",
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_pickled_network_with_another_layer_is_refused_by_name(change, saved):
    model = network("resnet18")
    CHANGED[change](model)
    assert f": {NAMED[change]} " in refusal(saved(model))


def test_another_activation_in_a_part_of_the_head_that_was_kept_is_refused(saved):
    model = network("vgg11")
    model.classifier[1] = nn.Tanh()
    assert ": classifier.1 is a Tanh" in refusal(saved(model))


def test_a_pickled_network_without_a_layer_is_refused(saved):
    model = network("vgg11")
    del model.features[20]
    assert "features.20, a MaxPool2d" in refusal(saved(model))


class Scaled(nn.Module):
    """A layer without tensors."""

    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("place", [0, 1], ids=["in front", "behind"])
@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.Upsample(scale_factor=2), Scaled()])
def test_a_layer_beside_a_pickled_backbone_is_refused(layer, place, saved):
    layers = [network("resnet18")]
    layers.insert(place, layer)
    message = refusal(saved(nn.Sequential(*layers)))
    assert f": {place} is a {type(layer).__name__} beside the backbone" in message


def test_the_first_line_says_that_a_wrapper_is_not_read(saved):
    line = load(saved(Own(nn.Linear(512, 5)).eval())).describe()
    assert "the forward pass of Own is not read" in line


# Files that would cost too much


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """Write an archive anew, with each record changed by `change(name, content)`."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    return path


def test_a_compressed_archive_is_refused(saved):
    path = rewritten(saved(STATE), lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_records_that_overlap_in_the_file_are_refused(saved):
    path = saved(STATE)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"best/data/0") - 46  # in the directory at the end of the file
    huge = (2**31 - 1).to_bytes(4, "little")
    data[entry + 20 : entry + 28] = huge + huge
    path.write_bytes(data)
    assert "add up to more than the file" in refusal(path)


def test_a_changed_bit_is_noticed(saved):
    path = saved(STATE)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "damaged" in refusal(path)


def test_a_structure_that_is_too_large_is_refused(saved, monkeypatch):
    monkeypatch.setattr("cnn_visualizations.MAX_PICKLE_BYTES", 1000)
    assert "MB beside the tensors" in refusal(saved(STATE))


def test_too_many_values_are_refused(saved, monkeypatch):
    monkeypatch.setattr("cnn_visualizations.MAX_PICKLE_STEPS", 1000)
    assert "too many values" in refusal(saved(STATE))


def test_a_tensor_that_is_larger_than_its_data_is_refused(saved):
    state = {**STATE, "fc.weight": torch.ones(1, 1).expand(10**6, 512)}
    assert "fc.weight is larger than its data" in refusal(saved(state))


def test_too_many_steps_in_the_old_format_are_refused(saved, monkeypatch):
    monkeypatch.setattr("cnn_visualizations.MAX_PICKLE_STEPS", 1000)
    path = saved(STATE, _use_new_zipfile_serialization=False)
    assert "too many values" in refusal(path)


class Hiding:
    """Pickled as an OrderedDict with a number in the place of a method."""

    def __reduce__(self):
        return OrderedDict, (), {"items": 5}


def test_a_dict_that_hides_its_methods_is_one_line(saved):
    message = refusal(saved({"state_dict": STATE, "extra": Hiding()}))
    assert "not a whole checkpoint" in message


def test_dicts_nested_without_end_are_one_line(saved):
    content = {"w": torch.ones(3, 3)}
    for _ in range(400):
        content = {"k": content}
    assert "no weights" in refusal(saved(content))


# Heads


HEADS = {
    "two layers": lambda n: [nn.Linear(n, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5)],
    "three layers": lambda n: [
        nn.Linear(n, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    ],
    "norm first": lambda n: [nn.BatchNorm1d(n), nn.Dropout(), nn.Linear(n, 5)],
    "layer norm": lambda n: [nn.LayerNorm(n), nn.Linear(n, 5)],
    "norm between": lambda n: [nn.Linear(n, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5)],
}


def make_head(kind, inputs):
    torch.manual_seed(0)
    return randomised(nn.Sequential(*HEADS[kind](inputs)))


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_several_layers_is_built_from_a_state_dict(kind, saved):
    model = network("resnet18")
    model.fc = make_head(kind, 512)
    classifier = load(saved(model.state_dict()))
    assert_same_logits(classifier, model)

    sizes = [str(m.out_features) for m in model.fc if isinstance(m, nn.Linear)]
    line = classifier.describe()
    assert f"-> {sizes[-1]}" in line
    assert ("(ReLU assumed)" in line) == (len(sizes) > 1)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_beside_the_backbone_is_built(kind, saved):
    model = Own(make_head(kind, 512)).eval()
    assert_same_logits(load(saved(model.state_dict())), model)


@pytest.mark.parametrize("arch", ["vgg11", "mobilenet_v2", "densenet121", "convnext_tiny"])
def test_a_classifier_of_several_layers_is_built(arch, saved):
    def change(model):
        linear = next(m for m in model.classifier.modules() if isinstance(m, nn.Linear))
        layers = HEADS["two layers"](linear.in_features)
        model.classifier = nn.Sequential(nn.Flatten(1), *layers)

    model = network(arch, change=change)
    assert_same_logits(load(saved(model.state_dict())), model)


def test_several_layers_in_the_place_of_the_last_one_are_built(saved):
    def change(model):
        model.classifier[3] = nn.Sequential(*HEADS["two layers"](1024))

    model = network("mobilenet_v3_small", change=change)
    assert_same_logits(load(saved(model.state_dict())), model)


EXACT = [nn.Identity(), nn.LeakyReLU(0.3), nn.GELU(), nn.Tanh(), nn.Hardswish()]


@pytest.mark.parametrize("activation", EXACT, ids=lambda layer: type(layer).__name__)
def test_a_pickled_head_tells_its_activation(activation, saved):
    model = network("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 64), activation, nn.Linear(64, 5))
    classifier = load(saved(model.eval()))
    assert_same_logits(classifier, model)
    assert "assumed" not in classifier.describe()


def test_layers_of_nested_sequentials_are_in_order(saved):
    model = network("resnet18")
    inner = nn.Sequential(nn.Linear(512, 64), nn.LeakyReLU(0.3))
    model.fc = nn.Sequential(inner, nn.Dropout(), nn.Linear(64, 5))
    classifier = load(saved(model.eval()))
    assert_same_logits(classifier, model)
    assert "assumed" not in classifier.describe()


@pytest.mark.parametrize("function", [nn.Sigmoid(), nn.Softmax(1)])
def test_a_sigmoid_or_softmax_inside_a_head_is_refused(function, saved):
    model = network("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 64), function, nn.Linear(64, 5))
    assert "fc.1 is not at the end" in refusal(saved(model.eval()))


class Variant(ResNet):
    """A subclass whose forward is not known."""


def test_a_pickled_subclass_of_a_torchvision_network_is_refused(saved):
    model = Variant(BasicBlock, [2, 2, 2, 2], num_classes=5)
    assert "the network is a Variant" in refusal(saved(model))


def test_the_order_of_layers_in_safetensors_is_not_guessed(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "best.safetensors"
    backbone = under("backbone.", headless("resnet18").state_dict())

    numbered = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 5))
    model = Own(numbered).eval()
    safetensors.save_file(backbone | under("head.", numbered.state_dict()), path)
    assert_same_logits(load(path), model)

    named = {"neck.weight": torch.ones(512), "neck.bias": torch.ones(512)}
    head = under("a.", nn.Linear(512, 5).state_dict())
    safetensors.save_file(backbone | named | head, path)
    assert "the order of the layers a and neck is not in the file" in refusal(path)


@pytest.mark.parametrize("inside", [{"model": 0}, {}], ids=["in a dict", "alone"])
def test_a_pickled_head_that_ends_in_sigmoids_has_labels(inside, saved):
    model = network("resnet18")
    model.fc = nn.Sequential(nn.Linear(512, 5), nn.Sigmoid())
    model.eval()
    content = {"model": model} if inside else model
    classifier = load(saved(content))
    assert classifier.multi_label
    assert "5 labels" in classifier.describe()
    expected = logits_of(model)
    torch.testing.assert_close(
        logits_of(classifier.model).sigmoid(), expected, rtol=1e-4, atol=1e-5
    )


def test_imagenets_layer_that_was_left_beside_an_own_head_is_not_used(saved):
    backbone = network("resnet18", classes=1000)
    head = nn.Linear(512, 3)
    content = under("backbone.", backbone.state_dict()) | under("head.", head.state_dict())
    classifier = load(saved(content))
    assert "head 512 -> 3 instead of fc with its 1000 outputs" in classifier.describe()

    backbone.fc = head
    assert_same_logits(classifier, backbone)


BEHIND_OR_BETWEEN = {
    "GeM pooling": {"pool.p": torch.ones(1)},
    "GeM pooling of one number": {"average_pool.p": torch.tensor(3.0)},
    "prototypes": {"centers": torch.ones(5, 512)},
    "ArcFace": {"metric_fc.weight": torch.ones(5, 5)},
    "attention": {"attention.weight": torch.ones(1, 512, 1, 1)},
    "second head": {"age.weight": torch.ones(7, 512), "age.bias": torch.ones(7)},
    "prelu": {"act.weight": torch.ones(512)},
    "embedding": {"embed.weight": torch.ones(10, 16)},
    "a layer norm of another size": {"norm.weight": torch.ones(7), "norm.bias": torch.ones(7)},
}


@pytest.mark.parametrize("kind", BEHIND_OR_BETWEEN)
@pytest.mark.parametrize("place", ["beside", "within"])
def test_a_tensor_that_is_not_used_is_refused_by_name(kind, place, saved):
    extra = BEHIND_OR_BETWEEN[kind]
    content = under("net.", STATE) | extra
    if place == "within":
        content = STATE | extra
    name = next(iter(extra)).partition(".")[0]
    message = refusal(saved(content))
    assert name in message
    assert "net.py:build" in message


def test_pooling_that_was_changed_is_named(saved):
    model = network("resnet18")
    model.fc = nn.Linear(1024, 5)
    message = refusal(saved(model.state_dict()))
    assert "takes 1024 values, but resnet18 gives 512; was its pooling changed?" in message


def test_a_head_that_is_saved_twice_is_one_head(saved):
    model = network("densenet121", change=lambda m: setattr(m, "classifier", nn.Linear(1024, 5)))
    content = {"arch": "densenet121", "classifier": model.classifier, "state": model.state_dict()}
    assert_same_logits(load(saved(content)), model)


# Inputs


def test_a_network_for_grey_photos_gets_them_grey(saved):
    model = network("resnet18", change=lambda m: setattr(m, "conv1", nn.Conv2d(1, 64, 7, 2, 3)))
    del model.conv1.bias
    model.conv1.register_parameter("bias", None)
    classifier = load(saved({"state_dict": model.state_dict(), "mean": [0.3], "std": [0.2]}))
    inputs = classifier.preprocess(PHOTO)
    transforms = get_model_weights("resnet18").DEFAULT.transforms(mean=[0.3], std=[0.2])
    torch.testing.assert_close(inputs, transforms(Image.fromarray(PHOTO).convert("L")))
    with torch.no_grad():
        torch.testing.assert_close(classifier.model(inputs[None]), model(inputs[None]))
    assert ", grey, short side 256" in classifier.describe()


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_refused(channels, saved):
    state = {**STATE, "conv1.weight": torch.ones(64, channels, 7, 7)}
    assert f"takes {channels} input channels" in refusal(saved(state))


def test_an_input_that_is_not_square(saved):
    classifier = load(saved(STATE), input_size=(64, 128), resize="squash")
    inputs = classifier.preprocess(PHOTO)
    small = functional.resize(Image.fromarray(PHOTO), [64, 128], antialias=True)
    expected = functional.normalize(functional.pil_to_tensor(small) / 255, *IMAGENET)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-6)


def test_the_short_side_before_the_crop(saved):
    classifier = load(saved(STATE), resize=256)
    inputs = classifier.preprocess(PHOTO)
    expected = get_model_weights("resnet18").DEFAULT.transforms(resize_size=256)
    torch.testing.assert_close(inputs, expected(Image.fromarray(PHOTO)))
    assert "short side 256, centre 224 x 224" in classifier.describe()
    assert "less than the input's 224" in refusal(saved(STATE), resize=200)


def test_a_photo_of_the_inputs_size_is_used_as_it_is(saved):
    classifier = load(saved(STATE), input_size=96)
    photo = PHOTO[:96, :96]
    expected = functional.normalize(torch.from_numpy(photo).movedim(2, 0) / 255, *IMAGENET)
    torch.testing.assert_close(classifier.preprocess(photo), expected)
    assert classifier.seen_box(96, 96) == (0, 0, 96, 96)
    assert classifier.seen_box(96, 97) != (0, 0, 97, 96)
    assert load(saved(STATE), input_size=96, resize=110).seen_box(96, 96) != (0, 0, 96, 96)


def test_an_input_size_that_is_the_heads_is_not_believed(saved):
    content = {"arch": "resnet18", "input_size": 512, "state_dict": STATE}
    classifier = load(saved(content))
    assert classifier.input_size == (224, 224)
    assert (
        "the input_size 512 from best.pth is the head's number of inputs" in classifier.describe()
    )
    assert load(saved({**content, "input_size": (512, 512)})).input_size == (512, 512)


OPTIONS = {
    "args": argparse.Namespace(val_crop_size=96, val_resize_size=110),
    "config": {"img_size": 96},
    "hyper_parameters": {"image_size": [96, 96]},
    "meta": {"input_size": (3, 96, 96)},
}


@pytest.mark.parametrize("place", OPTIONS)
def test_entries_are_found_where_training_scripts_put_them(place, saved):
    classifier = load(saved({"model": STATE, place: OPTIONS[place]}))
    assert classifier.input_size == (96, 96)
    assert classifier.preset.resize_size == [110]
    assert f"(from {place} in best.pth)" in classifier.describe()


# Scores and classes


def test_labels_are_read_by_a_sigmoid_each(saved):
    path = saved({"state_dict": STATE, "multi_label": True})
    assert "5 labels" in load(path).describe()
    assert load(path).multi_label
    assert not load(saved(STATE)).multi_label
    assert load(saved(STATE), multi_label=True).multi_label
    assert "5 classes" in load(path, multi_label=False).describe()


def test_the_first_line_names_up_to_ten_classes(saved):
    assert "5 classes (0 ant, 1 Bee" in load(saved(STATE), class_names=NAMES).describe()
    many = network("resnet18", classes=11).state_dict()
    assert "11 classes, softmax" in load(saved(many), class_names=list("abcdefghijk")).describe()


def test_folders_name_the_classes_where_nothing_else_does(saved):
    path = saved(STATE)
    folders = ["10", "2", "1", "3", "4"]
    classifier = load(path, folders=folders)
    assert classifier.class_names == ("1", "10", "2", "3", "4")
    assert "ImageFolder's order" in classifier.describe()
    assert load(path, folders=folders[:4]).class_names[0] == "class 0"
    assert load(path, folders=folders, class_names=NAMES).class_names == tuple(NAMES)


TRUTHS = {
    ("photos/cat/1.jpg", "photos"): 2,
    ("photos/CAT/night/1.jpg", "photos"): 2,
    ("photos/dog/cat/1.jpg", "photos"): 2,
    ("cat/photos/x/1.jpg", "cat/photos"): None,
    ("photos/4/1.jpg", "photos"): None,
    ("cat/1.jpg", ""): 2,
}


@pytest.mark.parametrize(("path", "top"), TRUTHS)
def test_the_nearest_folder_that_is_a_class_is_the_truth(path, top):
    assert true_class(path, NAMES, top) == TRUTHS[path, top]


# Networks of one's own


OWN = """
import torch
from torch import nn
from torchvision.models import resnet18

class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.cnn = resnet18(num_classes=outputs)
    def forward(self, x):
        y = self.cnn(x)
        return {result}

def build():
    return {wrapped}
"""


@pytest.fixture
def own(tmp_path):
    """Return a function that writes a network of one's own and returns its --arch value."""

    def write(result="y", outputs=3, wrapped="Net({outputs})"):
        text = OWN.format(result=result, wrapped=wrapped.format(outputs=outputs))
        (tmp_path / "net.py").write_text(text)
        return f"{tmp_path / 'net.py'}:build"

    return write


@functools.cache
def own_state(outputs):
    return under("cnn.", network("resnet18", classes=outputs).state_dict())


ENDS = [
    "torch.sigmoid(y).squeeze(1)",
    "torch.sigmoid(y).view(-1)",
    "torch.sigmoid(y)[:, 0]",
    "torch.sigmoid(y).clamp(1e-6, 1 - 1e-6)",
    "torch.stack([y.sigmoid(), y.sigmoid()]).mean(0)",
]


@pytest.mark.parametrize("result", ENDS)
def test_a_sigmoid_behind_other_operations_is_found(result, own, saved):
    message = refusal(saved(own_state(1)), arch=own(result, 1), input_size=64)
    assert "ends in a sigmoid" in message


SOFTMAXES = [
    "y.softmax(1).clamp(1e-6, 1)",
    "y.softmax(1).view(len(y), -1)",
    "y.exp() / y.exp().sum(1, keepdim=True)",
    "torch.stack([y.softmax(1), y.softmax(1)]).mean(0)",
]


@pytest.mark.parametrize("result", SOFTMAXES)
def test_a_softmax_behind_other_operations_is_found(result, own, saved):
    assert "ends in a softmax" in refusal(saved(own_state(3)), arch=own(result), input_size=64)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("result", ["y.squeeze()", "y.sum(0)", "y[0]"])
def test_an_answer_without_the_batch_dimension_is_refused(result, outputs, own, saved):
    arch = own(result, outputs)
    message = refusal(saved(own_state(outputs)), arch=arch, input_size=64)
    assert "batch dimension" in message


def test_a_network_that_answers_by_chance_is_refused(own, saved):
    arch = own("nn.functional.dropout(y)")  # which is on by default
    message = refusal(saved(own_state(3)), arch=arch, input_size=64)
    assert "different answers for the same input" in message


WRAPPED = ["nn.DataParallel(Net({outputs}))", "torch.compile(Net({outputs}))"]


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers_are_taken_off(wrapped, outputs, own, saved):
    classifier = load(saved(own_state(outputs)), arch=own(outputs=outputs, wrapped=wrapped))
    expected = logits_of(network("resnet18", classes=outputs))
    found = logits_of(classifier.model)
    if outputs == 1:
        torch.testing.assert_close(found.softmax(1)[:, 1:], expected.sigmoid())
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_script_module_is_refused(own):
    arch = own(wrapped="torch.jit.script(nn.Linear(3, 3))")
    assert "ScriptModule" in refusal(arch=arch)


@pytest.mark.parametrize("kind", ["pretrained_cfg", "attributes"])
def test_a_network_tells_its_preprocessing(kind, own, saved, tmp_path):
    settings = {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    if kind == "attributes":
        lines = "\n".join(f"Net.{name} = {value}" for name, value in settings.items())
    else:
        lines = f"Net.pretrained_cfg = {settings}"
    arch = own()
    text = (tmp_path / "net.py").read_text()
    (tmp_path / "net.py").write_text(f"{text}\n{lines}\n")

    classifier = load(saved(own_state(3)), arch=arch)
    assert classifier.input_size == (96, 96)
    assert classifier.preset.mean == [0.1, 0.2, 0.3]
    assert "from the network's" in classifier.describe()
    assert load(saved(own_state(3)), arch=arch, input_size=64).input_size == (64, 64)
    assert load(saved({"s": own_state(3), "input_size": 80}), arch=arch).input_size == (80, 80)


def test_timms_share_of_the_crop_and_interpolation_are_used(own, saved, tmp_path):
    arch = own()
    settings = {"input_size": (3, 96, 96), "crop_pct": 0.8, "interpolation": "bicubic"}
    text = (tmp_path / "net.py").read_text()
    (tmp_path / "net.py").write_text(f"{text}\nNet.pretrained_cfg = {settings}\n")

    inputs = load(saved(own_state(3)), arch=arch).preprocess(PHOTO)
    small = functional.resize(Image.fromarray(PHOTO), 120, InterpolationMode.BICUBIC)
    expected = functional.pil_to_tensor(functional.center_crop(small, 96)) / 255
    torch.testing.assert_close(inputs, functional.normalize(expected, *IMAGENET))


def test_a_tensor_that_an_own_network_does_not_have_is_refused(own, saved):
    state = own_state(3) | {"neck.weight": torch.ones(3, 3)}
    assert "neck.weight" in refusal(saved(state), arch=own())


# Layouts of other libraries


LAYOUTS = {
    "conv_stem.weight": "timm's",
    "vit.embeddings.cls_token": "Hugging Face's",
    "_conv_stem.weight": "efficientnet_pytorch's",
    "model.0.conv.weight": "ultralytics'",
    "4.0.conv1.weight": "Sequential of a network's children",
    "0.4.0.conv1.weight": "fastai's",
    "roi_heads.box.weight": "classifier",
}


@pytest.mark.parametrize("key", LAYOUTS)
def test_the_layout_of_another_library_is_named(key, saved):
    message = refusal(saved({key: torch.ones(8, 3, 3, 3)}))
    assert LAYOUTS[key] in message
    assert '--arch net.py:build, see "Another network" in the README' in message
