"""The bases of policies: scores, sets, stages and caches, against plain lists."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.core.bases import CachePolicy, ScorePolicy, SetPolicy, StagedPolicy, keep_highest
from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.signals import AttentionRows, ClsRow, DecodeRows, Signal
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.core.views import View, ViewGroup

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
INFO = ModelInfo("llava", "LlavaModel", text_depth=32, vision_depth=24, feature_block=22, tokens_per_image=576)
MROPE = dataclasses.replace(INFO, mrope=True)


@dataclass(frozen=True)
class ByFeature(ScorePolicy):
    """The first feature is the score."""

    meta = PolicyMeta("ByFeature")

    def signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return (ClsRow(info.vision_layer(-1)),)

    def scores(self, context: Context) -> Tensor:
        assert context.features is not None
        return context.features[..., 0]


@dataclass(frozen=True)
class FirstCells(SetPolicy):
    """The first cells of every view, last one first."""

    meta = PolicyMeta("FirstCells")

    def pick(self, context: Context, group: ViewGroup) -> Tensor:
        assert group.count > 0 and group.index.shape[1] == group.height * group.width
        return torch.arange(group.count).flip(0).expand(len(group.item), -1)


@dataclass(frozen=True)
class Loose(FirstCells):
    """Like FirstCells, but leaves out what it would keep in the second place."""

    @property
    def exact(self) -> bool:
        return False

    def pick(self, context: Context, group: ViewGroup) -> Tensor:
        chosen = super().pick(context, group)
        return torch.where(chosen == 1, -1, chosen)


@dataclass(frozen=True)
class Stages(StagedPolicy):
    meta = PolicyMeta("Stages")
    layers: tuple[int | float, ...] = (2, 0.5)

    def stage_signals(self, info: ModelInfo, layer: int) -> tuple[Signal, ...]:
        return (AttentionRows("text", layer - 1),)

    def stage_scores(self, context: Context, stage: int) -> Tensor:
        assert context.features is not None
        return context.features[..., stage]


@dataclass(frozen=True)
class Evict(CachePolicy):
    meta = PolicyMeta("Evict")

    def cache_signals(self, info: ModelInfo, layer: int) -> tuple[Signal, ...]:
        return (DecodeRows(layer),)


def context(features: Tensor, lengths: tuple[int, ...], keep: Any, **fields: Any) -> Context:
    valid = torch.arange(features.shape[1]) < torch.tensor(lengths)[:, None]
    fields = {"site": Site.POST_ENCODER, "info": INFO} | fields
    return Context(budget=Budget.parse(keep), lengths=lengths, valid=valid, features=features, **fields)


def best(scores: list[float], count: int) -> list[int]:
    """Places of the highest scores, lowest place on ties, ascending."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:count])


def kept(selection: Selection) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in selection.anchors().tolist()]


# Few distinct values, so that ties are the rule.
SCORES = st.lists(st.lists(st.integers(-2, 2), max_size=9), min_size=1, max_size=4)


@PROPERTY
@given(rows=SCORES, data=st.data())
def test_keep_highest(rows: list[list[int]], data: st.DataObject) -> None:
    counts = tuple(data.draw(st.integers(0, len(row))) for row in rows)
    width = max(map(len, rows)) + 1
    scores = torch.tensor([row + [9] * (width - len(row)) for row in rows]).float()
    valid = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    selection = keep_highest(scores, valid, counts)
    assert kept(selection) == [best(row, count) for row, count in zip(rows, counts, strict=True)]
    assert selection.out_counts() == counts
    assert selection.out_valid().sum(1).tolist() == list(counts)
    assert torch.equal(selection.scores, scores)


@PROPERTY
@given(rows=SCORES, keep=st.sampled_from([0.3, 0.5, 1.0, 2, 20]))
def test_score_policy(rows: list[list[int]], keep: Any) -> None:
    lengths = tuple(map(len, rows))
    features = torch.tensor([row + [9] * (max(lengths) + 1 - len(row)) for row in rows])[..., None]
    selection = ByFeature(keep=keep).select(context(features, lengths, keep))
    counts = [min(keep, n) if isinstance(keep, int) else min(n, max(1, int(keep * n))) for n in lengths]
    assert kept(selection) == [best(row, count) for row, count in zip(rows, counts, strict=True)]
    assert selection.out_counts() == tuple(counts)


def test_pinned_tokens_are_no_candidates() -> None:
    """Two rows of two cells with a newline behind each; newlines score highest."""
    features = torch.tensor([[[1.0], [2], [9], [3], [4], [9]]])
    pinned = features[..., 0] == 9
    views = ((View(2, 2, index=(0, 1, 3, 4)),),)
    here = context(features, (6,), 0.5, pinned=pinned, views=views)
    assert kept(ByFeature().select(here)) == [[3, 4]]
    assert kept(FirstCells().select(here)) == [[0, 1]]


