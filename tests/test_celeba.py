"""support/celeba.py, on a small folder in torchvision's layout."""

import hashlib
import json
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import sample
from conftest import load as load_checkpoint
from support import celeba, data
from support.cli import UserError
from tools import evaluate, lr_finder, ruler as rulers

COUNTS = {"train": 24, "valid": 2, "test": 12}
LISTS = ("list_attr_celeba.txt", "identity_CelebA.txt", "list_bbox_celeba.txt",
         "list_landmarks_align_celeba.txt", "list_eval_partition.txt")
MALE, SMILING = celeba.ATTRIBUTES.index("Male"), celeba.ATTRIBUTES.index("Smiling")


def is_male(i: int) -> bool:
    return i % 3 == 0


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """A data directory with 38 pictures of CelebA's proportions. Men are blue, women red; rows that
    a centre crop drops are green."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    rng, count = np.random.default_rng(0), sum(COUNTS.values())
    signs = rng.choice([-1, 1], (count, 40))
    signs[:, MALE] = [1 if is_male(i) else -1 for i in range(count)]
    names = [f"{i + 1:06d}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        pixels = np.zeros((109, 89, 3), np.uint8)
        pixels[..., 2 if is_male(i) else 0] = 200 + i
        pixels[:9] = pixels[-9:] = (0, 255, 0)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)

    def write(name: str, rows: np.ndarray, header: str = "") -> None:
        lines = [f"{n} {' '.join(f'{v:2d}' for v in row)}" for n, row in
                 zip(names, rows, strict=True)]
        (folder / name).write_text(f"{count}\n{header} \n" * bool(header) + "\n".join(lines) + "\n")

    split = np.repeat([0, 1, 2], list(COUNTS.values()))
    write(LISTS[0], signs, " ".join(celeba.ATTRIBUTES))
    write(LISTS[1], rng.integers(1, 99, (count, 1)))
    write(LISTS[2], rng.integers(0, 99, (count, 4)), "x_1 y_1 width height")
    write(LISTS[3], rng.integers(0, 99, (count, 10)), " ".join(f"x{i}" for i in range(10)))
    write(LISTS[4], split[:, None])
    return root


@pytest.fixture
def copy(faces, tmp_path) -> Path:
    """A copy of the data directory that is this test's own."""
    return shutil.copytree(faces, tmp_path / "copy", ignore=shutil.ignore_patterns("cache-*"))


def refused(root: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        data.load("celeba", root, **options)
    line = str(caught.value)
    assert len(line) < 1200 and "\n" not in line
    return line


def test_the_images_and_classes_of_a_folder(faces):
    train, test = data.load("celeba", faces), data.load("celeba", faces, split="test")
    assert train.images.shape == (24, 3, 64, 64) and train.images.dtype == torch.uint8
    assert test.images.shape == (12, 3, 64, 64) and train.name == "celeba"
    assert train.class_names == ["female", "male"] and train.labels.dtype == torch.int64
    assert train.labels.tolist() == [int(is_male(i)) for i in range(24)]
    assert test.labels.tolist() == [int(is_male(i)) for i in range(26, 38)]
    for images, first in [(train, 0), (test, 26)]:
        for i, (image, y) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            red, green, blue = image.float().mean((1, 2)).tolist()
            assert green < 12, "the centre crop holds rows of the edge"
            strong, weak = (blue, red) if y else (red, blue)
            assert abs(strong - (200 + first + i)) < 12 and weak < 12
    assert data.load("celeba", faces, 16).images.shape == (24, 3, 16, 16)


def test_another_attribute_makes_other_classes(faces):
    male, smiling = (data.load("celeba", faces, 16, celeba_attribute=name)
                     for name in (None, "Smiling"))
    assert smiling.class_names == ["not Smiling", "Smiling"]
    assert torch.equal(male.images, smiling.images)
    assert not torch.equal(male.labels, smiling.labels) and male.digest() != smiling.digest()
    line = refused(faces, celeba_attribute="Smilling")
    assert "'Smilling'" in line and "Smiling" in line


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_reads_the_same_once_it_accepts_the_checksums(faces, split, monkeypatch):
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        datasets.CelebA(faces, split)
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)
    theirs = datasets.CelebA(faces, split)
    assert tuple(n for n in theirs.attr_names if n) == celeba.ATTRIBUTES
    for column, attribute in [(MALE, "Male"), (SMILING, "Smiling")]:
        ours = data.load("celeba", faces, 89, split, celeba_attribute=attribute)
        assert ours.labels.tolist() == theirs.attr[:, column].tolist()
    crop = [np.asarray(x.crop((0, 10, 89, 99))) for x, _ in theirs]
    assert np.array_equal(ours.images.permute(0, 2, 3, 1), np.stack(crop))


# ---------------------------------------------------------------- the cache


