"""tools/edit.py: what is known stays, the ends are those of sample.py, pictures of every kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import few_glyphs
from diffusion import GaussianDiffusion
from support import data
from support.cli import UserError
from support.data import to_uint8
from support.sampling import settings_from
from support.seeds import ImageNoise
from tools import edit
from variants.rectified_flow import RectifiedFlow

GLYPH = ("--test-image", 7, "--dataset", "glyphs")


def run(*flags) -> int:
    return edit.main([str(f) for f in flags])


def cells(path, side: int = 28) -> np.ndarray:
    """The images of a strip that was written with --scale 1: (N, 28, 28, 3)."""
    strip = np.asarray(Image.open(path))
    return np.stack([strip[2 : 2 + side, x : x + side] for x in
                     range(2, strip.shape[1], side + 2)])


def sampled(*flags) -> np.ndarray:
    assert sample.main([*map(str, flags), "--npz", "s.npz", "--force"]) == 0
    return np.load("s.npz")["arr_0"]


@pytest.fixture
def lively(trained):
    """A checkpoint whose samples depend on the label, the weights and the guidance."""
    return trained("--steps", 30, "--lr", 0.01, "--muon-lr", 0.1)


@pytest.fixture
def glyph(monkeypatch, train):
    """Image 7 of the test set of glyphs, uint8 (28, 28), and its label."""
    found = few_glyphs(8, data.mix_seed(0, "test"))
    monkeypatch.setattr(data, "draw_glyphs", lambda count, seed: few_glyphs(8, seed))
    return found.images[7, 0].numpy(), int(found.labels[7])


# ---------------------------------------------------------------- inpainting


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("cls", [GaussianDiffusion, RectifiedFlow])
def test_the_known_part_is_what_the_output_says(cls, prediction):
    """Also of an output with variances, which stay; elsewhere nothing changes."""
    torch.manual_seed(0)
    process, x0 = cls(prediction=prediction), torch.rand(2, 4, 4) * 2 - 1
    known, xt = torch.rand(4, 4) > 0.5, torch.randn(3, 2, 4, 4)
    out = torch.randn(3, 4, 4, 4)
    predict = edit.inpainting(None, None, 2.0, lambda *a: lambda xt, t: out, process, x0, known)
    for t in (0, 400, 999):
        found = predict(xt, t)
        assert torch.equal(found[:, 2:], out[:, 2:])
        x0_hat, _ = process.x0_and_eps(found[:, :2], xt, t)
        before, _ = process.denoise(lambda *_: out, xt, t)
        close = dict(atol=2e-2 if prediction == "eps" and t == 999 else 1e-3)
        assert torch.allclose(x0_hat, torch.where(known, x0, before), **close)


@pytest.mark.parametrize("flags", [(), ("--eta", 0), ("--sampler", "dpm++"),
                                   ("--batch-size", 2, "--cfg-scale", 1)])
def test_the_known_part_stays_and_the_rest_is_filled(lively, glyph, flags):
    image, label = glyph
    assert run("inpaint", lively, *GLYPH, "--rectangle", 14, 0, 28, 20, "--images", 3, "--steps", 4,
               "--scale", 1, "--out", "a.png", *flags) == 0
    picture, masked, *filled = cells("a.png")[..., 0]
    hole = np.zeros((28, 28), bool)
    hole[0:20, 14:28] = True
    assert np.array_equal(picture, image) and (masked[hole] == 128).all()
    for each in (masked, *filled):
        assert np.array_equal(each[~hole], image[~hole])
    assert len(filled) == 3 and len({f[hole].tobytes() for f in filled}) == 3
    film = Image.open("a.gif")
    assert film.n_frames == 4 and film.size == (3 * 30 + 2, 32)
    film.seek(3)
    last = np.asarray(film.convert("L"))[2:30, 2:30]
    assert np.abs(last.astype(int) - filled[0]).mean() < 4


def test_ddim_adds_noise_unless_told_otherwise(lively, glyph):
    found = []
    for flags in [(), ("--eta", 1), ("--eta", 0)]:
        run("inpaint", lively, *GLYPH, "--rectangle", 0, 0, 28, 20, "--steps", 4, "--images", 1,
            "--out", "a.png", "--force", *flags)
        found.append(Path("a.png").read_bytes())
    assert found[0] == found[1] != found[2]


def test_with_everything_masked_it_is_sampling(lively, glyph):
    flags = ("--steps", 4, "--seed", 3, "--eta", 1)
    _, label = glyph
    assert run("inpaint", lively, *GLYPH, "--rectangle", 0, 0, 28, 28, "--images", 2, "--scale", 1,
               "--out", "a.png", *flags) == 0
    expected = sampled(lively, "--labels", label, "--per-class", 2, *flags)
    assert np.abs(cells("a.png")[2:, ..., :1].astype(int) - expected).max() <= 1
    assert run("inpaint", lively, *GLYPH, "--rectangle", 0, 0, 28, 28, "--images", 2, "--scale", 1,
               "--out", "b.png", "--label", (label + 1) % 10, *flags) == 0
    assert np.abs(cells("b.png")[2].astype(int) - cells("a.png")[2]).max() > 1


def picked(lively, *flags) -> tuple[torch.Tensor, int, torch.Tensor]:
    """The picture, the class and the mask that the flags of inpaint name."""
    checkpoint = sample.load(lively)
    args = edit.parser().parse_args(["inpaint", *map(str, flags)])
    return *edit.picture_of(args, checkpoint), edit.mask_of(args, 28)


def test_pictures_of_any_size_and_mode(lively, glyph):
    image, label = glyph
    Image.fromarray(image).resize((56, 56), Image.Resampling.NEAREST).save("large.png")
    box = ("--rectangle", 0, 0, 1, 1)
    x0, y, _ = picked(lively, "--image", "large.png", *box)
    assert y == 10 and x0.shape == (1, 28, 28)                  # "no class"
    assert np.abs(to_uint8(x0)[0].numpy().astype(int) - image).mean() < 3
    inverted, y, _ = picked(lively, "--image", "large.png", "--invert", "--label", "seven", *box)
    assert y == 7 and torch.equal(inverted, -x0)

    wide = Image.new("RGB", (60, 28), (255, 0, 0))              # cropped at the centre, luma
    wide.paste((0, 0, 255), (0, 0, 10, 28))
    wide.save("wide.png")
    x0, _, _ = picked(lively, "--image", "wide.png", *box)
    assert (to_uint8(x0) == 76).all()
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save("clear.png")     # transparent: white
    assert (picked(lively, "--image", "clear.png", *box)[0] == 1).all()
    Image.fromarray(np.full((28, 28), 40_000, np.uint16)).save("deep.png")
    assert (to_uint8(picked(lively, "--image", "deep.png", *box)[0]) == 40_000 >> 8).all()


def test_masks_are_rectangles_and_the_white_of_a_picture(lively, glyph):
    Image.fromarray(np.repeat([[255, 0]], 2, 0).astype(np.uint8)).save("left.png")  # 2 x 2
    _, y, mask = picked(lively, *GLYPH, "--mask", "left.png")
    assert y == glyph[1] and mask[:, :12].all() and not mask[:, 16:].any()
    _, _, both = picked(lively, *GLYPH, "--mask", "left.png", "--rectangle", 20, 1, 22, 3)
    assert torch.equal(both[3:], mask[3:]) and both[1:3, 20:22].all()
    assert both.sum() == mask.sum() + 4


def test_a_colour_model_takes_colour(lively):
    checkpoint = sample.load(lively)
    Image.new("RGB", (9, 9), (255, 0, 0)).save("red.png")
    args = edit.parser().parse_args(["inpaint", "--image", "red.png"])
    checkpoint.model.in_channels = 3
    x0, _ = edit.picture_of(args, checkpoint)
    assert x0.shape == (3, 28, 28) and x0[:, 5, 5].tolist() == [1, -1, -1]
    checkpoint.model.in_channels = 4
    with pytest.raises(UserError, match="4 channels"):
        edit.picture_of(args, checkpoint)


# ---------------------------------------------------------------- interpolation


def test_slerp_keeps_the_length_and_has_equal_angles():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 1, 28, 28)
    w = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
    path = edit.slerp(a, b, w)
    assert torch.allclose(path[[0, -1]], torch.cat([a, b]), atol=1e-5)
    lengths = path.flatten(1).norm(dim=1)
    assert lengths.max() / lengths.min() < 1.06                 # on the straight line: 1.4
    unit = path.flatten(1) / lengths[:, None]
    a, b = torch.eye(4)[:2].view(2, 1, 1, 2, 2)                 # of equal length: exactly an arc
    unit = edit.slerp(a, b, w).flatten(1)
    assert torch.allclose((unit[1:] * unit[:-1]).sum(1).arccos(), torch.full((4,), torch.pi / 8))


@pytest.mark.parametrize("flags", [(), ("--batch-size", 2), ("--sampler", "dpm++")])
def test_noises_lead_from_one_seeds_sample_to_the_others(lively, flags):
    flags = ("--steps", 4, *flags)
    assert run("noises", lively, "--label", "three", "--seeds", 5, 6, "--frames", 5, "--scale", 1,
               "--out", "a.png", *flags) == 0
    found = cells("a.png")[..., :1].astype(int)
    assert len(found) == 5 and len({f.tobytes() for f in found}) == 5
    for seed, end in [(5, found[0]), (6, found[-1])]:
        expected, = sampled(lively, "--labels", 3, "--seed", seed, *flags)
        assert np.abs(end - expected).max() <= 1
    film = Image.open("a.gif")
    assert film.n_frames == 9 and film.size == (32, 32)         # there and back
    film.seek(4)
    assert np.abs(np.asarray(film.convert("L"))[2:30, 2:30, None] - found[4]).mean() < 4


@pytest.mark.parametrize("flags", [(), ("--eta", 1), ("--cfg-scale", 4, "--weights", "model")])
def test_labels_lead_from_one_classs_sample_to_the_others(lively, flags):
    flags = ("--steps", 4, "--seed", 2, *flags)
    assert run("labels", lively, "--labels", 3, "eight", "--frames", 4, "--scale", 1, "--out",
               "a.png", *flags) == 0
    found = cells("a.png")[..., :1].astype(int)
    assert len(found) == 4 and len({f.tobytes() for f in found}) == 4
    for label, end in [(3, found[0]), (8, found[-1])]:
        expected, = sampled(lively, "--labels", label, *flags)
        assert np.abs(end - expected).max() <= 1


def test_every_later_noise_is_the_same_for_all(lively):
    """Of the first image that sample.py draws; so only what is interpolated differs."""
    checkpoint = sample.load(lively)
    args = edit.parser().parse_args(["noises", "--label", "3", "--eta", "1", "--steps", "3"])
    [how] = settings_from(args, checkpoint)
    xT = ImageNoise(0, 0, 1, (1, 28, 28))("T").expand(3, -1, -1, -1)
    images, _ = edit.draw(args, checkpoint, how, torch.tensor([3, 3, 3]), xT, 0)
    assert torch.allclose(images[0], images[2], atol=1e-5)


# ---------------------------------------------------------------- mistakes

BOX = ["--rectangle", "0", "0", "9", "9"]


@pytest.mark.parametrize("flags, words", [
    (["inpaint", *BOX], ["one picture", "--image FILE or --test-image N"]),
    (["inpaint", *BOX, "--image", "file", "--test-image", "1"], ["one picture"]),
    (["inpaint", *BOX, "--image", "none.png"], ["none.png cannot be read"]),
    (["inpaint", *BOX, "--image", "file"], ["file cannot be read as an image"]),
    (["inpaint", *BOX, "--test-image", "8", "--dataset", "glyphs"], ["8: the", "are 0 to 7"]),
    (["inpaint", *BOX, "--test-image", "1", "--dataset", "digits"], ["digits is unknown"]),
    (["inpaint", *BOX, "--test-image", "1", "--dataset", "glyphs", "--label", "x"], ["label 'x'"]),
    (["inpaint", "--test-image", "1", "--dataset", "glyphs"], ["nothing is masked"]),
    (["inpaint", "--test-image", "1", "--dataset", "glyphs", "--mask", "black.png"],
     ["nothing is masked", "white"]),
    (["inpaint", "--test-image", "1", "--dataset", "glyphs", "--mask", "file"], ["file cannot"]),
    (["inpaint", "--test-image", "1", "--dataset", "glyphs", "--rectangle", "5", "0", "5", "9"],
     ["--rectangle 5 0 5 9", "28x28"]),
    (["inpaint", "--test-image", "1", "--dataset", "glyphs", "--rectangle", "0", "0", "9", "29"],
     ["29", "28x28"]),
    (["inpaint", "--test-image", "1", "--dataset", "glyphs", "--rectangle", "0", "0", "29", "9"],
     ["29", "28x28"]),
    (["inpaint", "--images", "0"], ["--images"]),
    (["inpaint", *BOX, "--test-image", "1", "--dataset", "latents:x.pt"], ["holds latents"]),
    (["noises"], ["--label"]),
    (["noises", "--label", "3", "--seeds", "4", "4"], ["--seeds 4 4", "two different"]),
    (["noises", "--label", "eleven"], ["'eleven' is not a class"]),
    (["noises", "--label", "3", "--frames", "2"], ["--frames", "at least 3"]),
    (["labels", "--labels", "3"], ["--labels", "2 arguments"]),
    (["labels", "--labels", "3", "three"], ["--labels 3 three", "two different classes"]),
    (["labels", "--labels", "3", "x"], ["'x' is not a class"]),
    (["labels", "--labels", "3", "8", "--autoguidance", "run"], ["no classes in between"]),
    (["labels", "--labels", "3", "8", "--out", "a.jpg"], ["a.jpg", ".png"]),
    (["labels", "--labels", "3", "8", "--out", "old.png"], ["old.png exists", "--force"]),
    (["labels", "--labels", "3", "8", "--out", "film.png"], ["film.gif exists", "--force"]),
    (["labels", "--labels", "3", "8", "--steps", "2000"], ["--steps 2000"]),
    (["labels", "--labels", "3", "8", "--sede", "1"], ["--sede", "did you mean --seed?"]),
])
def test_a_mistake_is_one_line_and_writes_nothing(checkpoint, glyph, flags, words, tmp_path):
    for name in ("file", "old.png", "film.gif"):
        Path(name).write_text("")
    Image.new("L", (4, 4)).save("black.png")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        run(flags[0], checkpoint, *flags[1:])
    message = str(caught.value)
    assert caught.value.status == 2 and "\n" not in message
    assert all(word in message for word in words), message
    assert set(tmp_path.rglob("*")) == before


def test_processes_and_networks_that_lack_what_is_needed(checkpoint, glyph, monkeypatch):
    monkeypatch.delattr(GaussianDiffusion, "alpha_sigma")
    with pytest.raises(UserError, match="inpaint does not apply to this process"):
        run("inpaint", checkpoint, *GLYPH, *BOX)
    loaded = sample.load(checkpoint)
    del loaded.model.y_embedder
    monkeypatch.setattr(edit, "load", lambda *_: loaded)
    with pytest.raises(UserError, match="no y_embedder.embedding_table"):
        run("labels", checkpoint, "--labels", 3, 8)


def test_default_names_are_numbered(checkpoint):
    for _ in range(2):
        assert run("labels", checkpoint, "--labels", 3, 8, "--frames", 3, "--steps", 1) == 0
    assert run("noises", checkpoint, "--label", 3, "--frames", 3, "--steps", 1) == 0
    names = sorted(p.name for p in Path("output").iterdir())
    assert names == ["labels-001.gif", "labels-001.png", "labels-002.gif", "labels-002.png",
                     "noises-001.gif", "noises-001.png"]
    for path in (Path("a.png"), Path("a.gif")):
        path.write_text("old")
    assert run("noises", checkpoint, "--label", 3, "--frames", 3, "--steps", 1, "--out", "a.png",
               "--force") == 0
    assert Image.open("a.gif").n_frames == 5


def test_each_operation_is_short():
    """Below 30 lines of its own, of code."""
    import ast
    import inspect

    def lines(function) -> int:
        node = ast.parse(inspect.getsource(function)).body[0]
        return node.end_lineno - node.body[1].lineno + 2            # without the docstring
    assert lines(edit.inpainting) + lines(edit.inpaint) < 30
    assert lines(edit.noises) + lines(edit.slerp) < 30 and lines(edit.labels) < 30


def test_every_flag_is_in_a_test():
    text = Path(__file__).read_text()
    shared = {"--guidance-interval", "--precision", "--device", "--data-dir"}
    operations = edit.parser()._subparsers._group_actions[0].choices
    for action in (a for sub in operations.values() for a in sub._actions):
        flag = action.option_strings[-1] if action.option_strings else "checkpoint"
        assert flag in shared | {"--help", "checkpoint"} or f'"{flag}"' in text, flag
