"""Parameters and multiply-adds of every network, for one image, as a Markdown table.

    python -m variants.count                                    the CPU preset's model, on MNIST
    python -m variants.count --model DiT-XL/2 --image-size 32 --channels 4 --classes 1000

Multiply-adds are those of the matrix products, as the DiT paper counts its Gflops. Nothing is
computed: only the shapes are followed.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m variants.count", file=sys.stderr)
    sys.exit(2)

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit import MODELS
from support import components
from support.cli import COUNT, SIDE, Parser, run_command, say
from support.settings import unfit_model


def count(network: type[nn.Module], **arguments) -> tuple[int, int]:
    """(parameters, multiply-adds of one image) of a network with these constructor arguments."""
    with FakeTensorMode():
        model = network(**arguments)
        x = torch.empty(1, model.in_channels, model.input_size, model.input_size)
        # torch 2.11 does not count the CPU's fused attention: take the one of matrix products
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(x, torch.empty(1), torch.zeros(1, dtype=torch.long))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    lines = ["| `--network` | parameters | multiply-adds |", "|---|---|---|"]
    sizes = dict(MODELS[args.model], input_size=args.image_size, in_channels=args.channels,
                 num_classes=args.classes, learn_sigma=args.learn_sigma)
    for name in components.NETWORKS:
        network = components.network_class(name)
        try:
            parameters, products = count(network, **components.arguments_for(network, sizes))
        except ValueError as error:
            raise unfit_model(args.model, args.image_size, error) from None
        lines.append(f"| {name} | {parameters:,} | {products / 1e6:,.2f} million |")
    say(*lines)
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--model", choices=MODELS, default="DiT-Nano/7", metavar="NAME",
                   help="a name of dit.MODELS (default: DiT-Nano/7)")
    p.add_argument("--image-size", type=SIDE, default=28, help="side in pixels (default: 28)")
    p.add_argument("--channels", type=COUNT, default=1, help="of the images (default: 1)")
    p.add_argument("--classes", type=COUNT, default=10, help="of the labels (default: 10)")
    p.add_argument("--learn-sigma", action="store_true", help="with variance channels, as the "
                   "paper and --process learned-variance have them")
    return p


if __name__ == "__main__":
    run_command(main)
