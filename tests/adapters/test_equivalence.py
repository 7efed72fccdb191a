"""A pruned model equals an independent reference: the dense model with dropped tokens hidden, or on a short prompt."""

from __future__ import annotations

import pytest
import torch
from fixed_policy import FixedKeep, MeanGroups
from llava_prompts import LlavaPrompt, N, decode, make_prompt, pick_tokens, prefill
from masked_reference import hidden_keys
from torch import Tensor, nn

import vlmprune
from vlmprune.core.sites import Site
from vlmprune.embedded.tiny_configs import IMAGE_TOKEN_ID, random_llava

STEPS = 10
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def rollout(model: nn.Module, prompt: LlavaPrompt, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Prefill logits ``[B, L, V]`` and logits ``[B, S, V]`` of teacher-forced decode steps."""
    out = prefill(model, prompt, use_cache=True)
    return out.logits, decode(model, prompt, out.past_key_values, forced)


CASES = [
    pytest.param((1,), False, False, id="single"),
    pytest.param((2,), False, False, id="two-images"),
    pytest.param((1, 1, 1), False, False, id="batch"),
    pytest.param((1, 1, 1), True, False, id="left-padded"),
    pytest.param((1, 1, 1), False, True, id="ragged"),
    pytest.param((2, 1, 0), True, True, id="mixed"),
]


# Eager attention in float64 with left padding is NaN in transformers' own dense model, so eager runs in float32 only.
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)]
)
@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize(("images", "padded", "ragged"), CASES)
def test_equals_the_masked_dense_model(
    images: tuple[int, ...], padded: bool, ragged: bool, where: int, dtype: torch.dtype, implementation: str
) -> None:
    model = random_llava(dtype=dtype, attn_implementation=implementation, kv_heads=2)
    prompt = make_prompt(images, padded, dtype)
    site = Site.DECODER_LAYER if where else Site.POST_ENCODER
    kept = pick_tokens([N * n for n in images if n] if where else [N] * sum(images), ragged)
    policy = FixedKeep(kept=kept, site=site, layer=where or None, positions="keep")
    forced = torch.randint(8, 60, (len(images), STEPS), generator=torch.Generator().manual_seed(9))

    dropped = prompt.dropped(kept, site)
    layers = model.model.language_model.layers
    by_layer = {i: dropped for i in range(len(layers)) if i >= where}
    with hidden_keys(layers, by_layer, prompt.real):
        expected, expected_steps = rollout(model, prompt, forced)
    dense, _ = rollout(model, prompt, forced[:, :1])
    with vlmprune.applied(model, policy) as handle:
        got, got_steps = rollout(model, prompt, forced)
        assert handle.last is not None
        assert handle.last.kept_tokens == tuple(
            sum(len(k) for k, row in zip(kept, rows(prompt, site), strict=True) if row == b) for b in range(len(images))
        )

    tolerance = TOLERANCE[dtype]
    stay = prompt.real & ~dropped
    scale = expected[stay].abs().max()
    assert (got[stay] - expected[stay]).abs().max() <= tolerance * max(1, scale)
    assert (got_steps - expected_steps).abs().max() <= tolerance * max(1, scale)
    assert (dense[:, -1] - expected[:, -1]).abs().max() > 1e-2  # the reference does discriminate
    assert got.shape == dense.shape
    assert not got[dropped].isnan().any()


def rows(prompt: LlavaPrompt, site: Site) -> list[int]:
    """Row of each item."""
    images = [row for row, count in enumerate(prompt.images) for _ in range(count)]
    return images if site == Site.POST_ENCODER else sorted(set(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("images", "padded", "ragged"), CASES)
def test_compact_positions_equal_the_dense_model_on_the_short_prompt(
    images: tuple[int, ...], padded: bool, ragged: bool, dtype: torch.dtype
) -> None:
    model = random_llava(dtype=dtype)
    prompt = make_prompt(images, padded, dtype)
    kept = pick_tokens([N] * sum(images), ragged)
    dropped = prompt.dropped(kept)
    forced = torch.randint(8, 60, (len(images), STEPS), generator=torch.Generator().manual_seed(9))
    with vlmprune.applied(model, FixedKeep(kept=kept, positions="compact")):
        got, got_steps = rollout(model, prompt, forced)
    for row in range(len(images)):
        expected, expected_steps = short_rollout(model, prompt, row, prompt.real[row] & ~dropped[row], forced[row])
        stay = (prompt.real & ~dropped)[row]
        assert torch.allclose(got[row][stay], expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)
        assert torch.allclose(got_steps[row], expected_steps, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)


def short_rollout(
    model: torch.nn.Module, prompt: LlavaPrompt, row: int, stay: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """The dense model on one row's shortened ``inputs_embeds``, with plain positions."""
    base = model.model
    first = sum(prompt.images[:row])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt.ids[row : row + 1])
        if prompt.images[row]:
            pixels = prompt.pixels[first : first + prompt.images[row]]
            features = base.get_image_features(pixel_values=pixels)
            features = getattr(features, "pooler_output", features)
            mask = (prompt.ids[row] == IMAGE_TOKEN_ID)[None, :, None].expand_as(embeds)
            embeds = embeds.masked_scatter(mask, torch.cat(list(features)).to(embeds.dtype))
        out = base.language_model(inputs_embeds=embeds[:, stay], use_cache=True)
        logits, cache, steps = model.lm_head(out.last_hidden_state)[0], out.past_key_values, []
        for token in forced:
            embed = model.get_input_embeddings()(token[None, None])
            out = base.language_model(inputs_embeds=embed, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(model.lm_head(out.last_hidden_state)[0, -1])
    return logits, torch.stack(steps)


def test_compact_inside_the_decoder_renumbers_survivors_and_later_tokens() -> None:
    """Layers from the cut on equal those layers run on the survivors with plain positions."""
    model = random_llava(dtype=torch.float64)
    prompt = make_prompt((1,), False, torch.float64)
    kept = pick_tokens([N])
    stay = ~prompt.dropped(kept, Site.DECODER_LAYER)[0]
    text = model.model.language_model
    entering: list[Tensor] = []
    spy = text.layers[2].register_forward_pre_hook(lambda m, a, k: entering.append(a[0]), with_kwargs=True)
    forced = torch.randint(8, 60, (1, 3))
    rollout(model, prompt, forced)
    spy.remove()
    policy = FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=2, positions="compact")
    with vlmprune.applied(model, policy):
        got, steps = rollout(model, prompt, forced)
    # Layers 0 and 1 see the full prompt at decode too, so their outputs are the dense ones.
    with torch.no_grad():
        hidden = torch.cat([entering[0][:, stay], *entering[1:]], 1)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = text.rotary_emb(hidden, positions)
        n = hidden.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        for layer in list(text.layers)[2:]:
            out = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
            hidden = out[0] if isinstance(out, tuple) else out
        logits = model.lm_head(text.norm(hidden))[0]
    n_prompt = int(stay.sum())
    assert torch.allclose(got[0][stay], logits[:n_prompt], atol=1e-9)
    assert torch.allclose(steps[0], logits[n_prompt:], atol=1e-9)


