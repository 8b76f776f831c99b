"""Hostile folders: each is refused as a bad checkpoint, in bounded time and memory."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_dcp.faults import Hostile, hostile_folders, memory_bombs
from support.forks import forked, limited
from support.loads import ending, load, load_all, save

WAIT_S = 60
"""A load that takes so long hangs, however busy the machine is."""


@pytest.fixture(scope="module", params=["ours", "torch"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("good") / "checkpoint", request.param)


def endings(
    cases: list[Hostile], folder: Path, loads: list[Callable[[Path], None]]
) -> dict[str, str]:
    """How the loads of each case end that is not refused, in a fork with little memory."""

    def body(begin: Callable[[str], None]) -> dict[str, str]:
        found = {}
        for number, case in enumerate(cases):
            made = case.make(folder / str(number))
            for one in loads:
                begin(case.name)
                with limited(WAIT_S, signal.ITIMER_REAL):
                    found[f"{case}: {one.__doc__}"] = ending(one, made)
        return {name: how for name, how in found.items() if how != "refused"}

    answer: dict[str, str] = forked(body, 512 << 20)
    return answer


def test_every_hostile_folder_is_refused(good: Path, tmp_path: Path) -> None:
    cases = list(hostile_folders(good))
    print(f"{len(cases)} hostile folders")
    assert len(cases) >= 70
    unlike = endings(cases, tmp_path, [load, load_all])
    # Where the lie is about the size, the template says so first.
    assert {name for name, how in unlike.items() if how != "another shape"} == set(), unlike
    assert not any(str(load_all.__doc__) in name for name in unlike)


def test_every_memory_bomb_is_refused(good: Path, tmp_path: Path) -> None:
    cases = [case for case in memory_bombs(good) if "rank 0" not in case.name]
    assert endings(cases, tmp_path, [load]) == {}


def test_no_two_have_one_name(good: Path) -> None:
    names = [case.name for case in hostile_folders(good)]
    assert len(set(names)) == len(names)


def test_each_is_a_value_that_can_be_sent(good: Path, tmp_path: Path) -> None:
    for number, case in enumerate(hostile_folders(good)):
        assert pickle.loads(pickle.dumps(case)) == case
        made = case.make(tmp_path / str(number))
        with pytest.raises(FileExistsError):
            case.make(made)


def test_the_good_folder_stays_as_it_is(good: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    for number, case in enumerate(hostile_folders(good)):
        case.make(tmp_path / str(number))
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path: Path) -> None:
    import pytest_dcp.checkpoint as dcp

    with pytest.warns(UserWarning, match="disabled"):
        dcp.save({"v": 1}, checkpoint_id=tmp_path / "v")
    with pytest.raises(ValueError, match="a tensor"):
        list(hostile_folders(tmp_path / "v"))
