"""How long does a training step take, and what do bf16, attention kernels and the compiler change?

    python benchmark.py                             the preset's model, fp32 and bf16
    python benchmark.py --compile --rounds 20       each of them compiled, too
    python benchmark.py --model DiT-Mini/2 --batch-size 256 --optimizer adamw --sample

Every round times each variant in turn, so that a machine that slows down or is shared slows all of
them; ratios are taken within a round. What is timed is `train` of train_mnist.py itself, on glyphs.
Not needed to understand DiT.
"""

import argparse
import contextlib
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import data as data_sets
import train_mnist
from cli import BATCH, COUNT, Parser, UserError, cli, number
from diffusion import GaussianDiffusion
from dit import MODELS, DiT
from ranks import Ranks, check_compiler, pick_device, pick_precision
from sample import sample
from settings import resolve

WARM_UP = 2                     # steps of each variant before the first round: compiled in there
# Name -> (in bf16, the attention kernels that torch may choose from: all where there are none)
VARIANTS = {"fp32": (False, ()), "bf16": (True, ()),
            "bf16, MATH attention": (True, (SDPBackend.MATH,))}

# ---------------------------------------------------------------- a variant


class Steps:
    """In the place of `Run`, for `train`: a number of steps, of which nothing is kept or shown."""

    def __init__(self, start: int, count: int):
        self.start, self.stop = start, start + count

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def record(self, step: int, *numbers) -> None:
        pass

    def after(self, step: int) -> bool:
        return False


def in_precision(model: nn.Module, device: torch.device, bf16: bool, backends: tuple) -> Callable:
    """The model as a function, its forward in fp32, or in bf16 with some attention kernels alone.

    `ranks.under_autocast` decides between these; here each of them can be had on any device.
    """
    def forward(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        kernels = sdpa_kernel(list(backends)) if backends else contextlib.nullcontext()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16), kernels:
            return model(xt, t, y)

    return forward


class Variant:
    """A model in training, in its own precision. variant(n) makes n more steps."""

    def __init__(self, name: str, s: argparse.Namespace, ranks: Ranks, images, compiled: bool):
        self.name, self.s, self.ranks, self.images = name, s, ranks, images.to(ranks.device)
        # A class of its own: dynamo does not see which attention kernels are allowed, and would
        # give a second model of the same class what it has compiled for the first.
        kind = type("DiT", (DiT,), {})
        self.model = new_model(s, images, kind).to(ranks.device)
        self.ema = copy.deepcopy(self.model).eval()
        if compiled:
            self.model.compile()
            self.name += ", compiled"
        self.net = in_precision(self.model, ranks.device, *VARIANTS[name])
        self.diffusion = GaussianDiffusion(**train_mnist.DIFFUSION, prediction=s.prediction)
        self.diffusion.to(ranks.device)
        self.optimizers = train_mnist.make_optimizers(self.model, s)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=False)
        self.batches = data_sets.Batches(len(images.images), s.batch_size, s.seed, ranks.device)
        self.done = 0

    def __call__(self, steps: int) -> None:
        train_mnist.train(Steps(self.done, steps), self.s, self.ranks, self.images, self.batches,
                          self.model, self.net, self.ema, self.diffusion, self.optimizers,
                          self.scaler)
        self.done += steps


def new_model(s: argparse.Namespace, images, kind: type = DiT) -> DiT:
    try:
        return kind(**MODELS[s.model], input_size=images.images.shape[-1],
                    in_channels=images.images.shape[1], num_classes=len(images.class_names))
    except ValueError as error:
        raise UserError(f"--model {s.model}: {error}") from None


# ---------------------------------------------------------------- time


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, the device's queue included."""
    synchronize = getattr(torch, device.type).synchronize       # nothing to wait for on the CPU
    synchronize()
    begun = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begun


def rounds(works: dict[str, Callable[[], object]], count: int, device: torch.device, desc: str
           ) -> dict[str, list[float]]:
    """Seconds of each work, `count` times, in turn."""
    times = {name: [] for name in works}
    with tqdm(total=count * len(works), desc=desc, leave=False, dynamic_ncols=True) as bar:
        for _ in range(count):
            for name, work in works.items():
                times[name].append(seconds(work, device))
                bar.update()
    return times


