"""support/checkpoint.py: files complete or absent, and read as untrusted input.

    python -m pytest tests/test_checkpoint.py --long -s -k files      2,000 damaged files, tallied
"""

import os
import pickle
import random
import time
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch

import sample
import train_mnist
from conftest import refused, tensors_equal
from dit import DiT
from support import checkpoint as checkpoints, registry
from support.command import SHIPPED, UserError, printable, run_command
from support.muon import BatchedMuon

MODEL = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2,
             num_classes=3)


def refusal(call, *args, **options) -> str:
    """The one line of a call that must be refused, as a user sees it."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    line = printable(caught.value)
    assert caught.value.status == 2 and line and len(line) < 1000, line
    return line


def optimizers_of(model: DiT) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "blocks" in n)]
    return [torch.optim.AdamW(rest, lr=1e-3), BatchedMuon(matrices, lr=0.02)]


def some_state(seed: int = 0) -> dict:
    """A full checkpoint's content, after one step of a small model."""
    torch.manual_seed(seed)
    net, ema = DiT(**MODEL), DiT(**MODEL)
    optimizers = optimizers_of(net)
    sum((p * torch.randn_like(p)).sum() for p in net.parameters()).backward()
    for opt in optimizers:
        opt.step()
    config = dict(
        network="dit", model=dict(MODEL), process="ddpm", diffusion=dict(prediction="v"),
        data=dict(dataset="some", digest="0123"), recipe=dict(lr=1e-3, seed=0),
        sampling=dict(sampler="ddim", steps=5, eta=0.0, cfg_scale=2.0))
    return dict(format=checkpoints.FORMAT, step=1, config=config, class_names=["a", "b", "c"],
                ema=ema.state_dict(), model=net.state_dict(),
                opt={i: o.state_dict() for i, o in enumerate(optimizers)})


@pytest.fixture
def path(tmp_path) -> Path:
    checkpoints.save(tmp_path / "step_0000001.pt", some_state())
    return tmp_path / "step_0000001.pt"


# ---------------------------------------------------------------- writing


def test_what_was_saved_is_loaded_and_built(path):
    state = checkpoints.load(path, full=True)
    assert tensors_equal(state, some_state()) and os.listdir(path.parent) == [path.name]
    for weights in ("ema", "model"):
        model, diffusion = checkpoints.build(state, weights)
        assert tensors_equal(dict(model.state_dict()), dict(state[weights]))
        assert not model.training and diffusion.prediction == "v"
    for key in ("model", "opt"):
        del state[key]
    state["ema"] = {name: w.half() for name, w in state["ema"].items()}
    checkpoints.save(path, state)                       # as a shared checkpoint
    model, _ = checkpoints.build(checkpoints.load(path))
    assert all(w.dtype == torch.float32 and torch.equal(w, state["ema"][name].float())
               for name, w in model.state_dict().items())
    assert "no 'model' weights" in refusal(checkpoints.build, state, "model")
    assert "EMA weights alone: --init-from" in refusal(checkpoints.load, path, full=True)


