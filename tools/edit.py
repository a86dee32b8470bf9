"""Edit with a trained model: fill a masked part of a picture, or pass between two noises or labels.

    python -m tools.edit inpaint --test-image 4 --rectangle 14 0 28 28
    python -m tools.edit inpaint CKPT --image digit.png --invert --label 7 --mask mask.png
    python -m tools.edit noises --label 3 --seeds 0 1
    python -m tools.edit labels --labels 3 8

Each writes a strip, --out FILE.png (default: a new numbered one under output/), and an animation
beside it, FILE.gif. A picture of any size and mode is converted: turned upright, transparent parts
on white, the shorter side resized to the model's and the longer one cropped at the centre, to grey
by luma where the model is grey. Digits of MNIST are bright on black: --invert for ink on paper.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.edit", file=sys.stderr)
    sys.exit(2)

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sample import Checkpoint, load, sample
from support import components, data, distributed, paths
from support.cli import (
    SEED, Parser, UserError, atomic_write, check_target, io_errors, next_free, number, run_command,
    say)
from support.latents import is_latents
from support.pictures import FrameRecorder, animation, grid, save_picture
from support.sampling import add_sampling_flags, describe, parse_label, settings_from
from support.seeds import ImageNoise

# ---------------------------------------------------------------- inpaint


def inpainting(model, y: Tensor, cfg_scale: float, guide: Callable, process, x0: Tensor,
               known: Tensor) -> Callable:
    """predict(xt, t) of `guide`, except that where `known` (H, H) its x0_hat is x0 (C, H, H).

    In place of x0_hat a sampler gets the output of a network that would have said so. Whatever it
    then mixes, the known part of xt is x0 noised to t (Wang et al., DDNM, arXiv 2212.00490).
    """
    predict, C = guide(model, y, cfg_scale), len(x0)

    def replaced(xt: Tensor, t: int) -> Tensor:
        out = predict(xt, t).float()
        x0_hat, _ = process.denoise(lambda *_: out, xt, t)
        x0_hat = torch.where(known, x0, x0_hat)
        alpha, sigma = process.alpha_sigma(t)
        target = process.target(x0_hat, (xt - alpha * x0_hat) / sigma, t)
        return torch.cat([target, out[:, C:]], dim=1)               # variances stay

    return replaced


def inpaint(args: Namespace, checkpoint: Checkpoint, how: dict) -> tuple[Tensor, list[Tensor]]:
    """The picture, the picture with its masked part in grey, and --images ways to fill it."""
    if not hasattr(checkpoint.diffusion, "alpha_sigma"):
        raise UserError("inpaint does not apply to this process: it has no alpha_sigma")
    x0, label = picture_of(args, checkpoint)
    known = ~mask_of(args, x0.shape[-1]).to(x0.device)
    if args.eta is None and "eta" in how["options"]:
        how["options"]["eta"] = 1.0         # new noise lets the rest adapt to the known part
    how["guidance"] = functools.partial(inpainting, guide=how["guidance"], x0=x0, known=known,
                                        process=checkpoint.diffusion)
    y, recorder = torch.full((args.images,), label), FrameRecorder(how["steps"])
    with progress(y, how) as bar:
        filled = list(sample(checkpoint, y, args.seed, how, args.batch_size, watch=recorder,
                             bar=bar))
    return torch.cat([x0[None], torch.where(known, x0, 0)[None], *filled]), recorder.frames()


def picture_of(args: Namespace, checkpoint: Checkpoint) -> tuple[Tensor, int]:
    """(the picture (C, H, H) in [-1, 1] on the model's device, the class to complete it to)."""
    model, names = checkpoint.model, checkpoint.class_names
    device, label = next(model.parameters()).device, model.null_class
    if (args.image is None) == (args.test_image is None):
        raise UserError("name one picture: --image FILE or --test-image N")
    if args.image is not None:
        pixels, _ = data.open_image(args.image, model.input_size)
    elif is_latents(args.dataset):
        raise UserError(f"--dataset {args.dataset} holds latents, and no pictures")
    else:
        test = data.load(args.dataset, args.data_dir, model.input_size, "test")
        if args.test_image >= (count := len(test.images)):
            raise UserError(f"--test-image {args.test_image}: the images of {test.name}'s test set "
                            f"are 0 to {count - 1:,}")
        pixels = test.images[args.test_image].expand(3, -1, -1).numpy()
        if test.class_names == names:
            label = int(test.labels[args.test_image])
    if model.in_channels not in (1, 3):
        raise UserError(f"the model has {model.in_channels} channels: pictures have 1 or 3")
    if model.in_channels == 1:
        pixels = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))[None]
    x0 = torch.tensor(pixels).to(device).float() / 127.5 - 1
    return -x0 if args.invert else x0, label if args.label is None else parse_label(args.label,
                                                                                    names)


