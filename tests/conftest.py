"""Tests need no network, no GPU and nothing outside the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import checkpoints  # noqa: E402
import data  # noqa: E402
import dit  # noqa: E402
import ranks  # noqa: E402
import train_mnist  # noqa: E402

TINY = "DiT-Test/7"
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}    # a process that a test starts
FAST = ("--dataset", "glyphs", "--model", TINY, "--batch-size", "8", "--log-every", "5",
        "--preview-every", "1000", "--save-every", "1000", "--warmup", "2")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: the long form, minutes to an hour (run with --long)")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the long tests")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long test: pytest --long runs it"))


@pytest.fixture(autouse=True)
def without_gpu(request, monkeypatch):
    """Nothing picks a GPU by itself, where there is one, but in the tests named for it."""
    if "gpu" not in request.node.name:
        monkeypatch.setattr(ranks, "fastest_device", lambda: "cpu")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*flags) -> exit status: train_mnist.main in an empty folder, with a tiny model on 100
    glyphs unless flags say otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dit.MODELS, TINY,
                        dict(patch_size=7, hidden_size=16, depth=2, num_heads=2))
    draw = data.draw_glyphs
    monkeypatch.setattr(data, "draw_glyphs", lambda count, seed=0: draw(min(count, 100), seed))

    def run(*flags) -> int:
        flags = [str(f) for f in flags]
        resumes = "--resume" in flags
        return train_mnist.main([*(() if resumes else FAST), *flags])

    return run


@pytest.fixture
def checkpoint(train):
    """The path of a full checkpoint: the tiny model after 3 steps."""
    assert train("--steps", 3, "--out", "run") == 0
    return Path("run/step_0000003.pt").resolve()


def command(*words, cwd, **options) -> subprocess.Popen:
    """A script of the project as a user runs it: its own process, one thread."""
    environment = {**os.environ, **ALONE, "PYTHONUNBUFFERED": "1", "COLUMNS": "100",
                   **options.pop("env", {})}
    words = [str(w) for w in words]
    return subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=cwd, text=True,
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
