"""Shortening the prompt before the text model (site ``post_encoder``)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters import masks, virtual
from vlmprune.adapters.call import Prefill
from vlmprune.adapters.newlines import NewlineTokens
from vlmprune.adapters.sites import Step, run_step, site_signals
from vlmprune.adapters.source import SignalSource
from vlmprune.adapters.tokens import LayerTokens, pack
from vlmprune.adapters.tower_lineage import lineage, tower_record
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Positions, Site
from vlmprune.kernels.gather import gather_tokens


def reduce_images(
    steps: tuple[Step, ...], call: Prefill, embeds: Tensor, info: ModelInfo, source: SignalSource
) -> tuple[Tensor, Tensor] | None:
    """Take over what was reduced inside the tower, and run the post-encoder steps.

    Returns:
        Embeddings with new features written in ``[B, L, D]`` and the tokens that stay ``[B, L]`` bool, or None where
        every token stays as it is.
    """
    tokens = _ImageTokens(call, embeds)
    _take_tower(tokens, call, info, source)
    for step in steps:
        _run(step, tokens, call, info, source)
    return tokens.finish(embeds)


class _ImageTokens:
    """The visual tokens of the images while they are reduced.

    Attributes:
        rows: ``[I]`` row of each image. place, valid: ``[I, N]`` where the tokens stand, and which are no padding.
        lengths, views: tokens per image, and their grids. features: ``[I, N, D]``.
        newlines: those among them, None for none.
        history: the selections so far.
        written: features changed, so that they must be written back.
    """

    def __init__(self, call: Prefill, embeds: Tensor) -> None:
        layout = call.layout
        self._call = call
        self.rows = torch.tensor(layout.samples, device=embeds.device)
        self.place, self.valid = layout.positions(embeds.device), layout.valid(embeds.device)
        self.lengths: tuple[int, ...] = layout.lengths
        self.views = tuple(image.views for image in layout.images)
        self.features = embeds[self.rows[:, None], self.place]
        self.newlines = NewlineTokens.of(layout.images, embeds.device)
        self.history: list[Selection] = []
        self.written = False

    def carried(self) -> dict[str, Tensor]:
        """Carried values of the tokens."""
        return self._call.carry_in(self.rows, self.place)

    def take(self, selection: Selection, positions: Positions, carried: dict[str, Tensor], equal: bool = False) -> None:
        """Follow a selection; ``equal``: the members of a group have one and the same feature already."""
        call = self._call
        call.carry_out(selection, self.rows, self.place, carried)
        anchors = selection.anchors()
        if equal:
            self.features = gather_tokens(self.features, anchors)
        else:
            self.features = selection.apply(self.features, features=True)
            self.written |= not selection.is_pruning
        place, valid = self.place.gather(1, anchors.clamp_min(0)), anchors >= 0
        if positions == "compact":
            gone = scatter_true(call.removed.shape, self.rows, self.place, self.valid)
            call.close_up(gone & ~scatter_true(call.removed.shape, self.rows, place, valid))
        elif positions == "virtual":
            virtual.merge(call, selection, self.rows, self.place, self.valid)
        self.place, self.valid, self.lengths = place, valid, selection.out_counts()
        self.history.append(selection)
        self.newlines = None if self.newlines is None else self.newlines.after(selection)
        self.views = ((),) * len(self.lengths) if self.newlines is None else self.newlines.cells(self.lengths)

    def make_up(self, share: Tensor) -> None:
        """Make features, of which only the ``share [I, N]`` that the tower left is in them, means of what is left."""
        self.features = self.features / share[..., None].to(self.features.dtype)
        self.written = True

    def finish(self, embeds: Tensor) -> tuple[Tensor, Tensor] | None:
        """Write the outcome into the call; what :func:`reduce_images` returns."""
        call = self._call
        call.entered = self.lengths
        if self.lengths == call.layout.lengths and not self.written and not call.is_virtual:
            return None
        call.visual = [0] * call.layout.rows
        for row, count in zip(call.layout.samples, self.lengths, strict=True):
            call.visual[row] += count
        if self.written:
            embeds = write_tokens(embeds, self.rows, self.place, self.valid, self.features)
        text = call.real & (call.image_id < 0)
        return embeds, text | scatter_true(text.shape, self.rows, self.place, self.valid)


def _take_tower(tokens: _ImageTokens, call: Prefill, info: ModelInfo, source: SignalSource) -> None:
    """Start from the tokens that the tower left."""
    tower = source.tower()
    if tower is None:
        return
    unmerged = tower.positions == "virtual"
    newline = None if tokens.newlines is None else tokens.newlines.mask
    selection, share = lineage(tower.groups, source.to_tokens, tokens.valid, newline, separate=unmerged)
    if tokens.newlines is not None and not unmerged:
        selection = tokens.newlines.keep_rows(selection)
    report = call.report
    report.take_tower(tower.records, tower.attended, tower.passed)
    report.tower_flops, report.tower_flops_dense = tower.flops(info)
    report.sites.append(tower_record(tower.records, selection, call.layout.samples, tokens.lengths, tower.positions))
    if share is not None:
        tokens.make_up(share)
    tokens.take(selection, tower.positions, tokens.carried(), equal=True)


def _run(step: Step, tokens: _ImageTokens, call: Prefill, info: ModelInfo, source: SignalSource) -> None:
    """Run one post-encoder step."""
    newlines = tokens.newlines
    carried = tokens.carried()
    pinned = newlines.mask if newlines is not None and step.policy.newlines == "rows" else None
    give = partial(source.image_signal, features=tokens.features)
    context = Context(
        site=Site.POST_ENCODER,
        info=info,
        budget=step.policy.budget,
        lengths=tokens.lengths,
        valid=tokens.valid,
        features=tokens.features,
        signals=site_signals(step, tokens.features, give, partial(_again, tokens.history)),
        views=tokens.views,
        newlines=tuple(image.shape.newlines for image in call.layout.images) if not tokens.history else (),
        pinned=pinned,
        sample=call.layout.samples,
        carry=carried,
        sizes=carried.get("sizes"),
        seeds=call.image_seeds(getattr(step.policy, "seed", 0)) if step.policy.is_random(info) else None,
        encoder_items=source.encoder_items,
        patch_valid=source.patch_valid(),
        to_tokens=partial(_to_tokens, source, tokens.history),
    )
    keep_newlines = newlines.keep_rows if newlines is not None and pinned is not None else None
    selection = run_step(step, context, call.report.sites, keep_newlines)
    tokens.take(selection, step.request.positions, carried)


def _again(history: list[Selection], value: Tensor) -> Tensor:
    """Per-token values re-indexed by the selections made so far."""
    for selection in history:
        value = selection.apply(value)
    return value


def _to_tokens(source: SignalSource, history: list[Selection], values: Tensor, newline: float = 0.0) -> Tensor:
    """Per-patch values as values of the tokens that earlier selections left."""
    return _again(history, source.to_tokens(values, newline))


def write_tokens(target: Tensor, rows: Tensor, place: Tensor, valid: Tensor, values: Tensor) -> Tensor:
    """``target [B, L, D]`` with ``values [I, N, D]`` written at the valid ``place [I, N]`` of rows ``[I]``."""
    batch, length, width = target.shape
    flat = torch.cat([target.reshape(-1, width), target.new_zeros(1, width)])
    index = torch.where(valid, rows[:, None] * length + place, batch * length).flatten()
    flat = flat.index_copy(0, index, values.reshape(-1, width).to(target.dtype))
    return flat[:-1].view(batch, length, width)


def scatter_true(shape: tuple[int, ...], rows: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """``[B, L]`` bool, True at the valid ``place [I, N]`` of rows ``[I]``."""
    flat = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=place.device)
    index = torch.where(valid, rows[:, None] * shape[1] + place, shape[0] * shape[1])
    flat[index.flatten()] = True
    return flat[:-1].view(shape)


def packed_tokens(call: Prefill, keep: Tensor) -> LayerTokens:
    """Tokens ``keep [B, L]`` moved together, fillers on the left."""
    width = call.width()
    full = all(text + visual == width for text, visual in zip(call.text, call.visual, strict=True))
    return pack(keep, width, full, call.shift() if call.renumbered else None)


def shorten(
    kwargs: Mapping[str, Any], call: Prefill, embeds: Tensor, keep: Tensor, form: masks.MaskForm
) -> dict[str, Any]:
    """Keyword arguments of the text model for the shorter prompt; sets the call's tokens."""
    tokens = packed_tokens(call, keep)
    call.tokens = tokens
    mask = kwargs.get("attention_mask")
    shorter = masks.gather_masks(mask, tokens.index, tokens.valid, tokens.full, form, embeds.dtype)
    if shorter is None and kwargs.get("past_key_values") is None:
        shorter = tokens.valid.long()  # without a mask, gaps in the positions would be read as packed sequences
    changed = {
        **kwargs,
        "inputs_embeds": gather_tokens(embeds, tokens.index),
        "input_ids": None,
        "position_ids": call.numbered(tokens),
        "attention_mask": shorter,
    }
    if kwargs.get("cache_position") is not None:
        changed["cache_position"] = torch.arange(tokens.length, device=embeds.device)
    return changed


def stay_long(kwargs: Mapping[str, Any], call: Prefill, embeds: Tensor, keep: Tensor) -> dict[str, Any]:
    """Keyword arguments of the text model for merged tokens that stand at several places: the prompt at full length,
    of which the first layer takes the tokens to ``keep``; sets the call's tokens."""
    call.tokens = packed_tokens(call, keep)
    virtual.spread(call)
    return {**kwargs, "inputs_embeds": embeds, "input_ids": None}
