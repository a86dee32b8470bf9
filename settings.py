"""The values of a training run: presets, flags, and what a resumed run takes from its checkpoint.

Not needed to understand DiT.
"""

import argparse

from cli import BATCH, COUNT, SEED, SIDE, Parser, UserError, number, printable
from diffusion import PREDICTIONS
from dit import MODELS

# Values that depend on the device; README.md, "The recipe, chosen by measurement", says why.
PRESETS = {
    "gpu": dict(model="DiT-Mini/2", steps=12_000, batch_size=256, ema_decay=0.999, warmup=500,
                log_every=50, preview_every=1000, save_every=1000),
    "cpu": dict(model="DiT-Nano/7", steps=4_000, batch_size=128, ema_decay=0.995, warmup=100,
                log_every=20, preview_every=500, save_every=500),
}
DEFAULTS = dict(
    dataset="mnist", data_dir="data", image_size=None, prediction="v", optimizer="muon", lr=2e-3,
    muon_lr=0.02, decay=0.4, weight_decay=0.0, clip=1.0, label_dropout=0.1, grad_accum=1,
    precision="auto", compile=False, seed=0, keep=3, timesteps="logit-normal",
)
# What a checkpoint did that was written before there was a flag for it.
BEFORE = dict(timesteps="uniform")
# What may change when a run is resumed: nothing that changes what a step computes.
FREE = {"steps", "log_every", "preview_every", "save_every", "keep", "device", "data_dir", "out",
        "stop_after", "resume", "grad_accum"}


def preset_of(device_type: str) -> str:
    """"gpu" for cuda; "cpu" for the rest (mps too: a laptop's GPU is nearer to it)."""
    return "gpu" if device_type == "cuda" else "cpu"


def resolve(given: dict, device_type: str, recipe: dict | None = None, inherit: dict | None = None,
            say=print) -> argparse.Namespace:
    """Flags given > a resumed run's recipe, or else (`inherit`, preset, defaults).

    recipe: of the checkpoint that is resumed. inherit: values that a checkpoint given to
    --init-from brings along. Raises UserError where a flag contradicts the recipe.
    """
    values = {"out": None, "stop_after": None, "device": None, **DEFAULTS,
              **PRESETS[preset_of(device_type)], **(inherit or {})}
    if recipe is not None:
        recipe = checked_recipe(recipe)
        for key, value in given.items():
            if key not in FREE and not same(key, value, recipe[key]):
                raise UserError(f"--{key.replace('_', '-')} {value} differs from the checkpoint's "
                                f"{printable(recipe[key])}: a resumed run keeps its recipe")
        if given.get("steps", recipe["steps"]) != recipe["steps"]:
            say(f"the schedule changes: {recipe['steps']:,} steps before, {given['steps']:,} now")
        values.update(recipe)
    values.update({k: v for k, v in given.items() if k not in ("resume", "init_from")})
    return argparse.Namespace(**values)


def fitting(model: str, size: int) -> str:
    """A preset's model for images of `size` pixels: with the largest patch of its kind, in
    dit.MODELS, that divides them; unchanged where none does."""
    kind = [m for m in MODELS if m.split("/")[0] == model.split("/")[0]]
    patches = {MODELS[m]["patch_size"]: m for m in kind if size % MODELS[m]["patch_size"] == 0}
    return model if size % MODELS[model]["patch_size"] == 0 or not patches else \
        patches[max(patches)]


def checked_recipe(recipe: dict) -> dict:
    """The recipe of a checkpoint, read as if it had been typed: a file may hold anything."""
    wanted, recipe = {"dataset": str, **DEFAULTS, **PRESETS["cpu"]}, {**BEFORE, **recipe}
    if set(recipe) != set(wanted):
        raise UserError("the checkpoint's recipe is not one of this version's: it lacks or adds "
                        f"{printable(sorted(map(str, set(recipe) ^ set(wanted))))}")
    typed = []
    for key, value in recipe.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None:
            typed.append(f"--{flag}={value}")
    try:
        read = vars(parser().parse_args(typed))
    except UserError as error:
        raise UserError(f"the checkpoint's recipe is not valid: {printable(error)}") from None
    return {key: read.get(key) for key in wanted}


def same(key: str, value, before) -> bool:
    """A folder of images may have moved or have another name: its digest is compared later."""
    return value == before or (key == "dataset" and value.startswith("folder:")
                               and str(before).startswith("folder:"))


