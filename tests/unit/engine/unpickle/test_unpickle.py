"""Pickles of checkpoints are read as `pickle.load` reads them, and hostile ones cost little."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import pathlib
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as LegacyProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.unpickle import (
    TensorPickle,
    UnknownGlobalError,
    read_metadata,
    read_tensor_pickle,
    read_value,
)
from pytest_dcp._engine.unpickle.unread_fields import may_stay_unread
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

READERS: tuple[Callable[[bytes], object], ...] = (read_metadata, read_tensor_pickle, read_value)
PROTOCOLS = (2, 3, 4, 5)
IS_NIGHTLY = settings().max_examples >= 10_000


def metadata_of(tensors: int = 3, chunks: int = 2, properties: Any = TensorProperties) -> Metadata:
    entries: dict[str, Any] = {"step": BytesStorageMetadata()}
    storage: dict[MetadataIndex, _StorageInfo] = {
        MetadataIndex("step"): _StorageInfo("__0_0.distcp", 0, 10)
    }
    planner_data: dict[str, Any] = {"step": ("step",)}
    for tensor in range(tensors):
        fqn = f"model.{tensor}.weight"
        boxes = [
            ChunkStorageMetadata(torch.Size((chunk * 300, 0)), torch.Size((300, 70_000)))
            for chunk in range(chunks)
        ]
        size = torch.Size((300 * chunks, 70_000))
        entries[fqn] = TensorStorageMetadata(properties(dtype=torch.bfloat16), size, boxes)
        planner_data[fqn] = ("model", tensor, "weight")
        for chunk, box in enumerate(boxes):
            index = MetadataIndex(fqn, box.offsets, chunk)
            storage[index] = _StorageInfo(f"__{chunk}_0.distcp", tensor << 32, 42_000_000)
    meta = StorageMeta(pathlib.PosixPath("/a/ckpt"), "save", None, ["x"])
    return Metadata(entries, planner_data, storage, meta, "1.0.0")


def data_pkl(value: object) -> bytes:
    """The data.pkl that torch.save makes for `value`."""
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def refusal(read: Callable[[bytes], object], data: bytes) -> CheckpointCorruptError:
    with pytest.raises(CheckpointCorruptError) as info:
        read(data)
    return info.value


def global_named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


# ---- metadata


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_metadata_as_pickle_does(protocol: int) -> None:
    data = pickle.dumps(metadata_of(), protocol)
    assert read_metadata(data) == pickle.loads(data) == metadata_of()


def test_reads_every_field_that_equality_leaves_out() -> None:
    read = read_metadata(pickle.dumps(metadata_of()))
    indices = [index.index for index in read.storage_data]
    assert indices == [index.index for index in metadata_of().storage_data]
    assert repr(read) == repr(metadata_of())


def test_reads_the_properties_of_old_files() -> None:
    data = pickle.dumps(metadata_of(properties=LegacyProperties))
    read = read_metadata(data)
    assert read == pickle.loads(data)
    assert type(read.state_dict_metadata["model.0.weight"].properties) is LegacyProperties


def test_leaves_fields_that_old_torch_did_not_know_at_their_defaults() -> None:
    old = metadata_of()
    del old.storage_meta, old.version
    read = read_metadata(pickle.dumps(old))
    assert (read.storage_meta, read.version) == (None, None)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last, torch.preserve_format]
)
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
def test_reads_all_memory_formats_and_layouts(
    memory_format: torch.memory_format, layout: torch.layout
) -> None:
    metadata = metadata_of()
    metadata.state_dict_metadata["model.0.weight"].properties = TensorProperties(
        torch.float8_e4m3fn, layout, True, memory_format, True
    )
    assert read_metadata(pickle.dumps(metadata)) == metadata


@pytest.mark.parametrize(
    "checkpoint_id",
    [
        None,
        "memory://x",
        pathlib.PurePosixPath("a/b"),
        pathlib.PureWindowsPath("c:/a"),
        pathlib.Path(),
    ],
)
def test_reads_every_kind_of_checkpoint_id(checkpoint_id: Any) -> None:
    metadata = metadata_of()
    metadata.storage_meta = StorageMeta(checkpoint_id)
    assert read_metadata(pickle.dumps(metadata)) == metadata


def test_reads_paths_that_python_3_13_wrote() -> None:
    # Python 3.13 itself writes the second name.
    data = pickle.dumps(metadata_of(), 2).replace(b"cpathlib._local\n", b"cpathlib\n")
    renamed = data.replace(b"cpathlib\n", b"cpathlib._local\n")
    assert renamed != data
    assert read_metadata(data) == read_metadata(renamed) == metadata_of()


def test_reads_transform_descriptors_and_plain_planner_data() -> None:
    metadata = metadata_of()
    metadata.storage_data[MetadataIndex("step")].transform_descriptors = ["zstd"]
    metadata.planner_data = {"deep": [{"a": {1, 2}, "b": OrderedDict(x=1.5)}], "none": None}
    assert read_metadata(pickle.dumps(metadata)) == metadata


def test_leaves_bytes_behind_the_pickle_alone() -> None:
    data = pickle.dumps(metadata_of()) + b"\x00manifest" * 100
    assert read_metadata(data) == read_metadata(memoryview(data)) == metadata_of()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_reads_a_file_that_torch_itself_saved(tmp_path: pathlib.Path) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save

    state = {
        "model": {"w": torch.zeros(3, 4), "b": torch.ones(2)},
        "step": 3,
        "more": [1, {"a": 2}],
    }
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    data = (tmp_path / ".metadata").read_bytes()
    assert read_metadata(data) == pickle.loads(data)


def set_field(path: str, value: object) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.1.weight"]
        info = metadata.storage_data[MetadataIndex("model.1.weight", torch.Size((0, 0)))]
        owners = {
            "metadata": metadata,
            "entry": entry,
            "properties": entry.properties,
            "chunk": entry.chunks[1],
            "info": info,
            "meta": metadata.storage_meta,
        }
        owner, _, name = path.partition(".")
        setattr(owners[owner], name, value)

    return change


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("metadata.state_dict_metadata", None, "Metadata.state_dict_metadata"),
        ("metadata.state_dict_metadata", {3: BytesStorageMetadata()}, "a str as its key, got 3"),
        ("metadata.storage_data", [], "Metadata.storage_data"),
        ("metadata.storage_data", {"a": 1}, "a MetadataIndex as each key"),
        ("metadata.storage_data", {MetadataIndex("f"): 1}, "storage_data['f']: expected a _Stor"),
        ("metadata.storage_meta", {}, "Metadata.storage_meta"),
        ("metadata.version", 7, "Metadata.version"),
        ("metadata.__surprise__", 7, "got '__surprise__'"),
        ("metadata.not a name", 7, "got 'not a name'"),
        ("entry.size", (1, 2), "state_dict_metadata['model.1.weight'].size"),
        ("entry.size", torch.Size((-1,)), "['model.1.weight'].size: expected numbers from 0 up"),
        ("entry.chunks", (), "['model.1.weight'].chunks"),
        ("entry.chunks", [3], "['model.1.weight'].chunks[0]"),
        ("entry.properties", None, "['model.1.weight'].properties"),
        ("properties.dtype", 3, "['model.1.weight'].properties.dtype"),
        ("properties.layout", None, "['model.1.weight'].properties.layout"),
        ("properties.requires_grad", 1, "['model.1.weight'].properties.requires_grad"),
        ("properties.pin_memory", "", "['model.1.weight'].properties.pin_memory"),
        ("chunk.offsets", [0, 0], "['model.1.weight'].chunks[1].offsets"),
        ("chunk.sizes", torch.Size((1, -5)), "['model.1.weight'].chunks[1].sizes"),
        ("chunk.offsets", (0, -1), "['model.1.weight'].chunks[1].offsets"),
        ("chunk.sizes", (1, 1.5), "['model.1.weight'].chunks[1].sizes"),
        ("chunk.sizes", (1 << 63,), "['model.1.weight'].chunks[1].sizes"),
        ("chunk.sizes", (1,) * 65, "['model.1.weight'].chunks[1].sizes"),
        ("info.relative_path", b"x", "storage_data['model.1.weight'].relative_path"),
        ("info.offset", -1, "storage_data['model.1.weight'].offset"),
        ("info.offset", True, "storage_data['model.1.weight'].offset"),
        ("info.length", 1 << 63, "storage_data['model.1.weight'].length"),
        ("info.transform_descriptors", [1], "['model.1.weight'].transform_descriptors"),
        ("info.transform_descriptors", ["a"] * 65, "['model.1.weight'].transform_descriptors"),
        ("meta.checkpoint_id", 3, "storage_meta.checkpoint_id"),
        ("meta.save_id", 3, "storage_meta.save_id"),
        ("meta.modules", [3], "storage_meta.modules"),
    ],
)
def test_names_the_field_and_the_fqn_that_are_wrong(
    path: str, value: object, expected: str
) -> None:
    metadata = metadata_of()
    set_field(path, value)(metadata)
    assert expected in str(refusal(read_metadata, pickle.dumps(metadata)))


def test_a_chunk_may_have_plain_tuples() -> None:
    """torch's engine stores them so if a tensor describes its own parts that way."""
    metadata = metadata_of()
    expected = read_metadata(pickle.dumps(metadata))
    for entry in metadata.state_dict_metadata.values():
        for chunk in getattr(entry, "chunks", ()):
            for field in ("offsets", "sizes"):
                object.__setattr__(chunk, field, tuple(getattr(chunk, field)))
    found = read_metadata(pickle.dumps(metadata))
    assert found.state_dict_metadata == expected.state_dict_metadata
    chunk = found.state_dict_metadata["model.1.weight"].chunks[0]
    assert (type(chunk.offsets), type(chunk.sizes)) == (torch.Size, torch.Size)


