"""variants/: each formula written out once, and each variant through the commands."""

import functools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import sample
from conftest import ROOT
from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import MODELS, DiT, patchify, unpatchify
from support import registry
from variants.count import count
from variants.dpm_solver import dpm_solver_sample
from variants.guidance import autoguidance, guidance_interval
from variants.learned_variance import LearnedVariance, decoder_nll
from variants.mixing import NoAttentionDiT, PositionAttentionDiT
from variants.modern import ModernDiT
from variants.paper_blocks import AdaLNDiT, CrossAttentionDiT, InContextDiT
from variants.rectified_flow import RectifiedFlow
from variants.registers import RegisterDiT

SMALL = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2,
             num_classes=5)
ALL = [AdaLNDiT, CrossAttentionDiT, InContextDiT, ModernDiT, RegisterDiT]
DOCS = (ROOT / "docs" / "variants.md").read_text()
PREDICTIONS = pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)     # float32


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(cls, **arguments):
    """A small network none of whose weights is zero."""
    model = cls(**SMALL | arguments).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return model


def inputs():
    return torch.randn(3, 2, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 5])


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("cls", ALL)
def test_networks_keep_the_contract(cls):
    x, t, y = inputs()
    assert not cls(**SMALL)(x, t, y).any()              # the last layer starts at zero
    assert cls(**SMALL, learn_sigma=True)(x, t, y).shape == (3, 4, 8, 8)
    model = build(cls).requires_grad_(True)
    out = model(x, t, y)
    for other in [(x, t + 1, y), (x, t + 0.5, y), (x, t, (y + 1) % 6), (x.flip(-1), t, y)]:
        assert not torch.allclose(model(*other), out, atol=1e-5)
    close(model(x[1:2], t[1:2], y[1:2]), out[1:2])      # no image sees another
    out.square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t, y).dtype == torch.float32


@pytest.mark.parametrize("cls", [DiT, *ALL])
def test_a_block_whose_branches_end_in_zeros_is_the_identity(cls):
    """A fresh one is, if it has gates."""
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    c = torch.stack([c, -c], dim=1) if cls is CrossAttentionDiT else c
    arguments = (x,) if cls is InContextDiT else (x, c)
    fresh = cls(**SMALL).blocks[0](*arguments)
    assert torch.equal(fresh, x) == (cls in (DiT, ModernDiT, RegisterDiT))
    block = build(cls).blocks[0]
    assert not torch.allclose(block(*arguments), x, atol=0.1)
    for name, p in block.named_parameters():
        if name.startswith(("attn.proj", "cross.proj", "mlp.fc2", "mlp.down")):
            p.zero_()
    assert torch.equal(block(*arguments), x)


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)     # (B, heads, N, D/heads)


def attention(q, k, v):
    weights = (heads(q) @ heads(k).mT / math.sqrt(q.shape[-1] / 2)).softmax(dim=-1)
    return (weights @ heads(v)).transpose(1, 2).flatten(2)


def rms_norm(x, weight=1.0):
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x, norm):
    return rms_norm(x - x.mean(dim=-1, keepdim=True), norm.weight) + norm.bias


@pytest.mark.parametrize("cls, tokens", [
    (InContextDiT, 18), (CrossAttentionDiT, 16), (RegisterDiT, 20)])
def test_a_network_written_out(cls, tokens):
    model, (x, t, y) = build(cls), inputs()
    z = model.x_embedder(patchify(x, 2)) + model.pos_embed
    c, final = torch.stack([model.t_embedder(t), model.y_embedder(y)], dim=1), model.final_layer
    if cls is InContextDiT:
        z = torch.cat([z, c], dim=1)
    if cls is RegisterDiT:
        z = torch.cat([z, model.registers.repeat(3, 1, 1)], dim=1)
    assert z.shape == (3, tokens, 32)
    for block in model.blocks:
        if cls is RegisterDiT:
            z = block(z, c.sum(dim=1))
            continue
        q, k, v = block.attn.qkv(layer_norm(z, block.norm1)).chunk(3, dim=-1)
        z = z + block.attn.proj(attention(q, k, v))
        if cls is CrossAttentionDiT:
            q, k, v = (block.cross.q(layer_norm(z, block.norm_cross)),
                       *block.cross.kv(c).split(32, dim=-1))
            z = z + block.cross.proj(attention(q, k, v))
        z = z + block.mlp(layer_norm(z, block.norm2))
    z = z[:, :16]
    z = final(z, c.sum(dim=1)) if cls is RegisterDiT else final.linear(
        layer_norm(z, final.norm_final))
    close(model(x, t, y), unpatchify(z, 2, 2))


