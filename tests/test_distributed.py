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
from conftest import ALONE, FAST, ROOT, load, tensors_equal
from support import data, distributed
from support.cli import UserError, run_command
from support.folders import checkpoints_in, read_metrics
from support.run import Run
from support.state import TrainingState

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")
PLAIN = ("--optimizer", "adamw", "--precision", "fp32")


def on_ranks(world: int, main, argv: list, timeout: float = 120, per_machine: int = 8) -> list[int]:
    """The exit statuses of main(argv) in `world` forked processes that gloo connects, as torchrun
    would start them. What they print goes to rank-N.txt. A process that hangs fails the test."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          LOCAL_RANK=str(rank % per_machine), MASTER_PORT=str(port))
        sys.stdout = sys.stderr = open(f"rank-{rank}.txt", "w", buffering=1)
        run_command(lambda: main([str(a) for a in argv]))

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
    statuses = on_ranks(world, train_mnist.main, [*fresh, *flags])
    assert statuses == [0] * world, printed(0)


def losses(folder) -> list[float]:
    return [r["loss"] for r in read_metrics(Path(folder) / "metrics.jsonl")]


def assert_weights_agree(a: dict, b: dict, keys=("model", "ema")) -> None:
    for key in keys:
        for name, w in a[key].items():
            torch.testing.assert_close(b[key][name], w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_20_steps_are_those_of_one_process(trained, world):
    """Losses to 1e-5 relative, parameters to 1e-5, with AdamW; grad-accum included."""
    alone = load(trained("--steps", 20, *PLAIN, out="one"))
    together(world, "--steps", 20, *PLAIN, "--grad-accum", 8 // world // 2, "--out", "many")
    assert losses("many") == pytest.approx(losses("one"), rel=1e-5)
    for row, other in zip(*(read_metrics(Path(folder) / "metrics.jsonl")
                            for folder in ("one", "many")), strict=True):
        assert other == pytest.approx(row, rel=1e-4)    # with the same quarters of t
    several = load("many/step_0000020.pt")
    assert_weights_agree(alone, several)
    assert alone["config"]["recipe"] == {**several["config"]["recipe"], "grad_accum": 1}


def test_with_muon_the_first_gradients_agree_and_the_drift_is_told(train, monkeypatch, tmp_path):
    honest = TrainingState.update

    def update(self, *args):
        path = tmp_path / f"gradients-{os.environ.get('RANK', 'alone')}.pt"
        if not path.exists():
            torch.save({n: p.grad for n, p in self.model.named_parameters()}, path)
        return honest(self, *args)

    monkeypatch.setattr(TrainingState, "update", update)
    flags = ("--steps", 20, "--optimizer", "muon", "--precision", "fp32")
    train(*flags, "--out", "one")
    together(2, *flags, "--out", "two")
    first = [torch.load(tmp_path / f"gradients-{r}.pt") for r in ("alone", "0", "1")]
    for name, gradient in first[0].items():
        for other in first[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)
    assert losses("two")[:2] == pytest.approx(losses("one")[:2], rel=1e-5)
    a, b = load("one/step_0000020.pt")["model"], load("two/step_0000020.pt")["model"]
    drift = max((a[n] - b[n]).abs().max().item() for n in a)
    apart = max(abs(x / y - 1) for x, y in zip(losses("one"), losses("two"), strict=True))
    print(f"Muon on 2 processes, 20 steps: parameters drift by {drift:.1e}, losses by {apart:.1e}")
    assert drift < 0.02 and apart < 1e-3        # docs/experiments.md: measured, a third of that


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_checkpoint_moves_between_numbers_of_processes(train, trained, first, then):
    flags = ("--steps", 12, *PLAIN)
    straight = load(trained(*flags, out="straight"))
    for world, more in [(first, (*flags, "--stop-after", 5)), (then, ("--resume",))]:
        if world == 1:
            assert train(*more, "--out", "run") == 0
        else:
            together(world, *more, "--out", "run")
    assert losses("run") == pytest.approx(losses("straight"), rel=1e-5)
    assert_weights_agree(straight, load("run/step_0000012.pt"), ["model"])


def test_flipped_images_do_not_depend_on_the_number_of_processes(trained):
    flags = ("--steps", 4, *PLAIN, "--flip")
    trained(*flags, out="one")
    together(2, *flags, "--out", "two")
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)


def test_rank_0_alone_logs(train):
    pytest.importorskip("tensorboard")
    together(2, "--steps", 4, *PLAIN, "--logger", "tensorboard", "--out", "run")
    assert len(list(Path("run/tensorboard").iterdir())) == 1


def test_rank_0_alone_writes(train):
    together(2, "--steps", 4, *PLAIN, "--preview-every", 2, "--out", "run")
    assert sorted(p.name for p in Path().iterdir()) == ["rank-0.txt", "rank-1.txt", "run"]
    assert [r["step"] for r in read_metrics(Path("run/metrics.jsonl"))] == [1, 2, 3, 4]
    assert not list(Path("run").rglob(".*"))
    assert "4 steps in" in printed(0) and not printed(1)


TINY_RUN = """import sys, torch, conftest, dit, train_mnist
from support import data
from support.cli import run_command
dit.MODELS[conftest.TINY] = dict(patch_size=7, hidden_size=16, depth=2, num_heads=2)
data.draw_glyphs = conftest.few_glyphs
torch._dynamo.config.error_on_recompile = True
run_command(lambda: train_mnist.main(sys.argv[1:]))"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_ranks_are_one_eager_process_to_rounding(trained):
    """Compiled once: not again for later steps, learning rates or micro-batches."""
    flags = ("--steps", 6, *PLAIN)
    alone = load(trained(*flags, out="one"))
    Path("tiny.py").write_text(TINY_RUN)
    process = torchrun(Path.cwd(), "tiny.py", *FAST, *map(str, flags), "--compile", "--grad-accum",
                       "2", "--out", "two", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "cpu, fp32, compiled" in out, err
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    assert_weights_agree(alone, load("two/step_0000006.pt"))


@pytest.mark.parametrize("attempt", range(5))
def test_the_processes_end_after_the_last_step(train, attempt):
    """With torch 2.11 they hung in about half of the tries while the wrapped model outlived the
    process group."""
    flags = [*FAST, "--steps", 20, *PLAIN, "--grad-accum", 2, "--out", "run"]
    assert on_ranks(2, train_mnist.main, flags, timeout=60) == [0, 0]


def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="--batch-size 10 .* 3 processes .*: use 9 or 12"):
        distributed.share_of(10, 1)
    with pytest.raises(UserError, match="--batch-size 2 .*: use 6"):
        distributed.share_of(2, 2)
    assert distributed.share_of(12, 2) == slice(4, 8)


