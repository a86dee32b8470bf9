"""diffusion.py by equivalence: closed forms, brute force, and one route against another."""

import inspect
import runpy
from fractions import Fraction

import numpy as np
import pytest
import torch

from conftest import ROOT
from diffusion import PREDICTIONS, WEIGHTINGS, GaussianDiffusion, classifier_free_guidance
from dit import DiT

BETA = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.array([np.prod(1 - BETA[: t + 1]) for t in range(1000)])     # float64
A, S = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)                          # alpha and sigma
KINDS = pytest.mark.parametrize("kind", ["eps", "v", "x0"])
SAMPLERS = pytest.mark.parametrize("sampler", ["ddpm_sample", "ddim_sample"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Spy:
    """A model made of a function f(xt, t, y), with 10 classes, that remembers its calls."""

    null_class = 10

    def __init__(self, f=lambda xt, t, y: torch.zeros_like(xt)):
        self.f, self.calls = f, []

    def __call__(self, xt, t, y):
        self.calls.append((xt.clone(), t.tolist(), y.tolist()))
        return self.f(xt, t.view(-1, 1, 1, 1).float(), y.view(-1, 1, 1, 1).float())


def coefficients(t):
    """alpha and sigma of timesteps t (B,) in float64, each (B, 1, 1, 1)."""
    return (torch.tensor(table)[t].view(-1, 1, 1, 1) for table in (A, S))


def guided(model, y, cfg_scale=1.0):
    """predict(xt, t): by default the plain conditional model."""
    return classifier_free_guidance(model, y, cfg_scale)


def waves(xt, t, y):
    """Some smooth bounded function of all that a model sees."""
    return torch.sin(2 * xt + 0.01 * t + y) + 0.3 * torch.cos(xt.roll(1, -1) - y)


def fixed_noise(shape, seed=0):
    """noise(t), the same for the same t, whoever asks and however often."""
    return lambda t: torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + t))


def no_noise(t):
    raise AssertionError(f"noise was asked for at t = {t}")


def batch(B=4, C=3, H=4, seed=0):
    """x0, eps, t from 0 to 999, y."""
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.rand(B, C, H, H, generator=rng) * 2 - 1
    eps = torch.randn(B, C, H, H, generator=rng)
    return x0, eps, torch.linspace(0, 999, B).long(), torch.arange(B) % 10


# ---------------------------------------------------------------- the tables


def test_alpha_bar_is_the_product():
    """In exact fractions. Its ends are 0.9999 and 4.04e-5, whose root is 0.006."""
    first, last = Fraction("0.0001"), Fraction("0.02")
    alpha_bar, exact = Fraction(1), []
    for t in range(1000):
        alpha_bar *= 1 - (first + (last - first) * t / 999)
        exact.append(float(alpha_bar))
    ours = GaussianDiffusion().alpha_bar
    assert ours.dtype == torch.float64
    assert np.allclose(ours.numpy(), exact, rtol=1e-12, atol=0)
    assert ours[0].item() == pytest.approx(0.9999, abs=1e-15)
    assert ours[999].item() == pytest.approx(4.0358e-5, rel=1e-4)
    other = GaussianDiffusion(num_timesteps=2, beta_start=0.5, beta_end=0.75).alpha_bar
    assert other.tolist() == [0.5, 0.125]


def test_defaults_are_ddpms():
    arguments = inspect.signature(GaussianDiffusion).parameters.values()
    defaults = {p.name: p.default for p in arguments}
    assert defaults.pop("prediction") in PREDICTIONS
    assert defaults == dict(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, weighting="plain")


