"""The networks of a run, from its configuration, its data and its teacher: student, target, teacher."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cm.config import plugins
from cm.config.derived import augmentation_labels, global_batch, guidance_of, init_source, learns_from
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig, TrainConfig, changed
from cm.data import ImageData
from cm.diffusion.denoiser import Denoiser
from cm.errors import UserError
from cm.models.factory import create_denoiser, create_network, create_precond
from cm.models.files import ModelFile, load_on_main
from cm.models.guides import TrainedClassifier, guided_by, load_guide
from cm.models.memory_format import memory_format
from cm.networks.second_clock import widened
from cm.objectives.base import Objective, Roles
from cm.runtime import distributed
from cm.seeding import derive_seed
from cm.storage.checkpoint import read_state
from cm.storage.weights import check_matching
from cm.training.factory import create_objective, trains_consistency


def load_teacher(model_path: str, wanted: str = "denoiser") -> ModelFile | None:
    """The teacher's weights, where a path is given: on rank 0, elsewhere their shapes.

    wanted: what it must be, `denoiser` or `consistency`.
    """
    if not model_path:
        return None
    teacher = load_on_main(model_path, flag="teacher_model_path")
    stored = teacher.config or {}
    plugins.require(stored, model_path)
    mode = stored.get("training_mode", "edm" if wanted == "denoiser" else "consistency_training")
    if OBJECTIVES[mode].teaches != wanted:
        what = "denoiser" if wanted == "denoiser" else "consistency model, the first stage of this one"
        raise UserError(f"{model_path} was trained by {mode}: a teacher is a {what} (--teacher_model_path)")
    return teacher


def resolve_config(config: TrainConfig, dataset: ImageData, teacher: ModelFile | None) -> TrainConfig:
    """The configuration with the channels and classes that the data and the teacher decide."""
    classes = config.num_classes
    if config.class_cond:
        known = (teacher.config or {}).get("num_classes") if teacher else None
        if known is None and teacher and "label_emb.weight" in teacher.state:
            known = len(teacher.state["label_emb.weight"])
        classes = classes or known or dataset.num_classes
        if dataset.num_classes > classes:
            raise UserError(
                f"{config.data_dir} has {dataset.num_classes} classes, the model {classes} (--data_dir)"
            )
    augment_dim = augmentation_labels(config)
    names = tuple(dataset.classes) if config.class_cond and dataset.num_classes == classes else ()
    found = {"in_channels": dataset.channels, "num_classes": classes, "class_names": names}
    return changed(config, **found, augment_dim=augment_dim)


def create_roles(
    config: TrainConfig, teacher_file: ModelFile | None, device: torch.device
) -> tuple[Objective, Roles]:
    """The objective, and the denoisers that it needs, with their initial weights. All ranks must call it.

    Weights from a file are right on rank 0 only; the trainer gives them to all ranks.
    """
    objective = create_objective(config)
    objective.load(device)
    layout = training_format(config, device)
    torch.manual_seed(derive_seed(config.seed, "init"))
    student = create_network(config).to(device, memory_format=layout)
    if initial_weights(config) == "teacher":
        load_into(student, teacher_file, "--init teacher", config)
    learned = create_denoiser(config, student, consistency=trains_consistency(config))
    target = teacher = None
    if objective.needs_target:
        network = create_network(config).to(device, memory_format=layout)
        network.load_state_dict(student.state_dict())
        target = replace(learned, net=network)
    if objective.needs_teacher:
        # A teacher is a denoiser or a consistency function: it knows one time, whatever the student knows.
        network = create_network(config, dropout=config.teacher_dropout, two_times=False)
        network = network.to(device, memory_format=layout)
        load_into(network, teacher_file, "--teacher_model_path", config)
        consistency = learns_from(config) == "consistency"
        teacher = Denoiser(network, create_precond(config, consistency=consistency))
        if (guidance := guidance_of(config)) is not None:
            guide = load_guide(config.guide, config, device) if config.guide else None
            if isinstance(guide, TrainedClassifier):
                raise UserError(f"--guide {config.guide} is a classifier: a teacher is guided by a denoiser")
            teacher = guided_by(teacher, guidance, guide, source=teacher_file, class_cond=config.class_cond)
    objective.attach(student)
    return objective, Roles(learned, target, teacher)


def training_format(config: TrainConfig, device: torch.device) -> torch.memory_format:
    """The memory format of the networks of a run. All ranks must call it."""
    local = global_batch(config, world := distributed.get_world_size()) // world
    micro = config.microbatch if config.microbatch > 0 else local
    return memory_format(config, device, training=True, images=max(min(micro, local), 1))


def with_format(config: TrainConfig, device: torch.device, checkpoint: Path | None) -> TrainConfig:
    """The configuration with --channels_last auto decided: as the run computed so far on such a device, else anew.

    Kernels of the two formats round differently, so that a run must not change them on the way. All ranks must call it.
    """
    if config.channels_last != "auto":
        return config
    said = distributed.on_main(lambda: read_state(checkpoint).get("memory_format")) if checkpoint else None
    said = said if isinstance(said, dict) and said.get("device") == device.type else {}
    known = said.get("channels_last")
    if type(known) is not bool:
        known = training_format(config, device) == torch.channels_last
    return replace(config, channels_last=str(known))


def initial_weights(config: TrainConfig) -> str:
    """Where the student's initial weights come from: teacher or random."""
    return init_source(config) if isinstance(config, CmTrainConfig) else "random"


def load_into(network: nn.Module, file: ModelFile | None, flag: str, config: TrainConfig) -> None:
    """Load weights strictly on rank 0; UserError names the first tensors that differ."""
    if file is None:
        raise UserError(f"no teacher is given, whose weights are needed ({flag}, --teacher_model_path)")
    for name in ("sigma_data", "network", "time_scale"):
        stored = (file.config or {}).get(name, getattr(config, name))
        if stored != getattr(config, name):
            raise UserError(
                f"{file.path} was trained with {name} {stored}, not {getattr(config, name)} ({flag}, --{name})"
            )
    state = widened(network, file.state)  # weights of one time begin a network of two
    distributed.on_main(lambda: check_matching(network, state, f"{file.path} ({flag})"))
    if distributed.is_main():
        network.load_state_dict(state)
