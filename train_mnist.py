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
import importlib.util
import json
import math
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import nn

import checkpoints
import data as data_sets
from diffusion import PREDICTIONS, GaussianDiffusion
from dit import MODELS, DiT
from runs import (
    Parser, Ranks, Run, UserError, atomic_write, checkpoints_in, cli, generator, holds_run,
    lock_folder, loss_curve, mix_seed, new_folder, newest_run, number, pick_precision, printable,
    read_metrics, under_autocast,
)

OUTPUT = Path("output")
SAMPLING = dict(sampler="ddim", steps=50, eta=0.0, cfg_scale=2.0)      # what sample.py does unasked
DIFFUSION = dict(num_timesteps=1000, beta_start=1e-4, beta_end=0.02)   # DDPM section 4

# Values that depend on the device; README.md, "The recipe", says what was measured.
PRESETS = {
    "gpu": dict(model="DiT-Mini/2", steps=12_000, batch_size=256, ema_decay=0.999, warmup=500,
                log_every=50, preview_every=1000, save_every=1000),
    "cpu": dict(model="DiT-Nano/4", steps=2_400, batch_size=128, ema_decay=0.995, warmup=100,
                log_every=20, preview_every=300, save_every=300),
}
DEFAULTS = dict(
    dataset="mnist", data_dir="data", image_size=None, prediction="v", optimizer="muon", lr=2e-3,
    muon_lr=0.02, decay=0.4, weight_decay=0.0, clip=1.0, label_dropout=0.1, grad_accum=1,
    precision="auto", compile=False, seed=0, keep=3,
)
# What may change when a run is resumed: nothing that changes what a step computes.
FREE = {"steps", "log_every", "preview_every", "save_every", "keep", "device", "data_dir", "out",
        "stop_after", "resume", "grad_accum"}


# ---------------------------------------------------------------- the algorithm


def train(run: Run, s: argparse.Namespace, ranks: Ranks, images, batches, model, net, ema, diffusion,
          optimizers: list, scaler) -> None:
    """Steps run.start to run.stop. net is the model as it is run (autocast, several ranks)."""
    device, B = ranks.device, s.batch_size
    with run:
        for step in range(run.start, run.stop):
            rng = generator(device, s.seed, "step", step)
            x0, y = images.batch(batches(step), device)                      # in [-1, 1]
            dropped = torch.rand(B, generator=rng, device=device) < s.label_dropout
            y = torch.where(dropped, model.null_class, y)                    # "no class"
            t = torch.randint(diffusion.num_timesteps, (B,), generator=rng, device=device)
            eps = torch.randn(x0.shape, generator=rng, device=device)

            losses = []
            for part in ranks.shares(net, B, s.grad_accum):                  # all of B, by default
                loss = diffusion.loss(net, x0[part], t[part], y[part], eps[part])
                scaler.scale(loss.mean() / s.grad_accum).backward()
                losses.append(torch.stack([loss, diffusion.loss_in_eps(loss, t[part])]).detach())

            lr_factor = schedule(step, s.steps, s.warmup, s.decay)
            grad_norm = update(optimizers, scaler, model, s.clip, lr_factor)
            update_ema(ema, model, min(s.ema_decay, (1 + step) / (10 + step)))

            run.record(step, *torch.cat(losses, dim=1).mean(dim=1), grad_norm, s.lr * lr_factor)
            if run.after(step):
                break


def schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The learning rate's factor: up over `warmup` steps, down to 0 over the last `decay` of all."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))


