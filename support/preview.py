"""The sample grids of a training run: always from the same noise, so that one sees them improve."""

from collections.abc import Callable
from pathlib import Path

import torch

from diffusion import classifier_free_guidance
from support import components, latents
from support.data import to_uint8
from support.pictures import grid, save_picture
from support.seeds import generator


class Preview:
    """preview(path, step, stopped) draws a grid with the EMA weights, a class per row."""

    def __init__(self, ema: torch.nn.Module, diffusion, sampling: dict, seed: int,
                 columns: int = 6, steps: int = 20):
        classes, device = min(10, ema.num_classes), next(ema.parameters()).device
        shape = (classes * columns, ema.in_channels, ema.input_size, ema.input_size)
        self.xT = torch.randn(shape, generator=generator("cpu", seed, "preview")).to(device)
        self.y = torch.arange(classes, device=device).repeat_interleave(columns)
        self.ema, self.diffusion, self.sampling = ema, diffusion, sampling
        self.columns, self.steps = columns, steps
        self.latents = False            # not images: neither clipped nor shown as they are

    def __call__(self, path: Path, step: int, stopped: Callable[[], int]) -> None:
        predict = classifier_free_guidance(self.ema, self.y, self.sampling["cfg_scale"])
        sampler = components.find_sampler(self.diffusion, self.sampling["sampler"])
        xt = self.xT
        options = latents.unclipped(sampler) if self.latents else {}
        for _t, xt, _x0_hat in sampler(predict, self.xT, steps=self.steps, **options):  # noqa: B007
            if stopped():
                return
        save_picture(path, grid(to_uint8(latents.preview(xt) if self.latents else xt),
                                self.columns))
