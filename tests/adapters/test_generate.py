"""``generate`` on a pruned model gives what the dense model gives with the dropped tokens hidden, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import LlavaPrompt, decode, fixed_keep, make_prompt, prefill, small_llava
from masked_reference import hidden_keys
from torch import Tensor, nn

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.embedded.tiny_configs import IMAGE_TOKEN_ID

NEW = 6
SITES = [pytest.param(None, id="post_encoder"), pytest.param(2, id="layer2")]
PROMPTS = {
    "single": ((1,), False),
    "left-padded": ((1, 1, 1), True),
    "two-images": ((2, 1), True),
    "mixed": ((1, 0, 2), True),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "two-beams-returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "no-cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_llava(dtype=torch.float64)


def generate(model: nn.Module, prompt: LlavaPrompt, **mode: Any) -> Any:
    torch.manual_seed(5)
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "suppress_tokens": [IMAGE_TOKEN_ID],  # random weights may well name it
    }
    with torch.no_grad():
        return model.generate(**prompt.inputs, **{**settings, **mode})


def masked(model: nn.Module, prompt: LlavaPrompt, policy: FixedKeep) -> Any:
    """The dense model with the policy's dropped tokens hidden."""
    layers = model.model.language_model.layers
    dropped = prompt.dropped(policy.kept, policy.site)
    return hidden_keys(layers, dict.fromkeys(range(policy.layer or 0, len(layers)), dropped), prompt.real)


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.scores) == len(expected.scores)
    for step, reference in zip(got.scores, expected.scores, strict=True):
        assert torch.allclose(step, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("form", PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_masked_dense_model(model: nn.Module, mode: str, form: str, where: int | None) -> None:
    """On transformers before 5.23 dense beams mix up the images of samples with several images (the pixels are
    repeated image by image); pruned and reference then share the mix-up."""
    prompt = make_prompt(*PROMPTS[form], dtype=torch.float64)
    policy = fixed_keep(prompt.images, where, ragged=True)
    with masked(model, prompt, policy):
        expected = generate(model, prompt, **MODES[mode])
    with vlmprune.applied(model, policy):
        got = generate(model, prompt, **MODES[mode])
    assert_same(got, expected)
    dense = generate(model, prompt, **MODES[mode])
    assert (dense.scores[0] - got.scores[0]).abs().nan_to_num(0, 0, 0).max() > 1e-3  # the reference discriminates


@pytest.mark.parametrize("where", SITES)
def test_prompt_lookup(model: nn.Module, where: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates from the prompt; the rejected ones are cropped from the pruned cache."""
    plain = make_prompt((1,), dtype=torch.float64)
    every_word = torch.cat([torch.arange(3, 5), torch.arange(6, 64)])[None]  # so that every token has a match
    ids = torch.cat([plain.ids[:, :1], every_word, plain.ids[:, 1:]], 1)
    prompt = LlavaPrompt(ids, torch.ones_like(ids, dtype=torch.bool), plain.pixels, (1,))
    policy = fixed_keep(prompt.images, where, ragged=True)
    cropped: list[int] = []
    crop = PrunedDynamicCache.crop

    def spy(cache: PrunedDynamicCache, length: int) -> None:
        before = cache.stored()
        crop(cache, length)
        cropped.append(before - cache.stored())

    monkeypatch.setattr(PrunedDynamicCache, "crop", spy)
    settings = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "max_new_tokens": 12}
    with masked(model, prompt, policy):
        expected = generate(model, prompt, **settings)
    assert not cropped
    with vlmprune.applied(model, policy):
        got = generate(model, prompt, **settings)
        greedy = generate(model, prompt, max_new_tokens=12)
    assert_same(got, expected)
    assert torch.equal(got.sequences, greedy.sequences)
    assert any(cropped)


@pytest.mark.parametrize("where", SITES)
def test_a_text_turn_on_a_pruned_cache(model: nn.Module, where: int | None) -> None:
    prompt = make_prompt((2, 1), True, torch.float64)
    policy = fixed_keep(prompt.images, where, ragged=True)
    turn = torch.randint(8, 60, (2, 4), generator=torch.Generator().manual_seed(2))
    results = []
    for context in (masked(model, prompt, policy), vlmprune.applied(model, policy)):
        with context:
            out = prefill(model, prompt, use_cache=True)
            results.append(decode(model, prompt, out.past_key_values, turn, turn=True))
    assert torch.allclose(results[1], results[0], atol=1e-9)


@pytest.mark.parametrize("where", SITES)
def test_generate_goes_on_from_a_pruned_cache(model: nn.Module, where: int | None) -> None:
    """A second ``generate`` with the whole conversation and the first one's cache."""
    prompt = make_prompt((1, 1), True, torch.float64)
    policy = fixed_keep(prompt.images, where, ragged=True)
    turn = torch.randint(8, 60, (2, 4), generator=torch.Generator().manual_seed(2))
    results = []
    for context in (masked(model, prompt, policy), vlmprune.applied(model, policy)):
        with context:
            first = generate(model, prompt)
            ids = torch.cat([first.sequences, turn], 1)
            new = ids.new_ones(2, ids.shape[1] - prompt.length)
            second = model.generate(
                input_ids=ids,
                attention_mask=torch.cat([prompt.real.long(), new], 1),
                past_key_values=first.past_key_values,
                max_new_tokens=4,
                do_sample=False,
                suppress_tokens=[IMAGE_TOKEN_ID],
                output_scores=True,
                return_dict_in_generate=True,
            )
            results.append(second)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("mode", ["greedy", "beams", "no-cache"])
def test_compact_positions_equal_generation_from_short_embeddings(
    model: nn.Module, mode: str, where: int | None
) -> None:
    """After the encoder. In a decoder layer the cached and the uncached run, and any batch, must agree."""
    prompt = make_prompt((1, 1) if mode == "beams" else (1, 2), True, torch.float64)
    policy = fixed_keep(prompt.images, where, ragged=True)
    policy = FixedKeep(kept=policy.kept, site=policy.site, layer=where, positions="compact")
    with vlmprune.applied(model, policy):
        got = generate(model, prompt, **MODES[mode])
    for row in range(2):
        alone = prompt.row(row)
        if where is None:
            expected = model.generate(
                inputs_embeds=short_embeddings(model, alone, prompt.dropped(policy.kept)[row]),
                max_new_tokens=NEW,
                do_sample=False,
                suppress_tokens=[IMAGE_TOKEN_ID],
                **MODES[mode],
            )
        else:
            one = FixedKeep(kept=(policy.kept[row],), site=policy.site, layer=where, positions="compact")
            with vlmprune.applied(model, one):
                cached = {key: value for key, value in MODES[mode].items() if key != "use_cache"}
                expected = generate(model, alone, **cached).sequences[:, alone.length :]
        assert torch.equal(got.sequences[row, prompt.length :][: expected.shape[1]], expected[0])


@torch.no_grad()
def short_embeddings(model: nn.Module, prompt: LlavaPrompt, dropped: Tensor) -> Tensor:
    """``[1, n, D]`` embeddings of one unpadded prompt without the dropped tokens."""
    features = model.model.get_image_features(pixel_values=prompt.pixels)
    features = torch.cat(list(getattr(features, "pooler_output", features)))
    embeds = model.get_input_embeddings()(prompt.ids)
    embeds[prompt.ids == model.config.image_token_index] = features
    return embeds[:, ~dropped[-prompt.length :]]


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_samples_without_images_are_left_alone(model: nn.Module, mode: str) -> None:
    prompt = make_prompt((0, 0), True, torch.float64)
    expected = generate(model, prompt, **MODES[mode])
    with vlmprune.applied(model, "hiprune", keep=0.25) as handle:
        got = generate(model, prompt, **MODES[mode])
        assert handle.last is None
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))


@pytest.mark.parametrize("mode", ["greedy", "beams", "several-samples", "no-cache"])
@pytest.mark.parametrize("name", ["hiprune", "todre", "random"])
def test_every_beam_keeps_what_its_image_alone_keeps(model: nn.Module, mode: str, name: str) -> None:
    """Signals are read once per image, before or after ``generate`` repeats the rows."""
    prompt = make_prompt((1, 1), True, torch.float64)
    alone = []
    settings = {"keep": 0.25, **({"tau": 0.0} if name == "todre" else {})}
    with vlmprune.applied(model, name, **settings) as handle:
        for row in range(2):
            prefill(model, prompt.row(row))
            alone.append(handle.last.kept(0))
        generate(model, prompt, **{**MODES[mode], "max_new_tokens": 2})
        rows = handle.last.n_samples // 2
        assert [handle.last.kept(i) for i in range(2 * rows)] == [alone[i // rows] for i in range(2 * rows)]
    assert alone[0] != alone[1]
    assert rows == max(MODES[mode].get("num_beams", 1), MODES[mode].get("num_return_sequences", 1))
