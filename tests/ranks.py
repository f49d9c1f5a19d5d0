"""What the ranks of test_dist_util, test_launch and test_logger do."""

import torch
import torch.distributed as dist

from cm import dist_util


def place() -> tuple:
    """Rank, size, local rank and the sum of all ranks."""
    total = dist_util.all_reduce_sum(torch.tensor([float(dist_util.get_rank())])).item()
    return dist_util.get_rank(), dist_util.get_world_size(), dist_util.get_local_rank(), total


def fail_on_one(rank: int) -> None:
    if dist_util.get_rank() == rank:
        raise ArithmeticError("deliberate")
    dist.barrier()
