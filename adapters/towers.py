"""How vision towers hold their patches, and what their attention says about them: views of equal size in a batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vlmprune.adapters.tower_tokens import EXTRA, BatchedTokens, TowerTokens
from vlmprune.core import signals as s
from vlmprune.core.attention import AttentionMap
from vlmprune.core.errors import SignalError
from vlmprune.kernels.column_mass import attention_rows, column_mass


@dataclass(frozen=True)
class AttentionCall:
    """One product of queries ``[B, H, T, d]`` and keys in a tower block.

    ``lengths`` are the segments of a packed call (variable-length attention), None where there is but one; ``tokens``
    the tower's tokens at that moment, None while all are there.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    lengths: tuple[int, ...] | None = None
    tokens: TowerTokens | None = None

    def behind(self, tokens: TowerTokens) -> AttentionCall:
        """This call as one of reduced ``tokens``. A bias that came as features, for flash attention, becomes a mask."""
        query, key, mask, bias = self.query, self.key, self.mask, tokens.key_bias()
        if bias is not None and mask is None:
            query, key, mask = query[..., :-EXTRA], key[..., :-EXTRA], bias[:, None, None]
        return replace(self, query=query, key=key, mask=mask, tokens=copy.copy(tokens))

    @property
    def options(self) -> dict[str, Any]:
        """Scale and mask as the kernels take them; flash attention has 2-D masks of keys."""
        if self.mask is not None and self.mask.ndim == 2:
            return {"scale": self.scale, "key_valid": self.mask.bool()}
        mask = self.mask
        if mask is not None:  # one row for all queries
            mask = mask.expand(-1, -1, self.query.shape[2], -1)
        return {"scale": self.scale, "mask": mask}


class TowerRun(ABC):
    """One run of a tower over ``n_views`` views."""

    n_views: int
    patches_per_view: int

    @abstractmethod
    def patches(self, states: Tensor, tokens: TowerTokens | None = None) -> Tensor:
        """Values of patches ``[V, P, ...]`` out of a tensor in the tower's own order.

        Args:
            states: of all tokens, or of those that are left.
            tokens: those that are left, None while all are there; dropped patches get zeros.
        """

    @property
    def patch_valid(self) -> Tensor | None:
        """``[V, P]`` bool, None where every view has as many patches."""
        return None

    def masked(self, values: Tensor) -> Tensor:
        """Values of patches ``[V, P, ...]`` with zeros at the padding of smaller views."""
        valid = self.patch_valid
        return values if valid is None else values * valid.view(*valid.shape, *[1] * (values.ndim - 2))

    def tokens(self) -> TowerTokens:
        """The tower's tokens at the start of the run, for policies that reduce them."""
        raise NotImplementedError(f"{type(self).__name__} does not reduce tokens.")

    @abstractmethod
    def attention(self, signal: s.Signal, calls: list[AttentionCall]) -> Any:
        """A signal of a block out of its attention calls."""

    @abstractmethod
    def pixels(self) -> Tensor:
        """The tower's input per patch, ``[V, P, C, h, w]``; the padding of smaller views holds anything."""

    @abstractmethod
    def contents(self) -> list[Tensor]:
        """The input of every view, for digests."""

    @abstractmethod
    def drop_input(self) -> None:
        """Let go of the tower's input, which may be large: ``pixels`` and ``contents`` are gone."""


class Tower(ABC):
    """How a tower holds its patches."""

    @abstractmethod
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TowerRun:
        """The run that a call of the tower starts."""


@dataclass(frozen=True)
class BatchedTower(Tower):
    """A tower called with ``pixel_values [V, C, H, W]`` that works on ``[V, T, D]``.

    Args:
        patch: patch side in pixels.
        has_cls: token 0 is a CLS token.
        units: ``[n, u]`` patches that the projector joins to a token, None where each is one.
    """

    patch: int
    has_cls: bool
    units: Tensor | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TowerRun:
        return BatchedRun(self, args[0] if args else kwargs["pixel_values"])


class BatchedRun(TowerRun):
    """See :class:`BatchedTower`."""

    def __init__(self, tower: BatchedTower, pixels: Tensor) -> None:
        self.n_views = pixels.shape[0]
        self._pixels = pixels.detach()
        self.patches_per_view = (pixels.shape[-2] // tower.patch) * (pixels.shape[-1] // tower.patch)
        self._patch = tower.patch
        self._first = int(tower.has_cls)
        self._units = tower.units

    def patches(self, states: Tensor, tokens: TowerTokens | None = None) -> Tensor:
        found = states[:, self._first :]
        return found if tokens is None else tokens.restore(found)

    def tokens(self) -> TowerTokens:
        units = None if self._units is None else self._units.to(self._pixels.device)
        return BatchedTokens(self.n_views, self.patches_per_view, self._first, units)

    def attention(self, signal: s.Signal, calls: list[AttentionCall]) -> Any:
        [call] = calls
        if call.tokens is not None:
            return self._restored(signal, call)
        query, key, first = call.query, call.key, self._first
        if isinstance(signal, s.ColumnMass):
            return column_mass(query, key, reduce=signal.reduce, **call.options)[:, first:]
        if isinstance(signal, s.ClsRow):
            return attention_rows(query, key, [0], **call.options).mean(1)[:, 0, first:]
        if isinstance(signal, s.ClsLogits):
            scores = (query[:, :, :1].float() @ key.float().transpose(2, 3)).mean(1)[:, 0] * call.scale
            return scores[:, first:]
        if isinstance(signal, s.Keys):
            return self.patches(key.transpose(1, 2).flatten(2))
        if isinstance(signal, s.QK):
            return query[:, :, first:], key[:, :, first:]
        return BatchedAttention(call, first)

    def _restored(self, signal: s.Signal, call: AttentionCall) -> Any:
        """A signal of tokens that were reduced already, as one of the patches behind them."""
        assert call.tokens is not None
        found = self.attention(signal, [replace(call, tokens=None)])
        if isinstance(found, Tensor):
            return call.tokens.restore(found)
        raise SignalError(f"{signal} cannot be read behind a reduction inside the tower.")

    def pixels(self) -> Tensor:
        side = self._patch
        cells = self._pixels.unfold(2, side, side).unfold(3, side, side)  # [V, C, h, w, side, side]
        return cells.flatten(2, 3).transpose(1, 2)

    def contents(self) -> list[Tensor]:
        return list(self._pixels)

    def drop_input(self) -> None:
        del self._pixels


@dataclass(frozen=True)
class BatchedAttention:
    """An :class:`AttentionMap` over views of equal size."""

    call: AttentionCall
    first: int

    def column_mass(self, row_weight: Tensor | None = None, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """See :class:`AttentionMap`."""
        query, first = self.call.query, self.first
        rows = torch.arange(first, query.shape[2], device=query.device)
        options = {**self.call.options, "rows": rows, "row_weight": row_weight, "reduce": reduce}
        return column_mass(query, self.call.key, **options)[:, first:]

    def views(self, index: Tensor) -> AttentionMap:
        """The map of some views, ``index [V']``."""
        mask = self.call.mask
        mask = mask[index] if mask is not None and mask.shape[0] > 1 else mask
        call = AttentionCall(self.call.query[index], self.call.key[index], mask, self.call.scale)
        return BatchedAttention(call, self.first)
