"""Sample grids during training: always the same noise and labels, from the slowest average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cm.config.derived import last_known, training_mode
from cm.config.rows import OBJECTIVES, SAMPLERS
from cm.config.scripts import TrainConfig
from cm.data.images import save_grid, to_uint8
from cm.errors import UserError
from cm.models.pretrained import Model
from cm.runtime import distributed, logger
from cm.sampling.noise import get_generator
from cm.sampling.registry import run_sampler
from cm.training.trainer import Trainer

DENOISER_STEPS = 18  # of denoisers that were not distilled
JUMPS = {"onestep": 1, "fourstep": 4}  # of flow maps
MAX_STEPS = 32  # of progressive distillation, whose first stages have very many
# Where on the grid of noise levels, from 0 at sigma_max to 1, the second evaluation of two takes place
SECOND_EVALUATION = 0.6


class Preview:
    """Draws `preview_count` images into <run>/previews/step_<n>_<sampler>.png; rank 0 draws, others wait or help."""

    def __init__(self, config: TrainConfig, directory: str):
        self.config = config
        self.folder = Path(directory, "previews")

    def __call__(self, trainer: Trainer) -> None:
        """Draw and save the grids of the current step; every rank must call it."""
        ema, divided = trainer.state.ema, trainer.state.divided
        number = ema.rates.index(ema.slowest)
        average = ema.copies[number] if divided else ema.whole(number)
        if divided or distributed.is_main():  # blocks are gathered from all ranks
            with weights_replaced(trainer, average):
                for name, images in self.samples(trainer):
                    if distributed.is_main():
                        self._save(name, images, trainer.state.step)
        distributed.barrier()

    def _save(self, name: str, images: Tensor, step: int) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step_{step:06d}_{name}.png"
        try:
            save_grid(path, to_uint8(images))
            logger.log(f"preview: {path}")
            logger.log_picture(name, path, step)
        except UserError as error:  # not finite: what becomes of the run is the trainer's to say
            logger.log(f"warning: no preview {path.name}: {error}")

    def samples(self, trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
        """(name, images in [-1, 1]) of each way to sample that suits the objective."""
        objective, done = trainer.objective, trainer.state.step
        row = OBJECTIVES[training_mode(self.config)]
        if row.segments:
            steps = self.config.segments
            yield f"{row.sampler}{steps}", self._draw(trainer, row.sampler, steps)
        elif row.stages:
            steps = min(objective.num_scales(max(done - 1, 0)), MAX_STEPS)
            yield f"{row.sampler}{steps}", self._draw(trainer, row.sampler, steps)
        elif row.two_times:
            for name, steps in JUMPS.items():
                yield name, self._draw(trainer, row.sampler, steps)
        elif not row.consistency:
            yield f"{row.sampler}{DENOISER_STEPS}", self._draw(trainer, row.sampler, DENOISER_STEPS)
        else:
            # Continuous-time objectives have no grid of their own.
            scales = objective.num_scales(done) or self.config.start_scales
            second = max(round(SECOND_EVALUATION * (scales - 1)), min(1, scales - 1))
            second = min(second, last_known(self.config, scales))
            yield "onestep", self._draw(trainer, "onestep", scales)
            yield "twostep", self._draw(trainer, "multistep", scales, [0, second, scales - 1])

    @torch.no_grad()
    def _draw(self, trainer: Trainer, sampler: str, steps: int, ts: list[int] | None = None) -> Tensor:
        c, count = self.config, self.config.preview_count
        model = Model(c, replace(trainer.roles.student, net=trainer.model), trainer.device)
        generator = get_generator("indexed", num_samples=count, seed=0)
        generator.set_rows(range(count))
        x = generator.randn(count, c.in_channels, c.image_size, c.image_size, device=trainer.device)
        return run_sampler(
            sampler,
            model.denoise(
                torch.arange(count) % c.num_classes if c.class_cond else None, reads=SAMPLERS[sampler].reads
            ),
            x * c.sigma_max,
            generator,
            steps=steps,
            sigma_min=c.sigma_min,
            sigma_max=c.sigma_max,
            rho=c.rho,
            ts=ts,
            options={"diffusion_schedule": c.diffusion_schedule},
        ).clamp(-1, 1)


@contextmanager
def weights_replaced(trainer: Trainer, weights: list[Tensor]) -> Iterator[None]:
    """The student carries other weights, like its masters, within the body, in eval mode."""
    student = trainer.state.student.weights
    own = [p.detach().clone() for p in student.master_params]
    try:
        student.copy_from(weights)
        trainer.model.eval()
        yield
    finally:
        student.copy_from(own)
        trainer.model.train()
