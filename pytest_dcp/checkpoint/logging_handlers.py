"""The name of the logger of checkpoint calls, and its default handler: torch's own objects."""

from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

__getattr__ = names_of_torch(__name__)
