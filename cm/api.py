"""The library from Python: load a model, draw from it, edit with it; train and evaluate.

    import cm
    teacher = cm.train("data/photos", out_dir="runs/teacher")
    student = cm.train("data/photos", teacher="runs/teacher", out_dir="runs/student")
    student.sample(16, classes=["sneaker", "bag"], steps=2, seed=0, output="pil")[0].save("sneaker.png")

Images are float tensors (n, C, H, W) in [-1, 1]; a shape that does not fit is a ValueError with both shapes.
"""

import importlib
import operator
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cm.commands import edit as editing
from cm.commands import words
from cm.commands.cli import parse
from cm.commands.sample import class_labels, noise_levels, sample_batches, solver_options, with_guide
from cm.commands.train import run_train
from cm.config.derived import (
    is_consistency,
    lands_on_images,
    last_known,
    run_dir,
    with_two_steps,
)
from cm.config.fields import flags_of
from cm.config.inherit import check_sampler
from cm.config.parsing import parse_classes
from cm.config.rows import OBJECTIVES
from cm.config.scripts import SCRIPTS, EditConfig, SampleConfig, changed, configuration_class, configure
from cm.config.validation import validate
from cm.data.images import to_pil, to_uint8
from cm.errors import UserError, nearest
from cm.models.factory import choose_device
from cm.models.files import ModelFile, searched_points
from cm.models.guides import TrainedClassifier
from cm.models.pretrained import Pretrained, load_pretrained, pretrained_from
from cm.runtime import logger
from cm.sampling.editing import LinearEdit, colorize, edit_images, inpaint, slerp, superres
from cm.sampling.finite import FiniteWatch
from cm.sampling.levels import spread
from cm.sampling.noise import IndexedGenerator

Classes = Sequence[int | str] | Tensor | int | str | None
ROUNDING = 1e-3  # by which images may leave [-1, 1]


def load(path: str, *, weights: str = "", device: str = "auto", **flags: Any) -> "Model":
    """The model of a run directory, a checkpoint, a weights file, or what other frameworks wrote.

    path: ours, a released file, a converted .safetensors, a diffusers folder, an EDM pickle; local, gs:// or az://.
    weights: raw, ema:RATE, posthoc:LENGTH or target of a run; empty takes the slowest average. flags: what the file
    does not tell, such as training_mode="edm" or image_size=64 of a bare state dict, or preset="imagenet64_cd_lpips".
    """
    argv = _line({"model_path": str(path), "weights": weights, "device": device, **flags})
    config = parse(SampleConfig, argv)
    foreign = _foreign(config.model_path, config)
    return Model(pretrained_from(config, foreign) if foreign else load_pretrained(config))


def _foreign(path: str, config: SampleConfig) -> ModelFile | None:
    """A model that must be converted first; None for our own and the original's files."""
    if not Path(path).exists():
        return None
    formats = importlib.import_module("cm.tools.convert.formats")
    if (kind := formats.detect(path)) == "torch":
        return None
    size = config.image_size if "image_size" in config.explicit else 0
    state, told = formats.READERS[kind](formats.Source(path, config.weights, size))
    return ModelFile(path, kind, state, told)