# ---------------------------------------------------------------- damaged by accident


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes as an accident leaves them. Half of the flips are in what describes the records."""
    at, size = rng.randrange(len(content)), rng.choice([1, 2, 16, 512, 5000])
    if rng.random() < 0.3:
        at = len(content) - 1 - rng.randrange(len(content) // 25)

    def flipped() -> bytes:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]

    return rng.choice([
        flipped, flipped, flipped,
        lambda: content[:at],                                                       # truncated
        lambda: content[:at] + rng.randbytes(size) + content[at + size:],           # overwritten
        lambda: content[:at] + bytes(size) + content[at + size:],                   # a bad sector
        lambda: content[:at] + content[at + size:],                                 # left out
        lambda: content[:at] + content[at : at + size] + content[at:],              # doubled
        lambda: content[at:],                                                       # its end alone
        lambda: content + rng.randbytes(size),                                      # and more
        lambda: content[at:] + content[:at],
    ])()


def fuzz(path: Path, numbers: range) -> Counter:
    """What became of each damaged file; any exception but UserError fails the test."""
    whole, expected, tally = path.read_bytes(), checkpoints.load(path, full=True), Counter()
    for i in numbers:
        path.write_bytes(damaged(whole, random.Random(f"fuzz {i}")))
        begun = time.process_time()
        try:
            found = checkpoints.load(path, full=True)
        except UserError as error:
            assert caught_in_a_line(error), i
            tally["refused"] += 1
        else:
            assert tensors_equal(found, expected), f"file {i}: damage went unnoticed"
            tally["equal"] += 1
        assert time.process_time() - begun < 10, f"file {i} took long"
    print(f"\n{len(numbers):,} damaged files: {dict(tally)}")
    return tally


def caught_in_a_line(error: UserError) -> bool:
    return error.status == 2 and "\n" not in str(error) and 20 < len(str(error)) < 1000


def test_300_damaged_files(path):
    tally = fuzz(path, range(300))
    assert tally["refused"] > 200 and tally["equal"] > 0, tally     # trailing bytes do not matter


@pytest.mark.long
def test_2000_damaged_files(path):
    fuzz(path, range(2000))


def test_a_record_marked_as_a_folder_is_refused(tmp_path):
    """torch.load skips such a record and hands out uninitialised memory."""
    content = bytearray(SHIPPED.read_bytes())
    with zipfile.ZipFile(SHIPPED) as archive:
        at, entries = archive.start_dir, archive.infolist()
    for entry in entries:
        assert content[at : at + 4] == b"PK\1\2"
        if entry.file_size > 10_000:
            content[at + 38] |= 0x10                    # the lowest byte of the attributes
            break
        at += 46 + sum(int.from_bytes(content[at + k : at + k + 2], "little") for k in (28, 30, 32))
    bad = tmp_path / "mnist.pt"
    bad.write_bytes(content)
    with zipfile.ZipFile(bad) as archive:
        assert archive.getinfo(entry.filename).external_attr & 0x10
    assert "marked as a folder" in refused(sample.main, bad, "--out", tmp_path / "a.png")


def rewritten(path: Path, change: dict, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other records: {name without the top folder: bytes, or None: left out}."""
    with zipfile.ZipFile(path) as archive:
        records = {e.filename: archive.read(e) for e in archive.infolist()}
    top = next(iter(records)).split("/")[0]
    records |= {f"{top}/{name}": content for name, content in change.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            if content is not None:
                archive.writestr(name, content)
    return path


# ---------------------------------------------------------------- forged


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not(path, tmp_path):
    trap, state = Trap(tmp_path / "trapped"), some_state()
    for content in (trap, {**state, "step": trap}, {**state, "ema": {"x": trap}}):
        torch.save(content, path)
        for read in (checkpoints.load, checkpoints.read_archive):
            assert "damaged or not a checkpoint" in refusal(read, path)
        assert path.name in refused(sample.main, path)
    path.write_bytes(pickle.dumps(trap))                                # a bare pickle
    refusal(checkpoints.load, path)
    torch.save(trap, path, _use_new_zipfile_serialization=False)        # torch's old format
    refusal(checkpoints.load, path)
    assert not Path(trap.folder).exists()
    torch.save(trap, path)
    torch.load(path, weights_only=False)
    assert Path(trap.folder).exists(), "the trap would not have gone off"


def test_archives_that_claim_more_than_they_hold_are_refused(path):
    bomb = rewritten(path, {"data/bomb": bytes(30_000_000)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1e6 and "more than it holds" in refusal(checkpoints.load, bomb)
    for missing in ("data.pkl", "data/0"):
        checkpoints.save(path, some_state())
        refusal(checkpoints.load, rewritten(path, {missing: None}))


def put(state: dict, where: str, value) -> dict:
    *folders, last = where.split("/")
    holder = state
    for key in folders:
        holder = holder[key]
    if value is KeyError:
        del holder[last]
    else:
        holder[last] = value
    return state


NAN, W = float("nan"), "blocks.0.mlp.fc1.bias"
WRONG = [(where, value) for where, values in {
    "step": [-1, 1.0, "1", None], "class_names": [["a", "b"], ["a", "b", 3], "abcd"],
    "config": [[], None], "config/model/hidden_size": [32, 2**19, "16"],
    "config/model/depth": [1, 3, 2**19], "config/model/num_classes": [2, 2**19],
    "config/model/input_size": [0, 16, 2**40], "config/model/num_heads": [0, 3],
    "config/model/surprise": [1], "config/model/mlp_ratio": [NAN, 2.0, 999.0],
    "config/diffusion/num_timesteps": [0, 10**9], "config/diffusion/prediction": ["eps2", None],
    "config/diffusion/beta_start": [0.0, 1.0, NAN], "config/sampling/steps": [0, 1001, None],
    "config/sampling/eta": [-1, 2, NAN, "0"], "config/sampling/cfg_scale": [NAN, 1e9, None],
    "config/recipe": [None, 5], "ema": [None, {}, [], {"x": torch.zeros(1)}],
    f"ema/{W}": [None, torch.zeros(63), torch.full((64,), NAN),
                 torch.zeros(64, dtype=torch.int64), torch.zeros(64, 1)],
    f"model/{W}": [torch.zeros(63), torch.full((64,), float("inf"))],
    "ema/blocks.7.x": [torch.zeros(1)],
}.items() for value in [*values, KeyError] if value is not KeyError or where.count("/") < 2
    and "surprise" not in where and "blocks.7" not in where]


@pytest.mark.parametrize("where, value", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_what_contradicts_itself_is_refused_before_it_takes_memory(path, where, value):
    checkpoints.save(path, put(some_state(), where, value))
    begun = time.process_time()
    line = refusal(checkpoints.load, path, full=True)
    assert path.name in line and ("damaged" in line or "holds" in line)
    assert time.process_time() - begun < 5


def test_files_that_are_no_checkpoints(tmp_path, path):
    assert "does not exist" in refusal(checkpoints.load, tmp_path / "none.pt")
    assert "is not a file" in refusal(checkpoints.load, tmp_path)
    (tmp_path / "a\x1b\n.pt").write_bytes(b"")
    assert "a\\x1b\\n.pt is damaged" in refusal(checkpoints.load, tmp_path / "a\x1b\n.pt")
    for content in ([1], {"x": 1}, torch.zeros(3), {"format": "dit-lesson/99"}, None,
                    {"args": Namespace(model="DiT-XL/2"), "ema": {}}):
        torch.save(content, path)
        assert "is not a checkpoint of this project" in refusal(checkpoints.load, path)
    for key in ("network", "process"):                  # of another version: not "damaged"
        checkpoints.save(path, put(some_state(), f"config/{key}", "of-tomorrow"))
        line = refusal(checkpoints.load, path)
        assert f"{key} 'of-tomorrow' is unknown here: d" in line and "damaged" not in line


def test_the_commands_end_in_one_line_and_write_nothing(path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 16
    path.write_bytes(flipped)
    torch.load(path, weights_only=True)                 # torch verifies no checksum
    for main, *flags in [(sample.main,), (train_mnist.main, "--out", "new", "--resume")]:
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: main([*flags, path.name, "--device", "cpu"]))       # noqa: B023
        out, said = capsys.readouterr()
        assert ended.value.code == 2 and said.count("\n") == 1 and "checksum" in said, said
        assert said.startswith("error: ") and path.name in said and "Traceback" not in out
    assert not [p for p in path.parent.rglob("*.pt") if p != path]


# ---------------------------------------------------------------- optimizers


def test_optimizers_are_restored_and_their_states_checked():
    saved = some_state()
    net, ema = DiT(**MODEL), DiT(**MODEL)
    optimizers = optimizers_of(net)
    saved["opt"][0]["param_groups"][0]["lr"] = "nonsense"               # not taken from the file
    checkpoints.restore(saved, net, ema, optimizers)
    for i, opt in enumerate(optimizers):
        assert tensors_equal(opt.state_dict(), some_state()["opt"][i])
    assert tensors_equal(dict(net.state_dict()), dict(saved["model"]))
    for i in (0, 1):
        for spoil in (lambda s: s.clear(), lambda s: s["state"].pop(0),
                      lambda s: s["state"].update({0: None}), lambda s: s["state"][0].popitem(),
                      lambda s: s["state"][0].update(more=1),
                      lambda s: s["state"][0].update({[*s["state"][0]][-1]: torch.zeros(3)}),
                      lambda s: next(reversed(s["state"][0].values())).fill_(NAN)):
            spoil((wrong := some_state())["opt"][i])
            assert "optimizer states do not fit" in refusal(
                checkpoints.restore, wrong, net, ema, optimizers_of(net))


# ---------------------------------------------------------------- an argument of one's own


class Gained(DiT):
    """A DiT to which someone added an argument."""

    def __init__(self, *, gain: float = 1.0, **sizes):
        super().__init__(**sizes)
        self.gain = gain

    def forward(self, xt, t, y):
        return self.gain * super().forward(xt, t, y) + xt


def test_an_added_argument_is_stored_and_takes_its_default_in_an_older_file(path, monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "gained", Gained)
    images = []
    for gain in (None, 1.0, 2.5):
        state = put(some_state(), "config/network", "gained")
        state["ema"]["final_layer.linear.bias"] += 0.1
        if gain:
            state["config"]["model"]["gain"] = gain
        checkpoints.save(path, state)
        found = sample.load(path)
        assert type(found.model) is Gained and found.model.gain == (gain or 1.0)
        assert found.diffusion.weighting == "plain"         # an option that the file lacks
        images.append(sample.generate(found, ["a"]))
    assert torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


# ---------------------------------------------------------------- run folders


def test_checkpoints_are_found_by_step_and_the_newest_run_by_time(here, capsys):
    assert checkpoints.newest_run() is None
    assert checkpoints.find_checkpoint(None) == SHIPPED
    assert "the checkpoint that ships" in capsys.readouterr().out
    for name, steps, age in [("001-a", (2, 10), 10), ("002-b", (0, 9, 10**7), 5),
                             ("003-c", (0,), 1)]:
        (here / "output" / name).mkdir(parents=True)
        for i, step in enumerate(steps):            # `cp -r` may give the first the latest time
            file = here / "output" / name / f"step_{step:07d}.pt"
            file.touch()
            os.utime(file, (1e9 - age - i / 10,) * 2)
    (here / "output/002-b/step_x.pt").touch()
    (here / "output/002-b/step_0000099.pt.damaged").touch()
    (here / "output/004-empty").mkdir()
    assert checkpoints.newest_run().name == "003-c"
    assert checkpoints.newest_run(trained=True).name == "002-b"
    assert checkpoints.find_checkpoint(None).name == "step_10000000.pt"
    assert checkpoints.find_checkpoint("output/001-a") == Path("output/001-a/step_0000010.pt")
    assert checkpoints.find_checkpoint("x.pt") == Path("x.pt")
    assert "holds no checkpoint" in refusal(checkpoints.find_checkpoint, "output/004-empty")
    assert checkpoints.new_folder("a b/c").name == "005-a-b-c"


def test_metrics_are_read_without_lines_that_a_kill_truncated(tmp_path):
    assert checkpoints.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.5}\n\n{"step": 2, "lo\n[1]\n{"loss": 1}\n\xff\n{"step": 3}\n{"st')
    assert checkpoints.read_metrics(tmp_path) == [dict(step=1, loss=2.5), dict(step=3)]
