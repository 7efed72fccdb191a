"""Budgets: every spelling, every refusal, and counts against exact arithmetic."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlmprune.core.budget import Budget
from vlmprune.core.errors import BudgetError, InputError

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
SHARES = st.integers(1, 10**6).map(lambda millionths: millionths / 10**6)
ROUNDINGS = ("floor", "round", "ceil")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, Budget(tokens=1)),
        ("1", Budget(tokens=1)),
        (1.0, Budget(share=1.0)),
        ("1.0", Budget(share=1.0)),
        (0.33, Budget(share=0.33)),
        (" 0.33 ", Budget(share=0.33)),
        ("1e-2", Budget(share=0.01)),
        (192, Budget(tokens=192)),
        ("192", Budget(tokens=192)),
        ("+5", Budget(tokens=5)),
        ("flops:0.4", Budget(flops=0.4)),
        ("flops:1", Budget(flops=1.0)),
        ([0.5, 32], Budget(parts=(Budget(share=0.5), Budget(tokens=32)))),
        (("0.5", "flops:0.2"), Budget(parts=(Budget(share=0.5), Budget(flops=0.2)))),
        ("0.5, 32", Budget(parts=(Budget(share=0.5), Budget(tokens=32)))),
        ("[0.5,flops:0.2]", Budget(parts=(Budget(share=0.5), Budget(flops=0.2)))),
        ("[0.5]", Budget(parts=(Budget(share=0.5),))),
        ([[0.5, 0.25], 8], Budget(parts=(Budget.parse([0.5, 0.25]), Budget(tokens=8)))),
        (Budget(tokens=3), Budget(tokens=3)),
        (np.float32(0.9), Budget(share=0.9)),
        (np.float64(0.5), Budget(share=0.5)),
        (np.int64(7), Budget(tokens=7)),
        (Fraction(1, 4), Budget(share=0.25)),
    ],
)
def test_spellings(value: Any, expected: Budget) -> None:
    assert Budget.parse(value) == expected


def test_one_token_and_everything_differ() -> None:
    assert Budget.parse("1").count(576) == Budget.parse(1).count(576) == 1
    assert Budget.parse("1.0").count(576) == Budget.parse(1.0).count(576) == 576
    assert type(Budget.parse("1").tokens) is int


OUT_OF_RANGE: list[Any] = [0, -3, 0.0, -0.5, 1.0001, 2.0, math.nan, math.inf, -math.inf, 1e-9]
OUT_OF_RANGE += [
    np.int64(0),
    np.float32(1.5),
    "0",
    "-1",
    "0.0",
    "1.5",
    "nan",
    "inf",
    "flops:0",
    "flops:1.5",
    "flops:nan",
]
NO_BUDGET = [True, False, None, {}, object(), 1j, "abc", "", "flops:", "flops:x", "0.5,", "0,5,x"]


@pytest.mark.parametrize("value", [*OUT_OF_RANGE, *NO_BUDGET, "tokens:5", [], (), [0.5, 0], [0.5, True]])
def test_refusals(value: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(value)
    assert isinstance(caught.value, InputError) and isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert message.startswith("keep=") and "\n" not in message
    # What to do stands in every message: a range, a unit or an example.
    assert any(word in message for word in ("share", "token", "0.33", "flops", "one budget per stage"))


@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_out_of_range_names_the_value_and_the_range(value: Any) -> None:
    with pytest.raises(BudgetError, match="out of range") as caught:
        Budget.parse(value)
    assert str(value).removeprefix("flops:").lstrip("-").rstrip(".0") in str(caught.value)
    assert "(0, 1]" in str(caught.value)


def test_unknown_prefix_is_named() -> None:
    with pytest.raises(BudgetError, match="'tokens'.*'flops:'"):
        Budget.parse("tokens:5")


def test_float32_settings_do_not_lose_a_token() -> None:
    assert float(np.float32(0.9)) * 100 < 90
    assert Budget.parse(np.float32(0.9)).count(100) == 90
    assert Budget.parse(float(np.float32(0.9))).count(100) == 90
    assert Budget.parse(float(np.float32(1.0) - np.float32(1e-7))).is_all


@pytest.mark.parametrize(
    ("n", "floor", "nearest", "ceil"),
    [(1, 1, 1, 1), (3, 1, 2, 2), (5, 2, 2, 3), (7, 3, 4, 4), (9, 4, 4, 5), (11, 5, 6, 6), (8, 4, 4, 4)],
)
def test_halves_round_to_even(n: int, floor: int, nearest: int, ceil: int) -> None:
    half = Budget.parse(0.5)
    assert [half.count(n, rounding) for rounding in ROUNDINGS] == [floor, nearest, ceil]
    assert half.count(n) == floor


@PROPERTY
@given(share=SHARES, n=st.integers(1, 5000), rounding=st.sampled_from(ROUNDINGS))
def test_count_follows_exact_arithmetic(share: float, n: int, rounding: str) -> None:
    exact = Fraction(str(share)) * n
    distance = abs(exact * 2 - round(exact * 2))
    assume(distance == 0 and exact.denominator == 1 or distance > Fraction(1, 10**6))
    expected = {"floor": math.floor, "round": round, "ceil": math.ceil}[rounding](exact)
    count = Budget.parse(share).count(n, rounding)  # type: ignore[arg-type]
    if exact.denominator == 1:  # the product of doubles may lie a hair beside the whole number
        assert abs(count - expected) <= 1
    else:
        assert count == max(1, expected)
    assert 1 <= count <= n


@PROPERTY
@given(
    shares=st.tuples(SHARES, SHARES).map(sorted),
    sizes=st.tuples(st.integers(0, 3000), st.integers(0, 3000)).map(sorted),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_count_is_monotone(shares: list[float], sizes: list[int], rounding: Any) -> None:
    low, high = (Budget.parse(share) for share in shares)
    assert low.count(sizes[1], rounding) <= high.count(sizes[1], rounding)
    assert low.count(sizes[0], rounding) <= low.count(sizes[1], rounding)


@PROPERTY
@given(n=st.integers(0, 5000), rounding=st.sampled_from(ROUNDINGS))
def test_everything_is_everything(n: int, rounding: Any) -> None:
    assert Budget.parse(1.0).count(n, rounding) == n


@PROPERTY
@given(tokens=st.integers(1, 4000), n=st.integers(0, 3000), minimum=st.integers(0, 5))
def test_tokens_are_capped(tokens: int, n: int, minimum: int) -> None:
    assert Budget.parse(tokens).count(n, minimum=minimum) == min(tokens, n)


@pytest.mark.parametrize(("n", "minimum", "expected"), [(100, 1, 1), (100, 0, 0), (100, 7, 7), (3, 7, 3), (0, 1, 0)])
def test_minimum(n: int, minimum: int, expected: int) -> None:
    assert Budget.parse(0.001).count(n, minimum=minimum) == expected


@pytest.mark.parametrize("value", ["flops:0.4", [0.5, 0.3]])
def test_budgets_without_a_count_say_so(value: Any) -> None:
    with pytest.raises(BudgetError, match="number of tokens"):
        Budget.parse(value).count(10)


def test_parts() -> None:
    single, several = Budget.parse(0.5), Budget.parse([0.5, 16])
    assert single.part(0) is single and single.part(7) is single
    assert several.part(1) == Budget(tokens=16)
    with pytest.raises(BudgetError, match="2 entries.*entry 3"):
        several.part(2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, True), ("flops:1.0", True), ([1.0, 1.0], True), (0.99, False), (1, False), ([1.0, 0.5], False)],
)
def test_is_all(value: Any, expected: bool) -> None:
    assert Budget.parse(value).is_all is expected


ATOMS = st.one_of(SHARES, st.integers(1, 10**5), SHARES.map(lambda share: f"flops:{share}"))
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=8)


@PROPERTY
@given(value=VALUES)
def test_describe_reads_back(value: Any) -> None:
    budget = Budget.parse(value)
    assert budget.describe() == value
    assert Budget.parse(budget.describe()) == budget
    assert Budget.parse(json.loads(json.dumps(budget.describe()))) == budget
    assert hash(Budget.parse(value)) == hash(budget)


@PROPERTY
@given(values=st.lists(ATOMS, min_size=1, max_size=5))
def test_command_line_text_reads_as_the_values(values: list[Any]) -> None:
    text = ",".join(repr(value) if isinstance(value, float) else str(value) for value in values)
    assert Budget.parse(f"[{text}]") == Budget.parse(values)
    if len(values) > 1:
        assert Budget.parse(text) == Budget.parse(values)


def test_text_form() -> None:
    assert str(Budget.parse(0.33)) == "keep=0.33"
    assert str(Budget.parse([0.5, "flops:0.2", 8])) == "keep=[0.5, 'flops:0.2', 8]"
