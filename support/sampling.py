"""The flags of sampling, what they mean for a checkpoint, and the files that sample.py writes."""

import functools
import inspect
import io
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion import classifier_free_guidance
from support import checkpoints, components, distributed, paths, pictures
from support.cli import (
    BATCH,
    COUNT,
    SCALE,
    SEED,
    Parser,
    UserError,
    atomic_write,
    check_target,
    io_errors,
    next_free,
    number,
    shorten,
)
from support.data import to_uint8
from support.folders import find_checkpoint, slug
from support.seeds import generator

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_SHOWN = 10_000              # images in one picture
HINT = "; a checkpoint goes before the flags"


def parse_label(label: str | int, class_names: list[str]) -> int:
    """The index of a class given by its exact name, a number word or its index; an integer is
    always an index."""
    named, text = isinstance(label, str), str(label if isinstance(label, str) else int(label))
    if named and text in class_names:
        return class_names.index(text)
    if named and text.lower() in DIGITS and str(DIGITS.index(text.lower())) in class_names:
        return class_names.index(str(DIGITS.index(text.lower())))
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(class_names):
        return int(text)
    known = ", ".join(shorten(n, 40) for n in class_names[:10]) + ", ..." * (len(class_names) > 10)
    raise UserError(f"label {shorten(text)!r} is not a class of this model: {known} (or an index "
                    f"from 0 to {len(class_names) - 1})" + HINT * os.path.exists(text))


def resolve_sampling(checkpoint, cfg_scale: float | None = None, steps: int | None = None,
                     sampler: str | None = None, eta: float | None = None,
                     precision: str = "auto", latents: bool = False,
                     guidance: Callable = classifier_free_guidance) -> dict:
    """sampler, steps, eta, cfg_scale: the values given, else those that the checkpoint suggests;
    precision, for the checkpoint's device; `guidance`, a function (model, y, cfg_scale) ->
    predict(xt, t); and `options`, the arguments of that sampler. Raises UserError where they do
    not go together."""
    process, suggested = checkpoint.diffusion, checkpoint.sampling
    if suggested.get("latents") and not latents:
        raise UserError(f"{checkpoint.path} makes latents, not images: python -m tools.latents "
                        f"sample decodes them")
    sampler = sampler or suggested["sampler"]
    if sampler not in (names := components.sampler_names(process)):
        raise UserError(f"--sampler {sampler}: this model has {', '.join(names)}")
    accepted = inspect.signature(components.find_sampler(process, sampler)).parameters
    total = process.num_timesteps
    if "eta" not in accepted and eta is not None:
        raise UserError(f"--eta does not apply to --sampler {sampler}")
    if "steps" not in accepted and steps not in (None, total):
        raise UserError(f"--sampler {sampler} takes all {total} steps: for {steps} use --sampler "
                        f"ddim --eta 1 --steps {steps}")
    if "steps" not in accepted:
        steps = total
    elif steps is None:
        steps = suggested["steps"]
    if not 1 <= steps <= total:
        raise UserError(f"--steps {steps}: from 1 to {total} are possible")
    eta = suggested["eta"] if eta is None else eta
    options = {k: v for k, v in {"steps": steps, "eta": eta}.items() if k in accepted}
    device = next(checkpoint.model.parameters()).device
    precision = distributed.sampling_precision(precision, device)
    return dict(sampler=sampler, steps=steps, eta=eta, options=options, precision=precision,
                guidance=getattr(process, "guided", lambda guide: guide)(guidance),
                cfg_scale=suggested["cfg_scale"] if cfg_scale is None else cfg_scale)


