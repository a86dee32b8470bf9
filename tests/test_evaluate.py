"""tools/evaluate.py: the metrics against independent formulas; the command, on small glyphs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from dit import DiT
from sample import generate, load
from support import checkpoint as checkpoints
from support import command, data
from tools import evaluate

MNIST = next((p for p in (Path(os.environ.get("MNIST_DIR", "data")), Path("data"))
              if (p / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file()), None)
CPU = torch.device("cpu")
H, STEPS = 8, 80                # side of the images of these tests, training steps of their ruler


def features(seed: int, count: int, dim: int = 12) -> torch.Tensor:
    """Correlated, off-centre, float32 as the ruler's."""
    rng, mix = np.random.default_rng(seed), np.random.default_rng(99)
    x = rng.standard_normal((count, dim)) @ mix.standard_normal((dim, dim)) + 0.3 * seed
    return torch.from_numpy(x.astype(np.float32))


# ---------------------------------------------------------------- the metrics


@pytest.mark.parametrize("count", [200, 7])         # 7 images, 12 numbers: a singular covariance
def test_frechet_is_heusels_formula_with_each_class_weighted_alike(count):
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is a development dependency")
    labels = torch.arange(300) % 3 // 2             # 200 of the first class, 100 of the second
    x, y = features(1, 300), features(2, count)
    x[labels == 1] += 1

    w = np.where(labels == 0, 1 / 200, 1 / 100)
    mean_x = (x[labels == 0].double().mean(0) + x[labels == 1].double().mean(0)).numpy() / 2
    A, B = np.cov(x.double().T, aweights=w), np.cov(y.double().T)
    root = linalg.sqrtm(A @ B + 1e-12 * np.eye(12)).real
    expected = ((mean_x - y.double().mean(0).numpy()) ** 2).sum() + np.trace(A + B - 2 * root)

    a = evaluate.moments(x, labels)
    b = evaluate.moments(y, torch.zeros(count, dtype=torch.int64))
    assert evaluate.frechet(a, b) == pytest.approx(expected, rel=1e-4 if count == 7 else 1e-8)
    assert evaluate.frechet(b, a) == pytest.approx(evaluate.frechet(a, b), rel=1e-6)
    assert 0 <= evaluate.frechet(b, b) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_precision_and_recall_are_those_of_prdc():
    prdc = pytest.importorskip("prdc", reason="prdc is a development dependency")
    samples, real = 0.8 * features(1, 1_100).double(), features(2, 1_050).double()  # two parts
    theirs = prdc.compute_prdc(real.numpy(), samples.numpy(), nearest_k=3)
    precision, recall = (evaluate.share_inside(*pair) for pair in ((samples, real),
                                                                   (real, samples)))
    assert precision == pytest.approx(theirs["precision"], abs=1e-9)
    assert recall == pytest.approx(theirs["recall"], abs=1e-9)
    assert 0.1 < recall < precision - 0.1 < 0.89


def nearest_by_loops(images: torch.Tensor, train: torch.Tensor) -> list[float]:
    return [min(((a.double() - b.double()) / 255).norm().item() for b in train) for a in images]


def test_the_nearest_training_image_in_any_part():
    rng = torch.Generator().manual_seed(0)
    train = torch.randint(256, (5_100, 1, 4, 4), dtype=torch.uint8, generator=rng)  # over one part
    images = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8, generator=rng)
    images[2] = train[5_050]
    found = evaluate.nearest_distances(images, train, CPU)
    assert found.tolist() == pytest.approx(nearest_by_loops(images, train), rel=1e-12)
    assert found[2] == 0 < found[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_neighbours_on_the_gpu_are_the_cpus():
    x, y = features(1, 300).double(), features(2, 1_200).double()
    assert evaluate.share_inside(x.cuda(), y.cuda()) == evaluate.share_inside(x, y)
    images = torch.randint(256, (2, 500, 1, 28, 28), dtype=torch.uint8)
    gpu, cpu = (evaluate.nearest_distances(*images, torch.device(name)) for name in ("cuda", "cpu"))
    assert torch.equal(gpu, cpu)


def test_the_first_images_are_class_balanced():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 40)
    order = evaluate.class_balanced_order(labels, 0, "a")
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, evaluate.class_balanced_order(labels, 1, "a"))
    for n, counts in [(6, [2, 2, 2]), (30, [10, 10, 10]), (50, [20, 10, 20]), (100, [50, 10, 40])]:
        assert labels[order[:n]].bincount().tolist() == counts


