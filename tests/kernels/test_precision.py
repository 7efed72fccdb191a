"""Products in full float32 while the process allows less."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlmprune.kernels.precision import compute_dtype, precise_matmul


@pytest.fixture
def reduced_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def matrices(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 9, 300, generator=generator), torch.randn(2, 300, 7, generator=generator)


def test_plain_product_by_default(generator: torch.Generator) -> None:
    a, b = matrices(generator)
    assert torch.equal(precise_matmul(a, b), a @ b)
    assert torch.equal(precise_matmul(a.double(), b.double()), a.double() @ b.double())


def test_float64_where_less_is_allowed(reduced_products: None, generator: torch.Generator) -> None:
    a, b = matrices(generator)
    exact = (a.double() @ b.double()).float()
    assert torch.equal(precise_matmul(a, b), exact)
    # Not every CPU has a faster product, so make sure that the two can be told apart.
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(precise_matmul(a, b), exact)


def test_autocast_is_left_out(generator: torch.Generator) -> None:
    a, b = matrices(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        got = precise_matmul(a, b)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(got, a @ b)


def test_compute_dtype() -> None:
    half, double = torch.zeros(1, dtype=torch.half), torch.zeros(1, dtype=torch.float64)
    assert compute_dtype(half, None) == torch.float32
    assert compute_dtype(half, double) == torch.float64
