"""A number in the checkpoint and a tensor here, and the other way round."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import CheckpointMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def loaded(folder: Path, saved: Any, template: Any, **options: Any) -> Any:
    """The value loaded over the template, and the report."""
    dcp.save({"a": {"lr": saved}, "b": [torch.ones(2)]}, checkpoint_id=folder)
    target: dict[str, Any] = {"a": {"lr": template}, "b": [torch.zeros(2)]}
    report = dcp.load(target, checkpoint_id=folder, **options)
    assert target["b"][0].tolist() == [1, 1]
    return target["a"]["lr"], report


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (0.5, torch.float32),
        (0.1, torch.bfloat16),
        (3, torch.int16),
        (3, torch.float32),
        (True, torch.bool),
        (1 + 2j, torch.complex64),
        (0.5, torch.complex64),
        (math.inf, torch.float16),
    ],
)
def test_a_tensor_is_filled_in_place_with_a_number(
    tmp_path: Path, number: Any, dtype: torch.dtype
) -> None:
    template = torch.zeros((), dtype=dtype)
    found, report = loaded(tmp_path, number, template)
    assert found is template
    assert template.item() == torch.tensor(number).to(dtype).item()
    assert report.converted == {"a.lr": (type(number), dtype)}


def test_the_optimizers_own_tensor_gets_the_number(tmp_path: Path) -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=rate, capturable=True)
    group = {"lr": optimizer.param_groups[0]["lr"]}
    dcp.save({"group": {"lr": 0.25}}, checkpoint_id=tmp_path)
    dcp.load({"group": group}, checkpoint_id=tmp_path)
    assert rate.item() == 0.25


def test_one_element_of_any_shape_and_numpys_numbers_are_filled(tmp_path: Path) -> None:
    template = torch.zeros(1, 1)
    found, report = loaded(tmp_path, np.float32(0.5), template, weights_only=False)
    assert found is template
    assert template.tolist() == [[0.5]]
    assert report.converted == {"a.lr": (np.float32, torch.float32)}


@pytest.mark.parametrize(
    ("saved", "template", "message"),
    [
        (0.5, torch.zeros((), dtype=torch.int64), "number 0.5 in the checkpoint, and a tensor of"),
        (300, torch.zeros((), dtype=torch.uint8), "which it does not fit"),
        (2**24 + 1, torch.zeros(()), "which it does not fit"),
        (1e300, torch.zeros(()), "which it does not fit"),
        (True, torch.zeros((), dtype=torch.int64), "which it does not fit"),
        (0.5, torch.zeros(2), "'a.lr' is the number 0.5 in the checkpoint, and a tensor of torch"),
        ("fast", torch.zeros(()), r"is a Python value \(str\) in the checkpoint, and a tensor"),
        ((0.5,), torch.zeros(()), r"is a Python value \(tuple\)"),
        (torch.tensor(0.5), 3, "'a.lr' is a tensor in the checkpoint, and int here"),
        (torch.tensor(True), 3, "is a tensor in the checkpoint, and int here"),
        (torch.zeros(2), 0.5, "is a tensor in the checkpoint, and float here"),
        (torch.tensor(0.5), "fast", "is a tensor in the checkpoint, and str here"),
        (torch.tensor(2**53 + 1), 0.5, "is a tensor of 9007199254740993 in the checkpoint"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, saved: Any, template: Any, message: str
) -> None:
    with pytest.raises(CheckpointException, match=message) as caught:
        loaded(tmp_path, saved, template)
    assert isinstance(caught.value.failures[0][0], CheckpointMismatchError)
    if isinstance(template, torch.Tensor):
        assert not template.any()


@pytest.mark.parametrize(
    ("tensor", "number"),
    [
        (torch.tensor(0.5), 0.1),
        (torch.tensor([3], dtype=torch.int16), 7),
        (torch.tensor(3), 0.5),
        (torch.tensor(True), False),
        (torch.tensor(1 + 2j), 0j),
        (torch.tensor(math.nan), 0.5),
    ],
)
def test_a_number_is_taken_from_a_tensor_of_one_element(
    tmp_path: Path, tensor: torch.Tensor, number: Any
) -> None:
    found, report = loaded(tmp_path, tensor, number)
    assert type(found) is type(number)
    assert found == tensor.item() or math.isnan(found)
    assert report.converted == {"a.lr": (tensor.dtype, type(number))}


def test_a_reader_of_torchs_takes_the_number_too(tmp_path: Path) -> None:
    torch_dcp.save({"lr": torch.tensor(0.5)}, checkpoint_id=tmp_path)
    target: dict[str, Any] = {"lr": 0.1}
    dcp.load(target, storage_reader=torch_dcp.FileSystemReader(tmp_path))
    assert target == {"lr": 0.5}


def test_without_strict_any_number_is_converted(tmp_path: Path) -> None:
    template = torch.zeros((), dtype=torch.int64)
    assert loaded(tmp_path / "1", 2.75, template, strict=False)[0].item() == 2
    assert loaded(tmp_path / "2", torch.tensor(2.75), 7, strict=False)[0] == 2
    with pytest.raises(CheckpointException, match="is a Python value"):
        loaded(tmp_path / "3", "fast", torch.zeros(()), strict=False)


def test_a_meta_tensor_gets_memory_and_the_number(tmp_path: Path) -> None:
    found, _ = loaded(tmp_path, 0.5, torch.zeros((), device="meta"))
    assert (found.device.type, found.item()) == ("cpu", 0.5)
