"""`--network cross-attention`: image tokens attend to t and y. DiT section 3.2, "Cross-attention".

Between self-attention and the MLP each block has a third branch, in which every image token
attends to two tokens, the embeddings of t and y. Of the four block designs it costs most: two more
D x D matrices per token, 15% of DiT-XL/2's multiply-adds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import DiT
from variants.in_context import PlainFinalLayer, ViTBlock, learned_norm


class CrossAttention(nn.Module):
    """Multi-head attention with queries from x (B, N, D), keys and values from c (B, M, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        B, N, D = x.shape
        heads = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(c).chunk(2, dim=-1)
        x = F.scaled_dot_product_attention(heads(self.q(x)), heads(k), heads(v))
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


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
    """A DiT whose blocks read t and y through cross-attention."""

    block, final = CrossAttentionBlock, PlainFinalLayer

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([self.t_embedder(t), self.y_embedder(y)], dim=1)     # (B, 2, D)
