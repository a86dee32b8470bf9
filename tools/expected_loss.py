"""Make the expected loss curve of the CPU preset from the record of a run.

    python -m tools.expected_loss RUN --force           writes assets/expected_loss.json

`python -m tools.figures loss` and the loss.png of a run draw it beside runs with the same data,
network, process, objective and batch size.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.expected_loss", file=sys.stderr)
    sys.exit(2)

import json
from pathlib import Path

import train_mnist
from support import curves, paths
from support.cli import Parser, UserError, atomic_write, check_target, io_errors, run_command, say
from support.folders import CONFIG, read_metrics
from support.settings import FREE, Settings, read_config

MAY_DIFFER = FREE - {"steps"} | {"seed", "precision", "compile"}


def expected_curve(folder: Path) -> dict:
    """The content of assets/expected_loss.json. Raises UserError unless the folder holds a
    complete run of the CPU preset."""
    preset = vars(Settings(train_mnist.RECIPE, train_mnist.PRESETS).resolve({}, "cpu"))
    recipe, setting = read_config(folder / CONFIG), curves.read_setting(folder)
    for key in preset:
        if key not in MAY_DIFFER and recipe.get(key) != preset[key]:
            raise UserError(f"{folder} is not a run of the CPU preset: its {key} is "
                            f"{recipe.get(key)}, the preset's {preset[key]}")
    rows = read_metrics(folder / "metrics.jsonl")
    if len(rows) < preset["steps"]:
        raise UserError(f"{folder} is not complete: {len(rows):,} of {preset['steps']:,} steps")
    found = dict(name=f"expected: CPU preset, seed {recipe['seed']}", setting=setting)
    for key in ("loss", *curves.QUARTERS):
        steps, means = curves.averaged(rows, key)
        if means:
            found[key] = [[round(step, 1) for step in steps], [float(f"{m:.4g}") for m in means]]
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_target(args.out, args.force, ".json")
    found = expected_curve(args.run)
    text = json.dumps(found).replace('"loss', '\n"loss') + "\n"
    with io_errors(f"{args.out} cannot be written"):
        atomic_write(args.out, lambda file: file.write(text.encode()))
    missing = [key for key in curves.QUARTERS if key not in found]
    say(f"written: {paths.short(args.out)}"
        + f" (without {', '.join(missing)}: the run did not record them)" * bool(missing))
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a complete run of the CPU "
                   "preset on MNIST")
    p.add_argument("--out", type=Path, default=curves.EXPECTED, metavar="FILE.json",
                   help="(default: assets/expected_loss.json)")
    p.add_argument("--force", action="store_true", help="overwrite an existing file")
    return p


if __name__ == "__main__":
    run_command(main)
