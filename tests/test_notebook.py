"""lesson.ipynb: every cell runs in a copy of the repository, with fewer images and steps."""

import shutil

import pytest

from conftest import ALONE, ROOT

needs = "needs nbclient, nbformat and ipykernel (requirements-dev.txt)"
nbformat = pytest.importorskip("nbformat", reason=needs)
nbclient = pytest.importorskip("nbclient", reason=needs)
pytest.importorskip("ipykernel", reason=needs)

SHORT = """
DATASET, STEPS, PREVIEW_EVERY, REPOSITORY = "glyphs", 4, 2, ""

from support import data                        # 100 images instead of 20,000
draw = data.draw_glyphs
data.draw_glyphs = lambda count, seed: draw(100, seed)

import sys
sys.modules["ipywidgets"] = None                # as if it were not installed
"""


def test_every_cell_runs(tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    skipped = shutil.ignore_patterns(".*", "output", "data", "docs", "*.gif")
    shutil.copytree(ROOT, copy, ignore=skipped)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))

    notebook = nbformat.read(ROOT / "lesson.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not any(cell.outputs or cell.execution_count for cell in code.values())     # committed
    replaced = [line.split(" = ")[0] for line in code["parameters"].source.splitlines()]
    assert replaced == ["DATASET", "STEPS", "PREVIEW_EVERY", "REPOSITORY"]
    code["parameters"].source = SHORT
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3",
                            resources={"metadata": {"path": str(copy)}}).execute()

    kinds = {name: [kind for output in cell.outputs for kind in output.get("data", ())
                    if kind.startswith("image/")] for name, cell in code.items()}
    assert kinds == {
        "parameters": [], "install": [], "noise": ["image/png"], "train": [],
        "previews": ["image/gif"], "sampling": ["image/gif"], "attention": ["image/png"],
        "guidance": ["image/png"] * 4, "shipped": ["image/png"]}
    assert code["install"].outputs == []
    run, = copy.glob("output/001-glyphs-DiT-Nano-7")
    assert [p.name for p in sorted(run.glob("samples/*.png"))] == [
        "step_0000002.png", "step_0000004.png"]
    printed = "".join(output.get("text", "") for output in code["sampling"].outputs)
    assert f"output/{run.name}/step_0000004.pt: step 4" in printed     # the run of this notebook
