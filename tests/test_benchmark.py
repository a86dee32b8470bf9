"""tools/benchmark.py: what is timed, in what order, and what is printed and written."""

import contextlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

import dit
import train_mnist
from conftest import TINY
from diffusion import GaussianDiffusion
from support import data, distributed
from support.cli import UserError
from support.settings import Settings
from support.state import Loss
from tools import benchmark, implementations, timing

CPU = torch.device("cpu")
BASE = ("--model", TINY, "--batch-size", 4, "--device", "cpu")
ONCE = (*BASE, "--rounds", 1, "--steps-per-round", 1)
FIRST_STEP = benchmark.first_step


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A small product, and no process that trains."""
    rate = timing.matmul_rate
    monkeypatch.setattr(benchmark, "matmul_rate", lambda name, device: rate(name, device, 64))
    monkeypatch.setattr(benchmark, "first_step", lambda *a: {})


def run(*flags) -> int:
    return benchmark.main([str(f) for f in flags])


@pytest.fixture
def report(train, tmp_path):
    """report(*flags) -> the JSON report of a call in one round of one step."""
    def run_it(*flags) -> dict:
        assert run(*ONCE, "--json", tmp_path / "report.json", *flags) == 0
        return json.loads((tmp_path / "report.json").read_text())

    return run_it


@pytest.fixture
def network(tmp_path) -> str:
    """FILE.py:FACTORY of a small network with the published signature, which logs its calls."""
    (tmp_path / "net.py").write_text('''
import torch
from torch import nn
CALLS = []

class Net(nn.Module):
    def __init__(self, input_size, in_channels, num_classes, learn_sigma=True):
        super().__init__()
        assert not learn_sigma and num_classes == 10 and input_size == 28
        self.scale = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, t, y):
        CALLS.append((len(x), t.tolist(), y.tolist(), self.training, x.detach().clone()))
        weight = self.scale * torch.where(y == 10, 2, 1)        # 10: no class
        return torch.cat([weight.view(-1, 1, 1, 1) * x, x], dim=1)

def broken(hidden_size):
    raise ValueError("no such width")
''')
    return f"{tmp_path / 'net.py'}:Net"


# ---------------------------------------------------------------- training


def test_every_variant_makes_every_step_in_turn(train, monkeypatch, capsys):
    calls, algorithm = [], train_mnist.train

    def spy(batches, state, diffusion, run):
        calls.append((id(state), list(run.steps())))
        before = [p.clone() for p in state.model.parameters()]
        algorithm(batches, state, diffusion, run)
        assert any(not torch.equal(a, b)
                   for a, b in zip(before, state.model.parameters(), strict=True))
    monkeypatch.setattr(train_mnist, "train", spy)
    assert run(*BASE, "--rounds", 2, "--steps-per-round", 3, "--optimizer", "adamw") == 0
    order = [model for model, _ in calls]
    assert len(set(order)) == 3 and order == order[:3] * 3              # warming up, two rounds
    assert [steps for _, steps in calls[::3]] == [[0, 1], [2, 3, 4], [5, 6, 7]]
    out = capsys.readouterr().out
    assert "adamw" in out and "batch 4" in out and "2 rounds of 3 steps" in out
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads, on cpu" in out
    rows = [line for line in out.splitlines() if line.split("  ")[0] in implementations.VARIANTS]
    assert [row.split("  ")[0] for row in rows] == ["fp32", "bf16", "bf16, MATH attention"]
    assert rows[0].split()[4] == "1.00"
    assert "sampling" not in out


@pytest.mark.parametrize("name, dtype, flash", [
    ("fp32", torch.float32, True), ("bf16", torch.bfloat16, True),
    ("bf16, MATH attention", torch.bfloat16, False)])
def test_a_variant_runs_in_its_precision_with_its_kernels(name, dtype, flash):
    layer, seen, losses = torch.nn.Linear(4, 4), [], []

    class Model(torch.nn.Module):
        def forward(self, xt, t, y):
            seen.append((layer(xt).dtype, torch.backends.cuda.flash_sdp_enabled()))
            return xt

    class Process:
        def loss(self, net, x0, t, y, eps):
            losses.append(layer(net(x0, t, y)).dtype)           # around the network: fp32

    bf16, kernels = implementations.VARIANTS[name]
    loss = type("VariantLoss", (implementations.VariantLoss,), dict(bf16=bf16, kernels=kernels))
    loss(Model(), Process(), CPU, "")(torch.zeros(1, 4), None, None, None)
    assert losses == [torch.float32]
    assert seen == [(dtype, flash)]
    assert implementations.VARIANTS["bf16, MATH attention"][1] == (SDPBackend.MATH,)


def test_compiled_variants_are_compiled_apart(train, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(distributed, "check_compiler", lambda device: None)
    monkeypatch.setattr(Loss, "compile", lambda self: compiled.append(type(self)))
    assert run(*ONCE, "--optimizer", "muon", "--compile") == 0
    own = [kind for kind in compiled if kind is not Loss]
    assert len(set(own)) == len(own) == 3
    out = capsys.readouterr().out
    for name in implementations.VARIANTS:
        assert f"\n{name}  " in out and f"\n{name}, compiled  " in out
    assert "muon" in out


def test_the_report_holds_what_the_table_shows(report, capsys):
    found = report()
    rows = found["training"]
    assert [row["precision"] for row in rows] == ["fp32", "bf16", "bf16"]
    assert found["hardware"]["torch"] == torch.__version__ and found["batch_size"] == 4
    out = capsys.readouterr().out
    for row in rows:
        assert f"{row['ms']:.2f}" in out and f"{row['images_per_s']:,.0f}" in out
        assert row["images_per_s"] == pytest.approx(4000 / row["ms"])
        assert row["mfu"] == pytest.approx(found["flops_per_step"] / row["ms"] * 1000
                                           / found["matmul_flops_per_s"][row["precision"]])


def test_the_flops_are_those_of_the_networks_products():
    """Linear layers of (D, D): 2 B N D D flops forward, twice that backward."""
    args = Namespace(batch_size=3, prediction="x0", weighting="plain", sizes=dict(
        patch_size=7, hidden_size=64, depth=0, num_heads=2))
    images = data.draw_glyphs(4)

    def flops(depth) -> int:
        args.sizes["depth"] = depth
        return implementations.step_flops(args, images)

    tokens, width = 3 * 16, 64
    products = 2 * tokens * width * width * 12                  # qkv, proj and the MLP
    attention = 2 * 2 * tokens * 16 * width
    conditioning = 2 * 3 * width * 6 * width
    assert flops(2) - flops(1) == 3 * (products + attention + conditioning)


def test_a_product_is_counted_as_its_flops(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda work, device: (work(), 0.5)[1])
    assert timing.matmul_rate("bf16", CPU, 32) == 2 * 32**3 / 0.5


def test_openmp_is_set_before_torch_is_imported():
    source = Path(benchmark.__file__).read_text()
    assert source.index("import support.threads") < source.index("import torch")


# ---------------------------------------------------------------- busy processes


def alive(pid: int) -> bool:
    """Is there such a process, and not a zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_busy_processes_compute_and_end():
    def ticks(pid) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])

    with contextlib.suppress(KeyError), timing.busy_processes(2) as running:
        pids = [process.pid for process in running]
        before, deadline = [ticks(pid) for pid in pids], time.time() + 10
        while any(ticks(pid) <= b + 5 for pid, b in zip(pids, before, strict=True)):
            assert time.time() < deadline
            time.sleep(0.02)
        raise KeyError
    assert len(pids) == 2 and not any(map(alive, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_busy_processes_end_with_a_killed_parent():
    code = ("import subprocess, sys, os\np = subprocess.Popen([sys.executable, '-S', '-c', "
            "sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)\np.stdout.readline()\n"
            "print(p.pid, flush=True)\nos._exit(9)")
    done = subprocess.run([sys.executable, "-c", code, timing.BUSY], stdout=subprocess.PIPE,
                          text=True)
    pid, deadline = int(done.stdout), time.time() + 10
    while alive(pid):
        assert time.time() < deadline
        time.sleep(0.02)


def test_a_round_is_timed_alone_and_beside_busy_processes(report, monkeypatch, capsys):
    events = []

    @contextlib.contextmanager
    def fake(count):
        events.append(count)
        yield
        events.append("end")

    asked = []
    monkeypatch.setattr(distributed, "should_compile", lambda *args: asked.append(args) or False)
    monkeypatch.setattr(timing, "busy_processes", fake)
    algorithm = train_mnist.train
    monkeypatch.setattr(train_mnist, "train", lambda *a: (events.append("train"), algorithm(*a)))
    rows = report("--busy", 1, 3, "--rounds", 2)["training"]
    one_round = [0, "train", "end", 1, "train", "end", 3, "train", "end"]
    assert events == ["train", *one_round, *one_round]
    assert asked == [(None, torch.device("cpu"), distributed.COMPILE_PAYS)]     # as a long run
    assert [(row["name"], row["busy"]) for row in rows] == [("as trained", n) for n in (0, 1, 3)]
    out = capsys.readouterr().out
    assert "\nas trained  " in out and "\nas trained, 3 busy  " in out


# ---------------------------------------------------------------- against another implementation


def test_the_other_implementation_alternates_with_ours(report, network, monkeypatch, capsys):
    order = []
    for kind in (implementations.Ours, implementations.Published):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, n, call=call: (
            order.append((self.name, self.args.optimizer, n)), call(self, n))[1])
    found = report("--against", network, "--rounds", 2, "--optimizer", "muon")
    names = ["theirs", "ours, adamw", "ours, muon"]
    assert [row["name"] for row in found["training"]] == names
    assert [name for name, _, n in order if n == 1] == names * 2
    assert {optimizer for name, optimizer, _ in order if name == "ours, adamw"} == {"adamw"}
    assert {optimizer for name, optimizer, _ in order if name == "ours, muon"} == {"muon"}
    assert found["training"][0]["precision"] == "fp32"
    assert "first step" not in capsys.readouterr().out


@pytest.fixture
def theirs(network) -> implementations.Published:
    args = Namespace(batch_size=6, seed=0, sizes=dit.MODELS["DiT-Nano/7"])
    torch.manual_seed(0)
    return implementations.Published("theirs", implementations.load_factory(network), args, CPU,
                                     data.draw_glyphs(20))


def calls_of(theirs) -> list:
    return theirs.model.forward.__globals__["CALLS"]


def test_the_published_step_by_hand(theirs):
    """The network's output is scale * xt: gradient, AdamW's step and EMA in closed form."""
    frozen = theirs.ema.frozen.clone()
    draws = []
    randn = torch.randn_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: draws.append(randn(x)) or draws[-1])
        theirs(1)
    (count, t, y, training, xt), eps = calls_of(theirs)[-1], draws[0]
    assert count == 6 and training and len(set(t)) > 1 and len(y) == 6
    gradient = (-2 * eps * xt).mean()               # of the mean of (eps - scale xt)^2 at scale 0
    scale = theirs.model.scale.item()
    assert scale == pytest.approx(-1e-4 * gradient.sign().item(), rel=1e-3)     # AdamW's first step
    assert theirs.model.scale.grad.item() == pytest.approx(gradient.item(), rel=1e-5)
    assert theirs.ema.scale.item() == pytest.approx(1e-4 * scale, rel=1e-4)
    assert torch.allclose(theirs.ema.frozen, frozen)
    theirs(2)
    assert len(calls_of(theirs)) == 3 and theirs.done == 3


