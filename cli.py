"""What every command shares: errors in one line, flags that help, seeds that do not collide.

Not needed to understand DiT.
"""

import argparse
import difflib
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable

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
        print("error: out of GPU memory: a smaller --batch-size needs less", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
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


def number(kind: type, low: float, high: float = float("inf"), open_high: bool = False):
    """A type for argparse: an int or float from low to high (high itself excluded: open_high)."""
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_high and value == high) or abs(value) == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    words = f"{'an integer' if kind is int else 'a number'} of at least {low:g}"
    words += f" and {'below' if open_high else 'at most'} {high:g}" if high != float("inf") else ""
    parse.__name__ = kind.__name__
    return parse


# ---------------------------------------------------------------- randomness


def mix_seed(*key) -> int:
    """A 32-bit seed from any numbers and words. A hash, because a CPU generator ignores the high
    32 bits of its seed, and because seed + step is the same for (0, 1) and (1, 0)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A random generator on `device` that is a function of `key` and the device type alone."""
    return torch.Generator(device).manual_seed(mix_seed(*key))
