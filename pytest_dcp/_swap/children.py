"""Makes this process's children use our engine too, by two environment variables.

Every way to start them (subprocess, multiprocessing's spawn, torchrun) passes the environment on,
and a Python that starts imports `sitecustomize` from its path: ours, which calls the next one.
"""

from __future__ import annotations

import os
import site
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from pytest_dcp._swap.fallbacks import FOLDER_VARIABLE

SITE = str(Path(__file__).parent / "site")
VARIABLE = "PYTEST_DCP_ENGINE"


VARIABLES = (VARIABLE, FOLDER_VARIABLE, "PYTHONPATH")
"""The variables that `extend_environment` sets."""


def extend_environment(environment: MutableMapping[str, str]) -> Path | None:
    """Let children swap engines, and note their fallbacks in a folder.

    Returns the folder if it is new, for the caller to report and remove; None if a parent process
    does that.

    Also puts the package on their path if it is not installed. If it is, its folder before the
    standard library's would hide modules of the library.
    """
    environment[VARIABLE] = "1"
    package = str(Path(__file__).parents[2])
    python_path = environment.get("PYTHONPATH", "")
    paths = python_path.split(os.pathsep) if python_path else []
    installed = package in (*site.getsitepackages(), site.getusersitepackages())
    first = [SITE] if installed or package in paths else [SITE, package]
    environment["PYTHONPATH"] = os.pathsep.join([*first, *(p for p in paths if p != SITE)])
    if FOLDER_VARIABLE in environment:
        return None
    folder = tempfile.mkdtemp(prefix="pytest-dcp-engine-")
    environment[FOLDER_VARIABLE] = folder
    return Path(folder)