def test_an_adaln_block_written_out():
    block, x, c = build(AdaLNDiT).blocks[0], torch.randn(2, 16, 32), torch.randn(2, 32)
    shift1, scale1, shift2, scale2 = block.adaLN_modulation(c)[:, None].chunk(4, dim=-1)
    z = rms_norm(x - x.mean(dim=-1, keepdim=True)) * (1 + scale1) + shift1
    z = x + block.attn.proj(attention(*block.attn.qkv(z).chunk(3, dim=-1)))
    mlp = block.mlp(rms_norm(z - z.mean(dim=-1, keepdim=True)) * (1 + scale2) + shift2)
    close(block(x, c), z + mlp)


def test_a_modern_block_written_out():
    """RoPE as a product of complex numbers: component k of the first half of a head is the real
    part of number k, of the second half its imaginary part. 0..3 turn with the row, 4..7 with the
    column."""
    block, x, c = build(ModernDiT).blocks[0], torch.randn(2, 16, 32), torch.randn(2, 32)
    angles = [[place * 100 ** (-k / 4) for place in divmod(token, 4) for k in range(4)]
              for token in range(16)]
    turn = torch.exp(1j * torch.tensor(angles, dtype=torch.float64))        # (N, 8)

    def rotated(x, norm):
        x = rms_norm(x.unflatten(-1, (2, 16)), norm.weight).double()        # (B, N, heads, 16)
        x = torch.complex(x[..., :8], x[..., 8:]) * turn[:, None]
        return torch.cat([x.real, x.imag], dim=-1).float().flatten(2)

    shift1, scale1, gate1, shift2, scale2, gate2 = (
        block.adaLN_modulation(c)[:, None].chunk(6, dim=-1))
    attn, mlp = block.attn, block.mlp
    q, k, v = attn.qkv(rms_norm(x) * (1 + scale1) + shift1).chunk(3, dim=-1)
    z = x + gate1 * attn.proj(attention(rotated(q, attn.q_norm), rotated(k, attn.k_norm), v))
    gate, up = mlp.gate_up(rms_norm(z) * (1 + scale2) + shift2).chunk(2, dim=-1)
    close(block(x, c), z + gate2 * mlp.down(gate * gate.sigmoid() * up))


def test_attention_that_does_not_see_the_content():
    """Written out: a table of weights for each head; and each token by itself."""
    x, table = torch.randn(3, 16, 32), build(PositionAttentionDiT).blocks[0].attn
    shares = table.logits.exp() / table.logits.exp().sum(-1, keepdim=True)
    heads = [shares[h] @ part for h, part in enumerate(table.v(x).split(16, dim=-1))]
    close(table(x), table.proj(torch.cat(heads, dim=-1)))
    alone = build(NoAttentionDiT)
    noisy, (_, t, y) = torch.randn(3, 2, 8, 8), inputs()
    changed = noisy.clone()
    changed[:, :, :2, :2] += 1                              # the first patch, and no other
    difference = (alone(noisy, t, y) - alone(changed, t, y)).abs().amax(dim=(0, 1)) > 0
    assert difference[:2, :2].all() and difference.sum() == 4


# ---------------------------------------------------------------- parameters and multiply-adds

CONDITIONING = [        # DiT figure 5 and table 4, DiT-XL/2: Gflops, millions of parameters
    (InContextDiT, 119.37, 449), (CrossAttentionDiT, 137.62, 598), (AdaLNDiT, 118.56, 600),
    (DiT, 118.64, 675),
]


@pytest.mark.parametrize("cls, gflops, millions", CONDITIONING)
def test_the_papers_gflops_and_parameters(cls, gflops, millions):
    sizes = MODELS["DiT-XL/2"] | dict(input_size=32, in_channels=4, num_classes=1000,
                                      learn_sigma=True)
    one, two = (count(cls, **sizes | dict(depth=n)) for n in (1, 2))
    parameters, products = (a + 27 * (b - a) for a, b in zip(one, two, strict=True))
    assert products / 1e9 == pytest.approx(gflops, rel=3e-4)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.7)
    assert f"{products / 1e9:.2f}" in DOCS and f"{gflops:.2f}" in DOCS


