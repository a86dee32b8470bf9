"""Train a DiT on digits: `train` is the algorithm; the rest prepares it.

    python train_mnist.py                                   a GPU, else the CPU, each with a preset
    python train_mnist.py --resume                          continue the newest run
    python train_mnist.py --dataset folder:PATH             your images, a folder per class
    torchrun --nproc_per_node=8 train_mnist.py              the same run, each batch on 8 GPUs

Each step takes a batch of images, drops some labels, noises each image to a timestep of its own,
and trains the network to predict the clean image. Samples are drawn with the EMA of the weights.
"""

import support.threads  # noqa: F401  (before torch)

import torch
from torch import nn

from diffusion import GaussianDiffusion
from dit import MODELS
from support import components
from support.cli import run_command
from support.data import Batches
from support.muon import BatchedMuon
from support.preview import Preview
from support.run import Run
from support.settings import Settings
from support.state import TrainingState

DIFFUSION = dict(num_timesteps=1000, beta_start=1e-4, beta_end=0.02)    # DDPM section 4
SAMPLING = dict(sampler="ddim", steps=25, eta=0.0, cfg_scale=1.6)       # sample.py's defaults

# Measured: docs/experiments.md, "The recipe". Each value is the default of a flag.
RECIPE = dict(
    prediction="x0",            # the clean image; its error is weighted as one in v (--weighting)
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
    "gpu": dict(model="DiT-Mini/2", steps=12_000, batch_size=256, warmup=500,
                ema_decay=0.999,            # untuned, like the rest of this preset
                log_every=50, preview_every=1000, save_every=1000),
    "cpu": dict(model="DiT-Nano/7",         # large patches: three times the steps per minute
                steps=4_000, batch_size=128, warmup=100,
                ema_decay=0.995,            # averages about 200 steps: short enough for 4,000
                log_every=20, preview_every=500, save_every=500),
}


# ---------------------------------------------------------------- the algorithm


def train(batches: Batches, state: TrainingState, diffusion: GaussianDiffusion, run: Run) -> None:
    """The training loop. B is the batch size (of this rank, under torchrun)."""
    args, draw_t = run.args, TIMESTEPS[run.args.timesteps]
    for step in run.steps():
        rng = run.random(step)                  # .uniform(): (B,); .normal(*shape): (B, *shape)
        x0, y = batches(step)                                   # (B, C, H, H) in [-1, 1]; (B,)
        dropped = rng.uniform() < args.label_dropout
        y = torch.where(dropped, state.model.null_class, y)     # "no class": for guidance
        t = draw_t(diffusion, rng, args)                        # (B,)
        eps = rng.normal(*x0.shape[1:])                         # (B, C, H, H)

        # loss = diffusion.loss(model, x0, t, y, eps), (B,); loss.mean().backward()
        loss = state.backward(x0, t, y, eps)
        lr_factor = schedule(step, args.steps, args.warmup, args.decay)
        grad_norm = state.update(lr_factor, args.clip)          # clipped; an optimizer step
        update_ema(state.ema, state.model, min(args.ema_decay, (1 + step) / (10 + step)))

        run.log(loss=loss, loss_eps=diffusion.loss_in_eps(loss, t), grad_norm=grad_norm,
                lr=args.lr * lr_factor, t=t)


TIMESTEPS = {       # the distribution of t, (B,): t = TIMESTEPS[name](diffusion, rng, args)
    "uniform": lambda diffusion, rng, args: diffusion.t_from_uniform(rng.uniform()),
    "log-normal": lambda diffusion, rng, args: diffusion.t_from_noise_level(
        args.noise_mean + args.noise_std * rng.normal()),       # of sigma / alpha
    "logit-normal": lambda diffusion, rng, args: diffusion.t_from_uniform(rng.normal().sigmoid()),
}


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor of the learning rate: linear warm-up, then constant, then linear decay to 0 over
    the last fraction `decay` of all steps."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for every parameter. Warm-up: the decay grows with
    the step, (1 + step) / (10 + step), so that the average soon leaves the initial weights."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


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


def main(argv: list[str] | None = None) -> int:
    settings = Settings(RECIPE, PRESETS)
    run = Run(vars(settings.parser(__doc__).parse_args(argv)), settings)
    args = run.args

    images = run.load_images()                                  # (N, C, H, H), uint8, and labels
    network, model_args = components.network_for(args, dict(    # DiT
        MODELS[args.model], input_size=images.size, in_channels=images.channels,
        num_classes=len(images.class_names)))
    process, diffusion_args = components.process_for(args, DIFFUSION)       # GaussianDiffusion

    model = run.build(network, args.model, model_args)          # on the device, weights from --seed
    diffusion = process(**diffusion_args).to(run.device)
    state = TrainingState(model, make_optimizers(model, args), diffusion, args, run.device)
    batches = Batches(images.to(run.device), args.batch_size, args.seed, run.device, args.flip,
                      run.share)

    config = dict(network=args.network, model=model_args, process=args.process,
                  diffusion=diffusion_args, sampling=components.sampling_for(diffusion, SAMPLING))
    preview = Preview(state.ema, diffusion, config["sampling"], args.seed)
    run.begin(state, config, images.class_names, preview)
    train(batches, state, diffusion, run)
    return run.finish()


if __name__ == "__main__":
    run_command(main)
