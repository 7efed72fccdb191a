"""Distances from given tokens to all tokens, in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.kernels.kcenter.duplicates import first_copies
from vlmprune.kernels.kcenter.types import MIN_NORM, Problem
from vlmprune.kernels.precision import precise_matmul

# Up to this many channels, squared distances are summed from differences: |x|^2 + |y|^2 - 2xy cancels.
DIRECT_L2_CHANNELS = 32


def unit_rows(points: Tensor) -> Tensor:
    """Rows divided by their norm, at least 1e-12."""
    return points / points.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)


def masked_mean(points: Tensor, valid: Tensor | None) -> Tensor:
    """Mean ``[B, 1, d]`` of the valid rows that are finite; zeros where there are none."""
    counted = points.isfinite().all(-1)
    counted = counted if valid is None else counted & valid
    total = points.masked_fill(~counted[..., None], 0.0).sum(1, keepdim=True)
    return total / counted.sum(1).clamp_min(1)[:, None, None]


def mark_not_finite(points: Tensor) -> Tensor:
    """Rows with an infinite value become NaN, so that all their distances are."""
    return points.masked_fill(~points.isfinite().all(-1, keepdim=True), torch.nan)


@dataclass(frozen=True)
class MatrixRows:
    """Rows of a given matrix, as distances, or as similarities where ``similar``."""

    matrix: Tensor
    flip: bool  # the matrix holds the other of the two
    dtype: torch.dtype

    def __call__(self, index: Tensor) -> Tensor:
        """``[B, R, N]`` for ``index [B, R]``."""
        rows = _take_rows(self.matrix, index).to(self.dtype)
        return 1 - rows if self.flip else rows


@dataclass(frozen=True)
class FeatureRows:
    """Distances or similarities computed from features.

    Attributes:
        points: ``[B, N, d]``, unit rows (cosine), centred rows (l2) or raw rows (direct l2).
        kind: ``"cosine"``, ``"l2"`` or ``"direct"`` (l2 from differences).
        similar: return cosines instead of distances.
        squares: ``[B, N]`` squared norms, for l2.
        gram: ``[B, N, N]`` inner products, None to compute rows on demand.
        own: ``[B, N]`` distance of a row to itself: 0, or 1 for a zero row under cosine, NaN for NaN.
        copies: ``[B, N]`` first index with the same row, None if all rows differ.
    """

    points: Tensor
    kind: str
    similar: bool
    squares: Tensor | None
    gram: Tensor | None
    own: Tensor
    copies: Tensor | None

    def __call__(self, index: Tensor) -> Tensor:
        """``[B, R, N]`` for ``index [B, R]``."""
        if self.copies is not None:
            index = self.copies.gather(1, index)
        if self.kind == "direct":
            chosen = _take_rows(self.points, index)  # [B, R, d]
            return (chosen[:, :, None] - self.points[:, None]).square().sum(-1)
        products = self._products(index)
        if self.kind == "cosine":
            distance = 1 - products
        else:
            assert self.squares is not None
            distance = self.squares[:, None] + self.squares.gather(1, index)[..., None] - 2 * products
        if self.copies is None:
            distance.scatter_(2, index[..., None], self.own.gather(1, index)[..., None])
        else:
            distance = distance.gather(2, self.copies[:, None].expand_as(distance))
            same = self.copies[:, None] == index[..., None]
            distance = torch.where(same, self.own[:, None], distance)
        return 1 - distance if self.similar else distance.clamp_min(0.0)

    def _products(self, index: Tensor) -> Tensor:
        if self.gram is not None:
            return _take_rows(self.gram, index)
        return precise_matmul(self.points, _take_rows(self.points, index).mT).mT


Rows = MatrixRows | FeatureRows


def make_rows(problem: Problem, gram: bool) -> Rows:
    """Row source of a problem.

    Args:
        problem: the problem.
        gram: compute all inner products now (no effect on matrices and direct l2).
    """
    similar = problem.objective == "max_sum"
    if problem.matrix is not None:
        return MatrixRows(problem.matrix, (problem.kind == "similarity") != similar, problem.dtype)
    raw = problem.source.to(problem.dtype)
    squares = None
    if problem.kind == "cosine":
        kind, points = "cosine", unit_rows(raw)
        norm = raw.norm(dim=-1)
        own = 1 - (norm / MIN_NORM).clamp_max(1.0).square() + 0 * norm
    elif raw.shape[-1] <= DIRECT_L2_CHANNELS:
        # Differences of equal rows are exactly zero already.
        raw = mark_not_finite(raw)
        return FeatureRows(raw, "direct", False, None, None, raw.new_zeros(raw.shape[:2]), None)
    else:
        kind, points = "l2", raw - masked_mean(raw, problem.valid)
        squares = points.square().sum(-1)
        own = 0 * squares
        squares = squares + own  # NaN instead of infinity
    copies: Tensor | None = first_copies(points)
    assert copies is not None
    if copies.device.type == "cpu" and bool((copies == torch.arange(problem.n)).all()):
        copies = None
    products = precise_matmul(points, points.mT) if gram else None
    return FeatureRows(points, kind, similar, squares, products, own, copies)


def _take_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """``matrix[b, index[b, r]]`` as ``[B, R, M]``, without a copy of the matrix."""
    return matrix.gather(1, index[..., None].expand(*index.shape, matrix.shape[2]))
