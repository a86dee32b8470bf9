"""Time training steps and sampling, in turn with what they are compared to.

    python -m tools.benchmark --compile                 in fp32 and bf16, compiled and not
    python -m tools.benchmark --against --sample 20     the published loop and sampler, and ours
    python -m tools.benchmark --against models.py:DiT   the same with the published network itself
    python -m tools.benchmark --model DiT-B/2 --image-size 32 --channels 4      latents of 256x256
    python -m tools.benchmark --busy 1 2                alone, and beside busy processes
    python -m tools.benchmark --scaling                 with more tokens, width and depth
    python -m tools.benchmark --profile FILE.txt        where the time of some steps goes

Every round times each row in turn, so that a machine that slows down, or is shared, slows them all;
the speed-up is the median over the rounds of the ratio to the first row. MFU (model flops
utilisation): flops per second of the network's forward and backward over those of a large matrix
product in the same precision. The images are noise: their content does not change the time.
"""

import support.threads  # noqa: F401  (before torch)

import copy
import itertools
import os
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from math import inf, log
from pathlib import Path
from statistics import linear_regression, median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_mnist
from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import MODELS, DiT
from sample import Checkpoint, sample
from support import compute, data, replay
from support.command import (
    COUNT, Parser, UserError, atomic_write, check_target, number, reason, run_command, say, short)
from support.registry import PROCESSES

IMAGES = 64         # sampled in one batch
BUSY = """import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):     # ends with its parent, however that ends
    sum(range(1_000_000))"""

# ---------------------------------------------------------------- timing


def time_rounds(works: dict[str, Callable], rounds: int, per: int, device: torch.device,
                busy: tuple[int, ...] = (), warm_up: int = 1) -> dict[str, dict[str, float]]:
    """Time each work in turn, `rounds` times, alone and beside each number of busy processes. For
    each: the median, the fastest and the slowest in ms, divided by `per`, and the median over the
    rounds of the ratio to the first."""
    synchronize = getattr(torch, device.type).synchronize       # nothing to wait for on the CPU
    times = {(name, n): [] for n in (0, *busy) for name in works}
    for work in works.values():
        for _ in range(warm_up):
            work()                              # compiles, captures, allocates
    for _ in range(rounds):
        for n in (0, *busy):
            with busy_processes(n):
                for name, work in works.items():
                    synchronize()
                    start = time.perf_counter()
                    work()
                    synchronize()
                    times[name, n].append(1000 * (time.perf_counter() - start) / per)
    first = next(iter(times.values()))
    return {name + f", {n} busy" * (n > 0): {
        "ms": median(own), "fastest": min(own), "slowest": max(own),
        "speed-up": median(x / y for x, y in zip(first, own, strict=True))}
        for (name, n), own in times.items()}


