"""Best partners where no two rows are equal: the usual case, told apart on the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmprune.kernels.bipartite.types import Problem
from vlmprune.kernels.precision import precise_matmul

# Bytes of one block of similarities.
BLOCK_BYTES = 32 << 20


def quick_partners(problem: Problem, units: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scores and partners as :func:`~vlmprune.kernels.bipartite.ties.settle` gives them, or None.

    Only on the CPU, where reading a flag costs nothing, for default halves without masks. None where rows may be
    equal or are not finite: then exact ties must be settled.

    Args:
        problem: the problem.
        units: unit rows ``[B, N, c]``.
    """
    if units.device.type != "cpu" or not problem.plain or problem.protect >= problem.n - 1 or _may_repeat(units):
        return None
    a, b = units[:, 2 * problem.first_a :: 2], units[:, 2 * problem.first_b + 1 :: 2].mT
    rows = max(1, BLOCK_BYTES // (problem.batch * b.shape[2] * units.element_size()))
    best = [precise_matmul(part, b).max(-1) for part in a.split(rows, 1)]
    scores, partner = best[0] if len(best) == 1 else (torch.cat(parts, 1) for parts in zip(*best, strict=True))
    if math.isnan(float(scores.sum())):
        return None
    front = (problem.first_a, 0)
    scores = torch.nn.functional.pad(scores.clamp_max(1.0), front, value=-torch.inf)
    return scores, torch.nn.functional.pad(partner + problem.first_b, front, value=-1)


def _may_repeat(units: Tensor) -> bool:
    """True if two rows of a sample may be equal: their first 64 bits are."""
    words = 8 // units.element_size()
    start = units[..., :words] + 0.0  # -0.0 becomes +0.0
    start = torch.nn.functional.pad(start, (0, words - start.shape[2]))
    ordered = start.view(torch.int64)[..., 0].sort(dim=1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())
