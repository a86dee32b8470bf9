"""tools/export.py: a checkpoint to publish."""

import pytest

from conftest import load
from sample import load as load_for_sampling
from support import checkpoints
from support.cli import UserError
from tools import export


def refused(*words) -> str:
    with pytest.raises(UserError) as error:
        export.main([str(w) for w in words])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_export_keeps_the_ema_weights_in_half_precision(checkpoint, here, capsys):
    assert export.main([str(checkpoint), "out.pt"]) == 0
    assert "written: out.pt (step 3, " in capsys.readouterr().out
    state, full = checkpoints.load("out.pt"), load(checkpoint)
    assert set(state) == {"format", "step", "config", "class_names", "ema"}
    assert all((state["ema"][k] == w.half()).all() for k, w in full["ema"].items())
    recipe = dict(full["config"]["recipe"], data_dir="data", dataset="glyphs")
    assert state["config"] == dict(full["config"], recipe=recipe)       # no path of this machine
    assert load_for_sampling("out.pt").step == 3

    before = (here / "out.pt").read_bytes()
    assert "out.pt exists: --force overwrites it" in refused(checkpoint, "out.pt")
    assert (here / "out.pt").read_bytes() == before
    assert export.main([str(checkpoint.parent), "out.pt", "--cfg-scale", "1.25", "--force"]) == 0
    sampling = dict(state["config"]["sampling"], cfg_scale=1.25)
    assert checkpoints.load("out.pt")["config"] == dict(state["config"], sampling=sampling)


def test_mistakes_are_one_line(checkpoint, here):
    (here / "folder.pt").mkdir()
    assert "ends in .pt" in refused(checkpoint, "out.zip")
    assert "no.pt does not exist" in refused("no.pt", "b.pt")
    assert "is a folder" in refused(checkpoint, "folder.pt", "--force")
    assert "at most 100" in refused(checkpoint, "b.pt", "--cfg-scale", "1e9")
    assert not (here / "b.pt").exists()
