"""The network: a Diffusion Transformer (DiT) with adaLN-Zero blocks.

Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748. Given a noisy
image, its timestep and its class, the network predicts the noise, the clean image, or a mixture
of both (diffusion.py). `python dit.py` prints and checks these shapes for DiT-Nano/7, whose
patches have 7 x 7 pixels, as on a CPU:

    xt                         (B, 1, 28, 28)      t (B,), y (B,)
      patchify                 (B, 16, 49)           -> embeddings -> sum:  c (B, D)
      x_embedder + pos_embed   (B, 16, D)                                   |
      blocks[0] ... [depth-1]  (B, 16, D)           <-- shift, scale, gate -+
      final_layer              (B, 16, 49)          <-- shift, scale -------+
      unpatchify               (B, 1, 28, 28)

Legend: B batch, C channels (C_out: of the output), H image side, p patch side,
N = (H/p)^2 tokens, D width.
Parameter names are those of the published code; of its weights, `linear_patch_weight` reshapes one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- images <-> tokens


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut images (B, C, H, H) into non-overlapping p x p patches: tokens (B, N, p*p*C).

    Patches are in reading order; inside a token the order is (row, column, channel). With p = 2
    a 4x4 image of one channel, numbered in reading order, becomes 4 tokens:
    [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]. DiT section 3.2, "Patchify".
    """
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)                    # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(tokens: Tensor, p: int, C: int) -> Tensor:
    """The inverse of `patchify` for square images: tokens (B, N, p*p*C) -> (B, C, H, H)."""
    B, N, _ = tokens.shape
    side = math.isqrt(N)                               # H / p
    x = tokens.reshape(B, side, side, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)                    # (B, C, H/p, p, W/p, p)
    return x.reshape(B, C, side * p, side * p)


class PatchEmbed(nn.Module):
    """A linear map of each token (B, N, p*p*C) to the width D: (B, N, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(patch_size * patch_size * in_channels, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


def linear_patch_weight(kernel: Tensor) -> Tensor:
    """The weight (D, p*p*C) of `PatchEmbed` that equals a convolution's kernel (D, C, p, p).

    The published code embeds patches by a convolution whose kernel and stride are p: the same map,
    with the numbers of a patch in another order. It is the one published weight to be reshaped.
    """
    return kernel.permute(0, 2, 3, 1).flatten(1)


# ---------------------------------------------------------------- position, timestep, class


def sincos_1d(pos: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of positions (M,) at dim/2 frequencies 10000^(-2i/dim): (M, dim).

    Vaswani et al., arXiv 1706.03762, section 3.5. Computed in float64.
    """
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = torch.outer(pos.double(), omega)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(hidden_size: int, side: int) -> Tensor:
    """Embeddings of the positions of a side x side grid, in reading order: (1, N, D), float32.

    Without them attention could not tell patches apart by position. The first half of the D
    numbers encodes the column (W), the second half the row (H), as in the published weights.
    """
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [sincos_1d(pos.flatten(), hidden_size // 2) for pos in (column, row)]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> cosines, then sines, of t * freqs -> an MLP: (B, D). DiT appendix A."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        half = frequency_embedding_size // 2
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        freqs = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.freqs        # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Labels (B,) in 0..num_classes -> (B, D). Row `num_classes` stands for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


# ---------------------------------------------------------------- the block


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D): the only place where tokens exchange
    information. `qkv` gives q, k, v, each to be split into heads. For each token, a head averages
    the v of all tokens, weighted by softmax(q k / sqrt(D / heads)); `proj` mixes the heads."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)           # each (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two layers with GELU (its tanh form) between them, applied to each token separately."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def plain_norm(hidden_size: int) -> nn.LayerNorm:
    """A LayerNorm without learned weights: `modulate` supplies its shift and scale."""
    return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The "ada" of adaLN: scale and shift tokens (B, N, D) by vectors computed from c, (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """A transformer block whose LayerNorms take shift and scale from c, and whose two residual
    branches are multiplied by a gate, also from c: shift, scale, gate of the attention, then of the
    MLP. The layer that computes them starts at zero: the gates are 0 and a fresh block is the
    identity. DiT section 3.2, "adaLN-Zero block"."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = plain_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = plain_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        six = self.adaLN_modulation(c).chunk(6, dim=-1)              # each (B, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = six
        attn = self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + gate_attn.unsqueeze(1) * attn
        mlp = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + gate_mlp.unsqueeze(1) * mlp


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> (B, N, p*p*C_out), modulated by c once more."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = plain_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ---------------------------------------------------------------- the model


class DiT(nn.Module):
    """model(x, t, y): the network's prediction for noisy images x (B, C, H, H) at timesteps t (B,)
    with labels y (B,).

    x is float32; t holds integers or fractions in 0..999; y integers in 0..num_classes, where
    `null_class` = num_classes means "no class" (classifier-free guidance). Returns float32
    (B, C, H, H); with `learn_sigma`, (B, 2C, H, H), the second half being the variance channels
    of Nichol & Dhariwal (arXiv 2102.09672). Any in_channels, any input_size that patch_size
    divides. Raises ValueError for sizes that do not fit together; `forward` asserts x's shape.
    """

    block, final = DiTBlock, FinalLayer         # variants/ has others

    def __init__(
        self,
        input_size: int = 28,
        patch_size: int = 4,
        in_channels: int = 1,
        hidden_size: int = 128,
        depth: int = 4,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
        learn_sigma: bool = False,
    ):
        super().__init__()
        if input_size % patch_size:
            fits = ", ".join(str(p) for p in range(1, input_size + 1) if input_size % p == 0)
            raise ValueError(f"patch size {patch_size} does not divide image size {input_size} "
                             f"(patches that do: {fits})")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"width {hidden_size} must be a multiple of 4 and of the number of "
                             f"heads, {num_heads}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = self.null_class = num_classes

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.register_buffer("pos_embed", sincos_2d(hidden_size, input_size // patch_size))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(
            self.block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = self.final(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise all weights; the zeros come last, so that nothing overwrites them.

        Zeros: DiT section 3.2, "adaLN-Zero block", and section 4, "Training"; the 0.02 of the
        embeddings: the published code.
        """
        linear = [m for m in self.modules() if isinstance(m, nn.Linear)]
        for layer in (*linear[1:], linear[0]):  # x_embedder last: old seeds keep their weights
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.y_embedder.embedding_table, *self.t_embedder.mlp[::2]):
            nn.init.normal_(layer.weight, std=0.02)
        modulations = [m.adaLN_modulation[-1] for m in self.modules()
                       if hasattr(m, "adaLN_modulation")]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.shape[1:] == (self.in_channels, self.input_size, self.input_size), x.shape
        x = patchify(x, self.patch_size)                            # (B, N, p*p*C)
        x = self.x_embedder(x) + self.pos_embed                     # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)                 # (B, D)
        for block in self.blocks:
            x = block(x, c)                                         # (B, N, D)
        with torch.autocast(x.device.type, enabled=False):          # bf16 keeps 8 bits, too few
            x = self.final_layer(x.float(), c.float())              # for pixels. (B, N, p*p*C_out)
        return unpatchify(x, self.patch_size, self.out_channels)    # (B, C_out, H, H)


# ---------------------------------------------------------------- named sizes

def size(patch_size: int, hidden_size: int, depth: int, num_heads: int) -> dict:
    return dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)


