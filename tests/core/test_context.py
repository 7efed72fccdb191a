"""Contexts: budgets per item and view, grouping of views, signals, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, SignalError, UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.signals import ClsRow, Hidden
from vlmprune.core.sites import Site
from vlmprune.core.views import View, split_count

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
INFO = ModelInfo("test", "TestModel")


def make(lengths: Sequence[int], keep: Any = 1.0, **fields: Any) -> Context:
    width = max(lengths, default=0)
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    fields = {"site": Site.POST_ENCODER, "info": INFO} | fields
    return Context(budget=Budget.parse(keep), lengths=tuple(lengths), valid=valid, **fields)


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
# Per item its views' grids, and whether a newline follows each grid row.
ITEMS = st.lists(st.tuples(st.lists(GRIDS, min_size=1, max_size=4), st.booleans()), min_size=1, max_size=4)


def lay_out(items: list[tuple[list[tuple[int, int]], bool]], keep: Any) -> Context:
    """A post-encoder batch whose items' views follow one another, with newlines where asked for."""
    views, pinned_rows = [], []
    for grids, newlines in items:
        place, row, pinned = 0, [], []
        for height, width in grids:
            cells = []
            for _ in range(height):
                cells += range(place, place + width)
                place += width
                pinned += [False] * width + [True] * newlines
                place += newlines
            row.append(View(height, width, cells[0], index=tuple(cells) if newlines else None))
        views.append(tuple(row))
        pinned_rows.append(pinned)
    lengths = [len(row) for row in pinned_rows]
    pinned_mask = torch.tensor([row + [False] * (max(lengths) - len(row)) for row in pinned_rows])
    return make(lengths, keep, views=tuple(views), pinned=pinned_mask)


@PROPERTY
@given(items=ITEMS, keep=st.one_of(st.integers(1, 20), st.sampled_from([0.1, 0.34, 0.5, 1.0])))
def test_counts_leave_out_pinned_tokens(items: Any, keep: float) -> None:
    context = lay_out(items, keep)
    cells = [sum(height * width for height, width in grids) for grids, _ in items]
    expected = [min(keep, n) if isinstance(keep, int) else max(1, int(keep * n)) for n in cells]
    assert list(context.counts()) == expected
    assert context.candidates.sum(1).tolist() == cells
    assert not (context.candidates & ~context.valid).any()


@PROPERTY
@given(items=ITEMS, keep=st.integers(1, 40))
def test_view_groups_hold_every_view_once(items: Any, keep: int) -> None:
    context = lay_out(items, keep)
    counts = context.view_counts(context.counts())
    assert [sum(row) for row in counts] == list(context.counts())
    values = torch.randn(*context.valid.shape, 2)
    seen = {}
    keys = []
    for group in context.view_groups(counts):
        keys.append((group.height, group.width, group.count))
        assert group.item.tolist() == [item for item, _ in group.places]
        gathered = group.gather(values)
        for row, (item, number) in enumerate(group.places):
            view = context.views[item][number]
            assert (view.height, view.width) == (group.height, group.width)
            assert group.count == counts[item][number]
            assert group.index[row].tolist() == view.tokens().tolist()
            for cell, token in enumerate(view.tokens().tolist()):
                assert torch.equal(gathered[row, cell], values[item, token])
                seen[item, token] = seen.get((item, token), 0) + 1
    assert len(keys) == len(set(keys))  # one batched call per grid and budget
    # Every candidate belongs to one view, no pinned token to any.
    assert seen == dict.fromkeys(map(tuple, context.candidates.nonzero().tolist()), 1)


@PROPERTY
@given(items=ITEMS, keep=st.integers(1, 30))
def test_view_counts_are_proportional(items: Any, keep: int) -> None:
    context = lay_out(items, keep)
    for (grids, _), count, shares in zip(items, context.counts(), context.view_counts(context.counts()), strict=True):
        areas = [height * width for height, width in grids]
        assert list(shares) == split_count(count, areas)
        assert all(abs(share - count * a / sum(areas)) < 1 for share, a in zip(shares, areas, strict=True))


def test_without_views_an_item_is_one_row() -> None:
    context = make([5, 0, 3], 0.5, site=Site.DECODER_LAYER)
    assert context.counts() == (2, 0, 1)
    assert context.item_views(0) == (View(1, 5),)
    groups = list(context.view_groups(context.view_counts(context.counts())))
    assert [(g.height, g.width, g.count, g.places) for g in groups] == [
        (1, 5, 2, ((0, 0),)),
        (1, 0, 0, ((1, 0),)),
        (1, 3, 1, ((2, 0),)),
    ]


def test_rounding_and_minimum_reach_the_budget() -> None:
    context = make([5, 7], 0.5)
    assert context.counts("floor") == (2, 3)
    assert context.counts("round") == (2, 4)
    assert context.counts("ceil") == (3, 4)
    assert make([5, 7], 0.01).counts(minimum=3) == (3, 3)


def test_a_budget_list_counts_images_of_a_sample() -> None:
    context = make([10, 10, 10, 10], [2, 0.5], sample=(0, 0, 3, 3))
    assert context.counts() == (2, 5, 2, 5)
    assert [context.image_index(i) for i in range(4)] == [0, 1, 0, 1]
    mixed = make([10, 10, 10], [2, 0.5], sample=(1, 0, 1))
    assert mixed.counts() == (2, 2, 5)
    with pytest.raises(BudgetError, match="2 entries"):
        make([10, 10, 10], [2, 0.5], sample=(0, 0, 0)).counts()


def test_signals_are_looked_up_by_value() -> None:
    rows = torch.rand(1, 4)
    context = make([4], signals={ClsRow(3): rows})
    assert context.signal(ClsRow(3)) is rows
    with pytest.raises(SignalError, match=r"Hidden\(.*post_encoder.*requests\(\)") as caught:
        context.signal(Hidden("vision", 3))
    assert isinstance(caught.value, UnsupportedError)


def test_item_generators_follow_their_seed_alone() -> None:
    first, second = make([4, 4], seeds=(11, 12)), make([4, 4, 4], seeds=(12, 5, 11))
    draw = [torch.rand(3, generator=first.item_generator(i)).tolist() for i in (0, 1)]
    assert draw[0] == torch.rand(3, generator=second.item_generator(2)).tolist()
    assert draw[1] == torch.rand(3, generator=second.item_generator(0)).tolist()
    assert draw[0] != draw[1]
    with pytest.raises(SignalError, match="is_random"):
        make([4]).item_generator(0)


def test_sizes() -> None:
    context = make([4, 2])
    assert (context.n_items, context.width, context.device.type) == (2, 4, "cpu")
    assert torch.equal(context.candidates, context.valid)
