"""Wrappers of other tensors, as `show` prints them: their class, attributes and inner tensors."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from pytest_dcp._cli.texts import draw_table, plain_text, show_bytes
from pytest_dcp._engine.lazy_reading.stored_wrappers import StoredPart, StoredWrapper


def print_wrapper(wrapper: StoredWrapper) -> None:
    """Print the wrapper, with a table of its inner tensors."""
    attributes = "".join(f", {key}={value!r:.60}" for key, value in wrapper.attributes.items())
    place = f"at {list(wrapper.offset)}, of {list(wrapper.shape)}"
    print(f"{plain_text(wrapper.kind)} {place}{plain_text(attributes)}")
    rows = [
        (part.name, _dtype_of(part), str(list(part.shape)), show_bytes(part.nbytes))
        for part in wrapper.walk_parts()
    ]
    Console().print(draw_table(("part", "dtype", "shape", "bytes"), rows, 1))


def describe_wrapper(wrapper: StoredWrapper) -> dict[str, Any]:
    """The wrapper for `--json`."""
    return {
        "class": wrapper.kind,
        "offset": list(wrapper.offset),
        "shape": list(wrapper.shape),
        "attributes": {key: repr(value) for key, value in wrapper.attributes.items()},
        "parts": [
            {
                "name": part.name,
                "dtype": _dtype_of(part),
                "shape": list(part.shape),
                "nbytes": part.nbytes,
            }
            for part in wrapper.walk_parts()
        ],
    }


def _dtype_of(part: StoredPart) -> str:
    return str(part.dtype).removeprefix("torch.")
