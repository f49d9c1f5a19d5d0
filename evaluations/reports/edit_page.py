"""One page of pictures: what a consistency model can do to images although it was not trained to edit them.

    python -m evaluations.reports.edit_page MODEL IMAGES PAGE.png

IMAGES: the truth, of the model's size, with labels if the model is class-conditional; best those it was not trained on.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from cm.commands.cli import parse_config
from cm.commands.edit import edit_all, noise_levels
from cm.commands.edit_inputs import Input, InputFiles
from cm.commands.interpolate import corner_noise, decode, path_between
from cm.config.rows import TASKS
from cm.config.scripts import EditConfig, changed
from cm.data.images import from_uint8, to_pil, to_uint8
from cm.models.pretrained import Pretrained, load_pretrained
from cm.runtime import job
from evaluations.reports.plots import Block, image_page

COLUMNS = 18  # tiles from side to side
RESULTS = 4
IMAGES = 25  # taken evenly from the set


def blocks(model: Pretrained[EditConfig], inputs: list[Input]) -> Iterator[Block]:
    """Every task with images of its own, colourisation for colour models only."""
    size, pool = model.config.image_size, cycle(inputs)
    few, many = COLUMNS // (RESULTS + 2), COLUMNS // 3
    factor = 8 if size >= 64 else 4

    def block(title: str, images: int = few, results: int = RESULTS, **flags) -> Block:
        return edit_block(model, title, list(islice(pool, images)), results, **flags)

    if model.config.in_channels == 3:
        yield block("colourisation: input | results | truth", task="colorize")
    yield block("in-painting, the grey square is generated: input | results | truth", mask="center:0.5")
    yield block("in-painting, the left half is generated: input | results | truth", mask="left")
    sides = f"{size // factor} x {size // factor} to {size} x {size} pixels"
    yield block(f"super-resolution, {sides}: input | results | truth", task="superres", factor=factor)
    yield block("denoising, noise level 0.5: input | result | truth", many, 1, task="denoise", sigma=0.5)
    paintings = [as_strokes(item) for item in islice(pool, few)]
    title = "stroke-guided, noise levels 1 and 0.3: input | results"
    yield edit_block(model, title, paintings, RESULTS + 1, task="stroke", sigmas="1.0,0.3")
    yield interpolation_block(model, next(pool).label)


def edit_block(
    model: Pretrained[EditConfig], title: str, inputs: list[Input], results: int, **flags
) -> Block:
    """One group per image: input | results | truth."""
    c = changed(model.config, num_results=results, **flags)
    edited = edit_all(replace(model, config=c), iter(inputs), TASKS.load(c.task)(c), noise_levels(c))
    return Block(title, [np.concatenate([e.picture, e.results, e.truth])[None] for e in edited])


def as_strokes(item: Input) -> Input:
    """A crude painting of an image (Meng et al. 2022): a median filter, then few colours."""
    from PIL import ImageFilter

    image = to_pil(to_uint8(item.image[None])[0])
    width = max(3, item.image.shape[-1] // 12 | 1)
    few = image.filter(ImageFilter.MedianFilter(width)).quantize(6).convert(image.mode)
    pixels = np.asarray(few).reshape(*few.size, -1)
    key = hashlib.sha256(pixels.tobytes()).hexdigest()
    return replace(item, image=from_uint8(pixels[None])[0], key=key, truth=False)


def interpolation_block(model: Pretrained[EditConfig], label: int) -> Block:
    """Frames on the spherical path through the noises of three seeds, all of one class."""
    c = changed(model.config, task="interpolate")
    shape = (c.in_channels or 3, c.image_size, c.image_size)
    noise = path_between([corner_noise(str(seed), shape) for seed in range(3)], COLUMNS // 2 + 1)
    images = decode(replace(model, config=c), noise, noise_levels(c), label)
    return Block("interpolation between three noises", [to_uint8(images).numpy()[None]])


def write_page(path: Path, model: Pretrained[EditConfig]) -> None:
    """The page of a model with images taken evenly from its --input."""
    source = InputFiles(model.config)
    count = len(source.names)
    inputs = list(source.load(range(0, count, max(1, count // IMAGES))))
    image_page(path, list(blocks(model, inputs)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="consistency model: file or run directory")
    parser.add_argument("images", help="images to edit: npz, folder, zip or prepared set")
    parser.add_argument("page", type=Path, help="PNG to write")
    args = parser.parse_args()
    flags = ["--model_path", args.model, "--input", args.images, "--batch_size", "64"]
    write_page(args.page, load_pretrained(parse_config(EditConfig, flags)))


if __name__ == "__main__":
    job.run_main(main)
