"""Crash states of small traces, against states written out by hand.

Each model's states are listed as they follow from its documentation, not from the code: a folder
that a crash may leave and the list lacks, or the reverse, is a failure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from pytest_dcp.faults.crashes.crash_points import CrashPoint, TornWriteAt
from pytest_dcp.faults.crashes.disk_changes import torn_at
from pytest_dcp.faults.crashes.enumerate import Crash, crashes
from pytest_dcp.faults.crashes.losses import LostSet
from pytest_dcp.faults.crashes.trace import Trace, Tree, TreeLink
from pytest_dcp.faults.tap.operation import Operation


def op(kind: Any, path: str, **facts: Any) -> Operation:
    return Operation(kind, path, **facts)


def writes(path: str, *parts: bytes, handle: int = 1, offset: int = 0) -> list[Operation]:
    found = []
    for part in parts:
        found.append(op("write", path, data=part, nbytes=len(part), offset=offset, handle=handle))
        offset += len(part)
    return found


def one_after_another(operations: Iterable[Operation], base: Tree | None = None) -> Trace:
    """A trace of one thread, whose block had ended after the last operation."""
    timed = [
        Operation(**{**_facts(one), "started_ns": 10 * n, "ended_ns": 10 * n + 5})
        for n, one in enumerate(operations, 1)
    ]
    return Trace.of([base or {}], timed, {0: 10 * len(timed) + 10})


def _facts(operation: Operation) -> dict[str, Any]:
    return {name: getattr(operation, name) for name in Operation.__slots__}


def folders(found: Iterable[Crash]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(crash.tree.items()) for crash in found}


def these(*trees: Tree) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(tree.items()) for tree in trees}


CREATE = [
    op("create", "f", handle=1), *writes("f", b"ab"), op("sync", "f", handle=1),
    op("close", "f", handle=1),
]  # fmt: skip
COMMIT = [
    op("create", "t", handle=1), *writes("t", b"new"), op("close", "t", handle=1),
    op("rename", "t", to="f"),
]  # fmt: skip
"""Over an old f, and nothing synced."""


def test_a_kill_leaves_every_prefix_and_torn_writes() -> None:
    trace = one_after_another(CREATE)
    found = list(crashes(trace, "kill"))
    assert folders(found) == these({}, {"f": b""}, {"f": b"a"}, {"f": b"ab"})


def test_posix_loses_a_name_whose_folder_was_not_synced() -> None:
    found = folders(crashes(one_after_another(CREATE), "posix"))
    assert found == these({}, {"f": b""}, {"f": b"a"}, {"f": b"ab"}, {"f": b"\0\0"})


def test_after_both_syncs_nothing_can_be_lost() -> None:
    steps = [*CREATE, op("open", ".", handle=2), op("sync_folder", ".", handle=2)]
    found = [crash for crash in crashes(one_after_another(steps), "posix") if crash.returned]
    assert folders(found) == these({"f": b"ab"})


def test_posix_tears_a_rename_and_the_renamed_file() -> None:
    trace = one_after_another(COMMIT, {"f": b"old"})
    ended = [crash for crash in crashes(trace, "posix") if crash.returned]
    contents = (b"", b"\0\0\0", b"new")
    assert folders(ended) == these(
        {"f": b"old"},  # all lost, or only the new name of it
        *({"f": new} for new in contents),
        *({"f": b"old", "t": new} for new in contents),  # neither name of the rename arrived
        *({"f": new, "t": new} for new in contents),  # only the new one did
    )


def test_ext4_renames_over_a_file_with_the_bytes_or_not_at_all() -> None:
    trace = one_after_another(COMMIT, {"f": b"old"})
    ended = [crash for crash in crashes(trace, "ext4-ordered") if crash.returned]
    assert folders(ended) == these(
        {"f": b"new"}, {"f": b"old"}, {"f": b"old", "t": b""}, {"f": b"old", "t": b"new"}
    )


def test_ext4_does_not_promise_that_for_a_rename_to_a_new_name() -> None:
    ended = [
        crash for crash in crashes(one_after_another(COMMIT), "ext4-ordered") if crash.returned
    ]
    assert folders(ended) == these({}, {"t": b""}, {"t": b"new"}, {"f": b""}, {"f": b"new"})


def test_ext4_commits_all_names_before_an_fsync_of_any_file() -> None:
    steps = [op("make_folder", "d"), *CREATE, op("remove", "g")]
    trace = one_after_another(steps, {"g": b"x"})
    ended = [crash for crash in crashes(trace, "ext4-ordered") if crash.returned]
    assert folders(ended) == these({"d": None, "f": b"ab"}, {"d": None, "f": b"ab", "g": b"x"})


def test_ext4_loses_names_only_from_the_end() -> None:
    steps = [op("make_folder", name) for name in "abc"]
    found = folders(crashes(one_after_another(steps), "ext4-ordered"))
    assert found == these({}, {"a": None}, {"a": None, "b": None}, dict.fromkeys("abc"))
    anything = folders(crashes(one_after_another(steps), "posix"))
    assert len(anything) == 8
    assert these({"c": None}) < anything


def test_allocated_space_is_zeros_until_the_bytes_arrive() -> None:
    steps = [
        op("create", "f", handle=1), op("allocate", "f", offset=0, nbytes=4, handle=1),
        *writes("f", b"ab"), op("truncate", "f", nbytes=2, handle=1),
    ]  # fmt: skip
    found = folders(crashes(one_after_another(steps), "ext4-ordered"))
    assert these({"f": b"\0\0\0\0"}, {"f": b"ab\0\0"}, {"f": b"ab"}, {"f": b"\0\0"}) < found


def test_nfs_keeps_names_and_closed_files() -> None:
    steps = [op("create", "f", handle=1), *writes("f", b"ab", b"cd"), op("close", "f", handle=1)]
    found = list(crashes(one_after_another(steps), "nfs"))
    assert folders(crash for crash in found if crash.returned) == these({"f": b"abcd"})
    assert folders(found) >= these(
        {}, {"f": b""}, {"f": b"\0\0\0\0"}, {"f": b"ab"}, {"f": b"\0\0cd"}, {"f": b"ab\0\0"}
    )


def test_an_object_is_there_when_its_file_is_closed_and_a_rename_is_a_copy() -> None:
    found = folders(crashes(one_after_another(COMMIT, {"f": b"old"}), "s3"))
    assert found == these(
        {"f": b"old"}, {"f": b"old", "t": b"new"}, {"f": b"new", "t": b"new"}, {"f": b"new"}
    )


def test_an_object_is_replaced_as_a_whole() -> None:
    steps = [
        op("open", "f", handle=1), *writes("f", b"X", offset=1), op("close", "f", handle=1),
        op("make_folder", "d"), op("create", "d/g", handle=2), op("close", "d/g", handle=2),
        op("remove", "f"), op("rename", "d", to="e"),
    ]  # fmt: skip
    found = folders(crashes(one_after_another(steps, {"f": b"old"}), "s3"))
    assert these({"f": b"old"}, {"f": b"oXd"}, {"e": None, "e/g": b""}) < found
    assert not these({"f": b"oXd", "d": None, "d/g": b"x"}) & found


def test_a_file_that_is_emptied_may_come_back() -> None:
    steps = [op("create", "f", handle=1), *writes("f", b"n")]
    found = folders(crashes(one_after_another(steps, {"f": b"old"}), "posix"))
    assert found == these({"f": b"old"}, {"f": b""}, {"f": b"n"}, {"f": b"nld"}, {"f": b"\0"})


def test_a_sync_covers_earlier_operations_and_no_later_ones() -> None:
    steps = [
        op("create", "f", handle=1), *writes("f", b"a"), op("sync", "f", handle=1),
        *writes("f", b"b", offset=1), op("open", ".", handle=2), op("sync_folder", ".", handle=2),
    ]  # fmt: skip
    ended = [crash for crash in crashes(one_after_another(steps), "posix") if crash.returned]
    assert folders(ended) == these({"f": b"ab"}, {"f": b"a"}, {"f": b"a\0"})


def test_syncing_another_folder_saves_no_name() -> None:
    steps = [
        op("make_folder", "d"), op("open", ".", handle=1), op("sync_folder", ".", handle=1),
        op("create", "d/f", handle=2), op("open", ".", handle=3),
        op("sync_folder", ".", handle=3),
    ]  # fmt: skip
    ended = [crash for crash in crashes(one_after_another(steps), "posix") if crash.returned]
    assert folders(ended) == these({"d": None}, {"d": None, "d/f": b""})


def test_a_descriptor_finds_its_file_under_any_name() -> None:
    steps = [
        op("create", "a", handle=1), op("rename", "a", to="b"), *writes("a", b"x"),
        op("create", "a", handle=2), *writes("a", b"y", handle=2),
        op("link", "b", to="c"), op("link", "s", to="s", data=b"c"),
    ]  # fmt: skip
    *_, last = crashes(one_after_another(steps), "kill")
    assert last.tree == {"a": b"y", "b": b"x", "c": b"x", "s": TreeLink("c")}


def test_folders_move_with_their_files() -> None:
    steps = [op("rename", "d", to="e"), op("create", "e/g", handle=1)]
    *_, last = crashes(one_after_another(steps, {"d": None, "d/f": b"x"}), "kill")
    assert last.tree == {"e": None, "e/f": b"x", "e/g": b""}


def test_files_come_from_outside_and_leave() -> None:
    steps = [op("rename", "/x/f", to="f", data=b"in"), op("rename", "g", to="/x/g")]
    found = folders(crashes(one_after_another(steps, {"g": b"out"}), "posix"))
    assert these({"g": b"out"}, {"g": b"out", "f": b"in"}, {"f": b"in"}, {"f": b""}) < found


def test_several_roots_are_folders_of_one_tree() -> None:
    timed = [
        Operation("create", "f", root=1, handle=1, started_ns=1, ended_ns=2),
        Operation("make_folder", "d", root=0, started_ns=3, ended_ns=4),
    ]
    trace = Trace.of([{"x": b""}, {}], timed, {})
    *_, last = crashes(trace, "kill")
    assert last.tree == {"0": None, "1": None, "0/x": b"", "0/d": None, "1/f": b""}


# ---- ranks and threads


def beside(*spans: tuple[int, int, int, str]) -> Trace:
    """Folders made, each by (rank, start, end, name)."""
    return Trace.of(
        [{}],
        [
            Operation("make_folder", name, rank=rank, started_ns=start, ended_ns=end)
            for rank, start, end, name in spans
        ],
        {},
    )


def test_operations_that_overlap_are_done_in_any_order() -> None:
    trace = beside((0, 0, 10, "a"), (1, 5, 15, "b"))
    assert folders(crashes(trace, "kill")) == these(
        {}, {"a": None}, {"b": None}, {"a": None, "b": None}
    )


def test_operations_one_after_the_other_are_not() -> None:
    trace = beside((0, 0, 4, "a"), (1, 5, 15, "b"))
    assert folders(crashes(trace, "kill")) == these({}, {"a": None}, {"a": None, "b": None})


def test_a_long_operation_lies_beside_many_short_ones() -> None:
    trace = beside((0, 0, 100, "a"), (1, 10, 20, "b"), (1, 30, 40, "c"))
    assert folders(crashes(trace, "kill")) == {
        frozenset(dict.fromkeys(names).items()) for names in ("", "a", "b", "ab", "bc", "abc")
    }


def test_of_two_renames_to_one_name_at_once_either_wins() -> None:
    trace = Trace.of(
        [{"a": b"A", "b": b"B"}],
        [
            Operation("rename", "a", to="f", rank=0, started_ns=0, ended_ns=10),
            Operation("rename", "b", to="f", rank=1, started_ns=5, ended_ns=15),
        ],
        {0: 20, 1: 20},
    )
    found = folders(crashes(trace, "kill"))
    assert these({"f": b"A"}, {"f": b"B"}, {"f": b"A", "b": b"B"}, {"f": b"B", "a": b"A"}) < found


def test_a_sync_promises_nothing_for_operations_that_overlap_it() -> None:
    def lost(start: int) -> bool:
        trace = Trace.of(
            [{}],
            [
                Operation("make_folder", "a", rank=0, started_ns=start, ended_ns=start + 10),
                Operation("sync_folder", ".", rank=1, started_ns=20, ended_ns=50),
            ],
            {0: 60, 1: 60},
        )
        return any(crash.returned and not crash.tree for crash in crashes(trace, "posix"))

    assert [lost(start) for start in (0, 15, 25, 55)] == [False, True, True, True]


def test_a_name_is_not_used_before_it_is_made() -> None:
    """Rank 1 makes a file while rank 0's making of its folder has not returned."""
    trace = Trace.of(
        [{}],
        [
            Operation("make_folder", "d", rank=0, started_ns=0, ended_ns=10),
            Operation("create", "d/f", rank=1, handle=1, started_ns=5, ended_ns=9),
        ],
        {},
    )
    assert folders(crashes(trace, "kill")) == these({}, {"d": None}, {"d": None, "d/f": b""})


