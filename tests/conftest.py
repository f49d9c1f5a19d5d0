"""Settings for the whole suite: one thread per process, no network, one seed for each test."""

import os
import signal
from pathlib import Path

# Before torch is imported: several test processes on few cores spin against each other otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from cm.runtime import logger

TESTS = Path(__file__).parent
# Started by nohup or in the background of a script, the programs under test would ignore them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# The longest files, longest first: with --dist loadfile one that begins late keeps its worker busy alone.
# fmt: off
LONG = (
    "faults/test_ranks.py", "test_learning.py", "training/test_sharding.py", "tools/test_planning.py",
    "training/test_compile.py", "faults/test_programs.py", "training/test_fsdp.py", "faults/test_damage.py",
    "commands/test_main.py", "training/test_train_ranks.py", "runtime/test_termination.py",
    "training/test_posthoc_ema.py", "tools/test_bench.py", "runtime/test_launch.py",
    "runtime/test_waiting.py", "training/test_fake_device.py", "faults/test_elastic.py",
    "faces/test_train_util.py", "tools/test_planning_command.py", "data/test_stream.py",
    "faults/test_kill.py",
)
# fmt: on


def pytest_collection_modifyitems(config, items):
    """In the processes of pytest-xdist, the long files come first."""
    if hasattr(config, "workerinput"):
        places = {TESTS / name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Numbers do not depend on which tests ran before in the process, fixtures included."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet():
    """Logs go to the screen again after each test."""
    yield
    logger.reset()
