"""``generate`` on every pruned family gives what the dense model gives with the dropped tokens hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, decode, prefill
from family_runs import (
    FAMILIES,
    VERSION,
    VIDEO,
    batch,
    family_model,
    fixed_eviction,
    fixed_policy,
    forced_tokens,
    masked,
)
from prompt_styles import STYLES
from torch import Tensor, nn

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core.errors import UnsupportedError
from vlmprune.embedded.random_models import tokens as t

NEW = 5
NO_WORDS = [t.IMAGE_TOKEN_ID, t.VIDEO_TOKEN_ID, t.START_ID]
"""Never generated: random weights may well name them."""
MODES: dict[str, tuple[dict[str, Any], int | None]] = {  # settings, and the layer of the cut
    "greedy": ({}, None),
    "greedy-layer2": ({}, 2),
    "sampling": ({"do_sample": True, "temperature": 1.5, "top_k": 20}, None),
    "several-samples": ({"do_sample": True, "num_return_sequences": 2}, 2),
    "beams": ({"num_beams": 3}, 1),
    "two-beams-returned": ({"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}, None),
    "no-cache": ({"use_cache": False}, 1),
}


def generate(model: nn.Module, given: dict[str, Any], **mode: Any) -> Any:
    torch.manual_seed(5)
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "suppress_tokens": NO_WORDS,
    }
    with torch.no_grad():
        return model.generate(**given, **{**settings, **mode})


def assert_same(got: Any, expected: Any, tolerance: float = 1e-6) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.scores) == len(expected.scores)
    for step, reference in zip(got.scores, expected.scores, strict=True):
        assert torch.allclose(step, reference, rtol=tolerance, atol=tolerance)


def in_both(model: nn.Module, prompt: FamilyPrompt, policy: Any) -> tuple[Any, Any]:
    """The masked dense model and the pruned one, as contexts."""
    return masked(model, prompt, policy), vlmprune.applied(model, policy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_masked_dense_model(family: str, mode: str) -> None:
    """Before transformers 5.23 ``generate`` repeats images one by one where it repeats rows, which mixes up several in
    a row."""
    settings, where = MODES[mode]
    repeats = "num_beams" in settings or "num_return_sequences" in settings
    images = (1, 0, 1) if repeats and VERSION < (5, 23) else (2, 0, 1)
    model, prompt = family_model(family), batch(family, images)
    policy = fixed_policy(prompt, where)
    results = []
    for context in in_both(model, prompt, policy):
        with context:
            results.append(generate(model, prompt.inputs, **settings))
    assert_same(results[1], results[0])
    dense = generate(model, prompt.inputs, **settings)
    assert (dense.scores[0] - results[1].scores[0]).abs().nan_to_num(0, 0, 0).max() > 1e-3


@pytest.mark.parametrize("mode", ["beams", "several-samples", "no-cache"])
@pytest.mark.parametrize("family", VIDEO)
def test_videos(family: str, mode: str) -> None:
    if family == "qwen3_vl" and VERSION < (5, 0) and mode != "no-cache":
        pytest.skip("transformers 4 cannot repeat the rows of Qwen3-VL's videos")
    settings, where = MODES[mode]
    images = (1, 0, 1) if VERSION < (5, 23) else (1, 2, 0)
    model, prompt = family_model(family), batch(family, images, video=True)
    policy = fixed_policy(prompt, where)
    results = []
    for context in in_both(model, prompt, policy):
        with context:
            results.append(generate(model, prompt.inputs, **settings))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("policy", ["hiprune", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_beam_keeps_what_its_row_keeps_alone(family: str, policy: str) -> None:
    """Signals and seeds come from the one encoding of each image, before or after ``generate`` repeats rows."""
    # Before transformers 5.23 InternVL's tiles are repeated one by one, which mixes up several in an image.
    sizes = ((24, 24),) if family == "internvl" and VERSION < (5, 23) else None
    model, prompt = family_model(family), batch(family, (1, 0, 1), sizes=sizes)
    with vlmprune.applied(model, policy, keep=0.3) as handle:
        prefill(model, prompt)
        alone = [handle.last.kept(row) for row in (0, 2)]
        generate(model, prompt.inputs, num_beams=2, max_new_tokens=1)
        assert handle.last.n_samples == 6
        assert [handle.last.kept(row) for row in (0, 1, 4, 5)] == [alone[0], alone[0], alone[1], alone[1]]
    assert alone[0] != alone[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_evicted_caches(family: str) -> None:
    model, prompt = family_model(family), batch(family)
    results = []
    for context in in_both(model, prompt, fixed_eviction(prompt)):
        with context:
            results.append(generate(model, prompt.inputs))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates from the prompt; the rejected ones are cropped from the pruned cache."""
    model, prompt = family_model(family), batch(family, (1,), False)
    policy = fixed_policy(prompt, 2)
    cropped: list[int] = []
    crop = PrunedDynamicCache.crop

    def spy(cache: PrunedDynamicCache, length: int) -> None:
        before = cache.stored()
        crop(cache, length)
        cropped.append(before - cache.stored())

    monkeypatch.setattr(PrunedDynamicCache, "crop", spy)
    settings = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "max_new_tokens": 10}
    words = every_word(prompt)
    results = []
    for context in in_both(model, words, policy):
        with context:
            results.append(generate(model, words.inputs, **settings))
            if not results[1:]:
                assert not cropped
    with vlmprune.applied(model, policy):
        greedy = generate(model, words.inputs, max_new_tokens=10)
    assert_same(results[1], results[0])
    assert torch.equal(results[1].sequences, greedy.sequences)
    assert any(cropped)


