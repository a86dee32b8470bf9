"""Where things are: four files at the root, arrows in one direction, any working directory."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ALONE, ROOT

LESSON = ["diffusion.py", "dit.py", "sample.py", "train_mnist.py"]
FOLDERS = ("support", "tools", "variants")
OURS = {Path(name).stem for name in LESSON} | set(FOLDERS) | {"tests"}
CODE = [Path(name) for name in LESSON] + sorted(
    p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).glob("**/*.py"))


def imported(path: Path) -> set[str]:
    """The modules and folders of this project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module.split(".")[0])
    return found & OURS


def may_import(path: Path) -> set[str]:
    """tools -> lesson -> support -> network and process."""
    basis = {"dit", "diffusion"}
    if path.name in ("dit.py", "diffusion.py"):
        return set()
    if path.parts[0] == "tools":
        return OURS - {"tests"}
    if path == Path("support/components.py"):       # the names of variants, as strings
        return basis | {"support", "variants"}
    own = {"variants"} if path.parts[0] == "variants" else set()
    return basis | {"support"} | own


def test_the_root_holds_the_lesson_alone():
    assert sorted(p.name for p in ROOT.glob("*.py")) == LESSON
    assert [p.name for p in ROOT.glob("*.ipynb")] == ["lesson.ipynb"]


@pytest.mark.parametrize("path", CODE, ids=str)
def test_imports_point_one_way(path):
    assert imported(path) <= may_import(path)


@pytest.mark.parametrize("path", CODE + sorted(p.relative_to(ROOT) for p in
                                               (ROOT / "tests").glob("*.py")), ids=str)
def test_no_path_is_changed_to_import(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        assert not (isinstance(node, ast.Attribute) and node.attr == "path"
                    and isinstance(node.value, ast.Name) and node.value.id == "sys")
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, str)
                    and "sys." + "path" in node.value)


@pytest.mark.parametrize("path", [p for p in CODE if p.parts[0] in ("tools", "variants")
                                  and "__main__" in (ROOT / p).read_text()], ids=str)
def test_a_command_run_as_a_file_says_how_to_run_it(path):
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: run this file as a module: python -m {path.parent}.{path.stem}\n"


def test_the_lesson_runs_without_the_rest_and_from_any_working_directory(tmp_path):
    """A copy of the four files and support/ alone: what a command imports is in there, and
    output/ is found beside the files, wherever one stands."""
    lesson, elsewhere = tmp_path / "lesson", tmp_path / "elsewhere"
    for path in CODE:
        if path.parts[0] not in ("tools", "variants"):
            (lesson / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, lesson / path)
    for name in ("cats", "dogs"):
        (elsewhere / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(elsewhere / "images" / name / f"{i}.png")

    def run(script: str, *flags) -> str:
        done = subprocess.run([sys.executable, lesson / script, *flags], cwd=elsewhere, text=True,
                              capture_output=True, timeout=100, env={**os.environ, **ALONE})
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train_mnist.py", "--dataset", "folder:images", "--steps", "1", "--batch-size", "2")
    trained, = lesson.glob("output/*/step_0000001.pt")
    assert str(trained) in run("sample.py", "--steps", "1", "--npz", "here.npz")
    assert sorted(p.name for p in elsewhere.iterdir()) == ["here.npz", "images"]
