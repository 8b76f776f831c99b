"""Names in the package: one class, one name; functions say what they do."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest_dcp

ROOT = Path(pytest_dcp.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
TWO_OF_TORCHS = {"FileSystem", "DefaultStager"}
"""torch has one in `filesystem` and `_fsspec_filesystem`, the other in both modules `staging`."""
IRREGULAR = frozenset(
    (
        "built", "chosen", "drawn", "found", "given", "gone", "grown", "heard", "held", "hidden",
        "kept", "known", "laid", "learnt", "left", "lent", "made", "met", "said", "seen", "shown",
        "taken", "told", "written",
    )
)  # fmt: skip
NO_PARTICIPLES = {
    "encoding",
    "listing",
    "meaning",
    "nothing",
    "padding",
    "recording",
    "sharding",
    "string",
}
"""Nouns that end so."""
NO_PARTICIPLES |= {"feed", "heed", "reseed"}
"""Verbs that end so."""
PUBLIC = {"recorded", "restored"}
"""Of `pytest_dcp.faults`, documented under these names."""
CODECS = {"mapping", "ordered", "converted", "pickled"}
"""Methods of the wire's encoder and decoder, named as the values that they are for."""
CAUSES = {"ended", "left", "unreached"}
"""Methods that make a `Cause` and are named after it."""
VAGUE = frozenset(
    (
        "asked", "ended", "given", "gone", "got", "heard", "held", "kept", "known", "left", "made",
        "met", "named", "said", "sent", "shown", "taken", "told", "wanted",
    )
)  # fmt: skip
"""Names of variables, arguments and attributes that do not say what they hold."""
NAMED_FOLDERS: tuple[str, ...] = ("",)
"""Folders, or modules, in which no variable has such a name: all of the package."""
ALLOWED_METHODS = {
    "wire.py": CODECS,
    "operation_context.py": CAUSES,
}


def is_participle(name: str) -> bool:
    """Whether the name is one word that ends as participles do: `packed`, `_told`, `watching`."""
    word = name.strip("_")
    if "_" in word or word in NO_PARTICIPLES:
        return False
    return word in IRREGULAR or re.fullmatch(r"[a-z]{2,}(ed|ing)", word) is not None


def test_no_two_test_modules_have_one_name() -> None:
    # Their folders are no packages: the second of a name would not be collected.
    paths = defaultdict(list)
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        paths[path.name].append(path)
    assert {name: found for name, found in paths.items() if len(found) > 1} == {}


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert twice.keys() == TWO_OF_TORCHS, twice


def test_functions_are_verbs_with_an_object_and_no_bare_participles() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and is_participle(node.name)
        if node.name not in PUBLIC
    ]
    assert found == []


def is_state_or_block(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a participle fits: a property is a state, and `with held():` reads as a sentence."""
    returned = ast.unparse(method.returns) if method.returns is not None else ""
    return re.search("ContextManager|nullcontext", returned) is not None or any(
        re.search("property|contextmanager|setter", ast.unparse(decorator))
        for decorator in method.decorator_list
    )


def test_methods_that_act_are_verbs() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{method.lineno}: {owner.name}.{method.name}"
        for path, tree in TREES.items()
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_participle(method.name) and not method.name.startswith("__")
        if method.name not in PUBLIC | ALLOWED_METHODS.get(path.name, set())
        if not is_state_or_block(method)
    ]
    assert found == []


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of each variable, argument, field and attribute that is set."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.MatchAs | ast.MatchStar | ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def test_no_variable_has_a_vague_name() -> None:
    folders = [ROOT / name for name in NAMED_FOLDERS]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in TREES.items()
        if any(folder in (path, *path.parents) for folder in folders)
        for line, name in bound_names(tree)
        if name.strip("_") in VAGUE
    ]
    assert found == []


def test_vague_variables_are_found_wherever_they_are_bound() -> None:
    text = """
class A:
    kept: int

def f(told, *, shown=1):
    self._held = [said for said in told]
    try:
        match told:
            case [*got]: pass
    except OSError as gone: pass
    return known(self.left)
"""
    names = [name for _, name in bound_names(ast.parse(text)) if name.strip("_") in VAGUE]
    assert sorted(names) == ["_held", "gone", "got", "kept", "said", "shown", "told"]


def test_participles_are_distinguished_from_other_words() -> None:
    assert [name for name in ("packed", "_told", "watching", "pack_names", "listing", "red", "ring")
            if is_participle(name)] == ["packed", "_told", "watching"]  # fmt: skip