def test_images_are_decoded_once(copy, monkeypatch, capsys):
    first = data.load("celeba", copy, 16)
    assert "cache-train-16.npz" in capsys.readouterr().out
    monkeypatch.setattr(data, "open_image", None)
    second = data.load("celeba", copy, 16, celeba_attribute="Smiling")
    assert torch.equal(first.images, second.images) and capsys.readouterr().out == ""
    with pytest.raises(TypeError):                  # of another size or split they are decoded
        data.load("celeba", copy, 17)
    with pytest.raises(TypeError):
        data.load("celeba", copy, 16, "test")


def damage_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes) -> None:
    with np.load(path) as file:
        content = {**file, **changes}
    np.savez(path, **content)


@pytest.mark.parametrize("damage", [
    damage_bytes,
    lambda path: path.write_bytes(path.read_bytes()[:-99]),
    lambda path: path.write_bytes(b""),
    lambda path: rewrite(path, images=np.zeros((24, 3, 16, 15), np.uint8)),
    lambda path: rewrite(path, images=np.zeros((24, 3, 16, 16), np.float32)),
    lambda path: rewrite(path, images=np.array([None])),
], ids=["byte", "truncated", "empty", "shape", "dtype", "pickle"])
def test_a_damaged_cache_is_replaced(copy, damage, capsys):
    wanted = data.load("celeba", copy, 16).images
    path = copy / "celeba" / "cache-train-16.npz"
    damage(path)
    assert torch.equal(data.load("celeba", copy, 16).images, wanted)
    assert capsys.readouterr().out.count("written") == 2
    data.load("celeba", copy, 16)
    assert capsys.readouterr().out == ""


def test_the_cache_of_other_files_is_replaced(copy):
    before = data.load("celeba", copy, 16).images
    Image.new("RGB", (89, 109), "white").save(copy / "celeba" / "img_align_celeba" / "000003.jpg")
    after = data.load("celeba", copy, 16).images
    assert (after[2] > 250).all()
    assert [i for i in range(24) if not torch.equal(before[i], after[i])] == [2]


def test_a_folder_that_is_not_writable_is_read_with_a_warning(copy, monkeypatch, capsys):
    def full(path, write):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(celeba, "atomic_write", full)
    assert len(data.load("celeba", copy, 16).images) == 24
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cache-train-16.npz cannot be written (No space" in err


# ---------------------------------------------------------------- what is wrong with a folder


def replace(name: str, old: str, new: str):
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
    return change


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "img_align_celeba" / "000007.jpg").unlink(),
     "img_align_celeba lacks 1 of the 24 images .*000007.jpg"),
    (lambda d: (d / "img_align_celeba" / "000007.jpg").write_bytes(b"no"),
     "000007.jpg cannot be read as an image"),
    (replace(LISTS[0], " 1", " 2"), "list_attr_celeba.txt, line 3 is not"),
    (replace(LISTS[0], "000002.jpg -1", "000002.jpg"), "list_attr_celeba.txt, line 4 is not"),
    (replace(LISTS[0], "000002.jpg", "000001.jpg"), "list_attr_celeba.txt lacks 1 of the 24"),
    (replace(LISTS[0], "Bald", "Bold"), "list_attr_celeba.txt, line 2 does not name"),
    (lambda d: (d / LISTS[0]).write_bytes(b"\xff\0"), "list_attr_celeba.txt lacks 24 of the 24"),
    (replace(LISTS[4], " 0", " 3"), "list_eval_partition.txt, line 1 is not"),
    (replace(LISTS[4], "000005.jpg", "../5.jpg"), "img_align_celeba lacks 1|attr.* lacks 1"),
    (lambda d: (d / LISTS[4]).write_text(""), "assigns no image to the split 'train'"),
    (lambda d: (shutil.rmtree(d / "img_align_celeba"), (d / "img_align_celeba").touch()),
     "img_align_celeba cannot be read: Not a directory"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_is_named(copy, damage, words):
    damage(copy / "celeba")
    assert re.search(words, refused(copy, image_size=16))


def test_an_image_listed_twice_counts_once(copy):
    with open(copy / "celeba" / LISTS[4], "a") as file:
        file.write("000001.jpg 0\n")
    found = data.load("celeba", copy, 16)
    assert len(found.images) == len(found.labels) == 24


# ---------------------------------------------------------------- the download


def test_without_the_data_the_line_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    line = refused(tmp_path)
    assert "'gdown' is required" in line and str(tmp_path / "celeba") in line
    assert "put img_align_celeba, list_attr_celeba.txt, list_eval_partition.txt into" in line
    assert "mmlab.ie.cuhk.edu.hk" in line and "img_align_celeba.zip, unpacked" in line
    assert not list(tmp_path.iterdir())
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    assert "put list_attr_celeba.txt, list_eval_partition.txt into" in refused(tmp_path)

    def over_quota(**options):
        raise RuntimeError("Failed to retrieve file url:\n\n\tToo many users have viewed or "
                           "downloaded this file recently.\n\n\tTry again later.\n")
    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=over_quota))
    assert "cannot be downloaded (Try again later.): put" in refused(tmp_path)


