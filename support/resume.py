"""Where a run starts: at step 0 of a new one, or where --resume finds an earlier one."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from support import checkpoints, paths, settings
from support.cli import UserError, io_errors, say, warn
from support.folders import (
    CONFIG,
    checkpoints_in,
    find_checkpoint,
    is_partial_write,
    is_run_folder,
    lock_folder,
    newest_run,
    read_metrics,
)


@dataclass
class Start:
    """folder and lock: None for a new run without --out. source: the folder whose record of losses
    is continued. state: the checkpoint to resume. recipe: the recorded flags of the resumed run.
    content: the file of --init-from."""

    folder: Path | None = None
    lock: object = None
    source: Path | None = None
    state: dict | None = None
    recipe: dict | None = None
    content: object = None


def find_start(given: dict) -> Start:
    """What --resume, --init-from and --out ask for; called on rank 0. Raises UserError."""
    if "resume" in given and "init_from" in given:
        raise UserError("--resume continues a run, --init-from starts a new one: give one of them")
    out = Path(given["out"]) if given.get("out") else None
    if "init_from" in given:
        return Start(content=checkpoints.read_any(find_checkpoint(given["init_from"])))
    if "resume" not in given:
        return Start()
    if given["resume"]:
        return _from_file(Path(given["resume"]), out)
    folder = out or newest_run(paths.OUTPUT)
    folder = folder and Path(paths.short(folder))
    if folder is None or not is_run_folder(folder):
        raise UserError(f"no run to resume in {out or paths.short(paths.OUTPUT)}: start one "
                        f"without --resume")
    lock = lock_folder(folder)
    state = newest_valid(folder)
    if state is not None:
        return Start(folder, lock, folder, state, state["config"]["recipe"])
    if read_metrics(folder / "metrics.jsonl"):
        raise UserError(f"{folder} has a record of losses but no checkpoint to resume from: "
                        f"another --out starts a new run")
    say(f"{folder} has no checkpoint yet: starting at step 0")
    return Start(folder, lock, folder, None, settings.read_config(folder / CONFIG))


def newest_valid(folder: Path) -> dict | None:
    """The last checkpoint of a folder that is not damaged. Damaged ones are named, and renamed
    once there is a valid one before them. Other read errors are raised."""
    damaged = []
    for path in reversed(checkpoints_in(folder)):
        try:
            state = checkpoints.load(path, full=True)
        except checkpoints.Damaged as error:
            warn(f"{error}; taking the checkpoint before it")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.rename(bad.with_name(bad.name + ".damaged"))
        return state
    if damaged or any(folder.glob("*.damaged")):
        raise UserError(f"every checkpoint in {folder} is damaged")
    return None


def _from_file(path: Path, out: Path | None) -> Start:
    """--resume FILE: continue in its folder, or branch off into a new --out."""
    if os.path.isdir(path):
        raise UserError(f"--resume {path} is a folder: --resume --out {path} continues the run in "
                        f"it")
    state = checkpoints.load(path, full=True)
    folder = out or path.parent
    if folder.resolve() == path.parent.resolve():
        if path not in checkpoints_in(path.parent) or not (path.parent / "lock").is_file():
            raise UserError(f"{path} is not in a run folder: --out DIR names a new one to continue "
                            f"in")
    else:
        if folder.is_dir() and (is_run_folder(folder) or (folder / "metrics.jsonl").exists()):
            raise UserError(f"{folder} already holds a run: give a new --out to branch off from "
                            f"{path}")
        if folder.is_dir() and any(p.name != "lock" and not is_partial_write(p)
                                   for p in folder.iterdir()):
            raise UserError(f"{folder} is not empty: give a new --out to branch off from {path}")
        with io_errors(f"cannot make the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    later = [p for p in checkpoints_in(folder) if int(p.stem[5:]) > state["step"]]
    if later:
        raise UserError(f"{folder} holds later work ({later[-1].name}): give a new --out to branch "
                        f"off from {path}")
    return Start(folder, lock, path.parent, state, state["config"]["recipe"])


def clear_partial_writes(folder: Path) -> None:
    """Delete what a kill left of unfinished writes."""
    for path in filter(is_partial_write, folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            path.unlink()
