"""Tokens of towers that work on a batch of views of equal size, while their blocks reduce them."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.adapters.packing import Packing
from vlmprune.adapters.tower_tokens import BlockAttention, HiddenKeys, TokenMap, TowerTokens, with_key_bias
from vlmprune.adapters.unit_heads import UnitHeads
from vlmprune.core.attention import AttentionHeads
from vlmprune.core.selection import Selection
from vlmprune.kernels.gather import gather_tokens


class BatchedTokens(TowerTokens):
    """Views of equal size in a batch ``[V, prefix + P, D]``; an item is a view.

    Where several patches make a unit, the tower's sequence holds the patches of the units that are left in raster
    order: those of a merged unit stand where those of its first member stood.

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
        self._units = None if units is None else _Units(units)
        self._entry = self._units
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

    @property
    def computed(self) -> tuple[int, ...]:
        return (self.map.width,) * len(self.entered)

    def items(self, states: Tensor) -> Tensor:
        if self._units is None:
            return states
        head, patches = states[:, : self.prefix], self._units.grouped(states[:, self.prefix :])
        return torch.cat([head.repeat(1, 1, self._unit), patches.flatten(2)], 1)

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
        self._units = self._units.after(selection.anchors()[:, self.prefix :] - self.prefix)
        patches = reduced[:, self.prefix :].unflatten(2, (self._unit, -1))
        return torch.cat([reduced[:, : self.prefix, : states.shape[2]], self._units.sequence(patches)], 1)

    def heads(self, attention: BlockAttention) -> AttentionHeads:
        query, key, scale = attention.query_key()
        sizes = self._log_sizes()
        if sizes is not None:
            query, key = with_key_bias(query, key, sizes, scale)
        if self._units is not None:
            query, key = (self._by_unit(part, self._units) for part in (query, key))
        valid = None if self.map.full else self.map.valid(query.device)
        return UnitHeads(query, key, scale, self._unit, valid, self.prefix, self._real)

    def packing(self) -> Packing | None:
        if self.map.full:
            return None
        rows = [self.prefix + self._unit * (length - self.prefix) for length in self.map.lengths]
        return Packing(tuple(rows), self.prefix + self._unit * (self.map.width - self.prefix), self._device)

    def row_valid(self) -> Tensor | None:
        """``[V, T]`` bool, the tower's places that hold a token; None where all do."""
        return None if self.map.full else self._per_key(self.map.valid(self._device)[..., None])

    def hidden_keys(self) -> HiddenKeys | None:
        valid = self.row_valid() if self._real is None else self._per_key(self._real)
        return None if valid is None else HiddenKeys(valid, self._log_sizes())

    def key_bias(self) -> Tensor | None:
        if self.size_bias not in self._bias:
            self._bias[self.size_bias] = self._key_bias()
        return self._bias[self.size_bias]

    def _key_bias(self) -> Tensor | None:
        hidden = self.hidden_keys()
        if hidden is None:
            return self._log_sizes()
        bias = torch.zeros_like(hidden.valid, dtype=self._wide) if hidden.bias is None else hidden.bias
        return bias.masked_fill(~hidden.valid, -torch.inf)

    def _log_sizes(self) -> Tensor | None:
        """``[V, T]``, finite at padding; None where all are 0."""
        if self.map.sizes is None or not self.size_bias:
            return None
        return self._per_key(self.map.sizes.to(self._wide).clamp_min(1.0).log()[..., None])

    def groups(self) -> Tensor | None:
        if self.map.group is None:
            return None
        group = self.map.group[:, self.prefix :]
        group = torch.where(group < 0, -1, group - self.prefix)
        return group if self._entry is None else self._entry.spread(group)

    def places(self) -> Tensor | None:
        """``[V, P]`` place behind the prefix of the tower's tokens where each patch stands now, -1 for dropped ones;
        None where all stand where they stood."""
        if self.map.group is None or self._units is None:
            return self.groups()
        assert self._entry is not None
        group = self.map.group[:, self.prefix :]
        group = torch.where(group < 0, -1, group - self.prefix)
        return self._entry.sequence(gather_tokens(self._units.slot, group, fill=-1)[..., None])[..., 0]

    def restore(self, states: Tensor) -> Tensor:
        places = self.places()
        return states if places is None else gather_tokens(states, places)

    @property
    def _device(self) -> torch.device:
        assert self.map.group is not None  # there was a reduction
        return self.map.group.device

    def _by_unit(self, values: Tensor, units: _Units) -> Tensor:
        """``[V, H, T, d]`` with the patches of a unit side by side, from the tower's sequence."""
        patches = units.grouped(values[:, :, self.prefix :].transpose(1, 2)).flatten(1, 2).transpose(1, 2)
        return torch.cat([values[:, :, : self.prefix], patches], 2)

    def _per_key(self, values: Tensor) -> Tensor:
        """Values ``[V, N, 1 or u]`` of the tokens, or of their patches, as those of the tower's sequence."""
        if self._units is None:
            return values[..., 0]
        patches = values[:, self.prefix :].expand(-1, -1, self._unit)[..., None]
        return torch.cat([values[:, : self.prefix, 0], self._units.sequence(patches)[..., 0]], 1)


class _Units:
    """Where the patches of units stand in a tower's sequence.

    Args:
        home: ``[n, u]`` or ``[V, n, u]`` place of each patch among all that entered; units that are padding have places
            behind them.
    """

    def __init__(self, home: Tensor) -> None:
        self._home = home if home.ndim == 3 else home[None]
        self._order = self._home.flatten(1).argsort(dim=1, stable=True)  # [V, n * u] patches by place
        self.slot = torch.empty_like(self._order)
        """``[V or 1, n, u]`` place in the sequence of every patch."""
        place = torch.arange(self._order.shape[1], device=home.device)
        self.slot = self.slot.scatter(1, self._order, place.expand_as(self._order)).view_as(self._home)

    def after(self, anchors: Tensor) -> _Units:
        """The units that are left: ``anchors [V, M]`` are their first members, negative for padding."""
        home = self._home.expand(len(anchors), -1, -1)
        return _Units(gather_tokens(home, anchors.clamp_min(-1), fill=torch.iinfo(home.dtype).max))

    def grouped(self, sequence: Tensor) -> Tensor:
        """``[V, n, u, ...]`` from the sequence ``[V, n * u, ...]``."""
        return _taken(sequence, self.slot.flatten(1)).unflatten(1, self.slot.shape[1:])

    def sequence(self, units: Tensor) -> Tensor:
        """``[V, n * u, ...]`` from values ``[V, n, u, ...]`` of the units' patches."""
        return _taken(units.flatten(1, 2), self._order)

    def spread(self, values: Tensor) -> Tensor:
        """``[V, n * u]``, values ``[V, n]`` of the units as those of their patches in the sequence."""
        return self.sequence(values[..., None, None].expand(-1, -1, self.slot.shape[2], 1))[..., 0]


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """``values [V, N, ...]`` at ``index [V or 1, N]``."""
    return values.index_select(1, index[0]) if len(index) == 1 else gather_tokens(values, index)


def like(values: Tensor, states: Tensor) -> Tensor:
    """``values``, in memory as ``states`` where as many are left: sums over tokens then round as they did."""
    if values.shape != states.shape or states.is_contiguous():
        return values
    return torch.empty_like(states).copy_(values)
