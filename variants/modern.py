"""`--network modern`: what later Transformers changed in the block, at equal parameters.

    RMSNorm    no mean is subtracted                              arXiv 1910.07467
    2-D RoPE   queries and keys are rotated by row and column     after arXiv 2104.09864 (1-D)
    QK-norm    queries and keys are normalised                    arXiv 2302.05442
    SwiGLU     a gated MLP, two thirds as wide                    arXiv 2002.05202

JiT and LightningDiT combine them. Modulation, gates and the final layer are the lesson's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import DiT, DiTBlock


def rope_angles(side: int, dim: int, base: float = 100.0) -> Tensor:
    """Angles (N, dim/2) of the positions of a side x side grid, in reading order: the first half
    from the row, the second from the column, at dim/4 frequencies each. base: the longest
    wavelength is below 2 pi base tokens; the usual 10000 is for texts."""
    omega = base ** (-torch.arange(dim // 4) / (dim / 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([torch.outer(pos.flatten(), omega) for pos in (row, column)], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + dim/2}) of x (B, heads, N, dim) by `angles` (N, dim/2). The
    product of a query and a key then depends on the difference of their positions alone."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class ModernAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = (nn.RMSNorm(hidden_size // num_heads, 1e-6) for _ in range(2))
        self.register_buffer("angles", None, persistent=False)      # ModernDiT knows the grid

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)           # each (B, heads, N, D/heads)
        q, k = (rotate(norm(x.float()), self.angles).to(v.dtype)
                for norm, x in [(self.q_norm, q), (self.k_norm, k)])
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    """silu(gate) * up, then down: three matrices, so each has 2/3 of the width of an `Mlp`'s two,
    to the nearest multiple of 8."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        inner_size = max(8, 8 * round(inner_size / 12))
        self.gate_up = nn.Linear(hidden_size, 2 * inner_size)
        self.down = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ModernBlock(DiTBlock):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.norm1, self.norm2 = (nn.RMSNorm(hidden_size, 1e-6, elementwise_affine=False)
                                  for _ in range(2))
        self.attn = ModernAttention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio))


class ModernDiT(DiT):
    """A DiT of `ModernBlock`s. The lesson's `pos_embed` stays, as in JiT and LightningDiT: RoPE
    says where tokens are relative to each other, not where in the image."""

    block = ModernBlock

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for block in self.blocks:
            head = block.attn.q_norm.weight.shape[0]
            if head % 4:
                raise ValueError(f"width / heads is {head}, and 2-D RoPE needs a multiple of 4")
            block.attn.angles = rope_angles(self.input_size // self.patch_size, head)
