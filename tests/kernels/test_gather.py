"""Ragged gather, packing and merging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels.gather import (
    compose_groups,
    first_members,
    gather_tokens,
    ordered_groups,
    pack_indices,
    pad_packed,
    segment_merge,
    unmerge,
)

MODES = ("prune", "mean", "wavg", "sum", "amax")


def merged_by_hand(x: torch.Tensor, group: torch.Tensor, n_groups: int, mode: str, weights: torch.Tensor):
    """One group after the other, in float64."""
    out = torch.zeros(x.shape[0], n_groups, *x.shape[2:], dtype=torch.float64)
    for b in range(x.shape[0]):
        for g in range(n_groups):
            members = [i for i in range(x.shape[1]) if group[b, i] == g]
            if not members:
                continue
            rows = x[b, members].double()
            w = weights[b, members].double().reshape(-1, *[1] * (rows.ndim - 1))
            out[b, g] = {
                "prune": rows[0],
                "mean": rows.mean(0),
                "wavg": (rows * w).sum(0) / w.sum(),
                "sum": rows.sum(0),
                "amax": rows.amax(0),
            }[mode]
    return out


@pytest.mark.parametrize("trailing", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_gather_tokens(trailing: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randint(0, 2, (3, 5, *trailing), generator=generator).to(dtype)
    index = torch.tensor([[4, 0, -1], [-1, -1, -1], [2, 2, 1]])
    got = gather_tokens(x, index)
    assert got.dtype == dtype and got.shape == (3, 3, *trailing)
    for b in range(3):
        for slot, i in enumerate(index[b].tolist()):
            assert torch.equal(got[b, slot], x[b, i] if i >= 0 else torch.zeros(trailing, dtype=dtype))


def test_gather_fill_gradient_and_empty() -> None:
    x = torch.arange(6.0).reshape(1, 3, 2).requires_grad_()
    got = gather_tokens(x, torch.tensor([[2, -1, 2]]), fill=-7)
    assert got.tolist() == [[[4, 5], [-7, -7], [4, 5]]]
    got.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[[0, 0], [0, 0], [2, 2]]]
    assert gather_tokens(torch.zeros(2, 0, 3), torch.full((2, 2), -1)).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="x has none"):
        gather_tokens(torch.zeros(1, 0, 3), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="index"):
        gather_tokens(torch.zeros(2, 4, 3), torch.zeros(1, 2, dtype=torch.long))


def test_gather_non_contiguous(generator: torch.Generator) -> None:
    x = torch.randn(4, 6, 2, generator=generator)
    index = torch.tensor([[5, 1], [0, -1]])
    view = x.permute(2, 1, 0)  # [2, 6, 4]
    assert torch.equal(gather_tokens(view, index), gather_tokens(view.contiguous(), index))


@settings(deadline=None, max_examples=80)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(0, 3))
def test_pack_indices(rows: list[list[bool]], extra: int) -> None:
    mask = torch.tensor(rows)
    longest = max(map(sum, rows))
    for side in ("left", "right"):
        for width in (None, longest + extra):
            index, valid = pack_indices(mask, side=side, width=width)
            slots = longest if width is None else width
            assert index.shape == valid.shape == (len(rows), slots)
            for b, row in enumerate(rows):
                kept = [i for i, keep in enumerate(row) if keep]
                filler = [-1] * (slots - len(kept))
                assert index[b].tolist() == (filler + kept if side == "left" else kept + filler)
            assert torch.equal(valid, index >= 0)


def test_pack_indices_refuses() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="more than width = 3"):
        pack_indices(mask, width=3)
    with pytest.raises(ValueError, match="side"):
        pack_indices(mask, side="both")
    with pytest.raises(ValueError, match="bool"):
        pack_indices(mask.long())


def test_pad_packed(generator: torch.Generator) -> None:
    x = torch.randn(6, 3, generator=generator)
    padded, valid = pad_packed(x, torch.tensor([0, 2, 2, 6]), 5)
    assert padded.shape == (3, 5, 3) and valid.sum(1).tolist() == [2, 0, 4]
    assert torch.equal(padded[valid], x)
    assert not padded[~valid].any()
    with pytest.raises(ValueError, match="longer than width = 3"):
        pad_packed(x, torch.tensor([0, 2, 2, 6]), 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 2)])
def test_merge_against_loops(mode: str, trailing: tuple[int, ...], generator: torch.Generator) -> None:
    x = torch.randn(3, 20, *trailing, generator=generator)
    group = torch.randint(-1, 6, (3, 20), generator=generator)
    group[group == 4] = 5  # group 4 stays empty
    weights = torch.rand(3, 20, generator=generator) + 0.1
    want = merged_by_hand(x, group, 6, mode, weights)
    got = segment_merge(x, group, 6, mode=mode, weights=weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    double = segment_merge(x.double(), group, 6, mode=mode, weights=weights)
    torch.testing.assert_close(double, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_accumulates_in_float32(dtype: torch.dtype) -> None:
    n = 4096  # a running sum in half precision would stall far below n
    x, group = torch.ones(1, n, 2, dtype=dtype), torch.zeros(1, n, dtype=torch.long)
    assert segment_merge(x, group, 1, mode="mean").tolist() == [[[1, 1]]]
    assert segment_merge(x, group, 1, mode="sum").tolist() == [[[n, n]]]
    assert segment_merge(x, group, 1).dtype == dtype


def test_prune_keeps_a_named_member(generator: torch.Generator) -> None:
    x = torch.randn(1, 6, 4, generator=generator)
    group = torch.tensor([[1, 0, 1, 0, -1, 1]])
    assert first_members(group, 3).tolist() == [[1, 0, -1]]
    assert torch.equal(segment_merge(x, group, 2, mode="prune"), x[:, [1, 0]])
    chosen = segment_merge(x, group, 2, mode="prune", representative=torch.tensor([[3, 5]]))
    assert torch.equal(chosen, x[:, [3, 5]])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_merging_twice_equals_merging_once(batch: int, n: int, n_groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, 3, dtype=torch.float64, generator=generator)
    first = torch.randint(-1, n_groups, (batch, n), generator=generator)
    then = torch.randint(-1, 3, (batch, n_groups), generator=generator)
    both = compose_groups(first, then)
    assert torch.equal(both < 0, (first < 0) | (then.gather(1, first.clamp_min(0)) < 0))
    twice = segment_merge(segment_merge(x, first, n_groups, mode="sum"), then, 3, mode="sum")
    torch.testing.assert_close(segment_merge(x, both, 3, mode="sum"), twice)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_ordered_groups(batch: int, n: int, n_groups: int, seed: int) -> None:
    """The same partition, named in the order in which its groups begin."""
    group = torch.randint(-1, n_groups, (batch, n), generator=torch.Generator().manual_seed(seed))
    for before, after in zip(group.tolist(), ordered_groups(group, n_groups).tolist(), strict=True):
        names = {name: i for i, name in enumerate(dict.fromkeys(name for name in before if name >= 0))}
        assert after == [names.get(name, -1) for name in before]


def test_sizes_carry_the_mean(generator: torch.Generator) -> None:
    """Merging with carried sizes gives the mean over all original tokens."""
    x = torch.randn(2, 12, 3, generator=generator)
    first = torch.randint(0, 5, (2, 12), generator=generator)
    size = segment_merge(torch.ones(2, 12), first, 5, mode="sum")
    then = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 0, 0]])
    twice = segment_merge(segment_merge(x, first, 5), then, 2, mode="wavg", weights=size)
    torch.testing.assert_close(twice, segment_merge(x, compose_groups(first, then), 2))


def test_unmerge_and_gradients(generator: torch.Generator) -> None:
    group = torch.tensor([[0, 1, 0, -1]])
    y = torch.randn(1, 2, 3, generator=generator)
    back = unmerge(y, group)
    assert torch.equal(back, torch.stack([y[0, 0], y[0, 1], y[0, 0], torch.zeros(3)])[None])
    x = torch.randn(1, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    for mode in MODES:
        weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        assert torch.autograd.gradcheck(
            lambda v, mode=mode, weights=weights: segment_merge(v, group, 2, mode=mode, weights=weights), (x,)
        )


def test_merge_refuses() -> None:
    x, group = torch.zeros(1, 3, 2), torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match="not below n_groups = 2"):
        segment_merge(x, group, 2)
    with pytest.raises(ValueError, match="needs weights"):
        segment_merge(x, group, 3, mode="wavg")
    with pytest.raises(ValueError, match="Unknown merge mode"):
        segment_merge(x, group, 3, mode="max")
    with pytest.raises(ValueError, match="group_id"):
        segment_merge(x, group[:, :2], 3)
    with pytest.raises(ValueError, match="weights must have shape"):
        segment_merge(x, group, 3, mode="wavg", weights=torch.ones(3))
