"""`python -m variants.count`: parameters and multiply-adds of each network, DiT-Nano/7 on MNIST.

Multiply-adds are those of the matrix products for one image, as the DiT paper counts its Gflops.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit import MODELS, DiT
from support.registry import NETWORKS


def count(network: type[nn.Module], **arguments) -> tuple[int, int]:
    """(parameters, multiply-adds), from shapes alone: nothing is computed."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = network(**arguments)
        x = torch.empty(1, model.in_channels, model.input_size, model.input_size)
        with sdpa_kernel(SDPBackend.MATH):      # torch 2.11 does not count the fused attention
            model(x, torch.empty(1), torch.zeros(1, dtype=torch.long))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


if __name__ == "__main__":
    for name, network in {"dit": DiT, **NETWORKS}.items():
        parameters, products = count(network, **MODELS["DiT-Nano/7"])
        print(f"{name:16} {parameters:10,} parameters  {products / 1e6:6.2f} million multiply-adds")
