"""What a report is made of: the images of the batch and the selections of the forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site
from vlmprune.core.source_map import SourceMap
from vlmprune.core.views import Newline, View


@dataclass(frozen=True)
class ImageRecord:
    """One image of the batch: its sample, its place there, its visual tokens, their views and newlines."""

    sample: int
    index: int
    n_tokens: int
    views: tuple[View, ...] = ()
    newlines: tuple[Newline, ...] = ()


@dataclass
class SiteRecord:
    """One selection. It covers all visual tokens of every sample that it names.

    Attributes:
        policy, site, layer, positions: what acted where and how positions were treated.
        samples: sample of each item.
        lengths: tokens per item that entered.
        selection: what was decided (device tensors).
        elapsed: callable that gives the milliseconds of the signals' reduction and the selection, or None
            where unknown.
        flops: FLOPs of the selection over all items, or None where the policy states none.
    """

    policy: str
    site: Site
    layer: int | None
    positions: str
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    selection: Selection
    elapsed: Callable[[], float | None] = field(default=lambda: None)
    flops: float | None = None

    @property
    def tokens_in(self) -> tuple[int, ...]:
        """Tokens per item that entered."""
        return self.lengths

    @property
    def tokens_out(self) -> tuple[int, ...]:
        """Tokens per item that left."""
        return self.selection.out_counts()

    @property
    def milliseconds(self) -> float | None:
        """Time of the selection."""
        return self.elapsed()

    def items(self, sample: int) -> list[int]:
        """Items that belong to a sample, in order."""
        return [item for item, other in enumerate(self.samples) if other == sample]

    @property
    def in_decoder(self) -> bool:
        """True if this happened at a decoder layer or its cache."""
        return self.site in (Site.DECODER_LAYER, Site.KV_CACHE)

    def acts_on(self, layer: int) -> bool:
        """True if the tokens that decoder layer ``layer`` works on, or stores, went through here."""
        if self.layer is None or not self.in_decoder:
            return True
        return self.layer == layer if self.site == Site.KV_CACHE else self.layer <= layer

    def source_map(self, sample: int) -> SourceMap:
        """Source map ``[1, M, N]`` of one sample, its items one after the other, without padding."""
        weights = self.selection.source_map().weights.float().cpu()
        valid = self.selection.out_valid().cpu()
        blocks = [weights[i, valid[i], : self.lengths[i]] for i in self.items(sample)]
        return SourceMap(torch.block_diag(*blocks)[None])

    def scores(self, sample: int) -> list[float] | None:
        """Scores of one sample's tokens, its items one after the other, or None if there are none."""
        scores = self.selection.scores
        if scores is None:
            return None
        return [value for i in self.items(sample) for value in scores[i, : self.lengths[i]].float().tolist()]

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "policy": self.policy,
            "site": self.site.value,
            "layer": self.layer,
            "positions": self.positions,
            "tokens_in": list(self.tokens_in),
            "tokens_out": list(self.tokens_out),
            "milliseconds": self.milliseconds,
            "flops": self.flops,
        }
