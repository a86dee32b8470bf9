"""Checkpoints: written atomically, and validated as untrusted input when read.

A checkpoint is a dict in torch's zip format, made of tensors, numbers, strings, lists, dicts:

    format         "dit-lesson/1"
    step           number of updates made
    config         network, model        a name of components.NETWORKS, and its arguments
                   process, diffusion    a name of components.PROCESSES, and its arguments
                   data                  data set, its size and digest
                   recipe                every flag of the training run
                   sampling              sampler, steps, eta, cfg_scale: sample.py's defaults
    class_names    one string per class
    ema            the averaged weights (float16 in a shared checkpoint, else float32)
    model, opt, scaler       in a full checkpoint: what `--resume` needs as well

Older files lack some keys of config; `load` returns them with those keys filled in.
"""

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
from torch import Tensor, nn

from support import components
from support.cli import UserError, atomic_write, reason, shorten

FORMAT = "dit-lesson/1"
_SCALER = dict(scale=float, growth_factor=float, backoff_factor=float, growth_interval=int,
               _growth_tracker=int)         # of torch.amp.GradScaler, which fp16 needs


# ---------------------------------------------------------------- writing


def save(path: Path, state: dict) -> None:
    """Write a checkpoint atomically. Raises OSError (a full disk ...)."""
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def shared(state: dict) -> dict:
    """A checkpoint to publish: the EMA weights alone, in half precision, and no path of the
    machine that made it. Raises UserError where a weight overflows."""
    ema = {name: w.half() for name, w in state["ema"].items()}
    for name, w in ema.items():
        if not w.isfinite().all():
            raise UserError(f"ema[{name!r}] is too large for half precision")
    recipe = dict(state["config"]["recipe"], data_dir="data", dataset=state["config"]["data"].get(
        "dataset", "unknown"))
    return dict(step=state["step"], config=dict(state["config"], recipe=recipe),
                class_names=state["class_names"], ema=ema)


# ---------------------------------------------------------------- reading


class Damaged(UserError):
    """The file's content is wrong, and will be on every other attempt."""


def read_archive(path: Path) -> object:
    """The content of a file written by torch.save, on the CPU; no code in it is run. (Of a
    *.safetensors: support/safetensors_folder.py.)

    Raises UserError where the file is missing or cannot be read; Damaged where it is not such an
    archive, fails its checksum, claims tensors larger than itself, or asks for more than tensors
    and plain values (and argparse.Namespace, which the published training checkpoints hold).
    """
    name = path
    if str(path).endswith(".safetensors"):
        from support import safetensors_folder      # an optional package; imports this module
        return safetensors_folder.read(Path(path))
    try:
        if not os.path.isfile(path):
            raise UserError(f"{name} is not a file" if os.path.exists(path) else
                            f"{name} does not exist")
        if not zipfile.is_zipfile(path):
            raise Damaged(f"{name} is not a checkpoint: not a zip archive as torch.save writes it, "
                          f"or truncated (bare pickles are refused, since they can run code)")
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")         # we report the error ourselves
            with zipfile.ZipFile(path) as archive:
                _check_archive(archive, os.path.getsize(path))
            return torch.load(path, map_location="cpu", weights_only=True)
    except _Invalid as invalid:
        raise Damaged(f"{name} is refused: {shorten(invalid)}") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name} cannot be read: {reason(error)}") from None
    except Exception as error:      # zipfile, pickle and torch raise many types on bad bytes
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(f"{name} cannot be read: out of memory") from None
        raise Damaged(f"{name} is damaged or not a checkpoint ({type(error).__name__})") from None


