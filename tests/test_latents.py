"""support/latents.py and tools/latents.py: encoding, training on latents, sampling, decoding."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train_mnist
from conftest import ROOT, tensors_equal
from diffusion import GaussianDiffusion
from dit import MODELS, DiT
from support import checkpoints, data, latents
from support.cli import UserError
from support.folders import checkpoints_in
from support.sampling import resolve_sampling
from support.seeds import ImageNoise
from tools import latents as tool
from variants.learned_variance import LearnedVariance

TINY = "DiT-TestL/2"


@pytest.fixture
def vae(tmp_path_factory, request):
    """A folder with a tiny, randomly initialised AutoencoderKL: 3x32x32 <-> 4x8x8."""
    pytest.importorskip("safetensors", reason="needs the package safetensors")
    pytest.importorskip("diffusers", reason="needs the package diffusers")
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4,
                  down_block_types=("DownEncoderBlock2D",) * 3,
                  up_block_types=("UpDecoderBlock2D",) * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(here):
    """A folder of 12 images in each of 2 classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (here / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "images" / name / f"{i:02d}.png")
    return here / "images"


def write(path, count: int = 24, **changes):
    """A file of random latents of 2 classes."""
    torch.manual_seed(0)
    content = dict(format=latents.FORMAT, latents=torch.randn(count, 4, 8, 8).half(),
                   labels=torch.arange(count) // (count // 2), class_names=["cat", "dog"],
                   about={})
    torch.save({**content, **changes}, path)
    return path


def refused(*words) -> str:
    with pytest.raises(UserError) as error:
        tool.main([str(w) for w in words])
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- files of latents


def test_a_file_is_a_data_set(here):
    path = write(here / "a.pt")
    whole = torch.load(path)
    train, test = (data.load(f"latents:{path}", split=split) for split in ("train", "test"))
    assert len(train.images) == 22 and len(test.images) == 2 and train.class_names == ["cat", "dog"]
    assert torch.equal(test.images[1], whole["latents"][21]) and test.labels.tolist() == [0, 1]
    x0, y = train.batch(torch.tensor([3, 15]), torch.device("cpu"))
    assert x0.dtype == torch.float32 and torch.equal(x0, train.images[[3, 15]].float())
    assert x0.abs().max() > 1.5 and y.tolist() == [0, 1]
    assert isinstance(train.to(torch.device("cpu")), latents.LatentSet)
    assert train.digest() != test.digest() and latents.is_latents(train.name)
    assert "8x8" in str(pytest.raises(UserError, data.load, f"latents:{path}", None, 32).value)
    data.load(f"latents:{path}", None, 8)


@pytest.mark.parametrize("changes, words", [
    (dict(format="other"), "holds no latents"),
    (dict(latents=[1]), "latents is not"), (dict(latents=torch.ones(24, 4, 8, 7)), "latents is"),
    (dict(latents=torch.ones(24, 4, 8, 8).int()), "latents is not"),
    (dict(latents=torch.ones(0, 4, 8, 8)), "latents is not"),
    (dict(latents=torch.full((24, 4, 8, 8), 1e9)), "not finite"),
    (dict(labels=torch.zeros(3, dtype=torch.int64)), "labels is not"),
    (dict(labels=torch.zeros(24)), "labels is not"), (dict(labels=None), "labels is not"),
    (dict(labels=torch.full((24,), 2)), "2 classes"),
    (dict(labels=torch.full((24,), -1)), "2 classes"),
    (dict(class_names=[]), "class_names"), (dict(class_names=[1, 2]), "class_names"),
])
def test_a_wrong_file_is_refused(here, changes, words):
    path = write(here / "a.pt", **changes)
    with pytest.raises(UserError, match=words):
        data.load(f"latents:{path}")


