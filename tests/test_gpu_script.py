"""tools/gpu.sh: its parts, time limits, second call and files, with a stand-in for Python; the dry
run on the CPU is a long test."""

import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from conftest import ALONE, ROOT
from support import checkpoints
from support.folders import read_metrics
from support.settings import Settings

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte",
         "t10k-labels-idx1-ubyte"]
PARTS = ["tests", "profile", "training", "export", "samples", "guidance-1", "guidance-1.25",
         "guidance-1.5", "guidance-1.75", "guidance-2", "classifier", "speed-run", "benchmark"]
# Logs its arguments and writes the files that they name. Where there is a file $HERE/PROGRAM, it
# sleeps for the seconds in it and fails.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\t' "$@" >> "$HERE/calls"; echo >> "$HERE/calls"
name=$1; [ "$1" = -m ] && name=$2
args=("$@")
for i in "${!args[@]}"; do
    case ${args[i]} in --out|--gif|--json|--profile) file=${args[i+1]} ;;
        tools.export) file=${args[i+2]} ;; *) continue ;; esac
    if [ "$name" = train_mnist.py ]; then
        mkdir -p "$file"; touch "$file/step_0000000.pt" "$file/metrics.jsonl"
    else head -c "${SIZE:-10}" /dev/zero > "$file"; fi
