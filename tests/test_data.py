"""data.py: every data set becomes what it says, and every damaged file is named."""

import gzip
import hashlib
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision import datasets

import data
from cli import UserError

ROOT = Path(__file__).parent.parent
MNIST = Path(os.environ.get("MNIST_DIR", ROOT / "data"))
needs_mnist = pytest.mark.skipif(not (MNIST / "MNIST" / "raw").is_dir(),
                                 reason="the real MNIST is not here: MNIST_DIR=FOLDER names it")


def refused(call, *args, **options) -> str:
    """The one line with which a call refuses what it was given, but for the test's own folder,
    whose name could hold the word that is looked for."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 1000, line
    return re.sub(r"\S*/test_[^/\s]*/", "", line)


# ---------------------------------------------------------------- sets and batches


def some_set(count: int = 10, channels: int = 1, side: int = 4) -> data.ImageSet:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), generator=rng, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(count) % 3, ["a", "b", "c"], "some")


def test_to_uint8_inverts_batch():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    one = data.ImageSet(ramp, torch.tensor([7]), ["x"] * 8, "ramp")
    x0, y = one.batch(torch.tensor([0]), torch.device("cpu"))
    assert x0.dtype == torch.float32 and x0.min() == -1 and x0.max() == 1
    assert y.tolist() == [7] and y.dtype == torch.int64
    assert torch.equal(data.to_uint8(x0), ramp)
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    assert torch.equal(data.to_uint8(x0.bfloat16()[..., :1]), ramp[..., :1])


def test_batch_takes_the_images_and_labels_of_the_index():
    images = some_set()
    x0, y = images.batch(torch.tensor([3, 3, 0]), torch.device("cpu"))
    assert torch.equal(data.to_uint8(x0), images.images[[3, 3, 0]]) and y.tolist() == [0, 0, 0]


def test_digest_sees_pixels_labels_and_class_names():
    digests = {some_set().digest()}
    for change in ("images", "labels", "class_names"):
        other = some_set()
        if change == "class_names":
            other.class_names = ["a", "b", "d\udcff"]
        else:
            getattr(other, change)[3] += 1
        digests.add(other.digest())
    assert len(digests) == 4 and some_set().digest() in digests


def test_to_keeps_a_set_in_cpu_memory_where_it_would_fill_the_gpu(monkeypatch):
    images = some_set()
    free = 2 * images.images.nbytes - 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert images.to(torch.device("cuda")) is images
    moved = images.to(torch.device("meta"))
    assert moved.images.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize("count,batch", [(10, 3), (10, 10), (10, 25), (7, 1), (1, 4), (64, 16)])
def test_every_image_once_per_epoch(count, batch):
    batches = data.Batches(count, batch, seed=3, device=torch.device("cpu"))
    steps = -(-4 * count // batch)
    read = torch.cat([batches(step) for step in range(steps)])
    assert read.shape == (steps * batch,) and read.dtype == torch.int64
    epochs = read[: 4 * count].view(4, count)
    assert all(epoch.sort().values.tolist() == list(range(count)) for epoch in epochs)
    if count > 5:
        assert not torch.equal(epochs[0], epochs[1])


def test_batches_are_the_same_from_whatever_step_one_starts():
    cpu = torch.device("cpu")
    straight = data.Batches(50, 8, 1, cpu)
    wanted = [straight(step) for step in range(30)]
    for start in (29, 6, 7, 13):
        fresh = data.Batches(50, 8, 1, cpu)
        assert torch.equal(fresh(start), wanted[start]) and torch.equal(fresh(0), wanted[0])
    other = data.Batches(50, 8, 2, cpu)
    assert not torch.equal(other(0), wanted[0])


# ---------------------------------------------------------------- glyphs


def test_glyphs_are_digits_by_seed_and_whole():
    begun = time.process_time()
    glyphs = data.load("glyphs")
    assert time.process_time() - begun < 15
    assert glyphs.images.shape == (20_000, 1, 28, 28) and glyphs.images.dtype == torch.uint8
    assert glyphs.labels.bincount().tolist() == [2000] * 10 and glyphs.labels.dtype == torch.int64
    assert glyphs.class_names == [str(d) for d in range(10)] and glyphs.name == "glyphs"
    border = torch.cat([glyphs.images[..., 0, :], glyphs.images[..., -1, :],
                        glyphs.images[..., 0], glyphs.images[..., -1]], dim=-1)
    assert (border > 40).any(-1).float().mean() < 1e-3, "digits are cut off at the border"
    ink = glyphs.images.float().mean((1, 2, 3)) / 255
    assert 0.02 < ink.min() and ink.max() < 0.5


def test_glyphs_depend_on_seed_and_split():
    same, again = data.draw_glyphs(200, seed=5), data.draw_glyphs(200, seed=5)
    assert torch.equal(same.images, again.images) and torch.equal(same.labels, again.labels)
    assert not torch.equal(same.images, data.draw_glyphs(200, seed=6).images)
    test, other = (data.load("glyphs", split="test", seed=seed).images for seed in (0, 1))
    assert len(test) == 2000 and not torch.equal(test, other)


def test_glyphs_stand_upright_and_differ_by_class():
    """The mean image of a class, recognised in drawings of another seed; a 6 is not a 9."""
    first, second = data.draw_glyphs(2000, seed=0), data.draw_glyphs(500, seed=1)
    means = torch.stack([first.images[first.labels == d].float().mean(0) for d in range(10)])

    def recognised(images):
        near = torch.cdist(images.flatten(1).float(), means.flatten(1)).argmin(1)
        return (near == second.labels).float().mean()

    assert recognised(second.images) > 0.8
    assert recognised(second.images.flip(2)) < 0.5 and recognised(second.images.flip(3)) < 0.5


def test_glyphs_without_freetype(monkeypatch):
    def missing(size):
        raise ImportError("no _imagingft")
    monkeypatch.setattr(data.ImageFont, "load_default", missing)
    assert "FreeType" in refused(data.draw_glyphs, 10)


def test_image_size_resizes_and_absurd_ones_are_refused():
    small = data.load("glyphs", image_size=14, split="test")
    assert small.images.shape == (2000, 1, 14, 14) and small.images.dtype == torch.uint8
    whole = data.load("glyphs", split="test").images
    assert (small.images.float().mean() - whole.float().mean()).abs() < 1
    assert "--image-size 10000000" in refused(data.load, "glyphs", "data", 10_000_000,
                                             "test")


def test_an_unknown_set_is_named():
    line = refused(data.load, "mnsit\n")
    assert "mnsit\\n" in line and "fashion_mnist" in line and "folder:PATH" in line


# ---------------------------------------------------------------- mnist, fashion_mnist, cifar10


@needs_mnist
def test_real_mnist():
    train, test = data.load("mnist", MNIST), data.load("mnist", MNIST, split="test")
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9] and test.labels[:3].tolist() == [7, 2, 1]
    assert train.class_names == [str(d) for d in range(10)] and train.name == "mnist"


@needs_mnist
def test_every_change_to_real_mnist_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(MNIST / "MNIST" / "raw", raw)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        whole = (raw / name).read_bytes()
        for place, said in [(0, "number"), (7, "sizes"), (5000, "MD5")]:
            (raw / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
            line = refused(data.load, "mnist", tmp_path, split="test")
            assert name in line and said in line
        (raw / name).write_bytes(whole)


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """A Fashion-MNIST of 40 images, whose checksums are made the right ones."""
    raw, rng = tmp_path / "FashionMNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    table, md5 = {}, []
    for name, (magic, sizes) in data.IDX.items():
        sizes = (40, *sizes[1:])
        numbers = rng.integers(0, 256 if len(sizes) > 1 else 10, sizes, np.uint8)
        content = struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + numbers.tobytes()
        (raw / name).write_bytes(content)
        table[name] = magic, sizes
        md5.append(hashlib.md5(content).hexdigest())
    monkeypatch.setattr(data, "IDX", table)
    monkeypatch.setitem(data.MD5, "fashion_mnist", tuple(md5))
    return raw


def test_idx_files_are_read(idx):
    found = data.load("fashion_mnist", idx.parent.parent)
    content = (idx / "train-images-idx3-ubyte").read_bytes()
    assert found.images.numpy().tobytes() == content[16:]
    assert found.labels.numpy().astype(np.uint8).tobytes() == \
        (idx / "train-labels-idx1-ubyte").read_bytes()[8:]
    assert found.images.shape == (40, 1, 28, 28) and found.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("name,change,said", [
    ("train-images-idx3-ubyte", lambda b: b"\x1f\x8b" + b[2:], "number 2051"),
    ("train-labels-idx1-ubyte", lambda b: b[:3] + b"\x03" + b[4:], "number 2049"),
    ("train-images-idx3-ubyte", lambda b: b[:11] + b"\x1d" + b[12:], "40 x 28 x 28 is right"),
    ("train-images-idx3-ubyte", lambda b: b[:-1], "31,375 bytes and should have 31,376"),
    ("train-images-idx3-ubyte", lambda b: b + b"\0", "31,377 bytes and should have 31,376"),
    ("train-images-idx3-ubyte", lambda b: b"", "number 2051"),
    ("train-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "label 10: 0 to 9"),
    ("train-labels-idx1-ubyte", lambda b: b[:-1] + bytes([(b[-1] + 1) % 10]), "MD5"),
    ("train-images-idx3-ubyte", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "MD5"),
])
def test_a_damaged_idx_file_is_named(idx, name, change, said):
    (idx / name).write_bytes(change((idx / name).read_bytes()))
    line = refused(data.load, "fashion_mnist", idx.parent.parent)
    assert name in line and said in line
    data.load("fashion_mnist", idx.parent.parent, split="test")     # the other split is whole


def test_torchvisions_old_cache_is_not_read_in_place_of_the_files(idx):
    processed = idx.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), processed / name)
    assert len(data.load("fashion_mnist", idx.parent.parent).images) == 40


def offline(monkeypatch, url: str = "http://127.0.0.1:9/"):
    """Every server is out of reach: the discard port refuses, or `url`'s does something worse."""
    monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [url])
    monkeypatch.setattr(datasets.CIFAR10, "url", url + "cifar-10-python.tar.gz")


