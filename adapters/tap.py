"""Attention taps: read queries and keys of one attention module without changing its attention implementation.

A tapped module gets a shallow copy of its config whose attention implementation is a registered function. That
function hands queries, keys and mask to a recorder and then calls what the original config names at that moment, so
SDPA and flash attention stay on and masks (built from the model's own config) are not affected.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from vlmprune.adapters.hooks import HookStack
from vlmprune.core.errors import UnsupportedError

TAP = "vlmprune_tap"
FLASH_TAP = "vlmprune_flash_tap"
"""Towers that pack images branch on "flash" in the name: with it they make one call for all segments."""
_ORIGINAL = "_vlmprune_original_config"
_RECORDER = "_vlmprune_recorder"


class Recorder(Protocol):
    """Takes what an attention module is about to multiply."""

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, options: dict[str, Any]
    ) -> None:
        """``query`` ``[B, H, Nq, d]`` and ``key`` ``[B, Hk, N, d]`` after rotary embedding and normalisation;
        ``options`` are the attention function's further keywords (segments of packed calls)."""
        ...


def tap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """The attention function of tapped modules: record, then attend as the original config says."""
    config = module.config
    if kwargs.get("cu_seq_lens_q") is not None and not is_flash(getattr(config, _ORIGINAL)):
        raise UnsupportedError(
            "The attention implementation was changed from flash attention while a policy was applied; remove the "
            "policy, change it, and apply again."
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    getattr(config, _RECORDER).record(module, query, key, attention_mask, scale, kwargs)
    attend = original_attention(module, getattr(config, _ORIGINAL))
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def original_attention(module: nn.Module, config: Any) -> Any:
    """The function that ``config``'s attention implementation names for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    if name in (None, "eager"):
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def is_flash(config: Any) -> bool:
    """True if a config asks for flash attention of any kind."""
    return "flash" in (config._attn_implementation or "")


def register_tap() -> None:
    """File :func:`tap_attention` in transformers' table under its two names; the only process-wide act, idempotent."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in (TAP, FLASH_TAP):
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, tap_attention)


def install(module: nn.Module, recorder: Recorder, hooks: HookStack) -> None:
    """Tap one attention module until ``hooks`` is removed."""
    register_tap()
    original = module.config
    config = copy.copy(original)
    config.__dict__["_attn_implementation_internal"] = FLASH_TAP if is_flash(original) else TAP
    config.__dict__[_ORIGINAL] = original
    config.__dict__[_RECORDER] = recorder
    module.config = config
    hooks.on_remove(partial(_restore, module))


def _restore(module: nn.Module) -> None:
    module.config = module.config.__dict__.get(_ORIGINAL, module.config)
