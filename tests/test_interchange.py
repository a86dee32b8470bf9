"""tools/interchange.py and support/safetensors_folder.py: exports, and what reads them."""

import importlib.util
import json
import os
import sys

import pytest
import torch

import sample
from conftest import tensors_equal
from diffusion import PREDICTIONS, GaussianDiffusion, classifier_free_guidance
from dit import DiT
from support import checkpoints, components
from support.cli import UserError
from support.folders import find_checkpoint, is_run_folder, newest_run
from tools import export
from variants.dpm_solver import dpm_solver_sample

safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")
MODEL = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2,
             num_classes=3)


@pytest.fixture
def make(here):
    """make(prediction=..., model arguments) -> the path of a checkpoint with random weights."""
    def make(name: str = "c.pt", prediction: str = "v", steps: int = 20, sampling=(), **model):
        network = DiT(**{**MODEL, **model})
        torch.manual_seed(1)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.3)
        config = dict(
            network="dit", model=components.arguments_for(DiT, {**MODEL, **model}),
            process="ddpm", data=dict(dataset="glyphs"), recipe=dict(model="DiT-Test/4"),
            diffusion=components.arguments_for(GaussianDiffusion, dict(
                num_timesteps=steps, beta_start=0.02, beta_end=0.4, prediction=prediction)),
            sampling=dict(dict(sampler="ddim", steps=5, eta=0.0, cfg_scale=1.5), **dict(sampling)))
        path = here / name
        checkpoints.save(path, dict(step=7, config=config, class_names=["a", "b|`", "c"],
                                    ema=network.state_dict()))
        return path
    return make


def run(*words) -> int:
    return export.main([str(w) for w in words])


