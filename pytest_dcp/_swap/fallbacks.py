"""Notes the modules of torch's engine that code imports and ours lacks; lists them at the end.

Every process writes its own notes, in a folder that the first one made; the first one lists all.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FOLDER_VARIABLE = "PYTEST_DCP_ENGINE_NOTES"
"""The folder of the notes."""


def note_fallback(name: str) -> None:
    """Note that this module of torch's engine is torch's own. Never raises."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        with contextlib.suppress(OSError):
            (Path(folder) / name).touch()


def noted_fallbacks(folder: Path) -> list[str]:
    """The full names of torch's modules that any process imported and we lack.

    For a package only its name, without its own modules.
    """
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name.rpartition(".")[0] not in names]


def report_fallbacks(folder: Path) -> str:
    """One line that lists them; empty if there are none."""
    names = noted_fallbacks(folder)
    if not names:
        return ""
    return f"pytest_dcp's engine has no {', '.join(names)}: torch's own was imported"
