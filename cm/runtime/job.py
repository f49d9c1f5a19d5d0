"""The orderly end of a job: one report of an error, one exit code, and no rank that waits for ever."""

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from cm.errors import UserError, masked, one_line
from cm.runtime import distributed, launch, platform
from cm.runtime.streams import lasting_streams, screen

# How long ranks wait for each other to start (seconds): interpreters and imports on a slow file system.
JOIN_TIMEOUT = 600.0
# How long a failing rank waits for the others to fail too before it ends the job (seconds). A rank that
# leaves by sys.exit(code) did so on purpose, so the others may still have something to write.
ERROR_GRACE, EXIT_GRACE = 1.0, 60.0
POLL_INTERVAL = 0.02
# How much longer a failing rank waits for a store that does not answer (seconds).
UNANSWERED = 5.0
# What a machine answers that lacks rights, room or a working disk, wherever it is met: no bug, and no traceback.
_NAMES = (
    "EACCES",
    "EPERM",
    "EROFS",
    "ENOSPC",
    "EDQUOT",
    "EFBIG",
    "EIO",
    "ESTALE",
    "ELOOP",
    "ENAMETOOLONG",
    "EMFILE",
)
OF_THE_MACHINE = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}


def run_main(main: Callable[[], object]) -> None:
    """Run a program's main function and end the whole job in an orderly way, whatever happens. All ranks call it.

    - UserError: the line `error: ...`, once for the job, and exit code 2;
    - SystemExit: its code is kept;
    - any other exception on any rank: one traceback, exit code 1, and all ranks end even when they wait for each other.

    SIGTERM and SIGHUP end a program as Ctrl-C does, with exit code 128 + their number: it cleans up behind itself.
    A terminal or pipe that goes away ends nothing: what is printed from then on is lost.
    """
    with lasting_streams(), _signals_as_exceptions():
        _run_main(main)
        if distributed.store() is not None:
            _leave_finished()


