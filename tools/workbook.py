"""Write the lesson yourself: dit.py and diffusion.py with ten functions left to be written.

    python -m tools.workbook DIR            DIR/dit.py and DIR/diffusion.py, ten bodies removed
    python -m tools.workbook DIR --check    compares each function with the lesson's, in any order
    python DIR/train.py                     train_mnist.py with DIR's two files, and all its flags

Docstrings (of a `forward`: its class's) and README.md say what each function must do.
"""

import ast
import traceback
from collections.abc import Callable
from functools import reduce
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

import dit
from support.command import ROOT, Parser, UserError, reason, run_command, say, short

LESSON = {file: (ROOT / file).read_text() for file in ("dit.py", "diffusion.py")}
TRAIN = '''"""train_mnist.py and its flags, with the dit.py and diffusion.py of this folder."""
import pathlib, runpy, sys                                                      # noqa: E401
here, root = str(pathlib.Path(__file__).resolve().parent), {root!r}
print("training with dit.py and diffusion.py of", here, flush=True)
sys.path[:0] = [here, root]
runpy.run_path(root + "/train_mnist.py", run_name="__main__")
'''

# ---------------------------------------------------------------- what each function is run on
# In a module m, the learner's or the lesson's: a result, or results by name.


def processes(m: ModuleType, run: Callable) -> dict:
    """run(process, two images, t) for each prediction."""
    with torch.inference_mode():                            # an input changed in place raises
        a, b = torch.randn(2, 3, 2, 4, 4)
    return {f"prediction {name}": run(m.GaussianDiffusion(prediction=name), a, b,
                                      torch.tensor([50, 400, 800])) for name in ("eps", "v", "x0")}


def named(value: object, *names: str) -> object:
    """Of a tuple of as many results: a dict."""
    fits = isinstance(value, tuple) and len(value) == len(names)
    return dict(zip(names, value, strict=True)) if fits else value


def ddim(m: ModuleType) -> dict:
    def steps(eta, clip):
        made = m.GaussianDiffusion().ddim_sample(
            lambda xt, t: 2 * (xt + t / 500).sin(), xT, lambda t: xT * t / 300, clip, 4, eta)
        return {f"step {i}": named(step, "t", "x_next", "x0_hat")
                for i, step in enumerate(islice(made, 5), 1)}               # even if endless

    xT = torch.randn(3, 2, 4, 4)
    return {"eta 0": steps(0.0, True), "eta 0.5, clip False": steps(0.5, False)}


def guidance(m: ModuleType) -> dict:
    model = dit.DiT(8, 4, 1, 16, 1, 2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    xt, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 9])
    return {f"cfg_scale {scale}": m.classifier_free_guidance(model, y, scale)(xt, 400)
            for scale in (3, 1, 0)}


# ---------------------------------------------------------------- the functions, known mistakes


class Blank(NamedTuple):
    file: str
    name: str
    run: Callable[[ModuleType], object]
    mistakes: dict[str, str]    # in words: what in the lesson's source becomes what, "old -> new"


BLANKS = (
    Blank("dit.py", "patchify", lambda m: m.patchify(torch.randn(5, 2, 12, 12), 3), {
        "right if a token had the channel first": "2, 4, 3, 5, 1 -> 2, 4, 1, 3, 5",
        "without permuting, a token is not one patch": "x.permute(0, 2, 4, 3, 5, 1) -> x",
    }),
    Blank("dit.py", "unpatchify", lambda m: m.unpatchify(torch.randn(5, 16, 18), 3, 2), {
        "without permuting, a patch is not a square": "x.permute(0, 5, 1, 3, 2, 4) -> x",
    }),
    Blank("dit.py", "TimestepEmbedder.forward",
          lambda m: m.TimestepEmbedder(8)(torch.tensor([0, 7, 999])), {
        "sines come first, not cosines": "angle.cos(), angle.sin() -> angle.sin(), angle.cos()",
        "the MLP is missing": "self.mlp(torch -> (torch",
    }),
    Blank("dit.py", "Attention.forward", lambda m: m.Attention(12, 3)(3 * torch.randn(2, 5, 12)), {
        "1 / sqrt(D / heads) is missing": "(q, k, v) -> (q, k, v, scale=1)",
        "heads and tokens are not exchanged back before the last reshape": "x.transpose(1, 2) -> x",
        "proj is missing": "self.proj(x.t -> (x.t",
    }),
    Blank("dit.py", "DiTBlock.forward",
          lambda m: m.DiTBlock(12, 3)(torch.randn(2, 5, 12), 3 * torch.randn(2, 12)), {
        "scale in place of 1 + scale": "(1 + scale.unsqueeze(1)) -> scale.unsqueeze(1)",
        "shift and scale are exchanged": "= six -> = [six[i] for i in (1, 0, 2, 4, 3, 5)]",
        "the attention's gate is missing": "gate_attn.unsqueeze(1) * attn -> attn",
        "the MLP's gate is missing": "gate_mlp.unsqueeze(1) * mlp -> mlp",
    }),
    Blank("diffusion.py", "GaussianDiffusion.q_sample",
          lambda m: processes(m, lambda d, x0, eps, t: d.q_sample(x0, t, eps)), {
        "alpha and sigma are exchanged": "alpha * x0 + sigma * eps -> sigma * x0 + alpha * eps",
    }),
    Blank("diffusion.py", "GaussianDiffusion.target",
          lambda m: processes(m, lambda d, x0, eps, t: d.target(x0, eps, t)), {
        "the sign of v is wrong": "alpha * eps - sigma * x0 -> sigma * x0 - alpha * eps",
        "in v, x0 and eps are exchanged": "alpha * eps - sigma * x0 -> alpha * x0 - sigma * eps",
    }),
    Blank("diffusion.py", "GaussianDiffusion.x0_and_eps", lambda m: processes(m, lambda d, *images:
          named(d.x0_and_eps(*images), "x0_hat", "eps_hat")), {
        "for eps, x0_hat is not divided by alpha": "(xt - sigma * out) / alpha -> xt - sigma * out",
        "for v, - in place of + in eps_hat": "sigma * xt + alpha -> sigma * xt - alpha",
    }),
    Blank("diffusion.py", "GaussianDiffusion.ddim_sample", ddim, {
        "the last t_next is -1 (the image), not 0": "[1:] + [-1] -> [1:] + [0]",
        "eps_hat's share is not reduced by the new noise": "bar_next - std**2 -> bar_next",
        "eta, not eta^2, in the variance": "std = eta -> std = eta**0.5",
        "the new noise is missing": "std * noise(t) -> 0",
    }),
    Blank("diffusion.py", "classifier_free_guidance", guidance, {
        "with and without class are exchanged": "out_cond, out_uncond = -> out_uncond, out_cond =",
        "1 + cfg_scale, not cfg_scale": "return out_uncond + cfg -> return out_cond + cfg",
    }),
)


