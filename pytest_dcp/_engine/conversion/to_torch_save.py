"""Any checkpoint -> the one file of `torch.save`, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import os

import torch

from pytest_dcp._engine.conversion.changes import Changes, Dtypes, Patterns
from pytest_dcp._engine.conversion.converted_contents import (
    ConversionReport,
    ConvertedContents,
    Source,
    open_source,
)
from pytest_dcp._engine.conversion.mapped_archive import MappedArchive
from pytest_dcp._engine.conversion.target_paths import target_file
from pytest_dcp._engine.conversion.whole_file import replace_at_end
from pytest_dcp._engine.plan.select import Rename
from pytest_dcp.tracebacks import drop_inner_frames

PathLike = str | os.PathLike[str]
TOGETHER = 512
"""Tensors read at a time: enough that reading costs more than planning it."""


@drop_inner_frames
def to_torch_save(
    source: Source,
    target: PathLike,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    dtype: Dtypes | None = None,
) -> ConversionReport:
    """Convert a checkpoint to a file that `torch.load` reads. No process group is used.

    source: a path or URL that `open_checkpoint` takes, or an open checkpoint.
    target: the file; an existing one is replaced when the new one is complete and synced.
    include, exclude, rename, dtype: as for `to_safetensors`.

    Tensors are read into the mapped file, so the whole state is never in memory. If all names are
    kept, the state dict is nested as it was saved; otherwise it is flat.

    A failure leaves no file. Raises as `open_checkpoint`, and OSError if it cannot be written.
    """
    changes = Changes(include, exclude, rename, dtype)
    path = target_file(target)
    with open_source(source, changes) as contents, replace_at_end(path) as fd:
        archive = MappedArchive(fd)
        archive.allocate({name: tensor.nbytes for name, tensor in contents.tensors.items()})
        tensors = {
            name: archive.tensor(name, tensor.shape, tensor.dtype)
            for name, tensor in contents.tensors.items()
        }
        _fill(contents, tensors)
        archive.close(
            contents.build_state(
                lambda name: tensors[name] if name in tensors else contents.read_value(name)
            )
        )
        return contents.report(values=len(contents.values))


def _fill(contents: ConvertedContents, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    for start in range(0, len(names), TOGETHER):
        contents.read_parts(
            [
                (name, (0,) * tensors[name].dim(), tensors[name])
                for name in names[start : start + TOGETHER]
            ]
        )
