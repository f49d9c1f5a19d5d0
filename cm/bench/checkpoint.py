"""Checkpoints: how long the loop stands still for a save, the whole write, and the load; each beside a step."""

from cm.bench.measure import Timing, timed
from cm.bench.report import Row
from cm.bench.runs import Options, description, train_cases, train_config, training
from cm.checkpoint import complete_checkpoints


def bench_checkpoint(options: Options) -> list[Row]:
    """Rows for the stall of a background save, the write until it is complete on disk, and the load."""
    case = train_cases(options)[0]
    config = train_config(options, case)
    with training(config) as trainer:
        device = trainer.device
        timings = {name: Timing() for name in ("step", "stall", "write", "load")}
        for k in range(options.warmup + options.repeats):
            with timed(timings["step"], device):
                trainer.run_step(*next(trainer.data))
            with timed(timings["write"], device):
                with timed(timings["stall"], device):
                    trainer.save()
                trainer.saver.wait()
            path = complete_checkpoints(trainer.reporting.run_dir)[-1]
            with timed(timings["load"], device):
                trainer.load(path)
            if k == options.warmup - 1:
                timings = {name: Timing() for name in timings}
        size = sum(file.stat().st_size for file in path.iterdir())
    step = timings.pop("step")
    shared = {"step_ms": 1e3 * step.median, "bytes": size}
    return [
        Row(
            f"checkpoint/{name}",
            description(config),
            {**timing.summary(), **shared, "steps": timing.median / step.median},
        )
        for name, timing in timings.items()
    ]
