"""Fresh multi-process PyTorch worlds for pytest.

PYTEST_DONT_REWRITE: this module is only the plugin's name, for `pytest -p pytest_dcp` and for the
entry point; it hands pytest to `pytest_dcp.plugin` and imports nothing heavy.
"""

from typing import TYPE_CHECKING

from pytest_dcp.errors import DcpError, DivergedError, LostRank, RankFailure, WorldError

if TYPE_CHECKING:
    from pytest_dcp.harness.world_test_mixin import WorldTestMixin

__all__ = [
    "DcpError",
    "DivergedError",
    "LostRank",
    "RankFailure",
    "WorldError",
    "WorldTestMixin",
    "pytest_plugins",
]

pytest_plugins = ["pytest_dcp.plugin"]


def __getattr__(name: str) -> object:
    """`WorldTestMixin` needs pytest, which the engine alone does not."""
    if name == "WorldTestMixin":
        from pytest_dcp.harness.world_test_mixin import WorldTestMixin

        return WorldTestMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
