"""Pickles as EDM's classes write them, and networks to put into them."""

import sys

import numpy as np
from torch import nn

from tests.helpers.convert_models import flags


def song(network_name: str = "ncsnpp", **given) -> dict:
    """Flags of a narrow SongUNet."""
    options = dict(
        network=network_name,
        image_size=8,
        num_channels=16,
        channel_mult="1,2",
        num_res_blocks=1,
        attention_resolutions="4",
        training_mode="edm",
        time_scale=0.0,
    )
    return flags(**{**options, **given})


class Persistent:
    """Pickles as EDM's classes do: a call that would execute the source text inside."""

    def __init__(self, name: str, state: dict):
        self.name, self.state = name, state

    def __reduce__(self):
        meta = sys.modules["dnnlib.util"].EasyDict(
            type="class", version=6, module_src="raise SystemExit", class_name=self.name, state=self.state
        )
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def persistent(module: nn.Module, name: str = "", **state) -> Persistent:
    """A module of torch as EDM holds it in a pickle; containers stay torch's own."""

    def wrap(child: nn.Module):
        if isinstance(child, nn.ModuleDict):
            copy = nn.ModuleDict()
            copy._modules.update({n: wrap(c) for n, c in child._modules.items()})
            return copy
        return persistent(child)

    modules = {n: wrap(c) for n, c in module._modules.items()}
    own = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers), "_modules": modules}
    # EDM keeps its constants as numpy's scalars.
    constants = {"skip_scale": np.sqrt(0.5), "_init_kwargs": {"init": {"init_weight": np.sqrt(0.2)}}}
    return Persistent(name or type(module).__name__, {**own, "training": False, **constants, **state})


def snapshot(module: nn.Module, precond: str = "EDMPrecond", **state) -> dict:
    """What network-snapshot-*.pkl holds."""
    holder = nn.Module()
    holder.model = module
    ema = persistent(
        holder, precond, **{"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5, **state}
    )
    return {
        "ema": ema,
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}),
        "augment_pipe": None,
        "dataset_kwargs": {},
    }
