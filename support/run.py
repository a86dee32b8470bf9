"""A training run: its folder and lock, what it resumes, its record of losses, signals, checkpoints.

Whatever would hide the algorithm in the training loop is here; the loop shows `run.steps()` and
`run.log(...)`. Rank 0 alone writes.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from support import checkpoint, compute, data, flags, loggers, pictures, replay
from support.command import UserError, atomic_write, check_target, reason, say, short, warn
from support.compute import RANK, WORLD, all_reduce, broadcast_from_rank0

RECENT = 100        # steps whose mean loss the summary has


class Run:
    """In order: Run(...), load_images(), load_initial(...), begin(...), steps() with log(...) in
    each, finish(). args: the value of every flag. share: this process's slice of a batch."""

    def __init__(self, argv: list[str] | None, description: str, recipe: dict, presets: dict,
                 choices: dict):
        defaults = {**flags.OTHERS, **recipe}
        given = vars(flags.train_parser(description, defaults, presets, choices).parse_args(argv))
        self.device = compute.pick_device(given.get("device"))
        if "config" in given:
            given = {**broadcast_from_rank0(lambda: flags.read_config(given["config"], {
                **defaults, **presets["cpu"]})), **given}
        if "resume" in given and "init_from" in given:
            raise UserError("--resume continues a run, --init-from starts a new one: give one")
        self.given, self.folder, self.lock, self.source = given, None, None, None
        self.resumed = broadcast_from_rank0(self.find_start)
        preset = presets["gpu" if self.device.type == "cuda" else "cpu"]
        self.args = args = flags.resolve(given, {**defaults, **preset},
                                         self.resumed and self.resumed["config"]["recipe"])
        self.precision = compute.pick_precision(args.precision, self.device)
        self.share = compute.share_of(args.batch_size)
        self.start = self.done = self.resumed["step"] if self.resumed else 0
        self.stop = min(args.steps, self.start + (args.stop_after or args.steps))
        self.pending: list[tuple] = []      # (loss, t, grad_norm, lr) of each step, on the device
        self.unwritten, self.saved = "", None
        self.signal, self.logger = 0, None

    def find_start(self) -> dict | None:
        """The checkpoint that --resume asks for, whose folder is then locked. On rank 0."""
        if "resume" not in self.given:
            return None
        out, name = self.given.get("out"), self.given["resume"]
        if name is None:
            self.folder = self.source = Path(out) if out else checkpoint.newest_run()
            if self.folder is None or not checkpoint.checkpoints_in(self.folder):
                raise UserError(f"no run to resume{f' in {out}' * bool(out)}: start one without "
                                f"--resume")
        else:
            path = checkpoint.find_checkpoint(name)
            state, self.source = checkpoint.load(path, full=True), path.parent
            self.folder = Path(out or self.source)
            in_its_own = self.folder.resolve() == self.source.resolve()
            if any(int(p.stem[5:]) > state["step"] for p in checkpoint.checkpoints_in(self.folder)
                   ) if in_its_own else not is_free(self.folder):
                raise UserError(f"{self.folder} holds other work: give a new --out to branch off "
                                f"from {path}")
            self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = checkpoint.lock_folder(self.folder)
        return checkpoint.newest_valid(self.folder) if name is None else state

    def load_images(self) -> data.ImageSet:
        """The data set that the flags name. Rank 0 loads (or downloads) it first. Raises UserError
        where it is not the resumed run's, or differs between the processes."""
        args = self.args
        named = self.resumed or {"dataset", "data_dir", "config"} & self.given.keys()
        found = []

        def load() -> dict:
            try:
                images = data.load_or_glyphs(args.dataset, args.data_dir, args.image_size, named)
            except UserError as error:
                if not self.resumed or "dataset" in self.given:
                    raise
                raise UserError(f"{error} (the run's --dataset {args.dataset}: name it again if it "
                                f"is in another place now)") from None
            found.append(images)
            return dict(dataset=images.name, images=len(images.images), image_size=images.size,
                        channels=images.channels, digest=images.digest())

        about = broadcast_from_rank0(load)
        if ":" not in args.dataset:
            args.dataset = about["dataset"]
        self.about_data = about if RANK == 0 else load()
        if self.about_data != about:
            raise UserError(f"process {RANK} has other data than process 0: {self.about_data} "
                            f"here, {about} there")
        here = {"classes": found[0].class_names, **about}
        there = {"classes": self.resumed["class_names"], **self.resumed["config"]["data"]} \
            if self.resumed else here
        if any(here[key] != there.get(key) for key in here.keys() - {"dataset"}):
            raise UserError("the data set is not the run's: " + "; ".join(
                f"{key} {here[key]} here, {there.get(key)} in the run" for key in here
                if key == "dataset" or here[key] != there.get(key)))
        return found[0]

    def load_initial(self, model: torch.nn.Module, class_names: list[str]) -> None:
        """Copy the weights of --init-from into a new model, as far as they fit."""
        if self.args.init_from:
            checkpoint.load_fitting(model, checkpoint.find_checkpoint(self.args.init_from),
                                    class_names)

    # ------------------------------------------------------------ beginning and end

    def begin(self, model, ema, optimizers: list, diffusion, config: dict, class_names: list[str],
              preview: Callable[[], tuple[Tensor, int]]) -> None:
        """Restore the resumed state, or open a folder and write the checkpoint of step 0, which is
        read back: a kill from here on loses nothing but work. preview(): (images, columns)."""
        self.model, self.ema, self.optimizers, self.diffusion = model, ema, optimizers, diffusion
        self.config = {**config, "data": self.about_data, "recipe": flags.recipe_of(self.args)}
        self.class_names, self.preview = class_names, preview
        self.compiled = compute.pick_compile(self.args.compile, self.device, model,
                                             self.args.batch_size, self.stop - self.start)
        if self.resumed:
            checkpoint.restore(self.resumed, model, ema, optimizers)
        if self.start >= self.stop:
            say(f"{short(self.folder)} is at step {self.start:,} already: a larger --steps "
                f"continues it")
            return
        self.folder = broadcast_from_rank0(self.open_folder)
        args, about, size = self.args, self.about_data, sum(p.numel() for p in model.parameters())
        side, kinds = about["image_size"], len(class_names)
        say(f"{args.model} on {about['dataset']} ({about['images']:,} images, {about['channels']}x"
            f"{side}x{side}, {kinds} class{'es' * (kinds > 1)}): {size:,} parameters",
            f"{self.device.type}, {self.precision}, {'' if self.compiled else 'not '}compiled, "
            f"{WORLD} process{'es' * (WORLD > 1)}: steps {self.start:,} to {self.stop:,} of "
            f"{args.steps:,}, batch {args.batch_size}, predicts {args.prediction}, "
            f"weighting {args.weighting}, {args.optimizer}",
            f"run folder: {short(self.folder)}")

    def open_folder(self) -> Path:
        folder = self.folder
        if not self.resumed:
            label = f"{self.about_data['dataset']}-{self.args.model}"
            folder = Path(self.args.out) if self.args.out else checkpoint.new_folder(label)
            check_target(folder / "config.json", force=True)
            if not is_free(folder):
                raise UserError(f"{folder} is not empty: --resume --out {folder} continues a run, "
                                f"another --out starts one")
            self.lock = checkpoint.lock_folder(folder)
        self.folder = folder
        for unfinished in folder.glob(".*.tmp"):                    # of a kill
            unfinished.unlink()
        first = folder / f"step_{self.start:07d}.pt"
        if not first.exists():
            self.save()
            checkpoint.load(first, full=True)           # what cannot be read back is known now
        rows = {row["step"]: row for row in checkpoint.read_metrics(self.source)
                if row["step"] <= self.start} if self.source else {}
        record = "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows))
        for name, text in (("config.json", json.dumps(self.config, indent=1) + "\n"),
                           ("metrics.jsonl", record)):
            atomic_write(folder / name, lambda file, text=text: file.write(text.encode()))
        if self.args.logger != "none":
            self.logger = loggers.open_logger(self.args.logger, folder, self.config, self.start)
        return folder

    def finish(self) -> int:
        """Disconnect the processes and print the summary. Returns the exit status."""
        self.model = self.ema = self.optimizers = None      # DistributedDataParallel goes first
        if WORLD > 1:
            dist.destroy_process_group()
        if self.lock:
            self.lock.close()
        if RANK > 0 or self.done == self.start:
            return 128 + self.signal if self.signal else 0
        newest = short((checkpoint.checkpoints_in(self.folder) or ["none"])[-1])
        if self.saved != self.done:
            raise UserError(f"step {self.done} could not be saved; the last checkpoint is {newest}",
                            status=1)
        rows = checkpoint.read_metrics(self.folder)
        losses = [row["loss"] for row in rows[-RECENT:] if "loss" in row]
        say(f"step {self.done:,}, loss {sum(losses) / max(1, len(losses)):.4f} (last {len(losses)} "
            f"steps); saved: {newest}")
        if self.done < self.args.steps:
            device = ["--device", self.args.device] if self.args.device else []
            say(f"stopped at step {self.done:,} of {self.args.steps:,}; to continue: " + shlex.join(
                ["python", "train_mnist.py", "--resume", "--out", short(self.folder), *device]))
        else:
            say("next: " + shlex.join(["python", "sample.py", newest]))
        return 128 + self.signal if self.signal else 0

    # ------------------------------------------------------------ steps

    def replayed(self, step: Callable) -> Callable:
        """The step as it will be called: on one GPU as a CUDA graph."""
        if self.device.type == "cuda" and WORLD == 1:
            return replay.replayed_step(step, self.optimizers, self.device)
        return step

    def steps(self) -> Iterator[int]:
        """The steps of this call, with a progress bar; previews and checkpoints between them. A
        signal ends it after a step."""
        if self.start >= self.stop:
            return
        args, self.clock = self.args, time.perf_counter()
        with self.signals(), tqdm(total=args.steps, initial=self.start, unit="step", smoothing=0.1,
                                  dynamic_ncols=True, disable=RANK > 0) as self.bar:
            while self.done < self.stop:
                yield self.done
                self.done += 1
                self.bar.update()
                end, stopped = self.done == self.stop, self.signal
                if WORLD > 1:                       # all processes stop at the same step
                    stopped = int(all_reduce(torch.tensor(self.signal), dist.ReduceOp.MAX)) \
                        if end or self.done % 10 == 0 else 0
                    self.signal = stopped or self.signal
                due = bool(end or stopped or self.done % args.save_every == 0)
                if due or len(self.pending) == min(args.log_every, 1000):
                    self.flush()
                if due:
                    self.guarded(self.save, f"step {self.done}")
                if end or self.done % args.preview_every == 0 and not stopped:
                    self.flush()
                    self.guarded(self.draw_preview, "the preview")
                    self.clock = time.perf_counter()
                if stopped:
                    break
        self.tell_logger("close")

    def random(self, step: int) -> compute.StepRandom:
        """The random numbers of a step: a function of --seed and the step alone."""
        return compute.StepRandom(self.device, self.args.seed, step, self.args.batch_size,
                                  self.share)

    def log(self, *, loss: Tensor, t: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Keep this step's loss (B,), timesteps (B,) and gradient norm, without waiting for the
        device: they are read every --log-every steps."""
        self.pending.append((loss, t, grad_norm, lr))

    def flush(self) -> None:
        """Append the pending steps to metrics.jsonl. Raises UserError at a step that was not
        finite, before anything of it is saved."""
        if not self.pending:
            return
        table = (all_reduce(self.table()) / WORLD).tolist()
        lines, first = [], self.done - len(table) + 1
        for step, (loss, loss_eps, norm, lr, *quarters) in enumerate(table, first):
            row = dict(loss=loss, loss_eps=loss_eps, grad_norm=norm, lr=lr, **{
                f"loss_q{i + 1}": quarters[i] / quarters[4 + i] for i in range(4)
                if quarters[4 + i]})
            if not math.isfinite(loss + norm):
                self.write_rows(lines)
                raise UserError(
                    f"the loss or its gradient is not finite at step {step}: nothing of it is "
                    f"saved. Start again with a lower --lr, a longer --warmup or --precision fp32",
                    status=1)
            lines.append(dict(step=step, **{k: float(f"{v:.7g}") for k, v in row.items()}))
        self.pending = []
        self.write_rows(lines)
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.bar.set_postfix_str(
            f"loss {sum(row[0] for row in table) / len(table):.4f}, "
            f"{len(table) * self.args.batch_size / seconds:,.0f} images/s", refresh=False)

    def table(self) -> Tensor:
        """A row (12,) for each pending step: the means of its numbers; in each quarter of the
        timesteps the sum of the losses and their count."""
        *numbers, lr = zip(*self.pending, strict=True)
        loss, t, norm = (torch.stack(column) for column in numbers)
        lr = torch.tensor(lr, device=t.device)
        loss_eps = loss_in_eps(self.diffusion, loss, t)                             # (n, B)
        means = torch.stack([loss.mean(1), loss_eps.mean(1), norm, lr], dim=1)
        quarter = t * 4 // self.diffusion.num_timesteps
        inside = quarter[:, :, None] == torch.arange(4, device=t.device)            # (n, B, 4)
        return torch.cat([means, (inside * loss[:, :, None]).sum(1), inside.sum(1)], dim=1)

    def write_rows(self, rows: list[dict]) -> None:
        self.unwritten += "".join(json.dumps(row) + "\n" for row in rows)
        self.guarded(self.append, "metrics.jsonl")
        self.tell_logger("log", rows)

    def append(self) -> None:
        """Append the unwritten rows; of those that do not fit on the disk, nothing."""
        with open(self.folder / "metrics.jsonl", "ab", buffering=0) as file:
            size, text = file.tell(), self.unwritten.encode()
            if file.write(text) < len(text):
                file.truncate(size)
                raise OSError(28, os.strerror(28))
        self.unwritten = ""

    def save(self) -> None:
        checkpoint.save(self.folder / f"step_{self.done:07d}.pt", dict(
            step=self.done, config=self.config, class_names=self.class_names,
            ema=self.ema.state_dict(), model=self.model.state_dict(),
            opt={i: opt.state_dict() for i, opt in enumerate(self.optimizers)}))
        self.saved = self.done
        for old in checkpoint.checkpoints_in(self.folder)[:-self.args.keep]:
            old.unlink(missing_ok=True)

    def draw_preview(self) -> None:
        path = self.folder / "samples" / f"step_{self.done:07d}.png"
        pictures.save_picture(path, pictures.grid(*self.preview()))
        self.tell_logger("preview", path, self.done)

    def guarded(self, write: Callable, what: str) -> None:
        """On a write error (a full disk ...) warn, and train on."""
        if RANK == 0:
            try:
                write()
            except OSError as error:
                warn(f"{what} cannot be written in {self.folder} ({reason(error)}): training "
                     f"continues")

    def tell_logger(self, method: str, *args) -> None:
        try:
            if self.logger:
                getattr(self.logger, method)(*args)
        except Exception as error:                      # of its disk, its network
            self.logger = None
            warn(f"--logger failed ({reason(error)}): training continues without it")

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the step; a second Ctrl-C stops at once,
        as does the first one before the first step, which compiles, is done. torchrun forwards its
        own signals, so under it a SIGINT within a second is no second one."""
        since = 0.0

        def handle(signum: int, frame) -> None:
            nonlocal since
            forwarded = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - since < 1
            if self.signal and signum == signal.SIGINT and not forwarded or (
                    self.compiled and self.done == self.start):
                os.write(2, b"\nstopped at once; the last checkpoint is kept\n")
                os._exit(128 + signum)
            if not self.signal:
                self.signal, since = signum, time.monotonic()
                os.write(2, b"\nstopping after this step, with a checkpoint\n")

        wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                  if hasattr(signal, name)]             # SIGHUP: a closed ssh session
        before = {s: signal.signal(s, handle) for s in wanted
                  if signal.getsignal(s) is not signal.SIG_IGN} if \
            threading.current_thread() is threading.main_thread() else {}   # ignored: nohup
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def is_free(folder: Path) -> bool:
    """Does it hold nothing but what a kill before the first checkpoint leaves?"""
    return all(path.name == "lock" or path.suffix == ".tmp" for path in folder.glob("*"))


def loss_in_eps(diffusion, loss: Tensor, t: Tensor) -> Tensor:
    """The errors (B,) of `loss` as errors in eps, so that losses of different predictions can be
    compared: for a given xt, eps_hat is linear in the output. It is the output times alpha for v,
    times alpha / sigma for x0."""
    alpha, sigma = diffusion.alpha[t], diffusion.sigma[t]
    ratio = {"eps": torch.ones_like(alpha), "v": alpha, "x0": alpha / sigma}[diffusion.prediction]
    return loss / diffusion.loss_weight(t) * ratio.square()
