"""Tokens reduced inside the packed towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, against plain steps in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import MROPE, batch, family_model
from fixed_tower import FixedGroups, stages_for
from packed_reference import PackedReference
from torch import Tensor, nn

import vlmprune
from vlmprune.core.sites import Place

PLACES: tuple[Place, ...] = ("before", "middle")


def encoded(family: str, prompt: FamilyPrompt, kind: str = "image") -> tuple[Tensor, Tensor]:
    """Pixels and grids of the images or videos of a batch."""
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return prompt.vision[names[0]], prompt.vision[names[1]]


def made_by(model: nn.Module, prompt: FamilyPrompt, policy: Any = None) -> list[Tensor]:
    """What the merger (and then each level of deepstack) hands on, by a policy or dense, in the tower's order."""
    found: list[Tensor] = []
    with nullcontext() if policy is None else vlmprune.applied(model, policy):
        hooks = [
            merger.register_forward_hook(lambda module, args, output: found.append(output))
            for merger in mergers(model.model.visual)
        ]
        prefill(model, prompt)
        for hook in hooks:
            hook.remove()
    return found[-1:] + found[:-1]  # the merger runs last


def mergers(tower: nn.Module) -> list[nn.Module]:
    return [tower.merger, *getattr(tower, "deepstack_merger_list", [])]


def plan(reference: PackedReference, seed: int, merge: bool, where: tuple[tuple[int, Place], ...]) -> list[FixedGroups]:
    """Random stages, one after the other; the first one empties items."""
    return stages_for([len(item) for item in reference.items], seed, merge, where)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", MROPE)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore:fixed_groups. nothing was reduced")
def test_a_reduction_that_keeps_everything_changes_no_bit(family: str, place: str, implementation: str) -> None:
    model, prompt = family_model(family, torch.float32, implementation), batch(family, dtype=torch.float32)
    dense = prefill(model, prompt).logits
    lengths = [len(item) for item in PackedReference(family_model(family), *encoded(family, batch(family))).items]
    alone = tuple(tuple((token,) for token in range(n)) for n in lengths)
    stages = [FixedGroups(groups=(alone,), layer=layer, place=place) for layer in (0, 1, 2)]  # type: ignore[arg-type]
    with vlmprune.applied(model, stages) as handle:
        assert torch.equal(prefill(model, prompt).logits, dense)
        assert len(handle.last.tower_sites) == 3
    assert torch.equal(prefill(model, prompt).logits, dense)


@pytest.mark.parametrize("family", MROPE)
def test_plain_steps_are_the_stock_tower(family: str) -> None:
    model, prompt = family_model(family), batch(family)
    reference = PackedReference(model, *encoded(family, prompt))
    found = made_by(model, prompt)
    wish = [reference.features(), *reference.deepstack]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, wish, strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", MROPE)
def test_pruning_equals_the_dense_tower_with_hidden_keys(family: str, place: str) -> None:
    """Windows that lose everything are gone; the levels of deepstack are those of their own block."""
    model, prompt = family_model(family), batch(family)
    images = encoded(family, prompt)
    stages = plan(PackedReference(model, *images), 3, False, ((1, place), (2, "before")))
    reference = PackedReference(model, *images, stages=stages, hide=True)
    shown = [unit for unit in reference.units if not unit.hidden]
    assert 0 < len(shown) < len(reference.units)
    assert any(all(u.hidden for u in reference.units if u.place in item) for item in reference.items)
    found = made_by(model, prompt, stages)
    assert (found[0] - reference.features(units=shown)).abs().max() < 1e-12
    assert len(found) == 1 + len(reference.deepstack)
    left = torch.zeros(len(found[0]), dtype=torch.bool)
    left[[unit.place for unit in shown]] = True
    assert not found[0][~left].any()
    for got, wish in zip(found[1:], reference.deepstack, strict=True):
        assert (got - wish)[left].abs().max() < 1e-12


@pytest.mark.parametrize("size_bias", [True, False])
@pytest.mark.parametrize("family", MROPE)
def test_merges_equal_plain_steps(family: str, size_bias: bool) -> None:
    model, prompt = family_model(family), batch(family)
    images = encoded(family, prompt)
    stages = plan(PackedReference(model, *images), 5, True, ((0, "middle"), (2, "before"), (2, "middle")))
    stages = [FixedGroups(groups=s.groups, layer=s.layer, place=s.place, size_bias=size_bias) for s in stages]
    reference = PackedReference(model, *images, stages=stages)
    assert max(len(unit.members) for unit in reference.units) > 2
    found = made_by(model, prompt, stages)
    wish = [reference.features(), *reference.deepstack]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, wish, strict=True))
