"""The result of a simulated save: sizes of files, messages and memory, by rank. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.distributed.checkpoint.planner import WriteItem

from pytest_dcp._engine.coordinate.descriptors import BESIDE, FEW
from pytest_dcp._engine.coordinate.frame import MAX_BODY_BYTES
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.simulation.step_messages import StepMessages

GB, MB = 1e9, 1e6
SLOW_BROADCAST_S = 60.0
"""A coordinator that sends for longer than this, at `NETWORK_BYTES_PER_S`, is a problem."""
NETWORK_BYTES_PER_S = 12.5e9
"""100 Gbit/s."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A data file that a rank would write."""

    name: str
    """The save's id in it is zeros."""
    nbytes: int
    items: int


@dataclass(frozen=True, slots=True, eq=False)
class RankPlan:
    """One rank's part of a simulated save."""

    rank: int
    local_items: Sequence[WriteItem]
    """Its local plan: every box and value that it holds."""
    written_items: Sequence[WriteItem]
    """The items that it writes, after duplicates are removed."""
    files: tuple[PlannedFile, ...]


@dataclass(frozen=True, slots=True)
class CoordinatorCost:
    """The costs of the save on the coordinator, rank 0."""

    connections: int
    """Sockets to its peers, each open at the same time."""
    memory_bytes: int
    """At least: the messages, tables and metadata that it holds at once, at the worst moment."""
    network_bytes: int
    """That it sends and receives."""
    plan_s: float
    """Seconds that this machine took to join the plans and to check them."""


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """A save of all ranks, planned and not carried out. Arrays have one number for each rank.

    `print(simulation)` shows the totals.
    """

    held_bytes: Ints
    """Of tensors that the rank holds; Python values count with their entries' bytes."""
    file_bytes: Ints
    """Of the data files that it writes."""
    items: Ints
    """How many boxes and values it writes."""
    files: Ints
    """How many data files."""
    keys: int
    """Names in the checkpoint."""
    chunks: int
    """Boxes and values in the checkpoint."""
    metadata_bytes: int
    """Of the file `.metadata`."""
    steps: tuple[StepMessages, ...]
    """The steps `plan` and `write`."""
    later_steps: tuple[StepMessages, ...]
    """The same of a later save in the same group, with the same names, shapes and dtypes."""
    coordinator: CoordinatorCost
    plans: Mapping[int, RankPlan]
    """Of the ranks that `ranks=` names."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.items)

    @property
    def slowest_rank(self) -> int:
        """The rank that writes the most bytes; the lowest of them."""
        return int(np.argmax(self.file_bytes))

    @property
    def checkpoint_bytes(self) -> int:
        """Of all files of the checkpoint."""
        return int(self.file_bytes.sum()) + self.metadata_bytes

    def save_s(
        self, *, disk_bytes_per_s: float, network_bytes_per_s: float = NETWORK_BYTES_PER_S
    ) -> float:
        """Seconds that the save takes if bytes are all that counts.

        disk_bytes_per_s: of one rank, while all write. network_bytes_per_s: of the coordinator.
        The plan's time is this machine's. Latency, syncs and the ranks' own planning are left out.
        """
        written_s = float(self.file_bytes.max()) / disk_bytes_per_s
        metadata_s = self.metadata_bytes / disk_bytes_per_s
        sent_s = self.coordinator.network_bytes / network_bytes_per_s
        return self.coordinator.plan_s + sent_s + written_s + metadata_s

    def problems(self, *, memory_bytes: int, open_files: int) -> list[str]:
        """The limits that a coordinator would exceed, one sentence each.

        memory_bytes: of its machine. open_files: its hard limit (`ulimit -Hn`).
        """
        found, cost = [], self.coordinator
        if cost.connections + FEW > open_files:
            found.append(
                f"the coordinator needs {cost.connections:,} connections and may open "
                f"{open_files:,} files: raise its hard limit with "
                f"`ulimit -n {cost.connections + BESIDE}`"
            )
        for step in self.steps:
            if step.largest_bytes > MAX_BODY_BYTES:
                found.append(
                    f"a message of the step {step.step!r} has {step.largest_bytes / GB:.1f} GB, "
                    f"and at most {MAX_BODY_BYTES / GB:.1f} GB are allowed"
                )
        if cost.memory_bytes > memory_bytes:
            found.append(
                f"the coordinator needs {cost.memory_bytes / GB:.1f} GB of memory or more, and has "
                f"{memory_bytes / GB:.1f} GB"
            )
        if cost.network_bytes > SLOW_BROADCAST_S * NETWORK_BYTES_PER_S:
            found.append(
                f"{cost.network_bytes / GB:,.0f} GB go through the coordinator's network: "
                f"{cost.network_bytes / NETWORK_BYTES_PER_S:,.0f} s at 100 Gbit/s"
            )
        return found

    def __str__(self) -> str:
        plan, write = self.steps
        slowest, cost = self.slowest_rank, self.coordinator
        lines = [
            f"{self.size:,} ranks, {self.keys:,} keys in {self.chunks:,} chunks, "
            f"{int(self.files.sum()):,} data files",
            f"writes {_text(self.file_bytes.sum())} of {_text(self.held_bytes.sum())} held; "
            f"rank {slowest} the most, {_text(self.file_bytes[slowest])}",
            f"messages: plan {_text(plan.coordinator_bytes)}, write "
            f"{_text(write.coordinator_bytes)}; .metadata {_text(self.metadata_bytes)}",
            f"coordinator: {cost.connections:,} connections, at least {_text(cost.memory_bytes)} "
            f"of memory, planned in {cost.plan_s:.3f} s",
        ]
        return "\n".join(lines)


def _text(nbytes: float) -> str:
    """The bytes in a unit that leaves few digits."""
    for unit, name in ((GB, "GB"), (MB, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {name}"
    return f"{int(nbytes)} bytes"