def test_a_row_and_the_baseline(capsys):
    """Accuracy and nearest by hand."""
    def made(seed: int, count: int) -> evaluate.Features:
        rng = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 2
        return evaluate.Features(
            torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=rng), labels,
            features(seed, count), labels * (torch.arange(count) % 4 == 1))     # 1 of 4 is wrong
    x, train, test = made(1, 40), made(2, 70), made(3, 30)
    x.features[:] *= 0.05                           # all in the middle: no variety
    rows = evaluate.report(x, train, test, 0, CPU)
    assert [row["images"] for row in rows.values()] == [40, 30]
    assert rows["samples"]["accuracy"] == 0.75
    assert rows["samples"]["recall"] < 0.2 < 0.8 < rows["samples"]["precision"]
    near = nearest_by_loops(test.images, train.images)
    assert rows["test"]["nearest"] == pytest.approx(np.quantile(near, 0.5))
    assert rows["test"]["nearest_q01"] == pytest.approx(np.quantile(near, 0.01))
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("samples"))
    assert line.split()[:3] == ["samples", "40", "75.00%"]


# ---------------------------------------------------------------- the ruler


def shipped() -> evaluate.Ruler:
    state = checkpoints.read_archive(evaluate.SHIPPED_RULER)
    ruler = evaluate.Ruler(1, 10)
    ruler.load_state_dict(state["weights"])
    assert state["about"]["test_accuracy"] >= 0.994
    return ruler.eval()


def test_the_ruler_that_ships_measures_as_ever():
    x = (torch.arange(4 * 784) * 7 % 256).to(torch.uint8).view(4, 1, 28, 28)
    x[1, :, :, :12], x[1, :, :, 16:], x[1, :, 4:24, 12:16] = 0, 0, 255          # a one
    x[2], x[3, :, :14] = 0, 0
    found, predicted = evaluate.extract(shipped(), x, "")
    assert predicted.tolist() == [3, 1, 1, 2] and found.shape == (4, 64)
    assert found.sum(1).tolist() == pytest.approx([102.727, 95.161, 69.772, 71.673], rel=1e-3)


@pytest.mark.skipif(MNIST is None, reason="no real MNIST in $MNIST_DIR or ./data")
def test_the_ruler_that_ships_is_found_and_reads_mnist():
    train, test = (data.load("mnist", MNIST, split=split) for split in ("train", "test"))
    ruler, _, path = evaluate.find_ruler(train, test, CPU)
    _, predicted = evaluate.extract(ruler, test.images[:1000], "")
    assert path == evaluate.SHIPPED_RULER
    assert (predicted == test.labels[:1000]).float().mean() > 0.985


