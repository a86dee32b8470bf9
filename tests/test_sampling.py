"""DPM-Solver++, guidance intervals, autoguidance: against closed forms and other formulations."""

import functools
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train_mnist
from conftest import ROOT, load
from diffusion import GaussianDiffusion, classifier_free_guidance
from support import checkpoints, components
from support.cli import UserError
from tools import evaluate, figures
from variants import GUIDANCE, SAMPLERS
from variants.dpm_solver import dpm_solver_sample, timesteps_for
from variants.guidance import autoguidance, guidance_interval
from variants.rectified_flow import RectifiedFlow

PREDICTIONS = pytest.mark.parametrize("prediction", ["eps", "v", "x0"])


def arrays(*flags) -> np.ndarray:
    """The images that sample.py writes with --npz."""
    assert sample.main([*map(str, flags), "--npz", "a.npz", "--force"]) == 0
    return np.load("a.npz")["arr_0"]


def refused(call, *flags) -> str:
    with pytest.raises(UserError) as caught:
        call([str(f) for f in flags])
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def lively(trained):
    """A checkpoint whose samples depend on the label, the weights and the guidance."""
    return trained("--steps", 30, "--lr", 0.01, "--muon-lr", 0.1, "--save-every", 10)


# ---------------------------------------------------------------- DPM-Solver++(2M)

MEAN, SD = 0.3, 0.4


def ideal(process):
    """predict(xt, t) of the best network for data N(MEAN, SD^2): x0_hat = E[x0 | xt]."""
    def predict(xt, t):
        alpha, sigma = process.alpha_sigma(t)
        x0_hat = MEAN + alpha * SD**2 / (alpha**2 * SD**2 + sigma**2) * (xt - alpha * MEAN)
        return process.target(x0_hat, (xt - alpha * x0_hat) / sigma, t)
    return predict


def errors(process, sampler, xT) -> list[float]:
    """The largest error in 160, 320 and 640 steps, at a t which all of them visit. The solution is
    known: the ODE keeps each value's place among the quantiles of the data, noised to t."""
    last, end, found = process.num_timesteps - 1, process.num_timesteps // 20 - 1, []
    alpha, sigma = (x.double() for x in process.alpha_sigma(torch.tensor([last, end])))
    sd = (alpha**2 * SD**2 + sigma**2).sqrt()
    expected = alpha[1] * MEAN + sd[1] * (xT - alpha[0] * MEAN) / sd[0]
    for steps in (160, 320, 640):
        results = [xt for _, xt, _ in sampler(ideal(process), xT, clip=False, steps=steps)]
        at = timesteps_for(process, steps).index(end)
        found.append((results[at - 1] - expected).abs().max().item())
    return found


@PREDICTIONS
def test_dpm_solver_is_of_second_order_and_ddim_of_first(prediction):
    """On the same timesteps, for normal data. Twice the steps halve DDIM's error and quarter that
    of DPM-Solver++."""
    process = GaussianDiffusion(12_800, 1e-4 / 12.8, 0.02 / 12.8, prediction)
    process.ddim_timesteps = functools.partial(timesteps_for, process)
    xT = torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1)
    second = errors(process, functools.partial(dpm_solver_sample, process), xT)
    first = errors(process, process.ddim_sample, xT)
    print(f"\n{prediction}: DPM-Solver++ {second}, DDIM {first}")
    for i in (0, 1):
        assert second[i] / second[i + 1] == pytest.approx(4, rel=0.08)
        assert first[i] / first[i + 1] == pytest.approx(2, rel=0.02)
    assert second[0] < first[0] / 30


def network(xt: torch.Tensor, t: int) -> torch.Tensor:
    """An output that depends on both in no simple way, larger than 1 in places."""
    return 1.3 * torch.sin(3 * xt + t / 150) + 0.2 * xt.flip(-1)


