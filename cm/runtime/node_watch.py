"""Watches the ranks of one node: `python -m cm.runtime.node_watch RUN_DIR RANK...`, started by `cm.runtime.watchdog`.

Says in status.json which rank died first, when a launcher leaves no other rank alive to say it.
"""

import select
import signal
import sys

from cm.runtime import liveness


def main(run_dir: str, *ranks: str) -> None:
    """Wait for the first rank that ends without having said so, or for the last one."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # meant for the ranks
        signal.signal(number, signal.SIG_IGN)
    watched = liveness.watch_ends(beat for beat in liveness.read_beats(run_dir) if str(beat.rank) in ranks)
    while watched:
        ready, _, _ = select.select(list(watched), [], [])
        if any(liveness.record_death(run_dir, watched.pop(descriptor)) for descriptor in ready):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
