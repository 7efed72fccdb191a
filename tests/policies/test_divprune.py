"""DivPrune's picks against a plain loop, and what newline tokens are."""

from __future__ import annotations

from dataclasses import replace

import contexts
import numpy as np
import pytest
import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.signals import Projected
from vlmprune.core.views import Newline, View
from vlmprune.policies import divprune
from vlmprune.policies.divprune import DivPrune, isolation


def by_hand(features: np.ndarray, count: int) -> list[int]:
    """The algorithm as a loop in float64."""
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    n = len(features)
    nearest = [min((distance[i, j] for j in range(n) if j != i), default=np.inf) for i in range(n)]
    chosen = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(chosen) < count:
        state = {i: min(distance[i, j] for j in chosen) for i in range(n) if i not in chosen}
        chosen.append(max(state, key=lambda i: (state[i], -i)))
    return chosen


def order(features: Tensor, count: int) -> list[int]:
    context = contexts.post_encoder([contexts.image(1, len(features))], count, {Projected(): [features]})
    return DivPrune(keep=count).order(context)[0].tolist()


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_picks_against_a_loop(count: int) -> None:
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(count))
    assert order(features, count) == by_hand(features.numpy(), count)


def test_lengths_and_rotations_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 8, generator=generator)
    scale = 0.01 + 100 * torch.rand(40, 1, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    expected = order(features, 15)
    assert order(features * scale, 15) == expected
    assert order((features.double() @ rotation), 15) == expected


def test_one_token_is_the_most_isolated() -> None:
    features = torch.eye(4)[[0, 0, 1, 1, 2, 3]] + 0.1 * torch.eye(6)[:, :4].abs()
    features[4] = torch.tensor([0.0, 0.0, 0.0, -1.0])
    assert order(features, 1) == [4]


def test_two_tokens_are_equally_isolated_and_the_first_wins() -> None:
    for seed in range(20):
        features = torch.randn(2, 512, generator=torch.Generator().manual_seed(seed))
        assert order(features, 1) == [0] and order(features, 2) == [0, 1]


def test_one_token_zero_rows_and_equal_rows() -> None:
    assert order(torch.randn(1, 4), 1) == [0]
    assert sorted(order(torch.zeros(3, 4), 3)) == [0, 1, 2]
    equal = torch.randn(1, 4).expand(5, 4)
    assert order(equal, 5) == [0, 1, 2, 3, 4]
    distances = isolation(torch.cat([equal, torch.zeros(1, 4)])[None], torch.ones(1, 6, dtype=torch.bool))
    assert distances.tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(2, 23, 5)
    valid = torch.rand(2, 23) < 0.7
    whole = isolation(features, valid)
    monkeypatch.setattr(divprune, "BLOCK_VALUES", 2 * 23 * 4)
    assert torch.equal(isolation(features, valid), whole)


def with_newlines(keep: int | float) -> Context:
    """An image of 3 rows of 4 cells, each ended by one and the same newline vector."""
    features = torch.randn(15, 8, generator=torch.Generator().manual_seed(0))
    places = [4, 9, 14]
    features[places] = 10 * torch.ones(8)
    cells = tuple(i for i in range(15) if i not in places)
    views = (View(3, 4, index=cells),)
    context = contexts.post_encoder([views], keep, {Projected(): [features[list(cells)]]})
    return replace(
        context,
        lengths=(15,),
        valid=torch.ones(1, 15, dtype=torch.bool),
        features=features[None],
        signals={Projected(): features[None]},
        newlines=(tuple(Newline(place, place - 4) for place in places),),
    )


def test_newlines_compete_or_are_protected() -> None:
    context = with_newlines(6)
    features = context.signals[Projected()][0]
    assert DivPrune.newlines == "compete"
    [kept] = contexts.kept_tokens(DivPrune(keep=6).select(context))
    assert kept == sorted(by_hand(features.numpy(), 6)) and len(set(kept) & {4, 9, 14}) == 1

    selection = DivPrune(keep=6, newline="protect").select(context)
    [kept] = contexts.kept_tokens(selection)
    cells = [i for i in range(15) if i not in (4, 9, 14)]
    chosen = by_hand(features[cells].numpy(), 6)
    assert kept == sorted([4, 9, 14, *(cells[i] for i in chosen)])
    assert selection.out_counts() == (9,)
    # A share is one of all tokens where newlines compete, of the cells where they do not.
    assert DivPrune(keep=0.5).select(with_newlines(0.5)).out_counts() == (round(7.5),)
    assert DivPrune(keep=0.5, newline="protect").select(with_newlines(0.5)).out_counts() == (6 + 3,)


def test_all_views_are_one_set() -> None:
    features = torch.randn(36, 5, generator=torch.Generator().manual_seed(3))
    context = contexts.post_encoder([contexts.any_resolution(3, 4, 2)], 9, {Projected(): [features]})
    assert DivPrune(keep=9).order(context)[0].tolist() == by_hand(features.numpy(), 9)


def test_halves_are_rounded_to_the_even_side() -> None:
    for n in (45, 35):
        context = contexts.post_encoder([contexts.image(1, n)], 0.1, {Projected(): [torch.randn(n, 4)]})
        assert DivPrune(keep=0.1).select(context).out_counts() == (4,)


def test_unknown_newline_rule() -> None:
    with pytest.raises(InputError, match="'compete' or 'protect'"):
        DivPrune(newline="rows")  # type: ignore[arg-type]


def test_cost() -> None:
    assert DivPrune(keep=0.1).selection_flops(contexts.LLAVA, 100, 10) == (200 + 20 + 3) * 100 * contexts.WIDTH
    assert DivPrune(keep=0.1).selection_flops(contexts.LLAVA, 100, 100) is None
