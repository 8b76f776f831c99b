"""A save planner's memory between saves, so that an unchanged plan is not sent again.

Each planner instance has its own memory. A rank remembers the local plan that it sent last; the
coordinator remembers all local plans and the global plan made from them. Plans are compared in
full: names, boxes, dtypes, properties, the paths of the state dict. Instead of an unchanged plan a
rank sends its digest, so that a coordinator that remembers another plan notices.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.replica_comparison import Replicas
from pytest_dcp.errors import PlanError


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The `planner_data` of a plan that is not sent: the digest of the unchanged plan."""

    digest: bytes


@dataclass(slots=True)
class PlanCache:
    """One planner's memory."""

    pending: bytes | None = None
    """Digest of the local plan of the current save, remembered once that save has its final
    plan."""
    accepted: bytes | None = None
    final: SavePlan | None = None
    """The final plan that this rank received."""
    all_plans: dict[int, tuple[bytes, SavePlan]] = field(default_factory=dict)
    """On the coordinator: each rank's last plan."""
    answer: tuple[tuple[bytes, ...], list[SavePlan], Metadata, Replicas | None] | None = None
    """On the coordinator: the digests, and the plans, metadata and replicas made from them."""

    def shorten_plan(self, plan: SavePlan) -> SavePlan:
        """The plan to send: this one, or a note that it is the same as last time."""
        self.pending = digest_of(plan)
        if self.pending == self.accepted and self.final is not None:
            return SavePlan([], planner_data=Unchanged(self.pending), usable=False)
        return plan

    def recall_plans(self, plans: Sequence[SavePlan]) -> tuple[list[SavePlan], tuple[bytes, ...]]:
        """Every rank's plan in full, and their digests.

        Raises PlanError naming the ranks whose unchanged plan is not the one remembered here.
        """
        # Only a plan sent in full is remembered; a digest must match the remembered plan.
        strangers = []
        for rank, plan in enumerate(plans):
            if plan.usable:
                self.all_plans[rank] = (digest_of(plan), plan)
            elif self.all_plans.get(rank, (b"",))[0] != getattr(plan.planner_data, "digest", None):
                strangers.append(rank)
        if strangers:
            raise PlanError(
                f"ranks {strangers} say that their plan is unchanged, but the coordinator does not "
                "remember it: with enable_plan_caching every rank must keep and reuse its planner"
            )
        remembered = [self.all_plans[rank] for rank in range(len(plans))]
        return [plan for _, plan in remembered], tuple(digest for digest, _ in remembered)

    def recall_plan(self, plan: SavePlan) -> SavePlan:
        """The plan to carry out: the received one, or the remembered one."""
        if not plan.usable:
            if self.final is None:
                raise PlanError("the coordinator sent no plan, and none is remembered")
            # The file names are this save's own.
            return replace(self.final, storage_data=plan.storage_data)
        self.accepted, self.final = self.pending, plan
        return plan


def digest_of(plan: SavePlan) -> bytes:
    """A digest of the whole plan."""
    data = plan.planner_data
    paths = tuple(data.items()) if isinstance(data, Mapping) else data
    content: Any = (WriteItems.of(plan.items), paths, plan.storage_data)
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 5)
    # Without a memo, equal plans give equal bytes even if they share different strings.
    pickler.fast = True
    pickler.dump(content)
    return hashlib.blake2b(stream.getbuffer(), digest_size=16).digest()
