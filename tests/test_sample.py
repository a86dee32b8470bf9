"""sample.py as a command: an image's noise, what the flags mean, what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import ROOT, command, load
from diffusion import classifier_free_guidance
from support import checkpoints, paths, pictures
from support.cli import UserError, run_command
from support.data import to_uint8
from support.sampling import label_grid, parse_label, parser, save_pngs
from support.seeds import ImageNoise
from tools import evaluate

NAMES = ["cat", "3", "seven", "10"]


def run(*flags) -> int:
    return sample.main([str(f) for f in flags])


def arrays(*flags) -> tuple[np.ndarray, np.ndarray]:
    """What --npz writes."""
    path = Path(f"{len(list(Path().glob('*.npz')))}.npz")
    assert run(*flags, "--npz", path) == 0
    file = np.load(path)
    return file["arr_0"], file["arr_1"]


def printed(capsys, *flags) -> tuple[int, str, str]:
    """Exit status, standard output and standard error, as a user sees them."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: run(*flags))
    return ended.value.code, *capsys.readouterr()


@pytest.fixture
def lively(trained):
    """A checkpoint whose samples depend on the label, the weights and the guidance."""
    return trained("--steps", 30, "--lr", 0.01, "--muon-lr", 0.1)


@pytest.fixture
def short(lively):
    """The same network with a process of 40 timesteps, for DDPM's sampler, which takes them all."""
    state = load(lively)
    state["config"]["diffusion"].update(num_timesteps=40, beta_end=0.3)
    state["config"]["sampling"]["steps"] = 20
    checkpoints.save(Path("short.pt"), state)
    return Path("short.pt")


# ---------------------------------------------------------------- noise


def test_the_noise_of_an_image_depends_on_seed_and_place_alone():
    whole = ImageNoise(0, 0, 100, (1, 4, 4))("T")
    assert whole.shape == (100, 1, 4, 4)
    for first, last in [(0, 1), (15, 17), (16, 32), (37, 99)]:
        assert torch.equal(ImageNoise(0, first, last, (1, 4, 4))("T"), whole[first:last])
    others = [ImageNoise(1, 0, 100, (1, 4, 4))("T"), ImageNoise(0, 0, 100, (1, 4, 4))(5),
              ImageNoise(0, 0, 100, (1, 4, 4))(6), whole]
    flat = torch.cat(others).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 400            # no two images share their noise
    assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05


@pytest.mark.parametrize("flags", [
    ("--steps", 5), ("--steps", 5, "--eta", 1), ("--sampler", "ddpm"),
    ("--steps", 5, "--sampler", "dpm++")])
def test_an_image_is_the_same_whatever_the_batch_size_and_the_rest_of_the_grid(short, flags):
    base = (short, "--seed", 4, *flags)
    images, labels = arrays(*base, "--labels", 3, 7, 1, "--per-class", 3)
    assert labels.tolist() == [3, 3, 3, 7, 7, 7, 1, 1, 1]
    split, _ = arrays(*base, "--labels", 3, 7, 1, "--per-class", 3, "--batch-size", 2)
    fewer, _ = arrays(*base, "--labels", 3, "--per-class", 3)
    for other in (split, fewer):
        assert np.abs(images[:len(other)].astype(int) - other).max() <= 1
    assert np.abs(images[:3].astype(int) - images[3:6]).max() > 1
    elsewhere, _ = arrays(short, "--seed", 5, *flags, "--labels", 3, "--per-class", 3)
    assert np.abs(images[:3].astype(int) - elsewhere).max() > 1


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("text, index", [
    ("cat", 0), ("3", 1),           # an exact name first, although index 3 exists
    ("seven", 2), ("three", 1), ("THREE", 1), ("ten", None), ("10", 3), ("0", 0), ("2", 2),
    ("4", None), ("-1", None), ("dog", None), ("", None), ("²", None), ("1\n", None),
    ("1" * 5000, None),
])
def test_labels_are_names_then_number_words_then_indices(text, index):
    if index is None:
        with pytest.raises(UserError, match="is not a class of this model"):
            parse_label(text, NAMES)
    else:
        assert parse_label(text, NAMES) == index