@pytest.mark.parametrize("name, cls", registry.NETWORKS.items())
def test_the_documented_counts(name, cls):
    parameters, products = count(cls, **MODELS["DiT-Nano/7"])
    assert f"| {parameters:,} | {products / 1e6:.2f} million |" in DOCS.split(f"| {name} |")[1]


# ---------------------------------------------------------------- learned variance

BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
BAR = (1 - BETA).cumprod(0)


def by_products(x0, xt, t, s):
    """Mean and variance of q(x_s | x_t, x0) in float64: the product of two normal densities of x_s,
    one from x_t and one from x0, has the sum of their precisions."""
    bar, share = BAR[s], BAR[t] / BAR[s]                # x_t = sqrt(share) x_s + noise
    variance = 1 / (share / (1 - share) + 1 / (1 - bar))
    return variance * (share.sqrt() / (1 - share) * xt + bar.sqrt() / (1 - bar) * x0), variance


def hybrid_batch(t: list[int]):
    x0 = (torch.rand(len(t), 2, 8, 8) * 2.4 - 1.2).clamp(-1, 1)
    eps = torch.randn_like(x0)
    out, v = eps + 0.1 * torch.randn_like(x0), torch.empty_like(x0).uniform_(-1.5, 1.5)
    return x0, torch.tensor(t), eps, out, v


@pytest.mark.parametrize("t, s", [(1, 0), (2, 1), (500, 499), (999, 998), (999, 888), (500, 2)])
def test_v_goes_from_the_posteriors_variance_to_beta(t, s):
    """Through the sampler: the mean of a step, and what a noise of 1 adds to it."""
    process, xT, x0 = LearnedVariance(), torch.randn(1, 1, 2, 2), torch.rand(1, 1, 2, 2)
    process.ddim_timesteps = lambda steps: [t, s]
    mean, posterior = by_products(x0.double(), xT.double(), t, s)
    beta = 1 - BAR[t] / BAR[s]
    for v, variance in [(-1, posterior), (1, beta), (0, (posterior * beta).sqrt())]:
        out = torch.cat([x0, torch.full_like(x0, v)], dim=1)
        plain, noisy = (next(process.ddpm_sample(
            lambda xt, t, out=out: out, xT, lambda t, n=n: torch.full_like(xT, n)))[1].double()
            for n in (0, 1))
        close(plain, mean)
        close(noisy - plain, variance.sqrt().expand_as(mean), rtol=1e-3, atol=1e-6)


def test_the_last_term_is_the_likelihood_of_a_grey_level():
    levels = torch.arange(256) / 127.5 - 1
    for mean, std in [(0.3, 0.02), (-1.0, 0.005), (0.99, 0.5)]:
        found = decoder_nll(levels, torch.tensor(mean), torch.tensor(2 * math.log(std)))
        upper, lower = (Normal(mean, std).cdf(levels + side / 255) for side in (1, -1))
        upper[-1], lower[0] = 1, 0
        close((-found).exp(), upper - lower, rtol=0, atol=1e-3)     # tanh-GELU's approximation
    # at t = 0 the decoder has the posterior variance of t = 1 for v = -1
    x0, t, eps, out, v = hybrid_batch([0])
    found = LearnedVariance().bound_term(out, -torch.ones_like(v), x0, x0, t)
    nats = decoder_nll(x0, out, by_products(0, 0, 1, 0)[1].log().float()).mean(dim=(1, 2, 3))
    close(found, nats / math.log(2))


def test_the_published_loss():
    """The numbers: openai/improved-diffusion's training_losses (linear schedule, eps, learned
    range, MSE) for these x0, eps and outputs."""
    t = torch.tensor([0, 1, 10, 500, 999])
    i = torch.arange(5 * 3 * 4).view(5, 3, 2, 2)
    x0, eps = torch.sin(1.7 * i).clamp(-0.95, 0.95), torch.cos(2.3 * i) * 1.3
    model = lambda xt, t, y: torch.cat([0.9 * eps + 0.1 * torch.sin(xt), torch.cos(3 * xt)], dim=1)
    found = LearnedVariance(prediction="eps").loss(model, x0, t, None, eps)
    published = [1.4975554, 0.0662829, 0.0148144, 0.0006752, 0.0003726]
    close(found, torch.tensor(published), rtol=2e-4, atol=2e-7)


