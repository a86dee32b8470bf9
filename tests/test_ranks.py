"""Several processes: the run does not depend on how many share it."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import sample
import train_mnist
from cli import UserError
from conftest import ALONE, FAST, ROOT, load, tensors_equal
from ranks import Ranks
from runs import Run, checkpoints_in, read_metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")
PLAIN = ("--optimizer", "adamw", "--precision", "fp32")


def on_ranks(world: int, main, argv: list[str], inspect=None) -> None:
    """main(argv) in `world` forked processes that gloo connects, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if inspect is not None:
            inspect(rank)
        os._exit(main(argv))

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,))
                 for rank in range(world)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0] * world


@pytest.fixture
def trained(train):
    """trained(world, out, *flags): a run of the tiny model on that many processes."""
    def run(world: int, out: str, *flags):
        fresh = () if "--resume" in flags else FAST
        flags = [*fresh, *map(str, flags), "--out", out]
        assert train_mnist.main(flags) == 0 if world == 1 else not on_ranks(
            world, train_mnist.main, flags)
        return [r["loss"] for r in read_metrics(Path(out) / "metrics.jsonl")]

    return run


@pytest.mark.parametrize("world", [2, 4])
def test_20_steps_are_those_of_one_process(trained, world):
    """Losses to 1e-5 relative, parameters to 1e-5, with AdamW; grad-accum included."""
    alone = trained(1, "one", "--steps", 20, *PLAIN)
    together = trained(world, "many", "--steps", 20, *PLAIN, "--grad-accum", 8 // world // 2)
    assert together == pytest.approx(alone, rel=1e-5)
    a, b = load("one/step_0000020.pt"), load("many/step_0000020.pt")
    for key in ("model", "ema"):
        for name, w in a[key].items():
            torch.testing.assert_close(b[key][name], w, rtol=0, atol=1e-5)
    assert a["config"]["recipe"] == {**b["config"]["recipe"], "grad_accum": 1}


def test_with_muon_the_first_gradients_agree_and_the_drift_is_told(trained, monkeypatch, tmp_path):
    honest = train_mnist.update

    def update(optimizers, scaler, model, *rest):
        path = tmp_path / f"gradients-{os.environ.get('RANK', 'alone')}.pt"
        if not path.exists():
            torch.save({n: p.grad for n, p in model.named_parameters()}, path)
        return honest(optimizers, scaler, model, *rest)

    monkeypatch.setattr(train_mnist, "update", update)
    flags = ("--steps", 20, "--optimizer", "muon", "--precision", "fp32")
    alone, together = trained(1, "one", *flags), trained(2, "two", *flags)
    first = [torch.load(tmp_path / f"gradients-{r}.pt") for r in ("alone", "0", "1")]
    for name, gradient in first[0].items():
        for other in first[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)
    assert together[:2] == pytest.approx(alone[:2], rel=1e-5)
    a, b = load("one/step_0000020.pt")["model"], load("two/step_0000020.pt")["model"]
    drift = max((a[n] - b[n]).abs().max().item() for n in a)
    apart = max(abs(x / y - 1) for x, y in zip(alone, together, strict=True))
    print(f"Muon on 2 processes, 20 steps: parameters drift by {drift:.1e}, losses by {apart:.1e}")
    assert drift < 0.02 and apart < 1e-3        # README.md has what was measured, a third of that


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_checkpoint_moves_between_numbers_of_processes(trained, first, then):
    straight = trained(1, "straight", "--steps", 12, *PLAIN)
    trained(first, "run", "--steps", 12, *PLAIN, "--stop-after", 5)
    moved = trained(then, "run", "--resume")
    assert moved == pytest.approx(straight, rel=1e-5)
    a, b = load("straight/step_0000012.pt"), load("run/step_0000012.pt")
    for name, w in a["model"].items():
        torch.testing.assert_close(b["model"][name], w, rtol=0, atol=1e-5)


def test_rank_0_alone_writes(trained):
    trained(2, "run", "--steps", 4, *PLAIN, "--preview-every", 2)
    assert [p.name for p in Path().iterdir()] == ["run"]
    assert [r["step"] for r in read_metrics(Path("run/metrics.jsonl"))] == [1, 2, 3, 4]
    assert not list(Path("run").rglob(".*"))


def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_the_nearest(monkeypatch):
    with pytest.raises(UserError, match="--batch-size 10 .* 3 processes .*: 9 or 12 can"):
        Ranks(torch.device("cpu"), 0, 3).check_batch(10, 1)
    with pytest.raises(UserError, match="--batch-size 2 .*: 6 can"):
        Ranks(torch.device("cpu"), 0, 3).check_batch(2, 2)
    Ranks(torch.device("cpu"), 0, 3).check_batch(12, 2)


def test_the_arrays_of_a_shared_sampling_job_equal_those_of_one(checkpoint):
    flags = [str(checkpoint), "--labels", "3", "7", "--per-class", "7", "--steps", "3",
             "--batch-size", "4", "--npz"]
    sample.main([*flags, "one.npz"])
    on_ranks(3, sample.main, [*flags, "three.npz"])
    one, three = np.load("one.npz"), np.load("three.npz")
    assert np.array_equal(one["arr_0"], three["arr_0"])
    assert np.array_equal(one["arr_1"], three["arr_1"]) and len(one["arr_0"]) == 14


# ---------------------------------------------------------------- the real torchrun


def torchrun(folder, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         "--standalone", *words], cwd=folder, text=True, env={**os.environ, **ALONE},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


LONG = (str(ROOT / "train_mnist.py"), "--dataset", "glyphs", "--model", "DiT-Nano/7",
        "--batch-size", "4", "--log-every", "2", "--steps", "100000", "--out", "run")


def running(folder, process) -> None:
    deadline = time.time() + 90
    while len(read_metrics(folder / "run" / "metrics.jsonl")) < 4:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)


