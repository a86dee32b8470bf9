"""`from sample import load, generate`: sampling from Python, as the README shows it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import load as load_state
from sample import generate, load
from support import checkpoints, paths, pictures
from support.cli import UserError
from support.data import to_uint8


@pytest.fixture
def lively(trained):
    """The path of a checkpoint whose samples depend on the label, the weights and the guidance."""
    return trained("--steps", 30, "--lr", 0.01, "--muon-lr", 0.1)


def test_three_lines(here, monkeypatch):
    """generate(load(), [3, 1, 4]) with the checkpoint that ships."""
    checkpoint = load()
    assert checkpoint.path == paths.SHIPPED
    images = generate(checkpoint, [3, 1, 4], steps=3)
    assert images.shape == (3, 1, 28, 28) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1 and images.max() > 0 > images.min()
    assert not images.requires_grad and images.device.type == "cpu"


def test_load_takes_a_file_a_folder_or_the_newest_run(trained, lively):
    newest = trained("--steps", 3, out="output/001-x")
    for name in (None, "output/001-x", newest, str(newest)):
        checkpoint = load(name)
        assert checkpoint.step == 3 and checkpoint.path.samefile(newest)
    assert load("run").step == 30
    assert checkpoint.class_names == [str(i) for i in range(10)]
    assert checkpoint.diffusion.num_timesteps == 1000 and not checkpoint.model.training
    assert set(checkpoint.sampling) == {"sampler", "steps", "eta", "cfg_scale"}
    for name in ("none.pt", "output"):
        with pytest.raises(UserError, match=name):
            load(name)
    with pytest.raises(UserError, match="--device tpu is not available"):
        load(newest, device="tpu")


def test_load_takes_the_averaged_weights_or_the_last_ones(lively):
    state = load_state(lively)
    for weights in ("ema", "model"):
        loaded = load(lively, "cpu", weights).model.state_dict()
        assert all(torch.equal(w, state[weights][name]) for name, w in loaded.items())
    assert not torch.equal(generate(load(lively), [3], steps=2),
                           generate(load(lively, weights="model"), [3], steps=2))


def test_labels_are_indices_names_or_number_words(lively):
    state = load_state(lively)
    state["class_names"][4:6] = ["cat", "4"]
    checkpoints.save(Path("cats.pt"), state)
    checkpoint = load("cats.pt")
    by_index = generate(checkpoint, [3, 4, 7], steps=2)
    assert torch.equal(generate(checkpoint, ["3", "cat", "seven"], steps=2), by_index)
    assert torch.equal(generate(checkpoint, torch.tensor([3, 4, 7]), steps=2), by_index)
    assert torch.equal(generate(checkpoint, np.array([3, 4, 7]), steps=2), by_index)
    assert not torch.equal(generate(checkpoint, [3, 4, 8], steps=2), by_index)
    by_name = generate(checkpoint, [0, "4"], steps=2)           # class 5 is called "4"
    assert torch.equal(by_name, generate(checkpoint, [0, 5], steps=2))
    for wrong in ("dog", 10, -1, "4.0"):
        with pytest.raises(UserError, match="is not a class of this model"):
            generate(checkpoint, [0, wrong], steps=2)


def test_an_image_depends_on_the_seed_its_place_and_its_label_alone(lively):
    checkpoint = load(lively)
    labels = [i % 10 for i in range(20)]
    images = generate(checkpoint, labels, steps=3)
    assert torch.equal(generate(checkpoint, labels, steps=3, seed=0), images)
    for size in (1, 7, 20):
        other = generate(checkpoint, labels, steps=3, batch_size=size)
        assert torch.allclose(other, images, atol=1e-5)
    assert torch.allclose(generate(checkpoint, labels[:2], steps=3), images[:2], atol=1e-5)
    same = generate(checkpoint, [3] * 20, steps=3)              # another label, the same place
    assert torch.allclose(same[13], images[13], atol=1e-5)
    assert not torch.allclose(same[12], images[12], atol=1e-2)
    assert not torch.allclose(generate(checkpoint, labels, steps=3, seed=1), images, atol=1e-1)
    torch.manual_seed(5)                                        # no global random state
    noisy = [generate(checkpoint, labels[:2], steps=3, eta=1.0) for _ in range(2)]
    assert torch.equal(*noisy)


def test_what_is_not_given_is_the_checkpoints(lively):
    checkpoint = load(lively)
    default = generate(checkpoint, [3, 1])
    given = dict(checkpoint.sampling)               # steps, cfg_scale, sampler, eta
    assert torch.equal(generate(checkpoint, [3, 1], **given), default)
    for change in (dict(steps=5), dict(cfg_scale=0), dict(eta=1.0), dict(sampler="ddpm"),
                   dict(cfg_scale=-1.5)):
        if change == dict(sampler="ddpm"):
            given.update(steps=None, eta=None)
        assert not torch.equal(generate(checkpoint, [3, 1], **{**given, **change}), default)
    for wrong, word in [(dict(steps=0), "--steps 0"), (dict(steps=1001), "1000"),
                        (dict(sampler="euler"), "ddim, ddpm"),
                        (dict(sampler="ddpm", eta=0.5), "--eta"),
                        (dict(sampler="ddpm", steps=50), "all 1000")]:
        with pytest.raises(UserError, match=word):
            generate(checkpoint, [3], **wrong)


def test_images_are_those_of_the_command(lively):
    """to_uint8(generate(...)) has the bytes that --npz writes."""
    checkpoint = load(lively)
    for flags, how in [((), {}), (("--steps", "7", "--cfg-scale", "3", "--seed", "5"),
                                  dict(steps=7, cfg_scale=3, seed=5)),
                       (("--steps", "4", "--eta", "1"), dict(steps=4, eta=1.0))]:
        assert sample.main([str(lively), "--labels", "3", "seven", "1", "--npz", "a.npz",
                            "--force", *flags]) == 0
        written = np.load("a.npz")["arr_0"]
        images = to_uint8(generate(checkpoint, [3, "7", 1], **how)).permute(0, 2, 3, 1)
        assert np.array_equal(images.numpy(), written)


def test_a_notebook_shows_a_grid(lively):
    images = generate(load(lively), [0, 1, 2, 3] * 3, steps=2)
    shown = Image.open(io.BytesIO(images._repr_png_()))
    assert shown.format == "PNG"
    expected = pictures.grid(to_uint8(torch.Tensor(images)), 10)
    assert np.array_equal(shown, expected)
    assert Image.open(io.BytesIO(images[:2]._repr_png_())).size < shown.size
    assert (images + 1)._repr_png_() != images._repr_png_()     # still images after arithmetic


def test_batches_come_in_order_and_their_steps_can_be_watched(lively):
    checkpoint, seen = load(lively), []
    how = sample.resolve_sampling(checkpoint, steps=3)
    y = torch.tensor([3, 1, 4, 1, 5])
    parts = list(sample.sample(checkpoint, y, 0, how, batch_size=2,
                               watch=lambda t, xt, x0_hat, then: seen.append((t, xt, then))))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.allclose(torch.cat(parts), torch.Tensor(generate(checkpoint, y.tolist(), steps=3)),
                          atol=1e-5)
    assert [t for t, _, _ in seen] == [999, 500, 0] * 3
    for (_, _, then), (_, xt, _) in zip(seen[:2], seen[1:3], strict=True):
        assert torch.equal(then, xt)
    assert torch.equal(seen[2][2].clamp(-1, 1), parts[0])
    second = next(sample.sample(checkpoint, y[2:4], 0, how, first=2))   # a part of a larger job
    assert torch.allclose(second, parts[1], atol=1e-5)


def test_generate_without_labels_is_refused(here):
    with pytest.raises(UserError, match="at least one class"):
        sample.generate(sample.load(paths.SHIPPED, "cpu"), [])
