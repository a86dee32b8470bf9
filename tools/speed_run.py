"""The MNIST diffusion speed run: seconds of training until 99% and 99.5% of the digits are right.

    python -m tools.speed_run --steps 600 800 1000
    python -m tools.speed_run --steps 800 --cfg-scale 2 -- --model DiT-Micro/7 --compile

For each length of training it runs train_mnist.py once per seed, with the flags after `--`, from
nothing to the end of its schedule, and measures 1,000 samples. The shortest length whose mean
accuracy over the seeds reaches a target, at a mean recall of 0.7 or more, is the result. The rules,
after those of modded-nanogpt and cifar10-airbench:

1. Training uses the training set of MNIST alone: no other data, no weights from elsewhere.
2. Accuracy is the share of 1,000 samples, 100 of each class, that the ruler in assets/ reads as the
   digit that was asked for, sampled as the checkpoint suggests. The guidance scale is free, and the
   same for every seed. It buys accuracy with variety, hence the least recall (real digits: 0.87).
3. The time is that of the training command, from its start to its end, with nothing left out:
   imports, reading the data from disk, compilation without a warm cache, training, previews and
   checkpoints. (The two speed runs above leave out compilation.) Downloading the data and
   measuring do not count.
4. A length counts by its mean over at least three seeds, 0, 1, 2 ...; none is left out.
5. The hardware and the version of torch are reported. Everything else may change.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.speed_run", file=sys.stderr)
    sys.exit(2)

import contextlib
import io
import json
import os
import subprocess
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import fmean, stdev

import train_mnist
from support import distributed, paths
from support.cli import (
    COUNT, SCALE, Parser, UserError, atomic_write, check_target, io_errors, number, run_command,
    say)
from support.folders import checkpoints_in, new_folder
from support.settings import Settings
from tools import evaluate
from tools.timing import described, hardware

SCRIPT = paths.ROOT / "train_mnist.py"
IMAGES, RECALL = 1000, 0.7          # how many are measured, and their least mean recall
OURS = ("steps", "seed", "out", "resume", "stop_after", "init_from")    # not to be given after --


def train(steps: int, seed: int, folder: Path, flags: list[str]) -> float:
    """Run train_mnist.py in a process of its own: the seconds from its start to its end. Raises
    UserError where it fails; its own message stands above."""
    words = ["--dataset", "mnist", *flags, "--steps", steps, "--seed", seed, "--out", folder]
    with tempfile.TemporaryDirectory() as cache:            # of compiled code: empty
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        start = time.perf_counter()
        status = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)],
                                stdout=subprocess.DEVNULL, env=environment).returncode
        seconds = time.perf_counter() - start
    if status:
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise UserError(f"train_mnist.py --steps {steps} --seed {seed} {ended}: no result of this "
                        f"length", status=1)
    return seconds


def measure(checkpoint: Path, args: Namespace) -> dict:
    """accuracy, frechet and recall of IMAGES samples; the report goes to evaluations.jsonl."""
    words = [str(checkpoint), "--images", str(IMAGES)]
    for flag, value in [("--cfg-scale", args.cfg_scale), ("--device", args.device)]:
        words += [flag, str(value)] * (value is not None)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate.main(words)
    line = (checkpoint.parent / "evaluations.jsonl").read_text().splitlines()[-1]
    mean = json.loads(line)["rows"]["samples"]["mean"]
    return {key: mean[key] for key in ("accuracy", "frechet", "recall")}


def row(name: str, rows: list[dict]) -> str:
    """A line of the table: one run, or the mean of several."""
    def cell(key: str, form: str) -> str:
        values = [r[key] for r in rows]
        spread = f" ± {stdev(values):{form}}" if values[1:] else ""
        return f"{f'{fmean(values):{form}}' + spread:>17}"

    return f"{rows[0]['steps']:7,}{name:>6}" + "".join(
        cell(key, form) for key, form in [("seconds", ".1f"), ("accuracy", ".2%"),
                                          ("frechet", ".2f"), ("recall", ".3f")])


def reached(lengths: dict[int, list[dict]], target: float) -> int | None:
    """The shortest length whose mean accuracy is at least `target` percent and whose mean recall is
    at least RECALL; None where none is."""
    return min((steps for steps, rows in lengths.items()
                if 100 * fmean(r["accuracy"] for r in rows) >= target - 1e-9
                and fmean(r["recall"] for r in rows) >= RECALL - 1e-9), default=None)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    train_settings = Settings(train_mnist.RECIPE, train_mnist.PRESETS)
    given = vars(train_settings.parser().parse_args(args.flags))
    if taken := [key for key in OURS if key in given]:
        raise UserError(f"--{taken[0].replace('_', '-')} is not for train_mnist.py here: "
                        f"speed_run trains from nothing, and sets steps, seed and folder")
    given = train_settings.with_config(given)       # refuses a file that is no config.json
    args.device = given.get("device")
    if args.json is not None:
        check_target(args.json, args.force, ".json")
    machine = hardware(distributed.pick_device(args.device))
    folder = new_folder(paths.OUTPUT, "speed-run")
    say(*described(machine), f"runs: {paths.short(folder)}", "",
        f"{'steps':>7}{'seed':>6}{'seconds':>17}{'accuracy':>17}{'Frechet':>17}{'recall':>17}")

    lengths: dict[int, list[dict]] = {}
    for steps in sorted(set(args.steps)):
        for seed in range(args.seeds):
            out = folder / f"{steps}-steps-seed-{seed}"
            seconds = train(steps, seed, out, args.flags)
            lengths.setdefault(steps, []).append(dict(
                steps=steps, seed=seed, seconds=seconds, **measure(checkpoints_in(out)[-1], args)))
            say(row(str(seed), lengths[steps][-1:]))
        if args.seeds > 1:
            say(row("mean", lengths[steps]), "")
        if reached(lengths, max(args.targets)) is not None:
            break                                   # a longer one adds nothing
    results = {f"{target:g}%": reached(lengths, target) for target in args.targets}
    for target, steps in results.items():
        say(f"{target} right: " + (f"not reached in {max(lengths):,} "
            f"steps with a recall of {RECALL}" if steps is None else
            f"{fmean(r['seconds'] for r in lengths[steps]):.1f} seconds, {steps:,} steps"))
    if args.seeds < 3 or given.get("dataset", "mnist") != "mnist":
        say("By the rules only three seeds or more on MNIST are a result.")
    if args.json is not None:
        report = dict(hardware=machine, flags=args.flags, cfg_scale=args.cfg_scale, images=IMAGES,
                      steps_to=results, runs=[r for rows in lengths.values() for r in rows])
        with io_errors(f"{args.json} cannot be written"):
            text = json.dumps(report, indent=1) + "\n"
            atomic_write(args.json, lambda file: file.write(text.encode()))
        say(f"written: {paths.short(args.json)}")
    return 0


class SpeedRunParser(Parser):
    def parse_args(self, argv=None, namespace=None):
        """flags: what stands behind `--`, for train_mnist.py."""
        argv = list(sys.argv[1:] if argv is None else argv)
        at = argv.index("--") if "--" in argv else len(argv)
        args = super().parse_args(argv[:at], namespace)
        args.flags = argv[at + 1:]
        return args


def parser() -> Parser:
    p = SpeedRunParser(__doc__, usage="python -m tools.speed_run --steps S ... [flags] "
               "[-- flags of train_mnist.py]")
    p.add_argument("--steps", type=COUNT, nargs="+", required=True, metavar="S", help="lengths of "
                   "training, tried from the shortest on")
    p.add_argument("--seeds", type=number(int, 1, 1000), default=3, metavar="K", help="runs of "
                   "each length, with the seeds 0 to K - 1 (default: 3)")
    p.add_argument("--targets", type=number(float, 0, 100), nargs="+", default=[99, 99.5],
                   metavar="PERCENT", help="accuracies to reach (default: 99 99.5)")
    p.add_argument("--cfg-scale", type=SCALE, metavar="G", help="guidance scale of the samples "
                   "(default: the checkpoint's)")
    p.add_argument("--json", type=Path, metavar="FILE.json", help="write the results")
    p.add_argument("--force", action="store_true", help="overwrite an existing file")
    return p


if __name__ == "__main__":
    run_command(main)
