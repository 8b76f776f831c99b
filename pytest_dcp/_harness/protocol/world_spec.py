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

    backend: Literal["auto", "gloo", "nccl", "fake", "threaded"]
    device: Literal["auto", "cpu", "cuda"]
    mesh: list[int] | tuple[int, ...] | None
    mesh_dim_names: list[str] | tuple[str, ...] | None
    timeout: float | None
    """Seconds, above 0."""
    isolation: Isolation
    ranks: Sequence[int] | None
    """Of a fake world: the ranks whose views run, each as a test of its own; None: rank 0."""


KEYWORDS = tuple(WorldKeywords.__annotations__)
BACKENDS = ("auto", "gloo", "nccl")
FAKE = "fake"
"""The backend of torch's FakeProcessGroup: one process runs one rank's view of the world."""
NO_GROUP = "none"
"""The backend of ranks that join no process group: they run code that makes its own."""
THREADED = "threaded"
"""The backend of torch's groups of threads: each rank is a thread of one process."""
MAX_THREADS = 64
SIMULATED = (FAKE, THREADED)
"""Backends whose ranks are not processes."""
MAX_WORLD_SIZE = 1024
"""A larger world on one machine is a typing error: each rank is a process."""
MAX_FAKE_SIZE = 1 << 17
"""As `pytest_dcp.simulate` has it; a fake rank costs nothing."""


@dataclass(frozen=True, slots=True)
class WorldSpec:
    """One world, ready to launch."""

    size: int
    """Number of processes, >= 1, each of them a rank; one for worlds that are `SIMULATED`."""
    backend: str
    """gloo, nccl, fake or threaded; `NO_GROUP` for none."""
    device: str
    """cpu or cuda."""
    mesh: tuple[int, ...]
    """Shape of the device mesh; its product is the number of ranks."""
    mesh_dim_names: tuple[str, ...] | None
    timeout_s: float
    """Seconds from all ranks ready to the end of teardown; inf for none."""
    isolation: Isolation
    """test: new ranks for every test; module: the tests of a module share ranks."""
    fake_view: tuple[int, int] | None = None
    """Of a fake world: the rank whose view its one process runs, and the number of ranks."""
    threads: int = 0
    """Of a world of threads: the number of ranks."""


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
    most = largest_size(kwargs)
    sizes = [size for size in values if _check_size(size, most, problems)]
    if is_list and len(set(sizes)) != len(sizes):
        problems.append(f"lists a size twice: {list(values)!r}")
    problems += [
        f"has no keyword {name!r}; it takes {', '.join(KEYWORDS)}"
        for name in kwargs
        if name not in KEYWORDS
    ]
    problems += _keyword_problems(kwargs)
    return MarkerValues(tuple(sizes), is_list, dict(kwargs), tuple(problems))  # type: ignore[arg-type]  # _check_size let only ints through


def largest_size(keywords: Mapping[str, object]) -> int:
    """The most ranks that a world of these keywords may have."""
    backend = keywords.get("backend")
    return {FAKE: MAX_FAKE_SIZE, THREADED: MAX_THREADS}.get(str(backend), MAX_WORLD_SIZE)


def _check_size(size: object, most: int, problems: list[str]) -> bool:
    if isinstance(size, bool) or not isinstance(size, int):
        problems.append(f"takes an int or a list of ints; got {size!r}")
        return False
    if not 1 <= size <= most:
        problems.append(f"takes a size from 1 to {most}; got {size!r}")
        return False
    return True


def _keyword_problems(kwargs: Mapping[str, object]) -> list[str]:
    problems = []
    backend = kwargs.get("backend", "auto")
    if backend not in (*BACKENDS, *SIMULATED):
        choices = ", ".join((*BACKENDS, *SIMULATED))
        problems.append(f"backend= takes one of {choices}; got {backend!r}")
    device = kwargs.get("device", "auto")
    if device not in ("auto", "cpu", "cuda"):
        problems.append(f"device= takes auto, cpu or cuda; got {device!r}")
    if backend == "nccl" and device == "cpu":
        problems.append("backend='nccl' needs device='cuda'; got device='cpu'")
    problems += _simulation_problems(kwargs)
    isolation = kwargs.get("isolation", "test")
    if isolation not in get_args(Isolation):
        problems.append(f"isolation= takes test or module; got {isolation!r}")
    timeout = kwargs.get("timeout")
    if timeout is not None and not _is_duration(timeout):
        problems.append(f"timeout= takes seconds, or 0 or None for no limit; got {timeout!r}")
    return problems + _mesh_problems(kwargs)


def _simulation_problems(kwargs: Mapping[str, object]) -> list[str]:
    """Problems with the keywords of a world whose ranks are not processes."""
    backend, ranks, problems = kwargs.get("backend"), kwargs.get("ranks"), []
    if ranks is not None and backend != FAKE:
        problems.append("ranks= chooses views of a world with backend='fake'; others run all ranks")
    elif ranks is not None and not _are_ranks(ranks):
        problems.append(f"ranks= takes different ranks, such as [0, 513]; got {ranks!r}")
    if backend not in SIMULATED:
        return problems
    if kwargs.get("device") == "cuda":
        problems.append(f"backend={backend!r} needs device='cpu'; got device='cuda'")
    if kwargs.get("isolation") == "module":
        problems.append(f"backend={backend!r} runs each test alone, without isolation='module'")
    return problems


def _are_ranks(ranks: object) -> bool:
    if not isinstance(ranks, list | tuple | range) or not ranks:
        return False
    ints = all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks)
    return ints and len(set(ranks)) == len(ranks)


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
    values: MarkerValues, size: int, defaults: Defaults, view: int = 0
) -> tuple[WorldSpec | None, tuple[str, ...]]:
    """The world of `size` ranks that a marker asks for, or None and the reason. Pure (no I/O).

    view: the rank whose view runs, if the world is fake.
    """
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
    fake = keywords.get("backend") == FAKE
    if fake and not 0 <= view < size:
        return None, (f"has no rank {view}: its ranks are 0 to {size - 1}",)
    names = keywords.get("mesh_dim_names")
    backend, device = _resolve_device(
        str(keywords.get("backend", "auto")), str(keywords.get("device", "auto")), defaults.backend
    )
    timeout = keywords.get("timeout", defaults.timeout_s)
    spec = WorldSpec(
        size=1 if keywords.get("backend") in SIMULATED else size,
        backend=backend,
        device=device,
        mesh=mesh,
        mesh_dim_names=tuple(map(str, names)) if isinstance(names, list | tuple) else None,
        timeout_s=_seconds(timeout),
        isolation="module" if keywords.get("isolation") == "module" else "test",
        fake_view=(view, size) if fake else None,
        threads=size if keywords.get("backend") == THREADED else 0,
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
