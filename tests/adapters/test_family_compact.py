"""Compact positions: every family with one position per token equals its own decoder on the shortened embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_runs import (
    DEPTH,
    PLAIN,
    assert_close,
    batch,
    family_model,
    fixed_policy,
    forced_tokens,
    rollout,
)
from masked_reference import decoder_layers
from short_reference import numbers, short_rollout, shorter, spied, text_model
from torch import Tensor, nn

import vlmprune


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", PLAIN)
def test_after_the_encoder(family: str, dtype: torch.dtype) -> None:
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
    model, prompt = family_model(family), batch(family)
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
        assert_close(got[row][stay[row]], logits[:n])
        assert_close(steps[row], logits[n:])


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
