"""Pure (no I/O): how ranks send a failure to each other, and the error that every rank raises.

On the failed rank an exception becomes a `Cause`: its text, its stack, and the data to rebuild it,
if that is plain (see `carried_error`). Causes reach every rank, and each raises one `StepError` for
them. It holds exceptions rebuilt from the causes, on the failed rank too, so it reads the same on
all ranks. On the failed rank the original exception is its `__cause__`, unless it is explained (see
`pytest_dcp.tracebacks`): then the text says everything, and the exception is its `__context__`.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.api import CheckpointException

from pytest_dcp._engine.coordinate.carried_error import CarriedError, carry, is_whole, rebuild
from pytest_dcp._engine.coordinate.error_class import bare, combine_classes, facts_of, shared_class
from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp.errors import CheckpointError, DcpError
from pytest_dcp.rank_names import ranks_text
from pytest_dcp.tracebacks import is_explained_at, set_cause, without_ours

Wrapped = tuple[BaseException, traceback.StackSummary]
"""torch's WRAPPED_EXCEPTION."""

MAX_TEXT = 64 * 1024
NAMED_ON_FIRST_LINE = 3
OWN_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep


class CoordinationError(CheckpointError):
    """Ranks could not run an operation together."""


class RankEndedError(CoordinationError):
    """A rank's process ended, or it closed its connection, before the operation was over."""


class RankLeftError(CoordinationError):
    """A rank left the operation before its last step."""


class RankSilentError(CoordinationError):
    """A rank sent no sign of life for the group's timeout."""


class OutOfStepError(CoordinationError):
    """Ranks run different operations or different steps."""


class PeerAborted(CoordinationError):
    """Another rank failed, so this rank's work is in vain; raised by `Team.check`.

    A rank whose work raises it has not failed itself: no list of failures names it.
    """


class RemoteError(CheckpointError):
    """Stands for an exception of another rank that cannot be rebuilt here from plain data."""

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(type_name, text)
        self.type_name = type_name
        """Module and name of the exception's class."""
        self.text = text
        """As in the last lines of its traceback."""

    def __str__(self) -> str:
        return self.text


class StepError(CheckpointException, CheckpointError):
    """A step of an operation failed: on which ranks, and why. The same on every rank.

    It is an instance of torch's CheckpointException, of Exception, and of the most derived class
    that the exceptions of all failed ranks have in common: of OSError if each failed rank raised
    one. It has the attributes (`errno`, `missing`) of the lowest failed rank's exception.
    """

    __module__ = "pytest_dcp.checkpoint"
    """The module from which users import it; tracebacks and pickles name it."""

    def __new__(cls, step: str, failures: Mapping[int, Wrapped], *_: object) -> StepError:
        cause = shared_class([error for error, _ in failures.values()], current=cls)
        if cause in (RemoteError, PeerAborted):
            cause = None  # these only represent another exception
        instance: StepError = bare(cls if cause is None else combine_classes(cls, cause))
        return instance

    def __init__(
        self, step: str, failures: Mapping[int, Wrapped], operation: str = "operation"
    ) -> None:
        # Not by super(): the cause's class is next in the MRO, and takes other arguments.
        BaseException.__init__(self, step, dict(failures))
        first = min(failures, default=None)
        if first is not None and hasattr(self, "made_for"):
            self._take_facts(failures[first][0])
        self._failures = dict(failures)
        self.step = step
        self.operation = operation

    def _take_facts(self, cause: BaseException) -> None:
        for name, value in facts_of(cause):
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                setattr(self, name, value)

    def __reduce__(self) -> tuple[Callable[..., StepError], tuple[object, ...], dict[str, object]]:
        state = {k: v for k, v in self.__dict__.items() if k != "_failures"}
        return StepError, (self.step, self.failures, self.operation), state

    def __str__(self) -> str:
        merged = _merge_equal(self.failures)
        headlines = "; ".join(
            f"{ranks}: {_headline(wrapped[0])}" for ranks, wrapped in merged[:NAMED_ON_FIRST_LINE]
        )
        more = len(merged) - NAMED_ON_FIRST_LINE
        rest = f"; and {more} more" if more > 0 else ""
        lines = [f"step {self.step!r} of {self.operation} failed on {headlines}{rest}"]
        alone = len(merged) == 1
        for nth, (ranks, wrapped) in enumerate(merged):
            lines += _details(ranks, wrapped, on_first_line=nth < NAMED_ON_FIRST_LINE, alone=alone)
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Cause:
    """One rank's failure, as ranks send it."""

    rank: int
    """In the group."""
    type_name: str
    text: str
    frames: tuple[tuple[str, int, str, str], ...]
    """File, line, function and source line, outermost first, without this package's own."""
    error: CarriedError | None = None
    """The data to rebuild the exception; None: only its text is known."""
    nested: tuple[Cause, ...] = ()
    """For a StepError, from an operation within this one: its causes ..."""
    step: tuple[str, str] | None = None
    """... its step and its operation."""

    def summary(self) -> str:
        """One line: the rank, and the first line of the exception."""
        line = self.text.partition("\n")[0]
        return f"rank {self.rank}: {line.removeprefix(_module_of(self.type_name))}"

    def rebuild(self) -> Wrapped:
        """The exception and its stack; a RemoteError if the exception cannot be rebuilt here."""
        return _rebuild(self), traceback.StackSummary.from_list(list(self.frames))


