"""Train a DiT on digits.   [read this third: `train` is the algorithm, the rest surrounds it]

    python train_mnist.py                                   a GPU, else the CPU, by its preset
    python train_mnist.py --resume                          go on where the newest run stopped
    python train_mnist.py --dataset folder:PATH             your images, a folder per class
    torchrun --nproc_per_node=8 train_mnist.py              the same run, on 8 GPUs

Each step: a batch, some labels dropped, a timestep and noise for each image, and the network
learns to tell the noise from the image. What it has learned is averaged over the steps (EMA).
"""

import argparse
import copy
import shlex
import time
from pathlib import Path

import torch
from torch import nn

import checkpoints
import data as data_sets
from cli import UserError, cli, generator, mix_seed, printable
from diffusion import GaussianDiffusion
from dit import MODELS, DiT
from ranks import Ranks, check_compiler, pick_precision, under_autocast
from resume import restore, resumed, take_up
from runs import Run, loss_curve, open_folder, write_first
from settings import checked_recipe, fitting, parser, recipe_of, resolve

OUTPUT = Path("output")
SAMPLING = dict(sampler="ddim", steps=50, eta=0.0, cfg_scale=1.75)     # what sample.py does unasked
DIFFUSION = dict(num_timesteps=1000, beta_start=1e-4, beta_end=0.02)   # DDPM section 4


# ---------------------------------------------------------------- the algorithm


def train(run: Run, s: argparse.Namespace, ranks: Ranks, images, batches, model, net, ema,
          diffusion: GaussianDiffusion, optimizers: list, scaler) -> None:
    """Steps run.start to run.stop. net is the model as it is run (autocast, several ranks);
    scaler scales the loss for fp16, and does nothing in bf16 and fp32."""
    device, B = ranks.device, s.batch_size
    with run:
        for step in range(run.start, run.stop):
            rng = generator(device, s.seed, "step", step)
            x0, y = images.batch(batches(step), device)                      # in [-1, 1]
            dropped = torch.rand(B, generator=rng, device=device) < s.label_dropout
            y = torch.where(dropped, model.null_class, y)                    # "no class"
            t = torch.randint(diffusion.num_timesteps, (B,), generator=rng, device=device)
            if s.timesteps == "logit-normal":           # instead: seldom near the ends
                z = torch.randn(B, generator=rng, device=device)
                t = (z.sigmoid() * diffusion.num_timesteps).long()
            eps = torch.randn(x0.shape, generator=rng, device=device)

            losses = []
            for part in ranks.shares(B, s.grad_accum):                  # all of B, by default
                loss = diffusion.loss(net, x0[part], t[part], y[part], eps[part])
                scaler.scale(loss.mean() / s.grad_accum).backward()
                losses.append(torch.stack([loss, diffusion.loss_in_eps(loss, t[part])]).detach())

            lr_factor = schedule(step, s.steps, s.warmup, s.decay)
            grad_norm = update(optimizers, scaler, model, s.clip, lr_factor)
            ema_decay = min(s.ema_decay, (1 + step) / (10 + step))      # forgets the start soon
            update_ema(ema, model, ema_decay)

            run.record(step, *torch.cat(losses, dim=1).mean(dim=1), grad_norm, s.lr * lr_factor)
            if run.after(step):
                break


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The learning rate's factor: up over `warmup` steps, to 0 over the last `decay` of all."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))


def update(optimizers: list, scaler, model: nn.Module, clip: float, lr_factor: float):
    """Clip the gradient's norm (0: do not), take one step, clear the gradient. Returns the norm
    before. Where fp16 overflowed, the scaler's smaller scale is all that comes of the step."""
    for opt in optimizers:
        scaler.unscale_(opt)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
    overflow = scaler.is_enabled() and not grad_norm.isfinite()     # in one optimizer: none steps
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        if not overflow:
            scaler.step(opt)
        opt.zero_grad(set_to_none=True)
    scaler.update()
    return grad_norm


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, for every parameter."""
    for averaged, current in zip(ema.parameters(), model.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


def make_optimizers(model: nn.Module, s: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the blocks' attention and MLP matrices and AdamW for the rest."""
    muon = {name: p for name, p in model.named_parameters() if s.optimizer == "muon"
            and p.ndim == 2 and name.startswith("blocks.") and "adaLN" not in name}
    rest = [p for name, p in model.named_parameters() if name not in muon]
    optimizers = [torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, 0.99), weight_decay=s.weight_decay)]
    if muon:
        optimizers.append(torch.optim.Muon(muon.values(), lr=s.muon_lr, momentum=0.95,
                                           weight_decay=s.weight_decay))
    for opt in optimizers:
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------- around it