def test_no_file_of_latents(here):
    (here / "b.pt").write_text("x")
    for name, words in [("no.pt", "does not exist"), ("b.pt", "not a checkpoint"), ("", "file")]:
        with pytest.raises(UserError, match=words):
            data.load(f"latents:{name}")
    write(here / "few.pt", 4)
    with pytest.raises(UserError, match="no class has ten"):
        data.load("latents:few.pt", split="test")


# ---------------------------------------------------------------- training


@pytest.fixture
def trained(here, monkeypatch):
    """A run of 2 steps on latents: its folder."""
    monkeypatch.setitem(MODELS, TINY, dict(patch_size=2, hidden_size=16, depth=2, num_heads=2))
    write(here / "a.pt")
    assert train_mnist.main(["--dataset", "latents:a.pt", "--model", TINY, "--steps", "2",
                             "--batch-size", "4", "--log-every", "1", "--out", "run"]) == 0
    return here / "run"


def test_train_and_resume_on_latents(trained, here, capsys):
    with Image.open(next((trained / "samples").iterdir())) as preview:
        assert preview.mode == "RGB" and preview.width > 50
    state = checkpoints.load(checkpoints_in(trained)[-1], full=True)
    config = state["config"]
    assert config["sampling"]["latents"] is True and config["model"]["in_channels"] == 4
    assert config["data"]["dataset"] == "latents:a.pt"
    (here / "a.pt").rename(here / "b.pt")               # the file may have moved
    assert train_mnist.main(["--resume", "--out", "run", "--dataset", "latents:b.pt", "--steps",
                             "3"]) == 0
    assert "python -m tools.latents sample run/step_0000003.pt --vae" in capsys.readouterr().out
    write(here / "b.pt", latents=torch.zeros(24, 4, 8, 8))
    with pytest.raises(UserError, match="not the checkpoint's"):
        train_mnist.main(["--resume", "--out", "run", "--dataset", "latents:b.pt", "--steps", "4"])
    # sample.py, which would clip, says which command samples
    with pytest.raises(UserError, match="tools.latents sample"):
        sample.main(["run"])
    with pytest.raises(UserError, match="tools.latents sample"):
        sample.generate(sample.load("run", "cpu"), [0])


def test_images_as_latents_train_as_images(here, monkeypatch):
    """The same weights, bit for bit, where half precision holds the pixels exactly."""
    monkeypatch.setitem(MODELS, TINY, dict(patch_size=7, hidden_size=16, depth=2, num_heads=2))
    drawn = data.draw_glyphs(90)
    drawn.images = (drawn.images > 127).to(torch.uint8) * 255
    monkeypatch.setattr(data, "draw_glyphs", lambda *_args, **_options: drawn)
    write(here / "a.pt", latents=drawn.images.half() / 127.5 - 1, labels=drawn.labels,
          class_names=drawn.class_names)
    for name in ("glyphs", "latents:a.pt"):
        assert train_mnist.main(["--dataset", name, "--model", TINY, "--steps", "3", "--batch-size",
                                 "8", "--out", name[:6]]) == 0
    images, as_latents = (checkpoints.load(checkpoints_in(here / name)[-1])["ema"]
                          for name in ("glyphs", "latent"))
    assert tensors_equal(images, as_latents)


def test_previews_of_latents():
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(latents.preview(z), z[:, :3] / 3) and latents.preview(z[:, :2]).shape[1] == 1


# ---------------------------------------------------------------- sampling


def network(learn_sigma=True, **changes) -> DiT:
    torch.manual_seed(0)
    model = DiT(**{**dict(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=2,
                          num_heads=2, num_classes=1000, learn_sigma=learn_sigma), **changes})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", ["DiT-XL/2", "DiT-B/4"])
def test_the_sizes_of_published_weights_are_read_from_their_shapes(name, here):
    with torch.device("meta"):
        model = DiT(**MODELS[name], input_size=32, in_channels=4, num_classes=1000,
                    learn_sigma=True)
    config = tool.published(model.state_dict(), here, None)["config"]
    assert config["model"] == dict(MODELS[name], input_size=32, in_channels=4, num_classes=1000,
                                   learn_sigma=True, mlp_ratio=4.0)


