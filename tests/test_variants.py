"""variants/: each against the lesson, a closed form or the paper; all through the commands."""

import ast
import functools
import math
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import sample
from conftest import ROOT, load, tensors_equal
from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import MODELS, Attention, DiT, DiTBlock, Mlp
from support import checkpoints, components, data
from support.cli import UserError
from support.folders import checkpoints_in
from support.sampling import resolve_sampling
from tools import evaluate, export
from variants import FLAGS, NETWORKS, PROCESSES, count
from variants.adaln import AdaLNDiT
from variants.cross_attention import CrossAttention, CrossAttentionDiT
from variants.in_context import InContextDiT
from variants.learned_variance import LearnedVariance, decoder_nll
from variants.modern import ModernDiT, SwiGLU, rope_angles, rotate
from variants.rectified_flow import RectifiedFlow
from variants.registers import RegisterDiT

SMALL = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2,
             num_classes=5)
ALL = [AdaLNDiT, CrossAttentionDiT, InContextDiT, ModernDiT, RegisterDiT]
DOCS = (ROOT / "docs" / "variants.md").read_text()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(cls, **arguments):
    """A small network none of whose weights is zero."""
    model = cls(**SMALL | arguments).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def inputs(B: int = 3):
    return torch.randn(B, 2, 8, 8), torch.tensor([0, 500, 999][:B]), torch.tensor([0, 3, 5][:B])


# ---------------------------------------------------------------- the registry


