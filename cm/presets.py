"""`python -m cm.presets` lists every preset; the data are in `cm.config.presets`."""

from cm.config.presets import PRESETS, get, values
from cm.config.presets.__main__ import main

__all__ = ["PRESETS", "get", "values"]

if __name__ == "__main__":
    main()
