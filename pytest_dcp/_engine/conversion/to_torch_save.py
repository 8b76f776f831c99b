"""Any checkpoint -> the one file of `torch.save`, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pytest_dcp._engine.conversion.changes import Changes, Dtypes, Patterns
from pytest_dcp._engine.conversion.converted_contents import (
    ConversionReport,
    Source,
    open_source,
)
from pytest_dcp._engine.conversion.target_paths import split_options, target_file
from pytest_dcp._engine.conversion.torch_save_writer import BUDGET_BYTES, TorchSaveWriter
from pytest_dcp._engine.conversion.whole_file import write_whole_file
from pytest_dcp._engine.huggingface.consolidate import Report, report_nothing
from pytest_dcp._engine.plan.select import Rename
from pytest_dcp.tracebacks import drop_inner_frames

PathLike = str | os.PathLike[str]


@drop_inner_frames
def to_torch_save(
    source: Source,
    target: PathLike,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    dtype: Dtypes | None = None,
    budget_bytes: int = BUDGET_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    report: Report = report_nothing,
) -> ConversionReport:
    """Convert a checkpoint to a file that `torch.load` reads. No process group is used.

    source: a path or URL that `open_checkpoint` takes, or an open checkpoint.
    target: the file; an existing one is replaced when the new one is complete and synced.
    include, exclude, rename, dtype: as for `to_safetensors`.
    budget_bytes: memory for tensors; values are in memory besides.
    storage_options: of the file systems of URLs, of source and target: keys, endpoints.
    report: called with the name of each tensor that is written.

    If all names are kept, the state dict is nested as it was saved; otherwise it is flat.

    A failure leaves no file. Raises as `open_checkpoint`, and OSError if it cannot be written.
    """
    changes = Changes(include, exclude, rename, dtype)
    source_options, target_options = split_options(source, target, storage_options)
    folder, name = target_file(target, target_options)
    if budget_bytes < 1:
        raise ValueError(f"budget_bytes must be a positive number of bytes, got {budget_bytes}")
    with open_source(source, changes, source_options) as contents:
        writer = TorchSaveWriter(contents)
        with write_whole_file(folder, name) as out:
            writer.write(out, contents.read_slabs, budget_bytes, report)
        return contents.report(values=len(contents.values))
