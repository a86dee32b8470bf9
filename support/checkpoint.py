"""Checkpoints and run folders: written atomically, checked when read, found by name.

A checkpoint is a dict that torch.save wrote:

    format         "dit-lesson/1"
    step           number of updates made
    config         network, model: its name and arguments; process, diffusion: the same; sampling:
                   sample.py's defaults; data: what it was trained on; recipe: every flag
    class_names    one string per class
    ema            the averaged weights (float16 in a shared checkpoint, else float32)
    model, opt     in a full checkpoint: what `--resume` needs as well
"""

import contextlib
import errno
import json
import os
import re
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

from support import registry
from support.classes import find_class
from support.command import OUTPUT, SHIPPED, UserError, atomic_write, reason, say, short, warn

FORMAT = "dit-lesson/1"


class Damaged(UserError):
    """The file's content is wrong, and will be on every other attempt."""


def save(path: Path, state: dict) -> None:
    """Write a checkpoint atomically. Raises OSError (a full disk ...)."""
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def read_archive(path: Path) -> object:
    """The content of a file that torch.save wrote, on the CPU; no code in it is run. Raises
    UserError where it is missing or cannot be read, Damaged where it is anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(path) as archive:      # torch.load verifies none of this
                records = archive.infolist()
                require(sum(r.file_size for r in records) <= path.stat().st_size,
                        "its records claim more than it holds")
                require(not any(r.external_attr & 0x10 for r in records),   # torch would skip it
                        "a record is marked as a folder")
                require(archive.testzip() is None, "a checksum is wrong")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except Exception as error:      # zipfile, pickle and torch raise many types on bad bytes
        raise Damaged(f"{path} is damaged or not a checkpoint ({reason(error)})") from None


def load(path: Path, full: bool = False) -> dict:
    """Read a checkpoint and check it against the network and the process that it describes.

    full: it must hold what --resume needs. Raises UserError.
    """
    return validate(read_archive(path), path, full)


def validate(state: object, path: Path, full: bool = False) -> dict:
    """What `load` does with the content of a file."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (format {FORMAT}); for "
                        f"published weights see docs/interchange.md")
    if full and "model" not in state:
        raise UserError(f"{path} holds the EMA weights alone: --init-from {path} starts a new run "
                        f"from them")
    try:
        config, names = state["config"], state["class_names"]
        require(type(state["step"]) is int and 0 <= state["step"] < 2**53, "its step")
        require(all(type(config[key]) is dict for key in ("model", "diffusion", "sampling", "data",
                                                          "recipe")), "its config")
        require(all(isinstance(v, str | bool) or abs(v) < 2**20 for part in ("model", "diffusion")
                    for v in config[part].values()), "its arguments")
        for kind, known in ("network", registry.NETWORKS), ("process", registry.PROCESSES):
            if config[kind] not in known:
                raise UserError(f"{path}: {kind} {config[kind]!r} is unknown here: "
                                f"{', '.join(known)}")
        with torch.device("meta"):                      # takes no memory, whatever it claims
            require(config["model"].get("depth", 0) <= len(state["ema"]), "its depth")
            network = registry.NETWORKS[config["network"]](**config["model"])
        process = registry.PROCESSES[config["process"]](**config["diffusion"])
        sampling = config["sampling"]
        require(type(sampling["sampler"]) is str and type(sampling["steps"]) is int and
                0 < sampling["steps"] <= process.num_timesteps and 0 <= sampling["eta"] <= 1
                and abs(sampling["cfg_scale"]) <= 100, "its sampling")
        require(all(type(n) is str for n in names) and len(names) == network.num_classes,
                "its class names")
        shapes = {n: w.shape for n, w in network.state_dict().items()}
        for part in ("ema", "model") if full else ("ema",):
            require({n: w.shape for n, w in state[part].items()} == shapes,
                    f"the shapes of {part} are not those of its network")
            require(all(w.is_floating_point() and w.isfinite().all() for w in
                        state[part].values()), f"{part} is not finite")
    except UserError:
        raise
    except Exception as error:
        raise Damaged(f"{path} is damaged or not a checkpoint ({reason(error)})") from None
    return state


def build(state: dict, weights: str = "ema", device: torch.device | str = "cpu"):
    """(network, process) of a checkpoint, on `device`; the network float32, in eval mode."""
    if weights not in state:
        raise UserError(f"this checkpoint holds the EMA weights alone, no {weights!r} weights")
    config = state["config"]
    model = registry.NETWORKS[config["network"]](**config["model"])
    model.load_state_dict(state[weights])
    process = registry.PROCESSES[config["process"]](**config["diffusion"])
    return model.eval().to(device), process.to(device)


