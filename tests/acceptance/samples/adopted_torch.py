"""Copied as test_torch.py: a suite as torch's own are, with none of our names."""

# ruff: noqa: PT009 - torch's suites assert in this way
from __future__ import annotations

import os
import sys
import time
import unittest

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.common_distributed import (
    MultiProcContinuousTest,
    MultiProcessTestCase,
    MultiThreadedTestCase,
    skip_if_lt_x_gpu,
)
from torch.testing._internal.common_fsdp import FSDPTest
from torch.testing._internal.common_utils import run_tests
from torch.testing._internal.distributed._shard.sharded_tensor import ShardedTensorTestBase
from torch.testing._internal.distributed._shard.sharded_tensor import with_comms as with_sharding
from torch.testing._internal.distributed._tensor.common_dtensor import DTensorTestBase, with_comms
from torch.testing._internal.distributed.checkpoint_utils import with_temp_dir


class TestRanks(MultiProcessTestCase):
    @property
    def world_size(self) -> int:
        return 2

    def setUp(self) -> None:
        super().setUp()
        os.environ["SET_BEFORE_SPAWN"] = self._testMethodName
        self._spawn_processes()

    def test_passes(self) -> None:
        store = dist.FileStore(self.file_name, self.world_size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        total = torch.ones(1)
        dist.all_reduce(total)
        self.assertEqual(total.item(), 2)
        self.assertEqual(os.environ["SET_BEFORE_SPAWN"], "test_passes")
        self.assertNotIn("RANK", os.environ)

    def test_last_rank_fails(self) -> None:
        names = ["a", "b"]
        if self.rank == 1:
            assert names == ["a", "c"]

    def test_last_rank_exits(self) -> None:
        if self.rank == 1:
            sys.exit(3)

    def test_last_rank_dies(self) -> None:
        if self.rank == 1:
            os._exit(7)

    def test_hangs(self) -> None:
        while self.rank == 0:
            time.sleep(0.1)

    def test_skips_itself(self) -> None:
        self.skipTest("no such feature here")

    @skip_if_lt_x_gpu(2)
    def test_needs_gpus(self) -> None:
        raise AssertionError("not to be run")

    def test_one_rank_skips(self) -> None:
        if self.rank == 0:
            self.skipTest("only here")

    @unittest.expectedFailure
    def test_expected_to_fail(self) -> None:
        raise ValueError("as expected")


class TestExpectsExitCodes(MultiProcessTestCase):
    world_size = 2

    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()

    def _join_processes(self, fn: object) -> None:
        self.special_return_code_checks = {fn: 9}
        super()._join_processes(fn)

    def test_ends_as_expected(self) -> None:
        if self.rank == 0:
            os._exit(9)

    def test_does_not_end_as_expected(self) -> None:
        pass


class TestTensors(DTensorTestBase):
    @property
    def world_size(self) -> int:
        return 2

    @with_comms
    @with_temp_dir
    def test_shards(self) -> None:
        mesh = self.build_device_mesh()
        tensor = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        self.assertEqual(tensor.full_tensor(), torch.arange(4.0))
        self.assertTrue(os.path.isdir(self.temp_dir))
        dist.barrier()


class TestSharded(ShardedTensorTestBase):
    @property
    def world_size(self) -> int:
        return 2

    @with_sharding(init_rpc=False, backend="gloo")
    def test_group(self) -> None:
        self.assertEqual(dist.get_world_size(), 2)


class TestFsdp(FSDPTest):
    @property
    def world_size(self) -> int:
        return 2

    def test_group(self) -> None:
        self.assertEqual(dist.get_rank(), self.rank)


class TestContinuous(MultiProcContinuousTest):
    world_size = 2

    @classmethod
    def backend_str(cls) -> str:
        return "gloo"

    @classmethod
    def device_type(cls) -> str:
        return "cpu"

    def test_a_passes(self) -> None:
        self._sum()

    def test_b_fails(self) -> None:
        self.assertEqual(self.rank, 0)

    def test_c_follows_a_failure(self) -> None:
        self._sum()

    def test_d_skips(self) -> None:
        self.skipTest("not now")

    def test_e_uses_the_group_of_the_last(self) -> None:
        self._sum()

    def _sum(self) -> None:
        total = torch.ones(1)
        dist.all_reduce(total)
        self.assertEqual(total.item(), 2)


class TestThreads(MultiThreadedTestCase):
    world_size = 2

    def setUp(self) -> None:
        super().setUp()
        self._spawn_threads()

    def test_threads(self) -> None:
        self.assertEqual(dist.get_world_size(), 2)


if __name__ == "__main__":
    run_tests()
