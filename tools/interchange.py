"""Exports of a checkpoint to other formats: `python -m tools.export CKPT --to FORMAT DIR`.

    safetensors    config.json, model.safetensors: read by sample.py and every other command here
    diffusers      transformer/ (DiTTransformer2DModel), scheduler/ (DDIMScheduler), load.py

Each folder has a model card, README.md. Neither needs diffusers to write it; both need the package
safetensors.
"""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from dit import sincos_2d
from support import checkpoints, components
from support.cli import UserError, check_target, escape, io_errors, shorten
from support.safetensors_folder import CONFIG, WEIGHTS, package

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}     # of diffusers
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"

# ---------------------------------------------------------------- safetensors


def to_safetensors(state: dict, measured: dict | None) -> dict[str, bytes]:
    """The files of a folder that `checkpoints.load` reads; weights in half precision."""
    state = checkpoints.shared(state)
    config = {"format": checkpoints.FORMAT, **{k: v for k, v in state.items() if k != "ema"}}
    use = ["```bash", "python sample.py THIS_FOLDER", "```"]
    return {WEIGHTS: package().torch.save(_separate(state["ema"]), {"format": "pt"}),
            CONFIG: _json(config),
            "README.md": card(state, measured, "pytorch", use)}


# ---------------------------------------------------------------- diffusers


def to_diffusers(state: dict, measured: dict | None) -> dict[str, bytes]:
    """The files of a folder that diffusers loads; weights in float32. Raises UserError for a
    network or a process that diffusers' classes cannot express."""
    config, weights = state["config"], {k: w.float() for k, w in state["ema"].items()}
    model, process, sampling = config["model"], config["diffusion"], config["sampling"]
    for part, name in [("network", "dit"), ("process", "ddpm")]:
        if config[part] != name:
            raise UserError(f"--to diffusers: the {part} is {config[part]!r}, and diffusers' DiT "
                            f"has {name!r} alone")
    if int(model["hidden_size"] * model["mlp_ratio"]) != 4 * model["hidden_size"]:
        raise UserError(f"--to diffusers: the MLP ratio is {model['mlp_ratio']}, and diffusers' "
                        f"DiT has 4 alone")
    table = sincos_2d(model["hidden_size"], model["input_size"] // model["patch_size"])
    if not torch.allclose(weights["pos_embed"], table, atol=1e-3):      # half precision: 5e-4
        raise UserError("--to diffusers: the position embedding is not the fixed table, which is "
                        "the only one that diffusers' DiT has")
    channels = model["in_channels"]
    transformer = dict(
        _class_name="DiTTransformer2DModel", sample_size=model["input_size"],
        patch_size=model["patch_size"], in_channels=channels,
        out_channels=channels * (2 if model["learn_sigma"] else 1), num_layers=model["depth"],
        num_attention_heads=model["num_heads"],
        attention_head_dim=model["hidden_size"] // model["num_heads"],
        num_embeds_ada_norm=model["num_classes"], norm_type="ada_norm_zero", norm_eps=1e-6,
        norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True)
    scheduler = dict(
        _class_name="DDIMScheduler", beta_schedule="linear", beta_start=process["beta_start"],
        beta_end=process["beta_end"], num_train_timesteps=process["num_timesteps"],
        prediction_type=PREDICTION_TYPES[process["prediction"]],
        clip_sample=not sampling.get("latents"), set_alpha_to_one=True,
        timestep_spacing="trailing")            # starts at the last timestep, as this project does
    use = ["```python", "from load import load, sample        # in this folder", "",
           "transformer, scheduler = load()",
           f"images = sample(transformer, scheduler, labels=[0], steps={sampling['steps']}, "
           f"cfg_scale={sampling['cfg_scale']:g})", "```", "",
           "`load.py` also sets the timestep frequencies of the published DiT, which differ from "
           "those", "of `DiTTransformer2DModel`: load the model through it."]
    return {TRANSFORMER: package().torch.save(_separate(diffusers_weights(weights)),
                                              {"format": "pt"}),
            "transformer/config.json": _json(transformer),
            "scheduler/scheduler_config.json": _json(scheduler),
            "load.py": LOADER.encode(),
            "README.md": card(state, measured, "diffusers", use)}


def diffusers_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DiT's state dict under the names of DiTTransformer2DModel, which computes the position
    embedding itself and keeps a copy of the two embedders in every block."""
    tail = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2",
            "final_layer.adaLN_modulation.1": "proj_out_1"}
    embedders = {"t_embedder.mlp.0": "timestep_embedder.linear_1",
                 "t_embedder.mlp.2": "timestep_embedder.linear_2",
                 "y_embedder.embedding_table": "class_embedder.embedding_table"}
    block = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0",
             "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    found = {}
    for name, w in weights.items():
        layer, _, kind = name.rpartition(".")       # kind: weight or bias
        if layer in tail:
            found[f"{tail[layer]}.{kind}"] = w
        elif layer in embedders:
            for i in range(depth):
                found[f"transformer_blocks.{i}.norm1.emb.{embedders[layer]}.{kind}"] = w
        elif layer.startswith("blocks."):
            _, i, inner = layer.split(".", 2)
            prefix = f"transformer_blocks.{i}"
            if inner == "attn.qkv":
                for each, part in zip("qkv", w.chunk(3), strict=True):
                    found[f"{prefix}.attn1.to_{each}.{kind}"] = part
            else:
                found[f"{prefix}.{block[inner]}.{kind}"] = w
    return found


LOADER = '''"""Load and sample the DiT in this folder with diffusers.

    transformer, scheduler = load()
    images = sample(transformer, scheduler, labels=[0, 1, 2])       # (N, C, H, H) in [-1, 1]
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel


def load(folder=Path(__file__).parent):
    transformer = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer",
                                                        low_cpu_mem_usage=False)
    for block in transformer.transformer_blocks:    # 0 as in the published DiT; diffusers has 1
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer.eval(), DDIMScheduler.from_pretrained(folder, subfolder="scheduler")


