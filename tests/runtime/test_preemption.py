"""Signals and time limits end training in good order, on all ranks after the same step."""

import os
import signal
import threading
import time

import pytest
import torch

from cm.runtime import distributed
from cm.runtime.liveness import PREEMPTED, TIME, process_birth
from cm.runtime.preemption import ECHO, SAVE_FAILED, Stopper, StopSignals, shield_worker
from tests.helpers.mp import run_ranks


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def decide(stopper, **known):
    stopper.ask(**known)
    return stopper.answer()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_after_the_step(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        stopper = Stopper(signals=signals)
        assert decide(stopper) == ""
        os.kill(os.getpid(), number)
        eventually(lambda: signals.received)
        assert signals.received == number.name and decide(stopper) == PREEMPTED
    assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == -1


def test_the_second_signal_ends_the_process_but_an_echo_does_not(monkeypatch):
    seconds = []
    clock = [100.0]
    monkeypatch.setattr("cm.runtime.preemption.time.monotonic", lambda: clock[0])
    with StopSignals(on_second=seconds.append) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        while not signals.received:
            time.sleep(0.005)
        clock[0] += 0.5 * ECHO
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert seconds == []
        clock[0] += ECHO
        os.kill(os.getpid(), signal.SIGUSR1)
        while not seconds:
            time.sleep(0.005)
    assert seconds == [signal.SIGUSR1]


def test_the_second_signal_works_while_the_main_thread_is_held_up():
    """As in a collective that never ends: C code that waits, where Python's own handlers do not run."""
    if (child := os.fork()) == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.received:
                time.sleep(0.005)
            time.sleep(ECHO + 0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            lock = threading.Lock()
            with lock:
                lock.acquire()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_what_is_ignored_stays_ignored():
    """nohup: closing the terminal must not end the run."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.05)
        assert not signals.received
    signal.signal(signal.SIGHUP, old)


def test_other_signals_are_none_of_its_business():
    old = signal.signal(signal.SIGUSR2, lambda *_: None)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
        assert not signals.received
    signal.signal(signal.SIGUSR2, old)


def test_the_time_limit(monkeypatch):
    stopper = Stopper(max_hours=1)
    assert decide(stopper) == ""
    now = time.monotonic()
    monkeypatch.setattr("cm.runtime.preemption.time.monotonic", lambda: now + 3500)
    assert decide(stopper) == ""
    monkeypatch.setattr("cm.runtime.preemption.time.monotonic", lambda: now + 3601)
    assert decide(stopper) == TIME
    assert decide(Stopper()) == "" and decide(Stopper(), save_failed=True) == SAVE_FAILED


class Slow(torch.utils.data.Dataset):
    def __getitem__(self, index):
        time.sleep(0.05)
        return index, os.getpid()

    def __len__(self):
        return 1000


def test_data_workers_survive_a_signal_to_all_processes_of_a_job():
    with StopSignals() as signals:
        loader = iter(
            torch.utils.data.DataLoader(
                Slow(), batch_size=None, num_workers=1, worker_init_fn=shield_worker, prefetch_factor=2
            )
        )
        _, worker = next(loader)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
        for expected in range(1, 6):
            assert next(loader)[0] == expected
        # The worker's signals are its own: they do not count here.
        assert not signals.received
        del loader
    eventually(lambda: process_birth(worker) == 0)


def steps_done(rank_that_knows: int, at_step: int, world_work: bool) -> tuple[int, str]:
    """Number of steps and the reason, where one rank hears of a reason before a step."""
    stopper, step = Stopper(), 0
    while True:
        if distributed.get_rank() == rank_that_knows and step == at_step:
            stopper._deadline = 0.0
        stopper.ask(save_failed=distributed.is_main() and rank_that_knows == 0 and step == at_step)
        if world_work:
            distributed.all_reduce_sum(torch.ones(1000))  # as the step's own collectives
        reason = stopper.answer()
        step += 1
        if reason:
            return step, reason


def test_all_ranks_stop_after_the_same_step():
    assert run_ranks("tests.runtime.test_preemption:steps_done", 4, 2, 3, True) == [(4, TIME)] * 4
    assert run_ranks("tests.runtime.test_preemption:steps_done", 2, 0, 5, False) == [(6, SAVE_FAILED)] * 2
