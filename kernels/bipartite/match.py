"""The public function: checks and choice of the implementation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.kernels.arguments import Counts, check_mask, require, token_counts
from vlmprune.kernels.backend import Backend, choose_backend
from vlmprune.kernels.bipartite import torch_backend
from vlmprune.kernels.bipartite.layout import assemble, choose_merges
from vlmprune.kernels.bipartite.pairs import assemble_pairs
from vlmprune.kernels.bipartite.quick import quick_partners
from vlmprune.kernels.bipartite.ties import settle, unit_rows
from vlmprune.kernels.bipartite.types import BipartiteMatch, Order, Problem
from vlmprune.kernels.precision import compute_dtype

Split = tuple[Tensor, Tensor]


@torch.no_grad()
def bipartite_match(
    metric: Tensor,
    r: Counts | None = None,
    *,
    threshold: float | Tensor | None = None,
    protect: int = 0,
    order: Order = "tome",
    split: Split | None = None,
    valid: Tensor | None = None,
    protected: Tensor | None = None,
    backend: Backend | None = None,
) -> BipartiteMatch:
    """Pair tokens of two halves A and B by cosine and choose the A tokens that merge into their best B token.

    Bipartite soft matching (ToMe, arXiv 2210.09461): every A token looks for its most similar B token; the
    ``r`` best pairs merge. With a threshold (DyMU, arXiv 2504.17040) every sample merges the pairs above it.
    Ties: the lowest B slot for a partner, the lowest A slot in the ranking; equal rows are exact ties, NaN
    comes last. Comparisons are in float32 (float64 for a float64 metric).

    At most half of a sample's free tokens merge, ``(valid - protected) // 2``; with ``split`` all of A may.

    Args:
        metric: ``[B, N, c]``, e.g. keys averaged over heads.
        r: merges per sample: an int, a sequence of B ints, or an int tensor ``[B]`` (not read on the host).
            None with a threshold: as many as are above it.
        threshold: merge only pairs whose cosine is above it (strictly): a number or ``[B]``.
        protect: tokens at the front (class token, distillation token, registers) that neither merge nor
            receive, and stay at the front.
        order: of the outputs. ``"tome"``: the protected front, the A tokens left (ascending if something is
            protected by ``protect``, else by rank: their best cosine, descending), then all B tokens.
            ``"position"``: the same with the A tokens always ascending. ``"original"``: by the first member
            of each group. A sample that merges nothing keeps its order. The order decides the halves of the next
            layer's matching.
        split: ``(A, B)``, int64 indices ``[Na]``, ``[Nb]`` or ``[B, Na]``, ``[B, Nb]`` (-1 for an empty
            slot), without repetition; "lowest" then means first in the list. Tokens in neither stay at the
            front. Default: even and odd positions.
        valid: bool ``[B, N]``, False for padding, which belongs behind the tokens: positions count it.
        protected: bool ``[B, N]``, further tokens that neither merge nor receive; they keep their place in
            the order of their half.
        backend: ``"torch"``, ``"triton"`` (float64 runs in PyTorch) or ``"reference"`` (slow, float64).

    Returns:
        A :class:`BipartiteMatch`.

    Raises:
        ValueError: neither ``r`` nor ``threshold``, an unknown order, an index out of range, or shapes that do
            not fit.
        TypeError: ``r`` is no count.
        BackendError: a forced backend cannot run.
    """
    problem = _check(metric, r, threshold, protect, order, split, valid, protected)
    choice = choose_backend("bipartite matching", backend, metric.device, ("reference", "torch", "triton"))
    if choice == "reference":
        from vlmprune.kernels.bipartite import reference

        return reference.run(problem)
    if 0 in (problem.batch, problem.a_index.shape[1], problem.b_index.shape[1]):
        return _nothing(problem)
    in_triton = choice == "triton" and problem.dtype == torch.float32
    scores, partner = _best(problem, in_triton)
    if problem.fixed:
        return _pairs(problem, scores, partner, in_triton)
    rank = _ranks(scores, problem.a_free, in_triton)
    return assemble(problem, scores, partner, rank, choose_merges(problem, scores, rank))


def _best(problem: Problem, in_triton: bool) -> tuple[Tensor, Tensor]:
    """Best cosine ``[B, Na]`` of every A slot and its partner; equal rows are ties."""
    if in_triton:
        from vlmprune.kernels.bipartite import triton_backend

        return triton_backend.best_partners(problem)
    units = unit_rows(problem.metric, problem.dtype)
    found = quick_partners(problem, units)
    return settle(problem, units, *torch_backend.best_partners(problem, units)) if found is None else found


def _pairs(problem: Problem, scores: Tensor, partner: Tensor, in_triton: bool) -> BipartiteMatch:
    if in_triton:
        from vlmprune.kernels.bipartite import triton_backend

        if triton_backend.can_select(problem):
            return triton_backend.select(problem, scores, partner)
    return assemble_pairs(problem, scores, partner)


def _ranks(scores: Tensor, free: Tensor, in_triton: bool) -> Tensor:
    if in_triton:
        from vlmprune.kernels.bipartite import triton_backend

        return triton_backend.ranks(scores, free)
    return torch_backend.ranks(scores, free)


def _check(
    metric: Tensor,
    r: Counts | None,
    threshold: float | Tensor | None,
    protect: int,
    order: Order,
    split: Split | None,
    valid: Tensor | None,
    protected: Tensor | None,
) -> Problem:
    if metric.ndim != 3 or not metric.is_floating_point():
        raise ValueError(f"metric must be a float tensor [B, N, c], got {metric.dtype} {tuple(metric.shape)}.")
    if order not in ("tome", "position", "original"):
        raise ValueError(f"Unknown order {order!r}; choose tome, position or original.")
    if r is None and threshold is None:
        raise ValueError("Say how many pairs merge: give r, a threshold, or both.")
    batch, n = metric.shape[:2]
    if protect < 0:
        raise ValueError(f"protect counts tokens, got {protect}.")
    if isinstance(threshold, Tensor) and tuple(threshold.shape) != (batch,):
        raise ValueError(f"threshold must be a number or have shape ({batch},), got {tuple(threshold.shape)}.")
    valid = check_mask(valid, (batch, n), "valid")
    check_mask(protected, (batch, n), "protected")
    plain = split is None and valid is None and protected is None
    a_index, b_index = _halves(split, batch, n, metric.device)
    free = torch.arange(n, device=metric.device).expand(batch, n) >= protect
    for mask in (valid, None if protected is None else ~protected):
        free = free if mask is None else free & mask
    most = a_index.shape[1] if split is not None else max(0, n - protect) // 2
    width, counts = (most, None) if r is None else token_counts(r, batch, n, None, metric.device)
    limit = None if counts is None else counts.clamp_min(0)
    if split is None and not plain:
        half = free.sum(1) // 2
        limit = half if limit is None else torch.minimum(limit, half)
    width = min(width, most)
    return Problem(
        metric=metric,
        a_index=a_index,
        b_index=b_index,
        a_free=free[:, 0::2] if plain else _of_slots(free, a_index),
        b_free=free[:, 1::2] if plain else _of_slots(free, b_index),
        valid=valid,
        protect=min(protect, n),
        width=width,
        limit=limit,
        threshold=threshold,
        order=order,
        dtype=compute_dtype(metric),
        exact=width == 0 or (split is None and limit is None and threshold is None),
        plain=plain,
    )


def _halves(split: Split | None, batch: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if split is None:
        token = torch.arange(n, device=device).expand(batch, n)
        return token[:, 0::2], token[:, 1::2]
    halves = []
    for name, index in zip("AB", split, strict=True):
        if index.is_floating_point() or index.dtype == torch.bool or index.ndim not in (1, 2):
            raise ValueError(f"split {name} must hold indices [K] or [B, K], got {index.dtype} {tuple(index.shape)}.")
        index = index.to(device=device, dtype=torch.int64)
        index = index.expand(batch, -1) if index.ndim == 1 else index
        if index.shape[0] != batch:
            raise ValueError(f"split {name} must have {batch} rows, got {index.shape[0]}.")
        halves.append(index)
    both = torch.cat(halves, 1)
    require((both >= -1) & (both < n), f"split holds an index outside 0..{n - 1}.")
    both = torch.where(both < 0, n, both)
    times = torch.zeros(batch, n + 1, dtype=torch.int64, device=device).scatter_add_(1, both, torch.ones_like(both))
    require(times[:, :n] <= 1, "split holds a token twice.")
    return halves[0], halves[1]


def _of_slots(mask: Tensor, index: Tensor) -> Tensor:
    if mask.shape[1] == 0:
        return torch.zeros_like(index, dtype=torch.bool)
    return mask.gather(1, index.clamp_min(0)) & (index >= 0)


def _nothing(problem: Problem) -> BipartiteMatch:
    """Result where one half is empty: every token stays."""
    scores = torch.full(problem.a_index.shape, -torch.inf, dtype=problem.dtype, device=problem.device)
    partner = torch.full_like(problem.a_index, -1)
    if problem.fixed:
        return assemble_pairs(problem, scores, partner)
    merged = torch.zeros_like(problem.a_index, dtype=torch.bool)
    rank = torch.arange(problem.a_index.shape[1], device=problem.device).expand_as(problem.a_index)
    if problem.b_index.shape[1] == 0:  # a slot to read from; nothing merges
        padded = torch.full((problem.batch, 1), -1, dtype=torch.int64, device=problem.device)
        whole = assemble(replace(problem, b_index=padded), scores, partner, rank, merged)
        return replace(whole, b_index=problem.b_index)
    return assemble(problem, scores, partner, rank, merged)
