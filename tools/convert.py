"""Convert checkpoints, published weights and latents.

    python -m tools.convert export CKPT mnist.pt            the EMA in half precision, to share
    python -m tools.convert export CKPT mnist.safetensors   the same for other programs
    python -m tools.convert export CKPT FOLDER              for diffusers' DiTTransformer2DModel
    python -m tools.convert import SOURCE OUT.pt            back from both; published weights
    python -m tools.convert encode IMAGES OUT.pt --vae VAE  a data set: --dataset latents:OUT.pt
    python -m tools.convert sample CKPT OUT.png --vae VAE   sample latents and decode them

safetensors and diffusers are optional packages. docs/interchange.md describes the formats.
"""

import importlib
import inspect
import json
import math
import os
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

import sample
from diffusion import GaussianDiffusion
from dit import MODELS, DiT, linear_patch_weight, sincos_2d
from support import checkpoint as checkpoints
from support.checkpoint import FORMAT
from support.classes import label_of
from support.command import (
    COUNT, SEED, Parser, UserError, atomic_write, check_target, number, reason, run_command, say)
from support.compute import image_noise, pick_device
from support.data import folder_files, open_image, to_uint8
from support.flags import add_sampling_flags
from support.pictures import grid, save_picture


def package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{reason(error)}: pip install safetensors diffusers") from None


def export(args: Namespace) -> None:
    """OUT is a .pt, a .safetensors, or, without a suffix, a new folder for diffusers."""
    writers = {".pt": checkpoints.save, ".safetensors": to_safetensors, "": to_diffusers}
    if args.out.suffix not in writers:
        raise UserError(f"{args.out}: the name ends in .pt or .safetensors, or is a folder's")
    if args.out.suffix:
        check_target(args.out, args.force)
    elif os.path.lexists(args.out):
        raise UserError(f"{args.out} exists: name a new folder")
    state = checkpoints.load(checkpoints.find_checkpoint(args.source))
    if args.cfg_scale is not None:
        state["config"]["sampling"]["cfg_scale"] = args.cfg_scale
    writers[args.out.suffix](args.out, shared(state) if args.out.suffix else state)
    say(f"written: {args.out} (step {state['step']:,})")


def shared(state: dict) -> dict:
    """A checkpoint to publish: the EMA weights alone, in half precision, and no path of the
    machine that trained them. Raises UserError where a weight overflows."""
    ema = {name: w.half() for name, w in state["ema"].items()}
    if not all(w.isfinite().all() for w in ema.values()):
        raise UserError("a weight is too large for half precision")
    recipe = {**state["config"]["recipe"], "dataset": state["config"]["data"].get("dataset")}
    recipe = {k: v for k, v in recipe.items() if k == "model" or not {"/", "\\"} & set(str(v))}
    return dict(format=FORMAT, step=state["step"], class_names=state["class_names"], ema=ema,
                config={**state["config"], "recipe": recipe})


def to_safetensors(path: Path, state: dict) -> None:
    """The weights; the rest of the checkpoint is JSON in the metadata of the file's header."""
    rest = {key: json.dumps(state[key]) for key in ("step", "config", "class_names")}
    content = package("safetensors.torch").save(
        state["ema"], {"format": "pt", "checkpoint": FORMAT, **rest})
    atomic_write(path, lambda file: file.write(content))


# ---------------------------------------------------------------- diffusers

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIGS = ("transformer/config.json", "scheduler/scheduler_config.json", "model_index.json")


def diffusers_names(depth: int) -> dict[str, list[str]]:
    """The name of each layer in DiTTransformer2DModel. qkv has three, a third of its rows each; the
    embedders of t and y have one in every block, since diffusers keeps a copy in each."""
    in_block = {"adaLN_modulation.1": ["norm1.linear"], "attn.proj": ["attn1.to_out.0"],
                "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
                "mlp.fc1": ["ff.net.0.proj"], "mlp.fc2": ["ff.net.2"]}
    copied = {"t_embedder.mlp.0": "timestep_embedder.linear_1",
              "t_embedder.mlp.2": "timestep_embedder.linear_2",
              "y_embedder.embedding_table": "class_embedder.embedding_table"}
    names = {"x_embedder.proj": ["pos_embed.proj"], "final_layer.linear": ["proj_out_2"],
             "final_layer.adaLN_modulation.1": ["proj_out_1"]}
    for ours, theirs in copied.items():
        names[ours] = [f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)]
    for i in range(depth):
        names |= {f"blocks.{i}.{ours}": [f"transformer_blocks.{i}.{layer}" for layer in theirs]
                  for ours, theirs in in_block.items()}
    return {f"{ours}.{kind}": [f"{layer}.{kind}" for layer in theirs]
            for ours, theirs in names.items() for kind in ("weight", "bias")}


