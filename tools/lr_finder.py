"""Suggest a learning rate: raise it exponentially during a short training until the loss diverges.

    python -m tools.lr_finder                           Muon's rate, under the recipe's other values
    python -m tools.lr_finder --which lr                AdamW's rate beside Muon
    python -m tools.lr_finder --optimizer adamw --dataset folder:PATH
    python -m tools.lr_finder --config RUN/config.json  under the recipe of a run

The learning-rate range test of Smith (arXiv 1506.01186), with `train` of train_mnist.py and any of
its flags for data, model and recipe: one rate rises, the other one keeps the value of the recipe,
without warm-up or decay. The suggestion is a tenth of the rate with the lowest smoothed loss.
"""

import support.threads  # noqa: F401  (before torch)

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import train_mnist
from dit import MODELS
from support.command import (
    OUTPUT, Parser, UserError, atomic_write, check_target, next_free, number, run_command, say,
    short)
from support.compute import seed_of
from support.data import Batches
from support.registry import NETWORKS, PROCESSES
from support.run import Run

DIVERGED = 4            # times the lowest smoothed loss
NOISY = 10              # steps at the start, whose mean loss is too noisy to judge
SMOOTHING = 0.9         # decay of the loss's exponential moving average
OTHERS = {"--resume", "--out", "--steps", "--stop-after", "--warmup", "--decay", "--init-from"}


class Sweep(Run):
    """A run that records nothing, with a learning rate of its own at each step. It ends when the
    loss diverges. losses: one for each of the rates that were tried."""

    def __init__(self, words: list[str], rates: list[float]):
        super().__init__([*words, "--steps", str(len(rates)), "--warmup", "0", "--decay", "0"],
                         __doc__, train_mnist.RECIPE, train_mnist.PRESETS, train_mnist.CHOICES)
        self.rates, self.losses, self.diverged = rates, [], False
        self.compiled = bool(self.args.compile)

    def steps(self) -> Iterator[int]:
        with tqdm(self.rates, unit="step", desc="sweeping", dynamic_ncols=True) as bar:
            for step, rate in enumerate(bar):
                for group in self.swept.param_groups:
                    group["initial_lr"] = rate
                yield step
                smooth = smoothed(self.losses)
                self.diverged = not math.isfinite(smooth[-1]) or (
                    smooth[-1] > DIVERGED * min(smooth) and len(smooth) > NOISY)
                if self.diverged:
                    break

    def replayed(self, step):
        return step

    def log(self, *, loss: Tensor, **numbers) -> None:
        self.losses.append(loss.mean().item())

    def train(self, which: str) -> None:
        """Train a new network, as main of train_mnist.py makes it."""
        args, images, process = self.args, self.load_images(), PROCESSES[self.args.process]
        torch.manual_seed(seed_of(args.seed, "init"))
        try:
            model = NETWORKS[args.network](**MODELS[args.model], **dict(
                input_size=images.size, in_channels=images.channels,
                num_classes=len(images.class_names)), **getattr(process, "network_arguments", {}))
            diffusion = process(prediction=args.prediction, weighting=args.weighting)
        except ValueError as error:
            raise UserError(f"--model {args.model}: {error}") from None
        model, diffusion = model.to(self.device), diffusion.to(self.device)
        optimizers = train_mnist.make_optimizers(model, args)       # AdamW, and Muon behind it
        self.swept = optimizers[which == "muon-lr"]
        batches = Batches(images.to(self.device), args.batch_size, args.seed, self.device,
                          args.flip)
        train_mnist.train(model, copy.deepcopy(model), optimizers, diffusion, batches, self)


def smoothed(losses: list[float]) -> list[float]:
    """The exponential moving average, with the bias of its start corrected as in Adam."""
    mean, found = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**i))
    return found


def suggestion(rates: list[float], losses: list[float]) -> tuple[float, float]:
    """(a tenth of the rate with the lowest smoothed loss, that rate); at least the first rate."""
    _, lowest = min((loss, rate) for loss, rate in zip(smoothed(losses), rates, strict=False)
                    if math.isfinite(loss))
    return max(lowest / 10, rates[0]), lowest


def main(argv: list[str] | None = None) -> int:
    own, words = parser().parse_known_args(argv)
    if taken := OTHERS.intersection(word.partition("=")[0] for word in words):
        raise UserError(f"{taken.pop()} has no meaning in a sweep")
    if not own.low < own.high:
        raise UserError(f"--low {own.low:g} is not below --high {own.high:g}")
    target = own.curve or next_free(OUTPUT, "lr-finder", ".png")
    check_target(target, own.force, ".png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the curve needs matplotlib: pip install matplotlib") from None
    ratio = (own.high / own.low) ** (1 / (own.rates - 1))
    run = Sweep(words, [own.low * ratio**i for i in range(own.rates)])
    which = own.which or ("muon-lr" if run.args.optimizer == "muon" else "lr")
    if which == "muon-lr" and run.args.optimizer != "muon":
        raise UserError(f"--which muon-lr: --optimizer {run.args.optimizer} has no such rate")
    run.train(which)
    rates = run.rates[: len(run.losses)]
    if not math.isfinite(run.losses[0]):
        raise UserError(f"the loss is not finite at the first rate, {own.low:g}", status=1)
    suggested, lowest = suggestion(rates, run.losses)
    recipe = getattr(run.args, which.replace("-", "_"))
    say(f"lowest loss at --{which} {lowest:.2g}, {'' if run.diverged else 'no '}divergence "
        f"{'at' if run.diverged else 'up to'} {rates[-1]:.2g}",
        f"suggested: --{which} {suggested:.2g} (the recipe: {recipe:g})")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(rates, run.losses, lw=0.5, alpha=0.5)
    axes.loglog(rates, smoothed(run.losses), label="loss, smoothed")
    axes.axvline(suggested, color="black", lw=0.8, label=f"suggested: {suggested:.2g}")
    axes.axvline(recipe, color="black", lw=0.8, ls="--", label=f"recipe: {recipe:g}")
    axes.set(xlabel=f"--{which}", ylabel="loss")
    axes.legend()
    atomic_write(target, lambda file: figure.savefig(file, format="png", dpi=140))
    say(f"written: {short(target)}")
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--which", choices=("muon-lr", "lr"), help="the rate that rises (default: "
                   "muon-lr; lr with --optimizer adamw)")
    p.add_argument("--low", type=number(float, 1e-12), default=1e-5, help="(default: 1e-5)")
    p.add_argument("--high", type=number(float, 1e-12), default=10.0, help="(default: 10)")
    p.add_argument("--rates", type=number(int, 2, 10_000), default=200, metavar="N",
                   help="how many rates, a step each (default: 200)")
    p.add_argument("--curve", type=Path, metavar="FILE.png", help="loss against rate (default: a "
                   "new file under output/)")
    p.add_argument("--force", action="store_true", help="overwrite an existing file")
    return p


if __name__ == "__main__":
    run_command(main)
