"""The engine without waiting for the disk: thousands of saves that are about layouts."""

from __future__ import annotations

from pytest_dcp.checkpoint import FileSystemReader, FileSystemWriter
from pytest_dcp.properties import WithStorage

UNSYNCED = WithStorage(lambda path: FileSystemWriter(path, sync_files=False), FileSystemReader)