@pytest.mark.parametrize("name", ["properties", "size", "chunks"])
def test_names_a_field_that_is_missing(name: str) -> None:
    metadata = metadata_of()
    delattr(metadata.state_dict_metadata["model.1.weight"], name)
    assert f"['model.1.weight']: expected the field {name}" in str(
        refusal(read_metadata, pickle.dumps(metadata))
    )


def test_refuses_sizes_of_too_many_dimensions() -> None:
    metadata = metadata_of()
    metadata.state_dict_metadata["model.1.weight"].size = torch.Size([1] * 65)
    assert "at most 64" in str(refusal(read_metadata, pickle.dumps(metadata)))


def test_refuses_a_key_without_its_fields_and_one_built_twice() -> None:
    index = global_named("torch.distributed.checkpoint.metadata", "MetadataIndex") + b")\x81"
    assert "without its fields" in str(refusal(read_metadata, b"\x80\x04}" + index + b"Ns."))
    build = b"}" + short("fqn") + short("a") + b"sb"
    assert "twice" in str(refusal(read_metadata, b"\x80\x04" + index + build + build + b"."))


def test_judges_fields_after_the_last_opcode_could_change_them() -> None:
    metadata = metadata_of(1, 1)
    data = pickle.dumps(metadata, 4)
    ops = [(op.name, arg, pos) for op, arg, pos in pickletools.genops(data)]
    memo_of_chunks = sum(
        1 for name, _, pos in ops if name == "MEMOIZE" and pos < data.index(b"chunks") + 8
    )
    late = data[:-1] + b"h" + bytes([memo_of_chunks]) + b"K\x07a0."
    assert type(pickle.loads(late)) is Metadata
    read = pickle.loads(late).state_dict_metadata["model.0.weight"].chunks
    assert read[-1] == 7
    # POP is not of ours; put the Metadata back on top instead.
    late = data[:-1] + b"h" + bytes([memo_of_chunks]) + b"K\x07a" + b"h\x03."
    assert "chunks[1]: expected a ChunkStorageMetadata, got 7" in str(refusal(read_metadata, late))


