"""Imported by every Python whose path has this folder: see `pytest_dcp._swap`."""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys

if os.environ.get("PYTEST_DCP_ENGINE"):
    # A Python that does not have the package has its own reasons to run.
    with contextlib.suppress(ImportError):
        from pytest_dcp._swap.import_hook import install

        install()

# The sitecustomize that this one hides.
_here = os.path.dirname(os.path.abspath(__file__))
_others = [path for path in sys.path if os.path.abspath(path or ".") != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
