"""Evictions from the KV cache after the prefill: decoding equals the dense model with the evicted tokens hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fixed_policy import FixedEviction, FixedKeep, Kept
from llava_prompts import LlavaPrompt, N, decode, make_prompt, pick_tokens, prefill, small_llava
from masked_reference import hidden_keys
from torch import Tensor, nn

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core.bases import CachePolicy
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.signals import AttentionRows, Signal
from vlmprune.core.sites import Site


@dataclass(frozen=True)
class LookedAt(CachePolicy):
    """Keeps the half of the stored visual tokens that the last token attends to most, layer by layer."""

    meta = PolicyMeta(title="evictions by attention, for tests")
    name = "looked_at"

    keep: Any = 0.5

    def cache_signals(self, info: ModelInfo, layer: int) -> tuple[Signal, ...]:
        return (AttentionRows("text", layer, "last"),)

    def select_kv_cache(self, context: Context) -> Selection:
        scores = context.signal(AttentionRows("text", context.layer or 0, "last"))[:, 0]
        order = scores.masked_fill(~context.valid, -1).argsort(dim=1, descending=True, stable=True)
        counts = tuple(n // 2 for n in context.lengths)
        width = torch.arange(context.width)
        order = torch.where(width < torch.tensor(counts)[:, None], order, -1)
        return Selection.from_order(order[:, : max(counts)], context.width, counts)


BATCHES = [
    pytest.param((1,), False, id="single"),
    pytest.param((2,), False, id="two-images"),
    pytest.param((1, 1, 1), True, id="left-padded"),
    pytest.param((2, 0, 1), True, id="mixed"),
]


def evictions(prompt: LlavaPrompt, ragged: bool) -> Kept:
    """Other tokens in every layer; layer 1 loses all of them, layer 3 none."""
    widths = [N * n for n in prompt.images if n]
    everything = tuple(tuple(range(width)) for width in widths)
    return (
        pick_tokens(widths, ragged, seed=5),
        tuple(() for _ in widths),
        pick_tokens(widths, ragged, seed=6),
        everything,
    )


def run(model: nn.Module, prompt: LlavaPrompt, forced: Tensor, turn: bool = False) -> tuple[Tensor, Tensor, Any]:
    out = prefill(model, prompt, use_cache=True)
    return out.logits, decode(model, prompt, out.past_key_values, forced, turn), out.past_key_values


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("turn", [False, True], ids=["step-by-step", "turn"])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(("images", "padded"), BATCHES)
def test_decoding_equals_the_masked_dense_model(
    images: tuple[int, ...], padded: bool, ragged: bool, turn: bool, implementation: str
) -> None:
    dtype = torch.float64 if implementation == "sdpa" else torch.float32  # eager float64 with padding is NaN dense
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    model = small_llava(dtype=dtype, attn_implementation=implementation)
    prompt = make_prompt(images, padded, dtype)
    kept = evictions(prompt, ragged)
    forced = torch.randint(8, 60, (len(images), 4), generator=torch.Generator().manual_seed(8))
    gone = {layer: prompt.dropped(tokens, Site.DECODER_LAYER) for layer, tokens in enumerate(kept)}
    dense_prefill, dense_steps, _ = run(model, prompt, forced, turn)
    with hidden_keys(model.model.language_model.layers, gone, prompt.real, decode_only=True):
        _, expected, _ = run(model, prompt, forced, turn)
    with vlmprune.applied(model, FixedEviction(kept=kept)) as handle:
        logits, got, cache = run(model, prompt, forced, turn)
    assert torch.equal(logits, dense_prefill)
    assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
    assert (dense_steps - expected).abs().max() > 1e-3
    assert isinstance(cache, PrunedDynamicCache)
    for layer, tokens in enumerate(kept):
        width = max(_stored(prompt, tokens))
        assert cache.layers[layer].keys.shape[2] == width + 4
        assert handle.last.kept_tokens_per_layer[layer] == _per_row(prompt, tokens)
    assert cache.get_seq_length() == prompt.length + 4


def _per_row(prompt: LlavaPrompt, tokens: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    counts = iter(tokens)
    return tuple(len(next(counts)) if images else 0 for images in prompt.images)


def _stored(prompt: LlavaPrompt, tokens: tuple[tuple[int, ...], ...]) -> list[int]:
    """Prompt tokens of each row that a layer stores, padding not counted."""
    rows = []
    for row, visual in enumerate(_per_row(prompt, tokens)):
        real = int(prompt.real[row].sum())
        rows.append(real - N * prompt.images[row] + visual)
    # A layer that loses nothing is left as it is, padding included.
    full = all(len(kept) == N * n for kept, n in zip(tokens, filter(None, prompt.images), strict=True))
    return [prompt.length] if full else rows


def test_after_a_pruning_before_the_decoder_and_a_cut_inside() -> None:
    model, prompt = small_llava(dtype=torch.float64), make_prompt((1, 1), True, torch.float64)
    first, second = pick_tokens([N, N], seed=1), pick_tokens([8, 8], seed=2)
    last = tuple(pick_tokens([8 if layer < 2 else 4] * 2, seed=7 + layer) for layer in range(4))
    policies = [
        FixedKeep(kept=first, positions="keep"),
        FixedKeep(kept=second, site=Site.DECODER_LAYER, layer=2, positions="keep"),
        FixedEviction(kept=last),
    ]
    after_first = first
    after_second = tuple(tuple(a[i] for i in b) for a, b in zip(first, second, strict=True))
    stored = {
        layer: tuple(
            tuple(base[i] for i in chosen)
            for base, chosen in zip(after_first if layer < 2 else after_second, last[layer], strict=True)
        )
        for layer in range(4)
    }
    forced = torch.randint(8, 60, (2, 4), generator=torch.Generator().manual_seed(8))
    layers = model.model.language_model.layers
    worked_on = {
        layer: prompt.dropped(after_first if layer < 2 else after_second, Site.DECODER_LAYER) for layer in range(4)
    }
    gone = {layer: prompt.dropped(tokens, Site.DECODER_LAYER) for layer, tokens in stored.items()}
    with hidden_keys(layers, worked_on, prompt.real):
        out = prefill(model, prompt, use_cache=True)
    with hidden_keys(layers, gone, prompt.real):
        expected = decode(model, prompt, out.past_key_values, forced)
    with vlmprune.applied(model, policies) as handle:
        _, got, _ = run(model, prompt, forced)
        for layer in range(4):
            assert handle.last.kept(1, layer=layer) == list(stored[layer][1])
    assert torch.allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generation_by_attention(mode: dict[str, Any]) -> None:
    """Tokens chosen by the attention of the last prompt token, found again by an eager model."""
    # One image per row: before transformers 5.23 dense models mix up several where rows are repeated.
    model, prompt = small_llava(), make_prompt((1, 1), True)
    eager = prefill(small_llava(attn_implementation="eager"), prompt, output_attentions=True)
    kept = []
    for layer in range(4):
        rows = []
        for row, images in enumerate(prompt.places()):
            scores = eager.attentions[layer][row].mean(0)[-1][sum(images, [])]
            rows.append(tuple(sorted(scores.argsort(descending=True)[: len(scores) // 2].tolist())))
        kept.append(tuple(rows))
    gone = {layer: prompt.dropped(tokens, Site.DECODER_LAYER) for layer, tokens in enumerate(kept)}
    settings = {"max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    results = []
    for context in (
        hidden_keys(model.model.language_model.layers, gone, prompt.real, decode_only=True),
        vlmprune.applied(model, LookedAt()),
    ):
        with context, torch.no_grad():
            torch.manual_seed(3)
            results.append(model.generate(**prompt.inputs, **{**settings, **mode}))
    assert torch.equal(results[0].sequences, results[1].sequences)
    for a, b in zip(results[0].scores, results[1].scores, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_without_a_cache_nothing_is_evicted_and_a_warning_says_so() -> None:
    model, prompt = small_llava(), make_prompt((1,))
    dense = prefill(model, prompt, use_cache=False).logits
    with (
        vlmprune.applied(model, FixedEviction(kept=evictions(prompt, False))),
        pytest.warns(UserWarning, match="fixed_eviction: nothing was reduced"),
    ):
        assert torch.equal(prefill(model, prompt, use_cache=False).logits, dense)
