"""coverage.py's measurements in ranks: saved by each rank, gathered where pytest-cov would not.

A forked rank inherits the running measurement; a spawned one starts its own with the settings that
the controller hands down (`settings`, `start`). Beside pytest-cov, and wherever each process has a
data file of its own (`coverage run -p`), pytest-cov or the user combines the files afterwards. A
plain `coverage run` has one file, which ranks would fight for: they save to the session's folder
instead, and the controller adds that to its own measurement in the end.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = ".coverage"
SETTINGS = ("branch", "source", "include", "omit", "concurrency")


def _current() -> Any:
    """The running measurement, or None."""
    coverage = sys.modules.get("coverage")
    return None if coverage is None else coverage.Coverage.current()


def _has_one_file(measuring: Any) -> bool:
    """Whether all processes would write to the same file."""
    # The suffix that pytest-cov gives its files has no public name (coverage 7.17).
    suffixed = getattr(measuring, "_data_suffix_specified", True)
    return not (measuring.get_option("run:parallel") or suffixed)


def settings(folder: Path) -> dict[str, Any]:
    """Arguments of `start` in another process, as JSON; empty if nothing is measured.

    Files that pytest-cov would not combine go to `folder`.
    """
    measuring = _current()
    if measuring is None:
        return {}
    file = folder / NAME if _has_one_file(measuring) else measuring.get_option("run:data_file")
    return {
        "data_file": os.path.abspath(file),
        "config_file": getattr(measuring.config, "config_file", None) or False,
        **{name: measuring.get_option(f"run:{name}") for name in SETTINGS},
    }


def start(arguments: Mapping[str, Any]) -> None:
    """Measure this process according to `settings`, into a file of its own if necessary.

    Does nothing in a process that is measured already, for example by coverage.py's own patch for
    subprocesses.
    """
    if arguments and _current() is None:
        from coverage import Coverage

        with warnings.catch_warnings():  # of modules that were imported before
            warnings.simplefilter("ignore")
            Coverage(data_suffix=True, **arguments).start()


def detach(folder: Path) -> None:
    """Have this process and its forks measure into files of their own in `folder`, if need be."""
    measuring = _current()
    if measuring is not None and _has_one_file(measuring):
        arguments = settings(folder)
        measuring.stop()
        start(arguments)


def save() -> None:
    """Write this process's measurements so far; `os._exit` would lose them."""
    measuring = _current()
    if measuring is not None:
        with warnings.catch_warnings():  # of a rank that ran no measured line
            warnings.simplefilter("ignore")
            measuring.save()


def gather(folder: Path) -> None:
    """Add the ranks' measurements in `folder` to this process's."""
    measuring = _current()
    for path in sorted(folder.glob(f"{NAME}.*")) if measuring is not None else ():
        import pytest
        from coverage import CoverageData, CoverageException

        try:
            measuring.get_data().update(CoverageData(basename=str(path)))
        except CoverageException as exc:  # the rank was killed while it saved
            text = f"a rank's measurements are lost with its damaged file {str(path)!r}: {exc}"
            warnings.warn(pytest.PytestWarning(text), stacklevel=2)
        path.unlink()
