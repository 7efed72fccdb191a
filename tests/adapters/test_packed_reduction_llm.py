"""What is left of a packed tower's tokens reaches the LLM: features, positions, deepstack, lineage, batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, decode, prefill
from family_runs import MROPE, assert_close, batch, family_model, forced_tokens
from fixed_tower import FixedGroups, stages_for
from imitated_flash import flash_imitated
from model_state import model_state
from packed_reference import PackedReference, in_raster
from prompt_parts import VIDEO
from torch import Tensor, nn

import vlmprune
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.sites import Place
from vlmprune.embedded.random_models import random_vlm

WHERE: tuple[tuple[int, Place], ...] = ((0, "middle"), (1, "before"), (2, "middle"))


@dataclass(frozen=True)
class Left:
    """What is left of one image or video: groups of its units in raster order, features and deepstack levels
    ``[units, D]``, equal for the members of a group as far as they were merged by then."""

    groups: list[list[int]]
    features: Tensor
    levels: list[Tensor]


def left_of(model: nn.Module, reference: PackedReference) -> list[Left]:
    """Per image or video of a run."""
    counts = [int(t * h * w) // reference.size for t, h, w in reference.grids.tolist()]
    raster = in_raster(model, reference.grids, torch.arange(sum(counts))).argsort()
    found = [sorted(raster[list(unit.members)].tolist()) for unit in reference.units]
    values = [in_raster(model, reference.grids, v) for v in (reference.features(), *reference.deepstack)]
    left = []
    for end, count in zip(itertools.accumulate(counts), counts, strict=True):
        groups = sorted([i - end + count for i in group] for group in found if end - count <= group[0] < end)
        features, *levels = (value[end - count : end] for value in values)
        left.append(Left(groups, features, levels))
    return left


def runs(prompt: FamilyPrompt) -> list[tuple[bool, Tensor, Tensor]]:
    """Whether it is one of videos, pixels, and grids, of each run of the tower."""
    names = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    vision = prompt.vision
    return [(video > 0, *(vision[n] for n in pair)) for video, pair in enumerate(names) if pair[0] in vision]


def reduced(family: str, prompt: FamilyPrompt, merge: bool) -> tuple[list[FixedGroups], list[list[Left]]]:
    """Stages for all runs of the tower, and per row what they leave of its images and videos."""
    model = family_model(family)
    each, left = [], {}
    for number, (video, pixels, grids) in enumerate(runs(prompt)):
        lengths = [len(item) for item in PackedReference(model, pixels, grids).items]
        each.append(stages_for(lengths, 20 + number, merge, WHERE))
        left[video] = iter(left_of(model, PackedReference(model, pixels, grids, stages=each[-1])))
    stages = [replace(parts[0], groups=tuple(part.groups[0] for part in parts)) for parts in zip(*each, strict=True)]
    return stages, [[next(left[VIDEO in part.kinds]) for part in row.parts] for row in prompt.rows]


def by_hand(family: str, prompt: FamilyPrompt, row: int, left: list[Left]) -> tuple[Tensor, Tensor]:
    """Places of a row's tokens that stay, and their logits, from the LLM alone on a shorter prompt."""
    model, one = family_model(family), prompt.row(row)
    ids = one.ids
    embeds, stays, visual = model.get_input_embeddings()(ids)[0].clone(), ids[0] >= 0, torch.zeros_like(ids[0]).bool()
    levels = [torch.zeros_like(embeds) for _ in (left[0].levels if left else [])]
    for places, part in zip(one.places()[0], left, strict=True):
        stays[places] = False
        for group in part.groups:
            place = places[group[0]]
            embeds[place], stays[place], visual[place] = part.features[group].mean(0), True, True
            for field_, level in zip(levels, part.levels, strict=True):
                field_[place] = level[group].mean(0)
    extra: dict[str, Any] = {}
    if levels:
        shown = visual[stays]
        extra = {"visual_pos_masks": shown[None], "deepstack_visual_embeds": [v[stays][shown] for v in levels]}
    out = model.model.language_model(
        inputs_embeds=embeds[stays][None],
        position_ids=one.position_ids(model)[..., stays],
        attention_mask=torch.ones(1, int(stays.sum()), dtype=torch.long),
        **extra,
    )
    return stays.nonzero()[:, 0] + prompt.length - ids.shape[1], model.lm_head(out.last_hidden_state)[0]


