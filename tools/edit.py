"""Edit with a trained model: fill a masked part of a picture, or pass between two noises or labels.

    python -m tools.edit inpaint --test-image 18 --rectangle 8 8 20 20
    python -m tools.edit inpaint CKPT --image scan.jpg --invert --labels 7 --rectangle 0 14 28 28
    python -m tools.edit noises --labels 3 --seeds 0 1
    python -m tools.edit labels --labels 3 8

Each writes a strip, --out FILE.png (default: a new file under output/). A picture of any size and
mode is converted: turned upright, transparent parts on white, resized and cropped at the centre, to
grey by luma where the model is grey. Digits of MNIST are bright on black: --invert for ink on
paper.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sample import Checkpoint, load, sample, sampling_options
from support import data
from support.classes import label_of
from support.command import (
    SEED, Parser, UserError, check_target, next_free, number, run_command, say, short)
from support.compute import image_noise
from support.flags import add_sampling_flags
from support.pictures import grid, save_picture

# ---------------------------------------------------------------- inpaint


def inpainting(guidance: Callable, process, x0: Tensor, known: Tensor) -> Callable:
    """`guidance` whose predict(xt, t) implies x0 (C, H, H) where `known` (H, H): it is the output
    of a network that had said so. Whatever a sampler then mixes, the known part of xt is x0 noised
    to t (Wang et al., DDNM, arXiv 2212.00490)."""
    def guide(model, y: Tensor, cfg_scale: float) -> Callable[[Tensor, int], Tensor]:
        predict = guidance(model, y, cfg_scale)

        def replaced(xt: Tensor, t: int) -> Tensor:
            x0_hat, _ = process.denoise(predict, xt, t)
            x0_hat = torch.where(known, x0, x0_hat)
            alpha, sigma = process.alpha_sigma(t)
            return process.target(x0_hat, (xt - alpha * x0_hat) / sigma, t)

        return replaced

    return guide


def inpaint(args: Namespace, checkpoint: Checkpoint, options: dict) -> Tensor:
    """The picture, the picture with its masked part in grey, and --images ways to fill it."""
    x0, label = picture_of(args, checkpoint)
    known = ~mask_of(args, x0.shape[-1]).to(x0.device)
    if args.eta is None and (args.sampler or checkpoint.sampling["sampler"]) == "ddim":
        options["eta"] = 1.0                # new noise lets the rest adapt to the known part
    options["guidance"] = inpainting(options["guidance"], checkpoint.diffusion, x0, known)
    filled = sample(checkpoint, torch.full((args.images,), label), seed=args.seeds[0], **options)
    return torch.cat([x0[None], torch.where(known, x0, 0)[None], *filled])


def picture_of(args: Namespace, checkpoint: Checkpoint) -> tuple[Tensor, int]:
    """(the picture (C, H, H) in [-1, 1] on the model's device, the class to complete it to)."""
    model, names, label = checkpoint.model, checkpoint.class_names, checkpoint.model.null_class
    if (args.image is None) == (args.test_image is None):
        raise UserError("name one picture: --image FILE or --test-image N")
    if args.image is not None:
        pixels = data.open_image(args.image, model.input_size)
    else:
        test = data.load(args.dataset, args.data_dir, model.input_size, "test")
        if args.test_image >= len(test.images):
            raise UserError(f"--test-image {args.test_image}: the test set of {test.name} has "
                            f"{len(test.images):,} images")
        pixels = test.images[args.test_image].expand(3, -1, -1).numpy()
        if test.class_names == names:
            label = int(test.labels[args.test_image])
    if model.in_channels == 1:
        pixels = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))[None]
    x0 = torch.tensor(pixels).to(next(model.parameters()).device).float() / 127.5 - 1
    return -x0 if args.invert else x0, label_of(args.labels[0], names) if args.labels else label


def mask_of(args: Namespace, side: int) -> Tensor:
    """True where the picture is to be filled, (side, side)."""
    left, top, right, bottom = args.rectangle or (0, 0, 0, 0)
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    if not mask.any() or max(right, bottom) > side:
        raise UserError(f"nothing to fill: name --rectangle LEFT TOP RIGHT BOTTOM, in the model's "
                        f"{side}x{side} pixels")
    return mask


# ---------------------------------------------------------------- between two noises or labels


def noises(args: Namespace, checkpoint: Checkpoint, options: dict) -> Tensor:
    """Samples of one class, from noises between those of two seeds."""
    label, = labels_of(args, checkpoint, 1)
    first, last = (first_noise(checkpoint, seed, "T") for seed in args.seeds)
    weights = torch.linspace(0, 1, args.images).view(-1, 1, 1, 1)
    return pass_between(checkpoint, torch.full((args.images,), label),
                        slerp(first, last, weights), args.seeds[0], options)


