"""Copied as conftest.py: ranks have two seconds to join, after an import that takes four."""

from __future__ import annotations

from pytest_dcp.harness import world, zygote

world.BOOT_S = 2.0
zygote.PRELOAD = (*zygote.PRELOAD, "slow_import")
