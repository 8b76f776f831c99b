"""Decides when ranks meet at an exchange, and what answer they get. Pure (no I/O).

Enters: which ranks wait, which may still come and which never will. Leaves: one `Met` for all
waiting ranks, or None. A meeting does not wait for ranks that were lost or stopped because the test
asked for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pytest_dcp._harness.protocol.messages import MAX_FRAME_BYTES, NOT_THERE, Exchange, Met

MAX_MEETING_BYTES = MAX_FRAME_BYTES // 2
"""The largest size of one exchange, so that the answer fits a frame."""


def answer(
    there: Mapping[int, Exchange], size: int, excused: Collection[int], left: Mapping[int, str]
) -> Met | None:
    """The answer for the ranks that are `there`; None while others may still come.

    `excused` ranks are not waited for, but take part if they are there; `left` maps the ranks that
    should have come, and will not, to the reason.
    """
    if not there:
        return None
    # Checked before waiting for ranks that may still come: if one is gone for good, waiting is
    # useless.
    if error := _error(there, left):
        return Met(error=error)
    if any(rank not in there and rank not in excused for rank in range(size)):
        return None
    payloads = [there[rank].payload for rank in sorted(there)]
    if (total := sum(map(len, payloads))) > MAX_MEETING_BYTES:
        return Met(
            error=f"the ranks' values have {total} bytes together, more than {MAX_MEETING_BYTES}"
        )
    sizes = tuple(len(there[rank].payload) if rank in there else NOT_THERE for rank in range(size))
    return Met(sizes=sizes, payload=b"".join(payloads))


def _error(there: Mapping[int, Exchange], left: Mapping[int, str]) -> str:
    asked = ", ".join(f"rank {rank}: {there[rank].operation}" for rank in sorted(there))
    if len({exchange.operation for exchange in there.values()}) > 1:
        return f"ranks asked the world for different things ({asked})"
    if left:
        gone = ", ".join(f"rank {rank} ({how})" for rank, how in left.items())
        return f"the world's exchange cannot complete ({asked}): {gone} will not come"
    return ""