def to_diffusers(folder: Path, state: dict) -> None:
    """Write a folder that diffusers loads, in float32. Raises UserError for a network or a process
    that its classes cannot express."""
    config, weights = state["config"], {name: w.float() for name, w in state["ema"].items()}
    if config["network"] != "dit" or config["process"] not in ("ddpm", "learned-variance"):
        raise UserError(f"diffusers has no {config['network']} with {config['process']}")
    model, process = ({k: p.default for k, p in inspect.signature(cls).parameters.items()} | given
                      for cls, given in ((DiT, config["model"]),
                                         (GaussianDiffusion, config["diffusion"])))
    table = sincos_2d(model["hidden_size"], model["input_size"] // model["patch_size"])
    if model["mlp_ratio"] != 4 or not torch.allclose(weights["pos_embed"], table, atol=1e-3):
        raise UserError("diffusers' DiT has an MLP ratio of 4 and the fixed position embedding")
    p, C = model["patch_size"], model["in_channels"]
    transformer = dict(
        _class_name="DiTTransformer2DModel", sample_size=model["input_size"], patch_size=p,
        in_channels=C, out_channels=2 * C if model["learn_sigma"] else C,
        num_layers=model["depth"], num_attention_heads=model["num_heads"],
        attention_head_dim=model["hidden_size"] // model["num_heads"],
        num_embeds_ada_norm=model["num_classes"], norm_type="ada_norm_zero", norm_eps=1e-6,
        norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True)
    scheduler = dict(
        _class_name="DDIMScheduler", beta_schedule="linear", beta_start=process["beta_start"],
        beta_end=process["beta_end"], num_train_timesteps=process["num_timesteps"],
        prediction_type=PREDICTION_TYPES[process["prediction"]],
        clip_sample=not config["sampling"].get("latents"), set_alpha_to_one=True,
        timestep_spacing="trailing")            # starts at the last timestep, as this project does
    index = dict(_class_name="DiTPipeline", id2label=dict(enumerate(state["class_names"])))
    kernel = weights["x_embedder.proj.weight"].view(-1, p, p, C).permute(0, 3, 1, 2)
    weights["x_embedder.proj.weight"] = kernel      # the inverse of linear_patch_weight
    theirs = {}
    for ours, names in diffusers_names(model["depth"]).items():
        if ours in weights:                     # the embedding of y has no bias
            w = weights[ours]
            parts = w.chunk(3) if ".qkv." in ours else [w] * len(names)
            theirs |= {name: part.clone(memory_format=torch.contiguous_format)
                       for name, part in zip(names, parts, strict=True)}
    files = {WEIGHTS: package("safetensors.torch").save(theirs, {"format": "pt"}),
             "load.py": LOADER.encode()}
    for name, content in zip(CONFIGS, (transformer, scheduler, index), strict=True):
        files[name] = json.dumps(content, indent=1).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        for name, content in files.items():
            atomic_write(new / name, lambda file, content=content: file.write(content))
        os.replace(new, folder)                         # complete or absent


LOADER = '''"""The DiT in this folder, for diffusers: transformer, scheduler = load()"""
from pathlib import Path
from diffusers import DDIMScheduler, DiTTransformer2DModel


def load(folder=Path(__file__).parent):
    transformer = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer",
                                                        low_cpu_mem_usage=False)
    for block in transformer.transformer_blocks:    # 0 as in the published DiT; diffusers has 1
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer.eval(), DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
'''


# ---------------------------------------------------------------- import


def import_weights(args: Namespace) -> None:
    """SOURCE is a .safetensors, a folder of diffusers, or a .pt of the published code. It is
    validated as a checkpoint is."""
    check_target(args.out, args.force, ".pt")
    try:
        if args.source.is_dir():
            state = from_diffusers(args.source)
        elif args.source.suffix == ".safetensors":
            state = from_safetensors(args.source, args.heads)
        else:
            content = checkpoints.read_archive(args.source)
            if "format" in content:
                raise UserError(f"{args.source} is a checkpoint already")
            state = from_published(content.get("ema", content), args.heads)
    except (UserError, MemoryError):
        raise
    except Exception as error:      # json, safetensors and torch raise many types on bad bytes
        raise checkpoints.Damaged(f"{args.source} is no DiT that fits ({reason(error)})") from None
    checkpoints.save(args.out, checkpoints.validate(state, args.source))
    say(f"written: {args.out} (DiT, {sum(w.numel() for w in state['ema'].values()):,} numbers)")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file."""
    with package("safetensors").safe_open(path, "pt") as file:      # copies, since it is mapped
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}


def from_safetensors(path: Path, heads: int | None) -> dict:
    """A checkpoint from a file that `export` wrote, or published weights in this format."""
    weights, metadata = read_safetensors(path)
    if "checkpoint" not in metadata:
        return from_published(weights, heads)
    rest = {key: json.loads(metadata[key]) for key in ("step", "config", "class_names")}
    return dict(format=metadata["checkpoint"], ema=weights, **rest)


def from_published(weights: dict[str, Tensor], heads: int | None) -> dict:
    """A checkpoint for weights of the published code. Their shapes determine all but the number of
    heads, which dit.MODELS knows for the sizes of the paper."""
    kernel = weights["x_embedder.proj.weight"]
    width, channels, patch, _ = kernel.shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    known = {(m["hidden_size"], m["depth"]): m["num_heads"] for m in MODELS.values()}
    if not (heads := heads or known.get((width, depth))):
        raise UserError(f"no model of dit.MODELS has width {width} and {depth} blocks: --heads N "
                        f"gives the number of attention heads")
    model = dict(
        input_size=math.isqrt(weights["pos_embed"].shape[1]) * patch, patch_size=patch,
        in_channels=channels, hidden_size=width, depth=depth, num_heads=heads,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        num_classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        learn_sigma=weights["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2)
    from torchvision.models import ResNet18_Weights     # takes a second to import
    names, classes = ResNet18_Weights.DEFAULT.meta["categories"], model["num_classes"]
    process, sampler = ("learned-variance", "ddpm") if model["learn_sigma"] else ("ddpm", "ddim")
    config = dict(network="dit", model=model, process=process, data={}, recipe={},
                  diffusion=dict(prediction="eps", weighting="plain"),
                  sampling=dict(sampler=sampler, steps=250, eta=0.0, cfg_scale=4.0, latents=True))
    return dict(format=FORMAT, step=0, config=config,
                class_names=names if len(names) == classes else list(map(str, range(classes))),
                ema={**weights, "x_embedder.proj.weight": linear_patch_weight(kernel)})


def from_diffusers(folder: Path) -> dict:
    """A checkpoint for the DiTTransformer2DModel and the scheduler in a folder."""
    transformer, scheduler, index = (
        json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for name in CONFIGS)
    if (transformer["activation_fn"], scheduler["beta_schedule"]) != ("gelu-approximate", "linear"):
        raise ValueError("another activation or schedule than DiT's")
    (theirs, _), weights = read_safetensors(folder / WEIGHTS), {}
    for ours, names in diffusers_names(min(transformer["num_layers"], len(theirs))).items():
        parts = [theirs[name] for name in names if name in theirs]
        if ".qkv." not in ours and any(not torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"the copies of {ours} in its blocks differ")
        if parts:
            weights[ours] = torch.cat(parts) if ".qkv." in ours else parts[0]
    width, _, patch, _ = weights["x_embedder.proj.weight"].shape
    side = transformer["sample_size"] // patch
    if not 0 < side <= 256:                     # before anything is computed
        raise ValueError("its sample_size")
    weights["pos_embed"] = sincos_2d(width, side)
    state = from_published(weights, transformer["num_attention_heads"])
    predictions = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    state["config"]["diffusion"] |= dict(
        prediction=predictions[scheduler["prediction_type"]], beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"], num_timesteps=scheduler["num_train_timesteps"])
    if scheduler.get("clip_sample"):                        # images
        state["config"]["sampling"] = dict(sampler="ddim", eta=0.0, cfg_scale=1.5)
    state["config"]["sampling"]["steps"] = min(250, scheduler["num_train_timesteps"])
    if names := index.get("id2label"):
        state["class_names"] = [names[str(i)] for i in range(len(names))]
    return state


# ---------------------------------------------------------------- latents


class Autoencoder:
    """An AutoencoderKL of diffusers. encode: images (B, 3, S, S) in [-1, 1] -> latents (B, C, H, H)
    with a mean of about 0 and a standard deviation of about 1; decode: the way back. S = factor H.
    """

    def __init__(self, name: str, device: torch.device):
        diffusers, self.device, local = package("diffusers"), device, os.path.isdir(name)
        diffusers.utils.logging.set_verbosity_error()
        try:
            if not local and name.count("/") != 1:
                raise ValueError("no such folder")
            self.vae, info = diffusers.AutoencoderKL.from_pretrained(
                name, subfolder="vae" if os.path.isdir(os.path.join(name, "vae")) else None,
                local_files_only=local, use_safetensors=True,           # no pickle is read
                low_cpu_mem_usage=False, output_loading_info=True)
            self.vae.eval().requires_grad_(False).to(device)
            config = self.vae.config
            self.channels = config.latent_channels
            self.factor = 2 ** (len(config.block_out_channels) - 1)
            # Stable Diffusion: 0.18215 alone. Others have a shift, or a mean and a std per channel.
            shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
            std = torch.tensor(config.get("latents_std") or 1.0)
            self.shift = torch.tensor(shift).reshape(-1, 1, 1).to(device)
            self.scale = (config.scaling_factor / std).reshape(-1, 1, 1).to(device)
            if info["missing_keys"] or not 0 < self.scale.min() <= self.scale.max() < math.inf:
                raise ValueError("weights are missing, or its scale is not valid")
        except Exception as error:          # OSError, ValueError, KeyError, of json, the network
            raise UserError(f"--vae {name} is not an AutoencoderKL in a folder or on the Hugging "
                            f"Face hub ({reason(error)})") from None

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior q(z | image), drawn with the standard normal noise."""
        posterior = self.vae.encode(images.to(self.device)).latent_dist
        z = posterior.mean + posterior.std * noise.to(self.device)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.device) / self.scale + self.shift).sample.clamp(-1, 1)


