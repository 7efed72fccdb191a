"""Power iteration with the transposed attention matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlmprune.kernels.arguments import check_mask
from vlmprune.kernels.backend import Backend, choose_backend
from vlmprune.kernels.column_mass.masking import block_mask
from vlmprune.kernels.column_mass.queries import query_rows
from vlmprune.kernels.column_mass.reductions import CHUNK_BYTES
from vlmprune.kernels.column_mass.stream import attention_blocks, check_heads
from vlmprune.kernels.precision import compute_dtype, precise_matmul

# One round: votes [B, H, N] of the tokens to what they receive.
Round = Callable[[Tensor], Tensor]


@torch.no_grad()
def pagerank(
    attention: Tensor | None,
    iters: int,
    *,
    start: Tensor | None = None,
    alive: Tensor | None = None,
    damping: float = 0.0,
    tolerance: float | None = None,
    qk: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: Backend | None = None,
) -> Tensor:
    """Scores after some rounds in which every token votes with its attention: ``s_i <- sum_j A[j, i] s_j``.

    Weighted PageRank of Zero-TPrune (arXiv 2305.17328). With damping d, ``s <- (1 - d) A^T s + d sum(s0) / N``.
    Rows of A sum to 1, so the sum of the scores stays what it was; no round rescales them.

    Args:
        attention: ``[B, H, N, N]`` after softmax (rows are queries), or None with ``qk``.
        iters: rounds; exactly so many unless ``tolerance`` is given. 0 returns the start.
        start: ``[N]``, ``[B, N]`` or ``[B, H, N]``; default all ones.
        alive: bool ``[B, N]``; other rows and columns are taken out and the rows left renormalised to sum 1.
            The scores of other tokens are 0; a row without attention to living tokens loses its votes.
        damping: share d of every score that is spread evenly over the living tokens.
        tolerance: a sample stops after the first round in which no score moved by this or more. Reads a flag
            from the device in every round.
        qk: queries ``[B, H, N, d]`` and keys ``[B, Hk, N, d]``. The attention never exists as a whole: all rounds are
            run for as many samples and heads at a time as ``chunk_bytes`` hold the attention of; where they do not hold
            one, it is recomputed in blocks in every round.
        scale: of the products of ``qk``, default ``d ** -0.5``.
        chunk_bytes: size of the attention that exists at a time with ``qk``; up to three of that size live.
        backend: ``"torch"`` or ``"reference"`` (slow, float64).

    Returns:
        ``[B, H, N]``, float32 (float64 for float64 input).

    Raises:
        ValueError: not exactly one of ``attention`` and ``qk``, or shapes or numbers that do not fit.
    """
    if (attention is None) == (qk is None):
        raise ValueError("Give either attention or qk.")
    if iters < 0 or not 0 <= damping <= 1:
        raise ValueError(f"iters must not be negative and damping lie in 0..1, got {iters} and {damping}.")
    if qk is not None:
        check_heads(*qk)
        shape, dtype, device = tuple(qk[0].shape[:3]), compute_dtype(*qk), qk[0].device
        square = qk[0].shape[2] == qk[1].shape[2]
    else:
        assert attention is not None
        square = attention.ndim == 4 and attention.shape[2] == attention.shape[3] and attention.is_floating_point()
        shape, dtype, device = tuple(attention.shape[:3]), compute_dtype(attention), attention.device
    if not square:
        raise ValueError("attention must be a float tensor [B, H, N, N], and qk hold as many queries as keys.")
    check_mask(alive, (shape[0], shape[2]), "alive")
    scores = _start(start, shape, dtype, device)
    if alive is not None:
        scores = scores.masked_fill(~alive[:, None], 0.0)
    if choose_backend("PageRank", backend, device, ("reference", "torch")) == "reference":
        from vlmprune.kernels.pagerank import reference

        return reference.run(attention, qk, scale, iters, scores, alive, damping, tolerance)
    if attention is not None:
        return _iterate(_dense_round(attention, alive, dtype), iters, scores, alive, damping, tolerance)
    assert qk is not None
    if iters == 0 or not scores.numel():
        return scores
    samples, heads = _fitting(*qk, tolerance, chunk_bytes // (shape[2] ** 2 * dtype.itemsize))
    if heads == 0:
        return _iterate(_Streamed(*qk, scale, alive, chunk_bytes), iters, scores, alive, damping, tolerance)
    found = torch.empty_like(scores)
    for some in _slices(shape[0], samples):
        living = None if alive is None else alive[some]
        for part in _slices(shape[1], heads):
            step = _Dense(_attention(*_heads(*qk, some, part), scale, living), None)
            found[some, part] = _iterate(step, iters, scores[some, part], living, damping, tolerance)
    return found


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))


def _heads(q: Tensor, k: Tensor, samples: slice, heads: slice) -> tuple[Tensor, Tensor]:
    """Queries of some samples and heads, and the keys that these use."""
    group = q.shape[1] // k.shape[1]
    return q[samples, heads], k[samples, heads.start // group : heads.stop // group]


def _fitting(q: Tensor, k: Tensor, tolerance: float | None, matrices: int) -> tuple[int, int]:
    """Samples and heads of which so many matrices of attention hold all, 0 heads where one sample is too much.

    Heads that share keys stay together, and with a tolerance, which looks at all of a sample's, all do.
    """
    heads = q.shape[1]
    if matrices >= heads:
        return matrices // max(1, heads), heads
    together = heads // k.shape[1]
    return 1, 0 if tolerance is not None else matrices // together * together


def _iterate(
    step: Round, iters: int, scores: Tensor, alive: Tensor | None, damping: float, tolerance: float | None
) -> Tensor:
    living = scores.shape[2] if alive is None else alive.sum(1).clamp_min(1)[:, None, None]
    teleport = damping * scores.sum(2, keepdim=True) / living
    if alive is not None:
        teleport = teleport * alive[:, None]
    moving = None
    for _ in range(iters):
        new = step(scores)
        if damping:
            new = (1 - damping) * new + teleport
        if tolerance is None:
            scores = new
            continue
        change = (new - scores).abs().flatten(1)
        scores = new if moving is None else torch.where(moving[:, None, None], new, scores)
        still = (change >= tolerance).any(1)
        moving = still if moving is None else moving & still
        if not bool(moving.any()):
            break
    return scores


def _dense_round(attention: Tensor, alive: Tensor | None, dtype: torch.dtype) -> Round:
    matrix = attention.to(dtype)
    if alive is None:
        return _Dense(matrix, None)
    matrix = matrix.masked_fill(~(alive[:, None, None] & alive[:, None, :, None]), 0.0)
    total = matrix.sum(3)
    return _Dense(matrix, torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total)))


def _attention(q: Tensor, k: Tensor, scale: float | None, alive: Tensor | None) -> Tensor:
    """``[b, H, N, N]`` softmax attention to living keys; to all in samples without any, which cast no votes."""
    batch, heads, n, d = q.shape
    dtype = compute_dtype(q, k)
    queries = (q.to(dtype) * (d**-0.5 if scale is None else scale)).reshape(batch, k.shape[1], -1, d)
    scores = precise_matmul(queries, k.to(dtype).mT).view(batch, heads, n, n)
    if alive is not None:
        dead = ~alive & alive.any(1, keepdim=True)
        scores.masked_fill_(dead[:, None, None], -torch.inf)
    return scores.softmax(-1)


class _Dense:
    """Votes through a matrix ``[B, H, N, N]``; ``share [B, H, N]`` scales the votes of each row."""

    def __init__(self, matrix: Tensor, share: Tensor | None) -> None:
        self.matrix, self.share = matrix, share

    def __call__(self, scores: Tensor) -> Tensor:
        votes = scores if self.share is None else scores * self.share
        return precise_matmul(votes[:, :, None], self.matrix)[:, :, 0]


class _Streamed:
    """Votes through attention that is recomputed block by block; dead keys are masked before the softmax."""

    def __init__(self, q: Tensor, k: Tensor, scale: float | None, alive: Tensor | None, chunk_bytes: int) -> None:
        self.q, self.k, self.scale, self.chunk_bytes = q, k, scale, chunk_bytes
        self.rows = query_rows(None, q.shape[0], q.shape[2], q.device)
        self.mask = block_mask(q, k, {"key_valid": alive})

    def __call__(self, scores: Tensor) -> Tensor:
        new = torch.zeros_like(scores)
        for block in attention_blocks(self.q, self.k, self.rows, self.mask, self.scale, self.chunk_bytes):
            votes = scores[block.batch, block.heads, block.rows]
            new[block.batch, block.heads, block.keys] += precise_matmul(votes[:, :, None], block.probability)[:, :, 0]
        return new


def _start(start: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if start is None:
        return torch.ones(shape, dtype=dtype, device=device)
    batch, heads, n = shape
    if tuple(start.shape) not in ((n,), (batch, n), (batch, heads, n)):
        raise ValueError(f"start must be [N], [B, N] or [B, H, N] of {(batch, heads, n)}, got {tuple(start.shape)}.")
    start = start.to(device=device, dtype=dtype)
    return (start[:, None] if start.ndim == 2 else start).expand(shape).clone()
