"""The configuration of every script as a frozen dataclass, put together from groups of flags. Imports no torch.

The class of a run's configuration also has the options of the rows that it names (`configuration_class`): those of its
objective, sampler, network, distance ... `cm.config.validation` refuses what makes no sense, `cm.commands.cli` makes
flags of the fields.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar

from cm.config.choices import PROBES
from cm.config.fields import fixed, flag, flags_of, meta_of
from cm.config.flags import (
    WEIGHTS,
    ConsistencyFlags,
    DataFlags,
    GuidanceFlags,
    LoopFlags,
    ModelFlags,
    OptimFlags,
    RunFlags,
    SamplingFlags,
)
from cm.config.rows import NOISE_LEVELS, OBJECTIVES, TASKS, TIME_STEPS
from cm.errors import choose, masked


def _drawing() -> list[str]:
    """Objectives whose models draw images."""
    return [name for name, row in OBJECTIVES.items() if row.draws]


def _trained_with(default: str) -> Any:
    """--training_mode of a command that uses a model."""
    what = "objective that the model was trained with"
    return flag(default, what, choices=_drawing, registry=OBJECTIVES, main=True)


def _length() -> Any:
    """--total_training_steps of a run without a curriculum."""
    what = "steps to train; 0: --lr_anneal_steps, else until stopped"
    return flag(0, what, unit="steps", low=0, main=True)


@dataclass(frozen=True)
class EdmTrainConfig(LoopFlags, OptimFlags, DataFlags, ModelFlags, RunFlags):
    """Train an EDM teacher: a denoiser of all noise levels."""

    schedule_sampler: str = flag(
        "lognormal",
        "how training draws noise levels; uniform and loss-second-moment draw grid points; vp, ve and iddpm as those "
        "columns of EDM's Table 1",
        registry=NOISE_LEVELS,
    )
    augment: float = flag(
        0.0,
        "probability of each geometric augmentation, told to the network (ncsnpp, ddpmpp); replaces --random_flip",
        low=0,
    )
    uncertainty: bool = flag(
        False,
        "weigh noise levels by what a head of the network learns of the loss's variance (edm2, EDM2's loss)",
    )
    total_training_steps: int = _length()


@dataclass(frozen=True)
class ClassifierConfig(LoopFlags, OptimFlags, DataFlags, ModelFlags, RunFlags):
    """Train a classifier of noisy images, for guidance."""

    schedule_sampler: str = flag(
        "ve",
        "how training draws noise levels; ve: evenly in ln(sigma) from --sigma_min to --sigma_max",
        choices=lambda: [name for name, row in NOISE_LEVELS.items() if not row.grid],
        registry=NOISE_LEVELS,
    )
    num_head_channels: int = flag(64, "width of an attention head", unit="channels", low=1)
    total_training_steps: int = _length()
    # What a classifier has no choice in: an adm network with edm's scalings that learns the labels and draws nothing
    network: str = fixed("adm")
    precond: str = fixed("edm")
    class_cond: bool = fixed(True)
    label_dropout: float = fixed(0.0)
    preview_count: int = fixed(0)
    preview_interval: int = fixed(0)
    diffusion_schedule: str = fixed("")
    boundary: str = fixed("skip")
    c_out_formula: str = fixed("code")
    augment_dim: int = fixed(0)
    dropout_resolutions: str = fixed("")


@dataclass(frozen=True)
class CmTrainConfig(ConsistencyFlags, GuidanceFlags, LoopFlags, OptimFlags, DataFlags, ModelFlags, RunFlags):
    """Train a consistency model: distillation, training in isolation, or progressive distillation."""


@dataclass(frozen=True)
class SampleConfig(GuidanceFlags, SamplingFlags, ModelFlags, RunFlags):
    """Draw images from a model."""

    training_mode: str = _trained_with("edm")
    time_steps: str = flag(
        "",
        "which noise levels the solvers of the flow visit: a column of EDM's Table 1; empty: as edm does",
        choices=lambda: ("", *TIME_STEPS),
    )
    ts: str = flag(
        "", "time points of multistep as grid indices, 0 = sigma_max; the last must be steps-1", main=True
    )
    sigmas: str = flag(
        "", "noise levels of multistep, decreasing, instead of --ts; ends at sigma_min by itself", main=True
    )
    overwrite: bool = flag(False, "replace samples that are already there", result=False, main=True)
    grid_images: int = flag(
        64, "images in the PNG grid; 0: no grid", unit="images", result=False, main=True, low=0
    )
    grid_columns: int = flag(0, "columns of the PNG grid; 0: as many as rows", result=False, low=0)


@dataclass(frozen=True)
class SearchConfig(SamplingFlags, ModelFlags, RunFlags):
    """Search the time points of multistep sampling that minimise FID."""

    begin: str = flag(
        "0", "time points before the searched one, as grid indices; it lies at the last or beyond", main=True
    )
    end: str = flag(
        "39", "time points after the searched one, as grid indices; it lies at the first or before", main=True
    )
    training_mode: str = _trained_with("consistency_distillation")
    ref_batch: str = flag("", "reference statistics or images (npz)", main=True)
    points: int = flag(1, "time points to search, one after the other", main=True, low=1)
    coarse: int = flag(0, "images per candidate in a first, coarse search; 0: none", unit="images", low=0)
    protocol: str = flag(
        "adm", "evaluation protocol", choices=("adm", "cifar10", "classifier", "small", "digits"), main=True
    )
    features: str = flag(
        "",
        "feature network and its weights, NAME=PATH or inception=URL; empty: the protocol's",
    )


@dataclass(frozen=True)
class LikelihoodConfig(ModelFlags, RunFlags):
    """Bits per dimension of images under a model."""

    model_path: str = flag("", "model: file or run directory", main=True)
    weights: str = flag("", WEIGHTS, main=True)
    training_mode: str = _trained_with("edm")
    data_dir: str = flag("", "images: folder, zip or npz, local or remote (gs://, az://)", main=True)
    labels: str = flag(
        "auto",
        "where class labels come from, as in training",
        choices=("auto", "folder", "prefix", "json", "none"),
    )
    num_images: int = flag(0, "images to score, the first ones; 0: all", unit="images", main=True, low=0)
    batch_size: int = flag(16, "images per batch and rank", unit="images", main=True, low=1)
    probe: str = flag(
        "rademacher",
        "estimate of the divergence; exact: one backward pass per pixel and channel",
        choices=PROBES.names,
    )
    tolerance: float = flag(1e-5, "relative and absolute tolerance of the solver", main=True, above=0)
    seed: int = flag(42, "seed of dequantisation and probes", main=True, low=0)


@dataclass(frozen=True)
class EditConfig(ModelFlags, RunFlags):
    """Edit images with a consistency model that was not trained for it."""

    task: str = flag("inpaint", "what to do; written as the first word", registry=TASKS, main=True)
    input: str = flag("", "image or folder of images; for superres also low-resolution ones", main=True)
    model_path: str = flag("", "model: file or run directory", main=True)
    weights: str = flag("", WEIGHTS, main=True)
    training_mode: str = _trained_with("consistency_distillation")
    classes: str = flag(
        "",
        "labels of the input images in turn, as a list; empty: those that a prepared set or npz brings",
        main=True,
    )
    num_results: int = flag(1, "results per image", unit="images", main=True, low=1)
    seed: int = flag(42, "seed of all noise; result i depends on (seed, image, i) only", main=True, low=0)
    steps: int = flag(40, "points of the grid that --ts indexes; our own model files know theirs", low=1)
    ts: str = flag(
        "", "time points as grid indices, 0 = sigma_max; empty: 17 evenly over the grid", main=True
    )
    sigmas: str = flag(
        "", "noise levels, decreasing, instead of --ts; ends at sigma_min by itself", main=True
    )
    clip_denoised: bool = flag(True, "clamp every prediction to [-1, 1]")
    batch_size: int = flag(16, "images per batch and rank", unit="images", result=False, main=True, low=1)
    resize: bool = flag(False, "crop and resize images of another resolution as training does")
    skip_unreadable: bool = flag(False, "leave out damaged images instead of stopping at the first")
    overwrite: bool = flag(False, "replace results that are already there", result=False, main=True)
    grid_images: int = flag(
        16, "images in the side-by-side grid; 0: no grid", unit="images", result=False, main=True, low=0
    )


Config = (
    EdmTrainConfig
    | ClassifierConfig
    | CmTrainConfig
    | SampleConfig
    | SearchConfig
    | EditConfig
    | LikelihoodConfig
)
TrainConfig = EdmTrainConfig | ClassifierConfig | CmTrainConfig
ConfigType = TypeVar("ConfigType", bound=RunFlags)

SCRIPTS: dict[str, type[Config]] = {
    "edm_train": EdmTrainConfig,
    "classifier_train": ClassifierConfig,
    "cm_train": CmTrainConfig,
    "image_sample": SampleConfig,
    "ternary_search": SearchConfig,
    "image_edit": EditConfig,
    "likelihood": LikelihoodConfig,
}


def configuration_class(cls: type[ConfigType], values: Mapping[str, Any]) -> type[ConfigType]:
    """The class with the options of every row that these values, or the defaults, name; UserError for unknown names."""
    options = []
    for name, f in flags_of(cls).items():
        if (registry := meta_of(f).registry) is not None:
            offered = {n: registry[n] for n in meta_of(f).names}
            row = choose(offered, values.get(name, f.default), f"--{name}")
            if row.options is not None and row.options not in options:
                options.append(row.options)
    base = plain_class(cls)
    return _extended(base, tuple(o for o in options if not issubclass(base, o)))


@cache
def _extended(base: type[ConfigType], options: tuple[type, ...]) -> type[ConfigType]:
    if not options:
        return base
    return dataclass(frozen=True)(type(base.__name__, (base, *options), {"__doc__": base.__doc__}))


def plain_class(cls: type[ConfigType]) -> type[ConfigType]:
    """The class of SCRIPTS that a configuration's class was made from."""
    return next((c for c in cls.__mro__ if c in SCRIPTS.values()), cls)


