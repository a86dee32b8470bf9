"""CelebA: 202,599 aligned photographs of faces. One of 40 attributes makes the two classes.

Liu et al., "Deep Learning Face Attributes in the Wild", arXiv 1411.7766. In the data directory, as
torchvision downloads it:

    celeba/img_align_celeba/000001.jpg ...      178 x 218 pixels
    celeba/list_attr_celeba.txt                 1 or -1 for each image and attribute
    celeba/list_eval_partition.txt              0 training, 1 validation, 2 test
    celeba/cache-train-64.npz                   written here: the images at this size

torchvision's class reads three more lists, refuses files with other checksums, and decodes an image
each time it is used; here all images are in memory.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support import distributed
from support.cli import UserError, atomic_write, io_errors, reason, shorten
from support.data import ImageSet, download, read_images

IMAGES, LABELS, SPLITS = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
SOURCE = (" (a browser gets them from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; "
          "img_align_celeba is img_align_celeba.zip, unpacked)")
ATTRIBUTES = tuple("""
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee
    Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard
    Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair
    Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
""".split())


def class_names(attribute: str) -> list[str]:
    """The names of class 0, without the attribute, and of class 1, with it."""
    return ["female", "male"] if attribute == "Male" else [f"not {attribute}", attribute]


def load_celeba(root: Path, image_size: int, split: str, attribute: str) -> ImageSet:
    """The images of a split in root/celeba, downloaded if missing: the centre square of each,
    resized. Raises UserError naming the wrong file, line or attribute."""
    if attribute not in ATTRIBUTES:
        raise UserError(f"celeba has no attribute {shorten(attribute)!r}: it has "
                        f"{', '.join(ATTRIBUTES)}")
    folder = root / "celeba"
    if not all((folder / name).exists() for name in (IMAGES, LABELS, SPLITS)):
        _download(root, folder)
    part, column = {"train": "0", "test": "2"}[split], 1 + ATTRIBUTES.index(attribute)
    names = list(dict.fromkeys(
        name for name, value in _rows(folder / SPLITS, "0 1 2", 1) if value == part))
    has = {row[0]: row[column] == "1" for row in _rows(folder / LABELS, "1 -1", 40, header=2)}
    with io_errors(f"{folder / IMAGES} cannot be read"):
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder / IMAGES)}
    if not names:
        raise UserError(f"{folder / SPLITS} assigns no image to the split {split!r}")
    for known, where in [(has, LABELS), (sizes, IMAGES)]:
        if missing := [name for name in names if name not in known]:
            raise UserError(f"{folder / where} lacks {len(missing):,} of the {len(names):,} images "
                            f"that {SPLITS} lists, for example {shorten(missing[0])}: delete it to "
                            f"download it again")
    return ImageSet(_images(folder, {name: sizes[name] for name in names}, image_size, split),
                    torch.tensor([has[name] for name in names]).long(), class_names(attribute),
                    "celeba")


def _download(root: Path, folder: Path) -> None:
    from torchvision import datasets        # here, because the import takes a second

    class Files(datasets.CelebA):           # whose constructor would read the lists as well
        def __init__(self, root: Path, download: bool):
            self.root = root
            self.download()

    download(Files, root, "celeba", folder, (IMAGES, LABELS, SPLITS), SOURCE)


def _rows(path: Path, values: str, columns: int, header: int = 0) -> Iterator[list[str]]:
    """[image name, value, ...] for each line below the header, whose last line names the columns.
    Raises UserError naming a line that has another form."""
    allowed = set(values.split())
    with io_errors(f"{path} cannot be read"), \
            open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if number <= header:
                if number == header and words != list(ATTRIBUTES):
                    raise UserError(f"{path}, line {number} does not name CelebA's attributes")
            elif words:
                if len(words) != 1 + columns or not allowed.issuperset(words[1:]):
                    raise UserError(f"{path}, line {number} is not the name of an image with "
                                    f"{columns} of the values {values}")
                yield words


def _images(folder: Path, sizes: dict[str, int], image_size: int, split: str) -> Tensor:
    """The named images, uint8 (N, 3, image_size, image_size), from the cache where it was made of
    files of these names and sizes in bytes. A damaged cache is replaced."""
    path = folder / f"cache-{split}-{image_size}.npz"
    key = hashlib.sha256(str(sizes).encode("utf-8", "backslashreplace")).hexdigest()
    try:
        with np.load(path, allow_pickle=False) as cache:
            if str(cache["key"]) == key:
                images = cache["images"]            # its checksum is verified
                if images.shape == (len(sizes), 3, image_size, image_size) \
                        and images.dtype == np.uint8:
                    return torch.from_numpy(images)
    except Exception:           # missing, truncated, of another form: numpy raises many types
        pass
    images, _ = read_images([folder / IMAGES / name for name in sizes], image_size)
    try:
        atomic_write(path, lambda file: np.savez(file, key=np.array(key), images=images))
        distributed.say(f"written: {path} ({path.stat().st_size / 1e9:.1f} GB, a cache: the next "
                        f"run need not decode the images)")
    except OSError as error:
        distributed.warn(f"{path} cannot be written ({reason(error)}): the next run decodes the "
                         f"images again")
    return torch.from_numpy(images)
