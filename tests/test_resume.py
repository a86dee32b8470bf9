"""A run that is stopped, killed or moved continues as if it had never stopped."""

import argparse
import contextlib
import errno
import math
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

import dit
import train_mnist
from conftest import FAST, ROOT, TINY, command, load, tensors_equal
from dit import DiT
from support import checkpoints, components, data
from support.cli import UserError, run_command
from support.folders import checkpoints_in, is_run_folder, lock_folder, read_metrics
from support.run import StopSignals
from tools import export

NINE = ("--steps", 9, "--save-every", 3)
STATE = ("step", "class_names", "ema", "model", "opt", "scaler")


def rows(folder) -> list[dict]:
    return read_metrics(Path(folder) / "metrics.jsonl")


def same_run(a, b) -> bool:
    """Are two runs equal in model, EMA, optimizers and every row of the record, bit for bit?"""
    states = [load(checkpoints_in(Path(folder))[-1]) for folder in (a, b)]
    return rows(a) == rows(b) and all(tensors_equal(states[0][k], states[1][k]) for k in STATE)


# ---------------------------------------------------------------- resume, exactly


class Fork:
    """train_mnist.py in a process of its own, as `command` starts one, without its seconds of
    imports; `first` is called before it."""

    def __init__(self, *argv, cwd, first=None):
        self.out, self.err = (Path(cwd) / f".{name}" for name in ("stdout", "stderr"))
        self.process = multiprocessing.get_context("fork").Process(
            target=self._work, args=([str(a) for a in argv], cwd, first))
        self.process.start()

    def _work(self, argv, cwd, first) -> None:
        os.chdir(cwd)
        for number, path in ((1, self.out), (2, self.err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        if first is not None:
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


def killed_in(owner, name: str, *argv) -> None:
    """Run train_mnist.py in a process that is killed where it calls owner.name."""
    def first():
        setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))

    process = Fork(*argv, cwd=Path.cwd(), first=first)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, out + err