def test_alpha_and_sigma_are_computed_in_float64_and_used_in_float32():
    process = GaussianDiffusion()
    alpha, sigma = process.alpha_sigma(torch.arange(1000))
    assert alpha.shape == sigma.shape == (1000, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    # 1 - alpha_bar_0 in float32 would be off by 1 in 4000; this is right to the last bit or two
    for ours, exact in [(alpha, A), (sigma, S)]:
        assert np.allclose(ours.flatten().numpy(), exact, rtol=1.2e-7, atol=0)
    for t in (0, 500, 999):
        for ours, all_of_them in zip(process.alpha_sigma(t), (alpha, sigma), strict=True):
            assert ours.shape == (1, 1, 1, 1) and torch.equal(ours, all_of_them[t : t + 1])


def test_alpha_and_sigma_move_to_the_device_once_in_float32():
    moved = GaussianDiffusion()
    assert moved.to("meta") is moved                        # a device that every machine has
    for ours in moved.alpha_sigma(5):
        assert ours.device.type == "meta" and ours.dtype == torch.float32
    assert moved.alpha_bar.device.type == "cpu"             # the float64 one stays


def test_unknown_prediction_or_weighting_is_named():
    with pytest.raises(ValueError, match="'noise' is none of eps, v, x0"):
        GaussianDiffusion(prediction="noise")
    with pytest.raises(ValueError, match="'noise' is none of plain, v, min-snr"):
        GaussianDiffusion(weighting="noise")


@pytest.mark.parametrize("start, end", [(0, 0.5), (0.5, 1), (-0.1, 0.2), (0.3, 0.2)])
def test_a_beta_that_is_no_share_is_refused(start, end):
    with pytest.raises(ValueError, match="must not fall or leave"):
        GaussianDiffusion(beta_start=start, beta_end=end)


# ---------------------------------------------------------------- forward


def test_q_sample_follows_its_formula_image_by_image():
    x0, eps, t, _ = batch()
    xt = GaussianDiffusion().q_sample(x0, t, eps)
    for i, step in enumerate(t.tolist()):
        assert torch.allclose(xt[i], A[step] * x0[i] + S[step] * eps[i], atol=1e-6)


def test_q_sample_keeps_unit_variance():
    process, rng = GaussianDiffusion(), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 1, 200, 200, generator=rng)
    t = torch.tensor([0, 10, 100, 500, 999])
    variance = process.q_sample(x0, t, eps).var(dim=(1, 2, 3))
    assert torch.allclose(variance, torch.ones(5), atol=0.03)
    fixed = process.q_sample(torch.full_like(x0, 0.5), t, eps)          # q(xt | x0)
    assert np.allclose(fixed.mean(dim=(1, 2, 3)), 0.5 * A[t], atol=0.02)
    assert np.allclose(fixed.var(dim=(1, 2, 3)), 1 - ALPHA_BAR[t], rtol=0.03)


def test_q_sample_equals_the_noise_added_step_by_step():
    """The jump's mean and variance, from the chain of single steps. DDPM eq. 2 -> eq. 4."""
    process, mean, variance = GaussianDiffusion(), 1.0, 0.0
    ones = torch.ones(1, 1, 1, 1)
    for step in range(1000):
        mean, variance = mean * (1 - BETA[step]) ** 0.5, variance * (1 - BETA[step]) + BETA[step]
        t = torch.tensor([step])
        assert process.q_sample(ones, t, 0 * ones).item() == pytest.approx(mean, rel=1e-6)
        jump = process.q_sample(0 * ones, t, ones).item() ** 2
        assert jump == pytest.approx(variance, rel=1e-6)


@KINDS
def test_x0_and_eps_invert_q_sample(kind):
    process = GaussianDiffusion(prediction=kind)
    x0, eps, t, _ = batch(B=50)
    xt = process.q_sample(x0, t, eps)
    x0_hat, eps_hat = process.x0_and_eps(process.target(x0, eps, t), xt, t)
    assert torch.allclose(x0_hat, x0, atol=2e-4)            # float32's 6e-8, divided by 0.006
    assert torch.allclose(x0_hat[:25], x0[:25], atol=2e-6)
    assert torch.allclose(eps_hat[1:], eps[1:], atol=5e-6)  # at t = 0, divided by 0.01
    for i in (0, 20, 49):                                   # an int t is that t for all
        alone = process.x0_and_eps(process.target(x0, eps, t)[i : i + 1], xt[i : i + 1], int(t[i]))
        assert torch.equal(alone[0][0], x0_hat[i]) and torch.equal(alone[1][0], eps_hat[i])


# ---------------------------------------------------------------- what the output means


