"""torch's fake process groups, whose collectives return at once and move nothing."""

from __future__ import annotations

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # Importing it registers the backend "fake". Can go when torch registers it itself, and accepts
    # it without a store.
    from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["FakeStore"]
