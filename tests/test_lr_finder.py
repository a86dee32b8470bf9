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


@pytest.fixture
def sweep(train, monkeypatch, capsys):
    """sweep(*flags) -> (what it printed, the loss and the learning rates of each step)."""
    pytest.importorskip("matplotlib")
    steps, honest = [], train_mnist.training_step

    def spy(net, ema, optimizers, *inputs):
        loss, norm = honest(net, ema, optimizers, *inputs)
        steps.append((loss.mean().item(), [o.param_groups[0]["lr"] for o in optimizers]))
        return loss, norm

    monkeypatch.setattr(train_mnist, "training_step", spy)

    def run(*flags):
        steps.clear()
        words = *FAST[:6], "--device", "cpu", "--rates", 30, *flags
        assert lr_finder.main([str(word) for word in words]) == 0
        return capsys.readouterr().out, [loss for loss, _ in steps], [rates for _, rates in steps]

    return run


@pytest.mark.parametrize("flags, swept, other", [
    (("--optimizer", "muon"), 1, 2e-3), (("--which", "lr"), 0, 0.02),
    (("--optimizer", "adamw"), 0, None)])
def test_a_sweep_stops_at_divergence_and_suggests_a_tenth_of_the_best_rate(
        sweep, monkeypatch, flags, swept, other):
    monkeypatch.setattr(lr_finder, "LOW", 1e-4)
    monkeypatch.setattr(lr_finder, "HIGH", 1e8)
    if swept == 1:      # in so small a network the last LayerNorm bounds what Muon can do
        monkeypatch.setattr(lr_finder, "DIVERGED", 1.2)
    out, losses, rates = sweep(*flags)
    tried = [rate[swept] for rate in rates]
    assert 10 < len(tried) < 30 and tried[0] == pytest.approx(1e-4)
    assert [b / a for a, b in zip(tried, tried[1:], strict=False)] == pytest.approx(
        [1e12 ** (1 / 29)] * (len(tried) - 1))
    assert other is None or {rate[1 - swept] for rate in rates} == {other}      # the other stays
    smooth = lr_finder.smoothed(losses)
    assert not math.isfinite(smooth[-1]) or smooth[-1] > lr_finder.DIVERGED * min(smooth)
    best, end = re.findall(r"lowest loss at --\S+ (\S+); the sweep ended at (\S+)", out)[0]
    name, suggested = re.findall(r"suggested: --(\S+) (\S+)", out)[0]
    assert name == ("muon-lr" if swept else "lr") and end == f"{tried[-1]:.2g}"
    assert float(suggested) == pytest.approx(max(float(best) / 10, 1e-4), rel=0.1)
    assert Image.open("output/lr-finder.png").format == "PNG"


def test_a_sweep_is_training_and_touches_no_run(sweep, trained, monkeypatch):
    """Its first loss is that of a run with the same flags: same weights, images, t and noise."""
    monkeypatch.setattr(lr_finder, "HIGH", 1e-4)
    trained("--steps", 2, "--seed", 4, "--prediction", "v")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    _, losses, rates = sweep("--seed", 4, "--prediction", "v")
    assert losses[0] == pytest.approx(read_metrics(Path("run"))[0]["loss"], rel=1e-6)
    assert len(losses) == 30 and rates[-1][1] == pytest.approx(1e-4)
    _, again, _ = sweep("--config", "run/config.json", "--rates", 2)
    assert again[0] == losses[0] and len(again) == 2
    after = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert {p for p in after.keys() - before.keys()} == {
        Path("output/lr-finder.png"), Path("output/lr-finder-2.png")}
    assert before.items() <= after.items()


def test_the_suggestion_and_mistakes(train):
    rates = [10.0**k for k in range(-5, 2)]
    assert lr_finder.smoothed([2.0, 2.0, 4.0]) == pytest.approx([2, 2, 2 + 2 * 0.1 / 0.271])
    losses = [4.0, 3.0, 1.0, -9.0, 20.0, 40.0, math.nan]        # smoothed: lowest at 1e-2
    assert lr_finder.suggestion(rates, losses) == pytest.approx((1e-3, 1e-2))
    assert lr_finder.suggestion(rates, [1.0, 2.0]) == (1e-5, 1e-5)      # never below the first
    for flags, message in [
            (("--which", "muon-lr", "--optimizer", "adamw"), "--optimizer adamw has no such rate"),
            (("--warmup", 3), "--warmup has no meaning"), (("--resume",), "--resume has no")]:
        assert message in refused(lr_finder.main, *FAST[:6], "--device", "cpu", *flags)