def test_the_registry_is_strings_and_imports_nothing():
    tree = ast.parse((ROOT / "variants" / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom | ast.Call)]
    done = subprocess.run([sys.executable, "-c", "import variants, sys; print('torch' in "
                           "sys.modules)"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert components.NETWORKS == {"dit": "dit:DiT"} | NETWORKS
    assert components.PROCESSES == {"ddpm": "diffusion:GaussianDiffusion"} | PROCESSES
    assert components.FLAGS == FLAGS


def test_every_file_is_described_and_every_flag_is_an_argument():
    for find, names in [(components.network_class, NETWORKS),
                        (components.process_class, PROCESSES)]:
        for name in names:
            assert f"| {name} |" in DOCS
            assert find(name).__module__.startswith("variants.")
    known = [components.arguments(cls) for cls in ALL]
    assert all(any(flag in each for each in known) for flag in FLAGS)


def test_names_outside_the_registry_are_refused(train):
    train("--steps", 1, "--out", "run")
    state = load("run/step_0000001.pt")
    for key, name in [("network", "variants.modern:ModernDiT"), ("process", "os:system")]:
        checkpoints.save(Path("bad.pt"), {**state, "config": {**state["config"], key: name}})
        with pytest.raises(UserError, match=f"{key} {name!r} is unknown"):
            sample.load("bad.pt")


def test_flags_and_processes_that_do_not_go_with_a_network_are_refused(train, monkeypatch):
    def unexpected(*arguments):
        raise AssertionError("the data was loaded before the flags were checked")

    monkeypatch.setattr(data, "load", unexpected)
    with pytest.raises(UserError, match="--registers does not apply to --network dit and --process "
                                        "ddpm: add --network registers$"):
        train("--steps", 1, "--registers", 2)
    with pytest.raises(UserError, match="2000 is not an integer of at least 0 and at most 1,024"):
        train("--steps", 1, "--network", "registers", "--registers", 2000)

    class Plain(DiT):
        def __init__(self, input_size: int, in_channels: int, num_classes: int):
            super().__init__(input_size, 7, in_channels, 16, 1, 2, num_classes=num_classes)
    monkeypatch.setitem(components.NETWORKS, "plain", Plain)
    with pytest.raises(UserError, match="--process learned-variance needs a network with the "
                                        "argument learn_sigma, which --network plain lacks"):
        train("--steps", 1, "--network", "plain", "--process", "learned-variance")


# ---------------------------------------------------------------- through the commands

RUNS = {
    "in-context": ("--network", "in-context"),
    "cross-attention": ("--network", "cross-attention"),
    "adaln": ("--network", "adaln", "--optimizer", "adamw"),
    "registers": ("--network", "registers", "--registers", 3),
    "modern": ("--network", "modern", "--precision", "bf16", "--process", "rectified-flow"),
    "learned-variance": ("--process", "learned-variance", "--prediction", "eps",
                         "--timesteps", "uniform"),
    "rectified-flow": ("--process", "rectified-flow", "--network", "registers"),
}


def check_commands(train, flags: tuple, samplers: tuple[str, ...]) -> dict:
    """Train, stop and resume, sample, measure and export. Returns the config."""
    assert train("--steps", 4, "--out", "straight", *flags) == 0
    assert train("--steps", 4, "--out", "run", "--stop-after", 2, *flags) == 0
    assert train("--resume", "--out", "run") == 0
    path = checkpoints_in(Path("run"))[-1]
    ended, straight = load(path), load(checkpoints_in(Path("straight"))[-1])
    for key in ("model", "ema", "opt", "config"):
        assert tensors_equal(ended[key], straight[key]), key

    assert ended["config"]["sampling"]["sampler"] == samplers[0]
    for sampler in samplers:
        assert sample.main([str(path), "--labels", "3", "--steps", "3", "--sampler", sampler,
                            "--trajectory", f"{sampler}.png", "--out", f"{sampler}-grid.png"]) == 0
    args = evaluate.parser().parse_args([str(path), "--images", "10", "--steps", "2"])
    _, about, make = evaluate.from_checkpoint(args, path, ended, torch.device("cpu"))
    (images,), _ = make()
    assert images.shape == (10, 1, 28, 28) and about["sampler"] == samplers[0]
    assert export.main([str(path), "shared.pt"]) == 0
    whole, shared = sample.load(path), sample.load("shared.pt")
    pair = [sample.generate(c, [1], steps=2) for c in (whole, shared)]
    assert torch.allclose(*pair, atol=0.02) and pair[0].isfinite().all()
    return ended["config"]


@pytest.mark.parametrize("name", RUNS)
def test_variants_train_resume_sample_and_export(train, name):
    flags = RUNS[name]
    samplers = ("euler", "heun") if "rectified-flow" in flags else ("ddim",)
    samplers += ("ddpm",) * (name == "learned-variance")
    config = check_commands(train, flags, samplers)
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert config["network"] == given.get("--network", "dit")
    assert config["process"] == given.get("--process", "ddpm")
    if config["network"] == "registers":
        assert config["model"]["registers"] == given.get("--registers", 4)
    assert config["model"]["learn_sigma"] == (config["process"] == "learned-variance")


def test_the_documented_network_and_process_work(train, tmp_path, monkeypatch):
    code = textwrap.dedent(DOCS.split("   ```python\n")[1].split("   ```\n")[0])
    (tmp_path / "documented_toy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(components.NETWORKS, "conv", "documented_toy:ConvNet")
    monkeypatch.setitem(components.PROCESSES, "cosine", "documented_toy:CosineDiffusion")
    config = check_commands(train, ("--network", "conv", "--process", "cosine"), ("ddim", ))
    assert config["model"] == dict(input_size=28, in_channels=1, num_classes=10, width=32)
    assert config["diffusion"]["offset"] == 0.008
    process = sample.load("run").diffusion
    assert process.alpha_bar[499].item() == pytest.approx(
        math.cos(0.508 / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("cls", ALL)
def test_networks_keep_the_contract(cls):
    x, t, y = inputs()
    fresh = cls(**SMALL)
    assert not fresh(x, t, y).any()                     # the last layer starts at zero
    assert cls(**SMALL, learn_sigma=True)(x, t, y).shape == (3, 4, 8, 8)
    model = build(cls)
    out = model(x, t, y)
    assert out.shape == x.shape and out.dtype == torch.float32
    for other in [(x, t + 1, y), (x, t + 0.5, y), (x, t, (y + 1) % 6), (x.flip(-1), t, y)]:
        assert not torch.allclose(model(*other), out, atol=1e-5)
    assert torch.allclose(model(x[1:2], t[1:2], y[1:2]), out[1:2], atol=1e-5)   # no other image
    for name, p in model.named_parameters():            # no parameter without a gradient
        grad, = torch.autograd.grad(model(x, t, y).square().sum(), p)
        assert grad.any(), name


def test_adaln_zero_starts_as_the_identity_and_the_others_do_not():
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    for cls in (DiT, ModernDiT, RegisterDiT):
        assert torch.equal(cls(**SMALL).blocks[0](x, c), x)
    for cls in (AdaLNDiT, InContextDiT):
        assert not torch.allclose(cls(**SMALL).blocks[0](x, c), x, atol=0.1)
    fresh = CrossAttentionDiT(**SMALL).blocks[0]
    assert not torch.allclose(fresh(x, torch.stack([c, c], 1)), x, atol=0.1)


def test_adaln_is_adaln_zero_with_open_gates():
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    block, zero = build(AdaLNDiT).blocks[0], DiTBlock(32, 2)
    state = block.state_dict()
    four = [state[f"adaLN_modulation.1.{k}"].chunk(4) for k in ("weight", "bias")]
    six = [[w[0], w[1], torch.zeros_like(w[0]), w[2], w[3], torch.zeros_like(w[0])] for w in four]
    six[1][2] = six[1][5] = torch.ones(32)
    zero.load_state_dict({**state, "adaLN_modulation.1.weight": torch.cat(six[0]),
                          "adaLN_modulation.1.bias": torch.cat(six[1])})
    assert torch.allclose(block(x, c), zero(x, c), atol=1e-5)


def test_in_context_blocks_see_two_more_tokens():
    model, (x, t, y), seen = build(InContextDiT), inputs(), []
    model.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape))
    model(x, t, y)
    assert seen == [(3, 18, 32)]
    assert model.condition(t, y).shape == (3, 2, 32)


def test_cross_attention_of_a_sequence_to_itself_is_self_attention():
    x, attn, cross = torch.randn(2, 5, 32), Attention(32, 4), CrossAttention(32, 4)
    state = {f"proj.{k}": w for k, w in attn.proj.state_dict().items()}
    for k, w in attn.qkv.state_dict().items():
        state[f"q.{k}"], state[f"kv.{k}"] = w.split([32, 64])
    cross.load_state_dict(state)
    assert torch.allclose(cross(x, x), attn(x), atol=1e-6)


def test_no_registers_is_the_default_bit_for_bit():
    torch.manual_seed(5)
    default, after = DiT(**SMALL), torch.rand(1)
    torch.manual_seed(5)
    none, after_too = RegisterDiT(registers=0, **SMALL), torch.rand(1)
    assert tensors_equal(default.state_dict(), none.state_dict()) and torch.equal(after, after_too)
    weights = build(DiT).state_dict()
    default.load_state_dict(weights)
    none.load_state_dict(weights)
    x, t, y = inputs()
    assert torch.equal(default(x, t, y), none(x, t, y))


def test_registers_are_tokens_of_the_blocks():
    model, seen = build(RegisterDiT, registers=3), []
    model.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape))
    model(*inputs())
    assert seen == [(3, 19, 32)] and model.registers.shape == (1, 3, 32)


def test_rope_makes_scores_a_function_of_relative_positions():
    """The same query and key, anywhere in the grid: the score depends on their difference."""
    side, dim = 6, 16
    angles = rope_angles(side, dim)
    q, k = torch.randn(2, 1, 1, 1, dim)
    scores = (rotate(q.expand(1, 1, 36, dim), angles) @ rotate(k.expand(1, 1, 36, dim), angles).mT)
    scores = scores.view(side, side, side, side)                # (row, column) x (row, column)
    inner = scores[:5, :4, :5, :4]
    assert torch.allclose(inner, scores[1:, :4, 1:, :4], atol=1e-5)         # a row down
    assert torch.allclose(inner, scores[:5, 2:, :5, 2:], atol=1e-5)         # two columns right
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0], atol=1e-3)
    assert scores[0, 0].flatten().unique().numel() == 36
    assert torch.allclose(rotate(q, angles[:1]), q)             # position (0, 0)
    assert torch.allclose(rotate(q.expand(1, 1, 36, dim), angles).norm(dim=-1), q.norm(), atol=1e-5)


