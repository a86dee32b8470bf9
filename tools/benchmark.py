"""Time training steps and sampling, in turn with what they are compared to.

    python -m tools.benchmark                           in fp32 and in bf16
    python -m tools.benchmark --against --sample 20     the published loop and sampler, and ours
    python -m tools.benchmark --model DiT-B/2 --image-size 32 --channels 4      latents of 256x256
    python -m tools.benchmark --busy 1 2                alone, and beside busy processes
    python -m tools.benchmark --scaling DiT-Nano/4 DiT-Micro/7      beside other sizes
    python -m tools.benchmark --profile                 where the time of a step goes

Every round times each row in turn, so that a machine that slows down, or is shared, slows them all;
the speed-up is the median over the rounds of the ratio to the first row. So all rows are in memory
together. MFU (model flops utilisation): flops per second of the network's forward and backward over
those of a large matrix product in the same precision. The images are noise: their content does not
change the time.
"""

import copy
import itertools
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from statistics import median

import torch

import train_mnist
from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import MODELS, DiT
from sample import Checkpoint, sample
from support import compute, data, replay
from support.command import COUNT, Parser, UserError, number, run_command, say
from support.registry import PROCESSES
from variants.count import count

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

    def __init__(self, args: Namespace, precision: str):
        self.args, self.precision, self.steps = args, precision, itertools.count()
        self.model = DiT(**args.sizes).to(args.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.diffusion = GaussianDiffusion(prediction=args.prediction, weighting=args.weighting)
        self.diffusion.to(args.device)
        self.optimizers = train_mnist.make_optimizers(self.model, args)
        net = compute.prepare(self.model, args.device, precision, args.compile)
        self.update = partial(train_mnist.training_step, net, self.ema, self.optimizers,
                              self.diffusion, args.clip or inf)
        if args.device.type == "cuda":
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


class Published:
    """A network in training by the published loop (train.py of facebookresearch/DiT): each call
    makes one more step, in fp32 (TF32 on a GPU), without data loader and autoencoder. The network
    is that of dit.py, which computes what the published one does."""

    precision = "fp32"

    def __init__(self, args: Namespace):
        self.args, self.steps, self.running_loss = args, itertools.count(), 0.0
        self.model = DiT(**args.sizes, learn_sigma=True).to(args.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)
        self.diffusion = PROCESSES["learned-variance"](prediction="eps").to(args.device)

    def __call__(self) -> None:
        x0, y = self.args.batches(next(self.steps))
        y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.model.null_class, y)
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


# ---------------------------------------------------------------- the measurements


def comparisons(args: Namespace) -> dict[str, Ours | Published]:
    """What is timed. The first one is what speed-ups refer to."""
    if args.against:
        return {"published": Published(args)} | {f"ours, {name}": Ours(Namespace(
            **vars(args) | dict(optimizer=name)), args.best) for name in ("adamw", "muon")}
    if args.scaling:
        return {name: Ours(Namespace(**vars(args) | dict(sizes=args.sizes | MODELS[name])),
                           args.best) for name in (args.model, *args.scaling)}
    if args.busy or args.profile:
        return {"as trained": Ours(args, args.best)}
    return {precision: Ours(args, precision) for precision in dict.fromkeys(("fp32", args.best))}