class _Invalid(Exception):
    pass


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Invalid(message)


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Check all that can be known of a torch archive before a tensor is made from it."""
    entries = archive.infolist()
    _require(all(e.compress_type == zipfile.ZIP_STORED for e in entries)
          and sum(e.file_size for e in entries) <= size, "its records claim more than it holds")
    _require(len({e.filename.lower() for e in entries}) == len(entries), "two records share a name")
    damaged = archive.testzip()         # torch.load does not verify checksums
    _require(damaged is None, f"record {damaged} is damaged")
    top = entries[0].filename.split("/")[0] if entries else ""
    sizes = {e.filename: e.file_size for e in entries}
    _require(f"{top}/data.pkl" in sizes, "it has no data.pkl: not an archive of torch.save")
    content = archive.read(f"{top}/data.pkl")
    for opcode, value, _ in pickletools.genops(content):
        _require(opcode.name not in ("PUT", "LONG_BINPUT") or value < len(content),
              "its pickle is malformed")          # pickle would allocate a table of that length
    _Claims(content, {name[len(top) + 1:]: n for name, n in sizes.items()}, size).load()


# The storages that a checkpoint's pickle may ask for, and the bytes of a number in each.
_STORAGES = dict(DoubleStorage=8, FloatStorage=4, HalfStorage=2, BFloat16Storage=2, LongStorage=8,
                 IntStorage=4, ShortStorage=2, CharStorage=1, ByteStorage=1, BoolStorage=1)


class _Claims(pickle.Unpickler):
    """Replays the pickle of an archive with plain values in place of tensors. Raises _Invalid for
    sizes that the records do not hold and for any other global."""

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
        _require((module, name) in allowed, f"its pickle asks for {module}.{name}, and could run "
                                         f"code: only tensors and plain values are read")
        return allowed[module, name]

    def persistent_load(self, claim: tuple) -> tuple[int, int]:
        _storage, width, key, _device, count = claim
        _require(self.records.get(f"data/{key}") == count * width and count >= 0,
              f"record data/{key} does not have the {count * width:,} bytes that it claims")
        return width, count

    def tensor(self, storage: tuple[int, int], offset: int, shape: tuple, stride: tuple, *rest):
        (width, count), numel = storage, math.prod(shape)
        self.budget -= numel * width
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        _require(min(0, offset, *shape, *stride) >= 0 and (numel == 0 or last < count)
              and numel <= count and self.budget >= 0,
              f"it claims a tensor of {numel * width:,} bytes that it does not hold")
        _require(len(rest) == 2, "a tensor in it is not a plain one")


def load(path: Path, full: bool = False) -> dict:
    """Read a checkpoint of this project and validate every part that is used; see the top.

    full: it must also hold model, opt and scaler. Raises UserError naming what is wrong.
    """
    return validate(read_archive(path), path, full)


def validate(state: object, path: Path, full: bool = False) -> dict:
    """What `load` does with the content of a file."""
    name = path
    if not isinstance(state, dict) or not isinstance(state.get("format"), str):
        raise UserError(f"{name} is not a checkpoint of this project (weights of the published "
                        f"code go to train_mnist.py --init-from)")
    if state["format"] != FORMAT:
        raise UserError(f"{name} has format {shorten(state['format'])}; this version reads "
                        f"{FORMAT}")
    if full and "opt" not in state and "model" not in state:
        raise UserError(f"{name} holds the EMA weights alone and cannot be resumed: "
                        f"--init-from {name} starts a new run from them")
    try:
        config = _checked_config(state)
        for key in ("ema", "model") if full or "model" in state else ("ema",):
            _check_weights(_get(state, key, dict, "checkpoint"), config, key)
        if full:
            _get(state, "opt", dict, "checkpoint")
            scaler = _get(state, "scaler", dict, "checkpoint")
            for key, kind in _SCALER.items() if scaler else ():
                _get(scaler, key, kind, "scaler", lambda v: 0 <= v < 2**31)
    except _Invalid as invalid:
        raise Damaged(f"{name} is not a valid checkpoint: {shorten(invalid)}") from None
    except UserError as error:      # not damaged: another version's network or process
        raise UserError(f"{name}: {error}") from None
    return state


def _get(holder: dict, key: str, kind: type | tuple, where: str, good: Callable = lambda v: True):
    _require(isinstance(holder, dict) and key in holder, f"{where} lacks {key!r}")
    value = holder[key]
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right or not good(value):
        raise _Invalid(f"{where}[{key!r}] is {value if right else type(value)!r}")
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
    """Validate step, config and class_names; fill in what older files lack. Returns config."""
    _get(state, "step", int, "checkpoint", lambda v: 0 <= v < 2**53)
    config = _get(state, "config", dict, "checkpoint")
    _require(_plain(config), "config holds more than plain values")
    names = _get(state, "class_names", list, "checkpoint")
    _require(bool(names) and all(isinstance(n, str) for n in names), "class_names are not strings")
    for key in ("model", "diffusion", "data", "recipe", "sampling"):
        _get(config, key, dict, "config")

    if "prediction" in config:          # older files keep it beside the arguments of the process
        config["diffusion"] = {"prediction": config.pop("prediction"), **config["diffusion"]}
    for name, part, find in [("network", "model", components.network_class),
                             ("process", "diffusion", components.process_class)]:
        cls = find(_get({"network": "dit", "process": "ddpm", **config}, name, str, "config"))
        try:
            config[part] = components.check_arguments(cls, config[part])
        except ValueError as error:
            raise _Invalid(f"config[{part!r}]: {error}") from None
        config.setdefault(name, {"network": "dit", "process": "ddpm"}[name])
    _require(config["model"]["num_classes"] == len(names), "class_names do not fit num_classes")

    try:
        process = components.process_class(config["process"])(**config["diffusion"])
    except Exception as error:      # any combination of numbers may come from a damaged file
        raise _Invalid(f"config['diffusion']: {shorten(error)}") from None
    sampling, where = config["sampling"], "config['sampling']"
    _get(sampling, "sampler", str, where, lambda v: v in components.sampler_names(process))
    _get(sampling, "steps", int, where, lambda v: 0 < v <= process.num_timesteps)
    _get(sampling, "eta", (int, float), where, lambda v: 0 <= v <= 1)
    _get(sampling, "cfg_scale", (int, float), where, lambda v: -100 <= v <= 100)
    return config


def _check_weights(weights: dict, config: dict, key: str) -> None:
    """The tensors must be exactly those of the network that the config describes, which is built
    without memory (on the meta device), and only if the file has as many blocks as it claims."""
    model = config["model"]
    for name, w in weights.items():
        _require(isinstance(name, str) and isinstance(w, Tensor), f"{key}[{name!r}] is no tensor")
    blocks = {n.split(".")[1] for n in weights if n.startswith("blocks.") and n.count(".") > 1}
    _require(model.get("depth", 0) in (0, len(blocks)),
             f"config claims {model.get('depth')} blocks, {key} has {len(blocks)}")
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            wanted = components.network_class(config["network"])(**model).state_dict()
    except Exception as error:      # any combination of sizes may come from a damaged file
        raise _Invalid(f"config['model']: {shorten(error)}") from None
    for name in sorted(set(wanted) ^ set(weights)):
        raise _Invalid(f"{key} {'lacks' if name in wanted else 'has an unknown'} {name!r}")
    _require(len({w.untyped_storage().data_ptr() for w in weights.values()}) == len(weights),
             f"two tensors of {key} share their storage")       # it would be duplicated
    for name, w in weights.items():
        what = f"{key}[{name!r}]"
        _require(w.shape == wanted[name].shape,
                 f"{what} has shape {tuple(w.shape)}, not {tuple(wanted[name].shape)}")
        _require(w.is_floating_point(), f"{what} holds {w.dtype}, not floats")
        _require(bool(w.isfinite().all()), f"{what} holds numbers that are not finite")


# The state that each optimizer keeps of a parameter, once it has made a step.
_MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def restore_optimizer(opt: torch.optim.Optimizer, saved: object) -> None:
    """Load an optimizer's state_dict() from a checkpoint: its moments only, since its options are
    those that `opt` was made with. Raises UserError where they do not fit."""
    params = [p for group in opt.param_groups for p in group["params"]]
    wanted = next(_MOMENTS[c.__name__] for c in type(opt).__mro__ if c.__name__ in _MOMENTS)
    try:
        state = _get(saved, "state", dict, "opt")
        _require(not state or set(state) == set(range(len(params))),
              f"opt has the state of {len(state)} parameters, not {len(params)}")
        for i, moments in state.items():
            _require(isinstance(moments, dict) and set(moments) == wanted,
                  f"opt lacks {' or '.join(sorted(wanted))} of parameter {i}")
            for key, w in moments.items():
                shape = torch.Size() if key == "step" else params[i].shape
                _require(isinstance(w, Tensor) and w.is_floating_point() and w.shape == shape
                      and bool(w.isfinite().all()) and (key != "step" or 0 <= w < 2**53),
                      f"opt's {key} of parameter {i} is not a tensor of {tuple(shape)} numbers")
                _require(key != "exp_avg_sq" or bool((w >= 0).all()), f"opt's {key} is negative")
    except _Invalid as invalid:
        raise UserError(f"the checkpoint's training state is not valid: "
                        f"{shorten(invalid)}") from None
    opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


def build(state: dict, weights: str = "ema", device: torch.device | str = "cpu"):
    """(network, process) of a checkpoint, on `device`; the network float32, in eval mode."""
    if weights not in state:
        raise UserError(f"this checkpoint holds the EMA weights alone, no {weights!r} weights")
    config = state["config"]
    model = components.network_class(config["network"])(**config["model"])
    model.load_state_dict(state[weights])
    process = components.process_class(config["process"])(**config["diffusion"])
    return model.eval().to(device), process.to(device)


# ---------------------------------------------------------------- other people's weights


def weights_in(content: object, path: Path) -> dict[str, Tensor]:
    """The weights in what `read_archive` returned: a checkpoint of this project, a training
    checkpoint of the published code (both: its `ema`), or a bare state dict."""
    if isinstance(content, dict) and isinstance(content.get("ema"), dict):
        content = content["ema"]
    if not isinstance(content, dict) or not content or not all(
            isinstance(n, str) and isinstance(w, Tensor) for n, w in content.items()):
        raise UserError(f"{path} holds no weights: it is neither a checkpoint nor a state dict")
    return content


def load_fitting(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Copy every tensor whose name and shape are those of `model`. Returns a line for each of the
    others; raises UserError where none fits."""
    own, messages = model.state_dict(), []
    for name in sorted(set(own) | set(weights)):
        w = weights.get(name)
        if w is None:
            messages.append(f"{name}: not in the file")
        elif name not in own:
            messages.append(f"{name}: not in this model")
        elif own[name].shape != w.shape:
            messages.append(f"{name}: {tuple(w.shape)} in the file, {tuple(own[name].shape)} here")
        elif not w.is_floating_point() or not w.isfinite().all():
            messages.append(f"{name}: not finite numbers in the file")
        else:
            own[name].copy_(w)
    if len(messages) == len(set(own) | set(weights)):
        raise UserError("--init-from: not one tensor fits this model "
                        f"(for example {messages[0]}); check --model and --image-size")
    return messages


def read_any(path: Path) -> object:
    """What `--init-from` accepts: a checkpoint of this project, validated, or any archive."""
    content = read_archive(path)
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    return validate(content, path, full=False) if ours else content
