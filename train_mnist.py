"""Train a DiT on digits: `train` is the algorithm; the rest prepares it.

    python train_mnist.py                                   a GPU, else the CPU, each with a preset
    python train_mnist.py --resume                          continue the newest run
    python train_mnist.py --dataset folder:PATH             your images, a folder per class
    torchrun --nproc_per_node=8 train_mnist.py              the same run, each batch on 8 GPUs

Each step takes a batch of images, drops some labels, noises each image to a timestep of its own,
and trains the network to predict the clean image. Samples are drawn with the EMA of the weights.
"""

import support.threads  # noqa: F401  (before torch)

import copy
from functools import partial

import torch
from torch import Tensor, nn

from diffusion import PREDICTIONS, WEIGHTINGS, GaussianDiffusion
from dit import MODELS
from sample import Checkpoint, sample
from support.command import UserError, run_command
from support.compute import prepare, seed_of, set_learning_rates
from support.data import Batches
from support.muon import BatchedMuon
from support.registry import NETWORKS, PROCESSES
from support.run import Run

SAMPLING = dict(sampler="ddim", steps=25, eta=0.0)      # the checkpoint's, with cfg_scale

# Measured: docs/experiments.md, "The recipe". Each value is the default of a flag.
RECIPE = dict(
    network="dit",
    process="ddpm",
    prediction="x0",            # what the output means: the clean image
    weighting="v",              # its error is weighted as one in v; the paper: eps, plain
    timesteps="log-normal",     # ln(sigma / alpha) is normal: few timesteps near 0 and 999
    noise_mean=0.4,             # between SD3 (0, 1) and JiT (0.8, 0.8)
    noise_std=0.9,
    label_dropout=0.1,          # Ho & Salimans; untuned
    optimizer="muon",           # ahead of AdamW at 4e-3
    lr=2e-3,                    # of AdamW, for what Muon does not train; untuned with Muon
    muon_lr=0.02,               # Keller Jordan's default; 0.01 is level, 0.04 worse
    decay=0.4,                  # the EMA hides most of its effect; it costs nothing
    weight_decay=0.0,           # as the paper
    clip=1.0,                   # the paper does not clip; its learning rate is 20 times lower
)
PRESETS = {
    "gpu": dict(model="DiT-Micro/7",        # the best after a minute: docs/experiments.md
                steps=50_000, batch_size=256, warmup=200,
                ema_decay=0.9995,           # averages about 2,000 steps
                cfg_scale=1.15,             # a well-trained model needs little guidance
                log_every=100, preview_every=5000, save_every=5000),
    "cpu": dict(model="DiT-Nano/7",         # large patches: 2.5 times the steps of patch 4
                steps=4_000, batch_size=128, warmup=100,
                ema_decay=0.995,            # averages about 200 steps: short enough for 4,000
                cfg_scale=1.6,              # 99.5% right with most of the variety
                log_every=20, preview_every=500, save_every=500),
}
CHOICES = dict(model=MODELS, network=NETWORKS, process=PROCESSES, prediction=PREDICTIONS,
               weighting=WEIGHTINGS, timesteps=("log-normal", "logit-normal", "uniform"),
               optimizer=("muon", "adamw"))


# ---------------------------------------------------------------- the algorithm


def train(model: nn.Module, ema: nn.Module, optimizers: list[torch.optim.Optimizer],
          diffusion: GaussianDiffusion, batches: Batches, run: Run) -> None:
    """The training loop. B is the batch size (of this process, under torchrun)."""
    args = run.args
    net = prepare(model, run.device, run.precision, run.compiled)   # mixed precision, compiler ...
    update = partial(training_step, net, ema, optimizers, diffusion, args.clip or float("inf"))
    update = run.replayed(update)                               # on one GPU: as a CUDA graph
    for step in run.steps():                                    # saves and previews in between
        rng = run.random(step)                                  # a function of --seed and step
        x0, y = batches(step)                                   # (B, C, H, H) in [-1, 1]; (B,)
        dropped = rng.uniform() < args.label_dropout
        y = torch.where(dropped, model.null_class, y)           # "no class": for guidance
        t = draw_timesteps(diffusion, rng, args)                # (B,)
        eps = rng.normal(*x0.shape[1:])                         # (B, C, H, H)

        lr_factor = schedule(step, args.steps, args.warmup, args.decay)
        set_learning_rates(optimizers, lr_factor)
        loss, grad_norm = update(x0, t, y, eps, ema_decay_at(step, args.ema_decay))
        run.log(loss=loss, t=t, grad_norm=grad_norm, lr=args.lr * lr_factor)


