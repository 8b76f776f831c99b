"""A property inside a rank: examples come from the controller, one at a time.

Enters: `Example` orders while a test waits where Hypothesis' engine would run. Leaves: a `Done` for
each, with a `Reply` inside, and a record of what was drawn in a memfd that outlives the rank.

Hypothesis is taken over where a `@given` test would start its engine; everything around that
(fixtures, explicit examples, `@reproduce_failure`, state machines, nested functions) is its own and
runs in every rank as it runs in any process.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import cloudpickle
import hypothesis
import pytest
from hypothesis.errors import FailedHealthCheck, StopTest, UnsatisfiedAssumption

from pytest_dcp._harness.lockstep import fresh_folders
from pytest_dcp._harness.lockstep import hypothesis_internals as inside
from pytest_dcp._harness.lockstep.example_messages import (
    Attempt,
    Reply,
    Status,
    add_to_checksum,
    encode_choice,
    encode_line,
    encode_span,
)
from pytest_dcp._harness.lockstep.hypothesis_settings import set_settings, settings_of
from pytest_dcp._harness.protocol.messages import At, Done, Example, Go
from pytest_dcp._harness.rank.exception_facts import class_of, is_echo, lines_of, outcome_of
from pytest_dcp._harness.rank.process_facets import QUICK_FACETS
from pytest_dcp._harness.rank.process_state import ProcessState
from pytest_dcp._harness.rank.this_rank import Rank
from pytest_dcp._pytest_internals import fixtures_of
from pytest_dcp.errors import DcpError

AMBIENT = frozenset(
    ("rank", "local_rank", "world_size", "device", "device_mesh", "world", "request")
)
FRESH = frozenset(("checkpoint_dir", "faulty_storage"))
"""Our fixtures: shared by all examples, and renewed for each."""


class AbandonedError(BaseException):
    """The controller wants no more examples: the property has failed and its test is over."""


class _Unparametrised:
    """The callspec of a test without parameters."""

    params: ClassVar[dict[str, object]] = {}


class Reporter(Protocol):
    """pytest's report of an example; see `pytest_plugin`."""

    def variant(self) -> bytes:
        """Distinguishes the running test from its parametrised siblings."""

    def begin_example(self) -> None:
        """Drop the output captured so far."""

    def report_example(self, error: BaseException, result: Done) -> Done:
        """The answer with pytest's own report of the failure."""


def install(rank: Rank, reporter: Reporter) -> None:
    """Have the properties of this rank follow the controller."""
    inside.freeze_constants()
    follower = ExampleRunner(rank, reporter)
    inside.follow_with(follower.follow, follower.meet)


def check_fixtures(item: pytest.Item) -> None:
    """Raise Hypothesis' `FailedHealthCheck` for function-scoped fixtures of the user's.

    Hypothesis' own check would not know that ours are made for this.
    """
    __tracebackhide__ = True
    test: Any = item.obj  # type: ignore[attr-defined]  # of a pytest.Function
    settings = settings_of(test)
    if settings is None:
        return
    health = hypothesis.HealthCheck.function_scoped_fixture
    if health in settings.suppress_health_check:
        return
    info = fixtures_of(item)
    constant = AMBIENT | FRESH | getattr(item, "callspec", _Unparametrised).params.keys()
    found = [
        name
        for name in info.argnames
        if name not in constant
        and info.name2fixturedefs.get(name)
        and info.name2fixturedefs[name][-1].scope == "function"
    ]
    if found:
        raise FailedHealthCheck(
            f"{item.nodeid!r} uses the function-scoped fixtures {', '.join(found)}, which are set "
            "up once for all examples. Create fresh values inside the test, or say that they need "
            "not be with @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])"
        )
    quiet = [*settings.suppress_health_check, health]
    set_settings(test, hypothesis.settings(settings, suppress_health_check=quiet))


class ExampleRecord:
    """This rank's draws, recorded as they happen."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = bytearray()
        self._end = 0
        self._open = False
        self.drawn = (0, 0)

    def begin(self) -> None:
        """A new example; the controller has emptied the file."""
        self._pending.clear()
        self._end, self.drawn, self._open = 0, (0, 0), True

    def span(self, mark: int | bool) -> None:
        """A span begins or ends; it waits for the next choice."""
        if self._open:
            self._pending += encode_span(mark)

    def choice(self, kind: str, constraints: Mapping[str, Any], value: Any, forced: bool) -> None:
        """A choice that a strategy asked for."""
        if self._open:
            encoded = encode_choice(kind, constraints, value, forced)
            self._pending += encoded
            self.drawn = add_to_checksum(self.drawn, encoded)
            self._flush()

    def say(self, text: object) -> None:
        """A line of Hypothesis' for the user."""
        if self._open:
            self._pending += encode_line(str(text))
            self._flush()

    def end(self) -> None:
        """The example is over."""
        self._flush()
        self._open = False

    def _flush(self) -> None:
        self._end += os.pwrite(self._fd, self._pending, self._end)
        self._pending.clear()


