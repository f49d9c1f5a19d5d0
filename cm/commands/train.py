"""A training run from its configuration: data, networks, trainer, run."""

import json
import sys

import torch

from cm.commands.fit import fit
from cm.config.derived import (
    augment_probability,
    global_batch,
    identity_flags,
    learns_from,
    may_grow,
    run_dir,
    stop_step,
    stored_config,
)
from cm.config.scripts import TrainConfig
from cm.data import ImageData, open_dataset
from cm.data.stream import TrainStream
from cm.objectives.base import Objective, Roles
from cm.runtime import distributed, logger
from cm.runtime.preemption import Stopper, StopSignals
from cm.runtime.run_directory import RunDirectory
from cm.runtime.watchdog import record_end, supervised
from cm.storage.mirror import Mirror
from cm.storage.saver import Saver
from cm.training.compilation import can_compile, configure_torch
from cm.training.conditions import conditions_of
from cm.training.factory import create_optimization
from cm.training.meters import module_summary
from cm.training.options import BatchSize, Execution, Reports, Supervision
from cm.training.previews import Preview
from cm.training.resume import Identity, find_checkpoint, resume_from
from cm.training.roles import (
    create_roles,
    initial_weights,
    load_teacher,
    resolve_config,
    training_format,
    with_format,
)
from cm.training.trainer import Trainer


def run_train(config: TrainConfig) -> None:
    """Train as configured, from the beginning or from the newest checkpoint of the run directory.

    SystemExit with EXIT_UNFINISHED after an orderly stop before the last step (a signal, --max_hours).
    """
    with StopSignals() as signals:
        stopper = Stopper(config.max_hours, signals)
        distributed.setup_dist(timeout=60 * config.startup_timeout)
        with RunDirectory(run_dir(config)) as directory:
            code = _train(config, directory, stopper, signals)
    if code:
        sys.exit(code)


def _train(config: TrainConfig, directory: RunDirectory, stopper: Stopper, signals: StopSignals) -> int:
    """Everything that happens in the run directory; returns the exit code."""
    run = directory.path
    device = configure_torch(config.device, deterministic=config.deterministic)
    teacher = load_teacher(getattr(config, "teacher_model_path", ""), learns_from(config))
    config, chosen = fit(config, teacher, run)
    dataset = open_training_data(config)
    config = resolve_config(config, dataset, teacher)
    mirror = Mirror(config.mirror, run) if config.mirror else None
    if mirror is not None:
        distributed.on_main(mirror.pull)
    rate = create_optimization(config).learning_rate if may_grow(config) else None
    identity = Identity(identity_flags(config), images_per_step(config), dataset.fingerprint, rate)
    checkpoint, step, notes = find_checkpoint(
        run, identity, config.resume, allow_changes=config.resume_with_changes
    )
    logs = [
        f"line:{stop_step(config)}",
        "log",
        "csv",
        "json",
        *(["tensorboard"] if config.tensorboard else []),
        *([f"wandb:{config.wandb}"] if config.wandb else []),
    ]
    # Rows after the checkpoint are dropped, as their steps will be done again.
    logger.configure(run, logs, resume_step=step)
    logger.log_flags(stored_config(config))
    directory.write("config.json", json.dumps(stored_config(config), indent=1))
    for note in (f"run directory: {run}", *chosen, *notes):
        logger.log(note)
    limits = {name: 60 * getattr(config, name) for name in ("startup_timeout", "step_timeout")}
    with supervised(run, limits) as heartbeat:
        saver = create_saver(config, run, dataset.fingerprint, mirror)
        config = with_format(config, device, checkpoint)
        objective, roles = create_roles(config, teacher, device)
        del teacher  # gigabytes that the networks hold now
        trainer = build_trainer(config, objective, roles, saver, Supervision(stopper, heartbeat))
        if checkpoint is not None:
            trainer.load(checkpoint, verified=True)
        elif config.resume_checkpoint:
            resume_from(trainer, config.resume_checkpoint)
        trainer.data = iter(open_stream(config, dataset, trainer.state.step, device.type))
        log_summary(config, trainer, dataset)
        saver.catch_up()
        directory.started()
        ended = trainer.run_loop()
        heartbeat.phase("end", trainer.state.step)
        code = record_end(run, ended, step=trainer.state.step, signal=signals.received)
        if mirror is not None:
            distributed.on_main(mirror.push_logs)
    return code


def images_per_step(config: TrainConfig) -> int:
    """Images of a step over all ranks."""
    return global_batch(config, distributed.get_world_size())


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


def open_stream(config: TrainConfig, dataset: ImageData, start_step: int, device_type: str) -> TrainStream:
    """This rank's batches from a step on."""
    return TrainStream(
        dataset,
        global_batch_size=images_per_step(config),
        seed=config.seed,
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        num_workers=config.num_workers,
        start_step=start_step,
        pin_memory=device_type == "cuda",
    )


def create_saver(config: TrainConfig, directory: str, data: str, mirror: Mirror | None = None) -> Saver:
    """The writer of the run's checkpoints, with what they say of the run. data: fingerprint of the data set."""
    return Saver(
        directory,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        meta={
            "config": stored_config(config),
            "data": data,
            "global_batch_size": images_per_step(config),
        },
        background=config.async_save,
        on_error=config.on_save_error,
        mirror=mirror,
    )


def build_trainer(
    config: TrainConfig,
    objective: Objective,
    roles: Roles,
    saver: Saver,
    supervision: Supervision | None = None,
) -> Trainer:
    """The trainer before its first step; it has no data yet."""
    device = next(roles.student.net.parameters()).device
    return Trainer(
        roles=roles,
        objective=objective,
        data=iter(()),
        batch=BatchSize(images_per_step(config), config.microbatch),
        optimization=create_optimization(config),
        saver=saver,
        reports=Reports(
            config.log_interval,
            config.save_interval,
            preview=Preview(config, str(saver.run_dir)) if config.preview_count else None,
            preview_interval=config.preview_interval,
            progress_bar=sys.stderr.isatty(),
            sigma_range=(config.sigma_min, config.sigma_max),
        ),
        total_steps=stop_step(config),
        seed=config.seed,
        execution=Execution(
            compile=config.compile and can_compile(device),
            channels_last=training_format(config, device) == torch.channels_last,
        ),
        supervision=supervision,
        conditions=conditions_of(config),
    )


def log_summary(config: TrainConfig, trainer: Trainer, dataset: ImageData) -> None:
    """Log what is about to happen: data, network, batch, length."""
    logger.log(
        f"{len(dataset)} images of {config.image_size} px, {dataset.channels} channel(s), "
        f"{config.num_classes if config.class_cond else 'no'} classes; "
        f"initial weights: {initial_weights(config)}"
    )
    for note in dataset.notes():
        logger.log(note)
    logger.log(module_summary(trainer.model))
    logger.log(
        f"global batch {trainer.batch.total} on {distributed.get_world_size()} process(es), "
        f"{trainer.total_steps or 'no limit on'} steps, from step {trainer.state.step}, "
        f"precision {trainer.optimization.precision}, {trainer.device}"
    )
    if config.shard != "none" and trainer.state.ema.partition.parts == 1:
        logger.log(f"note: --shard {config.shard} has no effect on one process")
    if trainer.objective.num_scales(0) is not None and trainer.objective.stage(0) is None:
        logger.log(
            "note: the consistency loss is no measure of quality: it grows with the number of scales N(k)"
        )
