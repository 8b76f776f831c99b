"""The controller's ends of a rank: what the rank wrote can be read, and made room for."""

from __future__ import annotations

import os

from pytest_dcp.harness.rank_end import RankEnd


def test_stacks_that_are_asked_for_again_replace_the_first() -> None:
    end = RankEnd()
    of_rank = os.dup(end.trace)  # shares the offset, as an inherited descriptor does
    try:
        os.write(of_rank, b"the first stacks, long ones")
        end.empty_trace()
        os.write(of_rank, b"the second")
        assert end.read(end.trace) == "the second"
    finally:
        os.close(of_rank)
        end.close()