@KINDS
def test_loss_is_the_squared_error_of_the_target(kind):
    process = GaussianDiffusion(prediction=kind)
    x0, eps, t, y = batch()
    a, s = coefficients(t)
    target = {"eps": eps, "v": a * eps - s * x0, "x0": x0}[kind].double()
    model = Spy(waves)
    loss = process.loss(model, x0, t, y, eps)
    (xt, seen_t, seen_y), = model.calls
    assert torch.allclose(xt.double(), a * x0 + s * eps, atol=1e-6)
    assert (seen_t, seen_y) == (t.tolist(), y.tolist())
    error = waves(xt, t.view(-1, 1, 1, 1).float(), y.view(-1, 1, 1, 1).float()) - target
    assert loss.shape == (4,) and loss.dtype == torch.float32
    assert torch.allclose(loss.double(), error.square().mean(dim=(1, 2, 3)), rtol=1e-5)


@KINDS
def test_the_target_means_x0_and_eps(kind):
    """A perfect output: the loss is zero, and the conversion gives back x0 and eps."""
    x0, eps, t, _ = batch(B=20)
    t = t.clamp(5, 990)                 # x0 from eps, or eps from x0, is a division near the ends
    a, s = coefficients(t)
    process = GaussianDiffusion(prediction=kind)
    target = {"eps": eps, "v": a * eps - s * x0, "x0": x0}[kind].float()
    assert torch.allclose(process.target(x0, eps, t), target, atol=1e-6)
    x0_hat, eps_hat = process.x0_and_eps(target, (a * x0 + s * eps).float(), t)
    assert torch.allclose(x0_hat, x0, atol=2e-4) and torch.allclose(eps_hat, eps, atol=2e-4)
    loss = process.loss(lambda *_: target, x0, t, t, eps)
    assert loss.max() < 1e-12


def outputs_for(kind, eps_model):
    """A model whose output of this kind says the same as eps_model's eps."""
    def f(xt, t, y):
        eps_hat = eps_model(xt.double(), t, y)
        a, s = (torch.tensor(table)[t.long()] for table in (A, S))
        x0_hat = (xt.double() - s * eps_hat) / a
        return {"eps": eps_hat, "v": a * eps_hat - s * x0_hat, "x0": x0_hat}[kind].float()
    return Spy(f)


