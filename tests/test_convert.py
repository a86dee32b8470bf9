"""tools/convert.py: exports and imports, the published weights, latents."""

import json
import math
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import conftest
import sample
from conftest import ROOT, tensors_equal
from diffusion import PREDICTIONS, classifier_free_guidance
from dit import MODELS, DiT
from support import checkpoint as checkpoints, data
from support.command import UserError
from support.compute import image_noise
from support.registry import NETWORKS
from test_dit import PATCH, PUBLISHED, fill
from tools import convert
from variants.learned_variance import LearnedVariance

safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")
CPU, MODEL = torch.device("cpu"), dict(input_size=8, patch_size=4, in_channels=3, hidden_size=16,
                                       depth=3, num_heads=2, num_classes=3)
refused = partial(conftest.refused, convert.main)


def run(*words) -> None:
    assert convert.main([str(word) for word in words]) == 0


def randomised(model) -> dict:
    """The state dict of a network with random numbers in every parameter."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.state_dict()


@pytest.fixture
def make(here):
    """make(prediction, model arguments) -> the path of a checkpoint."""
    def make(prediction="v", process="ddpm", network="dit", ema=None, **model):
        model = {**MODEL, **model}
        config = dict(
            network=network, model=model, process=process, data=dict(dataset="folder:mine"),
            diffusion=dict(num_timesteps=20, beta_start=0.02, beta_end=0.4, prediction=prediction),
            recipe=dict(model="DiT-S/2", dataset="folder:/home/me/mine", data_dir="/home/me", lr=1),
            sampling=dict(sampler="ddim", steps=5, eta=0.0, cfg_scale=1.5))
        ema = ema or randomised(NETWORKS[network](**model))
        checkpoints.save(here / "c.pt", dict(step=7, config=config, class_names=["a", "b`", "ü"],
                                             ema=ema, model=ema, opt=[]))
        return here / "c.pt"
    return make


def distance(a, b) -> float:
    """Relative. Both networks' timestep frequencies have float32's rounding, which differs between
    processors: some 1e-5."""
    assert b.abs().mean() > 0.1
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------- files


def test_a_shared_checkpoint_is_the_ema_in_half_precision_without_paths(make, here):
    full = checkpoints.load(make())
    run("export", "c.pt", "out.pt", "--cfg-scale", "1.25")
    found = checkpoints.load(here / "out.pt")
    assert set(found) == {"format", "step", "config", "class_names", "ema"} and found["step"] == 7
    assert all(torch.equal(found["ema"][k], w.half()) for k, w in full["ema"].items())
    assert found["config"] == {
        **full["config"], "recipe": dict(model="DiT-S/2", dataset="folder:mine", lr=1),
        "sampling": dict(full["config"]["sampling"], cfg_scale=1.25)}
    make(ema={k: w * 1e6 for k, w in full["ema"].items()})
    assert "half precision" in refused("export", "c.pt", "big.pt")


def test_safetensors_and_back(make, here):
    run("export", make(), "a.safetensors")
    run("export", "c.pt", "a.pt")
    run("import", "a.safetensors", "b.pt")
    assert tensors_equal(*(checkpoints.load(here / name) for name in ("a.pt", "b.pt")))
    # what a program without torch finds in the file
    content = (here / "a.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = header.pop("__metadata__")
    assert json.loads(about["config"])["model"] == MODEL
    assert json.loads(about["class_names"]) == ["a", "b`", "ü"]
    assert {entry["dtype"] for entry in header.values()} == {"F16"}


def test_nothing_is_overwritten_or_left_half_written(make, here, monkeypatch):
    path = make()
    (here / "mine").mkdir()
    (here / "mine" / "load.py").write_text("mine")
    for name in ("a.pt", "a.safetensors"):
        (here / name).write_text("mine")
        assert "--force" in refused("export", path, name)
        assert (here / name).read_text() == "mine"
        run("export", path, name, "--force")
    assert "exists" in refused("export", path, "mine", "--force")
    assert (here / "mine" / "load.py").read_text() == "mine"
    assert "--force" in refused("import", "a.safetensors", "c.pt")
    assert "name ends in" in refused("export", path, "x.bin")
    assert "does not exist" in refused("export", "no.pt", "new")

    def full_disk(source, target, replace=os.replace):
        if os.path.basename(target) in ("new", "config.json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run("export", path, "new")
    assert sorted(p.name for p in here.iterdir()) == ["a.pt", "a.safetensors", "c.pt", "mine"]


def test_damaged_files_are_refused(make, here):
    run("export", make(), "a.safetensors")
    file = here / "a.safetensors"
    good, weights, about = file.read_bytes(), *convert.read_safetensors(file)
    config, first = json.loads(about["config"]), next(iter(weights))
    huge = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})

    def pack(weights=weights, **changes) -> bytes:
        return safetensors.save(weights, {**about, **changes})

    for content in [
        good[:-5], b"", len(huge).to_bytes(8, "little") + huge.encode(),
        pack({k: w for k, w in weights.items() if k != first}),
        pack({**weights, first: weights[first] * math.nan}), pack(checkpoint="other/1"),
        pack(config="{"), pack(config="[" * 100_000), pack(class_names='["a"]'),
        pack(config=json.dumps({**config, "model": {**MODEL, "hidden_size": 2**40}})),
    ]:
        file.write_bytes(content)
        refused("import", file, "x.pt")
    (here / "code.pt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    torch.save({"a": 1}, here / "other.pt")
    torch.save([1], here / "list.pt")
    for name in ("code.pt", "other.pt", "list.pt", "no.pt", "no.safetensors", here):
        refused("import", name, "x.pt")
    assert "checkpoint already" in refused("import", "c.pt", "x.pt")
    assert not (here / "x.pt").exists() and not (here / "ran").exists()


def test_without_the_packages(make, here, monkeypatch):
    path = make()
    run("export", path, "a.safetensors")
    for name in ("safetensors", "safetensors.torch", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    (here / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(here / "images" / "a" / "0.png")
    for words in (["export", path, "b.safetensors"], ["export", path, "b"],
                  ["import", "a.safetensors", "b.pt"], ["encode", "images", "b.pt", "--vae", "x"]):
        assert "pip install safetensors diffusers" in refused(*words)
    assert not any(here.glob("b*"))


# ---------------------------------------------------------------- diffusers


@torch.no_grad()
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusers_computes_the_same(make, here, monkeypatch, prediction):
    pytest.importorskip("diffusers", reason="needs the package diffusers")
    learned = dict(process="learned-variance", learn_sigma=True) if prediction == "eps" else {}
    run("export", make(prediction=prediction, **learned), "out")
    monkeypatch.syspath_prepend(here / "out")
    monkeypatch.delitem(sys.modules, "load", raising=False)
    # the code of the document, with every timestep of the process
    code = (ROOT / "docs" / "interchange.md").read_text().split("```python\n")[1].split("```")[0]
    asked = "labels, steps, cfg_scale = [3, 1, 4], 25, 1.2"
    assert asked in code
    found = {}
    exec(code.replace(asked, "labels, steps, cfg_scale = [0, 2], 20, 1.5"), found)
    transformer, before = found["transformer"], checkpoints.load(here / "c.pt")
    model, diffusion = checkpoints.build(before)

    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 7, 500, 999]), torch.tensor([0, 1, 2, 3])
    out = model(x, t, y)
    assert out.shape[1] == (6 if learned else 3)
    assert distance(transformer(x, t, y).sample, out) < 2e-4
    transformer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 1
    assert distance(transformer(x, t, y).sample, out) > 2e-3        # why load.py sets it

    xT = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0))
    guidance = getattr(diffusion, "guided", lambda g: g)(classifier_free_guidance)
    *_, (_, ours, _) = diffusion.ddim_sample(guidance(model, torch.tensor([0, 2]), 1.5), xT,
                                             steps=20)
    assert distance(found["xt"], ours) < 2e-3
    found["scheduler"].set_timesteps(5)
    assert found["scheduler"].timesteps[0] == 19        # from pure noise, with few steps as well

    run("import", "out", "back.pt")                     # and back
    after = checkpoints.load(here / "back.pt")
    assert all(tensors_equal(before[key], after[key]) for key in ("class_names", "ema"))
    assert after["config"]["process"] == before["config"]["process"]
    assert before["config"]["model"].items() <= after["config"]["model"].items()
    assert before["config"]["diffusion"].items() <= after["config"]["diffusion"].items()
    assert "latents" not in after["config"]["sampling"]


@torch.no_grad()
def test_a_dit_that_diffusers_made(here):
    """What diffusers.DiTTransformer2DModel computes with the frequencies of the published DiT."""
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000).eval()
    randomised(theirs)
    first, second = (block.norm1.emb for block in theirs.transformer_blocks)
    theirs.save_pretrained("xl/transformer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained("xl/scheduler")
    assert "copies of t_embedder.mlp.0.weight" in refused("import", "xl", "x.pt")
    second.load_state_dict(first.state_dict())
    theirs.save_pretrained("xl/transformer")
    run("import", "xl", "x.pt")
    found = sample.load("x.pt", "cpu")
    assert isinstance(found.diffusion, LearnedVariance) and found.sampling["latents"] is True
    assert found.diffusion.prediction == "eps" and found.class_names[207] == "golden retriever"
    first.time_proj.downscale_freq_shift = second.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 207, 1000])
    assert distance(found.model(x, t, y), theirs(x, t, y).sample) < 2e-4
    file = here / "xl" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"linear"', '"scaled_linear"'))
    assert "another activation or schedule" in refused("import", "xl", "y.pt")


def test_what_diffusers_cannot_express(make, here):
    weights = randomised(DiT(**MODEL))
    for changes, words in [(dict(mlp_ratio=2.0), "MLP ratio"), (dict(network="modern"), "modern"),
                           (dict(ema={**weights, "pos_embed": torch.ones(1, 4, 16)}), "position")]:
        assert words in refused("export", make(**changes), "out")
    assert not (here / "out").exists()


# ---------------------------------------------------------------- the published code


def test_published_weights_become_those_of_dit_py(here):
    """tests/test_dit.py shows that these give the published outputs."""
    for i, case in enumerate(PUBLISHED["cases"]):
        config, model = case["config"], fill(DiT(**case["config"]))
        p, C, weights = config["patch_size"], config["in_channels"], model.state_dict()
        weights[PATCH] = weights[PATCH].view(-1, p, p, C).permute(0, 3, 1, 2)   # a convolution's
        torch.save(dict(ema=weights, opt={}) if i else weights, here / f"{i}.pt")
        assert "--heads" in refused("import", f"{i}.pt", f"x{i}.pt")
        run("import", f"{i}.pt", f"x{i}.pt", "--heads", config["num_heads"])
        found = sample.load(f"x{i}.pt", "cpu")
        assert isinstance(found.diffusion, LearnedVariance) == config["learn_sigma"]
        assert (found.diffusion.prediction, found.diffusion.weighting) == ("eps", "plain")
        assert tensors_equal(dict(found.model.state_dict()), dict(model.state_dict()))


def test_the_sizes_of_published_weights_are_read_from_their_shapes():
    with torch.device("meta"):
        sizes = dict(MODELS["DiT-XL/2"], input_size=32, in_channels=4, num_classes=1000,
                     learn_sigma=True)
        weights = DiT(**sizes).state_dict() | {"x_embedder.proj.weight": torch.empty(1152, 4, 2, 2)}
    found = convert.from_published(weights, None)
    assert found["config"]["model"] == dict(sizes, mlp_ratio=4.0)
    assert found["config"]["sampling"] == dict(sampler="ddpm", steps=250, eta=0, cfg_scale=4,
                                               latents=True)
    assert found["class_names"][360] == "otter"


# ---------------------------------------------------------------- latents


def write_latents(path, count: int = 24, **changes) -> str:
    torch.manual_seed(0)
    content = dict(format="dit-latents/1", latents=torch.randn(count, 4, 8, 8).half(),
                   labels=torch.arange(count) // (count // 2), class_names=["cat", "dog"])
    torch.save({**content, **changes}, path)
    return f"latents:{path}"


def test_a_file_of_latents_is_a_data_set(here):
    spec, whole = write_latents("a.pt"), torch.load("a.pt")
    train, test = (data.load(spec, split=split) for split in ("train", "test"))
    assert len(train.images) == 22 and test.labels.tolist() == [0, 1]
    assert torch.equal(test.images[1], whole["latents"][21]) and train.class_names == ["cat", "dog"]
    x0, y = data.Batches(train, 22, 0, CPU)(0)
    assert x0.dtype == torch.float32 and x0.max() > 1.5 and y.sum() == 11
    assert torch.equal(x0.sort(0).values, train.images.float().sort(0).values)
    for changes in [dict(format="other"), dict(latents=[1]), dict(latents=torch.ones(24, 4, 8, 7)),
                    dict(latents=torch.full((24, 4, 8, 8), math.nan)), dict(labels=None),
                    dict(labels=torch.zeros(3).long()), dict(labels=torch.full((24,), 2))]:
        with pytest.raises(UserError, match="no valid latents"):
            data.load(write_latents("b.pt", **changes))


def test_images_as_latents_train_as_images(train, here, monkeypatch):
    """The same weights, bit for bit, where half precision holds the pixels exactly."""
    drawn = data.draw_glyphs(90)
    drawn.images = (drawn.images > 127).to(torch.uint8) * 255
    monkeypatch.setattr(data, "draw_glyphs", lambda *_args, **_options: drawn)
    spec = write_latents("a.pt", latents=drawn.images.half() / 127.5 - 1, labels=drawn.labels,
                         class_names=drawn.class_names)
    for name, out in ("glyphs", "images"), (spec, "latents"):
        assert train("--dataset", name, "--steps", 3, "--out", out) == 0
    images, latents = (checkpoints.load(here / out / "step_0000003.pt")
                       for out in ("images", "latents"))
    assert tensors_equal(images["ema"], latents["ema"])
    assert latents["config"]["sampling"]["latents"] is True


@pytest.fixture(params=[dict(), dict(scaling_factor=0.5, shift_factor=0.3),
                        dict(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])],
                ids=["scale", "shift", "mean and std"])
def vae(here, request):
    """The folder vae: a tiny AutoencoderKL with random weights, 3x28x28 <-> 4x7x7. Its options."""
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        **request.param).save_pretrained("vae")
    return request.param


@pytest.fixture
def images(here):
    """A folder of 12 images in each of 2 classes."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = here / "images" / ("cat", "dog")[i // 12] / f"{i % 12:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return here / "images"


ENCODE = ("encode", "images", "train.pt", "--vae", "vae", "--image-size", "28", "--batch-size", "5")


@torch.no_grad()
def test_encode_and_decode(vae, images, here):
    run(*ENCODE)
    found = torch.load("train.pt")
    assert found["latents"].shape == (24, 4, 7, 7) and found["class_names"] == ["cat", "dog"]
    assert found["labels"].tolist() == [0] * 12 + [1] * 12
    assert "--force" in refused(*ENCODE)
    # a sample of the posterior, normalised, in the order of the files
    auto = convert.Autoencoder("vae", CPU)
    image = torch.tensor(data.open_image(images / "dog" / "03.png", 28))[None] / 127.5 - 1
    posterior = auto.vae.encode(image).latent_dist
    z = posterior.mean + posterior.std * image_noise(0, "encode", 15, 16, (4, 7, 7))
    mean = torch.tensor(vae.get("latents_mean", vae.get("shift_factor", 0.0))).view(-1, 1, 1)
    std = torch.tensor(vae.get("latents_std", 1.0)).view(-1, 1, 1)
    wanted = (z - mean) / std * vae.get("scaling_factor", 0.18215)
    torch.testing.assert_close(found["latents"][15].float(), wanted[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(auto.decode(wanted), auto.vae.decode(z).sample.clamp(-1, 1))


ONE = pytest.mark.parametrize("vae", [{}], indirect=True)


@ONE
def test_encode_train_sample(vae, images, here, train):
    run(*ENCODE)
    assert train("--dataset", "latents:train.pt", "--steps", 1, "--out", "run") == 0
    words = ["sample", "run", "x.png", "--labels", "cat", "1", "--vae", "vae", "--steps", "3",
             "--precision", "fp32"]
    run(*words)
    assert "--force" in refused(*words)
    pages = []
    for more in (), ("--batch-size", 1), ("--sampler", "dpm++"), ("--seed", 1):
        run(*words, "--force", *more)
        pages.append(np.asarray(Image.open("x.png")).astype(int))
    assert np.ptp(pages[0]) > 20 and pages[0].shape[1] >= 2 * 28
    assert [abs(page - pages[0]).max() > 1 for page in pages[1:]] == [False, True, True]
    found = sample.load("run", "cpu")                       # not clipped, whatever the sampler
    randomised(found.model)
    for sampler in ("ddim", "dpm++"):
        z = sample.generate(found, ["cat", "dog"], steps=5, sampler=sampler)
        assert z.shape == (2, 4, 7, 7) and z.abs().max() > 1.5
    assert "tools.convert sample" in conftest.refused(sample.main, "run")
    assert "not a class" in refused("sample", "run", "y.png", "--vae", "vae", "--labels", "unicorn")
    assert "sample.py" in refused("sample", ROOT / "assets" / "mnist.pt", "y.png", "--vae", "vae")


@ONE
def test_autoencoders_that_do_not_fit(vae, images, here):
    def wrong(name="vae", size=28):
        assert not (here / "y.pt").exists()
        return refused("encode", "images", "y.pt", "--vae", name, "--image-size", size)

    assert "--vae missing" in wrong("missing") and "--vae images" in wrong("images")
    assert "multiple of 4" in wrong(size=30)
    assert "not a folder" in refused("encode", "no", "y.pt", "--vae", "vae")
    config = here / "vae" / "config.json"
    good = config.read_text()
    for key, value in [("latent_channels", 3), ("scaling_factor", 0), ("layers_per_block", 3)]:
        config.write_text(json.dumps({**json.loads(good), key: value}))
        wrong()
    config.write_text(good)
    weights, = (here / "vae").glob("*.safetensors")
    state = safetensors.load_file(weights)
    weights.unlink()                                        # a pickle is not read
    torch.save(state, weights.with_suffix(".bin"))
    wrong()
