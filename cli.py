"""What every command shares: errors in one line, flags that help, seeds that do not collide.

Not needed to understand DiT.
"""

import argparse
import difflib
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# ---------------------------------------------------------------- errors that users see


class UserError(Exception):
    """What went wrong and what would be right, in one line; `cli` prints it and exits."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def printable(text) -> str:
    """Text from a file, safe to print: control characters escaped, cut at 300 characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in
                   str(text).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= 300 else text[:297] + "..."


def cli(main: Callable[[], int | None]) -> None:
    """Run a script's main: a UserError is one line on standard error, never a traceback."""
    try:
        status = main() or 0
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            time.sleep(2)       # where all ranks meet the same error, rank 0 alone tells it
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)
        status = error.status
    except torch.OutOfMemoryError:
        print("error: out of GPU memory: a smaller --batch-size, or fewer images, needs less",
              file=sys.stderr)
        status = 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        print("error: out of memory: a smaller --batch-size or --image-size needs less",
              file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:    # a name that is too long, a folder that vanished ...
        name = "" if error.filename is None else f"{printable(error.filename)}: "
        print(f"error: {name}{printable(error.strerror or error)}", file=sys.stderr)
        status = 2
    sys.stderr.flush()
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, and name the flag that was probably meant."""

    def error(self, message: str):
        known = [o for action in self._actions for o in action.option_strings]
        for word in re.findall(r"unrecognized arguments: (.*)", message):
            close = difflib.get_close_matches(word.split()[0].split("=")[0], known, 1)
            message += f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{message}; --help shows every flag")


def number(kind: type, low: float, high: float | None = None, open_high: bool = False):
    """A type for argparse: an int or float from low to high (high itself excluded: open_high). An
    int is at most a billion unless `high` says otherwise: more is a slip of the keyboard."""
    if high is None:
        high = 10**9 if kind is int else float("inf")

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_high and value == high) or abs(value) == float("inf"):
            raise argparse.ArgumentTypeError(f"{printable(text)} is not {words}")
        return value
    words = f"{'an integer' if kind is int else 'a number'} of at least {low:g}"
    words += f" and {'below' if open_high else 'at most'} {high:,}" if high != float("inf") else ""
    parse.__name__ = kind.__name__
    return parse


COUNT, SIDE, BATCH = number(int, 1), number(int, 1, 4096), number(int, 1, 65_536)
SEED = number(int, 0, 2**63 - 1)


def check_target(path: Path, force: bool, suffix: str) -> None:
    """Before any work: may this file be written, and would it overwrite one?"""
    name = printable(path)
    if path.suffix.lower() != suffix:
        raise UserError(f"{name} must be a file name that ends in {suffix}")
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder: name a file in it")
    if os.path.lexists(path) and not force:
        raise UserError(f"{name} exists: --force overwrites it")
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UserError(f"{name} cannot be written: a name may have 255 bytes")
    parent = path.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):    # what permissions say is not the whole truth
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be written: no writing in {printable(parent)} "
                        f"({getattr(error, 'strerror', None) or error})") from None


# ---------------------------------------------------------------- randomness


def mix_seed(*key) -> int:
    """A 32-bit seed from any numbers and words. A hash, because a CPU generator ignores the high
    32 bits of its seed, and because seed + step is the same for (0, 1) and (1, 0)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A random generator on `device` that is a function of `key` and the device type alone."""
    return torch.Generator(device).manual_seed(mix_seed(*key))
