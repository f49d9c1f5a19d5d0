"""What an update of the weights costs, alone and within whole training steps, and what a fused kernel would save."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cm.models.factory import choose_device, create_network
from cm.runtime.cpu import keep_freed_memory
from cm.tools.bench.network import SIZES
from cm.tools.bench.runs import Options, description, sample_config, train_config, training
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing, beside_peers, interleaved, timed
from cm.training.optimizers import make_optimizer

SIZE = "64px"  # of the whole steps, as in the benchmark of networks
UPDATES = {"30m": SIZE, "300m": "imagenet64_edm"}  # case -> size or preset of the weights alone
STEPS = ("edm", "cd")  # objectives of the whole steps
MAKERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "cm": lambda params: make_optimizer("radam", params, lr=1e-6),
    "radam_loop": lambda params: torch.optim.RAdam(params, lr=1e-6, foreach=False),
    "adam_fused": lambda params: torch.optim.Adam(params, lr=1e-6, fused=True),
}


def bench_optimizer(options: Options) -> list[Row]:
    """A row per number of weights for the update alone, and one per objective for a whole step at 64 px."""
    chosen = options.chosen((*UPDATES, *STEPS))
    return [update_row(c, options) if c in UPDATES else step_row(c, options) for c in chosen]


def update_row(case: str, options: Options) -> Row:
    """Updates of a network's weights by every optimizer in turn."""
    size = UPDATES[case]
    of_size = Options(flags=size_flags()) if size == SIZE else Options(preset=size)
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    params = list(create_network(sample_config(of_size)).to(device).parameters())
    runs = {name: optimizer.step for name, optimizer in optimizers(params).items()}
    timings = interleaved(runs, device, warmup=options.warmup, repeats=options.repeats)
    config = {"parameters": sum(p.numel() for p in params), "tensors": len(params)}
    return Row(f"optimizer/{case}/update", config, beside_peers(timings))


def step_row(case: str, options: Options) -> Row:
    """Steps of the training loop by every optimizer in turn: times of the step, and of the update within it."""
    config = train_config(Options("tiny", options.device, flags=(*size_flags(), *options.flags)), case)
    with training(config) as trainer:
        device = trainer.device
        contestants = optimizers(trainer.state.student.master_params)
        updates = {name: Timing() for name in contestants}

        def step(name: str) -> None:
            trainer.state.optimizer = contestants[name]
            trainer.run_step(*next(trainer.data))

        for name, optimizer in contestants.items():
            optimizer.step = clocked(optimizer.step, updates[name], device)
        runs = {name: lambda name=name: step(name) for name in contestants}
        timings = interleaved(runs, device, warmup=options.warmup, repeats=options.repeats)
    updates = {
        n: Timing(t.seconds[options.warmup :], t.cpu_seconds[options.warmup :]) for n, t in updates.items()
    }
    # From the updates within the steps: the rest of a step is the same for all and varies by more than they differ.
    saved = (updates["cm"].cpu_median - updates["adam_fused"].cpu_median) / timings["cm"].cpu_median
    parameters = sum(p.numel() for p in trainer.state.student.master_params)
    found = {**beside_peers(timings), "update": beside_peers(updates), "fused_would_save": saved}
    return Row(f"optimizer/{case}/step", {"parameters": parameters, **description(config)}, found)


def optimizers(params: list[Tensor]) -> dict[str, torch.optim.Optimizer]:
    """The contestants, beyond the first steps of RAdam, which are cheaper."""
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    found = {name: make(params) for name, make in MAKERS.items()}
    for optimizer in found.values():
        for _ in range(6):
            optimizer.step()
    return found


def clocked(step: Callable[[], Any], timing: Timing, device: torch.device) -> Callable[[], None]:
    """The step, timed."""

    def run() -> None:
        with timed(timing, device):
            step()

    return run


def size_flags() -> tuple[str, ...]:
    """Flags of the network and the batch of the whole steps."""
    batch, flags = SIZES[SIZE]
    return tuple(word for k, v in {**flags, "batch_size": batch}.items() for word in (f"--{k}", str(v)))
