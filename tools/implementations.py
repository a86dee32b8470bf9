"""The implementations that tools/benchmark.py times: ours, and the published one.

Each has a name, a precision, `work(n)`, which makes n more training steps, and `sample`.
"""

import contextlib
import copy
import importlib.util
import inspect
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from sample import Checkpoint, sample
from support import data, distributed
from support.cli import UserError, reason, shorten
from support.sampling import resolve_sampling
from support.state import Loss, TrainingState

# Name -> (bf16 or fp32, the attention kernels that torch may choose from; none given: all)
VARIANTS = {"fp32": (False, ()), "bf16": (True, ()),
            "bf16, MATH attention": (True, (SDPBackend.MATH,))}

# ---------------------------------------------------------------- ours


class Steps:
    """No-op stand-in for Run: the steps from `start` on, of which nothing is recorded."""

    def __init__(self, args: Namespace, device: torch.device, start: int, count: int):
        self.args, self.device, self.start, self.count = args, device, start, count

    def steps(self) -> range:
        return range(self.start, self.start + self.count)

    def random(self, step: int) -> distributed.StepRandom:
        return distributed.StepRandom(self.device, self.args.seed, step, self.args.batch_size,
                                      slice(None))

    def log(self, **numbers) -> None:
        pass


class VariantLoss(Loss):
    """The loss with the network's forward in fp32 or bf16, restricted to some attention kernels.
    `distributed.under_autocast` selects one of these; here each runs on any device."""

    bf16: bool
    kernels: tuple

    def forward(self, x0, t, y, eps):
        def net(xt, t, y):
            kernels = sdpa_kernel(list(self.kernels)) if self.kernels else contextlib.nullcontext()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), kernels:
                return self.model(xt, t, y)

        return self.diffusion.loss(net, x0, t, y, eps)


class Ours:
    """A model in training by `train`. ours(n) makes n more steps. variant: a key of VARIANTS
    (default: what training selects)."""

    def __init__(self, name: str, args: Namespace, device: torch.device, images: data.ImageSet,
                 variant: str | None = None):
        self.name, self.args, self.device, self.done = name, args, device, 0
        self.model, self.diffusion = new_model(args, images, device)
        self.state = TrainingState(self.model, train_mnist.make_optimizers(self.model, args),
                                   self.diffusion, args, device)
        self.precision = self.state.precision
        if variant is not None:
            # A class for each variant: dynamo does not guard on which attention kernels are
            # allowed, and would reuse what it has compiled for another instance of the same class
            bf16, kernels = VARIANTS[variant]
            self.precision = "bf16" if bf16 else "fp32"
            loss = type("VariantLoss", (VariantLoss,), dict(bf16=bf16, kernels=kernels))
            self.state.loss = loss(self.model, self.diffusion, device, "")
            if args.compile:
                self.state.loss.compile()
        self.batches = data.Batches(images.to(device), args.batch_size, args.seed, device)

    def __call__(self, steps: int) -> None:
        train_mnist.train(self.batches, self.state, self.diffusion,
                          Steps(self.args, self.device, self.done, steps))
        self.done += steps

    def sample(self, y: Tensor, steps: int, cfg_scale: float, precision: str = "fp32") -> None:
        """DDIM, as sample.py."""
        checkpoint = Checkpoint(self.state.ema, self.diffusion, [], train_mnist.SAMPLING, 0, Path())
        how = resolve_sampling(checkpoint, cfg_scale, steps, "ddim", precision=precision)
        for _ in sample(checkpoint, y, 0, how, batch_size=len(y)):
            pass


def new_model(args: Namespace, images: data.ImageSet, device: torch.device | None = None
              ) -> tuple[DiT, GaussianDiffusion]:
    try:
        model = DiT(**args.sizes, input_size=images.images.shape[-1],
                    in_channels=images.images.shape[1], num_classes=len(images.class_names))
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    diffusion = GaussianDiffusion(**train_mnist.DIFFUSION, prediction=args.prediction,
                                  weighting=args.weighting)
    return (model, diffusion) if device is None else (model.to(device), diffusion.to(device))


