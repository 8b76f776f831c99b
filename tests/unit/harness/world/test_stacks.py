"""A dump of faulthandler -> the rank's activity: dumps made here, and dumps of real hangs.

For a real dump with frames of torch in it, and no torch, code is compiled under torch's file names:
faulthandler prints the name that the code object carries.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import pytest_dcp.checkpoint as dcp
from pytest_dcp._harness.world.stacks import (
    ENGINE,
    VERBS,
    StackFrame,
    describe_activity,
    main_thread,
    trim_runner,
)

SITE = "/venv/lib/python3.11/site-packages"
C10D = f"{SITE}/torch/distributed/distributed_c10d.py"
LOGGER = f"{SITE}/torch/distributed/c10d_logger.py"
HARNESS = "/src/pytest_dcp/_harness"
TEST = "/suite/test_train.py"


def called(file: str, name: str, inner: Callable[[], object]) -> Callable[[], object]:
    """`inner`, called from a function of that name in that file; it calls on its line 2."""
    scope: dict[str, Any] = {}
    exec(compile(f"def {name}(inner):\n    inner()\n", file, "exec"), scope)
    return partial(scope[name], inner)  # a partial leaves no frame of its own


def dump(*frames: tuple[str, str]) -> str:
    """A real dump of all threads, taken in (file, function) frames, innermost first."""
    with tempfile.TemporaryFile("w+") as file:
        inner: Callable[[], object] = partial(faulthandler.dump_traceback, file, all_threads=True)
        for name, function in frames:
            inner = called(name, function, inner)
        inner()
        file.seek(0)
        return file.read()


def current_thread(trace: str) -> str:
    """The part on the current thread: plugins of this session may have threads of their own."""
    return trace[trace.index("Current thread") :].partition("\n\n")[0]


# Dumps made here.


def test_frames_come_innermost_first_with_file_line_and_name() -> None:
    frames = main_thread(dump((C10D, "barrier"), (TEST, "test_step")))
    line = dump.__code__.co_firstlineno + 6
    assert frames[:3] == [
        StackFrame(C10D, 2, "barrier"),
        StackFrame(TEST, 2, "test_step"),
        StackFrame(__file__, line, "dump"),
    ]


def test_a_rank_in_user_code_is_named_by_its_line() -> None:
    assert (
        describe_activity(dump((TEST, "helper"), (TEST, "test_step"))) == f"at {TEST}:2 in helper"
    )


def test_a_rank_in_a_library_is_named_by_the_user_s_line_that_called_it() -> None:
    trace = dump(("/usr/lib/python3.11/threading.py", "wait"), (f"{SITE}/a.py", "b"), (TEST, "f"))
    assert describe_activity(trace) == f"at {TEST}:2 in f"


@pytest.mark.parametrize("root", ["/src", SITE])
@pytest.mark.parametrize("inside", [("_engine/coordinate/peer_side.py", "wait"), (C10D, "recv")])
def test_a_rank_in_a_verb_of_the_engine_is_named_by_it(root: str, inside: tuple[str, str]) -> None:
    file, name = inside
    trace = dump(
        (file if file == C10D else f"{root}/pytest_dcp/{file}", name),
        (f"{root}/pytest_dcp/_engine/verbs/save.py", "save"),
        (f"{root}/pytest_dcp/_engine/verbs/torch_arguments.py", "called"),
        (TEST, "test_step"),
    )
    assert describe_activity(trace) == f"in dcp.save, at {TEST}:2 in test_step"


@pytest.mark.parametrize("name", sorted(VERBS))
def test_each_verb_is_a_function_of_the_engine(name: str) -> None:
    state_dict = importlib.import_module("pytest_dcp.checkpoint.state_dict")
    verb = inspect.unwrap(getattr(dcp, name, None) or getattr(state_dict, name))
    assert verb.__name__ == name
    assert ENGINE.search(verb.__code__.co_filename)


def test_tests_in_a_checkout_named_as_the_package_are_the_users() -> None:
    for file in ("/src/pytest_dcp/tests/test_a.py", "/src/pytest_dcp/pytest_dcp/demo/test_b.py"):
        assert describe_activity(dump((file, "test_step"))) == f"at {file}:2 in test_step"


def test_a_rank_in_a_collective_is_named_by_it_and_by_the_user_s_line() -> None:
    trace = dump((C10D, "all_reduce"), (LOGGER, "wrapper"), (TEST, "helper"), (TEST, "test_step"))
    assert describe_activity(trace) == f"in all_reduce, at {TEST}:2 in helper"


def test_of_nested_collectives_the_one_that_the_user_called_is_named() -> None:
    trace = dump(
        (C10D, "all_gather"), (C10D, "all_gather_object"), (LOGGER, "wrapper"), (TEST, "t")
    )
    assert describe_activity(trace) == f"in all_gather_object, at {TEST}:2 in t"


@pytest.mark.parametrize(
    "file", [TEST, f"{SITE}/lightning/strategy.py", "/usr/lib/python3.11/q.py"]
)
def test_a_function_with_a_collective_s_name_is_none_outside_torch(file: str) -> None:
    assert "in barrier, " not in describe_activity(dump((file, "barrier"), (TEST, "test_step")))


def test_a_user_s_call_back_inside_of_a_collective_is_where_the_rank_is() -> None:
    trace = dump((TEST, "__reduce__"), (C10D, "all_gather_object"), (TEST, "test_step"))
    assert describe_activity(trace) == f"at {TEST}:2 in __reduce__"


def test_a_rank_at_the_world_s_exchange_is_named_so() -> None:
    trace = dump(
        (f"{HARNESS}/rank/main.py", "receive"),
        (f"{HARNESS}/rank/main.py", "meet"),
        (f"{HARNESS}/rank/world_fixture.py", "barrier"),
        (TEST, "test_step"),
    )
    assert describe_activity(trace) == f"in the world's exchange, at {TEST}:2 in test_step"


def test_a_rank_that_waits_for_orders_is_at_no_exchange() -> None:
    text = describe_activity(
        dump((f"{HARNESS}/rank/main.py", "receive"), (f"{HARNESS}/rank/main.py", "_serve"))
    )
    assert "exchange" not in text


def test_a_stack_without_user_code_is_named_by_its_innermost_function() -> None:
    trace = "Current thread 0x00007f (most recent call first):\n" + "\n".join(
        [
            f'  File "{SITE}/torch/cuda/__init__.py", line 3 in synchronize',
            f'  File "{SITE}/a.py", line 1 in b',
        ]
    )
    assert describe_activity(trace) == "in synchronize"


@pytest.mark.parametrize("between", [(), ("/usr/lib/python3.11/unittest/case.py",)])
def test_a_test_of_an_installed_suite_is_named_by_its_own_line(between: tuple[str, ...]) -> None:
    files = [C10D, f"{SITE}/wheel/tests/test_step.py", *between, f"{SITE}/_pytest/python.py"]
    lines = [f'  File "{file}", line {i} in all_reduce' for i, file in enumerate(files, 1)]
    trace = "\n".join(["Current thread 0x00007f (most recent call first):", *lines])
    assert describe_activity(trace) == f"in all_reduce, at {files[1]}:2 in all_reduce"


def test_the_current_thread_is_meant_also_when_others_come_first_and_after() -> None:
    waiting, done = threading.Event(), threading.Event()

    def other() -> None:
        waiting.set()
        done.wait(10)

    threads = [threading.Thread(target=called(f"/suite/t{i}.py", "other", other)) for i in (0, 1)]
    for thread in threads:
        thread.start()
        waiting.wait(10)
    try:
        trace = dump((TEST, "test_step"))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert trace.count("Thread 0x") >= 2
    assert "/suite/t0.py" in trace
    assert main_thread(trace)[0] == StackFrame(TEST, 2, "test_step")
    assert not any(frame.file.startswith("/suite/t0") for frame in main_thread(trace))
    assert describe_activity(trace) == f"at {TEST}:2 in test_step"


def test_a_dump_from_another_thread_shows_that_one_and_not_the_main_thread() -> None:
    traces: list[str] = []
    thread = threading.Thread(
        target=lambda: traces.append(dump((C10D, "send"), ("/suite/pipeline.py", "push")))
    )
    thread.start()
    thread.join()
    assert describe_activity(traces[0]) == "in send, at /suite/pipeline.py:2 in push"
    here = sys._getframe().f_code.co_name
    assert here in traces[0]
    assert here not in [frame.name for frame in main_thread(traces[0])]


def test_a_stack_deeper_than_faulthandler_shows_is_read_as_far_as_it_goes() -> None:
    trace = dump((C10D, "recv"), *[(TEST, f"level{i}") for i in range(150)])
    assert "\n  ...\n" in trace
    assert describe_activity(trace) == f"in recv, at {TEST}:2 in level0"
    assert len(main_thread(trace)) == 100
    assert "level97" in trim_runner(trace)


def test_a_file_whose_name_holds_the_format_s_own_words_is_read_whole() -> None:
    odd = '/suite/", line 7 in x/test_é.py'
    assert describe_activity(dump((odd, "test_step"))).endswith(":2 in test_step")


# Stacks as a report shows them.


def test_frames_of_the_machinery_below_the_test_are_cut() -> None:
    trace = dump(
        (C10D, "all_reduce"),
        (TEST, "test_step"),
        (f"{SITE}/_pytest/python.py", "pytest_pyfunc_call"),
        (f"{SITE}/pluggy/_callers.py", "_multicall"),
        (f"{HARNESS}/rank/pytest_plugin.py", "_phase"),
        (f"{HARNESS}/rank/main.py", "_serve"),
        (f"{HARNESS}/launchers/zygote.py", "fork"),
    )
    heading, *frames = trim_runner(current_thread(trace)).splitlines()
    assert heading in trace
    assert frames == [
        f'  File "{C10D}", line 2 in all_reduce',
        f'  File "{TEST}", line 2 in test_step',
    ]


@pytest.mark.parametrize("module", ["main", "pytest_plugin", "phase_verdict"])
def test_frames_are_cut_at_the_ranks_own_modules(module: str) -> None:
    trace = dump((TEST, "pytest_runtest_makereport"), (f"{HARNESS}/rank/{module}.py", "_report"))
    assert trim_runner(current_thread(trace)).splitlines()[1:] == [
        f'  File "{TEST}", line 2 in pytest_runtest_makereport'
    ]


def test_a_trace_without_machinery_stays_as_it_is() -> None:
    trace = 'Current thread 0x1 (most recent call first):\n  File "/a.py", line 2 in b'
    assert trim_runner(trace) == trace


def test_other_threads_are_kept() -> None:
    trace = HANG.replace("Current thread", THREAD + "Current thread")
    assert "threading.py" in trim_runner(trace)
    assert describe_activity(trim_runner(trace)) == describe_activity(trace)


@pytest.mark.parametrize("trace", ["", "\n", "Fatal Python error: Segmentation fault\n"])
def test_a_trace_without_frames_is_said_to_have_none(trace: str) -> None:
    assert main_thread(trace) == []
    assert "no Python frame" in describe_activity(trace)
    assert trim_runner(trace) == trace.rstrip("\n")


# Dumps of real hangs: gloo on torch 2.13 under this plugin, the outer half left out.

BELOW = f"""\
  File "{SITE}/_pytest/python.py", line 187 in pytest_pyfunc_call
  File "{SITE}/pluggy/_execution.py", line 147 in _multicall
  File "{SITE}/pluggy/_manager.py", line 183 in _hookexec
  File "{SITE}/pluggy/_caller.py", line 197 in __call__
  File "{SITE}/_pytest/python.py", line 1798 in runtest
  File "{HARNESS}/rank/pytest_plugin.py", line 262 in <lambda>
  File "{SITE}/_pytest/runner.py", line 361 in from_call
  File "{HARNESS}/rank/pytest_plugin.py", line 261 in _phase
  File "{HARNESS}/rank/main.py", line 251 in _serve
  File "{HARNESS}/rank/main.py", line 155 in run
  File "{HARNESS}/launchers/fork.py", line 21 in rank_main
  File "{HARNESS}/launchers/zygote.py", line 290 in fork
  File "{SITE}/_pytest/main.py", line 387 in _main
  File "{SITE}/pytest/__main__.py", line 9 in <module>
  File "<frozen runpy>", line 88 in _run_code
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
THREAD = """\
Thread 0x00007f306a0fe6c0 (most recent call first):
  File "/root/.pyenv/versions/3.11.7/lib/python3.11/threading.py", line 982 in run
  File "/root/.pyenv/versions/3.11.7/lib/python3.11/threading.py", line 1045 in _bootstrap_inner
  File "/root/.pyenv/versions/3.11.7/lib/python3.11/threading.py", line 1002 in _bootstrap

"""


