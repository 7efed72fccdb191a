"""What ``generate`` and users do with a cache: copies, chosen rows, repeated rows, crops and a new start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import LlavaPrompt, N, decode, make_prompt, pick_tokens, prefill, small_llava
from torch import Tensor, nn
from transformers import DynamicCache

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core.sites import Site

SITES = [pytest.param(None, id="post_encoder"), pytest.param(2, id="layer2")]
FORCED = torch.tensor([[9, 10, 11], [12, 13, 14]])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_llava(dtype=torch.float64)


@pytest.fixture(scope="module")
def prompt() -> LlavaPrompt:
    return make_prompt((2, 1), True, torch.float64)


@pytest.fixture(params=SITES)
def pruned(request: pytest.FixtureRequest, model: nn.Module, prompt: LlavaPrompt) -> Any:
    """A handle with ragged keeps and compact positions."""
    where = request.param
    widths = [N] * 3 if where is None else [2 * N, N]
    site = Site.POST_ENCODER if where is None else Site.DECODER_LAYER
    policy = FixedKeep(kept=pick_tokens(widths, True), site=site, layer=where, positions="compact")
    with vlmprune.applied(model, policy) as handle:
        yield handle


def start(model: nn.Module, prompt: LlavaPrompt, **arguments: Any) -> PrunedDynamicCache:
    cache = prefill(model, prompt, use_cache=True, **arguments).past_key_values
    assert type(cache) is PrunedDynamicCache
    return cache


def rows(prompt: LlavaPrompt, index: list[int]) -> LlavaPrompt:
    """The prompt as far as decoding needs it, for other rows."""
    return LlavaPrompt(prompt.ids[index], prompt.real[index], None, tuple(prompt.images[i] for i in index))


def expected(model: nn.Module, prompt: LlavaPrompt) -> Tensor:
    return decode(model, prompt, start(model, prompt), FORCED)


def test_a_copy_goes_its_own_way(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    cache = start(model, prompt)
    other = copy.deepcopy(cache)
    first = decode(model, prompt, cache, FORCED)
    assert torch.equal(decode(model, prompt, other, FORCED), first)
    assert torch.equal(first, expected(model, prompt))


def test_chosen_and_repeated_rows(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    dense = expected(model, prompt)
    cache = start(model, prompt)
    cache.batch_repeat_interleave(3)
    index = [0, 0, 0, 1, 1, 1]
    got = decode(model, rows(prompt, index), cache, FORCED[index])
    assert torch.allclose(got, dense[index], atol=1e-9)
    cache = start(model, prompt)
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.allclose(decode(model, rows(prompt, [1]), cache, FORCED[[1]]), dense[[1]], atol=1e-9)
    cache = start(model, prompt)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = decode(model, rows(prompt, [1, 0]), cache, FORCED[[1, 0]])
    assert torch.allclose(got, dense[[1, 0]], atol=1e-9)


def test_cropped_tokens_can_be_decoded_again(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    cache = start(model, prompt)
    decode(model, prompt, cache, torch.tensor([[20, 21], [22, 23]]))
    cache.crop(-2)
    assert cache.get_seq_length() == prompt.length
    assert torch.allclose(decode(model, prompt, cache, FORCED), expected(model, prompt), atol=1e-9)


def test_text_after_the_images_can_be_cropped(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    cache = start(model, prompt)
    cache.crop(-2)
    shorter = LlavaPrompt(prompt.ids[:, :-2], prompt.real[:, :-2], prompt.pixels, prompt.images)
    assert cache.get_seq_length() == shorter.length
    assert torch.allclose(decode(model, shorter, cache, FORCED), expected(model, shorter), atol=1e-9)
    # The same tokens come back as decoded ones.
    cache = start(model, prompt)
    cache.crop(-2)
    again = decode(model, shorter, cache, torch.cat([prompt.ids[:, -2:], FORCED], 1))
    assert torch.allclose(again[:, 2:], expected(model, prompt), atol=1e-9)


def test_a_reset_cache_serves_another_prompt(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    other = make_prompt((2, 1), True, torch.float64, seed=8)
    cache = start(model, prompt)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = start(model, other, past_key_values=cache)
    assert again is cache
    assert torch.allclose(decode(model, other, cache, FORCED), expected(model, other), atol=1e-9)


def test_a_reset_cache_serves_text(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    text = make_prompt((0, 0), dtype=torch.float64)
    with pruned.disabled():
        dense = decode(model, text, prefill(model, text, use_cache=True).past_key_values, FORCED)
    cache = start(model, prompt)
    cache.reset()
    prefill(model, text, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == text.length
    assert torch.equal(decode(model, text, cache, FORCED), dense)
    cache.crop(-3)
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == text.length


def test_a_users_own_cache_is_filled_in_place(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    own = DynamicCache()
    assert start(model, prompt, past_key_values=own) is own
    assert torch.allclose(decode(model, prompt, own, FORCED), expected(model, prompt), atol=1e-9)


def test_lengths_outside_and_inside_the_model(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    """``generate`` sees the whole conversation; the layers what they store."""
    cache = start(model, prompt)
    seen: list[tuple[int, int]] = []
    last = model.model.language_model.layers[3].self_attn
    spy = last.register_forward_pre_hook(lambda *_: seen.append((cache.get_seq_length(3), cache.stored(3))))
    decode(model, prompt, cache, FORCED)
    spy.remove()
    stored = cache.layers[3].keys.shape[2] - 3
    assert stored < prompt.length
    assert seen == [(stored + i, stored + i) for i in range(3)]
    assert [cache.get_seq_length(layer) for layer in range(4)] == [prompt.length + 3] * 4


def test_outputs_as_tuples(model: nn.Module, prompt: LlavaPrompt, pruned: Any) -> None:
    named = prefill(model, prompt, use_cache=True)
    logits, cache = prefill(model, prompt, use_cache=True, return_dict=False)[:2]
    assert torch.equal(logits, named.logits)
    assert type(cache) is PrunedDynamicCache
    assert pruned.last.kv_bytes == sum(
        part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values)
    )
