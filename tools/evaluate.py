"""How far are the samples from real images, and how far are real images from one another?

    python evaluate.py                      1,000 samples of the newest run's checkpoint, measured
    python evaluate.py CKPT --images 10000 --cfg-scale 1.5 --seeds 3 --json report.json
    python evaluate.py samples.npz          from anywhere: arr_0 uint8 (N, H, W, C), arr_1 labels
    python evaluate.py FOLDER               PNGs, or a folder of PNGs per class
    python evaluate.py --train-ruler        make the ruler of --dataset again (see ruler.py)

A number means nothing alone: beside the samples stand as many images of the test set, and a random
part of the training set against the rest of it, class-balanced like the samples as far as there are
images for it. In the Frechet distance each class has the same weight, where labels are known; JSON
has the plain one too. Not needed to understand DiT.
"""

import argparse
import functools
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import checkpoints
import data as data_sets
import ruler as rulers
from cli import (
    BATCH,
    COUNT,
    SEED,
    SIDE,
    Parser,
    UserError,
    check_target,
    cli,
    generator,
    number,
    printable,
)
from ranks import Ranks, pick_device
from runs import atomic_write, checkpoints_in, holds_run
from sample import find_checkpoint, parse_label, sample, sampling_of

LEAST = 10                      # images: the neighbour metrics look at the 5 nearest
MOST_NEIGHBOURS = 10_000        # images on each side of precision and recall
MOST_NEAREST = 2_000            # images whose nearest training image is sought
MOST_BYTES = 4 * 2**30          # in an .npz
SAMPLING = ("cfg_scale", "sampler", "steps", "eta", "weights", "seeds", "batch_size")
MEASURING = (*SAMPLING, "images", "json")
ROWS = {"samples": "samples", "test": "real: test set", "train": "real: part of training set"}

# ---------------------------------------------------------------- images, as the ruler sees them


@dataclass
class Seen:
    """images uint8 (N, C, H, H), labels int64 (N,) or None; and what the ruler makes of them:
    features float32 (N, 64), guesses int64 (N,)."""

    images: Tensor
    labels: np.ndarray | None
    features: np.ndarray
    guesses: np.ndarray

    def __len__(self) -> int:
        return len(self.guesses)

    def take(self, index: np.ndarray | slice) -> "Seen":
        """Those at an index, int64 (M,), or in a slice."""
        pick = torch.from_numpy(index) if isinstance(index, np.ndarray) else index
        labels = None if self.labels is None else self.labels[index]
        return Seen(self.images[pick], labels, self.features[index], self.guesses[index])

    @functools.cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        return rulers.moments(self.features)

    @functools.cached_property
    def even_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Those in which each class has the same weight."""
        return rulers.moments(self.features, 1 / np.bincount(self.labels)[self.labels])


def see(ruler: rulers.Ruler, images: Tensor, labels: np.ndarray | None, desc: str) -> Seen:
    return Seen(images, labels, *rulers.look(ruler, images, desc))


def see_real(ruler: rulers.Ruler, sets: dict[str, data_sets.ImageSet], data_dir: Path
             ) -> dict[str, Seen]:
    """The real sets through the ruler, kept in data_dir under a hash of the data and the ruler. A
    damaged file is made again; where the folder cannot be written, it is done without."""
    key = "-".join([ruler.digest(), *(s.digest() for s in sets.values())])
    path = data_dir / f"ruler-stats-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    try:
        return _from_cache(path, sets)
    except Exception:           # missing, cut short, of another form: numpy raises many types
        seen = {name: see(ruler, s.images, s.labels.numpy(), f"{s.name}, {name}")
                for name, s in sets.items()}
    arrays = {f"{what}_{name}": getattr(x, what) for name, x in seen.items()
              for what in ("features", "guesses")}
    try:
        atomic_write(path, lambda file: np.savez(file, **arrays))
    except OSError:
        pass
    return seen


def _from_cache(path: Path, sets: dict[str, data_sets.ImageSet]) -> dict[str, Seen]:
    seen = {}
    with np.load(path, allow_pickle=False) as file:
        for name, s in sets.items():
            features, guesses = file[f"features_{name}"], file[f"guesses_{name}"]
            if features.shape != (len(s.images), 64) or features.dtype != np.float32 or \
                    guesses.shape != s.labels.shape or not np.isfinite(features).all():
                raise ValueError(path)
            seen[name] = Seen(s.images, s.labels.numpy(), features, guesses)
    return seen


# ---------------------------------------------------------------- measuring


def shuffled(count: int, *key) -> np.ndarray:
    """A random order of 0..count-1 that `key` decides."""
    return torch.randperm(count, generator=generator("cpu", *key)).numpy()


def evenly(x: Seen, *key) -> np.ndarray:
    """A random order in which the first n hold as many of each class, as long as there are any: at
    1,000 images, chance in the numbers of each digit would double the distance of real ones."""
    order = shuffled(len(x), *key)
    turn = np.zeros(len(x), np.int64)           # how many of its class come before it
    if x.labels is not None:
        for label in np.unique(x.labels):
            of_class = x.labels[order] == label
            turn[of_class] = np.arange(of_class.sum())
    return order[np.argsort(turn, kind="stable")]


def distance(x: Seen, reference: Seen, even: bool) -> float:
    """The Frechet distance. even: each class has the same weight on both sides. The samples are
    class-balanced and MNIST is not (9% fives, 11% ones): at 10,000 images that alone would cost
    perfect samples as much as the test set's whole distance."""
    if even:
        return rulers.frechet(x.even_moments, reference.even_moments)
    return rulers.frechet(x.moments, reference.moments)