def test_which_ranks_had_returned() -> None:
    trace = Trace.of(
        [{}],
        [
            Operation("make_folder", "a", rank=0, started_ns=0, ended_ns=10),
            Operation("make_folder", "b", rank=0, started_ns=30, ended_ns=40),
        ],
        {0: 50, 1: 20},
    )
    found = [(sorted(crash.tree), sorted(crash.returned)) for crash in crashes(trace, "kill")]
    assert found == [([], []), (["a"], []), (["a"], [1]), (["a", "b"], [1]), (["a", "b"], [0, 1])]


def test_a_crash_where_one_rank_returned_while_another_still_works() -> None:
    """Rank 1 returns while rank 0 renames, and no operation begins afterwards."""
    trace = Trace.of(
        [{"new": b""}],
        [Operation("rename", "new", to="metadata", rank=0, started_ns=0, ended_ns=20)],
        {0: 30, 1: 10},
    )
    found = [(sorted(crash.tree), sorted(crash.returned)) for crash in crashes(trace, "kill")]
    assert found == [
        (["new"], []),
        (["metadata"], []),
        (["new"], [1]),
        (["metadata"], [1]),
        (["metadata"], [0, 1]),
    ]


def test_many_operations_at_once_stay_bounded() -> None:
    trace = beside(*((n, n, 100 + n, f"d{n}") for n in range(16)))
    found = folders(crashes(trace, "kill"))
    assert these({}, dict.fromkeys(f"d{n}" for n in range(16)), {"d3": None}) < found
    assert len(found) < 16 * 40


