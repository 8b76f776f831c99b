"""A rank's life: boot, orders, end.

Enters: an `Order` and inherited descriptors. Leaves: messages on the report socket and the exit
code 0, which only a rank that was ordered to leave returns; its last message is `Done("finish")`,
which says that its exit ran to the end. Everything that pytest knows of a rank
is in `pytest_plugin`; here is what any rank does, also one that only runs functions.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

from pytest_dcp import api
from pytest_dcp._harness.lockstep.fresh_folders import scratch_beside
from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import RANK_VARIABLE, STACKS_SIGNAL, Order, RankFds
from pytest_dcp._harness.protocol.messages import (
    Announce,
    At,
    CallFunction,
    DebugAnswer,
    Decoder,
    Done,
    Exchange,
    FaultAnswer,
    Go,
    Leave,
    Message,
    Met,
    RankOutcome,
    RecordedWarning,
    RunItem,
    encode,
)
from pytest_dcp._harness.rank import coverage, interpreter_exit
from pytest_dcp._harness.rank.group_counter import GroupCounter
from pytest_dcp._harness.rank.interrupts import RankInterrupts
from pytest_dcp.errors import DcpError, DivergedError
from pytest_dcp.tracebacks import format_shown

RECEIVE_BYTES = 1 << 16
TEXT_CHARS = 2000
"""Of an exception's text in headings and messages; its traceback has all of it."""
M = TypeVar("M", bound=Message)


class ControllerGoneError(DcpError):
    """The report socket reached its end: the controller no longer waits for this rank."""