@KINDS
def test_the_three_readings_agree_on_one_prediction(kind):
    process = GaussianDiffusion(prediction=kind)
    x0, eps, _, y = batch()
    for t in (1, 30, 300, 900, 999):
        xt = (A[t] * x0 + S[t] * eps).float()
        model = outputs_for(kind, waves)
        x0_hat, eps_hat = process.denoise(guided(model, y), xt, t, clip=False)
        expected = waves(xt.double(), torch.tensor(t), y.view(-1, 1, 1, 1).double())
        assert torch.allclose(eps_hat.double(), expected, atol=2e-4)
        expected = (xt.double() - S[t] * expected) / A[t]
        assert torch.allclose(x0_hat.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("clip", [True, False])
@SAMPLERS
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_the_three_readings_sample_alike(kind, sampler, clip):
    """One and the same prediction in two units, through a whole run. Within [-1, 1], so that
    rounding alone can differ: eps is then what leads from a smooth x0 to xt."""
    def eps_model(xt, t, y):
        a, s = (torch.tensor(table)[t.long()] for table in (A, S))
        return (xt - a * torch.tanh(xt + 0.2 * y - 1) * (1.2 if clip else 0.9)) / s

    xT, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 5, 9])
    runs = []
    for each in ("eps", kind):
        process = GaussianDiffusion(prediction=each)
        sample = getattr(process, sampler)
        steps = list(sample(guided(outputs_for(each, eps_model), y), xT,
                            noise=fixed_noise(xT.shape), clip=clip))
        runs.append(torch.stack([xt for _, xt, _ in steps[::10] + steps[-1:]]))
    assert runs[0].std() > 0.3
    assert torch.allclose(*runs, atol=1e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@KINDS
def test_the_weight_of_an_error(kind, weighting):
    """plain: none. v: the error that the output makes in v. min-snr (arXiv 2303.09556, eq. 7 and
    section 3.4): the error in x0_hat times min(SNR, 5)."""
    x0, eps, t, y = batch(B=12)
    t, (a, s) = t.clamp(20, 990), coefficients(t.clamp(20, 990))    # for v: where sigma > 0.05
    process = GaussianDiffusion(prediction=kind, weighting=weighting)
    loss = process.loss(Spy(waves), x0, t, y, eps)
    xt = a * x0 + s * eps
    out = waves(xt, t.view(-1, 1, 1, 1).double(), y.view(-1, 1, 1, 1).double())
    x0_hat, eps_hat = {"eps": ((xt - s * out) / a, out), "x0": (out, (xt - a * out) / s),
                       "v": (a * xt - s * out, s * xt + a * out)}[kind]
    error = {
        "plain": {"eps": eps_hat - eps, "x0": x0_hat - x0, "v": out - (a * eps - s * x0)}[kind],
        "v": (a * eps_hat - s * x0_hat) - (a * eps - s * x0),
        "min-snr": (x0_hat - x0) * (a / s).clamp(max=5**0.5)}[weighting]
    assert torch.allclose(loss.double(), error.square().mean(dim=(1, 2, 3)), rtol=1e-4)
    every = process.loss_weight(torch.arange(1000))
    assert every.shape == (1000,) and every.isfinite().all() and (every > 0).all()


def test_t_from_uniform_reaches_every_timestep_alike():
    t = GaussianDiffusion().t_from_uniform((torch.arange(8000) + 0.5) / 8000)
    assert torch.equal(t, torch.arange(1000).repeat_interleave(8))
    for T in (7, 1000):
        ends = torch.tensor([0.0, 1 - 2**-24])              # all that torch.rand returns
        assert GaussianDiffusion(num_timesteps=T).t_from_uniform(ends).tolist() == [0, T - 1]


def test_t_from_noise_level_is_the_nearest_timestep():
    levels = torch.linspace(-9, 9, 500)
    nearest = np.abs(np.log(S / A)[None] - levels.numpy()[:, None]).argmin(1)
    assert GaussianDiffusion().t_from_noise_level(levels).tolist() == nearest.tolist()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@KINDS
def test_loss_in_eps_is_the_error_of_eps_hat(kind, weighting):
    process = GaussianDiffusion(prediction=kind, weighting=weighting)
    x0, eps, t, y = batch(B=12)
    t = t.clamp(1, 998)
    model = Spy(waves)
    loss = process.loss(model, x0, t, y, eps)
    a, s = coefficients(t)
    xt = a * x0 + s * eps
    out = waves(xt, t.view(-1, 1, 1, 1).double(), y.view(-1, 1, 1, 1).double())
    x0_hat = {"eps": (xt - s * out) / a, "v": a * xt - s * out, "x0": out}[kind]
    error = ((xt - a * x0_hat) / s - eps).square().mean(dim=(1, 2, 3))
    assert torch.allclose(process.loss_in_eps(loss, t).double(), error, rtol=1e-3)


def test_first_loss_of_a_fresh_model_is_one():
    """It says 0, and eps has variance 1."""
    model, x0 = DiT(), torch.rand(64, 1, 28, 28) * 2 - 1
    t, y, eps = torch.randint(1000, (64,)), torch.randint(11, (64,)), torch.randn(64, 1, 28, 28)
    loss = GaussianDiffusion(prediction="eps").loss(model, x0, t, y, eps)
    assert loss.mean().item() == pytest.approx(1.0, abs=0.02)


def test_arithmetic_is_float32_whatever_the_model_returns():
    """A bf16 output is read as it is; nothing is rounded to bf16 after it."""
    rough = Spy(lambda xt, t, y: waves(xt, t, y).bfloat16())
    exact = Spy(lambda xt, t, y: waves(xt, t, y).bfloat16().float())
    process = GaussianDiffusion()
    x0, eps, t, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = process.loss(rough, x0, t, y, eps)
        estimates = [process.denoise(guided(rough, y, scale), eps, 700) for scale in (0, 1, 3)]
        xt = process.q_sample(x0, t, eps)
    assert loss.dtype == xt.dtype == torch.float32
    assert torch.equal(loss, process.loss(exact, x0, t, y, eps))
    assert torch.equal(xt, process.q_sample(x0, t, eps))
    for scale, estimate in zip((0, 1, 3), estimates, strict=True):
        for ours, expected in zip(
                estimate, process.denoise(guided(exact, y, scale), eps, 700), strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)


# ---------------------------------------------------------------- back, one step


@pytest.mark.parametrize("t", [1, 2, 50, 500, 999])
def test_posterior_is_the_product_of_two_gaussians(t):
    """q(x_{t-1} | xt, x0) ~ q(xt | x_{t-1}) q(x_{t-1} | x0), summed up on a fine grid."""
    x0, xt = 0.7, -0.4
    x = np.linspace(-8, 8, 400_001)
    log_density = (-(xt - (1 - BETA[t]) ** 0.5 * x) ** 2 / (2 * BETA[t])
                   - (x - A[t - 1] * x0) ** 2 / (2 * (1 - ALPHA_BAR[t - 1])))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    mean = (density * x).sum()
    variance = (density * (x - mean) ** 2).sum()
    ones = torch.ones(1, 1, 1, 1)
    ours = GaussianDiffusion().q_posterior(x0 * ones, xt * ones, t)
    assert ours[0].item() == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert ours[1] == pytest.approx(variance, rel=1e-5)


def test_posterior_at_0_is_x0():
    process = GaussianDiffusion()
    x0, xt, _, _ = batch()
    mean, variance = process.q_posterior(x0, xt, 0)
    assert torch.equal(mean, x0) and variance == 0
    assert process.alpha_bar_at(-1) == 1.0


def test_ddpm_steps_are_those_of_algorithm_2():
    """In DDPM's own form: eq. 11, from xt and eps_hat, without x0 and the posterior."""
    process = GaussianDiffusion(prediction="eps")
    xt, y = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    noise, checked = fixed_noise(xt.shape), 0
    for t, after, x0_hat in process.ddpm_sample(guided(Spy(waves), y), xt, noise=noise,
                                             clip=False):
        eps_hat = waves(xt, torch.tensor(float(t)), y.view(-1, 1, 1, 1).float())
        mean = (xt - BETA[t] / S[t] * eps_hat) / (1 - BETA[t]) ** 0.5
        if t > 0:
            variance = BETA[t] * (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t])
            mean = mean + variance**0.5 * noise(t)
        assert torch.allclose(after, mean, atol=2e-5)
        assert torch.allclose(x0_hat, (xt - S[t] * eps_hat) / A[t], rtol=1e-4, atol=1e-4)
        xt, checked = after, checked + 1
    assert checked == 1000


