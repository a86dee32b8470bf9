"""The flags of train_mnist.py, their defaults, and what a resumed run takes from its checkpoint."""

import argparse
import json
from pathlib import Path

from diffusion import PREDICTIONS, WEIGHTINGS
from dit import MODELS
from support import components, distributed, loggers
from support.celeba import ATTRIBUTES
from support.cli import BATCH, COUNT, SEED, SIDE, Parser, UserError, number, shorten

TIMESTEPS = ("uniform", "log-normal", "logit-normal")
# Defaults of what is not part of the recipe: data, and how and where a run is computed.
DEFAULTS = dict(dataset="mnist", data_dir=None, image_size=None, celeba_attribute=None, flip=False,
                network="dit", process="ddpm", weighting=None, grad_accum=1, precision="auto",
                compile=None, seed=0, keep=3, logger="none", **dict.fromkeys(components.FLAGS))
# The values of checkpoints from before there was a flag for them.
BEFORE = dict(timesteps="uniform", weighting="plain")
# What a resumed run may change: nothing that changes what a step computes.
FREE = {"steps", "log_every", "preview_every", "save_every", "keep", "device", "data_dir", "out",
        "stop_after", "resume", "grad_accum", "logger"}
ONLY_WITH = {"muon_lr": ("optimizer", "muon"), "noise_mean": ("timesteps", "log-normal"),
             "noise_std": ("timesteps", "log-normal")}
NOT_RECORDED = ("out", "stop_after", "device", "resume", "init_from", "config")


