"""From networks to the state of a training run: precision, optimizer, averages, equal weights on all ranks, DDP."""

import inspect
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cm.config.parsing import parse_ema_profiles
from cm.diffusion.denoiser import Denoiser
from cm.errors import UserError
from cm.objectives.base import Objective, Roles
from cm.runtime import distributed
from cm.training.ema import EmaBank
from cm.training.mixed_precision import MasterWeights, MixedPrecisionTrainer
from cm.training.optimizers import make_optimizer
from cm.training.options import Optimization
from cm.training.posthoc_ema import ProfileBank
from cm.training.sharding import Partition, ShardedOptimizer
from cm.training.state import TrainState


def initial_state(roles: Roles, objective: Objective, optimization: Optimization) -> TrainState:
    """The state before the first step, equal on all ranks; the networks get their precision and their mode."""
    o = optimization
    _check_roles(roles, objective)
    make = MasterWeights
    if o.shard == "fsdp" and distributed.get_world_size() > 1:
        from cm.training.fsdp import ShardedWeights as make
    student = MixedPrecisionTrainer(
        model=roles.student.net.train(),
        precision=o.precision,
        fp16_scale_growth=o.fp16_scale_growth,
        grad_clip=o.grad_clip,
        weights=make,
    )
    # The target keeps its dropout (student and target share masks); the teacher predicts without.
    target = roles.target and make(_frozen(roles.target).train(), o.precision)
    # A teacher that no stage replaces never changes.
    replaced = objective.stage(0) is not None
    teacher = roles.teacher and make(_frozen(roles.teacher).eval(), o.precision, keep_fp32=replaced)
    partition = (
        student.weights.layout
        if student.weights.divided
        else Partition(student.master_params, sharded=o.shard == "optimizer")
    )
    kept = {"partition": partition, "device": o.ema_device}
    lengths = parse_ema_profiles(o.ema_profiles)
    new_optimizer = partial(_new_optimizer, optimization=o, partition=partition)
    state = TrainState(
        student=student,
        optimizer=new_optimizer(student.master_params),
        ema=EmaBank(student.master_params, o.ema_rate, warmup=o.ema_warmup, **kept),
        profiles=ProfileBank(student.master_params, lengths, **kept) if lengths else None,
        objective=objective,
        target=target,
        teacher=teacher,
        new_optimizer=new_optimizer,
    )
    synchronize(state)
    return state


def _check_roles(roles: Roles, objective: Objective) -> None:
    if objective.needs_teacher and roles.teacher is None:
        raise UserError("distillation needs a teacher (--teacher_model_path)")
    if objective.needs_target and roles.target is None:
        raise ValueError("this objective needs a target network")


def _frozen(role: Denoiser) -> nn.Module:
    return role.net.requires_grad_(False)


def _new_optimizer(
    params: list[Tensor], *, optimization: Optimization, partition: Partition
) -> torch.optim.Optimizer | ShardedOptimizer:
    o = optimization
    make = partial(
        make_optimizer,
        o.optimizer,
        lr=o.learning_rate(0),
        weight_decay=o.weight_decay,
        betas=o.betas,
        eps=o.eps,
    )
    return ShardedOptimizer(make, params, partition) if partition.parts > 1 else make(params)


def synchronize(state: TrainState) -> None:
    """Give every rank the weights and buffers of rank 0, in all roles; the averages start from them."""
    for weights in (state.student.weights, state.target, state.teacher):
        if weights is not None:
            weights.synchronize()
    state.restart_averages()


def distribute(model: nn.Module) -> nn.Module:
    """The model with gradients that are averaged over ranks (DDP); itself in one process."""
    if distributed.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    # Buffers are constants: no broadcast in each forward pass. torch 2.13 gave the option its second name.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        **{name: False},
        gradient_as_bucket_view=True,
        bucket_cap_mb=128,
    )
