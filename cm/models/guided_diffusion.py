"""Weights of guided-diffusion (Dhariwal & Nichol 2021): its attention as ours, and its classifiers of noisy images.

A released classifier is a bare state dict, whose shapes tell its network. Its time input is the discrete step t of a
diffusion of 1000 steps, on whose states x_t = sqrt(abar_t) (x0 + sigma_t noise) it was trained. So c_in is
sqrt(abar_t) = 1 / sqrt(1 + sigma^2) and c_noise the t with the nearest sigma_t.
"""

import math
from typing import Any

from torch import Tensor

from cm.diffusion.denoiser import NoisyClassifier
from cm.diffusion.precond import DDPMPrecond, IDDPMPrecond, Precond
from cm.errors import UserError
from cm.models.identify import HEAD_CHANNELS, RELEASED_HEADS, Heads, count_blocks, ratio, uses_scale_shift
from cm.networks.architecture import Architecture, build_network
from cm.networks.attention import qkv_legacy_to_new
from cm.storage.shapes import shapes_only
from cm.storage.unpickle import one_line
from cm.storage.weights import check_matching

# iDDPM's cosine, DDPM's linear
SCHEDULES: dict[str, Precond] = {
    "cosine": IDDPMPrecond(),
    "linear": DDPMPrecond(),
}
COSINE_SIZE = 64  # the released classifier of this size saw cosine noise, those of larger ones linear


def is_guided(state: dict[str, Tensor]) -> bool:
    """Whether attention has kernels of one dimension, as in guided-diffusion's networks."""
    return any(name.endswith(".qkv.weight") and tensor.ndim == 3 for name, tensor in state.items())


def guessed_precond(image_size: int) -> str:
    """The row of PRECONDS of guided-diffusion's released U-Nets: cosine noise at 64 pixels, linear noise above."""
    return "iddpm" if image_size <= COSINE_SIZE else "ddpm"


def guided_to_ours(state: dict[str, Tensor], order: str, heads: Heads = RELEASED_HEADS) -> dict[str, Tensor]:
    """guided-diffusion's attention, with kernels of one dimension, as ours; other state dicts as they are.

    order: of the rows of qkv weights, legacy or new (--use_new_attention_order). Shapes do not tell the heads.
    """
    converted = {}
    for name, tensor in state.items():
        kernel = name.endswith(("qkv.weight", "proj_out.weight")) and tensor.ndim == 3
        if kernel or name.endswith("qkv.bias"):
            one_dimensional = state[name.replace(".bias", ".weight")].ndim == 3
            count = heads.of(len(tensor) // 3)
            # `identify` says what is wrong where there is no such number of heads.
            if ".qkv." in name and one_dimensional and order == "legacy" and count:
                tensor = qkv_legacy_to_new(tensor, count)
            tensor = tensor[..., None] if kernel else tensor
        converted[name] = tensor
    return converted


def is_classifier(state: dict[str, Tensor]) -> bool:
    """Whether a state dict ends in attention pooling, as ADM's classifiers do."""
    return "out.2.positional_embedding" in state and "out.2.c_proj.weight" in state


def encoder_flags(state: dict[str, Tensor], source: str, image_size: int) -> dict[str, Any]:
    """Flags of a classifier's network from the shapes of its tensors.

    Its pooling knows one position more than the coarsest level has pixels; with the image size that counts the levels.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    coarsest = math.isqrt(shapes["out.2.positional_embedding"][1] - 1)
    levels = (image_size // coarsest).bit_length()
    total = count_blocks(shapes, "input_blocks")
    if coarsest << (levels - 1) != image_size or total % levels or total // levels < 2:
        raise UserError(
            f"--guide {source} does not fit images of {image_size} pixels: its coarsest level has {coarsest}"
        )
    stride, base = total // levels, shapes["time_embed.0.weight"][1]
    firsts = [f"input_blocks.{1 + level * stride}" for level in range(levels)]
    widths = [shapes.get(f"{first}.0.in_layers.2.weight", (0,))[0] for first in firsts]
    attended = [image_size >> i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in shapes]
    return {
        "image_size": image_size,
        "num_channels": base,
        "num_res_blocks": stride - 1,
        "channel_mult": ",".join(str(ratio(width, base)) for width in widths),
        "attention_resolutions": ",".join(map(str, attended)),
        "use_scale_shift_norm": uses_scale_shift(shapes),
        "resblock_updown": not any(name.endswith(".0.op.weight") for name in shapes),
    }


def released_classifier(
    state: dict[str, Tensor], *, image_size: int, source: str
) -> tuple[NoisyClassifier, int]:
    """(classifier on the CPU, number of classes) of a bare state dict; UserError names what does not fit.

    Its times are those that the released ones were trained with at this size.
    """
    with one_line(f"--guide {source} is no classifier of guided-diffusion"), shapes_only():
        num_classes = len(state["out.2.c_proj.weight"])
        network = build_network(
            Architecture(
                **encoder_flags(state, source, image_size),
                num_head_channels=HEAD_CHANNELS,
                num_classes=num_classes,
            ),
            classifier=True,
        )
        state = guided_to_ours(state, "legacy")
    check_matching(network, state, f"--guide {source}")
    network = network.to_empty(device="cpu").float()
    network.load_state_dict(state)
    schedule = "cosine" if image_size == COSINE_SIZE else "linear"
    return NoisyClassifier(network, SCHEDULES[schedule]), num_classes
