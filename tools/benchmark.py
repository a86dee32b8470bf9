"""Milliseconds per training step: the effect of bf16, attention kernels and the compiler.

    python -m tools.benchmark                           the preset's model, fp32 and bf16
    python -m tools.benchmark --compile --rounds 20     each of them also compiled
    python -m tools.benchmark --model DiT-Mini/2 --batch-size 256 --optimizer adamw --sample

Every round times each variant in turn, so that a machine that slows down, or is shared, slows them
all; ratios are taken within a round. It times `train` of train_mnist.py, on glyphs.
"""

import contextlib
import os
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import train_mnist
from diffusion import GaussianDiffusion
from dit import MODELS, DiT
from sample import Checkpoint, sample
from support import data, distributed
from support.cli import BATCH, COUNT, Parser, UserError, number, run_command, say
from support.sampling import resolve_sampling
from support.settings import Settings
from support.state import Loss, TrainingState

WARM_UP = 2                     # steps of each variant before the first round, with compilation
# Name -> (bf16 or fp32, the attention kernels that torch may choose from; none given: all)
VARIANTS = {"fp32": (False, ()), "bf16": (True, ()),
            "bf16, MATH attention": (True, (SDPBackend.MATH,))}

# ---------------------------------------------------------------- a variant


class Steps:
    """No-op stand-in for Run: the steps from `start` on, of which nothing is recorded."""

    def __init__(self, args: Namespace, device: torch.device, start: int, count: int):
        self.args, self.device, self.start, self.count = args, device, start, count

    def steps(self) -> range:
        return range(self.start, self.start + self.count)

    def random(self, step: int) -> distributed.StepRandom:
        return distributed.StepRandom(self.device, self.args.seed, step, self.args.batch_size,
                                      slice(None))

    def log(self, **numbers) -> None:
        pass


class VariantLoss(Loss):
    """The loss with the network's forward in fp32 or bf16, restricted to some attention kernels.
    `distributed.under_autocast` selects one of these; here each runs on any device."""

    bf16: bool
    kernels: tuple

    def forward(self, x0, t, y, eps):
        def net(xt, t, y):
            kernels = sdpa_kernel(list(self.kernels)) if self.kernels else contextlib.nullcontext()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), kernels:
                return self.model(xt, t, y)

        return self.diffusion.loss(net, x0, t, y, eps)


class Variant:
    """A model in training, in its own precision. variant(n) makes n more steps."""

    def __init__(self, name: str, args: Namespace, device: torch.device, images: data.ImageSet,
                 compiled: bool):
        self.name, self.args, self.device, self.done = name, args, device, 0
        self.model, self.diffusion = new_model(args, images, device)
        self.state = TrainingState(self.model, train_mnist.make_optimizers(self.model, args),
                                   self.diffusion, args, device)
        # A class for each variant: dynamo does not guard on which attention kernels are allowed,
        # and would reuse what it has compiled for another instance of the same class
        bf16, kernels = VARIANTS[name]
        loss = type("VariantLoss", (VariantLoss,), dict(bf16=bf16, kernels=kernels))
        self.state.loss = loss(self.model, self.diffusion, device, "")
        if compiled:
            self.state.loss.compile()
            self.name += ", compiled"
        self.batches = data.Batches(images.to(device), args.batch_size, args.seed, device)

    def __call__(self, steps: int) -> None:
        train_mnist.train(self.batches, self.state, self.diffusion,
                          Steps(self.args, self.device, self.done, steps))
        self.done += steps


def new_model(args: Namespace, images: data.ImageSet, device: torch.device
              ) -> tuple[DiT, GaussianDiffusion]:
    try:
        model = DiT(**MODELS[args.model], input_size=images.images.shape[-1],
                    in_channels=images.images.shape[1], num_classes=len(images.class_names))
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    diffusion = GaussianDiffusion(**train_mnist.DIFFUSION, prediction=args.prediction,
                                  weighting=args.weighting)
    return model.to(device), diffusion.to(device)