def encode(args: Namespace) -> None:
    """Encode the images in IMAGES/<class name>/ as a data set of latents."""
    check_target(args.out, args.force, ".pt")
    files, names, white = folder_files(args.source)
    vae, size, parts = Autoencoder(args.vae, pick_device(args.device)), args.image_size, []
    if size % vae.factor:
        raise UserError(f"--image-size {size} is not a multiple of {vae.factor}")
    shape = (vae.channels, size // vae.factor, size // vae.factor)
    for first in tqdm(range(0, len(files), args.batch_size), "encoding", unit="batch"):
        batch = files[first : first + args.batch_size]
        pixels = torch.stack([torch.tensor(open_image(path, size, white))
                              for path, _ in batch])
        noise = image_noise(args.seed, "encode", first, first + len(batch), shape)
        parts.append(vae.encode(pixels.float() / 127.5 - 1, noise).half().cpu())
    z = torch.cat(parts)
    content = dict(format="dit-latents/1", latents=z, class_names=names,
                   labels=torch.tensor([label for _, label in files]),
                   about=dict(autoencoder=Path(args.vae).name, image_size=size, seed=args.seed))
    atomic_write(args.out, lambda file: torch.save(content, file))
    say(f"written: {args.out} ({len(z):,} latents, mean {z.float().mean():.2f}, standard deviation "
        f"{z.float().std():.2f}): python train_mnist.py --dataset latents:{args.out}")


def decode(args: Namespace) -> None:
    """Sample latents and decode them."""
    check_target(args.out, args.force, ".png")
    checkpoint = sample.load(args.source, args.device, args.weights)
    if not checkpoint.sampling.get("latents"):
        raise UserError(f"{args.source} makes images: python sample.py samples from it")
    names, options = checkpoint.class_names, sample.sampling_options(args, checkpoint)
    y = torch.tensor([label_of(text, names) for text in args.labels or names[:8]])
    vae = Autoencoder(args.vae, pick_device(args.device))
    if vae.channels != checkpoint.model.in_channels:
        raise UserError(f"--vae {args.vae} has {vae.channels} channels, {args.source} "
                        f"{checkpoint.model.in_channels}")
    z = torch.cat(list(sample.sample(checkpoint, y, seed=args.seed, progress=True, **options)))
    images = [to_uint8(vae.decode(each[None])).cpu() for each in tqdm(z, "decoding", unit="img")]
    save_picture(args.out, grid(torch.cat(images), math.ceil(math.sqrt(len(y)))))
    say(f"written: {args.out} ({', '.join(names[i] for i in y)}; seed {args.seed})")


# ---------------------------------------------------------------- the command


def parser() -> Parser:
    p = Parser(__doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def add(run, name: str, source: str, out: str) -> Parser:
        command = commands.add_parser(name, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("source", type=Path, metavar=source)
        command.add_argument("out", type=Path, metavar=out)
        command.add_argument("--force", action="store_true", help="overwrite an existing file")
        return command

    add(export, "export", "CKPT", "OUT").add_argument(
        "--cfg-scale", type=number(float, -100, 100), metavar="S",
        help="the default guidance scale of sample.py (default: the run's)")
    add(import_weights, "import", "SOURCE", "OUT.pt").add_argument(
        "--heads", type=COUNT, metavar="N",
        help="attention heads of published weights of a size that dit.MODELS lacks")
    e, s = add(encode, "encode", "IMAGES", "OUT.pt"), add(decode, "sample", "CKPT", "OUT.png")
    for each in (e, s):
        each.add_argument("--vae", required=True, help="an AutoencoderKL of diffusers: a folder, "
                          "or a name on the Hugging Face hub (stabilityai/sd-vae-ft-ema)")
        each.add_argument("--seed", type=SEED, default=0, help="seed of the noise (default: 0)")
    e.add_argument("--image-size", type=COUNT, default=256, help="side in pixels (default: 256)")
    e.add_argument("--batch-size", type=COUNT, default=8, help="images at a time (default: 8)")
    e.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    s.add_argument("--labels", nargs="+", help="class names or indices (default: the first eight)")
    add_sampling_flags(s)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    run_command(main)
