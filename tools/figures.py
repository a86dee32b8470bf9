"""The figures of the README and the docs, for any data set, checkpoint or sweep.

    python -m tools.figures forward                     a digit at several t, from x0 to noise
    python -m tools.figures attention CKPT              what one patch of a digit attends to
    python -m tools.figures guidance CKPT               the same noise at several guidance scales
    python -m tools.figures x0hat CKPT_EPS CKPT_V       each model's estimate of the clean image
    python -m tools.figures error CKPT...               error in eps against t
    python -m tools.figures sweep FILE.jsonl...         tools.evaluate's results against guidance
                                                        and steps
    python -m tools.figures accuracy NAME=FILE.jsonl... distance and recall against accuracy
    python -m tools.figures densities                   the noise levels that training draws
    python -m tools.figures loss RUN...                 loss against the step, in all and in each
                                                        quarter of t
    python -m tools.figures training RUN                the run's previews as a GIF

Each writes --out FILE.png, or a new numbered file under output/. `error`, `sweep`, `accuracy`,
`densities` and `loss` need matplotlib.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.figures", file=sys.stderr)
    sys.exit(2)

import json
import math
from argparse import Namespace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import Attention, patchify
from sample import Checkpoint, sample
from support import checkpoints, distributed, paths
from support.cli import (
    BATCH, COUNT, SCALE, SEED, Parser, UserError, atomic_write, check_target, io_errors, next_free,
    number, run_command, say)
from support.curves import draw_losses, read_metrics
from support.data import to_uint8
from support.folders import find_checkpoint, newest_run
from support.pictures import animation, titled
from support.sampling import resolve_sampling
from support.seeds import generator
from tools import charts, evaluate
from tools.charts import METRICS

FORWARD_TIMES = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
X0HAT_TIMES = [999, 950, 900, 800, 600, 400, 200, 50]
ATTENTION_TIMES = [800, 50]

# ---------------------------------------------------------------- images and models


def load_images(args: Namespace, state: dict | None, device: torch.device
                ) -> tuple[Tensor, Tensor]:
    """--images images of the test set, class-balanced, in an order that depends on --seed: x0
    float32 (N, C, H, H) in [-1, 1] and y int64 (N,), on `device`."""
    _, test = evaluate.load_data(args, state)
    if args.images > (count := len(test.images)):
        raise UserError(f"--images {args.images}: the test set of {test.name} has {count}")
    order = evaluate.class_balanced_order(count, test.labels.numpy(), args.seed, "figure")
    return test.batch(torch.from_numpy(order[: args.images]), device)


def load_pictures(args: Namespace, state: dict | None, device: torch.device
                  ) -> tuple[Tensor, Tensor]:
    """`load_images`, to be drawn. Raises UserError for latents."""
    x0, y = load_images(args, state, device)
    if x0.shape[1] not in (1, 3):
        raise UserError(f"{x0.shape[1]} channels cannot be drawn: latents are no pictures")
    return x0, y


def noise_like(x0: Tensor, *key) -> Tensor:
    """Standard normal noise that depends on `key` alone, on every device: (N, C, H, H)."""
    return torch.randn(x0.shape, generator=generator("cpu", *key)).to(x0.device)


def noised(diffusion, x0: Tensor, args: Namespace) -> list[Tensor]:
    """xt (N, C, H, H) for each of --times; an image has the same noise at all of them."""
    if (latest := max(args.times)) >= (total := diffusion.num_timesteps):
        raise UserError(f"--times {latest}: t goes from 0 to {total - 1}")
    eps = noise_like(x0, args.seed, "eps")
    return [diffusion.q_sample(x0, torch.full((len(x0),), t, device=x0.device), eps)
            for t in args.times]


def load_models(names: list[str], device: torch.device
                ) -> tuple[dict, list[tuple[str, Checkpoint]]]:
    """(the state of the first checkpoint, a name and a model for each). The name is the prediction,
    with the run folder where two are the same. Raises UserError where they cannot be compared."""
    files = [find_checkpoint(name) for name in names]
    states = [checkpoints.load(file) for file in files]
    models = [evaluate.as_checkpoint(file, state, "ema", device)
              for file, state in zip(files, states, strict=True)]
    shape = {}
    for file, state, m in zip(files, states, models, strict=True):
        noising = {k: v for k, v in state["config"]["diffusion"].items()
                   if k not in ("prediction", "weighting")}     # what decides xt
        for key, value in [("input_size", m.model.input_size), ("in_channels", m.model.in_channels),
                           ("num_classes", m.model.num_classes),
                           ("process", (state["config"]["process"], noising))]:
            if shape.setdefault(key, value) != value:
                raise UserError(f"{file} has {key} {value}, and {files[0]} {shape[key]}: they "
                                f"cannot share a figure")
    predictions = [m.diffusion.prediction for m in models]
    names = [p + f", {file.resolve().parent.name}/{file.stem}" * (predictions.count(p) > 1)
             for p, file in zip(predictions, files, strict=True)]
    return states[0], list(zip(names, models, strict=True))


# ---------------------------------------------------------------- sheets of images


def font(size: int):
    return ImageFont.load_default(size=size)


def picture(image: Tensor, side: int) -> Image.Image:
    """One image, float (C, H, H) in [-1, 1] (clipped), as side x side pixels."""
    pixels = to_uint8(image).cpu().permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def sheet(rows: list, names: list[str], heads: list[str], feet: list[str], group: int = 1
          ) -> Image.Image:
    """Rows of images, float tensors (M, C, H, H) or lists of pictures of one size. A name left of
    each row, a head above each column and a foot of one line or more below it; a wider gap after
    every `group` rows."""
    if isinstance(rows[0], Tensor):
        side = rows[0].shape[-1]
        rows = [[picture(x, max(84, side)) for x in row] for row in rows]
    cell, gap = rows[0][0].width, 4
    left = 12 + max(int(font(14).getlength(name)) for name in names)
    top, below = 28, 8 + 18 * max(foot.count("\n") + 1 for foot in feet) * any(feet)
    bottom = top + len(rows) * (cell + gap) + (len(rows) - 1) // group * 3 * gap
    page = Image.new("RGB", (left + len(heads) * (cell + gap), bottom + below), "white")
    draw = ImageDraw.Draw(page)
    for column, words in enumerate(zip(heads, feet, strict=True)):
        for y, text in zip((top / 2, bottom + below / 2), words, strict=True):
            draw.multiline_text((left + column * (cell + gap) + cell / 2, y), text, "black",
                                font(14), anchor="mm", align="center")
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + r * (cell + gap) + r // group * 3 * gap
        draw.text((left - 8, y + cell / 2), name, "black", font(14), anchor="rm")
        for column, image in enumerate(row):
            page.paste(image, (left + column * (cell + gap), y))
    return page


def forward(args: Namespace, device: torch.device) -> Image.Image:
    """x0 and its xt at each of --times, alpha (the share of x0) below them: DDPM eq. 4."""
    diffusion = GaussianDiffusion().to(device)
    x0, _ = load_pictures(args, None, device)
    rows = torch.stack([x0, *noised(diffusion, x0, args)], dim=1)       # (N, columns, C, H, H)
    alphas = [diffusion.alpha_bar[t].sqrt().item() for t in args.times]
    feet = [f"alpha\n{alpha:.5f}" if alpha > 0.999 else f"alpha\n{alpha:.3f}" for alpha in alphas]
    return sheet(list(rows), [""] * len(rows), ["x0"] + [f"t = {t}" for t in args.times],
                 ["", *feet])


@torch.no_grad()
def x0hat(args: Namespace, device: torch.device) -> Image.Image:
    """xt at each of --times, and below it the x0_hat of each model, neither guided nor clipped: at
    t = 999 an error of the output is divided by 0.006 for eps, and multiplied by 1 for v."""
    state, models = load_models(args.checkpoints, device)
    process = models[0][1].diffusion
    x0, y = load_pictures(args, state, device)
    xts = noised(process, x0, args)
    blocks = [torch.stack([*xts, x0], dim=1)]                   # each (N, columns, C, H, H)
    for name, m in models:
        predict = classifier_free_guidance(m.model, y, cfg_scale=1)
        found = [m.diffusion.denoise(predict, xt, t, clip=False)[0]
                 for t, xt in zip(args.times, xts, strict=True)]
        blocks.append(torch.stack(found, dim=1))
        errors = [(x - x0).square().mean().sqrt().item() for x in found]
        say(f"{name}: RMS error of x0_hat " + ", ".join(
            f"{e:.3g} (t={t})" for t, e in zip(args.times, errors, strict=True)))
    one = torch.ones(1, 1, 1, 1, device=device)                 # without noise: its share in xt
    shares = [process.q_sample(one, torch.tensor([t], device=device), 0 * one).item()
              for t in args.times]
    return sheet([block[i] for i in range(len(x0)) for block in blocks],
                 ["xt", *(f"x0_hat ({name})" for name, _ in models)] * len(x0),
                 [f"t = {t}" for t in args.times] + ["x0"],
                 [f"alpha\n{share:.3f}" for share in shares] + [""], len(blocks))


def guidance(args: Namespace, device: torch.device) -> Image.Image:
    """Samples of every class from the same noise, a row for each guidance scale."""
    _, [(_, checkpoint)] = load_models([args.checkpoint], device)
    y = torch.arange(min(10, len(checkpoint.class_names)))
    rows = [next(sample(checkpoint, y, args.seed, resolve_sampling(checkpoint, s, args.steps)))
            for s in args.cfg_scale]
    words = {0: "unconditional", 1: "conditional"}
    return sheet(rows, [f"scale {s:g}: {words.get(s, 'guided')}" for s in args.cfg_scale],
                 [checkpoint.class_names[i] for i in y], [""] * len(y), len(rows))


# ---------------------------------------------------------------- attention


@torch.no_grad()
def attention_weights(model, xt: Tensor, t: int, y: Tensor) -> list[Tensor]:
    """For each block, how much each patch attends to each: (B, N, N), the mean of the heads. Rows
    sum to 1, or less where the network has further tokens, behind the patches: what goes to those
    is left out. Computed from the queries and keys of a forward."""
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    if not layers:
        raise UserError("this network has no attention of dit.py")
    found, N = [], (model.input_size // model.patch_size) ** 2

    def hook(layer: Attention, qkv: Tensor) -> None:
        B, tokens, _ = qkv.shape
        q, k, _ = qkv.reshape(B, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)
        found.append(weights[:, :N, :N])

    hooks = [layer.qkv.register_forward_hook(lambda _m, _in, out, layer=layer: hook(layer, out))
             for layer in layers]
    model(xt, torch.full_like(y, t), y)
    for handle in hooks:
        handle.remove()
    return found


def overlay(image: Tensor, query: int, weights: Tensor, cell: int = 126) -> Image.Image:
    """An image with the query patch outlined. Every patch is coloured by its share of the query's
    attention, weights (N,), in percent; 0 throughout: the image alone."""
    side, page = math.isqrt(len(weights)), picture(image, cell)
    p = cell / side                                             # of a patch, in pixels
    if weights.any():
        mask = (255 * (weights / 0.4).clamp(max=1)).to(torch.uint8).view(side, side).cpu()
        mask = Image.fromarray(mask.numpy()).resize(page.size, Image.Resampling.NEAREST)
        page = Image.composite(Image.new("RGB", page.size, (235, 100, 0)),
                               page.point(lambda value: value * 0.5), mask)
    draw = ImageDraw.Draw(page)
    x, y = query % side * p, query // side * p
    draw.rectangle((x, y, x + p - 1, y + p - 1), outline=(0, 220, 255), width=3)
    for i, percent in enumerate((100 * weights).round().int().tolist()):
        if percent > 0 and p > 24:                              # there is room for it
            draw.text(((i % side + 0.5) * p, (i // side + 0.5) * p), str(percent), "white",
                      font(12), anchor="mm", stroke_width=1, stroke_fill="black")
    return page


def attention(args: Namespace, device: torch.device) -> Image.Image:
    """xt with the patch of highest contrast outlined, and what it attends to in each block; a row
    for each image and t."""
    state, [(_, checkpoint)] = load_models([args.checkpoint], device)
    x0, y = load_pictures(args, state, device)
    xts = noised(checkpoint.diffusion, x0, args)
    found = [attention_weights(checkpoint.model, xt, t, y)      # for each t, for each block
             for t, xt in zip(args.times, xts, strict=True)]
    side = math.isqrt(found[0][0].shape[-1])
    query = patchify(x0, x0.shape[-1] // side).std(dim=-1).argmax(dim=1).tolist()
    rows = []
    for i, q in enumerate(query):
        for xt, blocks in zip(xts, found, strict=True):
            rows.append([overlay(xt[i], q, 0 * blocks[0][i, q])]
                        + [overlay(xt[i], q, weights[i, q]) for weights in blocks])
    heads = ["xt"] + [f"block {k}, %" for k in range(len(found[0]))]
    return sheet(rows, [f"t = {t}" for t in args.times] * len(x0), heads, [""] * len(heads),
                 len(xts))


# ---------------------------------------------------------------- curves (matplotlib)


def new_figure(**options):
    """A matplotlib Figure without a window. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("this figure needs matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained", **options)


