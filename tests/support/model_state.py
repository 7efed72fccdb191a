"""What a model looks like from outside: its hooks and configs, logits and generated tokens."""

from __future__ import annotations

from typing import Any

import torch
from llava_prompts import LlavaPrompt, prefill
from recording import Recording
from torch import Tensor, nn

from vlmprune.core import signals as s
from vlmprune.core.sites import Site

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Per module: its class, hook tables, config object and instance attributes."""
    return {
        name: (
            type(module),
            {table: dict(getattr(module, table)) for table in HOOK_TABLES},
            id(getattr(module, "config", None)),
            sorted(module.__dict__),
            id(module.__dict__.get("forward")),
        )
        for name, module in model.named_modules()
    }


def generated(model: nn.Module, prompt: LlavaPrompt, **mode: Any) -> Tensor:
    """Five greedy tokens after the prompt."""
    with torch.no_grad():
        return model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, **mode)


def logits(model: nn.Module, prompt: LlavaPrompt) -> Tensor:
    """``[B, L, V]`` of the prompt."""
    return prefill(model, prompt).logits


def hooked(module: nn.Module, ids: Any) -> bool:
    """True if a hook of ``ids`` is in one of the module's tables."""
    return any(key in ids for table in HOOK_TABLES for key in getattr(module, table))


def tower_signals() -> Recording:
    """Asks for every signal of the tower, so that all kinds of hooks and taps are in place."""
    wanted = (
        s.ColumnMass("vision", 0),
        s.QK("vision", 1),
        s.ClsRow(2),
        s.Hidden("vision", 1, "in"),
        s.Hidden("vision", 1, "out"),
        s.PreProjector(),
    )
    return Recording(wanted=wanted)


def decoder_signals() -> Recording:
    """Asks for signals of decoder layers, from layer 2, so that all kinds of hooks and taps are in place."""
    wanted = (
        s.GroupMass(1),
        s.AttentionRows("text", 0),
        s.ModuleTransition(1, "attn"),
        s.ModuleTransition(0, "mlp"),
        s.ProbeAttention(2, "text_after"),
    )
    return Recording(wanted=wanted, site=Site.DECODER_LAYER, layer=2)
