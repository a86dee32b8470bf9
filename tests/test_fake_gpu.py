"""The CUDA path without a GPU: torch's fake tensors have a device, shapes and types, no numbers. An
operation that mixes devices, or would wait for the GPU, fails. (Backward needs a real device.)"""

import argparse
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_mnist
from diffusion import PREDICTIONS, GaussianDiffusion, classifier_free_guidance
from dit import DiT
from support import state as support_state
from support.data import Batches, ImageSet
from support.run import Metrics
from support.state import TrainingState

CUDA = torch.device("cuda")
SIZES = dict(patch_size=7, hidden_size=16, depth=2, num_heads=2)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Inside: fake tensors; torch.cuda's queries answer as on a GPU with bf16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(copy, "deepcopy", lambda model: new_model())    # not of fake tensors
    before = torch.get_float32_matmul_precision()
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                 # autocast: no CUDA here
        yield
    torch.set_float32_matmul_precision(before)


def new_model() -> DiT:
    with CUDA:
        return DiT(**SIZES)


def new_diffusion(prediction: str) -> GaussianDiffusion:
    """On the fake GPU, but with the float64 schedule of the CPU as real numbers."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        real = GaussianDiffusion(prediction=prediction).alpha_bar.tolist()
    diffusion = GaussianDiffusion(prediction=prediction, weighting="v").to(CUDA)
    diffusion.alpha_bar_at = lambda t: real[t] if t >= 0 else 1.0
    diffusion.ddim_timesteps = lambda steps: [999, 500, 0]
    return diffusion


def arguments(**values) -> argparse.Namespace:
    return argparse.Namespace(**{
        **train_mnist.RECIPE, **train_mnist.PRESETS["gpu"], "grad_accum": 1, "precision": "bf16",
        "compile": False, "flip": False, **values})


class Random:
    """StepRandom without a generator: CUDA's needs a driver."""

    def uniform(self):
        return torch.rand(4, device=CUDA)

    def normal(self, *shape):
        return torch.randn(4, *shape, device=CUDA)


def train_one_step(args, images_on: str) -> TrainingState:
    images = ImageSet(torch.zeros(40, 1, 28, 28, dtype=torch.uint8, device=images_on),
                      torch.zeros(40, dtype=torch.int64, device=images_on), list("0123456789"), "x")
    model = new_model()
    diffusion = new_diffusion(args.prediction)
    state = TrainingState(model, train_mnist.make_optimizers(model, args), diffusion, args, CUDA)

    def backward(*batch):                       # forward for real, gradients from nowhere
        loss = state.loss(*batch)
        for p in state.model.parameters():
            p.grad = torch.randn_like(p)
        return loss.detach()

    state.backward = backward
    run = SimpleNamespace(args=args, device=CUDA, start=0, stop=50, state=state,
                          random=lambda step: Random())
    metrics = Metrics(run)
    metrics.bar = SimpleNamespace(update=lambda: None)
    run.steps, run.log = lambda: iter([0]), lambda t, **numbers: metrics.record(numbers, t)
    batches = Batches(images, 4, 0, CUDA)
    batches.index = lambda step: torch.zeros(4, dtype=torch.int64, device=images_on)
    train_mnist.train(batches, state, diffusion, run)
    assert metrics.recorded == 1 and metrics.buffer.device.type == "cuda"
    return state


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("timesteps", sorted(train_mnist.TIMESTEPS))
def test_a_training_step_mixes_no_devices(fake_gpu, optimizer, timesteps):
    state = train_one_step(arguments(optimizer=optimizer, timesteps=timesteps), "cuda")
    assert {p.device.type for p in state.ema.parameters()} == {"cuda"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_no_prediction_mixes_devices(fake_gpu, prediction):
    train_one_step(arguments(prediction=prediction), "cuda")


def test_a_step_that_mixes_devices_is_caught(fake_gpu, monkeypatch):
    monkeypatch.setattr(train_mnist, "TIMESTEPS", {
        "uniform": lambda diffusion, rng, args: torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(RuntimeError, match="device"):
        train_one_step(arguments(timesteps="uniform"), "cuda")


def test_a_wait_for_the_gpu_is_caught(fake_gpu, monkeypatch):
    honest = support_state.TrainingState.update

    def update(self, *args):
        norm = honest(self, *args)
        return norm if norm.item() else norm

    monkeypatch.setattr(support_state.TrainingState, "update", update)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        train_one_step(arguments(), "cuda")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler, cfg_scale", [("ddim", 1.5), ("ddpm", 1.5), ("ddim", 1),
                                                ("ddpm", 0)])
def test_sampling_mixes_no_devices_and_waits_for_nothing(fake_gpu, prediction, sampler, cfg_scale):
    model, diffusion = new_model().eval(), new_diffusion(prediction)
    predict = classifier_free_guidance(
        model, torch.zeros(4, dtype=torch.int64, device=CUDA), cfg_scale)
    xT = torch.randn(4, 1, 28, 28, device=CUDA)
    steps = getattr(diffusion, f"{sampler}_sample")(predict, xT)
    for _, (_t, xt, x0_hat) in zip(range(3), steps):                    # noqa: B905
        assert xt.device.type == x0_hat.device.type == "cuda" and xt.shape == xT.shape


def test_the_compiler_is_on_where_it_is_found_and_pays(monkeypatch):
    from support import distributed
    found = [True]

    def check(device):
        if not found[0]:
            raise distributed.UserError("--compile needs a compiler")

    monkeypatch.setattr(distributed, "check_compiler", check)
    cpu, mps = torch.device("cpu"), torch.device("mps")
    long, short = distributed.COMPILE_PAYS, distributed.COMPILE_PAYS - 1

    def chosen(device, steps, wanted=None):
        return distributed.should_compile(wanted, device, steps)

    assert chosen(CUDA, short) and chosen(CUDA, long) and chosen(cpu, long)
    assert not chosen(cpu, short) and not chosen(mps, long)
    assert chosen(cpu, 1, wanted=True) and not chosen(CUDA, long, wanted=False)
    assert train_mnist.PRESETS["cpu"]["steps"] >= long
    found[0] = False
    assert not chosen(CUDA, long) and not chosen(cpu, long)
    with pytest.raises(distributed.UserError):
        chosen(CUDA, 1, wanted=True)
