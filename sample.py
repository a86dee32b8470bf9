"""Sample images from a checkpoint.   [read this last]

    python sample.py                                    the newest checkpoint under output/
    python sample.py CKPT --labels 3 1 four seven       one image each
    python sample.py --cfg-scale 0 1 2 4                a grid for each strength of guidance
    python sample.py --gif digits.gif --trajectory strip.png

The checkpoint describes itself: its model, its classes, and the sampler that suits it.
"""

import argparse
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import checkpoints
from data import grid, save_picture, to_uint8
from cli import (
    BATCH,
    COUNT,
    SEED,
    Parser,
    UserError,
    check_target,
    cli,
    generator,
    number,
    printable,
)
from ranks import Ranks
from runs import atomic_write, checkpoints_in, newest_checkpoint

OUTPUT = Path("output")
SHIPPED = Path(__file__).parent / "assets" / "mnist.pt"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BLOCK = 16                      # images whose noise is drawn in one call
MOST_SHOWN = 10_000             # images in one picture


# ---------------------------------------------------------------- noise that belongs to the image


class ImageNoise:
    """Standard normal noise for the images first..last-1 of a job: noise(t) -> (B, C, H, H).

    Image k's noise depends on (seed, t, k) alone: it is row k % 16 of block k // 16, and a block
    is drawn in one call, on the CPU, so that it is the same on every device. noise("T") is xT.
    """

    def __init__(self, seed: int, first: int, last: int, shape: tuple[int, ...], device="cpu"):
        self.seed, self.first, self.last, self.shape, self.device = seed, first, last, shape, device

    def __call__(self, t: int | str) -> Tensor:
        blocks = range(self.first // BLOCK, (self.last - 1) // BLOCK + 1)
        noise = torch.cat([
            torch.randn(BLOCK, *self.shape, generator=generator("cpu", self.seed, "image", t, b))
            for b in blocks])
        skip = self.first - blocks[0] * BLOCK
        return noise[skip : skip + self.last - self.first].to(self.device)


# ---------------------------------------------------------------- sampling


def sampler_of(diffusion, sampler: str, steps: int, eta: float):
    """(the generator function of diffusion.py, its extra arguments) for a sampler's name."""
    if sampler == "ddim":
        return diffusion.ddim_sample, dict(steps=steps, eta=eta)
    return diffusion.ddpm_sample, {}


def sample(model, diffusion, y: Tensor, seed: int, cfg_scale: float, sampler: str = "ddim",
           steps: int = 50, eta: float = 0.0, batch_size: int = 256, first: int = 0,
           watch=None, bar=None) -> Iterator[Tensor]:
    """Images of the classes y (N,), uint8 (B, C, H, H) on the CPU, a batch at a time.

    Image i has the noise of image first + i of `seed`, whatever the batch size. After each step
    `watch(t, xt, x0_hat, made)` gets what the network saw, what it took x0 to be, and what the
    step made of it; `bar` (a tqdm) counts images x steps.
    """
    shape, device = (model.in_channels, model.input_size, model.input_size), model.pos_embed.device
    make, options = sampler_of(diffusion, sampler, steps, eta)
    for start in range(0, len(y), batch_size):
        labels = y[start : start + batch_size].to(device)
        noise = ImageNoise(seed, first + start, first + start + len(labels), shape, device)
        xt = noise("T")
        for t, made, x0_hat in make(model, xt, labels, cfg_scale, noise=noise, **options):
            if watch is not None:
                watch(t, xt, x0_hat, made)
            xt = made
            if bar is not None:
                bar.update(len(labels))
        yield to_uint8(xt).cpu()


# ---------------------------------------------------------------- what the flags mean


def parse_label(text: str, class_names: list[str]) -> int:
    """A class by its exact name, else by a number word, else by its index."""
    if text in class_names:
        return class_names.index(text)
    if text.lower() in DIGITS and str(DIGITS.index(text.lower())) in class_names:
        return class_names.index(str(DIGITS.index(text.lower())))
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(class_names):
        return int(text)
    known = ", ".join(printable(n) for n in class_names[:10]) + ", ..." * (len(class_names) > 10)
    raise UserError(f"label {printable(text)!r} is not a class of this model: {known} "
                    f"(or an index from 0 to {len(class_names) - 1})")


def next_free(parent: Path, stem: str, suffix: str) -> Path:
    """parent/stem-NNN.suffix with the first number above those there."""
    taken = [p.stem[len(stem) + 1:] for p in parent.glob(f"{stem}-*{suffix}")]
    number = max([int(n) for n in taken if n.isdecimal()], default=0) + 1
    return parent / f"{stem}-{number:03d}{suffix}"


def check_targets(a: argparse.Namespace) -> None:
    """`check_target` for each file that the flags name; no two may be the same."""
    flags = {}
    for flag, suffix in [("out", ".png"), ("gif", ".gif"), ("trajectory", ".png"), ("npz", ".npz")]:
        if (target := getattr(a, flag)) is not None:
            check_target(target, a.force, suffix)
            other = flags.setdefault(os.path.realpath(target), flag)
            if other != flag:
                raise UserError(f"--{other} and --{flag} both name {printable(target)}: give each "
                                f"a file of its own")


def find_checkpoint(name: str | None) -> Path:
    """The file that was named; else the newest under output/; else the one that ships."""
    if name is not None:
        return newest_in(Path(name)) if os.path.isdir(name) else Path(name)
    path = newest_checkpoint(OUTPUT)
    if path is None:
        if not SHIPPED.is_file():
            raise UserError(f"no checkpoint under {OUTPUT}/: train one with python train_mnist.py, "
                            f"or name a file")
        path = SHIPPED
        print(f"no run of your own under {OUTPUT}/: sampling from the checkpoint that ships, "
              f"{SHIPPED.parent.name}/{SHIPPED.name}")
    return path


def newest_in(folder: Path) -> Path:
    found = checkpoints_in(folder)
    if not found:
        raise UserError(f"{printable(folder)} holds no checkpoint (step_*.pt)")
    return found[-1]


def sampling_of(a: argparse.Namespace, suggested: dict, num_timesteps: int) -> dict:
    """sampler, steps, eta, cfg_scale: what the flags say, else what the checkpoint suggests."""
    how = {key: suggested[key] if getattr(a, key) is None else getattr(a, key)
           for key in ("sampler", "steps", "eta", "cfg_scale")}
    if how["sampler"] == "ddpm":
        if a.steps not in (None, num_timesteps):
            raise UserError(f"ddpm takes all {num_timesteps} steps: for {a.steps} use "
                            f"--sampler ddim --eta 1 --steps {a.steps}")
        if a.eta is not None:
            raise UserError("--eta belongs to --sampler ddim")
        how["steps"] = num_timesteps
    elif how["steps"] > num_timesteps:
        raise UserError(f"--steps {how['steps']}: the process has {num_timesteps}")
    return how


# ---------------------------------------------------------------- the pictures


class Film:
    """A `watch` for `sample` that keeps, as uint8, what the GIF and the strip are made of."""

    def __init__(self, steps: int, stills: int = 24):
        self.steps = steps
        self.wanted = set(np.linspace(0, steps - 1, min(stills, steps)).round().astype(int))
        self.seen, self.frames, self.first = 0, {}, []

    def __call__(self, t: int, xt: Tensor, x0_hat: Tensor, made: Tensor) -> None:
        if self.seen < self.steps:              # the first image of the first batch
            self.first.append((t, to_uint8(xt[0]).cpu(), to_uint8(x0_hat[0]).cpu()))
        if (moment := self.seen % self.steps) in self.wanted:
            self.frames.setdefault(moment, []).append(to_uint8(made).cpu())
        self.seen += 1

    def stills(self) -> list[Tensor]:
        """All images at each of the moments: a list of uint8 (N, C, H, H)."""
        return [torch.cat(parts) for parts in self.frames.values()]


def trajectory_strip(frames: list[tuple[int, Tensor, Tensor]], columns: int = 10) -> Image.Image:
    """xt over x0_hat of one image, at `columns` moments from the first step to the last."""
    chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(columns, len(frames)))]
    rows = [xt for _t, xt, _ in chosen] + [x0_hat for _t, _, x0_hat in chosen]
    times = " ".join(str(t) for t, _, _ in chosen)
    return grid(torch.stack(rows), len(chosen), f"xt (top) and x0_hat (bottom), t = {times}")


