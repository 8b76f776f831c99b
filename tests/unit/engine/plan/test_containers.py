"""Containers and keys of a state dict: described, merged, given back, refused by name."""

from __future__ import annotations

import json
import pickle
import types
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.plan.containers import (
    Description,
    describe,
    description_of,
    merge_descriptions,
)
from pytest_dcp._engine.plan.nested import as_saved, as_saved_path, flatten, set_element
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Config(dict[str, Any]):
    """A class that no checkpoint can give back by itself."""


def saved_and_built(state: dict[Any, Any], folder: Path, **options: Any) -> dict[str, Any]:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return dcp.load_without_template(checkpoint_id=folder, **options)


def kinds(value: Any) -> Any:
    """The classes of nested containers and keys, and their order where it counts."""
    if isinstance(value, OrderedDict):
        return [(type(k), k, kinds(v)) for k, v in value.items()]
    if isinstance(value, dict | UserDict | types.MappingProxyType):
        return type(value), {(type(k), k): kinds(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [kinds(v) for v in value]
    return type(value)


def test_a_schedulers_state_decays_as_before(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3, 3], gamma=0.1)
    found = saved_and_built({"scheduler": scheduler.state_dict()}, tmp_path)["scheduler"]
    assert type(found["milestones"]) is Counter
    assert found["milestones"] == Counter({1: 1, 3: 2})
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    resumed = torch.optim.lr_scheduler.MultiStepLR(other, milestones=[9])
    resumed.load_state_dict(found)
    rates = []
    for _ in range(4):
        other.step()
        resumed.step()
        rates.append(other.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.001, 0.001])


def test_containers_and_keys_come_back_as_they_were_saved(tmp_path: Path) -> None:
    listed = defaultdict(list, a=torch.ones(1))
    state: dict[Any, Any] = {
        "optimizer": {"state": {0: {"step": torch.ones(())}, 1: {}}, "param_groups": []},
        "ordered": OrderedDict(z=torch.ones(2), y={}, x=OrderedDict(), w=1),
        "counter": Counter("abca"),
        "default": listed,
        "plain default": defaultdict(None, {2: 1}),
        "user": UserDict({"k": 1}),
        "proxy": types.MappingProxyType({"k": torch.ones(1)}),
        "keys": {1: "int", 2.5: "float", True + 1: "two", None: "none", b"\xff": "b", "s": "str"},
        "tuples": {("a", 1): torch.ones(1), ((None,), False): 2},
        "list": [{}, torch.ones(1), {"deep": {}}, {7: torch.ones(1)}],
        "empty": {},
        3: {"root": 1},
        "values": [[], (), {"inside a list": {}}],
    }
    found = saved_and_built(state, tmp_path)
    assert kinds(found) == kinds(state)
    assert found["default"].default_factory is list
    assert found["optimizer"]["state"][0]["step"].item() == 1