done
[ "$name" = tools.evaluate ] && echo '{}' >> "$3/evaluations.jsonl"
[ -e "$HERE/$name" ] || exit 0
trap 'exit 130' INT
for ((i = 0; i < 10 * $(cat "$HERE/$name"); i++)); do sleep 0.1; done
exit 1
"""


class Slot:
    """Calls of tools/gpu.sh on folders of their own."""

    def __init__(self, here: Path):
        self.here, self.data, self.out, self.run = (
            here, here / "data", here / "out", here / "runs" / "gpu")
        (here / "python").write_text(STAND_IN)
        (here / "python").chmod(0o755)
        self.data.mkdir()
        for name in NAMES:
            (self.data / f"{name}.gz").write_bytes(gzip.compress(name.encode()))

    def __call__(self, **environment) -> str:
        """Its standard output; .status and .calls (lists of arguments) are those of this call."""
        (self.here / "calls").write_text("")
        done = subprocess.run(
            ["bash", ROOT / "tools" / "gpu.sh", self.data, self.out], text=True, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
                **os.environ, **ALONE, "DEVICE": "cpu", "HERE": str(self.here),
                "PYTHON": str(self.here / "python"), "RUN": str(self.run),
                **{k: str(v) for k, v in environment.items()}})
        self.status = done.returncode
        self.calls = [line.rstrip("\t").split("\t")
                      for line in (self.here / "calls").read_text().splitlines()]
        return done.stdout

    def called(self, name: str) -> list[list[str]]:
        return [call for call in self.calls if name in call]


@pytest.fixture
def slot(tmp_path) -> Slot:
    return Slot(tmp_path)


def parts(text: str) -> list[str]:
    return [line.split()[1].rstrip(":") for line in text.splitlines() if "at most" in line]


def test_every_part_runs_once_in_its_order_and_fills_eight_files(slot):
    text = slot()
    assert slot.status == 0 and parts(text) == PARTS and "unfinished: nothing" in text
    assert sorted(p.name for p in slot.out.iterdir()) == [
        "benchmark.json", "evaluations.jsonl", "log.txt", "metrics.jsonl", "mnist-cpu.pt",
        "profile.txt", "samples.gif", "samples.png"]
    assert (slot.out / "log.txt").read_text() == text
    for name in NAMES:
        assert (slot.here / "runs/gpu.data/MNIST/raw" / name).read_text() == name
    text = slot()
    assert slot.status == 0 and parts(text) == [] and slot.calls == []
    assert text.count("done before") == len(PARTS)


def test_the_commands_have_flags_that_their_parsers_know(slot, monkeypatch):
    slot(AGAINST="models.py:DiT")
    slot.run = slot.here / "short"
    full, _ = slot.calls, slot(STEPS=20, AGAINST="models.py:DiT")
    import train_mnist
    defaults = Settings(train_mnist.RECIPE, train_mnist.PRESETS)
    for words in full + slot.calls:
        if words[0] == "train_mnist.py":
            given = vars(defaults.parser().parse_args(words[1:]))
            assert given["dataset"] == "mnist" and given["device"] == "cpu"
        elif words[0] == "sample.py":
            sample.parser("").parse_args(words[1:])
        elif words[1] != "pytest":
            args = importlib.import_module(words[1]).parser().parse_args(words[2:])
            if words[1] == "tools.speed_run":
                defaults.parser().parse_args(args.flags)
    assert "--steps" not in full[2] and slot.calls[2][-2:] == ["--steps", "20"]
    evaluated = [call[call.index("--images") + 1] for call in full if "tools.evaluate" in call]
    assert evaluated == ["10000"] * 6
    assert [call for call in full if "models.py:DiT" in call] == full[-1:]
    assert "-x" not in full[0] and "tests/test_gpu.py" in full[0]


def test_training_that_runs_out_of_time_is_resumed_by_the_next_call(slot):
    (slot.here / "train_mnist.py").write_text("20")
    text = slot(TRAINING_LIMIT=1)
    assert slot.status == 1 and text.rstrip().endswith("unfinished: training")
    assert parts(text) == PARTS                             # of the checkpoint at hand
    assert "--resume" not in slot.called("train_mnist.py")[0]
    (slot.here / "train_mnist.py").unlink()
    text = slot()
    assert slot.status == 0 and parts(text) == PARTS[2:-2]  # of the last checkpoint
    words = slot.called("train_mnist.py")[0]
    assert words[-1] == "--resume" and "--dataset" not in words
    assert words[words.index("--out") + 1] == str(slot.run)
    slot()
    assert slot.calls == []


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(slot):
    (slot.here / "pytest").write_text("0")
    (slot.here / "tools.evaluate").write_text("20")
    text = slot(EVALUATE_LIMIT=1, SCALES="1 3")
    assert "tests: status 1" in text and re.search(r"guidance-3: status 124 after \d+ s", text)
    assert slot.status == 1 and "unfinished: tests guidance-1 guidance-3 classifier" in text
    assert "benchmark: status 0" in text
    (slot.here / "pytest").unlink()
    (slot.here / "tools.evaluate").unlink()
    assert parts(slot(SCALES="1 3")) == ["tests", "guidance-1", "guidance-3", "classifier"]


def test_no_part_begins_after_the_slot(slot):
    (slot.here / "pytest").write_text("20")
    text = slot(SLOT=2)
    assert parts(text)[0] == "tests" and "tests: at most" in text
    assert slot.status == 1 and "benchmark: no time left" in text
    (slot.here / "pytest").unlink()
    assert parts(slot())[-1] == "benchmark"


def test_a_file_of_16_MB_is_not_kept(slot):
    text = slot(SIZE=16_000_000)
    assert "not kept, 16 MB or more" in text
    assert not {"mnist-cpu.pt", "samples.gif"} & {p.name for p in slot.out.iterdir()}


def test_the_data_may_be_unpacked_as_torchvision_has_it(slot):
    raw = slot.data / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (slot.data / f"{name}.gz").rename(raw / f"{name}.gz")
    (raw / NAMES[0]).write_text("unpacked")
    assert slot() and slot.status == 0
    found = slot.here / "runs/gpu.data"
    assert (found / "MNIST/raw" / NAMES[0]).read_text() == "unpacked"
    assert (found / "MNIST/raw" / NAMES[3]).read_text() == NAMES[3]
    words = slot.called("train_mnist.py")[0]
    assert words[words.index("--data-dir") + 1] == str(found)


def test_missing_data_is_an_error_unless_the_digits_are_drawn(slot):
    (slot.data / f"{NAMES[1]}.gz").unlink()
    text = slot()
    assert slot.status == 1 and slot.calls == [] and f"{NAMES[1]} nor" in text
    slot(DATASET="glyphs")
    assert slot.status == 0 and "glyphs" in slot.called("train_mnist.py")[0]
    assert (slot.out / "glyphs-cpu.pt").exists()


@pytest.mark.long
def test_the_dry_run_on_the_cpu(slot):
    """Everything, on drawn digits: minutes: it trains a ruler."""
    options = dict(PYTHON=sys.executable, DATASET="glyphs", STEPS=20, SCALES="1.5",
                   TESTS="tests/test_gpu.py", EVALUATE_LIMIT=500, CLASSIFIER_LIMIT=500,
                   SLOT=3000)
    text = slot(**options, TRAINING_LIMIT=600)
    assert slot.status == 0, text
    files = {p.name: p.stat().st_size for p in slot.out.iterdir()}
    assert len(files) == 8 and max(files.values()) < 16e6 and min(files.values()) > 0
    assert len(read_metrics(slot.out / "metrics.jsonl")) == 20
    assert checkpoints.load(slot.out / "glyphs-cpu.pt")["step"] == 20
    assert json.loads((slot.out / "evaluations.jsonl").read_text())
    assert json.loads((slot.out / "benchmark.json").read_text())["first_step"]["seconds"] > 0
    assert "aten::" in (slot.out / "profile.txt").read_text()


def test_no_option_is_untested():
    source = Path(__file__).read_text()
    script = (ROOT / "tools" / "gpu.sh").read_text()
    for name in ("DEVICE", "PYTHON", "DATASET", "RUN", "SLOT", "TESTS", "SCALES", "AGAINST",
                 "STEPS"):
        assert f"${{{name}:" in script and name in source
