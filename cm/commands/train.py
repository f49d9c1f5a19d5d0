"""A training run from its configuration: data, networks, objective, loop, resume, previews."""

import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cm.config.derived import (
    augment_probability,
    augmentation_labels,
    channels_last,
    global_batch,
    init_source,
    run_dir,
    stop_step,
    stored_config,
)
from cm.config.inherit import adopt_teacher
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig, EdmTrainConfig
from cm.data import open_dataset
from cm.data.dataset import ImageData
from cm.data.stream import TrainStream
from cm.errors import UserError
from cm.models.factory import choose_device, create_network, create_precond
from cm.models.files import ModelFile, load_on_main
from cm.objectives.base import Objective
from cm.runtime import distributed, logger
from cm.runtime.cpu import keep_freed_memory
from cm.runtime.liveness import EXIT_UNFINISHED, FINISHED, PREEMPTED, TIME, write_status
from cm.runtime.preemption import Stopper, StopSignals
from cm.runtime.run_directory import RunDirectory
from cm.runtime.watchdog import Heartbeat, supervised
from cm.seeding import derive_seed
from cm.storage.checkpoint import read_state
from cm.storage.filesystem import is_remote, write_atomic
from cm.storage.mirror import Mirror
from cm.storage.weights import check_matching
from cm.training.compilation import can_compile
from cm.training.factory import create_objective, create_optimization, trains_consistency
from cm.training.options import Reporting
from cm.training.previews import Preview
from cm.training.resume import checkpoint_of, find_checkpoint
from cm.training.trainer import Trainer

TrainConfig = EdmTrainConfig | CmTrainConfig


def run_train(config: TrainConfig) -> None:
    """Train as configured, from the beginning or from the newest checkpoint of the run directory.

    SystemExit with EXIT_UNFINISHED after an orderly stop before the last step (a signal, --max_hours).
    """
    with StopSignals() as signals:
        stopper = Stopper(config.max_hours, signals)
        distributed.setup_dist(timeout=60 * config.startup_timeout)
        with RunDirectory(run_dir(config)) as place:
            ended = _train(config, place, stopper, signals)
    if ended != FINISHED:
        sys.exit(EXIT_UNFINISHED)


def _train(config: TrainConfig, place: RunDirectory, stopper: Stopper, signals: StopSignals) -> str:
    """Everything that happens in the run directory; returns why training ended."""
    directory = place.path
    set_up_torch(config)
    dataset = open_training_data(config)
    teacher_file = load_teacher(config)
    config = settle(config, dataset, teacher_file)
    if (mirror := mirror_of(config, directory)) is not None:
        distributed.on_main(mirror.pull)
    checkpoint, notes = find_checkpoint(config, directory, dataset.fingerprint)
    open_logs(config, directory, checkpoint)
    for note in notes:
        logger.log(note)
    limits = {name: 60 * getattr(config, name) for name in ("startup_timeout", "step_timeout")}
    with supervised(directory, limits) as heartbeat:
        trainer = build_trainer(config, dataset, teacher_file, directory, checkpoint, stopper, heartbeat)
        del teacher_file  # gigabytes that the networks hold now
        announce(config, trainer, dataset)
        place.started()
        ended = trainer.run_loop()
        heartbeat.phase("end", trainer.state.step)
        report_end(ended, trainer.state.step, directory, signals)
        if mirror is not None:
            distributed.on_main(mirror.push_logs)
    return ended


def set_up_torch(config: TrainConfig) -> None:
    """Settings of this process that --device and --deterministic ask for."""
    if config.deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    if choose_device(config.device).type == "cpu":
        keep_freed_memory()


def open_logs(config: TrainConfig, directory: str, checkpoint: Path | None) -> None:
    """Start or go on with the logs; rows after the checkpoint are dropped, as their steps will be done again."""
    formats = ["stdout", "log", "csv", "json", *(["tensorboard"] if config.tensorboard else [])]
    step = distributed.on_main(lambda: read_state(checkpoint)["step"] if checkpoint else 0)
    logger.configure(directory, formats, resume_step=step)
    logger.log(f"run directory: {directory}")
    if distributed.is_main():
        write_atomic(Path(directory, "config.json"), json.dumps(stored_config(config), indent=1).encode())


