"""A rank's life: boot, orders, end.

Enters: a `RankLaunch` and inherited descriptors. Leaves: messages on the report socket and the exit
code 0, which only a rank that was ordered to leave returns; its last message is `Done("finish")`,
which says that its exit ran to the end. pytest's view of a rank is in `pytest_plugin`; this module
has the part common to all ranks, even to ranks that only run functions.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, Protocol
from urllib.parse import urlsplit

from pytest_dcp import api
from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import (
    RANK_VARIABLE,
    STACKS_SIGNAL,
    OuterPlace,
    RankFds,
    RankLaunch,
)
from pytest_dcp._harness.protocol.messages import (
    At,
    CallFunction,
    Done,
    Go,
    Leave,
    RankOutcome,
    RecordedWarning,
    RunItem,
    RunProcess,
)
from pytest_dcp._harness.protocol.world_spec import NO_GROUP
from pytest_dcp._harness.rank import coverage, interpreter_exit
from pytest_dcp._harness.rank.channel import Channel, ControllerGoneError
from pytest_dcp._harness.rank.exception_facts import (
    class_of,
    is_echo,
    lines_of,
    outcome_of,
    traceback_text,
)
from pytest_dcp._harness.rank.rank_interrupts import RankInterrupts
from pytest_dcp._harness.rank.this_rank import Rank
from pytest_dcp.errors import DcpError

LOOPBACK = "127.0.0.1"
TCP = "tcp://"
"""Begins the address of a store that is no file."""


class ItemRunner(Protocol):
    """Runs the items of a session in this rank."""

    def run(self, order: RunItem) -> None:
        """One item from setup to teardown, in lockstep with the other ranks."""

    def run_process(self, order: RunProcess) -> Done:
        """A process of an unmodified test, from its start to its end."""

    def tear_down(self, order: Go) -> Done:
        """Between two items, tear down the scopes that the named one does not share; without one,
        all.
        """


def run(
    order: RankLaunch,
    fds: RankFds,
    prepare: Callable[[Rank], ItemRunner],
) -> NoReturn:
    """A rank's whole process. `prepare` readies the session and returns the runner of its items."""
    code = 1
    try:
        interrupts = RankInterrupts()
        ahead_s = order.place.clock_ahead_s if order.place is not None else 0.0
        channel = Channel(fds.socket, interrupts, ahead_s)
        interrupts.install(lambda: channel.send(At("interrupted")))
        rank = Rank(order, channel, fds, interrupts, seed=order.seed)
        api.enter_rank(rank)
        _watch_faults(fds.trace)
        runner = prepare(rank)
        if _boot(rank):
            _serve(rank, runner)
            code = 0
    except ControllerGoneError:
        code = 1
    except BaseException:  # noqa: BLE001 - the last frame of the process: say it and end
        with contextlib.suppress(BaseException):
            os.write(fds.err, traceback.format_exc().encode(errors="replace"))
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        linux.flush_c_streams()
        os._exit(code)


def _watch_faults(trace_fd: int) -> None:
    faulthandler.enable(file=trace_fd, all_threads=True)
    faulthandler.register(STACKS_SIGNAL, file=trace_fd, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS_SIGNAL})


def _boot(rank: Rank) -> bool:
    """Join the process group and report it; False when that failed, which is reported too."""
    started = time.perf_counter()
    sections: list[tuple[str, str, str]] = []
    try:
        with rank.capture() as sections:
            _set_environment(rank.order)
            _init_process_group(rank.order)
    except Exception as exc:  # noqa: BLE001 - reported to the controller, whatever it is
        rank.channel.send(
            Done(
                "boot",
                "failed",
                time.monotonic(),
                time.perf_counter() - started,
                exception=class_of(exc),
                text=lines_of(exc),
                report={"text": traceback.format_exc()},
                sections=tuple(sections or ()),
            )
        )
        # Stay until killed: a peer may need this process to end its own init.
        rank.channel.receive()
        return False
    rank.modules = len(sys.modules)
    duration_s = time.perf_counter() - started
    rank.channel.send(Done("boot", "passed", time.monotonic(), duration_s))
    return True


def environment(order: RankLaunch) -> dict[str, str]:
    """The standard variables of torch's launchers. Pure (no I/O)."""
    rank, size = order.view
    outer = None if order.is_simulated else order.place
    place = outer or OuterPlace(rank, size, 0, LOOPBACK)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(place.local_rank),
        "GROUP_RANK": str(place.node),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(order.master_port),
        RANK_VARIABLE: order.token,
    }


def _set_environment(order: RankLaunch) -> None:
    os.environ.update(environment(order))
    interface = "lo" if order.place is None else order.place.interface
    # Reverse look-ups of the host's own name took gloo seconds.
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # It says that torchrun has a store at MASTER_PORT; this world's port is free for the test.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


