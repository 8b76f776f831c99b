"""faulthandler's output -> a description of a rank's activity. Pure (no I/O).

The format is that of `faulthandler.dump_traceback`: a heading per thread, most recent call first,
the signalled thread headed `Current thread`, then `  File "...", line N in name` per frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)$')
LIBRARY = re.compile(r"(/site-packages/|/lib/python3\.\d+/|<frozen )")
STANDARD_LIBRARY = re.compile(r"/lib/python3\.\d+/(?!site-packages/)|<frozen ")
DISTRIBUTED = re.compile(r"/torch/(distributed/|_C/_distributed)")
COLLECTIVES = frozenset(
    (
        "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all",
        "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list",
        "destroy_process_group", "gather", "gather_object", "init_process_group", "irecv",
        "isend", "monitored_barrier", "new_group", "recv", "reduce", "reduce_scatter",
        "reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "split_group",
        "init_device_mesh", "wait_tensor",
    )
)  # fmt: skip
RUNNER = re.compile(
    r"/_pytest/|/pluggy/|/pytest_dcp/_harness/rank/(main|pytest_plugin|phase_verdict)\.py$|"
    r"/hypothesis/(core|stateful)\.py$"
)
OURS = re.compile(
    r"/pytest_dcp/((_\w+|checkpoint|faults)/|properties/(?!suite/)"
    r"|(plugin|api|garbage_collection|tracebacks)\.py)"
)
"""Where the package is not among the libraries. Its demo and its test classes are the user's."""
ENGINE = re.compile(r"/pytest_dcp/(_engine/(verbs|background)|checkpoint)/")
VERBS = frozenset(
    (
        "save", "load", "load_without_template", "async_save", "save_state_dict",
        "load_state_dict", "get_state_dict", "get_model_state_dict", "get_optimizer_state_dict",
        "set_state_dict", "set_model_state_dict", "set_optimizer_state_dict",
    )
)  # fmt: skip
"""Functions of the engine that all ranks call together."""
EXCHANGE = "the world's exchange"


@dataclass(frozen=True, slots=True)
class StackFrame:
    """One line of a stack."""

    file: str
    line: int
    name: str


def main_thread(trace: str) -> list[StackFrame]:
    """The frames of the signalled thread, innermost first."""
    frames: list[StackFrame] = []
    inside = False
    for line in trace.splitlines():
        if line.startswith(("Current thread", "Thread 0x")):
            if inside and frames:
                break
            inside = line.startswith("Current thread")
            continue
        if inside and (frame := _frame(line)):
            frames.append(frame)
    return _up_to_entry(frames)


def trim_runner(trace: str) -> str:
    """The stacks without the frames that run every test: pytest's and ours."""
    lines: list[str] = []
    thread: list[str] = []
    for line in [*trace.splitlines(), ""]:
        if FRAME.match(line):
            thread.append(line)
        else:
            lines += [*_without_runner(thread), line]
            thread = []
    return "\n".join(lines).rstrip()


def _without_runner(thread: list[str]) -> list[str]:
    """One thread's frames, innermost first, without the runner's frames that called the user's."""
    frames = _up_to_entry([frame for line in thread if (frame := _frame(line))])
    first = next((i for i, frame in enumerate(frames) if _is_users(frame)), 0)
    runner = (i for i, frame in enumerate(frames) if i >= first and RUNNER.search(frame.file))
    return thread[: max(1, next(runner, len(frames)))]


def _frame(line: str) -> StackFrame | None:
    match = FRAME.match(line)
    return StackFrame(match["file"], int(match["line"]), match["name"]) if match else None


def _is_users(frame: StackFrame) -> bool:
    return not (LIBRARY.search(frame.file) or OURS.search(frame.file))


def _users_frame(frames: list[StackFrame]) -> StackFrame | None:
    """The innermost frame outside of libraries; in an installed suite, the test's own frame.

    Tests of an installed package are among the libraries; their frame is the one that the runner
    called.
    """
    if user := next((frame for frame in frames if _is_users(frame)), None):
        return user
    runner = next((i for i, frame in enumerate(frames) if RUNNER.search(frame.file)), 0)
    called = (f for f in reversed(frames[:runner]) if not STANDARD_LIBRARY.search(f.file))
    first = next(called, None)
    return None if first is None or OURS.search(first.file) else first


def _up_to_entry(frames: list[StackFrame]) -> list[StackFrame]:
    """The frames of a rank without the start of its process."""
    begins = (
        i
        for i, frame in enumerate(frames)
        if frame.name == "run" and frame.file.endswith("/pytest_dcp/_harness/rank/main.py")
    )
    return frames[: next(begins, len(frames))]


def from_root(text: str, root: str) -> str:
    """Stacks or tracebacks with the paths of files in the folder `root` relative to it.

    For display only: code that analyses stacks recognises libraries by their full paths.
    """
    return text.replace(f'File "{root}/', 'File "') if root.strip("/") else text


def describe_activity(trace: str, root: str = "") -> str:
    """A rank's activity: its collective, if it was in one, and the line of user code.

    Paths of files in the folder `root` are relative to it.
    """
    frames = main_thread(trace)
    if not frames:
        return "its main thread had no Python frame"
    user = _users_frame(frames)
    where = f"in {frames[0].name}"
    if user is not None:
        file = user.file.removeprefix(f"{root}/") if root else user.file
        where = f"at {file}:{user.line} in {user.name}"
    inner = frames[: frames.index(user)] if user else frames
    collective = next((name for frame in reversed(inner) if (name := _collective(frame))), None)
    if collective is None and any(f.name == "meet" and OURS.search(f.file) for f in inner):
        collective = EXCHANGE
    return f"in {collective}, {where}" if collective else where


def _collective(frame: StackFrame) -> str | None:
    """The name of the collective function that a frame is of, as its caller knows it."""
    if frame.name in COLLECTIVES and DISTRIBUTED.search(frame.file):
        return frame.name
    if frame.name in VERBS and ENGINE.search(frame.file):
        return f"dcp.{frame.name}"
    return None
