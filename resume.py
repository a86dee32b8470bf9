"""Going on where a run stopped: finding its checkpoint, and putting everything back.

Not needed to understand DiT.
"""

import json
import os
from pathlib import Path

import checkpoints
from cli import UserError, printable
from ranks import Ranks
from runs import (
    atomic_write,
    begun,
    checkpoints_in,
    half_written,
    holds_run,
    lock_folder,
    newest_run,
    read_metrics,
)


def resumed(given: dict, output: Path, ranks: Ranks) -> tuple:
    """(lock, folder, source, state) of the run that --resume means; only rank 0 asks. source is
    the folder that the run comes from: another one where it branches off.

    state is None where the run was stopped before its first checkpoint. Raises UserError.
    """
    out = Path(given["out"]) if given.get("out") else None
    if given["resume"]:
        if os.path.isdir(given["resume"]):
            raise UserError(f"--resume {printable(given['resume'])} is a folder: --resume --out "
                            f"{printable(given['resume'])} goes on with the run in it")
        return from_file(Path(given["resume"]), out, ranks)
    folder = out or newest_run(output)
    if folder is None or not folder.is_dir():
        raise UserError(f"no run to resume {f'in {out}' if out else f'under {output}/'}: start one "
                        f"without --resume")
    if not begun(folder):
        raise UserError(f"{printable(folder)} holds no run to resume: start one there without "
                        f"--resume")
    lock = lock_folder(folder)
    state = newest_whole(folder, ranks)
    if state is None:
        for name, what in [("metrics.jsonl", "a record of losses"), ("config.json", "a config")]:
            if (folder / name).exists():        # written after the first checkpoint
                raise UserError(f"{printable(folder)} has {what} but no checkpoint to resume "
                                f"from: another --out starts a new run")
        ranks.say(f"{folder} has no checkpoint yet: starting at step 0")
    return lock, folder, folder, state


def newest_whole(folder: Path, ranks: Ranks) -> dict | None:
    """The newest checkpoint of a folder that is whole; damaged ones are told, and put aside once
    there is one before them. One that cannot be read for another reason ends the search."""
    damaged = []
    for path in reversed(checkpoints_in(folder)):
        try:
            state = checkpoints.load(path, full=True)
        except checkpoints.Damaged as error:
            ranks.warn(f"{error}; taking the checkpoint before it")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.rename(bad.with_name(bad.name + ".damaged"))
        return state
    if damaged or any(folder.glob("*.damaged")):
        raise UserError(f"no checkpoint in {folder} is whole")
    return None


def from_file(path: Path, out: Path | None, ranks: Ranks) -> tuple:
    """--resume FILE: go on in its folder, or branch off into a new --out."""
    state = checkpoints.load(path, full=True)
    folder = out or path.parent
    if folder.resolve() == path.parent.resolve():
        if path not in checkpoints_in(path.parent) or not (path.parent / "lock").is_file():
            raise UserError(f"{printable(path)} does not lie in a run's folder: --out DIR names a "
                            f"new one to go on in")
    else:
        if folder.is_dir() and holds_run(folder):
            raise UserError(f"{folder} already holds a run: give a new --out to branch off from "
                            f"{path}")
        if folder.is_dir() and any(p.name != "lock" and not half_written(p)
                                   for p in folder.iterdir()):
            raise UserError(f"{printable(folder)} is not empty: give a new --out to branch off "
                            f"from {printable(path)}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    lock = lock_folder(folder)
    later = [p for p in checkpoints_in(folder) if int(p.stem[5:]) > state["step"]]
    if later:
        raise UserError(f"{folder} holds later work ({later[-1].name}): give a new --out to branch "
                        f"off from {path}")
    return lock, folder, path.parent, state


def take_up(folder: Path, source: Path, start: int, ranks: Ranks) -> None:
    """Cut the record at the step of the checkpoint, and clear what a kill left half-written. Once
    all else about the resumed run is known to be right."""
    ranks.say(f"resuming {folder} at step {start:,}")
    try:
        for stale in filter(half_written, folder.glob(".*.tmp")):
            stale.unlink(missing_ok=True)
        rows = {r["step"]: r for r in read_metrics(source / "metrics.jsonl") if r["step"] <= start}
        text = "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows))
        atomic_write(folder / "metrics.jsonl", lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from None


def restore(state: dict, model, ema, optimizers: list, scaler) -> int:
    """Put a full checkpoint's state back; returns the number of steps it has made."""
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for i, opt in enumerate(optimizers):
            checkpoints.restore_optimizer(opt, state["opt"].get(i))
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's training state does not fit its model: "
                        f"{printable(error)}") from None
    return state["step"]