@torch.no_grad()
def sample(transformer, scheduler, labels, steps=50, cfg_scale=1.5, seed=0):
    size, channels = transformer.config.sample_size, transformer.config.in_channels
    y = torch.tensor(labels, device=transformer.device)
    null = torch.full_like(y, transformer.config.num_embeds_ada_norm)      # "no class"
    xt = torch.randn(len(y), channels, size, size, generator=torch.manual_seed(seed)).to(y.device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = transformer(torch.cat([xt, xt]), t.expand(2 * len(y)).to(y.device),
                          torch.cat([y, null])).sample[:, :channels]
        out_cond, out_uncond = out.chunk(2)
        out = out_uncond + cfg_scale * (out_cond - out_uncond)
        xt = scheduler.step(out, t, xt, use_clipped_model_output=True).prev_sample
    return xt
'''

# ---------------------------------------------------------------- the model card


def card(state: dict, measured: dict | None, library: str, use: list[str]) -> bytes:
    """README.md: what the network is, how it was trained, how good it is where that is known."""
    config, names = state["config"], state["class_names"]
    model, about = config["model"], config["data"]
    with torch.device("meta"):
        network = components.network_class(config["network"])(**model)
    parameters = sum(p.numel() for p in network.parameters())
    side, dataset = model["input_size"], _cell(about.get("dataset", "unknown"))
    shown = ", ".join(_cell(shorten(n, 40)) for n in names[:10]) + ", ..." * (len(names) > 10)
    title = _cell(config["recipe"].get("model") or config["network"])
    rows = [("network", f"`{_cell(config['network'])}`, {parameters:,} parameters"),
            ("makes", f"{model['in_channels']} x {side} x {side} "
             + ("latents" if config["sampling"].get("latents") else "pixels")),
            ("classes", f"{len(names):,}: {shown}"),
            ("trained on", f"{dataset}, {state['step']:,} steps"),
            ("process", f"`{_cell(config['process'])}`, "
             f"predicts {_cell(config['diffusion'].get('prediction', '-'))}"),
            ("sampling", f"{config['sampling']['sampler']}, {config['sampling']['steps']} steps, "
             f"guidance {config['sampling']['cfg_scale']:g}")]
    lines = ["---", f"library_name: {library}", "tags: [diffusion, dit]", "---", "",
             f"# {title} on {dataset}", "",
             "A Diffusion Transformer (arXiv 2212.09748), class-conditional, trained with *the "
             "Diffusion", "Transformer, as a lesson that runs*. These are the EMA weights.", "",
             "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
             *_measured_table(measured), "## Use", "", *use]
    return ("\n".join(lines) + "\n").encode()


def _measured_table(measured: dict | None) -> list[str]:
    if measured is None:
        return []
    columns = {"accuracy": ".2%", "frechet": ".2f", "precision": ".3f", "recall": ".3f"}
    lines = ["## Measured", "", f"{measured['images']:,} samples, {_cell(measured['how'])}, "
             f"against {_cell(measured['dataset'])}: `python -m tools.evaluate`.", "",
             "| | accuracy | Frechet distance | precision | recall |", "|---|---|---|---|---|"]
    for title, mean in measured["rows"].items():
        cells = [format(mean[k], form) if k in mean else "-" for k, form in columns.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def measured_row(path: Path, state: dict, report: Path | None) -> dict | None:
    """The measurement of this checkpoint: of the report that `tools.evaluate --json` wrote, else
    the last of its step in the run's evaluations.jsonl that no other model guided; None where
    there is none."""
    def read(text: str) -> dict:
        found = json.loads(text)
        rows = {title: {k: float(v) for k, v in found["rows"][key]["mean"].items()}
                for key, title in [("samples", "samples"), ("test", "real: test set")]}
        how = [str(found["sampler"]) + (f" (eta {found['eta']:g})" if found.get("eta") else ""),
               f"{int(found['steps'])} step{'s' * (int(found['steps']) > 1)}",
               f"guidance {float(found['cfg_scale']):g}"]
        if found.get("guidance_interval"):
            how.append("for sigma / alpha in ({:g}, {:g}]".format(*found["guidance_interval"]))
        if found.get("autoguidance"):
            how.append(f"autoguidance by {found['autoguidance']}")
        row = dict(rows=rows, images=int(found["rows"]["samples"]["images"]),
                   step=found["step"], weights=found["weights"], how=", ".join(how),
                   dataset=str(found.get("dataset", "real images")),
                   autoguidance=found.get("autoguidance"))
        if not all(math.isfinite(v) for mean in rows.values() for v in mean.values()):
            raise ValueError
        return row

    wrong = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
    if report is not None:
        try:
            with io_errors(f"{report} cannot be read"):
                found = read(report.read_text(errors="replace"))
        except wrong:
            raise UserError(f"{report} is not a report of a checkpoint by tools.evaluate "
                            f"--json") from None
        if found["step"] != state["step"]:
            raise UserError(f"{report} measures step {shorten(found['step'])}, and the checkpoint "
                            f"is at step {state['step']}")
        if found["weights"] != "ema":
            raise UserError(f"{report} measures the weights before averaging, which are not "
                            f"exported")
        return found
    found = None
    with contextlib.suppress(OSError):
        for line in path.with_name("evaluations.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(*wrong):
                row = read(line)
                if (row["step"] == state["step"] and row["weights"] == "ema"
                        and not row["autoguidance"]):
                    found = row
    return found


def _cell(text: object) -> str:
    """Text from a file, harmless in a Markdown table."""
    text = "".join(" " if c in "|`<>[]\\" else c for c in escape(text, 200))
    return text.strip() or "-"


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _separate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the format demands."""
    return {name: w.detach().clone(memory_format=torch.contiguous_format)
            for name, w in weights.items()}


# ---------------------------------------------------------------- folders

FORMATS = {"safetensors": to_safetensors, "diffusers": to_diffusers}
_WRITTEN = {CONFIG, WEIGHTS, "README.md", "load.py", TRANSFORMER, "transformer/config.json",
            "scheduler/scheduler_config.json"}


def check_folder(target: Path, force: bool) -> None:
    """Raise UserError, before any work, unless the folder can be written: it does not exist, is
    empty or, with --force, holds an earlier export and nothing else."""
    if os.path.lexists(target) and not os.path.isdir(target):
        raise UserError(f"{target} is a file: name a folder")
    if os.path.isdir(target) and any(target.iterdir()):
        others = sorted(str(p.relative_to(target)) for p in target.rglob("*")
                        if not os.path.isdir(p) and p.relative_to(target).as_posix() not in _WRITTEN
                        and "__pycache__" not in p.parts)
        if not (target / TRANSFORMER).exists() and not (target / WEIGHTS).exists():
            others = others or sorted(p.name for p in target.iterdir())     # no export of ours
        if others:
            raise UserError(f"{target} holds other files ({shorten(others[0])}): name a new folder")
        if not force:
            raise UserError(f"{target} exists: --force overwrites it")
    check_target(target / "README.md", True, ".md")


def write_folder(target: Path, files: dict[str, bytes]) -> None:
    """Write the files into a temporary folder beside `target`, which is then renamed: `target` is
    complete or absent, or what it was. Raises OSError."""
    target = Path(os.path.realpath(target))
    new, old = (target.with_name(f".{target.name[:40]}.{os.getpid()}.{end}")
                for end in ("tmp", "old"))
    try:
        for name, content in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            with open(new / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if target.is_dir():
            os.replace(target, old)
        os.replace(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.is_dir() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
