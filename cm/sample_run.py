"""Drawing samples from a model as configured: npz, PNG grid, metadata."""

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cm import __version__, dist_util, logger
from cm.config import SampleConfig, resolved
from cm.derived import run_dir
from cm.errors import UserError
from cm.generate import Labels, SampleBatch, generate
from cm.image_io import SampleWriter, save_grid, save_json
from cm.parsing import parse_classes, parse_sigmas, parse_ts
from cm.pretrained import Pretrained, load_pretrained
from cm.random_util import get_generator
from cm.samplers import clamped, run_sampler, sample_multistep, sampler_sigmas


def run_image_sample(config: SampleConfig) -> None:
    """Draw --num_samples images over all ranks and write them to --out_dir."""
    dist_util.setup_dist(timeout=60 * config.startup_timeout)
    model = load_pretrained(config)
    c = model.config
    channels = c.in_channels or 3
    stem = Path(run_dir(config), f"samples_{c.num_samples}x{c.image_size}x{c.image_size}x{channels}")
    prepare_output(stem, c.overwrite)
    sigmas = noise_levels(c)
    logger.log(f"{model.file.path}: weights {model.file.kind}, {c.training_mode}, sampler {c.sampler}")
    logger.log("noise levels: " + ", ".join(f"{s:.4g}" for s in sigmas.tolist()))
    generator = get_generator(c.generator, num_samples=c.num_samples, seed=c.seed)
    labels = class_labels(c)
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
    draw = sample_batches(model, generator, sigmas, counter)
    if not dist_util.is_main():
        generate(draw, **arguments)
        return
    npz = stem.with_suffix(".npz")
    with SampleWriter(npz, (c.num_samples, *shape), labels is not None) as writer:
        kept = generate(draw, writer=writer, **arguments)
    if len(kept):
        save_grid(stem.with_suffix(".png"), kept, c.grid_columns)
    metadata = {
        **model.provenance(),
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
    if dist_util.is_main():
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out_dir {stem.parent} cannot be written: {error.strerror}"
        if stem.with_suffix(".npz").exists() and not overwrite:
            problem = (
                f"{stem.with_suffix('.npz')} is already there: give --overwrite True or another --out_dir"
            )
    problem = dist_util.broadcast_object(problem)
    if problem:
        raise UserError(problem)


def noise_levels(config: SampleConfig) -> Tensor:
    """The decreasing noise levels that the sampler walks along, float64, the last included."""
    if config.sigmas:
        levels = parse_sigmas(config.sigmas, config.sigma_min, config.sigma_max)
        return torch.tensor([*levels, config.sigma_min], dtype=torch.float64)
    grid = config.steps, config.sigma_min, config.sigma_max, config.rho
    return sampler_sigmas(config.sampler, *grid, ts=complete_ts(config))


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


def class_labels(config: SampleConfig) -> Labels | None:
    """The class of each sample; None for unconditional models."""
    if not config.class_cond:
        return None
    classes = parse_classes(config.classes, config.num_classes) if config.classes else ()
    return Labels(config.num_classes, config.seed, classes)


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
    model: Pretrained[SampleConfig], generator, sigmas: Tensor, counter: CallCounter | None = None
) -> SampleBatch:
    """(n, labels) -> n images in [-1, 1] with the configured sampler; starts from noise of level sigmas[0]."""
    c = model.config
    counter = counter or CallCounter()

    @torch.no_grad()
    def draw(count: int, labels: Tensor | None) -> Tensor:
        cond = {} if labels is None else {"y": labels.to(model.device)}
        denoise = counter.wrap(lambda x, sigma: model.denoiser(x, sigma, **cond))
        denoise = clamped(denoise) if c.clip_denoised else denoise
        size = (count, c.in_channels or 3, c.image_size, c.image_size)
        x = generator.randn(*size, device=model.device) * float(sigmas[0])
        if c.sampler == "multistep":
            x = sample_multistep(denoise, x, sigmas, generator, sigma_min=c.sigma_min)
        else:
            x = run_sampler(
                c.sampler,
                denoise,
                x,
                generator,
                steps=c.steps,
                sigma_min=c.sigma_min,
                sigma_max=c.sigma_max,
                rho=c.rho,
                s_churn=c.s_churn,
                s_tmin=c.s_tmin,
                s_tmax=c.s_tmax,
                s_noise=c.s_noise,
            )
        counter.batch_done()
        return x.clamp(-1, 1)

    return draw
