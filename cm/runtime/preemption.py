"""Preemption: an orderly end at a signal (Ctrl-C too) or a time limit; all ranks stop after the same step.

The first signal lets the step finish and a checkpoint be written; the second ends the process at once.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from cm.runtime import distributed
from cm.runtime.liveness import PREEMPTED, TIME
from cm.runtime.platform import STOP_SIGNALS, watch_end

# A launcher and its cluster may both pass on one signal: what comes within this time is not a second one (seconds).
ECHO = 1.0
SAVE_FAILED = "save failed"
# Why training should stop, or not at all; where ranks differ the later one counts.
REASONS = ("", TIME, PREEMPTED, SAVE_FAILED)


class StopSignals:
    """Listens to STOP_SIGNALS in a with block; `received` is the name of the first. What is ignored (nohup) stays so.

    A thread reads what the interpreter notes of signals, so that the second one works even while the main thread
    waits within a collective, where Python's own handlers do not run. Outside the main thread it does nothing.
    """

    def __init__(self, on_second: Callable[[int], object] | None = None):
        self.received = ""
        self._on_second = on_second or (lambda number: os._exit(128 + number))

    def __enter__(self) -> "StopSignals":
        self._handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._pid = os.getpid()
        self._old_pipe = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # A handler of Python's makes the interpreter note the signal; there is nothing else to do.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
        threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_) -> None:
        if self._handlers and os.getpid() == self._pid:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_pipe)
            self._writer.send(b"\0")  # ends the thread

    def _listen(self, reader: socket.socket) -> None:
        first = 0.0
        while number := reader.recv(1)[0]:
            if number in STOP_SIGNALS and not self.received:
                first, self.received = time.monotonic(), signal.Signals(number).name
                if number == signal.SIGINT and distributed.is_main():
                    sys.stderr.write("interrupted: saving after this step; once more ends at once\n")
            elif number in STOP_SIGNALS and time.monotonic() - first > ECHO:
                self._on_second(number)
        reader.close()
        self._writer.close()


def shield_worker(_worker_id: int = 0) -> None:
    """For the start of a data-loading process: leave signals to the training process.

    A cluster sends them to all processes of a job; a worker that died of one would break the step in progress.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def follow_parent() -> None:
    """For the start of a worker process: leave signals to the parent, and end when it is gone, whatever ended it."""
    shield_worker()
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="parent").start()


def _end_with(parent: int) -> None:
    if (descriptor := watch_end(parent)) is not None and os.getppid() == parent:
        select.select([descriptor], [], [])
    while os.getppid() == parent:  # systems that do not tell
        time.sleep(ECHO)
    os._exit(1)


class Stopper:
    """Decides, once a step, whether training goes on; without limits and signals it always does.

    `ask` before a step starts one small all-reduce that runs beside the step, `answer` after it reads the result: what
    one rank knows before a step ends all ranks after it.
    """

    def __init__(self, max_hours: float = 0.0, signals: StopSignals | None = None):
        self._deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self._signals = signals
        self._flag = torch.zeros(1, dtype=torch.int32)
        if "nccl" in distributed.backend_name() and "gloo" not in distributed.backend_name():
            self._flag = self._flag.to(distributed.dev())  # else through gloo: no GPU waits for it
        self._work: dist.Work | None = None

    def ask(self, save_failed: bool = False) -> None:
        """Tell the other ranks what this one knows."""
        reason = ""
        if time.monotonic() > self._deadline:
            reason = TIME
        if self._signals is not None and self._signals.received:
            reason = PREEMPTED
        if save_failed:
            reason = SAVE_FAILED
        self._flag.fill_(REASONS.index(reason))
        if distributed.get_world_size() > 1:
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> str:
        """The reason to stop that any rank gave, one of REASONS; empty to go on."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return REASONS[int(self._flag)]
