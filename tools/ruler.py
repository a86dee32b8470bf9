"""The ruler: a small classifier of the real images, and distances between its features.

    assets/ruler-mnist.pt                   for MNIST: everyone measures with the same one
    output/cache/ruler-NAME-DIGEST.pt       for any other data set, trained on it once

The features are the 64 numbers before the last layer, in which images of similar content are close.
This file has the classifier, its training and its files, then the metrics: Frechet distance,
precision and recall, nearest training image.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from support import paths
from support.checkpoints import read_archive
from support.cli import UserError, atomic_write, reason, say, shorten, warn
from support.data import Batches, ImageSet
from support.folders import slug
from support.seeds import generator, mix_seed

SHIPPED = paths.ROOT / "assets" / "ruler-mnist.pt"
FORMAT = "dit-lesson-ruler/1"
EPOCHS, BATCH_SIZE, LR = 6, 128, 4e-3           # 99.6% accuracy on MNIST's test set
MIN_STEPS = 300                                 # for a small data set
MIN_ACCURACY = {"mnist": 0.994}                 # --train-ruler writes no worse one


class Ruler(nn.Module):
    """logits (B, K), features (B, 64) = ruler(x) for x float32 (B, C, H, H) in [-1, 1]."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()

        def conv(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out),
                    nn.ReLU()]

        self.body = nn.Sequential(                                              # for MNIST:
            *conv(in_channels, 16), *conv(16, 32), nn.MaxPool2d(2),             # (B, 32, 14, 14)
            *conv(32, 48), *conv(48, 64), nn.MaxPool2d(2),                      # (B, 64, 7, 7)
            *conv(64, 96), nn.AdaptiveAvgPool2d(2), nn.Flatten(),               # (B, 384)
            nn.Linear(384, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features

    def digest(self) -> str:
        """A short hash of the weights."""
        weights = [w.cpu().contiguous().numpy().tobytes() for w in self.state_dict().values()]
        return hashlib.sha256(b"".join(weights)).hexdigest()[:16]


@torch.no_grad()
def extract(ruler: Ruler, images: Tensor, desc: str = "ruler") -> tuple[np.ndarray, np.ndarray]:
    """features float32 (N, 64) and predicted classes int64 (N,) of uint8 images (N, C, H, H)."""
    found = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for part in tqdm(images.split(500), desc=desc, leave=False, dynamic_ncols=True):
            x = part.to(ruler.head.weight.device).float() / 127.5 - 1
            logits, features = ruler(x.contiguous(memory_format=torch.channels_last))
            found.append((features.cpu(), logits.argmax(1).cpu()))
    features, predicted = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return features, predicted


# ---------------------------------------------------------------- training


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """x (B, C, H, H), each image rotated by up to 10 degrees, scaled by up to 10%, shifted by up to
    a sixteenth of its side; pixels from outside are -1, black."""
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=x.device) * 2 - 1
    angle, scale = uniform(len(x)) * 0.175, 1 + uniform(len(x)) * 0.1
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * angle.cos()
    theta[:, 1, 0] = scale * angle.sin()
    theta[:, 0, 1] = -theta[:, 1, 0]
    theta[:, :, 2] = uniform(len(x), 2) * 0.125
    places = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, places, align_corners=False) - 1


