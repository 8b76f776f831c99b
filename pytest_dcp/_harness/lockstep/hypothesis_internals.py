"""Parts of Hypothesis beyond its public API that lockstep needs: in the ranks, and in both
processes.

See `hypothesis_stand_in` for the controller.

This module can go when Hypothesis lets a caller choose the example to run, and reports its draws.
`missing_internals` lists the internals that a version built differently lacks; see
`hypothesis_version`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from random import Random
from typing import Any, ClassVar, NoReturn, Protocol

import hypothesis
from hypothesis import core
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.internal.conjecture import providers
from hypothesis.internal.conjecture.data import ConjectureData, DataObserver
from hypothesis.internal.conjecture.data import Status as Ended
from hypothesis.internal.entropy import RANDOMS_TO_MANAGE, deterministic_PRNG
from hypothesis.internal.escalation import InterestingOrigin, get_trimmed_traceback
from hypothesis.internal.reflection import function_digest
from hypothesis.reporting import with_reporter

from pytest_dcp._harness.lockstep.example_messages import (
    Attempt,
    Property,
    Status,
)

STATUSES: dict[Ended, Status] = {
    Ended.VALID: "valid",
    Ended.INVALID: "invalid",
    Ended.OVERRUN: "overrun",
    Ended.INTERESTING: "interesting",
}
SETTINGS = (
    "max_examples", "derandomize", "database", "verbosity", "phases", "stateful_step_count",
    "report_multiple_bugs", "suppress_health_check", "deadline",
)  # fmt: skip
"""Attributes of a test that its stand-in copies."""
REASON_KEYS = ("gave up because", "invalid because")
"""The event that says why an example was rejected; the second before Hypothesis 6.168."""
PRINTS = next(
    (
        name
        for name in ("print_test_case", "print_example")
        if name in inspect.signature(core.StateForActualGivenExecution.execute_once).parameters
    ),
    "print_test_case",
)
"""The parameter by which an example prints itself; renamed in Hypothesis 6.167."""


def missing_internals() -> str:
    """Internals missing from the installed Hypothesis; empty if it is built like the known
    versions.
    """
    parameters: list[tuple[Any, set[str]]] = [
        (core.StateForActualGivenExecution.execute_once, {"data", PRINTS, "is_final"}),
        (core.StateForActualGivenExecution.run_engine, {"self"}),
        (ConjectureData.__init__, {"random", "observer", "provider", "prefix", "max_choices"}),
        (providers.HypothesisProvider.span_end, {"discard"}),
        (DataObserver.draw_integer, {"value", "constraints", "was_forced"}),
        (function_digest, {"function"}),
    ]
    for function, names in parameters:
        missing = names - inspect.signature(function).parameters.keys()
        if missing:
            return f"parameter {', '.join(sorted(missing))} of {function.__qualname__}"
    if getattr(core, "deterministic_PRNG", None) is not deterministic_PRNG:
        return "hypothesis.core.deterministic_PRNG"
    return ""


@contextlib.contextmanager
def begin_examples_with(begin: Callable[[], None]) -> Iterator[None]:
    """In this block each example starts by calling `begin`, and random generators are not restored.

    Hypothesis would save, seed and restore them for each example, which takes a fifth of the time
    of a small one.
    """

    @contextlib.contextmanager
    def begun(seed: int = 0) -> Iterator[None]:
        begin()
        yield

    vars(core)["deterministic_PRNG"] = begun  # no hook for it
    try:
        yield
    finally:
        vars(core)["deterministic_PRNG"] = deterministic_PRNG


@contextlib.contextmanager
def _seed_examples() -> Iterator[None]:
    """In this block each example starts with all generators registered with Hypothesis seeded.

    Their states are restored at its end, including generators that an example registers.
    """
    with deterministic_PRNG():
        keys = set(RANDOMS_TO_MANAGE)
        late: dict[int, Any] = {}

        def begin() -> None:
            for key, one in list(RANDOMS_TO_MANAGE.items()):
                if key not in keys:
                    keys.add(key)
                    late[key] = one.getstate()
                one.seed(0)

        try:
            with begin_examples_with(begin):
                yield
        finally:
            for key, state in late.items():
                if (one := RANDOMS_TO_MANAGE.get(key)) is not None:
                    one.setstate(state)


class DrawRecord(Protocol):
    """The record to which a rank writes its draws."""

    def choice(self, kind: str, constraints: Mapping[str, Any], value: Any, forced: bool) -> None:
        """A choice; see `messages.Choice`."""

    def span(self, mark: int | bool) -> None:
        """The start of a span, given its label, or the end, given whether to discard it."""


class _Observer(DataObserver):
    """Records every choice of an example."""

    def __init__(self, record: DrawRecord) -> None:
        self._record = record

    def draw_integer(self, value: int, *, constraints: Any, was_forced: bool) -> None:
        """A choice of Hypothesis' observers."""
        self._record.choice("integer", constraints, value, was_forced)

    def draw_float(self, value: float, *, constraints: Any, was_forced: bool) -> None:
        """See `draw_integer`."""
        self._record.choice("float", constraints, value, was_forced)

    def draw_string(self, value: str, *, constraints: Any, was_forced: bool) -> None:
        """See `draw_integer`."""
        self._record.choice("string", constraints, value, was_forced)

    def draw_bytes(self, value: bytes, *, constraints: Any, was_forced: bool) -> None:
        """See `draw_integer`."""
        self._record.choice("bytes", constraints, value, was_forced)

    def draw_boolean(self, value: bool, *, constraints: Any, was_forced: bool) -> None:
        """See `draw_integer`."""
        self._record.choice("boolean", constraints, value, was_forced)


