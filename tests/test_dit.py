"""dit.py against the published model's numbers, independent formulas and its own promises."""

import inspect
import json
import math
import runpy
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dit
from conftest import ROOT
from dit import MODELS, Attention, DiT, DiTBlock, LabelEmbedder, PatchEmbed, patchify, unpatchify

PUBLISHED = json.loads((ROOT / "tests" / "published_outputs.json").read_text())
CASES = pytest.mark.parametrize(
    "case", PUBLISHED["cases"], ids=lambda case: f"{case['config']['in_channels']}-channel"
)
TINY = dict(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def published_numbers(name, shape):
    """Numbers in [-1, 1) that depend on a name alone. The published model was given the same."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return torch.from_numpy((raw >> np.uint64(11)) / 2.0**52 - 1).reshape(shape)


def fill(model):
    """Give every parameter such numbers, at a scale at which each of them matters."""
    state = {name: (0.3 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5)
             * published_numbers(name, p.shape) for name, p in model.named_parameters()}
    model.load_state_dict({**model.state_dict(), **state}, strict=True)
    return model.eval()


# ---------------------------------------------------------------- the published model


def test_published_weights_give_the_published_output():
    diffs = []
    for i, case in enumerate(PUBLISHED["cases"]):
        C, H = case["config"]["in_channels"], case["config"]["input_size"]
        model = fill(DiT(**case["config"]))
        x = 2 * published_numbers(f"x{i}", (3, C, H, H)).float()
        t, y = torch.tensor(PUBLISHED["t"]), torch.tensor(PUBLISHED["y"])
        assert {0, 999} <= set(t.tolist()) and model.null_class in y
        with torch.no_grad():
            out = model(x, t, y)
        assert list(out.shape) == case["output_shape"]
        published = torch.tensor(case["output"], dtype=torch.float64).reshape(out.shape)
        diffs.append((out.double() - published).abs().max().item())
        print(f"\n{C} channels: outputs up to {published.abs().max():.2f}, largest absolute "
              f"difference from the published model's {diffs[-1]:.1e}", end="")
    print(f"\nlargest of all: {max(diffs):.1e}")
    assert max(diffs) < 1e-5


@CASES
def test_positional_table_is_the_published_one(case):
    table = DiT(**case["config"]).pos_embed
    published = torch.tensor(case["pos_embed"]).reshape(table.shape)
    assert (table - published).abs().max() < 1e-6


def test_timestep_sinusoids_are_the_published_ones():
    embedder = DiT(**TINY).t_embedder
    embedder.mlp = torch.nn.Identity()
    sinusoids = embedder(torch.tensor([0, 999]))
    assert torch.equal(sinusoids[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    published = torch.tensor(PUBLISHED["timestep_999"])
    assert (sinusoids[1] - published).abs().max() < 1e-6


def test_state_dict_has_the_published_names_and_shapes():
    model = DiT(**PUBLISHED["cases"][1]["config"])
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert ours == PUBLISHED["state_dict"]
    assert not model.pos_embed.requires_grad


def test_keyword_arguments_are_the_published_ones():
    assert list(inspect.signature(DiT).parameters) == [
        "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
        "mlp_ratio", "num_classes", "learn_sigma",
    ]


@pytest.mark.parametrize("name", PUBLISHED["parameters"])
def test_named_models_have_the_published_sizes(name):
    with torch.device("meta"):
        model = DiT(**MODELS[name], input_size=32, in_channels=4, num_classes=1000,
                    learn_sigma=True)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED["parameters"][name]
    assert model.patch_size == int(name.split("/")[1])
    assert {b.attn.num_heads for b in model.blocks} == {PUBLISHED["num_heads"][name]}


# ---------------------------------------------------------------- images <-> tokens


def test_patch_order_of_the_docstring():
    image = torch.arange(16).view(1, 1, 4, 4)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert patchify(image, 2)[0].tolist() == expected


def test_patch_order_is_row_column_channel():
    """Three channels: 16 c + 4 row + column. With one, a wrong order would not show."""
    image = torch.arange(48).view(1, 3, 4, 4)
    tokens = patchify(image, 2)[0]
    assert tokens[0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert tokens[1].tolist() == [2, 18, 34, 3, 19, 35, 6, 22, 38, 7, 23, 39]
    assert tokens[2].tolist() == [8, 24, 40, 9, 25, 41, 12, 28, 44, 13, 29, 45]
    tokens = torch.arange(48).view(1, 4, 12)                # and the way back, pixel by pixel
    image = unpatchify(tokens, 2, 3)
    for c in range(3):
        for row in range(4):
            for column in range(4):
                token, place = row // 2 * 2 + column // 2, row % 2 * 2 + column % 2
                assert image[0, c, row, column] == tokens[0, token, place * 3 + c]


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 12])
def test_unpatchify_inverts_patchify(p):
    x = torch.randn(2, 3, 12, 12)
    tokens = patchify(x, p)
    assert tokens.shape == (2, (12 // p) ** 2, p * p * 3)
    assert torch.equal(unpatchify(tokens, p, 3), x)


def test_patch_embedding_is_the_strided_convolution():
    embed, x = PatchEmbed(4, 3, 32), torch.randn(2, 3, 12, 12)
    expected = embed.proj(x).flatten(2).transpose(1, 2)     # (B, N, D)
    assert torch.allclose(embed(patchify(x, 4)), expected, atol=1e-5)


# ---------------------------------------------------------------- embeddings


def test_positional_table_has_the_column_in_its_first_half():
    table = dit.sincos_2d(32, 5).view(5, 5, 32)             # (row, column, D)
    assert torch.equal(table[0, 2, 16:], table[0, 3, 16:])          # neighbours in a row
    assert not torch.equal(table[0, 2, :16], table[0, 3, :16])
    assert torch.equal(table[2, 0, :16], table[3, 0, :16])          # neighbours in a column
    assert not torch.equal(table[2, 0, 16:], table[3, 0, 16:])
    assert len(table.view(25, 32).unique(dim=0)) == 25
    assert table[0, 3, 0] == np.float32(math.sin(3)) and table[0, 3, 8] == np.float32(math.cos(3))


def test_labels_have_one_row_more_for_no_class():
    model = fill(DiT(**TINY, num_classes=7))
    table = model.y_embedder.embedding_table.weight
    assert table.shape == (8, 32) and model.null_class == model.num_classes == 7
    assert torch.equal(model.y_embedder(torch.tensor([7, 0, 3])), table[[7, 0, 3]])
    assert LabelEmbedder(3, 32)(torch.tensor([3])).shape == (1, 32)
    with pytest.raises(IndexError):
        model.y_embedder(torch.tensor([8]))


def test_output_depends_on_time_and_label_alike_in_training_and_in_evaluation():
    """No label dropout, nor any other chance, in the module."""
    model, x = fill(DiT(**TINY)), torch.randn(1, 1, 8, 8).expand(40, -1, -1, -1)
    y, t = torch.arange(40) % 4, torch.arange(40) // 4 * 100
    out = model.eval()(x, t, y)
    assert len(out.flatten(1).unique(dim=0)) == 40
    assert torch.equal(model.train()(x, t, y), out)


def test_timesteps_may_be_fractions():
    model, x = fill(DiT(**TINY)), torch.randn(3, 1, 8, 8)
    y = torch.tensor([1, 2, 3])
    whole = model(x, torch.tensor([5, 6, 7]), y)
    assert torch.equal(model(x, torch.tensor([5.0, 6.0, 7.0]), y), whole)
    assert not torch.allclose(model(x, torch.tensor([5.5, 6.5, 7.5]), y), whole, atol=1e-4)


# ---------------------------------------------------------------- the block


def test_attention_is_softmax_of_scaled_products():
    attention, x = Attention(32, 4), torch.randn(2, 9, 32)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    assert torch.allclose(attention(x), attention.proj(torch.cat(heads, dim=-1)), atol=1e-5)


def test_fresh_block_is_the_identity():
    block = DiT(**TINY).blocks[0]
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(block(x, c), x)
    torch.nn.init.ones_(block.adaLN_modulation[-1].bias)    # and an open gate is not
    assert not torch.allclose(block(x, c), x, atol=0.1)


def test_block_follows_its_formula():
    block = DiTBlock(32, 4)
    x, c = torch.randn(2, 9, 32), torch.randn(2, 32)
    six = F.linear(F.silu(c), *block.adaLN_modulation[1].parameters()).view(2, 6, 1, 32)
    shift1, scale1, gate1, shift2, scale2, gate2 = six.unbind(1)

    def norm(x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(x):
        return x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    expected = x + gate1 * block.attn(norm(x) * (1 + scale1) + shift1)
    inner = block.mlp.fc1(norm(expected) * (1 + scale2) + shift2)
    expected = expected + gate2 * block.mlp.fc2(gelu(inner))
    assert torch.allclose(block(x, c), expected, atol=1e-5)
    assert torch.allclose(block.norm1(1e-3 * x), norm(1e-3 * x), atol=1e-4)     # where eps counts


# ---------------------------------------------------------------- the fresh model


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_fresh_model_outputs_zeros(autocast):
    model = DiT(**TINY, in_channels=3, learn_sigma=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(torch.randn(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10]))
    assert out.shape == (2, 6, 8, 8) and out.dtype == torch.float32 and not out.any()


def test_initialisation_is_the_papers():
    """Zeros for every adaLN and the output, normal(0.02) for the embeddings, xavier elsewhere."""
    model = DiT(input_size=28, patch_size=7, in_channels=3, hidden_size=128, depth=3, num_heads=4)
    kinds = {"zero": 0, "normal": 0, "xavier": 0}
    for name, p in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name or name.endswith("bias"):
            if not ("t_embedder" in name and name.endswith("bias")):
                kinds["zero"] += 1
                assert not p.any(), name
        elif "t_embedder" in name or "y_embedder" in name:
            kinds["normal"] += 1
            assert 0.018 < p.std() < 0.022 and p.abs().max() > 0.05, name
        else:
            kinds["xavier"] += 1
            fan_out, fan_in = len(p), p[0].numel()
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.99 * bound < p.abs().max() <= bound, name
            assert abs(p.std() / (bound / 3**0.5) - 1) < 0.03, name
    assert kinds == {"zero": 4 + 1 + 3 * 6, "normal": 3, "xavier": 1 + 3 * 4}


def test_every_parameter_of_a_filled_model_gets_a_gradient():
    model = fill(DiT(**TINY, learn_sigma=True))
    out = model(torch.randn(4, 1, 8, 8), torch.tensor([0, 9, 99, 999]), torch.tensor([3, 10, 1, 2]))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------- precision, sizes, names


def test_final_layer_is_float32_under_autocast():
    model, x = fill(DiT(**TINY)), torch.randn(4, 1, 8, 8)
    t, y = torch.tensor([0, 9, 99, 999]), torch.tensor([3, 10, 1, 2])
    seen = {}
    for name in ("blocks.1.mlp.fc2", "final_layer.linear", "final_layer.adaLN_modulation.1"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out.dtype}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert seen == {"blocks.1.mlp.fc2": torch.bfloat16, "final_layer.linear": torch.float32,
                    "final_layer.adaLN_modulation.1": torch.float32}
    assert out.dtype == torch.float32
    assert not torch.equal(out.bfloat16().float(), out)             # not rounded on the way
    assert (out - model(x, t, y)).abs().max() < 0.2


@pytest.mark.parametrize("p", [1, 2, 4, 7, 14, 28])
def test_28x28_works_for_every_patch_that_divides_it(p):
    model = fill(DiT(input_size=28, patch_size=p, hidden_size=16, depth=1, num_heads=2))
    x = torch.randn(2, 1, 28, 28)
    out = model(x, torch.tensor([0, 999]), torch.tensor([3, 10]))
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0.1
    assert model.pos_embed.shape == (1, (28 // p) ** 2, 16)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_any_channels_sizes_and_classes(learn_sigma):
    for C, H, classes in [(1, 28, 10), (2, 20, 3), (3, 32, 100), (5, 4, 1)]:
        model = DiT(input_size=H, patch_size=4, in_channels=C, hidden_size=16, depth=1, num_heads=2,
                    num_classes=classes, learn_sigma=learn_sigma)
        out = model(torch.randn(2, C, H, H), torch.tensor([0, 999]), torch.tensor([0, classes]))
        assert out.shape == (2, 2 * C if learn_sigma else C, H, H)
        assert model.out_channels == out.shape[1]
    assert DiT(**TINY).out_channels == 1                            # the default: no sigma


@pytest.mark.parametrize("wrong, text", [
    (dict(input_size=28, patch_size=8), r"patch size 8 does not divide image size 28 "
                                        r"\(patches that do: 1, 2, 4, 7, 14, 28\)"),
    (dict(hidden_size=64, num_heads=3), "width 64 must be a multiple of 4 and of .* heads, 3"),
    (dict(hidden_size=30, num_heads=3), "width 30 must be a multiple of 4"),
])
def test_sizes_that_do_not_fit_are_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        DiT(**wrong)


def test_images_of_another_size_are_refused():
    model, t, y = DiT(**TINY), torch.tensor([0]), torch.tensor([0])
    for shape in [(1, 1, 4, 4), (1, 3, 8, 8), (1, 1, 8, 10)]:
        with pytest.raises(AssertionError):
            model(torch.randn(shape), t, y)


def test_registry_names_the_papers_models_and_small_ones():
    papers = {f"DiT-{size}/{p}" for size in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    assert papers == set(PUBLISHED["parameters"]) and papers < set(MODELS)
    for name in set(MODELS) - papers:                               # ours, for 28x28
        with torch.device("meta"):
            model = DiT(**MODELS[name], input_size=28, in_channels=1, num_classes=10)
        assert sum(p.numel() for p in model.parameters()) < 15e6
        assert name.endswith(f"/{model.patch_size}")


def test_running_the_file_prints_the_table_of_its_docstring(capsys):
    runpy.run_path(str(ROOT / "dit.py"), run_name="__main__")
    shapes = ["(2, 1, 28, 28)", "(2, 16, 49)", "(2, 16, 128)", "(2, 128)", "(2, 16, 128)",
              "(2, 16, 49)", "(2, 1, 28, 28)"]
    lines = capsys.readouterr().out.splitlines()
    assert [line[line.index("("):] for line in lines[: len(shapes)]] == shapes
    assert "1,283,889 parameters" in lines[-1]
