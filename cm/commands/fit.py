"""A training configuration made to fit: teacher, data, `--preset auto`, and the memory of this machine."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from cm.config.auto import ARCHITECTURE, architecture, open_flags, patches, training
from cm.config.derived import AUTO, learns_from, run_dir, stop_step, training_mode
from cm.config.fields import flags_of
from cm.config.inherit import adopt_teacher
from cm.config.parsing import parse_attention, parse_channel_mult, parse_ema_rates
from cm.config.rows import NETWORKS, OBJECTIVES
from cm.config.rules import check_architecture, check_patches, inside_patches
from cm.config.scripts import CmTrainConfig, TrainConfig, changed, script_of
from cm.config.validation import validate
from cm.data.facts import DataFacts, describe
from cm.errors import UserError
from cm.models.factory import choose_device
from cm.models.files import ModelFile
from cm.models.identify import identify
from cm.runtime import distributed
from cm.runtime.inputs import json_or_none
from cm.training.memory import available, images_per_rank, largest_microbatch
from cm.training.roles import load_teacher

# A class_cond of its own makes no sense in a student; how its teacher saw the data does.
AS_THE_TEACHER_SAW = ("random_flip", "labels", "composite", "random_crop")


def fitted(config: TrainConfig) -> TrainConfig:
    """The configuration as a run would have it, for --dry_run and plans."""
    teacher = load_teacher(getattr(config, "teacher_model_path", ""), learns_from(config))
    config, _ = fit(config, teacher, run_dir(config))
    facts = describe(config.data_dir, config.labels, config.in_channels)
    classes = len(facts.classes) if config.class_cond else 0
    return replace(
        config,
        in_channels=config.in_channels or facts.channels,
        num_classes=config.num_classes or classes,
    )


def fit(config: TrainConfig, teacher: ModelFile | None, directory: str) -> tuple[TrainConfig, list[str]]:
    """(the configuration that can be trained, what the log should say of it). All ranks must call it.

    directory: of the run; what auto chose when it began stays.
    """
    notes: list[str] = []
    if teacher is not None:
        config = adopt_teacher(config, _says(config, teacher), teacher.path)
    if config.preset == AUTO or not config.image_size:
        # It reads headers of files: once, not once per rank.
        facts = distributed.on_main(lambda: describe(config.data_dir, config.labels, config.in_channels))
        config = with_side(config, facts)
        if config.preset == AUTO:
            stored = distributed.on_main(lambda: chosen_before(config, directory))
            chosen = (
                stored if stored is not None else choose(config, facts, (teacher and teacher.config) or {})
            )
            notes.append("--preset auto: " + " ".join(f"--{n} {v}" for n, v in sorted(chosen.items())))
            config = changed(config, **chosen, explicit=config.explicit | set(chosen))
        validate(config)
        check_architecture(config)
    config, said = fit_memory(config)
    return config, [*notes, *said, *warnings(config)]


def _says(config: CmTrainConfig, teacher: ModelFile) -> dict[str, Any] | None:
    """The teacher's configuration: stored, or from its shapes where the command says nothing of the network."""
    if teacher.config is not None or set(ARCHITECTURE) & config.explicit:
        return teacher.config
    try:
        return identify(teacher.state, teacher.path, config.image_size)
    except UserError:
        return None


def with_side(config: TrainConfig, facts: DataFacts) -> TrainConfig:
    """--image_size from the data, where the command leaves it open."""
    if "image_size" in config.explicit and config.image_size:
        return config
    if not facts.side:
        raise UserError(
            f"--data_dir {config.data_dir}: the images have several sizes or are not square: "
            f"cm prepare {shlex.quote(config.data_dir)} FOLDER --image_size N, or give --image_size"
        )
    return replace(config, image_size=facts.side, explicit=config.explicit | {"image_size"})