# 40 steps are more than three epochs of 100 images by batches of 8
@pytest.mark.parametrize("optimizer, stop, save_every", [
    ("muon", 20, 1000),         # half-way, the checkpoint made by the stop alone
    ("muon", 7, 1000),          # in the middle of an epoch
    ("muon", 25, 5),            # at a checkpoint boundary; 200 images: an epoch's end as well
    ("muon", 13, 10),           # behind one, and behind a log interval
    ("muon", 1, 1), ("muon", 39, 1000),
    ("adamw", 20, 1000), ("adamw", 13, 10),
])
def test_stopped_and_resumed_equals_straight(train, trained, optimizer, stop, save_every):
    flags = ("--steps", 40, "--optimizer", optimizer)
    trained(*flags, out="straight")
    assert train(*flags, "--save-every", save_every, "--out", "run", "--stop-after", stop) == 0
    assert load(checkpoints_in(Path("run"))[-1])["step"] == stop
    assert train("--resume", "--out", "run") == 0
    assert [r["step"] for r in rows("run")] == list(range(1, 41))
    assert same_run("straight", "run")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_scale_of_fp16_survives_stop_and_resume(train, optimizer, monkeypatch):
    """With a scale that overflows and soon grows again, on both sides of the stop."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(
        *args, **kwargs, init_scale=2.0**24, growth_interval=4))
    flags = ("--steps", 24, "--optimizer", optimizer, "--precision", "fp16")
    train(*flags, "--out", "straight")
    train(*flags, "--out", "run", "--stop-after", 10)
    middle = load("run/step_0000010.pt")["scaler"]
    assert 0 < middle["scale"] < 2.0**24
    train("--resume", "--out", "run")
    assert same_run("straight", "run")
    norms = [row["grad_norm"] for row in rows("run")]
    assert not all(map(math.isfinite, norms[:10])) and any(map(math.isfinite, norms[10:]))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_often_equals_straight(train, trained, optimizer):
    flags = ("--steps", 40, "--optimizer", optimizer)
    trained(*flags, out="straight")
    train(*flags, "--out", "run", "--stop-after", 3)
    for steps in (5, 7, 9, 11, 13):
        train("--resume", "--out", "run", "--stop-after", steps)
    assert same_run("straight", "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_resumed_equals_straight_to_rounding(train):
    flags = ("--steps", 20, "--device", "cuda")
    train(*flags, "--out", "a")
    train(*flags, "--out", "b", "--stop-after", 7)
    train("--resume", "--out", "b")
    a, b = ([r["loss"] for r in rows(folder)] for folder in "ab")
    assert b == pytest.approx(a, rel=1e-3)


def test_rows_behind_the_checkpoint_are_cut(train, trained):
    trained("--steps", 10, out="straight")
    trained("--steps", 10, "--stop-after", 6)
    with open("run/metrics.jsonl", "a") as file:        # a kill: later rows, and half a line
        file.write('{"step": 7, "loss": 9.0}\n{"step": 8, "loss": 9.0}\n{"step": 9, "lo')
    train("--resume", "--out", "run")
    assert same_run("straight", "run")


def test_without_out_the_newest_run_is_resumed_and_named(train, capsys):
    for seed in (1, 2):
        train("--steps", 4, "--stop-after", 2, "--seed", seed)
    newest, other = "output/002-glyphs-DiT-Test-7", "output/001-glyphs-DiT-Test-7"
    for path in (*Path(other).iterdir(), Path(other)):
        os.utime(path, (1, 1))
    Path("output/notes").mkdir()
    Path("output/notes/todo.txt").write_text("no run")
    Path("output/empty").mkdir()
    train("--resume")
    assert f"resuming {newest} at step 2\n" in capsys.readouterr().out
    assert len(rows(newest)) == 4 and len(rows(other)) == 2
    train("--steps", 4, "--stop-after", 2, "--out", "output/a-name-of-my-own")
    train("--resume")
    assert len(rows("output/a-name-of-my-own")) == 4
    shutil.copytree(other, "output/copied", copy_function=shutil.copy)      # as `cp -r`
    train("--resume")
    assert len(rows("output/copied")) == 4 and len(rows(other)) == 2


def test_a_run_killed_between_config_and_first_checkpoint_starts_with_its_recipe(
        train, trained, capsys):
    trained("--steps", 4, "--lr", 0.01, out="straight")
    killed_in(checkpoints, "save", *FAST, "--steps", 4, "--lr", 0.01, "--out", "output/001-x")
    folder = Path("output/001-x")
    Path(folder, ".step_0000000.pt.123.tmp").write_bytes(b"half")
    assert Path(folder, "config.json").is_file() and not checkpoints_in(folder)
    with pytest.raises(UserError, match="output/001-x already holds a run"):
        train("--steps", 4, "--out", folder)
    with pytest.raises(UserError, match="--lr 0.5 differs from the checkpoint's 0.01, and a "
                                        "resumed run keeps its recipe: leave --lr out, or start a "
                                        "new run with --init-from CKPT"):
        train("--resume", "--lr", 0.5)
    capsys.readouterr()
    assert train("--resume") == 0
    assert "output/001-x has no checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert same_run("straight", folder)


def test_a_run_killed_before_its_config_is_none_and_its_folder_is_free(train, trained):
    trained("--steps", 4, out="straight")
    from support import run
    flags = (*FAST, "--steps", 4, "--out", "run")
    killed_in(run, "atomic_write", *flags)
    with pytest.raises(UserError, match="no run to resume in run"):
        train("--resume", "--out", "run")
    assert train(*flags) == 0 and same_run("straight", "run")


@pytest.mark.parametrize("flags", [
    ("--init-from", "first/step_0000003.pt", *FAST, "--steps", 4),
    ("--resume", "first/step_0000003.pt", "--steps", 5),
])
def test_where_the_weights_come_from_survives_a_kill_before_the_first_checkpoint(
        train, trained, flags):
    """config.json does not hold it: so the folder is no run before there is a checkpoint."""
    trained("--steps", 3, out="first")
    flags = (*flags, "--out", "b")
    killed_in(checkpoints, "save", *flags)
    with pytest.raises(UserError, match="no run to resume in b"):
        train("--resume", "--out", "b")
    train_mnist.main([*map(str, flags), "--stop-after", "1"])
    old, new = load("first/step_0000003.pt"), load(checkpoints_in(Path("b"))[0])
    assert tensors_equal(new["model"], old["model" if "--resume" in flags else "ema"])


def test_a_new_run_can_be_resumed_from_step_0(train, trained):
    trained("--steps", 4, out="straight")
    killed_in(train_mnist, "train", *FAST, "--steps", 4, "--out", "run")
    train("--resume", "--out", "run")
    assert same_run("straight", "run")


def test_what_cannot_be_loaded_again_is_known_before_the_first_step(train, monkeypatch):
    class Odd(DiT):
        def __init__(self, widths: tuple = (1, 2), **arguments):
            super().__init__(**arguments)

    monkeypatch.setitem(components.NETWORKS, "odd", Odd)
    with pytest.raises(UserError, match="step_0000000.pt is not a valid checkpoint.*plain values"):
        train("--steps", 4, "--network", "odd", "--out", "run")
    assert not rows("run")


def test_a_checkpoint_file_is_resumed_in_its_folder_or_branches_off(train, trained):
    trained(*NINE, out="straight")
    shutil.copytree("straight", "run")
    with pytest.raises(UserError, match="later work"):
        train("--resume", "run/step_0000003.pt")
    with pytest.raises(UserError, match="already holds a run"):
        train("--resume", "run/step_0000003.pt", "--out", "straight")
    assert train("--resume", "run/step_0000003.pt", "--out", "branch") == 0
    assert same_run("straight", "branch") and same_run("straight", "run")
    for later in (6, 9):
        Path(f"run/step_000000{later}.pt").unlink()
    assert train("--resume", "run/step_0000003.pt") == 0
    assert same_run("straight", "run")


@pytest.mark.parametrize("flag, value", [
    ("--log-every", 3), ("--preview-every", 4), ("--save-every", 2), ("--device", "cpu"),
    ("--keep", 1), ("--grad-accum", 2), ("--data-dir", "elsewhere"),
])
def test_what_may_change_on_resume(train, trained, flag, value):
    trained("--steps", 8, "--stop-after", 4)
    assert train("--resume", "--out", "run", flag, value) == 0
    assert len(rows("run")) == 8


def test_a_longer_schedule_is_said_and_changes_what_follows(train, trained, capsys):
    trained("--steps", 8)
    capsys.readouterr()
    train("--resume", "--out", "run")
    out, err = capsys.readouterr()
    assert out == "run is complete at step 8: a larger --steps continues it\n" and not err
    train("--resume", "--out", "run", "--steps", 12)
    assert "8 steps before, 12 now" in capsys.readouterr().out
    assert [r["step"] for r in rows("run")] == list(range(1, 13))
    assert rows("run")[8]["lr"] > rows("run")[7]["lr"]


def test_fewer_steps_than_were_made_are_said(train, trained, capsys):
    trained("--steps", 8, "--stop-after", 4)
    assert train("--resume", "--out", "run", "--steps", 3) == 0
    assert "run is at step 4 already, beyond --steps 3" in capsys.readouterr().out


def test_a_folder_of_images_may_move_and_have_another_name(train):
    for name in ("cat", "dog"):
        Path("pets", name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (28, 28), 40 * i).save(f"pets/{name}/{i}.png")
    flags = ("--dataset", "folder:pets", "--image-size", 28, "--steps", 4)
    train(*flags, "--out", "straight")
    train(*flags, "--out", "run", "--stop-after", 2)
    Path("elsewhere").mkdir()
    Path("pets").rename("elsewhere/beasts")
    assert train("--resume", "--out", "run", "--dataset", "folder:elsewhere/beasts") == 0
    assert [r["loss"] for r in rows("run")] == [r["loss"] for r in rows("straight")]
    Image.new("L", (28, 28), 7).save("elsewhere/beasts/cat/0.png")
    with pytest.raises(UserError, match="data set is not the checkpoint's"):
        train("--resume", "--out", "run", "--steps", 8, "--dataset", "folder:elsewhere/beasts")


@pytest.mark.parametrize("flag, value, old", [
    ("--lr", "0.5", "0.002"), ("--batch-size", "16", "8"), ("--seed", "3", "0"),
    ("--model", "DiT-Nano/4", TINY), ("--prediction", "eps", train_mnist.RECIPE["prediction"]),
    ("--dataset", "mnist", "glyphs"), ("--weighting", "min-snr", "v"), ("--flip", None, "False"),
    ("--ema-decay", "0.5", "0.995"), ("--label-dropout", "0", "0.1"), ("--clip", "3", "1.0"),
    ("--timesteps", "uniform", train_mnist.RECIPE["timesteps"]), ("--noise-mean", "-1.5", "0.4"),
    ("--optimizer", "adamw", "muon"), ("--precision", "fp32", "auto"),
    ("--image-size", "14", "None"),
])
def test_anything_else_given_differently_is_refused_naming_both(train, trained, flag, value, old):
    trained("--steps", 4, "--stop-after", 2)
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    with pytest.raises(UserError) as caught:
        train("--resume", "--out", "run", flag, *(() if value is None else (value,)))
    assert all(word in str(caught.value) for word in (flag, old, value or "True"))
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_other_data_under_the_same_name_is_refused(train, trained, monkeypatch):
    trained("--steps", 4, "--stop-after", 2)
    draw = data.draw_glyphs
    monkeypatch.setattr(data, "draw_glyphs", lambda count, seed=0: draw(count, seed + 1))
    with pytest.raises(UserError, match="data set is not the checkpoint's"):
        train("--resume", "--out", "run")


def test_nothing_to_resume(train):
    with pytest.raises(UserError, match="no run to resume in output: start one"):
        train("--resume")
    with pytest.raises(UserError, match="no run to resume in nowhere"):
        train("--resume", "--out", "nowhere")
    Path("notes").mkdir()
    Path("notes/metrics.txt").write_text("precious")
    with pytest.raises(UserError, match="no run to resume in notes"):
        train("--resume", "--out", "notes")
    assert [p.name for p in Path("notes").iterdir()] == ["metrics.txt"]


def test_a_record_without_a_checkpoint_is_never_started_over(train, checkpoint):
    for path in checkpoint.parent.glob("step_*.pt"):
        path.unlink()
    before = Path("run/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="a record of losses but no checkpoint"):
        train("--resume", "--out", "run")
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_what_else_resume_may_be_given_by_mistake(train, checkpoint):
    with pytest.raises(UserError, match="run is a folder: --resume --out run continues"):
        train("--resume", "run")
    checkpoints.save(Path("shared.pt"), checkpoints.shared(load(checkpoint)))
    with pytest.raises(UserError, match="the EMA weights alone.*--init-from shared.pt"):
        train("--resume", "shared.pt")


def rewritten(path: Path, change) -> None:
    state = load(path)
    change(state["config"])
    checkpoints.save(path, {k: v for k, v in state.items() if k != "format"})


def test_checkpoints_from_before_a_flag_was_there_are_resumed(train, trained):
    """The flag's value is then what was the only way: for some, not the default of today."""
    flags = ("--timesteps", "uniform", "--prediction", "v", "--steps", 4)
    trained(*flags, out="straight")
    path = trained(*flags, "--stop-after", 2)

    def as_it_was(config):
        for key in ("timesteps", "weighting", "noise_mean", "noise_std", "flip", "network",
                    "process", "logger"):
            del config["recipe"][key]
        del config["network"], config["process"], config["diffusion"]["weighting"]
        config["prediction"] = config["diffusion"].pop("prediction")

    rewritten(path, as_it_was)
    train("--resume", "--out", "run")
    assert same_run("straight", "run")


