"""What a rank's fixtures say where an outer launcher has placed the ranks on several nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_dcp._harness.protocol.launcher import OuterPlace
from pytest_dcp._harness.rank.this_rank import Rank, current
from pytest_dcp.errors import WorldError


@pytest.fixture
def placed_rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """This rank, as if its node did not see rank 0's folder."""
    rank = current()
    assert rank is not None
    place = OuterPlace(local_rank=5, local_size=8, node=1, master_addr="h", shares_folder=False)
    monkeypatch.setattr(rank, "order", replace(rank.order, place=place))
    return rank


@pytest.mark.world_size(1)
def test_local_rank_is_that_of_the_node(
    placed_rank: Rank, request: pytest.FixtureRequest, rank: int
) -> None:
    assert request.getfixturevalue("local_rank") == 5
    assert rank == 0


@pytest.mark.world_size(1)
def test_checkpoint_dir_is_refused_where_a_node_does_not_see_it(
    placed_rank: Rank, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(WorldError, match="give --basetemp a folder on a shared file system"):
        request.getfixturevalue("checkpoint_dir")
    with pytest.raises(WorldError, match="not all nodes see"):
        request.getfixturevalue("faulty_storage")
