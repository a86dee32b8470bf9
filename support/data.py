"""Images in memory: every data set becomes one uint8 tensor, and an epoch one permutation.

    mnist, fashion_mnist, cifar10    through torchvision, from --data-dir or downloaded
    folder:PATH                      a folder per class, of images of any size
    glyphs                           digits drawn with Pillow's own font: offline, in seconds

Not needed to understand DiT: the training loop asks for `images.batch(batches(step), device)`.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

from cli import UserError, generator, mix_seed, printable
from runs import atomic_write

NAMES = ("mnist", "fashion_mnist", "cifar10", "glyphs")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
SOCKET_TIMEOUT, PATIENCE = 15, 40       # seconds for one answer; without one new byte on the disk


@dataclass
class ImageSet:
    """images: uint8 (N, C, H, H), C 1 or 3. labels: int64 (N,). Both stay on one device."""

    images: Tensor
    labels: Tensor
    class_names: list[str]
    name: str

    def digest(self) -> str:
        """A short hash of every pixel, label and class name: the same data, wherever it lies."""
        digest = hashlib.sha256(str((tuple(self.images.shape), self.class_names)).encode())
        for part in (self.images, self.labels):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

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
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.device = seed, device
        self._orders: dict[int, Tensor] = {}

    def order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            rng = generator("cpu", self.seed, "epoch", epoch)
            order = torch.randperm(self.num_images, generator=rng).to(self.device)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]

    def __call__(self, step: int) -> Tensor:
        at, end, parts = step * self.batch_size, (step + 1) * self.batch_size, []
        while at < end:
            epoch, start = divmod(at, self.num_images)
            parts.append(self.order(epoch)[start : start + end - at])
            at += len(parts[-1])
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
        return load_folder(Path(os.path.expanduser(spec[len("folder:"):])), image_size or 32, split)
    if spec not in NAMES:
        raise UserError(f"data set {printable(spec)} is unknown: choose one of "
                        f"{', '.join(NAMES)} or folder:PATH")
    if spec == "glyphs":
        found = draw_glyphs(20_000 if split == "train" else 2_000, seed=mix_seed(seed, split))
    else:
        found = load_torchvision(spec, Path(os.path.expanduser(data_dir)), split)
    if image_size and image_size != found.images.shape[-1]:
        _check_room(*found.images.shape[:2], image_size)
        found.images = torch.cat([
            F.interpolate(part.float(), (image_size, image_size), mode="bilinear", antialias=True)
            .round().to(torch.uint8) for part in found.images.split(1000)
        ])
    return found


def _check_room(count: int, channels: int, side: int) -> None:
    """A --image-size that was mistyped must not end in the system's killing the process."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory, needed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), \
            count * channels * side**2
        if needed > memory:
            raise UserError(f"--image-size {side}: {count:,} such images take {needed / 1e9:,.0f} "
                            f"GB, this machine has {memory / 1e9:,.0f} GB: choose a smaller one")


# ---------------------------------------------------------------- through torchvision

