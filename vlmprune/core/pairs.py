"""A merge as pairs: cheaper to apply than group ids where each sample merges the same number."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmprune.kernels.bipartite import merge_pairs


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which tokens stay and which go into them, as :func:`vlmprune.kernels.bipartite.merge_pairs` takes them.

    Attributes:
        kept: int64 ``[I, M]``, token behind each output.
        sources: int64 ``[I, R]``, tokens that merge into another one.
        into: int64 ``[I, R]``, output that each of them goes to.
    """

    kept: Tensor
    sources: Tensor
    into: Tensor

    def mean(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Means ``[I, M, ...]`` of ``values [I, N, ...]`` weighted by ``weights [I, N]``, None for equal ones."""
        return merge_pairs(values, self.kept, self.sources, self.into, weights)[0]
