"""The marker's values: its arguments -> a `WorldSpec`, or all problems with them.

Pure (no I/O), and no torch: reading markers must cost an unmarked suite nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

Isolation = Literal["test", "module"]


class WorldKeywords(TypedDict, total=False):
    """Keywords of the marker and of `worlds(...)` besides the size."""

    backend: Literal["auto", "gloo", "nccl"]
    device: Literal["auto", "cpu", "cuda"]
    mesh: list[int] | tuple[int, ...] | None
    mesh_dim_names: list[str] | tuple[str, ...] | None
    timeout: float | None
    """Seconds, above 0."""
    isolation: Isolation


KEYWORDS = tuple(WorldKeywords.__annotations__)
BACKENDS = ("auto", "gloo", "nccl")
MAX_WORLD_SIZE = 1024
"""A larger world on one machine is a typing error: each rank is a process."""


@dataclass(frozen=True, slots=True)
class WorldSpec:
    """One world, ready to launch."""

    size: int
    """Number of ranks, >= 1; all on this machine."""
    backend: str
    """gloo or nccl."""
    device: str
    """cpu or cuda."""
    mesh: tuple[int, ...]
    """Shape of the device mesh; its product is `size`."""
    mesh_dim_names: tuple[str, ...] | None
    timeout_s: float
    """Seconds from all ranks ready to the end of teardown; inf for none."""
    isolation: Isolation
    """test: new ranks for every test; module: the tests of a module share ranks."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values of options and ini settings, for markers without their own."""

    backend: str = "auto"
    timeout_s: float = 120.0
    world_size: int | None = None
    """Overrides every marker's size if set."""


@dataclass(frozen=True, slots=True)
class MarkerValues:
    """One `world_size(...)` marker, raw and checked."""

    sizes: tuple[int, ...]
    """Empty if the marker leaves the size to a parametrization of `world_size`."""
    is_list: bool
    keywords: Mapping[str, object]
    problems: tuple[str, ...]
    """Sentences; empty if the marker is valid."""


def read_marker(args: Sequence[object], kwargs: Mapping[str, object]) -> MarkerValues:
    """The values of one marker together with all its problems. Pure (no I/O)."""
    problems: list[str] = []
    if len(args) > 1:
        problems.append(
            f"takes one positional argument, a size or a list of sizes; got {len(args)}: {args!r}"
        )
    is_list = bool(args) and isinstance(args[0], list | tuple)
    values: Sequence[object] = ()
    if args:
        values = args[0] if isinstance(args[0], list | tuple) else (args[0],)
        if is_list and not values:
            problems.append("was given an empty list of sizes")
    sizes = [size for size in values if _check_size(size, problems)]
    if is_list and len(set(sizes)) != len(sizes):
        problems.append(f"lists a size twice: {list(values)!r}")
    problems += [
        f"has no keyword {name!r}; it takes {', '.join(KEYWORDS)}"
        for name in kwargs
        if name not in KEYWORDS
    ]
    problems += _keyword_problems(kwargs)
    return MarkerValues(tuple(sizes), is_list, dict(kwargs), tuple(problems))  # type: ignore[arg-type]  # _check_size let only ints through


def _check_size(size: object, problems: list[str]) -> bool:
    if isinstance(size, bool) or not isinstance(size, int):
        problems.append(f"takes an int or a list of ints; got {size!r}")
        return False
    if not 1 <= size <= MAX_WORLD_SIZE:
        problems.append(f"takes a size from 1 to {MAX_WORLD_SIZE}; got {size!r}")
        return False
    return True


