"""What happened to other people: public bug reports of small diffusion trainers, replayed."""

import errno
import gc
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train_mnist
from conftest import ALONE, FAST, ROOT, command, refused
from sample import generate, load
from support import checkpoint, command as command_module, compute, data
from support.classes import label_of
from support.command import UserError, atomic_write

WORDS = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]


@pytest.mark.parametrize("label, names, found", [
    ("1", [f"{i:02d}" for i in range(1, 11)], 0),               # 01, not the second folder
    (3, WORDS, 7), ("three", WORDS, 7), ("seven", [str(i) for i in range(10)], 7),
    (1, sorted(str(i) for i in range(1, 11)), 0),               # "1", although "10" is second
    (1, ["cat", "dog"], 1), ("dog", ["cat", "dog"], 1),
    ("e\u0301t\u00e9", ["\u00e9te\u0301", "hiver"], 0),         # the same word, normalised
])
def test_a_label_is_a_name_then_a_number_then_an_index(label, names, found):
    assert label_of(label, names) == found


@pytest.mark.parametrize("label, names", [("0", [str(i) for i in range(1, 11)]),
                                          ("0", WORDS[:9]), ("2", ["cat", "dog"]), (3.7, WORDS),
                                          ("7", ["07", "seven"])])
def test_a_label_without_a_class_is_refused(label, names):
    with pytest.raises(UserError, match="not a class"):
        label_of(label, names)


def test_init_from_matches_class_embeddings_by_name(train, checkpoint, here, capsys):
    for i, word in enumerate(["three", "one", "apple"]):
        (here / "own" / word).mkdir(parents=True)
        for k in range(4):
            Image.new("L", (28, 28), 40 * i + k + 1).save(here / "own" / word / f"{k}.png")
    assert train("--dataset", "folder:own", "--image-size", 28, "--init-from", checkpoint,
                 "--out", "new", "--steps", 1, "--lr", 0, "--muon-lr", 0) == 0
    key = "y_embedder.embedding_table.weight"
    before = checkpoint_weights(checkpoint)[key]
    after = checkpoint_weights(here / "new" / "step_0000001.pt")[key]
    assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[3])    # one, three
    assert torch.equal(after[3], before[10])                                        # "no class"
    assert not torch.equal(after[0], before[0])                                     # apple
    assert "initialised: apple" in capsys.readouterr().out
    assert train("--dataset", "folder:own", "--image-size", 28, "--init-from", checkpoint,
                 "--model", "DiT-Nano/7", "--out", "wide", "--steps", 1) == 0       # fits nowhere
    assert f"{key}" in capsys.readouterr().out.split("initialised: ")[1]


def test_the_classes_drawn_are_printed_in_the_order_of_their_images(here, capsys):
    for flags, classes in (("--labels 3 1 three", "3, 1, 3"), ("--labels 7 1 --per-class 2",
                           "7, 1"), ("--random-labels 3 --seed 1", None)):
        assert sample.main(["--steps", "1", "--npz", "x.npz", "--force", *flags.split()]) == 0
        drawn = ", ".join(map(str, np.load("x.npz")["arr_1"].tolist()))
        line, = [x for x in capsys.readouterr().out.splitlines() if "in this order" in x]
        assert line == f"classes, in this order: {classes or drawn}"


def own_images(folder: Path, *names: str, mode: str = "L") -> Path:
    """Small pictures of noise under these names."""
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(
            folder / name, format=None if Path(name).suffix else "PNG")
    return folder


def loaded(folder: Path) -> tuple[dict, torch.Tensor]:
    """The images of each class that are taken, and all pixels."""
    found = data.load(f"folder:{folder}", image_size=28)
    counts = found.labels.bincount(minlength=len(found.class_names)).tolist()
    return dict(zip(found.class_names, counts, strict=True)), found.images


