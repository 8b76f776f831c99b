"""Fresh multi-process PyTorch worlds for pytest.

PYTEST_DONT_REWRITE: this module is only the plugin's name, for `pytest -p pytest_dcp` and for the
entry point; it hands pytest to `pytest_dcp.plugin` and imports nothing heavy.
"""

from pytest_dcp.errors import DcpError, DivergedError, LostRank, RankFailure, WorldError

__all__ = [
    "DcpError",
    "DivergedError",
    "LostRank",
    "RankFailure",
    "WorldError",
    "pytest_plugins",
]

pytest_plugins = ["pytest_dcp.plugin"]
