"""Attention between the tokens of a tower per head, where a token may be a unit of several patches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.kernels.pagerank import pagerank
from vlmprune.kernels.precision import compute_dtype


@dataclass(frozen=True, eq=False)
class UnitHeads:
    """:class:`~vlmprune.core.attention.AttentionHeads` of units of patches inside items.

    A unit's row is the mean of its patches' rows, its column the sum of their columns. Attention counts only inside
    an item, whatever the block allows: each row is normalised over the item's patches. Patches that are padding
    neither vote nor receive.

    Args:
        query, key: ``[I, H, prefix + n * unit, d]``, the patches of a unit side by side.
        scale: of their products.
        unit: patches of a unit.
        valid: bool ``[I, prefix + n]``, tokens that are no padding; None where all are there.
        prefix: tokens of one patch before the units.
        real: bool ``[I, prefix + n, unit]``, the patches of those tokens that are no padding; None for all.
    """

    query: Tensor
    key: Tensor
    scale: float
    unit: int
    valid: Tensor | None
    prefix: int = 0
    real: Tensor | None = None

    def pagerank(self, iters: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
        """See :class:`~vlmprune.core.attention.AttentionHeads`; padding scores 0."""
        there = self._there(alive)
        patches = None if there is None else self._flat(there)
        qk = (self.query, self.key)
        if self.unit == 1:
            return pagerank(None, iters, qk=qk, scale=self.scale, start=start, alive=patches)
        items, heads = self.query.shape[:2]
        votes = start.to(compute_dtype(*qk))
        votes = votes if votes.ndim == 3 else votes[:, None].expand(items, heads, -1)
        if there is not None:
            votes = votes.masked_fill(~there.any(2)[:, None], 0.0)
        for _ in range(iters):
            cast = pagerank(None, 1, qk=qk, scale=self.scale, start=self._shared(votes, there), alive=patches)
            units = cast[:, :, self.prefix :].unflatten(2, (-1, self.unit)).sum(3)
            votes = torch.cat([cast[:, :, : self.prefix], units], 2)
        return votes

    def mean_scores(self, tau: float = 1.0) -> UnitHeads:
        """One head in place of all: the mean of their scores before the softmax, divided by ``tau``. The product of
        concatenated heads is the sum of theirs."""
        heads = self.query.shape[1]
        query, key = (part.transpose(1, 2).flatten(2)[:, None] for part in (self.query, self.key))
        return replace(self, query=query, key=key, scale=self.scale / (heads * tau))

    def _there(self, alive: Tensor | None) -> Tensor | None:
        """``[I, prefix + n, unit]`` bool: patches that vote and receive; None for all."""
        tokens = self.valid if alive is None else alive if self.valid is None else self.valid & alive
        if tokens is None:
            return self.real
        whole = tokens[..., None].expand(*tokens.shape, self.unit)
        return whole if self.real is None else whole & self.real

    def _flat(self, values: Tensor) -> Tensor:
        """``[..., prefix + n * unit]`` from values ``[..., prefix + n, unit]``."""
        return torch.cat([values[..., : self.prefix, 0], values[..., self.prefix :, :].flatten(-2)], -1)

    def _shared(self, votes: Tensor, there: Tensor | None) -> Tensor:
        """A unit's votes ``[I, H, prefix + n]`` in equal shares for its patches."""
        if there is None:
            share = votes.new_full((self.unit,), 1 / self.unit).expand(*votes.shape, self.unit)
        else:
            share = (there / there.sum(2, keepdim=True).clamp_min(1)).to(votes)[:, None]
        spread = votes[..., None] * share
        spread = torch.cat(
            [votes[..., : self.prefix, None].expand_as(spread[..., : self.prefix, :]), spread[..., self.prefix :, :]],
            -2,
        )
        return self._flat(spread)