def test_ddim_steps_follow_equation_12():
    process, eta = GaussianDiffusion(prediction="v"), 0.5
    xt, y = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    noise, timesteps = fixed_noise(xt.shape), process.ddim_timesteps(7)
    steps = process.ddim_sample(guided(Spy(waves), y), xt, noise=noise, clip=False, steps=7,
                                eta=eta)
    for i, (t, after, x0_hat) in enumerate(steps):
        assert t == timesteps[i]
        out = waves(xt, torch.tensor(float(t)), y.view(-1, 1, 1, 1).float())
        assert torch.allclose(x0_hat, (A[t] * xt - S[t] * out).float(), atol=1e-5)
        eps_hat = S[t] * xt + A[t] * out
        then = ALPHA_BAR[timesteps[i + 1]] if i < 6 else 1.0
        sigma = eta * np.sqrt((1 - then) / (1 - ALPHA_BAR[t])) * np.sqrt(1 - ALPHA_BAR[t] / then)
        expected = then**0.5 * x0_hat + (1 - then - sigma**2) ** 0.5 * eps_hat + sigma * noise(t)
        assert torch.allclose(after, expected.float(), atol=1e-5)
        xt = after
    assert torch.equal(after, x0_hat)                       # the last step ends at x0_hat


# ---------------------------------------------------------------- back, all of it


@pytest.mark.parametrize("kind, clip", [("eps", True), ("v", True), ("v", False), ("x0", False)])
def test_ddim_at_eta_1_over_all_steps_is_ddpm(kind, clip):
    process = GaussianDiffusion(prediction=kind)
    xT, y = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    noise = fixed_noise(xT.shape)
    ddpm = list(process.ddpm_sample(guided(Spy(waves), y, 1.5), xT, noise=noise, clip=clip))
    ddim = list(process.ddim_sample(guided(Spy(waves), y, 1.5), xT, noise=noise, clip=clip,
                                    steps=1000, eta=1.0))
    assert [t for t, _, _ in ddpm] == [t for t, _, _ in ddim]
    for (_, *one), (_, *other) in zip(ddpm, ddim, strict=True):
        assert torch.allclose(torch.stack(one), torch.stack(other), atol=1e-3)