def recipe_of(s: argparse.Namespace) -> dict:
    """What a checkpoint remembers of the values: all that the next call could want."""
    return {k: v for k, v in vars(s).items() if k not in ("out", "stop_after", "device")}


def parser(description: str = __doc__) -> Parser:
    """The flags of train_mnist.py; what is not given is absent from the parsed namespace."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
               argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def add(group, flag: str, text: str, **options) -> None:
        key = flag[2:].replace("-", "_")
        gpu, cpu = ({**DEFAULTS, **PRESETS[d]}.get(key) for d in ("gpu", "cpu"))
        default = gpu if gpu == cpu else f"{gpu} on a GPU, {cpu} on a CPU"
        text += "" if default is None or key == "compile" else f" (default: {default})"
        if "type" in options:
            options["metavar"] = {"int": "N", "float": "X"}[options["type"].__name__]
        group.add_argument(flag, help=text.replace("%", "%%"), **options)

    g = p.add_argument_group("the run")
    add(g, "--out", "run folder (default: a new numbered one under output/)", metavar="DIR")
    add(g, "--resume", "go on: the run in --out, else the newest under output/, or from this "
        "checkpoint; flags not given come from it", nargs="?", const=None, metavar="CKPT")
    add(g, "--init-from", "start a new run from the weights in this file, as far as they fit",
        metavar="CKPT")
    add(g, "--steps", "length of the run and of its schedules, in steps", type=COUNT)
    add(g, "--stop-after", "end this call after so many steps, saved, exit status 0", type=COUNT)
    add(g, "--seed", "of the weights, the order of the data, the noise", type=SEED)
    add(g, "--device", "cuda, mps or cpu (default: the first that is there)")
    g = p.add_argument_group("data")
    add(g, "--dataset", "mnist, fashion_mnist, cifar10, glyphs or folder:PATH")
    add(g, "--data-dir", "where the data set is, or is downloaded to", metavar="DIR")
    add(g, "--image-size", "side of the images in pixels (default: the data set's; 32 for "
        "folder:)", type=SIDE)
    g = p.add_argument_group("model and objective")
    add(g, "--model", "a name of dit.MODELS: size / patch side in pixels", choices=MODELS,
        metavar="NAME")
    add(g, "--prediction", "what the output means: eps, v or x0", choices=PREDICTIONS)
    add(g, "--timesteps", "how training draws t: uniform (the paper), or logit-normal "
        "(arXiv 2403.03206), seldom near 0 and 999", choices=("uniform", "logit-normal"))
    add(g, "--label-dropout", "share of labels replaced by \"no class\"", type=number(float, 0, 1))
    g = p.add_argument_group("recipe")
    add(g, "--batch-size", "images per step, over all processes", type=BATCH)
    add(g, "--grad-accum", "parts a batch is computed in: the same update, less memory", type=BATCH)
    add(g, "--optimizer", "muon (with AdamW for what it cannot take) or adamw",
        choices=("muon", "adamw"))
    add(g, "--lr", "learning rate of AdamW", type=number(float, 0))
    add(g, "--muon-lr", "learning rate of Muon", type=number(float, 0))
    add(g, "--warmup", "steps over which the learning rates rise", type=number(int, 0))
    add(g, "--decay", "share of the run over which they fall to 0", type=number(float, 0, 1))
    add(g, "--weight-decay", "of both optimizers", type=number(float, 0))
    add(g, "--clip", "largest norm of the gradient, 0 for any", type=number(float, 0))
    add(g, "--ema-decay", "of the averaged weights, per step", type=number(float, 0, 1, True))
    g = p.add_argument_group("speed")
    add(g, "--precision", "of the matrix products: auto, bf16, fp16 or fp32 (TF32 on a GPU)",
        choices=("auto", "bf16", "fp16", "fp32"))
    add(g, "--compile", "torch.compile the model; the first step takes a minute (default: off)",
        action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("what is shown and kept")
    add(g, "--log-every", "steps between readings of the loss", type=number(int, 1, 100_000))
    add(g, "--preview-every", "steps between sample grids", type=COUNT)
    add(g, "--save-every", "steps between checkpoints", type=COUNT)
    add(g, "--keep", "checkpoints kept, the newest ones", type=COUNT)
    return p
