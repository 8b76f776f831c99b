"""Megatron-Core's `common.pt`, as `ls` mentions and `show` prints it."""

from __future__ import annotations

from pytest_dcp._cli.arguments import print_json
from pytest_dcp._cli.texts import plain_text
from pytest_dcp._engine.lazy_reading.megatron_common import COMMON
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint
from pytest_dcp.errors import CheckpointError

SHOWN = 6
"""Keys that `ls` mentions."""


def describe_common(checkpoint: OpenCheckpoint) -> str | None:
    """One line about the file; None if the checkpoint has none."""
    try:
        keys = list(checkpoint.common)
    except (CheckpointError, OSError) as error:
        return f"{COMMON}: cannot be read: {plain_text(str(error).splitlines()[0])}"
    if not keys:
        return None
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{COMMON}: {plain_text(', '.join(keys[:SHOWN]))}{more}; `show` prints it"


def list_common_keys(checkpoint: OpenCheckpoint) -> dict[str, list[str]]:
    """The file's keys for `--json`; empty if there is none that can be read."""
    try:
        keys = list(checkpoint.common)
    except (CheckpointError, OSError):
        return {}
    return {"common": keys} if keys else {}


def print_common(checkpoint: OpenCheckpoint, *, as_json: bool) -> None:
    """Print the file's values, one a line."""
    found = {key: repr(value) for key, value in checkpoint.common.items()}
    if as_json:
        print_json({"name": COMMON, "common": found})
        return
    for key, text in found.items():
        print(f"{plain_text(key)}: {plain_text(text)}")