@pytest.mark.parametrize("files, taken, said", [
    (["train/cat/a.png", "train/dog/b.png", "test/cat/c.png"], {"test": 1, "train": 2},
     "classes that hold folders alone or are named like splits: test, train."),
    (["Val/a.png", "other/b.png"], {"Val": 1, "other": 1}, "like splits: Val."),
    (["png/0/a.png", "png/1/b.png"], {"png": 2}, "like splits: png."),
    (["new/a.png", "b.png", "c.png"], {"new": 1}, "2 .png beside the class folders (left out)"),
    (["cat/a.png", "cat/more/b.png", "dog/c.png"], {"cat": 2, "dog": 1}, ""),
])
def test_the_wrong_level_of_folders_is_named(here, capsys, files, taken, said):
    assert loaded(own_images(here / "own", *files))[0] == taken
    out, err = capsys.readouterr()
    assert out == f"train images: {', '.join(f'{k} {n}' for k, n in taken.items())}\n"
    assert err.count("\n") == bool(said) and said in err


def test_what_pillow_opens_is_an_image_and_the_rest_is_counted(here, capsys):
    own = own_images(here / "own", "cat/a.png", "cat/b.gif", "cat/c.jfif", "cat/d", "cat/E.PNG",
                     "cat/@eaDir/thumb.png", "@eaDir/cat/thumb.png", "__MACOSX/cat/x.png",
                     "dog/a.png", "cat/.hidden.png")
    for name in ("x.HEIC", "y.heic", "notes"):
        (own / "cat" / name).write_bytes(b"not an image that Pillow knows")
    own_images(here / "elsewhere", "1.png", "2.png")
    (own / "dog" / "more").symlink_to(here / "elsewhere")
    (own / "dog" / "again").symlink_to(here / "elsewhere")          # each folder once
    (own / "dog" / "loop").symlink_to(own)
    (own / "emu").symlink_to(own_images(here / "third", "1.png"))
    assert loaded(own)[0] == {"cat": 5, "dog": 3, "emu": 1}
    said = f"files in {own}: 2 .heic (left out), 1 without ending (left out)\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("suffix, dtype, largest, white", [
    (".png", np.uint16, 4000, 4095), (".tif", np.int32, 255, 255), (".tif", np.float32, 0.9, 1),
    (".png", np.uint16, 65535, 65535)])
def test_deep_images_are_scaled_by_the_largest_value_of_all(here, capsys, suffix, dtype, largest,
                                                            white):
    """The second image is half as bright, and stays so."""
    (here / "own" / "scan").mkdir(parents=True)
    ramp = np.linspace(0, largest, 28 * 28).reshape(28, 28)
    for i, pixels in enumerate((ramp, ramp / 2)):
        Image.fromarray(pixels.astype(dtype)).save(here / "own" / "scan" / f"{i}{suffix}")
    images = loaded(here / "own")[1]
    for image, pixels in zip(images, (ramp, ramp / 2), strict=True):
        wanted = (pixels.astype(dtype) / white * 255).round()
        assert np.abs(image[0].numpy() - wanted).max() <= 1e-3
    assert f"2 of more than 8 bits; white is {white}\n" in capsys.readouterr().err


def test_blank_images_are_counted_and_one_is_named(here, capsys):
    own = own_images(here / "own", "ink/0.png", "ink/1.png", "ink/2.png")
    for i in (1, 2):                                    # white ink on a transparent background
        image = Image.new("RGBA", (28, 28), (255, 255, 255, 0))
        image.paste((255, 255, 255, 255), (5, 5, 9, 9))
        image.save(own / "ink" / f"{i}.png")
    assert (loaded(own)[1][1:] == 255).all()
    err = capsys.readouterr().err
    assert "2 of 3 images have a single colour, such as" in err and "1.png (transparent" in err


