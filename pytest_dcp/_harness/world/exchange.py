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
    present: Mapping[int, Exchange], size: int, excused: Collection[int], absent: Mapping[int, str]
) -> Met | None:
    """The answer for the `present` ranks; None while others may still come.

    `excused` ranks are not waited for, but take part if they are there; `absent` maps ranks that
    should have come, and will not, to the reason.
    """
    if not present:
        return None
    # Checked before waiting for ranks that may still come: if one is gone for good, waiting is
    # useless.
    if error := _error(present, absent):
        return Met(error=error)
    if any(rank not in present and rank not in excused for rank in range(size)):
        return None
    payloads = [present[rank].payload for rank in sorted(present)]
    if (total := sum(map(len, payloads))) > MAX_MEETING_BYTES:
        return Met(
            error=f"the ranks' values have {total} bytes together, more than {MAX_MEETING_BYTES}"
        )
    sizes = tuple(
        len(present[rank].payload) if rank in present else NOT_THERE for rank in range(size)
    )
    return Met(sizes=sizes, payload=b"".join(payloads))


def _error(present: Mapping[int, Exchange], absent: Mapping[int, str]) -> str:
    operations = ", ".join(f"rank {rank}: {present[rank].operation}" for rank in sorted(present))
    if len({exchange.operation for exchange in present.values()}) > 1:
        return f"ranks asked the world for different things ({operations})"
    if absent:
        reasons = ", ".join(f"rank {rank} ({how})" for rank, how in absent.items())
        return f"the world's exchange cannot complete ({operations}): {reasons} will not come"
    return ""
