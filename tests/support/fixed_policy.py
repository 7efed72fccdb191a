"""Policies for tests: fixed tokens at any site, so that a reference knows what was kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmprune.core.bases import CachePolicy
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Positions, Site, SiteRequest


@dataclass(frozen=True)
class FixedKeep(Policy):
    """Keeps listed tokens of every item: ``kept[i]`` for item ``i`` (image or sample).

    Where ``generate`` repeats the rows (beams, several returned sequences), each copy keeps the same.
    """

    meta = PolicyMeta(title="fixed tokens, for tests")
    name = "fixed"
    newlines = "compete"

    kept: tuple[tuple[int, ...], ...] = ()
    site: Site = Site.POST_ENCODER
    layer: int | None = None
    keep: float = 0.5

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return (SiteRequest(self.site, self.layer, (), self.resolve_positions(info, "keep")),)

    def select(self, context: Context) -> Selection:
        mask = torch.zeros_like(context.valid)
        kept = self._repeated(context)
        for item, tokens in enumerate(kept):
            mask[item, list(tokens)] = True
        return Selection.from_mask(mask & context.valid, tuple(len(tokens) for tokens in kept))

    def _repeated(self, context: Context) -> list[tuple[int, ...]]:
        """``kept`` of every item of a batch whose rows may be repeated."""
        repeats = context.n_items // len(self.kept)
        first = [item for item, row in enumerate(context.sample) if row % repeats == 0]
        source = {(context.sample[item] // repeats, context.image_index(item)): i for i, item in enumerate(first)}
        return [self.kept[source[row // repeats, context.image_index(item)]] for item, row in enumerate(context.sample)]


@dataclass(frozen=True)
class MeanGroups(FixedKeep):
    """Merges runs of ``size`` neighbouring tokens by their mean."""

    size: int = 2

    def select(self, context: Context) -> Selection:
        index = torch.arange(context.width, device=context.device) // self.size
        groups = torch.where(context.valid, index, -1)
        counts = tuple(-(-n // self.size) for n in context.lengths)
        return Selection.merge(groups, max(counts), mode="mean", counts=counts)


@dataclass(frozen=True)
class FixedGroups(FixedKeep):
    """Merges tokens by their mean: ``kept[i]`` names the group of each token of item ``i``, -1 for dropped ones."""

    positions: Positions = "virtual"

    def select(self, context: Context) -> Selection:
        groups = torch.full_like(context.valid, -1, dtype=torch.long)
        kept = self._repeated(context)
        for item, given in enumerate(kept):
            groups[item, : len(given)] = torch.tensor(given)
        counts = tuple(len(set(given) - {-1}) for given in kept)
        return Selection.merge(groups, max(counts), "mean", counts=counts)


Kept = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class FixedEviction(CachePolicy):
    """Keeps ``kept[layer][item]`` of sample ``item``'s visual tokens in the cache of each layer."""

    meta = PolicyMeta(title="fixed evictions, for tests")
    name = "fixed_eviction"

    kept: Kept = ()
    keep: Any = 0.5

    def cache_signals(self, info: ModelInfo, layer: int) -> tuple[Signal, ...]:
        return ()

    def select_kv_cache(self, context: Context) -> Selection:
        mask = torch.zeros_like(context.valid)
        for item, tokens in enumerate(self.kept[context.layer or 0]):
            mask[item, list(tokens)] = True
        return Selection.from_mask(mask & context.valid)
