"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(shown: bool, total: int, text: str) -> Iterator[Callable[[int, str], None] | None]:
    """Yields ``advance(done, text)``, or None where nothing is shown.

    Args:
        shown: False where nobody looks. total: steps. text: shown before the first step.
    """
    if not shown:
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)

        def advance(done: int, text: str) -> None:
            bar.update(task, completed=done, description=text)

        yield advance
