"""One importance per token from the scores of all heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.arguments import check_mask
from vlmprune.kernels.precision import compute_dtype


class HeadFusion(NamedTuple):
    """Result of :func:`fuse_heads`.

    Attributes:
        importance: ``[B, N]``.
        kept: bool ``[B, H]``, heads that passed the filter (all of them where none did).
        variance: ``[B, H]``, over the counted tokens.
    """

    importance: Tensor
    kept: Tensor
    variance: Tensor


@torch.no_grad()
def fuse_heads(scores: Tensor, v_min: float = 0.01, v_max: float = 0.7, counted: Tensor | None = None) -> HeadFusion:
    """Root mean square of the scores over the heads whose variance lies in a range.

    Zero-TPrune (arXiv 2305.17328) calls the filter VHF and the root mean square EIR. The range belongs to
    scores with mean 1. Where no head of a sample passes, all count (a rule of this package).

    Args:
        scores: ``[B, H, N]`` with H at least 1.
        v_min: smallest population variance of a head that counts.
        v_max: largest one.
        counted: bool ``[B, N]``, tokens that the variance is taken over (without class token and dropped
            ones); default all.

    Returns:
        A :class:`HeadFusion`; float32 (float64 for float64 scores).

    Raises:
        ValueError: shapes do not fit.
    """
    if scores.ndim != 3 or scores.shape[1] == 0:
        raise ValueError(f"scores must be [B, H, N] with at least one head, got {tuple(scores.shape)}.")
    batch, _, n = scores.shape
    check_mask(counted, (batch, n), "counted")
    values = scores.to(compute_dtype(scores))
    mask = torch.ones(batch, n, dtype=torch.bool, device=scores.device) if counted is None else counted
    number = mask.sum(1).clamp_min(1)[:, None]
    mean = values.masked_fill(~mask[:, None], 0.0).sum(2) / number
    variance = (values - mean[..., None]).square().masked_fill(~mask[:, None], 0.0).sum(2) / number
    kept = (variance >= v_min) & (variance <= v_max)
    kept = kept | ~kept.any(1, keepdim=True)
    total = values.square().masked_fill(~kept[..., None], 0.0).sum(1)
    return HeadFusion((total / kept.sum(1)[:, None]).sqrt(), kept, variance)
