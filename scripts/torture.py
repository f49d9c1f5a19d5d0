"""Kill training at random moments, many times, and compare the end with an undisturbed run, bit by bit.

python scripts/torture.py --kills 200
"""

import argparse
import tempfile

import _root  # noqa: F401


def main() -> None:
    """Print one line per finished run and the tally; a difference is an AssertionError."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the kills")
    options = parser.parse_args()
    from cm.tools.torture import Torture

    with tempfile.TemporaryDirectory() as folder:
        print(Torture(folder, seed=options.seed).run(options.kills))


if __name__ == "__main__":
    main()