def configure(cls: type[ConfigType], **values: Any) -> ConfigType:
    """A configuration with the options of the rows that it names."""
    return configuration_class(cls, values)(**values)


def changed(config: ConfigType, **changes: Any) -> ConfigType:
    """The configuration with other values; where they name other rows, with the options of those at their defaults."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.init} | changes
    cls = configuration_class(type(config), values)
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.init and f.name in values})


def script_of(config: Config | type[Config]) -> str:
    """Name of the script that a configuration belongs to."""
    cls = plain_class(config if isinstance(config, type) else type(config))
    return next(name for name, known in SCRIPTS.items() if known is cls)


def resolved(config: Config) -> dict[str, Any]:
    """All flags with their values, for printing and storing: plain JSON (infinities are texts), secrets masked."""
    values = {name: getattr(config, name) for name in flags_of(type(config))}
    values = {k: masked(v) if isinstance(v, str) else v for k, v in values.items()}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def result_flags(config: Config) -> dict[str, Any]:
    """The flags that can change the result of a run: what two runs must share to be the same run."""
    return {k: v for k, v in resolved(config).items() if meta_of(flags_of(type(config))[k]).result}


def config_hash(config: Config) -> str:
    """8 hexadecimal digits of the script and of every flag that can change the result and is not at its default."""
    flags = flags_of(type(config))
    chosen = {k: v for k, v in result_flags(config).items() if getattr(config, k) != flags[k].default}
    text = json.dumps([script_of(config), chosen], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
