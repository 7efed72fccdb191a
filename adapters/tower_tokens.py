"""The tokens of a tower while its blocks reduce them: who stands for whom, what counts, what is padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.core.attention import AttentionHeads, StreamedHeads
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.selection import Selection
from vlmprune.core.views import on_device
from vlmprune.kernels.gather import gather_tokens, segment_merge


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Which token stands for each one that entered a tower, at one moment.

    Attributes:
        group: ``[I, T0]`` current token of every token that entered, -1 for dropped ones; None while all are there.
        lengths: tokens per item, prefix included.
        width: padded number of tokens.
        sizes: ``[I, N]`` tokens behind each token, 0 for padding; None while all are 1.
    """

    group: Tensor | None
    lengths: tuple[int, ...]
    width: int
    sizes: Tensor | None = None

    @property
    def full(self) -> bool:
        """No item has padding."""
        return all(length == self.width for length in self.lengths)

    def valid(self, device: torch.device) -> Tensor:
        """``[I, N]`` bool: not padding."""
        if self.full:
            return torch.ones(len(self.lengths), self.width, dtype=torch.bool, device=device)
        return torch.arange(self.width, device=device) < on_device(self.lengths, device)[:, None]

    def after(self, selection: Selection) -> TokenMap:
        """The map behind a selection over the current tokens.

        Raises:
            UnsupportedError: the selection makes new tokens.
        """
        if selection.synthetic is not None:
            raise UnsupportedError("Policies that make new tokens cannot act inside a vision tower.")
        step = token_map(selection)
        group = step if self.group is None else gather_tokens(step, self.group, fill=-1)
        counts = selection.out_counts()
        sizes = self.sizes
        if counts != self.lengths and selection.group_id is not None:
            before = step.new_ones(step.shape, dtype=torch.float32) if sizes is None else sizes
            sizes = segment_merge(before, selection.group_id, selection.n_outputs, mode="sum")
        elif sizes is not None:
            sizes = selection.apply(sizes) if selection.kept is not None else gather_tokens(sizes, selection.anchors())
        return TokenMap(group, counts, selection.n_outputs, sizes)

    def restore(self, values: Tensor) -> Tensor:
        """Values ``[I, T0, ...]`` of the tokens that entered from those ``[I, N, ...]`` of the current ones; zeros for
        dropped tokens."""
        return values if self.group is None else gather_tokens(values, self.group)


def token_map(selection: Selection) -> Tensor:
    """``[I, N]`` output that each input token goes to, -1 for dropped ones."""
    if selection.group_id is not None:
        return selection.group_id
    assert selection.kept is not None
    items, kept = selection.kept.shape
    place = torch.where(selection.kept < 0, selection.n_in, selection.kept)
    slot = torch.arange(kept, device=place.device).expand(items, -1)
    table = place.new_full((items, selection.n_in + 1), -1)
    return table.scatter(1, place, slot)[:, : selection.n_in]


class BlockAttention(ABC):
    """What a block's attention multiplied, over the tower's own sequence ``T``."""

    @abstractmethod
    def key_mean(self) -> Tensor:
        """Keys, mean over heads, ``[V, T, d]``."""

    @abstractmethod
    def keys(self) -> Tensor:
        """Keys, heads side by side, ``[V, T, H * d]``."""

    @abstractmethod
    def query_key(self) -> tuple[Tensor, Tensor, float]:
        """Queries and keys ``[V, H, T, d]``, and the scale of their products."""


