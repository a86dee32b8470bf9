"""Data sets. Each becomes one uint8 tensor in memory; an epoch is one random permutation of it.

    mnist, fashion_mnist, cifar10    through torchvision, from --data-dir or downloaded
    folder:PATH                      PATH/<class name>/<images of any size>
    glyphs                           digits drawn with Pillow's built-in font, without a download
    celeba                           faces; an attribute makes the two classes (support/celeba.py)
    latents:FILE                     latents of an autoencoder (support/latents.py)

The training loop uses `x0, y = batches(step)`.
"""

import contextlib
import hashlib
import io
import math
import os
import socket
import struct
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

from support import paths
from support.cli import UserError, io_errors, reason, shorten
from support.distributed import warn
from support.seeds import generator, mix_seed

NAMES = ("mnist", "fashion_mnist", "cifar10", "glyphs", "celeba")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
SOCKET_TIMEOUT, STALL_TIMEOUT = 15, 40      # seconds: for one answer; without download progress


@dataclass
class ImageSet:
    """images: uint8 (N, C, H, H) with C 1 or 3; labels: int64 (N,), on the same device."""

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

    def digest(self) -> str:
        """A short hash of all pixels, labels and class names, which identifies the data."""
        digest = hashlib.sha256(str((tuple(self.images.shape), self.class_names)).encode())
        for part in (self.images, self.labels):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> "ImageSet":
        """The set on `device`, or unchanged if it would fill over half of the GPU's free memory."""
        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """x0 float32 (B, C, H, H) in [-1, 1] and y int64 (B,), on `device`, for index (B,)."""
        index = index.to(self.images.device)
        x0 = to_device(self.images[index], device).float() / 127.5 - 1
        return x0, to_device(self.labels[index], device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. From CPU to GPU asynchronously, through pinned memory."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Batches:
    """x0, y = batches(step): the images of a step in [-1, 1] and their labels, on `device`.

    Epoch e is a permutation of all images, a function of (seed, e). Batches are read from the
    concatenated epochs, so every epoch uses every image. `share` is this process's slice of the
    global batch. With `flip`, each image is mirrored left-right with probability 1/2.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int, device: torch.device,
                 flip: bool = False, share: slice = slice(None)):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.device, self.flip, self.share = torch.device(device), flip, share
        self._orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch, int64 (N,), on the images' device."""
        if epoch not in self._orders:
            rng = generator("cpu", self.seed, "epoch", epoch)
            order = torch.randperm(len(self.images.images), generator=rng)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = to_device(order, self.images.images.device)
        return self._orders[epoch]

    def index(self, step: int) -> Tensor:
        """Which images form the global batch of a step, int64 (batch_size,)."""
        at, end, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while at < end:
            epoch, start = divmod(at, len(self.images.images))
            parts.append(self.order(epoch)[start : start + end - at])
            at += len(parts[-1])
        return torch.cat(parts)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        x0, y = self.images.batch(self.index(step)[self.share], self.device)
        if self.flip:       # decided for the global batch: the same for any number of processes
            rng = generator("cpu", self.seed, "flip", step)
            mirrored = torch.rand(self.batch_size, generator=rng)[self.share] < 0.5
            mirrored = to_device(mirrored.view(-1, 1, 1, 1), self.device)
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        return x0, y


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, clipped: the inverse of `ImageSet.batch`."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- loading a data set


class DataMissing(UserError):
    """The data set is not in the data directory and cannot be downloaded."""


def load(spec: str, data_dir: str | Path | None = None, image_size: int | None = None,
         split: str = "train", seed: int = 0, celeba_attribute: str | None = None) -> ImageSet:
    """The data set `spec` (listed at the top of this file), on the CPU.

    data_dir: where torchvision's data sets are, or are downloaded to (default: data/).
    image_size: the side in pixels (default: the data set's own; 32 for a folder, 64 for celeba).
    split: "train" or "test". In a folder, every tenth file of a class is held out for "test".
    celeba_attribute: what celeba's classes tell apart (default: Male).
    Raises UserError naming the wrong file or value; DataMissing if there is no data.
    """
    if spec.startswith("folder:"):
        root = Path(os.path.expanduser(spec.removeprefix("folder:")))
        return load_folder(root, image_size or 32, split)
    if spec.startswith("latents:"):
        from support.latents import load_latents        # which imports this module
        return load_latents(Path(os.path.expanduser(spec.removeprefix("latents:"))), image_size,
                            split)
    if spec not in NAMES:
        raise UserError(f"data set {shorten(spec)} is unknown: choose one of {', '.join(NAMES)}, "
                        f"folder:PATH or latents:FILE")
    root = Path(os.path.expanduser(data_dir or paths.DATA))
    if spec == "celeba":
        from support.celeba import load_celeba          # which imports this module
        return load_celeba(root, image_size or 64, split, celeba_attribute or "Male")
    if spec == "glyphs":
        found = draw_glyphs(20_000 if split == "train" else 2_000, seed=mix_seed(seed, split))
    else:
        found = load_torchvision(spec, root, split)
    if image_size and image_size != found.size:
        _check_memory(*found.images.shape[:2], image_size)
        found.images = torch.cat([
            F.interpolate(part.float(), (image_size, image_size), mode="bilinear", antialias=True)
            .round().to(torch.uint8) for part in found.images.split(1000)
        ])
    return found


def _check_memory(count: int, channels: int, side: int) -> None:
    """Refuse a mistyped --image-size, which would trigger the out-of-memory killer."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if (needed := count * channels * side**2) > memory:
            raise UserError(f"--image-size {side}: {count:,} images of this size take "
                            f"{needed / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB")


# ---------------------------------------------------------------- mnist, fashion_mnist, cifar10

# The idx files in DIR/MNIST/raw and DIR/FashionMNIST/raw: magic number and sizes of each.
IDX = {
    "train-images-idx3-ubyte": (2051, (60_000, 28, 28)),
    "train-labels-idx1-ubyte": (2049, (60_000,)),
    "t10k-images-idx3-ubyte": (2051, (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": (2049, (10_000,)),
}
# MD5 of the published files, unpacked, in the same order (torchvision has those of cifar10).
MD5 = {
    "mnist": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
              "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
    "fashion_mnist": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
                      "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
}


def load_torchvision(spec: str, root: Path, split: str) -> ImageSet:
    """mnist, fashion_mnist or cifar10 from `root`, downloaded if missing."""
    from torchvision import datasets        # here, because the import takes a second

    if spec == "cifar10":
        return _load_cifar10(datasets.CIFAR10, root, split)
    dataset = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[spec]
    folder, md5 = root / dataset.__name__ / "raw", dict(zip(IDX, MD5[spec], strict=True))
    names = [n for n in IDX if n.startswith("train" if split == "train" else "t10k")]
    if not all((folder / name).is_file() for name in names):
        download(dataset, root, spec, folder, IDX)
    images, labels = (_read_idx(folder / name, md5[name]) for name in names)
    classes = [name.split(" - ")[0] for name in dataset.classes]        # MNIST: "0 - zero"
    return ImageSet(torch.tensor(images).unsqueeze(1), torch.tensor(labels).long(), classes, spec)


def _read_idx(path: Path, md5: str) -> np.ndarray:
    """The uint8 array in an idx file. Raises UserError unless it is the published file."""
    magic, sizes = IDX[path.name]
    header = struct.pack(f">{1 + len(sizes)}I", magic, *sizes)
    length = len(header) + math.prod(sizes)
    content, size = _read(path, length)
    if content[:4] != header[:4]:
        raise UserError(f"{path} is not the expected idx file: its magic number is not {magic}")
    if content[:len(header)] != header:
        raise UserError(f"{path} is not the expected idx file: the sizes in its header are not "
                        f"{' x '.join(map(str, sizes))}")
    if size != length:
        raise UserError(f"{path} has {size:,} bytes, expected {length:,}: delete it to download it "
                        f"again")
    array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(sizes)
    if len(sizes) == 1 and array.max() > 9:
        raise UserError(f"{path} contains the label {array.max()}: labels are 0 to 9")
    _check_md5(path, content, md5)
    return array


def _load_cifar10(dataset, root: Path, split: str) -> ImageSet:
    """CIFAR-10. Its files are pickles, which can execute code: their MD5 is checked first."""
    folder = root / dataset.base_folder
    md5 = dict([*dataset.train_list, *dataset.test_list,
                (dataset.meta["filename"], dataset.meta["md5"])])
    if not all((folder / name).is_file() for name in md5):
        download(dataset, root, "cifar10", folder, md5)
    for name in md5:
        _check_md5(folder / name, _read(folder / name, 2**26)[0], md5[name])
    try:
        found = dataset(root, train=split == "train", download=False)
    except Exception as error:              # a file that was changed after the check
        raise UserError(f"the files in {folder} cannot be read: {reason(error)}") from None
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(found.targets), found.classes, "cifar10")


def _read(path: Path, most: int) -> tuple[bytes, int]:
    """At most `most` bytes of a file, and the file's size."""
    with io_errors(f"{path} cannot be read"), open(path, "rb") as file:
        return file.read(most), path.stat().st_size


def _check_md5(path: Path, content: bytes, md5: str) -> None:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{path} is damaged: its MD5 is not {md5}; delete it to download it again")


def download(dataset, root: Path, spec: str, folder: Path, names, source: str = "") -> None:
    """torchvision's download, abandoned when it stalls. Raises DataMissing, which names the missing
    files and their source, and leaves no empty folder that was not there before."""
    errors, there = [], root.is_dir()
    created = [path for path in (folder, *folder.parents) if not path.exists()]

    def attempt() -> None:
        try:
            dataset(root, download=True)
        except Exception as error:          # from urllib, ssl, http, gzip, tarfile, the disk ...
            errors.append(error)

    def received() -> list:                 # a folder's time changes with each unpacked file
        with contextlib.suppress(OSError):
            found = [p.stat() for p in [*root.glob("*.tar.gz"), *folder.glob("*")]]
            return sorted((s.st_size, s.st_mtime_ns) for s in found)
        return []

    # In a thread: behind some firewalls each of a server's many addresses takes a timeout
    thread = threading.Thread(target=attempt, daemon=True)
    default, seen, since = socket.getdefaulttimeout(), None, time.monotonic()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):     # the progress bar is on standard error
            thread.start()
            while thread.is_alive() and time.monotonic() - since < STALL_TIMEOUT:
                thread.join(0.2)
                if (now := received()) != seen:
                    seen, since = now, time.monotonic()
    finally:
        socket.setdefaulttimeout(default)
    if thread.is_alive():
        errors.append(TimeoutError(f"no progress in {STALL_TIMEOUT} seconds"))
    missing = [name for name in names if not (folder / name).exists()]
    if errors or missing:
        for path in created:                # the innermost first
            with contextlib.suppress(OSError):      # not empty: it holds what was downloaded
                path.rmdir()
        raise DataMissing(
            f"{spec} is not in {root}{', which does not exist,' * (not there)} and cannot be "
            f"downloaded ({reason(errors[0]) if errors else 'files are missing'}): put "
            f"{', '.join(missing or names)} into {folder}{source}, or use --dataset glyphs")


