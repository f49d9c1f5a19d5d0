"""Named evaluation protocols: everything that two numbers must share to be compared.

| protocol | network, resize | samples | reference | compare with |
|---|---|---|---|---|
| adm | Inception 2015-12-05, TensorFlow 1 bilinear | 50,000, uint8 by truncation | guided-diffusion's file | Table 2 |
| cifar10 | the same | 50,000, uint8 by truncation | statistics of the 50,000 training images | Table 1 |
| any | one's own: `--features FILE.py:CLASS`, torchscript, timm | any | any | runs with the same network |
| classifier | a small classifier of the data set, no resize | any | any | runs with the same classifier file |
| small | the same | 10,000, uint8 by truncation | the 10,000 test images | runs with the same classifier file |
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from cm.errors import UserError
from cm.runtime import logger
from cm.storage.downloads import Unreachable
from evaluations import small_classifier
from evaluations.features import FeatureNetwork, current_name, load_features
from evaluations.npz_io import ImageSet, Reference
from evaluations.own_features import PROTOCOL


@dataclass(frozen=True)
class Protocol:
    """num_samples: how many images a comparable number needs, 0 for any. split_size: rows per split of the Inception
    Score. k: neighbour of precision and recall. reference: what the samples are compared with, in words."""

    name: str
    features: str
    metrics: tuple[str, ...]
    reference: str
    compare_with: str
    num_samples: int = 0
    quantisation: str = "truncate"
    split_size: int = 5000
    k: int = 3

    def describe(self) -> dict[str, Any]:
        """All fields as plain JSON."""
        return {**asdict(self), "metrics": list(self.metrics)}


_ALL = (
    Protocol(
        "adm",
        "inception",
        num_samples=50_000,
        metrics=("fid", "sfid", "inception_score", "precision", "recall"),
        reference="guided-diffusion reference batch: statistics of the full set, 10,000 of its images",
        compare_with="Table 2 of the paper (ImageNet 64x64, LSUN 256x256) and ADM's tables",
    ),
    Protocol(
        "cifar10",
        "inception",
        num_samples=50_000,
        metrics=("fid", "inception_score"),
        reference="statistics of the 50,000 training images at 32x32",
        compare_with="Table 1 of the paper (clean-fid legacy_tensorflow against the training set)",
    ),
    Protocol(
        "classifier",
        "classifier",
        metrics=("fid", "inception_score", "precision", "recall", "accuracy"),
        reference="any labelled set, of the classifier's images",
        compare_with="runs that used the same classifier file and reference only",
    ),
    Protocol(
        PROTOCOL,
        PROTOCOL,
        metrics=("fid", "precision", "recall"),
        reference="any",
        compare_with="runs that used the same feature network and reference only",
    ),
    Protocol(
        "small",
        "classifier",
        num_samples=10_000,
        metrics=("fid", "kid", "precision", "recall", "accuracy"),
        reference="the test images of the data set, which neither the model nor the classifier was trained on",
        compare_with="runs with the same classifier file and as many samples: python -m evaluations.study",
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def choose_protocol(name: str, features: str, reference: Reference | None = None) -> tuple[Protocol, bool]:
    """(protocol, strict): strict when asked for by name.

    Without a name: the one that the reference was made for, else the first that uses the network `features`, else adm.
    """
    name = current_name(name)
    if name:
        if name not in PROTOCOLS:
            raise UserError(f"--protocol {name}: unknown; choose {', '.join(PROTOCOLS)}")
        return PROTOCOLS[name], True
    meta = (reference and reference.meta) or {}
    made_for = current_name(meta.get("protocol", ""))
    network = current_name(features.partition("=")[0])
    fits = [p for p in PROTOCOLS.values() if p.features == network]
    default = PROTOCOLS[PROTOCOL if network else "adm"]
    return PROTOCOLS.get(made_for, fits[0] if fits else default), False


def measuring(
    spec: str,
    protocol: Protocol,
    strict: bool,
    reference: Reference,
    device: torch.device,
    *,
    sha256: str = "",
) -> tuple[FeatureNetwork, Protocol]:
    """The feature network `spec`, "" for the protocol's, and the protocol that it measures by. Collective.

    `classifier` without a file is one of the reference's own labels, trained at its first use. It stands in for
    Inception where nobody named a network, Inception's weights are neither here nor to be had, and the reference is
    no more than labelled images; this is said, and the protocol is then `classifier`.
    """
    name = small_classifier.NAME
    if current_name(spec) == name or (not spec and protocol.name == name):
        if protocol.name != name:
            raise UserError(
                f"protocol {protocol.name} needs the file of a classifier: --features {name}=FILE"
            )
        spec = f"{name}={small_classifier.of_reference(reference)}"
    try:
        return load_features(spec, protocol.features, device, sha256=sha256), protocol
    except Unreachable as error:
        plain = reference.images if not (spec or strict or reference.statistics) else None
        if plain is None or small_classifier.unfit(plain):
            raise
        logger.log(f"{error}")
        file = small_classifier.of_reference(reference)
        return load_features(f"{name}={file}", name, device, sha256=sha256), PROTOCOLS[name]


def mismatches(
    protocol: Protocol, reference: Reference, samples: ImageSet, network: FeatureNetwork, strict: bool
) -> tuple[list[str], list[str]]:
    """(errors, notes): what makes the number incomparable, naming both sides; a wrong count is a note unless strict."""
    ref_name, name = f"reference {reference.path}", f"samples {samples.path}"
    meta, sample_meta = dict(reference.meta or {}), samples.meta or {}
    meta |= {key: current_name(meta[key]) for key in ("protocol", "features") if key in meta}
    errors, notes = [], []
    if protocol.features not in (network.name, PROTOCOL):
        errors.append(
            f"protocol {protocol.name} uses {protocol.features}, {name} would be measured by {network.name}"
        )
    if meta.get("protocol", protocol.name) != protocol.name:
        errors.append(
            f"{ref_name} was made for protocol {meta['protocol']}, {name} are measured by {protocol.name}"
        )
    if meta.get("features", network.name) != network.name:
        errors.append(
            f"{ref_name} holds features of {meta['features']}, {name} are measured by {network.name}"
        )
    elif meta.get("features_sha256", network.sha256) != network.sha256:
        errors.append(
            f"{ref_name} was made with {network.name} weights {meta['features_sha256'][:12]}, "
            f"{name} are measured with {network.sha256[:12]}"
        )
    elif meta.get("transform", network.transform) != network.transform:
        errors.append(f"{ref_name} used transform {meta['transform']!r}, {name} get {network.transform!r}")
    shape = tuple(meta.get("shape") or (reference.images.shape[1:] if reference.images else ()))
    if shape and shape[:2] != samples.shape[1:3]:
        errors.append(
            f"{ref_name} is {shape[0]}x{shape[1]}, {name} are {samples.shape[1]}x{samples.shape[2]}"
        )
    if "quantisation" in sample_meta and sample_meta["quantisation"] != protocol.quantisation:
        errors.append(
            f"protocol {protocol.name} wants uint8 by {protocol.quantisation}, {name} by {sample_meta['quantisation']}"
        )
    if protocol.num_samples and samples.shape[0] != protocol.num_samples:
        text = (
            f"protocol {protocol.name} of {ref_name} counts {protocol.num_samples:,} samples, "
            f"{name} are {samples.shape[0]:,}"
        )
        (errors if strict else notes).append(
            text + ("" if strict else ": not comparable with published numbers")
        )
    if reference.statistics and not reference.meta:
        notes.append(f"{ref_name} does not say how it was made")
    return errors, notes