class _Provider(providers.HypothesisProvider):
    """Hypothesis' own source of choices, the same in every rank, which also records spans.

    The choices include constants of the user's code, but only of modules imported before the ranks
    started: a rank may import modules that another does not.
    """

    _local_constants: ClassVar[Any] = None

    def __init__(self, data: ConjectureData, /, *, record: DrawRecord) -> None:
        super().__init__(data)
        self._record = record

    def span_start(self, label: int, /) -> None:
        """A hook of Hypothesis' providers."""
        self._record.span(label)

    def span_end(self, discard: bool, /) -> None:
        """A hook of Hypothesis' providers."""
        self._record.span(discard)


def freeze_constants() -> None:
    """Keep constants of later imports out of the choices of this process and its forks."""
    if _Provider._local_constants is None:
        _Provider._local_constants = providers._get_local_constants()


def data_to_draw_from(attempt: Attempt, record: DrawRecord) -> ConjectureData:
    """The data from which a rank draws an attempt's example, recording each draw."""
    return ConjectureData(
        random=None if attempt.seed is None else Random(attempt.seed),
        observer=_Observer(record),
        provider=_Provider,
        provider_kw={"record": record},
        prefix=attempt.prefix,
        max_choices=attempt.max_choices,
    )


class Followed(core.StateForActualGivenExecution):
    """A property in a rank: the controller's engine replaces its own."""

    follow: ClassVar[Callable[[Followed], None]]
    meet: ClassVar[Callable[[], None]]
    """Meets all ranks, and renews everything for an example; collective."""

    def __init__(self, stuff: Any, test: Any, settings: Any, random: Any, *args: Any, **kw: Any):
        # After the first failure a rank must not go on to the next explicit example: its peers wait
        # in the first. And one rank's time says nothing about the world's.
        local = hypothesis.settings(settings, deadline=None, report_multiple_bugs=False)
        super().__init__(stuff, test, local, random, *args, **kw)
        self.own_settings = settings
        self.led = False
        """Whether the controller leads."""

    def execute_once(self, data: Any, **kw: Any) -> Any:
        """Run one example; if the ranks run it without the engine, they run it simultaneously."""
        __tracebackhide__ = True
        execute: Any = super().execute_once
        if self.led:
            return execute(data, **kw)
        type(self).meet()
        try:
            result = execute(data, **kw)
        except Exception as exc:  # noqa: BLE001 - raised on
            raise trim(exc)  # noqa: B904 - it is the same exception
        if kw.get("example_kwargs") is None:
            # Only some ranks may reproduce it: no rank must claim before then that it was not.
            type(self).meet()
        return result

    def run_example(self, data: ConjectureData, *, final: bool) -> Any:
        """Run the example of these data; a final one prints itself."""
        __tracebackhide__ = True
        return self.execute_once(data, is_final=final, **{PRINTS: final})

    def run_engine(self) -> None:
        """Follow the controller's engine."""
        __tracebackhide__ = True
        self.led = True
        # The controller reports an engine that fails or has run nothing; this rank may be new,
        # replacing a rank that ran all examples.
        self.failed_normally = self.ever_executed = True
        self._runner = types.SimpleNamespace(statistics={})  # type: ignore[assignment]
        with _seed_examples():
            type(self).follow(self)


def follow_with(follow: Callable[[Followed], None], meet: Callable[[], None]) -> None:
    """Have every `@given` test in this process follow the controller."""
    Followed.follow, Followed.meet = staticmethod(follow), staticmethod(meet)
    core.StateForActualGivenExecution = Followed  # type: ignore[misc]  # no hook for it


def property_of(state: Followed) -> Property:
    """The facts about a property that the controller needs."""
    test: Any = state.wrapped_test
    key = getattr(test, "_hypothesis_internal_database_key", None)
    seed = getattr(test, "_hypothesis_internal_use_seed", None)
    digest = key if key is not None else function_digest(state.test)
    values = {name: getattr(state.own_settings, name) for name in SETTINGS}
    return Property(state.test.__name__, values, digest, seed)


def origin_of(error: BaseException) -> str:
    """An exception's type and place, which identify a bug."""
    return str(InterestingOrigin.from_exception(error))


def trim(error: BaseException) -> BaseException:
    """The exception without our and Hypothesis' frames at the top of its traceback."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and _is_ours(tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    error.__traceback__ = tb
    return error.with_traceback(get_trimmed_traceback(error))


def _is_ours(file: str) -> bool:
    return os.path.dirname(file) == os.path.dirname(__file__)


def note_rejection(data: ConjectureData, error: UnsatisfiedAssumption) -> None:
    """Write into the data why, and where, `assume` has rejected the example."""
    data.events[REASON_KEYS[0]] = error.reason or ""
    vars(data)["invalid_location"] = getattr(error, "location", None)


def reason_of(data: ConjectureData) -> str:
    """Why an example was rejected; empty without a reason."""
    return str(next((data.events[key] for key in REASON_KEYS if key in data.events), ""))


def place_of_rejection(data: ConjectureData) -> str | None:
    """Where an example was rejected; None before Hypothesis 6.168, which does not say."""
    place: str | None = getattr(data, "invalid_location", None)
    return place


def mark_rejected(data: ConjectureData, reason: str | None, place: str | None) -> NoReturn:
    """End the engine's example as a rank's was rejected. Raises Hypothesis' `StopTest`."""
    takes_place = "location" in inspect.signature(data.mark_invalid).parameters
    data.mark_invalid(reason, **({"location": place} if takes_place else {}))


def status_of(data: ConjectureData) -> Status:
    """How an example ended if Hypothesis itself stopped it."""
    return STATUSES[data.status]


def listen_to_reports(hear: Callable[[object], None]) -> AbstractContextManager[Any]:
    """Receive Hypothesis' messages in this block."""
    return with_reporter(hear)
