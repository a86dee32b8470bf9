"""Images in memory: every data set becomes one uint8 tensor, and an epoch one permutation.

    mnist, fashion_mnist, cifar10    through torchvision, from --data-dir or downloaded
    folder:PATH                      a folder per class, of images of any size
    glyphs                           digits drawn with Pillow's own font: offline, in seconds

Not needed to understand DiT: the training loop asks for `images[index]` and `labels[index]`.
"""

import hashlib
import math
import os
import socket
import struct
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from runs import UserError, atomic_write, generator, mix_seed, printable

DOWNLOAD_TIMEOUT = 15           # seconds without an answer from a server
NAMES = ("mnist", "fashion_mnist", "cifar10", "glyphs")


@dataclass
class ImageSet:
    """images: uint8 (N, C, H, H), C 1 or 3. labels: int64 (N,). Both stay on one device."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    name: str

    def digest(self) -> str:
        """A short hash of every pixel, label and class name: the same data, wherever it lies."""
        parts = [str((tuple(self.images.shape), self.class_names)).encode(),
                 self.images.cpu().numpy().tobytes(), self.labels.cpu().numpy().tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def to(self, device: torch.device) -> "ImageSet":
        """The set on `device`, or where it is if it would take over half of the free memory."""
        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names, self.name)

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """x0 float32 (B, C, H, H) in [-1, 1] and y int64 (B,), on `device`, for index (B,)."""
        index = index.to(self.images.device)
        x0 = self.images[index].to(device, non_blocking=True).float() / 127.5 - 1
        return x0, self.labels[index].to(device, non_blocking=True)


class Batches:
    """index = batches(step): the images of a step, int64 (batch_size,), on `device`.

    Epoch e is a permutation of all images that (seed, e) decide; steps read the permutations one
    behind the other, a batch at a time, so that no image is left out of any epoch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, device: torch.device):
        self.num_images, self.batch_size, self.seed, self.device = num_images, batch_size, seed, device
        self._orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            rng = generator("cpu", self.seed, "epoch", epoch)
            order = torch.randperm(self.num_images, generator=rng).to(self.device)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]

    def __call__(self, step: int) -> Tensor:
        at, parts = step * self.batch_size, []
        while len(parts) == 0 or at < (step + 1) * self.batch_size:
            epoch, start = divmod(at, self.num_images)
            part = self.order(epoch)[start : start + (step + 1) * self.batch_size - at]
            parts.append(part)
            at += len(part)
        return torch.cat(parts)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, clipped: the inverse of `ImageSet.batch`."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- finding a data set


class DataMissing(UserError):
    """The data set is neither in the data directory nor to be downloaded."""


def load(spec: str, data_dir: str | Path = "data", image_size: int | None = None,
         split: str = "train", seed: int = 0) -> ImageSet:
    """The data set `spec` (see the top of this file), on the CPU.

    split: "train" or "test". Of a folder, every tenth file of a class is "test".
    image_size: the side in pixels; by default that of the data set, and 32 for a folder.
    Raises UserError naming the file or value that is wrong; DataMissing where there is no data.
    """
    if spec.startswith("folder:"):
        return load_folder(Path(spec[len("folder:"):]).expanduser(), image_size or 32, split)
    if spec not in NAMES:
        raise UserError(f"data set {printable(spec)!r} is unknown: choose one of "
                        f"{', '.join(NAMES)} or folder:PATH")
    if spec == "glyphs":
        found = draw_glyphs(20_000 if split == "train" else 2_000, seed=mix_seed(seed, split))
    else:
        found = load_torchvision(spec, Path(data_dir).expanduser(), split)
    if image_size and image_size != found.images.shape[-1]:
        found.images = torch.cat([
            F.interpolate(part.float(), (image_size, image_size), mode="bilinear", antialias=True)
            .round().to(torch.uint8) for part in found.images.split(10_000)
        ])
    return found


# What lies in DIR/MNIST/raw: images, then labels; MD5 of the original distribution's files.
_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60_000),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 10_000),
}
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_torchvision(spec: str, root: Path, split: str) -> ImageSet:
    """mnist, fashion_mnist or cifar10 under `root`, downloaded there first if it is missing."""
    make = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST,
            "cifar10": datasets.CIFAR10}[spec]
    if spec == "cifar10":
        folder, files = root, ["cifar-10-batches-py/ (from cifar-10-python.tar.gz)"]
    else:
        folder, files = root / make.__name__ / "raw", [*_IDX["train"][:2], *_IDX["test"][:2]]
    wanted = f"put {', '.join(files)} into {folder}"
    present = (root / datasets.CIFAR10.base_folder).is_dir() if spec == "cifar10" else \
        all((folder / name).is_file() for name in _IDX[split][:2])
    if not present:
        _download(make, root, spec, wanted)
    if spec != "cifar10":
        _check_idx(folder, split, _MNIST_MD5 if spec == "mnist" else {})
    try:
        found = make(root, train=split == "train", download=False)
        images, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets)
    except Exception as error:      # torchvision's parsers fail in many ways: name the place
        raise UserError(f"the {spec} files in {folder} cannot be read ({_reason(error)}); "
                        f"delete them to download them again, or {wanted}") from None
    images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images.unsqueeze(1)
    names = [name.split(" - ")[0] for name in found.classes]        # MNIST: "0 - zero"
    return ImageSet(images, labels.long(), names, spec)


def _download(make, root: Path, spec: str, wanted: str) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        make(root, download=True)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise DataMissing(f"{spec} is not in {root} and cannot be downloaded ({_reason(error)}): "
                          f"{wanted}, or use --dataset glyphs") from None
    finally:
        socket.setdefaulttimeout(timeout)


