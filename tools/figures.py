"""The figures of README.md, for any data set, checkpoint or sweep.

    python figures.py forward                       a digit turning into noise
    python figures.py x0hat CKPT_EPS CKPT_V         what each model takes the clean image to be
    python figures.py block                         the adaLN-Zero block of dit.py, drawn
    python figures.py loss CKPT...                  error in eps against t
    python figures.py sweep FILE.jsonl...           what evaluate.py found: quality against guidance
                                                    and steps

Each writes a PNG: --out FILE.png, or a new numbered one under output/. `forward` and `x0hat` need
Pillow alone, the others matplotlib too. Not needed to understand DiT.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import checkpoints
import evaluate
from cli import BATCH, SEED, Parser, UserError, check_target, cli, generator, number, printable
from data import save_picture, to_uint8
from diffusion import GaussianDiffusion
from dit import DiT
from ranks import Ranks, pick_device
from runs import atomic_write
from sample import OUTPUT, find_checkpoint, next_free
from train_mnist import DIFFUSION

FORWARD_TIMES = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
X0HAT_TIMES = [999, 950, 900, 800, 600, 400, 200, 50]
METRICS = {"accuracy": "accuracy", "frechet": "Frechet distance", "precision": "precision",
           "recall": "recall"}

# ---------------------------------------------------------------- images, noised


def images_of(a: argparse.Namespace, state: dict | None, device: torch.device
              ) -> tuple[Tensor, Tensor]:
    """--images images of the test set, the classes in turn, in an order that --seed decides: x0
    float32 (N, C, H, H) in [-1, 1] and y int64 (N,), on `device`."""
    sets, _data_dir = evaluate.load_data(a, state)
    if state is not None:
        evaluate.check_data(state, sets["train"], Ranks(device).warn)
    test = sets["test"]
    if a.images > len(test.images):
        raise UserError(f"--images {a.images}: the test set of {printable(test.name)} has "
                        f"{len(test.images)}")
    order = torch.randperm(len(test.images), generator=generator("cpu", a.seed, "figure"))
    turn = torch.zeros(len(order))                  # how many of its class come before it
    for label in test.labels.unique():
        of_class = test.labels[order] == label
        turn[of_class] = torch.arange(int(of_class.sum()), dtype=turn.dtype)
    return test.batch(order[turn.argsort(stable=True)][: a.images], device)


def noise_like(x0: Tensor, *key) -> Tensor:
    """Standard normal noise that `key` decides, the same on every device: (N, C, H, H)."""
    return torch.randn(x0.shape, generator=generator("cpu", *key)).to(x0.device)


def noised(diffusion: GaussianDiffusion, x0: Tensor, times: list[int], seed: int) -> list[Tensor]:
    """xt (N, C, H, H) for each of `times`; an image has the same noise at all of them."""
    eps = noise_like(x0, seed, "eps")
    return [diffusion.q_sample(x0, torch.full((len(x0),), t, device=x0.device), eps)
            for t in times]


def sheet(rows: list[Tensor], names: list[str], heads: list[str], feet: list[str], group: int
          ) -> Image.Image:
    """Rows of images, float (M, C, H, H) in [-1, 1] (clipped), a name left of each; above each
    column a head, below it a foot of one line or more; a wider gap after every `group` rows."""
    side = rows[0].shape[-1]
    zoom = max(1, 84 // side)
    cell, gap, font = max(84, side * zoom), 4, ImageFont.load_default(size=14)
    left = 12 + max(int(font.getlength(name)) for name in names)
    top, below = 28, 8 + 18 * max(foot.count("\n") + 1 for foot in feet)
    bottom = top + len(rows) * (cell + gap) + (len(rows) - 1) // group * 3 * gap
    picture = Image.new("RGB", (left + len(heads) * (cell + gap), bottom + below), "white")
    draw = ImageDraw.Draw(picture)
    for column, words in enumerate(zip(heads, feet, strict=True)):
        for y, text in zip((top / 2, bottom + below / 2), words, strict=True):
            draw.multiline_text((left + column * (cell + gap) + cell / 2, y), text, "black", font,
                                anchor="mm", align="center")
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + r * (cell + gap) + r // group * 3 * gap
        draw.text((left - 8, y + cell / 2), name, "black", font, anchor="rm")
        for column, image in enumerate(to_uint8(row).cpu()):
            pixels = Image.fromarray(image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy())
            pixels = pixels.resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(pixels, (left + column * (cell + gap), y))
    return picture


def forward(a: argparse.Namespace, device: torch.device) -> Callable[[Path], None]:
    """x0 and its xt at each of --times, alpha_bar below them: DDPM eq. 4."""
    diffusion = GaussianDiffusion(**DIFFUSION).to(device)
    check_times(a.times, diffusion)
    x0, _y = images_of(a, None, device)
    columns = [x0, *noised(diffusion, x0, a.times, a.seed)]
    heads = ["x0"] + [f"t = {t}" for t in a.times]
    feet = [""] + [f"alpha_bar\n{digits(diffusion.alpha_bar[t])}" for t in a.times]
    rows = list(torch.stack(columns, dim=1))                    # one (columns, C, H, H) per image
    return lambda path: save_picture(path, sheet(rows, [""] * len(rows), heads, feet, 1))


def digits(x: Tensor) -> str:
    """A number between 0 and 1 in few digits: 0.99990, 0.895, 0.00004."""
    x = x.item()
    return f"{x:.5f}" if x < 0.001 or x > 0.999 else f"{x:.3f}"


def check_times(times: list[int], diffusion: GaussianDiffusion) -> None:
    if max(times) >= diffusion.num_timesteps:
        raise UserError(f"--times {max(times)}: t goes from 0 to {diffusion.num_timesteps - 1}")


# ---------------------------------------------------------------- what models see


@dataclass
class Model:
    """A checkpoint, ready: `name` is its prediction, and its run's folder where two have one."""

    state: dict
    model: DiT
    diffusion: GaussianDiffusion
    name: str


