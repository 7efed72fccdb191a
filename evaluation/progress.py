"""A progress bar on standard error, or nothing."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Progress:
    """Counts answers. Use as a context manager.

    Args:
        shown: False shows nothing and imports nothing.
        total: number of answers to come.
    """

    def __init__(self, shown: bool, total: int) -> None:
        self._shown, self._total = shown, total
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._shown:
            from rich import progress
            from rich.console import Console

            columns: list[Any] = [
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            ]
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def describe(self, text: str) -> None:
        """Say what runs now."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def advance(self, n: int) -> None:
        """Count `n` more answers."""
        if self._bar is not None:
            self._bar.advance(self._task, n)

    def extend(self, n: int) -> None:
        """Expect `n` more answers than before."""
        self._total += n
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)
