"""A trained model ready for use: found, identified, loaded strictly, and put under its preconditioning."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from cm.config import plugins
from cm.config.choices import PRECISIONS
from cm.config.derived import is_consistency, lowest_level, precision, scale_of
from cm.config.flags import ModelFlags
from cm.config.inherit import inherit
from cm.diffusion.denoiser import DenoiseFn, Denoiser, clamped
from cm.diffusion.flow_maps import FlowMap
from cm.errors import UserError, masked
from cm.models.factory import choose_device, create_denoiser, create_network
from cm.models.files import ModelFile, load_model_file, searched_points
from cm.models.identify import identify
from cm.models.memory_format import memory_format
from cm.runtime import logger
from cm.storage.shapes import shapes_only
from cm.storage.weights import check_matching

ConfigType = TypeVar("ConfigType", bound=ModelFlags)
ROUNDING = 1e-5  # of levels that went through fp32


@dataclass(frozen=True)
class Model(Generic[ConfigType]):
    """A denoiser of images on its device, with the configuration of its network."""

    config: ConfigType
    denoiser: Denoiser
    device: torch.device

    def denoise(
        self,
        labels: Tensor | None = None,
        clip: bool = True,
        watch: Callable[[DenoiseFn], DenoiseFn] | None = None,
        reads: str = "consistency",
    ) -> DenoiseFn:
        """(x, sigma) -> clean images for a batch of classes `labels` (B,), which an unconditional model ignores.

        clip: predictions are clamped to [-1, 1]. watch: wraps the network's own predictions, before that. reads: of a
        flow map, see `cm.config.registry.Sampler`.
        """
        cond = {}
        if self.config.class_cond:
            if labels is None:
                raise ValueError("a class-conditional model needs the labels of the batch")
            cond["y"] = labels.to(self.device)

        scale = scale_of(self.config)
        model = self.denoiser
        if isinstance(model, FlowMap) and reads == "denoiser":
            model = model.denoiser()

        def denoise(x: Tensor, *levels: Tensor) -> Tensor:
            told = {} if scale is None else {"guidance": x.new_full(x.shape[:1], scale)}
            return model(x, *levels, **cond, **told)

        lowest = lowest_level(self.config)
        known = denoise if lowest == self.config.sigma_min else from_level(denoise, lowest)
        own = known if watch is None else watch(known)
        return clamped(own) if clip else own


def from_level(denoise: DenoiseFn, lowest: float) -> DenoiseFn:
    """The same function; UserError below the level from which up its model is defined.

    A sampler's levels are known on the host (`cm.sampling.driver.filled`); others are read from the device.
    """

    def checked(x: Tensor, sigma: Tensor) -> Tensor:
        level = getattr(sigma, "on_host", None)
        level = sigma.min().item() if level is None else level
        if level < lowest * (1 - ROUNDING):
            raise UserError(
                f"noise level {level:.4g}: the model was trained from {lowest:g} up only; give levels "
                "that are not below it (--sigmas, --ts), and take its first stage for others"
            )
        return denoise(x, sigma)

    return checked


@dataclass(frozen=True)
class Pretrained(Model[ConfigType]):
    """A model from a file, its configuration completed by what the file says."""

    file: ModelFile

    def provenance(self) -> dict[str, str]:
        """Where the weights came from, for metadata of results."""
        return {
            "model_path": masked(self.file.path),
            "weights": self.file.kind,
            "model_sha256": self.file.sha256,
        }


def load_pretrained(config: ConfigType) -> Pretrained[ConfigType]:
    """The model of --model_path, in eval mode on --device.

    Our own checkpoints carry their configuration; of a bare state dict the shapes give the architecture, and
    --training_mode or --preset what shapes cannot tell.
    """
    return pretrained_from(config, load_model_file(config.model_path, config.weights))


def pretrained_from(config: ConfigType, file: ModelFile, flag: str = "model_path") -> Pretrained[ConfigType]:
    """As `load_pretrained`, of weights that are read already. flag: what named them."""
    config = completed(config, file)
    device = choose_device(config.device)
    with shapes_only():  # compared before memory is taken
        check_matching(create_network(config), file.state, f"--{flag} {file.path}")
    network = create_network(config)
    network.load_state_dict(file.state)
    return prepare_for_sampling(config, file, network, device)


def as_loaded(config: ConfigType) -> ConfigType:
    """The configuration as the model of --model_path completes it, for --dry_run."""
    return completed(config, load_model_file(config.model_path, config.weights))


def completed(config: ConfigType, file: ModelFile) -> ConfigType:
    """The configuration with what the command left open filled in from a model file."""
    size = config.image_size if "image_size" in config.explicit else 0
    fully_given = size and {"num_channels", "num_res_blocks"} <= config.explicit
    stored = file.config
    if stored is None:
        # Flags of the published command lines describe the network; without them its shapes must.
        stored = {} if fully_given else identify(file.state, config.model_path, size)
        if config.class_cond and "label_emb.weight" in file.state:
            stored["num_classes"] = len(file.state["label_emb.weight"])
    for note in plugins.require(stored, config.model_path):
        logger.log(note)
    return inherit(config, {**stored, "searched": searched_points(config.model_path)}, config.model_path)


def prepare_for_sampling(
    config: ConfigType, file: ModelFile, network: nn.Module, device: torch.device
) -> Pretrained[ConfigType]:
    """A network with its weights in the precision, on the device and in the memory format that are configured."""
    if (dtype := PRECISIONS.load(precision(config))) != torch.float32:
        network.convert_torso(dtype)
    network = network.to(device).eval().requires_grad_(False)
    images = getattr(config, "batch_size", 1)
    network = network.to(memory_format=memory_format(config, device, training=False, images=images))
    denoiser = create_denoiser(config, network, consistency=is_consistency(config.training_mode))
    return Pretrained(config, denoiser, device, file)
