"""Views: the grids inside an image's tokens, and how a budget is shared among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One encoder pass inside an image's tokens: ``height * width`` tokens from ``start``, row by row.

    Attributes:
        height, width: grid of LLM tokens (after a merger).
        start: first token of the view in the item.
        kind: ``image`` (the only view), ``thumbnail``, ``tile`` or ``frame``.
        index: place in the item of every grid cell, ``[height * width]``, where the view is not contiguous.
    """

    height: int
    width: int
    start: int = 0
    kind: Literal["image", "thumbnail", "tile", "frame"] = "image"
    index: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Number of grid cells."""
        return self.height * self.width

    def tokens(self, device: torch.device | None = None) -> Tensor:
        """Places of the view's tokens in the item, int64 ``[height * width]``."""
        if self.index is not None:
            return on_device(self.index, device)
        return torch.arange(self.start, self.start + self.length, device=device)


@dataclass(frozen=True)
class Newline:
    """A separator token that ends a row of cells: at ``place`` of its item, for the row ``start`` to ``place - 1``."""

    place: int
    start: int


@dataclass(frozen=True)
class ViewGroup:
    """Views of equal grid and budget, gathered so that one batched call serves them all.

    ``item`` ``[V]`` and ``index`` ``[V, n]`` say where the tokens stand in the batch; ``count`` tokens are
    kept in each view. ``places`` lists (item, number of the view in that item) on the host.
    """

    height: int
    width: int
    count: int
    item: Tensor
    index: Tensor
    places: tuple[tuple[int, int], ...] = ()

    def gather(self, values: Tensor) -> Tensor:
        """Values ``[I, N, ...]`` of the group's tokens, ``[V, n, ...]``."""
        return values[self.item[:, None], self.index]


def on_device(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device | None) -> Tensor:
    """An int64 tensor of host values; the copy does not make the host wait for the device."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def split_count(count: int, lengths: Sequence[int]) -> list[int]:
    """Share ``count`` among parts in proportion to ``lengths``: largest remainder, earlier parts first."""
    total = sum(lengths)
    if total == 0:
        return [0 for _ in lengths]
    exact = [count * length for length in lengths]
    shares = [value // total for value in exact]
    by_remainder = sorted(range(len(lengths)), key=lambda i: (-(exact[i] % total), i))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares


def split_equal(count: int, lengths: Sequence[int]) -> list[int]:
    """Share ``count`` equally among parts, none above its length: what a short part cannot take goes to the
    others, a remainder to earlier parts."""
    shares, left = [0 for _ in lengths], min(count, sum(lengths))
    while left:
        free = [i for i, share in enumerate(shares) if share < lengths[i]]
        each = max(1, left // len(free))
        for i in free:
            take = min(each, lengths[i] - shares[i], left)
            shares[i] += take
            left -= take
    return shares
