"""Refuse configurations that make no sense, naming the flag. Pure Python; reads no file.

Choices and bounds stand on the flags themselves (`cm.config.fields`); here are the rules between flags.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NoReturn

from cm.config import parsing, rules
from cm.config.derived import AUTO
from cm.config.fields import check_flag, flags_of
from cm.config.flags import GuidanceFlags, LoopFlags, ModelFlags, SamplingFlags
from cm.config.registry import Sampler
from cm.config.rows import DISTANCES, NETWORKS, OBJECTIVES, PAIRS, PRECONDS, SAMPLERS
from cm.config.scripts import (
    ClassifierConfig,
    CmTrainConfig,
    Config,
    EditConfig,
    EdmTrainConfig,
    LikelihoodConfig,
    SampleConfig,
    SearchConfig,
    TrainConfig,
    plain_class,
)
from cm.errors import UserError


def validate(config: Config) -> None:
    """Raise UserError for the first flag whose value is unknown, out of range or contradicts another flag."""
    for name, field in flags_of(type(config)).items():
        check_flag(field, getattr(config, name))
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
    }[plain_class(type(config))]
    if isinstance(config, EditConfig) and config.task == "interpolate":
        needed = ("model_path", "between")
    for name in needed:
        if not getattr(config, name):
            raise UserError(f"--{name} is missing")
    if isinstance(config, CmTrainConfig) and not config.teacher_model_path:
        if OBJECTIVES[config.training_mode].teacher:
            raise UserError(f"--training_mode {config.training_mode} needs --teacher_model_path")
        if config.init == "teacher":
            raise UserError("--init teacher needs --teacher_model_path")


def _check_model(config: ModelFlags) -> None:
    if config.sigma_min >= config.sigma_max:
        raise UserError(f"--sigma_min {config.sigma_min} must be smaller than --sigma_max {config.sigma_max}")
    if config.use_fp16 and config.precision not in ("", "fp16"):
        raise UserError(f"--use_fp16 True contradicts --precision {config.precision}")
    if (config.use_fp16 or config.precision not in ("", "fp32")) and not NETWORKS[config.network].half:
        raise UserError(
            f"--precision {config.precision or 'fp16'}: --network {config.network} computes in fp32 only"
        )
    if config.in_channels not in (0, 1, 3):
        raise UserError(f"--in_channels must be 1 or 3, or 0 for those of the data, got {config.in_channels}")
    _check_column(config)
    # Where the data, the model or auto has the last word, the configuration is checked again.
    if config.image_size and config.preset != AUTO:
        rules.check_architecture(config)


def _check_column(config: ModelFlags) -> None:
    """--precond against the range of noise levels and the form of a consistency function."""
    column = PRECONDS[config.precond]
    span = column.span
    if span and not span[0] <= config.sigma_min < config.sigma_max <= span[1]:
        raise UserError(
            f"--sigma_min {config.sigma_min} and --sigma_max {config.sigma_max} leave the noise levels of --precond "
            f"{config.precond}, {span[0]} to {span[1]}"
        )
    if config.boundary == "piecewise" and not column.piecewise:
        raise UserError(f"--boundary {config.boundary} goes with --precond edm, not with {config.precond}")


def _check_training(config: TrainConfig) -> None:
    if config.label_dropout and not config.class_cond:
        raise UserError(f"--label_dropout {config.label_dropout} needs --class_cond True")
    parsing.parse_ema_rates(config.ema_rate)
    parsing.parse_ema_profiles(config.ema_profiles)
    if config.lr_schedule == "inverse_sqrt" and not config.lr_anneal_steps:
        raise UserError(
            "--lr_schedule inverse_sqrt needs --lr_anneal_steps, the step from which the rate falls"
        )
    decays = config.lr_schedule not in ("", "constant")
    if decays and not (config.lr_anneal_steps or config.total_training_steps):
        raise UserError(
            f"--lr_schedule {config.lr_schedule} needs --lr_anneal_steps or --total_training_steps"
        )
    if config.shard == "fsdp" and config.compile:
        raise UserError(
            "--shard fsdp gathers a block at a time, which --compile True cannot follow: choose one"
        )
    if config.keep_every and not config.keep_last:
        raise UserError("--keep_every needs --keep_last: without it all checkpoints are kept")


def _check_edm(config: EdmTrainConfig) -> None:
    if config.augment and not NETWORKS[config.network].augment:
        raise UserError(
            f"--augment {config.augment}: --network {config.network} takes no augmentation labels"
        )
    if config.uncertainty and not getattr(config, "logvar_channels", 0):
        raise UserError(
            "--uncertainty True needs a network with a head for it: --network edm2 and --logvar_channels"
        )
    if config.uncertainty and config.diffusion_schedule:
        raise UserError(f"--uncertainty True is not for --diffusion_schedule {config.diffusion_schedule}")
    # The column's own distribution comes with --precond and was not asked for.
    implied = PRECONDS[config.precond].implied("edm_train").get("schedule_sampler")
    default = flags_of(EdmTrainConfig)["schedule_sampler"].default
    if config.diffusion_schedule and config.schedule_sampler not in (default, implied):
        raise UserError(
            f"--schedule_sampler {config.schedule_sampler}: with --diffusion_schedule {config.diffusion_schedule} "
            "time is drawn uniformly"
        )


def _check_consistency(config: CmTrainConfig) -> None:
    if config.total_training_steps < 1:
        raise UserError(f"--total_training_steps must be positive, got {config.total_training_steps}")
    if config.schedule_sampler != "uniform":
        raise UserError(
            f"--schedule_sampler {config.schedule_sampler}: consistency losses draw grid points uniformly"
        )
    row = OBJECTIVES[config.training_mode]
    if row.stages != (config.scale_mode == "progdist"):
        raise UserError(
            f"--training_mode {config.training_mode} and --scale_mode {config.scale_mode} do not fit: "
            "progdist needs progdist"
        )
    for flag, needed in (("training_mode", row.boundary), ("pairs", PAIRS[config.pairs].boundary)):
        if needed and config.boundary != needed:
            raise UserError(
                f"--{flag} {getattr(config, flag)} needs --boundary {needed}, got {config.boundary}"
            )
    if row.continuous:
        _check_continuous(config, row.teacher)
    if (lowest := getattr(config, "transition_t", config.sigma_min)) >= config.sigma_max:
        raise UserError(f"--transition_t {lowest} must be below --sigma_max {config.sigma_max}")
    if row.target and not config.start_ema:
        raise UserError(f"--training_mode {config.training_mode} needs a target network: --start_ema above 0")
    if row.target and config.scale_mode != "fixed":
        raise UserError(
            f"--training_mode {config.training_mode} has one grid: --scale_mode must be fixed, got {config.scale_mode}"
        )
    if row.segments and config.scale_mode != "fixed":
        raise UserError(
            f"--training_mode {config.training_mode} has --segments throughout: --scale_mode must be fixed, got "
            f"{config.scale_mode}"
        )
    if config.diffusion_schedule and not (row.stages or row.segments):
        known = " or ".join(name for name, r in OBJECTIVES.items() if r.stages or r.segments)
        raise UserError(
            f"--diffusion_schedule {config.diffusion_schedule} is for edm_train and --training_mode {known}, "
            f"not for {config.training_mode}"
        )
    _check_teacher_guidance(config)
    rules.check_scales(config)


def _check_teacher_guidance(config: CmTrainConfig) -> None:
    """Only a denoiser that stays the teacher can be guided; a stage's student has learned the guidance already."""
    guidance = parsing.parse_guidance(config.guidance)
    if guidance.plain and config.guide:
        raise UserError(f"--guide {config.guide} does nothing at --guidance 1: give a larger scale")
    known = [n for n, r in OBJECTIVES.items() if r.teacher and not r.stages and r.learns_from == "denoiser"]
    if not guidance.plain and config.training_mode not in known:
        raise UserError(
            f"--guidance {config.guidance} is for the teacher of --training_mode {' or '.join(known)}, not of "
            f"{config.training_mode}"
        )


