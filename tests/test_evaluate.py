"""tools/evaluate.py and tools/ruler.py: the metrics against independent code; the command."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit import DiT
from support import checkpoints, data, paths
from support.cli import UserError
from tools import evaluate, export
from tools import ruler as rulers

MNIST = next((p for p in (Path(os.environ.get("MNIST_DIR", "data")), Path("data"))
              if (p / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file()), None)
H = 16                          # side of the images of these tests
needs_mnist = pytest.mark.skipif(MNIST is None, reason="no real MNIST in $MNIST_DIR or ./data")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def features(seed: int, count: int, dim: int = 12) -> np.ndarray:
    """Correlated, off-centre, float32 as the ruler's."""
    x = normal(seed, count, dim) @ normal(99, dim, dim) + 0.3 * seed
    return x.astype(np.float32)


# ---------------------------------------------------------------- Frechet distance


def test_frechet_of_diagonal_gaussians():
    """Where the covariances commute: |m_a - m_b|^2 + sum of (sd_a - sd_b)^2."""
    a, b = np.abs(normal(0, 5)) + 0.1, np.abs(normal(1, 5)) + 0.1
    mean = normal(2, 5)
    found = rulers.frechet((np.zeros(5), np.diag(a**2)), (mean, np.diag(b**2)))
    assert found == pytest.approx((mean**2).sum() + ((a - b) ** 2).sum(), rel=1e-12)


def test_frechet_of_gaussians_that_do_not_commute():
    """In two dimensions tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2)."""
    A, B = (x @ x.T for x in (normal(3, 2, 2), normal(4, 2, 2)))
    assert not np.allclose(A @ B, B @ A)
    root = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
    found = rulers.frechet((np.zeros(2), A), (np.array([1.0, -2.0]), B))
    assert found == pytest.approx(5 + np.trace(A) + np.trace(B) - 2 * root, rel=1e-10)


def test_frechet_is_zero_to_itself_also_with_too_few_images():
    few = rulers.moments(features(1, 7))                    # 7 images, 12 numbers: singular
    assert 0 <= rulers.frechet(few, few) < 1e-4
    many = rulers.moments(features(1, 100))
    assert rulers.frechet(few, many) == pytest.approx(rulers.frechet(many, few), rel=1e-6)


def test_frechet_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is a development dependency")
    (m_a, A), (m_b, B) = rulers.moments(features(1, 300)), rulers.moments(features(2, 200))
    found = rulers.frechet((m_a, A), (m_b, B))
    root = linalg.sqrtm(A @ B).real
    assert found == pytest.approx(((m_a - m_b) ** 2).sum() + np.trace(A + B - 2 * root), rel=1e-8)


@pytest.mark.long               # its import takes seconds
def test_frechet_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    a, b = rulers.moments(features(1, 300)), rulers.moments(features(2, 200))
    theirs = fid._compute_fid(*map(torch.from_numpy, (*a, *b)))
    assert rulers.frechet(a, b) == pytest.approx(float(theirs), rel=1e-8)


# ---------------------------------------------------------------- neighbours