def models_of(names: list[str], device: torch.device) -> list[Model]:
    """The models of checkpoints or run folders; UserError where they cannot be compared."""
    paths = [find_checkpoint(name) for name in names]
    states = [checkpoints.load(path) for path in paths]
    predictions = [state["config"]["prediction"] for state in states]
    models = []
    for path, state in zip(paths, states, strict=True):
        name = state["config"]["prediction"]
        if predictions.count(name) > 1:
            name += f", {printable(path.resolve().parent.name)}/{path.stem}"
        models.append(Model(state, *checkpoints.build(state, "ema", device), name))
    first = states[0]["config"]
    for path, state in zip(paths, states, strict=True):
        for key, part in [("input_size", "model"), ("in_channels", "model"),
                          ("num_classes", "model"), ("diffusion", None)]:
            here, there = (c[part][key] if part else c[key] for c in (state["config"], first))
            if here != there:
                raise UserError(f"{printable(path)} has {key} {here}, and {printable(paths[0])} "
                                f"{there}: they cannot share a figure")
    return models


@torch.no_grad()
def x0hat(a: argparse.Namespace, device: torch.device) -> Callable[[Path], None]:
    """xt at each of --times, and below it the x0_hat of each model, not guided, not clipped: at
    t = 999 an error of the output is divided by 0.006 for eps, and multiplied by 1 for v."""
    models = models_of(a.checkpoints, device)
    check_times(a.times, models[0].diffusion)
    x0, y = images_of(a, models[0].state, device)
    xts = noised(models[0].diffusion, x0, a.times, a.seed)
    blocks = [torch.stack([*xts, x0], dim=1)]                   # each (N, columns, C, H, H)
    for m in models:
        found = [m.diffusion.estimate(m.model, xt, t, y, 1.0, clip=False)[0]
                 for t, xt in zip(a.times, xts, strict=True)]
        blocks.append(torch.stack(found, dim=1))
        errors = [float((x - x0).square().mean().sqrt()) for x in found]
        print(f"{m.name}: RMS error of x0_hat " + ", ".join(
            f"{e:.3g} (t={t})" for t, e in zip(a.times, errors, strict=True)))
    names = ["xt"] + [f"x0_hat ({m.name})" for m in models]
    share = models[0].diffusion.alpha_bar.sqrt()
    heads = [f"t = {t}" for t in a.times] + ["x0"]
    feet = [f"sqrt of\nalpha_bar\n{share[t]:.3f}" for t in a.times] + [""]
    rows = [block[i] for i in range(len(x0)) for block in blocks]
    return lambda path: save_picture(
        path, sheet(rows, names * len(x0), heads, feet, len(blocks)))


