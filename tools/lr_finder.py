"""Suggest a learning rate: raise it exponentially during a short training until the loss diverges.

    python -m tools.lr_finder                           Muon's rate, under the recipe's other values
    python -m tools.lr_finder --which lr                AdamW's rate beside Muon
    python -m tools.lr_finder --optimizer adamw --dataset folder:PATH
    python -m tools.lr_finder --config RUN/config.json  under the recipe of a run

The learning-rate range test of Smith (arXiv 1506.01186), with `train` of train_mnist.py on its
batches: one rate rises, the other one keeps the value of the recipe, without warm-up or decay. The
suggestion is a tenth of the rate with the lowest smoothed loss. Writes the curve as a PNG: --out
FILE.png, or a new numbered file under output/. No run is changed or made.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.lr_finder", file=sys.stderr)
    sys.exit(2)

import support.threads  # noqa: F401  (before torch)

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import train_mnist
from dit import MODELS
from support import components, data, distributed, paths, settings
from support.cli import (
    Parser, UserError, atomic_write, check_target, io_errors, next_free, number, run_command, say)
from support.seeds import mix_seed
from support.state import TrainingState
from tools.figures import new_figure

DIVERGED = 4            # times the lowest smoothed loss
NOISY = 10              # steps at the start, whose mean loss is too noisy to judge
SMOOTHING = 0.9         # decay of the loss's exponential moving average
# Flags of train_mnist.py that have no meaning here, or another one
OTHERS = frozenset(("out", "resume", "init_from", "steps", "stop_after", "warmup", "decay",
                    "log_every", "logger", "preview_every", "save_every", "keep", "ema_decay"))


class Sweep:
    """Stand-in for Run: sets the learning rate of some optimizers before each step, and ends the
    steps when the loss diverges. losses: one for each of the rates that were tried."""

    def __init__(self, args: Namespace, device: torch.device, state: TrainingState,
                 swept: list[torch.optim.Optimizer], rates: list[float]):
        self.args, self.device, self.state = args, device, state
        self.swept, self.rates, self.losses = swept, rates, []

    def steps(self) -> Iterator[int]:
        with tqdm(self.rates, unit="step", desc="sweeping", dynamic_ncols=True) as bar:
            for step, rate in enumerate(bar):
                for optimizer in self.swept:
                    for group in optimizer.param_groups:
                        group["initial_lr"] = rate
                yield step
                bar.set_postfix_str(f"rate {rate:.1e}, loss {self.losses[-1]:.4f}", refresh=False)
                if self.diverged:
                    break

    def random(self, step: int) -> distributed.StepRandom:
        return distributed.StepRandom(self.device, self.args.seed, step, self.args.batch_size,
                                      slice(None))

    def log(self, *, loss: Tensor, **numbers) -> None:
        self.losses.append(loss.mean().item())

    @property
    def diverged(self) -> bool:
        smooth = smoothed(self.losses)
        risen = smooth[-1] > DIVERGED * min(smooth) and len(smooth) > NOISY
        return risen or not math.isfinite(smooth[-1])


def smoothed(losses: list[float]) -> list[float]:
    """The exponential moving average, with the bias of its start corrected as in Adam."""
    mean, found = 0.0, []
    for i, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**i))
    return found


def suggestion(rates: list[float], losses: list[float]) -> tuple[float, float]:
    """(a tenth of the rate with the lowest smoothed loss, that rate); at least the first rate."""
    smooth = smoothed(losses)
    lowest = rates[min(range(len(smooth)), key=lambda i: (not math.isfinite(smooth[i]), smooth[i]))]
    return max(lowest / 10, rates[0]), lowest


def sweep(args: Namespace, device: torch.device, images: data.ImageSet, which: str,
          rates: list[float]) -> Sweep:
    """Train a new network with the rates, from the first on, until the loss diverges."""
    args = Namespace(**{**vars(args), "steps": len(rates), "warmup": 0, "decay": 0.0})
    network, sizes = components.network_for(args, dict(
        MODELS[args.model], input_size=images.size, in_channels=images.channels,
        num_classes=len(images.class_names)))
    process, arguments = components.process_for(args, train_mnist.DIFFUSION)
    torch.manual_seed(mix_seed(args.seed, "init"))
    try:
        model = network(**sizes).to(device)
    except ValueError as error:
        raise settings.unfit_model(args.model, images.images.shape[-1], error) from None
    diffusion = process(**arguments).to(device)
    optimizers = train_mnist.make_optimizers(model, args)       # AdamW, and Muon behind it
    state = TrainingState(model, optimizers, diffusion, args, device)
    found = Sweep(args, device, state, optimizers[1:] if which == "muon-lr" else optimizers[:1],
                  rates)
    batches = data.Batches(images.to(device), args.batch_size, args.seed, device, args.flip)
    train_mnist.train(batches, state, diffusion, found)
    return found


def draw(figure, found: Sweep, which: str, suggested: float, lowest: float) -> None:
    axes, rates = figure.subplots(), found.rates[:len(found.losses)]
    smooth = smoothed(found.losses)
    line, = axes.loglog(rates, found.losses, lw=0.5, alpha=0.5)
    axes.loglog(rates, smooth, color=line.get_color(), label="loss, smoothed")
    axes.axvline(lowest, color="black", lw=0.8, ls=":", label=f"lowest: {lowest:.2g}")
    axes.axvline(suggested, color="black", lw=0.8, label=f"suggested: {suggested:.2g}")
    value = getattr(found.args, which.replace("-", "_"))
    axes.axvline(value, color="black", lw=0.8, ls="--", label=f"recipe: {value:g}")
    finite = [value for value in smooth if math.isfinite(value)]
    axes.set(xlabel=f"--{which}", ylabel="loss",
             ylim=(0.8 * min(found.losses), min(1.5 * max(finite), 10 * finite[0])))
    axes.legend()
    axes.grid(alpha=0.3)


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    defaults = settings.Settings(train_mnist.RECIPE, train_mnist.PRESETS)
    given = vars(parser().parse_args(argv))
    own = Namespace(**{key: given.pop(key) for key in ("which", "low", "high", "rates", "out",
                                                       "force")})
    if distributed.world_size() > 1:
        raise UserError("lr_finder runs in one process")
    if not own.low < own.high:
        raise UserError(f"--low {own.low:g} is not below --high {own.high:g}")
    check_target(own.out or next_free(paths.OUTPUT, "lr_finder", ".png"), own.force, ".png")
    figure = new_figure(figsize=(7, 4))
    given = defaults.with_config(given)
    device = distributed.pick_device(given.get("device"))
    args = defaults.resolve(given, device.type)
    components.check_flags(args)
    which = own.which or ("muon-lr" if args.optimizer == "muon" else "lr")
    if which == "muon-lr" and args.optimizer != "muon":
        raise UserError(f"--which muon-lr: --optimizer {args.optimizer} has no such rate")
    distributed.share_of(args.batch_size, args.grad_accum)
    images = data.load(args.dataset, args.data_dir, args.image_size,
                       celeba_attribute=args.celeba_attribute)
    if "model" not in given:
        args.model = settings.largest_fitting_patch(args.model, images.images.shape[-1])

    ratio = (own.high / own.low) ** (1 / (own.rates - 1))
    found = sweep(args, device, images, which, [own.low * ratio**i for i in range(own.rates)])
    if not math.isfinite(found.losses[0]):
        raise UserError(f"the loss is not finite at the first rate, {own.low:g}", status=1)
    suggested, lowest = suggestion(found.rates, found.losses)
    last = found.rates[len(found.losses) - 1]
    say(f"{args.model} on {images.name}, batch {args.batch_size}, {args.optimizer}: lowest loss at "
        f"--{which} {lowest:.2g}, " + (f"divergence at {last:.2g}" if found.diverged else
                                       f"no divergence up to {last:.2g}"),
        f"suggested: --{which} {suggested:.2g} (the recipe: "
        f"{getattr(args, which.replace('-', '_')):g})"
        + "; a tenth of that is not in the sweep: try a lower --low" * (lowest < 10 * own.low))
    draw(figure, found, which, suggested, lowest)
    target = own.out or next_free(paths.OUTPUT, "lr_finder", ".png")
    with io_errors(f"{target} cannot be written"):
        atomic_write(target, lambda file: figure.savefig(file, format="png", dpi=140))
    say(f"written: {paths.short(target)}")
    return 0


def parser() -> Parser:
    p = settings.Settings(train_mnist.RECIPE, train_mnist.PRESETS).parser(__doc__, OTHERS)
    g = p.add_argument_group("the sweep")
    g.add_argument("--which", choices=("muon-lr", "lr"), default=None, help="the rate that rises "
                   "(default: muon-lr; lr with --optimizer adamw)")
    g.add_argument("--low", type=number(float, 1e-12), default=1e-5, metavar="X",
                   help="the first rate (default: 1e-5)")
    g.add_argument("--high", type=number(float, 1e-12), default=10.0, metavar="X",
                   help="the last rate (default: 10)")
    g.add_argument("--rates", type=number(int, 2, 10_000), default=200, metavar="N",
                   help="how many rates, a step each (default: 200)")
    g.add_argument("--out", type=Path, default=None, metavar="FILE.png", help="the curve (default: "
                   "a new numbered file under output/)")
    g.add_argument("--force", action="store_true", default=False,
                   help="overwrite an existing file")
    return p


if __name__ == "__main__":
    run_command(main)