def test_a_recipe_of_a_later_version_is_refused_in_one_line(train, trained):
    rewritten(trained("--steps", 4, "--stop-after", 2),
              lambda config: config["recipe"].update(temperature=0.3))
    before = files("run")
    with pytest.raises(UserError, match="settings that this version does not know: .*temperature"):
        train("--resume", "--out", "run")
    assert files("run") == before


@pytest.mark.parametrize("key, value", [
    ("steps", "many"), ("lr", [1]), ("flip", 3), ("model", "DiT-Z/2"), ("seed", True),
    ("batch_size", -1), ("optimizer", "x\n" * 1000)])
def test_a_recipe_that_nobody_could_have_typed_is_refused_in_one_line(train, trained, key, value):
    rewritten(trained("--steps", 4, "--stop-after", 2),
              lambda config: config["recipe"].update({key: value}))
    before = files("run")
    with pytest.raises(UserError, match="recorded recipe is not valid") as caught:
        train("--resume", "--out", "run")
    assert files("run") == before and len(str(caught.value)) < 300


# ---------------------------------------------------------------- --init-from


@pytest.mark.parametrize("of_run", [lambda path: path, lambda path: path.parent],
                         ids=["a checkpoint", "a run folder"])
def test_a_new_run_starts_from_the_weights_of_another(train, checkpoint, capsys, of_run):
    still = ("--steps", 1, "--lr", 0, "--muon-lr", 0)
    assert train(*still, "--init-from", of_run(checkpoint), "--out", "b") == 0
    assert tensors_equal(load("b/step_0000001.pt")["model"], load(checkpoint)["ema"])
    assert "(none: all fit)" in capsys.readouterr().out


