"""Printing: tables for people, JSON for machines, one line for errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 160  # of output that does not go to a terminal


def print_error(message: str) -> None:
    """Write an error to stderr as one line."""
    typer.echo(f"vlmprune: {' '.join(message.split())}", err=True)


def print_json(data: Any) -> None:
    """Write JSON and nothing else to stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, right: Iterable[str] = ()
) -> None:
    """Print a table; ``right`` names the columns to align to the right. None becomes a dash."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if value is None else str(value)) for value in row))
    _console().print(table)


def print_text(text: str = "") -> None:
    """Print text as it is."""
    typer.echo(text)


def yes_no(value: bool) -> str:
    """``yes`` or ``no``."""
    return "yes" if value else "no"


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
