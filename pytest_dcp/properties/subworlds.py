"""The first n ranks of a world, as a mesh or a group; and steps that some ranks run and all report.

A law saves with n ranks and loads with m, in one world with enough ranks for both. A world creates
each mesh and group once and keeps it: they cost more than a save. All ranks learn whether a step
succeeded, ranks, so that every rank fails with the same words and none is left waiting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from pytest_dcp.api import announce_failure
from pytest_dcp.errors import LawError
from pytest_dcp.tracebacks import add_note, set_cause

TEXT_LIMIT = 2_000
"""Characters shown of an exception. torch's checkpoint errors have a traceback per rank, and the
reason comes last.
"""


T = TypeVar("T")


@dataclass(slots=True)
class _WorldObjects:
    """Objects created in a world."""

    world: dist.ProcessGroup | None = None
    meshes: dict[object, DeviceMesh] = field(default_factory=dict)
    groups: dict[int, dist.ProcessGroup | None] = field(default_factory=dict)


_objects = _WorldObjects()


def _of_this_world() -> _WorldObjects:
    """The objects of this world; a new default group means a new world."""
    global _objects
    if _objects.world is not dist.group.WORLD:
        _objects = _WorldObjects(dist.group.WORLD)
    return _objects


def device_type() -> str:
    """Device type of this world's tensors: cuda under NCCL, else cpu."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def rank() -> int:
    """This process's rank; 0 without a world."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The ranks of the world; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mesh_of(ranks: torch.Tensor, dim_names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of these ranks. Collective over all ranks of the world, members or not."""
    meshes = _of_this_world().meshes
    key = (tuple(ranks.shape), tuple(ranks.flatten().tolist()), dim_names)
    if key not in meshes:
        meshes[key] = DeviceMesh(device_type(), ranks, mesh_dim_names=dim_names or None)
    return meshes[key]


def first_ranks(count: int) -> dist.ProcessGroup | None:
    """The group of the first ranks; None without a world. Collective over all ranks."""
    if not dist.is_initialized():
        return None
    if count == dist.get_world_size():
        return dist.group.WORLD
    groups = _of_this_world().groups
    if count not in groups:
        groups[count] = dist.new_group(list(range(count)))
    return groups[count]


def check_room(count: int) -> None:
    """Raise ValueError unless the world has at least this many ranks."""
    __tracebackhide__ = True
    if count > world_size():
        raise ValueError(
            f"expected a world of at least {count} ranks for this law, got {world_size()}: "
            "mark the test with a larger world_size, or draw smaller layouts"
        )


def shared_folder() -> Path:
    """A new temporary folder, the same in every rank. Collective over all ranks of the world."""
    result: list[str | OSError] = [""]
    if rank() == 0:
        try:
            result = [tempfile.mkdtemp(prefix="dcp-shared-")]
        except OSError as error:
            result = [error]
    if dist.is_initialized():
        with _tell_of_error(result[0] if isinstance(result[0], OSError) else None):
            dist.broadcast_object_list(result)
    if isinstance(result[0], OSError):
        raise result[0]
    return Path(result[0])


Found = Sequence[object] | None
"""The problem found by a step."""
Stages = Generator[None, None, Found]
"""A step with a `yield` wherever this rank alone may have failed and a collective follows."""


def on_first_ranks(count: int, title: str, step: Callable[[], Found | Stages]) -> None:
    """Run a step on the first ranks. Collective: no rank continues before all of them are done.

    `step` returns the problem that it finds. A step that makes collective calls, which must not
    start after another rank has failed, is a generator: at each `yield` all ranks agree whether to
    continue. Raises LawError, the same on every rank of the world, if a step found a problem or
    raised in any rank; skips if a step skipped and none failed.
    """
    __tracebackhide__ = True
    stages = _stages(step) if rank() < count else iter(())
    going_on = True
    while going_on:
        found, cause = _Findings(), None
        try:
            problems = next(stages, ())
            found.goes_on = problems is None
            found.problems = [str(one) for one in problems or ()]
        except (KeyboardInterrupt, SystemExit):
            raise
        # Some are not Exceptions: CheckpointException, and pytest's exceptions to skip.
        except BaseException as error:  # noqa: BLE001  # raised again below
            cause = error
            (found.skips if _is_skip(error) else found.problems).append(_describe(error))
        with _tell_of_error(cause):
            everywhere = _gather_findings(found)
        going_on = everywhere.goes_on
        if everywhere.problems:
            broken = LawError(_list_problems(title, everywhere.problems))
            set_cause(broken, cause)
            raise broken
        if everywhere.skips:
            _skip(everywhere.skips[0], cause)