def in_sigma_space(process, predict, xT, steps, clip):
    """k-diffusion's sample_dpmpp_2m (K. Crowson): x = xt / alpha, sigma the noise-to-signal
    ratio, and a step without the previous estimate where the next sigma is 0."""
    times = timesteps_for(process, steps)
    alpha, sigma = (x.double() for x in process.alpha_sigma(torch.tensor(times)))
    sigmas = [*(sigma / alpha).flatten().tolist(), 0.0]
    x, old, found = xT.double() / alpha[0], None, []
    for i, t in enumerate(times):
        xt = (x * alpha[i]).float()
        denoised, _ = process.denoise(predict, xt, t, clip)
        if sigmas[i + 1] == 0:
            x = denoised.double()
        else:
            now, then = -math.log(sigmas[i]), -math.log(sigmas[i + 1])
            d = denoised.double()
            if old is not None:
                r = (now + math.log(sigmas[i - 1])) / (then - now)
                d = (1 + 1 / (2 * r)) * d - old / (2 * r)
            x = sigmas[i + 1] / sigmas[i] * x - math.expm1(now - then) * d
        old = denoised.double()
        found.append(x * (alpha[i + 1] if i + 1 < steps else 1))
    return found


@PREDICTIONS
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("cls", [GaussianDiffusion, RectifiedFlow])
def test_dpm_solver_equals_the_formulation_in_sigma(cls, prediction, clip):
    torch.manual_seed(0)
    process, xT = cls(prediction=prediction), torch.randn(3, 1, 4, 4)
    found = list(dpm_solver_sample(process, network, xT, clip=clip, steps=7))
    assert [t for t, _, _ in found] == timesteps_for(process, 7)
    expected = in_sigma_space(process, network, xT, 7, clip)
    for (_, xt, x0_hat), other in zip(found, expected, strict=True):
        assert torch.allclose(xt.double(), other, rtol=2e-4, atol=2e-4)
        assert not clip or x0_hat.abs().max() <= 1
    assert torch.equal(found[-1][1], found[-1][2])              # the last step: to x0_hat
    assert clip == (found[-1][1].abs().max() <= 1)


@PREDICTIONS
def test_the_first_step_and_a_single_step_are_ddims(prediction):
    torch.manual_seed(0)
    process, xT = GaussianDiffusion(prediction=prediction), torch.randn(3, 1, 4, 4)
    one, = dpm_solver_sample(process, network, xT, steps=1)
    ddim, = process.ddim_sample(network, xT, steps=1)
    assert one[0] == ddim[0] == 999 and torch.equal(one[1], ddim[1])
    process.ddim_timesteps = functools.partial(timesteps_for, process)
    pairs = list(zip(dpm_solver_sample(process, network, xT, steps=5),
                     process.ddim_sample(network, xT, steps=5), strict=True))
    assert torch.allclose(pairs[0][0][1], pairs[0][1][1], atol=1e-5)
    assert not torch.allclose(pairs[1][0][1], pairs[1][1][1], atol=1e-2)


def test_timesteps_are_evenly_spaced_and_lead_to_the_clean_image():
    process = GaussianDiffusion()
    assert timesteps_for(process, 4) == [999, 749, 499, 249]
    assert timesteps_for(process, 1000) == list(range(999, -1, -1))
    for steps in (3, 7, 300, 999):
        times = timesteps_for(process, steps)
        gaps = {a - b for a, b in zip(times, [*times[1:], -1], strict=True)}
        assert len(times) == steps and max(gaps) - min(gaps) <= 1 and min(gaps) >= 1
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="from 1 to 1000 are possible"):
            next(dpm_solver_sample(process, network, torch.zeros(1, 1, 2, 2), steps=steps))


def test_the_registry_is_described():
    assert components.SAMPLERS == SAMPLERS and components.GUIDANCE == GUIDANCE
    text = (ROOT / "docs" / "sampling.md").read_text()
    for name in SAMPLERS:
        assert f"--sampler {name}" in text and callable(components._find(SAMPLERS, "", name))
    for name in GUIDANCE:
        assert components.find_guidance(name).__name__.replace("_", "-") in text


