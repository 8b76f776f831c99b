"""The store at which a gloo world meets, called as C++ calls it: through a PrefixStore."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pytest_dcp._harness.rank.rendezvous_store import RendezvousStore

BRIEFLY = timedelta(milliseconds=20)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The file of the store."""
    return str(tmp_path / "store")


@pytest.fixture
def store(path: str) -> Any:
    """The store below a prefix, as a process group has it."""
    return dist.PrefixStore("group", RendezvousStore(path, 2))  # type: ignore[attr-defined]


def test_is_the_same_file_as_torchs(store: Any, path: str) -> None:
    """A program of the test may open it by itself."""
    store.set("key", "value")
    torchs: Any = dist.PrefixStore("group", dist.FileStore(path, 2))  # type: ignore[attr-defined]
    assert torchs.get("key") == b"value"
    torchs.set("answer", "other")
    assert store.get("answer") == b"other"


def test_get_and_wait_end_when_another_rank_sets_the_key(store: Any, path: str) -> None:
    """They look at the file again."""
    begun = threading.Event()

    def set_later() -> None:
        begun.wait(10)
        RendezvousStore(path, 2).set("group/late", "value")

    setter = threading.Thread(target=set_later)
    setter.start()
    begun.set()
    try:
        store.wait(["late"], timedelta(seconds=10))
        assert store.get("late") == b"value"
    finally:
        setter.join()


@pytest.mark.parametrize(
    "ask", [lambda store: store.get("missing"), lambda store: store.wait(["missing"])]
)
def test_a_key_that_never_comes_is_an_error_after_the_timeout(
    store: Any, ask: Callable[[Any], object]
) -> None:
    """The timeout is the one that was set through the prefix."""
    store.set_timeout(BRIEFLY)
    with pytest.raises(dist.DistStoreError, match="after 20 ms"):
        ask(store)


def test_every_other_call_reaches_the_file(store: Any) -> None:
    """C++ finds some methods by names of its own."""
    assert store.add("count", 2) == 2
    assert store.add("count", 3) == 5
    assert not store.check(["key"])
    store.set("key", "old")
    assert store.check(["key"])
    assert store.compare_set("key", "old", "new") == b"new"
    assert store.compare_set("key", "old", "newer") == b"new"
    before = store.num_keys()
    assert store.delete_key("key")
    assert store.num_keys() == before - 1
    assert store.clone().add("count", 1) == 6
