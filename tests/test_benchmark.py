"""tools/benchmark.py: what is timed, in what order, and what is printed."""

import contextlib
import dataclasses
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import dit
import train_mnist
from conftest import TINY, TINY_SIZE, few_glyphs, refused
from support import compute
from support.data import Batches
from support.muon import BatchedMuon
from tools import benchmark

CPU = torch.device("cpu")
ONCE = ("--model", TINY, "--batch-size", 4, "--device", "cpu", "--rounds", 1, "--steps-per-round",
        1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(dit.MODELS, TINY, TINY_SIZE)
    monkeypatch.setitem(dit.MODELS, "DiT-Test/4", TINY_SIZE | dict(patch_size=4))


@pytest.fixture
def rows(capsys):
    """rows(*flags) -> {name: its numbers} of every row that a call prints."""
    def run(*flags) -> dict[str, list[float]]:
        assert benchmark.main([str(f) for f in (*ONCE, *flags)]) == 0
        found = {}
        for line in capsys.readouterr().out.splitlines():
            if match := re.fullmatch(r"(\S.*?) {2,}([\d., ]+)", line):
                found.setdefault(match[1], [float(n.replace(",", "")) for n in match[2].split()])
        return found

    return run


def settings(**changed) -> Namespace:
    images = dataclasses.replace(few_glyphs(100), name="noise")
    return Namespace(**{
        **train_mnist.RECIPE, **train_mnist.PRESETS["cpu"], "batch_size": 6, "device": CPU,
        "compile": False, "sample": 3, "scaling": (), "profile": 0, "sizes": TINY_SIZE,
        "batches": Batches(images, 6, 0, CPU), **changed})


# ---------------------------------------------------------------- timing


def test_rounds_alternate_and_the_ratio_is_that_of_each_round(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    taken = dict(a=iter([9, 1, 2, 4]), b=iter([9, 4, 4, 4]))        # seconds; the first: warming up

    def work(name):
        order.append(name)
        clock[0] += next(taken[name])

    found = benchmark.time_rounds({name: lambda name=name: work(name) for name in "ab"}, 3, 2, CPU)
    assert "".join(order) == "ab" + "ab" * 3
    assert found["a"] == {"ms": 1000, "fastest": 500, "slowest": 2000, "speed-up": 1}
    assert found["b"] == {"ms": 2000, "fastest": 2000, "slowest": 2000, "speed-up": 0.5}


def test_each_round_is_timed_alone_and_beside_busy_processes(monkeypatch):
    events = []

    @contextlib.contextmanager
    def fake(count):
        events.append(count)
        yield

    monkeypatch.setattr(benchmark, "busy_processes", fake)
    found = benchmark.time_rounds({"a": lambda: events.append("a")}, 2, 1, CPU, busy=(1, 3))
    assert events == ["a", *[0, "a", 1, "a", 3, "a"] * 2]
    assert list(found) == ["a", "a, 1 busy", "a, 3 busy"]


def alive(pid: int) -> bool:
    """Is there such a process, and not a zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_busy_processes_compute_and_end_with_the_block_or_a_killed_parent():
    def children() -> set[int]:
        return {int(pid) for task in Path("/proc/self/task").iterdir()
                for pid in (task / "children").read_text().split()}

    def ticks(pid) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    before = children()
    with contextlib.suppress(KeyError), benchmark.busy_processes(2):
        pids, deadline = children() - before, time.time() + 20
        while any(ticks(pid) < 5 for pid in pids):
            assert time.time() < deadline
            time.sleep(0.02)
        raise KeyError
    assert len(pids) == 2 and not any(map(alive, pids))

    code = ("import subprocess, sys, os\np = subprocess.Popen([sys.executable, '-S', '-c', "
            "sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)\np.stdout.readline()\n"
            "print(p.pid, flush=True)\nos._exit(9)")
    pid = int(subprocess.run([sys.executable, "-c", code, benchmark.BUSY], capture_output=True,
                             text=True).stdout)
    deadline = time.time() + 20
    while alive(pid):
        assert time.time() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- what is timed


class Steps:
    """Stand-in for Run: the first three steps."""

    def __init__(self, args):
        self.args, self.device, self.precision, self.compiled = args, CPU, "fp32", False
        self.losses = []

    def steps(self):
        return range(3)

    def replayed(self, step):
        return step

    def random(self, step):
        return compute.StepRandom(CPU, 0, step, self.args.batch_size, slice(None))

    def log(self, *, loss, **numbers):
        self.losses.append(loss)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_our_step_is_that_of_training(optimizer):
    args = settings(optimizer=optimizer, label_dropout=0.5, ema_decay=0.5, warmup=2, steps=4)
    ours, same = benchmark.Ours(args, "fp32"), benchmark.Ours(args, "fp32")
    for a, b in ((same.model, ours.model), (same.ema, ours.ema)):
        a.load_state_dict(b.state_dict())
    before = [p.clone() for p in ours.ema.parameters()]
    for _ in range(3):
        ours()
    train_mnist.train(same.model, same.ema, same.optimizers, same.diffusion, args.batches,
                      Steps(args))
    for a, b in ((same.model, ours.model), (same.ema, ours.ema)):
        assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(before, ours.ema.parameters(), strict=True))


class Net(nn.Module):
    """Its output is scale * xt, and variance * xt for the variances."""
    null_class = 10

    def __init__(self, **sizes):
        super().__init__()
        assert sizes == TINY_SIZE | dict(learn_sigma=True)
        self.scale, self.variance = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((t.tolist(), y.tolist(), self.training, x.detach().clone()))
        return torch.cat([self.scale * x, self.variance * x], dim=1)


def test_the_published_step_and_sampler_by_hand(monkeypatch):
    """Gradient, AdamW's step and EMA in closed form."""
    monkeypatch.setattr(benchmark, "DiT", Net)
    theirs = benchmark.Published(settings())
    model, ema, draws, randn = theirs.model, theirs.ema, [], torch.randn_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: draws.append(randn(x)) or draws[-1])
        theirs()
    t, y, training, xt = model.calls[0]
    assert training and len(y) == 6 and len(set(t)) > 1
    gradient = (-2 * draws[0] * xt).mean()          # of the mean of (eps - scale xt)^2 at scale 0
    assert model.scale.grad.item() == pytest.approx(gradient.item(), rel=1e-4)
    assert model.variance.grad.item() != 0          # the variational bound teaches it
    assert model.scale.item() == pytest.approx(-1e-4 * gradient.sign().item(), rel=1e-3)
    assert ema.scale.item() == pytest.approx(1e-4 * model.scale.item(), rel=1e-3)
    for _ in range(100):
        theirs()
    dropped = [y == 10 for _, labels, *_ in model.calls for y in labels]
    assert 30 < sum(dropped) < 95                   # a tenth of 606
    theirs.sample()
    digits = [k % 10 for k in range(benchmark.IMAGES)]
    assert [c[0][0] for c in ema.calls] == [999, 500, 0]        # sample=3 steps
    for _, y, training, x in ema.calls:
        assert not training and y == digits + [10] * len(digits)    # guided: every image twice
        assert torch.equal(*x.chunk(2))


# ---------------------------------------------------------------- the command


def test_against_the_published_loop(rows):
    found = rows("--against", "--sample", 2)
    assert list(found)[:4] == ["published", "ours, adamw", "ours, muon", "ours, fp32"]
    works = benchmark.comparisons(settings(against=True, best="fp32")).values()
    assert [type(w.optimizers[-1]) for w in [*works][1:]] == [torch.optim.AdamW, BatchedMuon]
    theirs = found["published"]
    assert theirs[:3] == [theirs[0]] * 3 and theirs[3] == 1                     # one round
    for name in ("ours, adamw", "ours, muon"):
        assert found[name][3] == pytest.approx(theirs[0] / found[name][0], abs=0.02)


def test_other_models_beside_it(rows):
    found = rows("--scaling", "DiT-Test/4", "--batch-size", 512, "--busy", 1)
    assert list(found) == [TINY, "DiT-Test/4", f"{TINY}, 1 busy", "DiT-Test/4, 1 busy"]
    products = [benchmark.count(dit.DiT, **dit.MODELS[name])[1] for name in [*found][:2] * 2]
    assert [row[4] for row in found.values()] == [round(6 * 512 * n / 1e9, 2) for n in products]
    assert found["DiT-Test/4"][4] > 2 * found[TINY][4] > 0


def test_a_profile_lists_the_operations_of_a_round(capsys, monkeypatch):
    benchmark.main([str(f) for f in (*ONCE, "--steps-per-round", 3, "--profile", 4)])
    table = capsys.readouterr().out.partition("Self CPU")[2]
    times = [float(ms) for ms in re.findall(r"^ *aten::\S+ +(\S+)%", table, re.MULTILINE)]
    assert 1 < len(times) <= 4 and times == sorted(times, reverse=True)


def test_busy_and_the_shape_of_latents(rows):
    flags = ("--busy", 1, "--model", "DiT-Test/4", "--image-size", 32, "--channels", 4)
    found = rows(*flags)
    assert list(found) == ["as trained", "as trained, 1 busy"]
    assert all(len(row) == 6 and row[5] > 0 for row in found.values())          # with MFU


def test_a_patch_that_does_not_fit():
    assert "patch size 7 does not divide" in refused(benchmark.main, *ONCE, "--image-size", 32)
