"""The reference of the equivalence tests is itself right, on every family: it equals the dense model under an explicit
four-dimensional mask, and what it hides has no influence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, make_family_prompt
from llava_prompts import pick_tokens
from masked_reference import decoder_layers, hidden_keys
from prompt_runs import decode, prefill
from torch import Tensor, nn

from vlmprune.embedded.random_models import FAMILIES, random_vlm

MIXED = (2, 1, 0)
RUNS = [
    pytest.param("sdpa", torch.float64, 1e-9, id="sdpa-float64"),
    pytest.param("eager", torch.float32, 2e-4, id="eager-float32"),
]
FORCED = torch.randint(8, 60, (3, 3), generator=torch.Generator().manual_seed(9))


def rollout(model: nn.Module, prompt: FamilyPrompt, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Logits of the prompt and of forced tokens after it."""
    out = prefill(model, prompt, use_cache=True, **arguments)
    return out.logits, decode(model, prompt, out.past_key_values, FORCED[: len(prompt.rows)])


def explicit_mask(prompt: FamilyPrompt, dropped: Tensor) -> Tensor:
    """``[B, 1, L, L]`` True where the family lets a query see a key: written down from the papers' rules."""
    length = prompt.length
    allowed = torch.ones(len(prompt.rows), length, length, dtype=torch.bool).tril()
    if prompt.family == "paligemma":  # the whole prompt is a prefix
        allowed[:] = True
    if prompt.family == "gemma3":  # the tokens of an image see each other
        for row, images in enumerate(prompt.places()):
            for tokens in images:
                allowed[row, tokens[0] : tokens[-1] + 1, tokens[0] : tokens[-1] + 1] = True
    allowed &= (prompt.real & ~dropped)[:, None]
    return (allowed | torch.eye(length, dtype=torch.bool))[:, None]


def as_given(family: str, mask: Tensor, implementation: str, dtype: torch.dtype) -> Any:
    """The mask in the form in which the model takes it."""
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"full_attention": mask, "sliding_attention": mask} if family == "gemma3" else mask


@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_equals_an_explicit_mask(family: str, implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    model = random_vlm(family, dtype=dtype, attn_implementation=implementation)
    prompt = make_family_prompt(family, MIXED, padded=True, dtype=dtype)
    dropped = prompt.dropped(pick_tokens(prompt.widths(), ragged=True))
    mask = as_given(family, explicit_mask(prompt, dropped), implementation, dtype)
    expected = prefill(model, prompt, attention_mask=mask).logits
    layers = decoder_layers(model)
    with hidden_keys(layers, dict.fromkeys(range(len(layers)), dropped), prompt.real):
        got, _ = rollout(model, prompt)
    dense, _ = rollout(model, prompt)
    scale = max(1.0, float(expected.abs().max()))
    assert (got - expected)[prompt.real].abs().max() <= tolerance * scale
    assert ((dense - got)[:2, -1].abs().amax(-1) > 1e-2).all()  # rows with images notice it


@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_nothing_changes_nothing(family: str, implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    model = random_vlm(family, dtype=dtype, attn_implementation=implementation)
    prompt = make_family_prompt(family, MIXED, padded=True, dtype=dtype)
    dense, steps = rollout(model, prompt)
    with hidden_keys(decoder_layers(model), {}, prompt.real):
        got, got_steps = rollout(model, prompt)
    scale = max(1.0, float(dense.abs().max()))
    assert (got - dense)[prompt.real].abs().max() <= tolerance * scale
    assert (got_steps - steps).abs().max() <= tolerance * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_images_have_no_influence(family: str) -> None:
    model = random_vlm(family, dtype=torch.float64)
    prompt = make_family_prompt(family, MIXED, padded=True, dtype=torch.float64)
    other = prompt.repainted(0)
    layers = decoder_layers(model)
    hidden = dict.fromkeys(range(len(layers)), prompt.dropped([()] * sum(MIXED)))
    for where, same in ((hidden, True), ({layer: hidden[layer] for layer in (2, 3)}, False), ({}, False)):
        with hidden_keys(layers, where, prompt.real):
            (one, steps), (two, other_steps) = rollout(model, prompt), rollout(model, other)
        text = prompt.real & (prompt.kinds == 0)
        assert torch.equal(one[1:][text[1:]], two[1:][text[1:]])  # the other rows see their own pixels
        assert torch.equal(one[0][text[0]], two[0][text[0]]) == same
        assert torch.equal(steps[0], other_steps[0]) == same


@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_after_the_prefill_alone_leaves_the_prefill(family: str) -> None:
    model = random_vlm(family, dtype=torch.float64)
    prompt = make_family_prompt(family, MIXED, padded=True, dtype=torch.float64)
    layers = decoder_layers(model)
    hidden = dict.fromkeys(range(len(layers)), prompt.dropped([()] * sum(MIXED)))
    dense, dense_steps = rollout(model, prompt)
    with hidden_keys(layers, hidden, prompt.real, decode_only=True):
        got, steps = rollout(model, prompt)
    assert torch.equal(got, dense)
    assert ((steps - dense_steps)[:2].abs().amax((1, 2)) > 1e-2).all()
