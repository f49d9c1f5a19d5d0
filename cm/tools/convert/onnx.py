"""The one-step generator of a consistency model as an ONNX graph, compared with our own sampler before it is kept.

Inputs: `noise` (B, C, H, W), standard normal, and `labels` (B,) of class-conditional models. Output: `images`
(B, C, H, W) in [-1, 1]. B is free.
"""

import contextlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cm import __version__
from cm.config.inherit import inherit
from cm.config.rows import OBJECTIVES
from cm.config.scripts import SampleConfig, configure
from cm.diffusion.denoiser import Denoiser, clamped
from cm.errors import UserError, extra
from cm.models.factory import create_network, create_precond
from cm.runtime.files import draft_folder
from cm.sampling.registry import run_sampler
from cm.tools.convert.layout import Config, State, require_image_and_level

# Largest difference to our own sampler with which an export is kept, in images in [-1, 1]
TOLERANCE = 1e-4
# Beyond this many bytes of weights they go to a file beside the graph: an ONNX file ends at 2 GiB
INSIDE = 2**31 - 2**26
BATCHES = (1, 3)  # that are compared: the graph was traced with another one


class OneStep(nn.Module):
    """D(sigma_max noise; sigma_max), clamped: the consistency function at the end of its trajectory."""

    def __init__(self, denoiser: Denoiser, sigma_max: float):
        super().__init__()
        self.net, self.denoiser, self.sigma_max = denoiser.net, denoiser, sigma_max

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """noise (B, C, H, W), labels (B,) -> images (B, C, H, W)."""
        sigma = torch.full((1,), self.sigma_max).expand(noise.shape[0])
        cond = {} if labels is None else {"y": labels}
        return self.denoiser(self.sigma_max * noise, sigma, **cond).clamp(-1, 1)


def write_onnx(path: str, state: State, config: Config) -> None:
    """Export, compare with our sampler by onnxruntime, then put in place; UserError leaves nothing behind."""
    if OBJECTIVES[config["training_mode"]].sampler != "onestep":
        raise UserError(f"--to onnx takes one-step generators; this model is of {config['training_mode']}")
    require_image_and_level(config, "the ONNX graph")
    _require_packages()
    model, chosen = _model(state, config)
    target = Path(path)
    with draft_folder(target) as folder:
        draft = folder / target.name
        _export(model, chosen, draft, config)
        _compare(model, chosen, draft)
        for file in sorted(folder.iterdir()):  # weights of large models are a second file
            os.replace(file, target.parent / file.name)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to onnx needs {error.name}: {extra('onnx')}") from None


def _model(state: State, config: Config) -> tuple[OneStep, SampleConfig]:
    """The generator in fp32 on the CPU, and its configuration."""
    chosen = inherit(configure(SampleConfig, device="cpu"), config, "the model")
    network = create_network(chosen)
    network.load_state_dict(state)
    denoiser = Denoiser(
        network.float().eval().requires_grad_(False), create_precond(chosen, consistency=True)
    )
    return OneStep(denoiser, chosen.sigma_max).eval(), chosen


def _inputs(config: SampleConfig, batch: int) -> dict[str, Tensor]:
    """Noise and, for class-conditional models, labels: a function of the batch's size alone."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, config.in_channels or 3, config.image_size, config.image_size)
    inputs = {"noise": torch.randn(shape, generator=generator)}
    if config.class_cond:
        inputs["labels"] = torch.randint(config.num_classes, (batch,), generator=generator)
    return inputs


def _export(model: OneStep, config: SampleConfig, path: Path, stored: Config) -> None:
    inputs = _inputs(config, 2)
    batch = torch.export.Dim("batch")
    # The exporter reports its progress on stdout, and warns of its own parts.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=["images"],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise UserError(
                f"torch {torch.__version__} cannot write this network as ONNX: {cause[:200]}"
            ) from error
        meta = {"cm": json.dumps({"config": stored}), "cm_version": __version__}
        program.model.metadata_props.update(meta)
        large = sum(t.numel() * t.element_size() for t in model.net.state_dict().values()) > INSIDE
        program.save(str(path), external_data=large)


def _compare(model: OneStep, config: SampleConfig, path: Path) -> None:
    """UserError where onnxruntime draws other images than our own one-step sampler."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        worst = max(_difference(session, model, config, batch) for batch in BATCHES)
    except Exception as error:  # onnxruntime's errors have no common class of their own
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"the ONNX graph does not run, nothing was written: {first[:200]}") from error
    if not worst <= TOLERANCE:  # nan is not, either
        raise UserError(
            f"the ONNX graph draws other images than the model (largest difference {worst:.2g}, allowed "
            f"{TOLERANCE:g}): nothing was written"
        )


@torch.no_grad()
def _difference(session: Any, model: OneStep, config: SampleConfig, batch: int) -> float:
    inputs = _inputs(config, batch)
    (images,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    cond = {"y": inputs["labels"]} if "labels" in inputs else {}
    grid = {name: getattr(config, name) for name in ("steps", "sigma_min", "sigma_max", "rho")}
    denoise = clamped(lambda x, sigma: model.denoiser(x, sigma, **cond))
    own = run_sampler("onestep", denoise, config.sigma_max * inputs["noise"], None, **grid)
    return (torch.from_numpy(images) - own).abs().max().item()
