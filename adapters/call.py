"""State of one forward through the text model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.adapters.expansion import Expansion, Key, Tables
from vlmprune.adapters.layout import PromptLayout
from vlmprune.adapters.tokens import LayerTokens
from vlmprune.core.randomness import item_seed
from vlmprune.core.report import Report
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Signal


@dataclass(eq=False)
class Prefill:
    """A forward whose prompt holds visual tokens.

    Everything per token is kept in the coordinates of the unpruned prompt, ``[B, L, ...]``.

    Attributes:
        layout, report: where the images stand; what is done with them.
        image_id: ``[B, L]`` image of a visual token in its row, -1 for text and padding.
        real: ``[B, L]`` bool, not padding.
        positions: incoming position ids ``[..., B, L]``.
        whole: all places of the prompt; ``tokens``: what the current layer works on.
        relative: ``[B, n]`` place of the current tokens, or of what attention is over, in the text model's sequence;
            None while they are the same.
        removed: ``[B, L]`` bool, dropped at a site with compact positions.
        visual: visual tokens left per row, known on the host.
        lengths: tokens per row that each decoder layer works on; ``attended``: that its attention is over.
        entered: tokens of each image of the layout as they entered the decoder; empty for those of the layout.
        fields: carried per-token values ``[B, L, ...]``.
        signals: text signals recorded so far, each with the tokens that it is over.
        stage: keyword arguments prepared for the current tokens, per type of layer.
        numbering: how often positions were closed up.
        virtual: ``[B, L]`` place of the token that stands at each place, None unless tokens are unmerged virtually;
            ``expansion``: the current tokens' places then, ``tables``: rotary tables of the prompt.
        deepstack: levels of features to add after the first layers.
        contents: what seeds the draw of each image of the layout; empty where no policy draws.
    """

    layout: PromptLayout
    report: Report
    image_id: Tensor
    real: Tensor
    positions: Tensor
    whole: LayerTokens
    tokens: LayerTokens
    removed: Tensor
    visual: list[int]
    lengths: list[int] = field(default_factory=list)
    attended: list[int] = field(default_factory=list)
    cache: PrunedDynamicCache | None = None
    relative: Tensor | None = None
    fields: dict[str, Tensor] = field(default_factory=dict)
    signals: dict[Signal, tuple[LayerTokens, Any]] = field(default_factory=dict)
    stage: dict[str, dict[str, Any]] = field(default_factory=dict)
    numbering: int = 0
    virtual: Tensor | None = None
    expansion: Expansion | None = None
    tables: dict[Key, Tables] = field(default_factory=dict)
    deepstack: int = 0
    contents: tuple[str, ...] = ()
    entered: tuple[int, ...] = ()

    @property
    def is_virtual(self) -> bool:
        """True if merged tokens stand at several places."""
        return self.virtual is not None

    @property
    def renumbered(self) -> bool:
        """Positions changed since the text model was given them."""
        return self.numbering > 0

    @property
    def seen(self) -> LayerTokens:
        """What the attention of the current layer is over: its tokens, or the places where these stand."""
        return self.tokens if self.expansion is None else self.expansion.places

    @property
    def text(self) -> list[int]:
        """Real text tokens per row."""
        visual = self.layout.visual_per_row()
        return [real - count for real, count in zip(self.layout.real, visual, strict=True)]

    def image_lengths(self, rows: list[int]) -> tuple[tuple[int, ...], ...]:
        """Per row of ``rows`` the tokens of each of its images as they entered the decoder."""
        images: dict[int, list[int]] = {row: [] for row in rows}
        for image, length in zip(self.layout.images, self.entered or self.layout.lengths, strict=True):
            images.get(image.sample, []).append(length)
        return tuple(tuple(images[row]) for row in rows)

    def image_seeds(self, seed: int) -> tuple[int, ...]:
        """Seed of every image."""
        images = self.layout.images
        return tuple(item_seed(seed, c, image.index) for c, image in zip(self.contents, images, strict=True))

    def row_seeds(self, seed: int, rows: list[int]) -> tuple[int, ...]:
        """Seed of every one of ``rows``, from all its images."""
        content: dict[int, list[str]] = {row: [] for row in rows}
        for image, text in zip(self.layout.images, self.contents, strict=True):
            content.get(image.sample, []).append(text)
        return tuple(item_seed(seed, "\x1f".join(content[row]), 0) for row in rows)

    def width(self) -> int:
        """Sequence length that holds every row's text and remaining visual tokens."""
        return max(text + visual for text, visual in zip(self.text, self.visual, strict=True))

    def numbered(self, tokens: LayerTokens) -> Tensor:
        """Position ids of ``tokens``: incoming ones less the removed tokens before each."""
        before = self.removed.long().cumsum(1) - self.removed.long()
        positions = self.positions - before
        return positions.gather(-1, tokens.index.expand(*positions.shape[:-1], -1))

    def close_up(self, dropped: Tensor) -> None:
        """Number positions as if the tokens ``dropped [B, L]`` had never been there, at none of their places."""
        self.removed = self.removed | (dropped if self.virtual is None else dropped.gather(1, self.virtual))
        self.numbering += 1

    def shift(self) -> Tensor:
        """``[B]`` what later positions are reduced by."""
        return self.removed.sum(1)

    def carry_in(self, rows: Tensor, place: Tensor) -> dict[str, Tensor]:
        """Carried values of the tokens at ``place [I, N]`` of rows ``[I]``."""
        return {name: values[rows[:, None], place] for name, values in self.fields.items()}

    def carry_out(self, selection: Selection, rows: Tensor, place: Tensor, carried: dict[str, Tensor]) -> None:
        """Re-index carried values by a selection over the tokens at ``place [I, N]`` of rows ``[I]``."""
        anchors = selection.anchors()
        target = place.gather(1, anchors.clamp_min(0))
        ok = anchors >= 0
        for name, values in {**carried, **selection.carry}.items():
            field_shape = (*self.image_id.shape, *values.shape[2:])
            if name not in self.fields:
                self.fields[name] = values.new_zeros(field_shape)
            row_index = rows[:, None].expand_as(target)
            how = replace(selection, mode="sum") if name == "sizes" and selection.group_id is not None else selection
            self.fields[name] = self.fields[name].index_put((row_index[ok], target[ok]), how.apply(values)[ok])


