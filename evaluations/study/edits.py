"""Edits of test images in a study: how near results come to the truth, beside what needs no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm.commands.cli import parse
from cm.commands.edit import edit_all, noise_levels
from cm.commands.edit_inputs import Input, InputFiles
from cm.commands.interpolate import decode
from cm.config.rows import TASKS
from cm.config.scripts import EditConfig, changed
from cm.data.images import from_uint8, to_uint8
from cm.models.pretrained import Pretrained, load_pretrained
from cm.sampling.editing import slerp
from cm.sampling.noise import IndexedGenerator
from cm.storage.filesystem import write_atomic
from evaluations.evaluator import Evaluator
from evaluations.features import FeatureNetwork
from evaluations.npz_io import open_images
from evaluations.reports import edit_page
from evaluations.reports.edit_report import bicubic, make_metrics, mean_fill

IMAGES = 500  # test images that are edited
PAIRS = 100  # of noises between which each class is interpolated
MODEL = "the model"


def nearest_pixel(images: Tensor, config: EditConfig) -> Tensor:
    """The patch means, repeated."""
    return F.interpolate(F.avg_pool2d(images, config.factor), scale_factor=config.factor)


@dataclass(frozen=True)
class Edit:
    """A task with its flags, and what is compared with the model's results.

    baselines: name -> what makes images (B, C, H, W) of the truth without a model. seen: name of what the task itself
    saw, where that is a picture; strokes: it is a crude painting of the truth.
    """

    title: str
    flags: Mapping[str, Any]
    baselines: Mapping[str, Callable[[Tensor, EditConfig], Tensor]] = field(default_factory=dict)
    seen: str = ""
    strokes: bool = False


FILL = {"mean of the known pixels": mean_fill}
EDITS = (
    Edit("in-painting, a square of half the sides", {"task": "inpaint", "mask": "center:0.5"}, FILL),
    Edit("in-painting, the left half", {"task": "inpaint", "mask": "left"}, FILL),
    Edit(
        "super-resolution, 7 to 28 pixels",
        {"task": "superres", "factor": 4},
        {"nearest pixel": nearest_pixel, "bicubic": bicubic},
    ),
    Edit("denoising, noise level 0.5", {"task": "denoise", "sigma": 0.5}, seen="the noisy input"),
    Edit(
        "strokes, noise levels 1 and 0.3",
        {"task": "stroke", "sigmas": "1.0,0.3"},
        seen="the strokes",
        strokes=True,
    ),
)


def load_model(model_path: Path, images: Path) -> Pretrained[EditConfig]:
    """A model that edits the images of an npz."""
    flags = {"model_path": model_path, "input": images, "device": "cpu", "batch_size": 250}
    return load_pretrained(parse(EditConfig, [word for n, v in flags.items() for word in (f"--{n}", str(v))]))


def measure_edits(model_path: Path, test: Path, evaluator: Evaluator, folder: Path) -> dict[str, Any]:
    """Scores of every task, the same images for every model, the first of the test set; and of interpolation.

    folder: for the frames of the latter.
    """
    model = load_model(model_path, test)
    inputs = list(InputFiles(model.config).load(range(IMAGES)))
    scorer = Scorer(evaluator.network, inputs, model.config.image_size)
    tasks = {edit.title: edit_scores(model, edit, inputs, scorer) for edit in EDITS}
    return {
        "images": len(inputs),
        "tasks": tasks,
        "interpolation": interpolation_scores(model, evaluator, folder),
    }


class Scorer:
    """Mean scores of images against the truth that they were made of.

    Features: Euclidean distance of the classifier's, which take the part of LPIPS for images this small.
    """

    def __init__(self, network: FeatureNetwork, inputs: list[Input], image_size: int):
        self.network, self.metrics = network, make_metrics(image_size)
        self.truth = torch.stack([item.image for item in inputs])
        self.features = network(to_uint8(self.truth))["pool"]
        self.labels = torch.tensor([item.label for item in inputs])

    def __call__(self, images: Tensor) -> dict[str, float]:
        """images: uint8 (N, H, W, C), in the order of the inputs."""
        pixels, features = from_uint8(images), self.network(images)["pool"]
        scores = {
            name: float(metric((pixels + 1) / 2, (self.truth + 1) / 2).double().mean())
            for name, metric in self.metrics.items()
        }
        scores["features"] = float((features - self.features).norm(dim=1).double().mean())
        return scores | {"accuracy": read_as(self.network, features, self.labels)}


def read_as(network: FeatureNetwork, features: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier reads as their class."""
    return float(((features @ network.classifier.T).argmax(1) == labels).double().mean())


