"""The figures of README.md and docs/, for any data set, checkpoint, run or evaluation.

    python -m tools.figures forward                     a digit at several t, from x0 to noise
    python -m tools.figures attention CKPT              what one patch attends to, by each head
    python -m tools.figures guidance CKPT --label 4     one class at several guidance scales
    python -m tools.figures ema CKPT CKPT               the weights beside their EMA
    python -m tools.figures previews RUN                what a run drew at several steps
    python -m tools.figures x0hat CKPT_EPS CKPT_V       each model's estimate of the clean image
    python -m tools.figures timesteps                   alpha and sigma, and the t of training
    python -m tools.figures curves [NAME=]RUN...        loss against steps, quality against Gflops

Each writes --out FILE.png, or a new numbered file under output/. The last two need matplotlib.
"""

import inspect
import json
import math
from argparse import Namespace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import patchify
from sample import Checkpoint, load, sample
from support import checkpoint as checkpoints
from support import command, compute, data
from support.classes import label_of
from support.command import (
    COUNT, SEED, Parser, UserError, atomic_write, check_target, next_free, number, reason,
    run_command, say, short)
from support.pictures import CELL, picture, sheet
from support.registry import NETWORKS
from tools.evaluate import class_balanced_order
from train_mnist import RECIPE
from variants.count import count

# Told apart by colour-blind readers (Okabe & Ito), and by marker or line style
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

# ---------------------------------------------------------------- sheets of images


def noised_images(args: Namespace, diffusion, checkpoint: Checkpoint | None = None
                  ) -> tuple[Tensor, Tensor, list[Tensor]]:
    """--images images of the test set (at most all), class-balanced, in an order that depends on
    --seed: x0 (N, C, H, H), y (N,), and xt for each of --times, an image's all of one noise."""
    if (latest := max(args.times)) >= diffusion.num_timesteps:
        raise UserError(f"--times {latest}: t goes from 0 to {diffusion.num_timesteps - 1}")
    size, trained_on, device = None, "mnist", "cpu"
    if checkpoint:
        size, device = checkpoint.model.input_size, next(checkpoint.model.parameters()).device
        trained_on = checkpoint.config["recipe"].get("dataset") or "mnist"
    test = data.load(args.dataset or trained_on, args.data_dir, size, "test")
    if test.channels not in (1, 3) or checkpoint and (test.channels, test.class_names) != (
            checkpoint.model.in_channels, checkpoint.class_names):
        raise UserError(f"{test.name} has other classes or channels than the model, or cannot be "
                        f"drawn: --dataset names the images")
    order = class_balanced_order(test.labels, args.seed, "figure")[: args.images]
    x0, y = test.images[order].to(device).float() / 127.5 - 1, test.labels[order].to(device)
    eps = torch.randn(x0.shape, generator=compute.generator("cpu", args.seed, "eps")).to(device)
    return x0, y, [diffusion.q_sample(x0, torch.full_like(y, t), eps) for t in args.times]


def forward(args: Namespace) -> Image.Image:
    """x0 and its xt at each of --times, alpha (the share of x0) below them: DDPM eq. 4."""
    diffusion = GaussianDiffusion()
    x0, _, xts = noised_images(args, diffusion)
    feet = [f"alpha\n{diffusion.alpha[t].item():.4f}" for t in args.times]
    return sheet(list(torch.stack([x0, *xts], dim=1)), [""] * len(x0),
                 ["x0", *(f"t = {t}" for t in args.times)], ["", *feet])


@torch.no_grad()
def x0hat(args: Namespace) -> Image.Image:
    """xt at each of --times, and below it the x0_hat of each model, neither guided nor clipped: at
    t = 999 an error of the output is divided by 0.006 for eps, and multiplied by 1 for v."""
    models = [load(name) for name in args.checkpoints]
    if len({(m.model.input_size, type(m.diffusion), *m.class_names) for m in models}) > 1:
        raise UserError("these checkpoints differ in their images, classes or process")
    process = models[0].diffusion
    x0, y, xts = noised_images(args, process, models[0])
    kinds = [m.diffusion.prediction for m in models]
    names, blocks = ["xt"], [torch.stack([*xts, x0], dim=1)]            # (N, columns, C, H, H)
    for m, name in zip(models, kinds, strict=True):
        folder = f"{m.path.resolve().parent.name}/" * m.path.stem.startswith("step_")
        name += f", {folder}{m.path.stem}" * (kinds.count(name) > 1)
        predict = classifier_free_guidance(m.model, y, cfg_scale=1)
        found = [m.diffusion.denoise(predict, xt, t, clip=False)[0]
                 for t, xt in zip(args.times, xts, strict=True)]
        errors = [(x0_hat - x0).square().mean().sqrt().item() for x0_hat in found]
        say(f"{name}: RMS error of x0_hat " + ", ".join(
            f"{e:.3g} (t={t})" for t, e in zip(args.times, errors, strict=True)))
        names.append(f"x0_hat ({name})")
        blocks.append(torch.stack(found, dim=1))
    feet = [f"alpha\n{process.alpha_sigma(t)[0].item():.4f}" for t in args.times]
    return sheet([block[i] for i in range(len(x0)) for block in blocks], names * len(x0),
                 [*(f"t = {t}" for t in args.times), "x0"], feet, len(blocks))