class Settings:
    """The defaults of train_mnist.py: recipe for all devices, a preset for "gpu" and for "cpu"."""

    def __init__(self, recipe: dict, presets: dict[str, dict]):
        self.recipe, self.presets = recipe, presets

    def defaults(self, device_type: str) -> dict:
        """Apple's GPUs (mps) get the CPU preset: a laptop's GPU is nearer to it."""
        preset = self.presets["gpu" if device_type == "cuda" else "cpu"]
        return {**DEFAULTS, **self.recipe, **preset}

    def resolve(self, given: dict, device_type: str, recorded: dict | None = None,
                inherited: dict | None = None) -> argparse.Namespace:
        """The value of every flag: given > the recorded recipe of the run to resume, or else
        (inherited from --init-from > preset and defaults). Raises UserError where a flag
        contradicts the recorded recipe."""
        values = {"out": None, "stop_after": None, "device": None,
                  **self.defaults(device_type), **(inherited or {})}
        if recorded is not None:
            recorded = self.checked(recorded)
            for key, value in given.items():
                if key not in FREE and not _same(key, value, recorded[key]):
                    flag = f"--{key.replace('_', '-')}"
                    raise UserError(f"{flag} {value} differs from the "
                                    f"checkpoint's {shorten(recorded[key])}, and a resumed run "
                                    f"keeps its recipe: leave {flag} out, or start a new run with "
                                    f"--init-from CKPT")
            if given.get("steps", recorded["steps"]) != recorded["steps"]:
                distributed.say(f"the learning-rate schedule changes: {recorded['steps']:,} steps "
                                f"before, {given['steps']:,} now")
            values.update(recorded)
        values.update({k: v for k, v in given.items()
                       if k not in ("resume", "init_from", "config")})
        if recorded is None and "config" not in given:
            for key, (other, wanted) in ONLY_WITH.items():
                if key in given and values[other] != wanted:
                    raise UserError(f"--{key.replace('_', '-')} does not apply to --{other} "
                                    f"{values[other]}")
        if values["weighting"] is None:
            values["weighting"] = "v" if values["prediction"] == "x0" else "plain"
        if values["dataset"] == "celeba":
            values["celeba_attribute"] = values["celeba_attribute"] or "Male"
        elif values["celeba_attribute"] is not None:
            raise UserError(f"--celeba-attribute does not apply to --dataset {values['dataset']}")
        return argparse.Namespace(**values)

    def with_config(self, given: dict) -> dict:
        """The flags given, completed by the recipe in the file of --config. Raises UserError."""
        if "config" not in given:
            return given
        if "resume" in given:
            raise UserError("--resume continues a run with its recipe, --config starts a new one "
                            "with that of another: give one of them")
        recipe = read_config(Path(given["config"]))
        try:
            recipe = self.checked(recipe)
        except UserError as error:
            raise UserError(f"--config {given['config']}: {error}") from None
        return {**{key: value for key, value in recipe.items() if value is not None}, **given}

    def checked(self, recorded: dict) -> dict:
        """A recorded recipe, validated as if it had been typed: a file may hold anything. What it
        lacks takes its default."""
        defaults = self.defaults("cpu")
        recorded = {**defaults, **BEFORE, **{k: v for k, v in recorded.items() if v is not None}}
        if unknown := set(recorded) - set(defaults):
            raise UserError(f"the recorded recipe has settings that this version does not know: "
                            f"{shorten(sorted(map(str, unknown)))}")
        words = []
        for key, value in recorded.items():
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{flag}")
            elif value is not None:
                words.append(f"--{flag}={value}")
        try:
            read = vars(self.parser().parse_args(words))
        except UserError as error:
            raise UserError(f"the recorded recipe is not valid: {shorten(error)}") from None
        return {key: read.get(key) for key in defaults}

    def parser(self, description: str = "", without: frozenset = frozenset()) -> Parser:
        """What is not given is absent from the parsed namespace. without: keys of flags that the
        parser of another command does not take."""
        p = Parser(description, argument_default=argparse.SUPPRESS, hints={
            "--patch-size": "the patch size is part of --model, for example DiT-Nano/4"})

        def add(group, flag: str, text: str, **options) -> None:
            key = flag[2:].replace("-", "_")
            if key in without:
                return
            gpu, cpu = (self.defaults(d).get(key) for d in ("cuda", "cpu"))
            default = gpu if gpu == cpu else f"{gpu} on a GPU, {cpu} on a CPU"
            if default is not None and not isinstance(default, bool):
                text += f" (default: {default})"
            if "type" in options:
                options["metavar"] = {"int": "N", "float": "X"}[options["type"].__name__]
            group.add_argument(flag, help=text.replace("%", "%%"), **options)

        g = p.add_argument_group("the run")
        add(g, "--out", "run folder (default: a new numbered one under output/)", metavar="DIR")
        add(g, "--resume", "continue the run in --out, else the newest under output/, or from this "
            "checkpoint; flags not given come from it", nargs="?", const=None, metavar="CKPT")
        add(g, "--init-from", "start a new run from the weights in this file, run folder or "
            "export, as far as they fit", metavar="CKPT")
        add(g, "--config", "start a new run with the recipe in this config.json of a run; flags "
            "override it", metavar="FILE")
        add(g, "--steps", "length of the run and of its schedules, in steps", type=COUNT)
        add(g, "--stop-after", "end this call after so many steps, with a checkpoint and exit "
            "status 0", type=COUNT)
        add(g, "--seed", "seed of the weights, the order of the data, the noise", type=SEED)
        add(g, "--device", "cuda, mps or cpu (default: the fastest available)")
        g = p.add_argument_group("data")
        add(g, "--dataset", "mnist, fashion_mnist, cifar10, celeba, glyphs, folder:PATH or "
            "latents:FILE (docs/data.md)")
        add(g, "--data-dir", "where the data set is, or is downloaded to (default: data/ beside "
            "train_mnist.py)", metavar="DIR")
        add(g, "--image-size", "side of the images in pixels (default: the data set's; 64 for "
            "celeba, 32 for folder:)", type=SIDE)
        add(g, "--celeba-attribute", "what celeba's two classes tell apart (default: Male)",
            choices=ATTRIBUTES, metavar="NAME")
        add(g, "--flip", "mirror half of the images, for photographs; never for digits (default: "
            "off)", action=argparse.BooleanOptionalAction)
        g = p.add_argument_group("model and objective")
        add(g, "--model", "a name of dit.MODELS: size / patch side in pixels", choices=MODELS,
            metavar="NAME")
        add(g, "--network", "the network; docs/variants.md describes the others",
            choices=components.NETWORKS)
        add(g, "--process", "the diffusion process; docs/variants.md describes the others",
            choices=components.PROCESSES)
        for name, (kind, least, greatest, text) in components.FLAGS.items():
            add(g, f"--{name.replace('_', '-')}", text, type=number(kind, least, greatest))
        add(g, "--prediction", "what the output means: eps, v or x0", choices=PREDICTIONS)
        add(g, "--weighting", "weighting of the loss over t: plain, v (errors as errors in v) or "
            "min-snr (default: v for x0, plain for eps and v)", choices=WEIGHTINGS)
        add(g, "--timesteps", "distribution of t in training: uniform (the paper), log-normal "
            "(ln(sigma / alpha) is normal), or logit-normal (of t / 1000)", choices=TIMESTEPS)
        add(g, "--noise-mean", "log-normal: mean of ln(sigma / alpha)",
            type=number(float, -20, 20))
        add(g, "--noise-std", "log-normal: its standard deviation", type=number(float, 0, 20))
        add(g, "--label-dropout", "share of labels replaced by \"no class\"",
            type=number(float, 0, 1))
        g = p.add_argument_group("recipe")
        add(g, "--batch-size", "images per step, over all processes", type=BATCH)
        add(g, "--grad-accum", "micro-batches per step: the same update in less memory", type=BATCH)
        add(g, "--optimizer", "muon (with AdamW for what is not a block's matrix) or adamw",
            choices=("muon", "adamw"))
        add(g, "--lr", "learning rate of AdamW", type=number(float, 0))
        add(g, "--muon-lr", "learning rate of Muon", type=number(float, 0))
        add(g, "--warmup", "steps over which the learning rates rise", type=number(int, 0))
        add(g, "--decay", "share of the run over which they fall to 0", type=number(float, 0, 1))
        add(g, "--weight-decay", "weight decay of both optimizers", type=number(float, 0))
        add(g, "--clip", "gradient clipping: largest norm, 0 for none", type=number(float, 0))
        add(g, "--ema-decay", "decay of the EMA per step, after a warm-up: (1 + step) / (10 + "
            "step)", type=number(float, 0, 1, True))
        g = p.add_argument_group("speed")
        add(g, "--precision", "number format of the matrix products: auto, bf16, fp16 or fp32 "
            "(TF32 on a GPU)", choices=("auto", "bf16", "fp16", "fp32"))
        add(g, "--compile", "torch.compile the loss; the first step takes up to a minute "
            "(default: on where a compiler is found, on a CPU in runs of 3,000 steps or more)",
            action=argparse.BooleanOptionalAction)
        g = p.add_argument_group("logging and checkpoints")
        add(g, "--log-every", "steps between updates of metrics.jsonl and the progress bar "
            "(every step is recorded)", type=number(int, 1, 100_000))
        add(g, "--logger", "also log to tensorboard or wandb (packages to install; "
            "docs/training.md)", choices=loggers.NAMES)
        add(g, "--preview-every", "steps between sample grids", type=COUNT)
        add(g, "--save-every", "steps between checkpoints", type=COUNT)
        add(g, "--keep", "checkpoints kept, the last ones", type=COUNT)
        return p


