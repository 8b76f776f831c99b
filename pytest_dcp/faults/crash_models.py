"""The names of what a crash may lose. `crashes.losses` has the rules of each. Pure (no I/O)."""

from __future__ import annotations

from typing import Literal, get_args

Model = Literal["kill", "posix", "ext4-ordered", "nfs", "s3"]
"""Also the beginning of a crash state's id."""
MODELS: tuple[Model, ...] = get_args(Model)
