"""sample.py, as a command and from Python: an image's noise, labels, flags, the files it writes."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import ROOT, refused
from sample import generate, load
from support import checkpoint as checkpoints, pictures
from support.classes import label_of
from support.command import SHIPPED, UserError
from support.compute import image_noise
from support.data import to_uint8


def run(*flags) -> int:
    return sample.main([str(f) for f in flags])


def arrays(*flags) -> tuple[np.ndarray, np.ndarray]:
    """What --npz writes."""
    path = Path(f"{len(list(Path().glob('*.npz')))}.npz")
    assert run(*flags, "--npz", path) == 0
    file = np.load(path)
    return file["arr_0"], file["arr_1"]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference in grey levels."""
    return np.abs(a.astype(int) - b).max()


@pytest.fixture
def lively(trained) -> Path:
    """A checkpoint whose samples depend on the label, the weights and the guidance; in its folder
    a weaker one, of step 10."""
    return trained("--steps", 30, "--lr", 0.01, "--muon-lr", 0.1, "--save-every", 10)


def changed(path: Path, change) -> Path:
    """A copy of a checkpoint after change(state)."""
    state = checkpoints.load(path)
    change(state)
    checkpoints.save(path.with_name("changed.pt"), state)
    return path.with_name("changed.pt")


@pytest.fixture
def short(lively) -> Path:
    """The same network with 40 timesteps, for DDPM's sampler, which takes them all."""
    def fewer(state):
        state["config"]["diffusion"].update(num_timesteps=40, beta_end=0.3)
        state["config"]["sampling"].update(steps=20)
    return changed(lively, fewer)


# ---------------------------------------------------------------- image k: of (seed, k, label)


