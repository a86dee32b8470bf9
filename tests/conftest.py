"""Tests need no network, no GPU and nothing outside the repository."""

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dit
import train_mnist
from support import command as support_command
from support import data
from support.checkpoint import checkpoints_in
from support.command import UserError

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)     # a script's background job ignores it

TINY, TINY_SIZE = "DiT-Test/7", dict(patch_size=7, hidden_size=16, depth=2, num_heads=2)
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}    # a process that a test starts
FAST = ("--dataset", "glyphs", "--model", TINY, "--batch-size", "8", "--log-every", "5",
        "--preview-every", "1000", "--save-every", "1000", "--warmup", "2")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the long tests")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long test: pytest --long runs it"))


@pytest.fixture(autouse=True)
def without_gpu(request, monkeypatch):
    """No test picks a GPU by itself, except those named for it."""
    if "gpu" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, where output/ and data/ are found as well."""
    monkeypatch.chdir(tmp_path)
    for name in ("OUTPUT", "DATA"):
        before = getattr(support_command, name)
        for module in list(sys.modules.values()):       # some have imported the name
            if vars(module).get(name) is before:
                monkeypatch.setattr(module, name, tmp_path / name.lower())
    return tmp_path


_draw_glyphs = functools.cache(data.draw_glyphs)


def few_glyphs(count: int, seed: int = 0) -> data.ImageSet:
    return dataclasses.replace(_draw_glyphs(min(count, 100), seed))


@pytest.fixture
def train(here, monkeypatch):
    """train(*flags) -> exit status: train_mnist.main in an empty folder, with a tiny model on 100
    glyphs unless flags say otherwise."""
    monkeypatch.setitem(dit.MODELS, TINY, TINY_SIZE)
    monkeypatch.setattr(data, "draw_glyphs", few_glyphs)
    # most of a tiny run's time would go to pictures
    monkeypatch.setitem(train_mnist.SAMPLING, "steps", 2)

    def run(*flags) -> int:
        flags = [str(f) for f in flags]
        return train_mnist.main([*(() if {"--resume", "--config"} & set(flags) else FAST), *flags])

    return run


@pytest.fixture(scope="session")
def run_cache(tmp_path_factory) -> tuple[Path, dict]:
    return tmp_path_factory.mktemp("trained"), {}


@pytest.fixture
def trained(train, here, run_cache):
    """trained(*flags, out="run") -> the last checkpoint of a run with these flags, in a copy that
    is this test's own, at `out`. Each set of flags is trained once in a session."""
    parent, runs = run_cache

    def copy(*flags, out="run") -> Path:
        key = tuple(map(str, flags))
        if key not in runs:
            folder = parent / f"{len(runs):03d}"
            assert train(*flags, "--out", folder) == 0
            runs[key] = folder
        shutil.copytree(runs[key], here / out)
        return checkpoints_in(here / out)[-1]

    return copy


@pytest.fixture
def checkpoint(trained) -> Path:
    """The path of a full checkpoint: the tiny model after 3 steps, in the run folder run/."""
    return trained("--steps", 3)


def command(*words, cwd, **options) -> subprocess.Popen:
    """A script of the project as a user runs it: its own process, one thread. It uses the
    repository's output/: name every file that it writes.

    words: a script at the root and its flags, or "-m", "tools.NAME" (with cwd=ROOT).
    """
    environment = {**os.environ, **ALONE, "PYTHONUNBUFFERED": "1", "COLUMNS": "100",
                   **options.pop("env", {})}
    script = str(words[0]) if words[0] == "-m" else str(ROOT / words[0])
    return subprocess.Popen([sys.executable, script, *map(str, words[1:])], cwd=cwd, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **options)


def refused(main, *argv) -> str:
    """The one line with which a command refuses these arguments, with exit status 2."""
    with pytest.raises(UserError) as caught:
        main([str(a) for a in argv])
    assert "\n" not in str(caught.value) and caught.value.status == 2
    return str(caught.value)


def tensors_equal(a, b) -> bool:
    """Are two nests of dicts, lists, tensors and numbers the same, bit for bit?"""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return a == b