def test_every_process_that_can_has_the_sampler(lively, monkeypatch):
    assert components.sampler_names(GaussianDiffusion()) == ["ddim", "ddpm", "dpm++"]
    assert components.sampler_names(RectifiedFlow()) == ["euler", "heun", "dpm++"]
    assert components.sampler_names(Namespace(samplers={"mine": None})) == ["mine"]
    with pytest.raises(UserError, match="sampler 'os:system' is unknown: dpm"):
        components.find_sampler(GaussianDiffusion(), "os:system")
    assert "--eta does not apply to --sampler dpm++" in refused(
        sample.main, lively, "--sampler", "dpm++", "--eta", 0)
    assert "--steps 1001: from 1 to 1000 are possible" in refused(
        sample.main, lively, "--sampler", "dpm++", "--steps", 1001)
    monkeypatch.setattr(components, "SAMPLERS", {})             # a lesson without variants/
    assert "this model has ddim, ddpm" in refused(sample.main, lively, "--sampler", "dpm++")


def test_a_checkpoint_may_suggest_it(train, here, monkeypatch):
    """Previews, validation of the file and sampling all know the name."""
    monkeypatch.setattr(train_mnist, "SAMPLING", dict(train_mnist.SAMPLING, sampler="dpm++"))
    assert train("--steps", 2, "--out", "run", "--preview-every", 2) == 0
    path = Path("run/step_0000002.pt")
    assert load(path)["config"]["sampling"]["sampler"] == "dpm++"
    assert list(Path("run/samples").glob("*.png"))
    default = arrays(path, "--labels", 3, "--steps", 4)
    assert np.array_equal(default, arrays(path, "--labels", 3, "--steps", 4, "--sampler", "dpm++"))
    assert not np.array_equal(default, arrays(path, "--labels", 3, "--steps", 4, "--sampler",
                                              "ddim"))


# ---------------------------------------------------------------- guidance


class Spy:
    """A model that remembers how many rows each forward had, and for which classes."""

    null_class = 5

    def __init__(self, gain: float = 1.0):
        self.gain, self.rows = gain, []

    def __call__(self, xt, t, y):
        self.rows.append(len(xt))
        shift = (y + 1).view(-1, 1, 1, 1) / 7 + t.view(-1, 1, 1, 1) / 1000
        return torch.sin(self.gain * xt + shift)


Y = torch.tensor([0, 3, 4])
XT = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
PROCESS = GaussianDiffusion()


def level(t: int) -> float:
    alpha, sigma = PROCESS.alpha_sigma(t)
    return (sigma / alpha).item()


def test_guidance_everywhere_is_plain_guidance_and_nowhere_is_none():
    model = Spy()
    limited = functools.partial(guidance_interval, model, Y, 3.0, PROCESS)
    for t in (0, 300, 999):
        guided = classifier_free_guidance(model, Y, 3.0)(XT, t)
        plain = classifier_free_guidance(model, Y, 1)(XT, t)
        assert not torch.allclose(guided, plain, atol=1e-2)
        for interval, expected, rows in [((0, math.inf), guided, 6), ((5, 5), plain, 3),
                                         ((200, 300), plain, 3), ((0, level(t)), guided, 6),
                                         ((level(t), math.inf), plain, 3)]:
            model.rows.clear()
            assert torch.equal(limited(*interval)(XT, t), expected), (t, interval)
            assert model.rows == [rows]                 # no forward that is not needed


def test_autoguidance_extrapolates_from_the_weaker_models_output():
    strong, weak = Spy(), Spy(gain=0.5)
    own, other = (classifier_free_guidance(m, Y, 1)(XT, 500) for m in (strong, weak))
    for scale, expected in [(0, other), (2, 2 * own - other), (1.5, 1.5 * own - 0.5 * other)]:
        found = autoguidance(strong, Y, scale, weak)(XT, 500)
        assert torch.allclose(found, expected, atol=1e-6)
    strong.rows.clear()
    weak.rows.clear()
    assert torch.equal(autoguidance(strong, Y, 1, weak)(XT, 500), own)
    assert strong.rows == [3] and not weak.rows         # scale 1: the plain model alone
    for scale in (0, 2, 7.5):                           # by itself: nothing to exaggerate
        assert torch.allclose(autoguidance(strong, Y, scale, strong)(XT, 500), own, atol=1e-5)