class Model:
    """A trained model. network: the bare module. config: its flags. class_names: empty where they are not known."""

    def __init__(self, pretrained: Pretrained[SampleConfig]):
        self._model = pretrained
        self.config = pretrained.config
        self.device = pretrained.device
        self.class_names: tuple[str, ...] = pretrained.config.class_names
        self.edit = Editor(self)

    def __repr__(self) -> str:
        c, channels, side = self.config, *self.image_shape[:2]
        classes = f", {c.num_classes} classes" if c.class_cond else ""
        return f"Model({c.training_mode}, {channels} x {side} x {side}{classes}, {self._model.file.path})"

    @property
    def network(self) -> nn.Module:
        """The bare network: forward(x, c_noise, y=None)."""
        return self._model.denoiser.net

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return (self.config.in_channels or 3, self.config.image_size, self.config.image_size)

    @property
    def is_consistency(self) -> bool:
        """Whether it maps noise to images in one step."""
        return is_consistency(self.config.training_mode)

    def sample(
        self,
        n: int,
        *,
        classes: Classes = None,
        steps: int = 0,
        seed: int = 0,
        sampler: str = "",
        guidance: float | str = 1.0,
        guide: str = "",
        batch_size: int = 64,
        output: str = "tensor",
        **options: Any,
    ) -> Tensor | list[Any]:
        """n images: a tensor (n, C, H, W) in [-1, 1] on the CPU, or a list of Pillow images with output="pil".

        classes: labels or names, taken in turn; None draws them. steps: evaluations of a consistency model or flow map
        (0: 1), or points of a denoiser's grid (0: 18, or as it was trained for). guidance: its scale, or a text with
        the noise levels at which it acts, "2,0.3,5". guide: a classifier or a weaker model, file or run; "" is the
        model itself without a class. options: flags of the sampler, such as s_churn=40. Image i depends on (seed, i)
        only.
        """
        if output not in ("tensor", "pil"):
            raise ValueError(f"output must be 'tensor' or 'pil', got {output!r}")
        n, steps, batch_size = _whole("n", n), _whole("steps", steps), _whole("batch_size", batch_size, 1)
        options |= {
            "guidance": f"{guidance:g}" if isinstance(guidance, float | int) else guidance,
            "guide": guide,
        }
        model = replace(self._model, config=self._sampling(n, steps, seed, sampler, classes, options))
        model, guide = with_guide(model)
        classifier = guide if isinstance(guide, TrainedClassifier) else None
        sigmas = model.denoiser.precond.round_sigma(noise_levels(model.config))
        generator = IndexedGenerator(seed)
        labels = class_labels(model.config, classifier.num_classes if classifier else 0)
        draw = sample_batches(model, generator, sigmas, None, solver_options(model), classifier)
        images = []
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            generator.set_rows(rows)
            images.append(draw(len(rows), labels(rows) if labels else None).float().cpu())
        return _as(torch.cat(images) if images else torch.empty(0, *self.image_shape), output)

    def _sampling(
        self, n: int, steps: int, seed: int, sampler: str, classes: Classes, options: dict[str, Any]
    ) -> SampleConfig:
        c = self.config
        flags = {"num_samples": max(n, 1), "seed": seed, "classes": _listed(classes), **options}
        if sampler or not self.is_consistency:
            flags["sampler"] = sampler or c.sampler
            if steps or not self.is_consistency:
                row = OBJECTIVES[c.training_mode]
                flags["steps"] = steps or (
                    c.steps if row.stages or row.segments else 1 if row.two_times else 18
                )
        elif steps > 1:
            ts = spread(steps, c.steps, last_known(c, c.steps))
            if len(ts) <= steps:
                raise ValueError(f"steps {steps}: the model's grid has {c.steps} points")
            # Two steps have points of their own.
            flags |= {"sampler": "multistep", "ts": "" if steps == 2 else ",".join(map(str, ts))}
        else:
            flags["sampler"] = "onestep"
        made = changed(c, **flags, explicit=c.explicit | set(flags))
        _check_options(made, flags)
        if made.sampler == "multistep" and not made.ts:
            made = with_two_steps(
                made, {**(self._model.file.config or {}), "searched": searched_points(c.model_path)}
            )
        validate(made)
        check_sampler(made, c.model_path)
        return made

    @torch.no_grad()
    def denoise(
        self, x: Tensor, sigma: float | Tensor, classes: Classes = None, *, clip: bool = True
    ) -> Tensor:
        """D(x; sigma), the estimate of the clean images in x = image + sigma noise.

        x (n, C, H, W); sigma a number or (n,); classes: one for all, or one per image. Same shape and device as x.
        """
        self._check(x := _floats(x, "x"))
        x_here = x.to(self.device)
        levels = torch.as_tensor(sigma, dtype=torch.float32, device=self.device)
        if not (levels.isfinite() & (levels > 0)).all():
            raise ValueError(f"sigma must be above 0 and finite, got {sigma}")
        if levels.ndim and levels.shape != x.shape[:1]:
            raise ValueError(f"sigma has shape {tuple(levels.shape)}, the images {tuple(x.shape)}")
        return self._model.denoise(self._labels(classes, len(x)), clip)(x_here, levels.expand(len(x))).to(
            x.device
        )

    def push(self, folder: str, to: str = "diffusers") -> str:
        """Write the model for others, with a model card; returns the path.

        to: "diffusers" (a folder), "onnx", "safetensors", "cm" or "legacy". folder: where; hf://OWNER/NAME is a
        repository of the Hugging Face Hub.
        """
        exporting = importlib.import_module("cm.tools.convert.export")
        if to not in exporting.WRITERS:
            raise ValueError(f"to must be one of {', '.join(exporting.WRITERS)}, got {to!r}")
        state = {name: tensor.detach().float().cpu() for name, tensor in self.network.state_dict().items()}
        names = {*flags_of(type(self.config)), "class_names"}
        stored = {k: v for k, v in (self._model.file.config or {}).items() if k in names}
        own = {
            n: getattr(self.config, n) for n in flags_of(type(self.config)) if n not in ("dry_run", "config")
        }
        config = {**own, **stored, "training_mode": self.config.training_mode}
        exporting.export(str(folder), to, state, config, self._model.file)
        return str(folder)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images of shape {tuple(x.shape)}, the model takes (n, {self._shape_text()})")

    def _shape_text(self) -> str:
        return ", ".join(map(str, self.image_shape))

    def _labels(self, classes: Classes, n: int) -> Tensor | None:
        c = self.config
        if not c.class_cond:
            return None
        if classes is None:
            raise ValueError("the model is class-conditional: give classes, one for all or one per image")
        labels = parse_classes(_listed(classes), c.num_classes, self.class_names)
        if len(labels) not in (1, n):
            raise ValueError(f"{len(labels)} classes for {n} images")
        return torch.tensor(labels * (n if len(labels) == 1 else 1))


