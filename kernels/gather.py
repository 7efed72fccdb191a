"""Ragged gather, packing of masks, and merging of token groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlmprune.kernels.arguments import check_values, require

MergeMode = Literal["prune", "mean", "wavg", "sum", "amax"]


def gather_tokens(x: Tensor, index: Tensor, fill: float = 0) -> Tensor:
    """Rows of ``x`` at ``index``, differentiable in ``x``.

    Args:
        x: ``[B, N, ...]``.
        index: int64 ``[B, K]``, -1 for an empty slot.
        fill: value of empty slots.

    Returns:
        ``[B, K, ...]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.ndim < 2 or index.ndim != 2 or x.shape[0] != index.shape[0]:
        raise ValueError(f"x must be [B, N, ...] and index [B, K], got {tuple(x.shape)} and {tuple(index.shape)}.")
    batch, n = x.shape[:2]
    if n == 0:
        require(index < 0, "index points to a token, but x has none.")
        return x.new_full((batch, index.shape[1], *x.shape[2:]), fill)
    rows = take_rows(x, index.clamp_min(0))
    empty = (index < 0).reshape(*index.shape, *[1] * (x.ndim - 2))
    return rows.masked_fill(empty, fill)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """:func:`gather_tokens` without empty slots or checks; always a copy."""
    place = index + x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    rows = x.flatten(0, 1).index_select(0, place.flatten())
    return rows.reshape(*index.shape, *x.shape[2:])


