"""Caches and windows that pruning cannot serve are refused, with a message that names the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from llava_prompts import decode, fixed_keep, make_prompt, prefill, small_llava
from torch import nn

import vlmprune
from vlmprune.core.errors import UnsupportedError

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SITES = [pytest.param(None, id="post_encoder"), pytest.param(2, id="layer2")]


@pytest.mark.parametrize("where", SITES)
def test_a_static_cache(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    with (
        vlmprune.applied(model, fixed_keep(where=where)),
        pytest.raises(UnsupportedError, match=r"DynamicCache, not on StaticCache.*cache_implementation.*disabled"),
    ):
        model.generate(**prompt.inputs, max_new_tokens=3, cache_implementation="static")
    model.__dict__.pop("_cache", None)  # transformers 4 keeps the static cache of the failed call
    model.generate(**prompt.inputs, max_new_tokens=3, cache_implementation="static")


def special_cache(kind: str, model: nn.Module) -> Any:
    """An offloaded or a quantised cache; their back-ends need a GPU or more packages, so they are never filled."""
    from transformers import cache_utils

    if kind == "offloaded":
        cache = cache_utils.DynamicCache()
        cache.offloading = True
        return cache
    cache = cache_utils.QuantizedCache.__new__(cache_utils.QuantizedCache)
    cache_utils.Cache.__init__(cache, layers=[cache_utils.DynamicLayer() for _ in range(4)])
    return cache


@pytest.mark.parametrize(
    ("kind", "name"), [("offloaded", "an offloaded DynamicCache"), ("quantised", "QuantizedCache")]
)
def test_caches_of_other_kinds(kind: str, name: str) -> None:
    model = small_llava()
    cache = special_cache(kind, model)
    prompt = make_prompt()
    with (
        vlmprune.applied(model, fixed_keep()),
        pytest.raises(UnsupportedError, match=f"not on {name}.*past_key_values"),
    ):
        prefill(model, prompt, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("where", SITES)
def test_a_sliding_window_that_the_prompt_exceeds(where: int | None, use_cache: bool) -> None:
    model, prompt = small_llava(text="mistral"), make_prompt()
    model.config.text_config.sliding_window = 12
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 12
    with vlmprune.applied(model, fixed_keep(where=where)):
        with pytest.raises(UnsupportedError, match="22 tokens exceeds.*window of 12.*disabled"):
            prefill(model, prompt, use_cache=use_cache)
        with pytest.raises(UnsupportedError, match="window of 12"):
            prefill(model, prompt, use_cache=use_cache, past_key_values=transformers.DynamicCache())


@pytest.mark.parametrize("where", SITES)
def test_a_sliding_window_that_decoding_exceeds(where: int | None) -> None:
    model, prompt = small_llava(text="mistral"), make_prompt()
    model.config.text_config.sliding_window = 24
    forced = torch.full((1, 4), 9)
    with vlmprune.applied(model, fixed_keep(where=where)):
        cache = prefill(model, prompt, use_cache=True).past_key_values
        decode(model, prompt, cache, forced[:, :2])
        cache = prefill(model, prompt, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="25 tokens exceeds.*window of 24"):
            decode(model, prompt, cache, forced)


@pytest.mark.parametrize("where", SITES)
def test_cropping_into_the_images(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    absolute = VERSION < (5, 0)
    with vlmprune.applied(model, fixed_keep(where=where)):
        cache = prefill(model, prompt, use_cache=True).past_key_values
        decode(model, prompt, cache, torch.tensor([[9, 9]]))
        length = cache.get_seq_length()
        assert length == prompt.length + 2
        with pytest.raises(UnsupportedError, match="4 tokens into the pruned prompt.*start again"):
            cache.crop(length - 6 if absolute else -6)
        assert cache.get_seq_length() == length
        cache.crop(prompt.length if absolute else -2)
        assert cache.get_seq_length() == prompt.length
        cache.crop(prompt.length - 3 if absolute else -3)  # the text after the image
        assert cache.get_seq_length() == prompt.length - 3


@pytest.mark.parametrize("where", SITES)
def test_a_dense_run_on_a_pruned_cache(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, fixed_keep(where=where)) as handle:
        cache = prefill(model, prompt, use_cache=True).past_key_values
        token = torch.tensor([[9]])
        with handle.disabled(), pytest.raises(UnsupportedError, match="was pruned.*needs a fresh one"):
            decode(model, prompt, cache, token)
        decode(model, prompt, cache, token)


@pytest.mark.parametrize("where", SITES)
def test_masks_that_do_not_fit_a_pruned_cache(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, fixed_keep(where=where)), torch.no_grad():
        cache = prefill(model, prompt, use_cache=True).past_key_values
        call = {"input_ids": torch.tensor([[9]]), "past_key_values": cache}
        position = torch.tensor([[prompt.length]])
        with pytest.raises(UnsupportedError, match="one column per token of the whole conversation"):
            model(**call, attention_mask=torch.ones(1, 5, dtype=torch.long), position_ids=position)
        square = torch.ones(1, 1, 1, prompt.length + 1, dtype=torch.bool)
        with pytest.raises(UnsupportedError, match="2-D attention masks"):
            model(**call, attention_mask=square, position_ids=position)
