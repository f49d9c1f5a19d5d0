"""Refuse configurations that make no sense, naming the flag. Pure Python; reads no file."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from cm.config import parsing, rules
from cm.config.flags import CONTINUOUS_MODES, GuidanceFlags
from cm.config.implied import COLUMNS
from cm.config.scripts import (
    ClassifierConfig,
    CmTrainConfig,
    Config,
    EditConfig,
    EdmTrainConfig,
    LikelihoodConfig,
    LoopFlags,
    ModelFlags,
    SampleConfig,
    SamplingFlags,
    SearchConfig,
    flags_of,
)
from cm.errors import UserError

# How small a number may be; every flag that is not named here may be anything of its type.
MINIMUM: dict[str, float] = {
    "image_size": 1,
    "in_channels": 0,
    "num_classes": 0,
    "num_channels": 1,
    "num_res_blocks": 1,
    "num_heads": 1,
    "augment_dim": 0,
    "time_scale": 0,
    "dropout": 0,
    "teacher_dropout": 0,
    "rho": 1,
    "startup_timeout": 0,
    "step_timeout": 0,
    "num_workers": 0,
    "lr": 0,
    "lr_anneal_steps": 0,
    "lr_warmup_steps": 0,
    "beta1": 0,
    "beta2": 0,
    "adam_eps": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "global_batch_size": 1,
    "fp16_scale_growth": 0,
    "seed": 0,
    "log_interval": 1,
    "keep_last": 0,
    "keep_every": 0,
    "max_hours": 0,
    "max_bad_steps": 1,
    "preview_count": 0,
    "preview_interval": 0,
    "total_training_steps": 0,
    "augment": 0,
    "p_std": 0,
    "num_timesteps": 2,
    "start_scales": 1,
    "end_scales": 1,
    "distill_steps_per_iter": 1,
    "lpips_size": 0,
    "num_samples": 1,
    "s_churn": 0,
    "s_tmin": 0,
    "s_tmax": 0,
    "s_noise": 0,
    "steps": 1,
    "grid_images": 0,
    "grid_columns": 0,
    "points": 1,
    "coarse": 0,
    "num_results": 1,
    "num_images": 0,
    "factor": 2,
    "repeat": 1,
    "frames": 2,
    "frame_ms": 1,
    "solver_order": 1,
    "corrector_steps": 0,
    "snr": 0,
    "classifier_scale": 0,
    "classifier_width": 1,
    "classifier_depth": 1,
}
BELOW_ONE = ("dropout", "teacher_dropout", "beta1", "beta2")
POSITIVE = ("sigma_min", "sigma_data", "startup_timeout", "step_timeout", "solver_alpha", "tolerance")
POSITIVE_OR_UNSET = ("batch_size", "microbatch", "save_interval", "num_heads_upsample", "num_head_channels")


def validate(config: Config) -> None:
    """Raise UserError for the first flag whose value is unknown, out of range or contradicts another flag."""
    values = {name: getattr(config, name) for name in flags_of(type(config))}
    _check_choices(config, values)
    _check_ranges(values)
    for cls, check in CHECKS.items():
        if isinstance(config, cls):
            check(config)


def require_inputs(config: Config) -> None:
    """Raise UserError for the first path that a real run needs and that was not given (a dry run needs none)."""
    needed = {
        EdmTrainConfig: ("data_dir",),
        ClassifierConfig: ("data_dir",),
        CmTrainConfig: ("data_dir",),
        SampleConfig: ("model_path",),
        SearchConfig: ("model_path", "ref_batch"),
        EditConfig: ("model_path", "input"),
        LikelihoodConfig: ("model_path", "data_dir"),
    }[type(config)]
    if isinstance(config, EditConfig) and config.task == "interpolate":
        needed = ("model_path", "between")
    for name in needed:
        if not getattr(config, name):
            raise UserError(f"--{name} is missing")
    if isinstance(config, CmTrainConfig) and not config.teacher_model_path:
        if config.training_mode not in ("consistency_training", "continuous_training"):
            raise UserError(f"--training_mode {config.training_mode} needs --teacher_model_path")
        if config.init == "teacher":
            raise UserError("--init teacher needs --teacher_model_path")


def _check_choices(config: Config, values: dict[str, Any]) -> None:
    for name, field in flags_of(type(config)).items():
        choices = field.metadata["choices"]
        if choices and values[name] not in choices:
            known = ", ".join(c or '""' for c in choices)
            raise UserError(f"--{name} must be one of {known}, got {values[name]!r}")


def _check_ranges(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if math.isnan(value) or (math.isinf(value) and name != "s_tmax"):
            raise UserError(f"--{name} must be a finite number, got {value}")
        if name in POSITIVE and value <= 0:
            raise UserError(f"--{name} must be positive, got {value}")
        if name in MINIMUM and value < MINIMUM[name]:
            raise UserError(f"--{name} must be at least {MINIMUM[name]}, got {value}")
        if name in BELOW_ONE and value >= 1:
            raise UserError(f"--{name} must be below 1, got {value}")
        if name in POSITIVE_OR_UNSET and value != -1 and value < 1:
            # -1 is the published way to say "not given".
            raise UserError(f"--{name} must be positive, or -1 for unset, got {value}")


def _check_model(config: ModelFlags) -> None:
    if config.sigma_min >= config.sigma_max:
        raise UserError(f"--sigma_min {config.sigma_min} must be smaller than --sigma_max {config.sigma_max}")
    if config.use_fp16 and config.precision not in ("", "fp16"):
        raise UserError(f"--use_fp16 True contradicts --precision {config.precision}")
    if config.in_channels not in (0, 1, 3):
        raise UserError(f"--in_channels must be 1 or 3, or 0 for those of the data, got {config.in_channels}")
    _check_column(config)
    rules.check_architecture(
        network=config.network,
        image_size=config.image_size,
        num_channels=config.num_channels,
        channel_mult=config.channel_mult,
        attention_resolutions=config.attention_resolutions,
        num_heads=config.num_heads,
        num_heads_upsample=config.num_heads_upsample,
        num_head_channels=config.num_head_channels,
        augment_dim=config.augment_dim,
    )


def _check_column(config: ModelFlags) -> None:
    """--precond against the range of noise levels and the form of a consistency function."""
    span = COLUMNS[config.precond].span
    if span and not span[0] <= config.sigma_min < config.sigma_max <= span[1]:
        raise UserError(
            f"--sigma_min {config.sigma_min} and --sigma_max {config.sigma_max} leave the noise levels of --precond "
            f"{config.precond}, {span[0]} to {span[1]}"
        )
    if config.precond != "edm" and config.boundary != "skip":
        raise UserError(f"--boundary {config.boundary} goes with --precond edm, not with {config.precond}")


def _check_training(config: EdmTrainConfig | CmTrainConfig) -> None:
    parsing.parse_ema_rates(config.ema_rate)
    if config.adam_eps == 0:
        raise UserError("--adam_eps must be positive, got 0")
    decays = config.lr_schedule not in ("", "constant")
    if decays and not (config.lr_anneal_steps or config.total_training_steps):
        raise UserError(
            f"--lr_schedule {config.lr_schedule} needs --lr_anneal_steps or --total_training_steps"
        )
    if isinstance(config, EdmTrainConfig) and config.augment and config.network == "adm":
        raise UserError(f"--augment {config.augment}: --network adm takes no augmentation labels")
    if config.keep_every and not config.keep_last:
        raise UserError("--keep_every needs --keep_last: without it all checkpoints are kept")


def _check_edm(config: EdmTrainConfig) -> None:
    # The column's own distribution comes with --precond and was not asked for.
    free = ("lognormal", COLUMNS[config.precond].training.get("schedule_sampler"))
    if config.diffusion_schedule and config.schedule_sampler not in free:
        raise UserError(
            f"--schedule_sampler {config.schedule_sampler}: with --diffusion_schedule {config.diffusion_schedule} "
            "time is drawn uniformly"
        )


def _check_classifier(config: ClassifierConfig) -> None:
    if not config.class_cond:
        raise UserError("--class_cond False: a classifier learns the classes")
    if config.preview_count:
        raise UserError(f"--preview_count {config.preview_count}: a classifier draws no images")
    if config.network != "adm" or config.precond != "edm":
        raise UserError(
            f"--network {config.network} --precond {config.precond}: a classifier is an adm network with edm's scalings"
        )
    if config.num_head_channels < 1:
        raise UserError(
            f"--num_head_channels must be positive for a classifier, got {config.num_head_channels}"
        )


def _check_consistency(config: CmTrainConfig) -> None:
    if config.total_training_steps < 1:
        raise UserError(f"--total_training_steps must be positive, got {config.total_training_steps}")
    if config.schedule_sampler != "uniform":
        raise UserError(
            f"--schedule_sampler {config.schedule_sampler}: consistency losses draw grid points uniformly"
        )
    if (config.training_mode == "progdist") != (config.scale_mode == "progdist"):
        raise UserError(
            f"--training_mode {config.training_mode} and --scale_mode {config.scale_mode} do not fit: "
            "progdist needs progdist"
        )
    if config.training_mode in CONTINUOUS_MODES:
        _check_continuous(config)
    if config.diffusion_schedule and config.training_mode != "progdist":
        raise UserError(
            f"--diffusion_schedule {config.diffusion_schedule} is for edm_train and --training_mode progdist, "
            f"not for {config.training_mode}"
        )
    rules.check_scales(
        target_ema_mode=config.target_ema_mode,
        start_ema=config.start_ema,
        scale_mode=config.scale_mode,
        start_scales=config.start_scales,
        end_scales=config.end_scales,
    )


def _check_continuous(config: CmTrainConfig) -> None:
    mode = f"--training_mode {config.training_mode}"
    rules.check_continuous(
        loss_norm=config.loss_norm,
        distillation=config.training_mode == "continuous_distillation",
        stop_grad=config.stop_grad,
    )
    if config.scale_mode != "fixed":
        raise UserError(f"{mode} has no grid to change: --scale_mode must be fixed, got {config.scale_mode}")
    if config.boundary != "skip":
        raise UserError(f"{mode} needs --boundary skip: {config.boundary} has no derivative at sigma_min")
    if config.use_checkpoint and not config.stop_grad:
        raise UserError(f"{mode} with --stop_grad False does not work with --use_checkpoint True")


def _check_sampling(config: SamplingFlags) -> None:
    parsing.parse_weights(config.weights)
    if config.batch_size < 1:
        raise UserError(f"--batch_size must be positive, got {config.batch_size}")
    if config.classes:
        parsing.parse_classes(config.classes, config.num_classes if config.class_cond else 0)
    if config.s_tmin > config.s_tmax:
        raise UserError(f"--s_tmin {config.s_tmin} must not be above --s_tmax {config.s_tmax}")


def _check_sample(config: SampleConfig) -> None:
    if config.sampler == "multistep":
        if bool(config.ts) == bool(config.sigmas):
            raise UserError("--sampler multistep needs either --ts or --sigmas")
    elif config.sigmas:
        raise UserError(f"--sigmas is for --sampler multistep, not {config.sampler}")
    if config.ts:
        # A grid that the command does not give comes from the model file; it is checked again then.
        parsing.parse_ts(config.ts, config.steps if "steps" in config.explicit else None)
    if config.sigmas:
        parsing.parse_sigmas(config.sigmas, config.sigma_min, config.sigma_max)
    _check_solver(config)


# Flag of image_sample -> the samplers that read it
SOLVER_FLAGS: dict[str, tuple[str, ...]] = {
    "time_steps": ("heun", "euler", "dpm", "ancestral", "general"),
    "noise_schedule": ("general",),
    "state_scale": ("general",),
    "solver_order": ("general",),
    "solver_alpha": ("general",),
    "sde": ("pc", "rk45"),
    "predictor": ("pc",),
    "corrector": ("pc",),
    "corrector_steps": ("pc",),
    "snr": ("pc",),
    "tolerance": ("rk45",),
    "classifier_path": ("heun", "euler", "dpm", "ancestral", "general", "pc", "rk45"),
    "classifier_scale": ("heun", "euler", "dpm", "ancestral", "general", "pc", "rk45"),
}


def _check_solver(config: SampleConfig) -> None:
    for name, samplers in SOLVER_FLAGS.items():
        # Without --sampler the model file chooses; the merged configuration is checked again.
        changed = getattr(config, name) != flags_of(SampleConfig)[name].default
        if changed and "sampler" in config.explicit and config.sampler not in samplers:
            raise UserError(f"--{name} is for --sampler {' or '.join(samplers)}, not for {config.sampler}")
    for name, field in flags_of(GuidanceFlags).items():
        if getattr(config, name) != field.default and not config.classifier_path:
            raise UserError(f"--{name} {getattr(config, name)} needs --classifier_path")
    if config.solver_order > 2 or config.solver_alpha > 1:
        raise UserError(
            "--solver_order must be 1 or 2 and --solver_alpha in (0, 1], "
            f"got {config.solver_order} and {config.solver_alpha}"
        )


def _check_search(config: SearchConfig) -> None:
    begin, end = (parsing.parse_ints(name, getattr(config, name)) for name in ("begin", "end"))
    for name, values in (("begin", begin), ("end", end)):
        # As for --ts: a grid that the command does not give comes from the model file.
        if min(values) < 0 or ("steps" in config.explicit and max(values) >= config.steps):
            raise UserError(
                f"--{name} {','.join(map(str, values))} leaves the grid of --steps {config.steps}: "
                f"indices are 0..{config.steps - 1}"
            )
    if begin[-1] >= end[0] or any(a > b for a, b in pairwise((*begin, *end))):
        raise UserError(
            f"--begin {config.begin} must be smaller than --end {config.end}, and neither may decrease"
        )
    if config.coarse > config.num_samples:
        raise UserError(f"--coarse {config.coarse} must not be above --num_samples {config.num_samples}")
    if config.features and "=" not in config.features:
        raise UserError(f"--features must be NAME=PATH, got {config.features!r}")


# Flag of image_edit -> the tasks that read it
EDIT_FLAGS: dict[str, tuple[str, ...]] = {
    "mask": ("inpaint",),
    "factor": ("superres",),
    "sigma_start": ("stroke",),
    "repeat": ("stroke",),
    "sigma": ("denoise",),
    "noisy_input": ("denoise",),
    "between": ("interpolate",),
    "frames": ("interpolate",),
    "frame_ms": ("interpolate",),
    "animation": ("interpolate",),
    "final_project": ("inpaint", "colorize", "superres"),
}


def _check_edit(config: EditConfig) -> None:
    parsing.parse_weights(config.weights)
    if config.batch_size < 1:
        raise UserError(f"--batch_size must be positive, got {config.batch_size}")
    # A --config file names every flag: a value that is the default says nothing.
    changed = {n for n in config.explicit if getattr(config, n) != flags_of(EditConfig)[n].default}
    for name, tasks in EDIT_FLAGS.items():
        if name in changed and config.task not in tasks:
            raise UserError(f"--{name} is for {' and '.join(tasks)}, not for {config.task}")
    if config.ts and config.sigmas:
        raise UserError("--ts and --sigmas say the same thing: give one of them")
    for name in ("sigma_start", "sigma"):
        level = getattr(config, name)
        if name in changed and (config.ts or config.sigmas):
            raise UserError(
                f"--{name} and --ts or --sigmas both give the first noise level: give one of them"
            )
        if name in config.explicit and not config.sigma_min <= level <= config.sigma_max:
            raise UserError(
                f"--{name} {level} must lie between --sigma_min {config.sigma_min} and --sigma_max {config.sigma_max}"
            )
    if config.ts:
        parsing.parse_ts(config.ts, config.steps if "steps" in config.explicit else None)
    if config.sigmas:
        parsing.parse_sigmas(config.sigmas, config.sigma_min, config.sigma_max)
    if config.classes:
        parsing.parse_classes(config.classes, config.num_classes if config.class_cond else 0)
    if config.task == "interpolate" and config.between and "," not in config.between:
        raise UserError(f"--between needs two seeds or files at least, got {config.between!r}")
    if config.task == "superres" and config.image_size % config.factor and "image_size" in config.explicit:
        raise UserError(f"--factor {config.factor} does not divide --image_size {config.image_size}")


def _check_likelihood(config: LikelihoodConfig) -> None:
    parsing.parse_weights(config.weights)
    if config.batch_size < 1:
        raise UserError(f"--batch_size must be positive, got {config.batch_size}")


# Group of flags -> its rules; a configuration obeys those of every group that it has
CHECKS: dict[type, Callable[[Any], None]] = {
    ModelFlags: _check_model,
    LoopFlags: _check_training,
    ClassifierConfig: _check_classifier,
    EdmTrainConfig: _check_edm,
    CmTrainConfig: _check_consistency,
    SamplingFlags: _check_sampling,
    SampleConfig: _check_sample,
    SearchConfig: _check_search,
    EditConfig: _check_edit,
    LikelihoodConfig: _check_likelihood,
}
