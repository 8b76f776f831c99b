"""Options for the file system of a URL: which are refused, and in what words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint import CheckpointManager

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


class VaultFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store that needs a token, and hands unknown options on to its client."""

    protocol = "vault"
    cachable = False

    def __init__(self, token: str, verify: str = "yes", **client: Any) -> None:
        super().__init__()
        if token != "right":
            raise PermissionError("a wrong token")
        if "broken" in client:
            raise KeyError("no such setting")
        self.verify = verify


register_implementation("vault", VaultFileSystem, clobber=True)
STATE = {"w": torch.ones(2)}


def save(url: Any, options: Any) -> object:
    return dcp.save(STATE, checkpoint_id=url, storage_options=options)


def async_save(url: Any, options: Any) -> object:
    return dcp.async_save(STATE, checkpoint_id=url, storage_options=options).result()


def load(url: Any, options: Any) -> object:
    return dcp.load({"w": torch.zeros(2)}, checkpoint_id=url, storage_options=options)


def load_without_template(url: Any, options: Any) -> object:
    return dcp.load_without_template(checkpoint_id=url, storage_options=options)


def open_once(url: Any, options: Any) -> object:
    with dcp.open(url, storage_options=options) as checkpoint:
        return checkpoint["w"].tensor()


def manage(url: Any, options: Any) -> object:
    return CheckpointManager(url, no_dist=True, storage_options=options)


VERBS = [save, async_save, load, load_without_template, open_once, manage]
Verb = Callable[[Any, Any], object]


def refusal(verb: Verb, url: Any, options: Any) -> str:
    """The text of a verb's error."""
    with pytest.raises((ValueError, TypeError)) as caught:
        verb(url, options)
    return str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_hands_the_options_to_the_file_system(verb: Verb) -> None:
    save("vault://run", {"token": "right", "verify": "no"})  # `verify` is also the readers' own
    verb("vault://run", {"token": "right", "verify": "no"})
    with pytest.raises(PermissionError, match="a wrong token"):
        verb("vault://run", {"token": "left"})


@pytest.mark.parametrize("verb", VERBS)
def test_options_of_a_local_path_are_refused(verb: Verb, tmp_path: Path) -> None:
    for path in (tmp_path / "c", str(tmp_path / "c"), f"file://{tmp_path}/c"):
        text = refusal(verb, path, {"anon": True})
        assert text == (
            f"storage_options are for URLs, and {str(path)!r} is on a local disk: leave out anon"
        )
    assert not list(tmp_path.iterdir())
    for nothing in (None, {}):
        save(tmp_path / "c", nothing)
        verb(tmp_path / "c", nothing)


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_refused_before_the_store_is_asked(verb: Verb) -> None:
    assert refusal(verb, "vault://run", {"tokens": "secret"}) == (
        "the file system of vault:// does not know the storage option 'tokens': did you mean token?"
    )
    text = refusal(verb, "memory://run", {"anon": "secret"})
    assert text.startswith(
        "the file system of memory:// does not know the storage option 'anon': it knows "
    )
    assert "secret" not in text


def test_an_option_that_nothing_resembles_goes_to_the_client_of_the_file_system() -> None:
    save("vault://run", {"token": "right", "region": "here"})


@pytest.mark.parametrize("options", [{}, {"token": "right", "broken": "secret"}])
def test_options_that_the_file_system_refuses_are_named(options: dict[str, Any]) -> None:
    text = refusal(open_once, "vault://run", options)
    assert text.startswith("the file system of 'vault://run' cannot be opened with the options ")
    assert ", ".join(options) in text
    assert "secret" not in text


@pytest.mark.parametrize("options", ["anon=True", [("anon", True)], {1: 2}])
def test_options_are_a_mapping_of_names(options: Any) -> None:
    text = refusal(save, "memory://run", options)
    assert text.startswith("storage_options takes a mapping of names, such as ")


def test_a_given_storage_has_its_own_options() -> None:
    options = {"token": "right"}
    writer = dcp.FsspecWriter("vault://run", **options)
    dcp.save(STATE, storage_writer=writer)
    reader = dcp.FsspecReader("vault://run", storage_options=options)
    dcp.load({"w": torch.zeros(2)}, storage_reader=reader)
    for call, storage in (
        (dcp.save, {"storage_writer": writer}),
        (dcp.load, {"storage_reader": reader}),
    ):
        with pytest.raises(ValueError, match="give them to it"):
            call(dict(STATE), storage_options=options, **storage)


def test_options_of_a_chain_are_named_by_its_protocols() -> None:
    save("vault://run", {"token": "right"})
    options = {"vault": {"token": "right"}}
    with dcp.open("simplecache::vault://run", storage_options=options) as checkpoint:
        assert checkpoint["w"].tensor().tolist() == [1, 1]


def test_a_manager_leaves_a_given_writer_its_own_options() -> None:
    options = {"token": "right"}
    manager = CheckpointManager("vault://steps", no_dist=True, storage_options=options)
    manager.save(1, STATE, storage_writer=dcp.FsspecWriter("vault://steps", **options))
    manager.save(2, STATE)
    assert [step.number for step in manager.steps()] == [1, 2]
