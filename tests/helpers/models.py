"""Small networks for tests: those of the golden files, and tiny ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cm.config.derived import stored_config
from cm.config.scripts import CmTrainConfig, configure
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import EDMPrecond, Precond
from cm.models.factory import create_network
from cm.networks.architecture import Architecture, build_network
from cm.objectives.base import Objective, Roles
from cm.storage.weights import save_weights
from tests.helpers.golden_data import GoldenFile

# The smallest U-Net that has every kind of layer, as flags of a script
TINY_FLAGS = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 "
    "--num_head_channels 16 "
)


def golden_model(g: GoldenFile, prefix: str = "sd/") -> nn.Module:
    """The U-Net of a golden file with its stored weights, in eval mode."""
    options = dict(g.config["create_model"])
    model = build_network(
        Architecture(num_classes=1000 if options.pop("class_cond", False) else None, **options)
    )
    model.load_state_dict(g.state_dict(prefix))
    return model.eval()


def tiny_unet(**changes) -> nn.Module:
    """A seeded 8x8 U-Net with one channel; zero-initialised layers are filled so that outputs are not trivial."""
    options = dict(
        image_size=8,
        num_channels=32,
        num_res_blocks=1,
        channel_mult="1",
        attention_resolutions="8",
        use_scale_shift_norm=True,
        in_channels=1,
    )
    torch.manual_seed(0)
    model = build_network(Architecture(**{**options, **changes}))
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model


def save_consistency_model(path, **changes) -> None:
    """An untrained colour model of 8 pixels, distilled on 18 points, with everything that a run stores."""
    flags = {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": "1",
        "attention_resolutions": "8",
        "in_channels": 3,
        "start_scales": 18,
        "num_heads": 1,
        **changes,
    }
    config = configure(CmTrainConfig, **flags)
    torch.manual_seed(0)
    network = create_network(config)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    save_weights(path, network.state_dict(), {"config": stored_config(config)})


class PointNet(nn.Module):
    """A small MLP F(x, c_noise) for points (B, D)."""

    def __init__(self, dim: int = 2, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
        )

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x, c_noise[:, None].to(x.dtype)], dim=1))


def roles_of(objective: Objective, make: Callable[[], nn.Module], precond: Precond) -> Roles:
    """New networks for the roles that an objective has; student and target under `precond`, the teacher under EDM's."""
    return Roles(
        Denoiser(make(), precond),
        Denoiser(make(), precond) if objective.needs_target else None,
        Denoiser(make(), EDMPrecond()) if objective.needs_teacher else None,
    )
