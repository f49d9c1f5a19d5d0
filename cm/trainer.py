"""The training loop: one engine for every objective, on one process or many.

Order of a step: draw -> (per micro-batch) losses and backward -> optimizer -> moving averages -> target network.
The global batch is honoured exactly: every rank takes its contiguous rows, and losses are averaged over the global
batch whatever the number of ranks and the size of the micro-batches.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cm import dist_util, logger
from cm.checkpoint import complete_checkpoints, prune_checkpoints, write_checkpoint
from cm.denoiser import Denoiser
from cm.ema import EmaBank
from cm.errors import UserError
from cm.fp16_util import MasterWeights, MixedPrecisionTrainer
from cm.meters import LossMeter
from cm.objectives.base import Draw, Objective, Roles
from cm.optim import make_optimizer
from cm.precond import EDMPrecond, Precond
from cm.random_util import StepRandom, derive_seed
from cm.schedules import LearningRate
from cm.train_state import TrainState


@dataclass(frozen=True)
class Optimization:
    """How the student's weights move."""

    learning_rate: LearningRate
    optimizer: str = "radam"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 0.0
    precision: str = "fp32"
    fp16_scale_growth: float = 1e-3
    ema_rate: str | float = "0.9999"
    ema_warmup: bool = False
    max_bad_steps: int = 100


@dataclass(frozen=True)
class Reporting:
    """What a run leaves behind: logs every log_interval steps, checkpoints every save_interval (-1: at the end)."""

    run_dir: str
    log_interval: int = 10
    save_interval: int = 10000
    keep_last: int = 0
    keep_every: int = 0
    meta: dict = field(default_factory=dict)
    preview: Callable[["Trainer"], None] | None = None
    preview_interval: int = 0  # 0: at each checkpoint


