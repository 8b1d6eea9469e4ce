"""What runs on a GPU, where there is none: a pretended one, whose tensors must not meet the CPU's.

It computes on the CPU, so that its numbers must be the CPU's; it says nothing about CUDA's own kernels or about time.
"""

import copy
from collections import Counter
from concurrent.futures import Future

import cv2
import numpy as np
import pytest
import torch
from conftest import CKPT, DOG
from test_explanation import network, one_thread, photos, quiet_grad_cam  # noqa: F401  (fixtures)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import cnn_visualizations as program_file
from cnn_visualizations import METHODS, MORE_METHODS, Explainer, load_classifier, measure_trust

GPU = torch.device("cuda", 0)
TAKES_BOTH = {"__getitem__", "__setitem__", "copy_", "to"}  # as on a real one
QUESTIONS = {"item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "equal", "allclose"}  # the host waits


class OnGPU(Tensor):
    """A tensor that is said to be on the GPU; what happens to it, the mode decides."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_gpu(result):
    """The result, all of its tensors said to be on the GPU."""

    def tag(tensor):
        tensor._is_param = isinstance(tensor, nn.Parameter)
        tensor.__class__ = OnGPU  # not a new tensor, which would be one more node in the autograd graph
        return tensor

    return tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, OnGPU) else tag(tensor), result)


class PretendedGPU(TorchFunctionMode):
    """Inside `with`, "cuda" is there.

    Attributes:
        waits: how often the host had to wait for the GPU, by the function: a copy from or to the CPU, or a question.
    """

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
        if not ours:
            if name in ("to", "cuda"):
                return self.transferred(name, args, kwargs)
            if torch.device(kwargs.get("device") or "cpu").type != "cuda":
                return function(*args, **kwargs)
            self.waits["to the GPU"] += name in ("tensor", "as_tensor", "asarray")
            return on_gpu(function(*args, **{**kwargs, "device": "cpu"}))
        special = getattr(self, f"on_{name.strip('_')}", None)
        if special:
            return special(function, args, kwargs)
        others = [tuple(tensor.shape) for tensor in tensors if tensor.ndim and not isinstance(tensor, OnGPU)]
        if others and name not in TAKES_BOTH:
            raise RuntimeError(f"{name}: a tensor on the GPU meets one on the CPU, {others}")
        if name in QUESTIONS:
            self.waits[name] += 1
        kwargs.pop("device", None)
        result = function(*args, **kwargs)
        return on_gpu(result) if isinstance(args[0], OnGPU) or name not in TAKES_BOTH else result

    def destination(self, name, args, kwargs):
        """Device (None: where it is) and type that `to`, `cpu` or `cuda` ask for."""
        if name != "to":
            return torch.device(name), args[0].dtype
        if len(args) > 1 and isinstance(args[1], Tensor):
            return (GPU if isinstance(args[1], OnGPU) else torch.device("cpu")), args[1].dtype
        device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        return device, dtype or args[0].dtype

    def moved(self, tensor, device, dtype):
        here = isinstance(tensor, OnGPU)
        there = here if device is None else device.type == "cuda"
        if here == there:
            return on_gpu(tensor.to(dtype)) if here else tensor.to(dtype)
        self.waits["to the CPU"] += here
        copied = tensor.to(dtype).clone()  # nothing that happens to the one is seen in the other
        copied.__class__ = Tensor
        return on_gpu(copied) if there else copied

    def transferred(self, name, args, kwargs):
        before, result = args[0], self.moved(args[0], *self.destination(name, args, kwargs))
        uploaded = isinstance(result, OnGPU) and not isinstance(before, OnGPU)
        self.waits["to the GPU"] += uploaded and not kwargs.get("non_blocking")
        return result

    def on_to(self, function, args, kwargs):
        return self.transferred("to", args, kwargs)

    def on_cpu(self, function, args, kwargs):
        return self.moved(args[0], torch.device("cpu"), args[0].dtype)

    def on_numpy(self, function, args, kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def on_get(self, function, args, kwargs):
        """An attribute."""
        told = {"device": GPU, "is_cuda": True, "is_cpu": False}
        name = function.__self__.__name__
        return told[name] if name in told else on_gpu(function(*args))

    def on_has_compatible_shallow_copy_type(self, function, args, kwargs):
        return False  # a module that moves gets new parameters

    def on_deepcopy(self, function, args, kwargs):
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = on_gpu(tensor.detach().clone().requires_grad_(tensor.requires_grad))
            memo[id(tensor)]._is_param = tensor._is_param
        return memo[id(tensor)]

    def on_register_hook(self, function, args, kwargs):
        tensor, hook = args
        return function(tensor, lambda gradient: hook(on_gpu(gradient)))


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU with ten gigabytes, of which two are free."""
    cuda = {"memory_allocated": 0, "max_memory_allocated": 10**6, "reset_peak_memory_stats": None}
    for name, answer in {**cuda, "mem_get_info": (2 * 10**9, 10**10), "is_available": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    # by which grad-cam makes a leaf of a tensor
    monkeypatch.setattr(torch.autograd, "Variable", lambda t, requires_grad: t.detach().requires_grad_(requires_grad))
    with PretendedGPU() as pretended:
        yield pretended


def test_what_is_pretended_is_as_strict_as_a_gpu(gpu):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert there.device == GPU and there.is_cuda and (there * 2).device == GPU
    with pytest.raises(RuntimeError, match="meets one on the CPU"):
        there + here
    with pytest.raises(RuntimeError, match="meets one on the CPU"):
        nn.Linear(3, 3)(there)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert gpu.waits == {"to the GPU": 0}
    assert there.cpu().device == here.device
    assert bool((there == 1).all())
    assert gpu.waits == {"to the CPU": 1, "__bool__": 1, "to the GPU": 0}
    assert here.to("cuda", non_blocking=True).device == torch.tensor([1], device="cuda").device == here.to(there).device
    assert gpu.waits["to the GPU"] == 2
    assert nn.Linear(3, 3).to("cuda")(there).device == GPU


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "small vit", "small swin", "small convnext"])
@pytest.mark.parametrize("methods", [METHODS, MORE_METHODS], ids=["the seven", "the others"])
def test_every_method_computes_on_the_gpu_and_gives_what_the_cpu_gives(gpu, arch, methods):
    layer = {"resnet18": "layer4", "squeezenet1_1": "features.9"}.get(arch)
    named = [m for m in methods if m != "shapleycam" or not arch.startswith("small")]
    explain = [Explainer(m, named, layer and [layer]) for m in (network(arch), on_the_gpu(network(arch)))]
    assert [explainer.device.type for explainer in explain] == ["cpu", "cuda"]
    of_cpu, of_gpu = (explainer(photos(2), [2, 5]) for explainer in explain)
    for method in named:
        np.testing.assert_allclose(of_gpu.cams[method], of_cpu.cams[method], atol=1e-4)
    np.testing.assert_allclose(of_gpu.guided, of_cpu.guided, atol=1e-4 * np.abs(of_cpu.guided).max())
    np.testing.assert_allclose(of_gpu.logits, of_cpu.logits, rtol=1e-4, atol=1e-5)


