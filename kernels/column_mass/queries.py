"""Selection of query rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.kernels.arguments import require

Rows = int | range | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class QueryRows:
    """The query rows of one call.

    Attributes:
        span: rows ``start:stop`` where they are consecutive, else None.
        index: int64 ``[R]`` or ``[B, R]``, not negative, where they are not.
        host: the rows as far as the host knows them.
        ignored: bool ``[B, R]`` for slots given as -1, or None.
        count: R.
        device: of the tensors.
    """

    span: range | None
    index: Tensor | None
    host: Sequence[int] | None
    ignored: Tensor | None
    count: int
    device: torch.device

    def positions(self, batch: slice, part: slice) -> Tensor:
        """int64 ``[b or 1, r]``: original row numbers."""
        if self.span is not None:
            rows = self.span[part]
            return torch.arange(rows.start, rows.stop, device=self.device)[None]
        assert self.index is not None
        return self.index[None, part] if self.index.ndim == 1 else self.index[batch, part]

    def host_span(self, part: slice) -> tuple[int | None, int | None]:
        """Lowest and highest row, None where only the device knows."""
        if self.host is None:
            return None, None
        rows = self.host[part]
        return min(rows), max(rows)

    def take(self, tensor: Tensor, batch: slice, part: slice, dim: int) -> Tensor:
        """The rows ``part`` of dimension ``dim`` of ``tensor``, whose batch is cut already or 1."""
        if self.span is not None:
            rows = self.span[part]
            return tensor.narrow(dim, rows.start, len(rows))
        position = self.positions(batch, part)
        if len(position) == 1:
            return tensor.index_select(dim, position[0])
        shape = [len(position), *tensor.shape[1:]]
        shape[dim] = position.shape[1]
        view = [len(position), *[1] * (tensor.ndim - 1)]
        view[dim] = position.shape[1]
        full = tensor.expand(len(position), *tensor.shape[1:])
        return full.gather(dim, position.reshape(view).expand(shape))


def query_rows(rows: Rows, batch: int, n_queries: int, device: torch.device) -> QueryRows:
    """Check a choice of query rows.

    Args:
        rows: None for all, one row, a range, a sequence, or an int tensor ``[R]`` or ``[B, R]`` (-1 in the
            latter for an empty slot).
        batch: B.
        n_queries: Nq.
        device: of the queries.

    Raises:
        ValueError: a row outside ``0..Nq-1``, or a tensor of another shape or type.
    """
    if rows is None:
        rows = range(n_queries)
    if isinstance(rows, int):
        rows = range(rows, rows + 1)
    if isinstance(rows, Tensor):
        return _from_tensor(rows, batch, n_queries, device)
    outside = [row for row in rows if not 0 <= row < n_queries]
    if outside:
        raise ValueError(f"rows holds {outside[0]}, outside 0..{n_queries - 1}; count rows from the start.")
    if isinstance(rows, range) and rows.step == 1:
        return QueryRows(rows, None, rows, None, len(rows), device)
    index = torch.tensor(list(rows), dtype=torch.int64, device=device)
    return QueryRows(None, index, list(rows), None, len(rows), device)


def _from_tensor(rows: Tensor, batch: int, n_queries: int, device: torch.device) -> QueryRows:
    if rows.is_floating_point() or rows.dtype == torch.bool or rows.ndim not in (1, 2):
        raise ValueError(f"rows must be an int tensor [R] or [B, R], got {rows.dtype} {tuple(rows.shape)}.")
    if rows.ndim == 2 and rows.shape[0] != batch:
        raise ValueError(f"rows has {rows.shape[0]} samples, q has {batch}.")
    index = rows.to(device=device, dtype=torch.int64)
    lowest = 0 if index.ndim == 1 else -1
    require((index >= lowest) & (index < n_queries), f"rows holds a value outside {lowest}..{n_queries - 1}.")
    ignored = None if index.ndim == 1 else index < 0
    return QueryRows(None, index.clamp_min(0), None, ignored, index.shape[-1], device)
