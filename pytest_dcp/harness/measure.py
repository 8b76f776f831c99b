"""What coverage.py measures in ranks: saved by each rank, gathered where nobody else would.

A forked rank inherits the running measurement. Beside pytest-cov, and wherever each process has a
data file of its own (`coverage run -p`), somebody combines the files afterwards. A plain `coverage
run` has one file, which ranks would fight for: their zygote detaches them from it, they save to the
session's folder, and the controller adds that to its own measurement in the end.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

NAME = ".coverage"
SETTINGS = ("branch", "source", "include", "omit")


def _current() -> Any:
    """The running measurement, or None."""
    coverage = sys.modules.get("coverage")
    return None if coverage is None else coverage.Coverage.current()


def detach(folder: Path) -> None:
    """Have this process and its forks measure into files of their own in `folder`, if need be."""
    measuring = _current()
    if measuring is None or measuring.get_option("run:parallel"):
        return
    # The suffix that pytest-cov gives its files has no public name (coverage 7.17).
    if getattr(measuring, "_data_suffix_specified", True):
        return
    measuring.stop()
    own = type(measuring)(
        data_file=str(folder / NAME),
        data_suffix=True,
        config_file=getattr(measuring.config, "config_file", None) or False,
        **{name: measuring.get_option(f"run:{name}") for name in SETTINGS},
    )
    own.start()


def save() -> None:
    """Write what was measured in this process so far; `os._exit` would lose it."""
    measuring = _current()
    if measuring is not None:
        with warnings.catch_warnings():  # of a rank that ran no measured line
            warnings.simplefilter("ignore")
            measuring.save()


def gather(folder: Path) -> None:
    """Add what detached ranks saved in `folder` to this process's measurement."""
    measuring = _current()
    for path in sorted(folder.glob(f"{NAME}.*")) if measuring is not None else ():
        import pytest
        from coverage import CoverageData, CoverageException

        try:
            measuring.get_data().update(CoverageData(basename=str(path)))
        except CoverageException as exc:  # the rank was killed while it saved
            text = f"what a rank measured is lost with its damaged file {str(path)!r}: {exc}"
            warnings.warn(pytest.PytestWarning(text), stacklevel=2)
        path.unlink()
