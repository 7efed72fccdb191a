"""The matchings of DyMU: pairs above a threshold, the best pairs of an item, the best pairs of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.signals import KeyMean
from vlmprune.kernels.bipartite import BipartiteMatch, Order, bipartite_match
from vlmprune.policies import _merging as merging

LEAST = -1.0
"""Similarity shown for tokens that look for no partner: no cosine is smaller."""


def above(context: Context, threshold: float, limits: Sequence[int] | None, official: bool) -> BipartiteMatch:
    """Pairs above the threshold in every item.

    Args:
        context: at ``vision_block``.
        threshold: that a cosine must exceed.
        limits: merges of each item at most, None for half of its free tokens.
        official: order and limit of the official code, which depend on whether there is one item or several.
    """
    metric = context.signal(KeyMean(context.layer or 0))
    if official and context.n_items > 1:
        return _without_half(context, metric, limits, threshold)
    order: Order = "tome" if official else "position"
    return merging.match_halves(context, metric, limits, threshold=threshold, order=order)


def best(context: Context, counts: Sequence[int], official: bool) -> BipartiteMatch:
    """The ``counts[i]`` best pairs of every item, as in ToMe."""
    metric = context.signal(KeyMean(context.layer or 0))
    return merging.match_halves(context, metric, counts, order="tome" if official else "position")


def best_of_batch(
    context: Context, wanted: Sequence[float], limits: Sequence[int] | None, official: bool
) -> BipartiteMatch:
    """The best pairs of all items together, at most half of an item's free tokens. The scores of pairs beyond an
    item's limit are -inf.

    Args:
        context: at ``vision_block``.
        wanted: merges that each item contributes to their number, at most half of the longest item's free tokens.
        limits: merges of each item at most, None for no other limit.
        official: an item may merge all its tokens at even positions.
    """
    metric = context.signal(KeyMean(context.layer or 0))
    probe = _without_half(context, metric, (0,) * context.n_items)
    scores = probe.scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    if not official:
        free = context.candidates & (torch.arange(context.width, device=context.device) >= context.prefix)
        scores = scores.masked_fill(rank >= free.sum(1, keepdim=True) // 2, -torch.inf)
    if limits is not None:
        scores = scores.masked_fill(rank >= torch.tensor(limits, device=context.device)[:, None], -torch.inf)
    half = max(merging.free_lengths(context), default=0) // 2
    number = min(round(sum(min(r, half) for r in wanted)), scores.numel())
    first = scores.flatten().argsort(dim=0, descending=True, stable=True)[:number]
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=context.device)
    chosen[first] = True
    counts = (chosen.view_as(scores) & (scores > -torch.inf)).sum(1)
    return replace(_without_half(context, metric, counts), scores=scores)


def token_scores(context: Context, match: BipartiteMatch) -> Tensor:
    """``[I, N]`` float32: the best cosine of every token that looks for a partner, ``LEAST`` for the others."""
    found = torch.full(context.valid.shape, LEAST, device=context.device)
    found[:, 0::2] = match.scores.float().nan_to_num(nan=LEAST, neginf=LEAST)
    return found


def _without_half(
    context: Context, metric: Tensor, r: Sequence[int] | Tensor | None, threshold: float | None = None
) -> BipartiteMatch:
    """Matching in which all tokens at even positions may merge."""
    token = torch.arange(context.width, device=context.device)
    return bipartite_match(
        metric,
        r if r is None or isinstance(r, Tensor) else merging.host_counts(r, context.device),
        threshold=threshold,
        protect=context.prefix,
        order="position",
        split=(token[0::2], token[1::2]),
        valid=merging.padding_mask(context),
        protected=context.pinned,
    )