def test_the_noise_of_an_image_depends_on_seed_t_and_place_alone():
    whole = image_noise(0, "T", 0, 100, (1, 4, 4))
    for first, last in [(0, 1), (15, 17), (16, 32), (37, 99)]:
        assert torch.equal(image_noise(0, "T", first, last, (1, 4, 4)), whole[first:last])
    others = [image_noise(seed, t, 0, 100, (1, 4, 4)) for seed, t in [(1, "T"), (0, 5), (0, 6)]]
    flat = torch.cat([whole, *others]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 400            # no two images share their noise
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05


@pytest.mark.parametrize("flags", [
    ("--steps", 5), ("--steps", 5, "--eta", 1), ("--sampler", "ddpm"),
    ("--steps", 5, "--sampler", "dpm++")])
def test_an_image_is_the_same_whatever_the_batch_size_and_the_rest_of_the_grid(short, flags):
    base = (short, "--seed", 4, *flags)
    images, labels = arrays(*base, "--labels", 3, 7, 1, "--per-class", 3)
    assert labels.tolist() == [3, 3, 3, 7, 7, 7, 1, 1, 1]
    split, _ = arrays(*base, "--labels", 3, 7, 1, "--per-class", 3, "--batch-size", 2)
    fewer, _ = arrays(*base, "--labels", 3, "--per-class", 3)
    assert apart(images, split) <= 1 and apart(images[:3], fewer) <= 1
    assert apart(images[:3], images[3:6]) > 1
    assert apart(images[:3], arrays(short, "--seed", 5, *flags, "--labels", 3,
                                    "--per-class", 3)[0]) > 1


def test_the_images_of_the_checkpoint_that_ships(here):
    """tests/shipped.npy: a digit of each class, as the lesson drew them in 10 steps."""
    images = to_uint8(generate(load(SHIPPED, "cpu"), range(10), steps=10, precision="fp32"))
    expected = np.load(ROOT / "tests" / "shipped.npy")
    assert apart(images[:, 0].numpy(), expected) <= 1
    bf16 = to_uint8(generate(load(SHIPPED, "cpu"), range(10), steps=10, precision="bf16"))
    assert not torch.equal(bf16, images)                    # another format, no other picture
    assert np.abs(bf16[:, 0].numpy().astype(int) - expected).mean() < 8


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("names, text, index", [
    (["cat", "3", "seven", "10"], *case) for case in [
        ("cat", 0), ("3", 1), ("seven", 2), ("7", 2), ("three", 1), ("THREE", 1), (10, 3),
        ("ten", 3), ("0", None), ("4", None), ("-1", None), ("dog", None), ("", None),
        ("²", None), ("1" * 5000, None)]] + [
    (["cat", "dog"], "1", 1), (["cat", "dog"], 0, 0), (["cat", "dog"], 2, None),
    (["5", "4"], 5, 0), (["5", "4"], "1", None)])
def test_a_label_is_a_name_then_the_number_that_a_name_means_then_an_index(names, text, index):
    if index is None:
        with pytest.raises(UserError, match="is not a class of this model: "):
            label_of(text, names)
    else:
        assert label_of(text, names) == index


def test_names_from_files_are_printed_safely(checkpoint, capfd):
    path = changed(checkpoint, lambda s: s["class_names"].__setitem__(0, "\x1b[2Jevil\n"))
    assert run(path, "--steps", 1, "--out", "a\x1b.png") == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "\\x1b[2Jevil\\n" in out


# ---------------------------------------------------------------- from Python


def test_generate(here, lively):
    checkpoint = load(lively)
    images = generate(checkpoint, [3, "one"], steps=3)
    assert images.shape == (2, 1, 28, 28) and images.dtype == torch.float32
    assert -1 <= images.min() < 0 < images.max() <= 1 and not images.requires_grad
    for same in (["3", 1], torch.tensor([3, 1]), np.array([3, 1])):
        assert torch.equal(generate(checkpoint, same, steps=3), images)
    written, _ = arrays(lively, "--labels", "three", 1, "--steps", 3)
    assert np.array_equal(to_uint8(images).permute(0, 2, 3, 1).numpy(), written)
    default = generate(checkpoint, [3, 1])
    assert torch.equal(generate(checkpoint, [3, 1], **checkpoint.sampling), default)
    for change in (dict(steps=5), dict(cfg_scale=0), dict(cfg_scale=-1.5), dict(seed=1)):
        assert not torch.equal(generate(checkpoint, [3, 1], **change), default)
    last = generate(load(lively, weights="model"), [3, 1])
    assert not torch.equal(last, default)
    torch.manual_seed(5)                                    # no global random state
    noisy = [generate(checkpoint, [3, 1], steps=3, eta=1.0) for _ in range(2)]
    assert torch.equal(*noisy) and not torch.equal(noisy[0], images)
    with pytest.raises(UserError, match="at least one class"):
        generate(checkpoint, [])
    with pytest.raises(UserError, match="--device tpu is not available"):
        load(lively, device="tpu")
    checkpoint = load(SHIPPED)                              # the README's line
    assert generate(checkpoint, [3, "one"], steps=2).shape == (2, 1, 28, 28)


def test_a_notebook_shows_a_grid(lively):
    images = generate(load(lively), [0, 1, 2, 3] * 3, steps=2)
    shown = Image.open(io.BytesIO(images._repr_png_()))
    assert shown.format == "PNG"
    assert np.array_equal(shown, pictures.grid(to_uint8(torch.Tensor(images)), 10))
    assert (images + 1)._repr_png_() != images._repr_png_()     # still images after arithmetic
    assert images.mean()._repr_png_() is None is images[0]._repr_png_()


def test_batches_come_in_order_and_their_steps_can_be_watched(lively):
    checkpoint, seen, y = load(lively), [], torch.tensor([3, 1, 4, 1, 5])
    parts = list(sample.sample(checkpoint, y, steps=3, batch_size=2,
                               watch=lambda *step: seen.append(step)))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [t for t, *_ in seen] == [999, 500, 0] * 3
    assert torch.equal(seen[0][1], image_noise(0, "T", 0, 2, (1, 28, 28)))
    for (_, _, x_next, _), (_, xt, _, _) in zip(seen[:2], seen[1:3], strict=True):
        assert torch.equal(x_next, xt)
    assert torch.equal(seen[2][2].clamp(-1, 1), parts[0])
    later = next(sample.sample(checkpoint, y[2:4], steps=3, first=2))   # a part of a larger job
    assert torch.allclose(later, parts[1], atol=1e-5)


# ---------------------------------------------------------------- flags


def test_what_a_checkpoint_suggests_is_used_and_can_be_overruled(lively, short):
    path = changed(lively, lambda s: s["config"]["sampling"].update(eta=1.0, steps=7))
    base = ("--labels", 3, "--per-class", 2)
    suggested, _ = arrays(path, *base)
    assert np.array_equal(suggested, arrays(lively, *base, "--steps", 7, "--eta", 1)[0])
    plain, _ = arrays(path, *base, "--eta", 0)
    assert np.array_equal(plain, arrays(lively, *base, "--steps", 7, "--eta", 0)[0])
    assert not np.array_equal(plain, suggested)
    short = changed(lively, lambda s: s["config"]["diffusion"].update(num_timesteps=40))
    seen = [arrays(short, *base, *flags)[0].tobytes() for flags in [
        ("--steps", 9), ("--steps", 5), ("--steps", 9, "--sampler", "dpm++"),
        ("--sampler", "ddpm"), ("--steps", 9, "--cfg-scale", 1)]]
    assert len(set(seen)) == len(seen)


def test_guidance_in_an_interval_and_from_a_weaker_model(lively):
    base = (lively, "--labels", 3, 7, "--steps", 6)
    plain, guided = (arrays(*base, "--cfg-scale", s)[0] for s in (1, 4))
    inside, some, outside = (arrays(*base, "--cfg-scale", 4, "--guidance-interval", *span)[0]
                             for span in [(0, 1e6), (0.3, 3), (156, 157)])
    assert apart(inside, guided) <= 1 and apart(outside, plain) <= 1
    assert apart(some, guided) > 1 < apart(some, plain)
    early = lively.with_name("step_0000010.pt")
    weaker, itself = (arrays(*base, "--cfg-scale", 4, "--autoguidance", other)[0]
                      for other in (early, lively))
    assert apart(weaker, guided) > 1 < apart(weaker, plain) and apart(itself, plain) <= 1
    assert "does not exist" in refused(sample.main, *base, "--autoguidance", "none.pt")
    for change in (lambda state: state["config"]["diffusion"].update(prediction="eps"),
                   lambda state: state["config"].update(process="rectified-flow"),
                   lambda state: state.update(class_names=list("abcdefghij"))):
        other = changed(lively, change)
        assert "are not those of" in refused(sample.main, *base, "--autoguidance", other)


def test_a_grid_for_each_guidance_scale(lively):
    flags = (lively, "--steps", 3, "--labels", 1, 2, 3, 4)
    run(*flags, "--cfg-scale", 0, 1, 4, "--out", "three.png")
    images = [arrays(*flags, "--cfg-scale", s)[0].transpose(0, 3, 1, 2) for s in (0, 1, 4)]
    panels = [np.asarray(pictures.grid(torch.from_numpy(each), 2)) for each in images]
    page, side = np.asarray(Image.open("three.png")), len(panels[0])
    left, top = page.shape[1] - 3 * (side + 4), page.shape[0] - side - 4
    for i, panel in enumerate(panels):
        x = left + i * (side + 4)
        assert np.array_equal(page[top : top + side, x : x + side], panel)
        assert page[:top, x : x + side].min() < 100             # "guidance 0" above it
    assert len({panel.tobytes() for panel in panels}) == 3


def test_grids_have_a_row_per_label_and_are_near_square_with_one_each(checkpoint):
    def size(*flags):
        run(checkpoint, "--steps", 1, "--force", "--out", "x.png", "--scale", 3, *flags)
        width, height = Image.open("x.png").size
        return (width - 2) / (3 * 28 + 2), (height - 2) / (3 * 28 + 2)

    assert size() == (10, 10) and size("--per-class", 3) == (3, 10)
    assert size("--labels", 3, 1, 4, 7, 9) == (3, 2)
    assert size("--labels", 3, 1, "--per-class", 5) == (5, 2)
    assert size("--random-labels", 7) == (3, 3)
    assert size("--random-labels", 4, "--per-class", 2) == (2, 4)


def test_random_labels_are_a_function_of_the_seed(checkpoint):
    base = (checkpoint, "--steps", 1, "--cfg-scale", 1)
    images, labels = arrays(*base, "--random-labels", 64)
    assert set(labels) == set(range(10))
    assert arrays(*base, "--random-labels", 200)[1][:64].tolist() == labels.tolist()
    assert arrays(*base, "--random-labels", 64, "--seed", 1)[1].tolist() != labels.tolist()
    assert np.array_equal(arrays(*base, "--labels", *labels)[0], images)


# ---------------------------------------------------------------- files


def test_arrays_pngs_and_the_grid_hold_the_same_images(checkpoint):
    path = changed(checkpoint, lambda s: s["class_names"].__setitem__(7, "seven/of nine"))
    base = (path, "--steps", 1, "--labels", 3, "seven/of nine", "--per-class", 2)
    images, labels = arrays(*base, "--png-dir", "new/pngs")
    assert images.shape == (4, 28, 28, 1) and images.dtype == np.uint8
    assert labels.tolist() == [3, 3, 7, 7] and not Path("output").exists()      # no grid
    found = sorted(Path("new/pngs").iterdir())
    assert [p.name for p in found] == ["00000-03-3.png", "00001-03-3.png",
                                       "00002-07-seven-of-nine.png", "00003-07-seven-of-nine.png"]
    for file, image in zip(found, images, strict=True):
        assert np.array_equal(Image.open(file), image[..., 0])
    run(*base, "--out", "a.png", "--scale", 2)
    assert np.array_equal(np.asarray(Image.open("a.png"))[2:58:2, 60:116:2, 0], images[1, ..., 0])
    assert "new/pngs is not empty: --force" in refused(sample.main, *base, "--png-dir", "new/pngs")


def test_a_gif_moves_from_noise_to_the_sample_and_a_strip_shows_its_steps(lively, short):
    run(lively, "--labels", 3, 1, "--steps", 6, "--batch-size", 1, "--gif", "a.gif",
        "--out", "a.png", "--trajectory", "t.png", "--scale", 2, "--precision", "fp32")
    film, last = Image.open("a.gif"), np.asarray(Image.open("a.png")).astype(int)
    assert film.n_frames == 6 and film.info["loop"] == 0
    differences = []
    for frame in (0, 5):
        film.seek(frame)
        differences.append(np.abs(np.asarray(film.convert("RGB")) - last).mean())
    assert differences[0] > 20 and differences[1] < 4 and film.info["duration"] == 2000

    seen = []
    list(sample.sample(load(lively), torch.tensor([3]), steps=6, precision="fp32",
                       watch=lambda *step: seen.append(step)))
    strip = np.asarray(Image.open("t.png"))[..., 0]
    top, left = strip.shape[0] - 2 * 60, strip.shape[1] - 6 * 60
    for column, (_, xt, _, x0_hat) in enumerate(seen):
        for row, image in enumerate((xt, x0_hat)):
            cell = strip[top + row * 60 :, left + column * 60 :][:56:2, :56:2]
            assert apart(cell, to_uint8(image)[0, 0].numpy()) <= 1, (row, column)
    assert strip[:top, left:].min() < 100 > strip[top:, :left].min()    # t above, names beside


def test_colour_pictures():
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    page = np.asarray(pictures.grid(images, 2, scale=1))
    assert np.array_equal(page[2:6, 8:12], images[1].permute(1, 2, 0))
    latents = torch.randn(2, 4, 8, 8)
    assert pictures.grid(latents, 2, scale=1).size == (22, 12)
    film = Image.open(io.BytesIO(pictures.animation([pictures.grid(images, 2)] * 2)))
    assert film.convert("HSV").getchannel("S").getextrema()[1] > 50


def test_default_names_are_numbered_and_nothing_is_overwritten(checkpoint):
    for _ in range(2):
        run(checkpoint, "--steps", 1)
    assert len(list(Path("output").iterdir())) == 2
    for flag, name in [("--out", "x.png"), ("--gif", "x.gif"), ("--npz", "x.npz"),
                       ("--trajectory", "y.png")]:
        Path(name).write_text("precious")
        assert f"{name} exists: --force" in refused(sample.main, checkpoint, "--steps", 1, flag,
                                                    name)
        assert Path(name).read_text() == "precious"
        assert run(checkpoint, "--steps", 1, flag, name, "--force") == 0
        assert Path(name).read_bytes() != b"precious"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("flags, word", [
    (["--labels", "eleven"], "eleven"), (["--labels", "10"], "10"),
    (["--sampler", "ddpm", "--steps", "50"], "--steps does not apply"),
    (["--sampler", "dpm++", "--eta", "0"], "--eta does not apply"),
    (["--sampler", "euler"], "ddim, ddpm"), (["--steps", "1001"], "1 to 1000"),
    (["--eta", "2"], "--eta"),
    (["--cfg-scale", "nan"], "--cfg-scale"),
    (["--cfg-scale", "1", "2", "--npz", "n.npz"], "one --cfg-scale"),
    (["--out", "grid.jpg"], ".png"), (["--gif", "a.png"], ".gif"), (["--out", "run"], ".png"),
    (["--out", "file/x.png"], "file"), (["--png-dir", "file"], "file"),
    (["--png-dir", "."], "not empty"), (["--device", "tpu"], "tpu"),
    (["--random-labels", "5", "--labels", "3"], "--random-labels"),
    (["--out", "s.png", "--trajectory", "./s.png"], "same file"), (["--npz", "x/"], ".npz"),
    (["--ckpt", "run"], "not allowed with argument"), (["--guidance-interval", "1"], "2 arguments"),
])
def test_a_mistake_is_one_line_and_writes_nothing(checkpoint, flags, word, tmp_path):
    Path("file").write_text("")
    before = set(tmp_path.rglob("*"))
    assert word in refused(sample.main, checkpoint, *flags)
    assert set(tmp_path.rglob("*")) == before


def test_a_checkpoint_is_named_by_file_or_folder_and_also_behind_a_list(lively, capsys):
    for named in ((lively,), ("run",), ("--labels", 3, "--ckpt", "run")):
        assert run(*named, "--steps", 1, "--out", "a.png", "--force") == 0
        assert "step_0000030.pt: step 30," in capsys.readouterr().out
    changed(lively, lambda s: s["config"]["sampling"].update(latents=True))
    assert "makes latents" in refused(sample.main, "run/changed.pt")