def by_loops(samples: np.ndarray, real: np.ndarray, k: int, k_naeem: int) -> dict:
    """The papers' definitions, word for word."""
    def dist(a, b):
        return np.sqrt(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum())

    def radius(x, i, k):
        return sorted(dist(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

    def share_inside(x, y, k):                      # of x, within a ball of y
        r = [radius(y, j, k) for j in range(len(y))]
        return np.mean([any(dist(a, b) <= r[j] for j, b in enumerate(y)) for a in x])

    r = [radius(real, i, k_naeem) for i in range(len(real))]
    inside = np.array([[dist(a, s) <= r[i] for s in samples] for i, a in enumerate(real)])
    return dict(precision=share_inside(samples, real, k), recall=share_inside(real, samples, k),
                density=inside.sum() / (k_naeem * len(samples)), coverage=inside.any(axis=1).mean())


def test_neighbour_metrics_agree_with_loops(monkeypatch):
    parts = rulers._distances                       # several parts, the last one smaller
    monkeypatch.setattr(rulers, "_distances", lambda a, b: parts(a, b, rows=13))
    samples, real = normal(1, 40, 3).astype(np.float32) + 1, normal(2, 30, 3).astype(np.float32)
    found = rulers.neighbour_metrics(samples, real, k=3, k_naeem=5)
    assert found == pytest.approx(by_loops(samples, real, 3, 5), rel=1e-12)
    assert len(set(found.values())) == 4 and 0 < found["precision"] < 1 and 0 < found["recall"] < 1


@pytest.mark.filterwarnings("ignore")
def test_neighbour_metrics_agree_with_prdc():
    prdc = pytest.importorskip("prdc", reason="prdc is a development dependency")
    samples, real = features(1, 200), features(2, 300)
    for k in (3, 5):
        theirs = prdc.compute_prdc(real.astype(np.float64), samples.astype(np.float64), nearest_k=k)
        assert rulers.neighbour_metrics(samples, real, k, k) == pytest.approx(theirs, rel=1e-9)


def test_mode_collapse_costs_recall_and_noise_costs_precision():
    real, other = features(1, 400), features(1, 800)[400:]
    good = rulers.neighbour_metrics(other, real)
    collapsed = rulers.neighbour_metrics(other[:1] + 0.01 * features(3, 400), real)
    noisy = rulers.neighbour_metrics(other + 20 * features(3, 400), real)
    assert collapsed["recall"] < 0.1 < 0.6 < good["recall"]
    assert noisy["precision"] < 0.1 < 0.6 < good["precision"]


def test_nearest_distances_agree_with_loops():
    rng = torch.Generator().manual_seed(0)
    train = torch.randint(256, (5_100, 1, 4, 4), dtype=torch.uint8, generator=rng)  # over one part
    images = torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8, generator=rng)
    images[2] = train[5_050]
    found = rulers.nearest_distances(images, train)
    loops = [min(((a.double() - b.double()) / 255).norm().item() for b in train) for a in images]
    assert found == pytest.approx(loops, rel=1e-12) and found[2] == 0 and found[0] > 0


# ---------------------------------------------------------------- the ruler


def test_the_ruler_that_ships():
    assert rulers.SHIPPED.stat().st_size < 1_000_000
    ruler, about = rulers.load(rulers.SHIPPED, torch.device("cpu"))
    assert about["test_accuracy"] >= 0.994 and about["dataset"] == "mnist" and not ruler.training
    features, predicted = rulers.extract(ruler, torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    assert features.shape == (3, 64) and features.dtype == np.float32 and predicted.shape == (3,)


@needs_mnist
def test_the_ruler_that_ships_reads_mnist():
    train, test = (data.load("mnist", MNIST, split=split) for split in ("train", "test"))
    ruler, _, path = rulers.find(train, test, torch.device("cpu"))
    assert path == rulers.SHIPPED
    _, predicted = rulers.extract(ruler, test.images[:2000])
    assert (predicted == test.labels[:2000].numpy()).mean() >= 0.99


def test_augment_moves_and_leaves_the_border_black():
    x = torch.full((8, 1, 28, 28), -1.0)
    x[:, :, 10:18, 10:18] = 1.0
    moved = rulers.augment(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and moved.min() >= -1.0001 and (moved[:, :, 0] == -1).all()
    light = (moved + 1) / (moved + 1).sum((2, 3), keepdim=True)
    centre = (light * (torch.arange(28.0) - 13.5)).sum((1, 2, 3))       # in columns, each its own
    assert 1 < centre.abs().max() <= 2 and len(set(centre.tolist())) == 8


# ---------------------------------------------------------------- the command, on small glyphs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set of 40 glyphs per class in a folder, 4 of them the test split; its ruler."""
    root = tmp_path_factory.mktemp("evaluate")
    glyphs = data.draw_glyphs(400, seed=1)
    for i, (image, label) in enumerate(zip(glyphs.images, glyphs.labels.tolist(), strict=True)):
        folder = root / "glyphs" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", root / "output")
        for name, value in dict(EPOCHS=1, MIN_STEPS=60, BATCH_SIZE=32).items():
            patch.setattr(rulers, name, value)
        assert evaluate.main(["--train-ruler", *of(root)]) == 0
        yield root


def of(root: Path) -> list[str]:
    return ["--dataset", f"folder:{root / 'glyphs'}", "--data-dir", str(root / "data"),
            "--image-size", str(H), "--device", "cpu"]


def some(split: str, root: Path) -> data.ImageSet:
    return data.load(f"folder:{root / 'glyphs'}", image_size=H, split=split)


def npz(path: Path, images: torch.Tensor, labels=None) -> str:
    arrays = [images.permute(0, 2, 3, 1).numpy()] + ([] if labels is None else [labels.numpy()])
    np.savez(path, *arrays)
    return str(path)


def run(tmp_path: Path, *argv: str) -> dict:
    """The report of one call."""
    out = tmp_path / f"{len(list(tmp_path.iterdir())):03d}.json"
    assert evaluate.main([*argv, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    return {k: v for k, v in found.items() if k not in ("time", "seconds_sampling")}


def test_an_npz_of_real_images(world, tmp_path, capsys):
    glyphs = some("test", world)
    file = npz(tmp_path / "x.npz", glyphs.images, glyphs.labels)
    found = run(tmp_path, file, *of(world))
    samples, test = (found["rows"][name]["mean"] for name in ("samples", "test"))
    assert samples["accuracy"] == test["accuracy"] > 0.7        # the same 40 images
    assert samples["frechet"] == pytest.approx(test["frechet"], rel=1e-6)
    assert found["ruler_test_accuracy"] == pytest.approx(samples["accuracy"])
    per_class = found["rows"]["samples"]["seeds"][0]["accuracy_per_class"]
    assert np.mean(list(per_class.values())) == pytest.approx(samples["accuracy"])
    assert [r["images"] for r in found["frechet_by_images"]] == [10, 20, 40]
    assert found["frechet_by_images"][-1]["samples"] == pytest.approx(samples["frechet"])
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("samples"))
    assert f"{samples['accuracy']:.2%}" in row and f"{samples['frechet']:.2f}" in row
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_the_same_call_finds_the_same(world, tmp_path):
    glyphs = some("train", world)
    file = npz(tmp_path / "x.npz", glyphs.images, glyphs.labels)
    first, again, other = (run(tmp_path, file, *of(world), "--images", "60", "--seed", seed)
                           for seed in ("0", "0", "1"))
    assert first == again
    assert first["rows"]["samples"]["mean"] != other["rows"]["samples"]["mean"]
    assert first["rows"]["test"]["images"] == 40 and first["rows"]["train"]["images"] == 60


def test_the_class_balanced_order():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 40)
    order = evaluate.class_balanced_order(100, labels, 0, "a")
    assert sorted(order) == list(range(100))
    assert (order != evaluate.class_balanced_order(100, labels, 1, "a")).any()
    for n, counts in [(6, [2, 2, 2]), (30, [10, 10, 10]), (50, [20, 10, 20]), (100, [50, 10, 40])]:
        assert np.bincount(labels[order[:n]]).tolist() == counts
    assert sorted(evaluate.class_balanced_order(100, None, 0, "a")) == list(range(100))


def test_unequal_class_counts_cost_no_distance():
    """Balanced moments are those of a set in which the rarer class is there twice."""
    rare, common = features(1, 30), features(2, 60) + 1
    def of_classes(*parts):
        labels = np.repeat([0, 1], [len(p) for p in parts])
        images = torch.zeros(len(labels), 1, 1, 1)
        return evaluate.Features(images, labels, np.concatenate(parts), labels)
    unequal, equal = of_classes(rare, common), of_classes(np.concatenate([rare, rare]), common)
    assert evaluate.frechet(unequal, equal, True) < 0.02 < 0.1 < \
        evaluate.frechet(unequal, equal, False)
    mean, covariance = unequal.moments(balanced=True)
    plain = equal.moments(balanced=False)
    assert np.allclose(mean, plain[0])
    assert equal.moments(balanced=True)[1] == pytest.approx(plain[1], rel=1e-9)
    assert np.allclose(covariance, plain[1], rtol=0.02, atol=0.02 * covariance.max())


def test_one_row(monkeypatch):
    """Its numbers are those of its own images; the training set's two parts do not overlap."""
    def of_seed(seed: int, count: int):
        labels = np.arange(count) % 2
        predicted = labels * (np.arange(count) % 4 == 1)        # half of the ones taken for zeros
        images = torch.arange(count).view(-1, 1, 1, 1)
        return evaluate.Features(images, labels, features(seed, count), predicted)
    x, train, test = of_seed(1, 40), of_seed(2, 100), of_seed(3, 30)
    rows = evaluate.comparisons(x, train, test, seed=0)
    assert [len(rows[name][0]) for name in evaluate.ROWS] == [40, 30, 40]
    part, rest = (set(x.images.flatten().tolist()) for x in rows["train"])
    assert part | rest == set(range(100)) and not part & rest
    found = evaluate.measure(x, train, ["a", "b"], seed=0, balanced=True)
    assert found["accuracy_per_class"] == {"a": 1.0, "b": 0.5} and found["accuracy"] == 0.75
    assert found["guessed_per_class"] == {"a": 0.75, "b": 0.25}
    reference = train.features[evaluate.shuffled(100, 0, "reference")[:40]]
    assert found["recall"] == rulers.neighbour_metrics(x.features, reference)["recall"]
    monkeypatch.setattr(evaluate, "MAX_NEIGHBOURS", 20)
    fewer = evaluate.measure(x, train, ["a", "b"], seed=0, balanced=True)
    assert fewer["density"] == rulers.neighbour_metrics(x.features[:20], reference[:20])["density"]


def test_copies_of_training_images_show(world, tmp_path):
    train = some("train", world)
    file = npz(tmp_path / "x.npz", train.images[:40])
    near = run(tmp_path, file, *of(world))["nearest_training_image"]
    assert near["samples"]["q90"] == 0 < near["test"]["min"]


def test_bad_samples_are_farther_than_real_ones(world, tmp_path):
    glyphs = some("train", world)
    noisy = torch.where(torch.rand(glyphs.images.shape, generator=torch.Generator().manual_seed(0))
                        < 0.3, 255, glyphs.images).to(torch.uint8)
    rows = run(tmp_path, npz(tmp_path / "x.npz", noisy, glyphs.labels.roll(1)), *of(world))["rows"]
    assert rows["samples"]["mean"]["frechet"] > 3 * rows["train"]["mean"]["frechet"]
    assert rows["samples"]["mean"]["accuracy"] < 0.4 < 0.7 < rows["train"]["mean"]["accuracy"]
    assert rows["samples"]["mean"]["precision"] < rows["train"]["mean"]["precision"]


def test_grain_is_the_share_of_dark_grey_pixels(world, tmp_path, capsys):
    glyphs = some("test", world)
    images = glyphs.images.clone()
    images[:, :, :2] = torch.tensor([7, 8, 24, 25]).repeat(8).view(2, H)    # 16 of 256 pixels
    images[:, :, 2:][(images[:, :, 2:] > 7) & (images[:, :, 2:] < 25)] = 0
    rows = run(tmp_path, npz(tmp_path / "x.npz", images, glyphs.labels), *of(world))["rows"]
    assert rows["samples"]["mean"]["grain"] == 1 / 16
    real = np.mean([8 <= v <= 24 for v in glyphs.images.flatten().tolist()])
    assert rows["test"]["mean"]["grain"] == pytest.approx(real) and 0 < real < 0.05
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("recall      grain") for line in lines)
    assert next(line for line in lines if line.startswith("samples")).endswith(" 6.2%")
    assert next(line for line in lines if "test set" in line and "real:" in line).endswith(
        f" {real:.1%}")


def test_images_in_colour_have_no_grain():
    x = evaluate.Features(torch.full((30, 3, 8, 8), 9, dtype=torch.uint8), None, features(1, 30),
                          np.zeros(30, int))
    assert "grain" not in evaluate.measure(x, x, ["a"], seed=0, balanced=False)
    rows = {name: dict(images=30, std=None, mean=dict(frechet=1.0, precision=1.0, recall=1.0))
            for name in evaluate.ROWS}
    assert evaluate.table(rows)[0].endswith("recall")


# ---------------------------------------------------------------- trained on samples alone


def test_samples_that_are_the_training_set_train_as_well_as_it(world, tmp_path, capsys):
    train, test, cpu = some("train", world), some("test", world), torch.device("cpu")
    found = evaluate.train_on_samples([train.images], train.labels.numpy(), [0], train, test, 60,
                                      cpu)
    assert found["accuracy"] == found["real"] > 0.7 and found["real_images"] == 360
    file = npz(tmp_path / "x.npz", train.images, train.labels)
    capsys.readouterr()
    told = run(tmp_path, file, *of(world), "--train-on-samples")["train_on_samples"]
    assert told["real"] == found["real"] and told["accuracy"] > 0.6     # in another order
    assert [told[k] for k in ("images", "steps", "test_images")] == [360, 60, 40]
    assert (f"Trained on the 360 samples alone, a classifier reads {told['accuracy']:.2%} of the "
            f"40 real test images; trained on 360 real ones, {told['real']:.2%}."
            ) in capsys.readouterr().out


def test_samples_with_shuffled_labels_teach_nothing(world, tmp_path):
    train = some("train", world)
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
    file = npz(tmp_path / "x.npz", train.images, train.labels[order])
    told = run(tmp_path, file, *of(world), "--train-on-samples")["train_on_samples"]
    assert told["accuracy"] < 0.4 < 0.7 < told["real"]


def test_as_many_real_images_class_balanced_cached_by_seed(checkpoint, world, tmp_path,
                                                           monkeypatch, capsys):
    trained, train = [], rulers.train
    monkeypatch.setattr(rulers, "train", lambda images, test, seed, device, steps: trained.append(
        (images, seed, steps)) or train(images, test, seed, device, 3))     # not the ruler's 60
    (tmp_path / "run").mkdir()
    copy = Path(shutil.copy(checkpoint, tmp_path / "run"))
    argv = [str(copy), "--train-on-samples", "--images", "50", "--seeds", "2"]
    told = run(tmp_path, *argv)
    found = told["train_on_samples"]
    assert [each["seed"] for each in found["seeds"]] == [0, 1] and "rows" in told
    assert found["accuracy"] == np.mean([each["accuracy"] for each in found["seeds"]])
    assert found["real"] == np.mean([each["real"] for each in found["seeds"]])
    assert [(len(images.images), seed, steps) for images, seed, steps in trained] == [
        (50, seed, 60) for seed in (0, 0, 1, 1)]
    samples, real, _, other = (images for images, _, _ in trained)
    assert samples.name == "50 samples" and real.name == "50 of folder:glyphs"
    for images in (samples, real, other):
        assert torch.bincount(images.labels).tolist() == [5] * 10
    assert not torch.equal(real.images, other.images)
    copies = rulers.nearest_distances(real.images, some("train", world).images)
    assert (copies == 0).all()
    assert "real test images; trained on 50 real ones, " in capsys.readouterr().out
    line, = (copy.parent / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["train_on_samples"] == found
    cached = list((world / "output" / "cache").glob("ruler-50-of-folder-glyphs-*.pt"))
    assert len(cached) == 2 and sum("-seed1" in file.name for file in cached) == 1
    names = []

    def quick(images, test, seed, device, steps):
        names.append(images.name)
        ruler, about = train(images, test, seed, device, 3)
        return ruler, about | dict(steps=steps)

    monkeypatch.setattr(rulers, "train", quick)     # cached: of 3 steps, where 60 are asked for
    again = run(tmp_path, *argv)["train_on_samples"]
    assert names == ["50 samples", "50 of folder:glyphs"] * 2
    assert run(tmp_path, *argv)["train_on_samples"] == again and names[4:] == ["50 samples"] * 2


def test_10_000_samples_unless_told_otherwise(checkpoint, world, monkeypatch):
    counts = []
    monkeypatch.setattr(evaluate, "sample", lambda checkpoint, y, *a, **k: counts.append(
        torch.bincount(y).tolist()) or 1 / 0)
    for argv in (["--train-on-samples"], []):
        with pytest.raises(ZeroDivisionError):
            evaluate.main([str(checkpoint), *argv])
    assert counts == [[1000] * 10, [100] * 10]


def test_folders_of_pictures(world, tmp_path):
    glyphs = some("test", world)
    by_class, flat = tmp_path / "by_class", tmp_path / "flat"
    for i, (image, label) in enumerate(zip(glyphs.images, glyphs.labels.tolist(), strict=True)):
        picture = Image.fromarray(image[0].numpy()).convert("RGB")      # as most programs save
        for folder in (by_class / str(label), flat):
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{i:03d}.png")
    file = npz(tmp_path / "x.npz", glyphs.images, glyphs.labels)
    known = run(tmp_path, file, *of(world))["rows"]["samples"]["mean"]
    labelled = run(tmp_path, str(by_class), *of(world))["rows"]["samples"]["mean"]
    unlabelled = run(tmp_path, str(flat), *of(world))["rows"]["samples"]["mean"]
    assert labelled == pytest.approx(known) and "accuracy" not in unlabelled
    assert unlabelled["frechet"] == pytest.approx(known["frechet"])


def test_the_features_are_cached_under_output(world, tmp_path, monkeypatch, capsys):
    glyphs = some("test", world)
    samples = npz(tmp_path / "x.npz", glyphs.images, glyphs.labels)
    for cached in (world / "output" / "cache").glob("features-*.npz"):
        cached.unlink()
    first = run(tmp_path, samples, *of(world))
    files = sorted((world / "output" / "cache").glob("features-*.npz"))
    said = capsys.readouterr().out
    assert len(files) == 2 and all(f"{f} (0 MB, a cache" in said for f in files)
    assert not (world / "data").exists()                        # nothing beside the user's data
    whole, extracted, extract = [f.read_bytes() for f in files], [], rulers.extract
    monkeypatch.setattr(rulers, "extract", lambda ruler, images, desc:
                        extracted.append(desc) or extract(ruler, images, desc))
    assert run(tmp_path, samples, *of(world)) == first and extracted == ["features"]
    assert "a cache" not in capsys.readouterr().out
    middle = len(whole[0]) // 2
    for damaged in (whole[0][:middle], b"", whole[0][:middle] + bytes([whole[0][middle] ^ 255]) +
                    whole[0][middle + 1:]):
        files[0].write_bytes(damaged)
        del extracted[:]
        assert run(tmp_path, samples, *of(world)) == first and len(extracted) == 2
        assert files[0].read_bytes() == whole[0]
    with np.load(files[0]) as file:
        arrays = dict(file)
    for wrong in (arrays["features"] * np.nan, arrays["features"][1:]):
        np.savez(files[0], **(arrays | {"features": wrong}))
        assert run(tmp_path, samples, *of(world)) == first
    files[0].unlink()
    monkeypatch.setattr(evaluate, "atomic_write", fail)         # a full disk
    assert evaluate.main([samples, *of(world)]) == 0 and not files[0].exists()


def fail(*_):
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- the command, on a checkpoint


@pytest.fixture(scope="module")
def checkpoint(world):
    """A run's folder with an untrained DiT of the glyphs' kind."""
    torch.manual_seed(0)
    model = dict(input_size=H, patch_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=2,
                 num_classes=10)
    train = some("train", world)
    config = dict(model=model, diffusion=dict(prediction="x0"),
                  data=dict(dataset=train.name, digest=train.digest()),
                  recipe=dict(dataset=f"folder:{world / 'glyphs'}", data_dir=str(world / "data")),
                  sampling=dict(sampler="ddim", steps=3, eta=0.0, cfg_scale=2.0))
    folder = world / "output" / "001-x"
    ema = DiT(**model).state_dict()
    ema["final_layer.linear.weight"].normal_()
    checkpoints.save(folder / "step_0000007.pt", dict(
        step=7, config=config, class_names=train.class_names, ema=ema))
    return folder / "step_0000007.pt"


def test_a_checkpoint_is_sampled_and_measured(checkpoint, world, tmp_path, capfd):
    found = run(tmp_path, str(checkpoint), "--images", "30", "--seeds", "2")
    assert "warning" not in capfd.readouterr().err      # the data are those it was trained on
    assert [found[k] for k in ("step", "cfg_scale", "sampler", "steps")] == [7, 2.0, "ddim", 3]
    rows = found["rows"]
    assert found["seeds"] == [0, 1] and len(rows["samples"]["seeds"]) == 2
    pair = [r["frechet"] for r in rows["samples"]["seeds"]]
    assert rows["samples"]["mean"]["frechet"] == pytest.approx(np.mean(pair)) and pair[0] != pair[1]
    assert rows["samples"]["std"]["frechet"] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
    single = run(tmp_path, str(checkpoint.parent), "--images", "30", "--seed", "1",
                 "--batch-size", "7")
    for metric, value in single["rows"]["samples"]["mean"].items():
        assert rows["samples"]["seeds"][1][metric] == pytest.approx(value, rel=1e-4), metric
    lines = (checkpoint.parent / "evaluations.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines[-2:]]
    assert [k["seeds"] for k in kept] == [[0, 1], [1]] and kept[0]["rows"] == rows


def test_an_exported_folder_is_a_checkpoint(checkpoint, world, tmp_path):
    pytest.importorskip("safetensors")
    folder = tmp_path / "exported"
    assert export.main([str(checkpoint), str(folder), "--to", "safetensors"]) == 0
    found = run(tmp_path, str(folder), "--images", "10", "--dataset", f"folder:{world / 'glyphs'}")
    assert found["step"] == 7 and not (folder / "evaluations.jsonl").exists()


def test_samples_are_balanced_and_flags_reach_the_sampler(checkpoint, world, monkeypatch):
    calls = []

    def sample(checkpoint, y, seed, how, batch_size, bar):
        calls.append((y, seed, how, batch_size))
        yield torch.zeros(len(y), 1, H, H)

    monkeypatch.setattr(evaluate, "sample", sample)
    assert evaluate.main([str(checkpoint), "--images", "40", "--cfg-scale", "1.5", "--steps", "9",
                          "--eta", "0.5", "--batch-size", "11", "--seed", "5"]) == 0
    assert evaluate.main([str(checkpoint), "--images", "40", "--sampler", "ddpm"]) == 0
    y, seed, how, batch_size = calls[0]
    assert torch.bincount(y).tolist() == [4] * 10 and seed == 5 and batch_size == 11
    assert [how[k] for k in ("sampler", "steps", "eta", "cfg_scale")] == ["ddim", 9, 0.5, 1.5]
    assert calls[1][2]["sampler"] == "ddpm" and calls[1][2]["steps"] == 1000


def test_another_data_set_is_reported(checkpoint, world, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(rulers, "MIN_STEPS", 2)
    monkeypatch.setattr(paths, "OUTPUT", tmp_path / "output")
    other = tmp_path / "glyphs"
    for i in range(300):
        (other / str(i % 10)).mkdir(parents=True, exist_ok=True)
        (other / str(i % 10) / f"{i}.png").write_bytes(
            next((world / "glyphs" / str(i % 10)).iterdir()).read_bytes())
    argv = [str(checkpoint), "--images", "20", "--dataset", f"folder:{other}", "--data-dir",
            str(tmp_path / "data")]
    assert evaluate.main(argv) == 0
    out, err = capfd.readouterr()
    assert "trained on other images" in err and "(the ruler of folder:glyphs)" in out
    assert list((tmp_path / "output" / "cache").glob("ruler-folder-glyphs-*.pt"))
    (other / "0").rename(other / ".hidden")
    with pytest.raises(UserError, match="10 classes, and .* has 1 and 9"):
        evaluate.main(argv)


# ---------------------------------------------------------------- what users get wrong


def write(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("arrays, message", [
    (dict(images=np.zeros((12, H, H, 1), np.uint8)), "lacks arr_0, the images: it has images"),
    (dict(arr_0=np.zeros((12, H, H, 1), np.float32)), "arr_0 is float32 .* must be uint8"),
    (dict(arr_0=np.zeros((12, H, H), np.uint8)), r"arr_0 is uint8 \(12, 16, 16\), and must be"),
    (dict(arr_0=np.zeros((12, 32, 32, 1), np.uint8)), "32x32 pixels, and .* has 16x16"),
    (dict(arr_0=np.arange(12 * H * H * 3).reshape(12, H, H, 3).astype(np.uint8)), "3 channels"),
    (dict(arr_0=np.zeros((9, H, H, 1), np.uint8)), "holds 9 images, and 10 are needed"),
    (dict(arr_0=np.zeros((12, H, H, 1), np.uint8), arr_1=np.zeros(12)), "arr_1 is float64"),
    (dict(arr_0=np.zeros((12, H, H, 1), np.uint8), arr_1=np.zeros(5, int)), "label per image"),
    (dict(arr_0=np.zeros((12, H, H, 1), np.uint8), arr_1=np.arange(12)), "from 0 to 11"),
    (dict(arr_0=np.array([{}] * 12)), "no .npz file, or damaged"),
])
def test_wrong_npz(world, tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([write(tmp_path / "x.npz", **arrays), *of(world)])


def test_wrong_files(world, tmp_path):
    def says(message: str, *argv) -> None:
        with pytest.raises(UserError, match=message) as caught:
            evaluate.main([str(a) for a in argv])
        assert "\n" not in str(caught.value)

    good = write(tmp_path / "good.npz", arr_0=np.zeros((12, H, H, 1), np.uint8))
    (tmp_path / "bad.npz").write_bytes(Path(good).read_bytes()[:-40])
    says("no .npz file, or damaged", tmp_path / "bad.npz", *of(world))
    says("does not exist", tmp_path / "none.npz", "--data-dir", tmp_path)   # before any data
    (tmp_path / "empty").mkdir()
    says("holds no images", tmp_path / "empty", *of(world))
    (tmp_path / "empty" / "a.png").write_bytes(b"not a picture")
    says("a.png cannot be read as an image", tmp_path / "empty", *of(world))
    (tmp_path / "classes" / "eleven").mkdir(parents=True)
    says("'eleven' is not a class", tmp_path / "classes", *of(world))
    says("mnits.* is unknown", good, "--dataset", "mnits")
    says("unrecognized arguments: --image", good, "--image", "5")
    says("has no labels, which --train-on-samples needs", good, *of(world), "--train-on-samples")
    says("--cfg-scale is for a checkpoint", good, *of(world), "--cfg-scale", "2")
    says("--precision is for a checkpoint", good, *of(world), "--precision", "fp32")
    says("--batch-size is for a checkpoint", good, *of(world), "--batch-size", "2")
    (tmp_path / "output/001-run").mkdir(parents=True)
    (tmp_path / "output/001-run/step_0000001.pt").touch()
    says("output is a folder of runs: name one", tmp_path / "output", *of(world))
    says("ends in .json", good, *of(world), "--json", tmp_path / "x.txt")
    (tmp_path / "x.json").touch()
    says("exists: --force overwrites it", good, *of(world), "--json", tmp_path / "x.json")


def test_wrong_flags_for_a_checkpoint(checkpoint):
    for argv, message in [(["--image-size", "28"], "is for an .npz or a folder"),
                          (["--sampler", "ddpm", "--steps", "5"], "ddpm takes all 1000 steps"),
                          (["--sampler", "ddpm", "--eta", "1"], "--eta does not apply to"),
                          (["--steps", "1001"], "from 1 to 1000 are possible"),
                          (["--images", "3"], "at least 10"),
                          (["--weights", "model"], "no 'model' weights")]:
        with pytest.raises(UserError, match=message):
            evaluate.main([str(checkpoint), *argv])


def test_train_ruler_never_overwrites_and_refuses_a_poor_one(world, monkeypatch):
    (kept,) = (world / "output" / "cache").glob("ruler-folder-glyphs-*.pt")
    before = kept.read_bytes()
    with pytest.raises(UserError, match="exists: --force overwrites it"):
        evaluate.main(["--train-ruler", *of(world)])
    with pytest.raises(UserError, match="leave out the images"):
        evaluate.main(["x.npz", "--train-ruler", *of(world)])
    for flag, value in [("--cfg-scale", "2"), ("--json", "x.json"), ("--images", "20"),
                        ("--batch-size", "5"), ("--train-on-samples", None)]:
        with pytest.raises(UserError, match=f"{flag} is for the images to measure"):
            evaluate.main(["--train-ruler", flag, *[value] * (value is not None), *of(world)])
    monkeypatch.setattr(rulers, "MIN_STEPS", 2)
    monkeypatch.setattr(rulers, "EPOCHS", 0)
    monkeypatch.setitem(rulers.MIN_ACCURACY, some("train", world).name, 1.0)
    with pytest.raises(UserError, match="below the required 100.0%: nothing is written"):
        evaluate.main(["--train-ruler", "--force", *of(world)])
    assert kept.read_bytes() == before


def test_the_ruler_is_stored_rounded_and_a_damaged_one_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rulers, "MIN_STEPS", 5)
    monkeypatch.setattr(rulers, "EPOCHS", 0)
    sets = {split: some(split, world) for split in ("train", "test")}
    cpu = torch.device("cpu")
    ruler, about = rulers.train(sets["train"], sets["test"], 3, cpu)
    rulers.save(tmp_path / "ruler.pt", ruler, about)
    again, known = rulers.load(tmp_path / "ruler.pt", cpu)
    assert again.digest() == ruler.digest() and known == about  # what was tested is what is stored
    same, _ = rulers.train(sets["train"], sets["test"], 3, cpu)
    assert same.digest() == ruler.digest()                          # deterministic
    torch.save({"format": rulers.FORMAT, "about": about, "weights": {}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="is not a ruler"):
        rulers.load(tmp_path / "bad.pt", cpu)