def _keyword_problems(kwargs: Mapping[str, object]) -> list[str]:
    problems = []
    backend = kwargs.get("backend", "auto")
    if backend not in BACKENDS:
        problems.append(f"backend= takes one of {', '.join(BACKENDS)}; got {backend!r}")
    device = kwargs.get("device", "auto")
    if device not in ("auto", "cpu", "cuda"):
        problems.append(f"device= takes auto, cpu or cuda; got {device!r}")
    if backend == "nccl" and device == "cpu":
        problems.append("backend='nccl' needs device='cuda'; got device='cpu'")
    isolation = kwargs.get("isolation", "test")
    if isolation not in get_args(Isolation):
        problems.append(f"isolation= takes test or module; got {isolation!r}")
    timeout = kwargs.get("timeout")
    if timeout is not None and not _is_duration(timeout):
        problems.append(f"timeout= takes seconds, or 0 or None for no limit; got {timeout!r}")
    return problems + _mesh_problems(kwargs)


def _is_duration(value: object) -> bool:
    # NaN is not above or at 0 either.
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _mesh_problems(kwargs: Mapping[str, object]) -> list[str]:
    mesh, names = kwargs.get("mesh"), kwargs.get("mesh_dim_names")
    if mesh is not None and not (
        isinstance(mesh, list | tuple)
        and mesh
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in mesh)
    ):
        return [f"mesh= takes a shape such as (2, 2), of ints >= 1; got {mesh!r}"]
    if names is None:
        return []
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        return [f"mesh_dim_names= takes names such as ('dp', 'tp'); got {names!r}"]
    if len(set(names)) != len(names):
        return [f"mesh_dim_names= has a name twice: {names!r}"]
    dims = len(mesh) if isinstance(mesh, list | tuple) else 1
    if len(names) != dims:
        return [
            f"mesh_dim_names={names!r} has {len(names)} names "
            f"for a mesh of {dims} dimension{'s' * (dims != 1)}"
        ]
    return []


def resolve(
    values: MarkerValues, size: int, defaults: Defaults
) -> tuple[WorldSpec | None, tuple[str, ...]]:
    """The world of `size` ranks that a marker asks for, or None and the reason. Pure (no I/O)."""
    keywords = values.keywords
    if values.problems:
        return None, values.problems
    marker_size = size
    size = defaults.world_size or size
    raw_mesh = keywords.get("mesh")
    mesh = tuple(raw_mesh) if isinstance(raw_mesh, list | tuple) else (size,)
    if math.prod(mesh) != size:
        if size == marker_size:
            return None, (f"mesh={mesh!r} has {math.prod(mesh)} ranks, but the size is {size}",)
        return None, (
            f"mesh={mesh!r} has {math.prod(mesh)} ranks and cannot take the size {size} "
            f"that --dcp-world-size asks for",
        )
    names = keywords.get("mesh_dim_names")
    backend, device = _resolve_device(
        str(keywords.get("backend", "auto")), str(keywords.get("device", "auto")), defaults.backend
    )
    timeout = keywords.get("timeout", defaults.timeout_s)
    spec = WorldSpec(
        size=size,
        backend=backend,
        device=device,
        mesh=mesh,
        mesh_dim_names=tuple(map(str, names)) if isinstance(names, list | tuple) else None,
        timeout_s=_seconds(timeout),
        isolation="module" if keywords.get("isolation") == "module" else "test",
    )
    return spec, ()


def _seconds(timeout: object) -> float:
    """A limit as a float; inf for 0 and None, and if it is too large for a float."""
    try:
        return float(timeout) if isinstance(timeout, int | float) and timeout else math.inf
    except OverflowError:
        return math.inf


def _resolve_device(backend: str, device: str, default_backend: str) -> tuple[str, str]:
    """The backend and the device type; the marker takes precedence over the option.

    Without either, a world uses gloo on the CPU, so that a suite behaves the same everywhere.
    """
    if backend == "auto" and not (default_backend == "nccl" and device == "cpu"):
        backend = default_backend
    if device == "auto":
        device = "cuda" if backend == "nccl" else "cpu"
    if backend == "auto":
        backend = "nccl" if device == "cuda" else "gloo"
    return backend, device