def test_dark_colour_images_and_stacks_are_said(here, capsys):
    """python-pillow 7723: of 16 bits per colour Pillow keeps the upper 8, and nothing tells it from
    an 8-bit file: 12-bit images are nearly black. madmaze/pytesseract 45: a TIFF with several pages
    is its first page."""
    (here / "own" / "scan").mkdir(parents=True)
    rows = b"".join(b"\0" + b"".join(struct.pack(">3H", *[147 * x] * 3) for x in range(28))
                    for _ in range(28))                             # up to 3969 of 4095
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", struct.pack(">2I5B", 28, 28, 16, 2, 0, 0, 0)),
                          (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))
    (here / "own" / "scan" / "a.png").write_bytes(png)
    assert loaded(here / "own")[1].max() == 15
    assert "brightest value of all images is 15 of 255" in capsys.readouterr().err
    pages = [Image.new("L", (28, 28), grey) for grey in (200, 100)]
    pages[0].paste(0, (0, 0, 9, 9))
    pages[0].save(here / "own" / "scan" / "b.tif", save_all=True, append_images=pages[1:])
    assert loaded(here / "own")[1].max() == 200
    err = capsys.readouterr().err
    assert "1 of several images (the first is taken)" in err and "brig" not in err


def checkpoint_weights(path) -> dict:
    return checkpoint.load(Path(path))["ema"]


@pytest.mark.skipif(os.name == "nt", reason="flock")
@pytest.mark.parametrize("number, refused", [(errno.ENOSYS, False), (errno.ENOTSUP, False),
                                             (errno.EWOULDBLOCK, True)])
def test_a_file_system_without_locks_is_no_other_process(here, monkeypatch, capsys, number,
                                                         refused):
    import fcntl

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    if refused:
        with pytest.raises(UserError, match="in use"):
            checkpoint.lock_folder(here)
    else:
        assert checkpoint.lock_folder(here)
        assert "cannot be locked" in capsys.readouterr().err