@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
@pytest.mark.parametrize("merge", [False, True], ids=["prune", "merge"])
@pytest.mark.parametrize("family", MROPE)
@torch.no_grad()
def test_the_llm_works_on_what_the_tower_left(family: str, merge: bool, video: bool) -> None:
    """Several images of different sizes per row, left padding; merged tokens stand where their first one stood."""
    model, prompt = family_model(family), batch(family, (2, 0, 1) if video else (2, 1, 0), video=video)
    stages, left = reduced(family, prompt, merge)
    with vlmprune.applied(model, stages) as handle:
        logits = prefill(model, prompt).logits
        report = handle.last
    for row, parts in enumerate(left):
        places, wish = by_hand(family, prompt, row, parts)
        assert_close(logits[row, places], wish)
        for number, part in enumerate(parts):
            assert report.groups(row, number) == part.groups
    assert report.kept_tokens == tuple(sum(len(part.groups) for part in parts) for parts in left)
    assert len(report.tower_sites) == len(WHERE) * len(runs(prompt))


@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
@pytest.mark.parametrize("family", MROPE)
def test_a_batch_is_its_rows(family: str, video: bool) -> None:
    model, prompt = family_model(family), batch(family, (2, 1, 0), video=video)
    forced = forced_tokens(prompt)
    with vlmprune.applied(model, vlmprune.ToMe(keep=0.4)) as handle:
        out = prefill(model, prompt, use_cache=True)
        report, steps = handle.last, decode(model, prompt, out.past_key_values, forced)
        for row in range(len(prompt.rows)):
            one = prompt.row(row)
            alone = prefill(model, one, use_cache=True)
            assert_close(out.logits[row, -one.length :], alone.logits[0])
            assert_close(steps[row], decode(model, one, alone.past_key_values, forced[row : row + 1])[0])
            for image in range(len(one.rows[0].parts)):
                assert report.groups(row, image) == handle.last.groups(0, image)
        assert [kept < n for kept, n in zip(report.kept_tokens, report.visual_tokens, strict=True)] == [1, 1, 0]


@pytest.mark.parametrize("family", MROPE)
def test_flash_attention_takes_the_bias_in_its_features(family: str) -> None:
    prompt = batch(family)
    stages, _ = reduced(family, prompt, merge=True)
    model = random_vlm(family, dtype=torch.float64)
    with vlmprune.applied(model, stages):
        wish = prefill(model, prompt).logits
    with flash_imitated(model), vlmprune.applied(model, stages) as handle:
        got, report = prefill(model, prompt).logits, handle.last
    stay = prompt.real & ~prompt.dropped([report.kept(r, i) for r, n in enumerate(prompt.images) for i in range(n)])
    assert_close(got[stay], wish[stay])
    unbiased = [replace(stage, size_bias=False) for stage in stages]
    with vlmprune.applied(model, unbiased):
        assert (prefill(model, prompt).logits - wish)[stay].abs().max() > 1e-6


@pytest.mark.parametrize("family", MROPE)
def test_removal_is_exact(family: str) -> None:
    model, prompt = random_vlm(family), batch(family, dtype=torch.float32)
    prefill(model, prompt, output_hidden_states=True)  # transformers' own hooks are there from now on
    before, dense = model_state(model), prefill(model, prompt).logits
    handle = vlmprune.apply(model, vlmprune.ToMe(keep=0.5))
    assert not torch.equal(prefill(model, prompt).logits, dense)
    with handle.disabled():
        assert torch.equal(prefill(model, prompt).logits, dense)
    handle.remove()
    assert torch.equal(prefill(model, prompt).logits, dense)
    assert model_state(model) == before


@pytest.mark.parametrize("family", MROPE)
def test_every_item_draws_by_itself_in_any_batch(family: str) -> None:
    model, prompt, policy = (
        family_model(family),
        batch(family, (1, 1), sizes=((48, 48),)),
        vlmprune.ToMe(r=2, matching="random"),
    )
    with vlmprune.applied(model, policy) as handle:
        prefill(model, prompt)
        both, chosen = handle.last, handle.last.tower_sites[0].selection.group_id
        for row in range(2):
            prefill(model, prompt.row(row))
            assert handle.last.groups(0) == both.groups(row)
    assert len({tuple(item) for item in chosen.tolist()}) > 1


@pytest.mark.parametrize("family", MROPE)
def test_dropping_everything_is_refused(family: str) -> None:
    model, prompt = family_model(family), batch(family, (1,))
    items = PackedReference(model, *runs(prompt)[0][1:]).items
    nothing = FixedGroups(groups=(((),) * len(items),), layer=1, place="before")
    with vlmprune.applied(model, nothing), pytest.raises(UnsupportedError, match="keep at least one"):
        prefill(model, prompt)
