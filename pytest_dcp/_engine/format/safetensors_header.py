"""The header of a safetensors file: tensors' names, dtypes, shapes and places <-> JSON.

A file is eight bytes that say how long the header is (little-endian), the header in JSON with each
tensor's dtype, shape and place, and the data without gaps, row-major and little-endian
(https://github.com/huggingface/safetensors#format). torch adds, under `DCP_SHARDING_INFO`, where in
the full tensor each stored part begins; the engine adds the full size there.

Pure (no I/O). `decode` does not trust its input: anything that does not fit raises
CheckpointCorruptError, and no memory is allocated because of a number in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit, estimate_json_bytes
from pytest_dcp._engine.plan.columns import BYTES, WriteItems
from pytest_dcp.errors import CheckpointCorruptError

METADATA_KEY = "__metadata__"
SHARDING_KEY = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"
SIZE_KEY = "full_size"
"""Ours, besides torch's `saved_offsets`: it shows a missing last part as a gap, not as a smaller
tensor."""
FQN_KEY = "fqn"
"""Ours: the tensor of a part that could not have the tensor's name in the file."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit (MAX_HEADER_SIZE of its implementation)."""
LENGTH_BYTES = 8
ALIGNMENT = 64
"""Alignment of the first tensor's data; the format asks for at most 8, vector loads prefer 64."""
MAX_DIMS = 64
MAX_TENSOR_BYTES = 1 << 62
"""As of `format.catalog_checks`: every number derived from a tensor's place fits int64."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The format's dtypes whose elements are whole bytes, so not F4 and the F6 kinds."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Bytes from the start of the data to its own."""

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A file's description of itself."""

    tensors: tuple[StoredTensor, ...]
    """In the order of their data."""
    metadata: Mapping[str, str]
    data_start: int
    """Bytes from the file's start to the data."""