class ExampleRunner:
    """Runs the examples of this rank."""

    def __init__(self, rank: Rank, reporter: Reporter) -> None:
        self.rank = rank
        self.reporter = reporter
        self.record = ExampleRecord(rank.fds.draws)
        self._following = False

    def follow(self, state: inside.Followed) -> None:
        """Run the controller's examples until it has enough, instead of an engine."""
        __tracebackhide__ = True
        if self._following:
            raise DcpError(
                f"{state.test.__name__}: a @given test was called inside an example of another. "
                "In a world that cannot work: draw its values with st.data() instead"
            )
        self._following = True
        self._state = ProcessState(QUICK_FACETS)
        self._state.settle()
        prop = inside.property_of(state)
        prop = replace(prop, database_key=prop.database_key + self.reporter.variant())
        channel = self.rank.channel
        order = channel.answer(
            Done(
                "call",
                "passed",
                time.monotonic(),
                awaits=prop.name,
                payload=cloudpickle.dumps(prop),
            )
        )
        try:
            while isinstance(order, Example):
                order = channel.answer(self._example(state, pickle.loads(order.payload)))
        finally:
            self._following = False
        if order != Go("call"):
            channel.put_back(order)
            raise AbandonedError

    def meet(self) -> None:
        """Renew all state for an example that the ranks run without the engine; collective."""
        self.rank.meet("the end of an example")
        if self.rank.order.rank == 0:
            fresh_folders.renew(Path(self.rank.checkpoint_dir))
        self._begin()
        self.rank.meet("the begin of an example")

    def _begin(self) -> None:
        self.rank.reseed_torch(self.rank.seed)
        for fixture in self.rank.renewed:
            fixture.renew()

    def _end(self) -> None:
        """Facts about an example that are known only when all ranks have ended it."""
        if self.rank.renewed:
            self.rank.meet("the end of an example")
            for fixture in self.rank.renewed:
                fixture.check()

    def _example(self, state: inside.Followed, attempt: Attempt) -> Done:
        self._begin()
        if attempt.final:
            self.reporter.begin_example()
        counter = self.rank.count_groups()
        before = counter.mark()
        started = time.perf_counter()
        status, error, data = self._run(state, attempt)
        outcome = outcome_of(error) if error is not None else "passed"
        if error is not None and outcome == "failed":
            # Its text may take long to make, and does not count in the example's time.
            self.rank.channel.send(At("reporting", type(error).__name__, time.monotonic()))
        leftovers = self._state.put_back()
        reply = Reply(
            status,
            self.record.drawn,
            origin=inside.origin_of(error) if error is not None else "",
            reason=inside.reason_of(data) if status == "invalid" else "",
            location=inside.place_of_rejection(data),
            fatal=isinstance(error, FailedHealthCheck),
            reusable=not leftovers and process_group_is_ours(self.rank),
            groups=counter.since(before),
            targets=data.target_observations,
            events=data.events,
            draw_times=data.draw_times,
            misaligned_at=data.misaligned_at,
        )
        result = Done(
            "call",
            outcome,
            time.monotonic(),
            time.perf_counter() - started,
            is_echo=is_echo(error),
            exception=class_of(error) if error is not None else None,
            text=lines_of(error) if error is not None else "",
            payload=pickle.dumps(reply),
        )
        if error is not None and (attempt.final or reply.fatal or result.outcome != "failed"):
            result = self.reporter.report_example(error, result)
        return result

    def _run(
        self, state: inside.Followed, attempt: Attempt
    ) -> tuple[Status, BaseException | None, Any]:
        """Draw and run the example. Returns its status, its exception, and Hypothesis'
        data of it.
        """
        self.record.begin()
        data = inside.data_to_draw_from(attempt, self.record)
        status: Status = "valid"
        error: BaseException | None = None
        try:
            with inside.listen_to_reports(self.record.say):
                result = state.run_example(data, final=attempt.final)
                self._end()
            if result is not None:
                error = FailedHealthCheck(
                    f"tests under @given should return None; {state.test.__name__} returned "
                    f"{result!r}"
                )
        except UnsatisfiedAssumption as exc:
            inside.note_rejection(data, exc)
            status = "invalid"
        except StopTest:
            status = inside.status_of(data)
        except BaseException as exc:  # noqa: BLE001 - reported to the controller, whatever it is
            error = inside.trim(exc)
        self.record.end()
        data.freeze()
        return ("interesting" if error is not None else status), error, data


def process_group_is_ours(rank: Rank) -> bool:
    """Whether the default process group still is that of all ranks."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() == rank.order.view[1]
