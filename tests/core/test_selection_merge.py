"""Merging selections against dense float64 weight matrices and plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.core.pairs import Pairs
from vlmprune.core.selection import Selection
from vlmprune.kernels.bipartite import bipartite_match

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
MODES = ("mean", "wavg", "sum", "amax")


@st.composite
def groupings(draw: st.DrawFn, n: int | None = None, counts: list[int] | None = None) -> dict[str, Any]:
    """Group ids ``[I, N]`` (dense from 0, -1 dropped; padding after ``counts``), outputs, weights."""
    n = draw(st.integers(1, 7)) if n is None else n
    if counts is None:
        counts = draw(st.lists(st.integers(0, n), min_size=1, max_size=3))
    groups = []
    for count in counts:
        row = [draw(st.integers(-1, max(count - 1, 0))) for _ in range(count)]
        dense = {old: new for new, old in enumerate(sorted(set(row) - {-1}))}
        groups.append([dense.get(group, -1) for group in row] + [-1] * (n - count))
    outputs = [max([-1, *row]) + 1 for row in groups]
    weights = [[draw(st.integers(1, 9)) for _ in range(n)] for _ in counts]
    extra = draw(st.integers(0, 1))
    return {"groups": groups, "outputs": outputs, "n_out": max(outputs) + extra, "weights": weights}


def tensors(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    group_id = torch.tensor(case["groups"])
    weights = torch.tensor(case["weights"]).float()
    values = torch.randn(*group_id.shape, 3, generator=torch.Generator().manual_seed(group_id.numel()))
    return group_id, weights, values


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal shapes and values up to rounding (torch.testing.assert_close takes seconds to load)."""
    if actual.shape != expected.shape:
        return False
    return torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def members(row: list[int], output: int) -> list[int]:
    return [n for n, group in enumerate(row) if group == output]


def reference(case: dict[str, Any], mode: str, values: Tensor) -> Tensor:
    """Outputs ``[I, M, D]`` in float64, one group at a time."""
    out = torch.zeros(len(case["groups"]), case["n_out"], values.shape[-1], dtype=torch.float64)
    for item, row in enumerate(case["groups"]):
        for output in range(case["outputs"][item]):
            tokens = members(row, output)
            rows = values[item, tokens].double()
            weight = torch.tensor([case["weights"][item][t] for t in tokens]).double()[:, None]
            out[item, output] = {
                "mean": rows.mean(0),
                "wavg": (rows * weight).sum(0) / weight.sum(),
                "sum": rows.sum(0),
                "amax": rows.amax(0),
            }[mode]
    return out


def select(case: dict[str, Any], mode: Any, weights: Tensor | None = None) -> Selection:
    group_id, sizes, _ = tensors(case)
    weights = sizes if weights is None else weights
    return Selection.merge(group_id, case["n_out"], mode, weights if mode == "wavg" else None)


@PROPERTY
@given(case=groupings(), mode=st.sampled_from(MODES))
def test_apply_and_unmerge(case: dict[str, Any], mode: Any) -> None:
    selection, (_, _, values) = select(case, mode), tensors(case)
    assert selection.n_outputs == case["n_out"] and not selection.is_pruning
    assert selection.out_counts() == tuple(case["outputs"])
    out = selection.apply(values)
    assert near(out, reference(case, mode, values))
    assert torch.equal(selection.apply(values[..., 0]), out[..., 0])
    back = selection.unmerge(out)
    for item, row in enumerate(case["groups"]):
        for token, group in enumerate(row):
            assert torch.equal(back[item, token], out[item, group] if group >= 0 else torch.zeros(3))


@PROPERTY
@given(case=groupings())
def test_anchors_are_the_first_members(case: dict[str, Any]) -> None:
    expected = [
        [members(row, output)[0] if output < count else -1 for output in range(case["n_out"])]
        for row, count in zip(case["groups"], case["outputs"], strict=True)
    ]
    selection = select(case, "mean")
    assert selection.anchors().tolist() == expected
    assert selection.out_valid().tolist() == [[anchor >= 0 for anchor in row] for row in expected]


