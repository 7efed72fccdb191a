"""Tokens reduced inside the tower of every family: the LLM works as if it had been given what the tower left.

The tower is computed anew in float64, view by view, with explicit attention; its features enter the dense model by
hand, and the tokens that became others are hidden from it, or left out.
"""

from __future__ import annotations

from typing import Any

import pytest
from family_prompts import FamilyPrompt, prefill
from family_runs import DEPTH, assert_close, forced_tokens, rollout
from masked_reference import decoder_layers, hidden_keys
from short_reference import short_rollout
from torch import Tensor
from tower_plans import Planned, PlannedStep, Steps
from tower_reference import TowerReference, tower_replaced
from tower_runs import (
    PLANS,
    TOWERS,
    Left,
    feature_block,
    left_behind,
    reference_of,
    token_patches,
    tower_batch,
    tower_model,
)

import vlmprune

CASES = [(name, plan) for name in TOWERS for plan in PLANS]


def gone(prompt: FamilyPrompt, left: Left) -> Tensor:
    """``[B, L]`` True at tokens of the prompt that the tower made one with others, or dropped."""
    return prompt.dropped(left.kept)


def hidden_rollout(
    name: str, prompt: FamilyPrompt, reference: TowerReference, left: Left, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """The dense model with the reference's features and tokens hidden."""
    model = tower_model(name)
    dropped = dict.fromkeys(range(DEPTH), gone(prompt, left))
    with (
        tower_replaced(model, reference, left.scales(prompt)),
        hidden_keys(decoder_layers(model), dropped, prompt.real),
    ):
        return rollout(model, prompt, forced)


def check(name: str, prompt: FamilyPrompt, steps: Steps, **arguments: Any) -> None:
    """Prefill and decoded tokens equal the reference, which differs from the dense model."""
    model, forced = tower_model(name), forced_tokens(prompt, 3)
    reference = reference_of(name, prompt, steps)
    left = left_behind(name, prompt, reference)
    expected, expected_steps = hidden_rollout(name, prompt, reference, left, forced)
    dense = prefill(model, prompt).logits
    with vlmprune.applied(model, Planned(steps=steps), **arguments) as handle:
        got, got_steps = rollout(model, prompt, forced)
        report = handle.last
    for row, images in enumerate(prompt.images):
        assert [report.groups(row, image) for image in range(images)] == left.of_row(prompt, row)
    stay = prompt.real & ~gone(prompt, left)
    assert_close(got[stay], expected[stay])
    assert_close(got_steps, expected_steps)
    seen = (dense[:, -1] - expected[:, -1]).abs().amax(-1) > 1e-2
    assert seen.tolist() == [bool(images) for images in prompt.images]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_planned_reductions(name: str, plan: str) -> None:
    check(name, tower_batch(name), PLANS[plan])


@pytest.mark.parametrize("plan", ["merge", "prune", "ragged"])
def test_videos_whose_patches_are_pooled(plan: str) -> None:
    """Images and videos run through the tower one after the other; pooled tokens blend the groups of four patches."""
    check("llava_onevision", tower_batch("llava_onevision", (2, 0, 1), video=True), PLANS[plan])


@pytest.mark.parametrize("name", TOWERS)
def test_images_side_by_side(name: str) -> None:
    """Merged in the middle of the block that feeds the projector."""
    check(name, tower_batch(name, (3, 1), between=0), (PlannedStep(feature_block(name), ragged=True),))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_views_without_padding(name: str) -> None:
    """transformers 4 makes a mask over all patches all the same."""
    check(name, tower_batch(name, sizes=((24, 48), (24, 24))), PLANS["prune"])


@pytest.mark.parametrize("name", TOWERS)
def test_compact_positions(name: str) -> None:
    """What is left is numbered as if nothing else had been there: the decoder on the shortened embeddings."""
    prompt, steps = tower_batch(name), PLANS["ragged"]
    model, forced = tower_model(name), forced_tokens(prompt, 3)
    reference = reference_of(name, prompt, steps)
    left = left_behind(name, prompt, reference)
    stay = prompt.real & ~gone(prompt, left)
    with vlmprune.applied(model, Planned(steps=steps, positions="compact")) as handle:
        got, got_steps = rollout(model, prompt, forced)
        assert [record.positions for record in handle.last.sites] == ["compact"]
    for row in range(len(prompt.rows)):
        with tower_replaced(model, reference, left.scales(prompt)):
            expected, expected_steps = short_rollout(model, prompt, row, stay[row], forced[row])
        assert_close(got[row][stay[row]], expected)
        assert_close(got_steps[row], expected_steps)


def test_the_plans_do_what_they_are_for() -> None:
    """Views of different length, tokens that blend groups, newlines without a row."""
    prompt = tower_batch("llava_onevision", (1,), sizes=((60, 40),))
    reference = reference_of("llava_onevision", prompt, PLANS["ragged"])
    assert len({len(view.units) for view in reference.runs[0].views}) > 1
    left = left_behind("llava_onevision", prompt, reference)
    groups = reference.runs[0].groups[-1]
    made_of = [{groups[view][patch] for view, patch in patches} for patches in token_patches(prompt.family, prompt)[0]]
    assert any(len(found) > 1 for token, found in enumerate(made_of) if token in left.kept[0])
    assert any(len(group) > 1 for group in left.groups[0])
    assert any(0.5 < share < 1 for share in left.shares[0])  # partly dropped
    prompt = tower_batch("llava_next")
    left = left_behind("llava_next", prompt, reference_of("llava_next", prompt, PLANS["no-bias"]))
    newlines = set(prompt.rows[0].parts[0].newlines)
    assert newlines - set(left.kept[0]) and newlines & set(left.kept[0])
