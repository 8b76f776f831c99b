"""State dicts to draw, nested, with tied tensors and Python values; and state dicts in a layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

from hypothesis import strategies as st

from pytest_dcp.properties.meshes import MeshSpec
from pytest_dcp.properties.placements import Layout
from pytest_dcp.properties.tensors import TensorSpec, tensor_specs


@dataclass(frozen=True, slots=True)
class SameTensor:
    """The same tensor object as at another top-level key."""

    to: str
    """The other key."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """The structure of a state dict, without the bytes.

    >>> spec = StateSpec({"w": TensorSpec((2,)), "head": SameTensor("w"), "step": 3})
    >>> state = spec.build()
    >>> state["w"], state["step"], state["head"] is state["w"]
    (tensor([1., 2.]), 3, True)
    >>> spec.on().full().keys() == state.keys()  # plain: see `on` for layouts
    True
    """

    tree: dict[str, Any]
    """Nested dicts and lists of TensorSpec, SameTensor (top level only) and Python values."""

    def build(self, tensor: Callable[[TensorSpec], Any] = TensorSpec.build) -> dict[str, Any]:
        """The state dict; `tensor` makes each tensor, in the order of the tree."""
        built: dict[str, Any] = _build(self.tree, tensor)
        return {
            key: built[value.to] if isinstance(value, SameTensor) else value
            for key, value in built.items()
        }

    def tensors(self) -> list[TensorSpec]:
        """The descriptions of all tensors, tied ones once."""
        return list(_specs(self.tree))

    def on(self, *layouts: Layout) -> PlacedState:
        """This state with these layouts assigned to its tensors in turn; plain without any."""
        return PlacedState(self, layouts or (Layout(),))


@dataclass(frozen=True, slots=True)
class PlacedState:
    """A `Placed` state dict of tensors that are not parameters."""

    spec: StateSpec
    layouts: tuple[Layout, ...]
    """All have the same world size."""

    def __post_init__(self) -> None:
        sizes = {layout.mesh.size for layout in self.layouts}
        if len(sizes) != 1:
            raise ValueError(f"expected layouts of one world size, got sizes {sorted(sizes)}")

    @property
    def world_size(self) -> int:
        return self.layouts[0].mesh.size

    @property
    def meshes(self) -> tuple[MeshSpec, ...]:
        return tuple({one.mesh: None for one in self.layouts if one.placements is not None})

    def full(self) -> dict[str, Any]:
        return self.spec.build()

    def state(self, device: str | None = None) -> dict[str, Any]:
        count = -1

        def place(spec: TensorSpec) -> Any:
            nonlocal count
            count += 1
            return self.layouts[count % len(self.layouts)].place(spec, device)

        return self.spec.build(place)


def values() -> st.SearchStrategy[Any]:
    """Python values that a checkpoint can hold without code; shrink to None."""
    plain = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.binary(max_size=8),
    )
    lists = st.lists(plain, max_size=3)
    return st.one_of(plain, lists, lists.map(tuple), st.lists(lists, max_size=2))


@st.composite
def state_dicts(
    draw: st.DrawFn,
    *,
    tensors: st.SearchStrategy[TensorSpec] | None = None,
    max_size: int = 4,
    min_nested: int = 0,
) -> StateSpec:
    """Descriptions of state dicts; shrink to fewer keys, less nesting, one scalar tensor.

    min_nested: keys of nested mappings. torch 2.13's engine needs 1: for an empty mapping in a list
    it reports a missing key, even in its own checkpoints.
    """
    one = tensor_specs() if tensors is None else tensors
    entries = st.one_of(one, values())
    for _ in range(2):
        lists = st.lists(entries, max_size=2)
        entries = st.one_of(one, values(), _mappings(entries, min_nested), lists)
    tree: dict[str, Any] = {"w": draw(one), **draw(_mappings(entries, 0, max_size - 1))}
    top = [key for key, value in tree.items() if isinstance(value, TensorSpec)]
    tied = draw(st.none() | st.sampled_from(top))
    if tied is not None:
        tree["tied"] = SameTensor(tied)
    return StateSpec(tree)


def _mappings(
    entries: st.SearchStrategy[Any], min_size: int = 0, max_size: int = 2
) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings whose keys are a, b, c ..."""
    some = st.lists(entries, min_size=min_size, max_size=max_size)
    return some.map(lambda found: dict(zip(ascii_lowercase, found, strict=False)))


def _build(value: Any, tensor: Callable[[TensorSpec], Any]) -> Any:
    if isinstance(value, TensorSpec):
        return tensor(value)
    if isinstance(value, dict):
        return {key: _build(inner, tensor) for key, inner in value.items()}
    if isinstance(value, list):
        return [_build(inner, tensor) for inner in value]
    return value


def _specs(value: Any) -> Iterator[TensorSpec]:
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _specs(inner)
