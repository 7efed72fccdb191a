"""Best partner of every A token, in PyTorch. Similarities exist only block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bipartite.types import Problem
from vlmprune.kernels.gather import gather_tokens
from vlmprune.kernels.ordering import first_argmax, ordered_bits
from vlmprune.kernels.precision import precise_matmul

# Bytes of one block of similarities.
BLOCK_BYTES = 32 << 20


def best_partners(problem: Problem, units: Tensor) -> tuple[Tensor, Tensor]:
    """Best cosine ``[B, Na]`` of every A slot over the B slots that may receive, and its slot (lowest on ties)."""
    a = gather_tokens(units, problem.a_index)  # [B, Na, c]
    b = gather_tokens(units, problem.b_index).mT
    free = problem.b_free[:, None]
    rows = max(1, BLOCK_BYTES // max(1, problem.batch * b.shape[2] * units.element_size()))
    scores, partners = [], []
    for start in range(0, a.shape[1], rows):
        cosine = precise_matmul(a[:, start : start + rows], b)
        pick = first_argmax(cosine, free)
        scores.append(cosine.gather(2, pick[..., None])[..., 0])
        partners.append(pick)
    return torch.cat(scores, 1), torch.cat(partners, 1)


def ranks(scores: Tensor, free: Tensor) -> Tensor:
    """int64 ``[B, Na]``: how many slots come before each one, best score first, lowest index on ties."""
    order = ordered_bits(scores, free).sort(dim=-1, descending=True, stable=True).indices
    index = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, index)
