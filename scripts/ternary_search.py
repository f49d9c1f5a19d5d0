"""Search the time points of multistep sampling that minimise FID.

python scripts/ternary_search.py --model_path RUN_OR_FILE --ref_batch REFERENCE.npz
"""

import _root  # noqa: F401

from cm.commands.cli import run_script
from cm.config.scripts import SearchConfig
from cm.errors import UserError


def search(config: SearchConfig) -> None:
    """torch is imported here, after --help has been answered."""
    try:
        from evaluations.search import run_search
    except ModuleNotFoundError as error:
        if error.name not in ("evaluations", "evaluations.search"):
            raise
        raise UserError("the search needs the package evaluations, which is not installed") from None
    run_search(config)


if __name__ == "__main__":
    run_script(SearchConfig, search)
