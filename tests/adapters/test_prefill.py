"""Prompts in other forms than a processor gives them: padded on the right, without a mask, as embeddings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fixed_policy import FixedKeep, MeanGroups
from llava_prompts import LlavaPrompt, N, decode, fixed_keep, make_prompt, prefill, small_llava
from masked_reference import hidden_keys
from torch import Tensor, nn

import vlmprune
from vlmprune.core.sites import Site


def reference(model: nn.Module, prompt: LlavaPrompt, dropped: Tensor, where: int, **arguments: object) -> Tensor:
    layers = model.model.language_model.layers
    with hidden_keys(layers, dict.fromkeys(range(where, len(layers)), dropped), prompt.real):
        return prefill(model, prompt, **arguments).logits


def padded_on_the_right(prompt: LlavaPrompt) -> LlavaPrompt:
    order = (~prompt.real).long().argsort(dim=1, stable=True)
    return replace(prompt, ids=prompt.ids.gather(1, order), real=prompt.real.gather(1, order))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("where", [None, 0, 2, 3])
def test_right_padding(where: int | None, implementation: str) -> None:
    model = small_llava(attn_implementation=implementation)
    prompt = padded_on_the_right(make_prompt((2, 1, 0), padded=True))
    policy = fixed_keep(prompt.images, where, ragged=True)
    dropped = prompt.dropped(policy.kept, policy.site)
    expected = reference(model, prompt, dropped, where or 0)
    with vlmprune.applied(model, policy):
        got = prefill(model, prompt).logits
    stay = prompt.real & ~dropped
    assert torch.allclose(got[stay], expected[stay], rtol=1e-5, atol=1e-4)
    assert (got[stay] - prefill(model, prompt).logits[stay]).abs().max() > 1e-2


@pytest.mark.parametrize("where", [None, 0, 3])
def test_first_and_last_layer_with_decoding(where: int | None) -> None:
    model, prompt = small_llava(dtype=torch.float64), make_prompt((1, 1), True, torch.float64)
    policy = fixed_keep(prompt.images, where, ragged=True)
    dropped = prompt.dropped(policy.kept, policy.site)
    forced = torch.randint(8, 60, (2, 3), generator=torch.Generator().manual_seed(4))
    layers = model.model.language_model.layers
    with hidden_keys(layers, dict.fromkeys(range(where or 0, len(layers)), dropped), prompt.real):
        out = prefill(model, prompt, use_cache=True)
        expected = decode(model, prompt, out.past_key_values, forced)
    with vlmprune.applied(model, policy):
        out = prefill(model, prompt, use_cache=True)
        got = decode(model, prompt, out.past_key_values, forced)
    assert torch.allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("where", [None, 2])
def test_without_mask_and_positions(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt((2, 2))
    policy = fixed_keep(prompt.images, where, ragged=True)
    dropped = prompt.dropped(policy.kept, policy.site)
    expected = reference(model, prompt, dropped, where or 0)
    with vlmprune.applied(model, policy), torch.no_grad():
        got = model(input_ids=prompt.ids, pixel_values=prompt.pixels).logits
    assert torch.allclose(got[~dropped], expected[~dropped], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", [None, 2])
def test_placeholders_given_as_embeddings(where: int | None) -> None:
    model, prompt = small_llava(), make_prompt((2, 1), padded=True)
    policy = fixed_keep(prompt.images, where, ragged=True)
    with vlmprune.applied(model, policy), torch.no_grad():
        expected = prefill(model, prompt).logits
        embeds = model.get_input_embeddings()(prompt.ids)
        got = model(
            inputs_embeds=embeds,
            attention_mask=prompt.real.long(),
            position_ids=prompt.positions,
            pixel_values=prompt.pixels,
        ).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("where", [None, 2])
def test_hidden_states_asked_for_before_apply(where: int | None) -> None:
    """transformers installs hooks of its own the first time hidden states are asked for; ours must still come first."""
    prompt = make_prompt((1, 1))
    fresh, used = small_llava(), small_llava()
    policy = fixed_keep(prompt.images, where, ragged=True)
    dropped = prompt.dropped(policy.kept, policy.site)
    dense = prefill(used, prompt, output_hidden_states=True)
    layers = used.model.language_model.layers
    with hidden_keys(layers, dict.fromkeys(range(where or 0, len(layers)), dropped), prompt.real):
        expected = prefill(used, prompt, output_hidden_states=True)
    for model in (fresh, used):
        with vlmprune.applied(model, policy):
            out = prefill(model, prompt, output_hidden_states=True)
        assert len(out.hidden_states) == len(dense.hidden_states) == len(layers) + 1
        for i, (got, reference_) in enumerate(zip(out.hidden_states, expected.hidden_states, strict=True)):
            stay = ~dropped if got.shape[1] < prompt.length else torch.ones_like(dropped)
            assert (got.shape[1] < prompt.length) == (where is None or i > where)  # what enters a layer is whole
            reference_rows = torch.cat([row[keep] for row, keep in zip(reference_, stay, strict=True)])
            got_rows = torch.cat([row[len(row) - int(k.sum()) :] for row, k in zip(got, stay, strict=True)])
            assert torch.allclose(got_rows, reference_rows, rtol=1e-4, atol=1e-4), i
        assert torch.allclose(out.logits[~dropped], expected.logits[~dropped], rtol=1e-4, atol=1e-4)
        again = prefill(model, prompt, output_hidden_states=True)
        assert all(torch.equal(a, b) for a, b in zip(again.hidden_states, dense.hidden_states, strict=True))


def test_the_image_features_are_not_disturbed() -> None:
    model, prompt = small_llava(), make_prompt((2, 1))
    dense = prefill(model, prompt).image_hidden_states
    with vlmprune.applied(model, "hiprune", keep=0.5):
        pruned = prefill(model, prompt).image_hidden_states
    assert torch.equal(pruned, dense)


@pytest.mark.parametrize("where", [None, 2])
def test_gradients_flow_as_in_the_masked_model(where: int | None) -> None:
    """Training on a pruned model: the loss on text has the gradient of the dense model with hidden tokens."""
    model, prompt = small_llava(dtype=torch.float64), make_prompt((1, 1), True, torch.float64)
    policy = fixed_keep(prompt.images, where, ragged=True)
    dropped = prompt.dropped(policy.kept, policy.site)
    labels = prompt.ids.masked_fill(~prompt.real | (prompt.ids == model.config.image_token_index), -100)
    labels[:, : prompt.length - 2] = -100  # targets whose logits come from text
    arguments = {**prompt.inputs, "position_ids": prompt.positions, "labels": labels}
    layers = model.model.language_model.layers
    with hidden_keys(layers, dict.fromkeys(range(where or 0, len(layers)), dropped), prompt.real):
        expected = gradients(model, arguments)
    with vlmprune.applied(model, policy):
        got = gradients(model, arguments)
    dense = gradients(model, arguments)
    weight = "model.multi_modal_projector.linear_1.weight"
    assert torch.allclose(got["loss"], expected["loss"], atol=1e-9)
    assert not torch.allclose(got[weight], dense[weight], atol=1e-4)
    for name in (weight, "model.language_model.layers.3.self_attn.k_proj.weight"):
        assert torch.allclose(got[name], expected[name], atol=1e-8)


def gradients(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of all parameters."""
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def test_restore_length_can_be_turned_off() -> None:
    model, prompt = small_llava(), make_prompt((1,))
    with vlmprune.applied(model, FixedKeep(kept=((0, 3, 9),)), restore_length=False):
        assert prefill(model, prompt).logits.shape[1] == prompt.length - 13
    with vlmprune.applied(model, FixedKeep(kept=((0, 3, 9),))):
        assert prefill(model, prompt).logits.shape[1] == prompt.length