def mask_of(args: Namespace, side: int) -> Tensor:
    """True where the picture is to be filled, (side, side): --rectangle and the white of --mask."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    if args.mask is not None:
        pixels, _ = data.open_image(args.mask, side)
        mask = torch.tensor(pixels).float().mean(dim=0) > 127
    if args.rectangle is not None:
        left, top, right, bottom = args.rectangle
        if not (left < right <= side and top < bottom <= side):
            raise UserError(f"--rectangle {left} {top} {right} {bottom}: LEFT < RIGHT and TOP < "
                            f"BOTTOM must lie in the model's {side}x{side} pixels")
        mask[top:bottom, left:right] = True
    if not mask.any():
        raise UserError("nothing is masked: name --rectangle LEFT TOP RIGHT BOTTOM, or a --mask "
                        "FILE that is white where the picture is to be filled")
    return mask


# ---------------------------------------------------------------- between two noises or labels


def noises(args: Namespace, checkpoint: Checkpoint, how: dict) -> tuple[Tensor, list[Tensor]]:
    """Samples of one class, from noises between those of two seeds."""
    if args.seeds[0] == args.seeds[1]:
        raise UserError(f"--seeds {args.seeds[0]} {args.seeds[1]}: two different seeds are needed")
    first, last = (noise_of(checkpoint, seed)("T") for seed in args.seeds)
    weights = torch.linspace(0, 1, args.frames, device=first.device).view(-1, 1, 1, 1)
    y = torch.full((args.frames,), parse_label(args.label, checkpoint.class_names))
    return draw(args, checkpoint, how, y, slerp(first, last, weights), args.seeds[0])


def slerp(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """From a (w = 0) to b (w = 1) on the arc between them (Shoemake 1985). Noise of n numbers has a
    length of nearly sqrt(n); on the straight line between two noises it would be shorter."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def labels(args: Namespace, checkpoint: Checkpoint, how: dict) -> tuple[Tensor, list[Tensor]]:
    """Samples from one noise, of classes between two: their embeddings are mixed."""
    model = checkpoint.model
    if args.autoguidance is not None:
        raise UserError("--autoguidance does not apply: its model has no classes in between")
    if not isinstance(table := getattr(getattr(model, "y_embedder", None), "embedding_table", None),
                      nn.Embedding):
        raise UserError("this network has no y_embedder.embedding_table to mix labels in")
    first, last = (table.weight[parse_label(text, checkpoint.class_names)] for text in args.labels)
    if torch.equal(first, last):
        raise UserError(f"--labels {' '.join(args.labels)}: two different classes are needed")
    weights = torch.linspace(0, 1, args.frames, device=first.device).view(-1, 1)
    rows = torch.cat([table.weight, torch.lerp(first, last, weights)]).detach()
    model.y_embedder.embedding_table = nn.Embedding.from_pretrained(rows)
    y = len(table.weight) + torch.arange(args.frames)               # the new rows
    xT = noise_of(checkpoint, args.seed)("T").expand(args.frames, -1, -1, -1)
    return draw(args, checkpoint, how, y, xT, args.seed)


def noise_of(checkpoint: Checkpoint, seed: int) -> ImageNoise:
    """The noise of the first image that sample.py draws with a seed."""
    model = checkpoint.model
    shape = (model.in_channels, model.input_size, model.input_size)
    return ImageNoise(seed, 0, 1, shape, next(model.parameters()).device)


def draw(args: Namespace, checkpoint: Checkpoint, how: dict, y: Tensor, xT: Tensor, seed: int
         ) -> tuple[Tensor, list[Tensor]]:
    """Samples (N, C, H, H) in [-1, 1] for labels y (N,) from the noises xT (N, C, H, H), and the
    frames of an animation, there and back. What a sampler adds later is the same for all."""
    later, found = noise_of(checkpoint, seed), []
    sampler = components.find_sampler(checkpoint.diffusion, how["sampler"])
    with distributed.autocast(xT.device, how["precision"]), progress(y, how) as bar:
        for part, first in zip(y.to(xT.device).split(args.batch_size), xT.split(args.batch_size),
                               strict=True):
            predict = how["guidance"](checkpoint.model, part, how["cfg_scale"])
            for _t, xt, _x0_hat in sampler(predict, first, noise=later, **how["options"]):  # noqa: B007
                bar.update(len(part))
            found.append(xt.clamp(-1, 1))
    images = torch.cat(found)
    return images, [image[None] for image in (*images, *images[:-1].flip(0))]