# ---------------------------------------------------------------- a folder per class


def load_folder(root: Path, image_size: int, split: str) -> ImageSet:
    """The images in PATH/<class name>/: grey if R = G = B in every image, else RGB.

    The shorter side is resized to image_size and the longer one cropped at the centre. Hidden
    files and folders are ignored.
    """
    classes, files, labels = class_folders(root), [], []
    for label, folder in enumerate(classes):
        found = images_in(folder)
        kept = [f for i, f in enumerate(found) if (i % 10 == 9) == (split == "test")]
        files += kept
        labels += [label] * len(kept)
    if not files:
        raise UserError(f"{root}: the test split is every tenth image of a class, and no class "
                        f"has ten")
    images, grey = read_images(files, image_size)
    return ImageSet(torch.from_numpy(images[:, :1].copy() if grey else images),
                    torch.tensor(labels), [d.name for d in classes],
                    f"folder:{root.resolve().name}")


def read_images(files: list[Path], image_size: int) -> tuple[np.ndarray, bool]:
    """(the images, RGB uint8 (N, 3, image_size, image_size); is R = G = B in all of them?)."""
    _check_memory(len(files), 3, image_size)
    images, grey = np.empty((len(files), 3, image_size, image_size), np.uint8), True
    small = []
    with warnings.catch_warnings(), tqdm(files, desc="reading images", unit="img", leave=False,
                                         delay=1, disable=None) as bar:
        warnings.simplefilter("ignore")         # Pillow warns of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, file in enumerate(bar):
            images[i], (width, height) = open_image(file, image_size)
            grey = grey and bool((images[i, 0] == images[i, 1:]).all())
            if min(width, height) < image_size:
                small.append(f"{file} ({width}x{height} pixels)")
    if small:
        warn(f"{len(small):,} of {len(files):,} images are smaller than --image-size {image_size} "
             f"and were enlarged, for example {small[0]}")
    return images, grey


