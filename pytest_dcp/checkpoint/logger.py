"""torch's decorator that logs calls to its `dcp_logger`; ours do not log there.

The names are torch's own objects.
"""

from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

__getattr__ = names_of_torch(__name__)