def test_names_the_global_that_is_not_allowed_and_where() -> None:
    data = b"\x80\x04" + short("os") + short("system") + b"\x93" + short("true") + b"\x85R."
    error = refusal(read_metadata, data)
    assert isinstance(error, UntrustedPickleError)
    assert "'os.system'" in str(error)
    assert error.offset == data.index(b"\x93")


# ---- values

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(codec=None, exclude_categories=[]))
    | st.binary()
)
KEYS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
HASHABLE = KEYS | st.tuples(KEYS, KEYS)
TORCH = st.sampled_from(
    [torch.float32, torch.uint16, torch.device("cpu"), torch.device("cuda", 3), torch.Size((2, 3))]
)
OTHERS = (
    st.binary().map(bytearray)
    | st.sampled_from([range(3), range(0, 9, 2), slice(1, None)])
    | st.sets(HASHABLE)
    | st.frozensets(HASHABLE)
    | TORCH
)


def nest(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(HASHABLE, inner)
        | st.dictionaries(HASHABLE, inner).map(OrderedDict)
        | st.dictionaries(HASHABLE, inner).map(lambda items: defaultdict(list, items))
        | inner.map(lambda value: [value, value])
    )


VALUES = st.recursive(ATOMS | OTHERS, nest, max_leaves=30)


