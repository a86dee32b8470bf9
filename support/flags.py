"""The flags of train_mnist.py and sample.py.

A training flag's value is, in this order: given on the command line; the resumed run's; of a
--config file; of the preset; of the recipe or OTHERS.
"""

import argparse
import json
from pathlib import Path

from support import compute
from support.command import COUNT, SEED, Parser, UserError, check_target, number, say

# What a resumed run may change: nothing that changes what a step computes.
FREE = {"steps", "log_every", "preview_every", "save_every", "keep", "device", "data_dir", "out",
        "stop_after", "resume", "logger"}
NOT_RECORDED = {"out", "stop_after", "resume", "init_from", "device", "config"}
OTHERS = dict(out=None, stop_after=None, device=None, init_from=None, dataset="mnist",
              data_dir=None, image_size=None, flip=False, precision="auto", compile=None, seed=0,
              keep=3, logger="none")
SHARE, POSITIVE = number(float, 0, 1), number(float, 0)
RANGES = dict(cfg_scale=number(float, -100, 100), steps=COUNT, eta=SHARE, seed=SEED,
              batch_size=number(int, 1, 100_000))
PRECISIONS = ("auto", "fp32", "bf16")


def train_parser(description: str, defaults: dict, presets: dict, choices: dict) -> Parser:
    """Without defaults: what is not given is absent from the parsed namespace."""
    p = Parser(description, argument_default=argparse.SUPPRESS)
    shown = defaults | {key: f"{value} on a GPU, {presets['cpu'][key]} on a CPU"
                        for key, value in presets["gpu"].items()}

    def add(flag: str, text: str, kind=None, **options) -> None:
        key = flag.replace("-", "_")
        if key in choices:
            options["choices"], options["metavar"] = tuple(choices[key]), "NAME"
            text += f": {', '.join(choices[key])}" if len(choices[key]) < 12 else ""
        if (default := shown.get(key)) is not None and default is not False:
            text += f" (default: {default})"
        p.add_argument(f"--{flag}", help=text.replace("%", "%%"), type=kind, **options)

    yes_no = dict(action=argparse.BooleanOptionalAction)
    add("out", "run folder (default: a new numbered one under output/)", metavar="DIR")
    add("resume", "continue the run in --out, else the newest; or from this checkpoint",
        nargs="?", const=None, metavar="CKPT")
    add("init-from", "start from the weights in this file, as far as they fit", metavar="CKPT")
    add("config", "take the recipe of a run's config.json; given flags override it", metavar="FILE")
    add("steps", "length of the run and of its schedules", COUNT)
    add("stop-after", "stop after so many steps of this call; --resume continues", COUNT)
    add("seed", "seed of the weights, the order of the data, the noise", SEED)
    add("device", "cuda, mps or cpu (default: the fastest available)")
    add("dataset", "mnist, fashion_mnist, cifar10, glyphs, celeba, celeba:ATTRIBUTE, folder:PATH "
        "or latents:FILE")
    add("data-dir", "where the data set is, or is downloaded to (default: data/)", metavar="DIR")
    add("image-size", "side of the images in pixels (default: the data set's; 32 for folder:, 64 "
        "for celeba)", number(int, 1, 1024))
    p.add_argument("--flip", help="mirror half of the images: for photographs", **yes_no)
    add("model", "a name of dit.MODELS: size / patch side")
    add("network", "docs/variants.md has the others")
    add("process", "docs/variants.md has the others")
    add("prediction", "what the output means")
    add("weighting", "of the loss over t; with --prediction eps or v the default is plain")
    add("timesteps", "distribution of t in training")
    add("noise-mean", "log-normal: mean of ln(sigma / alpha)", number(float, -20, 20))
    add("noise-std", "log-normal: its standard deviation", number(float, 0, 20))
    add("label-dropout", 'share of labels replaced by "no class"', SHARE)
    add("batch-size", "images per step, over all processes", number(int, 1, 1_000_000))
    add("optimizer", "muon: with AdamW for the rest")
    add("lr", "learning rate of AdamW", POSITIVE)
    add("muon-lr", "learning rate of Muon", POSITIVE)
    add("warmup", "steps over which the learning rates rise", number(int, 0))
    add("decay", "share of the run over which they fall to 0", SHARE)
    add("weight-decay", "weight decay of both optimizers", POSITIVE)
    add("clip", "gradient clipping: largest norm, 0 for none", POSITIVE)
    add("ema-decay", "decay of the EMA per step, after a warm-up", number(float, 0, 0.9999999))
    add("precision", "of the matrix products (fp32: TF32 on a GPU)", choices=PRECISIONS)
    p.add_argument("--compile", help="torch.compile the network (default: where a compiler is "
                   "found and the run is long enough for it to pay)", **yes_no)
    add("log-every", "steps between updates of metrics.jsonl and the progress bar (every step is "
        "recorded)", number(int, 1, 100_000))
    add("preview-every", "steps between sample grids", COUNT)
    add("save-every", "steps between checkpoints", COUNT)
    add("keep", "checkpoints kept, the last ones", COUNT)
    add("logger", "also log to one of these", choices=("none", "tensorboard", "wandb"))
    return p


