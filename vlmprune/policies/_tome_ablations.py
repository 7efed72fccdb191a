"""Two other ways to choose what merges, from the ablations of ToMe's official code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.views import on_device
from vlmprune.kernels.bipartite import BipartiteMatch, Order, bipartite_match
from vlmprune.policies._merging import block_generator, free_lengths, padding_mask


def match_kth(
    context: Context, metric: Tensor, k: int, order: Order = "tome"
) -> tuple[BipartiteMatch, tuple[int, ...]]:
    """All but the last of every ``k`` tokens merge into their most similar of these last ones.

    The tokens behind the last whole group are dropped; an item of fewer than k free tokens stays as it is.

    Args:
        context: at ``vision_block``.
        metric: ``[I, N, c]``.
        k: tokens per group.
        order: of the outputs.

    Returns:
        The matching, -1 in ``group_id`` for what is dropped, and how many tokens each item loses without pinned ones.
    """
    groups = tuple(n // k for n in free_lengths(context))
    places = [list(range(context.prefix, context.prefix + k * number)) for number in groups]
    sources = [[token for i, token in enumerate(row) if i % k < k - 1] for row in places]
    split = (ragged(sources, context.device), ragged([row[k - 1 :: k] for row in places], context.device))
    ends = [context.prefix + k * g if g else n for g, n in zip(groups, context.lengths, strict=True)]
    valid = torch.arange(context.width, device=context.device) < on_device(ends, context.device)[:, None]
    if context.pinned is not None:
        valid = (valid | context.pinned) & context.valid
    match = bipartite_match(
        metric,
        split[0].shape[1],
        protect=context.prefix,
        order=order,
        split=split,
        valid=valid,
        protected=context.pinned,
    )
    lost = [n - context.prefix - g if g else 0 for g, n in zip(groups, context.lengths, strict=True)]
    return match, tuple(lost)


def match_random(context: Context, metric: Tensor, r: Sequence[int], order: Order = "tome") -> BipartiteMatch:
    """``r`` tokens of each item, drawn by its seed and the block, merge into their most similar of the others.

    Args:
        context: at ``vision_block``, with seeds.
        metric: ``[I, N, c]``.
        r: tokens drawn of each item.
        order: of the outputs.
    """
    sources, targets = [], []
    for item, (n, number) in enumerate(zip(free_lengths(context), r, strict=True)):
        drawn = context.prefix + torch.randperm(n, generator=block_generator(context, item))
        sources.append(drawn[:number].sort().values.tolist())
        targets.append(drawn[number:].sort().values.tolist())
    return bipartite_match(
        metric,
        max(r),
        protect=context.prefix,
        order=order,
        split=(ragged(sources, context.device), ragged(targets, context.device)),
        valid=padding_mask(context),
        protected=context.pinned,
    )


def ragged(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 ``[I, K]`` of rows of different length, -1 fill."""
    width = max((len(row) for row in rows), default=0)
    return on_device([[*row, *(-1,) * (width - len(row))] for row in rows], device)
