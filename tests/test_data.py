"""support/data.py: reading the data sets, what damaged files and no network lead to, batches."""

import hashlib
import os
import pickle
import re
import shutil
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from support import data
from support.command import UserError, printable
from support.compute import generator, seed_of

CPU = torch.device("cpu")


def refusal(call, *args, **options) -> str:
    """The one line of a call that must be refused, without the test's own folder."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    line = printable(caught.value)
    assert len(line) < 1000, line
    return re.sub(r"\S*/test_[^/\s]*/", "", line)


# ---------------------------------------------------------------- image sets and batches


def some_set(count: int = 10, channels: int = 1, side: int = 4) -> data.ImageSet:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), generator=rng, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(count) % 3, ["a", "b", "c"], "some")


def test_grey_levels_become_minus_1_to_1_and_back():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x0, y = data.Batches(data.ImageSet(ramp, torch.tensor([7]), ["x"] * 8, "ramp"), 1, 0, CPU)(0)
    assert x0.dtype == torch.float32 and (x0.min(), x0.max()) == (-1, 1) and y.tolist() == [7]
    assert torch.equal(data.to_uint8(x0), ramp)
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_digest_sees_pixels_labels_and_class_names():
    digests = {some_set().digest()}
    for change in ("images", "labels", "class_names"):
        other = some_set()
        if change == "class_names":
            other.class_names = ["a", "b", "d"]
        else:
            getattr(other, change)[3] += 1
        digests.add(other.digest())
    assert len(digests) == 4 and some_set().digest() in digests
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    one = data.ImageSet(ramp, torch.tensor([7]), ["a", "b"], "ramp")
    assert one.digest() == "06b15521ca6dea20"           # checkpoints and rulers hold digests


def test_a_set_stays_in_cpu_memory_where_it_would_fill_the_gpu(monkeypatch):
    images = some_set()
    free = 2 * images.images.nbytes - 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert images.to(torch.device("cuda")) is images
    assert images.to(torch.device("meta")).images.device.type == "meta"


@pytest.mark.parametrize("count, batch", [(10, 3), (10, 10), (10, 25), (7, 1), (1, 4)])
def test_an_epoch_is_a_permutation_and_a_function_of_the_seed(count, batch):
    images = some_set(count)
    batches = data.Batches(images, batch, seed=3, device=CPU)
    steps = -(-4 * count // batch)
    index = torch.cat([batches.index(step) for step in range(steps)])
    for number, epoch in enumerate(index[: 4 * count].view(4, count)):
        order = torch.randperm(count, generator=generator("cpu", 3, "epoch", number))
        assert torch.equal(epoch, order)
    for step in reversed(range(steps)):                 # any step first, as a resumed run
        x0, y = data.Batches(images, batch, 3, CPU)(step)
        at = index[step * batch : (step + 1) * batch]
        assert torch.equal(data.to_uint8(x0), images.images[at])
        assert torch.equal(y, images.labels[at])


@pytest.mark.parametrize("flip", [False, True])
def test_the_shares_of_all_processes_make_up_the_batch(flip):
    images = some_set(50)
    whole = data.Batches(images, 12, 1, CPU, flip=flip)
    shares = [data.Batches(images, 12, 1, CPU, flip, slice(k, k + 4)) for k in (0, 4, 8)]
    for step in range(6):
        parts = [share(step) for share in shares]
        for i, wanted in enumerate(whole(step)):
            assert torch.equal(torch.cat([part[i] for part in parts]), wanted)


def test_flip_mirrors_about_half_of_the_images():
    images = some_set(64, channels=3)
    plain, flipped = (data.Batches(images, 64, 1, CPU, flip=flip) for flip in (False, True))
    mirrored = []
    for step in range(8):
        (x0, y), (f0, fy) = plain(step), flipped(step)
        same, mirror = ((f0 == x).flatten(1).all(1) for x in (x0, x0.flip(-1)))
        assert (same ^ mirror).all() and torch.equal(y, fy)
        mirrored.append(mirror)
    assert 0.4 < torch.cat(mirrored).float().mean() < 0.6
    assert not torch.equal(mirrored[0], mirrored[1])


# ---------------------------------------------------------------- glyphs


def test_glyphs(monkeypatch):
    glyphs, other = data.draw_glyphs(500), data.draw_glyphs(200, seed=1)
    assert glyphs.images.shape == (500, 1, 28, 28) and glyphs.images.dtype == torch.uint8
    assert glyphs.labels.bincount().tolist() == [50] * 10
    assert torch.equal(data.draw_glyphs(200, seed=1).images, other.images)
    assert not torch.equal(glyphs.images[:200], other.images)
    # the pixels depend on Pillow's version, hence means; the labels on NumPy's generator alone
    assert glyphs.labels[:12].tolist() == [1, 4, 9, 4, 5, 1, 8, 5, 0, 1, 2, 7]
    assert glyphs.images.float().mean() == pytest.approx(31.68, abs=0.7)
    edge = torch.cat([glyphs.images[..., i, :] for i in (0, -1)], -1)
    assert (edge > 40).any(-1).float().mean() < 0.01, "digits are cut off"
    means = torch.stack([glyphs.images[glyphs.labels == d].float().mean(0) for d in range(10)])

    def recognised(images):
        near = torch.cdist(images.flatten(1).float(), means.flatten(1)).argmin(1)
        return (near == other.labels).float().mean()

    assert recognised(other.images) > 0.6 and recognised(other.images.flip(2)) < 0.5
    drawn = []
    monkeypatch.setattr(data, "draw_glyphs",
                        lambda count, seed: drawn.append((count, seed)) or glyphs)
    small = data.load("glyphs", image_size=14, split="test")
    assert small.images.shape == (500, 1, 14, 14) and small.images.dtype == torch.uint8
    data.load("glyphs")
    assert drawn == [(2_000, seed_of(0, "test")), (20_000, seed_of(0, "train"))]
    with pytest.raises(RuntimeError, match="memory"):           # `run_command` has a line for it
        data.load("glyphs", image_size=10_000_000)
    line = refusal(data.load, "mnsit\n")
    assert "mnsit\\n" in line and "fashion_mnist" in line and "folder:PATH" in line


# ---------------------------------------------------------------- torchvision's files


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data directory with an MNIST and a Fashion-MNIST of 40 images and 20 to test, offline."""
    for name in ("MNIST", "FashionMNIST"):
        raw, rng = tmp_path / name / "raw", np.random.default_rng(0)
        raw.mkdir(parents=True)
        for part, count in (("train", 40), ("t10k", 20)):
            for kind, magic, sizes in (("images-idx3", 2051, (count, 28, 28)),
                                       ("labels-idx1", 2049, (count,))):
                numbers = rng.integers(0, 256 if len(sizes) > 1 else 10, sizes, np.uint8)
                (raw / f"{part}-{kind}-ubyte").write_bytes(
                    struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + numbers.tobytes())
    for cls in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(cls, "mirrors", ["http://127.0.0.1:9/"])        # refuses
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/x.tar.gz")
    return tmp_path