def _stages(step: Callable[[], Found | Stages]) -> Iterator[Sequence[object] | None]:
    """None for each `yield` of the step, and at its end the problem found, which is never None."""
    found = step()
    if isinstance(found, Generator):
        found = yield from found
    yield found or ()


@dataclass(slots=True)
class _Findings:
    """Findings of a stage of a step, in one rank or in all."""

    problems: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    goes_on: bool = False
    """Whether another stage follows."""


def _gather_findings(found: _Findings) -> _Findings:
    """All ranks' findings, without duplicates; one small message if there are none."""
    if not dist.is_initialized():
        return found
    bad = bool(found.problems or found.skips)
    flags = torch.tensor([bad, found.goes_on], dtype=torch.uint8, device=device_type())
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    bad, goes_on = map(bool, flags.tolist())
    if not bad:
        return _Findings(goes_on=goes_on)
    findings: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
    dist.all_gather_object(findings, (found.problems, found.skips))
    problems, skips = (
        [one for some in part for one in some] for part in zip(*findings, strict=True)
    )
    return _Findings([*dict.fromkeys(problems)], [*dict.fromkeys(skips)], goes_on)


def agree(what: str, group: dist.ProcessGroup | None, make: Callable[[], T]) -> T:
    """The result of `make`, once it has returned in every rank of the group. Collective.

    `make` makes no collective calls. Its exception is raised in the rank where it failed; the other
    ranks raise LawError naming the first such rank.
    """
    __tracebackhide__ = True
    if not dist.is_initialized():
        return make()
    result, cause = None, None
    try:
        result = make()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  # raised again below
        cause = error
    errors: list[str | None] = [None] * dist.get_world_size(group)
    with _tell_of_error(cause):
        dist.all_gather_object(errors, None if cause is None else _describe(cause), group=group)
    if cause is not None:
        raise cause
    for number, text in enumerate(errors):
        if text is not None:
            where = dist.get_global_rank(group, number) if group is not None else number
            raise LawError(f"{what}: rank {where}: {text}")
    return cast(T, result)


@contextmanager
def _tell_of_error(error: BaseException | None) -> Iterator[None]:
    """In the block all ranks meet to receive an error of this one.

    Peers may not come: they may hang in the collective that this rank left with the error, or make
    another call. Then the error itself is reported: by the world, or by raising it here.
    """
    if error is None or _is_skip(error):
        yield
        return
    in_vain: Exception | None = None
    try:
        with announce_failure(error):
            yield
    except Exception as failed:  # noqa: BLE001 - reported below: the first error is the cause
        in_vain = failed
    if in_vain is not None:
        add_note(error, f"The other ranks did not receive this error: {_describe(in_vain)}")
        raise error


def _is_skip(error: BaseException) -> bool:
    return type(error).__name__ in ("Skipped", "SkipTest")


def _skip(text: str, cause: BaseException | None) -> NoReturn:
    """Skip on every rank like the first one, so that the test is skipped, not broken."""
    __tracebackhide__ = True
    if cause is not None:
        raise cause
    import pytest

    pytest.skip(text.partition(": ")[2])


def _describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= TEXT_LIMIT else f"...{text[-TEXT_LIMIT:]}"


def _list_problems(title: str, problems: list[str]) -> str:
    return "\n  ".join([f"{title}:", *(problem.replace("\n", "\n  ") for problem in problems)])
