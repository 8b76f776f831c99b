"""JSON values -> values of the types that a message promises. Pure (no I/O).

Enters: a type annotation, once, and then any JSON values. Leaves: the value, with tuples where the
annotation has them, or a `ValueError` describing the value received. So code that handles a message
can trust the types of its fields, whichever process wrote them.

Knows the annotations that messages use: `str`, `int`, `float`, `bool`, `Any`, `Literal`, tuples,
`dict[str, X]`, `TypedDict` and optional ones.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

Read = Callable[[Any], Any]
SHOWN_CHARS = 60


def reader_for(annotation: Any) -> Read:
    """A function that returns its argument as a value of this type, or raises ValueError."""
    if annotation is Any:
        return lambda value: value
    if annotation is float:
        return _read_float
    if is_typeddict(annotation):
        return _typed_dict_reader(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _literal_reader(frozenset(args))
    if origin is tuple:
        return _list_reader(args[0]) if args[1:] == (...,) else _row_reader(args)
    if origin is dict:
        return _dict_reader(args[1])
    if origin is types.UnionType:
        return _optional_reader(*(one for one in args if one is not types.NoneType))
    if annotation in (str, int, bool):
        return _plain_reader(annotation)
    raise TypeError(f"no reader for the annotation {annotation!r}")


def _value_error(expected: str, value: Any) -> ValueError:
    return ValueError(f"expected {expected}, got {value!r:.{SHOWN_CHARS}}")


def _plain_reader(kind: type[Any]) -> Read:
    def read(value: Any) -> Any:
        if type(value) is not kind:  # a bool is no int
            raise _value_error(kind.__name__, value)
        return value

    return read


def _read_float(value: Any) -> Any:
    if type(value) not in (float, int) or value != value:
        raise _value_error("a number", value)
    return value


def _literal_reader(choices: frozenset[str]) -> Read:
    def read(value: Any) -> Any:
        if type(value) is not str or value not in choices:
            raise _value_error(f"one of {', '.join(sorted(choices))}", value)
        return value

    return read


def _list_reader(inner: Any) -> Read:
    read_one = reader_for(inner)

    def read(value: Any) -> Any:
        if type(value) is not list:
            raise _value_error("a list", value)
        return tuple([read_one(one) for one in value])

    return read


def _row_reader(inner: tuple[Any, ...]) -> Read:
    readers = [reader_for(one) for one in inner]

    def read(value: Any) -> Any:
        if type(value) is not list or len(value) != len(readers):
            raise _value_error(f"a list of {len(readers)}", value)
        return tuple([one(part) for one, part in zip(readers, value, strict=True)])

    return read


def _dict_reader(inner: Any) -> Read:
    read_one = reader_for(inner)

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _value_error("an object", value)
        return value if inner is Any else {key: read_one(one) for key, one in value.items()}

    return read


def _typed_dict_reader(kind: Any) -> Read:
    readers = {name: reader_for(inner) for name, inner in get_type_hints(kind).items()}

    def read(value: Any) -> Any:
        if type(value) is not dict or value.keys() != readers.keys():
            raise _value_error(f"an object of {', '.join(readers)}", value)
        return {name: readers[name](part) for name, part in value.items()}

    return read


def _optional_reader(inner: Any) -> Read:
    read_one = reader_for(inner)
    return lambda value: None if value is None else read_one(value)
