"""``generate`` and later sites on what a reduced tower leaves, against the dense model with the tower's features and
the dropped tokens hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import DEPTH, VERSION, assert_close, forced_tokens, rollout
from fixed_policy import FixedEviction, FixedKeep
from llava_prompts import pick_tokens
from masked_reference import decoder_layers, hidden_keys
from torch import Tensor
from tower_plans import Planned
from tower_reference import tower_replaced
from tower_runs import PLANS, SIGLIP, TOWERS, Left, left_behind, reference_of, tower_batch, tower_model

import vlmprune
from vlmprune.core.policy import Policy
from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import tokens as t

STEPS = PLANS["merge"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no-cache": {"use_cache": False},
}
LATER = ("post_encoder", "layer2", "kv_cache")


def generate(name: str, prompt: FamilyPrompt, **mode: Any) -> Any:
    torch.manual_seed(5)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    words = [t.IMAGE_TOKEN_ID, t.VIDEO_TOKEN_ID, t.START_ID]
    with torch.no_grad():
        return tower_model(name).generate(**prompt.inputs, **settings, suppress_tokens=words, **mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TOWERS)
def test_generate(name: str, mode: str) -> None:
    """Rows are repeated behind the encoder, or before it; one row has no image."""
    repeats = mode == "beams" and VERSION < (5, 23)  # which then mixes up several images of a row
    sizes = {"sizes": ((24, 24),)} if repeats and name == "internvl" else {}
    prompt = tower_batch(name, (1, 0, 1) if repeats else (2, 0, 1), **sizes)
    model = tower_model(name)
    reference = reference_of(name, prompt, STEPS)
    dropped = prompt.dropped(left_behind(name, prompt, reference).kept)
    with (
        tower_replaced(model, reference),
        hidden_keys(decoder_layers(model), dict.fromkeys(range(DEPTH), dropped), prompt.real),
    ):
        expected = generate(name, prompt, **MODES[mode])
    views = len(reference.runs[0].views)
    order = tuple(reference.repeated(3 * views, views).tolist())  # before transformers 5.23 images are, too
    with vlmprune.applied(model, Planned(steps=STEPS, order=order)) as handle:
        got = generate(name, prompt, **MODES[mode])
        assert all(kept < n for kept, n in zip(handle.last.kept_tokens, handle.last.visual_tokens, strict=True) if n)
    assert torch.equal(got.sequences, expected.sequences)
    for step, wish in zip(got.scores, expected.scores, strict=True):
        assert torch.allclose(step, wish, rtol=1e-6, atol=1e-6)
    dense = generate(name, prompt, **MODES[mode])
    assert (dense.scores[0] - got.scores[0]).abs().nan_to_num(0, 0, 0).max() > 1e-3


def later_policy(where: str, prompt: FamilyPrompt, left: Left) -> tuple[Policy, dict[int, Tensor], bool]:
    """A policy behind the tower, what each decoder layer does not see because of both, and if only decoding does."""
    first = prompt.dropped(left.kept)
    images = [len(kept) for kept in left.kept]
    if where == "post_encoder":
        kept = pick_tokens(images, ragged=True)
        both = [[tokens[i] for i in some] for tokens, some in zip(left.kept, kept, strict=True)]
        return FixedKeep(kept=kept), dict.fromkeys(range(DEPTH), prompt.dropped(both)), False
    rows, start = [], 0
    offsets = [[sum(map(len, places[:i])) for i in range(len(places))] for places in prompt.places()]
    for row, count in enumerate(prompt.images):
        own = left.kept[start : start + count]
        rows.append([offsets[row][i] + token for i, tokens in enumerate(own) for token in tokens])
        start += count
    rows = [row for row in rows if row]
    kept = pick_tokens([len(row) for row in rows], ragged=True)
    both = [[row[i] for i in some] for row, some in zip(rows, kept, strict=True)]
    hidden = prompt.dropped(both, Site.DECODER_LAYER)
    if where == "kv_cache":
        every = (kept,) * DEPTH
        return FixedEviction(kept=every), dict.fromkeys(range(DEPTH), hidden), True
    cut = FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=2)
    return cut, {layer: hidden if layer >= 2 else first for layer in range(DEPTH)}, False


@pytest.mark.parametrize("where", LATER)
@pytest.mark.parametrize("name", TOWERS)
def test_a_policy_behind_the_tower(name: str, where: str) -> None:
    prompt, model = tower_batch(name), tower_model(name)
    reference, forced = reference_of(name, prompt, STEPS), forced_tokens(prompt, 3)
    left = left_behind(name, prompt, reference)
    policy, hidden, decode_only = later_policy(where, prompt, left)
    first = dict.fromkeys(range(DEPTH), prompt.dropped(left.kept))
    layers = decoder_layers(model)
    with tower_replaced(model, reference), hidden_keys(layers, hidden, prompt.real, decode_only):
        if decode_only:
            with hidden_keys(layers, first, prompt.real):
                expected, steps = rollout(model, prompt, forced)
        else:
            expected, steps = rollout(model, prompt, forced)
    with vlmprune.applied(model, [Planned(steps=STEPS), policy]) as handle:
        got, got_steps = rollout(model, prompt, forced)
        sites = [record.site for record in handle.last.sites]
    assert sites[0] == Site.VISION_BLOCK and len(sites) > 1
    assert_close(got_steps, steps)
    assert_close(got[:, -1], expected[:, -1])
    with vlmprune.applied(model, Planned(steps=STEPS)):
        alone, alone_steps = rollout(model, prompt, forced)
    assert (alone_steps[0] - steps[0]).abs().max() > 1e-3  # the second policy matters


@pytest.mark.parametrize("name", TOWERS)
def test_policies_with_signals_keep_in_a_batch_what_they_keep_alone(name: str) -> None:
    """ToMe inside the tower, and behind it policies that read the tower."""
    prompt, model = tower_batch(name), tower_model(name)
    last = {"hiprune": {"keep": 0.5}, "todre": {"keep": 0.5}, "divprune": {"keep": 0.5}, "vflowopt": {"keep": 0.5}}
    for policy, parameters in last.items():
        with vlmprune.applied(model, ["tome", policy], keep=[0.6, parameters["keep"]]) as handle:
            prefill(model, prompt)
            report = handle.last
            kept = [[report.groups(row, image) for image in range(n)] for row, n in enumerate(prompt.images)]
            for row in (0, 1):
                alone = prompt.row(row)
                prefill(model, alone)
                assert [handle.last.groups(0, image) for image in range(prompt.images[row])] == kept[row]
        inside, *behind = report.sites
        assert inside.policy == "tome" and sum(inside.tokens_out) < sum(inside.tokens_in)
        assert sum(report.kept_tokens) < sum(inside.tokens_out)
        assert {record.policy for record in behind} == {policy}
        assert sorted(token for group in kept[0][0] for token in group) == report.kept(0, 0)
    assert SIGLIP in TOWERS
