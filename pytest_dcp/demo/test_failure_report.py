"""The failure report of a test in which one rank fails. The tour prints it at its end."""

import pytest
import torch
import torch.distributed as dist


@pytest.mark.world_size(4)
@pytest.mark.xfail(strict=True, reason="its report is shown at the end")
def test_one_rank_raises_while_the_others_wait_for_it(rank):
    gradient = torch.full((2,), float(rank))
    if rank == 1:
        raise ValueError("the loss is nan")
    dist.all_reduce(gradient)
