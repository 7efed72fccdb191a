"""Random tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.core.bases import SingleSitePolicy
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection


@register("random")
@dataclass(frozen=True)
class RandomTokens(SingleSitePolicy):
    """Keep K distinct tokens drawn uniformly.

    A baseline without a paper of its own; that it is hard to beat is reported by "Are We Using the Right
    Benchmark", arXiv 2510.07143 (ACL 2026), and UniPruneBench, arXiv 2511.02650. Report the mean and spread
    of three or more seeds.

    Acts after the projector, needs no signal. Several views of an image share the budget in proportion to
    their tokens.

    Args:
        keep: K = floor(share * N), or a number of tokens per image.
        seed: global seed. Each image has its own generator, seeded by this, the image's content (or the
            harness's sample id) and its place in the sample, on the CPU: the draw depends on neither batch
            order nor device.

    Cost: no FLOPs.

    Example:
        >>> RandomTokens(keep=64, seed=1).budget.count(576)
        64
    """

    meta = PolicyMeta(title="Random tokens (baseline)")

    seed: int = 0

    def is_random(self, info: ModelInfo) -> bool:
        return True

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float:
        return 0.0

    def decide(self, context: Context) -> Selection:
        counts = context.counts(self.rounding)
        kept = torch.full((context.n_items, max(counts, default=0)), -1, dtype=torch.long)
        for item, view_counts in enumerate(context.view_counts(counts)):
            draw = context.item_generator(item)
            rows = [
                view.tokens()[torch.randperm(view.length, generator=draw)[:count]]
                for view, count in zip(context.item_views(item), view_counts, strict=True)
            ]
            kept[item, : counts[item]] = torch.cat(rows).sort().values
        return Selection(context.width, kept.to(context.device, non_blocking=True), counts)