@PROPERTY
@given(case=groupings(), mode=st.sampled_from(MODES))
def test_source_map(case: dict[str, Any], mode: Any) -> None:
    selection, (group_id, _, values) = select(case, mode), tensors(case)
    weights = torch.zeros(len(case["groups"]), case["n_out"], group_id.shape[1], dtype=torch.float64)
    for item, row in enumerate(case["groups"]):
        for output in range(case["outputs"][item]):
            tokens = members(row, output)
            share = [case["weights"][item][t] if mode == "wavg" else 1 for t in tokens]
            for token, part in zip(tokens, share, strict=True):
                weights[item, output, token] = part / sum(share)
    source_map = selection.source_map()
    assert near(source_map.weights, weights)
    if mode in ("mean", "wavg"):
        assert near(source_map.apply(values), selection.apply(values))


@PROPERTY
@given(data=st.data(), mode=st.sampled_from(("sum", "amax", "wavg")))
def test_compose(data: st.DataObject, mode: Any) -> None:
    first_case = data.draw(groupings())
    first, (group_id, sizes, values) = select(first_case, mode), tensors(first_case)
    later_case = data.draw(groupings(n=max(1, first_case["n_out"]), counts=first_case["outputs"]))
    if first_case["n_out"] == 0:
        return
    merged_sizes = Selection.merge(group_id, first_case["n_out"], "sum").apply(sizes)
    later = select(later_case, mode, merged_sizes)
    both = first.compose(later)
    expected = later.apply(first.apply(values))
    assert near(both.apply(values), expected)
    assert both.out_counts() == later.out_counts()
    maps = first.source_map().compose(later.source_map())
    assert torch.equal(both.source_map().kept(), maps.kept())
    assert both.source_map().groups() == maps.groups()
    if mode == "wavg":
        assert near(both.source_map().weights, maps.weights)


def test_selections_that_do_not_compose_say_so() -> None:
    groups = torch.tensor([[0, 0, 1]])
    mean, total = Selection.merge(groups, 2), Selection.merge(groups, 2, "sum")
    pruned = Selection(3, torch.tensor([[0, 2]]))
    later_mean, later_sum = Selection.merge(groups[:, :2], 1), Selection.merge(groups[:, :2], 1, "sum")
    for first, later in [(mean, later_mean), (total, later_mean), (mean, later_sum), (pruned, later_sum)]:
        with pytest.raises(ValueError, match=r"source_map\(\)\.compose"):
            first.compose(later)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, mode: Any) -> None:
    values = torch.randn(1, 512, 4, generator=torch.Generator().manual_seed(0)).to(dtype) + 1
    group_id = torch.arange(512)[None] % 2
    weights = torch.rand(1, 512, generator=torch.Generator().manual_seed(1)) if mode == "wavg" else None
    out = Selection.merge(group_id, 2, mode, weights).apply(values)
    case = {"groups": group_id.tolist(), "outputs": [2], "n_out": 2}
    case["weights"] = [[1.0] * 512] if weights is None else weights.tolist()
    assert out.dtype == dtype
    # One rounding of the exact result, not one per addition.
    expected = reference(case, mode, values)
    assert near(out, expected, torch.finfo(dtype).eps)


def test_sizes_of_merged_tokens_add_up() -> None:
    selection = Selection.merge(torch.tensor([[0, 1, 0, -1]]), 2, "sum", counts=(2,))
    assert selection.apply(torch.ones(1, 4)).tolist() == [[2.0, 1.0]]
    assert selection.out_counts() == (2,)


def test_a_group_without_weight_gives_zero() -> None:
    selection = Selection.merge(torch.tensor([[0, 0]]), 1, "wavg", torch.zeros(1, 2))
    assert selection.apply(torch.ones(1, 2)).tolist() == [[0.0]]
    assert selection.source_map().weights.tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("mode", ["mean", "wavg"])
def test_pairs_give_what_groups_give(mode: str) -> None:
    torch.manual_seed(0)
    x, sizes = torch.randn(2, 11, 3), torch.randint(1, 5, (2, 11)).float()
    match = bipartite_match(torch.randn(2, 11, 4), 4, protect=1)
    weights = sizes if mode == "wavg" else None
    by_groups = Selection.merge(match.group_id, match.n_out, mode, weights)
    by_pairs = replace(by_groups, pairs=Pairs(match.kept, match.sources, match.into))
    torch.testing.assert_close(by_pairs.apply(x, features=True), by_groups.apply(x, features=True), atol=1e-6, rtol=0)
    assert torch.equal(by_pairs.anchors(), by_groups.anchors())
    again = Selection.merge(bipartite_match(torch.randn(2, 7, 4), 2).group_id, 5, mode, sizes[:, :7])
    if mode == "wavg":
        assert by_pairs.compose(again).pairs is None
