"""The plan step's messages: a rank whose plan has not changed says so, instead of sending it.

A rank sends its local plan with the digest of the message, and from the next save on the digest
alone. So a digest covers all that the coordinator would be sent: names, shapes, dtypes, offsets,
properties, the data of planner and storage. A coordinator that lacks a plan (it is a new one, or
has forgotten it) asks for it, in one more round of the same step. If it remembers the plans of all
ranks together, it reuses the global plan too, and to a rank that still has its own part it sends
only the names of this save's files.

Nothing that depends on data is remembered: values, checksums, places, which replicas to compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from pytest_dcp._engine.coordinate import Team
from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.coordinate.wire import pack
from pytest_dcp._engine.plan.replica_comparison import Checks
from pytest_dcp._engine.verbs.plan_memory import (
    UNNAMED,
    JoinedPlans,
    OwnPart,
    PlanMemory,
    Structure,
    memory_of,
    remembers_plans,
    settings_of,
)
from pytest_dcp._engine.verbs.save_messages import (
    ChangedMetadata,
    CompressedPlan,
    EncodedMetadata,
    change_metadata,
    decode_metadata,
    encode_metadata,
    expand_plan,
    name_of_base,
    restore_metadata,
)

DIGEST_BYTES = 16

# ---- messages


@dataclass(frozen=True, slots=True)
class NewPlan:
    """A local plan in full."""

    plan: SavePlan
    digest: bytes


@dataclass(frozen=True, slots=True)
class KnownPlan:
    """A local plan that the coordinator has been sent before."""

    digest: bytes
    answer: bytes
    """The name of the coordinator's answer to it."""
    base: bytes = UNNAMED
    """The name of the metadata that the rank remembers of it."""


@dataclass(frozen=True, slots=True)
class SendPlan:
    """The coordinator's request for a further round."""

    is_unknown: bool
    """Whether the receiver's plan is unknown."""


@dataclass(frozen=True, slots=True)
class RepeatedPlan:
    """A global plan whose rows are those of the named answer."""

    plan: SavePlan
    """Without items."""
    same_data: bool


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """The items that one rank writes, and those that it compares with other ranks."""

    plan: SavePlan | CompressedPlan | RepeatedPlan
    checks: Checks | None
    name: bytes = UNNAMED
    """Under which both sides remember it."""


record(NewPlan, KnownPlan, SendPlan, RepeatedPlan, PlanAnswer)

Offer = SavePlan | NewPlan | KnownPlan | None
"""A rank's message. A plain plan is not to be remembered; None: it was not asked for its plan."""