@torch.no_grad()
def loss_by_time(m: Checkpoint, x0: Tensor, y: Tensor, args: Namespace, bar
                 ) -> tuple[list[float], list[float]]:
    """(the centres of --bins equal parts of 0..T-1, the mean `loss_in_eps` in each) over all
    images, each with its own timestep and noise in every bin."""
    edges = torch.linspace(0, m.diffusion.num_timesteps, args.bins + 1).round().long().tolist()
    means = []
    for low, high in zip(edges, edges[1:], strict=False):
        rng = generator("cpu", args.seed, "bin", low, high)
        t = torch.randint(low, high, (len(x0),), generator=rng).to(x0.device)
        eps, total = noise_like(x0, args.seed, "bin noise", low, high), 0.0
        for part in torch.arange(len(x0)).to(x0.device).split(args.batch_size):
            loss = m.diffusion.loss(m.model, x0[part], t[part], y[part], eps[part])
            total += m.diffusion.loss_in_eps(loss, t[part]).sum().item()
            bar.update(len(part))
        means.append(total / len(x0))
    return [(low + high - 1) / 2 for low, high in zip(edges, edges[1:], strict=False)], means


def error(args: Namespace, device: torch.device):
    """The mean error in eps against t, for each model, on images it was not trained on."""
    figure = new_figure(figsize=(7, 4))
    state, models = load_models(args.checkpoints, device)
    if args.bins > (total := models[0][1].diffusion.num_timesteps):
        raise UserError(f"--bins {args.bins}: there are {total} timesteps")
    x0, y = load_images(args, state, device)
    axes = figure.subplots()
    with tqdm(total=len(models) * args.bins * len(x0), desc="measuring", unit="image",
              dynamic_ncols=True) as bar:
        for name, m in models:
            centres, means = loss_by_time(m, x0, y, args, bar)
            mean = sum(means) / len(means)
            axes.semilogy(centres, means, marker=".", label=f"{name}: mean {mean:.4f}")
    axes.set(xlabel="t", ylabel="squared error in eps", title=f"{len(x0)} test images")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="prediction")
    return figure