def test_the_published_sampler_is_ddpm_with_guidance(theirs, monkeypatch):
    """With all timesteps and without noise it goes the way of GaussianDiffusion.ddpm_sample."""
    y = torch.tensor([3, 7])
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    with torch.no_grad():
        theirs.ema.scale.fill_(0.5)
    torch.manual_seed(1)
    found = theirs.sample(y, 1000, 3.0)
    calls = calls_of(theirs)
    assert len(calls) == 1000 and [c[1][0] for c in calls] == list(range(999, -1, -1))
    assert all(c[0] == 4 and c[2] == [3, 7, 10, 10] and not c[3] for c in calls)
    assert torch.equal(calls[0][4][:2], calls[0][4][2:])        # two halves of the same images
    torch.manual_seed(1)
    xt, process = torch.randn(2, 1, 28, 28), GaussianDiffusion(prediction="eps")
    for t in reversed(range(1000)):
        x0_hat, _ = process.x0_and_eps((1 + 3 * (0.5 - 1)) * xt, xt, t)
        xt, _ = process.q_posterior(x0_hat, xt, t)
    assert torch.allclose(found, xt, rtol=1e-3, atol=1e-3 * xt.abs().max().item())
    calls.clear()
    theirs.sample(y, 5, 3.0)
    assert [c[1][0] for c in calls] == [999, 749, 500, 250, 0]


