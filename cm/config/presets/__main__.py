"""`python -m cm.presets`: every preset with its scripts and its published results."""

from cm.config.presets import PRESETS

COLUMNS = ("preset", "scripts", "published results")


def main() -> None:
    """Print a table of three columns."""
    rows = [COLUMNS]
    for name, preset in PRESETS.items():
        results = "; ".join(f"FID {r.fid} with NFE {r.nfe} ({r.source})" for r in preset.results)
        rows.append((name, ", ".join(preset.scripts), results))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for name, scripts, results in rows:
        print(f"{name:{widths[0]}}  {scripts:{widths[1]}}  {results}".rstrip())


if __name__ == "__main__":
    main()
