"""Measure samples against real images: accuracy, Frechet distance, precision, recall, copies.

    python -m tools.evaluate                            1,000 samples of the newest checkpoint
    python -m tools.evaluate CKPT --images 10000 --cfg-scale 1.5
    python -m tools.evaluate CKPT_A CKPT_B samples.npz  a table each; an .npz of any model:
                                                        arr_0 uint8 (N, H, H, C), arr_1 labels

A classifier of the real images, the ruler, measures: for MNIST the one in assets/, for any other
data set one trained on it, once, and kept in output/cache/. The results are appended to
evaluations.jsonl in the run folder, else in output/.

Numbers mean little alone, so the table has a baseline: as many images of the test set,
class-balanced as the samples are. (The ruler has seen the training set, which inflates the test
set's Frechet distance somewhat.) Nearest: the distance to the nearest training image, median and 1%
quantile; 0 for a copy.
"""

import hashlib
import json
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sample import load, sample, sampling_options
from support import checkpoint as checkpoints
from support import command, compute, data
from support.command import (
    SEED, Parser, UserError, atomic_write, number, reason, run_command, say, short, warn)
from support.data import Batches, ImageSet
from support.flags import add_sampling_flags

SHIPPED_RULER = command.ROOT / "assets" / "ruler-mnist.pt"
EPOCHS, BATCH_SIZE, LR = 6, 128, 4e-3           # 99.6% accuracy on MNIST's test set
MIN_STEPS, MIN_IMAGES = 300, 10                 # for a small data set
MAX_NEIGHBOURS, MAX_NEAREST = 10_000, 2_000     # images in precision and recall; in nearest
COLUMNS = {"images": ",", "accuracy": ".2%", "Frechet": ".2f", "precision": ".3f",
           "recall": ".3f", "nearest": ".2f", "(1%)": ".2f"}

# ---------------------------------------------------------------- the ruler


class Ruler(nn.Module):
    """logits (B, K), features (B, 64) = ruler(x) for x float32 (B, C, H, H) in [-1, 1]. In the
    features, the input of the last layer, images of similar content are close."""

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


@torch.no_grad()
def extract(ruler: Ruler, images: Tensor, desc: str) -> tuple[Tensor, Tensor]:
    """features float32 (N, 64) and predicted classes int64 (N,) of uint8 images (N, C, H, H)."""
    found = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for part in tqdm(images.split(500), desc=desc, leave=False, dynamic_ncols=True):
            x = part.to(ruler.head.weight.device).float() / 127.5 - 1
            logits, features = ruler(x.contiguous(memory_format=torch.channels_last))
            found.append((features.cpu(), logits.argmax(1).cpu()))
    return tuple(map(torch.cat, zip(*found, strict=True)))


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


