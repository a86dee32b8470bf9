"""support/checkpoints.py: files complete or absent, and read as untrusted input."""

import argparse
import os
import pickle
import re
import subprocess
import sys
import time
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import sample
import train_mnist
from conftest import ROOT, load, tensors_equal
from dit import DiT
from support import checkpoints, components, paths
from support.cli import UserError, escape
from support.folders import keep_last
from support.muon import BatchedMuon

MODEL = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2,
             num_classes=3)


def refused(call, *args, **options) -> str:
    """The error line of a call that must be refused, as it is printed, without the test's own
    folder, whose name could contain the word that is looked for."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    line = escape(str(caught.value))
    assert len(line) < 1000, line
    return re.sub(r"\S*/test_[^/\s]*/", "", line)


def optimizers_of(model: DiT) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "blocks" in n)]
    return [torch.optim.AdamW(rest, lr=1e-3), BatchedMuon(matrices, lr=0.02)]


def some_state(seed: int = 0, model: dict = MODEL) -> dict:
    """A full checkpoint's content, after one step of a small model."""
    torch.manual_seed(seed)
    net, ema = DiT(**model), DiT(**model)
    optimizers = optimizers_of(net)
    sum((p * torch.randn_like(p)).sum() for p in net.parameters()).backward()
    for opt in optimizers:
        opt.step()
    config = dict(
        network="dit", model=components.arguments_for(DiT, model), process="ddpm",
        diffusion=dict(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, prediction="v",
                       weighting="plain"),
        data=dict(dataset="some", digest="0123"), recipe=dict(lr=1e-3, seed=0),
        sampling=dict(sampler="ddim", steps=5, eta=0.0, cfg_scale=2.0))
    return dict(step=1, config=config, class_names=[str(i) for i in range(model["num_classes"])],
                ema=ema.state_dict(), model=net.state_dict(), scaler={},
                opt={i: o.state_dict() for i, o in enumerate(optimizers)})


@pytest.fixture
def path(tmp_path):
    checkpoints.save(tmp_path / "step_0000001.pt", some_state())
    return tmp_path / "step_0000001.pt"


def same(a, b) -> bool:
    """Equal in value and type, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------- writing


def test_what_was_saved_is_loaded(path):
    state = checkpoints.load(path, full=True)
    assert state.pop("format") == checkpoints.FORMAT and same(state, some_state())
    assert os.listdir(path.parent) == [path.name]


IN_A_PROCESS = """
import sys, resource, signal, os
import torch
from pathlib import Path
from support import checkpoints
from test_checkpoints import some_state
path = Path({path!r})
"""


def in_a_process(path: Path, code: str, **options) -> subprocess.Popen:
    code = IN_A_PROCESS.format(path=str(path)) + code
    found = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **found}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_a_full_disk_leaves_the_old_checkpoint(path):
    """No file may grow beyond 20 kB, as on a full disk: OSError, and nothing is left behind."""
    before = path.read_bytes()
    assert len(before) > 30_000
    done = in_a_process(path, """
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for _ in range(3):
    try:
        checkpoints.save(path, some_state(seed=1))
    except OSError as error:
        print("OSError", str(error.strerror or error))
print("alive")
""")
    out = done.communicate(timeout=100)[0]
    assert done.returncode == 0 and out.count("OSError") == 3 and "alive" in out, out
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_folder_that_cannot_be_written(path, tmp_path):
    with pytest.raises(OSError):
        checkpoints.save(path / "x.pt", some_state())           # a file in the folder's place
    with pytest.raises(OSError):
        checkpoints.save(tmp_path / ("x" * 300), some_state())
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
def test_a_kill_while_saving_leaves_a_whole_checkpoint(path):
    """A process that saves two checkpoints in turn without end, killed at 12 moments: the file is
    always one of the two."""
    done = in_a_process(path, """
import time
from test_checkpoints import same
states = [some_state(), some_state(seed=1)]
for i in range(12):
    child = os.fork()
    while child == 0:
        for state in states:
            checkpoints.save(path, state)
    time.sleep(0.02 + 0.0071 * i)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoints.load(path, full=True)
    del found["format"]
    print("whole" if any(same(found, state) for state in states) else "BROKEN")
