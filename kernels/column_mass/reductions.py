"""The public functions: sums of attention probabilities over rows, heads and groups."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from vlmprune.kernels.arguments import require
from vlmprune.kernels.backend import Backend, choose_backend
from vlmprune.kernels.column_mass.masking import Masking, block_mask
from vlmprune.kernels.column_mass.queries import QueryRows, Rows, query_rows
from vlmprune.kernels.column_mass.stream import attention_blocks, check_heads
from vlmprune.kernels.precision import compute_dtype, precise_matmul

# Bytes of one block of probabilities.
CHUNK_BYTES = 32 << 20


@torch.no_grad()
def column_mass(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    rows: Rows = None,
    row_weight: Tensor | None = None,
    head_weight: Tensor | None = None,
    reduce: Literal["mean", "sum"] = "mean",
    per_head: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    backend: Backend | None = None,
    **masking: Unpack[Masking],
) -> Tensor:
    """Attention that each key receives, summed or averaged over query rows and averaged over heads.

    Every row is a full softmax over the keys that the mask allows; rows are chosen afterwards. A row that
    may attend to nothing counts as a row of zeros: give padded query rows the weight 0.

    Args:
        q: queries ``[B, H, Nq, d]``, after rotary embedding.
        k: keys ``[B, Hk, N, d]``; head h uses key head ``h * Hk // H``.
        scale: factor of the scores, default ``d ** -0.5``.
        rows: query rows, default all: an int, a range, a sequence, or an int tensor ``[R]`` or ``[B, R]``
            (-1 for an empty slot).
        row_weight: ``[R]`` or ``[B, R]``, numbers or bool, in the order of ``rows``.
        head_weight: ``[H]`` or ``[B, H]``; heads are averaged with it.
        reduce: ``"mean"`` divides by the sum of row weights, ``"sum"`` does not.
        per_head: return all heads.
        chunk_bytes: size of a block of probabilities; the whole matrix never exists.
        backend: ``"torch"`` or ``"reference"`` (slow, float64).
        **masking: see :class:`~vlmprune.kernels.column_mass.Masking`.

    Returns:
        ``[B, N]``, or ``[B, H, N]`` with ``per_head``; float32 (float64 for float64 input). Zeros where all
        weights are zero.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    check_heads(q, k)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}.")
    if per_head and head_weight is not None:
        raise ValueError("head_weight averages over heads; leave it out with per_head=True.")
    batch, heads, n_keys, dtype = q.shape[0], q.shape[1], k.shape[2], compute_dtype(q, k)
    chosen = query_rows(rows, batch, q.shape[2], q.device)
    weight = _row_weight(row_weight, chosen, batch, dtype)
    over_heads = _head_weight(head_weight, batch, heads, q.device, dtype)
    mask = block_mask(q, k, masking)
    if choose_backend("column mass", backend, q.device, ("reference", "torch")) == "reference":
        from vlmprune.kernels.column_mass import reference

        mass = reference.mass_per_head(q, k, scale, rows, weight, masking)
    else:
        mass = torch.zeros(batch, heads, n_keys, dtype=dtype, device=q.device)
        for block in attention_blocks(q, k, chosen, mask, scale, chunk_bytes):
            values = block.probability
            if weight is not None:
                values = values.mul_(weight[block.batch, None, block.rows, None])
            mass[block.batch, block.heads, block.keys] += values.sum(2)
    if reduce == "mean":
        total = mass.new_full((batch,), chosen.count) if weight is None else weight.sum(1)
        mass = mass * _reciprocal(total)[:, None, None]
    return mass if per_head else (mass * over_heads[..., None]).sum(1)