def animation(frames: list[Image.Image]) -> bytes:
    """A GIF of the frames, the last one held for two seconds. Noise compresses badly: 16 colours
    where all is grey, else 128."""
    grey = frames[-1].convert("HSV").getchannel("S").getextrema() == (0, 0)
    frames = [frame.quantize(16 if grey else 128, dither=Image.Dither.NONE) for frame in frames]
    out = io.BytesIO()
    frames[0].save(out, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[120] * (len(frames) - 1) + [2000])
    return out.getvalue()


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    if len(a.cfg_scale or ()) > 1 and (a.gif or a.trajectory or a.npz):
        raise UserError("--gif, --trajectory and --npz take one --cfg-scale")
    check_targets(a)
    ranks = Ranks.join(a.device)
    if ranks.world > 1 and (a.npz is None or a.gif or a.trajectory):
        raise UserError("several processes share the work of --npz alone: run the rest in one")

    # The model, and what its checkpoint says of sampling; flags win
    path = find_checkpoint(a.checkpoint)
    state = checkpoints.load(path)
    model, diffusion = checkpoints.build(state, a.weights, ranks.device)
    how = sampling_of(a, state["config"]["sampling"], diffusion.num_timesteps)
    scales = a.cfg_scale or [state["config"]["sampling"]["cfg_scale"]]

    # Which images: a row per label
    names = state["class_names"]
    labels = [parse_label(text, names) for text in a.labels or ()] or list(range(len(names)))[:10]
    per_class = a.per_class or (1 if a.labels else 10)
    y = torch.tensor(labels).repeat_interleave(per_class)
    columns = per_class if per_class > 1 else math.ceil(math.sqrt(len(labels)))
    if len(y) > MOST_SHOWN and (a.out or a.gif or a.npz is None):
        raise UserError(f"{len(y):,} images in one picture: --npz FILE.npz takes them, a picture "
                        f"at most {MOST_SHOWN:,}")
    ranks.say(f"{printable(path)}: step {state['step']:,}{' (untrained)' * (not state['step'])}, "
              f"{how['sampler']}, {how['steps']} steps, guidance "
              f"{' '.join(f'{s:g}' for s in scales)}, {len(y)} images, seed {a.seed}")

    # Sample: the images of each strength of guidance, and what is seen on the way
    options = {key: how[key] for key in ("sampler", "steps", "eta")}
    chunks = list(torch.arange(len(y)).split(a.batch_size))[ranks.rank :: ranks.world]
    film = Film(how["steps"]) if a.gif or a.trajectory else None
    pictures = []
    with tqdm(total=sum(map(len, chunks)) * how["steps"] * len(scales), desc="sampling",
              unit="image-step", unit_scale=True, dynamic_ncols=True,
              disable=ranks.rank > 0) as bar:
        for scale in scales:
            parts = [part for chunk in chunks for part in sample(
                model, diffusion, y[chunk], a.seed, scale, **options, batch_size=a.batch_size,
                first=int(chunk[0]), watch=film, bar=bar)]
            pictures.append(ranks.gather_parts(parts))
    ranks.leave()
    if ranks.rank > 0:
        return 0

    # Write
    out = a.out or (next_free(OUTPUT, "samples", ".png") if a.npz is None else None)
    written = {}
    if out:
        titles = [f"guidance {s:g}" if len(scales) > 1 else "" for s in scales]
        sheets = [grid(images, columns, title)
                  for images, title in zip(pictures, titles, strict=True)]
        written[out] = lambda path: save_picture(path, side_by_side(sheets))
    if a.gif:
        stills = [grid(images, columns) for images in film.stills()]
        written[a.gif] = lambda path: atomic_write(path, lambda f: f.write(animation(stills)))
    if a.trajectory:
        written[a.trajectory] = lambda path: save_picture(path, trajectory_strip(film.first))
    if a.npz:
        arrays = pictures[0].permute(0, 2, 3, 1).numpy(), y.numpy()
        written[a.npz] = lambda path: atomic_write(path, lambda f: np.savez(f, *arrays))
    for target, write in written.items():
        try:
            write(target)
        except OSError as error:
            raise UserError(f"{printable(target)} cannot be written: "
                            f"{error.strerror or error}") from None
        print(f"written: {printable(target)}")
    return 0


