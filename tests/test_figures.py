"""figures.py: what is drawn is what the lesson's own functions give; what is refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import figures
from cli import UserError
from conftest import load
from data import to_uint8
from diffusion import GaussianDiffusion

GLYPHS = ("--dataset", "glyphs")


def run(*flags) -> int:
    return figures.main([str(f) for f in flags])


@pytest.fixture
def pair(train):
    """Run folders of an eps and of a v model; each holds a fresh one (step 0) and a trained one."""
    assert train("--steps", 3, "--prediction", "v", "--out", "v") == 0
    for step in (0, 3):                         # the same weights, read as eps: half the time
        state = load(f"v/step_000000{step}.pt")
        state["config"] |= dict(prediction="eps")
        figures.checkpoints.save(Path(f"eps/step_000000{step}.pt"), state)
    return "eps", "v"


@pytest.fixture
def sheets(monkeypatch):
    """What `sheet` was called with."""
    calls, draw = [], figures.sheet
    monkeypatch.setattr(figures, "sheet", lambda *a: calls.append(a) or draw(*a))
    return calls


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were written."""
    pytest.importorskip("matplotlib")
    kept, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda p, f: kept.append(f) or save(p, f))
    return kept


# ---------------------------------------------------------------- images


def test_a_sheet_puts_every_image_in_its_place():
    value = torch.arange(6).view(2, 3, 1, 1, 1) / 5 * 2 - 1
    rows = list(value.expand(2, 3, 1, 28, 28))
    picture = np.asarray(figures.sheet(rows, ["a", "long name"], list("xyz"), list("uvw"), 1))
    left = picture.shape[1] - 3 * 88
    for r, y in enumerate((28, 28 + 88 + 12)):
        for c in range(3):
            cell = picture[y : y + 84, left + c * 88 : left + c * 88 + 84]
            assert (cell == int(to_uint8(rows[r][c])[0, 0, 0])).all()
    assert (picture[28 + 42 - 10 : 28 + 42 + 10, : left] < 128).any()         # the names are there
    assert (picture[:28] < 128).any() and (picture[-26:] < 128).any()         # heads and feet too


