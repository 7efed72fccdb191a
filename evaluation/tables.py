"""One table for every place that shows results: command line, model card, README, quickstart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmprune.evaluation.schema import ALL_FAMILIES, DENSE, Keep, ResultRow
from vlmprune.evaluation.summary import HEADLINE

MISSING = "–"
CALIBRATED = "calibrated"
"""Shown for a policy that used an artefact."""


def render_table(rows: Sequence[ResultRow], families: Sequence[str] | None = None, title_tasks: bool = True) -> str:
    """Markdown tables, one per model and task: a line per policy and budget.

    Args:
        rows: any rows of results files.
        families: accuracy columns; None shows `all` (or `headline` and `all` where there is a headline row).
            Intervals, difference to random and times stand beside the first of them.
        title_tasks: write model and task above each table.

    Returns:
        Markdown. What was not measured is a dash.
    """
    parts = []
    for model, task in dict.fromkeys((row.model, row.task) for row in rows):
        chosen = [row for row in rows if (row.model, row.task) == (model, task)]
        if title_tasks:
            parts.append(_title(model, task, chosen))
        parts.append(_table(chosen, families))
    return "\n\n".join(parts)


def render_grid(rows: Sequence[ResultRow]) -> str:
    """One table of policies x budgets, as Markdown: percent right, and in brackets the visual tokens per image on
    average over the decoder layers, which is what a policy that cuts inside the decoder costs.

    Args:
        rows: of one model and task. Shares are columns, falling (of a composition the product of its shares);
            ``random`` is the mean over its seeds with lowest and highest. The headline families count where there is
            a headline, else all questions.
    """
    family = default_families(rows)[0]
    chosen = [(row, share_of(row.keep)) for row in rows if row.family == family]
    shares = sorted({share for _, share in chosen if share is not None}, reverse=True)
    names = sorted({_name_in_grid(row) for row, share in chosen if share is not None} - {DENSE})
    lines = [["policy", *map(keep_text, shares)], ["---", *["---:"] * len(shares)]]
    for name in (DENSE, *names):
        cells = [[row for row, of in chosen if (_name_in_grid(row), of) == (name, share)] for share in shares]
        lines.append([name, *map(_grid_cell, cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share_of(keep: Keep) -> float | None:
    """The share of the tokens that a budget leaves, None where it is none of a share or a list of shares."""
    if isinstance(keep, list):
        parts = [share_of(part) for part in keep]
        return None if None in parts else round(math.prod(part for part in parts if part is not None), 4)
    return keep if isinstance(keep, float) else None


def _name_in_grid(row: ResultRow) -> str:
    settings = _settings(row)
    return row.policy.replace("_", "-") + (f" ({', '.join(settings)})" if settings else "")


def _settings(row: ResultRow) -> list[str]:
    return _shown(row.params)


def _shown(params: Mapping[str, Any]) -> list[str]:
    """Parameters as text; those of a composition's members, which stand under their names, without these."""
    found: list[str] = []
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += _shown(value)
        else:
            found.append(CALIBRATED if name == "artefact" else f"{name}={value}")
    return found


def _grid_cell(rows: Sequence[ResultRow]) -> str:
    if not rows:
        return MISSING
    if rows[0].policy == DENSE:  # measured once per budget, on the same questions
        rows = rows[:1]
    accuracies = [row.accuracy for row in rows]
    text = percent(sum(accuracies) / len(rows))
    if len(rows) > 1:
        text += f", {percent(min(accuracies))} to {percent(max(accuracies))}"
    return f"{text} ({_number(rows[0].mean_kept_layers)})"


def default_families(rows: Sequence[ResultRow]) -> list[str]:
    """The accuracy columns that are shown without a choice."""
    return [name for name in (HEADLINE, ALL_FAMILIES) if any(row.family == name for row in rows)]


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A share as percent without the unit."""
    return MISSING if value is None else f"{100 * value:{'+' if sign else ''}.{digits}f}"


def keep_text(keep: Keep) -> str:
    """A budget as a person writes it: `22 %` or `49 tokens`."""
    if keep is None:
        return MISSING
    if isinstance(keep, list):
        return ", ".join(map(keep_text, keep))
    if isinstance(keep, float):
        return f"{100 * keep:.4g} %"
    return f"{keep} tokens" if isinstance(keep, int) else keep


def _title(model: str, task: str, rows: Sequence[ResultRow]) -> str:
    largest = max(rows, key=lambda row: row.n)
    return f"**{model}, {task}** ({largest.n} questions on {largest.n_images} images)"


def _table(rows: Sequence[ResultRow], families: Sequence[str] | None) -> str:
    families = list(families) if families else default_families(rows)
    accuracies = [f"{name} (95 % interval)" if i == 0 else name for i, name in enumerate(families)]
    header = [
        "policy",
        "keep",
        *accuracies,
        "vs dense",
        "vs random",
        "tokens",
        "mean over layers",
        "prefill ms (dense)",
        "KV kB",
    ]
    lines = [header, ["---", "---:", *["---:"] * (len(header) - 2)]]
    for group in _by_cell(rows):
        lines.append(_line(group, families))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_cell(rows: Sequence[ResultRow]) -> list[dict[str, ResultRow]]:
    """Family -> row, per policy, budget and seed, in the order of the rows."""
    groups: dict[str, dict[str, ResultRow]] = {}
    for row in rows:
        key = f"{row.policy} {row.params} {row.keep!r} {row.seed} {row.stamp.weight_hash} {row.stamp.started}"
        groups.setdefault(key, {})[row.family] = row
    return list(groups.values())


def _line(group: dict[str, ResultRow], families: Sequence[str]) -> list[str]:
    some = next(iter(group.values()))
    first = group.get(families[0])
    whole = group.get(ALL_FAMILIES, some)  # tokens and times belong to all questions
    accuracies = [percent(group[name].accuracy) if name in group else MISSING for name in families]
    if first is not None:
        accuracies[0] += f" ({percent(first.ci_low)} to {percent(first.ci_high)})"
    difference = MISSING
    if first is not None and first.diff_random is not None:
        difference = percent(first.diff_random, sign=True)
        if first.diff_ci_low is not None:
            difference += f" ({percent(first.diff_ci_low, sign=True)} to {percent(first.diff_ci_high, sign=True)})"
    return [
        _name(some),
        MISSING if some.policy == DENSE else keep_text(some.keep),
        *accuracies,
        percent(None if first is None else first.retention),
        difference,
        _number(whole.mean_kept_tokens),
        _number(whole.mean_kept_layers),
        _prefill(whole),
        MISSING if whole.kv_bytes is None else f"{whole.kv_bytes / 1000:.1f}",
    ]


def _name(row: ResultRow) -> str:
    settings = _settings(row)
    if row.seed is not None:
        settings.append(f"seed {row.seed}")
    return row.policy.replace("_", "-") + (f" ({', '.join(settings)})" if settings else "")


def _prefill(row: ResultRow) -> str:
    """The time, and behind it the dense time measured in turns with it."""
    if row.prefill_ms is None:
        return MISSING
    beside = "" if row.policy == DENSE or row.prefill_ms_dense is None else f" ({row.prefill_ms_dense:.1f})"
    return f"{row.prefill_ms:.1f}{beside}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}".removesuffix(".0")
