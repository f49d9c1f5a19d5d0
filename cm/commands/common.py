"""What commands that write images share."""

from collections.abc import Iterable
from pathlib import Path

from cm.errors import UserError
from cm.runtime import distributed


def prepare_output(directory: Path, files: Iterable[str], overwrite: bool) -> None:
    """Make the folder on rank 0; UserError on every rank where it cannot be written or holds one of `files` already."""
    problem = None
    if distributed.is_main():
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out_dir {directory} cannot be written: {error.strerror}"
        found = [file for file in files if (directory / file).exists()]
        if found and not overwrite:
            problem = f"{directory / found[0]} is already there: give --overwrite True or another --out_dir"
    problem = distributed.broadcast_object(problem)
    if problem:
        raise UserError(problem)