def _init_process_group(order: RankLaunch) -> None:
    if order.backend == NO_GROUP:
        return
    import torch
    import torch.distributed as dist

    if order.fake_view is not None:
        from pytest_dcp._harness.rank.fake_world import join_fake_world

        join_fake_world(*order.fake_view)
        return
    if order.threads:
        return  # each thread joins when the test is called
    device = torch.device(order.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        order.backend,
        store=_open_store(order),
        rank=order.rank,
        world_size=order.size,
        device_id=device if order.backend == "nccl" else None,
    )


def _open_store(order: RankLaunch) -> Any:
    """The store at which the world's ranks meet: a file, or on several machines a prefix of the
    session's TCP store.
    """
    import torch.distributed as dist

    if not order.store.startswith(TCP):
        if order.backend == "gloo":
            from pytest_dcp._harness.rank.rendezvous_store import RendezvousStore

            return RendezvousStore(order.store, order.size)
        return dist.FileStore(order.store, order.size)  # type: ignore[attr-defined]  # public, not in __all__
    url = urlsplit(order.store)
    client = dist.TCPStore(url.hostname or "", url.port or 0, is_master=False)  # type: ignore[attr-defined]  # as above
    return dist.PrefixStore(url.path, client)  # type: ignore[attr-defined]  # as above


def _serve(rank: Rank, runner: ItemRunner) -> None:
    """Orders, one after the other, until `Leave`."""
    if rank.order.isolation == "module":
        rank.count_groups()
    while True:
        order = rank.channel.receive_order()
        match order:
            case RunItem():
                rank.checkpoint_dir = order.checkpoint_dir
                rank.reseed(order.seed)
                runner.run(order)
            case RunProcess():
                rank.reseed(order.seed)
                result = runner.run_process(order)
                coverage.save()  # as after a function
                rank.channel.send(result)
            case CallFunction():
                rank.reseed(order.seed)
                result = _call(rank, order.payload)
                coverage.save()  # a world whose test fails is killed
                rank.channel.send(result)
            case Leave():
                _leave(rank)
                return
            case Go("teardown"):
                rank.channel.send(runner.tear_down(order))
            case Go():
                raise DcpError(f"told to run {order.phase}, but no item was begun")
            case _:
                raise DcpError(f"unexpected order {order!r}")


def _leave(rank: Rank) -> None:
    """Exit as an interpreter does, and report it: code 0 alone does not prove it."""
    coverage.save()  # in case the exit hangs
    started = time.perf_counter()
    with rank.capture() as sections:
        exited = interpreter_exit.run_exit()
    coverage.save()
    if rank.order.backend == "nccl":
        import torch.distributed as dist

        if dist.is_initialized():  # NCCL's threads outlive os._exit's patience otherwise
            dist.destroy_process_group()
    if rank.channel.is_ours:  # not in a process that a handler forked
        rank.channel.send(
            Done(
                "finish",
                "passed",
                time.monotonic(),
                time.perf_counter() - started,
                sections=tuple(sections or ()),
                warnings=tuple(_exit_warning(text) for text in exited.errors),
                threads=tuple(exited.threads),
            )
        )


def _exit_warning(text: str) -> RecordedWarning:
    """An error at exit, as pytest warns of errors that cannot be caught."""
    category = ("pytest", "PytestUnraisableExceptionWarning")
    return {"text": text, "category": category, "filename": __file__, "lineno": 0}


def _call(rank: Rank, payload: bytes) -> Done:
    """Run a pickled `(function, args, kwargs)`; its result travels back pickled."""
    import cloudpickle

    started = time.perf_counter()
    outcome: RankOutcome = "passed"
    result, error = b"", None
    with rank.capture() as sections:
        try:
            with rank.interrupts.heard():
                function, args, kwargs = cloudpickle.loads(payload)
                value = function(*args, **kwargs)
                result = _dump_result(value)
        except BaseException as exc:  # noqa: BLE001 - reported to the controller, whatever it is
            outcome, error = outcome_of(exc), exc
        linux.flush_c_streams()
    end_s = time.monotonic()
    if error is not None and outcome == "failed":
        rank.say_raised(error, end_s)
    return Done(
        "call",
        outcome,
        end_s,
        time.perf_counter() - started,
        is_echo=is_echo(error),
        exception=class_of(error) if error is not None else None,
        text=lines_of(error) if error is not None else "",
        report={"text": traceback_text(error, skip_file=__file__)} if error is not None else None,
        returncode=getattr(error, "returncode", None) if outcome == "exit" else None,
        sections=tuple(sections or ()),
        payload=result,
    )


def _dump_result(value: object) -> bytes:
    from pytest_dcp._harness.protocol.function_pickles import dumps

    try:
        dumped = dumps(value)
    except Exception as exc:
        raise TypeError(
            f"the function's result, a {type(value).__qualname__}, cannot be pickled: {exc}"
        ) from exc
    return dumped
