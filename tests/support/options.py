"""A fake of pytest for code that registers and reads options: dictionaries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class FakeConfig:
    """`getoption` and `getini` of what was given, by the options' names with dashes."""

    def __init__(self, line: dict[str, str], ini: dict[str, object]) -> None:
        self.line = {f"dcp_{name.replace('-', '_')}": value for name, value in line.items()}
        self.ini = {f"dcp_{name.replace('-', '_')}": value for name, value in ini.items()}

    def getoption(self, name: str) -> str | None:
        return self.line.get(name)

    def getini(self, name: str) -> object:
        return self.ini.get(name)


class FakeGroup:
    def __init__(self) -> None:
        self.options: dict[str, dict[str, Any]] = {}

    def addoption(self, name: str, **keywords: Any) -> None:
        self.options[name] = keywords


class FakeParser:
    """Records what is registered."""

    def __init__(self) -> None:
        self.group = FakeGroup()
        self.ini: dict[str, object] = {}
        self.ini_types: dict[str, object] = {}

    def getgroup(self, *_: str) -> FakeGroup:
        return self.group

    def addini(self, name: str, _: str, type: object, default: object) -> None:
        self.ini[name] = default
        self.ini_types[name] = type


class StrictConfig(FakeConfig):
    """As pytest 9.0 and 9.1 treat a TOML file: every value must be of the registered type."""

    def __init__(self, ini: dict[str, object]) -> None:
        super().__init__({}, ini)
        self._inicfg = {key: SimpleNamespace(value=value) for key, value in self.ini.items()}

    def getini(self, name: str) -> object:
        value = self.ini.get(name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"config option {name!r} expects a string, got {value!r}")
        return value
