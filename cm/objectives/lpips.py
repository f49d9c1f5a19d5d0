"""LPIPS (Zhang et al., arXiv:1801.03924) as a training loss: piq's network, its weights files, its arithmetic.

The files are torchvision's VGG16 and piq's linear layers, under their usual names, in one folder.
"""

import os
import types
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from cm.config.choices import PRECISIONS
from cm.errors import UserError
from cm.objectives.distances import Distance, at_least_fp32, resize
from cm.runtime.torchvision_operators import declare_missing_operators
from cm.storage.shapes import shapes_only
from cm.storage.torch_format import read_torch

# Smaller images are enlarged before they are compared.
NATIVE_SIZE = 256
# VGG16 halves its input four times before its last features.
SMALLEST_SIZE = 16

# Position in torchvision's stack of the last ReLU of each VGG16 stage, and the number of channels there.
FEATURES = {"3": 64, "8": 128, "15": 256, "22": 512, "29": 512}
VGG_FILE = "vgg16-397923af.pth"
LINEAR_FILE = "lpips_weights.pt"
URLS = {
    VGG_FILE: f"https://download.pytorch.org/models/{VGG_FILE}",
    LINEAR_FILE: "https://github.com/photosynthesis-team/photosynthesis.metrics/releases/download/v0.4.0/"
    + LINEAR_FILE,
}


@dataclass(frozen=True)
class LpipsOptions:
    """How LPIPS is computed.

    path: folder that holds both weights files; empty for torch hub's cache, to which they are downloaded.
    size: side in pixels to which images below 256 are resized, bilinearly without antialiasing; 0 for never.
    precision: of the convolutions, fp32, bf16 or fp16. Features are compared in fp32 always.
    """

    path: str = ""
    size: int = 224
    precision: str = "fp32"

    def __post_init__(self):
        if self.size != 0 and self.size < SMALLEST_SIZE:
            raise UserError(f"--lpips_size {self.size} is too small: VGG16 needs {SMALLEST_SIZE} pixels")
        PRECISIONS[self.precision]  # refuses unknown names at once
        if self.path:
            check_files(Path(self.path))


class Lpips(Distance):
    """Perceptual distance of images in [-1, 1]: features of VGG16, compared by learned weights.

    average_pool: VGG16 with average pooling, as piq's `replace_pooling` and the released ImageNet and LSUN
        models have it; otherwise max pooling, as the CIFAR-10 models have it.

    The network is frozen, no part of any model's parameters, and loaded at the first call.
    """

    def __init__(self, options: LpipsOptions, average_pool: bool):
        self.options = options
        self.average_pool = average_pool
        self._network: nn.Module | None = None
        self._device: torch.device | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) distances in fp32 of images a and b, (B, 1 or 3, H, W)."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS compares two batches (B, 1 or 3, H, W), not shapes {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if self._device != a.device:
            self.load(a.device)
        precision = PRECISIONS.load(self.options.precision)
        with _arithmetic(a.device.type, precision):
            return _compare(self._network, self._prepare(a), self._prepare(b))

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Read the weights if that has not been done yet, and keep the network on `device`.

        dtype: of the weights and the comparison; fp64 serves checks of derivatives.

        In a distributed run all ranks must call it together: the first one of each node downloads. Call it
        before the distance is used inside torch.func transforms, in which no network can be built.
        """
        # Weights made in inference mode could never take part in a backward pass.
        with torch.inference_mode(False):
            if self._network is None:
                self._network = _build(_weights_folder(self.options.path), self.average_pool)
            network = self._network.to(device, dtype)
            # piq keeps these as plain tensors and would copy them at each call
            network.mean, network.std = network.mean.to(device, dtype), network.std.to(device, dtype)
            network.weights = [w.to(device, dtype) for w in network.weights]
            self._device = device

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.to(self._network.mean.dtype)
        side = min(x.shape[-2:])
        if self.options.size and side < NATIVE_SIZE:
            x = resize(x, self.options.size)
        elif side < SMALLEST_SIZE:
            raise UserError(
                f"images of {side} pixels are too small for LPIPS unless --lpips_size enlarges them"
            )
        return ((x + 1) / 2).expand(-1, 3, -1, -1)


def _arithmetic(device_type: str, precision: torch.dtype) -> AbstractContextManager:
    """Autocast to a precision; entered in fp32 too, where it switches a caller's off. The meta device has none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, precision, enabled=precision != torch.float32)


def average_pooled(**options: Any) -> Lpips:
    """Row lpips; the keywords are those of `LpipsOptions`."""
    return Lpips(LpipsOptions(**options), average_pool=True)


def max_pooled(**options: Any) -> Lpips:
    """Row lpips-max."""
    return Lpips(LpipsOptions(**options), average_pool=False)


