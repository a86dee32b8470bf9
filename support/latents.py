"""Latents of an autoencoder as a data set, `--dataset latents:FILE`, instead of images.

`python -m tools.latents encode` writes the file: a dict in torch's zip format,

    format         "dit-latents/1"
    latents        float16 (N, C, H, H), scaled to a standard deviation of about 1
    labels         int64 (N,)
    class_names    one string per class
    about          the autoencoder, its scale, the size of the images

A network trains on latents as it does on images. They are not in [-1, 1], so x0_hat is not clipped.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from support import checkpoints
from support.cli import UserError
from support.data import ImageSet, to_device

FORMAT = "dit-latents/1"
PREFIX = "latents:"             # of --dataset, and of the name of the data set
MAX_SIDE, MAX_CHANNELS = 4096, 512


@dataclass
class LatentSet(ImageSet):
    """images: float16 (N, C, H, H), any C."""

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        index = index.to(self.images.device)
        return to_device(self.images[index], device).float(), to_device(self.labels[index], device)


def load_latents(path: Path, image_size: int | None, split: str) -> LatentSet:
    """The latents in a file, validated as untrusted input. Every tenth of a class is held out for
    the split "test". Raises UserError."""
    found = checkpoints.read_archive(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} holds no latents: python -m tools.latents encode writes them")
    latents, labels, names = (found.get(key) for key in ("latents", "labels", "class_names"))
    wrong = _wrong(latents, labels, names)
    if wrong:
        raise checkpoints.Damaged(f"{path} is not a valid file of latents: {wrong}")
    if image_size not in (None, latents.shape[-1]):
        raise UserError(f"--image-size does not apply to latents: {path} has "
                        f"{latents.shape[-1]}x{latents.shape[-1]}")
    place = torch.empty_like(labels)                    # of each among those of its class
    for label in range(len(names)):
        where = (labels == label).nonzero().flatten()
        place[where] = torch.arange(len(where))
    kept = (place % 10 == 9) == (split == "test")
    if not kept.any():
        raise UserError(f"{path}: the test split is every tenth of a class, and no class has ten")
    return LatentSet(latents[kept].half(), labels[kept], names, PREFIX + path.name)


def _wrong(latents: object, labels: object, names: object) -> str | None:
    """What is wrong with the content of a file, if anything is."""
    if not (isinstance(latents, Tensor) and latents.is_floating_point() and latents.ndim == 4
            and latents.shape[2] == latents.shape[3] and 0 < latents.shape[3] <= MAX_SIDE
            and 0 < latents.shape[1] <= MAX_CHANNELS and len(latents)):
        return "latents is not a tensor (N, C, H, H) of floats"
    if not (isinstance(labels, Tensor) and labels.dtype == torch.int64
            and labels.shape == (len(latents),)):
        return f"labels is not a tensor of {len(latents):,} integers"
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        return "class_names are not strings"
    if not 0 <= labels.min() <= labels.max() < len(names):
        return f"the labels go from {labels.min()} to {labels.max()} with {len(names)} classes"
    if not latents.half().isfinite().all():
        return "it holds numbers that are not finite"
    return None


def save(file, latents: Tensor, labels: Tensor, class_names: list[str], about: dict) -> None:
    torch.save(dict(format=FORMAT, latents=latents.half(), labels=labels,
                    class_names=class_names, about=about), file)


def is_latents(dataset: object) -> bool:
    """Is it the name of a data set of latents?"""
    return isinstance(dataset, str) and dataset.startswith(PREFIX)


def unclipped(sampler: Callable) -> dict:
    """The option of a sampler that switches clipping off, if it clips."""
    return {"clip": False} if "clip" in inspect.signature(sampler).parameters else {}


def preview(latents: Tensor) -> Tensor:
    """Latents (N, C, H, H) as images in about [-1, 1]: the first three channels as RGB, or the
    first as grey. Without the autoencoder there is nothing better."""
    return latents[:, : 3 if latents.shape[1] >= 3 else 1] / 3
