"""Calls that pruning cannot serve are refused, with a message that names the way out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from llava_prompts import LlavaPrompt, StubProcessor, decode, fixed_keep, make_prompt, prefill, small_llava
from masked_reference import hidden_keys
from torch import nn

import vlmprune
from vlmprune.core.errors import InputError, UnsupportedError, VlmpruneError
from vlmprune.embedded.tiny_configs import IMAGE_TOKEN_ID

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SITES = [pytest.param(None, id="post_encoder"), pytest.param(2, id="layer2")]


def refused(model: nn.Module, prompt: LlavaPrompt, message: str, **arguments: Any) -> None:
    """The pruned model refuses the call, and is usable afterwards."""
    policy = fixed_keep(prompt.images)
    with vlmprune.applied(model, policy) as handle:
        expected = prefill(model, prompt).logits
        with pytest.raises(VlmpruneError, match=message) as caught:
            prefill(model, prompt, **arguments)
        assert handle.last_error is caught.value
        assert torch.equal(prefill(model, prompt).logits, expected)
        assert handle.last_error is None


def test_images_without_a_placeholder() -> None:
    model, prompt = small_llava(), make_prompt()
    text = prompt.ids.masked_fill(prompt.ids == IMAGE_TOKEN_ID, 9)
    with (
        vlmprune.applied(model, fixed_keep()) as handle,
        pytest.raises(InputError, match="no image placeholder; put the processor's image token"),
    ):
        model(**{**prompt.inputs, "input_ids": text})
    assert isinstance(handle.last_error, InputError)


def test_placeholders_that_make_no_whole_image() -> None:
    model, prompt = small_llava(), make_prompt()
    ids = prompt.ids.clone()
    ids[0, 3] = 9
    with (
        vlmprune.applied(model, fixed_keep()),
        pytest.raises(InputError, match="Row 0 has 15 image placeholder tokens.*16 tokens.*processor"),
    ):
        model(**{**prompt.inputs, "input_ids": ids})


@pytest.mark.parametrize(
    "argument", [{"vision_feature_layer": -1}, {"vision_feature_select_strategy": "full"}], ids=str
)
def test_overriding_the_features_at_the_call(argument: dict[str, Any]) -> None:
    refused(small_llava(), make_prompt(), "differs from the model's config; set it in model.config", **argument)


@pytest.mark.parametrize("where", SITES)
def test_a_second_turn_with_an_image(where: int | None) -> None:
    """In one forward, and through ``generate`` with the whole conversation."""
    model, prompt = small_llava(), make_prompt()
    turn = make_prompt(seed=7).ids
    message = "KV cache already holds tokens.*fresh cache and the whole conversation"
    with vlmprune.applied(model, fixed_keep(where=where)):
        cache = prefill(model, prompt, use_cache=True).past_key_values
        mask = torch.ones(1, 2 * prompt.length, dtype=torch.long)
        with pytest.raises(UnsupportedError, match=message), torch.no_grad():
            model(input_ids=turn, pixel_values=prompt.pixels, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedError, match=message), torch.no_grad():
            model(input_ids=turn, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("where", SITES)
def test_an_image_after_text_that_was_cached_before(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, fixed_keep(where=where)), torch.no_grad():
        cache = model(input_ids=torch.tensor([[1, 9, 9]]), use_cache=True).past_key_values
        mask = torch.ones(1, 3 + prompt.length, dtype=torch.long)
        with pytest.raises(UnsupportedError, match="KV cache already holds tokens"):
            model(input_ids=prompt.ids, pixel_values=prompt.pixels, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("chunk", [2, 8, 20])
@pytest.mark.parametrize("where", SITES)
def test_chunked_prefill(where: int | None, chunk: int) -> None:
    """Chunks before, inside and after the image. Text after all images is a text turn, which is served.

    Dense chunked prefill with images works on transformers 5.23; 4.57 refuses a first chunk without the whole
    image, and 5.17 answers as if there were no image.
    """
    model, prompt = small_llava(), make_prompt()
    settings = {"max_new_tokens": 3, "do_sample": False, "prefill_chunk_size": chunk}
    with vlmprune.applied(model, fixed_keep(where=where)):
        whole = model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False)
        if chunk < 20:
            with pytest.raises(VlmpruneError, match="prefill_chunk_size|no image placeholder"):
                model.generate(**prompt.inputs, **settings)
        else:
            chunked = model.generate(**prompt.inputs, **settings)
            assert torch.equal(chunked, whole) or VERSION[:2] == (5, 17)


@pytest.mark.parametrize("policy", ["uniform", "downsample"])
def test_nothing_is_refused_where_nothing_is_reduced(policy: str) -> None:
    """``keep=1.0``, and policies that act on images only: caches, second image turns, windows are the model's."""
    model, prompt = small_llava(), make_prompt()
    second = make_prompt(seed=7)
    expected = two_turns(model, prompt, second)
    static = model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
    settings: dict[str, Any] = {"keep": 1.0} if policy == "uniform" else {"keep": 0.25, "processor": StubProcessor()}
    with vlmprune.applied(model, policy, **settings):
        assert torch.equal(two_turns(model, prompt, second), expected)
        got = model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
        assert torch.equal(got, static)


