"""Options for the file system of a URL, checked before anything is asked of it.

fsspec and many of its file systems ignore an option that they do not know, so a misspelt
`endpoint_url` would send a save to another store.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

LIKE = 0.8
"""From this likeness on (difflib's ratio) an unknown option is a known one misspelt."""
ON_LOCAL_DISK = ("file", "local")
IGNORE_OTHERS = ("fsspec.spec", "fsspec.asyn", "fsspec.implementations.memory")
"""Modules whose constructors accept any option and use only options that they name or document."""
FURTHER_NAMES = ("skip_instance_cache", "use_listings_cache", "listings_expiry_time", "max_paths")
"""Of any file system, though no constructor names them."""


def check_storage_options(
    options: Mapping[str, Any] | None, path: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """The options for the file system of this path, checked; an empty dict for None.

    A file system may pass options on to a client of its own. So a name that no constructor
    mentions is refused if it resembles one that is mentioned, or if nothing could use it.

    Raises TypeError for anything else than a mapping of names, ValueError for options of a local
    path, or if the file system does not know one. No text has an option's value: it may be
    a secret.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(
            'storage_options takes a mapping of names, such as {"anon": True}, got '
            f"{type(options).__name__}"
        )
    if options and path is not None:
        _check_names(list(options), path)
    return dict(options)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, by its form."""
    return not isinstance(path, PurePath) and "://" in os.fspath(path)


def _check_names(names: list[str], path: str | os.PathLike[str]) -> None:
    from fsspec.core import split_protocol

    url = os.fspath(path)
    protocol = split_protocol(url)[0]
    if not is_url(path) or protocol in ON_LOCAL_DISK:
        raise ValueError(
            f"storage_options are for URLs, and {url!r} is on a local disk: leave out "
            f"{', '.join(names)}"
        )
    if "::" in url:
        return  # Options of a chain are named by its protocols.
    own_names, takes_others = _constructor_names(protocol)
    for name in names:
        if name in own_names:
            continue
        near = get_close_matches(name, own_names, 1, LIKE)
        if near or not takes_others:
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(own_names)}"
            raise ValueError(
                f"the file system of {protocol}:// does not know the storage option {name!r}: "
                f"{hint}"
            )


def _constructor_names(protocol: str | None) -> tuple[list[str], bool]:
    """The options that the constructors of a protocol's class name, and whether others may be used.

    Of an unknown protocol, or one whose package is missing, nothing is known: opening it says so.
    """
    from fsspec import get_filesystem_class

    try:
        kind = get_filesystem_class(protocol)
    except (ImportError, ValueError):
        return [], True
    names = set(FURTHER_NAMES)
    takes_others = False
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        for parameter in list(inspect.signature(base.__init__).parameters.values())[1:]:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                names.add(parameter.name)
            elif parameter.kind is parameter.VAR_KEYWORD:
                takes_others |= base.__module__ not in IGNORE_OTHERS
    return sorted(names), takes_others