def hang(frames: str) -> str:
    return f"Current thread 0x00007f3094c49b80 (most recent call first):\n{frames}{BELOW}"


HANG = hang(
    f"""\
  File "{C10D}", line 3252 in all_reduce
  File "{LOGGER}", line 83 in wrapper
  File "{TEST}", line 3 in helper
  File "{TEST}", line 8 in test_step
"""
)
SCATTER = hang(
    f"""\
  File "{C10D}", line 4785 in scatter
  File "{LOGGER}", line 83 in wrapper
  File "{SITE}/torch/distributed/tensor/_collective_utils.py", line 159 in mesh_scatter
  File "{SITE}/torch/distributed/tensor/placement_types.py", line 455 in _shard_tensor
  File "{SITE}/torch/distributed/tensor/placement_types.py", line 473 in _make_shard_tensor
  File "{SITE}/torch/distributed/tensor/_api.py", line 977 in distribute_tensor
  File "{TEST}", line 30 in test_dtensor
"""
)
EXCHANGE = hang(
    f"""\
  File "{HARNESS}/rank/main.py", line 73 in receive
  File "{HARNESS}/rank/main.py", line 83 in ask
  File "{HARNESS}/rank/main.py", line 113 in meet
  File "{HARNESS}/rank/world_fixture.py", line 45 in barrier
  File "{TEST}", line 12 in test_exchange
"""
)
FIXTURE = hang(
    f"""\
  File "{C10D}", line 5356 in barrier
  File "{LOGGER}", line 83 in wrapper
  File "/suite/conftest.py", line 34 in slow
  File "{SITE}/_pytest/fixtures.py", line 1074 in call_fixture_func
"""
)
DEBRIS = f"""\
  File "/usr/lib/python3.11/shutil.py", line 675 in _rmtree_safe_fd
  File "{SITE}/_pytest/pathlib.py", line 157 in rm_rf
  File "{SITE}/_pytest/tmpdir.py", line 278 in tmp_path
"""
ENTRIES = {
    "python -m": "",
    "the console script": '  File "/venv/bin/pytest", line 8 in <module>\n',
    "a fresh interpreter": '  File "<string>", line 1 in <module>\n',
}
"""The outermost frame, by how pytest or the rank was started."""
CRASH = (
    "Fatal Python error: Segmentation fault\n\n" + THREAD + HANG + "\nExtension modules: numpy\n"
)
HANGS = {
    "all_reduce": (HANG, f"in all_reduce, at {TEST}:3 in helper"),
    "all_reduce, with a thread": (THREAD + HANG, f"in all_reduce, at {TEST}:3 in helper"),
    "scatter, in DTensor": (SCATTER, f"in scatter, at {TEST}:30 in test_dtensor"),
    "exchange": (EXCHANGE, f"in the world's exchange, at {TEST}:12 in test_exchange"),
    "fixture": (FIXTURE, "in barrier, at /suite/conftest.py:34 in slow"),
    "crash": (CRASH, f"in all_reduce, at {TEST}:3 in helper"),
}


