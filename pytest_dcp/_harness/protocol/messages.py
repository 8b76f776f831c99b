"""Messages between ranks and the controller, and the wire codec.

Enters: message values. Leaves: frames on a stream socket, and back. A frame is two big-endian
u32 lengths, a JSON object, and raw bytes:

    u32 json_bytes | u32 payload_bytes | json | payload

The JSON names the message's class and its fields, except fields with their default; only `payload`
is binary, and only its receiver unpickles it. A frame that does not decode, or whose fields are not
of the types that the class names, is a `WireError`. Bytes that cannot begin a frame are refused
before the rest arrives.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, get_type_hints

from pytest_dcp._harness.protocol.group_use import PlainGroups
from pytest_dcp._harness.protocol.typed_json import Read, reader_for
from pytest_dcp.errors import DcpError

Phase = Literal["boot", "setup", "call", "teardown", "finish"]
RankOutcome = Literal["passed", "failed", "skipped", "xfailed", "exit", "interrupt"]
Place = Literal["preparing", "ready", "reporting", "failing", "agreed", "interrupted"]
FaultAct = Literal["kill", "pause", "resume", "look"]

HEADER = struct.Struct(">II")
OPENING = b'["'
"""The beginning of every frame's JSON."""
PLAIN_DEPTH = 50
"""pytest's reports nest to about 10."""
MAX_FRAME_BYTES = 1 << 30
"""A longer frame comes from a broken peer and is refused."""
SHOWN_BYTES = 80
"""Bytes shown in an error about something that is not a message."""
NOT_THERE = -1
"""In `Met.sizes`, for a rank that was not waited for: the test had it killed or stopped."""


class WireError(DcpError):
    """Bytes that are not one of our messages."""


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

_CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Done, At, SubReport, Exchange, DebugAsk, DebugDone, Announce, FaultAsk,
        RunItem, Go, CallFunction, RunProcess, Example, Met, DebugAnswer, FaultAnswer, Leave,
    )
}  # fmt: skip
# Looked up once: a test in a world of four costs two dozen frames.
_DEFAULTS = {cls: [(f.name, f.default) for f in fields(cls)] for cls in _CLASSES.values()}
_READERS: dict[type[Any], dict[str, Read]] = {
    cls: {
        name: reader_for(annotation)
        for name, annotation in get_type_hints(cls).items()
        if name != "payload"
    }
    for cls in _CLASSES.values()
}
_ENCODER = json.JSONEncoder(default=repr)


def encode(message: Message) -> bytes:
    """The message as one frame."""
    body: dict[str, Any] = {
        name: value
        for name, default in _DEFAULTS[type(message)]
        if (value := getattr(message, name)) is not default
    }
    payload: bytes = body.pop("payload", b"")
    name = type(message).__name__
    try:
        text = _ENCODER.encode([name, body]).encode("ascii")
    except (TypeError, ValueError, RecursionError):  # a test's own values: odd keys, a cycle
        text = json.dumps([name, _plain(body)]).encode("ascii")
    if len(text) + len(payload) > MAX_FRAME_BYTES:
        raise WireError(
            f"a {type(message).__name__} of {len(text) + len(payload)} bytes is longer than "
            f"{MAX_FRAME_BYTES}"
        )
    return HEADER.pack(len(text), len(payload)) + text + payload


def _plain(value: Any, depth: int = 0) -> Any:
    """The value in a form that JSON can carry; other values, and too deeply nested ones, as their
    repr.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if depth < PLAIN_DEPTH:
        if isinstance(value, dict):
            return {
                key if isinstance(key, str) else repr(key): _plain(part, depth + 1)
                for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            return [_plain(part, depth + 1) for part in value]
    try:
        return repr(value)
    except Exception as exc:  # noqa: BLE001 - user code: any exception only becomes text here
        return f"<{type(value).__name__} whose repr raised {type(exc).__name__}>"


@dataclass(slots=True)
class Decoder:
    """Bytes as they arrive -> whole messages. Sans-I/O; one per stream."""

    buffer: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[Message]:
        """The messages completed by `data`. Raises `WireError` on anything else."""
        self.buffer += data
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def _take(self) -> Message | None:
        if len(self.buffer) < HEADER.size:
            return None
        text_bytes, payload_bytes = HEADER.unpack_from(self.buffer)
        if text_bytes + payload_bytes > MAX_FRAME_BYTES:
            raise WireError(f"a frame claims {text_bytes + payload_bytes} bytes")
        opening = self.buffer[HEADER.size : HEADER.size + len(OPENING)]
        if text_bytes < len(OPENING) or not OPENING.startswith(opening):
            raise WireError(f"not the beginning of a message: {bytes(self.buffer[:SHOWN_BYTES])!r}")
        end = HEADER.size + text_bytes + payload_bytes
        if len(self.buffer) < end:
            return None
        text = bytes(self.buffer[HEADER.size : HEADER.size + text_bytes])
        payload = bytes(self.buffer[HEADER.size + text_bytes : end])
        del self.buffer[:end]
        return _build(text, payload)


def _build(text: bytes, payload: bytes) -> Message:
    try:
        name, body = json.loads(text.decode())
        cls = _CLASSES[name]
        readers = _READERS[cls]
        values = {key: readers[key](value) for key, value in body.items()}
        message: Message = cls(**values, payload=payload) if payload else cls(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise WireError(f"not a message: {text[:SHOWN_BYTES]!r}: {exc!s:.200}") from exc
    return message