def resolve(given: dict, defaults: dict, recorded: dict | None) -> argparse.Namespace:
    """The value of every flag. recorded: the recipe of the resumed run. Raises UserError where a
    flag contradicts it, and for flags that do not go together."""
    recorded = {key: value for key, value in (recorded or {}).items() if key in defaults}
    for key in given.keys() & recorded.keys() - FREE:
        own_data = key == "dataset" and ":" in str(given[key])      # may have moved: its digest
        if given[key] != recorded[key] and not own_data:            # is compared later
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{flag} {given[key]} differs from the run's {recorded[key]}: a "
                            f"resumed run keeps its recipe; --init-from CKPT starts a new one")
    if recorded and given.get("steps", recorded.get("steps")) != recorded.get("steps"):
        say(f"the learning-rate schedule changes: {recorded['steps']:,} steps before, "
            f"{given['steps']:,} now")
    args = argparse.Namespace(**{**defaults, **recorded, **given})
    if "weighting" not in given and not recorded:   # the default belongs to --prediction
        args.weighting = args.weighting if args.prediction == "x0" else "plain"
    for key, needs, value in (("muon_lr", "optimizer", "muon"), ("noise_mean", "timesteps",
                              "log-normal"), ("noise_std", "timesteps", "log-normal")):
        if key in given and getattr(args, needs) != value:
            raise UserError(f"--{key.replace('_', '-')} has no effect: --{needs} is "
                            f"{getattr(args, needs)}")
    return args


def read_config(path: str, known: dict) -> dict:
    """The recipe in a run's config.json, without what `known` lacks."""
    try:
        recipe = json.loads(Path(path).read_text())["recipe"]
        return {key: value for key, value in recipe.items() if key in known and value is not None}
    except Exception:
        raise UserError(f"--config {path} is not the config.json of a run") from None


def recipe_of(args: argparse.Namespace) -> dict:
    """What a checkpoint records."""
    return {k: v for k, v in vars(args).items() if k not in NOT_RECORDED}


# ---------------------------------------------------------------- sampling


def sample_parser(description: str) -> Parser:
    p = Parser(description)
    which = p.add_mutually_exclusive_group()
    which.add_argument("checkpoint", nargs="?", metavar="CKPT", help="a checkpoint or a run folder "
                       "(default: the newest under output/, else the one that ships)")
    which.add_argument("--ckpt", metavar="CKPT", help="the same, for use behind a list of labels")
    of = p.add_mutually_exclusive_group()
    of.add_argument("--labels", nargs="+", metavar="LABEL", help="class names, number words or "
                    "indices (default: the first ten classes)")
    of.add_argument("--random-labels", type=number(int, 1, 1_000_000), metavar="N",
                    help="N random labels, which are a function of --seed")
    p.add_argument("--per-class", type=number(int, 1, 100_000), metavar="N",
                   help="images per label, a row each (default: 10, or 1 with labels)")
    p.add_argument("--seed", type=SEED, default=0, help="seed of the noise (default: 0)")
    add_sampling_flags(p, several=True)
    p.add_argument("--out", type=Path, metavar="FILE.png", help="the grid (default: a new numbered "
                   "file under output/; none with --npz or --png-dir)")
    p.add_argument("--gif", type=Path, metavar="FILE.gif", help="an animation of the denoising")
    p.add_argument("--trajectory", type=Path, metavar="FILE.png",
                   help="the first image: xt over x0_hat at ten timesteps")
    p.add_argument("--npz", type=Path, metavar="FILE.npz", help="arr_0 uint8 (N, H, W, C), arr_1 "
                   "the labels; under torchrun the processes share the work")
    p.add_argument("--png-dir", type=Path, metavar="DIR", help="a PNG of each image at its own "
                   "size: DIR/00000-INDEX-CLASS.png, ...")
    p.add_argument("--scale", type=number(int, 1, 64), metavar="N", help="enlarge each pixel to "
                   "N x N in the pictures (default: small images are enlarged)")
    p.add_argument("--force", action="store_true", help="overwrite existing files")
    return p