def settings_from(args, checkpoint) -> list[dict]:
    """What `resolve_sampling` returns for the flags of `add_sampling_flags`: a dict for each
    --cfg-scale. Raises UserError where they do not go together or do not fit the checkpoint."""
    scales = args.cfg_scale if isinstance(args.cfg_scale, list) else [args.cfg_scale]
    guidance = classifier_free_guidance
    if args.autoguidance is not None:
        device = next(checkpoint.model.parameters()).device
        guidance = functools.partial(components.find_guidance("autoguidance"),
                                     weak=weaker_model(args.autoguidance, checkpoint, device))
    if args.guidance_interval is not None:
        low, high = args.guidance_interval
        if low >= high:
            raise UserError(f"--guidance-interval {low:g} {high:g}: the first must be the smaller")
        if not hasattr(checkpoint.diffusion, "alpha_sigma"):
            raise UserError("--guidance-interval does not apply to this process: it has no "
                            "alpha_sigma")
        alpha, sigma = checkpoint.diffusion.alpha_sigma(checkpoint.diffusion.num_timesteps - 1)
        if low >= (most := (sigma / alpha).item()):
            raise UserError(f"--guidance-interval {low:g} {high:g} holds no timestep of this "
                            f"process: sigma / alpha is at most {most:.0f}")
        guidance = functools.partial(components.find_guidance("interval"), guide=guidance,
                                     process=checkpoint.diffusion, low=low, high=high)
    return [resolve_sampling(checkpoint, scale, args.steps, args.sampler, args.eta, args.precision,
                             guidance=guidance) for scale in scales]


def weaker_model(name: str, checkpoint, device: torch.device) -> torch.nn.Module:
    """The model of --autoguidance: a checkpoint that differs from `checkpoint` in its network and
    weights alone. Raises UserError naming what else differs."""
    try:
        path = find_checkpoint(name)
        weak = checkpoints.load(path)
    except UserError as error:
        raise UserError(f"--autoguidance {shorten(name)!r}: {error}") from None
    own = checkpoints.load(checkpoint.path)

    def same(state: dict) -> dict:
        config = state["config"]
        process = {k: v for k, v in config["diffusion"].items() if k != "weighting"}
        return {"image size": config["model"]["input_size"],
                "channels": config["model"]["in_channels"], "class names": state["class_names"],
                "process": config["process"], **process}

    theirs, ours = same(weak), same(own)
    for key in ours | theirs:
        if theirs.get(key) != ours.get(key):
            raise UserError(f"--autoguidance {paths.short(path)} differs in {key}: "
                            f"{shorten(theirs.get(key), 80)}, and {shorten(ours.get(key), 80)} in "
                            f"{paths.short(checkpoint.path)}")
    return checkpoints.build(weak, "ema", device)[0]


def describe(args, settings: list[dict]) -> str:
    """The settings as a part of a line: sampler, steps, guidance."""
    steps = settings[0]["steps"]
    text = (f"{settings[0]['sampler']}, {steps} step{'s' * (steps > 1)}, "
            f"{'auto' * (args.autoguidance is not None)}guidance "
            + " ".join(f"{how['cfg_scale']:g}" for how in settings))
    if args.guidance_interval is not None:
        text += " for sigma / alpha in ({:g}, {:g}]".format(*args.guidance_interval)
    return text


class Images(Tensor):
    """Images (N, C, H, W) in [-1, 1] that a notebook shows as a grid."""

    def _repr_png_(self) -> bytes:
        images, file = to_uint8(self.as_subclass(Tensor)).cpu(), io.BytesIO()
        pictures.grid(images, min(10, len(images))).save(file, format="PNG")
        return file.getvalue()


# ---------------------------------------------------------------- flags of sample.py


