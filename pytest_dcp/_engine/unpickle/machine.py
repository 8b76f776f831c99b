"""A small interpreter of pickle opcodes that calls only the functions its caller allows.

Enters: untrusted bytes, and a `Vocabulary`: the globals that a pickle may name, and their meanings.
Leaves: the object at STOP (bytes after it are not read), or `CheckpointCorruptError` for a
malformed pickle, `UntrustedPickleError` for a pickle that asks for too much, `UnknownGlobalError`
for a well-formed pickle outside the vocabulary.

A pickle is a program for a stack machine: opcodes push values, join them to containers, name
globals and call them. `interpreter` has the loop and the stack; the machine here keeps the state
that the opcodes share: the memo, the budget, and the hashes of keys in large containers. A program
can use only

- plain values and containers: numbers, text, bytes, None; list, dict, tuple, set, bytearray;
- a global that the vocabulary has: its meaning is a constant or a `Callee`. REDUCE and NEWOBJ on a
  callee call the vocabulary's own function, which checks the arguments and makes one of our values,
  or an instance of a class that the user has allowed;
- BUILD on an object whose type the vocabulary has an entry for;
- a persistent id (BINPERSID), if the vocabulary resolves it.

Everything else is an error, or, in metadata, an `UnreadObject`: it replaces the object by its
class's name, so that one unknown attribute does not make a whole checkpoint unreadable.

Budgets. A short pickle can ask for much: to copy one list again and again, or to hash keys that are
all equal. So `charge` takes units of work out of a budget of `_BUDGET_PER_BYTE` for each byte of
the input and `_BUDGET_BASE` besides. Picklers' own output stays below that; a bomb runs out of it.

Assumes nothing about the bytes. Guarantees that none of their code runs, that nothing is imported,
that time and memory are proportional to the input, and that the result equals that of
`pickle.load`, `UnreadObject`s aside.

>>> import pickle
>>> from pytest_dcp._engine.unpickle import read_value
>>> read_value(pickle.dumps({"step": 3, "betas": (0.9, 0.999)}))
{'step': 3, 'betas': (0.9, 0.999)}

>>> class Hostile:
...     def __reduce__(self):
...         return exec, ("import os; os.abort()",)
>>> read_value(pickle.dumps(Hostile()))
Traceback (most recent call last):
    ...
pytest_dcp._engine.unpickle.machine.UnknownGlobalError: class or function 'builtins.exec' is not
loaded by default (offset ...)

Rules inside, which together keep memory and time proportional to the input:

- No global is imported and no attribute looked up; a name is a key of the vocabulary's table.
- The memo is filled in order without gaps, as every pickler does, so no index makes it grow.
- Code that copies or walks an object that the memo can hand out again is charged for each element
  (`PickleMachine.charge`); the budget is a small multiple of the input's length.
- Dict keys and set members are hashed only once they are known to be flat and short, or strings;
  equal strings are one object; a large container takes few keys of one hash.
- Nothing recurses. Objects may be shared or contain themselves: `plain_values.check_plain` checks
  that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_dcp._engine.unpickle.unread_fields import UnreadObject
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

MAX_KEY_ITEMS = 64
"""Items of a tuple that is a dict key or a set member."""
MAX_EQUAL_HASHES = 32
"""Keys of one hash in a large container. Hashes of numbers are no secret, so a file can choose them
all equal, and n such keys cost n * n comparisons."""
_SMALL_CONTAINER = 64
"""With fewer keys than this, even equal hashes cost too little time to count."""
_BUDGET_PER_BYTE = 4
"""Units of work per byte of input. A pickler's own output needs at most 4: a set's member takes two
bytes or more and costs 8, a bytearray's byte is copied twice."""
_BUDGET_BASE = 4096
_SET_COST = 8
_MEMBER_COST = 4
_UNREAD_COST = 4
_FREE_KEY_BYTES = 64
MOST_LEARNT = 16
"""How many patterns of records a pickle may need: each one compiles a regular expression."""
_TEXT = frozenset({str})
_NESTED_KEYS = (tuple, frozenset)
_KEY_ATOMS = frozenset({str, int, float, bool, type(None), bytes})