def test_qk_norm_bounds_the_scores():
    """However large the queries and keys grow, attention stays as sharp as the norms' weights."""
    attn = ModernDiT(**SMALL).blocks[0].attn
    x = torch.randn(2, 16, 32)
    before = attn(x)
    with torch.no_grad():
        attn.qkv.weight[:64] *= 100
        attn.qkv.bias[:64] *= 100
    assert torch.allclose(attn(x), before, atol=1e-4)


@pytest.mark.parametrize("model", [
    "DiT-Nano/4", "DiT-Micro/4", "DiT-Mini/4", "DiT-S/4", "DiT-XL/4"])
def test_modern_has_equal_parameters(model):
    sizes = dict(MODELS[model], depth=1)
    with torch.device("meta"):
        ours, lesson = (sum(p.numel() for p in cls(**sizes).blocks.parameters())
                        for cls in (ModernDiT, DiT))
    assert ours == pytest.approx(lesson, rel=0.006)
    assert SwiGLU(48, 192).down.in_features == 128              # exact where it can be
    assert sum(p.numel() for p in SwiGLU(48, 192).parameters()) == pytest.approx(
        sum(p.numel() for p in Mlp(48, 192).parameters()), rel=0.005)


# ---------------------------------------------------------------- the paper's Gflops

