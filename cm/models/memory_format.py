"""Torch's default memory format or channels-last: --channels_last, with `auto` decided by a measurement on a CPU.

Which one is faster depends on the processor (its vector width), on the network, and on whether there is a backward
pass. The answer of a measurement is kept for the machine, so that a second start computes in the same format.
"""

import hashlib
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cm.config.derived import channels_last, precision
from cm.config.scripts import Config
from cm.errors import UserError
from cm.models.factory import create_network, network_options
from cm.networks.architecture import Architecture
from cm.networks.precision import torso_dtype
from cm.runtime import distributed, logger
from cm.runtime.inputs import json_or_none
from cm.runtime.platform import processor
from cm.storage.filesystem import cache_folder, write_atomic

FILE = "memory_formats.json"
IMAGES = 4  # at most, of a measured pass
REPEATS = 2
FORMATS = {"default": torch.contiguous_format, "channels-last": torch.channels_last}

_decided: dict[str, bool] = {}


def memory_format(
    config: Config, device: torch.device, *, training: bool, images: int
) -> torch.memory_format:
    """The format of the networks. All ranks must call it.

    On a CPU `auto` is decided by timing the forward pass, in training with the backward pass, of at most IMAGES images;
    on a GPU, with --deterministic, and for networks so narrow that the default always wins, by a rule.
    """
    last = channels_last(config, device.type)
    if config.channels_last == "auto" and last and device.type == "cpu" and not config.deterministic:
        last = distributed.on_main(lambda: _measured(config, training, min(images, IMAGES)))
    return torch.channels_last if last else torch.preserve_format


def _measured(config: Config, training: bool, images: int) -> bool:
    """Whether channels-last is the faster one here; measured, unless this machine knows the answer."""
    facts = _facts(config, training, images)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    if key not in _decided:
        known = _read()
        if not isinstance(known.get(key), bool):
            seconds = measure(config, training=training, images=images)
            faster = seconds["channels-last"] < seconds["default"]
            what = "forward and backward" if training else "forward"
            logger.log(
                f"memory format: {'channels-last' if faster else 'default'} ({what} of {images} images: channels-last "
                f"{1e3 * seconds['channels-last']:.0f} ms, default {1e3 * seconds['default']:.0f} ms; --channels_last)"
            )
            known = _read() | {key: faster}
            _write(known)
        _decided[key] = known[key]
    return _decided[key]


def _facts(config: Config, training: bool, images: int) -> dict[str, Any]:
    """What the answer depends on: machine, version of torch, threads, and the network."""
    network = {
        name: getattr(config, name) for name in Architecture.__dataclass_fields__ if hasattr(config, name)
    }
    options = network_options(config)
    return {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": precision(config),
        "training": training,
        "images": images,
        **{name: str(value) for name, value in (network | options).items()},
    }


def measure(config: Config, *, training: bool, images: int) -> dict[str, float]:
    """Processor seconds per thread of one pass in each format, the fastest of a few in turns; leaves no trace."""
    channels = config.in_channels or 3
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(images, channels, config.image_size, config.image_size)
        runs = {}
        for name, layout in FORMATS.items():
            net = create_network(config, two_times=False).train(
                training
            )  # a second clock costs next to nothing
            if precision(config) != "fp32":
                net.convert_torso(torso_dtype(precision(config)))
            labelled = config.class_cond and "y" in inspect.signature(net.forward).parameters
            y = {"y": torch.zeros(images, dtype=torch.int64)} if labelled else {}
            runs[name] = _pass(net.to(memory_format=layout), x.contiguous(memory_format=layout), y, training)
        best = dict.fromkeys(runs, float("inf"))
        for k in range(1 + REPEATS):  # the first one warms up
            for name, run in runs.items():
                begin = time.process_time()
                run()
                if k:
                    best[name] = min(best[name], time.process_time() - begin)
    return {name: seconds / torch.get_num_threads() for name, seconds in best.items()}


def _pass(net: nn.Module, x: torch.Tensor, cond: dict, training: bool) -> Callable[[], None]:
    times = torch.linspace(0.1, 1.0, len(x))

    def run() -> None:
        with torch.set_grad_enabled(training):
            out = net(x, times, **cond)
        if training:
            net.zero_grad(set_to_none=True)
            out.square().mean().backward()

    return run


def _path() -> Path | None:
    try:
        return Path(cache_folder(), FILE)
    except UserError:  # no home folder
        return None


def _read() -> dict[str, Any]:
    """What this machine knows; nothing where there is no file, or a damaged one."""
    path = _path()
    return (json_or_none(path, limit=2**20) if path else None) or {}


def _write(known: dict[str, Any]) -> None:
    """Keep it for the next start, where that is possible."""
    path = _path()
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(known, indent=1).encode())
    except (OSError, UserError):
        logger.log(f"note: {path} cannot be written: the memory format is measured anew at every start")
