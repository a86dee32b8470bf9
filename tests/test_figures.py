"""tools/figures.py: what is drawn is what the lesson's own functions give; what is refused."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import conftest
import dit
import train_mnist
from diffusion import GaussianDiffusion
from sample import generate, load
from support import checkpoint as checkpoints, command
from support.compute import StepRandom, seed_of
from support.data import to_uint8
from support.registry import NETWORKS
from tools import evaluate, figures
from variants.count import count

GLYPHS = ("--dataset", "glyphs")


def run(*flags) -> int:
    return figures.main([str(f) for f in flags])


def refused(*flags) -> str:
    return conftest.refused(figures.main, *flags)


def make(*flags):
    """A figure that is not written."""
    pytest.importorskip("matplotlib")
    args = figures.parser().parse_args([str(f) for f in flags])
    return args.draw(args)


@pytest.fixture
def sheets(monkeypatch):
    """What `sheet` is called with."""
    calls, draw = [], figures.sheet
    monkeypatch.setattr(figures, "sheet", lambda *a: calls.append(a) or draw(*a))
    return calls


@pytest.fixture
def pair(trained):
    """Run folders of an eps and of a v model, whose outputs depend on everything."""
    state = checkpoints.load(trained("--steps", 1, "--prediction", "v", out="v"))
    rng = torch.Generator().manual_seed(0)
    for weights in state["ema"].values():
        weights += 0.1 * torch.randn(weights.shape, generator=rng)
    for prediction in ("v", "eps"):
        state["config"]["diffusion"]["prediction"] = prediction
        checkpoints.save(Path(prediction, "step_0000002.pt"), state)
    return "eps", "v"


def labels_of(x0: torch.Tensor) -> torch.Tensor:
    """Of test images of glyphs."""
    glyphs = conftest.few_glyphs(100, seed_of(0, "test"))
    same = [(glyphs.images == to_uint8(x)).flatten(1).all(1) for x in x0]
    return torch.cat([glyphs.labels[index] for index in same])


# ---------------------------------------------------------------- images


def test_a_sheet_puts_every_image_in_its_place():
    value = torch.arange(6).view(2, 3, 1, 1, 1) / 5 * 2 - 1
    rows = [list(row) for row in value.expand(2, 3, 1, 28, 28)]
    rows[1][2] = None
    page = np.asarray(figures.sheet(rows, ["a", "long name"], list("xyz"), list("uvw"), 1))
    left = page.shape[1] - 3 * 88
    for r, y in enumerate((28, 28 + 88 + 12)):
        for c in range(3):
            cell = page[y : y + 84, left + c * 88 : left + c * 88 + 84]
            assert (cell == (255 if rows[r][c] is None else int(to_uint8(value[r, c, 0, 0])))).all()
    assert (page[28 + 32 : 28 + 52, :left] < 128).any()             # the names are there,
    assert (page[:28] < 128).any() and (page[-44:] < 128).any()     # heads and feet too


def test_forward_draws_xt_of_each_t(train, sheets):
    flags = ("forward", *GLYPHS, "--times", 0, 500, 999, "--seed")
    assert run(*flags, 1, "--images", 20, "--out", "a.png") == 0
    rows, _names, heads, feet = sheets[0]
    assert heads == ["x0", "t = 0", "t = 500", "t = 999"]
    assert feet == ["", "alpha\n0.9999", "alpha\n0.2789", "alpha\n0.0064"]
    rows = torch.stack(rows)
    x0, a = rows[:, 0], GaussianDiffusion().alpha_bar
    eps = [(rows[:, i + 1] - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
           for i, t in enumerate((0, 500, 999))]
    assert x0.shape == (20, 1, 28, 28) and x0.min() == -1 and x0.max() > 0.9
    assert torch.allclose(eps[1], eps[2], atol=1e-3) and abs(eps[2].std() - 1) < 0.02
    assert torch.allclose(eps[0], eps[2], atol=1e-3) and abs(eps[2].mean()) < 0.02
    labels = labels_of(x0).tolist()
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert run(*flags, 2) == 0 and run(*flags, 2) == 0              # under output/
    assert Image.open("output/forward.png").size == Image.open("output/forward-2.png").size
    assert not torch.equal(sheets[1][0][0][0], x0[0])


def test_x0hat_is_each_models_estimate_not_clipped(pair, sheets, capsys):
    assert run("x0hat", *pair, "v/step_0000001.pt", "--times", 999, 300, "--out", "x.png") == 0
    rows, names, heads, feet, group = sheets[0]
    assert names == ["xt", "x0_hat (eps)", "x0_hat (v, v/step_0000002)",
                     "x0_hat (v, v/step_0000001)"] * 2
    assert heads == ["t = 999", "t = 300", "x0"] and group == 4
    assert feet == ["alpha\n0.0064", "alpha\n0.6277"]
    out, a = capsys.readouterr().out, GaussianDiffusion().alpha_bar.float()
    x0 = torch.stack([rows[0][2], rows[4][2]])
    y = labels_of(x0)
    for i, name in enumerate(pair):
        model = load(name).model
        for column, t in enumerate((999, 300)):
            xt = torch.stack([rows[0][column], rows[4][column]])
            with torch.no_grad():
                seen = model(xt, torch.tensor([t, t]), y)
            s, r = (1 - a[t]).sqrt(), a[t].sqrt()
            want = (xt - s * seen) / r if name == "eps" else r * xt - s * seen
            found = torch.stack([rows[1 + i][column], rows[5 + i][column]])
            assert torch.allclose(found, want, rtol=1e-3, atol=1e-3)
            error = (want - x0).square().mean().sqrt().item()
            said = re.search(rf"^{name}[:,].* ([0-9.]+) \(t={t}\)", out, re.MULTILINE)
            assert float(said[1]) == pytest.approx(error, rel=0.01)
    assert rows[1][0].abs().max() > 20                              # no clipping


def test_rows_of_samples_have_the_same_noise(pair, sheets):
    """guidance: of one class, a row for each scale; ema: the weights and their EMA."""
    assert run("guidance", "v", "--label", "three", "--cfg-scale", 0, 1, 3, "--seed", 5,
               "--out", "g.png") == 0
    assert run("ema", "v/step_0000001.pt", "v/step_0000001.pt", "--seed", 5, "--out", "e.png") == 0
    (rows, names, _), (pairs, steps, *_, group) = sheets
    assert names == ["scale 0: unconditional", "scale 1: conditional", "scale 3: guided"]
    assert steps == ["step 1: model", "step 1: ema"] * 2 and group == 2
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(pairs[0], pairs[1])
    for row, scale in zip(rows, (0, 1, 3), strict=True):
        want = generate(load("v"), [3] * 6, cfg_scale=scale, seed=5)
        assert torch.equal(row, want.as_subclass(torch.Tensor))
    for row, weights in zip(pairs, ("model", "ema") * 2, strict=True):
        want = generate(load("v/step_0000001.pt", weights=weights), range(10), seed=5)
        assert torch.equal(row, want.as_subclass(torch.Tensor))
    assert "EMA weights alone" in refused("ema", command.SHIPPED, "--out", "x.png")


def test_previews_are_the_first_of_each_class(train, sheets):
    """generate(labels)[k] has noise k; a preview has six images of each class."""
    assert train("--steps", 4, "--preview-every", 2, "--out", "run") == 0
    assert run("previews", "run", "--steps", 2, 4, "--out", "p.png") == 0
    rows, names, heads = sheets[0]
    assert names == ["step 2", "step 4"] and heads == [""] * 10
    want = to_uint8(generate(load("run"), [k // 6 for k in range(60)])[::6])
    for image, pixels in zip(rows[1], want, strict=True):       # 28 pixels, three times as large
        assert np.array_equal(np.asarray(image)[1::3, 1::3, 0], pixels[0])
    assert "step_0000003.png is missing" in refused("previews", "run", "--steps", 3)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("network", ["dit", "modern", "in-context"])
def test_attention_weights_are_those_of_the_network(train, sheets, monkeypatch, network):
    """Weights times values is what a block's projection gets, head by head. Each panel has those of
    its image, t, head and block, of the patch of most contrast; further tokens are left out."""
    train("--network", network, "--steps", 1, "--out", "run")
    state, seen, panels = checkpoints.load(Path("run/step_0000001.pt")), {}, []
    for name, w in state["ema"].items():        # sharp, unlike the uniform ones of a fresh model
        if "attn.qkv.weight" in name:
            w += torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    checkpoints.save(Path("run/step_0000002.pt"), state)
    overlay = figures.overlay
    monkeypatch.setattr(figures, "overlay", lambda *a: panels.append(a) or overlay(*a))
    flags = ["attention", "run", "--times", "900", "0", "--out", "a.png"]
    assert run(*flags) == 0
    rows, names, heads, _feet, group, title = sheets[0]
    assert names == ["t = 900, head 0", "t = 900, head 1", "t = 0, head 0", "t = 0, head 1"]
    assert heads == ["xt", "block 0", "block 1"] * 2 and group == 2
    assert [[image is None for image in row] for row in rows] == [
        [False] * 6, [True, False, False] * 2] * 2
    assert title.startswith(f"{conftest.TINY} (step_0000002.pt)")
    checkpoint, drawn = load("run"), iter(p for p in panels if p[2].any())
    for k, block in enumerate(checkpoint.model.blocks):
        block.attn.qkv.register_forward_hook(lambda m, i, out, k=k: seen.update({(k, "v"): out}))
        block.attn.proj.register_forward_pre_hook(lambda m, args, k=k: seen.update({k: args[0]}))
    x0, y, xts = figures.noised_images(figures.parser().parse_args(flags), checkpoint.diffusion,
                                       checkpoint)
    for xt, t in zip(xts, (900, 0), strict=True):
        with torch.no_grad(), figures.AttentionWeights() as blocks:
            checkpoint.model(xt, torch.tensor([t, t]), y)
        for k, weights in enumerate(blocks.found):
            v = seen[k, "v"].unflatten(2, (3, 2, 8))[:, :, 2].transpose(1, 2)
            assert torch.allclose((weights @ v).transpose(1, 2).flatten(2), seen[k], atol=1e-5)
            assert weights.max() > 0.2
        for head, image, k in itertools.product(range(2), range(2), range(2)):
            patches = [x0[image, 0, 7 * (q // 4) :, 7 * (q % 4) :][:7, :7] for q in range(16)]
            query = max(range(16), key=lambda q: patches[q].std())
            shown, q, w = next(drawn)
            assert torch.equal(shown, xt[image]) and q == query
            assert torch.allclose(w, blocks.found[k][image, head, query, :16])


def test_an_overlay_outlines_the_query_and_colours_what_it_attends_to():
    image, weights = torch.zeros(1, 8, 8), torch.zeros(4)
    plain = np.asarray(figures.overlay(image, 2, weights)).astype(int)
    weights[1] = 1.0
    found = np.asarray(figures.overlay(image, 2, weights)).astype(int)
    for pixels in (plain, found):                                   # the query: bottom left
        assert (pixels[[42, 83], 5] == (0, 220, 255)).all()
        assert (pixels[42:, 42:] != (0, 220, 255)).any(axis=-1).all()
    assert (found[:42, 42:] == (255, 120, 0)).all()                 # all of it: top right
    assert (found[:42, :42] == found[0, 0]).all() and (plain[:42] == plain[0, 0]).all()


# ---------------------------------------------------------------- evaluations


def line(scale=1.0, accuracy=0.9, frechet=9.0, **settings) -> str:
    rows = {"samples": dict(accuracy=accuracy, frechet=frechet),
            "test": dict(accuracy=0.998, frechet=0.53)}
    about = dict(step=7, weights="ema", sampler="ddim", steps=25, cfg_scale=scale)
    return json.dumps(about | settings | dict(rows=rows)) + "\n"


def points(line) -> list:
    """Those of a line of matplotlib, to compare with others."""
    return [pytest.approx(point) for point in np.transpose(line.get_data()).tolist()]


def test_an_evaluation_is_read_as_evaluate_writes_it(here):
    def some(seed: int, count: int) -> evaluate.Features:
        labels = torch.arange(count) % 10
        return evaluate.Features(torch.zeros(count, 1, 28, 28, dtype=torch.uint8), labels,
                                 torch.randn(count, 64), labels)

    rows = evaluate.report(some(1, 40), some(2, 100), some(3, 40), 0, torch.device("cpu"))
    measured = json.dumps(json.loads(line(3)) | dict(rows=rows)) + "\n"
    Path("evaluations.jsonl").write_text(line(3) + measured + line(3, weights="model")
                               + line(3, autoguidance="w") + line(3, guidance_interval=[1, 10]))
    assert figures.evaluations_of(Path()) == {
        (7, "ddim", 25, 3): (rows["samples"]["frechet"], rows["samples"]["accuracy"])}


# ---------------------------------------------------------------- training


def test_timesteps_are_those_of_training(here):
    tables, draws = make("timesteps").axes
    process, recipe = GaussianDiffusion(), SimpleNamespace(**train_mnist.RECIPE)
    assert torch.equal(torch.tensor(tables.lines[0].get_ydata()), process.alpha)
    assert torch.equal(torch.tensor(tables.lines[1].get_ydata()), process.sigma)
    assert [curve.get_label().split(":")[0] for curve in draws.lines] == [
        "this project", "SD3", "JiT", "DDPM, DiT"]
    for curve in draws.lines:
        assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(1000, rel=0.01)
    rng = StepRandom(torch.device("cpu"), 0, 0, 200_000, slice(None))
    t = train_mnist.draw_timesteps(process, rng, recipe)
    found = torch.bincount(t // 100, minlength=10) / len(t)
    drawn = draws.lines[0].get_ydata().reshape(10, 100).sum(1) / 1000
    assert np.allclose(drawn, found, atol=0.005)


@pytest.fixture
def sizes(train, monkeypatch) -> list[str]:
    """Runs of two steps: two seeds of one model, a wider one, one with patch 14. Each is evaluated
    after both, at two numbers of sampling steps and three guidance scales."""
    names = [f"output/{name}" for name in ("one", "two", "wide", "p14")]
    monkeypatch.setitem(dit.MODELS, "DiT-Wide/7", conftest.TINY_SIZE | dict(hidden_size=32))
    monkeypatch.setitem(dit.MODELS, "DiT-Test/14", conftest.TINY_SIZE | dict(patch_size=14))
    flags = [("--seed", 0), ("--seed", 1), ("--model", "DiT-Wide/7"),
             ("--model", "DiT-Test/14", "--network", "adaln")]
    for i, name in enumerate(names):
        assert train("--steps", 2, *flags[i], "--out", name) == 0
        Path(name, "evaluations.jsonl").write_text("".join(
            line(scale, accuracy, factor * (10 + i) / step / steps, step=step, steps=steps)
            for step in (1, 2) for steps in (2, 10)
            for scale, accuracy, factor in ((1, 0.9, 1), (1.5, 0.99, 2), (2, 1.0, 3))))
    return names


def drawn(*flags) -> dict:
    return {c.get_label(): points(c) for c in make("curves", *flags).axes[0].lines}


def test_curves_of_quality_against_gflops(sizes, capsys):
    configs = [json.loads(Path(name, "config.json").read_text()) for name in sizes[1:]]
    small, wide, p14 = (count(NETWORKS[c["network"]], **c["model"])[1] / 1e9 for c in configs)
    found = drawn(*sizes, "--x", "forward")       # with 99% right, in 2 steps
    assert found["patch 7"] == [(small, 21 / 4), (wide, 24 / 4)]    # the mean of two seeds
    assert found["patch 14, adaln"] == [(p14, 26 / 4)] and len(found) == 2
    assert f"DiT-Wide/7 (patch 7): {wide:.4g} Gflops, 6" in capsys.readouterr().out
    found = drawn(*sizes, "--x", "training")      # three forwards of 8 images
    assert found["DiT-Test/7"] == [(24 * small, 21 / 2), (48 * small, 21 / 4)]
    assert found["DiT-Test/14, adaln"][1] == (48 * p14, 26 / 4)
    found = drawn(*sizes, "--x", "sampling")      # two forwards a step
    assert found["DiT-Wide/7"] == [(4 * wide, 24 / 4), (20 * wide, 24 / 20)]
    found = drawn(*sizes, "--x", "sampling", "--cfg-scale", 1)
    assert found["DiT-Wide/7"] == [(2 * wide, 12 / 4), (10 * wide, 12 / 20)]
    assert "no evaluation with 99% right" in refused("curves", sizes[0], "--x", "forward",
                                                     "--cfg-scale", 9)


def test_curves_of_the_loss_are_averages(sizes):
    rows = [dict(step=i + 1, loss=4.0 if i < 60 else 2.0 + i % 2) for i in range(300)]
    rows[9]["loss"], rows[0]["loss_q1"] = float("nan"), 1.0
    for name, kept in zip(sizes, (rows, rows[:20]), strict=False):
        Path(name, "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)))
    axes, = make("curves", sizes[0]).axes
    steps, means = axes.lines[0].get_data()
    assert steps[:5] == pytest.approx([1, 2, 3, 4, 5]) and 10 not in steps.tolist()
    assert 20 < len(steps) < 50 and steps[-1] > 250                 # ranges that grow
    assert means[steps < 60] == pytest.approx(4) and means[-3:] == pytest.approx(2.5, abs=0.05)
    assert drawn(sizes[0], "--y", "loss_q1") == {sizes[0]: [(1, 1)]}
    assert list(drawn(f"a={sizes[0]}", f"a={sizes[1]}")) == ["a"]   # two seeds
    found = drawn(*sizes[:2])
    assert list(found) == sizes[:2] and len(found[sizes[1]]) < 20
    assert run("curves", sizes[1]) == 0 and Image.open("output/curves.png").width == 1120


# ---------------------------------------------------------------- what is refused


def test_an_existing_file_is_kept_without_force(train):
    Path("a.png").write_text("mine")
    assert "--force" in refused("forward", *GLYPHS, "--out", "a.png")
    assert Path("a.png").read_text() == "mine"
    assert run("forward", *GLYPHS, "--times", 5, "--out", "a.png", "--force") == 0
    assert Image.open("a.png").format == "PNG"
    assert ".png" in refused("forward", *GLYPHS, "--out", "a.jpg")


def test_what_cannot_share_a_figure_is_refused(pair, train):
    assert "0 to 999" in refused("forward", *GLYPHS, "--times", 1000)
    train("--steps", 1, "--image-size", 14, "--out", "small")
    assert "differ" in refused("x0hat", "v", "small")
    torch.save(dict(format="dit-latents/1", latents=torch.randn(200, 4, 28, 28).half(),
                    labels=torch.arange(200) % 10, class_names=list("0123456789")), "l.pt")
    assert "l.pt" in refused("forward", "--dataset", "latents:l.pt")
    assert "l.pt" in refused("attention", "v", "--dataset", "latents:l.pt")
    assert "no valid training run" in refused("curves", "small/samples")
    assert "has no loss_q9" in refused("curves", "small", "--y", "loss_q9")


def test_files_that_are_no_evaluations(sizes):
    file, flags = Path(sizes[0], "evaluations.jsonl"), ("curves", sizes[0], "--x", "training")
    damaged = json.loads(line(2)) | dict(rows={})
    for text in (json.dumps(damaged), 100_000 * "["):
        file.write_text(line(1) + text)
        assert "no valid training run" in refused(*flags)
    for text in ("{", "[1]"):                           # of a kill: left out
        file.write_text(line(1, accuracy=1.0, steps=2) + text)
        assert run(*flags) == 0
    file.write_text(json.dumps(dict(images_from="x.npz")))
    assert "no evaluation" in refused(*flags)


def test_without_matplotlib_the_figures_that_need_it_say_so(train, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for flags in (["curves", "v"], ["timesteps"]):
        assert "pip install matplotlib" in refused(*flags, "--out", "m.png")
    assert run("forward", *GLYPHS, "--times", 5, "--out", "x.png") == 0
