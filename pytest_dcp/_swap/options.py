"""The option `--dcp-engine`. Imports little: every session imports this module."""

from __future__ import annotations

import pytest

from pytest_dcp.command_line import FLAGS, Option

OPTIONS = (
    Option("engine", "", "imports of torch.distributed.checkpoint give this package", takes=bool),
)


def asks_for_engine(config: pytest.Config) -> bool:
    """Whether the command line or the ini file asks for our engine; no conftest is needed.

    Raises `pytest.UsageError` for a word in the ini file that is neither yes nor no.
    """
    (option,) = OPTIONS
    argument = getattr(config.known_args_namespace, option.key, None)
    text = str(argument if argument is not None else config.getini(option.key) or "").lower()
    if text not in FLAGS:
        raise pytest.UsageError(f"{option.key} = {text!r} in the ini file: give true or false")
    return FLAGS[text]
