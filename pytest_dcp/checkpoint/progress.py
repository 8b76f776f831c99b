"""A ready-made bar for long saves and loads, on rich (the extra `progress`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_dcp.checkpoint.store.observe import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

__all__ = ["Progress", "progress_bar"]


@contextmanager
def progress_bar(
    *, rank: int | None = 0, console: Console | None = None
) -> Iterator[Callable[[Progress], None]]:
    """What to pass as `progress=`; the bar is shown inside the `with`.

        with progress_bar() as bar:
            dcp.save(state_dict, checkpoint_id=folder, progress=bar)

    rank: the only rank that shows one; None: every rank shows its own. Raises ImportError, saying
    what to install, where rich is missing.
    """
    try:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar
    except ImportError as error:
        raise ImportError(
            "the progress bar needs rich: pip install 'pytest-dcp[progress]', "
            "or pass a function of your own as progress="
        ) from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        tasks: dict[tuple[str, int], TaskID] = {}

        def show(state: Progress) -> None:
            if rank is not None and state.rank != rank:
                return
            key = (state.operation, state.rank)
            if key not in tasks:
                tasks[key] = bar.add_task(f"{state.operation}, rank {state.rank}")
            bar.update(tasks[key], completed=state.done_bytes, total=state.total_bytes or None)

        yield show
