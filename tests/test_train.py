"""The training script: the parts of the algorithm, what a run records, how it fails."""

import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import dit
import sample
import train_mnist
from conftest import FAST, TINY, TINY_SIZE, refused, tensors_equal
from diffusion import PREDICTIONS, GaussianDiffusion
from dit import DiT
from support import data, loggers, pictures, registry, replay
from support.checkpoint import build, checkpoints_in, load, read_metrics
from support.command import UserError
from support.compute import StepRandom, generator, seed_of, set_learning_rates
from train_mnist import (
    PRESETS, RECIPE, draw_timesteps, ema_decay_at, make_optimizers, schedule, training_step,
)



def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(folder))]


def args_of(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**RECIPE, **PRESETS["cpu"], **changes})


def tiny(seed: int = 0) -> DiT:
    """Every weight of it matters."""
    torch.manual_seed(seed)
    model = DiT(**TINY_SIZE)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def batch(n: int = 8) -> tuple:
    """x0, t, y, eps."""
    torch.manual_seed(1)
    return (torch.rand(n, 1, 28, 28) * 2 - 1, torch.arange(n) * 120, torch.arange(n) % 11,
            torch.randn(n, 1, 28, 28))


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The (x0, t, y, eps) of every call of the loss."""
    found, honest = [], GaussianDiffusion.loss

    def loss(self, model, x0, t, y, eps):
        found.append((x0, t, y, eps))
        return honest(self, model, x0, t, y, eps)

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    return found


# ---------------------------------------------------------------- the parts of the algorithm


def test_schedule_and_the_warm_up_of_the_ema():
    factors = [schedule(step, 100, 10, 0.4) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10:60] == [1.0] * 50
    assert factors[60:] == pytest.approx([k / 40 for k in range(40, 0, -1)])
    assert schedule(0, 100, 0, 0.0) == schedule(99, 100, 0, 0.0) == 1.0
    assert [ema_decay_at(step, 0.25) for step in range(4)] == pytest.approx([0.1, 2 / 11, .25, .25])
    assert ema_decay_at(1789, 0.995) < 0.995 == ema_decay_at(1790, 0.995)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, args = DiT(**TINY_SIZE), args_of(lr=0.003, muon_lr=0.04, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer, kinds in (("adamw", ["AdamW"]), ("muon", ["AdamW", "BatchedMuon"])):
        args.optimizer = optimizer
        optimizers = make_optimizers(model, args)
        assert [type(o).__name__ for o in optimizers] == kinds
        found = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in optimizers]
        assert sorted(sum(found, [])) == sorted(names.values())
    assert sorted(found[1]) == [
        f"blocks.{i}.{name}.weight" for i in range(2)
        for name in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")]
    (adamw,), (muon,) = (o.param_groups for o in optimizers)
    assert (adamw["lr"], adamw["betas"], adamw["weight_decay"]) == (0.003, (0.9, 0.99), 0.1)
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.04, 0.95, 0.1)


@pytest.mark.parametrize("clip, share", [(float("inf"), 1), (1e-3, None), (1e9, 1)])
def test_gradients_are_clipped_to_a_norm(clip, share):
    model = tiny()
    before, opt = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=1.0)
    loss, norm = training_step(model, copy.deepcopy(model), [opt], GaussianDiffusion(), clip,
                               *batch(), 0.5)
    moved = sum((a - b).square().sum() for a, b in zip(model.parameters(), before.parameters(),
                                                       strict=True)).sqrt().item()
    assert moved == pytest.approx(norm.item() if share else clip, rel=1e-3)
    assert loss.shape == (8,) and norm > 1e-2 and not loss.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_with_its_rates_in_tensors_is_the_same_bit_for_bit(optimizer):
    found = []
    for in_tensors in (False, True):
        model = tiny()
        ema, optimizers = copy.deepcopy(model), make_optimizers(model, args_of(
            optimizer=optimizer, weight_decay=0.1))
        for group in (g for opt in optimizers * in_tensors for g in opt.param_groups):
            group.update(initial_lr=group["lr"], lr=torch.tensor(group["lr"], dtype=torch.float64))
        for step in range(4):
            set_learning_rates(optimizers, schedule(step, 4, 2, 0.5))
            decay = ema_decay_at(step, 0.9)
            training_step(model, ema, optimizers, GaussianDiffusion(), 1.0, *batch(),
                          torch.tensor(decay, dtype=torch.float64) if in_tensors else decay)
            model.zero_grad()
        assert optimizers[0].param_groups[0]["lr"] == 0.5 * RECIPE["lr"]
        found.append([model.state_dict(), ema.state_dict(),
                      [opt.state_dict()["state"] for opt in optimizers]])
    assert tensors_equal(*found) and not tensors_equal(found[0][0], tiny().state_dict())


# ---------------------------------------------------------------- a GPU that is not there


CUDA = torch.device("cuda")


def fake_loop(monkeypatch, precision: str, **flags) -> list:
    """One step of `train` on torch's fake tensors, which have a device, shapes and types, but no
    numbers: an operation that mixes devices or would wait for the GPU raises. (Backward needs a
    real device: gradients come from nowhere.) Returns what is logged."""
    args = args_of(**flags)
    with unset_fake_temporarily():
        diffusion = GaussianDiffusion(prediction=args.prediction, weighting="v")
    with CUDA:
        model, ema = DiT(**TINY_SIZE), DiT(**TINY_SIZE)
        images = data.ImageSet(torch.zeros(40, 1, 28, 28, dtype=torch.uint8),
                               torch.zeros(40, dtype=torch.int64), list("0123456789"), "x")

    def backward(loss):
        assert loss.shape == () and loss.device.type == "cuda" and loss.requires_grad
        for p in model.parameters():
            p.grad = torch.randn_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(replay, "Replayed", lambda step, *rest: lambda *inputs: step(
        *(x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.float64, device=CUDA)
          for x in inputs)))
    optimizers, logged = make_optimizers(model, args), []
    optimizers[0].param_groups[0].update(fused=False)           # its kernel takes no fake tensors
    batches = data.Batches(images, 4, 0, CUDA)
    batches.index = lambda step: torch.zeros(4, dtype=torch.int64, device=CUDA)
    rng = SimpleNamespace(uniform=lambda: torch.rand(4, device=CUDA),
                          normal=lambda *shape: torch.randn(4, *shape, device=CUDA))
    run = SimpleNamespace(
        args=args, device=CUDA, precision=precision, compiled=False, random=lambda step: rng,
        steps=lambda: iter([0, 1]),
        replayed=lambda step: replay.replayed_step(step, optimizers, CUDA),
        log=lambda **numbers: logged.append(numbers))
    train_mnist.train(model, ema, optimizers, diffusion.to(CUDA), batches, run)
    return logged


@pytest.mark.parametrize("flags", [
    dict(precision="bf16"), dict(precision="fp32", optimizer="adamw", timesteps="uniform"),
    dict(precision="bf16", prediction="eps", timesteps="logit-normal", clip=0.0),
    dict(precision="fp32", prediction="v", weight_decay=0.1),
])
@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
def test_a_training_step_mixes_no_devices_and_waits_for_nothing(monkeypatch, flags):
    with FakeTensorMode(allow_non_fake_inputs=True):
        logged = fake_loop(monkeypatch, **flags)
    assert len(logged) == 2
    for numbers in logged:
        assert {numbers[key].device.type for key in ("loss", "t", "grad_norm")} == {"cuda"}


# ---------------------------------------------------------------- random numbers


def test_a_seed_gives_the_weights_the_order_and_the_noise_of_always(train, calls, monkeypatch):
    """Numbers of the first version, on images that do not depend on a font: a change here changes
    every run of every reader."""
    def draw(count, seed=0):
        images = (torch.arange(100 * 784) * 37 % 256).to(torch.uint8).view(100, 1, 28, 28)
        return data.ImageSet(images, torch.arange(100) % 10, list("0123456789"), "glyphs")

    monkeypatch.setattr(data, "draw_glyphs", draw)
    train("--model", "DiT-Nano/7", "--steps", 4, "--stop-after", 2, "--batch-size", 16,
          "--warmup", 1, "--prediction", "v", "--precision", "fp32", "--out", "run")
    weights = load("run/step_0000000.pt", full=True)["model"].values()
    assert sum(w.double().abs().sum() for w in weights).item() == pytest.approx(43504.935, rel=1e-6)
    assert losses("run") == pytest.approx([0.539072, 0.5647563], rel=1e-4)


def test_seeds_and_steps_do_not_collide():
    def first(seed, step):
        return torch.randn(4, generator=generator("cpu", seed, "step", step)).tolist()

    assert first(3, 5) == first(3, 5)
    assert first(3, 6) != first(4, 5)                   # seed + step is the same
    assert first(3, 5) != first(3 + 2**32, 5)           # a CPU generator ignores the high bits
    assert len({seed_of(s, "step", k) for s in range(50) for k in range(50)}) == 2500


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_labels_are_dropped_to_the_null_class_with_the_given_probability(train, calls, share):
    train("--steps", 4, "--batch-size", 64, "--label-dropout", share)
    dropped = (torch.cat([y for _, _, y, _ in calls]) == 10).float().mean().item()
    assert dropped == share if share in (0, 1) else abs(dropped - share) < 0.12


def test_timesteps_are_drawn_as_the_flag_says():
    diffusion = GaussianDiffusion()
    rng = StepRandom("cpu", 0, 0, 100_000, slice(None))
    for kind, ends in ("uniform", 0.2), ("logit-normal", 0.028):    # 2 P(z < log(1/9)) = 0.028
        t = draw_timesteps(diffusion, rng, args_of(timesteps=kind))
        assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000
        assert abs(((t < 100) | (t >= 900)).float().mean() - ends) < 0.005
        assert abs(t.float().mean() - 499.5) < 3                    # as often above as below
    t = draw_timesteps(diffusion, rng, args_of(noise_mean=-0.5, noise_std=0.7))
    level = (diffusion.sigma[t] / diffusion.alpha[t]).log()
    assert abs(level.mean() + 0.5) < 0.01 and abs(level.std() - 0.7) < 0.01


def test_flip_mirrors_half_of_the_images_and_changes_nothing_else(train, calls):
    for flags in [(), ("--flip",)]:
        train("--steps", 4, "--batch-size", 64, "--out", f"run{len(flags)}", *flags)
    mirrored = 0
    for (x0, *others), (x0_flipped, *same) in zip(calls[:4], calls[4:], strict=True):
        assert tensors_equal(others, same)
        for a, b in zip(x0, x0_flipped, strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            mirrored += not torch.equal(a, b)
    assert 0.38 < mirrored / 256 < 0.62


# ---------------------------------------------------------------- what a run records


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_row_is_what_the_step_computed(train, calls, prediction):
    """Every number of metrics.jsonl from the checkpoint before the step, by formulas of our own."""
    train("--steps", 6, "--batch-size", 8, "--prediction", prediction, "--weighting", "v",
          "--timesteps", "uniform", "--precision", "fp32", "--decay", 0.5, "--warmup", 3, "--lr",
          0.003, "--log-every", 4, "--save-every", 1, "--keep", 9, "--out", "run")
    rows = read_metrics(Path("run"))
    assert len(rows) == len(calls) == 6
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
    for k, (row, (x0, t, y, eps), factor) in enumerate(zip(
            rows, calls, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3], strict=True)):
        model, _ = build(load(Path(f"run/step_{k:07d}.pt"), full=True), "model")
        alpha, sigma = bar[t].sqrt().view(-1, 1, 1, 1), (1 - bar[t]).sqrt().view(-1, 1, 1, 1)
        xt = alpha * x0 + sigma * eps
        out = model(xt.float(), t, y)
        x0_hat = {"eps": (xt - sigma * out) / alpha, "v": alpha * xt - sigma * out,
                  "x0": out}[prediction]
        eps_hat = (xt - alpha * x0_hat) / sigma
        loss = ((x0_hat - x0) / sigma.clamp(min=0.05)).square().mean(dim=(1, 2, 3))
        loss.mean().backward()
        wanted = dict(step=k + 1, loss=loss.mean().item(), lr=0.003 * factor,
                      loss_eps=(eps_hat - eps).square().mean().item(),
                      grad_norm=sum(p.grad.square().sum() for p in model.parameters()).item()**0.5)
        for i in range(4):
            if (inside := t // 250 == i).any():
                wanted[f"loss_q{i + 1}"] = loss[inside].mean().item()
        assert row == pytest.approx(wanted, rel=1e-3)
    assert 0 < sum(f"loss_q{i + 1}" not in row for i in range(4) for row in rows) < 12


def test_the_ema_is_that_of_the_weights_in_the_checkpoints(train):
    train("--steps", 4, "--ema-decay", 0.15, "--save-every", 1, "--keep", 9, "--out", "run")
    states = [load(path, full=True) for path in checkpoints_in(Path("run"))]
    assert tensors_equal(states[0]["ema"], states[0]["model"])
    for k, decay in enumerate([0.1, 0.15, 0.15, 0.15]):
        for name, after in states[k + 1]["ema"].items():
            before, now = states[k]["ema"][name], states[k + 1]["model"][name]
            torch.testing.assert_close(after, decay * before + (1 - decay) * now)
    assert not torch.equal(states[0]["ema"]["final_layer.linear.weight"],
                           states[4]["ema"]["final_layer.linear.weight"])


def test_a_preview_is_drawn_with_the_ema_a_class_per_row(train):
    train("--steps", 30, "--seed", 3, "--lr", 0.01, "--ema-decay", 0.9, "--out", "run")
    found, labels = Image.open("run/samples/step_0000030.png"), np.arange(10).repeat(6)
    pages = [pictures.grid(sample.generate(sample.load("run", weights=weights), labels, seed=3)
                           .as_subclass(torch.Tensor), 6) for weights in ("ema", "model")]
    assert [found.tobytes() == page.tobytes() for page in pages] == [True, False]


def test_intervals_write_what_they_say(train):
    train("--steps", 8, "--out", "run", "--preview-every", 3, "--save-every", 2, "--keep", 2)
    assert [p.name for p in checkpoints_in(Path("run"))] == ["step_0000006.pt", "step_0000008.pt"]
    assert sorted(p.name for p in Path("run/samples").iterdir()) == [
        f"step_000000{k}.png" for k in (3, 6, 8)]
    assert not list(Path("run").glob(".*"))


def test_the_loss_falls_on_a_handful_of_images(train):
    train("--steps", 80, "--lr", 5e-3, "--muon-lr", 0.05, "--ema-decay", 0.9)
    row = losses("output/001-glyphs-DiT-Test-7")
    assert row[0] > 0.8 and sum(row[-10:]) / 10 < 0.6 * row[0]


# ---------------------------------------------------------------- flags


CHANGES = {     # flags that change what the steps compute, each with a value that is no default
    "model": "DiT-Nano/7", "prediction": "eps", "label_dropout": 0.9, "batch_size": 4,
    "optimizer": "adamw", "lr": 0.05, "muon_lr": 0.5, "warmup": 4, "decay": 1.0, "clip": 0.01,
    "weight_decay": 2.0, "seed": 5, "precision": "fp32", "image_size": 14, "flip": True,
    "timesteps": "uniform", "noise_mean": -1.0, "noise_std": 0.1, "weighting": "min-snr",
    "network": "other", "process": "other",
}
KEEPS = {       # flags that do not
    "log_every": 2, "preview_every": 2, "save_every": 1, "keep": 1, "data_dir": "elsewhere",
    "stop_after": 4, "device": "cpu", "ema_decay": 0.5,
}
BASE = ("--lr", 0.01, "--steps", 4, "--precision", "bf16", "--warmup", 1)


class OtherDiT(DiT):
    """A network with an argument of its own."""

    def __init__(self, share: float = 0.1, **arguments):
        super().__init__(**arguments)
        self.share = share

    def forward(self, x, t, y):
        return super().forward(x, t, y) + self.share * x


class Doubled(GaussianDiffusion):
    def loss(self, *args):
        return 2 * super().loss(*args)


@pytest.fixture
def others(monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "other", OtherDiT)
    monkeypatch.setitem(registry.PROCESSES, "other", Doubled)


@pytest.mark.parametrize("key", [*CHANGES, "none of these"])
def test_these_flags_change_a_step_and_the_others_do_not(train, trained, others, monkeypatch, key):
    monkeypatch.setitem(dit.MODELS, "DiT-Nano/7", dict(TINY_SIZE, hidden_size=32))
    wanted = losses(trained(*BASE, out="base").parent)
    given = {key: CHANGES[key]} if key in CHANGES else KEEPS
    words = [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", v)[:1 + (
        v is not True)]]
    assert train(*BASE, "--out", "run", *words) == 0
    recipe = load(checkpoints_in(Path("run"))[-1], full=True)["config"]["recipe"]
    assert all(recipe.get(k, v) == v for k, v in given.items())
    assert (losses("run") == wanted) == (key not in CHANGES)


def test_the_default_weighting_is_the_predictions(train):
    for i, (flags, weighting) in enumerate([
            ([], "v"), (["--prediction", "eps"], "plain"),
            (["--prediction", "eps", "--weighting", "v"], "v")]):
        train("--steps", 1, "--out", f"run{i}", *flags)
        assert sample.load(f"run{i}").diffusion.weighting == weighting


def test_a_network_with_an_argument_of_its_own_trains_resumes_and_samples(
        train, others, monkeypatch):
    monkeypatch.setitem(dit.MODELS, TINY, dict(TINY_SIZE, share=0.25))
    flags = ("--network", "other", "--process", "other", "--steps", 6)
    train(*flags, "--out", "straight")
    train(*flags, "--out", "run", "--stop-after", 3)
    assert load("run/step_0000003.pt")["config"]["model"]["share"] == 0.25
    assert train("--resume", "--out", "run") == 0 and losses("run") == losses("straight")
    model = sample.load("run").model
    assert type(model) is OtherDiT and model.share == 0.25
    monkeypatch.delitem(registry.NETWORKS, "other")
    with pytest.raises(UserError, match="network 'other' is unknown here: dit"):
        sample.load("run")


def test_three_channels_one_class_and_any_size(train):
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Path("pets", name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 16), tuple(c + i for c in colour)).save(f"pets/{name}/{i}.png")
    flags = ("--image-size", 14, "--steps", 2, "--preview-every", 2)
    train("--dataset", "folder:pets", *flags, "--out", "run")
    state = load("run/step_0000002.pt")
    assert state["config"]["model"]["in_channels"] == 3 and state["class_names"] == ["blue", "red"]
    Path("one").mkdir()
    Path("pets/red").rename("one/all")
    assert train("--dataset", "folder:one", *flags, "--out", "one-run") == 0
    assert sample.generate(sample.load("one-run"), ["all"], cfg_scale=2.0).shape == (1, 3, 14, 14)


# ---------------------------------------------------------------- what goes wrong on the way


def test_without_mnist_glyphs_are_used_and_named_but_not_for_who_named_it(
        train, monkeypatch, capsys):
    def fail(*_):
        raise UserError("mnist cannot be downloaded (no network)")

    monkeypatch.setattr(data, "load_torchvision", fail)
    flags = ("--model", TINY, "--batch-size", 4, "--steps", 1)
    given = dict(model=TINY, batch_size=4, steps=1)
    for named in (("--dataset", "mnist"), ("--data-dir", "there")):
        assert "no network" in refused(train_mnist.main, *flags, *named)
    assert not Path("output").exists()
    assert train_mnist.main([*map(str, flags)]) == 0
    out = capsys.readouterr().out
    assert "NO MNIST" in out and "GLYPHS" in out
    config = load("output/001-glyphs-DiT-Test-7/step_0000001.pt")["config"]
    assert config["data"]["dataset"] == config["recipe"]["dataset"] == "glyphs"
    assert config["recipe"].items() >= (PRESETS["cpu"] | given).items()     # this device's preset
    assert train_mnist.main(["--resume", "--steps", "2"]) == 0          # goes on with glyphs


@pytest.mark.parametrize("log_every, bad", [(5, 7), (1, 1), (100, 3)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
        train, monkeypatch, log_every, bad):
    honest, count = GaussianDiffusion.loss, 0

    def loss(self, *args):
        nonlocal count
        count += 1
        return honest(self, *args) * (math.nan if count == bad else 1)

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    with pytest.raises(UserError, match=f"not finite at step {bad}:") as caught:
        train("--steps", 20, "--log-every", log_every, "--save-every", 4, "--out", "run")
    assert caught.value.status == 1 and len(losses("run")) == bad - 1
    for path in checkpoints_in(Path("run")):
        state = load(path, full=True)                                   # checks that it is finite
        assert state["step"] < bad


def test_a_gradient_that_is_not_finite_stops_the_run(train, monkeypatch):
    honest = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: honest(*a) * math.inf)
    with pytest.raises(UserError, match="not finite at step 1:"):
        train("--steps", 5)


# ---------------------------------------------------------------- loggers


def test_tensorboard_gets_every_row_and_preview_and_a_resumed_run_continues(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train("--steps", 8, "--stop-after", 4, "--out", "run", "--logger", "tensorboard",
          "--preview-every", 2)
    train("--resume", "--out", "run")
    found = EventAccumulator("run/tensorboard").Reload()
    for key in ("loss", "loss_eps", "grad_norm", "lr", "loss_q1"):
        wanted = [(row["step"], row[key]) for row in read_metrics(Path("run")) if key in row]
        logged = [(event.step, event.value) for event in found.Scalars(key)]
        assert [step for step, _ in logged] == [step for step, _ in wanted]
        assert [v for _, v in logged] == pytest.approx([v for _, v in wanted], rel=1e-6)
    assert [image.step for image in found.Images("preview")] == [2, 4, 6, 8]


def test_wandb_gets_the_rows_offline_and_a_resumed_run_has_its_id(train, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train("--steps", 4, "--stop-after", 2, "--out", "run", "--logger", "wandb")
    train("--resume", "--out", "run")
    wandb.teardown()                            # its process has written everything
    files = sorted(Path("run/wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.parent)
    assert len(files) == 2 and files[0].name == files[1].name           # run-ID.wandb
    rows = read_metrics(Path("run"))
    for file, found in zip(files, (rows[:2], rows[2:]), strict=True):
        content = file.read_bytes()
        assert all(repr(value).encode() in content for row in found for value in row.values())
        assert b"preview" in content


@pytest.mark.parametrize("fails", ["log", "preview", "close"])
def test_a_logger_that_fails_is_told_once_and_training_goes_on(train, trained, monkeypatch, capsys,
                                                              fails):
    class Odd:
        def __getattr__(self, method):
            def call(*args):
                if method == fails:
                    raise ValueError("the server is away\nsince noon")
            return call

    trained("--steps", 6, out="straight")
    monkeypatch.setattr(loggers, "open_logger", lambda *_: Odd())
    capsys.readouterr()
    assert train("--steps", 6, "--out", "run", "--log-every", 2, "--logger", "wandb") == 0
    assert losses("run") == losses("straight")
    assert capsys.readouterr().err.count("warning: --logger failed") == 1


def test_a_logger_that_is_not_installed_is_named(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(train_mnist.main, *FAST, "--logger", "wandb")
