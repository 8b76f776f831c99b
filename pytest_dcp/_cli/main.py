"""The entry of the command line: `run` without further packages, the other commands with typer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pytest_dcp._cli.exit_codes import REFUSED
from pytest_dcp._cli.terminal import ending_at_interrupts, escape_unprintable


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:
        from pytest_dcp._swap.command import main as run

        return run(arguments)
    try:
        with ending_at_interrupts():
            from pytest_dcp._cli.commands import app
    except ImportError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        print(
            "pytest-dcp: all commands but `run` need the extra `cli`: "
            'pip install "pytest-dcp[cli]"',
            file=sys.stderr,
        )
        return REFUSED
    try:
        escape_unprintable()
        app(arguments, prog_name="pytest-dcp")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