def step_flops(args: Namespace, images: data.ImageSet) -> int:
    """Flops of a training step's forward and backward, counted without computing them."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model, diffusion = new_model(args, images)
        x0 = torch.empty(args.batch_size, *images.images.shape[1:])
        y = torch.zeros(args.batch_size, dtype=torch.long)
        diffusion.loss(model, x0, y, y, x0).mean().backward()
    return counter.get_total_flops()


# ---------------------------------------------------------------- the published one


def load_factory(spec: str) -> Callable[..., nn.Module]:
    """The callable FACTORY of FILE.py:FACTORY. Executes the file."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"--against {shorten(spec)}: there is no file {shorten(file)!r}; write "
                        f"FILE.py:FACTORY")
    found = importlib.util.spec_from_file_location("against", file)
    try:
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except Exception as error:              # whatever that file does
        raise UserError(f"{file} cannot be imported: {reason(error)}") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"{file} defines no {shorten(name)!r} that can be called")
    return getattr(module, name)


def build(factory: Callable, sizes: dict) -> nn.Module:
    """factory(**sizes), restricted to the arguments that it takes."""
    accepted = inspect.signature(factory).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    try:
        return factory(**{k: v for k, v in sizes.items() if everything or k in accepted})
    except Exception as error:
        raise UserError(f"--against: the network cannot be built: {reason(error)}") from None


class Published:
    """A network in training by the published loop (train.py of facebookresearch/DiT), in fp32 (TF32
    on a GPU), without its data loader and its log.

    factory(input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, ...)
    returns a network with the published signature, model(x, t, y).
    """

    precision = "fp32"

    def __init__(self, name: str, factory: Callable, args: Namespace, device: torch.device,
                 images: data.ImageSet):
        self.name, self.args, self.device, self.done = name, args, device, 0
        self.null_class = len(images.class_names)
        self.shape = images.images.shape[1:]
        # learn_sigma: the published default is True, which is another model than ours
        self.model = build(factory, dict(
            args.sizes, input_size=self.shape[-1], in_channels=self.shape[0],
            num_classes=self.null_class, learn_sigma=False)).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0)
        self.diffusion = GaussianDiffusion(prediction="eps").to(device)
        self.batches = data.Batches(images.to(device), args.batch_size, args.seed, device)
        self.model.train()                  # the label dropout is in the network
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def __call__(self, steps: int) -> None:
        for step in range(self.done, self.done + steps):
            x0, y = self.batches(step)
            t = torch.randint(0, self.diffusion.num_timesteps, (len(y),), device=self.device)
            eps = torch.randn_like(x0)
            out = self.model(self.diffusion.q_sample(x0, t, eps), t, y)[:, : x0.shape[1]]
            loss = (eps - out).square().mean(dim=(1, 2, 3)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.update_ema(0.9999)
        self.done += steps

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        average = dict(self.ema.named_parameters())
        for name, parameter in self.model.named_parameters():
            average[name].mul_(decay).add_(parameter.data, alpha=1 - decay)

    @torch.no_grad()
    def sample(self, y: Tensor, steps: int, cfg_scale: float) -> Tensor:
        """DDPM's ancestral sampling with `steps` of the 1,000 timesteps and guidance: the batch
        holds every image twice, and each half is computed with and stepped like the other."""
        n, total = len(y), self.diffusion.num_timesteps
        timesteps = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long()
        bar = self.diffusion.alpha_bar[timesteps]
        bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        beta = 1 - bar / bar_prev
        variance = beta * (1 - bar_prev) / (1 - bar)
        tables = [table.float().to(self.device) for table in (
            bar.rsqrt(), (1 / bar - 1).sqrt(), beta * bar_prev.sqrt() / (1 - bar),
            (1 - bar_prev) * (bar / bar_prev).sqrt() / (1 - bar), variance.sqrt())]
        labels = torch.cat([y, torch.full_like(y, self.null_class)]).to(self.device)
        half = torch.randn(n, *self.shape, device=self.device)
        xt = torch.cat([half, half])
        for i in reversed(range(len(timesteps))):
            index = torch.tensor([i] * (2 * n), device=self.device)
            x0_scale, eps_scale, x0_share, xt_share, std = (
                table[index].view(-1, 1, 1, 1) for table in tables)
            half = xt[:n]
            t = timesteps.to(self.device)[index]
            out = self.ema(torch.cat([half, half]), t, labels)[:, : self.shape[0]]
            conditional, unconditional = out.chunk(2)
            eps = unconditional + cfg_scale * (conditional - unconditional)
            eps = torch.cat([eps, eps])
            x0_hat = x0_scale * xt - eps_scale * eps
            xt = x0_share * x0_hat + xt_share * xt + (i > 0) * std * torch.randn_like(xt)
        return xt[:n]

