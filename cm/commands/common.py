"""What commands that write images share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.claims import claimed_place


@contextmanager
def claimed_output(
    directory: Path, files: Sequence[str], overwrite: bool, flag: str = "--out_dir", kept: Sequence[str] = ()
) -> Iterator[None]:
    """The folder of `files` for the length of a with block, which all ranks enter; rank 0 makes it and claims it.

    UserError on every rank where it cannot be written, holds one of the files already, or another program writes them.
    Of a block that fails nothing stays but what was there before. files: the last one tells what is written from other
    results in the folder, and is written last. flag: what names the folder. kept: what stays for the next start.
    """
    with ExitStack() as stack:
        distributed.on_main(lambda: _prepare(directory, files, overwrite, flag, kept, stack))
        yield


def _prepare(
    directory: Path, files: Sequence[str], overwrite: bool, flag: str, kept: Sequence[str], stack: ExitStack
) -> None:
    killed = stack.enter_context(claimed_place(directory / files[-1], flag, [*files, *kept]))
    found = [file for file in files if (directory / file).exists()]
    unfinished = killed and files[-1] not in found
    if found and not overwrite and not unfinished:
        raise UserError(f"{directory / found[0]} is already there: give --overwrite True or another {flag}")
    stack.push(_removing([directory / file for file in files if unfinished or file not in found]))


def _removing(files: Sequence[Path]) -> Callable[..., None]:
    """The end of a with block that removes these files where the block failed."""

    def end(kind: type | None, *_: object) -> None:
        for file in files if kind else ():
            with suppress(OSError):
                file.unlink(missing_ok=True)
                file.parent.rmdir()  # of a sub-folder; that of the claim is not empty

    return end
