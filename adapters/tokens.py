"""Which prompt tokens a run of decoder layers works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vlmprune.kernels.gather import pack_indices

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """Which prompt tokens a run of layers works on.

    Attributes:
        index: ``[B, n]`` int64 places in the unpruned prompt, ascending; fillers (on the left) repeat a real token.
        valid: ``[B, n]`` bool; False for fillers and padding.
        full: every entry of ``valid`` is True, known on the host.
        shift: ``[B]`` what later tokens' positions are reduced by, None for nothing.
    """

    index: Tensor
    valid: Tensor
    full: bool
    shift: Tensor | None = None

    @property
    def length(self) -> int:
        """Stored tokens per row."""
        return self.index.shape[1]

    def rows(self, index: Tensor) -> LayerTokens:
        """The same for other batch rows (beam reordering, repetition)."""
        index = index.to(self.index.device)
        shift = None if self.shift is None else self.shift[index]
        return LayerTokens(self.index[index], self.valid[index], self.full, shift)

    def without_last(self, count: int) -> LayerTokens:
        """The same without the last ``count`` tokens."""
        n = self.length - count
        return LayerTokens(self.index[:, :n], self.valid[:, :n], self.full, self.shift)


def change_shared(items: list[T], change: Callable[[T], T]) -> None:
    """Change every item of a list in place; entries that were one object stay one object."""
    changed: dict[int, T] = {}
    for i, item in enumerate(items):
        if id(item) not in changed:
            changed[id(item)] = change(item)
        items[i] = changed[id(item)]


def pack(keep: Tensor, width: int, full: bool, shift: Tensor | None = None) -> LayerTokens:
    """Tokens ``keep [B, L]`` moved together, fillers on the left.

    Args:
        width: most tokens of a row. full: every row has as many.
    """
    index, valid = pack_indices(keep, side="left", width=width)
    if not full:
        first = torch.where(valid, index, keep.shape[1]).amin(1, keepdim=True)
        index = torch.where(valid, index, first)
    return LayerTokens(index, valid, full, shift)


def places_of(original: Tensor, tokens: LayerTokens) -> Tensor:
    """Where the prompt places ``original [B, n]`` stand among ``tokens``; fillers stand before what they repeat."""
    found = torch.searchsorted(tokens.index.contiguous(), original.contiguous(), right=True)
    return (found - 1).clamp_min(0)
