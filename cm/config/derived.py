"""What follows from a configuration: precision, batch, length of the run, directory, and what a checkpoint says."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from cm.config import plugins, presets
from cm.config.flags import ModelFlags
from cm.config.parsing import Guidance, parse_guidance
from cm.config.registry import Objective
from cm.config.rows import OBJECTIVES
from cm.config.scripts import (
    CmTrainConfig,
    Config,
    EdmTrainConfig,
    SampleConfig,
    TrainConfig,
    config_hash,
    resolved,
    result_flags,
    script_of,
)
from cm.errors import UserError

ModelUser = TypeVar("ModelUser", bound=ModelFlags)
AnyConfig = TypeVar("AnyConfig", bound=Config)

AUTO = "auto"  # --preset: chosen for the data, the teacher and the machine
AUGMENT_LABELS = 9  # of cm.objectives.augmentation


def precision(config: Config) -> str:
    """fp32, fp16 or bf16: --precision, or what --use_fp16 says."""
    return config.precision or ("fp16" if config.use_fp16 else "fp32")


def training_mode(config: TrainConfig) -> str:
    """What a training run makes: `edm`, `classifier`, or the --training_mode of cm_train."""
    if isinstance(config, CmTrainConfig):
        return config.training_mode
    return next(name for name, row in OBJECTIVES.items() if row.script == script_of(config))


def row_of(config: Config) -> Objective:
    """The row of the objective that a model has, or that a run trains."""
    return OBJECTIVES[getattr(config, "training_mode", "") or training_mode(config)]


def compares_by_lpips(config: TrainConfig) -> bool:
    """Whether the loss is LPIPS: --loss_norm asks for it, and the objective compares images at all."""
    return row_of(config).compares and config.loss_norm.startswith("lpips")


def is_consistency(training_mode: str) -> bool:
    """Whether models of this objective are consistency functions, with boundary-condition scalings."""
    return OBJECTIVES[training_mode].consistency


def lowest_level(config: Config) -> float:
    """The noise level from which up the model is defined: sigma_min, unless its objective learns from another one."""
    name = row_of(config).lowest
    return getattr(config, name) if name else config.sigma_min


def last_known(config: Config, steps: int) -> int:
    """The last index of Karras's grid of `steps` points whose level is not below `lowest_level`."""
    levels = (config.sigma_max, config.sigma_min, lowest_level(config))
    high, low, level = (value ** (1 / config.rho) for value in levels)
    return math.floor((high - level) / (high - low) * (steps - 1) + 1e-9)


def lands_on_images(training_mode: str) -> bool:
    """Whether models of this objective go from any noise level to an image in one step."""
    row = OBJECTIVES[training_mode]
    return row.consistency or row.two_times


def has_two_times(config: Config) -> bool:
    """Whether the configured network has a second clock, as flow maps do."""
    return row_of(config).two_times


def told_guidance(config: Config) -> bool:
    """Whether the configured network is told which guidance to follow."""
    return row_of(config).told_guidance


def stored_scales(stored: Mapping[str, Any]) -> tuple[float, ...]:
    """`told_scales` of a model file, by what it says of its training."""
    guidance = parse_guidance(stored.get("guidance", "1")) if stored.get("script") == "cm_train" else None
    return (guidance.low, guidance.high) if guidance and guidance.drawn else ()


def told_scales(config: Config) -> tuple[float, ...]:
    """(least, largest) scale of the teacher's guidance that the student is told; () where it is told none."""
    if not isinstance(config, CmTrainConfig):
        return config.told_scales
    guidance = parse_guidance(config.guidance)
    return (guidance.low, guidance.high) if guidance.drawn else ()


def scale_of(config: Config) -> float | None:
    """The scale at which a model that is told one draws: --guidance, or of those that it knows the nearest to 1."""
    if not (known := told_scales(config)):
        return None
    given = not isinstance(config, CmTrainConfig) and "guidance" in config.explicit
    return parse_guidance(config.guidance).low if given else min(max(1.0, known[0]), known[1])


def learns_from(config: TrainConfig) -> str:
    """What a teacher of this run is: `denoiser` or `consistency`."""
    return OBJECTIVES[training_mode(config)].learns_from


def guidance_of(config: TrainConfig) -> Guidance | None:
    """How the teacher of a run is guided; None where it is not."""
    guidance = parse_guidance(getattr(config, "guidance", "1"))
    return None if guidance.plain else guidance


def channels_last(config: Config, device_type: str) -> bool:
    """--channels_last with `auto` by rule: on a GPU for half precision, on a CPU from 64 channels on.

    Where it says yes, `cm.models.memory_format` measures.
    """
    if config.channels_last != "auto":
        return config.channels_last == "True"
    if device_type == "cuda":
        return precision(config) != "fp32"
    return config.num_channels >= 64


