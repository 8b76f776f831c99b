"""Plugins' data in ranks: collected there by a hook, and given to the same plugins in the
controller.

Enters, in a rank: an item that was torn down. Leaves: one payload for all plugins. The controller
does the reverse, for all ranks together.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from pytest_dcp._harness.protocol.function_pickles import dumps, load_from_rank
from pytest_dcp.errors import DcpError
from pytest_dcp.rank_names import ranks_text


class LostStateWarning(pytest.PytestWarning):
    """A plugin's data of ranks is missing in its own report."""


def collect(item: pytest.Item) -> bytes:
    """The plugins' data in this rank, pickled by their names; empty if there is none.

    Raises `DcpError` when it cannot be pickled, and any exception of a plugin's hook.
    """
    values: dict[str, bytes] = {}
    for name, state in _implementations(item, "pytest_dcp_rank_state"):
        if (value := state({"item": item})) is None:
            continue
        try:
            values[name] = dumps(value)
        except Exception as error:
            raise DcpError(
                f"the value that the plugin {name!r} returned from pytest_dcp_rank_state, a "
                f"{type(value).__qualname__}, cannot be pickled: {error}"
            ) from error
    return pickle.dumps(values) if values else b""


def deliver(item: pytest.Item, payloads: Mapping[int, bytes], size: int) -> None:
    """Give each plugin its data from the ranks; warn if no plugin takes it."""
    what = "data gathered by plugins in the process"
    came = {
        rank: load_from_rank(payload, rank, what) for rank, payload in payloads.items() if payload
    }
    names = dict.fromkeys(name for values in came.values() for name in values)
    takers = dict(_implementations(item, "pytest_dcp_take_rank_states")) if names else {}
    for name in names:
        if name not in takers:
            ranks = [rank for rank, values in came.items() if name in values]
            text = f"{item.nodeid}: data of the plugin {name!r} from {ranks_text(ranks)} is lost"
            item.warn(LostStateWarning(f"{text}: it has no pytest_dcp_take_rank_states"))
            continue
        found = [came.get(rank, {}).get(name) for rank in range(size)]
        what = f"data gathered by the plugin {name!r} in the process"
        states = [
            None if data is None else load_from_rank(data, rank, what)
            for rank, data in enumerate(found)
        ]
        takers[name]({"item": item, "states": states})


def _implementations(item: pytest.Item, hook: str) -> Iterator[tuple[str, Any]]:
    """The plugins that implement the hook for this item, each with a way to call it alone."""
    manager = item.config.pluginmanager
    for impl in getattr(item.ihook, hook).get_hookimpls():

        def call(arguments: dict[str, object], impl: Any = impl) -> object:
            return impl.function(*(arguments[name] for name in impl.argnames))

        yield manager.get_name(impl.plugin) or impl.plugin_name, call