def test_forward_draws_xt_of_each_t(train, sheets, capsys):
    assert run("forward", *GLYPHS, "--times", 0, 500, 999, "--images", 3, "--seed", 1,
               "--out", "a.png", "--device", "cpu") == 0
    assert Image.open("a.png").width > 4 * 84 and "written: a.png" in capsys.readouterr().out
    rows, _names, heads, feet, _group = sheets[0]
    assert heads == ["x0", "t = 0", "t = 500", "t = 999"]
    assert feet[1:] == ["alpha_bar\n0.99990", "alpha_bar\n0.078", "alpha_bar\n0.00004"]
    x0, a = torch.stack([row[0] for row in rows]), GaussianDiffusion().alpha_bar
    eps = [(torch.stack([row[i + 1] for row in rows]) - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
           for i, t in enumerate((0, 500, 999))]
    assert x0.shape == (3, 1, 28, 28) and x0.min() == -1 and x0.max() > 0.9
    assert torch.allclose(eps[1], eps[2], atol=1e-3) and abs(eps[2].std() - 1) < 0.05
    assert torch.allclose(eps[0], eps[2], atol=1e-3)
    run("forward", *GLYPHS, "--times", 0, "--seed", 2)                        # under output/
    assert Path("output/forward-001.png").is_file()
    assert not torch.equal(sheets[1][0][0][0], x0[0])


def test_images_are_of_all_classes_in_turn(train):
    a = figures.parser().parse_args(["forward", *GLYPHS, "--images", "20"])
    _x0, y = figures.images_of(a, None, torch.device("cpu"))
    assert sorted(y[:10].tolist()) == sorted(y[10:].tolist()) == list(range(10))


def test_x0hat_is_each_models_estimate_not_clipped(pair, sheets, capsys):
    assert run("x0hat", *pair, "--times", 999, 300, "--images", 2, "--out", "x.png") == 0
    rows, names, heads, feet, group = sheets[0]
    assert names == ["xt", "x0_hat (eps)", "x0_hat (v)"] * 2 and group == 3
    assert heads == ["t = 999", "t = 300", "x0"] and feet[0] == "sqrt of\nalpha_bar\n0.006"
    out = capsys.readouterr().out
    a = GaussianDiffusion().alpha_bar.float()
    x0, (_, y) = torch.stack([rows[0][2], rows[3][2]]), figures.images_of(
        figures.parser().parse_args(["x0hat", "eps", *GLYPHS]), None, torch.device("cpu"))
    for i, prediction in enumerate(("eps", "v")):
        model, _ = figures.checkpoints.build(load(f"{prediction}/step_0000003.pt"))
        for column, t in enumerate((999, 300)):
            xt = torch.stack([rows[0][column], rows[3][column]])
            with torch.no_grad():
                seen = model(xt, torch.tensor([t, t]), y)
            s, r = (1 - a[t]).sqrt(), a[t].sqrt()
            want = (xt - s * seen) / r if prediction == "eps" else r * xt - s * seen
            found = torch.stack([rows[1 + i][column], rows[4 + i][column]])
            assert torch.allclose(found, want, rtol=1e-3, atol=1e-3)
            error = (want - x0).square().mean().sqrt().item()
            said = re.search(rf"^{prediction}: .* ([0-9.]+) \(t={t}\)", out, re.MULTILINE)
            assert float(said[1]) == pytest.approx(error, rel=0.01)           # and it is printed
    assert rows[1][0].abs().max() > 20 and rows[2][0].abs().max() < 5         # no clipping


def test_models_of_one_prediction_are_told_apart(pair):
    named = figures.models_of(["v", "eps", "v/step_0000000.pt"], torch.device("cpu"))
    assert [m.name for m in named] == ["v, v/step_0000003", "eps", "v, v/step_0000000"]


# ---------------------------------------------------------------- loss


def test_loss_of_models_that_output_zero_is_the_closed_form(pair, drawn):
    fresh = [f"{p}/step_0000000.pt" for p in pair]
    for size in (100, 7):
        assert run("loss", *fresh, "--images", 30, "--bins", 10, "--batch-size", size, "--seed", 3,
                   "--out", f"{size}.png") == 0
    eps, v = ((line.get_xdata(), line.get_ydata()) for line in drawn[0].axes[0].lines)
    assert np.allclose(eps[0], np.arange(10) * 100 + 49.5)
    assert np.allclose(eps[1], 1, atol=0.03)                    # eps_hat = 0
    assert 0.9 < v[1][0] < 1.1 and v[1][-1] < 1e-3 and (np.diff(v[1]) < 0).all()
    for whole, parts in zip(*(f.axes[0].lines for f in drawn), strict=True):
        assert np.allclose(whole.get_ydata(), parts.get_ydata(), rtol=1e-4)
    texts = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert [t.split(":")[0] for t in texts] == ["eps", "v"]


# ---------------------------------------------------------------- the block


def test_the_blocks_texts_do_not_overlap_and_all_six_vectors_are_named(drawn, tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    assert run("block", "--out", tmp_path / "b.png") == 0
    figure = drawn[0]
    canvas = FigureCanvasAgg(figure)                # sizes of text are those of its own dots
    canvas.draw()
    texts = [t for t in figure.axes[0].texts if t.get_text()]
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts]
    frames = [patch.get_window_extent() for patch in figure.axes[0].patches]
    assert len(frames) == 12
    for i, box in enumerate(boxes):
        assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i].get_text()
        for frame in frames:                        # in a box or out of it, never across its edge
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            assert inside or not box.overlaps(frame), texts[i].get_text()
    words = " ".join(t.get_text() for t in texts)
    for name in ("shift", "scale", "gate"):
        assert f"{name}_attn" in words and f"{name}_mlp" in words
    order = sorted(((t.get_position()[1], t.get_text()) for t in texts if t.get_position()[0] == 0),
                   reverse=True)
    branch = ["LayerNorm", "× (1 + scale) + shift", "", "× gate", "+"]
    want = [w or part for part in ("Attention", "MLP") for w in branch]
    assert [text for _, text in order][1:-1] == want


# ---------------------------------------------------------------- sweeps


