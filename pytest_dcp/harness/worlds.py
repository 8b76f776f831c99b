"""The `worlds` fixture: worlds that a test starts itself, to run functions in.

Enters: functions and arguments, also closures and lambdas, by cloudpickle. Leaves: one result per
rank, or one `WorldError` that carries what went wrong in every rank.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import cloudpickle
import pytest

from pytest_dcp.errors import WorldError
from pytest_dcp.harness.events import Call
from pytest_dcp.harness.outcome import Outcome, peers, ranks_text
from pytest_dcp.harness.report import merged_sections
from pytest_dcp.harness.session import Harness
from pytest_dcp.harness.spec import read_marker, resolve
from pytest_dcp.harness.world import World


class FunctionWorld:
    """A running world that calls functions. Made by `worlds(n)`."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._seed = seed

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._world.spec.size

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` in every rank; the results in rank order.

        Function, arguments and results are pickled (cloudpickle: closures and lambdas too), so
        ranks work on copies. The time limit counts anew for each call. Raises `WorldError` when
        any rank fails; the world goes on if all its ranks are still there.
        """
        if self._world.ended or not self._world.whole:
            raise WorldError("this world has ended: a rank was lost, or its `with` block is over")
        payload = cloudpickle.dumps((function, args, kwargs))
        self._world.restart_clock(self._world.spec.timeout_s)
        outcome = self._world.run("call", Call(self._seed, payload))
        self._print_output(outcome)
        if outcome.kind != "passed":
            raise self._error(outcome, function)
        return [cloudpickle.loads(outcome.done[rank].payload) for rank in range(self.size)]

    def check_boot(self, outcome: Outcome) -> None:
        """Raise `WorldError` when the world did not come up."""
        if outcome.kind != "passed":
            raise self._error(outcome, _boot)

    def _error(self, outcome: Outcome, function: Callable[..., Any]) -> BaseException:
        name = getattr(function, "__qualname__", repr(function))
        if outcome.kind == "skipped":
            return pytest.skip.Exception(outcome.reason)
        if outcome.kind == "xfailed":
            return pytest.xfail.Exception(outcome.reason)
        if outcome.kind == "exit":
            return pytest.exit.Exception(outcome.reason)
        if outcome.kind == "interrupt":
            return KeyboardInterrupt(outcome.reason)
        parts = [f"{name} in a world of {self.size}: {outcome.reason}"]
        parts += [f"  {line}" for line in peers(outcome)]
        for group in outcome.groups:
            if group.failure.detail and not group.echo:
                parts.append(f"--- {ranks_text(group.ranks)} ---\n{group.failure.detail.rstrip()}")
        return WorldError("\n".join(parts), outcome.failures)

    def _print_output(self, outcome: Outcome) -> None:
        """What the ranks printed becomes the test's own output, with the ranks before each line."""
        sections: list[tuple[int, str, str, str]] = []
        for rank in range(self.size):
            done = outcome.done.get(rank)
            if done is not None:
                sections += [(rank, *part) for part in done.sections]
            else:
                sections += [(rank, "call", *part) for part in self._world.output(rank)]
        for _, name, text in merged_sections(sections):
            stream = sys.stderr if name.startswith("stderr") else sys.stdout
            who = name.partition(" ")[2]
            stream.writelines(f"{who} {line}\n" for line in text.splitlines())


class Worlds:
    """What the `worlds` fixture gives: call it to open a world."""

    def __init__(self, harness: Harness, nodeid: str) -> None:
        self._harness = harness
        self._nodeid = nodeid
        self._open: list[World] = []

    @contextlib.contextmanager
    def __call__(self, size: int, /, **keywords: object) -> Iterator[FunctionWorld]:
        """A fresh world of `size` ranks until the block ends; keywords as those of the marker.

        Raises `pytest.UsageError` for wrong values, `WorldError` when the world does not come up
        or a rank does not leave with exit code 0.
        """
        values = read_marker((size,), keywords)
        defaults = replace(self._harness.options.defaults, world_size=None)
        if values.is_list:
            raise pytest.UsageError(f"{self._nodeid}: worlds(...) takes one size; got {size!r}")
        spec, problems = resolve(values, size, defaults)
        if spec is None:
            raise pytest.UsageError(f"{self._nodeid}: worlds(...) {'; '.join(problems)}")
        seed = self._harness.seed_of(self._nodeid)
        world, booted = self._harness.open(spec, seed)
        self._open.append(world)
        one = FunctionWorld(world, seed)
        try:
            one.check_boot(booted)
            yield one
        except BaseException:
            world.kill()
            raise
        left = world.close()
        if left.kind != "passed":
            raise WorldError(left.reason, left.failures)

    def close(self) -> None:
        """End what a test left open."""
        for world in self._open:
            world.kill()


def _boot() -> None:
    """Only lends its name to errors of a world that does not come up."""


_boot.__qualname__ = "starting"
