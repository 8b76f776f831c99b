"""Messages between ranks and the controller; `frames` says how they cross a socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from pytest_dcp._harness.protocol.frames import FrameDecoder, MessageCodec
from pytest_dcp._harness.protocol.group_use import PlainGroups

Phase = Literal["boot", "setup", "call", "teardown", "finish"]
RankOutcome = Literal["passed", "failed", "skipped", "xfailed", "exit", "interrupt"]
Place = Literal["preparing", "ready", "reporting", "failing", "agreed", "interrupted"]
FaultAct = Literal["kill", "pause", "resume", "look"]

MAX_FRAME_BYTES = 1 << 30
"""A longer frame comes from a broken peer and is refused."""
NOT_THERE = -1
"""In `Met.sizes`, for a rank that was not waited for: the test had it killed or stopped."""


class RecordedWarning(TypedDict):
    """A warning, in a form that the controller can issue again."""

    text: str
    category: tuple[str, str]
    """Module and qualified name of its class."""
    filename: str
    lineno: int


@dataclass(frozen=True, slots=True)
class Done:
    """Rank -> controller: how a phase ended here."""

    phase: Phase
    outcome: RankOutcome
    at_s: float
    """CLOCK_MONOTONIC seconds at the end."""
    duration_s: float = 0.0
    is_echo: bool = False
    """Only for a failure: whether the exception itself says that a peer caused it."""
    exception: tuple[str, str] | None = None
    """Module and qualified name of the exception's class."""
    text: str = ""
    """The exception's one-line text, or the reason of a skip, xfail or exit."""
    report: dict[str, Any] | None = None
    """pytest's serialised report, if there is something to show."""
    sections: tuple[tuple[str, str, str], ...] = ()
    """Captured output since the last phase: (when, stdout | stderr | log ..., text)."""
    debug_records: int = 0
    """How many records of the captured log are below INFO, if no log level was set."""
    log_without_debug: str = ""
    """The captured log without these records."""
    properties: tuple[tuple[str, Any], ...] = ()
    """Items that the phase added to user_properties."""
    warnings: tuple[RecordedWarning, ...] = ()
    """Only at an item's teardown: warnings recorded while the item ran; at finish: exit errors."""
    imported: tuple[str, ...] = ()
    """Only at an item's teardown: modules that the rank had to import itself."""
    threads: tuple[str, ...] = ()
    """Only at finish: names of the threads still running."""
    reusable: bool = True
    """Only at an item's teardown: whether a warm world can continue with this rank."""
    xpassed: bool = False
    """Only for a pass: the test added an xfail marker to itself."""
    changed: tuple[str, ...] = ()
    """Only at an item's teardown: process state that the test changed permanently."""
    groups: PlainGroups | None = None
    """Only for a warm world's call or teardown: the item's use of process groups so far, from
    `group_use.to_plain`.
    """
    returncode: int | None = None
    """Of an exit: the session's exit code. Of a process: the code that it would have ended with."""
    awaits: str = ""
    """Only for a call that has not ended: the property whose examples the rank waits for."""
    payload: bytes = b""
    """Pickled: a function's result; a property, as in `lockstep`; at an item's teardown, the data
    that plugins carry to the controller.
    """


@dataclass(frozen=True, slots=True)
class At:
    """Rank -> controller: this rank's place in its phase. No answer.

    `preparing`: it imports modules or collects tests for the phase, which is not timed; `ready`:
    the timed part begins; `reporting`: the phase has raised, and the rank writes the report;
    `failing`: the rank has an error and waits for its peers to receive it; `agreed`: they have
    received it, and the phase continues; `interrupted`: the rank was asked to end the phase, and is
    ending it.
    """

    place: Place
    text: str = ""
    """The preparation, as in "importing torch"; or the exception: its class, then its text."""
    at_s: float = 0.0
    """Only with an exception: CLOCK_MONOTONIC seconds when it was raised."""
    detail: str = ""
    """Only for `failing`: the traceback."""