GFLOPS = {      # DiT, table 4: a 32 x 32 x 4 latent, 1000 classes, with variance channels
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06,
    "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71,
    "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64,
}
CONDITIONING = {        # DiT-XL/2: Gflops, millions of parameters
    InContextDiT: (119.37, 449), CrossAttentionDiT: (137.62, 598), AdaLNDiT: (118.56, 600),
    DiT: (118.64, 675),
}
LATENT = dict(input_size=32, in_channels=4, num_classes=1000, learn_sigma=True)


def counted(cls, model: str) -> tuple[float, float]:
    """(millions of parameters, billions of multiply-adds), from networks of one and two blocks."""
    sizes = {**MODELS[model], **LATENT}
    one, two = (np.array(count.count(cls, **{**sizes, "depth": n})) for n in (1, 2))
    parameters, products = one + (sizes["depth"] - 1) * (two - one)
    return parameters / 1e6, products / 1e9


@pytest.mark.parametrize("model", GFLOPS)
def test_the_papers_gflops(model):
    _, gflops = counted(DiT, model)
    assert gflops == pytest.approx(GFLOPS[model], rel=3e-4, abs=0.006)


@pytest.mark.parametrize("cls", CONDITIONING)
def test_the_papers_gflops_of_four_ways_of_conditioning(cls):
    parameters, gflops = counted(cls, "DiT-XL/2")
    wanted, millions = CONDITIONING[cls]
    assert gflops == pytest.approx(wanted, rel=3e-4)
    assert parameters == pytest.approx(millions, abs=0.7)
    assert f"{gflops:.2f}" in DOCS and f"{wanted:.2f}" in DOCS


def test_count_follows_the_formula():
    """Of DiT: 12 D^2 per token and block, attention 2 N^2 D, modulation 6 D^2."""
    N, D, depth = 16, 32, 2
    block = 12 * D**2 * N + 2 * N**2 * D + 6 * D**2
    ends = N * 8 * D * 2 + 2 * D**2 + 256 * D + D**2
    assert count.count(DiT, **SMALL)[1] == depth * block + ends
    assert count.count(DiT, **SMALL)[0] == sum(p.numel() for p in DiT(**SMALL).parameters())