def measure(x: Seen, reference: Seen, class_names: list[str], seed: int, even: bool) -> dict:
    """Every number of one row: x against real images."""
    size = min(len(x), len(reference), MOST_NEIGHBOURS)
    near = rulers.neighbour_metrics(
        x.features[:size], reference.features[shuffled(len(reference), seed, "reference")[:size]])
    guessed = np.bincount(x.guesses, minlength=len(class_names)) / len(x)
    found = dict(images=len(x), frechet=distance(x, reference, even),
                 frechet_unweighted=distance(x, reference, False), **near,
                 guessed_per_class=dict(zip(class_names, guessed.tolist(), strict=True)))
    if x.labels is not None:
        right = x.guesses == x.labels
        found["accuracy"] = float(right.mean())
        found["accuracy_per_class"] = {name: float(right[x.labels == i].mean()) for i, name in
                                       enumerate(class_names) if (x.labels == i).any()}
    return found


def contenders(x: Seen, real: dict[str, Seen], seed: int) -> dict[str, tuple[Seen, Seen]]:
    """Row of the table -> (images, what they are compared with): as many images in each as in x,
    or as many as there are, the classes in turn."""
    train, test = real["train"], real["test"]
    order, part = evenly(train, seed, "train"), min(len(x), len(train) // 2)
    return {"samples": (x.take(evenly(x, seed, "samples")), train),
            "test": (test.take(evenly(test, seed, "test")[: len(x)]), train),
            "train": (train.take(order[:part]), train.take(order[part:]))}


def by_images(rows: dict[str, tuple[Seen, Seen]], even: bool) -> list[dict]:
    """The Frechet distance of an eighth, a quarter, a half and all of the images: it falls with
    their number, so that distances of different numbers of images cannot be compared."""
    total = len(rows["samples"][0])
    return [{"images": n} | {name: distance(x.take(slice(n)), reference, even)
                             for name, (x, reference) in rows.items() if len(x) >= n}
            for n in (total // 8, total // 4, total // 2, total) if n >= LEAST]


def nearest(rows: dict[str, tuple[Seen, Seen]], device: torch.device) -> dict:
    """Distances to the nearest training image, of samples and of as many test images: samples that
    lie much nearer are copies."""
    found = {}
    for name in ("samples", "test"):
        images, train = rows[name][0].images[:MOST_NEAREST], rows[name][1].images
        d = rulers.nearest_distances(images, train, device)
        quantiles = {f"q{q:02d}": float(np.quantile(d, q / 100)) for q in (1, 10, 50, 90)}
        found[name] = dict(images=len(d), mean=float(d.mean()), min=float(d.min()), **quantiles)
    return found


def report(samples: list[Seen], real: dict[str, Seen], class_names: list[str], seed: int,
           device: torch.device) -> dict:
    """rows: for each row of the table its measurements, one per seed, their mean and spread. What
    costs more, or says less, is of the first seed alone."""
    even = samples[0].labels is not None
    rounds, measured = [], {name: [] for name in ROWS}
    for i, x in enumerate(tqdm(samples, desc="measuring", leave=False, dynamic_ncols=True)):
        rounds.append(contenders(x, real, seed + i))
        for name, (images, reference) in rounds[-1].items():
            measured[name].append(measure(images, reference, class_names, seed + i, even))
    rows = {}
    for name, found in measured.items():
        numbers = {k: [r[k] for r in found] for k, v in found[0].items() if isinstance(v, float)}
        rows[name] = dict(images=found[0]["images"],
                          mean={k: float(np.mean(v)) for k, v in numbers.items()}, std=None,
                          seeds=found)
        if len(found) > 1:
            rows[name]["std"] = {k: float(np.std(v, ddof=1)) for k, v in numbers.items()}
    return dict(rows=rows, nearest_training_image=nearest(rounds[0], device),
                frechet_by_images=by_images(rounds[0], even), classes_weighted=even)


# ---------------------------------------------------------------- words


def table(rows: dict) -> str:
    """The report's rows as text."""
    columns = {"accuracy": ".2%", "frechet": ".2f", "precision": ".3f", "recall": ".3f"}
    lines = [["", "images", "accuracy", "Frechet", "precision", "recall"]]
    for name, title in ROWS.items():
        mean, std = rows[name]["mean"], rows[name]["std"]
        line = [title, f"{rows[name]['images']:,}"]
        for key, form in columns.items():
            spread = f" ± {std[key]:{form}}" if std and key in std else ""
            line.append(f"{mean[key]:{form}}{spread}" if key in mean else "-")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in
              zip(line[1:], widths[1:], strict=True)] for line in lines]
    return "\n".join(map("  ".join, padded))


def findings(result: dict) -> str:
    """What to know when reading the table."""
    rows, near = result["rows"], result["nearest_training_image"]
    ratio = rows["samples"]["mean"]["frechet"] / max(rows["test"]["mean"]["frechet"], 1e-12)
    unequal = len({row["images"] for row in rows.values()}) > 1
    weighted = " (each class weighs the same)" if result["classes_weighted"] else ""
    told = {name: f"{d['q50']:.2f} ({d['q01']:.2f})" for name, d in near.items()}
    return "\n".join([
        f"Frechet distance{weighted}: {ratio:.2f} times the test set's"
        + (", but the numbers of images differ: not a fair comparison." if unequal else "."),
        "The ruler was trained on the training set: the test set's distance is somewhat inflated.",
        f"Nearest training image at a distance of (median, and the nearest 1%): samples "
        f"{told['samples']},\ntest set {told['test']}.",
    ])


def keep(result: dict, target: Path | None, run: Path | None, warn: Callable[[str], None]) -> None:
    """Write the report as JSON, and as a line of the run's evaluations.jsonl."""
    if target is not None:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        try:
            atomic_write(target, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
        print(f"written: {target}")
    if run is not None:
        path = run / "evaluations.jsonl"
        try:
            with open(path, "ab", buffering=0) as file:     # one write: a line stays whole
                file.write((json.dumps(result, allow_nan=False) + "\n").encode())
            print(f"appended to {path}")
        except OSError as error:
            warn(f"{path} cannot be written ({error.strerror})")


# ---------------------------------------------------------------- images from anywhere


def read_npz(path: Path) -> tuple[Tensor, np.ndarray | None]:
    """arr_0, uint8 (N, H, W, C), as (N, C, H, W); and arr_1, if it is there: integers (N,)."""
    name = printable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST_BYTES:
                raise UserError(f"{name} holds more than {MOST_BYTES / 2**30:g} GiB")
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file.files:
                raise UserError(f"{name} lacks arr_0, the images: it has "
                                f"{printable(', '.join(file.files) or 'nothing')}")
            images = file["arr_0"]
            labels = file["arr_1"] if "arr_1" in file.files else None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name} cannot be read: {printable(error.strerror or error)}") from None
    except Exception as error:      # zipfile and numpy raise many types on bad bytes
        raise UserError(f"{name} is no .npz file, or damaged ({type(error).__name__})") from None
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"{name}: arr_0 is {images.dtype} {images.shape}, and must be uint8 "
                        f"(N, H, W, C)")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(f"{name}: arr_1 is {labels.dtype} {labels.shape}, and must be integers "
                        f"({len(images)},): a label per image")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def read_folder(root: Path, class_names: list[str]) -> tuple[Tensor, np.ndarray | None]:
    """root/*.png without labels, or root/<class>/*.png with: uint8 (N, 3, H, W), int64 (N,)."""
    folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    files, labels = [], []
    for folder in folders or [root]:
        inside = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMG_EXTENSIONS)
        files += inside
        if folders:
            labels += [parse_label(folder.name, class_names)] * len(inside)
    if not files:
        raise UserError(f"{printable(root)} holds no images: PNGs, or a folder of PNGs per class")
    pictures = []
    for file in tqdm(files, desc="reading images", unit="img", leave=False, dynamic_ncols=True):
        try:
            with Image.open(file) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except Exception as error:  # Pillow's decoders raise many types
            raise UserError(f"{printable(file)} cannot be read as an image "
                            f"({type(error).__name__})") from None
        if pictures[-1].shape != pictures[0].shape:
            raise UserError(f"{printable(file)} and {printable(files[0].name)} differ in size")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, np.array(labels) if folders else None