@pytest.mark.parametrize(("trace", "what"), HANGS.values(), ids=HANGS)
def test_a_real_hang_is_reported_by_its_collective_and_line(trace: str, what: str) -> None:
    assert describe_activity(trace) == what


@pytest.mark.parametrize(("trace", "what"), HANGS.values(), ids=HANGS)
def test_a_trimmed_hang_says_the_same(trace: str, what: str) -> None:
    # Reports keep only the trimmed trace, and derive the rank's activity from it.
    assert describe_activity(trim_runner(trace)) == what


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_hang_outside_of_user_code_is_reported_by_its_function_however_pytest_was_started(
    entry: str,
) -> None:
    trace = hang(DEBRIS) + entry
    assert describe_activity(trace) == "in _rmtree_safe_fd"
    assert describe_activity(trim_runner(trace)) == describe_activity(trace)
    assert "_multicall" not in trim_runner(trace)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_hang_in_the_runner_itself_keeps_the_frame_that_says_so(entry: str) -> None:
    trace = hang(f'  File "{SITE}/_pytest/pathlib.py", line 157 in rm_rf\n') + entry
    assert describe_activity(trace) == "in rm_rf"
    assert describe_activity(trim_runner(trace)) == "in rm_rf"


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_hang_in_a_fixture_of_ours_is_reported_by_its_collective_however_pytest_was_started(
    entry: str,
) -> None:
    init = f'  File "{SITE}/torch/distributed/device_mesh.py", line 9 in init_device_mesh\n'
    trace = (
        hang(f'{init}  File "{HARNESS}/controller/fixtures.py", line 80 in device_mesh\n') + entry
    )
    assert describe_activity(trace).startswith("in init_device_mesh")
    assert "<module>" not in describe_activity(trace)
    assert describe_activity(trim_runner(trace)) == describe_activity(trace)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_hang_in_user_code_is_trimmed_alike_however_pytest_was_started(entry: str) -> None:
    assert trim_runner(HANG + entry) == trim_runner(HANG)
    assert describe_activity(HANG + entry) == describe_activity(HANG)


@pytest.mark.parametrize(("trace", "_"), HANGS.values(), ids=HANGS)
def test_a_trimmed_hang_keeps_every_user_frame_and_ends_there(trace: str, _: str) -> None:
    user = re.findall(r'File "/suite/.*', trace)
    assert re.findall(r'File "/suite/.*', trim_runner(trace)) == user
    assert "_pytest" not in trim_runner(trace)
    assert "pluggy" not in trim_runner(trace)
    assert "runpy" not in trim_runner(trace)


def test_files_below_the_root_are_named_as_they_lie_in_it() -> None:
    trace = dump((TEST, "helper"), (TEST, "test_step"))
    root, name = TEST.rsplit("/", 1)
    assert describe_activity(trace, root) == f"at {name}:2 in helper"
    assert describe_activity(trace, root[:-1]) == f"at {TEST}:2 in helper"
    assert describe_activity(trace, "/elsewhere") == f"at {TEST}:2 in helper"
