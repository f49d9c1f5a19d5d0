"""Noise of a batch by each generator, for a small and a large number of samples in the run."""

import torch

from cm.sampling.noise import get_generator
from cm.tools.bench.runs import Options
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing, timed

SHAPE = (16, 3, 64, 64)
COUNTS = (1_000, 1_000_000)
KINDS = ("determ", "indexed", "determ-indiv")


def noise_rows(options: Options) -> list[Row]:
    """A row per generator and --num_samples: two draws, as of two steps, for 16 samples from about the 500th on.

    On the CPU. Every call begins at another sample, so that none finds what an earlier one has prepared.
    """
    timings = {(kind, count): Timing() for kind in KINDS for count in COUNTS}
    for k in range(-1, options.repeats):
        for (kind, count), timing in timings.items():
            generator = get_generator(kind, num_samples=count, seed=0)
            generator.set_done_samples(COUNTS[0] // 2 + len(COUNTS) * k + COUNTS.index(count))
            with timed(timing if k >= 0 else Timing(), torch.device("cpu")):
                generator.randn(*SHAPE)
                generator.randn(*SHAPE)
    smallest = {kind: timings[kind, COUNTS[0]].cpu_median for kind in KINDS}
    return [
        Row(
            f"noise/{kind}_{count}",
            {"shape": list(SHAPE), "generator": kind, "num_samples": count},
            {
                **timing.summary(),
                "images_per_second": SHAPE[0] / timing.median,
                "ratio_to_fewest": timing.cpu_median / smallest[kind],
            },
        )
        for (kind, count), timing in timings.items()
    ]
