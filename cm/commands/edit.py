"""Editing images as configured: inputs, tasks, batches over ranks, PNGs, a side-by-side grid, metadata."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cm.commands.common import claimed_output
from cm.commands.edit_inputs import Input, InputFiles
from cm.commands.interpolate import run_interpolation
from cm.commands.masks import known_mask
from cm.commands.paste import paste_back
from cm.config.derived import lands_on_images, last_known, run_dir
from cm.config.parsing import parse_sigmas, parse_ts
from cm.config.rows import TASKS
from cm.config.scripts import EditConfig, resolved
from cm.data.images import save_grid, save_json, save_png, to_pil, to_uint8
from cm.errors import UserError
from cm.models.pretrained import Pretrained, load_pretrained
from cm.runtime import distributed, logger
from cm.runtime.progress import progress
from cm.sampling.editing import LinearEdit, colorize, edit_images, inpaint, luma, superres
from cm.sampling.finite import FiniteWatch
from cm.sampling.levels import spread, ts_to_sigmas
from cm.sampling.noise import IndexedGenerator
from cm.seeding import derive_seed

# As in the authors' notebook, which uses all points of a grid of 18. Fewer give visibly worse results.
DEFAULT_EVALUATIONS = 17
FULL = "full"  # folder of results at the size of their pictures


@dataclass(frozen=True)
class Edited:
    """What becomes of an input, as uint8 (n, H, W, C): what the task saw, the results, and the truth (n = 1 or 0).

    pasted: each result at the size of the picture that --resize True shrank.
    """

    index: int
    name: str
    picture: np.ndarray
    results: np.ndarray
    truth: np.ndarray
    pasted: tuple[np.ndarray, ...] = ()


def inpaint_task(config: EditConfig) -> LinearEdit:
    """What --mask does not cover is known."""
    mask = known_mask(config.mask, config.image_size, config.image_size, config.seed, config.resize)
    if mask.all() or not mask.any():
        what = "nothing to generate" if mask.all() else "nothing known"
        logger.log(f"warning: --mask {config.mask} leaves {what}")
    return inpaint(mask)


def colorize_task(config: EditConfig) -> LinearEdit:
    """The luma is known."""
    if config.in_channels == 1:
        raise UserError(f"colorize needs a colour model, and {config.model_path} is grey")
    return colorize()


def superres_task(config: EditConfig) -> LinearEdit:
    """The means of patches of --factor pixels are known."""
    if config.image_size % config.factor:
        raise UserError(f"--factor {config.factor} does not divide images of {config.image_size} pixels")
    return superres(config.factor)


def free_task(config: EditConfig) -> None:
    """Nothing is held fixed."""


def run_image_edit(config: EditConfig) -> None:
    """Edit --input as configured and write everything to --out_dir."""
    distributed.setup_dist(timeout=60 * config.startup_timeout)
    model = load_pretrained(config)
    c = model.config
    if not lands_on_images(c.training_mode):
        raise UserError(
            f"image_edit needs a consistency model; {c.model_path} was trained with {c.training_mode}"
        )
    sigmas = noise_levels(c)
    logger.log(f"{model.file.path}: weights {model.file.kind}, {c.task}")
    logger.log("noise levels: " + ", ".join(f"{s:.4g}" for s in sigmas.tolist()))
    if c.task == "interpolate":
        run_interpolation(model, sigmas)
    else:
        run_edits(model, sigmas)


def noise_levels(config: EditConfig) -> Tensor:
    """The levels at which the network is evaluated, decreasing, and sigma_min at the end; float64."""
    c = config
    if c.sigmas:
        levels = parse_sigmas(c.sigmas, c.sigma_min, c.sigma_max)
    elif c.ts or not TASKS[c.task].first_level:
        ts = spread(DEFAULT_EVALUATIONS, c.steps, last_known(c, c.steps))
        ts = list(parse_ts(c.ts, c.steps)) if c.ts else ts
        if ts[-1] != c.steps - 1:
            ts.append(c.steps - 1)
        return ts_to_sigmas(ts, c.steps, c.sigma_min, c.sigma_max, c.rho)
    else:
        levels = (getattr(c, TASKS[c.task].first_level),)
    return torch.tensor([*levels, c.sigma_min], dtype=torch.float64)


def run_edits(model: Pretrained[EditConfig], sigmas: Tensor) -> None:
    """All tasks that start from input images; the images are spread over the ranks."""
    c = model.config
    edit = TASKS.load(c.task)(c)
    source = InputFiles(c)
    directory = Path(run_dir(c))
    results = [result_name(name, i) for name in source.names for i in range(c.num_results)]
    pasted = [f"{FULL}/{name}" for name in results] if c.resize else []
    with claimed_output(directory, [*pasted, *results, "grid.png", "edit.json"], c.overwrite):
        write_edits(model, sigmas, edit, source, directory)


def write_edits(
    model: Pretrained[EditConfig],
    sigmas: Tensor,
    edit: LinearEdit | None,
    source: InputFiles,
    directory: Path,
) -> None:
    """The results of this rank's inputs; on rank 0 also the picture of all side by side, and edit.json."""
    c = model.config
    rows = range(distributed.get_rank(), len(source.names), distributed.get_world_size())
    mine = source.load(rows)
    shown, done, at_full_size = [], [], False
    for edited in progress(edit_all(model, mine, edit, sigmas), total=len(rows), desc=c.task, unit="image"):
        for i, image in enumerate(edited.results):
            save_png(directory / result_name(edited.name, i), to_pil(image))
        for i, image in enumerate(edited.pasted):
            (directory / FULL).mkdir(exist_ok=True)
            save_png(directory / FULL / result_name(edited.name, i), to_pil(image))
        done.append(edited.index)
        if edited.index < c.grid_images:
            shown.append(replace(edited, pasted=()))
        at_full_size = at_full_size or bool(edited.pasted)
    everything = distributed.all_gather_object((done, shown, source.skipped))
    if not any(part[0] for part in everything):
        raise UserError(f"--input {c.input}: none of the images can be read")
    if distributed.is_main():
        shown = sorted((e for part in everything for e in part[1]), key=lambda e: e.index)
        save_side_by_side(directory / "grid.png", shown)
        finished = sorted(i for part in everything for i in part[0])
        metadata = {
            **model.provenance(),
            "config": resolved(c),
            "sigmas": sigmas.tolist(),
            "images": {
                source.file(i): [result_name(source.names[i], k) for k in range(c.num_results)]
                for i in finished
            },
            "skipped": [message for part in everything for message in part[2]],
        }
        save_json(directory / "edit.json", metadata)
        logger.log(
            f"{len(finished) * c.num_results} results in {directory}; side by side: {directory}/grid.png"
            + (f"; at the pictures' own sizes: {directory / FULL}" if at_full_size else "")
        )


