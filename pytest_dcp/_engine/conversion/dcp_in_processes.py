"""Saves the contents of a conversion to a folder of this engine, in several processes.

One plan is made here and shared out: each process gets a part of the tensors, as a rank of a save
has, and writes them to a file of its own. The values are written here, and so is the commit. The
target is as it was until then; after a failure the new files are removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from pytest_dcp._engine.background.worker import send_advance
from pytest_dcp._engine.conversion.conversion_planner import ConversionPlanner, stand_in
from pytest_dcp._engine.conversion.converted_contents import (
    ConvertedContents,
    ConvertedTensor,
    TensorsToConvert,
)
from pytest_dcp._engine.conversion.worker_processes import opened_source, run_orders
from pytest_dcp._engine.huggingface.consolidate import Report
from pytest_dcp._engine.io.commit import data_name
from pytest_dcp._engine.io.write_files import balance_by_bytes
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.storages.folder_cleanup import discard_files
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.verbs.save_messages import compress_results, expand_results
from pytest_dcp._engine.verbs.storage_for_id import writer_for

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class WritePart:
    """Write the tensors of one plan, in another process; the results, and the bytes read."""

    writer: StorageWriter
    plan: SavePlan
    tensors: tuple[ConvertedTensor, ...]

    def run(self, line: Connection) -> tuple[Any, int]:
        """Carry it out; each tensor is one step of progress."""
        contents = TensorsToConvert(opened_source(), self.tensors)
        before = contents.checkpoint.bytes_read
        planner = ConversionPlanner(contents, lambda name: send_advance(line, 1))
        results = self.writer.write_data(self.plan, planner).value()
        return compress_results(results, self.plan), contents.checkpoint.bytes_read - before


def save_in_processes(
    contents: ConvertedContents,
    target: PathLike,
    processes: int,
    storage_options: Mapping[str, Any] | None,
    report: Report,
) -> int:
    """Save all tensors and values; returns the bytes that other processes have read."""
    writer = writer_for(None, target, storage_options)
    if not isinstance(writer, FileSystemWriter):
        raise TypeError(f"expected a folder or a URL, got one for a {type(writer).__name__}")
    planner = ConversionPlanner(contents, report)
    planner.set_up_planner(contents.build_state(partial(stand_in, contents)), is_coordinator=True)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    try:
        plan = writer.prepare_local_plan(planner.create_local_plan())
        joined, metadata = planner.create_global_plan(_share_out(plan, contents, processes))
        plans = writer.prepare_global_plan(joined)
        own, *parts = [
            replace(planner.finish_plan(one), storage_data=one.storage_data) for one in plans
        ]
        writer.register_files(
            data_name(one.storage_data.prefix, 0, one.storage_data.save) for one in parts
        )
        answers = _write_parts(contents, writer, parts, report)
        results: list[Sequence[WriteResult]] = [writer.write_data(own, planner).value()]
        results += [
            expand_results(written, part) for (written, _), part in zip(answers, parts, strict=True)
        ]
        writer.finish(metadata=metadata, results=results)  # type: ignore[arg-type]  # sequences
    except BaseException:
        discard_files(writer, "conversion")
        raise
    return sum(bytes_read for _, bytes_read in answers)


def _share_out(plan: SavePlan, contents: ConvertedContents, processes: int) -> list[SavePlan]:
    """A plan with the values, and one with an equal share of the tensors for each process."""
    tensors = [item for item in plan.items if item.index.fqn in contents.tensors]
    values = [item for item in plan.items if item.index.fqn not in contents.tensors]
    groups = balance_by_bytes(WriteItems.of(tensors).size_bytes(), processes)
    shares = [values, *([tensors[row] for row in group] for group in groups)]
    return [replace(plan, items=share) for share in shares]


def _write_parts(
    contents: ConvertedContents,
    writer: FileSystemWriter,
    parts: Sequence[SavePlan],
    report: Report,
) -> list[tuple[Any, int]]:
    orders = [
        WritePart(writer, part, tuple(contents.tensors[item.index.fqn] for item in part.items))
        for part in parts
    ]
    return run_orders(contents.checkpoint, orders, len(orders), report)