# ---------------------------------------------------------------- time


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The duration of `work`, including what it has queued on the device."""
    synchronize = getattr(torch, device.type).synchronize       # nothing to wait for on the CPU
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def time_rounds(works: dict[str, Callable[[], object]], count: int, device: torch.device, desc: str
                ) -> dict[str, list[float]]:
    """Seconds of each work, `count` times, in turn."""
    times = {name: [] for name in works}
    for _ in tqdm(range(count), desc=desc, unit="round", leave=False, dynamic_ncols=True):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def table(times: dict[str, list[float]], per: int, unit: str) -> list[str]:
    """A row per work: its median over the rounds in ms per `unit` (there are `per` in each), the
    fastest and slowest round, and the median of its ratio to the first work of the same round."""
    first = next(iter(times.values()))
    lines = [f"{'':30}{'ms/' + unit:>10}{'fastest':>10}{'slowest':>10}{'ratio':>8}"]
    for name, own in times.items():
        ms = [1000 * x / per for x in (statistics.median(own), min(own), max(own))]
        ratio = statistics.median(x / y for x, y in zip(own, first, strict=True))
        lines.append(f"{name:30}" + "".join(f"{x:10.2f}" for x in ms) + f"{ratio:8.2f}")
    return lines


def hardware(device: torch.device) -> list[str]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(s for s in lines if s.startswith("model name")).partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; " \
        if device.type == "cuda" else ""
    return [f"{gpu}{cpu}, {cores} core{'s' * (cores != 1)}{load}",
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, on {device.type}"]


def selected(device: torch.device) -> str:
    """The variant that train_mnist.py selects on this device."""
    precision = distributed.pick_precision("auto", device)
    return precision + ", MATH attention" * (precision == "bf16" and device.type == "cpu")


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    flags = parser().parse_args(argv)
    if distributed.world_size() > 1:
        raise UserError("benchmark runs in one process")
    device = distributed.pick_device(flags.device)
    if flags.compile:
        distributed.check_compiler(device)
    given = {key: getattr(flags, key) for key in ("model", "batch_size", "optimizer")
             if getattr(flags, key) is not None}
    args = Settings(train_mnist.RECIPE, train_mnist.PRESETS).resolve(
        given | dict(steps=WARM_UP + flags.rounds * flags.steps_per_round, precision="fp32"),
        device.type)
    images = data.draw_glyphs(max(256, args.batch_size))
    model, diffusion = new_model(args, images, device)
    say(*hardware(device), f"{args.model}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, batch {args.batch_size}, {args.optimizer}, predicts {args.prediction}")
    benchmark_training(flags, args, device, images)
    if flags.sample:
        checkpoint = Checkpoint(model.eval(), diffusion, images.class_names, train_mnist.SAMPLING,
                                0, Path())
        benchmark_sampling(flags, args, device, checkpoint)
    return 0


def benchmark_training(flags: Namespace, args: Namespace, device: torch.device,
                       images: data.ImageSet) -> None:
    variants = [Variant(name, args, device, images, compiled)
                for compiled in (False, True)[: 1 + flags.compile] for name in VARIANTS]
    for variant in tqdm(variants, desc="warming up", leave=False, dynamic_ncols=True):
        variant(WARM_UP)
    works = {v.name: lambda v=v: v(flags.steps_per_round) for v in variants}
    times = time_rounds(works, flags.rounds, device, "training")
    say("", f"training: {flags.rounds} rounds of {flags.steps_per_round} steps, in turn; "
        f"train_mnist.py selects {selected(device)} here",
        *table(times, flags.steps_per_round, "step"))


def benchmark_sampling(flags: Namespace, args: Namespace, device: torch.device,
                       checkpoint: Checkpoint) -> None:
    """DDIM in fp32, as in sample.py: guidance 1 is one forward per step, 2 is two."""
    y = torch.arange(args.batch_size) % checkpoint.model.num_classes

    def draw(scale: float, steps: int) -> None:
        how = resolve_sampling(checkpoint, scale, steps, "ddim")
        for _ in sample(checkpoint, y, 0, how, batch_size=len(y)):
            pass

    for scale in (1, 2):
        draw(scale, min(WARM_UP, flags.sample))
    works = {f"guidance {scale}": lambda scale=scale: draw(scale, flags.sample) for scale in (1, 2)}
    times = time_rounds(works, flags.rounds, device, "sampling")
    say("", f"sampling: {flags.rounds} rounds of {len(y)} images in one batch, DDIM, "
        f"{flags.sample} steps, fp32", *table(times, len(y), "image"))


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", choices=MODELS, metavar="NAME", help="a name of dit.MODELS (default: "
                   "the device's preset)")
    p.add_argument("--batch-size", type=BATCH, help="images per step (default: the preset's)")
    p.add_argument("--optimizer", choices=("muon", "adamw"), help="(default: the preset's)")
    p.add_argument("--rounds", type=COUNT, default=10, help="timings of each variant (default: 10)")
    p.add_argument("--steps-per-round", type=COUNT, default=10, metavar="N", help="training steps "
                   "timed as one (default: 10)")
    p.add_argument("--compile", action="store_true", help="also time each variant with "
                   "torch.compile")
    p.add_argument("--sample", type=number(int, 1, train_mnist.DIFFUSION["num_timesteps"]),
                   nargs="?", const=50, metavar="STEPS", help="also time DDIM sampling in STEPS "
                   "steps (default: 50)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    return p


if __name__ == "__main__":
    run_command(main)
