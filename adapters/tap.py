"""Attention taps: read queries and keys of one attention module without changing its attention implementation.

A tapped module gets a shallow copy of its config whose attention implementation is a registered function. That
function hands queries, keys and mask to a recorder and then calls what the original config names at that moment, so
SDPA and flash attention stay on and masks (built from the model's own config) are not affected.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from vlmprune.adapters.hooks import HookStack
from vlmprune.core.errors import UnsupportedError

TAP = "vlmprune_tap"
FLASH_TAP = "vlmprune_flash_tap"
"""Towers that pack images branch on "flash" in the name: with it they make one call for all segments."""
_TAP = "_vlmprune_tap"

Attend = Callable[..., Any]
"""An attention function: ``attend(module, query, key, value, attention_mask, scaling=..., recorded=..., **kwargs)``;
recorders are told of ``recorded`` (queries, keys, mask) if it is given, else of what is attended."""


class Recorder(Protocol):
    """Takes what an attention module is about to multiply."""

    def record(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, options: dict[str, Any]
    ) -> None:
        """``query`` ``[B, H, Nq, d]`` and ``key`` ``[B, Hk, N, d]`` after rotary embedding and normalisation;
        ``options`` are the attention function's further keywords (segments of packed calls)."""
        ...


@dataclass
class Tap:
    """What hangs on a tapped module.

    Attributes:
        original: the module's own config.
        recorders: told before every product.
        compute: stands between the module and the attention function: ``compute(attend, module, query, key, value,
            attention_mask, scaling=..., **kwargs)`` calls ``attend``, changed as it likes; recorders see that call.
    """

    original: Any
    recorders: list[Recorder] = field(default_factory=list)
    compute: Callable[..., Any] | None = None


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
    tap: Tap = getattr(module.config, _TAP)
    if kwargs.get("cu_seq_lens_q") is not None and not is_flash(tap.original):
        raise UnsupportedError(
            "The attention implementation was changed from flash attention while a policy was applied; remove the "
            "policy, change it, and apply again."
        )
    if tap.compute is None:
        return _attend(tap, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    attend = partial(_attend, tap)
    return tap.compute(attend, module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _attend(
    tap: Tap,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    recorded: tuple[Tensor, Tensor, Tensor | None] | None = None,
    **kwargs: Any,
) -> Any:
    """Tell the recorders, then attend; ``recorded`` is what they are told instead of queries, keys and mask."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    for recorder in tap.recorders:
        recorder.record(module, *(recorded or (query, key, attention_mask)), scale, kwargs)
    attend = partial(original_attention(module, tap.original), module, query, key, value, attention_mask)
    if not is_flash(tap.original):
        return attend(scaling=scaling, **kwargs)
    ours, module.config = module.config, tap.original  # flash attention looks there for the package to call
    try:
        return attend(scaling=scaling, **kwargs)
    finally:
        module.config = ours


def original_attention(module: nn.Module, config: Any) -> Any:
    """The function that ``config``'s attention implementation names for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    if name in (None, "eager"):
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def original_config(module: nn.Module) -> Any:
    """The own config of a tapped module."""
    return getattr(module.config, _TAP).original


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
    """Let a recorder see what one attention module multiplies, until ``hooks`` is removed."""
    tapped(module, hooks).recorders.append(recorder)


def install_compute(module: nn.Module, compute: Callable[..., Any], hooks: HookStack) -> None:
    """Put ``compute`` (a bound method or a partial of one) between a module and its attention function.

    Raises:
        UnsupportedError: something else stands there already.
    """
    tap = tapped(module, hooks)
    if tap.compute is not None:
        raise UnsupportedError("Two policies want to change the attention of one layer; apply them one at a time.")
    tap.compute = compute


def tapped(module: nn.Module, hooks: HookStack) -> Tap:
    """The tap of an attention module, put there if it has none yet."""
    register_tap()
    original = module.config
    if _TAP in original.__dict__:
        return original.__dict__[_TAP]
    config = copy.copy(original)
    config.__dict__["_attn_implementation_internal"] = FLASH_TAP if is_flash(original) else TAP
    tap = config.__dict__[_TAP] = Tap(original)
    module.config = config
    hooks.on_remove(partial(_restore, module))
    return tap


def _restore(module: nn.Module) -> None:
    tap = module.config.__dict__.get(_TAP)
    if tap is not None:
        module.config = tap.original