def _check_continuous(config: CmTrainConfig, distillation: bool) -> None:
    mode = f"--training_mode {config.training_mode}"
    stop_grad = getattr(config, "stop_grad", True)
    if not distillation and not stop_grad:  # Song et al. 2023, App. B
        raise UserError(
            "--stop_grad False is for continuous_distillation: without a teacher that loss is quadratic in the noise "
            "and has another minimum"
        )
    if hasattr(config, "stop_grad") and stop_grad and not DISTANCES[config.loss_norm].curved:
        known = ", ".join(name for name, row in DISTANCES.items() if row.curved)
        raise UserError(
            f"--loss_norm {config.loss_norm} has no continuous-time loss with --stop_grad True; choose one of {known}"
        )
    if config.scale_mode != "fixed":
        raise UserError(f"{mode} has no grid to change: --scale_mode must be fixed, got {config.scale_mode}")
    if config.boundary == "piecewise":
        raise UserError(f"{mode} needs --boundary skip: piecewise has no derivative at sigma_min")
    if config.use_checkpoint and not stop_grad:
        raise UserError(f"{mode} with --stop_grad False does not work with --use_checkpoint True")


def _check_model_use(config: SamplingFlags | EditConfig) -> None:
    parsing.parse_weights(config.weights)
    if config.classes:
        known = config.num_classes if config.class_cond else 0
        parsing.parse_classes(config.classes, known, config.class_names or None)