@pytest.mark.parametrize("spec,files", [
    ("mnist", "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte"),
    ("fashion_mnist", "train-images-idx3-ubyte"), ("cifar10", "data_batch_1, data_batch_2"),
])
def test_without_data_and_network_the_files_are_named(spec, files, tmp_path, monkeypatch, capsys):
    offline(monkeypatch)
    line = refused(data.load, spec, tmp_path)
    assert files in line and str(tmp_path) in line and "refused" in line and "glyphs" in line
    assert capsys.readouterr().out == ""
    with pytest.raises(data.DataMissing):
        data.load(spec, tmp_path)
    assert socket.getdefaulttimeout() is None


def test_what_torchvision_prints_is_kept_back(tmp_path, monkeypatch, capsys):
    def download(self):
        print("Failed to download (trying next):\n")
        raise EOFError
    monkeypatch.setattr(datasets.MNIST, "download", download)
    assert "(EOFError)" in refused(data.load, "mnist", tmp_path)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_only_the_missing_file_is_asked_for(idx, monkeypatch):
    offline(monkeypatch)
    (idx / "train-labels-idx1-ubyte").unlink()
    line = refused(data.load, "fashion_mnist", idx.parent.parent)
    assert "put train-labels-idx1-ubyte into" in line


def test_a_download_puts_the_files_in_place(idx, tmp_path, monkeypatch, capsys):
    """torchvision unpacks what it finds under the right checksum: here it was fetched before."""
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources := [])
    for name in data.IDX:
        packed = gzip.compress((idx / name).read_bytes())
        (idx / f"{name}.gz").write_bytes(packed)
        (idx / name).unlink()
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    offline(monkeypatch)
    assert len(data.load("fashion_mnist", tmp_path).images) == 40
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("answer", ["silence", "trickle", "nonsense", "short"])
def test_a_server_that_misbehaves_ends_the_download(answer, tmp_path, monkeypatch):
    """It accepts, and then says nothing, a byte now and then, no HTTP, or half a file."""
    monkeypatch.setattr(data, "SOCKET_TIMEOUT", 0.5)
    monkeypatch.setattr(data, "PATIENCE", 1.5)
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve():
        talks = []
        while not over.is_set():
            try:
                talk, _ = listener.accept()
            except OSError:
                return
            talks.append(talk)
            if answer == "nonsense":
                talk.sendall(b"\0\1\2 no http\r\n\r\n")
                talk.close()
            elif answer == "short":
                talk.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nhalf")
                talk.close()
            elif answer == "trickle":
                threading.Thread(target=trickle, args=(talk,), daemon=True).start()

    def trickle(talk):
        try:
            while not over.wait(0.2):
                talk.sendall(b"H")
        except OSError:
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    offline(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}/")
    begun = time.monotonic()
    try:
        line = refused(data.load, "mnist", tmp_path)
    finally:
        over.set()
        listener.close()
    assert "cannot be downloaded" in line and time.monotonic() - begun < 8
    assert "timed out" in line or answer != "silence"
    assert not (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()


def test_a_data_dir_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be downloaded" in refused(data.load, "mnist", tmp_path / "file" / "data")


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_damaged_cifar10_is_named_and_never_unpickled(tmp_path, monkeypatch):
    offline(monkeypatch)
    folder, trap = tmp_path / "cifar-10-batches-py", tmp_path / "trapped"
    folder.mkdir()
    names = [n for n, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list]
    for name in names:
        (folder / name).write_bytes(pickle.dumps({"data": Trap(trap), "labels": []}))
    assert "put batches.meta into" in refused(data.load, "cifar10", tmp_path)
    (folder / "batches.meta").write_bytes(pickle.dumps(Trap(trap)))
    for split in ("train", "test"):
        line = refused(data.load, "cifar10", tmp_path, split=split)
        assert "data_batch_1 is damaged" in line and "MD5" in line
    assert not trap.exists()
    pickle.loads((folder / "data_batch_1").read_bytes())
    assert trap.exists(), "the trap would not have gone off"


def test_cifar10_is_read(tmp_path, monkeypatch):
    folder, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    pixels, lists = rng.integers(0, 256, (6, 4, 3072), np.uint8), []
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        content = pickle.dumps({"data": pixels[i], "labels": [i, 1, 2, 3]})
        (folder / name).write_bytes(content)
        lists.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", dict(filename="batches.meta", key="label_names",
                                                       md5=hashlib.md5(meta).hexdigest()))
    train, test = data.load("cifar10", tmp_path), data.load("cifar10", tmp_path, split="test")
    assert train.images.shape == (20, 3, 32, 32) and test.labels.tolist() == [5, 1, 2, 3]
    assert np.array_equal(train.images.numpy(), pixels[:5].reshape(20, 3, 32, 32))
    assert train.class_names == list("abcdefghij")


