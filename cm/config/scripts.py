"""The configuration of every script as a frozen dataclass, put together from `cm.config.flags`. Imports no torch.

`cm.config.validation` refuses what makes no sense, `cm.commands.cli` makes flags of the fields.
"""

import hashlib
import json
import math
from dataclasses import dataclass, fields
from typing import Any

from cm.config.flags import (
    EDIT_TASKS,
    MODES,
    ConsistencyFlags,
    DataFlags,
    GuidanceFlags,
    LoopFlags,
    ModelFlags,
    OptimFlags,
    RunFlags,
    SamplingFlags,
    SolverFlags,
    flag,
)


@dataclass(frozen=True)
class EdmTrainConfig(LoopFlags, OptimFlags, DataFlags, ModelFlags, RunFlags):
    """Train an EDM teacher: a denoiser of all noise levels."""

    schedule_sampler: str = flag(
        "lognormal",
        "how training draws noise levels; uniform and loss-second-moment draw grid points; vp, ve and iddpm as those "
        "columns of EDM's Table 1",
        choices=("uniform", "loss-second-moment", "lognormal", "lognormal-even", "vp", "ve", "iddpm"),
    )
    augment: float = flag(
        0.0,
        "probability of each geometric augmentation, told to the network (ncsnpp, ddpmpp); replaces --random_flip",
    )
    p_mean: float = flag(-1.2, "mean of ln(sigma) of lognormal")
    p_std: float = flag(1.2, "standard deviation of ln(sigma) of lognormal")
    num_timesteps: int = flag(40, "grid points of uniform and loss-second-moment")
    total_training_steps: int = flag(
        0, "steps to train; 0: --lr_anneal_steps, else until stopped", unit="steps"
    )


@dataclass(frozen=True)
class ClassifierConfig(EdmTrainConfig):
    """Train a classifier of noisy images, for guidance."""

    schedule_sampler: str = flag(
        "ve",
        "how training draws noise levels; ve: evenly in ln(sigma) from --sigma_min to --sigma_max",
        choices=("ve", "lognormal", "lognormal-even", "vp", "iddpm"),
    )
    class_cond: bool = flag(True, "always True: the labels are what is learned")
    num_head_channels: int = flag(64, "width of an attention head", unit="channels")
    preview_count: int = flag(0, "always 0: a classifier draws no images", result=False)


@dataclass(frozen=True)
class CmTrainConfig(ConsistencyFlags, LoopFlags, OptimFlags, DataFlags, ModelFlags, RunFlags):
    """Train a consistency model: distillation, training in isolation, or progressive distillation."""


@dataclass(frozen=True)
class SampleConfig(GuidanceFlags, SolverFlags, SamplingFlags, ModelFlags, RunFlags):
    """Draw images from a model."""

    training_mode: str = flag("edm", "objective that the model was trained with", choices=("edm", *MODES))
    ts: str = flag("", "time points of multistep as grid indices, 0 = sigma_max; the last must be steps-1")
    sigmas: str = flag(
        "", "noise levels of multistep, decreasing, instead of --ts; ends at sigma_min by itself"
    )
    overwrite: bool = flag(False, "replace samples that are already there", result=False)
    grid_images: int = flag(64, "images in the PNG grid; 0: no grid", unit="images", result=False)
    grid_columns: int = flag(0, "columns of the PNG grid; 0: as many as rows", result=False)


@dataclass(frozen=True)
class SearchConfig(SamplingFlags, ModelFlags, RunFlags):
    """Search the time points of multistep sampling that minimise FID."""

    begin: str = flag(
        "0", "time points before the searched one, as grid indices; it lies at the last or beyond"
    )
    end: str = flag(
        "39", "time points after the searched one, as grid indices; it lies at the first or before"
    )
    training_mode: str = flag(
        "consistency_distillation", "objective that the model was trained with", choices=("edm", *MODES)
    )
    ref_batch: str = flag("", "reference statistics or images (npz)")
    points: int = flag(1, "time points to search, one after the other")
    coarse: int = flag(0, "images per candidate in a first, coarse search; 0: none", unit="images")
    protocol: str = flag("adm", "evaluation protocol", choices=("adm", "cifar10", "digits"))
    features: str = flag("", "NAME=PATH of another feature network; empty: the protocol's")
    inception_path: str = flag("", "file or URL of the Inception weights; empty: the user cache")


