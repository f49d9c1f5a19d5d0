"""Programs that test_launch starts with real launchers: python -m tests.helpers.launch_programs NAME."""

import atexit
import os
import sys
import time

import torch

from cm.errors import UserError
from cm.runtime import distributed, job


def hello() -> None:
    distributed.setup_dist(timeout=60)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    total = distributed.all_reduce_sum(torch.tensor([10.0**rank])).item()
    weights = torch.full((3,), float(rank))
    distributed.sync_params([weights])
    places = distributed.all_gather_object(
        (rank, world, distributed.get_local_rank(), total, weights.tolist())
    )
    if distributed.is_main():
        print(places)


def wait_for_others() -> None:
    """Sit in a collective that the failing rank never reaches."""
    distributed.all_reduce_sum(torch.zeros(1))
    time.sleep(60)


def crash_on_one() -> None:
    distributed.setup_dist(timeout=60)
    if distributed.get_rank() == 1:
        raise ArithmeticError("deliberate")
    wait_for_others()


def user_error_on_one() -> None:
    distributed.setup_dist(timeout=60)
    if distributed.get_rank() == 1:
        raise UserError("--data_dir of rank 1\nis empty")
    wait_for_others()


def user_error_on_all() -> None:
    distributed.setup_dist(timeout=60)
    raise UserError("--data_dir is empty")


def user_error_before_setup() -> None:
    raise UserError("--data_dir is empty")


def exit_code_on_one() -> None:
    distributed.setup_dist(timeout=60)
    if distributed.get_rank() == 1:
        sys.exit(75)
    wait_for_others()


def exit_code_on_all() -> None:
    distributed.setup_dist(timeout=60)
    time.sleep(1.5 * distributed.get_rank())  # longer than a failing rank would be waited for
    print(f"rank {distributed.get_rank()} has finished its work", flush=True)
    sys.exit(75)


def exit_code_on_one_that_others_survive() -> None:
    if distributed.is_main():
        sys.exit(3)


class AbortsTeardown:
    """What a thread of C++ may do that meets the teardown of the interpreter."""

    def __del__(self, abort=os.abort):
        abort()


def finished_before_a_teardown_that_aborts() -> None:
    distributed.setup_dist(timeout=60)
    sys.modules[__name__].kept = AbortsTeardown()
    atexit.register(print, f"rank {distributed.get_rank()} says good bye")


if __name__ == "__main__":
    job.run_main(globals()[sys.argv[1]])
