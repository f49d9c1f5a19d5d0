"""Parts of a GPU report that end in every possible way, for the test of what runs them."""

import os
import time

from cm.tools.bench.gpu.parts import Part
from cm.tools.profiling.report import Row


def _quick(setup):
    yield Row("quick/a", {}, {"median_ms": 2.0})
    yield Row("quick/b", {}, {"pid": os.getpid(), "seconds": setup.seconds})


def _hangs(setup):
    yield Row("hangs/first", {}, {"value": 1})
    time.sleep(60)


def _fails(setup):
    yield Row("fails/first", {}, {"value": 1})
    raise ValueError("no such kernel")


def _dies(setup):
    os._exit(3)
    yield


PARTS = {
    "quick": Part("Quick", 8, _quick),
    "hangs": Part("Hangs", 8, _hangs),
    "fails": Part("Fails", 8, _fails),
    "dies": Part("Dies", 8, _dies),
    "lacks": Part("Lacks", 8, _quick, ("no_such_package",)),
    "again": Part("Again", 8, _quick),
}