def train(images: ImageSet, test: ImageSet, seed: int, device: torch.device,
          steps: int | None = None) -> tuple[Ruler, dict]:
    """Train a ruler for a data set: (the ruler in eval mode, its weights rounded to float16 as they
    are stored; its metadata). steps: by default EPOCHS of the images. Deterministic by seed, on
    one device and number of threads."""
    if images.images.shape[-1] < 8:
        raise UserError("the ruler needs images of at least 8x8 pixels")
    about = dict(dataset=images.name, digest=images.digest(), seed=seed,
                 in_channels=images.images.shape[1], num_classes=len(images.class_names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, "ruler"))
        ruler = Ruler(about["in_channels"], about["num_classes"])
    ruler.to(device, memory_format=torch.channels_last).train()
    steps = steps or max(MIN_STEPS, EPOCHS * len(images.images) // BATCH_SIZE)
    opt = torch.optim.AdamW(ruler.parameters(), LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps)
    batches = Batches(images, BATCH_SIZE, mix_seed(seed, "ruler"), device)
    for step in tqdm(range(steps), desc=f"training the ruler of {images.name}", unit="step",
                     dynamic_ncols=True):
        x, y = batches(step)
        x = augment(x, generator(device, seed, "ruler", step))
        logits, _ = ruler(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits, y).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        schedule.step()
    ruler.eval().half().float()
    _, predicted = extract(ruler, test.images, "testing the ruler")
    accuracy = float((predicted == test.labels.numpy()).mean())
    return ruler, about | dict(steps=steps, test_images=len(predicted), test_accuracy=accuracy)


# ---------------------------------------------------------------- files


def save(path: Path, ruler: Ruler, about: dict) -> None:
    """Write a ruler atomically. Raises OSError."""
    weights = {name: w.cpu().contiguous().half() if w.is_floating_point() else w.cpu()
               for name, w in ruler.state_dict().items()}
    state = {"format": FORMAT, "about": about, "weights": weights}
    atomic_write(path, lambda file: torch.save(state, file))


def load(path: Path, device: torch.device) -> tuple[Ruler, dict]:
    """The ruler in a file, in eval mode, and its metadata. Raises UserError if it is not one."""
    state = read_archive(path)
    try:
        about = state["about"]
        if not (state["format"] == FORMAT and math.isfinite(about["test_accuracy"])
                and isinstance(about["digest"], str) and 0 < about["in_channels"] <= 4
                and 0 < about["num_classes"] <= 100_000 and 0 < about["steps"] <= 1_000_000):
            raise ValueError("its metadata are damaged")
        ruler = Ruler(about["in_channels"], about["num_classes"])
        ruler.load_state_dict(state["weights"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a ruler ({shorten(error, 100)}): delete it to train it "
                        f"again") from None
    return ruler.eval().to(device, memory_format=torch.channels_last), about


def cached_at(images: ImageSet, seed: int = 0) -> Path:
    """Where the ruler of a data set is stored, if it is not the one that ships."""
    name = f"ruler-{slug(images.name)}-{images.digest()}" + f"-seed{seed}" * (seed > 0)
    return paths.OUTPUT / "cache" / f"{name}.pt"


def find(images: ImageSet, test: ImageSet, device: torch.device, seed: int = 0,
         steps: int | None = None) -> tuple[Ruler, dict, Path]:
    """(the ruler of a data set, its metadata, its file): the one that ships if it was trained on
    exactly these images, else the one under output/cache, else a new one, stored there."""
    own = cached_at(images, seed)
    for path in (SHIPPED, own) if images.name == "mnist" and seed == 0 else (own,):
        if path.is_file():
            ruler, about = load(path, device)
            if about["digest"] == images.digest() and about["steps"] == (steps or about["steps"]):
                return ruler, about, path
    ruler, about = train(images, test, seed, device, steps)
    try:
        save(own, ruler, about)
        say(f"written: {paths.short(own)} (the ruler of {images.name})")
    except OSError as error:
        warn(f"{own} cannot be written ({reason(error)}): next time the ruler is trained again")
    return ruler, about, own


# ---------------------------------------------------------------- Frechet distance


def moments(features: np.ndarray, weights: np.ndarray | None = None
            ) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), float64, of features (N, D) with weights (N,)."""
    x = features.astype(np.float64)
    covariance = np.cov(x, rowvar=False, aweights=weights)
    return np.average(x, axis=0, weights=weights), np.atleast_2d(covariance)


def frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """The squared distance of two Gaussians given by mean and covariance: Heusel et al.,
    arXiv 1706.08500, eq. 6,  |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    A B is similar to the symmetric A^(1/2) B A^(1/2): the trace is the sum of the roots of its
    eigenvalues.
    """
    (mean_a, A), (mean_b, B) = a, b
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    values = np.linalg.eigvalsh(root @ B @ root)
    between = np.trace(A) + np.trace(B) - 2 * np.sqrt(values.clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + max(between, 0.0))


# ---------------------------------------------------------------- nearest neighbours


def _distances(a: np.ndarray, b: np.ndarray, rows: int = 1000):
    """(slice, float64 (rows, M)): Euclidean distances of a (N, D) to b (M, D), part by part."""
    a, b = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        yield part, torch.cdist(a[part], b).numpy()


def radii(x: np.ndarray, *ks: int) -> np.ndarray:
    """From each row of x (N, D), the distance to its k-th nearest other row: (len(ks), N)."""
    found = np.empty((len(ks), len(x)))
    for part, distance in _distances(x, x):
        found[:, part] = np.partition(distance, ks, axis=1)[:, ks].T        # index 0: itself
    return found


def neighbour_metrics(samples: np.ndarray, real: np.ndarray, k: int = 3, k_naeem: int = 5) -> dict:
    """precision, recall, density, coverage of features (N, D) against real ones (M, D).

    Precision: the share of samples within the k-th neighbour's distance of some real image; recall:
    the same with the roles exchanged (Kynkaanniemi et al., arXiv 1904.06991, eq. 1-3). Density: how
    many such balls a sample lies in, over k; coverage: the share of balls that contain a sample
    (Naeem et al., arXiv 2002.09797, eq. 3 and 5).
    """
    (r_samples,), (r_real, r_naeem) = radii(samples, k), radii(real, k, k_naeem)
    precise, balls = np.zeros(len(samples), bool), np.zeros(len(samples))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for part, distance in _distances(real, samples):                        # (rows, N)
        precise |= (distance <= r_real[part, None]).any(axis=0)
        recalled[part] = (distance <= r_samples).any(axis=1)
        inside = distance <= r_naeem[part, None]
        balls += inside.sum(axis=0)
        covered[part] = inside.any(axis=1)
    return dict(precision=float(precise.mean()), recall=float(recalled.mean()),
                density=float(balls.mean() / k_naeem), coverage=float(covered.mean()))


def nearest_distances(images: Tensor, train: Tensor, device: torch.device | str = "cpu"
                      ) -> np.ndarray:
    """For each of images (N, C, H, H) the distance to the nearest of train (M, C, H, H), uint8:
    Euclidean over all pixels, values 0 to 1, float64 (N,). 0 for a copy."""
    x = images.flatten(1).to(device).float() / 255
    best = torch.full((len(x),), float("inf"), device=device)
    which = torch.zeros(len(x), dtype=torch.int64, device=device)
    starts = range(0, len(train), 5_000)
    for start in tqdm(starts, desc="nearest training images", leave=False, dynamic_ncols=True):
        other = train[start : start + 5_000].flatten(1).to(device).float() / 255
        # |x - o|^2 without |x|^2, which does not depend on o
        value, index = ((other**2).sum(1) - 2 * x @ other.T).min(dim=1)
        which = torch.where(value < best, index + start, which)
        best = torch.minimum(value, best)
    difference = images.flatten(1).double() - train[which.to(train.device)].flatten(1).double()
    return (difference / 255).norm(dim=1).numpy()