@pytest.fixture
def published(here):
    """A file with the keys of DiT-XL-2-256x256.pt, small, of a size that dit.MODELS lacks."""
    torch.save(network().state_dict(), here / "DiT.pt")
    return here / "DiT.pt"


def test_published_weights(published, here):
    assert "--heads" in str(pytest.raises(UserError, tool.load, published, "cpu").value)
    found = tool.load(published, torch.device("cpu"), heads=2)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([207, 1000])
    assert torch.equal(found.model(x, t, y), network()(x, t, y))
    assert found.class_names[207] == "golden retriever" and found.diffusion.prediction == "eps"
    assert found.sampling["steps"] == 250 and found.sampling["cfg_scale"] == 4
    assert isinstance(found.diffusion, LearnedVariance)
    torch.save(dict(ema=network().state_dict(), opt={}), here / "training.pt")
    assert tool.load(here / "training.pt", torch.device("cpu"), heads=2).step == 0
    torch.save(network(learn_sigma=False).state_dict(), here / "plain.pt")
    plain = tool.load(here / "plain.pt", torch.device("cpu"), heads=2)
    assert type(plain.diffusion) is GaussianDiffusion and plain.model.out_channels == 4

    good = network().state_dict()
    for changes, words in [
        ({"pos_embed": torch.ones(1, 5, 16)}, "shape"), ({"x_embedder.proj.weight": None}, "DiT"),
        ({"blocks.1.attn.qkv.weight": torch.ones(3)}, "shape"), ({"more": torch.ones(1)}, "more"),
        ({"final_layer.linear.weight": torch.ones(0, 16)}, "shape"),
        ({"x_embedder.proj.weight": torch.ones(0, 0, 0, 0)}, "is 0"),
        ({"y_embedder.embedding_table.weight": torch.full((1001, 16), float("nan"))}, "finite"),
    ]:
        torch.save({k: w for k, w in {**good, **changes}.items() if w is not None}, published)
        with pytest.raises(UserError, match=words):
            tool.load(published, torch.device("cpu"), heads=2)


def test_class_names():
    assert tool.imagenet(1000)[360] == "otter" and tool.imagenet(3) == ["0", "1", "2"]


# ---------------------------------------------------------------- with an autoencoder