def test_the_bound_trains_the_variance_alone():
    x0, t, eps, out, v = hybrid_batch([0, 3, 400, 999])
    both = torch.cat([out, v], dim=1).requires_grad_()
    LearnedVariance(prediction="eps").loss(lambda xt, t, y: both, x0, t, None, eps).sum().backward()
    close(both.grad[:, :2], 2 * (out - eps) / out[0].numel())
    assert both.grad[:, 2:].flatten(1).any(dim=1).all()


def test_the_bound_is_the_prior_term_and_one_term_for_each_step():
    process = LearnedVariance(num_timesteps=10, beta_start=1e-3, beta_end=0.3)
    x0, y = torch.linspace(-1, 1, 16).view(2, 1, 2, 4), torch.zeros(2, dtype=torch.long)
    model = lambda xt, t, y: torch.cat([0.9 * x0, torch.sin(xt)], dim=1)
    found = process.bits_per_dimension(model, x0, y)
    torch.manual_seed(0)
    bar = process.alpha_bar[-1]
    prior = kl_divergence(Normal(bar.sqrt() * x0.double(), (1 - bar).sqrt()), Normal(0.0, 1.0))
    expected = prior.mean(dim=(1, 2, 3)) / math.log(2)
    for i in range(10):
        t = torch.tensor([i, i])
        xt = process.q_sample(x0, t, torch.randn_like(x0))
        expected = expected + process.bound_term(0.9 * x0, torch.sin(xt), x0, xt, t)
    close(found, expected.float())
    assert prior.mean() > 0.02


@pytest.mark.parametrize("clip", [True, False])
def test_samplers_read_their_half_of_the_output(clip):
    """DDIM and DPM-Solver++ the first alone; DDPM with v = -1 is the lesson's."""
    xT, schedule = torch.randn(2, 2, 4, 4), dict(num_timesteps=40, beta_start=0.01, beta_end=0.2,
                                                 prediction="eps")
    plain, learned = GaussianDiffusion(**schedule), LearnedVariance(**schedule)
    noise = lambda t: torch.randn(xT.shape, generator=torch.Generator().manual_seed(t))
    one = lambda xt, t: torch.sin(2 * xt + t)
    both = lambda xt, t: torch.cat([one(xt, t), -torch.ones_like(xt)], dim=1)
    for a, b in [(plain.ddim_sample(one, xT, noise, clip, 7, 0.5),
                  learned.ddim_sample(both, xT, noise, clip, 7, 0.5)),
                 (dpm_solver_sample(plain, one, xT, noise, clip, 7),
                  dpm_solver_sample(learned, both, xT, noise, clip, 7)),
                 (plain.ddpm_sample(one, xT, noise, clip),
                  learned.ddpm_sample(both, xT, noise, clip, 40))]:
        close(list(a), list(b), rtol=1e-3, atol=1e-4)
    visited = [t for t, *_ in learned.ddpm_sample(both, xT, noise, steps=7)]
    assert visited == plain.ddim_timesteps(7)


def test_guidance_leaves_the_variances_alone():
    """v stays that of the class; the rest is that guidance's."""
    process, model, weak = LearnedVariance(), *(build(DiT, learn_sigma=True) for _ in range(2))
    y, t, x = torch.tensor([3, 4]), torch.tensor([500, 500]), torch.randn(2, 2, 8, 8)
    for guidance in (classifier_free_guidance, functools.partial(autoguidance, weak=weak),
                     functools.partial(guidance_interval, process=process, low=0.0, high=100.0)):
        out, plain = (g(model, y, 4.0)(x, 500) for g in (process.guided(guidance), guidance))
        close(out[:, :2], plain[:, :2])
        close(out[:, 2:], model(x, t, y)[:, 2:])
        assert not torch.allclose(out[:, 2:], plain[:, 2:])
    for scale, labels in [(1.0, y), (0.0, torch.full_like(y, model.null_class))]:
        out = process.guided(classifier_free_guidance)(model, y, scale)(x, 500)
        assert torch.equal(out, model(x, t, labels))


# ---------------------------------------------------------------- rectified flow


