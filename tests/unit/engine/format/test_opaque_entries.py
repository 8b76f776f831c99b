"""Hand-made entries of tensors with more than elements: things that must not happen."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from pytest_dcp._engine.format import entry
from pytest_dcp._engine.format.opaque_values import prepare_opaque
from pytest_dcp._engine.plan.opaque import STORED_DTYPES
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def two(one: float, other: float) -> Any:
    return TwoTensor(torch.full((3,), float(one)), torch.full((3,), float(other)))  # type: ignore[no-untyped-call]


def changed(data: bytes, **records: bytes) -> bytes:
    """The entry with other contents of some records, by the ends of their names."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            short = name.rpartition("/")[2].replace(".", "_")
            new.writestr(name, records.get(short, old.read(name)))
    return made.getvalue()


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def fill_opaque(fqn: str, target: torch.Tensor, entry: bytes) -> torch.Tensor:
    return prepare_opaque(fqn, target, entry)()


def test_dtypes_are_those_of_data_files() -> None:
    assert {*entry._STORAGE_CLASSES, *entry._UNTYPED} == STORED_DTYPES


def test_inner_tensors_are_filled_in_place() -> None:
    target = two(0, 0)
    inner = target.a
    assert fill_opaque("w", target, saved(two(1, 2))) is target
    assert target.a is inner
    assert (target.a.tolist(), target.b.tolist()) == ([1.0] * 3, [2.0] * 3)


class Further:
    """A further attribute of a wrapper: data of a class that the reader does not know."""

    def __init__(self) -> None:
        self.more = [1, 2]


def test_nothing_that_a_pickle_names_is_called(tmp_path: Path) -> None:
    """Neither as a further attribute, nor instead of an inner tensor, nor as the class."""
    evil = Evil(tmp_path / "canary")
    target = two(0, 0)
    for name in ("more", "a"):
        value = two(1, 2)
        setattr(value, name, evil)
        with pytest.raises(CheckpointCorruptError, match=r"mkdir.*not loaded by def.*entry 'w'"):
            fill_opaque("w", target, saved(value))
    whole = changed(saved(two(1, 2)), data_pkl=pickle.dumps(evil, 2))
    with pytest.raises(CheckpointCorruptError, match=r"mkdir"):
        fill_opaque("w", target, whole)
    assert target.a.tolist() == [0.0] * 3
    assert not (tmp_path / "canary").exists()


def test_objects_of_other_classes_in_a_wrapper_are_left_out() -> None:
    value, target = two(1, 2), two(0, 0)
    value.more = Further()
    fill_opaque("w", target, saved(value))
    assert target.a.tolist() == [1.0] * 3
    assert not hasattr(target, "more")
    value.a = Further()
    with pytest.raises(CheckpointMismatchError, match=r"'w\.a' is no tensor of this name"):
        fill_opaque("w", target, saved(value))


def test_an_inner_tensor_that_the_target_does_not_have_is_not_lost_without_a_word() -> None:
    value, target = two(1, 2), two(0, 0)
    value.zero_point = torch.ones(3)
    with pytest.raises(CheckpointMismatchError, match=r"'w\.zero_point' is a tensor in the check"):
        prepare_opaque("w", target, saved(value))
    target.zero_point = torch.zeros(3)  # Besides its inner tensors: private data of the class.
    fill_opaque("w", target, saved(value))
    assert target.a.tolist() == [1.0] * 3


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float64, True), (torch.int32, False)])
def test_inner_tensors_convert_between_floats_only(dtype: torch.dtype, fits: bool) -> None:
    entry, target = saved(two(1, 2)), two(0, 0)
    target.b = target.b.to(dtype)
    if fits:
        fill_opaque("w", target, entry)
        assert target.b.tolist() == [2.0] * 3
        return
    with pytest.raises(CheckpointMismatchError, match=r"'w\.b' is torch\.float32 in the check"):
        prepare_opaque("w", target, entry)
    assert target.a.tolist() == [0.0] * 3


def test_a_target_keeps_its_values_where_a_part_does_not_fit() -> None:
    target = two(0, 0)
    other = TwoTensor(torch.ones(3), torch.ones(3))  # type: ignore[no-untyped-call]
    other.b = torch.ones(4)
    with pytest.raises(CheckpointMismatchError, match=r"'w\.b' is a tensor of size \(4,\)"):
        fill_opaque("w", target, saved(other))
    assert target.a.tolist() == [0.0] * 3


@pytest.mark.parametrize("record", ["0", "1"])
def test_a_storage_that_is_too_short_is_damage(record: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"expected a storage of 12 bytes.*'w'"):
        fill_opaque("w", two(0, 0), changed(saved(two(1, 2)), **{record: b"1234"}))


@pytest.mark.parametrize(
    "parameters",
    [
        (torch.per_tensor_affine, "1", 0),
        (torch.per_tensor_affine, 1.0),
        (torch.per_channel_affine, 1.0, 0, 0),
        (torch.per_channel_symmetric, 1.0, 0),
    ],
)
def test_scales_that_do_not_belong_are_damage(
    parameters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = torch.quantize_per_tensor(torch.zeros(6), 0.5, 3, torch.quint8)

    def reduced(self: Any, protocol: int) -> Any:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(6, dtype=torch.uint8).untyped_storage(),
            dtype=torch.quint8,
            _internal=True,
        )
        made = (storage, 0, (6,), (1,), parameters, False, OrderedDict())
        return torch._utils._rebuild_qtensor, made

    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", reduced)
    data = saved(torch.zeros(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointCorruptError, match="expected scales for"):
        fill_opaque("w", target, data)