def add_sampling_flags(p: Parser, several: bool = False) -> None:
    """The flags that say how to sample; tools share them. several: --cfg-scale takes a list."""
    g = p.add_argument_group("how (default: what the checkpoint suggests)")
    g.add_argument("--cfg-scale", type=RANGES["cfg_scale"], metavar="S",
                   nargs="+" if several else None, help="guidance scale: 1 is the plain "
                   "conditional model, 0 the unconditional one"
                   + ("; several make a grid each" if several else ""))
    g.add_argument("--guidance-interval", type=POSITIVE, metavar=("LO", "HI"), nargs=2,
                   help="guide only where LO < sigma / alpha <= HI: docs/sampling.md")
    g.add_argument("--autoguidance", metavar="CKPT", help="guide away from this weaker model, "
                   'instead of from "no class": docs/sampling.md')
    g.add_argument("--sampler", metavar="NAME", help="ddim, ddpm (all 1000 steps: minutes on a "
                   "CPU), dpm++ (good from 5 steps on); euler or heun for rectified-flow")
    g.add_argument("--steps", type=COUNT, help="sampling steps")
    g.add_argument("--eta", type=SHARE, help="noise that ddim adds: 0 none, 1 as much as ddpm")
    g.add_argument("--weights", choices=("ema", "model"), default="ema",
                   help="the EMA weights or the last ones (default: ema)")
    g.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the matrix products "
                   "(default: bf16 where the hardware has it, else fp32)")
    g.add_argument("--batch-size", type=RANGES["batch_size"], default=250, metavar="N",
                   help="images at a time (default: 250)")
    g.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")


def check_options(options: dict) -> None:
    """Raise UserError for arguments of `generate` that the flags of the same names refuse."""
    for key, value in options.items():
        try:
            if key in RANGES and value is not None:
                RANGES[key](str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{key}: {error}") from None
    if options.get("precision", "auto") not in PRECISIONS:
        raise UserError(f"precision: choose one of {', '.join(PRECISIONS)}")


def check_outputs(args) -> None:
    """Raise UserError, before any work, for files that cannot be written and for flags of sample.py
    that do not go together."""
    arrays = args.npz or args.png_dir
    if len(args.cfg_scale or ()) > 1 and (args.gif or args.trajectory or arrays):
        raise UserError("--gif, --trajectory, --npz and --png-dir take one --cfg-scale")
    if compute.WORLD > 1 and (not arrays or args.out or args.gif or args.trajectory):
        raise UserError("several processes share the work of --npz and --png-dir only")
    for path, suffix in ((args.out, ".png"), (args.gif, ".gif"), (args.trajectory, ".png"),
                         (args.npz, ".npz")):
        if path:
            check_target(path, args.force, suffix)
    if args.out and args.trajectory and args.out.resolve() == args.trajectory.resolve():
        raise UserError("--out and --trajectory name the same file")
    if args.png_dir:
        check_target(args.png_dir / "x.png", True)
        if args.png_dir.is_dir() and any(args.png_dir.iterdir()) and not args.force:
            raise UserError(f"{args.png_dir} is not empty: --force writes into it")
