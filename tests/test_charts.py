"""tools/charts.py: what is drawn lies where the numbers are."""

import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image

import train_mnist
from diffusion import GaussianDiffusion
from support.cli import UserError
from support.distributed import StepRandom
from tools import charts, figures


def run(*words) -> int:
    return figures.main([str(w) for w in words])


# ---------------------------------------------------------------- quality against accuracy


def line(guidance: float, accuracy: float, frechet: float, recall=0.8, images=1000, steps=25,
         digest="ab") -> str:
    rows = {"samples": dict(images=images, std=None, mean=dict(
                accuracy=accuracy, frechet=frechet, recall=recall, precision=0.9)),
            "test": dict(images=images, std=None, mean=dict(
                accuracy=0.998, frechet=0.53, recall=0.871, precision=0.9))}
    return json.dumps(dict(images_from="run", weights="ema", sampler="ddim", steps=steps, eta=0.0,
                           cfg_scale=guidance, seeds=[0], data_digest=digest, rows=rows)) + "\n"


def curve(line) -> list:
    """The points of a line of matplotlib, to compare with others."""
    return [pytest.approx(point) for point in np.transpose(line.get_data()).tolist()]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def runs(here):
    """Two seeds of x0 and a run of v; x0-0 has further evaluations of other settings."""
    texts = {"x0-0": line(1, 0.9, 9) + line(1.5, 0.99, 2, 0.82) + line(2, 0.995, 3) + line(
        2.5, 1.0, 5, 0.7) + line(1, 0.9, 7, images=50) + line(1, 0.9, 7, steps=5),
             "x0-1": line(2, 0.997, 4) + line(1, 0.92, 8) + line(2.5, 1.0, 3.5),
             "v-0": line(1, 0.8, 20, 0.75) + line(1.5, 0.98, 10, 0.7)}
    for name, text in texts.items():
        (here / name).mkdir()
        (here / name / "evaluations.jsonl").write_text(text)
        (here / name / "config.json").write_text(
            json.dumps(dict(recipe=dict(prediction=name.split("-")[0]))))
    return [f"{name}/evaluations.jsonl" for name in texts]


def test_quality_against_accuracy(runs, drawn, capsys):
    assert run("accuracy", *runs, "--out", "a.png") == 0
    assert Image.open("a.png").width == 1400
    frechet, recall = drawn[0].axes
    assert legend(drawn[0]) == ["x0 (2 runs)", "v", "real: test set"]
    assert frechet.get_yscale() == "log" and recall.get_yscale() == "linear"
    assert (frechet.get_ylabel(), recall.get_ylabel()) == ("Frechet distance", "recall")
    mean, thin, other, v, test, enough = frechet.lines
    assert curve(thin) == [(0.1, 9), (0.01, 2), (0.005, 3), (0.0005, 5)]
    assert curve(other) == [(0.08, 8), (0.003, 4), (0.0005, 3.5)]
    assert curve(mean) == [(0.09, 8.5), (0.004, 3.5), (0.0005, 4.25)]
    assert curve(v) == [(0.2, 20), (0.02, 10)]
    assert thin.get_lw() == other.get_lw() < mean.get_lw() == v.get_lw()
    assert thin.get_color() == other.get_color() == mean.get_color() != v.get_color()
    assert mean.get_marker() != v.get_marker() and thin.get_marker() == ""
    labels = [(text.get_text(), text.get_color(), text.xy) for text in frechet.texts]
    assert labels == [(g, line.get_color(), point) for line, guidances in
                      ((mean, ("1", "2", "2.5")), (v, ("1", "1.5")))
                      for g, point in zip(guidances, curve(line), strict=True)]
    below = {text.get_color() for text in frechet.texts if text.xyann[1] < 0}
    assert below == {mean.get_color()}              # the lowest curve's, away from the others
    assert {text.get_color() for text in recall.texts if text.xyann[1] < 0} == {v.get_color()}
    assert curve(recall.lines[1])[1] == (0.01, 0.82)
    for axes, value in ((frechet, 0.53), (recall, 0.871)):
        test, enough = axes.lines[-2:]
        assert set(test.get_ydata()) == {value} and test.get_label() == "real: test set"
        assert enough.get_xdata() == pytest.approx([0.005, 0.005])
    out = capsys.readouterr().out
    assert ("x0 (x0-0/evaluations.jsonl): Frechet distance 3.00 at guidance 2, 99.50% right, "
            "recall 0.800") in out
    assert "x0 (x0-1/evaluations.jsonl): Frechet distance 3.50 at guidance 2.5, 100.00%" in out
    assert "x0: Frechet distance 3.25 ± 0.35 over 2 runs" in out
    assert "v (v-0/evaluations.jsonl): no guidance with 99.5% right" in out
    assert "real, test set: Frechet distance 0.53, recall 0.871; 1,000 images each" in out


def test_the_accuracy_axis_is_logarithmic_in_the_error(runs, drawn):
    run("accuracy", *runs, "--out", "a.png")
    for axes in drawn[0].axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [
            "80%", "90%", "95%", "98%", "99%", "99.5%", "99.8%", "99.9%", "100%"]
        assert axes.get_xticks() == pytest.approx([0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001,
                                                   charts.error(1.0, 1000)])
        low, high = axes.get_xlim()
        assert axes.get_xscale() == "log" and low > 0.2 and high < 0.0005      # right is better


@pytest.mark.parametrize("low, high", [(0.53, 0.6), (0.22, 0.9), (1.1, 5.8), (0.53, 30),
                                       (0.53, 2000)])
