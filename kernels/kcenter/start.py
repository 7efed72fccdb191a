"""The first pick of a greedy selection."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.arguments import check_values, require
from vlmprune.kernels.kcenter.rows import masked_mean, unit_rows
from vlmprune.kernels.kcenter.types import Problem
from vlmprune.kernels.ordering import stable_argmax


def first_pick(problem: Problem, start: int | Tensor | str, start_score: Tensor | None) -> Tensor:
    """int64 ``[B]``; -1 for a sample whose first pick follows from its preselected tokens, or without tokens.

    Raises:
        ValueError: unknown rule, missing or superfluous score, or a start that is no valid token.
    """
    if (start_score is not None) != (isinstance(start, str) and start == "score"):
        raise ValueError("start='score' and start_score [B, N] belong together.")
    if isinstance(start, str):
        first = stable_argmax(_start_scores(problem, start, start_score), problem.valid)
    else:
        first = _given(problem, start)
    if problem.preselected is not None:
        first = torch.where((problem.preselected >= 0).any(1), -1, first)
    return first


def _start_scores(problem: Problem, rule: str, score: Tensor | None) -> Tensor:
    """``[B, N]`` whose largest valid value is the first pick."""
    if rule == "score":
        check_values(score, (problem.batch, problem.n), "start_score")
        assert score is not None
        return score
    if rule not in ("center_far", "medoid"):
        raise ValueError(f"Unknown start {rule!r}; give an index, 'score', 'center_far' or 'medoid'.")
    if problem.matrix is not None:
        values = problem.matrix.to(problem.dtype)
        if problem.valid is not None:
            values = values.masked_fill(~problem.valid[:, None], 0.0)
        far = values.sum(-1) * (1 if problem.kind == "distance" else -1)
    else:
        points = problem.source.to(problem.dtype)
        if problem.kind == "cosine":
            points = unit_rows(points)
            mean = masked_mean(points, problem.valid)
            far = -(points * mean).sum(-1)
        else:
            far = (points - masked_mean(points, problem.valid)).square().sum(-1)
    return far if rule == "center_far" else -far


def _given(problem: Problem, start: int | Tensor) -> Tensor:
    n = problem.n
    if isinstance(start, Tensor):
        if start.is_floating_point() or start.dtype == torch.bool or tuple(start.shape) != (problem.batch,):
            raise ValueError(f"start must be an int tensor [{problem.batch}], got {start.dtype} {start.shape}.")
        first = start.to(device=problem.device, dtype=torch.int64)
        inside = (first >= 0) & (first < n)
    else:
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < n:
            raise ValueError(f"start must be a token index from 0 to {n - 1}, got {start!r}.")
        first = torch.full((problem.batch,), start, dtype=torch.int64, device=problem.device)
        inside = None
    unused = _start_unused(problem)
    if problem.valid is not None:
        usable = problem.valid.gather(1, first.clamp(0, n - 1)[:, None])[:, 0]
        inside = usable if inside is None else inside & usable
        unused = ~problem.valid.any(1) if unused is None else unused | ~problem.valid.any(1)
    if inside is None:
        return first
    good = inside if unused is None else inside | unused
    require(good, "start points to a token that is not valid; give a valid index, or start='score'.")
    return torch.where(inside, first, -1)


def _start_unused(problem: Problem) -> Tensor | None:
    """bool ``[B]``: samples that need no start, None if all may need one."""
    unused = None if problem.preselected is None else (problem.preselected >= 0).any(1)
    if problem.width == 0:
        return torch.ones(problem.batch, dtype=torch.bool, device=problem.device)
    if problem.counts is not None:
        nothing = problem.counts <= 0
        unused = nothing if unused is None else unused | nothing
    return unused
