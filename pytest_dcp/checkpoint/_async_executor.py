"""The base of background saves: torch's own abstract class, of which ours are subclasses."""

from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

__getattr__ = names_of_torch(__name__)
