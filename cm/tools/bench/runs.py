"""What the benchmarks run: real training loops and samplers on synthetic images and random weights."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cm.commands import train
from cm.commands.cli import parse_config
from cm.config import presets
from cm.config.derived import compares_by_lpips, with_counts
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig, TrainConfig, result_flags
from cm.errors import UserError
from cm.models.factory import choose_device, create_network
from cm.models.files import ModelFile
from cm.models.pretrained import Pretrained, prepare_for_sampling
from cm.objectives.lpips import FEATURES, LINEAR_FILE, VGG_FILE, meta_vgg
from cm.runtime import logger
from cm.runtime.distributed import get_world_size
from cm.training.compilation import configure_torch
from cm.training.roles import create_roles
from cm.training.trainer import Trainer

CONTINUOUS = ("--loss_norm", "l2", "--stop_grad", "True")
CT = ("--training_mode", "consistency_training")
HUBER = ("--loss_norm", "pseudo-huber", "--weight_schedule", "inverse-gap")
ZERO = ("--boundary", "zero")
COSINE = ("--diffusion_schedule", "cosine", "--segments", "2", "--weight_schedule", "snr+1")
FLOW = ("--network", "ddpmpp_meanflow", "--precond", "flow", "--sigma_max", "1e6")
# Objectives of the preset "tiny": case -> (configuration, its flags)
TINY_CASES: dict[str, tuple[type[TrainConfig], tuple[str, ...]]] = {
    "edm": (EdmTrainConfig, ()),
    "cd": (CmTrainConfig, ()),
    "ct": (CmTrainConfig, CT),
    "pd": (CmTrainConfig, ("--training_mode", "progdist", "--scale_mode", "progdist")),
    "cd_euler": (CmTrainConfig, ("--ode_solver", "euler")),
    "cont_cd": (CmTrainConfig, ("--training_mode", "continuous_distillation", *CONTINUOUS)),
    "cont_ct": (CmTrainConfig, ("--training_mode", "continuous_training", *CONTINUOUS)),
    "ict": (CmTrainConfig, (*CT, *HUBER, "--pairs", "lognormal-grid", "--scale_mode", "doubling")),
    "ect": (CmTrainConfig, (*CT, *HUBER, *ZERO, "--pairs", "ratio")),
    "tcm": (CmTrainConfig, ("--training_mode", "tcm", *HUBER, *ZERO)),
    "sct": (CmTrainConfig, ("--training_mode", "sct", *ZERO)),
    "scd": (CmTrainConfig, ("--training_mode", "scd", *ZERO)),
    "multistep_cd": (CmTrainConfig, ("--training_mode", "multistep_distillation", *COSINE)),
    "multistep_ct": (CmTrainConfig, ("--training_mode", "multistep_training", *COSINE)),
    "ctm": (CmTrainConfig, ("--training_mode", "ctm", "--start_ema", "0.9")),
    "ctm_self": (CmTrainConfig, ("--training_mode", "ctm_training", "--start_ema", "0.9")),
    "meanflow": (CmTrainConfig, ("--training_mode", "meanflow", *FLOW)),
    "improved_meanflow": (
        CmTrainConfig,
        ("--training_mode", "improved_meanflow", "--class_cond", "True", "--label_dropout", "0.1", *FLOW),
    ),
    "esd": (CmTrainConfig, ("--training_mode", "flow_map", "--flow_velocity", "self", *FLOW)),
    "lsd": (
        CmTrainConfig,
        ("--training_mode", "flow_map", "--flow_velocity", "self", "--identity", "lagrangian", *FLOW),
    ),
    "psd": (
        CmTrainConfig,
        ("--training_mode", "flow_map", "--flow_velocity", "self", "--identity", "progressive", *FLOW),
    ),
    "lmd": (CmTrainConfig, ("--training_mode", "flow_map_distillation", "--identity", "lagrangian")),
    "cd_lpips": (CmTrainConfig, ("--loss_norm", "lpips", "--lpips_size", "32")),
}
# A benchmark neither saves nor draws, and logs when it is asked to.
QUIET = (
    *("--save_interval", "1000000000", "--preview_count", "0"),
    *("--total_training_steps", "1000000", "--max_bad_steps", "1000000"),
)
# Images per step where no flag says so; the published global batch is for many GPUs.
BATCH = 8


@dataclass(frozen=True)
class Options:
    """What the command line of the benchmark says; flags are passed on to the configuration that is measured."""

    preset: str = "tiny"
    device: str = "auto"
    cases: tuple[str, ...] = ()
    warmup: int = 2
    repeats: int = 7
    flags: tuple[str, ...] = ()

    def chosen(self, known: Iterable[str]) -> list[str]:
        """The cases to measure, all known ones if none was named; UserError for an unknown one."""
        known = list(known)
        if unknown := [case for case in self.cases if case not in known]:
            raise UserError(f"--case {' '.join(unknown)}: choose from {', '.join(known)}")
        return list(self.cases) or known


def train_cases(options: Options) -> list[str]:
    """The objectives to measure: all for "tiny", a preset's own otherwise."""
    return options.chosen(TINY_CASES if options.preset == "tiny" else [options.preset])


