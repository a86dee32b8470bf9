"""Checkpoints: written whole or not at all, and read as files from strangers are read.

A checkpoint is a dict in torch's zip format, made of tensors, numbers, strings, lists, dicts:

    format         "dit-lesson/1"
    step           how many updates were made
    config         model      the arguments of DiT
                   diffusion  num_timesteps, beta_start, beta_end; prediction beside it
                   data       data set, its size and digest
                   recipe     every flag of the training that made it
                   sampling   sampler, steps, eta, cfg_scale: what sample.py does unasked
    class_names    one string per class
    ema            the averaged weights (float16 in a shared checkpoint, else float32)
    model, opt, scaler       in a full checkpoint: what `--resume` needs besides

Not needed to understand DiT.
"""

import math
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffusion import PREDICTIONS, GaussianDiffusion
from dit import DiT
from runs import UserError, atomic_write, checkpoints_in, printable

FORMAT = "dit-lesson/1"
MODEL_KEYS = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
              "num_classes")
SAMPLERS = ("ddpm", "ddim")


# ---------------------------------------------------------------- writing


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that nobody ever sees half of it. Raises OSError (a full disk ...)."""
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints of a run folder."""
    for path in checkpoints_in(folder)[:-count]:
        path.unlink(missing_ok=True)


def shared(state: dict) -> dict:
    """A checkpoint to give away: the EMA weights alone, in half precision."""
    ema = {name: w.half() for name, w in state["ema"].items()}
    return {**{k: state[k] for k in ("step", "config", "class_names")}, "ema": ema}


# ---------------------------------------------------------------- reading


def read_archive(path: Path) -> object:
    """The content of a file that torch.save wrote, on the CPU; no code in it is run.

    Raises UserError where the file is missing, no such archive, damaged in any byte, claims
    tensors larger than itself, or is a pickle that asks for more than tensors and plain values
    (argparse.Namespace, which the published training checkpoints hold, aside).
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UserError(f"{printable(path)} is a folder, not a checkpoint")
        if not zipfile.is_zipfile(path):
            raise UserError(f"{printable(path)} is no checkpoint (not a zip archive of torch.save, "
                            f"or cut short)")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or \
                    sum(e.file_size for e in entries) > size:
                raise UserError(f"{printable(path)} is no checkpoint: its records claim more "
                                f"than the file holds")
            damaged = archive.testzip()     # torch.load takes a flipped byte without a word
            if damaged is not None:
                raise UserError(f"{printable(path)} is damaged: record {printable(damaged)}")
        with torch.serialization.safe_globals([Namespace]):
            claimed = torch.load(path, map_location="meta", weights_only=True)
            _refuse_giants(claimed, size, path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: "
                        f"{printable(error.strerror or error)}") from None
    except Exception as error:      # zipfile, pickle and torch raise a dozen types on bad bytes
        if "weights_only" in str(error).lower() or "unsupported global" in str(error).lower():
            raise UserError(f"{printable(path)} is refused: its pickle asks for more than tensors "
                            f"and plain values, and could run code") from None
        raise UserError(f"{printable(path)} is damaged or no checkpoint "
                        f"({type(error).__name__})") from None


def _refuse_giants(content: object, size: int, path: Path) -> None:
    """A tensor's header may claim a terabyte that the file does not hold."""
    stack, seen = [content], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            if item.numel() * item.element_size() > size:
                raise UserError(f"{printable(path)} is refused: it claims a tensor of "
                                f"{item.numel() * item.element_size():,} bytes and has {size:,}")
        elif id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, dict):
                stack += item.values()
            elif isinstance(item, list | tuple):
                stack += item


