"""Calls that pruning cannot serve, refused before any work is done."""

from __future__ import annotations

from typing import Any

from vlmprune.adapters import cache as caches
from vlmprune.adapters.family import Family
from vlmprune.adapters.layout import PromptLayout
from vlmprune.core.errors import InputError, UnsupportedError

REFUSED_ATTENTION = ("flex_attention",)


def check_attention(family: Family) -> None:
    """Refuse attention implementations whose masks cannot be narrowed."""
    implementation = family.text_model.config._attn_implementation
    if implementation in REFUSED_ATTENTION:
        raise UnsupportedError(f"attn_implementation={implementation!r} is not supported; use 'sdpa' or 'eager'.")


def read_layout(family: Family, kwargs: dict[str, Any], active: bool) -> PromptLayout | None:
    """The images of a call, None for a call without images or on top of a filled cache.

    Args:
        active: something will be reduced, so the call must be one that pruning serves.

    Raises:
        UnsupportedError: images on a filled cache, an unsuitable cache, or gradient checkpointing.
        InputError: placeholders and images do not fit together.
    """
    cache = kwargs.get("past_key_values")
    if cache is None or cache.get_seq_length() == 0:
        layout = family.layout(kwargs)
        if layout is not None and active:
            _check_prefill(family, cache, layout.length)
        return layout
    if not isinstance(cache, caches.PrunedDynamicCache) and not family.brings_images(kwargs):
        return None
    new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    # A single new token is decoding; looking at it would stop the device at every step.
    turn = new is not None and new.shape[1] > 1 and family.base is not None
    if family.brings_images(kwargs) or (turn and _has_placeholders(family, kwargs)):
        raise UnsupportedError(
            "Images arrived while the KV cache already holds tokens (a second image turn, or chunked prefill). "
            "Start again with a fresh cache and the whole conversation, without prefill_chunk_size."
        )
    return None


def _has_placeholders(family: Family, kwargs: dict[str, Any]) -> bool:
    try:
        return family.layout(kwargs) is not None
    except InputError:  # a part of an image's placeholders
        return True


def refuse_dense_on_pruned(kwargs: dict[str, Any]) -> None:
    """Refuse a dense forward on a cache from which tokens are missing."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, caches.PrunedDynamicCache) and cache.holds_prompt:
        raise UnsupportedError(caches.PRUNED)


def sliding_window(family: Family) -> int | None:
    """The decoder's sliding attention window, None without one."""
    config = family.text_model.config
    types = getattr(config, "layer_types", None)
    if types is not None and not any("sliding" in kind for kind in types):
        return None
    return getattr(config, "sliding_window", None)


def _check_prefill(family: Family, cache: Any, length: int) -> None:
    caches.check_cache(cache)
    caches.check_window(sliding_window(family), length)
    text = family.text_model
    if text.training and any(getattr(module, "gradient_checkpointing", False) for module in text.modules()):
        raise UnsupportedError(
            "Gradient checkpointing re-runs layers without the prompt's state; call "
            "model.gradient_checkpointing_disable() or run inside handle.disabled()."
        )
