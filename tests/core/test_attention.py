"""Reductions of a dense attention matrix by their definition."""

from __future__ import annotations

import pytest
import torch

from vlmprune.core.attention import DenseAttention


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
