"""Policies for tests inside a tower: fixed tokens, or merges whose number differs from image to image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.core.sites import Place, Site, SiteRequest
from vlmprune.kernels.bipartite import bipartite_match


@dataclass(frozen=True)
class KeepPatches(Policy):
    """Keeps ``kept[i]`` of the patches of image ``i``, at one place of one block."""

    meta = PolicyMeta(title="fixed patches, for tests")
    name = "keep_patches"

    kept: tuple[tuple[int, ...], ...] = ()
    block: int = 1
    place: Place = "before"
    keep: float = 0.5

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return (SiteRequest(Site.VISION_BLOCK, self.block, (), place=self.place),)

    def select_vision_block(self, context: Context) -> Selection:
        mask = torch.zeros_like(context.valid)
        mask[:, : context.prefix] = True
        for item, patches in enumerate(self.kept):
            mask[item, [context.prefix + patch for patch in patches]] = True
        return Selection.from_mask(mask, tuple(context.prefix + len(patches) for patches in self.kept))


@dataclass(frozen=True)
class MergeEach(Policy):
    """Merges ``r[i]`` tokens of image ``i`` in every block."""

    meta = PolicyMeta(title="another number of merges per image, for tests")
    name = "merge_each"

    r: tuple[int, ...] = ()
    blocks: tuple[int, ...] = (0, 1, 2)
    keep: float = 0.5

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return tuple(SiteRequest(Site.VISION_BLOCK, block, (KeyMean(block),), place="middle") for block in self.blocks)

    def select_vision_block(self, context: Context) -> Selection:
        metric = context.signal(KeyMean(context.layer or 0))
        match = bipartite_match(metric, list(self.r), protect=context.prefix, valid=context.valid)
        counts = tuple(n - r for n, r in zip(context.lengths, self.r, strict=True))
        sizes = torch.ones_like(context.valid, dtype=torch.float32) if context.sizes is None else context.sizes
        return Selection.merge(match.group_id, max(counts), "wavg", sizes, counts)


@dataclass(frozen=True)
class Untouched(Policy):
    """Asks for everything that a block can give, and keeps every token, by groups of one."""

    meta = PolicyMeta(title="the identity as a merge, for tests")
    name = "untouched"

    place: Place = "middle"
    keep: float = 0.5

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        first = int(self.place == "before")
        return tuple(
            SiteRequest(Site.VISION_BLOCK, block, (KeyMean(block - first),), place=self.place)
            for block in range(first, info.vision_depth or 0)
        )

    def select_vision_block(self, context: Context) -> Selection:
        group = torch.arange(context.width).expand(context.n_items, -1)
        return Selection.merge(group, context.width, "mean", counts=context.lengths)
