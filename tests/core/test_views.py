"""Views: sharing a budget among parts, against plain restatements."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.views import View, ViewGroup, split_count, split_equal

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=7)


def largest_remainder(count: int, lengths: list[int]) -> list[int]:
    """Hand out whole shares, then one token at a time to the part with the largest remainder."""
    quota = [Fraction(count * length, sum(lengths)) for length in lengths]
    shares = [int(q) for q in quota]
    rest = [q - int(q) for q in quota]
    while sum(shares) < count:
        best = rest.index(max(rest))
        shares[best] += 1
        rest[best] = Fraction(-1)
    return shares


def one_by_one(count: int, lengths: list[int]) -> list[int]:
    """Deal tokens round and round to the parts that still have room."""
    shares = [0] * len(lengths)
    while count and shares != lengths:
        for i, length in enumerate(lengths):
            if count and shares[i] < length:
                shares[i] += 1
                count -= 1
    return shares


@PROPERTY
@given(lengths=LENGTHS, data=st.data())
def test_split_count(lengths: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, sum(lengths)))
    shares = split_count(count, lengths)
    if sum(lengths):
        assert shares == largest_remainder(count, lengths)
        assert sum(shares) == count
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))


@pytest.mark.parametrize(
    ("count", "lengths", "expected"),
    [
        (3, [1, 1], [2, 1]),  # beyond the lengths: the caller caps
        (2, [10, 10, 10], [1, 1, 0]),  # equal remainders: earlier parts first
        (5, [24, 24, 24, 24], [2, 1, 1, 1]),
        (192, [576, 576, 576, 576, 576], [39, 39, 38, 38, 38]),
        (4, [0, 3, 0, 1], [0, 3, 0, 1]),
        (0, [5, 5], [0, 0]),
        (7, [0, 0], [0, 0]),
        (0, [], []),
    ],
)
def test_split_count_examples(count: int, lengths: list[int], expected: list[int]) -> None:
    assert split_count(count, lengths) == expected


@PROPERTY
@given(lengths=LENGTHS, count=st.integers(0, 300))
def test_split_equal(lengths: list[int], count: int) -> None:
    shares = split_equal(count, lengths)
    assert shares == one_by_one(count, lengths)
    assert sum(shares) == min(count, sum(lengths))


def test_view_tokens() -> None:
    assert View(2, 3, start=5).tokens().tolist() == [5, 6, 7, 8, 9, 10]
    with_newlines = View(2, 2, index=(0, 1, 3, 4), kind="tile")  # cell rows with a newline token between them
    assert with_newlines.length == 4
    assert with_newlines.tokens().tolist() == [0, 1, 3, 4]
    assert with_newlines.tokens().dtype == View(1, 2).tokens().dtype == torch.int64


def test_group_gathers_tokens_of_its_views() -> None:
    values = torch.arange(2 * 6 * 2).reshape(2, 6, 2)
    group = ViewGroup(1, 2, 1, torch.tensor([1, 0]), torch.tensor([[4, 5], [0, 2]]))
    assert group.gather(values).tolist() == [
        [values[1, 4].tolist(), values[1, 5].tolist()],
        [values[0, 0].tolist(), values[0, 2].tolist()],
    ]
