"""Command lines: one-line errors, flag types, files that are written completely or not at all."""

import argparse
import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
OUTPUT, DATA, SHIPPED = ROOT / "output", ROOT / "data", ROOT / "assets" / "mnist.pt"


class UserError(Exception):
    """A user-facing error with its remedy, in one line; `run_command` prints it and exits."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------- messages


def printable(text: object, limit: int = 2000) -> str:
    """Text from anywhere, safe on a terminal: control characters escaped, at most `limit` long."""
    text = str(text).encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else text[:limit] + " ..."


def say(*lines: str) -> None:
    """Print lines above any progress bar, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            tqdm.write(printable(line), file=sys.stdout)
        sys.stdout.flush()


def warn(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(printable(f"warning: {line}"), file=sys.stderr)


def short(path: Path) -> str:
    """A path as a user would type it: relative to the current directory where it is inside."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).resolve().relative_to(Path.cwd()))
    return str(path)


def reason(error: BaseException) -> str:
    """Why it failed: the system's words for an OSError, else the start of the message."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(" ".join(text.split()), 200)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main and exit. What the user can change is one line, a bug a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                          # closed
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")       # what its encoding lacks
    try:
        if {"RANK", "WORLD_SIZE"} & os.environ.keys() and "MASTER_ADDR" not in os.environ:
            raise UserError("RANK or WORLD_SIZE is set, but not by torchrun: unset both")
        sys.exit(main())
    except UserError as error:
        message, status = str(error), error.status
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)       # where all processes meet the same error, rank 0's is shown first
    except BrokenPipeError:                             # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as error:
        message, status = f"{error.filename or 'error'}: {reason(error)}", 2
    except (MemoryError, RuntimeError) as error:        # torch's out-of-memory errors included
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        message, status = "out of memory: a smaller --batch-size, --model or --image-size", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(printable(f"error: {message}"), file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UserError(f"{message}; --help shows every flag")


def number(kind: type, low: float, high: float = 1e9):
    """An argparse type: an int or float from low to high."""
    def parse(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__          # argparse: "invalid int value: 'x'"
    return parse


COUNT, SEED = number(int, 1), number(int, 0, 2**63 - 1)


# ---------------------------------------------------------------- files


def check_target(path: Path, force: bool = False, suffix: str | None = None) -> None:
    """Raise UserError, before any work, unless `path` can be written without overwriting."""
    path = Path(path)
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{path} does not end in {suffix}")
    if path.is_dir():
        raise UserError(f"{path} is a folder")
    if os.path.lexists(path) and not force:
        raise UserError(f"{path} exists: --force overwrites it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {reason(error)}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} cannot be written in")


def next_free(stem: str) -> Path:
    """The first of output/stem.png, output/stem-2.png ... that does not exist."""
    paths = (OUTPUT / f"{stem}{f'-{i}' * (i > 1)}.png" for i in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def atomic_write(path: Path, write: Callable) -> None:
    """write(file) into a temporary file beside `path`, synced to disk, then renamed to `path`: a
    reader sees the old file or the new one, complete. Raises OSError and leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError):     # torch.save's exception for a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    if os.name != "nt":                         # the directory entry, too
        entry = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):      # CIFS and vboxsf cannot: the file is there
            os.fsync(entry)
        os.close(entry)
