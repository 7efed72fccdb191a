"""Order of scores: lowest index on ties, NaN last, invalid never."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels.ordering import (
    first_argmax,
    ordered_bits,
    pack_keys,
    stable_argmax,
    stable_topk,
    unpack_index,
)

INF, NAN = math.inf, math.nan
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TINY = 1e-45  # the smallest positive float32

scores_and_mask = st.lists(
    st.tuples(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, INF, -INF, NAN, TINY, -TINY, 3e38, -3e38]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def expected(scores: list[float], valid: list[bool], k: int) -> list[int]:
    """Plain Python sort by the rule of the specification."""

    def place(i: int) -> tuple[bool, float, int]:
        value = float(np.float32(scores[i]))
        return math.isnan(value), 0.0 if math.isnan(value) else -value, i

    order = sorted((i for i in range(len(scores)) if valid[i]), key=place)[:k]
    return order + [-1] * (k - len(order))


@settings(deadline=None, max_examples=150)
@given(scores_and_mask, st.integers(0, 15))
def test_topk_equals_python_sort(rows: list[tuple[float, bool]], k: int) -> None:
    scores, valid = [list(column) for column in zip(*rows, strict=True)]
    values, mask = torch.tensor([scores]), torch.tensor([valid])
    want = expected(scores, valid, k)
    assert stable_topk(values, k, valid=mask).tolist() == [want]
    assert stable_topk(values.double(), k, valid=mask).tolist() == [want]
    assert stable_topk(-values, k, valid=mask, largest=False).tolist() == [want]
    assert stable_argmax(values, mask).tolist() == expected(scores, valid, 1)
    found = sorted(i for i in want if i >= 0)
    ascending = stable_topk(values, k, valid=mask, order="index")
    assert ascending.tolist() == [found + [-1] * (k - len(found))]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32), min_size=2, max_size=30))
def test_keys_follow_any_floats(scores: list[float]) -> None:
    values = torch.tensor([scores], dtype=torch.float32)
    keys = pack_keys(values)[0]
    assert len(set(keys.tolist())) == len(scores)
    order = keys.argsort(descending=True)
    assert order.tolist() == expected(scores, [True] * len(scores), len(scores))
    assert unpack_index(keys)[order].tolist() == order.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_types(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.5, -0.0, 0.0, 2.0, 0.5, -1.0, NAN]], dtype=dtype)
    assert stable_topk(scores, 7).tolist() == [[3, 0, 4, 1, 2, 5, 6]]
    assert stable_topk(scores, 7, largest=False).tolist() == [[5, 1, 2, 0, 4, 3, 6]]


def test_float64_is_compared_in_full() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 + 2e-12]], dtype=torch.float64)
    assert stable_topk(scores, 2).tolist() == [[2, 1]]
    with pytest.raises(ValueError, match="at most 32 bits"):
        pack_keys(scores)


def test_integers_and_bools() -> None:
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    scores = torch.tensor([[3, high, low + 5, 3, high]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert stable_topk(scores, 5, valid=mask).tolist() == [[1, 0, 3, 2, -1]]
    assert stable_topk(scores, 3, largest=False).tolist() == [[2, 0, 3]]
    assert stable_argmax(torch.tensor([[False, True, True]])).tolist() == [1]


def test_ragged_counts() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    want = [[1, 2], [-1, -1], [2, -1], [0, 1]]
    assert stable_topk(scores, [2, 0, 1, 2]).tolist() == want
    assert stable_topk(scores, torch.tensor([2, 0, 1, 2]), k_max=2).tolist() == want
    assert stable_topk(scores, torch.tensor([2, -4, 1, 9], dtype=torch.int32)).tolist() == [
        [1, 2, -1], [-1, -1, -1], [2, -1, -1], [0, 1, 2]
    ]  # fmt: skip
    by_index = stable_topk(scores, [2, 0, 1, 2], order="index")
    assert by_index.tolist() == [[1, 2], [-1, -1], [2, -1], [0, 1]]


def test_width_and_empty() -> None:
    assert stable_topk(torch.zeros(2, 3), 0).shape == (2, 0)
    assert stable_topk(torch.zeros(2, 3), -1).shape == (2, 0)
    assert stable_topk(torch.zeros(1, 3), 5).tolist() == [[0, 1, 2, -1, -1]]
    assert stable_topk(torch.zeros(2, 0), 2).tolist() == [[-1, -1]] * 2
    assert stable_argmax(torch.zeros(2, 0)).tolist() == [-1, -1]
    assert stable_argmax(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [-1]


def test_large_and_non_contiguous(generator: torch.Generator) -> None:
    scores = torch.randint(0, 50, (3000, 4), generator=generator).float().T
    want = np.lexsort((np.arange(3000)[None].repeat(4, 0), -scores.numpy()))[:, :700]
    assert np.array_equal(stable_topk(scores, 700).numpy(), want)


def test_invalid_marks_are_below_nan() -> None:
    bits = ordered_bits(torch.tensor([-INF, NAN, 0.0]), torch.tensor([True, True, False]))
    assert bits[0] > bits[1] > bits[2]


def test_first_argmax_in_loops() -> None:
    scores = torch.tensor([[NAN, 1.0, 1.0], [NAN, NAN, 9.0], [INF, INF, 0.0], [-INF, 7.0, -INF]])
    free = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert first_argmax(scores, free).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"k": torch.tensor([0.5, 0.5])}, TypeError, "Turn shares into counts"),
        ({"k": torch.tensor([1, 1, 1])}, ValueError, "one count per sample"),
        ({"k": [1]}, ValueError, "1 counts for 2 samples"),
        ({"k": [1, 3], "k_max": 2}, ValueError, "above k_max = 2"),
        ({"k": torch.tensor([1, 3]), "k_max": 2}, ValueError, "above k_max = 2"),
        ({"k": 2, "k_max": 3}, ValueError, "k_max = 3 belongs to one k per sample"),
        ({"k": 1, "valid": torch.ones(2, 3)}, ValueError, "valid must be a bool tensor"),
        ({"k": 1, "order": "score"}, ValueError, "order must be"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stable_topk(torch.zeros(2, 3), **arguments)
