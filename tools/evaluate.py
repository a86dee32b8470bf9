"""Measure samples against real images: accuracy, Frechet distance, precision, recall, copies.

    python -m tools.evaluate                    1,000 samples of the newest run's checkpoint
    python -m tools.evaluate CKPT --images 10000 --cfg-scale 1.5 --seeds 3 --json report.json
    python -m tools.evaluate samples.npz        any model's: arr_0 uint8 (N, H, W, C), arr_1 labels
    python -m tools.evaluate FOLDER             images, or a folder of images per class
    python -m tools.evaluate CKPT --train-on-samples    also train a classifier on samples alone
    python -m tools.evaluate --train-ruler      train the classifier that measures (tools/ruler.py)

A distance means little alone, so the table has two baselines: as many images of the test set, and a
random part of the training set against the rest of it, both class-balanced as the samples are. In
the Frechet distance each class has the same weight, where labels are known; the JSON report has the
unweighted distance too. Grain, of grey images, is the share of pixels from 8 to 24 of 255: a faint
noise that the classifier cannot detect.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.evaluate", file=sys.stderr)
    sys.exit(2)

import hashlib
import json
import os
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sample import Checkpoint, sample
from support import checkpoints, data, distributed, paths
from support.cli import (
    COUNT, SEED, SIDE, Parser, UserError, atomic_write, check_target, io_errors, number, reason,
    run_command, say, warn)
from support.folders import EXPORTED, checkpoints_in, find_checkpoint, is_run_folder
from support.sampling import add_sampling_flags, describe, parse_label, settings_from
from support.seeds import generator
from tools import ruler as rulers

MIN_IMAGES = 10                 # the neighbour metrics look at the 5 nearest
MAX_NEIGHBOURS = 10_000         # images on each side of precision and recall
MAX_NEAREST = 2_000             # images whose nearest training image is searched
MAX_BYTES = 4 * 2**30           # in an .npz
SAMPLING = ("cfg_scale", "guidance_interval", "autoguidance", "sampler", "steps", "eta", "weights",
            "seeds", "batch_size", "precision")
ROWS = {"samples": "samples", "test": "real: test set", "train": "real: part of training set"}

# ---------------------------------------------------------------- images and their features


@dataclass
class Features:
    """images uint8 (N, C, H, H), labels int64 (N,) or None, and what the ruler makes of them:
    features float32 (N, 64), predicted classes int64 (N,)."""

    images: Tensor
    labels: np.ndarray | None
    features: np.ndarray
    predicted: np.ndarray
    _moments: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.predicted)

    def take(self, index: np.ndarray) -> "Features":
        labels = None if self.labels is None else self.labels[index]
        return Features(self.images[torch.from_numpy(index)], labels, self.features[index],
                        self.predicted[index])

    def moments(self, balanced: bool) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the features. balanced: each class has the same weight. Samples
        are class-balanced and MNIST is not (9% fives, 11% ones): with 10,000 images, that alone
        would cost perfect samples as much as the whole distance of the test set."""
        if balanced not in self._moments:
            weights = 1 / np.bincount(self.labels)[self.labels] if balanced else None
            self._moments[balanced] = rulers.moments(self.features, weights)
        return self._moments[balanced]


def frechet(x: Features, reference: Features, balanced: bool) -> float:
    return rulers.frechet(x.moments(balanced), reference.moments(balanced))