def test_a_new_run_starts_from_an_exported_folder(train, checkpoint):
    pytest.importorskip("safetensors", reason="needs the package safetensors")
    assert export.main([str(checkpoint), "exported", "--to", "safetensors"]) == 0
    assert train("--steps", 1, "--init-from", "exported", "--out", "b") == 0
    found, wanted = load("b/step_0000000.pt")["model"], load(checkpoint)["ema"]
    assert tensors_equal(found, {name: w.half().float() for name, w in wanted.items()})


def test_a_folder_without_weights_is_no_start(train):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no checkpoint \(step_\*.pt or model.safe"):
        train("--steps", 1, "--init-from", "empty")


def test_the_checkpoint_that_ships_gives_its_weights_model_and_objective(train, monkeypatch):
    """Its recipe lacks flags that there are by now."""
    monkeypatch.setattr(train_mnist, "Preview", lambda *_: lambda *_: None)     # seconds
    path = ROOT / "assets" / "mnist.pt"
    shipped = checkpoints.load(path)
    assert train_mnist.main(["--init-from", str(path), "--dataset", "glyphs", "--batch-size", "2",
                             "--steps", "1", "--out", "b"]) == 0
    new = load("b/step_0000000.pt")
    assert tensors_equal(new["model"], {n: w.float() for n, w in shipped["ema"].items()})
    assert new["config"]["model"] == shipped["config"]["model"]
    assert new["config"]["diffusion"] == shipped["config"]["diffusion"]


def test_weights_with_other_classes_fit_but_for_the_label_table(train, checkpoint, capsys):
    for name in ("cat", "dog", "emu"):
        Path("pets", name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (28, 28), 40 * i).save(f"pets/{name}/{i}.png")
    train("--steps", 1, "--dataset", "folder:pets", "--image-size", 28, "--init-from", checkpoint,
          "--out", "b")
    out = capsys.readouterr().out
    assert "y_embedder.embedding_table.weight: (11, 16) in the file, (4, 16) here" in out
    first, old = load("b/step_0000000.pt")["model"], load(checkpoint)["ema"]
    different = [n for n in first if not tensors_equal(first[n], old[n])]
    assert different == ["y_embedder.embedding_table.weight"]


@pytest.mark.parametrize("kind", ["bare", "published"])
def test_weights_of_the_published_code(train, kind):
    """A bare state dict, and a training checkpoint that pickles an argparse.Namespace."""
    torch.manual_seed(3)
    weights = DiT(**dit.MODELS[TINY]).state_dict()
    weights["blocks.0.attn.qkv.bias"] += 0.5
    args = argparse.Namespace(model="DiT-XL/2")
    torch.save(weights if kind == "bare" else
               {"model": {}, "ema": weights, "opt": {}, "args": args}, "w.pt")
    train("--steps", 1, "--init-from", "w.pt", "--out", "b")
    assert tensors_equal(load("b/step_0000000.pt")["model"], weights)


def test_weights_that_do_not_fit_at_all_are_refused(train):
    torch.save({"some.weight": torch.zeros(3)}, "w.pt")
    with pytest.raises(UserError, match="not one tensor fits"):
        train("--steps", 1, "--init-from", "w.pt")
    torch.save([1, 2], "w.pt")
    with pytest.raises(UserError, match="holds no weights"):
        train("--steps", 1, "--init-from", "w.pt")


# ---------------------------------------------------------------- nothing is lost


def files(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_resume_touches_nothing_but_a_run_of_its_own(train, checkpoint):
    """A checkpoint in a folder of somebody's other files: neither cleared nor written into."""
    mine = {".vim.swap.tmp": "draft", "metrics.jsonl": "mine\n", "config.json": "{}"}
    for folder in ("downloads", "busy"):
        Path(folder).mkdir()
        for name, text in mine.items():
            Path(folder, name).write_text(text)
    Path("busy/metrics.jsonl").unlink()
    Path("busy/config.json").unlink()
    for name in ("ck.pt", "step_0000003.pt"):
        shutil.copy(checkpoint, Path("downloads", name))
    before = files("downloads") | files("busy")
    for name in ("ck.pt", "step_0000003.pt"):
        with pytest.raises(UserError, match=f"{name} is not in a run folder: --out"):
            train("--resume", f"downloads/{name}", "--steps", 5)
    with pytest.raises(UserError, match="busy is not empty"):
        train("--resume", checkpoint, "--steps", 5, "--out", "busy")
    assert files("downloads") | files("busy") == before
    assert train("--resume", "downloads/ck.pt", "--steps", 5, "--out", "branch") == 0
    Path("run/.vim.swap.tmp").write_text("draft")
    Path("run/.step_0000004.pt.77.tmp").write_text("half")
    train("--resume", "--out", "run", "--steps", 5)
    assert Path("run/.vim.swap.tmp").exists() and not Path("run/.step_0000004.pt.77.tmp").exists()


def test_a_config_that_is_not_of_a_run_is_left_alone(train):
    Path("web").mkdir()
    Path("web/config.json").write_text("precious")
    with pytest.raises(UserError, match="web/config.json is not the config.json of a"):
        train("--resume", "--out", "web")
    assert Path("web/config.json").read_text() == "precious"


def test_a_branch_can_be_resumed_from_its_first_moment(train, trained):
    trained(*NINE, out="straight")
    with pytest.raises(UserError, match="--lr 3.0 differs"):
        train("--resume", "straight/step_0000003.pt", "--out", "branch", "--lr", 3)
    killed_in(train_mnist, "train", "--resume", "straight/step_0000003.pt", "--out", "branch")
    assert train("--resume", "--out", "branch") == 0
    assert same_run("straight", "branch")


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(5, "EIO")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_put_aside(train, checkpoint, monkeypatch,
                                                               error):
    def load(*_, **__):
        raise error

    before = files("run")
    with monkeypatch.context() as m:
        m.setattr(torch, "load", load)
        with pytest.raises(UserError, match="cannot be read"):
            train("--resume", "--out", "run", "--steps", 5)
    assert files("run") == before


def test_a_run_that_was_evaluated_is_not_the_newest_for_that(train, trained, capsys):
    for name in ("001-a", "002-b"):
        trained("--steps", 4, "--stop-after", 2, out=f"output/{name}")
    for path in Path("output").glob("*/*"):
        os.utime(path, (1e9, 1e9 + int("002-b" in str(path))))
    Path("output/001-a/evaluations.jsonl").write_text("{}\n")
    capsys.readouterr()
    train("--resume")
    assert "resuming output/002-b" in capsys.readouterr().out


def test_the_command_to_continue_names_the_device_that_was_given(train, capsys):
    train("--steps", 4, "--stop-after", 2, "--out", "run", "--device", "cpu")
    assert "--resume --out run --device cpu\n" in capsys.readouterr().out
    train("--steps", 4, "--stop-after", 2, "--out", "other")
    assert "--resume --out other\n" in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_taken(train, trained, capsys):
    trained(*NINE, out="straight")
    trained(*NINE)
    newest = Path("run/step_0000009.pt")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train("--resume", "--out", "run")
    captured = capsys.readouterr()
    assert "step_0000009.pt" in captured.err and "taking the checkpoint before it" in captured.err
    assert "resuming run at step 6" in captured.out
    assert same_run("straight", "run")


def test_with_every_checkpoint_damaged_nothing_is_started_over(train, checkpoint):
    for path in checkpoints_in(Path("run")):
        path.write_bytes(b"gone")
    with pytest.raises(UserError, match="every checkpoint in run is damaged"):
        train("--resume", "--out", "run")


def test_two_processes_in_one_folder_are_refused_and_a_crash_leaves_no_lock(train, checkpoint):
    assert Path("run/lock").exists()            # the file of a run that ended locks nobody out
    lock = lock_folder(Path("run"))
    with pytest.raises(UserError, match="in use by another process"):
        train("--resume", "--out", "run", "--steps", 5)
    lock.close()
    assert train("--resume", "--out", "run", "--steps", 5) == 0


def test_a_full_disk_is_told_training_continues_and_the_last_checkpoint_is_intact(
        train, trained, capsys):
    trained("--steps", 12, out="straight")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    honest = checkpoints.save

    def save(path, state):          # from step 6 to 9 no file may grow beyond 20 kB
        if 6 <= state["step"] <= 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            honest(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(checkpoints, "save", save)
        assert train("--steps", 12, "--out", "run", "--save-every", 3) == 0
    err = capsys.readouterr().err
    assert "step 6 cannot be saved" in err and "training continues" in err
    assert "the last checkpoint is run/step_0000003.pt" in err
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
    with pytest.raises(UserError, match="step 4 could not be saved.*step_0000002.pt"):
        train("--steps", 4, "--save-every", 2, "--out", "run")


def test_a_folder_that_vanishes_is_told_and_made_again(train, monkeypatch, capsys):
    honest, count = train_mnist.update_ema, 0

    def update_ema(*args):
        nonlocal count
        count += 1
        if count == 5:
            shutil.rmtree("run")
        honest(*args)

    monkeypatch.setattr(train_mnist, "update_ema", update_ema)
    assert train("--steps", 12, "--out", "run", "--log-every", 2, "--save-every", 8) == 0
    assert "training continues" in capsys.readouterr().err
    assert load("run/step_0000012.pt")["step"] == 12


def test_a_record_that_cannot_be_written_is_kept_until_it_can(
        train, trained, monkeypatch, capsys):
    trained("--steps", 12, out="straight")
    honest, count = train_mnist.update_ema, 0

    def update_ema(*args):          # a folder in the file's place, from step 3 to step 9
        nonlocal count
        count += 1
        path = Path("run/metrics.jsonl")
        if count == 3:
            path.rename("run/aside")
            path.mkdir()
        elif count == 9:
            path.rmdir()
            Path("run/aside").rename(path)
        honest(*args)

    monkeypatch.setattr(train_mnist, "update_ema", update_ema)
    train("--steps", 12, "--out", "run", "--log-every", 2)
    assert "metrics.jsonl cannot be written" in capsys.readouterr().err
    assert rows("run") == rows("straight")


def test_half_a_row_is_never_left(train, trained, monkeypatch, capsys):
    trained("--steps", 12, out="straight")
    before, count, honest = resource.getrlimit(resource.RLIMIT_FSIZE), 0, train_mnist.update_ema

    def update_ema(*args):          # room for 30 bytes more, from step 3 to step 5
        nonlocal count
        count += 1
        path = Path("run/metrics.jsonl")
        if count == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, before[1]))
        elif count == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            text = path.read_text()
            assert text.endswith("}\n") and text.count("{") == text.count("}") == 2
        honest(*args)

    monkeypatch.setattr(train_mnist, "update_ema", update_ema)
    train("--steps", 12, "--out", "run", "--log-every", 2)
    assert "metrics.jsonl cannot be written" in capsys.readouterr().err
    assert rows("run") == rows("straight")


# ---------------------------------------------------------------- signals


REAL = ("--dataset", "folder:pets", "--image-size", "28", "--precision", "fp32", "--batch-size",
        "4", "--save-every", "5", "--log-every", "3", "--preview-every", "10", "--steps", "100000",
        "--no-compile", "--out", "run")
NANO = ("--model", "DiT-Nano/7")


def pets(folder) -> None:
    """A data set that is read at once, so that most of a run's time is training and saving."""
    for name in ("cat", "dog"):
        (folder / "pets" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (28, 28), 10 * i).save(folder / "pets" / name / f"{i}.png")


def started(start, folder, *flags):
    """A real run in its own process, after its first few steps."""
    pets(folder)
    process = start(*REAL, *flags, cwd=folder)
    deadline = time.time() + 120
    while len(rows(folder / "run")) < 3:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)
    return process


