"""Two figures of tools.figures: sample quality against accuracy; the densities of noise levels."""

import json
import math
from collections import Counter
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import torch
from PIL import Image

from diffusion import GaussianDiffusion
from support.cli import UserError, say
from support.folders import CONFIG
from tools.curves import COLOURS, Axis, Curve, Panel, draw, linear, logarithmic
from train_mnist import DIFFUSION, RECIPE

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


def quality(runs: list[tuple[str, Path, list[dict]]], images: int | None) -> Image.Image:
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
    tests = [point["test"] for curves in groups.values() for c in curves for point in c]
    for name, curves in groups.items():
        found = [b["samples"]["frechet"] for b in map(best, curves) if b]
        if len(found) == len(curves) > 1:
            say(f"{name}: Frechet distance {fmean(found):.2f} ± {stdev(found):.2f} over "
                f"{len(found)} runs")
    say(f"real, test set: Frechet distance {tests[0]['frechet']:.2f}, recall "
        f"{tests[0]['recall']:.3f}; {images:,} images each")
    means = {name: mean_curve(curves) for name, curves in groups.items()}
    panels = []
    for metric, title in [("frechet", "Frechet distance"), ("recall", "Recall")]:
        drawn = [p["samples"][metric] for curves in groups.values() for c in curves for p in c]
        reference = sorted({test[metric] for test in tests})
        scale = logarithmic if metric == "frechet" else linear
        y = scale("", max(min(drawn + reference), 1e-3), max(drawn + reference))
        curves = []
        for (name, each), colour in zip(groups.items(), colours(len(groups)), strict=True):
            for points, width in [(c, 0.7) for c in each if each[1:]] + [(means[name], 2.2)]:
                places = [(error(p["samples"]["accuracy"], images), p["samples"][metric])
                          for p in points]
                curves.append(Curve(places, colour, width, [f"{p['guidance']:g}" for p in points]
                                    if width > 1 else None))
        panels.append(Panel(f"{title} against accuracy", accuracy_axis(groups, images), y, curves,
                            [("y", value, "real: test set") for value in reference[:1]]
                            + [("y", value, "") for value in reference[1:]]
                            + [("x", 1 - ENOUGH, "")]))
    return draw(panels, [(name + f" ({len(curves)} runs)" * (len(curves) > 1), colour)
                         for (name, curves), colour in
                         zip(groups.items(), colours(len(groups)), strict=True)])


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


def accuracy_axis(groups: dict, images: int) -> Axis:
    """Logarithmic in the error, from 10% or the largest one to half a sample."""
    errors = [error(p["samples"]["accuracy"], images) for cs in groups.values() for c in cs
              for p in c]
    low, high = max(0.1, *errors) * 1.1, 0.5 / images
    ticks = {e: f"{100 * (1 - e):g}%" for e in ERRORS if low > e > 1.5 * high} | {high: "100%"}
    return Axis("accuracy", low, high, ticks, math.log)


def colours(count: int) -> list[tuple]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


# ---------------------------------------------------------------- densities of noise levels


def densities() -> Image.Image:
    """How often training sees each noise level: the density over ln(sigma / alpha), and over the
    timesteps of the lesson's schedule, relative to uniform t."""
    diffusion = GaussianDiffusion(**DIFFUSION)
    level = (1 / diffusion.alpha_bar - 1).log() / 2             # ln(sigma / alpha), (T,), float64
    T, ours = len(level), (RECIPE["noise_mean"], RECIPE["noise_std"])
    names: dict[tuple, str] = {ours: "this project"}
    for name, normal in PUBLISHED.items():
        names[normal] = f"{names[normal]}, {name}" if normal in names else name
    normals = [NormalDist(*normal) for normal in names]
    levels = torch.linspace(-6, 6, 481).tolist()
    by_level = [[(x, d.pdf(x)) for x in levels] for d in normals]
    middle, width = (level[1:] + level[:-1]) / 2, level.diff()
    by_level.append(list(zip(middle.tolist(), (1 / T / width).tolist(), strict=True)))
    by_time = [list(enumerate((T * shares(diffusion, d)).tolist())) for d in normals]
    by_time.append([(0, 1.0), (T - 1, 1.0)])
    legend = [f"{name}: mean {m:g}, std {s:g}" for (m, s), name in names.items()]
    legend.append("DDPM, DiT: uniform t")
    ticks = {x: f"{x}\nt = {int(diffusion.t_from_noise_level(torch.tensor(float(x))))}"
             for x in range(-4, 6, 2)}
    highest = 1.05 * max(y for points in by_time for _, y in points)
    panels = [Panel("Density of training over ln(sigma / alpha)",
                    Axis("ln(sigma / alpha); t of the linear-beta schedule", -6, 6, ticks),
                    linear("", 0, 1.05 * max(y for points in by_level for _, y in points))),
              Panel("... and over t, where uniform is 1", linear("t", 0, T, 5),
                    linear("", 0, highest))]
    for panel, found in zip(panels, (by_level, by_time), strict=True):
        panel.curves = [Curve(points, COLOURS[i]) for i, points in enumerate(found)]
    return draw(panels, list(zip(legend, colours(len(legend)), strict=True)))


def shares(diffusion: GaussianDiffusion, distribution: NormalDist) -> torch.Tensor:
    """The probability of each timestep, float64 (T,), where ln(sigma / alpha) has a distribution:
    that of `t_from_noise_level`."""
    below = [0.0, *map(distribution.cdf, diffusion.noise_level_bounds.tolist()), 1.0]
    return torch.tensor(below, dtype=torch.float64).diff()
