"""Memory per GPU, time, GPU-hours and cost of a training run, or of sampling, before it is started.

cm plan PRESET [PRESET ...]                                  on this machine
cm plan PRESET [PRESET ...] --gpus 8xH200 [--price 2.5] [--json FILE] [FLAGS]
cm plan PRESET --gpus 8xH200 --images 50000 [FLAGS]
cm plan PRESET --gpus 8xH100 --measured REPORT.json

PRESET comes first; in its place may stand a file as for --config, a run, or auto: cm plan auto --data_dir DATA. Flags
that are not listed here are passed on to the configuration: --use_checkpoint True --microbatch 32 --precision bf16.
docs/planning.md says what is counted and what is assumed.
"""

import argparse

from cm.config.parsing import expanded


def main(args: argparse.Namespace, flags: list[str]) -> None:
    """Plan and print."""
    import json

    from cm.runtime.claims import claimed_place
    from cm.runtime.files import whole_file, writing
    from cm.tools.planning import report, run

    with claimed_place(args.json, "--json"):
        gpus = args.gpus or run.this_machine()
        cluster, measured = (
            run.read_measured(args.measured, gpus) if args.measured else (run.cluster_of(gpus), None)
        )
        slowdown = measured.slowdown if measured else 1.0
        if args.images:
            plans = [run.plan_images(name, cluster, args.images, flags, slowdown) for name in args.presets]
        else:
            plans = [run.plan_training(name, cluster, flags, slowdown) for name in args.presets]
        print(report.text(plans, measured, args.price))
        if args.json:
            text = json.dumps(report.document(plans, measured, args.price), indent=1) + "\n"
            with writing(args.json), whole_file(args.json) as file:
                file.write(text.encode())


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The program's own arguments, and the flags that are passed on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "presets",
        nargs="+",
        metavar="PRESET",
        help="cm presets lists all; or FILE.json, FILE.yaml, a run",
    )
    parser.add_argument("--gpus", default="", help="number and kind, as 8xH200 or 1xCPU; empty: this machine")
    parser.add_argument(
        "--images", type=int, default=0, help="plan sampling of so many images instead of training"
    )
    parser.add_argument(
        "--measured", type=expanded, default="", help="report of cm benchmark train on such a GPU"
    )
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU-hour, for the cost")
    parser.add_argument("--json", type=expanded, default="", help="file to write all numbers to")
    args, flags = parser.parse_known_args()
    if min(args.images, args.price) < 0:
        parser.error("--images and --price must not be negative")
    return args, flags


def program() -> None:
    """The whole program: --help and mistakes in flags need no torch."""
    arguments = parse()
    from cm.runtime.job import run_main

    run_main(lambda: main(*arguments))
