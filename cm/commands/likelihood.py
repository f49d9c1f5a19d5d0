"""Bits per dimension of a data set under a model, with an error bar: scripts/likelihood.py."""

import math
from pathlib import Path

import torch

from cm.commands.common import claimed_output
from cm.config.derived import run_dir
from cm.config.scripts import LikelihoodConfig, resolved
from cm.data import open_dataset
from cm.data.dataset import ImageData
from cm.data.images import save_json
from cm.errors import UserError
from cm.models.pretrained import Pretrained, load_pretrained
from cm.runtime import distributed, logger
from cm.sampling.finite import FiniteWatch
from cm.sampling.likelihood import bits_per_dim, dequantized, log_likelihood
from cm.sampling.noise import IndexedGenerator


def run_likelihood(config: LikelihoodConfig) -> dict[str, float]:
    """Mean bits/dim over --num_images images on all ranks; prints it and writes likelihood.json to --out_dir."""
    distributed.setup_dist(timeout=60 * config.startup_timeout)
    model = load_pretrained(config)
    c = model.config
    if c.training_mode != "edm":
        raise UserError(
            f"{model.file.path} was trained by {c.training_mode}; a likelihood needs a denoiser of all noise levels"
        )
    with claimed_output(Path(run_dir(config)), ["likelihood.json"], overwrite=True):
        return measure(model, open_images(c), Path(run_dir(config)))


def measure(model: Pretrained[LikelihoodConfig], dataset: ImageData, folder: Path) -> dict[str, float]:
    """The mean over all ranks; rank 0 writes it to `folder`."""
    c = model.config
    count = min(c.num_images, len(dataset)) if c.num_images else len(dataset)
    local = [row for start in batches(count, c.batch_size) for row in score_batch(model, dataset, start)]
    rows = sorted(row for part in distributed.all_gather_object(local) for row in part)
    values = torch.tensor([bits for _, bits, _ in rows], dtype=torch.float64)
    result = {
        "bits_per_dim": values.mean().item(),
        "standard_error": values.std().item() / math.sqrt(count) if count > 1 else math.nan,
        "images": count,
        "nfe": sum(nfe for *_, nfe in rows) / count,
    }
    if distributed.is_main():
        save_json(
            folder / "likelihood.json",
            {**result, **model.provenance(), "config": resolved(c), "data": dataset.fingerprint},
        )
        logger.log(
            f"bits/dim: {result['bits_per_dim']:.4f} +- {result['standard_error']:.4f} (standard error of the mean "
            f"over {count} images; {result['nfe']:.0f} evaluations each)"
        )
    return result


def open_images(config: LikelihoodConfig) -> ImageData:
    """The images of --data_dir as training crops them, without augmentation."""
    return open_dataset(
        config.data_dir,
        image_size=config.image_size,
        channels=config.in_channels,
        labels=config.labels,
        class_cond=config.class_cond,
        random_flip=False,
    )


def batches(count: int, size: int) -> list[range]:
    """This rank's images 0..count-1 in batches."""
    rows = distributed.local_rows(count)
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def score_batch(
    model: Pretrained[LikelihoodConfig], dataset: ImageData, indices: range
) -> list[tuple[int, float, int]]:
    """(index, bits/dim, evaluations) of each image; noise and probe are functions of (seed, index)."""
    c = model.config
    batch = dataset.batch(indices, [0] * len(indices))
    noise, probe = (IndexedGenerator(c.seed, purpose) for purpose in ("dequantise", "probe"))
    for generator in (noise, probe):
        generator.set_rows(indices)
    uniforms = torch.special.ndtr(noise.randn_like(batch.images))
    x0 = dequantized(batch.images, uniforms).to(model.device)
    watch = FiniteWatch()
    got = log_likelihood(
        model.denoise(batch.labels, clip=False, watch=watch.wrap, reads="denoiser"),
        x0,
        probe,
        sigma_min=c.sigma_min,
        sigma_max=c.sigma_max,
        probe=c.probe,
        tolerance=c.tolerance,
    )
    watch.check(got.log_prob[:, None], [f"image {i}" for i in indices])
    nfe, bits = got.nfe.tolist(), bits_per_dim(got.log_prob, x0[0].numel()).tolist()
    logger.log(f"images {indices.start}-{indices.stop - 1}: {min(nfe)} to {max(nfe)} evaluations")
    return list(zip(indices, bits, nfe, strict=True))
