"""Pure (no I/O): one class that is both an error of a step and the error that caused it.

`except CheckpointMismatchError` around a load must catch the load's exception, although that is the
error of a whole step. So for each class of causes the step's error has its own class: a subclass of
both. All ranks have the same causes, and so raise the same class.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

MEMBERS = (types.MemberDescriptorType, types.GetSetDescriptorType)
"""How classes written in C keep their attributes, `OSError.errno` for instance."""
HEAP_TYPE = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: made by a class statement."""
LEFT_OUT = (CheckpointException, StopIteration, StopAsyncIteration, SyntaxError)
"""Classes not to combine: nested step errors add nothing; the next two would end a generator or a
loop; for a SyntaxError tracebacks show a line of a file instead of the text.
"""


def shared_class(errors: Sequence[BaseException], current: type) -> type[Exception] | None:
    """The most derived common class of all errors; None if `current` is
    already a subclass of it.
    """
    if not errors:
        return None
    for cls in type(errors[0]).__mro__:
        if not issubclass(cls, Exception) or issubclass(current, cls) or issubclass(cls, LEFT_OUT):
            continue
        if all(isinstance(error, cls) for error in errors):
            return cls
    return None


_combined: dict[tuple[type, type], type[BaseException]] = {}


def combine_classes(base: type[BaseException], cause: type[Exception]) -> type[BaseException]:
    """A subclass of both, under the name of `base`; `base` itself if Python cannot combine them.

    `base` comes first, so its methods count. The same two give the same class.
    """
    if (base, cause) not in _combined:
        _combined[base, cause] = _combine(base, cause)
    return _combined[base, cause]


def _combine(base: type[BaseException], cause: type[Exception]) -> type[BaseException]:
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    try:
        combined = type(base.__name__, (base, cause), {**names, "made_for": cause})
        bare(combined)
    except Exception:  # noqa: BLE001 - a class of the user's may refuse in any way
        return base
    return combined


def bare(cls: type[BaseException]) -> Any:
    """An uninitialised instance. Runs no code of a class written in Python."""
    builtin: Any = next(one for one in cls.__mro__ if not one.__flags__ & HEAP_TYPE)
    return builtin.__new__(cls)


def facts_of(error: BaseException) -> Iterable[tuple[str, Any]]:
    """The attributes that an error has in addition to every exception's."""
    for cls in type(error).__mro__:
        if cls.__flags__ & HEAP_TYPE or cls in (Exception, BaseException, object):
            continue
        for name, member in vars(cls).items():
            if isinstance(member, MEMBERS) and name != "obj" and not name.startswith("_"):
                try:
                    yield name, getattr(error, name)
                except AttributeError:
                    continue
    yield from ((name, value) for name, value in vars(error).items() if not name.startswith("_"))
