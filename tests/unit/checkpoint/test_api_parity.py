"""The whole surface of `torch.distributed.checkpoint`, as installed, against ours.

Walks every module of torch's package. Of each: the names of its `__all__`, the public names that it
defines, and the private ones that other libraries import. Every call that torch accepts, ours
accepts: no name or parameter is missing, at another position or with another default. Ours may have
further parameters, which such calls do not use. `DIFFERENCES` lists the exceptions.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Iterator
from inspect import Parameter
from types import ModuleType
from typing import Any

import pytest

import pytest_dcp.checkpoint as our_dcp
from support.torch_surface import OURS, PRIVATE, TORCH, modules_of_torch, surface

torch_dcp: Any = importlib.import_module(TORCH)
MODULES = modules_of_torch()

DIFFERENCES: dict[str, str] = {}
"""What a call in torch's way meets in ours, and why."""

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
REST = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def test_every_public_name_of_the_package_is_there() -> None:
    names = {
        name
        for name, value in vars(torch_dcp).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert len(names) >= 26
    assert sorted(name for name in names if not hasattr(our_dcp, name)) == []
    assert sorted(name for name in names if name not in our_dcp.__all__) == []


def test_every_name_in_all_is_there() -> None:
    assert sorted(n for n in our_dcp.__all__ if not hasattr(our_dcp, n)) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_name_of_a_module_is_there(module: str) -> None:
    theirs, ours = both(module)
    assert [name for name in surface(theirs) if not hasattr(ours, name)] == []
    public = getattr(theirs, "__all__", [])
    assert [name for name in public if public and ours.__all__ and name not in ours.__all__] == []


@pytest.mark.parametrize("module", MODULES)
def test_everything_can_be_called_as_in_torch(module: str) -> None:
    theirs, ours = both(module)
    problems: list[str] = []
    for name in surface(theirs):
        for where, one, other in callables(name, getattr(theirs, name), getattr(ours, name, None)):
            problems += (f"{module}.{where}: {text}" for text in differences(one, other))
    assert [one for one in problems if one not in DIFFERENCES] == []


def test_the_list_of_private_names_is_of_names_that_torch_has() -> None:
    """Of those that the installed torch has, most are there: the list is not of another world."""
    found = [name for name, module in PRIVATE.items() if hasattr(both(module)[0], name)]
    assert len(found) > len(PRIVATE) * 0.9


def test_a_class_of_ours_is_accepted_where_torchs_is() -> None:
    for name in ("StorageReader", "StorageWriter", "SavePlanner", "LoadPlanner"):
        assert getattr(our_dcp, name) is getattr(torch_dcp, name)
    for name, base in (
        ("FileSystemWriter", torch_dcp.StorageWriter),
        ("FileSystemReader", torch_dcp.StorageReader),
        ("DefaultSavePlanner", torch_dcp.SavePlanner),
        ("DefaultLoadPlanner", torch_dcp.LoadPlanner),
    ):
        assert issubclass(getattr(our_dcp, name), base)
        assert getattr(our_dcp, name) is not getattr(torch_dcp, name)


def test_enumerations_have_torchs_members() -> None:
    found = 0
    for module in MODULES:
        theirs, ours = both(module)
        for name in surface(theirs):
            one = getattr(theirs, name)
            if not (inspect.isclass(one) and issubclass(one, enum.Enum)):
                continue
            found += 1
            other = getattr(ours, name)
            assert {m.name: m.value for m in one} == {m.name: m.value for m in other}, name
    assert found >= 4


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (lambda a, b=1: 0, lambda a, b=1: 0, []),
        (lambda a, b=1: 0, lambda a, b=1, c=2, *, d=3: 0, []),
        (lambda a, *, b=1: 0, lambda a, *, c=1, b=1: 0, []),
        (lambda a, b=1: 0, lambda a: 0, ["b is not there"]),
        (lambda a, b: 0, lambda b, a: 0, ["a is at 1, not at 0", "b is at 0, not at 1"]),
        (lambda a, b=1: 0, lambda a, b=2: 0, ["b has the default 2, not 1"]),
        (lambda a, b: 0, lambda a, b=2: 0, []),
        (lambda a, b=1: 0, lambda a, *, b=1: 0, ["b is keyword-only"]),
        (lambda a: 0, lambda a, b: 0, ["b is new and has no default"]),
        (lambda a, **kw: 0, lambda a: 0, ["takes no **kw"]),
        (lambda a, **kw: 0, lambda a, **more: 0, []),
    ],
)
def test_the_comparison_sees_every_difference(one: Any, other: Any, expected: list[str]) -> None:
    assert differences(one, other) == expected


def both(module: str) -> tuple[ModuleType, ModuleType]:
    return importlib.import_module(f"{TORCH}.{module}"), importlib.import_module(f"{OURS}.{module}")


def callables(name: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Of a function, itself; of a class that is not torch's own, its public methods."""
    if one is other or one == other:  # Two aliases of one type are equal, and not the same.
        return
    if not inspect.isclass(one):
        if callable(one):
            yield name, one, other
        return
    if issubclass(one, enum.Enum):
        return
    for attribute in dir(one):
        if attribute.startswith("_") and attribute != "__init__":
            continue
        method = inspect.getattr_static(one, attribute)
        if isinstance(method, property) or not callable(getattr(one, attribute)):
            continue
        if getattr(one, attribute) is getattr(object, attribute, None):
            continue
        yield f"{name}.{attribute}", getattr(one, attribute), getattr(other, attribute, None)


def differences(one: Any, other: Any) -> list[str]:
    """Where a call that fits `one` would not mean the same to `other`."""
    if not callable(other):
        return ["is not there"]
    theirs = inspect.signature(one, follow_wrapped=True).parameters
    ours = inspect.signature(other, follow_wrapped=True).parameters
    problems: list[str] = []
    order = [p.name for p in ours.values() if p.kind in POSITIONAL]
    for at, mine in enumerate(theirs.values()):
        problems += _of_one(at, mine, ours, order)
    for name, parameter in ours.items():
        if (
            name not in theirs
            and parameter.kind not in REST
            and parameter.default is Parameter.empty
        ):
            problems.append(f"{name} is new and has no default")
    return problems


def _of_one(at: int, mine: Parameter, ours: Any, order: list[str]) -> list[str]:
    if mine.kind in REST:
        stars = "*" if mine.kind is Parameter.VAR_POSITIONAL else "**"
        taken = any(p.kind is mine.kind for p in ours.values())
        return [] if taken else [f"takes no {stars}{mine.name}"]
    parameter = ours.get(mine.name)
    if parameter is None:
        return [f"{mine.name} is not there"]
    problems = []
    if mine.kind in POSITIONAL:
        if parameter.kind not in POSITIONAL:
            return [f"{mine.name} is keyword-only"]
        if order.index(mine.name) != at:
            problems.append(f"{mine.name} is at {order.index(mine.name)}, not at {at}")
    if mine.default is not Parameter.empty and not _same_default(parameter.default, mine.default):
        problems.append(f"{mine.name} has the default {parameter.default}, not {mine.default}")
    return problems


def _same_default(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, enum.Enum) and isinstance(ours, enum.Enum):
        return ours.name == theirs.name
    if inspect.isfunction(theirs) and inspect.isfunction(ours):  # Each engine's own.
        return ours.__name__ == theirs.__name__
    return bool(ours is theirs or ours == theirs)
