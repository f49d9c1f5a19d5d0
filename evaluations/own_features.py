"""Feature networks that need no protocol: a class of the user's, a TorchScript file, a model of timm.

`--features my_net.py:Net` calls `Net()`, `torchscript=FILE` loads a file, `timm=NAME` asks timm for pretrained weights.
A network maps images (B, C, H, W), float32 in [-1, 1] (for timm: resized and normalised as the model was trained), to
features (B, D); of maps (B, D, h, w) the mean over h and w is taken. Grey images get three channels where the network
does not take one. What is named here is code: name only what you trust.
"""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm.config import plugins
from cm.errors import UserError, extra
from cm.runtime.torchvision_operators import declare_missing_operators
from cm.storage.weights import tensors_sha256
from evaluations.inception_v3 import exact_float32
from evaluations.small_classifier import to_network_range

PROTOCOL = "any"  # that networks of one's own are measured by


class OwnFeatures:
    """A network without a last layer that is known, so without Inception Score and accuracy."""

    classes = 0

    def __init__(
        self,
        name: str,
        network: Callable[[Tensor], Any],
        device: torch.device,
        *,
        sha256: str,
        transform: str = "none, [-1, 1]",
        prepare: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        self.name, self.sha256, self.transform = name, sha256, transform
        self.device, self._network, self._prepare = device, network, prepare
        self.dims = {"pool": 0}  # until `check` has seen the images' size
        self.classifier = torch.empty(0, 0, device=device)
        self._channels = 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        x = to_network_range(images.to(self.device))
        with exact_float32():
            return {"pool": self._features(x.expand(-1, self._channels or x.shape[1], -1, -1))}

    def _features(self, x: Tensor) -> Tensor:
        found = self._network(self._prepare(x))
        if not isinstance(found, Tensor):
            raise UserError(f"--features {self.name}: returned a {type(found).__name__}, not a tensor (B, D)")
        pooled = found.flatten(2).mean(2) if found.ndim > 2 else found
        if pooled.ndim != 2 or len(pooled) != len(x):
            raise UserError(
                f"--features {self.name}: {len(x)} images gave the shape {tuple(found.shape)}; expected (B, D)"
            )
        return pooled.float()

    @torch.no_grad()
    def check(self, shape: tuple[int, ...], path: str) -> None:
        """UserError when the network does not take images (N, H, W, C); else `dims` is known from here on."""
        _, height, width, channels = shape
        problem = ""
        for tried in dict.fromkeys((channels, 3)):
            try:
                found = self._features(torch.zeros(2, tried, height, width, device=self.device))
            except UserError:
                raise
            except Exception as error:  # the user's own code
                problem = problem or (str(error).strip().splitlines() or [type(error).__name__])[-1]
                continue
            if self._channels and (tried, found.shape[1]) != (self._channels, self.dims["pool"]):
                raise UserError(
                    f"{path}: {self.name} gives other features for these images than for the first"
                )
            self._channels, self.dims["pool"] = tried, found.shape[1]
            self.classifier = torch.empty(0, found.shape[1], device=self.device)
            return
        raise UserError(f"{path}: {self.name} does not take images of {height}x{width}x{channels}: {problem}")


def _ready(network: Any, device: torch.device) -> Any:
    return network.to(device).eval() if isinstance(network, nn.Module) else network


def _of_state(network: Any, otherwise: bytes) -> str:
    """Hash of the weights; of `otherwise` where there are none."""
    state = network.state_dict() if isinstance(network, nn.Module) else {}
    return tensors_sha256(state) if state else hashlib.sha256(otherwise).hexdigest()


def from_file(spec: str, device: torch.device) -> OwnFeatures:
    """`FILE.py:NAME`: what NAME() returns, a module or a function of images."""
    made = plugins.member(spec, "features")
    try:
        network = _ready(made(), device)
    except Exception as error:
        raise UserError(f"--features {spec}: {type(error).__name__}: {error}") from error
    if not callable(network):
        raise UserError(f"--features {spec}: {spec.rpartition(':')[2]}() is not callable on images")
    file, _, name = spec.rpartition(":")
    # A network without weights is told by its source.
    digest = _of_state(network, Path(file).expanduser().read_bytes())
    return OwnFeatures(f"{Path(file).name}:{name}", network, device, sha256=digest)


def from_torchscript(location: str, device: torch.device) -> OwnFeatures:
    """`torchscript=FILE`."""
    if not Path(location).expanduser().is_file():
        raise UserError(f"--features torchscript={location}: no such file")
    path = Path(location).expanduser()
    try:
        network = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        raise UserError(f"--features torchscript={location}: no TorchScript file ({text})") from None
    return OwnFeatures(
        f"torchscript:{path.name}",
        _ready(network, device),
        device,
        sha256=_of_state(network, path.read_bytes()),
    )


def from_timm(name: str, device: torch.device) -> OwnFeatures:
    """`timm=NAME`: pretrained weights, fetched by timm; images as the model was trained on."""
    declare_missing_operators()
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError(f"--features timm=NAME needs timm: {extra('timm')}") from None
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # an unknown name, or no way to the weights
        raise UserError(f"--features timm={name}: {str(error).strip().splitlines()[0]}") from None
    how = timm.data.resolve_model_data_config(network)
    size, mean, std = how["input_size"][1:], how["mean"], how["std"]
    centre, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))

    def prepare(x: Tensor) -> Tensor:
        x = F.interpolate((x + 1) / 2, size, mode="bicubic", antialias=True, align_corners=False)
        return (x.clamp(0, 1) - centre) / scale

    return OwnFeatures(
        f"timm:{name}",
        _ready(network, device),
        device,
        sha256=_of_state(network, name.encode()),
        transform=f"bicubic to {size[0]}x{size[1]}, mean {mean}, std {std}",
        prepare=prepare,
    )