# ---------------------------------------------------------------- blanks are cut from the source


def blanked(source: str, names: list[str]) -> str:
    """The source with these functions' bodies, but for docstrings, replaced by a raise."""
    lines = source.splitlines(keepends=True)
    for name in reversed(names):                            # from the last, to keep line numbers
        node = ast.parse(source)
        for part in name.split("."):
            node = next(n for n in node.body if getattr(n, "name", None) == part)
        first = node.body[0]
        start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
        lines[start : node.end_lineno] = [" " * first.col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def write(folder: Path) -> int:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{short(folder)} exists and is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file, source in LESSON.items():
        names = [blank.name for blank in BLANKS if blank.file == file]
        (folder / file).write_text(blanked(source, names))
        say(f"{short(folder / file)}: to be written: {', '.join(names)}")
    (folder / "train.py").write_text(TRAIN.format(root=str(ROOT)))
    say(f"then: python -m tools.workbook {short(folder)} --check")
    return 0


# ---------------------------------------------------------------- the check


def load(path: Path, source: str | bytes, tested: str | None = None) -> ModuleType:
    """The module; with `tested`, the other blanks are the lesson's: each is tested alone."""
    module = ModuleType(path.stem)
    exec(compile(source, str(path), "exec"), vars(module))
    lesson = load(path, LESSON[path.name]) if tested else None
    for blank in BLANKS:
        if tested not in (None, blank.name) and blank.file == path.name:
            *owner, name = blank.name.split(".")
            setattr(reduce(getattr, owner, module), name,
                    getattr(reduce(getattr, owner, lesson), name))
    return module


def result(blank: Blank, module: ModuleType) -> object:
    torch.manual_seed(0)
    return blank.run(module)


def described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}".replace("torch.", "")
    if isinstance(value, dict):
        return "results " + ", ".join(value)
    return repr(value) if isinstance(value, int | float | None) else type(value).__name__


def differences(have: object, want: object, at: str = "") -> dict[str, str]:
    """{where: what} of the results that differ by more than float32's rounding, in their order."""
    if isinstance(want, dict) and isinstance(have, dict) and have.keys() == want.keys():
        return {where: what for name in want for where, what in
                differences(have[name], want[name], f"{at}{name}: ").items()}
    if described(have) != described(want):
        return {at: f"{described(have)}, not {described(want)}"}
    if isinstance(want, torch.Tensor):
        error, largest = (have - want).abs().max(), want.abs().max()
        if not error <= 1e-4 * largest.clamp(min=1):
            return {at: f"wrong by up to {error:.2g}; the right numbers are up to {largest:.2g}"}
    return {}


def verdict(blank: Blank, path: Path, source: bytes) -> str:
    """"right", or what is wrong first: the mistake that explains it, if it is known."""
    lesson = LESSON[path.name]
    try:
        have = result(blank, load(path, source, blank.name))
    except Exception as error:
        return failure(error, path)
    if not (found := differences(have, result(blank, load(path, lesson)))):
        return "right"
    where, what = next(iter(found.items()))
    for mistake, change in blank.mistakes.items():
        mistaken = load(path, lesson.replace(*change.split(" -> ")))
        if where not in differences(have, result(blank, mistaken)):
            return where + mistake
    return where + what


def failure(error: Exception, path: Path) -> str:
    """The exception in one line, with the last line of the learner's file that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, NotImplementedError) and frames[-1].filename == str(path):
        return f"not written yet (line {lines[-1]})"
    return (f"line {lines[-1]}: " if lines else "") + f"{type(error).__name__}: {reason(error)}"


@torch.no_grad()
def check(folder: Path) -> int:
    right = 0
    for file in LESSON:
        path = (folder / file).resolve()
        source = path.read_bytes()
        for blank in (blank for blank in BLANKS if blank.file == file):
            text = verdict(blank, path, source)
            right += text == "right"
            say(f"{file:12}  {blank.name:29}  {text}")
    done = right == len(BLANKS)
    then = f": python {short(folder)}/train.py trains with them"
    say(f"{right} of {len(BLANKS)} right{then * done}")
    return 0 if done else 1


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return check(args.dir) if args.check else write(args.dir)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("dir", type=Path, metavar="DIR", help="a new folder; with --check, yours")
    p.add_argument("--check", action="store_true", help="compare your functions with the lesson's")
    return p


if __name__ == "__main__":
    run_command(main)
