"""An average of any length of a run that kept --ema_profiles, as a model file.

    python -m cm.tools.posthoc_ema runs/edm2 --sigma_rel 0.12 --step 100000 --out edm2-0.12.pt

Sampling does the same by itself: `--model_path runs/edm2 --weights posthoc:0.12`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cm.config.parsing import expanded
from cm.runtime.claims import claimed_place
from cm.runtime.files import writing
from cm.storage.posthoc import reconstruct
from cm.storage.weights import save_weights


def main(argv: Sequence[str] | None = None) -> None:
    """Reconstruct, write, and say in one line what the average is made of."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=expanded, help="run directory")
    parser.add_argument("--sigma_rel", type=float, required=True, help="relative length of the average")
    parser.add_argument("--step", type=int, default=0, help="step of the run (default: its last snapshot)")
    parser.add_argument(
        "--out", type=expanded, default="", help="model file to write (default: RUN/average_LENGTH_STEP.pt)"
    )
    flags = parser.parse_args(argv)
    with claimed_place(flags.out, "--out"):
        state, meta, used = reconstruct(flags.run, flags.sigma_rel, flags.step)
        out = flags.out or str(Path(flags.run, f"average_{flags.sigma_rel:g}_{used[-1][0].step:06d}.pt"))
        with writing(out):
            save_weights(out, state, {**(meta or {}), "ema_sigma_rel": flags.sigma_rel})
    print(f"{out}: {len(used)} snapshots of steps {used[0][0].step} to {used[-1][0].step}")


if __name__ == "__main__":
    from cm.runtime.job import run_main

    run_main(main)
