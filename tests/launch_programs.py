"""Programs that test_launch starts with real launchers: python -m tests.launch_programs NAME."""

import sys
import time

import torch

from cm import dist_util
from cm.errors import UserError


def hello() -> None:
    dist_util.setup_dist(timeout=60)
    rank, world = dist_util.get_rank(), dist_util.get_world_size()
    total = dist_util.all_reduce_sum(torch.tensor([10.0**rank])).item()
    weights = torch.full((3,), float(rank))
    dist_util.sync_params([weights])
    places = dist_util.all_gather_object((rank, world, dist_util.get_local_rank(), total, weights.tolist()))
    if dist_util.is_main():
        print(places)


def wait_for_others() -> None:
    """Sit in a collective that the failing rank never reaches."""
    dist_util.all_reduce_sum(torch.zeros(1))
    time.sleep(60)


def crash_on_one() -> None:
    dist_util.setup_dist(timeout=60)
    if dist_util.get_rank() == 1:
        raise ArithmeticError("deliberate")
    wait_for_others()


def user_error_on_one() -> None:
    dist_util.setup_dist(timeout=60)
    if dist_util.get_rank() == 1:
        raise UserError("--data_dir of rank 1\nis empty")
    wait_for_others()


def user_error_on_all() -> None:
    dist_util.setup_dist(timeout=60)
    raise UserError("--data_dir is empty")


def user_error_before_setup() -> None:
    raise UserError("--data_dir is empty")


def exit_code_on_one() -> None:
    dist_util.setup_dist(timeout=60)
    if dist_util.get_rank() == 1:
        sys.exit(75)
    wait_for_others()


def exit_code_on_all() -> None:
    dist_util.setup_dist(timeout=60)
    time.sleep(1.5 * dist_util.get_rank())  # longer than a failing rank would be waited for
    print(f"rank {dist_util.get_rank()} has finished its work", flush=True)
    sys.exit(75)


def exit_code_on_one_that_others_survive() -> None:
    if dist_util.is_main():
        sys.exit(3)


if __name__ == "__main__":
    dist_util.run_main(globals()[sys.argv[1]])