@contextmanager
def busy_processes(count: int):
    """`count` processes that compute without a pause until the block ends."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", BUSY, str(os.getpid())],
                                stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in running:
            process.stdout.readline()           # it has started
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = next(iter(rows.values()))
    say("", title, " " * 28 + "".join(f"{column:>10}" for column in columns), *(
        f"{name:28}" + "".join(f"{n:10,.2f}" for n in row.values()) for name, row in rows.items()))


def hardware(device: torch.device) -> str:
    """What the numbers depend on, in a line."""
    about = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = ["CPU", *(s.partition(": ")[2] for s in about.splitlines() if "model name" in s)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else names[-1]
    return (f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, on {device.type}")


# ---------------------------------------------------------------- what is timed


class Ours:
    """A network in training: each call makes one more step, as `train` of train_mnist.py does."""

    def __init__(self, args: Namespace, precision: str, compiled: bool):
        self.args, self.precision, self.steps = args, precision, itertools.count()
        self.model = DiT(**args.sizes).to(args.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.diffusion = GaussianDiffusion(prediction=args.prediction, weighting=args.weighting)
        self.diffusion.to(args.device)
        self.optimizers = train_mnist.make_optimizers(self.model, args)
        net = compute.prepare(self.model, args.device, precision, compiled)
        scaler = torch.amp.GradScaler(args.device.type, enabled=precision == "fp16")
        self.update = partial(train_mnist.training_step, net, self.ema, self.optimizers,
                              self.diffusion, scaler, args.clip or inf)
        if args.device.type == "cuda" and not scaler.is_enabled():
            self.update = replay.replayed_step(self.update, self.optimizers, args.device)

    def __call__(self) -> None:
        args, step = self.args, next(self.steps)
        rng = compute.StepRandom(args.device, 0, step, args.batch_size, slice(None))
        x0, y = args.batches(step)
        y = torch.where(rng.uniform() < args.label_dropout, self.model.null_class, y)
        t = train_mnist.draw_timesteps(self.diffusion, rng, args)
        eps = rng.normal(*x0.shape[1:])
        compute.set_learning_rates(self.optimizers, train_mnist.schedule(
            step, args.steps, args.warmup, args.decay))
        self.update(x0, t, y, eps, train_mnist.ema_decay_at(step, args.ema_decay))

    def sample(self, precision: str) -> None:
        checkpoint = Checkpoint(self.ema, self.diffusion, [], train_mnist.SAMPLING)
        list(sample(checkpoint, torch.arange(IMAGES) % 10, cfg_scale=2.0, steps=self.args.sample,
                    precision=precision))


class PublishedDiT(DiT):
    """`dit.DiT`, which computes what the published network does, with its label dropout inside."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.training:
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.null_class, y)
        return super().forward(x, t, y)


class Published:
    """A network in training by the published loop (train.py of facebookresearch/DiT): each call
    makes one more step, in fp32 (TF32 on a GPU), without data loader and autoencoder."""

    precision = "fp32"

    def __init__(self, args: Namespace):
        self.args, self.steps, self.running_loss = args, itertools.count(), 0.0
        network = published_network(args.against)
        self.model = network(**args.sizes, learn_sigma=True).to(args.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.ema.null_class = args.sizes["num_classes"]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)
        self.diffusion = PROCESSES["learned-variance"](prediction="eps").to(args.device)

    def __call__(self) -> None:
        x0, y = self.args.batches(next(self.steps))
        t = torch.randint(0, self.diffusion.num_timesteps, (len(y),), device=x0.device)
        loss = self.diffusion.loss(self.model, x0, t, y, torch.randn_like(x0)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            average = dict(self.ema.named_parameters())
            for name, parameter in self.model.named_parameters():
                average[name].mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)
        self.running_loss += loss.item()        # here it waits for the device

    def sample(self) -> None:
        """DDPM with the learned variances over some of the timesteps."""
        xT = torch.randn_like(self.args.batches(0)[0][:1].expand(IMAGES, -1, -1, -1))
        y = torch.arange(IMAGES, device=xT.device) % 10
        predict = self.diffusion.guided(classifier_free_guidance)(self.ema, y, 2.0)
        list(self.diffusion.ddpm_sample(predict, xT, steps=self.args.sample))


def published_network(spec: str) -> Callable:
    """NETWORK of FILE.py:NETWORK, which is executed; PublishedDiT without one."""
    if not spec:
        return PublishedDiT
    file, _, name = spec.rpartition(":")
    try:
        return runpy.run_path(file)[name]
    except Exception as error:                  # whatever that file does
        raise UserError(f"--against {spec}: no FILE.py:NETWORK ({reason(error)})") from None


# ---------------------------------------------------------------- the measurements