# ---- budget, order, ids


def a_trace() -> Trace:
    steps = []
    for n in range(6):
        steps += [
            op("create", f"f{n}", handle=n + 1), *writes(f"f{n}", b"ab" * n, b"cd", handle=n + 1),
        ]  # fmt: skip
    return one_after_another(steps)


@pytest.mark.parametrize("model", ["kill", "posix", "ext4-ordered", "nfs"])
def test_a_budget_takes_crashes_from_the_whole_trace(model: Any) -> None:
    few = list(crashes(a_trace(), model, budget=12))
    assert len(few) == 12
    assert folders(few) < folders(crashes(a_trace(), model, budget=2000))
    counts = [crash.operation_count for crash in few]
    assert max(counts) > 12
    assert counts == sorted(counts)


def test_no_folder_comes_twice_and_the_simplest_come_first() -> None:
    found = list(crashes(a_trace(), "posix"))
    keys = [(crash.returned, frozenset(crash.tree.items())) for crash in found]
    assert len(keys) == len(set(keys)) > 1000
    losses = [crash.what.count(" lost: ") + crash.what.count(" zeros: ") for crash in found]
    assert losses[0] == 0
    assert sum(losses[:100]) < sum(losses[-100:])


@pytest.mark.parametrize("model", ["kill", "posix", "ext4-ordered", "nfs", "s3"])
def test_an_id_brings_the_same_crash_back_beyond_any_budget(model: Any) -> None:
    found = list(crashes(a_trace(), model))
    assert len({crash.id for crash in found}) == len(found)
    for crash in (found[0], found[len(found) // 2], found[-1]):
        (again,) = crashes(a_trace(), model, budget=1, only=crash.id)
        assert again == crash
    assert list(crashes(a_trace(), model, only="posix-0")) == []


def test_ids_stay_the_same_from_version_to_version() -> None:
    """Change them only with a reason: people replay ids that an older log shows."""
    steps = [op("create", "t"), *writes("t", b"new", handle=0), op("rename", "t", to="f")]
    (lost,) = crashes(one_after_another(steps), "posix", only="posix-32adbee2f0")
    assert lost.returned == {0}
    assert lost.what.count("lost") == lost.what.count("its bytes lost: write t") == 1
    (torn,) = crashes(one_after_another(steps), "kill", only="kill-f5e3adb3d1")
    assert "1 bytes done of: write t" in torn.what


def test_ids_do_not_depend_on_names_of_classes_files_or_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ids(file: str, data: bytes) -> list[str]:
        steps = [op("create", file, handle=1), *writes(file, data), op("rename", file, to="f")]
        return [crash.id for crash in crashes(one_after_another(steps), "posix")]

    before = ids("t-1a2b", b"old")
    for cls in (LostSet, TornWriteAt, CrashPoint):
        monkeypatch.setattr(cls, "__repr__", lambda _: "renamed")
    assert ids("t-3c4d", b"new") == before
    assert len(set(before)) == len(before) > 5


@pytest.mark.parametrize(
    "other",
    [
        [op("create", "t"), op("write", "t", offset=0, data=b"new", nbytes=3)],
        [op("create", "u"), op("write", "t", offset=1, data=b"new", nbytes=3)],
        [op("create", "t"), op("write", "t", offset=1, data=b"new", nbytes=3, rank=1)],
        [op("create", "t"), op("truncate", "t", nbytes=3)],
    ],
    ids=["offset", "file", "rank", "kind"],
)
def test_an_id_finds_no_crash_of_other_operations(other: list[Operation]) -> None:
    steps = [op("create", "t"), op("write", "t", offset=1, data=b"new", nbytes=3)]
    (whole,) = [one for one in crashes(one_after_another(steps), "kill") if one.returned]
    base = {"t": b""}
    assert list(crashes(one_after_another(steps, base), "kill", only=whole.id))
    assert list(crashes(one_after_another(other, base), "kill", only=whole.id)) == []


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="kill, posix, ext4-ordered, nfs, s3; got 'zfs'"):
        list(crashes(a_trace(), "zfs"))  # type: ignore[arg-type]  # under test


def test_the_events_are_reported() -> None:
    trace = one_after_another(CREATE)
    told = [crash.what for crash in crashes(trace, "posix")]
    assert any("its bytes zeros: write f [0, 2)" in what for what in told)
    assert any("1 bytes done of: write f [0, 2)" in what for what in told)
    assert any("after 4 of 4 operations; the last: close f" in what for what in told)


@pytest.mark.parametrize(
    ("offset", "nbytes", "places"),
    [
        (0, 0, ()),
        (0, 1, ()),
        (0, 2, (1,)),
        (0, 600, (1, 300, 512, 599)),
        (500, 100, (1, 12, 50, 99)),
        (0, 5000, (1, 512, 1024, 1536, 2500, 3584, 4096, 4608, 4999)),
    ],
)
def test_a_write_is_torn_at_its_ends_its_middle_and_borders_of_sectors(
    offset: int, nbytes: int, places: tuple[int, ...]
) -> None:
    assert torn_at(offset, nbytes) == places