class SampleParser(Parser):
    def parse_args(self, argv=None, namespace=None):
        """Take a checkpoint for what it is where it stands behind `--labels 3 1` or `--cfg-scale
        1 2`, which accept any number of values."""
        args, extra = super().parse_known_args(self._checkpoint_first(argv), namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        return args

    def error(self, message: str):
        value = re.findall("argument --cfg-scale: (.*) is not a number", message, re.DOTALL)
        super().error(message + HINT * (bool(value) and os.path.exists(value[0])))

    def _checkpoint_first(self, argv: list[str] | None) -> list[str]:
        argv = list(sys.argv[1:] if argv is None else argv)
        flag = None
        for i, word in enumerate(argv):
            if word.startswith("--"):
                flag = word
            elif flag in ("--labels", "--cfg-scale") and word.endswith(".pt"):
                return [argv[i], *argv[:i], *argv[i + 1:]]
        return argv


def parser(description: str) -> Parser:
    p = SampleParser(description)
    p.add_argument("checkpoint", nargs="?", metavar="CKPT", help="a checkpoint, or a run folder "
                   "(default: the newest under output/, else the one that ships)")
    g = p.add_argument_group("what")
    g.add_argument("--labels", nargs="+", metavar="LABEL", help="class names, number words or "
                   "indices; a row each with --per-class above 1 (default: the first ten classes)")
    g.add_argument("--random-labels", type=number(int, 1, 1_000_000), metavar="N", help="one image "
                   "each of N random labels, which are a function of --seed; prints them")
    g.add_argument("--per-class", type=number(int, 1, 100_000), metavar="N",
                   help="images per label (default: 10, or 1 with --labels)")
    g.add_argument("--seed", type=SEED, default=0, help="seed of the noise (default: 0)")
    add_sampling_flags(p, several=True)
    g = p.add_argument_group("output")
    g.add_argument("--out", type=Path, metavar="FILE.png", help="the grid (default: a new numbered "
                   "file under output/; none with --npz or --png-dir)")
    g.add_argument("--gif", type=Path, metavar="FILE.gif", help="an animation of the denoising")
    g.add_argument("--trajectory", type=Path, metavar="FILE.png",
                   help="the first image: xt over x0_hat at ten timesteps")
    g.add_argument("--npz", type=Path, metavar="FILE.npz", help="arr_0 uint8 (N, H, W, C), arr_1 "
                   "the labels; under torchrun the processes share the work")
    g.add_argument("--png-dir", type=Path, metavar="DIR", help="a PNG of each image at its own "
                   "size: DIR/00000-CLASS.png, ...")
    g.add_argument("--scale", type=number(int, 1, 64), metavar="N", help="enlarge each pixel to "
                   "N x N in the pictures (default: small images are enlarged)")
    g.add_argument("--force", action="store_true", help="overwrite existing files")
    return p


def add_sampling_flags(p: Parser, several: bool = False) -> None:
    """The flags that say how to sample; tools share them. several: --cfg-scale takes a list."""
    g = p.add_argument_group("how (default: what the checkpoint suggests)")
    g.add_argument("--cfg-scale", type=SCALE, metavar="S", nargs="+" if several else None,
                   help="guidance scale: 1 is the plain conditional model, 0 the unconditional one"
                   + ("; several make a grid each" if several else ""))
    g.add_argument("--guidance-interval", type=number(float, 0), metavar=("LO", "HI"), nargs=2,
                   help="guide only where LO < sigma / alpha <= HI, the noise level (arXiv "
                   "2404.07724): docs/sampling.md (default: everywhere)")
    g.add_argument("--autoguidance", metavar="CKPT", help="guide away from the EMA weights of this "
                   "weaker model, an early checkpoint or a smaller network, instead of from \"no "
                   "class\" (arXiv 2406.02507); --cfg-scale is its scale")
    g.add_argument("--sampler", metavar="NAME", help="ddim, ddpm (all 1000 steps: minutes on a "
                   "CPU) or dpm++ (DPM-Solver++(2M): good from 5 steps on); euler or heun for "
                   "rectified-flow")
    g.add_argument("--steps", type=COUNT, help="sampling steps")
    g.add_argument("--eta", type=number(float, 0, 1), help="noise that ddim adds: 0 none, 1 as "
                   "much as ddpm (tools.edit inpaint: 1)")
    g.add_argument("--weights", choices=("ema", "model"), default="ema",
                   help="the EMA weights or the last ones (default: ema)")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="number format of the matrix products (default: bf16 where the hardware "
                   "has it, else fp32)")
    g.add_argument("--batch-size", type=BATCH, default=250, metavar="N",
                   help="images at a time (default: 250)")
    g.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")


def check_flags(args) -> None:
    """Raise UserError, before any work, for flags that contradict each other and for files that
    cannot be written."""
    arrays = args.npz or args.png_dir
    if len(args.cfg_scale or ()) > 1 and (args.gif or args.trajectory or arrays):
        raise UserError("--gif, --trajectory, --npz and --png-dir take one --cfg-scale")
    if distributed.world_size() > 1 and (not arrays or args.gif or args.trajectory):
        raise UserError("several processes share the work of --npz and --png-dir only: run the "
                        "rest in one")
    for flag in ("labels", "per_class"):
        if args.random_labels and getattr(args, flag):
            raise UserError(f"--random-labels and --{flag.replace('_', '-')} contradict each "
                            f"other: leave one out")
    if args.scale and arrays and not (args.out or args.gif or args.trajectory):
        raise UserError("--scale is for pictures: those of --npz and --png-dir keep their size")
    seen: dict[str, str] = {}
    for flag, suffix in [("out", ".png"), ("gif", ".gif"), ("trajectory", ".png"), ("npz", ".npz")]:
        if (target := getattr(args, flag)) is not None:
            check_target(target, args.force, suffix)
            other = seen.setdefault(os.path.realpath(target), flag)
            if other != flag:
                raise UserError(f"--{other} and --{flag} both name {target}: give each a file of "
                                f"its own")
    if (folder := args.png_dir) is not None:
        check_target(folder / "00000.png", True, ".png")
        if not args.force and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: --force writes into it")