class Terminated(KeyboardInterrupt):
    """A signal asks the program to end; its argument is the number."""


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """In the body, SIGTERM and SIGHUP raise Terminated, if nobody else listens to them or ignores them (nohup)."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    process = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() != process:  # a child that was forked: it has nothing to clean up
            os._exit(128 + number)
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # launchers repeat it, which must not break off the cleaning
        raise Terminated(number)

    def lost(unraisable: Any) -> None:
        """Python drops exceptions in destructors, and with one of these the signal: it comes again."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            shown(unraisable)
            return
        number = next(iter(unraisable.exc_value.args), signal.SIGINT)
        if number in numbers:
            signal.signal(number, end)
        again = threading.Timer(POLL_INTERVAL, os.kill, (process, number))
        again.daemon = True
        again.start()

    shown, sys.unraisablehook = sys.unraisablehook, lost
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        sys.unraisablehook = shown
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run_main(main: Callable[[], object]) -> None:
    try:
        # Before anything can fail: an error must be able to reach the other ranks.
        distributed.join(JOIN_TIMEOUT)
        main()
        distributed.cleanup()
    except BaseException as error:
        code, text = _verdict(error)
        if distributed.store() is None:
            # One process; or no way to reach the others, for a reason that all ranks of a node share.
            if launch.reports():
                _write_error(text)
            raise SystemExit(code) from None
        if code != 0:
            _end_job(code, text, patient=isinstance(error, SystemExit))
        distributed.cleanup()
    if distributed.store() is not None:
        with contextlib.suppress(RuntimeError, OSError):
            distributed.store().add("cm/ended", 1)
        if _keeps_store():
            _all_ended(EXIT_GRACE)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code of the job, and what is to be printed once."""
    error = lost_worker(error) or signal_behind(error) or error
    if isinstance(error, UserError):
        return 2, f"error: {one_line(str(error))}\n"
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        where = f": {error.filename}" if error.filename is not None else ""
        return 2, f"error: {one_line(f'{error.strerror}{where}')}\n"
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, ""
        return 1, f"{error.code}\n"
    if isinstance(error, Terminated):
        return 128 + error.args[0], f"ended by {signal.Signals(error.args[0]).name}\n"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted\n"
    place = distributed.current_launch()
    where = f"rank {place.rank} of {place.world_size} failed:\n" if place.world_size > 1 else ""
    return 1, where + "".join(traceback.format_exception(error))


def signal_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The signal that another error was raised from: Python wraps one that meets a class being made, as imports do."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause


def lost_worker(error: BaseException) -> UserError | None:
    """What to say when a data worker has ended, which torch reports wherever the main thread is; None otherwise."""
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
        return None
    return worker_ended(str(error).splitlines()[0])


def worker_ended(sign: str) -> UserError:
    """What to say of a data worker that has ended. sign: by what it shows."""
    return UserError(
        f"a data worker has ended: killed, or no room for its batch ({platform.describe_shared_memory()}); "
        f"--num_workers 0 needs none ({sign})"
    )


def _end_job(code: int, text: str, patient: bool) -> NoReturn:
    """Report an exception once for all ranks, then end them all with the same code.

    The ranks agree through the job's key-value store: a collective would hang where the others are busy. The first
    rank that reports an error prints it: what other ranks meet later mostly follows from it.
    """
    grace = EXIT_GRACE if patient else ERROR_GRACE
    told = threading.Event()
    # The store lives in a rank, which may be the one that is stuck.
    guard = threading.Timer(grace + UNANSWERED, _leave, (code, text, told))
    guard.daemon = True
    guard.start()
    try:
        first = distributed.store().add("cm/failed", 1) == 1
        told.set()
        if first:
            _write_error(text)
            distributed.store().set("cm/code", str(code))
        else:
            code = int(distributed.store().get("cm/code"))
            grace += 2.0  # the first rank is the one to end the job
        distributed.store().add("cm/ended", 1)
    except (RuntimeError, OSError):  # rank 0, which keeps the store, is gone
        told.set()
        _write_error(text)
    if patient:
        distributed.cleanup()
    if _all_ended(grace):
        guard.cancel()
        raise SystemExit(code) from None
    _leave(code, text, told)


def _leave_finished() -> NoReturn:
    """End a rank that has done its work, without the interpreter's teardown.

    Threads of torch's process group outlive the group, and one that meets the teardown aborts the process: a job that
    had finished would fail.
    """
    atexit._run_exitfuncs()
    launch.finalize_mpi()
    for stream in (sys.stdout, sys.stderr):
        screen(stream).flush()
    os._exit(0)


def _leave(code: int, text: str, told: threading.Event) -> NoReturn:
    """End this process whatever its threads wait for; prints the text unless some rank has."""
    if not told.is_set():
        _write_error(text)
    screen(sys.stdout).flush()
    if distributed.current_launch().kind == "mpi":
        launch.abort_mpi(code)
    # Not sys.exit: the interpreter would wait for threads that wait for the other ranks. The launcher ends those.
    os._exit(code)


def end_job(code: int, text: str) -> NoReturn:
    """End this process and with it the whole job at once, printing `text` if no rank has reported an error yet.

    From any thread, whatever the main thread does: for a rank that sees that the job cannot go on.
    """
    if distributed.store() is None:
        _write_error(text)
    else:
        with contextlib.suppress(SystemExit):
            _end_job(code, text, patient=False)
    os._exit(code)


def _all_ended(grace: float) -> bool:
    """Wait at most `grace` seconds until every rank has finished or failed."""
    deadline = time.monotonic() + grace
    try:
        while distributed.store().add("cm/ended", 0) < distributed.current_launch().world_size:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_INTERVAL)
        if _keeps_store():
            time.sleep(5 * POLL_INTERVAL)  # until the others have asked for the last time
    except (RuntimeError, OSError):
        # The rank that keeps the store has gone, which it does only when all have ended or the job is lost.
        return False
    return True


def _keeps_store() -> bool:
    """Whether the store ends with this process. Under torchrun another process has it; MPI ends all ranks together."""
    return distributed.current_launch().kind == "slurm" and distributed.current_launch().rank == 0


def _write_error(text: str) -> None:
    screen(sys.stdout).flush()
    stream = screen(sys.stderr)
    stream.write(masked(text))
    stream.flush()