class Channel:
    """A rank's end of the report socket: send, and wait for the reply."""

    def __init__(self, fd: int, interrupts: RankInterrupts) -> None:
        self._interrupts = interrupts
        self._socket = socket.socket(fileno=fd)
        self._decoder = Decoder()
        self._pending: list[Message] = []
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._sending = threading.Lock()
        """A thread may have something to say while another waits for a reply."""

    @property
    def is_ours(self) -> bool:
        """Whether this is the rank's own process, not one that was forked from it."""
        return os.getpid() == self._pid

    def send(self, message: Message) -> None:
        """Send one message. Raises `DcpError` in a process forked from the rank."""
        if not self.is_ours:
            raise DcpError(
                f"process {os.getpid()} was forked from rank process {self._pid} and cannot "
                "speak for the rank: use the world's fixtures in the rank itself"
            )
        data = encode(message)
        with self._interrupts.held(), self._sending:
            self._socket.sendall(data)

    def receive(self) -> Message:
        """The next message; waits for it."""
        with self._lock:
            while not self._pending:
                select.select([self._socket], [], [])  # the wait itself may be interrupted
                with self._interrupts.held():
                    self._read()
            return self._pending.pop(0)

    def _read(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except ConnectionResetError:  # it ended before it had read everything
            data = b""
        if not data:
            raise ControllerGoneError("the controller closed the report socket")
        self._pending = self._decoder.feed(data)

    def receive_order(self) -> Message:
        """The next order; waits for it, and is not interrupted.

        Replies that an interrupted phase did not wait for are left out.
        """
        with self._interrupts.unheard():
            while isinstance(message := self.receive(), Met | DebugAnswer | FaultAnswer):
                pass
            return message

    def answer(self, done: Done) -> Message:
        """Answer inside a phase, and wait for the next order; neither is interrupted."""
        with self._interrupts.unheard():
            self.send(done)
            return self.receive_order()

    def put_back(self, message: Message) -> None:
        """Have `receive` give this message next: it is meant for somebody else."""
        self._pending.insert(0, message)

    @property
    def has_order(self) -> bool:
        """Whether the controller has already said what comes next."""
        return bool(self._pending)

    def ask(self, message: Message, reply: type[M]) -> M:
        """Send a message and wait for its reply."""
        with self._lock:
            self.send(message)
            got = self.receive()
        if not isinstance(got, reply):
            raise DcpError(f"expected {reply.__name__} from the controller, got {got!r}")
        return got


class ItemRunner(Protocol):
    """Runs the items of a session in this rank."""

    def run(self, order: RunItem) -> None:
        """One item from setup to teardown, in lockstep with the other ranks."""

    def tear_down(self, order: Go) -> Done:
        """Between two items, tear down what the named one does not share; without one, all."""


@dataclass(frozen=True, slots=True)
class WarmMesh:
    """The mesh that the tests of a warm world share."""

    group: object
    """The default process group that it was made of."""
    mesh: Any
    forget: Callable[[], None]
    """Tears down the fixture, and with it those that use it."""


@dataclass(slots=True)
class Rank:
    """This process, as a rank of its world."""

    order: Order
    channel: Channel
    fds: RankFds
    interrupts: RankInterrupts
    seed: int = 0
    checkpoint_dir: str = ""
    modules: int = 0
    """How many modules were imported before the first test."""
    mesh: WarmMesh | None = None
    counter: GroupCounter | None = None
    """Counts what is done with process groups, where this rank is used more than once."""
    renewed: list[api.RenewedFixture] = field(default_factory=list)
    """The running test's fixtures that start afresh for each of Hypothesis' examples."""
    unmet: list[Callable[[], list[str]]] = field(default_factory=list)
    """Called when a test is torn down; what they return did not happen, and fails it."""
    capture: Callable[[], contextlib.AbstractContextManager[list[tuple[str, str, str]]]] = field(
        default=contextlib.nullcontext  # type: ignore[assignment]  # set at once by the capturing plugin
    )
    """Captures output around work that is no item's phase; yields sections to fill."""

    @property
    def rank(self) -> int:
        """0 to world_size - 1."""
        return self.order.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.order.size

    @property
    def scratch_dir(self) -> Path:
        """A folder that every rank sees; see `api.ThisRank`."""
        return scratch_beside(Path(self.checkpoint_dir))

    def count_groups(self) -> GroupCounter:
        """The counter of this process, at work from the first call on."""
        if self.counter is None:
            self.counter = GroupCounter()
            self.counter.install()
        return self.counter

    def meet(self, operation: str, payload: bytes = b"") -> list[bytes | None]:
        """Every rank's payload, in rank order; waits for all ranks. Collective.

        None for a rank that was lost or stopped because the test asked for it.
        Raises `DivergedError` when a peer asked for something else or will not come.
        """
        __tracebackhide__ = True
        met = self.channel.ask(Exchange(operation, payload), Met)
        if met.error:
            error = DivergedError(met.error)
            error.is_echo = True
            raise error
        return met.values()

    def say_raised(self, error: BaseException, at_s: float) -> None:
        """Tell the controller what this rank is about to write a report of.

        Its class at once, then its text, which the exception's own `__str__` may take long to make.
        """
        self.channel.send(At("reporting", type(error).__name__, at_s))
        self.channel.send(At("reporting", lines_of(error), at_s))

    def say_failing(self, error: BaseException) -> None:
        """Tell the controller that this rank waits for its peers with an error of its own."""
        now = time.monotonic()
        self.channel.send(At("failing", type(error).__name__, now))
        self.channel.send(At("failing", lines_of(error), now, _own_traceback(error)))

    def announce_death(self, reason: str) -> None:
        """Tell the controller that the test wants this process to end or stop, and that it will."""
        if self.channel.is_ours:
            self.channel.send(Announce(reason))

    @contextlib.contextmanager
    def announce_failure(self, error: BaseException) -> Iterator[None]:
        """Inside the block, the controller knows which error this rank wants its peers to hear of.

        Does nothing in a process that was forked from the rank.
        """
        if not self.channel.is_ours:
            yield
            return
        self.say_failing(error)
        try:
            yield
        finally:
            self.channel.send(At("agreed"))

    @contextlib.contextmanager
    def renew_for_examples(self, fixture: api.RenewedFixture) -> Iterator[None]:
        """Inside the block, `example_runner` renews the fixture for each example."""
        self.renewed.append(fixture)
        try:
            yield
        finally:
            self.renewed.remove(fixture)

    def reseed(self, seed: int) -> None:
        """Seed random, numpy and torch alike on every rank."""
        self.seed = seed
        random.seed(seed)
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            numpy_random.seed(seed % 2**32)
        self.reseed_torch(seed)

    def reseed_torch(self, seed: int) -> None:
        """Seed torch alone: Hypothesis seeds the others for each example."""
        import torch

        # Not torch.manual_seed: for each kind of accelerator it formats a stack trace, 3 ms in all.
        torch.default_generator.manual_seed(seed)
        if self.order.device != "cpu":
            torch.cuda.manual_seed(seed)


def current() -> Rank | None:
    """This process's rank, with what only the harness may know; None outside of a world."""
    rank = api.current_rank()
    return rank if isinstance(rank, Rank) else None


def run(
    order: Order,
    fds: RankFds,
    prepare: Callable[[Rank], ItemRunner],
) -> NoReturn:
    """A rank's whole process. `prepare` readies the session and returns what runs its items."""
    code = 1
    try:
        interrupts = RankInterrupts()
        channel = Channel(fds.socket, interrupts)
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
    """Join the process group and say so; False when that failed (and was said)."""
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


def environment(order: Order) -> dict[str, str]:
    """The standard variables of torch's launchers. Pure (no I/O)."""
    return {
        "RANK": str(order.rank),
        "LOCAL_RANK": str(order.rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(order.size),
        "LOCAL_WORLD_SIZE": str(order.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(order.master_port),
        RANK_VARIABLE: order.token,
    }


def _set_environment(order: Order) -> None:
    os.environ.update(environment(order))
    # Reverse look-ups of the host's own name took gloo seconds; ranks are on one machine.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _init_process_group(order: Order) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device(order.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(order.store, order.size)  # type: ignore[attr-defined]  # public, not in __all__
    dist.init_process_group(
        order.backend,
        store=store,
        rank=order.rank,
        world_size=order.size,
        device_id=device if order.backend == "nccl" else None,
    )


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
            case CallFunction():
                rank.reseed(order.seed)
                done = _call(rank, order.payload)
                coverage.save()  # a world whose test fails is killed
                rank.channel.send(done)
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
    """Exit as an interpreter does, and say so: code 0 alone does not prove it."""
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
    ended = time.monotonic()
    if error is not None and outcome == "failed":
        rank.say_raised(error, ended)
    return Done(
        "call",
        outcome,
        ended,
        time.perf_counter() - started,
        is_echo=is_echo(error),
        exception=class_of(error) if error is not None else None,
        text=lines_of(error) if error is not None else "",
        report={"text": _own_traceback(error)} if error is not None else None,
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


def _own_traceback(error: BaseException) -> str:
    """The traceback without the frames of this module, nor others of ours that add nothing."""
    tb: TracebackType | None = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    return format_shown(error, tb)


def outcome_of(error: BaseException) -> RankOutcome:
    """By the names that pytest gives its control-flow exceptions."""
    names: dict[str, RankOutcome] = {
        "Skipped": "skipped",
        "SkipTest": "skipped",
        "XFailed": "xfailed",
        "Exit": "exit",
        "KeyboardInterrupt": "interrupt",
    }
    return names.get(type(error).__name__, "failed")


def is_echo(error: BaseException | None) -> bool:
    """Whether an error says itself that a peer caused it."""
    return isinstance(error, DivergedError) and error.is_echo


def class_of(error: BaseException) -> tuple[str, str]:
    return type(error).__module__, type(error).__qualname__


def lines_of(error: BaseException) -> str:
    """`Type: text`, in the text's own lines, even when the exception's own `__str__` is broken."""
    try:
        text = str(error)
    except Exception as exc:  # noqa: BLE001 - user code: whatever it raises is only text here
        text = f"<its __str__ raised {type(exc).__name__}>"
    name = type(error).__name__
    return f"{name}: {text.strip()[:TEXT_CHARS]}" if text.strip() else name