def report_end(ended: str, step: int, directory: str, signals: StopSignals) -> None:
    """Say why training ended, on the screen and in status.json."""
    if distributed.is_main():
        code = 0 if ended == FINISHED else EXIT_UNFINISHED
        write_status(directory, ended, exit_code=code, message=signals.received, step=step)
    words = {PREEMPTED: f"stopped by {signals.received or 'another rank'}", TIME: "stopped by --max_hours"}
    how = words.get(ended, ended)
    again = "" if ended == FINISHED else "; the same command goes on"
    logger.log(f"{how} at step {step}; checkpoints are in {directory}/checkpoints{again}")


def open_training_data(config: TrainConfig) -> ImageData:
    """The training set, with channels and labels as configured or as found. All ranks must call it."""
    dataset = open_dataset(
        config.data_dir,
        image_size=config.image_size,
        channels=config.in_channels,
        labels=config.labels,
        class_cond=config.class_cond,
        random_flip=config.random_flip and not augment_probability(config),  # augmentation mirrors by itself
        random_crop=config.random_crop,
        composite="" if config.composite == "drop" else config.composite,
        skip_unreadable=config.skip_unreadable,
    )
    # It asks for the size of every file: once, not once per rank of a cluster.
    dataset.fingerprint = distributed.on_main(lambda: dataset.fingerprint)
    return dataset


def load_teacher(config: TrainConfig) -> ModelFile | None:
    """The teacher's weights, where a teacher path is given: on rank 0, elsewhere their shapes."""
    if not isinstance(config, CmTrainConfig) or not config.teacher_model_path:
        return None
    teacher = load_on_main(config.teacher_model_path, flag="teacher_model_path")
    mode = (teacher.config or {}).get("training_mode", "edm")
    if mode in OBJECTIVES and not OBJECTIVES[mode].can_teach:
        raise UserError(
            f"--teacher_model_path {config.teacher_model_path} was trained by {mode}; a teacher is a denoiser (edm)"
        )
    return teacher


def settle(config: TrainConfig, dataset: ImageData, teacher: ModelFile | None) -> TrainConfig:
    """The configuration with the channels, classes and preconditioning that the data and the teacher decide."""
    if teacher is not None:
        config = adopt_teacher(config, teacher.config, teacher.path)
    classes = config.num_classes
    if config.class_cond:
        known = (teacher.config or {}).get("num_classes") if teacher else None
        if known is None and teacher and "label_emb.weight" in teacher.state:
            known = len(teacher.state["label_emb.weight"])
        classes = classes or known or dataset.num_classes
        if dataset.num_classes > classes:
            raise UserError(
                f"--data_dir {config.data_dir} has {dataset.num_classes} classes, the model {classes}"
            )
    augment_dim = augmentation_labels(config)
    return replace(config, in_channels=dataset.channels, num_classes=classes, augment_dim=augment_dim)


def build_trainer(
    config: TrainConfig,
    dataset: ImageData,
    teacher_file: ModelFile | None,
    directory: str,
    checkpoint: Path | None = None,
    stopper: Stopper | None = None,
    heartbeat: Heartbeat | None = None,
) -> Trainer:
    """Networks, objective and data in a loop, restored from a checkpoint if one is given."""
    device = choose_device(config.device)
    objective = create_objective(config)
    objective.load(device)
    student, target, teacher = create_roles(config, objective, teacher_file, device)
    consistency = trains_consistency(config)
    batch = global_batch(config, distributed.get_world_size())
    trainer = Trainer(
        student=student,
        objective=objective,
        data=iter(()),
        global_batch_size=batch,
        optimization=create_optimization(config),
        reporting=create_reporting(config, dataset, directory, batch),
        student_precond=create_precond(config, consistency=consistency),
        target=target,
        teacher=teacher,
        teacher_precond=create_precond(config, consistency=False),
        microbatch=config.microbatch,
        total_steps=stop_step(config),
        seed=config.seed,
        sigma_range=(config.sigma_min, config.sigma_max),
        stopper=stopper,
        heartbeat=heartbeat,
        compile=config.compile and can_compile(device),
        channels_last=channels_last(config, device.type),
    )
    if checkpoint is not None:
        trainer.load(checkpoint, verified=True)
    elif config.resume_checkpoint:
        resume_elsewhere(trainer, config.resume_checkpoint)
    trainer.data = iter(
        TrainStream(
            dataset,
            global_batch_size=batch,
            seed=config.seed,
            rank=distributed.get_rank(),
            world_size=distributed.get_world_size(),
            num_workers=config.num_workers,
            start_step=trainer.state.step,
            pin_memory=device.type == "cuda",
        )
    )
    return trainer


