"""An error inside a policy or the model leaves the model usable."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import N, decode, make_prompt, pick_tokens, prefill, small_llava
from model_state import generated, logits

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core.context import Context
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site


class Boom(Exception):
    """Raised inside a policy."""


class Failing(FixedKeep):
    """Fails once it is asked."""

    def select(self, context: Context) -> Selection:
        if getattr(context, "site", None) == self.site and FAIL.is_set():
            raise Boom("from the policy")
        return super().select(context)


FAIL = threading.Event()


@pytest.mark.parametrize("site", [Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE])
def test_an_error_in_a_policy_leaves_the_model_usable(site: Site) -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    dense = logits(model, prompt)
    layer = None if site == Site.POST_ENCODER else 2
    handle = vlmprune.apply(model, Failing(kept=pick_tokens([N, N]), site=site, layer=layer, positions="keep"))
    pruned_ids = generated(model, prompt)
    assert handle.last_error is None
    FAIL.set()
    try:
        with pytest.raises(Boom, match="from the policy"):
            generated(model, prompt)
        assert isinstance(handle.last_error, Boom)
        with handle.disabled():
            assert torch.equal(logits(model, prompt), dense)
    finally:
        FAIL.clear()
    assert torch.equal(generated(model, prompt), pruned_ids)
    assert handle.last_error is None
    handle.remove()
    assert torch.equal(logits(model, prompt), dense)


def test_an_error_in_the_model_leaves_it_usable() -> None:
    model, prompt = small_llava(), make_prompt()
    handle = vlmprune.apply(model, FixedKeep(kept=((1, 5),), site=Site.DECODER_LAYER, layer=2))
    pruned = logits(model, prompt)

    def fail(*_: Any) -> None:
        raise Boom("from a layer")

    broken = model.model.language_model.layers[3].register_forward_pre_hook(fail)
    cache = PrunedDynamicCache()
    with pytest.raises(Boom):
        prefill(model, prompt, past_key_values=cache, use_cache=True)
    assert not cache.prompt.inside
    broken.remove()
    assert torch.equal(logits(model, prompt), pruned)
    handle.remove()


def test_a_cache_that_outlives_the_handle_is_refused() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    handle = vlmprune.apply(model, FixedKeep(kept=pick_tokens([N, N]), site=Site.DECODER_LAYER, layer=2))
    cache = prefill(model, prompt, use_cache=True).past_key_values
    handle.remove()
    with pytest.raises(Exception, match="pruned.*fresh"):
        decode(model, prompt, cache, torch.tensor([[9], [9]]))
