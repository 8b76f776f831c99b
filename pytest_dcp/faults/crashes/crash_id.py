"""Pure (no I/O): a crash's id, by which another run finds the same crash again.

An id is the name of the model and a hash of the crash's encoding: JSON with the operations done
last, torn and lost, each by its position in the trace, rank, kind, files and offset. Nothing of it
depends on this program's classes, so ids that a CI log shows outlive renames here; changing the
encoding makes them useless, and a test pins one id.

Files have numbers, in the order in which the trace first names them: savers put random ids into
names. Bytes and clocks are left out, since they differ in every run. The kinds and offsets of the
operations are there so that after a change of the saver an old id finds no crash rather than
another one.

>>> steps = [
...     Operation("create", "tmp-4f1a"),
...     Operation("write", "tmp-4f1a", offset=0, nbytes=3),
...     Operation("rename", "tmp-4f1a", to="state"),
... ]
>>> for code in encode_operations(steps):
...     print(code)
[0, 0, 'create', 0, None, None]
[1, 0, 'write', 0, None, 0]
[2, 0, 'rename', 0, 1, None]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from pytest_dcp.faults.crash_models import Model
from pytest_dcp.faults.crashes.crash_points import CrashPoint, TornWriteAt
from pytest_dcp.faults.crashes.disk_model import DiskModel
from pytest_dcp.faults.crashes.losses import LostSet
from pytest_dcp.faults.crashes.object_store_model import ObjectStore
from pytest_dcp.faults.tap.operation import Operation

ID_DIGITS = 10

OperationCode = list[int | str | None]
"""Position in the trace, rank, kind, number of the file, number of the new name, offset."""


def encode_operations(operations: Sequence[Operation]) -> list[OperationCode]:
    """The code of each operation of a trace."""
    files: dict[str, int] = {}

    def number(path: str | None) -> int | None:
        return None if path is None else files.setdefault(path, len(files))

    return [
        [position, op.rank, op.kind, number(op.path), number(op.to), op.offset]
        for position, op in enumerate(operations)
    ]


def crash_id(
    model: Model,
    moment: CrashPoint,
    storage: DiskModel | ObjectStore,
    damage: LostSet | TornWriteAt,
    codes: Sequence[OperationCode],
) -> str:
    """The id of the crash that does this damage to the storage at a moment.

    codes: of the trace's operations, see `encode_operations`.
    """
    crash = {
        # The operations that ended before are the first ones of the trace: their number says all.
        "ended": moment.ended_count,
        "done besides": [codes[n] for n in moment.order[moment.ended_count :]],
        "last": codes[moment.order[-1]] if moment.order else None,
        "returned": sorted(moment.returned),
        "damage": _encode_damage(storage, damage, codes),
    }
    text = json.dumps(crash, sort_keys=True, separators=(",", ":"))
    return f"{model}-{hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]}"


def _encode_damage(
    storage: DiskModel | ObjectStore, damage: LostSet | TornWriteAt, codes: Sequence[OperationCode]
) -> dict[str, object]:
    if isinstance(damage, TornWriteAt):
        return {"torn": codes[damage.operation], "part": damage.part}
    if not isinstance(storage, DiskModel):
        return {}
    names = [storage.name_changes[n] for n in damage.names]
    changed = [storage.byte_changes[n] for n in damage.bytes]
    return {
        # A rename sets one name and removes another, and may lose either.
        "names": [[*codes[c.operation], "removed" if c.node is None else "set"] for c in names],
        "bytes": [codes[c.operation] for c in changed],
        "zeros": damage.zeros,
    }
