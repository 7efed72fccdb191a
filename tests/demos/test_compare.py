"""Dense and pruned answers, tokens, times and cache sizes of one question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmprune.core.config import build, resolve
from vlmprune.core.errors import InputError
from vlmprune.demos.compare import chat_prompt, compare, image_placeholder, raw_prompt
from vlmprune.loading import open_image
from vlmprune.plot import draw_tokens, model_view

Loaded = tuple[Any, Any]
PROMPT = "USER: <image>\nwhat shape is red? ASSISTANT:"
SHORT = {"max_new_tokens": 3, "repeats": 2}


def test_answers_are_those_of_plain_calls(tiny_llava: Loaded, picture: Path) -> None:
    model, processor = tiny_llava
    image = open_image(picture)
    result = compare(model, processor, image, PROMPT, build("uniform", {"keep": 20}), **SHORT)
    inputs = processor(images=[image], text=[PROMPT], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result.dense is not None
    assert result.dense.answer == processor.decode(ids, skip_special_tokens=True).strip()
    cache = model(**inputs, use_cache=True).past_key_values
    stored = cache.layers[0].keys.shape[2]
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // stored
    assert result.dense.kv_bytes == stored * per_token
    assert result.pruned.kv_bytes == (stored - 196 + 20) * per_token
    assert (result.dense.visual_tokens, result.pruned.visual_tokens) == (196, 20)
    assert (result.dense.mean_visual_tokens, result.pruned.mean_visual_tokens) == (196, 20)
    assert 0 < result.dense.prefill_ms < result.dense.answer_ms


def test_at_full_budget_both_sides_agree(tiny_llava: Loaded, picture: Path) -> None:
    result = compare(*tiny_llava, open_image(picture), PROMPT, build("hiprune", {"keep": 1.0}), **SHORT)
    assert result.dense is not None
    assert result.pruned.answer == result.dense.answer
    assert result.pruned.kv_bytes == result.dense.kv_bytes
    assert result.pruned.visual_tokens == 196


def test_overlay_shows_the_kept_tokens_on_the_model_view(tiny_llava: Loaded, picture: Path) -> None:
    model, processor = tiny_llava
    image = open_image(picture)
    result = compare(model, processor, image, PROMPT, build("uniform", {"keep": 49}), dense=False, **SHORT)
    tokens = [int((i + 0.5) * 196 / 49) for i in range(49)]  # the definition of `uniform`
    wanted = draw_tokens(model_view(image, processor), (14, 14), tokens)
    assert result.dense is None and result.overlay is not None
    np.testing.assert_array_equal(np.asarray(result.overlay), np.asarray(wanted))


def test_model_and_processor_are_left_alone(tiny_llava: Loaded, picture: Path) -> None:
    model, processor = tiny_llava
    image, image_processor = open_image(picture), processor.image_processor
    inputs = processor(images=[image], text=[PROMPT], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        for policy in ("downsample", "hiprune"):
            compare(model, processor, image, PROMPT, build(policy, {"keep": 0.25}), **SHORT)
        assert torch.equal(model(**inputs).logits, before)
    assert processor.image_processor is image_processor


def test_an_image_site_policy_changes_the_pruned_side_only(tiny_llava: Loaded, picture: Path) -> None:
    model, processor = tiny_llava
    image = open_image(picture)
    policy = build("downsample", {"keep": 0.01})
    result = compare(model, processor, image, PROMPT, policy, **SHORT)
    blurred = np.asarray(result.overlay).astype(float)
    sharp = np.asarray(draw_tokens(model_view(image, processor), (14, 14), range(196))).astype(float)
    assert np.abs(blurred - sharp).mean() > 5
    assert result.report.geometry == [{"size": [320, 240], "reduced_size": [32, 24]}]


def test_a_composition(tiny_llava: Loaded, picture: Path) -> None:
    policy = resolve(["uniform", "grid"], keep=[0.5, 16])
    result = compare(*tiny_llava, open_image(picture), PROMPT, policy, dense=False, overlay=False, **SHORT)
    assert result.pruned.visual_tokens == 16 and result.overlay is None


def test_budget_above_the_model_and_bad_numbers(tiny_llava: Loaded, picture: Path) -> None:
    image = open_image(picture)
    with pytest.raises(InputError, match="at most 196"):
        compare(*tiny_llava, image, PROMPT, build("uniform", {"keep": 197}))
    with pytest.raises(InputError, match="at least 1"):
        compare(*tiny_llava, image, PROMPT, build("uniform", {"keep": 10}), repeats=0)


def test_prompts(tiny_llava: Loaded) -> None:
    processor = tiny_llava[1]
    assert image_placeholder(processor) == "<image>"
    assert chat_prompt(processor, "what shape is red?") == PROMPT
    assert raw_prompt(processor, PROMPT) == PROMPT
    for wrong in ("no image", "<image><image>"):
        with pytest.raises(InputError, match="placeholder"):
            raw_prompt(processor, wrong)
    with pytest.raises(InputError, match="leave it out"):
        chat_prompt(processor, "what is in <image>?")
    with pytest.raises(InputError, match="empty"):
        chat_prompt(processor, " \n")