def test_names_from_files_are_printed_safely(checkpoint, capsys):
    """Class names and file names may hold escape sequences: none reaches the terminal."""
    state = load(checkpoint)
    state["class_names"][0] = "\x1b[2Jevil\n"
    checkpoints.save(Path("a\x1b[31m.pt"), state)
    for flags, status in [(("--steps", 1, "--out", "b\x1b\n.png"), 0), (("--labels", "x"), 2),
                          (("--out", "b\x1b\n.png"), 2), (("--out", "c\x9b.txt"), 2),
                          (("--\x1b[2J",), 2), (("--labels", "\x1b[2J\r"), 2)]:
        code, out, err = printed(capsys, "a\x1b[31m.pt", *flags)
        lines = (out if status == 0 else err).splitlines()
        assert code == status and len(lines) == (2 if status == 0 else 1)
        assert all(line.isprintable() for line in lines), lines
    assert "\\x1b[2Jevil\\n" in printed(capsys, "a\x1b[31m.pt", "--labels", "x")[2]
    assert "missing\\x1b.pt" in printed(capsys, "missing\x1b.pt")[2]


# ---------------------------------------------------------------- which checkpoint


def test_the_newest_run_is_taken_and_in_it_the_highest_step(trained, train, capsys):
    """Also after `cp -r`, which leaves the files of a run with times in any order."""
    for name, age in [("001-a", 10), ("002-b", 5), ("003-c", 20)]:
        trained("--steps", 6, "--save-every", 2, "--keep", 9, out=f"output/{name}")
        for i, path in enumerate(sorted(Path("output", name).glob("*.*"))):
            os.utime(path, (1e9 - age - i / 10,) * 2)           # the first step is the newest file
    assert run("--steps", 2) == 0
    out = capsys.readouterr().out
    assert "output/002-b/step_0000006.pt" in out and "output/samples-001.png" in out
    assert run("output/001-a", "--steps", 2) == 0               # a folder: its highest step
    assert "output/001-a/step_0000006.pt" in capsys.readouterr().out
    assert sample.load().path.samefile("output/002-b/step_0000006.pt")
    assert train("--resume", "--steps", 8) == 0
    assert "resuming" in (out := capsys.readouterr().out) and "002-b at step 6" in out
    assert Path("output/002-b/step_0000008.pt").is_file()


def test_without_a_run_the_checkpoint_that_ships_is_used_and_named(
        checkpoint, here, monkeypatch, capsys):
    monkeypatch.setattr(paths, "SHIPPED", here / "assets" / "mnist.pt")
    with pytest.raises(UserError, match="no checkpoint under output: train one"):
        run()
    checkpoints.save(paths.SHIPPED, checkpoints.shared(load(checkpoint)))
    assert run("--steps", 2) == 0
    assert "the checkpoint that ships, assets/mnist.pt" in capsys.readouterr().out


@pytest.mark.skipif(not (ROOT / "assets" / "mnist.pt").is_file(), reason="no checkpoint ships")
def test_the_checkpoint_that_ships_is_small_and_samples(here):
    path = ROOT / "assets" / "mnist.pt"
    assert path.stat().st_size < 8e6
    state = checkpoints.load(path)
    assert set(state) == {"format", "step", "config", "class_names", "ema"}
    assert all(w.dtype == torch.float16 for w in state["ema"].values())
    assert run("--labels", "three", "--steps", 10, "--out", "3.png") == 0


# ---------------------------------------------------------------- flags


def test_grids_have_a_row_per_label_and_are_near_square_with_one_each(checkpoint):
    def size(*flags):
        assert run(checkpoint, "--steps", 1, "--force", "--out", "x.png", "--scale", 3, *flags) == 0
        width, height = Image.open("x.png").size
        return (width - 2) / (3 * 28 + 2), (height - 2) / (3 * 28 + 2)

    assert size() == (10, 10)
    assert size("--per-class", 3) == (3, 10)
    assert size("--labels", 3, 1, "four", "seven") == (2, 2)
    assert size("--labels", 3, 1, 4, 7, 9) == (3, 2)
    assert size("--labels", 3, 1, "--per-class", 5) == (5, 2)


def test_small_images_are_enlarged_unless_scale_says_otherwise(checkpoint):
    widths = []
    for flags in [(), ("--scale", 1), ("--scale", 5)]:
        run(checkpoint, "--steps", 1, "--labels", 3, "--force", "--out", "x.png", *flags)
        widths.append(Image.open("x.png").width)
    assert widths[0] > 60 and widths[1:] == [28 + 4, 5 * 28 + 4]


