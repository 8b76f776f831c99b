"""Quantised safetensors checkpoints, read as the tensors that they represent.

Two ways of quantising are supported, recognised by the names of tensors as in torch's
`torch.distributed.checkpoint.quantized_hf_storage`:

- `x.weight` with `x.weight_scale_inv`: a matrix in square blocks, one factor each (DeepSeek);
- `x_blocks` with `x_scales`: MXFP4, bytes of two 4-bit values in groups along the last dimension,
  each with one power of two (gpt-oss). It is shown with its groups flattened.

Plans see the shape and dtype of the dequantised tensor; the reader reads only the quantised part
that a piece needs and its scales. Each thread holds `PIECE_BYTES` of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.huggingface.consolidate import Shards
from pytest_dcp._engine.huggingface.reader import HuggingFaceStorageReader
from pytest_dcp._engine.io.progress_observer import Observer, observer
from pytest_dcp._engine.io.tensor_batches import Slab
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.hooks import is_overridden
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.storages.load_into_targets import LoadedBytes
from pytest_dcp.errors import CheckpointCorruptError

__all__ = ["QuantizedHuggingFaceStorageReader"]

PIECE_BYTES = 32 << 20
"""Of dequantised values, in float32."""

FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""Of the 16 codes of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3)."""
E8M0_BIAS = 127
"""Bias of the exponents in MXFP4's scales (section 5.4.1)."""


