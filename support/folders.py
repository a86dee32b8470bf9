"""Run folders: which folder is a run, its lock, its checkpoints, the newest of all, its metrics."""

import contextlib
import json
import os
import re
from pathlib import Path

from support import paths
from support.cli import UserError, io_errors, say

CONFIG = "config.json"          # written first: its presence is what makes a folder a run
EXPORTED = "model.safetensors"  # of a folder that tools/export.py wrote, with a config.json as well


def slug(text: str) -> str:
    """Any text as a part of a file name: letters, digits, dot, dash and underscore, at most 40."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:40] or "x"


def new_folder(parent: Path, label: str) -> Path:
    """Make parent/NNN-label, numbered after the highest. No two processes get the same one."""
    with io_errors(f"cannot make a run folder in {parent}"):
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(m[1]) for p in parent.iterdir() if (m := re.match(r"(\d{3,})-", p.name))]
            folder = parent / f"{max(taken, default=0) + 1:03d}-{slug(label)}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder


def is_run_folder(folder: Path) -> bool:
    exported = (folder / EXPORTED).is_file()
    return ((folder / CONFIG).is_file() and not exported) or bool(checkpoints_in(folder))


def is_partial_write(path: Path) -> bool:
    """Is it what a kill left of `atomic_write` in a run's folder?"""
    return bool(re.fullmatch(r"\.(step_\d+\.pt|\w+\.jsonl|config\.json|loss\.png)\.\d+\.tmp",
                             path.name))


def checkpoints_in(folder: Path) -> list[Path]:
    """The step_*.pt of a run folder, in the order of their steps."""
    found = [p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the last `count` checkpoints of a run folder."""
    for path in checkpoints_in(folder)[:-count]:
        with contextlib.suppress(OSError):      # one too many does no harm
            path.unlink()


def newest_run(parent: Path, trained: bool = False) -> Path | None:
    """The run under `parent` that was written to last. trained: only runs with a checkpoint
    beyond step 0."""
    def time(run: Path) -> tuple:               # of what training writes: evaluation writes, too
        written = [*checkpoints_in(run), run / "metrics.jsonl", run / CONFIG]
        return max(p.stat().st_mtime_ns for p in written if p.exists()), run.name

    runs = [p for p in parent.iterdir() if p.is_dir() and is_run_folder(p)] \
        if parent.is_dir() else []
    if trained:
        runs = [run for run in runs if any(int(p.stem[5:]) for p in checkpoints_in(run))]
    return max(runs, key=time, default=None)


def find_checkpoint(name: str | Path | None) -> Path:
    """The named file, the last checkpoint of the named run folder, or the weights in the named
    folder of an export; without a name, the last checkpoint of the newest run under output/, else
    the one that ships."""
    if name is not None and not os.path.isdir(name):
        return Path(name)
    run = Path(name) if name is not None else newest_run(paths.OUTPUT, trained=True)
    if run is not None:
        if not (found := checkpoints_in(run)):
            if (run / EXPORTED).is_file():
                return run / EXPORTED
            raise UserError(f"{run} holds no checkpoint (step_*.pt or {EXPORTED})")
        return found[-1]
    if not paths.SHIPPED.is_file():
        raise UserError(f"no checkpoint under {paths.short(paths.OUTPUT)}: train one with python "
                        f"train_mnist.py, or name a file")
    say(f"no run under {paths.short(paths.OUTPUT)} yet: using the checkpoint that ships, "
        f"{paths.short(paths.SHIPPED)}")
    return paths.SHIPPED


def lock_folder(folder: Path):
    """A lock against a second process; UserError where another holds it. The system releases it
    when this process ends, however it ends. Keep the returned file open."""
    with io_errors(f"cannot write in {folder}"):
        file = open(folder / "lock", "a+")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{folder} is in use by another process: wait for it, or choose another "
                        f"--out") from None
    return file


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl: one per step, its `step` (1 is the first), losses, lr. Lines
    that a kill truncated are left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows
