"""Tokens of towers that pack the patches of all images into one sequence (Qwen-VL), while their blocks reduce them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.packing import Packing
from vlmprune.adapters.tower_tokens import BlockAttention, TokenMap, TowerTokens, with_key_bias
from vlmprune.adapters.unit_heads import UnitHeads
from vlmprune.core.attention import AttentionHeads
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.selection import Selection
from vlmprune.core.views import on_device
from vlmprune.kernels.gather import gather_tokens


class PackedTokens(TowerTokens):
    """Patches of all images in one sequence ``[N, C]``, in the tower's own order.

    A token is a unit of patches that stand side by side and make one token of the LLM. An item is the largest set in
    which tokens may merge: an attention window where the tower has windows (for its blocks with full attention, too,
    so that windows stay windows), else a temporal slice of an image or video. A merged unit stands where the first of
    its members stood (:meth:`~vlmprune.core.selection.Selection.anchors`): it takes that one's rotary position.

    Args:
        lengths: units of every item, in the tower's order.
        views: view of every item.
        unit: patches of a unit.
        places, valid: ``[V, P]`` where the patches of each view stand in the tower, and which exist.
    """

    def __init__(
        self, lengths: tuple[int, ...], views: tuple[int, ...], unit: int, places: Tensor, valid: Tensor
    ) -> None:
        self.prefix = 0
        self._views, self.entered = views, lengths
        self.map = TokenMap(None, lengths, max(lengths))
        self._unit, self._seats, self._valid = unit, places, valid
        self._entry = self._packing = Packing(lengths, max(lengths), places.device)
        self._origin = torch.arange(sum(lengths), device=places.device)
        self._bias: Tensor | None = None
        self._bounds: dict[int, tuple[Tensor, list[int]]] = {}
        self._prepared: dict[int, tuple[Tensor, Any]] = {}

    @property
    def item_views(self) -> tuple[int, ...]:
        return self._views

    def items(self, states: Tensor) -> Tensor:
        return self._packing.pad(states.reshape(-1, self._unit * states.shape[-1]))

    def reduce(self, states: Tensor, selection: Selection) -> Tensor:
        reduced = selection.apply(self.items(states), features=True)
        origin = gather_tokens(self._packing.pad(self._origin), selection.anchors(), fill=-1)
        self.map = self.map.after(selection)
        if not any(self.map.lengths):
            raise UnsupportedError(
                "Every token of every image of this call was dropped inside the vision tower, which cannot run on "
                "nothing; keep at least one, or drop them after the encoder."
            )
        self._packing = Packing(self.map.lengths, self.map.width, states.device)
        self._origin = self._packing.pack(origin)
        self._bias = self._log_sizes(torch.promote_types(states.dtype, torch.float32))
        self._prepared = {}
        self.changed = True
        return self._packing.pack(reduced).reshape(-1, states.shape[-1])

    def _log_sizes(self, dtype: torch.dtype) -> Tensor | None:
        if self.map.sizes is None or not self.size_bias:
            return None
        sizes = self._packing.pack(self.map.sizes)
        return sizes.to(dtype).log().repeat_interleave(self._unit)[None]

    def heads(self, attention: BlockAttention) -> AttentionHeads:
        query, key, scale = attention.query_key()
        if self._bias is not None:
            query, key = with_key_bias(query, key, self._bias, scale)
        valid = self.map.valid(query.device)
        return UnitHeads(self._items_of_heads(query), self._items_of_heads(key), scale, self._unit, valid)

    def _items_of_heads(self, values: Tensor) -> Tensor:
        """``[I, H, n * u, d]`` patches of the items from ``[1, H, N, d]``."""
        _, heads, _, size = values.shape
        padded = self.items(values[0].transpose(0, 1).flatten(1))
        return padded.unflatten(2, (self._unit, heads, size)).flatten(1, 2).transpose(1, 2)

    def key_bias(self) -> Tensor | None:
        return self._bias

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Segments and rotary tables of the tokens that are left, in place of those of all tokens."""
        segments, longest = self._segments(kwargs["cu_seqlens"])
        changed = {**kwargs, "cu_seqlens": segments}
        if kwargs.get("max_seqlen") is not None:
            changed["max_seqlen"] = longest
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = tuple(self._of_tokens(table) for table in kwargs["position_embeddings"])
        if kwargs.get("rotary_pos_emb") is not None:
            changed["rotary_pos_emb"] = self._of_tokens(kwargs["rotary_pos_emb"])
        return changed

    def _of_tokens(self, table: Tensor) -> Tensor:
        """Rows ``[N, ...]`` of the patches that are left; one and the same table is gathered once per change."""
        if id(table) not in self._prepared:
            units = table.unflatten(0, (-1, self._unit))[self._origin]
            self._prepared[id(table)] = table, units.flatten(0, 1)
        return self._prepared[id(table)][1]

    def _segments(self, ends: Tensor) -> tuple[Tensor, int]:
        """Cumulative lengths ``[S + 1]`` of the segments that still have patches, and the longest length."""
        if id(ends) not in self._prepared:
            starts = self._packing.starts
            left = sorted({self._unit * starts[item] for item in self._items_before(ends)})
            longest = max(end - start for start, end in pairwise(left))
            new = torch.tensor(left, dtype=ends.dtype).to(ends.device, non_blocking=True)
            self._prepared[id(ends)] = ends, (new, longest)
        return self._prepared[id(ends)][1]

    def _items_before(self, ends: Tensor) -> list[int]:
        """How many items lie before each end of a segment; read from the device once per run."""
        if id(ends) not in self._bounds:
            number = {self._unit * start: item for item, start in enumerate(self._entry.starts)}
            try:
                self._bounds[id(ends)] = ends, [number[end] for end in ends.tolist()]
            except KeyError as error:
                raise UnsupportedError(
                    f"A segment of the tower's attention ends at patch {error}, inside a window or image; tokens "
                    "inside this tower cannot be reduced."
                ) from None
        return self._bounds[id(ends)][1]

    def standing(self) -> Tensor:
        """``[V, P]`` place in the tower of what stands for each patch now, -1 for dropped ones and padding."""
        unit = self._current()[self._seats // self._unit]
        return torch.where(self._valid & (unit >= 0), unit * self._unit + self._seats % self._unit, -1)

    def left(self) -> Tensor:
        """``[V]`` patches of each view now."""
        counts = [self._unit * (end - start) for start, end in pairwise(self._view_starts())]
        return on_device(counts, self._seats.device)

    def groups(self) -> Tensor | None:
        if self.map.group is None:
            return None
        standing = self.standing()
        first = on_device(self._view_starts()[:-1], standing.device)[:, None]
        return torch.where(standing < 0, -1, standing.div(self._unit, rounding_mode="floor") - first)

    def restore(self, states: Tensor) -> Tensor:
        """Values ``[M0, ...]`` of the units that entered, in the tower's order, from those of the units that are left;
        zeros for dropped ones. Behind a projector that joins units that is what it would have returned."""
        if self.map.group is None:
            return states
        return gather_tokens(states[None], self._current()[None])[0]

    def restore_patches(self, states: Tensor) -> Tensor:
        """Values ``[N, ...]`` of the patches that entered, as :meth:`restore`."""
        return self.restore(states.unflatten(0, (-1, self._unit))).flatten(0, 1)

    def _current(self) -> Tensor:
        """``[M0]`` place among the units that are left of what stands for each that entered, -1 for dropped ones."""
        if self.map.group is None:
            return self._origin
        starts = on_device(self._packing.starts[:-1], self._origin.device)[:, None]
        return self._entry.pack(torch.where(self.map.group < 0, -1, self.map.group + starts))

    def _view_starts(self) -> Sequence[int]:
        """Where each view starts among the units that are left, and where the last one ends."""
        firsts = [item for item, view in enumerate(self._views) if item == 0 or view != self._views[item - 1]]
        starts = self._packing.starts
        return [*(starts[item] for item in firsts), starts[-1]]
