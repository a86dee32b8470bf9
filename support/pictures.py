"""Pictures of images: grids, animations, strips; and the files that sample.py writes."""

import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from support.command import atomic_write, say, short
from support.data import to_uint8

TITLE = 20          # height of a line of text


class Images(Tensor):
    """A tensor (N, C, H, W) of images in [-1, 1] that a notebook shows as a grid."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        images = self.detach().cpu().as_subclass(Tensor)
        grid(images, min(len(images), 10)).save(out, format="PNG")
        return out.getvalue()


def grid(images: Tensor, columns: int, scale: int | None = None, title: str = "") -> Image.Image:
    """Images (N, C, H, H) in [-1, 1] or uint8, in reading order. Small ones are enlarged. Latents
    (C other than 1 or 3) are shown by their first three channels."""
    if images.shape[1] not in (1, 3):
        images = images[:, :3] / 3 if images.shape[1] > 2 else images[:, :1] / 3
    images = (to_uint8(images) if images.is_floating_point() else images).cpu()
    scale = scale or max(1, round((112 if len(images) <= 16 else 56) / images.shape[-1]))
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    page = Image.fromarray(make_grid(images, columns, pad_value=40).permute(1, 2, 0).numpy())
    if not title:
        return page
    sheet = Image.new("RGB", (page.width, page.height + TITLE), (40, 40, 40))
    sheet.paste(page, (0, TITLE))
    write_text(sheet, 4, 2, title)
    return sheet


def write_text(picture: Image.Image, x: float, y: float, text: str) -> None:
    ImageDraw.Draw(picture).text((x, y), text, (235, 235, 235), font_size=13)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture atomically, in the format of the suffix of `path`. Raises OSError."""
    atomic_write(path, lambda file: picture.save(file, format=path.suffix[1:].upper()))


def side_by_side(pages: list[Image.Image], gap: int = 12) -> Image.Image:
    """Pictures of one height in a row."""
    space = np.full((pages[0].height, gap, 3), 255, np.uint8)
    parts = [part for page in pages for part in (np.asarray(page), space)]
    return Image.fromarray(np.hstack(parts[:-1]))


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


def trajectory(recorder: FrameRecorder, columns: int = 10, scale: int | None = None
               ) -> Image.Image:
    """The denoising of the first image, xt above x0_hat, at `columns` of the timesteps."""
    chosen = spread(recorder.first, columns)
    images = torch.stack([recorder.first[t][row] for row in (0, 1) for t in chosen])
    page = grid(images, len(chosen), scale or max(1, round(84 / images.shape[-1])), title=" ")
    for column, t in enumerate(chosen):
        write_text(page, 6 + column * (page.width - 2) / len(chosen), 2, f"t = {t}")
    return page


def label_list(y: Tensor, names: list[str], most: int = 100) -> str:
    """The class names of the labels y (N,), one for each."""
    return ", ".join(names[i] for i in y[:most].tolist()) + f" ... ({len(y):,})" * (len(y) > most)


# ---------------------------------------------------------------- files of sample.py


def write_outputs(args, grids: list[Tensor], scales: list[float], y: Tensor, names: list[str],
                  columns: int, recorder: FrameRecorder | None) -> None:
    """Write every file that the flags ask for. grids: uint8 (N, C, H, H), one per scale. Raises
    OSError."""
    if args.out:
        titles = [f"guidance {s:g}" if len(scales) > 1 else "" for s in scales]
        save_picture(args.out, side_by_side([grid(images, columns, args.scale, title) for
                                             images, title in zip(grids, titles, strict=True)]))
    if args.gif:
        pages = [grid(images, columns, args.scale) for images in recorder.frames()]
        atomic_write(args.gif, lambda file: file.write(animation(pages)))
    if args.trajectory:
        save_picture(args.trajectory, trajectory(recorder, scale=args.scale))
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


def loss_curve(path: Path, rows: list[dict]) -> None:
    """The loss against the step, and its mean over the last tenth of the steps; without matplotlib
    nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    steps, losses = np.array([(row["step"], row["loss"]) for row in rows]).T
    sums = np.concatenate([[0], losses.cumsum()])
    start = np.arange(1, len(losses) + 1) * 9 // 10
    means = (sums[1:] - sums[start]) / (np.arange(1, len(losses) + 1) - start)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(steps, losses, lw=0.3, alpha=0.5)
    axes.loglog(steps, means)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