def test_several_guidances_make_a_titled_panel_each(lively):
    flags = (lively, "--steps", 3, "--labels", 1, 2, 3, 4)
    run(*flags, "--cfg-scale", 0, 1, 4, "--out", "three.png")
    panels = []
    for scale in (0, 1, 4):
        images = torch.from_numpy(arrays(*flags, "--cfg-scale", scale)[0]).permute(0, 3, 1, 2)
        panels.append(pictures.grid(images, 2, f"guidance {scale}"))
    assert np.array_equal(Image.open("three.png"), pictures.side_by_side(panels))
    parts = [np.asarray(panel)[20:].tobytes() for panel in panels]      # below the title
    assert len(set(parts)) == 3


def test_a_checkpoint_may_stand_behind_a_list_of_values(lively, capsys):
    """`--labels 3 1 CKPT` and `--cfg-scale 1 2 CKPT`: a file is taken for what it is; a folder,
    which could be a label, is not, and the message says what to do."""
    code, out, _ = printed(capsys, "--steps", 2, "--out", "a.png", "--labels", 3, 1, lively)
    assert code == 0 and "step 30" in out and "2 images" in out
    code, out, _ = printed(capsys, "--out", "b.png", "--steps", 2, "--cfg-scale", 1, 2,
                           "run/step_0000030.pt")
    assert code == 0 and "guidance 1 2," in out and "100 images" in out
    for flag in ("--labels", "--cfg-scale"):
        code, _, err = printed(capsys, flag, 1, 2, "run")
        assert code == 2 and "run" in err and "a checkpoint goes before the flags" in err
    code, _, err = printed(capsys, "--cfg-scale", 1, "x")
    assert code == 2 and "before the flags" not in err


def test_sampler_steps_eta_weights_and_seed_change_the_images(short):
    base = (short, "--labels", 3, "--per-class", 4)
    seen = [arrays(*base, *flags)[0] for flags in [
        (), ("--steps", 5), ("--steps", 5, "--eta", 0.5), ("--sampler", "ddpm"),
        ("--weights", "model"), ("--seed", 1), ("--cfg-scale", 1)]]
    assert len({a.tobytes() for a in seen}) == len(seen)
    assert np.array_equal(arrays(*base, "--device", "cpu", "--sampler", "ddim")[0], seen[0])


def test_the_checkpoint_says_how_it_wants_to_be_sampled(lively):
    config = load(lively)["config"]["sampling"]
    base = (lively, "--labels", 3)
    explicit = arrays(*base, "--sampler", config["sampler"], "--steps", config["steps"], "--eta",
                      config["eta"], "--cfg-scale", config["cfg_scale"])
    assert np.array_equal(arrays(*base)[0], explicit[0])


def test_arrays_are_those_of_the_published_evaluation_suites(checkpoint):
    images, labels = arrays(checkpoint, "--steps", 1, "--labels", 5, 0, "--per-class", 2)
    assert images.shape == (4, 28, 28, 1) and images.dtype == np.uint8
    assert labels.tolist() == [5, 5, 0, 0]
    assert not Path("output").exists()                      # --npz alone draws no grid
    run(checkpoint, "--steps", 1, "--labels", 5, 0, "--per-class", 2, "--npz", "b.npz", "--out",
        "b.png", "--scale", 2)
    top_left = np.asarray(Image.open("b.png"))[2:58:2, 2:58:2, 0]
    assert np.array_equal(top_left, images[0, :, :, 0])


