"""What follows from a configuration: precision, batch, length of the run, directory, and what a checkpoint says."""

import os
from dataclasses import replace
from typing import Any, TypeVar

from cm.config.flags import CONSISTENCY_MODES
from cm.config.scripts import (
    ClassifierConfig,
    CmTrainConfig,
    Config,
    EdmTrainConfig,
    ModelFlags,
    SampleConfig,
    SearchConfig,
    config_hash,
    flags_of,
    resolved,
    script_of,
)
from cm.config.validation import validate
from cm.errors import UserError

TrainConfig = EdmTrainConfig | CmTrainConfig
ModelUser = TypeVar("ModelUser", bound=ModelFlags)
AnyConfig = TypeVar("AnyConfig", bound=Config)

# Flags of the model that a file with its own configuration does not decide.
FREE_TO_CHOOSE = ("use_fp16", "use_checkpoint", "use_new_attention_order")
# Flags that change what the network computes without changing any tensor's shape.
MUST_AGREE = (
    "network",
    "precond",
    "diffusion_schedule",
    "sigma_data",
    "boundary",
    "c_out_formula",
    "class_cond",
    "num_heads",
    "num_heads_upsample",
    "num_head_channels",
    "time_scale",
)
AUGMENT_LABELS = 9  # of cm.objectives.augmentation
# How a model is sampled if the command does not say: by the objective that it was trained with
DEFAULT_SAMPLER = {
    "edm": "heun",
    "consistency_distillation": "onestep",
    "consistency_training": "onestep",
    "progdist": "progdist",
    "continuous_distillation": "onestep",
    "continuous_training": "onestep",
}


def precision(config: Config) -> str:
    """fp32, fp16 or bf16: --precision, or what --use_fp16 says."""
    return config.precision or ("fp16" if config.use_fp16 else "fp32")


def training_mode(config: TrainConfig) -> str:
    """What a training run makes: `edm`, `classifier`, or the --training_mode of cm_train."""
    if isinstance(config, CmTrainConfig):
        return config.training_mode
    return "classifier" if isinstance(config, ClassifierConfig) else "edm"


def is_consistency(training_mode: str) -> bool:
    """Whether models of this objective are consistency functions, with boundary-condition scalings."""
    return training_mode in CONSISTENCY_MODES


def channels_last(config: Config, device_type: str) -> bool:
    """--channels_last with `auto` decided: on a GPU for half precision, on a CPU from 64 channels on."""
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
    if isinstance(config, CmTrainConfig) and config.training_mode == "progdist":
        return name, config.distill_steps_per_iter
    return name, config.total_training_steps


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
        return directory
    return os.path.join("runs", f"{config.preset or script_of(config)}-{config_hash(config)}")


def stored_config(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says about its model: every flag, the script, the objective and the grid it ends with."""
    stored = {**resolved(config), "script": script_of(config)}
    if isinstance(config, EdmTrainConfig):
        return {**stored, "training_mode": training_mode(config)}
    final = {
        "fixed": config.start_scales,
        "progressive": config.end_scales + 1,  # N(k) of the last step
        "progdist": 1,
    }
    return {**stored, "steps": final[config.scale_mode]}


def adopt_teacher(config: CmTrainConfig, stored: dict[str, Any] | None, source: str) -> CmTrainConfig:
    """The configuration with the teacher's preconditioning, which its file says; UserError where they do not fit.

    Teacher and student are networks of one column, so that the student can start from the teacher's weights and, in
    progressive distillation, become the teacher. A bare state dict (stored None) says nothing: --precond does.
    """
    if stored is None:
        return config
    column = stored.get("precond", "edm")
    if "precond" in config.explicit and config.precond != column:
        raise UserError(
            f"--precond {config.precond} contradicts --teacher_model_path {source}, which was trained with {column}"
        )
    low, high = (float(stored.get(name, getattr(config, name))) for name in ("sigma_min", "sigma_max"))
    if column == "ve" and not low <= config.sigma_min < config.sigma_max <= high:
        raise UserError(
            f"--sigma_min {config.sigma_min} and --sigma_max {config.sigma_max} leave the noise levels that the "
            f"teacher {source} was trained on, {low} to {high}"
        )
    adopted = replace(config, precond=column)
    validate(adopted)
    return adopted


def inherit(config: ModelUser, stored: dict[str, Any], source: str) -> ModelUser:
    """The configuration with what the command left open filled in from a model file.

    stored: what the file says (`stored_config`, or `cm.models.identify` where it carries no configuration). A flag that
    the command set wins, except that it may not contradict the file where no tensor would show it.
    """
    if stored.get("training_mode") == "classifier":
        raise UserError(f"{source} is a classifier, which draws no images: it goes with --classifier_path")
    flags = flags_of(type(config))
    for name in MUST_AGREE:
        if name in config.explicit and name in stored and getattr(config, name) != stored[name]:
            raise UserError(
                f"--{name} {getattr(config, name)} contradicts {source}, which was trained with {stored[name]}"
            )
    names = [n for n in flags_of(ModelFlags) if n not in FREE_TO_CHOOSE]
    taken = {n: stored[n] for n in names if n in stored and n not in config.explicit}
    if "training_mode" in flags:
        taken.update(_objective(config, stored, source))
    merged = replace(config, **taken, explicit=config.explicit | set(taken) | {"steps"})
    validate(merged)
    guided = getattr(merged, "classifier_path", "")
    if getattr(merged, "classes", "") and not merged.class_cond and not guided:
        raise UserError(f"--classes needs a class-conditional model; {source} has no classes")
    return merged


def _objective(config: SampleConfig | SearchConfig, stored: dict[str, Any], source: str) -> dict[str, Any]:
    """training_mode, and the sampler and grid that go with it, as far as the command left them open."""
    given = "training_mode" in config.explicit
    mode = stored.get("training_mode")
    if mode is None and not given and isinstance(config, SampleConfig):
        raise UserError(f"{source} does not say how it was trained: give --training_mode or --preset")
    if mode and given and is_consistency(mode) != is_consistency(config.training_mode):
        raise UserError(
            f"--training_mode {config.training_mode} contradicts {source}, which was trained with {mode}"
        )
    if given or mode is None:
        mode = config.training_mode
    taken = {"training_mode": mode, "sampler": DEFAULT_SAMPLER[mode]}
    if "steps" in stored:
        taken["steps"] = stored["steps"]
        taken["end"] = str(stored["steps"] - 1)
    flags = flags_of(type(config))
    return {name: value for name, value in taken.items() if name in flags and name not in config.explicit}