def class_folders(root: Path) -> list[Path]:
    if not os.path.isdir(root):
        raise UserError(f"{shorten(root)} is not a folder: folder:PATH needs "
                        f"PATH/<class name>/<images>")
    with io_errors(f"{root} cannot be read"):
        classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise UserError(f"{root} has no class folder: folder:PATH needs PATH/<class name>/<images>,"
                        f" with one class or more")
    for folder in classes:
        if folder.resolve() in (root.resolve(), *root.resolve().parents):
            raise UserError(f"{folder} is a link to a folder that contains it")
    return classes


def images_in(folder: Path) -> list[Path]:
    """The images of a class, including those in subfolders (links to folders are not followed)."""
    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read: {reason(error)}")

    found = []
    for at, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(at, n) for n in names
                  if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not found:
        raise UserError(f"class folder {folder} has no image ({', '.join(SUFFIXES)})")
    return sorted(found)


def open_image(path: Path, image_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """One image, RGB uint8 (3, image_size, image_size), and its (width, height) in the file."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")        # opening a pipe would block
    try:
        with Image.open(path) as file:
            image = _rgb(ImageOps.exif_transpose(file))
        fitted = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    except Exception as error:              # Pillow's decoders raise many types
        raise UserError(f"{path} cannot be read as an image ({reason(error)})") from None
    return np.asarray(fitted).transpose(2, 0, 1), image.size


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any Pillow mode as RGB: 16 bits reduced to 8, transparent pixels over white."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------- glyphs


def draw_glyphs(count: int, seed: int = 0) -> ImageSet:
    """28x28 grey digits in Pillow's built-in font: rotated, sheared, scaled, shifted, thin or bold.

    A function of the seed and the version of Pillow. Raises UserError if Pillow lacks FreeType.
    """
    big, strokes = 84, (0, 1, 2, 4)             # drawn at three times the size, then reduced
    try:
        font = ImageFont.load_default(size=66)
    except (ImportError, OSError):
        raise UserError("glyphs need Pillow with FreeType: pip install --force-reinstall "
                        "pillow") from None
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
