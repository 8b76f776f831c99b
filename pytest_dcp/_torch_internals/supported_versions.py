"""Which versions of torch the doors beside this module were written for."""

from __future__ import annotations

import torch

from pytest_dcp.supported_versions import SupportedVersions

TORCH = SupportedVersions("torch", str(torch.__version__), "2.10", "2.14")