def _check_time_points(config: SampleConfig | EditConfig) -> None:
    if config.ts:
        # A grid that the command does not give comes from the model file; it is checked again then.
        parsing.parse_ts(config.ts, config.steps if "steps" in config.explicit else None)
    if config.sigmas:
        parsing.parse_sigmas(config.sigmas, config.sigma_min, config.sigma_max)


def _check_sampling(config: SamplingFlags) -> None:
    _check_model_use(config)
    if config.s_tmin > config.s_tmax:
        raise UserError(f"--s_tmin {config.s_tmin} must not be above --s_tmax {config.s_tmax}")


def _check_sample(config: SampleConfig) -> None:
    if config.sampler == "multistep":
        if config.ts and config.sigmas:
            raise UserError("--ts and --sigmas say the same thing: give one of them")
    elif config.sigmas and not config.preset:  # a preset's are those of two steps
        raise UserError(f"--sigmas is for --sampler multistep, not {config.sampler}")
    _check_time_points(config)
    _check_solver(config)


def _check_solver(config: SampleConfig) -> None:
    # Without --sampler the model file chooses; the merged configuration is checked again.
    if "sampler" in config.explicit:
        if config.time_steps and not SAMPLERS[config.sampler].other_grids:
            _refuse_for_sampler(config, "time_steps", lambda row: row.other_grids)
        for name, field in flags_of(GuidanceFlags).items():
            guided = SAMPLERS[config.sampler].guidance or (name == "guidance" and _may_be_told(config))
            if getattr(config, name) != field.default and not guided:
                _refuse_for_sampler(config, name, lambda row: row.guidance)
    if parsing.parse_guidance(config.guidance).drawn:
        raise UserError(f"--guidance {config.guidance}: samples have one scale")


def _may_be_told(config: SampleConfig) -> bool:
    """Whether the model is told its guidance, as far as one knows before its file is read."""
    if "told_scales" in config.explicit:  # it has been
        return bool(config.told_scales) or OBJECTIVES[config.training_mode].told_guidance
    if "training_mode" in config.explicit:
        row = OBJECTIVES[config.training_mode]
        return row.told_guidance or row.teacher
    return SAMPLERS[config.sampler].reads != "denoiser"


def _refuse_for_sampler(config: SampleConfig, flag: str, reads: Callable[[Sampler], bool]) -> NoReturn:
    known = " or ".join(name for name, row in SAMPLERS.items() if reads(row))
    raise UserError(f"--{flag} is for --sampler {known}, not for {config.sampler}")


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


def _check_edit(config: EditConfig) -> None:
    _check_model_use(config)
    flags = flags_of(type(config))
    # A --config file names every flag: a value that is the default says nothing.
    changed = {n for n in config.explicit & flags.keys() if getattr(config, n) != flags[n].default}
    if config.ts and config.sigmas:
        raise UserError("--ts and --sigmas say the same thing: give one of them")
    for name in {"sigma_start", "sigma"} & set(flags):
        level = getattr(config, name)
        if name in changed and (config.ts or config.sigmas):
            raise UserError(
                f"--{name} and --ts or --sigmas both give the first noise level: give one of them"
            )
        if name in config.explicit and not config.sigma_min <= level <= config.sigma_max:
            raise UserError(
                f"--{name} {level} must lie between --sigma_min {config.sigma_min} and --sigma_max {config.sigma_max}"
            )
    _check_time_points(config)
    if config.task == "interpolate" and config.between and "," not in config.between:
        raise UserError(f"--between needs two seeds or files at least, got {config.between!r}")
    if config.task == "superres" and config.image_size % config.factor and "image_size" in config.explicit:
        raise UserError(f"--factor {config.factor} does not divide --image_size {config.image_size}")


def _check_likelihood(config: LikelihoodConfig) -> None:
    parsing.parse_weights(config.weights)


# Group of flags -> its rules; a configuration obeys those of every group that it has
CHECKS: dict[type, Callable[[Any], None]] = {
    ModelFlags: _check_model,
    LoopFlags: _check_training,
    EdmTrainConfig: _check_edm,
    CmTrainConfig: _check_consistency,
    SamplingFlags: _check_sampling,
    SampleConfig: _check_sample,
    SearchConfig: _check_search,
    EditConfig: _check_edit,
    LikelihoodConfig: _check_likelihood,
}
