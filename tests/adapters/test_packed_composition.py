"""Policies behind a merge inside a packed tower, ``generate``, copies, captured states, and the tower's sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from family_prompts import MAJOR, decode, make_family_prompt, prefill
from family_runs import MROPE, assert_close, batch, family_model
from fixed_tower import stages_for
from packed_reference import PackedReference
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from vlmprune.core.flops import tower_flops
from vlmprune.core.policy import Policy
from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import random_vlm

AFTER = (vlmprune.HiPrune(keep=0.4), vlmprune.ToDRE(keep=0.5), vlmprune.DivPrune(keep=5), vlmprune.FastV(keep=0.5))


@pytest.mark.parametrize("policy", AFTER, ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", MROPE)
def test_the_lineage_of_policies_behind_a_merge(family: str, policy: Policy) -> None:
    """Every token that a later policy keeps stands for the group that the tower made of it."""
    model, prompt, merging = family_model(family), batch(family, (2, 1)), vlmprune.ToMe(keep=0.5)
    with vlmprune.applied(model, merging) as handle:
        prefill(model, prompt)
        groups = [[handle.last.groups(row, image) for image in range(n)] for row, n in enumerate(prompt.images)]
    with vlmprune.applied(model, [merging, policy]) as handle:
        prefill(model, prompt)
        report = handle.last
    merge, *others = report.sites
    assert merge.site == Site.VISION_BLOCK and merge.policy == "tome"
    [cut] = [record for record in others if record.tokens_out < record.tokens_in]
    flat = [group for images in groups for group in images]
    assert merge.tokens_out == tuple(map(len, flat))
    if cut.site == Site.POST_ENCODER:
        assert cut.tokens_in == merge.tokens_out
        kept = [
            [group[i] for i in line.tolist() if i >= 0] for group, line in zip(flat, cut.selection.kept, strict=True)
        ]
        rows = [kept[:2], kept[2:]]
    else:
        assert cut.tokens_in == tuple(sum(map(len, images)) for images in groups)
        rows = []
        for images, line in zip(groups, cut.selection.kept, strict=True):
            first = len(images[0])
            chosen = [i for i in line.tolist() if i >= 0]
            rows.append([[images[0][i] for i in chosen if i < first]])
            if len(images) > 1:
                rows[-1].append([images[1][i - first] for i in chosen if i >= first])
    for row, images in enumerate(rows):
        assert [report.groups(row, image) for image in range(len(images))] == images


@pytest.mark.parametrize("family", MROPE)
def test_generate_takes_the_shorter_prompt(family: str) -> None:
    model, prompt = family_model(family), batch(family, (1, 2))
    with vlmprune.applied(model, vlmprune.ToMe(keep=0.5)) as handle:
        given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        made = model.generate(**prompt.inputs, max_new_tokens=4, **given)
        assert handle.last.kept_tokens < handle.last.visual_tokens
        out = prefill(model, prompt, use_cache=True)
        steps = decode(model, prompt, out.past_key_values, made.sequences[:, prompt.length : -1])
    wish = torch.cat([out.logits[:, -1:], steps], 1)
    assert_close(torch.stack(made.logits, 1), wish, torch.float32)  # generate gives float32


@pytest.mark.parametrize("family", MROPE)
def test_a_copy_reduces_by_itself(family: str) -> None:
    model, prompt = random_vlm(family), batch(family, dtype=torch.float32)
    dense = prefill(model, prompt).logits
    handle = vlmprune.apply(model, vlmprune.ToMe(keep=0.5))
    twin, wish = copy.deepcopy(model), prefill(model, prompt).logits
    handle.remove()
    assert torch.equal(prefill(model, prompt).logits, dense)
    assert torch.equal(prefill(twin, prompt).logits, wish) and not torch.equal(wish, dense)


@pytest.mark.skipif(MAJOR < 5, reason="towers of transformers 4 capture nothing")
@pytest.mark.parametrize("family", MROPE)
def test_states_that_the_model_captures_are_those_of_the_blocks(family: str) -> None:
    model, prompt = family_model(family), batch(family)
    images = prompt.vision["pixel_values"], prompt.vision["image_grid_thw"]
    lengths = [len(item) for item in PackedReference(model, *images).items]
    stages = stages_for(lengths, 31, True, ((1, "middle"), (3, "before")))
    reference = PackedReference(model, *images, stages=stages)
    with vlmprune.applied(model, stages), torch.no_grad():
        states = model.model.get_image_features(*images, output_hidden_states=True, return_dict=True).hidden_states
    assert len(states) == 1 + len(reference.leaving)
    for got, units in zip(states[1:], reference.leaving, strict=True):
        assert_close(got, torch.cat([unit.states for unit in units]))


@pytest.mark.parametrize("family", MROPE)
def test_sizes_of_the_tower_are_those_that_pytorch_counts(family: str) -> None:
    """One image as large as one window."""
    model, prompt = random_vlm(family), make_family_prompt(family, (1,), sizes=((16, 16),))
    with FlopCounterMode(display=False, depth=20) as counter:
        prefill(model, prompt)
    counts, root = counter.get_flop_counts(), type(model).__name__
    depth = len(model.model.visual.blocks)
    counted = sum(sum(counts[f"{root}.model.visual.blocks.{block}"].values()) for block in range(depth))
    with vlmprune.applied(model, vlmprune.ToMe(r=1)) as handle:
        info = handle.info
    assert (
        info.vision_gated == (family == "qwen2_5_vl")
        and info.vision_heads == model.model.visual.blocks[0].attn.num_heads
    )
    assert tower_flops(info, [16] * depth, [16] * depth) == counted
