"""The local plans of all ranks of a simulated world. Pure (no I/O).

One state serves all ranks, or a function gives each rank its own. Ranks that got the same object
are planned together: their state dict is flattened once, by the real planner, and their tables
share their columns (see `rank_tables`). A `PerRank` in it names the rank in its flat name; these
names are made from those of two ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.distributed.checkpoint.planner import SavePlan

from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import BYTES, WriteItems
from pytest_dcp._engine.plan.nested import Path
from pytest_dcp._engine.plan.packed_names import Fqns
from pytest_dcp._engine.plan.per_rank import rank_key, ranks_known
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.simulation.mesh_ranks import MeshRanks
from pytest_dcp._engine.simulation.named_placements import PlacementLookup
from pytest_dcp._engine.simulation.rank_tables import StateRows, tables_of
from pytest_dcp._engine.verbs.torch_arguments import check_state_dict, resolve_stateful

SimulatedState = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
"""The state dict of every rank, or a function that gives a rank its own. Tensors have their full
shape; only shapes and dtypes are read, so they may be on the meta device."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalPlans:
    """The messages of all ranks to the coordinator."""

    plans: list[SavePlan]
    value_bytes: list[Mapping[str, int]]
    """Of each rank: bytes of the entries of its Python values, by flat name."""
    lookalikes: list[object]
    """Of each rank: equal for ranks whose plans differ in nothing but offsets and digits."""


def make_local_plans(
    state: SimulatedState,
    mesh: MeshRanks,
    lookup: PlacementLookup,
    planner: DefaultSavePlanner,
) -> LocalPlans:
    """The local plan of every rank. Raises PlanError as the ranks' own planners do."""
    plans: dict[int, SavePlan] = {}
    value_bytes: dict[int, Mapping[str, int]] = {}
    lookalikes: dict[int, object] = {}
    for ranks, one in _group_states(state, mesh.size):
        group = _StateGroup(one, ranks, mesh, lookup, planner)
        for rank, plan, sizes, alike in group.plan_ranks():
            plans[rank], value_bytes[rank], lookalikes[rank] = plan, sizes, alike
    lookup.check_patterns()
    every = range(mesh.size)
    return LocalPlans(
        [plans[rank] for rank in every],
        [value_bytes[rank] for rank in every],
        [lookalikes[rank] for rank in every],
    )


def _group_states(state: SimulatedState, size: int) -> list[tuple[Ints, dict[str, Any]]]:
    """The distinct states, and the ranks that hold each."""
    if not callable(state):
        return [(np.arange(size), _as_dict(state))]
    groups: dict[int, tuple[list[int], Mapping[str, Any]]] = {}
    for rank in range(size):
        # Kept in the groups, so that no two states have the same id.
        own = state(rank)
        groups.setdefault(id(own), ([], own))[0].append(rank)
    return [(np.array(ranks), _as_dict(own)) for ranks, own in groups.values()]


def _as_dict(state: Any) -> dict[str, Any]:
    found = dict(state) if isinstance(state, Mapping) else state
    check_state_dict(found)
    return resolve_stateful(found)


