"""diffusion.py against closed forms, brute force, and one route against another.

Tolerances: float32 rounds to 6e-8 (relative); x0_hat divides by alpha (0.006 at t = 999), eps_hat
by sigma (0.01 at t = 0).
"""

import inspect

import numpy as np
import pytest
import torch

from diffusion import WEIGHTINGS, GaussianDiffusion, classifier_free_guidance
from dit import DiT

BETA = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.array([np.prod(1 - BETA[: t + 1]) for t in range(1000)])     # float64
A, S = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)                           # alpha and sigma
KINDS = pytest.mark.parametrize("kind", ["eps", "v", "x0"])
SAMPLERS = pytest.mark.parametrize("sampler", ["ddpm_sample", "ddim_sample"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Spy:
    """A model made of a function f(xt, t, y), with 10 classes, that remembers its calls."""

    null_class = 10

    def __init__(self, f):
        self.f, self.calls = f, []

    def __call__(self, xt, t, y):
        self.calls.append((xt.clone(), t.tolist(), y.tolist()))
        return self.f(xt, t.view(-1, 1, 1, 1).float(), y.view(-1, 1, 1, 1).float())


def waves(xt, t, y):
    """Some smooth bounded function of all that a model sees."""
    return torch.sin(2 * xt + 0.01 * t + y) + 0.3 * torch.cos(xt.roll(1, -1) - y)


def guided(model, y, cfg_scale=1.0):
    """predict(xt, t): by default the plain conditional model."""
    return classifier_free_guidance(model, y, cfg_scale)


def fixed_noise(shape):
    """noise(t), the same for the same t, whoever asks and however often."""
    return lambda t: torch.randn(shape, generator=torch.Generator().manual_seed(t))


def batch(B=12):
    """x0, eps, t from 0 to 999, y; and alpha, sigma, xt in float64."""
    x0, eps = torch.rand(B, 3, 4, 4) * 2 - 1, torch.randn(B, 3, 4, 4)
    t, y = torch.linspace(0, 999, B).long(), torch.arange(B) % 10
    a, s = (torch.tensor(table)[t].view(-1, 1, 1, 1) for table in (A, S))
    return x0, eps, t, y, a, s, a * x0 + s * eps


# ---------------------------------------------------------------- the tables


def test_the_tables_are_computed_in_float64_and_used_in_float32():
    process = GaussianDiffusion()
    assert process.alpha_bar.dtype == torch.float64
    assert np.allclose(process.alpha_bar.numpy(), ALPHA_BAR, rtol=1e-12, atol=0)
    assert ALPHA_BAR[999] == pytest.approx(4.036e-5, rel=1e-3)
    other = GaussianDiffusion(num_timesteps=2, beta_start=0.5, beta_end=0.75).alpha_bar
    assert other.tolist() == [0.5, 0.125]
    tables = process.alpha_sigma(torch.arange(1000))
    # 1 - alpha_bar_0 in float32 would be off by 1 in 4000; this is right to the last bit or two
    for ours, exact, one in zip(tables, (A, S), process.alpha_sigma(500), strict=True):
        assert ours.shape == (1000, 1, 1, 1) and ours.dtype == torch.float32
        assert np.allclose(ours.flatten().numpy(), exact, rtol=1.2e-7, atol=0)
        assert torch.equal(one, ours[500:501])
    assert process.to("meta") is process                        # a device that every machine has
    assert [table.device.type for table in process.alpha_sigma(5)] == ["meta", "meta"]
    assert process.alpha_bar.device.type == "cpu"


def test_what_is_not_possible_is_named():
    for wrong, text in [(dict(prediction="noise"), "'noise' is none of eps, v, x0"),
                        (dict(weighting="noise"), "'noise' is none of plain, v, min-snr"),
                        *((dict(beta_start=a, beta_end=b), "must not fall or leave")
                          for a, b in [(0, 0.5), (0.5, 1), (-0.1, 0.2), (0.3, 0.2)])]:
        with pytest.raises(ValueError, match=text):
            GaussianDiffusion(**wrong)
    parameters = inspect.signature(GaussianDiffusion).parameters.values()
    assert [p.default for p in parameters] == [1000, 1e-4, 0.02, "x0", "plain"]


# ---------------------------------------------------------------- forward, and what is learned


def test_q_sample_equals_the_noise_added_step_by_step():
    """The jump's mean and variance, from the chain of single steps. DDPM eq. 2 -> eq. 4."""
    process, mean, variance, chain = GaussianDiffusion(), 1.0, 0.0, []
    for beta in BETA:
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        chain.append((mean, variance**0.5))
    one, t = torch.ones(1000, 1, 1, 1), torch.arange(1000)
    for jump, exact in zip((process.q_sample(one, t, 0 * one), process.q_sample(0 * one, t, one)),
                           np.array(chain).T, strict=True):
        assert np.allclose(jump.flatten().numpy(), exact, rtol=1e-6, atol=0)


@KINDS
def test_the_target_means_x0_and_eps(kind):
    """A perfect output: the loss is zero, and the conversion gives back x0 and eps."""
    process = GaussianDiffusion(prediction=kind)
    x0, eps, t, _, a, s, xt = batch(50)
    target = {"eps": eps, "v": a * eps - s * x0, "x0": x0}[kind].float()
    assert torch.allclose(process.target(x0, eps, t), target, atol=1e-6)
    assert torch.allclose(process.q_sample(x0, t, eps), xt.float(), atol=2e-6)
    x0_hat, eps_hat = process.x0_and_eps(target, xt.float(), t)
    assert ((x0_hat - x0).abs() <= 1e-6 / a).all() and ((eps_hat - eps).abs() <= 1e-6 / s).all()
    assert process.loss(lambda *_: target, x0, t, t, eps).max() < 1e-12
    alone = process.x0_and_eps(target[30:31], xt[30:31].float(), int(t[30]))    # an int t
    assert torch.allclose(torch.cat(alone), torch.stack([x0_hat[30], eps_hat[30]]), atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@KINDS
def test_loss_is_the_weighted_squared_error(kind, weighting):
    """plain: of the target. v: of v, with sigma at least 0.05. min-snr (arXiv 2303.09556, eq. 7 and
    section 3.4): of x0_hat, times the SNR, at most 5."""
    process = GaussianDiffusion(prediction=kind, weighting=weighting)
    x0, eps, t, y, a, s, xt = batch()
    model = Spy(waves)
    loss = process.loss(model, x0, t, y, eps)
    (seen, seen_t, seen_y), = model.calls
    assert torch.allclose(seen, xt.float(), atol=2e-6)
    assert (seen_t, seen_y) == (t.tolist(), y.tolist())
    out = waves(xt, t.view(-1, 1, 1, 1).double(), y.view(-1, 1, 1, 1).double())
    x0_error = {"eps": s * (eps - out) / a, "v": s * (a * eps - s * x0 - out), "x0": out - x0}[kind]
    error = {"plain": out - {"eps": eps, "v": a * eps - s * x0, "x0": x0}[kind],
             "v": x0_error / s.clamp(min=0.05), "min-snr": x0_error * (a / s).clamp(max=5**0.5)}
    expected = error[weighting].square().mean(dim=(1, 2, 3))
    assert loss.shape == (12,) and loss.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=1e-4)


def test_timesteps_of_training():
    process = GaussianDiffusion()
    t = process.t_from_uniform((torch.arange(8000) + 0.5) / 8000)
    assert torch.equal(t, torch.arange(1000).repeat_interleave(8))
    ends = torch.tensor([0.0, 1 - 2**-24])                      # all that torch.rand returns
    assert process.t_from_uniform(ends).tolist() == [0, 999]
    levels = torch.linspace(-9, 9, 500)
    distance = np.abs(np.log(S / A)[None] - levels.numpy()[:, None])
    found = distance[range(500), process.t_from_noise_level(levels)]
    assert (found <= distance.min(1) + 1e-5).all()              # the nearest, but for rounding


# ---------------------------------------------------------------- back, one step


@pytest.mark.parametrize("t", [1, 2, 50, 500, 999])
def test_posterior_is_the_product_of_two_gaussians(t):
    """q(x_{t-1} | xt, x0) ~ q(xt | x_{t-1}) q(x_{t-1} | x0), summed up on a fine grid."""
    x0, xt, x = 0.7, -0.4, np.linspace(-8, 8, 400_001)
    log_density = (-(xt - (1 - BETA[t]) ** 0.5 * x) ** 2 / (2 * BETA[t])
                   - (x - A[t - 1] * x0) ** 2 / (2 * (1 - ALPHA_BAR[t - 1])))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (density * x).sum()
    ones = torch.ones(1, 1, 1, 1)
    ours = GaussianDiffusion().q_posterior(x0 * ones, xt * ones, t)
    assert ours[0].item() == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert ours[1] == pytest.approx((density * (x - mean) ** 2).sum(), rel=1e-5)
    mean, variance = GaussianDiffusion().q_posterior(x0 * ones, xt * ones, 0)
    assert torch.equal(mean, x0 * ones) and variance == 0       # the last step ends at x0


def test_ddim_steps_follow_equation_12():
    process, eta = GaussianDiffusion(prediction="v"), 0.5
    xt, y = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    noise, timesteps = fixed_noise(xt.shape), [999, 832, 666, 500, 333, 166, 0]     # of 166.5
    steps = process.ddim_sample(guided(Spy(waves), y), xt, noise, clip=False, steps=7, eta=eta)
    for expected_t, t_next, (t, x_next, x0_hat) in zip(timesteps, timesteps[1:] + [None], steps,
                                                       strict=True):
        assert t == expected_t
        out = waves(xt, torch.tensor(float(t)), y.view(-1, 1, 1, 1).float())
        assert torch.allclose(x0_hat, A[t] * xt - S[t] * out, atol=1e-5)
        eps_hat, then = S[t] * xt + A[t] * out, 1.0 if t_next is None else ALPHA_BAR[t_next]
        sigma = eta * np.sqrt((1 - then) / (1 - ALPHA_BAR[t])) * np.sqrt(1 - ALPHA_BAR[t] / then)
        expected = then**0.5 * x0_hat + (1 - then - sigma**2) ** 0.5 * eps_hat + sigma * noise(t)
        assert torch.allclose(x_next, expected, atol=1e-5)
        xt = x_next
    assert torch.equal(x_next, x0_hat)                          # the last step ends at x0_hat


# ---------------------------------------------------------------- back, all of it


@pytest.mark.parametrize("kind, clip", [("eps", True), ("v", False), ("x0", False)])
def test_ddim_at_eta_1_over_all_steps_is_ddpm(kind, clip):
    process, xT, y = GaussianDiffusion(prediction=kind), torch.randn(2, 1, 4, 4), torch.arange(2)
    how, predict = dict(noise=fixed_noise(xT.shape), clip=clip), guided(Spy(waves), y, 1.5)
    ddpm = list(process.ddpm_sample(predict, xT, **how))
    ddim = list(process.ddim_sample(predict, xT, steps=1000, eta=1.0, **how))
    for (t, *one), (same_t, *other) in zip(ddpm, ddim, strict=True):
        assert t == same_t and torch.allclose(torch.stack(one), torch.stack(other), atol=1e-3)


@pytest.mark.parametrize("sampler, how", [
    ("ddpm_sample", {}), ("ddim_sample", dict(steps=20)), ("ddim_sample", dict(steps=20, eta=1))])
def test_what_a_step_yields_is_the_next_input_and_the_last_adds_no_noise(sampler, how):
    process, model, asked = GaussianDiffusion(), Spy(waves), []
    xT, y = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])

    def noise(t):
        asked.append(t)
        return torch.zeros_like(xT)

    steps = list(getattr(process, sampler)(guided(model, y), xT, noise=noise, **how))
    timesteps = process.ddim_timesteps(how.get("steps", 1000))
    assert [t for _, t, _ in model.calls] == [[t] * 3 for t in timesteps]
    assert [t for t, _, _ in steps] == timesteps
    assert asked == ([] if how == dict(steps=20) else timesteps[:-1])
    assert torch.equal(model.calls[0][0], xT)
    for (_, x_next, _), (xt, _, seen_y) in zip(steps[:-1], model.calls[1:], strict=True):
        assert torch.equal(x_next, xt) and seen_y == [1, 2, 3]
    assert torch.equal(steps[-1][1], steps[-1][2])              # the sample is the last x0_hat