# ---------------------------------------------------------------- folders of images


def picture(side: int = 40, colour=True, seed: int = 0) -> Image.Image:
    shape = (side, side, 3) if colour else (side, side)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two classes, cats with 12 colour images and dogs with 3."""
    for name, count in [("cats", 12), ("dogs", 3)]:
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            picture(seed=i).save(tmp_path / "set" / name / f"{i:02d}.png")
    return tmp_path / "set"


def load(folder, **options):
    return data.load(f"folder:{folder}", **options)


def test_a_folder_per_class(folder, capsys):
    train, test = load(folder, image_size=40), load(folder, image_size=40, split="test")
    assert train.images.shape == (14, 3, 40, 40) and train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 11 + [1] * 3 and test.labels.tolist() == [0]
    assert train.class_names == ["cats", "dogs"] and train.name == "folder:set"
    for images, i, seed in [(train, 0, 0), (train, 9, 10), (test, 0, 9)]:
        assert np.array_equal(images.images[i].permute(1, 2, 0), np.asarray(picture(seed=seed)))
    assert load(folder).images.shape[-1] == 32
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_grey_only_if_every_image_is(folder):
    for file in folder.rglob("*.png"):
        grey = picture(colour=False, seed=len(str(file)))
        (grey if file.stem != "00" else grey.convert("RGB")).save(file)
    assert load(folder).images.shape == (14, 1, 32, 32)
    colour = picture(colour=False).convert("RGB")
    colour.putpixel((20, 20), (255, 0, 0))
    colour.save(folder / "dogs" / "00.png")
    assert load(folder).images.shape == (14, 3, 32, 32)


def test_the_shorter_side_is_resized_and_the_longer_one_cropped_about_its_centre(folder):
    wide = Image.new("RGB", (160, 40), (255, 0, 0))
    wide.paste((0, 255, 0), (60, 0, 100, 40))
    wide.save(folder / "cats" / "00.png")
    image = load(folder, image_size=20).images[0]
    assert (image[1, :, 2:-2] > 250).all() and (image[0, :, 2:-2] < 5).all()


def test_modes_of_pictures(folder):
    """What a viewer shows is what is learned: alpha over white, palettes, 16 bits, orientation."""
    ramp = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    holes = Image.new("P", (40, 40), 0)
    holes.putpalette([9, 9, 9, 1, 2, 3])
    turned, exif = Image.new("RGB", (40, 40)), Image.Exif()
    turned.paste((255, 255, 255), (0, 0, 40, 20))           # white above; shown: on the right
    exif[0x112] = 6
    cats = folder / "cats"
    Image.fromarray(ramp).save(cats / "00.png")
    clear.save(cats / "01.png")
    palette.save(cats / "02.png")
    holes.save(cats / "03.png", transparency=0)
    turned.save(cats / "04.png", exif=exif)
    Image.new("1", (40, 40), 1).save(cats / "05.png")
    Image.new("CMYK", (40, 40), (0, 0, 0, 255)).save(cats / "06.tif")
    (cats / "06.png").unlink()
    Image.new("LA", (40, 40), (7, 255)).save(cats / "07.png")
    images = load(folder, image_size=40).images
    assert np.array_equal(images[0, 0].numpy(), ramp >> 8)
    assert (images[1] == 255).all() and (images[3] == 255).all()
    assert images[2].flatten(1).float().mean(1).tolist() == [0, 0, 255]
    assert (images[4, :, :, 20:] == 255).all() and (images[4, :, :, :20] == 0).all()
    assert (images[5] == 255).all() and (images[6] == 0).all() and (images[7] == 7).all()


def test_nested_hidden_and_other_files(folder):
    (folder / "cats" / "deep" / "er").mkdir(parents=True)
    picture(seed=99).save(folder / "cats" / "deep" / "er" / "X.JPEG")
    for hidden in [folder / ".git" / "a.png", folder / "cats" / ".thumbs" / "a.png",
                   folder / "cats" / "._00.png"]:
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"not a picture")
    (folder / "cats" / "notes.txt").write_text("not a picture")
    (folder / "README.md").write_text("not a class")
    assert len(load(folder).images) == 14 + 1 and load(folder).class_names == ["cats", "dogs"]


@pytest.mark.parametrize("spoil,said", [
    (lambda d: shutil.rmtree(d / "dogs"), "holds 1 class folder:"),
    (lambda d: shutil.rmtree(d), "is not a folder"),
    (lambda d: [f.unlink() for f in (d / "dogs").iterdir()], "dogs holds no image (.jpg"),
    (lambda d: (d / "dogs" / "01.png").write_bytes(b"no"), "01.png cannot be read as an image"),
    (lambda d: (d / "dogs" / "01.png").write_bytes(b""), "01.png cannot be read as an image"),
    (lambda d: picture(31).save(d / "dogs" / "01.png"), "01.png is 31x31 pixels, smaller"),
    (lambda d: picture(40).crop((0, 0, 40, 9)).save(d / "dogs" / "01.png"), "is 40x9 pixels"),
    (lambda d: Image.new("F", (40, 40)).save(d / "dogs" / "01.tiff"), "its pixels are fractions"),
    (lambda d: (d / "dogs" / "z.png").symlink_to("nowhere"), "z.png cannot be read as an image"),
    (lambda d: (d / "dogs" / "z.png").symlink_to("z.png"), "z.png cannot be read as an image"),
    (lambda d: os.mkfifo(d / "dogs" / "z.png"), "z.png is not a file"),
    (lambda d: (d / "loop").symlink_to(d), "loop is a link to a folder that holds it"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_with_a_folder_is_named(folder, spoil, said):
    spoil(folder)
    assert said in refused(load, folder)


def test_a_truncated_picture_is_named(folder):
    for suffix in (".png", ".jpg", ".bmp", ".webp"):
        file = folder / "dogs" / f"z{suffix}"
        picture().save(file)
        file.write_bytes(file.read_bytes()[:-200])
        assert f"z{suffix} cannot be read" in refused(load, folder)
        file.unlink()


def test_a_loop_of_links_ends(folder):
    (folder / "cats" / "loop").symlink_to(folder / "cats")
    (folder / "self").symlink_to(folder / "self")
    assert len(load(folder).images) == 14


def test_decompression_bombs_are_refused(folder, monkeypatch):
    """A picture far larger than a photograph, and a PNG whose text unpacks to gigabytes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    Image.new("L", (50, 50)).save(folder / "cats" / "00.png")           # a warning of Pillow's
    assert "00.png cannot be read" in refused(load, folder)
    Image.new("L", (99, 99)).save(folder / "cats" / "00.png")           # an error of Pillow's
    assert "00.png cannot be read" in refused(load, folder)
    monkeypatch.undo()
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "0" * 10_000_000, zip=True)
    picture().save(folder / "cats" / "00.png", pnginfo=text)
    assert "00.png cannot be read" in refused(load, folder)


