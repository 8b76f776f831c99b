"""torch's older function that leaves out replicated tensors of plans: torch's own objects."""

from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

__getattr__ = names_of_torch(__name__)
