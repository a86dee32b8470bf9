"""lesson.ipynb: every cell runs in a copy of the repository, with fewer images and steps."""

import shutil
import sys
from types import SimpleNamespace

import pytest

import sample
from conftest import ALONE, ROOT

needs = "needs nbclient, nbformat and ipykernel (requirements-dev.txt)"
nbformat = pytest.importorskip("nbformat", reason=needs)
nbclient = pytest.importorskip("nbclient", reason=needs)
pytest.importorskip("ipykernel", reason=needs)

NOTEBOOK = ROOT / "lesson.ipynb"
SHORT = """
DATASET, STEPS, PREVIEW_EVERY, REPOSITORY = "glyphs", 4, 2, ""

from support import data                        # 100 images instead of 20,000
draw = data.draw_glyphs
data.draw_glyphs = lambda count, seed: draw(100, seed)

import sys
sys.modules["ipywidgets"] = None                # as if it were not installed
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def source(notebook, name: str) -> str:
    return next(cell.source for cell in notebook.cells if cell.id == name)


def test_no_output_is_committed(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
            assert len(cell.source.splitlines()) <= 18, cell.id


def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    for name in ("support", "tools", "variants"):
        shutil.copytree(ROOT / name, copy / name)
    for path in [*ROOT.glob("*.py"), ROOT / "assets" / "mnist.pt"]:
        (copy / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, copy / path.relative_to(ROOT))
    before = {p for p in copy.rglob("*")}
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))

    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    assert {line.split(" = ")[0] for line in parameters.source.splitlines()} == {
        "DATASET", "STEPS", "PREVIEW_EVERY", "REPOSITORY"}
    parameters.source = SHORT
    client = nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3",
                                     resources={"metadata": {"path": str(copy)}})
    client.execute()

    kinds = {cell.id: [kind for output in cell.outputs for kind in output.get("data", ())
                       if kind.startswith("image/")]
             for cell in notebook.cells if cell.cell_type == "code"}
    assert kinds == {
        "parameters": [], "install": [], "noise": ["image/png"], "train": [],
        "previews": ["image/gif"], "sampling": ["image/gif"], "attention": ["image/png"],
        "guidance": ["image/png"] * 4, "shipped": ["image/png"]}
    assert next(c for c in notebook.cells if c.id == "install").outputs == []
    new = {p.relative_to(copy).parts[0] for p in set(copy.rglob("*")) - before
           if "__pycache__" not in p.parts}
    assert new == {"output"}
    run, = copy.glob("output/001-glyphs-DiT-Nano-7")
    assert len(list(run.glob("samples/*.png"))) == 2
    printed = "".join(output.get("text", "") for cell in notebook.cells
                      if cell.cell_type == "code" for output in cell.outputs)
    assert f"output/{run.name}/step_0000004.pt: step 4" in printed


def test_outside_the_repository_it_is_cloned_and_installed(notebook, here):
    from IPython.core.inputtransformer2 import TransformerManager

    calls = []
    shell = SimpleNamespace(
        system=lambda command: calls.append(command),
        run_line_magic=lambda name, line: calls.append(f"%{name} {line}"))
    code = TransformerManager().transform_cell(source(notebook, "install"))
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        exec(code, dict(get_ipython=lambda: shell, REPOSITORY=""))
    assert calls == []
    exec(code, dict(get_ipython=lambda: shell, REPOSITORY="https://host/name"))
    assert calls == ["git clone --depth 1 {REPOSITORY} dit-lesson", "%cd dit-lesson",
                     "%pip install -q -r requirements.txt"]


def test_with_ipywidgets_there_is_a_slider(notebook, monkeypatch):
    def slider(value, **limits):
        return SimpleNamespace(value=value, **limits)

    def interact(function, **sliders):
        function(**{name: found.value for name, found in sliders.items()})
    shown = []
    monkeypatch.setitem(sys.modules, "ipywidgets",
                        SimpleNamespace(FloatSlider=slider, interact=interact))
    monkeypatch.setattr(sample, "load", lambda: "the newest")
    monkeypatch.setattr(sample, "generate",
                        lambda checkpoint, labels, cfg_scale: (checkpoint, *labels, cfg_scale))
    exec(source(notebook, "guidance"), dict(display=shown.append))
    assert shown == [("the newest", *range(10), 1.6)]