def refused(*words) -> str:
    with pytest.raises(UserError) as error:
        run(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def load(path) -> dict:
    return checkpoints.load(find_checkpoint(path))


# ---------------------------------------------------------------- safetensors


def test_safetensors_folder_is_read_as_the_checkpoint(make, here, capsys):
    path = make()
    assert run(path, "--to", "safetensors", here / "out") == 0
    assert "out" in capsys.readouterr().out
    assert sorted(os.listdir(here / "out")) == ["README.md", "config.json", "model.safetensors"]
    wanted = checkpoints.shared(checkpoints.load(path))
    assert tensors_equal(load(here / "out"), dict(wanted, format=checkpoints.FORMAT))

    both = [sample.generate(sample.load(p, "cpu"), [0, 2], seed=3, precision="fp32")
            for p in (path, here / "out")]
    assert torch.allclose(*both, atol=0.02)          # half precision
    assert sample.main([str(here / "out"), "--labels", "a", "--out", "x.png"]) == 0
    # and exported again, it is the same
    assert run(here / "out", "--to", "safetensors", here / "again") == 0
    for name in ("config.json", "model.safetensors"):
        assert (here / "out" / name).read_bytes() == (here / "again" / name).read_bytes()


def test_an_export_is_no_run_folder(make, here):
    run(make(), "--to", "safetensors", here / "output" / "mine")
    assert not is_run_folder(here / "output" / "mine") and newest_run(here / "output") is None


def test_init_from_safetensors(make, here):
    run(make(), "--to", "safetensors", here / "out")
    content = checkpoints.read_any(here / "out" / "model.safetensors")
    assert checkpoints.weights_in(content, here).keys() == DiT(**MODEL).state_dict().keys()


def change(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "config.json").unlink(), "does not exist"),
    (lambda d: (d / "config.json").write_text("{"), "damaged"),
    (lambda d: (d / "config.json").write_text("[" * 100_000), "damaged"),
    (lambda d: (d / "config.json").write_text("9" * 10_000), "damaged"),
    (lambda d: (d / "config.json").write_text('"' + "x" * 2**21 + '"'), "damaged"),
    (lambda d: (d / "config.json").write_text("[]"), "not the description"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    (lambda d: change(d, format="other/1"), "has format"),
    (lambda d: change(d, class_names=["a"]), "num_classes"),
    (lambda d: change(d, ema={}), "not the description"),
    (lambda d: change(d, step=float("nan")), "step"),
])
def test_a_damaged_description_is_refused(make, here, damage, words):
    run(make(), "--to", "safetensors", here / "out")
    damage(here / "out")
    with pytest.raises(UserError, match=words) as error:
        load(here / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_damaged_weights_are_refused(make, here):
    run(make(), "--to", "safetensors", here / "out")
    file = here / "out" / "model.safetensors"
    good, weights = file.read_bytes(), safetensors.load_file(file)
    first = next(iter(weights))
    huge = len(json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}))
    for content, words in [
        (good[:-5], "damaged"), (b"", "damaged"), (good[:100], "damaged"),
        (b"\xff" * 64, "damaged"), (huge.to_bytes(8, "little") + b"{" * huge, "damaged"),
        (safetensors.save({k: w for k, w in weights.items() if k != first}), "lacks"),
        (safetensors.save({**weights, "more": torch.ones(1)}), "unknown"),
        (safetensors.save({**weights, first: weights[first].int()}), "not floats"),
        (safetensors.save({**weights, first: weights[first] * float("nan")}), "not finite"),
        (safetensors.save({**weights, first: torch.ones(3)}), "shape"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            load(here / "out")
        assert "\n" not in str(error.value)


def test_without_the_package(make, here, monkeypatch):
    path = make()
    run(path, "--to", "safetensors", here / "out")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load(here / "out")
    for form in ("safetensors", "diffusers"):
        assert "pip install safetensors" in refused(path, "--to", form, here / "other")
    assert not (here / "other").exists()


# ---------------------------------------------------------------- folders


def test_no_folder_is_overwritten_or_left_half_written(make, here, monkeypatch):
    path, out = make(), here / "out"
    out.mkdir()                                                 # an empty folder is taken
    assert run(path, "--to", "safetensors", out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "--force" in refused(path, "--to", "safetensors", out)
    assert "--force" in refused(path, "--to", "diffusers", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run(path, "--to", "diffusers", out, "--force") == 0
    assert not (out / "model.safetensors").exists() and (out / "load.py").exists()
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(path, "--to", "safetensors", out, "--force")
    mine = here / "mine"                                        # names of an export, but none
    mine.mkdir()
    (mine / "README.md").write_text("hi")
    assert "README.md" in refused(path, "--to", "safetensors", mine, "--force")
    assert (mine / "README.md").read_text() == "hi"
    assert "the checkpoint itself" in refused(path, path, "--force")
    assert "is a file" in refused(path, "--to", "safetensors", path, "--force")
    assert "--report" in refused(path, here / "x.pt", "--report", "r.json")
    assert ".pt" in refused(path, here / "x")
    assert "does not exist" in refused(here / "no.pt", "--to", "safetensors", here / "new")

    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if "new" not in str(b) else
                        (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refused(path, "--to", "safetensors", here / "new")
    assert sorted(p.name for p in here.iterdir()) == ["c.pt", "mine", "out"]


# ---------------------------------------------------------------- the model card


def report(step: int = 7, accuracy: float = 0.5, **more) -> dict:
    mean = dict(accuracy=accuracy, frechet=2.5, precision=0.25, recall=0.75)
    return dict(dict(rows={k: dict(images=1000, mean=mean) for k in ("samples", "test")}, step=step,
                     weights="ema", sampler="ddim", steps=50, cfg_scale=1.5), **more)


def test_the_card_has_the_measured_row(make, here):
    path, out = make(), here / "out"
    lines = [json.dumps(report(accuracy=0.4)), json.dumps(report()), json.dumps(report(step=6)),
             json.dumps(report(weights="model", accuracy=0.3)), "{half", json.dumps({"step": 7}),
             json.dumps(report(accuracy=0.2, autoguidance="weak.pt"))]
    (here / "evaluations.jsonl").write_text("\n".join(lines))
    run(path, "--to", "safetensors", out)
    card = (out / "README.md").read_text()
    assert "| samples | 50.00% | 2.50 | 0.250 | 0.750 |" in card and "1,000 samples" in card
    assert "real: test set" in card and "a, b, c" in card       # no | or ` from a file
    assert "1,000 samples, ddim, 50 steps, guidance 1.5, against real images" in card
    (here / "r.json").write_text(json.dumps(report(
        accuracy=0.9, autoguidance="weak.pt", guidance_interval=[1, 2.5], eta=0.5, steps=1,
        dataset="mnist")))
    run(path, "--to", "diffusers", out, "--force", "--report", here / "r.json")
    card = (out / "README.md").read_text()
    assert "90.00%" in card and ("ddim (eta 0.5), 1 step, guidance 1.5, for sigma / alpha in (1, "
                                 "2.5 , autoguidance by weak.pt, against mnist") in card

    for text, words in [("{}", "not a report"), ("[]", "not a report"), ("x", "not a report"),
                        (json.dumps(report(step=9)), "step 9"),
                        (json.dumps(report(accuracy=float("nan"))), "not a report"),
                        (json.dumps(report(weights="model")), "averaging")]:
        (here / "r.json").write_text(text)
        assert words in refused(path, "--to", "safetensors", here / "new", "--report", "r.json")
    assert "cannot be read" in refused(path, "--to", "safetensors", here / "new", "--report", "no")
    (here / "evaluations.jsonl").unlink()
    run(path, "--to", "safetensors", out, "--force")
    assert "Measured" not in (out / "README.md").read_text()


# ---------------------------------------------------------------- diffusers


def loader(folder):
    """The module load.py of an export."""
    pytest.importorskip("diffusers", reason="needs the package diffusers")
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusers_computes_the_same(make, here, prediction):
    learn_sigma = prediction == "eps"
    path = make(prediction=prediction, learn_sigma=learn_sigma, in_channels=3, depth=3)
    run(path, "--to", "diffusers", here / "out")
    module = loader(here / "out")
    transformer, scheduler = module.load()
    model, diffusion = checkpoints.build(checkpoints.load(path))

    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 7, 500, 999]), torch.tensor([0, 1, 2, 3])
    out = model(x, t, y)
    assert out.shape[1] == (6 if learn_sigma else 3) and out.abs().mean() > 0.1
    torch.testing.assert_close(transformer(x, t, y).sample, out, rtol=0, atol=1e-5)
    transformer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 1
    assert (transformer(x, t, y).sample - out).norm() > 0.001 * out.norm()     # why load.py sets it
    transformer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 0

    # all 20 timesteps of the process: the same steps in both
    xT = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(5))
    theirs = module.sample(transformer, scheduler, [0, 2], steps=20, cfg_scale=1.5, seed=5)
    predict = classifier_free_guidance(model, torch.tensor([0, 2]), 1.5)
    *_, (_, ours, _) = diffusion.ddim_sample(predict, xT, steps=20)
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)


def test_diffusers_dpm_solver_takes_the_same_steps():
    """DPMSolverMultistepScheduler, set to dpmsolver++ of order 2."""
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction",
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
        timestep_spacing="trailing", lower_order_final=True)
    theirs.set_timesteps(10)

    def network(xt, t):
        return torch.sin(3 * xt + t / 150)

    xt = xT = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(5))
    ours = dpm_solver_sample(GaussianDiffusion(prediction="v"), network, xT, clip=False, steps=10)
    for t, (t_ours, found, _) in zip(theirs.timesteps.tolist(), ours, strict=True):
        xt = theirs.step(network(xt, t), t, xt).prev_sample
        assert t == t_ours
        torch.testing.assert_close(found, xt, rtol=1e-3, atol=1e-3)


