"""Weights of guided-diffusion (Dhariwal & Nichol 2021): its attention as ours, and its classifiers of noisy images.

A released classifier is a bare state dict. Flags with the names of the published commands describe its network; its
time input is the discrete step t of a diffusion of 1000 steps, on whose states x_t = sqrt(abar_t) (x0 + sigma_t noise)
it was trained. So c_in = sqrt(abar_t) = 1 / sqrt(1 + sigma^2) and c_noise = the t with the nearest sigma_t.
"""

import torch
from torch import Tensor

from cm.config.flags import GuidanceFlags
from cm.diffusion.denoiser import NoisyClassifier
from cm.diffusion.precond import DDPMPrecond, IDDPMPrecond, Precond
from cm.models.identify import HEAD_CHANNELS
from cm.networks.architecture import Architecture, build_network
from cm.networks.attention import qkv_legacy_to_new
from cm.storage.weights import check_matching

# --classifier_noise_schedule: iDDPM's cosine, DDPM's linear
SCHEDULES: dict[str, Precond] = {
    "cosine": IDDPMPrecond(),
    "linear": DDPMPrecond(),
}
COSINE_SIZE = 64  # the released classifier of this size saw cosine noise, those of larger ones linear


def guided_to_ours(state: dict[str, Tensor], order: str) -> dict[str, Tensor]:
    """guided-diffusion's attention, with kernels of one dimension, as ours; other state dicts as they are.

    order: of the rows of qkv weights, legacy or new (--use_new_attention_order).
    """
    converted = {}
    for name, tensor in state.items():
        kernel = name.endswith(("qkv.weight", "proj_out.weight")) and tensor.ndim == 3
        if kernel or name.endswith("qkv.bias"):
            one_dimensional = state[name.replace(".bias", ".weight")].ndim == 3
            if ".qkv." in name and one_dimensional and order == "legacy":
                tensor = qkv_legacy_to_new(tensor, len(tensor) // (3 * HEAD_CHANNELS))
            tensor = tensor[..., None] if kernel else tensor
        converted[name] = tensor
    return converted


def is_classifier(state: dict[str, Tensor]) -> bool:
    """Whether a state dict ends in attention pooling, as ADM's classifiers do."""
    return "out.2.positional_embedding" in state and "out.2.c_proj.weight" in state


def released_classifier(
    state: dict[str, Tensor], flags: GuidanceFlags, *, image_size: int, source: str
) -> tuple[NoisyClassifier, int]:
    """(classifier on the CPU, number of classes) of a bare state dict; UserError names what does not fit the flags."""
    num_classes = len(state["out.2.c_proj.weight"])
    with torch.device("meta"):
        network = build_network(
            Architecture(
                image_size=image_size,
                num_channels=flags.classifier_width,
                num_res_blocks=flags.classifier_depth,
                attention_resolutions=flags.classifier_attention_resolutions,
                num_head_channels=HEAD_CHANNELS,
                use_scale_shift_norm=flags.classifier_use_scale_shift_norm,
                resblock_updown=flags.classifier_resblock_updown,
                num_classes=num_classes,
            ),
            classifier=True,
        )
    state = guided_to_ours(state, "legacy")
    check_matching(network, state, f"--classifier_path {source} (see the other --classifier_... flags)")
    network = network.to_empty(device="cpu").float()
    network.load_state_dict(state)
    schedule = flags.classifier_noise_schedule or ("cosine" if image_size == COSINE_SIZE else "linear")
    return NoisyClassifier(network, SCHEDULES[schedule]), num_classes
