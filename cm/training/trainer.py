"""The training loop: one engine for every objective, on one process or many.

Order of a step: draw -> (per micro-batch) losses and backward -> optimizer -> moving averages -> target network.
The global batch is honoured exactly: every rank takes its contiguous rows, and losses are averaged over the global
batch whatever the number of ranks and the size of the micro-batches.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cm.errors import UserError
from cm.nn import Dropout
from cm.objectives.base import Draw, Objective, Roles
from cm.runtime import distributed, logger
from cm.runtime.liveness import FINISHED
from cm.runtime.preemption import SAVE_FAILED
from cm.runtime.progress import progress
from cm.seeding import NoiseAhead, StepRandom, derive_seed
from cm.storage.checkpoint import read_state, verify_checkpoint
from cm.storage.saver import Saver
from cm.training.anomalies import NanGuard
from cm.training.compilation import compile_in_place, uncompiled
from cm.training.conditions import Conditions
from cm.training.meters import LossMeter, RunClock, peak_memory_mib
from cm.training.options import BatchSize, Execution, Optimization, Reports, Supervision
from cm.training.setup import distribute, initial_state


class Trainer:
    """Trains the student of `roles` with `objective` on batches of (images, conditions) for this rank's rows.

    roles: denoisers of bare networks on one device, with initial weights. data yields (x0 (b, C, H, W) in [-1, 1],
    {name: (b,) tensor}). total_steps 0: no end. conditions: what is drawn for them, such as hidden classes.
    """

    def __init__(
        self,
        *,
        roles: Roles,
        objective: Objective,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        batch: BatchSize,
        optimization: Optimization,
        saver: Saver,
        reports: Reports,
        total_steps: int = 0,
        seed: int = 0,
        execution: Execution | None = None,
        supervision: Supervision | None = None,
        conditions: Conditions | None = None,
    ):
        ranks = distributed.get_world_size()
        if batch.total < ranks:
            raise UserError(
                f"{batch.total} images per step are fewer than the {ranks} ranks (--global_batch_size)"
            )
        self.execution = execution or Execution()
        self.supervision = supervision or Supervision()
        self.conditions = conditions or Conditions()
        self.objective = objective
        self.data = data
        self.batch = batch
        self.optimization = optimization
        self.saver = saver
        self.reports = reports
        self.total_steps = total_steps
        self.seed = seed
        self.model = roles.student.net
        self.state = initial_state(roles, objective, optimization)
        self.device = self.state.student.master_params[0].device
        self.ddp_model = self.model if self.state.divided else distribute(self.model)
        self.roles = replace(roles, student=replace(roles.student, net=self.ddp_model))
        networks = [role.net for role in (self.roles.student, roles.target, roles.teacher) if role]
        # A teacher in training mode drops out too, under the student's masks.
        modules = [m for net in networks for m in net.modules()]
        self._dropouts = [m for m in modules if isinstance(m, nn.Dropout) and m.p > 0]
        if self.execution.compile:
            compile_in_place(networks)
        self.guard = NanGuard(optimization.max_bad_steps)
        self.meter = LossMeter(*reports.sigma_range)
        self.clock = RunClock(step=0, saved_step=-1)
        # On a CPU the step itself has the cores.
        self._ahead = NoiseAhead() if self.device.type == "cuda" else None

    @property
    def finished(self) -> bool:
        """True when total_steps are done; total_steps 0 never ends."""
        return 0 < self.total_steps <= self.state.step

    # -- the loop ------------------------------------------------------------------------------------------------

    def run_loop(self) -> str:
        """Train to the end, or until the stopper says so; returns why it ended, as `cm.runtime.liveness` names it.

        Logs, saves and draws previews on the way; the last step is always saved.
        """
        stop = ""
        stopper = self.supervision.stopper
        bar = progress(
            total=self.total_steps or None,
            initial=self.state.step,
            desc="train",
            unit="image",
            unit_scale=self.batch.total,
            enabled=self.reports.progress_bar,
        )
        try:
            while not (self.finished or stop):
                self._enter("data")
                with self.clock.waiting():
                    images, cond = next(self.data)
                self._enter("step")
                stopper.ask(self.saver.failed)
                self.run_step(images, cond)
                stop = stopper.answer()
                if stop == SAVE_FAILED:
                    self.saver.check()
                if self.finished:
                    self.guard.check_trained(self.state)
                self._report()
                bar.update()
            if self.clock.saved_step != self.state.step:
                self.save()
            self.saver.finish()
        finally:
            bar.close()
            self.saver.join()
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None
            if hasattr(self.data, "close"):
                self.data.close()  # ends its worker processes
        return FINISHED if self.finished else stop

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> bool:
        """One step on this rank's rows; False when bad numbers made it a skipped one, which still counts."""
        state, step = self.state, self.state.step
        stage = self.objective.stage(step)
        if stage is not None and stage.start == step > 0:
            state.promote_student()
            self.guard.forget()
        draw, terms = self.forward_backward(batch, cond)
        took_step = state.student.optimize(state.optimizer)
        if step == self.clock.first_step:
            self._check_gradients()
        if took_step:
            self.update_ema()
            self.update_target_ema()
            self.objective.observe(draw, terms["loss"])
            self.meter.update(terms, draw.t, draw.weight)
            self.meter.add("grad_norm", state.student.grad_norm)
            self.meter.add("param_norm", state.student.param_norm)
        if state.profiles is not None:  # in a skipped step the weights stood still
            state.profiles.update(state.student.master_params, step)
        state.count(took_step)
        if not took_step:
            self.guard.skipped(state, batch, draw.t, terms["loss"])
        state.step += 1
        self.anneal_lr()
        return took_step

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> tuple[Draw, dict[str, Tensor]]:
        """Draw for the whole local batch, then losses and gradients by micro-batches; returns draws and losses."""
        layout = torch.channels_last if self.execution.channels_last else torch.preserve_format
        x0 = batch.to(self.device, non_blocking=True, memory_format=layout)
        cond = {name: value.to(self.device, non_blocking=True) for name, value in cond.items()}
        random = self._random(len(x0))
        x0, cond = self.objective.prepare(x0, self.conditions(cond, random), random)
        draw = self.objective.draw(x0, self.state.step, random)
        self.state.student.zero_grad()
        size = self.batch.micro if self.batch.micro > 0 else len(x0)
        parts = []
        for start in range(0, len(x0), size):
            part = slice(start, min(start + size, len(x0)))
            last = part.stop == len(x0)
            self._choose_masks(random, part)
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
        global_batch = local_batch if world == 1 else self.batch.total
        rows = distributed.local_rows(global_batch)
        if len(rows) != local_batch:
            raise ValueError(
                f"rank {rank} got a batch of {local_batch}, but its rows of {global_batch} are {len(rows)}"
            )
        step = self.state.step
        return StepRandom(self.seed, step, rows.start, rows.stop, global_batch, self.device, self._ahead)

    def _choose_masks(self, random: StepRandom, part: slice) -> None:
        """Dropout masks of the next micro-batch: functions of the row, whatever the ranks and micro-batches."""
        if not self._dropouts:
            return
        seed = derive_seed(self.seed, "dropout", random.step)
        if not all(isinstance(m, Dropout) for m in self._dropouts):  # torch's own know no rows
            seed = derive_seed(seed, random.start + part.start)
        torch.manual_seed(seed)
        rows = random.row_numbers("dropout")[part]
        for module in self._dropouts:
            module.rows = rows

    def _check_gradients(self) -> None:
        """After the first step, on several ranks: whether all have the same gradients.

        They have not where a loss differentiates a network outside of DistributedDataParallel, whose hooks then sum
        nothing: weights would drift apart without a word.
        """
        if distributed.get_world_size() == 1:
            return
        norms = distributed.all_gather_object(float(self.state.student.grad_norm))
        if all(map(math.isfinite, norms)) and len(set(norms)) > 1:
            raise RuntimeError(
                f"gradients differ between ranks (norms {', '.join(f'{norm:.6g}' for norm in norms)}): "
                f"{type(self.objective).__name__} must differentiate roles.student as it is given, not its bare network"
            )

    def _no_sync(self) -> contextlib.AbstractContextManager:
        if self.state.divided:
            return self.state.student.weights.no_sync()
        return contextlib.nullcontext() if self.ddp_model is self.model else self.ddp_model.no_sync()

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

    # -- what is due after a step --------------------------------------------------------------------------------

    def _report(self) -> None:
        r = self.reports
        if self._due(r.log_interval):
            self._enter("log")
            self.log_step()
        if self._due(r.save_interval):
            self.save()
        if r.preview and self._due(r.preview_interval or r.save_interval):
            self._enter("preview")
            # Previews have a batch and a mode of their own, which are not worth compiling for.
            with uncompiled() if self.execution.compile else contextlib.nullcontext():
                r.preview(self)

    def _due(self, interval: int) -> bool:
        return self.finished or (interval > 0 and self.state.step % interval == 0)

    def _enter(self, phase: str) -> None:
        """Tell the heartbeat; the first step may compile, download, start workers."""
        heartbeat, step = self.supervision.heartbeat, self.state.step
        if heartbeat is not None:
            first = step == self.clock.first_step and phase in ("data", "step")
            heartbeat.phase("first step" if first else phase, step)

    def log_step(self) -> None:
        """Write the means since the last call: losses, norms, schedules, speed, memory."""
        state, batch = self.state, self.batch.total
        step = state.step
        means = self.meter.read()
        logger.logkvs(means)
        logger.logkv("step", step)
        logger.logkv("samples", step * batch)
        logger.logkv("lr", state.optimizer.param_groups[0]["lr"])
        logger.logkv("skipped", state.skipped)
        if state.student.use_fp16:
            logger.logkv("lg_loss_scale", state.student.lg_loss_scale)
        if (scales := self.objective.num_scales(step - 1)) is not None:
            logger.logkv("num_scales", scales)
        if self.objective.needs_target:
            logger.logkv("target_ema", self.objective.target_decay(step - 1))
        steps_per_sec, data_wait = self.clock.lap(step)
        logger.logkv("images_per_sec", steps_per_sec * batch)
        logger.logkv("data_wait", data_wait)
        logger.logkv("peak_memory_mib", peak_memory_mib(self.device))
        logger.dumpkvs()
        self.guard.watch(step, means)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint; every rank must call it, and every rank fails if the write fails."""
        self._enter("save")
        memory_format = {"device": self.device.type, "channels_last": self.execution.channels_last}
        scalars = {**self.state.scalars(), "unread_means": self.meter.state(), "memory_format": memory_format}
        if self.state.divided and not self.finished:
            self.saver.save_shards(self.state.shards(), self.state.files(whole=False), scalars)
        else:
            self.saver.save(self.state.files(), scalars)
        self.clock.saved_step = self.state.step

    def load(self, checkpoint: Path, *, verified: bool = False) -> None:
        """Continue from a checkpoint directory as if the run had never stopped. All ranks must call it.

        Rank 0 compares the files with their hashes first, unless they have been verified.
        """
        distributed.on_main(lambda: verified or verify_checkpoint(checkpoint))
        self.state.load(checkpoint)
        unread = distributed.on_main(lambda: read_state(checkpoint).get("unread_means", {}))
        self.meter.load_state(unread, self.device)
        self._loaded()

    def load_original(self, model_path: str) -> None:
        """Continue from a run of the original repository."""
        self.state.load_original(model_path)
        self._loaded()

    def _loaded(self) -> None:
        self.clock = RunClock(self.state.step, saved_step=self.state.step)
        if self.state.step:
            self.anneal_lr()
