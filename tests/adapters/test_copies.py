"""Models in one process, copies included, do not influence each other."""

from __future__ import annotations

import copy

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import N, make_prompt, pick_tokens, small_llava
from model_state import decoder_signals, hooked, logits

import vlmprune
from vlmprune.core.errors import ActiveError
from vlmprune.core.sites import Site


def test_two_models_do_not_influence_each_other() -> None:
    one, two = small_llava(), small_llava(seed=4)
    prompt = make_prompt((1, 1), True)
    dense_one, dense_two = logits(one, prompt), logits(two, prompt)
    first = vlmprune.apply(one, "hiprune", keep=0.25)
    assert torch.equal(logits(two, prompt), dense_two)
    pruned_one = logits(one, prompt)
    second = vlmprune.apply(two, "uniform", keep=0.5)
    pruned_two = logits(two, prompt)
    assert torch.equal(logits(one, prompt), pruned_one)
    assert first.last.kept_tokens == (4, 4) and second.last.kept_tokens == (8, 8)
    first.remove()
    assert torch.equal(logits(two, prompt), pruned_two)
    assert torch.equal(logits(one, prompt), dense_one)
    second.remove()
    assert torch.equal(logits(two, prompt), dense_two)


@pytest.mark.parametrize("kind", ["hiprune", "decoder"])
def test_a_copy_prunes_independently(kind: str) -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    dense = logits(model, prompt)
    kept = pick_tokens([N, N])
    policy = {
        "hiprune": vlmprune.HiPrune(keep=0.25),
        "decoder": vlmprune.Compose((decoder_signals(), FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=3))),
    }[kind]
    handle = vlmprune.apply(model, policy)
    pruned = logits(model, prompt)
    twin = copy.deepcopy(model)
    other = vlmprune.handle_of(twin)
    assert other is not handle and other.model is twin and other.active
    report = handle.last
    assert torch.equal(logits(twin, prompt), pruned)
    assert handle.last is report and other.last is not report
    handle.remove()
    assert torch.equal(logits(model, prompt), dense)
    assert torch.equal(logits(twin, prompt), pruned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, prompt), pruned)
    with pytest.raises(ActiveError, match=r"vlmprune.handle_of\(model\).remove\(\)"):
        vlmprune.apply(twin, "random", keep=0.5)
    assert vlmprune.handle_of(model) is None and vlmprune.handle_of(twin.model.language_model) is other
    before = [name for name, module in twin.named_modules() if hooked(module, other._engine.hook_ids)]
    assert before
    other.remove()
    assert torch.equal(logits(twin, prompt), dense)
    assert not any(hooked(module, other._engine.hook_ids) for module in twin.modules())


def test_removing_the_copys_handle_leaves_the_original() -> None:
    model, prompt = small_llava(), make_prompt()
    handle = vlmprune.apply(model, "hiprune", keep=0.25)
    pruned = logits(model, prompt)
    twin = copy.deepcopy(model)
    twin._vlmprune.remove()
    assert handle.active
    assert torch.equal(logits(model, prompt), pruned)
    vlmprune.apply(twin, "uniform", keep=0.5)
    assert torch.equal(logits(model, prompt), pruned)
