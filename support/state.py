"""What a training step changes, in one object: the network, its EMA, the optimizers, and the loss
scaler of fp16; and how a step is computed: number format, micro-batches, processes, compiler."""

import contextlib
import copy
import logging

import torch
from torch import Tensor, nn

from support import checkpoints
from support.cli import UserError, shorten
from support.distributed import (
    data_parallel,
    pick_precision,
    should_compile,
    under_autocast,
)


class TrainingState:
    """model: the network on its device; ema: its average, in eval mode; loss(x0, t, y, eps): the
    process's loss, (B,), in the chosen precision, compiled and data-parallel where asked for."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], diffusion,
                 args, device: torch.device):
        self.model, self.optimizers, self.micro_batches = model, optimizers, args.grad_accum
        self.num_timesteps = diffusion.num_timesteps
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.precision = pick_precision(args.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        for opt in optimizers:
            for group in opt.param_groups:
                group["initial_lr"] = group["lr"]
        self.loss: nn.Module | None = Loss(model, diffusion, device, self.precision)
        self.compiled = should_compile(args.compile, device, args.steps)
        if self.compiled:
            # on a machine without a GPU, a warning that there is none
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            # nobody asked for it: where the compiler fails, go on without
            torch._dynamo.config.suppress_errors = args.compile is None
            self.loss.compile()
        self.loss = data_parallel(self.loss, device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")                  # TF32

    def backward(self, x0: Tensor, t: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """The loss of each image, (B,); adds the gradient of its mean over all processes.

        The batch is computed in equal micro-batches (`--grad-accum`): the same gradient in less
        memory. Processes exchange gradients with the last one only.
        """
        parts = list(zip(*(x.chunk(self.micro_batches) for x in (x0, t, y, eps)), strict=True))
        losses = []
        try:
            for i, part in enumerate(parts, 1):
                later = i < len(parts) and hasattr(self.loss, "no_sync")
                with self.loss.no_sync() if later else contextlib.nullcontext():
                    loss = self.loss(*part)
                    self.scaler.scale(loss.mean() / len(parts)).backward()
                losses.append(loss.detach())
        except torch.OutOfMemoryError:
            raise UserError(f"out of GPU memory with {len(part[0])} images at a time: --grad-accum "
                            f"{2 * len(parts)} computes the same step in smaller parts") from None
        return torch.cat(losses)

    def update(self, lr_factor: float, clip: float) -> Tensor:
        """Clip the gradient's norm (0: do not), step every optimizer, clear the gradient. Returns
        the norm before clipping. Where fp16 overflowed, only the scale changes."""
        for opt in self.optimizers:
            self.scaler.unscale_(opt)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip or float("inf"))
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor
            if self.scaler.is_enabled():
                # an overflow in one optimizer's gradients skips the step of all; they test it on
                # the device, where GradScaler.step would wait for the host
                opt.found_inf = (~grad_norm.isfinite()).float()
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.scaler.update()
        return grad_norm

    def state_dict(self) -> dict:
        return dict(ema=self.ema.state_dict(), model=self.model.state_dict(),
                    opt={i: opt.state_dict() for i, opt in enumerate(self.optimizers)},
                    scaler=self.scaler.state_dict())

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises UserError where it does not fit."""
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for i, opt in enumerate(self.optimizers):
                checkpoints.restore_optimizer(opt, state["opt"].get(i))
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"the checkpoint's training state does not fit its model: "
                            f"{shorten(error)}") from None


class Loss(nn.Module):
    """The process's loss of a network as one module, for the compiler and for data-parallel."""

    def __init__(self, model: nn.Module, diffusion, device: torch.device, precision: str):
        super().__init__()
        self.model, self.diffusion = model, diffusion
        self.device, self.precision = device, precision

    def forward(self, x0: Tensor, t: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        net = under_autocast(self.model, self.device, self.precision)
        return self.diffusion.loss(net, x0, t, y, eps)