def result_name(name: str, i: int) -> str:
    """File name of result i of an input."""
    return f"{name}_{i:03d}.png"


def edit_all(
    model: Pretrained[EditConfig], inputs: Iterator[Input], edit: LinearEdit | None, sigmas: Tensor
) -> Iterator[Edited]:
    """Edit the images in batches of (image, result) pairs; each image comes out when its last result is there."""
    c = model.config
    waiting: dict[int, tuple[Input, Tensor, list[Tensor]]] = {}
    batch: list[tuple[Input, int]] = []

    def flush() -> Iterator[Edited]:
        pictures, results = edit_batch(model, batch, edit, sigmas)
        for (item, _), picture, result in zip(batch, pictures, results):
            known = waiting.setdefault(item.index, (item, picture, []))
            known[2].append(result)
            if len(known[2]) == c.num_results:
                yield _finished(*waiting.pop(item.index), c.task, edit)
        batch.clear()

    for item in inputs:
        for i in range(c.num_results):
            batch.append((item, i))
            if len(batch) == c.batch_size:
                yield from flush()
    if batch:
        yield from flush()


def _finished(
    item: Input, picture: Tensor, results: list[Tensor], task: str, edit: LinearEdit | None
) -> Edited:
    def as_uint8(images: list[Tensor]) -> np.ndarray:
        return to_uint8(torch.stack(images)).numpy()

    truth = as_uint8([item.image])[: int(item.truth)]
    pasted: tuple[np.ndarray, ...] = ()
    if item.original is not None:
        mask = edit.mask if edit and task == "inpaint" else None
        pasted = tuple(paste_back(item.original, result, task, mask) for result in results)
    return Edited(item.index, item.name, as_uint8([picture]), as_uint8(results), truth, pasted)


def edit_batch(
    model: Pretrained[EditConfig], batch: list[tuple[Input, int]], edit: LinearEdit | None, sigmas: Tensor
) -> tuple[Tensor, Tensor]:
    """(what the task sees, results) for pairs of an image and a result's number, on the CPU."""
    c = model.config
    images = torch.stack([item.image for item, _ in batch]).to(model.device)
    generator = IndexedGenerator(c.seed, "edit")
    generator.set_rows([derive_seed(item.key, i) for item, i in batch])
    labels = torch.tensor([item.label for item, _ in batch])
    known = images if edit is None else edit.measure(images)
    noise = generator.randn_like(images) if not getattr(c, "noisy_input", False) else torch.zeros_like(images)
    x = known + float(sigmas[0]) * noise
    picture = known  # unknown pixels are mid-grey: black would hide on dark images
    if c.task == "colorize":
        picture = luma(images)
    elif c.task == "denoise":
        picture = x
    watch = FiniteWatch()
    for _ in range(getattr(c, "repeat", 1)):
        images = edit_images(
            model.denoise(labels, c.clip_denoised, watch.wrap),
            images,
            sigmas,
            generator,
            edit,
            x=x,
            sigma_min=c.sigma_min,
            final_project=getattr(c, "final_project", True),
        )
        x = images + float(sigmas[0]) * generator.randn_like(images)
    return picture.cpu(), watch.check(images, [result_name(item.name, i) for item, i in batch]).cpu()


def save_side_by_side(path: Path, shown: list[Edited]) -> None:
    """One row per image: input | results | truth (empty where there is none)."""
    if not shown:
        return
    results = len(shown[0].results)
    with_truth = any(len(e.truth) for e in shown)
    rows = []
    for e in shown:
        blank = np.full_like(e.picture, 255)
        truth = [e.truth if len(e.truth) else blank] if with_truth else []
        rows.append(np.concatenate([e.picture, e.results, *truth]))
    headings = ["input", *(["result"] * results), *(["truth"] * with_truth)]
    save_grid(path, np.concatenate(rows), columns=len(headings), headings=headings)