@PREDICTIONS
def test_the_path_is_a_straight_line_and_the_right_output_has_no_loss(prediction):
    process, t = RectifiedFlow(prediction=prediction), torch.tensor([0, 411.7, 998])
    x0, eps = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    s = ((t + 1) / 1000).view(-1, 1, 1, 1)
    xt, target = process.q_sample(x0, t, eps), process.target(x0, eps, t)
    close(xt, (1 - s) * x0 + s * eps)
    close(target, {"eps": eps, "v": eps - x0, "x0": x0}[prediction])
    close(process.x0_and_eps(target, xt, t), (x0, eps), rtol=0, atol=1e-3)
    assert not process.loss(lambda xt, t, y: target, x0, t, None, eps).any()
    assert process.to("meta") is process and process.alpha_sigma(3)[0].device.type == "meta"


def test_weightings_compare_errors_in_the_velocity():
    t = torch.tensor([0.0, 100.0, 600.0])
    v, x0 = (RectifiedFlow(prediction=p, weighting="v").loss_weight(t) for p in ("v", "x0"))
    close(v[1:], torch.ones(2))
    close(x0, ((t + 1) / 1000).clamp(min=0.05) ** -2)           # v = (xt - x0) / s; 0.05: JiT


def test_timesteps_are_fractions_and_follow_the_noise_level():
    process, u = RectifiedFlow(), torch.tensor([0.0, 0.25, 0.9999999])
    close(process.t_from_uniform(u), 999 * u)
    level = torch.tensor([-3.0, 0.0, 0.8])
    close(process.t_from_noise_level(level), 1000 / (1 + (-level).exp()) - 1)
    assert process.t_from_noise_level(torch.tensor([-50.0, 50.0])).tolist() == [0, 999]


def test_steps_of_euler_and_heun_written_out():
    """Three steps from s = 1. The network gets t = 1000 s - 1; Heun's last step is Euler's."""
    process, xT, seen = RectifiedFlow(prediction="v"), torch.randn(2, 1, 4, 4), []
    v = lambda x, s: torch.sin(2 * x + 3 * s)

    def model(xt, t, y):
        seen.append(t[0].item())
        return v(xt, (t[0] + 1) / 1000)

    model.null_class = 3
    predict = classifier_free_guidance(model, torch.tensor([0, 1]), 1)
    for sampler, heun in [(process.euler_sample, False), (process.heun_sample, True)]:
        x, at, made = xT, [], list(sampler(predict, xT, clip=False, steps=3))
        for s, (t, x_next, x0_hat) in zip((1, 2 / 3, 1 / 3), made, strict=True):
            slope, at = v(x, s), [*at, 1000 * s - 1]
            close(x0_hat, x - s * slope, atol=3e-3)             # alpha is at least 0.001
            if heun and s > 0.5:
                at.append(1000 * (s - 1 / 3) - 1)
                slope = (slope + v(x - slope / 3, s - 1 / 3)) / 2
            x = x - slope / 3
            close(x_next, x)
            assert t == round(1000 * s - 1)
        assert seen == pytest.approx(at)
        seen.clear()


# ---------------------------------------------------------------- DPM-Solver++(2M)


@PREDICTIONS
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("cls", [GaussianDiffusion, RectifiedFlow])
def test_dpm_solver_written_out(cls, prediction, clip):
    """Algorithm 2 of the paper, from each x that the sampler made."""
    process, x = cls(prediction=prediction), torch.randn(3, 1, 4, 4)
    predict = lambda xt, t: 1.3 * torch.sin(3 * xt + t / 150) + 0.2 * xt.flip(-1)
    times, old = [999, 799, 599, 399, 199], None
    alpha, sigma = (x.double().flatten() for x in process.alpha_sigma(torch.tensor(times)))
    lam = (alpha / sigma).log()
    made = list(dpm_solver_sample(process, predict, x, clip=clip, steps=5))
    assert [t for t, *_ in made] == times
    assert torch.equal(made[4][1], made[4][2])          # the next sigma is 0
    for i, (t, x_next, x0_hat) in enumerate(made[:4]):
        D = new = process.denoise(predict, x, t, clip)[0].double()
        close(x0_hat.double(), new)
        h = lam[i + 1] - lam[i]
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            D = (1 + 1 / (2 * r)) * new - 1 / (2 * r) * old
        close(x_next.double(), sigma[i + 1] / sigma[i] * x - alpha[i + 1] * ((-h).exp() - 1) * D)
        x, old = x_next, new