def test_an_unreadable_folder_is_named(folder, monkeypatch):
    def denied(path="."):
        if Path(path).name == hidden:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(os, "listdir", lambda path: [e.name for e in denied(path)])
    for hidden in ("set", "dogs"):
        assert f"{hidden} cannot be read: Permission denied" in refused(load, folder)


def test_names_with_control_characters_are_safe(folder):
    strange = "dogs\x1b[31m\n" + os.fsdecode(b"\xff")
    (folder / "dogs").rename(folder / strange)
    assert load(folder).class_names == ["cats", strange] and load(folder).digest()
    whole = folder.rename(folder.with_name("se\x1b\nt"))
    assert load(whole).name == "folder:se\\x1b\\nt"
    (whole / strange / "01.png").write_bytes(b"no")
    line = refused(load, whole)
    assert "\\x1b" in line and "\x1b" not in line


@pytest.mark.parametrize("path", ["", "~nobody-of-that-name/x", "x" * 5000, "a\0b"])
def test_odd_paths_are_no_folders(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "folder" in refused(data.load, f"folder:{path}")


def test_a_damaged_folder_ends_the_command_in_one_line(folder):
    (folder / "dogs" / "01.png").write_bytes(b"no")
    done = subprocess.run(
        [sys.executable, ROOT / "train_mnist.py", "--dataset", f"folder:{folder}", "--device",
         "cpu", "--model", "DiT-Nano/4", "--out", folder.parent / "run"],
        capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "01.png" in done.stderr, done.stderr


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_the_images_in_reading_order(channels):
    images = some_set(5, channels, 28).images
    sheet = np.asarray(data.grid(images, 3))
    assert sheet.shape == (2 * 58 + 2, 3 * 58 + 2, 3)
    for i in range(5):
        top, left = 2 + i // 3 * 58, 2 + i % 3 * 58
        shown = sheet[top : top + 56 : 2, left : left + 56 : 2]
        assert np.array_equal(shown, images[i].permute(1, 2, 0).expand(-1, -1, 3))
    assert data.grid(images, 3, "a title").height > sheet.shape[0]


def test_a_picture_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    broken = picture(seed=1)
    monkeypatch.setattr(broken, "save", lambda file, **_: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        data.save_picture(tmp_path / "a.png", broken)
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    data.save_picture(tmp_path / "a.png", picture(seed=2))
    assert np.array_equal(Image.open(tmp_path / "a.png"), picture(seed=2))
    with pytest.raises(OSError):
        data.save_picture(tmp_path / "a.png" / "b.png", picture())
