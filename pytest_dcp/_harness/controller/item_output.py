"""Output and logs of an item's ranks -> sections of its report.

Enters: the outcome of each phase, as it comes. Leaves: sections in the item, each text once, named
with its ranks. The report of a hang is about the ranks' stacks: there DEBUG lines of loggers, those
of earlier phases too, are counted, not shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import pytest

from pytest_dcp._harness.controller.options import ReportRanks
from pytest_dcp._harness.controller.report import merged_sections, shown_ranks
from pytest_dcp._harness.protocol.messages import Done, Phase
from pytest_dcp._harness.world.outcome import Outcome
from pytest_dcp._harness.world.world import World
from pytest_dcp._pytest_internals import report_sections
from pytest_dcp.rank_names import ranks_text

Section = tuple[str, str, str]
"""(phase, `stdout` or another stream, text)"""


class ItemOutput:
    """The captured output of one item while it runs."""

    def __init__(self, item: pytest.Item, size: int, which: ReportRanks) -> None:
        self._item = item
        self._size = size
        self._which = which
        self._noisy: list[Mapping[int, Done]] = []
        """Output of ranks in earlier phases in which they logged below INFO."""

    def absorb(self, world: World, outcome: Outcome, when: Phase, lost: Collection[int]) -> None:
        """Add a phase's output; the last output of `lost` ranks was shown before."""
        quiet = _is_hang(outcome)
        if quiet:
            self._quieten_earlier()
        ranks = shown_ranks(outcome, self._size, self._which)
        parts: list[tuple[int, str, str, str]] = []
        for rank in sorted(ranks):
            if (result := outcome.results.get(rank)) is not None:
                parts += [(rank, *part) for part in _sections(result, quiet=quiet)]
            elif not world.is_over and rank not in lost:
                parts += [(rank, when, *part) for part in world.output(rank)]
        for part in merged_sections(parts):
            self._item.add_report_section(*part)
        if not quiet and any(result.debug_records for result in outcome.results.values()):
            self._noisy.append(
                {rank: outcome.results[rank] for rank in ranks & outcome.results.keys()}
            )

    def _quieten_earlier(self) -> None:
        sections = report_sections(self._item)
        for results in self._noisy:
            loud = merged_sections(_log_sections(results, quiet=False))
            at = min((sections.index(part) for part in loud if part in sections), default=0)
            sections[:] = [part for part in sections if part not in loud]
            sections[at:at] = merged_sections(_log_sections(results, quiet=True))
        self._noisy.clear()


def _is_hang(outcome: Outcome) -> bool:
    return outcome.first is not None and outcome.first.failure.kind in ("timeout", "blocked")


def _sections(result: Done, *, quiet: bool) -> Iterable[Section]:
    """A rank's sections of a phase."""
    if not (quiet and result.debug_records):
        return result.sections
    left_out = (
        f"[... {result.debug_records} DEBUG lines left out: --log-level=DEBUG shows them ...]"
    )
    text = "\n".join(filter(None, [result.log_without_debug, left_out]))
    return [
        (when, name, text if (when, name) == (result.phase, "log") else content)
        for when, name, content in result.sections
    ]


def _log_sections(
    results: Mapping[int, Done], *, quiet: bool
) -> Iterable[tuple[int, str, str, str]]:
    for rank, result in sorted(results.items()):
        for when, name, text in _sections(result, quiet=quiet):
            if name == "log":
                yield rank, when, name, text


def merged_properties(outcome: Outcome) -> list[tuple[str, object]]:
    """user_properties of all ranks: equal ones once, others with the rank's name."""
    by_property: dict[tuple[str, str], tuple[object, list[int]]] = {}
    for rank, result in sorted(outcome.results.items()):
        for name, value in result.properties:
            by_property.setdefault((name, repr(value)), (value, []))[1].append(rank)
    size = len(outcome.results)
    return [
        (name if len(ranks) == size else f"{name} [{ranks_text(ranks)}]", value)
        for (name, _), (value, ranks) in by_property.items()
    ]