def update(optimizers: list, scaler, model: nn.Module, clip: float, lr_factor: float) -> torch.Tensor:
    """Clip the gradient's norm, take one step, clear the gradient. Returns the norm before."""
    for opt in optimizers:
        scaler.unscale_(opt)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
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
    """AdamW for everything; or Muon for the blocks' attention and MLP matrices, AdamW for the rest."""
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
    given = vars(parser().parse_args(argv))
    ranks = Ranks.join(given.get("device"))

    # Where the run lives, and the checkpoint it starts from
    lock, folder, state, start_weights = None, None, None, None
    if ranks.rank == 0 and "resume" in given:
        lock, folder, state = find_resumed(given, ranks)
    if "init_from" in given:
        start_weights = ranks.from_rank_0(
            lambda: checkpoints.read_archive(Path(given["init_from"])))
    state = ranks.from_rank_0(lambda: state)
    s = settings(given, state, start_weights, ranks)
    ranks.check_batch(s.batch_size, s.grad_accum)

    # Data
    images, s.dataset = load_data(given, s, ranks)
    size, channels = images.images.shape[-1], images.images.shape[1]
    about_data = dict(dataset=images.name, images=len(images.images), image_size=size,
                      channels=channels, digest=images.digest())
    if state and state["config"]["data"] != about_data:
        raise UserError(f"the data set is not the one of the checkpoint: {about_data} here, "
                        f"{printable(state['config']['data'])} there")

    # Model, its average, diffusion, optimizers
    model_args = dict(MODELS[s.model], input_size=size, in_channels=channels,
                      num_classes=len(images.class_names))
    torch.manual_seed(mix_seed(s.seed, "init"))
    try:
        model = DiT(**model_args)
    except ValueError as error:
        raise UserError(f"--model {s.model}: {error}") from None
    if start_weights is not None:
        misfits = checkpoints.load_fitting(
            model, checkpoints.weights_in(start_weights, Path(given["init_from"])))
        ranks.say(f"weights from {given['init_from']}; starting anew where they do not fit:",
                  *(f"  {line}" for line in misfits or ["(all fit)"]))
    ema = copy.deepcopy(model).eval()
    diffusion = GaussianDiffusion(**DIFFUSION, prediction=s.prediction).to(ranks.device)
    config = dict(model=model_args, diffusion=DIFFUSION, prediction=s.prediction, data=about_data,
                  recipe={k: v for k, v in vars(s).items() if k not in ("device", "out")},
                  sampling=SAMPLING)
    precision = pick_precision(s.precision, ranks.device)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16")
    model.to(ranks.device), ema.to(ranks.device)
    optimizers = make_optimizers(model, s)
    start = restore(state, model, ema, optimizers, scaler) if state else 0
    if start >= s.steps:
        ranks.say(f"{folder} is complete at step {start}: a larger --steps goes on from there")
        return 0
    if s.compile:
        check_compiler(ranks.device)
        model.compile()
    net = under_autocast(ranks.wrap(model), ranks.device, precision)
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")                  # TF32

    # The run's folder; a checkpoint of step 0, so that a kill at any moment can be resumed
    def save(done: int) -> None:
        scaled = dict(scaler.state_dict())
        checkpoints.save(folder / f"step_{done:07d}.pt", dict(
            step=done, config=config, class_names=images.class_names, ema=ema.state_dict(),
            model=model.state_dict(), opt=dict(enumerate(o.state_dict() for o in optimizers)),
            scaler=scaled))
        checkpoints.keep_last(folder, s.keep)

    if ranks.rank == 0:
        try:
            if folder is None:
                label = f"{images.name}-{s.model}"
                folder = Path(s.out) if s.out else new_folder(OUTPUT, label)
                if s.out and folder.is_dir() and holds_run(folder):
                    raise UserError(f"{folder} already holds a run: --resume goes on with it, "
                                    f"another --out starts a new one")
                folder.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(folder)
            if start == 0:
                save(0)
            atomic_write(folder / "config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror or error}") from None

    stop = min(s.steps, start + (s.stop_after or s.steps))
    run = Run(folder, ranks, ("loss", "loss_eps", "grad_norm", "lr"), finite=1 if scaler.is_enabled() else 3,
              save=save, preview=previewer(folder, ema, diffusion, len(images.class_names), s.seed),
              every=dict(log=s.log_every, preview=s.preview_every, save=s.save_every),
              start=start, stop=stop, total=s.steps, batch_size=s.batch_size)
    parameters = sum(p.numel() for p in model.parameters())
    ranks.say(
        f"{s.model} on {images.name} ({len(images.images):,} images, {channels}x{size}x{size}, "
        f"{len(images.class_names)} classes): {parameters:,} parameters",
        f"{ranks.device.type}, {precision}{', compiled' if s.compile else ''}, {ranks.world} "
        f"process{'es' * (ranks.world > 1)}: steps {start:,} to {stop:,} of {s.steps:,}, batch "
        f"{s.batch_size}, predicts {s.prediction}, {s.optimizer}",
        f"run folder: {folder}")

    begun = time.perf_counter()
    batches = data_sets.Batches(len(images.images), s.batch_size, s.seed, ranks.device)
    try:
        train(run, s, ranks, images.to(ranks.device), batches, model, net, ema, diffusion, optimizers, scaler)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory with --batch-size {s.batch_size}: --grad-accum "
                        f"{2 * s.grad_accum} makes the same update in smaller parts") from None
    finally:
        ranks.leave()
    del lock
    return farewell(run, ranks, s, time.perf_counter() - begun)


