"""Where and how a step is computed: the device, the number format, the compiler, the processes
under torchrun; and random numbers that depend on none of these."""

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from support.command import UserError, say, warn

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Seconds that compiling takes, and that it saves in a step: a constant and a share per activation
# (images x tokens x width x blocks); of two CPU cores and of an H200 (docs/experiments.md).
COMPILING = {"cpu": (45, 0.0, 2.3e-8), "cuda": (7, 5e-4, 1.1e-10)}

# ---------------------------------------------------------------- device, format, compiler


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else the fastest; under torchrun one GPU per process, and the processes
    are connected. Raises UserError where it is not available."""
    name = str(name) if name else ("cuda" if torch.cuda.is_available() else
                                   "mps" if torch.backends.mps.is_available() else "cpu")
    if WORLD > 1 and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except torch.OutOfMemoryError:
        raise                               # it exists, and is full
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available here: use cpu, cuda or mps, whichever "
                        f"this machine has") from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high")                      # TF32
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The number format of matrix products. auto: bf16 where the hardware multiplies it, else fp32
    (TF32 on a GPU)."""
    if name in DTYPES:
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and any(getattr(torch.cpu, f"_is_{unit}_supported", bool)()
                                            for unit in ("avx512_bf16", "amx_tile"))
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in `precision`."""
    cache = device.type != "cuda"   # a cached cast would be outside of a graph: support/replay.py
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16", cache_enabled=cache)


class Autocast(nn.Module):
    """A network in training whose forward, and nothing around it, runs in `precision`. On a CPU the
    backward of attention's bf16 kernel is several times slower than the plain products of the MATH
    backend, which is therefore selected."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str):
        super().__init__()
        self.model, self.device, self.precision = model, device, precision
        self.plain = device.type == "cpu" and precision == "bf16"

    def forward(self, xt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        kernels = sdpa_kernel(SDPBackend.MATH) if self.plain else contextlib.nullcontext()
        with autocast(self.device, self.precision), kernels:
            return self.model(xt, t, y)


def prepare(model: nn.Module, device: torch.device, precision: str, compiled: bool) -> nn.Module:
    """The model as the training loop calls it: in mixed precision, compiled, and averaging its
    gradients over the processes. Its parameters are those of `model`, in their order."""
    net = Autocast(model, device, precision)
    if compiled:
        # On a GPU the block, once for all blocks: a third of the time, nearly the same speed
        for part in getattr(model, "blocks", [net]) if device.type == "cuda" else [net]:
            part.compile()
    if WORLD > 1:
        # about the strides of one small gradient: nothing that a user could change
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        net = DistributedDataParallel(
            net, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)
    return net


def pick_compile(wanted: bool | None, device: torch.device, model: nn.Module, batch_size: int,
                 steps: int) -> bool:
    """--compile or --no-compile; by default where the run is long enough for the faster steps to
    make up for the time that compiling takes. A small function is tried first: where it cannot be
    compiled, a warning says why, or a UserError if --compile was given."""
    if wanted is None:
        seconds, constant, share = COMPILING.get(device.type, (0, 0, 0))
        tokens = getattr(model, "pos_embed", torch.empty(0)).numel()            # N x D
        activations = batch_size * tokens * len(getattr(model, "blocks", ()))
        worth = steps * (constant + share * activations) > seconds
    if not (worth if wanted is None else wanted):
        if wanted is None and device.type in COMPILING:
            say("not compiled: in a run of this length it would take more time than it saves")
        return False
    say("compiling: the first step takes up to a minute")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)      # "no GPU found"
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(9, device=device))
    except Exception as error:              # of the C++ compiler, of triton ...
        lines = (str(error).strip() or type(error).__name__).splitlines()
        why = next(filter(None, (line.partition("error: ")[2] for line in lines)), lines[0])
        if wanted:
            raise UserError(f"--compile cannot be used here: {why}") from None
        warn(f"not compiled, which is slower: {why}")
        return False
    torch._dynamo.config.suppress_errors = wanted is None       # what fails now runs uncompiled
    return True


def set_learning_rates(optimizers: list, factor: float) -> None:
    """Set every learning rate to `factor` times its initial value, in place where it is a tensor
    (that a captured step reads)."""
    for opt in optimizers:
        for group in opt.param_groups:
            if "initial_lr" not in group:
                group["initial_lr"] = float(group["lr"])        # waits for the device: once
            lr = group["initial_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


# ---------------------------------------------------------------- processes


def all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """The sum (or `op`) of x over all processes, in place. CPU tensors go through gloo."""
    if WORLD > 1:
        dist.all_reduce(x, op=op)
    return x


def broadcast_from_rank0(make: Callable):
    """make() on rank 0; its (picklable) result, or its UserError, on every rank."""
    if WORLD == 1:
        return make()
    box = [None, None]
    if RANK == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error), error.status
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1]:
        raise UserError(*box[1])
    return box[0]


def gather_to_rank0(x: object) -> list | None:
    """On rank 0 the list of every process's x, on the others None."""
    if WORLD == 1:
        return [x]
    everyone = [None] * WORLD if RANK == 0 else None
    dist.gather_object(x, everyone)
    return everyone


def share_of(batch_size: int) -> slice:
    """This process's part of a batch. Raises UserError unless it can be divided evenly."""
    if batch_size % WORLD:
        raise UserError(f"--batch-size {batch_size} cannot be divided evenly among {WORLD} "
                        f"processes: use {batch_size // WORLD * WORLD or WORLD}")
    size = batch_size // WORLD
    return slice(RANK * size, (RANK + 1) * size)


# ---------------------------------------------------------------- random numbers


def seed_of(*key) -> int:
    """A 32-bit seed from any numbers and strings. A hash, because a CPU generator ignores the high
    32 bits of its seed, and because seed + step is the same for (0, 1) and (1, 0)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator(device: torch.device | str, *key) -> torch.Generator:
    """A generator that is a function of `key` and the device type alone."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class StepRandom:
    """The random numbers of one step: drawn for the whole batch from (seed, step), of which each
    process keeps its share. So they do not depend on the number of processes."""

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


def image_noise(seed: int, t: int | str, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (high - low, *shape) on the CPU, of which row k depends on (seed, t,
    low + k) alone: image k of a job is the same on every device and whatever the batch size.
    Image k is row k % 16 of block k // 16, and a block is drawn in one call."""
    blocks = range(low // 16, (high - 1) // 16 + 1)
    noise = torch.cat([torch.randn(16, *shape, generator=generator("cpu", seed, "image", t, b))
                       for b in blocks])
    return noise[low - 16 * blocks[0]:][:high - low]
