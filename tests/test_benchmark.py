"""tools/benchmark.py: what is timed, in what order, and what is printed."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

import dit
import train_mnist
from conftest import TINY
from support import distributed
from support.cli import UserError
from support.state import Loss
from tools import benchmark

BASE = ("--model", TINY, "--batch-size", 4, "--device", "cpu")


def run(*flags) -> int:
    return benchmark.main([str(f) for f in flags])


def test_every_variant_makes_every_step_in_turn(train, monkeypatch, capsys):
    calls, algorithm = [], train_mnist.train

    def spy(batches, state, diffusion, run):
        calls.append((id(state), list(run.steps())))
        before = [p.clone() for p in state.model.parameters()]
        algorithm(batches, state, diffusion, run)
        assert any(not torch.equal(a, b)
                   for a, b in zip(before, state.model.parameters(), strict=True))
    monkeypatch.setattr(train_mnist, "train", spy)
    assert run(*BASE, "--rounds", 2, "--steps-per-round", 3, "--optimizer", "adamw") == 0
    order = [model for model, _ in calls]
    assert len(set(order)) == 3 and order == order[:3] * 3              # warming up, two rounds
    assert [steps for _, steps in calls[::3]] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    out = capsys.readouterr().out
    assert "adamw" in out and "batch 4" in out and "2 rounds of 3 steps" in out
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads, on cpu" in out
    rows = [line for line in out.splitlines() if line.split("  ")[0] in benchmark.VARIANTS]
    assert [row.split("  ")[0] for row in rows] == ["fp32", "bf16", "bf16, MATH attention"]
    assert rows[0].endswith(" 1.00")
    assert "sampling" not in out


@pytest.mark.parametrize("name, dtype, flash", [
    ("fp32", torch.float32, True), ("bf16", torch.bfloat16, True),
    ("bf16, MATH attention", torch.bfloat16, False)])
def test_a_variant_runs_in_its_precision_with_its_kernels(name, dtype, flash):
    layer, seen, losses = torch.nn.Linear(4, 4), [], []

    class Model(torch.nn.Module):
        def forward(self, xt, t, y):
            seen.append((layer(xt).dtype, torch.backends.cuda.flash_sdp_enabled()))
            return xt

    class Process:
        def loss(self, net, x0, t, y, eps):
            losses.append(layer(net(x0, t, y)).dtype)           # around the network: fp32

    bf16, kernels = benchmark.VARIANTS[name]
    loss = type("VariantLoss", (benchmark.VariantLoss,), dict(bf16=bf16, kernels=kernels))
    loss(Model(), Process(), torch.device("cpu"), "")(torch.zeros(1, 4), None, None, None)
    assert losses == [torch.float32]
    assert seen == [(dtype, flash)]
    assert benchmark.VARIANTS["bf16, MATH attention"][1] == (SDPBackend.MATH,)


def test_compiled_variants_are_compiled_apart(train, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(distributed, "check_compiler", compiled.append)
    monkeypatch.setattr(Loss, "compile", lambda self: compiled.append(type(self)))
    flags = ("--rounds", 1, "--steps-per-round", 1, "--optimizer", "muon")
    assert run(*BASE, *flags, "--compile") == 0
    assert compiled[0] == torch.device("cpu") and len(set(compiled[1:])) == len(compiled[1:]) == 3
    out = capsys.readouterr().out
    for name in benchmark.VARIANTS:
        assert f"\n{name}  " in out and f"\n{name}, compiled  " in out
    assert "muon" in out


def test_sampling_is_timed_with_one_and_two_forwards_per_step(train, monkeypatch, capsys):
    seen, forward = [], dit.DiT.forward
    assert benchmark.parser().parse_args(["--sample"]).sample == 50
    monkeypatch.setattr(benchmark, "benchmark_training", lambda *a: None)
    monkeypatch.setattr(dit.DiT, "forward", lambda self, x, t, y: (
        seen.append((len(x), x.dtype)), forward(self, x, t, y))[1])
    assert run(*BASE, "--rounds", 2, "--sample", 3) == 0
    sizes = [size for size, dtype in seen if dtype == torch.float32]
    assert sizes == [4] * 2 + [8] * 2 + ([4] * 3 + [8] * 3) * 2         # warming up, two rounds
    out = capsys.readouterr().out
    assert "2 rounds of 4 images in one batch, DDIM, 3 steps" in out
    assert "\nguidance 1  " in out and "\nguidance 2  " in out


def test_the_table_holds_medians_and_ratios_within_a_round():
    times = {"one": [1.0, 2.0, 9.0], "other, longer": [2.0, 2.2, 27.0]}
    rows = [line.split() for line in benchmark.table(times, 10, "step")]
    assert rows[0] == ["ms/step", "fastest", "slowest", "ratio"]
    assert rows[1] == ["one", "200.00", "100.00", "900.00", "1.00"]
    assert rows[2][2:] == ["220.00", "200.00", "2700.00", "2.00"]       # 2, 1.1, 3


def test_the_device_is_waited_for_on_both_sides(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    assert benchmark.seconds(lambda: events.append("work"), torch.device("cuda")) >= 0
    assert events == ["wait", "work", "wait"]


def test_what_training_selects_is_named(monkeypatch):
    for precision, name in [("bf16", "bf16, MATH attention"), ("fp32", "fp32")]:
        monkeypatch.setattr(distributed, "pick_precision", lambda *a, p=precision: p)
        assert benchmark.selected(torch.device("cpu")) == name in benchmark.VARIANTS
    monkeypatch.setattr(distributed, "pick_precision", lambda *a: "bf16")
    assert benchmark.selected(torch.device("cuda")) == "bf16"


@pytest.mark.parametrize("flags, says", [
    (("--model", "DiT-S/8"), "patch size 8 does not divide image size 28"),
    (("--rounds", 0), "of at least 1"), (("--batch-size", 10**11), "at most 65,536"),
    (("--sample", 1001), "at most 1,000"),
    (("--device", "cuda:77"), "is not available"), (("--round", 3), "did you mean --rounds")])
def test_mistakes_are_one_line(train, flags, says):
    with pytest.raises(UserError, match=says) as error:
        run(*flags)
    assert "\n" not in str(error.value)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run()


def test_no_flag_is_untested():
    source = Path(__file__).read_text()
    flags = {o for action in benchmark.parser()._actions for o in action.option_strings}
    assert {f for f in flags - {"-h", "--help"} if f'"{f}"' not in source} == set()
