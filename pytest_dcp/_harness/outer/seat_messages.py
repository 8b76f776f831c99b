"""Messages between the controller and its seats, and the theory of sessions under a launcher.

An outer launcher (torchrun, srun, mpirun) starts `n` processes, and each runs pytest. Each of them
collects the suite and becomes a **seat**: a place for one rank of each world. Outer rank 0 is the
**controller** as well: it runs the session as on one machine, with the same items, supervisor and
reports, but has rank `r` of a world started by seat `r`, as a fork of that seat's own zygote. So a
test has new ranks, a rank that dies or hangs is killed alone, and the launcher's own processes live
on. A world of fewer ranks takes the first seats; tests that ask for more are deselected.

    controller (outer rank 0)                        seat r (outer rank r)
    -------------------------                        ---------------------
    collects; forks its zygote                       collects; forks its zygote
    publishes address and token at the store ------> reads them
                                          <--------- SeatJoin: its collection, machine, clock ...
    compares the collections
    ClockAsk, some times                  <--------> ClockReply
                                          <--------- SeatReady: its zygote can fork
    for each world, for each rank of it:
    LaunchRank                            ---------> forks a rank
    ToRank, SignalRank                    ---------> passes on what the supervisor sends
                                          <--------- FromRank, RankClosed, RankFile, RankActivity,
                                                     RankStopped, RankEnded
    ForgetWorld                           ---------> closes its files
    the report is written
    Verdict: the exit code                ---------> ends its session, waits for the end of the
    exits                                            connection, exits with the same code

A rank's bytes pass through unread: the controller's end of a rank is the same socket pair and
memory files as for a rank on this machine (`world.rank_handle`), and a thread (`seat_hub`) copies
between them and the seats' connections. Seat 0 is a thread of the controller, with a socket pair
for its connection, so all seats are alike.

Rules: the messages of one rank keep their order, `RankFile` and then `RankEnded` come last. The
order of exits is fixed: seats leave only after the controller's process has ended, so that a
launcher that kills all ranks when one exits with a code other than 0 finds the report written.

A process that dies leaves:

- a rank (of a world): its seat reaps it and sends RankEnded; the test fails as on one machine.
- a seat before SeatJoin: the controller waits `JOIN_S` at most, unless the launcher ends it first.
  A rank that could not collect joins all the same, and says why (`problem`).
- a seat after SeatJoin: its connection ends, or its machine does not answer for `UNANSWERED_S`.
  Its ranks count as ended, so the running test fails and names the seat; after that test the
  session ends. The kernel kills the seat's zygote and ranks with it.
- the controller: the connections end without a Verdict. Every seat kills its ranks and exits with
  `CONTROLLER_LOST_CODE`; outer rank 1 says why.
- the launcher's agent: it kills its processes; with SIGTERM the controller ends the session as
  after Ctrl-C, so the report is written. Meanwhile the seats wait for the verdict.

Waits are bounded: joining by `JOIN_S`, a phase by the supervisor, the end by `CONCLUDE_S`. A seat
waits for the next order as long as its connection lives.

A frame is two big-endian u32 lengths, a JSON list of the message's name and fields, and raw bytes.
Only a process that knows the token, which the store has, can join; so a process that can read the
launcher's store can take part, as in torch's own rendezvous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pytest_dcp._harness.protocol.frames import FrameDecoder, MessageCodec

JOIN_S = 600.0
"""How much later than the first rank the last may have collected: a slow disk takes minutes."""
CONCLUDE_S = 10.0
UNANSWERED_S = 20
"""Seconds without an answer of the other machine's kernel, after which a connection is lost."""
CONTROLLER_LOST_CODE = 2
"""pytest.ExitCode.INTERRUPTED."""

SignalAct = Literal["stacks", "interrupt", "kill", "pause", "resume"]
MAX_FRAME_BYTES = 1 << 30
MAX_STRANGER_BYTES = 64 << 20
"""Of a connection that has not joined: a collection of some 100,000 tests fits."""


@dataclass(frozen=True, slots=True)
class SeatJoin:
    """Seat -> controller: the first message."""

    token: str
    rank: int
    node: str
    """Equal for the seats of one node."""
    machine: str
    """Equal for processes that share a kernel, and so a clock."""
    name: str
    """For people: process id and host."""
    tests: tuple[tuple[str, str], ...] = ()
    """Each collected test's nodeid, and its world in words; empty without one."""
    problem: str = ""
    """Why its session has failed before the first test."""
    sees_folder: bool = True
    """Whether it sees the controller's temporary folder."""
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class ClockAsk:
    """Controller -> seat: answer at once."""

    sent_s: float


@dataclass(frozen=True, slots=True)
class ClockReply:
    """Seat -> controller: CLOCK_MONOTONIC there, and the question's own time."""

    sent_s: float
    here_s: float


@dataclass(frozen=True, slots=True)
class SeatReady:
    """Seat -> controller: ranks can be started at once."""


@dataclass(frozen=True, slots=True)
class SeatNote:
    """Seat -> controller: a line for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class LaunchRank:
    """Controller -> seat: start a rank."""

    order: str
    """A `RankLaunch` as JSON."""


@dataclass(frozen=True, slots=True)
class ToRank:
    """Controller -> seat: bytes for a rank's socket."""

    world: int
    rank: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class SignalRank:
    """Controller -> seat: signal a rank."""

    world: int
    rank: int
    act: SignalAct


@dataclass(frozen=True, slots=True)
class Preload:
    """Controller -> seat: later ranks are likely to import these modules."""

    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ForgetWorld:
    """Controller -> seat: the world is gone."""

    world: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Controller -> seat: the session is over; end with this exit code."""

    code: int


@dataclass(frozen=True, slots=True)
class FromRank:
    """Seat -> controller: bytes that a rank has sent."""

    world: int
    rank: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class RankClosed:
    """Seat -> controller: a rank's socket reached its end."""

    world: int
    rank: int


@dataclass(frozen=True, slots=True)
class RankFile:
    """Seat -> controller: one of a rank's memory files, as it is now."""

    world: int
    rank: int
    name: str
    """out, err, trace or draws."""
    size: int
    tail: int = 0
    """How many of the payload's bytes are the file's end; those before are its beginning."""
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class RankActivity:
    """Seat -> controller: whether a rank works, and its main thread's processor time."""

    world: int
    rank: int
    at_work: bool
    cpu_s: float


@dataclass(frozen=True, slots=True)
class RankStopped:
    """Seat -> controller: a rank was stopped, or goes on."""

    world: int
    rank: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class RankEnded:
    """Seat -> controller: a rank's process has ended, or could not be started."""

    world: int
    rank: int
    status: int
    leaked_processes: tuple[str, ...] = ()
    how: str = ""


SeatMessage = (
    SeatJoin | ClockAsk | ClockReply | SeatReady | SeatNote | LaunchRank | ToRank | SignalRank
    | Preload | ForgetWorld | Verdict | FromRank | RankClosed | RankFile | RankActivity
    | RankStopped | RankEnded
)  # fmt: skip
RANK_FILES = ("out", "err", "trace", "draws")

_CODEC: MessageCodec[SeatMessage] = MessageCodec(SeatMessage.__args__)


def encode_seat_message(message: SeatMessage) -> bytes:
    """The message as one frame."""
    return _CODEC.encode(message, MAX_FRAME_BYTES)


class SeatDecoder(FrameDecoder[SeatMessage]):
    """Bytes as they arrive -> whole messages. One for each connection."""

    def __init__(self, most_bytes: int = MAX_FRAME_BYTES) -> None:
        super().__init__(_CODEC, most_bytes)
