"""A training step and a sampler's network call, traced on the meta device."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor, nn

from cm.config.choices import PRECISIONS
from cm.config.derived import guidance_of, is_consistency, learns_from, precision, told_scales
from cm.config.fields import is_fixed
from cm.config.flags import ConsistencyFlags, GuidanceFlags
from cm.config.scripts import Config, ModelFlags, TrainConfig, flags_of, plain_class
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.guidance import GuidedDenoiser, unconditional
from cm.models.factory import DEFAULT_CHANNELS, create_denoiser, create_network, create_precond
from cm.objectives.base import Draw, Objective, Roles
from cm.objectives.lpips import FEATURES, Lpips, _compare, assemble, meta_vgg
from cm.seeding import StepRandom
from cm.storage.shapes import shapes_only
from cm.tools.profiling.trace import Trace, Tracer, between, traced
from cm.training.blocks import blocks_of
from cm.training.factory import create_objective, trains_consistency

META = torch.device("meta")
# Batches that are traced; what others need is linear in their size.
SIZES = (4, 16)
# Flags that a trace may depend on, beside those of the chosen rows
TRACED = (
    *flags_of(ModelFlags),
    *flags_of(ConsistencyFlags),
    *flags_of(GuidanceFlags),
    "precision",
    "schedule_sampler",
    "label_dropout",
)
# What never changes it: traces are made once for all values.
UNTRACED = ("total_training_steps", "distill_steps_per_iter", "teacher_model_path", "init")


@dataclass(frozen=True)
class Weights:
    """Of one network: parameters, their bytes in the network's precision, how many are not fp32 there.

    block: parameters of the largest piece that FSDP gathers at a time.
    """

    parameters: int
    nbytes: int
    halved: int
    block: int


@dataclass(frozen=True)
class StepTrace:
    """Forward and backward pass of a step. weights: of one network. distance: bytes of LPIPS's weights.

    target: whether there is one. teacher: how many networks teach, with one that guides. teacher_follows: whether it
    takes over the student's weights at some time.
    """

    trace: Trace
    weights: Weights
    distance: int
    target: bool
    teacher: int
    teacher_follows: bool


class MetaLpips(Lpips):
    """LPIPS without weights and without autocast, which the meta device does not know. phase: around each call."""

    phase: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        dtype = PRECISIONS.load(self.options.precision)
        with self.phase():
            return _compare(self._network, *(self._prepare(x).to(dtype) for x in (a, b)))

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        if self._network is not None:  # a step that asks for it again does not make it again
            return
        with META:
            linear = [torch.empty(1, width, 1, 1) for width in FEATURES.values()]
            self._network = assemble(meta_vgg(), linear, self.average_pool)
        self._network.to(PRECISIONS.load(self.options.precision))
        self._network.mean, self._network.std = (torch.empty(1, 3, 1, 1, device=META) for _ in range(2))
        self._device = META


def make_network(config: Config, *, train: bool = True, two_times: bool | None = None) -> nn.Module:
    """The configured network on the meta device, in its precision. two_times: as in `create_network`."""
    with shapes_only():
        network = create_network(config, two_times=two_times).train(train)
    if precision(config) != "fp32":
        network.convert_torso(PRECISIONS.load(precision(config)))
    return network.requires_grad_(train)


def weigh(network: nn.Module) -> Weights:
    """Parameters and bytes of a network."""
    params = list(network.parameters())
    halved = sum(p.numel() for p in params if p.element_size() < 4)
    total = sum(p.numel() for p in params)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(network)]
    largest = max([*blocks, total - sum(blocks)])
    return Weights(total, sum(p.nbytes for p in params), halved, largest)


def step_trace(config: TrainConfig, images: int, *, keep_gradients: bool) -> StepTrace:
    """The losses of a (micro-)batch and their backward pass.

    keep_gradients: gradients are made in the trace and count there; False: they are added to some that exist.
    """
    kept = _relevant(config)
    if keep_gradients:  # which of tensors and gradients make the peak depends on the batch
        return _traced_step(kept, images, True)
    a, b = (_traced_step(kept, n, False) for n in SIZES)
    return replace(a, trace=between(a.trace, b.trace, (images - SIZES[0]) / (SIZES[1] - SIZES[0])))


def step_flops(config: TrainConfig) -> dict[str, float]:
    """FLOPs of one image through a step by phase: student, target, teacher, distance, backward.

    A multiplication and an addition are two; matrix products, convolutions and attention only.
    """
    traced_step = _traced_step(_relevant(config), SIZES[0], False)
    return {phase: flops / SIZES[0] for phase, flops in traced_step.trace.flops_by_phase().items()}


def _relevant(config: Config) -> Config:
    """The configuration with nothing set that a trace does not depend on, so that traces are made once."""
    of_rows = flags_of(type(config)).keys() - flags_of(plain_class(type(config))).keys()
    names = [name for name in (*TRACED, *sorted(of_rows)) if hasattr(config, name) and name not in UNTRACED]
    kept = type(config)(**{name: getattr(config, name) for name in names if not is_fixed(type(config), name)})
    # One stage costs as much as another, and the default number of scales does not halve evenly.
    return replace(kept, start_scales=2) if getattr(kept, "scale_mode", "") == "progdist" else kept


@cache
def _traced_step(config: TrainConfig, images: int, keep_gradients: bool) -> StepTrace:
    objective = _objective(config)
    student = make_network(config)
    with contextlib.ExitStack() as stack:
        if not keep_gradients:
            for p in student.parameters():
                stack.callback(p.register_post_accumulate_grad_hook(_forget).remove)
        roles = _roles(config, objective, student)
        draw = _draw(config, objective, images)
        tracer = stack.enter_context(traced())
        _name_phases(tracer, roles, objective)
        channels, side = config.in_channels or DEFAULT_CHANNELS, config.image_size
        x0, noise = (torch.empty(images, channels, side, side, device=META) for _ in range(2))
        cond = {"y": torch.zeros(images, dtype=torch.int64, device=META)} if config.class_cond else {}
        cond |= {"guidance": torch.ones(images, device=META)} if told_scales(config) else {}
        with tracer.phase("student"):
            terms = objective.forward(roles, x0, replace(draw, noise=noise), 0, **cond)
        tracer.backward_begins()
        terms["loss"].sum().backward()
        trace = tracer.trace()
    return StepTrace(
        trace,
        weigh(student),
        _distance_bytes(objective),
        objective.needs_target,
        objective.needs_teacher + bool(getattr(config, "guide", "")),
        objective.stage(0) is not None,
    )


@cache
def _traced_call(config: Config, images: int) -> tuple[Trace, Weights]:
    network = make_network(config, train=False)
    denoiser = create_denoiser(config, network, consistency=is_consistency(config.training_mode))
    with torch.no_grad(), traced() as tracer:
        side = config.image_size
        x = torch.empty(images, config.in_channels or DEFAULT_CHANNELS, side, side, device=META)
        cond = {"y": torch.zeros(images, dtype=torch.int64, device=META)} if config.class_cond else {}
        denoiser(x, torch.empty(images, device=META), **cond)
    return tracer.trace(), weigh(network)


def call_trace(config: Config, images: int) -> tuple[Trace, Weights]:
    """One evaluation of the network for `images` images, without gradients."""
    kept = _relevant(config)
    (a, weights), (b, _) = (_traced_call(kept, n) for n in SIZES)
    return between(a, b, (images - SIZES[0]) / (SIZES[1] - SIZES[0])), weights


def _name_phases(tracer: Tracer, roles: Roles, objective: Objective) -> None:
    """What a step does beside the student's passes, for `step_flops`."""
    if roles.target is not None:
        tracer.follow(roles.target.net, "target")
    if roles.teacher is not None:
        networks = {roles.teacher.net, getattr(roles.teacher, "baseline", roles.teacher).net}
        for network in filter(lambda net: isinstance(net, nn.Module), networks):
            tracer.follow(network, "teacher")
    if isinstance(objective.distance, MetaLpips):
        objective.distance.phase = lambda: tracer.phase("distance")


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _objective(config: TrainConfig) -> Objective:
    objective = create_objective(config)
    if isinstance(objective.distance, Lpips):
        objective.distance = MetaLpips(objective.distance.options, objective.distance.average_pool)
        objective.distance.load(META)
    return objective