def _same(key: str, value, recorded) -> bool:
    """The user's own data may have moved or been renamed: its digest is compared later."""
    return value == recorded or (key == "dataset" and value.startswith(("folder:", "latents:"))
                                 and str(recorded).startswith(value.partition(":")[0] + ":"))


def to_record(args: argparse.Namespace) -> dict:
    """The recipe that a checkpoint records: all that a resumed run could want."""
    return {k: v for k, v in vars(args).items() if k not in NOT_RECORDED}


def inherited_from(content: object) -> dict:
    """What a checkpoint of this project given to --init-from decides, unless flags do."""
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or "recipe" not in config:
        return {}
    found = {"network": config["network"], "process": config["process"],
             "model": config["recipe"].get("model"),
             "prediction": config["diffusion"].get("prediction")}
    known = {"network": components.NETWORKS, "process": components.PROCESSES, "model": MODELS,
             "prediction": PREDICTIONS}
    return {key: value for key, value in found.items() if value in known[key]}


def read_config(path: Path) -> dict:
    """The recipe in a run's config.json. Raises UserError where there is none."""
    try:
        recipe = json.loads(path.read_text())["recipe"]
        if isinstance(recipe, dict):
            return recipe
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path} is not the config.json of a run")


def largest_fitting_patch(model: str, size: int) -> str:
    """A preset's model for images of `size` pixels: with the largest patch among its variants in
    dit.MODELS that divides them; unchanged where none does."""
    found = fitting_models(model, size)
    return model if model in found or not found else \
        max(found, key=lambda name: MODELS[name]["patch_size"])


def fitting_models(model: str, size: int) -> list[str]:
    """The models of dit.MODELS that differ from `model` in the patch at most, and whose patches
    divide images of `size` pixels."""
    return [m for m in MODELS if m.split("/")[0] == model.split("/")[0]
            and size % MODELS[m]["patch_size"] == 0]


def unfit_model(model: str, size: int, error: ValueError) -> UserError:
    """What to say where a network refuses its sizes: the models that fit, where it is the patch."""
    found = fitting_models(model, size)
    remedy = f"use {' or '.join(found)}" if found else "choose another --image-size"
    return UserError(f"--model {model}: {error}" + f": {remedy}" * (model not in found))
