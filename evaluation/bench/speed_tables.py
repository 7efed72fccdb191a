"""Measured speeds from the benchmarks' CSV files as Markdown tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]


def read_rows(path: Path) -> list[Row]:
    """Rows of a benchmark's CSV file, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tower_table(rows: Sequence[Row]) -> str:
    """Rows of ``tower.csv``: vision towers with a merge inside, and the policy that chooses behind it."""
    header = (
        "tower", "policy", "left by `tome`", "merged in", "images", "dense ms", "reduced ms (20 to 80 %)", "speed-up",
        "1 / FLOPs",
    )  # fmt: skip
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], row["policy"], row["first_blocks"])):
        last = row["first_blocks"] and int(row["first_blocks"]) - 1
        blocks = "all blocks" if last == "" else f"blocks 0 to {last}" if last else "block 0"
        median, low, high = (_rounded(row[f"reduced_{name}"]) for name in ("ms", "q20_ms", "q80_ms"))
        cells = (row["model"], row["policy"], f"{100 * float(row['keep']):.4g} %", blocks, row["images"])
        cells += (_rounded(row["dense_ms"]), f"{median} ({low} to {high})", f"{float(row['speed_up']):.2f}")
        lines.append((*cells, f"{1 / float(row['flops_share']):.2f}"))
    return f"{_table(header, lines, 4)}\n\n{_circumstances(rows, 'transformers')}"


def vit_table(rows: Sequence[Row]) -> str:
    """Rows of ``vit.csv``: ToMe inside timm classifiers beside a textbook version."""
    header = (
        "model", "r", "batch", "dense images/s", "ours", "textbook", "1 / FLOPs", "ours, share of it",
        "textbook, share of it",
    )  # fmt: skip
    lines = []
    for row in rows:
        speeds = (f"{row[f'{name}_images_s']} ({float(row[f'speedup_{name}']):.2f}x)" for name in ("ours", "textbook"))
        shares = (f"{100 * float(row[f'share_{name}']):.1f} %" for name in ("ours", "textbook"))
        cells = (row["model"], row["r"], row["batch"], row["dense_images_s"], *speeds)
        lines.append((*cells, f"{float(row['flop_ratio']):.2f}", *shares))
    return f"{_table(header, lines, 1)}\n\n{_circumstances(rows, 'timm')}"


def _rounded(milliseconds: str) -> str:
    value = float(milliseconds)
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    ruler = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ruler, *lines))


def _circumstances(rows: Sequence[Row], library: str) -> str:
    found = {
        f"Measured {row['date']} on {row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, "
        f"{library} {row[library]}."
        for row in rows
    }
    return " ".join(sorted(found))