def farewell(run: Run, ranks: Ranks, s: argparse.Namespace, seconds: float) -> int:
    """The last words of a run, and its exit status."""
    if ranks.rank > 0:
        return 128 + run.signals.received if run.signals.received else 0
    if run.saved_at is None or run.saved_at < run.recorded:
        raise UserError(f"the last steps could not be saved; the last checkpoint is "
                        f"{run.last_saved()}", status=1)
    newest = run.last_saved()
    resume = shlex.join(["python", "train_mnist.py", "--resume", "--out", str(run.folder)])
    ranks.say(f"{run.recorded - run.start:,} steps in {seconds / 60:.1f} minutes, loss "
              f"{run.loss:.4f}; saved: {newest}")
    if run.signals.received:
        ranks.say(f"stopped at step {run.recorded:,}; to go on: {resume}")
        return 128 + run.signals.received
    if run.recorded < run.total:
        ranks.say(f"to go on to step {run.total:,}: {resume}")
    else:
        try:
            curve = loss_curve(run.folder)
            ranks.say(f"loss curve: {curve}" if curve else
                      "no loss curve: pip install matplotlib draws it at the end of a run")
        except OSError as error:
            ranks.warn(f"the loss curve cannot be written ({error.strerror})")
    ranks.say("now: " + shlex.join(["python", "sample.py", newest]))
    return 0


def find_resumed(given: dict, ranks: Ranks) -> tuple:
    """(lock, folder, state) of the run to go on with; state is None where the run was stopped
    before its first checkpoint, and folder None where a checkpoint branches off to a new --out."""
    out = Path(given["out"]) if "out" in given else None
    if given["resume"]:
        path = Path(given["resume"])
        state = checkpoints.load(path, full=True)
        if out is not None and (not out.is_dir() or not holds_run(out)):
            folder = None           # a branch: main makes the folder
        else:
            folder = path.parent if out is None else out
            later = [p for p in checkpoints_in(folder) if int(p.stem[5:]) > state["step"]]
            if folder.resolve() != path.parent.resolve() or later:
                raise UserError(f"{folder} holds later work ({(later or ['a run'])[-1]}): give a "
                                f"new --out to branch off from {path}")
    else:
        folder, state = out or newest_run(OUTPUT), None
        if folder is None or not folder.is_dir():
            raise UserError(f"no run to resume {f'in {out}' if out else f'under {OUTPUT}/'}: start "
                            f"one without --resume")
    lock = lock_folder(folder) if folder else None
    if folder and not given["resume"]:
        for path in reversed(checkpoints_in(folder)):
            try:
                state = checkpoints.load(path, full=True)
                break
            except UserError as error:
                ranks.warn(f"{error}; taking the checkpoint before it")
                path.rename(path.with_name(path.name + ".damaged"))
        if state is None and any(folder.glob("*.damaged")):
            raise UserError(f"no checkpoint in {folder} is whole")
    if state is None:
        ranks.say(f"{folder} has no checkpoint yet: starting at step 0")
    else:
        ranks.say(f"resuming {folder or path} at step {state['step']:,}")
        for stale in folder.glob(".*.tmp") if folder else []:
            stale.unlink(missing_ok=True)
        kept = [row for row in read_metrics((folder or path.parent) / "metrics.jsonl")
                if row["step"] <= state["step"]]
        target = folder or out
        text = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write(target / "metrics.jsonl", lambda f: f.write(text.encode()))
        if folder is None:
            folder, lock = out, lock_folder(out)
    return lock, folder, state


