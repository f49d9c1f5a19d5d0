"""Memory per GPU, time, GPU-hours and cost of a run, before it is started (`cm plan`).

python scripts/plan.py PRESET [PRESET ...] --gpus 8xH200
"""

import _root  # noqa: F401

from cm.tools.planning.command import program

if __name__ == "__main__":
    program()
