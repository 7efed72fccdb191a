"""The algebra of source maps against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.core.source_map import SourceMap

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)


def random_map(seed: int, items: int, n_out: int, n_in: int) -> SourceMap:
    """Random rows that sum to 1, some sparse; the last output of the last item is padding."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(items, n_out, n_in, generator=generator, dtype=torch.float64)
    weights = weights * (torch.rand(weights.shape, generator=generator) < 0.6)
    if n_in:
        weights[..., 0] += 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    if n_out > 1:
        weights[-1, -1] = 0
    return SourceMap(weights)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal shapes and values up to rounding (torch.testing.assert_close takes seconds to load)."""
    if actual.shape != expected.shape:
        return False
    return torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def loop_apply(weights: Tensor, values: Tensor) -> Tensor:
    out = torch.zeros(*weights.shape[:2], *values.shape[2:], dtype=torch.float64)
    for i in range(weights.shape[0]):
        for m in range(weights.shape[1]):
            for n in range(weights.shape[2]):
                out[i, m] += weights[i, m, n] * values[i, n].double()
    return out


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))


@PROPERTY
@given(sizes=SIZES, seed=SEEDS, trailing=st.sampled_from([(), (1,), (2,), (2, 3)]))
def test_apply_and_unmerge(sizes: tuple[int, int, int], seed: int, trailing: tuple[int, ...]) -> None:
    items, n_out, n_in = sizes
    source_map = random_map(seed, items, n_out, n_in)
    values = torch.randn(items, n_in, *trailing, generator=torch.Generator().manual_seed(seed))
    assert near(source_map.apply(values), loop_apply(source_map.weights, values))
    outputs = torch.randn(items, n_out, *trailing, generator=torch.Generator().manual_seed(seed + 1))
    share = source_map.weights.transpose(1, 2).clone()
    for i in range(items):
        for n in range(n_in):
            if share[i, n].sum() > 0:
                share[i, n] = share[i, n] / share[i, n].sum()
    assert near(source_map.unmerge(outputs), loop_apply(share, outputs))


@PROPERTY
@given(sizes=st.tuples(*[st.integers(1, 4)] * 5), seed=SEEDS)
def test_composition_is_associative_and_acts_in_order(sizes: tuple[int, ...], seed: int) -> None:
    items, n, a, b, c = sizes
    first, second, third = (
        random_map(seed + i, items, n_out, n_in) for i, (n_out, n_in) in enumerate([(a, n), (b, a), (c, b)])
    )
    left = first.compose(second).compose(third)
    right = first.compose(second.compose(third))
    assert near(left.weights, right.weights)
    values = torch.randn(items, n, 2, dtype=torch.float64)
    assert near(left.apply(values), third.apply(second.apply(first.apply(values))))


@PROPERTY
@given(sizes=SIZES, seed=SEEDS)
def test_identity(sizes: tuple[int, int, int], seed: int) -> None:
    items, n_out, n_in = sizes
    source_map = random_map(seed, items, n_out, n_in)
    before = SourceMap.identity(torch.ones(items, n_in, dtype=torch.bool))
    after = SourceMap.identity(torch.ones(items, n_out, dtype=torch.bool))
    assert torch.equal(before.compose(source_map).weights, source_map.weights)
    assert torch.equal(source_map.compose(after).weights, source_map.weights)
    values = torch.randn(items, n_in, 2)
    assert torch.equal(before.apply(values), values)
    assert torch.equal(before.unmerge(values), values)


def test_identity_of_padding_is_zero() -> None:
    assert SourceMap.identity(torch.tensor([[True, False]])).weights.tolist() == [[[1, 0], [0, 0]]]


@PROPERTY
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), seed=SEEDS)
def test_rows_keep_their_sum(sizes: tuple[int, ...], seed: int) -> None:
    items, n, a, b = sizes
    first, later = random_map(seed, items, a, n), random_map(seed + 1, items, b, a)
    later.weights[first.weights.sum(-1)[:, None].expand(items, b, a) == 0] = 0  # nothing from padding
    total = later.weights.sum(-1, keepdim=True)
    later = SourceMap(torch.where(total > 0, later.weights / total, 0.0))
    sums = first.compose(later).weights.sum(-1)
    assert near(sums, (later.weights.sum(-1) > 0).double())


@PROPERTY
@given(sizes=SIZES, seed=SEEDS)
def test_kept_and_groups(sizes: tuple[int, int, int], seed: int) -> None:
    source_map = random_map(seed, *sizes)
    host = source_map.weights.tolist()
    groups = [[[n for n, weight in enumerate(row) if weight != 0] for row in item] for item in host]
    assert source_map.groups() == groups
    kept = [[any(row[n] != 0 for row in item) for n in range(sizes[2])] for item in host]
    assert source_map.kept().tolist() == kept


@pytest.mark.parametrize(("n_out", "n_in"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_is_valid(n_out: int, n_in: int) -> None:
    source_map = SourceMap(torch.zeros(2, n_out, n_in))
    assert torch.equal(source_map.apply(torch.ones(2, n_in, 4)), torch.zeros(2, n_out, 4))
    assert torch.equal(source_map.unmerge(torch.ones(2, n_out, 4)), torch.zeros(2, n_in, 4))
    assert source_map.groups() == [[[] for _ in range(n_out)]] * 2
    assert source_map.kept().tolist() == [[False] * n_in] * 2


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_results_are_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    source_map = SourceMap.from_groups(torch.tensor([[0, 0]]), 1)
    assert source_map.apply(torch.ones(1, 2, 3, dtype=dtype)).dtype == expected
    assert source_map.unmerge(torch.ones(1, 1, 3, dtype=dtype)).dtype == expected


def test_maps_of_kept_tokens_and_groups() -> None:
    kept = SourceMap.from_kept(torch.tensor([[2, 0, -1], [1, -1, -1]]), 3)
    assert kept.weights.tolist() == [[[0, 0, 1], [1, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 0]]]
    groups = torch.tensor([[1, 0, -1, 1]])
    assert SourceMap.from_groups(groups, 3).weights.tolist() == [[[0, 1, 0, 0], [0.5, 0, 0, 0.5], [0] * 4]]
    weighted = SourceMap.from_groups(groups, 2, torch.tensor([[3.0, 9.0, 5.0, 1.0]]))
    assert weighted.weights.tolist() == [[[0, 1, 0, 0], [0.75, 0, 0, 0.25]]]
