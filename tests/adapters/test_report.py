"""``handle.last``: counts, lineage, bytes and warnings, checked against what is really stored."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep, MeanGroups
from llava_prompts import LlavaPrompt, N, decode, make_prompt, pick_tokens, prefill, small_llava
from recording import Recording

import vlmprune
from vlmprune.core.sites import Site

BATCHES = [
    pytest.param((1,), False, id="single"),
    pytest.param((1, 1, 1), True, id="left-padded"),
    pytest.param((2, 0, 1), True, id="mixed"),
]


def cut(kept: tuple[tuple[int, ...], ...], layer: int) -> FixedKeep:
    return FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=layer, positions="keep")


def stored_width(prompt: LlavaPrompt, visual: tuple[int, ...]) -> int:
    """Tokens that a layer stores per row: the longest row of text and remaining visual tokens."""
    real = prompt.real.sum(1).tolist()
    return max(r - N * n + v for r, n, v in zip(real, prompt.images, visual, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("images", "padded"), BATCHES)
def test_bytes_of_the_cache(images: tuple[int, ...], padded: bool, dtype: torch.dtype) -> None:
    """2 x rows x kv_heads x head_dim x dtype bytes x stored tokens, per layer."""
    model, prompt = small_llava(dtype=dtype, kv_heads=2), make_prompt(images, padded, dtype)
    per_image = pick_tokens([N] * sum(images), ragged=True)
    per_row = tuple(sum(len(per_image[sum(images[:r]) + i]) for i in range(n)) for r, n in enumerate(images))
    in_layer = pick_tokens([n for n in per_row if n], seed=4)
    after = tuple(n and len(in_layer[sum(1 for m in per_row[:r] if m)]) for r, n in enumerate(per_row))
    with vlmprune.applied(model, [FixedKeep(kept=per_image, positions="keep"), cut(in_layer, 2)]) as handle:
        cache = prefill(model, prompt, use_cache=True).past_key_values
        report = handle.last
        decode(model, prompt, cache, torch.full((len(images), 2), 9))
        assert handle.last is report
    element = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2}[dtype]
    per_token = 2 * len(images) * 2 * 8 * element
    expected = tuple(per_token * stored_width(prompt, visual) for visual in (per_row, per_row, after, after))
    assert report.kv_bytes_per_layer == expected
    assert report.kv_bytes == sum(expected)
    assert report.kv_bytes_per_layer_dense == (per_token * prompt.length,) * 4
    assert report.kept_tokens_per_layer == (per_row, per_row, after, after)
    assert report.mean_kept_layers == pytest.approx(sum(per_row + after) / 2 / len(images))
    assert report.kept_tokens == after
    assert report.visual_tokens == tuple(N * n for n in images)
    # The tensors themselves, two decoded tokens later.
    sizes = tuple(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert sum(sizes) == sum(expected) + 4 * 2 * per_token


def test_bytes_of_a_dense_cache_are_those_of_the_dense_model() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    dense = prefill(model, prompt, use_cache=True).past_key_values
    expected = tuple(
        sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)) for layer in dense.layers
    )
    with vlmprune.applied(model, "uniform", keep=0.25) as handle:
        prefill(model, prompt, use_cache=True)
        assert handle.last.kv_bytes_per_layer_dense == expected
        assert handle.last.kv_bytes_dense == sum(expected)
        assert handle.last.kv_bytes < sum(expected)
        prefill(model, prompt, use_cache=False)
        assert handle.last.kv_bytes is None and handle.last.kv_bytes_dense is None
    with vlmprune.applied(model, "uniform", keep=1.0) as handle:
        prefill(model, prompt, use_cache=True)
        assert handle.last.kv_bytes_per_layer == handle.last.kv_bytes_per_layer_dense == expected


def test_lineage_of_two_images() -> None:
    model, prompt = small_llava(), make_prompt((2, 1), True)
    per_image = ((1, 4, 9, 15), (0, 2, 3), (5, 6, 7))
    in_layer = ((0, 3, 5), (1,))  # of the 7 tokens left in row 0 and the 3 in row 1
    with vlmprune.applied(model, [FixedKeep(kept=per_image), cut(in_layer, 2)]) as handle:
        prefill(model, prompt)
        report = handle.last
    assert [report.kept(0, 0), report.kept(0, 1), report.kept(1, 0)] == [[1, 15], [2], [6]]
    for layer in (0, 1):
        got = [report.kept(0, 0, layer), report.kept(0, 1, layer), report.kept(1, 0, layer)]
        assert got == [list(tokens) for tokens in per_image]
    lineage = report.lineage(0).weights[0]
    assert lineage.shape == (3, 2 * N)
    assert lineage.nonzero().tolist() == [[0, 1], [1, 15], [2, N + 2]]
    assert report.groups(0, 1) == [[2]]
    assert [(image.sample, image.index, image.n_tokens) for image in report.images] == [
        (0, 0, N),
        (0, 1, N),
        (1, 0, N),
    ]
    assert all((view.height, view.width) == (4, 4) for image in report.images for view in image.views)


def test_lineage_of_merged_tokens() -> None:
    model, prompt = small_llava(), make_prompt((1,))
    policies = [MeanGroups(size=4), cut(((0, 2),), 2)]
    with vlmprune.applied(model, policies) as handle:
        prefill(model, prompt)
        assert handle.last.groups() == [[0, 1, 2, 3], [8, 9, 10, 11]]
        weights = handle.last.lineage().weights[0]
        assert torch.allclose(weights.sum(1), torch.ones(2)) and weights.max() == 0.25
        assert handle.last.kept_tokens == (2,)


def test_layers_positions_and_summary() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    with vlmprune.applied(model, "todre", keep=0.5, tau=2.0, check_layers=(0, 2)) as handle:
        prefill(model, prompt, use_cache=True)
        report = handle.last
    assert report.layers_used == {"todre": [1]}  # nothing is left for the second check
    assert [(record.site, record.layer, record.positions) for record in report.sites] == [
        (Site.POST_ENCODER, None, "compact"),
        (Site.DECODER_LAYER, 1, "keep"),
    ]
    assert report.kept_tokens_per_layer == ((8, 8), (0, 0), (0, 0), (0, 0))
    assert report.mean_kept_layers == 2.0
    summary = json.loads(json.dumps(report.summary()))
    assert summary["model"] == "LlavaForConditionalGeneration"
    assert summary["policy"]["policy"] == "todre"
    assert summary["visual_tokens"] == [N, N] and summary["kept_tokens"] == [0, 0]
    assert summary["kv_bytes"] == report.kv_bytes > 0
    assert report.milliseconds is not None and report.milliseconds >= 0


def test_scores_are_those_of_the_policy() -> None:
    model, prompt = small_llava(), make_prompt((2, 1), True)
    with vlmprune.applied(model, "hiprune", keep=0.5, alpha=0.0) as handle:
        prefill(model, prompt)
        report = handle.last
    for sample, image in ((0, 0), (0, 1), (1, 0)):
        scores = torch.tensor(report.scores(sample, image))
        best = scores.sort(descending=True, stable=True).indices[:8].sort().values
        assert best.tolist() == report.kept(sample, image)


def test_the_last_forward_with_images_is_reported() -> None:
    model, prompt = small_llava(), make_prompt((1,))
    with vlmprune.applied(model, "uniform", keep=0.5) as handle:
        assert handle.last is None
        prefill(model, make_prompt((0,)))
        assert handle.last is None
        model.generate(**prompt.inputs, max_new_tokens=3)
        report = handle.last
        assert report.n_samples == 1 and report.prompt_tokens == prompt.length
        prefill(model, make_prompt((0,)))
        assert handle.last is report
        prefill(model, make_prompt((1, 1)))
        assert handle.last.n_samples == 2
    assert handle.last.n_samples == 2  # still readable after remove


# ---- warnings


def caught(model: Any, prompt: LlavaPrompt) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prefill(model, prompt)
    return [str(warning.message) for warning in found if "reduced" in str(warning.message)]


def test_a_budget_that_reduces_nothing_warns_once() -> None:
    model, prompt = small_llava(), make_prompt((1, 1))
    everything = (tuple(range(N)),) * 2
    with vlmprune.applied(model, FixedKeep(kept=everything, keep=0.5)) as handle:
        assert len(caught(model, prompt)) == 1
        assert "fixed: nothing was reduced" in handle.last.warnings[0]
        assert caught(model, prompt) == []
        assert len(handle.last.warnings) == 1  # every report says so
    with vlmprune.applied(model, FixedKeep(kept=everything, keep=0.5)):
        assert len(caught(model, prompt)) == 1  # a new handle warns anew


@pytest.mark.parametrize(
    "policy", [vlmprune.Uniform(keep=1.0), vlmprune.Uniform(keep=0.5), Recording()], ids=["all", "half", "recording"]
)
def test_no_warning_where_none_is_due(policy: Any) -> None:
    model, prompt = small_llava(), make_prompt((1, 1))
    with vlmprune.applied(model, policy) as handle:
        assert caught(model, prompt) == []
        assert handle.last.warnings == []


def test_more_tokens_than_there_are_where_the_number_is_not_fixed() -> None:
    """A bare decoder whose images differ in size: everything stays, and the report says so."""
    decoder = small_llava().model.language_model
    embeds = torch.randn(2, 30, 32)
    spans = [[(3, N)], [(2, 20)]]
    dense = decoder(inputs_embeds=embeds).last_hidden_state
    with vlmprune.applied(decoder, "uniform", keep=24, spans=spans) as handle, torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is wrong, so only the report says it
            got = decoder(inputs_embeds=embeds).last_hidden_state
        assert torch.equal(got, dense)
        assert any("nothing was reduced" in text and "keep=24" in text for text in handle.last.warnings)
    with vlmprune.applied(decoder, "uniform", keep=18, spans=spans) as handle, torch.no_grad():
        decoder(inputs_embeds=embeds)
        assert handle.last.kept_tokens == (16, 18)