def as_in(images: Tensor, like: data_sets.ImageSet, name: str) -> Tensor:
    """The images with the channels of a data set; UserError where they are of another size, or in
    colour and it is grey."""
    C, side = like.images.shape[1], like.images.shape[-1]
    if images.shape[2:] != (side, side):
        raise UserError(f"{name}: the images are {images.shape[3]}x{images.shape[2]} pixels, and "
                        f"{like.name} has {side}x{side}: resize them, or the real ones with "
                        f"--image-size")
    if images.shape[1] == C:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, C, -1, -1)
    if C == 1 and images.shape[1] == 3 and (images == images[:, :1]).all():
        return images[:, :1].contiguous()       # grey, saved as RGB
    raise UserError(f"{name}: the images have {images.shape[1]} channels, not all the same, and "
                    f"{like.name} has {C}")


# ---------------------------------------------------------------- what is measured


@dataclass
class Source:
    """The images that the command asks for. make() -> (a tensor uint8 (N, C, H, H) per seed, their
    labels int64 (N,) or None)."""

    title: str
    about: dict                 # for the report
    make: Callable[[], tuple[list[Tensor], np.ndarray | None]]
    run: Path | None = None     # the folder that keeps the report


def from_files(a: argparse.Namespace, path: Path, train: data_sets.ImageSet) -> Source:
    """The images in an .npz or a folder, or --images of them, chosen at random."""
    images, labels = read_folder(path, train.class_names) if path.is_dir() else read_npz(path)
    name, count = printable(path), a.images or len(images)
    if not LEAST <= count <= len(images):
        raise UserError(f"{name} holds {len(images)} images, and {max(count, LEAST)} are needed")
    if labels is not None:
        labels = labels.astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(train.class_names):
            raise UserError(f"{name}: the labels go from {labels.min()} to {labels.max()}, and "
                            f"{train.name} has {len(train.class_names)} classes, from 0")
    images, order = as_in(images, train, name), shuffled(len(images), a.seed, "order")[:count]
    images, labels = images[torch.from_numpy(order)], None if labels is None else labels[order]
    title = f"{name}: {count:,} images{', without labels' if labels is None else ''}"
    return Source(title, dict(seeds=[a.seed]), lambda: ([images], labels))