# What makes two evaluations the same measurement, and how a legend names it.
SETTINGS = dict(source="{}", weights="{}", images="{:,} images", sampler="{}", steps="{} steps",
                guidance="guidance {:g}", seeds="seed {}", data="data {}")


def read_evaluations(files: list[Path]) -> list[dict]:
    """The evaluations of checkpoints in evaluations.jsonl files; the last of those with the same
    settings."""
    found = {}
    for file in files:
        try:
            with io_errors(f"{file} cannot be read"):
                lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{file} cannot be read: no text") from None
        for i, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                if isinstance(result, dict) and "cfg_scale" not in result:
                    continue                        # of an .npz or a folder
                point = point_of(result)
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError,
                    RecursionError):
                raise UserError(f"{file}, line {i} is no line of tools.evaluate") from None
            found[tuple(point[k] for k in SETTINGS)] = point
    if not found:
        raise UserError("no evaluation of a checkpoint in " + ", ".join(map(str, files)))
    return list(found.values())


def point_of(result: dict) -> dict:
    """What a figure needs of a line of evaluations.jsonl. Raises where it has another form."""
    rows, sampler = result["rows"], str(result["sampler"])
    if sampler == "ddim" and result["eta"]:
        sampler += f", eta {result['eta']:g}"
    if interval := result.get("guidance_interval"):
        sampler += ", guided in ({:g}, {:g}]".format(*interval)
    if result.get("autoguidance"):
        sampler += f", autoguidance by {result['autoguidance']}"
    return dict(source=str(result["images_from"]), weights=str(result["weights"]), sampler=sampler,
                steps=int(result["steps"]), guidance=float(result["cfg_scale"]),
                images=int(rows["samples"]["images"]), data=str(result["data_digest"]),
                seeds=", ".join(str(int(seed)) for seed in result["seeds"]),
                samples={m: float(rows["samples"]["mean"][m]) for m in METRICS},
                std={m: float((rows["samples"]["std"] or {}).get(m, 0)) for m in METRICS},
                test={m: float(rows["test"]["mean"][m]) for m in METRICS})


