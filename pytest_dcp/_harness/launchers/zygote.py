"""The preloaded process that ranks are forked from.

See `zygote_launcher` for the controller's side.

The zygote is forked from the controller once, after collection and before the first test: it
holds the collected session, imports torch, and from then on only forks, signals and reaps. It
runs no test and starts no thread. Ranks are its children, so only it can reap them, and no kill
can hit a recycled process id.

Control messages are JSON datagrams on a SEQPACKET socket pair; a rank's descriptors ride along
with its order (SCM_RIGHTS). From the controller:

    {"op": "fork", "order": ...}     fork a rank; its descriptors come with the message
    {"op": "signal", "world": ..., "rank": ..., "signum": ...}
    {"op": "preload", "modules": ...}

and from the zygote:

    {"importing": "torch"}           its activity until it is ready, for error texts
    {"ready": true}                  once after the start, once after each "preload"
    {"world": ..., "rank": ..., "stopped": true}      a stop, or with false its end
    {"world": ..., "rank": ..., "status": ..., "leaked_processes": [...]}   an end

The steps of its life: `settle` leaves the controller's process group, signals and pipes; `warm_up`
imports torch and prepares the session that every rank begins with; `serve` answers requests until
the end; `end` kills and reaps all. After `freeze` the garbage collector no longer looks at the
existing objects, so that a rank's collections do not write to the pages that it shares with its
siblings.

The controller itself does not fork ranks, for three reasons. The zygote has one thread, so a fork
copies no lock that another thread holds; it is small to fork, since it has no data of tests; and as
the parent of all ranks, and the reaper of their orphans (PR_SET_CHILD_SUBREAPER), it finds every
process that a test leaves behind.

What happens when a process ends:

- A rank ends. SIGCHLD wakes the loop through a descriptor. The zygote waits for the rank without
  reaping it (WNOWAIT): while the rank is a zombie, the kernel gives its process id and group id to
  no other process. The zygote kills the rank's orphans, then its group; then it reaps the rank and
  reports the end. It spares the resource trackers of multiprocessing for a while, so that they can
  free shared memory.
- The controller ends. Its socket closes, and the kernel also sends SIGTERM (PR_SET_PDEATHSIG).
  Either way `serve` returns, and `end` kills every rank and all programs that ranks have started.
- The zygote is killed. The kernel kills the ranks (PR_SET_PDEATHSIG). The controller reads the end
  of file, fails the running worlds, and has `orphan_guard` find the programs that the ranks had
  started.
- The zygote is stopped by a test. Nothing continues it, so the controller kills it when it looks.

Assumes Linux, and that the modules imported here start no thread (see `NEVER_PRELOAD`). Guarantees
that when the zygote ends by itself no descendant of a rank outlives it, unless the kernel takes
longer than `CLOSE_S` to end one. When it is killed, `orphan_guard` finds the descendants that still
have a rank's token in their environment, or a rank's file open.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import stat
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pytest_dcp._harness.launchers.preloading import NEVER_PRELOAD
from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import (
    OWN_SIGNALS,
    RANK_VARIABLE,
    RankFds,
    RankLaunch,
)
from pytest_dcp._harness.rank import interpreter_exit
from pytest_dcp.garbage_collection import collector_paused

CLOSE_S = 5.0
TRACKER_LOOK_MS = 250
MESSAGE_BYTES = 1 << 16
RankMain = Callable[[RankLaunch, RankFds], NoReturn]


class Zygote:
    """Forks, signals and reaps, on request."""

    rank_main: RankMain

    def __init__(
        self,
        control: socket.socket,
        prepare: Callable[[], RankMain],
        modules: Sequence[str],
    ) -> None:
        self.control = control
        self.prepare = prepare
        self.modules = modules
        """To import before the first rank is forked; see `preloading`."""
        self.ranks: dict[int, RankLaunch] = {}
        """By process id, the ranks not reaped yet."""
        self.trackers: dict[int, float] = {}
        """By process id, resource trackers whose rank has ended, and when they must end."""
        self.stopped = False
        self.wake_r, self.wake_w = socket.socketpair()
        self.wake_r.setblocking(False)
        self.wake_w.setblocking(False)
        self.first_world: int | None = None
        self.collapsed = False
        """Whether the frozen heap is on huge pages."""

    def settle(self, parent: int, detach: bool) -> None:
        """Leave the controller's process group, signals and pipes."""
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self.stop)
        linux.die_with_parent(parent, signal.SIGTERM)
        linux.adopt_orphans()
        if detach:
            _detach({self.control.fileno(), self.wake_r.fileno(), self.wake_w.fileno()})
        signal.signal(signal.SIGCHLD, _on_child)
        signal.set_wakeup_fd(self.wake_w.fileno(), warn_on_full_buffer=False)

    def warm_up(self) -> None:
        """Import the modules that ranks need, and make forking cheap."""
        with collector_paused():
            for name in self.modules:
                self.say({"importing": name})
                self.preload([name])
        import torch

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        self.rank_main = self.prepare()
        self.freeze()
        self.say({"ready": True})

    def freeze(self) -> None:
        """Exempt existing objects from garbage collection, and put them on huge pages from the next
        world on.

        Ranks start from this state: at exit they run only their own handlers.
        """
        from pytest_dcp._torch_internals.global_state import clear_dynamo_caches

        interpreter_exit.forget_inherited()
        linux.flush_c_streams()
        clear_dynamo_caches()
        gc.collect()
        gc.freeze()
        self.collapsed = False

    def collapse_heap_once(self, world: int) -> None:
        """Put the frozen heap on huge pages, unless this is the first world.

        Forking is cheaper afterwards, but that pays only in sessions with more than one world.
        """
        if self.first_world is None:
            self.first_world = world
        elif world != self.first_world and not self.collapsed:
            linux.collapse_memory()
            self.collapsed = True

    def preload(self, modules: Sequence[str]) -> None:
        """Import modules; one that fails here will fail in the rank, with its reason."""
        for name in modules:
            if not name.startswith(NEVER_PRELOAD) and name not in sys.modules:
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(name)

    def serve(self) -> None:
        """Serve requests until the controller closes its end."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.wake_r, select.POLLIN)
        while not self.stopped:
            ready = {fd for fd, _ in poll.poll(TRACKER_LOOK_MS if self.trackers else None)}
            self.end_trackers()
            if self.wake_r.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self.wake_r.recv(4096)
                self.reap()
            if self.control.fileno() in ready and not self.handle_request():
                return

    def stop(self, signum: int, frame: object) -> None:
        """SIGTERM: end soon. Raising here could interrupt an `end` that has already begun."""
        self.stopped = True

    def handle_request(self) -> bool:
        """Carry out one request; False at end of file."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 8)
        except ConnectionResetError:
            return False  # the controller ended before it had read everything
        if not data:
            return False
        request = json.loads(data)
        match request["op"]:
            case "fork":
                self.fork(RankLaunch.from_json(request["order"]), RankFds(*fds))
            case "signal":
                self.signal(request["world"], request["rank"], request["signum"])
            case "preload":
                self.preload(request["modules"])
                self.freeze()
                self.say({"ready": True})
        return True

    def fork(self, order: RankLaunch, fds: RankFds) -> None:
        """Fork a rank; in the child this never returns."""
        self.collapse_heap_once(order.world)
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                for signum in (signal.SIGCHLD, signal.SIGTERM):
                    signal.signal(signum, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.setpgid(0, 0)
                linux.die_with_parent(zygote)
                for ours in (self.control, self.wake_r, self.wake_w):
                    ours.close()
                self.rank_main(order, fds)
            finally:
                os._exit(70)  # rank_main does not return; never unwind into the zygote's loop
        with contextlib.suppress(OSError):  # the child has done it, or has ended
            os.setpgid(pid, pid)
        self.ranks[pid] = order
        for fd in fds.all():
            os.close(fd)

    def signal(self, world: int, rank: int, signum: int) -> None:
        """Signal a rank that is not reaped yet, and its group, except for `OWN_SIGNALS`."""
        for pid, order in self.ranks.items():
            if (order.world, order.rank) == (world, rank):
                if signum == signal.SIGKILL:
                    linux.kill_group(pid)
                    continue
                if signum in OWN_SIGNALS:
                    linux.signal_main_thread(pid, signum)
                    continue
                _signal_group(pid, signum)
                os.kill(pid, signum)

    def reap(self) -> None:
        """Reap ended ranks with the processes that they left behind, and inform the controller."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, linux.ANY_CHANGE | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            if found.si_code in linux.HALTS:
                os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
                if pid in self.ranks:
                    self.tell(self.ranks[pid], {"stopped": linux.HALTS[found.si_code]})
                continue
            if pid not in self.ranks:
                os.waitpid(pid, 0)
                self.trackers.pop(pid, None)
                continue
            # Not reaped yet, so no other process can have its process id or its group's.
            spared = self.spare_trackers(pid)
            leaked_processes = self.kill_leaked(pid)
            if not spared:
                _signal_group(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            commands = [leaked[:200] for leaked in leaked_processes[:20]]
            self.tell(self.ranks.pop(pid), {"status": code, "leaked_processes": commands})

    def spare_trackers(self, rank_pid: int) -> bool:
        """Give an ended rank's resource trackers time to free its leftovers. Returns whether it has
        any.
        """
        found = [
            pid
            for pid in linux.children()
            if pid not in self.ranks
            and pid not in self.trackers
            and linux.TRACKER in linux.command_of(pid)
            and self.belongs(pid, rank_pid)
        ]
        self.trackers.update(dict.fromkeys(found, time.monotonic() + linux.TRACKER_S))
        return bool(found)

    def end_trackers(self) -> None:
        """Kill the trackers whose time is up: a process that we did not find holds their pipe."""
        for pid, deadline in self.trackers.items():
            if time.monotonic() >= deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def kill_leaked(self, rank_pid: int) -> list[str]:
        """Kill the orphans of a rank that ended; returns them as `pid (command)`."""
        found: list[str] = []
        while True:
            orphans = [
                pid
                for pid in linux.children()
                if pid not in self.ranks
                and pid not in self.trackers
                and linux.state_of(pid) not in ("Z", "X", "")
                and self.belongs(pid, rank_pid)
            ]
            if not orphans:
                return found
            for pid in orphans:
                found.append(f"{pid} ({linux.command_of(pid)})")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def belongs(self, orphan: int, rank_pid: int) -> bool:
        """Whether this rank started an orphan; the last rank gets all remaining ones."""
        return (
            len(self.ranks) == 1
            or linux.group_of(orphan) == rank_pid
            or linux.variable_of(orphan, RANK_VARIABLE) == self.ranks[rank_pid].token
        )

    def tell(self, order: RankLaunch, what: dict[str, Any]) -> None:
        """Report a rank's end or stop."""
        self.say({"world": order.world, "rank": order.rank, **what})

    def say(self, message: dict[str, Any]) -> None:
        """Send a message to the controller."""
        with contextlib.suppress(OSError):  # the controller is gone: end() follows
            self.control.send(json.dumps(message).encode())

    def end(self) -> None:
        """Kill and reap everything; trackers after the ranks are gone, unless they end by then."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in self.ranks:
            linux.kill_group(pid)
        linux.await_trackers(linux.children())
        deadline = time.monotonic() + CLOSE_S
        while (pids := linux.children()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.0005)


def _on_child(signum: int, frame: object) -> None:
    """Does nothing: only the wake-up descriptor matters."""


def _signal_group(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def _detach(keep: set[int]) -> None:
    """Point the inherited pipes and sockets at /dev/null.

    Closing them would let a later file take their numbers while xdist's objects still hold them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd in keep or fd == null or fd <= 2:
            continue
        with contextlib.suppress(OSError):
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                os.dup2(null, fd, inheritable=False)
    os.close(null)
