"""Virtual unmerging: in the decoder's attention a merged token stands at the places of all tokens that went into it.

Source: DyMU (arXiv 2504.17040). Between the attentions the decoder works on merged tokens, and the KV cache holds their
keys and values without rotary embedding. Inside each attention queries, keys and values are repeated for every place,
turned by the model's own function with that place's rotary tables, multiplied by the model's own attention under the
mask that it made for the unmerged prompt, and averaged back over the places of each token. The text model itself is
given the prompt at full length, so masks and tables are those of the dense model; its first layer takes the merged
tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters import tap
from vlmprune.adapters.call import Decode, Prefill
from vlmprune.adapters.expansion import Expansion, Tables
from vlmprune.adapters.family import Family
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.tokens import pack, places_of
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.selection import Selection
from vlmprune.kernels.virtual_attention import expand, fold_mean

ROTATED_LAST = frozenset(
    {
        "LlamaAttention",
        "MistralAttention",
        "Qwen2Attention",
        "Qwen3Attention",
        "Qwen2VLAttention",
        "Qwen2_5_VLAttention",
        "Qwen3VLTextAttention",
        "GemmaAttention",
        "Gemma2Attention",
        "Gemma3Attention",
    }
)
"""Attention modules that turn all of q and k by the rotary tables, as their last step before cache and attention."""


def merge(call: Prefill, selection: Selection, rows: Tensor, place: Tensor, valid: Tensor) -> None:
    """Let the members of each group of a merging selection stand behind that group's token from now on; one that only
    drops tokens changes nothing.

    Args:
        call: the prefill, before its first decoder layer.
        selection: of the tokens at the ``valid`` ones of ``place [I, N]`` in rows ``[I]``.

    Raises:
        InputError: it makes new tokens otherwise.
    """
    if selection.is_pruning:
        return
    if selection.group_id is None:
        raise InputError(
            "The policy made new tokens, of which it is not known at which places they stand, but asks for virtual "
            "positions; give 'keep' or 'compact', or a policy that merges groups of tokens."
        )
    anchors = place.gather(1, selection.anchors().clamp_min(0))  # [I, M]
    target = anchors.gather(1, selection.group_id.clamp_min(0))  # [I, N]
    batch, length = call.real.shape
    stands = torch.arange(length, device=place.device).repeat(batch)
    flat = torch.cat([stands, stands[:1]])  # the last entry takes what is in no group
    index = torch.where(valid & (selection.group_id >= 0), rows[:, None] * length + place, batch * length)
    flat[index.flatten()] = target.flatten()
    stands = flat[:-1].view(batch, length)
    call.virtual = stands if call.virtual is None else stands.gather(1, call.virtual)


def spread(call: Prefill) -> None:
    """Find the places of the call's current tokens; looks at the device once."""
    assert call.virtual is not None
    tokens = call.tokens
    at = places_of(call.virtual, tokens)
    there = call.real & tokens.valid.gather(1, at) & (tokens.index.gather(1, at) == call.virtual)
    counts = there.sum(1).tolist()
    shift = call.shift() if call.renumbered else None
    mapping = torch.where(there, at, -1)
    whole = counts == list(call.layout.real)
    if whole:
        places = replace(call.whole, shift=shift)
    else:
        places = pack(there, max(counts), min(counts) == max(counts), shift)
        mapping = torch.where(places.valid, mapping.gather(1, places.index), -1)
    call.expansion = Expansion(places, mapping, whole, call.numbering)
    call.relative = None if whole else places.index


class VirtualAttention:
    """Stands between one decoder layer's attention module and its attention function.

    Args:
        layer: the layer.
        kind: its type; layers of one type share rotary tables.
        current: gives the forward under way, None outside one.
    """

    def __init__(self, layer: int, kind: str, current: Callable[[], Prefill | Decode | None]) -> None:
        self._layer = layer
        self._kind = kind
        self._current = current
        self._tables: Tables | None = None

    def install(self, module: nn.Module, hooks: HookStack) -> None:
        """Take the module's rotary tables from it, and its attention."""
        hooks.before(module, self._enter)
        tap.install_compute(module, self.attend, hooks)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tables that turn nothing, so that queries and keys arrive (and keys are stored) as they are."""
        call, self._tables = self._current(), None
        if call is None or not call.is_virtual:
            return None
        tables = self._tables = tuple(kwargs["position_embeddings"])
        hidden = args[0] if args else kwargs["hidden_states"]
        cos, sin = (part[..., :1, :].expand(*part.shape[:-2], hidden.shape[1], part.shape[-1]) for part in tables)
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    def attend(
        self,
        attend: tap.Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """The attention of tapped modules: over places while a call is virtual, else as it was."""
        call, tables = self._current(), self._tables
        if tables is None or call is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        run = partial(attend, module, attention_mask=attention_mask, **kwargs)
        if isinstance(call, Prefill):
            return self._over_prompt(call, module, run, query, key, value, tables)
        return self._over_cache(call, module, run, query, key, value, tables)

    def _over_prompt(
        self, call: Prefill, module: nn.Module, run: Any, query: Tensor, key: Tensor, value: Tensor, tables: Tables
    ) -> Any:
        expansion = call.expansion
        assert expansion is not None
        call.tables.setdefault((self._kind, expansion.numbering), tables)
        mapping = expansion.mapping.to(query.device)
        turned = rotate(module, expand(query, mapping), expand(key, mapping), expansion.tables(tables))
        output, *rest = run(*turned, expand(value, mapping))
        return fold_mean(output, mapping, query.shape[2], dim=1), *rest

    def _over_cache(
        self, call: Decode, module: nn.Module, run: Any, query: Tensor, key: Tensor, value: Tensor, tables: Tables
    ) -> Any:
        prompt = call.cache.prompt
        assert prompt.virtual is not None
        expansion = prompt.virtual.layers[self._layer]
        stored = prompt.layers[self._layer].length
        mapping = call.mapping(expansion, stored, key.shape[2] - stored).to(key.device)
        of_keys = expansion.tables(
            call.all_tables((self._kind, expansion.numbering), tables), call.total - prompt.length
        )
        query, _ = rotate(module, query, query[:, :1], tables)
        _, key = rotate(module, key[:, :1, :1], expand(key, mapping), of_keys)
        return run(query, key, expand(value, mapping))


def rotate(module: nn.Module, query: Tensor, key: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H, T, d]`` turned by the module's own rotary function."""
    file = sys.modules[type(module).__module__]
    many = getattr(file, "apply_multimodal_rotary_pos_emb", None)
    if many is not None:  # transformers 4 gives Qwen2-VL and Qwen2.5-VL one table per axis
        return many(query, key, *tables, module.rope_scaling["mrope_section"])
    return file.apply_rotary_pos_emb(query, key, *tables)


def install(family: Family, current: Callable[[], Prefill | Decode | None], hooks: HookStack) -> None:
    """Let every decoder layer attend over places in calls that merge tokens virtually, until ``hooks`` is removed.

    Raises:
        UnsupportedError: an attention module of which it is not known that rotary embedding is its last step.
    """
    for layer in range(len(family.decoder_layers())):
        module = family.text_attention(layer)
        name = type(module).__name__
        if name not in ROTATED_LAST:
            raise UnsupportedError(
                f"Virtual unmerging needs un-rotated keys, which are not known to be had from {name}; merge without "
                f"it (other positions), or use a decoder with one of {', '.join(sorted(ROTATED_LAST))}."
            )
        VirtualAttention(layer, family.layer_type(layer), current).install(module, hooks)
