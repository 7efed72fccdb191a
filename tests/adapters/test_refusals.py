"""What cannot be served is refused at ``apply``, with a message that names the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from llava_prompts import N, small_llava
from recording import Recording
from torch import nn

import vlmprune
from vlmprune.core.errors import ActiveError, InputError, SignalError, UnsupportedError
from vlmprune.core.signals import ColumnMass


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ("hiprun", {"keep": 0.5}, "Unknown policy 'hiprun'.*'hiprune'"),
        ("hiprune", {"keeps": 0.5}, "no parameter 'keeps'.*'keep'"),
        ("hiprune", {"keep": 0}, "at least 1 token"),
        ("hiprune", {"keep": 0.0}, r"\(0, 1\]"),
        ("hiprune", {"keep": -0.5}, r"\(0, 1\]"),
        ("hiprune", {"keep": -3}, "at least 1 token"),
        ("hiprune", {"keep": 1.5}, r"\(0, 1\].*integer"),
        ("hiprune", {"keep": float("nan")}, r"\(0, 1\]"),
        ("hiprune", {"keep": True}, "is not a budget.*0.33"),
        ("hiprune", {"keep": N + 1}, f"{N} visual tokens per image.*at most {N}"),
        (["uniform", "hiprune"], {"keep": 0.5}, "one keep per policy, a list"),
        (["uniform", "random"], {"keep": [0.5, N + 1]}, f"at most {N}"),
        ([], {}, "is no policy; give a name"),
        ("settings.yaml", {}, "'settings.yaml' does not exist"),
        ("downsample", {"keep": 0.25}, "give processor="),
    ],
    ids=str,
)
def test_settings(policy: Any, settings: dict[str, Any], message: str) -> None:
    model = small_llava()
    with pytest.raises(InputError, match=message) as caught:
        vlmprune.apply(model, policy, **settings)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert "_vlmprune" not in model.__dict__


def other_models() -> dict[str, nn.Module]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    return {"BertModel": bert, "GPT2LMHeadModel": gpt2, "Linear": nn.Linear(2, 2)}


@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel", "Linear"])
def test_a_model_that_takes_no_images(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} is not a model.*supported families.*LlavaForCond"):
        vlmprune.apply(other_models()[name], "hiprune", keep=0.5)


def test_something_that_is_no_model() -> None:
    with pytest.raises(UnsupportedError, match="Expected a torch model, got str"):
        vlmprune.apply("llava", "hiprune", keep=0.5)


def test_a_bare_decoder_needs_spans() -> None:
    decoder = small_llava().model.language_model
    with pytest.raises(UnsupportedError, match="LlamaModel takes no images.*spans=.*pass the whole model"):
        vlmprune.apply(decoder, "uniform", keep=0.5)
    with pytest.raises(InputError, match="LlamaModel has no vision tower"):
        vlmprune.apply(decoder, "hiprune", keep=0.5, spans=[[(3, N)]])
    with pytest.raises(SignalError, match=r"LlamaModel cannot give \(it has no vision tower\).*available"):
        vlmprune.apply(decoder, Recording(wanted=(ColumnMass("vision", 1),)), spans=[[(3, N)]])


def test_spans_are_for_bare_decoders() -> None:
    with pytest.raises(UnsupportedError, match="spans is for bare decoders"):
        vlmprune.apply(small_llava(), "uniform", keep=0.5, spans=[[(3, N)]])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[(3, N)], [(3, N)], [(3, N)]], "spans has 3 rows, but the batch has 2"),
        ([[(10, N)]], "fewer than the spans"),
        ([[(3, 8), (5, 8)]], "ascending and disjoint"),
        ([[(3, 0)]], "ascending and disjoint"),
    ],
    ids=str,
)
def test_spans_that_do_not_fit(spans: Any, message: str) -> None:
    decoder = small_llava().model.language_model
    embeds = torch.randn(2, 22, 32)
    with vlmprune.applied(decoder, "uniform", keep=0.5, spans=spans), pytest.raises(InputError, match=message):
        decoder(inputs_embeds=embeds)


def test_a_second_apply() -> None:
    model = small_llava()
    with vlmprune.applied(model, "uniform", keep=0.5):
        for settings in (("hiprune", 0.5), ("uniform", 0.5)):
            with pytest.raises(ActiveError, match=r"pruned already.*handle\.remove\(\) first .*, or compose"):
                vlmprune.apply(model, settings[0], keep=settings[1])
    with vlmprune.applied(model, "hiprune", keep=0.5):
        pass


def test_a_pixtral_tower() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=small_llava().config.text_config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(UnsupportedError, match="'pixtral' tower is not supported.*clip_vision_model"):
        vlmprune.apply(model, "uniform", keep=0.5)


@pytest.mark.parametrize(
    ("vision", "strategy", "expected"), [("clip", "full", "default"), ("siglip", "default", "full")]
)
def test_a_select_strategy_that_shifts_the_grid(vision: str, strategy: str, expected: str) -> None:
    model = small_llava(vision)
    model.config.vision_feature_select_strategy = strategy
    with pytest.raises(UnsupportedError, match=f"strategy='{strategy}'.*expected '{expected}'"):
        vlmprune.apply(model, "uniform", keep=0.5)


def test_a_feature_layer_without_a_block() -> None:
    model = small_llava()
    model.config.vision_feature_layer = 0
    with pytest.raises(UnsupportedError, match="vision_feature_layer=0.*no block feeds the projector"):
        vlmprune.apply(model, "uniform", keep=0.5)


def test_flex_attention() -> None:
    model = small_llava()
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="flex_attention.*use 'sdpa' or 'eager'"):
        vlmprune.apply(model, "uniform", keep=0.5)