def test_the_arrays_of_a_shared_sampling_job_equal_those_of_one(checkpoint):
    flags = [str(checkpoint), "--labels", "3", "7", "--per-class", "7", "--steps", "3",
             "--batch-size", "4", "--npz"]
    sample.main([*flags, "one.npz"])
    assert on_ranks(3, sample.main, [*flags, "three.npz", "--png-dir", "three"]) == [0, 0, 0], \
        printed(0)
    one, three = np.load("one.npz"), np.load("three.npz")
    assert np.array_equal(one["arr_0"], three["arr_0"])
    assert np.array_equal(one["arr_1"], three["arr_1"]) and len(one["arr_0"]) == 14
    pngs = [np.asarray(Image.open(path)) for path in sorted(Path("three").iterdir())]
    assert np.array_equal(np.stack(pngs), one["arr_0"][..., 0])


# ---------------------------------------------------------------- the real torchrun


def torchrun(folder, *words, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         "--standalone", *words], cwd=folder, text=True,
        env={**os.environ, **ALONE, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


LONG = (str(ROOT / "train_mnist.py"), "--dataset", "folder:pets", "--image-size", "28", "--model",
        "DiT-Nano/7", "--batch-size", "4", "--log-every", "2", "--steps", "100000", "--no-compile",
        "--out", "run")


def started(folder) -> subprocess.Popen:
    """A run on two processes, after its first few steps."""
    for name in ("cat", "dog"):                 # read at once
        (folder / "pets" / name).mkdir(parents=True)
        Image.new("L", (28, 28), 99).save(folder / "pets" / name / "1.png")
    process = torchrun(folder, *LONG)
    deadline = time.time() + 90
    while len(read_metrics(folder / "run" / "metrics.jsonl")) < 4:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)
    return process


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error")]


def test_torchrun_ctrl_c_stops_all_ranks_at_one_step_and_saves(tmp_path):
    process = started(tmp_path)
    process.send_signal(signal.SIGINT)          # to torchrun, which passes it on
    out, err = process.communicate(timeout=60)
    stopped = int(re.search(r"stopped at step ([\d,]+)", out)[1].replace(",", ""))
    assert "stopped at once" not in err
    assert load(checkpoints_in(tmp_path / "run")[-1])["step"] == stopped
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == stopped


