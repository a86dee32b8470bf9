"""Commands: what they refuse, in one line and before any work; files that are written completely or
not at all; --config; which file may import which."""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
import train_mnist
from conftest import ALONE, FAST, ROOT, command, refused, tensors_equal
from support.checkpoint import checkpoints_in, load, read_metrics
from support.command import UserError, atomic_write, check_target, printable, run_command


@pytest.mark.parametrize("error, words, status", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory", 1),
    (MemoryError(), "error: out of memory", 1),
    (torch.OutOfMemoryError("CUDA out of memory\nand more"), "error: out of memory", 1),
    (OSError(36, "File name too long", "xxx"), "error: xxx: File name too long", 2),
    (UserError("said\nin \x1b[31m red", status=1), "error: said\\nin \\x1b[31m red", 1),
    (KeyboardInterrupt(), "error: interrupted", 130),
    (RuntimeError("a bug"), None, None),
])
def test_what_a_command_says_when_it_fails(capsys, error, words, status):
    def main():
        raise error

    if words is None:                                   # is not hidden
        with pytest.raises(RuntimeError, match="a bug"):
            run_command(main)
        return
    with pytest.raises(SystemExit) as end:
        run_command(main)
    err = capsys.readouterr().err
    assert end.value.code == status and err.startswith(words) and err.count("\n") == 1


@pytest.mark.parametrize("flags, says", [
    (["--lr", "nan"], "--lr"), (["--ema-decay", "1"], "--ema-decay"),
    (["--bach-size", "3"], "--bach-size"), (["--model", "DiT-S/8"], "not divide image size 28"),
    (["--dataset", "minst"], "mnist"), (["--dataset", "folder:nowhere"], "nowhere"),
    (["--image-size", "29"], "does not divide"), (["--device", "cuda:77"], "--device cuda:77"),
    (["--device", "tpu"], "--device tpu"), (["--out", "taken"], "taken"),
    (["--out", "full"], "full is not empty: --resume"),
    (["--optimizer", "adamw", "--muon-lr", "0.1"], "--muon-lr has no effect"),
    (["--timesteps", "uniform", "--noise-mean", "1"], "--noise-mean has no effect"),
    (["--init-from", "none.pt"], "none.pt does not exist"), (["--resume"], "no run to resume"),
    (["--resume", "none.pt"], "none.pt does not exist"), (["--resume", "full"], "no checkpoint"),
    (["--config", "none.json"], "none.json is not the config.json of a run"),
    (["--config", "taken"], "taken is not the config.json of a run"),
    (["--resume", "--init-from", "x.pt"], "give one"),
])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(train, flags, says):
    Path("taken").write_text("mine")
    Path("full").mkdir()
    Path("full/notes").touch()
    fast = () if {"--resume", "--config"} & set(flags) else (*FAST, "--steps", 2)
    assert says in refused(train_mnist.main, *fast, *flags)
    assert sorted(str(p) for p in Path().rglob("*")) == ["full", "full/notes", "taken"]
    assert Path("taken").read_text() == "mine"


def test_a_script_says_it_on_standard_error_and_exits_with_2(tmp_path):
    process = command("train_mnist.py", "--batch-size", "many\x1b[0m", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: ") and "--batch-size" in err and err.count("\n") == 1
    assert "\x1b" not in err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files


def test_a_file_is_synced_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    path, done = tmp_path / "new" / "x", []
    for name in ("fsync", "replace"):
        honest = getattr(os, name)

        def spy(*args, name=name, honest=honest):
            kind = "folder" if os.path.isdir(f"/proc/self/fd/{args[0]}") else "file"
            done.append((name, kind if name == "fsync" else path.exists()))
            return honest(*args)

        monkeypatch.setattr(os, name, spy)
    atomic_write(path, lambda file: file.write(b"text"))
    assert path.read_bytes() == b"text"
    assert done[:2] == [("fsync", "file"), ("replace", False)] and done[2][0] == "fsync"
    assert not os.path.isdir("/proc/self/fd") or done[2] == ("fsync", "folder")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "EIO"), RuntimeError("unexpected pos")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(OSError):                        # torch.save: RuntimeError on a full disk
        atomic_write(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_targets_are_checked_before_any_work(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "dangling.png").symlink_to("nowhere")
    check_target(tmp_path / "new" / "b.PNG", suffix=".png")
    check_target(tmp_path / "a.png", force=True)
    for path, says in [(tmp_path, "is a folder"), (tmp_path / "a.png", "--force overwrites it"),
                       (tmp_path / "b.gif", "does not end in .png"),
                       (tmp_path / "dangling.png", "exists"),
                       (tmp_path / "a.png" / "b.png", "cannot be made")]:
        with pytest.raises(UserError, match=says):
            check_target(path, suffix=None if path == tmp_path else ".png")
    assert printable("a\tb") == "a\\tb" and len(printable("c" * 3000)) < 2010


def test_no_code_in_a_file_is_run(train, checkpoint, monkeypatch):
    """Every torch.load of a resumed run, of --init-from and of sample.py has weights_only=True."""
    seen, honest = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: seen.append(
        options.get("weights_only")) or honest(*args, **options))
    train("--resume", "--out", "run", "--steps", 4)
    train("--steps", 1, "--init-from", checkpoint)
    sample.main(["run", "--labels", "3", "--out", "x.png"])
    assert len(seen) >= 3 and set(seen) == {True}


