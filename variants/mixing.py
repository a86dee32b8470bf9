"""What attention adds: the same network with less of it.

    --network position-attention    each head's attention weights are a learned table, the same for
                                    all images: who attends to whom depends on the position alone
    --network no-attention          each token keeps to itself

Both lack queries and keys.
"""

import torch
from torch import Tensor, nn

from dit import DiT


class PositionAttention(nn.Module):
    """x (B, N, D) -> (B, N, D): each token gets a weighted average of the values of all tokens."""

    def __init__(self, hidden_size: int, num_heads: int, tokens: int):
        super().__init__()
        self.v = nn.Linear(hidden_size, hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.logits = nn.Parameter(torch.randn(num_heads, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).unflatten(-1, (len(self.logits), -1)).transpose(1, 2)
        x = self.logits.softmax(dim=-1) @ v                         # (B, heads, N, D/heads)
        return self.proj(x.transpose(1, 2).flatten(2))


class NoAttention(nn.Sequential):
    """x (B, N, D) -> (B, N, D): the value and the projection of each token."""

    def __init__(self, hidden_size: int, num_heads: int, tokens: int):
        super().__init__(nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size))


class PositionAttentionDiT(DiT):
    attention = PositionAttention

    def __init__(self, **arguments):
        super().__init__(**arguments)
        tokens, D = self.pos_embed.shape[-2:]
        for block in self.blocks:
            block.attn = self.attention(D, block.attn.num_heads, tokens)
        self.initialize_weights()


class NoAttentionDiT(PositionAttentionDiT):
    attention = NoAttention
