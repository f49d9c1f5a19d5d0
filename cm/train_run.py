"""A training run from its configuration: data, networks, objective, loop, resume, previews."""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cm import dist_util, logger
from cm.checkpoint import check_matching, complete_checkpoints, read_state
from cm.config import CmTrainConfig, EdmTrainConfig, result_flags
from cm.data import open_dataset
from cm.data.dataset import ImageData
from cm.data.stream import TrainStream
from cm.derived import global_batch, init_source, run_dir, stop_step, stored_config
from cm.errors import UserError
from cm.factory import (
    choose_device,
    create_network,
    create_objective,
    create_optimization,
    create_precond,
    trains_consistency,
)
from cm.model_files import ModelFile, load_model_file
from cm.previews import Preview
from cm.random_util import derive_seed
from cm.trainer import Reporting, Trainer

TrainConfig = EdmTrainConfig | CmTrainConfig


def run_train(config: TrainConfig) -> None:
    """Train as configured, from the beginning or from the newest checkpoint of the run directory."""
    dist_util.setup_dist(timeout=60 * config.startup_timeout)
    directory = prepare_directory(run_dir(config))
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    dataset = open_training_data(config)
    teacher_file = load_teacher(config)
    config = settle(config, dataset, teacher_file)
    checkpoint = find_checkpoint(config, directory)
    logger.configure(
        directory,
        ["stdout", "log", "csv", "json", *(["tensorboard"] if config.tensorboard else [])],
        resume_step=read_state(checkpoint)["step"] if checkpoint else None,
    )
    logger.log(f"run directory: {directory}")
    trainer = build_trainer(config, dataset, teacher_file, directory, checkpoint)
    if dist_util.is_main():
        Path(directory, "config.json").write_text(json.dumps(stored_config(config), indent=1))
    announce(config, trainer, dataset)
    trainer.run_loop()
    logger.log(f"finished at step {trainer.state.step}; checkpoints are in {directory}/checkpoints")


