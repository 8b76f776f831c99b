"""Any checkpoint -> a checkpoint folder of this engine, which torch reads too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from pytest_dcp._engine.conversion.changes import Changes, Dtypes, Patterns
from pytest_dcp._engine.conversion.conversion_planner import ConversionPlanner, stand_in
from pytest_dcp._engine.conversion.converted_contents import (
    ConversionReport,
    ConvertedContents,
    Source,
    open_source,
)
from pytest_dcp._engine.conversion.dcp_in_processes import save_in_processes
from pytest_dcp._engine.conversion.target_paths import split_options, target_folder
from pytest_dcp._engine.conversion.whole_file import remove_if_new
from pytest_dcp._engine.conversion.worker_processes import choose_processes
from pytest_dcp._engine.huggingface.consolidate import Report, report_nothing
from pytest_dcp._engine.plan.select import Rename
from pytest_dcp._engine.verbs.save import save
from pytest_dcp._engine.verbs.torch_arguments import without_single_process_warning
from pytest_dcp.tracebacks import drop_inner_frames

PathLike = str | os.PathLike[str]


@drop_inner_frames
def to_dcp(
    source: Source,
    target: PathLike,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    dtype: Dtypes | None = None,
    processes: int | None = 1,
    storage_options: Mapping[str, Any] | None = None,
    report: Report = report_nothing,
) -> ConversionReport:
    """Convert a checkpoint to a folder, or a URL, that `load` reads. No process group is used.

    source: a path or URL that `open_checkpoint` takes, or an open checkpoint.
    include, exclude, rename, dtype, storage_options, report: as for `to_safetensors`.
    processes: that write tensors, each to a file of its own, on Linux; None: several if the work is
        large.

    Each process has one tensor in memory at a time; all values are in memory. The target is
    replaced by one rename, as in a save; after a failure it is as it was. Raises as
    `open_checkpoint` and `save`.
    """
    changes = Changes(include, exclude, rename, dtype)
    source_options, target_options = split_options(source, target, storage_options)
    folder = target_folder(target, target_options)
    with open_source(source, changes, source_options) as contents, remove_if_new(folder):
        nbytes = sum(tensor.nbytes for tensor in contents.tensors.values())
        places = contents.checkpoint.where, target
        count = choose_processes(processes, nbytes, len(contents.tensors), *places)
        bytes_read = 0
        if count > 1:
            with without_single_process_warning():
                bytes_read = save_in_processes(contents, target, count, target_options, report)
        else:
            save_contents(contents, target, target_options, report)
        return contents.report(values=len(contents.values), bytes_read=bytes_read)


def save_contents(
    contents: ConvertedContents,
    target: PathLike,
    storage_options: Mapping[str, Any] | None = None,
    report: Report = report_nothing,
) -> None:
    """Save all tensors and values to a folder, or a URL. Raises as `save`."""
    planner = ConversionPlanner(contents, report)
    with without_single_process_warning():
        state = contents.build_state(partial(stand_in, contents))
        save(
            state,
            checkpoint_id=target,
            planner=planner,
            no_dist=True,
            storage_options=storage_options,
        )