def pack_indices(
    keep_mask: Tensor, side: Literal["left", "right"] = "right", width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ascending indices of the True entries, moved together.

    Args:
        keep_mask: bool ``[B, N]``.
        side: where the filler of shorter rows goes, as in a tokenizer's ``padding_side``.
        width: number of slots. With it shapes depend on no data and nothing synchronises; None takes the
            longest row, which reads a number back from the device.

    Returns:
        ``(index, valid)``: int64 ``[B, width]`` with -1 in empty slots, and bool ``[B, width]``.

    Raises:
        ValueError: a row has more True entries than ``width`` (on CUDA: a device-side assertion), unknown
            ``side``, or ``keep_mask`` is no bool matrix.
    """
    if keep_mask.dtype != torch.bool or keep_mask.ndim != 2:
        raise ValueError(f"keep_mask must be bool [B, N], got {keep_mask.dtype} {tuple(keep_mask.shape)}.")
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}.")
    batch, n = keep_mask.shape
    counts = keep_mask.sum(1)  # [B]
    if width is None:
        width = int(counts.max()) if batch else 0
    else:
        require(counts <= width, f"A row of keep_mask has more than width = {width} True entries.")
    slot = keep_mask.cumsum(1) - 1
    if side == "left":
        slot = slot + width - counts[:, None]
    # Dropped tokens all write to one extra slot, cut off afterwards.
    slot = torch.where(keep_mask, slot.clamp(max=width), width)
    index = torch.full((batch, width + 1), -1, dtype=torch.int64, device=keep_mask.device)
    index.scatter_(1, slot, torch.arange(n, device=keep_mask.device).expand(batch, n))
    index = index[:, :width]
    return index, index >= 0


def pad_packed(x: Tensor, cu_seqlens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Padded batch of a packed one.

    Args:
        x: ``[sum N_i, ...]``.
        cu_seqlens: int ``[B + 1]``, running sum of lengths, starting with 0.
        width: padded length, at least the longest one.

    Returns:
        ``(padded, valid)``: ``[B, width, ...]`` with zeros behind each sample, and bool ``[B, width]``.
    """
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    require(end - start <= width, f"A sample is longer than width = {width}.")
    place = start[:, None] + torch.arange(width, device=x.device)  # [B, width]
    valid = place < end[:, None]
    index = torch.where(valid, place, -1)
    padded = gather_tokens(x[None], index.reshape(1, -1))[0]
    return padded.reshape(*index.shape, *x.shape[1:]), valid


def segment_merge(
    x: Tensor,
    group_id: Tensor,
    n_groups: int,
    mode: MergeMode = "mean",
    weights: Tensor | None = None,
    representative: Tensor | None = None,
) -> Tensor:
    """One output per group of tokens, differentiable in ``x``; the same input gives the same bits.

    Args:
        x: ``[B, N, ...]``.
        group_id: int64 ``[B, N]`` below ``n_groups``; -1 drops the token.
        n_groups: number of outputs G; a group without tokens gives zeros.
        mode: ``"mean"``; ``"wavg"`` (mean weighted by ``weights``, such as sizes of tokens merged before);
            ``"sum"``; ``"amax"`` (largest value per channel); ``"prune"`` (one member, unchanged).
        weights: ``[B, N]``, for ``"wavg"``.
        representative: int64 ``[B, G]``, the member that ``"prune"`` keeps; default the lowest index.

    Returns:
        ``[B, G, ...]`` in the dtype of ``x``, accumulated in float32 (float64 for float64).

    Raises:
        ValueError: unknown mode, missing weights, or shapes do not fit.
    """
    if mode not in ("prune", "mean", "wavg", "sum", "amax"):
        raise ValueError(f"Unknown merge mode {mode!r}; choose prune, mean, wavg, sum or amax.")
    if x.ndim < 2 or tuple(group_id.shape) != tuple(x.shape[:2]):
        raise ValueError(f"x must be [B, N, ...] and group_id [B, N], got {x.shape} and {group_id.shape}.")
    check_values(weights, tuple(group_id.shape), "weights")
    if mode == "wavg" and weights is None:
        raise ValueError("mode='wavg' needs weights [B, N].")
    require(group_id < n_groups, f"group_id holds an id that is not below n_groups = {n_groups}.")
    if mode == "prune":
        if representative is None:
            representative = first_members(group_id, n_groups)
        return gather_tokens(x, representative)
    # Dropped tokens form one more group, cut off afterwards.
    group = torch.where(group_id < 0, n_groups, group_id)
    if mode == "amax":
        return _group_max(x, group, n_groups)
    values = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if mode == "sum":
        return _group_sum(values, group, n_groups).to(x.dtype)
    weight = torch.ones_like(group, dtype=values.dtype) if mode == "mean" or weights is None else weights
    weight = weight.to(values.dtype).reshape(*group.shape, *[1] * (x.ndim - 2))
    total = _group_sum(weight, group, n_groups)
    merged = _group_sum(values * weight, group, n_groups)
    return torch.where(total == 0, 0.0, merged / torch.where(total == 0, 1.0, total)).to(x.dtype)


def add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``x [B, N, ...]`` with ``rows [B, K, ...]`` added at ``index`` (int64 ``[B, K]``, repetitions allowed).

    ``x`` may be overwritten. Differentiable in ``x`` and ``rows``; the same input gives the same bits.
    """
    batch, n = x.shape[:2]
    place = (index + n * torch.arange(batch, device=x.device)[:, None]).flatten()
    flat, rows = x.flatten(0, 1), rows.flatten(0, 1)
    if x.device.type == "cuda":
        # index_add uses float atomics on CUDA; index_put sorts and adds in order.
        flat = flat.index_put_((place,), rows, accumulate=True)
    else:
        flat = flat.index_add_(0, place, rows)
    return flat.reshape(x.shape)


def unmerge(y: Tensor, group_id: Tensor) -> Tensor:
    """Each token's group output: ``[B, N, ...]`` from ``y [B, G, ...]``; zeros where ``group_id`` is -1."""
    return gather_tokens(y, group_id)


def compose_groups(first: Tensor, then: Tensor) -> Tensor:
    """Group ids of two merges in a row.

    Args:
        first: int64 ``[B, N]``, groups of the first merge, -1 dropped.
        then: int64 ``[B, G]``, groups of its outputs in the second merge, -1 dropped.

    Returns:
        int64 ``[B, N]``.
    """
    return gather_tokens(then, first, fill=-1)


def ordered_groups(group_id: Tensor, n_groups: int) -> Tensor:
    """The groups ``[B, N]`` with ids in the order of their lowest members; empty groups come last."""
    first = first_members(group_id, n_groups)
    order = torch.where(first < 0, group_id.shape[1], first).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n_groups, device=order.device).expand_as(order))
    return compose_groups(group_id, rank)


def first_members(group_id: Tensor, n_groups: int) -> Tensor:
    """int64 ``[B, G]``: lowest index in each group of ``group_id [B, N]``, -1 for an empty group."""
    batch, n = group_id.shape
    index = torch.arange(n, device=group_id.device).expand(batch, n)
    first = torch.full((batch, n_groups + 1), n, dtype=torch.int64, device=group_id.device)
    group = torch.where(group_id < 0, n_groups, group_id)
    first = first.scatter_reduce(1, group, index, "amin")[:, :n_groups]
    return torch.where(first == n, -1, first)


def _group_sum(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Sums ``[B, G, ...]`` in a fixed order of additions."""
    batch, _, *rest = values.shape
    return add_rows(values.new_zeros(batch, n_groups + 1, *rest), group, values)[:, :n_groups]


def _group_max(x: Tensor, group: Tensor, n_groups: int) -> Tensor:
    batch, _, *rest = x.shape
    group = group.reshape(*group.shape, *[1] * len(rest)).expand_as(x)
    start = x.new_zeros(batch, n_groups + 1, *rest)
    return start.scatter_reduce(1, group, x, "amax", include_self=False)[:, :n_groups]