def test_ddim_timesteps_are_evenly_spaced_and_include_both_ends():
    process = GaussianDiffusion()
    assert process.ddim_timesteps(1) == [999]
    for steps in range(2, 1001):
        timesteps = process.ddim_timesteps(steps)
        gaps = -np.diff(timesteps)
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] == 0
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    for wrong in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"{wrong} sampling steps: from 1 to 1000"):
            process.ddim_timesteps(wrong)


@SAMPLERS
def test_noise_is_standard_normal_by_default_and_no_gradient_is_recorded(sampler):
    process = GaussianDiffusion(num_timesteps=3)
    predict = guided(DiT(8, 4, hidden_size=16, depth=1), torch.arange(2))
    xT, how = torch.randn(2, 1, 8, 8), dict(steps=3, eta=1.0) if sampler == "ddim_sample" else {}
    runs = []
    for given in (how, how | dict(noise=lambda t: torch.randn(2, 1, 8, 8))):
        torch.manual_seed(1)
        for _, x_next, x0_hat in getattr(process, sampler)(predict, xT, **given):
            assert torch.is_grad_enabled() and not x_next.requires_grad | x0_hat.requires_grad
            runs.append(x_next)
    assert torch.equal(torch.stack(runs[:3]), torch.stack(runs[3:]))