class UnknownGlobalError(UntrustedPickleError):
    """A pickle names a class, a function or a use of one that this reader does not know.

    The bytes may still be sound: `torch.load(weights_only=True)` knows more than this reader.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Callee:
    """The meaning of an allowed class or function; never the real one, so that it is not called."""

    name: str
    call: Callable[[PickleMachine, tuple[Any, ...]], object] | None = None
    """REDUCE: the result for these arguments; it validates them and charges the machine."""
    new: Callable[[], object] | None = None
    """NEWOBJ without arguments: an instance without fields."""
    new_of: Callable[[PickleMachine, tuple[Any, ...]], object] | None = None
    """NEWOBJ with any arguments, of a class that the user has allowed."""
    takes_encoded_text: bool = False
    """Whether its argument may be an `EncodedText` instead of a str."""
    records: Callable[[PickleMachine, list[Any], int], int] | None = None
    """BINGET: reads whole records of opcodes that begin with it, at that position of the data, and
    pushes their results; returns the position after them, or the same position if it read none.
    """


LONG_TEXT_BYTES = 1 << 20
"""Text of at least this size that will become bytes is not decoded first, which saves a copy."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """Long text as it is stored, for the call that follows; nothing else accepts it."""

    utf8: memoryview


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The globals that a kind of pickle may name, and what they do."""

    globals: Mapping[tuple[str, str], object]
    """(module, name) to the meaning of the global: a `Callee` or a plain constant."""
    build: Mapping[type, Callable[[Any, object], None]]
    """BUILD by the object's type: sets the fields of the object from the state."""
    keys: frozenset[type] = frozenset()
    """Types of dict keys besides the plain ones; an instance without its fields raises
    AttributeError when hashed."""
    persistent: Callable[[object], object] | None = None
    """BINPERSID: the object for a persistent id."""
    nested_keys: bool = False
    """Whether keys may be tuples and frozensets of such keys."""
    keeps_unread: Callable[[str, str], bool] | None = None
    """Whether a class outside the table, by its module and name, becomes an `UnreadObject`; None:
    all such classes are refused."""