def train_ruler(images: ImageSet, test: ImageSet, seed: int, device: torch.device, steps: int
                ) -> tuple[Ruler, dict]:
    """A ruler trained on a data set, in eval mode, its weights rounded to float16 as they are
    stored; its metadata. Deterministic by seed, on one device and number of threads."""
    about = dict(dataset=images.name, digest=images.digest(), seed=seed, steps=steps,
                 in_channels=images.channels, num_classes=len(images.class_names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(compute.seed_of(seed, "ruler"))
        ruler = Ruler(about["in_channels"], about["num_classes"])
    ruler.to(device, memory_format=torch.channels_last).train()
    opt = torch.optim.AdamW(ruler.parameters(), LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps)
    batches = Batches(images.to(device), BATCH_SIZE, compute.seed_of(seed, "ruler"), device)
    for step in tqdm(range(steps), f"training the ruler of {images.name}", dynamic_ncols=True):
        x, y = batches(step)
        x = augment(x, compute.generator(device, seed, "ruler", step))
        logits, _ = ruler(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits, y).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        schedule.step()
    ruler.eval().half().float()
    _, predicted = extract(ruler, test.images, "testing the ruler")
    accuracy = (predicted == test.labels).double().mean().item()
    return ruler, about | dict(test_images=len(predicted), test_accuracy=accuracy)


def find_ruler(images: ImageSet, test: ImageSet, device: torch.device) -> tuple[Ruler, dict, Path]:
    """(the ruler of a data set, its metadata, its file): the one that ships if it was trained on
    exactly these images, else the one under output/cache, else a new one, stored there."""
    steps = max(MIN_STEPS, EPOCHS * len(images.images) // BATCH_SIZE)
    wanted = dict(digest=images.digest(), steps=steps)
    own = command.OUTPUT / "cache" / f"ruler-{wanted['digest']}.pt"
    for path in filter(Path.is_file, (SHIPPED_RULER, own)):
        state = checkpoints.read_archive(path)
        if (about := state["about"]).items() >= wanted.items():
            ruler = Ruler(about["in_channels"], about["num_classes"])
            ruler.load_state_dict(state["weights"])
            return ruler.eval().to(device, memory_format=torch.channels_last), about, path
    ruler, about = train_ruler(images, test, 0, device, steps)
    weights = {name: w.cpu().contiguous().half() if w.is_floating_point() else w.cpu()
               for name, w in ruler.state_dict().items()}
    atomic_write(own, lambda file: torch.save(dict(about=about, weights=weights), file))
    return ruler, about, own


# ---------------------------------------------------------------- the metrics


def moments(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64, of features (N, D); each class has the same weight.
    Samples are class-balanced and MNIST is not (9% fives, 11% ones): with 10,000 images, that alone
    would cost perfect samples as much as the whole distance of the test set."""
    x, weights = features.double(), 1 / labels.bincount()[labels].double()
    return (weights @ x) / weights.sum(), torch.cov(x.T, aweights=weights)


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """The squared distance of two Gaussians given by mean and covariance: Heusel et al.,
    arXiv 1706.08500, eq. 6,  |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    A B is similar to the symmetric A^(1/2) B A^(1/2): the trace is the sum of the roots of its
    eigenvalues.
    """
    (mean_a, A), (mean_b, B) = a, b
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    values = torch.linalg.eigvalsh(root @ B @ root)
    between = A.trace() + B.trace() - 2 * values.clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + between.clamp(min=0))


def share_inside(x: Tensor, y: Tensor, k: int = 3) -> float:
    """The share of rows of x (N, D) that are within the distance of the k-th nearest neighbour of
    some row of y (M, D). Precision is that of samples and real images, recall the same with the
    roles exchanged (Kynkaanniemi et al., arXiv 1904.06991, eq. 1-3)."""
    radius = torch.cat([torch.cdist(rows, y).kthvalue(k + 1).values     # the first: itself
                        for rows in y.split(1000)])
    return torch.cat([(torch.cdist(rows, y) <= radius).any(1)
                      for rows in x.split(1000)]).double().mean().item()


def nearest_distances(images: Tensor, train: Tensor, device: torch.device) -> Tensor:
    """For each of images (N, C, H, H) the distance to the nearest of train (M, C, H, H), uint8:
    Euclidean over all pixels, values 0 to 1, float64 (N,). 0 for a copy."""
    x = images.flatten(1).to(device).double()
    best = torch.full((len(x),), float("inf"), dtype=torch.float64, device=device)
    for part in tqdm(train.split(5_000), "nearest training images", leave=False):
        distances = torch.cdist(x, part.flatten(1).to(device).double())     # of integers: exact
        best = torch.minimum(best, distances.min(dim=1).values)
    return best.cpu() / 255


# ---------------------------------------------------------------- measuring


class Features(NamedTuple):
    """Images and what the ruler makes of them."""

    images: Tensor          # uint8 (N, C, H, H)
    labels: Tensor          # int64 (N,)
    features: Tensor        # float32 (N, 64)
    predicted: Tensor       # classes, int64 (N,)

    def take(self, index: Tensor) -> "Features":
        return Features(*(part[index] for part in self))


def features_of(ruler: Ruler, images: ImageSet) -> Features:
    """The features of a data set, kept in output/cache by a hash of the ruler and the data."""
    weights = [w.cpu().contiguous().numpy().tobytes() for w in ruler.state_dict().values()]
    key = hashlib.sha256(b"".join(weights) + images.digest().encode()).hexdigest()[:16]
    path = command.OUTPUT / "cache" / f"features-{key}.pt"
    try:
        found = checkpoints.read_archive(path)
    except UserError:                                   # missing or damaged
        found = extract(ruler, images.images, f"features of {images.name}")
        atomic_write(path, lambda file: torch.save(found, file))
    return Features(images.images, images.labels, *found)


def class_balanced_order(labels: Tensor, *key) -> Tensor:
    """A permutation, a function of `key`, whose first n have as many of each class, as far as there
    are enough. With 1,000 images, random class counts would double the distance of real images."""
    order = torch.randperm(len(labels), generator=compute.generator("cpu", *key))
    turn = torch.zeros_like(order)              # how many of its class come before it
    for label in labels.unique():
        of_class = labels[order] == label
        turn[of_class] = torch.arange(int(of_class.sum()))
    return order[turn.argsort(stable=True)]


def measure(x: Features, reference: Features, seed: int, device: torch.device) -> dict:
    """A row of the table."""
    size = min(len(x.images), len(reference.images), MAX_NEIGHBOURS)
    rng = compute.generator("cpu", seed, "reference")
    chosen = torch.randperm(len(reference.images), generator=rng)[:size]
    near, real = (f.to(device).double() for f in (x.features[:size], reference.features[chosen]))
    copied = nearest_distances(x.images[:MAX_NEAREST], reference.images, device)
    return dict(images=len(x.images),
                accuracy=(x.predicted == x.labels).double().mean().item(),
                frechet=frechet(moments(x.features, x.labels),
                                moments(reference.features, reference.labels)),
                precision=share_inside(near, real), recall=share_inside(real, near),
                nearest=copied.quantile(0.5).item(), nearest_q01=copied.quantile(0.01).item())


def report(samples: Features, train: Features, test: Features, seed: int, device: torch.device
           ) -> dict[str, dict]:
    """The rows of the table, printed as they are measured: the samples, and as many images of the
    test set, or as there are, class-balanced."""
    say("", " " * 15 + "".join(f"{name:>10}" for name in COLUMNS))
    rows = {}
    for name, x in ("samples", samples), ("test", test):
        order = class_balanced_order(x.labels, seed, name)[:len(samples.images)]
        rows[name] = measure(x.take(order), train, seed, device)
        title = name if name == "samples" else "real: test set"
        say(f"{title:15}" + "".join(f"{value:>10{form}}" for value, form in
                                    zip(rows[name].values(), COLUMNS.values(), strict=True)))
    return rows


# ---------------------------------------------------------------- what is measured


def from_npz(path: Path, args: Namespace) -> tuple[dict, ImageSet, ImageSet, ImageSet]:
    """The images in an .npz, or --images of them, chosen at random: (entries of the report, the
    images, the training set, the test set)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = (torch.from_numpy(file[key]) for key in ("arr_0", "arr_1"))
        images = images.permute(0, 3, 1, 2)
        checkpoints.require(images.dtype == torch.uint8 and images.shape[2] == images.shape[3]
                            and labels.shape == images.shape[:1], "not of these shapes")
    except Exception as error:      # zipfile and numpy raise many types on bad bytes
        raise UserError(f"{path} is no .npz with square images arr_0, uint8 (N, H, H, C), and "
                        f"labels arr_1 (N,) ({reason(error)})") from None
    train, test = load_data(args.dataset or "mnist", args.data_dir, images.shape[2])
    if not set(labels.tolist()) <= set(range(len(train.class_names))):
        raise UserError(f"{path}: a label of arr_1 is no integer below {len(train.class_names)}")
    rng = compute.generator("cpu", args.seed, "order")
    order = torch.randperm(len(images), generator=rng)[:args.images]
    say(f"{short(path)}: {len(order):,} images")
    return {}, replace(train, images=with_channels(images[order], train, path),
                       labels=labels[order].long(), name="samples"), train, test


def from_checkpoint(path: Path, args: Namespace, device: torch.device) -> tuple:
    """--images samples of a checkpoint, labels 0, 1, 2 ... in turn, as `from_npz` returns them."""
    checkpoint = load(path, device, args.weights)
    how, classes = sampling_options(args, checkpoint), len(checkpoint.class_names)
    recipe, trained = (checkpoint.config[key] for key in ("recipe", "data"))
    kept = recipe.get("data_dir")
    train, test = load_data(args.dataset or recipe.get("dataset") or "mnist",
                            args.data_dir or (kept if kept and Path(kept).is_dir() else None),
                            checkpoint.model.input_size)
    if (checkpoint.model.in_channels, classes) != (train.channels, len(train.class_names)):
        raise UserError(f"{path} has other channels or classes than {train.name} (--dataset)")
    if trained.get("digest") != train.digest():
        warn(f"trained on other images ({trained.get('dataset')}) than measured ({train.name})")
    steps = how["steps"] or checkpoint.diffusion.num_timesteps
    say(f"{short(path)}: step {checkpoint.step:,}, {args.weights}, {how['sampler']}, {steps} steps,"
        f" guidance {how['cfg_scale']:g}, seed {args.seed}")
    y = torch.arange(args.images or 1000) % classes
    images = torch.cat([data.to_uint8(batch).cpu() for batch in sample(
        checkpoint, y, seed=args.seed, progress=True, **how)])
    about = dict(step=checkpoint.step, weights=args.weights, sampler=how["sampler"], steps=steps,
                 eta=how["eta"] or 0.0, cfg_scale=how["cfg_scale"],
                 guidance_interval=args.guidance_interval, autoguidance=args.autoguidance)
    return about, replace(train, images=images, labels=y, name="samples"), train, test


def load_data(spec: str, data_dir: str | None, size: int) -> tuple[ImageSet, ImageSet]:
    """(training set, test set), with the same number of channels."""
    train, test = (data.load(spec, data_dir, size, split) for split in ("train", "test"))
    if train.sampling.get("latents"):
        raise UserError("latents cannot be measured: decode them, and measure the images")
    return train, replace(test, images=with_channels(test.images, train, "test set"))


def with_channels(images: Tensor, like: ImageSet, name: object) -> Tensor:
    """images (N, C, H, H) with the channels of a data set. Grey images are often saved as RGB."""
    if images.shape[1] == 3 and like.channels == 1 and (images == images[:, :1]).all():
        images = images[:, :1]
    if images.shape[1] not in (1, like.channels):
        raise UserError(f"{name}: {images.shape[1]} channels, and {like.name} has {like.channels}")
    return images.expand(-1, like.channels, -1, -1).contiguous()


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = compute.pick_device(args.device)
    for name in args.files or [None]:
        npz = name is not None and name.endswith(".npz")
        path = Path(name) if npz else checkpoints.find_checkpoint(name)
        about, samples, train, test = (from_npz(path, args) if npz else
                                       from_checkpoint(path, args, device))
        if min(len(x.images) for x in (samples, test, train)) < MIN_IMAGES:
            raise UserError(f"{path}: {MIN_IMAGES} samples, test images and training images are "
                            f"needed")
        ruler, known, file = find_ruler(train, test, device)
        measured = Features(samples.images, samples.labels,
                            *extract(ruler, samples.images, "features"))
        exact = torch.device("cpu") if device.type == "mps" else device     # MPS has no float64
        say(f"measured with {short(file)} (the ruler), accuracy {known['test_accuracy']:.2%} on the"
            f" test set of {train.name}")
        rows = report(measured, *[features_of(ruler, x) for x in (train, test)], args.seed, exact)
        result = dict(images_from=short(path), seed=args.seed, **about, dataset=train.name,
                      data_digest=train.digest(), ruler=file.name, device=device.type,
                      torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), rows=rows)
        folder = path.parent if path in checkpoints.checkpoints_in(path.parent) else command.OUTPUT
        target = folder / "evaluations.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "ab", buffering=0) as log:        # one write: the line is not split
            log.write((json.dumps(result) + "\n").encode())
        say(f"appended to {short(target)}", "")
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("files", nargs="*", metavar="CKPT|FILE.npz", help="checkpoints, run folders and "
                   "arrays (default: the newest checkpoint under output/, else the one that ships)")
    p.add_argument("--images", type=number(int, MIN_IMAGES, 1_000_000), metavar="N",
                   help="images to measure (default: 1000 samples of a checkpoint; all of an .npz)")
    p.add_argument("--seed", type=SEED, default=0, help="of all random choices (default: 0)")
    p.add_argument("--dataset", help="the real images: mnist, fashion_mnist, cifar10, celeba, "
                   "glyphs or folder:PATH (default: the checkpoint's, else mnist)")
    p.add_argument("--data-dir", metavar="DIR", help="where the data set is, or is downloaded to "
                   "(default: the checkpoint's if it exists, else data/)")
    add_sampling_flags(p)
    return p


if __name__ == "__main__":
    run_command(main)