def edit_scores(
    model: Pretrained[EditConfig], edit: Edit, inputs: list[Input], scorer: Scorer
) -> dict[str, dict[str, float]]:
    """One result of each image, and the baselines, all as 8 bits a channel."""
    config = changed(model.config, **edit.flags)
    given = [edit_page.as_strokes(item) if edit.strokes else item for item in inputs]
    task, levels = TASKS.load(config.task)(config), noise_levels(config)
    edited = sorted(edit_all(replace(model, config=config), iter(given), task, levels), key=lambda e: e.index)
    found = {n: scorer(to_uint8(make(scorer.truth, config))) for n, make in edit.baselines.items()}
    if edit.seen:
        found[edit.seen] = scorer(torch.from_numpy(np.concatenate([e.picture for e in edited])))
    return found | {MODEL: scorer(torch.from_numpy(np.concatenate([e.results for e in edited])))}


def interpolation_scores(
    model: Pretrained[EditConfig], evaluator: Evaluator, folder: Path
) -> dict[str, dict[str, float]]:
    """Distance to the test images of frames half-way between two noises, beside both ends and their mean in pixels.

    Each frame takes one evaluation.
    """
    config = changed(model.config, task="interpolate", sigmas=f"{model.config.sigma_max:g}")
    shape = (config.in_channels or 3, config.image_size, config.image_size)
    frames: dict[str, list[Tensor]] = {"the two ends": [], "half-way": [], "mean of both ends' pixels": []}
    for label in range(config.num_classes):
        generator = IndexedGenerator(label)
        generator.set_rows(range(2 * PAIRS))
        a, b = generator.randn(2 * PAIRS, *shape).chunk(2)
        noise = torch.cat([a, b, slerp(a, b, 0.5)])
        first, last, half = decode(replace(model, config=config), noise, noise_levels(config), label).chunk(3)
        for name, images in zip(frames, (torch.cat([first, last]), half, (first + last) / 2)):
            frames[name].append(images)
    found = {}
    for i, (name, parts) in enumerate(frames.items()):
        path = folder / f"interpolation_{i}.npz"
        labels = np.arange(config.num_classes).repeat(len(parts[0]))
        images = to_uint8(torch.cat(parts)).numpy()
        write_atomic(path, lambda file, i=images, y=labels: np.savez(file, arr_0=i, arr_1=y))
        found[name] = evaluator.measure(open_images(str(path)))["metrics"]
    return found


def edits_table(results: Mapping[str, dict[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Markdown. results: method -> what measure_edits found."""
    if not results:
        return []
    lines = [
        "| task | result | PSNR [dB] ↑ | SSIM ↑ | distance of features ↓ | read as its class |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(results.values()))
    for task, rows in first["tasks"].items():
        shown = [(n, row) for n, row in rows.items() if n != MODEL]
        shown += [(titles[m], found["tasks"][task][MODEL]) for m, found in results.items()]
        for i, (name, row) in enumerate(shown):
            cells = f"{row['psnr']:.2f} | {row['ssim']:.3f} | {row['features']:.2f} | {row['accuracy']:.1%}"
            lines.append(f"| {'' if i else task} | {name} | {cells} |")
    return lines


def interpolation_table(results: Mapping[str, dict[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Markdown: quality of the ends and of what lies between them."""
    lines = [
        "| interpolation in one evaluation | frames | Fréchet distance | read as its class |",
        "|---|---|---|---|",
    ]
    for method, found in results.items():
        for name, row in found["interpolation"].items():
            lines.append(f"| {titles[method]} | {name} | {row['fid']:.2f} | {row['accuracy']:.1%} |")
    return lines


def draw_edits(path: Path, model_path: Path, test: Path) -> None:
    """A page of edits of images from all over the test set."""
    edit_page.write_page(path, load_model(model_path, test))
