"""Towers that work on a batch of views of equal size, and what their attention says about the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmprune.adapters.batched_tokens import BatchedTokens
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.towers import AttentionCall, Tower, TowerRun
from vlmprune.core import signals as s
from vlmprune.core.attention import AttentionMap
from vlmprune.kernels.column_mass import attention_rows, column_mass
from vlmprune.kernels.gather import gather_tokens


@dataclass(frozen=True)
class BatchedTower(Tower):
    """A tower called with ``pixel_values [V, C, H, W]`` that works on ``[V, T, D]``.

    Args:
        patch: patch side in pixels.
        has_cls: token 0 is a CLS token.
        merge: side of the squares of patches that the projector joins to a token; a reduction inside the tower takes
            them as one.
        mask: name of the argument ``[V, rows, columns]`` that says which patches are no padding, None for none.
    """

    patch: int
    has_cls: bool
    merge: int = 1
    mask: str | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TowerRun:
        real = None if self.mask is None else kwargs.get(self.mask)
        return BatchedRun(self, args[0] if args else kwargs["pixel_values"], real)


class BatchedRun(TowerRun):
    """See :class:`BatchedTower`."""

    def __init__(self, tower: BatchedTower, pixels: Tensor, real: Tensor | None = None) -> None:
        self.n_views = pixels.shape[0]
        self._pixels = pixels.detach()
        self._grid = pixels.shape[-2] // tower.patch, pixels.shape[-1] // tower.patch
        self.patches_per_view = self._grid[0] * self._grid[1]
        self._tower = tower
        self._first = int(tower.has_cls)
        self._real = real

    def patches(self, states: Tensor, tokens: TowerTokens | None = None) -> Tensor:
        found = states[:, self._first :]
        return found if tokens is None else tokens.restore(found)

    def tokens(self) -> TowerTokens:
        merge = self._tower.merge
        units = None if merge == 1 else unit_patches(*self._grid, merge).to(self._pixels.device)
        real = None if self._real is None else self._real.flatten(1).bool()
        if real is not None and bool(real.all()):
            real = None
        return BatchedTokens(self.n_views, self.patches_per_view, self._first, units, real)

    def attention(self, signal: s.Signal, calls: list[AttentionCall]) -> Any:
        [call] = calls
        if isinstance(signal, s.Attention):
            tokens = call.tokens if isinstance(call.tokens, BatchedTokens) else None
            if tokens is None:
                return BatchedAttention(call, self._first)
            return BatchedAttention(call, self._first, tokens.places(), tokens.row_valid())
        if isinstance(signal, s.QK):
            pair = (part.transpose(1, 2) for part in (call.query, call.key))
            return tuple(self.patches(part, call.tokens).transpose(1, 2) for part in pair)
        return self.patches(self._per_token(signal, call), call.tokens)

    def _per_token(self, signal: s.Signal, call: AttentionCall) -> Tensor:
        """``[V, T, ...]`` over the tower's tokens at that moment."""
        query, key = call.query, call.key
        if isinstance(signal, s.ColumnMass):
            rows = call.tokens.row_valid() if isinstance(call.tokens, BatchedTokens) else None
            return column_mass(query, key, reduce=signal.reduce, row_weight=rows, **call.options)
        if isinstance(signal, s.ClsRow):
            return attention_rows(query, key, [0], **call.options).mean(1)[:, 0]
        if isinstance(signal, s.ClsLogits):
            return (query[:, :, :1].float() @ key.float().transpose(2, 3)).mean(1)[:, 0] * call.scale
        return key.transpose(1, 2).flatten(2)

    def pixels(self) -> Tensor:
        side = self._tower.patch
        cells = self._pixels.unfold(2, side, side).unfold(3, side, side)  # [V, C, h, w, side, side]
        return cells.flatten(2, 3).transpose(1, 2)

    def contents(self) -> list[Tensor]:
        return list(self._pixels)

    def drop_input(self) -> None:
        del self._pixels, self._real


@dataclass(frozen=True)
class BatchedAttention:
    """An :class:`AttentionMap` over views of equal size.

    Where patches were merged before, each is given what its token received, the weights of the patches' rows add up to
    that of the token's one row, and without weights that row counts once. Dropped patches neither give nor receive.

    Args:
        call: over the tower's tokens at that moment.
        first: tokens before the patches.
        places: ``[V, P]`` token behind every patch, counted from the first behind the prefix, -1 for dropped ones;
            None while each is its own.
        rows: ``[V, T]`` bool, places of the tower that hold a token; None where all do.
    """

    call: AttentionCall
    first: int
    places: Tensor | None = None
    rows: Tensor | None = None

    def column_mass(self, row_weight: Tensor | None = None, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """See :class:`AttentionMap`."""
        query, first = self.call.query, self.first
        rows = torch.arange(first, query.shape[2], device=query.device)
        weight = row_weight
        if row_weight is None:
            weight = None if self.rows is None else self.rows[:, first:]
        elif self.places is not None:
            weight = self._collected(self.places, row_weight)
        options = {**self.call.options, "rows": rows, "row_weight": weight, "reduce": reduce}
        mass = column_mass(query, self.call.key, **options)[:, first:]
        return mass if self.places is None else gather_tokens(mass, self.places)

    def views(self, index: Tensor) -> AttentionMap:
        """The map of some views, ``index [V']``."""
        mask = self.call.mask
        mask = mask[index] if mask is not None and mask.shape[0] > 1 else mask
        call = AttentionCall(self.call.query[index], self.call.key[index], mask, self.call.scale)
        places, rows = (None if part is None else part[index] for part in (self.places, self.rows))
        return BatchedAttention(call, self.first, places, rows)

    def _collected(self, places: Tensor, row_weight: Tensor) -> Tensor:
        """Weights of the tokens' rows: the sums of those of their patches."""
        left = self.call.query.shape[2] - self.first
        sums = row_weight.new_zeros(len(places), left + 1)
        return sums.scatter_add(1, torch.where(places < 0, left, places), row_weight)[:, :left]


def unit_patches(rows: int, columns: int, merge: int) -> Tensor:
    """``[n, merge ** 2]`` raster numbers of the patches of each square of a grid, squares row by row."""
    grid = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    return grid.transpose(1, 2).reshape(-1, merge**2)
