"""The common case of a fixed number of merges: results as pairs, and merging that touches only the pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.arguments import check_values
from vlmprune.kernels.backend import Backend, choose_backend
from vlmprune.kernels.bipartite.merge import triton_can_merge
from vlmprune.kernels.bipartite.types import BipartiteMatch, Problem
from vlmprune.kernels.gather import add_rows, take_rows


def assemble_pairs(problem: Problem, scores: Tensor, partner: Tensor) -> BipartiteMatch:
    """The result of a problem that is ``fixed``.

    Args:
        problem: the problem.
        scores: ``[B, Na]``, -inf in the front.
        partner: int64 ``[B, Na]``, -1 in the front.
    """
    batch, n, width, first = problem.batch, problem.n, problem.width, problem.first_a
    order = _ranked(scores[:, first:])  # free A slots counted from the first one, best first
    source_slot = order[:, :width] + first
    sources = 2 * source_slot
    target = 2 * partner.gather(1, source_slot) + 1  # token
    kept = _outputs(problem, order, sources, target)
    group = torch.empty(batch, n, dtype=torch.int64, device=problem.device)
    group.scatter_(1, kept, torch.arange(n - width, device=problem.device).expand_as(kept))
    into = group.gather(1, target)
    group.scatter_(1, sources, into)
    merged = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, source_slot, True)
    counts = torch.full((batch,), n - width, dtype=torch.int64, device=problem.device)
    halves = (problem.a_index, problem.b_index)
    return BipartiteMatch(group, n - width, counts, scores, partner, merged, *halves, kept, sources, into)


def merge_pairs(
    x: Tensor,
    kept: Tensor,
    sources: Tensor,
    into: Tensor,
    size: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Size-weighted means of pairs, and the sizes after the merge.

    The same as :func:`~vlmprune.kernels.bipartite.merge_groups` with mode ``"wavg"`` up to rounding. Tokens that stay
    are copied once; only the outputs that receive something are computed. Differentiable in ``x``.

    Args:
        x: ``[B, N, ...]``.
        kept: int64 ``[B, M]``, token behind each output.
        sources: int64 ``[B, r]``, tokens that merge.
        into: int64 ``[B, r]``, output that each goes to.
        size: ``[B, N]``, original tokens behind each token, positive; default all ones.
        backend: ``"torch"`` or ``"triton"`` (no gradient, float32 or narrower; others run in PyTorch).

    Returns:
        ``(merged, size)``: ``[B, M, ...]`` in the dtype of ``x``, accumulated in float32 (float64 for float64), and
        ``[B, M]`` in the dtype of ``size`` (default float32). Runs on one device give the same bits.

    Raises:
        ValueError: shapes do not fit.
        BackendError: a forced backend cannot run.
    """
    if sources.shape != into.shape:
        raise ValueError(f"sources and into must have one shape, got {tuple(sources.shape)} and {tuple(into.shape)}.")
    check_values(size, tuple(x.shape[:2]), "size")
    choice = choose_backend("merging of pairs", backend, x.device, ("torch", "triton"))
    if choice == "triton" and sources.shape[1] > 0 and triton_can_merge(x):
        from vlmprune.kernels.bipartite import triton_backend

        return triton_backend.merge_pairs(x, kept, sources, into, size)
    if size is None:
        size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    merged = take_rows(x, kept)
    if sources.shape[1] == 0:
        return merged, size.gather(1, kept)
    added = size.gather(1, sources)  # [B, r]
    total = add_rows(size.gather(1, kept), into, added)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    merged = merged.to(kind)
    share = (added.to(kind) / total.gather(1, into).to(kind)).reshape(*into.shape, *[1] * (x.ndim - 2))
    step = (take_rows(x, sources).to(kind) - take_rows(merged, into)) * share
    return add_rows(merged, into, step).to(x.dtype), total


def _ranked(scores: Tensor) -> Tensor:
    """int64, same shape: places of the scores, best first, lowest index on ties, NaN last."""
    scores = torch.where(scores.isnan(), -torch.inf, scores) + 0.0  # -0.0 becomes +0.0
    return scores.sort(dim=-1, descending=True, stable=True).indices


def _outputs(problem: Problem, order: Tensor, sources: Tensor, target: Tensor) -> Tensor:
    """int64 ``[B, M]``: token behind each output."""
    token = torch.arange(problem.n, device=problem.device).expand(problem.batch, problem.n)
    if problem.width == 0:
        return token
    if problem.order == "original":  # by the first member of each group
        place = token.scatter_reduce(1, target, sources, "amin").scatter_(1, sources, problem.n)
        return place.argsort(dim=1, stable=True)[:, : problem.n - problem.width]
    left = order[:, problem.width :]
    if problem.order == "position" or problem.protect > 0:
        left = left.sort(dim=1).values
    front, rest = token[:, : problem.protect], problem.b_index[:, problem.first_b :]
    return torch.cat([front, 2 * (left + problem.first_a), rest], 1)