def test_idx_files_are_read_and_another_mnist_is_damaged(root, monkeypatch):
    found = data.load("fashion_mnist", root)
    raw = root / "FashionMNIST" / "raw"
    assert found.images.numpy().tobytes() == (raw / "train-images-idx3-ubyte").read_bytes()[16:]
    assert bytes(found.labels.tolist()) == (raw / "train-labels-idx1-ubyte").read_bytes()[8:]
    assert found.images.shape == (40, 1, 28, 28) and found.class_names[9] == "Ankle boot"
    assert len(data.load("mnist", root, split="test").images) == 20
    assert "the MNIST in" in (line := refusal(data.load, "mnist", root)) and "damaged" in line
    monkeypatch.setattr(data, "MNIST", data.replace(
        found, class_names=[str(d) for d in range(10)]).digest())
    assert data.load("mnist", root).class_names == [str(d) for d in range(10)]
    file = raw / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for content in (b"", whole[:5000], b"\x1f\x8b" + whole[2:]):
        file.write_bytes(content)
        assert "fashion_mnist cannot be read" in refusal(data.load, "fashion_mnist", root)


@pytest.mark.parametrize("spec", ["mnist", "cifar10"])
def test_without_data_and_network_it_ends_at_once(root, spec, capsys):
    begun = time.monotonic()
    line = refusal(data.load, spec, root / "typo")
    assert f"{spec} cannot be read from" in line and "--dataset glyphs" in line
    assert time.monotonic() - begun < 15
    assert capsys.readouterr().out == "" and socket.getdefaulttimeout() is None


