"""`--network adaln`: the adaLN block without Zero. DiT section 3.2, "adaLN block", and figure 5.

The LayerNorms take shift and scale from c, but no gate multiplies the residual branches. So a fresh
block is an ordinary transformer block, not the identity, and what it computes at random is added
to every token from the first step on. A third fewer numbers are computed from c: 4 D, not 6 D.
"""

from torch import Tensor, nn

from dit import DiT, DiTBlock, modulate


class AdaLNBlock(DiTBlock):
    """x + attn(norm(x)), then x + mlp(norm(x)); shift and scale of both norms come from c."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaLNDiT(DiT):
    """A DiT of `AdaLNBlock`s. Their modulation starts at shift 0 and scale 1, as in the lesson."""

    block = AdaLNBlock
