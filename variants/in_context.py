"""`--network in-context`: t and y as two more tokens. DiT section 3.2, "In-context conditioning".

The blocks are those of a ViT. They see t and y because attention reads the two tokens, as it would
a class token, and the two are removed after the last block. At the paper's 256 tokens this adds
less than 1% to the cost, and every token decides for itself, in each layer, how much of
t and y it reads.
"""

import torch
from torch import Tensor, nn

from dit import Attention, DiT, Mlp


def learned_norm(hidden_size: int) -> nn.LayerNorm:
    """A LayerNorm with learned shift and scale, the same for every t and y."""
    return nn.LayerNorm(hidden_size, eps=1e-6)


class ViTBlock(nn.Module):
    """A pre-norm transformer block; c is not used."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = learned_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = learned_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainFinalLayer(nn.Module):
    """Tokens (B, N, D) -> (B, N, p*p*C_out); c is not used."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = learned_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class InContextDiT(DiT):
    """A DiT that reads t and y as tokens N and N + 1 of the sequence."""

    block, final = ViTBlock, PlainFinalLayer

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.t_embedder(t), self.y_embedder(y)], dim=1)     # (B, 2, D)

    def transform(self, x: Tensor, c: Tensor) -> Tensor:
        N = x.shape[1]
        return super().transform(torch.cat([x, c], dim=1), c)[:, :N]       # N + 2 inside
