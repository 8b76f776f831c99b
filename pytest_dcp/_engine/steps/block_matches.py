"""Which blocks of a save refer to an earlier step, and which are written where.

Two of three rows are as before. The earlier file holds little else, so both refer to it:

>>> choose_files({0: 7, 2: 8}, {7: ("a", 60), 8: ("a", 30)}, {"a": 100})
({0: 7, 2: 8}, [])

If it is mostly data that has changed since, they are written anew, so that it can go:

>>> choose_files({0: 7, 2: 8}, {7: ("a", 60), 8: ("a", 30)}, {"a": 1000})
({}, [0, 2])
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pytest_dcp._engine.format.block_hashes import DIGEST_BYTES
from pytest_dcp._engine.format.wrapper_entry import WrapperEntry
from pytest_dcp._engine.format.write_results import WriteColumns
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.io.write_files import FileJob, Source, WriteRequest
from pytest_dcp._engine.plan.boxes import row_bounds
from pytest_dcp._engine.steps.block_hash import PIECE_BYTES, hash_block
from pytest_dcp._engine.steps.earlier_blocks import EarlierBlocks

MOST_FILES = 32
"""Files of earlier steps that one rank refers to. Each costs every save a link and a look at its
size, and a run that changes a little everywhere would collect thousands."""
APART_FROM_BYTES = 1 << 20
"""From this size on, blocks that are as before but are written anew get a file of their own."""


@dataclass(slots=True)
class BlockMatches:
    """The findings of one rank about the rows of its plan."""

    earlier: dict[int, int] = field(default_factory=dict)
    """Row of the plan -> row of the earlier index with the same block."""
    digests: dict[int, bytes] = field(default_factory=dict)
    """The hashes of rows, where they were computed."""


def find_matches(request: WriteRequest, blocks: EarlierBlocks) -> BlockMatches:
    """The rows whose blocks the earlier step has."""
    copy_bytes, matches = _copy_bytes(request), BlockMatches()

    def look_at(rows: Sequence[int]) -> Callable[[StopFlag], None]:
        def look(stop: StopFlag) -> None:
            for row in rows:
                stop.check()
                data = request.source(row)
                if not _has_hash(data):
                    continue
                found, digest = blocks.find(data, copy_bytes)
                if digest is not None:
                    matches.digests[row] = digest
                if found is not None:
                    matches.earlier[row] = found

        return look

    run_all([look_at(job.rows) for job in request.jobs], request.settings.threads)
    return matches


def choose_files(
    earlier: Mapping[int, int],
    places: Mapping[int, tuple[str, int]],
    file_bytes: Mapping[str, int],
) -> tuple[dict[int, int], list[int]]:
    """The rows that refer to the earlier step, and the rows that could but are written anew. Pure.

    earlier: as `BlockMatches`. places: the file and the bytes of each earlier row.
    file_bytes: sizes of the files. At least half of a file must be of use, and at most
    `MOST_FILES` are referred to; of more than these, the half with the most bytes of use.
    """
    useful: dict[str, int] = defaultdict(int)
    for row in set(earlier.values()):
        name, nbytes = places[row]
        useful[name] += nbytes
    chosen = [name for name, nbytes in useful.items() if 2 * nbytes >= file_bytes[name]]
    if len(chosen) > MOST_FILES:
        chosen = sorted(chosen, key=lambda name: (-useful[name], name))[: MOST_FILES // 2]
    kept_files = set(chosen)
    used = {row: at for row, at in earlier.items() if places[at][0] in kept_files}
    return used, sorted(earlier.keys() - used.keys())


def remaining_jobs(
    jobs: Sequence[FileJob], used: Mapping[int, int], apart: Sequence[int], spare: FileJob
) -> list[FileJob]:
    """The jobs without the rows that are not written, and the rows apart as a job of their own.

    spare: its name and size. Pure.

    >>> jobs = [FileJob("f0", [0, 1], 90), FileJob("f1", [2], 10)]
    >>> remaining = remaining_jobs(jobs, {2: 8}, [1], FileJob("f9", [], 50))
    >>> [(job.name, job.rows, job.nbytes) for job in remaining]
    [('f0', [0], 0), ('f9', [1], 50)]
    """
    away = {*used, *apart}
    remaining = []
    for job in jobs:
        rows = [row for row in job.rows if row not in away]
        if len(rows) == len(job.rows):
            remaining.append(job)
        elif rows:
            # Its size is a lower bound, which is not known for some of the rows.
            remaining.append(FileJob(job.name, rows, 0))
    return [*remaining, replace(spare, rows=apart)] if apart else remaining


def hash_source(request: WriteRequest, digests: dict[int, bytes], hash_name: str) -> Source:
    """The request's source, which also computes the hash of each row that has none yet."""
    copy_bytes = _copy_bytes(request)

    def source(row: int) -> torch.Tensor | bytes:
        data = request.source(row)
        if row not in digests and _has_hash(data):
            digests[row] = hash_block(data, hash_name, copy_bytes)
        return data

    return source


def _copy_bytes(request: WriteRequest) -> int:
    """Bytes to copy at a time; a save of a staged state has nothing to copy, and says 0."""
    return max(request.settings.copy_ahead_bytes, PIECE_BYTES)


def _has_hash(data: torch.Tensor | bytes) -> bool:
    """A wrapper of other tensors is written in torch's own pickle: it is no block."""
    if isinstance(data, torch.Tensor):
        return data.numel() > 0
    return len(data) > 0 and type(data) is not WrapperEntry


def join_columns(
    written: WriteColumns,
    written_rows: Sequence[int],
    used: Mapping[int, int],
    blocks: EarlierBlocks | None,
) -> WriteColumns:
    """The places of all rows: the written ones, and the ones in files of the earlier step.

    written_rows: the rows of `written`, ascending. Pure.
    """
    if blocks is None or not used:
        return written
    rows = sorted(used)
    earlier = np.array([used[row] for row in rows], dtype=np.int64)
    places = blocks.places
    names = sorted({blocks.file_of(row) for row in earlier.tolist()})
    number = {name: len(written.files) + at for at, name in enumerate(names)}
    file = np.array([number[blocks.file_of(row)] for row in earlier.tolist()], dtype=np.int32)
    order = np.argsort(np.array([*written_rows, *rows], dtype=np.int64), kind="stable")
    sums = [
        *np.split(written.sums, written.first_sum[1:-1].tolist() if len(written_rows) else []),
        *(places.sums[places.first_sum[row] : places.first_sum[row + 1]] for row in earlier),
    ][-len(order) :]
    ordered = [sums[at] for at in order.tolist()]
    return replace(
        written,
        files=(*written.files, *names),
        file=np.concatenate([written.file, file])[order],
        start=np.concatenate([written.start, places.start[earlier]])[order],
        length=np.concatenate([written.length, places.length[earlier]])[order],
        data_start=np.concatenate([written.data_start, places.data_start[earlier]])[order],
        data_nbytes=np.concatenate([written.data_nbytes, places.data_nbytes[earlier]])[order],
        first_sum=row_bounds(np.array([len(some) for some in ordered], dtype=np.int64)),
        sums=np.concatenate([np.zeros(0, dtype=np.uint32), *ordered]),
    )


def digest_table(digests: Mapping[int, bytes], rows: int) -> NDArray[np.uint8]:
    """The hashes as `WriteColumns` has them: zeros where there is none."""
    table = np.zeros((rows, DIGEST_BYTES), dtype=np.uint8)
    for row, digest in digests.items():
        table[row] = np.frombuffer(digest, dtype=np.uint8)
    return table
