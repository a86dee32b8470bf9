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
   checkpoints. (The two named above leave compilation out.) Downloading the data and measuring
   do not count.
4. A length counts by its mean over at least three seeds, 0, 1, 2 ...; none is left out.
5. The hardware and the version of torch are reported. Everything else may change.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev

from support.checkpoint import new_folder
from support.command import COUNT, ROOT, Parser, UserError, number, run_command, say, short
from support.compute import pick_device
from tools import evaluate
from tools.benchmark import hardware

TARGETS = 99, 99.5  # accuracies in percent
RECALL = 0.7        # the least mean recall
IMAGES = 1000
OURS = {"--steps", "--seed", "--out", "--resume", "--stop-after", "--init-from", "--device"}


def train(steps: int, seed: int, folder: Path, flags: list[str]) -> float:
    """Run train_mnist.py in a process of its own: the seconds from its start to its end. Raises
    UserError where it fails; its own message stands above."""
    words = ["--dataset", "mnist", *flags, "--steps", steps, "--seed", seed, "--out", folder]
    with tempfile.TemporaryDirectory() as cache:            # of compiled code: empty
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        start = time.perf_counter()
        status = subprocess.run([sys.executable, str(ROOT / "train_mnist.py"), *map(str, words)],
                                stdout=subprocess.DEVNULL, env=environment).returncode
        seconds = time.perf_counter() - start
    if status:
        raise UserError(f"train_mnist.py --steps {steps} --seed {seed} ended with status {status}: "
                        f"no result of this length", status=1)
    return seconds


def measure(folder: Path, flags: list[str]) -> dict:
    """accuracy, frechet and recall of samples; the report goes to the run's evaluations.jsonl."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate.main([str(folder), *flags])
    line = (folder / "evaluations.jsonl").read_text().splitlines()[-1]
    return {key: json.loads(line)["rows"]["samples"][key]
            for key in ("accuracy", "frechet", "recall")}


def row(steps: int, name: object, runs: list[dict]) -> str:
    """A line of the table: one run, or the mean and standard deviation of several."""
    text = f"{steps:7,}{name:>6}"
    for key, form in dict(seconds=".1f", accuracy=".2%", frechet=".2f", recall=".3f").items():
        values = [run[key] for run in runs]
        spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
        text += f"{f'{fmean(values):{form}}' + spread:>17}"
    return text


def reached(lengths: dict[int, list[dict]], target: float) -> int | None:
    """The shortest length whose mean accuracy is at least `target` percent and whose mean recall is
    at least RECALL; None where none is."""
    return min((steps for steps, runs in lengths.items()
                if 100 * fmean(run["accuracy"] for run in runs) >= target - 1e-9
                and fmean(run["recall"] for run in runs) >= RECALL - 1e-9), default=None)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser().parse_args(argv[:at]), argv[at + 1:]
    if taken := OURS.intersection(word.partition("=")[0] for word in flags):
        raise UserError(f"{taken.pop()} is not for train_mnist.py here")
    device = pick_device(args.device)
    folder, lengths = new_folder("speed-run"), {}
    say(hardware(device), f"runs: {short(folder)}", "", f"{'steps':>7}{'seed':>6}{'seconds':>17}"
        f"{'accuracy':>17}{'Frechet':>17}{'recall':>17}")
    measured = ["--images", IMAGES, "--device", device]
    measured += ["--cfg-scale", args.cfg_scale] if args.cfg_scale is not None else []
    for steps in sorted(set(args.steps)):
        runs = lengths[steps] = []
        for seed in range(args.seeds):
            out = folder / f"{steps}-steps-seed-{seed}"
            seconds = train(steps, seed, out, [*flags, "--device", str(device)])
            runs.append(dict(seconds=seconds, **measure(out, [*map(str, measured)])))
            say(row(steps, seed, runs[-1:]))
        if args.seeds > 1:
            say(row(steps, "mean", runs), "")
        if reached(lengths, TARGETS[-1]) is not None:
            break                                   # a longer one adds nothing
    for target in TARGETS:
        steps = reached(lengths, target)
        say(f"{target:g}% right: " + (
            f"not reached in {max(lengths):,} steps with a recall of {RECALL}" if steps is None else
            f"{fmean(run['seconds'] for run in lengths[steps]):.1f} seconds, {steps:,} steps"))
    if args.seeds < 3:
        say("By the rules only three seeds or more are a result.")
    return 0


def parser() -> Parser:
    p = Parser(__doc__, usage="python -m tools.speed_run --steps S ... [flags] "
               "[-- flags of train_mnist.py]")
    add = p.add_argument
    add("--steps", type=COUNT, nargs="+", required=True, metavar="S", help="lengths of training")
    add("--seeds", type=number(int, 1, 1000), default=3, metavar="K", help="runs of each length, "
        "with the seeds 0 to K - 1 (default: 3)")
    add("--cfg-scale", type=float, help="guidance of the samples (default: the checkpoint's)")
    add("--device", help="cuda, mps or cpu (default: the fastest available)")
    return p


if __name__ == "__main__":
    run_command(main)
