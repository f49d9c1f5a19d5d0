"""Inception weights by the rule of tests/golden/README.md, and files that hold them in the layouts in circulation."""

import functools
from pathlib import Path

import numpy as np
import torch

from evaluations.inception_v3 import InceptionV3
from evaluations.inception_weights import pytorch_fid_names
from tests.helpers import golden_data


@functools.cache
def rule_state() -> dict[str, torch.Tensor]:
    """The golden weights: a random state per entry of the layout."""
    state = {}
    for i, (name, shape) in enumerate(golden_data.json("inception_layout")["state_dict"]):
        r = np.random.RandomState(i)
        if name == "output.bias":
            value = 0.05 * r.standard_normal(shape)
        elif name.endswith("weight"):
            value = r.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("var"):
            value = 1 + 0.1 * r.uniform(size=shape)
        else:
            value = 0.05 * r.standard_normal(shape)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


@functools.cache
def rule_network(channels_last: bool = False) -> InceptionV3:
    """The network with these weights."""
    net = InceptionV3(channels_last)
    net.load_state_dict(rule_state())
    return net


def write_openai(path: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A flat dictionary under our names."""
    torch.save(dict(state or rule_state()), path)
    return path


def pytorch_fid_state() -> dict[str, torch.Tensor]:
    """The same tensors under pytorch-fid's names, with the unit scales and counters that its file has."""
    state = {theirs: rule_state()[ours] for theirs, ours in pytorch_fid_names().items()}
    for name in [n for n in state if n.endswith("running_var")]:
        state[name.replace("running_var", "weight")] = torch.ones_like(state[name])
        state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return state
