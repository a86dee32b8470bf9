"""Data sets. Each becomes one uint8 tensor in memory; an epoch is one random permutation of it.

    mnist, fashion_mnist, cifar10    through torchvision, from --data-dir or downloaded
    celeba, celeba:ATTRIBUTE         the same; an attribute (Male) makes the two classes
    folder:PATH                      PATH/<class name>/<images of any size>
    glyphs                           digits drawn with Pillow's built-in font, without a download
    latents:FILE                     latents of an autoencoder, which tools/convert.py writes

The training loop uses `x0, y = batches(step)`.
"""

import contextlib
import hashlib
import io
import math
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from support.checkpoint import read_archive
from support.command import DATA, UserError, reason, say, warn
from support.compute import generator, seed_of

NAMES = ("mnist", "fashion_mnist", "cifar10", "celeba", "glyphs")
HIDDEN = (".", "@", "__")       # names of systems' own files: @eaDir, __MACOSX
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
BAR = dict(unit="img", leave=False, delay=1, dynamic_ncols=True)
MNIST = "a0c8252af19ceb18"      # ImageSet.digest() of its 60,000 training images


@dataclass
class ImageSet:
    """images: uint8 (N, C, H, H) with C 1 or 3, or float16 latents with any C; labels: int64 (N,),
    on the same device. sampling: what this data changes of sample.py's defaults."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    name: str

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def sampling(self) -> dict:
        return dict(latents=True) if self.images.is_floating_point() else {}

    def digest(self) -> str:
        """A short hash of all pixels, labels and class names, which identifies the data."""
        digest = hashlib.sha256(str((tuple(self.images.shape), self.class_names)).encode())
        for part in (self.images, self.labels):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> "ImageSet":
        """On `device`, or unchanged where it would fill over half of the GPU's free memory."""
        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


class Batches:
    """x0, y = batches(step): images in [-1, 1], float32 (B, C, H, H), and labels (B,), on `device`.

    Epoch e is a permutation of all images, a function of (seed, e). Batches are read from the
    concatenated epochs, so every epoch uses every image. share: this process's slice of the batch.
    flip: mirror each image left-right with probability 1/2.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int, device: torch.device,
                 flip: bool = False, share: slice = slice(None)):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.device, self.flip, self.share = device, flip, share
        self.last = None, None              # an epoch and its order

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch, int64 (N,), on the images' device."""
        if self.last[0] != epoch:
            rng = generator("cpu", self.seed, "epoch", epoch)
            order = torch.randperm(len(self.images.images), generator=rng)
            self.last = epoch, order.to(self.images.images.device)
        return self.last[1]

    def index(self, step: int) -> Tensor:
        """Which images form the whole batch of a step, int64 (batch_size,)."""
        at, end, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while at < end:
            epoch, start = divmod(at, len(self.images.images))
            parts.append(self.order(epoch)[start : start + end - at])
            at += len(parts[-1])
        return torch.cat(parts)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        index = self.index(step)[self.share]
        x0, y = (part[index].to(self.device) for part in (self.images.images, self.images.labels))
        x0 = x0.float() if x0.is_floating_point() else x0.float() / 127.5 - 1
        if self.flip:       # decided for the whole batch: the same for any number of processes
            rng = generator("cpu", self.seed, "flip", step)
            mirrored = torch.rand(self.batch_size, generator=rng)[self.share] < 0.5
            x0 = torch.where(mirrored.view(-1, 1, 1, 1).to(self.device), x0.flip(-1), x0)
        return x0, y


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- loading a data set


