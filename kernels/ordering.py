"""Order of scores with one tie rule: the lowest index wins.

``-0.0`` counts as ``+0.0``. NaN stands below every number, a token that is not valid below NaN and is
never chosen. Scores are compared exactly (float16 and bfloat16 as float32, float64 and integers as they
are), so equal inputs give equal indices on every device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmprune.kernels.arguments import Counts, check_mask, token_counts

# Indices occupy the low 31 bits of a packed key.
INDEX_BITS = 31
_INDEX_MASK = (1 << INDEX_BITS) - 1


def ordered_bits(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Integers in the order of the scores: int32 for floats up to 32 bits, else int64.

    The smallest integer of the type marks tokens that are not valid, the next one NaN.

    Args:
        scores: any shape, any real dtype.
        valid: bool, same shape.
    """
    if scores.is_floating_point():
        scores = scores if scores.dtype == torch.float64 else scores.float()
        kind = torch.int64 if scores.dtype == torch.float64 else torch.int32
        info = torch.iinfo(kind)
        # Adding +0.0 turns -0.0 into +0.0. Negative floats order backwards as integers: flip their bits.
        bits = (scores + 0.0).view(kind)
        bits = bits ^ ((bits >> (info.bits - 1)) & info.max)
        bits = bits.masked_fill(scores.isnan(), info.min + 1)
    else:
        info = torch.iinfo(torch.int64)
        bits = scores.long().clamp_min(info.min + 2)
    return bits if valid is None else bits.masked_fill(~valid, info.min)


def pack_keys(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """int64 keys ``[..., N]`` whose maximum is the best score at its lowest index.

    All keys of a row differ, so any reduction order gives the same result. See :func:`unpack_index`.

    Args:
        scores: ``[..., N]``, float32 or narrower.
        valid: bool ``[..., N]``.

    Raises:
        ValueError: scores of 64 bits do not fit into a key beside the index.
    """
    bits = ordered_bits(scores, valid)
    if bits.dtype != torch.int32:
        raise ValueError(f"Keys hold scores of at most 32 bits, got {scores.dtype}; convert with .float().")
    index = torch.arange(scores.shape[-1], device=scores.device)
    return (bits.long() << 32) | (_INDEX_MASK - index)


def unpack_index(keys: Tensor) -> Tensor:
    """Indices of packed keys, -1 where the key belongs to a token that is not valid."""
    index = _INDEX_MASK - (keys & _INDEX_MASK)
    return torch.where((keys >> 32) == torch.iinfo(torch.int32).min, -1, index)


def stable_argmax(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Index of the largest score per row, lowest index on ties, -1 where no token is valid.

    Args:
        scores: ``[..., N]``.
        valid: bool ``[..., N]``, default all.

    Returns:
        int64 ``[...]``.
    """
    check_mask(valid, tuple(scores.shape), "valid")
    if scores.shape[-1] == 0:
        return torch.full(scores.shape[:-1], -1, dtype=torch.int64, device=scores.device)
    best = ordered_bits(scores, valid).argmax(-1)  # torch.argmax returns the first maximum
    if valid is None:
        return best
    return torch.where(valid.gather(-1, best[..., None])[..., 0], best, -1)


def first_argmax(scores: Tensor, available: Tensor) -> Tensor:
    """Fast form of :func:`stable_argmax` for inner loops; index 0 where nothing is available.

    Infinite scores count as the largest finite number, NaN as the lowest one.
    """
    limits = torch.finfo(scores.dtype)
    finite = torch.nan_to_num(scores, nan=limits.min, posinf=limits.max, neginf=limits.min)
    return finite.masked_fill(~available, -torch.inf).argmax(-1)


def stable_topk(
    scores: Tensor,
    k: Counts,
    valid: Tensor | None = None,
    *,
    k_max: int | None = None,
    order: Literal["rank", "index"] = "rank",
    largest: bool = True,
) -> Tensor:
    """Indices of the k best scores per sample, lowest index on ties.

    Args:
        scores: ``[B, N]``.
        k: tokens per sample: an int, a sequence of B ints, or an int tensor ``[B]`` (read on its device,
            without synchronisation). Above the number of valid tokens all of them are returned.
        valid: bool ``[B, N]``, default all.
        k_max: width of the output for a tensor ``k``; default N.
        order: ``"rank"`` (best first) or ``"index"`` (ascending).
        largest: False picks the smallest scores; NaN still comes last.

    Returns:
        int64 ``[B, K]``, filled up with -1 at the end.

    Raises:
        TypeError, ValueError: see :func:`~vlmprune.kernels.arguments.token_counts`, or wrong shapes.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [B, N], got shape {tuple(scores.shape)}.")
    if order not in ("rank", "index"):
        raise ValueError(f"order must be 'rank' or 'index', got {order!r}.")
    batch, n = scores.shape
    check_mask(valid, (batch, n), "valid")
    width, counts = token_counts(k, batch, n, k_max, scores.device)
    picked = _ranked(scores, min(width, n), valid, largest)
    if width > n:
        picked = torch.nn.functional.pad(picked, (0, width - n), value=-1)
    if counts is not None:
        picked = torch.where(torch.arange(width, device=scores.device) < counts[:, None], picked, -1)
    if order == "index":
        ascending = torch.where(picked < 0, n, picked).sort(-1).values
        picked = torch.where(ascending == n, -1, ascending)
    return picked


def _ranked(scores: Tensor, width: int, valid: Tensor | None, largest: bool) -> Tensor:
    """Indices ``[B, width]`` of the best tokens, best first, -1 for tokens that are not valid."""
    if not largest:
        # ~x reverses the order of integers without overflow; floats negate exactly.
        scores = -scores if scores.is_floating_point() else ~scores.long()
    if scores.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return unpack_index(pack_keys(scores, valid).topk(width, dim=-1).values)
    picked = ordered_bits(scores, valid).sort(dim=-1, descending=True, stable=True).indices[:, :width]
    return picked if valid is None else torch.where(valid.gather(-1, picked), picked, -1)