def from_checkpoint(a: argparse.Namespace, path: Path, state: dict, device: torch.device) -> Source:
    """--images samples for each of --seeds seeds, labels 0, 1, 2 ... in turn."""
    weights, count = a.weights or "ema", a.images or 1000
    model, diffusion = checkpoints.build(state, weights, device)
    how = sampling_of(a, state["config"]["sampling"], diffusion.num_timesteps)
    seeds = list(range(a.seed, a.seed + (a.seeds or 1)))
    y = torch.arange(count) % model.num_classes
    about = dict(step=state["step"], weights=weights, **how, seeds=seeds)

    def make() -> tuple[list[Tensor], np.ndarray]:
        begun = time.perf_counter()
        with tqdm(total=count * how["steps"] * len(seeds), desc="sampling", unit="image-step",
                  unit_scale=True, dynamic_ncols=True) as bar:
            drawn = [torch.cat(list(sample(model, diffusion, y, seed, **how, bar=bar,
                                           batch_size=a.batch_size or 250))) for seed in seeds]
        about["seconds_sampling"] = round(time.perf_counter() - begun, 1)
        return drawn, y.numpy()

    title = (f"{printable(path)}: step {state['step']:,}, {weights}, {how['sampler']}, "
             f"{how['steps']} steps, guidance {how['cfg_scale']:g}, "
             f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}")
    return Source(title, about, make, path.parent if holds_run(path.parent) else None)


