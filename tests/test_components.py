"""support/components.py: another network or process, and arguments added to their constructors.

What a checkpoint may hold follows from the signatures: an added argument changes nothing else.
"""

import json
from pathlib import Path

import pytest
import torch

import dit
import sample
from conftest import TINY, load, tensors_equal
from diffusion import GaussianDiffusion
from dit import DiT
from support import checkpoints, components
from support.cli import UserError


class Gained(DiT):
    """A DiT to which someone added arguments, one of each kind."""

    def __init__(self, *, gain: float = 1, shift: float = -0.5, twice: bool = False,
                 mode: str = "plain", layers: int = 0, **sizes):
        super().__init__(**sizes)
        self.gain, self.shift, self.twice, self.mode, self.layers = gain, shift, twice, mode, layers
        self.extra = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(layers))

    def forward(self, x, t, y):
        return self.gain * super().forward(x, t, y) + self.shift


class Warm(GaussianDiffusion):
    """DDPM with arguments added, one of them changing the images."""

    def __init__(self, num_timesteps: int = 1000, heat: float = 0.25, kind: str = "a", **schedule):
        super().__init__(num_timesteps, **schedule)
        self.heat, self.kind = heat, kind

    def q_sample(self, x0, t, eps):
        return super().q_sample(x0, t, eps) * (1 + self.heat)


class Plain(DiT):
    """No constructor of its own."""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, cls in [("gained", Gained), ("plain", Plain)]:
        monkeypatch.setitem(components.NETWORKS, name, cls)
    monkeypatch.setitem(components.PROCESSES, "warm", Warm)


NAMED = ("--network", "gained", "--process", "warm")
ADDED = dict(gain=1, shift=-0.5, twice=False, mode="plain", layers=0)