def test_the_code_on_the_card_runs(make, here, monkeypatch):
    run(make(), "--to", "diffusers", here / "out")
    module = loader(here / "out")
    monkeypatch.setitem(sys.modules, "load", module)
    code = (here / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code, found)
    assert found["images"].shape == (1, 1, 8, 8) and found["images"].isfinite().all()


def test_latents_are_not_clipped(make, here):
    run(make(sampling=dict(latents=True)), "--to", "diffusers", here / "out")
    config = json.loads((here / "out/scheduler/scheduler_config.json").read_text())
    assert config["clip_sample"] is False
    assert "1 x 8 x 8 latents" in (here / "out/README.md").read_text()


def test_what_diffusers_cannot_express(make, here, monkeypatch):
    assert "MLP ratio" in refused(make(mlp_ratio=2.0), "--to", "diffusers", here / "out")
    path = make()
    state = checkpoints.load(path)
    state["ema"]["pos_embed"] += 0.1
    checkpoints.save(path, state)
    assert "position" in refused(path, "--to", "diffusers", here / "out")
    monkeypatch.setitem(components.NETWORKS, "other", DiT)
    state["config"]["network"] = "other"
    checkpoints.save(path, state)
    assert "'other'" in refused(path, "--to", "diffusers", here / "out")
    assert not (here / "out").exists()