def test_augmented_images_move_each_its_own_way_and_stay_black_outside():
    x = torch.full((8, 1, 28, 28), -1.0)
    x[:, :, 10:18, 10:18] = 1.0
    moved = evaluate.augment(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and moved.min() >= -1.0001 and (moved[:, :, 0] == -1).all()
    light = (moved + 1) / (moved + 1).sum((2, 3), keepdim=True)
    centre = (light * (torch.arange(28.0) - 13.5)).sum((1, 2, 3))       # in columns
    assert 1 < centre.abs().max() <= 2 and len(set(centre.tolist())) == 8
    size = (moved + 1).sum((1, 2, 3)) / (x[0] + 1).sum()
    assert 0.8 < size.min() < 0.95 and 1.05 < size.max() < 1.25


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of 40 glyphs per class, 4 of them the test split; output/ beside it."""
    root = tmp_path_factory.mktemp("evaluate")
    glyphs = data.draw_glyphs(400, seed=1)
    for i, (image, label) in enumerate(zip(glyphs.images, glyphs.labels.tolist(), strict=True)):
        folder = root / "glyphs" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "OUTPUT", root / "output")
        patch.setattr(evaluate, "MIN_STEPS", STEPS)     # in place of 300
        patch.setattr(evaluate, "BATCH_SIZE", 32)       # in place of 128
        yield root


def some(split: str, world: Path) -> data.ImageSet:
    return data.load(f"folder:{world / 'glyphs'}", image_size=H, split=split)


def npz(path: Path, images: torch.Tensor, labels: torch.Tensor) -> Path:
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    return path


def results(world: Path, *argv, at: Path | None = None) -> dict:
    """The line that a call appends to evaluations.jsonl."""
    log = (at or world / "output") / "evaluations.jsonl"
    before = log.read_text() if log.exists() else ""
    assert evaluate.main([*map(str, argv), "--dataset", f"folder:{world / 'glyphs'}"]) == 0
    text = log.read_text()
    assert text.startswith(before)
    return json.loads(text[len(before):])           # one line


def test_a_ruler_is_trained_once_and_its_features_are_not_anothers(world, tmp_path):
    train, test = some("train", world), some("test", world)
    samples = npz(tmp_path / "x.npz", test.images, test.labels)
    first = results(world, samples)["rows"]
    assert first["samples"]["accuracy"] > 0.8
    cache = world / "output" / "cache"
    (ruler,), kept = cache.glob("ruler-*.pt"), sorted(cache.glob("features-*.pt"))
    files = {path: path.stat().st_mtime_ns for path in (ruler, *kept)}
    assert len(kept) == 2 and results(world, samples)["rows"] == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files

    whole = kept[0].read_bytes()                                    # a damaged cache is replaced
    kept[0].write_bytes(whole[:len(whole) // 2] + b"!" + whole[len(whole) // 2 + 1:])
    assert results(world, samples)["rows"] == first and kept[0].read_bytes() == whole

    known = evaluate.find_ruler(train, test, CPU)[1]                # a new ruler under this name
    other, about = evaluate.train_ruler(train, test, 1, CPU, 20)
    again, _ = evaluate.train_ruler(train, test, 1, CPU, 20)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), again.parameters(),
                                                 strict=True))
    original = ruler.read_bytes()
    torch.save(dict(about=about | dict(steps=known["steps"]),
                    weights={k: w.half() if w.is_floating_point() else w
                             for k, w in other.state_dict().items()}), ruler)
    second = results(world, samples)["rows"]
    for path in cache.glob("features-*.pt"):
        path.unlink()
    assert results(world, samples)["rows"] == second != first
    assert second["samples"]["accuracy"] == about["test_accuracy"]  # as tested, as kept
    ruler.write_bytes(original)


def test_real_images_measure_as_real_ones_and_bad_ones_do_not(world, tmp_path):
    """Test images as samples, saved as RGB; then noisy training images with wrong labels."""
    train, test = some("train", world), some("test", world)
    rows = results(world, npz(tmp_path / "x.npz", test.images.expand(-1, 3, -1, -1),
                              test.labels))["rows"]
    assert rows["samples"] == pytest.approx(rows["test"], rel=1e-6)
    rng = torch.Generator().manual_seed(0)
    noisy = torch.where(torch.rand(train.images.shape, generator=rng) < 0.3, 255, train.images)
    noisy[::10] = train.images[::10]
    rows = results(world, npz(tmp_path / "y.npz", noisy, train.labels.roll(1)), "--images",
                   50)["rows"]
    assert rows["samples"]["images"] == 50 and rows["samples"]["nearest_q01"] == 0  # a copy
    assert rows["samples"]["frechet"] > 3 * rows["test"]["frechet"]
    assert rows["samples"]["accuracy"] < 0.4 < 0.8 < rows["test"]["accuracy"]
    assert rows["samples"]["recall"] < rows["test"]["recall"] - 0.1


# ---------------------------------------------------------------- the command, on a checkpoint


@pytest.fixture
def run(world, tmp_path) -> Path:
    """A run folder with an untrained DiT of the glyphs' kind."""
    torch.manual_seed(0)
    size = dict(input_size=H, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2,
                num_classes=10)
    train, ema = some("train", world), DiT(**size).state_dict()
    ema["final_layer.linear.weight"].normal_()
    config = dict(network="dit", model=size, process="ddpm", diffusion=dict(prediction="x0"),
                  data=dict(dataset=train.name, digest=train.digest()),
                  recipe=dict(dataset=f"folder:{world / 'glyphs'}", data_dir=None),
                  sampling=dict(sampler="ddim", steps=3, eta=0.0, cfg_scale=2.0))
    checkpoints.save(tmp_path / "run" / "step_0000007.pt", dict(
        step=7, config=config, class_names=train.class_names, ema=ema))
    return tmp_path / "run"


@pytest.mark.parametrize("flags, options", [
    ([], {}),
    (["--cfg-scale", "0", "--steps", "2", "--eta", "0.5", "--seed", "5", "--batch-size", "7"],
     dict(cfg_scale=0, steps=2, eta=0.5, seed=5))])
def test_a_checkpoint_measures_as_its_samples_do(world, run, tmp_path, flags, options, capfd):
    """Both in one call: 30 samples of labels 0, 1, 2 ..., and the same from sample.generate."""
    images = generate(load(run), [i % 10 for i in range(30)], **options).as_subclass(torch.Tensor)
    same = npz(tmp_path / "x.npz", data.to_uint8(images), torch.arange(30) % 10)
    of_npz = results(world, run, same, "--images", 30, *flags)
    found = json.loads((run / "evaluations.jsonl").read_text())
    assert found["rows"]["samples"] == pytest.approx(of_npz["rows"]["samples"], rel=1e-3)
    expected = dict(step=7, sampler="ddim", steps=3, eta=0.0, cfg_scale=2.0, seed=0, weights="ema")
    assert expected | options == {k: found[k] for k in expected}
    assert [row["images"] for row in found["rows"].values()] == [30, 30]    # of 40 test images
    assert "warning" not in capfd.readouterr().err


def test_another_data_set_is_reported(world, run, tmp_path, capfd):
    other = tmp_path / "glyphs"
    for i in range(10):
        (other / str(i)).mkdir(parents=True)
        for j, file in enumerate(sorted((world / "glyphs" / str(i)).iterdir())[:10]):
            Image.open(file).convert("RGB").save(other / str(i) / f"{j}.png")
    argv = [run, "--images", 10, "--steps", 1, "--dataset", f"folder:{other}"]
    assert evaluate.main([str(a) for a in argv]) == 0
    assert "trained on other images (folder:glyphs)" in capfd.readouterr().err
    (other / "0").rename(other / ".hidden")
    assert "other channels or classes" in refused(evaluate.main, *argv)


def test_what_users_get_wrong_is_one_line(world, tmp_path):
    def says(arrays: dict | bytes, *flags) -> str:
        path = tmp_path / "x.npz"
        if isinstance(arrays, bytes):
            path.write_bytes(arrays)
        else:
            np.savez(path, **arrays)
        return refused(evaluate.main, path, "--dataset", f"folder:{world / 'glyphs'}", *flags)

    images, labels = np.zeros((12, H, H, 1), np.uint8), np.arange(12) % 10
    assert "none.npz is no .npz" in refused(evaluate.main, tmp_path / "none.npz")
    assert "none.pt does not exist" in refused(evaluate.main, tmp_path / "none.pt")
    for damaged in (dict(arr_0=images), dict(arr_0=np.array([{}] * 12), arr_1=labels),
                    Path(npz(tmp_path / "y.npz", torch.zeros(12, 1, H, H), torch.zeros(12))
                         ).read_bytes()[:-40], dict(arr_0=images / 1.0, arr_1=labels),
                    dict(arr_0=images[:, 1:], arr_1=labels), dict(arr_0=images, arr_1=labels[:5])):
        assert "is no .npz with square images" in says(damaged)
    for wrong in (np.arange(12), labels - 1, labels + 0.5):
        assert "no integer below 10" in says(dict(arr_0=images, arr_1=wrong))
    assert "10 samples" in says(dict(arr_0=images[:9], arr_1=labels[:9]))
    coloured = np.repeat(images, 3, axis=3)
    coloured[..., 0] = 9
    assert "3 channels, and folder:glyphs has 1" in says(dict(arr_0=coloured, arr_1=labels))
    assert "--images" in says(dict(arr_0=images, arr_1=labels), "--images", "5")