def series_against(x: str, points: list[dict]) -> dict[str, list[dict]]:
    """Label -> points that differ in `x` alone, in its order. Against steps, a sampler with one
    number of steps (ddpm) is a point beside those with several."""
    def settings(point: dict, without: set[str]) -> tuple:
        return tuple(point[k] for k in SETTINGS if k not in without)

    groups = {}
    for point in sorted(points, key=lambda p: p[x]):
        groups.setdefault(settings(point, {x}), []).append(point)
    beside = {"steps", "sampler"} if x == "steps" else {x}
    several = {settings(group[0], beside) for group in groups.values() if len(group) > 1}
    found = [group for group in groups.values() if settings(group[0], beside) in several]
    varied = [k for k in SETTINGS if k != x and len({group[0][k] for group in found}) > 1]
    return {", ".join(SETTINGS[k].format(group[0][k]) for k in varied or ["sampler"]): group
            for group in found}


def draw_metric(axes, series: dict[str, list[dict]], x: str, metric: str) -> None:
    """One metric against x, a line (or point) for each series; dashed, the test set's value."""
    for label, group in series.items():
        spread = [p["std"][metric] for p in group]
        axes.errorbar([p[x] for p in group], [p["samples"][metric] for p in group],
                      spread if any(spread) else None, marker="o", ms=4, capsize=2, label=label)
    charts.metric_axis(axes, metric, [p for group in series.values() for p in group])
    axes.set_xlabel(x)
    if x == "steps":
        axes.set_xscale("log")
        ticks = sorted({p[x] for group in series.values() for p in group})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xticks([], minor=True)


