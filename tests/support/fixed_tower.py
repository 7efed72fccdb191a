"""A policy for tests that reduces tokens inside a vision tower to groups that are known before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Place, Site, SiteRequest

Groups = tuple[tuple[int, ...], ...]
"""Tokens that make each output of an item, by their numbers; others are dropped."""


@dataclass(frozen=True)
class FixedGroups(Policy):
    """Makes listed groups of every item's tokens, merged by size: ``groups[run][item]``.

    The run of a tower is told by its number of items.
    """

    meta = PolicyMeta(title="fixed groups inside a tower, for tests")
    name = "fixed_groups"

    groups: tuple[tuple[Groups, ...], ...] = ()
    layer: int = 0
    place: Place = "middle"
    size_bias: bool = True
    keep: Any = 0.5

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        positions = self.resolve_positions(info, "keep")
        return (SiteRequest(Site.VISION_BLOCK, self.layer, (), positions, place=self.place, size_bias=self.size_bias),)

    def select(self, context: Context) -> Selection:
        [table] = [run for run in self.groups if len(run) == context.n_items]
        counts = tuple(len(item) for item in table)
        if all(len(group) == 1 for item in table for group in item):  # as a pruning policy says it
            mask = torch.zeros_like(context.valid)
            for item, groups in enumerate(table):
                mask[item, [token for group in groups for token in group]] = True
            return Selection.from_mask(mask, counts)
        number = torch.full(context.valid.shape, -1)
        for item, groups in enumerate(table):
            for output, group in enumerate(groups):
                number[item, list(group)] = output
        sizes = context.valid.float() if context.sizes is None else context.sizes
        return Selection.merge(number, max(counts), "wavg", sizes, counts)


def random_groups(lengths: list[int], seed: int, merge: bool, empty: bool = True) -> tuple[Groups, ...]:
    """Per item random groups of its tokens, or some of them alone; with ``empty`` every third item loses all."""
    generator = torch.Generator().manual_seed(seed)
    table = []
    for item, n in enumerate(lengths):
        order = torch.randperm(n, generator=generator).tolist()
        gone = n if empty and item % 3 == 1 else n // 4
        left = order[gone:]
        if not merge:
            table.append(tuple((token,) for token in sorted(left)))
            continue
        half = max(1, (len(left) + 1) // 2)
        groups = [left[i::half] for i in range(min(half, len(left)))]
        table.append(tuple(tuple(sorted(group)) for group in groups))
    return tuple(table)


def stages_for(lengths: list[int], seed: int, merge: bool, where: tuple[tuple[int, Place], ...]) -> list[FixedGroups]:
    """Random stages, one after the other, for a run with items of these lengths; the first one empties some."""
    stages = []
    for number, (layer, place) in enumerate(where):
        table = random_groups(lengths, seed + number, merge, empty=number == 0)
        stages.append(FixedGroups(groups=(table,), layer=layer, place=place))
        lengths = [len(groups) for groups in table]
    return stages