def samples_of(checkpoint: Checkpoint, y: Tensor, args: Namespace, **options) -> Tensor:
    """Images (N, C, H, H) of the labels y (N,), always from the noises of --seed."""
    if checkpoint.sampling.get("latents"):
        raise UserError(f"{checkpoint.path} makes latents, which cannot be drawn")
    return torch.cat(list(sample(checkpoint, y, seed=args.seed, **options)))


def guidance(args: Namespace) -> Image.Image:
    """Samples of one class from six noises, a row for each guidance scale."""
    checkpoint = load(args.checkpoint)
    label = label_of(args.label or checkpoint.class_names[0], checkpoint.class_names)
    y = torch.full((6,), label)
    words = {0: "unconditional", 1: "conditional"}
    return sheet([samples_of(checkpoint, y, args, cfg_scale=s) for s in args.cfg_scale],
                 [f"scale {s:g}: {words.get(s, 'guided')}" for s in args.cfg_scale], [""] * 6)


def ema(args: Namespace) -> Image.Image:
    """Samples of the first ten classes, for each checkpoint two rows from the same noises: with the
    weights before averaging, and with their EMA."""
    rows, names = [], []
    for path in args.checkpoints:
        for weights in ("model", "ema"):
            checkpoint = load(path, weights=weights)
            y = torch.arange(min(10, len(checkpoint.class_names)))
            rows.append(samples_of(checkpoint, y, args))
            names.append(f"step {checkpoint.step:,}: {weights}")
    return sheet(rows, names, [""] * max(map(len, rows)), None, 2)


def previews(args: Namespace) -> Image.Image:
    """The first image of each class in the previews of a run, a row for each of --steps."""
    rows = []
    for step in args.steps:
        path = Path(args.run, "samples", f"step_{step:07d}.png")
        if not path.is_file():
            raise UserError(f"{path} is missing: see --steps, and --preview-every of a new run")
        page = Image.open(path)
        side = (page.width - 2) // 6                        # a frame of 2 pixels, six columns
        rows.append([page.crop((2, y + 2, side, y + side)).resize(
            (CELL, CELL), Image.Resampling.NEAREST) for y in range(0, page.height - 2, side)])
    return sheet(rows, [f"step {step:,}" for step in args.steps], [""] * len(rows[0]))


class AttentionWeights(TorchFunctionMode):
    """Collects the weights of every self-attention that runs inside it, of any network: `found`,
    each (B, heads, N, N), how much each token (row) attends to each. Rows sum to 1."""

    def __init__(self):
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and args[0].shape == args[1].shape:
            q, k = args[:2]
            self.found.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1))
        return function(*args, **(kwargs or {}))


def overlay(image: Tensor, query: int, weights: Tensor) -> Image.Image:
    """An image with the query patch outlined. Every patch is coloured by its share of the query's
    attention, weights (N,); 0 throughout: the image alone."""
    side, page = math.isqrt(len(weights)), picture(image, CELL)
    if weights.any():
        mask = (255 * weights.sqrt()).view(side, side).to("cpu", torch.uint8)   # of 10%: 32%
        mask = Image.fromarray(mask.numpy()).resize(page.size, Image.Resampling.NEAREST)
        page = Image.composite(Image.new("RGB", page.size, (255, 120, 0)),
                               page.point(lambda value: value * 0.4), mask)
    x, y, p = query % side * CELL / side, query // side * CELL / side, CELL / side
    ImageDraw.Draw(page).rectangle((x, y, x + p - 1, y + p - 1), outline=(0, 220, 255), width=2)
    return page