def script(*flags, cwd):
    return command("train_mnist.py", *flags, cwd=cwd)


@pytest.mark.parametrize("start, signum, status", [
    (script, signal.SIGINT, 130), (Fork, signal.SIGTERM, 143)])
def test_a_signal_saves_and_names_the_command_that_continues(train, tmp_path, start, signum,
                                                             status):
    process = started(start, tmp_path, *NANO)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    stopped = int(re.search(r"stopped at step ([\d,]+)", out)[1].replace(",", ""))
    assert "to continue: python train_mnist.py --resume --out run" in out
    state = load(checkpoints_in(tmp_path / "run")[-1])
    assert state["step"] == stopped == len(rows(tmp_path / "run"))
    again = Fork("--resume", "--out", "run", "--stop-after", "2", cwd=tmp_path)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert [r["step"] for r in rows(tmp_path / "run")] == list(range(1, stopped + 3))


def test_a_second_ctrl_c_stops_at_once_without_damage(train, tmp_path):
    process = started(Fork, tmp_path, *NANO, "--batch-size", 200, "--log-every", 1)  # slow
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped at once" in err and "stopped at step" not in out
    assert load(checkpoints_in(tmp_path / "run")[-1])["step"] % 5 == 0


def test_under_torchrun_a_forwarded_signal_is_no_second_ctrl_c(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("stopped at once"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopSignals() as signals:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(signals, "_since", time.monotonic() - 5)
        with pytest.raises(pytest.fail.Exception):
            os.kill(os.getpid(), signal.SIGINT)         # this one the user meant


def test_without_torchrun_sigterm_after_ctrl_c_is_no_second_ctrl_c(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("stopped at once"))
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGINT


def written(folder) -> dict:
    found = {}
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):        # a temporary file, in its place by now
            found[path.name] = path.stat().st_mtime_ns
    return found


def kill_and_resume(start, folder, flags, kills: int, seed: int) -> int:
    """SIGKILL a real run at random moments, resuming it each time; returns the last step. No kill
    may lose more than the work since the last checkpoint, and each must leave one that loads."""
    rng, run, last = random.Random(seed), folder / "run", -1
    pets(folder)
    for _ in range(kills):
        before, deadline = written(run), time.time() + 120
        process = start(*(["--resume", "--out", "run"] if is_run_folder(run) else flags),
                        cwd=folder)
        while written(run) == before:               # python and torch are still being loaded
            assert process.poll() is None and time.time() < deadline, process.communicate()
            time.sleep(0.01)
        time.sleep(rng.random() * 1.5)
        process.kill()
        process.communicate()
        steps = [load(path)["step"] for path in checkpoints_in(run)]
        assert max(steps, default=-1) >= last
        last = max(steps, default=-1)
    process = start("--resume", "--out", "run", "--stop-after", 3, cwd=folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    state = load(checkpoints_in(run)[-1])
    assert [r["step"] for r in rows(run)] == list(range(1, state["step"] + 1))
    return state["step"]


def equals_straight(start, folder, flags, steps: int) -> bool:
    """The killed and resumed run against one that ran straight to the same step."""
    straight = start(*flags, "--out", "straight", "--stop-after", steps, cwd=folder)
    _, err = straight.communicate(timeout=1800)
    assert straight.returncode == 0, err
    return same_run(folder / "straight", folder / "run")


def test_2_kills(train, tmp_path):
    flags = (*REAL, "--model", TINY)
    assert equals_straight(Fork, tmp_path, flags, kill_and_resume(Fork, tmp_path, flags, 2, seed=0))


@pytest.mark.long
def test_100_kills(tmp_path):
    flags = (*REAL, *NANO)
    steps = kill_and_resume(script, tmp_path, flags, 100, seed=1)
    assert equals_straight(script, tmp_path, flags, steps)
    print(f"100 SIGKILLs, 100 resumes: equal to a straight run of {steps} steps, bit for bit")
