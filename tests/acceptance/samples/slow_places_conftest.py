"""Copied as conftest.py: ranks have ten seconds to join, after an import that takes longer."""

from __future__ import annotations

from pytest_dcp._harness.launchers import preloading
from pytest_dcp._harness.world import world

world.BOOT_S = 10.0
preloading.PRELOAD = (*preloading.PRELOAD, "slow_import")
