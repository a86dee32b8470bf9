"""Around training: the loss in each quarter of t, its figures, loggers, --config, the learning-rate
finder."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_mnist
from conftest import TINY, load, tensors_equal
from diffusion import GaussianDiffusion
from support import curves, loggers
from support.cli import UserError
from support.curves import QUARTERS, averaged, draw_losses
from support.folders import checkpoints_in, read_metrics
from support.settings import Settings
from support.state import TrainingState
from tools import expected_loss, figures, lr_finder

SETTINGS = Settings(train_mnist.RECIPE, train_mnist.PRESETS)


def rows(folder) -> list[dict]:
    return read_metrics(Path(folder) / "metrics.jsonl")


def write_run(folder, *lines: dict, **recipe) -> Path:
    """A folder with the record of losses, and with the config.json of the CPU preset on MNIST."""
    config = dict(recipe={**vars(SETTINGS.resolve({}, "cpu")), **recipe},
                  data=dict(dataset="mnist", image_size=28))
    Path(folder).mkdir(parents=True)
    Path(folder, "config.json").write_text(json.dumps(config))
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path(folder)


def refused(main, *flags) -> str:
    with pytest.raises(UserError) as error:
        main([str(f) for f in flags])
    assert "\n" not in str(error.value) and error.value.status == 2
    return str(error.value)


# ---------------------------------------------------------------- the loss in each quarter of t


@pytest.mark.parametrize("parts", [1, 2])
def test_a_quarters_loss_is_the_mean_over_its_images(train, monkeypatch, parts):
    calls, honest = [], GaussianDiffusion.loss

    def loss(self, model, x0, t, y, eps):
        found = honest(self, model, x0, t, y, eps)
        calls.append((t, found.detach()))
        return found

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    train("--steps", 12, "--timesteps", "uniform", "--grad-accum", parts, "--out", "run")
    missing = 0
    for step, row in enumerate(rows("run")):
        t, losses = (torch.cat(part) for part in
                     zip(*calls[step * parts:(step + 1) * parts], strict=True))
        for low, name in zip((0, 250, 500, 750), QUARTERS, strict=True):
            inside = (t >= low) & (t < low + 250)
            missing += not inside.any()
            assert (name in row) == bool(inside.any())
            if inside.any():
                assert row[name] == pytest.approx(losses[inside].mean().item(), rel=1e-6)
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert len(calls) == 12 * parts and 0 < missing < 24


def test_a_record_from_before_the_quarters_is_resumed_and_drawn(train, trained):
    trained("--steps", 8, "--stop-after", 4)
    trained("--steps", 8, out="straight")
    old = [{k: v for k, v in row.items() if k not in QUARTERS} for row in rows("run")]
    Path("run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert train("--resume", "--out", "run") == 0
    assert rows("run") == old + rows("straight")[4:]
    pytest.importorskip("matplotlib")
    assert figures.main(["loss", "run", "--out", "x.png"]) == 0


# ---------------------------------------------------------------- loss curves


def test_curves_are_averaged_over_growing_ranges():
    lines = [dict(step=step, loss=float(step)) for step in range(1, 2051)]
    steps, means = averaged(lines, "loss")
    assert steps == pytest.approx(means) and steps[:9] == list(range(1, 10))
    assert steps[19:21] == [20.5, 22.5]                                 # two steps each
    assert np.diff(steps)[-3:].max() == 100                             # never more
    assert steps[-1] <= 2050 and sum(np.diff(steps) > 0) == len(steps) - 1
    for line in lines:
        line["loss"] = 2.0
    assert set(averaged(lines, "loss")[1]) == {2.0}
    some = [dict(step=20, loss=4.0), dict(step=21, loss=6.0), dict(step=40, loss_q1=1.0),
            dict(step=41, loss=math.nan), dict(step=42, loss="x"), dict(step=43)]
    assert averaged(some, "loss") == ([20.5], [5.0])                    # what has a value
    assert averaged(some, "lr") == ([], [])


@pytest.fixture
def expected(tmp_path, monkeypatch) -> Path:
    """Where the expected curve is looked for: a file that is not there yet."""
    monkeypatch.setattr(curves, "EXPECTED", tmp_path / "expected.json")
    return tmp_path / "expected.json"


def line(step: int, **more) -> dict:
    return dict(step=step, loss=3.0 / step, loss_q1=6.0, **more)


def test_loss_draws_runs_their_quarters_and_the_expected_curve(here, expected, drawn):
    a = write_run("a", *(line(step, loss_q3=0.5) for step in range(1, 30)), seed=5)
    b = write_run("b/a", *(line(step) for step in range(1, 10)), prediction="v")
    content = dict(name="expected", setting=curves.read_setting(a),
                   loss=[[1, 9], [4.0, 2.0]], loss_q1=[[1, 9], [5.0, 4.0]])
    expected.write_text(json.dumps(content))
    for folders, out in (((a, b), "1.png"), ((a,), "2.png"), ((b,), "3.png")):
        assert figures.main(["loss", *map(str, folders), "--out", out]) == 0
    both, alone, other = (figure.axes for figure in drawn)
    assert [axes.get_title()[:7] for axes in both] == ["", "loss_q1", "loss_q3"]
    assert both[2].get_title() == "loss_q3: t 500-749"
    labels = [text.get_text() for text in both[0].get_legend().get_texts()]
    assert labels == ["a", "b/a", "expected"]           # named apart
    for axes, key in zip(both, ("loss", "loss_q1", "loss_q3"), strict=True):
        for folder, curve in zip((a, b), axes.lines, strict=False):
            found = averaged(rows(folder), key)
            assert (list(curve.get_xdata()), list(curve.get_ydata())) == found
    assert [list(axes.lines[2].get_ydata()) for axes in both[:2]] == [[4, 2], [5, 4]]
    assert len(both[2].lines) == 2                      # of loss_q3 nothing is expected
    assert len(alone[0].lines) == 3 and len(alone[0].lines[1].get_xdata()) == 29    # each step
    assert [len(axes.lines) for axes in other] == [2, 1]        # another prediction
    with Image.open("1.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("content", [None, "{"])
def test_without_an_expected_curve_the_rest_is_drawn(here, expected, drawn, content):
    """The lesson alone has no assets/; a config.json may be lost as well."""
    if content is not None:
        expected.write_text(content)
    a, empty = write_run("a", line(1), line(2)), write_run("empty")
    (a / "config.json").write_text("{}")
    for folder, panels in ((a, 2), (empty, 1)):
        figure = figures.new_figure()
        draw_losses(figure, [folder], ["a"])
        assert len(figure.axes) == panels


def test_the_newest_run_is_drawn_where_none_is_named(train, drawn):
    assert "no run under" in refused(figures.main, "loss")
    assert "no run under" in refused(figures.main, "training")
    train("--steps", 2)
    assert figures.main(["loss"]) == figures.main(["training"]) == 0
    assert Path("output/loss-001.png").exists() and Path("output/training-001.gif").exists()
    Path("empty").mkdir()
    assert "empty has no metrics.jsonl" in refused(figures.main, "loss", "empty")
    assert "nothing has no metrics.jsonl" in refused(figures.main, "loss", "nothing")
    Path("fresh").mkdir()
    Path("fresh/metrics.jsonl").touch()
    assert "metrics.jsonl holds no step yet" in refused(figures.main, "loss", "fresh")
    assert "empty has no samples/" in refused(figures.main, "training", "empty")


def test_the_expected_curve_is_made_from_a_run_of_the_preset(here, expected, capsys):
    steps = train_mnist.PRESETS["cpu"]["steps"]
    lines = [dict(step=step, loss=2.0, loss_q4=0.5) for step in range(1, steps + 1)]
    run = write_run("run", *lines, seed=4, data_dir="elsewhere")
    assert expected_loss.main(["run", "--out", str(expected)]) == 0
    assert "without loss_q1, loss_q2, loss_q3" in capsys.readouterr().out
    found = json.loads(expected.read_text())
    assert set(found) == {"name", "setting", "loss", "loss_q4"} and "seed 4" in found["name"]
    assert set(found["loss"][1]) == {2.0} and set(found["loss_q4"][1]) == {0.5}
    assert found["loss"][0][0] == 1 and steps - 100 <= found["loss"][0][-1] <= steps
    assert curves.expected_for([None, curves.read_setting(run)]) == found
    main = expected_loss.main
    assert "--force" in refused(main, "run", "--out", expected)
    assert main(["run", "--out", str(expected), "--force"]) == 0
    write_run("short", *lines[:-1])
    write_run("other", *lines, lr=0.5)
    assert "not complete: 3,999" in refused(main, "short", "--out", "x.json")
    assert "its lr is 0.5, the preset's" in refused(main, "other", "--out", "x.json")
    assert "is not the config.json" in refused(main, "nothing", "--out", "x.json")
    assert not Path("x.json").exists()


def test_the_expected_curve_that_ships_is_of_the_present_preset():
    """Where the preset changes: python -m tools.expected_loss RUN --force."""
    found = json.loads(curves.EXPECTED.read_text())
    preset = vars(SETTINGS.resolve({}, "cpu"))
    about = dict(dataset="mnist", image_size=28)
    assert found["setting"] == curves.setting(dict(recipe=preset, data=about))


# ---------------------------------------------------------------- previews as a GIF


def test_training_animates_the_previews_with_their_steps(here):
    greys = {500: 0, 1000: 120, 2000: 240}
    folder = Path("run/samples")
    folder.mkdir(parents=True)
    for step, grey in greys.items():
        Image.new("RGB", (120, 80), (grey,) * 3).save(folder / f"step_{step:07d}.png")
    assert figures.main(["training", "run", "--out", "x.gif"]) == 0
    with Image.open("x.gif") as film:
        assert film.n_frames == 3 and film.size == (120, 100)           # a line of text above
        heads = []
        for i, grey in enumerate(greys.values()):
            film.seek(i)
            pixels = np.asarray(film.convert("RGB")).astype(int)
            assert abs(pixels[20:] - grey).max() <= 8
            assert film.info["duration"] == (2000 if i == 2 else 500)
            heads.append(pixels[:20])
            assert pixels[:20].max() > 200
        assert all((a != b).any() for a, b in zip(heads, heads[1:], strict=False))
    assert "ends in .gif" in refused(figures.main, "training", "run", "--out", "x.png")
    (folder / "step_0000500.png").write_text("no picture")
    assert "step_0000500.png cannot be read" in refused(figures.main, "training", "run", "--out",
                                                        "y.gif")


# ---------------------------------------------------------------- --logger


def test_tensorboard_gets_every_row_and_preview_and_a_resumed_run_goes_on(train, trained):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("--steps", 8, "--preview-every", 2, "--log-every", 3)
    trained(*flags, out="straight")
    assert train(*flags, "--stop-after", 6, "--out", "run", "--save-every", 4,
                 "--logger", "tensorboard") == 0
    Path("run/step_0000006.pt").unlink()        # as after a kill: continues at step 4
    assert train("--resume", "--out", "run") == 0
    assert rows("run") == rows("straight")      # and the run is the same
    found = events.EventAccumulator("run/tensorboard").Reload()
    assert set(found.Tags()["scalars"]) <= {"loss", "loss_eps", "grad_norm", "lr", *QUARTERS}
    for key in ("loss", "loss_eps", "grad_norm", "lr", "loss_q1"):
        wanted = [(row["step"], row[key]) for row in rows("run") if key in row]
        logged = [(event.step, event.value) for event in found.Scalars(key)]
        assert [step for step, _ in logged] == [step for step, _ in wanted]
        assert [v for _, v in logged] == pytest.approx([v for _, v in wanted], rel=1e-6)
    assert [image.step for image in found.Images("preview")] == [2, 4, 6, 8]
    preview = Path("run/samples/step_0000008.png")
    with Image.open(preview) as picture:
        assert (found.Images("preview")[-1].width, found.Images("preview")[-1].height) == \
            picture.size
    assert load("run/step_0000008.pt")["config"]["recipe"]["logger"] == "tensorboard"


def test_wandb_gets_the_rows_offline_and_a_resumed_run_has_its_id(train, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train("--steps", 4, "--stop-after", 2, "--out", "run", "--logger", "wandb",
          "--preview-every", 2)
    train("--resume", "--out", "run", "--log-every", 1)
    wandb.teardown()                            # its process has written everything
    files = sorted(Path("run/wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.parent)
    assert len(files) == 2 and files[0].name == files[1].name           # run-ID.wandb
    for file, found in zip(files, (rows("run")[:2], rows("run")[2:]), strict=True):
        content = file.read_bytes()
        for row in found:
            for value in row.values():
                assert json.dumps(value).encode() in content
        assert b"preview" in content
    assert len(list(Path("run/wandb").glob("offline-run-*/files/media/images/*.png"))) == 2


class Odd:
    """A logger that fails in one of its methods, or in none."""

    fails, calls = "", []

    def __init__(self, folder, config, start):
        self._do("init", folder.name, config["recipe"]["logger"], start)

    def _do(self, *call):
        type(self).calls.append(call)
        if call[0] == self.fails:
            raise ValueError("the server is away\nsince noon")

    def log(self, found):
        self._do("log", [row["step"] for row in found])

    def preview(self, path, step):
        self._do("preview", path.name, step)

    def close(self):
        self._do("close")


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setitem(loggers.WRITERS, "wandb", Odd)
    monkeypatch.setattr(loggers, "check", lambda name: None)
    monkeypatch.setattr(Odd, "calls", [])
    return Odd


def test_a_logger_is_called_where_the_record_is_read(train, odd):
    flags = ("--log-every", 3, "--preview-every", 4, "--logger", "wandb")
    train("--steps", 8, "--stop-after", 5, "--out", "run", *flags)
    train("--resume", "--out", "run")
    assert odd.calls == [
        ("init", "run", "wandb", 0), ("log", [1, 2, 3]), ("log", [4]),
        ("preview", "step_0000004.png", 4), ("log", [5]), ("preview", "step_0000005.png", 5),
        ("close",), ("init", "run", "wandb", 5), ("log", [6, 7, 8]),
        ("preview", "step_0000008.png", 8), ("close",)]
    train("--resume", "--out", "run")                   # complete: nothing to log
    train("--resume", "--out", "run", "--steps", 9, "--logger", "none")     # may change
    assert len(odd.calls) == 11


@pytest.mark.parametrize("fails", ["init", "log", "preview", "close"])
def test_a_logger_that_fails_is_told_once_and_training_goes_on(train, trained, odd, monkeypatch,
                                                              capsys, fails):
    monkeypatch.setattr(odd, "fails", fails)
    trained("--steps", 6, out="straight")
    capsys.readouterr()
    assert train("--steps", 6, "--out", "run", "--log-every", 2, "--logger", "wandb") == 0
    assert rows("run") == rows("straight")
    warnings = [t for t in capsys.readouterr().err.splitlines() if "warning" in t]
    assert [w[w.index("warning"):] for w in warnings] == [
        "warning: --logger wandb failed (since noon): training continues without it"]
    assert [call[0] for call in odd.calls].count(fails) == 1 and odd.calls[-1][0] == fails


@pytest.mark.parametrize("name", [name for name in loggers.NAMES if name != "none"])
def test_a_logger_that_is_not_installed_is_named_before_any_work(train, monkeypatch, name):
    monkeypatch.setitem(sys.modules, loggers.MODULES[name], None)
    with pytest.raises(UserError, match=f"--logger {name} needs the package {name}: pip install "
                                        f"{name}$"):
        train("--steps", 2, "--logger", name)
    assert not list(Path().iterdir())
    with pytest.raises(UserError, match="invalid choice: 'tensorbord'.*did you mean tensorboard"):
        train("--logger", "tensorbord")


# ---------------------------------------------------------------- --config


def test_config_repeats_a_run_and_flags_override_it(train, trained):
    trained("--steps", 4, "--lr", 0.01, "--prediction", "eps", "--seed", 3, "--keep", 2,
            out="first")
    recipe = json.loads(Path("first/config.json").read_text())["recipe"]
    assert train_mnist.main(["--config", "first/config.json", "--out", "again"]) == 0
    assert rows("again") == rows("first")
    states = [load(checkpoints_in(Path(folder))[-1]) for folder in ("first", "again")]
    assert tensors_equal(states[0]["model"], states[1]["model"])
    assert states[0]["config"] == states[1]["config"]
    assert train_mnist.main(["--config", "first/config.json", "--out", "other", "--lr", "0.5",
                             "--no-flip", "--stop-after", "1"]) == 0
    found = json.loads(Path("other/config.json").read_text())["recipe"]
    assert found == {**recipe, "lr": 0.5}
    assert rows("other")[0]["loss"] == rows("first")[0]["loss"]     # from the same weights
    assert train("--resume", "--out", "other") == 0                 # without the file
    assert len(rows("other")) == 4


def test_config_starts_from_other_weights_with_its_own_recipe(train, trained, capsys):
    trained("--steps", 3, "--prediction", "v", out="weights")
    trained("--steps", 2, "--prediction", "eps", out="recipe")
    assert train_mnist.main(["--config", "recipe/config.json", "--out", "run",
                             "--init-from", "weights/step_0000003.pt"]) == 0
    assert "weights from weights/step_0000003.pt" in capsys.readouterr().out
    start = load("run/step_0000000.pt")
    assert tensors_equal(start["model"], load("weights/step_0000003.pt")["ema"])
    assert start["config"]["diffusion"]["prediction"] == "eps"


def test_an_old_config_lacks_flags_and_has_their_values_of_then(here):
    Path("c.json").write_text('{"recipe": {"model": "DiT-S/2", "steps": 7}}')
    found = SETTINGS.with_config({"config": "c.json", "steps": 9})
    assert (found["model"], found["steps"], found["timesteps"]) == ("DiT-S/2", 9, "uniform")
    assert found["batch_size"] == train_mnist.PRESETS["cpu"]["batch_size"]


@pytest.mark.parametrize("text, says", [
    (None, "c.json is not the config.json of a run"), ("{", "c.json is not"), ("[]", "c.json is"),
    ("[" * 100_000, "c.json is not"), ('{"recipe": 3}', "c.json is not the config.json of a run"),
    ('{"recipe": {"lr": "fast"}}', "--config c.json: the recorded recipe is not valid: .*--lr"),
    ('{"recipe": {"temperature": 1}}', "--config c.json: .*does not know: .*temperature"),
    ('{"recipe": {"out": "x"}}', "--config c.json: .*does not know: .*out"),
])
def test_a_file_that_is_no_config_is_one_line_and_leaves_nothing_behind(here, text, says):
    if text is not None:
        Path("c.json").write_text(text)
    with pytest.raises(UserError, match=says) as error:
        train_mnist.main(["--config", "c.json"])
    assert "\n" not in str(error.value) and error.value.status == 2
    assert [p.name for p in Path().iterdir()] == ["c.json"] * (text is not None)


def test_config_does_not_go_with_resume(train, checkpoint):
    with pytest.raises(UserError, match="--resume .* --config .*: give one of them"):
        train("--resume", "--out", "run", "--config", "run/config.json")


# ---------------------------------------------------------------- the learning-rate finder

FINDER = ("--dataset", "glyphs", "--model", TINY, "--batch-size", 8, "--rates", 30)


@pytest.fixture
def sweeps(train, monkeypatch):
    """find(*flags) -> its Sweep, and the learning rates of all optimizers in each step."""
    pytest.importorskip("matplotlib")
    found, lrs, honest, update = [], [[]], lr_finder.sweep, TrainingState.update

    def spy(self, *args):
        norm = update(self, *args)
        lrs[-1].append([group["lr"] for o in self.optimizers for group in o.param_groups])
        return norm

    monkeypatch.setattr(lr_finder, "sweep", lambda *a: found.append(honest(*a)) or found[-1])
    monkeypatch.setattr(TrainingState, "update", spy)

    def find(*flags):
        lrs.append([])
        assert lr_finder.main([str(f) for f in (*FINDER, *flags)]) == 0
        return found[-1], lrs[-1]

    return find


@pytest.mark.parametrize("which, optimizer, swept", [
    ((), "muon", 1), (("--which", "lr"), "muon", 0), ((), "adamw", 0)])
def test_a_sweep_stops_at_divergence_and_suggests_a_rate_below(sweeps, monkeypatch, capsys, which,
                                                              optimizer, swept):
    low, high = 1e-4, 1e8
    if swept == 1:      # in so small a network the last LayerNorm bounds what Muon can do
        monkeypatch.setattr(lr_finder, "DIVERGED", 1.2)
    sweep, lrs = sweeps("--optimizer", optimizer, *which, "--low", low, "--high", high)
    tried = len(sweep.losses)
    assert 5 < tried < 30 and sweep.diverged                    # before the last rate
    assert sweep.rates[0] == low and sweep.rates[-1] == pytest.approx(high)
    ratios = np.diff(np.log(sweep.rates))
    assert np.allclose(ratios, ratios[0])                       # exponential
    assert [rate[swept] for rate in lrs] == sweep.rates[:tried]
    if optimizer == "muon":                                     # the other one stays
        assert {rate[1 - swept] for rate in lrs} == {(0.02, 2e-3)[swept]}
    suggested, lowest = lr_finder.suggestion(sweep.rates, sweep.losses)
    assert low <= suggested <= lowest < sweep.rates[tried - 1]
    name = "muon-lr" if swept else "lr"
    out = capsys.readouterr().out
    assert f"divergence at {sweep.rates[tried - 1]:.2g}\n" in out
    assert f"suggested: --{name} {suggested:.2g} (the recipe: " in out
    assert ("try a lower --low" in out) == (lowest < 10 * low)


def test_a_sweep_is_training_and_touches_no_run(sweeps, trained, capsys):
    """Its first loss is that of a run with the same flags: same weights, images, t and noise."""
    trained("--steps", 2, "--seed", 4, "--prediction", "v", out="output/001-x")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    sweep, _ = sweeps("--seed", 4, "--prediction", "v", "--high", 1e-4)
    assert sweep.losses[0] == pytest.approx(rows("output/001-x")[0]["loss"], rel=1e-6)
    assert len(sweep.losses) == 30 and not sweep.diverged
    assert "no divergence up to 0.0001\n" in capsys.readouterr().out
    again, _ = sweeps("--config", "output/001-x/config.json", "--out", "x.png", "--rates", 2)
    assert again.losses[0] == sweep.losses[0] and len(again.losses) == 2
    after = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    assert {p: c for p, c in after.items() if p in before} == before
    assert sorted(map(str, set(after) - set(before))) == ["output/lr_finder-001.png", "x.png"]
    with Image.open("x.png") as picture:
        assert picture.format == "PNG"


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss():
    rates = [10.0**k for k in range(-5, 2)]
    assert lr_finder.smoothed([2.0, 2.0, 4.0]) == pytest.approx([2, 2, 2 + 2 * 0.1 / 0.271])
    losses = [4.0, 3.0, 1.0, -9.0, 20.0, 40.0, math.nan]        # smoothed: lowest at 1e-2
    assert lr_finder.suggestion(rates, losses) == pytest.approx((1e-3, 1e-2))
    assert lr_finder.suggestion(rates, [1.0, 2.0]) == (1e-5, 1e-5)      # never below the first
    sweep = lr_finder.Sweep(None, None, None, [], rates)
    for losses, diverged in [([1.0], False), ([1.0, 20.0], False), ([1.0] * 20 + [25.0], False),
                             ([1.0] * 20 + [40.0], True), ([1.0, math.nan], True),
                             ([math.inf], True)]:
        sweep.losses = losses
        assert sweep.diverged == diverged, losses


@pytest.mark.parametrize("flags, says", [
    (["--which", "muon-lr", "--optimizer", "adamw"], "--optimizer adamw has no such rate"),
    (["--low", "1", "--high", "0.1"], "--low 1 is not below --high 0.1"),
    (["--rates", "1"], "--rates.* at least 2"), (["--low", "0"], "--low"),
    (["--which", "both"], "--which"), (["--out", "x.gif"], "ends in .png"),
    (["--out", "taken.png"], "taken.png exists: --force"),
    (["--warmup", "3"], "unrecognized arguments: --warmup"), (["--resume"], "--resume"),
    (["--model", "DiT-S/8"], "does not divide image size 28"),
    (["--batch-size", "9", "--grad-accum", "2"], "--batch-size 9"),
    (["--config", "nothing"], "nothing is not the config.json"),
    (["--device", "cuda:77"], "--device cuda:77"), (["--dataset", "minst"], "minst"),
])
def test_a_mistake_in_a_sweep_is_one_line_and_leaves_nothing_behind(train, flags, says):
    pytest.importorskip("matplotlib")
    Path("taken.png").write_text("mine")
    with pytest.raises(UserError, match=says) as error:
        lr_finder.main([*map(str, FINDER), *flags])
    assert "\n" not in str(error.value) and error.value.status == 2
    assert [p.name for p in Path().iterdir()] == ["taken.png"]
    assert Path("taken.png").read_text() == "mine"


def test_losses_that_are_not_finite_end_a_sweep_and_are_not_drawn(sweeps, monkeypatch):
    honest, count, bad = lr_finder.Sweep.log, 0, 7

    def log(self, *, loss, **numbers):
        nonlocal count
        count += 1
        honest(self, loss=loss * (math.inf if count == bad else 1), **numbers)

    monkeypatch.setattr(lr_finder.Sweep, "log", log)
    sweep, _ = sweeps("--high", 1e-4)
    assert len(sweep.losses) == 7 and Path("output/lr_finder-001.png").exists()
    count, bad = 0, 1
    with pytest.raises(UserError, match="not finite at the first rate, 1e-05"):
        lr_finder.main([*map(str, FINDER)])


def test_what_a_sweep_needs_is_known_before_it(train, monkeypatch):
    monkeypatch.setattr(lr_finder, "sweep", lambda *a: pytest.fail("it began"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(lr_finder.main, *FINDER)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(lr_finder.main, *FINDER)


def test_a_sweep_overwrites_with_force_alone(sweeps):
    Path("x.png").write_text("mine")
    sweeps("--rates", 2, "--out", "x.png", "--force")
    with Image.open("x.png") as picture:
        assert picture.format == "PNG"