def test_ddpm_visits_every_step_once_and_adds_no_noise_at_0():
    model, asked = Spy(waves), []
    xT, y = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])

    def noise(t):
        asked.append(t)
        return torch.zeros_like(xT)

    steps = list(GaussianDiffusion().ddpm_sample(guided(model, y), xT, noise=noise))
    down = list(range(999, -1, -1))
    assert [t for _, t, _ in model.calls] == [[t] * 3 for t in down]
    assert all(seen == [1, 2, 3] for _, _, seen in model.calls)
    assert [t for t, _, _ in steps] == down and asked == down[:-1]
    # what is yielded is what the step made: the model's next input, none of it changed later
    assert torch.equal(model.calls[0][0], xT)
    for (_, xt, _), (seen, _, _) in zip(steps[:-1], model.calls[1:], strict=True):
        assert torch.equal(xt, seen)
    assert torch.equal(steps[-1][1], steps[-1][2])          # the sample is the last x0_hat


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_visits_its_steps_once_and_eta_0_asks_for_no_noise(eta):
    model, asked = Spy(waves), []
    xT, y = torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])

    def noise(t):
        asked.append(t)
        return torch.zeros_like(xT)

    process = GaussianDiffusion()
    steps = list(process.ddim_sample(guided(model, y), xT, noise=noise, steps=20, eta=eta))
    timesteps = process.ddim_timesteps(20)
    assert [t for _, t, _ in model.calls] == [[t] * 3 for t in timesteps]
    assert [t for t, _, _ in steps] == timesteps
    assert asked == (timesteps[:-1] if eta else [])
    for (_, xt, _), (seen, _, _) in zip(steps[:-1], model.calls[1:], strict=True):
        assert torch.equal(xt, seen)
    assert torch.equal(steps[-1][1], steps[-1][2])


def test_ddim_is_deterministic_by_default():
    process, xT, y = GaussianDiffusion(), torch.randn(2, 1, 4, 4), torch.tensor([1, 2])
    predict = guided(Spy(waves), y)
    runs = [list(process.ddim_sample(predict, xT, noise=no_noise))[-1][1] for _ in range(2)]
    assert torch.equal(*runs)
    assert len(process.ddim_timesteps(50)) == len(list(process.ddim_sample(predict, xT)))


def test_ddim_timesteps_are_evenly_spaced_and_include_both_ends():
    process = GaussianDiffusion()
    assert process.ddim_timesteps(1) == [999]
    for steps in range(2, 1001):
        timesteps = process.ddim_timesteps(steps)
        gaps = -np.diff(timesteps)
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] == 0
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert process.ddim_timesteps(1000) == list(range(999, -1, -1))
    for wrong in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"{wrong} sampling steps: from 1 to 1000"):
            process.ddim_timesteps(wrong)


@SAMPLERS
def test_default_noise_is_standard_normal(sampler):
    """Over all steps at eta = 1, both samplers ask for it alike."""
    process = GaussianDiffusion(num_timesteps=20, beta_end=0.5, prediction="eps")
    predict = guided(Spy(), torch.zeros(2).long())
    xT = torch.randn(2, 1, 64, 64)
    how = dict(steps=20, eta=1.0) if sampler == "ddim_sample" else {}
    torch.manual_seed(1)
    default = [xt for _, xt, _ in getattr(process, sampler)(predict, xT, **how)]
    torch.manual_seed(1)
    given = [xt for _, xt, _ in getattr(process, sampler)(
        predict, xT, noise=lambda t: torch.randn(2, 1, 64, 64), **how)]
    assert all(torch.equal(*pair) for pair in zip(default, given, strict=True))


@SAMPLERS
def test_samplers_record_no_gradient_and_leave_the_caller_alone(sampler):
    model = DiT(input_size=8, patch_size=4, hidden_size=16, depth=1, num_heads=2)
    process = GaussianDiffusion(num_timesteps=3)
    how = dict(steps=3) if sampler == "ddim_sample" else {}
    for _, xt, x0_hat in getattr(process, sampler)(
            guided(model, torch.tensor([0, 1])), torch.randn(2, 1, 8, 8), **how):
        assert torch.is_grad_enabled()
        assert not xt.requires_grad and not x0_hat.requires_grad


