"""Which keys a query may attend to, evaluated block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from vlmprune.kernels.arguments import check_mask
from vlmprune.kernels.column_mass.queries import QueryRows


class Masking(TypedDict, total=False):
    """Keyword arguments on masking, the same for all functions of this package. All may be combined.

    Keys:
        mask: ``[B or 1, H or 1, Nq, N]``; bool (True = attend) or added to the scaled scores.
        causal: query row i attends to keys up to ``i + causal_offset``.
        causal_offset: default ``N - Nq``: the queries are the last rows of the sequence of keys.
        key_valid: bool ``[B, N]``, False for padding.
        key_bias: ``[B or 1, N]`` or ``[B or 1, H or 1, N]``, added to the scaled scores (such as log size).
        cu_seqlens: int ``[S + 1]`` or a sequence of ints, starting with 0: queries and keys of the same
            packed segment attend to each other (needs ``Nq == N``). A sequence, or a tensor in host
            memory, also saves the work between segments.
        segments: ``(query ids, key ids)``, int ``[Nq]`` or ``[B, Nq]`` and ``[N]`` or ``[B, N]``: attend
            where ids are equal.
    """

    mask: Tensor | None
    causal: bool
    causal_offset: int | None
    key_valid: Tensor | None
    key_bias: Tensor | None
    cu_seqlens: Tensor | Sequence[int] | None
    segments: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class BlockMask:
    """Checked masking of one call; :meth:`apply` puts it on a block of scores."""

    mask: Tensor | None
    offset: int | None  # of the causal rule, None if not causal
    key_valid: Tensor | None
    key_bias: Tensor | None  # [B or 1, H or 1, N]
    query_segments: Tensor | None  # [B or 1, Nq]
    key_segments: Tensor | None  # [B or 1, N]
    bounds: tuple[int, ...] | None  # cu_seqlens known on the host
    n_keys: int

    @property
    def may_block(self) -> bool:
        """True if a row may be left without any key."""
        blocking = (self.mask, self.offset, self.key_valid, self.key_bias, self.query_segments)
        return any(part is not None for part in blocking)

    def key_range(self, rows: QueryRows, part: slice) -> slice:
        """Keys that the query rows ``part`` can reach, as far as the host knows; never empty."""
        lowest, highest = rows.host_span(part)
        start, stop = 0, self.n_keys
        if highest is not None and lowest is not None:
            if self.offset is not None:
                stop = min(stop, highest + self.offset + 1)
            if self.bounds is not None:
                start = max((b for b in self.bounds if b <= lowest), default=0)
                stop = min([stop, *(b for b in self.bounds if b > highest)])
        if stop <= start:  # rows that see no key at all: one masked key gives a row of zeros
            start = min(start, self.n_keys - 1)
            stop = start + 1
        return slice(start, stop)

    def apply(self, scores: Tensor, rows: QueryRows, batch: slice, heads: slice, part: slice, keys: slice) -> Tensor:
        """Scores ``[b, h, r, n]`` with biases added and blocked entries at -inf; works in place."""
        if self.key_bias is not None:
            bias = _cut(_cut(self.key_bias, 0, batch), 1, heads)[:, :, None, keys]
            scores = scores.add_(bias.to(scores.dtype))
        if self.mask is not None:
            mask = _cut(_cut(self.mask, 0, batch), 1, heads)
            mask = rows.take(mask, batch, part, dim=2)[..., keys]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill_(~mask, -torch.inf)
            else:
                scores = scores.add_(mask.to(scores.dtype))
        allowed = self._allowed(rows, batch, part, keys)
        return scores if allowed is None else scores.masked_fill_(~allowed[:, None], -torch.inf)

    def _allowed(self, rows: QueryRows, batch: slice, part: slice, keys: slice) -> Tensor | None:
        """bool, broadcastable to ``[b, r, n]``, of the rules that are the same for all heads."""
        rules = []
        position = rows.positions(batch, part)  # [b or 1, r]
        if self.offset is not None:
            column = torch.arange(keys.start, keys.stop, device=position.device)
            rules.append(column <= position[..., None] + self.offset)
        if self.key_valid is not None:
            rules.append(self.key_valid[batch, None, keys])
        if self.query_segments is not None and self.key_segments is not None:
            segments = _cut(self.query_segments, 0, batch)
            own = segments.expand(max(len(segments), len(position)), -1).gather(
                1, position.expand(max(len(segments), len(position)), -1)
            )
            rules.append(own[..., None] == _cut(self.key_segments, 0, batch)[:, None, keys])
        allowed: Tensor | None = None
        for rule in rules:
            allowed = rule if allowed is None else allowed & rule
        return allowed


def block_mask(q: Tensor, k: Tensor, masking: Masking) -> BlockMask:
    """Check the masking arguments of a call.

    Raises:
        TypeError: unknown argument.
        ValueError: shapes that do not fit, or two ways of giving segments.
    """
    unknown = sorted(set(masking) - set(Masking.__annotations__))
    if unknown:
        known = ", ".join(Masking.__annotations__)
        raise TypeError(f"Unknown argument {unknown[0]!r}; masking takes {known}.")
    batch, heads, n_queries = q.shape[:3]
    n_keys = k.shape[2]
    mask = masking.get("mask")
    if mask is not None and not (
        mask.ndim == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and tuple(mask.shape[2:]) == (n_queries, n_keys)
    ):
        raise ValueError(f"mask must be [{batch} or 1, {heads} or 1, {n_queries}, {n_keys}], got {tuple(mask.shape)}.")
    bias = masking.get("key_bias")
    if bias is not None:
        bias = bias[:, None] if bias.ndim == 2 else bias
        if bias.ndim != 3 or bias.shape[0] not in (1, batch) or bias.shape[1] not in (1, heads):
            raise ValueError(f"key_bias must be [B or 1, N] or [B or 1, H or 1, N], got {tuple(bias.shape)}.")
        if bias.shape[2] != n_keys:
            raise ValueError(f"key_bias is for {bias.shape[2]} keys, there are {n_keys}.")
    offset = masking.get("causal_offset")
    if offset is not None and not masking.get("causal"):
        raise ValueError("causal_offset needs causal=True.")
    if masking.get("causal") and offset is None:
        offset = n_keys - n_queries
    query_segments, key_segments, bounds = _segments(q, k, masking)
    return BlockMask(
        mask=mask,
        offset=offset,
        key_valid=check_mask(masking.get("key_valid"), (batch, n_keys), "key_valid"),
        key_bias=bias,
        query_segments=query_segments,
        key_segments=key_segments,
        bounds=bounds,
        n_keys=n_keys,
    )


def _segments(q: Tensor, k: Tensor, masking: Masking) -> tuple[Tensor | None, Tensor | None, tuple[int, ...] | None]:
    """Segment ids of queries and keys, and the bounds where the host knows them."""
    cu_seqlens, segments = masking.get("cu_seqlens"), masking.get("segments")
    if cu_seqlens is None and segments is None:
        return None, None, None
    if cu_seqlens is not None and segments is not None:
        raise ValueError("Give cu_seqlens or segments, not both.")
    batch, n_queries, n_keys = q.shape[0], q.shape[2], k.shape[2]
    if segments is not None:
        ids = []
        for name, value, size in zip(("query", "key"), segments, (n_queries, n_keys), strict=True):
            value = value[None] if value.ndim == 1 else value
            if value.ndim != 2 or value.shape[0] not in (1, batch) or value.shape[1] != size:
                raise ValueError(f"segments: {name} ids must be [{size}] or [{batch}, {size}].")
            ids.append(value)
        return ids[0], ids[1], None
    if n_queries != n_keys:
        raise ValueError(f"cu_seqlens needs as many queries as keys, got {n_queries} and {n_keys}.")
    bounds = None
    if not isinstance(cu_seqlens, Tensor):
        assert cu_seqlens is not None
        cu_seqlens = torch.tensor(list(cu_seqlens), dtype=torch.int64)
    if cu_seqlens.device.type == "cpu":
        bounds = tuple(cu_seqlens.tolist())
        if not bounds or bounds[0] != 0 or list(bounds) != sorted(bounds) or bounds[-1] > n_keys:
            raise ValueError(f"cu_seqlens must rise from 0 to at most {n_keys}, got {list(bounds)}.")
    edges = cu_seqlens.to(device=q.device, dtype=torch.int64)
    position = torch.arange(n_keys, device=q.device)
    own = torch.bucketize(position, edges[1:].contiguous(), right=True)[None]
    outside = position >= edges[-1]  # padding behind the last segment attends to nothing
    return own.masked_fill(outside, -1), own.masked_fill(outside, -2), bounds


def _cut(tensor: Tensor, dim: int, part: slice) -> Tensor:
    """``part`` of a dimension, or all of it where it is broadcast."""
    return tensor if tensor.shape[dim] == 1 else tensor[(slice(None),) * dim + (part,)]
