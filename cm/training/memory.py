"""Whether a training step fits into the memory that is there: a cheap estimate, before anything is allocated.

`cm plan` traces the operations; here the tensors that a U-Net keeps for its backward pass are counted by level.
"""

from pathlib import Path

import torch

from cm.config.derived import compares_by_lpips, global_batch, precision
from cm.config.parsing import parse_attention, parse_channel_mult, parse_ema_rates
from cm.config.rows import NETWORKS, OBJECTIVES
from cm.config.rules import inside_patches
from cm.config.scripts import CmTrainConfig, TrainConfig
from cm.models.factory import DEFAULT_CHANNELS, create_network
from cm.runtime.platform import available_memory
from cm.storage.shapes import shapes_only

# Tensors of the level's width that a block keeps: residual blocks on the way down and up (where the skip connection
# doubles the input), attention.
DOWN, UP, ATTENTION = 7, 11, 6
CHECKPOINTED = 0.3  # share that stays with --use_checkpoint
LPIPS_BYTES = 350 << 20  # of one image at 224 pixels
SHARE = 0.9  # of the free memory that a run may take
CGROUP = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def bytes_of_weights(config: TrainConfig) -> int:
    """Weights of all networks, gradients, moments and averages, in fp32."""
    with shapes_only():
        parameters = sum(p.numel() for p in create_network(config).parameters())
    copies = 4 + (0 if config.ema_device == "cpu" else len(parse_ema_rates(config.ema_rate)))
    if isinstance(config, CmTrainConfig):
        row = OBJECTIVES[config.training_mode]
        copies += (
            row.teacher
            + bool(config.guide)
            + ((row.consistency or row.segments or row.target) and config.start_ema > 0)
        )
    return 4 * parameters * copies


def bytes_per_image(config: TrainConfig) -> int:
    """What one image of a microbatch keeps; 0 for networks without levels, of which nothing is known."""
    if not NETWORKS[config.network].levels:
        return 0
    side = inside_patches(config).image_size
    mult = parse_channel_mult(config.channel_mult, side)
    factors = parse_attention(config.attention_resolutions, side, len(mult))
    blocks, values = config.num_res_blocks, 0.0
    for level, m in enumerate(mult):
        each = config.num_channels * m * (side // 2**level) ** 2
        extra = 1 if config.resblock_updown and level else 0
        tensors = (blocks + extra) * DOWN + (blocks + 1 + extra) * UP
        tensors += (2 * blocks + 1) * ATTENTION if 2**level in factors else 0
        values += each * tensors
    width = 4 if precision(config) == "fp32" else 2
    kept = values * width * (CHECKPOINTED if config.use_checkpoint else 1)
    pixels = 40 * config.image_size**2 * (config.in_channels or DEFAULT_CHANNELS)
    perceptual = LPIPS_BYTES if compares_by_lpips(config) else 0
    return int(kept + pixels + perceptual)


def available(device: torch.device, processes: int = 1) -> int:
    """Bytes that a process may still take on its device; `processes` of this machine share the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _free_host_memory() // processes


def _free_host_memory() -> int:
    free = available_memory()
    for limit, usage in CGROUP:
        top, used = (_text(f"/sys/fs/cgroup/{name}").strip() for name in (limit, usage))
        if top.isdecimal() and used.isdecimal():
            free = min(free, max(int(top) - int(used), 0))
    return free


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def largest_microbatch(config: TrainConfig, images: int, free: int) -> int:
    """Images per pass that fit, this rank's whole batch or a power of two; 0: not even the weights do.

    What an image takes is an estimate, so that it alone refuses no run.
    """
    each, room = bytes_per_image(config), SHARE * free - bytes_of_weights(config)
    if room < 0:
        return 0
    if not each or each * images <= room:
        return images
    return 1 << max(int(room // each).bit_length() - 1, 0)


def images_per_rank(config: TrainConfig, world_size: int) -> int:
    """Images of a step on one rank."""
    return -(-global_batch(config, world_size) // world_size)
