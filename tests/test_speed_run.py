"""tools/speed_run.py: its arithmetic, the command that it times, and runs that fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import FAST, refused
from support.command import UserError
from tools import evaluate, speed_run

SCRIPT = '''import json, os, sys, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(parents=True)
cache = os.environ["TORCHINDUCTOR_CACHE_DIR"]
(folder / "told.json").write_text(json.dumps([sys.argv[1:], os.listdir(cache), cache]))
print("hidden")
'''


def main(*words) -> int:
    return speed_run.main([str(w) for w in words])


def test_the_shortest_length_whose_means_reach_the_target():
    def of(*accuracies: float, recall=0.7) -> list[dict]:
        return [dict(accuracy=a, recall=recall) for a in accuracies]

    lengths = {400: of(0.999, 0.96), 600: of(0.98, 1.0), 800: of(0.988, 0.989), 900: of(1.0, 1.0)}
    assert [speed_run.reached(lengths, target) for target in (97, 99, 99.5)] == [400, 600, 900]
    assert speed_run.reached({400: of(0.5)}, 99) is None
    assert speed_run.reached({400: of(*[0.99] * 3)}, 99) == 400         # up to rounding
    assert speed_run.reached({400: of(1.0, recall=0.69), 500: of(1.0)}, 99) == 500
    assert speed_run.reached({400: of(1.0, recall=0.6) + of(1.0, recall=0.8)}, 99) == 400


def test_the_table_the_results_and_what_train_mnist_is_told(here, monkeypatch, capfd):
    """With a stand-in for train_mnist.py and for the evaluation."""
    monkeypatch.setattr(speed_run, "ROOT", here)
    Path("train_mnist.py").write_text(SCRIPT)
    told, accuracy = [], {(9, 0): 0.99, (9, 1): 0.992, (20, 0): 0.994, (20, 1): 0.997}

    def measured(words):
        folder = Path(words[0])
        steps, _, _, seed = folder.name.split("-")
        told.append((json.loads((folder / "told.json").read_text()), words[1:]))
        samples = dict(accuracy=accuracy[int(steps), int(seed)], frechet=2, recall=0.8)
        (folder / "evaluations.jsonl").write_text(json.dumps(dict(rows=dict(samples=samples))))

    monkeypatch.setattr(evaluate, "main", measured)
    assert main("--steps", 20, 24, 9, "--seeds", 2, "--cfg-scale", 2,
                "--device", "cpu", "--", "--lr", "1e-3") == 0
    out = capfd.readouterr().out
    assert re.search(r"^99% right: .*, 9 steps\n99.5% right: .*, 20 steps$", out, re.MULTILINE)
    assert "99.10% ± 0.14%" in out and "24 steps" not in out and "hidden" not in out    # no need
    assert "By the rules" in out                                                # two seeds
    for ((words, cached, cache), asked), (steps, seed) in zip(told, accuracy, strict=True):
        assert words[:4] == ["--dataset", "mnist", "--lr", "1e-3"]
        assert words[4:10] == ["--device", "cpu", "--steps", str(steps), "--seed", str(seed)]
        assert cached == [] and not os.path.exists(cache)       # nothing compiled before
        assert asked == ["--images", "1000", "--device", "cpu", "--cfg-scale", "2.0"]


def test_the_whole_on_drawn_digits(train, here, monkeypatch, capsys):
    """Training in this process, with the tiny model, and a ruler of two steps."""
    monkeypatch.setattr(evaluate, "MIN_STEPS", 2)
    monkeypatch.setattr(evaluate, "EPOCHS", 0)
    monkeypatch.setattr(speed_run, "IMAGES", 20)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(
        words, train(*words[2:])))
    assert main("--steps", 2, "--seeds", 1, "--device", "cpu", "--", *FAST) == 0
    line, = Path(here, "output").glob("*/2-steps-seed-0/evaluations.jsonl")
    found = json.loads(line.read_text())["rows"]["samples"]
    out = capsys.readouterr().out
    assert f"{found['accuracy']:.2%}" in out and f"{found['recall']:.3f}" in out
    assert "99% right: not reached in 2 steps with a recall of 0.7" in out


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_runs_that_fail_and_flags_that_are_not_free(here, monkeypatch, capfd):
    monkeypatch.setattr(speed_run, "ROOT", here)
    for end, message in [("sys.exit('error: no data')", "--seed 0 ended with status 1: no result"),
                         ("os.kill(os.getpid(), 9)", "ended with status -9")]:
        Path("train_mnist.py").write_text("import os, sys\n" + end)
        with pytest.raises(UserError, match=message) as caught:
            main("--steps", 5, "--seeds", 1)
        assert caught.value.status == 1
    assert "error: no data" in capfd.readouterr().err       # the script's own message is seen
    for words, message in [(["--steps", 10, "--", "--seed=3"], "--seed is not for train_mnist.py"),
                           (["--steps", 10, "--", "--init-from", "x.pt"], "--init-from is not"),
                           (["--stepps", 10], "required: --steps")]:
        assert message in refused(speed_run.main, *words)