# ---------------------------------------------------------------- --config


def test_config_repeats_a_run_and_flags_override_it(train, trained):
    trained("--steps", 4, "--lr", 0.01, "--prediction", "eps", "--seed", 3, out="first")
    assert train("--config", "first/config.json", "--out", "again") == 0
    first, again = (load(checkpoints_in(Path(f))[-1], full=True) for f in ("first", "again"))
    assert tensors_equal(first["model"], again["model"]) and first["config"] == again["config"]
    assert read_metrics(Path("first")) == read_metrics(Path("again"))
    assert train("--config", "first/config.json", "--out", "other", "--lr", 0.5,
                 "--stop-after", 1) == 0
    recipe = json.loads(Path("other/config.json").read_text())["recipe"]
    assert recipe == {**first["config"]["recipe"], "lr": 0.5}
    assert train("--resume", "--out", "other") == 0     # without the file
    assert len(read_metrics(Path("other"))) == 4


# ---------------------------------------------------------------- the files of the project


LESSON = ("diffusion.py", "dit.py", "sample.py", "train_mnist.py")
FOLDERS = ("support", "tools", "variants")
CODE = [Path(name) for name in LESSON] + sorted(
    p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).glob("**/*.py"))


def test_imports_point_one_way():
    """tools -> root -> support; variants -> network, process and support, and sample.py alone
    imports variants."""
    lesson = {Path(name).stem for name in LESSON}
    basis = {"dit", "diffusion", "support"}
    may = {"support": {"support"}, "variants": basis | {"variants"},
           "tools": lesson | {*FOLDERS}, "dit.py": set(), "diffusion.py": set(),
           "sample.py": basis | {"variants"}, "train_mnist.py": basis | {"sample"}}
    assert sorted(p.name for p in ROOT.glob("*.py")) == sorted(LESSON)
    for path in CODE:
        found = set()
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found & (lesson | {*FOLDERS, "tests"}) <= may[path.parts[0]], path


def test_the_lesson_runs_without_the_rest_and_from_any_working_directory(tmp_path):
    """output/ is found beside the files, wherever one stands."""
    lesson, elsewhere = tmp_path / "lesson", tmp_path / "elsewhere"
    for path in CODE:
        if path.parts[0] != "tools":
            (lesson / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, lesson / path)
    (elsewhere / "images" / "cats").mkdir(parents=True)
    Image.new("L", (28, 28), 99).save(elsewhere / "images" / "cats" / "1.png")

    def run(script: str, *flags) -> str:
        done = subprocess.run([sys.executable, lesson / script, *flags], cwd=elsewhere, text=True,
                              capture_output=True, timeout=100, env={**os.environ, **ALONE})
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train_mnist.py", "--dataset", "folder:images", "--image-size", "28", "--steps", "1",
        "--batch-size", "2")
    trained, = lesson.glob("output/*/step_0000001.pt")
    assert str(trained) in run("sample.py", "--steps", "1", "--npz", "here.npz")
    assert [p.name for p in elsewhere.iterdir() if p.is_file()] == ["here.npz"]
