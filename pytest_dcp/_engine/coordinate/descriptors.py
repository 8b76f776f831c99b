"""The process's limit of open descriptors, raised for the connections of its peers.

The coordinator holds one connection for each other rank of a group. The usual soft limit of 1,024
is raised if that is not enough, and stays raised: the connections stay open, too. Only an
administrator can raise the hard limit, so an operation that needs more fails with an error that
names it.
"""

from __future__ import annotations

import contextlib
import errno
import resource

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
    wanted = connections + BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        soft = _raise_soft_limit(max(soft, most))
        if soft < connections + FEW:
            raise CoordinationError(
                f"{connections} ranks connect to the coordinator, and this process may have only "
                f"{soft} descriptors open: {_advice(connections)}"
            )


def make_more_room() -> bool:
    """Double the soft limit, up to the hard one; return whether it is higher now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft == hard:
        return False
    most = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
    return _raise_soft_limit(most) > soft


def exhaustion_error(error: OSError, connections: int) -> CoordinationError:
    """The error to raise if no descriptor is left for a connection."""
    return CoordinationError(f"no connection can be opened ({error}): {_advice(connections)}")


def _advice(connections: int) -> str:
    return (
        f"raise the hard limit with `ulimit -n {connections + BESIDE}` before Python starts, or "
        "in limits.conf, systemd's LimitNOFILE or docker's --ulimit nofile"
    )


def _raise_soft_limit(to: int) -> int:
    """The soft limit after the try to raise it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not allowed in this process
        resource.setrlimit(resource.RLIMIT_NOFILE, (to, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