def test_torchrun_one_ranks_death_ends_all(tmp_path):
    process = started(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc to find the ranks")
    ranks = [int(pid) for pid in children.read_text().split()]
    victim = [pid for pid in ranks
              if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(victim[0], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert load(checkpoints_in(tmp_path / "run")[-1])["step"] == 0      # and what was saved stands
    assert tensors_equal(load(checkpoints_in(tmp_path / "run")[-1])["class_names"], ["cat", "dog"])


def test_torchrun_a_mistake_is_told_once(tmp_path):
    process = torchrun(tmp_path, *LONG, "--resume", "none.pt")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert told(err) == ["error: none.pt does not exist"], err


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("flags, says", [
    (["--lr", "fast"], "--lr"),                                 # every process sees it
    (["--batch-size", 9], "--batch-size 9 .*: use 8 or 10"),
    (["--resume", "none.pt"], "none.pt does not exist"),        # and these rank 0 alone
    (["--init-from", "none.pt"], "none.pt does not exist"),
    (["--dataset", "mnist", "--data-dir", "."], "mnist is not in"),
    (["--out", "taken"], "taken already holds a run"),
])
def test_a_mistake_ends_every_rank_with_a_line(train, monkeypatch, flags, says):
    def fail(*_):
        raise data.DataMissing("mnist is not in . and cannot be downloaded (no network)")

    monkeypatch.setattr(data, "download", fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)    # the other ranks' wait for rank 0
    Path("taken").mkdir()
    Path("taken/metrics.jsonl").touch()
    assert on_ranks(2, train_mnist.main, [*FAST, "--steps", 2, *flags]) == [2, 2]
    for rank, name in enumerate(["error: ", "error (rank 1): "]):
        lines = told(printed(rank))
        assert len(lines) == 1 and re.match(re.escape(name) + f".*{says}", lines[0]), lines


def test_what_rank_0_finds_wrong_ends_all_with_the_same_words(here):
    def main(argv) -> int:
        def make():
            raise UserError("no such thing", status=7)

        distributed.join("cpu")
        distributed.broadcast_from_rank0(make)
        return 0

    assert on_ranks(2, main, []) == [7, 7]
    assert printed(0) == "error: no such thing\n"
    assert printed(1) == "error (rank 1): no such thing\n"


def test_a_loss_that_is_not_finite_ends_every_rank_with_a_line(train, monkeypatch):
    """Although it is so in the share of one of them alone."""
    honest, count = Run.log, 0

    def log(self, loss, **rest):
        nonlocal count
        count += 1
        bad = count == 3 and distributed.rank() == 1
        honest(self, loss=loss * float("nan") if bad else loss, **rest)

    monkeypatch.setattr(Run, "log", log)
    assert on_ranks(2, train_mnist.main, [*FAST, "--steps", 5, "--out", "run"]) == [1, 1]
    for rank in range(2):
        assert "not finite at step 3" in told(printed(rank))[0]
    assert len(losses("run")) == 2


def test_ranks_with_other_data_are_refused(train, monkeypatch):
    draw = data.draw_glyphs
    monkeypatch.setattr(data, "draw_glyphs",
                        lambda count, seed=0: draw(count, seed + distributed.rank()))

    def main(argv) -> int:
        try:
            return train_mnist.main(argv)
        except RuntimeError:                    # rank 1 is gone
            return 0

    assert on_ranks(2, main, [*FAST, "--steps", 2, "--out", "run"]) == [0, 2]
    assert "process 1 has other data than process 0" in told(printed(1))[0]


def test_on_every_machine_one_process_loads_before_the_others(train, monkeypatch):
    """Rank 0, which may download; then the first of the other machine; then those beside them."""
    honest = data.load

    def load_slowly(*args, **options):
        begun = time.monotonic()
        time.sleep(0.3)
        images = honest(*args, **options)
        Path(f"times-{distributed.rank()}").write_text(f"{begun} {time.monotonic()}")
        return images

    monkeypatch.setattr(data, "load", load_slowly)
    flags = [*FAST, "--steps", 1, "--out", "run"]
    assert on_ranks(4, train_mnist.main, flags, per_machine=2) == [0] * 4, printed(0)
    times = [list(map(float, Path(f"times-{rank}").read_text().split())) for rank in range(4)]
    (_, end_0), (begin_1, _), (begin_2, end_2), (begin_3, _) = times
    assert end_0 < begin_2 and end_2 < min(begin_1, begin_3)
