"""What needs a CUDA GPU: skipped without one. The rest of the suite runs on the CPU."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from conftest import ROOT, load, tensors_equal
from support.folders import checkpoints_in, read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = ("--device", "cuda", "--seed", 3, "--log-every", 5)


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(folder) / "metrics.jsonl")]


def run(*words, **options) -> str:
    """A command of the project in a process of its own, on the GPU. Returns its output."""
    done = subprocess.run([sys.executable, *map(str, words)], text=True, capture_output=True,
                          timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("precision, apart", [("fp32", 5e-3), ("bf16", 3e-2), ("fp16", 3e-2)])
def test_gpu_20_steps_are_the_cpus_to_rounding(train, monkeypatch, precision, apart, optimizer):
    """Each device draws its own random numbers; here both get the CPU's."""
    from support import distributed
    flags = ("--steps", 20, "--optimizer", optimizer, "--batch-size", 64, *GPU[2:])
    train(*flags, "--device", "cpu", "--precision", "fp32", "--out", "cpu")
    honest = distributed.StepRandom

    class OnCpu(honest):
        def __init__(self, device, *rest):
            super().__init__(torch.device("cpu"), *rest)

        def uniform(self):
            return super().uniform().cuda()

        def normal(self, *shape):
            return super().normal(*shape).cuda()

    monkeypatch.setattr("support.run.StepRandom", OnCpu)
    train(*flags, "--device", "cuda", "--precision", precision, "--out", "gpu")
    assert losses("gpu") == pytest.approx(losses("cpu"), rel=apart)


def test_gpu_gradient_accumulation_makes_the_same_update(train):
    for parts in (1, 4):
        train(*GPU, "--steps", 5, "--precision", "fp32", "--optimizer", "adamw", "--batch-size",
              16, "--grad-accum", parts, "--out", f"run{parts}")
    assert losses("run4") == pytest.approx(losses("run1"), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gpu_stop_and_resume_continues_the_run(train, precision):
    flags = (*GPU, "--steps", 12, "--precision", precision, "--optimizer", "adamw")
    train(*flags, "--out", "straight")
    train(*flags, "--stop-after", 5, "--out", "run")
    train("--resume", "--out", "run", "--device", "cuda")
    assert losses("run") == pytest.approx(losses("straight"), rel=1e-3)
    assert load("run/step_0000012.pt")["scaler"] == load("straight/step_0000012.pt")["scaler"]


def test_gpu_a_killed_run_resumes(here):
    words = [ROOT / "train_mnist.py", "--dataset", "glyphs", "--model", "DiT-Nano/7", "--steps",
             100_000, "--save-every", 20, "--log-every", 5, "--device", "cuda", "--out", "run"]
    process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not any(int(p.stem[5:]) >= 20 for p in checkpoints_in(Path("run"))):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = int(checkpoints_in(Path("run"))[-1].stem[5:])
    run(ROOT / "train_mnist.py", "--resume", "--out", "run", "--stop-after", 10)
    assert len(losses("run")) == reached + 10


def test_gpu_compile_gives_the_same_losses_to_rounding(train):
    pytest.importorskip("triton")
    for flag, out in (("--no-compile", "eager"), ("--compile", "compiled")):
        train(*GPU, "--steps", 10, "--precision", "fp32", flag, "--out", out)
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-3)


def test_gpu_torchrun_with_nccl_is_one_process(here):
    flags = ["--dataset", "glyphs", "--model", "DiT-Nano/7", "--batch-size", "16", "--steps", "10",
             "--precision", "fp32", "--optimizer", "adamw", "--device", "cuda"]
    run(ROOT / "train_mnist.py", *flags, "--out", "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
        ROOT / "train_mnist.py", *flags, "--out", "nccl")
    assert losses("nccl") == pytest.approx(losses("one"), rel=1e-4)


@pytest.mark.parametrize("flags", [(), ("--sampler", "ddpm"), ("--cfg-scale", "0"),
                                   ("--cfg-scale", "3")])
def test_gpu_samples_are_the_cpus_to_rounding(here, flags):
    """The noise is the CPU's on every device. A sample may leave its trajectory; few do."""
    for device in ("cpu", "cuda"):
        sample.main([str(ROOT / "assets" / "mnist.pt"), "--labels", "1", "7", "--per-class", "4",
                     "--device", device, "--npz", f"{device}.npz", *flags])
    cpu, gpu = (np.load(f"{device}.npz")["arr_0"].astype(int) for device in ("cpu", "cuda"))
    assert np.median(np.abs(cpu - gpu).mean(axis=(1, 2, 3))) < 2


def test_gpu_evaluates_and_exports(train):
    train(*GPU, "--steps", 5, "--out", "run")
    folder = Path("run").resolve()
    run("-m", "tools.evaluate", folder, "--images", 20, "--steps", 2, "--device", "cuda", "--json",
        folder / "report.json", cwd=ROOT)
    assert json.loads((folder / "report.json").read_text())["device"] == "cuda"
    run("-m", "tools.export", folder / "step_0000005.pt", folder / "small.pt", cwd=ROOT)
    assert load_small(folder / "small.pt")


def load_small(path) -> bool:
    from support import checkpoints
    return "ema" in checkpoints.load(path)


def test_gpu_checkpoints_load_on_the_cpu(train):
    train(*GPU, "--steps", 5, "--out", "run")
    state = load("run/step_0000005.pt")
    assert all(w.device.type == "cpu" for w in state["ema"].values())
    assert tensors_equal(state, load("run/step_0000005.pt"))


def test_gpu_memory_of_the_preset_is_told(train):
    torch.cuda.reset_peak_memory_stats()
    train("--device", "cuda", "--model", "DiT-Mini/2", "--batch-size", 256, "--steps", 3, "--out",
          "run")
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"GPU preset: peak memory {peak:.2f} GB")
    assert peak < 14, "the preset should fit a 16 GB GPU"