def test_merging_equals_the_dense_model_on_merged_embeddings() -> None:
    model = random_llava(dtype=torch.float64)
    prompt = make_prompt((1,), False, torch.float64)
    with vlmprune.applied(model, MeanGroups(positions="compact")) as handle, torch.no_grad():
        got = model(**prompt.inputs).logits[0]
        assert handle.last is not None and handle.last.kept_tokens == (N // 2,)
        assert handle.last.groups() == [[2 * i, 2 * i + 1] for i in range(N // 2)]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt.ids)
        features = model.model.get_image_features(pixel_values=prompt.pixels)
        merged = torch.cat(list(getattr(features, "pooler_output", features))).view(N // 2, 2, -1).mean(1)
        short = torch.cat([embeds[:, :3], merged[None], embeds[:, 3 + N :]], 1)
        expected = model.lm_head(model.model.language_model(inputs_embeds=short).last_hidden_state)[0]
    stay = torch.ones(prompt.ids.shape[1], dtype=torch.bool)
    stay[3 : 3 + N] = torch.arange(N) % 2 == 0
    assert torch.allclose(got[stay], expected, atol=1e-6)  # merges accumulate in float32 or wider


@pytest.mark.parametrize("text", ["qwen2", "mistral"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_other_towers_and_decoders(vision: str, text: str) -> None:
    model = random_llava(vision, text, dtype=torch.float64)
    prompt = make_prompt((1, 1), True, torch.float64)
    kept = pick_tokens([N, N], ragged=True)
    dropped = prompt.dropped(kept)
    forced = torch.randint(8, 60, (2, 3))
    layers = model.model.language_model.layers
    with hidden_keys(layers, dict.fromkeys(range(len(layers)), dropped), prompt.real):
        expected, expected_steps = rollout(model, prompt, forced)
    with vlmprune.applied(model, FixedKeep(kept=kept, positions="keep")):
        got, steps = rollout(model, prompt, forced)
    stay = prompt.real & ~dropped
    assert torch.allclose(got[stay], expected[stay], atol=1e-9)
    assert torch.allclose(steps, expected_steps, atol=1e-9)