class TowerTokens(ABC):
    """The tokens of one run of a tower, in items that are reduced on their own.

    Attributes:
        map: as they are now.
        entered: tokens per item at the start, prefix included.
        prefix: tokens before the patches of an item.
        pinned: ``[I, N]`` tokens that must stay as they are, None for none.
        changed: something was reduced.
        size_bias: attention adds ``log(size)`` to the scores of keys.
    """

    map: TokenMap
    entered: tuple[int, ...]
    prefix: int
    pinned: Tensor | None = None
    changed: bool = False
    size_bias: bool = True

    @property
    def item_views(self) -> tuple[int, ...]:
        """View of every item; by default an item is a view."""
        return tuple(range(len(self.entered)))

    @abstractmethod
    def items(self, states: Tensor) -> Tensor:
        """Tokens ``[I, N, D]`` of the tower's states."""

    @abstractmethod
    def reduce(self, states: Tensor, selection: Selection) -> Tensor:
        """The states behind a selection; the map follows."""

    @abstractmethod
    def heads(self, attention: BlockAttention) -> AttentionHeads:
        """A block's attention as a graph over the items' tokens."""

    @abstractmethod
    def key_bias(self) -> Tensor | None:
        """What is added to the scores of keys: float32 or wider ``[V, T]``, None for nothing."""

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a block for the tokens that are left."""
        return kwargs

    @abstractmethod
    def groups(self) -> Tensor | None:
        """``[V, P]`` token behind every patch of each view, numbered per view, -1 for dropped ones; None where all
        are there."""

    @abstractmethod
    def restore(self, states: Tensor) -> Tensor:
        """What the family's exit makes of the patches, from what it makes of the current tokens: ``[V, P, ...]``
        without a prefix, or in a packed tower as its projector returns it. Zeros for dropped ones."""


class BatchedTokens(TowerTokens):
    """Views of equal size in a batch ``[V, prefix + P, D]``; an item is a view.

    Args:
        views: how many.
        patches: P.
        prefix: tokens before the patches.
        units: ``[n, u]`` patches of every unit that is reduced as a whole, None where each patch is one.
    """

    def __init__(self, views: int, patches: int, prefix: int, units: Tensor | None = None) -> None:
        self.prefix = prefix
        self._units = units
        self._unit = 1 if units is None else units.shape[1]
        tokens = prefix + patches // self._unit
        self.entered = (tokens,) * views
        self.map = TokenMap(None, self.entered, tokens)

    def items(self, states: Tensor) -> Tensor:
        if self._units is None:
            return states
        head, patches = states[:, : self.prefix], states[:, self.prefix :]
        if not self.changed:
            patches = patches[:, self._units.flatten()]
        joined = patches.reshape(patches.shape[0], -1, self._unit * patches.shape[2])
        return torch.cat([head.repeat(1, 1, self._unit), joined], 1)

    def reduce(self, states: Tensor, selection: Selection) -> Tensor:
        reduced = selection.apply(self.items(states), features=True)
        self.map = self.map.after(selection)
        self.changed = True
        if self._units is None:
            return reduced
        width = states.shape[2]
        patches = reduced[:, self.prefix :].reshape(reduced.shape[0], -1, width)
        return torch.cat([reduced[:, : self.prefix, :width], patches], 1)

    def heads(self, attention: BlockAttention) -> AttentionHeads:
        query, key, scale = attention.query_key()
        bias = self.key_bias()
        if bias is not None:
            query, key = with_key_bias(query, key, bias, scale)
        return StreamedHeads(query, key, scale)

    def key_bias(self) -> Tensor | None:
        sizes = self.map.sizes
        if sizes is None and self.map.full:
            return None
        valid = None
        if sizes is not None and self.size_bias:
            bias = sizes.float().log()  # -inf hides padding, whose size is 0
        else:
            assert self.map.group is not None
            valid = self.map.valid(self.map.group.device)
            bias = torch.zeros_like(valid, dtype=torch.float32).masked_fill(~valid, -torch.inf)
        if self._unit == 1:
            return bias
        return torch.cat([bias[:, : self.prefix], bias[:, self.prefix :].repeat_interleave(self._unit, 1)], 1)

    def groups(self) -> Tensor | None:
        if self.map.group is None:
            return None
        group = self.map.group[:, self.prefix :]
        return self._spread(torch.where(group < 0, -1, group - self.prefix))

    def restore(self, states: Tensor) -> Tensor:
        if self.map.group is None:
            return states
        group = self.map.group[:, self.prefix :]
        group = torch.where(group < 0, -1, group - self.prefix)
        if self._unit == 1:
            return gather_tokens(states, group)
        units = states.unflatten(1, (-1, self._unit))
        return self._raster(gather_tokens(units, group).flatten(1, 2))

    def _spread(self, per_unit: Tensor) -> Tensor:
        """Values of units as those of patches."""
        return per_unit if self._unit == 1 else self._raster(per_unit.repeat_interleave(self._unit, 1))

    def _raster(self, values: Tensor) -> Tensor:
        """Values of the patches, unit by unit, in raster order."""
        assert self._units is not None
        return values[:, self._units.flatten().argsort()]


EXTRA = 8
"""Features that carry a bias where attention takes no mask; fused kernels want multiples of eight."""


def with_key_bias(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[V, H, T, d + EXTRA]`` whose products contain ``bias [V, T]``, where attention takes no mask.

    -inf becomes a score that vanishes in the softmax.
    """
    views, heads, tokens, _ = key.shape
    low = torch.finfo(key.dtype).min / 4 * min(scale, 1.0)
    extra_key = key.new_zeros(views, heads, tokens, EXTRA)
    extra_key[..., 0] = bias[:, None].clamp_min(low).to(key.dtype)
    extra_query = query.new_zeros(*query.shape[:3], EXTRA)
    extra_query[..., 0] = 1.0 / scale
    return torch.cat([query, extra_query], 3), torch.cat([key, extra_key], 3)
