"""Best pairs where feature rows are equal.

Matrix products may round equal rows differently, depending on where they stand in the matrix. Equal rows are
found exactly first, and then share one result: the lowest index wins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bipartite.types import Problem
from vlmprune.kernels.kcenter.duplicates import first_copies
from vlmprune.kernels.kcenter.types import MIN_NORM


def settle(problem: Problem, units: Tensor, best: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and partners in which equal rows are ties.

    Args:
        problem: the problem.
        units: unit rows ``[B, N, c]``.
        best: ``[B, Na]``, best cosine of every A slot as computed.
        partner: int64 ``[B, Na]``, its slot in B.

    Returns:
        ``(scores, partner)``: cosines at most 1, and exactly 1 to an equal row; of equal B rows the lowest
        slot. -inf and -1 where a slot may not merge or no B token may receive.
    """
    copies = first_copies(units)  # [B, N]
    a_head = _heads(copies, problem.a_index)
    b_head = _heads(copies, problem.b_index)
    n_b = problem.b_index.shape[1]
    first_a = _first_slot(a_head, problem.a_index >= 0, problem.n)  # [B, N], by head
    first_b = _first_slot(b_head, problem.b_free, problem.n)
    own = first_a.gather(1, a_head).clamp_max(problem.a_index.shape[1] - 1)
    best, partner = best.gather(1, own), partner.gather(1, own).clamp_min(0)
    partner = first_b.gather(1, b_head.gather(1, partner)).clamp_max(n_b - 1)
    twin = first_b.gather(1, a_head)  # slot of an equal B row, n_b if there is none
    a_norm = units.norm(dim=-1).gather(1, problem.a_index.clamp_min(0))
    certain = (twin < n_b) & (a_norm > 1 - 1e-4)  # rows shorter than MIN_NORM have a smaller cosine to themselves
    scores = torch.where(certain, 1.0, best.clamp_max(1.0))
    partner = torch.where(certain, twin, partner)
    may = problem.a_free & problem.b_free.any(1, keepdim=True)
    return torch.where(may, scores, -torch.inf), torch.where(may, partner, -1)


def unit_rows(metric: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows divided by their norm, at least 1e-12."""
    points = metric.to(dtype)
    return points / points.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)


def _heads(copies: Tensor, index: Tensor) -> Tensor:
    """First equal token of the token in every slot (of token 0 in an empty one)."""
    return copies.gather(1, index.clamp_min(0))


def _first_slot(head: Tensor, counted: Tensor, n: int) -> Tensor:
    """``[B, N]``: lowest counted slot whose first equal token is that token, the number of slots if none."""
    batch, slots = head.shape
    table = torch.full((batch, n + 1), slots, dtype=torch.int64, device=head.device)
    index = torch.arange(slots, device=head.device).expand(batch, slots)
    return table.scatter_reduce(1, torch.where(counted, head, n), index, "amin")[:, :n]
