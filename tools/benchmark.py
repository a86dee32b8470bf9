"""Time training and sampling: images/s, use of the hardware, memory, seconds to the first step.

    python -m tools.benchmark                   the preset's model: fp32, bf16, attention kernels
    python -m tools.benchmark --compile         each of them also compiled
    python -m tools.benchmark --busy 1 2        what training selects, beside busy processes
    python -m tools.benchmark --against models.py:DiT --sample 20
                                                beside the published loop with that network
    python -m tools.benchmark --scaling         how a step grows with tokens, width and depth

Every round times each row in turn, so that a machine that slows down, or is shared, slows them all;
the speed-up is the median over the rounds of the ratio to the first row. It times `train` of
train_mnist.py on glyphs. MFU (model flops utilisation): flops per second of the network's forward
and backward over those of a large matrix product in the same precision.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.benchmark", file=sys.stderr)
    sys.exit(2)

import support.threads  # noqa: F401  (before torch)

import json
import os
import subprocess
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import train_mnist
from dit import MODELS
from support import data, distributed, paths
from support.cli import (
    BATCH, COUNT, Parser, UserError, atomic_write, check_target,
    io_errors, number, run_command, say, shorten)
from support.distributed import COMPILE_PAYS
from support.settings import Settings
from tools.implementations import (
    VARIANTS, Ours, Published, load_factory, new_model, step_flops)
from tools.timing import described, hardware, matmul_rate, rows_of, table, time_rounds

WARM_UP = 2                     # steps of each row before the first round, with compilation
PROFILED = 20                   # steps
TOKENS = ((28, 7), (28, 4), (28, 2), (64, 2))       # image side, patch: 16 to 1,024 tokens
FACTORS = (1, 2, 4)                                 # of the model's width, and of its depth

# ---------------------------------------------------------------- the measurements


def competitors(flags: Namespace, args: Namespace, device: torch.device, images: data.ImageSet
                ) -> dict:
    """Name -> a function that makes what is timed. The first one is what speed-ups refer to."""
    makers = {}

    def ours(name: str, variant: str | None = None, compiler=(False, True)[: 1 + flags.compile],
             **changed) -> None:
        for compiled in compiler:
            its = Namespace(**{**vars(args), **changed, "compile": compiled})
            title = name + ", compiled" * compiled
            makers[title] = partial(Ours, title, its, device, images, variant)

    if flags.against:
        factory = load_factory(flags.against)
        makers["theirs"] = partial(Published, "theirs", factory, args, device, images)
        for optimizer in ("adamw", "muon"):
            ours(f"ours, {optimizer}", optimizer=optimizer)
    elif flags.busy:
        ours("as trained", compiler=(False, True) if flags.compile else (args.compile,))
    else:
        for name in VARIANTS:
            ours(name, name)
    return makers


def warmed_up(makers: dict, device: torch.device) -> tuple[list, dict[str, float]]:
    """What the makers make, after its first steps; on a GPU the peak memory of each, in MB."""
    works, memory, cuda = [], {}, device.type == "cuda"
    for name, make in tqdm(makers.items(), desc="warming up", leave=False, dynamic_ncols=True):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        works.append(make())
        works[-1](WARM_UP)
        if cuda:
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return works, memory


def benchmark_training(flags: Namespace, args: Namespace, device: torch.device,
                       images: data.ImageSet, works: list, memory: dict) -> dict:
    flops = step_flops(args, images)
    rate = {name: matmul_rate(name, device) for name in sorted({w.precision for w in works})}
    n = flags.steps_per_round
    times = time_rounds({w.name: partial(w, n) for w in works}, flags.rounds, device, "training",
                        (0, *flags.busy))
    rows, of = rows_of(times, n, n * args.batch_size), {w.name: w for w in works}
    for row in rows:
        row["precision"] = of[row["name"]].precision
        row["mfu"] = 1000 * flops / row["ms"] / rate[row["precision"]]
        if memory:
            row["memory_mb"] = memory[row["name"]]
    say("", f"training: {flags.rounds} rounds of {n} steps, in turn; train_mnist.py selects "
        f"{distributed.pick_precision('auto', device)} here", *table(rows, "step"),
        f"a step: {flops / 1e9:,.1f} GFLOP; a large matrix product, in GFLOP/s: "
        + ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in rate.items()))
    return dict(flops_per_step=flops, matmul_flops_per_s=rate, training=rows)


def benchmark_sampling(flags: Namespace, args: Namespace, device: torch.device, works: list
                       ) -> dict:
    """DDIM as in sample.py, in fp32 and in the precision of training. Guidance 1 is one forward per
    step, 2 is two. The other implementation samples with guidance, by its own sampler."""
    y, steps = torch.arange(flags.images) % 10, flags.sample
    draws = {"theirs": partial(works[0].sample, y, steps, 2.0)} if flags.against else {}
    for precision in dict.fromkeys(("fp32", distributed.pick_precision("auto", device))):
        for scale in (2.0,) if flags.against else (1.0, 2.0):
            name = f"ours, {precision}" if flags.against else f"guidance {scale:g}, {precision}"
            draws[name] = partial(works[-1].sample, y, steps, scale, precision)
    for draw in draws.values():
        draw()
    times = time_rounds(draws, flags.rounds, device, "sampling", (0, *flags.busy))
    rows = rows_of(times, len(y), len(y))
    say("", f"sampling: {flags.rounds} rounds of {len(y)} images in one batch, {steps} steps"
        + ", guidance 2" * bool(flags.against), *table(rows, "image"))
    return dict(sampling=rows)


def benchmark_scaling(flags: Namespace, args: Namespace, device: torch.device,
                      images: data.ImageSet) -> dict:
    """The step against tokens, width and depth, others equal; exponents fitted by least squares."""
    size, report = args.sizes, {}
    series = {
        "tokens": {(side // p) ** 2: (side, dict(size, patch_size=p)) for side, p in TOKENS},
        "width": {size["hidden_size"] * k: (28, dict(size, hidden_size=size["hidden_size"] * k,
                                                     num_heads=size["num_heads"] * k))
                  for k in FACTORS},
        "depth": {size["depth"] * k: (28, dict(size, depth=size["depth"] * k)) for k in FACTORS}}
    for name, cases in series.items():
        makers, flops = {}, []
        for value, (side, sizes) in cases.items():
            its = Namespace(**{**vars(args), "sizes": sizes})
            scaled = replace(images, images=F.interpolate(images.images, (side, side)))
            makers[f"{value:,} {name}"] = partial(Ours, f"{value:,} {name}", its, device, scaled)
            flops.append(step_flops(its, scaled))
        works, _ = warmed_up(makers, device)
        n = flags.steps_per_round
        rows = rows_of(time_rounds({w.name: partial(w, n) for w in works}, flags.rounds, device,
                                   name), n, n * args.batch_size)
        for row, count in zip(rows, flops, strict=True):
            row["gflop"] = count / 1e9
        exponents = {key: float(np.polyfit(np.log(list(cases)), np.log([r[key] for r in rows]),
                                           1)[0]) for key in ("ms", "gflop")}
        say("", *table(rows, "step"), f"time ~ {name}^{exponents['ms']:.2f}, flops ~ "
            f"{name}^{exponents['gflop']:.2f}")
        report[name] = dict(rows=rows, exponents=exponents)
    return dict(scaling=report)


def first_step(args: Namespace, device: torch.device, data_dir: str | None) -> dict:
    """Seconds from the command to the end of train_mnist.py's first step and, on a CPU, the peak
    memory of its process until then."""
    with tempfile.TemporaryDirectory() as folder:
        record, errors = Path(folder, "run", "metrics.jsonl"), Path(folder, "errors.txt")
        words = ["--dataset", "mnist" if data_dir else "glyphs", "--model", args.model,
                 "--batch-size", args.batch_size, "--optimizer", args.optimizer, "--steps", 1,
                 "--log-every", 1, "--device", device, "--out", record.parent]
        words += ["--data-dir", data_dir] if data_dir else []
        with errors.open("w") as file:
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, str(paths.ROOT / "train_mnist.py"),
                                        *map(str, words)], stdout=subprocess.DEVNULL, stderr=file)
        try:
            while not (record.exists() and record.stat().st_size):
                if process.poll() is not None:
                    raise UserError(f"train_mnist.py: {shorten(errors.read_text().strip())}")
                time.sleep(0.01)
            found = dict(seconds=time.perf_counter() - start)
        finally:
            process.kill()
            usage = None
            if process.returncode is None and hasattr(os, "wait4"):
                _, process.returncode, usage = os.wait4(process.pid, 0)
            process.wait()
    if device.type == "cpu" and usage is not None:
        found["memory_mb"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    say("", f"from the command to the end of the first step: {found['seconds']:.1f} s"
        + (f", peak memory {found['memory_mb']:,.0f} MB" if "memory_mb" in found else ""))
    return dict(first_step=found)


def profile(path: Path, work: Ours) -> None:
    """Write torch.profiler's table of some steps, by the time of each operation itself."""
    with torch.profiler.profile() as profiler:
        work(PROFILED)
    kind = "device" if work.device.type == "cuda" else "cpu"
    text = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40)
    with io_errors(f"{path} cannot be written"):
        atomic_write(path, lambda file: file.write(text.encode()))
    say(f"written: {path} ({PROFILED} steps)")


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    flags = parser().parse_args(argv)
    if distributed.world_size() > 1:
        raise UserError("benchmark runs in one process")
    for path, suffix in ((flags.json, ".json"), (flags.profile, ".txt")):
        if path is not None:
            check_target(path, flags.force, suffix)
    device = distributed.pick_device(flags.device)
    given = {key: getattr(flags, key) for key in ("model", "batch_size", "optimizer")
             if getattr(flags, key) is not None}
    if flags.scaling:
        given = dict(batch_size=16) | given
    args = Settings(train_mnist.RECIPE, train_mnist.PRESETS).resolve(
        given | dict(steps=PROFILED + WARM_UP + flags.rounds * flags.steps_per_round), device.type)
    args.sizes = MODELS[args.model]
    args.compile = distributed.should_compile(
        flags.compile or None, device, COMPILE_PAYS if flags.busy else 0)
    images = data.draw_glyphs(max(256, args.batch_size))
    model, _ = new_model(args, images)
    report = dict(hardware=hardware(device), model=args.model, batch_size=args.batch_size,
                  optimizer=args.optimizer, prediction=args.prediction,
                  parameters=sum(p.numel() for p in model.parameters()))
    say(*described(report["hardware"]), f"{args.model}, {report['parameters']:,} parameters, batch "
        f"{args.batch_size}, {args.optimizer}, predicts {args.prediction}")
    if flags.scaling:
        report |= benchmark_scaling(flags, args, device, images)
    elif flags.profile:
        [work], _ = warmed_up({"": partial(Ours, "", args, device, images)}, device)
        profile(flags.profile, work)
    else:
        works, memory = warmed_up(competitors(flags, args, device, images), device)
        report |= benchmark_training(flags, args, device, images, works, memory)
        if flags.sample:
            report |= benchmark_sampling(flags, args, device, works)
        if not (flags.against or flags.busy):
            report |= first_step(args, device, flags.data_dir)
    if flags.json:
        with io_errors(f"{flags.json} cannot be written"):
            text = json.dumps(report, indent=1) + "\n"
            atomic_write(flags.json, lambda file: file.write(text.encode()))
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", choices=MODELS, metavar="NAME", help="a name of dit.MODELS (default: "
                   "the device's preset)")
    p.add_argument("--batch-size", type=BATCH, help="images per step (default: the preset's; 16 "
                   "with --scaling)")
    p.add_argument("--optimizer", choices=("muon", "adamw"), help="(default: the preset's)")
    p.add_argument("--rounds", type=COUNT, default=10, help="timings of each row (default: 10)")
    p.add_argument("--steps-per-round", type=COUNT, default=10, metavar="N", help="training steps "
                   "timed as one (default: 10)")
    p.add_argument("--compile", action="store_true", help="also time each row with torch.compile")
    p.add_argument("--busy", type=number(int, 1, 256), nargs="+", default=[], metavar="N",
                   help="time what training selects alone, and beside N processes that compute "
                   "without a pause")
    p.add_argument("--against", metavar="FILE.py:FACTORY", help="time the published training step "
                   "with the network FACTORY(input_size=..., patch_size=..., ...), and ours with "
                   "the same optimizer and with Muon. Executes the file")
    p.add_argument("--sample", type=number(int, 1, train_mnist.DIFFUSION["num_timesteps"]),
                   nargs="?", const=50, metavar="STEPS", help="also time sampling in STEPS steps "
                   "(default: 50)")
    p.add_argument("--images", type=BATCH, default=64, help="images sampled in one batch "
                   "(default: 64)")
    p.add_argument("--scaling", action="store_true", help="time the step with more tokens, width "
                   "and depth instead")
    p.add_argument("--profile", type=Path, metavar="FILE.txt", help="write torch.profiler's table "
                   f"of {PROFILED} steps instead")
    p.add_argument("--data-dir", metavar="DIR", help="where MNIST is, for the time to the first "
                   "step (default: glyphs, which take seconds to draw)")
    p.add_argument("--json", type=Path, metavar="FILE.json", help="write the results")
    p.add_argument("--force", action="store_true", help="overwrite existing files")
    p.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    return p


if __name__ == "__main__":
    run_command(main)
