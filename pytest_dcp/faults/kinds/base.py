"""Faults as values, and the faults that can act both at a hook and at an operation.

A fault is a frozen dataclass: it pickles, and its repr is code that makes it again. It defines what
goes wrong; the injection defines where and when. To write your own fault, derive a frozen dataclass
from `Fault` with `before`, `after` or `result`.

>>> Raise(TimeoutError, when="after")
Raise(exception=TimeoutError, when='after')
>>> eval(repr(Hang(limit_s=5.0))) == Hang(limit_s=5.0)
True

The life of one event, for a fault that is due there:

1. `meets(file)`: whether to act on this file. If not, the event does not count.
2. `before(moment)`: raises, waits, ends the process, or returns a `Verdict`: do less, do nothing,
   do something else.
3. The work, as the verdict says.
4. `after(moment)`: raises although the work is done, or spoils its outcome.
5. `result(value, moment)`, of hooks: returns a replacement of the result.

A fault of your own, which turns a save's first sync into a slow one that then fails:

>>> @dataclass(frozen=True, slots=True)
... class SyncTimesOut(Fault):
...     operations = ("sync",)
...     def before(self, moment):
...         time.sleep(0.001)
...         raise TimeoutError(f"at {moment.where}")
>>> from pytest_dcp.faults.storage import FaultyStorage
>>> Path("checkpoint").mkdir(), Path("counts").mkdir()
(None, None)
>>> with FaultyStorage(Path("checkpoint"), Path("counts")) as storage:
...     injected = storage.inject(SyncTimesOut(), on="sync")
...     with open("checkpoint/data", "wb") as file:
...         try:
...             os.fsync(file.fileno())
...         except TimeoutError as error:
...             print(error, injected.fired)
at sync 1
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
    """The gate at which a hung operation waits."""

    def wait(self, limit_s: float) -> None:
        """Wait until the gate is open. Raises TimeoutError after the limit."""


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
    """The operation's file, absolute; None at a hook and if it is not a local file."""
    target: Path | None = None
    """Like `file`, for the new name of a rename or link."""
    room_bytes: int | None = None
    """Free bytes left by a fault with a byte budget; None for other faults."""
    names_before: frozenset[str] = frozenset()
    """For a listing: the names in that folder at the time of the injection; in a store that is not
    a local folder, at its last listing.
    """

    def __str__(self) -> str:
        what = self.where if self.operation is None else str(self.operation)
        return what if "(rank" in what else f"{what} (rank {self.rank})"


class Fault:
    """The base of all faults; does nothing."""

    __slots__ = ()

    level: ClassVar[Level] = "hook"
    """For a fault injected at a hook's name: whether it acts at the hook itself, or at storage
    operations during it.
    """
    operations: ClassVar[tuple[str, ...]] = OPERATION_KINDS
    """The kinds of operations that it can act on."""
    during: ClassVar[tuple[str, ...] | None] = None
    """The subset it acts on if only a hook is named; None: all."""
    has_future: ClassVar[bool] = False
    """Whether it can fail in the future that a hook returns."""

    def meets(self, file: Path | None) -> bool:
        """Whether to act on an operation on this local file, None if it has none."""
        return True

    def before(self, moment: Moment) -> Verdict | None:
        """Act before the work: raise, or return the action that replaces it."""
        return None

    def after(self, moment: Moment) -> None:
        """Act after the work: raise, or damage its result."""

    def result(self, result: Any, moment: Moment) -> Any:
        """The result that a hook returns instead of its own."""
        return result

    def problems(self) -> list[str]:
        """Everything wrong with the fault's own parameters."""
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
    """A failed future of the type that the hook returned. Torch's futures only carry Exceptions."""
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
    """Raises an exception, or an instance of a class with a text that names the place."""

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
    """An exception that holds an object that cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class UnrebuildableError(Exception):
    """An exception that can be pickled but not rebuilt: it does not keep its arguments."""

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
    """Waits until `release()` is called on the injection, in any rank; the end of the test releases
    all. With `when="before"` the work follows.
    """

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
    """Waits for some time before the work is done."""

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
    """A hook does its work and returns its result without the last part: one plan, item, result or
    row is missing.
    """

    operations = ()

    def result(self, result: Any, moment: Moment) -> Any:
        return shorter(result)


def shorter(result: Any) -> Any:
    """The value without its last part; unchanged if it has no parts."""
    import torch
    from torch.distributed.checkpoint.planner import LoadPlan, SavePlan

    if isinstance(result, SavePlan):
        return replace(result, items=list(result.items)[:-1])
    if isinstance(result, LoadPlan):
        return replace(result, items=list(result.items)[:-1])
    if isinstance(result, torch.futures.Future | Future):
        future = type(result)()
        result.wait() if isinstance(result, torch.futures.Future) else result.result()
        future.set_result(shorter(result.value() if hasattr(result, "value") else result.result()))
        return future
    if isinstance(result, tuple) and result:
        return (shorter(result[0]), *result[1:])
    if isinstance(result, dict):
        return dict(list(result.items())[:-1])
    if isinstance(result, torch.Tensor):
        return result[:-1] if result.dim() else result.reshape(1)
    return list(result)[:-1] if hasattr(result, "__len__") else result


class _Process(Fault):
    """Ends or stops the rank's process, after announcing to the world that the test asked
    for it.
    """

    __slots__ = ()

    when: When

    def before(self, moment: Moment) -> Verdict | None:
        if self.when == "before":
            self._announce_and_act(moment)
        return None

    def after(self, moment: Moment) -> None:
        if self.when == "after":
            self._announce_and_act(moment)

    def _announce_and_act(self, moment: Moment) -> None:
        announce(f"{self!r} at {moment}")
        self.act()

    def act(self) -> None:
        """Do it to this process."""
        raise NotImplementedError


def announce(reason: str) -> None:
    """Announce to this rank's world that the rank dies or stops on request.

    Raises RuntimeError in a process that is not a rank: the test session itself would end.
    """
    rank = current_rank()
    if rank is None:
        raise RuntimeError(f"{reason}: this process is no rank of a world, and would end the tests")
    rank.announce_death(reason)


@dataclass(frozen=True, slots=True)
class Kill(_Process):
    """A signal that the process sends to itself; SIGKILL ends it at once."""

    signal: int = int(signals.SIGKILL)
    when: When = "before"

    def __post_init__(self) -> None:
        # The repr of a Signals is not valid code.
        object.__setattr__(self, "signal", int(self.signal))

    def act(self) -> None:
        # To this thread: a signal to the process may be delivered to another thread first.
        signals.raise_signal(self.signal)


@dataclass(frozen=True, slots=True)
class Stop(_Process):
    """The process stops (SIGSTOP) until another process continues it."""

    when: When = "before"

    def act(self) -> None:
        signals.raise_signal(signals.SIGSTOP)


@dataclass(frozen=True, slots=True)
class Exit(_Process):
    """The process exits at once (os._exit), with any code, even that of success."""

    code: int = 0
    when: When = "before"

    def act(self) -> NoReturn:
        os._exit(self.code)
