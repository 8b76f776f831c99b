"""The session of outer rank 0: an ordinary one, except that seats start its ranks.

Enters: the collected session. Leaves: the same reports as of worlds on this machine, and at the end
the exit code for all seats.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable

import pytest

from pytest_dcp._harness.controller.leases import Lease
from pytest_dcp._harness.controller.options import Options
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.launchers.spawn import SpawnLauncher
from pytest_dcp._harness.outer.agreement import find_disagreement
from pytest_dcp._harness.outer.environment import INSIDE_VARIABLE, OuterLaunch
from pytest_dcp._harness.outer.meeting import (
    ControllerAddress,
    LaunchStore,
    interface_of,
    listen,
)
from pytest_dcp._harness.outer.seat import Seat
from pytest_dcp._harness.outer.seat_hub import SeatHub
from pytest_dcp._harness.outer.seat_launcher import SeatLauncher
from pytest_dcp._harness.outer.seat_link import SeatLink
from pytest_dcp._harness.outer.seat_messages import (
    CONCLUDE_S,
    JOIN_S,
    SeatJoin,
    Verdict,
    encode_seat_message,
)
from pytest_dcp._harness.protocol.launcher import Launcher
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._harness.world.terminal import Terminal
from pytest_dcp.errors import WorldError
from pytest_dcp.rank_names import ranks_text

MakeJoin = Callable[[str, bool], SeatJoin]
"""The token, and whether the controller's folder is seen -> this process's first message."""


class OuterHarness(Harness):
    """A `Harness` whose launcher has the ranks started by seats."""

    def __init__(
        self, session: pytest.Session, options: Options, launch: OuterLaunch, make_join: MakeJoin
    ) -> None:
        self.launch = launch
        self._make_join = make_join
        self._seats: SeatLauncher | None = None
        self._store: LaunchStore | None = None
        self._hub: SeatHub | None = None
        self._own_seat: threading.Thread | None = None
        super().__init__(session, options)

    def _terminal(self) -> Terminal:
        return Terminal(
            missing=f"ranks of {self.launch.launcher} have no terminal for a debugger; run the "
            "test without it"
        )

    def launcher(self) -> Launcher:
        """The seats. The first call waits until all have joined.

        Raises `pytest.UsageError` when a rank does not come, or collected other tests.
        """
        if self._seats is None:
            local = super().launcher()  # forks the zygote, before any thread
            self._launcher = self._seats = self._meet(local)
        return self._seats

    def _meet(self, local: Launcher) -> SeatLauncher:
        self._store = store = LaunchStore(self.launch)
        self._refuse_restart(store)
        listener, hosts = listen(self.launch)
        self._hub = hub = SeatHub(self.launch.size, self.launch.launcher, listener)
        self._own_seat = self._start_own_seat(local, interface_of(_address_of(hosts[0])))
        hub.start()
        probe = self.folder / f"seen-{hub.token}"
        probe.touch()
        port = listener.getsockname()[1]
        store.publish(ControllerAddress(hosts, port, hub.token, str(probe)))
        os.environ[INSIDE_VARIABLE] = str(os.getpid())
        self._await_seats()
        if problem := find_disagreement(hub.joins()):
            raise pytest.UsageError(problem)
        master_addr = "127.0.0.1" if self.launch.is_local else hosts[0]
        return SeatLauncher(
            hub, store_url=store.url, master_addr=master_addr, end_own_seat=self._end_own_seat
        )

    def _refuse_restart(self, store: LaunchStore) -> None:
        """torchrun restarts all ranks when one exits with a code other than 0: do not run a suite
        again that has failed.
        """
        code = store.earlier_verdict() if self.launch.attempt else None
        if code is not None:
            raise pytest.exit.Exception(
                f"torchrun has restarted a session that ended with exit code {code}; its tests are "
                "not run again (use --max-restarts=0)",
                returncode=code,
            )

    def _start_own_seat(self, local: Launcher, interface: str) -> threading.Thread:
        """This process's own seat, in a thread."""
        if self._hub is None:
            raise WorldError("the hub is not there yet")
        ours, theirs = socket.socketpair()
        self._hub.adopt(ours)
        link = SeatLink(theirs)
        link.send(encode_seat_message(self._make_join(self._hub.token, True)))
        seat = Seat(
            link,
            local,
            self._replace_local,
            number=0,
            folder=self.folder,
            interface=interface,
            device_index=self.launch.local_rank or 0,
        )
        thread = threading.Thread(target=_serve, args=(seat, link), name="dcp-seat", daemon=True)
        thread.start()
        return thread

    def _replace_local(self, lost: Launcher) -> Launcher:
        lost.close()
        return SpawnLauncher.start(self.session, self.folder)

    def _end_own_seat(self) -> None:
        if self._hub is not None and self._own_seat is not None:
            self._hub.send([0], Verdict(0))
            self._own_seat.join(CONCLUDE_S)

    def _await_seats(self) -> None:
        hub = self._hub
        if hub is None:
            return
        deadline = time.monotonic() + JOIN_S
        with hub.changed:
            while missing := hub.ranks_to_join():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise pytest.UsageError(
                        f"{ranks_text(missing)} of {self.launch.launcher} did not join rank 0's "
                        f"session within {JOIN_S:g} s: did all ranks collect the same tests?"
                    )
                hub.changed.wait(min(left_s, 0.5))  # so that Ctrl-C is heard
        for rank, lost in hub.lost_seats().items():
            raise pytest.UsageError(f"rank {rank}: {lost}")

    def _lease(self, spec: WorldSpec) -> Lease | None:
        """No lease: the outer launcher has placed the processes. Skips where GPUs are missing."""
        seats = self._seats
        if seats is None:
            return None
        seats.require(spec.size)
        if spec.device == "cuda":
            problem = seats.gpu_problem(spec.size, one_each=spec.backend == "nccl")
            if problem and self.options.require_gpus:
                raise pytest.fail.Exception(f"--dcp-require-gpus: {problem}", pytrace=False)
            if problem:
                raise pytest.skip.Exception(problem, _use_item_location=True)
        return None

    def check_end(self) -> None:
        """End the session also when a seat is lost: worlds need it."""
        self.print_notes()
        super().check_end()
        for rank, lost in sorted(self.lost_seats().items()):
            raise pytest.exit.Exception(
                f"rank {rank}: {lost}", returncode=pytest.ExitCode.TESTS_FAILED
            )

    def lost_seats(self) -> dict[int, str]:
        """How outer ranks were lost."""
        return self._hub.lost_seats() if self._hub is not None else {}

    def print_notes(self) -> None:
        """Print what seats have to say."""
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        for note in self._hub.take_notes() if self._hub is not None else ():
            if terminal is not None:
                terminal.ensure_newline()
                terminal.write_line(f"pytest_dcp: {note}")

    def conclude(self, code: int) -> None:
        """The report is written: all seats end with this exit code."""
        os.environ.pop(INSIDE_VARIABLE, None)
        self._end_own_seat()
        if self._hub is not None:
            self._hub.send(range(1, self.launch.size), Verdict(code))
            self._hub.close(CONCLUDE_S)
        if self._store is not None and code and self.launch.max_restarts:
            with contextlib.suppress(Exception):  # torchrun's store has ended, and will not restart
                self._store.keep_verdict(code)


def _serve(seat: Seat, link: SeatLink) -> None:
    try:
        seat.serve()
    except BaseException:  # noqa: BLE001 - the last frame of the thread: the session ends without it
        traceback.print_exc()
    finally:
        link.close()


def _address_of(host: str) -> str:
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][4][0])
    return host