def _check_idx(folder: Path, split: str, md5: dict[str, str]) -> None:
    """Raises UserError unless the two idx files of a split are whole and of the right kind."""
    images, labels, count = _IDX[split]
    for name, magic, header in [(images, 2051, (count, 28, 28)), (labels, 2049, (count,))]:
        path = folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {_reason(error)}") from None
        start = 4 + 4 * len(header)
        if len(content) < start or struct.unpack(">I", content[:4])[0] != magic:
            raise UserError(f"{path} is not an idx file of its kind: it must begin with the "
                            f"number {magic}")
        if struct.unpack(f">{len(header)}I", content[4:start]) != header:
            raise UserError(f"{path} has the wrong sizes in its header: {header} is right")
        if len(content) != start + math.prod(header):
            raise UserError(f"{path} has {len(content):,} bytes and should have "
                            f"{start + math.prod(header):,}: delete it to download it again")
        if name == labels and max(content[start:]) > 9:
            raise UserError(f"{path} holds a label above 9")
        if name in md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5[name]:
            raise UserError(f"{path} is damaged: its MD5 is not {md5[name]}; delete it to "
                            f"download it again")


def _reason(error: Exception) -> str:
    return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)


# ---------------------------------------------------------------- a folder per class


def load_folder(root: Path, image_size: int, split: str) -> ImageSet:
    """PATH/class name/any.jpg ...: grey if every image is grey, else RGB.

    The shorter side is resized to image_size, the longer one cropped about its centre. Every
    tenth file of a class, in the order of names, is held out as the test split.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: folder:PATH needs PATH/<class name>/<images>")
    classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{root} holds {len(classes)} class folders: two or more are needed, "
                        f"PATH/<class name>/<images>")
    files, labels = [], []
    for label, folder in enumerate(classes):
        inside = sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names
                        if name.lower().endswith(IMG_EXTENSIONS))
        if not inside:
            raise UserError(f"class folder {printable(folder)} holds no image "
                            f"({', '.join(IMG_EXTENSIONS)})")
        kept = [f for i, f in enumerate(inside) if (i % 10 == 9) == (split == "test")]
        files += kept
        labels += [label] * len(kept)
    if not files:
        raise UserError(f"{root}: no class has ten images, so none is held out for the test split")
    opened = [_open(f, image_size) for f in tqdm(files, desc="reading images", unit="img",
                                                 leave=False)]
    grey = all(image.mode == "L" for image in opened)
    images = np.stack([np.asarray(image if grey else image.convert("RGB")) for image in opened])
    images = torch.from_numpy(images if not grey else images[..., None]).permute(0, 3, 1, 2)
    return ImageSet(images.contiguous(), torch.tensor(labels), [d.name for d in classes],
                    f"folder:{root.resolve().name}")


def _open(path: Path, image_size: int) -> Image.Image:
    """One image, L or RGB, image_size x image_size."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    except Exception as error:          # Pillow's decoders raise many types: name the file
        raise UserError(f"{printable(path)} cannot be read as an image "
                        f"({_reason(error)})") from None
    if min(image.size) < image_size:
        raise UserError(f"{printable(path)} is {image.width}x{image.height} pixels, smaller than "
                        f"--image-size {image_size}")
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------- glyphs


def draw_glyphs(count: int, seed: int = 0) -> ImageSet:
    """28x28 grey digits in Pillow's own font, rotated, sheared, scaled, shifted, bold or thin.

    Deterministic by seed (for one version of Pillow). Raises UserError where Pillow lacks FreeType.
    """
    big, strokes = 84, (0, 1, 3, 5)             # drawn at three times the size, then averaged
    try:
        font = ImageFont.load_default(size=66)
    except (ImportError, OSError):
        raise UserError("this Pillow has no FreeType, which glyphs need: pip install pillow") from None
    base = {}
    for digit in range(10):
        for stroke in strokes:
            canvas = Image.new("L", (big, big))
            ImageDraw.Draw(canvas).text((big / 2, big / 2), str(digit), fill=255, font=font,
                                        anchor="mm", stroke_width=stroke)
            base[digit, stroke] = canvas
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10)
    chosen = rng.integers(len(strokes), size=count)
    angle, shear = rng.normal(0, 0.15, count), rng.normal(0, 0.15, count)
    scale_x, scale_y = rng.uniform(0.85, 1.3, count), rng.uniform(0.85, 1.15, count)
    shift = rng.uniform(-5, 5, (count, 2))
    images = np.empty((count, 1, 28, 28), np.uint8)
    for i in range(count):                      # output pixel -> place in the base picture
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


# ---------------------------------------------------------------- pictures


def grid(images: Tensor, columns: int, title: str = "") -> Image.Image:
    """uint8 images (N, C, H, H) in reading order, `columns` to a row, small ones enlarged."""
    side = images.shape[-1]
    zoom, gap = max(1, 56 // side), 2
    rows = -(-len(images) // columns)
    cell, top = side * zoom + gap, 18 if title else 0
    sheet = Image.new("RGB", (columns * cell + gap, rows * cell + gap + top), (40, 40, 40))
    for i, image in enumerate(images.cpu()):
        pixels = image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
        picture = Image.fromarray(pixels).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + i % columns * cell, gap + i // columns * cell + top))
    if title:
        ImageDraw.Draw(sheet).text((gap + 2, 3), title, fill=(255, 255, 255))
    return sheet


def save_picture(path: Path, picture: Image.Image, **options) -> None:
    """Write PNG or GIF, by the name, whole or not at all. Raises OSError."""
    kind = path.suffix[1:].upper()
    atomic_write(path, lambda file: picture.save(file, format=kind, **options))
