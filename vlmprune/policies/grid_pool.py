"""Pooling to a coarser grid: new tokens, each the mean of a cell of neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vlmprune.core.bases import SingleSitePolicy
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection, Synthetic
from vlmprune.core.signals import Projected, Signal
from vlmprune.core.views import View, ViewGroup, on_device
from vlmprune.policies.grid import grid_cells, grid_shape


@register("grid_pool")
@dataclass(frozen=True)
class GridPool(SingleSitePolicy):
    """Replace every view's H x W tokens by an h x w grid of averages (adaptive average pooling).

    A baseline without a paper. Acts after the projector on its output. Several views of an image share the
    budget in proportion to their tokens.

    Args:
        keep: K = floor(share * N), or a number of tokens per image; h and w as in ``grid``, so fewer than K
            may result.

    New tokens are averages in float32, cast back. They take the place (and, where positions are kept, the
    position) of the tokens that ``grid`` would choose.

    Cost: about ``2 N D`` FLOPs.

    Example:
        >>> pool_weights(3, 2).tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """

    meta = PolicyMeta(title="Average pooling to a coarser grid (baseline)")

    def signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return (Projected(),)

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        return None if info.text_hidden is None else 2.0 * n_tokens * info.text_hidden

    def decide(self, context: Context) -> Selection:
        x = context.signal(Projected())
        view_counts = context.view_counts(context.counts(self.rounding))
        sizes = [
            [_n_pooled(view, count) for view, count in zip(context.item_views(item), counts, strict=True)]
            for item, counts in enumerate(view_counts)
        ]
        n_out = tuple(sum(row) for row in sizes)
        if n_out == context.lengths:
            return Selection.keep_all(context.valid, context.lengths)  # pooling to the same grid changes nothing
        features = x.new_zeros(context.n_items, max(n_out, default=0), x.shape[2])
        sources = torch.zeros(*features.shape[:2], context.width, device=x.device)
        place = torch.full(features.shape[:2], -1, dtype=torch.long, device=x.device)
        for group in context.view_groups(view_counts):
            if group.count == 0:
                continue
            start = on_device([sum(sizes[item][:view]) for item, view in group.places], x.device)
            rows, columns = grid_shape(group.height, group.width, group.count)
            slot = start[:, None] + torch.arange(rows * columns, device=x.device)  # [V, rows * columns]
            item = group.item[:, None]
            features[item, slot] = pool(group.gather(x), group, rows, columns)
            weights = torch.kron(pool_weights(group.height, rows), pool_weights(group.width, columns))
            weights = weights.to(x.device, non_blocking=True)
            sources[item[..., None], slot[..., None], group.index[:, None]] = weights
            cells = on_device(grid_cells(group.height, group.width, group.count), x.device)
            place[item, slot] = group.index[:, cells]
        nothing = place.new_empty(context.n_items, 0)
        return Selection(context.width, nothing, n_out, synthetic=Synthetic(features, sources, place))


def pool(x: Tensor, group: ViewGroup, rows: int, columns: int) -> Tensor:
    """Averages ``[V, rows * columns, D]`` of ``x [V, n, D]``, computed in float32 or wider, in its dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    grid = wide.transpose(1, 2).unflatten(2, (group.height, group.width))  # [V, D, H, W]
    return adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).transpose(1, 2).to(x.dtype)


def pool_weights(n: int, count: int) -> Tensor:
    """``[count, n]`` weights of adaptive average pooling.

    Part i averages the places from ``floor(i n / count)`` to below ``ceil((i + 1) n / count)``.
    """
    weights = torch.zeros(count, n)
    for i in range(count):
        start, end = i * n // count, -(-(i + 1) * n // count)
        weights[i, start:end] = 1 / (end - start)
    return weights


def _n_pooled(view: View, count: int) -> int:
    rows, columns = grid_shape(view.height, view.width, count) if count else (0, 0)
    return rows * columns
