"""Everything around a training run that is not training: signs of life, and a record of why it ended."""

import contextlib
import re
import time
from collections.abc import Iterator

from cm.errors import UserError
from cm.runtime import distributed, logger, status
from cm.runtime.liveness import describe_last_run, furthest_behind, read_beats
from cm.runtime.watchdog import Heartbeat
from cm.training.anomalies import BadNumbers

GRACE = 2.0
# What `distributed.run_main` exits with; any other exception: 1
EXIT_CODES = {UserError: 2, KeyboardInterrupt: 130}
_BROKEN_CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset)|socket", re.IGNORECASE)


@contextlib.contextmanager
def supervised(run_dir: str, limits: dict[str, float]) -> Iterator[Heartbeat]:
    """Heartbeats within the body; an exception that leaves it is recorded in status.json. All ranks enter it.

    limits: see `Heartbeat`. An error of communication is told with the rank that the others waited for.
    """
    if distributed.is_main():
        if last := describe_last_run(run_dir):
            logger.log(f"the latest start of this run: {last}")
        status.clear_status(run_dir)
    heartbeat = Heartbeat(run_dir, limits)
    try:
        with heartbeat:
            try:
                yield heartbeat
            except RuntimeError as error:
                _explain(error, run_dir)
                raise
    except BaseException as error:
        _record(error, run_dir)
        if isinstance(error, SystemExit) and distributed.get_world_size() > 1:
            # Ranks leave together, after this block: one that leaves within it leaves the others waiting.
            rank, code = distributed.get_rank(), error.code if isinstance(error.code, int) else 1
            distributed.end_job(code or 1, f"error: rank {rank} left training with exit code {code}\n")
        raise


def _explain(error: RuntimeError, run_dir: str) -> None:
    """Turn an error of communication into a UserError that names the rank that the others waited for."""
    if distributed.get_world_size() == 1 or not _BROKEN_CONNECTION.search(f"{type(error).__name__} {error}"):
        return
    # On the node of a dead rank the heartbeat knows more, and ends the job within this time.
    time.sleep(GRACE)
    behind = furthest_behind(read_beats(run_dir))
    cause = str(error).strip().splitlines()[0][:200]
    raise UserError(f"lost contact with the other ranks ({cause}); furthest behind is {behind}") from error


def _record(error: BaseException, run_dir: str) -> None:
    ended = status.BAD_NUMBERS if isinstance(error, BadNumbers) else status.ERROR
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    message = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    status.write_status(run_dir, ended, exit_code=code, message=message, rank=distributed.get_rank())