def test_both_together():
    strong, weak = Spy(), Spy(gain=0.5)
    guide = functools.partial(autoguidance, weak=weak)
    predict = guidance_interval(strong, Y, 2.0, PROCESS, 0.5, 10, guide)
    inside, outside = next(t for t in range(999) if level(t) > 0.6), 999
    assert torch.equal(predict(XT, inside), autoguidance(strong, Y, 2.0, weak)(XT, inside))
    weak.rows.clear()
    assert torch.equal(predict(XT, outside), classifier_free_guidance(strong, Y, 1)(XT, outside))
    assert not weak.rows


# ---------------------------------------------------------------- guidance, through the commands


def test_the_flags_of_guidance(lively, capsys):
    """Per image, so that all batches have the same shape and results are equal bit for bit."""
    base = (lively, "--labels", 3, 7, "--steps", 6)
    plain, guided = arrays(*base, "--cfg-scale", 1), arrays(*base, "--cfg-scale", 4)
    assert np.abs(plain.astype(int) - guided).max() > 20
    everywhere = arrays(*base, "--cfg-scale", 4, "--guidance-interval", 0, 1e6)
    assert np.array_equal(everywhere, guided)
    assert "guidance 4 for sigma / alpha in (0, 1e+06]," in capsys.readouterr().out
    assert np.array_equal(arrays(*base, "--cfg-scale", 4, "--guidance-interval", 156, 157), plain)
    some = arrays(*base, "--cfg-scale", 4, "--guidance-interval", 0.3, 3)
    assert len({a.tobytes() for a in (plain, guided, some)}) == 3

    early = lively.with_name("step_0000010.pt")
    by_early = arrays(*base, "--cfg-scale", 4, "--autoguidance", early)
    assert "autoguidance 4," in capsys.readouterr().out
    assert len({a.tobytes() for a in (plain, guided, by_early)}) == 3
    assert np.array_equal(arrays(*base, "--cfg-scale", 1, "--autoguidance", early), plain)
    itself = arrays(*base, "--cfg-scale", 4, "--autoguidance", lively)
    assert np.abs(itself.astype(int) - plain).max() <= 1
    folder = arrays(*base, "--cfg-scale", 4, "--autoguidance", "run")   # its last checkpoint
    assert np.array_equal(folder, itself)
    assert sample.main([str(lively), "--labels", "3", "--steps", "2", "--cfg-scale", "0", "2",
                        "--autoguidance", str(early), "--out", "two.png"]) == 0


@pytest.mark.parametrize("flags, words", [
    (["--guidance-interval", "1"], ["expected 2 arguments"]),
    (["--guidance-interval", "2", "1"], ["--guidance-interval 2 1", "the smaller"]),
    (["--guidance-interval", "1", "1"], ["the smaller"]),
    (["--guidance-interval", "-1", "1"], ["--guidance-interval", "at least 0"]),
    (["--guidance-interval", "0", "all"], ["all is not a finite number"]),
    (["--guidance-interval", "1", "inf"], ["inf is not a finite number"]),
    (["--guidance-interval", "158", "300"], ["158 300 holds no timestep", "at most 157"]),
    (["--autoguidance", ""], ["--autoguidance ''"]),
    (["--autoguidance", "none.pt"], ["--autoguidance 'none.pt'", "does not exist"]),
    (["--autoguidance", "empty"], ["empty holds no checkpoint"]),
])
def test_mistakes_in_the_flags_of_guidance(checkpoint, flags, words):
    Path("empty").mkdir()
    for call in (sample.main, evaluate_parser_and_source):
        message = refused(call, checkpoint, *flags)
        assert all(word in message for word in words), message
    assert not Path("output").exists()