def train_config(options: Options, case: str) -> TrainConfig:
    """The configuration of a training case."""
    if options.preset == "tiny":
        cls, own = TINY_CASES[case]
    else:
        script = presets.get(options.preset).training_script
        cls, own = (EdmTrainConfig if script == "edm_train" else CmTrainConfig), ("--batch_size", str(BATCH))
    chosen = ("--preset", options.preset, "--device", options.device)
    return with_counts(parse_config(cls, [*chosen, *own, *QUIET, *options.flags]))


@contextmanager
def training(config: TrainConfig) -> Iterator[Trainer]:
    """The loop that scripts/edm_train.py or cm_train.py would run, with random teacher and LPIPS.

    On the images of --data_dir, or on random ones where it is empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, data_dir=config.data_dir or write_images(folder, config), out_dir=folder)
        if compares_by_lpips(config) and not config.lpips_path:
            config = replace(config, lpips_path=write_lpips(folder))
        device = configure_torch(config.device, deterministic=config.deterministic)
        logger.configure(folder, ["csv"])
        dataset = train.open_training_data(config)
        told = {"label_dropout": 0.1} if config.class_cond else None  # it may guide itself
        teacher = ModelFile("random", "file", create_network(config, two_times=False).state_dict(), told)
        saver = train.create_saver(config, folder, dataset.fingerprint)
        trainer = train.build_trainer(config, *create_roles(config, teacher, device), saver)
        trainer.data = iter(train.open_stream(config, dataset, 0, device.type))
        try:
            yield trainer
        finally:
            trainer.saver.join()
            logger.reset()


def write_images(folder: str, config: TrainConfig) -> str:
    """An npz of as many random images as a global batch has."""
    count = max(
        config.batch_size * get_world_size(), config.global_batch_size if config.batch_size < 0 else 0, 16
    )
    random = np.random.RandomState(0)
    side, channels = config.image_size, config.in_channels
    images = random.randint(0, 256, (count, side, side, channels), dtype=np.uint8)
    path = str(Path(folder, "images.npz"))
    np.savez(path, arr_0=images, arr_1=random.randint(0, config.num_classes, count))
    return path


def write_lpips(folder: str) -> str:
    """Weights files of LPIPS with random values, in the layout of the real ones."""
    state = {}
    for name, p in meta_vgg().named_parameters():
        scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.0
        state[f"features.{name}"] = scale * torch.randn(p.shape)
    torch.save(state, Path(folder, VGG_FILE))
    torch.save([torch.rand(1, width, 1, 1) for width in FEATURES.values()], Path(folder, LINEAR_FILE))
    return folder


def sample_config(options: Options, own: Sequence[str] = ()) -> SampleConfig:
    """The configuration of a sampling case."""
    chosen = ("--preset", options.preset, "--device", options.device)
    return with_counts(parse_config(SampleConfig, [*chosen, *own, *options.flags]))


def random_model(config: SampleConfig) -> Pretrained[SampleConfig]:
    """What scripts/image_sample.py would load, with random weights."""
    device = choose_device(config.device)
    torch.manual_seed(0)
    network = randomized(create_network(config))
    return prepare_for_sampling(config, ModelFile("random", "file", {}, None), network, device)


def randomized(network: nn.Module) -> nn.Module:
    """The network with its zero-initialised layers filled, so that no arithmetic is trivial."""
    torch.manual_seed(0)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return network


def description(config: Any) -> dict[str, Any]:
    """The flags of a configuration that matter to a reader of the row."""
    keys = ("preset", "precision", "compile", "channels_last", "use_checkpoint", "batch_size", "microbatch")
    keys += ("shard", "ema_device")
    return {**{k: getattr(config, k) for k in keys if hasattr(config, k)}, **result_flags(config)}
