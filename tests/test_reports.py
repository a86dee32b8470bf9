"""What happened to other people: public bug reports of small diffusion trainers, replayed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, command
from sample import label_of
from support import checkpoint, command as command_module
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
                                          ("0", WORDS[:9]), ("2", ["cat", "dog"]), (3.7, WORDS)])
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


def test_a_terminal_that_is_not_utf8_gets_escapes(here):
    process = command("sample.py", "--ckpt", "\u65e5.pt", cwd=here,
                      env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1 and "does not exist" in err


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


def test_variables_left_over_from_torchrun_are_named(here):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MASTER_ADDR", None)
    done = subprocess.run([sys.executable, ROOT / "sample.py"], cwd=here, env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "not by torchrun" in done.stderr