# ---------------------------------------------------------------- guidance, clipping


@pytest.mark.parametrize("scale, labels", [(1.0, [[3, 7]]), (0.0, [[10, 10]]),
                                           (2.5, [[3, 7, 10, 10]]), (-0.5, [[3, 7, 10, 10]])])
def test_guidance_costs_one_forward(scale, labels):
    """Scale 1: of B conditional; 0: of B unconditional; any other: of both halves."""
    model, xt, y = Spy(waves), torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    out = classifier_free_guidance(model, y, scale)(xt, 5)
    assert [seen for _, _, seen in model.calls] == labels
    assert model.calls[0][1] == [5] * len(labels[0])
    cond = waves(xt, torch.tensor(5.0), y.view(-1, 1, 1, 1).float())
    uncond = waves(xt, torch.tensor(5.0), torch.tensor(10.0))
    assert torch.allclose(out, uncond + scale * (cond - uncond), atol=1e-5)


def test_no_class_is_the_models_own():
    model = Spy(waves)
    model.null_class = 3
    classifier_free_guidance(model, torch.tensor([0]), 4.0)(torch.randn(1, 1, 4, 4), 5)
    assert model.calls[0][2] == [0, 3]


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@KINDS
def test_guiding_the_output_guides_eps(kind, scale):
    """Whatever the output means: eps_uncond + cfg_scale (eps_cond - eps_uncond)."""
    process, t = GaussianDiffusion(prediction=kind), 400
    xt, y = torch.randn(2, 1, 4, 4), torch.tensor([3, 7])
    halves = [process.denoise(guided(Spy(waves), labels), xt, t, clip=False)
              for labels in (y, torch.full_like(y, 10))]
    (_, eps_cond), (_, eps_uncond) = halves
    x0_hat, eps_hat = process.denoise(guided(Spy(waves), y, scale), xt, t, clip=False)
    expected = eps_uncond + scale * (eps_cond - eps_uncond)
    assert torch.allclose(eps_hat, expected, atol=1e-5)
    assert torch.allclose(x0_hat.double(), (xt - S[t] * expected.double()) / A[t], atol=1e-4)


@KINDS
def test_guide_then_clip_then_eps_from_the_clipped_x0(kind):
    process, t = GaussianDiffusion(prediction=kind), 600
    xt, y = 2 * torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    predict = guided(Spy(waves), y, 3.0)
    free, _ = process.denoise(predict, xt, t, clip=False)
    x0_hat, eps_hat = process.denoise(predict, xt, t)
    assert (free.abs() > 1).any() and (free.abs() < 1).any()
    assert torch.equal(x0_hat, free.clamp(-1, 1))
    assert torch.allclose((A[t] * x0_hat + S[t] * eps_hat).float(), xt, atol=1e-5)


@SAMPLERS
def test_samplers_guide_and_clip(sampler):
    """The scale reaches the model, clipping is the default, and can be turned off."""
    process, xT = GaussianDiffusion(prediction="x0"), torch.randn(2, 1, 4, 4)
    model = Spy(lambda xt, t, y: y.expand_as(xt) / 5)       # class 0: 0, 5: 1, "no class": 2
    y, sample = torch.tensor([0, 5]), getattr(process, sampler)

    def last(scale, **how):
        return list(sample(guided(model, y, scale), xT, **how))[-1][1][:, 0, 0, 0].tolist()

    assert last(1.0) == [0.0, 1.0] and len(model.calls[-1][2]) == 2
    assert last(0.0) == [1.0, 1.0]                          # clipped
    assert last(0.0, clip=False) == [2.0, 2.0]
    assert last(2.0, clip=False) == [-2.0, 0.0] and len(model.calls[-1][2]) == 4
    assert last(2.0) == [-1.0, 0.0]


