"""Suggest a learning rate: raise it exponentially during a short training until the loss diverges.

    python -m tools.lr_finder                           Muon's rate, under the recipe's other values
    python -m tools.lr_finder --which lr                AdamW's rate beside Muon
    python -m tools.lr_finder --optimizer adamw --dataset folder:PATH
    python -m tools.lr_finder --config RUN/config.json  under the recipe of a run

The learning-rate range test of Smith (arXiv 1506.01186), by train_mnist.py with any of its flags
for data, model and recipe: one rate rises from 1e-5 to 10, the other one keeps the value of the
recipe, without warm-up or decay. The suggestion is a tenth of the rate with the lowest smoothed
loss. The curve goes to a new file under output/ and needs matplotlib.
"""

import math
from collections.abc import Iterator
from functools import partial

from torch import Tensor
from tqdm import tqdm

import train_mnist
from support.command import Parser, UserError, next_free, number, run_command, say
from support.run import Run
from tools.figures import new_figure, write

LOW, HIGH = 1e-5, 10.0
DIVERGED = 4            # times the lowest smoothed loss
NOISY = 10              # steps at the start, whose mean loss is too noisy to judge
SMOOTHING = 0.9         # decay of the loss's exponential moving average
NOT_IN_A_SWEEP = {"--resume", "--steps", "--stop-after", "--warmup", "--decay", "--init-from"}


class Sweep(Run):
    """A run that records nothing, with a learning rate of its own at each step. It ends when the
    loss diverges, with the suggestion. which: the flag of the rate, or None."""

    def __init__(self, which: str | None, *arguments):
        super().__init__(*arguments)
        muon = self.args.optimizer == "muon"
        self.which = which or ("muon-lr" if muon else "lr")
        if self.which == "muon-lr" and not muon:
            raise UserError("--which muon-lr: --optimizer adamw has no such rate")
        self.figure, self.rates, self.losses = new_figure(figsize=(7, 4)), [], []

    def begin(self, model, ema, optimizers: list, *arguments) -> None:
        self.swept = optimizers[self.which == "muon-lr"]            # AdamW, and Muon behind it
        self.compiled = bool(self.args.compile)

    def steps(self) -> Iterator[int]:
        ratio = (HIGH / LOW) ** (1 / max(1, self.args.steps - 1))
        for step in tqdm(range(self.args.steps), unit="step", desc="sweeping", dynamic_ncols=True):
            self.rates.append(LOW * ratio**step)
            for group in self.swept.param_groups:
                group["initial_lr"] = self.rates[-1]
            yield step
            smooth = smoothed(self.losses)
            if not smooth[-1] <= DIVERGED * min(smooth) and (
                    len(smooth) > NOISY or not math.isfinite(smooth[-1])):
                break

    def replayed(self, step):
        return step

    def log(self, *, loss: Tensor, **numbers) -> None:
        self.losses.append(loss.mean().item())

    def finish(self) -> int:
        """Print the suggestion and draw the curve."""
        suggested, lowest = suggestion(self.rates, self.losses)
        recipe = getattr(self.args, self.which.replace("-", "_"))
        say(f"lowest loss at --{self.which} {lowest:.2g}; the sweep ended at {self.rates[-1]:.2g}",
            f"suggested: --{self.which} {suggested:.2g} (the recipe: {recipe:g})")
        axes = self.figure.subplots()
        axes.loglog(self.rates, self.losses, lw=0.5, alpha=0.5)
        axes.loglog(self.rates, smoothed(self.losses), label="loss, smoothed")
        for rate, name, style in (suggested, "suggested", "-"), (recipe, "recipe", "--"):
            axes.axvline(rate, color="black", lw=0.8, ls=style, label=f"{name}: {rate:.2g}")
        axes.set(xlabel=f"--{self.which}", ylabel="loss")
        axes.legend()
        write(next_free("lr-finder"), self.figure)
        return 0


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
    if taken := NOT_IN_A_SWEEP.intersection(word.partition("=")[0] for word in words):
        raise UserError(f"{taken.pop()} has no meaning in a sweep")
    words += ["--steps", str(own.rates), "--warmup", "0", "--decay", "0"]
    return train_mnist.main(words, partial(Sweep, own.which))


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--which", choices=("muon-lr", "lr"), help="the rate that rises (default: "
                   "muon-lr; lr with --optimizer adamw)")
    p.add_argument("--rates", type=number(int, 2, 10_000), default=200, metavar="N",
                   help="how many rates, a step each (default: 200)")
    return p


if __name__ == "__main__":
    run_command(main)
