"""Data files in the safetensors format: one file of plain tensors instead of torch's entries.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of a
JSON header, the header with each tensor's dtype, shape and place, the data. The header carries,
under `DCP_SHARDING_INFO`, the offsets of each tensor's part in the full tensor, as torch writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_dcp.checkpoint.store.disk import Disk
from pytest_dcp.checkpoint.store.observe import Observer
from pytest_dcp.checkpoint.store.write import FileJob, Settings, Source
from pytest_dcp.checkpoint.store.written import Written


def write_safetensors(
    disk: Disk,
    folder: Any,
    jobs: Sequence[FileJob],
    source: Source,
    settings: Settings,
    observer: Observer,
) -> Written:
    raise NotImplementedError
