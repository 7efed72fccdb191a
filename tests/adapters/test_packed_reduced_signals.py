"""Signals of a packed tower whose tokens were reduced before, against plain steps in float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import MROPE, batch, family_model
from fixed_tower import FixedGroups, stages_for
from imitated_flash import flash_imitated
from packed_reference import BlockRecord, PackedReference, Unit, in_raster
from recording import Recording, Tape
from torch import Tensor

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Place, Site, SiteRequest
from vlmprune.embedded.random_models import random_vlm

WHERE: tuple[tuple[int, Place], ...] = ((0, "middle"), (2, "before"))
BLOCKS = (0, 1, 2, 3)
"""Block 0 attends to all tokens, block 1 behind the first stage, 2 and 3 behind both."""


@dataclass(frozen=True)
class Watching(Recording):
    """Records what it is given in the tower, at any place of a block."""

    place: Place = "middle"

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return (SiteRequest(Site.VISION_BLOCK, self.layer, self.wanted, "keep", place=self.place),)


def images_of(prompt: FamilyPrompt) -> tuple[Tensor, Tensor]:
    return prompt.vision["pixel_values"], prompt.vision["image_grid_thw"]


def staged(family: str, prompt: FamilyPrompt) -> tuple[list[FixedGroups], PackedReference]:
    """Two merges with drops, and the tower with them in plain steps."""
    model = family_model(family)
    lengths = [len(item) for item in PackedReference(model, *images_of(prompt)).items]
    stages = stages_for(lengths, 11, True, WHERE)
    return stages, PackedReference(model, *images_of(prompt), stages=stages)


class Expected:
    """What signals have to be, from a reference run of images.

    Attributes:
        counts: units of each image.
        groups: per image the units, in raster order, behind each token of the LLM.
    """

    def __init__(self, family: str, reference: PackedReference) -> None:
        self.reference = reference
        self.model = family_model(family)
        self.counts = [int(t * h * w) // reference.size for t, h, w in reference.grids.tolist()]
        number = in_raster(self.model, reference.grids, torch.arange(sum(self.counts))).argsort()
        starts = [sum(self.counts[:i]) for i in range(len(self.counts) + 1)]
        found = [sorted(number[list(unit.members)].tolist()) for unit in reference.units]
        self.groups = [
            sorted([i - a for i in group] for group in found if a <= group[0] < b)
            for a, b in zip(starts, starts[1:], strict=False)
        ]

    def patches(self, values: Tensor, units: list[Unit]) -> Tensor:
        """``[V, P, ...]`` of the values ``[n, ...]`` of the tokens' patches: copies for members, zeros for dropped."""
        spread = self.reference.spread(list(values.split(self.reference.size)), units)
        raster = in_raster(self.model, self.reference.grids, spread.unflatten(0, (-1, self.reference.size)))
        views = [part.flatten(0, 1) for part in raster.split(self.counts)]
        return torch.nn.utils.rnn.pad_sequence(views, batch_first=True)

    def tokens(self, patches: Tensor) -> Tensor:
        """``[I, N, ...]`` of the LLM's tokens: means over their units' patches."""
        units = patches.unflatten(1, (-1, self.reference.size)).mean(2)
        rows = [
            torch.cat([units[image, :0], *(units[image, group].mean(0, keepdim=True) for group in groups)])
            for image, groups in enumerate(self.groups)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def mass(self, record: BlockRecord, weights: Tensor | None, reduce: str) -> Tensor:
        """``[V, P]``: the weights of members' rows add up; none count each row once."""
        standing = self.patches(torch.arange(1, 1 + record.weights.shape[1]), record.units).long() - 1
        rows = torch.ones(record.weights.shape[1], dtype=torch.float64)
        if weights is not None:
            rows = torch.zeros_like(rows).index_add(0, standing[standing >= 0], weights[standing >= 0])
        received = (rows[:, None] * record.weights.mean(0)).sum(0)
        mass = torch.where(standing >= 0, received[standing.clamp_min(0)], 0)
        if reduce == "sum":
            return mass
        own = [rows[line[line >= 0].unique()].sum() for line in standing]
        return mass / torch.stack(own).clamp_min(1e-30)[:, None]


def record(family: str, prompt: FamilyPrompt, stages: list[FixedGroups], signals: Any, flash: bool) -> Context:
    model, last = random_vlm(family, dtype=torch.float64) if flash else family_model(family), Recording(wanted=signals)
    with flash_imitated(model) if flash else nullcontext(), vlmprune.applied(model, [*stages, last]):
        prefill(model, prompt)
    return last.tape.last


def close(got: Tensor, wish: Tensor) -> bool:
    return got.shape == wish.shape and bool((got.double() - wish).abs().max() <= 2e-6 * max(1.0, wish.abs().max()))


@pytest.mark.parametrize("flash", [False, True], ids=["sdpa", "flash"])
@pytest.mark.parametrize("family", MROPE)
def test_signals_behind_reductions(family: str, flash: bool) -> None:
    prompt = batch(family)
    stages, reference = staged(family, prompt)
    expected = Expected(family, reference)
    signals: list[s.Signal] = [s.PreProjector()]
    for block in BLOCKS:
        signals += [s.ColumnMass("vision", block), s.ColumnMass("vision", block, "sum"), s.Keys("vision", block)]
        signals += [s.QK("vision", block), s.Attention(block)]
        signals += [s.Hidden("vision", block, "in"), s.Hidden("vision", block, "out")]
    context = record(family, prompt, stages, tuple(signals), flash)
    assert context.lengths == tuple(len(groups) for groups in expected.groups)
    leaving = torch.cat([unit.states for unit in reference.units])
    assert close(context.signal(s.PreProjector()), expected.tokens(expected.patches(leaving, reference.units)))
    for block in BLOCKS:
        done = reference.attention[block]
        for when, units in (("in", reference.entering[block]), ("out", reference.leaving[block])):
            states = expected.patches(torch.cat([unit.states for unit in units]), units)
            assert close(context.signal(s.Hidden("vision", block, when)), expected.tokens(states))  # type: ignore[arg-type]
        keys = expected.patches(done.key.transpose(0, 1).flatten(1), done.units)
        assert close(context.signal(s.Keys("vision", block)), expected.tokens(keys))
        for got, part in zip(context.signal(s.QK("vision", block)), (done.query, done.key), strict=True):
            assert close(got, expected.patches(part.transpose(0, 1), done.units).transpose(1, 2))
        for reduce in ("mean", "sum"):
            mass = expected.mass(done, None, reduce)
            assert close(context.signal(s.ColumnMass("vision", block, reduce)), expected.tokens(mass))  # type: ignore[arg-type]


@pytest.mark.parametrize("flash", [False, True], ids=["sdpa", "flash"])
@pytest.mark.parametrize("family", MROPE)
def test_the_attention_map_behind_reductions(family: str, flash: bool) -> None:
    prompt = batch(family)
    stages, reference = staged(family, prompt)
    expected = Expected(family, reference)
    context = record(family, prompt, stages, tuple(s.Attention(block) for block in BLOCKS), flash)
    generator = torch.Generator().manual_seed(8)
    for block in BLOCKS:
        done, given = reference.attention[block], context.signal(s.Attention(block))
        valid = torch.arange(4 * max(expected.counts)) < 4 * torch.tensor(expected.counts)[:, None]
        weights = torch.rand(valid.shape, generator=generator, dtype=torch.float64) * valid
        for rows in (None, weights):
            for reduce in ("mean", "sum"):
                assert close(given.column_mass(rows, reduce), expected.mass(done, rows, reduce))
        one = given.views(torch.tensor([1])).column_mass(weights[1:2])
        assert close(one, expected.mass(done, weights, "mean")[1:2])


@pytest.mark.parametrize("flash", [False, True], ids=["sdpa", "flash"])
@pytest.mark.parametrize("family", MROPE)
def test_signals_inside_the_tower(family: str, flash: bool) -> None:
    """Keys, and votes between the units of an item, in the block behind a merge and drops."""
    prompt = batch(family)
    stages, reference = staged(family, prompt)
    block, wanted = 1, (s.KeyMean(1), s.Keys("vision", 1), s.HeadAttention(1))
    tape = Tape()
    watching = Watching(wanted=wanted, layer=block, tape=tape)
    model = random_vlm(family, dtype=torch.float64) if flash else family_model(family)
    with flash_imitated(model) if flash else nullcontext(), vlmprune.applied(model, [stages[0], watching, stages[1]]):
        prefill(model, prompt)
    context, done = tape.last, reference.attention[block]
    assert context.entered == tuple(len(item) for item in reference.items)
    heads = context.signal(s.HeadAttention(block))
    alive = torch.rand(context.valid.shape, generator=torch.Generator().manual_seed(4)) > 0.3
    start = torch.rand(context.valid.shape, generator=torch.Generator().manual_seed(5)) * context.valid
    all_votes, votes = heads.pagerank(3, start), heads.pagerank(2, start, alive)
    for number, item in enumerate(reference.items):
        places = [i for i, unit in enumerate(done.units) if unit.place in set(item)]
        n = len(places)
        assert context.lengths[number] == n
        if not n:
            continue
        assert context.sizes[number, :n].tolist() == [len(done.units[i].members) for i in places]
        rows = torch.tensor(places)[:, None] * 4 + torch.arange(4)
        key = done.key[:, rows]  # [H, n, u, d]
        assert close(context.signal(wanted[0])[number, :n], key.mean(0).flatten(1))
        assert close(context.signal(wanted[1])[number, :n], key.movedim(0, 2).flatten(1))
        sizes = torch.tensor([len(done.units[i].members) for i in places], dtype=torch.float64)
        scores = done.query[:, rows].flatten(1, 2) @ key.flatten(1, 2).transpose(1, 2) * key.shape[-1] ** -0.5
        scores = scores + sizes.log().repeat_interleave(4)
        assert close(all_votes[number, :, :n], voted(scores, start[number, :n], 3, torch.ones(n, dtype=torch.bool)))
        assert close(votes[number, :, :n], voted(scores, start[number, :n], 2, alive[number, :n]))
        assert not all_votes[number, :, n:].any() and not votes[number, :, n:].any()


def voted(scores: Tensor, start: Tensor, rounds: int, alive: Tensor) -> Tensor:
    """``[H, n]`` votes between units: a row is the mean of its patches' rows, a column the sum of theirs."""
    if not alive.any():
        return torch.zeros(len(scores), len(start), dtype=torch.float64)
    weights = scores.masked_fill(~alive.repeat_interleave(4), -torch.inf).softmax(-1)
    units = weights.unflatten(2, (-1, 4)).sum(3).unflatten(1, (-1, 4)).mean(2)
    result = (start * alive).double().expand(len(scores), -1)
    for _ in range(rounds):
        result = (result[:, None] @ (units * alive[:, None]))[:, 0]
    return result
