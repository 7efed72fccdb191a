"""Prompts and models that no family can serve are refused with a message that names the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_reference import PACKED
from family_prompts import FamilyPrompt, prefill
from family_runs import FAMILIES, NEWLINES, VIDEO, batch, family_model, fixed_policy
from masked_reference import decoder_layers
from torch import nn

import vlmprune
from vlmprune.core.errors import InputError, UnsupportedError, VlmpruneError
from vlmprune.embedded.random_models import random_vlm
from vlmprune.embedded.random_models import tokens as t

WORD = t.FIRST_TEXT
SIZES = {"image_sizes": NEWLINES, "image_grid_thw": PACKED}
"""Inputs that say how many tokens an image has, and who needs them."""


def refused(model: nn.Module, prompt: FamilyPrompt, message: str, error: Any = InputError, **changed: Any) -> None:
    """The pruned model refuses the changed call, and serves the right one afterwards."""
    given = {**prompt.inputs, "position_ids": prompt.position_ids(model), **changed}
    with vlmprune.applied(model, fixed_policy(prompt)) as handle:
        expected = prefill(model, prompt).logits
        with pytest.raises(error, match=message) as caught, torch.no_grad():
            model(**{name: value for name, value in given.items() if value is not None})
        assert handle.last_error is caught.value
        assert torch.equal(prefill(model, prompt).logits, expected)
        assert handle.last_error is None


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, some in SIZES.items() for family in some])
def test_sizes_of_images_are_missing(name: str, family: str) -> None:
    refused(
        family_model(family),
        batch(family),
        f"image placeholders, but the call has no {name}.*processor",
        **{name: None},
    )


@pytest.mark.parametrize("family", PACKED)
def test_sizes_of_videos_are_missing(family: str) -> None:
    prompt = batch(family, (1, 2), video=True)
    message = "video placeholders, but the call has no video_grid_thw.*processor"
    refused(family_model(family), prompt, message, video_grid_thw=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_too_few(family: str) -> None:
    prompt = batch(family)
    ids = prompt.ids.clone()
    ids[1, prompt.places()[1][0][2]] = WORD
    refused(
        family_model(family), prompt, "placeholder tokens.*build the prompt with the model's processor", input_ids=ids
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_too_many(family: str) -> None:
    prompt = batch(family)
    ids = prompt.ids.clone()
    ids[2, -2] = t.IMAGE_TOKEN_ID
    refused(
        family_model(family), prompt, "placeholder tokens.*build the prompt with the model's processor", input_ids=ids
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_too_few(family: str) -> None:
    """Where tiles are told apart by the prompt alone, it is the model itself that refuses."""
    model, prompt = family_model(family), batch(family)
    fewer = batch(family, (1, 1, 0)).vision
    message = "placeholder tokens|tokens: 63|shape|index 4 is out of bounds|ones in mask"
    with vlmprune.applied(model, fixed_policy(prompt)):
        expected = prefill(model, prompt).logits
        with pytest.raises((VlmpruneError, ValueError, RuntimeError, IndexError), match=message):
            prefill(model, prompt, **fewer)
        assert torch.equal(prefill(model, prompt).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_without_a_placeholder(family: str) -> None:
    prompt = batch(family)
    text = prompt.ids.masked_fill(prompt.kinds > 0, WORD)
    refused(family_model(family), prompt, "no image placeholder; put the processor's image token", input_ids=text)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill(family: str) -> None:
    """Some versions of transformers refuse the first chunk by themselves."""
    model, prompt = family_model(family), batch(family, (1,), False)
    with vlmprune.applied(model, fixed_policy(prompt)):
        expected = prefill(model, prompt).logits
        with pytest.raises(VlmpruneError, match="prefill_chunk_size|no image placeholder"):
            model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=4)
        assert torch.equal(prefill(model, prompt).logits, expected)


def test_a_sliding_window_that_the_prompt_exceeds() -> None:
    model, prompt = random_vlm("gemma3"), batch("gemma3", (2, 1), dtype=torch.float32)
    model.config.text_config.sliding_window = 30
    for layer in decoder_layers(model):
        if getattr(layer.self_attn, "sliding_window", None) is not None:
            layer.self_attn.sliding_window = 30
    with vlmprune.applied(model, fixed_policy(prompt)), pytest.raises(UnsupportedError, match="window of 30.*disabled"):
        prefill(model, prompt)


def test_deepstack_needs_more_decoder_layers_than_levels() -> None:
    model = random_vlm("qwen3_vl", text_layers=2)
    with pytest.raises(UnsupportedError, match="adds visual features after all 2 decoder layers"):
        vlmprune.apply(model, "uniform", keep=0.5)


@pytest.mark.parametrize(
    ("family", "strategy"), [("llava_next", "full"), ("llava_onevision", "default"), ("internvl", "full")]
)
def test_a_select_strategy_that_shifts_the_grid(family: str, strategy: str) -> None:
    model = random_vlm(family)
    model.config.vision_feature_select_strategy = strategy
    with pytest.raises(UnsupportedError, match=f"strategy='{strategy}'.*expected '"):
        vlmprune.apply(model, "uniform", keep=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_are_for_bare_decoders(family: str) -> None:
    model = family_model(family)
    with pytest.raises(UnsupportedError, match="spans is for bare decoders; .* finds its images itself"):
        vlmprune.apply(model, "uniform", keep=0.5, spans=[[(0, 4)]])
    assert "_vlmprune" not in model.__dict__


def test_an_unknown_model_is_told_which_are_served() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel is not a model that vlmprune can prune") as caught:
        vlmprune.apply(model, "uniform", keep=0.5)
    assert all(type(family_model(family)).__name__ in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_its_head_is_served(family: str) -> None:
    """The base model, which merges images into the prompt, prunes as the whole model does."""
    model, prompt = family_model(family), batch(family, video=family in VIDEO)
    policy = fixed_policy(prompt)
    given = {**prompt.inputs, "position_ids": prompt.position_ids(model)}
    with vlmprune.applied(model, policy):
        expected = prefill(model, prompt).logits
    with vlmprune.applied(model.model, policy), torch.no_grad():
        got = model.lm_head(model.model(**given).last_hidden_state)
    assert torch.equal(got, expected)
