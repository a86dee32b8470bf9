"""tools/speed_run.py: its arithmetic, one run of the whole on drawn digits, and runs that fail."""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import FAST
from support.cli import UserError
from tools import ruler, speed_run


def main(*words) -> int:
    return speed_run.main([str(w) for w in words])


def test_the_shortest_length_whose_mean_reaches_the_target():
    def of(*accuracies: float, recall=0.7) -> list[dict]:
        return [dict(accuracy=a, recall=recall) for a in accuracies]

    lengths = {400: of(0.999, 0.96), 600: of(0.98, 1.0), 800: of(0.988, 0.989), 900: of(1.0, 1.0)}
    assert [speed_run.reached(lengths, target) for target in (97, 99, 99.5)] == [400, 600, 900]
    assert speed_run.reached({400: of(0.5)}, 99) is None
    assert speed_run.reached({400: of(*[0.99] * 3)}, 99) == 400         # up to rounding
    assert speed_run.reached({400: of(1.0, recall=0.69), 500: of(1.0)}, 99) == 500
    uneven = of(1.0, recall=0.6) + of(1.0, recall=0.8)
    assert speed_run.reached({400: uneven}, 99) == 400                  # the mean counts


@pytest.fixture
def faked(here, monkeypatch):
    """Each run takes steps / 10 seconds and has an accuracy of its own; the calls made."""
    calls = []
    accuracies = {(10, 0): 0.97, (10, 1): 0.98, (20, 0): 0.991, (20, 1): 0.993, (30, 0): 0.995,
                  (30, 1): 0.997, (40, 0): 1.0, (40, 1): 1.0}

    def train(steps, seed, folder, flags):
        folder.mkdir()
        (folder / f"step_{steps:07d}.pt").touch()
        calls.append((steps, seed, flags))
        return steps / 10 + seed

    def measure(checkpoint, args):
        steps, seed = map(int, re.findall(r"\d+", checkpoint.parent.name))
        return dict(accuracy=accuracies[steps, seed], frechet=2.0 + seed, recall=0.8)

    monkeypatch.setattr(speed_run, "train", train)
    monkeypatch.setattr(speed_run, "measure", measure)
    return calls


def test_the_table_and_the_results(faked, capsys):
    assert main("--steps", 30, 10, 20, 40, "--seeds", 2, "--json", "s.json", "--cfg-scale", 2, "--",
                "--lr", "1e-3") == 0
    flags = ["--lr", "1e-3"]
    assert faked == [(s, seed, flags) for s in (10, 20, 30) for seed in (0, 1)]     # 40: no need
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["20", "1", "3.0", "99.30%", "3.00", "0.800"] in lines
    assert ["20", "mean", "2.5", "±", "0.7", "99.20%", "±", "0.14%", "2.50", "±", "0.71", "0.800",
            "±", "0.000"] in lines
    assert "99% right: 2.5 seconds, 20 steps".split() in lines
    assert "99.5% right: 3.5 seconds, 30 steps".split() in lines
    report = json.loads(Path("s.json").read_text())
    assert report["steps_to"] == {"99%": 20, "99.5%": 30} and len(report["runs"]) == 6
    assert report["flags"] == flags and report["cfg_scale"] == 2 and report["images"] == 1000
    assert report["hardware"]["torch"] and report["runs"][3] == dict(
        steps=20, seed=1, seconds=3.0, accuracy=0.993, frechet=3.0, recall=0.8)
    assert main("--steps", 10, "--seeds", 1, "--targets", 97, 98) == 0
    out = capsys.readouterr().out
    assert "97% right: 1.0 seconds, 10 steps" in out and "mean" not in out
    assert "98% right: not reached in 10 steps with a recall of 0.7" in out
    assert "By the rules only three seeds or more" in out
    main("--steps", 10, "--seeds", 2, "--targets", 97, "--", "--dataset", "glyphs")
    assert "By the rules" in capsys.readouterr().out