class _StateGroup:
    """Ranks that hold one state."""

    def __init__(
        self,
        state: dict[str, Any],
        ranks: Ints,
        mesh: MeshRanks,
        lookup: PlacementLookup,
        planner: DefaultSavePlanner,
    ) -> None:
        self._state, self._ranks, self._mesh, self._planner = state, ranks, mesh, planner
        self._flat, self._paths = self._flatten(int(ranks[0]))
        if ranks[0]:
            self._paths = _as_received(self._paths)
        # A PerRank's tensors belong to one rank each: no placement applies to them.
        key = rank_key(int(ranks[0]), mesh.size)
        plain = {fqn for fqn, path in self._paths.items() if key in path}
        self._rows = StateRows.of(self._flat, lookup, mesh, plain)

    def plan_ranks(self) -> list[tuple[int, SavePlan, Mapping[str, int], object]]:
        """Each rank with its plan, the sizes of its values, and a key that lookalikes share."""
        ranks, at = self._ranks.tolist(), self._rank_positions()
        fqns = self._name_rows(at) if at else None
        tables = tables_of(self._rows, self._ranks, fqns)
        paths = self._paths_by_rank(at, fqns) if at else [self._paths] * len(ranks)
        sizes = self._value_sizes(tables)
        found: list[tuple[int, SavePlan, Mapping[str, int], object]] = []
        for n, (rank, table) in enumerate(zip(ranks, tables, strict=True)):
            plan = SavePlan(
                table,  # type: ignore[arg-type]  # a sequence of items
                planner_data=paths[n] if self._planner.flatten_state_dict else None,
            )
            own = sizes if fqns is None else dict(zip(fqns[n], sizes.values(), strict=True))
            digits = len(str(rank)) if at else 0
            # The columns of a class are one object; `table.kind` stands for them.
            found.append((rank, plan, own, (id(table.kind), self, digits)))
        return found

    def _flatten(self, rank: int) -> tuple[dict[str, Any], dict[str, Path]]:
        """The flat state and its paths, as the rank's planner has them."""
        planner = copy.copy(self._planner)
        with ranks_known(rank, self._mesh.size):
            planner.set_up_planner(self._state, is_coordinator=rank == 0)
        return planner.state_dict, planner.mappings

    def _rank_positions(self) -> list[tuple[int, str, str]]:
        """Rows that name the rank: the row, and its name around the rank's number."""
        if len(self._ranks) < 2:
            return []
        first, second = (rank_key(int(rank), self._mesh.size) for rank in self._ranks[:2])
        other, _ = self._flatten(int(self._ranks[1]))
        found = []
        for row, (one, two) in enumerate(zip(self._flat, other, strict=True)):
            if one != two:
                at = next(
                    n for n in range(len(one)) if one[:n] + second + one[n + len(first) :] == two
                )
                found.append((row, one[:at], one[at + len(first) :]))
        return found

    def _name_rows(self, at: Sequence[tuple[int, str, str]]) -> list[Fqns]:
        """Each rank's own names of the rows."""
        names, every = list(self._flat), []
        for rank in self._ranks.tolist():
            key = rank_key(rank, self._mesh.size)
            for row, before, after in at:
                names[row] = before + key + after
            every.append(tuple(names))
        return every

    def _paths_by_rank(
        self, at: Sequence[tuple[int, str, str]], fqns: Sequence[Fqns] | None
    ) -> list[Mapping[str, Path]]:
        first = rank_key(int(self._ranks[0]), self._mesh.size)
        base = list(self._paths.items())
        every: list[Mapping[str, Path]] = []
        for rank, names in zip(self._ranks.tolist(), fqns or (), strict=True):
            key = rank_key(rank, self._mesh.size)
            own = {
                names[row]: tuple(key if part == first else part for part in base[row][1])
                for row, _, _ in at
            }
            own = _as_received(own) if rank else own
            items = list(base)
            for (row, _, _), item in zip(at, own.items(), strict=True):
                items[row] = item
            every.append(dict(items))
        return every

    def _value_sizes(self, tables: Sequence[WriteItems]) -> dict[str, int]:
        """The bytes of each value's entry, by its name on the first rank; 0 for tensors."""
        table = tables[0]
        planner = copy.copy(self._planner)
        planner.state_dict = self._flat
        data = planner.source(table)
        sizes = dict.fromkeys(self._flat, 0)
        for row in np.flatnonzero(table.kind == BYTES).tolist():
            entry = data(row)
            if isinstance(entry, bytes):
                sizes[table.fqns[row]] = len(entry)
        return sizes


def _as_received(paths: Mapping[str, Path]) -> dict[str, Path]:
    """The paths with strings of their own, as the coordinator decodes them from a message.

    The pickle in `.metadata` is shorter where one string object occurs twice.
    """
    return {_copy(fqn): tuple(map(_copy, path)) for fqn, path in paths.items()}


def _copy(part: Any) -> Any:
    if type(part) is not str:
        return part
    return part.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
