"""Virtual unmerging on every family equals the dense model in whose decoder the members of a group are one token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt
from family_runs import (
    DEPTH,
    FAMILIES,
    VIDEO,
    assert_close,
    batch,
    family_model,
    fixed_eviction,
    forced_tokens,
    rollout,
)
from fixed_policy import FixedGroups, FixedKeep
from llava_prompts import pick_tokens
from masked_reference import decoder_layers
from torch import Tensor, nn
from virtual_reference import Groups, group_places, pick_groups, unique, unmerged

import vlmprune
from vlmprune.core.policy import Policy
from vlmprune.core.sites import Site


def own_groups(prompt: FamilyPrompt) -> Groups:
    """Every token on its own."""
    return tuple(tuple(range(width)) for width in prompt.widths())


def check(
    model: nn.Module,
    prompt: FamilyPrompt,
    groups: Groups,
    later: Policy | None = None,
    gone: dict[int, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    turn: bool = False,
) -> vlmprune.api.Handle:
    """Prefill and steps equal the reference, which differs from the dense model and from merging alone."""
    forced, there = forced_tokens(prompt), unique(prompt, groups)
    for dropped in (gone or {}).values():
        there = there & ~dropped
    decode_only = later is not None and later.name == "fixed_eviction"
    with unmerged(model, prompt, groups, gone, decode_only):
        expected, expected_steps = rollout(model, prompt, forced, turn)
    merging = FixedGroups(kept=groups)
    with vlmprune.applied(model, merging if later is None else [merging, later]) as handle:
        got, steps = rollout(model, prompt, forced, turn)
    stay = unique(prompt, groups) if decode_only else there
    assert_close(got[stay], expected[stay], dtype)
    assert_close(steps, expected_steps, dtype)
    with vlmprune.applied(model, FixedGroups(kept=groups, positions="keep")):
        _, apart = rollout(model, prompt, forced[:, :1])
    seen = (apart[:, 0] - expected_steps[:, 0]).abs().amax(-1) > 1e-4
    assert seen.tolist() == [bool(images) for images in prompt.images]
    return handle


@pytest.mark.filterwarnings("ignore:.*nothing was reduced")
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_their_own_change_no_bit(family: str) -> None:
    model, prompt = family_model(family, torch.float32), batch(family, dtype=torch.float32)
    settings = {"max_new_tokens": 5, "do_sample": False}
    forced = forced_tokens(prompt, 3)
    dense, dense_steps = rollout(model, prompt, forced)
    with torch.no_grad():
        ids = model.generate(**prompt.inputs, **settings)
        with vlmprune.applied(model, FixedGroups(kept=own_groups(prompt))) as handle:
            assert torch.equal(model.generate(**prompt.inputs, **settings), ids)
            got, steps = rollout(model, prompt, forced)
    assert torch.equal(got[prompt.real], dense[prompt.real]) and torch.equal(steps, dense_steps)
    assert [record.positions for record in handle.last.sites] == ["virtual"]


@pytest.mark.parametrize(("images", "padded"), [((1,), False), ((2, 1, 0), True)], ids=["single", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_tokens(family: str, images: tuple[int, ...], padded: bool) -> None:
    model, prompt = family_model(family), batch(family, images, padded)
    groups = pick_groups(prompt.widths())
    handle = check(model, prompt, groups)
    kept = unique(prompt, groups).sum(1)
    assert handle.last.lengths_per_layer == (int(kept.max()),) * DEPTH


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention(family: str) -> None:
    prompt = batch(family, dtype=torch.float32)
    check(family_model(family, torch.float32, "eager"), prompt, pick_groups(prompt.widths()), dtype=torch.float32)


@pytest.mark.parametrize("family", VIDEO)
def test_videos_beside_images(family: str) -> None:
    prompt = batch(family, (1, 2, 1), video=True)
    check(family_model(family), prompt, pick_groups(prompt.widths()))


def per_row(prompt: FamilyPrompt, groups: Groups) -> list[list[int]]:
    """First places of the groups of each row with images, ascending: the tokens of a later site."""
    there = unique(prompt, groups) & (group_places(prompt, groups) >= 0)
    visual = torch.zeros_like(there)
    for row, images in enumerate(prompt.places()):
        visual[row, sum(images, [])] = True
    return [(there[row] & visual[row]).nonzero()[:, 0].tolist() for row, count in enumerate(prompt.images) if count]


def without(prompt: FamilyPrompt, groups: Groups, kept: tuple[tuple[int, ...], ...]) -> Tensor:
    """``[B, L]`` all places of the groups that a later site does not keep."""
    number, gone = group_places(prompt, groups), torch.zeros_like(prompt.real)
    rows = [row for row, count in enumerate(prompt.images) if count]
    for row, firsts, tokens in zip(rows, per_row(prompt, groups), kept, strict=True):
        lost = [place for i, place in enumerate(firsts) if i not in tokens]
        gone[row] = torch.isin(number[row], torch.tensor(lost, dtype=torch.long))
    return gone


@pytest.mark.parametrize("dropped", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_drops_whole_groups(family: str, dropped: int) -> None:
    """Before decoder layer 2, with and without tokens that the merging dropped already."""
    model, prompt = family_model(family), batch(family)
    groups = pick_groups(prompt.widths(), dropped)
    kept = pick_tokens([len(row) for row in per_row(prompt, groups)], ragged=True)
    gone = without(prompt, groups, kept)
    later = FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=2)
    check(model, prompt, groups, later, dict.fromkeys(range(2, DEPTH), gone))


@pytest.mark.parametrize("turn", [False, True], ids=["steps", "turn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evictions_drop_whole_groups(family: str, turn: bool) -> None:
    model, prompt = family_model(family), batch(family)
    groups = pick_groups(prompt.widths())
    widths = [len(row) for row in per_row(prompt, groups)]
    later = fixed_eviction(prompt, widths)
    gone = {layer: without(prompt, groups, kept) for layer, kept in enumerate(later.kept)}
    handle = check(model, prompt, groups, later, gone, turn=turn)
    assert handle.last.kept_tokens_per_layer[1] == (0,) * len(prompt.images)


def keep_call(calls: list[dict[str, Any]], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    calls.append(kwargs)


def give_call(call: dict[str, Any], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A prompt's features as another run had them."""
    if kwargs["inputs_embeds"].shape != call["inputs_embeds"].shape:
        return None
    names = ("inputs_embeds", "deepstack_visual_embeds")
    return args, {**kwargs, **{name: call[name] for name in names if name in kwargs}}


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_inside_the_tower(family: str) -> None:
    """The decoder takes over the tower's groups, and the features that the tower left."""
    model, prompt, calls = family_model(family), batch(family), []
    forced, layers = forced_tokens(prompt), decoder_layers(model)
    text = next(module for module in model.model.modules() if getattr(module, "layers", None) is layers)
    hook = text.register_forward_pre_hook(partial(keep_call, calls), with_kwargs=True)
    with vlmprune.applied(model, vlmprune.ToMe(r=1, positions="virtual")) as handle:
        got, steps = rollout(model, prompt, forced)
        report = handle.last
    hook.remove()
    groups = []
    for row, images in enumerate(prompt.places()):
        for image, places in enumerate(images):
            names = {token: i for i, group in enumerate(report.groups(row, image)) for token in group}
            groups.append(tuple(names.get(token, -1) for token in range(len(places))))
    there = unique(prompt, tuple(groups))
    with unmerged(model, prompt, tuple(groups)):
        hook = text.register_forward_pre_hook(partial(give_call, calls[0]), with_kwargs=True)
        expected, expected_steps = rollout(model, prompt, forced)
        hook.remove()
    assert_close(got[there], expected[there])
    assert_close(steps, expected_steps)
    assert [record.positions for record in report.sites] == ["virtual"]
    assert report.lengths_per_layer == (int(there.sum(1).max()),) * DEPTH
    assert report.lengths_per_layer[0] < prompt.length