@torch.no_grad()
def two_turns(model: nn.Module, first: LlavaPrompt, second: LlavaPrompt) -> torch.Tensor:
    """Logits of a second turn that brings an image of its own."""
    cache = prefill(model, first, use_cache=True).past_key_values
    mask = torch.ones(1, first.length + second.length, dtype=torch.long)
    positions = torch.arange(first.length, mask.shape[1])[None]
    turn = {"input_ids": second.ids, "pixel_values": second.pixels, "attention_mask": mask, "position_ids": positions}
    return model(**turn, past_key_values=cache).logits


@pytest.mark.parametrize("where", SITES)
def test_a_lone_placeholder_in_a_text_turn_is_a_word(where: int | None) -> None:
    """Speculative decoding proposes tokens of the prompt, which may be placeholders; dense models embed them."""
    model, prompt = small_llava(dtype=torch.float64), make_prompt(dtype=torch.float64)
    turn = torch.tensor([[9, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID]])
    policy = fixed_keep(where=where)
    gone = {i: prompt.dropped(policy.kept, policy.site) for i in range(where or 0, 4)}
    results = []
    for context in (
        hidden_keys(model.model.language_model.layers, gone, prompt.real),
        vlmprune.applied(model, policy),
    ):
        with context:
            cache = prefill(model, prompt, use_cache=True).past_key_values
            results.append(decode(model, prompt, cache, turn, turn=True))
    assert torch.allclose(results[0], results[1], atol=1e-9)


def test_gradient_checkpointing_in_training() -> None:
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, fixed_keep(where=2)) as handle:
        model.gradient_checkpointing_enable()
        prefill(model, prompt)  # eval mode does not checkpoint
        model.train()
        with pytest.raises(UnsupportedError, match=r"gradient_checkpointing_disable\(\)"):
            model(**prompt.inputs)
        with handle.disabled():
            model(**prompt.inputs)
        model.gradient_checkpointing_disable()
        model(**prompt.inputs)


def test_embeddings_without_placeholders_warn_once() -> None:
    """Merged image features cannot be told from text; such a prompt is not pruned, and says so."""
    model, prompt = small_llava(), make_prompt()
    embeds = torch.randn(1, prompt.length, model.config.text_config.hidden_size)
    with torch.no_grad():
        dense = model(inputs_embeds=embeds).logits
        with vlmprune.applied(model, fixed_keep()):
            with pytest.warns(UserWarning, match="no image placeholder.*unpruned.*spans="):
                assert torch.equal(model(inputs_embeds=embeds).logits, dense)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(inputs_embeds=embeds)
        with vlmprune.applied(model, fixed_keep()), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(input_ids=torch.tensor([[1, 9, 10]]))  # text without images is no surprise