def settings(given: dict, state: dict | None, start_weights, ranks: Ranks) -> argparse.Namespace:
    """Flags given > the checkpoint's recipe > the device's preset > the defaults."""
    base = {"out": None, "stop_after": None, "device": None, **DEFAULTS,
            **PRESETS["gpu" if ranks.device.type == "cuda" else "cpu"]}
    if state:
        recipe = state["config"]["recipe"]
        if set(recipe) - set(base) or set(base) - set(recipe) - {"out", "stop_after", "device"}:
            raise UserError("the checkpoint's recipe is not one of this version's")
        for key, value in given.items():
            old = recipe.get(key)
            both_folders = key == "dataset" and value.startswith("folder:") and \
                str(old).startswith("folder:")          # a folder may move; its digest may not
            if key not in FREE and not both_folders and value != old:
                raise UserError(f"--{key.replace('_', '-')} {value} differs from the checkpoint's "
                                f"{printable(old)}: a resumed run keeps its recipe")
        if given.get("steps", recipe["steps"]) != recipe["steps"]:
            ranks.say(f"the schedule changes from {recipe['steps']:,} to {given['steps']:,} steps")
        base.update(recipe, stop_after=None)
    base.update({k: v for k, v in given.items() if k not in ("resume", "init_from")})
    return argparse.Namespace(**base)


def load_data(given: dict, s: argparse.Namespace, ranks: Ranks):
    """(the images, the name of the data set). Glyphs, with a banner, where the user named no data
    and MNIST is not to be had."""
    named = "dataset" in given or "data_dir" in given or s.dataset == "glyphs"

    def fetch() -> str:
        try:
            data_sets.load(s.dataset, s.data_dir, s.image_size)
        except data_sets.DataMissing as missing:
            if named:
                raise
            ranks.say("=" * 78, "NO MNIST: " + str(missing),
                      "Training on GLYPHS instead: digits drawn with a font, not real ones.", "=" * 78)
            return "glyphs"
        return s.dataset

    dataset = ranks.from_rank_0(fetch)          # rank 0 downloads, the others wait
    return data_sets.load(dataset, s.data_dir, s.image_size), dataset


def restore(state: dict, model, ema, optimizers: list, scaler) -> int:
    """Put a full checkpoint's state back; returns the number of steps it has made."""
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for i, opt in enumerate(optimizers):
            opt.load_state_dict(state["opt"][i])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's training state does not fit its model: "
                        f"{printable(error)}") from None
    return state["step"]


def previewer(folder: Path, ema: DiT, diffusion: GaussianDiffusion, num_classes: int, seed: int):
    """A function that draws samples/step_N.png: a class per row, always from the same noise."""
    classes, columns = min(10, num_classes), 6
    rng = generator("cpu", seed, "preview")
    noise = torch.randn(classes * columns, ema.in_channels, ema.input_size, ema.input_size,
                        generator=rng)

    def preview(done: int, stopped) -> None:
        xT = noise.to(ema.pos_embed.device)
        y = torch.arange(classes, device=xT.device).repeat_interleave(columns)
        for _t, xt, _x0_hat in diffusion.ddim_sample(ema, xT, y, SAMPLING["cfg_scale"], steps=20):
            if stopped():
                return
        picture = data_sets.grid(data_sets.to_uint8(xt), columns)
        try:
            data_sets.save_picture(folder / "samples" / f"step_{done:07d}.png", picture)
        except OSError as error:
            print(f"warning: the preview of step {done} cannot be written ({error.strerror})",
                  file=sys.stderr)

    return preview


