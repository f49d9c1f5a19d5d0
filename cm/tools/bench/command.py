"""Measure speed and memory on this machine, against peers where they are installed.

cm benchmark WHAT [--preset P|tiny] [--case NAME ...] [--device auto] [--out FILE.json] [FLAGS]
cm benchmark --compare BEFORE.json AFTER.json

WHAT: train, sample, edit, eval, data, checkpoint, startup, network, optimizer, precision, host. Flags that are not
listed here are passed on to the configuration that is measured, e.g. --precision bf16 --compile True --batch_size 64.
Under mpiexec or torchrun, train also measures communication.
"""

import argparse
import os
from contextlib import ExitStack

from cm.config.parsing import expanded
from cm.config.registry import resolve

# What to measure -> its rows; the evaluations stand above this package
SUITES = {
    **{name: f"cm.tools.bench.{name}:bench_{name}" for name in ("train", "sample")},
    "edit": "cm.tools.bench.sample:bench_edit",
    "eval": "evaluations.bench:bench_eval",
    **{name: f"cm.tools.bench.{name}:bench_{name}" for name in ("data", "checkpoint", "startup", "network")},
    **{name: f"cm.tools.bench.{name}:bench_{name}" for name in ("optimizer", "precision", "host")},
}


def main(args: argparse.Namespace, flags: list[str]) -> None:
    """Measure, print the table, write the file."""
    from cm.models.factory import choose_device
    from cm.runtime import distributed
    from cm.runtime.claims import claimed_place
    from cm.tools.bench.runs import Options
    from cm.tools.profiling import report

    if args.compare:
        print(report.compare(*args.compare))
        return
    distributed.setup_dist()
    options = Options(args.preset, args.device, tuple(args.case), args.warmup, args.repeats, tuple(flags))
    with ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(claimed_place(args.out, "--out")))
        rows = resolve(SUITES[args.what])(options)
        found = report.Report(rows, report.environment(choose_device(args.device)))
        if distributed.is_main():
            print(found.table())
            if args.out:
                found.save(args.out)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The program's own arguments, and the flags that are passed on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=SUITES)
    parser.add_argument("--compare", nargs=2, metavar="FILE", help="two files that --out wrote")
    parser.add_argument("--preset", default="tiny", help="what to measure; tiny: a network of seconds")
    parser.add_argument("--case", nargs="+", default=[], help="objectives, samplers or sizes; default: all")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--warmup", type=int, default=2, help="calls that do not count")
    parser.add_argument("--repeats", type=int, default=7, help="calls that count")
    parser.add_argument("--out", type=expanded, default="", help="JSON file to write")
    args, flags = parser.parse_known_args()
    if not (args.what or args.compare):
        parser.error("say what to measure, or --compare two files")
    if min(args.repeats, args.warmup + 1) < 1:
        parser.error("--repeats must be 1 or more, --warmup 0 or more")
    return args, flags


def program() -> None:
    """The whole program: --help and mistakes in flags need no torch."""
    arguments = parse()
    # torch's profiler, which counts memory, is silent: levels above all that it knows
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from cm.runtime.job import run_main

    run_main(lambda: main(*arguments))
