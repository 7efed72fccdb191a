"""Attention over places, of tokens of which one may stand at several."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlmprune.kernels.backend import Backend, choose_backend
from vlmprune.kernels.virtual_attention import reference
from vlmprune.kernels.virtual_attention.places import expand, fold_mean


def virtual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    queries: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention as if every token were repeated at its places, then averaged over each token's places.

    Source: DyMU (arXiv 2504.17040), virtual token unmerging.

    Args:
        q: ``[B, H, Nq, d]`` without rotary embedding.
        k, v: ``[B, Hk, N, d]``, ``Hk`` divides ``H``; k without rotary embedding.
        mapping: int64 ``[m]`` or ``[B, m]``, token of ``k`` at each place; -1 for padding.
        cos, sin: ``[m, d]`` or ``[B, m, d]``, rotary tables of the places; halves are rotated against each other.
        queries: int64 ``[r]`` or ``[B, r]``, token of ``q`` at each of the last ``r`` places; None for ``mapping``. A
            step of decoding asks for the last place only.
        mask: bool, broadcast to ``[B, H, r, m]``, True where a query may see a place; None for all up to its own.
        scale: of the scores, default ``d ** -0.5``.
        backend: ``"reference"`` or ``"torch"``.

    Returns:
        ``[B, H, Nq, d]``; zeros for a token that stands nowhere.

    Raises:
        ValueError: shapes do not fit.
    """
    queries = mapping if queries is None else queries
    if q.shape[1] % k.shape[1] or k.shape != v.shape or queries.shape[-1] > mapping.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, mapping {tuple(mapping.shape)} and queries "
            f"{tuple(queries.shape)} do not fit together."
        )
    if tuple(cos.shape[-2:]) != (mapping.shape[-1], q.shape[-1]) or cos.shape != sin.shape:
        raise ValueError(f"cos and sin must be [m, d] = {(mapping.shape[-1], q.shape[-1])}, got {tuple(cos.shape)}.")
    allowed = _allowed(mapping, queries.shape[-1], mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose_backend("virtual_attention", backend, q.device, ("reference", "torch")) == "reference":
        return reference.run(q, k, v, mapping, queries, cos, sin, allowed, scale)
    groups, rows = q.shape[1] // k.shape[1], queries.shape[-1]
    query = _rotate(expand(q, queries), cos[..., -rows:, :], sin[..., -rows:, :])
    key = _rotate(expand(k, mapping), cos, sin).repeat_interleave(groups, 1)
    value = expand(v, mapping).repeat_interleave(groups, 1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)
    return fold_mean(out, queries, q.shape[2])


def _allowed(mapping: Tensor, rows: int, mask: Tensor | None) -> Tensor:
    """``[B or 1, H or 1, r, m]`` bool; every query sees its own place, so that no row is empty."""
    m = mapping.shape[-1]
    seen = torch.ones(rows, m, dtype=torch.bool, device=mapping.device)
    own = torch.zeros_like(seen)
    own.diagonal(m - rows).fill_(True)
    seen = seen.tril(m - rows) if mask is None else mask
    places = (mapping >= 0).reshape(-1, 1, 1, m)
    return (seen & places) | own


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, m, d]`` turned by the angles of ``cos``, ``sin`` ``[m, d]`` or ``[B, m, d]``."""
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
