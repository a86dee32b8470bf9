"""`--logger`: the rows of metrics.jsonl and the previews, also in TensorBoard or Weights & Biases.

A logger's package is imported only if it is asked for. On rank 0 alone; nothing more is read from
the device.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from support.cli import UserError, reason, warn

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
NAMES = ("none", *MODULES)


def check(name: str) -> None:
    """Raise UserError where the package of a logger is not installed."""
    if name == "none":
        return
    try:
        importlib.import_module(MODULES[name])
    except ImportError:
        raise UserError(f"--logger {name} needs the package {name}: pip install {name}") from None


class Logger:
    """Passes on rows and previews; a context manager that closes the logger. If the logger fails,
    training continues without it, with a warning. name "none": a no-op."""

    def __init__(self, name: str, folder: Path, config: dict, start: int):
        self.name, self.writer = name, None
        if name != "none":
            self.writer = self._guarded(WRITERS[name], folder, config, start)

    def log(self, rows: list[dict]) -> None:
        """Rows of metrics.jsonl: `step` and numbers."""
        if self.writer:
            self._guarded(self.writer.log, rows)

    def preview(self, path: Path, step: int) -> None:
        """A picture; a signal may have ended it before it was written."""
        if self.writer and path.is_file():
            self._guarded(self.writer.preview, path, step)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exception) -> None:
        if self.writer:
            self._guarded(self.writer.close)

    def _guarded(self, action: Callable, *args):
        try:
            return action(*args)
        except Exception as error:              # from the disk, the network, the package
            self.writer = None
            warn(f"--logger {self.name} failed ({reason(error)}): training continues without it")


class TensorBoard:
    """Writes RUN/tensorboard/. A resumed run replaces what was logged after its checkpoint."""

    def __init__(self, folder: Path, config: dict, start: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def log(self, rows: list[dict]) -> None:
        for row in rows:
            for key, value in row.items():
                if key != "step":
                    self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def preview(self, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.writer.add_image("preview", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Writes RUN/wandb/ and, unless WANDB_MODE=offline, uploads. A resumed run continues its run:
    the id is the end of the names of the folders that wandb makes there. `step` is a column, since
    wandb's own step cannot go back to a checkpoint's."""

    def __init__(self, folder: Path, config: dict, start: int):
        import wandb
        self.image = wandb.Image
        before = sorted((folder / "wandb").glob("*run-*-*"))
        self.run = wandb.init(
            dir=folder, name=folder.name, config=config, resume="allow", allow_val_change=True,
            id=before[-1].name.rpartition("-")[2] if before else None,
            settings=wandb.Settings(console="off"))
        self.run.define_metric("*", step_metric="step")

    def log(self, rows: list[dict]) -> None:
        for row in rows:
            self.run.log(row)

    def preview(self, path: Path, step: int) -> None:
        self.run.log({"preview": self.image(str(path)), "step": step})

    def close(self) -> None:
        self.run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": WandB}
