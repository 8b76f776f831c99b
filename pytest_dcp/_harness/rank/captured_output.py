"""A rank's output: captured between pytest's own phases, and truncated."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_dcp._harness.protocol import linux

if TYPE_CHECKING:
    pass


SECTION_CHARS = 1 << 16
"""A captured section longer than this keeps its two ends."""


@contextlib.contextmanager
def capture_sections(config: pytest.Config) -> Iterator[list[tuple[str, str, str]]]:
    manager: Any = config.pluginmanager.getplugin("capturemanager")
    sections: list[tuple[str, str, str]] = []
    if manager is None or not manager.is_globally_capturing():
        yield sections
        return
    manager.resume_global_capture()
    try:
        yield sections
    finally:
        manager.suspend_global_capture(in_=False)
        out, err = manager.read_global_capture()
        sections += [("call", n, clip(t)) for n, t in (("stdout", out), ("stderr", err)) if t]


def clip(text: str) -> str:
    """The text, or its two ends when it is very long. Pure (no I/O)."""
    if len(text) <= SECTION_CHARS:
        return text
    half = SECTION_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


C_STREAMS = "pytest_dcp.c_streams"


class CStreams:
    """A plugin: output of C code in a phase is captured in it, not when its buffer is full."""

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_make_collect_report(self) -> Generator[None, object, object]:
        """As in setup; for a rank that collects."""
        return (yield from self._flush_after())

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        """Inside of pytest's capture."""
        return (yield from self._flush_after())

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Generator[None, object, object]:
        """As in setup."""
        return (yield from self._flush_after())

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """As in setup."""
        return (yield from self._flush_after())

    def _flush_after(self) -> Generator[None, object, object]:
        __tracebackhide__ = True
        try:
            return (yield)
        finally:
            linux.flush_c_streams()
