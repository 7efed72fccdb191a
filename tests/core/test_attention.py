"""Reductions of a dense attention matrix by their definition."""

from __future__ import annotations

import pytest
import torch

from vlmprune.core.attention import DenseAttention, DenseHeads, StreamedHeads


@pytest.mark.parametrize("heads", [True, False])
def test_column_mass(heads: bool) -> None:
    matrix = torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(-1)
    mean = matrix.mean(1)
    attention = DenseAttention(matrix if heads else mean)
    assert torch.allclose(attention.column_mass(), mean.mean(1))
    assert torch.allclose(attention.column_mass(reduce="sum"), mean.sum(1))
    weight = torch.tensor([[1.0, 0, 0, 2, 0], [0, 0, 0, 0, 0]])
    expected = (mean[0, 0] + 2 * mean[0, 3]) / 3
    got = attention.column_mass(weight)
    assert torch.allclose(got[0], expected) and torch.equal(got[1], torch.zeros(5, dtype=torch.float64))
    assert torch.allclose(attention.column_mass(weight, "sum")[0], 3 * expected)


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_heads(tau: float, scale: float | None, key_heads: int) -> None:
    """The matrix and queries with keys vote alike, head by head and with the mean of the heads' scores."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(2, key_heads, 7, 5, generator=generator, dtype=torch.float64)
    scores = query @ key.repeat_interleave(4 // key_heads, 1).mT * (5**-0.5 if scale is None else scale)
    dense, streamed = DenseHeads(scores.softmax(-1)), StreamedHeads(query, key, scale)
    alive = torch.rand(2, 7, generator=generator) < 0.7
    start = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    one = DenseHeads((scores.mean(1, keepdim=True) / tau).softmax(-1))
    for mask in (None, alive):
        want = dense.pagerank(2, start, mask)
        torch.testing.assert_close(streamed.pagerank(2, start, mask), want)
        for heads in (dense, streamed):
            torch.testing.assert_close(heads.mean_scores(tau).pagerank(2, start, mask), one.pagerank(2, start, mask))