def load(spec: str, data_dir: str | Path | None = None, image_size: int | None = None,
         split: str = "train") -> ImageSet:
    """The data set `spec` (listed at the top of this file), on the CPU.

    data_dir: where torchvision's data sets are, or are downloaded to (default: data/).
    image_size: the side in pixels (default: the data set's own; 32 for a folder, 64 for celeba).
    split: "train" or "test". Of a folder and of latents, every tenth of a class is for "test".
    Raises UserError naming the wrong file or value.
    """
    name, _, rest = spec.partition(":")
    root = Path(data_dir or DATA).expanduser()
    if name == "folder" and rest:
        return load_folder(Path(rest).expanduser(), image_size or 32, split)
    if name == "latents" and rest:
        return load_latents(Path(rest).expanduser(), image_size, split)
    if name == "celeba":
        return load_celeba(root, image_size or 64, split, rest or "Male")
    if spec not in NAMES:
        raise UserError(f"data set {spec} is unknown: choose one of {', '.join(NAMES)}, "
                        f"folder:PATH or latents:FILE")
    found = draw_glyphs(20_000 if split == "train" else 2_000, seed=seed_of(0, split)) \
        if spec == "glyphs" else load_torchvision(spec, root, split)
    if image_size and image_size != found.size:
        small, side = found.images, (image_size, image_size)
        found.images = torch.empty(*small.shape[:2], *side, dtype=torch.uint8)  # or out of memory
        for parts in zip(small.split(1000), found.images.split(1000), strict=True):
            parts[1].copy_(F.interpolate(parts[0].float(), side, mode="bilinear", antialias=True)
                           .round())
    return found


def load_or_glyphs(spec: str, data_dir: str | None, image_size: int | None, named: bool
                   ) -> ImageSet:
    """`load`; glyphs, with a banner, where nobody named a data set and MNIST cannot be had."""
    try:
        return load(spec, data_dir, image_size)
    except UserError as error:
        if named:
            raise
        say("=" * 80, f"NO MNIST: {error}", "Training on GLYPHS instead: digits drawn with a font, "
            "not handwritten ones.", "=" * 80)
        return load("glyphs", None, image_size)


def load_torchvision(spec: str, root: Path, split: str) -> ImageSet:
    from torchvision import datasets        # here, because the import takes a second

    cls = dict(mnist=datasets.MNIST, fashion_mnist=datasets.FashionMNIST,
               cifar10=datasets.CIFAR10)[spec]
    raw = downloaded(cls, spec, root, split == "train")
    images = torch.as_tensor(raw.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    names = [name.split(" - ")[0] for name in raw.classes]              # MNIST: "0 - zero"
    found = ImageSet(images, torch.as_tensor(raw.targets), names, spec)
    if (spec, split) == ("mnist", "train") and found.digest() != MNIST:
        raise UserError(f"the MNIST in {root} is damaged: delete it to download it again")
    return found


def downloaded(cls: type, spec: str, root: Path, split: bool | str):
    """torchvision's data set, downloaded where it is not in `root`. Of an offline machine the
    resolver says so at once; a server that does not answer has 15 seconds."""
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)
    try:
        with contextlib.redirect_stdout(io.StringIO()):     # the progress bar is on standard error
            return cls(root, split, download=True)
    except Exception as error:              # from the network, the disk, a damaged file ...
        raise UserError(f"{spec} cannot be read from {root} or downloaded ({reason(error)}): put "
                        f"its files there, or use --dataset glyphs") from None
    finally:
        socket.setdefaulttimeout(default)


def load_celeba(root: Path, image_size: int, split: str, attribute: str) -> ImageSet:
    """CelebA (Liu et al., arXiv 1411.7766): 202,599 faces, the centre square of each, resized."""
    from torchvision import datasets

    raw = downloaded(datasets.CelebA, "celeba", root, split)
    if attribute not in raw.attr_names:
        raise UserError(f"celeba has no attribute {attribute}: it has "
                        f"{', '.join(filter(None, raw.attr_names))}")
    cache = root / "celeba" / f"cache-{split}-{image_size}.npy"
    files = [root / "celeba" / "img_align_celeba" / name for name in raw.filename]
    try:
        images = np.load(cache)
    except (OSError, ValueError, EOFError):
        images = read_images(files, image_size)
        try:
            np.save(cache, images)
        except OSError as error:
            warn(f"{cache} cannot be written ({reason(error)}): the next run decodes them again")
    names = ["female", "male"] if attribute == "Male" else [f"not {attribute}", attribute]
    return ImageSet(torch.from_numpy(images), raw.attr[:, raw.attr_names.index(attribute)].long(),
                    names, "celeba")


# ---------------------------------------------------------------- your own


