"""Devices, number formats, and the processes that share a run (torchrun).

Not needed to understand DiT.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cli import UserError, printable

# ---------------------------------------------------------------- devices and number formats


def fastest_device() -> str:
    """cuda, else mps, else cpu."""
    return ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")


def pick_device(name: str | None) -> torch.device:
    """The device that is named, else the fastest. UserError where it is not there."""
    name = fastest_device() if name is None else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except torch.OutOfMemoryError:
        raise                           # it is there, and full
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {printable(name)} is not available here: use cpu"
                        + (", cuda" if torch.cuda.is_available() else "")
                        + (" or mps" if torch.backends.mps.is_available() else "")) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {printable(name)} cannot train: use cpu, cuda or mps")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)   # synchronize() and the like mean the current one
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The number format of the matrix products: "auto" -> what this device multiplies fastest.

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


def under_autocast(model: nn.Module, device: torch.device, precision: str) -> Callable:
    """The model as a function whose forward, and nothing around it, runs in `precision`.

    On CPU, scaled_dot_product_attention's bf16 kernel is several times slower in its backward
    than the plain matrix products of the MATH backend, which is therefore chosen there.
    """
    if precision == "fp32":
        return model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    kernels = contextlib.nullcontext
    if device.type == "cpu":
        kernels = lambda: sdpa_kernel(SDPBackend.MATH)      # noqa: E731

    def forward(xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype), kernels():
            return model(xt, t, y)

    return forward


# ---------------------------------------------------------------- ranks


@dataclass
class Ranks:
    """The processes that share a run. With one process every method does nothing."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local: int = 0                          # among those of one machine
    module: nn.Module | None = None         # set by wrap, where there are several

    @classmethod
    def join(cls, device_name: str | None) -> "Ranks":
        """Read torchrun's environment; nccl for tensors on GPUs, gloo for those on CPUs."""
        world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if world == 1:
            return cls(pick_device(device_name))
        local = int(os.environ.get("LOCAL_RANK", 0))
        device_name = fastest_device() if device_name is None else device_name
        if device_name.split(":")[0] == "cuda" and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise UserError(f"process {local} of this machine has no GPU: it has "
                                f"{torch.cuda.device_count()}; use that --nproc_per_node")
            device_name = f"cuda:{local}"       # from the start: no process touches another's GPU
        device = pick_device(device_name)
        if device.type == "mps":
            raise UserError("several processes cannot share mps: use --device cpu")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return cls(device, rank, world, local)

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, averaging its gradients over the ranks where there are several."""
        if self.world > 1:
            # of the patch embedding's weight, one small tensor: nothing that a user could mend
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            model = self.module = DistributedDataParallel(
                model, device_ids=[self.device.index] if self.device.type == "cuda" else None)
        return model

    def shares(self, batch_size: int, grad_accum: int) -> Iterator[slice]:
        """This rank's slice of the global batch, in `grad_accum` parts, for a loop over them.

        Gradients travel between the ranks with the last part alone.
        """
        size = batch_size // self.world // grad_accum
        first = self.rank * size * grad_accum
        for i in range(grad_accum):
            later = self.world > 1 and i < grad_accum - 1
            with self.module.no_sync() if later else contextlib.nullcontext():
                yield slice(first + i * size, first + (i + 1) * size)

    def check_batch(self, batch_size: int, grad_accum: int) -> None:
        parts = self.world * grad_accum
        if batch_size % parts:
            low = batch_size // parts * parts
            near = [b for b in (low, low + parts) if b > 0]
            raise UserError(f"--batch-size {batch_size} cannot be shared evenly by {self.world} "
                            f"processes x --grad-accum {grad_accum}: "
                            f"{' or '.join(map(str, near))} can")

    def mean(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world
        return x

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers (through gloo: no GPU waits for it)."""
        if self.world > 1:
            box = torch.tensor(number)
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
            number = int(box)
        return number

    def from_rank_0(self, make: Callable):
        """make() on rank 0, its (picklable) result on all; a UserError, too."""
        if self.world == 1:
            return make()
        box = [None, None]              # the result; what the user did wrong, and the exit status
        if self.rank == 0:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error), error.status
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        if box[1] is not None:
            raise UserError(*box[1])
        return box[0]

    def gather_parts(self, parts: list[Tensor]) -> Tensor | None:
        """Parts that the ranks took in turn (rank r: parts r, r + world, ...), in order, in one
        tensor on rank 0."""
        everyone = [parts]
        if self.world > 1:
            everyone = [None] * self.world if self.rank == 0 else None
            dist.gather_object(parts, everyone)
        if self.rank > 0:
            return None
        most = max(map(len, everyone))
        return torch.cat([theirs[i] for i in range(most) for theirs in everyone if i < len(theirs)])

    def say(self, *lines: str) -> None:
        if self.rank == 0:
            for line in lines:
                tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(f"warning: {line}", file=sys.stderr)


# ---------------------------------------------------------------- the compiler


def check_compiler(device: torch.device) -> None:
    """torch.compile needs a C++ compiler for the CPU, Triton and a C compiler for a GPU."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        raise UserError("--compile needs a C++ compiler (g++ or clang++) on the CPU")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU")
    if device.type == "cuda" and not ("CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
                                      or os.name == "nt"):
        raise UserError("--compile needs a C compiler (gcc or clang) on a GPU")
