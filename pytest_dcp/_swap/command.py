"""The command `python -m pytest_dcp run SCRIPT ARGUMENTS...`: a program on our engine, unedited."""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_dcp._swap.children import extend_environment
from pytest_dcp._swap.fallbacks import report_fallbacks
from pytest_dcp._swap.import_hook import install

DESCRIPTION = "Run a program that uses torch.distributed.checkpoint on pytest_dcp's engine instead."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script as `python SCRIPT` would; its exit code and exceptions are its own."""
    parser = argparse.ArgumentParser(prog="python -m pytest_dcp", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="run a script whose imports of torch.distributed.checkpoint give this engine"
    )
    run.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module's name")
    run.add_argument("script", help="a file, or with -m a module")
    run.add_argument(
        "arguments", nargs=argparse.REMAINDER, default=[], help="the script's own arguments"
    )
    options = parser.parse_args(argv)
    if not options.is_module and not _can_run(options.script):
        parser.error(f"there is no program {options.script!r}")
    notes = extend_environment(os.environ)
    if leftovers := install():
        print(leftovers, file=sys.stderr)
    try:
        _run(options.script, options.arguments, is_module=options.is_module)
    finally:
        if notes is not None:
            text = report_fallbacks(notes)
            shutil.rmtree(notes, ignore_errors=True)
            if text:
                print(text, file=sys.stderr)
    return 0


def _can_run(script: str) -> bool:
    return os.path.isfile(script) or os.path.isfile(os.path.join(script, "__main__.py"))


def _run(script: str, arguments: list[str], *, is_module: bool) -> None:
    sys.argv = [script, *arguments]
    if is_module:
        sys.path[0] = os.getcwd()
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")