def test_a_server_that_does_not_answer_has_a_time_limit(tmp_path, monkeypatch):
    seen = []

    def download(self):
        seen.append(socket.getdefaulttimeout())
        print("Failed to download (trying next):\n")
        raise TimeoutError("timed out")
    monkeypatch.setattr(datasets.MNIST, "download", download)
    assert "timed out" in refusal(data.load, "mnist", tmp_path)
    assert seen == [15] and socket.getdefaulttimeout() is None


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_cifar10_is_read_and_never_unpickled_where_damaged(root, monkeypatch):
    folder, rng, trap = root / "cifar-10-batches-py", np.random.default_rng(0), root / "trapped"
    folder.mkdir()
    pixels, lists = rng.integers(0, 256, (6, 4, 3072), np.uint8), []
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "meta"]):
        content = pickle.dumps({"data": pixels[i], "labels": [i, 1, 2, 3]} if i < 6 else
                               {"label_names": list("abcdefghij")})
        (folder / name).write_bytes(content)
        lists.append([name, hashlib.md5(content).hexdigest()])
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists[5:6])
    monkeypatch.setattr(datasets.CIFAR10, "meta", dict(filename="meta", key="label_names",
                                                       md5=lists[6][1]))
    train, test = data.load("cifar10", root), data.load("cifar10", root, split="test")
    assert np.array_equal(train.images.numpy(), pixels[:5].reshape(20, 3, 32, 32))
    assert test.labels.tolist() == [5, 1, 2, 3] and train.class_names == list("abcdefghij")
    for name in ("data_batch_3", "meta"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps({"data": Trap(trap), "labels": []}))
        assert "cifar10 cannot be read" in refusal(data.load, "cifar10", root)
        assert not trap.exists()
        (folder / name).write_bytes(whole)
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists(), "the trap would not have gone off"


# ---------------------------------------------------------------- celeba


def test_celeba(tmp_path, monkeypatch, capsys):
    """24 faces to train and 12 to test, of CelebA's proportions: men blue, women red, and the rows
    that the centre crop drops green."""
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)
    folder, rng = tmp_path / "celeba", np.random.default_rng(0)
    (folder / "img_align_celeba").mkdir(parents=True)
    signs, names = rng.choice([-1, 1], (36, 2)), [f"{i + 1:06d}.jpg" for i in range(36)]
    for name, sign in zip(names, signs, strict=True):
        pixels = np.zeros((109, 89, 3), np.uint8)
        pixels[..., 2 if sign[0] > 0 else 0] = 200
        pixels[:9] = pixels[-9:] = (0, 255, 0)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)

    def write(name: str, rows, header: str = "") -> None:
        lines = [f"{n} {' '.join(map(str, row))}" for n, row in zip(names, rows, strict=True)]
        (folder / name).write_text(f"36\n{header}\n" * bool(header) + "\n".join(lines) + "\n")

    write("list_attr_celeba.txt", signs, "Male Smiling")
    write("identity_CelebA.txt", np.ones((36, 1), int))
    write("list_bbox_celeba.txt", np.ones((36, 4), int), "x_1 y_1 width height")
    write("list_landmarks_align_celeba.txt", np.ones((36, 10), int), "a b c d e f g h i j")
    write("list_eval_partition.txt", np.repeat([0, 2], [24, 12])[:, None])
    train, test = data.load("celeba", tmp_path), data.load("celeba", tmp_path, 16, "test")
    assert train.images.shape == (24, 3, 64, 64) and test.images.shape == (12, 3, 16, 16)
    assert train.class_names == ["female", "male"] and train.name == "celeba"
    assert train.labels.tolist() == [int(s > 0) for s in signs[:24, 0]]
    for image, y in zip(train.images, train.labels, strict=True):
        red, green, blue = image.float().mean((1, 2))
        assert green < 12 and abs((blue if y else red) - 200) < 12
    smiling = data.load("celeba:Smiling", tmp_path)
    assert smiling.class_names == ["not Smiling", "Smiling"]
    assert smiling.labels.tolist() == [int(s > 0) for s in signs[:24, 1]]
    assert "no attribute Smilling: it has Male, Smiling" in refusal(
        data.load, "celeba:Smilling", tmp_path)
    monkeypatch.setattr(data, "open_image", None)       # decoded once: from here on from its cache
    assert torch.equal(data.load("celeba", tmp_path).images, train.images)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)
    cache, = folder.glob("cache-train-*")
    for content in (b"", cache.read_bytes()[:-9], b"x" * 99):
        cache.write_bytes(content)
        assert torch.equal(data.load("celeba", tmp_path).images, train.images)


# ---------------------------------------------------------------- folders of images


