"""tools/lr_finder.py: the rates that it sets, where it stops, what it suggests."""

import math
import re
from pathlib import Path

import pytest
from PIL import Image

import train_mnist
from conftest import FAST, refused
from support.checkpoint import read_metrics
from tools import lr_finder

FINDER = (*FAST[:6], "--device", "cpu", "--rates", 30, "--curve", "x.png", "--force")


@pytest.fixture
def sweep(train, monkeypatch, capsys):
    """sweep(*flags) -> (what it printed, the loss and the learning rates of each step)."""
    pytest.importorskip("matplotlib")
    steps, honest = [], train_mnist.training_step

    def spy(net, ema, optimizers, *inputs):
        loss, norm = honest(net, ema, optimizers, *inputs)
        rates = [group["lr"] for o in optimizers for group in o.param_groups]
        steps.append((loss.mean().item(), rates))
        return loss, norm

    monkeypatch.setattr(train_mnist, "training_step", spy)

    def run(*flags):
        steps.clear()
        assert lr_finder.main([str(f) for f in (*FINDER, *flags)]) == 0
        return capsys.readouterr().out, [loss for loss, _ in steps], [rates for _, rates in steps]

    return run


@pytest.mark.parametrize("flags, swept, other", [
    (("--optimizer", "muon"), 1, 2e-3), (("--which", "lr"), 0, 0.02),
    (("--optimizer", "adamw"), 0, None)])
def test_a_sweep_stops_at_divergence_and_suggests_a_tenth_of_the_best_rate(
        sweep, monkeypatch, flags, swept, other):
    if swept == 1:      # in so small a network the last LayerNorm bounds what Muon can do
        monkeypatch.setattr(lr_finder, "DIVERGED", 1.2)
    out, losses, rates = sweep(*flags, "--low", 1e-4, "--high", 1e8)
    tried = [rate[swept] for rate in rates]
    assert 10 < len(tried) < 30 and tried[0] == pytest.approx(1e-4)
    assert [b / a for a, b in zip(tried, tried[1:], strict=False)] == pytest.approx(
        [1e12 ** (1 / 29)] * (len(tried) - 1))
    assert other is None or {rate[1 - swept] for rate in rates} == {other}      # the other stays
    smooth = lr_finder.smoothed(losses)
    assert not math.isfinite(smooth[-1]) or smooth[-1] > lr_finder.DIVERGED * min(smooth)
    assert f"divergence at {tried[-1]:.2g}\n" in out
    best, = re.findall(r"lowest loss at --\S+ (\S+),", out)
    name, suggested = re.findall(r"suggested: --(\S+) (\S+)", out)[0]
    assert name == ("muon-lr" if swept else "lr")
    assert float(suggested) == pytest.approx(max(float(best) / 10, 1e-4), rel=0.1)
    with Image.open("x.png") as picture:
        assert picture.format == "PNG"


def test_a_sweep_is_training_and_touches_no_run(sweep, trained):
    """Its first loss is that of a run with the same flags: same weights, images, t and noise."""
    trained("--steps", 2, "--seed", 4, "--prediction", "v")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    out, losses, _ = sweep("--seed", 4, "--prediction", "v", "--high", 1e-4)
    assert losses[0] == pytest.approx(read_metrics(Path("run"))[0]["loss"], rel=1e-6)
    assert len(losses) == 30 and "no divergence up to 0.0001\n" in out
    _, again, _ = sweep("--config", "run/config.json", "--rates", 2)
    assert again[0] == losses[0] and len(again) == 2
    after = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert after.pop(Path("x.png")) and after == before


def test_the_suggestion_and_mistakes(train):
    rates = [10.0**k for k in range(-5, 2)]
    assert lr_finder.smoothed([2.0, 2.0, 4.0]) == pytest.approx([2, 2, 2 + 2 * 0.1 / 0.271])
    losses = [4.0, 3.0, 1.0, -9.0, 20.0, 40.0, math.nan]        # smoothed: lowest at 1e-2
    assert lr_finder.suggestion(rates, losses) == pytest.approx((1e-3, 1e-2))
    assert lr_finder.suggestion(rates, [1.0, 2.0]) == (1e-5, 1e-5)      # never below the first
    Path("taken.png").write_text("mine")
    for flags, message in [
            (("--which", "muon-lr", "--optimizer", "adamw"), "--optimizer adamw has no such rate"),
            (("--low", 1, "--high", 0.1), "--low 1 is not below --high 0.1"),
            (("--warmup", 3), "--warmup has no meaning"), (("--resume",), "--resume has no"),
            (("--batchsize", 3), "unrecognized arguments: --batchsize")]:
        assert message in refused(lr_finder.main, *FINDER, *flags)
    assert "taken.png exists" in refused(lr_finder.main, *FAST[:6], "--curve", "taken.png")
    assert [p.name for p in Path().glob("*.png")] == ["taken.png"]