def load_data(a: argparse.Namespace, state: dict | None
              ) -> tuple[dict[str, data_sets.ImageSet], Path]:
    """({"train", "test"}, the data directory): the flags', else the checkpoint's, else MNIST."""
    spec, data_dir, size = a.dataset, a.data_dir, a.image_size
    if state is not None:
        recipe, about = state["config"]["recipe"], state["config"]["data"]
        spec = spec or recipe.get("dataset") or about.get("dataset")
        if data_dir is None and Path(str(recipe.get("data_dir"))).is_dir():
            data_dir = recipe["data_dir"]
        size = state["config"]["model"]["input_size"]
    spec, data_dir = str(spec or "mnist"), Path(data_dir or "data").expanduser()
    train, test = (data_sets.load(spec, data_dir, size, split) for split in ("train", "test"))
    test.images = as_in(test.images, train, f"the test split of {train.name}")
    if len(test.images) < LEAST or len(train.images) < 2 * LEAST:
        raise UserError(f"{train.name} has {len(train.images)} training and {len(test.images)} "
                        f"test images, and {2 * LEAST} and {LEAST} are needed to measure against")
    return {"train": train, "test": test}, data_dir


def check_data(state: dict, train: data_sets.ImageSet, warn: Callable[[str], None]) -> None:
    """A model is measured against images of its own kind; UserError where it cannot be."""
    model, config = state["config"]["model"], state["config"]["data"]
    channels, classes = train.images.shape[1], len(train.class_names)
    if model["in_channels"] != channels or model["num_classes"] != classes:
        raise UserError(f"the model makes {model['in_channels']} channels, {model['num_classes']} "
                        f"classes, and {train.name} has {channels} and {classes}: --dataset names "
                        f"the data set it was trained on")
    if config.get("digest") != train.digest():
        warn(f"the model was trained on other images ({printable(config.get('dataset'))}, digest "
             f"{printable(config.get('digest'))}) than it is measured against ({train.name}, "
             f"{train.digest()})")


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    device = pick_device(a.device)
    warn = Ranks(device).warn
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("evaluate.py runs in one process: torchrun sample.py --npz, then measure "
                        "the .npz")
    if a.train_ruler:
        check_flags(a, "the images to measure", MEASURING)
        return train_ruler(a, device)
    path = Path(a.images_from) if a.images_from else find_checkpoint(None)
    files = path.suffix.lower() == ".npz" or (os.path.isdir(path) and not checkpoints_in(path))
    if not os.path.exists(path):
        raise UserError(f"{printable(path)} does not exist")
    if files and os.path.isdir(path) and any(map(checkpoints_in, path.glob("*/"))):
        raise UserError(f"{printable(path)} is a folder of runs: name one of them")
    if files:
        check_flags(a, "a checkpoint", SAMPLING)
    else:
        check_flags(a, "an .npz or a folder", ("image_size",))
    if a.json is not None:
        check_target(a.json, a.force, ".json")

    # The images to measure, the real ones, the ruler
    state = None
    if not files:
        path = find_checkpoint(str(path))
        state = checkpoints.load(path)
    sets, data_dir = load_data(a, state)
    train, test = sets["train"], sets["test"]
    if state is not None:
        check_data(state, train, warn)
    source = from_files(a, path, train) if files else from_checkpoint(a, path, state, device)
    ruler, known, ruler_file = rulers.find(train, test, data_dir, device, warn)

    # Measure
    print(f"{source.title}\nruler: {ruler_file.name}, right on {known['test_accuracy']:.2%} of the "
          f"test set of {printable(train.name)}", flush=True)
    drawn, labels = source.make()
    real = see_real(ruler, sets, data_dir)
    samples = [see(ruler, images, labels, "samples") for images in drawn]
    result = dict(images_from=printable(path), **source.about, dataset=train.name,
                  data_digest=train.digest(), ruler=ruler_file.name, ruler_digest=ruler.digest(),
                  ruler_test_accuracy=known["test_accuracy"], device=device.type,
                  torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    result |= report(samples, real, train.class_names, a.seed, device)
    print(f"\n{table(result['rows'])}\n\n{findings(result)}")
    keep(result, a.json, source.run, warn)
    return 0


def check_flags(a: argparse.Namespace, meant_for: str, flags: tuple[str, ...]) -> None:
    """Before any work: none of these flags, which would be without effect."""
    for flag in flags:
        if getattr(a, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} is for {meant_for}")


def train_ruler(a: argparse.Namespace, device: torch.device) -> int:
    """--train-ruler: MNIST's into assets/, any other beside the data."""
    if a.images_from is not None:
        raise UserError("--train-ruler measures nothing: leave out the images")
    sets, data_dir = load_data(a, None)
    ships = sets["train"].name == "mnist" and a.image_size is None
    path = rulers.SHIPPED if ships else rulers.kept_at(sets["train"], data_dir)
    check_target(path, a.force, ".pt")
    begun = time.perf_counter()
    about = rulers.make(sets["train"], sets["test"], path, a.seed, device)
    print(f"right on {about['test_accuracy']:.2%} of the test set; {path.stat().st_size:,} bytes, "
          f"{time.perf_counter() - begun:.0f} s\nwritten: {path}")
    return 0


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("images_from", nargs="?", metavar="CKPT|FILE.npz|FOLDER", help="a checkpoint or "
                   "a run's folder, an .npz, or a folder of images (default: the newest checkpoint "
                   "under output/, else the one that ships)")
    g = p.add_argument_group("what")
    g.add_argument("--images", type=number(int, LEAST, 1_000_000), metavar="N",
                   help="images to measure (default: "
                   "1000 from a checkpoint, equally of all classes; else all there are)")
    g.add_argument("--seed", type=SEED, default=0, help="of the noise and of every "
                   "random choice (default: 0)")
    g.add_argument("--seeds", type=COUNT, metavar="K", help="sample K times, with seeds from "
                   "--seed on: mean ± standard deviation (default: 1, as each takes as long)")
    g.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    g = p.add_argument_group("how to sample from a checkpoint (default: what it suggests)")
    g.add_argument("--cfg-scale", type=number(float, -100, 100), metavar="S",
                   help="guidance: 1 is the plain conditional model, 0 the unconditional one")
    g.add_argument("--sampler", choices=checkpoints.SAMPLERS, help="ddpm (all timesteps) or ddim")
    g.add_argument("--steps", type=COUNT, help="sampling steps, ddim")
    g.add_argument("--eta", type=number(float, 0, 1), help="noise that ddim adds: 0 none, 1 as "
                   "ddpm")
    g.add_argument("--weights", choices=("ema", "model"),
                   help="the averaged weights or the last ones (default: ema)")
    g.add_argument("--batch-size", type=BATCH, metavar="N",
                   help="images at a time (default: 250)")
    g = p.add_argument_group("the real images, and the ruler")
    g.add_argument("--dataset", help="mnist, fashion_mnist, cifar10, glyphs or folder:PATH "
                   "(default: the checkpoint's, else mnist)")
    g.add_argument("--data-dir", metavar="DIR", help="where the data set is, or is downloaded to; "
                   "the rulers of other sets and the features of real images are kept there too "
                   "(default: the checkpoint's if it is there, else data)")
    g.add_argument("--image-size", type=SIDE, help="side in pixels that the real images are "
                   "resized to, for an .npz or a folder (default: the data set's; 32 for folder:)")
    g.add_argument("--train-ruler", action="store_true", help="train the ruler of --dataset and "
                   "write it, into assets/ if that is mnist; no more than that")
    g = p.add_argument_group("where to")
    g.add_argument("--json", type=Path, metavar="FILE.json", help="the whole report (from a run's "
                   "checkpoint it is also appended to evaluations.jsonl in the run's folder)")
    g.add_argument("--force", action="store_true", help="overwrite existing files")
    return p


if __name__ == "__main__":
    cli(main)
