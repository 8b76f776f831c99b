"""Records read in one step equal the result of their opcodes, run one by one."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.unpickle import read_metadata
from pytest_dcp._engine.unpickle.interpreter import _interpret, run
from pytest_dcp._engine.unpickle.machine import MOST_LEARNT, PickleMachine
from pytest_dcp._engine.unpickle.metadata_classes import METADATA, STEPWISE, check_metadata
from pytest_dcp._engine.unpickle.metadata_records import LEFT_OUT
from pytest_dcp.errors import CheckpointCorruptError

NUMBERS = st.sampled_from([0, 1, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**40, 2**62])


def text(value: str) -> str:
    """An equal string that is another object, so that a pickler writes it out again."""
    return value.encode().decode()


def metadata_of(
    tensors: int,
    chunks: int,
    *,
    dims: int = 2,
    number: Callable[[int], int] = lambda n: n,
    own_text: bool = True,
    own_size: bool = True,
    descriptors: bool = True,
    by_rank: bool = True,
) -> Metadata:
    """As the coordinator of a torch save has it.

    own_text: names came from other ranks, each an object of its own. own_size: so did offsets.
    by_rank: the places are in the order of the ranks, not of the tensors.
    """
    entries: dict[str, Any] = {}
    places: list[tuple[int, MetadataIndex, _StorageInfo]] = []
    for tensor in range(tensors):
        fqn = f"layers.{tensor}.weight"
        boxes = [
            ChunkStorageMetadata(
                torch.Size([number(rank)] + [0] * (dims - 1) if dims else []),
                torch.Size([1] + [number(tensor)] * (dims - 1) if dims else []),
            )
            for rank in range(chunks)
        ]
        size = torch.Size([number(chunks)] * dims)
        entries[fqn] = TensorStorageMetadata(TensorProperties(torch.bfloat16), size, boxes)
        for rank, box in enumerate(boxes):
            offset = torch.Size(list(box.offsets)) if own_size else box.offsets
            index = MetadataIndex(text(fqn) if own_text else fqn, offset, rank)
            object.__setattr__(index, "offset", offset)
            path = f"__{rank}_0.distcp"
            place = _StorageInfo(text(path) if own_text else path, number(tensor), number(rank))
            if not descriptors:
                del place.__dict__["transform_descriptors"]
            places.append((rank, index, place))
    if by_rank:
        places.sort(key=lambda place: place[0])
    return Metadata(entries, None, {index: place for _, index, place in places})


def machine_of(data: bytes, by_records: bool = True) -> PickleMachine:
    """The machine after a whole pickle."""
    machine = PickleMachine(data, METADATA if by_records else STEPWISE)
    _interpret(machine)
    return machine


def framed(data: bytes) -> bytes:
    """The pickle with a frame as long as it is now."""
    return data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]


def assert_equal_memos(machine: PickleMachine, steps: PickleMachine) -> None:
    """The entries are of the same types, but for those that records leave out."""
    for got, expected in zip(machine.memo, steps.memo, strict=True):
        assert got is LEFT_OUT or type(got) is type(expected)


PROPERTIES = st.builds(
    TensorProperties,
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.just(torch.strided),
    st.booleans(),
    st.sampled_from([torch.contiguous_format, torch.preserve_format]),
    st.booleans(),
)


@given(
    st.lists(st.tuples(PROPERTIES, st.integers(0, 3), st.integers(1, 200)), max_size=30),
    st.sampled_from([4, 5]),
)
def test_descriptions_of_tensors_of_any_kind(
    some: list[tuple[TensorProperties, int, int]], protocol: int
) -> None:
    """With any properties, any number of chunks, and names of any length."""
    entries: dict[str, Any] = {}
    for n, (properties, chunks, length) in enumerate(some):
        boxes = [ChunkStorageMetadata(torch.Size([k]), torch.Size([1])) for k in range(chunks)]
        entries[f"{n}".ljust(length, ".")] = TensorStorageMetadata(
            properties, torch.Size([chunks]), boxes
        )
    data = pickle.dumps(Metadata(entries, None, {}), protocol)
    read = read_metadata(data)
    assert repr(read) == repr(pickle.loads(data))
    machine, steps = machine_of(data), machine_of(data, by_records=False)
    assert machine.spare == steps.spare
    assert_equal_memos(machine, steps)
    # None of them shares what can be changed.
    found = [read.state_dict_metadata[name].properties for name in read.state_dict_metadata]
    assert len({id(properties.__dict__) for properties in found}) == len({*map(id, found)})


def test_descriptions_with_one_chunk_each_are_records() -> None:
    machine = machine_of(pickle.dumps(metadata_of(9, 1)))
    # Names and classes are written out in the first description only.
    assert machine.memo.count(LEFT_OUT) >= 8 * (4 + 5)


@pytest.mark.parametrize(
    ("chunks", "changes"),
    [
        (1, {b"\x89": b"N"}),  # requires_grad: None
        (1, {b"t\x94b": b"t\x940"}),  # a state that is not set
        (1, {b"]\x94": b"N\x94"}),  # chunks: None
        (1, {b"ubaub": b"ubbub"}),  # a chunk is the list's state
        (2, {b"]\x94(": b"]\x94", b"ubeub": b"ubaub"}),  # the last chunk is appended to the first
    ],
)
def test_descriptions_that_look_different_are_left_to_the_opcodes(
    chunks: int, changes: dict[bytes, bytes]
) -> None:
    changed = pickle.dumps(metadata_of(3, chunks))
    for old, new in changes.items():
        at = changed.rindex(old)
        changed = framed(changed[:at] + new + changed[at + len(old) :])
    with pytest.raises(CheckpointCorruptError) as caught:
        read_metadata(changed)
    with pytest.raises(CheckpointCorruptError) as expected:
        read_stepwise(changed)
    assert str(caught.value) == str(expected.value)


def read_stepwise(data: bytes) -> Metadata:
    """The Metadata, opcode by opcode."""
    return check_metadata(run(data, STEPWISE))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("own_text", [True, False])
@pytest.mark.parametrize("own_size", [True, False])
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("by_rank", [True, False])
def test_every_way_that_torch_writes_them(
    protocol: int, own_text: bool, own_size: bool, descriptors: bool, by_rank: bool
) -> None:
    metadata = metadata_of(
        5,
        30,
        own_text=own_text,
        own_size=own_size,
        descriptors=descriptors,
        by_rank=by_rank,
    )
    data = pickle.dumps(metadata, protocol)
    assert repr(read_metadata(data)) == repr(metadata)
    machine = machine_of(data)
    steps = machine_of(data, by_records=False)
    assert len(machine.memo) == len(steps.memo)
    assert machine.spare == steps.spare
    # Nearly all were read at a step, each kind of them.
    assert machine.memo.count(LEFT_OUT) >= 140 * 5 + 140 * 2 + 3 * 4
    assert_equal_memos(machine, steps)


@given(st.integers(0, 6), st.lists(NUMBERS, min_size=1, max_size=5))
def test_numbers_of_every_width_in_every_number_of_dimensions(dims: int, some: list[int]) -> None:
    metadata = metadata_of(2, 9, dims=dims, number=lambda n: some[n % len(some)])
    data = pickle.dumps(metadata)
    read = read_metadata(data)
    assert repr(read) == repr(pickle.loads(data))
    if dims:
        assert LEFT_OUT in machine_of(data).memo


@pytest.mark.parametrize("number", [-1, -(2**40)])
def test_numbers_that_are_wrong_are_refused_as_ever(number: int) -> None:
    metadata = metadata_of(2, 9)
    index = [*metadata.storage_data][-2]
    object.__setattr__(index, "index", number)
    with pytest.raises(CheckpointCorruptError, match="an int from 0"):
        read_metadata(pickle.dumps(metadata))
    metadata = metadata_of(2, 9)
    [*metadata.storage_data.values()][-2].length = number
    with pytest.raises(CheckpointCorruptError, match="an int from 0"):
        read_metadata(pickle.dumps(metadata))


def test_names_in_other_roles_are_read_literally() -> None:
    """In one chunk 'offsets' and 'sizes' change places."""
    data = pickle.dumps(metadata_of(1, 6))
    plain = pickle.loads(data).state_dict_metadata["layers.0.weight"].chunks[4]
    assert plain.offsets != plain.sizes
    record = data.index(b"K\x04K\x00\x86")
    get = data[record - 4 : record - 2]
    other = data.index(b"h", record + 8)
    swapped = bytearray(data)
    swapped[record - 4 : record - 2], swapped[other : other + 2] = data[other : other + 2], get
    expected = pickle.loads(bytes(swapped)).state_dict_metadata["layers.0.weight"].chunks[4]
    assert (expected.offsets, expected.sizes) == (plain.sizes, plain.offsets)
    read = read_metadata(bytes(swapped)).state_dict_metadata["layers.0.weight"].chunks[4]
    assert read == expected


def test_a_name_that_is_put_elsewhere_meanwhile_is_seen() -> None:
    """Within the fifth chunk, the place of 'offsets' in the memo is given to 'sizes'."""
    data = pickle.dumps(metadata_of(1, 6))
    numbers = data.index(b"K\x04K\x00\x86")
    get_offsets, behind = data[numbers - 4 : numbers - 2], numbers + 12
    get_sizes = data[behind - 2 : behind]
    assert get_offsets[:1] == get_sizes[:1] == b"h"
    changed = framed(data[:behind] + b"q" + get_offsets[1:] + data[behind:])
    machine = machine_of(changed)
    assert machine.memo[get_sizes[1]] == machine.memo[get_offsets[1]] == "sizes"
    chunk = pickle.loads(changed).state_dict_metadata["layers.0.weight"].chunks[-1]
    assert "offsets" not in chunk.__dict__
    with pytest.raises(CheckpointCorruptError, match="the field offsets"):
        read_metadata(changed)


def test_memo_entries_left_out_are_made_for_a_pickle_that_gets_them() -> None:
    data = pickle.dumps(metadata_of(1, 8))
    assert data.endswith(b"ub.")
    left_out = [n for n, value in enumerate(machine_of(data).memo[:255]) if value is LEFT_OUT]
    for index in left_out:
        late = framed(data[:-3] + b"\x8c\x0cplanner_datah" + bytes([index]) + b"ub.")
        expected = pickle.loads(late).planner_data
        assert type(expected) in (dict, tuple)
        try:
            assert read_metadata(late).planner_data == expected
        except CheckpointCorruptError as error:
            # The dict of a chunk's fields holds sizes, a tuple of it a size: plain values all.
            raise AssertionError(f"memo {index}: {expected}") from error


def test_keys_with_sizes_of_their_own_and_with_those_of_chunks_take_turns() -> None:
    metadata = metadata_of(2, 60, by_rank=False)
    boxes = metadata.state_dict_metadata["layers.0.weight"].chunks
    for index, box in zip([*metadata.storage_data][1:60:2], boxes[1::2], strict=True):
        object.__setattr__(index, "offset", box.offsets)
    data = pickle.dumps(metadata)
    machine = machine_of(data)
    assert machine.memo.count(LEFT_OUT) > 100 * 5 + 100 * 2
    assert machine.to_learn >= MOST_LEARNT - 4
    assert repr(read_metadata(data)) == repr(metadata)


def test_a_pickle_that_has_had_its_patterns_made_is_read_opcode_by_opcode() -> None:
    machine = PickleMachine(pickle.dumps(metadata_of(2, 9)), METADATA)
    machine.to_learn = 0
    assert repr(_interpret(machine)) == repr(metadata_of(2, 9))
    assert LEFT_OUT not in machine.memo