@pytest.fixture
def drive(faces, tmp_path, monkeypatch) -> Path:
    """Google Drive has the small data set; an empty data directory."""
    files = {name: (faces / "celeba" / name).read_bytes() for name in LISTS}
    archive = tmp_path / "img_align_celeba.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for image in (faces / "celeba" / "img_align_celeba").iterdir():
            file.write(image, f"img_align_celeba/{image.name}")
    files[archive.name] = archive.read_bytes()
    monkeypatch.setattr(datasets.CelebA, "file_list", [
        (name, hashlib.md5(content).hexdigest(), name) for name, content in files.items()])
    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(
        download=lambda id, output, **_: Path(output).write_bytes(files[id])))
    return tmp_path / "new"


def test_torchvision_downloads_it(drive, faces):
    assert data.load("celeba", drive, 16).digest() == data.load("celeba", faces, 16).digest()


def test_unpacking_is_progress(drive, monkeypatch):
    """It takes longer than the time after which a download is given up, and the size of a folder
    need not change."""
    unpack = datasets.celeba.extract_archive

    def slowly(path: str) -> None:
        unpack(path)
        for i in range(6):
            time.sleep(0.3)
            Path(path).with_name("img_align_celeba").joinpath(str(i)).touch()
    monkeypatch.setattr(datasets.celeba, "extract_archive", slowly)
    monkeypatch.setattr(data, "STALL_TIMEOUT", 0.8)
    assert len(data.load("celeba", drive, 16).images) == 24


# ---------------------------------------------------------------- the commands


def flags(root: Path, *more) -> list:
    return ["--dataset", "celeba", "--data-dir", root, "--image-size", 14, *more]


def test_train_sample_by_class_name_and_resume(train, faces):
    assert train(*flags(faces, "--steps", 3, "--stop-after", 2, "--out", "run")) == 0
    recipe = json.loads(Path("run/config.json").read_text())["recipe"]
    assert recipe["celeba_attribute"] == "Male" and recipe["dataset"] == "celeba"
    assert sample.main(["run", "--labels", "female", "male", "--steps", "2", "--npz", "x.npz"]) == 0
    assert np.load("x.npz")["arr_1"].tolist() == [0, 1]
    with pytest.raises(UserError, match="'women' is not a class of this model: female, male"):
        sample.main(["run", "--labels", "women"])

    with pytest.raises(UserError, match="--celeba-attribute Smiling differs .* checkpoint's Male"):
        train("--resume", "--out", "run", "--celeba-attribute", "Smiling")
    assert train("--resume", "--out", "run", "--celeba-attribute", "Male") == 0
    assert load_checkpoint("run/step_0000003.pt")["class_names"] == ["female", "male"]


def test_another_attribute_is_recorded_and_resumed(train, faces):
    train(*flags(faces, "--steps", 2, "--stop-after", 1, "--celeba-attribute", "Wearing_Hat",
                 "--out", "run"))
    assert train("--resume", "--out", "run") == 0
    state = load_checkpoint("run/step_0000002.pt")
    assert state["class_names"] == ["not Wearing_Hat", "Wearing_Hat"]
    assert state["config"]["recipe"]["celeba_attribute"] == "Wearing_Hat"
    label = "not Wearing_Hat"
    assert sample.main(["run", "--labels", label, "--steps", "1", "--npz", "x.npz"]) == 0


def test_the_learning_rate_finder_takes_the_attribute(here, faces, monkeypatch):
    asked = []
    monkeypatch.setattr(lr_finder, "new_figure", lambda **_: None)      # needs matplotlib
    monkeypatch.setattr(lr_finder.data, "load", lambda *a, **given: asked.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lr_finder.main([str(f) for f in flags(faces, "--celeba-attribute", "Young")])
    assert asked == [{"celeba_attribute": "Young"}]


@pytest.mark.parametrize("given, words", [
    (["--dataset", "celeba", "--celeba-attribute", "smilling"], "did you mean Smiling?"),
    (["--dataset", "celeba", "--celeba-attribute", "Mal"], "did you mean Male?"),
    (["--celeba-attribute", "Male"], "--celeba-attribute does not apply to --dataset glyphs"),
])
def test_a_wrong_attribute_is_refused_before_the_data_is_loaded(train, monkeypatch, given, words):
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(UserError) as caught:
        train(*given)
    assert words in str(caught.value)


def test_a_checkpoint_is_measured_against_the_attribute_of_its_recipe(train, faces, monkeypatch,
                                                                      capsys):
    for name, value in dict(EPOCHS=1, MIN_STEPS=3, BATCH_SIZE=8).items():
        monkeypatch.setattr(rulers, name, value)
    train(*flags(faces, "--steps", 1, "--celeba-attribute", "Smiling", "--out", "run"))
    assert evaluate.main(["run", "--images", "12", "--steps", "1"]) == 0
    out, err = capsys.readouterr()
    assert "ruler-celeba-" in out and "test set of celeba" in out
    assert "other images" not in err                # the digest holds the labels and class names
    with pytest.raises(UserError, match="the model makes 3 channels, 2 classes, and glyphs has 1"):
        evaluate.main(["run", "--dataset", "glyphs"])