@dataclass(frozen=True, slots=True)
class SubReport:
    """Rank -> controller: the report of a subtest."""

    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Rank -> controller: meet all ranks at `operation`, bringing a value; wait for `Met`."""

    operation: str
    """Name of the meeting, such as `barrier()`; all ranks must give the same."""
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class DebugAsk:
    """Rank -> controller: may this rank have the terminal? Wait for `DebugAnswer`."""

    reason: str


@dataclass(frozen=True, slots=True)
class DebugDone:
    """Rank -> controller: the terminal is free again."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Rank -> controller: this process is about to end or stop, because the test asked for it."""

    reason: str


@dataclass(frozen=True, slots=True)
class FaultAsk:
    """Rank -> controller: kill, stop or continue a rank; `look` does nothing. Wait for the answer.

    The answer comes when the process has ended, stopped or continued.
    """

    act: FaultAct
    rank: int


@dataclass(frozen=True, slots=True)
class RunItem:
    """Controller -> rank: begin an item's setup; phases follow with `Go`."""

    index: int
    """Index into the session's items at the time of the zygote's fork; -1: find it by name."""
    nodeid: str
    seed: int
    checkpoint_dir: str
    location: tuple[str, int | None, str] | None = None
    """pytest's, of the item: file, line and name. None: the rank finds it out for its reports."""


@dataclass(frozen=True, slots=True)
class Go:
    """Controller -> rank: run this phase."""

    phase: Phase
    next_index: int = -1
    """Only for teardown: the item whose fixtures may stay; -1 for none."""
    next_nodeid: str = ""


@dataclass(frozen=True, slots=True)
class CallFunction:
    """Controller -> rank: run the pickled function in `payload`."""

    seed: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class RunProcess:
    """Controller -> rank: run a process of an unmodified test, for `pytest --dcp-adopt`."""

    index: int
    """As in `RunItem`: the item that started the process."""
    nodeid: str
    seed: int
    payload: bytes = b""
    """A pickled `process_call.ProcessCall`."""


@dataclass(frozen=True, slots=True)
class Example:
    """Controller -> rank: run an example of the property that you wait for.

    `payload` is a pickled `lockstep.Attempt`.
    """

    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Met:
    """Controller -> rank: all ranks met; the payloads' lengths in rank order, or an error.

    Ranks that the test had killed or stopped are not waited for: their length is `NOT_THERE`.
    """

    sizes: tuple[int, ...] = ()
    error: str = ""
    payload: bytes = b""

    def values(self) -> list[bytes | None]:
        """The payload of each rank, in rank order; None for a rank that did not take part."""
        out: list[bytes | None] = []
        start = 0
        for size in self.sizes:
            out.append(None if size == NOT_THERE else self.payload[start : start + size])
            start += max(0, size)
        return out


@dataclass(frozen=True, slots=True)
class DebugAnswer:
    """Controller -> rank: take the terminal, or continue without it; `error` is the reason."""

    granted: bool
    group: int = 0
    """The controller's process group, which may read the terminal."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class FaultAnswer:
    """Controller -> rank: the fault has been applied, or the reason why it cannot be."""

    survivors: tuple[int, ...] = ()
    """Ranks that are neither lost nor stopped, ascending."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Leave:
    """Controller -> rank: exit as an interpreter does, answer `Done("finish")`, end with code 0."""


Up = Done | At | SubReport | Exchange | DebugAsk | DebugDone | Announce | FaultAsk
Down = RunItem | Go | CallFunction | RunProcess | Example | Met | DebugAnswer | FaultAnswer | Leave
Message = Up | Down

_CODEC: MessageCodec[Message] = MessageCodec(
    (
        Done, At, SubReport, Exchange, DebugAsk, DebugDone, Announce, FaultAsk,
        RunItem, Go, CallFunction, RunProcess, Example, Met, DebugAnswer, FaultAnswer, Leave,
    )
)  # fmt: skip


def encode(message: Message) -> bytes:
    """The message as one frame."""
    return _CODEC.encode(message, MAX_FRAME_BYTES)


class Decoder(FrameDecoder[Message]):
    """Bytes as they arrive -> whole messages; one per stream."""

    def __init__(self) -> None:
        super().__init__(_CODEC, MAX_FRAME_BYTES)