# The idx files in DIR/MNIST/raw and DIR/FashionMNIST/raw: magic number and sizes of each.
IDX = {
    "train-images-idx3-ubyte": (2051, (60_000, 28, 28)),
    "train-labels-idx1-ubyte": (2049, (60_000,)),
    "t10k-images-idx3-ubyte": (2051, (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": (2049, (10_000,)),
}
# MD5 of the published files, unpacked, in the same order (torchvision knows those of cifar10).
MD5 = {
    "mnist": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
              "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
    "fashion_mnist": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
                      "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
}


def load_torchvision(spec: str, root: Path, split: str) -> ImageSet:
    """mnist, fashion_mnist or cifar10 under `root`, downloaded there first if it is missing."""
    from torchvision import datasets        # a second, that only these data sets wait for

    if spec == "cifar10":
        return _load_cifar10(datasets.CIFAR10, root, split)
    make = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[spec]
    folder, md5 = root / make.__name__ / "raw", dict(zip(IDX, MD5[spec], strict=True))
    names = [n for n in IDX if n.startswith("train" if split == "train" else "t10k")]
    if not all((folder / name).is_file() for name in names):
        _download(make, root, spec, folder, IDX)
    images, labels = (_read_idx(folder / name, md5[name]) for name in names)
    classes = [name.split(" - ")[0] for name in make.classes]           # MNIST: "0 - zero"
    return ImageSet(torch.tensor(images).unsqueeze(1), torch.tensor(labels).long(), classes, spec)


def _read_idx(path: Path, md5: str) -> np.ndarray:
    """The uint8 numbers of an idx file. Raises UserError unless it is the published one."""
    magic, sizes = IDX[path.name]
    header = struct.pack(f">{1 + len(sizes)}I", magic, *sizes)
    whole = len(header) + math.prod(sizes)
    content, size = _read(path, whole)
    if content[:4] != header[:4]:
        raise UserError(f"{printable(path)} is not an idx file of its kind: it must begin with "
                        f"the number {magic}")
    if content[:len(header)] != header:
        raise UserError(f"{printable(path)} has the wrong sizes in its header: "
                        f"{' x '.join(map(str, sizes))} is right")
    if size != whole:
        raise UserError(f"{printable(path)} has {size:,} bytes and should have {whole:,}: delete "
                        f"it to download it again")
    numbers = np.frombuffer(content, np.uint8, offset=len(header)).reshape(sizes)
    if len(sizes) == 1 and numbers.max() > 9:
        raise UserError(f"{printable(path)} holds the label {numbers.max()}: 0 to 9 are right")
    _check_md5(path, content, md5)
    return numbers


def _load_cifar10(make, root: Path, split: str) -> ImageSet:
    """CIFAR-10's batches are pickles, which could run code: each file's MD5 is checked first."""
    folder = root / make.base_folder
    md5 = dict([*make.train_list, *make.test_list, (make.meta["filename"], make.meta["md5"])])
    if not all((folder / name).is_file() for name in md5):
        _download(make, root, "cifar10", folder, md5)
    for name in md5:
        _check_md5(folder / name, _read(folder / name, 2**26)[0], md5[name])
    try:
        found = make(root, train=split == "train", download=False)
    except Exception as error:              # a file that changed after it was checked
        raise UserError(f"the files in {printable(folder)} cannot be read: "
                        f"{_reason(error)}") from None
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(found.targets), found.classes, "cifar10")


def _download(make, root: Path, spec: str, folder: Path, names) -> None:
    """torchvision's download, given up when nothing more arrives. Raises DataMissing."""
    failed = []

    def attempt() -> None:
        try:
            make(root, download=True)
        except Exception as error:          # of urllib, ssl, http, gzip, tarfile, the disk ...
            failed.append(error)

    def arrived() -> int:
        with contextlib.suppress(OSError):
            return sum(p.stat().st_size for p in [*root.glob("*.tar.gz"), *folder.glob("*")])
        return 0

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)
    # A thread, for behind some firewalls each of a server's many addresses takes a timeout
    worker, size, since = threading.Thread(target=attempt, daemon=True), -1, time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):         # the bar is on standard error
            worker.start()
            while worker.is_alive() and time.monotonic() - since < PATIENCE:
                worker.join(0.2)
                if (now := arrived()) != size:
                    size, since = now, time.monotonic()
    finally:
        socket.setdefaulttimeout(before)
    if worker.is_alive():
        failed.append(TimeoutError(f"nothing arrived in {PATIENCE} seconds"))
    missing = [name for name in names if not (folder / name).is_file()]
    if failed or missing:
        raise DataMissing(
            f"{spec} is not in {printable(root)} and cannot be downloaded "
            f"({_reason(failed[0]) if failed else 'files are missing'}): put "
            f"{', '.join(missing or names)} into {printable(folder)}, or use --dataset glyphs")


def _read(path: Path, most: int) -> tuple[bytes, int]:
    """At most `most` bytes of a file, and its size. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return file.read(most), path.stat().st_size
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: {_reason(error)}") from None


def _check_md5(path: Path, content: bytes, md5: str) -> None:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{printable(path)} is damaged: its MD5 is not {md5}; delete it to "
                        f"download it again")


def _reason(error: Exception) -> str:
    """The last line of what an exception says: torchvision's innermost cause."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(said.splitlines()[-1].strip("<>"))


# ---------------------------------------------------------------- a folder per class