@torch.no_grad()
def attention(args: Namespace) -> Image.Image:
    """For each image, side by side: xt with the patch of highest contrast outlined, and what each
    head of each block lets it attend to; a group of rows for each of --times."""
    checkpoint = load(args.checkpoint)
    x0, y, xts = noised_images(args, checkpoint.diffusion, checkpoint)
    model, rows, names = checkpoint.model, [], []
    N = (model.input_size // model.patch_size) ** 2         # further tokens stand behind these
    query = patchify(x0, model.patch_size).std(dim=-1).argmax(dim=1).tolist()
    for t, xt in zip(args.times, xts, strict=True):
        with AttentionWeights() as blocks:
            model(xt, torch.full_like(y, t), y)
        heads = blocks.found[0].shape[1]
        for h in range(heads):
            names.append(f"t = {t}, head {h}")
            rows.append([])
            for i, q in enumerate(query):
                rows[-1].append(overlay(xt[i], q, torch.zeros(N)) if h == 0 else None)
                rows[-1] += [overlay(xt[i], q, weights[i, h, q, :N]) for weights in blocks.found]
    name = f"{checkpoint.config['recipe'].get('model', 'DiT')} ({checkpoint.path.name})"
    return sheet(rows, names, ["xt", *(f"block {k}" for k in range(len(blocks.found)))] * len(x0),
                 None, heads, f"{name}. Cyan: one patch. Orange: the share of its attention, from "
                 "0 (dark) to 100% (bright).")


# ---------------------------------------------------------------- training (matplotlib)


def new_figure(**options):
    """A matplotlib Figure without a window. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("this figure needs matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained", dpi=140, **options)


def write(path: Path, figure) -> None:
    save = figure.save if isinstance(figure, Image.Image) else figure.savefig
    atomic_write(path, lambda file: save(file, format="png"))
    say(f"written: {short(path)}")


def log_ticks(axis) -> None:
    """Of a logarithmic axis: plain numbers at 1, 2, 3, 5, 10 ...; on a long one at 1, 10 ..."""
    from matplotlib.ticker import LogLocator, NullLocator
    low, high = axis.get_view_interval()
    axis.set(major_locator=LogLocator(subs=(1, 2, 3, 5) if high < 500 * low else (1,)),
             major_formatter="{x:,.10g}", minor_locator=NullLocator())


# Mean and standard deviation of ln(sigma / alpha) in training. JiT's t is 1 where the image is
# clean, so that logit(t) = ln(alpha / sigma), of mean -0.8.
NOISE_LEVELS = {"this project": (RECIPE["noise_mean"], RECIPE["noise_std"]),
                "SD3": (0.0, 1.0),              # arXiv 2403.03206
                "JiT": (0.8, 0.8)}              # arXiv 2511.13720


def timesteps(args: Namespace):
    """alpha and sigma over t, and how often training draws each t, relative to uniform t."""
    diffusion, figure = GaussianDiffusion(), new_figure(figsize=(9, 3))
    tables, draws = panels = figure.subplots(1, 2)
    tables.plot(diffusion.alpha, color=COLOURS[0], label="alpha: factor of the image")
    tables.plot(diffusion.sigma, color=COLOURS[1], ls="--", label="sigma: factor of the noise")
    T, bounds = diffusion.num_timesteps, diffusion.noise_level_bounds.tolist()
    for (name, level), colour, style in zip(NOISE_LEVELS.items(), COLOURS, STYLES, strict=False):
        density = T * np.diff([0, *map(NormalDist(*level).cdf, bounds), 1])
        draws.plot(density, color=colour, ls=style,
                   label="{}: mean {:g}, std {:g}".format(name, *level))
        if name == "this project":
            draws.fill_between(range(T), density, color=colour, alpha=0.2, lw=0)
    draws.plot([0, T - 1], [1, 1], color="black", lw=0.8, ls=":", label="DDPM, DiT: uniform t")
    for axes in panels:
        axes.set(xlabel="t", xlim=(0, T - 1), ylim=(0, 1.5))
        axes.legend(fontsize=8, loc="upper right")
        axes.grid(alpha=0.3)
    draws.set(ylabel="how often, relative to uniform", ylim=(0, 3.9))
    return figure


RIGHT = 0.99                    # the accuracy at which `curves` compares distances
AXES = dict(forward="Gflops of one forward", training="Gflops of training",
            sampling="Gflops of sampling one image")


def curves(args: Namespace):
    """Runs against their steps: --y, a key of metrics.jsonl, but for the first twentieth. With --x
    the Frechet distance of their evaluations against Gflops, as figures 6 to 10 of the DiT paper,
    whose Gflops are multiply-adds: at guidance --cfg-scale, by default that of the smallest
    distance with 99% right. Runs of one NAME are seeds, and the line is their mean; "A, x" and
    "A, y" have the same colour.

    --x forward: a line for each patch size; each run has a point, its end. training: for each
    model; a step costs three forwards an image. sampling: for each model, at its end; a guided step
    costs two forwards.
    """
    figure, lines = new_figure(figsize=(8, 5)), {}              # label -> model, x -> values of y
    axes, dots = figure.subplots(), args.x is not None
    axes.set(xscale="log", yscale="log", xlabel=AXES.get(args.x, "training steps"),
             ylabel="Frechet distance" if dots else args.y)
    for text in args.runs or [str(checkpoints.newest_run() or command.OUTPUT)]:
        name, _, folder = text.rpartition("=")
        model, patch, points = run_points(Path(folder), args)
        label = name or {None: short(folder), "forward": patch}.get(args.x, model)
        for x, y in points:
            lines.setdefault(label, {}).setdefault((x, model), []).append(y)
    colours, kinds, shown = {}, {}, []
    for label, points in sorted(lines.items(), key=lambda line: min(line[1])[0]):
        found = [(x, np.mean(ys), model) for (x, model), ys in sorted(points.items())]
        x, y, models = zip(*found, strict=True)
        # a colour for each size of model, a marker or line style for each patch size
        size, _, kind = label.partition("/" if args.x in ("training", "sampling") else ", ")
        i, j = colours.setdefault(size, len(colours)), kinds.setdefault(kind, len(kinds))
        axes.plot(x, y, color=COLOURS[i % len(COLOURS)], label=label, ms=5,
                  marker=MARKERS[j % len(MARKERS)] if dots else "",
                  linestyle="-" if dots else STYLES[j % len(STYLES)])
        shown += [place for place in zip(x, y, strict=True) if dots or place[0] > max(x) / 20]
        for place in zip(x, y, models, strict=True) if args.x == "forward" else ():
            say("{2} ({3}): {0:.4g} Gflops, {1:.4g}".format(*place, label))
            axes.annotate(place[2].removeprefix("DiT-"), place[:2], xytext=(0, 6), fontsize=8,
                          textcoords="offset points", ha="center")
    for axis, values in zip((axes.xaxis, axes.yaxis), np.transpose(shown), strict=True):
        getattr(axes, f"set_{axis.axis_name}lim")(values.min() / 1.15, values.max() * 1.15)
        log_ticks(axis)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def run_points(folder: Path, args: Namespace) -> tuple[str, str, list[tuple[float, float]]]:
    """(name of the model, its patch size, the points of its run) for `curves`."""
    try:
        config = json.loads((folder / "config.json").read_text())
        network, sizes, recipe = (config[key] for key in ("network", "model", "recipe"))
        gflops = count(NETWORKS[network], **sizes)[1] / 1e9
        other = f", {network}" * (network != "dit")
        names = recipe["model"] + other, f"patch {sizes['patch_size']}" + other
        batch_size, usual = recipe["batch_size"], config["sampling"]["steps"]
        evaluations, best = evaluations_of(folder), {}
    except Exception as error:
        raise UserError(f"{folder} holds no valid training run ({reason(error)})") from None
    if args.x is None:
        steps, means = averaged(checkpoints.read_metrics(folder), args.y)
        if not len(steps):
            raise UserError(f"{folder} has no {args.y}")
        return *names, [*zip(steps, means, strict=True)]
    end = max((step for step, *_ in evaluations), default=0)
    for (step, sampler, steps, scale), (frechet, accuracy) in evaluations.items():
        wanted = accuracy >= RIGHT if args.cfg_scale is None else scale == args.cfg_scale
        if wanted and (args.x == "training" or step == end) and (
                args.x == "sampling" or steps == usual):
            forwards = dict(forward=1, training=3 * batch_size * step,
                            sampling=steps * (1 if scale in (0, 1) else 2))[args.x]
            point = frechet, gflops * forwards
            best[step, sampler, steps] = min(point, best.get((step, sampler, steps), point))
    if not best:
        raise UserError(f"{folder} has no evaluation with 99% right, or at --cfg-scale, for --x "
                        f"{args.x}")
    return *names, [(x, y) for y, x in best.values()]


def evaluations_of(folder: Path) -> dict[tuple, tuple[float, float]]:
    """(step, sampler, its steps, guidance scale) -> (Frechet distance, accuracy), of the EMA with
    classifier-free guidance; of two that are alike the last."""
    return {(row["step"], row["sampler"], row["steps"], row["cfg_scale"]): tuple(
        row["rows"]["samples"][key] for key in ("frechet", "accuracy"))
        for row in checkpoints.read_metrics(folder, "evaluations.jsonl") if row["weights"] == "ema"
        and not (row.get("guidance_interval") or row.get("autoguidance"))}


def averaged(rows: list[dict], key: str) -> np.ndarray:
    """(steps, means): `key` of the rows of metrics.jsonl, averaged over ranges of a seventh of
    the steps before them. A range without a finite value is left out."""
    found = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key) or math.nan)]
    steps = [step for step, _ in found]
    ends = np.searchsorted(steps, 1.15 ** np.arange(140))
    return np.reshape([np.mean(part, axis=0) for part in np.split(np.reshape(found, (-1, 2)), ends)
                       if len(part)], (-1, 2)).T


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    target = args.out or next_free(args.figure)
    check_target(target, args.force, ".png")
    write(target, args.draw(args))
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    figures = p.add_subparsers(dest="figure", required=True, metavar="FIGURE")

    def add(draw, operands: tuple = (), images: int = 0, times: tuple = ()) -> Parser:
        """operands: their name, how many, what they are called and mean."""
        text = inspect.getdoc(draw)
        sub = figures.add_parser(draw.__name__, help=text.replace("%", "%%"), description=text)
        sub.set_defaults(draw=draw)
        if operands:
            name, nargs, metavar, text = operands
            sub.add_argument(name, nargs=nargs, metavar=metavar, help=text)
        if images:
            sub.add_argument("--dataset", help="mnist, fashion_mnist, cifar10, celeba, glyphs or "
                             "folder:PATH (default: the checkpoint's, else mnist)")
            sub.add_argument("--data-dir", metavar="DIR", help="where it is, or is downloaded to "
                             "(default: data/)")
            sub.add_argument("--images", type=COUNT, default=images, metavar="N",
                             help=f"how many images of the test set (default: {images})")
            sub.add_argument("--times", type=number(int, 0), nargs="+", default=times, metavar="T",
                             help=f"timesteps (default: {' '.join(map(str, times))})")
        if draw in (forward, x0hat, attention, guidance, ema):
            sub.add_argument("--seed", type=SEED, default=0, help="of images, noise (default: 0)")
        sub.add_argument("--out", type=Path, metavar="FILE.png",
                         help="the figure (default: a new numbered file under output/)")
        sub.add_argument("--force", action="store_true", help="overwrite an existing file")
        return sub

    checkpoint = ("checkpoint", "?", "CKPT", "a checkpoint or a run folder (default: the newest "
                  "under output/, else the one that ships)")
    add(forward, (), 1, (0, *range(100, 1000, 100), 999))
    add(x0hat, ("checkpoints", "+", "CKPT", "checkpoints or run folders"), 2,
        (999, 950, 900, 800, 600, 400, 200, 50))
    add(attention, checkpoint, 2, (800, 50))
    sub = add(guidance, checkpoint)
    sub.add_argument("--label", help="class name, number word or index (default: the first class)")
    sub.add_argument("--cfg-scale", type=number(float, -100, 100), nargs="+", default=[0, 1, 2, 4],
                     metavar="S", help="guidance scales (default: 0 1 2 4)")
    add(ema, ("checkpoints", "+", "CKPT", "full checkpoints of a run: step_*.pt"))
    add(previews, ("run", None, "RUN", "a run folder")).add_argument(
        "--steps", type=COUNT, nargs="+", default=[100, 300, 500, 1000, 4000], metavar="N",
        help="(default: 100 300 500 1000 4000, with --preview-every 100)")
    add(timesteps)
    sub = add(curves, ("runs", "*", "[NAME=]RUN", "run folders (default: the newest)"))
    sub.add_argument("--y", default="loss", metavar="KEY",
                     help="loss, loss_eps, loss_q1 ... (default: loss)")
    sub.add_argument("--x", choices=AXES, help="the Frechet distance, against these Gflops")
    sub.add_argument("--cfg-scale", type=float, metavar="S",
                     help="with --x: its guidance (default: the best)")
    return p


if __name__ == "__main__":
    run_command(main)