def progress(y: Tensor, how: dict) -> tqdm:
    return tqdm(total=len(y) * how["steps"], desc="sampling", unit="image-step", unit_scale=True,
                dynamic_ncols=True)


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args, unknown = parser().parse_known_args(argv)
    if unknown:                             # reported by the subcommand, which knows its flags
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    out = args.out or next_free(paths.OUTPUT, args.operation, ".png")
    gif_path = out.with_suffix(".gif")
    check_target(out, args.force, ".png")
    check_target(gif_path, args.force, ".gif")
    checkpoint = load(args.checkpoint, args.device, args.weights)
    [how] = settings_from(args, checkpoint)
    say(f"{paths.short(checkpoint.path)}: step {checkpoint.step:,}, {describe(args, [how])}")
    images, frames = args.edit(args, checkpoint, how)
    with io_errors(f"{out} or {gif_path} cannot be written"):
        save_picture(out, grid(images, min(16, len(images)), scale=args.scale))
        gif = animation([grid(frame, min(16, len(frame)), scale=args.scale) for frame in frames])
        atomic_write(gif_path, lambda file: file.write(gif))
    say(*(f"written: {paths.short(path)}" for path in (out, gif_path)))
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    commands = p.add_subparsers(dest="operation", required=True, metavar="inpaint | noises | "
                                "labels")

    def add(edit: Callable, text: str) -> Parser:
        sub = commands.add_parser(edit.__name__, help=text, description=edit.__doc__)
        sub.set_defaults(edit=edit, parser=sub)
        sub.add_argument("checkpoint", nargs="?", metavar="CKPT", help="a checkpoint, or a run "
                         "folder (default: the newest under output/, else the one that ships)")
        return sub

    frames = number(int, 3, 100)
    i = add(inpaint, "fill a masked part of a picture")
    i.add_argument("--image", type=Path, metavar="FILE", help="the picture: any size, any mode")
    i.add_argument("--test-image", type=number(int, 0), metavar="N", help="the picture: image N "
                   "of the test set of --dataset")
    i.add_argument("--dataset", default="mnist", help="of --test-image (default: mnist)")
    i.add_argument("--data-dir", metavar="DIR", help="where it is, or is downloaded to (default: "
                   "data/)")
    i.add_argument("--invert", action="store_true", help="swap dark and bright")
    i.add_argument("--rectangle", type=number(int, 0, 4096), nargs=4, metavar=("LEFT", "TOP",
                   "RIGHT", "BOTTOM"), help="the masked part, in the model's pixels; RIGHT and "
                   "BOTTOM are outside")
    i.add_argument("--mask", type=Path, metavar="FILE", help="the masked part is white in this "
                   "picture, which is converted as the other is")
    i.add_argument("--label", metavar="LABEL", help="the class to complete it to (default: that of "
                   "--test-image; of a file \"no class\")")
    i.add_argument("--images", type=number(int, 1, 100), default=6, metavar="N", help="ways to "
                   "fill it (default: 6)")
    n = add(noises, "from the noise of one seed to that of another")
    n.add_argument("--label", required=True, metavar="LABEL", help="the class")
    n.add_argument("--seeds", type=SEED, nargs=2, default=[0, 1], metavar=("A", "B"),
                   help="seeds of the noises (default: 0 1)")
    e = add(labels, "from one class to another")
    e.add_argument("--labels", required=True, nargs=2, metavar=("A", "B"), help="the classes")
    for sub in (i, e):
        sub.add_argument("--seed", type=SEED, default=0, help="seed of the noise (default: 0)")
    for sub in (n, e):
        sub.add_argument("--frames", type=frames, default=12, metavar="N", help="images from one "
                         "to the other, both included (default: 12)")
    for sub in (i, n, e):
        add_sampling_flags(sub)
        g = sub.add_argument_group("output")
        g.add_argument("--out", type=Path, metavar="FILE.png", help="the strip; the animation is "
                       "FILE.gif (default: a new numbered file under output/)")
        g.add_argument("--scale", type=number(int, 1, 64), metavar="N", help="enlarge each pixel "
                       "to N x N (default: small images are enlarged)")
        g.add_argument("--force", action="store_true", help="overwrite existing files")
    return p


if __name__ == "__main__":
    run_command(main)
