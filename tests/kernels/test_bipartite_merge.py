"""Merging of matched tokens: modes, layers in a row, gradients, selections."""

from __future__ import annotations

import pytest
import torch

from vlmprune.core.selection import Selection
from vlmprune.kernels.bipartite import bipartite_match, merge_groups
from vlmprune.kernels.gather import compose_groups, segment_merge, unmerge


def test_layers_compose(generator: torch.Generator) -> None:
    x = torch.randn(2, 25, 6, generator=generator)
    tokens, size, groups = x, torch.ones(2, 25), torch.arange(25).expand(2, 25)
    for r in (5, 4, 3):
        match = bipartite_match(tokens, r, protect=1)
        tokens = merge_groups(tokens, match.group_id, match.n_out, "wavg", size)
        size = segment_merge(size[..., None], match.group_id, match.n_out, mode="sum")[..., 0]
        groups = compose_groups(groups, match.group_id)
    torch.testing.assert_close(tokens, segment_merge(x, groups, 13), atol=1e-5, rtol=0)
    assert (size.sum(1) == 25).all() and torch.equal(tokens[:, 0], x[:, 0])
    torch.testing.assert_close((tokens * size[..., None]).sum(1), x.sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(unmerge(tokens, groups).sum(1), x.sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["wavg", "mean", "sum", "amax", "prune"])
def test_merging(mode: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(2, 9, 3, 2, generator=generator).to(dtype)
    group = torch.tensor([[0, 2, 2, -1, 0, 4, 2, 4, 4], [1, 1, 1, 1, 0, 0, 0, -1, -1]])
    size = torch.randint(0, 4, (2, 9), generator=generator).float()
    got = merge_groups(x, group, 6, mode, size)
    assert got.dtype == dtype and got.shape == (2, 6, 3, 2) and not got[:, [3, 5]].any()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    want = merge_groups(x, group, 6, mode, size, backend="reference")
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    if mode == "wavg":
        torch.testing.assert_close(merge_groups(x, group, 6), merge_groups(x, group, 6, "mean"))


def test_gradient_flows_through_a_merge(generator: torch.Generator) -> None:
    x = torch.randn(1, 8, 2, generator=generator, requires_grad=True)
    match = bipartite_match(x, 3)
    merge_groups(x, match.group_id, match.n_out, "sum").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_groups_make_a_selection(generator: torch.Generator) -> None:
    x = torch.randn(2, 14, 5, generator=generator)
    size = torch.rand(2, 14, generator=generator) + 0.5
    match = bipartite_match(x, threshold=0.3, order="original")
    selection = Selection.merge(match.group_id, match.n_out, "wavg", size)
    torch.testing.assert_close(selection.apply(x), merge_groups(x, match.group_id, match.n_out, size=size))
    assert selection.out_counts() == tuple(match.counts.tolist())
    for anchors, count in zip(selection.anchors().tolist(), match.counts.tolist(), strict=True):
        assert anchors[:count] == sorted(anchors[:count]), "in the original order"
