"""The training loop: one engine for every objective, on one process or many.

Order of a step: draw -> (per micro-batch) losses and backward -> optimizer -> moving averages -> target network.
The global batch is honoured exactly: every rank takes its contiguous rows, and losses are averaged over the global
batch whatever the number of ranks and the size of the micro-batches.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import EDMPrecond, Precond
from cm.errors import UserError
from cm.objectives.base import Draw, Objective, Roles
from cm.runtime import distributed, logger
from cm.runtime.liveness import FINISHED
from cm.runtime.preemption import SAVE_FAILED, Stopper
from cm.runtime.progress import progress
from cm.runtime.watchdog import Heartbeat
from cm.seeding import StepRandom, derive_seed
from cm.storage.checkpoint import read_state, verify_checkpoint
from cm.training.anomalies import NumberGuard
from cm.training.compilation import compile_in_place
from cm.training.ema import EmaBank
from cm.training.meters import LossMeter
from cm.training.mixed_precision import MasterWeights, MixedPrecisionTrainer
from cm.training.optimizers import make_optimizer
from cm.training.options import Optimization, Reporting
from cm.training.sharding import Partition, ShardedOptimizer
from cm.training.state import TrainState


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
        stopper: Stopper | None = None,
        heartbeat: Heartbeat | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ):
        if objective.needs_teacher and teacher is None:
            raise UserError("--teacher_model_path: distillation needs a teacher")
        if objective.needs_target and target is None:
            raise ValueError("this objective needs a target network")
        if global_batch_size < distributed.get_world_size():
            raise UserError(
                f"--global_batch_size {global_batch_size} is smaller than the {distributed.get_world_size()} ranks"
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
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.meter = LossMeter(*sigma_range)
        self.guard = NumberGuard(optimization.max_bad_steps)
        self.stopper = stopper or Stopper()
        self.heartbeat = heartbeat
        self.saver = reporting.saver()
        self.state = self._initial_state(target, teacher)
        self.sync_parameters()
        self.ddp_model = self._distributed()
        self.compile = compile
        if compile:
            compile_in_place(net for net in (self.ddp_model, target, teacher) if net is not None)
        self.roles = Roles(
            Denoiser(self.ddp_model, student_precond),
            target and Denoiser(target, student_precond),
            teacher and Denoiser(teacher, teacher_precond or EDMPrecond()),
        )
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in student.modules())
        self._saved_step = -1
        self._begin()

    def _begin(self) -> None:
        self._first_step = self.state.step
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
        self.partition = Partition(student.master_params, sharded=o.shard_optimizer)
        # A teacher that no stage replaces never changes.
        keep_fp32 = self.objective.stage(0) is not None
        return TrainState(
            student=student,
            optimizer=self._new_optimizer(student.master_params),
            ema=EmaBank(
                student.master_params,
                o.ema_rate,
                warmup=o.ema_warmup,
                partition=self.partition,
                device=o.ema_device,
            ),
            objective=self.objective,
            # The target keeps its dropout (student and target share masks); the teacher predicts without.
            target=target and MasterWeights(target.train(), o.precision),
            teacher=teacher and MasterWeights(teacher.eval(), o.precision, keep_fp32=keep_fp32),
            new_optimizer=self._new_optimizer,
        )

    def _new_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer | ShardedOptimizer:
        o = self.optimization
        make = partial(
            make_optimizer,
            o.optimizer,
            lr=o.learning_rate(0),
            weight_decay=o.weight_decay,
            betas=o.betas,
            eps=o.eps,
        )
        return ShardedOptimizer(make, params, self.partition) if self.partition.parts > 1 else make(params)

    def sync_parameters(self) -> None:
        """Give every rank the weights and buffers of rank 0, in all roles; the averages start from them."""
        s = self.state
        for w in (s.student.weights, s.target, s.teacher):
            if w is not None:
                distributed.sync_params([*w.master_params, *w.module.buffers()])
                w.to_model()
        s.ema.reset(s.student.master_params)

    def _distributed(self) -> nn.Module:
        if distributed.get_world_size() == 1:
            return self.model
        # Buffers are constants: no broadcast in each forward pass. torch 2.13 gave the option its second name.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(
            self.model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **{name: False},
            gradient_as_bucket_view=True,
            bucket_cap_mb=128,
        )

    def load(self, checkpoint: Path, *, verified: bool = False) -> None:
        """Continue from a checkpoint directory as if the run had never stopped. All ranks must call it.

        Rank 0 compares the files with their hashes first, unless they have been verified.
        """
        distributed.on_main(lambda: verified or verify_checkpoint(checkpoint))
        self.state.load(checkpoint)
        unread = distributed.on_main(lambda: read_state(checkpoint).get("unread_means", {}))
        self.meter.load_state(unread, self.device)
        self._after_load()

    def load_original(self, model_path: str) -> None:
        """Continue from a run of the original repository."""
        self.state.load_original(model_path)
        self._after_load()

    def _after_load(self) -> None:
        self._saved_step = self.state.step
        self._begin()
        if self.state.step:
            self.anneal_lr()

    @property
    def finished(self) -> bool:
        """True when total_steps are done; total_steps 0 never ends."""
        return 0 < self.total_steps <= self.state.step

    def run_loop(self) -> str:
        """Train to the end, or until the stopper says so; returns why it ended, as `cm.runtime.liveness` names it.

        Logs, saves and draws previews on the way; the last step is always saved.
        """
        stop = ""
        bar = progress(
            total=self.total_steps or None,
            initial=self.state.step,
            desc="train",
            unit="image",
            unit_scale=self.global_batch_size,
            enabled=self.reporting.progress,
        )
        try:
            while not (self.finished or stop):
                self._enter("data")
                batch, cond = next(self.data)
                self._enter("step")
                self.stopper.ask(self.saver.failed)
                self.run_step(batch, cond)
                stop = self.stopper.answer()
                if stop == SAVE_FAILED:
                    self.saver.check()
                self._report()
                bar.update()
            if self._saved_step != self.state.step:
                self.save()
            self.saver.finish()
        finally:
            bar.close()
            self.saver.join()
            if hasattr(self.data, "close"):
                self.data.close()  # ends its worker processes
        return FINISHED if self.finished else stop

    def _report(self) -> None:
        """Log, save and draw what is due after this step."""
        r = self.reporting
        if self._due(r.log_interval):
            self._enter("log")
            self.log_step()
        if self._due(r.save_interval):
            self.save()
        if r.preview and self._due(r.preview_interval or r.save_interval):
            self._enter("preview")
            with self._uncompiled():
                r.preview(self)

    def _uncompiled(self) -> contextlib.AbstractContextManager:
        """Previews have a batch and a mode of their own, which are not worth compiling for."""
        known = self.compile and hasattr(torch.compiler, "set_stance")
        return torch.compiler.set_stance("force_eager") if known else contextlib.nullcontext()

    def _due(self, interval: int) -> bool:
        return self.finished or (interval > 0 and self.state.step % interval == 0)

    def _enter(self, phase: str) -> None:
        """Tell the heartbeat; the first step may compile, download, start workers."""
        if self.heartbeat is not None:
            first = self.state.step == self._first_step and phase in ("data", "step")
            self.heartbeat.phase("first step" if first else phase, self.state.step)

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> bool:
        """One step on this rank's rows; False when bad numbers made it a skipped one, which still counts."""
        state, step = self.state, self.state.step
        stage = self.objective.stage(step)
        if stage is not None and stage.start == step > 0:
            state.promote_student()
            self.guard.forget()
        draw, terms = self.forward_backward(batch, cond)
        took_step = state.student.optimize(state.optimizer)
        if took_step:
            self.update_ema()
            self.update_target_ema()
            self.objective.observe(draw, terms["loss"])
            self.meter.update(terms, draw.t, draw.weight)
            self.meter.add("grad_norm", state.student.grad_norm)
            self.meter.add("param_norm", state.student.param_norm)
        state.count(took_step)
        if not took_step:
            self.guard.skipped(state, batch, draw.t, terms["loss"])
        state.step += 1
        self.anneal_lr()
        return took_step

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> tuple[Draw, dict[str, Tensor]]:
        """Draw for the whole local batch, then losses and gradients by micro-batches; returns draws and losses."""
        x0 = batch.to(self.device, non_blocking=True, memory_format=self.memory_format)
        cond = {name: value.to(self.device, non_blocking=True) for name, value in cond.items()}
        random = self._random(len(x0))
        x0, cond = self.objective.prepare(x0, cond, random)
        draw = self.objective.draw(x0, self.state.step, random)
        self.state.student.zero_grad()
        size = self.microbatch if self.microbatch > 0 else len(x0)
        parts = []
        for start in range(0, len(x0), size):
            part = slice(start, min(start + size, len(x0)))
            last = part.stop == len(x0)
            with contextlib.nullcontext() if last else self._no_sync():
                terms = self.compute_losses(x0[part], draw[part], {k: v[part] for k, v in cond.items()})
                # The process group averages gradients over ranks; this makes it the mean over the global batch.
                share = distributed.get_world_size() / random.global_batch
                loss = (terms["loss"] * draw.weight[part]).sum() * share
                # A loss that is not finite spoils the gradients, and so the step, on all ranks.
                self.state.student.backward(loss * torch.where(torch.isfinite(loss), 1.0, math.nan))
            parts.append({name: values.detach() for name, values in terms.items()})
        return draw, {name: torch.cat([terms[name] for terms in parts]) for name in parts[0]}

    def compute_losses(self, x0: Tensor, draw: Draw, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-sample losses of a micro-batch."""
        return self.objective.forward(self.roles, x0, draw, self.state.step, **cond)

    def _random(self, local_batch: int) -> StepRandom:
        """The source of all draws of this step for the local rows."""
        rank, world = distributed.get_rank(), distributed.get_world_size()
        # One process may be given a batch of any size; several must each bring their rows.
        global_batch = local_batch if world == 1 else self.global_batch_size
        rows = distributed.local_rows(global_batch)
        if len(rows) != local_batch:
            raise ValueError(
                f"rank {rank} got a batch of {local_batch}, but its rows of {global_batch} are {len(rows)}"
            )
        step = self.state.step
        if self._has_dropout:
            torch.manual_seed(derive_seed(self.seed, "dropout", step, rank))
        return StepRandom(self.seed, step, rows.start, rows.stop, global_batch, self.device)

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

    def log_step(self) -> None:
        """Write the means since the last call: losses, norms, schedules, speed."""
        state = self.state
        step, now = state.step, time.perf_counter()
        means = self.meter.read()
        logger.logkvs(means)
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
        self.guard.watch(step, means)

    def save(self) -> None:
        """Write a checkpoint; every rank must call it, and every rank fails if the write fails."""
        self._enter("save")
        scalars = {**self.state.scalars(), "unread_means": self.meter.state()}
        self.saver.save(self.state.files(), scalars)
        self._saved_step = self.state.step
