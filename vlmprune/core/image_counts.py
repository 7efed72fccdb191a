"""Budgets at decoder sites, where an item is a sample that may hold several images."""

from __future__ import annotations

import torch

from vlmprune.core.budget import Budget, Rounding
from vlmprune.core.context import Context


def entered_lengths(context: Context, item: int) -> tuple[int, ...]:
    """Tokens of each of the item's images as they entered the decoder; one image where that is not known."""
    return context.image_lengths[item] if context.image_lengths else (context.lengths[item],)


def sample_counts(
    context: Context, budget: Budget, rounding: Rounding = "floor", minimum: int = 1, original: bool = False
) -> tuple[int, ...]:
    """Tokens to keep of each sample, never more than it has.

    Args:
        budget: a share of the sample's tokens, or a number of tokens per image of the sample.
        rounding, minimum: of a share, see :meth:`vlmprune.core.budget.Budget.count`.
        original: a share is one of the tokens that entered the decoder, not of those that entered the site.
    """
    counts = []
    for item, here in enumerate(context.lengths):
        images = entered_lengths(context, item)
        if budget.tokens is not None:
            count = sum(budget.count(length) for length in images)
        else:
            count = budget.count(sum(images) if original else here, rounding, minimum)
        counts.append(min(count, here))
    return tuple(counts)


def current_image_lengths(context: Context) -> tuple[tuple[int, ...], ...]:
    """Tokens of each image of each sample as they enter this site.

    Read from the device (a synchronisation) only where an earlier decoder site left fewer than entered the decoder.
    """
    entered = tuple(entered_lengths(context, item) for item in range(context.n_items))
    if all(sum(images) == here for images, here in zip(entered, context.lengths, strict=True)):
        return entered
    assert context.image_id is not None
    n_images = max(map(len, entered))
    numbers = torch.arange(n_images, device=context.device)
    counts = (context.image_id[:, :, None] == numbers).sum(1).tolist()
    return tuple(tuple(row[: len(images)]) for row, images in zip(counts, entered, strict=True))
