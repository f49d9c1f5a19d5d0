"""The small classifier under its first name, for published command lines: see evaluations.small_classifier."""

from cm.runtime import job
from evaluations.small_classifier import *  # noqa: F403
from evaluations.small_classifier import main

if __name__ == "__main__":
    job.run_main(main)
