"""Any checkpoint -> a checkpoint folder of this engine, which torch reads too."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from pytest_dcp._engine.conversion.changes import Changes, Dtypes, Patterns
from pytest_dcp._engine.conversion.converted_contents import (
    ConversionReport,
    ConvertedContents,
    Source,
    open_source,
)
from pytest_dcp._engine.conversion.target_paths import split_options, target_folder
from pytest_dcp._engine.conversion.whole_file import remove_if_new
from pytest_dcp._engine.format.python_values import encode_value
from pytest_dcp._engine.huggingface.consolidate import Report, report_nothing
from pytest_dcp._engine.plan.select import Rename
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
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
    storage_options: Mapping[str, Any] | None = None,
    report: Report = report_nothing,
) -> ConversionReport:
    """Convert a checkpoint to a folder, or a URL, that `load` reads. No process group is used.

    source: a path or URL that `open_checkpoint` takes, or an open checkpoint.
    include, exclude, rename, dtype, storage_options, report: as for `to_safetensors`.

    One tensor at a time is in memory, and all values. The target is replaced by one rename, as in
    a save; after a failure it is as it was. Raises as `open_checkpoint` and `save`.
    """
    changes = Changes(include, exclude, rename, dtype)
    source_options, target_options = split_options(source, target, storage_options)
    folder = target_folder(target, target_options)
    with open_source(source, changes, source_options) as contents, remove_if_new(folder):
        save_contents(contents, target, target_options, report)
        return contents.report(values=len(contents.values))


def save_contents(
    contents: ConvertedContents,
    target: PathLike,
    storage_options: Mapping[str, Any] | None = None,
    report: Report = report_nothing,
) -> None:
    """Save all tensors and values to a folder, or a URL. Raises as `save`."""
    planner = _ConversionPlanner(contents, report)
    with without_single_process_warning():
        state = contents.build_state(planner.stand_in)
        save(
            state,
            checkpoint_id=target,
            planner=planner,
            no_dist=True,
            storage_options=storage_options,
        )


class _ConversionPlanner(DefaultSavePlanner):
    """Saves stand-ins without memory; each tensor is read when its turn to be written comes."""

    def __init__(self, contents: ConvertedContents, report: Report) -> None:
        super().__init__(replicas="off")
        self._contents = contents
        self._report = report

    def stand_in(self, name: str) -> Any:
        """A tensor of the right shape and dtype, of one element repeated; or the value."""
        tensor = self._contents.tensors.get(name)
        if tensor is None:
            return self._contents.read_value(name)
        return torch.zeros((), dtype=torch.uint8).to(tensor.dtype).expand(tensor.shape)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The tensor, read now, or the value's entry."""
        fqn = write_item.index.fqn
        if fqn not in self._contents.tensors and write_item.type != WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)  # Of a value that is more than one item.
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(encode_value(self.state_dict[fqn]))
        self._report(fqn)
        return self._contents.read_whole(fqn)
