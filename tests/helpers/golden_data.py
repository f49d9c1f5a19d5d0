"""Access to the golden numbers: tests/golden/, or another set of the same keys that CM_GOLDEN_DIR names.

tests/golden/README.md says what each file holds and with which tolerance it must be met. Numbers of the later methods
(EDM2, sCM ...) are in tests/golden_later/, or in the folder that CM_GOLDEN_LATER_DIR names.
"""

import functools
import json as json_module
import os
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parents[1] / "golden"
LATER = Path(__file__).parents[1] / "golden_later"


def find(name: str, here: Path = HERE, variable: str = "CM_GOLDEN_DIR") -> Path:
    """Path of a golden file in the folder that the variable names, else in this clone."""
    folders = [Path(os.environ[variable])] if os.environ.get(variable) else []
    for folder in [*folders, here]:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"golden file {name} is not in {here}")


class GoldenFile:
    """One .npz of golden numbers: `g["key"]`, `g.config`, `g.state_dict("sd/")`."""

    def __init__(self, path: Path):
        self._arrays = np.load(path, allow_pickle=False)
        self.config = json_module.loads(str(self._arrays["config"]))

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self._arrays.files

    def keys(self, prefix: str = "") -> list[str]:
        """Array names that begin with `prefix`."""
        return [k for k in self._arrays.files if k.startswith(prefix)]

    def tensor(self, key: str) -> torch.Tensor:
        """One array as a tensor."""
        return torch.from_numpy(np.array(self._arrays[key]))

    def state_dict(self, prefix: str = "sd/") -> dict[str, torch.Tensor]:
        """All arrays under `prefix`, with the prefix removed."""
        return {k[len(prefix) :]: self.tensor(k) for k in self.keys(prefix)}


@functools.cache
def load(name: str) -> GoldenFile:
    """Golden arrays by name, with or without `.npz`."""
    return GoldenFile(find(name if name.endswith(".npz") else name + ".npz"))


@functools.cache
def later(name: str) -> GoldenFile:
    """Golden arrays of the later methods by name, with or without `.npz`."""
    name = name if name.endswith(".npz") else name + ".npz"
    return GoldenFile(find(name, LATER, "CM_GOLDEN_LATER_DIR"))


def json(name: str):
    """A golden JSON file by name, with or without `.json`."""
    return json_module.loads(find(name if name.endswith(".json") else name + ".json").read_text())
