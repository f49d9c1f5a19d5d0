"""Drawing samples from a model as configured: npz, PNG grid, metadata."""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm import __version__
from cm.config.derived import run_dir
from cm.config.parsing import parse_classes, parse_sigmas, parse_ts
from cm.config.rows import TIME_STEPS
from cm.config.scripts import SampleConfig, resolved
from cm.data.images import SampleWriter, save_grid, save_json
from cm.diffusion.denoiser import clamped
from cm.diffusion.sde import create_sde
from cm.errors import UserError
from cm.models.factory import create_alpha_sigma
from cm.models.pretrained import Pretrained, TrainedClassifier, load_classifier, load_pretrained
from cm.nn import append_zero
from cm.runtime import distributed, logger
from cm.sampling.generate import Labels, SampleBatch, generate
from cm.sampling.guidance import guided
from cm.sampling.noise import get_generator
from cm.sampling.registry import run_sampler, sampler_sigmas


def run_image_sample(config: SampleConfig) -> None:
    """Draw --num_samples images over all ranks and write them to --out_dir."""
    distributed.setup_dist(timeout=60 * config.startup_timeout)
    model = load_pretrained(config)
    c = model.config
    channels = c.in_channels or 3
    stem = Path(run_dir(config), f"samples_{c.num_samples}x{c.image_size}x{c.image_size}x{channels}")
    prepare_output(stem, c.overwrite)
    sigmas = model.denoiser.precond.round_sigma(noise_levels(c))
    classifier = load_guide(model)
    logger.log(f"{model.file.path}: weights {model.file.kind}, {c.training_mode}, sampler {c.sampler}")
    logger.log("noise levels: " + ", ".join(f"{s:.4g}" for s in sigmas.tolist()))
    generator = get_generator(c.generator, num_samples=c.num_samples, seed=c.seed)
    labels = class_labels(c, classifier.num_classes if classifier else 0)
    shape = (c.image_size, c.image_size, channels)
    counter = CallCounter()
    arguments = dict(
        num_samples=c.num_samples,
        batch_size=c.batch_size,
        image_shape=shape,
        generator=generator,
        labels=labels,
        keep=c.grid_images,
        progress=True,
    )
    draw = sample_batches(model, generator, sigmas, counter, solver_options(model), classifier)
    if not distributed.is_main():
        generate(draw, **arguments)
        return
    npz = stem.with_suffix(".npz")
    with SampleWriter(npz, (c.num_samples, *shape), labels is not None) as writer:
        kept = generate(draw, writer=writer, **arguments)
    if len(kept):
        save_grid(stem.with_suffix(".png"), kept, c.grid_columns)
    metadata = {
        **model.provenance(),
        **(classifier.provenance() if classifier else {}),
        "config": resolved(c),
        "sigmas": sigmas.tolist(),
        "nfe": counter.per_batch,
        "versions": {"cm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    save_json(stem.with_suffix(".json"), metadata)
    logger.log(f"samples: {npz}")
    if len(kept):
        logger.log(f"picture: {stem.with_suffix('.png')}")


def prepare_output(stem: Path, overwrite: bool) -> None:
    """Make the folder on rank 0; UserError on every rank where it cannot be written or already holds these samples."""
    problem = None
    if distributed.is_main():
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out_dir {stem.parent} cannot be written: {error.strerror}"
        if stem.with_suffix(".npz").exists() and not overwrite:
            problem = (
                f"{stem.with_suffix('.npz')} is already there: give --overwrite True or another --out_dir"
            )
    problem = distributed.broadcast_object(problem)
    if problem:
        raise UserError(problem)


def noise_levels(config: SampleConfig) -> Tensor:
    """The decreasing noise levels that the sampler walks along, float64, the last included."""
    if config.sigmas:
        levels = parse_sigmas(config.sigmas, config.sigma_min, config.sigma_max)
        return torch.tensor([*levels, config.sigma_min], dtype=torch.float64)
    grid = config.steps, config.sigma_min, config.sigma_max, config.rho
    if config.sampler == "progdist" and config.diffusion_schedule:
        return create_alpha_sigma(config).steps(config.steps).double()
    if config.sampler == "pc":
        return append_zero(create_sde(config.sde, config.sigma_min, config.sigma_max).levels(*grid))
    if config.time_steps:
        return append_zero(TIME_STEPS.load(config.time_steps)(*grid))
    return sampler_sigmas(config.sampler, *grid, ts=complete_ts(config))


def solver_options(model: Pretrained[SampleConfig]) -> dict[str, Any]:
    """The options of the family's samplers, as flags give them."""
    c = model.config
    return {
        "noise_schedule": c.noise_schedule,
        "state_scale": c.state_scale,
        "order": c.solver_order,
        "alpha": c.solver_alpha,
        "round_sigma": model.denoiser.precond.round_sigma,
        "sde": create_sde(c.sde, c.sigma_min, c.sigma_max),
        "predictor": c.predictor,
        "corrector": c.corrector,
        "corrector_steps": c.corrector_steps,
        "snr": c.snr,
        "tolerance": c.tolerance,
    }


def load_guide(model: Pretrained[SampleConfig]) -> TrainedClassifier | None:
    """The classifier of --classifier_path, checked against the model."""
    c = model.config
    if not c.classifier_path:
        return None
    return load_classifier(
        c,
        image_size=c.image_size,
        channels=c.in_channels or 3,
        num_classes=c.num_classes if c.class_cond else 0,
        device=model.device,
    )


def complete_ts(config: SampleConfig) -> list[int] | None:
    """--ts with the last grid index appended where it is missing, since sampling that stops earlier leaves noise."""
    if config.sampler != "multistep" or not config.ts:
        return None
    ts = list(parse_ts(config.ts, config.steps))
    if ts[-1] != config.steps - 1:
        ts.append(config.steps - 1)
        logger.log(
            f"note: --ts ends before the grid does; {config.steps - 1} was appended so that no noise is left"
        )
    return ts


def class_labels(config: SampleConfig, guided_classes: int = 0) -> Labels | None:
    """The class of each sample; None for unconditional models without a classifier of guided_classes classes."""
    total = config.num_classes if config.class_cond else guided_classes
    if not total:
        return None
    classes = parse_classes(config.classes, total) if config.classes else ()
    return Labels(total, config.seed, classes)


class CallCounter:
    """Counts network evaluations of the first batch."""

    def __init__(self):
        self.per_batch = 0
        self._counting = True

    def wrap(self, denoise: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The same function, counted."""

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            self.per_batch += self._counting
            return denoise(x, sigma)

        return counted

    def batch_done(self) -> None:
        """Later batches are not counted."""
        self._counting = False


def sample_batches(
    model: Pretrained[SampleConfig],
    generator,
    sigmas: Tensor,
    counter: CallCounter | None = None,
    options: Mapping[str, Any] | None = None,
    classifier: TrainedClassifier | None = None,
) -> SampleBatch:
    """(n, labels) -> n images in [-1, 1] with the configured sampler; starts from noise of level sigmas[0].

    options: of the sampler, besides those that every configuration has. classifier: guides towards the labels.
    """
    c = model.config
    counter = counter or CallCounter()

    @torch.no_grad()
    def draw(count: int, labels: Tensor | None) -> Tensor:
        cond = {"y": labels.to(model.device)} if c.class_cond else {}
        denoise = counter.wrap(lambda x, sigma: model.denoiser(x, sigma, **cond))
        denoise = clamped(denoise) if c.clip_denoised else denoise
        own = dict(options or {})
        if classifier is not None:
            gradient = classifier.model.gradient(labels.to(model.device), c.classifier_scale)
            if c.sampler == "ancestral":
                own["gradient"] = gradient
            else:
                denoise = guided(denoise, gradient)
        size = (count, c.in_channels or 3, c.image_size, c.image_size)
        x = run_sampler(
            c.sampler,
            denoise,
            generator.randn(*size, device=model.device) * float(sigmas[0]),
            generator,
            steps=c.steps,
            sigma_min=c.sigma_min,
            s_churn=c.s_churn,
            s_tmin=c.s_tmin,
            s_tmax=c.s_tmax,
            s_noise=c.s_noise,
            sigmas=sigmas,
            options=own,
        )
        counter.batch_done()
        return x.clamp(-1, 1)

    return draw
