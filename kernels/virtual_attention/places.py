"""From tokens to the places where they stand, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.gather import segment_merge


def expand(x: Tensor, mapping: Tensor, dim: int = -2) -> Tensor:
    """Every place's token, differentiable in ``x``.

    Args:
        x: tokens stand on ``dim``; the first axis is the batch.
        mapping: int64 ``[m]`` or ``[B, m]``, token at each place. A place without one (-1) shows token 0, whatever that
            is: leave it out of the attention.
        dim: axis of the tokens.

    Returns:
        ``x`` with ``m`` entries on ``dim``.

    Raises:
        ValueError: ``mapping`` is neither.
    """
    _check(x, mapping)
    index = mapping.clamp_min(0)
    if index.ndim == 1 or x.shape[0] == 1:
        return x.index_select(dim, index.reshape(-1))
    dim = dim % x.ndim
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.reshape(shape).expand(target))


def fold_mean(y: Tensor, mapping: Tensor, n_unique: int, dim: int = -2) -> Tensor:
    """The mean over every token's places, differentiable in ``y``; the inverse of :func:`expand` for equal values.

    Args:
        y: places stand on ``dim``; the first axis is the batch.
        mapping: int64 ``[m]`` or ``[B, m]``, token at each place; -1 takes no part.
        n_unique: number of tokens N.
        dim: axis of the places.

    Returns:
        ``y`` with ``N`` entries on ``dim``, accumulated in float32 (float64 for float64); zeros for a token without
        a place. The mean over one place is that place's bits.

    Raises:
        ValueError: ``mapping`` is neither, or names a token that is not below ``n_unique``.
    """
    return _fold(y, mapping, n_unique, dim, "mean")


def fold_sum(y: Tensor, mapping: Tensor, n_unique: int, dim: int = -2) -> Tensor:
    """The sum over every token's places, as :func:`fold_mean`: attention that a token receives at all of them."""
    return _fold(y, mapping, n_unique, dim, "sum")


def _fold(y: Tensor, mapping: Tensor, n_unique: int, dim: int, mode: str) -> Tensor:
    _check(y, mapping)
    dim = dim % y.ndim
    group = mapping.expand(y.shape[0], -1)
    if dim == 1:
        return segment_merge(y, group, n_unique, mode=mode)  # type: ignore[arg-type]
    return segment_merge(y.movedim(dim, 1), group, n_unique, mode=mode).movedim(1, dim)  # type: ignore[arg-type]


def _check(x: Tensor, mapping: Tensor) -> None:
    if mapping.dtype != torch.int64 or mapping.ndim not in (1, 2) or mapping.ndim == 2 and len(mapping) != len(x):
        raise ValueError(
            f"mapping must be int64 [m] or [B, m], got {mapping.dtype} {tuple(mapping.shape)} for {tuple(x.shape)}."
        )
