"""`python -m cm.doctor` checks an installation; see `cm.tools.doctor`."""

from cm.runtime.job import run_main
from cm.tools.doctor import main

if __name__ == "__main__":
    run_main(main)
