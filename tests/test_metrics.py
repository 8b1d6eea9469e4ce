"""Section 6, Metrics: each metric by hand on a network of one formula, and against grad-cam's."""

import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CKPT, DOG
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import nn

from cnn_visualizations import (
    Explainer,
    faithfulness,
    impute,
    load_classifier,
    probabilities,
    read_photo,
)


class Corner(nn.Module):
    """The first logit is an eighth of the sum over the upper left quarter, the second is 0."""

    def forward(self, x):
        evidence = x[:, 0, : x.shape[2] // 2, : x.shape[3] // 2].sum((1, 2)) / 8
        return torch.stack([evidence, torch.zeros_like(evidence)], 1)


class Sigmoid(Corner):
    def forward(self, x):
        return super().forward(x)[:, 0]


def p(pixels):
    """The probability of the first class of Corner for an input of that many ones in the corner."""
    return 1 / (1 + math.exp(-pixels / 8))


def area(curve):
    """The area under a curve whose points lie side by side at equal distances, from 0 to 1."""
    return (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)


pytestmark = pytest.mark.usefixtures("one_thread")
ONES = torch.ones(1, 3, 8, 8)
CORNER = np.zeros((8, 8), np.float32)
CORNER[:4, :4] = 1


@pytest.mark.parametrize("model", [Corner(), Sigmoid()])
def test_a_map_of_all_the_evidence_and_nothing_else(model):
    values = faithfulness(Explainer(model, guided=False), ONES, CORNER, 0)
    assert list(values) == ["average_drop", "increase", "deletion", "insertion", "road"]
    assert values["average_drop"] == 0
    assert values["increase"] == 0
    # In 16 steps of 4 pixels: the hottest 16 hold all evidence; they are gone (or there) after 4.
    deletion = area([p(max(16 - 4 * step, 0)) for step in range(17)])
    insertion = area([p(min(4 * step, 16)) for step in range(17)])
    assert values["deletion"] == pytest.approx(deletion, abs=1e-5)
    assert values["insertion"] == pytest.approx(insertion, abs=1e-5)


def test_a_map_of_none_of_the_evidence():
    values = faithfulness(Explainer(Corner(), guided=False), ONES, 1 - CORNER, 0)
    deletion = area([p(min(64 - 4 * step, 16)) for step in range(17)])

    assert values["average_drop"] == pytest.approx((p(16) - 0.5) / p(16), abs=1e-5)
    assert values["increase"] == 0
    assert values["deletion"] == pytest.approx(deletion, abs=1e-5)


def test_a_map_with_a_batch_dimension_is_the_same_map():
    explainer = Explainer(Corner(), guided=False)

    assert faithfulness(explainer, ONES, CORNER[None], 0) == faithfulness(
        explainer, ONES, CORNER, 0
    )


def test_independent_labels_are_measured_by_their_own_sigmoid():
    """The second logit is always 0: of two classes it has 1 - p(16), as a label of its own 0.5."""
    labels = Explainer(Corner(), guided=False, multi_label=True)

    assert faithfulness(labels, ONES, CORNER, 1)["deletion"] == pytest.approx(0.5)
    assert faithfulness(labels, ONES, CORNER, 0)["average_drop"] == 0


def test_a_map_that_hides_what_lowers_the_score_increases_the_probability():
    inputs = ONES.clone()
    cam = CORNER.copy()
    inputs[:, :, :2] = -1
    cam[:2] = 0
    values = faithfulness(Explainer(Corner(), guided=False), inputs, cam, 0)

    assert values["average_drop"] == 0
    assert values["increase"] == 1


def test_pixels_are_removed_in_the_order_of_their_heat_and_equal_ones_from_the_top():
    """In a photo of 2 x 2, the upper left pixel is the evidence and the second hottest."""
    cam = np.array([[0.5, 1.0], [0.5, 0.0]], np.float32)
    values = faithfulness(Explainer(Corner(), guided=False), 8 * ONES[..., :2, :2], cam, 0)

    assert values["deletion"] == pytest.approx(area([p(8), p(8), p(0), p(0), p(0)]), abs=1e-5)
    assert values["insertion"] == pytest.approx(area([p(0), p(0), p(8), p(8), p(8)]), abs=1e-5)


@pytest.mark.parametrize("value", [0, 1])
def test_a_map_that_is_the_same_everywhere_has_finite_metrics(value):
    cam = np.full((8, 8), value, np.float32)
    values = faithfulness(Explainer(Corner(), guided=False), ONES, cam, 0)

    assert all(map(math.isfinite, values.values()))
    assert values["average_drop"] == pytest.approx(0 if value else 1 - 0.5 / p(16), abs=1e-5)
    assert abs(values["road"]) < 0.01


def test_missing_pixels_become_the_mean_of_their_neighbours():
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32), (3, 30, 40))
    island = np.ones((30, 40), bool)
    edges = np.zeros((30, 40), bool)
    island[5:25, 8:30] = False
    edges[:, [0, -1]] = True

    for kept in (island, edges):
        filled = impute(ramp, kept)
        assert filled.shape == (3, 30, 40)
        assert filled.dtype == np.float32
        # a plane is its own mean; what is left is the noise of 0.01
        assert np.abs(filled - ramp).max() < 0.1
        assert np.abs(filled - ramp).max() > 0.01
        np.testing.assert_array_equal(filled[:, kept], ramp[:, kept])

    np.testing.assert_array_equal(impute(ramp, np.ones((30, 40), bool)), ramp)


