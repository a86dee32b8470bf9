"""`--logger`: the rows of metrics.jsonl and the previews, also in TensorBoard or Weights & Biases.
Their packages are imported only if they are asked for."""

from pathlib import Path

import numpy as np
from PIL import Image

from support.command import UserError


def open_logger(name: str, folder: Path, config: dict, start: int):
    """A logger with log(rows), preview(path, step) and close(). A resumed run continues its own."""
    try:
        return {"tensorboard": TensorBoard, "wandb": WandB}[name](folder, config, start)
    except ImportError:
        raise UserError(f"--logger {name} needs the package {name}: pip install {name}") from None


class TensorBoard:
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
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self.writer.add_image("preview", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """wandb's own step cannot go back to a checkpoint's: `step` is a column. The id of the run to
    continue is the end of the names of the folders that wandb makes."""

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
