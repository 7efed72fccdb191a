"""A fixed number of merges: results as pairs, the quick search for partners, and merging of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_rows import exact_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels.bipartite import BipartiteMatch, bipartite_match, match, merge_groups, merge_pairs, quick
from vlmprune.kernels.gather import segment_merge

ORDERS = ("tome", "position", "original")
FIELDS = ("group_id", "counts", "partner", "merged", "kept", "sources", "into")


def equal(a: BipartiteMatch, b: BipartiteMatch) -> None:
    assert a.n_out == b.n_out
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def never(*arguments: object) -> None:
    """Stands for the quick search where exact ties are to be settled."""


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**31), st.integers(0, 15), st.integers(0, 4), st.integers(-1, 12), st.sampled_from(ORDERS))
@pytest.mark.parametrize("kinds", ["random", "few", "distinct"])
def test_pairs_equal_the_oracle(kinds: str, seed: int, n: int, protect: int, r: int, order: str) -> None:
    """Random rows; rows with many copies; different rows with many equal cosines."""
    rng = np.random.default_rng(seed)
    if kinds == "random":
        metric = torch.tensor(rng.normal(size=(3, n, 5)), dtype=torch.float32)
    else:
        bank = exact_rows()[:24]
        rows = [rng.integers(0, 24, n) if kinds == "few" else rng.permutation(24)[:n] for _ in range(3)]
        metric = bank[torch.tensor(np.stack(rows), dtype=torch.long)]
    got = bipartite_match(metric, r, protect=protect, order=order)
    equal(got, bipartite_match(metric, r, protect=protect, order=order, backend="reference"))
    group = torch.full((3, n), -1)
    group.scatter_(1, got.kept, torch.arange(got.n_out).expand(3, -1))
    assert (group.gather(1, got.sources) == -1).all(), "a token stays or merges"
    assert torch.equal(group.scatter(1, got.sources, got.into), got.group_id)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "protect"), [(64, 0), (197, 1), (130, 2)])
def test_quick_search_finds_the_same(
    n: int, protect: int, dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = torch.randn(2, n, 24, generator=generator).to(dtype)
    used = []

    def recorded(*arguments: object) -> object:
        used.append(quick.quick_partners(*arguments))
        return used[-1]

    monkeypatch.setattr(match, "quick_partners", recorded)
    got = bipartite_match(metric, 17, protect=protect)
    assert used[0] is not None
    monkeypatch.setattr(quick, "BLOCK_BYTES", 1)  # one row at a time
    equal(bipartite_match(metric, 17, protect=protect), got)
    monkeypatch.setattr(match, "quick_partners", never)
    equal(bipartite_match(metric, 17, protect=protect), got)


@pytest.mark.parametrize("channels", [1, 2, 3, 24])
def test_quick_search_leaves_ties_and_bad_rows(channels: int, generator: torch.Generator) -> None:
    """One copy anywhere, also one that differs by the sign of a zero, or one value that is not finite."""
    base = torch.randn(2, 30, channels, generator=generator).double().cumsum(1).float()
    for place, value in (((1, 7, channels - 1), torch.nan), ((0, 20, 0), torch.inf)):
        metric = base.clone()
        metric[place] = value
        equal(bipartite_match(metric, 6), bipartite_match(metric, 6, backend="reference"))
    for first, second in ((3, 17), (4, 10), (0, 29)):
        metric = base.clone()
        metric[0, first, 0], metric[0, second] = 0.0, metric[0, first]
        metric[0, second, 0] = -0.0
        problem = match._check(metric, 6, None, 0, "tome", None, None, None)
        assert quick.quick_partners(problem, match.unit_rows(metric, torch.float32)) is None


def test_no_pairs_where_numbers_differ(generator: torch.Generator) -> None:
    metric = torch.randn(2, 10, 4, generator=generator)
    everything = torch.ones(2, 10, dtype=torch.bool)
    halves = (torch.arange(0, 10, 2), torch.arange(1, 10, 2))
    for options in (
        {"threshold": 0.1},
        {"r": [1, 2]},
        {"r": torch.tensor([2, 2])},
        {"r": 2, "valid": everything},
        {"r": 2, "protected": ~everything},
        {"r": 2, "split": halves},
    ):
        result = bipartite_match(metric, **options)
        assert result.kept is result.sources is result.into is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trailing", [(), (5,), (3, 2)])
@pytest.mark.parametrize(("n", "r"), [(2, 1), (9, 4), (31, 1000), (31, 0), (1, 3)])
def test_merging_pairs(
    n: int, r: int, trailing: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    match = bipartite_match(torch.randn(3, n, 2, generator=generator), r)
    x = torch.randn(n, 3, *trailing, generator=generator).to(dtype).transpose(0, 1)
    before = x.clone()
    size = torch.randint(1, 9, (3, n), generator=generator).float()
    for weights in (size, None):
        got, total = merge_pairs(x, match.kept, match.sources, match.into, weights)
        assert got.dtype == dtype and torch.equal(x, before)
        want = merge_groups(x, match.group_id, match.n_out, size=weights, backend="reference")
        tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 2e-6)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
        ones = torch.ones_like(size) if weights is None else weights
        assert torch.equal(total, segment_merge(ones, match.group_id, match.n_out, mode="sum"))
        alone = got[:, ~(total > ones.gather(1, match.kept)).any(0)]
        left = match.kept[:, ~(total > ones.gather(1, match.kept)).any(0)]
        assert torch.equal(alone, x[torch.arange(3)[:, None], left]), "what receives nothing is copied"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_into_one(dtype: torch.dtype) -> None:
    """4095 tokens into one output: a running sum in half precision would stall far below."""
    kept, sources = torch.tensor([[0]]), torch.arange(1, 4096)[None]
    x = torch.linspace(0, 1, 4096).to(dtype)[None, :, None].expand(1, 4096, 3)
    merged, size = merge_pairs(x, kept, sources, torch.zeros_like(sources))
    assert merged.dtype == dtype and size.tolist() == [[4096]]
    torch.testing.assert_close(merged.float(), torch.full((1, 1, 3), 0.5), atol=2e-3, rtol=0)
    same, _ = merge_pairs(torch.full_like(x, 0.3), kept, sources, torch.zeros_like(sources))
    assert torch.equal(same, torch.full_like(x, 0.3)[:, :1]), "equal tokens stay what they are"


def test_layers_of_pairs(generator: torch.Generator) -> None:
    x = torch.randn(2, 50, 6, generator=generator)
    pairs, groups, size, other = x, x, torch.ones(2, 50), torch.ones(2, 50)
    for r in (9, 8, 20, 3):
        match = bipartite_match(pairs, r, protect=1)
        pairs, size = merge_pairs(pairs, match.kept, match.sources, match.into, size)
        groups = merge_groups(groups, match.group_id, match.n_out, size=other)
        other = segment_merge(other, match.group_id, match.n_out, mode="sum")
    torch.testing.assert_close(pairs, groups, atol=1e-5, rtol=0)
    assert torch.equal(size, other) and (size.sum(1) == 50).all()
    assert torch.equal(pairs[:, 0], x[:, 0])


def test_gradient_of_pairs(generator: torch.Generator) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    kept = torch.tensor([[0, 2, 5], [1, 2, 3]])
    sources, into = torch.tensor([[1, 3, 4], [0, 4, 5]]), torch.tensor([[2, 2, 2], [0, 1, 0]])
    size = torch.tensor([[1.0, 2, 3, 4, 5, 6]] * 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: merge_pairs(v, kept, sources, into, size)[0], (x,))


def test_pairs_refuse() -> None:
    x, index = torch.zeros(1, 3, 2), torch.tensor([[0]])
    with pytest.raises(ValueError, match="one shape"):
        merge_pairs(x, index, index, torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="size must have shape"):
        merge_pairs(x, index, index, index, torch.ones(1, 2))
