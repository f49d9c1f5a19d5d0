"""Feature networks by name. A file given with `--features NAME=PATH` brings weights only, never code."""

import argparse
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cm.config.parsing import at_least
from cm.errors import UserError
from cm.storage.weights import tensors_sha256
from evaluations import inception_v3, own_features, small_classifier
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


def _check_sha256(network: FeatureNetwork, expected: str) -> None:
    if not network.sha256.startswith(expected):
        raise UserError(
            f"--features {network.name}: SHA-256 is {network.sha256[:16]}, expected {expected[:16]}"
        )


def inception_channels_last(device: torch.device) -> bool:
    """The memory format in which Inception is faster: 1.5 times on a CPU; on an H100 the default one, 1.3 times."""
    return device.type == "cpu"


class InceptionFeatures:
    """The FID network; grey images are repeated to three channels."""

    name = "inception"
    transform = f"bilinear resize of TensorFlow 1 to {inception_v3.INPUT_SIZE}"
    dims: ClassVar = {"pool": inception_v3.POOL_DIM, "spatial": inception_v3.SPATIAL_DIM}
    classes = 0  # its 1008 outputs are not the classes of a data set

    def __init__(self, location: str, device: torch.device, sha256: str = ""):
        try:
            faster = inception_channels_last(device)
            net, self.file_sha256 = load_inception(location, sha256=sha256, channels_last=faster)
        except UserError as error:
            if location:
                raise
            own = f"--features {small_classifier.NAME} trains a small classifier of REF's own labels"
            raise type(error)(f"{error}; what needs no download: {own}") from None
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
        _check_sha256(self, sha256)
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


def _unhashed(make: Callable[[str, torch.device], FeatureNetwork]) -> Callable[..., FeatureNetwork]:
    """A network of the user's own, whose weights --weights_sha256 may still name."""

    def made(location: str, device: torch.device, sha256: str = "") -> FeatureNetwork:
        network = make(location, device)
        _check_sha256(network, sha256)
        return network

    return made


FEATURE_NETWORKS: dict[str, Callable[[str, torch.device, str], FeatureNetwork]] = {
    "inception": InceptionFeatures,
    ClassifierFeatures.name: ClassifierFeatures,
    "torchscript": _unhashed(own_features.from_torchscript),
    "timm": _unhashed(own_features.from_timm),
}
OF_A_FILE = _unhashed(own_features.from_file)


def current_name(name: str) -> str:
    """The name today of a feature network or protocol, which results and references of earlier versions may name."""
    return small_classifier.NAME if name == small_classifier.OLD_NAME else name


def load_features(spec: str, default: str, device: torch.device, *, sha256: str = "") -> FeatureNetwork:
    """The network of `NAME=PATH`, `NAME` or `FILE.py:CLASS`; "" stands for `default`."""
    if ".py:" in spec:
        return OF_A_FILE(spec, device, sha256)
    name, _, location = (spec or default).partition("=")
    name = current_name(name)
    if name not in FEATURE_NETWORKS:
        file = f"; did you mean {ClassifierFeatures.name}={spec}?" if name.endswith(".pt") else ""
        raise UserError(
            f"--features {name}: unknown network; choose {', '.join(FEATURE_NETWORKS)}, or FILE.py:CLASS{file}"
        )
    return FEATURE_NETWORKS[name](location, device, sha256)


def add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a feature network and where it runs."""
    parser.add_argument(
        "--features",
        default="",
        metavar="NAME=PATH",
        help="feature network: classifier=FILE, torchscript=FILE, timm=NAME, inception=FILE, or FILE.py:CLASS",
    )
    parser.add_argument(
        "--inception_path", default="", help="file or URL of the Inception weights; empty: user cache"
    )
    parser.add_argument("--weights_sha256", default="", help="refuse weights whose SHA-256 does not begin so")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="images per batch and rank")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")


def feature_spec(args: argparse.Namespace) -> str:
    """The network that the flags of `add_feature_flags` ask for, as `load_features` takes it."""
    if args.inception_path and args.features:
        raise UserError("give --inception_path or --features, not both")
    return f"inception={args.inception_path}" if args.inception_path else args.features
