"""What is to be measured, as files of images: given as such, a folder of `cm sample`, or drawn from a model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.config.parsing import expanded
from cm.config.scripts import SampleConfig, config_hash
from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.inputs import listed

MOST = 1000  # images drawn of a model unless the protocol or --num_samples says otherwise


def is_model(path: str) -> bool:
    """Whether a local path is a run, a checkpoint or a file of weights."""
    place = Path(expanded(path))
    if place.is_dir():
        return (place / "checkpoints").is_dir() or bool(listed(place, "model*.pt"))
    return place.suffix in (".pt", ".pth")


def sample_files(path: str, count: int, seeds: int, flags: Sequence[str]) -> list[str]:
    """The files of images that a path stands for; of a model, one per seed, drawn as `cm sample` does. Collective.

    flags: of `cm sample`, such as --sampler.
    """
    place = Path(expanded(path))
    if not is_model(path):
        drawn = [str(file) for file in listed(place, "samples_*.npz")] if place.is_dir() else []
        return drawn or [path]
    given = parse(SampleConfig, ["--num_samples", str(count), *flags, "--model_path", path])
    home = Path(given.out_dir) if given.out_dir else place if place.is_dir() else place.parent
    files = []
    for seed in range(given.seed, given.seed + seeds):
        config = replace(given, seed=seed, overwrite=True)
        folder = home / "samples" / config_hash(config)
        run_image_sample(replace(config, out_dir=str(folder)))
        if not (found := listed(folder, f"samples_{config.num_samples}x*.npz")):
            raise UserError(f"{folder}: rank {distributed.get_rank()} does not see the samples")
        files.append(str(found[-1]))
    return files
