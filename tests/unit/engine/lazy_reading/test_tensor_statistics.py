"""Figures of a tensor, read part by part, are those of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.lazy_reading import tensor_slabs
from pytest_dcp._engine.lazy_reading.tensor_statistics import TensorStatistics, measure_tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tensor_slabs.iterate_slabs
    monkeypatch.setattr(
        "pytest_dcp._engine.lazy_reading.tensor_statistics.iterate_slabs",
        lambda shape, itemsize: whole(shape, itemsize, 64),
    )


def measure(tensor: torch.Tensor, folder: Path) -> TensorStatistics:
    dcp.save({"w": tensor}, checkpoint_id=folder)
    with dcp.open(folder) as opened:
        lazy = opened["w"]
        assert isinstance(lazy, dcp.LazyTensor)
        return measure_tensor(lazy, bins=4)


def test_figures_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(13, 7, dtype=torch.float64)
    tensor[3, 4] = 0.0
    found = measure(tensor, tmp_path)
    assert (found.elements, found.nan, found.infinite, found.zero) == (91, 0, 0, 1)
    assert (found.minimum, found.maximum) == (tensor.min(), tensor.max())
    assert found.mean == pytest.approx(float(tensor.mean()))
    assert found.deviation == pytest.approx(float(tensor.std(correction=0)))
    assert found.histogram == tuple(torch.histc(tensor, 4).int().tolist())


def test_elements_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    found = measure(torch.tensor([nan, inf, -inf, 1.0, 3.0, nan]), tmp_path)
    assert (found.nan, found.infinite, found.mean, found.deviation) == (2, 2, 2.0, 1.0)
    assert found.histogram == (1, 0, 0, 1)
    nothing = measure(torch.tensor([nan]), tmp_path)
    assert (nothing.nan, nothing.minimum, nothing.histogram) == (1, None, ())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.complex64])
def test_every_kind_of_dtype_has_figures(tmp_path: Path, dtype: torch.dtype) -> None:
    found = measure(torch.tensor([[0, 1], [1, 1]]).to(dtype), tmp_path)
    assert (found.zero, found.minimum, found.maximum, found.mean) == (1, 0.0, 1.0, 0.75)


def test_empty_and_constant_tensors(tmp_path: Path) -> None:
    assert measure(torch.empty(0, 3), tmp_path).elements == 0
    constant = measure(torch.full((5,), 2.0), tmp_path)
    assert (constant.minimum, constant.maximum, constant.deviation) == (2.0, 2.0, 0.0)
    assert sum(constant.histogram) == 5