def sweep(args: Namespace, device: torch.device):
    """A row of panels for each of --against for which there are at least two values."""
    points = read_evaluations(args.files)
    series = {x: found for x in args.against if (found := series_against(x, points))}
    if not series:
        raise UserError(f"no two evaluations differ in {' or '.join(args.against)} alone")
    figure = new_figure(figsize=(13, 3.3 * len(series) + 0.4))
    grid = figure.subplots(len(series), len(METRICS), squeeze=False)
    for (x, found), panels in zip(series.items(), grid, strict=True):
        for metric, axes in zip(METRICS, panels, strict=True):
            draw_metric(axes, found, x, metric)
        panels[0].legend(fontsize=8)
    images = {p["images"] for found in series.values() for group in found.values() for p in group}
    figure.suptitle(" or ".join(f"{n:,}" for n in sorted(images)) + " samples")
    return figure


def accuracy(args: Namespace, device: torch.device):
    """Frechet distance and recall against accuracy, a curve for each name."""
    runs = [(name, file, read_evaluations([file])) for name, file in map(charts.run_name,
                                                                         args.runs)]
    figure = new_figure(figsize=(10, 4.2))
    charts.quality(figure, runs, args.images)
    return figure


def densities(args: Namespace, device: torch.device):
    """The density of the noise levels in training: this project's and published ones."""
    figure = new_figure(figsize=(10, 4.2))
    charts.densities(figure)
    return figure


# ---------------------------------------------------------------- training runs


def find_run(folder: Path | None, file: str) -> Path:
    """A run folder: the named one, else the newest under output/. Raises UserError where it does
    not hold what the pattern `file` names."""
    folder = newest_run(paths.OUTPUT) if folder is None else folder
    if folder is None:
        raise UserError(f"no run under {paths.short(paths.OUTPUT)} yet: name a run folder")
    if not any(folder.glob(file)):
        raise UserError(f"{folder} has no {file}: name the folder of a training run")
    return folder


def loss(args: Namespace, device: torch.device):
    """The losses of runs against the step, and below them in each quarter of t. Beside a run of
    the CPU preset, the expected curve."""
    figure = new_figure(figsize=(10, 7))
    folders = [find_run(folder, "metrics.jsonl") for folder in args.runs or [None]]
    names = [folder.resolve().name for folder in folders]
    for folder in folders:
        if not read_metrics(folder / "metrics.jsonl"):
            raise UserError(f"{folder / 'metrics.jsonl'} holds no step yet")
    draw_losses(figure, folders, [name if names.count(name) == 1 else str(folder)
                                  for name, folder in zip(names, folders, strict=True)])
    return figure


