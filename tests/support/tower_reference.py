"""A tower with reductions between and inside its blocks, computed view by view in plain tensor code.

Norms, projections and MLPs are the model's own modules; attention, residual sums, gains, sizes, merges and padding are
written out. Nothing here asks an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from eager_reference import CLS, blocks_of, encoder_views, find, projector_of, tower_of
from family_prompts import FamilyPrompt, prefill
from short_reference import text_model
from torch import Tensor, nn
from tower_plans import Steps

LAST_BUT_ONE = ("llava", "llava_next")
"""Families that read what leaves the last block but one."""


@dataclass
class View:
    """The tokens of one view.

    Attributes:
        prefix: ``[c, D]`` tokens before the patches.
        units: ``[n, u, D]`` patches of every token.
        sizes: units behind each token.
        seen: ``[n, u]`` bool, patches that others see.
        group: per unit that entered its token, -1 for dropped ones.
        order: ``[n0, u]`` raster numbers of the patches of the units that entered.
        biased: sizes count in attention.
    """

    prefix: Tensor
    units: Tensor
    seen: Tensor
    order: Tensor
    sizes: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    biased: bool = True

    def __post_init__(self) -> None:
        self.sizes = [1] * len(self.units)
        self.group = list(range(len(self.units)))

    @property
    def states(self) -> Tensor:
        """``[1, T, D]``."""
        return torch.cat([self.prefix, self.units.flatten(0, 1)])[None]

    def put(self, states: Tensor) -> None:
        """Take new states ``[1, T, D]`` of the same tokens."""
        first = len(self.prefix)
        self.prefix, self.units = states[0, :first], states[0, first:].view_as(self.units)

    @property
    def fixed(self) -> frozenset[int]:
        """Tokens that nothing may change, the prefix counted."""
        first = len(self.prefix)
        pinned = [first + i for i, seen in enumerate(self.seen.tolist()) if not all(seen)]
        return frozenset([*range(first), *pinned])

    def bias(self) -> Tensor:
        """``[T]`` what is added to the scores of keys."""
        size = torch.tensor(self.sizes, dtype=torch.float64).log() * self.biased
        each = size[:, None].expand(self.seen.shape).masked_fill(~self.seen, -torch.inf)
        return torch.cat([torch.zeros(len(self.prefix)), each.flatten()])

    def reduce(self, groups: list[int]) -> None:
        """Merge the tokens (prefix counted) that have one group."""
        first = len(self.prefix)
        assert groups[:first] == list(range(first))
        own = [group - first if group >= 0 else -1 for group in groups[first:]]
        units, seen, sizes = [], [], []
        for place in range(max(own) + 1):
            members = [i for i, group in enumerate(own) if group == place]
            weight = torch.tensor([self.sizes[i] for i in members], dtype=self.units.dtype)
            units.append((self.units[members] * weight[:, None, None]).sum(0) / weight.sum())
            sizes.append(sum(self.sizes[i] for i in members))
            seen.append(self.seen[members].all(0))
        self.units, self.sizes, self.seen = torch.stack(units), sizes, torch.stack(seen)
        self.group = [own[group] if group >= 0 else -1 for group in self.group]

    def whole(self, states: Tensor | None = None) -> Tensor:
        """``[c + P, D]`` states at full length, zeros for dropped patches."""
        states = self.states if states is None else states
        first = len(self.prefix)
        units = states[0, first:].view(len(self.units), *self.order.shape[1:], -1)
        patches = states.new_zeros(self.order.numel(), states.shape[-1])
        for unit, group in enumerate(self.group):
            if group >= 0:
                patches[self.order[unit]] = units[group]
        return torch.cat([states[0, :first], patches])

    def patch_groups(self) -> list[int]:
        """Token of every patch in raster order."""
        found = [-1] * self.order.numel()
        for unit, group in enumerate(self.group):
            for patch in self.order[unit].tolist():
                found[patch] = group
        return found


@dataclass
class TowerRun:
    """One run of the tower.

    Attributes:
        views: at the end.
        hidden: ``[V, c + P, D]`` what left each block, at full length.
        short: per view what left each block ``[T, D]``.
        last: ``[V, c + P, D]`` the tower's last state, behind its last norm.
        attention: per block and view, queries, keys ``[H, T, d]`` and attention ``[H, T, T]``.
        groups: behind each block, per view the token of every patch, -1 for dropped ones.
        entering: per block and view the token of every patch in its attention.
    """

    views: list[View]
    hidden: list[Tensor] = field(default_factory=list)
    short: list[list[Tensor]] = field(default_factory=list)
    last: Tensor | None = None
    attention: list[list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=list)
    groups: list[list[list[int]]] = field(default_factory=list)
    entering: list[list[list[int]]] = field(default_factory=list)


class TowerReference:
    """Runs of a model's tower over a prompt's images, with planned reductions.

    Args:
        model: in float64.
        merge: side of the squares of patches that are reduced as one.
        feature_block: the last block that counts.
    """

    def __init__(self, model: nn.Module, prompt: FamilyPrompt, steps: Steps, merge: int = 1) -> None:
        self.model = model
        self.blocks = list(blocks_of(model))
        self.steps = steps
        siglip = model.config.vision_config.model_type == "siglip_vision_model"
        self.first = int(prompt.family in CLS and not siglip)
        self.merge = merge
        self.image_views = [encoder_views(part) for row in prompt.rows for part in row.parts]
        entering: list[Tensor] = []
        masks: list[Tensor | None] = []
        hooks = [
            tower_of(model).register_forward_pre_hook(
                lambda m, a, k: masks.append(k.get("patch_attention_mask")), with_kwargs=True
            ),
            self.blocks[0].register_forward_pre_hook(
                lambda m, a, k: entering.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            ),
        ]
        prefill(model, prompt)
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            self.runs = [self._run(states, mask) for states, mask in zip(entering, masks, strict=True)]

    def repeated(self, views: int, own: int) -> Tensor:
        """``[views]`` view of the reference behind each of a run in which every image comes several times in a row."""
        if views == own:
            return torch.arange(own)
        starts = [sum(self.image_views[:i]) for i in range(len(self.image_views))]
        images = [list(range(start, start + n)) for start, n in zip(starts, self.image_views, strict=True)]
        assert sum(map(len, images)) == own and views % own == 0
        return torch.tensor([view for image in images for view in image * (views // own)])

    def _run(self, states: Tensor, mask: Tensor | None) -> TowerRun:
        count = states.shape[1] - self.first
        order = unit_patches(round(count**0.5), self.merge)
        seen = torch.ones(len(states), count, dtype=torch.bool) if mask is None else mask.flatten(1).bool()
        views = [
            View(s[: self.first], s[self.first :][order], m[order], order) for s, m in zip(states, seen, strict=True)
        ]
        run = TowerRun(views)
        for number, block in enumerate(self.blocks):
            run.short.append([])
            run.attention.append([])
            run.entering.append([])
            for index, view in enumerate(views):
                self._reduce(view, index, number, "before")
                run.entering[number].append(view.patch_groups())
                parts = BlockParts(block, self.model.config.vision_config.num_attention_heads)
                attended, seen_by = parts.attention(view.states, view.bias())
                run.attention[number].append(seen_by)
                view.put(view.states + attended)
                self._reduce(view, index, number, "middle")
                view.put(view.states + parts.mlp(view.states))
                run.short[number].append(view.states[0])
            run.hidden.append(torch.stack([view.whole() for view in views]))
            run.groups.append([view.patch_groups() for view in views])
        norm = last_norm(self.model)
        run.last = torch.stack([view.whole(view.states if norm is None else norm(view.states)) for view in views])
        return run

    def _reduce(self, view: View, index: int, block: int, place: str) -> None:
        for step in self.steps:
            if (step.block, step.place) == (block, place):
                tokens = len(view.prefix) + len(view.units)
                view.reduce(step.groups(index, tokens, view.fixed))
                if step.kind not in ("keep", "prune"):
                    view.biased = step.size_bias


@dataclass(frozen=True)
class BlockParts:
    """A block's own modules, by the names that transformers gives them."""

    block: nn.Module
    heads: int

    def attention(self, states: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """What attention adds to ``states [1, T, D]``; queries, keys and weights."""
        module = find(self.block, "self_attn", "attention")
        normed = find(self.block, "layer_norm1", "layernorm_before")(states)
        query, key, value = (getattr(module, f"{name}_proj")(normed) for name in "qkv")
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key, value = (
            part.view(1, states.shape[1], self.heads, -1).transpose(1, 2) for part in (query, key, value)
        )
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + bias
        weights = scores.softmax(-1)
        joined = (weights @ value).transpose(1, 2).reshape(states.shape)
        added = find(module, "out_proj", "projection_layer")(joined)
        gain = getattr(self.block, "lambda_1", 1.0)
        return gain * added, (query[0], key[0], weights[0])

    def mlp(self, states: Tensor) -> Tensor:
        """What the MLP adds."""
        normed = find(self.block, "layer_norm2", "layernorm_after")(states)
        return getattr(self.block, "lambda_2", 1.0) * self.block.mlp(normed)


def unit_patches(side: int, merge: int) -> Tensor:
    """``[n, merge ** 2]`` patches of each square of a grid, squares row by row."""
    grid = torch.arange(side**2).view(side, side)
    return torch.stack([cell.flatten() for row in grid.split(merge) for cell in row.split(merge, 1)])


def last_norm(model: nn.Module) -> nn.Module | None:
    """The norm behind the last block through which the last state passes; CLIP's is for its CLS token only."""
    tower = tower_of(model)
    if "clip" in type(tower).__name__.lower():
        return None
    return find(tower, "post_layernorm", "layernorm", "vision_model.post_layernorm")


@contextmanager
def tower_replaced(model: nn.Module, reference: TowerReference, share: Tensor | None = None) -> Iterator[None]:
    """The dense model, whose tower returns what a reference computed, and whose projector makes nothing of dropped
    patches.

    Args:
        share: ``[B, L]`` what embeddings are divided by, None for nothing.
    """
    runs = cycle(reference.runs)
    current: list[Any] = []

    def stand_in(module: nn.Module, args: Any, output: Any) -> Any:
        run = next(runs)
        index = reference.repeated(len(output["last_hidden_state"]), len(run.views))
        current[:] = [run, index]
        output["last_hidden_state"] = run.last[index]
        if output.get("hidden_states") is not None:
            noted = output["hidden_states"]
            behind = [None if s is None else run.hidden[i][index] for i, s in enumerate(noted[1:])]
            output["hidden_states"] = (noted[0], *behind)
        return output

    def project(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        run, index = current
        dropped = torch.tensor(run.groups[-1])[index] < 0
        return output.masked_fill(dropped[..., None], 0.0) if dropped.shape == output.shape[:2] else None

    def divide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if share is None or embeds is None or embeds.shape[:2] != share.shape:
            return None
        return args, {**kwargs, "inputs_embeds": embeds / share[..., None].to(embeds.dtype)}

    hooks = [
        tower_of(model).register_forward_hook(stand_in),
        projector_of(model).register_forward_hook(project),
        text_model(model).register_forward_pre_hook(divide, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
