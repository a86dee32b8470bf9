"""Two figures of tools.figures: sample quality against accuracy; the densities of noise levels."""

import json
from collections import Counter
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import torch

from diffusion import GaussianDiffusion
from support.cli import UserError, say
from support.folders import CONFIG
from train_mnist import DIFFUSION, RECIPE

METRICS = {"accuracy": "accuracy", "frechet": "Frechet distance", "precision": "precision",
           "recall": "recall"}
# Told apart by colour-blind readers (Okabe & Ito), and by marker or line style
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A5A5A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
ENOUGH = 0.995                  # an accuracy at which the distances of runs are compared
ERRORS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 5e-4, 2e-4, 1e-4)   # ticks
# Mean and standard deviation of ln(sigma / alpha) in training. JiT's t is 1 where the image is
# clean, so that logit(t) = ln(alpha / sigma), of mean -0.8; EDM2 has alpha = 1 and gives ln(sigma).
PUBLISHED = {"SD3": (0.0, 1.0),         # arXiv 2403.03206
             "JiT": (0.8, 0.8),         # arXiv 2511.13720
             "EDM2": (-0.4, 1.0)}       # arXiv 2312.02696

# ---------------------------------------------------------------- quality against accuracy


def run_name(text: str) -> tuple[str, Path]:
    """NAME=FILE as (name, file); of a FILE alone the name is the run's prediction, or else the
    name of its folder."""
    name, equals, file = text.partition("=")
    if equals and not Path(text).exists():
        return name, Path(file)
    try:
        config = json.loads(Path(text).with_name(CONFIG).read_text())
        return str(config["recipe"]["prediction"]), Path(text)
    except (OSError, ValueError, KeyError, TypeError):
        return Path(text).resolve().parent.name, Path(text)


def guidance_curve(points: list[dict], images: int) -> list[dict]:
    """The evaluations that differ in guidance alone, in its order: of several such series, the one
    with the most guidances."""
    series: dict = {}
    for point in points:
        if point["images"] == images:
            settings = tuple(point[k] for k in ("source", "weights", "sampler", "steps", "seeds",
                                                "data"))
            series.setdefault(settings, []).append(point)
    found = max(reversed(series.values()), key=len, default=[])
    return sorted(found, key=lambda p: p["guidance"])


def quality(figure, runs: list[tuple[str, Path, list[dict]]], images: int | None) -> None:
    """Frechet distance and recall against accuracy, which guidance varies: a curve for each name,
    the mean of its runs, each of which is a thin line. runs: (name, file, its evaluations).
    Says for each run the smallest distance with at least ENOUGH right."""
    images = images or Counter(p["images"] for *_, ps in runs for p in ps).most_common(1)[0][0]
    groups: dict[str, list[list[dict]]] = {}
    for name, file, points in runs:
        curve = guidance_curve(points, images)
        if not curve:
            raise UserError(f"{file} has no evaluation of {images:,} images")
        groups.setdefault(name, []).append(curve)
        say(f"{name} ({file}): {in_words(best(curve))}")
    points = [point for curves in groups.values() for curve in curves for point in curve]
    for name, curves in groups.items():
        found = [b["samples"]["frechet"] for b in map(best, curves) if b]
        if len(found) == len(curves) > 1:
            say(f"{name}: Frechet distance {fmean(found):.2f} ± {stdev(found):.2f} over "
                f"{len(found)} runs")
    test = points[0]["test"]
    say(f"real, test set: Frechet distance {test['frechet']:.2f}, recall {test['recall']:.3f}; "
        f"{images:,} images each")
    for metric, axes in zip(("frechet", "recall"), figure.subplots(1, 2), strict=True):
        axes.set_prop_cycle(color=COLOURS, marker=MARKERS)
        axes.margins(y=0.1)
        means = {name: fmean(p["samples"][metric] for c in curves for p in c)
                 for name, curves in groups.items()}
        for name, curves in groups.items():
            label = name + f" ({len(curves)} runs)" * (len(curves) > 1)
            draw_runs(axes, label, curves, metric, images, below=means[name] == min(means.values()))
        metric_axis(axes, metric, points)
        axes.axvline(1 - ENOUGH, color="black", ls=":", lw=0.9)
        accuracy_axis(axes, points, images)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(groups) + 1)


def draw_runs(axes, label: str, curves: list[list[dict]], metric: str, images: int, below: bool
              ) -> None:
    """The mean of runs with its guidances above or below it; thin, each run where it has several.
    """
    def places(curve: list[dict]) -> tuple[list[float], list[float]]:
        return ([error(p["samples"]["accuracy"], images) for p in curve],
                [p["samples"][metric] for p in curve])

    mean = mean_curve(curves)
    line, = axes.plot(*places(mean), lw=2, ms=5, label=label)
    style = dict(color=line.get_color(), fontsize=9, textcoords="offset points",
                 bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.3), zorder=1.5,
                 **(dict(xytext=(-4, -12), ha="right") if below else dict(xytext=(4, 5))))
    for point, x, y in zip(mean, *places(mean), strict=True):
        axes.annotate(f"{point['guidance']:g}", (x, y), **style)
    for curve in curves if curves[1:] else ():
        axes.plot(*places(curve), lw=0.7, marker="", zorder=1, color=line.get_color())


