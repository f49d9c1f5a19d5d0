"""Floating-point operations and activation memory, counted on the meta device: no arithmetic, no memory.

Counts are per image, a multiplication and an addition being two; matrix products, convolutions and attention only, as
torch.utils.flop_counter has them.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cm.config.derived import (
    compares_by_lpips,
    guidance_of,
    has_two_times,
    precision,
    told_scales,
    training_mode,
)
from cm.config.registry import Objective, resolve
from cm.config.rows import OBJECTIVES
from cm.config.scripts import Config
from cm.models.factory import create_network
from cm.networks.precision import torso_dtype
from cm.objectives.lpips import NATIVE_SIZE
from cm.tools.profiling.trace import fused_attention

# Channels of VGG16's convolutions up to the last features that LPIPS compares; a new row after each pooling
VGG16 = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))


@dataclass(frozen=True)
class NetworkCost:
    """Of one image through the configured network: FLOPs of the forward and of the backward pass, parameters, and
    bytes that a training forward keeps for the backward pass."""

    forward: int
    backward: int
    parameters: int
    activation_bytes: int


def network_cost(config: Config) -> NetworkCost:
    """Cost of one image, with the precision and the activation checkpointing that the configuration asks for."""
    with torch.device("meta"):
        net = create_network(config).train()
        if precision(config) != "fp32":
            net.convert_torso(torso_dtype(precision(config)))
        images = torch.empty(1, config.in_channels or 3, config.image_size, config.image_size)
        times = torch.empty(1)
        labels = {"y": torch.zeros(1, dtype=torch.int64)} if config.class_cond else {}
        labels |= {"second": times} if has_two_times(config) else {}
        labels |= {"guidance": times} if told_scales(config) else {}
    forward = count(lambda: net(images, times, **labels))
    both = count(lambda: net(images, times, **labels).sum().backward(), grad=True)
    kept = kept_bytes(net, lambda: net(images, times, **labels))
    return NetworkCost(forward, both - forward, sum(p.numel() for p in net.parameters()), kept)


def count(run: Callable[[], object], *, grad: bool = False) -> int:
    """FLOPs of run()."""
    # The kernels of fused attention differ from device to device, and so does what the counter knows of them.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.set_grad_enabled(grad),
    ):
        run()
    return counter.get_total_flops()


def kept_bytes(net: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps from a forward pass with fused attention, parameters apart."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, so that no address is used twice
        return tensor

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in storages.values())


def lpips_forward(image_size: int, lpips_size: int) -> int:
    """FLOPs of VGG16's features of one image, after the resizing that LPIPS applies to small ones."""
    side = lpips_size if lpips_size and image_size < NATIVE_SIZE else image_size
    total = 0
    for level, widths in enumerate(VGG16):
        pixels = (side >> level) ** 2
        total += sum(2 * 9 * a * b * pixels for a, b in itertools.pairwise(widths))
    return total


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one image through a training step, by phase."""

    student: int
    backward: int
    target: int = 0
    teacher: int = 0
    distance: int = 0  # forward of both images and backward through one

    @property
    def total(self) -> int:
        """All phases."""
        return self.student + self.backward + self.target + self.teacher + self.distance


# Evaluations of the teacher in a step, by --training_mode; consistency distillation: by --ode_solver
def _teacher_calls(row: Objective, config: Config) -> int:
    """Evaluations of the teacher in a step: two Euler steps of a stage, one slope or target, or --ode_solver's."""
    if not row.teacher:
        return 0
    guided = guidance_of(config) is not None
    solves = not (row.continuous or row.segments) and row.learns_from == "denoiser"
    calls = 2 if row.stages or (solves and config.ode_solver == "heun") else 1
    return calls * (2 if guided else 1)


def step_cost(config: Config, network: NetworkCost) -> StepCost:
    """FLOPs of one image through a step of the configured objective."""
    row = OBJECTIVES[training_mode(config)]
    distance = 0
    if compares_by_lpips(config):
        distance = 3 * lpips_forward(config.image_size, config.lpips_size)
    if row.passes:
        student, target, teacher, backward = resolve(row.passes)(config)
        return StepCost(
            student=round(student * network.forward),
            backward=round(backward * network.backward),
            target=round(target * network.forward),
            teacher=round(teacher * network.forward * (2 if guidance_of(config) is not None else 1)),
            distance=distance,
        )
    passes, backwards = 1, 1
    if row.continuous:
        # Forward mode is two passes, f and its tangent; then a plain one, or the way back through both.
        passes, backwards = (3, 1) if getattr(config, "stop_grad", True) else (2, 2)
    return StepCost(
        student=passes * network.forward,
        backward=backwards * network.backward,
        target=network.forward if (row.consistency or row.segments) and not row.continuous else 0,
        teacher=_teacher_calls(row, config) * network.forward,
        distance=distance,
    )
