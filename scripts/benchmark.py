"""Measure speed and memory on this machine (`cm benchmark`).

python scripts/benchmark.py WHAT [--preset P|tiny]
"""

import _root  # noqa: F401

from cm.tools.bench.command import program

if __name__ == "__main__":
    program()