@torch.no_grad()
def loss_by_time(m: Model, x0: Tensor, y: Tensor, a: argparse.Namespace, bar
                 ) -> tuple[list[float], list[float]]:
    """(the middles of --bins equal parts of 0..T-1, the mean `loss_in_eps` in each), over all
    images, each with a timestep and noise of its own in every bin."""
    edges = torch.linspace(0, m.diffusion.num_timesteps, a.bins + 1).round().long().tolist()
    middles, means = [], []
    for low, high in zip(edges, edges[1:], strict=False):
        rng = generator("cpu", a.seed, "bin", low, high)
        t = torch.randint(low, high, (len(x0),), generator=rng).to(x0.device)
        eps, total = noise_like(x0, a.seed, "bin noise", low, high), 0.0
        for part in torch.arange(len(x0)).to(x0.device).split(a.batch_size):
            loss = m.diffusion.loss(m.model, x0[part], t[part], y[part], eps[part])
            total += m.diffusion.loss_in_eps(loss, t[part]).sum().item()
            bar.update(len(part))
        middles.append((low + high - 1) / 2)
        means.append(total / len(x0))
    return middles, means


def loss(a: argparse.Namespace, device: torch.device) -> Callable[[Path], None]:
    """The mean error in eps against t, for each model, on images it was not trained on."""
    figure = new_figure(figsize=(7, 4))
    models = models_of(a.checkpoints, device)
    if a.bins > models[0].diffusion.num_timesteps:
        raise UserError(f"--bins {a.bins}: there are {models[0].diffusion.num_timesteps} timesteps")
    x0, y = images_of(a, models[0].state, device)
    axes = figure.subplots()
    with tqdm(total=len(models) * a.bins * len(x0), desc="measuring", unit="image",
              dynamic_ncols=True) as bar:
        for m in models:
            middles, means = loss_by_time(m, x0, y, a, bar)
            mean = sum(means) / len(means)
            axes.semilogy(middles, means, marker=".", label=f"{m.name}: mean {mean:.4f}")
    axes.set(xlabel="t", ylabel="squared error in eps", title=f"{len(x0)} test images")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="predicts")
    return lambda path: save_figure(path, figure)


# ---------------------------------------------------------------- matplotlib