def picture(side: int = 40, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes, cats with 12 colour images and dogs with 3."""
    for name, count in [("cats", 12), ("dogs", 3)]:
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            picture(seed=i).save(tmp_path / "set" / name / f"{i:02d}.png")
    return tmp_path / "set"


def load(folder: Path, **options) -> data.ImageSet:
    return data.load(f"folder:{folder}", **options)


def test_a_folder_per_class_of_which_every_tenth_image_is_held_out(folder):
    (folder / "cats" / "deep").mkdir()
    (folder / "cats" / "00.png").rename(folder / "cats" / "deep" / "0.PNG")
    for other in ("README.md", "cats/notes.txt", "cats/._00.png", ".git/a.png"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"not a picture")
    train, test = load(folder, image_size=40), load(folder, image_size=40, split="test")
    assert train.images.shape == (14, 3, 40, 40) and train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 11 + [1] * 3 and test.labels.tolist() == [0]
    assert train.class_names == ["cats", "dogs"] and train.name == "folder:set"
    for images, i, seed in [(train, 0, 1), (train, 9, 11), (test, 0, 10), (train, 11, 0)]:
        assert np.array_equal(images.images[i].permute(1, 2, 0), np.asarray(picture(seed=seed)))
    assert load(folder).images.shape[-1] == 32
    for file in folder.rglob("*.[pP][nN][gG]"):
        if file.name[0] != "." and ".git" not in file.parts:
            Image.open(file).convert("L").save(file)
    assert load(folder).images.shape == (14, 1, 32, 32)             # grey, if every image is


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    """Alpha over white, palettes, 16 bits, orientation, the centre of a wide one."""
    def read(image: Image.Image, suffix: str = ".png", **options) -> np.ndarray:
        image.save(tmp_path / f"x{suffix}", **options)
        return data.open_image(tmp_path / f"x{suffix}", 40)

    ramp = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    assert np.array_equal(read(Image.fromarray(ramp))[0], (ramp / 257).round())
    assert (read(Image.new("RGBA", (40, 40), (255, 0, 0, 0))) == 255).all()
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    assert read(palette).mean((1, 2)).tolist() == [0, 0, 255]
    assert (read(palette, transparency=1) == 255).all()
    turned, exif = Image.new("RGB", (40, 40)), Image.Exif()
    turned.paste((255, 255, 255), (0, 0, 40, 20))       # white at the top; rotated: on the right
    exif[0x112] = 6
    image = read(turned, exif=exif)
    assert (image[:, :, 20:] == 255).all() and (image[:, :, :20] == 0).all()
    wide = Image.new("RGB", (160, 40), (255, 0, 0))
    wide.paste((0, 255, 0), (60, 0, 100, 40))
    assert (read(wide)[1, :, 2:-2] > 250).all()
    assert (read(Image.new("1", (40, 40), 1)) == 255).all()
    assert (read(Image.new("CMYK", (40, 40), (0, 0, 0, 255)), ".tif") == 0).all()
    for suffix in (".png", ".jpg", ".webp"):
        read(picture(), suffix)
        content = (tmp_path / f"x{suffix}").read_bytes()
        for damaged in (b"", b"no", content[:-200]):
            (tmp_path / f"x{suffix}").write_bytes(damaged)
            assert f"x{suffix} cannot be read as an image" in refusal(
                data.open_image, tmp_path / f"x{suffix}", 40)


@pytest.mark.parametrize("damage, words", [
    (lambda d: [shutil.rmtree(f) for f in d.iterdir()], "set has no images"),
    (lambda d: shutil.rmtree(d), "is not a folder"),
    (lambda d: [f.unlink() for f in (d / "dogs").iterdir()], "dogs has no images"),
    (lambda d: os.truncate(d / "dogs" / "01.png", 99), "01.png cannot be read as an image"),
    (lambda d: (d / "dogs" / "z.png").symlink_to("nowhere"), "z.png cannot be read as an image"),
    (lambda d: shutil.rmtree(d / "cats"), "no images for test"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_with_a_folder_is_named(folder, damage, words):
    damage(folder)
    assert words in refusal(load, folder, split="test" if "test" in words else "train")


# ---------------------------------------------------------------- latents


def test_latents(tmp_path):
    file = tmp_path / "cats.pt"
    good = dict(format="dit-latents/1", latents=torch.randn(22, 4, 8, 8).half(),
                labels=torch.arange(22) // 11, class_names=["a", "b"])
    torch.save(good, file)
    train, test = (data.load(f"latents:{file}", split=split) for split in ("train", "test"))
    assert train.images.shape == (20, 4, 8, 8) and train.sampling == dict(latents=True)
    assert torch.equal(test.images, good["latents"][[9, 20]]) and test.labels.tolist() == [0, 1]
    x0, _ = data.Batches(train, 3, 0, CPU)(0)
    assert torch.equal(x0, train.images[data.Batches(train, 3, 0, CPU).index(0)].float())
    assert "--image-size does not apply" in refusal(data.load, f"latents:{file}", image_size=16)
    for change in (dict(format="x"), dict(latents=good["latents"][:5]), dict(labels=None),
                   dict(latents=good["latents"] * float("nan")), dict(class_names=["a"]),
                   dict(labels=good["labels"] - 1), dict(latents=good["latents"][..., :7])):
        torch.save({**good, **change}, file)
        assert "cats.pt holds no valid latents" in refusal(data.load, f"latents:{file}")
    file.write_bytes(os.urandom(50))
    assert "cats.pt is damaged" in refusal(data.load, f"latents:{file}")
