"""A coarser grid: tokens at equal distances in both directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vlmprune.core.bases import SetPolicy
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.views import ViewGroup, on_device
from vlmprune.policies.uniform import uniform_places


@register("grid")
@dataclass(frozen=True)
class Grid(SetPolicy):
    """Keep the tokens of an evenly spaced h x w sub-grid of every view's H x W grid.

    A baseline without a paper. Acts after the projector, needs no signal. Several views of an image share the
    budget in proportion to their tokens.

    Args:
        keep: K = floor(share * N), or a number of tokens per image. ``h = round(sqrt(K H / W))`` and ``w = K
            // h``, at least 1 and at most H and W: the nearest grid of the same shape, so fewer than K may stay.
            (For a K below about H / W, on a view several times as high as wide, h tokens stay, which is more.)

    Cost: no FLOPs.

    Example:
        >>> grid_shape(24, 24, 192)
        (14, 13)
    """

    meta = PolicyMeta(title="Evenly spaced sub-grid (baseline)")

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float:
        return 0.0

    def pick(self, context: Context, group: ViewGroup) -> Tensor:
        cells = grid_cells(group.height, group.width, group.count)
        return on_device(cells, context.device).expand(len(group.item), -1)


def grid_shape(height: int, width: int, count: int) -> tuple[int, int]:
    """Rows and columns of the sub-grid for a budget of ``count`` tokens on a ``height`` x ``width`` grid."""
    rows = min(height, max(1, round(math.sqrt(count * height / width))))
    return rows, min(width, max(1, count // rows))


def grid_cells(height: int, width: int, count: int) -> list[int]:
    """Flat places of the sub-grid's tokens, ascending."""
    rows, columns = grid_shape(height, width, count)
    return [r * width + c for r in uniform_places(height, rows) for c in uniform_places(width, columns)]
