"""What cannot be served is refused, before or at the first forward, with a message that names the way out."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from fixed_policy import FixedKeep
from llava_prompts import LlavaPrompt, N, decode, make_prompt, pick_tokens, prefill, small_llava
from masked_reference import hidden_keys
from recording import Recording
from torch import nn

import vlmprune
from vlmprune.core.context import Context
from vlmprune.core.errors import ActiveError, InputError, SignalError, UnsupportedError, VlmpruneError
from vlmprune.core.selection import Selection
from vlmprune.core.signals import ColumnMass
from vlmprune.core.sites import Site
from vlmprune.embedded.tiny_configs import IMAGE_TOKEN_ID

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SITES = [pytest.param(None, id="post_encoder"), pytest.param(2, id="layer2")]


def fixed(images: int = 1, where: int | None = None, width: int = N) -> FixedKeep:
    site = Site.POST_ENCODER if where is None else Site.DECODER_LAYER
    return FixedKeep(kept=pick_tokens([width] * images), site=site, layer=where, positions="keep")


# ---- what apply refuses


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
            with pytest.raises(ActiveError, match=r"pruned already.*handle\.remove\(\) first, or compose"):
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


# ---- what a forward refuses


def refused(model: nn.Module, prompt: LlavaPrompt, message: str, **arguments: Any) -> None:
    """The pruned model refuses the call, and is usable afterwards."""
    policy = fixed(sum(prompt.images))
    with vlmprune.applied(model, policy) as handle:
        expected = prefill(model, prompt).logits
        with pytest.raises(VlmpruneError, match=message) as caught:
            prefill(model, prompt, **arguments)
        assert handle.last_error is caught.value
        assert torch.equal(prefill(model, prompt).logits, expected)
        assert handle.last_error is None


@pytest.mark.parametrize("where", SITES)
def test_a_static_cache(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    with (
        vlmprune.applied(model, fixed(where=where)),
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
    refused(model, make_prompt(), f"not on {name}.*past_key_values", past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("where", SITES)
def test_a_sliding_window_that_the_prompt_exceeds(where: int | None, use_cache: bool) -> None:
    model, prompt = small_llava(text="mistral"), make_prompt()
    model.config.text_config.sliding_window = 12
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 12
    with vlmprune.applied(model, fixed(where=where)):
        with pytest.raises(UnsupportedError, match="22 tokens exceeds.*window of 12.*disabled"):
            prefill(model, prompt, use_cache=use_cache)
        with pytest.raises(UnsupportedError, match="window of 12"):
            prefill(model, prompt, use_cache=use_cache, past_key_values=transformers.DynamicCache())


@pytest.mark.parametrize("where", SITES)
def test_a_sliding_window_that_decoding_exceeds(where: int | None) -> None:
    model, prompt = small_llava(text="mistral"), make_prompt()
    model.config.text_config.sliding_window = 24
    forced = torch.full((1, 4), 9)
    with vlmprune.applied(model, fixed(where=where)):
        cache = prefill(model, prompt, use_cache=True).past_key_values
        decode(model, prompt, cache, forced[:, :2])
        cache = prefill(model, prompt, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="25 tokens exceeds.*window of 24"):
            decode(model, prompt, cache, forced)


def test_images_without_a_placeholder() -> None:
    model, prompt = small_llava(), make_prompt()
    text = prompt.ids.masked_fill(prompt.ids == IMAGE_TOKEN_ID, 9)
    with (
        vlmprune.applied(model, fixed()) as handle,
        pytest.raises(InputError, match="no image placeholder; put the processor's image token"),
    ):
        model(**{**prompt.inputs, "input_ids": text})
    assert isinstance(handle.last_error, InputError)


def test_placeholders_that_make_no_whole_image() -> None:
    model, prompt = small_llava(), make_prompt()
    ids = prompt.ids.clone()
    ids[0, 3] = 9
    with (
        vlmprune.applied(model, fixed()),
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
    with vlmprune.applied(model, fixed(where=where)):
        cache = prefill(model, prompt, use_cache=True).past_key_values
        mask = torch.ones(1, 2 * prompt.length, dtype=torch.long)
        with pytest.raises(UnsupportedError, match=message), torch.no_grad():
            model(input_ids=turn, pixel_values=prompt.pixels, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedError, match=message), torch.no_grad():
            model(input_ids=turn, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("where", SITES)
def test_an_image_after_text_that_was_cached_before(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, fixed(where=where)), torch.no_grad():
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
    with vlmprune.applied(model, fixed(where=where)):
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
    settings: dict[str, Any] = {"keep": 1.0} if policy == "uniform" else {"keep": 0.25, "processor": FakeProcessor()}
    with vlmprune.applied(model, policy, **settings):
        assert torch.equal(two_turns(model, prompt, second), expected)
        got = model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
        assert torch.equal(got, static)


class FakeProcessor:
    """Enough of a processor for policies that act on images."""

    def __init__(self) -> None:
        self.image_processor = object()


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
    policy = fixed(where=where)
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


@pytest.mark.parametrize("where", SITES)
def test_cropping_into_the_images(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    absolute = VERSION < (5, 0)
    with vlmprune.applied(model, fixed(where=where)):
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
    with vlmprune.applied(model, fixed(where=where)) as handle:
        cache = prefill(model, prompt, use_cache=True).past_key_values
        token = torch.tensor([[9]])
        with handle.disabled(), pytest.raises(UnsupportedError, match="was pruned.*needs a fresh one"):
            decode(model, prompt, cache, token)
        decode(model, prompt, cache, token)


@pytest.mark.parametrize("where", SITES)
def test_masks_that_do_not_fit_a_pruned_cache(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, fixed(where=where)), torch.no_grad():
        cache = prefill(model, prompt, use_cache=True).past_key_values
        call = {"input_ids": torch.tensor([[9]]), "past_key_values": cache}
        position = torch.tensor([[prompt.length]])
        with pytest.raises(UnsupportedError, match="one column per token of the whole conversation"):
            model(**call, attention_mask=torch.ones(1, 5, dtype=torch.long), position_ids=position)
        square = torch.ones(1, 1, 1, prompt.length + 1, dtype=torch.bool)
        with pytest.raises(UnsupportedError, match="2-D attention masks"):
            model(**call, attention_mask=square, position_ids=position)


def test_gradient_checkpointing_in_training() -> None:
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, fixed(where=2)) as handle:
        model.gradient_checkpointing_enable()
        prefill(model, prompt)  # eval mode does not checkpoint
        model.train()
        with pytest.raises(UnsupportedError, match=r"gradient_checkpointing_disable\(\)"):
            model(**prompt.inputs)
        with handle.disabled():
            model(**prompt.inputs)
        model.gradient_checkpointing_disable()
        model(**prompt.inputs)


# ---- threads


@dataclass(frozen=True)
class Waiting(FixedKeep):
    """Waits inside its selection until it is released."""

    def select(self, context: Context) -> Selection:
        if threading.current_thread().name == "first":
            ENTERED.set()
            assert RELEASE.wait(30)
        return super().select(context)


ENTERED, RELEASE = threading.Event(), threading.Event()


@pytest.mark.parametrize("where", SITES)
def test_two_threads_on_one_model(where: int | None) -> None:
    """The second call is refused, and the first one is not disturbed."""
    model, prompt = small_llava(), make_prompt()
    plain = fixed(where=where)
    policy = Waiting(kept=plain.kept, site=plain.site, layer=where, positions="keep")
    ENTERED.clear()
    RELEASE.clear()
    results: list[Any] = []
    with vlmprune.applied(model, policy) as handle:
        expected = prefill(model, prompt).logits
        first = threading.Thread(target=lambda: results.append(prefill(model, prompt).logits), name="first")
        first.start()
        try:
            assert ENTERED.wait(30)
            for _ in range(2):
                with pytest.raises(ActiveError, match="Another thread.*one model copy per thread"):
                    prefill(model, prompt)
                with pytest.raises(ActiveError, match="Another thread"), torch.no_grad():
                    model.model.language_model(inputs_embeds=torch.zeros(1, 3, 32))
        finally:
            RELEASE.set()
            first.join(30)
        assert len(results) == 1 and torch.equal(results[0], expected)
        assert torch.equal(prefill(model, prompt).logits, expected)
        assert handle.last_error is None


def test_images_encoded_by_another_thread_in_between() -> None:
    """``generate`` of transformers 5.23 encodes before the first forward; such signals are never taken for ours."""
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, "hiprune", keep=0.5) as handle:
        expected = prefill(model, prompt).logits

        def encode(*_: Any) -> None:
            other = threading.Thread(target=lambda: model.model.get_image_features(pixel_values=prompt.pixels * 2))
            other.start()
            other.join(30)

        between = model.model.multi_modal_projector.register_forward_hook(
            lambda *_: encode() if threading.current_thread() is threading.main_thread() else None
        )
        with pytest.raises(ActiveError, match="Another thread encoded images.*one model copy per thread"):
            prefill(model, prompt)
        between.remove()
        assert torch.equal(prefill(model, prompt).logits, expected)
        assert handle.last_error is None