def check_files(folder: Path) -> None:
    """UserError unless both weights files lie in a folder."""
    missing = [name for name in URLS if not (folder / name).is_file()]
    if missing:
        raise UserError(f"LPIPS weights are missing in {folder}: {_sources(missing)}")


def _sources(names: list[str]) -> str:
    return "; ".join(f"{name} (from {URLS[name]})" for name in names)


def _weights_folder(path: str) -> Path:
    """The folder of the weights files, after downloading what torch hub's cache lacks if `path` is empty."""
    if path:
        return Path(path)
    from cm.runtime.distributed import node_first
    from cm.storage.downloads import check_pinned, fetch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if str(folder).startswith("~"):
        raise UserError(
            "no home folder for LPIPS weights (HOME is not set): set TORCH_HOME, or give --lpips_path"
        )
    with node_first():
        missing = [name for name in URLS if not (folder / name).is_file()]
        try:
            for name in missing:
                os.makedirs(folder, exist_ok=True)
                fetch(URLS[name], folder / name)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"LPIPS weights are missing and cannot be downloaded ({error}): put {_sources(missing)} "
                f"into {folder}, or into a folder that --lpips_path names"
            ) from None
        check_pinned(folder / LINEAR_FILE)  # VGG's was compared with its name when it came
    return folder


def _build(folder: Path, average_pool: bool) -> nn.Module:
    """piq's LPIPS, reduction "none", from the files in `folder`; frozen, in evaluation mode, fp32, on the CPU."""
    return assemble(_vgg_features(folder / VGG_FILE), _linear_weights(folder / LINEAR_FILE), average_pool)


def assemble(features: nn.Sequential, weights: list[Tensor], average_pool: bool) -> nn.Module:
    """piq's LPIPS of VGG16's convolutions and the weights of their differences.

    Made from piq's base class, because its LPIPS class downloads without asking and builds the whole of VGG16
    including the classifier.
    """
    perceptual = import_piq().perceptual
    network = perceptual.ContentLoss(
        feature_extractor=features,
        layers=list(FEATURES),
        weights=weights,
        replace_pooling=average_pool,
        reduction="none",
        normalize_features=True,
    )
    network.normalize = _unit_channels
    return network.eval()


def meta_vgg() -> nn.Sequential:
    """VGG16's convolutions up to the last features that LPIPS compares, frozen, on the meta device."""
    import_piq()  # which knows how to import torchvision
    from torchvision.models import vgg16

    with shapes_only():
        return vgg16(weights=None).features[: int(list(FEATURES)[-1]) + 1].requires_grad_(False)


def _vgg_features(path: Path) -> nn.Sequential:
    """VGG16's convolutions with the weights of a file."""
    features = meta_vgg()
    state = _read(path)
    state = state if isinstance(state, dict) else {}
    tensors = {}
    for name, parameter in features.state_dict().items():
        tensor = state.get(f"features.{name}")
        if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
            raise UserError(
                f"{path} does not hold torchvision's VGG16: no features.{name} of shape {tuple(parameter.shape)}"
            )
        tensors[name] = tensor.float()
    features.load_state_dict(tensors, assign=True)
    return features.requires_grad_(False)


def _linear_weights(path: Path) -> list[Tensor]:
    """Weights of the squared feature differences, one (1, C, 1, 1) per stage."""
    weights = _read(path)
    sizes = [w.numel() for w in weights if isinstance(w, Tensor)] if isinstance(weights, list | tuple) else []
    if sizes != list(FEATURES.values()):
        raise UserError(
            f"{path} does not hold the weights of LPIPS: five tensors of {list(FEATURES.values())} numbers"
        )
    return [w.float().reshape(1, -1, 1, 1) for w in weights]


def _read(path: Path):
    try:
        return read_torch(path)
    except Exception as error:  # damaged files fail in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path} is not a readable weights file ({reason}); get it from {URLS[path.name]}"
        ) from None


def _compare(network: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """What piq's forward computes, without its conversion of the weights to the images' dtype.

    That conversion rounds them for good when images are fp16 once, and breaks them inside torch.func.
    """
    differences = network.compute_distance(network.get_features(a), network.get_features(b))
    return sum((d * w).mean(dim=(2, 3)).sum(dim=1) for d, w in zip(differences, network.weights))


def _unit_channels(x: Tensor) -> Tensor:
    """Features of unit length over the channels.

    piq's form agrees to 1e-10 but has no derivative where all channels are 0.
    """
    x = at_least_fp32(x)
    return x / torch.sqrt(x.square().sum(dim=1, keepdim=True) + 1e-20)


def import_piq() -> types.ModuleType:
    """The module piq, also where torchvision's compiled operators do not load into the installed torch."""
    declare_missing_operators()
    try:
        import piq
    except ImportError as error:
        raise UserError(f"LPIPS needs the package piq and torchvision: {error}") from None
    return piq