class Editor:
    """Zero-shot editing with a consistency model: `model.edit`. Images are (C, H, W) or (n, C, H, W) in [-1, 1].

    Results have the shape (n, C, H, W), on the CPU. classes: of class-conditional models, one for all or one per image.
    """

    def __init__(self, model: Model):
        self._model = model

    def inpaint(self, image: Tensor, mask: Tensor, *, classes: Classes = None, seed: int = 0) -> Tensor:
        """Draw anew what the mask covers: mask (H, W), true or 1 where pixels are to be generated."""
        side, mask = self._model.config.image_size, torch.as_tensor(mask).float()
        if tuple(mask.shape[-2:]) != (side, side):
            raise ValueError(f"a mask of shape {tuple(mask.shape)} for images of {side} x {side}")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"a mask is 0 or 1, got values from {mask.min():g} to {mask.max():g}")
        mask = mask[:, None] if mask.ndim == 3 and len(mask) > 1 else mask  # one for each image
        return self._run(_floats(image), "inpaint", inpaint(1 - mask), classes, seed)

    def colorize(self, image: Tensor, *, classes: Classes = None, seed: int = 0) -> Tensor:
        """Draw the colours of an image of which only the luma is known; it has three channels or one."""
        image = _floats(image)
        if image.ndim < 3 or image.shape[-3] not in (1, 3):
            raise ValueError(f"an image of shape {tuple(image.shape)}, colorize takes ([n,] 1 or 3, H, W)")
        if self._model.image_shape[0] != 3:
            raise ValueError("colorize needs a model of colour images, this one's are grey")
        image = image if image.shape[-3] == 3 else image.expand(*image.shape[:-3], 3, *image.shape[-2:])
        return self._run(image, "colorize", colorize(), classes, seed)

    def superres(self, image: Tensor, factor: int, *, classes: Classes = None, seed: int = 0) -> Tensor:
        """Draw the detail of an image `factor` times smaller than the model's, or of which only patch means count."""
        side, factor, image = self._model.config.image_size, _whole("factor", factor), _floats(image)
        if factor < 1 or side % factor:
            raise ValueError(f"a factor of {factor} does not divide the model's {side} pixels")
        if tuple(image.shape[-2:]) == (side // factor,) * 2:
            image = image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        return self._run(image, "superres", superres(factor), classes, seed)

    def interpolate(self, first: int, second: int, frames: int = 9, *, classes: Classes = None) -> Tensor:
        """(frames, C, H, W) on the way between the samples of two seeds."""
        if _whole("frames", frames) < 2:
            raise ValueError(f"frames must be 2 or more, got {frames}")
        shape = self._model.image_shape
        ends = []
        for seed in (_whole("first", first), _whole("second", second)):
            generator = IndexedGenerator(seed)
            generator.set_rows([0])
            ends.append(generator.randn(1, *shape).expand(frames, *shape))
        noise = slerp(*ends, torch.linspace(0, 1, frames))
        return self._run(torch.zeros(frames, *shape), "interpolate", None, classes, 0, noise)

    def _run(
        self,
        image: Tensor,
        task: str,
        edit: LinearEdit | None,
        classes: Classes,
        seed: int,
        noise: Tensor | None = None,
    ) -> Tensor:
        model = self._model
        if not lands_on_images(model.config.training_mode):
            raise UserError(
                f"editing needs a consistency model; this one was trained with {model.config.training_mode}"
            )
        images = image[None] if image.ndim == 3 else image
        model._check(images)
        if (images.abs() > 1 + ROUNDING).any():
            raise ValueError(
                f"images have values from {images.min():g} to {images.max():g}, expected [-1, 1]"
            )
        images = images.to(model.device, torch.float32)
        sigmas = editing.noise_levels(self._config(task))
        if task == "interpolate":
            sigmas = torch.tensor([model.config.sigma_max, model.config.sigma_min], dtype=torch.float64)
        generator = IndexedGenerator(_whole("seed", seed), "edit")
        generator.set_rows(range(len(images)) if noise is None else [0] * len(images))
        x = None if noise is None else float(sigmas[0]) * noise.to(model.device)
        watch = FiniteWatch()
        denoise = model._model.denoise(model._labels(classes, len(images)), watch=watch.wrap)
        sigma_min = model.config.sigma_min
        results = edit_images(denoise, images, sigmas, generator, edit, x=x, sigma_min=sigma_min)
        names = [f"image {i}" for i in range(len(images))]
        return watch.check(results, names).clamp(-1, 1).cpu()

    def _config(self, task: str) -> EditConfig:
        mode = self._model.config.training_mode
        own = flags_of(configuration_class(EditConfig, {"task": task, "training_mode": mode}))
        given = {n: getattr(self._model.config, n) for n in own if hasattr(self._model.config, n)}
        skipped = ("ts", "sigmas", "classes")
        return configure(EditConfig, **{n: v for n, v in given.items() if n not in skipped}, task=task)


def train(data: str, *, teacher: str = "", objective: str = "", preset: str = "auto", **flags: Any) -> Model:
    """Train on images as `cm train` does, or with a teacher as `cm distill`; returns the trained model.

    data: a folder, zip, npz, IDX files, or what `cm prepare` wrote. objective: EDM, or CD with a teacher, unless it is
    named. flags: those of the command line, such as out_dir="runs/a", total_training_steps=1000. A run that is already
    there goes on.
    """
    line = [*([teacher] if teacher else []), str(data)]
    line += _line({"objective": objective, "preset": preset, **flags})
    script, argv = (words.distill if teacher else words.train)(line)
    config = parse(SCRIPTS[script], argv)
    try:
        run_train(config)
    except SystemExit as end:  # --max_hours or a signal: what there is has been saved
        if end.code != 75:
            raise
    finally:
        logger.reset()
    return load(run_dir(config), device=config.device)


def evaluate(
    samples: str | Tensor | Sequence[str],
    reference: str,
    *,
    features: str = "",
    metrics: str = "",
    protocol: str = "",
    force: bool = True,
    **options: Any,
) -> dict[str, float]:
    """FID and other metrics of samples against a reference, by name; of several files the means.

    samples: npz, folder or zip, several of them, or images (n, C, H, W) in [-1, 1]. reference: a reference batch, or
    images. features: "classifier=FILE" for another feature network than Inception's. options: batch_size, bootstrap,
    seed.
    """
    if isinstance(samples, Tensor):
        if samples.ndim != 4 or samples.shape[1] not in (1, 3):
            raise ValueError(f"samples of shape {tuple(samples.shape)}; expected (n, 1 or 3, H, W)")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "samples.npz"))
            np.savez(path, arr_0=to_uint8(samples).numpy())
            return evaluate(
                path, reference, features=features, metrics=metrics, protocol=protocol, force=force, **options
            )
    if wrong := [name for name in options if name not in ("batch_size", "bootstrap", "seed")]:
        raise TypeError(f"evaluate has no option {wrong[0]}: batch_size, bootstrap or seed")
    library = importlib.import_module("evaluations.evaluator")
    known = library.open_reference(reference)
    images = [library.open_images(path) for path in ([samples] if isinstance(samples, str) else samples)]
    chosen, strict = library.choose_protocol(protocol, features, known)
    library.parse_metrics(metrics, chosen)  # a mistake is known before a network is trained
    network, chosen = library.measuring(features, chosen, strict, known, choose_device("auto"))
    how = library.Options(chosen, library.parse_metrics(metrics, chosen), **options)
    return library.evaluate(known, images, network, how, strict=strict, force=force, seeds=len(images))[
        "metrics"
    ]