def training_step(net, ema, optimizers, diffusion, clip: float, x0: Tensor, t: Tensor, y: Tensor,
                  eps: Tensor, ema_decay: float | Tensor) -> tuple[Tensor, Tensor]:
    """One update of net and ema, in place. Returns the loss of each image (B,) and the norm of the
    gradient before clipping."""
    loss = diffusion.loss(net, x0, t, y, eps)                   # (B,)
    loss.mean().backward()
    grad_norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
    for opt in optimizers:
        opt.step()
        opt.zero_grad()
    update_ema(ema, net, ema_decay)
    return loss.detach(), grad_norm


def draw_timesteps(diffusion: GaussianDiffusion, rng, args) -> Tensor:
    """Timesteps (B,) with the distribution that --timesteps names."""
    if args.timesteps == "log-normal":      # the noise level, ln(sigma / alpha), is normal
        return diffusion.t_from_noise_level(args.noise_mean + args.noise_std * rng.normal())
    if args.timesteps == "logit-normal":
        return diffusion.t_from_uniform(rng.normal().sigmoid())
    return diffusion.t_from_uniform(rng.uniform())


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor of the learning rate: linear warm-up, then constant, then linear decay to 0 over
    the last fraction `decay` of all steps."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))


def ema_decay_at(step: int, ema_decay: float) -> float:
    """The EMA's decay at a step. Its warm-up averages over about a tenth of the steps so far, so
    that the initial weights soon drop out."""
    return min(ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float | Tensor) -> None:
    """ema <- decay * ema + (1 - decay) * model, for every parameter."""
    averages, weights, share = list(ema.parameters()), list(model.parameters()), 1 - decay
    if isinstance(share, Tensor):                           # of a step that is one CUDA graph
        share = [share.to(weights[0].dtype)] * len(weights)
    torch._foreach_lerp_(averages, weights, share)


def make_optimizers(model: nn.Module, args) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the blocks' attention and MLP matrices and AdamW for the rest."""
    muon = {name: p for name, p in model.named_parameters() if args.optimizer == "muon"
            and p.ndim == 2 and name.startswith("blocks.") and "adaLN" not in name}
    rest = [p for name, p in model.named_parameters() if name not in muon]
    optimizers = [torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.99),
                                    weight_decay=args.weight_decay, fused=True)]
    if muon:
        optimizers.append(BatchedMuon(muon.values(), lr=args.muon_lr, momentum=0.95,
                                      weight_decay=args.weight_decay))
    return optimizers


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None, run_type: type = Run) -> int:
    run = run_type(argv, __doc__, RECIPE, PRESETS, CHOICES)     # the flags; what --resume continues
    args = run.args
    images = run.load_images()                              # (N, C, H, H), uint8, and labels

    # The network, its EMA, the process
    process = PROCESSES[args.process]                       # GaussianDiffusion
    sizes = dict(MODELS[args.model], input_size=images.size, in_channels=images.channels,
                 num_classes=len(images.class_names), **getattr(process, "network_arguments", {}))
    objective = dict(prediction=args.prediction, weighting=args.weighting)
    torch.manual_seed(seed_of(args.seed, "init"))
    try:
        model = NETWORKS[args.network](**sizes)             # DiT
        diffusion = process(**objective).to(run.device)
    except ValueError as error:                             # the patch does not fit, say
        raise UserError(f"--model {args.model}: {error}") from None
    run.load_initial(model, images.class_names)                 # --init-from
    model = model.to(run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, args)
    batches = Batches(images.to(run.device), args.batch_size, args.seed, run.device, args.flip,
                      run.share)

    # The run: its folder, its checkpoints, its previews
    sampling = {**SAMPLING, "cfg_scale": args.cfg_scale, **getattr(process, "sampling", {}),
                **images.sampling}
    config = dict(network=args.network, model=sizes, process=args.process, diffusion=objective,
                  sampling=sampling)
    checkpoint = Checkpoint(ema, diffusion, images.class_names, sampling)

    def preview(columns: int = 6) -> tuple[Tensor, int]:
        """Samples of the EMA, a class per row, always from the same noise."""
        y = torch.arange(min(10, len(images.class_names))).repeat_interleave(columns)
        return torch.cat(list(sample(checkpoint, y, seed=args.seed))), columns

    run.begin(model, ema, optimizers, diffusion, config, images.class_names, preview)
    train(model, ema, optimizers, diffusion, batches, run)
    return run.finish()


if __name__ == "__main__":
    run_command(main)
