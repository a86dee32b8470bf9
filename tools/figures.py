"""The figures of README.md and docs/, for any data set, checkpoint, run or evaluation.

    python -m tools.figures forward                     a digit at several t, from x0 to noise
    python -m tools.figures attention CKPT              what one patch attends to, by each head
    python -m tools.figures guidance CKPT               the same noise at several guidance scales
    python -m tools.figures x0hat CKPT_EPS CKPT_V       each model's estimate of the clean image
    python -m tools.figures sweep FILE.jsonl            tools.evaluate's results against guidance
    python -m tools.figures accuracy NAME=FILE.jsonl... distance and recall against accuracy
    python -m tools.figures densities                   the noise levels that training draws
    python -m tools.figures loss RUN...                 loss against the step, also by quarters of t

Each writes --out FILE.png, or a new numbered file under output/. The last four need matplotlib.
"""

import support.threads  # noqa: F401  (before torch)

import inspect
import json
import math
from argparse import Namespace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import patchify
from sample import Checkpoint, label_of, load, sample
from support import checkpoint as checkpoints
from support import command, compute, data
from support.command import (
    COUNT, SEED, Parser, UserError, atomic_write, check_target, next_free, number, run_command, say,
    short)
from tools.evaluate import class_balanced_order
from train_mnist import RECIPE

CELL, GAP = 84, 4                               # of a sheet of images, in pixels
# Told apart by colour-blind readers (Okabe & Ito), and by marker or line style
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

# ---------------------------------------------------------------- sheets of images


def picture(image: Tensor) -> Image.Image:
    """One image, float (C, H, H) in [-1, 1] (clipped), as CELL x CELL pixels."""
    pixels = data.to_uint8(image).cpu().permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)


