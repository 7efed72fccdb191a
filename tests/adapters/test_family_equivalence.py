"""Every family, pruned with original positions, equals the dense model with the dropped tokens hidden."""

from __future__ import annotations

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import (
    DEPTH,
    FAMILIES,
    MROPE,
    VIDEO,
    assert_close,
    batch,
    family_model,
    fixed_eviction,
    fixed_policy,
    forced_tokens,
    masked,
    rollout,
)
from fixed_policy import FixedKeep
from prompt_styles import STYLES
from torch import nn

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core.errors import InputError

POST, ONE, TWO = None, 1, 2
"""Where tokens are dropped: before the decoder, or before one of its layers."""
CASES = [  # images per row, left-padded, layer
    pytest.param((1,), False, POST, id="single-post_encoder"),
    pytest.param((1,), False, TWO, id="single-layer2"),
    pytest.param((2,), False, POST, id="two-images-post_encoder"),
    pytest.param((1, 1, 1), False, POST, id="batch-post_encoder"),
    pytest.param((1, 1, 1), False, ONE, id="batch-layer1"),
    pytest.param((2, 1, 0), True, POST, id="mixed-post_encoder"),
    pytest.param((2, 1, 0), True, ONE, id="mixed-layer1"),
    pytest.param((2, 1, 0), True, TWO, id="mixed-layer2"),
]


def check(
    model: nn.Module, prompt: FamilyPrompt, where: int | None, ragged: bool = True, dtype: torch.dtype = torch.float64
) -> None:
    """Pruned prefill and six forced decode steps equal the reference, and differ from the dense model."""
    policy = fixed_policy(prompt, where, ragged=ragged)
    forced = forced_tokens(prompt)
    dropped = prompt.dropped(policy.kept, policy.site)
    with masked(model, prompt, policy):
        expected, expected_steps = rollout(model, prompt, forced)
    dense = prefill(model, prompt).logits
    with vlmprune.applied(model, policy) as handle:
        got, steps = rollout(model, prompt, forced)
        visual = [sum(map(len, images)) for images in prompt.places()]
        assert handle.last.visual_tokens == tuple(visual)
        gone = dropped.sum(1).tolist()
        assert handle.last.kept_tokens == tuple(n - k for n, k in zip(visual, gone, strict=True))
    stay = prompt.real & ~dropped
    assert got.shape == dense.shape
    assert_close(got[stay], expected[stay], dtype)
    assert_close(steps, expected_steps, dtype)
    assert not got[dropped].any()  # nothing is there
    seen = (dense[:, -1] - expected[:, -1]).abs().amax(-1) > 1e-2
    assert seen.tolist() == [bool(n) for n in visual]  # the reference notices, in rows with images


@pytest.mark.parametrize(("images", "padded", "where"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_float64(family: str, images: tuple[int, ...], padded: bool, where: int | None) -> None:
    sizes = None if padded else STYLES[family].sizes[:1]  # equal rows: no padding, and no mask where a model omits it
    prompt = batch(family, images, padded, sizes=sizes)
    assert prompt.real.all() == (not padded)
    check(family_model(family), prompt, where, ragged=padded)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_longest_row_keeps_everything(family: str) -> None:
    """The sequence stays as long as it was, but tokens of the other row move in it."""
    model, prompt = family_model(family), batch(family, (1, 1), False, sizes=STYLES[family].sizes[:1])
    forced = forced_tokens(prompt)
    policy = FixedKeep(kept=(tuple(range(prompt.widths()[0])), (1, 4)))
    with masked(model, prompt, policy):
        expected, expected_steps = rollout(model, prompt, forced)
    with vlmprune.applied(model, policy):
        got, steps = rollout(model, prompt, forced)
    stay = prompt.real & ~prompt.dropped(policy.kept)
    assert_close(got[stay], expected[stay])
    assert_close(steps, expected_steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_side_by_side(family: str) -> None:
    check(family_model(family), batch(family, (3, 1), between=0), POST)


@pytest.mark.parametrize("where", [POST, TWO], ids=["post_encoder", "layer2"])
@pytest.mark.parametrize("family", VIDEO)
def test_videos_beside_images(family: str, where: int | None) -> None:
    prompt = batch(family, (1, 2, 1), video=True)
    check(family_model(family), prompt, where)


# Eager attention in float64 with left padding is NaN in transformers' own dense models.
@pytest.mark.parametrize(
    ("implementation", "where"), [("eager", POST), ("eager", TWO), ("sdpa", POST)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, implementation: str, where: int | None) -> None:
    prompt = batch(family, dtype=torch.float32)
    check(family_model(family, torch.float32, implementation), prompt, where, dtype=torch.float32)


@pytest.mark.parametrize("turn", [False, True], ids=["steps", "turn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evictions_from_the_cache(family: str, turn: bool) -> None:
    model, prompt = family_model(family), batch(family)
    policy, forced = fixed_eviction(prompt), forced_tokens(prompt)
    dense, dense_steps = rollout(model, prompt, forced, turn)
    with masked(model, prompt, policy):
        _, expected = rollout(model, prompt, forced, turn)
    with vlmprune.applied(model, policy) as handle:
        got, steps = rollout(model, prompt, forced, turn)
        rows = [sum(map(len, images)) for images in prompt.places()]
        kept = iter(policy.kept[2])
        assert handle.last.kept_tokens_per_layer[1] == (0,) * len(rows)
        assert handle.last.kept_tokens_per_layer[2] == tuple(len(next(kept)) if n else 0 for n in rows)
        assert handle.last.kept_tokens_per_layer[3] == tuple(rows)
    assert torch.equal(got, dense)
    assert_close(steps, expected)
    assert ((dense_steps - expected).abs().amax((1, 2)) > 1e-3).tolist() == [bool(n) for n in rows]


@pytest.mark.parametrize("where", [POST, TWO], ids=["post_encoder", "layer2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_turn_on_the_pruned_cache(family: str, where: int | None) -> None:
    model, prompt = family_model(family), batch(family)
    policy, turn = fixed_policy(prompt, where), forced_tokens(prompt, 5)
    with masked(model, prompt, policy):
        _, expected = rollout(model, prompt, turn, turn=True)
    with vlmprune.applied(model, policy):
        out = prefill(model, prompt, use_cache=True)
        _, got = rollout(model, prompt, turn, turn=True)
    assert_close(got, expected)
    assert isinstance(out.past_key_values, PrunedDynamicCache)
    stored = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert out.past_key_values.get_seq_length() == prompt.length
    assert all(length < prompt.length for length in stored[where or 0 :])
    assert len(stored) == DEPTH


@pytest.mark.parametrize("family", MROPE)
def test_compact_positions_are_refused_where_positions_have_several_axes(family: str) -> None:
    model, prompt = family_model(family), batch(family)
    before = prefill(model, prompt).logits
    for where in (POST, TWO):
        with pytest.raises(InputError, match="compact positions, but Qwen.*numbers visual tokens by time, row and"):
            vlmprune.apply(model, fixed_policy(prompt, where, positions="compact"))
    with vlmprune.applied(model, fixed_policy(prompt, positions="auto")) as handle:
        prefill(model, prompt)
        assert [record.positions for record in handle.last.sites] == ["keep"]
    assert torch.equal(prefill(model, prompt).logits, before)
