"""Code that could end or spoil this process runs in a fork of it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

FORK_S = 200
"""Until a fork is ended that does not end by itself."""


def forked(
    body: Callable[[Callable[[str], None]], Any],
    room_bytes: int = 1 << 30,
    limit_s: int = FORK_S,
) -> Any:
    """Call the body in a fork; returns its result, by way of JSON.

    The body gets a function and calls it with the name of each part that it begins. It may add
    `room_bytes` to the address space, and take `limit_s` seconds. Raises AssertionError with the
    last part that it began if it fails or dies. Its tensors must stay below 32,768 elements: above,
    torch asks for threads that a fork lacks.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(body, writing, room_bytes, limit_s)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        *begun, last = pipe.read().decode(errors="replace").rsplit("\n", 1)
    _, status = os.waitpid(child, 0)
    where = begun[0].rsplit("\n", 1)[-1] if begun else "nothing"
    if os.WIFSIGNALED(status):
        raise AssertionError(f"ended by {signal.Signals(os.WTERMSIG(status)).name} in {where}")
    answer = json.loads(last)
    if "error" in answer:
        raise AssertionError(f"in {where}:\n{answer['error']}")
    return answer["value"]


def _answer(
    body: Callable[[Callable[[str], None]], Any], writing: int, room_bytes: int, limit_s: int
) -> None:
    gc.freeze()  # errors are in cycles: looking at all of torch for them takes longest
    try:
        signal.alarm(limit_s)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room_bytes,) * 2)
        answer = {"value": body(lambda what: _tell(writing, f"{what!r}\n"))}
    except BaseException:  # noqa: BLE001 - any error goes to the parent
        answer = {"error": traceback.format_exc()}
    with contextlib.suppress(BaseException):
        _tell(writing, json.dumps(answer))


def _tell(writing: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(writing, data) :]


@contextlib.contextmanager
def limited(seconds: float, timer: int = signal.ITIMER_VIRTUAL) -> Iterator[None]:
    """Raise TimeoutError when the block exceeds this processor time, or another timer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    signals = {signal.ITIMER_VIRTUAL: signal.SIGVTALRM, signal.ITIMER_PROF: signal.SIGPROF}
    signal.signal(signals.get(timer, signal.SIGALRM), late)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
