"""The session of an outer rank other than 0: after its collection it is a seat, without a report.

Enters: the collected session. Leaves: the exit code that the controller gives.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_dcp._harness.controller.options import Options
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.launchers.spawn import SpawnLauncher
from pytest_dcp._harness.outer.environment import OuterLaunch
from pytest_dcp._harness.outer.meeting import LaunchStore, connect, interface_of
from pytest_dcp._harness.outer.seat import Seat
from pytest_dcp._harness.outer.seat_link import SeatLink
from pytest_dcp._harness.outer.seat_messages import (
    CONCLUDE_S,
    SeatJoin,
    encode_seat_message,
)
from pytest_dcp._harness.protocol.launcher import Launcher
from pytest_dcp._pytest_internals import set_base_of_tmp_path, xml_key

REPORTERS = ("lfplugin", "nfplugin", "stepwiseplugin")
"""pytest's plugins that keep results for the next session: only the controller's counts."""

TERMINATION_S = 25
"""Between a launcher's SIGTERM and a seat's end; torchrun and srun send SIGKILL after 30 s."""


def serve_seat(
    session: pytest.Session,
    options: Options,
    launch: OuterLaunch,
    make_join: Callable[..., SeatJoin],
) -> tuple[int, SeatLink]:
    """Serve as a seat until the session is over: the exit code, and the connection, whose end is
    the end of the controller's process.

    Raises `ControllerLostError` without a verdict, `MeetingError` when rank 0 cannot be found.
    """
    config = session.config
    if base := config.getoption("basetemp", None):
        # Each session empties its own; the controller has the one that was named.
        set_base_of_tmp_path(config, Path(f"{os.path.abspath(base)}-rank{launch.rank}"))
    harness = Harness(session, options)

    def replace_launcher(lost: Launcher) -> Launcher:
        lost.close()
        return SpawnLauncher.start(session, harness.folder)

    try:
        launcher = harness.launcher()  # forks the zygote, before any thread
        _take_reporters_out(config)
        address = LaunchStore(launch).await_address()
        sock = connect(address, launch)
        interface = interface_of(sock.getsockname()[0].removeprefix("::ffff:"))
        link = SeatLink(sock)
        seat = Seat(
            link,
            launcher,
            replace_launcher,
            number=launch.rank,
            folder=harness.folder,
            interface=interface,
            device_index=launch.local_rank or 0,
        )
        join = replace(make_join(address.token), sees_folder=Path(address.probe).exists())
        link.send(encode_seat_message(join))
        for note in harness.notes:
            seat.note(note.removeprefix("pytest_dcp: "))
        # Both reach every process of the launcher; the controller says how the session ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _await_verdict)
        return seat.serve(), link
    finally:
        harness.close()


def _await_verdict(signum: int, frame: object) -> None:
    """Leave the controller time to tear down in the ranks; then end by SIGALRM."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(TERMINATION_S)


def await_controllers_end(link: SeatLink, code: int) -> None:
    """Wait until the controller's process has ended; a launcher's SIGTERM does not change the exit
    code.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    link.socket.settimeout(CONCLUDE_S)
    try:
        while link.socket.recv(4096):
            pass
    except OSError:
        return


def _take_reporters_out(config: pytest.Config) -> None:
    """Have this session write no files about results: it has none."""
    manager = config.pluginmanager
    for name in REPORTERS:
        if manager.has_plugin(name):
            manager.unregister(name=name)
    stash: Any = config.stash
    if (xml := stash.get(xml_key, None)) is not None:
        del stash[xml_key]
        manager.unregister(xml)
    measuring: Any = manager.getplugin("_cov")
    if measuring is not None:
        # The ranks save their measurements, and pytest-cov combines them in the controller.
        measuring.cov_controller = None
        measuring.options.cov_report, measuring.options.cov_fail_under = {}, None
