"""Feature networks by name. A file given with `--features NAME=PATH` brings weights only, never code."""

import argparse
import hashlib
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cm.config.parsing import at_least
from cm.errors import UserError
from cm.models.factory import choose_device
from evaluations import inception_v3, small_classifier
from evaluations.inception_weights import FLAG as INCEPTION_FLAG
from evaluations.inception_weights import load_inception


class FeatureNetwork(Protocol):
    """What metrics need of a network.

    dims: kind of features ("pool", perhaps "spatial") -> their number. transform: what happens to images before the
    network. classifier: weight (classes, pool) of a last layer without bias, for the Inception Score. classes:
    number of classes that labels of samples refer to, 0 when the network knows none of them.
    """

    name: str
    sha256: str
    transform: str
    dims: Mapping[str, int]
    classifier: Tensor
    classes: int

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, H, W, C) on any device -> kind -> (B, dim) float32 on the network's device."""

    def check(self, shape: tuple[int, ...], path: str) -> None:
        """UserError when images (N, H, W, C) of a file are not for this network."""


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values: the same for two files that hold the same weights in different layouts."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


class InceptionFeatures:
    """The FID network; grey images are repeated to three channels."""

    name = "inception"
    transform = f"bilinear resize of TensorFlow 1 to {inception_v3.INPUT_SIZE}"
    dims: ClassVar = {"pool": inception_v3.POOL_DIM, "spatial": inception_v3.SPATIAL_DIM}
    classes = 0  # its 1008 outputs are not the classes of a data set

    def __init__(self, location: str, device: torch.device, sha256: str = ""):
        net, self.file_sha256 = load_inception(location, sha256=sha256, channels_last=True)
        self.sha256 = tensors_sha256(net.state_dict())
        self.net = net.to(device)
        self.device = device
        self.classifier = self.net.output.weight

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        images = images.to(self.device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
        pool, spatial = self.net(images)
        return {"pool": pool, "spatial": spatial}

    def check(self, shape: tuple[int, ...], path: str) -> None:
        """Takes every size, grey or RGB."""


class ClassifierFeatures:
    """The last hidden layer of the small classifier."""

    name = small_classifier.NAME
    dims: ClassVar = {"pool": small_classifier.FEATURE_DIM}

    def __init__(self, location: str, device: torch.device, sha256: str = ""):
        if not location:
            raise UserError(
                f"--features {self.name}=PATH: needs the file that cm classifier DATA PATH writes"
            )
        net, _ = small_classifier.load_classifier(location)
        self.sha256 = tensors_sha256(net.state_dict())
        if not self.sha256.startswith(sha256):
            raise UserError(
                f"--features {self.name}={location}: SHA-256 is {self.sha256[:16]}, expected {sha256[:16]}"
            )
        self.net = net.to(device)
        self.device = device
        self.classifier = self.net.output.weight
        self.classes = net.num_classes
        self.transform = f"none ({net.image_size}x{net.image_size}x{net.channels})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        x = small_classifier.to_network_range(images.to(self.device)).expand(-1, self.net.channels, -1, -1)
        with inception_v3.exact_float32():
            return {"pool": self.net(x)[0]}

    def check(self, shape: tuple[int, ...], path: str) -> None:
        size, channels = self.net.image_size, self.net.channels
        if shape[1:3] != (size, size) or shape[3] > channels:
            raise UserError(
                f"{path}: images are {shape[1]}x{shape[2]}x{shape[3]}, "
                f"the classifier was trained on {size}x{size}x{channels}"
            )


FEATURE_NETWORKS: dict[str, Callable[[str, torch.device, str], FeatureNetwork]] = {
    "inception": InceptionFeatures,
    ClassifierFeatures.name: ClassifierFeatures,
}


def current_name(name: str) -> str:
    """The name today of a feature network or protocol, which results and references of earlier versions may name."""
    return small_classifier.NAME if name == small_classifier.OLD_NAME else name


def load_features(spec: str, default: str, device: torch.device, *, sha256: str = "") -> FeatureNetwork:
    """The network of `NAME=PATH` or `NAME`; "" stands for `default`."""
    name, _, location = (spec or default).partition("=")
    name = current_name(name)
    if name not in FEATURE_NETWORKS:
        raise UserError(f"--features {name}: unknown network; choose {', '.join(FEATURE_NETWORKS)}")
    return FEATURE_NETWORKS[name](location, device, sha256)


def add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a feature network and where it runs."""
    parser.add_argument(
        "--features", default="", metavar="NAME=PATH", help="feature network and its weights file"
    )
    parser.add_argument(
        INCEPTION_FLAG, default="", help="file or URL of the Inception weights; empty: user cache"
    )
    parser.add_argument("--weights_sha256", default="", help="refuse weights whose SHA-256 does not begin so")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="images per batch and rank")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")


def features_from_flags(args: argparse.Namespace, default: str) -> FeatureNetwork:
    """The network that the flags of `add_feature_flags` ask for."""
    if args.inception_path and args.features:
        raise UserError(f"give {INCEPTION_FLAG} or --features, not both")
    spec = f"inception={args.inception_path}" if args.inception_path else args.features
    return load_features(spec, default, choose_device(args.device), sha256=args.weights_sha256)