def test_both_samplers_make_the_same_images(report, network, monkeypatch):
    made = []
    monkeypatch.setattr(distributed, "pick_precision", lambda *a: "bf16")
    for kind in (implementations.Ours, implementations.Published):
        monkeypatch.setattr(kind, "sample", lambda self, y, *how: made.append(
            (self.name, len(y), *how)))
    rows = report("--against", network, "--sample", 3, "--images", 5)["sampling"]
    assert made[:3] == made[3:] == [("theirs", 5, 3, 2.0), ("ours, muon", 5, 3, 2.0, "fp32"),
                                    ("ours, muon", 5, 3, 2.0, "bf16")]
    assert [row["name"] for row in rows] == ["theirs", "ours, fp32", "ours, bf16"]


def test_a_factory_that_takes_any_argument_gets_all():
    got = implementations.build(lambda depth, **rest: {"depth": depth, **rest},
                                dict(depth=1, num_heads=2))
    assert got == {"depth": 1, "num_heads": 2}


# ---------------------------------------------------------------- sampling


def test_sampling_is_timed_with_one_and_two_forwards_per_step(report, monkeypatch, capsys):
    seen, forward = [], dit.DiT.forward
    assert benchmark.parser().parse_args(["--sample"]).sample == 50
    assert benchmark.parser().parse_args([]).images == 64
    monkeypatch.setattr(distributed, "pick_precision", lambda *a: "bf16")
    monkeypatch.setattr(dit.DiT, "forward", lambda self, x, t, y: (
        seen.append((len(x), torch.is_autocast_enabled("cpu"))), forward(self, x, t, y))[1])
    rows = report("--rounds", 2, "--sample", 3, "--images", 5)["sampling"]
    one_round = [(n, bf16) for bf16 in (False, True) for n in (5, 10) for _ in range(3)]
    assert [call for call in seen if call[0] in (5, 10)] == one_round * 3   # warming up, two rounds
    assert [row["name"] for row in rows] == [
        f"guidance {scale}, {precision}" for precision in ("fp32", "bf16") for scale in (1, 2)]
    assert rows[0]["images_per_s"] == pytest.approx(1000 / rows[0]["ms"])
    assert "2 rounds of 5 images in one batch, 3 steps" in capsys.readouterr().out