def test_flags(faked):
    with pytest.raises(UserError, match="s.json exists: --force overwrites it"):
        Path("s.json").write_text("mine")
        main("--steps", 10, "--json", "s.json")
    assert not faked and main("--steps", 10, "--seeds", 1, "--json", "s.json", "--force") == 0
    for words, message in [
            (["--steps", 10, "--", "--moddel", "DiT-Nano/7"], "did you mean --model"),
            (["--steps", 10, "--", "--seed", 3], "--seed is not for train_mnist.py here"),
            (["--steps", 10, "--", "--init-from", "x.pt"], "--init-from is not for"),
            (["--steps", 10, "--", "--device", "tpu"], "tpu"),
            (["--steps", 10, "--", "--config", "none.json"], "none.json is not the config.json"),
            (["--stepps", 10], "required: --steps"), (["--steps"], "--steps"),
            (["--steps", 10, "--targets", 101], "101 is not a number of at least 0 and at most"),
            (["--steps", 10, "--model", "x"], "unrecognized arguments: --model")]:
        with pytest.raises(UserError, match=message) as caught:
            main(*words)
        assert "\n" not in str(caught.value)
    assert len(faked) == 1


# ---------------------------------------------------------------- the training command


SCRIPT = """import json, os, sys, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(parents=True)
cache = os.environ["TORCHINDUCTOR_CACHE_DIR"]
(folder / "told.json").write_text(json.dumps([sys.argv[1:], os.listdir(cache), cache]))
"""


def test_the_command_that_is_timed(here, monkeypatch, capfd):
    script = here / "script.py"
    monkeypatch.setattr(speed_run, "SCRIPT", script)
    script.write_text(SCRIPT + "import time; time.sleep(0.3); print('hidden')")
    seconds = speed_run.train(7, 1, here / "run", ["--lr", "1e-3", "--dataset", "glyphs"])
    words, cached, cache = json.loads((here / "run" / "told.json").read_text())
    assert words == ["--dataset", "mnist", "--lr", "1e-3", "--dataset", "glyphs", "--steps", "7",
                     "--seed", "1", "--out", str(here / "run")]
    assert cached == [] and not os.path.exists(cache)       # nothing compiled before, nothing left
    assert 0.3 < seconds and "hidden" not in capfd.readouterr().out


def test_a_run_that_fails_or_is_killed(here, monkeypatch, capfd):
    script = here / "script.py"
    monkeypatch.setattr(speed_run, "SCRIPT", script)
    for end, message in [("sys.exit('error: no data')", "--seed 0 ended with status 1: no result"),
                         ("os.kill(os.getpid(), 9)", "was killed by signal 9")]:
        script.write_text("import os, sys\n" + end)
        with pytest.raises(UserError, match=message) as caught:
            main("--steps", 5, "--seeds", 1, "--json", "s.json")
        assert caught.value.status == 1 and not Path("s.json").exists()
    assert "error: no data" in capfd.readouterr().err       # the script's own message is seen


def test_the_whole_on_drawn_digits(train, here, monkeypatch, capsys):
    """Training in this process, with the tiny model, and a ruler of two steps."""
    monkeypatch.setattr(ruler, "MIN_STEPS", 2)
    monkeypatch.setattr(ruler, "EPOCHS", 0)
    monkeypatch.setattr(speed_run, "IMAGES", 20)

    def run(words, **options):
        return SimpleNamespace(returncode=train(*words[2:]))

    monkeypatch.setattr(subprocess, "run", run)
    assert main("--steps", 2, "--seeds", 2, "--targets", 1, "--cfg-scale", 1.5, "--json", "s.json",
                "--", *FAST, "--device", "cpu") == 0
    runs = json.loads(Path("s.json").read_text())["runs"]
    folder, = (here / "output").glob("*-speed-run")
    for seed, found in enumerate(runs):
        line, = (folder / f"2-steps-seed-{seed}" / "evaluations.jsonl").read_text().splitlines()
        told = json.loads(line)
        assert told["cfg_scale"] == 1.5 and told["rows"]["samples"]["images"] == 20
        assert {k: told["rows"]["samples"]["mean"][k] for k in ("accuracy", "frechet", "recall")} \
            == {k: found[k] for k in ("accuracy", "frechet", "recall")}
    assert len(runs) == 2 and runs[0] != runs[1]
    out = capsys.readouterr().out
    assert "1% right: " in out and "real: test set" not in out      # the table alone
