"""tools/curves.py and tools/charts.py: what is drawn lies where the numbers are."""

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
from tools import charts, curves, figures


def run(*words) -> int:
    return figures.main([str(w) for w in words])


# ---------------------------------------------------------------- curves


def test_axes_have_round_ends_and_ticks():
    axis = curves.linear("recall", 0.738, 0.902)
    assert (axis.low, axis.high) == pytest.approx((0.7, 0.95))
    assert list(axis.ticks.values()) == ["0.7", "0.75", "0.8", "0.85", "0.9", "0.95"]
    assert axis.at(0.7) == pytest.approx(0) and axis.at(0.825) == pytest.approx(0.5)
    axis = curves.logarithmic("distance", 0.53, 13.3)
    assert (axis.low, axis.high) == pytest.approx((0.5, 20))
    assert list(axis.ticks.values()) == ["0.5", "1", "2", "5", "10", "20"]
    assert axis.at(10**0.5) == pytest.approx(0.5)
    axis = curves.logarithmic("distance", 2, 2)                 # a single value has an axis, too
    assert axis.low == 2 and axis.high == 5


def pixels(page: Image.Image, colour: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of about a colour."""
    difference = np.abs(np.asarray(page).astype(int) - colour).sum(axis=-1)
    return np.nonzero(difference < 60)


def test_curves_lie_where_their_points_are():
    axis = curves.Axis("x", 0, 10, {0: "0", 10: "10"})
    colour = curves.COLOURS[0]
    empty = curves.draw([curves.Panel("a", axis, axis)] * 2, [("name", colour)])
    assert empty.width == 920
    box = (curves.LEFT, curves.TOP, 460 - curves.RIGHT, 360 - curves.BOTTOM)
    panel = curves.Panel("a", axis, axis, [curves.Curve([(2, 5), (8, 5)], colour)])
    page = curves.draw([panel], [("name", colour)])
    rows, columns = pixels(page.crop(box), colour)
    width, height = box[2] - box[0], box[3] - box[1]
    assert abs(columns.min() - 0.2 * width) <= 2 and abs(columns.max() - 0.8 * width) <= 2
    assert np.abs(rows - 0.5 * height).max() <= 2
    rows, _ = pixels(page.crop((0, 362, 460, page.height)), colour)
    assert len(rows)                                            # the legend
    beyond = curves.Panel("a", axis, axis, [curves.Curve([(2, 5), (8, 500)], colour)])
    rows, columns = pixels(curves.draw([beyond], []), colour)
    assert rows.min() >= curves.TOP - 4                         # cut at the frame
    panel = curves.Panel("a", axis, axis, lines=[("y", 9, ""), ("x", 1, "")])
    dark = 255 - np.asarray(curves.draw([panel], []).crop(box).convert("L")).astype(float)
    dark = dark[5:-5, 5:-5]                                     # without the frame
    assert abs(dark.sum(axis=1).argmax() + 5 - 0.1 * height) <= 1
    assert abs(dark.sum(axis=0).argmax() + 5 - 0.1 * width) <= 1


def test_labels_of_marks_do_not_overlap():
    axis = curves.Axis("x", 0, 10, {})

    def drawn(count: int) -> int:
        points = [(5 + 0.01 * i, 5) for i in range(count)]
        curve = curves.Curve(points, (255, 0, 0), 1, ["1.75"] * count)
        rows, _ = pixels(curves.draw([curves.Panel("", axis, axis, [curve])], []), (255, 0, 0))
        return len(rows)

    assert drawn(1) < drawn(4) == pytest.approx(drawn(9), abs=30)       # four places around a point


def test_a_long_legend_has_several_rows():
    rows = curves._legend_rows([("a name of some length", (0, 0, 0))] * 5, 400)
    assert [len(row) for row in rows] == [2, 2, 1]


# ---------------------------------------------------------------- quality against accuracy


def line(guidance: float, accuracy: float, frechet: float, recall=0.8, images=1000, steps=25,
         digest="ab") -> str:
    rows = {"samples": dict(images=images, std=None, mean=dict(
                accuracy=accuracy, frechet=frechet, recall=recall, precision=0.9)),
            "test": dict(images=images, std=None, mean=dict(
                accuracy=0.998, frechet=0.53, recall=0.871, precision=0.9))}
    return json.dumps(dict(images_from="run", weights="ema", sampler="ddim", steps=steps, eta=0.0,
                           cfg_scale=guidance, seeds=[0], data_digest=digest, rows=rows)) + "\n"


@pytest.fixture
def panels(monkeypatch):
    """What `curves.draw` got."""
    calls, draw = [], charts.draw
    monkeypatch.setattr(charts, "draw", lambda *a: calls.append(a) or draw(*a))
    return calls


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


def test_quality_against_accuracy(runs, panels, capsys):
    assert run("accuracy", *runs, "--out", "a.png") == 0
    assert Image.open("a.png").width == 920
    (frechet, recall), legend = panels[0]
    assert [name for name, _ in legend] == ["x0 (2 runs)", "v"]
    thin, other, mean, v = (c.points for c in frechet.curves)
    near = pytest.approx
    assert thin == [near(p) for p in [(0.1, 9), (0.01, 2), (0.005, 3), (0.0005, 5)]]
    assert other == [near(p) for p in [(0.08, 8), (0.003, 4), (0.0005, 3.5)]]
    assert mean == [near(p) for p in [(0.09, 8.5), (0.004, 3.5), (0.0005, 4.25)]]
    assert v == [near(p) for p in [(0.2, 20), (0.02, 10)]]
    widths = [c.width for c in frechet.curves]
    assert widths[0] == widths[1] < widths[2] == widths[3]
    assert len({c.colour for c in frechet.curves[:3]}) == 1 and v != mean
    assert [c.marks for c in frechet.curves] == [None, None, ["1", "2", "2.5"], ["1", "1.5"]]
    assert recall.curves[0].points[1] == near((0.01, 0.82))
    assert ("y", 0.53, "real: test set") in frechet.lines and ("y", 0.871, "real: test set") in \
        recall.lines
    out = capsys.readouterr().out
    assert ("x0 (x0-0/evaluations.jsonl): Frechet distance 3.00 at guidance 2, 99.50% right, "
            "recall 0.800") in out
    assert "x0 (x0-1/evaluations.jsonl): Frechet distance 3.50 at guidance 2.5, 100.00%" in out
    assert "x0: Frechet distance 3.25 ± 0.35 over 2 runs" in out
    assert "v (v-0/evaluations.jsonl): no guidance with 99.5% right" in out
    assert "real, test set: Frechet distance 0.53, recall 0.871; 1,000 images each" in out


def test_the_accuracy_axis_is_logarithmic_in_the_error(runs, panels):
    run("accuracy", *runs, "--out", "a.png")
    axis = panels[0][0][0].x
    assert list(axis.ticks.values()) == ["80%", "90%", "95%", "98%", "99%", "99.5%", "99.8%",
                                         "99.9%", "100%"]
    assert axis.at(0.01) - axis.at(0.1) == pytest.approx(axis.at(0.001) - axis.at(0.01))
    assert 0 < axis.at(0.2) < axis.at(0.1) and axis.at(charts.error(1.0, 1000)) == 1


def test_names_and_images_can_be_given(runs, panels):
    assert run("accuracy", f"a={runs[0]}", f"b={runs[1]}", "--out", "a.png") == 0
    assert [name for name, _ in panels[0][1]] == ["a", "b"]
    assert run("accuracy", runs[0], "--images", 50, "--out", "b.png") == 0
    assert panels[1][0][0].curves[0].points == [pytest.approx((0.1, 7))]
    Path("x0-0/config.json").unlink()
    assert run("accuracy", runs[0], "--out", "c.png") == 0
    assert panels[2][1][0][0] == "x0-0"


def test_mistakes_are_one_line(runs):
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


def test_densities_are_densities(here, panels):
    assert run("densities", "--out", "d.png") == 0 and Image.open("d.png").width == 920
    (level, time), legend = panels[0]
    ours = f"mean {train_mnist.RECIPE['noise_mean']:g}, std {train_mnist.RECIPE['noise_std']:g}"
    assert legend[0][0].startswith("this project") and legend[0][0].endswith(ours)
    assert legend[-1][0] == "DDPM, DiT: uniform t"
    names = " ".join(name for name, _ in legend)
    assert all(name in names for name in ("SD3", "JiT: mean 0.8, std 0.8", "EDM2: mean -0.4"))
    for panel, whole in ((level, 1), (time, 1000)):
        for curve in panel.curves:
            x, y = np.array(curve.points).T
            assert area(x, y) == pytest.approx(whole, rel=0.01)
    assert max(time.curves[-1].points)[1] == 1
    x, y = np.array(level.curves[-1].points).T      # uniform t: its share between two levels
    process = GaussianDiffusion(**train_mnist.DIFFUSION)
    t = process.t_from_noise_level(torch.tensor([-1.0, 1.0]))
    inside = (x > -1) & (x < 1)
    share = (t[1] - t[0]).item() / 1000
    assert area(x[inside], y[inside]) == pytest.approx(share, abs=0.01)


def test_a_recipe_with_published_levels_shares_their_curve(here, panels, monkeypatch):
    for normal, first in (((0.8, 0.8), "this project, JiT"), ((0.4, 0.9), "this project")):
        monkeypatch.setitem(charts.RECIPE, "noise_mean", normal[0])
        monkeypatch.setitem(charts.RECIPE, "noise_std", normal[1])
        assert run("densities", "--out", "d.png", "--force") == 0
        _, legend = panels.pop()
        assert legend[0][0] == f"{first}: mean {normal[0]}, std {normal[1]}"
        assert len(legend) == 4 + (first == "this project")
