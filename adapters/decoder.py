"""Cutting the sequence between decoder layers (site ``decoder_layer``), and what later layers then receive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters import masks, virtual
from vlmprune.adapters.call import Decode, Prefill
from vlmprune.adapters.expansion import table_rows
from vlmprune.adapters.family import Family
from vlmprune.adapters.prompt import packed_tokens, scatter_true, write_tokens
from vlmprune.adapters.sites import Step, run_step, site_signals
from vlmprune.adapters.tokens import LayerTokens, places_of
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.transition import Transition
from vlmprune.kernels.gather import gather_tokens, pack_indices

Seeds = Callable[[Any, list[int]], tuple[int, ...] | None]


def visual_places(call: Prefill, tokens: LayerTokens) -> tuple[Tensor, Tensor, list[int]]:
    """Rows ``[I]`` with visual tokens left, places ``[I, V]`` of these in the current sequence (-1 fill), and the rows
    as a list."""
    rows = [row for row, count in enumerate(call.visual) if count]
    index = torch.tensor(rows, device=tokens.index.device)
    visual = (call.image_id.gather(1, tokens.index) >= 0) & tokens.valid
    places, valid = pack_indices(visual[index], width=max(call.visual))
    return index, torch.where(valid, places, -1), rows


def build_context(
    step: Step, call: Prefill, hidden: Tensor | None, info: ModelInfo, norm: nn.Module | None, seeds: Seeds
) -> tuple[Context, Tensor, Tensor]:
    """The context of a step over the visual tokens of each row, with rows ``[I]`` and places ``[I, V]``."""
    tokens = call.tokens
    rows, places, row_list = visual_places(call, tokens)
    valid = places >= 0
    safe = places.clamp_min(0)
    original = tokens.index[rows].gather(1, safe)
    features = None if hidden is None else hidden[rows[:, None], safe]

    def give(signal: s.Signal) -> Any:
        if isinstance(signal, s.FinalNorm):
            return norm
        if isinstance(signal, s.Hidden) and signal.when == "in" and signal.layer == step.request.layer:
            return features
        if signal not in call.signals:
            raise SignalError(f"{signal} was not recorded before layer {step.request.layer}.")
        recorded, value = call.signals[signal]
        if isinstance(signal, (s.AttentionRows, s.ProbeAttention)):
            return _columns(value[rows], recorded.rows(rows), original, valid)
        if isinstance(signal, s.ModuleTransition):
            there = recorded.rows(rows)
            ratio, cosine = (part[rows] for part in value)
            return Transition(ratio, cosine, there.valid, places_of(original, there))
        if isinstance(signal, s.ColumnMass):
            return _columns(value[rows, None], recorded.rows(rows), original, valid)[:, 0]
        return value[rows]

    carried = call.carry_in(rows, original)
    position = (tokens.valid.long().cumsum(1) - 1)[rows].gather(1, safe)
    context = Context(
        site=step.request.site,
        layer=step.request.layer,
        info=info,
        budget=step.policy.budget,
        lengths=tuple(call.visual[row] for row in row_list),
        valid=valid,
        features=features,
        signals=site_signals(step, features if features is not None else valid, give, _unchanged),
        image_id=torch.where(valid, call.image_id[rows].gather(1, original), -1),
        position=torch.where(valid, position, -1),
        image_lengths=call.image_lengths(row_list),
        sample=tuple(row_list),
        carry=carried,
        sizes=carried.get("sizes"),
        seeds=seeds(step.policy, row_list),
    )
    return context, rows, places


def _columns(values: Tensor, recorded: LayerTokens, original: Tensor, valid: Tensor) -> Tensor:
    """Columns of ``values [I, R, n]`` over the ``recorded`` tokens for the tokens ``original [I, V]``; zeros
    where a token was not there yet or is not ``valid``."""
    place = places_of(original, recorded)
    there = valid & (recorded.index.gather(1, place) == original)
    return values.gather(2, place[:, None].expand(-1, values.shape[1], -1)) * there[:, None]


def _unchanged(value: Any) -> Any:
    return value


def cut(step: Step, call: Prefill, hidden: Tensor, info: ModelInfo, norm: nn.Module | None, seeds: Seeds) -> Tensor:
    """Run one step before a layer: the shorter hidden states; sets the call's tokens."""
    if not any(call.visual):
        return hidden
    context, rows, places = build_context(step, call, hidden, info, norm, seeds)
    selection = run_step(step, context, call.report.sites)
    hidden, local = apply_cut(step, call, selection, hidden, rows, places, context)
    if local is not None:
        if not call.is_virtual:
            call.relative = local if call.relative is None else call.relative.gather(1, local)
        call.stage = {}
    return hidden