def test_the_documented_table_is_what_the_command_prints(capsys):
    assert count.main([]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| {name}" for name in components.NETWORKS]
    for name, *numbers in rows:
        documented = next(line for line in DOCS.splitlines() if line.startswith(name + " |"))
        assert " | ".join(numbers).rstrip(" |") in documented
    with pytest.raises(UserError, match="patch size 7 does not divide image size 30 .*: use "
                                        "DiT-Nano/2$"):
        count.main(["--image-size", "30"])
    with pytest.raises(UserError, match="image size 31 .*: choose another --image-size$"):
        count.main(["--image-size", "31"])
    assert not capsys.readouterr().out


# ---------------------------------------------------------------- learned variance

BETA = np.linspace(1e-4, 0.02, 1000)
BAR = np.cumprod(1 - BETA)


def by_products(x0, xt, t):
    """Mean and variance of q(x_{t-1} | xt, x0) in float64: the product of two normal densities of
    x_{t-1}, one from xt and one from x0, has the sum of their precisions."""
    from_xt, from_x0 = (1 - BETA[t]) / BETA[t], 1 / (1 - BAR[t - 1])
    variance = 1 / (from_xt + from_x0)
    return variance * (math.sqrt(1 - BETA[t]) / BETA[t] * xt
                       + math.sqrt(BAR[t - 1]) / (1 - BAR[t - 1]) * x0), variance


def hybrid_batch(t: list[int]):
    x0 = (torch.rand(len(t), 2, 8, 8) * 2.4 - 1.2).clamp(-1, 1)
    eps = torch.randn_like(x0)
    out, v = eps + 0.1 * torch.randn_like(x0), torch.empty_like(x0).uniform_(-1.5, 1.5)
    return x0, torch.tensor(t), eps, out, v


@pytest.mark.parametrize("bound, variance", [
    (-1, lambda t: by_products(0, 0, t)[1]), (1, lambda t: BETA[t])])
def test_v_goes_from_the_posteriors_variance_to_beta(bound, variance):
    """Through the sampler: one step from xt, whose noise is 1, less one whose noise is 0."""
    process = LearnedVariance()
    xT, outs = torch.zeros(1, 1, 2, 2), torch.full((1, 2, 2, 2), float(bound))
    for t in (1, 2, 10, 500, 999):
        process.ddim_timesteps = lambda steps, t=t: [t, t - 1]
        with_noise, without = (next(process.ddpm_sample(
            lambda xt, t: outs, xT, noise=lambda t, n=n: torch.full_like(xT, n)))[1]
            for n in (1.0, 0.0))
        std = (with_noise - without).double().square()
        assert torch.allclose(std, torch.tensor(variance(t)), rtol=1e-4)


def test_the_terms_of_the_bound_are_kl_divergences():
    """Against torch.distributions in float64, from posteriors that are products of densities."""
    steps = [1, 2, 10, 100, 500, 998, 999]
    x0, t, eps, out, v = hybrid_batch(steps)
    process = LearnedVariance(prediction="eps")
    xt = process.q_sample(x0, t, eps)
    found = process.bound_term(out, v, x0, xt, t)
    for i, step in enumerate(steps):
        x, noisy = x0[i].double(), xt[i].double()
        x0_hat = (noisy - math.sqrt(1 - BAR[step]) * out[i].double()) / math.sqrt(BAR[step])
        (mean, variance), (mean_hat, _) = (by_products(a, noisy, step) for a in (x, x0_hat))
        share = (v[i].double() + 1) / 2
        std_hat = (BETA[step] ** share * variance ** (1 - share)).sqrt()
        q, p = Normal(mean, torch.tensor(variance).sqrt()), Normal(mean_hat, std_hat)
        wanted = kl_divergence(q, p).mean() / math.log(2)
        assert found[i].item() == pytest.approx(wanted.item(), rel=2e-4, abs=1e-5)


def test_the_last_term_is_the_likelihood_of_a_grey_level():
    levels = (torch.arange(256) / 127.5 - 1)
    for mean, std in [(0.3, 0.02), (-1.0, 0.005), (0.99, 0.5)]:
        log_variance = torch.tensor(2 * math.log(std))
        shares = (-decoder_nll(levels, torch.tensor(mean), log_variance)).exp()
        assert shares.sum().item() == pytest.approx(1, abs=1e-4)
        upper, lower = (Normal(mean, std).cdf(levels + side / 255) for side in (1, -1))
        upper[-1], lower[0] = 1, 0
        assert torch.allclose(shares, upper - lower, atol=1e-3)     # tanh-GELU's approximation
    # t = 0: the decoder with the next step's posterior variance at v = -1
    x0, t, eps, out, v = hybrid_batch([0])
    process = LearnedVariance(prediction="x0")
    found = process.bound_term(out, -torch.ones_like(v), x0, process.q_sample(x0, t, eps), t)
    log_variance = torch.tensor(by_products(0, 0, 1)[1]).log().float()
    assert found.item() == pytest.approx(
        decoder_nll(x0, out, log_variance).mean().item() / math.log(2), rel=1e-4)


def test_the_published_loss():
    """The numbers: openai/improved-diffusion's training_losses (linear schedule, eps, learned
    range, MSE) for these x0, eps and outputs."""
    t = torch.tensor([0, 1, 10, 500, 999])
    i = torch.arange(5 * 3 * 4).view(5, 3, 2, 2)
    x0, eps = torch.sin(1.7 * i).clamp(-0.95, 0.95), torch.cos(2.3 * i) * 1.3
    model = lambda xt, t, y: torch.cat([0.9 * eps + 0.1 * torch.sin(xt), torch.cos(3 * xt)], dim=1)
    found = LearnedVariance(prediction="eps").loss(model, x0, t, None, eps)
    published = [1.4975554, 0.0662829, 0.0148144, 0.0006752, 0.0003726]
    assert torch.allclose(found, torch.tensor(published), rtol=0, atol=1e-5)


def test_the_bound_trains_the_variance_alone():
    x0, t, eps, out, v = hybrid_batch([0, 3, 400, 999])
    out, v = out.requires_grad_(), v.requires_grad_()
    process = LearnedVariance(prediction="eps")
    model = lambda xt, t, y: torch.cat([out, v], dim=1)
    grads = torch.autograd.grad(process.loss(model, x0, t, None, eps).sum(), [out, v])
    plain, = torch.autograd.grad((out - eps).square().mean(dim=(1, 2, 3)).sum(), out)
    assert torch.allclose(grads[0], plain) and grads[1].flatten(1).any(dim=1).all()


def test_at_v_minus_1_its_sampler_is_ddpms():
    xT = torch.randn(2, 1, 4, 4)
    noise = lambda t: torch.randn(xT.shape, generator=torch.Generator().manual_seed(t))
    arguments = dict(num_timesteps=40, beta_start=0.01, beta_end=0.2, prediction="eps")
    out = lambda xt, t: torch.sin(2 * xt + t)
    *_, (_, wanted, _) = GaussianDiffusion(**arguments).ddpm_sample(out, xT, noise)
    *_, (_, found, _) = LearnedVariance(**arguments).ddpm_sample(
        lambda xt, t: torch.cat([out(xt, t), -torch.ones_like(xt)], 1), xT, noise, steps=40)
    assert torch.allclose(found, wanted, atol=1e-5)
    for steps in (1, 7):
        visited = [t for t, *_ in LearnedVariance(**arguments).ddpm_sample(
            lambda xt, t: torch.cat([xt, xt], 1), xT, noise, steps=steps)]
        assert visited == GaussianDiffusion(**arguments).ddim_timesteps(steps)


@pytest.mark.parametrize("v, wanted", [
    (-1.0, lambda posterior, beta: posterior), (1.0, lambda posterior, beta: beta),
    (0.0, lambda posterior, beta: (posterior * beta) ** 0.5)])
def test_the_variance_of_a_long_step(v, wanted):
    """From t to s < t - 1, against q(x_s | x_t, x0) by the product of two normal densities."""
    process, xT = LearnedVariance(prediction="eps"), torch.zeros(1, 1, 8, 8)    # so the mean is 0
    predict = lambda xt, t: torch.cat([torch.zeros_like(xt), torch.full_like(xt, v)], dim=1)
    _, xt, _ = next(process.ddpm_sample(predict, xT, lambda t: torch.ones_like(xT), steps=10))
    t, s = process.ddim_timesteps(10)[:2]
    ratio = BAR[t] / BAR[s]                             # x_t = sqrt(ratio) x_s + sqrt(beta) noise
    posterior = 1 / (1 / (1 - BAR[s]) + ratio / (1 - ratio))
    assert xt.square().mean().item() == pytest.approx(wanted(posterior, 1 - ratio), rel=1e-4)


def test_its_sampler_is_that_of_diffusers():
    pytest.importorskip("diffusers", reason="needs the package diffusers")
    from diffusers import DDPMScheduler
    betas = dict(beta_start=0.01, beta_end=0.3)
    scheduler = DDPMScheduler(20, **betas, variance_type="learned_range", clip_sample=False)
    process = LearnedVariance(num_timesteps=20, prediction="eps", **betas)
    model = build(DiT, learn_sigma=True).requires_grad_(False)
    predict = process.guided(classifier_free_guidance)(model, torch.tensor([3, 4]), 1.5)
    theirs = xT = torch.randn(2, 2, 8, 8)
    rng = torch.manual_seed(1)
    for t in range(19, -1, -1):
        theirs = scheduler.step(predict(theirs, t), t, theirs, generator=rng).prev_sample
    rng = torch.manual_seed(1)
    *_, (_, ours, _) = process.ddpm_sample(predict, xT, lambda t: torch.randn(
        xT.shape, generator=rng), clip=False, steps=20)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_guidance_leaves_the_variances_alone():
    """Those of the class, whatever the guidance; the rest is that guidance's. Sampling uses it."""
    process, model, weak = LearnedVariance(), *(build(DiT, learn_sigma=True) for _ in range(2))
    C, y, t, x = 2, torch.tensor([3, 4]), torch.tensor([500, 500]), torch.randn(2, 2, 8, 8)

    def in_two_calls(model, y, cfg_scale):
        null = torch.full_like(y, model.null_class)
        return lambda xt, i: (1 - cfg_scale) * model(xt, t, null) + cfg_scale * model(xt, t, y)

    def the_other_way_round(model, y, cfg_scale):
        null = torch.full_like(y, model.null_class)
        return lambda xt, i: cfg_scale * model(xt, t, y) + (1 - cfg_scale) * model(xt, t, null)

    for guidance in (classifier_free_guidance, in_two_calls, the_other_way_round,
                     functools.partial(components.find_guidance("autoguidance"), weak=weak),
                     functools.partial(components.find_guidance("interval"), process=process,
                                       low=0.0, high=100.0)):
        out, plain = (g(model, y, 4.0)(x, 500) for g in (process.guided(guidance), guidance))
        torch.testing.assert_close(out[:, :C], plain[:, :C])
        torch.testing.assert_close(out[:, C:], model(x, t, y)[:, C:])
        assert not torch.allclose(out[:, C:], plain[:, C:])
    for scale, labels in [(1.0, y), (0.0, torch.full_like(y, model.null_class))]:
        out = process.guided(classifier_free_guidance)(model, y, scale)(x, 500)
        assert torch.equal(out, model(x, t, labels))
    sampling = dict(sampler="ddpm", steps=5, eta=0.0, cfg_scale=4.0)
    how = resolve_sampling(sample.Checkpoint(model, process, [], sampling, 0, ROOT))
    found = how["guidance"](model, y, 4.0)(x, 500)
    assert torch.equal(found, process.guided(classifier_free_guidance)(model, y, 4.0)(x, 500))


def test_bits_per_dimension_of_a_known_distribution():
    """x0 is standard normal (grey levels aside): so is every xt, the best output is known, and the
    bound is the entropy of a normal number in bins of 2/255, as far as the steps are small."""
    process = LearnedVariance(num_timesteps=200, beta_start=1e-4, beta_end=0.1, prediction="eps")
    x0 = 0.25 * torch.randn(64, 1, 4, 4)
    bar = process.alpha_bar.float()

    def best(xt, t, y):         # E[eps | xt], and the variance of x_{t-1} given xt: beta, nearly
        bar_t = bar[t].view(-1, 1, 1, 1)
        eps_hat = (1 - bar_t).sqrt() * xt / (bar_t * 0.25**2 + 1 - bar_t)
        return torch.cat([eps_hat, torch.ones_like(xt)], 1)

    entropy = math.log2(0.25 * math.sqrt(2 * math.pi * math.e) / (2 / 255))
    found = process.bits_per_dimension(best, x0, torch.zeros(64, dtype=torch.long)).mean().item()
    assert entropy < found < entropy + 0.6


# ---------------------------------------------------------------- rectified flow


def test_the_path_is_a_straight_line():
    process = RectifiedFlow()
    x0, eps = torch.randn(2, 5, 1, 4, 4)
    t = torch.tensor([0, 249, 499.5, 998, 999])
    s = ((t + 1) / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(process.q_sample(x0, t, eps)[:4], ((1 - s) * x0 + s * eps)[:4], atol=1e-6)
    assert torch.allclose(process.q_sample(x0, t, eps)[4], eps[4], atol=5e-3)
    assert torch.equal(process.target(x0, eps, t), eps - x0)
    later, earlier = (process.q_sample(x0, torch.full((5,), t), eps) for t in (600, 400))
    assert torch.allclose((later - earlier) / 0.2, eps - x0, atol=1e-5)
    assert process.alpha_sigma(499)[0].shape == (1, 1, 1, 1)
    assert process.to("meta") is process and process.alpha_sigma(3)[0].device.type == "meta"


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_right_output_has_no_loss_and_leads_to_x0(prediction):
    process = RectifiedFlow(prediction=prediction)
    x0, eps = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    t = torch.tensor([0, 411.7, 950])
    xt, target = process.q_sample(x0, t, eps), process.target(x0, eps, t)
    found = process.x0_and_eps(target, xt, t)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(found, (x0, eps), strict=True))
    loss = process.loss(lambda xt, t, y: target, x0, t, None, eps)
    assert not loss.any() and not process.loss_in_eps(loss, t).any()

    # an error of 0.1 in the output is this error in eps
    loss = process.loss(lambda xt, t, y: target + 0.1, x0, t, None, eps)
    _, eps_hat = process.x0_and_eps(target + 0.1, xt, t)
    assert torch.allclose(process.loss_in_eps(loss, t),
                          (eps_hat - eps).square().mean(dim=(1, 2, 3)), rtol=2e-2)

    def perfect(xt, t):
        alpha, sigma = process.alpha_sigma(t)
        return process.target(x0, (xt - alpha * x0) / sigma, t)

    for sampler in process.samplers.values():
        *_, (t, sampled, _) = sampler(perfect, eps, steps=4)
        assert torch.allclose(sampled, x0, atol=1e-3) and t == 249


def test_weightings_compare_errors_in_the_velocity():
    t = torch.tensor([100.0, 600.0])
    v, x0 = (RectifiedFlow(prediction=p, weighting="v") for p in ("v", "x0"))
    assert torch.allclose(v.loss_weight(t), torch.ones(2))
    assert torch.allclose(x0.loss_weight(t), ((t + 1) / 1000) ** -2)    # v = (xt - x0) / s
    assert x0.loss_weight(torch.zeros(1)).item() == pytest.approx(400)  # JiT's 0.05
    with pytest.raises(ValueError, match="'noise' is none of eps, v, x0"):
        RectifiedFlow(prediction="noise")


def test_timesteps_are_fractions_and_follow_the_noise_level():
    process, u = RectifiedFlow(), torch.tensor([0.0, 0.25, 0.9999999])
    t = process.t_from_uniform(u)
    assert t.is_floating_point() and t.min() >= 0 and t.max() < 1000
    assert torch.allclose(t / 999, u)
    level = torch.tensor([-3.0, 0.0, 0.8])
    t = process.t_from_noise_level(level)
    alpha, sigma = process.alpha_sigma(t)
    assert torch.allclose((sigma / alpha).log().flatten(), level, atol=1e-3)
    extreme = process.t_from_noise_level(torch.tensor([-50.0, 50.0]))
    assert extreme.tolist() == [0, 999]


def test_euler_is_of_first_and_heun_of_second_order():
    """For normal x0 of standard deviation 0.3 the best v is known, and so is where it leads: from
    xT to 0.3 xT. Twice the steps halve Euler's error and quarter Heun's."""
    process, xT = RectifiedFlow(prediction="v"), torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1, 1)

    def best(xt, t):
        s = (t + 1) / 1000
        return (s - (1 - s) * 0.09) / ((1 - s) ** 2 * 0.09 + s**2) * xt

    errors = {}
    for name, sampler in process.samplers.items():
        for steps in (20, 40, 80):
            *_, (_, sampled, _) = sampler(best, xT.double(), clip=False, steps=steps)
            errors[name, steps] = (sampled - 0.3 * xT).abs().max().item()
    for steps in (40, 80):
        assert errors["euler", steps // 2] / errors["euler", steps] == pytest.approx(2, rel=0.15)
        assert errors["heun", steps // 2] / errors["heun", steps] == pytest.approx(4, rel=0.25)
    assert errors["heun", 20] < errors["euler", 40] / 3         # 39 and 40 evaluations


def test_samplers_evaluate_the_network_at_the_right_times():
    process, calls = RectifiedFlow(), []

    def predict(xt, t):
        calls.append(t)
        return torch.zeros_like(xt)

    xT = torch.randn(2, 1, 4, 4)
    assert [t for t, *_ in process.samplers["euler"](predict, xT, steps=4)] == [999, 749, 499, 249]
    assert calls == pytest.approx([999, 749, 499, 249])
    calls.clear()
    assert len(list(process.samplers["heun"](predict, xT, steps=3))) == 3
    assert len(calls) == 5 and min(calls) > 0                   # two each, the last one
    assert len(list(process.samplers["euler"](predict, xT, steps=1))) == 1
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="from 1 to 1000 are possible"):
            next(process.samplers["euler"](predict, xT, steps=steps))


def test_guidance_passes_fractions_to_the_network():
    seen = []

    def model(x, t, y):
        seen.append(t)
        return x * 0

    model.null_class = 3
    predict = classifier_free_guidance(model, torch.tensor([0, 1]), 2.0)
    next(RectifiedFlow().euler_sample(predict, torch.randn(2, 1, 4, 4), steps=7))
    assert seen[0].is_floating_point() and seen[0].tolist() == [999.0] * 4


def test_a_process_without_the_usual_sampler_suggests_its_own():
    usual = dict(sampler="ddim", steps=50, eta=0.0, cfg_scale=1.5)
    assert components.sampling_for(GaussianDiffusion(), usual) == usual
    assert components.sampling_for(RectifiedFlow(), usual) == dict(usual, sampler="euler")
    short = Namespace(samplers={"mine": None}, num_timesteps=10)
    assert components.sampling_for(short, usual) == dict(usual, sampler="mine", steps=10)
