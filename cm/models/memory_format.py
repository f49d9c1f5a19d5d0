"""Torch's default memory format or channels-last: --channels_last, with `auto` decided by a measurement.

Which one is faster depends on the device (a CPU's vector width; a GPU's convolutions against the copies around its
group norm), on the network, and on whether there is a backward pass. The answer of a measurement is kept for the
machine, so that a second start computes in the same format.
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

from cm.config.choices import PRECISIONS
from cm.config.derived import channels_last, precision
from cm.config.scripts import Config
from cm.errors import UserError
from cm.models.factory import create_network, network_options
from cm.networks.architecture import Architecture
from cm.runtime import distributed, logger
from cm.runtime.inputs import json_or_none
from cm.runtime.platform import processor
from cm.storage.filesystem import cache_folder, write_atomic

FILE = "memory_formats.json"
# Of a measured pass, at most. On a CPU torch takes other kernels from 16 images on than for fewer.
IMAGES = {"cpu": 16, "cuda": 32}
FEW, SECONDS = 4, 2.5  # so many images where a pass of all would take longer than that
REPEATS = 2
FORMATS = {"default": torch.contiguous_format, "channels-last": torch.channels_last}

_decided: dict[str, bool] = {}


def memory_format(
    config: Config, device: torch.device, *, training: bool, images: int
) -> torch.memory_format:
    """The format of the networks. All ranks must call it.

    `auto` is decided by timing the forward pass, in training with the backward pass, of at most IMAGES images; with
    --deterministic, for networks of which the default always wins, and where a GPU compiles, by a rule.
    """
    last = channels_last(config, device.type)
    if config.channels_last == "auto" and last and not config.deterministic and _measurable(config, device):
        count = min(images, IMAGES[device.type])
        last = distributed.on_main(lambda: _measured(config, device, training, count))
    return torch.channels_last if last else torch.preserve_format


def _measurable(config: Config, device: torch.device) -> bool:
    """Compiled kernels have other times on a GPU; a device without values has none."""
    if device.type == "cuda":
        return torch.cuda.is_available() and not getattr(config, "compile", False)
    return device.type == "cpu"


def _measured(config: Config, device: torch.device, training: bool, images: int) -> bool:
    """Whether channels-last is the faster one here; measured, unless this machine knows the answer."""
    facts = _facts(config, device, training, images)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    if key not in _decided:
        known = _read()
        if not isinstance(known.get(key), bool):
            seconds = measure(config, device, training=training, images=images)
            faster = seconds["channels-last"] < seconds["default"]
            what = "forward and backward" if training else "forward"
            logger.log(
                f"memory format: {'channels-last' if faster else 'default'} ({what} of up to {images} images: "
                f"channels-last {1e3 * seconds['channels-last']:.0f} ms, default {1e3 * seconds['default']:.0f} ms; "
                "--channels_last)"
            )
            known = _read() | {key: faster}
            _write(known)
        _decided[key] = known[key]
    return _decided[key]


def _facts(config: Config, device: torch.device, training: bool, images: int) -> dict[str, Any]:
    """What the answer depends on: device, version of torch, threads, and the network."""
    network = {
        name: getattr(config, name) for name in Architecture.__dataclass_fields__ if hasattr(config, name)
    }
    options = network_options(config)
    machine = {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        machine = {"processor": torch.cuda.get_device_name(device)}
    return {
        **machine,
        "torch": torch.__version__,
        "precision": precision(config),
        "training": training,
        "images": images,
        **{name: str(value) for name, value in (network | options).items()},
    }


def measure(config: Config, device: torch.device, *, training: bool, images: int) -> dict[str, float]:
    """Seconds of one pass in each format, the fastest of a few in turns; leaves no trace.

    images: of a pass, or FEW, where the network is too slow for them. On a CPU processor seconds per thread, which
    other programs disturb less.
    """
    channels = config.in_channels or 3
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(images, channels, config.image_size, config.image_size).to(device)
        nets = {}
        for name, layout in FORMATS.items():
            net = create_network(config, two_times=False).train(
                training
            )  # a second clock costs next to nothing
            if precision(config) != "fp32":
                net.convert_torso(PRECISIONS.load(precision(config)))
            nets[name] = net.to(device, memory_format=layout)
        labelled = config.class_cond and "y" in inspect.signature(net.forward).parameters

        def passes(count: int) -> dict[str, Callable[[], None]]:
            y = {"y": torch.zeros(count, dtype=torch.int64, device=device)} if labelled else {}
            cut = {name: x[:count].contiguous(memory_format=layout) for name, layout in FORMATS.items()}
            return {name: _pass(net, cut[name], y, training) for name, net in nets.items()}

        few = min(images, FEW)
        for _ in range(2):  # the first one warms up
            begin = _clock(device)
            passes(few)["default"]()
            taken = _clock(device) - begin
        runs = passes(images if taken * images / few < SECONDS else few)
        best = dict.fromkeys(runs, float("inf"))
        for k in range(1 + REPEATS):  # the first one warms up
            for name, run in runs.items():
                begin = _clock(device)
                run()
                if k:
                    best[name] = min(best[name], _clock(device) - begin)
    return best


def _clock(device: torch.device) -> float:
    """Seconds; on a GPU when all that was asked of it is done."""
    if device.type == "cpu":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _pass(net: nn.Module, x: torch.Tensor, cond: dict, training: bool) -> Callable[[], None]:
    times = torch.linspace(0.1, 1.0, len(x), device=x.device)

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