def extract_cached(ruler: rulers.Ruler, images: data.ImageSet) -> Features:
    """The features of a data set, cached under output/ by a hash of the data and the ruler. A
    damaged file is replaced; where none can be written, there is no cache."""
    count, labels = len(images.images), images.labels.numpy()
    key = hashlib.sha256(f"{ruler.digest()}-{images.digest()}".encode()).hexdigest()[:16]
    path = paths.OUTPUT / "cache" / f"features-{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            features, predicted = file["features"], file["predicted"]
        if (features.shape, features.dtype) != ((count, 64), np.float32) or \
                predicted.shape != (count,) or not np.isfinite(features).all():
            raise ValueError(path)
    except Exception:           # missing, truncated, of another form: numpy raises many types
        features, predicted = rulers.extract(ruler, images.images, f"features of {images.name}")
        try:
            atomic_write(path, lambda file: np.savez(file, features=features, predicted=predicted))
            say(f"written: {paths.short(path)} ({path.stat().st_size / 1e6:.0f} MB, a cache: the "
                f"features of {count:,} real images)")
        except OSError:
            pass
    return Features(images.images, labels, features, predicted)


def shuffled(count: int, *key) -> np.ndarray:
    """A permutation of 0..count-1 that depends on `key` alone."""
    return torch.randperm(count, generator=generator("cpu", *key)).numpy()


def class_balanced_order(count: int, labels: np.ndarray | None, *key) -> np.ndarray:
    """A permutation whose first n have as many of each class, as far as there are enough. With
    1,000 images, random class counts would double the distance of real images."""
    order = shuffled(count, *key)
    turn = np.zeros(count, np.int64)            # how many of its class come before it
    for label in [] if labels is None else np.unique(labels):
        of_class = labels[order] == label
        turn[of_class] = np.arange(of_class.sum())
    return order[np.argsort(turn, kind="stable")]


# ---------------------------------------------------------------- measuring


def measure(x: Features, reference: Features, class_names: list[str], seed: int, balanced: bool
            ) -> dict:
    """All numbers of a row of the table."""
    size = min(len(x), len(reference), MAX_NEIGHBOURS)
    near = rulers.neighbour_metrics(
        x.features[:size], reference.features[shuffled(len(reference), seed, "reference")[:size]])
    predicted = np.bincount(x.predicted, minlength=len(class_names)) / len(x)
    found = dict(images=len(x), frechet=frechet(x, reference, balanced),
                 frechet_unweighted=frechet(x, reference, False), **near,
                 guessed_per_class=dict(zip(class_names, predicted.tolist(), strict=True)))
    if x.labels is not None:
        right = x.predicted == x.labels
        found["accuracy"] = float(right.mean())
        found["accuracy_per_class"] = {name: float(right[x.labels == i].mean()) for i, name in
                                       enumerate(class_names) if (x.labels == i).any()}
    if x.images.shape[1] == 1:
        found["grain"] = float(((x.images >= 8) & (x.images <= 24)).float().mean())
    return found