def sheet(rows: list, names: list[str], heads: list[str], feet: list[str] | None = None,
          group: int = 1000, title: str = "") -> Image.Image:
    """Rows of images (C, H, H), pictures, or None for a gap. A name left of each row, a head above
    and a foot of two lines below each column; a wider gap after every `group` rows."""
    font = ImageFont.load_default(size=14)
    left = 12 + max(int(font.getlength(name)) for name in names)
    top, pitch = 28 + 26 * bool(title), CELL + GAP
    bottom = top + len(rows) * pitch + (len(rows) - 1) // group * 3 * GAP
    page = Image.new("RGB", (left + len(heads) * pitch, bottom + 44 * bool(feet)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((left, 16), title, "black", font, anchor="lm")
    for y, words in (top - 14, heads), (bottom + 22, feet or []):
        for column, text in enumerate(words):
            draw.multiline_text((left + column * pitch + CELL / 2, y), text, "black", font,
                                anchor="mm", align="center")
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + r * pitch + r // group * 3 * GAP
        draw.text((left - 8, y + CELL / 2), name, "black", font, anchor="rm")
        for column, image in enumerate(row):
            if image is not None:
                image = picture(image) if isinstance(image, Tensor) else image
                page.paste(image, (left + column * pitch, y))
    return page


def recipe_of(checkpoint: Checkpoint) -> dict:
    return checkpoints.load(checkpoint.path)["config"]["recipe"]


def noised_images(args: Namespace, diffusion, checkpoint: Checkpoint | None = None
                  ) -> tuple[Tensor, Tensor, list[Tensor]]:
    """--images images of the test set (at most all), class-balanced, in an order that depends on
    --seed: x0 (N, C, H, H), y (N,), and xt for each of --times, an image's all of one noise."""
    if (latest := max(args.times)) >= diffusion.num_timesteps:
        raise UserError(f"--times {latest}: t goes from 0 to {diffusion.num_timesteps - 1}")
    size, trained_on, device = None, "mnist", "cpu"
    if checkpoint:
        size, device = checkpoint.model.input_size, next(checkpoint.model.parameters()).device
        trained_on = recipe_of(checkpoint).get("dataset") or "mnist"
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
        name += f", {m.path.resolve().parent.name}/{m.path.stem}" * (kinds.count(name) > 1)
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


def guidance(args: Namespace) -> Image.Image:
    """Samples of each of --labels from the same noise, a row for each guidance scale."""
    checkpoint = load(args.checkpoint)
    names = checkpoint.class_names
    if checkpoint.sampling.get("latents"):
        raise UserError(f"{checkpoint.path} makes latents, which cannot be drawn")
    y = torch.tensor([label_of(text, names) for text in args.labels or names[:10]])
    rows = [torch.cat(list(sample(checkpoint, y, cfg_scale=s, steps=args.steps, seed=args.seed)))
            for s in args.cfg_scale]
    words = {0: "unconditional", 1: "conditional"}
    return sheet(rows, [f"scale {s:g}: {words.get(s, 'guided')}" for s in args.cfg_scale],
                 [names[i] for i in y])


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
    side, page = math.isqrt(len(weights)), picture(image)
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
    name = f"{recipe_of(checkpoint).get('model', 'DiT')} ({checkpoint.path.name})"
    return sheet(rows, names, ["xt", *(f"block {k}" for k in range(len(blocks.found)))] * len(x0),
                 None, heads, f"{name}. Cyan: one patch. Orange: the share of its attention, from "
                 "0 (dark) to 100% (bright).")


# ---------------------------------------------------------------- evaluations (matplotlib)

METRICS = ("accuracy", "frechet", "precision", "recall")
# What makes two evaluations the same measurement
SETTINGS = ("images_from", "weights", "images", "sampler", "steps", "eta", "cfg_scale",
            "guidance_interval", "autoguidance", "seed", "data_digest")
ENOUGH = 0.995                  # an accuracy at which the distances of runs are compared
ERRORS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 5e-4, 2e-4, 1e-4)   # ticks


def new_figure(**options):
    """A matplotlib Figure without a window. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("this figure needs matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained", **options)


def read_evaluations(file: Path) -> list[dict]:
    """The evaluations of checkpoints in an evaluations.jsonl: SETTINGS; METRICS of samples and of
    as many test images; error: the share of wrong samples, of half a sample where none is."""
    points = []
    for i, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        try:
            result = json.loads(line)
            if result.get("cfg_scale") is not None:         # else of an .npz
                images, rows = int(result["rows"]["samples"]["images"]), {
                    row: {metric: float(result["rows"][row][metric]) for metric in METRICS}
                    for row in ("samples", "test")}
                error = max(1 - rows["samples"]["accuracy"], 0.5 / images)
                points.append(dict(result, images=images, error=error, **rows))
        except checkpoints.ANY_ERROR:
            raise UserError(f"{file}, line {i} is no line of tools.evaluate") from None
    if not points:
        raise UserError(f"no evaluation of a checkpoint in {file}")
    return points


def groups_against(x: str, points: list[dict]) -> list[list[dict]]:
    """The points in groups that differ in the setting x alone, each in the order of x; of two that
    do not differ at all the last."""
    groups: dict[str, dict] = {}
    for point in sorted(points, key=lambda p: p[x]):
        others = json.dumps([point.get(key) for key in SETTINGS if key != x])
        groups.setdefault(others, {})[point[x]] = point
    return [list(group.values()) for group in groups.values()]


def metric_axis(axes, metric: str, points: list[dict]) -> None:
    """The y axis of a metric, logarithmic for a distance, with a grid; dashed, the test set's."""
    tests = sorted({p["test"][metric] for p in points})
    for i, value in enumerate(tests):
        axes.axhline(value, color="black", ls="--", lw=0.9, label=None if i else "real: test set")
    axes.set_ylabel(metric.replace("frechet", "Frechet distance"))
    if metric == "frechet":
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    else:                                           # shares: differences below 0.03 look small
        drawn = tests + [p["samples"][metric] for p in points]
        axes.set_ylim(min(drawn) - 0.03, min(max(drawn) + 0.03, 1.005))
    axes.grid(alpha=0.3, which="both")


def sweep(args: Namespace):
    """A panel for each metric, a line for all evaluations that differ in --against alone."""
    x = {"guidance": "cfg_scale", "steps": "steps"}[args.against]
    points = [point for file in args.files for point in read_evaluations(Path(file))]
    groups = [group for group in groups_against(x, points) if len(group) > 1]
    if not groups:
        raise UserError(f"no two evaluations differ in {args.against} alone")
    varied = [k for k in SETTINGS if k != x and len({str(group[0].get(k)) for group in groups}) > 1
              ] or ["sampler"]
    figure = new_figure(figsize=(13, 3.5))
    for metric, axes in zip(METRICS, figure.subplots(1, len(METRICS)), strict=True):
        for group in groups:
            axes.plot([p[x] for p in group], [p["samples"][metric] for p in group], marker="o",
                      ms=4, label=", ".join(f"{k} {group[0].get(k)}" for k in varied))
        metric_axis(axes, metric, sum(groups, []))
        axes.set_xlabel(args.against)
        if x == "steps":
            axes.set_xscale("log")
            axes.set_xticks(ticks := sorted({p[x] for p in sum(groups, [])}), map(str, ticks))
            axes.set_xticks([], minor=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return figure


def accuracy(args: Namespace):
    """Frechet distance and recall against accuracy, which guidance varies: a curve for each name,
    the mean of its runs, each of which is a thin line. Says for each run the smallest distance
    with at least ENOUGH right."""
    figure, runs = new_figure(figsize=(10, 4.2)), {}        # name -> curves
    for text in args.runs:
        name, _, file = text.rpartition("=")
        name = name or Path(file).resolve().parent.name
        curve = max(groups_against("cfg_scale", read_evaluations(Path(file))), key=len)
        runs.setdefault(name, []).append(curve)
        right = [p["samples"] | p for p in curve if p["samples"]["accuracy"] >= ENOUGH]
        say(f"{name} ({file}): " + ("Frechet distance {frechet:.2f}, recall {recall:.3f}, "
            "{accuracy:.2%} right at guidance {cfg_scale:g}".format(
                **min(right, key=lambda p: p["frechet"])) if right else
            f"no guidance with {ENOUGH:.1%} right"))
    points = [p for curves in runs.values() for curve in curves for p in curve]
    images, *others = {p["images"] for p in points}
    if others:
        raise UserError("these runs were evaluated with different numbers of images")
    low, high = 1.1 * max(0.1, *(p["error"] for p in points)), 0.5 / images
    ticks = {e: f"{100 * (1 - e):g}%" for e in ERRORS if low > e > 1.5 * high} | {high: "100%"}
    for metric, axes in zip(("frechet", "recall"), figure.subplots(1, 2), strict=True):
        axes.set_prop_cycle(color=COLOURS, marker=MARKERS)
        axes.margins(y=0.1)
        for i, (name, curves) in enumerate(runs.items()):
            place = dict(xytext=(4, 5)) if i % 2 else dict(xytext=(-4, -12), ha="right")
            draw_runs(axes, name, curves, metric, place)
        metric_axis(axes, metric, points)
        axes.axvline(1 - ENOUGH, color="black", ls=":", lw=0.9)
        axes.set(xscale="log", xlim=(low, 0.8 * high), xlabel="accuracy")
        axes.set_xticks(list(ticks), ticks.values(), fontsize=9)
        axes.set_xticks([], minor=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(runs) + 1)
    return figure


def draw_runs(axes, name: str, curves: list[list[dict]], metric: str, place: dict) -> None:
    """The mean of runs at each guidance that all of them have, with the guidances beside it; thin,
    each run where there are several."""
    runs = [{p["cfg_scale"]: (p["error"], p["samples"][metric]) for p in curve} for curve in curves]
    mean = {scale: np.mean([run[scale] for run in runs], axis=0) for scale in runs[0]
            if all(scale in run for run in runs)}
    line, = axes.plot(*np.reshape(list(mean.values()), (-1, 2)).T, lw=2, ms=5,
                      label=name + f" ({len(runs)} runs)" * (len(runs) > 1))
    for scale, point in mean.items():
        axes.annotate(f"{scale:g}", point, color=line.get_color(), fontsize=9, zorder=1.5,
                      textcoords="offset points", **place,
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.3))
    for run in runs if runs[1:] else ():
        axes.plot(*np.transpose(list(run.values())), lw=0.7, marker="", zorder=1,
                  color=line.get_color())


# ---------------------------------------------------------------- training (matplotlib)

# Mean and standard deviation of ln(sigma / alpha) in training. JiT's t is 1 where the image is
# clean, so that logit(t) = ln(alpha / sigma), of mean -0.8; EDM2 has alpha = 1 and gives ln(sigma).
NOISE_LEVELS = {"this project": (RECIPE["noise_mean"], RECIPE["noise_std"]),
                "SD3": (0.0, 1.0),              # arXiv 2403.03206
                "JiT": (0.8, 0.8),              # arXiv 2511.13720
                "EDM2": (-0.4, 1.0)}            # arXiv 2312.02696


def densities(args: Namespace):
    """How often training sees each noise level: the density over ln(sigma / alpha), and over the
    timesteps of the lesson's schedule, relative to uniform t."""
    diffusion, figure = GaussianDiffusion(), new_figure(figsize=(10, 4.2))
    by_level, by_time = panels = figure.subplots(1, 2)
    for axes in panels:
        axes.set_prop_cycle(color=COLOURS[:len(STYLES)], linestyle=STYLES)
        axes.grid(alpha=0.3)
    T, levels = diffusion.num_timesteps, np.linspace(-6, 6, 481)
    bounds = diffusion.noise_level_bounds.tolist()          # between timesteps
    for name, (mean, std) in NOISE_LEVELS.items():
        normal = NormalDist(mean, std)
        by_level.plot(levels, [normal.pdf(x) for x in levels],
                      label=f"{name}: mean {mean:g}, std {std:g}")
        by_time.plot(T * np.diff([0, *map(normal.cdf, bounds), 1]))
    level = (1 / diffusion.alpha_bar - 1).log() / 2         # ln(sigma / alpha), (T,), float64
    by_level.plot((level[1:] + level[:-1]) / 2, 1 / (T * level.diff()),
                  label="DDPM, DiT: uniform t")
    by_time.plot([0, T - 1], [1, 1])
    ticks = torch.arange(-4, 6, 2)
    by_level.set_xticks(ticks, [f"{x}\nt = {t}" for x, t in zip(
        ticks.tolist(), diffusion.t_from_noise_level(ticks).tolist(), strict=True)])
    by_level.set(xlabel="ln(sigma / alpha); t of the linear-beta schedule", xlim=(-6, 6),
                 ylim=(0, None), ylabel="density in training")
    by_time.set(xlabel="t", xlim=(0, T), ylim=(0, None), ylabel="density, relative to uniform t")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def loss(args: Namespace):
    """The losses of runs against the step, averaged; below, those of each quarter of t."""
    figure = new_figure(figsize=(10, 7))
    grid = figure.add_gridspec(2, 4, height_ratios=[2, 1])
    panels = {"loss": figure.add_subplot(grid[0, :], ylabel="loss")}
    for i in range(4):
        panels[f"loss_q{i + 1}"] = figure.add_subplot(
            grid[1, i], sharey=panels.get("loss_q1"), title=f"t = {250 * i} ... {250 * i + 249}")
    for folder in args.runs or [checkpoints.newest_run() or command.OUTPUT]:
        if not (rows := checkpoints.read_metrics(Path(folder))):
            raise UserError(f"{short(folder)} holds no training run")
        for key, axes in panels.items():
            axes.plot(*averaged(rows, key), label=short(folder))
            axes.set(xscale="log", yscale="log", xlabel="step")
            axes.grid(alpha=0.3)
    panels["loss"].legend()
    return figure


def averaged(rows: list[dict], key: str) -> np.ndarray:
    """(steps, means): `key` of the rows of metrics.jsonl, averaged over ranges of a twentieth of
    the steps before them. A range without a finite value is left out."""
    found = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key) or math.nan)]
    steps = [step for step, _ in found]
    ends = np.searchsorted(steps, 1.05 ** np.arange(400))
    return np.reshape([np.mean(part, axis=0) for part in np.split(np.reshape(found, (-1, 2)), ends)
                       if len(part)], (-1, 2)).T


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    target = args.out or next_free(command.OUTPUT, args.figure, ".png")
    check_target(target, args.force, ".png")
    figure = args.draw(args)
    atomic_write(target, lambda file: figure.save(file, format="png") if isinstance(
        figure, Image.Image) else figure.savefig(file, format="png", dpi=140))
    say(f"written: {short(target)}")
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    figures = p.add_subparsers(dest="figure", required=True, metavar="FIGURE")

    def add(draw, operands: tuple = (), images: int = 0, times: tuple = ()) -> Parser:
        """operands: their name, how many, what they are called and mean."""
        text = inspect.getdoc(draw)
        sub = figures.add_parser(draw.__name__, help=text, description=text)
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
        if images or draw is guidance:
            sub.add_argument("--seed", type=SEED, default=0, help="of images, noise (default: 0)")
        sub.add_argument("--out", type=Path, metavar="FILE.png",
                         help="the figure (default: a new numbered file under output/)")
        sub.add_argument("--force", action="store_true", help="overwrite an existing file")
        return sub

    checkpoint = ("checkpoint", "?", "CKPT", "a checkpoint or a run folder (default: the newest "
                  "under output/, else the one that ships)")
    lines = "evaluations.jsonl of a run"
    add(forward, (), 1, (0, *range(100, 1000, 100), 999))
    add(x0hat, ("checkpoints", "+", "CKPT", "checkpoints or run folders"), 2,
        (999, 950, 900, 800, 600, 400, 200, 50))
    add(attention, checkpoint, 2, (800, 50))
    sub = add(guidance, checkpoint)
    sub.add_argument("--labels", nargs="+", metavar="LABEL", help="a column for each: class names, "
                     "number words or indices (default: the first ten classes)")
    sub.add_argument("--cfg-scale", type=number(float, -100, 100), nargs="+", default=[0, 1, 2, 4],
                     metavar="S", help="guidance scales (default: 0 1 2 4)")
    sub.add_argument("--steps", type=COUNT, help="sampling steps (default: the checkpoint's)")
    sub = add(sweep, ("files", "+", "FILE.jsonl", lines))
    sub.add_argument("--against", choices=("guidance", "steps"), default="guidance",
                     help="default: guidance")
    add(accuracy, ("runs", "+", "NAME=FILE.jsonl", lines + " and the name of its curve; runs of "
                   "one name are seeds of it"))
    add(densities)
    add(loss, ("runs", "*", "RUN", "run folders (default: the newest under output/)"))
    return p


if __name__ == "__main__":
    run_command(main)
