"""What a test or an example leaves changed in its process, put back for the next one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


class Surroundings:
    """What a test may change for the next one in a warm world, or an example: as it is now."""

    def __init__(self) -> None:
        import torch

        self._environ = dict(os.environ)
        self._raw_environ = dict(_raw(os.environ))
        self._cwd = os.getcwd()
        self._dtype = torch.get_default_dtype()

    def restore(self) -> None:
        """Environment, working folder, torch's default dtype and gradient mode."""
        import torch

        if _raw(os.environ) != self._raw_environ:
            os.environ.clear()
            os.environ.update(self._environ)
        os.chdir(self._cwd)
        torch.set_default_dtype(self._dtype)
        torch.set_grad_enabled(True)


def _raw(environ: Mapping[str, str]) -> Mapping[Any, Any]:
    """The environment as it is kept: to decode all of it takes longer than a small example.

    A test may have put a mapping of its own in the environment's place.
    """
    raw: Mapping[Any, Any] = getattr(environ, "_data", environ)
    return raw