class Trainer:
    """Trains `student` with `objective` on batches of (images, conditions) for this rank's rows.

    data yields (x0 (b, C, H, W) in [-1, 1], {name: (b,) tensor}). student, target and teacher are bare networks on
    one device; the target starts as a copy of the student if None is given and the objective needs one.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        objective: Objective,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        global_batch_size: int,
        optimization: Optimization,
        reporting: Reporting,
        student_precond: Precond,
        target: nn.Module | None = None,
        teacher: nn.Module | None = None,
        teacher_precond: Precond | None = None,
        microbatch: int = -1,
        total_steps: int = 0,
        seed: int = 0,
        sigma_range: tuple[float, float] = (0.002, 80.0),
    ):
        if objective.needs_teacher and teacher is None:
            raise UserError("--teacher_model_path: distillation needs a teacher")
        if objective.needs_target and target is None:
            raise ValueError("this objective needs a target network")
        if global_batch_size < dist_util.get_world_size():
            raise UserError(
                f"--global_batch_size {global_batch_size} is smaller than the {dist_util.get_world_size()} ranks"
            )
        self.model = student
        self.objective = objective
        self.data = data
        self.global_batch_size = global_batch_size
        self.microbatch = microbatch
        self.total_steps = total_steps
        self.seed = seed
        self.optimization = optimization
        self.reporting = reporting
        self.device = next(student.parameters()).device
        self.meter = LossMeter(*sigma_range)
        self.state = self._initial_state(target, teacher)
        self.sync_parameters()
        self.ddp_model = self._distributed()
        self.roles = Roles(
            Denoiser(self.ddp_model, student_precond),
            target and Denoiser(target, student_precond),
            teacher and Denoiser(teacher, teacher_precond or EDMPrecond()),
        )
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in student.modules())
        self._saved_step = -1
        self._logged = (self.state.step, time.perf_counter())

    def _initial_state(self, target: nn.Module | None, teacher: nn.Module | None) -> TrainState:
        o = self.optimization
        student = MixedPrecisionTrainer(
            model=self.model.train(),
            precision=o.precision,
            fp16_scale_growth=o.fp16_scale_growth,
            grad_clip=o.grad_clip,
        )
        for role in (target, teacher):
            if role is not None:
                role.requires_grad_(False)
        return TrainState(
            student=student,
            optimizer=self._new_optimizer(student.master_params),
            ema=EmaBank(student.master_params, o.ema_rate, warmup=o.ema_warmup),
            objective=self.objective,
            # The target keeps its dropout (student and target share masks); the teacher predicts without.
            target=target and MasterWeights(target.train(), o.precision),
            teacher=teacher and MasterWeights(teacher.eval(), o.precision),
            new_optimizer=self._new_optimizer,
        )

    def _new_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        o = self.optimization
        return make_optimizer(
            o.optimizer, params, lr=o.learning_rate(0), weight_decay=o.weight_decay, betas=o.betas, eps=o.eps
        )

    def sync_parameters(self) -> None:
        """Give every rank the weights of rank 0, in all roles and averages."""
        s = self.state
        weights = [w for w in (s.student.weights, s.target, s.teacher) if w is not None]
        for params in (*(w.master_params for w in weights), *s.ema.copies):
            dist_util.sync_params(params)
        for w in weights:
            w.to_model()

    def _distributed(self) -> nn.Module:
        if dist_util.get_world_size() == 1:
            return self.model
        return DistributedDataParallel(
            self.model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=128,
        )

    def load(self, checkpoint) -> None:
        """Continue from a checkpoint directory (a Path) as if the run had never stopped."""
        self.state.load(checkpoint)
        self._after_load()

    def load_original(self, model_path: str) -> None:
        """Continue from a run of the original repository."""
        self.state.load_original(model_path)
        self._after_load()

    def _after_load(self) -> None:
        self._saved_step = self.state.step
        self._logged = (self.state.step, time.perf_counter())
        if self.state.step:
            self.anneal_lr()

    @property
    def finished(self) -> bool:
        """True when total_steps are done; total_steps 0 never ends."""
        return 0 < self.total_steps <= self.state.step

    def run_loop(self) -> None:
        """Train until total_steps, logging and saving on the way; the last step is always saved."""
        while not self.finished:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self._due(self.reporting.log_interval):
                self.log_step()
            if self._due(self.reporting.save_interval):
                self.save()
            if self.reporting.preview and self._due(
                self.reporting.preview_interval or self.reporting.save_interval
            ):
                self.reporting.preview(self)
        if self._saved_step != self.state.step:
            self.save()

    def _due(self, interval: int) -> bool:
        return self.finished or (interval > 0 and self.state.step % interval == 0)

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> bool:
        """One step on this rank's rows; False when bad gradients made it a skipped one, which still counts."""
        state, step = self.state, self.state.step
        stage = self.objective.stage(step)
        if stage is not None and stage.start == step > 0:
            state.promote_student()
        self.forward_backward(batch, cond)
        took_step = state.student.optimize(state.optimizer)
        if took_step:
            self.update_ema()
            self.update_target_ema()
        self._count_bad_steps(took_step)
        logger.logkv_mean("grad_norm", state.student.grad_norm)
        logger.logkv_mean("param_norm", state.student.param_norm)
        state.step += 1
        self.anneal_lr()
        return took_step

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """Draw for the whole local batch, then losses and gradients by micro-batches."""
        x0 = batch.to(self.device, non_blocking=True)
        cond = {name: value.to(self.device, non_blocking=True) for name, value in cond.items()}
        draw, global_batch = self._draw(x0)
        self.state.student.zero_grad()
        size = self.microbatch if self.microbatch > 0 else len(x0)
        losses = []
        for start in range(0, len(x0), size):
            part = slice(start, min(start + size, len(x0)))
            last = part.stop == len(x0)
            with contextlib.nullcontext() if last else self._no_sync():
                terms = self.compute_losses(x0[part], draw[part], {k: v[part] for k, v in cond.items()})
                # The process group averages gradients over ranks; this makes it the mean over the global batch.
                share = dist_util.get_world_size() / global_batch
                self.state.student.backward((terms["loss"] * draw.weight[part]).sum() * share)
            self.meter.update(terms, draw.t[part], draw.weight[part])
            losses.append(terms["loss"].detach())
        self.objective.observe(draw, torch.cat(losses))

    def compute_losses(self, x0: Tensor, draw: Draw, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-sample losses of a micro-batch."""
        return self.objective.forward(self.roles, x0, draw, self.state.step, **cond)

    def _draw(self, x0: Tensor) -> tuple[Draw, int]:
        """Everything random of this step for the local rows, and the size of the global batch."""
        rank, world = dist_util.get_rank(), dist_util.get_world_size()
        # One process may be given a batch of any size; several must each bring their rows.
        global_batch = len(x0) if world == 1 else self.global_batch_size
        rows = dist_util.local_rows(global_batch)
        if len(rows) != len(x0):
            raise ValueError(
                f"rank {rank} got a batch of {len(x0)}, but its rows of {global_batch} are {len(rows)}"
            )
        step = self.state.step
        if self._has_dropout:
            torch.manual_seed(derive_seed(self.seed, "dropout", step, rank))
        random = StepRandom(self.seed, step, rows.start, rows.stop, global_batch, self.device)
        return self.objective.draw(x0, step, random), global_batch

    def _no_sync(self) -> contextlib.AbstractContextManager:
        distributed = isinstance(self.ddp_model, DistributedDataParallel)
        return self.ddp_model.no_sync() if distributed else contextlib.nullcontext()

    def update_ema(self) -> None:
        """Move every average towards the student."""
        self.state.ema.update(self.state.student.master_params, self.state.step)

    def update_target_ema(self) -> None:
        """theta- <- mu theta- + (1 - mu) theta with mu of this step (Song et al. 2023, Algorithm 2)."""
        target = self.state.target
        if target is not None:
            target.ema_from(self.state.student.master_params, self.objective.target_decay(self.state.step))

    def anneal_lr(self) -> None:
        """Set the learning rate that follows the step just taken; stages of distillation restart the decay."""
        done = self.state.step - 1
        stage = self.objective.stage(done)
        rate = self.optimization.learning_rate
        lr = rate(done + 1) if stage is None else rate(done + 1 - stage.start, stage.length)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr

    def _count_bad_steps(self, took_step: bool) -> None:
        state = self.state
        state.bad_steps = 0 if took_step else state.bad_steps + 1
        state.skipped += not took_step
        if state.bad_steps >= self.optimization.max_bad_steps:
            raise UserError(
                f"{state.bad_steps} steps in a row had gradients that are not finite (step {state.step}, loss scale "
                f"2^{state.student.lg_loss_scale:g}); lower --lr, use --precision bf16, or raise --max_bad_steps"
            )

    def log_step(self) -> None:
        """Write the means since the last call: losses, norms, schedules, speed."""
        state = self.state
        step, now = state.step, time.perf_counter()
        for name, value in self.meter.read().items():
            logger.logkv(name, value)
        logger.logkv("step", step)
        logger.logkv("samples", step * self.global_batch_size)
        logger.logkv("lr", state.optimizer.param_groups[0]["lr"])
        logger.logkv("skipped", state.skipped)
        if state.student.use_fp16:
            logger.logkv("lg_loss_scale", state.student.lg_loss_scale)
        if (scales := self.objective.num_scales(step - 1)) is not None:
            logger.logkv("num_scales", scales)
        if self.objective.needs_target:
            logger.logkv("target_ema", self.objective.target_decay(step - 1))
        last_step, last_time = self._logged
        logger.logkv(
            "images_per_sec", (step - last_step) * self.global_batch_size / max(now - last_time, 1e-9)
        )
        self._logged = (step, now)
        logger.dumpkvs()

    def save(self) -> None:
        """Write a checkpoint from rank 0; every rank waits, and every rank fails if the write fails."""
        r, state = self.reporting, self.state
        problem = None
        if dist_util.is_main():
            try:
                path = write_checkpoint(r.run_dir, state.step, state.files(), state.scalars(), r.meta)
                prune_checkpoints(r.run_dir, r.keep_last, r.keep_every)
                logger.log(f"saved {path}")
            except OSError as error:
                earlier = complete_checkpoints(r.run_dir)
                kept = f"; the newest complete checkpoint is {earlier[-1]}" if earlier else ""
                problem = f"could not save step {state.step} under {r.run_dir}: {error}{kept}"
        problem = dist_util.broadcast_object(problem)
        if problem:
            raise UserError(problem)
        self._saved_step = state.step
