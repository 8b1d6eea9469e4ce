"""What needs a CUDA GPU. Without one these tests are skipped."""

import numpy as np
import pytest
import torch
from conftest import CKPT, DOG

from cnn_visualizations import METHODS, Explainer, load_classifier, read_photo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def inputs():
    return load_classifier(ckpt=CKPT, device="cpu").preprocess(read_photo(DOG))[None]


def test_the_checkpoint_goes_onto_the_gpu_by_default():
    classifier = load_classifier(ckpt=CKPT)
    assert {tensor.device.type for tensor in classifier.model.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize("method", METHODS)
def test_the_maps_are_those_of_the_cpu(method, inputs):
    found = {}
    for device in ("cpu", "cuda"):
        found[device] = Explainer(load_classifier(ckpt=CKPT, device=device).model, method)(inputs, [13])
    np.testing.assert_allclose(found["cuda"].cams[method], found["cpu"].cams[method], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found["cuda"].logits, found["cpu"].logits, rtol=0, atol=1e-3)
    scale = np.abs(found["cpu"].guided).max()
    np.testing.assert_allclose(found["cuda"].guided / scale, found["cpu"].guided / scale, rtol=0, atol=1e-3)


def test_the_settings_of_torch_are_left_as_they_were(inputs):
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    Explainer(load_classifier(ckpt=CKPT, device="cuda").model)(inputs)
    assert (cudnn.deterministic, cudnn.benchmark) == before
