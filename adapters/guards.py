"""Calls that pruning cannot serve, refused before any work is done."""

from __future__ import annotations

import warnings
from typing import Any

from vlmprune.adapters import cache as caches
from vlmprune.adapters.family import Encoded, Family
from vlmprune.adapters.layout import PromptLayout
from vlmprune.core.errors import InputError, UnsupportedError

REFUSED_ATTENTION = ("flex_attention",)


def check_attention(family: Family) -> None:
    """Refuse attention implementations whose masks cannot be narrowed."""
    implementation = family.text_model.config._attn_implementation
    if implementation in REFUSED_ATTENTION:
        raise UnsupportedError(f"attn_implementation={implementation!r} is not supported; use 'sdpa' or 'eager'.")


def read_layout(
    family: Family, kwargs: dict[str, Any], active: bool, encoded: Encoded | None = None
) -> PromptLayout | None:
    """The images of a call, None for a call without images or on top of a filled cache.

    Args:
        active: something will be reduced, so the call must be one that pruning serves.
        encoded: encodings made before the call, which it brings.

    Raises:
        UnsupportedError: images on a filled cache, an unsuitable cache, or gradient checkpointing.
        InputError: placeholders and images do not fit together.
    """
    cache = kwargs.get("past_key_values")
    filled = cache is not None and cache.get_seq_length() > 0
    if not active:
        return None if filled else _whole_images(family, kwargs, encoded)
    if not filled:
        layout = family.layout(kwargs, encoded)
        if layout is not None:
            _check_prefill(family, cache, layout.length)
        return layout
    if family.brings_images(kwargs) or _misses_images(family, kwargs, cache):
        raise UnsupportedError(
            "Images arrived while the KV cache already holds tokens (a second image turn, or chunked prefill). "
            "Start again with a fresh cache and the whole conversation, without prefill_chunk_size."
        )
    return None


def warn_if_unseen(kwargs: dict[str, Any], warned: bool) -> bool:
    """Say once that a prompt given as embeddings shows no placeholder, so that images in it are not found.

    Returns:
        True if the warning was given, now or before.
    """
    cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
    filled = cache is not None and cache.get_seq_length() > 0
    if warned or filled or embeds is None or kwargs.get("input_ids") is not None:
        return warned
    warnings.warn(
        "inputs_embeds hold no image placeholder, so this prompt runs unpruned. If image features are merged into "
        "them already, give input_ids with pixel_values instead, or prune the text model with spans=.",
        stacklevel=2,
    )
    return True


def _whole_images(family: Family, kwargs: dict[str, Any], encoded: Encoded | None) -> PromptLayout | None:
    """The images of a call that nothing will change, for the report; None where they are not whole."""
    try:
        return family.layout(kwargs, encoded)
    except InputError:
        return None


def _misses_images(family: Family, kwargs: dict[str, Any], cache: Any) -> bool:
    """True if a turn has placeholders without images: whole ones, or parts before any image was seen (chunks).

    Single placeholders on a pruned cache are words: speculative decoding proposes them from the prompt.
    """
    new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    # A single new token is decoding; looking at it would stop the device at every step.
    if new is None or new.shape[1] == 1 or family.base is None:
        return False
    try:
        return family.layout(kwargs) is not None
    except InputError:
        return not isinstance(cache, caches.PrunedDynamicCache)


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