def _line(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line; empty ones are left out."""
    given = {name: value for name, value in flags.items() if value not in ("", None)}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def _check_options(config: SampleConfig, given: dict[str, Any]) -> None:
    """TypeError for a name that is no flag of the sampler, ValueError for a value of another type."""
    flags = flags_of(type(config))
    for name, value in given.items():
        if name not in flags:
            raise TypeError(f"sampler {config.sampler} has no option {name}{nearest(name, flags)}")
        kind = type(flags[name].default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")


def _whole(name: str, value: Any, low: int = 0) -> int:
    """A whole number, numpy's and torch's too."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if number < low:
        raise ValueError(f"{name} must be a whole number from {low} up, got {value!r}")
    return number


def _floats(x: Any, what: str = "images") -> Tensor:
    """Images as floats: of integers one could not tell the range."""
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what} must be a tensor, got {type(x).__name__}") from None
    if not x.is_floating_point():
        raise ValueError(
            f"{what} are {x.dtype}, expected floats: cm.data.images.from_uint8 takes (n, H, W, C)"
        )
    return x


def _listed(classes: Classes) -> str:
    if classes is None:
        return ""
    if isinstance(classes, Tensor | np.ndarray):
        classes = classes.tolist()
    return ",".join(map(str, classes)) if not isinstance(classes, int | str) else str(classes)


def _as(images: Tensor, output: str) -> Tensor | list[Any]:
    return images if output == "tensor" else [to_pil(image) for image in to_uint8(images).numpy()]