# ---------------------------------------------------------------- scaling


def test_scaling_changes_one_size_at_a_time(report, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "TOKENS", ((28, 7), (28, 4)))
    monkeypatch.setattr(benchmark, "FACTORS", (1, 2))
    models = []
    monkeypatch.setattr(implementations.Ours, "__call__", lambda self, n: models.append(self.model))
    times = iter(1e-3 * 16.0 ** k for k in range(100))
    monkeypatch.setattr(timing, "seconds", lambda work, device: (work(), next(times))[1])
    found = report("--scaling")["scaling"]
    seen = {(m.pos_embed.shape[1], m.pos_embed.shape[2], len(m.blocks)) for m in models}
    assert seen == {(16, 16, 2), (49, 16, 2), (16, 32, 2), (16, 16, 4)}
    assert [r["name"] for r in found["depth"]["rows"]] == ["2 depth", "4 depth"]
    for series in found.values():
        assert [r["ms"] for r in series["rows"]][1] == 16 * series["rows"][0]["ms"]
    assert found["width"]["exponents"]["ms"] == pytest.approx(4)        # 16 = 2^4
    assert 0.5 < found["depth"]["exponents"]["gflop"] <= 1 < found["width"]["exponents"]["gflop"]
    assert "time ~ width^4.00, flops ~ width^1." in capsys.readouterr().out
    assert benchmark.TOKENS and {s % p for s, p in benchmark.TOKENS} == {0}


def test_scaling_has_a_batch_of_16_unless_it_is_given(train, monkeypatch):
    sizes = []
    monkeypatch.setattr(benchmark, "benchmark_scaling",
                        lambda flags, args, *rest: sizes.append(args.batch_size) or {})
    run("--device", "cpu", "--model", TINY, "--scaling")
    run("--device", "cpu", "--model", TINY, "--scaling", "--batch-size", 3)
    assert sizes == [16, 3]


# ---------------------------------------------------------------- the first step, the profile


@pytest.fixture
def training(here, monkeypatch):
    """training(code): replace train_mnist.py; the processes that are started."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: (
        started.append(popen(*a, **k)), started[-1])[1])
    monkeypatch.setattr(benchmark.paths, "ROOT", here)

    def replace(code: str) -> list:
        (here / "train_mnist.py").write_text("import pathlib, sys, time\n" + code)
        return started

    return replace


ARGS = Namespace(model="DiT-Nano/7", batch_size=4, optimizer="adamw")


def test_the_first_step_is_waited_for_and_its_process_ends(training, capsys):
    started = training("""
