"""Names of data files that the steps of a run share, as an index in a step's folder names them.

In an object store, which has no hard links, the data files of incremental steps are in one folder
beside the steps (see `steps.shared_files`). An index names them in one fixed form, the only one
that leads out of a checkpoint's folder: a constant, and the name of a data file that a save has
made. So a hostile index can name no other place. Pure (no I/O).

>>> shared_name("__0_0-1a2b.distcp")
'../shared-data/__0_0-1a2b.distcp'
>>> own_name(shared_name("__0_0-1a2b.distcp"))
'__0_0-1a2b.distcp'
>>> own_name("../shared-data/../step-1/.metadata"), own_name("__0_0-1a2b.distcp")
(None, None)
"""

from __future__ import annotations

import errno
import os
import re

from pytest_dcp.errors import CheckpointFileMissingError

SHARED_FOLDER = "shared-data"
"""Beside the folders of the steps."""
PREFIX = f"../{SHARED_FOLDER}/"
SHARED = re.compile(
    re.escape(PREFIX) + r"(?P<own>__[0-9]{1,10}_[0-9]{1,10}-(?P<save>[0-9a-f]{1,32})\.distcp)"
)
HOW_TO_COPY = (
    f"steps of the run share it, in the folder {SHARED_FOLDER} beside theirs, and a step that is "
    "copied alone lacks it: CheckpointManager(run).export(step, target) makes a copy that is whole"
)


def shared_name(name: str) -> str:
    """The name, in an index, of the shared file of this name."""
    return f"{PREFIX}{name}"


def own_name(name: str) -> str | None:
    """The name within the folder of shared files; None for any other file's name in an index."""
    match = SHARED.fullmatch(name)
    return None if match is None else match["own"]


def save_part(name: str) -> str | None:
    """The part of a shared file's name that says which save has made it."""
    match = SHARED.fullmatch(name)
    return None if match is None else match["save"]


def why_missing(name: str) -> str:
    """Words to add to the message that this data file of an index is missing."""
    return "" if own_name(name) is None else f": {HOW_TO_COPY}"


def missing_data_file(name: str, entry: str | None = None) -> CheckpointFileMissingError:
    """The error of a data file, by its name in an index, that is missing."""
    reason = f"the data file is missing{why_missing(name)}"
    return CheckpointFileMissingError(reason, file=name, entry=entry)


def missing_file(name: str, path: object) -> FileNotFoundError:
    """The error of a shared file that is not there."""
    text = f"{os.strerror(errno.ENOENT)}{why_missing(name)}"
    return FileNotFoundError(errno.ENOENT, text, str(path))
