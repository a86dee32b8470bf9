"""Make a checkpoint to give away: the averaged weights alone, in half precision.

    python export.py output/001-mnist-DiT-Nano-7/step_0004000.pt mnist.pt
"""

import argparse
from pathlib import Path

import checkpoints
from cli import Parser, UserError, check_target, cli, number, printable


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    check_target(a.out, a.force, ".pt")
    state = checkpoints.shared(checkpoints.load(a.checkpoint))
    if a.cfg_scale is not None:
        config = state["config"]
        state["config"] = dict(config, sampling=dict(config["sampling"], cfg_scale=a.cfg_scale))
    try:
        checkpoints.save(a.out, state)
        size = a.out.stat().st_size
    except OSError as error:
        raise UserError(f"{printable(a.out)} cannot be written: "
                        f"{error.strerror or error}") from None
    print(f"written: {printable(a.out)} (step {state['step']:,}, {size / 1e6:.1f} MB)")
    return 0


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("checkpoint", type=Path, metavar="CKPT", help="the checkpoint of a run")
    p.add_argument("out", type=Path, metavar="OUT.pt", help="the file to write")
    p.add_argument("--cfg-scale", type=number(float, -100, 100), metavar="S", help="the guidance "
                   "that sample.py takes unasked (default: the run's)")
    p.add_argument("--force", action="store_true", help="overwrite an existing file")
    return p


if __name__ == "__main__":
    cli(main)