def _roles(config: TrainConfig, objective: Objective, student: nn.Module) -> Roles:
    """Networks that share no weights, because bytes are told apart by their storage."""
    learned = create_denoiser(config, student, consistency=trains_consistency(config))
    target = (
        replace(learned, net=make_network(config).requires_grad_(False)) if objective.needs_target else None
    )
    teacher = None
    if objective.needs_teacher:
        network = make_network(config, train=False, two_times=False)
        teacher = Denoiser(network, create_precond(config, consistency=learns_from(config) == "consistency"))
        if (guidance := guidance_of(config)) is not None:
            # What guides is planned for as if it were as large.
            other = (
                replace(teacher, net=make_network(config, train=False, two_times=False))
                if config.guide
                else teacher
            )
            baseline = unconditional(teacher) if config.class_cond and not config.guide else other
            teacher = GuidedDenoiser(network, teacher.precond, baseline, guidance)
    return Roles(learned, target, teacher)


def _draw(config: TrainConfig, objective: Objective, images: int) -> Draw:
    """A draw for `images` images, its noise apart."""
    x0 = torch.zeros(images, config.in_channels or DEFAULT_CHANNELS, 1, 1)
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, images, images))
    moved = {f.name: getattr(draw, f.name) for f in fields(draw)}
    return replace(draw, **{name: v.to(META) for name, v in moved.items() if isinstance(v, Tensor)})


def _distance_bytes(objective: Objective) -> int:
    lpips = objective.distance
    if not isinstance(lpips, MetaLpips):
        return 0
    return sum(p.nbytes for p in lpips._network.parameters())
