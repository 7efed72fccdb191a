"""Equal feature rows.

Matrix products may round equal rows differently, depending on where they stand in the matrix. A greedy
selection must treat them as ties all the same, so equal rows are found by an exact integer hash first.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIX = 0x9E3779B97F4A7C15  # odd constant of the splitmix64 generator


def first_copies(points: Tensor) -> Tensor:
    """Lowest index that holds the same row, for each row.

    Rows count as equal if all their values are (0.0 and -0.0 are). A false match needs a collision of
    64-bit hashes.

    Args:
        points: float32 or float64 ``[B, N, d]``.

    Returns:
        int64 ``[B, N]``.
    """
    batch, n, d = points.shape
    points = points + 0.0  # -0.0 becomes +0.0
    if points.dtype == torch.float32 and d % 2:
        points = torch.nn.functional.pad(points, (0, 1))
    words = points.contiguous().view(torch.int64)  # two float32 or one float64 each
    # Upper bits must reach lower ones, else differences in sign bits alone could cancel in the sum.
    words = words ^ (words >> 32)
    hashes = (words * _multipliers(words.shape[-1], words.device)).sum(-1)  # [B, N], modulo 2^64
    ordered, position = hashes.sort(dim=-1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slots = torch.arange(n, device=points.device).expand(batch, n)
    head = torch.where(new, slots, 0).cummax(-1).values  # sorted slot where each run of equal rows begins
    return torch.empty_like(position).scatter_(1, position, position.gather(1, head))


def _multipliers(count: int, device: torch.device) -> Tensor:
    """Fixed pseudo-random odd int64 numbers (splitmix64 of 1, 2, ...)."""
    state = torch.arange(1, count + 1, device=device) * _signed(_MIX)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (state ^ ((state >> 31) & ((1 << 33) - 1))) | 1


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
