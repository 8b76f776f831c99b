"""Copied as test_ported.py: such classes when their bases were replaced, and nothing else."""

from __future__ import annotations

import unittest

import pytest
import torch
import torch.distributed as dist
from session_recorder import note
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.common_distributed import skip_if_lt_x_gpu
from torch.testing._internal.common_utils import TestCase
from torch.testing._internal.distributed._tensor.common_dtensor import DTensorTestMixin, with_comms

from pytest_dcp import WorldTestMixin

pytestmark = pytest.mark.world_size(2)


class TestTensors(WorldTestMixin, DTensorTestMixin, TestCase):  # was: DTensorTestBase
    @property
    def world_size(self) -> int:
        return 2

    def setUp(self) -> None:
        super().setUp()
        note("set up", rank=self.rank)

    @with_comms
    def test_tensor(self) -> None:
        mesh = self.build_device_mesh()
        tensor = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        self.assertEqual(tensor.full_tensor(), torch.ones(4))  # noqa: PT009 - torch's, for tensors
        assert (self.world_size, self.device_type) == (2, "cpu")
        assert self.rank == dist.get_rank()
        assert mesh is self.device_mesh

    @skip_if_lt_x_gpu(8)
    def test_needs_gpus(self) -> None:
        raise AssertionError("not to be run")

    def test_fails_in_a_rank(self) -> None:
        self.assertEqual(self.rank, 0)  # noqa: PT009 - torch's, with a text of its own


@pytest.mark.world_size(2, mesh=(1, 2), mesh_dim_names=("dp", "tp"))
class TestWithoutUnittest(WorldTestMixin):
    def test_mesh(self) -> None:
        assert self.device_mesh.mesh_dim_names == ("dp", "tp")
        assert self.device == torch.device("cpu")


class TestOfAnotherSize(WorldTestMixin, unittest.TestCase):
    world_size = 4

    def test_method(self) -> None:
        note("ran")
