"""For `unittest` classes in a world: the fixtures of the world as attributes."""

from __future__ import annotations

import unittest
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


class WorldTestMixin:
    """Ports a class of tests from torch's `MultiProcessTestCase`, `DTensorTestBase` and their like.

    ```python
    pytestmark = pytest.mark.world_size(4)

    class TestRedistribute(WorldTestMixin, TestCase):  # was: (DTensorTestBase)
        @with_comms  # may stay
        def test_to_replicate(self):
            mesh = self.build_device_mesh()
    ```

    The marker starts the ranks and initialises the process group, so nothing does that in `setUp`.
    A `world_size` of the class's own must be that of the marker.
    """

    _request: pytest.FixtureRequest

    @pytest.fixture(autouse=True)
    def _enter_world(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        size = request.getfixturevalue("world_size")
        if self.world_size != size:
            pytest.fail(
                f"{type(self).__name__}.world_size is {self.world_size}, but the marker asks for "
                f"a world of {size}: give the marker that size, or take the attribute out",
                pytrace=False,
            )

    @property
    def rank(self) -> int:
        """This process's rank, 0 to world_size - 1."""
        rank: int = self._request.getfixturevalue("rank")
        return rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        size: int = self._request.getfixturevalue("world_size")
        return size

    @property
    def device(self) -> torch.device:
        """This rank's device: cpu, or the GPU leased to it."""
        device: torch.device = self._request.getfixturevalue("device")
        return device

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        return self.device.type

    @property
    def device_mesh(self) -> DeviceMesh:
        """A mesh over all ranks, of the marker's `mesh` shape; collective when it is first used."""
        mesh: DeviceMesh = self._request.getfixturevalue("device_mesh")
        return mesh

    def build_device_mesh(self) -> DeviceMesh:
        """`device_mesh`, under the name that it has in torch's DTensor tests."""
        return self.device_mesh

    def _handle_test_skip(self, reason: str) -> None:
        """torch's `skip_if_lt_x_gpu` calls this method, if it exists, instead of `sys.exit`."""
        raise unittest.SkipTest(reason)
