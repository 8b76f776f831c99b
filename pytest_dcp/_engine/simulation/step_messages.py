"""The messages of a simulated save, in bytes, as they would go through the sockets. Pure (no I/O).

A save has two steps (`verbs.save`). In each, every rank but the coordinator sends one VALUE frame
and gets one RESULT frame. Their bytes are those of `coordinate.frame.encode` on `coordinate.wire`'s
segments. A message's size depends on names, numbers of rows and digits, not on the numbers in its
arrays, so ranks that agree in those have messages of one size, and one of them is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.distributed.checkpoint.planner import SavePlan

from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, Head, Mode, encode
from pytest_dcp._engine.coordinate.wire import pack
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.write_results import WriteColumns
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.replica_comparison import Checks
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.verbs.plan_exchange import (
    DIGEST_BYTES,
    KnownPlan,
    NewPlan,
    PlanAnswer,
    RepeatedPlan,
)
from pytest_dcp._engine.verbs.plan_memory import ANSWER_BYTES, UNNAMED
from pytest_dcp._engine.verbs.save_messages import (
    CompressedPlan,
    EncodedMetadata,
    change_metadata,
    encode_metadata,
)

PLAN, WRITE = Head(1, Mode.REDUCE_SCATTER, "plan"), Head(2, Mode.ALL_REDUCE, "write")
COORDINATOR = 0
NO_DIGEST = bytes(DIGEST_BYTES)
FIRST_FILES, LATER_FILES = f"-{'0' * 12}.", "-3f9a61c07be2."
"""In the names of two saves' files."""


@dataclass(frozen=True, slots=True, eq=False)
class StepMessages:
    """The messages of one step of a save; the coordinator sends itself none."""

    step: str
    """`plan` or `write`."""
    to_coordinator: Ints
    """(ranks,) bytes that each rank sends."""
    from_coordinator: Ints
    """(ranks,) bytes that each rank is sent."""

    @property
    def coordinator_bytes(self) -> int:
        """Bytes that go through the coordinator's network connection."""
        return int(self.to_coordinator.sum() + self.from_coordinator.sum())

    @property
    def largest_bytes(self) -> int:
        """The longest message."""
        return int(max(self.to_coordinator.max(), self.from_coordinator.max()))


def plan_messages(
    plans: Sequence[SavePlan],
    compressed: Sequence[CompressedPlan | SavePlan],
    checks: Sequence[Checks | None],
    lookalikes: Sequence[object],
    planner: DefaultSavePlanner,
) -> StepMessages:
    """The messages of the first step: local plans, and what each rank is to write and compare."""
    offers = ((key, _new(plan, planner)) for key, plan in zip(lookalikes, plans, strict=True))
    up = _sizes(PLAN, FrameKind.VALUE, offers, lambda offer: offer)
    replies = (
        (
            (_shape_of(plan), None if some is None else len(some), len(str(rank))),
            PlanAnswer(plan, some),
        )
        for rank, (plan, some) in enumerate(zip(compressed, checks, strict=True))
    )
    down = _sizes(PLAN, FrameKind.RESULT, replies, lambda reply: reply)
    return StepMessages("plan", up, down)


def later_plan_messages(
    compressed: Sequence[CompressedPlan | SavePlan], checks: Sequence[Checks | None]
) -> StepMessages:
    """The same in a later save of unchanged plans: their digests, and each rank's file names."""
    offers = ((None, KnownPlan(NO_DIGEST, UNNAMED)) for _ in compressed)
    up = _sizes(PLAN, FrameKind.VALUE, offers, lambda offer: offer)
    replies = (
        (
            (None if some is None else len(some), len(str(rank)), _shape_of(plan)),
            PlanAnswer(_repeat(plan), some),
        )
        for rank, (plan, some) in enumerate(zip(compressed, checks, strict=True))
    )
    return StepMessages("plan", up, _sizes(PLAN, FrameKind.RESULT, replies, lambda reply: reply))


def _repeat(plan: CompressedPlan | SavePlan) -> SavePlan | RepeatedPlan:
    return plan if isinstance(plan, SavePlan) else RepeatedPlan(plan.plan, plan.same_data)


def _new(plan: SavePlan, planner: DefaultSavePlanner) -> NewPlan | SavePlan:
    return NewPlan(plan, NO_DIGEST) if planner.remember_plans else plan


def _shape_of(plan: CompressedPlan | SavePlan) -> Hashable:
    if isinstance(plan, CompressedPlan):
        return len(plan.rows), plan.same_data
    return id(plan)


def written_message(columns: WriteColumns, checks: Checks | None) -> tuple[Hashable, object]:
    """A rank's value in the second step, and a key that ranks with values of one size share."""
    sums = None if checks is None else np.zeros(len(checks), dtype=np.uint64)
    digits = sum(map(len, columns.files))
    counts = (len(columns.length), len(columns.sums), len(columns.files), digits)
    checksums = np.zeros(len(columns.sums), dtype=np.uint32)
    return (counts, None if sums is None else len(sums)), (
        replace(columns, sums=checksums),
        sums,
        True,
    )


def write_messages(keyed: Sequence[tuple[Hashable, object]], metadata: int) -> StepMessages:
    """The messages of the second step: places, checksums and sums of replicas, and the metadata.

    keyed: `written_message` of each rank. metadata: bytes of the answer, see `metadata_message`.
    """
    up = _sizes(WRITE, FrameKind.VALUE, keyed, lambda value: value)
    down = np.full(len(keyed), metadata, dtype=np.int64)
    down[COORDINATOR] = 0
    return StepMessages("write", up, down)


def metadata_message(catalog: Catalog) -> int:
    """Bytes of the frame with which the coordinator ends the save, for one rank.

    A compressed one differs by a few bytes from save to save, as their files' names do.
    """
    answer = encode_metadata(catalog.metadata(), sums=False)
    return _frame_bytes(WRITE, FrameKind.RESULT, pack(answer))


def later_metadata_message(catalog: Catalog) -> int:
    """The same in a later save, whose files only have other names; compressed, and so not exact.

    If the ranks do not remember the metadata, it is sent in full again.
    """
    answer = encode_metadata(catalog.metadata(), sums=False)
    if not isinstance(answer, EncodedMetadata) or len(answer.manifest) > ANSWER_BYTES:
        return metadata_message(catalog)
    later_files = tuple(name.replace(FIRST_FILES, LATER_FILES) for name in catalog.places.files)
    places = replace(catalog.places, files=later_files)
    later = encode_metadata(replace(catalog, places=places).metadata(), sums=False)
    changed = change_metadata(later, answer) if isinstance(later, EncodedMetadata) else None
    return _frame_bytes(WRITE, FrameKind.RESULT, pack(later if changed is None else changed))


def _sizes(
    head: Head,
    kind: FrameKind,
    keyed: Iterable[tuple[Hashable, Any]],
    value: Callable[[Any], object],
) -> Ints:
    """The bytes of each rank's message; messages with the same key have one size."""
    size_of_key: dict[Hashable, int] = {}
    sizes = []
    for key, of in keyed:
        if key not in size_of_key:
            size_of_key[key] = _frame_bytes(head, kind, pack(value(of)))
        sizes.append(size_of_key[key])
    found = np.array(sizes, dtype=np.int64)
    found[COORDINATOR] = 0
    return found


def _frame_bytes(head: Head, kind: FrameKind, segments: Sequence[Any]) -> int:
    pieces = encode(Frame(kind, head, segments))
    return sum(memoryview(piece).nbytes for piece in pieces)
