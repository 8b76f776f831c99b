"""Overlaps of chunks, as torch's planners compute them; nothing in them touches a checkpoint.

The names are torch's own objects.
"""

from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

__getattr__ = names_of_torch(__name__)