record(Cause)


def capture(rank: int, error: BaseException) -> Cause:
    """The cause for an exception of this rank."""
    return _capture_cause(rank, error, traceback.extract_tb(error.__traceback__))


def _capture_cause(rank: int, error: BaseException, stack: traceback.StackSummary) -> Cause:
    found: tuple[CarriedError | None, tuple[Cause, ...], tuple[str, str] | None]
    if isinstance(error, StepError):
        inner = tuple(_capture_cause(at, *wrapped) for at, wrapped in error.failures.items())
        found = None, inner, (error.step, error.operation)
    else:
        found = carry(error), (), None
    return Cause(rank, _name_of(error), _text_of(error)[:MAX_TEXT], _frames_of(stack), *found)


def checked_cause(value: object) -> Cause:
    """The cause that another rank sent. Raises ValueError for anything else."""
    if not isinstance(value, Cause) or not _is_whole(value):
        raise ValueError(f"expected the cause of a failure, got {value!r:.200}")
    return value


def _is_whole(cause: Cause) -> bool:
    texts = (cause.type_name, cause.text, *(cause.step or ()))
    frames, nested = cause.frames, cause.nested
    return (
        type(cause.rank) is int
        and {str}.issuperset(map(type, texts))
        and (cause.step is None or len(cause.step) == 2)
        and {tuple}.issuperset(map(type, (frames, nested)))
        and all(tuple(map(type, frame)) == (str, int, str, str) for frame in frames)
        and (cause.error is None or is_whole(cause.error))
        and all(isinstance(inner, Cause) and _is_whole(inner) for inner in nested)
    )


def step_error(
    step: str, operation: str, causes: Iterable[Cause], raised: BaseException | None = None
) -> StepError:
    """The exception that every rank raises for these causes; `raised` is this rank's own."""
    ordered = sorted(causes, key=lambda cause: cause.rank)
    error = StepError(step, {cause.rank: cause.rebuild() for cause in ordered}, operation)
    set_cause(error, raised)
    return error


def is_echo(error: BaseException) -> bool:
    """Whether an exception only passes on that another rank failed (see PeerAborted)."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, PeerAborted):
            return True
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def _frames_of(summary: traceback.StackSummary) -> tuple[tuple[str, int, str, str], ...]:
    frames = [(f.filename, f.lineno or 0, f.name, f.line or "") for f in summary]
    return tuple(frame for frame in frames if not frame[0].startswith(OWN_FOLDER))


def _text_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(error)).rstrip()
    except Exception as broken:  # noqa: BLE001 - an exception's __str__ may raise anything
        return f"{type(error).__name__} (its text cannot be had: {type(broken).__name__})"


def _rebuild(cause: Cause) -> BaseException:
    if cause.step is not None:
        step, operation = cause.step
        return StepError(step, {inner.rank: inner.rebuild() for inner in cause.nested}, operation)
    error: BaseException | None = None
    if cause.error is not None:
        with contextlib.suppress(Exception):  # the class may be another one on this rank
            error = rebuild(cause.error)
    return RemoteError(cause.type_name, cause.text) if error is None else error


def _headline(error: BaseException) -> str:
    name = error.type_name if isinstance(error, RemoteError) else _name_of(error)
    text = error.text if isinstance(error, RemoteError) else _text_of(error)
    return text.partition("\n")[0].removeprefix(_module_of(name))


def _name_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _module_of(type_name: str) -> str:
    """The prefix of a class's name in a traceback; a qualified name may itself contain dots."""
    return type_name.removesuffix(type_name.rpartition(".")[2])


def _details(ranks: str, wrapped: Wrapped, *, on_first_line: bool, alone: bool) -> list[str]:
    """The lines about a failure after the first line.

    on_first_line: whether the first line names it.

    For an explained failure its further lines; for any other its traceback.
    """
    error, stack = wrapped
    if not _is_explained(error, stack):
        return [f"{ranks}: {_traceback_text(wrapped)}"]
    _, *more = _text_of(error).splitlines() or [""]
    if not on_first_line:
        return [f"{ranks}: {_headline(error)}", *more]
    return more if alone or not more else [f"{ranks}:", *more]


def _is_explained(error: BaseException, stack: Sequence[traceback.FrameSummary]) -> bool:
    ours = isinstance(error, DcpError | CheckpointException) and not isinstance(error, RemoteError)
    return ours or is_explained_at(error, stack)


def _traceback_text(wrapped: Wrapped) -> str:
    error, stack = wrapped
    frames = traceback.StackSummary.from_list(without_ours(stack))
    return f"Traceback (most recent call last):\n{''.join(frames.format())}{_text_of(error)}"


def _merge_equal(failures: Mapping[int, Wrapped]) -> list[tuple[str, Wrapped]]:
    """Join failures with the same text and stack, and list the ranks of each."""
    merged: dict[str, tuple[list[int], Wrapped]] = {}
    for rank, wrapped in sorted(failures.items()):
        merged.setdefault(_traceback_text(wrapped), ([], wrapped))[0].append(rank)
    return [(ranks_text(ranks), wrapped) for ranks, wrapped in merged.values()]