def create_reporting(config: TrainConfig, dataset: ImageData, directory: str, batch: int) -> Reporting:
    """What the run leaves behind; batch: images per step over all ranks."""
    return Reporting(
        directory,
        config.log_interval,
        config.save_interval,
        config.keep_last,
        config.keep_every,
        config.async_save,
        config.on_save_error,
        mirror_of(config, directory),
        meta={
            "config": stored_config(config),
            "data": dataset.fingerprint,
            "global_batch_size": batch,
            "versions": versions(),
        },
        preview=Preview(config, directory) if config.preview_count else None,
        preview_interval=config.preview_interval,
        progress=True,
    )


def mirror_of(config: TrainConfig, directory: str) -> Mirror | None:
    """The second copy of the run that --mirror asks for."""
    return Mirror(config.mirror, directory) if config.mirror else None


def create_roles(
    config: TrainConfig, objective: Objective, teacher_file: ModelFile | None, device: torch.device
) -> tuple[nn.Module, nn.Module | None, nn.Module | None]:
    """Student, target and teacher networks with their initial weights; None where the objective needs none."""
    layout = torch.channels_last if channels_last(config, device.type) else torch.preserve_format
    torch.manual_seed(derive_seed(config.seed, "init"))
    student = create_network(config).to(device, memory_format=layout)
    if isinstance(config, CmTrainConfig) and init_source(config) == "teacher":
        load_into(student, teacher_file, "--init teacher", config)
    target = teacher = None
    if objective.needs_target:
        target = create_network(config).to(device, memory_format=layout)
        target.load_state_dict(student.state_dict())
    if objective.needs_teacher:
        teacher = create_network(config, dropout=config.teacher_dropout).to(device, memory_format=layout)
        load_into(teacher, teacher_file, "--teacher_model_path", config)
    return student, target, teacher


def load_into(network: nn.Module, file: ModelFile | None, flag: str, config: TrainConfig) -> None:
    """Load weights strictly on rank 0, whose weights all ranks get; UserError names the first tensors that differ."""
    if file is None:
        raise UserError(f"{flag} needs --teacher_model_path")
    for name in ("sigma_data", "network", "time_scale"):
        stored = (file.config or {}).get(name, getattr(config, name))
        if stored != getattr(config, name):
            raise UserError(
                f"{flag}: {file.path} was trained with --{name} {stored}, not {getattr(config, name)}"
            )
    distributed.on_main(lambda: check_matching(network, file.state, f"{flag} {file.path}"))
    if distributed.is_main():
        network.load_state_dict(file.state)


def resume_elsewhere(trainer: Trainer, path: str) -> None:
    """Go on from a checkpoint directory, a run directory, or a model file of the original repository."""
    if is_remote(path) or os.path.isdir(path):
        trainer.load(checkpoint_of(path))
    elif os.path.isfile(path):
        trainer.load_original(path)
    else:
        raise UserError(f"--resume_checkpoint {path}: no such file or directory")


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def announce(config: TrainConfig, trainer: Trainer, dataset: ImageData) -> None:
    """Say what is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    init = init_source(config) if isinstance(config, CmTrainConfig) else "random"
    steps = trainer.total_steps or "no limit on"
    logger.log(
        f"{len(dataset)} images of {config.image_size} px, {dataset.channels} channel(s), "
        f"{config.num_classes if config.class_cond else 'no'} classes; {parameters:,} parameters, "
        f"initial weights: {init}"
    )
    logger.log(
        f"global batch {trainer.global_batch_size} on {distributed.get_world_size()} process(es), {steps} steps, "
        f"from step {trainer.state.step}, precision {trainer.optimization.precision}, {trainer.device}"
    )
    if config.shard_optimizer and trainer.partition.parts == 1:
        logger.log("note: --shard_optimizer has no effect on one process")
    if trainer.objective.needs_target:
        logger.log(
            "note: the consistency loss is no measure of quality: it grows with the number of scales N(k)"
        )
