"""Settings for the whole suite: one thread per process, no network."""

import os

# Before torch is imported: several test processes on few cores spin against each other otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from cm.runtime import logger


@pytest.fixture(autouse=True)
def quiet():
    """Logs go to the screen again after each test."""
    yield
    logger.reset()
