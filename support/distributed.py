"""Devices, number formats, and the processes that share a run under torchrun.

With one process the functions that concern several are no-ops, so that no caller needs a branch.
"""

import contextlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from support import cli
from support.cli import UserError
from support.seeds import generator

COMPILE_PAYS = 3000     # CPU: steps of the preset's model after which a cold compiler has paid

# ---------------------------------------------------------------- devices and number formats


def fastest_device() -> str:
    """cuda, else mps, else cpu."""
    return ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")


def pick_device(name: str | None) -> torch.device:
    """The named device, else the fastest. Raises UserError where it is not available."""
    name = fastest_device() if name is None else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise                           # it exists, and is full
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not available here: use cpu"
                        + (", cuda" if torch.cuda.is_available() else "")
                        + (" or mps" if torch.backends.mps.is_available() else "")) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} cannot train: use cpu, cuda or mps")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)   # synchronize() and the like mean the current device
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The number format of matrix products: "auto" becomes what this device multiplies fastest.

    bf16 where the hardware has it, fp16 on a GPU that has not (a T4), fp32 otherwise.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        has = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in
               ("avx512_bf16", "amx_tile")]
        return "bf16" if any(has) else "fp32"
    return "fp32"


def sampling_precision(name: str, device: torch.device) -> str:
    """As `pick_precision`, where "auto" is bf16 or fp32: the same digits to the eye and to the
    ruler (docs/experiments.md, "Speed of sampling")."""
    return name if name != "auto" else "bf16" if pick_precision(name, device) == "bf16" else "fp32"


def under_autocast(model: nn.Module, device: torch.device, precision: str) -> Callable:
    """The model as a function whose forward, and nothing around it, runs in `precision`.

    On a CPU, the backward of scaled_dot_product_attention's bf16 kernel is several times slower
    than the plain matrix products of the MATH backend, which is therefore selected there.
    """
    if precision == "fp32":
        return model

    def forward(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        kernels = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
        with autocast(device, precision), kernels:
            return model(xt, t, y)

    return forward


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Matrix products in `precision`: fp32, bf16 or fp16."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def should_compile(wanted: bool | None, device: torch.device, steps: int) -> bool:
    """--compile or --no-compile; by default where a compiler is found and pays within the `steps`
    of the run: always on a GPU, in long runs on a CPU (docs/experiments.md), not on mps."""
    if wanted is None:
        try:
            check_compiler(device)
        except UserError:
            return False
        return device.type == "cuda" or device.type == "cpu" and steps >= COMPILE_PAYS
    if wanted:
        check_compiler(device)
    return wanted


def check_compiler(device: torch.device) -> None:
    """torch.compile needs a C++ compiler for the CPU, Triton and a C compiler for a GPU."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        raise UserError("--compile needs a C++ compiler (g++ or clang++) on the CPU")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU")
    if device.type == "cuda" and not ("CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
                                      or os.name == "nt"):
        raise UserError("--compile needs a C compiler (gcc or clang) on a GPU")


# ---------------------------------------------------------------- processes


def rank() -> int:
    """This process's number, 0 for the one that prints and writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device_name: str | None) -> torch.device:
    """Connect the processes that torchrun started: NCCL for GPUs, gloo for CPUs. Returns this
    process's device."""
    if world_size() == 1:
        return pick_device(device_name)
    local = int(os.environ.get("LOCAL_RANK", 0))
    device_name = fastest_device() if device_name is None else device_name
    if device_name.split(":")[0] == "cuda" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU of its own: there are "
                            f"{torch.cuda.device_count()}; use that --nproc_per_node")
        device_name = f"cuda:{local}"       # from the start: no process touches another's GPU
    device = pick_device(device_name)
    if device.type == "mps":
        raise UserError("several processes cannot share mps: use --device cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def shut_down() -> None:
    """Disconnect. Call after the DistributedDataParallel module is freed: its bucket buffers
    otherwise outlive the process group, and torch 2.11 hangs now and then."""
    if world_size() > 1:
        dist.destroy_process_group()


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, averaging its gradients over the processes where there are several."""
    if world_size() == 1:
        return module
    # about the patch embedding's weight, one small tensor: nothing that a user could change
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    return DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False, gradient_as_bucket_view=True)


def share_of(batch_size: int, grad_accum: int) -> slice:
    """This process's part of a batch. Raises UserError unless the processes, and the micro-batches
    of each, divide it evenly."""
    parts = world_size() * grad_accum
    if batch_size % parts:
        low = batch_size // parts * parts
        near = [b for b in (low, low + parts) if b > 0]
        raise UserError(f"--batch-size {batch_size} cannot be divided evenly among {world_size()} "
                        f"processes x --grad-accum {grad_accum}: use "
                        f"{' or '.join(map(str, near))}")
    size = batch_size // world_size()
    return slice(rank() * size, (rank() + 1) * size)


class StepRandom:
    """The random numbers of one step. They are drawn for the whole batch, from (seed, step), and
    each process keeps its share: the numbers do not depend on how many processes there are."""

    def __init__(self, device: torch.device, seed: int, step: int, batch_size: int, share: slice):
        self.rng = generator(device, seed, "step", step)
        self.batch_size, self.share = batch_size, share

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)."""
        return torch.rand(self.batch_size, generator=self.rng, device=self.rng.device)[self.share]

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape), standard normal."""
        return torch.randn(self.batch_size, *shape, generator=self.rng,
                           device=self.rng.device)[self.share]


def all_reduce_mean(x: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers (through gloo: no GPU synchronisation)."""
    if world_size() > 1:
        box = torch.tensor(number)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        number = int(box)
    return number


def barrier() -> None:
    """Wait until every process is here."""
    all_reduce_max(0)


def broadcast_from_rank0(make: Callable):
    """make() on rank 0; its (picklable) result, or its UserError, on every rank."""
    if world_size() == 1:
        return make()
    box = [None, None]              # the result; or message and exit status of a UserError
    if rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error), error.status
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise UserError(*box[1])
    return box[0]


def gather_parts(parts: list[Tensor]) -> Tensor | None:
    """On rank 0, the concatenation of parts that the processes took in turn (rank r: parts r,
    r + world, ...); None on the others."""
    everyone = [parts]
    if world_size() > 1:
        everyone = [None] * world_size() if rank() == 0 else None
        dist.gather_object(parts, everyone)
    if rank() > 0:
        return None
    most = max(map(len, everyone))
    return torch.cat([theirs[i] for i in range(most) for theirs in everyone if i < len(theirs)])


def say(*lines: str) -> None:
    """`cli.say`, once for all processes."""
    if rank() == 0:
        cli.say(*lines)


def warn(line: str) -> None:
    """`cli.warn`, once for all processes."""
    if rank() == 0:
        cli.warn(line)