def digest_of(plan: SavePlan) -> bytes:
    """A digest of the message that carries the plan."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for segment in pack(plan):
        view = memoryview(segment).cast("B")
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.digest()


class PlanExchange:
    """One rank's part in the plan step of one save."""

    def __init__(self, planner: SavePlanner, memory: PlanMemory | None, rank: int) -> None:
        """memory: None if no plan is to be remembered. rank: this one's place among the plans."""
        self._planner: Any = planner
        self._memory = memory
        self._rank = rank
        self._local: SavePlan | None = None
        self._digest = b""
        self._name = UNNAMED
        self._offers: list[Offer] = []
        self._recalled: dict[bytes, SavePlan] = {}
        self._structure: Structure | None = None

    # On every rank.

    def offer(self, plan: SavePlan) -> Offer:
        """The message for this local plan."""
        self._local = plan
        if self._memory is None:
            return plan
        self._digest = digest_of(plan)
        part = self._memory.part(self._digest)
        if part is None:
            return NewPlan(plan, self._digest)
        base = self._memory.answer(part.name)
        return KnownPlan(self._digest, part.name, UNNAMED if base is None else name_of_base(base))

    def offer_again(self, request: SendPlan) -> Offer:
        """The message of the further round."""
        return NewPlan(self._own_plan(), self._digest) if request.is_unknown else None

    def accept(self, answer: PlanAnswer) -> SavePlan:
        """The plan to carry out."""
        plan, memory = answer.plan, self._memory
        self._name = answer.name
        if isinstance(plan, RepeatedPlan):
            part = None if memory is None else memory.part(self._digest)
            if part is None or part.name != answer.name:
                raise ValueError("the coordinator repeats an answer that this rank does not have")
            plan = CompressedPlan(plan.plan, part.rows, part.hint, plan.same_data)
        if memory is not None and isinstance(plan, CompressedPlan) and answer.name != UNNAMED:
            memory.keep_part(self._digest, OwnPart(answer.name, plan.rows, plan.hint))
        return expand_plan(plan, self._own_plan())

    def _own_plan(self) -> SavePlan:
        if self._local is None:
            raise ValueError("this rank has offered no plan")
        return self._local

    def read_metadata(self, message: Any) -> Metadata:
        """The checkpoint's metadata, from the coordinator's message at the end of the save."""
        memory, name = self._memory, self._name
        if isinstance(message, ChangedMetadata):
            base = None if memory is None else memory.answer(name)
            if base is None:
                raise ValueError("the coordinator refers to a metadata that this rank lacks")
            message = restore_metadata(message, base)
        elif memory is not None and isinstance(message, EncodedMetadata) and name != UNNAMED:
            memory.keep_answer(name, message)
        return decode_metadata(message)

    # On the coordinator.

    def ask_for(self, offers: Sequence[Offer]) -> list[SendPlan] | None:
        """Requests for the plans that are not known here; None if all are.

        offers: every rank's message, of the first round or of the further one.
        """
        if not self._offers:
            self._offers = list(offers)
            # Now, since a structure may be forgotten meanwhile to make room for another.
            self._recalled = {} if self._memory is None else self._memory.plans()
        else:
            self._offers = [
                first if second is None else second
                for first, second in zip(self._offers, offers, strict=True)
            ]
        unknown = [self._find_plan(rank) is None for rank in range(len(self._offers))]
        return [SendPlan(is_unknown) for is_unknown in unknown] if any(unknown) else None

    def _find_plan(self, rank: int) -> SavePlan | None:
        offer = self._offers[rank]
        if rank == self._rank and self._local is not None:
            return self._local
        if isinstance(offer, KnownPlan):
            return self._recalled.get(offer.digest)
        return offer.plan if isinstance(offer, NewPlan) else offer

    def join(self) -> tuple[list[SavePlan], list[SavePlan], Metadata]:
        """Every rank's local and global plan, and the metadata: planned now, or remembered."""
        rank_offers = [offer for offer in self._offers if isinstance(offer, (NewPlan, KnownPlan))]
        digests = [offer.digest for offer in rank_offers]
        key = tuple(digests) if len(digests) == len(self._offers) else None
        memory = None if key is None else self._memory
        settings = () if memory is None else settings_of(self._planner)
        if memory is not None and key is not None:
            self._structure = memory.find(key, settings)
        if self._structure is not None:
            return self._structure.joined.local, *self._structure.joined.give_to(self._planner)
        rank_plans = [self._find_plan(rank) for rank in range(len(self._offers))]
        local = [plan for plan in rank_plans if plan is not None]
        plans, metadata = self._planner.create_global_plan(local)
        if memory is not None and key is not None:
            joined = JoinedPlans.of(self._planner, local, plans, metadata)
            self._structure = memory.keep(key, settings, joined)
        return local, plans, metadata

    def answers(
        self, plans: Sequence[SavePlan | CompressedPlan], checks: Sequence[Checks | None]
    ) -> list[PlanAnswer]:
        """The message for each rank."""
        name = UNNAMED if self._structure is None else self._structure.name
        short = [self._shorten(rank, plan) for rank, plan in enumerate(plans)]
        return [PlanAnswer(plan, pieces, name) for plan, pieces in zip(short, checks, strict=True)]

    def _shorten(
        self, rank: int, plan: SavePlan | CompressedPlan
    ) -> SavePlan | CompressedPlan | RepeatedPlan:
        offer, structure = self._offers[rank], self._structure
        if structure is None or not isinstance(plan, CompressedPlan):
            return plan
        if not isinstance(offer, KnownPlan) or offer.answer != structure.name:
            return plan
        before: Any = structure.joined.plans[rank].items
        # A storage may have divided the items in another way.
        if plan.rows is not before.origin.rows or plan.hint is not before.hint:
            return plan
        return RepeatedPlan(plan.plan, plan.same_data)

    def write_metadata(self, metadata: Metadata) -> Metadata | EncodedMetadata | ChangedMetadata:
        """The message of the checkpoint's metadata, short if all ranks remember an earlier one."""
        message = encode_metadata(metadata, sums=False)
        memory, name = self._memory, self._name
        if memory is None or name == UNNAMED or not isinstance(message, EncodedMetadata):
            return message
        base = memory.answer(name)
        changed = change_metadata(message, base) if base and self._all_have(base) else None
        if changed is None:
            memory.keep_answer(name, message)
        return message if changed is None else changed

    def _all_have(self, base: EncodedMetadata) -> bool:
        names = name_of_base(base), self._name
        return all(
            isinstance(offer, KnownPlan) and (offer.base, offer.answer) == names
            for rank, offer in enumerate(self._offers)
            if rank != self._rank
        )


def exchange_of(team: Team, planner: SavePlanner, writer: object) -> PlanExchange:
    """This rank's part in a save of the team."""
    memory = None
    together = team.size > 1 and not team.pickles
    if together and team.group is not None and remembers_plans(planner, writer):
        memory = memory_of(team.group, team.coordinator_rank)
    return PlanExchange(planner, memory, team.rank)
