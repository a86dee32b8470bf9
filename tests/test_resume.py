"""A run that is stopped, killed or moved continues as if it had never stopped; and nothing that was
saved is lost."""

import argparse
import errno
import functools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_mnist
from conftest import FAST, TINY, TINY_SIZE, command, refused, tensors_equal
from dit import DiT
from support import checkpoint as checkpoints
from support import pictures, run
from support.checkpoint import checkpoints_in, load, lock_folder, read_metrics
from support.command import UserError, run_command

NINE = ("--steps", 9, "--save-every", 3, "--keep", 2)


def rows(folder) -> list[dict]:
    return read_metrics(Path(folder))


def state_of(folder) -> dict:
    return load(checkpoints_in(Path(folder))[-1], full=True)


def same_run(a, b) -> bool:
    """Are two runs equal in model, EMA, optimizers and every row of the record, bit for bit?"""
    states = [state_of(folder) for folder in (a, b)]
    return rows(a) == rows(b) and all(tensors_equal(states[0][k], states[1][k]) for k in
                                      ("step", "class_names", "ema", "model", "opt"))


def files(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def pets(folder) -> None:
    """A data set that is read at once, so that most of a run's time is training and saving."""
    for name in ("cat", "dog"):
        (folder / "pets" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (28, 28), 10 * i).save(folder / "pets" / name / f"{i}.png")


class Fork:
    """train_mnist.py in a process of its own, as `command` starts one, without its seconds of
    imports; `first` is called before it."""

    def __init__(self, *argv, cwd, first=lambda: None):
        self.out, self.err = (Path(cwd) / f".{name}" for name in ("stdout", "stderr"))
        self.process = multiprocessing.get_context("fork").Process(
            target=self._work, args=([str(a) for a in argv], cwd, first))
        self.process.start()

    def _work(self, argv, cwd, first) -> None:
        os.chdir(cwd)
        for number, path in ((1, self.out), (2, self.err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        first()
        run_command(lambda: train_mnist.main(argv))

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout=None) -> tuple[str, str]:
        self.process.join(timeout)
        assert self.poll() is not None, "it does not end"
        return self.out.read_text(), self.err.read_text()


def killed_in(owner, name: str, *argv, call: int = 1) -> None:
    """Run train_mnist.py in a process that is killed at the call of owner.name of this number."""
    def first():
        honest, count = getattr(owner, name), 0

        def spy(*args, **options):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*args, **options)

        setattr(owner, name, spy)

    process = Fork(*argv, cwd=Path.cwd(), first=first)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, out + err


# ---------------------------------------------------------------- resume, exactly


# 30 steps are more than two epochs of 100 images by batches of 8
@pytest.mark.parametrize("optimizer, stop, save_every", [
    ("muon", 7, 1000),          # in the middle of an epoch, the checkpoint made by the stop alone
    ("muon", 25, 5),            # at a checkpoint boundary; 200 images: an epoch's end as well
    ("adamw", 13, 10),          # behind one, and behind a log interval
])
def test_stopped_and_resumed_equals_straight(train, trained, capsys, optimizer, stop, save_every):
    flags = ("--steps", 30, "--optimizer", optimizer)
    trained(*flags, out="straight")
    assert train(*flags, "--save-every", save_every, "--out", "run", "--stop-after", stop,
                 "--device", "cpu") == 0
    assert state_of("run")["step"] == stop
    assert "--resume --out run --device cpu\n" in capsys.readouterr().out
    assert train("--resume", "--out", "run") == 0
    assert [r["step"] for r in rows("run")] == list(range(1, 31))
    assert same_run("straight", "run")


@pytest.mark.parametrize("owner, name, call, step", [
    (checkpoints, "save", 2, 0),            # before step 3 is saved, its losses already written
    (torch, "save", 3, 3),                  # in the middle of writing step 6
    (os, "replace", 8, 6),                  # step 9 is complete, but not yet in its place
    (run.Run, "append", 2, 3),              # before the losses of steps 4 to 6 are written
    (pictures, "save_picture", 2, 6),       # behind everything but the last step
    (train_mnist, "train", 1, 0),
])
def test_killed_at_the_worst_place_and_resumed_equals_straight(train, trained, owner, name, call,
                                                               step):
    trained(*NINE, "--preview-every", 3, out="straight")
    killed_in(owner, name, *FAST, *NINE, "--preview-every", 3, "--out", "run", call=call)
    assert state_of("run")["step"] == step
    assert train("--resume", "--out", "run") == 0
    assert same_run("straight", "run") and not list(Path("run").glob(".*"))


@pytest.mark.parametrize("flags", [
    (*FAST, "--steps", 4), (*FAST, "--steps", 4, "--init-from", "first"),
    ("--resume", "first/step_0000003.pt", "--steps", 5),
])
def test_a_run_killed_before_its_first_checkpoint_is_none_and_its_folder_is_free(
        train, trained, flags):
    trained("--steps", 3, out="first")
    flags = (*flags, "--out", "run")
    killed_in(torch, "save", *flags)
    assert [p.suffix for p in Path("run").glob(".*")] == [".tmp"]
    assert "no run to resume in run" in refused(train_mnist.main, "--resume", "--out", "run")
    assert train_mnist.main([*map(str, flags), "--stop-after", "1"]) == 0
    assert not list(Path("run").glob(".*")) and len(checkpoints_in(Path("run"))) == 2
    old, new = load(Path("first/step_0000003.pt"), full=True), checkpoints_in(Path("run"))[0]
    if flags[0] == "--resume" or "--init-from" in flags:
        assert tensors_equal(load(new, full=True)["model"],
                             old["model" if flags[0] == "--resume" else "ema"])


def test_what_cannot_be_loaded_again_is_known_before_the_first_step(train, monkeypatch):
    class Odd(DiT):
        def __init__(self, path: Path = Path(), **arguments):
            super().__init__(**arguments)

    from support.registry import NETWORKS
    monkeypatch.setitem(NETWORKS, "odd", Odd)
    monkeypatch.setitem(train_mnist.MODELS, TINY, dict(TINY_SIZE, path=Path("x")))
    with pytest.raises(UserError, match="step_0000000.pt is damaged or not a checkpoint"):
        train("--steps", 4, "--network", "odd", "--out", "run")
    assert not rows("run")


# ---------------------------------------------------------------- what may change, and what not


def test_without_out_the_newest_run_is_resumed(train, trained):
    for seed in (1, 2):
        train("--steps", 4, "--stop-after", 2, "--seed", seed)
    newest, other = "output/002-glyphs-DiT-Test-7", "output/001-glyphs-DiT-Test-7"
    for path in (*Path(other).iterdir(), Path(other)):
        os.utime(path, (1, 1))
    Path("output/notes").mkdir()
    Path(other, "evaluations.jsonl").write_text("{}\n")                 # newer, but no training
    train("--resume")
    assert len(rows(newest)) == 4 and len(rows(other)) == 2
    train("--steps", 4, "--stop-after", 2, "--out", "output/a-name-of-my-own")
    train("--resume")
    assert len(rows("output/a-name-of-my-own")) == 4


def test_a_checkpoint_file_is_resumed_in_its_folder_or_branches_off(train, trained):
    trained("--steps", 9, "--save-every", 3, "--keep", 9, out="straight")
    shutil.copytree("straight", "run")
    Path("busy").mkdir()
    Path("busy/notes").touch()
    before = files(".")
    third = "run/step_0000003.pt"
    for flags in ((third,), (third, "--out", "straight"), (third, "--out", "busy")):
        assert "holds other work" in refused(train_mnist.main, "--resume", *flags)
    assert files(".") == before
    assert train("--resume", third, "--out", "branch") == 0
    assert same_run("straight", "branch") and same_run("straight", "run")
    killed_in(train_mnist, "train", "--resume", third, "--out", "other")
    assert train("--resume", "other") == 0 and same_run("straight", "other")
    for later in (6, 9):
        Path(f"run/step_000000{later}.pt").unlink()
    assert train("--resume", third) == 0 and same_run("straight", "run")


def test_what_may_change_on_resume(train, trained, capsys):
    trained("--steps", 8, "--stop-after", 4)
    assert train("--resume", "--out", "run", "--steps", 12, "--log-every", 3, "--preview-every", 4,
                 "--save-every", 2, "--device", "cpu", "--keep", 1, "--data-dir", "elsewhere") == 0
    assert "8 steps before, 12 now" in capsys.readouterr().out
    assert [r["step"] for r in rows("run")] == list(range(1, 13))
    assert [p.name for p in checkpoints_in(Path("run"))] == ["step_0000012.pt"]
    before = files("run")
    assert train("--resume", "--out", "run") == train("--resume", "--out", "run", "--steps", 3) == 0
    assert capsys.readouterr().out.count("run is at step 12 already") == 2
    assert files("run") == before


@pytest.mark.parametrize("flag, value, old", [
    ("--lr", 0.5, "0.002"), ("--flip", "", "False"), ("--model", "DiT-Nano/4", TINY),
    ("--dataset", "mnist", "glyphs"), ("--precision", "fp32", "auto"), ("--image-size", 14, "None"),
])
def test_anything_else_given_differently_is_refused_naming_both(train, trained, flag, value, old):
    trained("--steps", 4, "--stop-after", 2)
    before = files("run")
    line = refused(train_mnist.main, "--resume", "--out", "run", flag, *[value] * (value != ""))
    assert all(str(word) in line for word in (flag, old, value or True))
    assert files("run") == before


def test_the_images_may_move_but_not_change(train):
    pets(Path())
    flags = ("--dataset", "folder:pets", "--image-size", 28, "--steps", 4)
    train(*flags, "--out", "straight")
    train(*flags, "--out", "run", "--stop-after", 2)
    Path("elsewhere").mkdir()
    Path("pets").rename("elsewhere/beasts")
    again = ("--resume", "--out", "run", "--dataset", "folder:elsewhere/beasts")
    assert train(*again) == 0
    assert [r["loss"] for r in rows("run")] == [r["loss"] for r in rows("straight")]
    Image.new("L", (28, 28), 7).save("elsewhere/beasts/cat/0.png")
    assert "the data set is not the run's" in refused(train_mnist.main, *again, "--steps", 8)


def test_nothing_to_resume(train, checkpoint):
    state = load(checkpoint, full=True)
    torch.save({k: state[k] for k in ("format", "step", "config", "class_names", "ema")}, "ema.pt")
    Path("notes").mkdir()
    Path("notes/metrics.jsonl").write_text("precious")
    before = files(".")
    for flags, says in [((), "no run to resume"), (("--out", "nowhere"), "resume in nowhere"),
                        (("--out", "notes"), "resume in notes"),
                        (("ema.pt",), "--init-from ema.pt")]:
        assert says in refused(train_mnist.main, "--resume", *flags)
    assert files(".") == before


# ---------------------------------------------------------------- --init-from


@pytest.mark.parametrize("kind", ["a checkpoint", "a run folder", "a state dict", "published"])
def test_a_new_run_starts_from_other_weights(train, checkpoint, capsys, kind):
    """Published: a training checkpoint that pickles an argparse.Namespace."""
    wanted = {n: w.half().float() for n, w in load(checkpoint)["ema"].items()}
    state = {**load(checkpoint, full=True), "ema": {n: w.half() for n, w in wanted.items()}}
    checkpoints.save(checkpoint, state)
    source = dict(zip(("a checkpoint", "a run folder"), (checkpoint, "run"), strict=True)).get(
        kind, "w.pt")
    torch.save(wanted if kind == "a state dict" else dict(
        model={}, ema=state["ema"], opt={}, args=argparse.Namespace(model="DiT-XL/2")), "w.pt")
    train("--steps", 1, "--init-from", source, "--out", "b")
    start = load(Path("b/step_0000000.pt"), full=True)
    assert tensors_equal(start["model"], wanted) and tensors_equal(start["ema"], wanted)
    assert "initialised: none" in capsys.readouterr().out


def test_weights_that_fit_in_part_are_taken_and_the_others_named(train, checkpoint, capsys):
    pets(Path())
    train("--steps", 1, "--dataset", "folder:pets", "--image-size", 28, "--init-from", checkpoint,
          "--out", "b")
    assert "in the file, initialised: cat, dog\n" in capsys.readouterr().out
    first, old = load(Path("b/step_0000000.pt"), full=True)["model"], load(checkpoint)["ema"]
    different = [n for n in first if not tensors_equal(first[n], old[n])]
    assert different == ["y_embedder.embedding_table.weight"]
    for content in ({"some.weight": torch.zeros(3)}, [1, 2]):
        torch.save(content, "w.pt")
        assert "not one tensor fits" in refused(
            train_mnist.main, *FAST, "--steps", 1, "--init-from", "w.pt")


# ---------------------------------------------------------------- nothing is lost


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(train, trained, capsys):
    trained(*NINE, out="straight")
    newest = trained(*NINE)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train("--resume", "--out", "run")
    err = capsys.readouterr().err
    assert "step_0000009.pt is damaged" in err and "taking the checkpoint before it" in err
    assert Path("run/step_0000009.pt.damaged").read_bytes() == content
    assert same_run("straight", "run")
    for path in checkpoints_in(Path("run")):
        path.write_bytes(b"gone")
    before = files("run")
    assert "no valid checkpoint" in refused(train_mnist.main, "--resume", "--out", "run")
    assert files("run") == before


def test_two_processes_in_one_folder_are_refused_and_a_crash_leaves_no_lock(train, checkpoint):
    assert Path("run/lock").exists()            # the file of a run that ended locks nobody out
    lock = lock_folder(Path("run"))
    assert "in use by another process" in refused(train_mnist.main, "--resume", "--out", "run")
    lock.close()
    assert train("--resume", "--out", "run", "--steps", 5) == 0


def limit_files_to(size: int | None) -> None:
    """No file of this process may grow beyond so many bytes: what a full disk is like."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.fixture
def at_step(monkeypatch):
    """at_step({3: function ...}): call it when the EMA of that step is updated."""
    def plan(actions: dict) -> None:
        honest, count = train_mnist.update_ema, 0

        def update_ema(*args):
            nonlocal count
            count += 1
            actions.get(count, lambda: None)()
            honest(*args)

        monkeypatch.setattr(train_mnist, "update_ema", update_ema)

    yield plan
    limit_files_to(None)


def test_a_full_disk_is_told_training_continues_and_the_last_checkpoint_is_intact(
        train, trained, at_step, capsys):
    trained("--steps", 12, out="straight")
    at_step({6: lambda: limit_files_to(20_000), 10: lambda: limit_files_to(None)})
    assert train("--steps", 12, "--out", "run", "--save-every", 3, "--preview-every", 7) == 0
    err = capsys.readouterr().err
    assert "step 6 cannot be written" in err and err.count("training continues") == 2
    assert [p.name for p in checkpoints_in(Path("run"))] == [
        f"step_{k:07d}.pt" for k in (0, 3, 12)]
    assert not list(Path("run").glob(".*")) and same_run("straight", "run")


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(train, monkeypatch):
    honest = checkpoints.save

    def save(path, state):
        if state["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(path, state)

    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(UserError, match="step 4 could not be saved.*step_0000002.pt") as caught:
        train("--steps", 4, "--save-every", 2, "--out", "run")
    assert caught.value.status == 1


def test_a_record_that_cannot_be_written_is_kept_until_it_can_and_never_half_a_row(
        train, trained, at_step, capsys):
    trained("--steps", 12, out="straight")
    path = Path("run/metrics.jsonl")

    def check():
        limit_files_to(None)
        text = path.read_text()
        assert text.endswith("}\n") and text.count("{") == text.count("}") == 2

    at_step({3: lambda: limit_files_to(path.stat().st_size + 30), 9: check})
    train("--steps", 12, "--out", "run", "--log-every", 2)
    assert "metrics.jsonl cannot be written" in capsys.readouterr().err
    assert rows("run") == rows("straight")


# ---------------------------------------------------------------- signals and kills


REAL = ("--dataset", "folder:pets", "--image-size", 28, "--precision", "fp32", "--batch-size", 4,
        "--save-every", 5, "--log-every", 3, "--preview-every", 10_000, "--steps", 100_000,
        "--no-compile", "--out", "run")


def script(*flags, cwd):
    return command("train_mnist.py", *flags, cwd=cwd)


def started(start, folder, *flags):
    """A real run in its own process, after its first few steps."""
    pets(folder)
    process = start(*REAL, *flags, cwd=folder)
    deadline = time.time() + 120
    while len(rows(folder / "run")) < 3:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("start, model, signum, status", [
    (script, "DiT-Nano/7", signal.SIGINT, 130), (Fork, TINY, signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_command_that_continues(train, tmp_path, start, model, signum,
                                                             status):
    process = started(start, tmp_path, "--model", model)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    stopped = int(re.search(r"stopped at step ([\d,]+)", out)[1].replace(",", ""))
    assert "to continue: python train_mnist.py --resume --out run" in out
    assert state_of("run")["step"] == stopped == len(rows("run"))
    assert train("--resume", "--out", "run", "--stop-after", 2) == 0
    assert [r["step"] for r in rows("run")] == list(range(1, stopped + 3))


def test_a_second_ctrl_c_stops_at_once_without_damage(train, tmp_path):
    def slow():
        honest = train_mnist.update_ema
        train_mnist.update_ema = lambda *args: time.sleep(0.3) or honest(*args)

    process = started(functools.partial(Fork, first=slow), tmp_path, "--model", TINY)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped at once" in err and "stopped at step" not in out
    assert state_of("run")["step"] % 5 == 0


@pytest.mark.parametrize("torchrun", [False, True])
def test_what_torchrun_forwards_is_no_second_ctrl_c(train, at_step, monkeypatch, torchrun):
    """Nor is a SIGTERM after a SIGINT."""
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("stopped at once"))
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signals = (signal.SIGINT, signal.SIGTERM, *[signal.SIGINT] * torchrun)
    at_step({2: lambda: [os.kill(os.getpid(), s) for s in signals]})
    assert train("--steps", 5, "--out", "run") == 130 and len(rows("run")) == 2


def kill_and_resume(start, folder, flags, kills: int, seed: int) -> int:
    """SIGKILL a real run at random moments, resuming it each time; returns the last step. No kill
    may lose more than the work since the last checkpoint, and each must leave one that loads."""
    rng, run, last = random.Random(seed), folder / "run", -1
    pets(folder)
    for _ in range(kills):
        before, deadline = files(run), time.time() + 120
        process = start(*(["--resume", "--out", "run"] if checkpoints_in(run) else flags),
                        cwd=folder)
        while set(run.glob("*")) == set(map(Path, before)):     # torch is still being loaded
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.01)
        time.sleep(rng.random() * 1.5)
        process.kill()
        process.communicate()
        steps = [load(path, full=True)["step"] for path in checkpoints_in(run)]
        assert max(steps, default=-1) >= last
        last = max(steps, default=-1)
    process = start("--resume", "--out", "run", "--stop-after", 3, cwd=folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    last = state_of(run)["step"]
    assert [r["step"] for r in rows(run)] == list(range(1, last + 1))
    straight = start(*flags, "--out", "straight", "--stop-after", last, cwd=folder)
    _, err = straight.communicate(timeout=1800)
    assert straight.returncode == 0, err
    assert same_run(folder / "straight", run)
    return last


def test_2_kills(train, tmp_path):
    kill_and_resume(Fork, tmp_path, (*REAL, "--preview-every", 10, "--model", TINY), 2,
                    seed=0)


@pytest.mark.long
def test_100_kills(tmp_path):
    steps = kill_and_resume(script, tmp_path, (*REAL, "--model", "DiT-Nano/7"), 100, seed=1)
    print(f"100 SIGKILLs, 100 resumes: equal to a straight run of {steps} steps, bit for bit")
