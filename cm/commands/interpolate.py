"""Interpolation as configured: frames between noises, as PNGs, a strip and an animation."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cm.commands.common import claimed_output
from cm.config.derived import run_dir
from cm.config.parsing import parse_classes
from cm.config.scripts import EditConfig, resolved
from cm.data.images import make_grid, save_grid, save_json, save_png, to_pil, to_uint8
from cm.errors import UserError
from cm.models.pretrained import Pretrained
from cm.runtime import distributed, logger
from cm.sampling.editing import edit_images, slerp
from cm.sampling.finite import FiniteWatch
from cm.sampling.noise import IndexedGenerator
from cm.storage.filesystem import open_file, write_atomic

# --animation -> (ending, Pillow's format)
ANIMATIONS = {
    "gif": (".gif", "GIF"),
    "apng": (".apng", "PNG"),
}


def run_interpolation(model: Pretrained[EditConfig], sigmas: Tensor) -> None:
    """Decode the frames between each noise of --between and the next; rank 0 alone."""
    c = model.config
    if float(sigmas[0]) != c.sigma_max:
        raise UserError("interpolate decodes noise: --ts must begin with 0, --sigmas with --sigma_max")
    label = the_label(c)
    shape = (c.in_channels or 3, c.image_size, c.image_size)
    corners = [corner_noise(text.strip(), shape) for text in c.between.split(",")]
    count = (len(corners) - 1) * (c.frames - 1) + 1
    directory, ending = Path(run_dir(c)), ANIMATIONS[c.animation][0]
    names = [f"frame_{i:03d}.png" for i in range(count)]
    animation = f"interpolation{ending}"
    with claimed_output(directory, [*names, animation, "grid.png", "edit.json"], c.overwrite):
        if not distributed.is_main():
            return
        frames = to_uint8(decode(model, path_between(corners, c.frames), sigmas, label)).numpy()
        for name, frame in zip(names, frames):
            save_png(directory / name, to_pil(frame))
        save_grid(directory / "grid.png", frames, columns=c.frames if len(corners) == 2 else c.frames - 1)
        save_animation(directory / animation, frames, c.animation, c.frame_ms)
        metadata = {**model.provenance(), "config": resolved(c), "sigmas": sigmas.tolist(), "frames": names}
        save_json(directory / "edit.json", metadata)
    logger.log(f"{count} frames in {directory}; animation: {directory / animation}")


def the_label(config: EditConfig) -> int:
    """The class of all frames; 0 for unconditional models."""
    if not config.class_cond:
        return 0
    if not config.classes:
        raise UserError(f"--classes is missing: {config.model_path} is class-conditional")
    classes = parse_classes(config.classes, config.num_classes, config.class_names)
    if len(classes) > 1:
        raise UserError(f"--classes must be one label with interpolate, got {config.classes}")
    return classes[0]


def corner_noise(text: str, shape: tuple[int, int, int]) -> Tensor:
    """Unit noise (C, H, W): of a seed (what image_sample draws for its sample 0), or from a .npy file."""
    if text.isdecimal():
        generator = IndexedGenerator(int(text))
        generator.set_rows([0])
        return generator.randn(1, *shape)[0]
    try:
        with open_file(text, "rb") as file:
            noise = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise UserError(f"--between {text}: neither a seed nor a .npy file of noise ({error})") from None
    if not isinstance(noise, np.ndarray):  # a zip of several
        raise UserError(f"--between {text}: neither a seed nor a .npy file of noise")
    if noise.shape != shape or not np.issubdtype(noise.dtype, np.floating) or not np.isfinite(noise).all():
        raise UserError(
            f"--between {text}: expected finite floats of shape {shape}, got {noise.dtype} {noise.shape}"
        )
    return torch.from_numpy(noise).float()


def path_between(corners: list[Tensor], frames: int) -> Tensor:
    """(N, C, H, W): `frames` spherical steps from each corner to the next, every corner once."""
    alpha = torch.linspace(0, 1, frames)
    legs = [
        slerp(a.expand(frames, *a.shape), b.expand(frames, *b.shape), alpha) for a, b in pairwise(corners)
    ]
    return torch.cat([*(leg[:-1] for leg in legs), legs[-1][-1:]])


def decode(model: Pretrained[EditConfig], noise: Tensor, sigmas: Tensor, label: int) -> Tensor:
    """Images (N, C, H, W) on the CPU; every frame gets the same fresh noise between evaluations."""
    c, images = model.config, []
    generator = IndexedGenerator(c.seed, "interpolate")
    for part in noise.split(c.batch_size):
        part = part.to(model.device)
        generator.set_rows([0] * len(part))
        watch, first = FiniteWatch(), sum(map(len, images))
        denoise = model.denoise(torch.full((len(part),), label), c.clip_denoised, watch.wrap)
        x = float(sigmas[0]) * part
        frames = edit_images(denoise, x, sigmas, generator, x=x, sigma_min=c.sigma_min)
        images.append(watch.check(frames, [f"frame {first + i}" for i in range(len(part))]).cpu())
    return torch.cat(images)


def save_animation(path: Path, frames: np.ndarray, kind: str, frame_ms: int) -> None:
    """Frames there and back again, enlarged so that they can be looked at."""
    pictures = [make_grid(frame[None], gap=0) for frame in [*frames, *frames[-2:0:-1]]]
    write_atomic(
        path,
        lambda file: pictures[0].save(
            file,
            format=ANIMATIONS[kind][1],
            save_all=True,
            append_images=pictures[1:],
            duration=frame_ms,
            loop=0,
        ),
    )
