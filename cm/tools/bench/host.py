"""Host work of a training step: what a GPU would wait for if the step before it were done, by a network of no cost.

Processor time of the main thread; what other threads do overlaps with the device's work. Shares are of the steps that
an H200 is expected to take: CD of ImageNet-64 with 256 images, DDPM++ of CIFAR-10 with as many.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from cm.commands import train
from cm.diffusion.denoiser import Denoiser
from cm.models.factory import create_precond
from cm.objectives.base import Roles
from cm.runtime import logger
from cm.runtime.preemption import Stopper
from cm.runtime.watchdog import supervised
from cm.seeding import NoiseAhead, NoiseOf
from cm.tools.bench.runs import Options, train_config, write_images
from cm.tools.profiling.report import Row
from cm.training.ema import EmaBank
from cm.training.factory import create_objective

TENSORS = 640  # parameters of the ImageNet-64 network
BATCH = 256
EXPECTED_STEPS = {"imagenet64_cd": 1.0, "cifar10_ddpmpp": 0.18}  # seconds
CASES = (
    "noise_64px",
    "noise_32px",
    "noise_64px_ahead",
    "noise_32px_ahead",
    "data",
    "step",
    "averages",
    "log",
    "stop",
)
LOG_INTERVAL = 10


class FreeNetwork(nn.Module):
    """A few parameters of one element each; all get gradients."""

    def __init__(self, tensors: int = 8):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(tensors))

    def forward(self, x: Tensor, times: Tensor, **cond: Tensor) -> Tensor:
        return x * torch.cat(tuple(self.scales)).sum()


def bench_host(options: Options) -> list[Row]:
    """A row per kind of host work, of a batch of 256 images."""
    chosen = options.chosen(CASES)
    rows = [host_row(c, noise_work(c), options) for c in chosen if c.startswith("noise")]
    if of_loop := [c for c in chosen if not c.startswith("noise")]:
        with free_training(options) as works:
            rows += [host_row(c, works[c], options) for c in of_loop]
    return rows


def host_row(case: str, work: Callable[[], object], options: Options) -> Row:
    """Processor milliseconds of the main thread for one step's worth of work."""
    per_call = LOG_INTERVAL if case == "log" else 1
    for _ in range(options.warmup):
        work()
    seconds = []
    for _ in range(options.repeats):
        begin = time.thread_time()
        work()
        seconds.append((time.thread_time() - begin) / per_call)
    found = median(seconds)
    shares = {name: found / step for name, step in EXPECTED_STEPS.items()}
    return Row(f"host/{case}", {"batch": BATCH}, {"cpu_ms": round(1e3 * found, 4), "share_of_step": shares})


def noise_work(case: str) -> Callable[[], object]:
    """The draw of one step's noise, at once or in a thread while the step before runs."""
    side = 64 if "64px" in case else 32
    ahead, step = NoiseAhead(), -1

    def draw() -> Tensor:
        nonlocal step
        step += 1
        wanted = NoiseOf(0, 0, step, 0, BATCH, (3, side, side))
        return ahead.take(wanted, False) if case.endswith("ahead") else wanted.draw()

    return draw


@contextmanager
def free_training(options: Options) -> Iterator[dict[str, Callable[[], object]]]:
    """What the loop does in a step beside large draws of noise: data of 64 px, the step, averages, log, questions."""
    flags = ("--image_size", "8", "--batch_size", str(BATCH), "--log_interval", str(LOG_INTERVAL))
    config = train_config(Options("tiny", "cpu", flags=(*flags, *options.flags)), "cd")
    limits = {"startup_timeout": 3600.0, "step_timeout": 3600.0}
    with tempfile.TemporaryDirectory() as folder, supervised(folder, limits) as heartbeat:
        large = replace(config, image_size=64, data_dir=write_images(folder, replace(config, image_size=64)))
        stream = iter(train.open_stream(large, train.open_training_data(large), 0, "cpu"))
        logger.configure(folder, ["csv", "json", "log"])
        objective = create_objective(config)
        precond = create_precond(config, consistency=True)
        target = Denoiser(FreeNetwork(), precond) if objective.needs_target else None
        roles = Roles(Denoiser(FreeNetwork(), precond), target, Denoiser(FreeNetwork(), precond))
        trainer = train.build_trainer(config, objective, roles, train.create_saver(config, folder, ""))
        images = torch.rand(BATCH, 3, 8, 8)
        stopper = Stopper()
        many = list(FreeNetwork(TENSORS).parameters())
        bank = EmaBank(many, "0.9999")

        def log() -> None:
            trainer.meter.add("loss", torch.zeros(()))
            trainer.log_step()

        def ask() -> None:
            heartbeat.phase("data", trainer.state.step)
            heartbeat.phase("step", trainer.state.step)
            stopper.ask(trainer.saver.failed)
            stopper.answer()

        try:
            yield {
                "data": lambda: next(stream),
                "step": lambda: trainer.run_step(images, {}),
                "averages": lambda: bank.update(many, 0),
                "log": log,
                "stop": ask,
            }
        finally:
            trainer.saver.join()
            logger.reset()