def test_encode_train_sample(vae, pictures, here, monkeypatch, capsys):
    assert tool.main(["encode", str(pictures), "train.pt", "--vae", str(vae), "--image-size", "32",
                      "--batch-size", "5"]) == 0
    assert "latents:train.pt" in capsys.readouterr().out
    found = torch.load(here / "train.pt")
    assert found["latents"].shape == (24, 4, 8, 8) and found["class_names"] == ["cat", "dog"]
    assert found["about"]["scale"] == 0.18215 and found["labels"].sum() == 12

    # what is stored is a sample of the posterior, times the scale, in the order of the files
    auto = tool.Autoencoder(str(vae), torch.device("cpu"))
    pixels = data.open_image(pictures / "dog" / "03.png", 32)[0]
    image = torch.from_numpy(pixels.copy()).float()[None] / 127.5 - 1
    noise = ImageNoise(0, 15, 16, (4, 8, 8))("encode")
    with torch.no_grad():
        posterior = auto.vae.encode(image).latent_dist
        wanted = 0.18215 * (posterior.mean + posterior.std * noise)
        torch.testing.assert_close(found["latents"][15].float(), wanted[0], atol=2e-3, rtol=2e-3)
        decoded = auto.vae.decode(wanted / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(auto.decode(wanted), decoded)

    # train on them, sample with two samplers
    monkeypatch.setitem(MODELS, TINY, dict(patch_size=2, hidden_size=16, depth=2, num_heads=2))
    assert train_mnist.main(["--dataset", "latents:train.pt", "--model", TINY, "--steps", "1",
                             "--batch-size", "4", "--out", "run"]) == 0
    for more in ([], ["--sampler", "dpm++"]):
        assert tool.main(["sample", "run", "--labels", "cat", "1", "--vae", str(vae), "--steps",
                          "3", "--out", "x.png", "--force", *more]) == 0
    with Image.open(here / "x.png") as picture:
        assert picture.width >= 2 * 32
    assert "--force" in refused("sample", "run", "--vae", vae, "--out", "x.png")
    assert "--force" in refused("encode", pictures, "train.pt", "--vae", vae)


def test_sample_from_published_weights(vae, published, here, capsys):
    """The command of the README, at a small size."""
    words = ["sample", str(published), "--labels", "207", "otter", "--vae", str(vae), "--heads",
             "2", "--steps", "4", "--out", "x.png"]
    assert tool.main(words) == 0
    out = capsys.readouterr().out
    assert "ddpm, 4 steps, guidance 4, 2 images 32x32" in out and "golden retriever, otter" in out
    first = (here / "x.png").read_bytes()
    assert tool.main([*words, "--force", "--batch-size", "1"]) == 0
    assert (here / "x.png").read_bytes() == first           # whatever the batch size
    assert tool.main([*words, "--force", "--sampler", "ddim", "--cfg-scale", "1"]) == 0


def test_samples_are_not_clipped(published):
    found = tool.load(published, torch.device("cpu"), heads=2)
    for sampler in ("ddim", "ddpm", "dpm++"):
        how = resolve_sampling(found, 1.5, 5, sampler, latents=True)
        z = next(tool.sample_latents(found, torch.tensor([0, 1]), 0, how, 2))
        assert z.shape == (2, 4, 8, 8) and z.abs().max() > 1.5


def test_mistakes_with_autoencoders(vae, pictures, published, here, monkeypatch):
    def wrong(name, out="y.pt", *more):
        return refused("encode", pictures, out, "--vae", name, "--image-size", "32", *more)

    assert "neither a folder nor a name" in wrong("missing")
    assert "neither a folder nor a name" in wrong("../no/where")
    assert "cannot be loaded" in wrong(here)
    assert "multiple of 4" in refused("encode", pictures, "y.pt", "--vae", vae, "--image-size", 30)
    assert "not a folder" in refused("encode", here / "no", "y.pt", "--vae", vae)
    config = json.loads((vae / "config.json").read_text())
    for key, value in [("latent_channels", 3), ("in_channels", 1), ("norm_num_groups", 0),
                       ("block_out_channels", [8]), ("layers_per_block", 3),
                       ("scaling_factor", "x"), ("scaling_factor", 0)]:
        (vae / "config.json").write_text(json.dumps({**config, key: value}))
        assert any(words in wrong(vae) for words in ("cannot be loaded", "do not fit",
                                                     "is not valid"))
    (vae / "config.json").write_text("{")
    assert "cannot be loaded" in wrong(vae)
    (vae / "config.json").write_text(json.dumps(config))
    weights = next(vae.glob("*.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    assert "cannot be loaded" in wrong(vae)
    weights.write_bytes(good)
    assert not (here / "y.pt").exists()

    assert "'unicorn' is not a class" in refused("sample", published, "--heads", 2, "--labels",
                                                 "unicorn", "--vae", vae)
    assert "--steps 2000" in refused("sample", published, "--heads", 2, "--steps", 2000, "--vae",
                                     vae)
    torch.save(network(in_channels=3).state_dict(), published)
    assert "4 channels" in refused("sample", published, "--heads", 2, "--vae", vae)
    ships = ROOT / "assets" / "mnist.pt"
    assert "not trained on latents" in refused("sample", ships, "--vae", vae)
    assert "--heads" in refused("sample", ships, "--vae", vae, "--heads", 2)


def test_without_the_package(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused("sample", "c.pt", "--vae", "x")
