"""Barriers of ranks: the names of `torch.distributed.checkpoint._experimental.barriers`."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._experimental.barriers import Barrier, BarrierConfig

from pytest_dcp._engine.rank_files.barriers import (
    BARRIER_REGISTRY,
    DistBarrier,
    TCPStoreBarrier,
    create_barrier_from_config,
    register_barrier,
)
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "BARRIER_REGISTRY",
    "Barrier",
    "BarrierConfig",
    "DistBarrier",
    "TCPStoreBarrier",
    "create_barrier_from_config",
    "register_barrier",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
