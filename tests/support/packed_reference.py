"""The tower of a Qwen-VL model in plain steps, token by token, with tokens dropped, hidden or merged on the way.

Nothing here asks an adapter. What enters the first block and how each block is segmented is read from the stock tower;
norms, linear layers and the rotary rotation are the model's own, attention is an explicit softmax in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fixed_tower import FixedGroups
from torch import Tensor, nn


@dataclass(frozen=True)
class Unit:
    """A token: ``states [u, C]`` of its patches, the units that it stands for, the first of which is its place.

    ``hidden`` ones are no keys.
    """

    states: Tensor
    members: tuple[int, ...]
    hidden: bool = False

    @property
    def place(self) -> int:
        return self.members[0]


@dataclass(frozen=True)
class BlockRecord:
    """Attention of one block: its tokens in order, queries and keys ``[H, n, d]`` of their patches, and softmax
    ``[H, n, n]``, 0 between segments."""

    units: list[Unit]
    query: Tensor
    key: Tensor
    weights: Tensor


@dataclass
class PackedReference:
    """One run of a tower.

    Args:
        model: in float64.
        pixels, grids: as its tower takes them.
        stages: reductions, in order.
        hide: dropped tokens stay but are hidden as keys.

    Attributes:
        units: tokens as they leave the last block.
        items: units of every item, numbers in the tower's order.
        entering, leaving: tokens around each block.
        attention: of each block.
        deepstack: features ``[M0, D]`` of the levels.
    """

    model: nn.Module
    pixels: Tensor
    grids: Tensor
    stages: Sequence[FixedGroups] = ()
    hide: bool = False
    items: list[list[int]] = field(default_factory=list)
    entering: list[list[Unit]] = field(default_factory=list)
    leaving: list[list[Unit]] = field(default_factory=list)
    attention: list[BlockRecord] = field(default_factory=list)
    deepstack: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tower = self.model.model.visual
        self.size = self.tower.spatial_merge_size**2
        self._calls: list[dict[str, Any]] = []
        hooks = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in self.tower.blocks]
        with torch.no_grad():
            self.tower(self.pixels, self.grids)
            for hook in hooks:
                hook.remove()
            self._run()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append({**kwargs, "states": args[0]})

    @property
    def units(self) -> list[Unit]:
        return self.leaving[-1]

    def _run(self) -> None:
        finest = max((call["cu_seqlens"].tolist() for call in self._calls), key=len)
        bounds = [end // self.size for end in finest]
        self.items = [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
        states = self._calls[0]["states"].unflatten(0, (-1, self.size))
        units = [Unit(states[i], (i,)) for i in range(len(states))]
        levels = getattr(self.tower, "deepstack_visual_indexes", [])
        for number, block in enumerate(self.tower.blocks):
            units = self._staged(units, number, "before")
            self.entering.append(units)
            units = self._attend(units, block, self._calls[number])
            units = self._staged(units, number, "middle")
            units = [replace(u, states=u.states + block.mlp(block.norm2(u.states))) for u in units]
            self.leaving.append(units)
            if number in levels:
                self.deepstack.append(self.features(self.tower.deepstack_merger_list[levels.index(number)], units))

    def _staged(self, units: list[Unit], block: int, place: str) -> list[Unit]:
        for stage in self.stages:
            if stage.layer == block and stage.place == place:
                [table] = [run for run in stage.groups if len(run) == len(self.items)]
                made: list[Unit] = []
                for item, groups in zip(self.items, table, strict=True):
                    made += self._grouped([u for u in units if u.place in set(item)], groups)
                units = made
        return units

    def _grouped(self, units: list[Unit], groups: Sequence[Sequence[int]]) -> list[Unit]:
        made, shown = [], [u for u in units if not u.hidden]
        for group in groups:
            members = [shown[i] for i in sorted(group)]
            size = sum(len(m.members) for m in members)
            states = sum(m.states * len(m.members) for m in members) / size if len(members) > 1 else members[0].states
            made.append(Unit(states, tuple(i for m in members for i in m.members)))
        if self.hide:
            kept = {u.place for u in made}
            made = [u if u.place in kept else replace(u, hidden=True) for u in units]
        return made

    def _attend(self, units: list[Unit], block: nn.Module, call: dict[str, Any]) -> list[Unit]:
        attn = block.attn
        rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision
        cos, sin = (
            table.unflatten(0, (-1, self.size))[[u.place for u in units]].flatten(0, 1)
            for table in call["position_embeddings"]
        )
        states = torch.cat([u.states for u in units])
        qkv = attn.qkv(block.norm1(states)).reshape(len(states), 3, attn.num_heads, -1).unbind(1)
        query, key = rotate(qkv[0], qkv[1], cos, sin)
        query, key, value = (part.transpose(0, 1).double() for part in (query, key, qkv[2]))  # [H, n, d]
        segment = torch.bucketize(
            torch.tensor([u.place * self.size for u in units]), call["cu_seqlens"][1:].long(), right=True
        ).repeat_interleave(self.size)
        allowed = segment[:, None] == segment
        hidden = torch.tensor([u.hidden for u in units]).repeat_interleave(self.size)
        allowed = allowed & ~hidden | torch.eye(len(hidden), dtype=torch.bool)
        sizes = torch.tensor([len(u.members) for u in units], dtype=torch.float64).repeat_interleave(self.size)
        biased = not self.stages or self.stages[0].size_bias
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5 + (sizes.log() if biased else 0)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        self.attention.append(BlockRecord(units, query, key, weights))
        states = states + attn.proj((weights @ value).transpose(0, 1).flatten(1))
        return [replace(u, states=x) for u, x in zip(units, states.split(self.size), strict=True)]

    def features(self, merger: nn.Module | None = None, units: list[Unit] | None = None) -> Tensor:
        """``[M0, D]`` what the merger makes of the token behind every unit, in the tower's order; zeros for dropped
        ones."""
        merger, units = merger or self.tower.merger, units or self.units
        return self.spread([merger(u.states) for u in units], units)

    def spread(self, values: list[Tensor], units: list[Unit]) -> Tensor:
        """Values ``[m, ...]`` of each token as ``[M0 * m, ...]`` of the units that it stands for."""
        found = torch.zeros(sum(map(len, self.items)), *values[0].shape, dtype=values[0].dtype)
        for unit, value in zip(units, values, strict=True):
            found[list(unit.members)] = value
        return found.flatten(0, 1)


def in_raster(model: nn.Module, grids: Tensor, values: Tensor) -> Tensor:
    """Values of units in the tower's order, put into raster order by the tower's own window index."""
    tower, config = model.model.visual, model.config.vision_config
    if not hasattr(config, "window_size"):
        return values
    if hasattr(tower, "get_window_index"):
        index, _ = tower.get_window_index(grids)
    else:
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
    return values[index.argsort()]
