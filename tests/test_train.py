"""The training script: the algorithm's parts, its flags, what it writes, how it fails."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import train_mnist
from cli import UserError, cli, generator, mix_seed
from conftest import TINY, load, tensors_equal
from diffusion import GaussianDiffusion
from dit import DiT
from runs import read_metrics
from settings import DEFAULTS, PRESETS, parser
from train_mnist import make_optimizers, schedule, update, update_ema


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
        args = parser().parse_args(["--optimizer", optimizer])
        for key, value in DEFAULTS.items():
            setattr(args, key, getattr(args, key, value))
        groups = [[names[id(p)] for g in o.param_groups for p in g["params"]]
                  for o in make_optimizers(model, args)]
        assert sorted(sum(groups, [])) == sorted(names.values())
        assert len(groups) == (2 if optimizer == "muon" else 1)
    assert {name.split(".", 2)[2] for name in groups[1]} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def scaled_gradients(values: list[float]) -> tuple:
    """A scaler for fp16 and one parameter with a gradient for each of two optimizers."""
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(2)) for _ in values)
    optimizers = [torch.optim.AdamW([p], lr=0.1) for p in model]
    for opt in optimizers:
        opt.param_groups[0]["initial_lr"] = 0.1
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum((p * value).sum() for p, value in zip(model, values, strict=True))).backward()
    return model, optimizers, scaler


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_an_overflow_in_one_optimizer_stops_the_step_of_both(bad, place):
    values = [1.0, 1.0]
    values[place] = bad
    model, optimizers, scaler = scaled_gradients(values)
    update(optimizers, scaler, model, 1.0, 1.0)
    assert all(torch.equal(p, torch.ones(2)) and p.grad is None for p in model)
    assert scaler.get_scale() == 4.0                                # tried again with half of it
    model, optimizers, scaler = scaled_gradients([1.0, 1.0])
    update(optimizers, scaler, model, 1.0, 1.0)
    assert all((p < 1).all() for p in model) and scaler.get_scale() == 8.0


@pytest.mark.parametrize("clip, left", [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_gradients_are_clipped_to_a_norm_and_0_is_not_at_all(clip, left):
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    before = model.weight.detach().clone()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    opt.param_groups[0]["initial_lr"] = 1.0
    norm = update([opt], torch.amp.GradScaler("cpu", enabled=False), model, clip, 1.0)
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


@pytest.mark.parametrize("kind, ends", [("uniform", 0.20), ("logit-normal", 0.028)])
def test_timesteps_are_drawn_as_the_flag_says(train, monkeypatch, kind, ends):
    """The share of t below 100 or from 900 on: logit-normal, twice P(z < log(1/9)) = 0.028."""
    calls = spy_on_loss(monkeypatch)
    train("--steps", 8, "--batch-size", 1024, "--timesteps", kind)
    t = torch.cat([t for _, t, _, _ in calls])
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000
    assert abs(((t < 100) | (t >= 900)).float().mean() - ends) < 0.015
    assert abs(t.float().mean() - 499.5) < 15               # as often above the middle as below


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


def test_record_reads_nothing_from_the_device(train, monkeypatch):
    """No synchronisation per step: between two log intervals no tensor becomes a number."""
    from runs import Run
    honest = Run.record

    def record(self, step, *numbers):
        if (self.recorded + 1 - self.read) == len(self.buffer):
            return honest(self, step, *numbers)
        with monkeypatch.context() as m:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
                m.setattr(torch.Tensor, name, lambda *a, n=name: pytest.fail(f"Tensor.{n}"))
            return honest(self, step, *numbers)

    monkeypatch.setattr(Run, "record", record)
    train("--steps", 7, "--log-every", 4)
    assert len(losses("output/001-glyphs-DiT-Test-7")) == 7


# ---------------------------------------------------------------- flags


CHANGES = {     # flags that change what the steps compute, each with a value that is no default
    "model": "DiT-Nano/7", "prediction": "x0", "label_dropout": 0.9, "batch_size": 4,
    "optimizer": "adamw", "lr": 0.05, "muon_lr": 0.5, "warmup": 4, "decay": 1.0, "clip": 0.01,
    "weight_decay": 2.0, "seed": 5, "precision": "fp32", "image_size": 14,
    "timesteps": "uniform",
}
KEEPS = {       # flags that do not
    "log_every": 2, "preview_every": 2, "save_every": 1, "keep": 1, "data_dir": "elsewhere",
    "stop_after": 4, "device": "cpu", "ema_decay": 0.5, "out": "run2",
}
ELSEWHERE = {"help", "dataset", "steps", "resume", "init_from", "grad_accum", "compile"}


def test_every_flag_is_in_a_test():
    flags = {action.dest for action in parser()._actions}
    assert flags == set(CHANGES) | set(KEEPS) | ELSEWHERE
    assert set(DEFAULTS) | set(PRESETS["cpu"]) | {"help", "resume", "init_from", "out",
                                                  "stop_after", "device"} == flags
    assert set(PRESETS["cpu"]) == set(PRESETS["gpu"])


@pytest.fixture
def base_losses(train):
    base = ("--lr", 0.01, "--steps", 4, "--precision", "bf16", "--warmup", 1)
    train(*base, "--out", "base")
    return base, losses("base")


def test_flags_that_change_a_step_do_and_the_others_do_not(train, base_losses):
    base, wanted = base_losses
    for i, (key, value) in enumerate({**CHANGES, **KEEPS}.items()):
        out = () if key == "out" else ("--out", f"run-{i}")
        assert train(*base, *out, f"--{key.replace('_', '-')}", value) == 0
        folder = Path("run2") if key == "out" else Path(f"run-{i}")
        state = load(sorted(folder.glob("step_*.pt"))[-1])
        if key not in ("out", "stop_after", "device"):
            assert state["config"]["recipe"][key] == value
        if key in KEEPS:
            assert losses(folder) == wanted, key
        else:
            assert losses(folder)[:4] != wanted, key


def test_intervals_write_what_they_say(train):
    train("--steps", 8, "--out", "run", "--preview-every", 3, "--save-every", 2, "--keep", 2)
    names = sorted(p.name for p in Path("run").glob("*.pt"))
    assert names == ["step_0000006.pt", "step_0000008.pt"]
    pictures = sorted(Path("run/samples").glob("*.png"))
    assert [p.name for p in pictures] == [f"step_000000{k}.png" for k in (3, 6, 8)]
    assert Image.open(pictures[0]).size == (6 * 58 + 2, 10 * 58 + 2)        # a class per row


def test_ema_decay_changes_the_ema_alone(train, base_losses):
    base, _ = base_losses
    train(*base, "--ema-decay", 0.0, "--out", "sharp")
    state = load("sharp/step_0000004.pt")
    assert tensors_equal(state["ema"], state["model"])


def test_compile_gives_the_same_losses_to_rounding(train):
    train("--steps", 2, "--precision", "fp32", "--out", "eager")
    try:
        train("--steps", 2, "--precision", "fp32", "--out", "compiled", "--compile")
    except UserError as error:
        pytest.skip(str(error))
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-4)
    assert load("compiled/step_0000002.pt")["model"].keys() == \
        load("eager/step_0000002.pt")["model"].keys()


def test_grad_accum_makes_the_same_update(train, monkeypatch):
    """Losses to 1e-5, the first gradient to rounding."""
    gradients, honest = [], train_mnist.update

    def update(optimizers, scaler, model, *rest):
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        return honest(optimizers, scaler, model, *rest)

    monkeypatch.setattr(train_mnist, "update", update)
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
])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(train, tmp_path, flags, words):
    Path("a-file").write_text("not a folder")
    with pytest.raises(UserError) as caught:
        train("--steps", 2, *flags)
    assert caught.value.status == 2
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not list(tmp_path.glob("output/*/*.pt"))


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "length of the run and of its schedules, in steps (default: 12000 on a GPU, 4000" in text
    told = {action.dest: action.help for action in parser()._actions}
    for key in DEFAULTS | PRESETS["gpu"]:
        gpu, cpu = (PRESETS[name].get(key, DEFAULTS.get(key)) for name in ("gpu", "cpu"))
        default = gpu if gpu == cpu else f"{gpu} on a GPU, {cpu} on a CPU"
        default = {"image_size": "the data set's; 32", "compile": "off"}.get(key, default)
        assert f"(default: {default}" in told[key], key


# ---------------------------------------------------------------- what a run writes


def test_a_run_describes_itself(train, checkpoint, capsys):
    state, config = load(checkpoint), json.loads(Path("run/config.json").read_text())
    assert state["step"] == 3 and state["class_names"] == [str(d) for d in range(10)]
    assert config == state["config"]
    assert config["data"]["dataset"] == "glyphs" and config["prediction"] == "v"
    assert config["recipe"]["model"] == TINY and config["sampling"]["sampler"] == "ddim"
    rows = read_metrics(Path("run/metrics.jsonl"))
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert set(rows[0]) == {"step", "loss", "loss_eps", "grad_norm", "lr"}


def test_the_last_line_is_the_command_that_samples(train, capsys):
    import sample
    train("--steps", 2)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("now: python sample.py ")
    assert sample.main([*last.split()[3:], "--steps", "2", "--out", "x.png"]) == 0


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


def test_the_presets_model_takes_a_patch_that_divides_the_images(train, capsys):
    flags = ["--dataset", "glyphs", "--batch-size", "2", "--steps", "1"]
    for size, name in [(28, "DiT-Nano/7"), (32, "DiT-Nano/4"), (14, "DiT-Nano/7")]:
        train_mnist.main([*flags, "--image-size", str(size), "--out", f"run{size}"])
        assert load(f"run{size}/step_0000001.pt")["config"]["recipe"]["model"] == name
    train_mnist.main(["--resume", "--out", "run32", "--steps", "2"])
    with pytest.raises(UserError, match="patch size 7 does not divide image size 32"):
        train_mnist.main([*flags, "--image-size", "32", "--model", "DiT-Nano/7"])
    with pytest.raises(UserError, match="does not divide image size 29"):
        train_mnist.main([*flags, "--image-size", "29"])


def test_three_channels_and_any_number_of_classes(train, tmp_path):
    for name, colour in [("red", (200, 0, 0)), ("green", (0, 200, 0)), ("blue", (0, 0, 200))]:
        Path("pets", name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 16), tuple(c + i for c in colour)).save(f"pets/{name}/{i}.png")
    train("--dataset", "folder:pets", "--image-size", 14, "--steps", 2, "--out", "run",
          "--preview-every", 2)
    state = load("run/step_0000002.pt")
    assert state["config"]["model"]["in_channels"] == 3
    assert state["class_names"] == ["blue", "green", "red"]


# ---------------------------------------------------------------- MNIST that is not there


def no_network(monkeypatch):
    def fail(*_):
        raise data.DataMissing("mnist is not in data and cannot be downloaded (no network)")

    monkeypatch.setattr(data, "_download", fail)


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
    honest = train_mnist.update

    def update(*args):
        return honest(*args) * math.inf

    monkeypatch.setattr(train_mnist, "update", update)
    with pytest.raises(UserError, match="not finite at step 1:"):
        train("--steps", 5)


def test_out_of_gpu_memory_names_the_batch_and_the_flag(train, monkeypatch):
    def loss(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    with pytest.raises(UserError, match="--batch-size 8: --grad-accum 2"):
        train("--steps", 2)


def test_the_record_is_no_longer_than_the_run(train, monkeypatch):
    from runs import Run
    made, honest = [], Run.__init__

    def init(self, *args, **options):
        honest(self, *args, **options)
        made.append(len(self.buffer))

    monkeypatch.setattr(Run, "__init__", init)
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
        cli(main)
    err = capsys.readouterr().err
    assert end.value.code == status and err.startswith(words) and err.count("\n") == 1


def test_a_bug_is_not_hidden():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli(main)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_trains_too(train):
    assert train("--steps", 20, "--device", "cuda", "--out", "run") == 0
    assert all(map(math.isfinite, losses("run")))