@given(VALUES, st.sampled_from(PROTOCOLS))
@example({"big": 1 << 3000, "small": -(1 << 70), "text": "\ud800é😀", "bytes": b"\xff" * 300}, 2)
@example(dict.fromkeys(range(5000)), 4)
@example(["x" * 70_000, b"y" * 70_000, bytearray(b"z" * 70_000)], 4)
def test_reads_values_as_pickle_does(value: object, protocol: int) -> None:
    read = read_value(pickle.dumps(value, protocol))
    assert read == value
    assert repr(read) == repr(pickle.loads(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("factory", [None, list, dict, set, int, float, str, tuple, bool])
def test_keeps_the_factory_of_a_defaultdict(factory: Any) -> None:
    read = read_value(pickle.dumps(defaultdict(factory, {"a": 1}), 2))
    assert isinstance(read, defaultdict)
    assert read.default_factory is factory


def test_keeps_sharing() -> None:
    inner = [1]
    read: Any = read_value(pickle.dumps([inner, inner]))
    assert read[0] is read[1]


def test_reads_the_data_that_torch_saves_for_values() -> None:
    value = {
        "epoch": 3,
        "sizes": torch.Size((1, 2)),
        "dtype": torch.half,
        "b": b"\xff\x00",
        "s": {1},
    }
    assert read_value(data_pkl(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        deque([1]),
        pathlib.PurePosixPath("a"),
        defaultdict(deque),
        {frozenset([1]): 2},
        {((1, 2), 3): 4},
        list,
        print,
        torch.float32.__class__,
        TensorProperties(),
    ],
    ids=repr,
)
def test_leaves_other_values_to_the_caller(value: object) -> None:
    assert isinstance(refusal(read_value, pickle.dumps(value)), UnknownGlobalError)


def test_leaves_tensors_within_values_to_the_caller() -> None:
    error = refusal(read_value, data_pkl({"a": torch.zeros(2)}))
    assert isinstance(error, UnknownGlobalError)


def test_refuses_a_tuple_of_many_items_as_a_key() -> None:
    assert "at most 64 items" in str(refusal(read_value, pickle.dumps({tuple(range(65)): 1})))
    assert read_value(pickle.dumps({tuple(range(64)): 1}))


# ---- tensors


@pytest.mark.parametrize(
    "dtype",
    sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str),
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: some dtypes are experimental or old
def test_describes_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    try:
        tensor = torch.empty((3, 4), dtype=dtype)[1:, ::2]
        data = data_pkl(tensor)
    except (RuntimeError, TypeError, KeyError) as error:
        pytest.skip(f"torch cannot save it: {error}")
    if tensor.is_quantized:
        assert isinstance(refusal(read_tensor_pickle, data), UnknownGlobalError)
        return
    assert read_tensor_pickle(data) == TensorPickle(
        dtype=dtype,
        shape=(2, 2),
        stride=(4, 2),
        storage_offset=4,
        storage_key="0",
        storage_nbytes=12 * dtype.itemsize,
        requires_grad=False,
    )


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,) * 64])
def test_describes_tensors_of_any_rank(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    read = read_tensor_pickle(data_pkl(tensor))
    assert (read.shape, read.stride) == (shape, tensor.stride())


def test_describes_parameters() -> None:
    assert read_tensor_pickle(data_pkl(torch.nn.Parameter(torch.zeros(3)))).requires_grad
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    assert not read_tensor_pickle(data_pkl(frozen)).requires_grad
    assert read_tensor_pickle(data_pkl(torch.zeros(3, requires_grad=True))).requires_grad


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.complex64).conj(),
        torch.zeros(2, dtype=torch.complex64).conj().imag,
        torch.zeros(2, 2).to_sparse(),
        [torch.zeros(2)],
        {"a": 1},
        torch.float32,
        torch.zeros(2, device="meta"),
    ],
    ids=["conjugate", "negative", "sparse", "list", "dict", "dtype", "meta"],
)
def test_leaves_values_other_than_tensors_to_the_caller(value: object) -> None:
    assert isinstance(refusal(read_tensor_pickle, data_pkl(value)), UnknownGlobalError)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"K\x06tq", b"K\x05tq", "ends at byte 24"),
        (b"K\x06tq", b"Ntq", "a storage's elements"),
        (b"K\x03K\x02\x86", b"K\x03K\x03\x86", "within its storage of 24 bytes"),
        (b"K\x03K\x02\x86", b"K\x03\x85", "a stride for each dimension"),
        (b"K\x03K\x02\x86", b"K\x03N\x86", "a tensor's shape"),
        (b"K\x02K\x01\x86", b"K\x02J\xff\xff\xff\xff\x86", "a tensor's stride"),
        (b"QK\x00", b"QK\x01", "ends at byte 28"),
        (b"\x89c", b"Nc", "requires_grad"),
    ],
)
def test_refuses_tensors_whose_facts_do_not_fit(old: bytes, new: bytes, expected: str) -> None:
    data = data_pkl(torch.zeros(3, 2))
    assert data.count(old) == 1
    assert expected in str(refusal(read_tensor_pickle, data.replace(old, new)))


