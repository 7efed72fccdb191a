"""Compact positions: every family with one position per token equals its own decoder on the shortened embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import (
    DEPTH,
    PLAIN,
    VERSION,
    assert_close,
    batch,
    family_model,
    fixed_policy,
    forced_tokens,
    rollout,
)
from masked_reference import decoder_layers
from torch import Tensor, nn

import vlmprune

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", PLAIN)
def test_after_the_encoder(family: str, dtype: torch.dtype) -> None:
    if family == "paligemma" and VERSION < (5, 0) and dtype == torch.float64:
        pytest.skip("transformers 4 makes PaliGemma's masks in float32")
    model, prompt = family_model(family, dtype), batch(family, dtype=dtype)
    policy, forced = fixed_policy(prompt, positions="compact"), forced_tokens(prompt)
    stay = prompt.real & ~prompt.dropped(policy.kept)
    with vlmprune.applied(model, policy) as handle:
        got, steps = rollout(model, prompt, forced)
        assert [record.positions for record in handle.last.sites] == ["compact"]
    with vlmprune.applied(model, fixed_policy(prompt, positions="keep")):
        kept, _ = rollout(model, prompt, forced[:, :1])
    for row, images in enumerate(prompt.images):
        expected, expected_steps = short_rollout(model, prompt, row, stay[row], forced[row])
        assert_close(got[row][stay[row]], expected, dtype)
        assert_close(steps[row], expected_steps, dtype)
        apart = (kept[row][stay[row]] - expected).abs().max() > 1e-3  # numbering matters
        assert bool(apart) == bool(images)


@pytest.mark.parametrize("family", PLAIN)
def test_inside_the_decoder(family: str) -> None:
    """Layers from the cut on equal those layers on the survivors with plain positions, alone and in a batch."""
    dtype = torch.float32 if family == "paligemma" and VERSION < (5, 0) else torch.float64
    model, prompt = family_model(family, dtype), batch(family, dtype=dtype)
    cut = 2
    policy, forced = fixed_policy(prompt, cut, positions="compact"), forced_tokens(prompt, 4)
    stay = prompt.real & ~prompt.dropped(policy.kept, policy.site)
    layers, text = decoder_layers(model), text_model(model)
    entering: list[Tensor] = []
    spies = layers[cut].register_forward_pre_hook(
        lambda m, a, k: entering.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    [*dense_calls] = spied(model, layers[cut], lambda: rollout(model, prompt, forced))
    spies.remove()
    with vlmprune.applied(model, policy):
        got, steps = rollout(model, prompt, forced)
    for row in range(len(prompt.rows)):
        n = int(stay[row].sum())
        hidden = torch.cat([entering[0][row][stay[row]], *[part[row] for part in entering[1:]]])[None]
        total = hidden.shape[1]
        given = dense_calls[0]["attention_mask"]
        mask = torch.ones(total, total, dtype=torch.bool).tril()
        if given is not None and given.ndim == 4:  # prompts and images that see both ways
            allowed = given if given.dtype == torch.bool else given == 0
            mask[:n, :n] = shorter(allowed, row, stay[row])[0, 0]
        logits = run_layers(model, text, layers[cut:DEPTH], hidden, mask[None, None], numbers(family, 0, total), cut)
        assert_close(got[row][stay[row]], logits[:n], dtype)
        assert_close(steps[row], logits[n:], dtype)


@torch.no_grad()
def run_layers(
    model: nn.Module, text: nn.Module, layers: Any, hidden: Tensor, mask: Tensor, positions: Tensor, first: int
) -> Tensor:
    """Logits ``[n, V]`` of the last decoder layers on ``hidden [1, n, D]``, without a cache."""
    for index, layer in enumerate(layers, first):
        given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
        if hasattr(text, "rotary_emb_local"):
            given["position_embeddings_global"] = text.rotary_emb(hidden, positions)
            given["position_embeddings_local"] = text.rotary_emb_local(hidden, positions)
        elif "gemma3" in type(text).__name__.lower():
            kind = text.config.layer_types[index]
            given["position_embeddings"] = text.rotary_emb(hidden, positions, kind)
        else:
            given["position_embeddings"] = text.rotary_emb(hidden, positions)
        out = layer(hidden, **given)
        hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(text.norm(hidden))[0]