def load_folder(root: Path, image_size: int, split: str) -> ImageSet:
    """The images in PATH/<class name>/: grey if R = G = B in every image, else RGB. The shorter
    side is resized to image_size, the longer one cropped at the centre."""
    files, names, white = folder_files(root)
    labels = torch.tensor([label for _, label in files])
    kept = in_split(labels, split, root)
    images = read_images([files[i][0] for i in kept], image_size, white)
    if images.max() < 64:                   # Pillow keeps 8 of the 16 bits of a colour
        warn(f"the brightest value of all images is {images.max()} of 255")
    if (images == images[:, :1]).all():
        images = images[:, :1].copy()
    counts = labels[kept].bincount(minlength=len(names)).tolist()
    say(f"{split} images: " + ", ".join(map("{} {}".format, names[:20], counts)) +
        f" ... ({len(names)} classes)" * (len(names) > 20))
    return ImageSet(torch.from_numpy(images), labels[kept], names, f"folder:{root.resolve().name}")


def in_split(labels: Tensor, split: str, path: Path) -> Tensor:
    """The indices of the images of a split, of which "test" is every tenth of each class."""
    place = torch.empty_like(labels)                    # of each among those of its class
    for label in labels.unique():
        where = (labels == label).nonzero().flatten()
        place[where] = torch.arange(len(where))
    kept = ((place % 10 == 9) == (split == "test")).nonzero().flatten()
    if not len(kept):
        raise UserError(f"{path} has no images for {split}: every tenth of a class is for testing")
    return kept


def folder_files(root: Path) -> tuple[list[tuple[Path, int]], list[str], int]:
    """((path, label) of each image in root/<class name>/, class names, white): whatever Pillow
    identifies, sorted by name. white: what is white where an image has more than 8 bits; the
    largest value in any of them, rounded up to 2^n - 1."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: folder:PATH needs PATH/<class name>/<images>")
    inside = [path for path in sorted(root.iterdir()) if not path.name.startswith(HIDDEN)]
    classes = [path for path in inside if path.is_dir()]
    ending = lambda path: path.suffix.lower() or "without ending"
    notes = Counter(f"{ending(path)} beside the class folders (left out)" for path in inside
                    if not path.is_dir())
    seen = {path.resolve() for path in (root, *classes)}        # by files_in
    files, largest, deep = [], 0, "of more than 8 bits"
    for label, path in tqdm([(label, path) for label, folder in enumerate(classes)
                             for path in files_in(folder, seen)], "finding images", **BAR):
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    largest = max(largest, int(image.getextrema()[1]))
                    notes[deep] += 1
                if getattr(image, "is_animated", False):
                    notes["of several images (the first is taken)"] += 1
        except UnidentifiedImageError:
            notes[f"{ending(path)} (left out)"] += 1
            continue
        except Exception:                   # open_image names the reason
            pass
        files.append((path, label))
    white = max(1, 2 ** largest.bit_length() - 1)
    if notes:
        kinds = [f"{count} {kind}" for kind, count in notes.most_common()]
        warn(f"files in {root}: {', '.join(kinds)}" + f"; white is {white}" * (deep in notes))
    if not files:
        raise UserError(f"{root} has no images: folder:PATH needs PATH/<class name>/<images>")
    if empty := set(range(len(classes))) - {label for _, label in files}:
        raise UserError(f"{classes[min(empty)]} has no images: every class needs some")
    parents = {path.parent for path, _ in files}
    if odd := [f.name for f in classes if f not in parents or f.name.lower() in SPLITS]:
        warn(f"classes that hold folders alone or are named like splits: {', '.join(odd[:5])}. If "
             f"the classes are one level deeper: --dataset folder:{root}/<one of these>")
    return files, [folder.name for folder in classes], white


def files_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files in a folder and its subfolders, sorted. Links are followed; no folder is `seen`
    twice."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(HIDDEN):
            continue
        if not path.is_dir():
            yield path
        elif (real := path.resolve()) not in seen:
            seen.add(real)
            yield from files_in(path, seen)


def read_images(paths: list[Path], image_size: int, white: int = 65535) -> np.ndarray:
    """uint8 (N, 3, image_size, image_size)."""
    images, blank = np.empty((len(paths), 3, image_size, image_size), np.uint8), []
    for i, path in enumerate(tqdm(paths, "reading images", **BAR)):
        images[i] = open_image(path, image_size, white)
        if (images[i] == images[i, :, :1, :1]).all():
            blank.append(path)
    if blank:
        warn(f"{len(blank)} of {len(paths)} images have a single colour, such as {blank[0]} "
             f"(transparent pixels are white)")
    return images


def open_image(path: Path, image_size: int, white: int = 65535) -> np.ndarray:
    """One image, RGB uint8 (3, image_size, image_size): upright, transparent pixels over white.
    white: what is white where it has more than 8 bits."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":
                levels = np.nan_to_num(np.asarray(image) * (255 / white)).round().clip(0, 255)
                image = Image.fromarray(levels.astype(np.uint8))
            if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (image_size, image_size),
                                 Image.Resampling.BICUBIC)
    except Exception as error:              # Pillow's decoders raise many types
        raise UserError(f"{path} cannot be read as an image ({reason(error)})") from None
    return np.asarray(image).transpose(2, 0, 1)


