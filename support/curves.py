"""Loss curves of training runs: the mean over growing ranges of steps, and the expected curve."""

import json
import math
from pathlib import Path

import numpy as np

from support import distributed, paths
from support.cli import atomic_write, reason
from support.folders import CONFIG, read_metrics

QUARTERS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")     # of t: 0-249, ..., 750-999
EXPECTED = paths.ROOT / "assets" / "expected_loss.json"     # tools/expected_loss.py makes it
# What decides which losses are comparable: keys of the recorded recipe
COMPARED = ("network", "process", "model", "prediction", "weighting", "timesteps", "noise_mean",
            "noise_std", "batch_size")


def averaged(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(steps, means): `key` of the rows of metrics.jsonl, averaged over consecutive ranges, each as
    long as a tenth of the steps before it, at most 100. A range without a value is left out."""
    found = {row["step"]: row[key] for row in rows if isinstance(row.get(key), float)
             and math.isfinite(row[key]) and row["step"] > 0}
    if not found:
        return [], []
    edges = [1]
    while edges[-1] <= max(found):
        edges.append(edges[-1] + min(max(edges[-1] // 10, 1), 100))
    steps, values = np.array(list(found)), np.array(list(found.values()))
    counts, places, totals = (np.histogram(steps, edges, weights=w)[0] for w in
                              (None, steps, values))
    some = counts > 0
    return (places[some] / counts[some]).tolist(), (totals[some] / counts[some]).tolist()


def setting(config: dict) -> dict:
    """What of a run's config.json must be equal for its losses to be comparable."""
    recipe, about = config["recipe"], config["data"]
    return {**{key: recipe.get(key) for key in COMPARED},
            **{key: about.get(key) for key in ("dataset", "image_size")}}


def read_setting(folder: Path) -> dict | None:
    try:
        return setting(json.loads((folder / CONFIG).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def expected_for(settings: list[dict | None]) -> dict | None:
    """The expected curve, where one of the runs is comparable with it."""
    try:
        expected = json.loads(EXPECTED.read_text())
    except (OSError, ValueError):               # the lesson does without assets/
        return None
    return expected if expected["setting"] in settings else None


def draw_losses(figure, folders: list[Path], names: list[str]) -> None:
    """Draw the loss of one or more runs against the step into a matplotlib figure; below it, where
    the runs have recorded them, the losses in the quarters of t."""
    runs = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    expected = expected_for([read_setting(folder) for folder in folders])
    quarters = [key for key in QUARTERS if any(key in row for rows in runs for row in rows)]
    grid = figure.add_gridspec(2 if quarters else 1, max(1, len(quarters)),
                               height_ratios=[2, 1] if quarters else [1])
    panels = {"loss": figure.add_subplot(grid[0, :])}
    for i, key in enumerate(quarters):
        panels[key] = figure.add_subplot(grid[1, i], sharex=panels.get(quarters[0]),
                                         sharey=panels.get(quarters[0]))
    for key, axes in panels.items():
        for rows, name in zip(runs, names, strict=True):
            line, = axes.plot(*averaged(rows, key), label=name)
            if key == "loss" and len(runs) == 1:
                points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), float)]
                axes.plot([step for step, _ in points], [value for _, value in points], lw=0.4,
                          alpha=0.4, color=line.get_color(), zorder=0)
        if expected and key in expected:
            axes.plot(*expected[key], "k--", lw=1, label=expected["name"])
        axes.set(xscale="log", yscale="log", xlabel="step")
        axes.grid(alpha=0.3)
    panels["loss"].set_ylabel("loss")
    panels["loss"].legend()
    for key in quarters:
        k = QUARTERS.index(key)
        panels[key].set_title(f"{key}: t {250 * k}-{250 * k + 249}")


def loss_curve(folder: Path) -> Path | None:
    """Draw metrics.jsonl as loss.png; without matplotlib, say what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        distributed.say("no loss curve: pip install matplotlib draws one at the end of a run")
        return None
    figure, path = Figure(figsize=(9, 6), layout="constrained"), folder / "loss.png"
    draw_losses(figure, [folder], [folder.name])
    try:
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    except OSError as error:
        distributed.warn(f"{path} cannot be written ({reason(error)})")
        return None
    return path
