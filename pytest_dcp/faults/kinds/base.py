"""Faults as values, and those that act wherever they are put: at a hook, or at an operation.

A fault is a frozen dataclass: it pickles, and its repr is code that makes it again. It knows what
goes wrong; where and when is the injection's. A fault of your own is a frozen dataclass below
`Fault` with `before`, `after` or `result`.
"""

from __future__ import annotations

import os
import signal as signals
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Protocol

from pytest_dcp.api import current_rank
from pytest_dcp.faults.tap.operation import OPERATION_KINDS, Operation, Verdict

When = Literal["before", "after", "future"]
"""Instead of the work; after it, as a reply that is lost; in the future that a hook returns."""
WHENS = ("before", "after", "future")

Level = Literal["hook", "operations"]


class Gate(Protocol):
    """What a hung operation waits at."""

    def wait(self, limit_s: float) -> None:
        """Return when the gate is open. Raises TimeoutError after the limit."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where and when a fault acts."""

    where: str
    """The hook as `writer.finish`, or the kind of the operation."""
    rank: int
    gate: Gate
    operation: Operation | None = None
    """None at a hook."""
    file: Path | None = None
    """The operation's file, absolute; None at a hook and where it is no local file."""
    target: Path | None = None
    """As `file`, of the new name of a rename or link."""
    room_bytes: int | None = None
    """What a fault with a budget of bytes leaves free; None for the others."""
    names_before: frozenset[str] = frozenset()
    """Of a listing: the names in that folder at the time of the injection, in a store that is no
    local folder when it was last listed."""

    def __str__(self) -> str:
        what = self.where if self.operation is None else str(self.operation)
        return what if "(rank" in what else f"{what} (rank {self.rank})"


class Fault:
    """What goes wrong. This one does nothing: the base."""

    __slots__ = ()

    level: ClassVar[Level] = "hook"
    """On the name of a hook: acts at the hook itself, or at storage operations made during it."""
    operations: ClassVar[tuple[str, ...]] = OPERATION_KINDS
    """The kinds of operations that it can act on."""
    during: ClassVar[tuple[str, ...] | None] = None
    """Of these, the ones it acts on where only a hook is named; None: all."""
    has_future: ClassVar[bool] = False
    """Whether it can fail in the future that a hook returns."""

    def meets(self, file: Path | None) -> bool:
        """Whether an operation on this local file, None where it is none, is one to act on."""
        return True

    def before(self, moment: Moment) -> Verdict | None:
        """Act before the work: raise, or say what is to happen instead."""
        return None

    def after(self, moment: Moment) -> None:
        """Act when the work is done: raise, or spoil what it left."""

    def result(self, result: Any, moment: Moment) -> Any:
        """What a hook returns instead of its result."""
        return result

    def problems(self) -> list[str]:
        """What is wrong with the fault itself."""
        when = getattr(self, "when", "before")
        allowed = WHENS if self.has_future else WHENS[:2]
        if when not in allowed:
            return [f"{self!r}: when takes {', '.join(allowed)}; got {when!r}"]
        return []


class _Failing(Fault):
    """Raises an exception, in any of the three ways."""

    __slots__ = ()

    has_future = True
    when: When

    def error(self, moment: Moment) -> BaseException:
        """The exception to raise."""
        raise NotImplementedError

    def before(self, moment: Moment) -> Verdict | None:
        if self.when == "before":
            raise self.error(moment)
        return None

    def after(self, moment: Moment) -> None:
        if self.when == "after":
            raise self.error(moment)

    def result(self, result: Any, moment: Moment) -> Any:
        return failed_future(result, self.error(moment)) if self.when == "future" else result


def failed_future(result: Any, error: BaseException) -> Any:
    """A future like the one that the hook returned, which fails. Torch's keeps only Exceptions."""
    if isinstance(result, Future) or not hasattr(result, "wait"):
        future: Future[Any] = Future()
        future.set_exception(error)
        return future
    import torch.futures

    failed: torch.futures.Future[Any] = torch.futures.Future()
    failed.set_exception(error)
    return failed


@dataclass(frozen=True, slots=True)
class Raise(_Failing):
    """Raises an exception, or one of a class with a text that says where."""

    exception: BaseException | type[BaseException] = RuntimeError
    when: When = "before"

    def error(self, moment: Moment) -> BaseException:
        return copy_to_throw(self.exception, moment)

    def __repr__(self) -> str:
        return f"Raise(exception={_describe(self.exception)}, when={self.when!r})"


def copy_to_throw(exception: BaseException | type[BaseException], moment: Moment) -> BaseException:
    """The exception, ready to be raised once more."""
    if isinstance(exception, BaseException):
        return exception.with_traceback(None)
    return exception(f"injected at {moment}")


def _describe(exception: BaseException | type[BaseException]) -> str:
    return exception.__qualname__ if isinstance(exception, type) else repr(exception)