def prepare_directory(directory: str) -> str:
    """Make the run directory on rank 0; UserError on every rank when it cannot be written."""
    problem = None
    if dist_util.is_main():
        try:
            os.makedirs(directory, exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError(f"[Errno 13] Permission denied: '{directory}'")
        except OSError as error:
            problem = f"--out_dir {directory} cannot be written: {error.strerror or error}"
    problem = dist_util.broadcast_object(problem)
    if problem:
        raise UserError(problem)
    return directory


def open_training_data(config: TrainConfig) -> ImageData:
    """The training set, with channels and labels as configured or as found."""
    return open_dataset(
        config.data_dir,
        image_size=config.image_size,
        channels=config.in_channels,
        labels=config.labels,
        class_cond=config.class_cond,
        random_flip=config.random_flip,
        random_crop=config.random_crop,
        composite="" if config.composite == "drop" else config.composite,
        skip_unreadable=config.skip_unreadable,
    )


def load_teacher(config: TrainConfig) -> ModelFile | None:
    """The teacher's weights, where a teacher path is given."""
    if isinstance(config, EdmTrainConfig) or not config.teacher_model_path:
        return None
    teacher = load_model_file(config.teacher_model_path, flag="teacher_model_path")
    mode = (teacher.config or {}).get("training_mode", "edm")
    if mode not in ("edm", "progdist"):
        raise UserError(
            f"--teacher_model_path {config.teacher_model_path} was trained by {mode}; a teacher is a denoiser (edm)"
        )
    return teacher


def settle(config: TrainConfig, dataset: ImageData, teacher: ModelFile | None) -> TrainConfig:
    """The configuration with the number of channels and classes that the data (and the teacher) decide."""
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
    return replace(config, in_channels=dataset.channels, num_classes=classes)


def find_checkpoint(config: TrainConfig, directory: str) -> Path | None:
    """The checkpoint to go on from, after comparing its configuration with this one."""
    found = complete_checkpoints(directory)
    if config.resume == "never" and found:
        raise UserError(f"--resume never: {directory} already holds {found[-1].name}; give another --out_dir")
    if not found:
        if config.resume == "must":
            raise UserError(f"--resume must: {directory} holds no complete checkpoint")
        return None
    stored = json.loads(Path(directory, "config.json").read_text())
    mine = result_flags(config)
    changed = [f"--{n} {stored[n]} -> {v}" for n, v in mine.items() if n in stored and stored[n] != v]
    if changed and not config.resume_with_changes:
        raise UserError(
            f"{directory} holds a run with other flags ({', '.join(changed[:5])}); "
            "give another --out_dir, or --resume_with_changes True"
        )
    return found[-1]


def build_trainer(
    config: TrainConfig,
    dataset: ImageData,
    teacher_file: ModelFile | None,
    directory: str,
    checkpoint: Path | None = None,
) -> Trainer:
    """Networks, objective and data in a loop, restored from a checkpoint if one is given."""
    device = choose_device(config.device)
    objective = create_objective(config)
    torch.manual_seed(derive_seed(config.seed, "init"))
    student = create_network(config).to(device)
    if isinstance(config, CmTrainConfig) and init_source(config) == "teacher":
        load_into(student, teacher_file, "--init teacher", config)
    target = teacher = None
    if objective.needs_target:
        target = create_network(config).to(device)
        target.load_state_dict(student.state_dict())
    if objective.needs_teacher:
        teacher = create_network(config, dropout=config.teacher_dropout).to(device)
        load_into(teacher, teacher_file, "--teacher_model_path", config)
    consistency = trains_consistency(config)
    preview = Preview(config, directory) if config.preview_count else None
    stored = stored_config(config)
    batch = global_batch(config, dist_util.get_world_size())
    trainer = Trainer(
        student=student,
        objective=objective,
        data=iter(()),
        global_batch_size=batch,
        optimization=create_optimization(config),
        reporting=Reporting(
            directory,
            config.log_interval,
            config.save_interval,
            config.keep_last,
            config.keep_every,
            meta={"config": stored, "data": dataset.fingerprint},
            preview=preview,
            preview_interval=config.preview_interval,
        ),
        student_precond=create_precond(config, consistency=consistency),
        target=target,
        teacher=teacher,
        teacher_precond=create_precond(config, consistency=False),
        microbatch=config.microbatch,
        total_steps=stop_step(config),
        seed=config.seed,
        sigma_range=(config.sigma_min, config.sigma_max),
    )
    if checkpoint is not None:
        trainer.load(checkpoint)
    elif config.resume_checkpoint:
        resume_elsewhere(trainer, config.resume_checkpoint)
    trainer.data = iter(
        TrainStream(
            dataset,
            global_batch_size=batch,
            seed=config.seed,
            rank=dist_util.get_rank(),
            world_size=dist_util.get_world_size(),
            num_workers=config.num_workers,
            start_step=trainer.state.step,
            pin_memory=device.type == "cuda",
        )
    )
    return trainer


def load_into(network: nn.Module, file: ModelFile | None, flag: str, config: TrainConfig) -> None:
    """Load weights strictly; UserError names the first tensors that differ."""
    if file is None:
        raise UserError(f"{flag} needs --teacher_model_path")
    for name in ("sigma_data", "network", "time_scale"):
        stored = (file.config or {}).get(name, getattr(config, name))
        if stored != getattr(config, name):
            raise UserError(
                f"{flag}: {file.path} was trained with --{name} {stored}, not {getattr(config, name)}"
            )
    check_matching(network, file.state, f"{flag} {file.path}")
    network.load_state_dict(file.state)


def resume_elsewhere(trainer: Trainer, path: str) -> None:
    """Go on from a checkpoint directory, a run directory, or a model file of the original repository."""
    if os.path.isdir(path):
        found = [Path(path)] if Path(path, "manifest.json").is_file() else complete_checkpoints(path)
        if not found:
            raise UserError(f"--resume_checkpoint {path} holds no complete checkpoint")
        trainer.load(found[-1])
    elif os.path.isfile(path):
        trainer.load_original(path)
    else:
        raise UserError(f"--resume_checkpoint {path}: no such file or directory")


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
        f"global batch {trainer.global_batch_size} on {dist_util.get_world_size()} process(es), {steps} steps, "
        f"from step {trainer.state.step}, precision {trainer.optimization.precision}, {trainer.device}"
    )
    if trainer.objective.needs_target:
        logger.log(
            "note: the consistency loss is no measure of quality: it grows with the number of scales N(k)"
        )