class PickleMachine:
    """One run over one pickle: its memo, its budget, and its record of large containers."""

    __slots__ = (
        *("data", "hashes", "memo", "patterns", "spare", "strings", "to_learn"),
        *("results_by_opcodes", "unread", "vocabulary"),
    )

    def __init__(self, data: bytes | memoryview, vocabulary: Vocabulary) -> None:
        self.data = data
        self.vocabulary = vocabulary
        self.memo: list[Any] = []
        self.spare = _BUDGET_PER_BYTE * len(data) + _BUDGET_BASE
        self.strings: dict[str, str] = {}
        self.hashes: dict[int, tuple[Collection[Any], dict[int, int]]] = {}
        """By id: a large container, which it keeps alive, and how many of its keys have each
        hash."""
        self.patterns: dict[object, re.Pattern[bytes]] = {}
        """The shape of records in this pickle, by their kind."""
        self.to_learn = MOST_LEARNT
        """How many more patterns there may be."""
        self.results_by_opcodes: dict[bytes, Any] = {}
        """By opcodes that make the same object anywhere, within records: their result."""
        self.unread: set[str] = set()
        """Names of the classes whose objects were not read."""

    def charge(self, units: int) -> None:
        """Takes `units` of work from the budget.

        Raises:
            UntrustedPickleError: the budget is spent.
        """
        self.spare -= units
        if self.spare < 0:
            raise UntrustedPickleError(
                "expected work in proportion to the pickle's length, got one that copies the same "
                "values again and again: do not load this file"
            )

    def keep_aside(self, class_name: str) -> UnreadObject:
        """Stand-in for an object of a class that the reader does not know."""
        self.charge(_UNREAD_COST)
        self.unread.add(class_name)
        return UnreadObject(class_name)

    def check_keys(self, target: Collection[Any], keys: list[Any]) -> None:
        """Check that `keys` may be hashed into `target` without harm."""
        if _TEXT.issuperset(map(type, keys)):
            return
        odd = [key for key in keys if type(key) is not str]
        for key in odd:
            self._check_key(key)
        try:
            hashes = [hash(key) for key in odd]
        except AttributeError:
            raise CheckpointCorruptError(
                "expected a whole object as a dict key, got one without its fields"
            ) from None
        if len(target) + len(keys) > _SMALL_CONTAINER:
            self._count_hashes(target, hashes)

    def _check_key(self, key: object) -> None:
        kind = type(key)
        if kind in self.vocabulary.keys:
            return
        if self.vocabulary.nested_keys and kind in _NESTED_KEYS:
            self._check_nested_key(key)
            return
        atoms = key if isinstance(key, tuple) else (key,)
        if len(atoms) > MAX_KEY_ITEMS:
            raise UntrustedPickleError(
                f"expected at most {MAX_KEY_ITEMS} items in a tuple that is a key, got {len(atoms)}"
            )
        for atom in atoms:
            if type(atom) not in _KEY_ATOMS and type(atom) is not UnreadObject:
                raise UnknownGlobalError(
                    "expected keys and set members of str, bytes, numbers, None and flat tuples of "
                    f"those, got {brief(atom)}{' in a tuple' if atoms is key else ''}"
                )
            if isinstance(atom, bytes) and len(atom) > _FREE_KEY_BYTES:
                self.charge(len(atom))
            elif isinstance(atom, int) and atom.bit_length() > 8 * _FREE_KEY_BYTES:
                self.charge(atom.bit_length() // 8)

    def _check_nested_key(self, key: object) -> None:
        """Apply `_check_key` to every part of nested tuples and frozensets."""
        rest, parts = [key], 0
        while rest:
            part = rest.pop()
            parts += 1
            if parts > MAX_KEY_ITEMS:
                raise UntrustedPickleError(
                    f"expected at most {MAX_KEY_ITEMS} items in a key, got more"
                )
            if type(part) in _NESTED_KEYS:
                rest.extend(part)  # type: ignore[arg-type]  # a tuple or frozenset
            else:
                self._check_key(part)

    def _count_hashes(self, target: Collection[Any], hashes: list[int]) -> None:
        # By id: the entry keeps the container alive, so its id cannot become another's meanwhile.
        _, counts = self.hashes.setdefault(id(target), (target, {}))
        for value in hashes:
            count = counts[value] = counts.get(value, 0) + 1
            if count > MAX_EQUAL_HASHES:
                raise UntrustedPickleError(
                    f"expected keys of different hashes, got over {MAX_EQUAL_HASHES} of one hash "
                    "in a container: such keys exhaust their reader, do not load this file"
                )


def brief(value: object) -> str:
    """A short text for an error message: never longer than a line, whatever the value."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, Callee):
        return f"{value.name} itself"
    if isinstance(value, UnreadObject):
        return f"{value.class_name[:160]}, which is not known here"
    return f"a {type(value).__name__}"


def make_set(machine: PickleMachine, kind: type[Any], items: list[Any]) -> Any:
    """A set or frozenset of a list that the pickle may use again: charges for every member."""
    machine.charge(_SET_COST + _MEMBER_COST * len(items))
    machine.check_keys(items, items)
    return kind(items)


def decoded_text(machine: PickleMachine, raw: bytes | memoryview) -> str:
    """The string, interned: comparing keys then never reads their characters."""
    try:
        text = str(raw, "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise CheckpointCorruptError(f"expected a string in UTF-8, got {error.reason}") from None
    return machine.strings.setdefault(text, text)