def apply_cut(
    step: Step, call: Prefill, selection: Selection, hidden: Tensor, rows: Tensor, places: Tensor, context: Context
) -> tuple[Tensor, Tensor | None]:
    """Hidden states of the survivors and their places ``[B, n]`` in the sequence before; None where all stayed."""
    counts = selection.out_counts()
    tokens = call.tokens
    original = tokens.index[rows].gather(1, places.clamp_min(0))
    call.carry_out(selection, rows, original, dict(context.carry))
    if counts == context.lengths and selection.is_pruning:
        return hidden, None
    anchors = selection.anchors()
    stay = anchors >= 0
    new_places = places.gather(1, anchors.clamp_min(0))
    if not selection.is_pruning:
        assert context.features is not None
        merged = selection.apply(context.features, features=True)
        hidden = write_tokens(hidden, rows, new_places, stay, merged)
    shape = call.image_id.shape
    before = scatter_true(shape, rows, original, context.valid)
    after = scatter_true(shape, rows, original.gather(1, anchors.clamp_min(0)), stay)
    if step.request.positions == "compact":
        call.close_up(before & ~after)
    for row, count in zip(context.sample, counts, strict=True):
        call.visual[row] = count
    all_rows = torch.arange(shape[0], device=hidden.device)
    present = scatter_true(shape, all_rows, tokens.index, tokens.valid)
    call.tokens = packed_tokens(call, present & ~(before & ~after))
    local = places_of(call.tokens.index, tokens)
    if call.is_virtual:
        virtual.spread(call)
    return gather_tokens(hidden, local), local


def prefill_kwargs(
    call: Prefill, layer: int, kwargs: dict[str, Any], hidden: Tensor, family: Family, form: masks.MaskForm
) -> dict[str, Any]:
    """Keyword arguments of a layer after a cut; prepared once per run of layers of one type with equal tokens."""
    kind = family.layer_type(layer)
    if kind not in call.stage:
        tokens, relative = call.seen, call.relative
        assert relative is not None
        mask = kwargs.get("attention_mask")
        if mask is None and not tokens.full:
            mask = masks.causal(tokens.valid, tokens.length, form, hidden.dtype)
        else:
            mask = masks.gather_square(mask, relative, tokens.valid, tokens.full)
        positions = call.numbered(tokens)
        stage: dict[str, Any] = {"attention_mask": mask}
        given = kwargs.get("position_ids")
        if given is not None:
            stage["position_ids"] = positions if given.ndim == positions.ndim else positions[0]
        turned = call.numbered(call.whole) if call.is_virtual else positions  # attention takes the places' tables
        for name, value in kwargs.items():
            if name.startswith("position_embeddings") and value is not None:
                if call.renumbered:
                    stage[name] = family.rotary(name, hidden, turned, layer)
                elif not call.is_virtual:
                    stage[name] = tuple(table_rows(part, relative) for part in value)
        if kwargs.get("cache_position") is not None:
            stage["cache_position"] = torch.arange(tokens.length, device=hidden.device)
        call.stage[kind] = stage
    return {**kwargs, **call.stage[kind]}


def decode_kwargs(
    call: Decode, layer: int, kwargs: dict[str, Any], hidden: Tensor, family: Family, form: masks.MaskForm
) -> dict[str, Any]:
    """Keyword arguments of a layer whose stored prompt differs from layer 0's."""
    prompt = call.cache.prompt
    tokens = prompt.seen(layer)
    if prompt.as_given(layer):
        return kwargs
    key = (id(tokens), family.layer_type(layer))
    prepared = call.prepared.get(key)
    if prepared is None:
        prepared = {"attention_mask": _decode_mask(call, tokens, kwargs.get("attention_mask"), hidden, form)}
        if tokens.shift is not None:
            positions = call.positions - tokens.shift[:, None]
            prepared["position_ids"] = positions
            for name, value in kwargs.items():
                if name.startswith("position_embeddings") and value is not None:
                    prepared[name] = family.rotary(name, hidden, positions, layer)
        if kwargs.get("cache_position") is not None:
            drop = prompt.given.length - tokens.length
            prepared["cache_position"] = kwargs["cache_position"] - drop
        call.prepared[key] = prepared
    return {**kwargs, **prepared}


def _decode_mask(
    call: Decode, tokens: LayerTokens, mask: Tensor | None, hidden: Tensor, form: masks.MaskForm
) -> Tensor | None:
    if mask is None and call.queries == 1 and tokens.full:
        return None
    return masks.causal(call.valid(tokens), call.queries, form, hidden.dtype)


def evict(step: Step, call: Prefill, info: ModelInfo, seeds: Seeds) -> None:
    """Drop stored visual tokens of one layer after the prefill (site ``kv_cache``)."""
    assert call.cache is not None and step.request.layer is not None
    layer = step.request.layer
    current, expansion = call.tokens, call.expansion
    call.tokens = stored = call.cache.prompt.layers[layer]
    counted = list(call.visual)
    visual = (call.image_id.gather(1, stored.index) >= 0) & stored.valid
    call.visual = visual.sum(1).tolist()
    if any(call.visual):
        context, rows, places = build_context(step, call, None, info, None, seeds)
        selection = run_step(step, context, call.report.sites)
        if selection.out_counts() != context.lengths:
            keys = call.cache.layers[layer].keys
            _, local = apply_cut(step, call, selection, keys[:, 0], rows, places, context)
            assert local is not None
            call.cache.hold(layer, local, call.tokens, call.expansion)
    call.tokens, call.visual, call.expansion = current, counted, expansion
