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
    holds_run,
    lock_folder,
    newest_run,
    read_metrics,
)


def resumed(given: dict, output: Path, ranks: Ranks) -> tuple:
    """(lock, folder, state) of the run that --resume means; only rank 0 asks.

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
        if (folder / "metrics.jsonl").exists():
            raise UserError(f"{printable(folder)} has a record of losses but no checkpoint to "
                            f"resume from: another --out starts a new run")
        ranks.say(f"{folder} has no checkpoint yet: starting at step 0")
    else:
        take_up(folder, folder, state, ranks)
    return lock, folder, state


def newest_whole(folder: Path, ranks: Ranks) -> dict | None:
    """The newest checkpoint of a folder that can be read; damaged ones are told and put aside."""
    for path in reversed(checkpoints_in(folder)):
        try:
            return checkpoints.load(path, full=True)
        except UserError as error:
            ranks.warn(f"{error}; taking the checkpoint before it")
            path.rename(path.with_name(path.name + ".damaged"))
    if any(folder.glob("*.damaged")):
        raise UserError(f"no checkpoint in {folder} is whole")
    return None


def from_file(path: Path, out: Path | None, ranks: Ranks) -> tuple:
    """--resume FILE: go on in its folder, or branch off into a new --out."""
    state = checkpoints.load(path, full=True)
    folder = out or path.parent
    if folder.resolve() != path.parent.resolve():
        if folder.is_dir() and holds_run(folder):
            raise UserError(f"{folder} already holds a run: give a new --out to branch off from "
                            f"{path}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    lock = lock_folder(folder)
    later = [p for p in checkpoints_in(folder) if int(p.stem[5:]) > state["step"]]
    if later:
        raise UserError(f"{folder} holds later work ({later[-1].name}): give a new --out to branch "
                        f"off from {path}")
    take_up(folder, path.parent, state, ranks)
    return lock, folder, state


def take_up(folder: Path, source: Path, state: dict, ranks: Ranks) -> None:
    """Cut the record at the checkpoint's step, and clear what a kill left half-written."""
    ranks.say(f"resuming {folder} at step {state['step']:,}")
    try:
        for stale in folder.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        rows = {r["step"]: r for r in read_metrics(source / "metrics.jsonl")
                if r["step"] <= state["step"]}
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