def test_torch_reads_our_descriptions_and_we_read_states_that_torch_does_not(
    tmp_path: Path,
) -> None:
    state = {"a": {0: torch.ones(1), 1: {}}, "b": OrderedDict(c=2)}
    dcp.save(state, checkpoint_id=tmp_path / "ours", no_dist=True)
    plain: dict[str, Any] = {}
    torch_dcp.state_dict_loader._load_state_dict(
        plain,
        storage_reader=torch_dcp.FileSystemReader(tmp_path / "ours"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    assert plain == {"a": {"0": torch.ones(1)}, "b": {"c": 2}}
    target: Any = {"a": {0: torch.zeros(1)}, "b": {"c": None}}
    torch_dcp.load(target, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert target == {"a": {0: torch.ones(1)}, "b": {"c": 2}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "torchs", no_dist=True)
    assert dcp.load_without_template(checkpoint_id=tmp_path / "torchs") == plain


def test_plain_dicts_with_string_keys_need_no_description(tmp_path: Path) -> None:
    metadata = dcp.save({"a": {"b": [torch.ones(1)]}}, checkpoint_id=tmp_path, no_dist=True)
    assert description_of(metadata.planner_data) is None
    again = dcp.FileSystemReader(tmp_path).read_metadata()
    assert description_of(again.planner_data) is None


def test_keys_choose_among_empty_containers_too(tmp_path: Path) -> None:
    state = {"a": {"x": {}, "y": torch.ones(1)}, "b": {}, "c": {1: torch.ones(1)}}
    found = saved_and_built(state, tmp_path, keys={"a.x", "c"})
    assert found == {"a": {"x": {}}, "c": {1: torch.ones(1)}}


def test_other_classes_are_refused_by_name_unless_trusted(tmp_path: Path) -> None:
    state = {"config": Config(a=1), "days": {date(2026, 1, 1): torch.ones(1)}, "fine": {1: 2}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointException) as caught:
        dcp.load_without_template(checkpoint_id=tmp_path)
    text = str(caught.value)
    assert "'config' is a test_containers.Config" in text
    assert "'days.2026-01-01': the key is a datetime.date" in text
    assert dcp.load_without_template(keys="fine", checkpoint_id=tmp_path) == {"fine": {1: 2}}


def test_a_trusted_checkpoints_classes_are_made(tmp_path: Path) -> None:
    state = {"config": Config(a=1, b={"c": torch.ones(1)})}
    found = saved_and_built(state, tmp_path, weights_only=False)
    assert type(found["config"]) is Config
    assert found["config"]["b"]["c"].item() == 1


def test_a_copy_for_the_background_keeps_containers(tmp_path: Path) -> None:
    state = {"o": OrderedDict(a=torch.ones(1)), "c": Counter(a=2), "d": defaultdict(int, {1: 2})}
    future: Any = dcp.async_save(state, checkpoint_id=tmp_path, no_dist=True)
    future.result()
    assert kinds(dcp.load_without_template(checkpoint_id=tmp_path)) == kinds(state)


key = st.one_of(st.text("ab.0", max_size=2), st.integers(-3, 3), st.none(), st.binary(max_size=1))
contained = st.recursive(
    st.integers(0, 9).map(torch.tensor),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.dictionaries(key, inner, max_size=3),
        st.dictionaries(key, inner, max_size=3).map(OrderedDict),
        st.dictionaries(key, inner, max_size=3).map(Counter),
    ),
    max_leaves=8,
)


@given(st.dictionaries(key, contained, max_size=4))
def test_a_flattened_and_described_state_is_rebuilt(state: dict[Any, Any]) -> None:
    noted: list[tuple[Any, Any]] = []
    try:
        flat, paths = flatten(state, note=lambda *found: noted.append(found))
    except ValueError:
        return  # two keys of one name
    text = describe((as_saved_path(path), container) for path, container in noted)
    plain: dict[str, Any] = {}
    for fqn, path in as_saved(paths).items():
        set_element(plain, path, flat[fqn])
    found = Description(text).rebuilt(plain, lambda _: True, trusted=False)
    assert kinds(found) == kinds(state)


def test_keys_of_one_name_are_refused_where_their_contents_would_mix() -> None:
    with pytest.raises(ValueError, match=r"duplicated flatten key 'a\.0'"):
        flatten({"a": {0: {"x": 1}, "0": {"y": 2}}})


def test_descriptions_of_ranks_are_merged() -> None:
    one = describe([(("a",), {}), (("b",), {1: 1}), (("k",), {None: 1})])
    two = describe([(("a",), {2: 1}), (("c",), OrderedDict(x=1)), (("k",), {1.5: 1})])
    assert one is not None
    assert two is not None
    text = merge_descriptions([one, two, one])
    root = {"a": {"2": 1}, "b": {"1": 1}, "c": {"x": 1}, "k": {"None": 1, "1.5": 2}}
    found = Description(text).rebuilt(root, lambda _: True, trusted=False)
    assert found == {"a": {"2": 1}, "b": {1: 1}, "c": OrderedDict(x=1), "k": {None: 1, 1.5: 2}}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '[{"path":["a"],"kind":"os.system"}]',
        '[{"path":[1.5],"kind":"dict"}]',
        '[{"path":["a"],"kind":"defaultdict","factory":"eval"}]',
        '[{"path":["a"],"kind":"dict","keys":[["x",["exec","1"]]]}]',
        '[{"path":["a"],"kind":"dict","keys":[["x",["int","one"]]]}]',
        "[" * 100_000,
    ],
)
def test_a_text_that_is_no_description_is_refused(text: str) -> None:
    with pytest.raises(CheckpointCorruptError):
        Description(text)


@pytest.mark.parametrize(
    "entry",
    [
        {"path": ["a"], "kind": "OrderedDict"},
        {"path": ["a", "b"], "kind": "dict", "empty": True},
        {"path": [], "kind": "list"},
    ],
)
def test_a_description_of_something_else_is_refused(entry: dict[str, Any]) -> None:
    description = Description(json.dumps([entry]))
    with pytest.raises(CheckpointCorruptError):
        description.rebuilt({"a": [1]}, lambda _: True, trusted=False)


def test_nothing_is_imported_unless_trusted() -> None:
    description = Description('[{"path":["a"],"kind":"?antigravity.Thing"}]')
    with pytest.raises(CheckpointMismatchError, match=r"'a' is a antigravity\.Thing"):
        description.rebuilt({"a": {}}, lambda _: True, trusted=False)


def test_a_chain_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"'c' is a collections\.ChainMap"):
        saved_and_built({"c": ChainMap({"a": 1}, {"b": 2})}, tmp_path)


def test_the_paths_are_torchs_and_the_description_is_kept_beside_them(tmp_path: Path) -> None:
    state = {"a": {1: torch.ones(1)}, "b": {}}
    metadata = dcp.save(state, checkpoint_id=tmp_path / "ours", no_dist=True)
    torchs = torch_dcp.save(state, checkpoint_id=tmp_path / "torchs", no_dist=True)
    again = dcp.FileSystemReader(tmp_path / "ours").read_metadata()
    with (tmp_path / "ours" / ".metadata").open("rb") as file:
        pickled = pickle.load(file)
    assert type(pickled.planner_data) is dict
    for found in (metadata, again, pickled):
        assert dict(found.planner_data) == torchs.planner_data
    assert description_of(again.planner_data) == description_of(metadata.planner_data) is not None
