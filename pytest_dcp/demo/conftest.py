"""The summary at the end of the tour: the processes that it started, their time, and a failure
report.

`pytest_dcp_world_started` is a hook of pytest_dcp; the others are pytest's.
"""

import statistics

SHOWN = "test_one_rank_raises_while_the_others_wait_for_it"


class Tour:
    """Counts processes and their time, and prints them at the end."""

    def __init__(self):
        self.ready_s = {}
        """World size -> seconds until the ranks of each such world were ready."""
        self.failure = None

    def pytest_dcp_world_started(self, size, ready_s):
        self.ready_s.setdefault(size, []).append(ready_s)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.nodeid.endswith(SHOWN):
            self.failure = report

    def pytest_terminal_summary(self, terminalreporter):
        tell = terminalreporter
        if self.ready_s:
            tell.section("what happened")
            worlds = sum(map(len, self.ready_s.values()))
            processes = sum(size * len(times) for size, times in self.ready_s.items())
            tell.line(f"{worlds} worlds were started, {processes} processes in all, one per rank.")
            for size, times in sorted(self.ready_s.items()):
                ready_ms = statistics.median(times) * 1000
                tell.line(f"  {len(times)} of size {size}, ready in {ready_ms:.0f} ms (median)")
            tell.line("A test passed when it had passed in every process of its world.")
        if self.failure is not None and hasattr(self.failure.longrepr, "toterminal"):
            tell.section("an example failure (expected here: test_failure_report.py)")
            self.failure.toterminal(tell._tw)


def pytest_configure(config):
    config.pluginmanager.register(Tour(), "tour")