def test_a_directory_that_cannot_be_synced_is_no_error(here, monkeypatch):
    fsync = os.fsync

    def only_files(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(number)

    monkeypatch.setattr(command_module.os, "fsync", only_files)
    atomic_write(here / "x", lambda file: file.write(b"whole"))
    assert (here / "x").read_bytes() == b"whole"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_a_closed_ssh_session_loses_nothing(here):
    process = command("train_mnist.py", "--dataset", "glyphs", "--batch-size", 2, "--steps",
                      100_000, "--no-compile", "--device", "cpu", "--out", "run", cwd=here)
    deadline = time.time() + 100
    while not (here / "run" / "metrics.jsonl").exists() or not (
            here / "run" / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    last = checkpoint.checkpoints_in(here / "run")[-1]
    assert int(last.stem[5:]) == checkpoint.read_metrics(here / "run")[-1]["step"] > 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_nohup_is_respected(train, monkeypatch):
    """open-mmlab/mmsegmentation 1998, pytorch 67538: `nohup` starts a command with SIGHUP ignored;
    a handler of one's own would end it with the ssh session."""
    honest, sent = train_mnist.update_ema, []

    def hang_up(*args):
        sent.append(os.kill(os.getpid(), signal.SIGHUP))
        honest(*args)

    monkeypatch.setattr(train_mnist, "update_ema", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train("--steps", 3, "--out", "run") == 0 and len(sent) == 3
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name, value", [("RANK", "1"), ("RANK", "0"), ("WORLD_SIZE", "2")])
def test_variables_left_over_from_torchrun_are_named(monkeypatch, capsys, name, value):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(command_module.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as end:
        command_module.run_command(lambda: pytest.fail("the command ran"))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "not by torchrun" in err


# ---------------------------------------------------------------- what a compiler may do


@pytest.mark.parametrize("flag", [(), ("--compile",)])
def test_a_compiler_that_cannot_build_is_one_line_and_the_banner_says_what_runs(
        train, monkeypatch, capsys, flag):
    def fails(x):
        raise RuntimeError("C++ compile error\n\nx.cpp:26:10: fatal error: Python.h: No such file")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    monkeypatch.setitem(compute.COMPILING, "cpu", (0, 1, 0))        # worth it for any run
    if flag:
        assert "--compile cannot be used here: Python.h: No such file" in refused(
            train_mnist.main, *FAST, "--steps", 2, *flag)
        return
    assert train("--steps", 2, "--out", "run") == 0
    out, err = capsys.readouterr()
    assert "cpu, fp32, not compiled" in out or "cpu, bf16, not compiled" in out
    assert err.count("warning: ") == 1 and "which is slower: Python.h: No such file\n" in err


def test_ctrl_c_while_compiling_stops_at_once(here):
    """SIGINT in the first step of a compiled run: what compiles does not come to an end."""
    (here / "hangs.py").write_text("""import sys, time, torch, conftest, train_mnist
from support import compute, data
from support.command import run_command
data.draw_glyphs = conftest.few_glyphs
compute.pick_compile = lambda *args: True
def hang(self):
    self.forward = lambda *args: [print("hanging", flush=True), time.sleep(300)]
torch.nn.Module.compile = hang
run_command(lambda: train_mnist.main(sys.argv[1:]))""")
    process = subprocess.Popen(
        [sys.executable, "hangs.py", *FAST[:2], "--out", "run", "--device", "cpu"], text=True,
        env={**os.environ, **ALONE, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if "hanging" in line:
            break
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "stopped at once; the last checkpoint is kept" in err
    assert checkpoint.checkpoints_in(here / "run") == [here / "run" / "step_0000000.pt"]


# ---------------------------------------------------------------- terminals, values, threads


def test_what_an_encoding_lacks_is_escaped_everywhere(here):
    """Help, progress bars, standard output and standard error; the work is done."""
    own_images(here / "m\u00e4use", "\u00e9t\u00e9/a.png", "\u00e9t\u00e9/b.png")
    (here / "all.py").write_text("""import sample, train_mnist
from support.command import run_command
for main, argv in ((train_mnist.main, ["--help"]), (sample.main, ["\u5b57.pt"]),
                   (train_mnist.main, ["--dataset", "folder:m\u00e4use", "--image-size", "28",
                                       "--out", "\u65e5", "--steps", "1", "--batch-size", "2"]),
                   (sample.main, ["\u65e5", "--labels", "\u00e9t\u00e9", "--steps", "1", "--out",
                                  "\u5199.png"])):
    try:
        run_command(lambda: main(argv))
    except SystemExit as end:
        assert end.code == 2 * (argv == ["\u5b57.pt"])""", encoding="utf-8")
    done = subprocess.run([sys.executable, "all.py"], cwd=here, text=True, timeout=300, env={
        **os.environ, **ALONE, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0"}, capture_output=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for text in ("--label-dropout", "\\xe9t\\xe9 2", "folder:m\\xe4use", "run folder: \\u65e5",
                 "classes, in this order: \\xe9t\\xe9", "written: \\u5199.png"):
        assert text in done.stdout
    assert "error: \\u5b57.pt does not exist" in done.stderr and (here / "\u5199.png").exists()


@pytest.mark.parametrize("closed", [{"stdout"}, {"stderr"}, {"stdout", "stderr"}])
def test_closed_standard_streams_are_no_error(here, checkpoint, monkeypatch, closed):
    for name in closed:                                 # as Python has them after `>&-`
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        command_module.run_command(lambda: sample.main([
            str(checkpoint), "--labels", "3", "--steps", "1", "--out", "x.png"]))
    assert end.value.code == 0 and Image.open(here / "x.png").size


@pytest.mark.parametrize("options, says", [
    (dict(cfg_scale=float("nan")), "cfg_scale"), (dict(seed=1.5), "seed"), (dict(seed=-1), "seed"),
    (dict(batch_size=0), "batch_size"), (dict(steps=2.5), "steps"),
    (dict(eta=float("nan")), "eta"), (dict(precision="half"), "precision")])
def test_generate_refuses_what_the_flags_refuse(checkpoint, options, says):
    with pytest.raises(UserError, match=f"^{says}: "):
        generate(load(checkpoint), [3], **options)
    good = dict(cfg_scale=np.float32(2), seed=np.int64(3), batch_size=1, steps=1, eta=0)
    assert generate(load(checkpoint), [3, 3], **good).shape == (2, 1, 28, 28)


def test_training_and_sampling_in_a_thread(train, checkpoint):
    """A web server, a notebook's executor: signals belong to the main thread."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, "--steps", 2, "--out", "new").result() == 0
        assert pool.submit(generate, load(checkpoint), [3]).result().shape == (1, 1, 28, 28)


@pytest.mark.parametrize("spec", ["folder:", "latents:"])
def test_a_data_set_without_a_path_is_not_the_current_folder(here, spec):
    own_images(here, "cat/a.png")
    with pytest.raises(UserError, match="unknown"):
        data.load(spec)


# ---------------------------------------------------------------- files


def test_a_full_disk_is_named(here):
    """torch.save says "[enforce fail at inline_container.cc ...] unexpected pos 704 vs 598"."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))       # what a full disk is like
    try:
        with pytest.raises(OSError) as caught:
            checkpoint.save(here / "x.pt", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert command_module.reason(caught.value) == os.strerror(errno.ENOSPC)
    assert not list(here.iterdir())


def test_pngs_have_the_index_and_the_letters_of_their_class(train, here):
    """Names in which nothing but ASCII was kept: two classes shared one."""
    for name in ("\u5199\u771f", "\u7d75\u753b", "a + b"):
        own_images(here / "own", f"{name}/1.png", f"{name}/2.png")
    assert train("--dataset", "folder:own", "--image-size", 28, "--steps", 1, "--out", "run") == 0
    assert sample.main(["run", "--per-class", "1", "--png-dir", "out"]) == 0
    assert sorted(p.name for p in (here / "out").iterdir()) == [
        "00000-00-a-b.png", "00001-01-\u5199\u771f.png", "00002-02-\u7d75\u753b.png"]


def test_a_gif_of_a_grid_wider_than_a_gif_can_be(here, checkpoint):
    assert sample.main([str(checkpoint), "--labels", "3", "--per-class", "2200", "--steps", "1",
                        "--scale", "1", "--gif", "x.gif", "--batch-size", "2200"]) == 0
    assert Image.open("x.gif").width == 65_535 < 2200 * (28 + 2)


# ---------------------------------------------------------------- another data set at resume


def test_what_differs_at_resume_is_named(train, here, monkeypatch):
    own = own_images(here / "own", "cat/1.png", "dog/2.png", "dog/3.png")
    assert train("--dataset", "folder:own", "--image-size", 28, "--steps", 1, "--out", "run") == 0

    def resume(*flags) -> str:
        gc.collect()                                    # the lock of the one refused before
        return refused(train_mnist.main, "--resume", "--out", here / "run", "--steps", 2, *flags)

    (own / "dog").rename(own / "hound")
    line = resume()
    assert "classes ['cat', 'hound'] here, ['cat', 'dog'] in the run" in line and "digest" in line
    assert "images" not in line and "dataset folder:own here, folder:own in the run" in line
    own_images(here / "other", "cat/1.png", "dog/2.png")
    line = resume("--dataset", "folder:other")
    assert "dataset folder:other here, folder:own in the run" in line
    assert "images 2 here, 3 in the run" in line and "classes" not in line
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    line = resume()
    assert "own is not a folder" in line and "(the run's --dataset folder:own: name it" in line
    (own / "hound").rename(own / "dog")
    own.rename(here / "moved")                          # the same images under another name
    gc.collect()
    assert train("--resume", "--out", here / "run", "--steps", 2, "--dataset",
                 f"folder:{here / 'moved'}") == 0
