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

import contextlib
import io
import math
import os
import pickle
import pickletools
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cli import UserError, printable
from diffusion import PREDICTIONS, GaussianDiffusion
from dit import DiT
from runs import atomic_write, checkpoints_in

FORMAT = "dit-lesson/1"
MODEL_KEYS = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
              "num_classes")
SAMPLERS = ("ddpm", "ddim")
_SCALER = dict(scale=float, growth_factor=float, backoff_factor=float, growth_interval=int,
               _growth_tracker=int)         # of torch.amp.GradScaler, which fp16 needs


# ---------------------------------------------------------------- writing


def save(path: Path, state: dict) -> None:
    """Write a checkpoint so that nobody ever sees half of it. Raises OSError (a full disk ...)."""
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the newest `count` checkpoints of a run folder."""
    for path in checkpoints_in(folder)[:-count]:
        with contextlib.suppress(OSError):      # one too many does no harm
            path.unlink()


def shared(state: dict) -> dict:
    """A checkpoint to give away: the EMA weights alone, in half precision, and no path of the
    machine that made it. Raises UserError where a weight is too large."""
    ema = {name: w.half() for name, w in state["ema"].items()}
    for name, w in ema.items():
        if not w.isfinite().all():
            raise UserError(f"ema[{printable(name)!r}] is too large for half precision")
    recipe = dict(state["config"]["recipe"], data_dir="data", dataset=state["config"]["data"].get(
        "dataset", "unknown"))
    return dict(step=state["step"], config=dict(state["config"], recipe=recipe),
                class_names=state["class_names"], ema=ema)


# ---------------------------------------------------------------- reading


class Damaged(UserError):
    """A file whose bytes are wrong, whoever reads it and whenever."""


def read_archive(path: Path) -> object:
    """The content of a file that torch.save wrote, on the CPU; no code in it is run.

    Raises UserError where the file is missing or cannot be read; Damaged where it is no such
    archive, damaged in any byte, claims tensors larger than itself, or is a pickle that asks for
    more than tensors and plain values (argparse.Namespace, which the published training
    checkpoints hold, aside).
    """
    name = printable(path)
    try:
        if not os.path.isfile(path):
            raise UserError(f"{name} is not a file" if os.path.exists(path) else
                            f"{name} does not exist")
        if not zipfile.is_zipfile(path):
            raise Damaged(f"{name} is no checkpoint: not a zip archive as torch.save writes it, "
                          f"or cut short (bare pickles are not read, for they can run code)")
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")         # one line, and it is ours
            with zipfile.ZipFile(path) as archive:
                _check_archive(archive, os.path.getsize(path))
            return torch.load(path, map_location="cpu", weights_only=True)
    except _Wrong as wrong:
        raise Damaged(f"{name} is refused: {printable(wrong)}") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name} cannot be read: {printable(error.strerror or error)}") from None
    except Exception as error:      # zipfile, pickle and torch raise a dozen types on bad bytes
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(f"{name} cannot be read: out of memory") from None
        raise Damaged(f"{name} is damaged or no checkpoint ({type(error).__name__})") from None


class _Wrong(Exception):
    pass


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise _Wrong(what)


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Everything about a torch archive that can be known before a tensor is made of it."""
    entries = archive.infolist()
    _need(all(e.compress_type == zipfile.ZIP_STORED for e in entries)
          and sum(e.file_size for e in entries) <= size, "its records claim more than it holds")
    _need(len({e.filename.lower() for e in entries}) == len(entries), "two records share a name")
    damaged = archive.testzip()         # torch.load takes a flipped byte without a word
    _need(damaged is None, f"record {damaged} is damaged")
    top = entries[0].filename.split("/")[0] if entries else ""
    sizes = {e.filename: e.file_size for e in entries}
    _need(f"{top}/data.pkl" in sizes, "it has no data.pkl: not an archive of torch.save")
    content = archive.read(f"{top}/data.pkl")
    for opcode, value, _ in pickletools.genops(content):
        _need(opcode.name not in ("PUT", "LONG_BINPUT") or value < len(content),
              "its pickle is no sound one")       # pickle would make a table of that length
    _Claims(content, {name[len(top) + 1:]: n for name, n in sizes.items()}, size).load()


# What the pickle of a checkpoint may ask for, and the bytes of a number in each storage.
_STORAGES = dict(DoubleStorage=8, FloatStorage=4, HalfStorage=2, BFloat16Storage=2, LongStorage=8,
                 IntStorage=4, ShortStorage=2, CharStorage=1, ByteStorage=1, BoolStorage=1)