class UnpicklableError(Exception):
    """An exception that holds what no pickle takes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class UnrebuildableError(Exception):
    """An exception that is pickled, and cannot be made again: it does not keep its arguments."""

    def __init__(self, text: str, *, where: str) -> None:
        super().__init__(f"{text} at {where}")


@dataclass(frozen=True, slots=True)
class Unpicklable(_Failing):
    """Raises an exception that cannot be pickled."""

    when: When = "before"

    def error(self, moment: Moment) -> BaseException:
        return UnpicklableError(f"injected at {moment}")


@dataclass(frozen=True, slots=True)
class Unrebuildable(_Failing):
    """Raises an exception that can be pickled, but not unpickled."""

    when: When = "before"

    def error(self, moment: Moment) -> BaseException:
        return UnrebuildableError("injected", where=str(moment))


@dataclass(frozen=True, slots=True)
class LostReply(Fault):
    """The work is done, and then reported to the caller as failed."""

    exception: BaseException | type[BaseException] = ConnectionResetError

    def after(self, moment: Moment) -> None:
        raise copy_to_throw(self.exception, moment)

    def __repr__(self) -> str:
        return f"LostReply(exception={_describe(self.exception)})"


@dataclass(frozen=True, slots=True)
class Hang(Fault):
    """Waits until `release()` is called on the injection, in any rank; the end of the test
    releases all. Then the work is done, or has been."""

    when: When = "before"
    limit_s: float = 60.0
    """After this time without a release the wait raises TimeoutError, and the test fails."""

    def before(self, moment: Moment) -> Verdict | None:
        if self.when == "before":
            moment.gate.wait(self.limit_s)
        return None

    def after(self, moment: Moment) -> None:
        if self.when == "after":
            moment.gate.wait(self.limit_s)


@dataclass(frozen=True, slots=True)
class Slow(Fault):
    """Takes its time before the work is done."""

    seconds: float = 0.1

    def before(self, moment: Moment) -> Verdict | None:
        time.sleep(self.seconds)
        return None


@dataclass(frozen=True, slots=True)
class WrongType(Fault):
    """A hook does its work and returns something else."""

    value: Any = None

    operations = ()

    def result(self, result: Any, moment: Moment) -> Any:
        return self.value


@dataclass(frozen=True, slots=True)
class WrongShape(Fault):
    """A hook does its work and returns the right thing without its last part: one plan, one item,
    one result or one row too few."""

    operations = ()

    def result(self, result: Any, moment: Moment) -> Any:
        return shorter(result)


def shorter(result: Any) -> Any:
    """The value without its last part; as it is where it has no parts."""
    import torch
    from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

    if isinstance(result, SavePlan):
        return replace(result, items=list(result.items)[:-1])
    if isinstance(result, LoadPlan):
        return replace(result, items=list(result.items)[:-1])
    if isinstance(result, torch.futures.Future | Future):
        done = type(result)()
        result.wait() if isinstance(result, torch.futures.Future) else result.result()
        done.set_result(shorter(result.value() if hasattr(result, "value") else result.result()))
        return done
    if isinstance(result, tuple) and result:
        return (shorter(result[0]), *result[1:])
    if isinstance(result, dict):
        return dict(list(result.items())[:-1])
    if isinstance(result, torch.Tensor):
        return result[:-1] if result.dim() else result.reshape(1)
    return list(result)[:-1] if hasattr(result, "__len__") else result


class _Process(Fault):
    """Ends or stops the rank's process, and tells the world that this was asked for."""

    __slots__ = ()

    when: When

    def before(self, moment: Moment) -> Verdict | None:
        if self.when == "before":
            self._announced(moment)
        return None

    def after(self, moment: Moment) -> None:
        if self.when == "after":
            self._announced(moment)

    def _announced(self, moment: Moment) -> None:
        announce(f"{self!r} at {moment}")
        self.act()

    def act(self) -> None:
        """Do it to this process."""
        raise NotImplementedError


def announce(reason: str) -> None:
    """Tell the world of this rank that it dies, or stops, because it was asked to.

    Raises RuntimeError in a process that is no rank: the test session itself would end.
    """
    rank = current_rank()
    if rank is None:
        raise RuntimeError(f"{reason}: this process is no rank of a world, and would end the tests")
    rank.announce_death(reason)


@dataclass(frozen=True, slots=True)
class Kill(_Process):
    """A signal that the process sends itself; SIGKILL ends it on the spot."""

    signal: int = int(signals.SIGKILL)
    when: When = "before"

    def __post_init__(self) -> None:
        # The repr of a Signals is no code.
        object.__setattr__(self, "signal", int(self.signal))

    def act(self) -> None:
        # Of the thread itself: a signal to the process may reach another one first.
        signals.raise_signal(self.signal)


@dataclass(frozen=True, slots=True)
class Stop(_Process):
    """The process stands still (SIGSTOP) until somebody lets it go on."""

    when: When = "before"

    def act(self) -> None:
        signals.raise_signal(signals.SIGSTOP)


@dataclass(frozen=True, slots=True)
class Exit(_Process):
    """The process leaves at once (os._exit), with a code that may even mean success."""

    code: int = 0
    when: When = "before"

    def act(self) -> NoReturn:
        os._exit(self.code)
