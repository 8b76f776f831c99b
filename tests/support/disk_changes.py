"""Something happens before a chosen change of the disk: a kill, an error."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pytest_dcp.faults.tap.operation import Operation

CHANGES = {
    *("make_folder", "create", "write", "allocate", "truncate"),
    *("rename", "link", "remove", "remove_folder"),
}


class BeforeChange:
    """Watches the changes of a folder, and acts before chosen ones."""

    def __init__(
        self, is_chosen: Callable[[int, Operation], bool], act: Callable[[Operation], None]
    ) -> None:
        """is_chosen: called with the number of each change, from 1 on, and the change."""
        self.changes = 0
        self._is_chosen = is_chosen
        self._act = act
        self._lock = threading.Lock()

    def before(self, operation: Operation) -> None:
        """Count it, and act if it is chosen."""
        if operation.kind not in CHANGES:
            return
        with self._lock:
            self.changes += 1
            if self._is_chosen(self.changes, operation):
                self._act(operation)

    def after(self, operation: Operation) -> None:
        """Does nothing."""