def every_word(prompt: FamilyPrompt) -> FamilyPrompt:
    """The prompt with all text tokens behind its images, so that every generated token has a match there."""
    [row] = prompt.rows
    words = list(range(t.FIRST_TEXT, t.LAST_TEXT + 1))
    longer = type(row)(row.ids + words, row.kinds + [0] * len(words), row.parts, row.starts)
    return FamilyPrompt(prompt.family, (longer,))


@pytest.mark.parametrize("where", [None, 2], ids=["post_encoder", "layer2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_cache_is_continued(family: str, where: int | None) -> None:
    """A second ``generate`` with the whole conversation as text and the first one's cache."""
    model, prompt = family_model(family), batch(family, (1, 2))
    policy, turn = fixed_policy(prompt, where), forced_tokens(prompt, 4)
    results = []
    for context in in_both(model, prompt, policy):
        with context:
            first = generate(model, prompt.inputs)
            given = conversation(prompt, torch.cat([first.sequences, turn], 1))
            results.append(generate(model, given, past_key_values=first.past_key_values))
    assert_same(results[1], results[0])
    assert isinstance(first.past_key_values, PrunedDynamicCache)


def conversation(prompt: FamilyPrompt, ids: Tensor) -> dict[str, Tensor]:
    """Inputs without pixels for a conversation that starts with the prompt."""
    new = ids.shape[1] - prompt.length
    given = {name: prompt.inputs[name] for name in ("attention_mask", "token_type_ids") if name in prompt.inputs}
    filled = {"attention_mask": 1, "token_type_ids": 0}
    return {
        "input_ids": ids,
        **{name: torch.cat([value, value.new_full((len(ids), new), filled[name])], 1) for name, value in given.items()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_image_turn_is_refused(family: str) -> None:
    model = family_model(family)
    first, second = (batch(family, (1,), False, seed=seed) for seed in (1, 2))
    mask = torch.ones(1, first.length + second.length, dtype=torch.long)
    turn = {**second.inputs, "attention_mask": mask}
    for where in (None, 2):
        with vlmprune.applied(model, fixed_policy(first, where)), torch.no_grad():
            cache = prefill(model, first, use_cache=True).past_key_values
            with pytest.raises(UnsupportedError, match="KV cache already holds tokens.*fresh cache and the whole"):
                model(**turn, past_key_values=cache)
            decode(model, first, cache, forced_tokens(first, 2))  # the cache is as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_is_refused(family: str) -> None:
    model = family_model(family)
    prompt = batch(family, (1,), False)
    with (
        vlmprune.applied(model, fixed_policy(prompt)),
        pytest.raises(UnsupportedError, match=r"DynamicCache, not on StaticCache.*cache_implementation.*disabled"),
    ):
        generate(model, prompt.inputs, cache_implementation="static")
    for module in (model, getattr(model, "model", model)):
        module.__dict__.pop("_cache", None)  # transformers 4 keeps the static cache of the failed call


def test_every_family_has_a_style() -> None:
    assert set(STYLES) == set(FAMILIES)
