"""What goes into a matching and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["tome", "position", "original"]


@dataclass(frozen=True)
class BipartiteMatch:
    """Result of :func:`~vlmprune.kernels.bipartite.bipartite_match`.

    Attributes:
        group_id: int64 ``[B, N]``, output that each token goes to, -1 for padding. It fits
            :func:`vlmprune.kernels.gather.segment_merge`, ``unmerge`` and ``compose_groups``.
        n_out: width of the outputs. Where the number of merges is known on the host it is exact, else N.
        counts: int64 ``[B]``, outputs per sample; ids from ``counts`` to ``n_out`` are empty.
        scores: ``[B, Na]``, best cosine of every A token; -inf where it may not merge.
        partner: int64 ``[B, Na]``, slot in B of that best token, -1 where there is none.
        merged: bool ``[B, Na]``, A tokens that merge into their partner.
        a_index: int64 ``[B, Na]``, token of every A slot, -1 for an empty slot.
        b_index: int64 ``[B, Nb]``, token of every B slot, -1 for an empty slot.
        kept, sources, into: the same result as pairs, for :func:`~vlmprune.kernels.bipartite.merge_pairs`, where
            every sample merges the same number known on the host (``r`` for all samples, default halves, neither
            masks nor threshold), else None. int64 ``[B, n_out]``, token behind each output; ``[B, merges]``,
            tokens that merge, best pair first; ``[B, merges]``, output that each of them goes to.
    """

    group_id: Tensor
    n_out: int
    counts: Tensor
    scores: Tensor
    partner: Tensor
    merged: Tensor
    a_index: Tensor
    b_index: Tensor
    kept: Tensor | None = None
    sources: Tensor | None = None
    into: Tensor | None = None

    def merged_tokens(self) -> Tensor:
        """bool ``[B, N]``: tokens that merge into another one (or are to be dropped for it)."""
        batch, n = self.group_id.shape
        mask = torch.zeros(batch, n + 1, dtype=torch.bool, device=self.group_id.device)
        # All slots that do not merge write False to one extra token, cut off afterwards.
        return mask.scatter(1, torch.where(self.merged, self.a_index, n), self.merged)[:, :n]


@dataclass(frozen=True)
class Problem:
    """Checked arguments of one call.

    Attributes:
        metric: ``[B, N, c]``.
        a_index: int64 ``[B, Na]``, -1 for an empty slot.
        b_index: int64 ``[B, Nb]``, likewise.
        a_free: bool ``[B, Na]``, may merge away.
        b_free: bool ``[B, Nb]``, may receive.
        valid: bool ``[B, N]`` or None.
        protect: number of tokens at the front that stay there.
        width: most merges of a sample, from the shapes.
        limit: int64 ``[B]``, most merges per sample, or None for ``width``.
        threshold: ``[B]`` or a number, or None.
        order: order of the outputs.
        dtype: of the computation, float32 or float64.
        exact: every sample merges exactly ``width`` pairs.
        plain: the halves are even and odd positions, and only the front is protected.
    """

    metric: Tensor
    a_index: Tensor
    b_index: Tensor
    a_free: Tensor
    b_free: Tensor
    valid: Tensor | None
    protect: int
    width: int
    limit: Tensor | None
    threshold: Tensor | float | None
    order: Order
    dtype: torch.dtype
    exact: bool
    plain: bool

    @property
    def fixed(self) -> bool:
        """True if every sample merges ``width`` pairs and has no padding, so that results are pairs too."""
        return self.plain and self.limit is None and self.threshold is None

    @property
    def first_a(self) -> int:
        """First A slot behind the front, for default halves."""
        return (self.protect + 1) // 2

    @property
    def first_b(self) -> int:
        """First B slot behind the front, for default halves."""
        return self.protect // 2

    @property
    def batch(self) -> int:
        return self.metric.shape[0]

    @property
    def n(self) -> int:
        return self.metric.shape[1]

    @property
    def device(self) -> torch.device:
        return self.metric.device
