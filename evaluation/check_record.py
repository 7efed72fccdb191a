"""The part of a model card that tells accuracy by resolution: `check.json` as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmprune.core.errors import InputError
from vlmprune.evaluation.statistics import wilson
from vlmprune.evaluation.tables import MISSING, percent

INTRO = (
    "Measured by `python -m vlmprune.embedded.qwen_check` with stock transformers, float32, each picture at its own "
    "size; scenes differ between sizes. Percent right by exact match, 95 % Wilson intervals. *Text only*: the same "
    "questions in a prompt without an image."
)


def resolution_tables(folder: Path) -> list[str]:
    """Accuracy per family and picture size, empty where `check.json` is missing or has no counts.

    Raises:
        InputError: the file is damaged.
    """
    content = read_check(folder)
    sizes = {name: rows for name, rows in content.get("scenes", {}).items() if _has_counts(rows)}
    if not sizes:
        return []
    parts = ["## Accuracy by resolution", f"{INTRO} Question seed {content.get('seed')}."]
    parts += [_table(f"scenes, {name} pixels", rows) for name, rows in sizes.items()]
    if _has_counts(content.get("easy_vqa_test")):
        parts.append(_table("easy_vqa, first questions of the public test split", content["easy_vqa_test"]))
    weak = [f"{family} ({name})" for name, rows in sizes.items() for family, row in rows.items() if _near_blind(row)]
    if weak:
        parts.append(f"Not clearly above the text-only score (the intervals touch): {', '.join(weak)}.")
    return parts


def read_check(folder: Path) -> dict[str, Any]:
    """Content of a model's `check.json`, empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "check.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _has_counts(rows: Any) -> bool:
    return isinstance(rows, Mapping) and isinstance(rows.get("all"), Mapping) and "right" in rows["all"]


def _near_blind(row: Mapping[str, int]) -> bool:
    if "right_text_only" not in row:
        return False
    return wilson(row["right"], row["n"])[0] <= wilson(row["right_text_only"], row["n"])[1]


def _table(title: str, rows: Mapping[str, Mapping[str, int]]) -> str:
    lines = ["| family | questions | dense | text only |", "| --- | ---: | ---: | ---: |"]
    for family in sorted(rows, key=lambda name: name != "all"):
        row = rows[family]
        low, high = wilson(row["right"], row["n"])
        blind = percent(row["right_text_only"] / row["n"]) if "right_text_only" in row else MISSING
        shown = f"{percent(row['right'] / row['n'])} ({percent(low)} to {percent(high)})"
        lines.append(f"| {family} | {row['n']} | {shown} | {blind} |")
    return f"**{title}**\n\n" + "\n".join(lines)
