"""What README.md and docs/ say is true: commands parse, code runs, files exist, counts hold."""

import ast
import contextlib
import importlib.util
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import diffusion
import train_mnist
from conftest import ROOT
from support import sampling
from support.settings import Settings

README = (ROOT / "README.md").read_text()
DOCUMENTS = {"README.md": README, **{f"docs/{p.name}": p.read_text()
                                     for p in sorted((ROOT / "docs").glob("*.md"))}}
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def commands(text: str) -> list[str]:
    """Inline and in blocks; a line that ends in a backslash goes on in the next one."""
    inline = re.findall(r"`((?:python3?|torchrun) [^`\n]+)`", text)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = [line.strip() for line in blocks.splitlines() if not line.lstrip().startswith("#")]
    return inline + [re.sub(r"\s+#.*", "", line) for line in lines if line]


COMMANDS = [(name, c) for name, text in DOCUMENTS.items() for c in commands(text)]
BLOCKS = commands("\n".join(re.findall(r"```bash\n.*?```", README, re.S)))
PARSERS = {"train_mnist.py": lambda: Settings(train_mnist.RECIPE, train_mnist.PRESETS).parser(),
           "sample.py": lambda: sampling.parser("")}


# What stands for a value of the reader's: a number, a name of variants/, a class he writes.
STAND_INS = {**dict.fromkeys("BGMNSX", "1"), "NAME": "dit", "conv": "dit", "cosine": "ddpm"}


def parse(words: list[str]) -> None:
    """Check the words after python or torchrun. Raises UserError, or fails."""
    words = [STAND_INS.get(word, word) for word in words]
    while words[0].startswith("--nproc_per_node"):
        words = words[1:]
    script, *flags = words
    if script in PARSERS:
        PARSERS[script]().parse_args(flags)
    elif script in ("dit.py", "diffusion.py"):
        assert not flags
    elif script == "-c":
        ast.parse(flags[0])
    elif script == "-m" and flags[0].startswith("variants."):
        assert importlib.util.find_spec(flags[0])
    elif script == "-m" and flags[0].startswith("tools."):
        importlib.import_module(flags[0]).parser().parse_args(flags[1:])
    elif script == "-m" and flags[0] == "pytest":
        for path in (f for f in flags if f.startswith("tests/")):
            assert (ROOT / path.split("::")[0]).exists(), path
    else:
        assert script == "-m" and flags[0] == "venv", f"{script} is not a command of this project"


@pytest.mark.parametrize("name, command", COMMANDS)
def test_every_command_parses(name, command):
    for part in re.split(r"&&|;(?![^'\"]*['\"])", command):
        words = shlex.split(part)
        if words and words[0] in ("python", "python3", "torchrun"):
            parse(words[1:])


def test_the_commands_are_found():
    scripts = {word for _, c in COMMANDS for word in c.split()}
    assert {"train_mnist.py", "sample.py", "tools.evaluate", "torchrun"} <= scripts
    assert len(COMMANDS) > 40 and len(BLOCKS) >= 7


def test_exactly_two_commands_start_from_a_fresh_clone():
    starting = [c for c in BLOCKS if c.startswith("python3 -m venv")]
    assert len(starting) == 2
    assert starting[0].endswith("-r requirements.txt && python train_mnist.py")
    assert starting[1].endswith("-r requirements-dev.txt && python -m pytest -q")


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text()
    command = next(c for c in BLOCKS if "pytest" in c)
    assert all(part in ci for part in command.split(" && "))


def test_the_four_files_and_their_line_counts():
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.M)
    assert sorted(name for name, _ in rows) == sorted(p.name for p in ROOT.glob("*.py"))
    for name, count in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - int(count.replace(",", ""))) <= 10, f"{name} has {lines} lines"


def test_the_readme_is_read_in_ten_minutes():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2_500


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in headings]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in plain}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere_and_pictures_are_pictures(name):
    text = DOCUMENTS[name]
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{name}: {link}"
        if path.suffix in (".png", ".gif"):
            with Image.open(path) as picture:
                picture.verify()
        elif path.suffix == ".svg":
            assert path.read_text().rstrip().endswith("</svg>")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    for path in re.findall(r"`((?:tests|tools|support|variants|assets|docs)/[\w./-]+\.\w+)`",
                           DOCUMENTS[name]):
        written_by_the_reader = path == "variants/toy.py"
        assert written_by_the_reader or (ROOT / path).exists(), path


