"""The original's name for `cm.runtime.distributed` (ranks and collectives) and `cm.runtime.job` (an orderly end)."""

import os
from typing import Any

from cm.runtime.distributed import *  # noqa: F403
from cm.runtime.job import end_job, run_main  # noqa: F401
from cm.storage.weights import load_weights


def load_state_dict(path: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
    """Load a weights file, local or remote, without running code from it; keywords of `load_weights`.

    Each rank that calls it reads the file itself: no communication, so that one rank alone may call it.
    """
    return load_weights(path, **kwargs)[0]