def main(argv: list[str] | None = None) -> int:
    given = vars(parser(__doc__).parse_args(argv))
    if "resume" in given and "init_from" in given:
        raise UserError("--resume goes on with a run, --init-from starts a new one: give one")
    ranks = Ranks.join(given.get("device"))
    device = ranks.device

    # Values, and the checkpoint they may come from
    lock, folder, source = None, None, None

    def origin() -> tuple:
        nonlocal lock, folder, source
        state, start_from = None, None
        if "resume" in given:
            lock, folder, source, state = resumed(given, OUTPUT, ranks)
        if "init_from" in given:
            start_from = checkpoints.read_any(Path(given["init_from"]))
        return state, start_from

    state, start_from = ranks.from_rank_0(origin)
    s = resolve(given, device.type, state and state["config"]["recipe"],
                inherited(start_from), ranks.say)
    ranks.check_batch(s.batch_size, s.grad_accum)

    # Data
    images, s.dataset = load_data(s, ranks, named="dataset" in given or "data_dir" in given
                                  or state is not None)
    size, channels = images.images.shape[-1], images.images.shape[1]
    if "model" not in given and start_from is None:
        s.model = fitting(s.model, size)
    about_data = dict(dataset=images.name, images=len(images.images), image_size=size,
                      channels=channels, digest=images.digest())
    if state and {**state["config"]["data"], "dataset": images.name} != about_data:
        raise UserError(f"the data set is not the one of the checkpoint: {about_data} here, "
                        f"{printable(state['config']['data'])} there")
    if (first := ranks.from_rank_0(lambda: about_data)) != about_data:
        raise UserError(f"process {ranks.rank} has other data than process 0: {about_data} here, "
                        f"{first} there")

    # Model, its average, diffusion, optimizers
    model_args = dict(MODELS[s.model], input_size=size, in_channels=channels,
                      num_classes=len(images.class_names))
    torch.manual_seed(mix_seed(s.seed, "init"))
    try:
        model = DiT(**model_args)
    except ValueError as error:
        raise UserError(f"--model {s.model}: {error}") from None
    if start_from is not None:
        weights = checkpoints.weights_in(start_from, Path(given["init_from"]))
        misfits = checkpoints.load_fitting(model, weights)
        ranks.say(f"weights from {given['init_from']}; what does not fit starts anew:",
                  *(f"  {line}" for line in misfits or ["(all fit)"]))
    model.to(device)
    ema = copy.deepcopy(model).eval()
    diffusion = GaussianDiffusion(**DIFFUSION, prediction=s.prediction).to(device)
    precision = pick_precision(s.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    optimizers = make_optimizers(model, s)
    start = restore(state, model, ema, optimizers, scaler) if state else 0
    if start >= s.steps:
        ranks.say(f"{folder} is complete at step {start:,}: a larger --steps goes on from there"
                  if start == s.steps else
                  f"{folder} is at step {start:,} already, beyond --steps {s.steps:,}")
        return 0
    if s.compile:
        check_compiler(device)
        model.compile()
    net = under_autocast(ranks.wrap(model), device, precision)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                  # TF32

    # The run's folder, with a checkpoint of its start, so that a kill at any moment can be resumed
    config = dict(model=model_args, diffusion=DIFFUSION, prediction=s.prediction, data=about_data,
                  recipe=recipe_of(s), sampling=SAMPLING)

    def save(done: int) -> None:
        checkpoints.save(folder / f"step_{done:07d}.pt", dict(
            step=done, config=config, class_names=images.class_names, ema=ema.state_dict(),
            model=model.state_dict(), opt={i: o.state_dict() for i, o in enumerate(optimizers)},
            scaler=scaler.state_dict()))
        checkpoints.keep_last(folder, s.keep)

    def begin() -> Path:
        nonlocal lock, folder
        if folder is None:
            folder, lock = open_folder(s.out, OUTPUT, f"{images.name}-{s.model}")
        here = (folder / f"step_{start:07d}.pt").exists()
        write_first(folder, config, None if here else lambda: save(start))
        if state:
            take_up(folder, source, start, ranks)
        return folder

    folder = ranks.from_rank_0(begin)
    stop = min(s.steps, start + (s.stop_after or s.steps))
    parameters = sum(p.numel() for p in model.parameters())
    ranks.say(
        f"{s.model} on {images.name} ({len(images.images):,} images, {channels}x{size}x{size}, "
        f"{len(images.class_names)} classes): {parameters:,} parameters",
        f"{device.type} preset, {precision}{', compiled' if s.compile else ''}, {ranks.world} "
        f"process{'es' * (ranks.world > 1)}: steps {start:,} to {stop:,} of {s.steps:,}, batch "
        f"{s.batch_size}, predicts {s.prediction}, {s.optimizer}",
        f"run folder: {folder}")

    # Train
    run = Run(folder, ranks, columns=("loss", "loss_eps", "grad_norm", "lr"),
              finite=2 if scaler.is_enabled() else 3,               # the scaler meets inf gradients
              save=save, preview=previewer(folder, ema, diffusion, s.seed),
              every=dict(log=s.log_every, preview=s.preview_every, save=s.save_every),
              start=start, stop=stop, total=s.steps, batch_size=s.batch_size)
    batches = data_sets.Batches(len(images.images), s.batch_size, s.seed, device)
    begun = time.perf_counter()
    try:
        train(run, s, ranks, images.to(device), batches, model, net, ema, diffusion, optimizers,
              scaler)
    except torch.OutOfMemoryError:
        raise UserError(f"out of GPU memory with --batch-size {s.batch_size}: --grad-accum "
                        f"{2 * s.grad_accum} makes the same update in smaller parts") from None
    ranks.leave()
    del lock
    return farewell(run, ranks, time.perf_counter() - begun, s.device)


def inherited(start_from) -> dict:
    """What a checkpoint of this project given to --init-from decides, unless flags do."""
    if not isinstance(start_from, dict) or start_from.get("format") != checkpoints.FORMAT:
        return {}
    recipe = checked_recipe(start_from["config"]["recipe"])
    return {"model": recipe["model"], "prediction": recipe["prediction"]}


def load_data(s: argparse.Namespace, ranks: Ranks, named: bool):
    """(the images, the data set's name). Glyphs, with a banner, where the user named no data and
    MNIST is not to be had. Rank 0 looks, and downloads, before the others; then one process of
    each further machine."""
    found = None

    def fetch() -> str:
        nonlocal found
        try:
            found = data_sets.load(s.dataset, s.data_dir, s.image_size)
        except data_sets.DataMissing as missing:
            if named:
                raise
            ranks.say("=" * 80, f"NO MNIST: {missing}", "Training on GLYPHS instead: digits drawn "
                      "with a font, not handwritten ones.", "=" * 80)
            return "glyphs"
        return s.dataset

    dataset = ranks.from_rank_0(fetch)
    if found is None and ranks.local == 0:
        found = data_sets.load(dataset, s.data_dir, s.image_size)
    ranks.largest(0)            # all wait for these
    return found or data_sets.load(dataset, s.data_dir, s.image_size), dataset


def previewer(folder: Path | None, ema: DiT, diffusion: GaussianDiffusion, seed: int):
    """A function that draws samples/step_N.png: a class per row, always from the same noise."""
    classes, columns = min(10, ema.num_classes), 6
    shape = (classes * columns, ema.in_channels, ema.input_size, ema.input_size)
    xT = torch.randn(shape, generator=generator("cpu", seed, "preview")).to(ema.pos_embed.device)
    y = torch.arange(classes, device=xT.device).repeat_interleave(columns)

    def preview(done: int, stopped) -> None:
        for _t, xt, _x0_hat in diffusion.ddim_sample(ema, xT, y, SAMPLING["cfg_scale"], steps=20):
            if stopped():
                return
            sample = xt
        picture = data_sets.grid(data_sets.to_uint8(sample), columns)
        data_sets.save_picture(folder / "samples" / f"step_{done:07d}.png", picture)

    return preview


def farewell(run: Run, ranks: Ranks, seconds: float, device: str | None) -> int:
    """The last words of a run, and its exit status."""
    stopped = run.signals.received
    if ranks.rank == 0:
        newest = run.last_saved()
        if run.saved_at != run.recorded:
            raise UserError(f"step {run.recorded} could not be saved; the last checkpoint is "
                            f"{newest}", status=1)
        ranks.say(f"{run.recorded - run.start:,} steps in {seconds / 60:.1f} minutes, loss "
                  f"{run.loss:.4f}; saved: {newest}")
        if run.recorded < run.total:
            ranks.say(f"stopped at step {run.recorded:,} of {run.total:,}; to go on: " + shlex.join(
                ["python", "train_mnist.py", "--resume", "--out", str(run.folder),
                 *(["--device", device] if device else [])]))
        elif (curve := loss_curve(run.folder)) is not None:
            ranks.say(f"loss curve: {curve}")
        if not stopped:
            ranks.say("now: " + shlex.join(["python", "sample.py", newest]))
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    cli(main)
