"""A training run: its folder and lock, what it resumes, its record of losses, signals, checkpoints.

Whatever would hide the algorithm in the training loop is here; the loop shows `run.steps()` and
`run.log(...)`. Rank 0 alone writes.
"""

import contextlib
import errno
import json
import os
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from support import checkpoints, components, data, distributed, loggers, paths, settings
from support.cli import UserError, atomic_write, io_errors, reason
from support.curves import QUARTERS, loss_curve
from support.distributed import StepRandom, broadcast_from_rank0
from support.folders import (
    CONFIG,
    checkpoints_in,
    is_partial_write,
    is_run_folder,
    keep_last,
    lock_folder,
    new_folder,
    read_metrics,
)
from support.latents import is_latents
from support.resume import Start, clear_partial_writes, find_start
from support.seeds import mix_seed

NEVER = 2**62       # later than any step
RECENT = 100        # steps whose mean loss the summary has, as the README's tables


class Run:
    """One training run. In order: Run(...), load_images(), begin(...), steps() with log(...) in
    each, finish().

    args: the value of every flag. device; share: this process's slice of a batch.
    """

    def __init__(self, given: dict, defaults: settings.Settings):
        self.device = distributed.join(given.get("device"))
        self.given = given = broadcast_from_rank0(lambda: defaults.with_config(given))
        self._start: Start | None = None

        def start() -> tuple:
            self._start = find_start(given)     # the lock stays with rank 0
            return self._start.state, self._start.recipe, self._start.content

        self.resumed, recipe, content = broadcast_from_rank0(start)
        self.args = defaults.resolve(given, self.device.type, recipe,
                                     settings.inherited_from(content))
        components.check_flags(self.args)
        broadcast_from_rank0(lambda: loggers.check(self.args.logger))
        self.initial_weights = content and checkpoints.weights_in(content, given["init_from"])
        self.share = distributed.share_of(self.args.batch_size, self.args.grad_accum)
        self.start = self.resumed["step"] if self.resumed else 0
        self.stop = min(self.args.steps, self.start + (self.args.stop_after or self.args.steps))
        self.folder = self._start and self._start.folder
        self.signals, self.agreed, self.saved_at = StopSignals(), 0, None
        self.seconds = 0.0

    # ------------------------------------------------------------ data and weights

    def load_images(self) -> data.ImageSet:
        """The data set that the flags name; glyphs, with a banner, where they name none and MNIST
        cannot be had. Rank 0 loads (or downloads) first, then one process of each other machine.
        Raises UserError where it is not the data of the resumed run, or differs between ranks."""
        args, found = self.args, None
        named = "dataset" in self.given or "data_dir" in self.given or "resume" in self.given

        def load(dataset: str) -> data.ImageSet:
            return data.load(dataset, args.data_dir, args.image_size,
                             celeba_attribute=args.celeba_attribute)

        def fetch() -> str:
            nonlocal found
            try:
                found = load(args.dataset)
            except data.DataMissing as missing:
                if named:
                    raise
                distributed.say("=" * 80, f"NO MNIST: {missing}", "Training on GLYPHS instead: "
                                "digits drawn with a font, not handwritten ones.", "=" * 80)
                found = load("glyphs")
                return "glyphs"
            return args.dataset

        args.dataset = broadcast_from_rank0(fetch)
        first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if found is None and first_here:
            found = load(args.dataset)
        distributed.barrier()
        images = found or load(args.dataset)
        self.about_data = dict(
            dataset=images.name, images=len(images.images), image_size=images.size,
            channels=images.channels, digest=images.digest())
        if self.resumed:
            recorded = {**self.resumed["config"]["data"], "dataset": images.name}
            if recorded != self.about_data:
                raise UserError(f"the data set is not the checkpoint's: {self.about_data} here, "
                                f"{recorded} there")
        if (first := broadcast_from_rank0(lambda: self.about_data)) != self.about_data:
            raise UserError(f"process {distributed.rank()} has other data than process 0: "
                            f"{self.about_data} here, {first} there")
        if "model" not in self.given and not self.resumed and not self.initial_weights:
            args.model = settings.largest_fitting_patch(args.model, self.about_data["image_size"])
        return images

    def build(self, cls: type, model: str, arguments: dict) -> torch.nn.Module:
        """A network with weights decided by --seed, or by --init-from as far as its file fits, on
        the device. Raises UserError for sizes that do not fit together."""
        torch.manual_seed(mix_seed(self.args.seed, "init"))
        try:
            network = cls(**arguments)
        except ValueError as error:
            side = self.about_data["image_size"]
            raise settings.unfit_model(model, side, error) from None
        if self.initial_weights:
            misfits = checkpoints.load_fitting(network, self.initial_weights)
            distributed.say(f"weights from {self.given['init_from']}; the others are initialised:",
                            *(f"  {line}" for line in misfits or ["(none: all fit)"]))
        return network.to(self.device)

    # ------------------------------------------------------------ beginning and end

    def begin(self, state, config: dict, class_names: list[str],
              preview: Callable[[Path, int, Callable[[], int]], None]) -> None:
        """Restore the resumed state, or open the folder and write config.json and a checkpoint of
        step 0, which is read back: a kill from here on loses nothing but work.

        preview(path, step, stopped) draws a picture; it may give up once stopped() is true.
        """
        if is_latents(self.about_data["dataset"]):
            preview.latents = True
            config = {**config, "sampling": {**config["sampling"], "latents": True}}
        self.state, self.class_names, self.preview = state, class_names, preview
        self.config = {**config, "data": self.about_data, "recipe": settings.to_record(self.args)}
        if self.resumed:
            state.load_state_dict(self.resumed)
        if self.start < self.stop:
            self.folder = broadcast_from_rank0(self._open_folder)
            self._print_settings()
        else:
            distributed.say(
                f"{self.folder} is complete at step {self.start:,}: a larger --steps continues it"
                if self.start == self.args.steps else
                f"{self.folder} is at step {self.start:,} already, beyond --steps "
                f"{self.args.steps:,}")
        self.metrics = Metrics(self)
        logs = distributed.rank() == 0 and self.start < self.stop
        self.logger = loggers.Logger(self.args.logger if logs else "none", self.folder,
                                     self.config, self.start)

    def _open_folder(self) -> Path:
        start, args = self._start, self.args
        folder = start.folder
        if folder is None:
            label = f"{self.about_data['dataset']}-{args.model}"
            folder = Path(args.out or paths.short(new_folder(paths.OUTPUT, label)))
            with io_errors(f"cannot make the folder {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
            holds_run = is_run_folder(folder) or (folder / "metrics.jsonl").exists()
            if not holds_run and any(p.name != "lock" and not is_partial_write(p)
                                     for p in folder.iterdir()):
                raise UserError(f"{folder} is not empty: give --out a new folder")
            start.lock = lock_folder(folder)
            if is_run_folder(folder) or (folder / "metrics.jsonl").exists():
                raise UserError(f"{folder} already holds a run: --resume --out {folder} continues "
                                f"it, another --out starts a new one")
        self.folder = folder
        with io_errors(f"cannot write in {folder}"):
            text = json.dumps(self.config, indent=1) + "\n"
            elsewhere = self.resumed or self.initial_weights    # which config.json does not hold
            if not elsewhere:
                atomic_write(folder / CONFIG, lambda file: file.write(text.encode()))
            first = folder / f"step_{self.start:07d}.pt"
            if not first.exists():
                self._save(self.start)
                try:
                    checkpoints.load(first, full=True)
                except UserError as error:
                    first.unlink()
                    if not self.resumed:
                        (folder / CONFIG).unlink(missing_ok=True)
                    raise UserError(f"nothing was trained, since the checkpoints of this run "
                                    f"could not be read: {error}") from None
            if elsewhere:
                atomic_write(folder / CONFIG, lambda file: file.write(text.encode()))
            if self.resumed:
                self._begin_resume(start.source)
        return folder

    def _begin_resume(self, source: Path) -> None:
        """Cut the record of losses at the step of the checkpoint. Call last, after validation."""
        distributed.say(f"resuming {self.folder} at step {self.start:,}")
        clear_partial_writes(self.folder)
        rows = {row["step"]: row for row in read_metrics(source / "metrics.jsonl")
                if row["step"] <= self.start}
        text = "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows))
        atomic_write(self.folder / "metrics.jsonl", lambda file: file.write(text.encode()))

    def _print_settings(self) -> None:
        args, about, world = self.args, self.about_data, distributed.world_size()
        parameters = sum(p.numel() for p in self.state.model.parameters())
        side = about["image_size"]
        distributed.say(
            f"{args.model} on {about['dataset']} ({about['images']:,} images, "
            f"{about['channels']}x{side}x{side}, {len(self.class_names)} "
            f"class{'es' * (len(self.class_names) > 1)}): {parameters:,} parameters",
            f"{self.device.type}, {self.state.precision}{', compiled' * self.state.compiled}, "
            f"{world} process{'es' * (world > 1)}: steps {self.start:,} to {self.stop:,} of "
            f"{args.steps:,}, batch {args.batch_size}, predicts {args.prediction}, "
            f"{args.optimizer}",
            f"run folder: {paths.short(self.folder)}",
            *["compiling: the first step takes up to a minute"] * self.state.compiled)

    def finish(self) -> int:
        """Disconnect the processes and print the summary. Returns the exit status."""
        self.state.loss = None                  # frees DistributedDataParallel first
        distributed.shut_down()
        if self._start and self._start.lock:
            self._start.lock.close()
        if self.start >= self.stop:
            return 0
        if distributed.rank() == 0:
            self._print_summary()
        return 128 + self.signals.received if self.signals.received else 0

    def _print_summary(self) -> None:
        done, newest = self.metrics.recorded, self._last_saved()
        if self.saved_at != done:
            raise UserError(f"step {done} could not be saved; the last checkpoint is {newest}",
                            status=1)
        took = (f"{self.seconds / 60:.1f} minutes" if self.seconds >= 60 else
                f"{self.seconds:.2g} seconds")
        recent = self.metrics.recent
        distributed.say(f"{done - self.start:,} steps in {took}, loss "
                        f"{sum(recent) / len(recent):.4f} (last {len(recent)} steps); saved: "
                        f"{newest}")
        if done < self.args.steps:
            device = ["--device", self.args.device] if self.args.device else []
            distributed.say(f"stopped at step {done:,} of {self.args.steps:,}; to continue: "
                            + shlex.join(["python", "train_mnist.py", "--resume", "--out",
                                          paths.short(self.folder), *device]))
        elif (curve := loss_curve(self.folder)) is not None:
            distributed.say(f"loss curve: {paths.short(curve)}")
        if not self.signals.received:
            words = ["-m", "tools.latents", "sample", newest, "--vae", "VAE"] if is_latents(
                self.about_data["dataset"]) else ["sample.py", newest]
            distributed.say("next: " + shlex.join(["python", *words]))

    # ------------------------------------------------------------ steps

    def steps(self) -> Iterator[int]:
        """The steps of this call, with a progress bar; previews and checkpoints between them. A
        signal ends it after a step."""
        if self.start >= self.stop:
            return
        begun = time.perf_counter()
        with self.signals, self.logger, self.metrics.progress_bar():
            for step in range(self.start, self.stop):
                yield step
                if self._after(step + 1):
                    break
            self.seconds = time.perf_counter() - begun

    def random(self, step: int) -> StepRandom:
        """The random numbers of a step: a function of --seed and the step alone."""
        return StepRandom(self.device, self.args.seed, step, self.args.batch_size, self.share)

    def log(self, *, t: Tensor, **numbers: Tensor | float) -> None:
        """Record this step's numbers (of tensors, the mean), and the mean of `loss` (B,) in each
        quarter of the timesteps t (B,), without waiting for the device."""
        self.metrics.record(numbers, t)

    def _after(self, done: int) -> bool:
        """Checkpoints and previews where they are due, or asked for by a signal. True when the
        run must end after this step."""
        end = done == self.stop
        alone = distributed.world_size() == 1
        if not alone and (end or done % 10 == 0):           # the ranks stop at the same step
            self.signals.received = self.agreed = distributed.all_reduce_max(self.signals.received)
        stopped = self.signals.received if alone else self.agreed
        if end or stopped or done % self.args.save_every == 0:
            self._checkpoint(done)
        if end or (done % self.args.preview_every == 0 and not stopped):
            self.metrics.flush()
            if distributed.rank() == 0:
                path = self.folder / "samples" / f"step_{done:07d}.png"
                try:
                    self.preview(path, done, lambda: self.signals.received)
                    self.logger.preview(path, done)
                except OSError as error:
                    distributed.warn(f"{path} cannot be written ({reason(error)})")
            self.metrics.restart_clock()
        return bool(end or stopped)

    def _save(self, done: int) -> None:
        checkpoints.save(self.folder / f"step_{done:07d}.pt", dict(
            step=done, config=self.config, class_names=self.class_names,
            **self.state.state_dict()))
        keep_last(self.folder, self.args.keep)

    def _checkpoint(self, done: int) -> None:
        """Save, unless a number was not finite. On a write error, warn and continue."""
        self.metrics.flush()
        if distributed.rank() == 0:
            try:
                self._save(done)
                self.saved_at = done
            except OSError as error:
                distributed.warn(f"step {done} cannot be saved in {self.folder} "
                                 f"({reason(error)}): training continues; the last checkpoint is "
                                 f"{self._last_saved()}")
        self.metrics.restart_clock()

    def _last_saved(self) -> str:
        found = checkpoints_in(self.folder)
        return paths.short(found[-1]) if found else "none"


class Metrics:
    """The numbers of every step: kept on the device, read every --log-every steps, written to
    metrics.jsonl and shown in the progress bar."""

    def __init__(self, run: Run):
        self.run, self.device = run, run.device
        self.recorded, self.read = run.start, run.start
        self.columns: list[str] = []
        self.first_bad = torch.full((), NEVER, device=run.device, dtype=torch.int64)
        self.unwritten: list[str] = []
        before = read_metrics(run.folder / "metrics.jsonl") if run.start else []
        self.recent = deque((row["loss"] for row in before if isinstance(row.get("loss"), float)),
                            maxlen=RECENT)

    @contextlib.contextmanager
    def progress_bar(self) -> Iterator[None]:
        self.restart_clock()
        self.bar = tqdm(total=self.run.args.steps, initial=self.run.start, unit="step",
                        dynamic_ncols=True, disable=distributed.rank() > 0, smoothing=0.1)
        with self.bar:
            yield

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def record(self, numbers: dict, t: Tensor) -> None:
        if not self.columns:
            self.columns = list(numbers)
            length = min(self.run.args.log_every, self.run.stop - self.run.start)
            self.quarters = torch.arange(len(QUARTERS), device=self.device)
            self.buffer = torch.zeros(length, len(self.columns) + 2 * len(QUARTERS),
                                      device=self.device)
            scaled = self.run.state.scaler.is_enabled()     # fp16: inf gradients are expected
            self.ignored = torch.tensor([c == "grad_norm" and scaled for c in self.columns],
                                        device=self.device)
        row = torch.stack([     # full() fills on the device; a copy from the host would wait for it
            n.detach().float().mean() if isinstance(n, Tensor) else
            torch.full((), n, device=self.device) for n in numbers.values()])
        quarter = t * len(QUARTERS) // self.run.state.num_timesteps
        inside = quarter[:, None] == self.quarters                              # (B, 4)
        sums = (inside * numbers["loss"].detach().float()[:, None]).sum(dim=0)
        self.buffer[self.recorded - self.read] = torch.cat([row, sums, inside.sum(dim=0)])
        good = (row.isfinite() | self.ignored).all() | (self.first_bad != NEVER)
        self.recorded += 1
        self.first_bad = torch.where(good, self.first_bad, self.recorded)
        self.bar.update()
        if self.recorded - self.read == len(self.buffer):
            self.flush()

    def flush(self) -> None:
        """Read the device's record: rows to metrics.jsonl, the loss to the bar. Raises UserError
        at a step that was not finite, before anything of it is saved or shown."""
        count = self.recorded - self.read
        if not count:
            return
        rows = distributed.all_reduce_mean(self.buffer[:count].clone()).tolist()
        first_bad = -distributed.all_reduce_max(-int(self.first_bad))
        named = [{"step": step, **{c: float(f"{n:.7g}") for c, n in self._named(row)}}
                 for step, row in enumerate(rows, self.read + 1) if step < first_bad]
        self.unwritten += map(json.dumps, named)
        self.read = self.recorded
        self._write()
        self.run.logger.log(named)
        if first_bad != NEVER:
            raise UserError(
                f"the loss or its gradient is not finite at step {first_bad}: nothing of it is "
                f"saved; the last good checkpoint is {self.run._last_saved()}. Start again with a "
                f"lower --lr, a longer --warmup or --precision fp32", status=1)
        seconds = time.perf_counter() - self.clock
        self.restart_clock()
        self.recent.extend(row[0] for row in rows)
        self.bar.set_postfix_str(f"loss {sum(row[0] for row in rows) / count:.4f}, "
                                 f"{count * self.run.args.batch_size / seconds:,.0f} images/s",
                                 refresh=False)

    def _named(self, row: list[float]) -> Iterator[tuple[str, float]]:
        """The names and values of a buffer's row. Its sums and counts are means over the ranks,
        whose ratio is that of the totals; a quarter without an image has no value."""
        end = len(self.columns)
        yield from zip(self.columns, row, strict=False)
        for name, total, count in zip(QUARTERS, row[end:], row[end + len(QUARTERS):], strict=False):
            if count:
                yield name, total / count

    def _write(self) -> None:
        if distributed.rank() > 0 or not self.unwritten:
            return
        path = self.run.folder / "metrics.jsonl"
        try:
            rows = ("\n".join(self.unwritten) + "\n").encode()
            with open(path, "ab", buffering=0) as file:
                before = file.tell()
                if file.write(rows) < len(rows):            # the disk is full: no partial line
                    file.truncate(before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten = []
        except OSError as error:
            distributed.warn(f"{path} cannot be written ({reason(error)}): training continues, "
                             f"and the rows will be written with the next ones")


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second Ctrl-C stops at once.

    torchrun forwards its own signals to its processes: a SIGTERM after a Ctrl-C is never a second
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
            os.write(2, b"\nstopped at once; the last checkpoint is kept\n")
            os._exit(130)
        if not self.received:
            self.received, self._since = signum, time.monotonic()
            os.write(2, b"\nstopping after this step, with a checkpoint\n")
