"""The save planner of a conversion: each tensor is read when its turn to be written comes."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from pytest_dcp._engine.conversion.converted_contents import ConvertedContents, TensorsToConvert
from pytest_dcp._engine.format.python_values import encode_value
from pytest_dcp._engine.huggingface.consolidate import Report
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner


class ConversionPlanner(DefaultSavePlanner):
    """Saves stand-ins without memory; each tensor is read when its turn to be written comes."""

    def __init__(self, contents: TensorsToConvert, report: Report) -> None:
        """report: called with the name of each tensor that is read."""
        super().__init__(replicas="off")
        self._contents = contents
        self._report = report

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The tensor, read now, or the value's entry."""
        fqn = write_item.index.fqn
        if fqn not in self._contents.tensors and write_item.type != WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)  # Of a value that is more than one item.
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(encode_value(self.state_dict[fqn]))
        self._report(fqn)
        return self._contents.read_whole(fqn)


def stand_in(contents: ConvertedContents, name: str) -> Any:
    """A tensor of the right shape and dtype, of one element repeated; or the value."""
    tensor = contents.tensors.get(name)
    if tensor is None:
        return contents.read_value(name)
    return torch.zeros((), dtype=torch.uint8).to(tensor.dtype).expand(tensor.shape)
