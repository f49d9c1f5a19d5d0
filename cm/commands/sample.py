"""Drawing samples from a model as configured: npz, PNG grid, metadata."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm import __version__
from cm.commands.common import claimed_output
from cm.config.derived import run_dir
from cm.config.fields import arguments_of
from cm.config.parsing import parse_classes, parse_guidance, parse_sigmas, parse_ts
from cm.config.rows import SAMPLERS
from cm.config.scripts import SampleConfig, resolved
from cm.data.images import SampleWriter, save_grid, save_json
from cm.diffusion.denoiser import DenoiseFn
from cm.diffusion.guidance import GuidedDenoiser, guided, limited
from cm.diffusion.sde import create_sde
from cm.errors import UserError
from cm.models.guides import Guide, TrainedClassifier, guided_by, load_guide, provenance
from cm.models.pretrained import Model, Pretrained, load_pretrained
from cm.runtime import distributed, logger
from cm.sampling.driver import option_names
from cm.sampling.finite import FiniteWatch
from cm.sampling.generate import Labels, SampleBatch, generate
from cm.sampling.levels import grid_levels
from cm.sampling.noise import SampleGenerator, get_generator
from cm.sampling.registry import run_sampler


def run_image_sample(config: SampleConfig) -> None:
    """Draw --num_samples images over all ranks and write them to --out_dir."""
    distributed.setup_dist(timeout=60 * config.startup_timeout)
    model = load_pretrained(config)
    c = model.config
    channels = c.in_channels or 3
    stem = Path(run_dir(config), f"samples_{c.num_samples}x{c.image_size}x{c.image_size}x{channels}")
    with claimed_output(
        stem.parent, [f"{stem.name}{ending}" for ending in (".png", ".json", ".npz")], c.overwrite
    ):
        write_samples(model, stem)


def write_samples(model: Pretrained[SampleConfig], stem: Path) -> None:
    """Draw the samples with all ranks; rank 0 writes stem.npz, a picture of the first and what they were made with."""
    c = model.config
    sigmas = model.denoiser.precond.round_sigma(noise_levels(c))
    model, guide = with_guide(model)
    classifier = guide if isinstance(guide, TrainedClassifier) else None
    logger.log(f"{model.file.path}: weights {model.file.kind}, {c.training_mode}, sampler {c.sampler}")
    if c.sampler == "multistep" and not {"ts", "sigmas"} & c.explicit:
        logger.log(
            f"no --ts given: two steps, --steps {c.steps} "
            + (f"--ts {c.ts}" if c.ts else f"--sigmas {c.sigmas}")
        )
    if c.class_names:
        logger.log(f"classes: {', '.join(c.class_names[:20])}{', ...' if len(c.class_names) > 20 else ''}")
    logger.log("noise levels: " + ", ".join(f"{s:.4g}" for s in sigmas.tolist()))
    generator = get_generator(c.generator, num_samples=c.num_samples, seed=c.seed)
    labels = class_labels(c, classifier.num_classes if classifier else 0)
    shape = (c.image_size, c.image_size, c.in_channels or 3)
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
            shown = labels(range(len(kept))).tolist() if labels is not None and c.class_names else ()
            captions = [c.class_names[k] if k < len(c.class_names) else str(k) for k in shown]
            save_grid(stem.with_suffix(".png"), kept, c.grid_columns, captions=captions)
        metadata = {
            **model.provenance(),
            **provenance(guide),
            "config": resolved(c),
            "sigmas": sigmas.tolist(),
            "nfe": counter.per_batch,
            "class_names": list(c.class_names),
            "versions": {
                "cm": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        save_json(stem.with_suffix(".json"), metadata)
    logger.log(f"samples: {npz}")
    if len(kept):
        logger.log(f"picture: {stem.with_suffix('.png')}")


def noise_levels(config: SampleConfig) -> Tensor:
    """The decreasing noise levels that the sampler walks along, the last included."""
    c = config
    if c.sigmas:
        levels = parse_sigmas(c.sigmas, c.sigma_min, c.sigma_max)
        return torch.tensor([*levels, c.sigma_min], dtype=torch.float64)
    options = {**own_flags(c), "ts": complete_ts(c), "diffusion_schedule": c.diffusion_schedule}
    grid = c.time_steps or SAMPLERS[c.sampler].grid
    levels = grid_levels(grid, c.steps, c.sigma_min, c.sigma_max, c.rho, options)
    visits = SAMPLERS[c.sampler].visits
    return torch.cat([levels[:visits], levels[-1:]]) if visits else levels


def own_flags(config: SampleConfig) -> dict[str, Any]:
    """The options of the chosen sampler as its keyword arguments."""
    own = arguments_of(SAMPLERS[config.sampler].options, config)
    if "sde" in own:
        own["sde"] = create_sde(own["sde"], config.sigma_min, config.sigma_max)
    return own


def solver_options(model: Model[SampleConfig]) -> dict[str, Any]:
    """What the sampler may take by keyword: its own flags, and the levels that the network knows."""
    return {**own_flags(model.config), "round_sigma": model.denoiser.precond.round_sigma}


def with_guide(model: Pretrained[SampleConfig]) -> tuple[Pretrained[SampleConfig], Guide | None]:
    """(the model, which follows --guidance unless a classifier does that step by step; what --guide names)."""
    c = model.config
    if c.told_scales:
        return model, None
    guidance = parse_guidance(c.guidance)
    guide = load_guide(c.guide, c, model.device) if c.guide else None
    if isinstance(guide, TrainedClassifier) or (guide is None and guidance.plain):
        return model, guide
    steered = guided_by(
        model.denoiser, guidance, guide, source=model.file, class_cond=c.class_cond, lazy=True
    )
    return replace(model, denoiser=steered), guide


def complete_ts(config: SampleConfig) -> list[int] | None:
    """--ts with the last grid index appended where it is missing, since sampling that stops earlier leaves noise."""
    if SAMPLERS[config.sampler].grid != "ts" or not config.ts:
        return None
    ts = list(parse_ts(config.ts, config.steps))
    if ts[0] != 0:
        raise UserError(f"--ts must begin with 0 (sigma_max), where the noise is, got {config.ts}")
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
    classes = parse_classes(config.classes, total, config.class_names) if config.classes else ()
    return Labels(total, config.seed, classes)


class CallCounter:
    """Counts network evaluations of the first batch."""

    def __init__(self):
        self.per_batch = 0
        self._counting = True

    def wrap(self, denoise: DenoiseFn, cost: Callable[[Tensor], int] = lambda sigma: 1) -> DenoiseFn:
        """The same function, counted. cost: network evaluations of a call at these noise levels."""

        def counted(x: Tensor, sigma: Tensor, *lower: Tensor) -> Tensor:
            self.per_batch += cost(sigma) if self._counting else 0
            return denoise(x, sigma, *lower)

        return counted

    def batch_done(self) -> None:
        """Later batches are not counted."""
        self._counting = False


def sample_batches(
    model: Model[SampleConfig],
    generator: SampleGenerator,
    sigmas: Tensor,
    counter: CallCounter | None = None,
    options: Mapping[str, Any] | None = None,
    classifier: TrainedClassifier | None = None,
) -> SampleBatch:
    """(n, labels) -> n images in [-1, 1] with the configured sampler; starts from noise of level sigmas[0].

    options: of the sampler. classifier: guides towards the labels.
    """
    c = model.config
    counter = counter or CallCounter()
    watch = FiniteWatch()

    @torch.no_grad()
    def draw(count: int, labels: Tensor | None) -> Tensor:
        cost = model.denoiser.evaluations if isinstance(model.denoiser, GuidedDenoiser) else lambda sigma: 1
        reads = SAMPLERS[c.sampler].reads
        denoise = counter.wrap(model.denoise(labels, c.clip_denoised, watch.wrap, reads), cost)
        own = dict(options or {})
        if classifier is not None:
            guidance = parse_guidance(c.guidance)
            gradient = classifier.model.gradient(labels.to(model.device), guidance.low)
            gradient = limited(gradient, guidance)
            if "gradient" in option_names(SAMPLERS.load(c.sampler)):
                own["gradient"] = gradient
            else:
                denoise = guided(denoise, gradient)
        names = [f"sample {row}" for row in getattr(generator, "rows", range)(count)]
        size = (count, c.in_channels or 3, c.image_size, c.image_size)
        x = generator.randn(*size, device=model.device) * float(sigmas[0])
        x = run_sampler(
            c.sampler, denoise, x, generator, steps=c.steps, sigma_min=c.sigma_min, sigmas=sigmas, options=own
        )
        counter.batch_done()
        return watch.check(x, names).clamp(-1, 1)

    return draw
