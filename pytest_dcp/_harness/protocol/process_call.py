"""A process that an unmodified test starts, in the form in which a rank gets it.

Enters: a target with its arguments, pickled as `multiprocessing` does it. Leaves: bytes for a
`RunProcess`, and back.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ProcessCall:
    """One process: its target, and the surroundings in which it begins."""

    target: bytes
    """Pickled `(target, args, kwargs)`. Loading it may import modules of the suite."""
    name: str
    """The process's name."""
    environ: Mapping[str, str]
    """The environment of the process that starts it."""
    cwd: str
    skips: Mapping[int, str] = field(default_factory=dict)
    """Exit codes that mean a skip, with its reason."""
    error_code: int | None = None
    """The exit code by which the target reports an exception that it has caught."""
    port: int = 0
    """The port at which the test's process groups meet; 0: the one of the rank's own world."""

    def dump(self) -> bytes:
        """As bytes for the wire; `load` reads it."""
        return pickle.dumps(self)

    @staticmethod
    def load(data: bytes) -> ProcessCall:
        """Inverse of `dump`."""
        call: ProcessCall = pickle.loads(data)
        return call
