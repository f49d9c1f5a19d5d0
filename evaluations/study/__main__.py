"""Every method on one real data set, from one teacher, at equal images seen: trained, sampled, measured, written up.

    python -m evaluations.study fashion --budget 60

Goes on where it stopped: each start works for --budget minutes at most (the step at hand is finished), until nothing is
left, and writes what there is by then: a table in docs/study.md, pictures, docs/results/<study>.json.
"""

import argparse
import os
from pathlib import Path

import torch

from cm.config.parsing import at_least
from cm.errors import UserError
from cm.runtime import job
from evaluations.study.methods import STUDIES
from evaluations.study.report import write_report
from evaluations.study.runner import OutOfTime, Runner


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m evaluations.study", description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES, help="the data set")
    parser.add_argument("--budget", type=float, default=360.0, metavar="MINUTES", help="time of this start")
    parser.add_argument("--run", type=Path, help="folder of models, samples and results; empty: runs/<study>")
    parser.add_argument(
        "--data", default="", help="folder of the IDX files; empty: where Debian's package has them"
    )
    parser.add_argument("--samples", type=at_least(50), default=10_000, help="samples of each set and seed")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="seeds of each set")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="length of all trainings in units of the presets'"
    )
    parser.add_argument("--only", default="", help="methods, as a list; empty: all")
    parser.add_argument(
        "--docs", type=Path, default=Path("docs"), help="folder of study.md, results, pictures"
    )
    args = parser.parse_args()
    args.run = args.run or Path("runs", args.study)
    if args.scale <= 0 or args.budget < 0:
        raise UserError("--scale must be above 0, and --budget not below")
    study = STUDIES[args.study]
    if unknown := [n for n in args.only.split(",") if n and n not in study.methods]:
        raise UserError(f"--only {unknown[0]}: unknown; choose of {', '.join(study.methods)}")
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    runner = Runner(study, args)
    try:
        runner.everything()
        print("finished")
    except OutOfTime:
        print("out of time: the same command goes on")
    finally:
        write_report(args.study, study, args.run, args.docs)


if __name__ == "__main__":
    job.run_main(main)