# ---------------------------------------------------------------- files of sample.py


def choose_labels(args, class_names: list[str]) -> tuple[Tensor, int]:
    """The labels (N,) that the flags ask for, and the columns of the grid: a row per label, or a
    near-square grid with one image per label."""
    if args.random_labels:
        rng = generator("cpu", args.seed, "labels")
        y, per_class = torch.randint(len(class_names), (args.random_labels,), generator=rng), 1
    else:
        labels = [parse_label(text, class_names) for text in args.labels or class_names[:10]]
        per_class = args.per_class or (1 if args.labels else 10)
        y = torch.tensor(labels).repeat_interleave(per_class)
    return y, per_class if per_class > 1 else math.ceil(math.sqrt(len(y)))


def label_grid(y: Tensor, columns: int, class_names: list[str]) -> list[str]:
    """The class names as the images of the grid are laid out, a line for each row."""
    names = [shorten(class_names[i], 40) for i in y]
    width = max(map(len, names))
    return [" ".join(f"{name:{width}}" for name in names[start : start + columns]).rstrip()
            for start in range(0, len(names), columns)]


def targets(args, count: int) -> dict[str, Path]:
    """The files to write, by flag; --png-dir is the folder of `count`."""
    arrays = args.npz or args.png_dir
    if count > MAX_SHOWN and (args.out or args.gif or not arrays):
        raise UserError(f"{count:,} images are too many for one picture (at most {MAX_SHOWN:,}): "
                        f"--npz FILE.npz or --png-dir DIR takes them")
    out = args.out
    if out is None and not arrays:
        check_target(out := next_free(paths.OUTPUT, "samples", ".png"), False, ".png")
    found = dict(out=out, gif=args.gif, trajectory=args.trajectory, npz=args.npz,
                 png_dir=args.png_dir)
    return {flag: path for flag, path in found.items() if path is not None}


def save_pngs(folder: Path, images: Tensor, y: Tensor, class_names: list[str]) -> None:
    """Write each of the images uint8 (N, C, H, H) as folder/00000-CLASS.png. Raises OSError."""
    pairs = zip(images.permute(0, 2, 3, 1).numpy(), y.tolist(), strict=True)
    for i, (pixels, label) in enumerate(tqdm(pairs, desc="writing", total=len(y), unit="img",
                                             leave=False, delay=1, dynamic_ncols=True)):
        picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        atomic_write(folder / f"{i:05d}-{slug(class_names[label])}.png",
                     lambda file, picture=picture: picture.save(file, format="PNG"), sync=False)


def write_all(outputs: dict[str, Path], grids: list[Tensor], scales: list[float], y: Tensor,
              class_names: list[str], columns: int, scale: int | None, recorder) -> list[str]:
    """Write every output. grids: uint8 (N, C, H, H) for each of the guidance scales."""
    titles = [f"guidance {s:g}" if len(scales) > 1 else "" for s in scales]
    save: dict[str, Callable[[Path], None]] = {
        "out": lambda path: pictures.save_picture(path, pictures.side_by_side(
            [pictures.grid(images, columns, title, scale)
             for images, title in zip(grids, titles, strict=True)])),
        "gif": lambda path: atomic_write(path, lambda file: file.write(pictures.animation(
            [pictures.grid(images, columns, scale=scale) for images in recorder.frames()]))),
        "trajectory": lambda path: pictures.save_picture(
            path, pictures.trajectory_strip(recorder.trajectory, scale=scale)),
        "npz": lambda path: atomic_write(path, lambda file: np.savez(
            file, grids[0].permute(0, 2, 3, 1).numpy(), y.numpy())),
        "png_dir": lambda path: save_pngs(path, grids[0], y, class_names),
    }
    for flag, path in outputs.items():
        with io_errors(f"{path} cannot be written"):
            save[flag](path)
    return [paths.short(path) for path in outputs.values()]
