"""What tools/benchmark.py measures with: rounds of timings, busy processes, tables, hardware."""

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

COLUMNS = {     # of a table: key of a row -> title (the first one names the unit), width, format
    "ms": ("ms/{}", 11, ".2f"), "fastest": ("fastest", 10, ".2f"),
    "slowest": ("slowest", 10, ".2f"), "speedup": ("speed-up", 10, ".2f"),
    "images_per_s": ("images/s", 10, ",.0f"), "gflop": ("GFLOP", 10, ",.1f"),
    "mfu": ("MFU", 7, ".1%"), "memory_mb": ("MB", 8, ",.0f")}
BUSY = """import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):     # ends with its parent, however that ends
    sum(range(1_000_000))"""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The duration of `work`, including what it has queued on the device."""
    synchronize = getattr(torch, device.type).synchronize       # nothing to wait for on the CPU
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """`count` processes that compute without a pause until the block ends."""
    running = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen([sys.executable, "-S", "-c", BUSY, str(os.getpid())],
                                            stdout=subprocess.PIPE))
        for process in running:
            process.stdout.readline()           # it has started
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()


def time_rounds(works: dict[str, Callable[[], object]], count: int, device: torch.device, desc: str,
                busy: tuple[int, ...] = (0,)) -> dict[tuple[str, int], list[float]]:
    """Seconds of each work beside each number of busy processes, `count` times, in turn."""
    times = {(name, n): [] for n in busy for name in works}
    for _ in tqdm(range(count), desc=desc, unit="round", leave=False, dynamic_ncols=True):
        for n in busy:
            with busy_processes(n):
                for name, work in works.items():
                    times[name, n].append(seconds(work, device))
    return times


def rows_of(times: dict[tuple[str, int], list[float]], per: int, images: int) -> list[dict]:
    """A row for each work. There are `per` units, with `images` images, in each timing: the median
    of a unit over the rounds in ms, the fastest, the slowest; the median of the ratio to the first
    work's timing of the same round; images per second."""
    first, rows = next(iter(times.values())), []
    for (name, busy), own in times.items():
        middle, fastest, slowest = (1000 * x / per for x in
                                    (statistics.median(own), min(own), max(own)))
        rows.append(dict(
            name=name, busy=busy, ms=middle, fastest=fastest, slowest=slowest,
            speedup=statistics.median(x / y for x, y in zip(first, own, strict=True)),
            images_per_s=1000 * images / per / middle))
    return rows


def table(rows: list[dict], unit: str) -> list[str]:
    """The rows as text, with the columns that the first one has."""
    columns = {key: about for key, about in COLUMNS.items() if key in rows[0]}
    lines = [f"{'':32}" + "".join(f"{title.format(unit):>{width}}"
                                  for title, width, _ in columns.values())]
    for row in rows:
        name = row["name"] + (f", {row['busy']} busy" if row.get("busy") else "")
        lines.append(f"{name:32}" + "".join(f"{row[key]:{width}{shape}}"
                                            for key, (_, width, shape) in columns.items()))
    return lines


def matmul_rate(precision: str, device: torch.device, side: int | None = None) -> float:
    """Flops per second of the product of two large matrices: the fastest of five."""
    side = side or (8192 if device.type == "cuda" else 2048)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds(lambda: matrix @ matrix, device)
    return 2 * side**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(5))


def hardware(device: torch.device) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(s for s in lines if s.startswith("model name")).partition(":")[2].strip()
    cuda = device.type == "cuda"
    return dict(
        gpu=torch.cuda.get_device_name(device) if cuda else None,
        cuda=torch.version.cuda if cuda else None, cpu=cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, device=device.type,
        torch=torch.__version__, threads=torch.get_num_threads(), environment={
            k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_"))})


def described(machine: dict) -> list[str]:
    """`hardware` in two lines."""
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}; " if machine["gpu"] else ""
    plural = "s" * (machine["cores"] != 1)
    return [f"{gpu}{machine['cpu']}, {machine['cores']} core{plural}, load {machine['load']:.1f} "
            f"at the start",
            f"torch {machine['torch']}, {machine['threads']} threads, on {machine['device']}"
            + "".join(f", {k}={v}" for k, v in sorted(machine["environment"].items()))]