@SAMPLERS
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_model_with_variance_channels_samples_and_learns_by_its_first(sampler, scale):
    """learn_sigma: the second half of its channels plays no part here."""
    plain = Spy(waves)
    double = Spy(lambda xt, t, y: torch.cat([waves(xt, t, y), torch.full_like(xt, 1e9)], dim=1))
    process = GaussianDiffusion(num_timesteps=50)
    xT, y = torch.randn(2, 3, 4, 4), torch.tensor([3, 7])
    how = dict(steps=10) if sampler == "ddim_sample" else {}
    ends = [list(getattr(process, sampler)(guided(model, y, scale), xT,
                                           noise=fixed_noise(xT.shape), **how))[-1]
            for model in (plain, double)]
    assert torch.equal(ends[0][1], ends[1][1]) and ends[1][1].shape == xT.shape
    x0, eps, _, _ = batch()
    t, y = torch.tensor([0, 10, 20, 49]), torch.arange(4)
    assert torch.equal(process.loss(plain, x0, t, y, eps), process.loss(double, x0, t, y, eps))


# ---------------------------------------------------------------- Gaussian data, solved on paper


MEAN, SD = -0.74, 0.62                                      # of MNIST's pixels in [-1, 1]


def on_paper(timesteps, eta):
    """The samplers' recursion for data N(MEAN, SD^2), whose ideal eps_hat is known:
    E[eps | xt] = s u / (a^2 SD^2 + s^2), where u = xt - a MEAN. So each step is
    u <- k u + sigma noise; this lists (k, sigma).
    """
    steps = []
    for t, t_next in zip(timesteps, timesteps[1:] + [None], strict=True):
        now, then = ALPHA_BAR[t], 1.0 if t_next is None else ALPHA_BAR[t_next]
        k_eps = S[t] / (now * SD**2 + 1 - now)              # eps_hat = k_eps u
        k_x0 = (1 - S[t] * k_eps) / A[t]                    # x0_hat - MEAN = k_x0 u
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        steps.append((then**0.5 * k_x0 + (1 - then - sigma**2) ** 0.5 * k_eps, sigma))
    return steps


@pytest.mark.parametrize("sampler, how, distance", [
    ("ddpm_sample", {}, -0.0129),
    ("ddim_sample", dict(steps=50), -0.0940),
    ("ddim_sample", dict(steps=50, eta=0.7), -0.1349),
])
@KINDS
def test_gaussian_data_follow_the_recursion_on_paper(kind, sampler, how, distance):
    """Sampling without clipping, step for step; and how far its variance ends from the data's:
    with an ideal network, what is left is the schedule's and the sampler's own."""
    def ideal(xt, t, y):
        a, s = (torch.tensor(table)[t.long()] for table in (A, S))
        return s * (xt - a * MEAN) / (a**2 * SD**2 + s**2)

    process = GaussianDiffusion(prediction=kind)
    xT, y = torch.randn(100, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(100)
    noise, model = fixed_noise(xT.shape), outputs_for(kind, ideal)
    timesteps, eta = list(range(999, -1, -1)), 1.0
    if how:
        timesteps = [round(999 * i / (how["steps"] - 1)) for i in reversed(range(how["steps"]))]
        eta = how.get("eta", 0.0)
    u, variance = xT.double() - A[999] * MEAN, 1.0
    predict = guided(model, y.long())
    steps = getattr(process, sampler)(predict, xT, noise=noise, clip=False, **how)
    for (t, xt, _), expected_t, t_next, (k, sigma) in zip(
            steps, timesteps, timesteps[1:] + [None], on_paper(timesteps, eta), strict=True):
        u = k * u + (sigma * noise(t) if sigma > 0 else 0)
        variance = k**2 * variance + sigma**2
        expected = u + (1.0 if t_next is None else A[t_next]) * MEAN
        assert t == expected_t and (xt - expected).abs().max() < 1e-4, t
    print(f"\n{sampler} {how} {kind}: off the recursion by {(xt - expected).abs().max():.1e}; "
          f"variance {variance:.5f}, the data's {SD**2:.5f}: {variance / SD**2 - 1:+.2%}", end="")
    assert variance / SD**2 - 1 == pytest.approx(distance, abs=1e-4)


def test_running_the_file_checks_it(capsys):
    runpy.run_path(str(ROOT / "diffusion.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["eps", "v", "x0"]
    for line in lines[4:]:                                  # under the heading
        t, *printed = line.split()
        exact = ALPHA_BAR[int(t)], A[int(t)], S[int(t)]
        assert [float(x) for x in printed] == pytest.approx(exact, abs=6e-5)
    assert len(lines) == 8
