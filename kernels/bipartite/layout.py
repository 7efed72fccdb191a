"""From ranked pairs to group ids."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bipartite.types import BipartiteMatch, Problem


def choose_merges(problem: Problem, scores: Tensor, rank: Tensor) -> Tensor:
    """bool ``[B, Na]``: slots that merge, the best ones within the limits of the problem.

    Args:
        problem: the problem.
        scores: ``[B, Na]``, -inf where a slot may not merge.
        rank: int64 ``[B, Na]``, by score.
    """
    may = problem.a_free & problem.b_free.any(1, keepdim=True)
    merged = may & (rank < problem.width)
    if problem.limit is not None:
        merged &= rank < problem.limit[:, None]
    if problem.threshold is not None:
        bound = problem.threshold
        merged &= scores > (bound[:, None].to(scores.dtype) if isinstance(bound, Tensor) else bound)
    return merged


def assemble(problem: Problem, scores: Tensor, partner: Tensor, rank: Tensor, merged: Tensor) -> BipartiteMatch:
    """The result with outputs in the order of the problem."""
    n, device = problem.n, problem.device
    target = problem.b_index.gather(1, partner.clamp_min(0))  # [B, Na] token
    goes_to = torch.arange(n + 1, device=device).repeat(problem.batch, 1)  # slot n takes what does not merge
    goes_to = goes_to.scatter(1, torch.where(merged, problem.a_index, n), target)[:, :n]
    token = torch.arange(n, device=device)
    stays = goes_to == token
    if problem.valid is not None:
        stays &= problem.valid
    # A sample that merges nothing is left as it is.
    place = torch.where(merged.any(1, keepdim=True), _places(problem, goes_to, rank), token)
    taken = torch.zeros(problem.batch, 3 * n + 1, dtype=torch.int64, device=device)
    taken.scatter_(1, torch.where(stays, place, 3 * n), 1)
    taken[:, 3 * n] = 0
    new = (taken.cumsum(1) - 1).gather(1, place).gather(1, goes_to)
    if problem.valid is not None:
        new = torch.where(problem.valid, new, -1)
    n_out = n - problem.width if problem.exact else n
    counts = taken.sum(1)
    return BipartiteMatch(new, n_out, counts, scores, partner, merged, problem.a_index, problem.b_index)


def _places(problem: Problem, goes_to: Tensor, rank: Tensor) -> Tensor:
    """int64 ``[B, N]`` below 3 N: outputs stand in the order of the places of the tokens that stay."""
    batch, n = goes_to.shape
    token = torch.arange(n, device=problem.device).expand(batch, n)
    if problem.order == "original":  # place of the first member of each group
        return token.scatter_reduce(1, goes_to, token, "amin")
    # Protected front and tokens in neither list, then A, then B.
    slot_a = torch.arange(problem.a_index.shape[1], device=problem.device).expand_as(problem.a_index)
    slot_b = torch.arange(problem.b_index.shape[1], device=problem.device).expand_as(problem.b_index)
    by_rank = problem.order == "tome" and problem.protect == 0
    place = torch.nn.functional.pad(token, (0, 1))  # one more for empty slots
    place = place.scatter(1, _or(problem.a_index, n), n + (rank if by_rank else slot_a))
    place = place.scatter(1, _or(problem.b_index, n), 2 * n + slot_b)[:, :n]
    return torch.where(token < problem.protect, token, place)


def _or(index: Tensor, other: int) -> Tensor:
    return torch.where(index < 0, other, index)
