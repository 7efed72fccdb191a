"""Attention between units of patches, from that between patches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.core.attention import StreamedHeads
from vlmprune.kernels.pagerank import pagerank
from vlmprune.kernels.precision import compute_dtype


@dataclass(frozen=True, eq=False)
class UnitHeads:
    """:class:`~vlmprune.core.attention.AttentionHeads` of units of patches inside items.

    A unit's row is the mean of its patches' rows, its column the sum of their columns. Attention counts only inside
    an item, whatever the block allows: each row is normalised over the item's patches.

    Args:
        query, key: ``[I, H, n * unit, d]``, the patches of a unit side by side.
        scale: of their products.
        unit: patches of a unit.
        valid: bool ``[I, n]``, units that are no padding.
    """

    query: Tensor
    key: Tensor
    scale: float
    unit: int
    valid: Tensor

    def pagerank(self, iters: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
        """See :class:`~vlmprune.core.attention.AttentionHeads`; padding scores 0."""
        there = self.valid if alive is None else self.valid & alive
        patches = there.repeat_interleave(self.unit, 1)
        items, heads = self.query.shape[:2]
        votes = start.to(compute_dtype(self.query, self.key))
        votes = votes if votes.ndim == 3 else votes[:, None].expand(items, heads, -1)
        votes = votes.masked_fill(~there[:, None], 0.0)
        for _ in range(iters):
            spread = (votes / self.unit).repeat_interleave(self.unit, 2)
            received = pagerank(None, 1, qk=(self.query, self.key), scale=self.scale, start=spread, alive=patches)
            votes = received.unflatten(2, (-1, self.unit)).sum(3)
        return votes

    def mean_scores(self, tau: float = 1.0) -> UnitHeads:
        """See :class:`~vlmprune.core.attention.AttentionHeads`; scores are those between patches."""
        mean = StreamedHeads(self.query, self.key, self.scale).mean_scores(tau)
        assert mean.scale is not None
        return UnitHeads(mean.query, mean.key, mean.scale, self.unit, self.valid)
