"""A run on disk: its folder and lock, the record of its losses, its signals and checkpoints' times.

Whatever would hide the algorithm in the training loop lives here: the loop shows one `with run:`
and two calls, `run.record(...)` and `run.after(...)`. Not needed to understand DiT.
"""

import contextlib
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from cli import UserError
from ranks import Ranks

# ---------------------------------------------------------------- signals


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second Ctrl-C stops at once.

    torchrun passes its own signals on to its processes: a SIGTERM after a Ctrl-C is never a second
    Ctrl-C, nor is a SIGINT within a second of the first.
    """

    def __init__(self):
        self.received = 0
        self._since = 0.0

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.signal(signum, self._on_signal)
                        for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame) -> None:
        forwarded = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._since < 1
        if self.received and signum == signal.SIGINT and not forwarded:
            os.write(2, b"\nstopped at once: the last checkpoint stands\n")
            os._exit(130)
        if not self.received:
            self.received, self._since = signum, time.monotonic()
            os.write(2, b"\nstopping after this step, with a checkpoint\n")


# ---------------------------------------------------------------- folders


def slug(text: str) -> str:
    """Any text as a part of a file name: letters, digits, dot, dash and underscore, at most 40."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:40] or "x"


def new_folder(parent: Path, label: str) -> Path:
    """Make parent/NNN-label, NNN one above the highest there. Two processes never get the same."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(m[1]) for p in parent.iterdir() if (m := re.match(r"(\d{3,})-", p.name))]
            folder = parent / f"{max(taken, default=0) + 1:03d}-{slug(label)}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(f"cannot make a run folder in {parent}: {error.strerror}") from None


def open_folder(out: str | None, parent: Path, label: str) -> tuple:
    """(folder, lock) for a new run: `out`, if it holds none yet, or a new one under `parent`."""
    folder = Path(out) if out else new_folder(parent, label)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    lock = lock_folder(folder)
    if holds_run(folder):
        raise UserError(f"{folder} already holds a run: --resume --out {folder} goes on with it, "
                        f"another --out starts a new one")
    return folder, lock


def write_first(folder: Path, config: dict, save: Callable[[], None] | None) -> None:
    """The checkpoint that a run starts from, unless it is there, and the config for people."""
    try:
        if save is not None:
            save()
        text = json.dumps(config, indent=1) + "\n"
        atomic_write(folder / "config.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from None


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "metrics.jsonl")) or \
        any(folder.glob("step_*.pt"))


def newest_run(parent: Path) -> Path | None:
    """The run folder under `parent` that was written last; an empty one counts if it is numbered,
    for a kill may have struck right after it was made."""
    def written(folder: Path) -> float:         # not its own time, which evaluating it changes
        found = [*folder.glob("step_*.pt"), *folder.glob("metrics.jsonl")]
        return max(p.stat().st_mtime for p in found or [folder])
    runs = [p for p in parent.iterdir() if begun(p) and (
        any(p.iterdir()) or re.match(r"\d{3,}-", p.name))] if parent.is_dir() else []
    return max(runs, key=written, default=None)


def begun(folder: Path) -> bool:
    """Does it hold a run, or the start of one that was killed before its first checkpoint?"""
    return folder.is_dir() and (holds_run(folder) or (folder / "lock").is_file()
                                or all(map(half_written, folder.iterdir())))


def half_written(path: Path) -> bool:
    """Is it what a kill left of `atomic_write` in a run's folder?"""
    return bool(re.fullmatch(r"\.(step_\d+\.pt|\w+\.jsonl|config\.json|loss\.png)\.\d+\.tmp",
                             path.name))


def checkpoints_in(folder: Path) -> list[Path]:
    """The step_*.pt of a run folder, oldest step first."""
    found = [p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def newest_checkpoint(parent: Path) -> Path | None:
    """The checkpoint under parent/*/ that was written last; not one of step 0, untrained."""
    found = [p for run in parent.glob("*/") for p in checkpoints_in(run) if int(p.stem[5:])] \
        if parent.is_dir() else []
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name), default=None)


def lock_folder(folder: Path):
    """Hold a folder for this process; UserError where another does. The system lets go of the
    lock when the process ends, however it ends. Keep the returned file open."""
    try:
        file = open(folder / "lock", "a+")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}") from None
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


