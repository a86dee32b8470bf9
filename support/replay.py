"""One CUDA graph a step: what a function launches, captured once and replayed.

A step launches over a thousand small kernels, and the GPU waits for Python: DiT-Nano/7 takes 16 ms
on an H200, as one graph 2 ms (docs/experiments.md, "On a GPU"). A graph repeats the same kernels on
the same memory: whatever changes from step to step has to be in a tensor that it reads, and nothing
in it may wait for the device. So inputs are copied into tensors of its own, learning rates and the
EMA's decay become tensors, and results are copied out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from support.command import reason, warn

WARM_UP = 3         # calls before capturing: they create optimizer states, compile, choose kernels


def capture(function: Callable, inputs: tuple[Tensor, ...]) -> Callable:
    """function(*inputs), which returns a tensor or a tuple of them, as a graph. Nothing is computed
    yet. Raises RuntimeError where the function waits for the device."""
    own = [x.clone() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*own)

    def replay(*inputs: Tensor):
        torch._foreach_copy_(own, list(inputs))
        graph.replay()
        return results.clone() if isinstance(results, Tensor) else tuple(r.clone() for r in results)

    return replay


class Replayed:
    """A function of tensors, or of tensors and floats, which are then passed as tensors: called as
    it is at first, captured at call `WARM_UP` + 1 for each set of shapes. What cannot be captured
    is called as it is, after one warning. Other attributes are the function's."""

    def __init__(self, function: Callable, device: torch.device, clean_up: Callable = lambda: None):
        self.function, self.device, self.clean_up = function, device, clean_up
        self.graphs: dict[tuple, Callable | int] = {}       # or how often it was called
        self.stream = torch.cuda.Stream(device)

    def __getattr__(self, name: str):
        return getattr(self.function, name)

    def __call__(self, *inputs: Tensor | float):
        inputs = tuple(x if isinstance(x, Tensor) else torch.full(
            (), x, dtype=torch.float64, device=self.device) for x in inputs)
        key = tuple((x.shape, x.dtype) for x in inputs)
        found = self.graphs.setdefault(key, 0)
        if found == WARM_UP:
            try:
                found = capture(self.function, inputs)
            except Exception as error:      # of the network's own code, of CUDA
                self.clean_up()
                torch.cuda.synchronize(self.device)
                warn(f"not one CUDA graph, but slower ({reason(error)})")
                found = self.function
        self.graphs[key] = found if callable(found) else found + 1
        if callable(found):
            return found(*inputs)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)                    # graphs are prepared on another stream
        with torch.cuda.stream(self.stream):
            results = self.function(*inputs)
        current.wait_stream(self.stream)
        return results


def replayed_step(step: Callable, optimizers: list, device: torch.device) -> Callable:
    """A training step as one graph. Learning rates become tensors: `compute.set_learning_rates`."""
    for opt in optimizers:
        muon = isinstance(opt, torch.optim.Muon)            # AdamW's kernel reads float32
        for group in opt.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = torch.full((), group["lr"], device=device,
                                     dtype=torch.float64 if muon else torch.float32)
            group["capturable"] = True

    return Replayed(step, device, lambda: [opt.zero_grad() for opt in optimizers])
