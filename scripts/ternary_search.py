"""Search the time points of multistep sampling that minimise FID.

python scripts/ternary_search.py --model_path RUN_OR_FILE --ref_batch REFERENCE.npz
"""

import _root  # noqa: F401

from cm.commands.cli import run_script

if __name__ == "__main__":
    run_script("ternary_search", "evaluations.search:run_search")
