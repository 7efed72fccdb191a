"""Attention over places equals a slow float64 version, and plain attention where every token stands at one place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlmprune.kernels.virtual_attention import expand, fold_mean, fold_sum, virtual_attention

B, H, HK, N, M, D = 2, 4, 2, 5, 9, 6
MAPPINGS = [
    pytest.param(torch.tensor([0, 1, 2, 1, 3, 2, 2, 4, 0]), id="shared"),
    pytest.param(torch.tensor([[0, 1, 2, 1, 3, 2, 2, 4, 0], [-1, -1, 3, 0, 1, 1, 4, 2, 2]]), id="per-row"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tables(places: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(places)[:, None] * torch.cat([0.7 ** torch.arange(D // 2)] * 2).double()
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_loops(mapping: Tensor, masked: bool) -> None:
    q, k, v = draw(B, H, N, D), draw(B, HK, N, D, seed=1), draw(B, HK, N, D, seed=2)
    mask = draw(B, 1, M, M, seed=3) > 0 if masked else None
    got, expected = (
        virtual_attention(q, k, v, mapping, *tables(M), mask=mask, scale=0.3, backend=backend)
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    assert got.isfinite().all()


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_step_equals_the_last_row_of_all(mapping: Tensor) -> None:
    """The last place holds a token of its own, as in decoding."""
    last = torch.full_like(mapping[..., :1], N)
    longer = torch.cat([mapping, last], -1)
    q, k, v = draw(B, H, N + 1, D), draw(B, HK, N + 1, D, seed=1), draw(B, HK, N + 1, D, seed=2)
    whole = virtual_attention(q, k, v, longer, *tables(M + 1))
    for backend in ("torch", "reference"):
        step = virtual_attention(
            q[:, :, N:], k, v, longer, *tables(M + 1), queries=torch.zeros_like(last), backend=backend
        )
        torch.testing.assert_close(step, whole[:, :, N:], atol=1e-12, rtol=0)


def test_tokens_on_their_own_are_plain_attention() -> None:
    """Without rotation (all angles zero) nothing but the causal product is left."""
    q, k, v = draw(B, H, N, D), draw(B, HK, N, D, seed=1), draw(B, HK, N, D, seed=2)
    still = torch.ones(N, D, dtype=torch.float64), torch.zeros(N, D, dtype=torch.float64)
    got = virtual_attention(q, k, v, torch.arange(N), *still)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_one_place_each_keeps_the_bits(dim: int, dtype: torch.dtype) -> None:
    x = draw(B, N, N, N).to(dtype)
    order = torch.tensor([[3, 0, 2, 4, 1], [1, 2, 0, 4, 3]])
    assert torch.equal(fold_mean(expand(x, order, dim), order, N, dim), x)
    assert torch.equal(fold_mean(expand(x, order[0], dim), order[0], N, dim), x)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_folding_by_hand(mapping: Tensor) -> None:
    y = draw(B, 3, M)
    mean, total = fold_mean(y, mapping, N + 1, dim=-1), fold_sum(y, mapping, N + 1, dim=-1)
    for row, tokens in enumerate(mapping.expand(B, -1)):
        for token in range(N + 1):
            inside = y[row][:, tokens == token]
            torch.testing.assert_close(total[row, :, token], inside.sum(1))
            torch.testing.assert_close(mean[row, :, token], inside.mean(1) if inside.numel() else y.new_zeros(3))


def test_expanding_and_folding_have_gradients() -> None:
    mapping = torch.tensor([[0, 1, 1, 2], [2, 0, 0, 1]])
    x = draw(B, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: expand(x, mapping, 1) ** 2, x)
    assert torch.autograd.gradcheck(lambda y: fold_mean(y, mapping, 3, 1), draw(B, 4, 2).requires_grad_())


def test_refusals() -> None:
    q, k = draw(B, H, N, D), draw(B, HK, N, D)
    mapping = torch.arange(N)
    with pytest.raises(ValueError, match=r"mapping must be int64 \[m\] or \[B, m\], got torch.int32"):
        expand(q, mapping.int())
    with pytest.raises(ValueError, match="mapping must be int64"):
        fold_mean(q, mapping.expand(3, -1), N)
    with pytest.raises(ValueError, match="not below n_groups = 4"):
        fold_mean(q, mapping, N - 1)
    with pytest.raises(ValueError, match="do not fit together"):
        virtual_attention(q[:, :3], k, k, mapping, *tables(N))
    with pytest.raises(ValueError, match=r"cos and sin must be \[m, d\] = \(5, 6\)"):
        virtual_attention(q, k, k, mapping, *tables(M))
