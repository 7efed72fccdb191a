"""The VTC-Bench filter: how a policy does on questions that need more than a smaller image.

Source: "Are We Using the Right Benchmark", arXiv 2510.07143, section 3.4. Questions that the dense model
answers are
split by whether a plainly downsampled image is enough: group A (difficult, downsampling fails) and group B
    (simple).
A policy's score is its accuracy on group A. Groups depend on the downsampling factor, that is on the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmprune.core.errors import InputError
from vlmprune.evaluation.schema import SampleRow
from vlmprune.evaluation.statistics import wilson


@dataclass(frozen=True)
class VTCGroups:
    """Questions that the dense model answers, sorted: `a` where downsampling fails, `b` where it suffices."""

    a: tuple[str | int, ...]
    b: tuple[str | int, ...]


@dataclass(frozen=True)
class GroupScore:
    """Accuracy on a group, in percent, with its Wilson interval; None where the group is empty."""

    total: int
    correct: int
    accuracy: float | None
    ci_low: float | None
    ci_high: float | None


def split_groups(dense: Mapping[str | int, bool], downsample: Mapping[str | int, bool]) -> VTCGroups:
    """Split the questions that the dense model answers.

    Args:
        dense, downsample: question id -> answered correctly. A question that `downsample` lacks counts as
            failed.
    """
    solved = sorted((key for key, correct in dense.items() if correct), key=lambda k: (isinstance(k, str), k))
    simple = [key for key in solved if downsample.get(key, False)]
    return VTCGroups(tuple(key for key in solved if not downsample.get(key, False)), tuple(simple))


def score_group(group: Sequence[str | int], method: Mapping[str | int, bool]) -> GroupScore:
    """Score a method on a group; a question missing from `method` stays in the total and counts as wrong."""
    total = len(group)
    correct = sum(bool(method.get(key, False)) for key in group)
    if total == 0:
        return GroupScore(0, 0, None, None, None)
    low, high = wilson(correct, total)
    return GroupScore(total, correct, 100 * correct / total, 100 * low, 100 * high)


def vtc_scores(
    samples: Sequence[SampleRow], dense: str = "dense", downsample: str = "downsample"
) -> dict[tuple[str, str, str], tuple[GroupScore, GroupScore]]:
    """VTC scores of every policy in a file of samples.

    Args:
        samples: rows of one or more tasks, dense and one downsampling budget among them.
        dense, downsample: policy names of the two reference runs.

    Returns:
        `(task, policy, budget and seed as text) -> (group A, group B)`, the reference runs left out.

    Raises:
        InputError: a task lacks a reference run, or has the downsampling run at more than one budget.
    """
    runs: dict[str, dict[tuple[str, str], dict[str | int, bool]]] = {}
    for row in samples:
        label = f"keep={row.keep}" + ("" if row.seed is None else f" seed={row.seed}")
        runs.setdefault(row.task, {}).setdefault((row.policy, label), {})[row.doc_id] = row.correct
    scores = {}
    for task, cells in runs.items():
        references = {}
        for name in (dense, downsample):
            found = [correct for (policy, _), correct in cells.items() if policy == name]
            if len(found) != 1:
                raise InputError(
                    f"Task {task!r} needs exactly one run of {name!r} for the VTC groups, has {len(found)}."
                )
            references[name] = found[0]
        groups = split_groups(references[dense], references[downsample])
        for (policy, label), correct in cells.items():
            if policy not in (dense, downsample):
                scores[task, policy, label] = (score_group(groups.a, correct), score_group(groups.b, correct))
    return scores
