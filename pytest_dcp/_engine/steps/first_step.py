"""The first step of a run at which a condition holds.

Steps are examined one after the other, so the answer is right whatever happens in between: weights
that are NaN may have been reset, a norm may have a peak. With `monotone` half of the remaining
steps are passed over each time; that assumes a condition which, once it holds, holds ever after.

Little is read: the index of each step, and of the data only the tensors of these names. A tensor
whose checksums are those of the step before is frozen, and is otherwise not read again.

A step that cannot be examined is passed over and reported: no whole checkpoint, damaged data, or
no tensor of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from pytest_dcp._engine.lazy_reading.comparison import have_equal_elements
from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint
from pytest_dcp._engine.steps.numbered_folders import NumberedFolder
from pytest_dcp._engine.steps.tensor_conditions import TensorCondition
from pytest_dcp.errors import CheckpointError, UnknownNameError


@dataclass(frozen=True, slots=True)
class StepEvidence:
    """A tensor for which the condition holds."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class FirstStep:
    """The result of a search."""

    step: str | None
    """The folder; None: the condition holds at no step."""
    number: int | None
    before: str | None
    """The folder that was examined before it in the order of steps."""
    evidence: tuple[StepEvidence, ...]
    step_count: int
    examined: int
    skipped: tuple[tuple[str, str], ...]
    """Folders that could not be examined, and why."""
    bytes_read: int
    """Of data files."""


def find_first_step(
    steps: Sequence[NumberedFolder],
    name: str,
    condition: TensorCondition,
    *,
    monotone: bool = False,
    report: Callable[[str], None] = lambda step: None,
) -> FirstStep:
    """The first of these steps at which the condition holds for a tensor of this name.

    name: a flat name, or a pattern of `fnmatch`: the condition then holds at a step if it holds
        for any tensor that matches. monotone: search by halves, for nan and norm. report: called
        with the name of each folder before it is examined.

    Raises UnknownNameError if no step has such a tensor, ValueError for `monotone` with frozen.
    """
    if monotone and condition.kind == "frozen":
        raise ValueError(
            "a weight can be frozen and move again, so frozen is not searched by halves: leave out "
            "--monotone"
        )
    examination = _Examination(name, condition, report)
    search = _search_by_halves if monotone else _search_in_order
    found, before = search(list(steps), examination)
    if not examination.examined:
        raise examination.error_of_all()
    return FirstStep(
        step=None if found is None else found.name,
        number=None if found is None else found.number,
        before=None if before is None else before.name,
        evidence=() if found is None else examination.examined[found.name],
        step_count=len(steps),
        examined=len(examination.examined),
        skipped=tuple(examination.skipped.items()),
        bytes_read=examination.bytes_read,
    )


Found = tuple[NumberedFolder | None, NumberedFolder | None]
"""The first step at which the condition holds, and the step before it."""


def _search_in_order(steps: list[NumberedFolder], examination: _Examination) -> Found:
    before = None
    for step in steps:
        evidence = examination.examine(step, before)
        if evidence:
            return step, before
        if evidence is not None:
            before = step
    return None, before


def _search_by_halves(steps: list[NumberedFolder], examination: _Examination) -> Found:
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        evidence = examination.examine(steps[middle], None)
        if evidence is None:
            del steps[middle]
            high -= 1
        elif evidence:
            high = middle
        else:
            low = middle + 1
    return steps[low] if low < len(steps) else None, steps[low - 1] if low else None


@dataclass(slots=True)
class _Examination:
    """Opens steps, tests their tensors, and counts."""

    name: str
    condition: TensorCondition
    report: Callable[[str], None]
    examined: dict[str, tuple[StepEvidence, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)
    bytes_read: int = 0

    def examine(
        self, step: NumberedFolder, before: NumberedFolder | None
    ) -> tuple[StepEvidence, ...] | None:
        """The evidence, none if the condition does not hold; None for a step that is skipped.

        before: a step at which the condition does not hold, to compare with.
        """
        self.report(step.name)
        try:
            with ExitStack() as opened:
                checkpoint = opened.enter_context(step.open())
                earlier = None if before is None else opened.enter_context(before.open())
                try:
                    evidence = tuple(self._test_tensors(checkpoint, earlier))
                finally:
                    self.bytes_read += sum(one.bytes_read for one in (checkpoint, earlier) if one)
        except (CheckpointError, FileNotFoundError) as error:
            self.skipped[step.name] = str(error).splitlines()[0]
            self.errors.append(error)
            return None
        self.examined[step.name] = evidence
        return evidence

    def error_of_all(self) -> Exception:
        """The reason why no step could be examined."""
        unknown = [error for error in self.errors if isinstance(error, UnknownNameError)]
        return (unknown or self.errors)[-1]

    def _test_tensors(
        self, checkpoint: OpenCheckpoint, earlier: OpenCheckpoint | None
    ) -> Iterator[StepEvidence]:
        equal = set() if earlier is None else set(checkpoint.find_equal_names(earlier))
        for tensor in _choose_tensors(checkpoint, self.name):
            if self.condition.kind == "frozen":
                text = _find_frozen(tensor, earlier, equal)
            else:
                # Of the same bits, it does not hold here either.
                text = None if tensor.name in equal else self.condition.find_evidence(tensor)
            if text is not None:
                yield StepEvidence(tensor.name, text)


def _find_frozen(tensor: LazyTensor, earlier: OpenCheckpoint | None, equal: set[str]) -> str | None:
    before = earlier[tensor.name] if earlier is not None and tensor.name in earlier else None
    if not isinstance(before, LazyTensor) or not tensor.nbytes:
        return None
    if tensor.name in equal:
        return "as in the step before, by checksums"
    return "as in the step before, by reading" if have_equal_elements(tensor, before) else None


def _choose_tensors(checkpoint: OpenCheckpoint, name: str) -> list[LazyTensor]:
    """Raises UnknownNameError if no tensor has this name, or matches it."""
    names = [name] if name in checkpoint else checkpoint.glob(name)
    found = [lazy for one in names if isinstance(lazy := checkpoint[one], LazyTensor)]
    if not found and names:
        raise UnknownNameError(f"{checkpoint.where}: {name!r} is a value, and no tensor", name)
    if not found:
        checkpoint[name]  # raises, with the nearest names
    return found
