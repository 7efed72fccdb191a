"""Tokens of towers that work on a batch of views of equal size, while their blocks reduce them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from vlmprune.adapters.tower_tokens import BlockAttention, TokenMap, TowerTokens, with_key_bias
from vlmprune.adapters.unit_heads import UnitHeads
from vlmprune.core.attention import AttentionHeads
from vlmprune.core.selection import Selection
from vlmprune.kernels.gather import gather_tokens


class BatchedTokens(TowerTokens):
    """Views of equal size in a batch ``[V, prefix + P, D]``; an item is a view.

    Where several patches make a unit, they stand side by side from the first reduction on, and in raster order until
    then.

    Args:
        views: how many.
        patches: P.
        prefix: tokens before the patches.
        units: ``[n, u]`` patches of every unit that is reduced as a whole, None where each patch is one.
        real: bool ``[V, P]``, patches that are no padding of the image; None where all are. Nothing sees padding, and
            units that hold some are pinned.
    """

    def __init__(
        self, views: int, patches: int, prefix: int, units: Tensor | None = None, real: Tensor | None = None
    ) -> None:
        self.prefix = prefix
        self._units = units
        self._unit = 1 if units is None else units.shape[1]
        tokens = prefix + patches // self._unit
        self.entered = (tokens,) * views
        self.map = TokenMap(None, self.entered, tokens)
        self._real: Tensor | None = None  # [V, N, u], of the current tokens
        if real is not None:
            by_unit = real[..., None] if units is None else real[:, units]
            self._real = torch.cat([by_unit.new_ones(views, prefix, self._unit), by_unit], 1)
            self.pinned = ~self._real.all(2)
        self._bias: dict[bool, Tensor | None] = {}
        self._wide = torch.float32

    def items(self, states: Tensor) -> Tensor:
        if self._units is None:
            return states
        head, patches = states[:, : self.prefix], self._by_unit(states[:, self.prefix :])
        joined = patches.reshape(patches.shape[0], -1, self._unit * patches.shape[2])
        return torch.cat([head.repeat(1, 1, self._unit), joined], 1)

    def reduce(self, states: Tensor, selection: Selection) -> Tensor:
        reduced = selection.apply(self.items(states), features=True)
        self.map = self.map.after(selection)
        if self._real is not None:
            self._real = gather_tokens(self._real, selection.anchors())
            self.pinned = self.map.valid(states.device) & ~self._real.all(2)
        self.changed = True
        self._bias = {}
        self._wide = torch.promote_types(states.dtype, torch.float32)
        if self._units is None:
            return like(reduced, states)
        width = states.shape[2]
        patches = reduced[:, self.prefix :].reshape(reduced.shape[0], -1, width)
        return torch.cat([reduced[:, : self.prefix, :width], patches], 1)

    def heads(self, attention: BlockAttention) -> AttentionHeads:
        query, key, scale = attention.query_key()
        sizes = self._log_sizes()
        if sizes is not None:
            query, key = with_key_bias(query, key, sizes, scale)
        query, key = (
            torch.cat([part[:, :, : self.prefix], self._by_unit(part[:, :, self.prefix :], 2)], 2)
            for part in (query, key)
        )
        valid = None if self.map.full else self.map.valid(query.device)
        return UnitHeads(query, key, scale, self._unit, valid, self.prefix, self._real)

    def row_valid(self) -> Tensor | None:
        """``[V, T]`` bool, the tower's places that hold a token; None where all do."""
        return None if self.map.full else self._per_key(self.map.valid(self._device))

    def key_valid(self) -> Tensor | None:
        if self._real is None:
            return self.row_valid()
        real = self._real[:, self.prefix :].flatten(1)
        if self._units is not None and not self.changed:
            real = real[:, self._raster]
        return torch.cat([self._real[:, : self.prefix, 0], real], 1)

    def key_bias(self) -> Tensor | None:
        if self.size_bias not in self._bias:
            self._bias[self.size_bias] = self._key_bias()
        return self._bias[self.size_bias]

    def _key_bias(self) -> Tensor | None:
        sizes, valid = self._log_sizes(), self.key_valid()
        if valid is None:
            return sizes
        bias = torch.zeros_like(valid, dtype=self._wide) if sizes is None else sizes
        return bias.masked_fill(~valid, -torch.inf)

    def _log_sizes(self) -> Tensor | None:
        """``[V, T]``, finite at padding; None where all are 0."""
        if self.map.sizes is None or not self.size_bias:
            return None
        return self._per_key(self.map.sizes.to(self._wide).clamp_min(1.0).log())

    def groups(self) -> Tensor | None:
        if self.map.group is None:
            return None
        group = self.map.group[:, self.prefix :]
        group = torch.where(group < 0, -1, group - self.prefix)
        return group if self._units is None else group.repeat_interleave(self._unit, 1)[:, self._raster]

    def places(self) -> Tensor | None:
        """``[V, P]`` place behind the prefix of the tower's tokens where each patch stands now, -1 for dropped ones;
        None where all stand where they stood."""
        group = self.groups()
        if group is None or self._units is None:
            return group
        side = torch.arange(self._unit, device=group.device).repeat(len(self._units))[self._raster]
        return torch.where(group < 0, -1, group * self._unit + side)

    def restore(self, states: Tensor) -> Tensor:
        places = self.places()
        return states if places is None else gather_tokens(states, places)

    @cached_property
    def _raster(self) -> Tensor:
        """``[P]`` place among the patches of all units, unit by unit, of each patch in raster order."""
        assert self._units is not None
        return self._units.flatten().argsort()

    @property
    def _device(self) -> torch.device:
        assert self.map.group is not None  # there was a reduction
        return self.map.group.device

    def _by_unit(self, patches: Tensor, axis: int = 1) -> Tensor:
        """The tower's patches with those of a unit side by side."""
        if self._units is None or self.changed:
            return patches
        return patches.index_select(axis, self._units.flatten())

    def _per_key(self, values: Tensor) -> Tensor:
        """Values ``[V, N]`` of the tokens behind a reduction as those of the tower's sequence."""
        if self._unit == 1:
            return values
        return torch.cat([values[:, : self.prefix], values[:, self.prefix :].repeat_interleave(self._unit, 1)], 1)


def like(values: Tensor, states: Tensor) -> Tensor:
    """``values``, in memory as ``states`` where as many are left: sums over tokens then round as they did."""
    if values.shape != states.shape or states.is_contiguous():
        return values
    return torch.empty_like(states).copy_(values)
