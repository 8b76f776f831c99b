"""One rank's view of a fake world: torch's FakeProcessGroup in place of a group of real ranks."""

from __future__ import annotations

import torch.distributed as dist

from pytest_dcp._torch_internals.fake_groups import FakeStore


def join_fake_world(rank: int, size: int) -> None:
    """Make this process a rank of a world whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
