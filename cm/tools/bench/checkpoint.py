"""Checkpoints: how long the loop stands still for a save, the write, the load; each beside a step."""

from cm.errors import UserError
from cm.runtime.distributed import get_world_size
from cm.storage.checkpoint import complete_checkpoints
from cm.tools.bench.runs import Options, description, train_cases, train_config, training
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing, timed

ROWS = ("stall", "write", "load", "step_while_writing")


def bench_checkpoint(options: Options) -> list[Row]:
    """Rows for the stall of a save, the write until it is complete on disk, the load, and the step after a save.

    `steps` is each as a multiple of an undisturbed step: what saving costs the loop is the stall, and what the step
    that runs beside the write takes longer.
    """
    if get_world_size() > 1:
        raise UserError("benchmark checkpoint: start it as one process; ranks have no folder in common here")
    case = train_cases(options)[0]
    config = train_config(options, case)
    with training(config) as trainer:
        device = trainer.device

        def step() -> None:
            trainer.run_step(*next(trainer.data))

        timings = {name: Timing() for name in ("step", *ROWS)}
        for k in range(options.warmup + options.repeats):
            with timed(timings["step"], device):
                step()
            with timed(timings["write"], device):
                with timed(timings["stall"], device):
                    trainer.save()
                trainer.saver.wait()
            path = complete_checkpoints(trainer.saver.run_dir)[-1]
            with timed(timings["load"], device):
                trainer.load(path)
            trainer.save()
            with timed(timings["step_while_writing"], device):
                step()
            trainer.saver.wait()
            if k == options.warmup - 1:
                timings = {name: Timing() for name in timings}
        size = sum(file.stat().st_size for file in path.iterdir())
    whole = timings.pop("step")
    background = {"async_save": config.async_save}
    return [
        Row(
            f"checkpoint/{name}",
            description(config) | background,
            {
                **timing.summary(),
                "step_ms": 1e3 * whole.median,
                "bytes": size,
                "steps": timing.median / whole.median,
            },
        )
        for name, timing in timings.items()
    ]