def load(path: Path, full: bool = False) -> dict:
    """A checkpoint of this project, checked in every part that is used. See the top of the file.

    full: it must also hold model, opt and scaler. Raises UserError naming what is wrong.
    """
    state = read_archive(path)
    name = printable(path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{name} is not a checkpoint of this project (weights of the published "
                        f"code go to train_mnist.py --init-from)")
    if state["format"] != FORMAT:
        raise UserError(f"{name} has format {printable(state['format'])!r}; this version reads "
                        f"{FORMAT!r}")
    try:
        return _checked(state, full)
    except _Wrong as wrong:
        raise UserError(f"{name} is not a valid checkpoint: {printable(wrong)}") from None


class _Wrong(Exception):
    pass


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise _Wrong(what)


def _get(holder: dict, key: str, kind: type | tuple, where: str, good: Callable = lambda v: True):
    _need(isinstance(holder, dict) and key in holder, f"{where} lacks {key!r}")
    value = holder[key]
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    _need(right and good(value), f"{where}[{key!r}] is {value if right else type(value)!r}")
    return value


def _checked(state: dict, full: bool) -> dict:
    _get(state, "step", int, "checkpoint", lambda v: v >= 0)
    config = _get(state, "config", dict, "checkpoint")
    names = _get(state, "class_names", list, "checkpoint")
    _need(bool(names) and all(isinstance(n, str) for n in names), "class_names are not strings")

    model = _get(config, "model", dict, "config")
    for key in MODEL_KEYS:
        _get(model, key, int, "config['model']", lambda v: 0 < v < 2**20)
    extra = {"mlp_ratio": (int, float), "learn_sigma": bool}
    for key in set(model) - set(MODEL_KEYS):
        _need(key in extra, f"config['model'] has an unknown {key!r}")
        _get(model, key, extra[key], "config['model']", lambda v: 0 <= v < 1000)
    _need(model["num_classes"] == len(names), "class_names do not fit num_classes")

    process = _get(config, "diffusion", dict, "config")
    _get(process, "num_timesteps", int, "config['diffusion']", lambda v: 0 < v <= 100_000)
    for key in ("beta_start", "beta_end"):
        _get(process, key, float, "config['diffusion']", lambda v: 0 < v < 1)
    _get(config, "prediction", str, "config", lambda v: v in PREDICTIONS)
    for key in ("data", "recipe"):
        _get(config, key, dict, "config")
    sampling = _get(config, "sampling", dict, "config")
    _get(sampling, "sampler", str, "config['sampling']", lambda v: v in SAMPLERS)
    _get(sampling, "steps", int, "config['sampling']",
         lambda v: 0 < v <= process["num_timesteps"])
    for key in ("eta", "cfg_scale"):
        _get(sampling, key, (int, float), "config['sampling']", math.isfinite)

    for key in ("ema", "model") if full else ("ema",):
        _check_weights(_get(state, key, dict, "checkpoint"), model, key)
    if full:
        _get(state, "opt", dict, "checkpoint")
        _get(state, "scaler", dict, "checkpoint")
    return state


def _check_weights(weights: dict, model: dict, key: str) -> None:
    """The tensors must be exactly those of the model that the config describes. The model is built
    without memory (the meta device), and only if the file has as many blocks as it claims."""
    _need(all(isinstance(n, str) and isinstance(w, Tensor) for n, w in weights.items()),
          f"{key} is not a dict of tensors")
    blocks = {n.split(".")[1] for n in weights if n.startswith("blocks.")}
    _need(len(blocks) == model["depth"],
          f"config claims {model['depth']} blocks, {key} has {len(blocks)}")
    try:
        with torch.device("meta"):
            wanted = DiT(**model).state_dict()
    except (ValueError, TypeError, RuntimeError) as error:
        raise _Wrong(f"config['model']: {error}") from None
    wrong = sorted(set(wanted) ^ set(weights))
    _need(not wrong, f"{key} {'lacks' if wrong and wrong[0] in wanted else 'has an unknown'} "
                     f"{wrong[0] if wrong else ''!r}")
    for name, w in weights.items():
        _need(w.shape == wanted[name].shape,
              f"{key}[{name!r}] has shape {tuple(w.shape)}, not {tuple(wanted[name].shape)}")
        _need(w.is_floating_point() and w.layout == torch.strided,
              f"{key}[{name!r}] is not a plain tensor of floats")


def build(state: dict, weights: str = "ema", device: torch.device | str = "cpu"
          ) -> tuple[DiT, GaussianDiffusion]:
    """The model of a checkpoint, float32, in eval mode, and its diffusion process, on `device`."""
    if weights not in state:
        raise UserError(f"this checkpoint holds no {weights!r} weights: it was made to be shared "
                        f"and has 'ema' alone")
    model = DiT(**state["config"]["model"])
    model.load_state_dict(state[weights])
    diffusion = GaussianDiffusion(**state["config"]["diffusion"],
                                  prediction=state["config"]["prediction"])
    return model.eval().to(device), diffusion.to(device)


# ---------------------------------------------------------------- other people's weights


def weights_in(content: object, path: Path) -> dict[str, Tensor]:
    """The weights in what `read_archive` returned: a checkpoint of this project, a training
    checkpoint of the published code (both: its `ema`), or a bare state dict."""
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or not content or not all(
            isinstance(n, str) and isinstance(w, Tensor) for n, w in content.items()):
        raise UserError(f"{printable(path)} holds no weights: neither a checkpoint nor a state dict")
    return content


def load_fitting(model: DiT, weights: dict[str, Tensor]) -> list[str]:
    """Copy every tensor whose name and shape are those of `model`; say which do not fit."""
    own, said = model.state_dict(), []
    for name in sorted(set(own) | set(weights)):
        if name not in weights:
            said.append(f"{name}: not in the file")
        elif name not in own:
            said.append(f"{printable(name)}: not in this model")
        elif own[name].shape != weights[name].shape:
            said.append(f"{name}: {tuple(weights[name].shape)} in the file, "
                        f"{tuple(own[name].shape)} here")
        elif not weights[name].is_floating_point():
            said.append(f"{name}: not floats in the file")
        else:
            own[name].copy_(weights[name])
    if len(said) >= len(set(own) | set(weights)):
        raise UserError("--init-from: not one tensor fits this model "
                        f"(for example {said[0]}); check --model and --image-size")
    return said
