"""Uniform tokens: every n-th one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.core.bases import SetPolicy
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.views import ViewGroup, on_device


@register("uniform")
@dataclass(frozen=True)
class Uniform(SetPolicy):
    """Keep K tokens at equal distances in reading order: ``int((i + 0.5) N / K)``.

    A baseline without a paper. Acts after the projector, needs no signal. Several views of an image share the
    budget in proportion to their tokens.

    Args:
        keep: K = floor(share * N), or a number of tokens per image.

    Cost: no FLOPs.

    Example:
        >>> uniform_places(10, 4)
        [1, 3, 6, 8]
    """

    meta = PolicyMeta(title="Uniformly spaced tokens (baseline)")

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float:
        return 0.0

    def pick(self, context: Context, group: ViewGroup) -> Tensor:
        places = uniform_places(group.height * group.width, group.count)
        return on_device(places, context.device).expand(len(group.item), -1)


def uniform_places(n: int, count: int) -> list[int]:
    """The middles of ``count`` equal parts of ``n`` places, rounded down; distinct for ``count`` up to
    ``n``."""
    return [(2 * i + 1) * n // (2 * count) for i in range(count)]
