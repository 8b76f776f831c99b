"""A ready-made bar for long saves and loads, on rich (the extra `progress`)."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from pytest_dcp._engine.io.progress_observer import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["Progress", "ProgressBar", "progress_bar"]

COLUMNS = ("BarColumn", "DownloadColumn", "TransferSpeedColumn", "TimeRemainingColumn")


class ProgressBar:
    """What to pass as `progress=`; made by `progress_bar`.

    Saves and loads open it while they run, and close it when they end or fail. A `with` block keeps
    it open over several of them.
    """

    def __init__(self, rank: int | None, console: Console | None) -> None:
        try:
            from rich import progress
        except ImportError as error:
            raise ImportError(
                "the progress bar needs rich: pip install 'pytest-dcp[progress]', "
                "or pass a function of your own as progress="
            ) from error
        self._rich: Any = progress
        self._rank = rank
        self._console = console
        self._opened = 0
        self._bar: Any = None
        """Made at the first progress to show: a rank without a bar prints nothing."""
        self._tasks: dict[tuple[str, int], TaskID] = {}

    def __enter__(self) -> ProgressBar:
        self._opened += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._opened -= 1
        if not self._opened and self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks.clear()

    def __call__(self, state: Progress) -> None:
        """Show how far the operation has come."""
        if self._rank is not None and state.rank != self._rank:
            return
        with self:
            self._show(state)

    def _show(self, state: Progress) -> None:
        if self._bar is None:
            columns = [self._rich.TextColumn("{task.description}")]
            columns += (getattr(self._rich, name)() for name in COLUMNS)
            self._bar = self._rich.Progress(*columns, console=self._console)
            self._bar.start()
        key = (state.operation, state.rank)
        is_over = key in self._tasks and self._bar.tasks[self._tasks[key]].finished
        if key not in self._tasks or (is_over and state.done_bytes == 0):
            self._tasks[key] = self._bar.add_task(f"{state.operation}, rank {state.rank}")
        task = self._tasks[key]
        self._bar.update(task, completed=state.done_bytes, total=state.total_bytes or None)


def progress_bar(*, rank: int | None = 0, console: Console | None = None) -> ProgressBar:
    """A bar to pass as `progress=`.

        dcp.save(state_dict, checkpoint_id=folder, progress=progress_bar())

    rank: the only rank that shows one; None: every rank shows its own. Raises ImportError, saying
    what to install, if rich is missing.
    """
    return ProgressBar(rank, console)