def line(cfg_scale=1.0, sampler="ddim", steps=50, eta=0.0, images=1000, std=None, seeds=(0,),
         data_digest="ab", **metrics) -> str:
    mean = dict(accuracy=0.9, frechet=10.0, precision=0.8, recall=0.7) | metrics
    rows = {"samples": dict(images=images, mean=mean, std=std),
            "test": dict(images=images, mean=dict.fromkeys(mean, 0.5), std=None)}
    return json.dumps(dict(images_from="run", weights="ema", sampler=sampler, steps=steps, eta=eta,
                           cfg_scale=cfg_scale, seeds=seeds, data_digest=data_digest, rows=rows))


def series(axes) -> dict:
    """Label -> [(x, y) ...] of a panel."""
    return {box.get_label(): list(zip(box[0].get_xdata(), box[0].get_ydata(), strict=True))
            for box in axes.containers}


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line(2.0, frechet=3.0), line(1.0, frechet=99.0), line(4.0, frechet=8.0),
             line(1.0, frechet=5.0), line(2.0, steps=10, frechet=7.0, recall=0.1),
             line(2.0, sampler="ddpm", steps=1000, eta=None, frechet=2.0),
             line(2.0, steps=20, eta=1.0, frechet=6.0, std=dict(frechet=0.5)),
             json.dumps(dict(images_from="x.npz", rows={}))]
    Path("e.jsonl").write_text("\n".join(lines) + "\n")
    return "e.jsonl"


def test_sweep_sorts_the_results_into_lines(sweep_file, drawn):
    assert run("sweep", sweep_file, "--out", "s.png") == 0
    assert len(drawn[0].axes) == 8 and Path("s.png").is_file()
    frechet = drawn[0].axes[1]
    assert list(series(frechet).values()) == [[(1, 5), (2, 3), (4, 8)]]       # the last of two
    assert frechet.get_ylabel() == "Frechet distance" and frechet.get_xlabel() == "guidance"
    assert series(drawn[0].axes[5]) == {"ddim": [(10, 7), (50, 3)], "ddpm": [(1000, 2)],
                                        "ddim, eta 1": [(20, 6)]}
    assert series(drawn[0].axes[7])["ddim"] == [(10, 0.1), (50, 0.7)]         # recall
    assert run("sweep", sweep_file, "--against", "steps", "--out", "t.png") == 0
    assert [axes.get_xlabel() for axes in drawn[1].axes] == ["steps"] * 4


def test_a_sweep_tells_apart_what_is_not_the_same_measurement(tmp_path, drawn):
    """Other seeds, other data, another number of images: neither replaced nor joined, and the title
    speaks of what is drawn alone."""
    lines = [line(1.0, frechet=1), line(2.0, frechet=2), line(2.0, frechet=7, seeds=(0, 1)),
             line(2.0, frechet=8, data_digest="cd"), line(2.0, frechet=9, images=10_000)]
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    assert run("sweep", tmp_path / "e.jsonl", "--out", tmp_path / "s.png") == 0
    assert list(series(drawn[0].axes[1]).values()) == [[(1, 1), (2, 2)]]
    assert drawn[0].get_suptitle() == "1,000 samples"
    lines += [line(1.0, frechet=6, seeds=(0, 1)), line(1.0, frechet=5, data_digest="cd")]
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    assert run("sweep", tmp_path / "e.jsonl", "--out", tmp_path / "t.png") == 0
    assert series(drawn[1].axes[1]) == {
        "seed 0, data ab": [(1, 1), (2, 2)], "seed 0, 1, data ab": [(1, 6), (2, 7)],
        "seed 0, data cd": [(1, 5), (2, 8)]}


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(train, monkeypatch):
    honest = figures.forward

    def forward(*a):
        Path("output").mkdir(exist_ok=True)
        Path("output/forward-001.png").write_text("another's")
        return honest(*a)

    monkeypatch.setattr(figures, "forward", forward)
    assert run("forward", *GLYPHS, "--times", 5) == 0
    assert Path("output/forward-001.png").read_text() == "another's"
    assert Image.open("output/forward-002.png").format == "PNG"


