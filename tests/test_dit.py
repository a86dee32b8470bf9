"""dit.py against the published model's numbers and its own promises.

Tolerances come from float32, whose numbers are 2^-23 apart (relative): the same sum in another
order, as on another CPU, differs by a few of these for each number added.
"""

import inspect
import json
import math
import re
import zlib

import numpy as np
import pytest
import torch

from conftest import ROOT
from dit import MODELS, DiT, linear_patch_weight, patchify, unpatchify

PUBLISHED = json.loads((ROOT / "tests" / "published_outputs.json").read_text())
PATCH = "x_embedder.proj.weight"                # the one weight that is reshaped
TINY = dict(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def published_numbers(name, shape):
    """Numbers in [-1, 1) that depend on a name alone. The published model was given the same."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return torch.from_numpy((raw >> np.uint64(11)) / 2.0**52 - 1).reshape(shape)


def fill(model):
    """Give every parameter such numbers, at a scale at which each of them matters. The patch
    embedding gets them as the kernel (D, C, p, p) of the published convolution."""
    state = model.state_dict()
    for name, p in model.named_parameters():
        shape = p.shape if name != PATCH else (
            len(p), model.in_channels, model.patch_size, model.patch_size)
        scale = 0.3 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5
        state[name] = scale * published_numbers(name, shape)
    state[PATCH] = linear_patch_weight(state[PATCH])
    model.load_state_dict(state, strict=True)
    return model.eval()


def inputs(model, B=4):
    x = torch.randn(B, model.in_channels, model.input_size, model.input_size)
    return x, torch.linspace(0, 999, B).long(), torch.arange(B) % (model.num_classes + 1)


# ---------------------------------------------------------------- the published model


def test_published_weights_give_the_published_output():
    """To 1e-3: at t = 999 float32 leaves the timestep's angles an error of up to 1e-4."""
    for i, case in enumerate(PUBLISHED["cases"]):
        C, H = case["config"]["in_channels"], case["config"]["input_size"]
        model = fill(DiT(**case["config"]))
        x = 2 * published_numbers(f"x{i}", (3, C, H, H)).float()
        t, y = torch.tensor(PUBLISHED["t"]), torch.tensor(PUBLISHED["y"])
        assert t.tolist() == [0, 500, 999] and model.null_class in y
        out = model(x, t, y).detach()
        assert list(out.shape) == case["output_shape"]
        published = torch.tensor(case["output"], dtype=torch.float64).reshape(out.shape)
        apart = (out - published).abs().amax(dim=(1, 2, 3))
        print(f"\n{C} channels: outputs up to {published.abs().max():.2f}, largest absolute "
              f"difference from the published model's {apart.max():.1e}", end="")
        assert apart[0] < 2e-5 and apart.max() < 1e-3


def test_positions_and_timesteps_are_the_published_ones():
    for case in PUBLISHED["cases"]:
        table = DiT(**case["config"]).pos_embed
        published = torch.tensor(case["pos_embed"]).reshape(table.shape)
        assert (table - published).abs().max() < 2e-7           # computed in float64
    embedder = DiT(**TINY).t_embedder
    embedder.mlp = torch.nn.Identity()
    t = torch.tensor([0, 1, 30, 999])
    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    angle = t[:, None].double() * torch.from_numpy(frequencies)
    exact = torch.cat([angle.cos(), angle.sin()], dim=1)
    assert ((embedder(t) - exact).abs() <= 2**-22 * (1 + t[:, None])).all()
    assert (embedder(t)[3] - torch.tensor(PUBLISHED["timestep_999"])).abs().max() < 1000 * 2**-22


def test_names_and_shapes_are_the_published_ones():
    model = DiT(**PUBLISHED["cases"][1]["config"])
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    D, C, p, _ = PUBLISHED["state_dict"][PATCH]
    assert ours == PUBLISHED["state_dict"] | {PATCH: [D, p * p * C]}
    assert not model.pos_embed.requires_grad
    assert list(inspect.signature(DiT).parameters) == [
        "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
        "mlp_ratio", "num_classes", "learn_sigma"]


def test_named_models_have_the_published_sizes(monkeypatch):
    for module, method in [(DiT, "initialize_weights"), (torch.nn.Linear, "reset_parameters"),
                           (torch.nn.Embedding, "reset_parameters")]:
        monkeypatch.setattr(module, method, lambda self: None)      # for speed
    assert set(PUBLISHED["parameters"]) < set(MODELS)
    for name, size in MODELS.items():
        model = DiT(**{**size, "depth": 1, "input_size": 28 if size["patch_size"] % 7 == 0 else 32},
                    in_channels=4, num_classes=1000, learn_sigma=True)
        count, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.blocks[0]))
        assert name.endswith(f"/{model.patch_size}")
        if name in PUBLISHED["parameters"]:
            assert count + (size["depth"] - 1) * block == PUBLISHED["parameters"][name], name
            assert model.blocks[0].attn.num_heads == PUBLISHED["num_heads"][name]