def training(works: dict, args: Namespace) -> None:
    n, rates = args.steps_per_round, {}
    rows = time_rounds({name: lambda work=work: [work() for _ in range(n)]
                        for name, work in works.items()}, args.rounds, n, args.device, args.busy,
                       warm_up=1 + replay.WARM_UP // n)
    for precision in {work.precision for work in works.values()}:
        side = 8192 if args.device.type == "cuda" else 2048
        matrix = torch.randn(side, side, device=args.device, dtype=compute.DTYPES[precision])
        row = time_rounds({"": lambda x=matrix: x @ x}, args.rounds, 1, args.device)[""]
        rates[precision] = 2 * side**3 / row["fastest"]
    for name, row in rows.items():
        work = next(works[n] for n in works if name.startswith(n))      # "..., 1 busy"
        # of a multiply-add, forward and backward: two operations, three times
        flops = 3 * 2 * args.batch_size * count(DiT, **work.args.sizes)[1]
        row |= {"GFLOP": flops / 1e9, "MFU %": 100 * flops / row["ms"] / rates[work.precision]}
    show(f"ms of a training step, {args.rounds} rounds of {n} steps", rows)
    say("a large matrix product, in GFLOP/s: "
        + ", ".join(f"{name} {rate / 1e6:,.0f}" for name, rate in rates.items()))


def profile(work: Ours, args: Namespace) -> None:
    """torch.profiler's table of a round of steps, by the time of each operation itself."""
    with torch.profiler.profile() as profiler:
        for _ in range(args.steps_per_round):
            work()
    kind = "cpu" if args.device.type == "cpu" else "device"
    table = profiler.key_averages().table(
        sort_by=f"self_{kind}_time_total", row_limit=args.profile, max_name_column_width=50)
    say("", *table.splitlines())


def sampling(works: dict, args: Namespace) -> None:
    ours = list(works.values())[-1]
    draws = {"published": works["published"].sample} if args.against else {}
    for precision in dict.fromkeys(("fp32", compute.pick_precision("auto", args.device))):
        draws[f"ours, {precision}"] = partial(ours.sample, precision)
    show(f"ms of a sample, {args.rounds} rounds of {IMAGES} in {args.sample} steps, guidance 2",
         time_rounds(draws, args.rounds, IMAGES, args.device, args.busy))


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    flags = parser().parse_args(argv)
    flags.device = device = compute.pick_device(flags.device)
    if flags.compile:
        compute.pick_compile(True, device, None, 0, 0)                  # or refuse
    preset = train_mnist.PRESETS["cpu" if device.type == "cpu" else "gpu"]
    given = {key: value for key, value in vars(flags).items() if value is not None}
    args = Namespace(**{**train_mnist.RECIPE, **preset, **given},
                     best=compute.pick_precision("auto", device))
    args.sizes = dict(MODELS[args.model], input_size=args.image_size, in_channels=args.channels)
    n, side = max(256, args.batch_size), args.image_size
    images = data.ImageSet(torch.randint(256, (n, args.channels, side, side), dtype=torch.uint8),
                           torch.arange(n) % 10, list("0123456789"), "noise")
    args.batches = data.Batches(images.to(device), args.batch_size, 0, device)
    say(hardware(device), f"{args.model}, batch {args.batch_size} of {args.channels}x"
        f"{args.image_size}x{args.image_size}, {'' if args.compile else 'not '}compiled")
    try:
        works = comparisons(args)
        training(works, args)
        if flags.profile:
            profile(works["as trained"], args)
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
    add("--compile", action="store_true", help="compile our rows with torch.compile")
    add("--busy", type=number(int, 1, 256), nargs="+", default=(), metavar="N",
        help="time training alone, and beside N processes that compute without a pause")
    rows = p.add_mutually_exclusive_group()
    rows.add_argument("--against", action="store_true", help="the published loop and sampler, too")
    rows.add_argument("--scaling", nargs="+", choices=MODELS, default=(), metavar="NAME",
                      help="time training of these models, too")
    rows.add_argument("--profile", type=COUNT, nargs="?", default=0, const=15, metavar="N",
                      help="list the N operations of a step that take most of the time (15 if no "
                      "number is given)")
    add("--sample", type=number(int, 1, 1000), nargs="?", const=50, metavar="STEPS",
        help="also time guided sampling, in STEPS steps (50 if no number is given)")
    add("--device", help="cuda, mps or cpu (default: the fastest available)")
    return p


if __name__ == "__main__":
    run_command(main)
