"""Several processes: the run does not depend on how many share it."""

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train_mnist
from conftest import ALONE, FAST, ROOT
from support import command, compute, data, run
from support.checkpoint import checkpoints_in, load, read_metrics
from support.run import Run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")
PLAIN = ("--optimizer", "adamw", "--precision", "fp32")


def on_ranks(world: int, main, *argv, timeout: float = 120) -> list[int]:
    """The exit statuses of main(argv) in `world` forked processes that gloo connects, as torchrun
    would start them. What they print goes to rank-N.txt. A process that hangs fails the test."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          LOCAL_RANK=str(rank), MASTER_PORT=str(port))
        for module in (compute, run, sample):       # they read the environment when imported
            for name, value in (("RANK", rank), ("WORLD", world)):
                if hasattr(module, name):
                    setattr(module, name, value)
        time.sleep = lambda seconds: None           # the other ranks' wait for rank 0
        sys.stdout = sys.stderr = open(f"rank-{rank}.txt", "w", buffering=1)
        command.run_command(lambda: main([str(a) for a in argv]))

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,))
                 for rank in range(world)]
    deadline = time.monotonic() + timeout
    for p in processes:
        p.start()
    for p in processes:
        p.join(max(0, deadline - time.monotonic()))
    hanging = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for p in processes:
        p.kill()
        p.join()
    assert not hanging, f"ranks {hanging} of {world} have not ended in {timeout} s"
    return [p.exitcode for p in processes]


def printed(rank: int) -> str:
    return Path(f"rank-{rank}.txt").read_text()


def together(world: int, *flags) -> None:
    """train_mnist.main on so many processes, which must end with status 0."""
    fresh = () if "--resume" in flags else FAST
    assert on_ranks(world, train_mnist.main, *fresh, *flags) == [0] * world, printed(0)


def rows(folder) -> list[dict]:
    return read_metrics(Path(folder))


def assert_same_to_rounding(a, b, weights: float = 1e-5) -> None:
    for row, other in zip(rows(a), rows(b), strict=True):
        assert other == pytest.approx(row, rel=1e-4)        # with the same quarters of t
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
    one, two = (load(checkpoints_in(Path(folder))[-1], full=True) for folder in (a, b))
    for key in ("model", "ema"):
        for name, w in one[key].items():
            torch.testing.assert_close(two[key][name], w, rtol=0, atol=weights)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_20_steps_are_those_of_one_process(trained, world):
    flags = ("--steps", 20, *PLAIN, "--flip")
    trained(*flags, out="one")
    together(world, *flags, "--preview-every", 10, "--out", "many")
    assert_same_to_rounding("one", "many")
    assert "step 20, loss" in printed(0) and not printed(1)   # rank 0 alone prints and writes
    assert sorted(p.name for p in Path().iterdir() if "rank" not in p.name) == ["many", "one"]
    assert not list(Path("many").rglob(".*"))


def test_muon_drifts_no_further_than_its_bf16(trained):
    """Its iteration rounds to bf16: docs/experiments.md has what was measured."""
    flags = ("--steps", 12, "--precision", "fp32")
    trained(*flags, out="one")
    together(2, *flags, "--out", "two")
    one, two = ([row["loss"] for row in rows(folder)] for folder in ("one", "two"))
    assert two[:2] == pytest.approx(one[:2], rel=1e-5) and two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_checkpoint_moves_between_numbers_of_processes(train, trained, first, then):
    flags = ("--steps", 12, *PLAIN)
    trained(*flags, out="straight")
    for world, more in [(first, (*flags, "--stop-after", 5)), (then, ("--resume",))]:
        if world == 1:
            assert train(*more, "--out", "run") == 0
        else:
            together(world, *more, "--out", "run")
    assert_same_to_rounding("straight", "run")


def test_the_arrays_of_a_shared_sampling_job_equal_those_of_one(checkpoint):
    flags = (checkpoint, "--labels", 3, 7, "--per-class", 7, "--batch-size", 4, "--npz")
    sample.main([str(f) for f in (*flags, "one.npz")])
    assert on_ranks(3, sample.main, *flags, "three.npz") == [0, 0, 0], printed(0)
    one, three = np.load("one.npz"), np.load("three.npz")
    assert len(one["arr_0"]) == 14 and all(np.array_equal(one[k], three[k]) for k in one)


# ---------------------------------------------------------------- the real torchrun


TINY_RUN = """import sys, torch, conftest, dit, train_mnist
from support import data
from support.command import run_command
dit.MODELS[conftest.TINY] = conftest.TINY_SIZE
data.draw_glyphs = conftest.few_glyphs
torch._dynamo.config.error_on_recompile = True
honest = torch.compile
torch.compile = lambda function: honest(function, backend="aot_eager")
run_command(lambda: train_mnist.main(sys.argv[1:]))"""


def torchrun(*words, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         *map(str, words)], text=True, env={**os.environ, **ALONE, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.long                                           # compiling takes a minute and more
def test_compiled_is_eager_to_rounding(trained, world):
    """Compiled once: not again for later steps or learning rates."""
    flags = ("--steps", 6, *PLAIN)
    trained(*flags, out="one")
    if world == 1:
        assert train_mnist.main([str(x) for x in (*FAST, *flags, "--compile", "--out", "two")]) == 0
    else:
        Path("tiny.py").write_text(TINY_RUN)
        process = torchrun("tiny.py", *FAST, *flags, "--compile", "--out", "two",
                           PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and ", compiled" in out, err
    assert_same_to_rounding("one", "two")


def test_torchrun_ctrl_c_stops_all_ranks_at_one_step_and_saves(here):
    Path("pets/cat").mkdir(parents=True)                    # read at once
    Image.new("L", (28, 28), 99).save("pets/cat/1.png")
    process = torchrun(
        ROOT / "train_mnist.py", "--dataset", "folder:pets", "--image-size", 28, "--model",
        "DiT-Nano/7", "--batch-size", 4, "--log-every", 2, "--steps", 100_000, "--no-compile",
        "--out", "run")
    deadline = time.time() + 90
    while len(rows("run")) < 4:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)                      # to torchrun, which passes it on
    out, err = process.communicate(timeout=60)
    stopped = int(re.search(r"stopped at step ([\d,]+)", out)[1].replace(",", ""))
    assert "stopped at once" not in err and len(rows("run")) == stopped
    assert load(checkpoints_in(Path("run"))[-1], full=True)["step"] == stopped


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("flags, says", [
    (["--lr", "fast"], "--lr"),                             # every process sees it
    (["--batch-size", 9], "--batch-size 9 .*: use 8"),
    (["--resume", "none.pt"], "none.pt does not exist"),    # and these rank 0 alone
    (["--init-from", "none.pt"], "none.pt does not exist"),
    (["--dataset", "folder:none"], "none is not a folder"),
    (["--out", "taken"], "taken is not empty"),
])
def test_a_mistake_ends_every_rank_with_a_line(train, flags, says):
    Path("taken").mkdir()
    Path("taken/notes").touch()
    assert on_ranks(2, train_mnist.main, *FAST, "--steps", 2, *flags) == [2, 2]
    for rank in range(2):
        told = [line for line in printed(rank).splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and re.search(says, told[0]), printed(rank)


def test_a_loss_that_is_not_finite_in_one_rank_ends_all(train, monkeypatch):
    honest, count = Run.log, 0

    def log(self, *, loss, **rest):
        nonlocal count
        count += 1
        honest(self, loss=loss * float("nan") if count == 3 and run.RANK == 1 else loss, **rest)

    monkeypatch.setattr(Run, "log", log)
    assert on_ranks(2, train_mnist.main, *FAST, "--steps", 5, "--out", "run") == [1, 1]
    assert all("not finite at step 3" in printed(rank) for rank in range(2))
    assert len(rows("run")) == 2


def test_ranks_with_other_data_are_refused(train, monkeypatch):
    draw = data.draw_glyphs
    monkeypatch.setattr(data, "draw_glyphs", lambda count, seed=0: draw(count, seed + run.RANK))

    def main(argv) -> int:
        try:
            return train_mnist.main(argv)
        except RuntimeError:                                # rank 1 is gone
            return 0

    assert on_ranks(2, main, *FAST, "--steps", 2, "--out", "run") == [0, 2]
    assert "process 1 has other data than process 0" in printed(1)