def restore(state: dict, model: nn.Module, ema: nn.Module, optimizers: list) -> None:
    """Load what --resume needs; the options of the optimizers are those they were made with."""
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for i, opt in enumerate(optimizers):
            params = [p for group in opt.param_groups for p in group["params"]]
            saved, fresh = state["opt"][i]["state"], opt.state_dict()
            require(not saved or saved.keys() == set(range(len(params))), "parameters are missing")
            for k, moments in saved.items():
                require(moments.keys() == saved[0].keys() and all(
                    w.shape in ((), params[k].shape) and w.isfinite().all()
                    for w in moments.values()), "its moments")
            opt.load_state_dict({**fresh, "state": saved})
    except Exception as error:
        raise UserError(f"the checkpoint's optimizer states do not fit ({reason(error)})") from None


def load_fitting(model: nn.Module, path: Path, class_names: list[str]) -> None:
    """--init-from: copy every tensor of a file (a checkpoint, or a state dict) whose name and shape
    are those of `model`, and print the names of the others. Of a checkpoint the class embeddings
    are matched by name (`find_class`)."""
    found, own, table = read_archive(path), model.state_dict(), "y_embedder.embedding_table.weight"
    weights = dict(found.get("ema", found)) if isinstance(found, dict) else {}
    if table in weights.keys() & own.keys() and "class_names" in found \
            and weights[table].shape[1:] == own[table].shape[1:]:
        rows = [find_class(name, found["class_names"]) for name in class_names]
        embeddings = own[table].clone()
        for i, row in enumerate([*rows, len(found["class_names"])]):        # and "no class"
            if row is not None:
                embeddings[i] = weights[table][row]
        weights[table] = embeddings
        if None in rows:
            say("classes without a namesake in the file, initialised: " + ", ".join(
                name for name, row in zip(class_names, rows, strict=True) if row is None))
    fits = {n: w for n, w in weights.items() if n in own and isinstance(w, Tensor)
            and w.shape == own[n].shape and w.is_floating_point() and w.isfinite().all()}
    if not fits:
        raise UserError(f"--init-from {path}: not one tensor fits this model; check --model and "
                        f"--image-size (published weights: python -m tools.convert import)")
    model.load_state_dict(fits, strict=False)
    say(f"{len(fits)} of {len(own)} tensors from {path}; initialised: "
        f"{', '.join(sorted(own.keys() - fits.keys())) or 'none'}")


# ---------------------------------------------------------------- run folders


def checkpoints_in(folder: Path) -> list[Path]:
    """The step_*.pt of a run folder, in the order of their steps."""
    found = [p for p in folder.glob("step_*.pt") if p.stem[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def newest_run(trained: bool = False) -> Path | None:
    """The run under output/ whose checkpoint is newest. trained: beyond step 0."""
    runs = [(path.stat().st_mtime_ns, path.parent) for folder in OUTPUT.glob("*/")
            for path in checkpoints_in(folder)[-1:] if not trained or int(path.stem[5:])]
    return max(runs)[1] if runs else None


def find_checkpoint(name: str | Path | None) -> Path:
    """The named file, or the last checkpoint of the named run folder; without a name that of the
    newest run under output/, else the one that ships."""
    folder = newest_run(trained=True) if name is None else Path(name)
    if folder is None:
        say(f"no run under {short(OUTPUT)} yet: using the checkpoint that ships, {short(SHIPPED)}")
        return SHIPPED
    if not folder.is_dir():
        return folder
    if not (found := checkpoints_in(folder)):
        raise UserError(f"{folder} holds no checkpoint (step_*.pt)")
    return found[-1]


def newest_valid(folder: Path) -> dict:
    """The last checkpoint of a folder that is not damaged. Damaged ones are named, and set aside
    once there is a valid one before them."""
    damaged = []
    for path in reversed(checkpoints_in(folder)):
        try:
            state = load(path, full=True)
        except Damaged as error:
            warn(f"{error}; taking the checkpoint before it")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.rename(f"{bad}.damaged")
        return state
    raise UserError(f"{folder} has no valid checkpoint to resume from: start a run in another "
                    f"--out")


def new_folder(label: str) -> Path:
    """Make output/NNN-label, numbered after the highest. No two processes get the same one."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", label)[:40]
    while True:
        taken = [int(m[1]) for p in OUTPUT.iterdir() if (m := re.match(r"(\d{3,})-", p.name))]
        folder = OUTPUT / f"{max(taken, default=0) + 1:03d}-{label}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def lock_folder(folder: Path):
    """A lock against a second process, which the system releases when this one ends. Some file
    systems (Lustre, some NFS) have none: a warning."""
    file = open(folder / "lock", "a+")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            warn(f"{folder} cannot be locked ({reason(error)}): start no second run in it")
            return file
        raise UserError(f"{folder} is in use by another process: choose another --out") from None
    return file


def read_metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a run's metrics, or of another file that has them by step; lines that a kill
    truncated are left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / name).read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
