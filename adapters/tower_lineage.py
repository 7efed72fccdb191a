"""What a reduction inside the tower means for the tokens of the LLM: which of them are one and the same now."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.core.flops import tower_flops
from vlmprune.core.info import ModelInfo
from vlmprune.core.records import SiteRecord
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Positions, Site

BLEND = 1e-3
"""Variance of group numbers above which a token is a blend of several groups."""
HALF = 0.5 + 1e-6
"""Share of a token that may be dropped, rounding included."""


@dataclass(frozen=True)
class BlockLoad:
    """Tokens of each item that a block's attention or MLP works on; ``computed`` with padding."""

    lengths: tuple[int, ...]
    computed: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean tokens per item."""
        return sum(self.lengths) / max(1, len(self.lengths))


@dataclass(frozen=True, eq=False)
class TowerOutcome:
    """What one run of a tower did to its tokens.

    Attributes:
        tokens: as they left the last block that matters.
        records: the selections, items as in the tower.
        attended_loads, passed_loads: what every block's attention and MLP worked on.
        positions: how the LLM numbers what is left.
    """

    tokens: TowerTokens
    records: tuple[SiteRecord, ...]
    attended_loads: tuple[BlockLoad, ...]
    passed_loads: tuple[BlockLoad, ...]
    positions: Positions

    @property
    def attended(self) -> tuple[float, ...]:
        """Mean tokens per item in every block's attention."""
        return tuple(load.mean for load in self.attended_loads)

    @property
    def passed(self) -> tuple[float, ...]:
        """Mean tokens per item in every block's MLP."""
        return tuple(load.mean for load in self.passed_loads)

    def flops(self, info: ModelInfo) -> tuple[float | None, float | None]:
        """FLOPs of the blocks, reduced and dense, by :func:`vlmprune.core.flops.tower_flops`; None where the sizes are
        not known or items are windows, smaller than what some blocks attend to."""
        entered = self.tokens.entered
        if self.tokens.item_views != tuple(range(len(entered))):
            return None, None
        each = zip(*(load.computed for load in (*self.attended_loads, *self.passed_loads)), strict=True)
        depth = len(self.attended_loads)
        dense = Counter((n,) * 2 * depth for n in entered)
        return self._flops(info, Counter(each), depth), self._flops(info, dense, depth)

    def _flops(self, info: ModelInfo, items: Counter[tuple[int, ...]], depth: int) -> float | None:
        """FLOPs of items, told by the tokens in each block's attention and then in each block's MLP."""
        prefix, unit = self.tokens.prefix, info.merge_unit
        total = 0.0
        for tokens, count in items.items():
            patches = [prefix + unit * (n - prefix) for n in tokens]
            found = tower_flops(info, patches[:depth], patches[depth:], count)
            if found is None:
                return None
            total += found
        return total


def lineage(
    groups: Tensor, to_tokens: Callable[..., Tensor], valid: Tensor, newline: Tensor | None, separate: bool
) -> tuple[Selection, Tensor | None]:
    """The tokens of the LLM that are left, as a selection over those that the prompt has places for.

    A token whose patches all belong to one group stands for that group; one that blends several (interpolated
    or pooled tokens) stays on its own, unless more than half of it was dropped.

    Args:
        groups: ``[V, P]`` token of the tower behind each patch, numbered per view, -1 for dropped ones.
        to_tokens: takes values of patches ``[V, P, C]`` to values of tokens ``[I, N, C]``, newlines 0.
        valid: ``[I, N]`` bool, not padding.
        newline: ``[I, N]`` bool, separator tokens, None where there are none.
        separate: newlines are kept as tokens of their own, not left out.

    Returns:
        The selection, and ``[I, N]`` what share of every token is left, None where each is there or gone as a whole.
    """
    views, patches = groups.shape
    number = groups + patches * torch.arange(views, device=groups.device)[:, None]
    number = number.double() / max(1, views * patches)  # at most 1, so that the variance below is exact enough
    gone = (groups < 0).double()
    number, square, gone = to_tokens(torch.stack([number, number**2, gone], 2)).unbind(2)
    scale = float(views * patches)
    blended = (square - number**2) * scale**2 > BLEND
    there = valid & (gone <= HALF) if newline is None else valid & (gone <= HALF) & ~newline
    partial = there & (gone > 0)
    number = (number * scale).round().long()
    token = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    alone = there & (blended | partial)
    if newline is not None and separate:
        alone = alone | (valid & newline)
        there = there | alone
    number = torch.where(alone, int(scale) + token, number)
    first = first_equal(torch.where(there, number, 2 * int(scale) + valid.shape[1] + token))
    opens = there & (first == token)
    rank = opens.long().cumsum(1) - 1
    group = torch.where(there, rank.gather(1, first), -1)
    *counts, partly = torch.cat([opens.sum(1), partial.any()[None].long()]).tolist()
    merged = Selection.merge(group, max(counts, default=0), "mean", counts=tuple(counts))
    merged = replace(merged, carry={"sizes": valid.to(torch.float32)})
    return merged, torch.where(partial, 1 - gone, 1.0) if partly else None


def first_equal(number: Tensor) -> Tensor:
    """``[I, N]`` lowest place with the same number in the row."""
    value, order = number.sort(dim=1, stable=True)
    place = torch.arange(number.shape[1], device=number.device).expand_as(number)
    starts = torch.ones_like(value, dtype=torch.bool)
    starts[:, 1:] = value[:, 1:] != value[:, :-1]
    start = torch.where(starts, place, 0).cummax(1).values
    return torch.empty_like(number).scatter_(1, order, order.gather(1, start))


def tower_record(
    records: Sequence[SiteRecord],
    selection: Selection,
    samples: tuple[int, ...],
    lengths: tuple[int, ...],
    positions: Positions,
) -> SiteRecord:
    """All selections inside the tower as one over the tokens that the model has without them.

    Args:
        records: the selections.
        selection: what they mean.
        samples, lengths: of the items of ``selection``.
        positions: how what is left is numbered.
    """
    known = [record.flops for record in records]
    return SiteRecord(
        policy=" + ".join(dict.fromkeys(record.policy for record in records)),
        site=Site.VISION_BLOCK,
        layer=max(record.layer or 0 for record in records),
        positions=positions,
        samples=samples,
        lengths=lengths,
        selection=selection,
        elapsed=functools.partial(_summed, records),
        flops=None if None in known else sum(flops for flops in known if flops is not None),
    )


def _summed(records: Sequence[SiteRecord]) -> float | None:
    """Milliseconds of all selections, None where one is not known."""
    times = [record.milliseconds for record in records]
    return None if None in times else sum(time for time in times if time is not None)