def on_the_gpu(model):
    return copy.deepcopy(model).to("cuda")


def test_the_host_waits_once_and_then_takes_the_results(gpu):
    explainer = Explainer(on_the_gpu(network("resnet18")), ["gradcam", "xgradcam", "gradcam++"])
    explainer(photos(1))
    for count in (1, 8):
        gpu.waits.clear()
        explainer(photos(count), [index % 7 for index in range(count)])
        # the inputs - finite? - three maps, gradients, logits, targets
        assert gpu.waits == {"to the GPU": 1, "__bool__": 1, "to the CPU": 6}


@pytest.mark.parametrize(("method", "at_once"), [("ablationcam", "ABLATION_COPIES"), ("scorecam", None)])
def test_the_host_waits_no_more_often_for_many_passes_than_for_few(gpu, monkeypatch, method, at_once):
    waits, passes = [], []
    for size in (4, 256):
        if at_once:
            monkeypatch.setattr(program_file, at_once, size)
        count = Counter()
        model = on_the_gpu(network("resnet18"))
        explainer = Explainer(
            model, [method], ["layer4"], batch_size=size, progress=lambda steps, count=count: counted(steps, count)
        )
        explainer(photos())
        count.clear()
        gpu.waits.clear()
        explainer(photos())
        waits.append(dict(gpu.waits))
        passes.append(count["passes"])
    assert passes[0] > 50 * passes[1] > 0
    assert waits[0] == waits[1]


def counted(steps, count):
    for step in steps:
        count["passes"] += 1
        yield step


def test_score_cam_takes_what_half_of_the_free_memory_takes(gpu):
    explainer = Explainer(on_the_gpu(network("resnet18")), ["scorecam"])
    explainer(photos())
    assert explainer.batch_size == 256
    gpu.waits.clear()


def test_smoothing_and_metrics_compute_on_the_gpu(gpu):
    of_device = []
    for model in (network("resnet18"), on_the_gpu(network("resnet18"))):
        explainer = Explainer(model, ["gradcam"], aug_smooth=True, eigen_smooth=True)
        cam = explainer(photos(), 2).cams["gradcam"]
        gpu.waits.clear()
        of_device.append((cam, measure_trust(explainer, photos(), cam[0], 2)))
    assert gpu.waits == {"to the CPU": 1, "to the GPU": 0}
    (of_cpu, trust_of_cpu), (of_gpu, trust_of_gpu) = of_device
    np.testing.assert_allclose(of_gpu, of_cpu, atol=1e-4)
    assert trust_of_gpu == pytest.approx(trust_of_cpu, abs=1e-3)


class AtOnce:
    """A thread pool that does everything at once in this thread, where the GPU is."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **_):
        pass


@pytest.mark.parametrize("device", ["cuda", "cuda:0", None])
def test_the_checkpoint_goes_onto_the_gpu(gpu, capsys, device):
    classifier = load_classifier(ckpt=CKPT, device=device)
    assert {parameter.device for parameter in classifier.model.parameters()} == {GPU}
    assert capsys.readouterr().err == ""


def test_the_program_computes_on_the_gpu_and_writes_the_cpus_pictures(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(program_file, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(program_file, "has_gpu_driver", lambda: True)
    devices = []
    explain = Explainer.__call__

    def watched(self, *args, **kwargs):
        devices.append(self.device.type)
        return explain(self, *args, **kwargs)

    monkeypatch.setattr(Explainer, "__call__", watched)
    for device in ([], ["--device", "cpu"]):
        words = ["--ckpt", CKPT, "--output", tmp_path / "-".join(device), "--metrics", "--format", "png", *device, DOG]
        assert program_file.main(program_file.parse_args([str(word) for word in words])) == 0
    assert devices == ["cuda", "cpu"]
    assert capsys.readouterr().err == ""
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["gb_dog.png", "gradcam_cam_dog.png", "gradcam_cam_gb_dog.png"]
    for name in names:
        of_gpu, of_cpu = (cv2.imread(str(folder / name)) for folder in (tmp_path, tmp_path / "--device-cpu"))
        assert np.abs(of_gpu.astype(int) - of_cpu).max() <= 2
