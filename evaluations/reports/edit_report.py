"""How good edited images are: PSNR, SSIM and LPIPS against the truth, beside what needs no model.

    python -m evaluations.reports.edit_report RESULTS [RESULTS ...] [--out REPORT.md]

RESULTS: folders that scripts/image_edit.py wrote for inpaint, colorize or superres from full images, which are the
truth. Scores are of whole images as they were written, 8 bits a channel. LPIPS is measured where its weights are.
A class-conditional model was told the class of each image; the baselines know nothing of it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm.commands.edit_inputs import Input, InputFiles
from cm.commands.masks import known_mask
from cm.config.scripts import EditConfig, changed, configure
from cm.data.decode import Decoder
from cm.data.images import from_uint8, save_json, to_uint8
from cm.errors import UserError
from cm.objectives.lpips import URLS, Lpips, LpipsOptions, import_piq
from cm.runtime import job
from cm.runtime.inputs import read_json
from cm.sampling.editing import luma
from cm.storage.filesystem import write_atomic

SMALLEST_LPIPS = 32  # pixels: VGG16 says nothing about smaller images
LARGEST_WINDOW = 7  # pixels: of SSIM

Metric = Callable[[Tensor, Tensor], Tensor]  # images (B, C, H, W) in [0, 1] and their truth -> (B,)


def mean_fill(images: Tensor, config: EditConfig) -> Tensor:
    """What is to be generated takes the mean of each image's known pixels, per channel."""
    known = known_mask(config.mask, *images.shape[-2:], config.seed)
    mean = (known * images).sum((2, 3), keepdim=True) / known.sum().clamp(min=1)
    return known * images + (1 - known) * mean


def grey(images: Tensor, config: EditConfig) -> Tensor:
    """The luma in all three channels."""
    return luma(images)


def bicubic(images: Tensor, config: EditConfig) -> Tensor:
    """The patch means, enlarged."""
    small = F.avg_pool2d(images, config.factor)
    return F.interpolate(small, scale_factor=config.factor, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class Task:
    """A task that can be measured: the flag that says how hard it is, and what needs no model."""

    flag: str
    baseline_name: str
    baseline: Callable[[Tensor, EditConfig], Tensor]


TASKS: dict[str, Task] = {
    "inpaint": Task("mask", "mean of the known pixels", mean_fill),
    "colorize": Task("", "grey", grey),
    "superres": Task("factor", "bicubic", bicubic),
}


def make_metrics(image_size: int, lpips_path: str = "") -> dict[str, Metric]:
    """name -> metric. SSIM's window is 7 pixels, less where images are smaller than 16."""
    piq = import_piq()
    window = min(LARGEST_WINDOW, (image_size // 2 - 1) | 1)
    metrics: dict[str, Metric] = {
        "psnr": lambda a, b: piq.psnr(a, b, data_range=1.0, reduction="none"),
        "ssim": lambda a, b: piq.ssim(a, b, kernel_size=window, data_range=1.0, reduction="none"),
    }
    cached = all(Path(torch.hub.get_dir(), "checkpoints", name).is_file() for name in URLS)
    if lpips_path or (cached and image_size >= SMALLEST_LPIPS):
        lpips = Lpips(LpipsOptions(lpips_path), average_pool=False)
        metrics["lpips"] = lambda a, b: lpips(2 * a - 1, 2 * b - 1)
    return metrics


@dataclass(frozen=True)
class Measured:
    """Scores of one folder of results. methods: name -> metric -> mean over all images."""

    task: str
    images: int
    methods: dict[str, dict[str, float]]


def measure(folder: Path, lpips_path: str = "") -> Measured:
    """Baseline, one result, and the mean of all results of each image, against the truth."""
    config, inputs, files = read_results(folder)
    task, metrics = TASKS[config.task], make_metrics(config.image_size, lpips_path)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for item in inputs:
        results = torch.stack([_image(folder / name, config) for name in files[item.name]])
        baseline = task.baseline(item.image[None], config)
        written = from_uint8(to_uint8(baseline))
        candidates = (torch.cat([written, results.mean(0, keepdim=True), results]) + 1) / 2
        truth = ((item.image + 1) / 2).expand_as(candidates)
        for name, metric in metrics.items():
            scores[name].append(metric(candidates, truth).double().numpy())
    table = {name: np.stack(rows) for name, rows in scores.items()}  # (images, 2 + results)
    columns = {task.baseline_name: slice(0, 1), "one result": slice(2, None)}
    count = config.num_results
    if count > 1:
        columns[f"mean of {count} results"] = slice(1, 2)
    return Measured(
        f"{config.task} {getattr(config, task.flag)}" if task.flag else config.task,
        len(files),
        {
            title: {name: float(table[name][:, part].mean()) for name in metrics}
            for title, part in columns.items()
        },
    )


def read_results(folder: Path) -> tuple[EditConfig, list[Input], dict[str, list[str]]]:
    """How a folder was made, its inputs, and the name of each input -> its result files."""
    try:
        metadata = read_json(folder / "edit.json")
        config = configure(EditConfig, **metadata["config"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: not a folder of image_edit's results (edit.json: {error})") from None
    if config.task not in TASKS:
        raise UserError(f"{folder}: {config.task} has no truth to compare with; only {', '.join(TASKS)} have")
    # Which classes the model was told of is over, and its names for them lie in the model.
    source = InputFiles(changed(config, class_cond=False))
    edited = [i for i in range(len(source.names)) if source.file(i) in metadata["images"]]
    if not edited:
        raise UserError(f"{folder}: --input {config.input} holds none of the images that were edited")
    inputs = list(source.load(edited))
    without = [item.name for item in inputs if not item.truth]
    if without:
        raise UserError(f"{folder}: there is no truth for {without[0]}, its input was what the task knows")
    return config, inputs, {item.name: metadata["images"][source.file(item.index)] for item in inputs}


def _image(path: Path, config: EditConfig) -> Tensor:
    """(C, H, W) in [-1, 1]."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    pixels = np.asarray(Decoder(channels=config.in_channels or 3)(path.read_bytes(), str(path)))
    return from_uint8(pixels.reshape(1, *pixels.shape[:2], -1))[0]


HEADINGS = {"psnr": "PSNR [dB] ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}


def table(rows: list[Measured]) -> str:
    """Markdown."""
    names = [name for name in HEADINGS if any(name in m for row in rows for m in row.methods.values())]
    lines = [
        "| " + " | ".join(["task", "images", "method", *(HEADINGS[name] for name in names)]) + " |",
        "|---" * (3 + len(names)) + "|",
    ]
    for row in rows:
        first = [row.task, str(row.images)]
        for method, values in row.methods.items():
            cells = [
                f"{values[name]:.{2 if name == 'psnr' else 3}f}" if name in values else "" for name in names
            ]
            lines.append("| " + " | ".join([*first, method, *cells]) + " |")
            first = ["", ""]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="folders that image_edit wrote")
    parser.add_argument(
        "--lpips_path", default="", help="folder with LPIPS weights; empty: torch's hub cache"
    )
    parser.add_argument("--out", type=Path, help="file for the table; the numbers go beside it as .json")
    args = parser.parse_args()
    rows = [measure(folder, args.lpips_path) for folder in args.results]
    print(table(rows), end="")
    if args.out:
        write_atomic(args.out, table(rows).encode())
        numbers = {
            str(f): {"task": r.task, "images": r.images, **r.methods} for f, r in zip(args.results, rows)
        }
        save_json(args.out.with_suffix(".json"), numbers)


if __name__ == "__main__":
    job.run_main(main)