def comparisons(x: Features, train: Features, test: Features, seed: int
                ) -> dict[str, tuple[Features, Features]]:
    """Row of the table -> (images, reference): as many images in each row as there are samples, or
    as there are, class-balanced."""
    def order(features: Features, name: str) -> np.ndarray:
        return class_balanced_order(len(features), features.labels, seed, name)

    part, rest = np.split(order(train, "train"), [min(len(x), len(train) // 2)])
    return {"samples": (x.take(order(x, "samples")), train),
            "test": (test.take(order(test, "test")[: len(x)]), train),
            "train": (train.take(part), train.take(rest))}


def report(samples: list[Features], train: Features, test: Features, class_names: list[str],
           seed: int, device: torch.device) -> dict:
    """rows: for each row of the table its measurements, one per seed, with mean and standard
    deviation. Of the first seed: the distances to the nearest training image, and the Frechet
    distance of fewer images (it decreases with their number)."""
    balanced = samples[0].labels is not None
    compared = [comparisons(x, train, test, seed + i) for i, x in enumerate(samples)]
    rows, near = {}, {}
    for name in tqdm(ROWS, desc="measuring", leave=False, dynamic_ncols=True):
        found = [measure(*each[name], class_names, seed + i, balanced)
                 for i, each in enumerate(compared)]
        numbers = {k: [r[k] for r in found] for k, v in found[0].items() if isinstance(v, float)}
        rows[name] = dict(
            images=found[0]["images"], mean={k: float(np.mean(v)) for k, v in numbers.items()},
            std={k: float(np.std(v, ddof=1)) for k, v in numbers.items()} if found[1:] else None,
            seeds=found)
    for name in ("samples", "test"):        # much nearer samples would be copies
        images = compared[0][name][0].images[:MAX_NEAREST]
        d = rulers.nearest_distances(images, train.images, device)
        near[name] = dict(images=len(d), mean=float(d.mean()), min=float(d.min())) | {
            f"q{q:02d}": float(np.quantile(d, q / 100)) for q in (1, 10, 50, 90)}
    total = len(samples[0])
    by_images = [{"images": n} | {name: frechet(x.take(np.arange(n)), reference, balanced)
                                  for name, (x, reference) in compared[0].items() if len(x) >= n}
                 for n in (total // 8, total // 4, total // 2, total) if n >= MIN_IMAGES]
    return dict(rows=rows, nearest_training_image=near, frechet_by_images=by_images,
                classes_weighted=balanced)


# ---------------------------------------------------------------- trained on samples alone


def train_on_samples(images: list[Tensor], labels: np.ndarray, seeds: list[int],
                     train: data.ImageSet, test: data.ImageSet, steps: int, device: torch.device
                     ) -> dict:
    """The test accuracy of a classifier that has seen samples alone (Ravuri & Vinyals, arXiv
    1905.10887), and that of one trained on as many real images (class-balanced), for each set of
    samples and its seed. Both have the ruler's architecture and recipe, for `steps` steps."""
    found = []
    for x, seed in zip(images, seeds, strict=True):
        samples = replace(train, images=x, labels=torch.from_numpy(labels),
                          name=f"{len(x):,} samples")
        _, of_samples = rulers.train(samples, test, seed, device, steps)
        real = train
        if len(x) < len(train.images):
            order = class_balanced_order(len(train.images), train.labels.numpy(), seed, "real")
            index = torch.from_numpy(np.sort(order[: len(x)]))
            real = replace(train, images=train.images[index], labels=train.labels[index],
                           name=f"{len(x)} of {train.name}")
        _, of_real, _ = rulers.find(real, test, device, seed, steps)
        found.append(dict(seed=seed, accuracy=of_samples["test_accuracy"],
                          real=of_real["test_accuracy"]))
    return dict(images=len(images[0]), real_images=len(real.images), steps=steps,
                test_images=len(test.images), seeds=found) | {
        key: float(np.mean([each[key] for each in found])) for key in ("accuracy", "real")}


def trained_on_samples(result: dict) -> str:
    """What `train_on_samples` found, in a line."""
    def score(key: str) -> str:
        values = [each[key] for each in result["seeds"]]
        return f"{result[key]:.2%}" + (f" ± {np.std(values, ddof=1):.2%}" if values[1:] else "")

    return (f"Trained on the {result['images']:,} samples alone, a classifier reads "
            f"{score('accuracy')} of the {result['test_images']:,} real test images; trained on "
            f"{result['real_images']:,} real ones, {score('real')}.")


# ---------------------------------------------------------------- the report in words and files


def table(rows: dict) -> list[str]:
    """The rows of the report as lines of text."""
    columns = {"accuracy": ".2%", "frechet": ".2f", "precision": ".3f", "recall": ".3f",
               "grain": ".1%"}
    columns = {k: form for k, form in columns.items() if k in rows["test"]["mean"]}
    width = 17 if rows["samples"]["std"] else 9
    lines = [f"{'':26}{'images':>8}" + "".join(
        f"{key.replace('frechet', 'Frechet'):>{width + 2}}" for key in columns)]
    for name, title in ROWS.items():
        mean, std = rows[name]["mean"], rows[name]["std"] or {}
        cells = [f"{mean[k]:{form}}" + (f" ± {std[k]:{form}}" if std else "") if k in mean else "-"
                 for k, form in columns.items()]
        lines.append(f"{title:26}{rows[name]['images']:8,}" + "".join(
            f"  {cell:>{width}}" for cell in cells))
    return lines


def findings(result: dict) -> list[str]:
    """What to know when reading the table."""
    rows, near = result["rows"], result["nearest_training_image"]
    ratio = rows["samples"]["mean"]["frechet"] / max(rows["test"]["mean"]["frechet"], 1e-12)
    unequal = len({row["images"] for row in rows.values()}) > 1
    weighted = " (each class with the same weight)" if result["classes_weighted"] else ""
    samples, test = (f"{near[k]['q50']:.2f} ({near[k]['q01']:.2f})" for k in ("samples", "test"))
    return [f"Frechet distance{weighted}: {ratio:.2f} times the test set's"
            + (", but the numbers of images differ: not a fair comparison." if unequal else "."),
            "The ruler was trained on the training set: the test set's distance is somewhat "
            "inflated.",
            f"Distance to the nearest training image, median (1% quantile): samples {samples}, "
            f"test set {test}."]


def write_report(result: dict, target: Path | None, run: Path | None) -> None:
    """Write the report as JSON, and append it to the run's evaluations.jsonl."""
    if target is not None:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        with io_errors(f"{target} cannot be written"):
            atomic_write(target, lambda file: file.write(text.encode()))
        say(f"written: {paths.short(target)}")
    if run is not None:
        path = run / "evaluations.jsonl"
        try:
            with open(path, "ab", buffering=0) as file:     # one write: the line is not split
                file.write((json.dumps(result, allow_nan=False) + "\n").encode())
            say(f"appended to {paths.short(path)}")
        except OSError as error:
            warn(f"{path} cannot be written ({reason(error)})")


# ---------------------------------------------------------------- images from files


def read_npz(path: Path) -> tuple[Tensor, np.ndarray | None]:
    """arr_0, uint8 (N, H, W, C), as (N, C, H, W); and arr_1 or None: integers (N,)."""
    try:
        with io_errors(f"{path} cannot be read"), np.load(path, allow_pickle=False) as file:
            if sum(entry.file_size for entry in file.zip.infolist()) > MAX_BYTES:
                raise UserError(f"{path} holds more than {MAX_BYTES / 2**30:g} GiB")
            if "arr_0" not in file.files:
                raise UserError(f"{path} lacks arr_0, the images: it has "
                                f"{', '.join(file.files) or 'nothing'}")
            images, labels = (file[k] if k in file.files else None for k in ("arr_0", "arr_1"))
    except UserError:
        raise
    except Exception as error:      # zipfile and numpy raise many types on bad bytes
        raise UserError(f"{path} is no .npz file, or damaged ({type(error).__name__})") from None
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}, and must be uint8 "
                        f"(N, H, W, C)")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: arr_1 is {labels.dtype} {labels.shape}, and must be integers "
                        f"({len(images)},): a label per image")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def read_folder(root: Path, class_names: list[str]) -> tuple[Tensor, np.ndarray | None]:
    """root/*.png without labels, or root/<class>/*.png with: uint8 (N, 3, H, W), int64 (N,)."""
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    classes = {folder: parse_label(folder.name, class_names) for folder in folders}
    found = [(file, folder) for folder in folders or [root] for file in sorted(folder.iterdir())
             if file.suffix.lower() in data.SUFFIXES]
    if not found:
        raise UserError(f"{root} holds no images: PNGs, or a folder of PNGs per class")
    pictures = []
    for file, _ in tqdm(found, desc="reading images", unit="img", leave=False, dynamic_ncols=True):
        try:
            with Image.open(file) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except Exception as error:  # Pillow's decoders raise many types
            raise UserError(f"{file} cannot be read as an image ({type(error).__name__})") from None
        if pictures[-1].shape != pictures[0].shape:
            raise UserError(f"{file} and {found[0][0].name} differ in size")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, np.array([classes[folder] for _, folder in found]) if folders else None


def channels_as_in(images: Tensor, like: data.ImageSet, name: str) -> Tensor:
    """The images with the channels of a data set. Raises UserError where they have another size,
    or are in colour and it is grey."""
    C, side = like.images.shape[1], like.images.shape[-1]
    if images.shape[2:] != (side, side):
        raise UserError(f"{name}: the images are {images.shape[3]}x{images.shape[2]} pixels, and "
                        f"{like.name} has {side}x{side}: resize them, or the real ones with "
                        f"--image-size")
    if images.shape[1] in (1, C):
        return images.expand(-1, C, -1, -1)
    if C == 1 and images.shape[1] == 3 and (images == images[:, :1]).all():
        return images[:, :1].contiguous()       # grey, saved as RGB
    raise UserError(f"{name}: the images have {images.shape[1]} channels, not all the same, and "
                    f"{like.name} has {C}")


# ---------------------------------------------------------------- what is measured

# (a line about the images, entries of the report, a function that makes the images: one tensor
# uint8 (N, C, H, H) per seed, and their labels)
Source = tuple[str, dict, Callable[[], tuple[list[Tensor], np.ndarray | None]]]


def from_files(args: Namespace, path: Path, train: data.ImageSet) -> Source:
    """The images in an .npz or a folder, or --images of them, chosen at random."""
    images, labels = read_folder(path, train.class_names) if path.is_dir() else read_npz(path)
    count = args.images or len(images)
    if args.train_on_samples and labels is None:
        raise UserError(f"{path} has no labels, which --train-on-samples needs")
    if not MIN_IMAGES <= count <= len(images):
        raise UserError(f"{path} holds {len(images)} images, and {max(count, MIN_IMAGES)} are "
                        f"needed")
    order = shuffled(len(images), args.seed, "order")[:count]
    if labels is not None:
        if labels.min() < 0 or labels.max() >= len(train.class_names):
            raise UserError(f"{path}: the labels go from {labels.min()} to {labels.max()}, and "
                            f"{train.name} has {len(train.class_names)} classes, from 0")
        labels = labels.astype(np.int64)[order]
    images = channels_as_in(images, train, path)[torch.from_numpy(order)]
    title = f"{paths.short(path)}: {count:,} images{', without labels' if labels is None else ''}"
    return title, dict(seeds=[args.seed]), lambda: ([images], labels)


def from_checkpoint(args: Namespace, path: Path, state: dict, device: torch.device) -> Source:
    """--images samples for each of --seeds seeds, labels 0, 1, 2 ... in turn."""
    checkpoint = as_checkpoint(path, state, args.weights, device)
    [how] = settings_from(args, checkpoint)
    count = args.images or (10_000 if args.train_on_samples else 1000)
    seeds = list(range(args.seed, args.seed + (args.seeds or 1)))
    y = torch.arange(count) % len(checkpoint.class_names)
    about = dict(step=state["step"], weights=args.weights, sampler=how["sampler"],
                 steps=how["steps"], eta=how["eta"], cfg_scale=how["cfg_scale"],
                 guidance_interval=args.guidance_interval, autoguidance=args.autoguidance,
                 precision=how["precision"], seeds=seeds)

    def make() -> tuple[list[Tensor], np.ndarray]:
        start = time.perf_counter()
        with tqdm(total=count * how["steps"] * len(seeds), desc="sampling", unit="image-step",
                  unit_scale=True, dynamic_ncols=True) as bar:
            images = [torch.cat([data.to_uint8(batch).cpu() for batch in sample(
                checkpoint, y, seed, how, args.batch_size, bar=bar)]) for seed in seeds]
        about["seconds_sampling"] = round(time.perf_counter() - start, 1)
        return images, y.numpy()

    title = (f"{paths.short(path)}: step {state['step']:,}, {args.weights}, "
             f"{describe(args, [how])}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}")
    return title, about, make


def as_checkpoint(path: Path, state: dict, weights: str, device: torch.device) -> Checkpoint:
    """What `sample.load` returns, from a state that has been loaded already."""
    return Checkpoint(*checkpoints.build(state, weights, device), state["class_names"],
                      state["config"]["sampling"], state["step"], path)


def load_data(args: Namespace, state: dict | None) -> tuple[data.ImageSet, data.ImageSet]:
    """(training set, test set) of the flags, else of the checkpoint, else of MNIST; checked against
    the checkpoint."""
    spec, data_dir, size, attribute = args.dataset, args.data_dir, args.image_size, None
    if state is not None:
        recipe, trained = state["config"]["recipe"], state["config"]["data"]
        spec = spec or recipe.get("dataset") or trained.get("dataset")
        if data_dir is None and Path(str(recipe.get("data_dir"))).is_dir():
            data_dir = recipe["data_dir"]
        size, attribute = state["config"]["model"]["input_size"], recipe.get("celeba_attribute")
    train, test = (data.load(str(spec or "mnist"), data_dir, size, split,
                             celeba_attribute=attribute)
                   for split in ("train", "test"))
    test.images = channels_as_in(test.images, train, f"the test split of {train.name}")
    if len(test.images) < MIN_IMAGES or len(train.images) < 2 * MIN_IMAGES:
        raise UserError(f"{train.name} has {len(train.images)} training and {len(test.images)} test"
                        f" images: at least {2 * MIN_IMAGES} and {MIN_IMAGES} are needed")
    if state is None:
        return train, test
    model = state["config"]["model"]
    channels, classes = train.images.shape[1], len(train.class_names)
    if (model["in_channels"], model["num_classes"]) != (channels, classes):
        raise UserError(f"the model makes {model['in_channels']} channels, {model['num_classes']} "
                        f"classes, and {train.name} has {channels} and {classes}: --dataset names "
                        f"the data set it was trained on")
    if trained.get("digest") != train.digest():
        warn(f"the model was trained on other images ({trained.get('dataset')}, digest "
             f"{trained.get('digest')}) than it is measured against ({train.name}, "
             f"{train.digest()})")
    return train, test


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if distributed.world_size() > 1:
        raise UserError("evaluate runs in one process: torchrun sample.py --npz, then evaluate the "
                        ".npz")
    device = distributed.pick_device(args.device)
    if args.train_ruler:
        return train_ruler(args, device)
    path = Path(args.images_from) if args.images_from else find_checkpoint(None)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    files = path.suffix.lower() == ".npz" or (os.path.isdir(path) and not checkpoints_in(path)
                                              and not (path / EXPORTED).is_file())
    if files and os.path.isdir(path) and any(map(checkpoints_in, path.glob("*/"))):
        raise UserError(f"{path} is a folder of runs: name one of them")
    if files:
        refuse(args, SAMPLING, "a checkpoint")
    else:
        refuse(args, ("image_size",), "an .npz or a folder")
    if args.json is not None:
        check_target(args.json, args.force, ".json")

    # The real images, the images to measure, the ruler
    path = path if files else find_checkpoint(path)
    state = None if files else checkpoints.load(path)
    train, test = load_data(args, state)
    title, about, make = (from_files(args, path, train) if files else
                          from_checkpoint(args, path, state, device))
    ruler, known, ruler_file = rulers.find(train, test, device)
    say(title, f"measured with the classifier {ruler_file.name} (the ruler), accuracy "
        f"{known['test_accuracy']:.2%} on the test set of {train.name}")

    # Measure
    images, labels = make()
    real = [extract_cached(ruler, each) for each in (train, test)]
    samples = [Features(x, labels, *rulers.extract(ruler, x, "features")) for x in images]
    result = dict(images_from=paths.short(path), **about, dataset=train.name,
                  data_digest=train.digest(), ruler=ruler_file.name, ruler_digest=ruler.digest(),
                  ruler_test_accuracy=known["test_accuracy"], device=device.type,
                  torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                  **report(samples, *real, train.class_names, args.seed, device))
    say("", *table(result["rows"]), "", *findings(result))
    if args.train_on_samples:
        result["train_on_samples"] = train_on_samples(images, labels, about["seeds"], train, test,
                                                      known["steps"], device)
        say(trained_on_samples(result["train_on_samples"]))
    write_report(result, args.json, path.parent if state and is_run_folder(path.parent) else None)
    return 0


def refuse(args: Namespace, flags: tuple[str, ...], meant_for: str) -> None:
    """Raise UserError for flags that would have no effect."""
    for flag in flags:
        if getattr(args, flag) != parser().get_default(flag):
            raise UserError(f"--{flag.replace('_', '-')} is for {meant_for}")


def train_ruler(args: Namespace, device: torch.device) -> int:
    """--train-ruler: MNIST's into assets/, any other into output/cache/."""
    if args.images_from is not None:
        raise UserError("--train-ruler measures nothing: leave out the images")
    refuse(args, (*SAMPLING, "images", "train_on_samples", "json"), "the images to measure")
    train, test = load_data(args, None)
    ships = train.name == "mnist" and args.image_size is None
    path = rulers.SHIPPED if ships else rulers.cached_at(train)
    check_target(path, args.force, ".pt")
    ruler, about = rulers.train(train, test, args.seed, device)
    accuracy, least = about["test_accuracy"], rulers.MIN_ACCURACY.get(train.name, 0.0)
    if accuracy < least:
        raise UserError(f"this ruler's test accuracy is {accuracy:.2%}, below the required "
                        f"{least:.1%}: nothing is written; try another --seed", status=1)
    with io_errors(f"{path} cannot be written"):
        rulers.save(path, ruler, about)
    say(f"written: {paths.short(path)} (test accuracy {accuracy:.2%}, {path.stat().st_size:,} "
        f"bytes)")
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("images_from", nargs="?", metavar="CKPT|FILE.npz|FOLDER", help="a checkpoint or "
                   "a run folder, an .npz, or a folder of images (default: the newest checkpoint "
                   "under output/, else the one that ships)")
    g = p.add_argument_group("what")
    g.add_argument("--images", type=number(int, MIN_IMAGES, 1_000_000), metavar="N",
                   help="images to measure (default: 1000 from a checkpoint, class-balanced, and "
                   "10000 with --train-on-samples; else all)")
    g.add_argument("--seed", type=SEED, default=0, help="seed of the noise and of every random "
                   "choice (default: 0)")
    g.add_argument("--seeds", type=COUNT, metavar="K", help="sample K times, with seeds from "
                   "--seed on: mean ± standard deviation (default: 1)")
    g.add_argument("--train-on-samples", action="store_true", help="also train the ruler's "
                   "architecture on these images alone, and on as many real ones: both accuracies "
                   "on the real test set")
    add_sampling_flags(p)
    g = p.add_argument_group("the real images, and the classifier that measures (the ruler)")
    g.add_argument("--dataset", help="mnist, fashion_mnist, cifar10, celeba, glyphs or folder:PATH "
                   "(default: the checkpoint's, else mnist)")
    g.add_argument("--data-dir", metavar="DIR", help="where the data set is, or is downloaded to "
                   "(default: the checkpoint's if it exists, else data/)")
    g.add_argument("--image-size", type=SIDE, help="side in pixels that the real images are "
                   "resized to, for an .npz or a folder (default: the data set's; 32 for folder:)")
    g.add_argument("--train-ruler", action="store_true", help="train the ruler of --dataset and "
                   "write it, into assets/ if that is mnist; measure nothing")
    g = p.add_argument_group("output")
    g.add_argument("--json", type=Path, metavar="FILE.json", help="the whole report (for a run's "
                   "checkpoint it is also appended to evaluations.jsonl in the run folder)")
    g.add_argument("--force", action="store_true", help="overwrite existing files")
    return p


if __name__ == "__main__":
    run_command(main)
