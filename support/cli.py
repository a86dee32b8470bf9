"""Command lines: one-line errors, escaped output, flag types, checks of the files to be written."""

import argparse
import contextlib
import difflib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

# ---------------------------------------------------------------- output and errors


class UserError(Exception):
    """A user-facing error with its remedy, in one line; `run_command` prints it and exits."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def escape(text: object, limit: int = 2000) -> str:
    """Text that is safe on a terminal: control characters escaped, at most `limit` characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in
                   str(text).encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= limit else text[:limit - 3] + "..."


def say(*lines: str) -> None:
    """Print lines on standard output, escaped, above any progress bar."""
    for line in lines:
        tqdm.write(escape(line), file=sys.stdout)
    sys.stdout.flush()


def warn(line: str) -> None:
    """Print a warning on standard error, escaped, above any progress bar."""
    tqdm.write(escape(f"warning: {line}"), file=sys.stderr)


def shorten(value: object, limit: int = 200) -> str:
    """A value of unknown length, for a message."""
    text = str(value)
    return text if len(text) <= limit else text[:limit - 3] + "..."


def reason(error: BaseException) -> str:
    """Why it failed: the system's words for an OSError, else the exception's last line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return shorten(text.splitlines()[-1].strip("<>\t "))


@contextlib.contextmanager
def io_errors(message: str) -> Iterator[None]:
    """Turn an OSError of the block into UserError("<message>: <reason>")."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{message}: {reason(error)}") from None


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main and exit: an error is one line on standard error, never a traceback."""
    rank, status = int(os.environ.get("RANK", 0)), 2
    name = "error" if rank == 0 else f"error (rank {rank})"
    message = None
    try:
        status = main() or 0
    except UserError as error:
        if rank > 0:
            time.sleep(5)       # where all ranks meet the same error, torchrun shows rank 0's first
        message, status = str(error), error.status
    except torch.OutOfMemoryError:
        message = "out of GPU memory: a smaller --batch-size or fewer images need less"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "out of memory: a smaller --batch-size or --image-size needs less"
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:     # the reader of the pipe (`| head`) has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        message = (f"{error.filename}: " if error.filename is not None else "") + reason(error)
    if message is not None:
        print(escape(f"{name}: {message}"), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(status)


# ---------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the flag or choice that was probably meant.

    hints: what to say of a flag that does not exist, where a similar name would mislead.
    """

    def __init__(self, description: str, hints: dict[str, str] | None = None, **options):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.hints = hints or {}

    def error(self, message: str):
        known = [o for action in self._actions for o in action.option_strings]
        hint = ""
        if found := re.search(r"unrecognized arguments: ([^\s=]*)", message):
            hint = self.hints.get(found[1]) or _did_you_mean(found[1], known)
        elif found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            hint = _did_you_mean(found[1], [name.strip("'") for name in found[2].split(", ")])
        message += f" ({hint})" if hint else ""
        raise UserError(f"{message}; --help shows every flag")


def _did_you_mean(word: str, names: list[str]) -> str:
    """The name that is nearest to a word, as a question; "" where none is near."""
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), lower, 1)
    return f"did you mean {lower[close[0]]}?" if close else ""


def number(kind: type, low: float, high: float | None = None, open_high: bool = False):
    """An argparse type: an int or float from low to high (exclusive with open_high). Integers are
    at most a billion unless `high` says otherwise: more is almost certainly a typo."""
    if high is None:
        high = 10**9 if kind is int else float("inf")
    wanted = f"{'an integer' if kind is int else 'a number'} of at least {low:g}"
    if high == float("inf"):
        wanted = wanted.replace("a number", "a finite number")
    else:
        wanted += f" and {'below' if open_high else 'at most'} {high:,}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_high and value == high) or abs(value) == float("inf"):
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not {wanted}")
        return value

    parse.__name__ = kind.__name__
    return parse


COUNT, SIDE, BATCH = number(int, 1), number(int, 1, 4096), number(int, 1, 65_536)
SEED, SCALE = number(int, 0, 2**63 - 1), number(float, -100, 100)


# ---------------------------------------------------------------- files to be written


def check_target(path: Path, force: bool, suffix: str) -> None:
    """Raise UserError, before any work, unless `path` can be written without overwriting a file."""
    if path.suffix.lower() != suffix:
        raise UserError(f"{path} must be a file name that ends in {suffix}")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: name a file in it")
    if os.path.lexists(path) and not force:
        raise UserError(f"{path} exists: --force overwrites it")
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise UserError(f"{shorten(path)} cannot be written: a name may have 255 bytes")
    parent = path.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):    # permission bits alone do not decide this
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: no write access to {parent} "
                        f"({reason(error)})") from None


def next_free(parent: Path, stem: str, suffix: str) -> Path:
    """parent/stem-NNN.suffix, numbered after those that exist."""
    taken = [p.stem[len(stem) + 1:] for p in parent.glob(f"{stem}-*{suffix}")]
    number = max([int(n) for n in taken if n.isdecimal()], default=0) + 1
    return parent / f"{stem}-{number:03d}{suffix}"


def atomic_write(path: Path, write: Callable, sync: bool = True) -> None:
    """write(file) into a temporary file beside `path`, synced to disk, then renamed to `path`: a
    reader sees the old file or the new one, complete. Raises OSError and leaves the old file.
    sync=False: a power cut may undo it, but thousands of files take seconds, not minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")     # never a longer name
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError):     # torch.save's exception for a full disk
            raise OSError(str(error).splitlines()[0]) from None
        raise
    if sync and os.name != "nt":                # the directory entry, too
        entry = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)
