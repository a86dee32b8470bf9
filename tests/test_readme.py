"""What the README says is true: its commands parse, its files exist, its line counts hold."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import export
import sample
import settings
from conftest import ROOT

README = (ROOT / "README.md").read_text()
INLINE = re.findall(r"`((?:python|torchrun|python3) [^`\n]+)`", README)
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).splitlines()
COMMANDS = [c.split("#")[0].strip() for c in INLINE + BLOCKS]


def words_after(command: str, script: str) -> list[str] | None:
    match = re.search(rf"(?:^|[ /]){re.escape(script)}(?: |$)(.*)$", command)
    return shlex.split(match[1]) if match else None


@pytest.mark.parametrize("script, parser", [
    ("train_mnist.py", settings.parser), ("sample.py", sample.parser),
    ("export.py", export.parser)])
def test_every_command_of_the_readme_parses(script, parser):
    found = [(c, words) for c in COMMANDS if (words := words_after(c, script)) is not None]
    assert found or script == "export.py"
    for _command, words in found:
        parser().parse_args(words)          # raises UserError, with the command in the trace


def test_exactly_two_commands_start_from_a_fresh_clone():
    starting = [c for c in BLOCKS if c.startswith("python3 -m venv")]
    assert len(starting) == 2
    assert starting[0].endswith("-r requirements.txt && python train_mnist.py")
    assert starting[1].endswith("-r requirements-dev.txt && python -m pytest -q")


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text()
    command = next(c for c in BLOCKS if "pytest" in c)
    assert all(part in ci for part in command.split(" && "))


def test_files_and_line_counts_of_the_file_map():
    rows = re.findall(r"^\| (`\w+\.py`(?:, `\w+\.py`)*) \| ([\d, ]+) \|", README, re.M)
    assert len(rows) >= 10
    told = {}
    for names, counts in rows:
        told.update(zip(re.findall(r"`(\w+\.py)`", names), counts.split(", "), strict=True))
    assert set(told) == {p.name for p in ROOT.glob("*.py")}
    for name, count in told.items():
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - int(count)) <= 10, f"{name} has {lines} lines, the README says {count}"


def test_pictures_exist_and_are_pictures():
    from PIL import Image
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 6
    for name in pictures:
        with Image.open(ROOT / name) as picture:
            picture.verify()


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]\w*@|@N:", README) and "TODO" not in README


def test_the_packages_are_those_that_are_promised():
    names = {re.split(r"[><=]", line)[0] for line in
             (ROOT / "requirements.txt").read_text().split()}
    assert names == {"torch", "torchvision", "numpy", "tqdm", "pillow"}
    allowed = names | {"PIL", "matplotlib"} | set(sys.stdlib_module_names)
    allowed |= {p.stem for p in ROOT.glob("*.py")}
    for path in ROOT.glob("*.py"):
        for module in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M):
            assert module in allowed, f"{path.name} imports {module}"


def test_imports_run_one_way():
    def project(path: Path) -> set[str]:
        modules = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M)
        return set(modules) & {p.stem for p in ROOT.glob("*.py")}

    assert not project(ROOT / "dit.py") and not project(ROOT / "diffusion.py")
    optional = {"evaluate", "ruler", "figures", "benchmark", "export"}
    for path in ROOT.glob("*.py"):
        if path.stem not in optional:
            assert not project(path) & optional, path.name
        assert path.stem == "train_mnist" or "train_mnist" not in project(path) or \
            path.stem in optional


def test_python_dit_py_checks_its_own_table():
    done = subprocess.run([sys.executable, ROOT / "dit.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
