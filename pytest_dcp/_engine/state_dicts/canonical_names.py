"""Canonical names: the name that a part of a model would have if nothing wrapped the model.

Takes a model and names from its `named_parameters()`, `named_modules()` or `state_dict()`, and
removes the steps into a wrapper. A step is removed only if the module at that place is a wrapper: a
child that a user called `module` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from pytest_dcp._torch_internals.modules import child_of

WRAPPED_AS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    # By name: the class can only be imported with the whole compiler, which takes seconds.
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
"""Torch's wrappers and the child that each wraps."""

KNOWN_TO_MODULE = nn.Module.__getattr__
"""A class with this `__getattr__` does not forward attributes of its children."""

_Place = tuple[nn.Module | None, str]
"""A module, or None if there is none, and its canonical prefix."""


class Names:
    """The canonical names of one model."""

    def __init__(self, model: nn.Module, modifiers: str = "_fqn_modifiers") -> None:
        """modifiers: see `StateDictOptions.dsd_fqn_modifiers`."""
        self._model = model
        self._modifiers = modifiers
        self._places: dict[str, _Place] = {"": (model, "")}
        self._canonical: dict[str, str] = {}
        # Thousands of modules have few classes.
        self._classes: dict[type, tuple[str | None, bool]] = {}

    def canonical(self, name: str) -> str:
        """The canonical name of a parameter, a buffer or any key of the model's state dict."""
        cached_name = self._canonical.get(name)
        if cached_name is None:
            path, _, leaf = name.rpartition(".")
            place = self._places.get(path) or self._place(path)
            cached_name = self._canonical[name] = place[1] + leaf
        return cached_name

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter by its canonical name; a tied one under each of its names."""
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            yield self.canonical(name), parameter

    def prefixes(self, modules: Iterable[nn.Module]) -> tuple[str, ...]:
        """Prefixes of the names below these modules, in the order of the model.

        Raises ValueError for modules that are not the model's.
        """
        requested = set(modules)
        found: dict[str, None] = {}
        seen = set()
        for path, module in self._model.named_modules(remove_duplicate=False):
            if module in requested:
                seen.add(module)
                found[self._place(path)[1]] = None
        if strangers := requested - seen:
            kinds = sorted(type(module).__name__ for module in strangers)
            raise ValueError(f"{len(kinds)} of the submodules are not in the model: {kinds}")
        return tuple(found)

    def _place(self, path: str) -> _Place:
        place = self._places.get(path)
        if place is None:
            above, _, step = path.rpartition(".")
            place = self._places[path] = self._step(*self._place(above), step)
        return place

    def _step(self, module: nn.Module | None, prefix: str, step: str) -> _Place:
        if module is None:  # A key that a hook has added.
            return None, f"{prefix}{step}."
        inner, renames = self._facts_of(type(module))
        while inner is not None:
            wrapped = module.get_submodule(inner)
            if step == inner:
                return wrapped, prefix
            # This wrapper hides itself from state dicts: the step is the wrapped module's own.
            module = wrapped
            inner, renames = self._facts_of(type(module))
        if not renames and self._modifiers not in vars(module):
            return child_of(module, step), f"{prefix}{step}."
        renamed: Mapping[str, str] = getattr(module, self._modifiers, dict)()
        if step in renamed.values():
            return module.get_submodule(step), prefix
        return child_of(module, renamed.get(step, step)), f"{prefix}{step}."

    def _facts_of(self, kind: type[nn.Module]) -> tuple[str | None, bool]:
        """The child that a class wraps, and whether its modules may have the modifiers."""
        facts = self._classes.get(kind)
        if facts is None:
            # A module without the modifiers would raise and catch an error for each look-up.
            forwards = kind.__getattr__ is not KNOWN_TO_MODULE
            facts = wrapped_as(kind), forwards or hasattr(kind, self._modifiers)
            self._classes[kind] = facts
        return facts


def wrapped_as(kind: type) -> str | None:
    """The name of the child that one of torch's classes wraps; None for any other module class."""
    for base in kind.__mro__:
        if inner := WRAPPED_AS.get(f"{base.__module__}.{base.__qualname__}"):
            return inner
    return None
