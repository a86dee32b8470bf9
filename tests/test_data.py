"""support/data.py: loading the data sets, the errors about damaged files, and batches."""

import gzip
import hashlib
import os
import pickle
import re
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont, PngImagePlugin
from PIL._util import DeferredError
from torchvision import datasets

from conftest import command
from support import data, paths
from support.cli import UserError, escape
from support.seeds import generator, mix_seed

MNIST = Path(os.environ.get("MNIST_DIR", paths.DATA))
needs_mnist = pytest.mark.skipif(not (MNIST / "MNIST" / "raw").is_dir(),
                                 reason="needs MNIST's files: MNIST_DIR=FOLDER names them")
CPU = torch.device("cpu")


def refused(call, *args, **options) -> str:
    """The error line of a call that must be refused, as it is printed, without the test's own
    folder, whose name could contain the word that is looked for."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    line = escape(str(caught.value))
    assert len(line) < 1000, line
    return re.sub(r"\S*/test_[^/\s]*/", "", line)


# ---------------------------------------------------------------- image sets and batches


def some_set(count: int = 10, channels: int = 1, side: int = 4) -> data.ImageSet:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), generator=rng, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(count) % 3, ["a", "b", "c"], "some")


def test_to_uint8_inverts_batch():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    one = data.ImageSet(ramp, torch.tensor([7]), ["x"] * 8, "ramp")
    x0, y = one.batch(torch.tensor([0]), CPU)
    assert x0.dtype == torch.float32 and x0.min() == -1 and x0.max() == 1
    assert y.tolist() == [7] and y.dtype == torch.int64
    assert torch.equal(data.to_uint8(x0), ramp)
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    assert torch.equal(data.to_uint8(x0.bfloat16()[..., :1]), ramp[..., :1])


def test_batch_takes_the_images_and_labels_of_the_index():
    images = some_set()
    x0, y = images.batch(torch.tensor([3, 3, 0]), CPU)
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
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    one = data.ImageSet(ramp, torch.tensor([7]), ["a", "b"], "ramp")
    assert one.digest() == "06b15521ca6dea20"       # old checkpoints and rulers hold digests


def test_to_keeps_a_set_in_cpu_memory_where_it_would_fill_the_gpu(monkeypatch):
    images = some_set()
    free = 2 * images.images.nbytes - 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert images.to(torch.device("cuda")) is images
    moved = images.to(torch.device("meta"))
    assert moved.images.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize("count,batch", [(10, 3), (10, 10), (10, 25), (7, 1), (1, 4), (64, 16)])
def test_every_image_once_per_epoch(count, batch):
    batches = data.Batches(some_set(count), batch, seed=3, device=CPU)
    steps = -(-4 * count // batch)
    index = torch.cat([batches.index(step) for step in range(steps)])
    assert index.shape == (steps * batch,) and index.dtype == torch.int64
    epochs = index[: 4 * count].view(4, count)
    assert all(epoch.sort().values.tolist() == list(range(count)) for epoch in epochs)
    if count > 5:
        assert not torch.equal(epochs[0], epochs[1])
    for number, epoch in enumerate(epochs):         # the order that earlier versions trained in
        order = torch.randperm(count, generator=generator("cpu", 3, "epoch", number))
        assert torch.equal(epoch, order)


def test_a_batch_holds_the_images_and_labels_of_its_index():
    images = some_set(50)
    batches = data.Batches(images, 8, 1, CPU)
    for step in (0, 5, 6, 7):                       # 6 crosses from one epoch into the next
        index, (x0, y) = batches.index(step), batches(step)
        assert x0.dtype == torch.float32 and y.dtype == torch.int64
        assert torch.equal(data.to_uint8(x0), images.images[index])
        assert torch.equal(y, images.labels[index])


def test_batches_do_not_depend_on_the_first_step_asked_for():
    images = some_set(50)
    batches = data.Batches(images, 8, 1, CPU, flip=True)
    expected = [batches(step)[0] for step in range(30)]
    for start in (29, 6, 7, 13):
        resumed = data.Batches(images, 8, 1, CPU, flip=True)
        assert torch.equal(resumed(start)[0], expected[start])
        assert torch.equal(resumed(0)[0], expected[0])
    other = data.Batches(images, 8, 2, CPU)
    assert not torch.equal(other.index(0), batches.index(0))


@pytest.mark.parametrize("flip", [False, True])
def test_the_shares_of_all_processes_make_up_the_batch(flip):
    class Counting(data.ImageSet):
        fetched = 0

        def batch(self, index, device):
            self.fetched += len(index)
            return super().batch(index, device)

    images = some_set(50)
    whole = data.Batches(images, 12, 1, CPU, flip=flip)
    own = Counting(images.images, images.labels, images.class_names, images.name)
    shares = [data.Batches(own, 12, 1, CPU, flip=flip, share=slice(k, k + 4)) for k in (0, 4, 8)]
    for step in range(6):
        x0, y = whole(step)
        parts = [share(step) for share in shares]
        assert torch.equal(torch.cat([x0 for x0, _ in parts]), x0)
        assert torch.equal(torch.cat([y for _, y in parts]), y)
    assert own.fetched == 6 * 12                    # a process fetches its share alone


def test_flip_mirrors_about_half_of_the_images():
    images = some_set(64, channels=3)
    plain, flipped = (data.Batches(images, 64, 1, CPU, flip=flip) for flip in (False, True))
    mirrored = []
    for step in range(8):
        index, (x0, y), (f0, fy) = plain.index(step), plain(step), flipped(step)
        assert torch.equal(data.to_uint8(x0), images.images[index]) and torch.equal(y, fy)
        same, mirror = ((f0 == x).flatten(1).all(1) for x in (x0, x0.flip(-1)))
        assert (same ^ mirror).all()
        mirrored.append(mirror)
    assert 0.4 < torch.cat(mirrored).float().mean() < 0.6
    assert not torch.equal(mirrored[0], mirrored[1])


def test_batches_are_on_the_device_asked_for():
    x0, y = data.Batches(some_set(), 4, 1, torch.device("meta"), flip=True, share=slice(2))(0)
    assert x0.device.type == y.device.type == "meta" and x0.shape == (2, 1, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_batches_on_a_gpu_are_those_of_the_cpu_without_synchronisation(where):
    device, images = torch.device("cuda", 0), some_set(50, channels=3)
    batches = data.Batches(images.to(torch.device(where)), 8, 1, device, flip=True)
    batches(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [batches(step) for step in range(20)]           # several epochs
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference = data.Batches(images, 8, 1, CPU, flip=True)
    for step, (x0, y) in enumerate(found):
        assert x0.device == y.device == device
        expected = reference(step)
        assert torch.equal(x0.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])


# ---------------------------------------------------------------- glyphs


@pytest.fixture(scope="module")
def glyphs() -> data.ImageSet:
    return data.load("glyphs", split="test")


def test_glyphs_are_balanced_and_not_cut_off(glyphs):
    assert glyphs.images.shape == (2_000, 1, 28, 28) and glyphs.images.dtype == torch.uint8
    assert glyphs.labels.bincount().tolist() == [200] * 10 and glyphs.labels.dtype == torch.int64
    assert glyphs.class_names == [str(d) for d in range(10)] and glyphs.name == "glyphs"
    border = torch.cat([glyphs.images[..., 0, :], glyphs.images[..., -1, :],
                        glyphs.images[..., 0], glyphs.images[..., -1]], dim=-1)
    assert (border > 40).any(-1).float().mean() < 1e-3, "digits are cut off at the border"
    ink = glyphs.images.float().mean((1, 2, 3)) / 255
    assert 0.02 < ink.min() and ink.max() < 0.5


def test_glyphs_depend_on_seed_and_split(glyphs, monkeypatch):
    same, again = data.draw_glyphs(200, seed=5), data.draw_glyphs(200, seed=5)
    assert torch.equal(same.images, again.images) and torch.equal(same.labels, again.labels)
    assert not torch.equal(same.images, data.draw_glyphs(200, seed=6).images)
    assert torch.equal(glyphs.images, data.draw_glyphs(2000, mix_seed(0, "test")).images)
    monkeypatch.setattr(data, "draw_glyphs", lambda count, seed: (count, seed))
    assert data.load("glyphs") == (20_000, mix_seed(0, "train"))       # not drawn: takes seconds
    assert data.load("glyphs", split="test", seed=7) == (2_000, mix_seed(7, "test"))


def test_glyphs_stand_upright_and_differ_by_class(glyphs):
    """The mean image of a class, recognised in drawings of another seed; a 6 is not a 9."""
    second = data.draw_glyphs(500, seed=1)
    means = torch.stack([glyphs.images[glyphs.labels == d].float().mean(0) for d in range(10)])

    def recognised(images):
        near = torch.cdist(images.flatten(1).float(), means.flatten(1)).argmin(1)
        return (near == second.labels).float().mean()

    assert recognised(second.images) > 0.7
    assert recognised(second.images.flip(2)) < 0.5 and recognised(second.images.flip(3)) < 0.5


def test_glyphs_without_freetype(monkeypatch):
    monkeypatch.setattr(ImageFont, "core", DeferredError(ImportError("no _imagingft")))
    assert "FreeType" in refused(data.draw_glyphs, 10)


def test_image_size_resizes_and_absurd_ones_are_refused(glyphs):
    small = data.load("glyphs", image_size=14, split="test")
    assert small.images.shape == (2000, 1, 14, 14) and small.images.dtype == torch.uint8
    assert (small.images.float().mean() - glyphs.images.float().mean()).abs() < 1
    assert "--image-size 10000000" in refused(data.load, "glyphs", image_size=10_000_000,
                                             split="test")


def test_an_unknown_data_set_is_named():
    line = refused(data.load, "mnsit\n")
    assert "mnsit\\n" in line and "fashion_mnist" in line and "folder:PATH" in line
    assert "fashion_mnist" in refused(data.load, "x" * 5000)


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
        for place, words in [(0, "number"), (7, "sizes"), (5000, "MD5")]:
            (raw / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
            line = refused(data.load, "mnist", tmp_path, split="test")
            assert name in line and words in line
        (raw / name).write_bytes(whole)


@pytest.fixture
def idx(tmp_path, monkeypatch):
    """A Fashion-MNIST of 40 images, with the published checksums replaced by theirs."""
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


def test_the_default_data_dir_is_the_repositorys(idx, monkeypatch):
    monkeypatch.setattr(paths, "DATA", idx.parent.parent)
    assert data.load("fashion_mnist").digest() == \
        data.load("fashion_mnist", idx.parent.parent).digest()


def test_idx_files_are_read(idx):
    found = data.load("fashion_mnist", idx.parent.parent)
    content = (idx / "train-images-idx3-ubyte").read_bytes()
    assert found.images.numpy().tobytes() == content[16:]
    assert found.labels.numpy().astype(np.uint8).tobytes() == \
        (idx / "train-labels-idx1-ubyte").read_bytes()[8:]
    assert found.images.shape == (40, 1, 28, 28) and found.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("name,change,words", [
    ("train-images-idx3-ubyte", lambda b: b"\x1f\x8b" + b[2:], "number is not 2051"),
    ("train-labels-idx1-ubyte", lambda b: b[:3] + b"\x03" + b[4:], "number is not 2049"),
    ("train-images-idx3-ubyte", lambda b: b[:11] + b"\x1d" + b[12:], "not 40 x 28 x 28"),
    ("train-images-idx3-ubyte", lambda b: b[:-1], "31,375 bytes, expected 31,376"),
    ("train-images-idx3-ubyte", lambda b: b + b"\0", "31,377 bytes, expected 31,376"),
    ("train-images-idx3-ubyte", lambda b: b"", "number is not 2051"),
    ("train-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "label 10: labels are 0 to 9"),
    ("train-labels-idx1-ubyte", lambda b: b[:-1] + bytes([(b[-1] + 1) % 10]), "MD5"),
    ("train-images-idx3-ubyte", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "MD5"),
])
def test_a_damaged_idx_file_is_named(idx, name, change, words):
    (idx / name).write_bytes(change((idx / name).read_bytes()))
    line = refused(data.load, "fashion_mnist", idx.parent.parent)
    assert name in line and words in line
    data.load("fashion_mnist", idx.parent.parent, split="test")     # the other split is intact


def test_torchvisions_old_cache_is_not_read_instead_of_the_files(idx):
    processed = idx.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), processed / name)
    assert len(data.load("fashion_mnist", idx.parent.parent).images) == 40


def offline(monkeypatch, url: str = "http://127.0.0.1:9/"):
    """No server is reachable: the discard port refuses, or the server at `url` misbehaves."""
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


@pytest.mark.parametrize("spec", ["mnist", "cifar10"])
def test_a_failed_download_leaves_no_folder_behind(spec, tmp_path, monkeypatch):
    """A mistyped --data-dir would otherwise look like a folder of classes afterwards."""
    offline(monkeypatch)
    (tmp_path / "kept").mkdir()
    line = refused(data.load, spec, tmp_path / "kept" / "typo" / "deep")
    assert f"{spec} is not in " in line and "typo/deep, which does not exist, and cannot" in line
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]
    assert "does not exist" not in refused(data.load, spec, tmp_path / "kept")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_what_torchvision_prints_is_suppressed(tmp_path, monkeypatch, capsys):
    def download(self):
        print("Failed to download (trying next):\n")
        raise EOFError
    monkeypatch.setattr(datasets.MNIST, "download", download)
    assert "(EOFError)" in refused(data.load, "mnist", tmp_path)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_only_missing_files_are_named(idx, monkeypatch):
    offline(monkeypatch)
    (idx / "train-labels-idx1-ubyte").unlink()
    line = refused(data.load, "fashion_mnist", idx.parent.parent)
    assert "put train-labels-idx1-ubyte into" in line


def test_a_download_puts_the_files_in_place(idx, tmp_path, monkeypatch, capsys):
    """torchvision unpacks archives that are present with the right checksum."""
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
    """It accepts, then sends nothing, a byte now and then, something else than HTTP, or half a
    file."""
    monkeypatch.setattr(data, "SOCKET_TIMEOUT", 0.3)
    monkeypatch.setattr(data, "STALL_TIMEOUT", 0.8)
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve():
        connections = []
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            if answer == "nonsense":
                connection.sendall(b"\0\1\2 not http\r\n\r\n")
                connection.close()
            elif answer == "short":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nhalf")
                connection.close()
            elif answer == "trickle":
                threading.Thread(target=trickle, args=(connection,), daemon=True).start()

    def trickle(connection):
        try:
            while not over.wait(0.1):
                connection.sendall(b"H")
        except OSError:
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    offline(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}/")
    started = time.monotonic()
    try:
        line = refused(data.load, "mnist", tmp_path)
    finally:
        over.set()
        listener.close()
    assert "cannot be downloaded" in line and time.monotonic() - started < 8
    assert "timed out" in line or answer != "silence"
    assert not (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()


def test_a_data_dir_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be downloaded" in refused(data.load, "mnist", tmp_path / "file" / "data")


class Trap:
    """An object that creates a file when it is unpickled."""

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
    assert trap.exists(), "the trap does not work, the test shows nothing"


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


def test_modes_of_pictures(folder, recwarn):
    """Images are read as a viewer shows them: alpha over white, palettes, 16 bits, orientation."""
    ramp = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    holes = Image.new("P", (40, 40), 0)
    holes.putpalette([9, 9, 9, 1, 2, 3])
    turned, exif = Image.new("RGB", (40, 40)), Image.Exif()
    turned.paste((255, 255, 255), (0, 0, 40, 20))       # white at the top; rotated: on the right
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
    wide = np.full((40, 40), -1000, np.int32)               # 32 bits: clipped to 16
    wide[:20] = 100_000
    Image.fromarray(wide).save(cats / "08.tif")
    (cats / "08.png").unlink()
    picture().save(folder / "dogs" / "01.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0bad")
    images = load(folder, image_size=40).images
    assert np.array_equal(images[0, 0].numpy(), ramp >> 8)
    assert (images[1] == 255).all() and (images[3] == 255).all()
    assert images[2].flatten(1).float().mean(1).tolist() == [0, 0, 255]
    assert (images[4, :, :, 20:] == 255).all() and (images[4, :, :, :20] == 0).all()
    assert (images[5] == 255).all() and (images[6] == 0).all() and (images[7] == 7).all()
    assert (images[8, :, :20] == 255).all() and (images[8, :, 20:] == 0).all()
    assert not recwarn, "a warning of Pillow's about metadata"


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


@pytest.mark.parametrize("damage,words", [
    (lambda d: [shutil.rmtree(f) for f in d.iterdir()], "set has no class folder"),
    (lambda d: shutil.rmtree(d), "is not a folder"),
    (lambda d: [f.unlink() for f in (d / "dogs").iterdir()], "dogs has no image (.jpg"),
    (lambda d: (d / "dogs" / "01.png").write_bytes(b"no"), "01.png cannot be read as an image"),
    (lambda d: (d / "dogs" / "01.png").write_bytes(b""), "01.png cannot be read as an image"),
    (lambda d: Image.new("F", (40, 40)).save(d / "dogs" / "01.tiff"), "are floating-point"),
    (lambda d: (d / "dogs" / "z.png").symlink_to("nowhere"), "z.png cannot be read as an image"),
    (lambda d: (d / "dogs" / "z.png").symlink_to("z.png"), "z.png cannot be read as an image"),
    (lambda d: os.mkfifo(d / "dogs" / "z.png"), "z.png is not a file"),
    (lambda d: (d / "loop").symlink_to(d), "loop is a link to a folder that contains it"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_with_a_folder_is_named(folder, damage, words):
    damage(folder)
    assert words in refused(load, folder)


def test_one_class_folder_is_enough(folder):
    shutil.rmtree(folder / "cats")
    train = load(folder)
    assert train.images.shape == (3, 3, 32, 32)
    assert train.class_names == ["dogs"] and train.labels.tolist() == [0, 0, 0]
    x0, y = data.Batches(train, 4, 0, CPU)(0)
    assert x0.shape == (4, 3, 32, 32) and y.tolist() == [0] * 4


def test_small_images_are_enlarged_with_one_warning(folder, capsys):
    half = Image.new("RGB", (10, 10))
    half.paste((255, 255, 255), (5, 0, 10, 10))
    half.save(folder / "cats" / "03.png")
    picture(40).crop((0, 0, 40, 9)).save(folder / "dogs" / "01.png")    # one side is too short
    for name, size in [("dot", (1, 1)), ("line", (1, 3000))]:
        Image.new("RGB", size, (0, 0, 255)).save(folder / "dogs" / f"{name}.png")
    images = load(folder).images
    assert (images[3, :, :, :13] < 30).all() and (images[3, :, :, -13:] > 225).all()
    assert (images[-2:, 2] == 255).all() and (images[-2:, :2] == 0).all()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("warning: 4 of 16 images are smaller than --image-size 32")
    assert captured.err.endswith("cats/03.png (10x10 pixels)\n")
    load(folder, image_size=1)
    assert capsys.readouterr().err == ""


def test_under_torchrun_one_process_warns(folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert load(folder, image_size=50).images.shape[-1] == 50
    assert capsys.readouterr().err == ""


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
    """An image far larger than a photograph, and a PNG whose metadata unpacks to gigabytes."""
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


def test_names_may_contain_any_character(folder):
    strange = "dogs\x1b[31m\n" + os.fsdecode(b"\xff")
    (folder / "dogs").rename(folder / strange)
    assert load(folder).class_names == ["cats", strange] and load(folder).digest()


@pytest.mark.parametrize("path", ["", "~nobody-of-that-name/x", "x" * 5000, "a\0b"])
def test_odd_paths_are_no_folders(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "folder" in refused(data.load, f"folder:{path}")


def test_a_damaged_folder_ends_the_command_in_one_safe_line(folder):
    (folder / "dogs").rename(folder / "do\x1b[31m\ngs")
    (folder / "do\x1b[31m\ngs" / "01.png").write_bytes(b"no")
    process = command("train_mnist.py", "--dataset", f"folder:{folder}", "--device", "cpu",
                      "--model", "DiT-Nano/4", "--out", folder.parent / "run", cwd=folder.parent)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in err
    assert err.count("\n") == 1 and "do\\x1b[31m\\ngs/01.png cannot be read" in err, err
