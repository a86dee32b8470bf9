"""tools/figures.py: what is drawn is what the lesson's own functions give; what is refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import load
from diffusion import GaussianDiffusion, classifier_free_guidance
from support import checkpoints, distributed, latents
from support.cli import UserError
from support.data import to_uint8
from support.seeds import ImageNoise
from tools import evaluate, figures

GLYPHS = ("--dataset", "glyphs")


def run(*flags) -> int:
    return figures.main([str(f) for f in flags])


@pytest.fixture
def pair(trained):
    """Run folders of an eps and of a v model; each holds a fresh one (step 0) and a trained one."""
    trained("--steps", 3, "--prediction", "v", out="v")
    for step in (0, 3):                         # the same weights, read as eps: half the time
        state = load(f"v/step_000000{step}.pt")
        state["config"]["diffusion"]["prediction"] = "eps"
        checkpoints.save(Path(f"eps/step_000000{step}.pt"), state)
    return "eps", "v"


@pytest.fixture
def sheets(monkeypatch):
    """What `sheet` was called with."""
    calls, draw = [], figures.sheet
    monkeypatch.setattr(figures, "sheet", lambda *a: calls.append(a) or draw(*a))
    return calls


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
    rows, _names, heads, feet = sheets[0]
    assert heads == ["x0", "t = 0", "t = 500", "t = 999"]
    assert feet[1:] == ["alpha\n0.99995", "alpha\n0.279", "alpha\n0.006"]
    x0, a = torch.stack([row[0] for row in rows]), GaussianDiffusion().alpha_bar
    eps = [(torch.stack([row[i + 1] for row in rows]) - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
           for i, t in enumerate((0, 500, 999))]
    assert x0.shape == (3, 1, 28, 28) and x0.min() == -1 and x0.max() > 0.9
    assert torch.allclose(eps[1], eps[2], atol=1e-3) and abs(eps[2].std() - 1) < 0.05
    assert torch.allclose(eps[0], eps[2], atol=1e-3)
    run("forward", *GLYPHS, "--times", 0, "--seed", 2)                        # under output/
    assert Path("output/forward-001.png").is_file()
    assert not torch.equal(sheets[1][0][0][0], x0[0])


def test_images_are_class_balanced(train):
    args = figures.parser().parse_args(["forward", *GLYPHS, "--images", "20"])
    _x0, y = figures.load_images(args, None, torch.device("cpu"))
    assert sorted(y[:10].tolist()) == sorted(y[10:].tolist()) == list(range(10))


def test_x0hat_is_each_models_estimate_not_clipped(pair, sheets, capsys):
    assert run("x0hat", *pair, "--times", 999, 300, "--images", 2, "--out", "x.png") == 0
    rows, names, heads, feet, group = sheets[0]
    assert names == ["xt", "x0_hat (eps)", "x0_hat (v)"] * 2 and group == 3
    assert heads == ["t = 999", "t = 300", "x0"] and feet[0] == "alpha\n0.006"
    out = capsys.readouterr().out
    a = GaussianDiffusion().alpha_bar.float()
    x0, (_, y) = torch.stack([rows[0][2], rows[3][2]]), figures.load_images(
        figures.parser().parse_args(["x0hat", "eps", *GLYPHS]), None, torch.device("cpu"))
    for i, prediction in enumerate(("eps", "v")):
        model, _ = checkpoints.build(load(f"{prediction}/step_0000003.pt"))
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


def test_models_of_one_prediction_get_other_names(pair):
    _, models = figures.load_models(["v", "eps", "v/step_0000000.pt"], torch.device("cpu"))
    assert [name for name, _ in models] == ["v, v/step_0000003", "eps", "v, v/step_0000000"]


# ---------------------------------------------------------------- guidance, attention


def test_guidance_draws_the_same_noise_at_every_scale(pair, sheets, tmp_path):
    state = load("v/step_0000003.pt")           # untrained weights would ignore the class
    for weights in (state["ema"], state["model"]):
        for w in weights.values():
            w += 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    checkpoints.save(Path("v/step_0000004.pt"), state)
    assert run("guidance", "v", "--cfg-scale", 0, 1, 3, "--steps", 4, "--seed", 5,
               "--out", "g.png") == 0
    rows, names, heads, _feet, _group = sheets[0]
    assert names == ["scale 0: unconditional", "scale 1: conditional", "scale 3: guided"]
    assert heads == list("0123456789") and not torch.equal(rows[0], rows[1])
    model, diffusion = checkpoints.build(load("v/step_0000004.pt"))
    predict = classifier_free_guidance(model, torch.arange(10), 3)
    xT = ImageNoise(5, 0, 10, (1, 28, 28))("T")
    cpu = torch.device("cpu")
    with distributed.autocast(cpu, distributed.sampling_precision("auto", cpu)):
        *_, (_, want, _) = diffusion.ddim_sample(predict, xT, steps=4)
    assert torch.allclose(rows[2], want.clamp(-1, 1), atol=1e-5)


def test_attention_weights_are_those_of_the_network(pair):
    """Weights times values is what the block's projection gets."""
    state = load("v/step_0000003.pt")
    model, _ = checkpoints.build(state)
    seen = {}
    for i, block in enumerate(model.blocks):
        block.attn.num_heads = 1                # so that the mean of the heads is the one head
        with torch.no_grad():
            block.attn.qkv.weight.mul_(20)      # sharp, unlike the uniform ones of a fresh model
        block.attn.qkv.register_forward_hook(lambda m, args, out, i=i: seen.update({(i, "v"): out}))
        block.attn.proj.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0]}))
    found = figures.attention_weights(model, torch.randn(3, 1, 28, 28), 100, torch.arange(3))
    assert len(found) == 2
    for i, weights in enumerate(found):
        assert weights.shape == (3, 16, 16) and torch.allclose(weights.sum(-1), torch.ones(3, 16))
        assert weights.max() > 0.2 and (weights >= 0).all()
        v = seen[i, "v"].chunk(3, dim=-1)[2]
        assert torch.allclose(weights @ v, seen[i], atol=1e-5)
    assert all(len(b.attn.qkv._forward_hooks) == 1 for b in model.blocks)       # its own are gone


