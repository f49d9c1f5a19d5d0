"""What guides a model: a classifier of noisy images, a weaker model, or the model itself without a class."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cm.config.fields import flags_of
from cm.config.flags import ModelFlags
from cm.config.parsing import Guidance
from cm.config.rows import OBJECTIVES
from cm.config.scripts import ClassifierConfig, SampleConfig, configure
from cm.diffusion.denoiser import Denoiser, NoisyClassifier
from cm.diffusion.guidance import GuidedDenoiser, told, unconditional, without_labels
from cm.errors import UserError, masked
from cm.models.factory import create_network, create_precond
from cm.models.files import ModelFile, load_model_file
from cm.models.guided_diffusion import is_classifier, released_classifier
from cm.models.pretrained import Pretrained, pretrained_from
from cm.storage.shapes import shapes_only
from cm.storage.weights import check_matching


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier of noisy images with its file."""

    model: NoisyClassifier
    file: ModelFile
    num_classes: int


Guide = TrainedClassifier | Pretrained[SampleConfig]


def load_guide(path: str, like: ModelFlags, device: torch.device) -> Guide:
    """The classifier or denoiser of --guide, in eval mode; UserError where it does not fit the guided model.

    like: the configuration of that model. An unconditional one takes any classifier, and every model an unconditional
    guide. All ranks must call it.
    """
    file = load_model_file(path, flag="guide")
    stored = file.config or {}
    mode = stored.get("training_mode", "")
    if mode == "classifier" or (file.config is None and is_classifier(file.state)):
        guide, found = _classifier(file, path, like, device)
    elif mode in OBJECTIVES and OBJECTIVES[mode].teaches != "denoiser":
        raise UserError(
            f"--guide {path} was trained by {mode}: a guide is a classifier of noisy images or a denoiser"
        )
    else:
        guide, found = _denoiser(file, path, like)
    wanted = {
        "image_size": like.image_size,
        "in_channels": like.in_channels or 3,
        "num_classes": like.num_classes if like.class_cond else 0,
    }
    for name, value in wanted.items():
        if value and found[name] and found[name] != value:
            raise UserError(f"--guide {path} has --{name} {found[name]}, the model {value}")
    if not like.class_cond and isinstance(guide, Pretrained) and guide.config.class_cond:
        raise UserError(f"--guide {path} knows classes, and the model does not")
    return guide


def _classifier(
    file: ModelFile, path: str, like: ModelFlags, device: torch.device
) -> tuple[TrainedClassifier, Mapping[str, Any]]:
    """A classifier of guided-diffusion or of classifier_train, and what it was made for."""
    if file.config is None:
        model, classes = released_classifier(file.state, image_size=like.image_size, source=path)
        found = {"image_size": like.image_size, "in_channels": 3, "num_classes": classes}
    else:
        known = flags_of(ClassifierConfig)
        found = file.config
        config = configure(ClassifierConfig, **{n: value for n, value in found.items() if n in known})
        with shapes_only():
            check_matching(create_network(config), file.state, f"--guide {file.path}")
        network = create_network(config)
        network.load_state_dict(file.state)
        model = NoisyClassifier(network, create_precond(config, consistency=False))
    network = model.net.to(device).eval().requires_grad_(False)
    return TrainedClassifier(replace(model, net=network), file, found["num_classes"]), found


def _denoiser(
    file: ModelFile, path: str, like: ModelFlags
) -> tuple[Pretrained[SampleConfig], dict[str, Any]]:
    """A denoiser on the guided model's device and in its precision, and what it was made for."""
    flags = {"model_path": path, "device": like.device, "precision": like.precision}
    flags |= {"use_fp16": like.use_fp16, **({} if file.config else {"training_mode": "edm"})}
    config = configure(SampleConfig, **flags, explicit=frozenset(flags))
    guide = pretrained_from(config, file, "guide")
    c = guide.config
    channels, classes = c.in_channels or 3, c.num_classes if c.class_cond else 0
    return guide, {"image_size": c.image_size, "in_channels": channels, "num_classes": classes}


def guided_by(
    denoiser: Denoiser,
    guidance: Guidance,
    guide: Pretrained | None,
    *,
    source: ModelFile,
    class_cond: bool,
    lazy: bool = False,
) -> Denoiser:
    """The denoiser of `source` guided by another model, or by itself without a class, or told to be guided.

    UserError where it has no class to leave out, or has not learned to do without.
    """
    mode = (source.config or {}).get("training_mode", "")
    known = mode in OBJECTIVES  # a bare state dict says nothing
    if known and (row := OBJECTIVES[mode]).two_times and (guide is not None or not row.told_guidance):
        raise UserError(f"--guidance and --guide are for models of one time; {source.path} is a flow map")
    if known and row.told_guidance:
        if guidance.low < 1:
            raise UserError(f"--guidance {guidance.low:g}: {source.path} knows scales from 1 on")
        return told(denoiser, guidance)
    if guide is None:
        dropout = (source.config or {}).get("label_dropout", 0)
        if not class_cond or not isinstance(dropout, int | float) or dropout <= 0:
            what = "was trained without --label_dropout" if class_cond else "knows no classes"
            raise UserError(
                f"--guidance needs a model that knows images without a class: {source.path} {what}; "
                "give another model that guides it (--guide)"
            )
        baseline = unconditional(denoiser)
    else:
        if guidance.plain:
            raise UserError(f"--guide {guide.file.path} does nothing at --guidance 1: give a larger scale")
        baseline = guide.denoiser if guide.config.class_cond else without_labels(guide.denoiser)
    return GuidedDenoiser(denoiser.net, denoiser.precond, baseline, guidance, lazy)


def provenance(guide: Guide | None) -> dict[str, str]:
    """Where the weights of a guide came from, for metadata of results."""
    if guide is None:
        return {}
    file = guide.file
    return {
        "guide_path": masked(file.path),
        "guide_weights": file.kind,
        "guide_sha256": file.sha256,
    }
