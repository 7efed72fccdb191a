"""Softmax attention in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.kernels.column_mass.masking import BlockMask
from vlmprune.kernels.column_mass.queries import QueryRows
from vlmprune.kernels.precision import compute_dtype, precise_matmul

# Query rows per block that keep the matrix products efficient.
_GOOD_ROWS = 16


@dataclass(frozen=True)
class Block:
    """Attention probabilities ``[b, h, r, n]`` of some samples, heads and query rows on some keys.

    Keys outside ``keys`` have probability zero. ``probability`` may be overwritten.
    """

    batch: slice
    heads: slice
    rows: slice
    keys: slice
    probability: Tensor


def check_heads(q: Tensor, k: Tensor) -> int:
    """Query heads per key head.

    Raises:
        ValueError: q and k are not ``[B, H, Nq, d]`` and ``[B, Hk, N, d]`` with H a multiple of Hk.
    """
    fits = q.ndim == 4 and k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1] or k.shape[2] == 0:
        raise ValueError(
            "q and k must be [B, H, Nq, d] and [B, Hk, N, d], H a multiple of Hk and N at least 1, got"
            f" {tuple(q.shape)} and {tuple(k.shape)}."
        )
    if not q.is_floating_point() or not k.is_floating_point():
        raise ValueError(f"q and k must be float tensors, got {q.dtype} and {k.dtype}.")
    return q.shape[1] // k.shape[1]


def attention_blocks(
    q: Tensor, k: Tensor, rows: QueryRows, mask: BlockMask, scale: float | None, chunk_bytes: int
) -> Iterator[Block]:
    """All blocks of the attention of the given query rows, in a fixed order.

    Args:
        q: ``[B, H, Nq, d]``.
        k: ``[B, Hk, N, d]``; query head h uses key head ``h * Hk // H``.
        rows: query rows.
        mask: masking.
        scale: factor of the scores, default ``d ** -0.5``.
        chunk_bytes: size of a block; up to three of that size live at a time. One row of one key head is
            the least.
    """
    group = check_heads(q, k)
    dtype = compute_dtype(q, k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    n_heads, n_keys = q.shape[1], k.shape[2]
    sizes = _block_sizes(q.shape[0], n_heads, group, rows.count, chunk_bytes // (n_keys * dtype.itemsize))
    for batch in _slices(q.shape[0], sizes[0]):
        for heads in _slices(n_heads, sizes[1]):
            part_k = k[batch, heads.start // group : heads.stop // group].to(dtype)
            part_q = q[batch, heads]
            for part in _slices(rows.count, sizes[2]):
                keys = mask.key_range(rows, part)
                queries = rows.take(part_q, batch, part, dim=2).to(dtype)
                scores = _scores(queries, part_k[:, :, keys], group).mul_(scale)
                scores = mask.apply(scores, rows, batch, heads, part, keys)
                yield Block(batch, heads, part, keys, _softmax(scores, mask.may_block))


def _scores(q: Tensor, k: Tensor, group: int) -> Tensor:
    """``[b, h, r, n]`` inner products; heads that share keys are stacked as rows."""
    batch, heads, count, d = q.shape
    stacked = q.reshape(batch, heads // group, group * count, d)
    return precise_matmul(stacked, k.mT).reshape(batch, heads, count, k.shape[2])


def _softmax(scores: Tensor, may_block: bool) -> Tensor:
    """Softmax over keys; zeros in rows that may attend to nothing."""
    probability = scores.softmax(-1)
    if may_block:
        nothing = scores.amax(-1, keepdim=True) == -torch.inf
        probability.masked_fill_(nothing, 0.0)
    return probability


def _block_sizes(batch: int, heads: int, group: int, rows: int, budget: int) -> tuple[int, int, int]:
    """Samples, heads and rows of a block with at most ``budget`` rows in all, if possible."""
    good = max(1, min(rows, _GOOD_ROWS))
    samples = min(batch, max(1, budget // (heads * good)))
    some = heads
    if samples * heads * good > budget:
        some = min(heads, max(1, budget // (good * group)) * group)
    return max(1, samples), some, max(1, min(rows, budget // (max(1, samples) * some)))


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))