@torch.no_grad()
def attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Rows,
    *,
    scale: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: Backend | None = None,
    **masking: Unpack[Masking],
) -> Tensor:
    """Softmax attention of a few query rows.

    Args:
        q, k, scale, rows, chunk_bytes, backend, **masking: as in :func:`column_mass`.

    Returns:
        ``[B, H, R, N]``, float32 (float64 for float64 input); zeros for an empty slot and for a row that may
        attend to nothing.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    check_heads(q, k)
    batch, heads, n_keys, dtype = q.shape[0], q.shape[1], k.shape[2], compute_dtype(q, k)
    chosen = query_rows(rows, batch, q.shape[2], q.device)
    mask = block_mask(q, k, masking)
    if choose_backend("attention rows", backend, q.device, ("reference", "torch")) == "reference":
        from vlmprune.kernels.column_mass import reference

        return reference.attention(q, k, scale, rows, masking)
    result = torch.zeros(batch, heads, chosen.count, n_keys, dtype=dtype, device=q.device)
    for block in attention_blocks(q, k, chosen, mask, scale, chunk_bytes):
        result[block.batch, block.heads, block.rows, block.keys] = block.probability
    return result if chosen.ignored is None else result.masked_fill_(chosen.ignored[:, None, :, None], 0.0)


@torch.no_grad()
def group_mass(
    q: Tensor,
    k: Tensor,
    query_groups: Tensor,
    key_groups: Tensor,
    *,
    n_query_groups: int,
    n_key_groups: int,
    scale: float | None = None,
    rows: Rows = None,
    head_weight: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: Backend | None = None,
    **masking: Unpack[Masking],
) -> Tensor:
    """Attention from groups of query rows to groups of keys, summed over both, averaged over heads.

    Args:
        query_groups: int ``[R]`` or ``[B, R]``, group of each query row in the order of ``rows``; -1 leaves
            the row out.
        key_groups: int ``[N]`` or ``[B, N]``, -1 leaves the key out of the sums (it still takes part in the
            softmax unless masked).
        n_query_groups: number Gq of query groups.
        n_key_groups: number Gk of key groups.
        rows: query rows to compute, default all; fewer rows cost less.
        q, k, scale, head_weight, chunk_bytes, backend, **masking: as in :func:`column_mass`.

    Returns:
        ``[B, Gq, Gk]``, float32 (float64 for float64 input). A row adds 1 in all if every key it attends to
        has a group.

    Raises:
        ValueError: shapes or options that do not fit, or a group id out of range.
    """
    check_heads(q, k)
    batch, heads, dtype = q.shape[0], q.shape[1], compute_dtype(q, k)
    chosen = query_rows(rows, batch, q.shape[2], q.device)
    from_groups = _one_hot(query_groups, "query_groups", batch, chosen.count, n_query_groups, dtype)
    if chosen.ignored is not None:
        from_groups = from_groups.masked_fill(chosen.ignored[..., None], 0.0)
    to_groups = _one_hot(key_groups, "key_groups", batch, k.shape[2], n_key_groups, dtype)
    over_heads = _head_weight(head_weight, batch, heads, q.device, dtype)
    mask = block_mask(q, k, masking)
    if choose_backend("group mass", backend, q.device, ("reference", "torch")) == "reference":
        from vlmprune.kernels.column_mass import reference

        return reference.group_mass(q, k, scale, rows, masking, from_groups, to_groups, over_heads)
    mass = torch.zeros(batch, n_query_groups, n_key_groups, dtype=dtype, device=q.device)
    for block in attention_blocks(q, k, chosen, mask, scale, chunk_bytes):
        weight = over_heads[block.batch, block.heads, None, None]
        values = block.probability.mul_(weight).sum(1)  # [b, r, n]
        received = precise_matmul(values, to_groups[block.batch, block.keys])  # [b, r, Gk]
        mass[block.batch] += precise_matmul(from_groups[block.batch, block.rows].mT, received)
    return mass


def _row_weight(given: Tensor | None, rows: QueryRows, batch: int, dtype: torch.dtype) -> Tensor | None:
    """``[B, R]`` or None if every row counts once."""
    if given is None:
        return None if rows.ignored is None else (~rows.ignored).to(dtype)
    weight = given[None] if given.ndim == 1 else given
    if weight.ndim != 2 or weight.shape[0] not in (1, batch) or weight.shape[1] != rows.count:
        raise ValueError(f"row_weight must be [{rows.count}] or [{batch}, {rows.count}], got {tuple(given.shape)}.")
    weight = weight.to(device=rows.device, dtype=dtype).expand(batch, -1)
    return weight if rows.ignored is None else weight.masked_fill(rows.ignored, 0.0)


def _head_weight(given: Tensor | None, batch: int, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[B, H]`` that sums to 1 over heads."""
    if given is None:
        return torch.full((batch, heads), 1 / heads, dtype=dtype, device=device)
    weight = given[None] if given.ndim == 1 else given
    if weight.ndim != 2 or weight.shape[0] not in (1, batch) or weight.shape[1] != heads:
        raise ValueError(f"head_weight must be [{heads}] or [{batch}, {heads}], got {tuple(given.shape)}.")
    weight = weight.to(device=device, dtype=dtype).expand(batch, -1)
    return weight * _reciprocal(weight.sum(1, keepdim=True))


def _reciprocal(total: Tensor) -> Tensor:
    """``1 / total``, and 0 where the total is 0."""
    return torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))


def _one_hot(groups: Tensor, name: str, batch: int, size: int, n_groups: int, dtype: torch.dtype) -> Tensor:
    """``[B, size, G]`` membership."""
    ids = groups[None] if groups.ndim == 1 else groups
    if ids.is_floating_point() or ids.ndim != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != size:
        raise ValueError(f"{name} must be int [{size}] or [{batch}, {size}], got {tuple(groups.shape)}.")
    require(ids < n_groups, f"{name} holds an id that is not below {n_groups}.")
    return (ids[..., None] == torch.arange(n_groups, device=ids.device)).to(dtype).expand(batch, -1, -1)