def check_compiler(device: torch.device) -> None:
    """torch.compile needs a C++ compiler for the CPU, and Triton for a GPU."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))):
        raise UserError("--compile needs a C++ compiler (g++ or clang++) on the CPU")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs the package triton on a GPU")


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def add(group, flag: str, text: str, **options) -> None:
        key = flag[2:].replace("-", "_")
        gpu, cpu = ({**DEFAULTS, **PRESETS[d]}.get(key) for d in ("gpu", "cpu"))
        default = gpu if gpu == cpu else f"{gpu} on a GPU, {cpu} on a CPU"
        text += "" if default is None or key == "compile" else f" (default: {default})"
        group.add_argument(flag, help=text.replace("%", "%%"), **options)

    count = number(int, 1)
    g = p.add_argument_group("the run")
    add(g, "--out", "run folder (default: a new numbered one under output/)", metavar="DIR")
    add(g, "--resume", "go on: the run in --out, else the newest under output/, or from this "
        "checkpoint; flags not given come from it", nargs="?", const=None, metavar="CKPT")
    add(g, "--init-from", "start a new run from the weights in this file, as far as they fit",
        metavar="CKPT")
    add(g, "--steps", "length of the run and of its schedules, in steps", type=count)
    add(g, "--stop-after", "end this call after so many steps, saved, exit status 0", type=count)
    add(g, "--seed", "of the weights, the order of the data, the noise", type=number(int, 0))
    add(g, "--device", "cuda, mps or cpu (default: the first that is there)")
    g = p.add_argument_group("data")
    add(g, "--dataset", "mnist, fashion_mnist, cifar10, glyphs or folder:PATH")
    add(g, "--data-dir", "where the data set is, or is downloaded to", metavar="DIR")
    add(g, "--image-size", "side of the images in pixels (default: the data set's; 32 for "
        "folder:)", type=count)
    g = p.add_argument_group("model and objective")
    add(g, "--model", "a name of dit.MODELS: size / patch side in pixels", choices=MODELS,
        metavar="NAME")
    add(g, "--prediction", "what the output means: eps, v or x0", choices=PREDICTIONS)
    add(g, "--label-dropout", "share of labels replaced by \"no class\"", type=number(float, 0, 1))
    g = p.add_argument_group("recipe")
    add(g, "--batch-size", "images per step, over all processes", type=count)
    add(g, "--grad-accum", "parts a batch is computed in: the same update, less memory", type=count)
    add(g, "--optimizer", "muon (with AdamW for what it cannot take) or adamw",
        choices=("muon", "adamw"))
    add(g, "--lr", "learning rate of AdamW", type=number(float, 0))
    add(g, "--muon-lr", "learning rate of Muon", type=number(float, 0))
    add(g, "--warmup", "steps over which the learning rates rise", type=number(int, 0))
    add(g, "--decay", "share of the run over which they fall to 0", type=number(float, 0, 1))
    add(g, "--weight-decay", "of both optimizers", type=number(float, 0))
    add(g, "--clip", "largest norm of the gradient", type=number(float, 0))
    add(g, "--ema-decay", "of the averaged weights, per step", type=number(float, 0, 1, True))
    g = p.add_argument_group("speed")
    add(g, "--precision", "of the matrix products: auto, bf16, fp16 or fp32",
        choices=("auto", "bf16", "fp16", "fp32"))
    add(g, "--compile", "torch.compile the model (some minutes saved on long runs)",
        action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("what is shown and kept")
    add(g, "--log-every", "steps between readings of the loss", type=count)
    add(g, "--preview-every", "steps between sample grids", type=count)
    add(g, "--save-every", "steps between checkpoints", type=count)
    add(g, "--keep", "checkpoints kept, the newest ones", type=count)
    return p


if __name__ == "__main__":
    cli(main)
