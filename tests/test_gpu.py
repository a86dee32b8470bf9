"""What needs a CUDA GPU: skipped without one. The rest of the suite runs on the CPU."""

import faulthandler
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dit
import sample
from conftest import ROOT
from support import checkpoint, registry, replay
from support.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = ("--device", "cuda", "--no-compile", "--seed", 3, "--log-every", 5)


@pytest.fixture(autouse=True)
def time_limit():
    """A hang is named, with where it hangs."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def losses(folder) -> list[float]:
    return [row["loss"] for row in checkpoint.read_metrics(Path(folder))]


def run(*words, **options) -> str:
    """A command of the project in a process of its own, on the GPU. Returns its output."""
    done = subprocess.run([sys.executable, *map(str, words)], text=True, capture_output=True,
                          timeout=50, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("precision, apart", [("fp32", 5e-3), ("bf16", 3e-2)])
def test_gpu_20_steps_are_the_cpus_to_rounding(train, monkeypatch, precision, apart):
    """Each device draws its own random numbers; here both get the CPU's."""
    from support import compute
    flags = ("--steps", 20, "--batch-size", 64, "--seed", 3)
    train(*flags, "--device", "cpu", "--precision", "fp32", "--out", "cpu")
    honest = compute.StepRandom

    class OnCpu(honest):
        def __init__(self, device, *rest):
            super().__init__(torch.device("cpu"), *rest)

        def uniform(self):
            return super().uniform().cuda()

        def normal(self, *shape):
            return super().normal(*shape).cuda()

    monkeypatch.setattr(compute, "StepRandom", OnCpu)
    train(*flags, "--device", "cuda", "--no-compile", "--precision", precision, "--out", "gpu")
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=apart)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gpu_a_captured_step_is_the_uncaptured_one(train, monkeypatch, optimizer):
    flags = (*GPU, "--steps", 20, "--optimizer", optimizer)
    train(*flags, "--out", "captured")
    monkeypatch.setattr(Run, "replayed", lambda self, step: step)
    train(*flags, "--out", "launched")
    assert losses("captured") == pytest.approx(losses("launched"), rel=1e-3)
    captured, launched = (checkpoint.load(Path(f"{name}/step_0000020.pt"))["ema"]
                          for name in ("captured", "launched"))
    assert all(torch.allclose(captured[k], launched[k], atol=1e-3) for k in captured)


def test_gpu_stop_and_resume_continues_the_run(train):
    flags = (*GPU, "--steps", 16)
    train(*flags, "--out", "straight")
    train(*flags, "--stop-after", 7, "--out", "run")
    train("--resume", "--out", "run", "--device", "cuda")
    assert losses("run") == pytest.approx(losses("straight"), rel=1e-3)


def test_gpu_a_network_that_cannot_be_captured_trains_on(train, monkeypatch, capsys):
    class Waits(dit.DiT):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert x.sum().item() < 1e9                     # waits for the device
            return super().forward(x, t, y)

    monkeypatch.setitem(registry.NETWORKS, "waits", Waits)
    flags = (*GPU, "--steps", 12)
    assert train(*flags, "--network", "waits", "--out", "waits") == 0
    assert capsys.readouterr().err.count("not one CUDA graph") >= 1
    train(*flags, "--out", "plain")
    assert losses("waits") == pytest.approx(losses("plain"), rel=1e-3)


def test_gpu_replays_read_new_inputs():
    linear = nn.Linear(8, 8).cuda()
    captured = replay.Replayed(lambda x, scale: linear(x) * scale, torch.device("cuda"))
    with torch.no_grad():
        for k in range(2 * replay.WARM_UP + 2):
            x = torch.randn(4, 8, device="cuda")
            assert torch.allclose(captured(x, float(k)), linear(x) * k, atol=1e-5)


def test_gpu_a_killed_run_resumes(here):
    words = [ROOT / "train_mnist.py", "--dataset", "glyphs", "--model", "DiT-Nano/7", "--steps",
             100_000, "--no-compile", "--save-every", 20, "--log-every", 5, "--device", "cuda",
             "--out", "run"]
    process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    deadline = time.time() + 40
    while not any(int(p.stem[5:]) >= 20 for p in checkpoint.checkpoints_in(Path("run"))):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = int(checkpoint.checkpoints_in(Path("run"))[-1].stem[5:])
    run(ROOT / "train_mnist.py", "--resume", "--out", "run", "--stop-after", 10)
    assert len(losses("run")) == reached + 10


def test_gpu_compile_gives_the_same_losses_to_rounding(train):
    pytest.importorskip("triton")
    flags = ("--device", "cuda", "--seed", 3, "--steps", 10, "--precision", "fp32")
    for flag, out in (("--no-compile", "eager"), ("--compile", "compiled")):
        train(*flags, flag, "--out", out)
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-3)


def test_gpu_torchrun_with_nccl_is_one_process(here):
    flags = ["--dataset", "glyphs", "--model", "DiT-Nano/7", "--batch-size", "16", "--steps", "10",
             "--precision", "fp32", "--optimizer", "adamw", "--no-compile", "--device", "cuda"]
    run(ROOT / "train_mnist.py", *flags, "--out", "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
        ROOT / "train_mnist.py", *flags, "--out", "nccl")
    assert losses("nccl") == pytest.approx(losses("one"), rel=1e-4)


@pytest.mark.parametrize("flags", [(), ("--cfg-scale", "0"), ("--cfg-scale", "3")])
def test_gpu_samples_are_the_cpus_to_rounding(here, flags):
    """The noise is the CPU's on every device. A sample may leave its trajectory; few do."""
    for device in ("cpu", "cuda"):
        sample.main([str(ROOT / "assets" / "mnist.pt"), "--labels", "1", "7", "--per-class", "4",
                     "--device", device, "--npz", f"{device}.npz", *flags])
    cpu, gpu = (np.load(f"{device}.npz")["arr_0"].astype(int) for device in ("cpu", "cuda"))
    assert np.median(np.abs(cpu - gpu).mean(axis=(1, 2, 3))) < 2


def test_gpu_checkpoints_load_on_the_cpu_and_hold_plain_learning_rates(train):
    train(*GPU, "--steps", 6, "--out", "run")
    state = checkpoint.load(Path("run/step_0000006.pt"), full=True)
    assert all(w.device.type == "cpu" for w in state["ema"].values())
    json.dumps(state["config"])
    assert train("--resume", "--out", "run", "--steps", 8, "--device", "cpu") == 0


def test_gpu_memory_of_the_preset_is_told(train):
    torch.cuda.reset_peak_memory_stats()
    train("--device", "cuda", "--no-compile", "--model", "DiT-Mini/2", "--batch-size", 256,
          "--steps", 3, "--out", "run")
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"DiT-Mini/2, batch 256: peak memory {peak:.2f} GB")
    assert peak < 14, "it should fit a 16 GB GPU"
