"""What attention and MLP do to each token of a decoder layer: norm ratio and cosine of their input and output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.call import Prefill
from vlmprune.adapters.family import find_module
from vlmprune.adapters.hooks import HookStack
from vlmprune.core.signals import ModuleTransition
from vlmprune.kernels.precision import compute_dtype

EPS = 1e-8


class TransitionRecorder:
    """Records one ``ModuleTransition`` of every prefill."""

    def __init__(self, signal: ModuleTransition, current: Callable[[], Prefill | None]) -> None:
        self._signal = signal
        self._current = current
        self._input: Tensor | None = None

    def install(self, layer: nn.Module, hooks: HookStack) -> None:
        """Hook the module of a decoder layer, and the norm behind it if there is one."""
        module = find_module(layer, (("self_attn",) if self._signal.module == "attn" else ("mlp",)), "module")
        leave = norm_behind(layer, self._signal.module)
        if leave is None:
            hooks.after(module, self._around)
        else:
            hooks.before(module, self._enter)
            hooks.after(leave, self._leave)

    def _around(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._enter(module, args, kwargs)
        self._leave(module, args, kwargs, output)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._current() is not None:
            self._input = (args[0] if args else kwargs["hidden_states"]).detach()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, before, self._input = self._current(), self._input, None
        if call is not None and before is not None:
            after = output[0] if isinstance(output, tuple) else output
            call.signals[self._signal] = (call.tokens, transition(before, after.detach()))


def norm_behind(layer: nn.Module, module: str) -> nn.Module | None:
    """The norm between a module and its residual add, in layers that have one (Gemma 2 and 3).

    There ``post_attention_layernorm`` stands behind the attention; elsewhere it is the norm before the MLP.
    """
    last = getattr(layer, "post_feedforward_layernorm", None)
    if last is None:
        return None
    return layer.post_attention_layernorm if module == "attn" else last


@torch.no_grad()
def transition(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """``||after|| / ||before||`` and the cosine between them, each ``[B, L]`` in float32 (float64 for float64).

    Args:
        before, after: ``[B, L, D]``, what enters a module (behind its norm) and what it adds to the residual stream.
    """
    dtype = compute_dtype(before, after)
    before, after = before.to(dtype), after.to(dtype)
    ratio = after.norm(dim=-1) / before.norm(dim=-1).clamp_min(EPS)
    return ratio, torch.cosine_similarity(before, after, dim=-1, eps=EPS)
