"""The program on a CUDA GPU; tests/test_explanation.py compares the methods. Else skipped."""

import numpy as np
import pytest
import torch
from conftest import files_in, last_records, paint, pixels

from cnn_visualizations import Explainer, load_classifier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_a_checkpoint_is_loaded_onto_the_gpu(tiny, device):
    classifier = load_classifier(ckpt=tiny[0], device=device)
    tensors = {tensor.device.type for tensor in classifier.model.state_dict().values()}
    explanation = Explainer(classifier.model)(torch.zeros(1, 3, 64, 64))  # inputs on the CPU

    assert classifier.device.type == "cuda"
    assert tensors == {"cuda"}
    assert type(explanation.cams["gradcam"]) is type(explanation.guided) is np.ndarray


def test_the_program_writes_the_cpus_pictures_and_records(explain, tmp_path):
    for seed in range(5):
        paint(tmp_path / "album" / f"{seed}.png", seed)

    options = ["--format", "png", "--method", "gradcam,scorecam", "--metrics"]
    options += ["--target-class", "owl"]
    for device in ("cpu", "cuda"):
        result = explain(*options, "--device", device, tmp_path / "album", output=tmp_path / device)
        assert result.status == 0
        assert result.stderr.splitlines()[0].endswith(device)

    assert files_in(tmp_path / "cuda") == files_in(tmp_path / "cpu")
    for name in files_in(tmp_path / "cpu"):
        difference = np.abs(pixels(tmp_path / "cuda" / name) - pixels(tmp_path / "cpu" / name))
        assert difference.mean() < 1, name

    of_gpu = last_records(tmp_path / "cuda")
    for key, of_cpu in last_records(tmp_path / "cpu").items():
        probability = of_gpu[key]["prediction"]["probability"]
        assert probability == pytest.approx(of_cpu["prediction"]["probability"], abs=1e-3)
        for metrics, expected in zip(of_gpu[key]["metrics"], of_cpu["metrics"], strict=True):
            assert metrics == pytest.approx(expected, abs=0.02)


def test_a_run_on_the_gpu_gives_the_same_files_again(explain, tmp_path):
    photo = paint(tmp_path / "1.png", 1)
    for folder in ("first", "second"):
        explain("--device", "cuda", "--format", "png", photo, output=tmp_path / folder)

    for name in files_in(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
