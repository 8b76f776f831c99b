"""Errors that programs recognise by torch's words: ours begin with the same ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import utils as torchs
from torch.distributed.checkpoint.metadata import MetadataIndex

from pytest_dcp.checkpoint import utils as ours
from pytest_dcp.checkpoint.state_dict import set_model_state_dict

LOOK_UPS: list[tuple[Mapping[str, Any], MetadataIndex]] = [
    ({"a": torch.ones(2)}, MetadataIndex("b")),
    ({"a": torch.ones(2)}, MetadataIndex("a", [1])),
    ({"a": torch.ones(2, 2)}, MetadataIndex("a", [1, 0])),
    ({"a": 3}, MetadataIndex("a", [1])),
]


@pytest.mark.parametrize(("state", "index"), LOOK_UPS)
def test_look_ups_fail_in_torchs_words(state: Any, index: MetadataIndex) -> None:
    with pytest.raises(ValueError, match=r".") as theirs:
        torchs.find_state_dict_object(state, index)
    with pytest.raises(ValueError, match="^" + re.escape(str(theirs.value))):
        ours.find_state_dict_object(state, index)


def test_a_model_that_misses_keys_says_so_in_torchs_words() -> None:
    """Up to quotes, spaces and what is said of sizes, which differ."""
    model = torch.nn.Linear(2, 3)
    state = {"wieght": torch.ones(3, 2), "more": torch.ones(1)}
    with pytest.raises(RuntimeError) as theirs:
        model.load_state_dict(state)
    with pytest.raises(RuntimeError) as ours:
        set_model_state_dict(model, dict(state))
    for line in str(theirs.value).splitlines():
        assert line.strip() in str(ours.value)
    with pytest.raises(RuntimeError, match="size mismatch for"):
        set_model_state_dict(model, {"weight": torch.ones(1), "bias": torch.ones(3)})
