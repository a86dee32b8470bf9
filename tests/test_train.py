"""The training script: the algorithm's parts, its flags, what it writes, how it fails."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import dit
import sample
import train_mnist
from conftest import TINY, load, tensors_equal
from diffusion import GaussianDiffusion
from dit import DiT
from support import components, data, run
from support.cli import UserError, run_command
from support.curves import QUARTERS, loss_curve
from support.folders import read_metrics
from support.run import Run
from support.seeds import generator, mix_seed
from support.settings import Settings
from support.state import TrainingState
from train_mnist import PRESETS, RECIPE, make_optimizers, schedule, update_ema

SETTINGS = Settings(RECIPE, PRESETS)


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(folder) / "metrics.jsonl")]


# ---------------------------------------------------------------- the parts of the algorithm


def test_ema_after_one_step_is_the_hand_value_and_includes_that_step():
    ema, model = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before, now = ema.weight.clone(), model.weight.clone()
    update_ema(ema, model, 0.9)
    torch.testing.assert_close(ema.weight, 0.9 * before + 0.1 * now)


def test_ema_decay_warms_up(train, monkeypatch):
    seen = []
    monkeypatch.setattr(train_mnist, "update_ema", lambda ema, model, decay: seen.append(decay))
    train("--steps", 6, "--ema-decay", 0.25)
    assert seen == pytest.approx([0.1, 2 / 11, 0.25, 0.25, 0.25, 0.25])


def test_schedule_rises_stays_and_falls_but_never_reaches_zero():
    factors = [schedule(step, 100, 10, 0.4) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10:60] == [1.0] * 50
    assert factors[60:] == pytest.approx([k / 40 for k in range(40, 0, -1)])
    assert schedule(0, 100, 0, 0.0) == schedule(99, 100, 0, 0.0) == 1.0


def test_every_parameter_is_in_one_optimizer_and_muon_has_the_block_matrices(train):
    model = DiT(patch_size=7, hidden_size=16, depth=2, num_heads=2)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in ("adamw", "muon"):
        args = SETTINGS.resolve({"optimizer": optimizer}, "cpu")
        groups = [[names[id(p)] for g in o.param_groups for p in g["params"]]
                  for o in make_optimizers(model, args)]
        assert sorted(sum(groups, [])) == sorted(names.values())
        assert len(groups) == (2 if optimizer == "muon" else 1)
    assert {name.split(".", 2)[2] for name in groups[1]} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def training_state(model, optimizers, precision) -> TrainingState:
    args = SimpleNamespace(grad_accum=1, precision=precision, compile=False, steps=1)
    return TrainingState(model, optimizers, GaussianDiffusion(), args, torch.device("cpu"))


def scaled_gradients(values: list[float]) -> TrainingState:
    """fp16, with a gradient for the weight of AdamW's and for that of Muon's."""
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2, bias=False),
                                 "blocks": torch.nn.Linear(2, 2, bias=False)})
    args = SETTINGS.resolve({"weight_decay": 0.1}, "cpu")
    state = training_state(model, make_optimizers(model, args), "fp16")
    total = sum((p * value).sum() for p, value in zip(model.parameters(), values, strict=True))
    state.scaler.scale(total).backward()
    return state


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_an_overflow_in_one_optimizer_stops_the_step_of_both(bad, place):
    values = [1.0, 1.0]
    values[place] = bad
    state = scaled_gradients(values)
    before, scale = [p.clone() for p in state.model.parameters()], state.scaler.get_scale()
    state.update(1.0, 1.0)
    assert len(state.optimizers) == 2 and tensors_equal(list(state.model.parameters()), before)
    assert all(p.grad is None for p in state.model.parameters())
    for moment in (m for opt in state.optimizers for s in opt.state.values() for m in s.values()):
        assert not moment.any()
    assert state.scaler.get_scale() == scale / 2                    # tried again with half of it
    state = scaled_gradients([1.0, 1.0])
    before = [p.clone() for p in state.model.parameters()]
    state.update(1.0, 1.0)
    assert not any(map(torch.equal, state.model.parameters(), before))
    assert state.scaler.get_scale() == scale


@pytest.mark.parametrize("clip, left", [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_gradients_are_clipped_to_a_norm_and_0_is_not_at_all(clip, left):
    model = torch.nn.Linear(2, 1, bias=False)
    state = training_state(model, [torch.optim.SGD(model.parameters(), lr=1.0)], "fp32")
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    before = model.weight.detach().clone()
    norm = state.update(1.0, clip)
    step = (before - model.weight.detach()).norm().item()
    assert norm == 5 and step == pytest.approx(left, rel=1e-5)


def spy_on_loss(monkeypatch) -> list[tuple]:
    """Every call's (x0, t, y, eps)."""
    calls, honest = [], GaussianDiffusion.loss

    def loss(self, model, x0, t, y, eps):
        calls.append((x0, t, y, eps))
        return honest(self, model, x0, t, y, eps)

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    return calls


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_labels_are_dropped_to_the_null_class_with_the_given_probability(train, monkeypatch, share):
    calls = spy_on_loss(monkeypatch)
    train("--steps", 4, "--batch-size", 64, "--label-dropout", share)
    y = torch.cat([y for _, _, y, _ in calls])
    dropped = (y == 10).float().mean().item()
    assert dropped == share if share in (0, 1) else abs(dropped - share) < 0.12