def evaluate_parser_and_source(words: list[str]):
    """What tools.evaluate does with the flags of a checkpoint, before it samples."""
    args = evaluate.parser().parse_args([*words, "--images", "10"])
    path = Path(args.images_from)
    return evaluate.from_checkpoint(args, path, checkpoints.load(path), torch.device("cpu"))


@pytest.mark.parametrize("flags, words", [
    (["--image-size", "14"], ["differs in image size: 14", "28"]),
    (["--prediction", "v"], ["differs in prediction: v", "x0"]),
    (["--process", "rectified-flow"], ["differs in process: rectified-flow", "ddpm"]),
    (["classes"], ["differs in class names: ['a'", "['0'"]),
])
def test_a_weaker_model_that_does_not_fit(checkpoint, trained, flags, words):
    if flags == ["classes"]:
        state = load(checkpoint)
        checkpoints.save(Path("other.pt"), {**state, "class_names": list("abcdefghij")})
        other = Path("other.pt")
    else:
        other = trained("--steps", 1, *flags, out="other")
    message = refused(sample.main, checkpoint, "--autoguidance", other)
    assert all(word in message for word in ["--autoguidance other", *words]), message


def test_a_smaller_network_is_a_weaker_model(checkpoint, trained):
    other = trained("--steps", 1, "--network", "registers", "--weighting", "plain", out="other")
    assert sample.main([str(checkpoint), "--labels", "3", "--steps", "2", "--out", "a.png",
                        "--autoguidance", str(other)]) == 0


def test_an_interval_needs_the_coefficients_of_the_process(checkpoint):
    loaded = sample.load(checkpoint)
    loaded.diffusion = Namespace(samplers=loaded.diffusion.samplers, num_timesteps=1000)
    from support.sampling import parser, settings_from
    args = parser("").parse_args(["--guidance-interval", "0", "1"])
    with pytest.raises(UserError, match="--guidance-interval does not apply to this process"):
        settings_from(args, loaded)


def test_evaluations_record_how_was_sampled(lively, capsys):
    early = str(lively.with_name("step_0000010.pt"))
    args = evaluate.parser().parse_args([
        str(lively), "--images", "10", "--steps", "3", "--sampler", "dpm++", "--cfg-scale", "2",
        "--guidance-interval", "0.2", "2", "--autoguidance", early])
    title, about, make = evaluate.from_checkpoint(args, lively, load(lively), torch.device("cpu"))
    (images,), _ = make()
    assert "dpm++, 3 steps, autoguidance 2 for sigma / alpha in (0.2, 2], seed 0" in title
    assert (about["guidance_interval"], about["autoguidance"]) == ([0.2, 2.0], early)
    expected = arrays(lively, "--labels", *range(10), "--steps", 3, "--sampler", "dpm++",
                      "--cfg-scale", 2, "--guidance-interval", 0.2, 2, "--autoguidance", early)
    assert np.array_equal(images.permute(0, 2, 3, 1), expected)
    capsys.readouterr()
    for flags in (("--guidance-interval", 0, 1), ("--autoguidance", early)):
        Path("x.npz").touch()
        assert "is for a checkpoint" in refused(evaluate.main, "x.npz", *flags)


def test_a_sweep_does_not_mix_them():
    """Evaluations that differ in the new settings are not points of one line."""
    row = dict(images=10, std=None, mean={m: 0.5 for m in figures.METRICS})
    result = dict(rows=dict(samples=row, test=row), sampler="dpm++", eta=0.0, images_from="a.pt",
                  weights="ema", steps=5, cfg_scale=2.0, data_digest="d", seeds=[0])
    names = [figures.point_of(result | more)["sampler"] for more in (
        {}, dict(guidance_interval=None, autoguidance=None), dict(guidance_interval=[0.2, 2.0]),
        dict(autoguidance="b.pt"))]
    assert names == ["dpm++", "dpm++", "dpm++, guided in (0.2, 2]", "dpm++, autoguidance by b.pt"]
