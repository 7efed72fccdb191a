"""The training part of a model card: `training.json` and `curve.csv` as Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune.core.errors import InputError
from vlmprune.evaluation.tables import MISSING

CURVE_ROWS = 12
AIDS = (
    "The vision tower was trained with dense labels of every patch (shape, colour, digit, position) and with "
    "a CLS token that predicts what is present. Its CLS attention and patch features say what stands where.",
    "The decoder was trained with attention supervision: some heads were rewarded for attending to the "
    "objects that a question asks about.",
)
AIDS_NOTE = (
    "These aids shape attention. They favour policies that read it, and every comparison of policies on this "
    "model has to be read with that in mind."
)


def read_training(folder: Path) -> Mapping[str, Any]:
    """The content of `training.json`, empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "training.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object.")
    return content


def training_aids(training: Mapping[str, Any]) -> list[str]:
    """What shaped attention in training, and what follows: the record's list, else that of the recipe."""
    given = training.get("training_aids", training.get("aids", AIDS))
    return ["\n".join(_bullets([given] if isinstance(given, str) else given)), AIDS_NOTE]


def training_facts(training: Mapping[str, Any]) -> list[str]:
    """The training record as nested bullet points."""
    if not training:
        return ["No training record (`training.json`) lies beside the weights."]
    return ["\n".join(_bullets({k: v for k, v in training.items() if k not in ("aids", "training_aids")}))]


def _bullets(value: Any, depth: int = 0) -> list[str]:
    pad = "  " * depth
    items = value.items() if isinstance(value, Mapping) else ((None, part) for part in value)
    lines = []
    for key, part in items:
        label = "" if key is None else f"{str(key).replace('_', ' ')}: "
        if isinstance(part, Mapping) or (isinstance(part, list) and any(isinstance(p, Mapping) for p in part)):
            lines += [f"{pad}- {label}".rstrip(), *_bullets(part, depth + 1)]
        else:
            shown = ", ".join(map(str, part)) if isinstance(part, list) else str(part)
            lines.append(f"{pad}- {label}{shown}")
    return lines


def curve_tables(path: Path) -> list[str]:
    """The training curve: per stage a table of a few evenly spaced evaluations."""
    if not path.is_file():
        return []
    stages: dict[str, dict[tuple[int, int, float], dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            moment = (int(row["step"]), int(row["images"]), float(row["seconds"]))
            stages.setdefault(row["stage"], {}).setdefault(moment, {})[row["metric"]] = row["value"]
    parts = ["### Curve"]
    for stage, moments in stages.items():
        chosen = _evenly(sorted(moments), CURVE_ROWS)
        metrics = list(dict.fromkeys(name for moment in chosen for name in moments[moment]))
        lines = [["step", "images", "minutes", *metrics], ["---:"] * (3 + len(metrics))]
        for moment in chosen:
            values = [moments[moment].get(name, MISSING) for name in metrics]
            lines.append([str(moment[0]), str(moment[1]), f"{moment[2] / 60:.1f}", *values])
        parts.append(f"Stage `{stage}`:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return parts


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