def test_random_labels_are_a_function_of_the_seed_and_are_printed_as_a_grid(checkpoint, capsys):
    state = load(checkpoint)
    state["class_names"][7] = "seven"
    checkpoints.save(Path("named.pt"), state)
    base = ("named.pt", "--steps", 1, "--cfg-scale", 1)
    _, labels = arrays(*base, "--random-labels", 64)
    assert len(labels) == 64 and set(labels) == set(range(10))
    assert len(capsys.readouterr().out.splitlines()) == 2       # no picture, no grid of words
    _, more = arrays(*base, "--random-labels", 200)
    assert more[:64].tolist() == labels.tolist()                # image k has its label
    _, other = arrays(*base, "--random-labels", 64, "--seed", 1)
    assert other.tolist() != labels.tolist()

    images, _ = arrays(*base, "--random-labels", 7, "--out", "a.png", "--scale", 1)
    lines = capsys.readouterr().out.splitlines()
    words = [state["class_names"][i] for i in labels[:7]]
    assert [line.split() for line in lines[-5:-2]] == [words[:3], words[3:6], words[6:]]
    starts = {line.find(word) for line, row in zip(lines[-5:-3], (words[:3], words[3:6]),
                                                   strict=True) for word in row[:1]}
    assert starts == {0} and Image.open("a.png").size == (3 * 30 + 2, 3 * 30 + 2)
    again, _ = arrays(*base, "--labels", *labels[:7])           # the noise is that of --labels
    assert np.array_equal(images, again)


def test_the_grid_of_words_has_columns():
    names = ["a", "three", "\x1b[2J" + "x" * 50]
    assert label_grid(torch.tensor([0, 1, 1, 0]), 2, names) == ["a     three", "three a"]
    assert all(len(word) == 40 for word in label_grid(torch.tensor([2, 2]), 1, names))


def test_a_png_for_each_image(checkpoint, capsys):
    state = load(checkpoint)
    state["class_names"][7] = "seven/of nine"
    checkpoints.save(Path("named.pt"), state)
    flags = ("named.pt", "--steps", 1, "--labels", 3, 7, "--per-class", 2)
    images, labels = arrays(*flags, "--png-dir", "new/pngs")
    assert "written: new/pngs" in capsys.readouterr().out and not Path("output").exists()
    found = sorted(Path("new/pngs").iterdir())
    assert [p.name for p in found] == ["00000-3.png", "00001-3.png", "00002-seven-of-nine.png",
                                       "00003-seven-of-nine.png"]
    for path, image in zip(found, images, strict=True):
        assert np.array_equal(Image.open(path), image[..., 0])  # grey, at its own size
    measured, _ = evaluate.read_folder(Path("new/pngs"), state["class_names"])
    assert np.array_equal(measured[:, :1].permute(0, 2, 3, 1), images)

    with pytest.raises(UserError, match="new/pngs is not empty: --force writes into it"):
        run(*flags, "--png-dir", "new/pngs")
    before = found[0].read_bytes()
    assert run(*flags, "--png-dir", "new/pngs", "--seed", 1, "--force") == 0
    assert found[0].read_bytes() != before and len(list(Path("new/pngs").iterdir())) == 4
    Path("empty").mkdir()
    assert run(*flags, "--png-dir", "empty", "--out", "a.png") == 0 and Path("a.png").is_file()


def test_colour_images_are_colour_pngs(here):
    images = torch.arange(2 * 3 * 4).view(2, 3, 2, 2).to(torch.uint8)
    save_pngs(Path("x"), images, torch.tensor([1, 0]), ["a", "b"])
    assert np.array_equal(Image.open("x/00000-b.png"), images[0].permute(1, 2, 0))
    assert Image.open("x/00001-a.png").mode == "RGB"


def test_arrays_may_hold_more_images_than_a_picture(checkpoint):
    images, labels = arrays(checkpoint, "--steps", 1, "--labels", 5, "--per-class", 10_001,
                            "--cfg-scale", 1)
    assert len(images) == len(labels) == 10_001


def test_a_gif_moves_from_noise_to_the_sample(lively, short):
    run(lively, "--labels", 3, 1, "--steps", 6, "--batch-size", 1, "--gif", "a.gif",
        "--out", "a.png")
    film, last = Image.open("a.gif"), Image.open("a.png")
    assert film.n_frames == 6 and film.size == last.size
    film.seek(5)
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - np.asarray(last)).mean() < 4
    film.seek(0)
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - np.asarray(last)).mean() > 20
    run(short, "--sampler", "ddpm", "--labels", 3, "--gif", "b.gif")
    assert Image.open("b.gif").n_frames == 24


