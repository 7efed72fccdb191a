"""Reductions of an attention matrix that is never held as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from vlmprune.kernels.pagerank import pagerank


class AttentionMap(Protocol):
    """Softmax attention between the patches of each encoder view, mean over heads.

    Rows are queries and columns keys, patches only: a CLS token takes part in the softmax, its row and column do not
    count here. Pairs in different attention windows have attention 0.
    """

    def column_mass(self, row_weight: Tensor | None = None, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """Attention that each patch receives, ``[V, P]`` float32 or wider.

        Args:
            row_weight: ``[V, P]`` weight of each query row; None counts every patch of a view once.
            reduce: ``"mean"`` divides by the sum of a view's row weights (0 where that is 0), ``"sum"`` does not.
        """
        ...


@dataclass(frozen=True)
class DenseAttention:
    """An :class:`AttentionMap` from the matrix itself, for small inputs and tests.

    Args:
        matrix: ``[V, H, P, P]`` or ``[V, P, P]``, after the softmax.
    """

    matrix: Tensor

    def column_mass(self, row_weight: Tensor | None = None, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """See :class:`AttentionMap`."""
        matrix = self.matrix.mean(1) if self.matrix.ndim == 4 else self.matrix
        weight = matrix.new_ones(matrix.shape[:2]) if row_weight is None else row_weight.to(matrix)
        mass = (weight[:, None] @ matrix)[:, 0]
        if reduce == "sum":
            return mass
        total = weight.sum(1, keepdim=True)
        return mass / total.where(total != 0, 1.0)


class AttentionHeads(Protocol):
    """Softmax attention ``[V, H, N, N]`` of each view and head as a graph: rows are queries and vote for columns."""

    def pagerank(self, iters: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
        """Scores ``[V, H, N]`` after ``iters`` rounds of ``s <- A^T s``.

        Args:
            iters: rounds.
            start: ``[V, N]`` or ``[V, H, N]``.
            alive: bool ``[V, N]``; the rows of the tokens left are normalised over them.
        """
        ...

    def mean_scores(self, tau: float = 1.0) -> AttentionHeads:
        """One head in place of all: the mean of their scores before the softmax, divided by ``tau``."""
        ...


@dataclass(frozen=True)
class DenseHeads:
    """:class:`AttentionHeads` from the matrix itself ``[V, H, N, N]``, for small inputs and tests."""

    matrix: Tensor

    def pagerank(self, iters: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
        """See :class:`AttentionHeads`."""
        return pagerank(self.matrix, iters, start=start, alive=alive)

    def mean_scores(self, tau: float = 1.0) -> DenseHeads:
        """See :class:`AttentionHeads`. Logarithms of the attention are the scores up to one number per row."""
        return DenseHeads((self.matrix.log().mean(1, keepdim=True) / tau).softmax(-1))


@dataclass(frozen=True)
class StreamedHeads:
    """:class:`AttentionHeads` from queries and keys ``[V, H, N, d]``; the matrix never exists as a whole."""

    query: Tensor
    key: Tensor
    scale: float | None = None

    def pagerank(self, iters: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
        """See :class:`AttentionHeads`."""
        return pagerank(None, iters, qk=(self.query, self.key), scale=self.scale, start=start, alive=alive)

    def mean_scores(self, tau: float = 1.0) -> StreamedHeads:
        """See :class:`AttentionHeads`. The product of concatenated heads is the sum of theirs."""
        heads, width = self.query.shape[1], self.query.shape[3]
        key = self.key.repeat_interleave(heads // self.key.shape[1], 1)
        query, key = (part.transpose(1, 2).flatten(2)[:, None] for part in (self.query, key))
        scale = width**-0.5 if self.scale is None else self.scale
        return StreamedHeads(query, key, scale / (heads * tau))
