"""Pictures of images: grids, panels side by side, the trajectory strip and the animation.

Wherever a function takes images (N, C, H, H), C is 1 or 3 and the values are uint8, or floats
in [-1, 1].
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from support.cli import atomic_write
from support.data import to_uint8

BACKGROUND, TEXT, PANEL_GAP = (40, 40, 40), (255, 255, 255), (255, 255, 255)     # colours
GAP, TITLE = 2, 20              # pixels: between images; height of a line of text


def grid(images: Tensor, columns: int, title: str = "", scale: int | None = None) -> Image.Image:
    """A grid of images (N, C, H, H) in reading order, `columns` to a row, below a title.

    scale: an integer enlargement. By default small images become about 56 pixels wide, and about
    112 where there are at most 16.
    """
    sheet, _ = _sheet(images, columns, scale, top=TITLE if title else 0)
    if title:
        _write(sheet, 4, title)
    return sheet


def side_by_side(sheets: list[Image.Image], gap: int = 12) -> Image.Image:
    """Pictures in one row, as panels separated by a gap."""
    width = sum(s.width for s in sheets) + gap * (len(sheets) - 1)
    row = Image.new("RGB", (width, max(s.height for s in sheets)), PANEL_GAP)
    left = 0
    for sheet in sheets:
        row.paste(sheet, (left, 0))
        left += sheet.width + gap
    return row


def trajectory_strip(frames: list[tuple[int, Tensor, Tensor]], columns: int = 10,
                     scale: int | None = None) -> Image.Image:
    """The denoising of one image, xt above x0_hat, in `columns` of the steps from first to last.

    frames: (t, xt, x0_hat) for each step, the images (C, H, H). Each column is headed by its t.
    """
    steps = np.linspace(0, len(frames) - 1, min(columns, len(frames)))
    times, xt, x0_hat = zip(*[frames[round(i)] for i in steps], strict=True)
    left = 50
    sheet, cell = _sheet(torch.stack([*xt, *x0_hat]), len(steps), scale, top=TITLE, left=left)
    rows = {"t": TITLE / 2, "xt": TITLE + 0.5 * cell, "x0_hat": TITLE + 1.5 * cell}
    for text, middle in rows.items():
        _write(sheet, 4, text, middle)
    for column, t in enumerate(times):
        _write(sheet, left + (column + 0.5) * cell, str(t), centred=True)
    return sheet


def titled(picture: Image.Image, title: str) -> Image.Image:
    """A picture with a line of text above it."""
    sheet = Image.new("RGB", (picture.width, picture.height + TITLE), BACKGROUND)
    sheet.paste(picture, (0, TITLE))
    _write(sheet, 4, title)
    return sheet


def animation(frames: list[Image.Image], milliseconds: int = 120) -> bytes:
    """A GIF of the frames, each shown for so long and the last one for two seconds. Noise
    compresses badly, hence 16 colours for grey frames and 128 for colour."""
    grey = frames[-1].convert("HSV").getchannel("S").getextrema() == (0, 0)
    frames = [frame.quantize(16 if grey else 128, dither=Image.Dither.NONE) for frame in frames]
    out = io.BytesIO()
    frames[0].save(out, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[milliseconds] * (len(frames) - 1) + [2000])
    return out.getvalue()


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically, as PNG or GIF by the suffix of `path`. Raises OSError."""
    kind = path.suffix[1:].upper()
    atomic_write(path, lambda file: picture.save(file, format=kind))


class FrameRecorder:
    """Record the sampling: pass it as `watch`, called as watch(t, xt, x0_hat, xt_next) after each
    step. The four are the step's timestep, its input, its estimate of x0 and its result.

    trajectory: (t, xt, x0_hat) of the first image at each step, uint8 (C, H, H) on the CPU.
    """

    def __init__(self, steps: int, frames: int = 24):
        self.steps, self.calls = steps, 0
        self.recorded = set(np.linspace(0, steps - 1, min(frames, steps)).round().astype(int))
        self.trajectory: list[tuple[int, Tensor, Tensor]] = []
        self._results: dict[int, list[Tensor]] = {}

    def __call__(self, t: int, xt: Tensor, x0_hat: Tensor, xt_next: Tensor) -> None:
        if self.calls < self.steps:             # the first batch
            self.trajectory.append((t, to_uint8(xt[0]).cpu(), to_uint8(x0_hat[0]).cpu()))
        if (step := self.calls % self.steps) in self.recorded:
            self._results.setdefault(step, []).append(to_uint8(xt_next).cpu())
        self.calls += 1

    def frames(self) -> list[Tensor]:
        """All images after each of the recorded steps: a list of uint8 (N, C, H, H)."""
        return [torch.cat(batches) for batches in self._results.values()]


def _sheet(images: Tensor, columns: int, scale: int | None, top: int = 0, left: int = 0
           ) -> tuple[Image.Image, int]:
    """(a grid of the images with room for text above and to the left, the pitch of its cells)."""
    if images.is_floating_point():
        images = to_uint8(images)
    side = images.shape[-1]
    scale = scale or max(1, round((112 if len(images) <= 16 else 56) / side))
    cell, rows = side * scale + GAP, -(-len(images) // columns)
    sheet = Image.new("RGB", (left + columns * cell + GAP, top + rows * cell + GAP), BACKGROUND)
    for i, image in enumerate(images.cpu()):
        pixels = image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
        picture = Image.fromarray(pixels).resize((side * scale,) * 2, Image.Resampling.NEAREST)
        sheet.paste(picture, (left + GAP + i % columns * cell, top + GAP + i // columns * cell))
    return sheet, cell


def _write(sheet: Image.Image, x: float, text: str, y: float = TITLE / 2, centred: bool = False
           ) -> None:
    """Write text whose middle is at height y, from x or centred on it."""
    try:
        font = ImageFont.load_default(size=13)
    except (ImportError, OSError):              # Pillow without FreeType: its bitmap font
        font = ImageFont.load_default()
    left, top, right, bottom = font.getbbox(text)
    corner = x - (left + right) / 2 * centred, y - (top + bottom) / 2
    ImageDraw.Draw(sheet).text(corner, text, TEXT, font)
