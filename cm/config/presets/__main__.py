"""`python -m cm.presets`: every preset with its scripts and its published results."""

from cm.config.presets import PRESETS


def main() -> None:
    """Print one line per preset."""
    for name, preset in PRESETS.items():
        results = "; ".join(f"FID {r.fid} with NFE {r.nfe} ({r.source})" for r in preset.results)
        print(f"{name:32}{', '.join(preset.scripts):44}{results}".rstrip())


if __name__ == "__main__":
    main()