def with_counts(config: AnyConfig) -> AnyConfig:
    """The configuration with the channels and classes that it leaves to the data: 3 and 1000."""
    return replace(config, in_channels=config.in_channels or 3, num_classes=config.num_classes or 1000)


def global_batch(config: TrainConfig, world_size: int) -> int:
    """Images per step over all ranks; --batch_size is per rank and wins."""
    return config.batch_size * world_size if config.batch_size != -1 else config.global_batch_size


def augment_probability(config: Config) -> float:
    """How likely each augmentation of edm_train is; 0 elsewhere."""
    return config.augment if isinstance(config, EdmTrainConfig) else 0.0


def augmentation_labels(config: Config) -> int:
    """Augmentation labels that the network takes: --augment_dim, or those that --augment makes."""
    return config.augment_dim or (AUGMENT_LABELS if augment_probability(config) else 0)


def stop_step(config: TrainConfig) -> int:
    """Step after which training is finished; 0 means that only a signal stops it."""
    return config.total_training_steps or config.lr_anneal_steps


def lr_decay(config: TrainConfig) -> tuple[str, int]:
    """(name of the learning rate's decay, its length in steps); in progressive distillation each stage decays anew."""
    name = config.lr_schedule or ("linear" if config.lr_anneal_steps else "constant")
    if config.lr_anneal_steps:
        return name, config.lr_anneal_steps
    if OBJECTIVES[training_mode(config)].stages:
        return name, config.distill_steps_per_iter
    return name, config.total_training_steps


def may_grow(config: TrainConfig) -> bool:
    """Whether a run may get a later end while it lasts: N(k) knows none, and the rate none or one that may move."""
    return lr_decay(config)[0] in ("constant", "late_decay") and (
        getattr(config, "scale_mode", "fixed") == "fixed"
    )


def identity_flags(config: TrainConfig) -> dict[str, Any]:
    """The flags that two starts of one run must share. A run whose steps know no end may have any."""
    flags = result_flags(config)
    if may_grow(config) and lr_decay(config)[0] == "constant":
        del flags["total_training_steps"]
    return flags


def init_source(config: CmTrainConfig) -> str:
    """Where initial weights come from, `random` or `teacher`, with `auto` decided."""
    if config.init != "auto":
        return config.init
    return "teacher" if config.teacher_model_path else "random"


def run_dir(config: Config) -> str:
    """Directory of everything that a run writes."""
    if directory := config.out_dir or os.environ.get("OPENAI_LOGDIR"):
        if "://" in directory:
            raise UserError(
                f"--out_dir {directory}: runs are written to a local folder; --mirror copies them elsewhere"
            )
        return os.path.expanduser(directory)
    name = training_mode(config) if config.preset == AUTO else config.preset or script_of(config)
    return os.path.join("runs", f"{name}-{config_hash(config)}")


def chosen_preset(config: Config) -> str:
    """The named experiment of a configuration; empty where there is none, or --preset auto."""
    return "" if config.preset == AUTO else config.preset


def with_two_steps(config: SampleConfig, stored: Mapping[str, Any]) -> SampleConfig:
    """--sampler multistep without --ts and --sigmas: with two steps, by a preset that is asked for, the search of
    the model's time points, the model's preset, or the middle of its grid.

    stored: what the model file says of its training, and `searched`, the time points found on its grid.
    The middle is 0.6 of the indices, as in previews.
    """
    if config.ts or config.sigmas:
        return config
    last = config.steps - 1
    for name in (chosen_preset(config), "", stored.get("preset", "")):
        if not name and stored.get("searched", "").endswith(f",{last}"):
            return replace(config, ts=stored["searched"])
        known = presets.PRESETS[name].scripts.get("image_sample", {}) if name in presets.PRESETS else {}
        if known.get("ts") and known.get("steps", config.steps) == config.steps:
            return replace(config, ts=known["ts"])
        if known.get("sigmas"):
            return replace(config, sigmas=known["sigmas"])
    middle = min(max(round(0.6 * last), min(1, last)), last_known(config, config.steps))
    return replace(config, ts=f"0,{middle},{last}")


def stored_config(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says about its model: every flag, the script, the objective and the grid it ends with."""
    stored = {**resolved(config), "script": script_of(config)}
    if config.class_names:
        stored["class_names"] = list(config.class_names)
    if plugins.loaded():
        stored["plugins"] = plugins.loaded()
    if not isinstance(config, CmTrainConfig):
        return {**stored, "training_mode": training_mode(config)}
    final = {
        "fixed": config.start_scales,
        "progressive": config.end_scales + 1,  # N(k) of the last step
        "doubling": config.end_scales + 1,
        "progdist": 1,
    }
    if OBJECTIVES[config.training_mode].segments:
        return {**stored, "steps": config.segments}
    return {**stored, "steps": 1 if has_two_times(config) else final[config.scale_mode]}