@dataclass(frozen=True)
class LikelihoodConfig(ModelFlags, RunFlags):
    """Bits per dimension of images under a model."""

    model_path: str = flag("", "model: file or run directory")
    weights: str = flag("", "raw, ema:RATE or target; empty: the slowest average that the file has")
    training_mode: str = flag("edm", "objective that the model was trained with", choices=("edm", *MODES))
    data_dir: str = flag("", "images: folder, zip or npz, local or remote (gs://, az://)")
    labels: str = flag(
        "auto", "where class labels come from, as in training", choices=("auto", "folder", "prefix", "json")
    )
    num_images: int = flag(0, "images to score, the first ones; 0: all", unit="images")
    batch_size: int = flag(16, "images per batch and rank; they share the solver's steps", unit="images")
    probe: str = flag(
        "rademacher",
        "estimate of the divergence; exact: one backward pass per pixel and channel",
        choices=("rademacher", "gaussian", "exact"),
    )
    tolerance: float = flag(1e-5, "relative and absolute tolerance of the solver")
    seed: int = flag(42, "seed of dequantisation and probes")


@dataclass(frozen=True)
class EditConfig(ModelFlags, RunFlags):
    """Edit images with a consistency model that was not trained for it."""

    task: str = flag("inpaint", "what to do; written as the first word", choices=EDIT_TASKS)
    input: str = flag("", "image or folder of images; for superres also low-resolution ones")
    model_path: str = flag("", "model: file or run directory")
    weights: str = flag("", "raw, ema:RATE or target; empty: the slowest average that the file has")
    training_mode: str = flag(
        "consistency_distillation", "objective that the model was trained with", choices=("edm", *MODES)
    )
    classes: str = flag(
        "", "labels of the input images in turn, as a list; empty: those that a prepared set or npz brings"
    )
    num_results: int = flag(1, "results per image", unit="images")
    seed: int = flag(42, "seed of all noise; result i depends on (seed, image, i) only")
    steps: int = flag(40, "points of the grid that --ts indexes; our own model files know theirs")
    ts: str = flag("", "time points as grid indices, 0 = sigma_max; empty: 17 evenly over the grid")
    sigmas: str = flag("", "noise levels, decreasing, instead of --ts; ends at sigma_min by itself")
    clip_denoised: bool = flag(True, "clamp every prediction to [-1, 1]")
    final_project: bool = flag(True, "replace what is known once more at the very end")
    mask: str = flag(
        "center:0.5",
        "inpaint: what to generate: a picture (white), box:x,y,w,h, center:F, random:F, left or text:S",
    )
    factor: int = flag(8, "superres: side of the patches whose mean is known", unit="pixels")
    sigma_start: float = flag(1.0, "stroke: noise level from which the painting is completed")
    repeat: int = flag(1, "stroke: how often the result is completed again")
    sigma: float = flag(0.5, "denoise: noise level of the input")
    noisy_input: bool = flag(False, "denoise: the input carries that noise already; else it is added")
    between: str = flag("", "interpolate: seeds or .npy files of noise (C, H, W), as a list of two or more")
    frames: int = flag(9, "interpolate: images from one noise to the next, both included", unit="images")
    frame_ms: int = flag(120, "interpolate: time that a frame is shown", unit="milliseconds", result=False)
    animation: str = flag("gif", "interpolate: animation format", choices=("gif", "apng"), result=False)
    batch_size: int = flag(16, "images per batch and rank", unit="images", result=False)
    resize: bool = flag(False, "crop and resize images of another resolution as training does")
    skip_unreadable: bool = flag(False, "leave out damaged images instead of stopping at the first")
    overwrite: bool = flag(False, "replace results that are already there", result=False)
    grid_images: int = flag(16, "images in the side-by-side grid; 0: no grid", unit="images", result=False)


Config = EdmTrainConfig | CmTrainConfig | SampleConfig | SearchConfig | EditConfig | LikelihoodConfig

SCRIPTS: dict[str, type[Config]] = {
    "edm_train": EdmTrainConfig,
    "classifier_train": ClassifierConfig,
    "cm_train": CmTrainConfig,
    "image_sample": SampleConfig,
    "ternary_search": SearchConfig,
    "image_edit": EditConfig,
    "likelihood": LikelihoodConfig,
}


def script_of(config: Config | type[Config]) -> str:
    """Name of the script that a configuration belongs to."""
    cls = config if isinstance(config, type) else type(config)
    return next(name for name, known in SCRIPTS.items() if known is cls)


def flags_of(cls: type) -> dict[str, Any]:
    """name -> dataclass field of every flag of a configuration class."""
    return {f.name: f for f in fields(cls) if "help" in f.metadata}


def resolved(config: Config) -> dict[str, Any]:
    """All flags with their values; infinities as text, so that the dict is plain JSON."""
    values = {name: getattr(config, name) for name in flags_of(type(config))}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def result_flags(config: Config) -> dict[str, Any]:
    """The flags that can change the result of a run: what two runs must share to be the same run."""
    return {k: v for k, v in resolved(config).items() if flags_of(type(config))[k].metadata["result"]}


def config_hash(config: Config) -> str:
    """8 hexadecimal digits of the script and of every flag that can change the result."""
    text = json.dumps([script_of(config), result_flags(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