def refused(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def changed(path: Path, part: str, **arguments) -> Path:
    """The file with other arguments in config[part]; None removes one."""
    state = torch.load(path, weights_only=True)
    for key, value in arguments.items():
        if value is None:
            state["config"][part].pop(key, None)
        else:
            state["config"][part][key] = value
    torch.save(state, path)
    return path


# ---------------------------------------------------------------- what the signatures say


def test_arguments_are_those_of_the_class_and_behind_kwargs_of_its_bases():
    assert set(components.arguments(DiT)) == {
        "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
        "mlp_ratio", "num_classes", "learn_sigma"} | set(components.arguments(Plain))
    assert set(components.arguments(Gained)) == {*components.arguments(DiT), *ADDED}
    assert set(components.arguments(Warm)) == {
        *components.arguments(GaussianDiffusion), "heat", "kind"}

    class Closed(DiT):
        def __init__(self, input_size, in_channels, num_classes):
            super().__init__(input_size, 4, in_channels, num_classes=num_classes)
    assert list(components.arguments(Closed)) == ["input_size", "in_channels", "num_classes"]


def test_arguments_for_takes_what_is_offered_and_the_defaults():
    offered = dict(input_size=8, depth=3, gain=2.5, unknown=7)
    found = components.arguments_for(Gained, offered)
    defaults = {n: p.default for n, p in components.arguments(DiT).items()}
    assert found == {**defaults, **ADDED, "input_size": 8, "depth": 3, "gain": 2.5}


@pytest.mark.parametrize("good", [
    dict(gain=2), dict(gain=2.5), dict(gain=-1e5), dict(shift=3), dict(twice=True), dict(mode=""),
    dict(layers=4)])
def test_arguments_from_a_file_are_completed(good):
    given = dict(input_size=8, in_channels=1, num_classes=3, **good)
    complete = components.check_arguments(Gained, given)
    assert complete == components.arguments_for(Gained, given)
    assert all(complete[k] == v and type(complete[k]) is type(v) for k, v in given.items())


@pytest.mark.parametrize("wrong", [
    dict(gain="2"), dict(gain=True), dict(gain=None), dict(gain=float("nan")), dict(gain=2**20),
    dict(gain=-float("inf")), dict(twice=1), dict(twice="yes"), dict(mode=3), dict(mode=["x"]),
    dict(layers=2.0), dict(layers=True), dict(surprise=1), dict(gain={}), dict(shift=[1.0])])
def test_a_wrong_type_or_an_unknown_argument_is_named(wrong):
    with pytest.raises(ValueError, match=repr(next(iter(wrong)))):
        components.check_arguments(Gained, dict(input_size=8, **wrong))


def test_a_required_argument_may_not_be_missing():
    class Strict(DiT):
        def __init__(self, tall: int, **sizes):
            super().__init__(**sizes)
    with pytest.raises(ValueError, match="'tall' is missing"):
        components.check_arguments(Strict, {})
    assert components.check_arguments(Strict, dict(tall=3))["tall"] == 3


def test_names_are_those_of_the_registry_alone():
    assert components.network_class("dit") is DiT
    assert components.process_class("ddpm") is GaussianDiffusion
    for find in (components.network_class, components.process_class):
        for name in ("os:system", "dit:DiT", "", "DiT"):
            assert "is unknown: " in refused(find, name)


# ---------------------------------------------------------------- train, resume, sample


def test_an_added_argument_goes_through_training_resuming_and_sampling(trained, train, monkeypatch):
    monkeypatch.setitem(dit.MODELS, TINY, dict(dit.MODELS[TINY], gain=2.5))
    path = trained("--steps", 6, "--save-every", 3, "--keep", 9, *NAMED)
    config = load(path)["config"]
    assert (config["network"], config["process"]) == ("gained", "warm")
    assert {k: config["model"][k] for k in ADDED} == dict(ADDED, gain=2.5)
    assert (config["diffusion"]["heat"], config["diffusion"]["kind"]) == (0.25, "a")
    assert json.loads(Path("run/config.json").read_text()) == config
    uninterrupted = load(path)
    path.unlink()
    assert train("--resume", "--out", "run") == 0
    assert tensors_equal(load(path)["model"], uninterrupted["model"])
    assert train("--steps", 1, "--out", "next", "--init-from", path) == 0
    assert load("next/step_0000001.pt")["config"]["network"] == "gained"

    checkpoint = sample.load(path)
    assert type(checkpoint.model) is Gained and type(checkpoint.diffusion) is Warm
    assert checkpoint.model.gain == 2.5 and checkpoint.diffusion.heat == 0.25
    for flags in ((), ("--sampler", "ddpm"), ("--weights", "model")):
        assert sample.main([str(path), "--labels", "3", "--out", "a.png", "--force", *flags]) == 0
    images = sample.generate(checkpoint, [3], steps=3)
    less = sample.generate(sample.load(changed(path, "model", gain=0.5)), [3], steps=3)
    assert not torch.equal(images, less)                        # the file's argument counts


def test_a_checkpoint_from_before_the_argument_has_its_default(trained, train):
    path = trained("--steps", 3, *NAMED)
    changed(path, "model", **dict.fromkeys(ADDED))
    changed(path, "diffusion", heat=None, kind=None)
    config = load(path)["config"]
    assert {k: config["model"][k] for k in ADDED} == ADDED
    assert config["diffusion"]["heat"] == 0.25
    assert sample.load(path).model.shift == -0.5
    assert train("--resume", "--out", "run", "--steps", 4) == 0


@pytest.mark.parametrize("part, wrong", [
    ("model", dict(gain="loud")), ("model", dict(surprise=1)), ("diffusion", dict(heat=True)),
    ("diffusion", dict(hot=1.0)), ("model", dict(layers=1)), ("diffusion", dict(beta_end=-1.0))])
def test_a_file_that_does_not_fit_the_signature_is_refused_in_one_line(
        trained, train, part, wrong):
    path = changed(trained("--steps", 3, *NAMED), part, **wrong)
    name = "extra.0" if "layers" in wrong else "beta" if "beta_end" in wrong else next(iter(wrong))
    for line in (refused(sample.main, [str(path)]), refused(sample.load, path),
                 refused(train, "--resume", path)):
        assert path.name in line and name in line, line


# ---------------------------------------------------------------- known before the first step


class Unstorable(DiT):
    def __init__(self, windows=(1, 2), **sizes):
        super().__init__(**sizes)


class Vague(DiT):
    def __init__(self, windows=None, **sizes):
        super().__init__(**sizes)


class Infinite(DiT):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("mask", torch.full((4, 4), -float("inf")).triu(1))


class Counting(DiT):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


class Large(DiT):
    def __init__(self, period: float = 1e7, **sizes):
        super().__init__(**sizes)


@pytest.mark.parametrize("cls, word", [
    (Unstorable, "plain values"), (Vague, "'windows'"), (Infinite, "mask"), (Counting, "count"),
    (Large, "'period'")], ids=lambda v: getattr(v, "__name__", ""))
def test_what_cannot_be_read_back_is_refused_before_the_first_step(train, monkeypatch, cls, word):
    """Not after a night of training."""
    monkeypatch.setitem(components.NETWORKS, "other", cls)
    steps = []
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda *a: (steps.append(1), forward(*a))[1])
    line = refused(train, "--network", "other", "--steps", 3, "--out", "run")
    assert word in line and "step_0000000.pt" in line, line
    assert not steps and not Path("run/metrics.jsonl").exists()
    monkeypatch.setattr(checkpoints, "load", lambda path, full=False: torch.load(
        path, weights_only=False))
    assert train("--network", "other", "--steps", 1, "--out", "other") == 0 and steps