class _Claims(pickle.Unpickler):
    """Walks through the pickle of an archive without making a tensor, or anything else that is
    not a plain value: sizes that the records do not hold, and any other global, raise _Wrong."""

    def __init__(self, content: bytes, records: dict[str, int], budget: int):
        super().__init__(io.BytesIO(content))
        self.records, self.budget = records, budget

    def find_class(self, module: str, name: str):
        allowed = {("torch._utils", "_rebuild_tensor_v2"): self.tensor,
                   ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: None,
                   ("collections", "OrderedDict"): OrderedDict,
                   ("argparse", "Namespace"): Namespace}
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        _need((module, name) in allowed, f"its pickle asks for {module}.{name}, and could run "
                                         f"code: only tensors and plain values are read")
        return allowed[module, name]

    def persistent_load(self, claim: tuple) -> tuple[int, int]:
        _storage, width, key, _device, count = claim
        _need(self.records.get(f"data/{key}") == count * width and count >= 0,
              f"record data/{key} does not have the {count * width:,} bytes that it claims")
        return width, count

    def tensor(self, storage: tuple[int, int], offset: int, shape: tuple, stride: tuple, *rest):
        (width, count), numel = storage, math.prod(shape)
        self.budget -= numel * width
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        _need(min(0, offset, *shape, *stride) >= 0 and (numel == 0 or last < count)
              and numel <= count and self.budget >= 0,
              f"it claims a tensor of {numel * width:,} bytes that it does not hold")
        _need(len(rest) == 2, "a tensor in it is not a plain one")


def load(path: Path, full: bool = False) -> dict:
    """A checkpoint of this project, checked in every part that is used. See the top of the file.

    full: it must also hold model, opt and scaler. Raises UserError naming what is wrong.
    """
    return _valid(read_archive(path), path, full)


def _valid(state: object, path: Path, full: bool) -> dict:
    name = printable(path)
    if not isinstance(state, dict) or not isinstance(state.get("format"), str):
        raise UserError(f"{name} is not a checkpoint of this project (weights of the published "
                        f"code go to train_mnist.py --init-from)")
    if state["format"] != FORMAT:
        raise UserError(f"{name} has format {printable(state['format'])}; this version reads "
                        f"{FORMAT}")
    if full and "opt" not in state and "model" not in state:
        raise UserError(f"{name} was made to be shared and holds 'ema' alone, nothing to resume: "
                        f"--init-from {name} starts a new run from its weights")
    try:
        model = _checked_config(state)
        for key in ("ema", "model") if full or "model" in state else ("ema",):
            _check_weights(_get(state, key, dict, "checkpoint"), model, key)
        if full:
            _get(state, "opt", dict, "checkpoint")
            scaler = _get(state, "scaler", dict, "checkpoint")
            for key, kind in _SCALER.items() if scaler else ():
                _get(scaler, key, kind, "scaler", lambda v: 0 <= v < 2**31)
    except _Wrong as wrong:
        raise Damaged(f"{name} is not a valid checkpoint: {printable(wrong)}") from None
    return state


def _get(holder: dict, key: str, kind: type | tuple, where: str, good: Callable = lambda v: True):
    _need(isinstance(holder, dict) and key in holder, f"{where} lacks {key!r}")
    value = holder[key]
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right or not good(value):
        raise _Wrong(f"{where}[{key!r}] is {value if right else type(value)!r}")
    return value


