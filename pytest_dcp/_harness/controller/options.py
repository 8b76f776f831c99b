"""The harness's options, and the values that a session has for them.

Light on purpose: every session imports it, even without any world.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import pytest

from pytest_dcp._harness.protocol.world_spec import BACKENDS, MAX_WORLD_SIZE, Defaults
from pytest_dcp.command_line import Option, OptionReader

ReportRanks = Literal["all", "failed", "first"]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a session, checked."""

    marker: str
    """The marker's name; empty: the plugin leaves every marker alone."""
    launch: str
    """auto, fork or spawn."""
    defaults: Defaults
    grace_s: float
    """How long the peers of a failed rank may go on."""
    report_ranks: ReportRanks
    pdb_rank: int | None
    """None: the first that asks."""
    require_gpus: bool
    max_procs: int
    """Rank processes at a time on this machine, over all sessions; 0: by the number of cores."""
    output_limit_bytes: int
    """Captured output of one rank in one phase; more is a failure."""
    seed: int | None
    adopt: bool = False
    """Whether processes of unmarked tests run as ranks."""
    adopt_except: tuple[str, ...] = ()
    """Names of tests that are not adopted; see `choice.names`."""


OPTIONS = (
    Option(
        "marker",
        "world_size",
        "name of the marker that runs a test in a world; empty: none",
        may_be_empty=True,
    ),
    Option("launch", "auto", "how ranks are started", ("auto", "fork", "spawn")),
    Option("world-size", "", "run every world with this many ranks", takes=int),
    Option("backend", "auto", "backend of worlds whose marker names none", BACKENDS),
    Option(
        "timeout",
        "120",
        "seconds from all ranks ready to the end of teardown; 0: no limit",
        takes=float,
    ),
    Option("grace", "1", "seconds that the peers of a failed rank may go on", takes=float),
    Option("report-ranks", "all", "whose output a report shows", ("all", "failed", "first")),
    Option(
        "pdb-rank",
        "first",
        "the rank that gets the terminal for pdb; first: the first to ask",
        takes=int,
    ),
    Option("require-gpus", "", "fail, not skip, a test whose GPUs are missing", takes=bool),
    Option(
        "max-procs", "0", "rank processes at a time on this machine; 0: by its cores", takes=int
    ),
    Option("output-limit", "256", "MiB that one rank may print in one phase", takes=float),
    Option("adopt", "", "run the processes that unmodified tests start as ranks", takes=bool),
    Option(
        "adopt-except",
        "",
        "tests that start their processes themselves: nodeids or the beginnings of some, with "
        "wildcards, separated by spaces",
    ),
    Option("seed", "", "seed of every rank; by default from the test's name", takes=int),
)


def read_options(config: pytest.Config) -> Options:
    """The session's options. Raises `pytest.UsageError` naming every wrong one."""
    reader = OptionReader(config, OPTIONS)
    marker = reader.text("marker")
    if marker and not marker.isidentifier():
        reader.refuse("marker", "a name such as world_size")
    world_size = reader.number("world-size", low=1, high=MAX_WORLD_SIZE)
    timeout = reader.number("timeout", low=0) or float("inf")
    grace = reader.number("grace", low=0)
    output = reader.number("output-limit", low=0, high=1e6)
    max_procs = reader.number("max-procs", low=0)
    seed = reader.number("seed", low=0, high=2**63 - 1)
    pdb_rank = None if reader.text("pdb-rank") == "first" else reader.number("pdb-rank", low=0)
    reader.raise_problems()
    return Options(
        marker=marker,
        launch=reader.text("launch"),
        defaults=Defaults(
            backend=reader.text("backend"),
            timeout_s=float(timeout),
            world_size=None if world_size is None else int(world_size),
        ),
        grace_s=float(grace or 0),
        report_ranks=reader.text("report-ranks"),  # type: ignore[arg-type]  # checked above
        pdb_rank=None if pdb_rank is None else int(pdb_rank),
        require_gpus=reader.flag("require-gpus"),
        max_procs=int(max_procs or 0),
        output_limit_bytes=int((output or 0) * 2**20),
        seed=None if seed is None else int(seed),
        adopt=reader.flag("adopt"),
        adopt_except=tuple(reader.text("adopt-except").split()),
    )


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
