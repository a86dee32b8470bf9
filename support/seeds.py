"""Random numbers as a function of a key: the same wherever and in whatever order they are drawn."""

import hashlib

import torch
from torch import Tensor

BLOCK = 16                      # images whose noise is drawn in one call


def mix_seed(*key) -> int:
    """A 32-bit seed from any numbers and strings. A hash, because a CPU generator ignores the high
    32 bits of its seed, and because seed + step is the same for (0, 1) and (1, 0)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A random generator on `device` that is a function of `key` and the device type alone."""
    return torch.Generator(device).manual_seed(mix_seed(*key))


class ImageNoise:
    """Standard normal noise for images first..last-1 of a job: noise(t) -> (B, C, H, H).

    The noise of image k depends on (seed, t, k) alone: it is row k % 16 of block k // 16, and a
    block is drawn in one call, on the CPU, so that it is the same on every device. noise("T") is
    xT, where sampling starts.
    """

    def __init__(self, seed: int, first: int, last: int, shape: tuple[int, ...], device="cpu"):
        self.seed, self.first, self.last, self.shape, self.device = seed, first, last, shape, device

    def __call__(self, t: int | str) -> Tensor:
        blocks = range(self.first // BLOCK, (self.last - 1) // BLOCK + 1)
        noise = torch.cat([
            torch.randn(BLOCK, *self.shape, generator=generator("cpu", self.seed, "image", t, b))
            for b in blocks])
        skip = self.first - blocks[0] * BLOCK
        return noise[skip : skip + self.last - self.first].to(self.device)
