"""The logger that torch's engine tells of its calls, and what it says about a process group."""

from __future__ import annotations

from typing import Any

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # Name, size and backend of a call's process group, as every log of torch's collectives has
    # them. Can go when torch documents the fields.
    from torch.distributed.c10d_logger import _get_msg_dict

    # Users' handlers are on this logger, whose name torch builds from that of the handler. Can go
    # when the logger's name is documented.
    from torch.distributed.checkpoint.logger import _dcp_logger

__all__ = ["_dcp_logger", "group_fields"]


def group_fields(function: str, process_group: Any) -> dict[str, Any]:
    """The function's name and, in a process group, the group's name, size, backend and ranks."""
    fields: dict[str, Any] = _get_msg_dict(function, process_group=process_group)
    return fields