class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader):
    """Reads a quantised checkpoint and dequantises it on the fly."""

    def __init__(
        self,
        path: str,
        thread_count: int = 1,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
        *,
        max_decoded_bytes: int | None = None,
        follow_links: bool = True,
    ) -> None:
        """As torch's.

        path: the checkpoint's folder. thread_count: threads that read. target_dtype: the dtype of
        dequantised values, before they are copied to the plan's targets. block_size: rows and
        columns of a block of a matrix. max_decoded_bytes, follow_links: as
        HuggingFaceStorageReader's.
        """
        super().__init__(
            path, thread_count, max_decoded_bytes=max_decoded_bytes, follow_links=follow_links
        )
        if block_size < 1:
            raise ValueError(f"expected a block_size of 1 or more, got {block_size}")
        self.target_dtype = target_dtype
        self.block_size = block_size
        self._stored: Catalog | None = None
        self._scale_of: dict[str, str] = {}

    def may_share_reads(self) -> bool:
        """Never: the tensors read are not those of the plan, but quantised."""
        return False

    def _overrides_read_data(self) -> bool:
        return is_overridden(self, QuantizedHuggingFaceStorageReader, "read_data")

    def _read_catalog(self) -> Catalog:
        """The catalog that plans see; the stored form is kept for reading."""
        self._stored = stored = super()._read_catalog()
        self._scale_of = scales_of(stored.index)
        return replace(
            stored, index=dequantised_index(stored.index, self._scale_of, self.target_dtype)
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Set the metadata from which plans will be made."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        if self._stored is None:
            self._read_catalog()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into the planner's targets; finished when it returns the
        future."""
        if self._has_requests_of_its_own():
            return super().read_data(plan, planner)
        items = ReadItems.of(plan.items)
        quantised = np.array([fqn in self._scale_of for fqn in items.stored_fqns], dtype=bool)
        plain = LoadedBytes()
        future: Future[None] = Future()
        future.set_result(None)
        if not quantised.all():
            rest: Any = items.take(np.flatnonzero(~quantised))
            future = super().read_data(replace(plan, items=rest), planner)
            plain = self.filled
        rows = np.flatnonzero(quantised).tolist()
        watcher = observer("load")
        pieces = [self._pieces(items, row) for row in rows]
        nbytes = sum(piece.nbytes for some in pieces for piece in some)
        watcher.expect(watcher.total_bytes + nbytes)
        jobs = [
            self._job(items, row, some, planner, watcher)
            for row, some in zip(rows, pieces, strict=True)
        ]
        run_all(jobs, self.thread_count or 1)
        self.filled = LoadedBytes(
            plain.bytes_needed + nbytes, plain.bytes_read + nbytes, plain.bytes_verified
        )
        return future

    def _has_requests_of_its_own(self) -> bool:
        return is_overridden(self, QuantizedHuggingFaceStorageReader, "_process_read_request")

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        """Fill one item, dequantising if needed: torch's hook, for subclasses."""
        if req.storage_index.fqn not in self._scale_of:
            super()._process_read_request(f, req, planner)
            return
        items = ReadItems.of([req])
        self._job(items, 0, self._pieces(items, 0), planner, observer("load"))(StopFlag())

    def _pieces(self, items: ReadItems, row: int) -> list[Piece]:
        """The row's box in pieces of bounded size along its first dimension."""
        ndim = int(items.ndim[row])
        offset = (items.stored[row] + items.from_offset[row])[:ndim].tolist()
        shape = items.shape[row, :ndim].tolist()
        fqn = items.stored_fqns[row]
        way = self._way(fqn)
        step = max(1, PIECE_BYTES // max(1, 4 * math.prod(shape[1:])))
        pieces = []
        for start in range(0, shape[0], step):
            low, high = list(offset), [a + b for a, b in zip(offset, shape, strict=True)]
            low[0] += start
            high[0] = min(low[0] + step, high[0])
            pieces.append(way(Box(tuple(low), tuple(high)), start))
        return pieces

    def _way(self, fqn: str) -> Callable[[Box, int], Piece]:
        if self._stored is None:
            raise ValueError("read_metadata must be called before read_data")
        index = self._stored.index
        values = _stored_kind(index, fqn)
        scale = _stored_kind(index, self._scale_of[fqn])
        if fqn.endswith("_blocks"):
            return lambda box, start: mxfp4_piece(values, scale, box, start)
        if len(values.shape) != 2:
            raise ValueError(
                f"Unsupported quantization types: {fqn!r} has shape {values.shape}, expected a "
                "matrix, or a name that ends with '_blocks'"
            )
        return lambda box, start: matrix_piece(values, scale, box, start, self.block_size)

    def _job(
        self,
        items: ReadItems,
        row: int,
        pieces: Sequence[Piece],
        planner: LoadPlanner,
        watcher: Observer,
    ) -> Callable[[StopFlag], None]:
        def run(stop: StopFlag) -> None:
            item = items[row]
            target = planner.resolve_tensor(item).detach()
            if target.size() != item.lengths:
                raise ValueError(
                    f"req {item.storage_index} mismatch sizes {target.size()} vs {item.lengths}"
                )
            for piece in pieces:
                stop.check()
                values = self._dequantise(piece, watcher)
                target.narrow(0, piece.start, len(values)).copy_(values)
            planner.commit_tensor(item, target)

        return run

    def _dequantise(self, piece: Piece, watcher: Observer) -> torch.Tensor:
        if self._stored is None:
            raise ValueError("read_metadata must be called before read_data")
        shards = Shards(self._folder(), self._stored)
        values, scale = shards.read([piece.values, piece.scale], watcher)
        if piece.skip is None:
            return matrix_values(values, scale, piece, self.block_size, self.target_dtype)
        flat = mxfp4_values(values, scale, self.target_dtype)
        return flat.narrow(-1, piece.skip, piece.box.high[-1] - piece.box.low[-1])


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open box of a dequantised tensor."""

    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """The reads needed for a box."""

    values: Slab
    scale: Slab
    box: Box
    start: int
    """Where the piece lands in the target, along its first dimension."""
    skip: int | None = None
    """Values of the first MXFP4 group that are before the box; None for a matrix."""

    @property
    def nbytes(self) -> int:
        """To be read."""
        return self.values.nbytes + self.scale.nbytes


def scales_of(index: Index) -> dict[str, str]:
    """The name of each quantised tensor's scales. Pure (no I/O)."""
    found: dict[str, str] = {}
    for fqn in index.fqns:
        for scale, values in ((".weight_scale_inv", ".weight"), ("_scales", "_blocks")):
            quantised = fqn.removesuffix(scale) + values
            if fqn.endswith(scale) and quantised in index.row_of:
                found[quantised] = fqn
    return found


def dequantised_index(index: Index, scale_of: Mapping[str, str], dtype: torch.dtype) -> Index:
    """The index, row by row, of the dequantised tensors. Pure (no I/O)."""
    ndim, property_of = index.ndim.copy(), index.property_of.copy()
    size, offset, shape = index.size.copy(), index.offset.copy(), index.shape.copy()
    for fqn in scale_of:
        key = index.row_of[fqn]
        property_of[key] = len(index.properties)
        last = int(index.ndim[key]) - 1
        if not fqn.endswith("_blocks") or last < 1:
            continue
        chunks = slice(int(index.first[key]), int(index.first[key + 1]))
        bytes_each = int(size[key, last])
        if (offset[chunks, last] != 0).any() or (shape[chunks, last] != bytes_each).any():
            raise CheckpointCorruptError(
                "expected MXFP4 groups that are stored whole, got parts", entry=fqn
            )
        size[key, last - 1] *= 2 * bytes_each
        offset[chunks, last - 1] *= 2 * bytes_each
        shape[chunks, last - 1] *= 2 * bytes_each
        size[key, last] = shape[chunks, last] = 1
        ndim[key] = last
    return replace(
        index,
        ndim=ndim,
        property_of=property_of,
        properties=(*index.properties, TensorProperties(dtype)),
        size=size,
        offset=offset,
        shape=shape,
    )


def _stored_kind(index: Index, fqn: str) -> Slab:
    """The whole stored tensor, as a slab."""
    key = index.row_of[fqn]
    shape = tuple(index.size[key, : index.ndim[key]].tolist())
    dtype = index.properties[index.property_of[key]].dtype
    return Slab(fqn, dtype, (0,) * len(shape), shape)


def _part(whole: Slab, low: Sequence[int], high: Sequence[int]) -> Slab:
    """A box of a stored tensor. Raises CheckpointCorruptError if it exceeds the tensor."""
    if len(low) != len(whole.shape) or any(h > n for h, n in zip(high, whole.shape, strict=True)):
        raise CheckpointCorruptError(
            f"expected scales and values for elements up to {list(high)}, got shape {whole.shape}",
            entry=whole.fqn,
        )
    shape = tuple(h - n for n, h in zip(low, high, strict=True))
    return replace(whole, offset=tuple(low), shape=shape)


def matrix_piece(values: Slab, scale: Slab, box: Box, start: int, block: int) -> Piece:
    """The reads for a box of a matrix in blocks. Pure (no I/O)."""
    low = [n // block for n in box.low]
    high = [-(-n // block) for n in box.high]
    return Piece(_part(values, box.low, box.high), _part(scale, low, high), box, start)


def mxfp4_piece(values: Slab, scale: Slab, box: Box, start: int) -> Piece:
    """The reads for a box of a flattened MXFP4 tensor: whole groups. Pure (no I/O)."""
    bytes_each = values.shape[-1]
    each = 2 * bytes_each
    low = (*box.low[:-1], box.low[-1] // each)
    high = (*box.high[:-1], -(-box.high[-1] // each))
    return Piece(
        _part(values, (*low, 0), (*high, bytes_each)),
        _part(scale, low, high),
        box,
        start,
        skip=box.low[-1] - low[-1] * each,
    )


def matrix_values(
    values: torch.Tensor, scale: torch.Tensor, piece: Piece, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """The values of a box of a matrix, each multiplied by its block's factor, in float32."""
    rows, columns = (
        torch.arange(low, high) // block - low // block
        for low, high in zip(piece.box.low, piece.box.high, strict=True)
    )
    product = values.to(torch.float32)
    return product.mul_(scale.to(torch.float32)[rows][:, columns]).to(dtype)


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of whole MXFP4 groups, flattened; the low half of each byte comes first."""
    table = torch.tensor(FP4_VALUES, dtype=dtype)
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2).long()
    exponents = (scales.to(torch.int32) - E8M0_BIAS).unsqueeze(-1)
    return torch.ldexp(table[codes], exponents).to(dtype).flatten(-2)