def choose(config: TrainConfig, facts: DataFacts, teacher: dict[str, Any]) -> dict[str, Any]:
    """What auto chooses of the flags that the command leaves open."""
    gpu = choose_device(config.device).type == "cuda"
    ranks = distributed.get_world_size()
    flags = flags_of(type(config))
    found = {} if teacher else open_flags(config.explicit, network(config, gpu))
    steps = config.total_training_steps if "total_training_steps" in config.explicit else 0
    found |= training(
        training_mode(config),
        side=config.image_size,
        channels=config.in_channels or facts.channels,
        count=facts.count,
        width=found.get("num_channels", config.num_channels),
        gpu=gpu,
        ranks=ranks,
        steps=steps,
    )
    if boundary := OBJECTIVES[training_mode(config)].boundary:
        found["boundary"] = boundary
    found |= {n: teacher[n] for n in AS_THE_TEACHER_SAW if n in teacher}
    found["class_cond"] = facts.labelled
    found["num_workers"] = 0 if facts.array else 4
    return {n: v for n, v in open_flags(config.explicit, found).items() if n in flags}


def network(config: TrainConfig, gpu: bool) -> dict[str, Any]:
    """What auto chooses of the network, within the patches that the command asks for or leaves open."""
    size = patches(config.image_size, gpu)
    if not open_flags(config.explicit, {"patch_size": size}):
        size = config.patch_size
    check_patches(config.image_size, size)
    return architecture(config.image_size, gpu, size)


def chosen_before(config: TrainConfig, directory: str) -> dict[str, Any] | None:
    """What auto chose when this run began: another machine, or a free gigabyte less, must not change it."""
    stored = json_or_none(Path(directory, "config.json"))
    if stored is None or stored.get("preset") != AUTO:
        return None
    if (other := stored.get("script", script_of(type(config)))) != script_of(type(config)):
        raise UserError(f"--out_dir {directory} holds a run of {other}: give this one a folder of its own")
    flags = flags_of(type(config))
    kept = {n: v for n, v in stored.items() if n in flags and n not in config.explicit}
    own = ("preset", "config", "out_dir", "dry_run", "s_tmax")
    return {n: v for n, v in kept.items() if v != flags[n].default and n not in own}


def fit_memory(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """--microbatch for a batch that does not fit; UserError where not even one image does. All ranks must call it."""
    world, here = distributed.get_world_size(), distributed.current_launch().local_world_size
    images = images_per_rank(config, world)
    free = min(distributed.all_gather_object(available(choose_device(config.device), here)))
    asked = min(config.microbatch, images) if config.microbatch > 0 else images
    fits = largest_microbatch(config, asked, free)
    free_gib = f"{free / 2**30:.1f} GiB are free"
    if fits == 0:
        raise UserError(
            f"a network of --num_channels {config.num_channels} for {config.image_size}-px images does not fit: "
            f"{free_gib}; a smaller one, --use_checkpoint True or --shard optimizer takes less"
        )
    if fits >= asked:
        return config, []
    note = f"note: {asked} images at a time do not fit ({free_gib}): --microbatch {fits}, the same gradient"
    return replace(config, microbatch=fits), [note]


def warnings(config: TrainConfig) -> list[str]:
    """What is likely to disappoint."""
    found, steps = [], stop_step(config)
    for rate in parse_ema_rates(config.ema_rate):
        window = 1 / max(1 - rate, 1e-12)
        if steps and not config.ema_warmup and window > steps / 2:
            found.append(
                f"warning: --ema_rate {rate:g} averages over {window:.0f} steps, the run has {steps}: samples from "
                "that average will hold its initial weights; give --ema_warmup True or a smaller rate"
            )
    if NETWORKS[config.network].levels:
        side = inside_patches(config).image_size
        mult = parse_channel_mult(config.channel_mult, side)
        if not parse_attention(config.attention_resolutions, side, len(mult)):
            known = ", ".join(str(side // 2**i) for i in range(len(mult)))
            found.append(
                f"note: no level has attention: --attention_resolutions may name {known} (the middle has it always)"
            )
    return found
