"""The tokens of a tower while its blocks reduce them: who stands for whom, what counts, what is padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.packing import Packing
from vlmprune.core.attention import AttentionHeads
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


@dataclass(frozen=True, eq=False)
class HiddenKeys:
    """A bias of keys of which some are hidden: ``valid [V, T]`` bool, those that are seen, and their ``bias [V, T]``,
    finite everywhere, None for nothing."""

    valid: Tensor
    bias: Tensor | None


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

    @property
    def view_windows(self) -> float:
        """Products of attention over whole views, in those of attention inside the items, of what entered."""
        views: dict[int, int] = {}
        for view, length in zip(self.item_views, self.entered, strict=True):
            views[view] = views.get(view, 0) + length
        return sum(n * n for n in views.values()) / max(1, sum(n * n for n in self.entered))

    @property
    def computed(self) -> tuple[int, ...]:
        """Tokens of each item that the blocks work on, padding included."""
        return self.map.lengths

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
        """What is added to the scores of keys: float32 or wider ``[V, T]``, -inf for those that nothing sees, None for
        nothing."""

    def hidden_keys(self) -> HiddenKeys | None:
        """:meth:`key_bias` in two parts where some keys are hidden, None where all are seen."""
        return None

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a block for the tokens that are left."""
        return kwargs

    def packing(self) -> Packing | None:
        """How the real tokens of the states are packed, None where the states hold no padding."""
        return None

    @abstractmethod
    def groups(self) -> Tensor | None:
        """``[V, P]`` token behind every patch of each view, numbered per view, -1 for dropped ones; None where all
        are there."""

    @abstractmethod
    def restore(self, states: Tensor) -> Tensor:
        """What the family's exit makes of the patches, from what it makes of the current tokens: ``[V, P, ...]``
        without a prefix, or in a packed tower as its projector returns it. Zeros for dropped ones."""

    def whole(self, states: Tensor) -> Tensor:
        """The tower's states at full length, prefix included, from those of the current tokens."""
        return torch.cat([states[:, : self.prefix], self.restore(states[:, self.prefix :])], 1)


EXTRA = 8
"""Features that carry a bias where attention takes no mask; fused kernels want multiples of eight."""


def with_key_bias(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[V, H, T, d + EXTRA]`` whose products contain ``bias [V, T]``, for attention that takes no
    mask.

    In half precision the bias is split over three features, so that it loses no digits; -inf becomes a score that
    vanishes in the softmax.
    """
    views, heads, tokens, _ = key.shape
    low = torch.finfo(key.dtype).min / 4
    rest = (bias.to(torch.promote_types(bias.dtype, key.dtype)) / scale).clamp_min(low)
    extra_key = key.new_zeros(views, heads, tokens, EXTRA)
    for part in range(3):
        rounded = rest.to(key.dtype)
        extra_key[..., part] = rounded[:, None]
        rest = rest - rounded
    extra_query = query.new_zeros(*query.shape[:3], EXTRA)
    extra_query[..., :3] = 1.0
    return torch.cat([query, extra_query], 3), torch.cat([key, extra_key], 3)