# ---------------------------------------------------------------- images <-> tokens


def test_patch_order_is_row_column_channel():
    image = torch.arange(16).view(1, 1, 4, 4)                   # the docstring's
    assert patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13],
                                              [10, 11, 14, 15]]
    tokens = torch.arange(48).view(1, 4, 12)
    image = unpatchify(tokens, 2, 3)
    for c, row, column in np.ndindex(3, 4, 4):
        token, place = row // 2 * 2 + column // 2, row % 2 * 2 + column % 2
        assert image[0, c, row, column] == tokens[0, token, place * 3 + c]
    for p in (1, 2, 3, 4, 6, 12):
        x = torch.randn(2, 3, 12, 12)
        assert patchify(x, p).shape == (2, (12 // p) ** 2, p * p * 3)
        assert torch.equal(unpatchify(patchify(x, p), p, 3), x)


# ---------------------------------------------------------------- the fresh model


def test_fresh_block_is_the_identity_and_a_fresh_model_outputs_zeros():
    model = DiT(**TINY, in_channels=3, learn_sigma=True)
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert all(torch.equal(block(x, c), x) for block in model.blocks)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(*inputs(model))
        assert out.shape == (4, 6, 8, 8) and out.dtype == torch.float32 and not out.any()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * 5           # too small to show in an output


def test_initialisation_is_the_papers():
    """Zeros for every adaLN and the output, normal(0.02) for the embeddings, xavier elsewhere."""
    model = DiT(input_size=28, patch_size=7, in_channels=3, hidden_size=128, depth=3, num_heads=4)
    found = {"zero": 0, "normal": 0, "xavier": 0}
    for name, p in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name or name.endswith("bias"):
            kind, std = "zero", 0
        elif "t_embedder" in name or "y_embedder" in name:
            kind, std = "normal", 0.02
        else:
            kind, std = "xavier", (2 / sum(p.shape)) ** 0.5
            assert 0.99 < p.abs().max() / (std * 3**0.5) < 1 + 1e-6, name       # uniform
        found[kind] += 1
        assert p.std().item() == pytest.approx(std, rel=0.1 if kind == "normal" else 0.03), name
        assert kind != "zero" or not p.any()
    assert found == {"zero": 1 + 2 + 3 * 6 + 4, "normal": 3, "xavier": 1 + 3 * 4}


# ---------------------------------------------------------------- the whole model


def test_output_depends_on_image_time_and_label_alike_in_training_and_in_evaluation():
    """No label dropout, nor any other chance, in the module. And every parameter counts."""
    model = fill(DiT(**TINY, num_classes=7))
    x = torch.randn(1, 1, 8, 8).expand(40, -1, -1, -1)
    y, t = torch.arange(40) % 8, torch.arange(40) // 8 * 100    # label 7: "no class"
    out = model(x, t, y)
    assert model.null_class == model.num_classes == 7
    assert len(out.flatten(1).unique(dim=0)) == 40
    assert torch.equal(model.train()(x, t, y), out)
    assert torch.equal(model(x, t.float(), y), out)             # t may be a fraction
    assert (model(x, t + 0.5, y) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with pytest.raises(IndexError):
        model(x, t, y + 1)


def test_final_layer_is_float32_under_autocast():
    model, seen = fill(DiT(**TINY)), {}
    for name in ("blocks.1.mlp.fc2", "final_layer.linear", "final_layer.adaLN_modulation.1"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.dtype}))
    batch = inputs(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(*batch)
    assert list(seen.values()) == [torch.bfloat16, torch.float32, torch.float32]
    assert out.dtype == torch.float32
    assert not torch.equal(out.bfloat16().float(), out)         # not rounded on the way
    assert (out - model(*batch)).abs().max() < 0.2              # bf16: 8 bits


def test_any_channels_sizes_patches_and_classes():
    for C, H, p, classes, sigma in [(1, 28, 1, 10, False), (1, 28, 28, 10, False),
                                    (2, 20, 4, 3, True), (5, 4, 4, 1, True)]:
        model = fill(DiT(input_size=H, patch_size=p, in_channels=C, hidden_size=16, depth=1,
                         num_heads=2, num_classes=classes, learn_sigma=sigma))
        x, t, y = inputs(model)
        out = model(x, t, y)
        assert out.shape == (4, 2 * C if sigma else C, H, H) and out.std() > 0.1
        with pytest.raises(AssertionError):
            model(x[..., :-1], t, y)


def test_sizes_that_do_not_fit_are_named():
    for wrong, text in [
        (dict(input_size=28, patch_size=8), "patch size 8 does not divide image size 28 "
                                            "(patches that do: 1, 2, 4, 7, 14, 28)"),
        (dict(hidden_size=64, num_heads=3), "width 64 must be a multiple of 4 and of the number"),
        (dict(hidden_size=30, num_heads=3), "width 30 must be a multiple of 4"),
    ]:
        with pytest.raises(ValueError, match=re.escape(text)):
            DiT(**wrong)
