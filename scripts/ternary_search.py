"""Search the time points of multistep sampling that minimise FID.

python scripts/ternary_search.py --model_path RUN_OR_FILE --ref_batch REFERENCE.npz
"""

import _root  # noqa: F401

from cm.cli import run_script
from cm.config import SearchConfig


def search(config: SearchConfig) -> None:
    """torch is imported here, after --help has been answered."""
    from evaluations.search_app import run_search

    run_search(config)


if __name__ == "__main__":
    run_script(SearchConfig, search)