# ---- hostile and damaged bytes

KIB = 1024
SIZE = 48 * KIB


def repeated(head: bytes, body: bytes, tail: bytes = b".") -> bytes:
    return b"\x80\x04" + head + body * ((SIZE - len(head)) // len(body)) + tail


def one_tuple_for_many_sizes() -> bytes:
    dims = b"(" + b"K\x01" * 64 + b"t\x85\x94"
    head = global_named("torch", "Size") + b"\x94" + dims
    return repeated(head + b"](", b"h\x00h\x01R", b"e.")


def one_text_for_many(module: str, name: str, more: bytes = b"") -> bytes:
    """A call again and again with one long text, and with `more` as its second argument."""
    text = b"X" + struct.pack("<I", SIZE // 2) + b"ab" * (SIZE // 4)
    head = global_named(module, name) + b"\x94" + text + more + (b"\x86" if more else b"\x85")
    return repeated(head + b"\x94](", b"h\x00h\x01R", b"e.")


def keys_of_one_hash(key: Callable[[int], bytes]) -> bytes:
    keys = b"".join(key(index) + b"N" for index in range(SIZE // 16))
    return b"\x80\x04}(" + keys + b"u."


def long1(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def equal_keys(opcode: bytes) -> bytes:
    """Two long equal objects: the first a key, the second set again and again."""
    key = opcode + struct.pack("<I", SIZE // 4) + b"a" * (SIZE // 4)
    return repeated(b"}" + key + b"Ns" + key + b"\x94Ns", b"h\x00Ns")


HOSTILE = {
    "memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo index far": b"\x80\x02Nr\xff\xff\xff\xff.",
    "frame": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "text": b"\x80\x04\x8d" + b"\xff" * 8 + b"N.",
    "bytes": b"\x80\x04B" + b"\xff" * 4 + b"N.",
    "bytearray": b"\x80\x05\x96" + b"\xff" * 7 + b"\x00N.",
    "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "negative long": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "bad text": b"\x80\x04\x8c\x02\xff\xfe.",
    "endless name": b"\x80\x02c" + b"a" * SIZE,
    "marks": repeated(b"", b"("),
    "lists": repeated(b"(", b"]", b"t."),
    "dicts": repeated(b"(", b"}", b"t."),
    "sets": repeated(b"(", b"\x8f", b"t."),
    "memoized sets": repeated(b"(", b"\x8f\x94", b"t."),
    "small dicts": repeated(b"(", b"}NNs", b"t."),
    "int keys": repeated(b"(", b"}K\x01Ns", b"t."),
    "small sets": repeated(b"(", b"\x8f(Ne", b"t."),
    "filled sets": repeated(b"(", b"\x8f(N\x90", b"t."),
    "nested lists": repeated(b"", b"]", b"a" * (SIZE - 1) + b"."),
    "nested tuples": repeated(b"N", b"\x85"),
    "doubling tuples": b"\x80\x04N\x94"
    + b"".join(b"h%ch%c\x86\x94" % (k, k) for k in range(90))
    + b".",
    "memo": repeated(b"N", b"\x94"),
    "empty tuples": repeated(b"(", b")", b"t."),
    "frozensets": repeated(b"(", b"(\x91", b"t."),
    "filled frozensets": repeated(b"(", b"(N\x91", b"t."),
    "ordered dicts": repeated(b"ccollections\nOrderedDict\n\x94(", b"h\x00)R", b"t."),
    "filled ordered dicts": repeated(b"ccollections\nOrderedDict\n\x94(", b"h\x00)RNNs", b"t."),
    "default dicts": repeated(b"ccollections\ndefaultdict\n\x94(", b"h\x00)R", b"t."),
    "sizes": one_tuple_for_many_sizes(),
    "paths": one_text_for_many("pathlib", "PurePosixPath"),
    "encode": one_text_for_many("_codecs", "encode", short("latin1")),
    "ints of one hash": keys_of_one_hash(lambda index: long1(index * (2**61 - 1))),
    "tuples of one hash": keys_of_one_hash(lambda index: long1(index * (2**61 - 1)) + b"\x85"),
    "equal texts": equal_keys(b"X"),
    "equal bytes": equal_keys(b"B"),
    "unhashable": b"\x80\x04}]Ns.",
    "deep key": repeated(b"}N", b"\x85", b"Ns."),
    "own item": b"\x80\x04]\x94h\x00a.",
    "not a list": b"\x80\x04NNa.",
    "odd items": b"\x80\x04}(Nu.",
    "empty": b"",
    "no stop": b"\x80\x04N",
    "stop alone": b".",
    "mark and stop": b"(.",
    "newer": b"\x80\x09N.",
    "unhashable factory": b"\x80\x02ccollections\ndefaultdict\n]\x85R.",
    "size of text": b"\x80\x02ctorch\nSize\nX\x01\x00\x00\x00a\x85R.",
    "size of long": b"\x80\x02ctorch\nSize\n\x8a\x09" + b"\x00" * 8 + b"\x01\x85\x85R.",
    "device": b"\x80\x04ctorch\ndevice\n" + short("nonsense") + b"\x85R.",
    "surrogate device": b"\x80\x04ctorch\ndevice\n\x8c\x03\xed\xa0\x80\x85R.",
    "range step": b"\x80\x02cbuiltins\nrange\nK\x01K\x01K\x00\x87R.",
}


def seconds(read: Callable[[bytes], object], data: bytes) -> float:
    """Processor time of a read, failed or not."""
    began = time.process_time()
    survives(read, data)
    return time.process_time() - began


def peak_bytes(read: Callable[[bytes], object], data: bytes) -> int:
    """Peak memory of a read, failed or not. Measuring it makes the read ten times slower."""
    tracemalloc.start()
    try:
        survives(read, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def survives(read: Callable[[bytes], object], data: bytes) -> object:
    try:
        return read(data)
    except CheckpointCorruptError as error:
        refused = error
    assert len(str(refused)) < 1000
    assert refused.offset is None or 0 <= refused.offset <= len(data)
    return None


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_take_little_time(read: Callable[[bytes], object], name: str) -> None:
    assert seconds(read, HOSTILE[name]) < 2


@pytest.mark.parametrize("read", READERS if IS_NIGHTLY else [read_metadata])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_take_memory_by_their_length(
    read: Callable[[bytes], object], name: str
) -> None:
    """The readers share their machine; that of metadata knows most."""
    data = HOSTILE[name]
    assert peak_bytes(read, data) < 200 * len(data) + 1024 * KIB


@pytest.mark.parametrize(
    "name",
    [
        *("memo index", "frame", "text", "long", "negative long", "bad text", "nested tuples"),
        *("nested lists", "doubling tuples", "sizes", "ints of one hash", "tuples of one hash"),
        *("equal bytes", "unhashable", "deep key", "own item", "unhashable factory", "device"),
        *("surrogate device", "range step", "size of long", "newer", "no stop", "stop alone"),
    ],
)
def test_refuses_hostile_pickles(name: str) -> None:
    refusal(read_value, HOSTILE[name])


def test_refuses_many_offsets_of_one_hash() -> None:
    prime = 2**61 - 1
    metadata = metadata_of(0)
    for index in range(200):
        offset = torch.Size([prime * (index >> 2 * dim & 3) for dim in range(4)])
        metadata.storage_data[MetadataIndex("w", offset)] = _StorageInfo("f", 0, 0)
    assert "of one hash" in str(refusal(read_metadata, pickle.dumps(metadata)))


def test_time_grows_with_the_length_alone() -> None:
    small, large = (pickle.dumps(metadata_of(tensors, 8)) for tensors in (100, 800))
    took = [min(seconds(read_metadata, data) for _ in range(3)) for data in (small, large)]
    assert took[1] < 4 * took[0] * len(large) / len(small)


def test_metadata_takes_less_than_200_bytes_for_a_byte() -> None:
    data = pickle.dumps(metadata_of(200, 8))
    assert peak_bytes(read_metadata, data) < 200 * len(data)


def test_the_garbage_collector_is_as_before() -> None:
    assert gc.isenabled()
    read_value(pickle.dumps(1))
    assert gc.isenabled()
    refusal(read_value, b"")
    assert gc.isenabled()
    gc.disable()
    try:
        read_value(pickle.dumps(1))
        assert not gc.isenabled()
    finally:
        gc.enable()


SEEDS = (
    pickle.dumps(metadata_of(2, 2), 4),
    pickle.dumps(metadata_of(1, 1), 2),
    data_pkl(torch.zeros(3, 2)),
    data_pkl(torch.nn.Parameter(torch.zeros(3, dtype=torch.float8_e5m2))),
    pickle.dumps({"a": [1, {2.5: (None, b"x")}, {3}], "o": OrderedDict(a=frozenset([4]))}, 4),
    data_pkl({"a": [1, {2.5: (None, b"x")}, {3}], "d": defaultdict(list), "c": 1j}),
    pickle.dumps(metadata_of(2, 9), 4),
)
OPCODES = st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes])
NAMES = st.sampled_from(
    [
        *(("torch", "Size"), ("torch", "device"), ("torch", "float32"), ("builtins", "set")),
        *(("collections", "OrderedDict"), ("collections", "defaultdict"), ("_codecs", "encode")),
        *(("builtins", "range"), ("builtins", "bytearray"), ("builtins", "complex")),
        *(("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")),
        *(("torch", "FloatStorage"), ("pathlib", "PosixPath")),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
    ]
)
PIECES = (
    OPCODES
    | st.binary(min_size=1, max_size=3)
    | NAMES.map(lambda name: global_named(*name))
    | st.integers(0, 9).map(lambda index: b"h" + bytes([index]))
    | st.integers(0, 255).map(lambda number: b"K" + bytes([number]))
    | st.sampled_from(["fqn", "size", "latin1", "cpu", "storage", "a"]).map(short)
    | st.sampled_from(
        [b"\x94", b")", b"(", b"t", b"R", b"\x81", b"b", b"}", b"]", b"u", b"e", b"Q"]
    )
)
PROGRAMS = st.lists(PIECES, max_size=40).map(lambda pieces: b"\x80\x04" + b"".join(pieces) + b".")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real pickle, cut short or with some bytes replaced, doubled or dropped."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(begin + 40, len(data))))
        data[begin:end] = draw(st.binary(max_size=4) | PIECES | st.just(bytes(data[begin:end] * 2)))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@given(st.binary(max_size=200) | PROGRAMS | damaged())
def test_only_our_errors_leave(data: bytes) -> None:
    for read in READERS:
        survives(read, data)


def names_what_stays_unread(data: bytes) -> bool:
    """Whether the pickle names a class that does not exist, in a module that stock pickle
    imports."""
    names = (arg.split(" ", 1) for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL")
    return any(may_stay_unread(*name) and find_global(*name) is None for name in names)


def find_global(module: str, name: str) -> object | None:
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        return getattr(importlib.import_module(module), name)
    return None


@given(PROGRAMS | damaged())
def test_a_readable_pickle_gives_the_same_object_as_stock_pickle(data: bytes) -> None:
    """Stock pickle can safely read all that we allow, except persistent ids."""
    for read in (read_metadata, read_value):
        value = survives(read, data)
        if value is not None and not names_what_stays_unread(data):
            stock = pickle.loads(data)
            assert repr(value) == repr(stock)
            assert type(value) is type(stock)


@given(damaged())
def test_damaged_pickles_take_little_memory(data: bytes) -> None:
    for read in READERS:
        assert peak_bytes(read, data) < 200 * len(data) + 1024 * KIB


def test_every_truncation_of_a_real_pickle_is_refused() -> None:
    for seed, read in ((SEEDS[0], read_metadata), (SEEDS[2], read_tensor_pickle)):
        for length in range(len(seed)):
            refusal(read, seed[:length])
