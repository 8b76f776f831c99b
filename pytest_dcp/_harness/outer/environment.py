"""An outer launcher's variables -> this process's place among its ranks, or what is wrong.

Pure (no I/O). A process may see the variables of several launchers: `srun` starts one torchrun on
each node, `mpirun` may start its daemons by `srun`. The innermost launcher started this process, so
its variables count: torchrun's before mpirun's, mpirun's before srun's. RANK and WORLD_SIZE alone,
which scripts export, must agree with the launcher that is found.

A launcher of one process is none: the session starts its worlds on this machine, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pytest_dcp._harness.protocol.launcher import RANK_VARIABLE

INSIDE_VARIABLE = "PYTEST_DCP_OUTER"
"""Set by a session under a launcher for the programs that it starts: they are no ranks of it."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class OuterLaunch:
    """This process among the ranks of an outer launcher."""

    launcher: str
    """Its name, for people."""
    rank: int
    size: int
    """At least 2."""
    node: str
    """Distinguishes this process's node from others; empty if the launcher does not say."""
    local_rank: int | None
    master_addr: str
    master_port: int
    has_agent_store: bool
    """Whether torchrun itself has a store at the master's address; else rank 0 opens one."""
    is_local: bool
    """Whether all ranks are on this machine, as far as the variables say."""
    attempt: int = 0
    """How often torchrun has restarted the ranks."""
    max_restarts: int = 0
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class _Variables:
    """The names under which a launcher passes a process its place."""

    launcher: str
    sign: str
    """Set by this launcher for each process that it starts."""
    rank: str
    size: str
    node: str = ""
    local_rank: str = ""


PMI = _Variables("mpirun", "PMI_RANK", "PMI_RANK", "PMI_SIZE", local_rank="MPI_LOCALRANKID")
# A batch script has SLURM_PROCID and SLURM_NTASKS too, but only srun starts steps.
SRUN = _Variables(
    "srun",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NODEID",
    "SLURM_LOCALID",
)
LAUNCHERS = (
    _Variables("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "GROUP_RANK", "LOCAL_RANK"),
    _Variables(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    PMI,
    SRUN,
)
"""The innermost first."""
BY_HAND = _Variables(
    "a launcher (RANK and WORLD_SIZE)", "RANK", "RANK", "WORLD_SIZE", "", "LOCAL_RANK"
)


class OuterEnvironmentError(Exception):
    """The launcher's variables do not fit together; the text is one sentence for the user."""


def read_environment(environ: Mapping[str, str]) -> OuterLaunch | None:
    """This process's place; None without an outer launcher of several processes.

    Raises `OuterEnvironmentError` when the variables are incomplete or disagree.
    """
    if environ.get(RANK_VARIABLE) or environ.get(INSIDE_VARIABLE):
        return None
    present = [one for one in LAUNCHERS if one.sign in environ]
    if PMI in present and SRUN in present and _are_equal(PMI, SRUN, environ):
        present.remove(PMI)  # srun itself sets these for MPI
    if not present and "RANK" not in environ:
        return None
    names = present[0] if present else BY_HAND
    rank, size = _place(names, environ)
    _require_agreement(names, present, environ)
    if size == 1:
        return None
    return OuterLaunch(
        launcher=names.launcher,
        rank=rank,
        size=size,
        node=environ.get(names.node, ""),
        local_rank=_optional_number(environ, names.local_rank),
        master_addr=_master_addr(names, environ),
        master_port=_number(environ, "MASTER_PORT", 65535),
        has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        is_local=_is_local(environ, size),
        attempt=_optional_number(environ, "TORCHELASTIC_RESTART_COUNT") or 0,
        max_restarts=_optional_number(environ, "TORCHELASTIC_MAX_RESTARTS") or 0,
        run_id=environ.get("TORCHELASTIC_RUN_ID", ""),
    )


def _are_equal(one: _Variables, other: _Variables, environ: Mapping[str, str]) -> bool:
    pairs = ((one.rank, other.rank), (one.size, other.size))
    return all(environ.get(mine) == environ.get(theirs) for mine, theirs in pairs)


def _place(names: _Variables, environ: Mapping[str, str]) -> tuple[int, int]:
    for name, other in ((names.size, names.rank), (names.rank, names.size)):
        if name not in environ:
            raise OuterEnvironmentError(
                f"{other}={environ[other]!r} is set, but {name} is not: start the ranks with "
                f"torchrun, or unset {other} to run worlds on this machine alone"
                if other in environ
                else f"{names.sign} is set, but neither {names.rank} nor {names.size}"
            )
    size = _number(environ, names.size)
    rank = _number(environ, names.rank)
    if not 0 <= rank < size:
        raise OuterEnvironmentError(
            f"{names.rank}={rank} is not from 0 to {size - 1}, though {names.size}={size}"
        )
    return rank, size


def _require_agreement(
    names: _Variables, present: list[_Variables], environ: Mapping[str, str]
) -> None:
    """Raise if RANK and WORLD_SIZE, or those of another MPI, contradict the launcher's."""
    if names.sign == "TORCHELASTIC_RUN_ID":
        return  # torchrun sets RANK itself, and each of mpirun's processes may start a torchrun
    others = [one for one in present if one is not names and one.launcher == names.launcher]
    if "RANK" in environ and "WORLD_SIZE" in environ and names is not BY_HAND:
        others.append(BY_HAND)
    for other in others:
        for mine, theirs in ((names.rank, other.rank), (names.size, other.size)):
            if theirs in environ and environ[theirs] != environ[mine]:
                raise OuterEnvironmentError(
                    f"two launchers disagree: {mine}={environ[mine]}, but "
                    f"{theirs}={environ[theirs]}; unset the variables of the one that did not "
                    "start this process"
                )


def _master_addr(names: _Variables, environ: Mapping[str, str]) -> str:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise OuterEnvironmentError(
            f"{names.size}={environ[names.size]} ranks need {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not set: export the address of rank 0's node "
            "and a free port there, the same for all ranks"
        )
    return environ["MASTER_ADDR"]


def _is_local(environ: Mapping[str, str], size: int) -> bool:
    local_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return local_size == str(size) or environ.get("MASTER_ADDR") in LOOPBACK


def _number(environ: Mapping[str, str], name: str, most: int = 1 << 20) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit() and int(text) <= most):
        raise OuterEnvironmentError(f"{name}={text!r} is not a whole number from 0 to {most}")
    return int(text)


def _optional_number(environ: Mapping[str, str], name: str) -> int | None:
    return _number(environ, name) if environ.get(name) else None
