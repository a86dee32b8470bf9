"""Export a checkpoint to publish: the EMA weights alone.

    python -m tools.export CKPT mnist.pt                    one file, half precision
    python -m tools.export CKPT --to safetensors DIR        config.json and model.safetensors
    python -m tools.export CKPT --to diffusers DIR          for diffusers' DiTTransformer2DModel

sample.py and the other commands read the first two. docs/interchange.md describes the folders.
"""

import sys

if not __package__:
    print("error: run this file as a module: python -m tools.export", file=sys.stderr)
    sys.exit(2)

from pathlib import Path

from support import checkpoints
from support.cli import SCALE, Parser, UserError, check_target, io_errors, run_command, say
from support.folders import find_checkpoint
from tools import interchange


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.to == "pt":
        if args.report is not None:
            raise UserError("--report is for the model card of --to safetensors or diffusers")
        check_target(args.out, args.force, ".pt")
    else:
        interchange.check_folder(args.out, args.force)
    path = find_checkpoint(args.checkpoint)
    if args.out.exists() and path.samefile(args.out):
        raise UserError(f"{args.out} is the checkpoint itself: name another file")
    state = checkpoints.load(path)
    if args.cfg_scale is not None:
        state["config"]["sampling"]["cfg_scale"] = args.cfg_scale
    with io_errors(f"{args.out} cannot be written"):
        if args.to == "pt":
            checkpoints.save(args.out, checkpoints.shared(state))
            size = args.out.stat().st_size
        else:
            measured = interchange.measured_row(path, state, args.report)
            files = interchange.FORMATS[args.to](state, measured)
            interchange.write_folder(args.out, files)
            size = sum(map(len, files.values()))
    say(f"written: {args.out} (step {state['step']:,}, {size / 1e6:.1f} MB)")
    return 0


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run folder")
    p.add_argument("out", type=Path, metavar="OUT", help="the file OUT.pt, or the folder, to write")
    p.add_argument("--to", choices=("pt", *interchange.FORMATS), default="pt",
                   help="the format (default: pt, a file)")
    p.add_argument("--cfg-scale", type=SCALE, metavar="S", help="the default guidance scale of "
                   "sample.py (default: the run's)")
    p.add_argument("--report", type=Path, metavar="FILE.json", help="for the model card: what "
                   "tools.evaluate --json measured (default: evaluations.jsonl beside CKPT)")
    p.add_argument("--force", action="store_true", help="overwrite an existing file or export")
    return p


if __name__ == "__main__":
    run_command(main)