MODELS = {                                  # XL to S: DiT table 1; the others are for digits
    "DiT-XL/2": size(2, 1152, 28, 16), "DiT-XL/4": size(4, 1152, 28, 16),
    "DiT-XL/8": size(8, 1152, 28, 16),
    "DiT-L/2": size(2, 1024, 24, 16), "DiT-L/4": size(4, 1024, 24, 16),
    "DiT-L/8": size(8, 1024, 24, 16),
    "DiT-B/2": size(2, 768, 12, 12), "DiT-B/4": size(4, 768, 12, 12),
    "DiT-B/8": size(8, 768, 12, 12),
    "DiT-S/2": size(2, 384, 12, 6), "DiT-S/4": size(4, 384, 12, 6), "DiT-S/8": size(8, 384, 12, 6),
    "DiT-Mini/2": size(2, 256, 6, 4), "DiT-Mini/4": size(4, 256, 6, 4),
    "DiT-Mini/7": size(7, 256, 6, 4), "DiT-Mini/14": size(14, 256, 6, 4),
    "DiT-Micro/2": size(2, 192, 5, 3), "DiT-Micro/4": size(4, 192, 5, 3),
    "DiT-Micro/7": size(7, 192, 5, 3), "DiT-Micro/14": size(14, 192, 5, 3),
    "DiT-Nano/2": size(2, 128, 4, 2), "DiT-Nano/4": size(4, 128, 4, 2),
    "DiT-Nano/7": size(7, 128, 4, 2), "DiT-Nano/14": size(14, 128, 4, 2),
    "DiT-Nano-8/7": size(7, 128, 8, 2), "DiT-Nano-16/7": size(7, 128, 16, 2),   # deeper
    "DiT-Nano-28/7": size(7, 128, 28, 2),
}
"""Name -> keyword arguments of `DiT`; input_size, in_channels and num_classes are the data's."""


if __name__ == "__main__":
    model = DiT(**MODELS["DiT-Nano/7"], input_size=28, in_channels=1, num_classes=10)
    xt = torch.randn(2, 1, 28, 28)
    t, y = torch.tensor([0, 999]), torch.tensor([3, model.null_class])
    tokens = patchify(xt, 7)
    x = model.x_embedder(tokens) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y)
    out = model(xt, t, y)
    for name, value, shape in [
        ("xt", xt, (2, 1, 28, 28)),
        ("patchify", tokens, (2, 16, 49)),
        ("embedded", x, (2, 16, 128)),
        ("c", c, (2, 128)),
        ("block", model.blocks[0](x, c), (2, 16, 128)),
        ("final_layer", model.final_layer(x, c), (2, 16, 49)),
        ("output", out, (2, 1, 28, 28)),
    ]:
        assert value.shape == shape, (name, value.shape)
        print(f"{name:12} {tuple(value.shape)}")
    assert torch.equal(unpatchify(tokens, 7, 1), xt), "unpatchify must invert patchify"
    assert torch.equal(model.blocks[0](x, c), x), "a fresh block is the identity"
    assert not out.any(), "a fresh model outputs zeros"
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
