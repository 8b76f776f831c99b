"""The process's limit of open descriptors, raised for the connections of its peers.

The coordinator holds one connection for each other rank of a group. The usual soft limit of 1,024
is raised if that is not enough, and stays raised: the connections stay open, too. Only an
administrator can raise the hard limit, so an operation that needs more fails with an error that
names it.
"""

from __future__ import annotations

import errno

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate.failure import CoordinationError

BESIDE = 512
"""Descriptors that a process may need besides its peers' connections."""
FEW = 16
"""Descriptors that it has open at least."""
EXHAUSTED = (errno.EMFILE, errno.ENFILE)
"""Errors of a call that opens a descriptor: the process, or the machine, has too many."""


def make_room_for(connections: int) -> None:
    """Raise the soft limit if it is too low for this many connections.

    Raises CoordinationError when the hard limit is too low for them.
    """
    needed = connections + BESIDE
    soft, hard = operating_system.limits_of_open_files()
    if 0 <= soft < needed:
        most = needed if hard < 0 else min(needed, hard)
        soft = operating_system.raise_limit_of_open_files(max(soft, most))
        if soft < connections + FEW:
            raise CoordinationError(
                f"{connections} ranks connect to the coordinator, and this process may have only "
                f"{soft} descriptors open: {_advice(connections)}"
            )


def make_more_room() -> bool:
    """Double the soft limit, up to the hard one; return whether it is higher now."""
    soft, hard = operating_system.limits_of_open_files()
    if soft < 0 or soft == hard:
        return False
    most = 2 * soft if hard < 0 else min(2 * soft, hard)
    return operating_system.raise_limit_of_open_files(most) > soft


def exhaustion_error(error: OSError, connections: int) -> CoordinationError:
    """The error to raise if no descriptor is left for a connection."""
    return CoordinationError(f"no connection can be opened ({error}): {_advice(connections)}")


def _advice(connections: int) -> str:
    return (
        f"raise the hard limit with `ulimit -n {connections + BESIDE}` before Python starts, or "
        "in limits.conf, systemd's LimitNOFILE or docker's --ulimit nofile"
    )