@dataclass(eq=False)
class Decode:
    """A forward on top of a pruned cache: decoded tokens, or a text-only turn.

    Attributes:
        cache: with the prompt's state.
        mask: 2-D mask over the unpruned sequence ``[B, total]``, or None.
        positions: incoming position ids ``[..., B, q]``.
        queries, total: new tokens, and length of the unpruned sequence with them.
        prepared: keyword arguments per run of layers that share tokens, and type of layer.
        mappings, tables: of merged tokens that stand at several places: token at each place per run of layers, and
            rotary tables of the sequence with the new tokens.
    """

    cache: PrunedDynamicCache
    mask: Tensor | None
    positions: Tensor
    queries: int
    total: int
    prepared: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    mappings: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[Key, Tables] = field(default_factory=dict)

    @property
    def is_virtual(self) -> bool:
        """True if stored tokens stand at several places."""
        return self.cache.prompt.virtual is not None

    def mapping(self, expansion: Expansion, stored: int, new: int) -> Tensor:
        """Token at each place, for a layer that holds ``stored`` prompt tokens and ``new`` ones behind them."""
        if id(expansion) not in self.mappings:
            self.mappings[id(expansion)] = expansion.with_new(stored, new)
        return self.mappings[id(expansion)]

    def all_tables(self, key: Key, new: Tables) -> Tables:
        """Rotary tables of the sequence, given those of this forward's tokens."""
        assert self.cache.prompt.virtual is not None
        if key not in self.tables:
            self.tables[key] = self.cache.prompt.virtual.extend(key, new, self.total - self.queries)
        return self.tables[key]

    def columns(self, tokens: LayerTokens) -> Tensor:
        """``[B, n + generated + q]`` places of a layer's keys in the unpruned sequence."""
        later = torch.arange(self.cache.prompt.length, self.total, device=tokens.index.device)
        return torch.cat([tokens.index, later.expand(tokens.index.shape[0], -1)], 1)

    def valid(self, tokens: LayerTokens) -> Tensor:
        """``[B, n + generated + q]`` bool: keys of a layer that are real tokens."""
        later = self.total - self.cache.prompt.length
        valid = torch.cat([tokens.valid, tokens.valid.new_ones(tokens.valid.shape[0], later)], 1)
        if self.mask is None:
            return valid
        return valid & (self.mask.gather(1, self.columns(tokens)) != 0)
