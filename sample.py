"""Sample images from a checkpoint.

    python sample.py                                    the newest checkpoint under output/
    python sample.py CKPT --labels 3 1 four seven       one image each
    python sample.py --cfg-scale 0 1 2 4                a grid for each guidance scale
    python sample.py --gif digits.gif --trajectory strip.png

A checkpoint stores its network, its process, its class names and its sampling defaults.
From Python: `from sample import load, generate`, then `generate(load(), [3, 1, 4])`.
"""

import support.threads  # noqa: F401  (before torch)

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import GaussianDiffusion
from dit import DiT
from support import checkpoints, components, distributed, paths, pictures
from support.cli import UserError, run_command, say
from support.data import to_uint8
from support.folders import find_checkpoint
from support.sampling import (
    Images,
    check_flags,
    choose_labels,
    describe,
    label_grid,
    parse_label,
    parser,
    resolve_sampling,
    settings_from,
    targets,
    write_all,
)
from support.seeds import ImageNoise


@dataclass
class Checkpoint:
    """A trained network with its process, its class names and its sampling defaults."""

    model: DiT
    diffusion: GaussianDiffusion
    class_names: list[str]
    sampling: dict              # sampler, steps, eta, cfg_scale
    step: int
    path: Path


def load(path: str | Path | None = None, device: str | torch.device | None = None,
         weights: str = "ema") -> Checkpoint:
    """The checkpoint in a file or a run folder; by default the newest under output/, else the one
    that ships. device: cuda, mps or cpu (default: the fastest). weights: "ema", or "model" for
    the weights before averaging. Raises UserError naming what is wrong with the file.
    """
    path = find_checkpoint(path)
    state = checkpoints.load(path)
    device = distributed.pick_device(None if device is None else str(device))
    model, diffusion = checkpoints.build(state, weights, device)
    return Checkpoint(model, diffusion, state["class_names"], state["config"]["sampling"],
                      state["step"], path)


def generate(checkpoint: Checkpoint, labels: Sequence[int | str], cfg_scale: float | None = None,
             steps: int | None = None, seed: int = 0, sampler: str | None = None,
             eta: float | None = None, precision: str = "auto", batch_size: int = 250) -> Images:
    """Images of the classes `labels` (indices, class names or number words): a float32 tensor
    (N, C, H, W) in [-1, 1], on the checkpoint's device. A notebook shows it as a grid.

    cfg_scale, steps, sampler, eta: by default what the checkpoint suggests. Image k depends on
    (seed, k) and its label alone. Raises UserError for a label or a value that is not possible.
    """
    if len(labels) == 0:
        raise UserError("no labels: name at least one class")
    y = torch.tensor([parse_label(label, checkpoint.class_names) for label in labels])
    how = resolve_sampling(checkpoint, cfg_scale, steps, sampler, eta, precision)
    return torch.cat(list(sample(checkpoint, y, seed, how, batch_size))).as_subclass(Images)


def sample(checkpoint: Checkpoint, y: Tensor, seed: int, how: dict, batch_size: int = 250,
           first: int = 0, watch=None, bar=None) -> Iterator[Tensor]:
    """Batches of images for the labels y (N,), in their order: float32 (B, C, H, H) in [-1, 1].

    how: the dict that `resolve_sampling` returns: the name of the sampler and its options, the
    function of guidance and its cfg_scale, the precision. Image i has the noise of image first + i
    of `seed`, whatever the batch size. After each step `watch(t, xt, x0_hat, xt_next)` gets the
    network's input, its estimate of x0, and the result of the step; `bar` (a tqdm) counts images x
    steps.
    """
    model, diffusion = checkpoint.model, checkpoint.diffusion
    shape = (model.in_channels, model.input_size, model.input_size)
    device = next(model.parameters()).device
    sampler, options = components.find_sampler(diffusion, how["sampler"]), how["options"]
    for start in range(0, len(y), batch_size):
        labels = y[start : start + batch_size].to(device)
        noise = ImageNoise(seed, first + start, first + start + len(labels), shape, device)
        predict = how["guidance"](model, labels, how["cfg_scale"])  # classifier_free_guidance
        xt = noise("T")
        with distributed.autocast(device, how["precision"]):
            for t, xt_next, x0_hat in sampler(predict, xt, noise=noise, **options):
                if watch is not None:
                    watch(t, xt, x0_hat, xt_next)
                xt = xt_next
                if bar is not None:
                    bar.update(len(labels))
        yield xt.clamp(-1, 1)


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    check_flags(args)
    device = distributed.join(args.device)
    checkpoint = load(args.checkpoint, device, args.weights)
    settings = settings_from(args, checkpoint)          # one for each guidance scale
    scales, steps = [how["cfg_scale"] for how in settings], settings[0]["steps"]
    y, columns = choose_labels(args, checkpoint.class_names)
    outputs = targets(args, len(y))
    distributed.say(f"{paths.short(checkpoint.path)}: step {checkpoint.step:,}"
                    f"{'' if checkpoint.step else ' (untrained)'}, {describe(args, settings)}, "
                    f"{len(y)} image{'s' * (len(y) > 1)}, seed {args.seed}")
    if args.random_labels and set(outputs) - {"npz", "png_dir"}:
        distributed.say(*label_grid(y, columns, checkpoint.class_names))

    # Sample, once for each guidance scale; under torchrun each process takes every n-th batch
    batches = list(torch.arange(len(y)).split(args.batch_size))
    mine = batches[distributed.rank() :: distributed.world_size()]
    recorder = pictures.FrameRecorder(steps) if args.gif or args.trajectory else None
    grids = []
    with tqdm(total=sum(map(len, mine)) * steps * len(scales), desc="sampling",
              unit="image-step", unit_scale=True, dynamic_ncols=True,
              disable=distributed.rank() > 0) as bar:
        for how in settings:
            parts = [to_uint8(part).cpu() for batch in mine for part in sample(
                checkpoint, y[batch], args.seed, how, args.batch_size, int(batch[0]), recorder,
                bar)]
            grids.append(distributed.gather_parts(parts))
    distributed.shut_down()
    if distributed.rank() == 0:
        for path in write_all(outputs, grids, scales, y, checkpoint.class_names, columns,
                              args.scale, recorder):
            say(f"written: {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