def test_batch_equals_single_results() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = (7, 4, 9)
    features = torch.randn(3, 9, 1, generator=generator)
    together = kept(ByFeature().select(context(features, lengths, 0.4)))
    for item, length in enumerate(lengths):
        alone = context(features[item : item + 1, :length], (length,), 0.4)
        assert kept(ByFeature().select(alone)) == [together[item]]


@PROPERTY
@given(seed=st.integers(0, 10**6), keep=st.sampled_from([1, 3, 0.25, 0.5, 1.0]))
def test_set_policy(seed: int, keep: Any) -> None:
    """Every view gets its share, at its place."""
    rng = random.Random(seed)
    views, lengths = [], []
    for _ in range(rng.randint(1, 3)):
        row, start = [], 0
        for _ in range(rng.randint(1, 3)):
            view = View(rng.randint(1, 3), rng.randint(1, 3), start)
            row.append(view)
            start += view.length
        views.append(tuple(row))
        lengths.append(start)
    here = context(torch.zeros(len(views), max(lengths), 1), tuple(lengths), keep, views=tuple(views))
    per_view = here.view_counts(here.counts())
    expected = [
        [view.start + cell for view, count in zip(row, counts, strict=True) for cell in range(count)]
        for row, counts in zip(views, per_view, strict=True)
    ]
    selection = FirstCells().select(here)
    assert kept(selection) == expected
    assert selection.out_counts() == tuple(map(len, expected)) == here.counts()
    loose = [
        [view.start + c for view, count in zip(row, counts, strict=True) for c in range(count) if c != 1]
        for row, counts in zip(views, per_view, strict=True)
    ]
    assert kept(Loose().select(here)) == loose
    assert Loose().select(here).out_counts() == tuple(map(len, loose))


def test_single_site_requests() -> None:
    assert ByFeature().requests(INFO) == (SiteRequest(Site.POST_ENCODER, None, (ClsRow(22),), "compact"),)
    assert ByFeature().requests(MROPE)[0].positions == "keep"


def test_stages() -> None:
    requests = Stages(keep=[0.5, 2]).requests(INFO)
    assert [(r.site, r.layer, r.signals) for r in requests] == [
        (Site.DECODER_LAYER, 2, (AttentionRows("text", 1),)),
        (Site.DECODER_LAYER, 16, (AttentionRows("text", 15),)),
    ]
    features = torch.tensor([[[1.0, 4], [2, 3], [3, 2], [4, 1]], [[4.0, 1], [3, 2], [0, 9], [0, 9]]])
    policy = Stages(keep=[0.5, 1])
    for layer, expected in [(2, [[2, 3], [0]]), (16, [[0], [1]])]:
        here = context(features, (4, 2), policy.keep, site=Site.DECODER_LAYER, layer=layer)
        assert kept(policy.select(here)) == expected
    single = Stages(keep=0.5)
    here = context(features, (4, 2), 0.5, site=Site.DECODER_LAYER, layer=16)
    assert kept(single.select(here)) == [[0, 1], [1]]


@pytest.mark.parametrize("layers", [(2, 2), (5, 3), (0.05, 2), (0.01, 0.02)])
def test_stages_that_collapse(layers: tuple[int | float, ...]) -> None:
    with pytest.raises(InputError, match=r"do not increase; give explicit layers or fewer stages") as caught:
        Stages(layers=layers).requests(INFO)
    assert str(layers) in str(caught.value) and "LlavaModel (32 layers)" in str(caught.value)


def test_stages_need_an_earlier_layer() -> None:
    with pytest.raises(InputError, match="from 1 to 31"):
        Stages(layers=(0,)).requests(INFO)


def test_a_budget_list_too_short_for_the_stages() -> None:
    policy = Stages(keep=[0.5])
    here = context(torch.zeros(1, 4, 2), (4,), policy.keep, site=Site.DECODER_LAYER, layer=16)
    with pytest.raises(BudgetError, match="1 entries.*entry 2"):
        policy.select(here)


def test_cache_requests() -> None:
    requests = Evict(keep=0.5, positions="compact").requests(dataclasses.replace(INFO, text_depth=3))
    assert requests == tuple(SiteRequest(Site.KV_CACHE, n, (DecodeRows(n),), "keep") for n in range(3))
    assert Evict(keep=0.5).requests(dataclasses.replace(INFO, text_depth=None)) == ()
