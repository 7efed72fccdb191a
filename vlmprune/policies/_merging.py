"""Merges inside a vision tower: matching the tokens of a context, and the matching as a selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.pairs import Pairs
from vlmprune.core.randomness import generator
from vlmprune.core.selection import Selection
from vlmprune.core.views import on_device
from vlmprune.kernels.bipartite import BipartiteMatch, Order, bipartite_match


def match_halves(
    context: Context,
    metric: Tensor,
    r: Sequence[int] | None = None,
    *,
    threshold: float | Tensor | None = None,
    order: Order = "tome",
) -> BipartiteMatch:
    """Match the even and odd tokens of every item; prefix, pinned and padding tokens take no part.

    Args:
        context: at ``vision_block``.
        metric: ``[I, N, c]``.
        r: merges of each item, at most half of its free tokens; None for as many as are above the threshold.
        threshold: cosine that a pair must exceed, a number or ``[I]``.
        order: of the outputs, see :func:`vlmprune.kernels.bipartite.bipartite_match`.
    """
    return bipartite_match(
        metric,
        None if r is None else host_counts(r, context.device),
        threshold=threshold,
        protect=context.prefix,
        order=order,
        valid=padding_mask(context),
        protected=context.pinned,
    )


def merge_selection(context: Context, match: BipartiteMatch, counts: tuple[int, ...] | None = None) -> Selection:
    """The matching as a selection that merges by size-weighted means.

    Args:
        context: at ``vision_block``.
        match: of its tokens.
        counts: outputs of each item where the host knows them; None leaves them on the device, with a width that
            holds them all.
    """
    selection = merge_groups_of(context, match.group_id, match.n_out, counts)
    if match.kept is None or match.sources is None or match.into is None:
        return selection
    return replace(selection, pairs=Pairs(match.kept, match.sources, match.into))


def merge_groups_of(context: Context, group_id: Tensor, n_out: int, counts: tuple[int, ...] | None = None) -> Selection:
    """A selection that merges tokens of equal ``group_id [I, N]`` by size-weighted means, -1 drops."""
    width = n_out if counts is None else max(counts, default=0)
    return Selection.merge(group_id, width, "wavg", token_sizes(context), counts)


def token_sizes(context: Context) -> Tensor:
    """``[I, N]`` float32 tokens behind each token, ones where nothing was merged yet."""
    if context.sizes is not None:
        return context.sizes.float()
    return torch.ones(context.valid.shape, device=context.device)


def padding_mask(context: Context) -> Tensor | None:
    """``valid``, or None where the host knows that there is no padding."""
    return None if all(length == context.width for length in context.lengths) else context.valid


def free_lengths(context: Context) -> tuple[int, ...]:
    """Tokens of each item that are not prefix tokens; pinned ones count."""
    return tuple(max(0, length - context.prefix) for length in context.lengths)


def free_entered(context: Context) -> tuple[int, ...]:
    """Tokens of each item that were not prefix tokens when it entered the tower."""
    return tuple(max(0, length - context.prefix) for length in context.entered)


MISSED = 0.1
"""Share by which windows may be off a budget before a note says so."""


def host_counts(counts: Sequence[int], device: torch.device) -> int | Tensor:
    """One number where all are equal, else an int64 tensor that was copied without waiting for the device."""
    return counts[0] if counts and len(set(counts)) == 1 else on_device(list(counts), device)


def block_generator(context: Context, item: int) -> torch.Generator:
    """A generator of one item's seed and the block, so that blocks draw differently."""
    return generator(context.item_generator(item).initial_seed() + (context.layer or 0))


def reach_notes(
    context: Context,
    name: str,
    shortfall: Callable[[ModelInfo, Budget, int], str | None],
    counts: Sequence[int],
) -> tuple[str, ...]:
    """What the report says of budgets that a policy's blocks could not reach, each reason once.

    Args:
        context: at the policy's last block.
        name: of the policy.
        shortfall: reason for a budget on so many free tokens, None where it is reached.
        counts: tokens of each item that are left.
    """
    pairs = {(context.item_budget(item), n) for item, n in enumerate(free_entered(context)) if n}
    reasons = {shortfall(context.info, budget, n) for budget, n in pairs}
    reasons.add(_missed_in_windows(context, counts))
    return tuple(sorted(f"{name}: {reason}." for reason in reasons if reason))


def _missed_in_windows(context: Context, counts: Sequence[int]) -> str | None:
    """What keeps a share from being met where a view's windows are reduced one by one, None if it is met."""
    entered, budgets = free_entered(context), [context.item_budget(item) for item in range(context.n_items)]
    if context.info.full_attention_blocks is None or any(budget.share is None for budget in budgets):
        return None
    wanted = sum((budget.share or 0.0) * n for budget, n in zip(budgets, entered, strict=True))
    left = sum(counts) - context.prefix * context.n_items
    if abs(left - wanted) <= max(1.0, MISSED * wanted):
        return None
    return (
        f"{left} of {sum(entered)} tokens are left where {context.budget} asks for {wanted:.0f}: windows of "
        f"{max(entered)} tokens are reduced one by one, in whole tokens and to one at least"
    )
