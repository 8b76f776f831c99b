"""Joins the paths of the ranks' state dicts into the paths of one checkpoint. Pure (no I/O).

Each rank says where its values are (`planner_data`); the ranks need not hold the same keys. One
rank may have a value where another has a container: their flat names differ, so a load into the
ranks' own state dicts gives each its own back, but no single state dict can hold both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytest_dcp._engine.plan.containers import DESCRIPTION, DescribedPaths, paths_of_kind
from pytest_dcp._engine.plan.containers import merge_descriptions as merge_descriptions
from pytest_dcp._engine.plan.nested import Path
from pytest_dcp.errors import CheckpointMismatchError, PlanError
from pytest_dcp.rank_names import some_ranks_text

SHOWN = 20
RankPaths = Mapping[str, Path] | None
"""By flat name; the path of `DESCRIPTION` has one key, the text that describes a rank's
containers."""


def merge_paths(data: Sequence[RankPaths]) -> dict[str, Path]:
    """The ranks' paths in one dict; if ranks differ, the lowest rank counts.

    Raises PlanError, naming key and ranks, if a PerRank on one rank is something else on another.
    """
    merged: dict[str, Path] = {}
    for paths in data:
        if paths and paths != merged:
            for fqn, path in paths.items():
                merged.setdefault(fqn, path)
    if DESCRIPTION not in merged:
        return merged
    del merged[DESCRIPTION]
    texts = [_description(paths) for paths in data]
    _check_per_rank(data, texts)
    description = merge_descriptions([text for text in texts if text is not None])
    return merged if description is None else DescribedPaths(merged, description)


def _description(paths: RankPaths) -> str | None:
    found = paths.get(DESCRIPTION) if paths else None
    return None if found is None else str(found[0])


def _check_per_rank(data: Sequence[RankPaths], texts: Sequence[str | None]) -> None:
    """Raise PlanError for a key that holds a PerRank on some ranks and something else on others."""
    paths_of_text = {
        text: paths_of_kind(text, "PerRank") for text in set(texts) if text is not None
    }
    of_rank = [paths_of_text.get(text, frozenset()) if text else frozenset() for text in texts]
    problems = []
    for per_rank in dict.fromkeys(path for paths in paths_of_text.values() for path in paths):
        lacking = [rank for rank, paths in enumerate(of_rank) if per_rank not in paths]
        other = [rank for rank in lacking if _has_anything_at(data[rank], texts[rank], per_rank)]
        if other:
            own = [rank for rank, paths in enumerate(of_rank) if per_rank in paths]
            problems.append(
                f"{_name(per_rank)!r} is a PerRank on {some_ranks_text(own)}, and another value on "
                f"{some_ranks_text(other)}"
            )
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise PlanError(
            "\n".join(sorted(problems)[:SHOWN]) + more + "\nEvery rank that has the key must wrap "
            "its value in PerRank, or none"
        )


def _has_anything_at(paths: RankPaths, text: str | None, target: Path) -> bool:
    """Whether a rank has anything at the path: a value, or a container, which may be empty."""
    depth = len(target)
    if paths and any(path[:depth] == target for path in paths.values()):
        return True
    return text is not None and target in paths_of_kind(text)


def check_one_tree(paths: Mapping[str, Path]) -> None:
    """Raise CheckpointMismatchError, naming the keys, if a value lies on the path of another one.

    Considers only keys whose paths match their names: others come from a damaged checkpoint.
    """
    value_paths = {path for fqn, path in paths.items() if _name(path) == fqn}
    problems = []
    for path in value_paths:
        above = next(
            (path[:depth] for depth in range(1, len(path)) if path[:depth] in value_paths), None
        )
        if above is not None:
            problems.append(f"{_name(above)!r} is a value, and {_name(path)!r} is below it")
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointMismatchError(
            "no state dict can hold both of these, which different ranks saved:\n"
            + "\n".join(sorted(problems)[:SHOWN])
            + more
            + "\nLoad into a state dict that has one of them, or choose with keys="
        )


def _name(path: Path) -> str:
    return ".".join(map(str, path))
