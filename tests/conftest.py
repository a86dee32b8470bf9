"""Tests need no network, no GPU and nothing outside the repository."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dit
import train_mnist
from support import checkpoints, data, distributed, paths
from support import run as run_module
from support.folders import checkpoints_in
from support.preview import Preview

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)

TINY = "DiT-Test/7"
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
        monkeypatch.setattr(distributed, "fastest_device", lambda: "cpu")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, where output/ and data/ are found as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    return tmp_path


_draw_glyphs = functools.cache(data.draw_glyphs)        # a function of its arguments


def few_glyphs(count: int, seed: int = 0) -> data.ImageSet:
    drawn = _draw_glyphs(min(count, 100), seed)
    return dataclasses.replace(drawn, images=drawn.images.clone(), labels=drawn.labels.clone())


@pytest.fixture
def train(here, monkeypatch):
    """train(*flags) -> exit status: train_mnist.main in an empty folder, with a tiny model on 100
    glyphs unless flags say otherwise."""
    monkeypatch.setitem(dit.MODELS, TINY,
                        dict(patch_size=7, hidden_size=16, depth=2, num_heads=2))
    monkeypatch.setattr(data, "draw_glyphs", few_glyphs)
    # most of a tiny run's time would go to pictures
    monkeypatch.setattr(train_mnist, "Preview", functools.partial(Preview, steps=2))
    monkeypatch.setattr(run_module, "loss_curve", lambda folder: None)

    def run(*flags) -> int:
        flags = [str(f) for f in flags]
        resumes = "--resume" in flags
        return train_mnist.main([*(() if resumes else FAST), *flags])

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


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that tools.figures makes."""
    pytest.importorskip("matplotlib")
    from tools import figures                   # few tests need it

    kept, new = [], figures.new_figure
    monkeypatch.setattr(figures, "new_figure", lambda **o: kept.append(new(**o)) or kept[-1])
    return kept


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


def tensors_equal(a, b) -> bool:
    """Are two nests of dicts, lists, tensors and numbers the same, bit for bit?"""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return a == b


def load(path) -> dict:
    return checkpoints.load(Path(path), full=True)
