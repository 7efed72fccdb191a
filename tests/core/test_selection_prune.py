"""Pruning selections and synthetic tokens against dense float64 weight matrices built in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.core.selection import Selection, Synthetic

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
MASKS = st.integers(0, 7).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)
TRAILING = st.sampled_from([(), (1,), (3,), (2, 2)])


def padded(rows: list[list[int]], width: int | None = None) -> Tensor:
    """int64 rows filled up with -1."""
    width = max(map(len, rows), default=0) if width is None else width
    filled = [row + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.long).reshape(len(rows), width)


def dense(kept: list[list[int]], n_in: int, width: int) -> Tensor:
    """Weights ``[I, M, N]`` with a one where output m is input n."""
    weights = torch.zeros(len(kept), width, n_in, dtype=torch.float64)
    for item, row in enumerate(kept):
        for output, token in enumerate(row):
            weights[item, output, token] = 1
    return weights


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal shapes and values up to rounding (torch.testing.assert_close takes seconds to load)."""
    if actual.shape != expected.shape:
        return False
    return torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def product(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` over the token axis for any trailing shape."""
    return torch.einsum("imn,in...->im...", weights, values.double())


def random_values(mask: list[list[bool]], trailing: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(mask) * 100 + len(mask[0]))
    return torch.randn(len(mask), len(mask[0]), *trailing, generator=generator)


@PROPERTY
@given(mask=MASKS, trailing=TRAILING, knows=st.booleans())
def test_mask(mask: list[list[bool]], trailing: tuple[int, ...], knows: bool) -> None:
    kept = [[n for n, keep in enumerate(row) if keep] for row in mask]
    counts = tuple(map(len, kept))
    n_in, width = len(mask[0]), max(counts)
    keep = torch.tensor(mask).reshape(len(mask), n_in).bool()
    selection = Selection.from_mask(keep, counts if knows else None)

    assert selection.n_outputs == width and selection.is_pruning
    assert selection.out_counts() == counts
    assert torch.equal(selection.anchors(), padded(kept, width))
    assert selection.anchors().dtype == torch.int64
    assert selection.out_valid().tolist() == [[m < count for m in range(width)] for count in counts]
    weights = dense(kept, n_in, width)
    assert torch.equal(selection.source_map().weights, weights)
    values = random_values(mask, trailing)
    applied = selection.apply(values)
    assert applied.shape == (len(mask), width, *trailing)
    assert torch.equal(applied.double(), product(weights, values))  # padding is zero, no value changes
    back = selection.unmerge(applied)
    assert torch.equal(back.double(), product(weights.transpose(1, 2), applied))
    assert torch.equal(back, torch.where(keep.reshape(*keep.shape, *[1] * len(trailing)), values, 0.0))


@PROPERTY
@given(mask=MASKS, data=st.data())
def test_compose(mask: list[list[bool]], data: st.DataObject) -> None:
    first = Selection.from_mask(torch.tensor(mask).reshape(len(mask), -1).bool())
    counts, width = first.out_counts(), first.n_outputs
    again = [[data.draw(st.booleans()) and m < count for m in range(width)] for count in counts]
    later = Selection.from_mask(torch.tensor(again).reshape(len(mask), width).bool())
    both = first.compose(later)
    values = random_values(mask, (2,))
    assert torch.equal(both.apply(values), later.apply(first.apply(values)))
    assert both.out_counts() == later.out_counts()
    assert both.n_in == first.n_in
    maps = first.source_map().compose(later.source_map())
    assert torch.equal(both.source_map().weights, maps.weights)


@PROPERTY
@given(data=st.data(), n=st.integers(1, 8), items=st.integers(1, 3))
def test_order_is_sorted(data: st.DataObject, n: int, items: int) -> None:
    orders = [data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n))] for _ in range(items)]
    selection = Selection.from_order(padded(orders), n)
    assert torch.equal(selection.anchors(), padded([sorted(order) for order in orders]))
    assert selection.out_counts() == tuple(map(len, orders))


def test_an_order_of_its_own_is_left_alone() -> None:
    selection = Selection(4, torch.tensor([[3, 0, 2]]))
    values = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    assert selection.apply(values).tolist() == [[13.0, 10.0, 12.0]]
    assert selection.unmerge(selection.apply(values)).tolist() == [[10.0, 0.0, 12.0, 13.0]]


def test_keep_all_and_drop_all() -> None:
    valid = torch.tensor([[True, True, True], [True, False, False]])
    values = torch.randn(2, 3, 2)
    everything = Selection.keep_all(valid, (3, 1))
    assert everything.out_counts() == (3, 1)
    assert torch.equal(everything.apply(values), torch.where(valid[..., None], values, 0.0))
    nothing = Selection.drop_all(valid)
    assert nothing.out_counts() == (0, 0) and nothing.n_outputs == 0
    assert nothing.apply(values).shape == (2, 0, 2)
    assert torch.equal(nothing.unmerge(nothing.apply(values)), torch.zeros(2, 3, 2))
    assert nothing.source_map().weights.shape == (2, 0, 3)
    assert torch.equal(everything.compose(nothing).apply(values), nothing.apply(values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_pruning_keeps_the_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 0, 1]]).to(dtype)
    selection = Selection(4, torch.tensor([[1, 2, -1]]))
    assert selection.apply(values).dtype == dtype
    assert selection.apply(values).tolist() == torch.tensor([[1, 0, 0]]).to(dtype).tolist()
    assert selection.unmerge(selection.apply(values)).dtype == dtype


def test_pruning_is_differentiable() -> None:
    values = torch.randn(1, 3, 2, requires_grad=True)
    Selection(3, torch.tensor([[2, -1]])).apply(values).sum().backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == [[0, 0], [0, 0], [1, 1]]


@st.composite
def with_synthetic(draw: st.DrawFn) -> dict[str, Any]:
    """Kept tokens and new ones with their sources and places, ragged, as plain lists."""
    n, items = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    rows = []
    for _ in range(items):
        kept = sorted(draw(st.sets(st.integers(0, n - 1), max_size=n)))
        new = []
        for _ in range(draw(st.integers(0, 3))):
            sources = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
            new.append((draw(st.sampled_from(sources)), sorted(sources)))
        rows.append((kept, new))
    return {"n": n, "rows": rows}


@PROPERTY
@given(case=with_synthetic())
def test_synthetic(case: dict[str, Any]) -> None:
    n, rows = case["n"], case["rows"]
    n_new = max(len(new) for _, new in rows)
    sources = torch.zeros(len(rows), n_new, n)
    features = torch.full((len(rows), n_new, 2), 77.0)  # padding rows hold rubbish
    for item, (_, new) in enumerate(rows):
        for s, (_, members) in enumerate(new):
            sources[item, s, members] = 1 / len(members)
            features[item, s] = torch.tensor([100.0 + item, s])
    place = padded([[place for place, _ in new] for _, new in rows], n_new)
    kept = padded([kept for kept, _ in rows])
    selection = Selection(n, kept, synthetic=Synthetic(features, sources, place))

    width = kept.shape[1] + n_new
    assert selection.n_outputs == width and not selection.is_pruning
    values = torch.randn(len(rows), n, 2, generator=torch.Generator().manual_seed(n))
    weights = torch.zeros(len(rows), width, n, dtype=torch.float64)
    tokens = torch.zeros(len(rows), width, 2)
    anchors, counts = [], []
    for item, (old, new) in enumerate(rows):
        outputs = [(token, 0, [token], values[item, token]) for token in old]
        outputs += [(token, 1, members, features[item, s]) for s, (token, members) in enumerate(new)]
        outputs.sort(key=lambda output: output[:2])  # a kept token before the new ones at its place
        for m, (_, _, members, feature) in enumerate(outputs):
            weights[item, m, members] = 1 / len(members)
            tokens[item, m] = feature
        anchors.append([output[0] for output in outputs])
        counts.append(len(outputs))
    assert selection.out_counts() == tuple(counts)
    assert torch.equal(selection.anchors(), padded(anchors, width))
    assert torch.equal(selection.apply(values, features=True), tokens)
    assert near(selection.apply(values), product(weights, values))
    assert near(selection.source_map().weights, weights)
    outputs = torch.randn(len(rows), width, 2)
    share = weights.transpose(1, 2)
    share = share / share.sum(-1, keepdim=True).clamp_min(1e-30)
    assert near(selection.unmerge(outputs), product(share, outputs))


def test_synthetic_tokens_take_the_dtype_of_the_tokens() -> None:
    new = Synthetic(torch.ones(1, 1, 2), torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[1]]))
    selection = Selection(3, torch.tensor([[2]]), synthetic=new)
    values = torch.tensor([[[2.0, 0], [4, 0], [6, 0]]], dtype=torch.bfloat16)
    assert selection.apply(values, features=True).dtype == torch.bfloat16
    assert selection.apply(values).tolist() == [[[3.0, 0.0], [6.0, 0.0]]]
    assert selection.unmerge(selection.apply(values)).dtype == torch.bfloat16


def test_known_counts_are_taken_as_they_are() -> None:
    selection = Selection(3, torch.tensor([[0, 2]]), counts=(2,))
    assert selection.out_counts() == (2,)


def test_carry_and_scores_stay_with_the_inputs() -> None:
    carry = {"mass": torch.tensor([[1.0, 2.0, 3.0]])}
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    first = Selection(3, torch.tensor([[0, 2]]), carry=carry, scores=scores)
    both = first.compose(Selection(2, torch.tensor([[1]])))
    assert both.carry["mass"].shape[1] == both.n_in == 3
    assert both.apply(both.carry["mass"]).tolist() == [[3.0]]
    assert both.scores is scores


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kept": torch.zeros(1, 1).long(), "group_id": torch.zeros(1, 3).long(), "n_out": 1, "mode": "sum"},
        {"group_id": torch.zeros(1, 3).long(), "mode": "mean"},
        {"group_id": torch.zeros(1, 3).long(), "n_out": 1},
        {"group_id": torch.zeros(1, 3).long(), "n_out": 1, "mode": "wavg"},
    ],
)
def test_malformed_selections_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs"):
        Selection(3, **fields)


def test_compose_refuses_another_width() -> None:
    with pytest.raises(ValueError, match="acts on 3 tokens, not on 2"):
        Selection(4, torch.tensor([[0, 1]])).compose(Selection(3, torch.tensor([[0]])))
