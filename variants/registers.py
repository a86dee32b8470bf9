"""`--network registers --registers N`: learned tokens beside the image's.

Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588: large ViTs use the tokens of
empty patches as scratch memory. N learned tokens, the same for every image and removed after the
last block, give them room for it elsewhere. With N = 0 this is the lesson's DiT, bit for bit.
"""

import torch
from torch import Tensor, nn

from dit import DiT


class RegisterDiT(DiT):
    def __init__(self, registers: int = 4, **arguments):
        super().__init__(**arguments)
        D = self.pos_embed.shape[-1]
        self.registers = nn.Parameter(0.02 * torch.randn(1, registers, D)) if registers else None

    def transform(self, x: Tensor, c: Tensor) -> Tensor:
        if self.registers is None:
            return super().transform(x, c)
        N = x.shape[1]
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)        # (B, N + n, D)
        return super().transform(x, c)[:, :N]
