"""The three block designs that the DiT paper compares with adaLN-Zero, section 3.2 and figure 5.

    --network adaln              shift and scale from c, but no gate: a fresh block is an ordinary
                                 transformer block, not the identity
    --network cross-attention    a third branch, in which image tokens attend to t and y: 16% more
                                 multiply-adds in DiT-XL/2
    --network in-context         t and y are two more tokens: less than 1% more at 256 tokens

The last two have no modulation. Their LayerNorms have learned weights, the same for all t and y.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import Attention, DiT, DiTBlock, Mlp, modulate, patchify, unpatchify

# ---------------------------------------------------------------- adaLN


class AdaLNBlock(DiTBlock):
    """The lesson's block without its two gates: 4 D numbers are computed from c, not 6 D."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaLNDiT(DiT):
    block = AdaLNBlock


# ---------------------------------------------------------------- in-context conditioning


def learned_norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, eps=1e-6)


class ViTBlock(nn.Module):
    """A pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = learned_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = learned_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainFinalLayer(nn.Module):
    """Tokens (B, N, D) -> (B, N, p*p*C_out)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = learned_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class InContextDiT(DiT):
    """t and y are the last two tokens of the sequence, removed after the last block. Attention
    reads them, as it would a class token."""

    block, final = ViTBlock, PlainFinalLayer

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(patchify(x, self.patch_size)) + self.pos_embed      # (B, N, D)
        c = torch.stack([self.t_embedder(t), self.y_embedder(y)], dim=1)        # (B, 2, D)
        x = torch.cat([x, c], dim=1)                                            # (B, N + 2, D)
        for block in self.blocks:
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):
            x = self.final_layer(x[:, :-2].float())                 # (B, N, p*p*C_out)
        return unpatchify(x, self.patch_size, self.out_channels)    # (B, C_out, H, H)


# ---------------------------------------------------------------- cross-attention


class CrossAttention(nn.Module):
    """Multi-head attention with queries from x (B, N, D), keys and values from c (B, M, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = (heads.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for heads in (self.q(x), *self.kv(c).chunk(2, dim=-1)))
        x = F.scaled_dot_product_attention(q, k, v)     # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttentionBlock(ViTBlock):
    """`ViTBlock` with a cross-attention branch between its two."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.norm_cross = learned_norm(hidden_size)
        self.cross = CrossAttention(hidden_size, num_heads)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class CrossAttentionDiT(DiT):
    """Every block reads t and y as two tokens beside the image's."""

    block, final = CrossAttentionBlock, PlainFinalLayer

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(patchify(x, self.patch_size)) + self.pos_embed      # (B, N, D)
        c = torch.stack([self.t_embedder(t), self.y_embedder(y)], dim=1)        # (B, 2, D)
        for block in self.blocks:
            x = block(x, c)
        with torch.autocast(x.device.type, enabled=False):
            x = self.final_layer(x.float())                         # (B, N, p*p*C_out)
        return unpatchify(x, self.patch_size, self.out_channels)    # (B, C_out, H, H)