def new_figure(**options):
    """A matplotlib Figure without a window; UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("this figure needs matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained", **options)


def save_figure(path: Path, figure) -> None:
    """Write a PNG, whole or not at all. Raises OSError."""
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=140))


# ---------------------------------------------------------------- the block, drawn

BLUE, GREEN, ORANGE, GREY = "#dbe9f9", "#dff2df", "#fde8cf", "#f1f1f1"
# From top to bottom: (y, text, colour). One of two residual branches; both have the same form.
BRANCH = [(0.0, "LayerNorm", GREY), (-0.9, "× (1 + scale) + shift", ORANGE), (-1.8, "", BLUE),
          (-2.7, "× gate", ORANGE)]


def draw_box(axes, x: float, y: float, text: str, colour: str, width: float = 2.6,
             height: float = 0.56, **options) -> None:
    """A rounded box around (x, y), its text in the middle."""
    from matplotlib.patches import FancyBboxPatch
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, fc=colour,
                                  ec="#444444", lw=1, boxstyle="round,pad=0,rounding_size=0.08"))
    axes.text(x, y, text, ha="center", va="center", fontsize=10.5, **options)


def draw_arrow(axes, *points: tuple[float, float], **options) -> None:
    """A line through the points, with a head at the last."""
    *_, before, last = points
    axes.plot(*zip(*points[:-1], strict=True), color="#444444", lw=1.1, solid_capstyle="butt")
    axes.annotate("", last, before, arrowprops=dict(arrowstyle="-|>", color="#444444", lw=1.1,
                                                    shrinkA=0, shrinkB=0), **options)


def draw_branch(axes, top: float, name: str, suffix: str, out: float) -> None:
    """LayerNorm -> scale, shift -> `name` -> gate -> plus, from height `top` down to the plus,
    and the way past it. Arrows from the six vectors come from the right, at x = `out`."""
    for y, text, colour in BRANCH:
        draw_box(axes, 0, top + y, text or name, colour)
        draw_arrow(axes, (0, top + y + 0.62), (0, top + y + 0.28))
    plus = top - 3.55
    draw_arrow(axes, (0, top - 2.98), (0, plus + 0.2))
    draw_box(axes, 0, plus, "+", "white", width=0.4, height=0.4, weight="bold")
    draw_arrow(axes, (0, top + 0.62), (-1.9, top + 0.62), (-1.9, plus), (-0.2, plus))
    for y, text in [(top - 0.9, f"scale_{suffix}, shift_{suffix}"), (top - 2.7, f"gate_{suffix}")]:
        draw_arrow(axes, (out, y), (1.3, y))
        axes.text((out + 1.3) / 2, y + 0.1, text, ha="center", va="bottom", fontsize=9.5,
                  family="monospace")


def block(a: argparse.Namespace, device: torch.device) -> Callable[[Path], None]:
    """The block of dit.py: DiT figure 3, "DiT block with adaLN-Zero", in the names of the code."""
    figure = new_figure(figsize=(8, 8.2))
    axes = figure.subplots()
    axes.set(xlim=(-2.4, 6.9), ylim=(-9.15, 1.65), aspect="equal")
    axes.axis("off")
    out = 4.3                                       # the left side of the Linear
    axes.text(0, 1.3, "tokens x  (B, N, D)", ha="center", va="center", fontsize=11)
    axes.plot((0, 0), (1.08, 0.62), color="#444444", lw=1.1)
    draw_branch(axes, 0, "Attention", "attn", out)
    axes.plot((0, 0), (-3.75, -4.1), color="#444444", lw=1.1)
    draw_branch(axes, -4.72, "MLP", "mlp", out)
    draw_arrow(axes, (0, -8.47), (0, -8.8))
    axes.text(0, -9.0, "tokens x  (B, N, D)", ha="center", va="center", fontsize=11)

    middle = out + 1.1
    axes.text(middle, 1.3, "condition c  (B, D)\nof timestep and class", ha="center", va="center",
              fontsize=11)
    draw_arrow(axes, (middle, 0.95), (middle, 0.48))
    draw_box(axes, middle, 0.2, "SiLU", GREEN, width=2.2)
    draw_arrow(axes, (middle, -0.08), (middle, -0.5))
    draw_box(axes, middle, -4.16, "Linear\nD → 6 D\n\nzero-initialised:\nall six vectors\n"
             "start at 0,\nso both gates\nare shut and\na fresh block\nis the identity", GREEN,
             width=2.2, height=7.3, linespacing=1.4)
    return lambda path: save_figure(path, figure)


# ---------------------------------------------------------------- what evaluate.py found


def read_evaluations(files: list[Path]) -> list[dict]:
    """The lines of evaluations.jsonl files that are about samples of a checkpoint; where two were
    made in the same way, the last."""
    found = {}
    for file in files:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{printable(file)} cannot be read: "
                            f"{getattr(error, 'strerror', None) or 'no text'}") from None
        for i, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                if isinstance(result, dict) and "cfg_scale" not in result:
                    continue                        # of an .npz or a folder
                row = point_of(result)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{printable(file)}, line {i} is no line of evaluate.py") from None
            found[tuple(v for k, v in row.items() if k not in ("samples", "std", "test"))] = row
    if not found:
        raise UserError("no evaluation of a checkpoint in " + ", ".join(map(printable, files)))
    return list(found.values())


def point_of(result: dict) -> dict:
    """What a figure needs of a line of evaluations.jsonl. Raises where it is not of its form."""
    rows = result["rows"]
    eta = result["eta"] if result["sampler"] == "ddim" else 1.0
    sampler = result["sampler"] + (f", eta {eta:g}" if result["sampler"] == "ddim" and eta else "")
    return dict(source=printable(result["images_from"]), weights=str(result["weights"]),
                sampler=printable(sampler), steps=int(result["steps"]),
                guidance=float(result["cfg_scale"]), images=int(rows["samples"]["images"]),
                seeds=", ".join(str(int(seed)) for seed in result["seeds"]),
                data=printable(result["data_digest"]),
                samples={m: float(rows["samples"]["mean"][m]) for m in METRICS},
                std={m: float((rows["samples"]["std"] or {}).get(m, 0)) for m in METRICS},
                test={m: float(rows["test"]["mean"][m]) for m in METRICS})


def series_against(points: list[dict], x: str) -> dict[str, list[dict]]:
    """Label -> points that differ in `x` alone, in its order. Against steps a sampler that has one
    number of steps (ddpm) stands as a point beside those with several."""
    keys = [k for k in ("source", "weights", "images", "sampler", "steps", "guidance", "seeds",
                        "data") if k != x]
    groups = {}
    for p in sorted(points, key=lambda p: p[x]):
        groups.setdefault(tuple(p[k] for k in keys), []).append(p)
    place = keys.index("sampler")
    beside = lambda key: key[:place] + key[place + 1:] if x == "steps" else key     # noqa: E731
    several = {beside(key) for key, group in groups.items() if len(group) > 1}
    groups = {key: group for key, group in groups.items() if beside(key) in several}
    varied = [i for i in range(len(keys)) if len({key[i] for key in groups}) > 1]
    told = {"steps": "{} steps", "guidance": "guidance {:g}", "images": "{:,} images",
            "seeds": "seed {}", "data": "data {}"}
    return {", ".join(told.get(keys[i], "{}").format(key[i]) for i in varied or [place]): group
            for key, group in groups.items()}


def draw_metric(axes, series: dict[str, list[dict]], x: str, metric: str) -> None:
    """One metric against x, a line (or point) for each series; dashed, what the test set gets."""
    for label, group in series.items():
        spread = [p["std"][metric] for p in group]
        axes.errorbar([p[x] for p in group], [p["samples"][metric] for p in group],
                      spread if any(spread) else None, marker="o", ms=4, capsize=2, label=label)
    tests = {p["test"][metric] for group in series.values() for p in group}
    for i, value in enumerate(sorted(tests)):
        axes.axhline(value, color="black", ls="--", lw=0.9, label=None if i else "real: test set")
    axes.set(xlabel=x, ylabel=METRICS[metric])
    drawn = [p["samples"][metric] for group in series.values() for p in group] + list(tests)
    if metric == "frechet" and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axes.set_yscale("log")
    elif metric == "frechet":
        axes.set_ylim(0, 1.1 * max(drawn))
    else:                                           # shares; not the rounding of equal ones
        axes.set_ylim(min(drawn) - 0.03, min(max(drawn) + 0.03, 1.005))
    if x == "steps":
        axes.set_xscale("log")
        ticks = sorted({p[x] for group in series.values() for p in group})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.3)


def sweep(a: argparse.Namespace, device: torch.device) -> Callable[[Path], None]:
    """A row of panels for each of --against for which there are at least two values."""
    points = read_evaluations(a.files)
    wanted = {x: series_against(points, x) for x in a.against}
    empty = [x for x, series in wanted.items() if not series]
    if empty and (len(empty) == len(wanted) or len(a.against) == 1):
        raise UserError(f"there are no two evaluations that differ in {' or '.join(empty)} alone")
    rows = [(x, series) for x, series in wanted.items() if series]
    figure = new_figure(figsize=(13, 3.3 * len(rows) + 0.4))
    grid = figure.subplots(len(rows), len(METRICS), squeeze=False)
    for (x, series), panels in zip(rows, grid, strict=True):
        for metric, axes in zip(METRICS, panels, strict=True):
            draw_metric(axes, series, x, metric)
        panels[0].legend(fontsize=8)
    images = sorted({p["images"] for _, series in rows for group in series.values()
                     for p in group})
    figure.suptitle(" or ".join(f"{n:,}" for n in images) + " samples")
    return lambda path: save_figure(path, figure)


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    a, unknown = parser().parse_known_args(argv)
    if unknown:                                     # told by the subcommand, which knows its flags
        a.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    target = a.out or next_free(OUTPUT, a.figure, ".png")
    check_target(target, a.force, ".png")
    draw = {"forward": forward, "x0hat": x0hat, "block": block, "loss": loss, "sweep": sweep}
    write = draw[a.figure](a, pick_device(getattr(a, "device", "cpu")))
    target = a.out or next_free(OUTPUT, a.figure, ".png")   # another call may have taken the number
    try:
        write(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    print(f"written: {target}")
    return 0


def add_data_flags(p: Parser, images: int, default: str) -> None:
    g = p.add_argument_group("the images, of the test set")
    g.add_argument("--dataset", help="mnist, fashion_mnist, cifar10, glyphs or folder:PATH "
                   f"(default: {default})")
    g.add_argument("--data-dir", metavar="DIR", help="where the data set is, or is downloaded to "
                   "(default: the checkpoint's if it is there, else data)")
    g.add_argument("--images", type=number(int, 1), default=images, metavar="N",
                   help=f"how many (default: {images})")
    g.add_argument("--seed", type=SEED, default=0, help="of their choice and of the "
                   "noise (default: 0)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")


def add_times(p: Parser, times: list[int]) -> None:
    p.add_argument("--times", type=number(int, 0), nargs="+", default=times, metavar="T",
                   help=f"timesteps (default: {' '.join(map(str, times))})")


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    figures = p.add_subparsers(dest="figure", required=True, metavar="FIGURE")

    def add(name: str, text: str) -> Parser:
        sub = figures.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--out", type=Path, metavar="FILE.png", help="the figure (default: a new "
                         "numbered one under output/)")
        sub.add_argument("--force", action="store_true", help="overwrite an existing file")
        sub.set_defaults(parser=sub, image_size=None)
        return sub

    sub = add("forward", "images at several t, from x0 to noise")
    add_data_flags(sub, 1, "mnist")
    add_times(sub, FORWARD_TIMES)
    sub = add("x0hat", "xt, and the x0_hat of each checkpoint, at several t")
    sub.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints, or runs' folders")
    add_data_flags(sub, 2, "the first checkpoint's")
    add_times(sub, X0HAT_TIMES)
    add("block", "a drawing of the adaLN-Zero block")
    sub = add("loss", "mean squared error in eps against t")
    sub.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints, or runs' folders")
    add_data_flags(sub, 500, "the first checkpoint's")
    sub.add_argument("--bins", type=number(int, 1), default=20, help="equal parts of the timesteps "
                     "(default: 20)")
    sub.add_argument("--batch-size", type=BATCH, default=250,
                     help="images at a time (default: 250)")
    sub = add("sweep", "evaluate.py's results against guidance and steps")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl",
                     help="evaluations.jsonl of one or more runs")
    sub.add_argument("--against", nargs="+", choices=("guidance", "steps"),
                     default=["guidance", "steps"], help="what to draw (default: both, as far as "
                     "there are results)")
    return p


if __name__ == "__main__":
    cli(main)