def test_the_readme_shows_its_pictures():
    assert len(re.findall(r"!\[[^\]]+\]\(|<img [^>]*alt=", README)) >= 6


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_left_to_fill_in(name):
    assert not re.findall(r"@[A-Z]\w*@|@N:|TODO|FIXME|XXX", DOCUMENTS[name])


def test_the_functions_in_the_table_of_equations_exist():
    names = re.findall(r"^\|.*\| `([\w.]+)` \|$", README, re.M)
    assert len(names) >= 5
    for name in names:
        found = diffusion
        for part in name.split("."):
            found = getattr(found, part)


# ---------------------------------------------------------------- the code in the README


def test_the_listing_trains_and_samples(here, monkeypatch):
    """With random images for MNIST, and fewer steps."""
    from torchvision import datasets
    listing = next(block for block in PYTHON if "from dit import" in block)
    assert "from diffusion import" in listing and len(listing.splitlines()) <= 32
    monkeypatch.setattr(datasets, "MNIST", lambda *_, **__: SimpleNamespace(
        data=torch.randint(256, (300, 28, 28), dtype=torch.uint8),
        targets=torch.randint(10, (300,))))
    short = re.sub(r"\bsteps, B = \d+, \d+", "steps, B = 20, 8", listing)
    short = re.sub(r"\bsteps=\d+\b", "steps=3", short)
    assert short.count("steps, B = 20, 8") == short.count("steps=3") == 1
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(short, "README.md", "exec"), names)
    assert names["step"] == 19 and 0 < names["loss"].item() < 5     # from about 10 at the start
    assert names["xt"].shape == (10, 1, 28, 28) and names["xt"].isfinite().all()
    with Image.open("digits.png") as picture:
        assert picture.width > 10 * 28


def test_sampling_from_python_is_as_the_readme_shows_it(here, capsys):
    block = next(block for block in PYTHON if "from sample import" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    images = names["images"]
    assert images.shape == (3, 1, 28, 28) and images.min() >= -1 and images.max() <= 1
    assert images.std() > 0.3 and images._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("script, says", [("dit.py", "parameters"), ("diffusion.py", "")])
def test_the_two_files_check_themselves(script, says):
    begun = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0 and says in done.stdout and done.stdout.strip(), done.stderr
    print(f"python {script}: {time.monotonic() - begun:.1f} s")


# ---------------------------------------------------------------- packages


def required(name: str) -> set[str]:
    lines = (ROOT / name).read_text().split("\n")
    return {re.split(r"[><=]", line)[0] for line in lines if line and not line.startswith("-r")}


def imports(tree: ast.AST) -> set[str]:
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in found}


def test_the_packages_are_those_that_are_promised():
    assert required("requirements.txt") == {"torch", "torchvision", "numpy", "tqdm", "pillow"}
    base = required("requirements.txt") | {"PIL"} | set(sys.stdlib_module_names)
    base |= {p.stem for p in ROOT.glob("*.py")} | {"support", "variants", "tools"}
    optional = {"matplotlib", "safetensors", "wandb"}     # in a function that says what is missing
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("variants/*.py")]:
        tree = ast.parse(path.read_text())
        assert imports(tree) <= base | optional, path.name
        top = ast.Module([node for node in tree.body
                          if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert imports(top) <= base, path.name
    for path in ROOT.glob("tools/*.py"):
        with contextlib.suppress(ImportError):      # of an optional package
            importlib.import_module(f"tools.{path.stem}")
        assert imports(ast.parse(path.read_text())) <= \
            base | optional | required("requirements-dev.txt") | {"diffusers"}, path.name


def test_a_tool_starts_with_the_packages_of_training_alone():
    """An import of an optional package at its top would stop `--help`."""
    base = {n.lower() for n in required("requirements.txt")} | {"PIL", "support", "tools",
                                                                "variants"}
    base |= set(sys.stdlib_module_names) | {p.stem for p in ROOT.glob("*.py")}
    for path in ROOT.glob("tools/*.py"):
        body = ast.parse(path.read_text()).body
        top = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert imports(ast.Module(top, [])) <= base, Path(path).name
