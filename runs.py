"""A run on disk and in a process: seeds, folders, records, signals, ranks.

Whatever would hide the algorithm in the training loop lives here or in checkpoints.py: the loop
shows one `with run:` and two calls, `run.record(...)` and `run.after(...)`.
Not needed to understand DiT.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ---------------------------------------------------------------- errors that users see


class UserError(Exception):
    """What went wrong and what would be right, in one line; `cli` prints it and exits."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def printable(text) -> str:
    """Text from a file, safe to print: control characters escaped, cut at 300 characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in
                   str(text).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= 300 else text[:297] + "..."


def cli(main: Callable[[], int | None]) -> None:
    """Run a script's main: a UserError is one line on standard error, never a traceback."""
    try:
        status = main() or 0
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            time.sleep(2)       # where all ranks meet the same error, rank 0 alone tells it
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.stderr.flush()
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and name the flag that was probably meant."""

    def error(self, message: str):
        known = [o for action in self._actions for o in action.option_strings]
        for word in re.findall(r"unrecognized arguments: (.*)", message):
            close = difflib.get_close_matches(word.split()[0].split("=")[0], known, 1)
            message += f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{message}; --help shows every flag")


def number(kind: type, low: float, high: float = float("inf"), open_high: bool = False):
    """A type for argparse: an int or float from low to high (high itself excluded: open_high)."""
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_high and value == high) or abs(value) == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    words = f"{'an integer' if kind is int else 'a number'} of at least {low:g}"
    words += f" and {'below' if open_high else 'at most'} {high:g}" if high != float("inf") else ""
    parse.__name__ = kind.__name__
    return parse


# ---------------------------------------------------------------- randomness


def mix_seed(*key) -> int:
    """A 32-bit seed from any numbers and words. A hash, because a CPU generator ignores the high
    32 bits of its seed, and because seed + step is the same for (0, 1) and (1, 0)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A random generator on `device` that is a function of `key` and the device type alone."""
    return torch.Generator(device).manual_seed(mix_seed(*key))


# ---------------------------------------------------------------- devices and number formats


def pick_device(name: str | None) -> torch.device:
    """cuda, else mps, else cpu; or the one that is named. UserError where it is not there."""
    if name is None:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {printable(name)} is not available here: use cpu"
                        + (", cuda" if torch.cuda.is_available() else "")
                        + (" or mps" if torch.backends.mps.is_available() else "")) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {printable(name)} cannot train: use cpu, cuda or mps")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The number format of the matrix products: "auto" -> what this device multiplies fastest.

    bf16 where the hardware has it, fp16 on a GPU that has not (a T4), fp32 otherwise.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        has = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in
               ("avx512_bf16", "amx_tile")]
        return "bf16" if any(has) else "fp32"
    return "fp32"


def under_autocast(model: nn.Module, device: torch.device, precision: str) -> Callable:
    """The model as a function whose forward, and nothing around it, runs in `precision`.

    On CPU, scaled_dot_product_attention's bf16 kernel is several times slower in its backward
    than the plain matrix products of the MATH backend, which is therefore chosen there.
    """
    if precision == "fp32":
        return model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    kernels = contextlib.nullcontext
    if device.type == "cpu":
        kernels = lambda: sdpa_kernel(SDPBackend.MATH)      # noqa: E731

    def forward(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype), kernels():
            return model(xt, t, y)

    return forward


# ---------------------------------------------------------------- ranks


@dataclass
class Ranks:
    """The processes that share a run. With one process every method does nothing."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device_name: str | None) -> "Ranks":
        """Read torchrun's environment; nccl for tensors on GPUs, gloo for those on CPUs."""
        world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        device = pick_device(device_name)
        if world == 1:
            return cls(device)
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():
                raise UserError(f"process {local} of this machine has no GPU: it has "
                                f"{torch.cuda.device_count()}; use that --nproc_per_node")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        elif device.type == "mps":
            raise UserError("several processes cannot share mps: use --device cpu")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return cls(device, rank, world)

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, averaging its gradients over the ranks where there are several."""
        if self.world == 1:
            return model
        return DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def shares(self, net: nn.Module, batch_size: int, grad_accum: int) -> Iterator[slice]:
        """This rank's slice of the global batch, in `grad_accum` parts, for a loop over them.

        Gradients travel between the ranks with the last part alone.
        """
        size = batch_size // self.world // grad_accum
        first = self.rank * size * grad_accum
        for i in range(grad_accum):
            later = self.world > 1 and i < grad_accum - 1
            with net.no_sync() if later else contextlib.nullcontext():
                yield slice(first + i * size, first + (i + 1) * size)

    def check_batch(self, batch_size: int, grad_accum: int) -> None:
        parts = self.world * grad_accum
        if batch_size % parts:
            low = batch_size // parts * parts
            near = [b for b in (low, low + parts) if b > 0]
            raise UserError(f"--batch-size {batch_size} is not divisible by {self.world} processes"
                            f" x --grad-accum {grad_accum}: {' or '.join(map(str, near))} is")

    def mean(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world
        return x

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers (through gloo: no GPU waits for it)."""
        if self.world > 1:
            box = torch.tensor(number)
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
            number = int(box)
        return number

    def from_rank_0(self, make: Callable):
        """make() on rank 0, its (picklable) result on all."""
        box = [make() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def gather_parts(self, parts: list[Tensor]) -> Tensor | None:
        """Parts that the ranks took in turn (rank r: parts r, r + world, ...), in order, in one
        tensor on rank 0."""
        everyone = [parts]
        if self.world > 1:
            everyone = [None] * self.world if self.rank == 0 else None
            dist.gather_object(parts, everyone)
        if self.rank > 0:
            return None
        most = max(map(len, everyone))
        return torch.cat([theirs[i] for i in range(most) for theirs in everyone if i < len(theirs)])

    def say(self, *lines: str) -> None:
        if self.rank == 0:
            for line in lines:
                tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(f"warning: {line}", file=sys.stderr)


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
        self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
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


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "metrics.jsonl")) or \
        any(folder.glob("step_*.pt"))


def newest_run(parent: Path) -> Path | None:
    """The run folder under `parent` that was written last."""
    def written(folder: Path) -> float:
        return max([p.stat().st_mtime for p in [folder, *folder.glob("step_*.pt")]])
    runs = [p for p in parent.iterdir() if p.is_dir() and re.match(r"\d{3,}-", p.name)] \
        if parent.is_dir() else []
    return max(runs, key=written, default=None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The step_*.pt of a run folder, oldest step first."""
    return sorted(p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", p.name))


def newest_checkpoint(parent: Path) -> Path | None:
    """The checkpoint under parent/*/ that was written last."""
    found = [p for run in parent.glob("*/") for p in checkpoints_in(run)] if parent.is_dir() else []
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
        self.buffer = torch.zeros(every["log"], len(columns), device=ranks.device)
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
        row = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=self.ranks.device)
                           .detach() for n in numbers])
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
            with open(path, "ab") as file:
                whole = file.tell()
                try:
                    file.write(("\n".join(self.unwritten) + "\n").encode())
                    file.flush()
                except OSError:
                    os.truncate(path, whole)        # no half a line
                    raise
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
                self.preview(done, lambda: self.signals.received)
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
    """Draw metrics.jsonl as loss.png, where matplotlib is installed: each step and a mean of 100."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
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
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
    return path
