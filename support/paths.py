"""Where things are: found from any working directory."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "output"                        # run folders, samples, figures
DATA = ROOT / "data"                            # data sets
SHIPPED = ROOT / "assets" / "mnist.pt"          # the checkpoint that ships


def short(path: Path | str) -> str:
    """A path as a user would type it: relative to the working directory where it is below it."""
    path = Path(path)
    try:
        return os.path.normpath(os.path.relpath(path)) if path.resolve().is_relative_to(
            Path.cwd()) else str(path)
    except (OSError, ValueError):
        return str(path)