def test_timesteps_are_evenly_spaced_and_lead_to_the_clean_image():
    def timesteps(steps: int) -> list[int]:
        return [t for t, *_ in dpm_solver_sample(
            GaussianDiffusion(), lambda xt, t: xt, torch.zeros(1, 1, 1, 1), steps=steps)]

    assert timesteps(1) == [999]
    assert timesteps(1000) == list(range(999, -1, -1))
    assert timesteps(7) == [999, 856, 713, 570, 428, 285, 142]


# ---------------------------------------------------------------- guidance


class Spy:
    """A model that counts the rows of each forward."""

    null_class = 5

    def __init__(self, gain: float = 1.0):
        self.gain, self.rows = gain, []

    def __call__(self, xt, t, y):
        self.rows.append(len(xt))
        return torch.sin(self.gain * xt + (y / 7 + t / 1000).view(-1, 1, 1, 1))


def test_guidance_in_an_interval():
    """Open below, closed above; elsewhere the plain model, with no forward that is not needed."""
    model, process, y = Spy(), GaussianDiffusion(), torch.tensor([0, 3, 4])
    xt, t, now = torch.randn(3, 1, 4, 4), 300, ((1 - BAR[300]) / BAR[300]).sqrt().item()    # 1.24
    guided, plain = (classifier_free_guidance(model, y, scale)(xt, t) for scale in (3.0, 1))
    exactly = (process.sigma[t] / process.alpha[t]).item()
    for low, high, inside in [(0, 1e9, True), (now - 1e-3, now + 1e-3, True), (5, 9, False),
                              (0, now - 1e-3, False), (now + 1e-3, 1e9, False),
                              (0, exactly, True), (exactly, 1e9, False)]:
        model.rows.clear()
        found = guidance_interval(model, y, 3.0, process, low, high)(xt, t)
        assert torch.equal(found, guided if inside else plain), (low, high)
        assert model.rows == [6 if inside else 3]


def test_autoguidance_extrapolates_from_the_weaker_models_output():
    strong, weak, y, xt = Spy(), Spy(gain=0.5), torch.tensor([0, 3, 4]), torch.randn(3, 1, 4, 4)
    own, other = (classifier_free_guidance(m, y, 1)(xt, 500) for m in (strong, weak))
    for scale, expected in [(0, other), (2, 2 * own - other), (1.5, 1.5 * own - 0.5 * other)]:
        close(autoguidance(strong, y, scale, weak)(xt, 500), expected)
    weak.rows.clear()
    assert torch.equal(autoguidance(strong, y, 1, weak)(xt, 500), own) and not weak.rows
    both = guidance_interval(strong, y, 2.0, GaussianDiffusion(), 0.5, 10,
                             functools.partial(autoguidance, weak=weak))
    close(both(xt, 500), 2 * own - other)
    assert torch.equal(both(xt, 999), classifier_free_guidance(strong, y, 1)(xt, 999))
    assert weak.rows == [3]


# ---------------------------------------------------------------- through the commands


RUNS = {        # flags and samplers, the checkpoint's own first
    **{name: (["--network", name], ["ddim", "dpm++"]) for name in
       ("in-context", "cross-attention", "adaln", "registers", "modern", "position-attention",
        "no-attention", "documented")},
    "learned-variance": (["--process", "learned-variance"], ["ddim", "ddpm", "dpm++"]),
    "rectified-flow": (["--process", "rectified-flow"], ["euler", "heun", "dpm++"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_trains_and_samples(name, train, monkeypatch):
    if name == "documented":
        exec(DOCS.split("```python\n")[1].split("```")[0], toy := {})
        monkeypatch.setitem(registry.NETWORKS, name, toy["ConvNet"])
    flags, samplers = RUNS[name]
    assert train("--steps", 3, "--out", "run", *flags) == 0
    checkpoint = sample.load("run", device="cpu")
    assert checkpoint.step == 3 and checkpoint.sampling["sampler"] == samplers[0]
    assert name == "documented" or f"| {name} |" in DOCS
    made = {s: sample.generate(checkpoint, ["3", 1], sampler=s, steps=3) for s in samplers}
    for images in made.values():
        assert images.shape == (2, 1, 28, 28) and images.isfinite().all() and images.any()
    assert torch.equal(sample.generate(checkpoint, ["3", 1], steps=3), made[samplers[0]])