def _plain(value: object, depth: int = 5) -> bool:
    """True for what json can hold too: no tensor, and nothing that contains itself."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(k, str) and _plain(v, depth - 1)
                                 for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_plain(v, depth - 1) for v in value)
    return value is None or isinstance(value, str | int | float)


def _checked_config(state: dict) -> dict:
    """Check step, config and class_names; returns the arguments of DiT."""
    _get(state, "step", int, "checkpoint", lambda v: 0 <= v < 2**53)
    config = _get(state, "config", dict, "checkpoint")
    _need(_plain(config), "config holds more than plain values")
    names = _get(state, "class_names", list, "checkpoint")
    _need(bool(names) and all(isinstance(n, str) for n in names), "class_names are not strings")

    model = _get(config, "model", dict, "config")
    for key in MODEL_KEYS:
        _get(model, key, int, "config['model']", lambda v: 0 < v < 2**20)
    if "mlp_ratio" in model:
        _get(model, "mlp_ratio", (int, float), "config['model']", lambda v: 0 < v < 1000)
    if "learn_sigma" in model:
        _get(model, "learn_sigma", bool, "config['model']")
    for key in set(model) - {*MODEL_KEYS, "mlp_ratio", "learn_sigma"}:
        raise _Wrong(f"config['model'] has an unknown {key!r}")
    _need(model["num_classes"] == len(names), "class_names do not fit num_classes")

    process = _get(config, "diffusion", dict, "config")
    _get(process, "num_timesteps", int, "config['diffusion']", lambda v: 0 < v <= 100_000)
    for key in ("beta_start", "beta_end"):
        _get(process, key, float, "config['diffusion']", lambda v: 0 < v < 1)
    _need(len(process) == 3, "config['diffusion'] has unknown keys")
    _get(config, "prediction", str, "config", lambda v: v in PREDICTIONS)
    for key in ("data", "recipe"):
        _get(config, key, dict, "config")
    sampling, where = _get(config, "sampling", dict, "config"), "config['sampling']"
    _get(sampling, "sampler", str, where, lambda v: v in SAMPLERS)
    _get(sampling, "steps", int, where, lambda v: 0 < v <= process["num_timesteps"])
    _get(sampling, "eta", (int, float), where, lambda v: 0 <= v <= 1)
    _get(sampling, "cfg_scale", (int, float), where, lambda v: -100 <= v <= 100)
    return model


def _check_weights(weights: dict, model: dict, key: str) -> None:
    """The tensors must be exactly those of the model that the config describes. The model is built
    without memory (the meta device), and only if the file has as many blocks as it claims."""
    for name, w in weights.items():
        _need(isinstance(name, str) and isinstance(w, Tensor), f"{key}[{name!r}] is no tensor")
    blocks = {n.split(".")[1] for n in weights if n.startswith("blocks.") and n.count(".") > 1}
    _need(len(blocks) == model["depth"],
          f"config claims {model['depth']} blocks, {key} has {len(blocks)}")
    try:
        with torch.device("meta"):
            wanted = DiT(**model).state_dict()
    except (ValueError, TypeError, RuntimeError) as error:
        raise _Wrong(f"config['model']: {error}") from None
    for name in sorted(set(wanted) ^ set(weights)):
        raise _Wrong(f"{key} {'lacks' if name in wanted else 'has an unknown'} {name!r}")
    _need(len({w.untyped_storage().data_ptr() for w in weights.values()}) == len(weights),
          f"two tensors of {key} share their numbers")     # they would take more memory apart
    for name, w in weights.items():
        what = f"{key}[{name!r}]"
        _need(w.shape == wanted[name].shape,
              f"{what} has shape {tuple(w.shape)}, not {tuple(wanted[name].shape)}")
        _need(w.is_floating_point(), f"{what} holds {w.dtype}, not floats")
        _need(bool(w.isfinite().all()), f"{what} holds numbers that are not finite")


# What each optimizer remembers of a parameter, once it has made a step.
_MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def restore_optimizer(opt: torch.optim.Optimizer, saved: object) -> None:
    """Put back an optimizer's state_dict() from a checkpoint. Only what it has learned comes from
    the file; its options are those `opt` was made with. Raises UserError where it does not fit."""
    params = [p for group in opt.param_groups for p in group["params"]]
    wanted = _MOMENTS[type(opt).__name__]
    try:
        state = _get(saved, "state", dict, "opt")
        _need(not state or set(state) == set(range(len(params))),
              f"opt has the state of {len(state)} parameters, not {len(params)}")
        for i, moments in state.items():
            _need(isinstance(moments, dict) and set(moments) == wanted,
                  f"opt lacks {' or '.join(sorted(wanted))} of parameter {i}")
            for key, w in moments.items():
                shape = torch.Size() if key == "step" else params[i].shape
                _need(isinstance(w, Tensor) and w.is_floating_point() and w.shape == shape
                      and bool(w.isfinite().all()) and (key != "step" or 0 < w < 2**53),
                      f"opt's {key} of parameter {i} is not a tensor of {tuple(shape)} numbers")
                _need(key != "exp_avg_sq" or bool((w >= 0).all()), f"opt's {key} is negative")
    except _Wrong as wrong:
        raise UserError(f"the checkpoint's training state is not valid: "
                        f"{printable(wrong)}") from None
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


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
        raise UserError(f"{printable(path)} holds no weights: it is neither a checkpoint nor a "
                        f"state dict")
    return content


def load_fitting(model: DiT, weights: dict[str, Tensor]) -> list[str]:
    """Copy every tensor whose name and shape are those of `model`; say which do not fit."""
    own, said = model.state_dict(), []
    for name in sorted(set(own) | set(weights)):
        w = weights.get(name)
        if w is None:
            said.append(f"{name}: not in the file")
        elif name not in own:
            said.append(f"{printable(name)}: not in this model")
        elif own[name].shape != w.shape:
            said.append(f"{name}: {tuple(w.shape)} in the file, {tuple(own[name].shape)} here")
        elif not w.is_floating_point() or not w.isfinite().all():
            said.append(f"{name}: not finite numbers in the file")
        else:
            own[name].copy_(w)
    if len(said) == len(set(own) | set(weights)):
        raise UserError("--init-from: not one tensor fits this model "
                        f"(for example {said[0]}); check --model and --image-size")
    return said


def read_any(path: Path) -> object:
    """What `--init-from` may be given: a checkpoint of this project, checked, or any archive."""
    content = read_archive(path)
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    return _valid(content, path, full=False) if ours else content
