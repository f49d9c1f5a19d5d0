"""Training loops under the names and keywords that outside code uses; the engine is `cm.training.trainer.Trainer`.

The loops take a KarrasDenoiser (or a subclass with its own losses) as `diffusion` and call its loss methods with
every draw made for them, so that an overridden loss takes effect and still sees reproducible noise.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.noise_levels import LogNormalSampler, NoiseSampler, ScheduleSampler
from cm.diffusion.precond import EDMPrecond
from cm.errors import choose
from cm.objectives.base import Draw, Objective, Roles
from cm.objectives.curricula import EmaAndScales, Stage, progdist_stage
from cm.objectives.pairs import draw_pair
from cm.objectives.progressive import interval_at
from cm.runtime import distributed, logger
from cm.seeding import StepRandom
from cm.storage.saver import Saver
from cm.training.learning_rate import LearningRate
from cm.training.options import BatchSize, Optimization, Reports
from cm.training.trainer import Trainer


class DiffusionObjective(Objective):
    """The training_losses of a diffusion object, at noise levels from a schedule sampler."""

    def __init__(self, diffusion, schedule_sampler: NoiseSampler):
        self.diffusion = diffusion
        self.schedule_sampler = schedule_sampler

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        if _samples_itself(self.schedule_sampler):
            t, weight = self.schedule_sampler.sample(len(x0), x0.device)
            index = None
        else:
            t, weight, index = self.schedule_sampler.draw(random)
        return Draw(t=t, noise=random.noise(tuple(x0.shape[1:])), weight=weight, index=index)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        return self.diffusion.training_losses(
            roles.student.net, x0, draw.t, model_kwargs=cond, noise=draw.noise
        )

    def observe(self, draw: Draw, losses: Tensor) -> None:
        if isinstance(self.schedule_sampler, ScheduleSampler):
            positions = draw.t if draw.index is None else draw.index
            self.schedule_sampler.observe(positions, losses)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if _samples_itself(self.schedule_sampler) else self.schedule_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.schedule_sampler.load_state_dict(state)


def _samples_itself(sampler) -> bool:
    """Whether a schedule sampler from outside brings its own `sample`, as the original's do, and no `draw`."""
    for names in (vars(sampler), *map(vars, type(sampler).__mro__)):
        if "draw" in names or "sample" in names:
            return "draw" not in names
    return False


class DiffusionConsistencyObjective(Objective):
    """The consistency_losses of a diffusion object; with a teacher distillation, without training."""

    needs_target = True

    def __init__(self, diffusion, teacher_diffusion, ema_scale_fn: Callable[[int], tuple[float, int]]):
        self.diffusion = diffusion
        self.teacher_diffusion = teacher_diffusion
        self.ema_scale_fn = ema_scale_fn
        self.needs_teacher = teacher_diffusion is not None

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        return draw_pair(self.diffusion.grid, self.num_scales(step), x0, random)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        target = {"target_model": roles.target.net}
        return self._losses(self.diffusion.consistency_losses, roles, x0, draw, step, cond, **target)

    def _losses(self, losses: Callable, roles: Roles, x0: Tensor, draw: Draw, step: int, cond: dict, **more):
        return losses(
            roles.student.net,
            x0,
            self.num_scales(step),
            model_kwargs=cond,
            teacher_model=roles.teacher.net if roles.teacher else None,
            teacher_diffusion=self.teacher_diffusion,
            noise=draw.noise,
            indices=draw.index,
            **more,
        )

    def target_decay(self, step: int) -> float:
        return self.ema_scale_fn(step)[0]

    def num_scales(self, step: int) -> int:
        return self.ema_scale_fn(step)[1]


class DiffusionProgressiveObjective(DiffusionConsistencyObjective):
    """The progdist_losses of a diffusion object, through the stages of its schedule."""

    needs_target = False

    def __init__(self, diffusion, teacher_diffusion, ema_scale_fn: EmaAndScales):
        super().__init__(diffusion, teacher_diffusion, ema_scale_fn)
        self.needs_teacher = True

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        intervals = self.num_scales(step)
        index = random.randint(0, intervals)
        return interval_at(self.diffusion.grid, intervals, index, random.noise(tuple(x0.shape[1:])))

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        return self._losses(self.diffusion.progdist_losses, roles, x0, draw, step, cond)

    def target_decay(self, step: int) -> float:
        return 0.0

    def stage(self, step: int) -> Stage:
        return progdist_stage(step, self.ema_scale_fn.start_scales, self.ema_scale_fn.distill_steps_per_iter)

    def num_scales(self, step: int) -> int:
        return self.stage(step).num_scales