def test_attention_draws_a_row_per_image_and_t(pair, sheets):
    assert run("attention", "v", "--images", 2, "--times", 900, 0, "--out", "a.png") == 0
    rows, names, heads, _feet, group = sheets[0]
    assert names == ["t = 900", "t = 0"] * 2 and group == 2
    assert heads == ["xt", "block 0, %", "block 1, %"] and {len(row) for row in rows} == {3}


@pytest.mark.parametrize("network", ["in-context", "registers"])
def test_attention_leaves_out_tokens_that_are_not_the_images(train, sheets, network):
    """They stand behind the image's; a patch attends to them as well."""
    train("--steps", 1, "--network", network, "--out", network)
    assert run("attention", network, "--images", 1, "--times", 500, "--out", "a.png") == 0
    assert len(sheets[0][0][0]) == 3
    model, _ = checkpoints.build(load(f"{network}/step_0000001.pt"))
    for weights in figures.attention_weights(model, torch.randn(1, 1, 28, 28), 9, torch.arange(1)):
        assert weights.shape == (1, 16, 16) and (weights.sum(-1) < 0.99).all()


def test_an_overlay_outlines_the_query_and_colours_what_it_attends_to():
    image, weights = torch.zeros(1, 8, 8), torch.zeros(4)
    plain = np.asarray(figures.overlay(image, 2, weights, cell=80)).astype(int)
    weights[1] = 1.0
    found = np.asarray(figures.overlay(image, 2, weights, cell=80)).astype(int)
    for pixels in (plain, found):               # the query: bottom left
        assert (pixels[[40, 79], 5] == (0, 220, 255)).all()
        assert (pixels[41:79, 40:] != (0, 220, 255)).any(axis=-1).all()
    orange = (found[..., 0] > found[..., 2] + 100).nonzero()
    assert orange[0].max() < 40 <= orange[1].min() and len(orange[0]) > 800     # top right
    assert (plain[:40, :, 0] == plain[:40, :, 2]).all()
    labels = (found[:40, 40:] == 255).all(axis=-1)
    assert labels[12:28, 8:32].any() and not labels[:10].any()                  # "100"


# ---------------------------------------------------------------- error in eps


def test_the_error_of_models_that_output_zero_is_the_closed_form(pair, drawn):
    fresh = [f"{p}/step_0000000.pt" for p in pair]
    for size in (100, 7):
        assert run("error", *fresh, "--images", 30, "--bins", 10, "--batch-size", size, "--seed", 3,
                   "--out", f"{size}.png") == 0
    eps, v = ((line.get_xdata(), line.get_ydata()) for line in drawn[0].axes[0].lines)
    assert np.allclose(eps[0], np.arange(10) * 100 + 49.5)
    assert np.allclose(eps[1], 1, atol=0.03)                    # eps_hat = 0
    assert 0.9 < v[1][0] < 1.1 and v[1][-1] < 1e-3 and (np.diff(v[1]) < 0).all()
    for whole, parts in zip(*(f.axes[0].lines for f in drawn), strict=True):
        assert np.allclose(whole.get_ydata(), parts.get_ydata(), rtol=1e-4)
    texts = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert [t.split(":")[0] for t in texts] == ["eps", "v"]


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