memory = bytearray(200_000_000)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "metrics.jsonl").touch()
time.sleep(0.3)
(out / "metrics.jsonl").write_text("{}")
time.sleep(1000)""")
    found = FIRST_STEP(ARGS, CPU, None)["first_step"]
    assert 0.3 < found["seconds"] < 60 and started[0].poll() is not None
    if hasattr(os, "wait4"):
        assert 200 < found["memory_mb"] < 4000       # of the child; it may inherit a peak
    assert f"first step: {found['seconds']:.1f} s" in capsys.readouterr().out
    words = started[0].args[2:]
    given = vars(Settings(train_mnist.RECIPE, train_mnist.PRESETS).parser().parse_args(words))
    assert {k: v for k, v in given.items() if k != "out"} == dict(
        dataset="glyphs", model="DiT-Nano/7", batch_size=4, optimizer="adamw", steps=1,
        log_every=1, device="cpu")


def test_training_that_stops_before_its_first_step_is_an_error(training):
    training("sys.exit('--data-dir' in sys.argv and 'no digits in ' + sys.argv[-1])")
    with pytest.raises(UserError, match="no digits in there"):
        FIRST_STEP(ARGS, CPU, "there")


def test_the_first_step_is_part_of_the_report(report, monkeypatch):
    monkeypatch.setattr(benchmark, "first_step", lambda args, device, data_dir: dict(
        first_step=dict(seconds=5, data_dir=data_dir)))
    assert report("--data-dir", "there")["first_step"] == dict(seconds=5, data_dir="there")


def test_a_profile_is_a_table_of_operations(train, here, monkeypatch):
    monkeypatch.setattr(benchmark, "PROFILED", 2)
    assert run(*ONCE, "--profile", here / "profile.txt") == 0
    text = (here / "profile.txt").read_text()
    assert "aten::addmm" in text and "Self CPU" in text
    with pytest.raises(UserError, match="exists: --force"):
        run(*ONCE, "--profile", here / "profile.txt")
    assert run(*ONCE, "--profile", here / "profile.txt", "--force") == 0


# ---------------------------------------------------------------- tables, mistakes


def test_the_table_holds_medians_and_speed_ups_within_a_round():
    times = {("one", 0): [1.0, 2.0, 9.0], ("other, longer", 2): [2.0, 2.2, 27.0]}
    rows = timing.rows_of(times, 10, 50)
    lines = [line.split() for line in timing.table(rows, "step")]
    assert lines[0] == ["ms/step", "fastest", "slowest", "speed-up", "images/s"]
    assert lines[1] == ["one", "200.00", "100.00", "900.00", "1.00", "25"]
    assert lines[2][2:] == ["2", "busy", "220.00", "200.00", "2700.00", "0.50", "23"]   # 1/2 1/1.1


def test_the_device_is_waited_for_on_both_sides(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    assert timing.seconds(lambda: events.append("work"), torch.device("cuda")) >= 0
    assert events == ["wait", "work", "wait"]


@pytest.mark.parametrize("flags, says", [
    (("--model", "DiT-S/8"), "patch size 8 does not divide image size 28"),
    (("--rounds", 0), "of at least 1"), (("--batch-size", 10**11), "at most 65,536"),
    (("--sample", 1001), "at most 1,000"), (("--busy", 0), "at least 1"),
    (("--device", "cuda:77"), "is not available"), (("--round", 3), "did you mean --rounds"),
    (("--against", "nowhere.py:DiT"), "there is no file 'nowhere.py'"),
    (("--against", "DiT"), "FILE.py:FACTORY"), (("--json", "report.txt"), "ends in .json"),
    (("--profile", "profile"), "ends in .txt")])
def test_mistakes_are_one_line(train, flags, says):
    with pytest.raises(UserError, match=says) as error:
        run(*flags)
    assert "\n" not in str(error.value)


def test_a_file_without_the_factory_is_named(train, network, tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    for against, says in [(network[:-3] + "Other", "no 'Other'"),
                          (network[:-3] + "CALLS", "no 'CALLS'"),
                          (network[:-3] + "broken", "cannot be built: no such width"),
                          (f"{tmp_path}/bad.py:DiT", "No module named")]:
        with pytest.raises(UserError, match=says):
            run(*ONCE, "--against", against)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run()


def test_no_flag_is_untested():
    source = Path(__file__).read_text()
    flags = {o for action in benchmark.parser()._actions for o in action.option_strings}
    assert {f for f in flags - {"-h", "--help"} if f'"{f}"' not in source} == set()
