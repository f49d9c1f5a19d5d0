"""The paper's tables and figures beside what was measured here.

python scripts/paper_tables.py --results results --out docs/results
bash <(python scripts/paper_tables.py --figure 3c --size digits --commands True)
"""

import argparse
from pathlib import Path

import _root  # noqa: F401

SIZES = ("cifar10", "digits", "fashion")
TABLES = {"cifar10": 1, "imagenet64": 2, "lsun_bedroom256": 2, "lsun_cat256": 2}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default="", help="folder with result files of the evaluator")
    parser.add_argument(
        "--out", default="", help="folder for tables.md and pictures; empty: print the tables only"
    )
    parser.add_argument("--figure", default="", help="only this figure, e.g. 3c")
    parser.add_argument("--size", default=SIZES[0], choices=SIZES, help="size of the figures' runs")
    parser.add_argument("--preset", default="", help="with --commands: the table rows of this preset")
    parser.add_argument(
        "--commands", default="False", choices=("True", "False"), help="print what to type, and exit"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Print the tables or the commands; with --out write files too."""
    from evaluations.reports import figures, paper_tables
    from evaluations.reports.results import load_results

    if args.commands == "True":
        lines = figures.commands(args.figure, args.size) if args.figure else table_commands(args.preset)
        print("\n".join(lines))
        return
    measurements = load_results(args.results) if args.results else []
    out = Path(args.out) if args.out else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if not args.figure:
        tables = [paper_tables.table_markdown(table, data, measurements) for data, table in TABLES.items()]
        text = "\n".join([*tables, paper_tables.table3_markdown()])
        print(text)
        if out:
            (out / "tables.md").write_text(text, encoding="utf-8")
            for data, table in TABLES.items():
                paper_tables.plot_table(out / f"table{table}_{data}.png", table, data, measurements)
    for name in [args.figure] if args.figure else figures.FIGURES if out else []:
        path = (out or Path()) / f"figure{name}_{args.size}.png"
        missing = figures.draw_figure(path, name, args.size, measurements)
        print("\n".join([f"figure {name}: {path if path.exists() else 'nothing to draw'}", *missing]))


def table_commands(preset: str) -> list[str]:
    """The commands of every row of Tables 1 and 2, or of one preset's rows."""
    from evaluations.reports import paper_tables

    rows = [row for data, table in TABLES.items() for row in paper_tables.rows_of(table, data)]
    pairs = [(paper_tables.preset_of(row), row["nfe"]) for row in rows]
    chosen = [(name, nfe) for name, nfe in pairs if name and preset in ("", name)]
    return [
        line for name, nfe in chosen for line in [f"# {name}, NFE {nfe}", *paper_tables.commands(name, nfe)]
    ]


if __name__ == "__main__":
    arguments = parse()
    from cm.runtime.job import run_main

    run_main(lambda: main(arguments))
