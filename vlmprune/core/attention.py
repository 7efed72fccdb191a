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


@dataclass(frozen=True)
class DenseHeads:
    """:class:`AttentionHeads` from the matrix itself ``[V, H, N, N]``, for small inputs and tests."""

    matrix: Tensor

    def pagerank(self, iters: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
        """See :class:`AttentionHeads`."""
        return pagerank(self.matrix, iters, start=start, alive=alive)


@dataclass(frozen=True)
class StreamedHeads:
    """:class:`AttentionHeads` from queries and keys ``[V, H, N, d]``; the matrix never exists as a whole."""

    query: Tensor
    key: Tensor
    scale: float | None = None

    def pagerank(self, iters: int, start: Tensor, alive: Tensor | None = None) -> Tensor:
        """See :class:`AttentionHeads`."""
        return pagerank(None, iters, qk=(self.query, self.key), scale=self.scale, start=start, alive=alive)
