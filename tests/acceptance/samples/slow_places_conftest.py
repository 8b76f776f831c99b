"""Copied as conftest.py: ranks have ten seconds to join, after an import that takes longer."""

from __future__ import annotations

from pytest_dcp._harness.launchers import zygote
from pytest_dcp._harness.world import world

world.BOOT_S = 10.0
zygote.PRELOAD = (*zygote.PRELOAD, "slow_import")
