"""Sample images from a checkpoint.

    python sample.py                                    the newest checkpoint under output/
    python sample.py CKPT --labels 3 1 four seven       one image each
    python sample.py --cfg-scale 0 1 2 4                a grid for each guidance scale
    python sample.py --gif digits.gif --trajectory strip.png

A checkpoint stores its network, its process, its class names and its sampling defaults.
From Python: `from sample import load, generate`, then `generate(load(), [3, 1, 4])`.
"""

import support.threads  # noqa: F401  (before torch)

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import GaussianDiffusion, classifier_free_guidance
from dit import DiT
from support import checkpoint as checkpoints, compute, pictures
from support.classes import label_list, label_of
from support.command import UserError, next_free, run_command, say, short
from support.data import to_uint8
from support.flags import check_options, check_outputs, sample_parser
from support.replay import Replayed
from support.registry import GUIDANCE, NETWORKS, PROCESSES, SAMPLERS

NETWORKS["dit"], PROCESSES["ddpm"] = DiT, GaussianDiffusion
import variants  # noqa: E402, F401  (registers the others)


@dataclass
class Checkpoint:
    """A trained network with its process, its class names and its sampling defaults."""

    model: DiT
    diffusion: GaussianDiffusion
    class_names: list[str]
    sampling: dict              # sampler, steps, eta, cfg_scale
    step: int = 0
    path: Path | None = None
    config: dict | None = None  # all of it: support/checkpoint.py


def load(path: str | Path | None = None, device: str | torch.device | None = None,
         weights: str = "ema") -> Checkpoint:
    """The checkpoint in a file or a run folder; by default the newest under output/, else the one
    that ships. device: cuda, mps or cpu (default: the fastest). weights: "ema", or "model" for
    the weights before averaging. Raises UserError naming what is wrong with the file.
    """
    path = checkpoints.find_checkpoint(path)
    state = checkpoints.load(path)
    model, diffusion = checkpoints.build(state, weights, compute.pick_device(device))
    return Checkpoint(model, diffusion, state["class_names"], state["config"]["sampling"],
                      state["step"], path, state["config"])


def sample(checkpoint: Checkpoint, y: Tensor, *, cfg_scale: float | None = None,
           steps: int | None = None, sampler: str | None = None, eta: float | None = None,
           seed: int = 0, precision: str = "auto", batch_size: int = 250, first: int = 0,
           guidance: Callable = classifier_free_guidance, noise: Callable | None = None,
           watch: Callable | None = None, progress: bool = False) -> Iterator[Tensor]:
    """Batches of images for the labels y (N,), in their order: float32 (B, C, H, H) in [-1, 1].

    cfg_scale, steps, sampler, eta: None is what the checkpoint suggests. Image i has the noise of
    image first + i of `seed`, whatever the batch size and the device. guidance(model, y,
    cfg_scale): what makes predict(xt, t). noise(t, low, high): in place of that of images low to
    high - 1. After each step `watch(t, xt, x_next, x0_hat)` gets the network's input, the result of
    the step and its estimate of x0. progress: show a bar that counts images x steps.
    Raises UserError for a sampler, steps or eta that the process does not have.
    """
    model, device = checkpoint.model, next(checkpoint.model.parameters()).device
    net = Replayed(model, device) if device.type == "cuda" else model       # one graph a forward
    shape = (model.in_channels, model.input_size, model.input_size)
    cfg_scale = checkpoint.sampling["cfg_scale"] if cfg_scale is None else cfg_scale
    steps_back = find_sampler(checkpoint, sampler, steps, eta)
    guidance = getattr(checkpoint.diffusion, "guided", lambda g: g)(guidance)
    precision = compute.pick_precision(precision, device)
    steps = steps_back.keywords.get("steps", checkpoint.diffusion.num_timesteps)
    bar = tqdm(total=len(y) * steps, desc="sampling", unit="image-step", unit_scale=True,
               dynamic_ncols=True, disable=not progress or compute.RANK > 0)
    for start in range(0, len(y), batch_size):
        labels = y[start : start + batch_size].to(device)
        draw = partial(noise or partial(compute.image_noise, seed, shape=shape),
                       low=first + start, high=first + start + len(labels))

        def drawn(t: int | str, draw: Callable = draw) -> Tensor:
            return draw(t).to(device)

        predict = guidance(net, labels, cfg_scale)
        xt = drawn("T")
        with compute.autocast(device, precision):
            for t, x_next, x0_hat in steps_back(predict, xt, noise=drawn):
                if watch is not None:
                    watch(t, xt, x_next, x0_hat)
                bar.update(len(labels))
                xt = x_next
        yield xt if checkpoint.sampling.get("latents") else xt.clamp(-1, 1)
    bar.close()


def generate(checkpoint: Checkpoint, labels: Sequence[int | str], **options) -> pictures.Images:
    """Images of the classes `labels` (names, number words or indices): a float32 tensor (N, C, H,
    W) in [-1, 1], on the checkpoint's device, which a notebook shows as a grid. options: those of
    `sample`. Raises UserError for a label or a value that is not possible.
    """
    if len(labels) == 0:
        raise UserError("no labels: name at least one class")
    check_options(options)
    labels = labels.tolist() if hasattr(labels, "tolist") else labels       # tensors, arrays
    y = torch.tensor([label_of(label, checkpoint.class_names) for label in labels])
    return torch.cat(list(sample(checkpoint, y, **options))).as_subclass(pictures.Images)


# ---------------------------------------------------------------- what was asked for


