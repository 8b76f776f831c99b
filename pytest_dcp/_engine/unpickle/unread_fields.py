"""Placeholders for objects of classes that this reader does not know. Pure (no I/O).

Frameworks put their own data into a checkpoint's metadata. An `UnreadObject` replaces each object
of an unknown class: it has only the class's name, so no code runs, nothing is imported, and the
rest of the metadata can be used.

Functions and classes of Python's library, torch and numpy, which an attack could call, are still
refused, except harmless ones that frameworks have in their data.
"""

from __future__ import annotations

import sys
from typing import NoReturn

_EXECUTES = frozenset({*sys.stdlib_module_names, "torch", "numpy"}) - {"__main__"}
"""Packages, by their first name, whose objects are refused unless they are listed as harmless."""
_OF_PYTHON_2 = frozenset({"__builtin__", "copy_reg", "cPickle", "commands", "os2", "popen2"})
_HARMLESS_MODULES = ("collections", "datetime", "decimal", "enum", "fractions", "uuid", "zoneinfo")
_HARMLESS = frozenset(
    {
        *(("argparse", "Namespace"), ("types", "SimpleNamespace")),
        *(("copyreg", "_reconstructor"), ("numpy", "dtype"), ("numpy", "ndarray")),
        *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        ("numpy._core.numeric", "_frombuffer"),
    }
)
_HARMLESS_OF_TORCH = "torch.distributed."
"""The modules of metadata, plans, placements and meshes, also those of a later torch. A dotted name
is refused: it may reach something that such a module imports, for example `os.mkdir`.
"""


class UnreadObject:
    """Represents an object that was not read."""

    __slots__ = ("class_name",)

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        """With its module, as the file has it."""

    def __repr__(self) -> str:
        return f"<{self.class_name}, not read>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"an object of {self.class_name} was not read from the checkpoint's metadata, since "
            "its class is not known here, and cannot be written again: remove it first"
        )


def may_stay_unread(module: str, name: str) -> bool:
    """Whether a checkpoint may name this class or function without being refused.

    A name that no Python code could define is damage.
    """
    if not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
        return False
    package = module.partition(".")[0]
    if package in _OF_PYTHON_2:
        return False
    if package not in _EXECUTES:
        return True
    return (
        module in _HARMLESS_MODULES
        or (module, name) in _HARMLESS
        or (module.startswith(_HARMLESS_OF_TORCH) and "." not in name)
    )
