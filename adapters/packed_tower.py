"""Towers that pack the patches of all images into one sequence (Qwen-VL), and attention in segments of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlmprune.adapters.packed_tokens import PackedTokens
from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.adapters.towers import AttentionCall, Tower, TowerRun
from vlmprune.core import signals as s
from vlmprune.core.attention import AttentionMap
from vlmprune.kernels.column_mass import Masking, column_mass

Grid = tuple[int, int, int]
"""Frames, height and width of an image or video in patches."""


@dataclass(frozen=True)
class PackedTower(Tower):
    """A tower called with packed patches ``[N, C * t * h * w]`` and their grids (Qwen).

    Patches that merge into one token of the LLM stand side by side; a view is one temporal slice of an image or video.

    Args:
        merge: patches along a side of a merge group.
        patch, frames: side of a patch in pixels, frames in it.
        window: side of an attention window in merge groups, None where blocks see whole slices in raster order.
    """

    merge: int
    patch: int
    frames: int
    window: int | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TowerRun:
        patches = args[0] if args else kwargs["hidden_states"]
        grids = args[1] if len(args) > 1 else kwargs["grid_thw"]
        return PackedRun(self, patches, [tuple(grid) for grid in grids.tolist()])


class PackedRun(TowerRun):
    """See :class:`PackedTower`."""

    def __init__(self, tower: PackedTower, patches: Tensor, grids: list[Grid]) -> None:
        self._input, self._tower, self._grids = patches.detach(), tower, grids
        sizes = [height * width for frames, height, width in grids for _ in range(frames)]
        self.n_views, self.patches_per_view = len(sizes), max(sizes)
        starts = np.cumsum([0, *sizes[:-1]])
        width = max(sizes)
        place = starts[:, None] + np.arange(width)  # [V, P] among all patches in raster order of merge groups
        valid = np.arange(width) < np.asarray(sizes)[:, None]
        place = np.where(valid, place, starts[:, None])
        order = tower_order(grids, tower.merge, tower.window)
        self._raster = torch.from_numpy(place).to(patches.device)
        self._places = torch.from_numpy(np.argsort(order)[place]).to(patches.device)
        self._valid = torch.from_numpy(valid).to(patches.device)
        self._full = len(set(sizes)) == 1

    @property
    def patch_valid(self) -> Tensor | None:
        return None if self._full else self._valid

    def patches(self, states: Tensor, tokens: TowerTokens | None = None) -> Tensor:
        if tokens is not None:
            assert isinstance(tokens, PackedTokens)
            states = tokens.restore_patches(states)
        return self.masked(states[self._places])

    def tokens(self) -> PackedTokens:
        unit = self._tower.merge**2
        lengths, views = windows(self._grids, self._tower.merge, self._tower.window)
        return PackedTokens(lengths, views, unit, self._places, self._valid)

    def attention(self, signal: s.Signal, calls: list[AttentionCall]) -> Any:
        query = torch.cat([call.query[0] for call in calls], 1)  # [H, N, d]
        key = torch.cat([call.key[0] for call in calls], 1)
        tokens = calls[0].tokens
        if isinstance(signal, s.Keys):
            return self.patches(key.transpose(0, 1).flatten(1), tokens)
        if isinstance(signal, s.QK):
            return tuple(self.patches(part.transpose(0, 1), tokens).transpose(1, 2) for part in (query, key))
        lengths = tuple(n for call in calls for n in (call.lengths or (call.query.shape[2],)))
        whole = SegmentedAttention(query, key, calls[0].scale, lengths, self._places, self._valid)
        if tokens is not None:
            assert isinstance(tokens, PackedTokens)
            whole = whole.behind(tokens.standing(), tokens.left(), tokens.key_bias())
        return whole.column_mass(reduce=signal.reduce) if isinstance(signal, s.ColumnMass) else whole

    def pixels(self) -> Tensor:
        side, frames = self._tower.patch, self._tower.frames
        return self._input.unflatten(1, (-1, frames * side, side))[self._raster]

    def contents(self) -> list[Tensor]:
        return list(self._input.split(self._valid.sum(1).tolist()))

    def drop_input(self) -> None:
        del self._input


@dataclass(frozen=True)
class SegmentedAttention:
    """An :class:`AttentionMap` over packed segments (windows, or whole slices).

    Where tokens were merged, every member of a group is given what the group received, the weights of the members'
    rows add up to that of the group's one row, and without weights that row counts once. Dropped patches neither
    give nor receive.

    Args:
        query, key: ``[H, N, d]`` in the tower's order.
        lengths: patches per segment.
        places, valid: ``[V, P]`` where what stands for the patches of each view is in that order, and which exist.
        rows: ``[V]`` rows of each view, None for as many as patches exist.
        bias: ``[1, N]`` added to the scores of keys, None for nothing.
    """

    query: Tensor
    key: Tensor
    scale: float
    lengths: tuple[int, ...]
    places: Tensor
    valid: Tensor
    rows: Tensor | None = None
    bias: Tensor | None = None

    def behind(self, standing: Tensor, rows: Tensor, bias: Tensor | None) -> SegmentedAttention:
        """The same attention of fewer tokens: ``standing [V, P]`` says where what stands for each patch is, -1 for
        dropped ones."""
        return replace(self, places=standing.clamp_min(0), valid=standing >= 0, rows=rows, bias=bias)

    def column_mass(self, row_weight: Tensor | None = None, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """See :class:`AttentionMap`."""
        mass = self._sums(row_weight)[self.places] * self.valid
        if reduce == "sum":
            return mass
        if row_weight is not None:
            total = (row_weight.to(mass) * self.valid).sum(1, keepdim=True)
        else:
            total = (self.valid.sum(1) if self.rows is None else self.rows).to(mass)[:, None]
        return mass / total.where(total != 0, 1.0)

    def views(self, index: Tensor) -> AttentionMap:
        """The map of some views, ``index [V']``; the others' rows stay out of every sum."""
        rows = None if self.rows is None else self.rows[index]
        return replace(self, places=self.places[index], valid=self.valid[index], rows=rows)

    def _sums(self, row_weight: Tensor | None) -> Tensor:
        """Received attention of all patches in the tower's order, ``[N]``."""
        device, total = self.query.device, self.query.shape[1]
        weights = None
        if row_weight is not None:
            given = (row_weight * self.valid).flatten()
            weights = given.new_zeros(total).index_add_(0, self.places.flatten(), given)
        starts = np.cumsum([0, *self.lengths[:-1]])
        sums: Tensor | None = None
        for length in sorted(set(self.lengths)):
            first = torch.from_numpy(starts[np.asarray(self.lengths) == length]).to(device)
            index = first[:, None] + torch.arange(length, device=device)  # [S, length]
            query, key = (part[:, index].transpose(0, 1) for part in (self.query, self.key))
            weight = None if weights is None else weights[index]
            masking: Masking = {} if self.bias is None else {"key_bias": self.bias[0, index]}
            part = column_mass(query, key, scale=self.scale, row_weight=weight, reduce="sum", **masking)
            sums = part.new_zeros(total) if sums is None else sums
            sums[index] = part
        assert sums is not None
        return sums


def tower_order(grids: list[Grid], merge: int, window: int | None) -> np.ndarray:
    """Raster number of the patch that stands at each place of a packed tower, ``[N]``.

    Raster order is by slice, merge group (row by row) and patch inside it. With windows, a slice's groups stand
    window by window, each row by row; windows at the right and bottom edge may be smaller.

    Args:
        grids: frames, height and width of each image in patches.
        merge: patches along a side of a merge group.
        window: side of a window in merge groups, None for none.
    """
    unit = merge * merge
    parts, start = [], 0
    for frames, height, width in grids:
        rows, columns = height // merge, width // merge
        index = np.arange(frames * rows * columns).reshape(frames, rows, columns)
        if window is not None:
            by_window = np.argsort(_window_numbers(rows, columns, window), kind="stable")
            index = index.reshape(frames, -1)[:, by_window]
        parts.append(index.reshape(-1) + start)
        start += frames * rows * columns
    groups = np.concatenate(parts)
    return (groups[:, None] * unit + np.arange(unit)).reshape(-1)


def windows(grids: list[Grid], merge: int, window: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Merge groups in each window and the view to which it belongs, in the tower's order; a whole slice without
    windows. Arguments as in :func:`tower_order`."""
    lengths: list[int] = []
    views: list[int] = []
    slices = [(height // merge, width // merge) for frames, height, width in grids for _ in range(frames)]
    for view, (rows, columns) in enumerate(slices):
        found = [rows * columns]
        if window is not None:
            found = np.unique(_window_numbers(rows, columns, window), return_counts=True)[1].tolist()
        lengths += found
        views += [view] * len(found)
    return tuple(lengths), tuple(views)


def _window_numbers(rows: int, columns: int, window: int) -> np.ndarray:
    """Number of the window of each merge group of a slice, row by row."""
    row, column = np.arange(rows) // window, np.arange(columns) // window
    return (row[:, None] * (columns // window + 1) + column).reshape(-1)