def side_by_side(sheets: list[Image.Image]) -> Image.Image:
    """The pictures in one row."""
    row = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)))
    left = 0
    for s in sheets:
        row.paste(s, (left, 0))
        left += s.width
    return row


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("checkpoint", nargs="?", metavar="CKPT", help="a checkpoint, or a run's folder "
                   "(default: the newest under output/, else the one that ships)")
    g = p.add_argument_group("what")
    g.add_argument("--labels", nargs="+", metavar="LABEL", help="class names, number words or "
                   "indices, a row each (default: the first ten classes)")
    g.add_argument("--per-class", type=number(int, 1, 100_000), metavar="N",
                   help="images per label (default: 10, or "
                   "1 with --labels; with 1 the grid is near-square)")
    g.add_argument("--seed", type=SEED, default=0, help="of the noise (default: 0)")
    g = p.add_argument_group("how (default: what the checkpoint suggests)")
    g.add_argument("--cfg-scale", type=number(float, -100, 100), nargs="+", metavar="S",
                   help="guidance: 1 is the plain conditional model, 0 the unconditional one; "
                   "several make a grid each")
    g.add_argument("--sampler", choices=checkpoints.SAMPLERS, help="ddpm (all timesteps) or ddim")
    g.add_argument("--steps", type=COUNT, help="sampling steps, ddim")
    g.add_argument("--eta", type=number(float, 0, 1), help="noise ddim adds: 0 none, 1 as ddpm")
    g.add_argument("--weights", choices=("ema", "model"), default="ema",
                   help="the averaged weights or the last ones (default: ema)")
    g.add_argument("--batch-size", type=BATCH, default=250, metavar="N",
                   help="images at a time (default: 250)")
    g.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    g = p.add_argument_group("where to")
    g.add_argument("--out", type=Path, metavar="FILE.png", help="the grid (default: a new numbered "
                   "one under output/; none with --npz)")
    g.add_argument("--gif", type=Path, metavar="FILE.gif", help="the grid coming into being")
    g.add_argument("--trajectory", type=Path, metavar="FILE.png",
                   help="the first image: xt over x0_hat at chosen timesteps")
    g.add_argument("--npz", type=Path, metavar="FILE.npz", help="arr_0 uint8 (N, H, W, C), arr_1 "
                   "the labels; under torchrun the processes share the work")
    g.add_argument("--force", action="store_true", help="overwrite existing files")
    return p


if __name__ == "__main__":
    cli(main)