def test_a_strip_shows_xt_over_x0_hat_of_the_first_image(lively):
    """Where the sampler itself, called here, went."""
    run(lively, "--labels", 3, 1, "--steps", 20, "--batch-size", 1, "--trajectory", "t.png",
        "--cfg-scale", 2, "--precision", "fp32")
    model, process = checkpoints.build(checkpoints.load(lively))
    xt, frames = ImageNoise(0, 0, 1, (1, 28, 28))("T"), []
    predict = classifier_free_guidance(model, torch.tensor([3]), 2.0)
    for t, then, x0_hat in process.ddim_sample(predict, xt, steps=20):
        frames.append((t, to_uint8(xt[0]), to_uint8(x0_hat[0])))
        xt = then
    strip, expected = Image.open("t.png"), pictures.trajectory_strip(frames)
    assert strip.size == expected.size
    assert np.abs(np.asarray(strip).astype(int) - np.asarray(expected)).max() <= 1


def test_scale_is_that_of_every_picture(checkpoint):
    for scale in (1, 3):
        run(checkpoint, "--labels", 3, "--steps", 2, "--scale", scale, "--out", f"o{scale}.png",
            "--gif", f"g{scale}.gif", "--trajectory", f"t{scale}.png")
    for small, large in [("o1.png", "o3.png"), ("g1.gif", "g3.gif"), ("t1.png", "t3.png")]:
        assert Image.open(small).height < Image.open(large).height


