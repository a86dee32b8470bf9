"""Pictures of images: grids, animations, strips; and the files that sample.py writes."""

import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from support.command import atomic_write, say, short
from support.data import to_uint8

CELL, GAP = 84, 4   # of a sheet: the side of an image, and the gap between two, in pixels


class Images(Tensor):
    """A tensor (N, C, H, W) of images in [-1, 1] that a notebook shows as a grid."""

    def _repr_png_(self) -> bytes | None:
        if self.ndim != 4:                  # images.mean(), images[0]: as any tensor
            return None
        out = io.BytesIO()
        images = self.detach().cpu().as_subclass(Tensor)
        grid(images, min(len(images), 10)).save(out, format="PNG")
        return out.getvalue()


def grid(images: Tensor, columns: int, scale: int | None = None) -> Image.Image:
    """Images (N, C, H, H) in [-1, 1] or uint8, in reading order. Small ones are enlarged. Latents
    (C other than 1 or 3) are shown by their first three channels."""
    if images.shape[1] not in (1, 3):
        images = images[:, :3] / 3 if images.shape[1] > 2 else images[:, :1] / 3
    images = (to_uint8(images) if images.is_floating_point() else images).cpu()
    scale = scale or max(1, round((112 if len(images) <= 16 else 56) / images.shape[-1]))
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return Image.fromarray(make_grid(images, columns, pad_value=40).permute(1, 2, 0).numpy())


def picture(image: Tensor, side: int) -> Image.Image:
    """One image (C, H, H), in [-1, 1] (clipped) or uint8, as side x side pixels."""
    pixels = (to_uint8(image) if image.is_floating_point() else image).cpu().permute(1, 2, 0)
    page = Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy())
    return page.resize((side, side), Image.Resampling.NEAREST)


def sheet(rows: list, names: list[str], heads: list[str], feet: list[str] | None = None,
          group: int = 1000, title: str = "", cell: int = CELL) -> Image.Image:
    """Rows of images (C, H, H), of pictures of one size, or of None for a gap. A name left of each
    row, a head above and a foot of two lines below each column; a wider gap after every `group`
    rows. cell: the side of an image in pixels."""
    rows = [[picture(x, cell) if isinstance(x, Tensor) else x for x in row] for row in rows]
    font = ImageFont.load_default(size=14)
    left = 12 + max(int(font.getlength(name)) for name in names)
    top, width, height = 28 + 26 * bool(title), rows[0][0].width + GAP, rows[0][0].height + GAP
    bottom = top + len(rows) * height + (len(rows) - 1) // group * 3 * GAP
    page = Image.new("RGB", (left + len(heads) * width, bottom + 44 * bool(feet)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((left, 16), title, "black", font, anchor="lm")
    for y, words in (top - 14, heads), (bottom + 22, feet or []):
        for column, text in enumerate(words):
            draw.multiline_text((left + column * width + (width - GAP) / 2, y), text, "black", font,
                                anchor="mm", align="center")
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + r * height + r // group * 3 * GAP
        draw.text((left - 8, y + (height - GAP) / 2), name, "black", font, anchor="rm")
        for column, image in enumerate(row):
            if image is not None:
                page.paste(image, (left + column * width, y))
    return page


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically, in the format of the suffix of `path`. Raises OSError."""
    atomic_write(path, lambda file: picture.save(file, format=path.suffix[1:].upper()))


def animation(pages: list[Image.Image], milliseconds: int = 120) -> bytes:
    """A GIF of the pages, the last of which stays for two seconds. Noise compresses badly, hence
    16 colours for grey pages and 128 for colour. No GIF is larger than 65,535 pixels."""
    for page in pages:
        page.thumbnail((65_535, 65_535))
    grey = pages[-1].convert("HSV").getchannel("S").getextrema() == (0, 0)
    pages = [page.quantize(16 if grey else 128, dither=Image.Dither.NONE) for page in pages]
    out = io.BytesIO()
    pages[0].save(out, format="GIF", save_all=True, append_images=pages[1:], loop=0,
                  duration=[milliseconds] * (len(pages) - 1) + [2000])
    return out.getvalue()


class FrameRecorder:
    """Records sampling: pass it as `watch`. steps: t -> uint8 batches of the step's results;
    first: (t, xt, x0_hat) of the first image at each step."""

    def __init__(self):
        self.steps: dict[int, list[Tensor]] = {}
        self.first: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, t: int, xt: Tensor, x_next: Tensor, x0_hat: Tensor) -> None:
        self.steps.setdefault(t, []).append(to_uint8(x_next).cpu())
        self.first.setdefault(t, (to_uint8(xt[0]).cpu(), to_uint8(x0_hat[0]).cpu()))

    def frames(self, most: int = 24) -> list[Tensor]:
        """All images after at most `most` of the steps, evenly spaced: uint8 (N, C, H, H) each."""
        return [torch.cat(self.steps[t]) for t in spread(self.steps, most)]


def spread(timesteps: dict, most: int) -> list[int]:
    """At most `most` of the keys, evenly spaced."""
    at = np.linspace(0, len(timesteps) - 1, min(most, len(timesteps))).round().astype(int)
    return [list(timesteps)[i] for i in at]


def trajectory(recorder: FrameRecorder, scale: int | None = None) -> Image.Image:
    """The denoising of the first image, xt above x0_hat, at ten of the timesteps."""
    chosen = spread(recorder.first, 10)
    side = recorder.first[chosen[0]][0].shape[-1]
    return sheet([*zip(*(recorder.first[t] for t in chosen), strict=True)], ["xt", "x0_hat"],
                 [f"t = {t}" for t in chosen], cell=side * (scale or max(1, round(CELL / side))))


# ---------------------------------------------------------------- files of sample.py


def write_outputs(args, grids: list[Tensor], scales: list[float], y: Tensor, names: list[str],
                  columns: int, recorder: FrameRecorder | None) -> None:
    """Write every file that the flags ask for. grids: uint8 (N, C, H, H), one per scale. Raises
    OSError."""
    if args.out:
        pages = [grid(images, columns, args.scale) for images in grids]
        save_picture(args.out, pages[0] if len(pages) == 1 else sheet(
            [pages], [""], [f"guidance {s:g}" for s in scales]))
    if args.gif:
        pages = [grid(images, columns, args.scale) for images in recorder.frames()]
        atomic_write(args.gif, lambda file: file.write(animation(pages)))
    if args.trajectory:
        save_picture(args.trajectory, trajectory(recorder, args.scale))
    if args.npz:
        atomic_write(args.npz, lambda file: np.savez(
            file, grids[0].permute(0, 2, 3, 1).numpy(), y.numpy()))
    if args.png_dir:
        for i, label in enumerate(tqdm(y.tolist(), "writing", unit="img", leave=False, delay=1)):
            pixels = grids[0][i].permute(1, 2, 0).squeeze(-1).numpy()
            name = re.sub(r"[^\w.-]+", "-", names[label])[:40]      # letters of any language
            save_picture(args.png_dir / f"{i:05d}-{label:02d}-{name}.png", Image.fromarray(pixels))
    for path in filter(None, (args.out, args.gif, args.trajectory, args.npz, args.png_dir)):
        say(f"written: {short(path)}")