""")
    out = done.communicate(timeout=100)[0]
    assert done.returncode == 0 and out.split() == ["whole"] * 12, out


def test_keep_last(tmp_path, monkeypatch):
    for step in (0, 5, 10, 9_999_999):
        (tmp_path / f"step_{step:07d}.pt").write_text("")
    for other in ("step_x.pt", "step_0000001.pt.damaged", "mnist.pt"):
        (tmp_path / other).write_text("")
    keep_last(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("step_0*.pt")) == ["step_0000010.pt"]
    assert (tmp_path / "step_9999999.pt").exists() and len(list(tmp_path.iterdir())) == 5

    def denied(self):
        raise PermissionError(13, "no")
    monkeypatch.setattr(Path, "unlink", denied)
    keep_last(tmp_path, 1)              # what cannot be deleted stays, without a word


def test_a_shared_checkpoint_holds_ema_alone_in_half_precision(path):
    state = checkpoints.load(path, full=True)
    small = checkpoints.shared(state)
    assert set(small) == {"step", "config", "class_names", "ema"}
    state["config"]["recipe"].update(data_dir="/home/me/secret", dataset="folder:/home/me/secret")
    assert "secret" not in str(checkpoints.shared(state)["config"])
    assert all(w.dtype == torch.float16 for w in small["ema"].values())
    checkpoints.save(path, small)
    model, _ = checkpoints.build(checkpoints.load(path))
    whole, _ = checkpoints.build(state)
    for name, w in model.state_dict().items():
        assert w.dtype == torch.float32
        assert torch.equal(w, whole.state_dict()[name].half().float())
    xt = torch.randn(2, 1, 8, 8)
    t, y = torch.tensor([3, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.allclose(model(xt, t, y), whole(xt, t, y), atol=1e-2)
    assert "'model'" in refused(checkpoints.build, checkpoints.load(path), "model")
    assert "--init-from" in refused(checkpoints.load, path, full=True)
    state["ema"]["pos_embed"] *= 1e6
    assert "pos_embed" in refused(checkpoints.shared, state)


def test_build_takes_the_weights_that_are_named(path):
    state = checkpoints.load(path)
    for weights in ("ema", "model"):
        model, diffusion = checkpoints.build(state, weights)
        assert same(model.state_dict(), OrderedDict(state[weights])) and not model.training
    assert diffusion.prediction == "v" and diffusion.num_timesteps == 1000


# ---------------------------------------------------------------- files from strangers


def rewritten(path: Path, change: dict, drop: str = "") -> Path:
    """Give the archive's records new content: {name without the top folder: bytes}."""
    with zipfile.ZipFile(path) as archive:
        records = {e.filename: archive.read(e) for e in archive.infolist()}
    top = next(iter(records)).split("/")[0]
    records = {n: change.pop(n.partition("/")[2], b) for n, b in records.items()}
    records.update({f"{top}/{n}": b for n, b in change.items()})
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if not drop or not name.endswith(drop):
                archive.writestr(name, content)
    return path


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not(path, tmp_path):
    trap = tmp_path / "trapped"
    for content in (Trap(trap), {"ema": {"x": Trap(trap)}}, {**some_state(), "extra": Trap(trap)}):
        torch.save(content, path)
        for read in (checkpoints.read_archive, checkpoints.load, checkpoints.read_any):
            line = refused(read, path)
            assert "mkdir" in line and "could run code" in line
    path.write_bytes(pickle.dumps(Trap(trap)))                  # a bare pickle
    assert "not a zip archive" in refused(checkpoints.load, path)
    torch.save(Trap(trap), path, _use_new_zipfile_serialization=False)
    assert "not a zip archive" in refused(checkpoints.load, path)
    assert not trap.exists()
    torch.save(Trap(trap), path)
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap would not have gone off"


