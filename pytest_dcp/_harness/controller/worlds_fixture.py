"""The `worlds` fixture: worlds that a test starts itself, to run functions in.

Enters: functions and arguments, also closures and lambdas, by cloudpickle. Leaves: one result per
rank, or one `WorldError` that carries every rank's failure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import pytest

from pytest_dcp._harness.controller.exit_warnings import warn_of_end
from pytest_dcp._harness.controller.report import exception_of_end, merged_sections
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.protocol.function_pickles import dump_call, load_from_rank
from pytest_dcp._harness.protocol.messages import CallFunction, FaultAct
from pytest_dcp._harness.protocol.world_spec import (
    SIMULATED,
    WorldKeywords,
    WorldSpec,
    read_marker,
    resolve,
)
from pytest_dcp._harness.world.outcome import Outcome, SessionEnd, peers
from pytest_dcp._harness.world.stacks import from_root
from pytest_dcp._harness.world.world import World
from pytest_dcp.errors import WorldError
from pytest_dcp.rank_names import ranks_text

if TYPE_CHECKING:  # Unpack is in `typing` from Python 3.11 on
    from typing_extensions import Unpack

P = ParamSpec("P")
T = TypeVar("T")


class FunctionWorld:
    """A running world that calls functions. Made by `worlds(n)`."""

    def __init__(
        self, world: World, seed: int, where: str, on_session_end: Callable[[SessionEnd], None]
    ) -> None:
        self._where = where
        self._on_session_end = on_session_end
        self._world = world
        self._seed = seed
        self._running: Running[Any] | None = None
        self._printed_ranks: set[int] = set()
        """Lost ranks whose last output was printed."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._world.spec.size

    @property
    def survivors(self) -> tuple[int, ...]:
        """Ranks that are neither lost nor stopped, ascending."""
        return self._world.survivors

    def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """`function(*args, **kwargs)` in every rank; the results in rank order.

        Function, arguments and results are pickled (cloudpickle: closures and lambdas too), so
        ranks work on copies. The time limit counts anew for each call. Raises `WorldError` when
        any rank fails, and the world goes on if all its ranks are still there; `TypeError` when
        something cannot be pickled. A rank that the test has killed, or that was stopped to the
        end, has a `LostRank` for a result and is not called again.
        """
        return self.start(function, *args, **kwargs).result()

    def start(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Running[T]:
        """`run` without waiting: ranks run while the test goes on, and can be killed or paused."""
        if self._running is not None:
            raise WorldError(f"{self._running.name} still runs in this world: take its result()")
        if not self._world.survivors_idle:
            raise WorldError("this world has ended: a rank was lost, or its `with` block is over")
        payload = dump_call(function, args, kwargs)
        self._world.restart_clock(self._world.spec.timeout_s)
        self._world.begin("call", CallFunction(self._seed, payload))
        running = self._running = Running(self, function)
        return running

    def kill(self, rank: int) -> None:
        """SIGKILL a rank and what it started; returns when it is gone.

        A death that was asked for is no failure; `run` goes on with the survivors.
        """
        self._apply_fault("kill", rank)

    def pause(self, rank: int) -> None:
        """SIGSTOP a rank and what it started; returns when it stands still.

        A rank that is not resumed is killed when the others have ended the call.
        """
        self._apply_fault("pause", rank)

    def resume(self, rank: int) -> None:
        """SIGCONT a rank that was paused; returns when it goes on."""
        self._apply_fault("resume", rank)

    def _apply_fault(self, act: FaultAct, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{act}(): rank must be from 0 to {self.size - 1}, got {rank!r}")
        if self._world.is_over:
            raise WorldError("this world has ended: a rank was lost, or its `with` block is over")
        self._world.apply_fault(act, rank, f"{act}({rank}) by the test")

    def finish(self, function: Callable[..., T]) -> list[T]:
        """The results of what was started; see `Running.result`."""
        self._running = None
        outcome = self._world.finish()
        self._print_output(outcome)
        if outcome.kind != "passed":
            raise self._error(outcome, function)
        what = f"the result of {_name_of(function)}"
        return [
            load_from_rank(outcome.results[rank].payload, rank, what)
            if rank in outcome.results
            else outcome.lost[rank]  # type: ignore[misc]  # plain T for callers that lose no rank
            for rank in range(self.size)
        ]

    def check_finished(self) -> None:
        """Wait for a running call, and raise its failure."""
        if self._running is not None:
            self._running.result()

    def check_boot(self, outcome: Outcome) -> None:
        """Raise `WorldError` when the world did not come up."""
        if outcome.kind != "passed":
            raise self._error(outcome, _boot)

    def _error(self, outcome: Outcome, function: Callable[..., Any]) -> BaseException:
        name = _name_of(function)
        if outcome.kind == "skipped":
            return pytest.skip.Exception(outcome.reason)
        if outcome.kind == "xfailed":
            return pytest.xfail.Exception(outcome.reason)
        if (end := outcome.session_end) is not None:
            if outcome.kind != "failed":
                return exception_of_end(end, self._where)
            self._on_session_end(end)
        parts = [f"{outcome.reason} ({name} in a world of {self.size})"]
        parts += [f"  {line}" for line in peers(outcome)]
        for group in outcome.groups:
            if group.failure.detail and not group.echo:
                detail = from_root(group.failure.detail.rstrip(), self._world.root)
                parts.append(f"--- {ranks_text(group.ranks)} ---\n{detail}")
        return WorldError("\n".join(parts), outcome.failures)

    def _print_output(self, outcome: Outcome) -> None:
        """Print the ranks' output as the test's own, with the ranks before each line."""
        sections: list[tuple[int, str, str, str]] = []
        for rank in range(self.size):
            result = outcome.results.get(rank)
            if result is not None:
                sections += [(rank, *part) for part in result.sections]
            elif rank not in self._printed_ranks:
                sections += [(rank, "call", *part) for part in self._world.output(rank)]
        self._printed_ranks.update(outcome.lost)
        self._print(sections)

    def print_exit(self) -> None:
        """Print what the ranks printed while they exited."""
        exited = self._world.exited.items()
        self._print((rank, *part) for rank, one in exited for part in one.sections)

    def _print(self, sections: Iterable[tuple[int, str, str, str]]) -> None:
        for _, name, text in merged_sections(sections):
            stream = sys.stderr if name.startswith("stderr") else sys.stdout
            who = name.partition(" ")[2]
            stream.writelines(f"{who} {line}\n" for line in text.splitlines())


class Running(Generic[T]):
    """A function that runs in a world's ranks. Made by `FunctionWorld.start`.

    ```python
    def test_a_rank_dies_while_the_others_work(worlds):
        def wait_for_peers():
            time.sleep(0.1)
            return dist.get_rank()

        with worlds(2) as world:
            running = world.start(wait_for_peers)
            world.kill(1)
            alive, lost = running.result()
        assert alive == 0 and isinstance(lost, LostRank)
    ```
    """

    def __init__(self, world: FunctionWorld, function: Callable[..., T]) -> None:
        self.name = _name_of(function)
        self._world = world
        self._function = function
        self._results: list[T] | None = None
        self._error: BaseException | None = None

    def result(self) -> list[T]:
        """Wait for the result of `run`, and return or raise it. The same each time."""
        if self._error is not None:
            raise self._error
        if self._results is None:
            try:
                self._results = self._world.finish(self._function)
            except BaseException as error:
                self._error = error
                raise
        return self._results


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


class Worlds:
    """The value of the `worlds` fixture: call it to open a world."""

    def __init__(self, harness: Harness, nodeid: str) -> None:
        self._harness = harness
        self.nodeid = nodeid
        self._open: list[World] = []

    def __call__(self, size: int, /, **keywords: Unpack[WorldKeywords]) -> WorldBlock:
        """A fresh world of `size` ranks until the block ends; keywords as those of the marker.

        Raises `pytest.UsageError` for wrong values, before the block begins; the block raises
        `WorldError` when the world does not come up or a rank does not leave with exit code 0.
        """
        values = read_marker((size,), dict(keywords))
        defaults = replace(self._harness.options.defaults, world_size=None)
        if values.is_list:
            raise pytest.UsageError(f"worlds(...) takes one size; got {size!r}")
        if (backend := keywords.get("backend")) in SIMULATED:
            raise pytest.UsageError(
                f"worlds(...) starts processes; backend={backend!r} is for the marker: "
                f"world_size({size}, backend={backend!r})"
            )
        spec, problems = resolve(values, size, defaults)
        if spec is None:
            raise pytest.UsageError(f"worlds(...) {'; '.join(problems)}")
        return WorldBlock(self, spec)

    def open_world(self, spec: WorldSpec) -> tuple[World, FunctionWorld]:
        """Start a world. Raises `WorldError` when it does not come up."""
        seed = self._harness.seed_of(self.nodeid)
        world, booted = self._harness.open(spec, seed)
        self._open.append(world)
        functions = FunctionWorld(
            world,
            seed,
            self.nodeid,
            lambda end: self._harness.end_after_item(end, self.nodeid),
        )
        try:
            functions.check_boot(booted)
        except BaseException:
            world.kill()
            raise
        return world, functions

    def close(self) -> None:
        """End worlds that a test left open."""
        for world in self._open:
            world.kill()


class WorldBlock:
    """The block of a `with worlds(n)`; a class, since contextlib's frames would be shown."""

    def __init__(self, worlds: Worlds, spec: WorldSpec) -> None:
        self._worlds = worlds
        self._spec = spec

    if not TYPE_CHECKING:  # type checkers report such a name themselves

        def __getattr__(self, name):  # a `with` that was forgotten is the commonest mistake
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            if hasattr(FunctionWorld, name):
                size = self._spec.size
                text += f"; a world starts in a block: with worlds({size}) as world: world.{name}"
            raise AttributeError(text)

    def __enter__(self) -> FunctionWorld:
        self._world, self._functions = self._worlds.open_world(self._spec)
        return self._functions

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self._world.kill()
            return
        try:
            self._functions.check_finished()
        except BaseException:
            self._world.kill()
            raise
        __tracebackhide__ = True
        outcome = self._world.close()
        self._functions.print_exit()
        if outcome.kind != "passed":
            raise WorldError(outcome.reason, outcome.failures)
        warn_of_end(self._worlds.nodeid, self._world)


def _boot() -> None:
    """Only lends its name to errors of a world that does not come up."""


_boot.__qualname__ = "starting"