def test_torchrun_ctrl_c_stops_all_ranks_at_one_step_and_saves(tmp_path):
    process = torchrun(tmp_path, *LONG)
    running(tmp_path, process)
    process.send_signal(signal.SIGINT)          # to torchrun, which passes it on
    out, err = process.communicate(timeout=60)
    stopped = int(re.search(r"stopped at step ([\d,]+)", out)[1].replace(",", ""))
    assert "stopped at once" not in err
    assert load(checkpoints_in(tmp_path / "run")[-1])["step"] == stopped
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == stopped


def test_torchrun_one_ranks_death_ends_all(tmp_path):
    process = torchrun(tmp_path, *LONG)
    running(tmp_path, process)
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
    assert tensors_equal(load(checkpoints_in(tmp_path / "run")[-1])["class_names"],
                         [str(d) for d in range(10)])


@pytest.mark.parametrize("flags, says", [
    (["--lr", "fast"], "--lr"),                                 # every process sees it
    (["--resume", "none.pt"], "none.pt does not exist"),        # and these rank 0 alone
    (["--init-from", "none.pt"], "none.pt does not exist"),
    (["--dataset", "mnist", "--data-dir", "."], "mnist"),
    (["--out", "taken"], "taken already holds a run"),
])
def test_torchrun_a_mistake_is_told_once(tmp_path, flags, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/metrics.jsonl").touch()
    process = torchrun(tmp_path, *LONG, *flags)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert process.returncode != 0 and len(lines) == 1 and says in lines[0], err


def test_what_rank_0_finds_wrong_ends_all_with_the_same_words(tmp_path):
    def main(argv) -> int:
        def make():
            raise UserError("no such thing", status=7)
        ranks = Ranks.join("cpu")
        try:
            ranks.from_rank_0(make)
        except UserError as error:
            return 0 if (str(error), error.status) == ("no such thing", 7) else 1

    on_ranks(2, main, [])


def test_a_loss_that_is_not_finite_ends_every_rank_with_a_line(trained, monkeypatch, tmp_path):
    honest = Run.record

    def record(self, step, loss, *rest):
        honest(self, step, loss * float("nan") if step == 2 else loss, *rest)

    def told(argv) -> int:
        try:
            return train_mnist.main(argv)
        except UserError as error:
            (tmp_path / f"told-{os.environ['RANK']}").write_text(str(error))
            return 0

    monkeypatch.setattr(Run, "record", record)
    on_ranks(2, told, [*FAST, "--steps", "5", "--out", "run"])
    for rank in range(2):
        assert "not finite at step 3" in (tmp_path / f"told-{rank}").read_text()


def test_ranks_with_other_data_are_refused(trained, monkeypatch, tmp_path):
    draw = data.draw_glyphs

    def told(argv) -> int:
        rank = int(os.environ["RANK"])
        data.draw_glyphs = lambda count, seed=0: draw(count, seed + rank)
        try:
            return train_mnist.main(argv)
        except UserError as error:
            assert rank == 1 and "process 1 has other data than process 0" in str(error)
            (tmp_path / "told").touch()
            os._exit(0)
        except RuntimeError:                    # rank 1 is gone
            return 0

    on_ranks(2, told, [*FAST, "--steps", "2", "--out", "run"])
    assert (tmp_path / "told").exists()


def test_on_every_machine_one_process_loads_before_the_others(train, monkeypatch):
    events = []
    ranks = {rank: Ranks(torch.device("cpu"), rank, 4, local=rank % 2) for rank in range(4)}
    monkeypatch.setattr(data, "load", lambda *a: events.append("load"))
    monkeypatch.setattr(Ranks, "largest", lambda self, n: events.append("all are here"))
    monkeypatch.setattr(Ranks, "from_rank_0", lambda self, make:
                        make() if self.rank == 0 else "glyphs")
    s = SimpleNamespace(dataset="glyphs", data_dir="data", image_size=None)
    for rank, order in [(2, ["load", "all are here", "load"]), (1, ["all are here", "load"]),
                        (3, ["all are here", "load"])]:
        events.clear()
        train_mnist.load_data(s, ranks[rank], True)
        assert events == order
