"""What README.md and docs/ say is true: commands parse, code runs, links and named files exist."""

import ast
import importlib
import re
import runpy
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import diffusion
import train_mnist
from conftest import ROOT
from support import flags
from tools import figures

DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text()
             for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = DOCUMENTS["README.md"]
EACH = pytest.mark.parametrize("name", DOCUMENTS)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
DEFAULTS = {**train_mnist.RECIPE, **train_mnist.PRESETS["cpu"], **flags.OTHERS}
STAND_INS = {**dict.fromkeys("BGMNSX", "1"), "NAME": "dit", "conv": "dit", "cosine": "ddpm"}


def commands(text: str) -> list[str]:
    """Inline and in blocks, where a line that ends in a backslash continues."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    inline = [" ".join(c.split()) for c in re.findall(r"`((?:python3?|torchrun)\s[^`]+)`", prose)]
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return inline + [line for line in blocks.splitlines() if line and not line.startswith("#")]


def parse(script: str, *rest: str) -> None:
    """Check the words after python or torchrun. Raises UserError, or fails."""
    if script.startswith("--nproc_per_node"):
        parse(*rest)
    elif script == "train_mnist.py":
        flags.train_parser("", DEFAULTS, train_mnist.PRESETS, train_mnist.CHOICES).parse_args(rest)
    elif script == "sample.py":
        flags.sample_parser("").parse_args(rest)
    elif script == "-m" and rest[0].startswith(("tools.", "variants.")):
        module = importlib.import_module(rest[0])
        if "--" in rest:                                # tools.speed_run passes the others on
            parse("train_mnist.py", *rest[rest.index("--") + 1 :])
            rest = rest[: rest.index("--")]
        if rest[0] == "tools.lr_finder":                # the other flags are those of training
            parse("train_mnist.py", *module.parser().parse_known_args(rest[1:])[1])
        elif hasattr(module, "parser"):
            module.parser().parse_args(rest[1:])
    elif script == "-m" and rest[0] == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), rest
    elif script != "-c":
        assert [script, *rest[:1]] in (["dit.py"], ["diffusion.py"], ["-m", "venv"],
                                         ["-m", "http.server"])


@EACH
def test_every_command_parses(name):
    for part in " && ".join(commands(DOCUMENTS[name])).split(" && "):
        program, *words = shlex.split(part, comments=True)
        if program in ("python", "python3", "torchrun"):
            parse(*(STAND_INS.get(word, word) for word in words))
    assert len(commands(README)) > 10


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in headings]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in plain}


@EACH
def test_links_and_named_files_exist(name):
    text = DOCUMENTS[name]
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link
    for path in re.findall(r"`((?:tests|tools|support|variants|assets|docs)/[\w./-]+\.\w+)`", text):
        assert path == "variants/toy.py" or (ROOT / path).exists(), path   # the reader writes that
    for function in re.findall(r"^\|.*\| `([\w.]+)` \|$", README, re.M):     # of the equations
        assert eval(function, vars(diffusion))


def test_the_listing_trains_and_samples(here, monkeypatch):
    """With random images for MNIST, and fewer steps."""
    from torchvision import datasets
    listing = next(block for block in PYTHON if "from dit import" in block)
    monkeypatch.setattr(datasets, "MNIST", lambda *_, **__: SimpleNamespace(
        data=torch.randint(256, (300, 28, 28)).byte(), targets=torch.randint(10, (300,))))
    short, changed = re.subn(r"\bsteps(, B)? = \d+(, \d+)?", r"steps, B = 20, 8", listing)
    short, again = re.subn(r"\bsteps=\d+\b", "steps=3", short)
    assert changed == again == 1
    torch.manual_seed(0)
    exec(compile(short, "README.md", "exec"), names := {})
    assert 0 < names["loss"].item() < 5                 # from about 10 at the start
    assert Image.open("digits.png").width > 10 * 28


def test_sampling_from_python_is_as_the_readme_shows_it(here):
    exec(next(block for block in PYTHON if "from sample import" in block), names := {})
    images = names["images"]
    assert images.shape == (3, 1, 28, 28) and images.std() > 0.3 and images.abs().max() <= 1
    assert images._repr_png_().startswith(b"\x89PNG")


def test_the_two_files_check_themselves(capsys):
    for script in ("dit.py", "diffusion.py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
        assert len(capsys.readouterr().out.splitlines()) == 8


@pytest.mark.parametrize("main, text", [
    (train_mnist.main, "(default: 50000 on a GPU, 4000 on a CPU)"), (figures.main, "99% right")])
def test_help_has_the_presets_and_percent_signs(capsys, main, text):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and text in shown and "option_strings" not in shown


def test_a_command_starts_with_the_packages_of_training_alone():
    """An optional package imported at the top would stop `--help`."""
    own = {p.stem for p in ROOT.glob("*.py")} | {"support", "tools", "variants"}
    packages = {"torch", "torchvision", "numpy", "tqdm", "PIL", *sys.stdlib_module_names} | own
    for path in [p for p in ROOT.glob("*/*.py") if p.parent.name in own] + [*ROOT.glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert {name.split(".")[0] for name in names} <= packages, path.name