def test_probabilities_are_softmax_or_sigmoid():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    logits = torch.tensor([[1.0, 3.0]])
    softmax = probabilities(logits)
    labels = probabilities(logits, multi_label=True)
    single = probabilities(logits[:, :1])

    np.testing.assert_allclose(softmax, [[sigmoid(-2), sigmoid(2)]], rtol=1e-6)
    np.testing.assert_allclose(labels, [[sigmoid(1), sigmoid(3)]], rtol=1e-6)
    np.testing.assert_allclose(single, [[sigmoid(1)]], rtol=1e-6)


@cache
def explained():
    classifier = load_classifier(ckpt=CKPT, device="cpu", input_size=129)
    inputs = classifier.preprocess(read_photo(DOG))[None]
    explainer = Explainer(classifier.model, ["gradcam", "layercam"], guided=False)
    explanation = explainer(inputs, top=2)
    return SimpleNamespace(inputs=inputs, explainer=explainer, explanation=explanation)


@pytest.mark.parametrize(
    ("method", "column"), [("gradcam", 0), pytest.param("layercam", 1, marks=pytest.mark.slow)]
)
def test_road_equals_grad_cam(method, column):
    demo = explained()
    cam = demo.explanation.cams[method][:, column]
    target = int(demo.explanation.targets[0, column])
    torch.manual_seed(0)
    road = ROADCombined(percentiles=[20, 40, 60, 80])
    wanted = [ClassifierOutputSoftmaxTarget(target)]
    theirs = float(road(demo.inputs, cam, wanted, demo.explainer.network)[0])
    ours = faithfulness(demo.explainer, demo.inputs, cam[0], target)["road"]

    assert ours == pytest.approx(theirs, abs=0.02)  # both add noise of their own


@pytest.mark.parametrize("share", [20, 60, 90])
def test_imputation_equals_grad_cam(share):
    cam = explained().explanation.cams["gradcam"][0, 0]
    kept = cam < np.percentile(cam, share)
    inputs = explained().inputs[0]
    theirs = NoisyLinearImputer(noise=0)(inputs, torch.from_numpy(kept).float()).numpy()
    difference = np.abs(impute(inputs.numpy(), kept) - theirs)[:, ~kept]

    # The mean absolute value of noise with a standard deviation of 0.01 is 0.008.
    assert 0.007 < difference.mean() < 0.009
    assert difference.max() < 0.06
