"""tools/edit.py: what is known stays, the ends are those of sample.py, pictures of every kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import few_glyphs, refused
from diffusion import GaussianDiffusion, classifier_free_guidance
from support.compute import seed_of
from tools import edit
from variants.learned_variance import LearnedVariance
from variants.rectified_flow import RectifiedFlow

GLYPH = ("--test-image", 7, "--dataset", "glyphs")


def run(*flags) -> int:
    return edit.main([str(f) for f in flags])


def cells(path, scale: int = 4) -> np.ndarray:
    """The images of a strip, whose pixels were enlarged: int (N, 28, 28)."""
    strip = np.asarray(Image.open(path)).astype(int)[..., 0]
    side = 28 * scale
    return np.stack([strip[2 : 2 + side : scale, x : x + side : scale] for x in
                     range(2, strip.shape[1], side + 2)])


def sampled(*flags) -> np.ndarray:
    assert sample.main([*map(str, flags), "--npz", "s.npz", "--force"]) == 0
    return np.load("s.npz")["arr_0"][..., 0].astype(int)


@pytest.fixture
def lively(trained):
    """A checkpoint whose samples depend on the label, the weights and the guidance."""
    return trained("--steps", 30, "--lr", 0.01, "--muon-lr", 0.1)


@pytest.fixture
def glyph(train) -> tuple[np.ndarray, int]:
    """Image 7 of the test set of glyphs, uint8 (28, 28), and its label."""
    found = few_glyphs(100, seed_of(0, "test"))
    return found.images[7, 0].numpy(), int(found.labels[7])


# ---------------------------------------------------------------- inpainting


class Network:
    """model(xt, t, y) with a fixed output."""
    null_class = 10

    def __init__(self, channels: int):
        self.out = torch.randn(3, channels, 4, 4)

    def __call__(self, xt, t, y):
        return self.out[: len(xt)]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("cls", [GaussianDiffusion, RectifiedFlow, LearnedVariance])
def test_the_known_part_is_what_the_output_says(cls, prediction):
    """And nothing changes elsewhere, nor the variances that a network may predict as well."""
    torch.manual_seed(0)
    process, x0 = cls(prediction=prediction), torch.rand(2, 4, 4) * 2 - 1
    known, xt, y = torch.rand(4, 4) > 0.5, torch.randn(3, 2, 4, 4), torch.zeros(3).long()
    model = Network(4 if cls is LearnedVariance else 2)
    guidance = edit.inpainting(classifier_free_guidance, process, x0, known)
    predict = getattr(process, "guided", lambda g: g)(guidance)(model, y, 1)
    for t in (0, 400, 999):
        out = predict(xt, t)
        x0_hat, _ = process.x0_and_eps(out[:, :2], xt, t)
        before, _ = process.denoise(lambda *_: model.out, xt, t)
        close = dict(atol=2e-2 if prediction == "eps" and t == 999 else 1e-3)
        assert torch.allclose(x0_hat, torch.where(known, x0, before), **close)
        assert torch.equal(out[:, 2:], model.out[:, 2:])


@pytest.mark.parametrize("flags", [(), ("--eta", 0), ("--sampler", "dpm++"),
                                   ("--batch-size", 2, "--cfg-scale", 1)])
def test_the_known_part_stays_and_the_rest_is_filled(lively, glyph, flags):
    image, _ = glyph
    assert run("inpaint", lively, *GLYPH, "--rectangle", 14, 0, 28, 20, "--images", 3, "--steps", 4,
               "--out", "a.png", *flags) == 0
    picture, masked, *filled = cells("a.png")
    hole = np.zeros((28, 28), bool)
    hole[0:20, 14:28] = True
    assert np.array_equal(picture, image) and (masked[hole] == 128).all()
    for each in (masked, *filled):
        assert np.array_equal(each[~hole], image[~hole])
    assert len(filled) == 3 and len({f[hole].tobytes() for f in filled}) == 3


def test_with_everything_masked_it_is_sampling_with_new_noise(lively, glyph):
    _, label = glyph
    for out, more in [("a.png", ()), ("b.png", ("--labels", (label + 1) % 10)),
                      ("c.png", ("--eta", 0))]:
        assert run("inpaint", lively, *GLYPH, "--rectangle", 0, 0, 28, 28, "--images", 3,
                   "--out", out, "--steps", 4, "--seeds", 3, 0, *more) == 0
    for out, eta in [("a.png", 1), ("c.png", 0)]:
        expected = sampled(lively, "--labels", label, "--per-class", 3, "--eta", eta, "--steps", 4,
                           "--seed", 3)
        assert np.abs(cells(out)[2:] - expected).max() <= 1
    assert np.abs(cells("b.png")[2] - cells("a.png")[2]).max() > 1


def test_pictures_of_any_size_and_mode(lively, glyph):
    image, label = glyph

    def picked(*flags):
        args = edit.parser().parse_args(["inpaint", *map(str, flags)])
        return edit.picture_of(args, sample.load(lively)), edit.mask_of(args, 28)

    box = ("--rectangle", 20, 1, 22, 3)
    Image.fromarray(image).resize((56, 56), Image.Resampling.NEAREST).save("large.png")
    (x0, y), mask = picked("--image", "large.png", *box)
    assert y == 10 and x0.shape == (1, 28, 28)                  # "no class"
    assert np.abs(x0[0].numpy() * 127.5 + 127.5 - image).mean() < 3
    assert mask[1:3, 20:22].all() and mask.sum() == 4
    (inverted, y), _ = picked("--image", "large.png", "--invert", "--labels", "seven", *box)
    assert y == 7 and torch.equal(inverted, -x0)
    wide = Image.new("RGB", (60, 28), (255, 0, 0))              # cropped at the centre, luma
    wide.paste((0, 0, 255), (0, 0, 10, 28))
    wide.save("wide.png")
    (x0, _), _ = picked("--image", "wide.png", *box)
    assert torch.allclose(x0, torch.tensor(76 / 127.5 - 1))
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save("clear.png")     # transparent: white
    assert (picked("--image", "clear.png", *box)[0][0] == 1).all()
    (_, y), _ = picked(*GLYPH, *box)
    assert y == label


# ---------------------------------------------------------------- interpolation


def test_slerp_keeps_the_length_and_has_equal_angles():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 1, 28, 28)
    w = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
    path = edit.slerp(a, b, w)
    assert torch.allclose(path[[0, -1]], torch.cat([a, b]), atol=1e-5)
    lengths = path.flatten(1).norm(dim=1)
    assert lengths.max() / lengths.min() < 1.06                 # on the straight line: 1.4
    a, b = torch.eye(4)[:2].view(2, 1, 1, 2, 2)                 # of equal length: exactly an arc
    unit = edit.slerp(a, b, w).flatten(1)
    assert torch.allclose((unit[1:] * unit[:-1]).sum(1).arccos(), torch.full((4,), torch.pi / 8))


@pytest.mark.parametrize("flags", [(), ("--batch-size", 2, "--eta", 1), ("--sampler", "dpm++")])
def test_noises_lead_from_one_seeds_sample_to_the_others(lively, flags):
    flags = ("--steps", 4, *flags)
    assert run("noises", lively, "--labels", "three", "--seeds", 5, 6, "--images", 5, "--out",
               "a.png", *flags) == 0
    found = cells("a.png")
    assert len(found) == 5 and len({f.tobytes() for f in found}) == 5
    for seed, end in [(5, found[0]), (6, found[-1])][: 1 if "--eta" in flags else 2]:
        expected, = sampled(lively, "--labels", 3, "--seed", seed, *flags)
        assert np.abs(end - expected).max() <= 1


@pytest.mark.parametrize("flags", [(), ("--eta", 1), ("--cfg-scale", 4, "--weights", "model")])
def test_labels_lead_from_one_classs_sample_to_the_others(lively, flags):
    flags = ("--steps", 4, *flags)
    assert run("labels", lively, "--labels", 3, "eight", "--images", 4, "--seeds", 2, 0, "--out",
               "a.png", *flags) == 0
    found = cells("a.png")
    assert len(found) == 4 and len({f.tobytes() for f in found}) == 4
    for label, end in [(3, found[0]), (8, found[-1])]:          # with the same later noise
        expected, = sampled(lively, "--labels", label, "--seed", 2, *flags)
        assert np.abs(end - expected).max() <= 1


# ---------------------------------------------------------------- mistakes


def test_a_mistake_is_one_line_and_writes_nothing(checkpoint, glyph, tmp_path):
    Path("old.png").write_text("")
    before, box = sorted(tmp_path.rglob("*.*")), ("--rectangle", 0, 0, 9, 9)
    for flags, words in [
            (["inpaint", *box], "--image FILE or --test-image N"),
            (["inpaint", *box, "--image", "none.png"], "none.png"),
            (["inpaint", *box, "--test-image", 2000, "--dataset", "glyphs"], "--test-image 2000"),
            (["inpaint", *GLYPH], "nothing to fill"),
            (["inpaint", *GLYPH, "--rectangle", 5, 0, 5, 9], "28x28"),
            (["inpaint", *GLYPH, "--rectangle", 0, 0, 9, 29], "28x28"),
            (["noises"], "--labels"), (["noises", "--labels", "eleven"], "eleven is not a class"),
            (["labels", "--labels", 3], "2 classes"),
            (["labels", "--labels", 3, 8, "--autoguidance", "run"], "in between"),
            (["labels", "--labels", 3, 8, "--out", "old.png"], "old.png exists")]:
        assert words in refused(edit.main, flags[0], checkpoint, *flags[1:])
        assert sorted(tmp_path.rglob("*.*")) == before
    for _ in range(2):                          # without --out: a new file each time
        assert run("labels", checkpoint, "--labels", 3, 8, "--images", 3, "--steps", 1) == 0
    assert len(list(Path("output").glob("*.png"))) == 2
