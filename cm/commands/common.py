"""What commands that write images share."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.claims import Claim


@contextmanager
def claimed_output(
    directory: Path, files: Sequence[str], overwrite: bool, flag: str = "--out_dir"
) -> Iterator[None]:
    """The folder of `files` for the length of a with block, which all ranks enter; rank 0 makes it and claims it.

    UserError on every rank where it cannot be written, holds one of the files already, or another program writes them.
    files: the last one tells what is written from other results in the folder. flag: what names the folder.
    """
    with ExitStack() as stack:
        distributed.on_main(lambda: _prepare(directory, files, overwrite, flag, stack))
        yield


def _prepare(directory: Path, files: Sequence[str], overwrite: bool, flag: str, stack: ExitStack) -> None:
    try:
        missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be written: {error.strerror}") from None
    stack.callback(_remove_empty, missing)
    stack.enter_context(Claim(directory / files[-1]))
    found = [file for file in files if (directory / file).exists()]
    if found and not overwrite:
        raise UserError(f"{directory / found[0]} is already there: give --overwrite True or another {flag}")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of the folders, the innermost first, in which nothing came to lie."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