def drawn_t(train, monkeypatch, *flags) -> torch.Tensor:
    calls = spy_on_loss(monkeypatch)
    train("--steps", 8, "--batch-size", 1024, *flags)
    t = torch.cat([t for _, t, _, _ in calls])
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000
    return t


@pytest.mark.parametrize("kind, ends", [("uniform", 0.20), ("logit-normal", 0.028)])
def test_timesteps_are_drawn_as_the_flag_says(train, monkeypatch, kind, ends):
    """The share of t below 100 or from 900 on: logit-normal, twice P(z < log(1/9)) = 0.028."""
    t = drawn_t(train, monkeypatch, "--timesteps", kind)
    assert abs(((t < 100) | (t >= 900)).float().mean() - ends) < 0.015
    assert abs(t.float().mean() - 499.5) < 15               # as often above the middle as below


def test_log_normal_timesteps_have_the_mean_and_deviation_of_the_flags(train, monkeypatch):
    t = drawn_t(train, monkeypatch, "--timesteps", "log-normal", "--noise-mean", -0.5,
                "--noise-std", 0.7)
    diffusion = GaussianDiffusion()
    level = (diffusion.sigma[t] / diffusion.alpha[t]).log()
    assert abs(level.mean() + 0.5) < 0.03 and abs(level.std() - 0.7) < 0.03


def test_a_steps_randomness_depends_on_seed_and_step_alone(train, monkeypatch):
    calls = spy_on_loss(monkeypatch)
    for seed, out in [(1, "a"), (1, "b"), (2, "c")]:
        train("--steps", 3, "--seed", seed, "--out", out)
    a, b, c = calls[:3], calls[3:6], calls[6:]
    assert tensors_equal(a, b)
    noises = [eps for _, _, _, eps in a + c]
    assert not any(torch.equal(noises[i], noises[j]) for i in range(6) for j in range(i))
    x0, t, _, eps = a[0]
    assert x0.min() >= -1 and x0.max() <= 1 and t.min() >= 0 and t.max() < 1000
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05


def test_seeds_and_steps_do_not_collide():
    def first(seed, step):
        return torch.randn(4, generator=generator("cpu", seed, "step", step)).tolist()

    assert first(3, 5) == first(3, 5)
    assert first(3, 6) != first(4, 5)                   # seed + step is the same
    assert first(3, 5) != first(3 + 2**32, 5)           # a CPU generator ignores the high bits
    raw = [torch.randn(4, generator=torch.Generator().manual_seed(s)).tolist()
           for s in (3, 3 + 2**32)]
    assert raw[0] == raw[1], "torch no longer ignores the high bits: the hash is still right"
    assert len({mix_seed(s, "step", k) for s in range(50) for k in range(50)}) == 2500