def test_distances_have_two_plain_ticks_at_least(drawn, low, high):
    axes = figures.new_figure().subplots()
    axes.plot([0, 1], [low, high])
    charts.metric_axis(axes, "frechet", [dict(samples=dict(frechet=high), test=dict(frechet=low))])
    labels = axes.get_yticklabels() + axes.get_yticklabels(minor=True)
    bottom, top = axes.get_ylim()
    ticks = [label for label in labels if bottom <= label.get_position()[1] <= top]
    assert axes.get_yscale() == "log" and len(ticks) >= 2
    if (low, high) == (0.53, 30):
        assert sorted(float(tick.get_text()) for tick in ticks) == [0.5, 1, 2, 5, 10, 20]
    assert all(float(tick.get_text()) == pytest.approx(tick.get_position()[1]) for tick in ticks)


def test_runs_without_a_common_guidance_have_no_mean(here, drawn):
    for name, guidance in (("a", 1), ("b", 2)):
        Path(name).write_text(line(guidance, 0.9, 9) + line(guidance + 4, 0.95, 8))
    assert run("accuracy", "x=a", "x=b", "--out", "a.png") == 0
    mean, one, two = drawn[0].axes[0].lines[:3]
    assert curve(mean) == [] and len(curve(one)) == len(curve(two)) == 2


def test_names_and_images_can_be_given(runs, drawn):
    assert run("accuracy", f"a={runs[0]}", f"b={runs[1]}", "--out", "a.png") == 0
    assert legend(drawn[0]) == ["a", "b", "real: test set"]
    assert run("accuracy", runs[0], "--images", 50, "--out", "b.png") == 0
    assert curve(drawn[1].axes[0].lines[0]) == [(0.1, 7)]
    Path("x0-0/config.json").unlink()
    assert run("accuracy", runs[0], "--out", "c.png") == 0
    assert legend(drawn[2])[0] == "x0-0"


def test_mistakes_are_one_line(runs):
    pytest.importorskip("matplotlib")

    def refused(*words) -> str:
        with pytest.raises(UserError) as caught:
            run(*words, "--out", "x.png")
        assert "\n" not in str(caught.value) and not Path("x.png").exists()
        return str(caught.value)

    assert "none.jsonl cannot be read" in refused("accuracy", "x0=none.jsonl")
    assert f"{runs[1]} has no evaluation of 50 images" in refused("accuracy", *runs[:2], "--images",
                                                                 50)
    assert "unrecognized arguments: --seed" in refused("densities", "--seed", 1)


# ---------------------------------------------------------------- densities


def test_shares_of_timesteps_are_those_of_training():
    process = GaussianDiffusion(**train_mnist.DIFFUSION)
    args = figures.parser().parse_args(["densities"])
    args.noise_mean, args.noise_std = 0.4, 0.9
    rng = StepRandom(torch.device("cpu"), 0, 0, 200_000, slice(None))
    t = train_mnist.TIMESTEPS["log-normal"](process, rng, args)
    found = torch.bincount(t // 100, minlength=10) / len(t)
    share = charts.shares(process, NormalDist(0.4, 0.9))
    assert share.sum() == pytest.approx(1) and len(share) == 1000
    assert torch.allclose(share.view(10, 100).sum(1), found.double(), atol=0.005)


def area(x: np.ndarray, y: np.ndarray) -> float:
    """Under a curve, by the trapezoidal rule."""
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


def test_densities_are_densities(here, drawn):
    assert run("densities", "--out", "d.png") == 0 and Image.open("d.png").width == 1400
    level, time = drawn[0].axes
    names = legend(drawn[0])
    ours = f"mean {train_mnist.RECIPE['noise_mean']:g}, std {train_mnist.RECIPE['noise_std']:g}"
    assert names[0].startswith("this project") and names[0].endswith(ours)
    assert names[-1] == "DDPM, DiT: uniform t"
    assert all(name in " ".join(names) for name in
               ("SD3", "JiT: mean 0.8, std 0.8", "EDM2: mean -0.4"))
    for panel, whole in ((level, 1), (time, 1000)):
        assert len(panel.lines) == len(names)
        assert len({line.get_color() for line in panel.lines}) == len(names)
        assert {line.get_linestyle() for line in panel.lines} == {"-", "--", "-.", ":"}
        for drawn_line in panel.lines:
            assert area(*drawn_line.get_data()) == pytest.approx(whole, rel=0.01)
    assert set(time.lines[-1].get_ydata()) == {1}
    x, y = level.lines[-1].get_data()               # uniform t: its share between two levels
    process = GaussianDiffusion(**train_mnist.DIFFUSION)
    t = process.t_from_noise_level(torch.tensor([-1.0, 1.0]))
    inside = (x > -1) & (x < 1)
    share = (t[1] - t[0]).item() / 1000
    assert area(x[inside], y[inside]) == pytest.approx(share, abs=0.01)
    ticks = dict(zip(level.get_xticks(), level.get_xticklabels(), strict=True))
    assert ticks[0].get_text() == f"0\nt = {process.t_from_noise_level(torch.tensor(0.0))}"


def test_a_recipe_with_published_levels_shares_their_curve(here, drawn, monkeypatch):
    for normal, first in (((0.8, 0.8), "this project, JiT"), ((0.4, 0.9), "this project")):
        monkeypatch.setitem(charts.RECIPE, "noise_mean", normal[0])
        monkeypatch.setitem(charts.RECIPE, "noise_std", normal[1])
        assert run("densities", "--out", "d.png", "--force") == 0
        names = legend(drawn.pop())
        assert names[0] == f"{first}: mean {normal[0]}, std {normal[1]}"
        assert len(names) == 4 + (first == "this project")