# ---------------------------------------------------------------- guidance, clipping


@pytest.mark.parametrize("scale, labels", [(1.0, [3, 7]), (0.0, [4, 4]), (2.5, [3, 7, 4, 4])])
def test_guidance_costs_one_forward(scale, labels):
    """Scale 1: of B conditional; 0: of B unconditional; any other: of both halves."""
    model, xt, y = Spy(waves), torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    model.null_class = 4
    out = classifier_free_guidance(model, y, scale)(xt, 5)
    (_, seen_t, seen_y), = model.calls
    assert seen_y == labels and seen_t == [5] * len(labels)
    cond, uncond = (waves(xt, torch.tensor(5.0), label.view(-1, 1, 1, 1).float())
                    for label in (y, torch.tensor([4, 4])))
    assert torch.allclose(out, uncond + scale * (cond - uncond), atol=1e-5)


@KINDS
def test_guiding_the_output_guides_eps(kind):
    """Whatever the output means: eps_uncond + cfg_scale (eps_cond - eps_uncond). Then x0_hat is
    clipped, and eps_hat leads from the clipped one to xt."""
    process, t = GaussianDiffusion(prediction=kind), 600
    xt, y = 2 * torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    (_, eps_cond), (_, eps_uncond) = (
        process.denoise(guided(Spy(waves), labels), xt, t, clip=False)
        for labels in (y, torch.full_like(y, 10)))
    free, eps_hat = process.denoise(guided(Spy(waves), y, 3.0), xt, t, clip=False)
    assert torch.allclose(eps_hat, eps_uncond + 3 * (eps_cond - eps_uncond), atol=1e-5)
    assert torch.allclose(free.double(), (xt - S[t] * eps_hat.double()) / A[t], atol=1e-4)
    x0_hat, eps_hat = process.denoise(guided(Spy(waves), y, 3.0), xt, t)
    assert (free.abs() > 1).any() and torch.equal(x0_hat, free.clamp(-1, 1))
    assert torch.allclose((A[t] * x0_hat + S[t] * eps_hat).float(), xt, atol=1e-5)


@SAMPLERS
def test_samplers_guide_and_clip(sampler):
    """The scale reaches the model, clipping is the default, and can be turned off."""
    process, xT = GaussianDiffusion(num_timesteps=50), torch.randn(2, 1, 4, 4)
    model = Spy(lambda xt, t, y: y.expand_as(xt) / 5)           # class 0: 0, 5: 1, "no class": 2

    def last(scale, **how):
        predict = guided(model, torch.tensor([0, 5]), scale)
        return list(getattr(process, sampler)(predict, xT, **how))[-1][1][:, 0, 0, 0].tolist()

    assert last(1.0) == [0.0, 1.0] and last(0.0) == [1.0, 1.0]              # 2, clipped
    assert last(2.0, clip=False) == [-2.0, 0.0] and last(2.0) == [-1.0, 0.0]