def test_a_default_name_that_cannot_be_written_is_refused_before_the_work(checkpoint, monkeypatch):
    Path("output").write_text("a file")
    monkeypatch.setattr(sample, "sample", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(UserError, match="samples-001.png cannot be written"):
        run(checkpoint, "--labels", 3, "--steps", 1)


def test_default_names_are_numbered_and_nothing_is_overwritten(checkpoint):
    for _ in range(2):
        run(checkpoint, "--steps", 1)
    names = sorted(p.name for p in Path("output").iterdir())
    assert names == ["samples-001.png", "samples-002.png"]
    for flag, name in [("--out", "x.png"), ("--gif", "x.gif"), ("--npz", "x.npz"),
                       ("--trajectory", "y.png")]:
        Path(name).write_text("precious")
        with pytest.raises(UserError, match=f"{name} exists: --force"):
            run(checkpoint, "--steps", 1, flag, name)
        assert Path(name).read_text() == "precious"
        assert run(checkpoint, "--steps", 1, flag, name, "--force") == 0
        assert Path(name).read_bytes() != b"precious"


@pytest.mark.parametrize("flags, words", [
    (["--labels", "eleven"], ["eleven", "0, 1, 2"]),
    (["--labels", "10"], ["10"]),
    (["--sampler", "ddpm", "--steps", "50"], ["all 1000", "--sampler ddim --eta 1 --steps 50"]),
    (["--sampler", "ddpm", "--eta", "1"], ["--eta"]),
    (["--steps", "1001"], ["1001", "1000"]),
    (["--steps", "0"], ["--steps", "at least 1"]),
    (["--per-class", "0"], ["--per-class", "at least 1"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--eta", "2"], ["--eta"]),
    (["--cfg-scale", "nan"], ["--cfg-scale"]),
    (["--cfg-scale", "1", "2", "--npz", "n.npz"], ["--npz", "one --cfg-scale"]),
    (["--out", "grid.jpg"], ["grid.jpg", ".png"]),
    (["--gif", "a.png"], ["a.png", ".gif"]),
    (["--npz", "a.npy"], ["a.npy", ".npz"]),
    (["--out", "run"], ["run", ".png"]),
    (["--out", "file/x.png"], ["file/x.png"]),
    (["--device", "tpu"], ["--device tpu"]),
    (["--lables", "3"], ["--lables", "--labels"]),
    (["--sampler", "euler"], ["--sampler euler", "ddim, ddpm"]),
    (["--scale", "0"], ["--scale", "at least 1"]),
    (["--seed", "-1"], ["--seed"]),
    (["--seed", "9" * 30], ["--seed", "at most"]),
    (["--per-class", "1000000000000"], ["--per-class", "at most 100,000"]),
    (["--per-class", "5000"], ["50,000 images", "one picture", "--npz"]),
    (["--per-class", "5000", "--npz", "n.npz", "--out", "n.png"], ["50,000", "10,000"]),
    (["--random-labels", "0"], ["--random-labels", "at least 1"]),
    (["--random-labels", "20000"], ["20,000 images", "one picture", "--png-dir"]),
    (["--random-labels", "5", "--labels", "3"], ["--random-labels and --labels"]),
    (["--random-labels", "5", "--per-class", "3"], ["--random-labels and --per-class"]),
    (["--png-dir", "file"], ["file"]),
    (["--png-dir", "file/x"], ["file/x"]),
    (["--png-dir", "."], [". is not empty", "--force"]),
    (["--png-dir", "new", "--cfg-scale", "1", "2"], ["--png-dir take one --cfg-scale"]),
    (["--batch-size", "1000000000"], ["--batch-size", "at most 65,536"]),
    (["--out", "s.png", "--trajectory", "./s.png"], ["--out and --trajectory", "s.png"]),
    (["--npz", "n.npz", "--scale", "2"], ["--scale is for pictures"]),
    (["--out", ""], [".png"]),
    (["--npz", "x/"], [".npz"]),
    (["--out", "x" * 300 + ".png"], ["255 bytes"]),
    (["--out", "new/" + "x" * 300 + ".png"], ["255 bytes"]),
])
def test_a_mistake_is_one_line_and_writes_nothing(checkpoint, flags, words, tmp_path):
    Path("file").write_text("")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        run(checkpoint, *flags)
    message = str(caught.value)
    assert caught.value.status == 2 and "\n" not in message
    assert all(word in message for word in words), message
    assert set(tmp_path.rglob("*")) == before


def test_a_shared_checkpoint_has_the_ema_alone_and_names_no_path(checkpoint, tmp_path):
    state = load(checkpoint)
    state["config"]["recipe"]["data_dir"] = str(tmp_path)
    state["config"]["recipe"]["dataset"] = f"folder:{tmp_path}"
    checkpoints.save(Path("shared.pt"), checkpoints.shared(state))
    assert str(tmp_path) not in str(checkpoints.load(Path("shared.pt"))["config"])
    assert run("shared.pt", "--steps", 1) == 0
    with pytest.raises(UserError, match="no 'model' weights"):
        run("shared.pt", "--weights", "model")


def test_files_that_are_no_checkpoint(checkpoint):
    Path("notes.pt").write_text("hello")
    for name in ("notes.pt", "missing.pt", "x" * 300):
        with pytest.raises(UserError, match=name):
            run(name)
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty holds no checkpoint"):
        run("empty")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_folder_that_takes_no_files_is_found_before_any_work(checkpoint):
    with pytest.raises(UserError, match="no write access to /proc"):
        run(checkpoint, "--out", "/proc/x.png")


def test_a_file_name_as_long_as_the_disk_allows(checkpoint):
    name = "x" * 251 + ".png"
    assert run(checkpoint, "--steps", 1, "--out", name) == 0 and Path(name).is_file()


def test_untrained_checkpoints_are_passed_over_or_said_to_be(trained, capsys):
    for name in ("mine", "later"):
        trained("--steps", 2, "--keep", 9, out=f"output/{name}")
    Path("output/later/step_0000002.pt").unlink()               # killed before it was saved
    run("--steps", 1, "--out", "a.png")
    assert "output/mine/step_0000002.pt: step 2," in capsys.readouterr().out
    run("output/later", "--steps", 1, "--out", "b.png")
    assert "step 0 (untrained)," in capsys.readouterr().out


def test_bf16_is_another_number_format_and_not_another_picture(here, tmp_path):
    checkpoint = sample.load(paths.SHIPPED, "cpu")
    fp32, bf16 = (sample.generate(checkpoint, [3, 8], steps=10, precision=p)
                  for p in ("fp32", "bf16"))
    assert bf16.dtype == torch.float32 and not torch.equal(fp32, bf16)
    assert (fp32 - bf16).abs().mean() < 0.02
    sample.main([str(paths.SHIPPED), "--labels", "3", "8", "--steps", "10", "--precision", "bf16",
                 "--npz", "bf16.npz"])
    npz = torch.from_numpy(np.load("bf16.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(npz, to_uint8(bf16.as_subclass(torch.Tensor)))


def test_the_command_exits_with_2_and_one_line(tmp_path):
    process = command("sample.py", "missing.pt", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: missing.pt")


def test_every_flag_is_in_a_test():
    text = "".join((ROOT / "tests" / name).read_text() for name in (
        "test_sample.py", "test_sampling.py"))
    for action in parser("")._actions:
        assert action.dest in ("help", "checkpoint") or f'"{action.option_strings[-1]}"' in text