@pytest.mark.parametrize("code", [
    b"cos\nsystem\n(S'touch trapped'\ntR.", b"c__builtin__\neval\n(S'1/0'\ntR.",
    b"(S'touch trapped'\nios\nsystem\n.", b"(cos\nsystem\nS'touch trapped'\no.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0dtouch trapped\x85R.",
    b"ctorch\nTensor\n(J\xff\xff\xff\x0ftR.", b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n.", b"cfunctools\npartial\n.",
])
def test_globals_that_weights_do_not_need_are_refused(path, tmp_path, monkeypatch, code):
    """Also those that torch's own reader allows, which can claim memory without a record."""
    monkeypatch.chdir(tmp_path)
    line = refused(checkpoints.read_archive, rewritten(path, {"data.pkl": code}))
    assert "could run code" in line and not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("code", [
    b"r\xff\xff\xff\xff.", b"]r\xff\xff\xff\xff.", b"]p4294967295\n.",           # a memo of 2^32
    b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", b"\x8e" + b"\xff" * 7 + b"\x7f.",    # 2^63 bytes
    b"B\xff\xff\xff\xff.", b"(" * 100_000 + b".", b"", b".", b"\xff" * 50, b"0.", b"]" * 9 + b"b.",
    b"P1\n.", b"I1\nQ.", b"((((tttt.", b"\x82\x01.", b"].", b"K\x01.", b"}\x94h\x00s.", b"Nb.",
])
def test_pickles_that_make_no_sense_are_refused(path, code):
    line = refused(checkpoints.load, rewritten(path, {"data.pkl": code}))
    assert "damaged" in line or "refused" in line or "not a checkpoint" in line
    assert ("malformed" in line) == (code[:2] in (b"r\xff", b"]r", b"]p")), line


def edited(path: Path, old: bytes, new: bytes) -> Path:
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        content = archive.read(name)
    assert old in content
    return rewritten(path, {"data.pkl": content.replace(old, new, 1)})


def test_tensors_that_claim_more_than_their_record_are_refused(path):
    """numel of a storage; shape of a tensor; strides of 0, which expand one number to a terabyte;
    strides and offsets that leave the record."""
    number = lambda n: b"M" + n.to_bytes(2, "little")
    large = b"J" + (2**31 - 1).to_bytes(4, "little")
    four = b"K\x00" + number(1000) + b"\x85q\x08K\x01\x85"        # offset, shape, strides
    for old, new in [
        (number(1000) + b"tq\x07Q", large + b"tq\x07Q"),
        (number(1000) + b"tq\x07Q", b"K\x0atq\x07Q"),
        (four, b"K\x00" + large + b"\x85q\x08K\x00\x85"),
        (four, b"K\x00" + number(1000) + b"\x85q\x08K\x02\x85"),
        (four, b"K\x01" + number(1000) + b"\x85q\x08K\x01\x85"),
        (four, b"J\xff\xff\xff\xff" + number(1000) + b"\x85q\x08K\x01\x85"),
        (four, b"K\x00J\xff\xff\xff\xff\x85q\x08K\x01\x85"),
        (four, b"K\x00" + number(1000) + b"\x85q\x08J\xff\xff\xff\xff\x85"),
        (four, b"K\x00" + large * 1 + large + b"\x86q\x08K\x00K\x00\x86"),
    ]:
        torch.save({"w": torch.arange(1000.0)}, path)
        line = refused(checkpoints.read_archive, edited(path, old, new))
        assert "claim" in line, line


def test_one_record_under_many_names_does_not_multiply(path):
    """A small file may not describe a large model by naming the same numbers again and again."""
    state = some_state()
    torch.save({"a": [torch.zeros(999).view(9, 111).T for _ in range(3)]}, path)
    checkpoints.read_archive(path)
    torch.save([torch.zeros(()).expand(5), torch.zeros(999)], path)     # cannot be written in place
    assert "claims a tensor" in refused(checkpoints.read_archive, path)
    shared = torch.zeros(5000)
    torch.save([shared[:] for _ in range(50)], path)
    assert "claims a tensor" in refused(checkpoints.read_archive, path)
    zeros = {n: w.clone() for n, w in state["ema"].items()}
    zeros["blocks.1.attn.qkv.bias"] = zeros["blocks.0.attn.qkv.bias"]       # the same object
    checkpoints.save(path, {**state, "ema": zeros})
    assert "share their storage" in refused(checkpoints.load, path)