def load_folder(root: Path, image_size: int, split: str) -> ImageSet:
    """PATH/class name/any.jpg ...: grey if every image is (R = G = B everywhere), else RGB.

    The shorter side is resized to image_size, the longer one cropped about its centre. Every
    tenth file of a class, in the order of names, is held out as the test split. Names that begin
    with a dot are passed over.
    """
    files, labels = [], []
    classes = _class_folders(root)
    for label, folder in enumerate(classes):
        inside = _images_in(folder)
        kept = [f for i, f in enumerate(inside) if (i % 10 == 9) == (split == "test")]
        files += kept
        labels += [label] * len(kept)
    if not files:
        raise UserError(f"{printable(root)}: no class has ten images, so none is held out for the "
                        f"test split")
    _check_room(len(files), 3, image_size)
    images, grey = np.empty((len(files), 3, image_size, image_size), np.uint8), True
    with warnings.catch_warnings(), tqdm(files, desc="reading images", unit="img", leave=False,
                                         delay=1, disable=None) as bar:
        warnings.simplefilter("ignore")         # Pillow's remarks on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, file in enumerate(bar):
            images[i] = _open(file, image_size)
            grey = grey and bool((images[i, 0] == images[i, 1:]).all())
    return ImageSet(torch.from_numpy(images[:, :1].copy() if grey else images),
                    torch.tensor(labels), [d.name for d in classes],
                    f"folder:{printable(root.resolve().name)}")


def _class_folders(root: Path) -> list[Path]:
    if not os.path.isdir(root):
        raise UserError(f"{printable(root)} is not a folder: folder:PATH needs "
                        f"PATH/<class name>/<images>")
    try:
        classes = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    except OSError as error:
        raise UserError(f"{printable(root)} cannot be read: {_reason(error)}") from None
    if len(classes) < 2:
        raise UserError(f"{printable(root)} holds {len(classes)} class folder{'s' * (not classes)}:"
                        f" two or more are needed, PATH/<class name>/<images>")
    for folder in classes:
        if folder.resolve() in (root.resolve(), *root.resolve().parents):
            raise UserError(f"{printable(folder)} is a link to a folder that holds it")
    return classes


def _images_in(folder: Path) -> list[Path]:
    """The images of a class, also in folders within it (links to folders are not followed)."""
    found = []

    def refuse(error: OSError):
        raise UserError(f"{printable(error.filename)} cannot be read: {_reason(error)}")

    for at, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(at, n) for n in names
                  if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not found:
        raise UserError(f"class folder {printable(folder)} holds no image ({', '.join(SUFFIXES)})")
    return sorted(found)


def _open(path: Path, image_size: int) -> np.ndarray:
    """One image as RGB, uint8 (3, image_size, image_size). Raises UserError naming it."""
    if path.exists() and not path.is_file():
        raise UserError(f"{printable(path)} is not a file")         # a pipe would be waited for
    try:
        with Image.open(path) as image:
            image = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:          # Pillow's decoders raise many types: name the file
        raise UserError(f"{printable(path)} cannot be read as an image "
                        f"({_reason(error)})") from None
    if min(image.size) < image_size:
        raise UserError(f"{printable(path)} is {image.width}x{image.height} pixels, smaller than "
                        f"--image-size {image_size}")
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's as RGB: 16 bits to 8, and white where it is transparent."""
    if image.mode == "F":
        raise ValueError("its pixels are fractions: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------- glyphs


def draw_glyphs(count: int, seed: int = 0) -> ImageSet:
    """28x28 grey digits in Pillow's own font, rotated, sheared, scaled, shifted, bold or thin.

    Deterministic by seed (for one version of Pillow). Raises UserError where Pillow lacks FreeType.
    """
    big, strokes = 84, (0, 1, 2, 4)             # drawn at three times the size, then averaged
    try:
        font = ImageFont.load_default(size=66)
    except (ImportError, OSError):
        raise UserError("this Pillow has no FreeType, which glyphs need: pip install "
                        "--force-reinstall pillow") from None
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
    scale_x, scale_y = rng.uniform(0.9, 1.3, count), rng.uniform(0.9, 1.15, count)  # above 1: small
    shift = rng.uniform(-4, 4, (count, 2))
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
        picture = Image.fromarray(pixels).resize((side * zoom,) * 2, Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + i % columns * cell, gap + i // columns * cell + top))
    if title:
        ImageDraw.Draw(sheet).text((gap + 2, 3), title, fill=(255, 255, 255))
    return sheet


def save_picture(path: Path, picture: Image.Image, **options) -> None:
    """Write PNG or GIF, by the name, whole or not at all. Raises OSError."""
    kind = path.suffix[1:].upper()
    atomic_write(path, lambda file: picture.save(file, format=kind, **options))