def test_a_sweep_is_read_from_what_evaluate_writes(tmp_path, drawn):
    def seen(seed: int, count: int) -> evaluate.Seen:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 10
        return evaluate.Seen(torch.zeros(count, 1, 28, 28, dtype=torch.uint8), labels,
                             rng.normal(size=(count, 64)).astype(np.float32), labels)
    names = [str(i) for i in range(10)]
    for scale in (1.0, 3.0):
        found = evaluate.report([seen(1, 40)], {"train": seen(2, 100), "test": seen(3, 40)}, names,
                                0, torch.device("cpu"))
        about = dict(images_from="run", weights="ema", sampler="ddim", steps=5, eta=0.0,
                     cfg_scale=scale, seeds=[0], data_digest="ab")
        evaluate.keep(about | found, None, tmp_path, print)
    assert run("sweep", tmp_path / "evaluations.jsonl", "--out", tmp_path / "s.png") == 0
    assert list(series(drawn[0].axes[0]).values()) == [[(1, 1), (3, 1)]]


# ---------------------------------------------------------------- what is refused


def refused(*flags) -> str:
    with pytest.raises(UserError) as error:
        run(*flags)
    assert "\n" not in str(error.value) and error.value.status == 2
    return str(error.value)


def test_an_existing_file_is_kept_without_force(train):
    Path("a.png").write_text("mine")
    assert "--force" in refused("forward", *GLYPHS, "--out", "a.png")
    assert Path("a.png").read_text() == "mine"
    assert run("forward", *GLYPHS, "--times", 5, "--out", "a.png", "--force") == 0
    assert Image.open("a.png").format == "PNG"
    assert "must be a file name that ends in .png" in refused("forward", *GLYPHS, "--out", "a.jpg")


def test_mistakes_are_one_line(pair, train):
    assert "did you mean --times" in refused("forward", "--time", 3)
    assert "from 0 to 999" in refused("forward", *GLYPHS, "--times", 1000)
    assert "has 100" in refused("forward", *GLYPHS, "--images", 101)
    assert "empty" in refused("forward", "--data-dir", "empty", "--dataset", "folder:empty")
    assert "is not available" in refused("forward", *GLYPHS, "--device", "cuda:77")
    assert "Fig" in refused("FIG") or "invalid choice" in refused("FIG")
    assert train("--steps", 1, "--image-size", 14, "--out", "small") == 0
    assert "input_size 14" in refused("x0hat", "v", "small")


def test_mnist_is_looked_for_in_data_dir(train, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate.data_sets, "load", lambda *a: asked.append(a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("forward", "--data-dir", "there")
    assert asked[0][:2] == ("mnist", Path("there"))


def test_without_matplotlib_the_figures_that_need_it_say_so(pair, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for flags in (["block"], ["loss", "v"], ["sweep", "none.jsonl"]):
        if flags[0] == "sweep":
            Path("none.jsonl").write_text(line(1.0) + "\n" + line(2.0) + "\n")
        assert "pip install matplotlib" in refused(*flags, "--out", "m.png")
    assert run("x0hat", "v", "--times", 5, "--images", 1, "--out", "x.png") == 0


def test_a_loss_in_more_bins_than_timesteps_is_refused(pair):
    pytest.importorskip("matplotlib")
    assert "1000 timesteps" in refused("loss", "v", "--bins", 1001)


@pytest.mark.parametrize("text, says", [
    (None, "cannot be read"), ("", "no evaluation"), ("{", "line 1 is no line"),
    ("[1]", "line 1"), ('{"cfg_scale": 1}', "line 1"),
    (line(1.0), "no two evaluations"), (line(1.0) + "\n" + line(2.0, images=50), "no two")])
def test_files_that_are_no_sweep(tmp_path, text, says):
    pytest.importorskip("matplotlib")
    if text is not None:
        (tmp_path / "e.jsonl").write_text(text)
    assert says in refused("sweep", tmp_path / "e.jsonl", "--out", tmp_path / "s.png")


def test_no_flag_is_untested():
    source = Path(__file__).read_text()
    subs = figures.parser()._subparsers._group_actions[0].choices
    flags = {o for sub in subs.values() for action in sub._actions for o in action.option_strings}
    assert {f for f in flags - {"-h", "--help"} if f'"{f}"' not in source} == set()
