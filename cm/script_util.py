"""The original's helpers under their names: defaults, models from flags, schedules, argparse from dicts."""

import argparse
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from cm.config.parsing import str2bool as _str2bool
from cm.config.rows import NETWORKS
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, flags_of
from cm.karras_diffusion import KarrasDenoiser
from cm.networks.architecture import Architecture, build_network
from cm.objectives.curricula import EmaAndScales

NUM_CLASSES = 1000

# Flags that consistency training has beyond those of the model
CM_TRAIN = ["teacher_model_path", "teacher_dropout", "training_mode", "target_ema_mode", "scale_mode"]
CM_TRAIN += [
    "total_training_steps",
    "start_ema",
    "start_scales",
    "end_scales",
    "distill_steps_per_iter",
    "loss_norm",
]


def _defaults(config_class: type, names: Iterable[str]) -> dict[str, Any]:
    flags = flags_of(config_class)
    return {name: flags[name].default for name in names}


def cm_train_defaults() -> dict[str, Any]:
    """Defaults of the flags that consistency training has beyond those of the model."""
    return _defaults(CmTrainConfig, CM_TRAIN)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Defaults of the arguments of `create_model_and_diffusion`."""
    parameters = inspect.signature(create_model_and_diffusion).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.name != "distillation"]
    return _defaults(EdmTrainConfig, named)


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    weight_schedule: str,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    distillation: bool = False,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    loss_norm: str = "lpips",
    ode_solver: str = "heun",
    sigma_data: float = 0.5,
    rho: float = 7.0,
    network: str = "adm",
) -> tuple[nn.Module, KarrasDenoiser]:
    """(network, diffusion) from flag values; `distillation` gives the scalings of a consistency function."""
    given = locals().copy()
    mine = ("distillation", "loss_norm", "ode_solver", "sigma_data", "rho", "sigma_min", "sigma_max")
    of_diffusion = {name: given[name] for name in (*mine, "weight_schedule")}
    model = create_model(**{name: value for name, value in given.items() if name not in of_diffusion})
    diffusion = KarrasDenoiser(**of_diffusion, time_scale=NETWORKS[network].clock)
    return model, diffusion


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    network: str = "adm",
) -> nn.Module:
    """A network from flag values, lists as text; with class_cond, num_classes None means NUM_CLASSES."""
    flags = locals().copy()
    del flags["class_cond"]
    return build_network(
        Architecture(**flags | {"num_classes": (num_classes or NUM_CLASSES) if class_cond else None})
    )


def create_ema_and_scales_fn(
    target_ema_mode: str,
    start_ema: float,
    scale_mode: str,
    start_scales: int,
    end_scales: int,
    total_steps: int,
    distill_steps_per_iter: int,
) -> Callable[[int], tuple[float, int]]:
    """step -> (decay of the target network, number of grid points or, for progdist, of intervals)."""
    return EmaAndScales(**locals())


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """One flag per entry, typed like its default; None counts as text, bools are written True or False."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The named attributes of parsed arguments."""
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """A bool from text such as True, no, 1; argparse reports anything else."""
    try:
        return _str2bool(v)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