def test_the_loss_falls_on_a_handful_of_images(train):
    train("--steps", 80, "--lr", 5e-3, "--muon-lr", 0.05, "--ema-decay", 0.9)
    row = losses("output/001-glyphs-DiT-Test-7")
    assert row[0] > 0.8 and sum(row[-10:]) / 10 < 0.6 * row[0]


def test_the_ema_lags_behind_the_model_and_both_move(train, checkpoint):
    start, end = load("run/step_0000000.pt"), load(checkpoint)
    moved = [n for n in end["ema"] if not torch.equal(start["ema"][n], end["ema"][n])]
    assert "final_layer.linear.weight" in moved and "pos_embed" not in moved
    assert not torch.equal(end["ema"]["final_layer.linear.weight"],
                           end["model"]["final_layer.linear.weight"])


def test_the_record_reads_nothing_from_the_device(train, monkeypatch):
    """No synchronisation per step: between two log intervals no tensor becomes a number."""
    honest, count = Run.log, 0

    def log(self, **numbers):
        nonlocal count
        count += 1
        if count % 4 == 0:
            return honest(self, **numbers)
        with monkeypatch.context() as m:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
                m.setattr(torch.Tensor, name, lambda *a, n=name: pytest.fail(f"Tensor.{n}"))
            return honest(self, **numbers)

    monkeypatch.setattr(Run, "log", log)
    train("--steps", 7, "--log-every", 4, "--out", "run")
    assert count == 7 == len(losses("run"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_step_waits_for_nothing(train, monkeypatch):
    honest, count = Run.log, 0

    def log(self, **numbers):               # from the end of step 3 to that of step 7
        nonlocal count
        count += 1
        honest(self, **numbers)
        torch.cuda.set_sync_debug_mode("error" if 3 <= count < 7 else "default")

    monkeypatch.setattr(Run, "log", log)
    assert train("--steps", 12, "--log-every", 10, "--device", "cuda", "--out", "run") == 0


# ---------------------------------------------------------------- flags


class OtherDiT(DiT):
    """A network with an argument of its own."""

    def __init__(self, share: float = 0.1, **arguments):
        super().__init__(**arguments)
        self.share = share

    def forward(self, x, t, y):
        return super().forward(x, t, y) + self.share * x


class OtherDiffusion(GaussianDiffusion):
    """A process with an argument of its own."""

    def __init__(self, factor: float = 2.0, **arguments):
        super().__init__(**arguments)
        self.factor = factor

    def loss(self, *args):
        return self.factor * super().loss(*args)


@pytest.fixture
def others(monkeypatch):
    """Another network and another process in the registry."""
    monkeypatch.setitem(components.NETWORKS, "other", OtherDiT)
    monkeypatch.setitem(components.PROCESSES, "other", OtherDiffusion)


CHANGES = {     # flags that change what the steps compute, each with a value that is no default
    "model": "DiT-Nano/7", "prediction": "eps", "label_dropout": 0.9, "batch_size": 4,
    "optimizer": "adamw", "lr": 0.05, "muon_lr": 0.5, "warmup": 4, "decay": 1.0, "clip": 0.01,
    "weight_decay": 2.0, "seed": 5, "precision": "fp32", "image_size": 14, "flip": True,
    "timesteps": "uniform", "noise_mean": -1.0, "noise_std": 0.1, "weighting": "min-snr",
    "network": "other", "process": "other",
}
KEEPS = {       # flags that do not
    "log_every": 2, "preview_every": 2, "save_every": 1, "keep": 1, "data_dir": "elsewhere",
    "stop_after": 4, "device": "cpu", "ema_decay": 0.5, "out": "run2",
}
ELSEWHERE = {"help", "dataset", "steps", "resume", "init_from", "grad_accum", "compile",
             "registers", "celeba_attribute",       # tests/test_variants.py, tests/test_celeba.py
             "config", "logger"}                    # tests/test_training_tools.py


def test_every_flag_is_in_a_test():
    flags = {action.dest for action in SETTINGS.parser()._actions}
    assert flags == set(CHANGES) | set(KEEPS) | ELSEWHERE
    assert set(SETTINGS.defaults("cpu")) | {"help", "resume", "init_from", "out", "stop_after",
                                            "device", "config"} == flags
    assert set(PRESETS["cpu"]) == set(PRESETS["gpu"])


BASE = ("--lr", 0.01, "--steps", 4, "--precision", "bf16", "--warmup", 1)


@pytest.mark.parametrize("key", [*CHANGES, *KEEPS])
def test_flags_that_change_a_step_do_and_the_others_do_not(train, trained, others, monkeypatch,
                                                           key):
    monkeypatch.setitem(dit.MODELS, "DiT-Nano/7",
                        dict(patch_size=7, hidden_size=32, depth=1, num_heads=2))
    wanted = losses(trained(*BASE, out="base").parent)
    value = {**CHANGES, **KEEPS}[key]
    flag = f"--{key.replace('_', '-')}"
    folder = Path("run2")
    assert train(*BASE, "--out", folder, flag, *(() if value is True else (value,))) == 0
    state = load(sorted(folder.glob("step_*.pt"))[-1])
    if key not in ("out", "stop_after", "device"):
        assert state["config"]["recipe"][key] == value
    if key in KEEPS:
        assert losses(folder) == wanted
    else:
        assert losses(folder)[:4] != wanted


def test_another_network_and_process_with_their_own_arguments_train_resume_and_sample(
        train, others, monkeypatch):
    flags = ("--network", "other", "--process", "other", "--steps", 6)
    train(*flags, "--out", "straight")
    train(*flags, "--out", "run", "--stop-after", 3)
    config = load("run/step_0000003.pt")["config"]
    assert config["model"]["share"] == 0.1 and config["diffusion"]["factor"] == 2.0
    assert train("--resume", "--out", "run") == 0
    assert losses("run") == losses("straight")
    assert sample.main(["run", "--steps", "2", "--out", "x.png"]) == 0
    with pytest.raises(UserError, match="--network dit differs from the checkpoint's other"):
        train("--resume", "--out", "run", "--steps", 8, "--network", "dit")
    monkeypatch.delitem(components.NETWORKS, "other")
    with pytest.raises(UserError, match="network 'other' is unknown: dit"):
        train("--resume", "--out", "run", "--steps", 8)


def test_flip_mirrors_half_of_the_images_and_changes_nothing_else(train, monkeypatch):
    calls = spy_on_loss(monkeypatch)
    for flags in [(), ("--flip",), ("--flip", "--grad-accum", 2)]:
        train("--steps", 4, "--batch-size", 64, "--out", f"run{len(flags)}", *flags)
    plain, flipped = calls[:4], calls[4:8]
    mirrored = 0
    for (x0, *others), (x0_flipped, *others_flipped) in zip(plain, flipped, strict=True):
        assert tensors_equal(others, others_flipped)
        for a, b in zip(x0, x0_flipped, strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            mirrored += not torch.equal(a, b)
    assert 0.38 < mirrored / 256 < 0.62
    halves = [torch.cat([calls[8 + 2 * i][0], calls[9 + 2 * i][0]]) for i in range(4)]
    assert tensors_equal(halves, [x0 for x0, *_ in flipped])


def test_intervals_write_what_they_say(train):
    train("--steps", 8, "--out", "run", "--preview-every", 3, "--save-every", 2, "--keep", 2)
    names = sorted(p.name for p in Path("run").glob("*.pt"))
    assert names == ["step_0000006.pt", "step_0000008.pt"]
    pictures = sorted(Path("run/samples").glob("*.png"))
    assert [p.name for p in pictures] == [f"step_000000{k}.png" for k in (3, 6, 8)]
    assert Image.open(pictures[0]).size == (6 * 58 + 2, 10 * 58 + 2)        # a class per row


def test_ema_decay_changes_the_ema_alone(trained):
    state = load(trained(*BASE, "--ema-decay", 0.0))
    assert tensors_equal(state["ema"], state["model"])
    assert tensors_equal(state["model"], load(trained(*BASE, out="base"))["model"])


@pytest.mark.parametrize("backend", [
    "aot_eager",                        # the capture of the graph, without a minute of compilers
    pytest.param("inductor", marks=pytest.mark.long),
])
def test_compile_gives_the_same_losses_to_rounding(train, monkeypatch, capsys, backend):
    honest = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: honest(self, backend=backend))
    train("--steps", 2, "--precision", "fp32", "--out", "eager")
    try:
        train("--steps", 2, "--precision", "fp32", "--out", "compiled", "--compile")
    except UserError as error:
        pytest.skip(str(error))
    assert capsys.readouterr().out.count("compiling: the first step") == 1
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-4)
    assert load("compiled/step_0000002.pt")["model"].keys() == \
        load("eager/step_0000002.pt")["model"].keys()


def test_grad_accum_makes_the_same_update(train, monkeypatch):
    """Losses to 1e-5, the first gradient to rounding."""
    gradients, honest = [], TrainingState.update

    def update(self, *args):
        gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
        return honest(self, *args)

    monkeypatch.setattr(TrainingState, "update", update)
    for parts in (1, 2, 8):
        train("--steps", 10, "--precision", "fp32", "--optimizer", "adamw", "--grad-accum", parts,
              "--out", f"run{parts}")
    for parts, first in [(2, gradients[10]), (8, gradients[20])]:
        assert losses(f"run{parts}") == pytest.approx(losses("run1"), rel=1e-5)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags, words", [
    (["--lr", "fast"], ["--lr", "fast", "number"]),
    (["--steps", "0"], ["--steps", "at least 1"]),
    (["--label-dropout", "1.5"], ["--label-dropout", "at most 1"]),
    (["--ema-decay", "1"], ["--ema-decay", "below 1"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--steps", "1" + "0" * 400], ["--steps", "at most 1,000,000,000"]),
    (["--batch-size", "100000000000"], ["--batch-size", "at most 65,536"]),
    (["--log-every", "1000000000000"], ["--log-every", "at most 100,000"]),
    (["--image-size", "100000"], ["--image-size", "at most 4,096"]),
    (["--seed", str(2**63)], ["--seed", "at most 9,223,372,036,854,775,807"]),
    (["--out", "x" * 300], ["x" * 300, "too long"]),
    (["--bach-size", "3"], ["--bach-size", "--batch-size"]),
    (["--prediction", "noise"], ["--prediction", "eps"]),
    (["--model", "DiT-S/8"], ["DiT-S/8", "does not divide", "28"]),
    (["--model", "DiT-Z/2"], ["--model", "DiT-S/2"]),
    (["--batch-size", "9", "--grad-accum", "2"], ["--batch-size 9", "8 or 10"]),
    (["--dataset", "minst"], ["minst", "mnist"]),
    (["--dataset", "folder:nowhere"], ["nowhere"]),
    (["--device", "cuda:77"], ["--device cuda:77", "cpu"]),
    (["--device", "quantum"], ["--device quantum", "cpu"]),
    (["--out", "a-file"], ["a-file"]),
    (["--init-from", "nothing.pt"], ["nothing.pt"]),
    (["--init-from", "a-file"], ["a-file"]),
    (["--resume", "a-file", "--init-from", "a-file"], ["--resume", "--init-from"]),
    (["--flip", "twice"], ["twice"]),
    (["--network", "unet"], ["--network", "unet", "dit"]),
    (["--process", "flow"], ["--process", "flow", "ddpm"]),
    (["--weighting", "none"], ["--weighting", "none", "min-snr"]),
    (["--optimizer", "adamw", "--muon-lr", "1"], ["--muon-lr does not", "--optimizer adamw"]),
    (["--timesteps", "uniform", "--noise-mean", "1"], ["--noise-mean does not", "uniform"]),
    (["--timesteps", "uniform", "--noise-std", "1"], ["--noise-std does not", "uniform"]),
])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(train, tmp_path, flags, words):
    Path("a-file").write_text("not a folder")
    with pytest.raises(UserError) as caught:
        train("--steps", 2, *flags)
    assert caught.value.status == 2
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert [p.name for p in tmp_path.iterdir()] == ["a-file"]


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        SETTINGS.parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "length of the run and of its schedules, in steps (default: 12000 on a GPU, 4000" in text
    told = {action.dest: action.help for action in SETTINGS.parser()._actions}
    in_words = {"image_size": "the data set's; 64 for celeba", "compile": "on where a",
                "flip": "off", "celeba_attribute": "Male", "logger": "none",
                "data_dir": "data/ beside", "weighting": "v for x0, plain for eps and v"}
    gpu, cpu = SETTINGS.defaults("cuda"), SETTINGS.defaults("cpu")
    assert all("(default: " in told[key] for key in components.FLAGS)       # their networks' own
    for key in set(gpu) - set(components.FLAGS):
        default = gpu[key] if gpu[key] == cpu[key] else f"{gpu[key]} on a GPU, {cpu[key]} on a CPU"
        assert f"(default: {in_words.get(key, default)}" in told[key], key


# ---------------------------------------------------------------- what a run writes


def test_a_run_describes_itself(train, checkpoint, capsys):
    state, config = load(checkpoint), json.loads(Path("run/config.json").read_text())
    assert state["step"] == 3 and state["class_names"] == [str(d) for d in range(10)]
    assert config == state["config"]
    assert config["data"]["dataset"] == "glyphs"
    assert (config["network"], config["process"]) == ("dit", "ddpm")
    assert config["diffusion"]["prediction"] == config["recipe"]["prediction"]
    assert config["recipe"]["model"] == TINY and config["sampling"]["sampler"] == "ddim"
    assert config["recipe"]["data_dir"] is None         # the repository's, wherever that moves
    rows = read_metrics(Path("run/metrics.jsonl"))
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert set(rows[0]) - set(QUARTERS) == {"step", "loss", "loss_eps", "grad_norm", "lr"}


@pytest.mark.parametrize("steps", [7, 130])
def test_the_summary_has_the_mean_loss_of_the_last_100_steps(train, capsys, steps):
    """Also where the run was stopped and resumed, and however often the loss is read."""
    train("--steps", steps, "--log-every", 3, "--stop-after", steps - 5, "--out", "run")
    train("--resume", "--out", "run")
    last = losses("run")[-100:]
    line, = re.findall("^5 steps in .*$", capsys.readouterr().out, re.MULTILINE)
    assert re.fullmatch(f"5 steps in [0-9.]+ seconds, loss {sum(last) / len(last):.4f} "
                        rf"\(last {len(last)} steps\); saved: .*", line)


def test_the_last_line_is_the_command_that_samples(train, capsys):
    train("--steps", 2)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("next: python sample.py ")
    assert sample.main([*last.split()[3:], "--steps", "2", "--out", "x.png"]) == 0


def test_a_finished_run_draws_its_loss_curve_and_says_what_that_needs(train, monkeypatch, capsys):
    monkeypatch.setattr(run, "loss_curve", loss_curve)
    train("--steps", 2, "--out", "run", "--stop-after", 1)
    assert not Path("run/loss.png").exists()
    train("--resume", "--out", "run")
    assert "loss curve: run/loss.png\n" in capsys.readouterr().out
    with Image.open("run/loss.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train("--steps", 1, "--out", "other")
    assert "no loss curve: pip install matplotlib" in capsys.readouterr().out


def test_new_runs_get_numbers_and_never_the_same_folder(train):
    train("--steps", 1)
    train("--steps", 1)
    assert sorted(p.name for p in Path("output").iterdir()) == [
        "001-glyphs-DiT-Test-7", "002-glyphs-DiT-Test-7"]


def test_a_folder_that_holds_a_run_is_never_overwritten(train, checkpoint):
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        train("--steps", 9, "--out", "run")
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_a_folder_of_other_files_is_no_run_folder(train):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine is not empty: give --out a new folder"):
        train("--steps", 1, "--out", "mine")
    assert [p.name for p in Path("mine").iterdir()] == ["notes.txt"]
    Path("mine/notes.txt").rename("mine/.config.json.7.tmp")        # what a kill may leave
    assert train("--steps", 1, "--out", "mine") == 0


def test_the_presets_model_takes_a_patch_that_divides_the_images(train, monkeypatch):
    for patch in (2, 4, 7):
        monkeypatch.setitem(dit.MODELS, f"DiT-Nano/{patch}",
                            dict(patch_size=patch, hidden_size=16, depth=1, num_heads=2))
    flags = ["--dataset", "glyphs", "--batch-size", "2", "--steps", "1"]
    for size, name in [(28, "DiT-Nano/7"), (32, "DiT-Nano/4"), (14, "DiT-Nano/7")]:
        train_mnist.main([*flags, "--image-size", str(size), "--out", f"run{size}"])
        assert load(f"run{size}/step_0000001.pt")["config"]["recipe"]["model"] == name
    train_mnist.main(["--resume", "--out", "run32", "--steps", "2"])
    with pytest.raises(UserError, match="patch size 7 does not divide image size 32 .*: use "
                                        "DiT-Nano/2 or DiT-Nano/4$"):
        train_mnist.main([*flags, "--image-size", "32", "--model", "DiT-Nano/7"])
    with pytest.raises(UserError, match="does not divide image size 29"):
        train_mnist.main([*flags, "--image-size", "29"])


def colours(**classes) -> None:
    """pets/: a folder of eight pictures per class."""
    for name, colour in classes.items():
        Path("pets", name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 16), tuple(c + i for c in colour)).save(f"pets/{name}/{i}.png")


PETS = ("--dataset", "folder:pets", "--image-size", 14, "--steps", 2, "--out", "run")


def test_three_channels_and_any_number_of_classes(train):
    colours(red=(200, 0, 0), green=(0, 200, 0), blue=(0, 0, 200))
    train(*PETS, "--preview-every", 2)
    state = load("run/step_0000002.pt")
    assert state["config"]["model"]["in_channels"] == 3
    assert state["class_names"] == ["blue", "green", "red"]


def test_one_class_trains_without_labels_and_samples(train, capsys):
    colours(all=(200, 100, 0))
    assert train(*PETS, "--preview-every", 2, "--flip") == 0
    assert "1 class)" in capsys.readouterr().out
    assert load("run/step_0000002.pt")["class_names"] == ["all"]
    assert train("--resume", "--out", "run", "--steps", 3) == 0
    flags = ["run", "--steps", "2", "--per-class", "3"]
    for scale in ("0", "1", "1.75"):
        assert sample.main([*flags, "--cfg-scale", scale, "--out", f"{scale}.png"]) == 0
    with pytest.raises(UserError, match="label '1' is not a class of this model: all"):
        sample.main([*flags, "--labels", "1"])


# ---------------------------------------------------------------- MNIST that is not there


def no_network(monkeypatch):
    def fail(*_):
        raise data.DataMissing("mnist is not in data and cannot be downloaded (no network)")

    monkeypatch.setattr(data, "download", fail)


def test_without_mnist_and_without_a_choice_glyphs_are_used_and_named(train, monkeypatch, capsys):
    no_network(monkeypatch)
    assert train_mnist.main(["--model", TINY, "--batch-size", "4", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "NO MNIST" in out and "GLYPHS" in out
    folder = Path("output/001-glyphs-DiT-Test-7")
    assert json.loads((folder / "config.json").read_text())["data"]["dataset"] == "glyphs"
    state = load(folder / "step_0000001.pt")
    assert state["config"]["recipe"]["dataset"] == state["config"]["data"]["dataset"] == "glyphs"
    assert train_mnist.main(["--resume", "--steps", "2"]) == 0      # goes on with glyphs


@pytest.mark.parametrize("flags", [["--dataset", "mnist"], ["--data-dir", "here"]])
def test_without_mnist_a_user_who_named_it_is_told(train, monkeypatch, flags):
    no_network(monkeypatch)
    with pytest.raises(UserError, match="mnist is not in"):
        train_mnist.main(["--model", TINY, "--batch-size", "4", "--steps", "1", *flags])
    assert not Path("output").exists()


# ---------------------------------------------------------------- what goes wrong on the way


@pytest.mark.parametrize("flags, message", [
    (["--stesp", "3"], r"unrecognized arguments: --stesp 3 \(did you mean --steps\?\)"),
    (["--patch-size", "4"], r"--patch-size 4 \(the patch size is part of --model, for example "
                            r"DiT-Nano/4\); --help"),
    (["--model", "dit-nano/4"], r"'dit-nano/4' .*\(did you mean DiT-Nano/4\?\); --help"),
    (["--process", "rectifiedflow"], r"\(did you mean rectified-flow\?\)"),
    (["--prediction", "score"], r"'score' \(choose from [^(]*\); --help"),     # nothing is close
])
def test_a_mistyped_flag_or_choice_is_answered_with_the_nearest(flags, message):
    with pytest.raises(UserError, match=message):
        train_mnist.main(flags)


@pytest.mark.parametrize("log_every, bad", [(5, 7), (1, 1), (100, 3)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
        train, monkeypatch, log_every, bad):
    honest, count = GaussianDiffusion.loss, 0

    def loss(self, *args):
        nonlocal count
        count += 1
        return honest(self, *args) * (math.nan if count == bad else 1)

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    with pytest.raises(UserError) as caught:
        train("--steps", 20, "--log-every", log_every, "--save-every", 4, "--out", "run")
    assert f"not finite at step {bad}:" in str(caught.value) and caught.value.status == 1
    assert len(losses("run")) == bad - 1
    for path in Path("run").glob("step_*.pt"):
        state = load(path)
        assert state["step"] < bad
        assert all(w.isfinite().all() for k in ("model", "ema") for w in state[k].values())
    assert str(sorted(Path("run").glob("step_*.pt"))[-1]) in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_the_run(train, monkeypatch):
    honest = TrainingState.update

    def update(*args):
        return honest(*args) * math.inf

    monkeypatch.setattr(TrainingState, "update", update)
    with pytest.raises(UserError, match="not finite at step 1:"):
        train("--steps", 5)


def test_out_of_gpu_memory_names_the_size_and_the_flag(train, monkeypatch):
    def loss(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    with pytest.raises(UserError, match="with 8 images at a time: --grad-accum 2 "):
        train("--steps", 2)
    with pytest.raises(UserError, match="with 4 images at a time: --grad-accum 4 "):
        train("--steps", 2, "--grad-accum", 2)


def test_the_record_is_no_longer_than_the_run(train, monkeypatch):
    made, honest = [], train_mnist.train

    def loop(batches, state, diffusion, run):
        honest(batches, state, diffusion, run)
        made.append(len(run.metrics.buffer))

    monkeypatch.setattr(train_mnist, "train", loop)
    train("--steps", 6, "--log-every", 100_000, "--out", "run")
    train("--steps", 6, "--log-every", 4, "--out", "other")
    assert made == [6, 4] and len(losses("run")) == len(losses("other")) == 6


@pytest.mark.parametrize("error, words, status", [
    (RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
     "error: out of memory: a smaller --batch-size", 2),
    (MemoryError(), "error: out of memory: a smaller --batch-size", 2),
    (torch.OutOfMemoryError("CUDA out of memory"), "error: out of GPU memory", 2),
    (OSError(36, "File name too long", "xxx"), "error: xxx: File name too long", 2),
    (UserError("said", status=1), "error: said", 1),
])
def test_what_a_command_says_when_it_fails(capsys, error, words, status):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    err = capsys.readouterr().err
    assert end.value.code == status and err.startswith(words) and err.count("\n") == 1


def test_a_bug_is_not_hidden():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(main)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_trains_too(train):
    assert train("--steps", 20, "--device", "cuda", "--out", "run") == 0
    assert all(map(math.isfinite, losses("run")))