def atomic_write(path: Path, write: Callable) -> None:
    """write(file) into a temporary file beside `path`, to the disk, then into its place: a reader
    sees the old file or the new one, whole. Raises OSError, leaving the old file and no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")     # never a longer name
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError):     # torch.save's word for a full disk
            raise OSError(str(error).splitlines()[0]) from None
        raise
    if os.name != "nt":                         # the folder's entry, too
        entry = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl: one per step, its `step` (1 is the first), losses, lr. Lines
    that a kill cut short are left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


# ---------------------------------------------------------------- a run

NEVER = 2**62       # later than any step


class Run:
    """What surrounds the steps of a run: the bar, the record of losses, previews, checkpoints,
    signals. Rank 0 alone writes.

    columns: names of the numbers that `record` gets each step; the first two are named in the bar
    and must be finite (`finite` says how many of them).
    save(step): writes a checkpoint. preview(step, stopped): draws one; it may give up when
    stopped() is true. `every` holds the intervals log, preview, save in steps.
    """

    def __init__(self, folder: Path, ranks: Ranks, columns: tuple[str, ...], finite: int,
                 save: Callable[[int], None], preview: Callable[[int, Callable], None],
                 every: dict[str, int], start: int, stop: int, total: int, batch_size: int):
        self.folder, self.ranks, self.columns, self.finite = folder, ranks, columns, finite
        self.save, self.preview, self.every = save, preview, every
        self.start, self.stop, self.total, self.batch_size = start, stop, total, batch_size
        self.signals, self.agreed, self.saved_at = StopSignals(), 0, None
        self.buffer = torch.zeros(min(every["log"], stop - start), len(columns),
                                  device=ranks.device)
        self.first_bad = torch.full((), NEVER, device=ranks.device, dtype=torch.int64)
        self.recorded, self.read = start, start
        self.unwritten: list[str] = []
        self.clock, self.loss = time.perf_counter(), float("nan")

    def __enter__(self) -> "Run":
        self.signals.__enter__()
        self.bar = tqdm(total=self.total, initial=self.start, unit="step", dynamic_ncols=True,
                        disable=self.ranks.rank > 0, smoothing=0.1)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.bar.close()
        self.signals.__exit__()

    def record(self, step: int, *numbers) -> None:
        """Keep this step's numbers (0-dim tensors on the device, or floats) without waiting for
        them, and the first step at which one of the first `finite` was not finite."""
        row = torch.stack([     # full() fills on the device; a copy from the host would wait for it
            n.detach().float() if isinstance(n, torch.Tensor) else
            torch.full((), n, device=self.ranks.device) for n in numbers])
        self.buffer[self.recorded - self.read] = row
        good = row[: self.finite].isfinite().all() | (self.first_bad != NEVER)
        self.first_bad = torch.where(good, self.first_bad, step + 1)
        self.recorded += 1
        self.bar.update()
        if self.recorded - self.read == len(self.buffer):
            self.flush()

    def flush(self) -> None:
        """Read the device's record: rows into metrics.jsonl, the loss into the bar. Raises
        UserError at a step that was not finite, before anything is saved or shown of it."""
        count = self.recorded - self.read
        if not count:
            return
        rows = self.ranks.mean(self.buffer[:count].clone()).tolist()
        first_bad = -self.ranks.largest(-int(self.first_bad))
        self.unwritten += [
            json.dumps({"step": step, **{c: float(f"{n:.7g}") for c, n in
                                         zip(self.columns, row, strict=True)}})
            for step, row in enumerate(rows, self.read + 1) if step < first_bad
        ]
        self.read = self.recorded
        self._write_rows()
        if first_bad != NEVER:
            raise UserError(
                f"the loss or its gradient is not finite at step {first_bad}: nothing of it is "
                f"saved, the last good checkpoint is {self.last_saved()}. Start again with a lower "
                f"--lr, a longer --warmup or --precision fp32", status=1)
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.loss = sum(row[0] for row in rows) / count
        self.bar.set_postfix_str(f"loss {self.loss:.4f}, {count * self.batch_size / seconds:,.0f} "
                                 f"images/s", refresh=False)

    def last_saved(self) -> str:
        return str(next(reversed(checkpoints_in(self.folder)), "no checkpoint"))

    def _write_rows(self) -> None:
        if self.ranks.rank > 0 or not self.unwritten:
            return
        path = self.folder / "metrics.jsonl"
        try:
            rows = ("\n".join(self.unwritten) + "\n").encode()
            with open(path, "ab", buffering=0) as file:
                whole = file.tell()
                if file.write(rows) < len(rows):            # the disk is full: no half a line
                    file.truncate(whole)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten = []
        except OSError as error:
            self.ranks.warn(f"{path} cannot be written ({error.strerror}): training goes on, the "
                            f"rows are kept for the next time")

    def after(self, step: int) -> bool:
        """Previews and checkpoints where they are due, or asked for by a signal. True when the
        run must end after this step."""
        done = step + 1
        end = done == self.stop
        if self.ranks.world > 1 and (end or done % 10 == 0):    # the ranks stop at the same step
            self.signals.received = self.agreed = self.ranks.largest(self.signals.received)
        stopped = self.signals.received if self.ranks.world == 1 else self.agreed
        if end or stopped or done % self.every["save"] == 0:
            self.checkpoint(done)
        if end or (done % self.every["preview"] == 0 and not stopped):
            self.flush()
            if self.ranks.rank == 0:
                try:
                    self.preview(done, lambda: self.signals.received)
                except OSError as error:
                    self.ranks.warn(f"the preview of step {done} cannot be written "
                                    f"({error.strerror or error})")
            self.clock = time.perf_counter()
        return bool(end or stopped)

    def checkpoint(self, done: int) -> None:
        """Save, unless a number was not finite. A disk that fails is told, and training goes on."""
        self.flush()
        if self.ranks.rank == 0:
            try:
                self.save(done)
                self.saved_at = done
            except OSError as error:
                self.ranks.warn(f"step {done} cannot be saved in {self.folder} "
                                f"({error.strerror or error}): training goes on; the last "
                                f"checkpoint is {self.last_saved()}")
        self.clock = time.perf_counter()


def loss_curve(folder: Path) -> Path | None:
    """Draw metrics.jsonl as loss.png, where matplotlib is installed; else say what to install."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no loss curve: pip install matplotlib draws one at the end of a run")
        return None
    rows = read_metrics(folder / "metrics.jsonl")
    steps, losses = [r["step"] for r in rows], torch.tensor([r["loss"] for r in rows])
    width = max(1, min(100, len(rows) // 10))
    smooth = losses.unfold(0, width, 1).mean(1) if len(rows) else losses
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.semilogy(steps, losses, lw=0.4, alpha=0.4, label="each step")
    axes.semilogy(steps[width - 1:], smooth, label=f"mean of {width} steps")
    axes.set(xlabel="step", ylabel="loss", title=folder.name)
    axes.legend()
    path = folder / "loss.png"
    try:
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror})", file=sys.stderr)
        return None
    finally:
        plt.close(figure)
    return path