def find_sampler(checkpoint: Checkpoint, name: str | None, steps: int | None, eta: float | None
                 ) -> Callable:
    """A sampler with its options, of those that are given and those that the checkpoint suggests:
    a function (predict, xT, noise=...)."""
    diffusion, suggested = checkpoint.diffusion, checkpoint.sampling
    name = name or suggested["sampler"]
    own = {key[:-7]: f for key in dir(diffusion) if key.endswith("_sample") and key != "q_sample"
           and (f := getattr(diffusion, key)) is not None}
    known = own | {key: partial(f, diffusion) for key, f in SAMPLERS.items()}
    if name not in known:
        raise UserError(f"--sampler {name}: this model has {', '.join(known)}")
    accepted = inspect.signature(known[name]).parameters
    for key, value, limit in (("steps", steps, diffusion.num_timesteps), ("eta", eta, 1)):
        if value is not None and key not in accepted:
            raise UserError(f"--{key} does not apply to --sampler {name}")
        if value is not None and not 0 <= value <= limit or value == 0 and key == "steps":
            raise UserError(f"--{key} {value}: from {int(key == 'steps')} to {limit} are possible")
    options = dict(steps=steps or suggested["steps"], clip=not suggested.get("latents"),
                   eta=suggested["eta"] if eta is None else eta)
    return partial(known[name], **{k: v for k, v in options.items() if k in accepted})


def sampling_options(args, checkpoint: Checkpoint) -> dict:
    """The arguments of `sample` that the flags of `flags.add_sampling_flags` ask for, resolved:
    sampler, steps, eta and cfg_scale are what will be used. Raises UserError, before any work."""
    suggested, diffusion = checkpoint.sampling, checkpoint.diffusion
    options = {key: getattr(args, key) for key in ("precision", "batch_size")}
    found = find_sampler(checkpoint, args.sampler, args.steps, args.eta).keywords
    options |= dict(sampler=args.sampler or suggested["sampler"], steps=found.get("steps"),
                    eta=found.get("eta"), cfg_scale=suggested["cfg_scale"]
                    if args.cfg_scale is None else args.cfg_scale)
    guidance = classifier_free_guidance
    if args.autoguidance:
        weaker = load(args.autoguidance, next(checkpoint.model.parameters()).device)
        kinds = [(c.model.input_size, c.model.in_channels, c.class_names, type(c.diffusion),
                  c.diffusion.prediction) for c in (checkpoint, weaker)]
        if kinds[0] != kinds[1]:
            raise UserError(f"--autoguidance {args.autoguidance}: its images, classes, process or "
                            f"prediction are not those of {checkpoint.path}")
        guidance = partial(GUIDANCE["autoguidance"], weak=weaker.model)
    if args.guidance_interval:
        low, high = args.guidance_interval
        guidance = partial(GUIDANCE["interval"], process=diffusion, low=low, high=high,
                           guide=guidance)
    return options | dict(guidance=guidance)


def labels_of(args, names: list[str]) -> tuple[Tensor, int]:
    """The label of each image (N,), and how many images of one label follow each other."""
    per_class = args.per_class or (1 if args.labels or args.random_labels else 10)
    if args.random_labels:
        y = torch.randint(len(names), (args.random_labels,),
                          generator=compute.generator("cpu", args.seed, "labels"))
    else:
        y = torch.tensor([label_of(text, names) for text in args.labels or names[:10]])
    return y.repeat_interleave(per_class), per_class


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = sample_parser(__doc__).parse_args(argv)
    check_outputs(args)
    checkpoint = load(args.ckpt or args.checkpoint, args.device, args.weights)
    if checkpoint.sampling.get("latents"):
        raise UserError(f"{checkpoint.path} makes latents: python -m tools.convert sample CKPT "
                        f"OUT.png --vae VAE decodes them")
    names, options = checkpoint.class_names, sampling_options(args, checkpoint)
    scales = options.pop("cfg_scale")
    scales = scales if isinstance(scales, list) else [scales]
    y, per_class = labels_of(args, names)
    if args.out is None and not args.npz and not args.png_dir:
        args.out = next_free("samples")
    steps = options["steps"] or checkpoint.diffusion.num_timesteps
    say(f"{short(checkpoint.path)}: step {checkpoint.step:,}, {options['sampler']} in {steps} "
        f"steps, guidance {', '.join(f'{s:g}' for s in scales)}, {len(y):,} image"
        f"{'s' * (len(y) > 1)}, seed {args.seed}",
        "classes, in this order: " + label_list(y[::per_class], names))

    recorder = pictures.FrameRecorder() if args.gif or args.trajectory else None
    # each process takes whole batches, the same as a single process would make
    share = math.ceil(len(y) / args.batch_size / compute.WORLD) * args.batch_size
    grids, first = [], compute.RANK * share                 # uint8 (N, C, H, H) for each scale
    for scale in scales:
        images = [to_uint8(batch).cpu() for batch in sample(
            checkpoint, y[first : first + share], cfg_scale=scale, seed=args.seed, first=first,
            watch=recorder, progress=True, **options)]
        grids.append([x for part in compute.gather_to_rank0(images) or [] for x in part])
    columns = per_class if per_class > 1 else math.ceil(math.sqrt(len(y)))
    if compute.RANK == 0:
        pictures.write_outputs(args, [torch.cat(parts) for parts in grids], scales, y, names,
                               columns, recorder)
    return 0


if __name__ == "__main__":
    run_command(main)
