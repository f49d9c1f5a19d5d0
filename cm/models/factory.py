"""From a configuration to a network, its preconditioning and the device."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from cm.config.derived import augmentation_labels, has_two_times, told_guidance, told_scales
from cm.config.fields import arguments_of
from cm.config.rows import NETWORKS
from cm.config.scripts import ClassifierConfig, Config
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.precond import Precond, boundary_precond, denoiser_precond
from cm.errors import UserError
from cm.networks.architecture import Architecture, build_network

DEFAULT_CLASSES = 1000
DEFAULT_CHANNELS = 3


def create_network(
    config: Config, *, dropout: float | None = None, two_times: bool | None = None
) -> nn.Module:
    """The configured network with seeded initial weights left to the caller.

    Classes and channels that the configuration leaves to the data count as 1000 and 3. `dropout` replaces --dropout;
    two_times: whether it has a second clock; None: as models of the configured objective do; a teacher has none, and
    is told no guidance.
    """
    own = ("use_fp16", "in_channels", "num_classes", "two_times", "told_guidance", "told_scale")
    flags = {f.name: getattr(config, f.name) for f in fields(Architecture) if f.name not in own}
    flags["augment_dim"] = augmentation_labels(config)
    told = two_times is None and bool(told_scales(config))
    if two_times is None:
        two_times = has_two_times(config)
    if dropout is not None:
        flags["dropout"] = dropout
    return build_network(
        Architecture(
            **flags,
            # Precision is the training loop's and the sampler's affair: weights are loaded in fp32 first.
            use_fp16=False,
            in_channels=config.in_channels or DEFAULT_CHANNELS,
            num_classes=(config.num_classes or DEFAULT_CLASSES) if config.class_cond else None,
            two_times=two_times,
            told_guidance=two_times and told_guidance(config),
            told_scale=told,
        ),
        classifier=isinstance(config, ClassifierConfig),
        options=network_options(config),
    )


def network_options(config: Config) -> dict[str, Any]:
    """What the row of the network brings; the classifier of a network has none of it."""
    if isinstance(config, ClassifierConfig):
        return {}
    return arguments_of(NETWORKS[config.network].options, config)


def create_precond(config: Config, *, consistency: bool) -> Precond:
    """Scalings of a consistency function, or of a denoiser, by --precond and on the clock of the configured network."""
    time_scale = config.time_scale or NETWORKS[config.network].clock
    if not consistency:
        return denoiser_precond(config.precond, sigma_data=config.sigma_data, time_scale=time_scale)
    return boundary_precond(
        config.boundary,
        sigma_data=config.sigma_data,
        sigma_min=config.sigma_min,
        time_scale=time_scale,
        printed_c_out=config.c_out_formula == "printed",
        column=config.precond,
    )


def create_denoiser(config: Config, network: nn.Module, *, consistency: bool = False) -> Denoiser:
    """What the configured objective trains: a denoiser, a consistency function or a flow map on a network."""
    kind = FlowMap if has_two_times(config) else Denoiser
    return kind(network, create_precond(config, consistency=consistency))


def choose_device(name: str) -> torch.device:
    """Device by --device: this rank's GPU if there is any, else the CPU."""
    from cm.runtime import distributed

    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device")
    return distributed.dev()