def comparisons(args: Namespace) -> dict[str, Ours | Published]:
    """What is timed. The first one is what speed-ups refer to."""
    works, kinds = {}, [(name, name, "muon") for name in dict.fromkeys(("fp32", "bf16", args.best))]
    if args.against is not None:
        works["published"] = Published(args)
        kinds = [(f"ours, {name}", args.best, name) for name in ("adamw", "muon")]
    elif args.busy:
        kinds = [("as trained", args.best, "muon")]
    for name, precision, optimizer in kinds:
        for compiled in (False, True)[: 1 + args.compile]:
            its = Namespace(**{**vars(args), "optimizer": optimizer})
            works[name + ", compiled" * compiled] = Ours(its, precision, compiled)
    return works


def time_steps(works: dict, args: Namespace) -> dict[str, dict[str, float]]:
    n = args.steps_per_round
    repeated = {name: lambda work=work: [work() for _ in range(n)] for name, work in works.items()}
    return time_rounds(repeated, args.rounds, n, args.device, args.busy,
                       warm_up=1 + replay.WARM_UP // n)


def training(works: dict, args: Namespace) -> None:
    rows, flops, rates = time_steps(works, args), step_flops(args), {}
    for precision in {work.precision for work in works.values()}:
        side = 8192 if args.device.type == "cuda" else 2048
        matrix = torch.randn(side, side, device=args.device, dtype=compute.DTYPES[precision])
        row = time_rounds({"": lambda x=matrix: x @ x}, args.rounds, 1, args.device)[""]
        rates[precision] = 2 * side**3 / row["fastest"]
    for name, row in rows.items():
        precision = works[name].precision if name in works else args.best       # beside busy ones
        row["MFU %"] = 100 * flops / row["ms"] / rates[precision]
    show(f"ms of a training step, {args.rounds} rounds of {args.steps_per_round} steps", rows)
    say(f"a step: {flops / 1e9:,.1f} GFLOP; a large matrix product, in GFLOP/s: "
        + ", ".join(f"{name} {rate / 1e6:,.0f}" for name, rate in rates.items()))


def step_flops(args: Namespace) -> int:
    """Flops of a training step's forward and backward, counted on the CPU for one image."""
    side, channels = args.sizes["input_size"], args.sizes["in_channels"]
    x0, t = torch.zeros(1, channels, side, side), torch.tensor([0])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        GaussianDiffusion().loss(DiT(**args.sizes), x0, t, t, x0).mean().backward()
    return args.batch_size * counter.get_total_flops()


def sampling(works: dict, args: Namespace) -> None:
    ours = list(works.values())[-1]
    draws = {"published": works["published"].sample} if args.against is not None else {}
    for precision in dict.fromkeys(("fp32", compute.pick_precision("auto", args.device))):
        draws[f"ours, {precision}"] = partial(ours.sample, precision)
    show(f"ms of a sample, {args.rounds} rounds of {IMAGES} in {args.sample} steps, guidance 2",
         time_rounds(draws, args.rounds, IMAGES, args.device, args.busy))


def scaling(args: Namespace) -> None:
    """The step against tokens, width and depth; exponents fitted by least squares."""
    width, heads, depth = (args.sizes[key] for key in ("hidden_size", "num_heads", "depth"))
    series = dict(
        tokens={(side // p) ** 2: dict(input_size=side, patch_size=p)
                for side, p in ((28, 7), (28, 4), (28, 2), (64, 2))},
        width={width * k: dict(hidden_size=width * k, num_heads=heads * k) for k in (1, 2, 4)},
        depth={depth * k: dict(depth=depth * k) for k in (1, 2, 4)})
    for name, cases in series.items():
        settings = [with_sizes(args, **{**args.sizes, **changed}) for changed in cases.values()]
        rows = time_steps({f"{value:,} {name}": Ours(its, args.best, args.compile)
                           for value, its in zip(cases, settings, strict=True)}, args)
        for row, its in zip(rows.values(), settings, strict=True):
            row["GFLOP"] = step_flops(its) / 1e9
        show("ms of a training step", rows)
        fits = [linear_regression([log(value) for value in cases], [
            log(row[key]) for row in rows.values()]).slope for key in ("ms", "GFLOP")]
        say(f"time ~ {name}^{fits[0]:.2f}, flops ~ {name}^{fits[1]:.2f}")


def profile(work: Ours, path: Path) -> None:
    """Write torch.profiler's table, by the time of each operation itself."""
    for _ in range(1 + replay.WARM_UP):
        work()
    with torch.profiler.profile() as profiler:
        for _ in range(work.args.steps_per_round):
            work()
    kind = "device" if work.args.device.type == "cuda" else "cpu"
    text = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40)
    atomic_write(path, lambda file: file.write(text.encode()))
    say(f"written: {short(path)}")


# ---------------------------------------------------------------- the command


def with_sizes(args: Namespace, **sizes) -> Namespace:
    """args for a network of these sizes, with batches of noise."""
    shape = max(256, args.batch_size), sizes["in_channels"], *[sizes["input_size"]] * 2
    images = data.ImageSet(torch.randint(256, shape, dtype=torch.uint8),
                           torch.arange(shape[0]) % 10, list("0123456789"), "noise")
    batches = data.Batches(images.to(args.device), args.batch_size, 0, args.device)
    return Namespace(**{**vars(args), "sizes": sizes, "batches": batches})


def main(argv: list[str] | None = None) -> int:
    flags = parser().parse_args(argv)
    if flags.profile:
        check_target(flags.profile, suffix=".txt")
    flags.device = device = compute.pick_device(flags.device)
    if flags.compile:
        compute.pick_compile(True, device, None, 0, 0)                  # or refuse
    preset = train_mnist.PRESETS["cpu" if device.type == "cpu" else "gpu"]
    given = {key: value for key, value in vars(flags).items() if value is not None}
    args = Namespace(**{**train_mnist.RECIPE, **preset, "against": None, **given},
                     best=compute.pick_precision("auto", device, training=True))
    args = with_sizes(args, **{**MODELS[args.model], "input_size": args.image_size,
                               "in_channels": args.channels, "num_classes": 10})
    say(hardware(device), f"{args.model}, batch {args.batch_size} of {args.channels}x"
        f"{args.image_size}x{args.image_size}, predicts {args.prediction}")
    try:
        if flags.profile:
            profile(Ours(args, args.best, args.compile), flags.profile)
        elif flags.scaling:
            scaling(args)
        else:
            works = comparisons(args)
            training(works, args)
            if flags.sample:
                sampling(works, args)
    except ValueError as error:                 # the patch does not fit, say
        raise UserError(f"--model {args.model}: {error}") from None
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    add = p.add_argument
    add("--model", choices=MODELS, metavar="NAME", help="(default: the preset's)")
    add("--batch-size", type=COUNT, help="images per step (default: the preset's)")
    add("--image-size", type=COUNT, default=28, help="(default: 28)")
    add("--channels", type=COUNT, default=1, help="(default: 1)")
    add("--rounds", type=COUNT, default=10, help="timings of each row (default: 10)")
    add("--steps-per-round", type=COUNT, default=10, help="timed as one (default: 10)")
    add("--compile", action="store_true", help="also time each row with torch.compile")
    add("--busy", type=number(int, 1, 256), nargs="+", default=(), metavar="N",
        help="time training alone, and beside N processes that compute without a pause")
    add("--against", nargs="?", const="", metavar="FILE.py:NETWORK", help="also the published loop,"
        " with the network NETWORK(input_size=..., learn_sigma=True) of that file, which is "
        "executed (default: that of dit.py)")
    add("--sample", type=number(int, 1, 1000), nargs="?", const=50, metavar="STEPS",
        help="also time guided sampling in STEPS steps (default: 50)")
    add("--scaling", action="store_true", help="time more tokens, width and depth instead")
    add("--profile", type=Path, metavar="FILE.txt", help="write torch.profiler's table instead")
    add("--device", help="cuda, mps or cpu (default: the fastest available)")
    return p


if __name__ == "__main__":
    run_command(main)