def metric_axis(axes, metric: str, points: list[dict]) -> None:
    """The y axis of a metric, logarithmic for a distance, with a grid; dashed, the test set's
    value."""
    tests = sorted({p["test"][metric] for p in points})
    for i, value in enumerate(tests):
        axes.axhline(value, color="black", ls="--", lw=0.9, label=None if i else "real: test set")
    axes.set_ylabel(METRICS[metric])
    if metric == "frechet":
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    else:                                           # shares: differences below 0.03 look small
        drawn = tests + [p["samples"][metric] for p in points]
        axes.set_ylim(min(drawn) - 0.03, min(max(drawn) + 0.03, 1.005))
    axes.grid(alpha=0.3, which="both")


def best(curve: list[dict]) -> dict | None:
    right = [p for p in curve if p["samples"]["accuracy"] >= ENOUGH]
    return min(right, key=lambda p: p["samples"]["frechet"], default=None)


def in_words(point: dict | None) -> str:
    if point is None:
        return f"no guidance with {ENOUGH:.1%} right"
    x = point["samples"]
    return (f"Frechet distance {x['frechet']:.2f} at guidance {point['guidance']:g}, "
            f"{x['accuracy']:.2%} right, recall {x['recall']:.3f}")


def mean_curve(curves: list[list[dict]]) -> list[dict]:
    """The mean of runs at each guidance that all of them have."""
    by_guidance = [{p["guidance"]: p["samples"] for p in curve} for curve in curves]
    common = sorted(set.intersection(*map(set, by_guidance)))
    return [dict(guidance=g, samples={k: fmean(run[g][k] for run in by_guidance)
                                      for k in by_guidance[0][g]}) for g in common]


def error(accuracy: float, images: int) -> float:
    """The share of wrong samples; where none is, that of half a sample."""
    return max(1 - accuracy, 0.5 / images)


def accuracy_axis(axes, points: list[dict], images: int) -> None:
    """Logarithmic in the error, from 10% or the largest one to half a sample."""
    low = 1.1 * max(0.1, *(error(p["samples"]["accuracy"], images) for p in points))
    high = 0.5 / images
    ticks = {e: f"{100 * (1 - e):g}%" for e in ERRORS if low > e > 1.5 * high} | {high: "100%"}
    axes.set(xscale="log", xlim=(low, 0.8 * high), xlabel="accuracy")
    axes.set_xticks(list(ticks), ticks.values())
    axes.set_xticks([], minor=True)
    axes.tick_params("x", labelsize=9)


# ---------------------------------------------------------------- densities of noise levels


def densities(figure) -> None:
    """How often training sees each noise level: the density over ln(sigma / alpha), and over the
    timesteps of the lesson's schedule, relative to uniform t."""
    diffusion = GaussianDiffusion(**DIFFUSION)
    level = (1 / diffusion.alpha_bar - 1).log() / 2             # ln(sigma / alpha), (T,), float64
    T, ours = len(level), (RECIPE["noise_mean"], RECIPE["noise_std"])
    names: dict[tuple, str] = {ours: "this project"}
    for name, normal in PUBLISHED.items():
        names[normal] = f"{names[normal]}, {name}" if normal in names else name
    by_level, by_time = panels = figure.subplots(1, 2)
    for axes in panels:
        axes.set_prop_cycle(color=COLOURS[:len(STYLES)], linestyle=STYLES)
        axes.grid(alpha=0.3)
    levels = torch.linspace(-6, 6, 481)
    for (mean, std), name in names.items():
        distribution = NormalDist(mean, std)
        by_level.plot(levels, [distribution.pdf(x) for x in levels.tolist()],
                      label=f"{name}: mean {mean:g}, std {std:g}")
        by_time.plot(T * shares(diffusion, distribution))
    by_level.plot((level[1:] + level[:-1]) / 2, 1 / (T * level.diff()),
                  label="DDPM, DiT: uniform t")
    by_time.plot([0, T - 1], [1, 1])
    ticks = torch.arange(-4.0, 6.0, 2.0)
    by_level.set_xticks(ticks, [f"{x:g}\nt = {t}" for x, t in zip(
        ticks.tolist(), diffusion.t_from_noise_level(ticks).tolist(), strict=True)])
    by_level.set(xlabel="ln(sigma / alpha); t of the linear-beta schedule", xlim=(-6, 6),
                 ylim=(0, None), ylabel="density in training")
    by_time.set(xlabel="t", xlim=(0, T), ylim=(0, None), ylabel="density, relative to uniform t")
    figure.legend(loc="outside lower center", ncols=3)


def shares(diffusion: GaussianDiffusion, distribution: NormalDist) -> torch.Tensor:
    """The probability of each timestep, float64 (T,), where ln(sigma / alpha) has a distribution:
    that of `t_from_noise_level`."""
    below = [0.0, *map(distribution.cdf, diffusion.noise_level_bounds.tolist()), 1.0]
    return torch.tensor(below, dtype=torch.float64).diff()
