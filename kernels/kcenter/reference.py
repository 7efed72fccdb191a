"""Slow float64 version of greedy selection in plain NumPy loops, for tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vlmprune.kernels.kcenter.types import MIN_NORM, KCenterResult, Problem

Between = Callable[[int, int], float]


def run(problem: Problem, start: int | Tensor | str, start_score: Tensor | None) -> KCenterResult:
    """Select on every sample of a batch, one after the other; arguments as in ``greedy_select``."""
    samples = []
    for b in range(problem.batch):
        source = _numpy(problem.source[b])
        between = _pairs(problem.kind, source)
        samples.append(
            select(
                between,
                problem.n,
                problem.width if problem.counts is None else int(problem.counts[b]),
                maximise_sum=problem.objective == "max_sum",
                similar=problem.kind in ("cosine", "similarity"),
                start=int(start[b]) if isinstance(start, Tensor) else start,
                start_score=None if start_score is None else _numpy(start_score[b]),
                valid=None if problem.valid is None else _numpy(problem.valid[b]).astype(bool),
                preselected=[] if problem.preselected is None else problem.preselected[b].tolist(),
                weight=None if problem.weight is None else _numpy(problem.weight[b]),
                center=_mean_distances(problem, b, source, between),
            )
        )
    indices = np.full((problem.batch, problem.width), -1, dtype=np.int64)
    radius = np.full((problem.batch, problem.width), -1.0)
    state = np.zeros((problem.batch, problem.n))
    for b, (picked, at_pick, final) in enumerate(samples):
        indices[b, : len(picked)] = picked
        radius[b, : len(picked)] = at_pick
        state[b] = final
    return KCenterResult(
        torch.from_numpy(indices).to(problem.device),
        torch.from_numpy(radius).to(problem.device, problem.dtype),
        torch.from_numpy(state).to(problem.device, problem.dtype),
    )


def select(
    between: Between,
    n: int,
    k: int,
    *,
    maximise_sum: bool = False,
    similar: bool = False,
    start: int | str = 0,
    start_score: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    preselected: list[int] | None = None,
    weight: np.ndarray | None = None,
    center: np.ndarray | None = None,
) -> tuple[list[int], list[float], np.ndarray]:
    """Greedy selection on one sample.

    Args:
        between: distance of two tokens, or their similarity where ``similar``.
        n: number of tokens.
        k: picks.
        maximise_sum: the max-sum objective.
        similar: what ``between`` returns.
        start, start_score, valid, preselected, weight: as in ``greedy_select``.
        center: ``[n]`` mean distance of each token to the valid ones, for the starts at the centre.

    Returns:
        Picks, the state of each when picked, and the final state ``[n]``.
    """
    usable = np.ones(n, dtype=bool) if valid is None else valid.copy()
    before = [j for j in dict.fromkeys(preselected or []) if j >= 0 and usable[j]]
    state = np.full(n, 0.0 if maximise_sum else math.inf)

    def add(j: int) -> None:
        for i in range(n):
            value = between(j, i)
            if maximise_sum:
                state[i] += value if similar else 1 - value
            else:
                state[i] = np.minimum(state[i], 1 - value if similar else value)  # NaN spreads
        usable[j] = False

    free = usable.copy()
    for j in before:
        add(j)
    picked: list[int] = []
    at_pick: list[float] = []
    while len(picked) < k and usable.any():
        if not picked and not before:
            j = _start(start, free, start_score, center)
        else:
            score = -state if maximise_sum else state if weight is None else state * weight
            j = _best(score, usable)
        picked.append(j)
        at_pick.append(float(state[j]))
        add(j)
    return picked, at_pick, state


def _best(score: np.ndarray, usable: np.ndarray) -> int:
    """Largest score, lowest index on ties, NaN after all numbers."""
    numbers = [i for i in np.flatnonzero(usable) if not math.isnan(score[i])]
    if not numbers:
        return int(np.flatnonzero(usable)[0])
    return int(max(numbers, key=lambda i: (score[i], -i)))


def _start(start: int | str, free: np.ndarray, score: np.ndarray | None, center: np.ndarray | None) -> int:
    if start == "score":
        if score is None:
            raise ValueError("start='score' needs start_score.")
        return _best(score, free)
    if start in ("center_far", "medoid"):
        assert center is not None
        return _best(center if start == "center_far" else -center, free)
    if isinstance(start, str) or not 0 <= start < len(free) or not free[start]:
        raise ValueError(f"start {start!r} is no valid token.")
    return start


def _pairs(kind: str, source: np.ndarray) -> Between:
    """Distance of two tokens; for ``similarity`` and ``cosine`` their similarity, at most 1 for cosine."""
    if kind in ("distance", "similarity"):
        return lambda j, i: float(source[j, i])
    if kind == "l2":
        finite = np.where(np.isfinite(source).all(1, keepdims=True), source, np.nan)
        return lambda j, i: _sum((finite[j] - finite[i]) ** 2)
    norms = [max(math.sqrt(_sum(row**2)), MIN_NORM) for row in source]
    units = source / np.array(norms).reshape(-1, 1)

    def cosine(j: int, i: int) -> float:
        if norms[j] > MIN_NORM and np.array_equal(source[j], source[i]):
            return 1.0
        value = _sum(units[j] * units[i])
        return value if math.isnan(value) else min(value, 1.0)

    return cosine


def _sum(values: np.ndarray) -> float:
    """Correctly rounded sum; NaN if a value is not finite."""
    return math.fsum(values.tolist()) if np.isfinite(values).all() else math.nan


def _mean_distances(problem: Problem, b: int, source: np.ndarray, between: Between) -> np.ndarray:
    """``[n]`` order of distance from the mean: mean distance to the valid tokens."""
    counted = np.ones(problem.n, dtype=bool) if problem.valid is None else _numpy(problem.valid[b]) > 0
    if problem.features is not None:
        counted = counted & np.isfinite(source).all(1)
    members = np.flatnonzero(counted)
    sign = -1.0 if problem.kind in ("cosine", "similarity") else 1.0
    return np.array([sign * sum(between(i, int(j)) for j in members) for i in range(problem.n)])


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