def load_latents(path: Path, image_size: int | None, split: str) -> ImageSet:
    """The latents in a file that `tools.convert encode` wrote: latents float16 (N, C, H, H), scaled
    to a standard deviation of about 1; labels int64 (N,); class_names."""
    found = read_archive(path)
    try:
        latents, labels, names = (found[key] for key in ("latents", "labels", "class_names"))
        N, C, H, W = latents.shape
        assert found["format"] == "dit-latents/1" and H == W and labels.shape == (N,)
        assert latents.is_floating_point() and latents.half().isfinite().all()
        assert labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() < len(names)
        assert isinstance(names, list) and all(isinstance(name, str) for name in names)
    except Exception:
        raise UserError(f"{path} holds no valid latents: python -m tools.convert encode writes "
                        f"them") from None
    if image_size not in (None, H):
        raise UserError(f"--image-size does not apply to latents: {path} has {H}x{H}")
    kept = in_split(labels, split, path)
    return ImageSet(latents[kept].half(), labels[kept], names, f"latents:{path.name}")


def draw_glyphs(count: int, seed: int = 0) -> ImageSet:
    """28x28 grey digits in Pillow's built-in font: rotated, sheared, scaled, shifted, thin or bold.

    A function of the seed and the version of Pillow.
    """
    big, strokes = 84, (0, 1, 2, 4)             # drawn at three times the size, then reduced
    base, font = {}, ImageFont.load_default(size=66)
    for digit in range(10):
        for stroke in strokes:
            canvas = Image.new("L", (big, big))
            ImageDraw.Draw(canvas).text((big / 2, big / 2), str(digit), fill=255, font=font,
                                        anchor="mm", stroke_width=stroke)
            base[digit, stroke] = canvas
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    chosen = rng.integers(len(strokes), size=count)
    angle, shear = rng.normal(0, 0.15, (2, count)).clip(-0.35, 0.35)            # radians, tangent
    scale_x, scale_y = rng.uniform(0.9, 1.3, count), rng.uniform(0.9, 1.15, count)  # > 1: smaller
    shift = rng.uniform(-4, 4, (count, 2))
    images = np.empty((count, 1, 28, 28), np.uint8)
    for i in range(count):                      # output pixel -> position in the base image
        cos, sin = math.cos(angle[i]), math.sin(angle[i])
        a, b = scale_x[i] * cos, scale_x[i] * (shear[i] * cos - sin)
        d, e = scale_y[i] * sin, scale_y[i] * (shear[i] * sin + cos)
        x, y = big / 2 + shift[i, 0], big / 2 + shift[i, 1]
        affine = (a, b, big / 2 - a * x - b * y, d, e, big / 2 - d * x - e * y)
        moved = base[int(labels[i]), strokes[chosen[i]]].transform(
            (big, big), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        images[i, 0] = np.asarray(moved.reduce(3))
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)),
                    [str(d) for d in range(10)], "glyphs")
