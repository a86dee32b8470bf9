"""`--network registers`: four learned tokens beside the image's.

Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588: large ViTs use the tokens of
empty patches as scratch memory. Registers, the same for every image and removed after the last
block, give them room for it elsewhere.
"""

import torch
from torch import Tensor, nn

from dit import DiT, patchify, unpatchify

REGISTERS = 4


class RegisterDiT(DiT):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        D = self.pos_embed.shape[-1]
        self.registers = nn.Parameter(0.02 * torch.randn(1, REGISTERS, D))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(patchify(x, self.patch_size)) + self.pos_embed      # (B, N, D)
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)        # (B, N + 4, D)
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, D)
        for block in self.blocks:
            x = block(x, c)
        with torch.autocast(x.device.type, enabled=False):
            x = self.final_layer(x[:, :-REGISTERS].float(), c.float())          # (B, N, p*p*C_out)
        return unpatchify(x, self.patch_size, self.out_channels)                # (B, C_out, H, H)
