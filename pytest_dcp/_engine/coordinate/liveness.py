"""How ranks notice that another has ended, left or fallen silent: signs of life. Pure (no I/O).

Theory of operation. During an operation each peer has one connection to the coordinator. The signs
that a rank takes no further part, the quickest first:

    sign                                                   who sees it              module
    the kernel closes a dead process's connection          both ends, at once       connection
    BYE, or FAILED: the rank has left, or gave up          both ends, at once       connection
    an idle connection of an earlier operation breaks      the coordinator          peer_listener
    its process is gone, or torchrun wrote its error file  ranks that wait for it   presence
    nothing listens at its address, or at gloo's           ranks that wait for it   probe
    it is silent for the timeout                           ranks that wait for it   here

The first three need a connection, and the next two are for ranks that have not joined
(`unjoined_ranks` asks for them). Silence is the last resort: a process that is stopped or hangs
keeps its connections. So that work is not mistaken for silence, a busy rank and a waiting
coordinator send PING every `ping_s`.

A peer waits for a silent coordinator `margin_s` longer than the coordinator does for a peer: the
coordinator's verdict then arrives first, and says more.

`coordinator_state` and `peer_state` decide what follows from a sign. Assumes one clock per process;
times of different ranks are never compared.

>>> signs = SignsOfLife(timeout_s=60)
>>> signs.ping_s, signs.margin_s
(10.0, 5.0)
>>> signs.is_silent(100.0, heard_s=50.0), signs.is_silent(111.0, heard_s=50.0)
(False, True)
"""

from __future__ import annotations

from dataclasses import dataclass

PINGS_PER_TIMEOUT = 4
"""More than one, so that a late ping does not look like silence."""


@dataclass(frozen=True, slots=True)
class SignsOfLife:
    """When a rank must show one, and when the lack of them is a failure."""

    timeout_s: float
    """Silence for longer than this is a failure."""

    @property
    def ping_s(self) -> float:
        """How often a waiting coordinator, and a busy rank, shows that it is alive."""
        return min(10.0, self.timeout_s / PINGS_PER_TIMEOUT)

    @property
    def margin_s(self) -> float:
        """How much longer a peer waits than the coordinator, whose verdict says more."""
        return min(5.0, 0.5 + 0.1 * self.timeout_s)

    def is_silent(self, now: float, *, heard_s: float, since_s: float = 0.0) -> bool:
        """Whether a rank that was last heard at `heard_s` counts as silent.

        Silence begins at `since_s` at the earliest, when this rank began to wait: before that the
        other may have had nothing to send.
        """
        return now - max(since_s, heard_s) > self.timeout_s

    def must_ping(self, now: float, *, said_s: float) -> bool:
        """Whether this rank, which last sent something at `said_s`, must show that it is alive."""
        return now - said_s > self.ping_s
