"""Room 5, trust: each metric by hand on a network of one formula, and against torch-cam's and grad-cam's own."""

import contextlib
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CKPT, DOG
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import nn

from cnn_visualizations import (
    METRICS,
    Explainer,
    curve_masks,
    impute,
    load_classifier,
    measure_trust,
    probabilities,
    read_photo,
)


class Corner(nn.Module):
    """The first class is spoken for by the upper left quarter of the first channel, the second by nothing."""

    def forward(self, x):
        height, width = x.shape[2:]
        evidence = x[:, 0, : height // 2, : width // 2].sum((1, 2)) / 8
        return torch.stack([evidence, torch.zeros_like(evidence)], 1)


class Sigmoid(Corner):
    def forward(self, x):
        return super().forward(x)[:, 0]


def chance(pixels):
    """The probability of the first class of Corner for an input of that many ones in the corner."""
    return 1 / (1 + math.exp(-pixels / 8))


def area(curve):
    return float(torch.trapezoid(torch.tensor(curve, dtype=torch.float64), dx=1 / (len(curve) - 1)))


ONES = torch.ones(1, 3, 8, 8)


def corner_map():
    cam = np.zeros((8, 8), np.float32)
    cam[:4, :4] = 1
    return cam


@pytest.fixture(scope="module")
def explained():
    """The demo network, its input, and the maps of two methods and two classes."""
    classifier = load_classifier(ckpt=CKPT, device="cpu")
    inputs = classifier.preprocess(read_photo(DOG))[None]
    explainer = Explainer(classifier.model, ["gradcam", "fem"], guided=False)
    return SimpleNamespace(model=classifier.model, inputs=inputs, explainer=explainer, found=explainer(inputs, top=2))


CASES = [("gradcam", 0), ("gradcam", 1), ("fem", 0)]


def case(explained, method, column):
    return explained.found.cams[method][0, column], int(explained.found.targets[0, column])


# By hand


@pytest.mark.parametrize("model", [Corner(), Sigmoid()])
def test_a_map_of_all_the_evidence_and_nothing_else(model):
    values = measure_trust(Explainer(model, guided=False), ONES, corner_map(), 0)
    assert tuple(values) == METRICS
    assert values["average_drop"] == 0
    assert values["increase"] == 0
    # In 16 steps of 4 pixels: the hottest 16 pixels hold all evidence, and they are gone (or there) after 4 steps.
    deletion = [chance(max(16 - 4 * step, 0)) for step in range(17)]
    insertion = [chance(min(4 * step, 16)) for step in range(17)]
    assert values["deletion"] == pytest.approx(area(deletion), abs=1e-5)
    assert values["insertion"] == pytest.approx(area(insertion), abs=1e-5)


def test_a_map_of_none_of_the_evidence():
    values = measure_trust(Explainer(Corner(), guided=False), ONES, 1 - corner_map(), 0)
    assert values["average_drop"] == pytest.approx((chance(16) - 0.5) / chance(16), abs=1e-5)
    assert values["increase"] == 0
    deletion = [chance(min(64 - 4 * step, 16)) for step in range(17)]
    assert values["deletion"] == pytest.approx(area(deletion), abs=1e-5)


def test_a_map_that_hides_what_speaks_against_the_class_increases_confidence():
    inputs = ONES.clone()
    inputs[:, :, :2] = -1
    cam = corner_map()
    cam[:2] = 0
    values = measure_trust(Explainer(Corner(), guided=False), inputs, cam, 0)
    assert (values["average_drop"], values["increase"]) == (0, 1)


def test_pixels_come_in_the_order_of_their_heat_and_equal_ones_from_the_top():
    shares, masks = curve_masks(torch.tensor([[0.5, 1.0], [0.5, 0.0]]))
    assert shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert [mask.int().flatten().tolist() for mask in masks] == [
        [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1],
    ]  # fmt: skip


def test_missing_pixels_become_the_mean_of_their_neighbours():
    ramp = torch.arange(40.0).view(1, 1, 1, 40).expand(1, 3, 30, 40).contiguous()
    kept = torch.ones(2, 30, 40, dtype=torch.bool)
    kept[0, 5:25, 8:30] = False
    kept[1] = False
    kept[1, :, 0] = kept[1, :, -1] = True
    filled = impute(ramp, kept)
    assert filled.shape == (2, 3, 30, 40)
    assert (filled - ramp).abs().max() < 0.1  # a plane is its own mean; what is left is the method's noise of 0.01
    assert torch.equal(filled[0][:, kept[0]], ramp[0][:, kept[0]])


def test_the_steps_that_are_taken_solve_the_equations(explained):
    cam = explained.found.cams["gradcam"][0, 0]
    kept = torch.from_numpy(np.stack([cam < np.quantile(cam, share) for share in (0.2, 0.5, 0.9)]))
    difference = (impute(explained.inputs, kept) - impute(explained.inputs, kept, steps=50)).abs()
    assert difference.mean() < 0.001
    assert difference.max() < 0.02


def test_nothing_missing_changes_nothing():
    assert torch.equal(impute(ONES, torch.ones(1, 8, 8, dtype=torch.bool)), ONES)


def test_probabilities_are_softmax_or_sigmoid():
    logits = torch.tensor([[1.0, 3.0]])
    np.testing.assert_allclose(probabilities(logits), [[1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]], rtol=1e-6)
    np.testing.assert_allclose(probabilities(logits[:, :1]), [[1 / (1 + math.exp(-1))]], rtol=1e-6)


def test_the_batch_size_changes_nothing(explained):
    cam, target = case(explained, "gradcam", 0)
    explainers = (Explainer(explained.model, guided=False, batch_size=size) for size in (1, 64))
    one, many = (measure_trust(explainer, explained.inputs, cam, target) for explainer in explainers)
    assert one == pytest.approx(many, abs=1e-4)


# Against others


class Given:
    """An extractor of torch-cam's that has its map already."""

    def __init__(self, model, cam):
        self.model, self._cam = model, torch.from_numpy(cam)[None]

    def __call__(self, *args, **kwargs):
        return [self._cam]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return contextlib.nullcontext()


@pytest.mark.parametrize(("method", "column"), CASES)
def test_drop_increase_deletion_and_insertion_are_torch_cams(explained, method, column):
    cam, target = case(explained, method, column)
    values = measure_trust(explained.explainer, explained.inputs, cam, target)
    torchcam = pytest.importorskip("torchcam.metrics")  # needs Python 3.11
    extractor, softmax = Given(explained.model, cam), partial(torch.softmax, dim=-1)
    classification = torchcam.ClassificationMetric(extractor, softmax)
    curves = torchcam.DeletionInsertionMetric(extractor, softmax, steps=20)
    for metric in (classification, curves):
        metric.update(explained.inputs, target)
    theirs = {**classification.summary(), **curves.summary()}
    assert values["average_drop"] == pytest.approx(theirs["avg_drop"], abs=1e-4)
    assert values["increase"] == theirs["conf_increase"]
    assert values["deletion"] == pytest.approx(theirs["deletion_auc"], abs=1e-4)
    assert values["insertion"] == pytest.approx(theirs["insertion_auc"], abs=1e-4)


@pytest.mark.parametrize(("method", "column"), CASES[1:])
def test_road_is_grad_cams(explained, method, column):
    cam, target = case(explained, method, column)
    ours = measure_trust(explained.explainer, explained.inputs, cam, target)["road"]
    torch.manual_seed(0)
    theirs = ROADCombined(percentiles=[20, 40, 60, 80])(
        explained.inputs, cam[None], [ClassifierOutputSoftmaxTarget(target)], explained.model
    )
    assert ours == pytest.approx(float(theirs[0]), abs=0.02)  # both add noise of their own


@pytest.mark.parametrize("share", [20, 60])
def test_imputation_is_grad_cams(explained, share):
    cam = explained.found.cams["gradcam"][0, 0]
    kept = torch.from_numpy(cam < np.percentile(cam, share))
    theirs = NoisyLinearImputer(noise=0)(explained.inputs[0], kept.float())
    ours = impute(explained.inputs, kept[None])[0]
    difference = (ours - theirs).abs()[:, ~kept]
    assert difference.mean() < 0.012  # of noise with a standard deviation of 0.01 it is 0.008
    assert difference.max() < 0.1
