"""What a network and a process must offer, and the registry of both.

Training, sampling, evaluation and checkpoints know nothing else about them. So another network or
process takes the place of `dit.DiT` or `diffusion.GaussianDiffusion` by an entry in the registry,
which variants/ completes (docs/variants.md).

A network is a torch.nn.Module:
    __init__(input_size, in_channels, num_classes, ...)     further arguments: int, float (below a
                                                            million), bool or str, with defaults
    model(xt, t, y) -> (B, C', H, H), C' >= C               the output is in the first C channels
    input_size, in_channels, num_classes, null_class        attributes
    named_parameters()                                      Muon trains the matrices in "blocks."

A process is a class:
    __init__(...)                                           arguments as above, all with defaults
    num_timesteps, prediction, samplers                     attributes; samplers: name -> generator
                                                            function (predict, xT, noise, options)
                                                            that yields (t, xt, x0_hat). The first
                                                            one takes `steps`
    to(device) -> itself
    q_sample(x0, t, eps) -> xt                              for figures
    loss(model, x0, t, y, eps) -> (B,)
    loss_in_eps(loss, t) -> (B,)                            for logs
    t_from_uniform(u) -> t                                  for training: u (B,) in [0, 1)
    t_from_noise_level(level) -> t                          for `--timesteps log-normal`
    denoise(predict, xt, t, clip) -> (x0_hat, eps_hat)      for figures
    network_arguments                                       optional: a dict of what it asks of the
                                                            network's constructor
    alpha_sigma(t) -> the coefficients of x0 and eps        optional: for SAMPLERS and for
                                                            --guidance-interval; with
    target(x0, eps, t) -> the right output                  for tools.edit inpaint
    guided(guidance) -> guidance                            optional: what it changes in guidance

SAMPLERS and GUIDANCE are further ways to sample, which are not stored in a checkpoint: a sampler
is a function (process, predict, xT, noise, options) that yields what those of a process yield, and
guidance one of (model, y, cfg_scale, options) that returns predict(xt, t).

Constructor arguments are what a checkpoint stores: the keys that it may hold follow from the
signature, and one that it lacks takes its default.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable

from torch import nn

from support.cli import UserError, shorten

NETWORKS: dict[str, str | type] = {"dit": "dit:DiT"}
PROCESSES: dict[str, str | type] = {"ddpm": "diffusion:GaussianDiffusion"}
SAMPLERS: dict[str, str | Callable] = {}        # beside the process's own
GUIDANCE: dict[str, str | Callable] = {}        # beside classifier_free_guidance
FLAGS: dict[str, tuple[type, float, float, str]] = {}   # kind, least, greatest, help

with contextlib.suppress(ImportError):      # the lesson does without variants/
    from variants import FLAGS as MORE_FLAGS, NETWORKS as MORE_NETWORKS, PROCESSES as MORE_PROCESSES
    from variants import GUIDANCE as MORE_GUIDANCE, SAMPLERS as MORE_SAMPLERS
    NETWORKS |= MORE_NETWORKS
    PROCESSES |= MORE_PROCESSES
    SAMPLERS |= MORE_SAMPLERS
    GUIDANCE |= MORE_GUIDANCE
    FLAGS |= MORE_FLAGS


def network_class(name: str) -> type[nn.Module]:
    return _find(NETWORKS, "network", name)


def process_class(name: str) -> type:
    return _find(PROCESSES, "process", name)


def sampler_names(process) -> list[str]:
    """The samplers of a process: its own, and those of SAMPLERS where it has what they need."""
    return [*process.samplers, *(SAMPLERS if hasattr(process, "alpha_sigma") else ())]


def find_sampler(process, name: str) -> Callable:
    """The generator function (predict, xT, noise, options) of one of `sampler_names`."""
    if name in process.samplers:
        return process.samplers[name]
    return functools.partial(_find(SAMPLERS, "sampler", name), process)


def find_guidance(name: str) -> Callable:
    return _find(GUIDANCE, "guidance", name)


def _find(registry: dict, kind: str, name: str) -> Callable:
    """What a registry has for a name. Nothing is imported by any other name."""
    if name not in registry:
        raise UserError(f"{kind} {shorten(name)!r} is unknown: {', '.join(registry)}")
    entry = registry[name]
    if not isinstance(entry, str):
        return entry
    module, attribute = entry.split(":")
    return getattr(importlib.import_module(module), attribute)


def arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's arguments by name, with those of the base classes behind a **kwargs."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        found = {**{p.name: p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)},
                 **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def arguments_for(cls: type, offered: dict) -> dict:
    """Every argument of the constructor, as a checkpoint stores them: those among `offered`, and
    the defaults of the rest."""
    return {name: offered.get(name, p.default) for name, p in arguments(cls).items()
            if name in offered or p.default is not p.empty}


def check_flags(args) -> None:
    """Raise UserError where --network, --process and the flags of variants do not go together."""
    network, process = network_class(args.network), process_class(args.process)
    asked = getattr(process, "network_arguments", {})
    if missing := [name for name in asked if name not in arguments(network)]:
        raise UserError(f"--process {args.process} needs a network with the argument "
                        f"{', '.join(missing)}, which --network {args.network} lacks")
    for name in _variant_flags(args):
        if name not in arguments(network) | arguments(process):
            takers = [f"--network {n}" for n in NETWORKS if name in arguments(network_class(n))]
            takers += [f"--process {n}" for n in PROCESSES if name in arguments(process_class(n))]
            raise UserError(f"--{name.replace('_', '-')} does not apply to --network "
                            f"{args.network} and --process {args.process}: add "
                            f"{' or '.join(takers)}")


def network_for(args, sizes: dict) -> tuple[type[nn.Module], dict]:
    """The class that --network names and all its arguments: sizes, what the process asks for, and
    the flags of variants."""
    network, process = network_class(args.network), process_class(args.process)
    asked = getattr(process, "network_arguments", {})
    return network, arguments_for(network, {**sizes, **asked, **_variant_flags(args)})


def process_for(args, schedule: dict) -> tuple[type, dict]:
    """The class that --process names and all its arguments: the schedule, --prediction,
    --weighting, and the flags of variants."""
    process = process_class(args.process)
    return process, arguments_for(process, dict(
        schedule, prediction=args.prediction, weighting=args.weighting, **_variant_flags(args)))


def _variant_flags(args) -> dict:
    return {name: value for name in FLAGS if (value := getattr(args, name, None)) is not None}


def sampling_for(process, sampling: dict) -> dict:
    """Defaults of sampling that a process has: its first sampler where it lacks the usual one."""
    sampler = sampling["sampler"]
    return dict(sampling, sampler=sampler if sampler in sampler_names(process) else
                next(iter(process.samplers)), steps=min(sampling["steps"], process.num_timesteps))


def check_arguments(cls: type, given: dict) -> dict:
    """Arguments from a file, completed by defaults. Raises ValueError unless each is one of the
    constructor's and has its type; numbers lie between minus and plus a million."""
    known = arguments(cls)
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{key!r} is not an argument of {cls.__name__}")
        default = known[key].default
        kinds = {bool: bool, int: int, float: (int, float), str: str}
        kind = next((kinds[k] for wanted in (known[key].annotation, type(default)) for k in kinds
                     if wanted in (k, k.__name__)), (bool, int, float, str))
        right = isinstance(value, kind) and (kind is bool or kind == (bool, int, float, str)
                                             or not isinstance(value, bool))
        if not right:
            raise ValueError(f"{key!r} is {type(value).__name__}")
        if isinstance(value, int | float) and not abs(value) < 2**20:
            raise ValueError(f"{key!r} is {value!r}")
    complete = arguments_for(cls, given)
    for key in known:
        if key not in complete:
            raise ValueError(f"{key!r} is missing")
    return complete