def test_a_config_that_claims_a_terabyte_is_refused_before_it_is_built(path):
    for change in (dict(hidden_size=2**19, num_heads=1), dict(num_classes=2**19), dict(depth=2**19),
                   dict(input_size=2**19), dict(mlp_ratio=999.0), dict(in_channels=2**19),
                   dict(patch_size=1)):
        state = some_state()
        state["config"]["model"].update(change)
        state["class_names"] = ["x"] * state["config"]["model"]["num_classes"]
        checkpoints.save(path, state)
        begun = time.process_time()
        refused(checkpoints.load, path)
        assert time.process_time() - begun < 5


def test_zip_bombs_and_doubled_records_are_refused(path):
    with zipfile.ZipFile(path) as archive:
        records = {e.filename: archive.read(e) for e in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**records, "x/data/bomb": bytes(30_000_000)}.items():
            archive.writestr(name, content)
    assert "more than it holds" in refused(checkpoints.load, path)
    for twin in ("archive/data/0", "archive/DATA.PKL", "archive/data.pkl"):
        checkpoints.save(path, some_state())
        with zipfile.ZipFile(path, "a") as archive:
            top = archive.namelist()[0].split("/")[0]
            with pytest.warns(UserWarning) if twin.islower() else pytest.MonkeyPatch.context():
                archive.writestr(twin.replace("archive", top), b"?")
        assert "share a name" in refused(checkpoints.load, path)
    checkpoints.save(path, some_state())
    assert "data.pkl" in refused(checkpoints.load, rewritten(path, {}, drop="data.pkl"))
    checkpoints.save(path, some_state())
    assert "data/0" in refused(checkpoints.load, rewritten(path, {}, drop="data/0"))


