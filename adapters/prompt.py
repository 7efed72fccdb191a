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
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site
from vlmprune.kernels.gather import gather_tokens


def reduce_images(
    steps: tuple[Step, ...], call: Prefill, embeds: Tensor, info: ModelInfo, source: SignalSource
) -> tuple[Tensor, Tensor] | None:
    """Run the post-encoder steps.

    Returns:
        Embeddings with new features written in ``[B, L, D]`` and the tokens that stay ``[B, L]`` bool, or None where
        every token stays as it is.
    """
    layout = call.layout
    rows = torch.tensor(layout.samples, device=embeds.device)
    place, valid = layout.positions(embeds.device), layout.valid(embeds.device)
    lengths, views = layout.lengths, tuple(image.views for image in layout.images)
    features = embeds[rows[:, None], place]
    newlines = NewlineTokens.of(layout.images, embeds.device)
    history: list[Selection] = []
    for step in steps:
        carried = call.carry_in(rows, place)
        pinned = newlines.mask if newlines is not None and step.policy.newlines == "rows" else None
        context = Context(
            site=Site.POST_ENCODER,
            info=info,
            budget=step.policy.budget,
            lengths=lengths,
            valid=valid,
            features=features,
            signals=site_signals(
                step, features, partial(source.image_signal, features=features), partial(_again, history)
            ),
            views=views,
            newlines=tuple(image.shape.newlines for image in layout.images) if not history else (),
            pinned=pinned,
            sample=layout.samples,
            carry=carried,
            sizes=carried.get("sizes"),
            seeds=call.image_seeds(getattr(step.policy, "seed", 0)) if step.policy.is_random(info) else None,
            encoder_items=source.encoder_items,
            patch_valid=source.patch_valid(),
            to_tokens=partial(_to_tokens, source, history),
        )
        keep_newlines = newlines.keep_rows if newlines is not None and pinned is not None else None
        selection = run_step(step, context, call.report, keep_newlines)
        call.carry_out(selection, rows, place, carried)
        features = selection.apply(features, features=True)
        anchors = selection.anchors()
        new_place = place.gather(1, anchors.clamp_min(0))
        new_valid = anchors >= 0
        if step.request.positions == "compact":
            gone = scatter_true(call.removed.shape, rows, place, valid)
            call.close_up(gone & ~scatter_true(call.removed.shape, rows, new_place, new_valid))
        elif step.request.positions == "virtual" and selection.group_id is not None:
            virtual.merge(call, selection, rows, place, valid)
        place, valid, lengths = new_place, new_valid, selection.out_counts()
        history.append(selection)
        newlines = None if newlines is None else newlines.after(selection)
        views = ((),) * len(lengths) if newlines is None else newlines.cells(lengths)
    call.entered = lengths
    if lengths == layout.lengths and all(selection.is_pruning for selection in history):
        return None
    call.visual = [0] * layout.rows
    for row, count in zip(layout.samples, lengths, strict=True):
        call.visual[row] += count
    if not all(selection.is_pruning for selection in history):
        embeds = write_tokens(embeds, rows, place, valid, features)
    text = call.real & (call.image_id < 0)
    return embeds, text | scatter_true(text.shape, rows, place, valid)


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