def training(args: Namespace, device: torch.device) -> bytes:
    """The previews of a run, which share their noise, as an animation with the step above each."""
    folder, frames = find_run(args.run, "samples/step_[0-9]*.png"), []
    for path in sorted(folder.glob("samples/step_[0-9]*.png")):
        with io_errors(f"{path} cannot be read"), Image.open(path) as picture:
            frames.append(titled(picture.convert("RGB"), "step " + path.stem[5:].lstrip("0")))
    return animation(frames, milliseconds=500)


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args, unknown = parser().parse_known_args(argv)
    if unknown:                             # reported by the subcommand, which knows its flags
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    suffix = ".gif" if args.draw is training else ".png"
    check_target(args.out or next_free(paths.OUTPUT, args.figure, suffix), args.force, suffix)
    figure = args.draw(args, distributed.pick_device(getattr(args, "device", "cpu")))
    target = args.out or next_free(paths.OUTPUT, args.figure, suffix)   # free at this time
    with io_errors(f"{target} cannot be written"):
        if isinstance(figure, bytes):
            atomic_write(target, lambda file: file.write(figure))
        elif isinstance(figure, Image.Image):
            atomic_write(target, lambda file: figure.save(file, format="png"))
        else:
            atomic_write(target, lambda file: figure.savefig(file, format="png", dpi=140))
    say(f"written: {paths.short(target)}")
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    figures = p.add_subparsers(dest="figure", required=True, metavar="FIGURE")

    def add(draw, text: str, models: str | None = None, images: int = 0, times=()) -> Parser:
        sub = figures.add_parser(draw.__name__, help=text, description=text)
        sub.set_defaults(parser=sub, draw=draw, image_size=None)
        if models:
            sub.add_argument(models, nargs="+" if models == "checkpoints" else "?", metavar="CKPT",
                             help="a checkpoint or a run folder")
        if images:
            sub.add_argument("--dataset", help="mnist, fashion_mnist, cifar10, celeba, glyphs or "
                             "folder:PATH (default: the checkpoint's, else mnist)")
            sub.add_argument("--data-dir", metavar="DIR", help="where the data set is, or is "
                             "downloaded to (default: the checkpoint's if it exists, else data/)")
            sub.add_argument("--images", type=COUNT, default=images, metavar="N",
                             help=f"how many images of the test set (default: {images})")
        if times:
            sub.add_argument("--times", type=number(int, 0), nargs="+", default=times, metavar="T",
                             help=f"timesteps (default: {' '.join(map(str, times))})")
        if draw not in (sweep, accuracy, densities, loss, training):
            sub.add_argument("--seed", type=SEED, default=0, help="seed of the images and of the "
                             "noise (default: 0)")
            sub.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
        suffix = ".gif" if draw is training else ".png"
        sub.add_argument("--out", type=Path, metavar=f"FILE{suffix}", help="the figure (default: a "
                         "new numbered file under output/)")
        sub.add_argument("--force", action="store_true", help="overwrite an existing file")
        return sub

    add(forward, "images at several t, from x0 to noise", images=1, times=FORWARD_TIMES)
    add(x0hat, "xt, and the x0_hat of each checkpoint, at several t", "checkpoints", 2, X0HAT_TIMES)
    add(attention, "what one patch attends to in each block", "checkpoint", 2, ATTENTION_TIMES)
    sub = add(guidance, "the same noise at several guidance scales", "checkpoint")
    sub.add_argument("--cfg-scale", type=SCALE, nargs="+", default=[0, 1, 2, 4], metavar="S",
                     help="guidance scales (default: 0 1 2 4)")
    sub.add_argument("--steps", type=COUNT, help="sampling steps (default: the checkpoint's)")
    sub = add(error, "mean squared error in eps against t", "checkpoints", 500)
    sub.add_argument("--bins", type=COUNT, default=20, help="equal parts of the timesteps "
                     "(default: 20)")
    sub.add_argument("--batch-size", type=BATCH, default=250, help="images at a time "
                     "(default: 250)")
    sub = add(sweep, "the results of tools.evaluate against guidance and steps")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl",
                     help="evaluations.jsonl of one or more runs")
    sub.add_argument("--against", nargs="+", choices=("guidance", "steps"),
                     default=["guidance", "steps"], help="what to draw (default: both, as far as "
                     "there are results)")
    sub = add(accuracy, "Frechet distance and recall against accuracy, as guidance varies")
    sub.add_argument("runs", nargs="+", metavar="NAME=FILE.jsonl", help="evaluations.jsonl of a "
                     "run and the name of its curve (default: the run's prediction); runs of one "
                     "name are seeds of it")
    sub.add_argument("--images", type=COUNT, metavar="N", help="use evaluations of N images "
                     "(default: the number that most have)")
    add(densities, "the density of the noise levels in training: ours and published ones")
    sub = add(loss, "loss against the step, in all and in each quarter of t")
    sub.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: the "
                     "newest under output/)")
    sub = add(training, "the previews of a run as a GIF, with the step on each")
    sub.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run folder (default: the "
                     "newest under output/)")
    return p


if __name__ == "__main__":
    run_command(main)