def test_a_flipped_byte_in_a_weight_is_named(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    content[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)                         # torch says nothing
    line = refused(checkpoints.load, path)
    assert "damaged" in line and entry.filename in line


def test_files_that_are_no_checkpoints(tmp_path, path):
    assert "does not exist" in refused(checkpoints.load, tmp_path / "none.pt")
    assert "is not a file" in refused(checkpoints.load, tmp_path)
    (tmp_path / "se\x1bcond\n.pt").write_bytes(b"")
    assert "se\\x1bcond\\n.pt" in refused(checkpoints.load, tmp_path / "se\x1bcond\n.pt")
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(checkpoints.load, tmp_path / "pipe")
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in refused(checkpoints.load, path)
    for content in ([1, 2], {"x": 1}, torch.zeros(3), {"format": torch.zeros(2)}, None, "text"):
        torch.save(content, path)
        assert "not a checkpoint of this project" in refused(checkpoints.load, path)
    torch.save({"format": "dit-lesson/99\x1b"}, path)
    assert "format dit-lesson/99\\x1b" in refused(checkpoints.load, path)


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


FIELDS = [
    ("step", [-1, 1.0, "1", True, None, torch.tensor(1), 2**60]),
    ("config", [[], None, "x"]),
    ("class_names", [[], None, ["a", "b"], ["a", "b", 3], "abc", {"a": 1}]),
    ("config/model", [[], {}, None]),
    ("config/model/input_size", [0, -8, 8.0, "8", True, 9, 2**40, 12]),
    ("config/model/num_heads", [0, 3, None]), ("config/model/depth", [1, 3]),
    ("config/model/surprise", [1]),
    ("config/model/mlp_ratio", [float("nan"), -1, 0, 2, "4", 2**2000]),
    ("config/model/learn_sigma", [True, 1, None]),
    ("config/diffusion/num_timesteps", [0, 10**9, 1e3]),
    ("config/diffusion/beta_start", [0.0, 1.0, float("nan"), float("inf"), 1, "x"]),
    ("config/diffusion/surprise", [1]),
    ("config/diffusion/prediction", ["eps2", 3, None, ["v"]]),
    ("config/diffusion/weighting", ["none", 1]),
    ("config/network", ["dit2", 3, None, ["dit"], "dit:DiT", "os:system"]),
    ("config/process", ["ddpm2", 3, None]),
    ("config/data", [None, [], {"a": torch.zeros(2)}, {1: 2}, {"a": Namespace(b=1)}]),
    ("config/recipe", [None, 5, {"a": {"b": {"c": {"d": {"e": {}}}}}}]),
    ("config/sampling/sampler", ["euler", None, 1]),
    ("config/sampling/steps", [0, 1001, 5.0, None]),
    ("config/sampling/eta", [-1, 2, float("nan"), float("inf"), "0", True, 2**2000]),
    ("config/sampling/cfg_scale", [float("nan"), 1e9, "2", None, -(2**2000)]),
    ("ema", [None, {}, [], {"x": torch.zeros(1)}, {"blocks.": torch.zeros(1)}]),
    ("ema/pos_embed", [None, "x", torch.zeros(1, 4, 15), torch.zeros(1, 4, 16, dtype=torch.int64),
                       torch.full((1, 4, 16), float("nan"))]),
    ("model/blocks.0.mlp.fc1.bias", [torch.full((64,), float("inf")), torch.zeros(63)]),
    ("ema/surprise", [torch.zeros(1)]), ("ema/blocks.7.surprise", [torch.zeros(1)]),
    ("opt", [None, []]),
    ("scaler", [None, {"scale": "x"}, {"scale": float("nan")}, {3: "x"}, {"scale": 1.0}]),
]
OPTIONAL = ("surprise", "mlp_ratio", "learn_sigma", "network", "process", "depth", "num_heads",
            "num_timesteps", "beta_start", "prediction", "weighting")
CASES = [(where, value) for where, values in FIELDS for value in [*values, KeyError]
         if value is not KeyError or not where.endswith(OPTIONAL)]


@pytest.mark.parametrize("where,value", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_field_is_checked(tmp_path, where, value):
    """Each wrong or missing value is named, or the weights that it contradicts."""
    checkpoints.save(tmp_path / "x.pt", put(some_state(), where, value))
    said = refused(checkpoints.load, tmp_path / "x.pt", full=True).partition(": ")[2]
    parts = ("config", "class_names", "ema", "model", where.split("/")[-1])
    assert said and any(part in said for part in parts), said


def test_a_config_that_contains_itself_is_refused(path):
    state = some_state()
    state["config"]["recipe"]["again"] = state["config"]["recipe"]
    checkpoints.save(path, state)
    assert "plain values" in refused(checkpoints.load, path)


def test_a_torchscript_archive_is_refused_without_a_warning(path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        refused(checkpoints.load, rewritten(path, {"constants.pkl": b"\x80\x02]."}))
    assert not seen


# ---------------------------------------------------------------- optimizers


def test_optimizers_are_restored(path):
    state, saved = checkpoints.load(path, full=True), some_state()
    torch.manual_seed(5)
    optimizers = optimizers_of(DiT(**MODEL))
    for i, opt in enumerate(optimizers):
        state["opt"][i]["param_groups"][0]["lr"] = "nonsense"           # not taken from the file
        checkpoints.restore_optimizer(opt, state["opt"][i])
        assert same(opt.state_dict(), saved["opt"][i])
    fresh = optimizers_of(DiT(**MODEL))[0]
    checkpoints.restore_optimizer(fresh, fresh.state_dict())            # of step 0: nothing yet
    assert not fresh.state


@pytest.mark.parametrize("spoil", [
    lambda s: s.clear(), lambda s: s.update(state=[]), lambda s: s["state"].pop(0),
    lambda s: s["state"].update({99: {}}), lambda s: s["state"].update({0: None}),
    lambda s: s["state"][0].popitem(), lambda s: s["state"][0].update(more=1),
    lambda s: s["state"][0].update({next(iter(s["state"][0])): 5}),
    lambda s: s["state"][0].update({list(s["state"][0])[-1]: torch.zeros(3)}),
    lambda s: s["state"][0].update({list(s["state"][0])[-1]: torch.tensor(float("nan"))}),
    lambda s: next(iter(reversed(s["state"][0].values()))).fill_(float("inf")),
    lambda s: next(iter(reversed(s["state"][0].values()))).neg_().sub_(1e-3).fill_(float("-inf")),
])
@pytest.mark.parametrize("i", [0, 1])
def test_an_optimizers_state_is_checked(i, spoil):
    saved, opt = some_state()["opt"][i], optimizers_of(DiT(**MODEL))[i]
    spoil(saved)
    assert "opt" in refused(checkpoints.restore_optimizer, opt, saved)
    assert not opt.state


# ---------------------------------------------------------------- other people's weights


def published(model: DiT) -> dict:
    """The layout of a training checkpoint of the published code."""
    weights = model.state_dict()
    return dict(model=weights, ema=OrderedDict((n, w + 1) for n, w in weights.items()),
                opt=torch.optim.AdamW(model.parameters()).state_dict(),
                args=argparse.Namespace(model="DiT-XL/2", image_size=256, vae="ema", epochs=1400))


def test_a_published_training_checkpoint_is_read_and_its_ema_taken(path):
    model = DiT(**MODEL)
    torch.save(published(model), path)
    content = checkpoints.read_any(path)
    assert content["args"].model == "DiT-XL/2"
    other = DiT(**MODEL)
    assert checkpoints.load_fitting(other, checkpoints.weights_in(content, path)) == []
    assert torch.equal(other.pos_embed, model.pos_embed + 1)
    assert "published" in refused(checkpoints.load, path)


def test_weights_in_finds_them_or_says_that_there_are_none(path):
    model = DiT(**MODEL)
    for content in (model.state_dict(), dict(model.named_parameters()), some_state()):
        torch.save(content, path)
        assert "final_layer.linear.weight" in checkpoints.weights_in(
            checkpoints.read_archive(path), path)
    for content in ({}, [], {"ema": {"a": 1}}, {"a": torch.zeros(1), "b": 2}, torch.zeros(2)):
        assert "holds no weights" in refused(checkpoints.weights_in, content, path)


def test_load_fitting_takes_what_fits_and_names_what_does_not():
    source, other = DiT(**MODEL), DiT(**{**MODEL, "num_classes": 5, "in_channels": 3})
    weights = {n: w + 1 for n, w in source.state_dict().items()}
    weights["blocks.0.mlp.fc1.bias"][3] = float("nan")
    weights["blocks.0.mlp.fc2.bias"] = torch.ones(16, dtype=torch.int64)
    weights["strange"] = weights.pop("t_embedder.mlp.0.bias")
    before = {n: w.clone() for n, w in other.state_dict().items()}
    said = checkpoints.load_fitting(other, {n: w.half() if w.is_floating_point() else w
                                            for n, w in weights.items()})
    assert said == [
        "blocks.0.mlp.fc1.bias: not finite numbers in the file",
        "blocks.0.mlp.fc2.bias: not finite numbers in the file",
        "final_layer.linear.bias: (16,) in the file, (48,) here",
        "final_layer.linear.weight: (16, 16) in the file, (48, 16) here",
        "strange: not in this model",
        "t_embedder.mlp.0.bias: not in the file",
        "x_embedder.proj.weight: (16, 1, 4, 4) in the file, (16, 3, 4, 4) here",
        "y_embedder.embedding_table.weight: (4, 16) in the file, (6, 16) here"]
    named = {line.split(":")[0] for line in said}
    for name, w in other.state_dict().items():
        wanted = before[name] if name in named else weights[name].half().float()
        assert torch.equal(w, wanted), name
    assert "not one tensor fits" in refused(checkpoints.load_fitting, other, {"a": torch.zeros(1)})


def test_init_from_checks_a_checkpoint_of_this_project(path):
    checkpoints.save(path, put(some_state(), "config/diffusion/prediction", "nonsense"))
    assert "prediction" in refused(checkpoints.read_any, path)


# ---------------------------------------------------------------- older checkpoints


OLDER_RECIPE = (
    "dataset", "data_dir", "image_size", "prediction", "optimizer", "lr", "muon_lr", "decay",
    "weight_decay", "clip", "label_dropout", "grad_accum", "precision", "compile", "seed", "keep",
    "model", "steps", "batch_size", "ema_decay", "warmup", "log_every", "preview_every",
    "save_every")
PLAIN = ("--prediction", "eps", "--timesteps", "uniform", "--weighting", "plain")


def as_older(path: Path) -> Path:
    """A checkpoint as the first version of dit-lesson/1 wrote it, in the place of this one."""
    state = torch.load(path, weights_only=True)
    config = state["config"]
    config["prediction"] = config["diffusion"].pop("prediction")
    config["diffusion"] = {k: config["diffusion"][k] for k in
                           ("num_timesteps", "beta_start", "beta_end")}
    config["model"] = {k: config["model"][k] for k in (
        "patch_size", "hidden_size", "depth", "num_heads", "input_size", "in_channels",
        "num_classes")}
    config["recipe"] = {k: config["recipe"][k] for k in OLDER_RECIPE}
    del config["network"], config["process"]
    torch.save(state, path)
    return path


def test_an_older_checkpoint_loads_samples_and_resumes(trained, train, capsys):
    """To the very weights that the uninterrupted run of today has."""
    older = as_older(trained("--steps", 6, "--save-every", 3, "--keep", 9, *PLAIN,
                             out="older").with_name("step_0000003.pt"))
    (older.parent / "step_0000006.pt").unlink()
    state = checkpoints.load(older, full=True)
    assert (state["config"]["network"], state["config"]["process"]) == ("dit", "ddpm")
    assert state["config"]["diffusion"]["prediction"] == "eps"
    assert state["config"]["diffusion"]["weighting"] == "plain"
    assert sample.main([str(older), "--steps", "2", "--out", "a.png"]) == 0
    assert sample.main([str(older), "--steps", "2", "--weights", "model", "--out", "b.png"]) == 0
    assert train("--resume", "--out", "older") == 0
    assert "at step 3" in capsys.readouterr().out
    whole = trained("--steps", 6, "--save-every", 3, "--keep", 9, *PLAIN, out="whole")
    resumed, whole = load(older.with_name("step_0000006.pt")), load(whole)
    for part in ("model", "ema", "opt", "step"):
        assert tensors_equal(resumed[part], whole[part]), part
    checkpoints.save(Path("shared.pt"), checkpoints.shared(checkpoints.load(older)))
    assert sample.main(["shared.pt", "--steps", "2", "--out", "c.png"]) == 0


def test_the_weights_of_an_older_checkpoint_start_a_new_run(here, train, capsys):
    """assets/mnist.pt is one of the first format: what it lacks takes its default."""
    shipped = checkpoints.load(paths.SHIPPED)
    flags = ["--dataset", "glyphs", "--steps", "1", "--batch-size", "2", "--out", "run"]
    assert train_mnist.main([*flags, "--init-from", str(paths.SHIPPED)]) == 0
    assert "(none: all fit)" in capsys.readouterr().out
    config = load("run/step_0000001.pt")["config"]
    assert config["model"] == shipped["config"]["model"]
    assert config["diffusion"]["prediction"] == shipped["config"]["diffusion"]["prediction"]


def test_a_checkpoint_of_another_versions_network_is_named(path):
    """Not called damaged: resuming would otherwise put it aside."""
    for key, kind in [("network", "network"), ("process", "process")]:
        checkpoints.save(path, put(some_state(), f"config/{key}", "of-tomorrow"))
        line = refused(checkpoints.load, path)
        assert f"{path.name}: {kind} 'of-tomorrow' is unknown" in line
        with pytest.raises(UserError) as caught:
            checkpoints.load(path)
        assert not isinstance(caught.value, checkpoints.Damaged)