class TrainLoop(Trainer):
    """Train a model with `diffusion.training_losses` (an EDM teacher).

    batch_size is per rank; data yields (images (batch_size, C, H, W) in [-1, 1], conditions). Checkpoints and logs
    go to `cm.runtime.logger.get_dir()`. Training ends at total_training_steps, else at lr_anneal_steps, else never.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: str | float,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: NoiseSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        total_training_steps: int = 0,
        seed: int = 0,
        precision: str | None = None,
    ):
        objective = self._make_objective(diffusion, schedule_sampler)
        self.diffusion = diffusion
        self.microbatch = microbatch
        # The diffusion object applies its own preconditionings; the loop hands it bare networks.
        networks = (model, self.target_model, self.teacher_model)
        super().__init__(
            roles=Roles(*(None if net is None else Denoiser(net, EDMPrecond()) for net in networks)),
            objective=objective,
            data=data,
            batch=BatchSize(batch_size * distributed.get_world_size(), microbatch),
            optimization=Optimization(
                LearningRate(lr, "linear" if lr_anneal_steps else "constant", lr_anneal_steps),
                weight_decay=weight_decay,
                precision=precision or ("fp16" if use_fp16 else "fp32"),
                fp16_scale_growth=fp16_scale_growth,
                ema_rate=ema_rate,
            ),
            saver=Saver(logger.get_dir()),
            reports=Reports(
                log_interval, save_interval, sigma_range=(diffusion.sigma_min, diffusion.sigma_max)
            ),
            total_steps=total_training_steps or lr_anneal_steps,
            seed=seed,
        )
        if resume_checkpoint:
            self.load_original(resume_checkpoint)

    target_model: nn.Module | None = None
    teacher_model: nn.Module | None = None

    def _make_objective(self, diffusion, schedule_sampler: NoiseSampler | None) -> Objective:
        return DiffusionObjective(diffusion, schedule_sampler or LogNormalSampler())

    @property
    def step(self) -> int:
        """Steps done, skipped ones included; never resets."""
        return self.state.step

    @property
    def opt(self) -> torch.optim.Optimizer:
        """The optimizer over the fp32 master weights."""
        return self.state.optimizer

    @property
    def mp_trainer(self):
        """The student's mixed-precision trainer."""
        return self.state.student

    @property
    def ema_params(self) -> list[list[Tensor]]:
        """One list of averaged weights per rate, in parameter order."""
        return self.state.ema.copies

    @property
    def ema_rate(self) -> list[float]:
        """The rates of ema_params."""
        return self.state.ema.rates


class CMTrainLoop(TrainLoop):
    """Train a consistency model (consistency_distillation, consistency_training) or distil progressively (progdist).

    ema_scale_fn(step) -> (target decay, number of scales), from `create_ema_and_scales_fn`.
    """

    def __init__(
        self,
        *,
        target_model: nn.Module | None,
        teacher_model: nn.Module | None,
        teacher_diffusion,
        training_mode: str,
        ema_scale_fn: Callable[[int], tuple[float, int]],
        total_training_steps: int,
        **kwargs,
    ):
        choose(TRAINING_MODES, training_mode, "training_mode")
        self.training_mode = training_mode
        self.ema_scale_fn = ema_scale_fn
        # Roles that a mode has no use for are left alone, as published training commands pass a teacher.
        self.target_model = None if training_mode == "progdist" else target_model
        self.teacher_model = None if training_mode == "consistency_training" else teacher_model
        self.teacher_diffusion = teacher_diffusion
        super().__init__(total_training_steps=total_training_steps, **kwargs)

    def _make_objective(self, diffusion, schedule_sampler: NoiseSampler | None) -> Objective:
        # Consistency losses draw their own grid indices: a schedule sampler has no part in them.
        return TRAINING_MODES[self.training_mode](diffusion, self.teacher_diffusion, self.ema_scale_fn)

    @property
    def global_step(self) -> int:
        """The same as `step`, under the name that consistency code uses."""
        return self.state.step


# training_mode -> objective(diffusion, teacher_diffusion, ema_scale_fn)
TRAINING_MODES = {
    "consistency_distillation": lambda d, teacher, fn: DiffusionConsistencyObjective(d, teacher or d, fn),
    "consistency_training": lambda d, teacher, fn: DiffusionConsistencyObjective(d, None, fn),
    "progdist": DiffusionProgressiveObjective,
}