def place_tensors(kinds: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> list[StoredTensor]:
    """Tensors of these names, dtypes and shapes, one after the other.

    Raises TypeError for a dtype that the format does not have.
    """
    tensors: list[StoredTensor] = []
    start = 0
    for name, dtype, shape in kinds:
        if dtype not in NAMES:
            raise TypeError(
                f"{name!r} is {dtype}, which safetensors files cannot hold: they have {[*DTYPES]}"
            )
        tensors.append(StoredTensor(name, dtype, shape, start))
        start += tensors[-1].nbytes
    return tensors


def encode(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file up to its data, a multiple of 64.

    Raises ValueError for duplicate or reserved names, and for too many names.
    """
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for tensor in tensors:
        if tensor.name in header or tensor.name == METADATA_KEY:
            raise ValueError(f"expected one tensor of each name, and none {tensor.name!r}")
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.start + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"a header of {len(text)} bytes for {len(tensors)} tensors; the format allows "
            f"{MAX_HEADER_BYTES}: write more files"
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(head: bytes | memoryview, file_bytes: int) -> int:
    """Bytes of JSON that follow a file's first eight bytes.

    Raises CheckpointCorruptError if the file is too short for them, or the format's limit too low.
    """
    if len(head) < LENGTH_BYTES:
        raise CheckpointCorruptError(
            f"expected a safetensors file of at least {LENGTH_BYTES} bytes, got {file_bytes}",
            offset=0,
        )
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise CheckpointCorruptError(
            f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes in a file of "
            f"{file_bytes}, got a length of {length}",
            offset=0,
        )
    return length


def decode(text: bytes | memoryview, file_bytes: int, limit: MemoryLimit = DEFAULT_LIMIT) -> Header:
    """The header of a file of this size, from the JSON after its first eight bytes.

    Raises CheckpointCorruptError naming the tensor and where in the file it should be.
    """
    content = parse_json(text, "a safetensors header", limit)
    metadata = content.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise CheckpointCorruptError(f"expected {METADATA_KEY!r} to map names to strings")
    data_start = LENGTH_BYTES + len(text)
    tensors = sorted(
        (_tensor(name, description, data_start) for name, description in content.items()),
        key=lambda tensor: (tensor.start, tensor.nbytes),
    )
    end = 0
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointCorruptError(
                f"expected data without gaps or overlaps: this should start at {data_start + end}",
                entry=tensor.name,
                offset=data_start + tensor.start,
            )
        end += tensor.nbytes
    if data_start + end != file_bytes:
        raise CheckpointCorruptError(
            f"expected a file of {data_start + end} bytes for its {len(tensors)} tensors, got "
            f"{file_bytes}: it was cut off, or holds more than it says",
            offset=min(data_start + end, file_bytes),
        )
    return Header(tuple(tensors), metadata, data_start)


def _tensor(name: str, description: Any, data_start: int) -> StoredTensor:
    def fail(expected: str) -> NoReturn:
        raise CheckpointCorruptError(f"expected {expected}, got {description!r:.200}", entry=name)

    if not isinstance(description, dict) or description.keys() != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        fail("a dtype, a shape and data_offsets")
    dtype, shape, offsets = description["dtype"], description["shape"], description["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        fail(f"one of the dtypes {[*DTYPES]}")
    if not counts(shape) or len(shape) > MAX_DIMS:
        fail(f"a shape of at most {MAX_DIMS} sizes of 0 or more")
    if not counts(offsets) or len(offsets) != 2:
        fail("two data_offsets of 0 or more")
    tensor = StoredTensor(name, DTYPES[dtype], tuple(shape), offsets[0])
    # An empty dimension must not hide huge other ones: torch's strides are their products.
    if math.prod(max(side, 1) for side in shape) * tensor.dtype.itemsize > MAX_TENSOR_BYTES:
        fail(f"a tensor of at most {MAX_TENSOR_BYTES} bytes")
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise CheckpointCorruptError(
            f"expected {tensor.nbytes} bytes for {dtype} of shape {shape}, got {offsets}",
            entry=name,
            offset=data_start + min(offsets[0], MAX_TENSOR_BYTES),
        )
    return tensor


def counts(value: Any) -> bool:
    """Whether this is a list of ints of 0 or more, as JSON gives it."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def parse_json(
    text: bytes | memoryview | str, what: str, limit: MemoryLimit = DEFAULT_LIMIT
) -> dict[str, Any]:
    """A JSON object without duplicate names, read within the memory limit.

    Raises CheckpointCorruptError.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            rest = iter(dict.fromkeys(name for name, _ in pairs))
            twice = next(name for name, _ in pairs if next(rest, None) != name)
            raise CheckpointCorruptError(f"expected each name once in {what}", entry=twice[:200])
        for name in found:
            name.encode()  # halves of surrogate pairs are no names
        return found

    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON")

    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    limit.check(what, estimate_json_bytes(raw), len(raw))
    try:
        plain = text if isinstance(text, str) else str(text, "utf-8")
        found = json.loads(plain, object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"expected {what} in JSON, got {error!r:.200}") from None
    if not isinstance(found, dict):
        raise CheckpointCorruptError(f"expected {what} to be an object, got {type(found).__name__}")
    return found


def unique_names(names: Mapping[int, str]) -> dict[int, str]:
    """The names, each with a number appended if it is taken already: parts of one tensor share a
    name."""
    all_names = set(names.values())
    seen: set[str] = set()
    unique: dict[int, str] = {}
    for row, name in names.items():
        nth, chosen = 1, name
        while chosen in seen or (chosen != name and chosen in all_names):
            nth, chosen = nth + 1, f"{name}#{nth}"
        seen.add(chosen)
        unique[row] = chosen
    return unique


def sharding_of(table: WriteItems, names: Mapping[int, str]) -> str:
    """The text under `DCP_SHARDING_INFO` for these rows of the items, stored under these names."""
    shards: dict[str, dict[str, Any]] = {}
    for row, name in names.items():
        ndim = int(table.ndim[row])
        if table.kind[row] != BYTES:
            offset, size = table.offset[row, :ndim].tolist(), table.size[row, :ndim].tolist()
            shards[name] = {OFFSETS_KEY: offset, SIZE_KEY: size}
            if name != table.fqns[row]:
                shards[name][FQN_KEY] = table.fqns[row]
    return json.dumps(shards, separators=(",", ":"), ensure_ascii=False)
