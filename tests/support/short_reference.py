"""A family's own decoder on shortened embeddings: the reference of compact positions before the LLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from family_prompts import FamilyPrompt, prefill
from masked_reference import decoder_layers
from torch import Tensor, nn

Calls = list[dict[str, Any]]


def text_model(model: nn.Module) -> nn.Module:
    """The decoder of a model, found by its layers."""
    layers = decoder_layers(model)
    return next(module for module in model.model.modules() if getattr(module, "layers", None) is layers)


def spy(calls: Calls, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    calls.append(dict(kwargs))


def spied(model: nn.Module, module: nn.Module, run: Callable[[], Any]) -> Calls:
    """Keywords of every call of ``module`` while ``run`` runs the dense model."""
    calls: Calls = []
    hook = module.register_forward_pre_hook(lambda m, a, k: spy(calls, m, a, k), with_kwargs=True)
    run()
    hook.remove()
    return calls


def shorter(mask: Any, row: int, stay: Tensor) -> Any:
    """One row of a mask as a decoder is given it, for the tokens ``stay [L]``."""
    if isinstance(mask, dict):
        return {name: shorter(part, row, stay) for name, part in mask.items()}
    if mask is None:
        return None
    mask = mask[row : row + 1] if len(mask) > 1 else mask
    return mask[:, stay] if mask.ndim == 2 else mask[:, :, stay][..., stay]


def numbers(family: str, start: int, stop: int) -> Tensor:
    """Plain positions; PaliGemma counts from 1."""
    return torch.arange(start, stop)[None] + (family == "paligemma")


@torch.no_grad()
def short_rollout(
    model: nn.Module, prompt: FamilyPrompt, row: int, stay: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """The dense decoder on one row's kept embeddings: logits ``[n, V]`` of the prompt, ``[S, V]`` of forced tokens."""
    text = text_model(model)
    [call] = spied(model, text, lambda: prefill(model, prompt))
    n = int(stay.sum())
    out = text(
        inputs_embeds=call["inputs_embeds"][row : row + 1, stay],
        attention_mask=shorter(call["attention_mask"], row, stay),
        position_ids=numbers(prompt.family, 0, n),
        use_cache=True,
    )
    logits, cache, steps = model.lm_head(out.last_hidden_state)[0], out.past_key_values, []
    for place, token in enumerate(forced, n):
        embed = model.get_input_embeddings()(token[None, None])
        out = text(
            inputs_embeds=embed,
            position_ids=numbers(prompt.family, place, place + 1),
            past_key_values=cache,
            use_cache=True,
        )
        steps.append(model.lm_head(out.last_hidden_state)[0, -1])
    return logits, torch.stack(steps)