def labels_of(args: Namespace, checkpoint: Checkpoint, count: int) -> list[int]:
    if len(args.labels or ()) != count:
        raise UserError(f"{args.operation} needs --labels with {count} class{'es' * (count > 1)}")
    return [label_of(text, checkpoint.class_names) for text in args.labels]


def slerp(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """From a (w = 0) to b (w = 1) on the arc between them (Shoemake 1985). Noise of n numbers has a
    length of nearly sqrt(n); on the straight line between two noises it would be shorter."""
    angle = torch.arccos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1 + 1e-6, 1 - 1e-6))
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def labels(args: Namespace, checkpoint: Checkpoint, options: dict) -> Tensor:
    """Samples from one noise, of classes between two: their embeddings are mixed."""
    if args.autoguidance is not None:
        raise UserError("labels: the model of --autoguidance has no classes in between")
    embedder = checkpoint.model.y_embedder
    table = embedder.embedding_table.weight
    first, last = (table[label] for label in labels_of(args, checkpoint, 2))
    weights = torch.linspace(0, 1, args.images, device=table.device).view(-1, 1)
    rows = torch.cat([table, torch.lerp(first, last, weights)]).detach()
    embedder.embedding_table = nn.Embedding.from_pretrained(rows)
    y = len(table) + torch.arange(args.images)                  # the new rows
    xT = first_noise(checkpoint, args.seeds[0], "T").expand(args.images, -1, -1, -1)
    return pass_between(checkpoint, y, xT, args.seeds[0], options)


def first_noise(checkpoint: Checkpoint, seed: int, t: int | str) -> Tensor:
    """The noise (1, C, H, H) of the first image that sample.py draws with a seed."""
    model = checkpoint.model
    return image_noise(seed, t, 0, 1, (model.in_channels, model.input_size, model.input_size))


def pass_between(checkpoint: Checkpoint, y: Tensor, xT: Tensor, seed: int, options: dict) -> Tensor:
    """Samples for the labels y (N,) from the noises xT (N, C, H, H). What a sampler adds later is
    the same for all."""
    def noise(t: int | str, low: int, high: int) -> Tensor:
        same = first_noise(checkpoint, seed, t).expand(high - low, -1, -1, -1)
        return xT[low:high] if t == "T" else same

    return torch.cat(list(sample(checkpoint, y, noise=noise, **options)))


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    out = args.out or next_free(args.operation)
    check_target(out, args.force, ".png")
    checkpoint = load(args.checkpoint, args.device, args.weights)
    if checkpoint.model.in_channels not in (1, 3):
        raise UserError(f"{short(checkpoint.path)} makes latents, not pictures")
    edit = dict(inpaint=inpaint, noises=noises, labels=labels)[args.operation]
    images = edit(args, checkpoint, sampling_options(args, checkpoint))
    save_picture(out, grid(images, min(16, len(images))))
    say(f"written: {short(out)}")
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    add, whole = p.add_argument, number(int, 0)
    add("operation", choices=("inpaint", "noises", "labels"))
    add("checkpoint", nargs="?", metavar="CKPT", help="a checkpoint or a run folder (default: the "
        "newest under output/, else the one that ships)")
    add("--image", type=Path, metavar="FILE", help="inpaint: a picture of any size and mode")
    add("--test-image", type=whole, metavar="N", help="or image N of the test set of --dataset")
    add("--dataset", default="mnist", help="(default: mnist)")
    add("--data-dir", metavar="DIR", help="where it is (default: data/)")
    add("--invert", action="store_true", help="swap dark and bright")
    add("--rectangle", type=whole, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="the masked part, in the model's pixels; RIGHT and BOTTOM are outside")
    add("--labels", nargs="+", metavar="LABEL", help="the class, for labels both (default for "
        'inpaint: that of the test image; of a file "no class")')
    add("--seeds", type=SEED, nargs=2, default=[0, 1], metavar=("A", "B"), help="of the noises; "
        "inpaint and labels use the first (default: 0 1)")
    add("--images", type=number(int, 3, 100), default=6, metavar="N", help="ways to fill the mask, "
        "or images from one end to the other (default: 6)")
    add("--out", type=Path, metavar="FILE.png", help="(default: a new file under output/)")
    add("--force", action="store_true", help="overwrite an existing file")
    add_sampling_flags(p)
    return p


if __name__ == "__main__":
    run_command(main)
