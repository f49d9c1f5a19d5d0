"""What a model file says fills in what a command left open, and must not contradict it."""

from dataclasses import replace
from typing import Any

from cm.config import plugins
from cm.config.derived import (
    ModelUser,
    has_two_times,
    last_known,
    stored_scales,
    told_guidance,
    with_two_steps,
)
from cm.config.fields import flags_of
from cm.config.flags import ModelFlags
from cm.config.parsing import parse_guidance
from cm.config.rows import NETWORKS, OBJECTIVES, SAMPLERS
from cm.config.scripts import CmTrainConfig, SampleConfig, SearchConfig, changed
from cm.config.validation import validate
from cm.errors import UserError

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


# What a student shares with its teacher beside the network's own options, so that it can start from its weights.
SHARED = (
    *("network", "image_size", "patch_size", "in_channels", "num_classes", "class_cond", "augment_dim"),
    "learn_sigma",
    *("num_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_head_channels"),
    *("num_heads", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown", "time_scale"),
    *("precond", "sigma_data", "sigma_min", "sigma_max", "rho"),
)


def adopt_teacher(config: CmTrainConfig, stored: dict[str, Any] | None, source: str) -> CmTrainConfig:
    """The configuration with what the command left open of the teacher's network and scalings, which its file says.

    Teacher and student are networks of one kind, so that the student can start from the teacher's weights and, in
    progressive distillation, become the teacher. UserError where they do not fit. A bare state dict says at most what
    its shapes tell (`cm.models.identify`); stored None: nothing.
    """
    if stored is None:
        return config
    _check_stage_one(config, stored, source)
    plugins.require(stored, source)
    row = NETWORKS[stored.get("network", config.network)]
    names = [*SHARED, *(flags_of(row.options) if row.options else ())]
    asked = {n for n in config.explicit if n != "image_size" or config.image_size}
    taken = {n: stored[n] for n in names if n in stored and n not in asked}
    column = stored.get("precond", "edm")
    if "precond" in config.explicit and config.precond != column:
        raise UserError(
            f"--precond {config.precond} contradicts --teacher_model_path {source}, which was trained with {column}"
        )
    adopted = changed(config, **{**taken, "precond": column}, explicit=config.explicit | set(taken))
    low, high = (float(stored.get(name, getattr(config, name))) for name in ("sigma_min", "sigma_max"))
    if column == "ve" and not low <= adopted.sigma_min < adopted.sigma_max <= high:
        raise UserError(
            f"--sigma_min {adopted.sigma_min} and --sigma_max {adopted.sigma_max} leave the noise levels that the "
            f"teacher {source} was trained on, {low} to {high}"
        )
    validate(adopted)
    return adopted


def _check_stage_one(config: CmTrainConfig, stored: dict[str, Any], source: str) -> None:
    """A consistency model that stands for the student below --transition_t: defined there, with the same boundary."""
    if OBJECTIVES[config.training_mode].learns_from != "consistency":
        return
    mode = stored.get("training_mode")
    if mode == config.training_mode:
        raise UserError(
            f"--teacher_model_path {source} was trained by {mode} itself, above its transition_t only; give its stage 1"
        )
    if stored.get("boundary", "skip") != config.boundary:
        raise UserError(
            f"--teacher_model_path {source} is the identity at another noise level: it was trained with --boundary "
            f"{stored.get('boundary', 'skip')}, not {config.boundary}"
        )


def inherit(config: ModelUser, stored: dict[str, Any], source: str) -> ModelUser:
    """The configuration with what the command left open filled in from a model file.

    stored: what the file says (`stored_config`, or `cm.models.identify` where it carries no configuration). A flag that
    the command set wins, except that it may not contradict the file where no tensor would show it.
    """
    plugins.require(stored, source)
    mode = stored.get("training_mode")
    if mode in OBJECTIVES and not OBJECTIVES[mode].draws:
        raise UserError(f"{source} is a {mode}, which draws no images: it goes with --guide")
    lowest = [OBJECTIVES[mode].lowest] if mode in OBJECTIVES and OBJECTIVES[mode].lowest else []
    for name in (*MUST_AGREE, *lowest):
        if name in config.explicit and name in stored and getattr(config, name) != stored[name]:
            raise UserError(
                f"--{name} {getattr(config, name)} contradicts {source}, which was trained with {stored[name]}"
            )
    network = NETWORKS[stored.get("network", config.network)]
    own = flags_of(network.options) if network.options else {}
    names = [n for n in (*flags_of(ModelFlags), *own, *lowest) if n not in FREE_TO_CHOOSE]
    taken = {n: stored[n] for n in names if n in stored and n not in config.explicit}
    if not config.image_size and "image_size" in stored:
        taken["image_size"] = stored["image_size"]
    if "class_names" in stored:
        taken["class_names"] = tuple(stored["class_names"])
    taken["told_scales"] = stored_scales(stored)
    if "training_mode" in flags_of(type(config)):
        taken.update(_objective(config, stored, source))
    merged = changed(config, **taken, explicit=config.explicit | set(taken) | {"steps", "told_scales"})
    if isinstance(merged, SampleConfig) and merged.sampler == "multistep":
        merged = with_two_steps(merged, stored)
    if isinstance(merged, SearchConfig) and lowest and "end" not in config.explicit:
        merged = replace(merged, end=str(last_known(merged, merged.steps)))
    validate(merged)
    if isinstance(merged, SampleConfig):
        check_sampler(merged, source)
    guided = getattr(merged, "guide", "")
    _check_told_scale(merged, source)
    steering = {"guide"} if told_guidance(merged) or merged.told_scales else {"guidance", "guide"}
    if steering & config.explicit and has_two_times(merged):
        raise UserError(f"--guidance and --guide are for models of one time; {source} is a flow map")
    if getattr(merged, "classes", "") and not merged.class_cond and not guided:
        raise UserError(f"--classes needs a class-conditional model; {source} has no classes")
    return merged


def check_sampler(config: SampleConfig, source: str) -> None:
    """UserError for a sampler that jumps to any level with a model of one time."""
    if SAMPLERS[config.sampler].reads == "jumps" and not has_two_times(config):
        raise UserError(
            f"--sampler {config.sampler} needs a flow map, a model of two times; {source} was trained with "
            f"{config.training_mode}"
        )


def _check_told_scale(config: ModelUser, source: str) -> None:
    """A model that is told the scale of its guidance follows one that it knows, at the levels of its training."""
    if not config.told_scales:
        return
    if "guide" in config.explicit:
        raise UserError(f"--guide: {source} is told the scale of its guidance: give --guidance alone")
    if "guidance" in config.explicit:
        (low, high), asked = config.told_scales, parse_guidance(config.guidance)
        if not low <= asked.low <= high:
            raise UserError(f"--guidance {asked.low:g}: {source} knows scales from {low:g} to {high:g}")
        if "," in config.guidance:
            raise UserError(
                f"--guidance {config.guidance}: {source} has learned at which levels it acts; give a scale"
            )


def _objective(config: SampleConfig | SearchConfig, stored: dict[str, Any], source: str) -> dict[str, Any]:
    """training_mode, and the sampler and grid that go with it, as far as the command left them open."""
    given = "training_mode" in config.explicit
    mode = stored.get("training_mode")
    if mode is None and not given and isinstance(config, SampleConfig):
        raise UserError(f"{source} does not say how it was trained: give --training_mode or --preset")
    if mode and given and OBJECTIVES[mode].kind != OBJECTIVES[config.training_mode].kind:
        raise UserError(
            f"--training_mode {config.training_mode} contradicts {source}, which was trained with {mode}"
        )
    if given or mode is None:
        mode = config.training_mode
    taken = {"training_mode": mode, "sampler": OBJECTIVES[mode].sampler}
    sampler = config.sampler if "sampler" in config.explicit else taken["sampler"]
    jumps = isinstance(config, SampleConfig) and SAMPLERS[sampler].reads == "jumps"
    # Of a flow map they are its jumps, no points of the grid that editing, search and other samplers walk along.
    if "steps" in stored and (jumps or not OBJECTIVES[mode].two_times):
        taken["steps"] = stored["steps"]
        taken["end"] = str(stored["steps"] - 1)
    flags = flags_of(type(config))
    return {name: value for name, value in taken.items() if name in flags and name not in config.explicit}
