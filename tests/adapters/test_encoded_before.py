"""Images that were encoded before the forward: their signals are used, another image's never."""

from __future__ import annotations

import inspect

import pytest
import torch
from llava_prompts import make_prompt, small_llava

import vlmprune
from vlmprune.core.errors import SignalError


@pytest.mark.parametrize("policy", ["hiprune", "random"])
def test_features_of_an_earlier_run_are_refused(policy: str) -> None:
    model, first, second = small_llava(), make_prompt((1,), seed=1), make_prompt((1,), seed=2)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers encodes images inside the forward only")
    with torch.no_grad(), vlmprune.applied(model, policy, keep=0.5) as handle:
        expected = model(**first.inputs).logits
        kept = handle.last.kept()
        early = model.model.get_image_features(pixel_values=first.pixels)
        given = {"input_ids": first.ids, "attention_mask": first.real.long()}
        assert torch.equal(model(**given, mm_encoder_outputs={"image": early}).logits, expected)
        assert handle.last.kept() == kept
        model.model.get_image_features(pixel_values=second.pixels)
        with pytest.raises(SignalError, match="not those that were encoded last"):
            model(**given, mm_encoder_outputs={"image": early})
