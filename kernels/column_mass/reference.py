"""Slow float64 attention in plain NumPy loops, for tests. Shares no code with the streamed version."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmprune.kernels.column_mass.masking import Masking
from vlmprune.kernels.column_mass.queries import Rows


def attention(q: Tensor, k: Tensor, scale: float | None, rows: Rows, masking: Masking) -> Tensor:
    """``[B, H, R, N]`` of the chosen rows; zeros for slots given as -1."""
    queries, keys = _numpy(q), _numpy(k)
    batch, heads, n_queries, d = queries.shape
    scale = d**-0.5 if scale is None else scale
    bias = _bias(batch, heads, n_queries, keys.shape[2], masking)
    chosen = _rows(rows, batch, n_queries)
    result = np.zeros((batch, heads, len(chosen[0]), keys.shape[2]))
    for b in range(batch):
        for h in range(heads):
            shared = keys[b, h * keys.shape[1] // heads]
            for r, row in enumerate(chosen[b]):
                if row < 0:
                    continue
                score = shared @ queries[b, h, row] * scale + bias[b, h, row]
                top = score.max()
                if top > -np.inf:
                    share = np.exp(score - top)
                    result[b, h, r] = share / share.sum()
    return _tensor(result, q)


def mass_per_head(
    q: Tensor, k: Tensor, scale: float | None, rows: Rows, weight: Tensor | None, masking: Masking
) -> Tensor:
    """``[B, H, N]``: weighted sum over the chosen rows."""
    share = _numpy(attention(q.double(), k, scale, rows, masking))
    factor = np.ones((share.shape[0], share.shape[2])) if weight is None else _numpy(weight)
    return _tensor((share * factor[:, None, :, None]).sum(2), q)


def group_mass(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    rows: Rows,
    masking: Masking,
    from_groups: Tensor,
    to_groups: Tensor,
    over_heads: Tensor,
) -> Tensor:
    """``[B, Gq, Gk]`` for one-hot groups ``[B, R, Gq]``, ``[B, N, Gk]`` and head weights ``[B, H]``."""
    share = _numpy(attention(q.double(), k, scale, rows, masking))
    parts = (share, _numpy(over_heads), _numpy(from_groups), _numpy(to_groups))
    return _tensor(np.einsum("bhrn,bh,brp,bnq->bpq", *parts), q)


def _bias(batch: int, heads: int, n_queries: int, n_keys: int, masking: Masking) -> np.ndarray:
    """``[B, H, Nq, N]``: added to scores, -inf where attention is not allowed."""
    bias = np.zeros((batch, heads, n_queries, n_keys))
    mask = masking.get("mask")
    if mask is not None:
        bias += np.where(_numpy(mask) > 0, 0.0, -np.inf) if mask.dtype == torch.bool else _numpy(mask)
    key_bias = masking.get("key_bias")
    if key_bias is not None:
        values = _numpy(key_bias)
        bias += values[:, None, None] if values.ndim == 2 else values[:, :, None]
    key_valid = masking.get("key_valid")
    if key_valid is not None:
        bias += np.where(_numpy(key_valid)[:, None, None] > 0, 0.0, -np.inf)
    if masking.get("causal"):
        given = masking.get("causal_offset")
        offset = n_keys - n_queries if given is None else given
        for i in range(n_queries):
            bias[:, :, i, max(0, i + offset + 1) :] = -np.inf
    cu_seqlens = masking.get("cu_seqlens")
    if cu_seqlens is not None:
        inside = np.full((n_queries, n_keys), -np.inf)
        edges = [int(edge) for edge in cu_seqlens]
        for start, stop in zip(edges, edges[1:], strict=False):
            inside[start:stop, start:stop] = 0.0
        bias += inside
    segments = masking.get("segments")
    if segments is not None:
        own, other = (np.atleast_2d(_numpy(ids)) for ids in segments)
        bias += np.where(own[:, :, None] == other[:, None], 0.0, -np.inf)[:, None]
    return bias


def _rows(rows: Rows, batch: int, n_queries: int) -> list[list[int]]:
    if isinstance(rows, Tensor) and rows.ndim == 2:
        return [list(map(int, row)) for row in rows]
    if rows is None:
        rows = range(n_queries)
    elif isinstance(rows, int):
        rows = [rows]
    return [[int(row) for row in rows]] * batch


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.from_numpy(array).to(like.device, dtype)