def test_merging_in_a_decoder_layer() -> None:
    """Groups of two tokens become their mean before layer 2; keys and positions are those of the first."""
    model, prompt = small_llava(dtype=torch.float64), make_prompt((1,), dtype=torch.float64)
    text = model.model.language_model
    entering: list[Tensor] = []
    spy = text.layers[2].register_forward_pre_hook(lambda m, a, k: entering.append(a[0]), with_kwargs=True)
    prefill(model, prompt)
    spy.remove()
    with vlmprune.applied(model, MeanGroups(site=Site.DECODER_LAYER, layer=2, positions="keep")) as handle:
        got = prefill(model, prompt).logits[0]
        assert handle.last.kept_tokens == (N // 2,)
    start = prompt.places()[0][0][0]
    hidden = entering[0].clone()
    merged = hidden[:, start : start + N].unflatten(1, (-1, 2)).mean(2)
    stay = torch.ones(prompt.length, dtype=torch.bool)
    stay[start + 1 : start + N : 2] = False
    hidden[:, start : start + N : 2] = merged
    hidden, positions = hidden[:, stay], prompt.positions[:, stay]
    rotary = text.rotary_emb(hidden, positions)
    mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        for layer in list(text.layers)[2:]:
            out = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
            hidden = out[0] if isinstance(out, tuple) else out
        expected = model.lm_head(text.norm(hidden))[0]
    assert torch.allclose(got[stay], expected, atol=1e-6)
    assert not got[~stay].any()
