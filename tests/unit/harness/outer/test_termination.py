"""A handler of SIGTERM, and the children of its process."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal, time
from pytest_dcp._harness.outer.termination import TERMINATION

came = []
TERMINATION.install(lambda signum, frame: came.append(signum))
statuses = set()
for _ in range(100):
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    os.kill(pid, signal.SIGTERM)  # it may not have begun
    statuses.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(statuses)
os.kill(os.getpid(), signal.SIGTERM)
print(came == [signal.SIGTERM], signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
TERMINATION.remove()
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


def test_children_are_terminated_at_once_and_the_process_is_not() -> None:
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert ran.stdout.splitlines() == ["{-15}", "True False", "True"]
