"""A checkpoint as a folder that holds config.json and model.safetensors.

config.json is a checkpoint without its tensors: format, step, config, class_names; the tensors are
the EMA weights. `python -m tools.export CKPT --to safetensors DIR` writes such a folder, and every
command that takes a checkpoint reads it. Needs the package safetensors.
"""

import json
import os
from pathlib import Path

from support.checkpoints import Damaged
from support.cli import UserError, reason, shorten

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_CONFIG = 2**20              # bytes
DTYPES = ("F16", "BF16", "F32", "F64")


def package():
    """The package safetensors. Raises UserError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("this needs the package safetensors: pip install safetensors") from None
    return safetensors


def read(path: Path) -> dict:
    """What `checkpoints.read_archive` returns for a checkpoint, from FOLDER/model.safetensors and
    the config.json beside it; `checkpoints.load` validates it. Raises UserError, and Damaged where
    the content is wrong."""
    for file in (path, config := path.with_name(CONFIG)):
        if not os.path.isfile(file):
            raise UserError(f"{file} is not a file" if os.path.exists(file) else
                            f"{file} does not exist")
    safetensors = package()
    try:
        with open(config, "rb") as file:
            text = file.read(MAX_CONFIG + 1)
        if len(text) > MAX_CONFIG:
            raise ValueError(f"it has over {MAX_CONFIG:,} bytes")
        state = json.loads(text)
        if not isinstance(state, dict) or {"ema", "model", "opt"} & set(state):
            raise ValueError("it is not the description of a checkpoint")
    except OSError as error:
        raise UserError(f"{config} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{config} is damaged or not a checkpoint's ({reason(error)})") from None
    try:
        with safetensors.safe_open(path, "pt") as file:     # checks sizes before it reads
            for name in file.keys():
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                    raise Damaged(f"{path}: {shorten(name)} holds {dtype}, not floats")
            # copies: the file is mapped into memory, and may change
            state["ema"] = {name: file.get_tensor(name).clone() for name in file.keys()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except Exception as error:      # SafetensorError, RuntimeError
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(f"{path} cannot be read: out of memory") from None
        raise Damaged(f"{path} is damaged or not a safetensors file ({reason(error)})") from None
    return state
