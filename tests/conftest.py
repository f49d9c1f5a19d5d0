"""Settings for the whole suite: one thread per process, no network, one seed for each test."""

import os
import signal

# Before torch is imported: several test processes on few cores spin against each other otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from cm.runtime import logger

# Started by nohup or in the background of a script, the programs under test would ignore them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Numbers do not depend on which tests ran before in the process, fixtures included."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet():
    """Logs go to the screen again after each test."""
    yield
    logger.reset()
