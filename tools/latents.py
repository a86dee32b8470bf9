"""Latents, the paper's own setting: encode images with an autoencoder, sample and decode.

    python -m tools.latents encode IMAGES train.pt --vae FOLDER         IMAGES/<class>/<images>
    python train_mnist.py --dataset latents:train.pt --model DiT-S/2
    python -m tools.latents sample CKPT --labels 0 1 2 --vae FOLDER
    python -m tools.latents sample DiT-XL-2-256x256.pt --labels 207 360 --vae FOLDER

The autoencoder is an AutoencoderKL of diffusers (an optional package): a folder, or a name on the
Hugging Face hub. The last command takes the file that the authors of DiT published.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.latents", file=sys.stderr)
    sys.exit(2)

import contextlib
import math
import os
import re
import shlex
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dit import MODELS
from sample import Checkpoint
from support import checkpoints, components, data, distributed, latents, paths, pictures
from support.cli import (
    BATCH, COUNT, SCALE, SEED, Parser, UserError, atomic_write, check_target, io_errors, next_free,
    number, reason, run_command, say, shorten)
from support.folders import find_checkpoint
from support.sampling import parse_label, resolve_sampling
from support.seeds import ImageNoise

PUBLISHED = dict(sampler="ddpm", steps=250, eta=0.0, cfg_scale=4.0, latents=True)  # its sample.py

# ---------------------------------------------------------------- the autoencoder


class Autoencoder:
    """An AutoencoderKL of diffusers. encode: images (B, 3, S, S) in [-1, 1] -> latents (B, C, H, H)
    with a standard deviation of about 1; decode: the way back. S = factor * H."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device, self.vae = name, device, _load_vae(name).to(device)
        config = self.vae.config
        if config.in_channels != 3 or config.out_channels != 3:
            raise UserError(f"--vae {name} is for {config.in_channels} channels: it must be for 3")
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = config.scaling_factor                              # Stable Diffusion: 0.18215
        self.shift = getattr(config, "shift_factor", None) or 0.0
        if not all(type(x) in (int, float) and math.isfinite(x)
                   for x in (self.scale, self.shift)) or self.scale <= 0:
            raise UserError(f"--vae {name}: the scale in its config.json is not valid")

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior q(z | image), drawn with the standard normal noise."""
        posterior = self.vae.encode(images.to(self.device)).latent_dist
        z = posterior.mean + posterior.std * noise.to(self.device)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z / self.scale + self.shift).sample.clamp(-1, 1)


def _load_vae(name: str):
    """The AutoencoderKL in a folder (or in its subfolder vae), or of that name on the hub."""
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging
    except ImportError as error:
        if getattr(error, "name", None) not in ("diffusers", "safetensors"):
            raise UserError(f"diffusers cannot be imported ({reason(error)})") from None
        raise UserError("latents need the packages diffusers and safetensors: pip install "
                        "diffusers safetensors") from None
    logging.set_verbosity_error()
    folder = os.path.expanduser(name)
    if not os.path.isdir(folder) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"--vae {shorten(name)} is neither a folder nor a name on the Hugging Face "
                        f"hub (like stabilityai/sd-vae-ft-ema)")
    inside = os.path.isdir(os.path.join(folder, "vae"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vae, info = AutoencoderKL.from_pretrained(
                folder if os.path.isdir(folder) else name, subfolder="vae" if inside else None,
                local_files_only=os.path.isdir(folder), use_safetensors=True,   # no pickle is read
                low_cpu_mem_usage=False, output_loading_info=True)
    except Exception as error:          # OSError, ValueError, KeyError, from json, the network ...
        raise UserError(f"--vae {shorten(name)} cannot be loaded as an AutoencoderKL of diffusers "
                        f"({_first_line(error)})") from None
    for key in ("missing_keys", "mismatched_keys"):
        if info[key]:
            raise UserError(f"--vae {shorten(name)}: its weights do not fit its config.json "
                            f"({shorten(sorted(map(str, info[key]))[0])})")
    return vae.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return shorten(next((line.strip() for line in lines if not line.endswith(":")), lines[0]))


# ---------------------------------------------------------------- encode


def encode(args: Namespace) -> int:
    check_target(args.out, args.force, ".pt")
    device = distributed.pick_device(args.device)
    classes = data.class_folders(args.images)
    files = [(file, label) for label, folder in enumerate(classes)
             for file in data.images_in(folder)]
    vae = Autoencoder(args.vae, device)
    if args.image_size % vae.factor:
        raise UserError(f"--image-size {args.image_size} is not a multiple of {vae.factor}, the "
                        f"autoencoder's factor")
    side = args.image_size // vae.factor
    parts = []
    with tqdm(total=len(files), desc="encoding", unit="img", dynamic_ncols=True) as bar:
        for first in range(0, len(files), args.batch_size):
            batch = files[first : first + args.batch_size]
            pixels = np.stack([data.open_image(file, args.image_size)[0] for file, _ in batch])
            images = torch.from_numpy(pixels).float() / 127.5 - 1
            noise = ImageNoise(args.seed, first, first + len(batch), (vae.channels, side, side))
            parts.append(vae.encode(images, noise("encode")).half().cpu())
            bar.update(len(batch))
    z = torch.cat(parts)
    if not z.isfinite().all():
        raise UserError(f"--vae {args.vae}: its latents are not finite, or too large for half "
                        f"precision")
    labels = torch.tensor([label for _, label in files])
    about = dict(autoencoder=Path(args.vae).name, scale=float(vae.scale),
                 image_size=args.image_size, seed=args.seed)
    with io_errors(f"{args.out} cannot be written"):
        atomic_write(args.out, lambda file: latents.save(file, z, labels,
                                                         [c.name for c in classes], about))
    say(f"written: {args.out} ({len(z):,} latents {vae.channels}x{side}x{side}, {len(classes)} "
        f"class{'es' * (len(classes) > 1)}, standard deviation {z.float().std():.2f}, "
        f"{args.out.stat().st_size / 1e6:.1f} MB)",
        "next: " + shlex.join(["python", "train_mnist.py", "--dataset", f"latents:{args.out}"]))
    return 0


# ---------------------------------------------------------------- checkpoints


def load(path: Path, device: torch.device, weights: str = "ema", heads: int | None = None
         ) -> Checkpoint:
    """A checkpoint of this project that was trained on latents, or weights of the published code.
    Raises UserError naming what is wrong with the file."""
    state = checkpoints.read_archive(path)
    if not isinstance(state, dict) or "format" not in state:
        state = published(checkpoints.weights_in(state, path), path, heads)
    elif heads is not None:
        raise UserError("--heads is for weights of the published code: a checkpoint knows them")
    state = checkpoints.validate(state, path)
    if not state["config"]["sampling"].get("latents"):
        raise UserError(f"{path} was not trained on latents: python sample.py samples from it")
    model, diffusion = checkpoints.build(state, weights, device)
    return Checkpoint(model, diffusion, state["class_names"], state["config"]["sampling"],
                      state["step"], path)


def published(weights: dict[str, Tensor], path: Path, heads: int | None) -> dict:
    """A checkpoint for weights of the published code. Their shapes determine all but the number of
    heads, which dit.MODELS knows for the sizes of the paper."""
    def shape(name: str, dims: int) -> torch.Size:
        if name not in weights or weights[name].ndim != dims:
            raise UserError(f"{path} holds no weights of a DiT: {name} is missing or not of "
                            f"{dims} dimensions")
        return weights[name].shape

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    depth = len({n.split(".")[1] for n in weights if n.startswith("blocks.") and n.count(".") > 1})
    classes = shape("y_embedder.embedding_table.weight", 2)[0] - 1
    outputs = shape("final_layer.linear.weight", 2)[0]
    inner = shape("blocks.0.mlp.fc1.weight", 2)[0]
    known = {m["num_heads"] for m in MODELS.values()
             if (m["hidden_size"], m["depth"]) == (width, depth)}
    if heads is None and not known:
        raise UserError(f"{path}: no model of dit.MODELS has width {width} and {depth} blocks: "
                        f"--heads N gives the number of attention heads")
    if min(width, channels, patch, classes) < 1:
        raise UserError(f"{path} holds no weights of a DiT: a dimension is 0")
    model = dict(input_size=math.isqrt(tokens) * patch, patch_size=patch, in_channels=channels,
                 hidden_size=width, depth=depth, num_heads=heads or known.pop(),
                 mlp_ratio=inner / width, num_classes=classes,
                 learn_sigma=outputs == 2 * channels * patch**2)
    config = dict(network="dit", model=model, diffusion=dict(prediction="eps"),
                  process="learned-variance" if model["learn_sigma"] else "ddpm",
                  data={}, recipe={}, sampling=dict(PUBLISHED))
    return dict(format=checkpoints.FORMAT, step=0, config=config, class_names=imagenet(classes),
                ema=weights)


def imagenet(count: int) -> list[str]:
    """The class names of ImageNet for 1000 classes, where torchvision has them; else numbers."""
    if count == 1000:
        with contextlib.suppress(ImportError, AttributeError):
            from torchvision.models import _meta
            if len(_meta._IMAGENET_CATEGORIES) == count:
                return list(_meta._IMAGENET_CATEGORIES)
    return [str(i) for i in range(count)]


# ---------------------------------------------------------------- sample


def sample_latents(checkpoint: Checkpoint, y: Tensor, seed: int, how: dict, batch_size: int,
                   bar: tqdm | None = None) -> Iterator[Tensor]:
    """`sample.sample` for latents: neither x0_hat nor the result is clipped."""
    model = checkpoint.model
    device = next(model.parameters()).device
    shape = (model.in_channels, model.input_size, model.input_size)
    sampler = components.find_sampler(checkpoint.diffusion, how["sampler"])
    options = how["options"] | latents.unclipped(sampler)
    for start in range(0, len(y), batch_size):
        labels = y[start : start + batch_size].to(device)
        noise = ImageNoise(seed, start, start + len(labels), shape, device)
        predict = how["guidance"](model, labels, how["cfg_scale"])
        with distributed.autocast(device, how["precision"]):
            for _t, xt, _x0_hat in sampler(predict, noise("T"), noise=noise, **options):  # noqa: B007
                if bar is not None:
                    bar.update(len(labels))
        yield xt


def sample(args: Namespace) -> int:
    out = args.out or next_free(paths.OUTPUT, "latents", ".png")
    check_target(out, args.force, ".png")
    device = distributed.pick_device(args.device)
    vae = Autoencoder(args.vae, device)
    checkpoint = load(find_checkpoint(args.checkpoint), device, args.weights, args.heads)
    names, model = checkpoint.class_names, checkpoint.model
    labels = [parse_label(text, names) for text in args.labels or names[:8]]
    y = torch.tensor(labels).repeat_interleave(args.per_class)
    how = resolve_sampling(checkpoint, args.cfg_scale, args.steps, args.sampler, args.eta,
                           args.precision, latents=True)
    if vae.channels != model.in_channels:
        raise UserError(f"--vae {args.vae} has {vae.channels} channels, and {checkpoint.path} "
                        f"makes latents with {model.in_channels}")
    side = model.input_size * vae.factor
    say(f"{checkpoint.path}: {how['sampler']}, {how['steps']} steps, guidance "
        f"{how['cfg_scale']:g}, {len(y)} images {side}x{side}, seed {args.seed}",
        f"labels: {', '.join(shorten(names[label], 40) for label in labels)}")
    with tqdm(total=len(y) * how["steps"], desc="sampling", unit="image-step", unit_scale=True,
              dynamic_ncols=True) as bar:
        z = torch.cat(list(sample_latents(checkpoint, y, args.seed, how, args.batch_size, bar)))
    images = [data.to_uint8(vae.decode(each[None])).cpu()
              for each in tqdm(z, desc="decoding", unit="img", dynamic_ncols=True)]
    columns = args.per_class if args.per_class > 1 else math.ceil(math.sqrt(len(y)))
    with io_errors(f"{out} cannot be written"):
        pictures.save_picture(out, pictures.grid(torch.cat(images), columns))
    say(f"written: {paths.short(out)}")
    return 0


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return {"encode": encode, "sample": sample}[args.command](args)


def parser() -> Parser:
    p = Parser(__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="encode | sample")
    e = commands.add_parser("encode", description="Encode a folder of images.",
                            help="images -> latents")
    e.add_argument("images", type=Path, metavar="IMAGES", help="a folder per class, of images of "
                   "any size")
    e.add_argument("out", type=Path, metavar="OUT.pt", help="the file to write")
    e.add_argument("--image-size", type=number(int, 1, 4096), default=256, metavar="N",
                   help="side of the images in pixels (default: 256)")
    s = commands.add_parser("sample", description="Sample latents and decode them.",
                            help="a checkpoint -> images")
    s.add_argument("checkpoint", metavar="CKPT", help="a checkpoint or run folder trained on "
                   "latents, or weights of the published code")
    s.add_argument("--labels", nargs="+", metavar="LABEL", help="class names or indices (default: "
                   "the first eight classes)")
    s.add_argument("--per-class", type=number(int, 1, 1000), default=1, metavar="N",
                   help="images per label (default: 1)")
    s.add_argument("--cfg-scale", type=SCALE, metavar="S", help="guidance scale (default: what the "
                   "checkpoint suggests; published weights: 4)")
    s.add_argument("--sampler", metavar="NAME", help="ddim, ddpm or dpm++ (default: the "
                   "checkpoint's; published weights: ddpm)")
    s.add_argument("--steps", type=COUNT, help="sampling steps (default: the checkpoint's; "
                   "published weights: 250)")
    s.add_argument("--eta", type=number(float, 0, 1), help="noise that ddim adds")
    s.add_argument("--weights", choices=("ema", "model"), default="ema",
                   help="the EMA weights or the last ones (default: ema)")
    s.add_argument("--heads", type=number(int, 1, 1024), metavar="N", help="attention heads of "
                   "published weights of a size that dit.MODELS lacks")
    s.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32",
                   help="number format of the network (default: fp32)")
    s.add_argument("--out", type=Path, metavar="FILE.png", help="the grid (default: a new numbered "
                   "file under output/)")
    for each, batch in [(e, 8), (s, 4)]:
        each.add_argument("--vae", required=True, metavar="VAE", help="an AutoencoderKL of "
                          "diffusers: a folder, or a name on the Hugging Face hub")
        each.add_argument("--batch-size", type=BATCH, default=batch, metavar="N",
                          help=f"images at a time (default: {batch})")
        each.add_argument("--seed", type=SEED, default=0, help="seed of the noise (default: 0)")
        each.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
        each.add_argument("--force", action="store_true", help="overwrite an existing file")
    return p


if __name__ == "__main__":
    run_command(main)
