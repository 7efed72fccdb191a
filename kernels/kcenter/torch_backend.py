"""Greedy selection in PyTorch: a loop of small tensor operations, no host synchronisation on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.kcenter.rows import Rows, make_rows
from vlmprune.kernels.kcenter.types import KCenterResult, Problem, Route
from vlmprune.kernels.ordering import first_argmax

# Bytes of one block of distances from preselected tokens.
_BLOCK_BYTES = 32 << 20


def run(problem: Problem, first: Tensor, route: Route, memory_cap: int) -> KCenterResult:
    """Select on every sample.

    Args:
        problem: the problem, with at least one token.
        first: int64 ``[B]``, first pick per sample, -1 for the ordinary rule.
        route: see :func:`~vlmprune.kernels.kcenter.greedy_select`.
        memory_cap: bytes of the Gram matrix.
    """
    gram_bytes = problem.n**2 * problem.dtype.itemsize
    gram = route == "gram" or (route == "auto" and gram_bytes <= memory_cap and gram_pays(problem))
    at_once = max(1, memory_cap // gram_bytes) if gram else problem.batch
    if at_once >= problem.batch:
        return _select(problem, first, make_rows(problem, gram))
    results = []
    for start in range(0, problem.batch, at_once):
        part = problem.part(start, start + at_once)
        results.append(_select(part, first[start : start + at_once], make_rows(part, gram)))
    return KCenterResult(
        torch.cat([result.indices for result in results]),
        torch.cat([result.radius for result in results]),
        torch.cat([result.min_distance for result in results]),
    )


def gram_pays(problem: Problem) -> bool:
    """True if all inner products at once are faster than one matrix-vector product per pick."""
    share = 1 / 64 if problem.device.type == "cuda" else 1 / 6
    return problem.width >= share * problem.n


def _select(problem: Problem, first: Tensor, rows: Rows) -> KCenterResult:
    batch, n, width = problem.batch, problem.n, problem.width
    minimum = problem.objective == "min_max"
    available = problem.available()
    state = torch.full((batch, n), torch.inf if minimum else 0.0, dtype=problem.dtype, device=problem.device)
    if problem.preselected is not None:
        state = _fold_preselected(state, problem.preselected, rows, minimum)
    indices = torch.full((batch, width), -1, dtype=torch.int64, device=problem.device)
    radius = torch.full((batch, width), -1.0, dtype=problem.dtype, device=problem.device)
    # With one k for all and nothing excluded, every round picks a token in every sample.
    always = problem.counts is None and problem.valid is None and problem.preselected is None
    for step in range(min(width, n)):
        score = state if minimum else -state
        if problem.weight is not None:
            score = score * problem.weight.to(score.dtype)
        pick = first_argmax(score, available)
        if step == 0:
            pick = torch.where(first >= 0, first, pick)
        pick = pick[:, None]  # [B, 1]
        values = rows(pick)[:, 0]
        updated = torch.minimum(state, values) if minimum else state + values
        if always:
            indices[:, step : step + 1] = pick
            radius[:, step : step + 1] = state.gather(1, pick)
            state = updated
        else:
            found = available.gather(1, pick)
            if problem.counts is not None:
                found = found & (step < problem.counts)[:, None]
            indices[:, step : step + 1] = torch.where(found, pick, -1)
            radius[:, step : step + 1] = torch.where(found, state.gather(1, pick), -1.0)
            state = torch.where(found, updated, state)
        available.scatter_(1, pick, False)
    return KCenterResult(indices, radius, state)


def _fold_preselected(state: Tensor, preselected: Tensor, rows: Rows, minimum: bool) -> Tensor:
    """State after the preselected tokens, in blocks of bounded size."""
    batch, n = state.shape
    block = max(1, _BLOCK_BYTES // (batch * n * state.element_size()))
    if getattr(rows, "kind", "") == "direct":
        block = max(1, block // rows.points.shape[-1])  # type: ignore[union-attr]
    for start in range(0, preselected.shape[1], block):
        index = preselected[:, start : start + block]
        values = rows(index.clamp_min(0))  # [B, R, N]
        empty = (index < 0)[..., None]
        if minimum:
            state = torch.minimum(state, values.masked_fill(empty, torch.inf).amin(1))
        else:
            state = state + values.masked_fill(empty, 0.0).sum(1)
    return state