def table(times: dict[str, list[float]], per: int, unit: str) -> str:
    """A row per work: its median over the rounds in ms per `unit` (there are `per` in each), the
    fastest and slowest round, and the median of its ratio to the first work of the same round."""
    first = next(iter(times.values()))
    lines = [["", f"ms/{unit}", "fastest", "slowest", "ratio"]]
    for name, own in times.items():
        ms = [1000 * x / per for x in (statistics.median(own), min(own), max(own))]
        ratio = statistics.median(x / y for x, y in zip(own, first, strict=True))
        lines.append([name, *(f"{x:.2f}" for x in ms), f"{ratio:.2f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in
                     zip(line[1:], widths[1:], strict=True)]) for line in lines)


# ---------------------------------------------------------------- words


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """What the numbers depend on, in two lines."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; " \
        if device.type == "cuda" else ""
    return (f"{gpu}{cpu_name()}, {cores} core{'s' * (cores != 1)}{load}\n"
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, on {device.type}")


def chosen(device: torch.device) -> str:
    """The variant that train_mnist.py takes here, in the words of VARIANTS."""
    precision = pick_precision("auto", device)
    return precision + ", MATH attention" * (precision == "bf16" and device.type == "cpu")


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("benchmark.py runs in one process")
    device = pick_device(a.device)
    if a.compile:
        check_compiler(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")              # TF32, as train_mnist.py
    given = {key: getattr(a, key) for key in ("model", "batch_size", "optimizer")
             if getattr(a, key) is not None}
    s = resolve(given | {"steps": WARM_UP + a.rounds * a.steps_per_round}, device.type)
    images = data_sets.draw_glyphs(max(256, s.batch_size))
    parameters = sum(p.numel() for p in new_model(s, images).parameters())
    print(f"{hardware(device)}\n{s.model}, {parameters:,} parameters, batch {s.batch_size}, "
          f"{s.optimizer}, predicts {s.prediction}", flush=True)
    benchmark_training(a, s, Ranks(device), images)
    if a.sample:
        benchmark_sampling(a, s, device, images)
    return 0


def benchmark_training(a: argparse.Namespace, s: argparse.Namespace, ranks: Ranks, images) -> None:
    variants = [Variant(name, s, ranks, images, compiled)
                for compiled in (False, True)[: 1 + a.compile] for name in VARIANTS]
    for variant in tqdm(variants, desc="warming up", leave=False, dynamic_ncols=True):
        variant(WARM_UP)
    times = rounds({v.name: lambda v=v: v(a.steps_per_round) for v in variants}, a.rounds,
                   ranks.device, "training")
    print(f"\ntraining: {a.rounds} rounds of {a.steps_per_round} steps, in turn; train_mnist.py "
          f"takes {chosen(ranks.device)} here\n{table(times, a.steps_per_round, 'step')}")


def benchmark_sampling(a: argparse.Namespace, s: argparse.Namespace, device: torch.device, images
                       ) -> None:
    """DDIM in fp32, as sample.py does it: guidance 1 is one forward per step, 2 is two."""
    model = new_model(s, images).to(device).eval()
    diffusion = GaussianDiffusion(**train_mnist.DIFFUSION, prediction=s.prediction).to(device)
    y = torch.arange(s.batch_size) % model.num_classes

    def draw(scale: float, steps: int) -> None:
        for _images in sample(model, diffusion, y, 0, scale, steps=steps, batch_size=len(y)):
            pass

    works = {f"guidance {scale}": lambda scale=scale: draw(scale, a.sample) for scale in (1, 2)}
    for scale in (1, 2):
        draw(scale, min(WARM_UP, a.sample))
    times = rounds(works, a.rounds, device, "sampling")
    print(f"\nsampling: {a.rounds} rounds of {len(y)} images at once, DDIM, {a.sample} steps, "
          f"fp32\n{table(times, len(y), 'image')}")


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("--model", choices=MODELS, metavar="NAME", help="a name of dit.MODELS (default: "
                   "the device's preset)")
    p.add_argument("--batch-size", type=BATCH, help="images per step (default: the preset's)")
    p.add_argument("--optimizer", choices=("muon", "adamw"), help="(default: the preset's)")
    p.add_argument("--rounds", type=COUNT, default=10, help="how often every variant is timed "
                   "(default: 10)")
    p.add_argument("--steps-per-round", type=COUNT, default=10, metavar="N", help="training steps "
                   "that are timed as one (default: 10)")
    p.add_argument("--compile", action="store_true", help="each variant with torch.compile, too")
    p.add_argument("--sample", type=number(int, 1, train_mnist.DIFFUSION["num_timesteps"]),
                   nargs="?", const=50, metavar="STEPS", help="sampling, too: DDIM in so many "
                   "steps (50 if no number is given)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    return p


if __name__ == "__main__":
    cli(main)
