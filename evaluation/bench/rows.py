"""Rows of a benchmark's CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def append_row(path: Path, row: Mapping[str, object], columns: Sequence[str]) -> None:
    """Add a row to the CSV file, with a header if the file is new; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
