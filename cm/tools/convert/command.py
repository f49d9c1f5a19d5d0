"""Convert a checkpoint: any kind in, --to KIND out. The input's kind is found by its content.

In: checkpoints and run directories of this framework, original .pt files, EDM pickles, JAX CIFAR-10 checkpoints,
diffusers folders, safetensors. Out: cm (weights with their configuration), legacy (a bare state dict), safetensors,
diffusers (a folder for ConsistencyModelPipeline, or of an EDM teacher with EDMEulerScheduler), onnx (the one-step
generator, compared with our own by onnxruntime). A model card, README.md, is written beside it.

cm convert checkpoint_80 cd_cifar10.pt --preset cifar10_cd_lpips
cm convert runs/student --to onnx
cm convert runs/student hf://OWNER/NAME --to diffusers
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

from cm.config.parsing import at_least, expanded
from cm.config.rows import OBJECTIVES, PRECONDS
from cm.errors import UserError

# Kind -> ending of the name that is written where the command names none
ENDINGS = {
    "cm": ".pt",
    "legacy": ".legacy.pt",
    "safetensors": ".safetensors",
    "diffusers": "-diffusers",
    "onnx": ".onnx",
}


def parser() -> argparse.ArgumentParser:
    """The flags of the program."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=expanded, help="file or folder to read")
    p.add_argument(
        "target",
        type=expanded,
        nargs="?",
        default="",
        help="file or folder to write, or hf://OWNER/NAME; default: the source's name, in the working directory",
    )
    p.add_argument("--to", choices=ENDINGS, default="cm", help="what to write (default cm)")
    p.add_argument("--preset", default="", help="named experiment that the checkpoint comes from")
    modes = [name for name, row in OBJECTIVES.items() if row.draws]
    p.add_argument("--training_mode", choices=modes, default="", help="objective, where the file tells none")
    p.add_argument(
        "--steps", type=at_least(0), default=0, help="points of its noise grid, where the file tells none"
    )
    p.add_argument(
        "--image_size", type=at_least(0), default=0, help="where tensor shapes do not tell it [pixels]"
    )
    p.add_argument("--weights", default="", help="of several networks: ema (default), raw, target")
    p.add_argument(
        "--qkv_order", choices=("legacy", "new"), default="legacy", help="of guided-diffusion files"
    )
    p.add_argument(
        "--num_heads", type=at_least(0), default=0, help="attention heads, where shapes do not tell them"
    )
    p.add_argument(
        "--num_head_channels", type=at_least(0), default=0, help="channels of each head (released models: 64)"
    )
    p.add_argument("--precond", choices=PRECONDS, default="", help="scalings, where the file tells none")
    return p


def main(flags: argparse.Namespace) -> None:
    """Convert, and say in one line what was done."""
    from cm.runtime.claims import claimed_place
    from cm.tools.convert.export import hub_name
    from cm.tools.convert.formats import Source, convert, known_flags

    known = known_flags(
        flags.preset,
        training_mode=flags.training_mode,
        steps=flags.steps,
        precond=flags.precond,
        num_heads=flags.num_heads,
        num_head_channels=flags.num_head_channels or (-1 if flags.num_heads else 0),
    )
    source = Source(flags.source, flags.weights, flags.image_size, flags.qkv_order)
    target = flags.target or default_target(flags.source, flags.to)
    with (
        nullcontext() if hub_name(target) else claimed_place(target, "TARGET", folder=flags.to == "diffusers")
    ):
        print(convert(source, target, flags.to, known))


def default_target(source: str, to: str) -> str:
    """The source's name with the ending of a kind, in the working directory; UserError where that is taken."""
    target = Path(Path(source.rstrip("/")).resolve().stem + ENDINGS[to])
    if target.exists():
        raise UserError(
            f"{target} is there already: name what to write (cm convert {source} TARGET --to {to})"
        )
    return str(target)


def program() -> None:
    """The whole program: --help and mistakes in flags need no torch."""
    parsed = parser().parse_args()
    from cm.runtime.job import run_main

    run_main(lambda: main(parsed))
