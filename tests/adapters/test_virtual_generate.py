"""``generate`` with virtual unmerging gives what the dense model with averaged groups gives; caches stay short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import DEPTH, VERSION, assert_close, batch, family_model, forced_tokens, rollout
from fixed_policy import FixedGroups
from torch import nn
from virtual_reference import Groups, pick_groups, unique, unmerged

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core.errors import UnsupportedError
from vlmprune.embedded.random_models import tokens as t

NO_WORDS = [t.IMAGE_TOKEN_ID, t.VIDEO_TOKEN_ID, t.START_ID]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "two-beams-returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "no-cache": {"use_cache": False},
}
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"]
"""Families whose masks, tables or features come by other ways."""


def generate(model: nn.Module, given: dict[str, Any], **mode: Any) -> Any:
    torch.manual_seed(5)
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "suppress_tokens": NO_WORDS,
    }
    with torch.no_grad():
        return model.generate(**given, **{**settings, **mode})


def in_both(model: nn.Module, prompt: FamilyPrompt, groups: Groups, given: dict[str, Any], **mode: Any) -> list[Any]:
    """The reference's result and ours, which must be the same."""
    results = []
    for context in unmerged(model, prompt, groups), vlmprune.applied(model, FixedGroups(kept=groups)):
        with context:
            results.append(generate(model, given, **mode))
    expected, got = results
    assert torch.equal(got.sequences, expected.sequences)
    for step, reference in zip(got.scores, expected.scores, strict=True):
        assert torch.allclose(step, reference, rtol=1e-6, atol=1e-6)
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_modes(family: str, mode: str) -> None:
    settings = MODES[mode]
    repeats = "num_beams" in settings or "num_return_sequences" in settings
    images = (1, 0, 1) if repeats and VERSION < (5, 23) else (2, 0, 1)
    model, prompt = family_model(family), batch(family, images)
    _, got = in_both(model, prompt, pick_groups(prompt.widths()), prompt.inputs, **settings)
    dense = generate(model, prompt.inputs, **settings)
    assert (dense.scores[0] - got.scores[0]).abs().nan_to_num(0, 0, 0).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates stand at the prompt's end in the first forward; the rejected ones are cropped."""
    model, prompt = family_model(family), batch(family, (1,), False)
    [row] = prompt.rows
    words = list(range(t.FIRST_TEXT, t.LAST_TEXT + 1))
    longer = type(row)(row.ids + words, row.kinds + [0] * len(words), row.parts, row.starts)
    prompt = FamilyPrompt(family, (longer,))
    cropped: list[int] = []
    crop = PrunedDynamicCache.crop

    def spy(cache: PrunedDynamicCache, length: int) -> None:
        before = cache.stored()
        crop(cache, length)
        cropped.append(before - cache.stored())

    monkeypatch.setattr(PrunedDynamicCache, "crop", spy)
    settings = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "max_new_tokens": 10}
    in_both(model, prompt, pick_groups(prompt.widths()), prompt.inputs, **settings)
    assert any(cropped)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_cache_is_continued(family: str) -> None:
    model, prompt = family_model(family), batch(family, (1, 2))
    groups, turn, results = pick_groups(prompt.widths()), forced_tokens(prompt, 4), []
    for context in unmerged(model, prompt, groups), vlmprune.applied(model, FixedGroups(kept=groups)):
        with context:
            first = generate(model, prompt.inputs)
            ids = torch.cat([first.sequences, turn], 1)
            given = {"input_ids": ids}
            for name in ("attention_mask", "token_type_ids"):
                if name in prompt.inputs:
                    value = prompt.inputs[name]
                    fill = int(name == "attention_mask")
                    more = value.new_full((len(ids), ids.shape[1] - prompt.length), fill)
                    given[name] = torch.cat([value, more], 1)
            results.append(generate(model, given, past_key_values=first.past_key_values))
    assert torch.equal(results[1].sequences, results[0].sequences)
    for step, reference in zip(results[1].scores, results[0].scores, strict=True):
        assert torch.allclose(step, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_merged_tokens(family: str) -> None:
    model, prompt = family_model(family), batch(family)
    groups, steps = pick_groups(prompt.widths()), 3
    kept = int(unique(prompt, groups).sum(1).max())
    with vlmprune.applied(model, FixedGroups(kept=groups)) as handle:
        out = prefill(model, prompt, use_cache=True)
        cache = out.past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [kept] * DEPTH
        assert cache.get_seq_length() == prompt.length
        assert handle.last.kv_bytes * prompt.length == handle.last.kv_bytes_dense * kept
        again = generate(model, prompt.inputs, max_new_tokens=steps + 1)
        assert [layer.keys.shape[2] for layer in again.past_key_values.layers] == [kept + steps] * DEPTH
        visual = unique(prompt, groups).sum(1) - prompt.real.sum(1) + (prompt.kinds > 0).sum(1)
        assert handle.last.kept_tokens == tuple(visual.tolist())
    with pytest.raises(UnsupportedError, match="cache was pruned; a dense run"):
        model(input_ids=prompt.ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_a_forward_of_the_longer_sequence(family: str) -> None:
    """Against our own prefill, which the other tests hold to a reference: nothing in the cache is approximate."""
    model, prompt = family_model(family), batch(family, (1, 1))
    groups, forced = pick_groups(prompt.widths()), forced_tokens(prompt, 4)
    longer = FamilyPrompt(
        family,
        tuple(
            type(row)(row.ids + more.tolist(), row.kinds + [0] * len(more), row.parts, row.starts)
            for row, more in zip(prompt.rows, forced, strict=True)
        ),
    )
    with vlmprune.applied(model, FixedGroups(kept=groups)):
        _, steps = rollout(model, prompt, forced)
        whole = prefill(model, longer).logits[:, -4:]
    assert_close(steps, whole)