def test_a_name_taken_in_the_meantime_is_not_overwritten(train, monkeypatch):
    load_images = figures.load_images

    def slow(*args):
        Path("output").mkdir(exist_ok=True)
        Path("output/forward-001.png").write_text("another's")
        return load_images(*args)

    monkeypatch.setattr(figures, "load_images", slow)
    assert run("forward", *GLYPHS, "--times", 5) == 0
    assert Path("output/forward-001.png").read_text() == "another's"
    assert Image.open("output/forward-002.png").format == "PNG"


def test_a_sweep_is_read_from_what_evaluate_writes(tmp_path, drawn):
    def random(seed: int, count: int) -> evaluate.Features:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 10
        return evaluate.Features(torch.zeros(count, 1, 28, 28, dtype=torch.uint8), labels,
                                 rng.normal(size=(count, 64)).astype(np.float32), labels)
    names = [str(i) for i in range(10)]
    for scale in (1.0, 3.0):
        found = evaluate.report([random(1, 40)], random(2, 100), random(3, 40), names, 0,
                                torch.device("cpu"))
        about = dict(images_from="run", weights="ema", sampler="ddim", steps=5, eta=0.0,
                     cfg_scale=scale, seeds=[0], data_digest="ab")
        evaluate.write_report(about | found, None, tmp_path)
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


def test_latents_are_not_drawn(here):
    torch.save(dict(format=latents.FORMAT, latents=torch.randn(240, 4, 8, 8).half(),
                    labels=torch.arange(240) % 2, class_names=["a", "b"], about={}), "l.pt")
    says = refused("forward", "--dataset", "latents:l.pt", "--images", 2)
    assert "4 channels cannot be drawn" in says


@pytest.mark.parametrize("changes", [dict(steps=float("inf")), dict(guidance_interval=[1.0]), "["])
def test_a_damaged_line_of_evaluations(here, changes):
    mean = dict.fromkeys(("accuracy", "frechet", "precision", "recall"), 0.5)
    rows = {k: dict(images=9, mean=mean, std=None) for k in ("samples", "test")}
    line = dict(rows=rows, sampler="ddim", eta=0.0, images_from="run", weights="ema", steps=5,
                cfg_scale=1.0, seeds=[0], data_digest="ab")
    damaged = 100_000 * changes if isinstance(changes, str) else json.dumps(line | changes)
    Path("e.jsonl").write_text(json.dumps(line) + "\n" + damaged)
    assert "e.jsonl, line 2 is no line of tools.evaluate" in refused("sweep", "e.jsonl")


def test_mistakes_are_one_line(pair, train):
    assert "did you mean --times" in refused("forward", "--time", 3)
    assert "from 0 to 999" in refused("forward", *GLYPHS, "--times", 1000)
    assert "has 100" in refused("forward", *GLYPHS, "--images", 101)
    assert "empty" in refused("forward", "--data-dir", "empty", "--dataset", "folder:empty")
    assert "is not available" in refused("forward", *GLYPHS, "--device", "cuda:77")
    assert "invalid choice: 'FIG'" in refused("FIG")
    assert "did you mean attention?" in refused("atention", "v")
    assert train("--steps", 1, "--image-size", 14, "--out", "small") == 0
    assert "input_size 14" in refused("x0hat", "v", "small")


def test_mnist_is_looked_for_in_data_dir(train, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate.data, "load", lambda *a, **_: asked.append(a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("forward", "--data-dir", "there")
    assert asked[0][:2] == ("mnist", "there")


def test_without_matplotlib_the_figures_that_need_it_say_so(pair, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    Path("two.jsonl").write_text(line(1.0) + "\n" + line(2.0) + "\n")
    for flags in (["error", "v"], ["loss", "v"], ["sweep", "two.jsonl"], ["accuracy", "two.jsonl"],
                  ["densities"]):
        assert "pip install matplotlib" in refused(*flags, "--out", "m.png")
    assert not Path("m.png").exists()
    assert run("x0hat", "v", "--times", 5, "--images", 1, "--out", "x.png") == 0


def test_an_error_in_more_bins_than_timesteps_is_refused(pair):
    pytest.importorskip("matplotlib")
    assert "1000 timesteps" in refused("error", "v", "--bins", 1001)


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
